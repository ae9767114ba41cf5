#!/usr/bin/env python3
"""Measure how events reach many subscribers, and what one that does not read costs the others.

    python bench/events.py [--subscribers 50,500,2000,10000] [--events 1000] [--stuck]

A plugin sends a burst of notifications; a client process counts what every subscriber receives,
while another asks for a proxied GET every 10 ms. The reference, in the same run: one Python process
that writes the same bytes to as many plain sockets, all events of 64 KiB in one call.
"""
from __future__ import annotations

import argparse
import json
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import Scene, cpu_seconds, memory_mib

PLUGIN = '''
from radical_edge import Plugin, plugin, post

@plugin("burst")
class Burst(Plugin):
    @post("send/{count}/{size}")
    async def send(self, request):
        count, size = (int(request.path_params[name]) for name in ("count", "size"))
        for number in range(count):
            self._dispatch_notify("tick", {"n": number, "text": "x" * (size - 20)})
        return {}
'''

WRITER = '''
import resource, socket, sys
count, size = int(sys.argv[1]), int(sys.argv[2])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
print(listener.getsockname()[1], flush=True)
sockets = [listener.accept()[0] for _ in range(count)]
sys.stdin.readline()
piece = bytes(65536)
while size > 0:
    for sock in sockets:
        sock.sendall(piece[:size])
    size -= len(piece)
sys.stdin.readline()
'''


class Readers:
    """Connections that are read until each has `wanted` of a mark, or of bytes."""

    def __init__(self, sockets: list[socket.socket], mark: bytes | None) -> None:
        self._mark, self._epoll = mark, select.epoll()
        self._sockets = {sock.fileno(): sock for sock in sockets}
        self.counts = dict.fromkeys(self._sockets, 0)
        self._tails = dict.fromkeys(self._sockets, b"")
        self.done_at: dict[int, float] = {}
        for fd in self._sockets:
            self._epoll.register(fd, select.EPOLLIN)

    def run(self, wanted: int, seconds: float) -> bool:
        """Read until all have `wanted`; False when that takes longer."""
        end = time.perf_counter() + seconds
        while len(self.done_at) < len(self.counts) and time.perf_counter() < end:
            for fd, _ in self._epoll.poll(1.0, 1024):
                self._read(fd, wanted)
        return len(self.done_at) == len(self.counts)

    def _read(self, fd: int, wanted: int) -> None:
        data = self._sockets[fd].recv(1 << 18)
        if not data:
            raise SystemExit("a subscriber was cut off")
        if self._mark is None:
            self.counts[fd] += len(data)
        else:
            data = self._tails[fd] + data
            self.counts[fd] += data.count(self._mark)
            self._tails[fd] = data[-len(self._mark) + 1:]
        if self.counts[fd] >= wanted:
            self.done_at.setdefault(fd, time.perf_counter())


class Pinger(threading.Thread):
    """Asks for a proxied GET every 10 ms; `latencies` in seconds."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(daemon=True)
        self._scene, self.latencies, self.stopping = scene, [], threading.Event()

    def run(self) -> None:
        with self._scene.connect() as sock:
            while not self.stopping.wait(0.01) or len(self.latencies) < 3:
                begin = time.perf_counter()
                sock.sendall(self._scene.head("GET", "/bench/sysinfo/homedir"))
                sock.recv(65536)
                self.latencies.append(time.perf_counter() - begin)


def subscribe(scene: Scene, count: int) -> list[socket.socket]:
    sockets = []
    for _ in range(count):
        sock = scene.connect()
        sock.sendall(scene.head("GET", "/events"))
        sockets.append(sock)
    for sock in sockets:                          # the topology: the subscription stands
        text = b""
        while b'"topology"' not in text:
            text += sock.recv(65536)
    return sockets


def reference(count: int, size: int) -> float:
    """Return the seconds that plain writes of as many bytes take."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(count), str(size)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    port = int(writer.stdout.readline())
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    readers = Readers(sockets, None)
    begin = time.perf_counter()
    writer.stdin.write("\n")
    writer.stdin.flush()
    readers.run(size, 300)
    seconds = time.perf_counter() - begin
    for sock in sockets:
        sock.close()
    writer.communicate("\n")
    return seconds


def burst(scene: Scene, sockets: list[socket.socket], events: int, size: int) -> dict:
    """Send a burst; return what became of it."""
    pinger, readers = Pinger(scene), Readers(sockets, b'"topic":"tick"')
    before = memory_mib(scene.bridge.pid), cpu_seconds(scene.bridge.pid)
    pinger.start()
    begin = time.perf_counter()
    sender = threading.Thread(target=scene.request,
                              args=("POST", f"/bench/burst/send/{events}/{size}"))
    sender.start()
    complete = readers.run(events, 300)
    seconds = time.perf_counter() - begin
    sender.join()
    pinger.stopping.set()
    pinger.join()
    return {"complete": complete, "received": min(readers.counts.values()), "seconds": seconds,
            "cpu": cpu_seconds(scene.bridge.pid) - before[1], "before": before[0],
            "peak": memory_mib(scene.bridge.pid, "VmHWM"),
            "ping": statistics.median(pinger.latencies), "worst": max(pinger.latencies)}


def measure(count: int, events: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), PLUGIN)
        try:
            scene.wait_online()
            sockets = subscribe(scene, count)
            found = burst(scene, sockets, events, 200)
            for sock in sockets:
                sock.close()
            time.sleep(4)                         # at rest
            after = memory_mib(scene.bridge.pid)
        finally:
            scene.close()
    plain = reference(count, events * 320)
    print(f"{count:11} {events * count / found['seconds']:11.0f} {found['seconds']:8.2f} "
          f"{plain:8.2f} {found['seconds'] / plain:6.1f}   {found['before']:7.1f} "
          f"{found['peak']:6.1f} {after:6.1f}   {found['cpu']:6.2f}   {found['ping'] * 1000:7.1f} "
          f"{found['worst'] * 1000:7.1f}   {'all' if found['complete'] else 'NOT ALL'}", flush=True)


def measure_stuck() -> None:
    """One subscriber does not read; 50 others do, during 20,000 events of 1 kB."""
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), PLUGIN)
        try:
            scene.wait_online()
            healthy = subscribe(scene, 50)
            alone = burst(scene, healthy, 20_000, 1000)
            stuck = subscribe(scene, 1)
            beside = burst(scene, healthy, 20_000, 1000)
            for sock in healthy + stuck:
                sock.close()
            time.sleep(1)
            print(json.dumps({"without a stuck subscriber": alone, "beside one": beside,
                              "MiB at rest": round(memory_mib(scene.bridge.pid), 1)}, indent=1))
        finally:
            scene.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--subscribers", default="50,500,2000,10000")
    parser.add_argument("--events", type=int, default=1000, help="notifications in the burst")
    parser.add_argument("--stuck", action="store_true", help="a stuck subscriber beside 50 others")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("                              seconds              MiB of the bridge     bridge  "
          "proxied GET, ms")
    print("subscribers  events/s     ours   writes  ratio    before   peak  after   CPU s    "
          "median   worst   received")
    for count in map(int, filter(None, options.subscribers.split(","))):
        if count + 100 > hard:
            print(f"{count:11} left out: only {hard} open files are allowed")
        else:
            measure(count, options.events)
    if options.stuck:
        measure_stuck()


if __name__ == "__main__":
    main()
