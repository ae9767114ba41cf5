#!/usr/bin/env python3
"""Measure a small request next to slow streams, and many requests that each take a second.

    python bench/waiting.py [--streams 32] [--requests 200,2000] [--rounds 300]

Slow streams: downloads of any length through one link, each read at 64 KiB every 50 ms, one of them
not at all. The reference for both, in the same run: the same request on a quiet link, and 1 s.
"""
from __future__ import annotations

import argparse
import resource
import select
import statistics
import tempfile
import threading
import time
from pathlib import Path

from common import Scene, memory_mib

PLUGIN = '''
import asyncio
from radical_edge import Plugin, StreamingResponse, get, plugin

@plugin("slow")
class Slow(Plugin):
    @get("endless")
    async def endless(self, request):
        async def pieces():
            while True:
                yield bytes(65536)
        return StreamingResponse(pieces())

    @get("hello")
    async def hello(self, request):
        return {"hello": 1}

    @get("wait")
    async def wait(self, request):
        await asyncio.sleep(1)
        return {"waited": 1}
'''


def latency(scene: Scene, rounds: int) -> tuple[float, float]:
    """Return (median, 99th percentile) of a small request, in seconds."""
    found = []
    with scene.connect() as sock:
        for _ in range(rounds):
            begin = time.perf_counter()
            sock.sendall(scene.head("GET", "/bench/slow/hello"))
            sock.recv(65536)
            found.append(time.perf_counter() - begin)
    return statistics.median(found), sorted(found)[int(len(found) * 0.99)]


def read_slowly(sockets: list, stopping: threading.Event) -> None:
    while not stopping.wait(0.05):
        for sock in sockets:
            sock.recv(65536)


def measure_streams(scene: Scene, count: int, rounds: int) -> None:
    quiet = latency(scene, rounds)
    streams = [scene.connect() for _ in range(count)]
    for sock in streams:
        sock.sendall(scene.head("GET", "/bench/slow/endless"))
    stopping = threading.Event()
    reader = threading.Thread(target=read_slowly, args=(streams[1:], stopping))
    reader.start()                                # streams[0] is stopped dead
    time.sleep(2)                                 # until all windows are full
    busy = latency(scene, rounds)
    stopping.set()
    reader.join()
    peak = [memory_mib(process.pid, "VmHWM") for process in (scene.bridge, scene.edge)]
    print(f"{count} slow streams: a small request takes {busy[0] * 1000:.2f} ms (99 %: "
          f"{busy[1] * 1000:.2f}) next to {quiet[0] * 1000:.2f} ({quiet[1] * 1000:.2f}) on a quiet "
          f"link, {busy[0] / quiet[0]:.2f} times; peak MiB of bridge and edge: "
          f"{peak[0]:.1f}, {peak[1]:.1f}", flush=True)
    for sock in streams:
        sock.close()


def measure_requests(scene: Scene, count: int) -> None:
    sockets = {}
    for _ in range(count):
        sock = scene.connect()
        sockets[sock.fileno()] = sock
    epoll = select.epoll()
    begin = time.perf_counter()
    for fd, sock in sockets.items():
        epoll.register(fd, select.EPOLLIN)
        sock.sendall(scene.head("GET", "/bench/slow/wait"))
    waiting = set(sockets)
    while waiting:
        for fd, _ in epoll.poll(30):
            answer = sockets[fd].recv(65536)
            if b'"waited":1' not in answer:
                raise SystemExit(f"not answered: {answer!r}")
            waiting.discard(fd)
    print(f"{count} requests of 1 s each took {time.perf_counter() - begin:.2f} s together",
          flush=True)
    for sock in sockets.values():
        sock.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", default="200,2000")
    parser.add_argument("--rounds", type=int, default=300, help="small requests for each figure")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), PLUGIN)
        try:
            scene.wait_online("/bench/slow/hello")
            measure_streams(scene, options.streams, options.rounds)
            for count in map(int, options.requests.split(",")):
                measure_requests(scene, count)
        finally:
            scene.close()


if __name__ == "__main__":
    main()
