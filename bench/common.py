"""What the measurements share: a bridge and an edge in processes of their own, and their costs."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "radical_edge.py")
TICKS = os.sysconf("SC_CLK_TCK")


def make_certificate(folder: Path) -> tuple[str, str]:
    """Make a self-signed certificate for localhost; return its and its key's path."""
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                    "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mib(pid: int, what: str = "VmRSS") -> float:
    """Return a process's resident memory, or with "VmHWM" the most that it ever was."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Scene:
    """A bridge, and an edge named "bench" with the plugins of a text. close() ends both."""

    def __init__(self, folder: Path, plugin: str = "", *, tls: bool = False,
                 edge: bool = True) -> None:
        self.folder, self._stack = folder, contextlib.ExitStack()
        self.env = {**os.environ, "HOME": str(folder), "PYTHONUNBUFFERED": "1",
                    "RADICAL_LOG_LVL": "WARNING"}
        self.context, flags = None, []
        if tls:
            cert, key = make_certificate(folder)
            self.context = ssl.create_default_context(cafile=cert)
            flags = ["--cert", cert, "--key", key]
        self.plugin = folder / "bench_plugin.py"
        self.plugin.write_text(plugin)
        self._log = self._stack.enter_context(open(folder / "log.txt", "a"))
        self.bridge, line = self.start("--bridge", "--port", "0", *flags, expect="bridge: http")
        self.port = int(line.rpartition(":")[2])
        self.token = (folder / ".radical/edge/token").read_text().strip()
        if edge:
            self.edge = self.start_edge()

    def start_edge(self) -> subprocess.Popen:
        return self.start("--edge", "--name", "bench", "--plugin-file", str(self.plugin),
                          expect="edge:")[0]

    def start(self, *arguments: str, expect: str) -> tuple[subprocess.Popen, str]:
        """Start one of our processes; return it and the line that says that it is up."""
        process = subprocess.Popen([sys.executable, SCRIPT, *arguments], env=self.env, text=True,
                                   stdout=subprocess.PIPE, stderr=self._log)
        self._stack.callback(self._end, process)
        for line in process.stdout:
            if line.startswith(expect):
                return process, line.strip()
        raise SystemExit(f"{arguments} did not start: {Path(self._log.name).read_text()}")

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait()
        process.stdout.close()

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.context is not None:
            sock = self.context.wrap_socket(sock, server_hostname="localhost")
        return sock

    def head(self, method: str, path: str, *fields: str) -> bytes:
        """Return a request's head, with the token."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost",
                 f"Authorization: Bearer {self.token}", *fields, "", ""]
        return "\r\n".join(lines).encode()

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, object]:
        """Return (status, JSON value) over a connection of its own."""
        made = http.client.HTTPSConnection("localhost", self.port, context=self.context,
                                           timeout=120) if self.context else \
            http.client.HTTPConnection("localhost", self.port, timeout=120)
        try:
            made.request(method, path, body or None, {"Authorization": f"Bearer {self.token}"})
            reply = made.getresponse()
            return reply.status, json.loads(reply.read() or b"null")
        finally:
            made.close()

    def wait_online(self, path: str = "/bench/sysinfo/homedir", seconds: float = 20) -> None:
        """Return once a request through the edge is answered."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", path)[0] == 200:
                    return
            time.sleep(0.005)
        raise SystemExit("the edge did not come online")

    def close(self) -> None:
        self._stack.close()
