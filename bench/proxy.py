#!/usr/bin/env python3
"""Measure a proxied GET next to a direct `http.server` echo, in one run, and print their ratio.

    python bench/proxy.py [--seconds 6] [--connections 1,32,128] [--plain] [--tls] [--json]

Three processes are started for it: an `http.server` that answers a few bytes, a bridge and an edge
(token checked, request id, a log line for each request). The load comes from a fourth, which sends
the next request of a connection when the answer to the last one is there. The direct echo and the
proxied GET take turns, several times, so that noise of the machine hits both. Printed are medians.

With one plain connection a bare relay takes its turn too: as many processes and threads as a bridge
and an edge have on this path, which pass the bytes on and look at none of them. It shows what part
of the latency is the system's.

CPU: seconds per 1,000 requests of each process, from /proc; "-" elsewhere.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
TICKS = os.sysconf("SC_CLK_TCK")

ANSWER_END = b'"hello"}'                           # of the direct and of the proxied answer

ECHO_SERVER = """
import http.server, ssl, sys

class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        body = b'{"echo":"hello"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True

server = Server(("127.0.0.1", 0), Echo)
if len(sys.argv) > 1:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

ECHO_PLUGIN = '''
from radical_edge import Plugin, get, plugin

@plugin("echo")
class Echo(Plugin):
    @get("hello")
    async def hello(self, request):
        return {"echo": "hello"}
'''

BARE_RELAY = """
import socket, subprocess, sys, threading

def tune(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock

def relay():
    server = socket.create_server(("127.0.0.1", 0))
    port = str(server.getsockname()[1])
    subprocess.Popen([sys.executable, sys.argv[0], port], stdout=subprocess.DEVNULL)
    link = tune(server.accept()[0])
    print(port, flush=True)
    while True:
        client = tune(server.accept()[0])
        for data in iter(lambda: client.recv(65536), b""):
            link.sendall(data)
            client.sendall(link.recv(65536))

def far_end(port):
    link, asked = tune(socket.create_connection(("127.0.0.1", port))), threading.Lock()
    asked.acquire()
    threading.Thread(target=answer, args=(link, asked), daemon=True).start()
    while link.recv(65536):
        asked.release()

def answer(link, asked):
    while asked.acquire():
        link.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 16\\r\\n\\r\\n{"echo":"hello"}')

far_end(int(sys.argv[1])) if len(sys.argv) > 1 else relay()
"""


class Load:
    """Keeps `count` connections busy with one request each, for some seconds."""

    def __init__(self, port: int, request: bytes, count: int,
                 context: ssl.SSLContext | None) -> None:
        self._request = request
        self._sockets = {}
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                sock = context.wrap_socket(sock, server_hostname="localhost")
            self._sockets[sock.fileno()] = sock

    def run(self, seconds: float) -> tuple[int, list[float]]:
        """Return (requests answered, latencies in seconds)."""
        epoll, sent, latencies = select.epoll(), {}, []
        for fd, sock in self._sockets.items():
            epoll.register(fd, select.EPOLLIN)
            sock.sendall(self._request)
            sent[fd] = time.perf_counter()
        end = time.perf_counter() + seconds
        while sent:
            for fd, _ in epoll.poll():
                if not self._sockets[fd].recv(65536).endswith(ANSWER_END):
                    continue                       # http.server sends head and body one by one
                now = time.perf_counter()
                latencies.append(now - sent.pop(fd))
                if now < end:
                    self._sockets[fd].sendall(self._request)
                    sent[fd] = now
        epoll.close()
        return len(latencies), latencies

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far; nan where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / TICKS


def make_certificate(folder: Path) -> tuple[str, str]:
    """Make a self-signed certificate for localhost; return its and its key's path."""
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                    "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


class Processes:
    """The servers under test; one line of output says that each is up."""

    def __init__(self, folder: Path, tls: bool, root: Path = ROOT) -> None:
        self._folder, self._stack = folder, contextlib.ExitStack()
        self.context = None
        files: tuple[str, ...] = ()
        if tls:
            files = make_certificate(folder)
            self.context = ssl.create_default_context(cafile=files[0])
        self._env = {**os.environ, "HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        self.echo, line = self._start([sys.executable, "-c", ECHO_SERVER, *files], "")
        self.echo_port = int(line)
        bare = folder / "bare.py"
        bare.write_text(BARE_RELAY)
        self.bare_port = 0
        if not tls:
            self.bare_port = int(self._start([sys.executable, str(bare)], "")[1])
        plugin = folder / "echo_plugin.py"
        plugin.write_text(ECHO_PLUGIN)
        script = str(root / "radical_edge.py")
        flags = ["--cert", files[0], "--key", files[1]] if tls else []
        self.bridge, line = self._start([sys.executable, script, "--bridge", "--port", "0", *flags],
                                        "bridge: http")
        self.bridge_port = int(line.rpartition(":")[2])
        self.edge, _ = self._start([sys.executable, script, "--edge", "--name", "bench", "-p",
                                    "echo", "--plugin-file", str(plugin)], "edge:")
        self.token = (folder / ".radical/edge/token").read_text().strip()

    def _start(self, command: list[str], expect: str) -> tuple[subprocess.Popen, str]:
        log = self._stack.enter_context(open(self._folder / "log.txt", "a"))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                                   env=self._env)
        self._stack.callback(process.wait)
        self._stack.callback(process.send_signal, signal.SIGTERM)
        for line in process.stdout:
            if line.startswith(expect):
                return process, line.strip()
        raise SystemExit(f"{command[1]} did not start: see {log.name}")

    def close(self) -> None:
        self._stack.close()


