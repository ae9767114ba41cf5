#!/usr/bin/env python3
"""Measure bulk uploads and downloads next to a plain socket copy through two Python processes.

    python bench/bulk.py [--size 1024] [--rounds 2] [--plain] [--tls]

The reference, in the same run: a client sends to a relay, which passes what it reads (64 KiB at a
time) on to a sink; and the other way round. Ours: the client, the bridge and the edge are three
processes as well, and the plugin counts what comes, or makes what goes. Sizes are in MiB.
"""
from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Scene, cpu_seconds, memory_mib

PLUGIN = '''
from radical_edge import Plugin, StreamingResponse, get, plugin, put

PIECE = bytes(256 * 1024)

@plugin("bulk")
class Bulk(Plugin):
    @put("upload")
    def upload(self, request):
        return {"size": sum(map(len, request.iter_body()))}

    @get("download/{size}")
    def download(self, request):
        size = int(request.path_params["size"])

        def pieces():
            left = size
            while left:
                yield PIECE[:left]
                left -= min(left, len(PIECE))

        return StreamingResponse(pieces(), headers={"content-length": str(size)})
'''

COPY = '''
import socket, sys
role, size = sys.argv[1], int(sys.argv[2])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
buffer = bytes(65536)
if role == "relay":
    target = socket.create_connection(("127.0.0.1", int(sys.argv[3])))
while True:
    sock, _ = listener.accept()
    if role == "sink":
        while sock.recv(65536):
            pass
    elif role == "source":
        for _ in range(size // len(buffer)):
            sock.sendall(buffer)
    else:
        source, sink = (sock, target) if sys.argv[4] == "up" else (target, sock)
        while True:
            data = source.recv(65536)
            if not data:
                break
            sink.sendall(data)
        target.close()
    sock.close()
    break
'''


def copy_rate(size: int, way: str) -> float:
    """Return bytes per second of a plain copy through a relay."""
    far = start_copy("sink" if way == "up" else "source", size)
    relay = start_copy("relay", size, far[1], way)
    begin = time.perf_counter()
    with socket.create_connection(("127.0.0.1", int(relay[1]))) as sock:
        if way == "up":
            send(sock, size)
            sock.shutdown(socket.SHUT_WR)
        else:
            receive(sock, size)
    for process, _ in (relay, far):
        process.wait()
        process.stdout.close()
    return size / (time.perf_counter() - begin)


def start_copy(role: str, size: int, *arguments: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen([sys.executable, "-c", COPY, role, str(size), *arguments],
                               stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def send(sock: socket.socket, size: int) -> None:
    piece = bytes(256 * 1024)
    for _ in range(size // len(piece)):
        sock.sendall(piece)


def receive(sock: socket.socket, size: int) -> None:
    buffer = bytearray(256 * 1024)
    while size > 0:
        count = sock.recv_into(buffer)
        if not count:
            raise SystemExit("the download was cut short")
        size -= count


def our_rate(scene: Scene, size: int, way: str) -> float:
    """Return bytes per second through bridge and edge."""
    with scene.connect() as sock:
        begin = time.perf_counter()
        if way == "up":
            sock.sendall(scene.head("PUT", "/bench/bulk/upload", f"Content-Length: {size}"))
            send(sock, size)
            if b'"size":%d' % size not in sock.recv(65536):
                raise SystemExit("the upload was not taken")
        else:
            sock.sendall(scene.head("GET", f"/bench/bulk/download/{size}"))
            receive(sock, size)
        return size / (time.perf_counter() - begin)


def measure(scene: Scene, title: str, size: int) -> None:
    for way in ("up", "down"):
        plain = copy_rate(size, way)
        before = [cpu_seconds(process.pid) for process in (scene.bridge, scene.edge)]
        ours = our_rate(scene, size, way)
        cpu = [cpu_seconds(process.pid) - begin
               for process, begin in zip((scene.bridge, scene.edge), before)]
        peak = [memory_mib(process.pid, "VmHWM") for process in (scene.bridge, scene.edge)]
        print(f"{title:5} {way:5} {plain / 1e6:10.0f} {ours / 1e6:10.0f} {ours / plain:7.2f}   "
              f"{peak[0]:8.1f} {peak[1]:6.1f}   {cpu[0]:8.2f} {cpu[1]:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of each transfer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="only without TLS")
    parser.add_argument("--tls", action="store_true", help="only with TLS")
    options = parser.parse_args()
    print("               MB per second               peak MiB          CPU seconds")
    print("kind  way     copy       ours     ratio     bridge   edge     bridge   edge")
    for tls in [False] if options.plain else [True] if options.tls else [False, True]:
        with tempfile.TemporaryDirectory() as folder:
            scene = Scene(Path(folder), PLUGIN, tls=tls)
            try:
                scene.wait_online()
                for _ in range(options.rounds):
                    measure(scene, "tls" if tls else "plain", options.size << 20)
            finally:
                scene.close()


if __name__ == "__main__":
    main()
