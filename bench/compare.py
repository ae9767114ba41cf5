#!/usr/bin/env python3
"""Measure this system next to radical.edge 0.2, whose place it takes, in one run; print ratios.

    tests/setup-compat.sh                        # once: .venv-compat, with theirs
    python bench/compare.py [--seconds 6] [--connections 1,32,128] [--subscribers 50,500]
                            [--sizes 4,8,100] [--install]

Both have a bridge and an edge here, with the same plugin written for each, and both bridges speak
TLS, for theirs does nothing else. Ours checks tokens and writes its journals, as by default.
The two take turns, and so does noise of the machine. --install also installs theirs once more, into
a new virtual environment; how long that takes depends on the network.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Scene, cpu_seconds, make_certificate, memory_mib
from events import Readers
from proxy import Load

ROUNDS = 3
EVENTS = 1000
MARK = b"@tick@"                                  # once in each event
VENV = ROOT / ".venv-compat"
PATIENCE_S = 120.0

OUR_PLUGIN = '''
from radical_edge import Plugin, Response, get, plugin, post

@plugin("bench")
class Bench(Plugin):
    @get("hello")
    async def hello(self, request):
        return {"echo": "hello"}

    @post("up")
    async def up(self, request):
        return {"size": sum([len(piece) async for piece in request.stream()])}

    @get("down/{size}")
    async def down(self, request):
        return Response(bytes(int(request.path_params["size"])))

    @post("burst/{count}")
    async def burst(self, request):
        for number in range(int(request.path_params["count"])):
            self._dispatch_notify("tick", {"n": number, "text": "@tick@" + "x" * 150})
        return {}
'''

# their answers are JSON: bytes go as base64 in it, as their own plugin for files has it
THEIR_EDGE = '''
import base64, runpy, sys
import radical.edge

class Bench(radical.edge.Plugin):
    plugin_name = "bench"

    def __init__(self, app, instance_name="bench"):
        super().__init__(app, instance_name)
        self.add_route_get("hello", self.hello)
        self.add_route_post("up", self.up)
        self.add_route_get("down/{size}", self.down)
        self.add_route_post("burst/{count}", self.burst)

    async def hello(self, request):
        return {"echo": "hello"}

    async def up(self, request):
        return {"size": len(await request.body())}

    async def down(self, request):
        return {"content": base64.b64encode(bytes(int(request.path_params["size"]))).decode()}

    async def burst(self, request):
        for number in range(int(request.path_params["count"])):
            self._dispatch_notify("tick", {"n": number, "text": "@tick@" + "x" * 150})
        return {}

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
'''


class System:
    """A bridge and an edge named "bench", over TLS."""

    port: int
    context: ssl.SSLContext
    token = ""
    first_answer_s = edge_answer_s = 0.0          # from the start of the bridge; of the edge

    def head(self, method: str, path: str) -> bytes:
        """Return a request's head."""
        token = f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{token}\r\n".encode()

    def connect(self) -> ssl.SSLSocket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.context.wrap_socket(sock, server_hostname="localhost")

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return (status, content) over a connection of its own."""
        made = http.client.HTTPSConnection("localhost", self.port, context=self.context,
                                           timeout=PATIENCE_S)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with contextlib.closing(made):
            made.request(method, path, body, headers)
            reply = made.getresponse()
            return reply.status, reply.read()

    def wait(self, path: str) -> float:
        """Return once a GET is answered; the seconds that took."""
        begin = time.perf_counter()
        while time.perf_counter() < begin + PATIENCE_S:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", path)[0] == 200:
                    return time.perf_counter() - begin
            time.sleep(0.005)
        raise SystemExit(f"{path} was not answered within {PATIENCE_S:.0f} s")


class Ours(System):
    """This system."""

    def __init__(self, folder: Path) -> None:
        begin = time.perf_counter()
        self._scene = Scene(folder, OUR_PLUGIN, tls=True, edge=False)
        self.port, self.context = self._scene.port, self._scene.context
        self.token, self.bridge = self._scene.token, self._scene.bridge
        self.wait("/health")
        self.first_answer_s = time.perf_counter() - begin
        begin = time.perf_counter()
        self.edge = self._scene.start_edge()
        self.wait("/bench/bench/hello")
        self.edge_answer_s = time.perf_counter() - begin

    def close(self) -> None:
        self._scene.close()

    @staticmethod
    def read_content(content: bytes) -> bytes:
        """Return the bytes that were downloaded."""
        return content


class Theirs(System):
    """radical.edge 0.2."""

    def __init__(self, folder: Path) -> None:
        cert, key = make_certificate(folder)
        os.chmod(key, 0o600)
        self._stack = contextlib.ExitStack()
        self._log = self._stack.enter_context(open(folder / "log.txt", "a"))
        self._env = {**os.environ, "HOME": str(folder), "RADICAL_LOG_LVL": "WARNING"}
        self.context = ssl.create_default_context(cafile=cert)
        with socket.create_server(("127.0.0.1", 0)) as listener:     # they cannot choose one
            self.port = listener.getsockname()[1]
        begin = time.perf_counter()
        self.bridge = self._start(VENV / "bin/radical-edge-bridge.py", "--cert", cert, "--key", key,
                                  "--host", "127.0.0.1", "--port", self.port, "-p", "")
        self.wait("/edges")
        self.first_answer_s = time.perf_counter() - begin
        program = folder / "edge.py"
        program.write_text(THEIR_EDGE)
        begin = time.perf_counter()
        self.edge = self._start(program, VENV / "bin/radical-edge-service.py", "--url",
                                f"https://localhost:{self.port}", "--cert", cert, "--name", "bench",
                                "-p", "bench,sysinfo", "-l", "WARNING")
        self.wait("/bench/bench/hello")
        self.edge_answer_s = time.perf_counter() - begin

    def _start(self, *arguments: object) -> subprocess.Popen:
        process = subprocess.Popen([str(VENV / "bin/python"), *map(str, arguments)], env=self._env,
                                   cwd=self._env["HOME"], stdout=self._log, stderr=self._log)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        return process

    def close(self) -> None:
        self._stack.close()

    @staticmethod
    def read_content(content: bytes) -> bytes:
        """Return the bytes that were downloaded."""
        return base64.b64decode(json.loads(content)["content"])


def show(title: str, ours: float, theirs: float, unit: str) -> None:
    """Print a line: both figures, and how many times as much theirs is."""
    print(f"{title:34} {ours:10.4g} {theirs:10.4g} {theirs / ours:8.2f}  {unit}", flush=True)


def compare_rates(systems: list[System], connections: int, seconds: float) -> None:
    """Compare a proxied GET."""
    rows: list[list[tuple[float, ...]]] = [[], []]
    for _ in range(ROUNDS):
        for system, row in zip(systems, rows):
            row.append(measure_rate(system, connections, seconds / ROUNDS))
    for at, title, unit in ((0, "rate", "1/s"), (1, "latency", "us, median"),
                            (2, "bridge", "us of CPU each"), (3, "edge", "us of CPU each")):
        show(f"GET, {connections} connections: {title}",
             *(statistics.median(item[at] for item in row) for row in rows), unit)


def measure_rate(system: System, connections: int, seconds: float) -> tuple[float, ...]:
    """Return (requests a second, median latency, CPU time of a request in bridge and edge) in us."""
    load = Load(system.port, system.head("GET", "/bench/bench/hello"), connections, system.context)
    load.run(0.3)                                 # warm up
    before = [cpu_seconds(process.pid) for process in (system.bridge, system.edge)]
    count, latencies = load.run(seconds)
    cpu = [cpu_seconds(process.pid) - begin
           for process, begin in zip((system.bridge, system.edge), before)]
    load.close()
    return count / seconds, statistics.median(latencies) * 1e6, *(
        used / max(count, 1) * 1e6 for used in cpu)


def compare_events(systems: list[System], count: int) -> None:
    """Compare a burst of notifications to many subscribers."""
    seconds = [measure_events(system, count) for system in systems]
    show(f"{EVENTS} events to {count}", *seconds, "s until all have all")


def measure_events(system: System, count: int) -> float:
    sockets = []
    for _ in range(count):
        sock = system.connect()
        sock.sendall(system.head("GET", "/events"))
        while b'"topology"' not in sock.recv(65536):
            pass
        sockets.append(sock)
    readers = Readers(sockets, MARK)
    begin = time.perf_counter()
    with system.connect() as sock:
        sock.sendall(system.head("POST", f"/bench/bench/burst/{EVENTS}").replace(
            b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n"))
        whole = readers.run(EVENTS, PATIENCE_S)
    for sock in sockets:
        sock.close()
    return max(readers.done_at.values()) - begin if whole else float("nan")


def compare_bodies(systems: list[System], megabytes: int) -> None:
    """Compare an upload and a download; say what happens when one does not work."""
    for title, measure in (("up", measure_upload), ("down", measure_download)):
        rows: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for system, row in zip(systems, rows):
                row.append(attempt(system, title, measure, megabytes * 1_000_000))
        show(f"{megabytes} MB {title}", *map(statistics.median, rows), "s")


def attempt(system: System, title: str, measure: object, size: int) -> float:
    """Return the seconds of a transfer; nan, and a line about it, when it fails."""
    begin = time.perf_counter()
    try:
        status = measure(system, size)
        seconds = time.perf_counter() - begin
    except (OSError, http.client.HTTPException) as error:
        status, seconds = type(error).__name__, 0.0
    if status == 200:
        return seconds
    back = system.wait("/bench/bench/hello")
    print(f"    {type(system).__name__.lower()}: {title} of {size // 1_000_000} MB: {status} after "
          f"{time.perf_counter() - begin - back:.1f} s; the edge answers again after {back:.1f} s")
    return float("nan")


def measure_upload(system: System, size: int) -> int:
    status, content = system.request("POST", "/bench/bench/up", b"\xff" * size)
    return status if status != 200 or json.loads(content)["size"] == size else 0


def measure_download(system: System, size: int) -> int:
    status, content = system.request("GET", f"/bench/bench/down/{size}")
    return status if status != 200 or system.read_content(content) == bytes(size) else 0


def folder_mib(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*")) / (1 << 20)


def compare_install(folder: Path) -> None:
    """Compare an installation into an empty virtual environment with a copy of the two files."""
    python = str(folder / "venv/bin/python")
    subprocess.run([str(VENV / "bin/python"), "-m", "venv", folder / "venv"], check=True)
    empty, begin = folder_mib(folder / "venv"), time.perf_counter()
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                    "--no-cache-dir", "radical.orbit==0.2.0"], check=True, capture_output=True)
    seconds, size = time.perf_counter() - begin, folder_mib(folder / "venv") - empty
    (folder / "ours").mkdir()
    begin = time.perf_counter()
    for name in ("radical_edge.py", "plugins.py"):
        shutil.copy(ROOT / name, folder / "ours")
    show("install", time.perf_counter() - begin, seconds, "s")
    show("installed", folder_mib(folder / "ours"), size, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each figure of a GET")
    parser.add_argument("--connections", default="1,32,128")
    parser.add_argument("--subscribers", default="50,500")
    parser.add_argument("--sizes", default="4,8,100", help="of bodies, in MB")
    parser.add_argument("--install", action="store_true", help="install theirs, too")
    options = parser.parse_args()
    if not (VENV / "bin/radical-edge-bridge.py").exists():
        raise SystemExit("radical.edge is not here: run tests/setup-compat.sh")
    print(f"{'':34} {'ours':>10} {'theirs':>10} {'theirs / ours':>14}")
    with tempfile.TemporaryDirectory() as text, contextlib.ExitStack() as stack:
        folder = Path(text)
        if options.install:
            compare_install(folder)
        compare(compare_starts(folder, stack), options)


def compare_starts(folder: Path, stack: contextlib.ExitStack) -> list[System]:
    """Start both systems, several times; return them as they run at the end."""
    systems: list[System] = []
    rows: list[list[tuple[float, float]]] = [[], []]
    for number in range(ROUNDS):
        stack.close()                             # ends those of the round before
        systems = []
        for made, row in zip((Ours, Theirs), rows):
            home = folder / f"{made.__name__}-{number}"
            home.mkdir()
            systems.append(made(home))
            stack.callback(systems[-1].close)
            row.append((systems[-1].first_answer_s, systems[-1].edge_answer_s))
    for at, title in enumerate(("bridge: start to answer", "edge: start to answer")):
        show(title, *(statistics.median(item[at] for item in row) for row in rows), "s, median")
    return systems


def compare(systems: list[System], options: argparse.Namespace) -> None:
    """Print all comparisons of running systems."""
    time.sleep(2)                                 # at rest
    show("bridge: memory", *(memory_mib(system.bridge.pid) for system in systems), "MiB")
    show("edge: memory", *(memory_mib(system.edge.pid) for system in systems), "MiB")
    for connections in map(int, options.connections.split(",")):
        compare_rates(systems, connections, options.seconds)
    for megabytes in map(int, options.sizes.split(",")):
        compare_bodies(systems, megabytes)
    for count in map(int, options.subscribers.split(",")):
        compare_events(systems, count)
    show("bridge: most memory", *(memory_mib(system.bridge.pid, "VmHWM") for system in systems),
         "MiB")
    show("edge: most memory", *(memory_mib(system.edge.pid, "VmHWM") for system in systems), "MiB")


if __name__ == "__main__":
    main()