def wait_until_online(processes: Processes) -> None:
    """Return once the bridge proxies to the edge."""
    for _ in range(200):
        load = Load(processes.bridge_port, proxied_request(processes), 1, processes.context)
        sock = next(iter(load._sockets.values()))
        sock.sendall(proxied_request(processes))
        answer = sock.recv(65536)
        load.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return
        time.sleep(0.02)
    raise SystemExit(f"the edge did not come online: {answer!r}")


def proxied_request(processes: Processes) -> bytes:
    return (f"GET /bench/echo/hello HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
            f"Authorization: Bearer {processes.token}\r\n\r\n").encode()


def measure(processes: Processes, connections: int, seconds: float) -> dict:
    """Return medians over ROUNDS of the direct and the proxied request."""
    direct_request = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
    watched = {"echo": processes.echo.pid, "bridge": processes.bridge.pid,
               "edge": processes.edge.pid}
    targets = [("direct", processes.echo_port, direct_request),
               ("proxied", processes.bridge_port, proxied_request(processes))]
    if connections == 1 and processes.bare_port:
        targets.append(("bare", processes.bare_port, direct_request))
    rows: dict[str, list] = {kind: [] for kind, _, _ in targets}
    for _ in range(ROUNDS):
        for kind, port, request in targets:
            load = Load(port, request, connections, processes.context)
            load.run(0.3)                          # warm up: connections, caches, threads
            before = {name: cpu_seconds(pid) for name, pid in watched.items()}
            count, latencies = load.run(seconds / ROUNDS)
            cpu = {name: (cpu_seconds(pid) - before[name]) / count * 1000
                   for name, pid in watched.items()}
            load.close()
            rows[kind].append((count / (seconds / ROUNDS), statistics.median(latencies), cpu))
    return {kind: summarise(found) for kind, found in rows.items()}


def summarise(found: list) -> dict:
    return {"rate": statistics.median(row[0] for row in found),
            "latency": statistics.median(row[1] for row in found),
            "cpu": {name: statistics.median(row[2][name] for row in found) for name in found[0][2]}}


def report(title: str, connections: int, result: dict) -> None:
    direct, proxied = result["direct"], result["proxied"]
    cpu = direct["cpu"]["echo"], proxied["cpu"]["bridge"], proxied["cpu"]["edge"]
    print(f"{title:5} {connections:5} {direct['rate']:10.0f} {proxied['rate']:10.0f} "
          f"{proxied['rate'] / direct['rate']:8.2f} {direct['latency'] * 1e6:10.0f} "
          f"{proxied['latency'] * 1e6:10.0f} {proxied['latency'] / direct['latency']:8.2f}   "
          + " ".join(f"{value:7.3f}" for value in cpu), flush=True)
    if "bare" in result:
        bare = result["bare"]
        print(f"      bare relay: {bare['rate']:.0f} a second ({bare['rate'] / direct['rate']:.2f}), "
              f"{bare['latency'] * 1e6:.0f} us ({bare['latency'] / direct['latency']:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each figure")
    parser.add_argument("--connections", default="1,32,128")
    parser.add_argument("--plain", action="store_true", help="only without TLS")
    parser.add_argument("--tls", action="store_true", help="only with TLS")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    options = parser.parse_args()
    kinds = [False] if options.plain else [True] if options.tls else [False, True]
    print("              requests per second                 latency, us (median)             "
          "CPU s / 1,000 requests")
    print("kind  conns     direct    proxied    ratio     direct    proxied    ratio   "
          "   echo  bridge    edge")
    results = {}
    for tls in kinds:
        with tempfile.TemporaryDirectory() as folder:
            processes = Processes(Path(folder), tls)
            try:
                wait_until_online(processes)
                for connections in map(int, options.connections.split(",")):
                    result = measure(processes, connections, options.seconds)
                    title = "tls" if tls else "plain"
                    results[f"{title}-{connections}"] = result
                    report(title, connections, result)
            finally:
                processes.close()
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
