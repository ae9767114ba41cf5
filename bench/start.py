#!/usr/bin/env python3
"""Measure how long a bridge and an edge take to answer their first request, and what they weigh.

    python bench/start.py [--rounds 5]

Printed are medians: seconds from the start of the process to the first answer (of the bridge
itself, and through the edge once that is started too), and the resident memory of each process
after a second of rest, next to a bare interpreter that has imported what the core imports.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "radical_edge.py")
IMPORTS = "import argparse, asyncio, http.server, json, logging, ssl, urllib.request"


def resident_mib(pid: int) -> float:
    """Return a process's resident memory; nan where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def wait_for_answer(url: str, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.002)
    raise SystemExit(f"no answer from {url}")


def end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait()


def measure_start() -> dict[str, float]:
    """Start a bridge, then an edge; return seconds and MiB."""
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        env = {**os.environ, "HOME": home}
        port = "18471"
        begin = time.perf_counter()
        bridge = subprocess.Popen([sys.executable, SCRIPT, "--bridge", "--port", port], env=env,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(end, bridge)
        wait_for_answer(f"http://127.0.0.1:{port}/health", "")
        found = {"bridge s": time.perf_counter() - begin}
        token = (Path(home) / ".radical/edge/token").read_text().strip()
        begin = time.perf_counter()
        edge = subprocess.Popen([sys.executable, SCRIPT, "--edge", "--name", "e"], env=env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(end, edge)
        wait_for_answer(f"http://127.0.0.1:{port}/e/sysinfo/homedir", token)
        found["edge s"] = time.perf_counter() - begin
        time.sleep(1)                              # at rest
        found.update({"bridge MiB": resident_mib(bridge.pid), "edge MiB": resident_mib(edge.pid)})
        return found


def measure_bare() -> dict[str, float]:
    """Return the same of an interpreter that only imports."""
    begin = time.perf_counter()
    bare = subprocess.Popen([sys.executable, "-c", f"{IMPORTS}\nprint(flush=True); input()"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    bare.stdout.readline()
    found = {"imports s": time.perf_counter() - begin, "imports MiB": resident_mib(bare.pid)}
    bare.communicate(b"\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = [{**measure_bare(), **measure_start()} for _ in range(options.rounds)]
    print(f"Python {sys.version.split()[0]}, medians of {options.rounds}")
    for name in rounds[0]:
        print(f"{name:12} {statistics.median(found[name] for found in rounds):8.2f}")


if __name__ == "__main__":
    main()
