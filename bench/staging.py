#!/usr/bin/env python3
"""Measure files put to an edge and got from it, next to the same bytes over the bare wire.

    python bench/staging.py [--size 1024] [--rounds 2] [--tree 2000] [--folder /dev/shm]

The wire, in the same run: a client sends as many bytes to a plugin that counts them, or reads as
many from one that makes them (see bulk.py). The disk: a copy of the file, synced. Staging reads the
file, hashes it at both ends, writes and syncs it. A tree of small files is put next to `cp -r` of
it, which sends nothing. Sizes are in MiB. --folder: where the files lie; in memory, the disk is no
limit.
"""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bulk import PLUGIN, our_rate
from common import ROOT, Scene, memory_mib

sys.path.insert(0, str(ROOT))

from radical_edge import BridgeClient             # noqa: E402 (its path is known only now)

SMALL = 4096                   # bytes of a file of the tree


def make_file(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def make_tree(path: Path, count: int) -> None:
    for number in range(count):
        folder = path / f"d{number % 50}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(os.urandom(SMALL))


def seconds(function, *arguments) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def measure_file(scene: Scene, staging, size: int) -> None:
    here, there, back = (scene.folder / name for name in ("here", "there", "back"))
    for way, function, paths in (("up", staging.put, (here, str(there))),
                                 ("down", staging.get, (str(there), back))):
        wire = our_rate(scene, size, way)
        disk = size / seconds(copy, here, scene.folder / "copy")
        (scene.folder / "copy").unlink()
        ours = size / seconds(function, *paths)
        peak = [memory_mib(process.pid, "VmHWM") for process in (scene.bridge, scene.edge)]
        print(f"file  {way:5} {wire / 1e6:8.0f} {disk / 1e6:8.0f} {ours / 1e6:10.0f} "
              f"{ours / wire:8.2f}   {peak[0]:8.1f} {peak[1]:6.1f}", flush=True)
    there.unlink()
    back.unlink()


def measure_tree(scene: Scene, staging, count: int) -> None:
    here, there, back = (scene.folder / name for name in ("tree", "tree-there", "tree-back"))
    for way, function, paths in (("up", staging.put, (here, str(there))),
                                 ("down", staging.get, (str(there), back))):
        copied = seconds(shutil.copytree, here, scene.folder / "copy")
        shutil.rmtree(scene.folder / "copy")
        ours = seconds(function, *paths)
        print(f"tree  {way:5} {'':8} {count / copied:8.0f} {count / ours:10.0f} "
              f"{copied / ours:8.2f}   (files per second)", flush=True)
    shutil.rmtree(there)
    shutil.rmtree(back)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the file")
    parser.add_argument("--tree", type=int, default=2000, help="files of the tree")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="where the files lie")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        scene = Scene(Path(folder), PLUGIN)       # the folder is its home
        try:
            scene.wait_online()
            make_file(scene.folder / "here", options.size << 20)
            make_tree(scene.folder / "tree", options.tree)
            with BridgeClient(f"http://127.0.0.1:{scene.port}", token=scene.token) as bridge:
                staging = bridge.get_edge_client("bench").get_plugin("staging")
                print("               MB per second                      peak MiB")
                print("kind  way       wire     copy    staging    ratio     bridge   edge")
                for _ in range(options.rounds):
                    measure_file(scene, staging, options.size << 20)
                    measure_tree(scene, staging, options.tree)
                staging.close()
        finally:
            scene.close()


if __name__ == "__main__":
    main()
