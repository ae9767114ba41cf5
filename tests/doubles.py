"""A bridge that a test plays: it speaks either version of the wire to a real edge, and says anything."""
from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time

import radical_edge
from radical_edge import FrameParser, Kind, Opcode, accept_key, encode_frame


class HostileBridge:
    """Listens for one edge after the other; `wire` is the version that it chooses."""

    def __init__(self, wire=2, timeout=20):
        self.wire, self.timeout = wire, timeout
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(timeout)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sock, self.registered, self._ids = None, None, itertools.count(1)

    def accept(self):
        """Wait for an edge to dial in and register; return its "register" message."""
        if self.sock is not None:
            self.sock.close()
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(self.timeout)
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.sock.recv(65536)
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        self.sock.sendall(radical_edge.encode_response_head(101, [
            ("Upgrade", "websocket"), ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", accept_key(fields["Sec-WebSocket-Key"]))]))
        self._parser = FrameParser(masked=True)
        self.registered = self.hear("register")
        self.say(type="registered", edge_name=self.registered["edge_name"], wire=self.wire, acked=0)
        return self.registered

    def close(self):
        for sock in (self.sock, self.listener):
            if sock is not None:
                sock.close()

    # -- saying

    def send(self, data):
        self.sock.sendall(data)

    def say(self, **message):
        self.send(encode_frame(Opcode.TEXT, json.dumps(message).encode()))

    def say_wire(self, kind, stream, head=None, body=b"", end=False):
        self.send(encode_frame(Opcode.BINARY, radical_edge.encode_wire(kind, stream, head, end=end)
                               + body))

    def start(self, method, path, headers=(), body=b"", pieces=None):
        """Send a request; return its id. pieces: sent one by one (wire version 2)."""
        number, headers = next(self._ids), dict(headers)
        headers.setdefault("x-request-id", f"h-{number}")
        headers.setdefault("x-forwarded-user", "mallory")
        headers.setdefault("x-forwarded-scope", "admin")
        if self.wire == 1:
            opcode, payload = radical_edge.encode_request(str(number), method, path, headers, body)
            self.send(encode_frame(opcode, payload))
            return number
        self.say_wire(Kind.REQUEST, number, [method, path, headers], b"" if pieces else body,
                      end=not pieces)
        for piece in pieces or ():
            self.say_wire(Kind.DATA, number, body=piece)
        if pieces:
            self.say_wire(Kind.DATA, number, end=True)
        return number

    # -- hearing

    def frames(self):
        """Yield (opcode, payload) for what arrives, until the edge leaves."""
        while True:
            message = self._parser.next_message()
            if message is not None:
                yield message
                continue
            data = self.sock.recv(65536)
            if not data:
                return
            self._parser.feed(data)

    def hear(self, kind):
        """Return the next message of this type."""
        for opcode, payload in self.frames():
            if opcode is Opcode.TEXT and json.loads(payload)["type"] == kind:
                return json.loads(payload)
        raise AssertionError("the edge has left")

    def answer(self, number):
        """Return (status, JSON value or text) of the answer to a request."""
        body, status = b"", None
        for opcode, payload in self.frames():
            if self.wire == 1 and opcode is Opcode.TEXT:
                message = json.loads(payload)
                if message.get("req_id") == str(number):
                    status, _, body = radical_edge.parse_response(message)
                    break
            elif self.wire == 2 and opcode is Opcode.BINARY:
                frame = radical_edge.parse_wire(payload)
                if frame.stream == number and frame.kind in (Kind.RESPONSE, Kind.DATA):
                    status = frame.head[0] if frame.kind is Kind.RESPONSE else status
                    body += bytes(frame.body)
                    if frame.end:
                        break
        assert status is not None, "the edge has left"
        with contextlib.suppress(ValueError):
            return status, json.loads(body)
        return status, body.decode(errors="replace")

    def ask(self, *args, **options):
        """Send a request and return its answer."""
        return self.answer(self.start(*args, **options))

    def is_left(self, seconds=20):
        """Whether the edge closes the link within so long."""
        end = time.monotonic() + seconds
        self.sock.settimeout(1)
        while time.monotonic() < end:
            try:
                if not self.sock.recv(65536):
                    return True
            except socket.timeout:
                continue
            except OSError:
                return True
        return False
