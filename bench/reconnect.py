#!/usr/bin/env python3
"""Measure how long an edge cannot be reached after kill -9, of itself or of its bridge.

    python bench/reconnect.py [--rounds 5]

The killed process is started again at once. The reference, in the same run: the time that a fresh
edge takes from its start to its first answer, and a fresh bridge to its own. The last row is a
frozen edge (SIGSTOP) that a new process of the same name replaces.
"""
from __future__ import annotations

import argparse
import signal
import statistics
import tempfile
import time
from pathlib import Path

from common import Scene


def start_bridge(scene: Scene) -> None:
    scene.bridge = scene.start("--bridge", "--port", str(scene.port), expect="bridge: http")[0]


def timed(action, scene: Scene, path: str = "/bench/sysinfo/homedir") -> float:
    begin = time.perf_counter()
    action()
    scene.wait_online(path)
    return time.perf_counter() - begin


def kill(process) -> None:
    process.kill()
    process.wait()


def measure(scene: Scene) -> dict[str, float]:
    """Return seconds of one round."""
    found = {}
    kill(scene.edge)
    found["kill -9 of the edge"] = timed(lambda: restart_edge(scene), scene)
    kill(scene.bridge)
    found["kill -9 of the bridge"] = timed(lambda: start_bridge(scene), scene)
    scene.edge.send_signal(signal.SIGSTOP)
    found["a frozen edge"] = timed(lambda: restart_edge(scene), scene)
    return found


def restart_edge(scene: Scene) -> None:
    scene.edge = scene.start_edge()


def measure_fresh() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        scene = Scene(Path(folder), edge=False)
        try:
            scene.wait_online("/edges")
            bridge = time.perf_counter() - begin
            return {"a fresh bridge": bridge,
                    "a fresh edge": timed(lambda: restart_edge(scene), scene)}
        finally:
            scene.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder))
        try:
            scene.wait_online()
            for _ in range(options.rounds):
                for name, seconds in {**measure_fresh(), **measure(scene)}.items():
                    rows.setdefault(name, []).append(seconds)
        finally:
            scene.close()
    print("seconds to the first answer    median      max")
    for name, found in rows.items():
        print(f"{name:28} {statistics.median(found):8.2f} {max(found):8.2f}")


if __name__ == "__main__":
    main()
