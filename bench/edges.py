#!/usr/bin/env python3
"""Measure a bridge with many edges: how fast they register, and /edge/list meanwhile.

    python bench/edges.py [--edges 50,200,1000]

The edges are connections of one process, which registers each as an edge with the built-in plugins
does, and answers pings. The reference, in the same run: as many TCP connections that are accepted
by one thread and get a line back. `POST /edge/list` is asked for all the while, in a thread.
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

from common import ROOT, Scene, cpu_seconds, memory_mib

sys.path.insert(0, str(ROOT))

import radical_edge                               # noqa: E402 (its path is known only now)

ACCEPTOR = '''
import socket
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
print(listener.getsockname()[1], flush=True)
kept = []
while True:
    sock, _ = listener.accept()
    sock.sendall(sock.recv(65536)[:1])
    kept.append(sock)
'''


class FakeEdges(threading.Thread):
    """Registered links; a thread reads them and answers pings."""

    def __init__(self, scene: Scene, plugins: dict) -> None:
        super().__init__(daemon=True)
        self._scene, self._plugins = scene, plugins
        self._epoll, self._links = select.epoll(), {}
        self.registered, self.stopping = 0, False

    def add(self, number: int) -> None:
        url = radical_edge.parse_bridge_url(f"http://127.0.0.1:{self._scene.port}")
        sock, rest = radical_edge.open_websocket(url, self._scene.token, None)
        parser = radical_edge.FrameParser(masked=False)
        parser.feed(rest)
        message = {"type": "register", "edge_name": f"edge-{number}", "plugins": self._plugins,
                   "endpoint": {"type": "radical.edge", "hostname": "bench"},
                   "instance": f"instance-{number}", "wire": [1, 2]}
        self._say(sock, message)
        sock.setblocking(False)
        self._links[sock.fileno()] = sock, parser
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while not self.stopping:
            for fd, _ in self._epoll.poll(0.2, 256):
                self._read(*self._links[fd])

    def close(self) -> None:
        self.stopping = True
        self.join()
        for sock, _ in self._links.values():
            sock.close()

    def _read(self, sock: socket.socket, parser: radical_edge.FrameParser) -> None:
        data = sock.recv(1 << 18)
        if not data:
            raise SystemExit("a link was closed")
        parser.feed(data)
        for _, payload in iter(parser.next_message, None):
            if payload.startswith('{"type":"registered"'):
                self.registered += 1
            elif payload.startswith('{"type":"ping"'):
                self._say(sock, {"type": "pong"})

    @staticmethod
    def _say(sock: socket.socket, message: dict) -> None:
        sock.sendall(radical_edge.encode_frame(radical_edge.Opcode.TEXT,
                                               json.dumps(message).encode(), mask=b"abcd"))


class Lister(threading.Thread):
    """Asks for the list of edges all the time; `latencies` in seconds."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(daemon=True)
        self._scene, self.latencies, self.stopping = scene, [], threading.Event()

    def run(self) -> None:
        while not self.stopping.wait(0.02):
            begin = time.perf_counter()
            self._scene.request("POST", "/edge/list")
            self.latencies.append(time.perf_counter() - begin)


def reference(count: int) -> float:
    """Return the seconds that as many bare connections take."""
    acceptor = subprocess.Popen([sys.executable, "-c", ACCEPTOR], stdout=subprocess.PIPE, text=True)
    port = int(acceptor.stdout.readline())
    begin, made = time.perf_counter(), []
    for _ in range(count):
        made.append(socket.create_connection(("127.0.0.1", port)))
        made[-1].sendall(b"x" * 1000)
        made[-1].recv(1)
    seconds = time.perf_counter() - begin
    for sock in made:
        sock.close()
    acceptor.kill()
    acceptor.communicate()
    return seconds


def measure(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder))
        try:
            scene.wait_online()
            plugins = scene.request("POST", "/edge/list")[1]["data"]["edges"]["bench"]["plugins"]
            before = memory_mib(scene.bridge.pid)
            edges, lister = FakeEdges(scene, plugins), Lister(scene)
            edges.start()
            lister.start()
            begin = time.perf_counter()
            for number in range(count):
                edges.add(number)
            while edges.registered < count:
                time.sleep(0.005)
            seconds = time.perf_counter() - begin
            lister.stopping.set()
            lister.join()
            time.sleep(2)                         # the topologies are told
            print(f"{count:6} {seconds:9.2f} {reference(count):8.2f}   "
                  f"{statistics.median(lister.latencies) * 1000:8.1f} "
                  f"{max(lister.latencies) * 1000:8.1f}   {before:8.1f} "
                  f"{memory_mib(scene.bridge.pid):8.1f} {cpu_seconds(scene.bridge.pid):8.2f}",
                  flush=True)
            edges.close()
        finally:
            scene.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--edges", default="50,200,1000")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("        seconds to register   /edge/list meanwhile, ms   MiB of the bridge   CPU s")
    print(" edges      ours     bare      median      max       before     after")
    for count in map(int, options.edges.split(",")):
        measure(count)


if __name__ == "__main__":
    main()
