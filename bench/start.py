#!/usr/bin/env python3
"""Measure how long a bridge and an edge take to answer their first request, and what they weigh.

    python bench/start.py [--rounds 5]

Printed are medians: seconds from the start of the process to the first answer (of the bridge
itself, and through the edge once that is started too), and the resident memory of each process
after six seconds of rest, over plain HTTP, over TLS, and of the two of `--bridge --edge`; next to a
bare interpreter that has imported what the core imports.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from common import SCRIPT, make_certificate, memory_mib

PORT = 18471
REST_S = 6                     # idle threads have ended by then
IMPORTS = "import argparse, asyncio, http.server, json, logging, ssl, urllib.request"


class Starter:
    """Starts processes of ours in a home directory; a stack ends them."""

    def __init__(self, home: str, stack: contextlib.ExitStack) -> None:
        self._home, self._stack = Path(home), stack
        self._env = {**os.environ, "HOME": home}

    def __call__(self, *arguments: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, SCRIPT, *arguments], env=self._env,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(end, process)
        return process

    def token(self) -> str:
        """Return the token that a bridge has written there."""
        return (self._home / ".radical/edge/token").read_text().strip()


def wait_for_answer(url: str, token: str, context: ssl.SSLContext | None = None) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, timeout=5, context=context):
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
        start = Starter(home, stack)
        begin = time.perf_counter()
        bridge = start("--bridge", "--port", str(PORT))
        wait_for_answer(f"http://127.0.0.1:{PORT}/health", "")
        found = {"bridge s": time.perf_counter() - begin}
        begin = time.perf_counter()
        edge = start("--edge", "--name", "e")
        wait_for_answer(f"http://127.0.0.1:{PORT}/e/sysinfo/homedir", start.token())
        found["edge s"] = time.perf_counter() - begin
        time.sleep(REST_S)
        return {**found, "bridge MiB": memory_mib(bridge.pid), "edge MiB": memory_mib(edge.pid)}


def measure_tls() -> dict[str, float]:
    """Return what a bridge and an edge weigh that talk over TLS."""
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        start = Starter(home, stack)
        cert, key = make_certificate(Path(home))
        bridge = start("--bridge", "--port", str(PORT), "--cert", cert, "--key", key)
        context = ssl.create_default_context(cafile=cert)
        wait_for_answer(f"https://127.0.0.1:{PORT}/health", "", context)
        edge = start("--edge", "--name", "e")
        wait_for_answer(f"https://127.0.0.1:{PORT}/e/sysinfo/homedir", start.token(), context)
        time.sleep(REST_S)
        return {"bridge, TLS, MiB": memory_mib(bridge.pid), "edge, TLS, MiB": memory_mib(edge.pid)}


def measure_both() -> dict[str, float]:
    """Start both with one command; return seconds to the edge's first answer, and MiB of each."""
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        start = Starter(home, stack)
        begin = time.perf_counter()
        both = start("--bridge", "--port", str(PORT), "--edge", "--name", "e")
        wait_for_answer(f"http://127.0.0.1:{PORT}/health", "")
        wait_for_answer(f"http://127.0.0.1:{PORT}/e/sysinfo/homedir", start.token())
        found = {"both s": time.perf_counter() - begin}
        time.sleep(REST_S)
        edge = int(subprocess.check_output(["pgrep", "-P", str(both.pid)]))
        return {**found, "both: bridge MiB": memory_mib(both.pid), "both: edge MiB": memory_mib(edge)}


def measure_bare() -> dict[str, float]:
    """Return the same of an interpreter that only imports."""
    begin = time.perf_counter()
    bare = subprocess.Popen([sys.executable, "-c", f"{IMPORTS}\nprint(flush=True); input()"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    bare.stdout.readline()
    found = {"imports s": time.perf_counter() - begin, "imports MiB": memory_mib(bare.pid)}
    bare.communicate(b"\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = [{**measure_bare(), **measure_start(), **measure_tls(), **measure_both()}
              for _ in range(options.rounds)]
    print(f"Python {sys.version.split()[0]}, medians of {options.rounds}")
    for name in rounds[0]:
        print(f"{name:17} {statistics.median(found[name] for found in rounds):8.2f}")


if __name__ == "__main__":
    main()
