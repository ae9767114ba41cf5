"""Tests of radical_edge.py and plugins.py: real sockets, real processes, no mocks of our own code.

Run them with `python -m pytest`. They need pytest; a test that needs more says what it misses.
Each test gets a HOME of its own, and fails when it leaves a thread or a child process behind.
"""
from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import functools
import gc
import gzip
import hashlib
import http.client
import importlib
import json
import os
import queue
import random
import resource
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

import plugins
import radical_edge
from radical_edge import (Bridge, BridgeClient, Edge, EdgeError, EventParser, FrameParser, Opcode,
                          Plugin, PluginSession, ProtocolError, RequestParser, Response,
                          StreamingResponse, TokenStore, accept_key, encode_close, encode_frame,
                          get, parse_close, post, put)

LONG = bool(os.environ.get("RADICAL_EDGE_LONG"))   # the long forms: see the README
ROOT = Path(__file__).resolve().parent
SCRIPT = str(ROOT / "radical_edge.py")
REQUIRED = os.environ.get("RADICAL_EDGE_REQUIRE", "").split(",")     # now: `home` unsets it

# A listener in this process looks this often whether it is to stop: a fifth of a second for each of
# the many bridges of the tests would be minutes of waiting.
SERVE = socketserver.BaseServer.serve_forever
socketserver.BaseServer.serve_forever = lambda self, poll_interval=0: SERVE(self, 0.01)
gzip.compress = functools.lru_cache(4)(gzip.compress)     # each bridge compresses the same page


# ---------------------------------------------------------------------------
# Helpers and fixtures
# ---------------------------------------------------------------------------

def wait_until(condition, timeout=30.0, what="the condition"):
    """Return condition()'s first true value; fail after `timeout` seconds.

    What takes long is looked at less often, for looking may cost much: 20 times a second after 1 s.
    """
    begin = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - begin
        if waited > timeout:
            pytest.fail(f"{what} did not come true within {timeout:.0f} s")
        time.sleep(min(max(0.01, waited / 20), 0.1))


def needs(area, present, what):
    """Skip the test or file without `present`; fail it if RADICAL_EDGE_REQUIRE names the area.

    RADICAL_EDGE_REQUIRE: areas, with commas between; an extra of setup.cfg is an area, too.
    """
    if not present:
        if area in REQUIRED:
            pytest.fail(f"{area}: needs {what}")
        pytest.skip(f"{area}: needs {what}", allow_module_level=True)


def needs_module(name, extra="test"):
    """Import and return a module of an extra of setup.cfg; without it, do what needs() does."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return needs(extra, False, f"{name}: pip install '.[{extra}]'")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A HOME of the test's own, no settings from outside, and no threads left behind."""
    for name in list(os.environ):
        if name.startswith("RADICAL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    before = set(threading.enumerate())
    yield path
    wait_until(lambda: not left_behind(before), what=f"the end of {left_behind(before)}")


def left_behind(before):
    """Return the threads that are new and alive, but for psij-python's, which nothing can end."""
    return [thread for thread in set(threading.enumerate()) - before
            if not type(thread).__module__.startswith("psij")]


class EchoSession(PluginSession):
    """Used by the test plugin."""

    async def say(self, text):
        self.notify("said", {"text": text})
        return {"said": text}


class EchoPlugin(Plugin):
    """What the tests ask for things."""

    plugin_name = "echo"
    session_class = EchoSession

    @get("hello")
    async def hello(self, request):
        return {"user": request.user, "query": request.query_params}

    @post("echo")
    async def echo(self, request):
        return Response(await request.body(), media_type=request.headers.get("content-type"))

    @post("json")
    async def json(self, request):
        return {"got": await request.json()}

    @post("refuse")
    async def refuse(self, request):
        raise radical_edge.Unprocessable(f"no {(await request.json())['text']} here")

    @get("say/{sid}/{text}")
    async def say(self, request):
        return await self._forward(request.path_params["sid"], EchoSession.say,
                                   request.path_params["text"])

    @get("fail/{status}")
    async def fail(self, request):
        raise EdgeError("as you asked", int(request.path_params["status"]))

    @get("crash")
    async def crash(self, request):
        raise KeyError("a secret detail")

    @get("number")
    async def number(self, request):
        return {"n": request.query_int("n", 7)}

    @get("wait/{seconds}")
    async def wait(self, request):
        await asyncio.sleep(float(request.path_params["seconds"]))
        return {}

    @get("plain/{seconds}")
    def plain(self, request):
        time.sleep(float(request.path_params["seconds"]))
        return {}

    @get("block/{seconds}")
    async def block(self, request):
        time.sleep(float(request.path_params["seconds"]))      # blocks its loop, as bad plugins do
        return {}


def test_what_a_test_needs_fails_it_where_it_is_required_and_else_skips_it(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REQUIRED", ["sshd"])
    needs("sshd", "/usr/sbin/sshd", "openssh-server")
    with pytest.raises(pytest.fail.Exception, match="sshd: needs openssh-server"):
        needs("sshd", None, "openssh-server")
    with pytest.raises(pytest.skip.Exception, match="test: needs no_such: pip install"):
        needs_module("no_such")
    assert needs_module("json") is json


@pytest.fixture
def tokens(home):
    """A token store, and one token of each scope: {scope: token}."""
    store = TokenStore(home / ".radical/edge/tokens.json")
    named = {scope: store.add(f"{scope}-1", scope) for scope in ("admin", "client", "read", "edge")}
    (home / ".radical/edge/token").write_text(named["admin"])
    (home / ".radical/edge/token").chmod(0o600)
    return store, named


@pytest.fixture
def bridge(tokens):
    """A bridge in this process, on a free port."""
    running = Bridge(port=0, tokens=tokens[0]).start()
    yield running
    assert running.stop()


@pytest.fixture(params=[1, 2], ids=["wire1", "wire2"])
def wire(request, monkeypatch):
    """The highest version of the wire that edges offer."""
    monkeypatch.setattr(radical_edge, "WIRE_VERSIONS", tuple(range(1, request.param + 1)))
    return request.param


@pytest.fixture
def edge(bridge, tokens, wire):
    """An edge in this process, named "e1", with the echo plugin."""
    running = Edge(bridge.url, "e1", plugins=["echo"], token=tokens[1]["edge"]).start()
    assert running.online.wait(10)
    wait_until(lambda: "e1" in bridge._registry.links)
    yield running
    assert running.stop()


class Raw:
    """A raw connection to a bridge: bytes out, replies in."""

    def __init__(self, bridge, token=None, sock=None):
        self.port = bridge._listener.server_address[1] if bridge else sock.getpeername()[1]
        self.sock = sock or socket.create_connection(("127.0.0.1", self.port), timeout=60)
        self.token = token
        self._buffer = b""

    def send(self, data):
        self.sock.sendall(data)

    def request(self, method, path, body=b"", headers=(), token=None):
        """Send a request with Host, token and Content-Length; return the reply."""
        self.send_request(method, path, body, headers, token)
        return self.reply(head_only=method == "HEAD")

    def send_request(self, method, path, body=b"", headers=(), token=None):
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
        if token or self.token:
            lines.append(f"Authorization: Bearer {token or self.token}")
        if body:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name}: {value}" for name, value in headers]
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def reply(self, head_only=False):
        """Return (status, {lower-case name: value}, body) of the next reply."""
        while b"\r\n\r\n" not in self._buffer:
            data = self.sock.recv(65536)
            assert data, f"closed after {self._buffer!r}"
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *rest = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value for name, _, value in (item.partition(": ") for item in rest)}
        length = 0 if head_only else int(fields.get("content-length", 0))
        while len(self._buffer) < length:
            data = self.sock.recv(65536)
            assert data, "closed in the body"
            self._buffer += data
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return int(line.split()[1]), fields, body

    def is_closed(self):
        """Whether the bridge closes the connection now (within the socket's timeout)."""
        with contextlib.suppress(ConnectionError):
            return self.sock.recv(65536) == b""
        return True

    def close(self):
        self.sock.close()


@pytest.fixture
def raw(bridge, tokens):
    """Make raw connections to the bridge: raw() is an admin's, raw(token) another's."""
    made = []

    def connect(token=tokens[1]["admin"]):
        made.append(Raw(bridge, token))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


# ---------------------------------------------------------------------------
# WebSocket frames: the RFC's own bytes, cut everywhere
# ---------------------------------------------------------------------------

RFC_FRAMES = {                                   # RFC 6455, section 5.7: bytes, masked, messages
    "a single unmasked text": ("8105 48656c6c6f", False, [(Opcode.TEXT, "Hello")]),
    "a single masked text": ("8185 37fa213d 7f9f4d5158", True, [(Opcode.TEXT, "Hello")]),
    "a fragmented text": ("0103 48656c 8002 6c6f", False, [(Opcode.TEXT, "Hello")]),
    "a ping": ("8905 48656c6c6f", False, [(Opcode.PING, b"Hello")]),
    "a masked pong": ("8a85 37fa213d 7f9f4d5158", True, [(Opcode.PONG, b"Hello")]),
    "256 bytes": ("827e0100" + "07" * 256, False, [(Opcode.BINARY, b"\x07" * 256)]),
    "64 KiB": ("827f0000000000010000" + "07" * 65536, False, [(Opcode.BINARY, b"\x07" * 65536)]),
    "a ping between fragments": ("0103 48656c 8900 8002 6c6f", False,
                                 [(Opcode.PING, b""), (Opcode.TEXT, "Hello")]),
}


def drain(parser):
    """Return all messages that the parser has."""
    return list(iter(parser.next_message, None))


@pytest.mark.parametrize("name", RFC_FRAMES)
def test_the_frames_of_the_rfc_are_read_whole_and_cut_anywhere(name):
    text, masked, messages = RFC_FRAMES[name]
    data = bytes.fromhex(text)
    cuts = range(len(data)) if len(data) < 400 else (0, 1, 2, 3, 4, 9, 10, 11, len(data) - 1)
    for cut in cuts:
        parser = FrameParser(masked=masked)
        parser.feed(data[:cut])
        found = drain(parser)
        parser.feed(data[cut:])
        assert found + drain(parser) == messages


def test_a_frame_fed_byte_by_byte_is_not_read_before_its_last_byte():
    parser = FrameParser(masked=False)
    for byte in bytes.fromhex("8905 48656c6c6f"):
        assert parser.next_message() is None
        parser.feed(bytes([byte]))
    assert parser.next_message() == (Opcode.PING, b"Hello")


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 8 * 1024 * 1024])
@pytest.mark.parametrize("mask", [None, b"\x37\xfa\x21\x3d"], ids=["plain", "masked"])
def test_a_frame_comes_back_as_it_was_encoded(size, mask):
    payload = os.urandom(size)
    parser = FrameParser(masked=mask is not None)
    parser.feed(encode_frame(Opcode.BINARY, payload, mask=mask) * 2)
    assert drain(parser) == [(Opcode.BINARY, payload)] * 2


VIOLATIONS = {                                   # bytes to a client, close code
    "RSV1 set": ("c100", 1002), "RSV3 set": ("9100", 1002), "opcode 3": ("8300", 1002),
    "opcode 11": ("8b00", 1002), "a fragmented ping": ("0900", 1002),
    "a ping of 126 bytes": ("897e007e", 1002), "a masked frame": ("8180 00000000", 1002),
    "length 125 in two bytes": ("827e007d", 1002), "length 65535 in eight": (
        "827f000000000000ffff", 1002), "a negative length": ("827f8000000000000000", 1002),
    "continuation of nothing": ("8000", 1002), "text within a text": ("0101 61 8101 62", 1002),
    "text that is not UTF-8": ("8102 c328", 1007), "a cut UTF-8 character": ("8102 e282", 1007),
    "a surrogate": ("8103 eda080", 1007), "too large": ("827f0000000100000000", 1009),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_refused_with_its_close_code(name):
    text, code = VIOLATIONS[name]
    parser = FrameParser(masked=False, max_message=1 << 20)
    parser.feed(bytes.fromhex(text))
    with pytest.raises(ProtocolError) as caught:
        drain(parser)
    assert caught.value.code == code


def test_a_server_refuses_a_frame_without_a_mask():
    parser = FrameParser(masked=True)
    parser.feed(bytes.fromhex("8105 48656c6c6f"))
    with pytest.raises(ProtocolError):
        parser.next_message()


def test_a_large_message_is_refused_when_it_is_announced_also_in_fragments():
    parser = FrameParser(masked=False, max_message=1000)
    parser.feed(encode_frame(Opcode.BINARY, b"x" * 600, fin=False))
    assert parser.next_message() is None
    parser.feed(b"\x80\x7e\x02\x58")             # 600 more, of which no byte has come
    with pytest.raises(ProtocolError) as caught:
        parser.next_message()
    assert caught.value.code == 1009


def test_empty_fragments_do_not_go_on_for_ever():
    parser = FrameParser(masked=False, max_message=100)
    parser.feed(encode_frame(Opcode.TEXT, b"", fin=False))
    parser.feed(encode_frame(Opcode.CONTINUATION, b"", fin=False) * 200)
    with pytest.raises(ProtocolError) as caught:
        drain(parser)
    assert caught.value.code == 1009


@pytest.mark.parametrize("payload, expected", [
    ("", (1005, "")), ("03e8", (1000, "")), ("03e9 627965", (1001, "bye")), ("0fa1", (4001, ""))])
def test_a_close_frame_is_read(payload, expected):
    assert parse_close(bytes.fromhex(payload)) == expected


@pytest.mark.parametrize(
    "payload", ["03", "03ed", "03ec", "03ee", "03e7", "07d0", "1388", "03e8c3"])
def test_a_bad_close_frame_is_refused(payload):
    with pytest.raises(ProtocolError):
        parse_close(bytes.fromhex(payload))


def test_a_long_close_reason_is_cut_between_characters():
    frame = encode_close(1000, "ä" * 100)
    assert len(frame) <= 2 + 125
    assert parse_close(frame[2:])[1].strip("ä") == ""


def test_control_frames_must_be_short_and_whole():
    for arguments in ({"payload": b"x" * 126}, {"payload": b"", "fin": False}):
        with pytest.raises(ValueError):
            encode_frame(Opcode.PING, **arguments)


def test_the_accept_key_is_the_one_of_the_rfc():
    assert accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


# ---------------------------------------------------------------------------
# WebSocket, against two other implementations
# ---------------------------------------------------------------------------

SIZES = (0, 1, 125, 126, 65535, 65536, 1 << 20, 8 << 20)


@pytest.mark.parametrize("ours_is_client", [True, False], ids=["client", "server"])
def test_wsproto_and_we_read_each_other(ours_is_client):
    wsproto = needs_module("wsproto.frame_protocol")
    theirs = wsproto.FrameProtocol(client=not ours_is_client, extensions=[])
    parser = FrameParser(masked=not ours_is_client)
    mask = os.urandom(4) if ours_is_client else None
    for size in SIZES:
        payload = os.urandom(size)
        half = size // 2
        # theirs to ours, in two fragments with a ping in between
        parser.feed(theirs.send_data(payload[:half], fin=False) + theirs.ping(b"p")
                    + theirs.send_data(payload[half:], fin=True))
        assert drain(parser) == [(Opcode.PING, b"p"), (Opcode.BINARY, payload)]
        # ours to theirs, likewise
        theirs.receive_bytes(
            encode_frame(Opcode.BINARY, payload[:half], mask=mask, fin=False)
            + encode_frame(Opcode.PONG, b"q", mask=mask)
            + encode_frame(Opcode.CONTINUATION, payload[half:], mask=mask))
        frames = list(theirs.received_frames())
        data = b"".join(bytes(frame.payload) for frame in frames
                        if frame.opcode != wsproto.Opcode.PONG)
        assert data == payload
        assert sum(frame.opcode == wsproto.Opcode.PONG for frame in frames) == 1


@pytest.mark.parametrize("ours_is_client", [True, False], ids=["client", "server"])
def test_websockets_and_we_read_each_other(ours_is_client):
    needs_module("websockets")
    from websockets.frames import Frame
    from websockets.protocol import Protocol, Side
    theirs = Protocol(Side.SERVER if ours_is_client else Side.CLIENT, max_size=16 << 20)
    parser = FrameParser(masked=not ours_is_client)
    mask = os.urandom(4) if ours_is_client else None
    for size in SIZES:
        payload = os.urandom(size)
        half = size // 2
        theirs.send_binary(payload[:half], fin=False)
        theirs.send_ping(b"p")
        theirs.send_continuation(payload[half:], fin=True)
        parser.feed(b"".join(theirs.data_to_send()))
        assert drain(parser) == [(Opcode.PING, b"p"), (Opcode.BINARY, payload)]
        theirs.receive_data(encode_frame(Opcode.BINARY, payload[:half], mask=mask, fin=False)
                            + encode_frame(Opcode.PONG, b"q", mask=mask)
                            + encode_frame(Opcode.CONTINUATION, payload[half:], mask=mask))
        frames = [event for event in theirs.events_received() if isinstance(event, Frame)]
        assert b"".join(bytes(frame.data) for frame in frames if frame.opcode != 10) == payload


def test_websockets_as_an_edge_of_version_1_serves_a_request(bridge, tokens, raw):
    """An edge of the older kind: token as the URL's password, no "registered", base64 bodies."""
    sync = needs_module("websockets.sync.client")
    url = bridge.url.replace("http://", f"ws://x:{tokens[1]['edge']}@") + "/register"
    with sync.connect(url, max_size=None) as link:
        link.send(json.dumps({"type": "register", "edge_name": "old", "endpoint": {"type": "x"},
                              "plugins": {"p": {"type": "p", "namespace": "/old/p",
                                                "version": "1", "enabled": True}}}))
        assert json.loads(link.recv(10))["type"] == "topology"
        client = raw()
        for body, is_text in ((b"", True), ("grüße".encode(), True), (b"\xff\x00" * 4000, False)):
            client.send_request("POST", "/old/p/echo?x=1", body)
            message = json.loads(link.recv(10)) if is_text else \
                radical_edge.parse_msgpack(link.recv(10))
            assert (message["method"], message["path"]) == ("POST", "/p/echo?x=1")
            assert message["is_binary"] is not is_text
            link.send(json.dumps({
                "type": "response", "req_id": message["req_id"], "status": 201, "headers": {},
                "is_binary": True, "body": base64.b64encode(body).decode()}))
            status, _, answer = client.reply()
            assert (status, answer) == (201, body)
        client.send_request("GET", "/old/p/json")
        request = json.loads(link.recv(10))
        link.send(json.dumps({"type": "response", "req_id": request["req_id"], "status": 200,
                              "headers": {}, "body": {"a": [1]}}))
        assert json.loads(client.reply()[2]) == {"a": [1]}


def test_websockets_as_a_bridge_of_version_1_is_served_by_our_edge(home):
    """A bridge of the older kind: no token, no "registered", JSON pings, msgpack for binary."""
    server = needs_module("websockets.sync.server")
    seen, done = [], threading.Event()

    def serve(link):
        register = json.loads(link.recv(10))
        link.send(json.dumps({"type": "topology", "edges": {"e9": {"plugins": ["echo"]}}}))
        link.send(json.dumps({"type": "ping"}))
        link.send(json.dumps({"type": "later", "unknown": True}))
        body = b"\xff" + os.urandom(70_000)
        request = {"type": "request", "req_id": "1", "method": "POST", "path": "/echo/echo",
                   "headers": {}, "is_binary": True, "body": body}
        whole = radical_edge.encode_msgpack(request)
        link.send([whole[:100], whole[100:40_000], whole[40_000:]])      # three fragments
        answers = {}
        while len(answers) < 2:
            message = json.loads(link.recv(10))
            answers[message["type"]] = message
        seen.append((register, answers, body))
        link.send(json.dumps({"type": "shutdown", "reason": "enough"}))
        done.wait(10)

    with server.serve(serve, "127.0.0.1", 0) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        ended = threading.Event()
        port = listener.socket.getsockname()[1]
        edge = Edge(f"ws://127.0.0.1:{port}/register", "e9", plugins=["echo"],
                    on_end=ended.set).start()
        try:
            assert ended.wait(10)                 # told to shut down
        finally:
            done.set()
            assert edge.stop()
            listener.shutdown()
            thread.join()
    register, answers, body = seen[0]
    assert register["edge_name"] == "e9"
    assert register["plugins"]["echo"]["namespace"] == "/e9/echo"
    assert answers["pong"] == {"type": "pong"}
    assert base64.b64decode(answers["response"]["body"]) == body


# ---------------------------------------------------------------------------
# Messages: msgpack, version 1
# ---------------------------------------------------------------------------

MSGPACK = {                                      # from the msgpack specification
    "c0": None, "c2": False, "c3": True, "07": 7, "ff": -1, "e0": -32, "cc80": 128, "cd0100": 256,
    "ce00010000": 65536, "cf0000000100000000": 1 << 32, "d080": -128, "d18000": -32768,
    "d280000000": -(1 << 31), "d3ffffffffffffffff": -1, "ca3fc00000": 1.5,
    "cb3ff8000000000000": 1.5, "a0": "", "a3666f6f": "foo", "d903666f6f": "foo",
    "da0003666f6f": "foo",
    "db00000003666f6f": "foo",
    "c403010203": b"\1\2\3", "c50003010203": b"\1\2\3", "c600000003010203": b"\1\2\3", "90": [],
    "93010203": [1, 2, 3], "dc00020102": [1, 2], "dd000000020102": [1, 2], "80": {},
    "82a16101a162c0": {"a": 1, "b": None}, "de0001a16101": {"a": 1}, "df00000001a16190": {"a": []}}


@pytest.mark.parametrize("text", MSGPACK)
def test_msgpack_values_are_read_and_a_cut_one_is_refused(text):
    data = bytes.fromhex(text)
    assert radical_edge.parse_msgpack(data) == MSGPACK[text]
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            radical_edge.parse_msgpack(data[:cut])
    with pytest.raises(ProtocolError):
        radical_edge.parse_msgpack(data + b"\xc0")


@pytest.mark.parametrize("data", [
    b"\x91" * 100 + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xd4\x01\x00",
    b"\xc1", b"\x81\x01\x01", b"\xa1\xff"],
    ids=["deep", "huge array", "huge bytes", "extension", "reserved", "number as key", "not UTF-8"])
def test_hostile_msgpack_is_refused(data):
    with pytest.raises(ProtocolError):
        radical_edge.parse_msgpack(data)


def test_a_request_survives_the_wire_as_text_and_as_msgpack():
    for body, opcode in ((b"", Opcode.TEXT), ("ö".encode(), Opcode.TEXT),
                         (b"\xff\0", Opcode.BINARY)):
        sent = radical_edge.encode_request("1", "PUT", "/p/r?q=1", {"a": "b"}, body)
        assert sent[0] is opcode
        payload = sent[1] if opcode is Opcode.BINARY else sent[1].decode()
        found = radical_edge.parse_request(radical_edge.parse_message(payload))
        assert found == ("1", "PUT", "/p/r?q=1", {"a": "b"}, body)


@pytest.mark.parametrize("payload", ["", "[]", "{}", "nul", '{"type": 1}', "[" * 100_000, b"\xc0"])
def test_what_is_no_message_is_refused(payload):
    with pytest.raises(ProtocolError):
        radical_edge.parse_message(payload)


@pytest.mark.parametrize("message", [
    {}, {"status": "200"}, {"status": 99}, {"status": 600}, {"status": True}, {"status": 101},
    {"status": 200, "headers": ["a"]}, {"status": 200, "headers": {"a": "b\r\nSet-Cookie: c=d"}},
    {"status": 200, "headers": {"a b": "c"}}, {"status": 200, "headers": {"a": ["b"]}},
    {"status": 200, "is_binary": True, "body": "@@@"}])
def test_a_response_that_could_break_the_reply_is_refused(message):
    with pytest.raises(ProtocolError):
        radical_edge.parse_response(message)


# ---------------------------------------------------------------------------
# HTTP/1.1 heads and bodies
# ---------------------------------------------------------------------------

def parse_http(*pieces):
    """Return the events of the pieces: (method, target), body bytes joined, "END"."""
    parser, events = RequestParser(), []
    for piece in pieces:
        parser.feed(piece)
        for event in iter(parser.next_event, None):
            if isinstance(event, bytes) and events and isinstance(events[-1], bytes):
                events[-1] += event
            elif isinstance(event, bytes):
                events.append(event)
            else:
                events.append("END" if event is radical_edge.END else (event.method, event.target))
    return events


GOOD_REQUESTS = {
    "a plain one": (b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n", [("GET", "/a?b=c"), "END"]),
    "an empty line first": (b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", [("GET", "/"), "END"]),
    "a body": (b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
               [("POST", "/p"), b"hello", "END"]),
    "chunks": (b"POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n"
               b"5;name=\"v\"\r\nhello\r\n00a \r\n, world!!!\r\n0\r\nX-Sum: 1\r\n\r\n",
               [("POST", "/p"), b"hello, world!!!", "END"]),
    "two, pipelined": (b"POST /1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na"
                       b"GET /2 HTTP/1.1\r\nHost: x\r\n\r\n",
                       [("POST", "/1"), b"a", "END", ("GET", "/2"), "END"]),
    "absolute": (b"GET http://h:1/a?b HTTP/1.1\r\nHost: x\r\n\r\n", [("GET", "/a?b"), "END"]),
    "absolute without a path": (b"GET HTTPS://[::1]?b HTTP/1.1\r\nHost: x\r\n\r\n",
                                [("GET", "/?b"), "END"]),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", [("GET", "/"), "END"]),
    "spaces around a value": (b"GET / HTTP/1.1\r\nHost: \t x \r\nA:\r\n\r\n",
                              [("GET", "/"), "END"]),
}


@pytest.mark.parametrize("name", GOOD_REQUESTS)
def test_good_requests_are_read_whole_and_cut_anywhere(name):
    data, events = GOOD_REQUESTS[name]
    for cut in range(len(data) + 1):
        assert parse_http(data[:cut], data[cut:]) == events


HOST = b"Host: localhost\r\n"
POST_HEAD = b"POST /logout HTTP/1.1\r\n" + HOST
CHUNKED = POST_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BAD_REQUESTS = {
    "no method": (b" / HTTP/1.1\r\n\r\n", 400), "two spaces": (b"GET  / HTTP/1.1\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400), "a lower-case version": (b"GET / http/1.1\r\n\r\n", 400),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "a target that is no path": (b"GET a HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a byte above 127 in the target": (b"GET /\xe4 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a target with a user": (b"GET http://a@b/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a target with a fragment": (b"GET http://b/#c HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "bare LF": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "bare LF in a field": (b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400),
    "bare CR": (b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n", 400),
    "obs-fold": (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
    "a space before the colon": (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "NUL in a value": (b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n", 400),
    "no colon": (b"GET / HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n", 400),
    "both framings": (POST_HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "two lengths": (POST_HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\n", 400),
    "a list of lengths": (POST_HEAD + b"Content-Length: 3, 3\r\n\r\n", 400),
    "a signed length": (POST_HEAD + b"Content-Length: +3\r\n\r\n", 400),
    "a negative length": (POST_HEAD + b"Content-Length: -3\r\n\r\n", 400),
    "a hexadecimal length": (POST_HEAD + b"Content-Length: 0x3\r\n\r\n", 400),
    "an underscore": (POST_HEAD + b"Content-Length: 1_0\r\n\r\n", 400),
    "superscript digits": (POST_HEAD + b"Content-Length: \xb2\r\n\r\n", 400),
    "an endless length": (POST_HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "an unknown coding": (POST_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "two codings": (POST_HEAD + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n", 400),
    "a coding in 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "no length in 1.0": (b"POST / HTTP/1.0\r\n\r\n", 411),
    "a chunk size of letters": (CHUNKED + b"xyz\r\n", 400), "none": (CHUNKED + b"\r\n", 400),
    "a signed chunk size": (CHUNKED + b"+5\r\nhello\r\n", 400),
    "a chunk size of 17 digits": (CHUNKED + b"1" * 17 + b"\r\n", 400),
    "a chunk longer than it says": (CHUNKED + b"3\r\nhello\r\n", 400),
    "a chunk line with bare LF": (CHUNKED + b"5\nhello\r\n", 400),
    "a long chunk extension": (CHUNKED + b"5;" + b"a" * 300, 400),
    "a bad trailer": (CHUNKED + b"0\r\n bad\r\n\r\n", 400),
    "a long request line": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "a request line without end": (b"GET /" + b"a" * 9000, 414),
    "a large head": (b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"a" * 33_000 + b"\r\n\r\n", 431),
    "a head without end": (b"GET / HTTP/1.1\r\n" + HOST + (b"A: " + b"a" * 99 + b"\r\n") * 400,
                           431),
    "too many fields": (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 101 + b"\r\n", 431),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_with_their_status(name):
    data, status = BAD_REQUESTS[name]
    with pytest.raises(EdgeError) as caught:
        parse_http(data)
    assert caught.value.status == status


# what h11 decides otherwise, and why we differ (RFC 9112 unless said otherwise)
H11_DIFFERS = {
    "an empty line first": "section 2.2: a server should ignore it",
    "HTTP/2.0": "h11 takes any version and leaves it to the application",
    "a target that is no path": "section 3.2: h11 leaves the target to the application",
    "a target with a user": "likewise", "a target with a fragment": "likewise",
    "bare LF": "section 2.2 allows it, and smuggling lives on it", "bare LF in a field": "likewise",
    "obs-fold": "section 5.2: a server must refuse or replace it; h11 replaces",
    "both framings": "section 6.3: may be refused as an attempt to smuggle",
    "two lengths": "section 6.3 allows equal ones; we refuse all", "a list of lengths": "likewise",
    "a coding in 1.0": "section 6.1: faulty framing; h11 takes it",
    "no length in 1.0": "RFC 1945, section 7.2.2: such a body cannot be delimited",
    "a chunk size of 17 digits": "h11 takes up to 20", "a long chunk extension": "h11 has no limit",
    "a long request line": "h11 has one limit for the head, 64 KiB", "a large head": "likewise",
    "a request line without end": "likewise", "too many fields": "likewise",
}


def test_h11_agrees_on_what_is_a_good_request_but_for_what_is_written_down():
    h11 = needs_module("h11")
    differs = set()
    for name, (data, _) in {**GOOD_REQUESTS, **BAD_REQUESTS}.items():
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(data)
        accepted = True
        try:
            while type(connection.next_event()) in (h11.Request, h11.Data):
                pass
        except h11.RemoteProtocolError:
            accepted = False
        if accepted != (name in GOOD_REQUESTS):
            differs.add(name)
    assert differs == set(H11_DIFFERS)


@pytest.mark.parametrize("path, segments", [
    ("/", [""]), ("/a/b", ["a", "b"]), ("/a%20b/c%2Fd", ["a b", "c/d"]), ("/%C3%A4", ["ä"])])
def test_paths_are_split_before_they_are_decoded(path, segments):
    assert radical_edge.parse_path(path) == tuple(segments)


@pytest.mark.parametrize("path", ["/..", "/a/../b", "/%2e%2e/a", "/.", "/%00", "/a%0ab", "/%ff"])
def test_paths_that_lead_elsewhere_are_refused(path):
    with pytest.raises(radical_edge.BadRequest):
        radical_edge.parse_path(path)


def test_queries_are_read_and_bounded():
    assert radical_edge.parse_query("a=1&b=&a=%20x") == {"a": " x", "b": ""}
    for query in ("a=%ff", "&".join(f"a{number}=1" for number in range(101))):
        with pytest.raises(radical_edge.BadRequest):
            radical_edge.parse_query(query)


def test_response_heads_are_read_and_nonsense_is_refused():
    head = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\nrest"
    assert radical_edge.parse_response_head(head) == (101, {"upgrade": "websocket"}, b"rest")
    for cut in range(len(head) - len(b"rest")):
        assert radical_edge.parse_response_head(head[:cut]) is None
    for bad in (b"SSH-2.0-x\r\n\r\n\r\n", b"HTTP/1.1 99 x\r\n\r\n", b"x" * 40_000):
        with pytest.raises(ProtocolError):
            radical_edge.parse_response_head(bad)


# ---------------------------------------------------------------------------
# Event streams
# ---------------------------------------------------------------------------

STREAMS = {                                      # WHATWG HTML, section 9.2.6, and the line ends
    "stock": ("data: YHOO\ndata: +2\ndata: 10\n\n", [("", "message", "YHOO\n+2\n10")]),
    "ids": (": test\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\n",
            [("1", "message", "first"), ("", "message", "second"), ("", "message", " third")]),
    "empty": ("data\n\ndata\ndata\n\ndata:", [("", "message", ""), ("", "message", "\n")]),
    "same": ("data:test\n\ndata: test\n\n", [("", "message", "test"), ("", "message", "test")]),
    "CR LF": ("\ufeffid: 7\r\nevent: e\r\ndata: ä\r\n\r\n", [("7", "e", "ä")]),
    "CR": ("data: a\rdata: b\r\rdata: c\r\r", [("", "message", "a\nb"), ("", "message", "c")]),
    "id with NUL": ("id: 1\0\ndata: a\n\n", [("", "message", "a")]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_event_streams_are_read_whole_and_cut_anywhere(name):
    text, expected = STREAMS[name]
    data = text.encode()
    for cut in range(len(data) + 1):
        parser = EventParser()
        found = parser.feed(data[:cut]) + parser.feed(data[cut:]) + parser.feed(b"\n")
        assert [tuple(event) for event in found][:len(expected)] == expected


def test_an_event_comes_back_as_it_was_encoded():
    parser = EventParser()
    (event,) = parser.feed(radical_edge.encode_event("a\nb", 42))
    assert event == ("42", "message", "a\nb")
    parser.feed(b"retry: 1500\n")
    assert parser.retry_s == 1.5


def test_an_event_without_end_is_refused():
    parser = EventParser(max_event=1000)
    with pytest.raises(ProtocolError):
        for _ in range(100):
            parser.feed(b"data: " + b"x" * 50)


# ---------------------------------------------------------------------------
# Frames, further: every cut, every reserved bit, how much a peer can make us keep
# ---------------------------------------------------------------------------

MASK = bytes.fromhex("37fa213d")                 # RFC 6455, section 5.7
HELLO = "48656c6c6f"


def ways_to_cut(data):
    """Return `data` whole, in two pieces cut at every place, and byte by byte: lists of pieces."""
    halves = [[data[:at], data[at:]] for at in range(1, len(data))]
    return [[data], *halves, [data[at:at + 1] for at in range(len(data))]]


def read_frames(pieces, masked=False, **options):
    """Return the messages of the pieces, read after each of them."""
    parser, found = FrameParser(masked=masked, **options), []
    for piece in pieces:
        parser.feed(piece)
        found += iter(parser.next_message, None)
    return found


def refusal_of(function, *args, error=ProtocolError):
    """Return the error that the call raises; fail when it raises another or none."""
    with pytest.raises(error) as caught:
        function(*args)
    return caught.value


def test_the_short_frames_of_the_rfc_in_a_row_survive_every_cut():
    plain = bytes.fromhex(f"8105{HELLO} 0103 48656c 8002 6c6f 8905{HELLO} 8a05{HELLO} 880203e8")
    for pieces in ways_to_cut(plain):
        assert read_frames(pieces) == [
            (Opcode.TEXT, "Hello"), (Opcode.TEXT, "Hello"), (Opcode.PING, b"Hello"),
            (Opcode.PONG, b"Hello"), (Opcode.CLOSE, b"\x03\xe8")]
    masked = bytes.fromhex("8185 37fa213d 7f9f4d5158 8a85 37fa213d 7f9f4d5158")
    for pieces in ways_to_cut(masked):
        assert read_frames(pieces, masked=True) == [(Opcode.TEXT, "Hello"), (Opcode.PONG, b"Hello")]


@pytest.mark.parametrize("size, plain, masked", [
    (0, "8200", "8280"), (125, "827d", "82fd"), (126, "827e007e", "82fe007e"),
    (65535, "827effff", "82feffff"),
    (65536, "827f0000000000010000", "82ff0000000000010000")])
def test_a_length_is_written_in_the_fewest_bytes(size, plain, masked):
    payload = b"\x07" * size
    assert encode_frame(Opcode.BINARY, payload) == bytes.fromhex(plain) + payload
    head = bytes.fromhex(masked) + MASK
    assert encode_frame(Opcode.BINARY, payload, mask=MASK)[:len(head)] == head


@pytest.mark.parametrize("size", [*range(10), 1000, 65537])
def test_masking_is_an_exclusive_or_and_its_own_inverse(size):
    payload = os.urandom(size)
    mixed = radical_edge.apply_mask(payload, MASK)
    assert mixed == bytes(byte ^ MASK[at % 4] for at, byte in enumerate(payload))
    assert radical_edge.apply_mask(mixed, MASK) == payload


def test_masking_keys_are_fresh():
    keys = [radical_edge.new_mask() for _ in range(5000)]
    assert {len(key) for key in keys} == {4}
    assert len(set(keys)) > 4990                 # of 2**32; two alike are rare, ten never happen


@pytest.mark.parametrize("head", [
    *(f"{0x80 | bits | 1:02x}00" for bits in (0x10, 0x20, 0x40, 0x70)), "4000", "c900",
    *(f"8{opcode:x}00" for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    "0800", "0900", "0a00", "887e", "897e", "8a7f", "8180", "8980",
    "827e0000", "827e007d", "827f0000000000000000", "827f000000000000ffff",
    "827fffffffffffffffff", "827f8000000000000000"])
def test_a_bad_frame_head_is_1002_before_any_payload_comes(head):
    assert refusal_of(read_frames, [bytes.fromhex(head)]).code == 1002


@pytest.mark.parametrize("head", ["8105", "8905", "0100", "817e", "8800"])
def test_a_client_that_does_not_mask_is_1002(head):
    error = refusal_of(lambda: read_frames([bytes.fromhex(head)], masked=True))
    assert error.code == 1002


@pytest.mark.parametrize("frames", ["8001 61", "0001 61", "0101 61 8101 62", "0101 61 8201 62",
                                    "0101 61 0101 62", "0101 61 8001 62 8001 63"])
def test_fragments_out_of_order_are_1002(frames):
    assert refusal_of(read_frames, [bytes.fromhex(frames)]).code == 1002


@pytest.mark.parametrize("text", [
    "c3", "c328", "80", "c0af", "e08080", "eda080", "edbfbf", "f4908080", "f8a1a1a1a1", "fe"])
def test_text_that_is_not_utf_8_is_1007_also_in_fragments(text):
    raw_text = bytes.fromhex(text)
    parts = [encode_frame(Opcode.TEXT, b"a", fin=False),
             *(encode_frame(Opcode.CONTINUATION, raw_text[at:at + 1], fin=False)
               for at in range(len(raw_text))), encode_frame(Opcode.CONTINUATION, b"")]
    for pieces in ([encode_frame(Opcode.TEXT, raw_text)], parts):
        assert refusal_of(read_frames, pieces).code == 1007


def test_a_character_may_be_cut_by_fragments_with_control_frames_in_between():
    text = "aä€😀".encode()
    ping = encode_frame(Opcode.PING, b"p")
    frames = encode_frame(Opcode.TEXT, b"", fin=False) + b"".join(
        ping + encode_frame(Opcode.CONTINUATION, text[at:at + 1], fin=False)
        for at in range(len(text))) + encode_frame(Opcode.CONTINUATION, b"")
    for pieces in ways_to_cut(frames):
        assert read_frames(pieces) == [(Opcode.PING, b"p")] * len(text) + [
            (Opcode.TEXT, "aä€😀")]


def test_binary_may_hold_anything():
    payload = bytes(range(256))
    assert read_frames([encode_frame(Opcode.BINARY, payload)]) == [(Opcode.BINARY, payload)]


def test_a_message_of_the_limit_is_read_and_one_byte_more_is_1009():
    whole = encode_frame(Opcode.BINARY, b"x" * 1000)
    halves = (encode_frame(Opcode.BINARY, b"x" * 500, fin=False) + encode_frame(Opcode.PING, b"p")
              + encode_frame(Opcode.CONTINUATION, b"x" * 500))
    found = read_frames([whole, halves, whole, halves], max_message=1000)
    assert [len(payload) for _, payload in found] == [1000, 1, 1000, 1000, 1, 1000]
    for head in ("827e03e9", "817e03e9", "827f7fffffffffffffff"):    # not a byte of it has come
        error = refusal_of(lambda: read_frames([bytes.fromhex(head)], max_message=1000))
        assert error.code == 1009


def test_small_fragments_cost_no_more_memory_than_a_few_times_their_payload():
    # each fragment is an object of its own; 96 MiB in twos would take about 2 GiB
    parser = FrameParser(masked=False)
    parser.feed(encode_frame(Opcode.BINARY, b"", fin=False))
    tracemalloc.start()
    try:
        for _ in range(100):
            parser.feed(encode_frame(Opcode.CONTINUATION, b"ab", fin=False) * 1000)
            assert parser.next_message() is None
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 4 * 200_000


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1011, 1014, 3000, 3999, 4000, 4999])
def test_close_codes_that_may_be_sent_are_read(code):
    assert parse_close(encode_close(code, "grüße")[2:]) == (code, "grüße")


@pytest.mark.parametrize("payload, expected", [
    ("03", 1002), ("0000", 1002), ("03e7", 1002), ("03ec", 1002), ("03ed", 1002), ("03ee", 1002),
    ("03f7", 1002), ("03f8", 1002), ("07d0", 1002), ("0bb7", 1002), ("1388", 1002),
    ("ffff", 1002), ("03e8ff", 1007), ("03e8eda080", 1007), ("03e8c3", 1007)])
def test_a_bad_close_frame_has_a_close_code_itself(payload, expected):
    assert refusal_of(parse_close, bytes.fromhex(payload)).code == expected


# ---------------------------------------------------------------------------
# Whole connections to other implementations: theirs at one end, ours at the other
# ---------------------------------------------------------------------------

BODY_SIZES = (0, 1, 125, 126, 65535, 65536, 7 << 20)


class WsprotoPeer:
    """One end of a WebSocket, spoken by wsproto over a real socket."""

    def __init__(self, sock, client):
        wsproto = needs_module("wsproto")
        self._events = needs_module("wsproto.events")
        kind = wsproto.ConnectionType.CLIENT if client else wsproto.ConnectionType.SERVER
        self._connection, self._sock = wsproto.WSConnection(kind), sock
        self._sock.settimeout(10)
        self.pongs = []

    def ask(self, path, token):
        """Ask for the upgrade, as a client; return when it is granted."""
        self._say(self._events.Request(host="127.0.0.1", target=path, extra_headers=[
            (b"Authorization", f"Bearer {token}".encode())]))
        assert isinstance(self._next(), self._events.AcceptConnection)

    def grant(self):
        """Grant the upgrade, as a server; return the path that was asked for."""
        request = self._next()
        self._say(self._events.AcceptConnection())
        return request.target

    def send(self, payload, ping=None):
        """Send a message; with `ping`, in three fragments and with a ping after each."""
        event = self._events.TextMessage if isinstance(payload, str) else self._events.BytesMessage
        third = len(payload) // 3 if ping else len(payload)
        for at in range(0, len(payload), third or len(payload)):
            part = payload[at:at + third]
            self._say(event(data=part, message_finished=at + third >= len(payload)))
            if ping:
                self._say(self._events.Ping(payload=ping))

    def close(self, code):
        """Close with the closing handshake; return the code that comes back."""
        self._say(self._events.CloseConnection(code=code))
        event = self._next()
        while not isinstance(event, self._events.CloseConnection):
            event = self._next()
        return event.code

    def recv(self):
        """Return the next message."""
        parts = []
        while True:
            event = self._next()
            if isinstance(event, self._events.Ping):
                self._say(event.response())
            elif isinstance(event, self._events.Pong):
                self.pongs.append(bytes(event.payload))
            else:
                parts.append(event.data)
                if event.message_finished:
                    return type(event.data)().join(parts)

    def recv_json(self, kind):
        """Return the next message of this type, JSON or msgpack."""
        while True:
            message = radical_edge.parse_message(self.recv())
            if message["type"] == kind:
                return message

    def _say(self, event):
        self._sock.sendall(self._connection.send(event))

    def _next(self):
        while True:
            for event in self._connection.events():
                return event
            data = self._sock.recv(65536)
            assert data, "closed"
            self._connection.receive_data(data)


def encode_answer(req_id, body):
    """Return the answer of an edge of version 1, with a body in base64."""
    return json.dumps({"type": "response", "req_id": req_id, "status": 200, "is_binary": True,
                       "headers": {}, "body": base64.b64encode(body).decode()})


REGISTER = json.dumps({"type": "register", "edge_name": "old", "plugins": {"p": {"type": "p"}}})


def test_wsproto_as_an_edge_serves_bodies_of_every_size(bridge, tokens, raw):
    client = raw()
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as sock:
        link = WsprotoPeer(sock, client=True)
        link.ask("/register", tokens[1]["edge"])
        link.send(REGISTER, ping=b"hello")
        link.recv_json("topology")
        assert link.pongs == [b"hello"] * len(link.pongs) != []
        for size in BODY_SIZES:
            body = os.urandom(size)
            client.send_request("POST", "/old/p/x", body)
            request = link.recv_json("request")
            assert radical_edge.parse_request(request).body == body
            link.send(encode_answer(request["req_id"], body[::-1]), ping=b"now")
            status, _, answer = client.reply()
            assert (status, answer) == (200, body[::-1])
        assert link.close(1000) == 1000


def test_websockets_as_an_edge_answers_in_fragments_with_pings_in_between(bridge, tokens, raw):
    sync = needs_module("websockets.sync.client")
    url = bridge.url.replace("http://", f"ws://x:{tokens[1]['edge']}@") + "/register"
    client, pongs = raw(), []
    with sync.connect(url, max_size=None) as link:
        assert link.protocol.extensions == []    # compression was offered and not taken

        def parts_of(text):
            third = len(text) // 3
            for at in (0, third, 2 * third):
                pongs.append(link.ping())
                yield text[at:at + third] if at < 2 * third else text[at:]

        link.send(REGISTER)
        assert json.loads(link.recv(10))["type"] == "topology"
        for size in BODY_SIZES:
            body = b"\xff" * size
            client.send_request("POST", "/old/p/x", body)
            request = radical_edge.parse_message(link.recv(10))
            assert radical_edge.parse_request(request).body == body
            link.send(parts_of(encode_answer(request["req_id"], body)))
            assert client.reply()[::2] == (200, body)
            assert all(pong.wait(10) for pong in pongs)
    assert link.close_code == 1000


@pytest.mark.parametrize("frames, code", [
    ("8105" + HELLO, 1002), ("f180 37fa213d", 1002), ("8381 37fa213d 00", 1002),
    ("8182 00000000 c328", 1007), ("8182 00000000 7b7d", 1007), ("81ff 0000000010000000", 1009),
    ("8190 00000000" + b'{"type": "late"}'.hex(), 1008), ("8882 00000000 03e8", 1000),
    ("8882 00000000 03ed", 1002)])
def test_the_bridge_leaves_a_peer_that_breaks_the_protocol_with_the_close_code(
        bridge, tokens, frames, code):
    target = radical_edge.parse_bridge_url(bridge.url)
    sock, rest = radical_edge.open_websocket(target, tokens[1]["edge"], None)
    with sock:
        sock.sendall(bytes.fromhex(frames))
        while len(rest) < 2 or len(rest) < 2 + rest[1]:
            data = sock.recv(4096)
            assert data, "closed without a close frame"
            rest += data
        assert parse_close(rest[2:2 + rest[1]])[0] == code


@contextlib.contextmanager
def websockets_bridge():
    """A bridge played by `websockets`: yield its URL and a queue of the links that come."""
    server = needs_module("websockets.sync.server")
    links, done = queue.Queue(), threading.Event()

    def handle(link):
        links.put(link)
        done.wait(30)

    with server.serve(handle, "127.0.0.1", 0, max_size=None) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/register", links
        finally:
            done.set()
            listener.shutdown()
            thread.join()


@contextlib.contextmanager
def running_edge(url):
    """Our edge, with the echo plugin."""
    edge = Edge(url, "e9", plugins=["echo"]).start()
    try:
        yield edge
    finally:
        assert edge.stop()


def encode_echo(req_id, body):
    """Return a request for the echo plugin, as msgpack or as JSON."""
    return radical_edge.encode_request(req_id, "POST", "/echo/echo", {}, body)


def test_our_edge_serves_a_bridge_made_of_websockets_in_every_size(home):
    with websockets_bridge() as (url, links), running_edge(url) as edge:
        link = links.get(timeout=10)
        assert link.protocol.extensions == []
        assert json.loads(link.recv(10))["type"] == "register"
        link.send(json.dumps({"type": "topology", "edges": {}}))
        for size in BODY_SIZES:
            body = os.urandom(size)
            opcode, payload = encode_echo(str(size), body)
            whole = payload.decode() if opcode is Opcode.TEXT else payload
            pongs = []

            def parts(whole=whole, pongs=pongs):
                for at in range(0, len(whole), len(whole) // 4 + 1):
                    pongs.append(link.ping())
                    yield whole[at:at + len(whole) // 4 + 1]

            link.send(parts())
            answer = radical_edge.parse_response(json.loads(link.recv(10)))
            assert (answer[0], answer[2]) == (200, body)
            assert len(pongs) == 4 and all(pong.wait(10) for pong in pongs)
        link.send(json.dumps({"type": "ping"}))
        assert json.loads(link.recv(10)) == {"type": "pong"}
        link.send(json.dumps({"type": "shutdown", "reason": "enough"}))
        assert edge.ended.wait(10)


def ask_to_echo(link, body):
    """Send a request over a WsprotoPeer, a ping within it, and check that the body comes back."""
    opcode, payload = encode_echo(str(len(body)), body)
    link.send(payload.decode() if opcode is Opcode.TEXT else payload, ping=b"p")
    answer = link.recv_json("response")
    assert radical_edge.parse_response(answer)[::2] == (200, body)


def test_our_edge_serves_a_bridge_made_of_wsproto(home):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/prefix"
    with listener, running_edge(url) as edge:
        sock, _ = listener.accept()
        with sock:
            link = WsprotoPeer(sock, client=False)
            assert link.grant() == "/prefix/register"
            assert link.recv_json("register")["edge_name"] == "e9"
            for size in BODY_SIZES:
                ask_to_echo(link, os.urandom(size))
            link.send(json.dumps({"type": "shutdown"}))
            assert edge.ended.wait(10)
            assert link.close(1001) == 1001


@pytest.mark.parametrize("accept", ["", "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"],
                         ids=["without", "of another key"])
def test_an_upgrade_without_the_right_accept_key_is_refused(accept):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = radical_edge.parse_bridge_url(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def answer():
            with listener.accept()[0] as sock:
                sock.recv(4096)
                sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                             b"Connection: Upgrade\r\n" + accept.encode() + b"\r\n")
                sock.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        refusal_of(radical_edge.open_websocket, url, None, None)
        thread.join()


# ---------------------------------------------------------------------------
# Messages, further: hostile msgpack, and every form of a request and an answer
# ---------------------------------------------------------------------------

def nested(levels, head=b"\x91"):
    """Return msgpack of `levels` arrays (or maps) in each other, around nil."""
    return head * levels + b"\xc0"


def test_msgpack_nests_as_deep_as_the_limit_and_no_deeper():
    for head in (b"\x91", b"\xdc\x00\x01", b"\x81\xa1a"):
        radical_edge.parse_msgpack(nested(radical_edge.MAX_NESTING, head))
        for levels in (radical_edge.MAX_NESTING + 2, 100_000):
            refusal_of(radical_edge.parse_msgpack, nested(levels, head))


@pytest.mark.parametrize("head", ["c4ff", "c5ffff", "c6ffffffff", "d9ff", "daffff", "dbffffffff",
                                  "dcffff", "ddffffffff", "deffff", "dfffffffff", "8f", "9f", "bf"])
def test_an_announced_size_takes_no_memory(head):
    data = bytes.fromhex(head) + b"\xc0" * 10
    tracemalloc.start()
    try:
        refusal_of(radical_edge.parse_msgpack, data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ["c1", "c70001", "c8000001", "c90000000001", "d40100", "d5010000",
                                  "d60100000000", "d7ff" + "00" * 8, "d801" + "00" * 16])
def test_msgpack_extension_types_are_refused(text):
    refusal_of(radical_edge.parse_msgpack, bytes.fromhex(text))


@pytest.mark.parametrize("key", ["01", "c0", "c3", "c40161", "9101", "80", "cb0000000000000000"])
def test_a_msgpack_key_that_is_not_text_is_refused(key):
    refusal_of(radical_edge.parse_msgpack, bytes.fromhex("81" + key + "c0"))


@pytest.mark.parametrize("value, text", [
    (None, "c0"), (False, "c2"), (True, "c3"), (1, "d200000001"), (-1, "d2ffffffff"),
    ("ä", "db00000002c3a4"), (b"\xff", "c600000001ff"),
    ({"a": b""}, "df00000001 db0000000161 c600000000")])
def test_msgpack_is_written_by_the_specification_and_read_again(value, text):
    assert radical_edge.encode_msgpack(value) == bytes.fromhex(text)
    assert radical_edge.parse_msgpack(bytes.fromhex(text)) == value


@pytest.mark.parametrize("value", [1.5, [1], {"a": {1}}, object()])
def test_what_msgpack_is_not_written_for_is_a_value_error(value):
    refusal_of(radical_edge.encode_msgpack, value, error=ValueError)


def test_damaged_messages_raise_protocol_errors_and_nothing_else():
    numbers = random.Random(6455)
    opcode, good = radical_edge.encode_request("1", "POST", "/p/r", {"a": "b"}, b"\xff" * 20)
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(numbers.randint(1, 4)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        with contextlib.suppress(ProtocolError):
            radical_edge.parse_request(radical_edge.parse_message(bytes(data)))


def test_a_request_of_version_1_has_exactly_these_fields():
    encode = radical_edge.encode_request
    opcode, text = encode("7", "POST", "/p/r?q", {"a": "ä"}, "ö".encode())
    fields = {"type": "request", "req_id": "7", "method": "POST", "path": "/p/r?q",
              "headers": {"a": "ä"}, "is_binary": False, "body": "ö"}
    assert (opcode, json.loads(text)) == (Opcode.TEXT, fields)
    assert json.loads(encode("7", "GET", "/", {}, b"")[1])["body"] is None
    opcode, packed = encode("7", "POST", "/p/r?q", {"a": "ä"}, b"\xff")
    assert opcode is Opcode.BINARY
    assert radical_edge.parse_msgpack(packed) == {**fields, "is_binary": True, "body": b"\xff"}


def test_an_answer_of_version_1_has_exactly_these_fields():
    fields = {"type": "response", "req_id": "7", "status": 201, "headers": {"a": "b"}}
    for body, sent in (("ö".encode(), {"is_binary": False, "body": "ö"}),
                       (b"", {"is_binary": False, "body": ""}),
                       (b"\xff\0", {"is_binary": True, "body": "/wA="})):
        text = radical_edge.encode_response("7", 201, {"a": "b"}, body)
        assert json.loads(text) == {**fields, **sent}
        assert radical_edge.parse_response(json.loads(text)) == (201, {"a": "b"}, body)


REQUEST = {"type": "request", "req_id": "1", "method": "GET", "path": "/"}


@pytest.mark.parametrize("fields, body", [
    ({}, b""), ({"body": None}, b""), ({"body": ""}, b""), ({"body": "ö"}, "ö".encode()),
    ({"body": b"\xff", "is_binary": True}, b"\xff"), ({"body": b"a"}, b"a"),
    ({"body": "/wA=", "is_binary": True}, b"\xff\0"), ({"body": {"a": [1]}}, b'{"a":[1]}'),
    ({"body": [None, "ä"]}, '[null,"ä"]'.encode()), ({"body": 1.5}, b"1.5"),
    ({"body": False}, b"false")])
def test_a_body_comes_as_text_bytes_base64_or_json(fields, body):
    assert radical_edge.parse_request({**REQUEST, **fields}).body == body
    assert radical_edge.parse_response({"status": 200, **fields})[2] == body


@pytest.mark.parametrize("body", [
    '"@@@"', '"YQ"', '"Y Q=="', '"\\n"',
    '"é"', '"\\ud800"'])                         # the last two were plain ValueErrors
def test_a_binary_body_that_is_not_base64_is_refused(body):
    message = json.loads(f'{{"status": 200, "is_binary": true, "body": {body}}}')
    refusal_of(radical_edge.parse_response, message)
    refusal_of(radical_edge.parse_request, {**REQUEST, **message})


@pytest.mark.parametrize("body", [
    float("nan"), [float("inf")], {"a": "\ud800"}, {"\ud800": 1}, {"a": b"bytes"}],
    ids=["NaN", "Infinity", "a surrogate", "a surrogate as name", "bytes in an object"])
def test_a_body_that_json_has_no_text_for_is_refused(body):
    # other errors than ProtocolError came out
    refusal_of(radical_edge.parse_response, {"status": 200, "body": body})
    refusal_of(radical_edge.parse_request, {**REQUEST, "body": body})


def test_an_answer_that_json_has_no_text_for_is_502_at_once(bridge, tokens, raw):
    # seen by the client: it must get an answer
    sync = needs_module("websockets.sync.client")
    url = bridge.url.replace("http://", f"ws://x:{tokens[1]['edge']}@") + "/register"
    with sync.connect(url) as link:
        link.send(REGISTER)
        assert json.loads(link.recv(10))["type"] == "topology"
        for body in ("NaN", '{"a": "\\ud800"}', '"\\u00e9", "is_binary": true'):
            client = raw()
            client.send_request("GET", "/old/p/x")
            req_id = json.loads(link.recv(10))["req_id"]
            link.send(f'{{"type": "response", "req_id": "{req_id}", "status": 200, '
                      f'"body": {body}}}')
            assert client.reply()[0] == 502


@pytest.mark.parametrize("fields", [
    {"req_id": 1}, {"req_id": None}, {"method": None}, {"path": ["/"]}, {"headers": ["a"]},
    {"headers": "a: b"}])
def test_a_request_with_a_wrong_field_is_refused(fields):
    refusal_of(radical_edge.parse_request, {**REQUEST, **fields})


@pytest.mark.parametrize("name, value", [
    ("a", "b\r\nSet-Cookie: c"), ("a", "b\nc"), ("a", "b\rc"), ("a", "b\0"), ("a", "\x7f"),
    ("a", "\x85"), ("a", "\u2028"), ("a", "\ud800"), ("a\r\nb", "c"), ("a:", "b"), ("a b", "c"),
    ("", "b"), ("ä", "b"), ("a\n", "b"), ("a", None), ("a", ["b"]), ("a", {"b": 1}), ("a", b"b")])
def test_a_field_that_could_break_an_answer_apart_is_refused(name, value):
    refusal_of(radical_edge.parse_response, {"status": 200, "headers": {name: value}})


@pytest.mark.parametrize("status", [None, "200", 200.0, True, 0, -200, 100, 101, 199, 600, 1 << 70])
def test_a_status_that_no_answer_has_is_refused(status):
    refusal_of(radical_edge.parse_response, {"status": status})


def test_a_json_body_of_an_answer_has_its_media_type_unless_it_says_another():
    parse = radical_edge.parse_response
    assert parse({"status": 200, "body": {}})[1] == {"content-type": "application/json"}
    fields = {"Content-Type": "a/b", "X-Count": 7}
    assert parse({"status": 599, "headers": fields, "body": []}) == (
        599, {"content-type": "a/b", "x-count": "7"}, b"[]")


def test_a_lone_surrogate_in_a_text_body_is_passed_on_as_its_bytes():
    message = radical_edge.parse_message('{"type": "response", "status": 200, "body": "\\ud800"}')
    assert radical_edge.parse_response(message)[2] == b"\xed\xa0\x80"


@pytest.mark.parametrize("payload", ["null", "1", '"type"', '{"type": null}', '{"type": "a"} x',
                                     "{'type': 'a'}", "\ufeff{}", b"",
                                     b"\x81\xa4type\x01", b"\x90"])
def test_a_message_that_is_no_object_with_a_type_is_refused(payload):
    refusal_of(radical_edge.parse_message, payload)


# ---------------------------------------------------------------------------
# HTTP/1.1, further
# ---------------------------------------------------------------------------

def read_requests(pieces):
    """Return the requests of the pieces as (method, target, body); body None while incomplete."""
    parser, found = RequestParser(), []
    for piece in pieces:
        parser.feed(piece)
        for event in iter(parser.next_event, None):
            if isinstance(event, radical_edge.RequestHead):
                found.append([event.method, event.target, None])
                body = b""
            elif event is radical_edge.END:
                found[-1][2] = body
            else:
                body += event
    return [tuple(request) for request in found]


X = b" HTTP/1.1\r\nHost: x\r\n"
IN_CHUNKS = b"POST /c" + X + b"Transfer-Encoding: chunked\r\n\r\n"
WELL_FORMED = {
    "chunks with extensions and trailers": (
        IN_CHUNKS + b'3;a;b=c;d="e;f"\r\nabc\r\n0000F \t;x\r\n' + b"x" * 15
        + b"\r\n000;last\r\nA: b\r\nExpires: \xe4\r\n\r\n", [("POST", "/c", b"abc" + b"x" * 15)]),
    "no chunk but the last": (IN_CHUNKS + b"0\r\n\r\n", [("POST", "/c", b"")]),
    "a body with line ends": (b"PUT /" + X + b"Content-Length: 8\r\n\r\n\r\n\r\nGET ",
                              [("PUT", "/", b"\r\n\r\nGET ")]),
    "a chunk with line ends": (IN_CHUNKS + b"5\r\n0\r\n\r\n\r\n0\r\n\r\n",
                               [("POST", "/c", b"0\r\n\r\n")]),
    "four pipelined, of every framing": (
        IN_CHUNKS + b"1\r\na\r\n0\r\n\r\n" + b"\r\nGET /2" + X + b"\r\n"
        + b"POST /3" + X + b"Content-Length: 002\r\n\r\nbc" + b"HEAD /4?q" + X + b"\r\n",
        [("POST", "/c", b"a"), ("GET", "/2", b""), ("POST", "/3", b"bc"), ("HEAD", "/4?q", b"")]),
    "the absolute form": (b"GET HTTP://h:1//a;b?c?d" + X + b"\r\n", [("GET", "//a;b?c?d", b"")]),
    "the absolute form without a path": (b"GET https://h?q" + X + b"\r\n", [("GET", "/?q", b"")]),
    "the asterisk": (b"OPTIONS *" + X + b"\r\n", [("OPTIONS", "/*", b"")]),
    "a method of its own": (b"M-SEARCH!~ /" + X + b"\r\n", [("M-SEARCH!~", "/", b"")]),
    "HTTP/1.9": (b"GET / HTTP/1.9\r\nHost:\r\n\r\n", [("GET", "/", b"")]),
    "HTTP/1.0 with a length": (b"POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\na",
                               [("POST", "/", b"a")]),
    "an obs-text value": (b"GET /" + X + b"A: \xff\xe4 \t,\r\n\r\n", [("GET", "/", b"")]),
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_well_formed_requests_are_the_same_whatever_their_cuts(name):
    data, requests = WELL_FORMED[name]
    for pieces in ways_to_cut(data):
        assert read_requests(pieces) == requests


@pytest.mark.parametrize("name", WELL_FORMED)
def test_a_request_is_not_complete_before_its_last_byte(name):
    data, requests = WELL_FORMED[name]
    for cut in range(len(data)):
        assert read_requests([data[:cut]]) != requests


def read_head(data):
    """Return the RequestHead that `data` begins with."""
    parser = RequestParser()
    parser.feed(data)
    return parser.next_event()


@pytest.mark.parametrize("fields, keep_alive", [
    (b"", True), (b"Connection: close\r\n", False), (b"Connection: Upgrade ,\tCLOSE\r\n", False),
    (b"Connection: a\r\nConnection: close\r\n", False), (b"Connection: closed\r\n", True)])
def test_a_connection_is_kept_unless_closed(fields, keep_alive):
    assert read_head(b"GET /" + X + fields + b"\r\n").keep_alive is keep_alive


def test_a_connection_of_http_1_0_is_kept_only_when_asked():
    assert not read_head(b"GET / HTTP/1.0\r\n\r\n").keep_alive
    assert read_head(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keep_alive


def test_the_parts_of_a_head():
    head = read_head(b"POST http://h:1/a/b?c=d?e HTTP/1.1\r\nHost: x\r\nA: 1\r\na:2 \r\nCookie: b=c"
                     b"\r\nCookie: d=e\r\nExpect: 100-Continue\r\nContent-Length: 3\r\n\r\n")
    assert (head.host, head.path, head.query, head.length) == ("h:1", "/a/b", "c=d?e", 3)
    assert (head.fields["a"], head.fields["cookie"]) == ("1, 2", "b=c; d=e")
    assert head.expects_continue and not head.is_http10
    old = read_head(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert old.is_http10 and not old.expects_continue      # RFC 9110, section 10.1.1
    assert read_head(IN_CHUNKS).length is None


def test_what_follows_an_upgrade_is_handed_over():
    parser = RequestParser()
    parser.feed(b"GET /" + X + b"\r\n\x81\x00")
    assert parser.next_event() and parser.next_event() is radical_edge.END
    assert (parser.buffered, parser.take_rest(), parser.buffered) == (2, b"\x81\x00", 0)


LENGTH = b"POST /" + X + b"Content-Length: "
CODING = b"POST /" + X + b"Transfer-Encoding: "
MALFORMED = {
    "an empty length": (LENGTH + b"\r\n\r\n", 400),
    "a length with a letter": (LENGTH + b"3b\r\n\r\n", 400),
    "a fraction": (LENGTH + b"3.0\r\n\r\n", 400), "a space within": (LENGTH + b"1 2\r\n\r\n", 400),
    "digits of UTF-8": (LENGTH + "３".encode() + b"\r\n\r\n", 400),
    "a no-break space": (LENGTH + b"3\xa0\r\n\r\n", 400),
    "different lengths": (LENGTH + b"3\r\nContent-Length: 4\r\n\r\n", 400),
    "different in a list": (LENGTH + b"1, 2\r\n\r\n", 400),
    "the coding before the length": (CODING + b"chunked\r\nContent-Length: 3\r\n\r\n", 400),
    "identity": (CODING + b"identity\r\n\r\n", 501), "an empty coding": (CODING + b"\r\n\r\n", 501),
    "chunked twice": (CODING + b"chunked, chunked\r\n\r\n", 501),
    "chunked and a comma": (CODING + b"chunked,\r\n\r\n", 501),
    "not quite chunked": (CODING + b"xchunked\r\n\r\n", 501),
    "a vertical tab": (CODING + b"\x0bchunked\r\n\r\n", 400),
    "a coding in HTTP/1.0 with a length": (
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400),
    "PUT without a length in HTTP/1.0": (b"PUT / HTTP/1.0\r\n\r\n", 411),
    "a tab before the colon": (b"GET /" + X + b"A\t: b\r\n\r\n", 400),
    "a field without a name": (b"GET /" + X + b": b\r\n\r\n", 400),
    "a name beyond ASCII": (b"GET /" + X + b"\xe4: b\r\n\r\n", 400),
    "a fold with a tab": (b"GET /" + X + b"A: b\r\n\tc\r\n\r\n", 400),
    "a fold at once": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "CR LF LF": (b"GET /" + X + b"A: b\r\n\n", 400),
    "LF CR LF": (b"GET /" + X + b"A: b\n\r\n", 400),
    "a bare CR before CR LF": (b"GET /" + X + b"A: b\r\r\n\r\n", 400),
    "DEL in a value": (b"GET /" + X + b"A: \x7f\r\n\r\n", 400),
    "a tab in the request line": (b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a space at its end": (b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
    "HTTP/1.10": (b"GET / HTTP/1.10\r\nHost: x\r\n\r\n", 400),
    "HTTP/0.9": (b"GET / HTTP/0.9\r\n\r\n", 505), "HTTP/3.1": (b"GET / HTTP/3.1\r\n\r\n", 505),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
    "a host and port": (b"CONNECT h:1" + X + b"\r\n", 400), "GET *": (b"GET *" + X + b"\r\n", 400),
    "another scheme": (b"GET ftp://h/" + X + b"\r\n", 400),
    "a user in the target": (b"GET http://u@h/" + X + b"\r\n", 400),
    "no host in the target": (b"GET http:///a" + X + b"\r\n", 400),
    "two Hosts of two cases": (b"GET /" + X + b"hOST: x\r\n\r\n", 400),
    "no chunk size": (IN_CHUNKS + b";a=b\r\n", 400), "a space first": (IN_CHUNKS + b" 5\r\n", 400),
    "a negative chunk size": (IN_CHUNKS + b"-1\r\n", 400),
    "0x in a chunk size": (IN_CHUNKS + b"0x5\r\nhello\r\n", 400),
    "an underscore in a chunk size": (IN_CHUNKS + b"1_0\r\n", 400),
    "a chunk without its CR LF": (IN_CHUNKS + b"3\r\nabc0\r\n\r\n", 400),
    "a chunk with LF alone": (IN_CHUNKS + b"3\r\nabc\n0\r\n\r\n", 400),
    "a chunk extension with LF": (IN_CHUNKS + b"3;a\nabc\r\n", 400),
    "a chunk extension with NUL": (IN_CHUNKS + b"3;\0\r\nabc\r\n", 400),
    "a trailer with LF": (IN_CHUNKS + b"0\r\nA: b\n\r\n", 400),
    "a trailer without a colon": (IN_CHUNKS + b"0\r\nnonsense\r\n\r\n", 400),
    "too many trailers": (IN_CHUNKS + b"0\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
    "a trailer without end": (IN_CHUNKS + b"0\r\nA: " + b"b" * 9000, 400),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_with_their_status_whatever_their_cuts(name):
    data, status = MALFORMED[name]
    ways = ways_to_cut(data) if len(data) < 300 else [[data], [data[:40], data[40:]]]
    for pieces in ways:
        assert refusal_of(read_requests, pieces, error=EdgeError).status == status


LONGEST_LINE = b"GET /" + b"a" * (radical_edge.MAX_TARGET - 14) + b" HTTP/1.1"
LARGEST_HEAD = (b"GET /" + X + b"A: ").ljust(radical_edge.MAX_HEAD, b"a")
LONGEST_CHUNK_LINE = IN_CHUNKS + b"1;".ljust(radical_edge.MAX_CHUNK_LINE, b"a")


@pytest.mark.parametrize("data, rest", [
    (LONGEST_LINE, b"\r\nHost: x\r\n\r\n"), (LARGEST_HEAD, b"\r\n\r\n"),
    (LONGEST_CHUNK_LINE, b"\r\na\r\n0\r\n\r\n"),
    (b"\r\n", b"\r\nGET /" + X + b"\r\n")],
    ids=["a request line", "a head", "a chunk line", "two empty lines"])
def test_the_answer_to_a_borderline_request_does_not_depend_on_its_cuts(data, rest):
    # a limit counted half a line end, and every read forgave one more empty line
    def outcome(pieces):
        try:
            return read_requests(pieces)
        except EdgeError as error:
            return error.status

    whole = outcome([data + rest])
    for cut in range(len(rest) + 1):
        assert outcome([data + rest[:cut], rest[cut:]]) == whole


def test_one_byte_more_than_the_limit_is_refused():
    for data, status in ((LONGEST_LINE.replace(b" HTTP", b"a HTTP") + b"\r\nHost: x\r\n\r\n", 414),
                         (LARGEST_HEAD + b"a\r\n\r\n", 431),
                         (LONGEST_CHUNK_LINE + b"a\r\na\r\n0\r\n\r\n", 400)):
        assert refusal_of(read_requests, [data], error=EdgeError).status == status


def test_damaged_requests_raise_edge_errors_and_nothing_else():
    numbers = random.Random(9112)
    seeds = [data for data, _ in WELL_FORMED.values()]
    for _ in range(5000):
        data = bytearray(numbers.choice(seeds))
        for _ in range(numbers.randint(1, 3)):
            data[numbers.randrange(len(data))] = numbers.choice(b"\r\n :;0Fa[]\0\xff/?*")
        with contextlib.suppress(EdgeError):
            read_requests([bytes(data)])


# what h11 decides otherwise on WELL_FORMED and MALFORMED, and why we differ (RFC 9112)
H11_DECIDES_OTHERWISE = {
    "chunks with extensions and trailers": "section 7.1.1: space before ';' must be read",
    "the coding before the length": "section 6.3: may be refused as an attempt to smuggle",
    "a coding in HTTP/1.0 with a length": "section 6.1: faulty framing; h11 takes it",
    "PUT without a length in HTTP/1.0": "RFC 1945, section 7.2.2: it cannot be delimited",
    "a fold with a tab": "section 5.2: a server must refuse or replace it; h11 replaces",
    "CR LF LF": "section 2.2 allows it, and smuggling lives on it", "LF CR LF": "likewise",
    "a trailer with LF": "likewise",
    "DEL in a value": "RFC 9110, section 5.5: control characters are invalid; h11 lets some pass",
    "a chunk extension with NUL": "likewise",
    "HTTP/0.9": "h11 takes any version and leaves it to the application", "HTTP/3.1": "likewise",
    "a host and port": "section 3.2: h11 leaves the target to the application",
    "GET *": "likewise", "another scheme": "likewise", "a user in the target": "likewise",
    "no host in the target": "likewise",
    "too many trailers": "h11 has one limit for head and trailers, 64 KiB",
    "a trailer without end": "likewise",
}


def accepted_by_h11(data):
    """Return whether h11 reads one request of `data` without an error."""
    h11 = needs_module("h11")
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    try:
        while type(connection.next_event()) in (h11.Request, h11.Data):
            pass
    except h11.RemoteProtocolError:
        return False
    return True


def test_h11_decides_the_same_on_these_too_but_for_what_is_written_down():
    differs = {name for name, (data, _) in {**WELL_FORMED, **MALFORMED}.items()
               if accepted_by_h11(data) != (name in WELL_FORMED)}
    assert differs == set(H11_DECIDES_OTHERWISE)


@pytest.mark.parametrize("target", ["http://[::1/", "http://[x]/a"])
def test_a_target_that_no_url_is_gets_an_answer(bridge, raw, target):
    client = raw()
    client.send(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert client.reply()[0] in (400, 401, 403, 404)


@pytest.mark.parametrize("path, segments", [
    ("/", [""]), ("//", ["", ""]), ("/a/", ["a", ""]), ("/a%2fb/c%2F", ["a/b", "c/"]),
    ("/a+b", ["a+b"]), ("/%252e%252e", ["%2e%2e"]), ("/...", ["..."]), ("/.a/a.", [".a", "a."]),
    ("/%E2%82%AC", ["€"]), ("/a;b=c", ["a;b=c"]), ("/%3F%23", ["?#"]), ("/%2e%2e%2f", ["../"])])
def test_each_segment_of_a_path_is_decoded_once(path, segments):
    assert radical_edge.parse_path(path) == tuple(segments)


@pytest.mark.parametrize("path", [
    "/.", "/./a", "/a/..", "/%2e", "/%2E%2e", "/.%2e", "/a/%2e./b", "/a%00", "/%0d%0aA:", "/%1b",
    "/%7f", "/%c2%85", "/%ff", "/%c0%ae", "/%ed%a0%80", "/%e2%82", "/%E2%80%AE"])
def test_a_path_with_dots_controls_or_no_utf_8_is_refused(path):
    refusal_of(radical_edge.parse_path, path, error=radical_edge.BadRequest)


@pytest.mark.parametrize("query, values", [
    ("", {}), ("a", {"a": ""}), ("a=", {"a": ""}), ("=b", {"": "b"}), ("a=b=c", {"a": "b=c"}),
    ("a=1;b=2", {"a": "1;b=2"}), ("a=1&&b=2&", {"a": "1", "b": "2"}), ("a=1&a=2", {"a": "2"}),
    ("a+b=c+d%2B", {"a b": "c d+"}), ("a%3Db=%26", {"a=b": "&"}), ("q=%E2%82%AC", {"q": "€"}),
    ("&".join(f"{number}=x" for number in range(100)), {str(at): "x" for at in range(100)})],
    ids=lambda value: str(value)[:20])
def test_a_query_is_read_as_forms_are(query, values):
    assert radical_edge.parse_query(query) == values


@pytest.mark.parametrize("query", ["a=%ff", "%c3=a", "a=%ed%a0%80", "&".join(["a=1"] * 101),
                                   "&" * 10_000], ids=lambda query: query[:12])
def test_a_query_that_is_not_utf_8_or_too_long_is_refused(query):
    refusal_of(radical_edge.parse_query, query, error=radical_edge.BadRequest)


# ---------------------------------------------------------------------------
# Response heads and chunks
# ---------------------------------------------------------------------------

def test_a_response_head_is_written_and_read_again():
    head = radical_edge.encode_response_head(200, [("A", "b"), ("C", "ä"), ("D", "€")])
    assert head == b"HTTP/1.1 200 OK\r\nA: b\r\nC: \xe4\r\nD: ?\r\n\r\n"
    fields = {"a": "b", "c": "ä", "d": "?"}
    assert radical_edge.parse_response_head(head + b"rest") == (200, fields, b"rest")
    assert radical_edge.encode_response_head(299, []) == b"HTTP/1.1 299 \r\n\r\n"


@pytest.mark.parametrize("data, size", [(b"", b"0"), (b"a", b"1"), (b"\r\n" * 128, b"100")])
def test_a_chunk_is_written_with_its_size_in_hexadecimal(data, size):
    assert radical_edge.encode_chunk(data) == size + b"\r\n" + data + b"\r\n"


def test_chunks_are_read_as_they_were_written():
    pieces = [os.urandom(size) for size in (1, 15, 16, 255, 256, 65536)]
    body = b"".join(map(radical_edge.encode_chunk, [*pieces, b""]))
    assert read_requests([IN_CHUNKS, body]) == [("POST", "/c", b"".join(pieces))]


@pytest.mark.parametrize("line, status", [
    (b"HTTP/1.1 200 OK", 200), (b"HTTP/1.0 404 Not  Found", 404), (b"HTTP/1.1 204 ", 204),
    (b"HTTP/1.1 599", 599), (b"HTTP/1.1 200 \xe4", 200)])
def test_a_status_line_is_read_with_any_reason_or_none(line, status):
    assert radical_edge.parse_response_head(line + b"\r\n\r\n") == (status, {}, b"")


@pytest.mark.parametrize("head", [
    b"", b"SSH-2.0-x", b"HTTP/2 200 OK", b"HTTP/1.2 200 OK", b"http/1.1 200 OK", b"HTTP/1.1 20 OK",
    b"HTTP/1.1 2000 OK", b"HTTP/1.1 +20 OK", b"HTTP/1.1 600 OK", b"HTTP/1.1 099 OK",
    b"HTTP/1.1  200 OK", b"HTTP/1.1 200OK", b"HTTP/1.1 200 O\nK", b"HTTP/1.1 200 O\0K",
    b"HTTP/1.1 200 OK\r\nno colon", b"HTTP/1.1 200 OK\r\nA : b", b"HTTP/1.1 200 OK\r\nA: b\r\n c",
    b"HTTP/1.1 200 OK\r\nA: b\nC: d", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2",
    b"HTTP/1.1 200 OK" + b"\r\nA: b" * 101,
    b"HTTP/1.1 200 OK\r\nA: " + b"a" * radical_edge.MAX_HEAD],   # read when it came at once
    ids=lambda head: repr(head)[2:32])
def test_what_is_no_response_head_is_refused(head):
    refusal_of(radical_edge.parse_response_head, head + b"\r\n\r\n")


# ---------------------------------------------------------------------------
# Event streams, further
# ---------------------------------------------------------------------------

def read_events(pieces, **options):
    """Return the events of the pieces as (id, event, data)."""
    parser = EventParser(**options)
    return [tuple(event) for piece in pieces for event in parser.feed(piece)]


EVENT_STREAMS = {                                # WHATWG HTML, section 9.2.6, and beyond
    "the stock ticker": ("data: YHOO\ndata: +2\ndata: 10\n\n", [("", "message", "YHOO\n+2\n10")]),
    "four blocks": (": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
                    "data:  third event\n\n",
                    [("1", "message", "first event"), ("", "message", "second event"),
                     ("", "message", " third event")]),
    "empty data": ("data\n\ndata\ndata\n\ndata:", [("", "message", ""), ("", "message", "\n")]),
    "types": ("event: add\ndata: 7\n\nevent: remove\ndata: 2\n\ndata: 1\n\n",
              [("", "add", "7"), ("", "remove", "2"), ("", "message", "1")]),
    "an event without data": ("event: a\n\nid: 3\n\ndata: b\n\n", [("3", "message", "b")]),
    "an id that stays": ("id: 1\ndata: a\n\ndata: b\n\n",
                         [("1", "message", "a"), ("1", "message", "b")]),
    "an id with NUL": ("id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n",
                       [("1", "message", "a"), ("1", "message", "b")]),
    "comments and unknown names": (":\n: data: x\nDATA: x\n data: x\nnonsense\ndata: a\n:\n\n",
                                   [("", "message", "a")]),
    "a byte order mark": ("\ufeffdata: a\n\n\ufeffdata: b\n\ndata: \ufeffc\n\n",
                          [("", "message", "a"), ("", "message", "\ufeffc")]),
    "colons and spaces": ("data::a:\ndata:  b \n\n", [("", "message", ":a:\n b ")]),
    "characters of every width": ("data: aä€😀\u2028\u0085\x0b\x0c\x1e\n\n",
                                  [("", "message", "aä€😀\u2028\u0085\x0b\x0c\x1e")]),
}


@pytest.mark.parametrize("name", EVENT_STREAMS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["LF", "CR LF", "CR"])
def test_a_stream_gives_the_same_events_whatever_its_cuts_and_line_ends(name, line_end):
    text, events = EVENT_STREAMS[name]
    data = text.replace("\n", line_end).encode()
    for pieces in ways_to_cut(data):
        assert read_events([*pieces, b":"]) == events      # a CR is no CR LF once more came


def test_what_is_not_utf_8_is_replaced():
    for pieces in ways_to_cut(b"data: a\xff\xe2\x82b\n\n"):
        assert read_events(pieces) == [("", "message", "a\ufffd\ufffdb")]


@pytest.mark.parametrize("value, seconds", [
    ("1500", 1.5), ("0", 0), ("", None), ("-1", None), ("1.5", None), ("1e3", None), ("²", None),
    ("１", None), ("1 0", None)])
def test_retry_is_milliseconds_in_ascii_digits(value, seconds):
    parser = EventParser()
    parser.feed(f"retry: {value}\n".encode())
    assert parser.retry_s == seconds


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_a_retry_of_many_digits_breaks_nothing(digits):
    # OverflowError from 312 digits on, ValueError from 4301 on
    assert read_events([b"retry: " + b"9" * digits + b"\ndata: a\n\n"]) == [("", "message", "a")]


def test_the_last_id_is_that_of_the_last_whole_event():
    # the stream may break now, and who resumes after "2" has never seen its data
    parser = EventParser()
    parser.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n")
    assert parser.last_id == "1"
    assert parser.feed(b"\n") == [("2", "message", "b")]
    assert parser.last_id == "2"


@pytest.mark.parametrize("data", [
    "", "a", "a\nb", "\n", "\n\n", " a", ":a", "data: a", "ä€😀\u2028"])
def test_data_comes_back_as_it_was_encoded(data):
    for event_id, expected in ((None, ""), (7, "7")):
        pieces = ways_to_cut(radical_edge.encode_event(data, event_id))
        assert all(read_events(way) == [(expected, "message", data)] for way in pieces)


@pytest.mark.parametrize("line", [b"data: " + b"x" * 94 + b"\n", b"data: xxxx\n", b"data: x\n",
                                  b"data:\n", b"data: " + b"x" * 10], ids=repr)
def test_an_event_that_never_ends_is_refused(line):
    # lines of no data counted nothing, so they were kept without end
    refusal_of(lambda: read_events([line] * 2000, max_event=1000))


def test_events_of_the_limit_are_read_one_after_the_other():
    event = b"data: " + b"x" * 900 + b"\n\n"
    assert len(read_events([event[:500], event[500:]] * 5, max_event=1000)) == 5


def test_a_comment_line_without_end_is_refused():
    refusal_of(lambda: read_events([b":" + b"x" * 100] * 20, max_event=1000))


def test_damaged_streams_raise_nothing_but_protocol_errors():
    numbers = random.Random(926)
    seeds = [text.encode() for text, _ in EVENT_STREAMS.values()]
    for _ in range(3000):
        data = bytearray(numbers.choice(seeds))
        for _ in range(numbers.randint(1, 4)):
            data[numbers.randrange(len(data))] = numbers.choice(b"\r\n: \0\xffdi0")
        with contextlib.suppress(ProtocolError):
            read_events([bytes(data)], max_event=50)


# ---------------------------------------------------------------------------
# The bridge's HTTP surface: every error, and what comes after it on the connection
# ---------------------------------------------------------------------------

def assert_error(reply, status, *words):
    """Check an error's status and shape, and that its detail says what it must."""
    found, fields, body = reply
    assert found == status, body
    assert fields["content-type"] == "application/json"
    value = json.loads(body)
    assert set(value) == {"error", "status_code", "detail"}
    assert value["error"] is True and value["status_code"] == status
    for word in words:
        assert word in value["detail"], value["detail"]


ERRORS = [                                       # method, path, body, headers, status, words
    ("POST", "/e1/echo/json", b"{nonsense", (), 400, ["JSON"]),
    ("GET", "/e1/../echo/hello", b"", (), 400, ["'..'"]),
    ("GET", "/e1/echo/%2e%2e/x", b"", (), 400, []),
    ("GET", "/e1/echo/hello?a=%ff", b"", (), 400, ["query"]),
    ("GET", "/nobody/echo/hello", b"", (), 404, ["nobody", "--list"]),
    ("GET", "/e1/nothing/hello", b"", (), 404, ["nothing", "echo"]),
    ("GET", "/e1/echo/nowhere", b"", (), 404, ["nowhere"]),
    ("GET", "/e1/echo", b"", (), 404, []), ("GET", "/e1", b"", (), 404, []),
    ("GET", "/e1/echo/say/session.no/x", b"", (), 404, ["session.no", "register"]),
    ("GET", "/plugins/none.js", b"", (), 404, ["none"]),
    ("POST", "/edge/disconnect/nobody", b"", (), 404, ["nobody"]),
    ("POST", "/edge/disconnect/bridge", b"", (), 400, ["terminate"]),
    ("DELETE", "/e1/echo/hello", b"", (), 405, ["GET"]),
    ("GET", "/edge/list", b"", (), 405, ["POST"]), ("POST", "/edges", b"", (), 405, ["GET"]),
    ("GET", "/e1/echo/fail/409", b"", (), 409, ["as you asked"]),
    ("GET", "/e1/echo/fail/501", b"", (), 501, ["as you asked"]),
    ("GET", "/e1/echo/number?n=abc", b"", (), 422, ["n:", "abc"]),
    ("GET", "/e1/echo/number?n=-1", b"", (), 422, ["n:"]),
    ("GET", "/e1/echo/hello", b"", [("X-Request-Timeout", "soon")], 422, ["X-Request-Timeout"]),
    ("GET", "/events", b"", [("Last-Event-ID", "x")], 422, ["Last-Event-ID"]),
    ("POST", "/auth", b"{}", (), 422, ["token"]), ("POST", "/auth", b"{", (), 400, ["JSON"]),
    ("POST", "/e1/echo/register_session", b'{"color": 1}', (), 422, ["color"]),
    ("POST", "/e1/echo/register_session", b"[1]", (), 422, ["object"]),
    ("GET", "/e1/echo/crash", b"", (), 500, ["log"]),
    ("GET", "/register", b"", (), 426, ["WebSocket"]),
]


@pytest.mark.parametrize("method, path, body, headers, status, words", ERRORS,
                         ids=[f"{item[0]} {item[1]} {item[4]}" for item in ERRORS])
def test_an_error_says_what_is_wrong_and_leaves_the_connection_in_step(
        edge, raw, method, path, body, headers, status, words):
    client = raw()
    assert_error(client.request(method, path, body, headers), status, *words)
    assert client.request("GET", "/e1/echo/hello")[0] == 200


def test_a_crash_in_a_plugin_tells_the_caller_nothing_of_it(edge, raw):
    _, fields, body = raw().request("GET", "/e1/echo/crash")
    assert b"secret" not in body and b"KeyError" not in body and b"Traceback" not in body
    assert fields["x-request-id"] in json.loads(body)["detail"]


def test_405_names_the_methods(edge, raw):
    assert raw().request("PUT", "/e1/echo/hello")[1]["allow"] == "GET, HEAD"
    assert raw().request("GET", "/edge/list")[1]["allow"] == "POST"


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_broken_framing_is_answered_and_the_connection_closed(bridge, raw, name):
    data, status = BAD_REQUESTS[name]
    client = raw()
    client.send(data)
    reply = client.reply()
    assert_error(reply, status)
    assert reply[1]["connection"] == "close"
    assert client.is_closed()


def test_a_body_that_looks_like_a_request_is_not_run(edge, raw):
    inner = b"GET /e1/echo/fail/418 HTTP/1.1\r\nHost: x\r\n\r\n"
    client = raw()
    assert client.request("POST", "/e1/echo/echo", inner)[2] == inner
    assert client.request("GET", "/e1/echo/hello")[0] == 200


def test_a_head_that_was_read_before_is_known_again_unless_it_is_long():
    def read(text):
        parser = RequestParser()
        parser.feed(text + b"\r\n\r\n")
        return parser.next_event()

    head = b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: x-hop\r\nX-Hop: 1\r\nX-End: 2"
    known = read(head)
    assert read(bytes(bytearray(head))) is known
    assert known.forwarded == {"x-end": "2"} and known.fields["x-hop"] == "1"
    other = read(head.replace(b"/a", b"/b"))
    assert (other.path, other.fields) == ("/b", known.fields)
    long = head + b"\r\nX-Long: " + b"x" * radical_edge.MAX_KEPT_HEAD
    assert read(long) is not read(long)
    for _ in range(2):                            # what is refused is refused again
        refusal_of(read, head + b"\r\nHost: y", error=radical_edge.BadRequest)


def test_only_so_many_heads_are_kept_whatever_comes():
    kept = radical_edge._Remembered(str.upper)
    for number in range(3 * radical_edge.HEADS_KEPT):
        assert kept[f"a{number}"] == f"A{number}" and kept[f"a{number}"] == f"A{number}"
        assert len(kept) <= radical_edge.HEADS_KEPT
    assert kept["x" * 9999] == "X" * 9999 and "x" * 9999 not in kept


def test_heads_of_answers_are_kept_only_when_they_are_short():
    known = radical_edge._known_replies
    for value in ("y", "z" * 99_999):
        text = radical_edge.encode_wire_answer(200, {"x": value})
        assert json.loads(text) == [200, {"x": value}]
        assert ((200, (("x", value),)) in known) is (value == "y")
    with pytest.raises(TypeError):
        radical_edge.encode_wire_answer(200, {"x": [1]})


def test_what_becomes_of_a_request_is_nothing_to_another_with_the_same_head(edge, raw, tokens):
    head = (f"POST /e1/echo/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
            f"Authorization: Bearer {tokens[1]['client']}\r\n\r\n").encode()
    bad, good = raw(), raw()
    bad.send(head + b"nonsense\r\n")
    status, fields, _ = bad.reply()
    assert (status, fields["connection"]) == (400, "close") and bad.is_closed()
    ids = set()
    for _ in range(2):
        good.send(head + b"1\r\na\r\n0\r\n\r\n")
        status, fields, body = good.reply()
        assert (status, body) == (200, b"a") and "connection" not in fields
        ids.add(fields["x-request-id"])
    assert len(ids) == 2
    tokens[0].revoke("client-1")

    def is_refused():
        good.send(head + b"1\r\na\r\n0\r\n\r\n")
        return good.reply()[0] == 401

    wait_until(is_refused)


def test_pipelined_requests_are_answered_in_order(edge, raw):
    client = raw()
    client.send_request("GET", "/e1/echo/wait/0.2")
    client.send_request("GET", "/health")
    client.send_request("POST", "/e1/echo/echo", b"third")
    assert client.reply()[2] == b"{}"
    assert json.loads(client.reply()[2])["status"] == "healthy"
    assert client.reply()[2] == b"third"


@pytest.mark.parametrize("framing", ["Content-Length: 70000", "Transfer-Encoding: chunked"])
def test_a_route_that_asks_no_token_takes_no_large_body(bridge, raw, framing):
    client = raw()
    client.send(f"POST /auth HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode())
    client.send(b"11170\r\n" + b" " * 70_000)    # as a chunk: 70,000 in hexadecimal
    assert_error(client.reply(), 413, str(radical_edge.MAX_OWN_BODY))
    assert client.is_closed()


def test_a_body_that_only_drips_is_given_up(edge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "BODY_IDLE_S", 0.5)
    client = raw()
    client.send_request("POST", "/e1/echo/echo", headers=[("Content-Length", "9999")])
    client.sock.settimeout(0.05)
    for _ in range(200):
        client.send(b"x")
        with contextlib.suppress(socket.timeout):
            assert_error(client.reply(), 408)
            return
    pytest.fail("the drip was taken for a body")


def test_an_edge_does_not_wait_for_a_bridge_that_drips(monkeypatch):
    monkeypatch.setattr(radical_edge, "HANDSHAKE_S", 0.5)
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        def drip():
            sock, _ = server.accept()
            with sock, contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    sock.sendall(b"H")

        thread = threading.Thread(target=drip)
        thread.start()
        url = radical_edge.parse_bridge_url(f"http://127.0.0.1:{server.getsockname()[1]}")
        try:
            with pytest.raises((socket.timeout, TimeoutError)):
                radical_edge.open_websocket(url, None, None)
        finally:
            ended.set()
            thread.join()


def test_nothing_is_answered_after_the_last_answer(bridge, raw):
    client = raw()
    client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.reply()[1]["connection"] == "close"
    assert client._buffer == b"" and client.is_closed()


def test_an_answer_that_is_too_large_or_broken_fails_only_its_own_request(edge, raw, wire,
                                                                          monkeypatch):
    class Odd(Plugin):
        @get("large")
        async def large(self, request):
            return Response(b"x" * 3000)

        @get("longer")
        async def longer(self, request):
            return Response("\0" * 2500)         # as base64 longer than the limit, too

        @get("fields")
        async def fields(self, request):
            return Response(b"", headers={"x-odd": object()})

    edge.host.add(Odd, "odd")
    client = raw()
    wait_until(lambda: client.request("GET", "/e1/odd/version")[0] == 200)
    monkeypatch.setattr(radical_edge, "MAX_OLD_MESSAGE", 2900)
    large = 413 if wire == 1 else 200             # in pieces, an answer of any size will pass
    for path, status in (("large", large), ("longer", large), ("fields", 500), ("version", 200)):
        assert client.request("GET", f"/e1/odd/{path}")[0] == status


def test_a_client_that_does_not_read_its_answer_is_closed(bridge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "KEEP_ALIVE_S", 0.3)
    client = raw()
    for _ in range(20_000):                       # more answers than the buffers of the system
        try:
            client.sock.settimeout(0.2)
            client.send_request("GET", "/")       # a large one
        except (socket.timeout, ConnectionError):
            break
    wait_until(lambda: not bridge.connections)


def test_a_large_body_is_refused_before_it_is_read(edge, raw):
    client = raw()
    client.send_request("POST", "/e1/echo/echo", b"x", [("X", "y")])
    client.reply()
    client.send(b"POST /e1/echo/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
                + client.token.encode() + b"\r\nContent-Length: 999999999999\r\n\r\n" + b"x" * 1000)
    assert_error(client.reply(), 413)
    assert client.is_closed()


def test_too_many_wrong_tokens_are_429_and_a_right_one_still_passes(bridge, raw, tokens):
    for _ in range(radical_edge.LOGIN_FAILURES):
        reply = raw("wrong").request("GET", "/edges")
        assert_error(reply, 401)
        assert reply[1]["www-authenticate"].startswith("Bearer")
    reply = raw("wrong").request("GET", "/edges")
    assert_error(reply, 429, "wait")
    assert int(reply[1]["retry-after"]) > 0
    assert raw().request("GET", "/edges")[0] == 200


def test_no_token_is_401(bridge, raw):
    assert_error(raw(None).request("GET", "/edges"), 401, "Bearer")
    assert_error(raw(None).request("GET", "/e1/echo/hello"), 401)


class FakeEdge:
    """An edge of version 1 that says what the test wants."""

    def __init__(self, bridge, token, name, **register):
        url = radical_edge.parse_bridge_url(bridge.url)
        self.sock, rest = radical_edge.open_websocket(url, token, None)
        self.sock.settimeout(10)
        self._parser = FrameParser(masked=False)
        self._parser.feed(rest)
        self.say(type="register", edge_name=name, plugins={"p": {}}, **register)

    def say(self, **message):
        self.send(encode_frame(Opcode.TEXT, json.dumps(message).encode(), mask=b"abcd"))

    def send(self, data):
        self.sock.sendall(data)

    def hear(self, kind):
        """Return the next message of this type, or the close frame as {"close": code}."""
        while True:
            message = self._parser.next_message()
            if message is None:
                data = self.sock.recv(65536)
                assert data, "closed"
                self._parser.feed(data)
            elif message[0] is Opcode.CLOSE:
                return {"close": parse_close(message[1])[0]}
            elif message[0] is Opcode.TEXT and json.loads(message[1])["type"] == kind:
                return json.loads(message[1])

    def next_message(self):
        """Return (opcode, payload) of the next message."""
        while True:
            message = self._parser.next_message()
            if message is not None:
                return message
            self._parser.feed(self.sock.recv(65536))

    def close(self):
        self.sock.close()


@pytest.fixture
def fake_edge(bridge, tokens):
    """Make fake edges: fake_edge("name", field=value)."""
    made = []

    def connect(name, token=tokens[1]["edge"], **register):
        made.append(FakeEdge(bridge, token, name, **register))
        return made[-1]

    yield connect
    for item in made:
        item.close()


@pytest.mark.parametrize("answer", [
    {"status": "200"}, {"status": 700}, {"status": 200, "headers": {"a": "b\r\nc: d"}},
    {"status": 200, "body": "@", "is_binary": True}])
def test_an_edge_that_answers_nonsense_is_502_and_harms_no_other_request(fake_edge, raw, answer):
    fake, client = fake_edge("f1"), raw()
    fake.hear("topology")
    client.send_request("GET", "/f1/p/x")
    fake.say(type="response", req_id=fake.hear("request")["req_id"], **answer)
    assert_error(client.reply(), 502, "f1")
    client.send_request("GET", "/f1/p/x")
    fake.say(type="response", req_id=fake.hear("request")["req_id"], status=204)
    assert client.reply()[0] == 204


def test_an_edge_that_goes_while_it_works_is_503(fake_edge, raw):
    fake, client = fake_edge("f1"), raw()
    fake.hear("topology")
    client.send_request("POST", "/f1/p/x")        # a GET would wait for the edge to come back
    fake.hear("request")
    fake.close()
    reply = client.reply()
    assert_error(reply, 503, "f1", "look before")
    assert reply[1]["retry-after"] == "1"


def test_an_edge_that_takes_too_long_is_504(edge, raw):
    client = raw()
    reply = client.request("GET", "/e1/echo/wait/60", headers=[("X-Request-Timeout", "0.3")])
    assert_error(reply, 504, "e1")
    assert client.request("GET", "/e1/echo/hello")[0] == 200


def test_fields_of_an_edge_that_mean_something_to_a_browser_are_dropped(fake_edge, raw):
    fake, client = fake_edge("f1"), raw()
    fake.hear("topology")
    client.send_request("GET", "/f1/p/x")
    fake.say(type="response", req_id=fake.hear("request")["req_id"], status=200, body="<b>",
             headers={"Set-Cookie": "a=b", "Content-Type": "text/html", "X-Mine": "1",
                      "Access-Control-Allow-Origin": "*", "Content-Length": "999"})
    _, fields, _ = client.reply()
    assert "set-cookie" not in fields and "access-control-allow-origin" not in fields
    assert fields["x-mine"] == "1" and fields["content-length"] == "3"
    assert fields["content-security-policy"].startswith("sandbox")


def test_the_edge_gets_no_credentials_and_believes_only_the_bridge(fake_edge, raw, tokens):
    fake, client = fake_edge("f1"), raw(tokens[1]["client"])
    fake.hear("topology")
    client.send_request("GET", "/f1/p/x?y", headers=[
        ("Cookie", "a=b"), ("X-Forwarded-User", "root"), ("Connection", "x-hop"), ("X-Hop", "1"),
        ("X-Request-ID", "mine-1"), ("TE", "trailers"), ("X-Other", "2")])
    request = fake.hear("request")
    assert request["path"] == "/p/x?y"
    assert request["headers"] == {"x-request-id": "mine-1", "x-forwarded-user": "client-1",
                                  "x-forwarded-scope": "client", "x-other": "2"}
    fake.say(type="response", req_id=request["req_id"], status=200)
    assert client.reply()[1]["x-request-id"] == "mine-1"


def test_a_request_id_is_minted_when_the_client_sends_none_or_an_odd_one(bridge, raw):
    client = raw()
    ids = {client.request("GET", "/health", headers=headers)[1]["x-request-id"]
           for headers in ((), [("X-Request-ID", "a b;c")], [("X-Request-ID", "x" * 200)])}
    assert len(ids) == 3 and all(radical_edge.REQUEST_ID_PATTERN.fullmatch(item) for item in ids)


def test_head_is_get_without_the_body(edge, raw):
    client = raw()
    for path in ("/health", "/e1/echo/hello"):
        status, fields, body = client.request("HEAD", path)
        assert (status, body) == (200, b"") and int(fields["content-length"]) > 0
    assert client.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("version, status", [("1.0", 426), ("1.1", 101)])
def test_http_1_0_is_not_upgraded(bridge, raw, version, status):
    client = raw()
    client.send((f"GET /register HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {client.token}"
                 "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n").encode())
    assert client.reply(head_only=True)[0] == status


def test_expect_100_continue_is_answered_or_refused_early(edge, raw):
    client = raw()
    head = (f"POST /e1/echo/echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.token}\r\n"
            "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n").encode()
    client.send(head)
    assert client.reply()[0] == 100
    client.send(b"hello")
    assert client.reply()[2] == b"hello"
    client.send(head.replace(client.token.encode(), b"wrong"))
    assert_error(client.reply(), 401)
    assert client.is_closed()


def test_bodies_go_through_byte_for_byte(edge, raw):
    client = raw()
    for body in (b"\0\xff" * 1000, os.urandom(3_000_000), "grüße".encode()):
        status, _, found = client.request("POST", "/e1/echo/echo", body)
        assert status == 200 and found == body
    client.send("POST /e1/echo/echo HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {client.token}\r\nTransfer-Encoding: chunked\r\n\r\n"
                "3\r\nabc\r\n2\r\n\xff\xfe\r\n0\r\n\r\n".encode(
                    "latin-1"))
    assert client.reply()[2] == b"abc\xff\xfe"


def test_http_1_0_is_answered_and_closed_unless_kept_alive(bridge, raw):
    client = raw()
    client.send(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert client.reply()[1]["connection"] == "keep-alive"
    client.send(b"GET /health HTTP/1.0\r\n\r\n")
    assert client.reply()[1]["connection"] == "close"
    assert client.is_closed()


def test_a_request_that_is_never_finished_is_408(tokens, monkeypatch, raw, bridge):
    monkeypatch.setattr(radical_edge, "HEAD_S", 0.3)
    client = raw()
    client.send(b"GET /health HTTP/1.1\r\nHos")
    assert_error(client.reply(), 408)
    assert client.is_closed()


# ---------------------------------------------------------------------------
# Streams: wire version 2, uploads, downloads
# ---------------------------------------------------------------------------

def wire_frame(payload):
    frame = radical_edge.parse_wire(payload)
    return frame.kind, frame.end, frame.stream, frame.head, bytes(frame.body)


def test_a_wire_frame_comes_back_as_it_was_encoded():
    Kind = radical_edge.Kind
    head = radical_edge.encode_wire(Kind.REQUEST, 7, ["GET", "/a", {"x": "é"}], end=True)
    assert wire_frame(head + b"\x00body") == (Kind.REQUEST, True, 7, ["GET", "/a", {"x": "é"}],
                                              b"\x00body")
    assert wire_frame(radical_edge.encode_wire(Kind.DATA, 1 << 31)) == (
        Kind.DATA, False, 1 << 31, [], b"")
    credit = radical_edge.parse_wire(radical_edge.encode_wire_number(Kind.CREDIT, 3, 1 << 40))
    assert (credit.kind, credit.stream, credit.number) == (Kind.CREDIT, 3, 1 << 40)
    assert radical_edge.parse_wire(bytes([99]) + bytes(7)) is None       # of a later version
    with pytest.raises(ValueError, match="fields of"):
        radical_edge.encode_wire(Kind.RESPONSE, 1, [200, {"x": "y" * 70_000}])


@pytest.mark.parametrize("line, request_id", [
    (b"r-1\n", "r-1"), (b"", "-"), (b"\n", "-"), (b"a b\n", "-"), (b"x\ny\n", "-"),
    (b"\xff\n", "-")])
def test_a_wire_request_has_its_id_on_a_line_of_its_own(line, request_id):
    text = line + b'["PUT","/a/b",{"X-Y":1}]'
    head = radical_edge.encode_wire(radical_edge.Kind.REQUEST, 7, text, end=True)
    asked = radical_edge.parse_wire_request(radical_edge.parse_wire(head + b"body"))
    assert asked[:3] == (request_id, "PUT", "/a/b") and asked.body == b"body"
    assert asked.headers.pop("x-request-id", "-") == request_id and asked.headers == {"x-y": "1"}


@pytest.mark.parametrize("text", [b"", b"1\n", b'1\n["GET"]', b'1\n["GET","/a",[]]',
                                  b'1\n["G",\n"/a",{}]', b'["GET",7,{}]', b"1\n{}"])
def test_a_wire_request_without_method_target_or_fields_is_refused(text):
    frame = radical_edge.parse_wire(radical_edge.encode_wire(radical_edge.Kind.REQUEST, 7, text))
    with pytest.raises(ProtocolError):
        radical_edge.parse_wire_request(frame)


def test_what_is_no_json_is_refused_as_such_however_it_is_made():
    circle, deep = {}, []
    circle["x"] = [circle]
    for _ in range(100_000):
        deep = [deep]
    for value in (circle, deep, float("nan"), {1: float("inf")}):
        with pytest.raises(ValueError):
            radical_edge.encode_json(value)
    for value in (object(), {(1, 2): 3}, {1, 2}):
        with pytest.raises(TypeError):
            radical_edge.encode_json([value])
    value = {"a": [1, 2.5, None, True, "é\n", {}], 1: (2,)}
    assert radical_edge.encode_json(value) == '{"a":[1,2.5,null,true,"é\\n",{}],"1":[2]}'


def test_an_encoder_of_json_is_had_without_the_one_in_c(monkeypatch):
    monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    plain = radical_edge._make_json_encoder()
    for value in ({"a": [1, 2.5, None, "é\n"]}, "x", 7, [], {}):
        assert plain(value) == radical_edge.encode_json(value)


def test_equal_wire_requests_share_nothing_that_a_handler_could_change():
    head = radical_edge.encode_wire_request(7, "r-1", b'["GET","/a",{"x":"y"}]', end=True)
    first, second = (radical_edge.parse_wire_request(radical_edge.parse_wire(head)) for _ in "12")
    first.headers.clear()
    assert second.headers == {"x": "y", "x-request-id": "r-1"}
    assert radical_edge.parse_wire_request(radical_edge.parse_wire(head)) == second


@pytest.mark.parametrize("payload", [
    b"", b"\x01", b"\x01\0\0\0\0\0\0", b"\x01\0\0\x02\0\0\0\0[", b"\x01\0\0\x02\0\0\0\0{}",
    b"\x01\0\0\x01\0\0\0\0\xff", b"\x02\0\xff\xff\0\0\0\0[]",
    b"\x01\0\x03\xe8\0\0\0\0" + b"[" * 1000])
def test_a_broken_wire_frame_is_refused(payload):
    with pytest.raises(ProtocolError):
        radical_edge.parse_wire(payload).head


def test_a_number_must_have_eight_bytes():
    frame = radical_edge.parse_wire(radical_edge.encode_wire(radical_edge.Kind.ACK, 0) + b"123")
    with pytest.raises(ProtocolError):
        frame.number


def test_a_send_window_gives_what_it_has_and_wakes_who_waits():
    window, woken = radical_edge.SendWindow(), []
    assert window.take(10 ** 9) == radical_edge.INITIAL_WINDOW and window.take(1) == 0
    window.when_open(lambda: woken.append("later"))
    assert not woken
    window.add(5)
    assert woken == ["later"] and window.take(9) == 5
    window.close()
    window.when_open(lambda: woken.append("at once"))
    assert woken == ["later", "at once"]


def test_a_receive_window_grows_for_a_fast_reader_and_refuses_what_it_did_not_allow():
    window, first = radical_edge.ReceiveWindow(), radical_edge.INITIAL_WINDOW
    window.on_received(first)
    assert window.on_consumed(first, 1) == radical_edge.MAX_WINDOW
    assert window.on_consumed(0, 1) == 0                                 # all of it was given
    window.on_received(radical_edge.MAX_WINDOW)
    with pytest.raises(ProtocolError):
        window.on_received(1)
    crowded = radical_edge.ReceiveWindow()
    crowded.on_received(first)
    assert crowded.on_consumed(first, 10_000) == first                   # not more than the first


class Streaming(Plugin):
    """Takes and gives bodies of any size, and tells what became of them."""

    def __init__(self, app, instance_name=None):
        super().__init__(app, instance_name)
        self.made = 0                             # bytes that downloads produced
        self.fates = []                           # how handlers ended
        self.file = None                          # what the route "file" serves
        self.may_go = threading.Event()           # ends the route "plain_live"

    @put("hash")
    async def hash(self, request):
        digest = hashlib.sha256()
        try:
            async for piece in request.stream():
                digest.update(piece)
        except (asyncio.CancelledError, EdgeError) as error:
            self.fates.append(type(error).__name__)
            raise
        return {"sha256": digest.hexdigest(), "length": request.headers.get("content-length")}

    @put("plain")
    def plain(self, request):
        digest = hashlib.sha256()
        for piece in request.iter_body():
            digest.update(piece)
        return {"sha256": digest.hexdigest()}

    @put("whole")
    async def whole(self, request):
        return {"size": len(await request.body())}

    @put("refuse")
    async def refuse(self, request):
        raise radical_edge.Conflict("not now")

    @get("down/{size}")
    async def down(self, request):
        size = int(request.path_params["size"])
        known = {"content-length": str(size)} if request.query_bool("known") else None
        return StreamingResponse(self._make(size), headers=known)

    async def _make(self, size):
        try:
            for piece in pieces_of(size):
                self.made += len(piece)
                yield piece
        finally:
            self.fates.append("closed")

    @get("plain/{size}")
    def plain_down(self, request):
        def make():
            try:
                yield from pieces_of(int(request.path_params["size"]))
            finally:
                self.fates.append("closed")
        return StreamingResponse(make())

    @get("lines/{kind}/{count}")
    async def lines(self, request):
        """As many short pieces: from a plain iterable, or an async one that waits now and then."""
        count = int(request.path_params["count"])

        async def make():
            for number in range(count):
                if number % 1000 == 0:
                    await asyncio.sleep(0)
                yield b"%d\n" % number

        plain = (b"%d\n" % number for number in range(count))
        return StreamingResponse(plain if request.path_params["kind"] == "plain" else make())

    @get("live")
    async def live(self, request):
        """A short piece, and then nothing for long."""
        async def make():
            yield b"first"
            await asyncio.sleep(3600)
        return StreamingResponse(make())

    @get("plain_live")
    def plain_live(self, request):
        def make():
            yield b"first"
            self.may_go.wait(60)
        return StreamingResponse(make())

    @get("large/{size}")
    async def large(self, request):
        return Response(b"".join(pieces_of(int(request.path_params["size"]))))

    @get("break/{size}")
    def break_off(self, request):
        def make():
            yield from pieces_of(int(request.path_params["size"]))
            raise KeyError("a secret detail")
        return StreamingResponse(make())

    @get("lie/{size}")
    def lie(self, request):
        return StreamingResponse(pieces_of(1000), headers={
            "content-length": request.path_params["size"]})

    @get("file")
    def serve_file(self, request):
        return radical_edge.FileResponse(self.file, request)

    @get("forever")
    async def forever(self, request):
        try:
            await asyncio.sleep(3600)
        finally:
            self.fates.append("ended")


BLOCK = hashlib.sha512(b"").digest() * 1024       # 64 KiB that do not compress to a pattern of 4


def pieces_of(size):
    """Yield `size` bytes."""
    while size:
        yield BLOCK[:size]
        size -= min(size, len(BLOCK))


def digest_of(size):
    digest = hashlib.sha256()
    for piece in pieces_of(size):
        digest.update(piece)
    return digest.hexdigest()


@pytest.fixture
def streaming(edge, raw):
    """The edge's plugin "s", of the class Streaming."""
    made = edge.host.add(Streaming, "s")
    client = raw()
    wait_until(lambda: client.request("GET", "/e1/s/version")[0] == 200)
    return made


def read_all(client, reply):
    """Return (size, SHA-256) of a reply's body, which is chunked or ends with the connection."""
    digest, size, rest = hashlib.sha256(), 0, client._buffer
    client._buffer = b""
    if reply[1].get("transfer-encoding") == "chunked":
        while True:
            while b"\r\n" not in rest:
                rest += receive(client)
            line, _, rest = rest.partition(b"\r\n")
            length = int(line, 16)
            while len(rest) < length + 2:
                rest += receive(client)
            digest.update(rest[:length])
            size, rest = size + length, rest[length + 2:]
            if not length:
                return size, digest.hexdigest()
    while True:
        digest.update(rest)
        size += len(rest)
        rest = client.sock.recv(1 << 20)
        if not rest:
            return size, digest.hexdigest()


def receive(client):
    data = client.sock.recv(1 << 20)
    assert data, "closed in the body"
    return data


def only_wire2(test):
    return pytest.mark.parametrize("wire", [2], indirect=True, ids=["wire2"])(test)


SIZES = [65_536, 65_537, 3_000_001]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("route", ["hash", "plain"])
def test_an_upload_of_known_length_arrives_as_it_was_sent(streaming, raw, route, size):
    client = raw()
    body = b"".join(pieces_of(size))
    for _ in range(2):                            # twice: the connection stays in step
        status, _, answer = client.request("PUT", f"/e1/s/{route}", body)
        assert status == 200 and json.loads(answer)["sha256"] == digest_of(size)


def send_chunked(client, path, pieces, method="PUT"):
    client.send_request(method, path, headers=[("Transfer-Encoding", "chunked")])
    for piece in pieces:
        client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    client.send(b"0\r\n\r\n")


def test_a_chunked_upload_arrives_whatever_its_chunks(streaming, raw):
    client = raw()
    body = b"".join(pieces_of(700_000))
    sizes = random.Random(3)
    for limit in (5000, 200_000):
        pieces, at = [], 0
        while at < len(body):
            size = sizes.randint(1, limit)
            pieces.append(body[at:at + size])
            at += size
        send_chunked(client, "/e1/s/hash", pieces)
        assert json.loads(client.reply()[2])["sha256"] == digest_of(len(body))


def test_a_body_that_is_read_whole_has_a_limit(streaming, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_BODY", 200_000)
    client = raw()
    status, _, answer = client.request("PUT", "/e1/s/whole", bytes(200_000))
    assert status == 200 and json.loads(answer)["size"] == 200_000
    client.send_request("PUT", "/e1/s/whole", headers=[("Transfer-Encoding", "chunked")])
    with contextlib.suppress(ConnectionError):
        for _ in range(4):
            client.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    assert_error(client.reply(), 413, "200000")
    assert client.is_closed()


@only_wire2
def test_a_handler_may_refuse_an_upload_before_it_has_come(streaming, raw):
    client = raw()
    client.send_request("PUT", "/e1/s/refuse", headers=[("Content-Length", 10 ** 12)])
    assert_error(client.reply(), 409, "not now")
    assert client.is_closed()
    for path, status in (("/nobody/s/hash", 404), ("/e1/s/nothing", 404)):
        client = raw()
        client.send_request("PUT", path, headers=[("Content-Length", 10 ** 12),
                                                  ("Expect", "100-continue")])
        reply = client.reply()
        assert_error(client.reply() if reply[0] == 100 else reply, status)


@pytest.mark.parametrize("path", ["down/{}", "down/{}?known=1", "plain/{}", "large/{}"])
@pytest.mark.parametrize("size", [0, 1, *SIZES])
def test_a_download_arrives_as_it_was_made(streaming, raw, path, size):
    client = raw()
    for _ in range(2):
        client.send_request("GET", "/e1/s/" + path.format(size))
        reply = client.reply()
        assert reply[0] == 200
        if "content-length" in reply[1]:
            assert (len(reply[2]), hashlib.sha256(reply[2]).hexdigest()) == (size, digest_of(size))
        else:
            assert read_all(client, reply) == (size, digest_of(size))


@only_wire2
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_very_many_short_pieces_are_sent_together(streaming, raw, kind):
    count = 300_000
    client = raw()
    client.send_request("GET", f"/e1/s/lines/{kind}/{count}")
    lines = b"".join(b"%d\n" % number for number in range(count))
    assert read_all(client, client.reply()) == (len(lines), hashlib.sha256(lines).hexdigest())


@only_wire2
@pytest.mark.parametrize("path", ["live", "plain_live"])
def test_a_short_piece_does_not_wait_for_the_next(streaming, raw, path):
    client = raw()
    client.send_request("GET", f"/e1/s/{path}")
    client.reply()
    while b"5\r\nfirst\r\n" not in client._buffer:
        client._buffer += receive(client)
    client.close()
    streaming.may_go.set()


def test_an_http_10_client_gets_a_download_that_ends_with_the_connection(streaming, raw, wire):
    client = raw()
    client.send(f"GET /e1/s/down/300000 HTTP/1.0\r\nAuthorization: Bearer {client.token}\r\n\r\n"
                .encode())
    reply = client.reply(head_only=True)
    assert "transfer-encoding" not in reply[1] and reply[1]["connection"] == "close"
    assert read_all(client, reply) == (300_000, digest_of(300_000))


def test_head_of_a_download_has_no_body_and_the_connection_goes_on(streaming, raw, wire):
    client = raw()
    status, fields, _ = client.request("HEAD", "/e1/s/down/3000000?known=1")
    assert status == 200
    if wire == 2:
        assert fields["content-length"] == "3000000"
    assert client.request("GET", "/e1/s/version")[0] == 200


@pytest.mark.parametrize("wanted, status, begin, end", [
    (None, 200, 0, 200_000), ("bytes=0-0", 206, 0, 1), ("bytes=100-", 206, 100, 200_000),
    ("bytes=-7", 206, 199_993, 200_000), ("bytes=5-99999999", 206, 5, 200_000),
    ("bytes=-999999999", 206, 0, 200_000), ("bytes=1-2,5-6", 200, 0, 200_000),
    ("lines=1-2", 200, 0, 200_000), ("bytes=-", 200, 0, 200_000)])
def test_a_file_is_served_in_ranges(streaming, raw, tmp_path, wanted, status, begin, end):
    content = b"".join(pieces_of(200_000))
    streaming.file = tmp_path / "file"
    streaming.file.write_bytes(content)
    client = raw()
    client.send_request("GET", "/e1/s/file", headers=[("Range", wanted)] if wanted else ())
    found, fields, body = client.reply()
    assert found == status and body == content[begin:end]
    assert fields["accept-ranges"] == "bytes"
    if status == 206:
        assert fields["content-range"] == f"bytes {begin}-{end - 1}/200000"


def test_a_file_that_changed_is_sent_whole_and_one_that_did_not_is_not_sent(streaming, raw,
                                                                           tmp_path):
    streaming.file = tmp_path / "file"
    streaming.file.write_bytes(b"0123456789")
    client = raw()
    etag = client.request("GET", "/e1/s/file")[1]["etag"]
    ranged = [("Range", "bytes=2-3"), ("If-Range", etag)]
    assert client.request("GET", "/e1/s/file", headers=ranged)[2] == b"23"
    assert client.request("GET", "/e1/s/file", headers=[("If-None-Match", etag)])[0] == 304
    assert_error(client.request("GET", "/e1/s/file", headers=[("Range", "bytes=10-")]), 416, "10")
    streaming.file.write_bytes(b"another content")
    reply = client.request("GET", "/e1/s/file", headers=ranged)
    assert reply[0] == 200 and reply[2] == b"another content"
    assert client.request("GET", "/e1/s/file", headers=[("If-None-Match", etag)])[0] == 200


@pytest.mark.parametrize("make, status", [
    (lambda path: None, 404), (lambda path: path.mkdir(), 422),
    (lambda path: os.mkfifo(path), 422)])
def test_what_is_no_file_is_said_to_be_none(streaming, raw, tmp_path, make, status):
    streaming.file = tmp_path / "thing"
    make(streaming.file)
    assert_error(raw().request("GET", "/e1/s/file"), status, "thing")


@only_wire2
def test_a_client_that_does_not_read_stops_the_handler_and_nobody_else(streaming, raw):
    stuck, other = raw(), raw()
    stuck.send_request("GET", "/e1/s/down/1000000000")
    made = []

    def is_stuck():                               # nothing more is made for a while
        made.append(streaming.made)
        return len(made) > 50 and made[-1] == made[-50] > 0

    wait_until(is_stuck)
    assert streaming.made < 16 * 1024 * 1024      # mostly what the system's own buffers hold
    assert other.request("GET", "/e1/s/version")[0] == 200
    stuck.close()
    wait_until(lambda: "closed" in streaming.fates)
    wait_until(lambda: other.request("GET", "/e1/s/version")[0] == 200)


@only_wire2
@pytest.mark.parametrize("path", ["down", "plain"])
def test_a_download_that_nobody_reads_any_more_is_closed(streaming, raw, path):
    client = raw()
    client.send_request("GET", f"/e1/s/{path}/10000000000")
    client.reply()
    client.close()
    wait_until(lambda: streaming.fates == ["closed"])


@only_wire2
def test_a_client_that_goes_away_cancels_its_handler(streaming, raw, bridge):
    client = raw()
    client.send_request("GET", "/e1/s/forever")
    link = bridge._registry.links["e1"]
    wait_until(lambda: link.pending)
    client.close()
    wait_until(lambda: streaming.fates == ["ended"])
    assert not link.pending


@only_wire2
def test_an_upload_that_breaks_off_is_not_taken_for_whole(streaming, raw):
    client = raw()
    client.send_request("PUT", "/e1/s/hash", headers=[("Content-Length", 10 ** 9)])
    client.send(bytes(300_000))
    client.close()
    wait_until(lambda: streaming.fates)
    assert streaming.fates[0] in ("CancelledError", "Unavailable")


@only_wire2
def test_an_answer_that_breaks_off_is_seen_to_be_not_whole(streaming, raw, caplog):
    client = raw()
    client.send_request("GET", "/e1/s/break/200000")
    reply = client.reply()
    assert reply[0] == 200
    with pytest.raises(AssertionError, match="closed in the body"):
        read_all(client, reply)
    assert raw().request("GET", "/e1/s/version")[0] == 200
    for size in (500, 5000):                      # announced: too few, too many
        client = raw()
        client.send_request("GET", f"/e1/s/lie/{size}")
        with pytest.raises((AssertionError, ConnectionError)):
            client.reply()
            assert not client.is_closed(), "closed in the body"
    assert "secret" not in str(reply)


@only_wire2
@pytest.mark.parametrize("name", ["begin", "plain"])
@pytest.mark.parametrize("place", ["e1", "bridge"])
def test_a_body_that_is_read_after_the_answer_has_begun_fails_at_once(
        streaming, edge, bridge, raw, caplog, place, name):
    class Late(Plugin):
        @put("begin")
        async def begin(self, request):
            async def answer():
                yield b"begun"
                async for piece in request.stream():
                    yield b"."
            return StreamingResponse(answer())

        @put("plain")
        def plain(self, request):
            def answer():
                yield b"begun"
                yield from (b"." for piece in request.iter_body())
            return StreamingResponse(answer())

    (edge.host if place == "e1" else bridge._host).add(Late, "late")
    wait_until(lambda: raw().request("GET", f"/{place}/late/version")[0] == 200)
    client = raw()
    client.send_request("PUT", f"/{place}/late/{name}", headers=[("Content-Length", 10 ** 9)])
    client.send(bytes(300_000))
    reply = client.reply()
    assert reply[0] == 200
    with pytest.raises((AssertionError, ConnectionError)):
        read_all(client, reply)
    wait_until(lambda: "the answer has begun" in caplog.text)
    assert raw().request("GET", f"/{place}/late/version")[0] == 200


@only_wire2
def test_a_lost_link_cuts_its_downloads_and_ends_their_handlers(streaming, raw, bridge):
    client = raw()
    client.send_request("GET", "/e1/s/down/1000000000")
    reply = client.reply()
    link = bridge._registry.links["e1"]
    bridge.loop.call_soon_threadsafe(link.channel.close, "cut by the test")
    with pytest.raises(AssertionError, match="closed in the body"):
        read_all(client, reply)
    wait_until(lambda: "closed" in streaming.fates)


@only_wire2
def test_the_end_of_an_upload_is_told_also_while_the_link_is_full(streaming, bridge, raw):
    client = raw()
    client.send_request("PUT", "/e1/s/hash", headers=[("Transfer-Encoding", "chunked")])
    client.send(b"5\r\nbegin\r\n")
    link = bridge._registry.links["e1"]
    wait_until(lambda: [True for exchange in link.requests.pending.values()
                        if exchange.connection._clock._received and not exchange.upload._backlog])
    link.channel.room = 0                         # as when it has to send much else
    client.send(b"0\r\n\r\n")
    status, _, answer = client.reply()
    assert (status, json.loads(answer)["sha256"]) == (200, hashlib.sha256(b"begin").hexdigest())


@only_wire2
def test_many_streams_share_a_link(streaming, raw):
    body = b"".join(pieces_of(2_000_000))

    def go_up(results):
        results.append(json.loads(raw().request("PUT", "/e1/s/hash", body)[2])["sha256"])

    def go_down(results):
        client = raw()
        client.send_request("GET", "/e1/s/down/2000000")
        results.append(read_all(client, client.reply())[1])

    results = []
    threads = [threading.Thread(target=target, args=(results,))
               for target in (go_up, go_down) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [digest_of(2_000_000)] * 16


def test_the_bridges_own_plugins_stream_too(bridge, raw):
    made = bridge._host.add(Streaming, "s")
    client = raw()
    body = b"".join(pieces_of(1_000_000))
    assert json.loads(client.request("PUT", "/bridge/s/hash", body)[2])["sha256"] == \
        digest_of(len(body))
    client.send_request("GET", "/bridge/s/down/3000000")
    assert read_all(client, client.reply()) == (3_000_000, digest_of(3_000_000))
    client.send_request("GET", "/bridge/s/down/1000000000")
    client.reply()
    client.close()
    wait_until(lambda: "closed" in made.fates)


def test_an_upload_to_the_bridges_own_plugin_that_breaks_off_ends_its_handler(bridge, raw):
    bridge._host.add(Streaming, "s")
    client = raw()
    client.send_request("PUT", "/bridge/s/hash", headers=[("Transfer-Encoding", "chunked")])
    client.send(radical_edge.encode_chunk(b"some") + b"no chunk\r\n")
    assert_error(client.reply(), 400, "chunk")
    assert client.is_closed()
    hosted = bridge._host._hosted["s"]
    wait_until(lambda: not hosted.tasks)


def test_what_a_plugin_of_the_bridge_tells_is_checked_and_copied_at_once(bridge, raw, caplog):
    listener, data = Listener(raw()), {"n": 1}
    listener.read()
    bridge._on_own_notification("own", "t", {"n": float("nan")})
    bridge._on_own_notification("own", "t", {"n": {1}})
    bridge._on_own_notification("own", "a\nb", {"n": 0})
    bridge._on_own_notification("own", "t", data)
    data["n"] = 2
    assert listener.notification()["data"] == {"n": 1}
    assert caplog.text.count("was dropped") == 3


def test_a_mistake_in_a_look_at_what_is_late_does_not_end_the_looking(bridge, raw, monkeypatch,
                                                                      caplog):
    monkeypatch.setattr(radical_edge, "HEAD_S", 0.3)
    real, failed = radical_edge.EdgeRegistry.sweep, threading.Event()

    def sweep(registry, now):
        if not failed.is_set():
            failed.set()
            raise KeyError("a mistake of ours")
        real(registry, now)

    monkeypatch.setattr(radical_edge.EdgeRegistry, "sweep", sweep)
    assert failed.wait(10)
    client = raw()
    client.send(b"GET / HTTP/1.1\r\n")
    assert client.reply()[0] == 408 and "a mistake of ours" in caplog.text


class FakeEdge2(FakeEdge):
    """An edge of version 2 that says what the test wants."""

    def __init__(self, bridge, token, name, **register):
        super().__init__(bridge, token, name, wire=[1, 2], instance="i", **register)
        registered = self.hear("registered")
        self.acked, self.known = registered["acked"], registered["known"]

    def say_wire(self, kind, stream, head=None, body=b"", end=False):
        payload = radical_edge.encode_wire(kind, stream, head, end=end) + body
        self.send(encode_frame(Opcode.BINARY, payload, mask=b"abcd"))

    def hear_wire(self, kind):
        """Return the next frame of this kind."""
        while True:
            message = self._parser.next_message()
            if message is None:
                data = self.sock.recv(65536)
                assert data, "the link was closed"
                self._parser.feed(data)
            elif message[0] is Opcode.BINARY:
                frame = radical_edge.parse_wire(message[1])
                if frame.kind is kind:
                    return frame


@pytest.fixture
def fake_edge2(bridge, tokens):
    fake = FakeEdge2(bridge, tokens[1]["edge"], "f2")
    yield fake
    fake.close()


def test_an_edge_that_sends_without_credit_loses_its_link(fake_edge2, raw):
    client = raw()
    client.send_request("GET", "/f2/p/x")
    stream = fake_edge2.hear_wire(radical_edge.Kind.REQUEST).stream
    fake_edge2.say_wire(radical_edge.Kind.RESPONSE, stream, [200, {}])
    with contextlib.suppress(ConnectionError):
        for _ in range(400):                      # the client does not read: no credit
            fake_edge2.say_wire(radical_edge.Kind.DATA, stream, body=bytes(65536))
    with pytest.raises((AssertionError, ConnectionError)):
        fake_edge2.hear_wire(radical_edge.Kind.ACK)


def test_an_edge_that_sends_a_large_answer_whole_loses_its_link(fake_edge2, raw):
    client = raw()
    client.send_request("GET", "/f2/p/x")
    stream = fake_edge2.hear_wire(radical_edge.Kind.REQUEST).stream
    body = bytes(radical_edge.MAX_WHOLE)
    fake_edge2.say_wire(radical_edge.Kind.RESPONSE, stream, [200, {}], body, end=True)
    assert client.reply()[2] == body
    client.send_request("GET", "/f2/p/x")
    stream = fake_edge2.hear_wire(radical_edge.Kind.REQUEST).stream
    body = bytes(2 * radical_edge.INITIAL_WINDOW)
    fake_edge2.say_wire(radical_edge.Kind.RESPONSE, stream, [200, {}], body, end=True)
    with pytest.raises((AssertionError, ConnectionError)):
        fake_edge2.hear_wire(radical_edge.Kind.ACK)


@pytest.mark.parametrize("head", [[], {}, [99, {}], ["200", {}], [200, []], [200, {"a b": "c"}],
                                  [200, {"a": "b\r\nc: d"}], [True, {}]])
def test_an_answer_of_nonsense_on_a_stream_is_502(fake_edge2, raw, head):
    client = raw()
    client.send_request("GET", "/f2/p/x")
    stream = fake_edge2.hear_wire(radical_edge.Kind.REQUEST).stream
    fake_edge2.say_wire(radical_edge.Kind.RESPONSE, stream, head, end=True)
    assert_error(client.reply(), 502, "makes no sense")
    fake_edge2.say_wire(radical_edge.Kind.DATA, stream, body=b"late")    # and harms nobody
    fake_edge2.say_wire(radical_edge.Kind.DATA, 12345, body=b"never asked")
    client.send_request("GET", "/f2/p/y")
    stream = fake_edge2.hear_wire(radical_edge.Kind.REQUEST).stream
    fake_edge2.say_wire(radical_edge.Kind.RESPONSE, stream, [200, {}], b"fine", end=True)
    assert client.reply()[2] == b"fine"


def test_an_edge_is_told_who_asks_as_it_is_now(fake_edge2, bridge, raw, tokens):
    client = raw(tokens[1]["client"])

    def ask(headers=()):
        client.send_request("GET", "/f2/p/x?y", headers=[("X-A", "1"), *headers])
        frame = fake_edge2.hear_wire(radical_edge.Kind.REQUEST)
        fake_edge2.say_wire(radical_edge.Kind.RESPONSE, frame.stream, [200, {}], end=True)
        asked, fields = radical_edge.parse_wire_request(frame), client.reply()[1]
        assert asked[:3] == (fields["x-request-id"], "GET", "/p/x?y")
        return asked.req_id, {name: value for name, value in asked.headers.items()
                              if name != "x-request-id"}

    first, second = ask(), ask()
    assert first[0] != second[0] and first[1] == second[1] == {
        "x-a": "1", "x-forwarded-user": "client-1", "x-forwarded-scope": "client"}
    assert ask([("X-Request-ID", "mine")]) == ("mine", first[1])
    path = radical_edge.home_dir() / "tokens.json"
    path.write_text(path.read_text().replace('"client"', '"admin"').replace("client-1", "boss"))
    wait_until(lambda: tokens[0].refresh() or tokens[0].find(tokens[1]["client"]).name == "boss")
    assert ask()[1] == {"x-a": "1", "x-forwarded-user": "boss", "x-forwarded-scope": "admin"}
    tokens[0].revoke("boss")
    assert_error(client.request("GET", "/f2/p/x?y", headers=[("X-A", "1")]), 401)


# ---------------------------------------------------------------------------
# Who may do what
# ---------------------------------------------------------------------------

SCOPES = ("none", "read", "client", "edge", "admin")
MATRIX = [                                       # route, and the statuses in the order of SCOPES
    ("GET", "/", (200, 200, 200, 200, 200)), ("GET", "/health", (200, 200, 200, 200, 200)),
    ("GET", "/health/live", (200, 200, 200, 200, 200)),
    ("GET", "/health/ready", (200, 200, 200, 200, 200)),
    ("POST", "/logout", (200, 200, 200, 200, 200)), ("GET", "/auth", (200, 200, 200, 200, 200)),
    ("GET", "/plugins/frame", (200, 200, 200, 200, 200)),
    ("POST", "/edge/list", (401, 200, 200, 403, 200)),
    ("GET", "/edges", (401, 200, 200, 403, 200)), ("GET", "/metrics", (401, 200, 200, 403, 200)),
    ("GET", "/openapi.json", (401, 200, 200, 403, 200)),
    ("GET", "/plugins/x.js", (401, 404, 404, 403, 404)),
    ("GET", "/register", (401, 403, 403, 426, 426)),
    ("GET", "/e1/echo/hello", (401, 200, 200, 403, 200)),
    ("POST", "/e1/echo/echo", (401, 403, 200, 403, 200)),
    ("POST", "/edge/disconnect/nobody", (401, 403, 403, 403, 404)),
    ("POST", "/bridge/terminate", (401, 403, 403, 403, 200)),
]


@pytest.mark.parametrize("method, path, statuses", MATRIX, ids=[f"{m} {p}" for m, p, _ in MATRIX])
def test_the_scope_of_a_token_decides(edge, raw, tokens, method, path, statuses):
    found = tuple(raw(tokens[1].get(scope)).request(method, path)[0] for scope in SCOPES)
    assert found == statuses


def test_the_matrix_names_every_route(bridge):
    routes = {(route.method, "/" + route.pattern.replace("{name}", "nobody"))
              for route in bridge._routes.router.list()}
    covered = {(method, path.replace("x.js", "nobody.js")) for method, path, _ in MATRIX}
    assert routes - covered == {("GET", "/events"), ("POST", "/auth")}


def test_a_browser_signs_in_with_a_cookie_that_is_not_the_token(bridge, raw, tokens):
    client = raw(None)
    token = tokens[1]["client"]
    status, fields, body = client.request("POST", "/auth", json.dumps({"token": token}).encode())
    cookie = fields["set-cookie"]
    assert status == 200 and json.loads(body) == {
        "name": "client-1", "scope": "client", "rights": ["look", "use"],
        "expires": pytest.approx(time.time() + radical_edge.COOKIE_S, abs=60)}
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and token not in cookie
    signed = [("Cookie", cookie.split(";")[0])]
    assert client.request("GET", "/edges", headers=signed)[0] == 200
    known = json.loads(client.request("GET", "/auth", headers=signed)[2])
    assert known.items() >= json.loads(body).items() and known["needs_token"] is True
    assert json.loads(client.request("GET", "/auth")[2])["name"] is None
    forged = [("Cookie", cookie.split(";")[0].replace("client-1", "admin-1"))]
    assert client.request("GET", "/edges", headers=forged)[0] == 401
    assert "Max-Age=0" in client.request("POST", "/logout")[1]["set-cookie"]
    tokens[0].revoke("client-1")
    wait_until(lambda: client.request("GET", "/edges", headers=signed)[0] == 401)


@pytest.mark.parametrize("origin", ["http://127.0.0.1", "https://127.0.0.1"])
def test_a_cookie_is_secure_where_the_page_is_though_tls_may_end_at_a_proxy(raw, tokens, origin):
    client = raw(None)
    sign_in = json.dumps({"token": tokens[1]["client"]}).encode()
    for path, body in [("/auth", sign_in), ("/logout", b"")]:
        status, fields, _ = client.request("POST", path, body, headers=[("Origin", origin)])
        assert status == 200
        assert ("; Secure" in fields["set-cookie"]) is origin.startswith("https:")


@pytest.mark.parametrize("value", [
    "admin-1", "admin-1:", "admin-1:\xb2:x", "admin-1:+9:x", "admin-1:99999999999:\xe9",
    "admin-1:99999999999:", "nobody:99999999999:x", ":::", "\xff"])
def test_a_cookie_of_nonsense_is_401(bridge, raw, value):
    client = raw(None)
    client.send(f"GET /edges HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: radical_edge={value}\r\n\r\n"
                .encode("latin-1"))
    assert_error(client.reply(), 401)


def test_other_sites_cannot_use_a_browser_against_the_bridge(bridge, raw, tokens):
    client = raw()
    other = [("Origin", "https://evil.example")]
    assert_error(client.request("POST", "/edge/list", headers=other), 403, "Origin")
    same = [("Origin", "http://127.0.0.1")]
    assert client.request("POST", "/edge/list", headers=same)[0] == 200
    upgrade = [("Upgrade", "websocket"), *other]
    assert_error(client.request("GET", "/register", headers=upgrade), 403)
    rebound = raw(None)
    rebound.send(b"GET /health HTTP/1.1\r\nHost: evil.example:8000\r\n\r\n")
    assert_error(rebound.reply(), 403, "--allow-host")


def test_a_token_is_added_listed_revoked_and_expires(home):
    store = TokenStore(home / "t.json")
    token = store.add("bob", "client")
    assert (home / "t.json").stat().st_mode & 0o777 == 0o600
    assert token not in (home / "t.json").read_text()
    assert store.find(token)[:3] == ("bob", "client", "*") and store.find(token + "x") is None
    short = store.add("short", "read", expires=time.time() + 0.2)
    assert store.find(short).name == "short"
    wait_until(lambda: store.find(short) is None)
    other = TokenStore(home / "t.json")
    other.revoke("bob")
    assert store.refresh() and store.find(token) is None
    for mistake in (lambda: store.add("bob", "king"), lambda: store.add("a b"),
                    lambda: store.revoke("nobody"), lambda: store.add("short")):
        with pytest.raises(EdgeError):
            mistake()


def test_tokens_that_processes_add_and_revoke_in_the_same_instant_are_all_taken_notice_of(home):
    path, racers = home / "t.json", 6
    TokenStore(path).add("keeper")
    program = ("import sys, radical_edge, pathlib\n"
               "store = radical_edge.TokenStore(pathlib.Path(sys.argv[1]))\n"
               "print(flush=True); sys.stdin.readline()\n"
               "for number in range(8):\n"
               "    store.add(f'{sys.argv[2]}-{number}')\n"
               "    if number % 2: store.revoke(f'{sys.argv[2]}-{number}')\n")
    begun = [subprocess.Popen([sys.executable, "-c", program, str(path), f"p{number}"], cwd=ROOT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
             for number in range(racers)]
    for racer in begun:
        racer.stdout.readline()
    for racer in begun:
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in begun:
        racer.communicate(timeout=60)
        assert racer.returncode == 0
    assert sorted(record["name"] for record in TokenStore(path).list()) == sorted(
        ["keeper", *(f"p{racer}-{number}" for racer in range(racers) for number in range(0, 8, 2))])
    assert list(home.iterdir()) == [path]


def test_a_token_file_that_somebody_else_is_changing_is_read_and_not_changed(home, monkeypatch):
    monkeypatch.setattr(radical_edge, "TOKENS_LOCK_S", 0.2)
    store = TokenStore(home / "t.json")
    token = store.add("bob")
    other = radical_edge.LockFile(home / "t.json.lock")
    assert other.take() is None
    for change in (lambda: store.add("eve"), lambda: store.revoke("bob")):
        with pytest.raises(radical_edge.Conflict, match=f"process {os.getpid()} .*t.json.lock"):
            change()
    assert TokenStore(home / "t.json").find(token).name == "bob"
    other.give_back()
    store.revoke("bob")


def test_who_waits_to_change_tokens_sees_what_was_changed_meanwhile(home):
    store, other = TokenStore(home / "t.json"), TokenStore(home / "t.json")
    lock, made = radical_edge.LockFile(home / "t.json.lock"), []
    assert lock.take() is None
    waiting = threading.Thread(target=lambda: made.append(other.add("late")))
    waiting.start()
    store._write([{"name": "early", "scope": "read", "hash": "00" * 32}])    # as the lock's owner
    lock.give_back()
    waiting.join(30)
    assert made and [record["name"] for record in store.list()] == ["early", "late"]


def test_of_two_bridges_that_start_first_one_makes_a_token_and_a_full_disk_leaves_none(home):
    first, second = TokenStore(home / "t.json"), TokenStore(home / "t.json")

    def fail(token):
        raise OSError(28, "No space left on device")

    with pytest.raises(EdgeError, match="No space left on device"):
        first.add_first("default", fail)
    kept = []
    assert first.add_first("default", kept.append) and not second.add_first("default", fail)
    assert second.find(kept[0]) == ("default", "admin", "*", None) and len(second.list()) == 1


def test_a_process_that_was_killed_while_it_changed_tokens_holds_up_nobody(home):
    (home / "t.json.lock").write_text(owner(pid=2 ** 22 + 1))
    TokenStore(home / "t.json").add("bob")
    assert list(home.iterdir()) == [home / "t.json"]


def test_a_token_file_that_others_can_read_or_that_is_damaged_is_refused(home):
    path = home / "t.json"
    TokenStore(path).add("bob")
    path.chmod(0o644)
    with pytest.raises(EdgeError, match="chmod 600"):
        TokenStore(path)
    path.chmod(0o600)
    path.write_text("{not json")
    with pytest.raises(EdgeError, match="damaged"):
        TokenStore(path)
    good = {"name": "bob", "scope": "read", "hash": "00" * 32}
    for field in ({"expires": "soon"}, {"edges": 7}, {"scope": "king"}, {"hash": "0"}, {"name": 1}):
        path.write_text(json.dumps({"tokens": [{**good, **field}]}))
        with pytest.raises(EdgeError, match="damaged"):
            TokenStore(path)


def test_a_revoked_token_ends_requests_and_links_without_a_restart(edge, bridge, raw, tokens):
    client = raw(tokens[1]["client"])
    assert client.request("GET", "/edges")[0] == 200
    tokens[0].revoke("client-1")
    tokens[0].revoke("edge-1")
    wait_until(lambda: client.request("GET", "/edges")[0] == 401)
    admin = raw()
    wait_until(lambda: admin.request("GET", "/e1/echo/hello")[0] == 404)


def test_a_token_registers_only_names_that_match_its_pattern(bridge, tokens, fake_edge):
    token = tokens[0].add("hpc", "edge", edges="hpc*")
    fake_edge("hpc-7", token).hear("topology")
    refused = fake_edge("other", token)
    assert "hpc*" in refused.hear("error")["message"]
    assert refused.hear("none") == {"close": 1008}


@pytest.mark.parametrize("name", ["", "a/b", "..", "bridge", "edges", "x" * 65, 7, None])
def test_an_edge_with_an_impossible_name_is_refused(fake_edge, name):
    assert "name" in fake_edge(name).hear("error")["message"]


# ---------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------

class Listener:
    """A raw subscriber; read() returns the next event's value, with its id."""

    def __init__(self, raw_connection, path="/events", headers=(), version="1.1"):
        self.raw = raw_connection
        lines = [f"GET {path} HTTP/{version}", "Host: x", f"Authorization: Bearer {self.raw.token}",
                 *(f"{name}: {value}" for name, value in headers)]
        self.raw.send("\r\n".join([*lines, "", ""]).encode())
        self.head = self.raw.reply(head_only=True)
        self._chunked = version == "1.1"
        self._parser, self._events = EventParser(), []
        self.bytes = b""

    def read(self):
        while not self._events:
            data = self._chunk() if self._chunked else self._rest()
            self.bytes += data
            self._events = self._parser.feed(data)
        event = self._events.pop(0)
        self.last_id = event.id                   # the parser's own may be that of a later one
        return {**json.loads(event.data), "id": event.id}

    def notification(self):
        """Return the data of the next notification."""
        while True:
            event = self.read()
            if event["topic"] == "notification":
                return event["data"]

    def _chunk(self):
        while b"\r\n" not in self.raw._buffer:
            self._more()
        size, _, rest = self.raw._buffer.partition(b"\r\n")
        while len(rest) < int(size, 16) + 2:
            self._more()
            rest = self.raw._buffer.partition(b"\r\n")[2]
        self.raw._buffer = rest[int(size, 16) + 2:]
        return rest[:int(size, 16)]

    def _rest(self):
        while not self.raw._buffer:               # some may have come with the head
            self._more()
        data, self.raw._buffer = self.raw._buffer, b""
        return data

    def _more(self):
        data = self.raw.sock.recv(65536)
        assert data, "the stream ended"
        self.raw._buffer += data


def say(client, sid, text):
    assert client.request("GET", f"/e1/echo/say/{sid}/{text}")[0] == 200


def new_session(client, edge="e1"):
    return json.loads(client.request("POST", f"/{edge}/echo/register_session")[2])["sid"]


def test_a_plugin_of_the_bridge_itself_that_takes_too_long_is_504(bridge, raw):
    bridge._host.add(EchoPlugin, "own")
    client = raw()
    for _ in range(2):
        reply = client.request("GET", "/bridge/own/wait/60", headers=[("X-Request-Timeout", "0.3")])
        assert_error(reply, 504, "own plugin")
    assert client.request("GET", "/bridge/own/hello")[0] == 200
    wait_until(lambda: not bridge._own_exchanges)


def test_events_come_with_the_topology_first_and_numbered(edge, raw):
    client, listener = raw(), Listener(raw())
    assert listener.head[1]["content-type"] == "text/event-stream"
    first = listener.read()
    assert first["topic"] == "topology" and "echo" in first["data"]["edges"]["e1"]["plugins"]
    assert first["data"]["edges"]["e1"]["plugins"]["echo"]["namespace"] == "/e1/echo"
    sid = new_session(client)
    for text in ("one", "two"):
        say(client, sid, text)
    notification = listener.notification()
    assert type(notification.pop("number", 0)) is int            # of the edge's own, in version 2
    assert notification == {"edge": "e1", "plugin": "echo", "topic": "said",
                            "data": {"text": "one"}}
    one = int(listener.last_id)
    listener.notification()
    assert int(listener.last_id) == one + 1
    assert b"event:" not in listener.bytes


def test_events_are_filtered(edge, raw):
    client = raw()
    sid = new_session(client)
    none = [Listener(raw(), f"/events?{query}") for query in ("edge=e2", "plugin=x", "topic=y")]
    some = Listener(raw(), "/events?edge=e1&plugin=echo&topic=said")
    for listener in (*none, some):
        listener.read()
    say(client, sid, "hi")
    assert some.notification()["data"] == {"text": "hi"}
    for listener in none:
        listener.raw.sock.settimeout(0.05)
        with pytest.raises(socket.timeout):
            while listener.read()["topic"] == "topology":
                pass


def test_a_subscriber_that_comes_back_gets_what_it_missed_or_is_told_of_a_gap(edge, raw, bridge):
    client, listener = raw(), Listener(raw())
    sid = new_session(client)
    say(client, sid, "one")
    listener.notification()
    last = listener.last_id
    listener.raw.close()
    say(client, sid, "two")
    again = Listener(raw(), headers=[("Last-Event-ID", last)])
    assert again.read()["topic"] == "topology"
    assert again.notification()["data"] == {"text": "two"}
    old = Listener(raw(), headers=[("Last-Event-ID", str(int(last) - 10))])
    assert old.read()["topic"] == "topology"
    gap = old.read()
    assert gap["topic"] == "gap" and gap["data"] == {"from": int(last) - 9, "to": int(last) - 1}
    assert old.notification()["data"] == {"text": "one"}


def test_http_1_0_gets_the_events_without_chunks(edge, raw):
    listener = Listener(raw(), version="1.0")
    assert "transfer-encoding" not in listener.head[1]
    assert listener.read()["topic"] == "topology"


def test_a_comment_keeps_the_stream_alive(tokens):
    running = Bridge(port=0, tokens=tokens[0], heartbeat=0.1).start()
    try:
        connection = Raw(running, tokens[1]["read"])
        listener = Listener(connection)
        assert listener._chunk().startswith(b"data: ")
        assert listener._chunk() == b": still here\n\n"
        connection.close()
    finally:
        assert running.stop()


def test_a_subscriber_that_does_not_read_is_cut_off_and_delays_nobody(fake_edge, raw, bridge,
                                                                      monkeypatch):
    monkeypatch.setattr(bridge._journal, "_max_bytes", 2_000_000)        # what it may be behind
    fake = fake_edge("f1")
    stuck, reading = Listener(raw()), Listener(raw())
    for listener in (stuck, reading):
        listener.read()
    found, text = [], "x" * 50_000
    while len(bridge._hub.subscribers) == 2:      # until the buffers of the stuck one are full
        for number in range(len(found), len(found) + 20):
            fake.say(type="notification", plugin="p", topic="t", data={"n": number, "text": text})
        found += [reading.notification()["data"]["n"] for _ in range(20)]
        assert len(found) < 2000, "the stuck subscriber was not cut off"
    assert found == list(range(len(found)))


def test_connections_that_were_links_or_subscriptions_are_forgotten_at_their_end(bridge, raw,
                                                                                 fake_edge):
    for _ in range(3):
        client = raw()
        Listener(client).read()
        client.close()
        fake = fake_edge("f1")
        fake.hear("topology")
        fake.close()
        wait_until(lambda: not bridge._registry.links)
    wait_until(lambda: not bridge.connections)
    assert not bridge._hub.subscribers


def test_two_thousand_subscribers_cost_no_thread(edge, raw, bridge):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needs("system", hard == resource.RLIM_INFINITY or hard >= 5000, "5,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (5000 if hard == resource.RLIM_INFINITY else hard,
                                                hard))
    before, client = threading.active_count(), raw()
    request = (f"GET /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.token}\r\n\r\n"
               ).encode()
    sockets = []
    try:
        for _ in range(2000):
            sockets.append(socket.create_connection(("127.0.0.1", client.port), timeout=10))
            sockets[-1].sendall(request)
        wait_until(lambda: len(bridge._hub.subscribers) == 2000, 30)
        wait_until(lambda: threading.active_count() <= before + 5)
        say(client, new_session(client), "all")
        for sock in sockets:
            data = b""
            while b'"text":"all"' not in data:
                data += sock.recv(65536)
    finally:
        for sock in sockets:
            sock.close()
        wait_until(lambda: not bridge._hub.subscribers, 30)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------------------
# Plugins and sessions
# ---------------------------------------------------------------------------

def as_user(scope="client", name=None):
    """Return the headers that a bridge sends for a caller."""
    return {"x-forwarded-user": name or f"{scope}-1", "x-forwarded-scope": scope}


@pytest.fixture
def host(home):
    """A plugin host without a bridge, and the notifications that it passed on."""
    said = []
    running = radical_edge.PluginHost("e1", "edge", home / "state", changed=lambda: None,
                                      notify=lambda *args: said.append(args))
    running.said = said
    yield running
    assert running.stop()


def ask(host, method, path, body=None, headers=()):
    """Dispatch a request to a host; return (status, JSON value)."""
    answers = []
    content = b"" if body is None else json.dumps(body).encode()
    call = radical_edge.Call(radical_edge.EdgeRequest("1", method, path, dict(headers), content))
    call.respond = answers.append
    host.dispatch(call)
    (answer,) = wait_until(lambda: answers, 20)
    return answer.status_code, json.loads(answer.body) if answer.body else None


def test_every_plugin_has_its_built_in_routes(host):
    host.add(EchoPlugin)
    sid = ask(host, "POST", "/echo/register_session")[1]["sid"]
    assert ask(host, "GET", "/echo/list_sessions")[1] == {"sessions": [sid]}
    assert ask(host, "GET", "/echo/version")[1] == {"version": "0.0.1"}
    health = ask(host, "GET", "/echo/health")[1]
    assert health["status"] == "healthy" and health["active_sessions"] == 1
    assert ask(host, "GET", "/echo/ui_config") == (200, {})
    assert ask(host, "POST", f"/echo/unregister_session/{sid}")[1] == {"ok": True}
    assert ask(host, "POST", f"/echo/unregister_session/{sid}")[0] == 404


def test_a_session_belongs_to_the_token_that_made_it(host):
    host.add(EchoPlugin)
    sid = ask(host, "POST", "/echo/register_session", headers=as_user(name="alice"))[1]["sid"]
    for headers, status in ((as_user(name="alice"), 200), (as_user(name="bob"), 403),
                            (as_user("admin"), 200)):
        assert ask(host, "GET", f"/echo/say/{sid}/x", headers=headers)[0] == status
    assert ask(host, "GET", "/echo/list_sessions", headers=as_user(name="bob"))[1] == {
        "sessions": []}
    path = f"/echo/unregister_session/{sid}"
    assert ask(host, "POST", path, headers=as_user(name="bob"))[0] == 403


class ShortSession(PluginSession):
    """A session whose end the tests watch."""
    busy = False
    closed = threading.Event()

    def is_busy(self):
        return self.busy

    async def close(self):
        self.closed.set()
        return await super().close()


def test_a_session_expires_without_use_unless_it_is_busy(host):
    class Short(Plugin):
        session_class = ShortSession
        session_ttl = 0.2

    ShortSession.closed.clear()
    ShortSession.busy = True
    host.add(Short, "short")
    sid = ask(host, "POST", "/short/register_session")[1]["sid"]
    assert not ShortSession.closed.wait(0.6)
    ShortSession.busy = False
    assert ShortSession.closed.wait(10)
    status, value = ask(host, "POST", f"/short/unregister_session/{sid}")
    assert status == 410 and "expired" in value["detail"]


def test_a_session_that_was_closed_while_another_expired_does_not_stop_the_expiry(host):
    closing, may_close = [], threading.Event()

    class Slow(PluginSession):
        async def close(self):
            closing.append(self.sid)
            while closing[0] == self.sid and not may_close.is_set():
                await asyncio.sleep(0.01)
            return await super().close()

    class Lazy(Plugin):
        session_class = Slow
        session_ttl = 1

    host.add(Lazy, "lazy")
    first, second = (ask(host, "POST", "/lazy/register_session")[1]["sid"] for _ in range(2))
    host._hosted["lazy"].plugin._sessions[second].used = host._hosted["lazy"].plugin._sessions[
        first].used                               # they expire at the same moment
    assert wait_until(lambda: closing) == [first]
    assert ask(host, "POST", f"/lazy/unregister_session/{second}")[0] == 200
    may_close.set()
    third = ask(host, "POST", "/lazy/register_session")[1]["sid"]
    wait_until(lambda: third in closing)
    assert closing == [first, second, third]


def test_a_session_that_fails_to_start_is_not_left_behind(host):
    class Failing(PluginSession):
        async def start(self):
            raise radical_edge.Conflict("not today")

    class Sad(Plugin):
        session_class = Failing

    host.add(Sad, "sad")
    assert ask(host, "POST", "/sad/register_session")[0] == 409
    assert ask(host, "GET", "/sad/list_sessions")[1] == {"sessions": []}


def test_a_session_without_a_good_state_costs_the_others_nothing(home, caplog):
    class Odd(KeptSession):
        def snapshot(self):
            return {"count": self.count} if self.color == "red" else {self}

    class Oddities(KeptPlugin):
        session_class = Odd

    def start():
        running = radical_edge.PluginHost("e1", "edge", home / "state", changed=lambda: None,
                                          notify=lambda *args: None)
        running.add(Oddities, "odd")
        return running

    host = start()
    odd, good = (ask(host, "POST", "/odd/register_session", {"color": color})[1]["sid"]
                 for color in ("blue", "red"))
    assert ask(host, "POST", f"/odd/add/{good}")[1]["count"] == 1
    assert host.stop() and odd in caplog.text
    host = start()
    assert ask(host, "POST", f"/odd/add/{good}")[1] == {"color": "red", "count": 2}
    assert ask(host, "POST", f"/odd/add/{odd}")[1] == {"color": "blue", "count": 1}
    assert host.stop()


def test_a_request_that_is_cancelled_does_not_let_an_old_state_overtake_a_new_one(
        tmp_path, monkeypatch):
    begun, may_write, real = threading.Event(), threading.Event(), radical_edge.write_private

    def write(path, text):
        if "old" in text:
            begun.set()
            assert may_write.wait(10)
        real(path, text)

    monkeypatch.setattr(radical_edge, "write_private", write)
    workers = radical_edge.Workers("test")

    async def run():
        store = radical_edge._SessionStore(tmp_path / "s.json", workers)
        first = asyncio.ensure_future(store.save(lambda: {"s": '"old"'}))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        first.cancel()
        second = asyncio.ensure_future(store.save(lambda: {"s": '"new"'}))
        done, _ = await asyncio.wait([second], timeout=0.2)
        may_write.set()
        await second
        return done

    assert asyncio.run(run()) == set()
    workers.stop()
    assert json.loads((tmp_path / "s.json").read_text()) == {"sessions": {"s": "new"}}


def test_a_foreign_and_an_expired_session_are_told_apart_over_http(edge, raw, tokens):
    class Brief(Plugin):
        session_class = EchoSession
        session_ttl = 0.2

        @get("use/{sid}")
        async def use(self, request):
            return await self._forward(request.path_params["sid"], EchoSession.say, "x")

    edge.host.add(Brief, "brief")
    owner, other = raw(tokens[1]["client"]), raw(tokens[0].add("other", "client"))
    wait_until(lambda: owner.request("GET", "/e1/brief/version")[0] == 200)
    sid = json.loads(owner.request("POST", "/e1/brief/register_session")[2])["sid"]
    assert_error(other.request("GET", f"/e1/brief/use/{sid}"), 403, "another token")
    wait_until(lambda: json.loads(raw().request("GET", "/e1/brief/health")[2])["active_sessions"]
               == 0)
    assert_error(owner.request("GET", f"/e1/brief/use/{sid}"), 410, "expired", "register")
    assert owner.request("GET", "/e1/brief/version")[0] == 200


def test_an_edge_with_too_many_requests_waiting_is_503(fake_edge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_PENDING", 2)
    fake = fake_edge("f1")
    fake.hear("topology")
    waiting = [raw(), raw()]
    for client in waiting:
        client.send_request("GET", "/f1/p/x")
        fake.hear("request")
    reply = raw().request("GET", "/f1/p/x")
    assert_error(reply, 503, "too much")
    assert reply[1]["retry-after"] == "1"


def test_the_bodies_that_a_bridge_holds_whole_have_a_bound_together(fake_edge, bridge, raw,
                                                                    monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_BODIES", 150_000)
    fake, first, second = fake_edge("f1"), raw(), raw()
    fake.hear("topology")
    first.send_request("POST", "/f1/p/x", headers=[("Content-Length", "100000")])
    first.send(b"x" * 99_999)
    wait_until(lambda: bridge.bodies.held == 99_999)
    second.send_request("POST", "/f1/p/x", b"y" * 100_000)
    reply = second.reply()
    assert_error(reply, 503, "bodies")
    assert reply[1]["retry-after"] == "1"
    first.send(b"x")
    fake.say(type="response", req_id=fake.hear("request")["req_id"], status=204)
    assert first.reply()[0] == 204
    wait_until(lambda: bridge.bodies.held == 0)
    third = raw()
    third.send_request("POST", "/f1/p/x", headers=[("Content-Length", "100000")])
    third.send(b"z" * 9000)
    wait_until(lambda: bridge.bodies.held == 9000)
    third.close()
    wait_until(lambda: bridge.bodies.held == 0)


def test_too_many_connections_are_refused_and_counted(bridge, raw, monkeypatch):
    client = raw()
    assert client.request("GET", "/health")[0] == 200
    monkeypatch.setattr(radical_edge, "MAX_CONNECTIONS", 1)
    refused = raw()
    assert_error(refused.reply(), 503, "connections")
    assert refused.is_closed()
    assert b"refused_connections_total 1" in client.request("GET", "/metrics")[2]


class KeptSession(PluginSession):
    """A session with an argument and a state."""

    def __init__(self, sid, color="red"):
        super().__init__(sid)
        self.color, self.count = color, 0

    async def add(self):
        self.count += 1
        self.keep()
        return {"color": self.color, "count": self.count}

    def snapshot(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


class KeptPlugin(Plugin):
    """Used by the next tests; loaded under an instance name, for it has no plugin_name."""
    session_class = KeptSession

    @post("add/{sid}")
    async def add(self, request):
        return await self._forward(request.path_params["sid"], KeptSession.add)


def test_sessions_survive_a_restart_with_owner_arguments_and_state(home):
    sids = []
    for expected in (1, 2):
        host = radical_edge.PluginHost("e1", "edge", home / "state", changed=lambda: None,
                                       notify=lambda *args: None)
        host.add(KeptPlugin, "kept")
        alice = as_user(name="alice")
        if not sids:
            sids.append(ask(host, "POST", "/kept/register_session", {"color": "blue"}, alice)[1])
        path = f"/kept/add/{sids[0]['sid']}"
        assert ask(host, "POST", path, headers=alice)[1] == {"color": "blue", "count": expected}
        assert ask(host, "POST", path, headers=as_user(name="bob"))[0] == 403
        assert host.stop()


@pytest.mark.parametrize("mistake, words", [
    (lambda: {}["nothing"], "KeyError: 'nothing'"), (lambda: sys.exit(3), "SystemExit: 3"),
    (lambda: asyncio.wait_for(asyncio.sleep(60), 0.01), "TimeoutError")])
def test_a_plugin_that_fails_to_stop_is_logged_and_its_sessions_are_kept(home, caplog, mistake,
                                                                         words):
    class Failing(KeptPlugin):
        async def stop(self):
            for record in self._sessions.values():
                record.session.count = 7
            await mistake()

    host = radical_edge.PluginHost("e1", "edge", home / "state", changed=lambda: None,
                                   notify=lambda *args: None)
    host.add(Failing, "failing")
    sid = ask(host, "POST", "/failing/register_session", {}, as_user(name="alice"))[1]["sid"]
    assert host.stop()
    assert "plugin failing failed to stop" in caplog.text and words in caplog.text
    (kept,) = (home / "state").rglob("sessions.json")
    assert json.loads(kept.read_text())["sessions"][sid]["state"] == {"count": 7}


def test_a_plugin_that_does_not_stop_is_named_in_the_log(home, caplog, monkeypatch):
    monkeypatch.setattr(radical_edge, "STOP_S", 0.5)
    ends = threading.Event()

    class Stuck(Plugin):
        async def stop(self):
            ends.wait(60)                         # blocks its loop

    host = radical_edge.PluginHost("e1", "edge", home / "state", changed=lambda: None,
                                   notify=lambda *args: None)
    host.add(Stuck, "stuck")
    try:
        assert not host.stop()
        assert "plugin stuck did not stop within" in caplog.text
    finally:
        ends.set()


def test_a_handler_may_be_plain_or_async_and_a_coroutine_runs_on_the_plugins_own_loop(host):
    class Where(Plugin):
        @get("async")
        async def in_loop(self, request):
            return {"thread": threading.current_thread().name}

        @get("plain")
        def in_worker(self, request):
            return [threading.current_thread().name]

    host.add(Where, "one")
    assert ask(host, "GET", "/one/async")[1] == {"thread": "plugin-one"}
    assert ask(host, "GET", "/one/plain")[1] == ["plugin-one-worker"]


def test_exit_in_a_handler_ends_its_request_and_nothing_else(host):
    class Leaving(Plugin):
        @get("async")
        async def in_loop(self, request):
            sys.exit(3)

        @get("plain")
        def in_worker(self, request):
            sys.exit(3)

        @get("stop")
        def without_end(self, request):
            return next(iter(()))

        @get("pieces")
        def in_pieces(self, request):
            return StreamingResponse(sys.exit(3) for _ in range(1))

        @get("number")
        def no_pieces(self, request):
            return StreamingResponse(42)

    host.add(Leaving, "leaving")
    for _ in range(2):
        for path in ("async", "plain", "stop", "pieces", "number"):
            assert ask(host, "GET", f"/leaving/{path}")[0] == 500
    assert ask(host, "GET", "/leaving/version")[0] == 200


def test_an_idle_worker_holds_no_request(host):
    class Plain(Plugin):
        @post("take")
        def take(self, request):
            return {"bytes": len(request.body_bytes)}

    host.add(Plain, "plain")
    assert ask(host, "POST", "/plain/take", "x" * 100)[1] == {"bytes": 102}

    def held():
        return [item for item in gc.get_objects()
                if type(item) is radical_edge.Request and item.path == "/plain/take"]

    wait_until(lambda: not gc.collect() and not held() or not held())


def test_workers_end_when_they_have_nothing_to_do_and_others_come(monkeypatch):
    monkeypatch.setattr(radical_edge.Workers, "IDLE_S", 0.05)
    workers, done = radical_edge.Workers("idle"), queue.Queue()

    def names():
        return [thread for thread in threading.enumerate() if thread.name == "idle-worker"]

    for _ in range(3):
        for number in range(20):
            workers.run(functools.partial(done.put, number))
        assert sorted(done.get(timeout=10) for _ in range(20)) == list(range(20))
        wait_until(lambda: not names())
        assert workers._threads == workers._idle == 0
    for number in range(300):                     # some come when a worker is about to end
        workers.run(functools.partial(done.put, number))
        assert done.get(timeout=10) == number
        time.sleep(random.uniform(0.045, 0.055) if number % 10 == 0 else 0)
    workers.stop()
    wait_until(lambda: not names())


def test_what_coroutines_leave_to_threads_is_done_although_all_handlers_wait(host, monkeypatch):
    monkeypatch.setattr(radical_edge.Workers.__init__, "__defaults__", (2,))

    class Waiting(Plugin):
        @get("wait")
        def wait(self, request):
            loop = host._hosted["waiting"].thread.loop
            return asyncio.run_coroutine_threadsafe(self._work(), loop).result(10)

        async def _work(self):
            name = await asyncio.to_thread(lambda: threading.current_thread().name)
            with pytest.raises(ZeroDivisionError):
                await asyncio.get_running_loop().run_in_executor(None, lambda: 1 // 0)
            with pytest.raises(RuntimeError, match="StopIteration"):     # which no future takes
                await asyncio.to_thread(next, iter(()))
            return [name]

    host.add(Waiting, "waiting")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(host, "GET", "/waiting/wait"), range(4)))
    assert answers == [(200, ["plugin-waiting-helper-worker"])] * 4


def test_a_process_that_gets_no_more_threads_says_so_and_goes_on(host, monkeypatch):
    host.add(EchoPlugin)
    real, refused = threading.Thread.start, []

    def start(thread):
        if thread.name == "plugin-echo-worker" and len(refused) < 2:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        real(thread)

    wait_until(lambda: host._hosted["echo"].workers._idle)
    host._hosted["echo"].workers.stop()
    host._hosted["echo"].workers = radical_edge.Workers("plugin-echo")
    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(2):
        status, value = ask(host, "GET", "/echo/plain/0")
        assert status == 503 and "no more threads" in value["detail"]
    assert ask(host, "GET", "/echo/plain/0")[0] == 200


def test_a_request_to_a_plugin_that_is_gone_by_now_is_503(host):
    host.add(EchoPlugin)
    hosted = host._hosted["echo"]
    host.remove("echo")
    host._hosted = {"echo": hosted}               # as who looked it up a moment ago has it
    assert ask(host, "GET", "/echo/hello")[0] == 503
    assert ask(host, "GET", "/echo/plain/0")[0] == 503
    host._hosted = {}


def test_of_two_plugins_with_one_name_that_are_added_at_once_one_is_made(host):
    results, may_start = [], threading.Event()

    class Slow(Plugin):
        def is_enabled(self):
            return may_start.wait(10)

    def add():
        try:
            results.append(host.add(Slow, "slow"))
        except EdgeError as error:
            results.append(error.status)

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: results)
    may_start.set()
    for thread in threads:
        thread.join(10)
    assert results[0] == 409 and results[1] is host._hosted["slow"].plugin
    host.remove("slow")
    assert host.add(Slow, "slow")


def test_decorator_and_plugin_name_both_register(host):
    @radical_edge.plugin("decorated")
    class Decorated(Plugin):
        pass

    class Named(Plugin):
        plugin_name = "named"

    try:
        assert Plugin.get_plugin_class("decorated") is Decorated
        assert Plugin.get_plugin_class("named") is Named
        assert {"decorated", "named"} <= set(Plugin.get_plugin_names())
        made = host.add(Decorated)
        assert (made.instance_name, made.namespace) == ("decorated", "/decorated")
        assert host.add(Decorated, "second").uid != made.uid
        with pytest.raises(radical_edge.Conflict):
            host.add(Decorated)
    finally:
        del Plugin._registry["decorated"], Plugin._registry["named"]


def test_a_plugin_that_is_not_for_this_machine_says_why(host):
    class Off(Plugin):
        plugin_name = "off"
        why_disabled = "there is no scheduler here"

        def is_enabled(self):
            return False

    try:
        host.load(["off"])
    finally:
        del Plugin._registry["off"]
    status, value = ask(host, "GET", "/off/version")
    assert status == 404 and "there is no scheduler here" in value["detail"]
    assert host.describe() == {}


def test_a_client_managed_plugin_has_the_older_routes(host):
    host.add(radical_edge.ClientManagedPlugin, "old")
    cid = ask(host, "POST", "/old/register_client")[1]["cid"]
    assert ask(host, "GET", f"/old/echo/{cid}?q=hi")[1] == {"cid": cid, "echo": "hi"}
    assert ask(host, "GET", f"/old/echo/{cid}")[1] == {"cid": cid, "echo": "hello"}
    assert ask(host, "POST", f"/old/unregister_client/{cid}")[1] == {"ok": True}
    assert ask(host, "GET", f"/old/echo/{cid}")[0] == 404


def test_notifications_are_sent_from_the_loop_from_threads_and_with_await(host):
    class Noisy(Plugin):
        @get("loop")
        async def from_loop(self, request):
            await self.send_notification("t", {"n": 1})
            thread = threading.Thread(target=self._dispatch_notify, args=("t", {"n": 2}))
            thread.start()
            thread.join()
            return {}

        @get("worker")
        def from_worker(self, request):
            self._dispatch_notify("t", {"n": 3})
            return {}

    host.add(Noisy, "noisy")
    ask(host, "GET", "/noisy/loop")
    ask(host, "GET", "/noisy/worker")
    assert host.said == [("noisy", "t", {"n": number}) for number in (1, 2, 3)]


def test_plugins_are_selected_by_name_or_unique_prefix():
    radical_edge.load_builtin_plugins()
    assert radical_edge.select_plugins(["sys", "psij"]) == ["sysinfo", "psij"]
    with pytest.raises(ValueError, match="no plugin"):
        radical_edge.select_plugins(["nonsense"])


def test_a_plugin_file_that_fails_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("1/0")
    with pytest.raises(ValueError, match="bad.py.*ZeroDivisionError"):
        radical_edge.load_plugin_file(str(tmp_path / "bad.py"))


def test_an_entry_point_adds_a_plugin(tmp_path, monkeypatch):
    (tmp_path / "their_plugin.py").write_text(
        "import radical_edge\n@radical_edge.plugin('theirs')\nclass Theirs(radical_edge.Plugin):\n"
        "    pass\n")
    info = tmp_path / "their_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[radical.edge.plugins]\ntheirs = their_plugin:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    radical_edge.load_entry_points()
    try:
        assert Plugin.get_plugin_class("theirs").__name__ == "Theirs"
    finally:
        Plugin._registry.pop("theirs", None)


# ---------------------------------------------------------------------------
# The edge and its link
# ---------------------------------------------------------------------------

def start_edge(bridge, tokens, name="e1", **options):
    running = Edge(bridge.url, name, plugins=["echo"], token=tokens[1]["edge"], **options).start()
    assert running.online.wait(10)
    return running


@pytest.mark.parametrize("path", ["/e1/echo/plain/3", "/e1/echo/block/5", pytest.param(
    "/e1/echo/plain/60", marks=pytest.mark.skipif(not LONG, reason="RADICAL_EDGE_LONG=1: 60 s"))])
def test_a_handler_that_blocks_loses_no_heartbeat_and_holds_up_no_other_plugin(tokens, path):
    """With a heartbeat of 0.25 s, a link is dead after 0.5 s of silence."""
    bridge = Bridge(port=0, tokens=tokens[0], heartbeat=0.25).start()
    edge = start_edge(bridge, tokens, heartbeat=0.25)
    try:
        edge.host.add(EchoPlugin, "other")
        blocked, client = Raw(bridge, tokens[1]["admin"]), Raw(bridge, tokens[1]["admin"])
        wait_until(lambda: client.request("GET", "/e1/other/hello")[0] == 200)
        blocked.send_request("GET", path)
        end = time.monotonic() + float(path.rpartition("/")[2]) - 1.0
        while time.monotonic() < end:
            assert client.request("GET", "/e1/other/hello")[0] == 200
        assert bridge.records.counters._counts["links_lost_total", ""] == 0
        blocked.close()
        client.close()
    finally:
        edge.stop()                               # a plugin may be stuck in its handler
        assert bridge.stop()
        for thread in threading.enumerate():      # one sleeps still: let none be left
            if thread.name.startswith("plugin-echo"):
                thread.join(10)


def test_an_edge_comes_back_when_its_bridge_does(tokens):
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    port = bridge._listener.server_address[1]
    edge = start_edge(bridge, tokens)
    try:
        assert bridge.stop()
        bridge = Bridge(port=port, tokens=tokens[0]).start()
        client = Raw(bridge, tokens[1]["admin"])
        wait_until(lambda: client.request("GET", "/e1/echo/hello")[0] == 200)
        client.close()
    finally:
        assert edge.stop()
        assert bridge.stop()


def test_notifications_of_a_time_without_bridge_arrive_later_in_order(tokens):
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    port = bridge._listener.server_address[1]
    edge = start_edge(bridge, tokens)
    try:
        assert bridge.stop()
        for number in range(50):
            edge.host.notify("echo", "count", {"n": number})
        bridge = Bridge(port=port, tokens=tokens[0]).start()
        log = bridge._hub.log
        wait_until(lambda: log.last_id - log.first_id + 1 == 50)
        listener = Listener(Raw(bridge, tokens[1]["admin"]), headers=[("Last-Event-ID", "1")])
        assert [listener.notification()["data"]["n"] for _ in range(50)] == list(range(50))
        listener.raw.close()
    finally:
        assert edge.stop()
        assert bridge.stop()


def test_the_same_instance_replaces_its_stale_link_and_another_is_refused(bridge, fake_edge):
    first = fake_edge("twin", instance="a", wire=[1])
    assert first.hear("registered")["edge_name"] == "twin"
    assert "already used" in fake_edge("twin", instance="b").hear("error")["message"]
    assert "already used" in fake_edge("twin").hear("error")["message"]
    fake_edge("twin", instance="a", wire=[1]).hear("registered")
    assert "took over" in first.hear("shutdown")["reason"]
    assert first.hear("none") == {"close": 4001}


def test_what_a_replaced_link_worked_on_goes_to_the_new_one_once_it_has_registered(bridge, tokens,
                                                                                   raw):
    """Also what a client has sent behind it, which the bridge reads only then."""
    request, token = radical_edge.Kind.REQUEST, tokens[1]["edge"]
    old, reader, writer = FakeEdge2(bridge, token, "f2"), raw(), raw()
    reader.send_request("GET", "/f2/p/read")
    old.hear_wire(request)
    writer.send_request("POST", "/f2/p/write")
    old.hear_wire(request)
    writer.send_request("POST", "/f2/p/behind")
    wait_until(lambda: any(item._parser.buffered for item in list(bridge.connections)))
    new = FakeEdge2(bridge, token, "f2")          # "registered" is the first that it hears
    try:
        assert_error(writer.reply(), 503, "it may have been done")
        targets = {}
        for _ in range(2):
            frame = new.hear_wire(request)
            targets[radical_edge.parse_wire_request(frame).target] = frame.stream
        assert set(targets) == {"/p/read", "/p/behind"}
        for target, stream in targets.items():
            new.say_wire(radical_edge.Kind.RESPONSE, stream, [200, {}], target.encode(), end=True)
        assert (reader.reply()[2], writer.reply()[2]) == (b"/p/read", b"/p/behind")
    finally:
        old.close()
        new.close()


def test_a_request_waits_on_when_its_edge_comes_back_and_is_lost_at_once(bridge, tokens,
                                                                         fake_edge, raw):
    first, client = fake_edge("f1", instance="i", wire=[1]), raw()
    first.hear("registered")
    first.close()
    wait_until(lambda: "f1" in bridge._registry.absent)
    client.send_request("POST", "/f1/p/x")
    wait_until(lambda: bridge._registry.absent["f1"].waiting)
    url = radical_edge.parse_bridge_url(bridge.url)
    sock = radical_edge.open_websocket(url, tokens[1]["edge"], None)[0]
    message = {"type": "register", "edge_name": "f1", "plugins": {}, "instance": "i", "wire": [1]}
    sock.sendall(encode_frame(Opcode.TEXT, json.dumps(message).encode(), mask=b"abcd")
                 + b"\xff\xff")               # the bridge reads both at once
    while sock.recv(65536):
        pass
    sock.close()
    last = fake_edge("f1", instance="i", wire=[1])
    last.say(type="response", req_id=last.hear("request")["req_id"], status=204)
    assert client.reply()[0] == 204


def test_plugins_come_and_go_at_run_time_and_the_topology_follows(edge, bridge, raw):
    listener = Listener(raw())
    edge.host.add(EchoPlugin, "late")

    def wait_for(present):
        while ("late" in listener.read()["data"]["edges"]["e1"]["plugins"]) != present:
            pass

    wait_for(True)
    client = raw()
    assert client.request("GET", "/e1/late/hello")[0] == 200
    edge.host.remove("late")
    wait_for(False)
    assert client.request("GET", "/e1/late/hello")[0] == 404


def test_a_task_that_begins_while_its_plugin_is_removed_is_ended_too(edge, raw):
    begun, ending = threading.Event(), threading.Event()

    class Busy(Plugin):
        @get("stubborn")
        async def stubborn(self, request):
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ending.set()
                await asyncio.sleep(0.7)
                return {}

        @get("plain")
        def plain(self, request):
            assert ending.wait(30)
            return StreamingResponse(self.make())

        async def make(self):
            yield b"first"
            await asyncio.sleep(60)

    edge.host.add(Busy, "busy")
    stubborn, client = raw(), raw()
    stubborn.send_request("GET", "/e1/busy/stubborn")
    client.send_request("GET", "/e1/busy/plain")
    assert begun.wait(10)
    wait_until(lambda: edge.host._hosted["busy"].workers._threads)
    edge.host.remove("busy")
    assert stubborn.reply()[0] == 200
    client.sock.settimeout(10)
    status = client.reply(head_only=True)[0]      # over version 1 of the wire, all is one message
    while status == 200 and not client.is_closed():
        pass


def test_plugins_are_told_of_other_edges(bridge, tokens, fake_edge):
    seen = []

    class Watcher(Plugin):
        async def on_topology_change(self, edges):
            seen.append(edges)

    edge = start_edge(bridge, tokens)
    try:
        edge.host.add(Watcher, "watcher")
        fake_edge("f1").hear("topology")
        wait_until(lambda: seen and seen[-1].get("f1") == {"plugins": ["p"]})
        assert "watcher" in seen[-1]["e1"]["plugins"]
    finally:
        assert edge.stop()


class Relay:
    """A TCP relay in front of a port. It can stop forwarding without closing, and speak CONNECT."""

    def __init__(self, port, *, prefix=None, connect_host=None):
        self._port, self._prefix, self._connect_host = port, prefix, connect_host
        self.frozen = False
        self.asked = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._sockets = []
        self._thread = threading.Thread(target=self._accept)
        self._threads = [self._thread]
        self._thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self._server.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [near, far]
                self._serve(near, far)

    def _serve(self, near, far):
        with contextlib.suppress(OSError):
            self._open(near, far)
            for pair in ((near, far), (far, near)):
                thread = threading.Thread(target=self._copy, args=pair)
                self._threads.append(thread)
                thread.start()

    def _open(self, near, far):
        if self._connect_host is None and self._prefix is None:
            return
        data = b""
        while b"\r\n\r\n" not in data:
            data += near.recv(65536)
        self.asked.append(data.split(b"\r\n")[0].decode())
        if self._connect_host is not None:
            assert self.asked[-1].startswith(f"CONNECT {self._connect_host}:")
            near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            far.sendall(data.replace(b" " + self._prefix.encode(), b" ", 1))

    def _copy(self, source, target):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if not self.frozen:
                    target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """End the connections that there are."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        for sock in [self._server, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)


def test_the_answer_to_a_request_of_a_lost_link_takes_no_body_from_one_of_the_next(tokens):
    """Both may have the same stream number: each link counts anew."""
    begun, may_end, reading = threading.Event(), threading.Event(), threading.Event()

    class Busy(Plugin):
        @post("slow")
        def slow(self, request):
            begun.set()
            return {"ended": may_end.wait(30)}

        @post("take")
        def take(self, request):
            size = 0
            for piece in request.iter_body():
                size += len(piece)
                reading.set()
            return {"size": size}

    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens)
    try:
        edge.host.add(Busy, "busy")
        first, second = Raw(bridge, tokens[1]["admin"]), Raw(bridge, tokens[1]["admin"])
        first.send_request("POST", "/e1/busy/slow")
        assert begun.wait(10)
        link = bridge._registry.links["e1"]
        bridge.loop.call_soon_threadsafe(link.channel.close, "a test")
        assert first.reply()[0] == 503
        wait_until(lambda: bridge._registry.links.get("e1", link) is not link)
        bridge._registry.links["e1"].requests._counter = link.requests._counter - 1
        half = b"x" * 1_000_000
        second.send(f"POST /e1/busy/take HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
                    f"{second.token}\r\nContent-Length: {2 * len(half)}\r\n\r\n".encode() + half)
        assert reading.wait(10)
        may_end.set()
        wait_until(lambda: edge.host._hosted["busy"].workers._idle)
        second.send(half)
        second.sock.settimeout(20)
        status, _, body = second.reply()
        assert (status, json.loads(body)) == (200, {"size": 2 * len(half)})
        assert edge._links[0].streams == 0
    finally:
        may_end.set()
        edge.stop()
        bridge.stop()


@pytest.mark.parametrize("route", ["large", "stream"])
def test_an_answer_in_pieces_that_begins_after_its_link_was_lost_ends_at_once(tokens, route):
    """Nobody on the next link will ever give credit for it."""
    begun, may_end, closed = threading.Event(), threading.Event(), threading.Event()

    class Busy(Plugin):
        @post("large")
        def large(self, request):
            begun.set()
            may_end.wait(30)
            closed.set()
            return Response(bytes(1_000_000))

        @post("stream")
        def stream(self, request):
            begun.set()
            may_end.wait(30)
            return StreamingResponse(self.make())

        def make(self):
            try:
                yield from pieces_of(1_000_000_000)
            finally:
                closed.set()

    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens)
    try:
        edge.host.add(Busy, "busy")
        hosted, client = edge.host._hosted["busy"], Raw(bridge, tokens[1]["admin"])
        client.send_request("POST", f"/e1/busy/{route}")
        assert begun.wait(10)
        link = bridge._registry.links["e1"]
        bridge.loop.call_soon_threadsafe(link.channel.close, "a test")
        assert client.reply()[0] == 503
        wait_until(lambda: bridge._registry.links.get("e1", link) is not link)
        may_end.set()
        assert closed.wait(10)
        wait_until(lambda: hosted.workers._idle and not hosted.tasks, 10)
    finally:
        may_end.set()
        edge.stop()
        bridge.stop()


def test_what_waits_for_room_on_a_link_of_version_1_is_not_lost_with_it(tokens, monkeypatch):
    monkeypatch.setattr(radical_edge, "WIRE_VERSIONS", (1,))
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens)

    def count():
        return sum(number for (name, _), number in bridge.records.counters._counts.items()
                   if name in ("notifications_total", "events_dropped_total"))

    try:
        link = bridge._registry.links["e1"]
        bridge.loop.call_soon_threadsafe(link.channel.pause_reading)
        while not edge._links[0]._pumping:        # the kernel takes some millions of bytes
            edge.host.notify("echo", "large", "x" * 50_000)
            time.sleep(0.001)
        for number in range(100):
            edge.host.notify("echo", "small", number)
        wait_until(lambda: not edge.journal.unwritten)
        waiting, before = edge.journal.last - edge.journal.first + 1, count()
        assert waiting >= 100
        bridge.loop.call_soon_threadsafe(link.channel.close, "a test")
        wait_until(lambda: count() - before >= waiting, 10)
    finally:
        edge.stop()
        bridge.stop()


@pytest.mark.parametrize("kind", ["whole", "stream"])
@pytest.mark.parametrize("value, status", [(5, 200), ("5", 200), ("5\r\nx-c: d", 500), (None, 500)])
def test_fields_of_a_plugin_of_the_bridges_own_harm_no_answer_but_their_own(
        bridge, raw, kind, value, status):
    class Own(Plugin):
        @get("whole")
        async def whole(self, request):
            return Response(b"12345", headers={"content-length": value})

        @get("stream")
        async def stream(self, request):
            return StreamingResponse([b"12345"], headers={"content-length": value})

    bridge._host.add(Own, "own")
    client = raw()
    client.send_request("GET", f"/bridge/own/{kind}")
    client.send_request("GET", "/bridge/own/version")            # pipelined
    found, fields, body = client.reply()
    assert (found, "x-c" in fields) == (status, False)
    assert status != 200 or body == b"12345"
    found, _, body = client.reply()
    assert found == 200 and "version" in json.loads(body)


def test_both_sides_notice_a_link_that_is_half_open(tokens):
    bridge = Bridge(port=0, tokens=tokens[0], heartbeat=0.2).start()
    relay = Relay(bridge._listener.server_address[1])
    edge = Edge(f"http://127.0.0.1:{relay.port}", "e1", plugins=["echo"], token=tokens[1]["edge"],
                heartbeat=0.2).start()
    try:
        assert edge.online.wait(10)
        wait_until(lambda: "e1" in bridge._registry.links)
        relay.frozen = True
        wait_until(lambda: "e1" not in bridge._registry.links)
        wait_until(lambda: edge._links[0].state.name != "OPEN")
        relay.frozen = False
        wait_until(lambda: "e1" in bridge._registry.links)
    finally:
        assert edge.stop()
        assert bridge.stop()
        relay.close()


def test_an_edge_goes_through_a_proxy_that_knows_the_bridge_by_name(bridge, tokens, monkeypatch):
    relay = Relay(bridge._listener.server_address[1], connect_host="bridge.test")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{relay.port}")
    monkeypatch.setenv("RADICAL_BRIDGE_INSECURE", "1")
    edge = Edge("http://bridge.test:8000", "far", plugins=["echo"],
                token=tokens[1]["edge"]).start()
    try:
        assert edge.online.wait(10)
        assert relay.asked == ["CONNECT bridge.test:8000 HTTP/1.1"]
        monkeypatch.setenv("no_proxy", "bridge.test")
        assert radical_edge.find_proxy(radical_edge.parse_bridge_url("http://bridge.test")) is None
    finally:
        assert edge.stop()
        relay.close()


def test_edge_and_client_work_under_a_path_prefix(bridge, tokens):
    relay = Relay(bridge._listener.server_address[1], prefix="/site/edge")
    url = f"http://127.0.0.1:{relay.port}/site/edge"
    edge = Edge(url, "e1", plugins=["echo"], token=tokens[1]["edge"]).start()
    try:
        assert edge.online.wait(10)
        assert radical_edge.list_edges(url=url) == ["e1"]
        assert relay.asked[0] == "GET /site/edge/register HTTP/1.1"
    finally:
        assert edge.stop()
        relay.close()


def test_a_client_does_not_send_its_token_in_the_clear():
    with pytest.raises(ValueError, match="unencrypted"):
        radical_edge.list_edges(url="http://bridge.example:8000", token="secret")


def test_the_bridge_hosts_plugins_itself(tokens):
    bridge = Bridge(port=0, tokens=tokens[0], plugins=["echo"]).start()
    try:
        client = Raw(bridge, tokens[1]["client"])
        assert json.loads(client.request("GET", "/bridge/echo/hello")[2])["user"] == "client-1"
        listener = Listener(Raw(bridge, tokens[1]["client"]))
        say_path = f"/bridge/echo/say/{new_session(client, 'bridge')}/x"
        assert client.request("GET", say_path)[0] == 200
        assert listener.notification()["edge"] == "bridge"
        edges = json.loads(client.request("POST", "/edge/list")[2])["data"]["edges"]
        assert edges["bridge"]["plugins"]["echo"]["namespace"] == "/bridge/echo"
        assert_error(client.request("GET", "/bridge/echo/crash"), 500)
        for connection in (client, listener.raw):
            connection.close()
    finally:
        assert bridge.stop()


def test_an_edge_is_told_to_end_and_does_not_come_back(bridge, tokens, raw):
    ended = threading.Event()
    edge = start_edge(bridge, tokens, on_end=ended.set)
    client = raw()
    wait_until(lambda: client.request("GET", "/e1/echo/hello")[0] == 200)
    assert json.loads(client.request("POST", "/edge/disconnect/e1")[2]) == {
        "status": "shutdown", "edge": "e1"}
    assert ended.wait(10)
    assert edge.stop()


def test_a_hostile_bridge_does_not_break_an_edge(tokens, home):
    """Whatever a bridge sends, the edge leaves it and tries again."""
    sync = needs_module("websockets.sync.server")
    nonsense = ["{", "[]", '{"type": "request"}', '{"type": "request", "req_id": 1}', b"\xc1",
                '{"type": "topology", "edges": 7}', '{"type": "error", "message": {"a": 1}}']
    connections = []

    def serve(link):
        link.recv(10)
        connections.append(link)
        if len(connections) <= len(nonsense):
            link.send(nonsense[len(connections) - 1])
        with contextlib.suppress(Exception):      # what it ignores, it goes on after
            link.recv(0.2)

    with sync.serve(serve, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        before = radical_edge.BACKOFF_S
        radical_edge.BACKOFF_S = (0.01, 0.02)
        edge = Edge(f"http://127.0.0.1:{server.socket.getsockname()[1]}", "e1", plugins=["echo"])
        edge.start()
        try:
            wait_until(lambda: len(connections) >= len(nonsense), 20)
        finally:
            radical_edge.BACKOFF_S = before
            assert edge.stop()
            server.shutdown()
            thread.join()


# ---------------------------------------------------------------------------
# What outlives a process: journals, answers, the state directory
# ---------------------------------------------------------------------------

@pytest.fixture
def journal(tmp_path):
    """Make journals of one directory, one after the other, as restarted processes do."""
    made = []

    def make(max_records=1000, max_bytes=1 << 20, **options):
        for earlier in made:
            earlier.close()
        made.append(radical_edge.Journal(tmp_path / "journal", max_records=max_records,
                                         max_bytes=max_bytes, **options))
        made[-1].open()
        return made[-1]

    yield make
    for item in made:
        item.close()


def written(journal, number):
    event = threading.Event()
    journal.when_written(number, event.set)
    assert event.wait(10)


def contents(journal):
    records = [journal.get(number) for number in range(journal.first, journal.last + 1)]
    return [(record.head, record.body) for record in records if record is not None]


def test_a_journal_is_read_by_the_next_process_and_its_numbers_go_on(journal):
    first = journal()
    begin = first.last
    assert abs(begin - time.time() * 1000) < 60_000
    for number in range(5):
        record = first.append(["topic", number], b'{"n":%d}' % number)
        assert record.number == begin + 1 + number
    second = journal()
    assert contents(second) == [(["topic", n], b'{"n":%d}' % n) for n in range(5)]
    assert second.append(["more"], b"1").number == begin + 6
    second.drop_until(begin + 6)
    assert contents(second) == [] and second.get(begin + 6) is None
    third = journal()                             # the numbers go on although nothing is left
    assert third.append(["again"], b"2").number >= begin + 7


def test_a_journal_keeps_within_its_bounds_and_counts_what_it_drops(journal, tmp_path,
                                                                    monkeypatch):
    monkeypatch.setattr(radical_edge.Journal, "SEGMENT", 2000)
    kept = journal(max_records=10)
    for number in range(100):
        last = kept.append([], b"%d" % number).number
        written(kept, last)
    assert [body for _, body in contents(kept)] == [b"%d" % n for n in range(90, 100)]
    assert kept.dropped == 90
    wait_until(lambda: len(list((tmp_path / "journal").iterdir())) <= 2)
    small = journal(max_bytes=3 * 1400)
    for _ in range(10):
        small.append([], b"x" * 1000)
    assert len(contents(small)) == 3


@pytest.mark.parametrize("damage", [
    lambda data: data + b"[17,\"half a rec",                  # killed in the middle of a write
    lambda data: data[:-3], lambda data: data.replace(b"[", b"{", 1),
    lambda data: b"\x00\xff\n" + data, lambda data: b"", lambda data: data + data,
    lambda data: data.replace(b"\t5\n", b"\t\0\n")])          # what a power cut leaves
def test_a_damaged_journal_loses_only_what_is_damaged(journal, tmp_path, damage, caplog):
    first = journal()
    for number in range(10):
        last = first.append(["t"], b"%d" % number).number
    first.close()
    (path,) = (tmp_path / "journal").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    second = journal()
    found = [int(body) for _, body in contents(second)]
    assert found == sorted(set(found)) and (len(found) >= 9 or not path.stat().st_size)
    assert second.append(["t"], b"10").number >= last - 9
    third = journal()
    assert [int(body) for _, body in contents(third)] == found + [10]


def test_half_a_record_at_the_begin_of_a_file_does_not_damage_the_next_one(journal, tmp_path,
                                                                           monkeypatch):
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)            # or it would begin a new file
    first = journal()
    begin = first.append(["t"], b"0").number
    first.close()
    (path,) = (tmp_path / "journal").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    second = journal()
    assert second.append(["t"], b"1").number == begin
    assert contents(journal()) == [(["t"], b"1")]


def test_a_journal_writes_all_however_little_the_system_takes_at_once(journal, monkeypatch):
    kept, real = journal(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(
        descriptor, data[:7] if descriptor == kept._descriptor else data))
    written(kept, kept.append(["topic"], b'"a text that is long enough"').number)
    written(kept, kept.append(["topic"], b"2").number)
    monkeypatch.undo()
    assert [body for _, body in contents(journal())] == [b'"a text that is long enough"', b"2"]


def test_a_disk_that_hangs_costs_no_more_memory_than_a_journal_keeps(journal, monkeypatch):
    kept, hangs, real = journal(max_records=20), threading.Event(), os.write

    def write(descriptor, data):
        if descriptor == kept._descriptor:
            assert hangs.wait(10)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(1000):
        last = kept.append([], b"%d" % number).number
    assert len(kept._unwritten) <= 20
    hangs.set()
    written(kept, last)
    assert [body for _, body in contents(journal())][-20:] == [b"%d" % n for n in range(980, 1000)]


def test_what_the_audit_log_cannot_take_is_counted_and_logged_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(radical_edge.AuditLog, "MAX_WAITING", 3)
    begun, may_write, real = threading.Event(), threading.Event(), radical_edge._write_all

    def write(descriptor, data):
        begun.set()
        assert may_write.wait(10)
        real(descriptor, data)

    monkeypatch.setattr(radical_edge, "_write_all", write)
    log = radical_edge.AuditLog(tmp_path / "audit.jsonl")
    log.open()
    try:
        log.write({"number": 0})
        assert begun.wait(10)
        for number in range(1, 21):
            log.write({"number": number})
        assert log.dropped == 17 and caplog.text.count("does not keep up") == 1
    finally:
        may_write.set()
        log.close()
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2, 3]


def test_what_waits_for_a_journal_cannot_stop_it(journal, caplog):
    kept = journal()
    kept.when_written(kept.append([], b"1").number + 1, lambda: 1 // 0)
    written(kept, kept.append([], b"2").number)
    wait_until(lambda: "ZeroDivisionError" in caplog.text)
    written(kept, kept.append([], b"3").number)
    assert len(contents(journal())) == 3


def test_a_journal_goes_on_after_numbers_that_were_used_but_not_written(journal):
    first = journal()
    begin = first.append(["t"], b"0").number
    second = journal()
    for number in (1, 2, 3):
        second.append(["t"], b"%d" % number)
    second.outrun(begin)                          # that one it has
    assert second.last == begin + 3
    second.outrun(begin + 1)
    second.outrun(begin + 1 + second.MAX_AHEAD * 2)              # nonsense
    assert second.append(["t"], b"4").number == begin + 5
    assert [body for _, body in contents(second)] == [b"0", b"1", b"2", b"3", b"4"]
    assert second.get(begin + 1) is None and second.get(begin + 2).body == b"1"
    written(second, begin + 5)
    second.drop_until(begin)
    third = journal()
    assert [body for _, body in contents(third)][-4:] == [b"1", b"2", b"3", b"4"]
    assert third.get(begin + 5).body == b"4" and third.append([], b"5").number == begin + 6


def test_a_journal_that_is_far_behind_keeps_its_own_records(journal):
    kept = journal(max_records=50)
    begin = kept.append(["t"], b"1").number
    kept.outrun(begin + 1_000_000)
    assert contents(kept) == [(["t"], b"1")] and kept.last == kept.first == begin + 1_000_001
    kept.drop_until(kept.last)
    kept.outrun(begin + 2_000_000)
    assert kept.append(["t"], b"2").number == begin + 2_000_001 and len(contents(kept)) == 1
    assert kept._size == kept.get(kept.last).size


def test_a_full_disk_stops_nothing_and_is_made_up_for_later(journal, monkeypatch, caplog):
    kept, full = journal(), threading.Event()
    real = os.write

    def write(descriptor, data):
        if full.is_set() and descriptor == kept._descriptor:
            real(descriptor, data[:5])            # some of it still fits
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    written(kept, kept.append([], b"1").number)
    full.set()
    written(kept, kept.append([], b"2").number)   # told nonetheless: it is sent from memory
    assert "No space left" in caplog.text
    full.clear()
    written(kept, kept.append([], b"3").number)
    assert [body for _, body in contents(journal())] == [b"1", b"2", b"3"]


def restarted(bridge, tokens, **options):
    port = bridge._listener.server_address[1]
    assert bridge.stop()
    return Bridge(port=port, tokens=tokens[0], **options).start()


def test_events_are_replayed_over_a_restart_of_the_bridge_without_a_gap(tokens):
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens)
    try:
        listener = Listener(Raw(bridge, tokens[1]["admin"]))
        for number in range(20):
            edge.host.notify("echo", "count", {"n": number})
        for number in range(10):
            assert listener.notification()["data"]["n"] == number
        listener.raw.close()
        wait_until(lambda: edge.journal.first > edge.journal.last)       # all acknowledged
        last_id = bridge._hub.log.last_id - 10
        bridge = restarted(bridge, tokens)
        assert bridge._hub.log.last_id == last_id + 10                # it never goes backwards
        listener = Listener(Raw(bridge, tokens[1]["admin"]), headers=[("Last-Event-ID", last_id)])
        assert [listener.notification()["data"]["n"] for _ in range(10)] == list(range(10, 20))
        listener.raw.close()
    finally:
        assert edge.stop()
        assert bridge.stop()


def test_what_is_gone_is_told_exactly(bridge, raw, monkeypatch):
    monkeypatch.setattr(bridge._journal, "_max_records", 5)
    log = bridge._hub.log
    begin = log.last_id
    for number in range(20):
        bridge._thread.submit(publish(bridge, number)).result()
    listener = Listener(raw(), headers=[("Last-Event-ID", str(begin + 3))])
    assert listener.read()["topic"] == "topology"
    gap = listener.read()
    assert gap["topic"] == "gap" and gap["data"] == {"from": begin + 4, "to": begin + 15}
    assert [listener.notification()["data"] for _ in range(5)] == list(range(15, 20))
    beyond = Listener(raw(), headers=[("Last-Event-ID", str(begin + 999))])
    beyond.read()
    assert beyond.read()["data"]["to"] == begin + 20


async def publish(bridge, data, **options):
    return bridge._hub.publish("e", "p", "t", data, **options)


def test_notifications_outlive_a_kill_of_their_edge(tokens, home):
    """The journal of an edge that was killed is sent by the next one."""
    state = home / "state"
    left = radical_edge.Journal(state / "notifications", max_records=9, max_bytes=10_000)
    left.open()
    for number in range(3):
        left.append(["echo", "count"], b'{"n":%d}' % number)
    left.close()
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    begin = bridge._hub.log.last_id
    edge = start_edge(bridge, tokens, state_dir=state)
    try:
        edge.host.notify("echo", "count", {"n": 3})
        listener = Listener(Raw(bridge, tokens[1]["admin"]), headers=[("Last-Event-ID", begin)])
        assert [listener.notification()["data"]["n"] for _ in range(4)] == [0, 1, 2, 3]
        wait_until(lambda: edge.journal.first > edge.journal.last)
        listener.raw.close()
    finally:
        assert edge.stop()
        assert bridge.stop()


def test_a_notification_that_is_sent_again_is_acknowledged_and_not_told_again(bridge, tokens, raw):
    listener = Listener(raw())
    listener.read()
    Kind = radical_edge.Kind
    for attempt in range(2):                      # the second link did not hear of the first's acks
        fake = FakeEdge2(bridge, tokens[1]["edge"], "f2")
        for number in (7, 8, 9)[:attempt + 2]:
            fake.say_wire(Kind.NOTIFICATION, 0, [number, "p", "t"], b'{"n":%d}' % number)
        assert wait_until(lambda: fake.hear_wire(Kind.ACK).number == 8 + attempt)
        fake.close()
        wait_until(lambda: not bridge._registry.links)
    assert [listener.notification()["number"] for _ in range(3)] == [7, 8, 9]
    assert FakeEdge2(bridge, tokens[1]["edge"], "f2").acked == 9


def test_a_new_link_is_not_told_that_safe_is_what_is_not_on_disk(bridge, tokens, raw, monkeypatch):
    listener, may_write, real = Listener(raw()), threading.Event(), os.write
    listener.read()
    Kind = radical_edge.Kind

    def write(descriptor, data):
        if descriptor == bridge._journal._descriptor:
            assert may_write.wait(30)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    first = FakeEdge2(bridge, tokens[1]["edge"], "f2")
    first.say_wire(Kind.NOTIFICATION, 0, [7, "p", "t"], b"7")
    wait_until(lambda: bridge._hub.log.seen("f2", "i") == 7)
    second = FakeEdge2(bridge, tokens[1]["edge"], "f2")
    assert (second.acked, second.known) == (0, 7)
    for number in (7, 8):
        second.say_wire(Kind.NOTIFICATION, 0, [number, "p", "t"], b"%d" % number)
    may_write.set()
    wait_until(lambda: second.hear_wire(Kind.ACK).number == 8)
    assert [listener.notification()["number"] for _ in range(2)] == [7, 8]
    first.close()
    second.close()


def test_notifications_with_numbers_that_a_killed_process_had_used_arrive(tokens, home):
    """An edge was killed before what it had sent was on its disk: its numbers are behind."""
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens, state_dir=home / "state")
    listener = Listener(Raw(bridge, tokens[1]["admin"]))
    try:
        for number in range(3):
            edge.host.notify("echo", "count", {"n": number})
        assert [listener.notification()["data"]["n"] for _ in range(3)] == [0, 1, 2]
        assert edge.stop()
        (path,) = (home / "state/notifications").iterdir()
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
        edge = Edge(bridge.url, "e1", plugins=["echo"], token=tokens[1]["edge"],
                    state_dir=home / "state").start()
        for number in range(3, 8):                # perhaps before it has registered
            edge.host.notify("echo", "count", {"n": number})
        assert [listener.notification()["data"]["n"] for _ in range(5)] == [3, 4, 5, 6, 7]
        wait_until(lambda: edge.journal.first > edge.journal.last)
    finally:
        listener.raw.close()
        assert edge.stop()
        assert bridge.stop()


def test_an_event_is_told_when_it_is_in_the_journal_and_not_before(bridge, raw, monkeypatch):
    listener, may_write, real = Listener(raw()), threading.Event(), os.write
    listener.read()

    def write(descriptor, data):
        if descriptor == bridge._journal._descriptor:
            assert may_write.wait(10)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    bridge._thread.submit(publish(bridge, 1)).result()
    listener.raw.sock.settimeout(0.2)
    with pytest.raises(socket.timeout):
        listener.notification()
    listener.raw.sock.settimeout(10)
    may_write.set()
    assert listener.notification()["data"] == 1


def test_batches_that_are_kept_for_subscribers_have_a_bound(bridge):
    log = bridge._hub.log

    async def look():
        for number in range(1000):
            await publish(bridge, number)
        begin = log.first_id - 1
        await asyncio.get_running_loop().run_in_executor(None, written, bridge._journal,
                                                         log.last_id)
        for number in range(1000):
            assert log.batch(begin + number, ("", "", ""))[0] > begin + number
        return len(log._batches)

    assert bridge._thread.submit(look()).result(30) == log.BATCHES


def test_a_subscriber_who_wants_little_of_much_holds_up_nobody(bridge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge.EventLog, "BATCH_LOOK", 10)
    begin = bridge._hub.log.last_id
    for number in range(95):
        bridge._thread.submit(publish(bridge, number)).result()
    bridge._thread.submit(publish(bridge, "wanted")).result()
    rounds, real = [], radical_edge.EventHub._serve
    monkeypatch.setattr(radical_edge.EventHub, "_serve",
                        lambda *args: (rounds.append(1), real(*args)))
    none = Listener(raw(), "/events?topic=other", headers=[("Last-Event-ID", str(begin))])
    none.read()
    (subscriber,) = bridge._hub.subscribers
    wait_until(lambda: subscriber.position == begin + 96)
    assert len(rounds) >= 9                       # others had their turn in between
    some = Listener(raw(), "/events?topic=t", headers=[("Last-Event-ID", str(begin))])
    assert [some.notification()["data"] for _ in range(96)] == [*range(95), "wanted"]


@pytest.mark.parametrize("topic", ["a\nb", "x" * 257, None, b"bytes", "\ud800"])
def test_a_topic_that_no_bridge_takes_is_dropped_at_the_edge(tokens, topic, caplog):
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens)
    listener = Listener(Raw(bridge, tokens[1]["admin"]))
    try:
        edge.host.notify("echo", topic, {"n": 1})
        edge.host.notify("echo", "count", {"n": 2})
        assert listener.notification()["data"] == {"n": 2}
        assert "was dropped" in caplog.text
    finally:
        listener.raw.close()
        assert edge.stop()
        assert bridge.stop()


def test_a_notification_larger_than_the_bridge_takes_is_dropped_and_acknowledged(
        fake_edge2, bridge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_NOTIFICATION", 1000)
    listener = Listener(raw())
    Kind = radical_edge.Kind
    fake_edge2.say_wire(Kind.NOTIFICATION, 0, [7, "p", "t"], b'"%s"' % (b"x" * 1000))
    assert fake_edge2.hear_wire(Kind.ACK).number == 7
    fake_edge2.say_wire(Kind.NOTIFICATION, 0, [8, "p", "t"], b"8")
    assert fake_edge2.hear_wire(Kind.ACK).number == 8
    assert listener.notification()["data"] == 8
    assert b'events_dropped_total{reason="size"} 1' in raw().request("GET", "/metrics")[2]


@pytest.mark.parametrize("head, body", [
    ([0, "p", "t"], b"1"), ([-1, "p", "t"], b"1"), ([1 << 64, "p", "t"], b"1"),
    ([True, "p", "t"], b"1"), (["1", "p", "t"], b"1"), ([1, 2, "t"], b"1"), ([1, "p"], b"1"),
    ([1, "p", "t"], b""), ([1, "p", "t"], b"{"), ([1, "p", "t"], b"NaN"), ([1, "p", "t"], b"\xff"),
    ([1, "p", "t"], b"[" * 100_000)])
def test_a_notification_of_nonsense_ends_its_link_and_nothing_else(fake_edge2, bridge, raw, head,
                                                                  body):
    before = bridge._hub.log.last_id
    fake_edge2.say_wire(radical_edge.Kind.NOTIFICATION, 0, head, body)
    with pytest.raises((AssertionError, ConnectionError)):
        fake_edge2.hear_wire(radical_edge.Kind.ACK)
    assert raw().request("GET", "/health")[0] == 200
    assert bridge._hub.log.last_id == before


def test_answers_that_are_kept_have_bounds(counting, raw, edge, monkeypatch):
    client, store = raw(), edge._once
    monkeypatch.setattr(radical_edge, "MAX_ONCE", 5)
    for number in range(12):
        client.request("POST", "/e1/c/run/a", headers=key(f"k{number}"))
    assert len(store._entries) == 5
    runs = len(counting.runs)
    client.request("POST", "/e1/c/run/a", headers=key("k11"))
    assert len(counting.runs) == runs             # the latest are known
    monkeypatch.setattr(store._journal, "_max_bytes", 3000)
    for number in range(12):
        client.request("POST", "/e1/c/run/a", headers=key(f"l{number}"))
    assert len(store._entries) < 5


def test_an_edge_sends_no_more_notifications_than_may_be_on_their_way(tokens, monkeypatch):
    """Replies queue behind few of them: without acknowledgements only NOTIFY_WINDOW are sent."""
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens)
    try:
        monkeypatch.setattr(radical_edge.EdgeLink, "acknowledge", lambda link, written: False)
        begin = bridge._hub.log.last_id
        for number in range(1000):
            edge.host.notify("echo", "count", {"n": number})
        log = bridge._hub.log
        wait_until(lambda: log.last_id - begin >= radical_edge.NOTIFY_WINDOW)
        client = Raw(bridge, tokens[1]["admin"])
        for _ in range(20):
            assert client.request("GET", "/e1/echo/hello")[0] == 200
        assert log.last_id - begin <= radical_edge.NOTIFY_WINDOW + 1
        client.close()
    finally:
        assert edge.stop()
        assert bridge.stop()


class Counting(Plugin):
    """Counts how often its handlers run."""

    def __init__(self, app, instance_name=None):
        super().__init__(app, instance_name)
        self.runs = []
        self.may_go = threading.Event()

    @post("run/{name}")
    async def run(self, request):
        self.runs.append(request.path_params["name"])
        return {"run": len(self.runs)}

    @post("slow")
    def slow(self, request):
        self.runs.append("slow")
        assert self.may_go.wait(30)
        return {"run": len(self.runs)}

    @post("fails/{status}")
    async def fails(self, request):
        self.runs.append("fails")
        later = request.query_params.get("later")
        raise EdgeError("as you asked", int(request.path_params["status"]),
                        headers={"Retry-After": later} if later else None)

    @post("again")
    @radical_edge.repeatable
    async def again(self, request):
        self.runs.append(request.idempotency_key)
        return {}


@pytest.fixture
def counting(edge, raw):
    made = edge.host.add(Counting, "c")
    client = raw()
    wait_until(lambda: client.request("GET", "/e1/c/version")[0] == 200)
    return made


def key(text):
    return [("Idempotency-Key", text)]


def test_a_request_with_a_key_runs_once(counting, raw, tokens):
    client = raw()
    first = client.request("POST", "/e1/c/run/a", headers=key("k1"))
    again = client.request("POST", "/e1/c/run/a", headers=key("k1"))
    assert json.loads(first[2]) == json.loads(again[2]) == {"run": 1}
    assert again[1]["x-idempotent-replay"] == "true" and "x-idempotent-replay" not in first[1]
    assert_error(client.request("POST", "/e1/c/run/b", headers=key("k1")), 422, "another request")
    assert_error(client.request("POST", "/e1/c/run/a", b"{}", key("k1")), 422, "another request")
    assert json.loads(client.request("POST", "/e1/c/run/a", headers=key("k2"))[2]) == {"run": 2}
    other = raw(tokens[1]["client"])              # keys are each token's own
    assert json.loads(other.request("POST", "/e1/c/run/a", headers=key("k1"))[2]) == {"run": 3}
    assert json.loads(client.request("POST", "/e1/c/run/a")[2]) == {"run": 4}


def test_a_retry_that_comes_too_early_gets_the_same_answer(counting, raw):
    clients = [raw() for _ in range(5)]
    for client in clients:
        client.send_request("POST", "/e1/c/slow", headers=key("k"))
    wait_until(lambda: counting.runs)
    clients[0].close()                            # its going away cancels nothing
    counting.may_go.set()
    assert [json.loads(client.reply()[2]) for client in clients[1:]] == [{"run": 1}] * 4


def test_an_error_is_an_answer_too_but_not_one_that_says_not_now(counting, raw):
    client = raw()
    for _ in range(2):
        assert_error(client.request("POST", "/e1/c/fails/409", headers=key("k")), 409)
    assert len(counting.runs) == 1
    for _ in range(2):
        assert_error(client.request("POST", "/e1/c/fails/503", headers=key("l")), 503)
    assert len(counting.runs) == 3
    for _ in range(2):                            # any answer that names a time to come back
        assert_error(client.request("POST", "/e1/c/fails/409?later=1", headers=key("m")), 409)
    assert len(counting.runs) == 5


def test_answers_are_kept_over_a_restart_of_the_edge(bridge, tokens, raw, home, monkeypatch):
    state, client = home / "state", raw()

    def start(fails):
        edge = start_edge(bridge, tokens, state_dir=state)
        made = edge.host.add(Counting, "c")
        if fails:                                 # as if it were killed before it answered
            monkeypatch.setattr(radical_edge._OnceCall, "respond", lambda *_: None)
        wait_until(lambda: client.request("GET", "/e1/c/version")[0] == 200)
        return edge, made

    edge, made = start(fails=False)
    assert client.request("POST", "/e1/c/run/a", headers=key("done"))[0] == 200
    monkeypatch.setattr(radical_edge._OnceCall, "respond", lambda *_: None)
    for path in ("run/a", "again"):
        other = raw()
        other.send_request("POST", f"/e1/c/{path}", headers=key(f"begun {path}"))
    wait_until(lambda: len(made.runs) == 3)
    assert edge.stop()
    monkeypatch.undo()
    edge, made = start(fails=False)
    try:
        reply = client.request("POST", "/e1/c/run/a", headers=key("done"))
        assert json.loads(reply[2]) == {"run": 1} and made.runs == []
        reply = client.request("POST", "/e1/c/run/a", headers=key("begun run/a"))
        assert_error(reply, 409, "may have been done")
        assert client.request("POST", "/e1/c/again", headers=key("begun again"))[0] == 200
        assert made.runs == ["begun again"]
    finally:
        assert edge.stop()


def test_a_request_waits_for_an_edge_that_comes_back(bridge, fake_edge, raw):
    keys = {"idempotency_key": True}              # it runs a request with the same key once
    fake = fake_edge("f1", instance="i", endpoint=keys)
    clients = [raw() for _ in range(4)]
    fake.hear("topology")
    clients[0].send_request("GET", "/f1/p/begun")
    clients[1].send_request("POST", "/f1/p/keyed", b"body", key("k"))
    clients[2].send_request("POST", "/f1/p/lost", b"body")
    for _ in range(3):
        fake.hear("request")
    fake.close()
    assert_error(clients[2].reply(), 503, "look before")         # it may have been done
    edges = json.loads(clients[2].request("GET", "/edges")[2])["edges"]
    assert [(edge["name"], edge["connected"]) for edge in edges] == [("f1", False)]
    clients[3].send_request("GET", "/f1/p/new")
    wait_until(lambda: len(bridge._registry.absent["f1"].waiting) == 3)
    fake = fake_edge("f1", instance="i")
    asked = {}
    for _ in range(3):
        request = fake.hear("request")
        asked[request["path"]] = request["body"]
        fake.say(type="response", req_id=request["req_id"], status=200, body=request["path"])
    assert asked == {"/p/begun": None, "/p/keyed": "body", "/p/new": None}
    assert [clients[n].reply()[2] for n in (0, 1, 3)] == [b"/p/begun", b"/p/keyed", b"/p/new"]


@pytest.mark.parametrize("instance, status", [("", 200), ("i", 503)])
def test_an_upload_waits_for_an_older_edge_too(bridge, fake_edge, raw, instance, status):
    """It is not sent in part to an edge that takes only whole bodies."""
    register = {"instance": instance, "wire": [1]} if instance else {}
    fake, client = fake_edge("f1", **register), raw()
    fake.hear("topology")
    fake.close()
    wait_until(lambda: "f1" in bridge._registry.absent)
    client.send_request("POST", "/f1/p/up", b"x" * 100_000)
    wait_until(lambda: bridge._registry.absent["f1"].waiting)
    fake = fake_edge("f1", **register)
    if status == 200:
        request = fake.hear("request")
        assert request["body"] == "x" * 100_000
        fake.say(type="response", req_id=request["req_id"], status=200)
    assert client.reply()[0] == status


# ---------------------------------------------------------------------------
# Peers of radical.edge 0.x and radical.orbit 0.2 (tests/test_compat.py has the real ones)
# ---------------------------------------------------------------------------

def test_a_keyed_post_is_not_sent_again_to_an_edge_that_does_not_know_keys(bridge, fake_edge, raw):
    fake, client = fake_edge("f1"), raw()
    fake.hear("topology")
    client.send_request("POST", "/f1/p/run", b"body", key("k"))
    fake.hear("request")
    fake.close()
    assert_error(client.reply(), 503, "may have been done")


def test_a_client_asks_before_it_repeats_a_post_that_may_have_arrived(bridge, fake_edge, tokens):
    """Behind the relay is an edge that knows keys, then one that does not."""
    relay = Relay(bridge._listener.server_address[1])
    url = f"http://127.0.0.1:{relay.port}"
    replies = queue.Queue()

    def post(name):
        try:
            replies.put(radical_edge.call(name, "p", "run", {}, url=url))
        except EdgeError as error:
            replies.put(error)

    try:
        for name, endpoint in (("new", {"idempotency_key": True}), ("old", {"type": "x"})):
            fake = fake_edge(name, endpoint=endpoint)
            fake.hear("topology")
            thread = threading.Thread(target=post, args=(name,))
            thread.start()
            first = fake.hear("request")
            relay.cut()
            if name == "new":
                again = fake.hear("request")
                assert again["headers"]["idempotency-key"] == first["headers"]["idempotency-key"]
                fake.say(type="response", req_id=again["req_id"], status=200, body={"a": 1})
            thread.join(20)
            reply = replies.get(timeout=1)
        assert reply.status == 503 and "look before you try again" in reply.detail
        assert bridge._registry.links["old"].requests._counter == 1
    finally:
        relay.close()


def test_a_message_that_an_older_edge_cannot_take_is_413(bridge, fake_edge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_OLD_MESSAGE", 5000)
    fake, client = fake_edge("f1"), raw()
    fake.hear("topology")
    for body in (b"x" * 5000, b"\xff" * 5000):
        assert_error(client.request("POST", "/f1/p/up", body), 413, "5000")
    client.send_request("POST", "/f1/p/up", b"\0" * 2000)        # six times as long in JSON
    opcode, payload = fake.next_message()
    request = radical_edge.parse_msgpack(payload)
    assert (opcode, request["body"]) == (Opcode.BINARY, b"\0" * 2000)
    fake.say(type="response", req_id=request["req_id"], status=200)
    assert client.reply()[0] == 200
    client.send_request("POST", "/f1/p/up", b"x" * 4000)
    request = fake.hear("request")
    fake.say(type="response", req_id=request["req_id"], status=200)
    assert client.reply()[0] == 200


def test_an_older_edge_may_be_silent_for_many_heartbeats(tokens):
    """Its plugins run where its heartbeat does; whether its host is alive the system knows."""
    needs("system", hasattr(socket, "TCP_USER_TIMEOUT"), "a limit to unacknowledged time")
    bridge = Bridge(port=0, tokens=tokens[0], heartbeat=0.1).start()
    old = FakeEdge(bridge, tokens[1]["edge"], "old")
    new = FakeEdge(bridge, tokens[1]["edge"], "new", wire=[1])
    try:
        link = wait_until(lambda: bridge._registry.links.get("old"))
        assert new.hear("registered")
        wait_until(lambda: "new" not in bridge._registry.links)
        wait_until(lambda: time.monotonic() - link._last_received > 1)
        assert bridge._registry.links["old"] is link
        assert link.channel.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0
    finally:
        old.close()
        new.close()
        assert bridge.stop()


def test_an_edge_of_radical_orbit_says_endpoint(bridge, fake_edge, raw):
    fake, client = fake_edge(None, endpoint_name="o1"), raw()
    assert fake.hear("topology")["endpoints"] == {"o1": {"plugins": ["p"]}}
    fake.say(type="topology", endpoints={"o1": {"plugins": {"q": {"type": "q"}}}})
    assert fake.hear("topology")["endpoints"] == {"o1": {"plugins": ["q"]}}
    described = json.loads(client.request("POST", "/edge/list")[2])["data"]["edges"]["o1"]
    assert described["plugins"]["q"]["namespace"] == "/o1/q"
    again = fake_edge(None, endpoint_name="o1")
    assert "already used" in again.hear("error")["message"]


def test_our_edge_is_known_to_a_bridge_of_radical_orbit(home):
    class Watcher(Plugin):
        seen = queue.Queue()

        async def on_topology_change(self, edges):
            self.seen.put(edges)

    with websockets_bridge() as (url, links), running_edge(url) as edge:
        link = links.get(timeout=10)
        assert json.loads(link.recv(10))["endpoint_name"] == "e9"
        edge.host.add(Watcher, "watcher")
        link.send(json.dumps({"type": "topology", "endpoints": {"x": {"plugins": ["p"]}}}))
        assert edge.online.wait(10)
        wait_until(lambda: not Watcher.seen.empty() or link.send(json.dumps(
            {"type": "topology", "endpoints": {"x": {"plugins": ["p"]}}})))
        assert Watcher.seen.get(timeout=10) == {"x": {"plugins": ["p"]}}


def test_a_body_of_msgpack_is_read_where_json_is(edge, raw):
    client = raw()
    packed = [("Content-Type", "application/msgpack")]
    body = radical_edge.encode_msgpack({"tasks": {"uid": "t1"}, "n": 7, "on": True})
    reply = client.request("POST", "/e1/echo/json", body, packed)
    assert json.loads(reply[2]) == {"got": {"tasks": {"uid": "t1"}, "n": 7, "on": True}}
    assert_error(client.request("POST", "/e1/echo/json", body[:-1], packed), 400, "msgpack")
    assert_error(client.request("POST", "/e1/echo/json", b"{}", packed), 400, "msgpack")


@pytest.mark.parametrize("body", [b'{"a": NaN}', b"[Infinity]", b"-Infinity"])
def test_a_body_with_a_number_that_json_lacks_is_400(edge, raw, body):
    assert_error(raw().request("POST", "/e1/echo/json", body), 400, "JSON")


@pytest.mark.parametrize("text", ["\ud800", "\udcff", "a\udfffb"])
def test_half_a_surrogate_pair_goes_through_answers_errors_and_notifications(edge, raw, text):
    # it has no UTF-8: an error that quoted one was never answered at all
    client, body = raw(), json.dumps({"text": text}).encode()
    reply = client.request("POST", "/e1/echo/json", body)
    assert (reply[0], json.loads(reply[2])) == (200, {"got": {"text": text}})
    reply = client.request("POST", "/e1/echo/refuse", body)
    assert (reply[0], json.loads(reply[2])["detail"]) == (422, f"no {text} here")
    listener = Listener(raw())
    edge.host.notify("echo", "odd", {"text": text})
    told = listener.notification()
    assert told["topic"] == "odd" and told["data"]["text"].strip("ab") in (text.strip("ab"), "?")


def test_the_bridge_that_users_of_radical_edge_have_in_their_home_is_found(home):
    folder = home / ".radical/edge"
    assert radical_edge.default_bridge() == ("http://127.0.0.1:8000", None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bridge.url").write_text("https://bridge.example.org:8000\n")
    assert radical_edge.default_bridge() == ("https://bridge.example.org:8000", None)
    (folder / "bridge_cert.pem").write_text("...")
    assert radical_edge.find_bridge().cert == str(folder / "bridge_cert.pem")
    (folder / "url").write_text("https://127.0.0.1:9 sha256:ab\n")      # a bridge of ours is newer
    assert radical_edge.default_bridge() == ("https://127.0.0.1:9", "sha256:ab")


def test_an_edge_that_stays_away_is_503_in_the_end_and_one_that_left_at_once(
        tokens, fake_edge, bridge, raw, monkeypatch):
    monkeypatch.setattr(bridge._registry, "_grace", 0.3)
    fake, client = fake_edge("f1"), raw()
    fake.hear("topology")
    fake.close()
    wait_until(lambda: "f1" in bridge._registry.absent)
    assert_error(client.request("GET", "/f1/p/x"), 503, "has not come back")
    assert_error(client.request("GET", "/f1/p/x"), 404)
    fake = fake_edge("f1")
    fake.hear("topology")
    fake.send(encode_close(1001, "bye", mask=b"abcd"))
    wait_until(lambda: client.request("GET", "/f1/p/x")[0] == 404)


def test_somebody_else_with_the_same_name_does_not_get_the_waiting_requests(bridge, fake_edge, raw):
    fake, client = fake_edge("f1", instance="i"), raw()
    fake.hear("topology")
    fake.close()
    wait_until(lambda: "f1" in bridge._registry.absent)
    client.send_request("POST", "/f1/p/secret", b"for i alone")
    wait_until(lambda: bridge._registry.absent["f1"].waiting)
    fake_edge("f1", instance="j").hear("topology")
    assert_error(client.reply(), 503)


# -- the state directory

def lock_in(folder, lost=lambda: None):
    return radical_edge.StateLock(folder, lost)


def owner(**changed):
    """The text of a lock whose owner is this process, but for `changed`."""
    own = {"host": socket.gethostname(), "pid": os.getpid(), "key": "k",
           "started": radical_edge.process_start(os.getpid())}
    return json.dumps({**own, **changed})


def test_a_state_directory_has_one_process(tmp_path):
    folder = tmp_path / "state"
    first = lock_in(folder)
    first.acquire()
    with pytest.raises(radical_edge.Conflict, match=f"process {os.getpid()} "):
        lock_in(folder).acquire()
    first.release()
    second = lock_in(folder)
    second.acquire()
    second.release()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("text", [
    owner(pid=2 ** 22 + 1), owner(started=12345), owner(pid=1, started=5),
    owner(pid=2 ** 22 + 1, machine=radical_edge.machine_id())])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    lock = lock_in(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("text", [owner(host="login2", pid=1), "{half", "", "[]",
                                  owner(machine="of the same name", pid=2 ** 22 + 1)])
def test_a_lock_of_another_host_holds_until_it_is_not_touched_any_more(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(radical_edge.Conflict):
        lock_in(tmp_path).acquire()
    long_ago = time.time() - radical_edge.StateLock.STALE_S - 1
    os.utime(tmp_path / "lock", (long_ago, long_ago))
    lock = lock_in(tmp_path)
    lock.acquire()
    lock.release()


def test_one_of_many_processes_gets_a_stale_lock(tmp_path):
    (tmp_path / "lock").write_text(owner(pid=2 ** 22 + 1))
    program = ("import sys, radical_edge, pathlib\n"
               "lock = radical_edge.StateLock(pathlib.Path(sys.argv[1]), lambda: None)\n"
               "sys.stdin.readline()\n"
               "try: lock.acquire(); print('mine', flush=True)\n"
               "except radical_edge.EdgeError: print('taken', flush=True)\n"
               "sys.stdin.readline(); lock.release()")
    racers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(6)]
    for _ in range(2):
        for racer in racers:
            racer.stdin.write("\n")
            racer.stdin.flush()
        if _ == 0:
            found = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate(timeout=20)
    assert sorted(found) == ["mine"] + ["taken"] * 5


def test_who_has_lost_its_state_directory_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(radical_edge.StateLock, "BEAT_S", 0.05)
    lost = threading.Event()
    lock = lock_in(tmp_path, lost.set)
    lock.acquire()
    (tmp_path / "lock").write_text(owner(key="another"))
    assert lost.wait(10)
    lock.release()
    assert (tmp_path / "lock").exists()           # it is the other's now


def test_a_second_edge_of_the_same_name_says_who_has_it(start, home):
    start("--bridge", "--port", "0", expect="bridge: http")
    start("--edge", "--name", "site", expect="edge: site")
    said = run("--edge", "--name", "site", status=1)
    assert "belongs to process" in said and "--name" in said
    run("--bridge", "--port", "0", status=1)


def test_a_frozen_edge_is_replaced_by_a_new_process_of_its_name(start, home):
    start("--bridge", "--port", "0", expect="bridge: http")
    frozen = start("--edge", "--name", "site", expect="edge: site")
    wait_until(lambda: "site" in run("--list"))
    os.kill(frozen.process.pid, signal.SIGSTOP)
    start("--edge", "--name", "site", expect="edge: site")
    assert json.loads(run("--call", "site/sysinfo/homedir")) == {"homedir": str(home)}
    assert frozen.process.wait(10) == -signal.SIGKILL


# -- clients that go on

def test_a_post_that_lost_its_connection_is_sent_again_and_runs_once(tokens):
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    edge = start_edge(bridge, tokens)
    made = edge.host.add(Counting, "c")
    client = BridgeClient(bridge.url, token=tokens[1]["admin"])
    answers = []
    try:
        wait_until(lambda: client.http.get("/e1/c/version").status_code == 200)
        thread = threading.Thread(target=lambda: answers.append(client.http.post("/e1/c/slow")))
        thread.start()
        wait_until(lambda: made.runs)
        bridge = restarted(bridge, tokens)
        made.may_go.set()
        thread.join(30)
        assert answers[0].json() == {"run": 1}
    finally:
        client.close()
        assert edge.stop()
        assert bridge.stop()


def test_clients_and_events_go_on_at_another_bridge(tokens):
    bridges = [Bridge(port=0, tokens=tokens[0], state_dir=Path(os.environ["HOME"], name)).start()
               for name in ("b1", "b2")]
    edge = Edge([bridge.url for bridge in bridges], "e1", plugins=["echo"],
                token=tokens[1]["edge"]).start()
    urls, found = ",".join(bridge.url for bridge in bridges), queue.Queue()
    client = BridgeClient(urls, token=tokens[1]["admin"])
    try:
        wait_until(lambda: all("e1" in bridge._registry.links for bridge in bridges))
        client.register_callback(callback=lambda *event: found.put(event[3]["n"]))
        for number in range(5):
            edge.host.notify("echo", "count", {"n": number})
        assert [found.get(timeout=10) for _ in range(5)] == list(range(5))
        for number in range(5, 10):               # told by the other one, as this one dies
            edge.host.notify("echo", "count", {"n": number})
        wait_until(lambda: edge.journal.first > edge.journal.last)
        assert bridges[0].stop()
        for number in range(10, 15):
            edge.host.notify("echo", "count", {"n": number})
        assert [found.get(timeout=20) for _ in range(10)] == list(range(5, 15))
        assert client.http.get("/e1/echo/hello").status_code == 200
        assert radical_edge.call("e1", "echo", "hello", url=urls, token=tokens[1]["admin"])
        assert radical_edge.list_edges(url=urls, token=tokens[1]["admin"]) == ["e1"]
    finally:
        client.close()
        assert edge.stop()
        for bridge in bridges[1:]:
            assert bridge.stop()


def test_no_bridge_at_all_is_said_at_once():
    begin = time.monotonic()
    with pytest.raises(radical_edge.Unavailable, match="nothing listens"):
        radical_edge.list_edges(url="http://127.0.0.1:9,http://localhost:9", token="t")
    assert time.monotonic() - begin < radical_edge.RETRY_S / 2


def test_the_client_streams_a_file_up_and_down(streaming, bridge, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"".join(pieces_of(3_000_000)))
    streaming.file = path
    with BridgeClient(bridge.url) as client:
        with open(path, "rb") as file:
            answer = client.http.request("PUT", "/e1/s/hash", content=file)
        assert answer.json()["sha256"] == digest_of(3_000_000)
        with client.http.stream("GET", "/e1/s/file", headers={"Range": "bytes=5-"}) as reply:
            assert reply.read() == path.read_bytes()[5:]
        with pytest.raises(radical_edge.NotFound):
            with client.http.stream("GET", "/e1/s/none"):
                pass


# ---------------------------------------------------------------------------
# The client
# ---------------------------------------------------------------------------

def test_the_functions_find_bridge_and_token_by_themselves(edge, bridge, home):
    radical_edge.write_private(home / ".radical/edge/url", bridge.url + "\n")
    assert radical_edge.list_edges() == ["e1"]
    assert radical_edge.list_plugins("e1")["echo"]["type"] == "echo"
    assert radical_edge.call("e1", "echo", "hello", params={"a": 1})["query"] == {"a": "1"}
    assert radical_edge.call("e1", "echo", "json", {"b": [2]}) == {"got": {"b": [2]}}
    with pytest.raises(radical_edge.NotFound, match="there are: e1"):
        radical_edge.list_plugins("e2")


def test_an_error_carries_status_detail_and_request_id(edge, bridge):
    with pytest.raises(radical_edge.Conflict) as caught:
        radical_edge.call("e1", "echo", "fail/409", url=bridge.url)
    assert (caught.value.status, caught.value.detail) == (409, "as you asked")
    assert radical_edge.REQUEST_ID_PATTERN.fullmatch(caught.value.request_id)
    assert isinstance(caught.value, RuntimeError)
    with pytest.raises(radical_edge.Unavailable, match="is the bridge running"):
        radical_edge.list_edges(url="http://127.0.0.1:1")


def test_a_client_keeps_its_connection(edge, bridge):
    with BridgeClient(bridge.url) as client:
        echo = client.get_edge_client("e1").get_plugin("echo")
        for _ in range(20):
            assert echo._get("hello")["user"] == "admin-1"
        assert len(bridge.connections) <= 2       # the client's and the edge's
        echo.close()


def test_a_client_keeps_its_connections_also_beside_very_many_files(edge, bridge):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("needs 2,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    files = [os.dup(1) for _ in range(1100)]
    try:
        with BridgeClient(bridge.url) as client:
            for _ in range(2):
                assert client.list_edges() == ["e1"]
            ((_, connection),) = client.http._idle
            assert connection.sock.fileno() > 1024
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_connection_is_not_opened_again_in_another_way_than_ours(bridge):
    connection = radical_edge.connect(radical_edge.find_bridges(bridge.url)[0])
    connection.close()
    with pytest.raises(http.client.NotConnected):
        connection.request("GET", "/health")


def test_a_client_is_used_by_many_threads(edge, bridge):
    found = []
    with BridgeClient(bridge.url) as client:
        def work(number):
            for _ in range(10):
                reply = client.http.post("/e1/echo/json", json={"n": number})
                found.append(reply.json()["got"]["n"] == number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 160


def test_no_event_is_missed_between_subscribing_and_acting(edge, bridge):
    for number in range(20):
        with BridgeClient(bridge.url) as client:
            echo, said = client.get_edge_client("e1").get_plugin("echo"), []
            echo.register_notification_callback(lambda *args: said.append(args[3]), topic="said")
            echo._get(f"say/{echo.sid}/{number}")
            wait_until(lambda: said)
            assert said == [{"text": str(number)}]
            echo.close()


def test_callbacks_are_called_by_edge_plugin_and_topic(edge, bridge, fake_edge):
    fake = fake_edge("f1")
    fake.hear("topology")
    with BridgeClient(bridge.url) as client:
        calls = {name: [] for name in ("all", "edge", "plugin", "topic", "none")}

        def collect(name):
            return lambda *args: calls[name].append(args)

        client.register_callback(callback=collect("all"))
        client.register_callback("f1", callback=collect("edge"))
        client.register_callback(plugin_name="p", callback=collect("plugin"))
        client.register_callback(topic="t", callback=lambda *args: 1 / 0)        # harms nobody
        client.register_callback("f1", "p", "t", collect("topic"))
        client.register_callback("f1", "p", "other", collect("none"))
        gone = collect("none")
        client.register_callback(callback=gone)
        client.unregister_callback(callback=gone)
        fake.say(type="notification", plugin="p", topic="t", data={"n": 1})
        wait_until(lambda: calls["topic"])
        wanted = [("f1", "p", "t", {"n": 1})]
        assert calls == {"all": wanted, "edge": wanted, "plugin": wanted, "topic": wanted,
                         "none": []}


def test_a_callback_that_was_taken_back_is_not_called_any_more(bridge, fake_edge):
    with BridgeClient(bridge.url) as client:
        plugin = radical_edge.PluginClient(client.http, "/f1/p", bridge_client=client, edge_id="f1",
                                           plugin_name="p")
        calls, topologies = [], []

        def taken_back(*args):
            calls.append("taken back")

        plugin.register_notification_callback(taken_back, "t")
        plugin.register_notification_callback(lambda *args: calls.append("stays"), "t")
        plugin.unregister_notification_callback(taken_back, "t")
        plugin.unregister_notification_callback(taken_back, "never registered")
        client.register_topology_callback(topologies.append)
        wait_until(lambda: topologies)
        client.unregister_topology_callback(topologies.append)
        seen = len(topologies)
        fake = fake_edge("f1")
        fake.say(type="notification", plugin="p", topic="t", data=1)
        wait_until(lambda: calls)
        assert calls == ["stays"] and len(topologies) == seen


def test_topology_callbacks_are_called_at_once_and_on_changes(bridge, fake_edge):
    with BridgeClient(bridge.url) as client:
        seen = []
        client.register_topology_callback(seen.append)
        wait_until(lambda: seen)
        fake_edge("f1")
        wait_until(lambda: "f1" in seen[-1])


def test_an_event_stream_goes_on_after_the_bridge_was_restarted(tokens):
    bridge = Bridge(port=0, tokens=tokens[0]).start()
    port, found = bridge._listener.server_address[1], []
    stream = radical_edge.EventStream(
        radical_edge.Bridges(radical_edge.find_bridges(bridge.url)))

    def read():
        for event in stream:
            found.append(event)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        wait_until(lambda: found)
        assert bridge.stop()
        bridge = Bridge(port=port, tokens=tokens[0]).start()
        wait_until(lambda: len(found) > 1)
        bridge._thread.call(bridge._hub.publish, "e", "p", "t", {"n": 1})
        wait_until(lambda: found[-1]["topic"] == "notification")
    finally:
        stream.close()
        thread.join()
        assert bridge.stop()


@contextlib.contextmanager
def waiting(client, *arguments, **options):
    """Wait for an edge in a thread that has begun to; yields its Future."""
    beats = queue.Queue()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(client.wait_for_edge, *arguments, timeout=60, heartbeat_interval=0.02,
                            on_heartbeat=lambda: beats.put(1), **options)
        beats.get(timeout=20)
        yield found
        found.result(60)


def test_a_client_waits_until_an_edge_that_it_names_is_there(bridge, fake_edge):
    with BridgeClient(bridge.url) as client:
        with waiting(client, ["none", "f1"]) as found:
            wait_until(lambda: bridge._hub.subscribers)
            fake_edge("f2").hear("topology")
            assert not found.done()
            fake_edge("f1")
            assert found.result(20) == "f1"
        wait_until(lambda: not bridge._hub.subscribers)           # nothing goes on listening
        assert client.wait_for_edge("f1", timeout=20) == "f1"
        assert client.wait_for_edge(iter(["f2", "f1"])) == "f2"    # the first of them that is there
        with pytest.raises(ValueError, match="name the edge"):
            client.wait_for_edge([])


def test_an_edge_whose_link_is_lost_is_not_there_until_it_is_back(bridge, fake_edge):
    fake = fake_edge("f1", instance="i")
    fake.hear("topology")
    fake.close()
    wait_until(lambda: "f1" in bridge._registry.absent)
    with BridgeClient(bridge.url) as client, waiting(client, "f1") as found:
        wait_until(lambda: bridge._hub.subscribers)
        assert not found.done()
        fake_edge("f1", instance="i")
        assert found.result(20) == "f1"


def test_an_edge_may_be_waited_for_in_a_callback(bridge, fake_edge):
    with BridgeClient(bridge.url) as client:
        found = queue.Queue()
        client.register_callback(callback=lambda *_event: found.put(client.wait_for_edge("f2", 20)))
        fake_edge("f1").say(type="notification", plugin="p", topic="t", data={})
        fake_edge("f2")
        assert found.get(timeout=20) == "f2"


def test_an_edge_is_waited_for_at_whichever_bridge_works(tokens, fake_edge, bridge, tmp_path):
    first = Bridge(port=0, tokens=tokens[0], state_dir=tmp_path / "first").start()
    with BridgeClient(f"{first.url},{bridge.url}") as client, \
            waiting(client, "f1", poll=0.05) as found:
        wait_until(lambda: first._hub.subscribers)
        assert first.stop()
        wait_until(lambda: bridge._hub.subscribers)
        fake_edge("f1")
        assert found.result(20) == "f1"
        assert client.list_edges() == ["f1"]       # and so are its routes


def test_a_bridge_that_starts_late_is_waited_for_as_well(tokens):
    port = free_port()
    with BridgeClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(TimeoutError, match="'f1' within 0.1 s; .*: nothing listens"):
            client.wait_for_edge("f1", timeout=0.1)
        with waiting(client, "f1", poll=0.05) as found:
            bridge = Bridge(port=port, tokens=tokens[0]).start()
            fake = FakeEdge(bridge, tokens[1]["edge"], "f1")
            try:
                assert found.result(20) == "f1"
            finally:
                fake.close()
                assert bridge.stop()


def test_waiting_in_vain_says_what_there_is_instead(bridge, fake_edge):
    with BridgeClient(bridge.url) as client:
        wanted = "no edge 'f1' or 'f2' within 0.5 s; {} has {}"
        with pytest.raises(TimeoutError) as caught:
            client.wait_for_edge(["f1", "f2"], timeout=0.5)
        assert str(caught.value) == wanted.format(bridge.url, "none")
        fake_edge("a").hear("topology")
        fake_edge("b").hear("topology")
        with pytest.raises(TimeoutError) as caught:
            client.wait_for_edge(["f1", "f2"], timeout=0.5)
        assert str(caught.value) == wanted.format(bridge.url, "a, b")
    with BridgeClient(bridge.url, token="wrong") as client:
        with pytest.raises(radical_edge.Unauthorized):
            client.wait_for_edge("f1", timeout=20)


def test_a_certificate_that_is_not_trusted_is_said_and_not_waited_for(tokens, certificate):
    cert, key, pin = certificate
    bridge = Bridge(port=0, tokens=tokens[0], cert=cert, key=key).start()
    wrong = "sha256:" + "0" * 64
    try:
        with BridgeClient(bridge.url, cert=wrong) as client:
            for begin in (lambda: client.wait_for_edge("f1"),
                          lambda: client.register_topology_callback(print),
                          lambda: next(radical_edge.events(url=bridge.url, cert=wrong))):
                with pytest.raises(radical_edge.Unavailable, match="is not trusted"):
                    begin()
        with BridgeClient(bridge.url, cert=pin) as client, pytest.raises(TimeoutError):
            client.wait_for_edge("f1", timeout=0.1)
    finally:
        assert bridge.stop()


def test_waiting_ends_in_time_at_a_bridge_that_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with BridgeClient(f"http://127.0.0.1:{silent.getsockname()[1]}", token="t") as client:
            begin = time.monotonic()
            with pytest.raises(TimeoutError, match="has not answered"):
                client.wait_for_edge("f1", timeout=0.3)
            assert time.monotonic() - begin < 10


def test_a_stream_that_is_refused_raises(bridge):
    with pytest.raises(radical_edge.Unauthorized):
        next(radical_edge.events(url=bridge.url, token="wrong"))
    with BridgeClient(bridge.url, token="wrong") as client:
        with pytest.raises(radical_edge.Unauthorized):
            client.register_callback(callback=print)


# ---------------------------------------------------------------------------
# sysinfo
# ---------------------------------------------------------------------------

def shape(value):
    """Return the types of a value, recursively; of lists, of the first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def test_sysinfo_gives_every_key_and_strict_json():
    metrics = plugins.SysInfoProvider().get_metrics()
    assert set(metrics) == {"system", "cpu", "memory", "disks", "network", "gpus"}
    assert set(metrics["system"]) == {"hostname", "uptime", "kernel", "arch"}
    assert set(metrics["cpu"]) == {"model", "vendor", "cores_physical", "cores_logical", "percent",
                                   "load_avg", "freq_mhz"}
    assert set(metrics["memory"]) == {"total", "available", "percent", "used"}
    for disk in metrics["disks"]:
        assert set(disk) == {"mount", "device", "fstype", "type", "total", "used", "percent"}
    for network in metrics["network"]:
        assert set(network) == {"interface", "ip", "mac", "rx_bytes", "tx_bytes", "speed_mbps"}
    json.dumps(metrics, allow_nan=False)
    assert 0 <= metrics["cpu"]["percent"] <= 100 and metrics["memory"]["total"] > 2 ** 20


def test_sysinfo_is_the_same_with_psutil_and_without():
    psutil = needs_module("psutil")
    ours = plugins.SysInfoProvider(use_psutil=False).get_metrics()
    theirs = plugins.SysInfoProvider(use_psutil=True).get_metrics()
    assert shape(ours) == shape(theirs)
    for path in (("memory", "total"), ("cpu", "cores_physical"), ("cpu", "cores_logical"),
                 ("system", "hostname")):
        assert ours[path[0]][path[1]] == theirs[path[0]][path[1]]
    assert ours["memory"]["total"] == psutil.virtual_memory().total
    assert abs(ours["memory"]["available"] - psutil.virtual_memory().available) < 2 ** 30
    for disk in ours["disks"]:
        usage = psutil.disk_usage(disk["mount"])
        assert (disk["total"], round(disk["percent"])) == (usage.total, round(usage.percent))


MOUNTS = r"""rootfs / rootfs rw 0 0
/dev/sda1 / ext4 rw 0 0
/dev/sda1 /mnt/again ext4 rw 0 0
proc /proc proc rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/home /home/with\040space nfs4 rw 0 0
10.0.0.1@tcp:/scratch /scratch lustre rw 0 0
/dev/loop3 /snap/core/1 squashfs ro 0 0
overlay /box overlay rw 0 0
nonsense
"""


def test_mounts_are_those_that_hold_data_once_each(monkeypatch):
    nodev = plugins.parse_nodev("nodev\ttmpfs\nnodev\tproc\nnodev\trootfs\nnodev\tnfs4\n"
                                "nodev\tlustre\nnodev\toverlay\n\text4\n")
    found = {mount.mount: mount.fstype for mount in plugins.parse_mounts(MOUNTS, nodev)}
    assert found == {"/": "ext4", "/home/with space": "nfs4", "/scratch": "lustre",
                     "/box": "overlay"}
    assert plugins.classify_disk("server:/home", "nfs4") == "shared"
    assert plugins.classify_disk("overlay", "overlay") == "unknown"
    assert plugins.classify_disk("/dev/nosuch", "ext4") == "local unknown"
    monkeypatch.setattr(plugins, "_read", lambda path: "1\n" if "rotational" in path else "")
    assert plugins.classify_disk("/dev/sda1", "ext4") == "local hdd"
    for virtual in ("/dev/vda1", "/dev/xvdb"):    # which say "1" too
        assert plugins.classify_disk(virtual, "ext4") == "local unknown"


def test_memory_and_cpu_are_read_from_proc():
    text = "MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 50 kB\nCached: 150 kB\n"
    assert plugins.parse_meminfo(text) == {"total": 1024000, "available": 307200, "percent": 70.0,
                                           "used": 716800}
    assert plugins.parse_meminfo(text + "MemAvailable: 500 kB\n")["available"] == 512000
    assert plugins.parse_meminfo("")["total"] == 0
    assert plugins.parse_cpu_times("cpu  10 1 4 80 5 0 0 0 9 9\ncpu0 1") == (15, 100)
    info = plugins.parse_cpuinfo("model name\t: A\nphysical id\t: 0\ncore id\t: 0\n\n"
                                 "model name\t: A\nphysical id\t: 0\ncore id\t: 0\n\n"
                                 "physical id\t: 1\ncore id\t: 0\nvendor_id\t: V\n")
    assert info == {"model": "A", "vendor": "V", "cores_physical": 2}
    assert plugins.parse_net_dev("h\nh\n eth0: 10 0 0 0 0 0 0 0 20 0\nbad\n") == {"eth0": (10, 20)}


NVIDIA_SMI = """#!/bin/sh
case "$1" in
*uuid*) echo "0, NVIDIA A100-SXM4-40GB, 535.104.05, GPU-1f2e"
        echo "1, NVIDIA A100-SXM4-40GB, 535.104.05, GPU-3d4c" ;;
*utilization*) echo "0, 37, 12, 40960, 1024, 39936"
               echo "1, [N/A], [Not Supported], 40960, 0, 40960" ;;
esac
"""
ROCM_SMI = """#!/bin/sh
case "$*" in
*productname*) echo '{"card0": {"Card series": "AMD Instinct MI250X", "Unique ID": "0xabc"},'
               echo ' "system": {"Driver version": "6.3.6"}}' ;;
*showuse*) echo '{"card0": {"GPU use (%)": "55", "VRAM Total Memory (B)": "68702699520",'
           echo ' "VRAM Total Used Memory (B)": "1073741824"}}' ;;
esac
"""


def make_program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_gpus_are_read_from_the_vendors_tools(tmp_path, monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_PATH", str(make_program(tmp_path, "my-smi", NVIDIA_SMI)))
    make_program(tmp_path, "rocm-smi", ROCM_SMI)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    one, two, amd = plugins.SysInfoProvider().get_metrics()["gpus"]
    assert one == {"id": "nvidia-0", "index": 0, "name": "NVIDIA A100-SXM4-40GB",
                   "uuid": "GPU-1f2e", "driver_version": "535.104.05", "vendor": "NVIDIA",
                   "util_gpu": 37.0,
                   "util_mem": 12.0, "mem_total": 40960.0, "mem_used": 1024.0, "mem_free": 39936.0}
    assert two["util_gpu"] is None and two["util_mem"] is None and two["mem_free"] == 40960.0
    assert (amd["name"], amd["driver_version"], amd["util_gpu"], amd["mem_used"]) == (
        "AMD Instinct MI250X", "6.3.6", 55.0, 1024.0)


def test_a_gpu_tool_that_hangs_is_killed_and_delays_the_answer_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "COMMAND_S", 0.3)
    pid = tmp_path / "pid"
    program = make_program(tmp_path, "my-smi", f"#!/bin/sh\necho $$ > {pid}\nsleep 60 & wait\n")
    monkeypatch.setenv("NVIDIA_SMI_PATH", str(program))
    begin = time.monotonic()
    assert plugins.run_command([str(program)], 0.3) is None
    assert time.monotonic() - begin < 5
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_mount_that_hangs_does_not_hang_the_answer_and_is_asked_once(monkeypatch):
    monkeypatch.setattr(plugins, "DISKS_S", 0.2)
    release, asked = threading.Event(), []

    def statvfs(path):
        asked.append(path)
        if path == "/hung":
            release.wait(30)
        return os.statvfs("/")

    disks = plugins._Disks(statvfs)
    mounts = [plugins.Mount("/dev/x", "/", "ext4", ""), plugins.Mount("s:/h", "/hung", "nfs", "")]
    for _ in range(3):
        good, hung = disks.measure(mounts)
        assert good["total"] > 0
        assert (hung["total"], hung["used"], hung["percent"]) == (None, None, None)
    assert asked.count("/hung") == 1
    release.set()
    wait_until(lambda: disks.measure(mounts)[1]["total"])


def test_what_could_not_be_found_out_once_is_tried_again(monkeypatch):
    # the hardware is looked at once: a failure then was kept for ever
    monkeypatch.setattr(plugins, "RETRY_S", 0.0)
    answers = [ValueError("half of /proc"), {"cpu": 1}]

    def detect():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    shared = plugins._Shared(detect, float("inf"), 10.0, {})
    assert shared.get() == {}
    wait_until(lambda: shared.get() == {"cpu": 1})
    assert shared.get() == {"cpu": 1} and answers == []


def test_a_system_without_more_threads_is_503_and_stops_nothing_for_good(monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    shared, disks = plugins._Shared(lambda: 7, 1.0, 10.0, None), plugins._Disks()
    answers = plugins._Answers(60.0)
    mounts = [plugins.Mount("/dev/x", "/", "ext4", "")]
    asked = (shared.get, lambda: disks.measure(mounts),
             lambda: answers.get(("info",), lambda: {"queues": {}}))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for ask_it in asked:
            with pytest.raises(radical_edge.Unavailable, match="no more threads"):
                ask_it()
    assert shared.get() == 7 and disks.measure(mounts)[0]["total"]
    assert answers.get(("info",), lambda: {"queues": {}}) == {"queues": {}}


def test_sysinfo_is_asked_through_a_bridge_by_many_at_once(bridge, tokens):
    radical_edge.load_builtin_plugins()
    edge = Edge(bridge.url, "e1", plugins=["sysinfo"], token=tokens[1]["edge"]).start()
    try:
        assert edge.online.wait(10)
        with BridgeClient(bridge.url) as client:
            sysinfo = client.get_edge_client("e1").get_plugin("sysinfo")
            assert sysinfo.homedir() == os.environ["HOME"]
            assert sysinfo.host_role() == {"role": "login", "scheduler": None, "job_id": None}
            found = []
            threads = [threading.Thread(target=lambda: found.append(sysinfo.get_metrics()))
                       for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 20
            sysinfo.close()
    finally:
        assert edge.stop()


# ---------------------------------------------------------------------------
# psij
# ---------------------------------------------------------------------------

@pytest.fixture
def psij(home):
    """A host with the psij plugin, which can be stopped and started: psij.restart()."""
    radical_edge.load_builtin_plugins()
    running = PsijHost(home)
    yield running
    running.stop()
    wait_until(lambda: not running.processes(), what="the end of all jobs")


class PsijHost:
    """The psij plugin on a host of its own; its methods are its routes."""

    def __init__(self, home):
        self.home = home
        self.restart()
        self.sid = self.post("register_session", {})[1]["sid"]

    def restart(self):
        """Start (again), as an edge that was started anew does; what it says goes to `said`."""
        if getattr(self, "host", None):
            assert self.host.stop()
        self.said = []
        self.host = radical_edge.PluginHost(
            "e1", "edge", self.home / "state", changed=lambda: None,
            notify=lambda _plugin, _topic, data: self.said.append(data))
        self.host.add(plugins.PluginPSIJ)

    def stop(self):
        for job in self.get(f"list_jobs/{self.sid}")[1]["jobs"]:
            if job["state"] not in plugins.FINAL_STATES:
                self.post(f"cancel/{self.sid}/{job['job_id']}")
        assert self.host.stop()

    def get(self, path):
        return ask(self.host, "GET", f"/psij/{path}")

    def post(self, path, body=None):
        return ask(self.host, "POST", f"/psij/{path}", body)

    def try_submit(self, executor="local", **spec):
        return self.post(f"submit/{self.sid}", {"job_spec": spec, "executor": executor})

    def submit(self, **spec):
        status, value = self.try_submit(**spec)
        assert status == 200, value
        return value["job_id"]

    def shell(self, script, **spec):
        return self.submit(executable="/bin/sh", arguments=["-c", script], **spec)

    def status(self, job_id, query=""):
        status, value = self.get(f"status/{self.sid}/{job_id}{query}")
        assert status == 200, value
        return value

    def wait(self, job_id, state=None):
        """Return the status once the job is final, or in `state`."""
        return wait_until(lambda: next((found for found in [self.status(job_id)] if
                                        (found["state"] == state if state else found["finished"])),
                                       None), 20, f"the end of {job_id}")

    def cancel(self, job_id):
        return self.post(f"cancel/{self.sid}/{job_id}")

    def processes(self):
        """Return the supervisors and jobs that run for this HOME."""
        found = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True).stdout
        return [line for line in found.splitlines() if str(self.home) in line]

    def told(self, job_id):
        return [item["state"] for item in self.said if item["job_id"] == job_id]


def test_a_job_runs_and_its_states_are_told_once_each(psij):
    job_id = psij.shell("echo out; echo err >&2; exit 3")
    status = psij.wait(job_id)
    assert (status["state"], status["exit_code"]) == ("FAILED", 3)
    assert (status["stdout"], status["stderr"], status["eof"]) == ("out\n", "err\n", True)
    wait_until(lambda: len(psij.told(job_id)) == 3)
    assert psij.told(job_id) == ["QUEUED", "ACTIVE", "FAILED"]
    assert psij.said[-1]["stdout"] == "out\n" and psij.said[-1]["exit_code"] == 3
    jobs = psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]
    assert [job["job_id"] for job in jobs] == [job_id] and jobs[0]["executor"] == "local"


def test_what_a_job_is_given_reaches_it(psij, tmp_path, monkeypatch):
    monkeypatch.setenv("RADICAL_BRIDGE_TOKEN", "secret")
    monkeypatch.setenv("FROM_EDGE", "1")
    (tmp_path / "in").write_text("the input")
    (tmp_path / "pre").write_text("PRE=ran; export PRE")
    (tmp_path / "post").write_text("echo after")
    script = 'pwd; cat; echo "$FROM_EDGE$MINE$RADICAL_BRIDGE_TOKEN$PRE" >&2; echo "$1"'
    job_id = psij.submit(
        executable="/bin/sh", arguments=["-c", script, "x", 'a "b" $c;'], directory=str(tmp_path),
        environment={"MINE": "2", "N": 3}, stdin_path=str(tmp_path / "in"), name="mine",
        stdout_path=str(tmp_path / "both"), stderr_path=str(tmp_path / "both"),
        pre_launch=str(tmp_path / "pre"), post_launch=str(tmp_path / "post"),
        attributes={"duration": 60, "node_count": 1})
    assert psij.wait(job_id)["state"] == "COMPLETED"
    assert (tmp_path / "both").read_text() == (
        f'{tmp_path}\nthe input12ran\na "b" $c;\nafter\n')
    alone = psij.submit(executable="/usr/bin/env", inherit_environment=False,
                        environment={"ONLY": "this"})
    assert psij.wait(alone)["stdout"] == "ONLY=this\n"


BAD_SPECS = [                                    # what is wrong, and the name of the field
    ({}, "executable"), ({"executable": 3}, "executable"),
    ({"executable": "x", "color": 1}, "color"),
    ({"executable": "x", "arguments": "abc"}, "arguments"),
    ({"executable": "x", "arguments": [1]}, "arguments"),
    ({"executable": "x", "environment": {"A": []}}, "environment"),
    ({"executable": "x", "environment": {"A=B": "c"}}, "environment"),
    ({"executable": "x", "directory": "/no/such"}, "directory"),
    ({"executable": "x", "stdin_path": "/no/such"}, "stdin_path"),
    ({"executable": "x", "stdout_path": "/no/such/out"}, "stdout_path"),
    ({"executable": "x", "pre_launch": "/no/such"}, "pre_launch"),
    ({"executable": "x", "launcher": "mpirun"}, "launcher"),
    ({"executable": "x", "resources": {"node_count": 2}}, "resources.node_count"),
    ({"executable": "x", "resources": {"gpu_cores_per_process": 1}}, "resources.gpu_cores"),
    ({"executable": "x", "resources": {"process_count": "2"}}, "resources.process_count"),
    ({"executable": "x", "resources": {"nodes": 1}}, "resources.nodes"),
    ({"executable": "x", "resources": 3}, "resources"),
    ({"executable": "x", "attributes": {"duration": -1}}, "attributes.duration"),
    ({"executable": "x", "attributes": {"duration": True}}, "attributes.duration"),
    ({"executable": "x", "attributes": {"queue_name": "q"}}, "attributes.queue_name"),
    ({"executable": "x", "attributes": {"account": "a"}}, "attributes.account"),
    ({"executable": "x", "custom_attributes": {"slurm.x": 1}}, "attributes.custom_attributes"),
    ({"executable": "x", "attributes": {"node_count": 1}, "resources": {"node_count": 3}},
     "attributes.node_count"), ({"executable": "a\0b"}, "executable")]


@pytest.mark.parametrize("spec, field", BAD_SPECS, ids=[json.dumps(item[0]) for item in BAD_SPECS])
def test_a_field_that_cannot_be_honoured_is_refused_by_name(spec, field):
    with pytest.raises(radical_edge.Unprocessable) as caught:
        plugins.make_local_run(plugins.parse_job_spec(spec), Path("/o"), Path("/e"))
    assert caught.value.detail.startswith(field)


def test_a_pipe_is_no_input_for_it_would_hold_the_job_for_ever(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    spec = plugins.parse_job_spec({"executable": "cat", "stdin_path": str(tmp_path / "pipe")})
    with pytest.raises(radical_edge.Unprocessable) as caught:
        plugins.make_local_run(spec, Path("/o"), Path("/e"))
    assert "stdin_path" in caught.value.detail and "give a file" in caught.value.detail


def test_mistakes_are_answered_with_their_status(psij):
    assert psij.try_submit(executable="x", color=1)[0] == 422
    assert psij.post(f"submit/{psij.sid}", {"spec": {}})[0] == 422
    assert psij.try_submit(7, executable="x")[0] == 422
    assert psij.post("submit/session.none", {"job_spec": {}})[0] == 404
    assert psij.get(f"status/{psij.sid}/none")[0] == 404
    assert psij.post(f"cancel/{psij.sid}/none")[0] == 404
    assert psij.post("register_session", {"color": 1})[0] == 422
    job_id = psij.submit(executable="/bin/true")
    psij.wait(job_id)
    assert psij.get(f"status/{psij.sid}/{job_id}?stdout_offset=abc")[0] == 422
    assert psij.get(f"status/{psij.sid}/{job_id}?stderr_offset=-1")[0] == 422
    status, value = psij.cancel(job_id)
    assert status == 409 and "COMPLETED" in value["detail"]
    assert psij.get(f"list_jobs/{psij.sid}")[1]["jobs"][0]["job_id"] == job_id


@pytest.mark.parametrize("spec, code, words", [
    ({"executable": "/no/such"}, 127, "No such file"),
    ({"executable": "/etc/passwd"}, 126, "denied"),
    ({"executable": "no-such-program"}, 127, "No such file"),
    ({"executable": "/bin/sh", "arguments": ["-c", "kill -9 $$"]}, 137, "signal 9"),
    ({"executable": "/bin/sh", "arguments": ["-c", "sleep 60"], "attributes": {"duration": 0.3}},
     143, "walltime of 0.3 s")])
def test_why_a_job_failed_is_said(psij, spec, code, words):
    status = psij.wait(psij.submit(**spec))
    assert (status["state"], status["exit_code"]) == ("FAILED", code)
    assert words in status["message"]


def test_what_a_job_was_submitted_as_is_told_so_that_it_can_be_again(psij, tmp_path):
    (tmp_path / "in").write_text("the input")
    spec = {"executable": "/bin/sh", "arguments": ["-c", 'pwd; cat; echo "$MINE"'], "name": "mine",
            "directory": str(tmp_path), "environment": {"MINE": "2", "N": 3},
            "stdin_path": str(tmp_path / "in"), "attributes": {"duration": 60},
            "resources": {"node_count": 1}}
    job_id = psij.submit(**spec)
    psij.wait(job_id)
    psij.restart()
    status, work = psij.get(f"job_spec/{psij.sid}/{job_id}")
    assert (status, work) == (200, {"job_spec": spec, "executor": "local"})
    again = psij.post(f"submit/{psij.sid}", work)[1]["job_id"]
    assert again != job_id and psij.wait(again)["stdout"] == f"{tmp_path}\nthe input2\n"
    assert psij.get(f"job_spec/{psij.sid}/none")[0] == 404


def test_only_the_owner_of_a_job_and_admins_are_told_its_environment(psij):
    def ask_as(method, path, body=None, **caller):
        return ask(psij.host, method, f"/psij/{path}", body, as_user(**caller))

    sid = ask_as("POST", "register_session", {}, name="alice")[1]["sid"]
    spec = {"executable": "/bin/true", "environment": {"KEY": "a secret"}}
    job_id = ask_as("POST", f"submit/{sid}", {"job_spec": spec}, name="alice")[1]["job_id"]
    wait_until(lambda: psij.told(job_id)[-1:] == ["COMPLETED"])
    path = f"job_spec/{sid}/{job_id}"
    assert [ask_as("GET", path, **caller)[0] for caller in (
        {"name": "bob"}, {"scope": "read"}, {"name": "alice"}, {"scope": "admin"})] == [
        403, 403, 200, 200]
    assert ask_as("GET", f"job_spec/{psij.sid}/{job_id}", name="bob")[0] == 404
    told = [psij.said, ask_as("GET", f"status/{sid}/{job_id}", name="alice"),
            ask_as("GET", f"list_jobs/{sid}", name="alice")]
    assert "a secret" in json.dumps(ask_as("GET", path, name="alice")[1])
    assert "a secret" not in json.dumps(told)


def test_cancel_ends_the_whole_group_also_one_that_ignores_sigterm(psij, monkeypatch):
    monkeypatch.setattr(plugins, "GRACE_S", 0.3)
    job_id = psij.shell("trap '' TERM; sleep 600 & echo $!; sleep 600; sleep 600")
    child = int(wait_until(lambda: psij.status(job_id)["stdout"]))
    assert psij.cancel(job_id) == (200, {"job_id": job_id, "status": "canceled"})
    assert psij.status(job_id)["state"] == "CANCELED"
    wait_until(lambda: not plugins.is_same_process(child, plugins.process_started(child)))
    assert psij.cancel(job_id)[0] == 409


def test_a_job_whose_client_goes_away_while_it_is_started_is_started_and_known(psij, monkeypatch):
    # it ran, unknown to the edge, and the session had a job that was NEW for ever
    begun, go_on, launch = threading.Event(), threading.Event(), plugins.LocalExecutor._launch

    def slowly(*arguments):
        begun.set()
        assert go_on.wait(20)
        return launch(*arguments)

    monkeypatch.setattr(plugins.LocalExecutor, "_launch", slowly)
    body = json.dumps({"job_spec": {"executable": "/bin/echo", "arguments": ["a"]}}).encode()
    call = radical_edge.Call(radical_edge.EdgeRequest("1", "POST", f"/psij/submit/{psij.sid}", {},
                                                      body))
    answers = []
    call.respond = answers.append
    psij.host.dispatch(call)
    assert begun.wait(20)
    call.cancel()
    wait_until(lambda: answers)                   # the handler was told
    go_on.set()
    (job,) = psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]
    assert psij.wait(job["job_id"])["stdout"] == "a\n"


def test_a_cancel_at_the_natural_end_leaves_exactly_one_final_state(psij):
    for delay in ("0", "0.01", "0.02", "0.03") * 8:
        job_id = psij.shell(f"sleep {delay}")
        answer = psij.cancel(job_id)[0]
        state = psij.wait(job_id)["state"]
        assert (answer, state) in ((200, "CANCELED"), (409, "COMPLETED"))
    wait_until(lambda: not psij.processes())
    for job in psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]:
        wait_until(lambda: set(psij.told(job["job_id"])) & plugins.FINAL_STATES)
        assert len([state for state in psij.told(job["job_id"])
                    if state in plugins.FINAL_STATES]) == 1


def test_many_jobs_run_at_once(psij):
    ids = [psij.shell(f"echo {number}; sleep 0.5") for number in range(40)]
    assert sorted(int(psij.wait(job_id)["stdout"]) for job_id in ids) == list(range(40))


@pytest.mark.parametrize("duration", [1e10, 1e300, 10 ** 400])
def test_a_walltime_that_no_clock_can_wait_for_is_refused(psij, duration):
    # the supervisor died of it, with the job running
    status, value = psij.try_submit(executable="/bin/true", attributes={"duration": duration})
    assert status == 422 and value["detail"].startswith("attributes.duration: ")
    job_id = psij.submit(executable="/bin/true",
                         attributes={"duration": plugins.MAX_DURATION_S})
    assert psij.wait(job_id)["exit_code"] == 0


def test_output_that_is_no_file_or_read_far_behind_its_end_is_empty(psij, tmp_path):
    # a directory was a 500, a pipe held a thread for ever
    os.mkfifo(tmp_path / "pipe")
    assert plugins.read_output(tmp_path / "pipe", 0, complete=True) == ("", 0, True)
    assert plugins.read_tail(tmp_path / "pipe") == ""
    status = psij.wait(psij.shell("true", stdout_path=str(tmp_path)))
    assert (status["state"], status["stdout"]) == ("FAILED", "")
    assert "directory" in status["message"]
    assert psij.wait(psij.shell("echo x", stdout_path="/dev/null"))["stdout"] == ""
    job_id = psij.shell("echo hello")
    psij.wait(job_id)
    far = psij.status(job_id, f"?stdout_offset={'9' * 18}")
    assert (far["stdout"], far["stdout_offset"]) == ("", int("9" * 18))
    assert psij.status(job_id, "?stdout_offset=2")["stdout"] == "llo\n"


def test_output_is_read_by_offset_every_byte_once_and_characters_whole(tmp_path):
    path = tmp_path / "out"
    data = "aä€😀z".encode() + b"\xff" + "ö".encode()[:1]
    for size in range(len(data) + 1):             # whatever has been written so far
        path.write_bytes(data[:size])
        text, offset, end = plugins.read_output(path, 0, complete=False)
        assert not end and data[:offset].decode(errors="replace") == text
        path.write_bytes(data)
        rest, after, end = plugins.read_output(path, offset, complete=True)
        assert end and after == len(data)
        assert text + rest == "aä€😀z\ufffd\ufffd"
    found, offset, end = "", 0, False
    while not end:
        text, offset, end = plugins.read_output(path, offset, complete=True, limit=4)
        found += text
    assert found == "aä€😀z\ufffd\ufffd"
    assert plugins.read_output(path, 999, complete=True)[:2] == ("", 999)
    assert plugins.read_output(tmp_path / "none", 0, complete=False) == ("", 0, False)
    assert plugins.read_tail(path, 9) == "😀z\ufffd\ufffd"


def test_a_notification_holds_only_the_tail_of_the_output(psij):
    job_id = psij.shell("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done")
    psij.wait(job_id)
    wait_until(lambda: "COMPLETED" in psij.told(job_id))
    tail = psij.said[-1]["stdout"]
    assert tail.endswith("line 2999\n") and len(tail) <= plugins.MAX_TAIL


def test_jobs_live_on_while_the_edge_is_gone_and_are_found_again(psij):
    ended = psij.shell("echo early")
    psij.wait(ended)
    running = psij.shell("echo one; sleep 1; echo two; exit 4")
    sleeping = psij.shell("sleep 600")
    wait_until(lambda: psij.status(running)["stdout"])
    wait_until(lambda: psij.status(sleeping)["state"] == "ACTIVE")
    psij.restart()
    assert psij.status(ended)["stdout"] == "early\n"
    assert psij.status(sleeping)["state"] == "ACTIVE"
    status = psij.wait(running)
    assert (status["state"], status["exit_code"], status["stdout"]) == ("FAILED", 4, "one\ntwo\n")
    wait_until(lambda: psij.told(running)[-1:] == ["FAILED"])
    assert psij.cancel(sleeping)[0] == 200
    assert psij.status(sleeping)["state"] == "CANCELED"
    psij.restart()
    assert psij.status(sleeping)["state"] == "CANCELED"
    assert psij.told(ended) == []                 # its end had been told


def test_a_job_whose_directory_is_deleted_leaves_no_supervisor(psij, home):
    jobs = home / "state/psij/jobs"
    psij.shell(f'while [ ! -e "{home}/go" ]; do sleep 0.02; done; rm -r "{jobs}"/*; exit 3')
    assert list(jobs.iterdir()) and psij.processes()
    (home / "go").touch()
    wait_until(lambda: not psij.processes(), what="the end of the job and its supervisor")


def test_a_job_whose_supervisor_was_killed_is_told_of_in_truth(psij):
    orphan = psij.shell("sleep 600")
    short = psij.shell("sleep 0.5; exit 5")
    for job_id in (orphan, short):
        pid, _, _ = plugins._read_claim(psij.home / "state/psij/jobs" / job_id)
        os.kill(pid, 9)
    status = psij.wait(short)
    assert status["state"] == "FAILED" and "not known" in status["message"]
    assert psij.status(orphan)["state"] == "ACTIVE"
    assert psij.cancel(orphan)[0] == 200
    assert psij.status(orphan)["state"] == "CANCELED"


def test_a_job_of_another_host_is_unknown_and_left_alone(psij):
    """Homes are often shared by login nodes, and process numbers are not."""
    job_id = psij.shell("sleep 600")
    claim = psij.home / "state/psij/jobs" / job_id / "claim"
    ours = claim.read_text()
    claim.write_text(json.dumps([*json.loads(ours)[:2], "login7"]))
    psij.restart()
    status = psij.status(job_id)
    assert status["state"] == "UNKNOWN" and "login7" in status["message"]
    assert psij.cancel(job_id)[0] == 409
    claim.write_text(ours)
    psij.restart()
    assert psij.status(job_id)["state"] == "ACTIVE"
    assert psij.cancel(job_id)[0] == 200


def test_closing_a_session_keeps_live_jobs_and_their_output(psij):
    ended, live = psij.shell("echo done"), psij.shell("echo live; sleep 600")
    psij.wait(ended)
    wait_until(lambda: psij.status(live)["stdout"])
    jobs = psij.home / "state/psij/jobs"
    assert psij.post(f"unregister_session/{psij.sid}")[0] == 200
    assert not (jobs / ended).exists() and (jobs / live / "stdout").read_text() == "live\n"
    pid, started, _ = plugins._read_claim(jobs / live)
    assert plugins.is_same_process(pid, started)
    os.kill(pid, 15)
    wait_until(lambda: not plugins.is_same_process(pid, started))
    psij.sid = psij.post("register_session", {})[1]["sid"]


def test_a_session_with_a_live_job_is_busy(psij):
    job_id = psij.shell("sleep 600")
    session = psij.host._hosted["psij"].plugin._sessions[psij.sid].session
    assert session.is_busy()
    psij.cancel(job_id)
    assert not session.is_busy()


def test_a_batch_executor_without_psij_python_says_what_to_install(psij, monkeypatch):
    monkeypatch.setitem(sys.modules, "psij", None)               # as if it were not installed
    status, value = psij.try_submit("slurm", executable="/bin/true")
    assert status == 501 and "pip install psij-python" in value["detail"]


SLURM = {                                        # stand-ins: they keep a job in a file
    "sbatch": """#!/bin/sh
cp "$1" {folder}/job; echo "Submitted batch job 77"; echo 77
(SLURM_JOB_ID=77 bash {folder}/job >/dev/null 2>&1; touch {folder}/code) >/dev/null 2>&1 &
""",
    "squeue": """#!/bin/sh
if [ ! -f {folder}/code ]; then echo "77|RUNNING|n1|None"; fi
""",
    "scancel": "#!/bin/sh\nexit 0\n"}


def test_a_batch_job_goes_through_psij_python(psij, tmp_path, monkeypatch):
    needs_module("psij")
    status, value = psij.try_submit("nonsense", executable="/bin/true")
    assert status == 422 and value["detail"].startswith("executor") and "slurm" in value["detail"]
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    status, value = psij.try_submit("slurm", executable="/bin/true")
    assert status == 422 and "sbatch" in value["detail"]
    for name, text in SLURM.items():
        make_program(tmp_path, name, text.replace("{folder}", str(tmp_path)))
    monkeypatch.setattr(plugins, "QUEUE_POLL_S", 1)
    job_id = None
    status, value = psij.try_submit(
        "slurm", executable="/bin/sh", arguments=["-c", "echo batch"], name="n",
        attributes={"duration": 600, "queue_name": "debug", "account": "a", "node_count": 2})
    assert status == 200, value
    job_id = value["job_id"]
    assert value["native_id"] == "77"
    script = (tmp_path / "job").read_text()
    for line in ("--nodes=2", '--partition="debug"', '--account="a"', '--job-name="n"', "--time=0:10:0"):
        assert line in script
    found = psij.wait(job_id)
    assert (found["state"], found["stdout"]) == ("COMPLETED", "batch\n")
    psij.restart()
    assert psij.status(job_id)["state"] == "COMPLETED"


# ---------------------------------------------------------------------------
# As separate processes: the command line, TLS, kill -9
# ---------------------------------------------------------------------------

class Process:
    """A command of ours in a process of its own; `lines` are what it has printed."""

    def __init__(self, *arguments, expect=None, env=None, python=sys.executable):
        self.lines, self.errors = [], []
        self.process = subprocess.Popen(
            [python, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, **(env or {})}, bufsize=1)
        self._threads = [threading.Thread(target=self._read, args=pair) for pair in (
            (self.process.stdout, self.lines), (self.process.stderr, self.errors))]
        for thread in self._threads:
            thread.start()
        if expect:
            wait_until(lambda: any(expect in line for line in [*self.lines, *self.errors]) or
                       self.process.poll() is not None, 60, f"{expect!r} in the output")
            assert self.process.poll() is None, self.errors

    def _read(self, stream, into):
        for line in stream:
            into.append(line.rstrip("\n"))

    def end(self, number=15, timeout=60):
        """Send a signal; return (exit status, seconds until it ended)."""
        begin = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout)
        for thread in self._threads:
            thread.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return status, time.monotonic() - begin


@pytest.fixture
def start():
    """Start processes: start("--bridge", ..., expect="what it prints when it is up")."""
    made = []

    def start_process(*arguments, **options):
        made.append(Process(*arguments, **options))
        return made[-1]

    yield start_process
    for process in reversed(made):
        process.end()


def command(*arguments):
    """Return a command of ours, run as a module: a script would be compiled at each start."""
    code = ("import sys; sys.path[0] = sys.argv.pop(1); import radical_edge; "
            "sys.exit(radical_edge.main())")
    return [sys.executable, "-c", code, os.path.dirname(SCRIPT), *arguments]


def run(*arguments, env=None, status=0):
    """Run a command to its end; return its output. Fails unless it exits with `status`."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True,
                          timeout=60, env={**os.environ, **(env or {})})
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def bridge_url(process):
    """Return the URL that a bridge printed, which may be read later than what it logged since."""
    return wait_until(lambda: next((line for line in process.lines
                                    if line.startswith("bridge: http")), None)).split()[1]


def children_of(pid):
    """Return the ids of the processes that a process has started, those that ended left out."""
    shown = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
    return [int(child) for child, parent, state in map(str.split, shown.splitlines())
            if int(parent) == pid and not state.startswith("Z")]


def test_help_names_every_option_and_fits_on_a_screen():
    text = run("--help")
    assert subprocess.check_output([sys.executable, SCRIPT, "--help"], text=True) == text
    assert len(text.splitlines()) <= 36 and max(map(len, text.splitlines())) <= 100
    assert text.count("python3 radical_edge.py --") >= 3
    for action in radical_edge.make_parser()._actions:
        assert any(option in text for option in action.option_strings), action.option_strings


def test_the_file_alone_works_and_says_what_is_missing(start, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT",
                        shutil.copy(SCRIPT, str(tmp_path / "radical_edge.py")))
    bridge = start("--bridge", "--port", "0", expect="bridge: http")
    missing = "none: put plugins.py beside radical_edge.py"
    url = bridge_url(bridge)
    start("--edge", "--name", "x", "--url", url, expect=f"edge: x, with plugins: {missing}")
    wait_until(lambda: "x: no plugins" in run("--list"))
    assert missing in run("--check")
    assert missing in run("--edge", "--url", url, "-p", "sysinfo", status=1)


def test_a_client_without_the_plugins_class_says_where_it_is(bridge, edge, tokens):
    with BridgeClient(bridge.url, token=tokens[1]["admin"]) as client:
        with client.get_edge_client("e1").get_plugin("echo") as echo:
            assert echo._get("hello")["query"] == {}
            with pytest.raises(AttributeError, match="no 'hello'.*put plugins.py"):
                echo.hello()
            assert not hasattr(echo, "nothing")


def test_one_command_starts_bridge_and_edge_and_one_more_runs_a_job(start, home):
    begin = time.monotonic()
    both = start("--bridge", "--edge", "--name", "laptop", "--port", "0", expect="edge: laptop")
    assert time.monotonic() - begin < 10          # an end, not a measurement: see bench/start.py
    assert (home / ".radical/edge/token").stat().st_mode & 0o777 == 0o600
    wait_until(lambda: all(word in run("--list") for word in ("laptop: ", "psij", "sysinfo")))
    example = ROOT / "examples" / "run_job.py"
    done = subprocess.run([sys.executable, str(example), "laptop", "echo", "hello", "there"],
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "hello there\n"), done.stderr
    failed = subprocess.run([sys.executable, str(example), "laptop", "sh", "-c", "exit 7"],
                            capture_output=True, text=True, timeout=60)
    assert failed.returncode == 7
    assert json.loads(run("--call", "laptop/sysinfo/homedir")) == {"homedir": str(home)}
    assert "load_avg" in run("--call", "laptop/sysinfo/metrics/{sid}")
    assert "no route" in run("--call", "laptop/sysinfo/none", status=1)
    token = (home / ".radical/edge/token").read_text().strip()
    shown = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True).stdout
    assert token not in shown and not any(token in line for line in [*both.lines, *both.errors])
    status, seconds = both.end()
    assert status == 0 and seconds < 3


@pytest.fixture
def pair(start):
    """A bridge and an edge of one command: (its Process, the process id of the edge)."""
    both = start("--bridge", "--edge", "--name", "e1", "-p", "sysinfo", "--port", "0",
                 expect="registered as e1")
    return both, children_of(both.process.pid)[0]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 0),
                                            (signal.SIGKILL, -signal.SIGKILL)])
def test_the_edge_of_a_bridge_ends_with_it(pair, home, number, status):
    both, edge = pair
    assert both.end(number)[0] == status
    wait_until(lambda: not is_alive(edge))
    left = [str(path) for path in home.rglob("lock")]
    assert left == ([f"{home}/.radical/edge/state/bridge/lock"] if status else [])


def test_ctrl_c_in_a_terminal_reaches_bridge_and_edge_at_once(home):
    process = subprocess.Popen([sys.executable, SCRIPT, "--bridge", "--edge", "--name", "e1", "-p",
                                "sysinfo", "--port", "0"], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        next(line for line in process.stderr if "registered as e1" in line)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stdout.read() + process.stderr.read()     # to the end of both
    assert process.returncode == 0 and "Traceback" not in rest
    assert not list(home.rglob("lock"))


def test_a_bridge_goes_on_when_its_edge_has_left(pair):
    both, edge = pair
    os.kill(edge, signal.SIGTERM)
    wait_until(lambda: any("the edge of this bridge has ended" in line for line in both.errors))
    assert not is_alive(edge) and "no edge is connected" in run("--list")
    both.process.send_signal(signal.SIGHUP)       # there is nobody to pass it on to
    wait_until(lambda: "no edge is connected" in run("--list"))
    assert both.end()[0] == 0


def test_a_bridge_ends_when_its_edge_is_killed(pair):
    both, edge = pair
    os.kill(edge, signal.SIGKILL)
    assert both.process.wait(20) == 1
    both.end()
    assert any("the edge of this bridge was ended by signal 9" in line for line in both.errors)


@pytest.mark.parametrize("what, text", [("port", "in use"), ("plugin", "No such file"),
                                        ("limit", "--task-limit 0"), ("state", "belongs to")])
def test_when_bridge_or_edge_cannot_start_neither_does(start, home, what, text):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = {"port": ["--port", str(taken.getsockname()[1])],
                     "plugin": ["--plugin-file", "/none.py", "--port", "0"],
                     "limit": ["--task-limit", "0", "--port", "0"],
                     "state": ["--state", str(home / "state"), "--port", "0"]}[what]
        if what == "state":
            start("--edge", "--name", "e1", "-p", "sysinfo", "--url", "http://127.0.0.1:1",
                  "--state", str(home / "state"), expect="edge: e1")
        both = start("--bridge", "--edge", "--name", "e1", "--no-auth", *arguments)
        assert both.process.wait(20) == 1
        both.end()                                # reads its output until both have ended
    reasons = [line for line in both.errors if line.startswith("radical_edge: ")]
    assert len(reasons) == 1 and text in reasons[0]
    assert "Traceback" not in "\n".join(both.errors)


def test_a_plugin_that_holds_the_interpreter_does_not_stop_the_bridge_beside_it(start, tmp_path):
    (tmp_path / "held.py").write_text(textwrap.dedent("""\
        import ctypes
        from pathlib import Path
        from radical_edge import Plugin, get, plugin

        @plugin("held")
        class Held(Plugin):
            @get("hold")
            def hold(self, request):
                folder = Path(__file__).parent
                (folder / "begun").touch()
                ctypes.PyDLL(None).sleep(2)       # PyDLL: all other threads must wait
                (folder / "ended").touch()
                return {}
    """))
    both = start("--bridge", "--edge", "--name", "e1", "--port", "0", "-p", "held",
                 "--plugin-file", str(tmp_path / "held.py"), expect="registered as e1")
    with BridgeClient(bridge_url(both)) as client, \
            concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.http.get, "/e1/held/hold")
        wait_until((tmp_path / "begun").exists)
        assert client.http.get("/health").status_code == 200
        assert not (tmp_path / "ended").exists()
        assert asked.result(20).status_code == 200


def test_a_token_in_the_environment_is_used_and_not_inherited_by_jobs(start):
    secret = {"RADICAL_BRIDGE_TOKEN": "t" * 40}
    start("--bridge", "--edge", "--name", "e1", "--port", "0", env=secret,
          expect="registered as e1")
    with BridgeClient(token="t" * 40) as client:
        psij = client.get_edge_client("e1").get_plugin("psij")
        job = psij.submit_job({"executable": "/usr/bin/env"})
        assert "RADICAL_BRIDGE_TOKEN" not in psij.wait_job(job["job_id"], 20)["stdout"]
        psij.close()


@pytest.mark.parametrize("own", [None, "3"])
def test_jobs_inherit_a_setting_of_malloc_only_from_the_user(start, monkeypatch, own):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    start("--bridge", "--edge", "--name", "e1", "-p", "psij", "--port", "0",
          env={"MALLOC_ARENA_MAX": own} if own else {}, expect="registered as e1")
    with BridgeClient() as client:
        psij = client.get_edge_client("e1").get_plugin("psij")
        job = psij.submit_job({"executable": "/usr/bin/env"})
        lines = psij.wait_job(job["job_id"], 20)["stdout"].splitlines()
        psij.close()
    assert [line for line in lines if line.startswith("MALLOC")] == \
        ([f"MALLOC_ARENA_MAX={own}"] if own else [])


def test_events_are_printed_as_json_lines(start):
    start("--bridge", "--edge", "--name", "e1", "-p", "psij", "--port", "0", expect="edge: e1")
    events = start("--events", "e1/psij/job_status", expect="topology")
    wait_until(lambda: "e1: psij" in run("--list"))
    with BridgeClient() as client:
        job = client.get_edge_client("e1").get_plugin("psij")
        job.submit_job({"executable": "/bin/true"})
        wait_until(lambda: any('"COMPLETED"' in line for line in events.lines))
        job.close()
    assert all(json.loads(line)["topic"] for line in events.lines)


def test_tokens_on_the_command_line(home, start):
    token = run("--token", "add", "bob", "--scope", "read", "--expires", "1h").strip()
    assert run("--token", "list").split()[:2] == ["bob", "read"]
    bridge = start("--bridge", "--port", "0", expect="bridge: http")
    arguments = ("--url", bridge_url(bridge))
    assert "no edge is connected" in run("--list", *arguments, env={"RADICAL_BRIDGE_TOKEN": token})
    run("--token", "revoke", "bob")
    wait_until(lambda: subprocess.run(
        command("--list", *arguments), capture_output=True,
        env={**os.environ, "RADICAL_BRIDGE_TOKEN": token}).returncode == 1)
    assert "no token named" in run("--token", "revoke", "bob", status=1)
    for wrong in (("--token", "add"), ("--token", "paint"), ("--token", "add", "x", "--scope", "k"),
                  ("--token", "add", "x", "--expires", "soon")):
        assert len(run(*wrong, status=1).splitlines()) == 1


@pytest.mark.parametrize("arguments, status, words", [
    (["--bridge", "--host", "0.0.0.0"], 1, "--cert and --key"), (["--nonsense"], 2, "--help"),
    (["--call", "x"], 1, "EDGE/PLUGIN/ROUTE"), (["--call", "a/b/c", "{"], 1, "not JSON"),
    (["--edge", "--name", "a/b", "--url", "http://127.0.0.1:1"], 1, "--name"),
    (["--edge", "--url", "ftp://x"], 1, "https://"), (["--bridge", "-p", "zzz"], 1, "zzz"),
    (["--edge", "--url", "http://far.example"], 1, "unencrypted"),
    (["--bridge", "--cert", "/no/such"], 1, "/no/such"),
    (["--log-level", "LOUD", "--list"], 1, "INFO"),
    (["--list", "--url", "http://127.0.0.1:1"], 1, "is the bridge running"),
    (["--bridge", "--port", "99999"], 2, "0 to 65535"), (["--bridge", "--port", "8_0"], 2, "8_0"),
    (["--bridge", "--heartbeat", "nan"], 2, "seconds"), (["--edge", "--grace", "-1"], 2, "--grace"),
    (["--bridge", "--heartbeat", "0"], 2, "seconds"),
    (["--bridge", "--request-timeout", "inf"], 2, "seconds"),
    (["--edge", "--task-limit", "+1"], 2, "whole number"),
    ([], 2, "Radical Edge")])
def test_wrong_usage_is_answered_in_a_line(arguments, status, words):
    assert words in run(*arguments, status=status)


@contextlib.contextmanager
def small_disk(folder):
    """Give a folder a disk of its own, of 64 KiB; yield whether that is possible here."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder, left=0):
    """Write a file until its disk is full; then give so many bytes back."""
    with open(folder / "filling", "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - left)


@contextlib.contextmanager
def full_disk(folder):
    """Leave no room in a folder; yield what the system says of it."""
    with small_disk(folder) as mounted:
        if mounted:
            fill(folder)
            yield "No space left on device"
            return
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)       # nearly the same, for everybody
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            yield "File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def read_only_disk(folder):
    """Let a folder be read and not written; yield what the system says of it."""
    with small_disk(folder) as mounted:
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            yield "Read-only file system"
            return
        needs("system", os.geteuid() != 0, "to mount, or not to be root")
        folder.chmod(0o500)
        try:
            yield "Permission denied"
        finally:
            folder.chmod(0o700)


@pytest.mark.parametrize("disk", [full_disk, read_only_disk])
@pytest.mark.parametrize("arguments, words", [
    (["--edge", "--name", "e1", "--url", "http://127.0.0.1:1"], ["state/e1", "--state DIR"]),
    (["--bridge", "--port", "0"], ["tokens.json", "RADICAL_BRIDGE_TOKEN"]),
    (["--bridge", "--port", "0", "--no-auth"], ["state/bridge", "--state DIR"]),
    (["--bridge", "--port", "0", "--no-auth", "--detach"], ["state/bridge", "--state DIR"]),
    (["--token", "add", "bob"], ["tokens.json"]),
    (["--token", "keygen", "bob"], ["client.key", "--client-key"])],
    ids=lambda value: "" if "bob" not in value and "--edge" not in value else value[1])
def test_what_cannot_be_written_at_the_start_is_said_in_a_line(home, disk, arguments, words):
    with disk(home) as reason:
        *before, line = run(*arguments, status=1).splitlines()
    assert line.startswith("radical_edge: ") and f"cannot be written ({reason})" in line
    assert all(word in line for word in words)
    assert all("clients of this machine need --url" in warning for warning in before)


@pytest.mark.parametrize("disk", [full_disk, read_only_disk])
def test_check_says_that_state_cannot_be_written(home, disk):
    with disk(home) as reason:
        text = run("--check", "--name", "e1", "--url", "http://127.0.0.1:1", status=1)
    assert f"files    FAILED: {home}" in text and f"cannot be written ({reason})" in text


def test_a_home_that_cannot_be_written_is_no_matter_when_the_state_is_elsewhere(
        home, start, tmp_path):
    token = {"RADICAL_BRIDGE_TOKEN": "t" * 40}
    with read_only_disk(home):
        bridge = start("--bridge", "--port", "0", "--state", str(tmp_path / "b"), env=token,
                       expect="bridge: http")
        warning = wait_until(lambda: [line for line in bridge.errors if "need --url" in line])[0]
        url = bridge_url(bridge)
        assert str(home) in warning and url in warning
        edge = start("--edge", "--name", "e1", "--url", url, "--state", str(tmp_path / "e"),
                     env=token, expect="registered as e1")
        assert "e1: " in run("--list", "--url", url, env=token)
        for process in (edge, bridge):
            assert process.end()[0] == 0
            assert "Traceback" not in "".join(process.errors)


@pytest.mark.parametrize("pages", [1, 2, 3, 5])
def test_an_edge_on_a_disk_that_is_nearly_full_serves_or_says_why_not(home, start, tokens, pages,
                                                                      bridge, tmp_path):
    """Whichever of its files is the first without room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder) as mounted:
        needs("system", mounted, "to mount a file system")
        fill(folder, left=pages * 4096)
        edge = Process("--edge", "--name", "e1", "--url", bridge.url, "--state", str(folder / "e1"))
        try:
            wait_until(lambda: "e1" in bridge._registry.links or edge.process.poll() is not None)
            if edge.process.poll() is None:
                assert edge.end()[0] == 0
            else:
                assert edge.process.poll() == 1
                assert "No space left on device" in edge.errors[-1] and "--state" in edge.errors[-1]
                assert not (folder / "e1/lock").exists()
        finally:
            edge.end()
    assert "Traceback" not in "\n".join(edge.errors)


def test_a_lock_that_had_no_room_is_not_left_there_in_part(home, monkeypatch):
    def link(*_):                                 # as on a file system that has none
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with small_disk(home) as mounted:
        needs("system", mounted, "to mount a file system")
        fill(home, left=4096)                     # enough for the first of two files
        with pytest.raises(radical_edge.InsufficientStorage, match="No space left"):
            lock_in(home).acquire()
        assert [path.name for path in home.iterdir()] == ["filling"]


def test_a_journal_that_could_not_make_its_folder_makes_it_later(home, caplog):
    with read_only_disk(home) as reason:
        kept = radical_edge.Journal(home / "journal", max_records=10, max_bytes=10 ** 6)
        kept.open()
        written(kept, kept.append([], b"1").number)
        assert kept.is_failing and reason in caplog.text
    written(kept, kept.append([], b"2").number)
    kept.close()
    (path,) = (home / "journal").iterdir()
    assert path.read_bytes().count(b"\n") == 2


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"'{sys.executable}' '{SCRIPT}' --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_says_line_by_line_what_works(start, home):
    bridge = start("--bridge", "--port", "0", expect="bridge: http")
    good = run("--check")
    for name in ("name", "route", "TLS", "token", "upgrade"):
        assert f"{name:8} ok" in good
    assert "psij: ok" in good and "sysinfo: ok" in good
    bad = run("--check", env={"RADICAL_BRIDGE_TOKEN": "wrong"}, status=1)
    assert "token    FAILED" in bad and "not known" in bad
    token = run("--token", "add", "site", "--scope", "edge").strip()

    def check_as_edge():
        done = subprocess.run(command("--check"), capture_output=True, text=True,
                              env={**os.environ, "RADICAL_BRIDGE_TOKEN": token})
        return done.returncode == 0 and done.stdout

    assert "not for clients" in wait_until(check_as_edge)        # once the bridge has seen it
    bridge.end()
    assert "route    FAILED: nothing listens there" in run("--check", status=1)


@pytest.mark.parametrize("number", [2, 15], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_everything_within_three_seconds_also_when_a_plugin_blocks(
        start, tmp_path, number):
    (tmp_path / "bad.py").write_text(textwrap.dedent("""
        import pathlib, time
        from radical_edge import Plugin, get

        def block(name):
            pathlib.Path(__file__).with_name(name + ".begun").touch()
            time.sleep(120)

        class Bad(Plugin):
            plugin_name = "bad"

            @get("plain")
            def plain(self, request):
                block("plain")

            @get("block")
            async def block(self, request):
                block("block")
    """))
    # the machine may be busy: it ends within three seconds when it gets the time to
    assert any(end_with_a_stuck_plugin(start, tmp_path / "bad.py", number) < 3 for _ in range(5))


def end_with_a_stuck_plugin(start, plugin_file, number):
    """Return how long a bridge and an edge take to end, both of whose plugin's threads block."""
    both = start("--bridge", "--edge", "--name", "e1", "--port", "0", "-p", "bad", "--plugin-file",
                 str(plugin_file), expect="registered as e1")
    url, token = radical_edge.parse_bridge_url(bridge_url(both)), radical_edge.default_token()
    raws = []
    for route in ("plain", "block"):
        raws.append(Raw(None, token, socket.create_connection((url.host, url.port), timeout=60)))
        raws[-1].send_request("GET", f"/e1/bad/{route}")
    wait_until(lambda: len(list(plugin_file.parent.glob("*.begun"))) == 2)
    status, seconds = both.end(number)
    for name in ("plain", "block"):
        (plugin_file.parent / f"{name}.begun").unlink()
    for connection in raws:
        connection.close()
    assert status == 0
    return seconds


def test_a_bridge_is_ended_by_a_client(start):
    bridge = start("--bridge", "--port", "0", expect="bridge: http")
    answer = radical_edge._urlopen(radical_edge.find_bridges(), "POST", "/bridge/terminate")
    assert answer["status"] == "terminating"
    assert bridge.process.wait(5) == 0


@pytest.fixture
def certificate(tmp_path):
    """A self-made certificate for 127.0.0.1: (its file, its key's file, its pin)."""
    needs("system", shutil.which("openssl"), "the program openssl")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key,
                    "-out", cert], check=True, capture_output=True)
    der = ssl.PEM_cert_to_DER_cert(Path(cert).read_text())
    return cert, key, "sha256:" + hashlib.sha256(der).hexdigest()


def test_tls_is_verified_by_certificate_or_pin_and_refused_without(start, certificate, home):
    cert, key, pin = certificate
    bridge = start("--bridge", "--port", "0", "--cert", cert, "--key", key, expect="bridge: cert")
    url = bridge_url(bridge)
    assert url.startswith("https://") and f"bridge: certificate {pin}" in bridge.lines
    assert "no edge" in run("--list")             # on its own host, all is known
    (home / ".radical/edge/url").unlink()
    assert "not trusted" in run("--list", "--url", url, status=1)
    for trusted in (cert, pin, pin.upper().replace("SHA", "sha")):
        assert "no edge" in run("--list", "--url", url, "--cert", trusted)
    wrong = "sha256:" + "0" * 64
    assert "not the pinned one" in run("--list", "--url", url, "--cert", wrong, status=1)
    assert "64 hexadecimal" in run("--list", "--url", url, "--cert", "sha256:12", status=1)
    refused = start("--edge", "--name", "e1", "--url", url, expect="cannot connect")
    assert any("not trusted" in line for line in refused.errors)
    refused.end()
    start("--edge", "--name", "e2", "--url", url, "--cert", cert, expect="registered as e2")
    start("--edge", "--name", "e3", "--url", url, "--cert", pin, expect="registered as e3")
    with BridgeClient(url, cert=pin) as client:
        job, states = client.get_edge_client("e3").get_plugin("psij"), []
        job.register_notification_callback(lambda *args: states.append(args[3]["state"]))
        done = job.submit_job({"executable": "echo", "arguments": ["over TLS"]})
        assert job.wait_job(done["job_id"], 20)["stdout"] == "over TLS\n"
        wait_until(lambda: "COMPLETED" in states)
        body = "x" * 3_000_000
        assert client.http.post("/e2/psij/register_session", json={"x": body}).status_code == 422
        job.close()


def test_a_large_file_goes_up_and_down_through_tls_in_little_memory(start, certificate, tmp_path):
    """128 MiB, or 4 GiB in the long form; whole files are not to be held in memory."""
    size = (4096 if LONG else 128) * 1024 * 1024
    path, digest = tmp_path / "file", hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(size // (1 << 20)):
            piece = os.urandom(1 << 20)
            digest.update(piece)
            file.write(piece)
    (tmp_path / "plugin.py").write_text(LARGE_FILES.format(folder=tmp_path))
    cert, key, _ = certificate
    bridge = start("--bridge", "--port", "0", "--cert", cert, "--key", key, expect="bridge: https")
    edge = start("--edge", "--name", "e1", "-p", "files", "--plugin-file",
                 str(tmp_path / "plugin.py"), expect="edge: e1")
    with BridgeClient(bridge_url(bridge), cert) as client:
        wait_until(lambda: client.list_edges() == ["e1"])
        with open(path, "rb") as file:
            answer = client.http.request("PUT", "/e1/files/up", content=file,
                                         headers={"Content-Length": str(size)})
        assert answer.json() == {"sha256": digest.hexdigest()}
        found = hashlib.sha256()
        with client.http.stream("GET", "/e1/files/down") as reply:
            assert reply.headers["Content-Length"] == str(size)
            for piece in iter(lambda: reply.read(1 << 20), b""):
                found.update(piece)
        assert found.hexdigest() == digest.hexdigest()
    for process in (bridge, edge):
        status = Path(f"/proc/{process.process.pid}/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
            assert int(peak.split()[1]) < 80 * 1024, peak


LARGE_FILES = '''
import hashlib
from radical_edge import FileResponse, Plugin, get, plugin, put

@plugin("files")
class Files(Plugin):
    @put("up")
    def up(self, request):
        digest = hashlib.sha256()
        with open("{folder}/copy", "wb") as file:
            for piece in request.iter_body():
                digest.update(piece)
                file.write(piece)
        return {{"sha256": digest.hexdigest()}}

    @get("down")
    def down(self, request):
        return FileResponse("{folder}/copy", request)
'''


def test_a_job_survives_kill_9_of_bridge_and_edge(start, home):
    """The main job on real processes: whatever is killed, it ends; state and output stay."""
    port = free_port()
    bridge = start("--bridge", "--port", str(port), expect="bridge: http")
    edge = start("--edge", "--name", "e1", expect="registered as e1")
    with BridgeClient() as client:
        psij = client.get_edge_client("e1").get_plugin("psij")
        script = "echo begin; while [ ! -e go ]; do sleep 0.05; done; echo end; exit 6"
        job_id = psij.submit_job({"executable": "/bin/sh", "arguments": ["-c", script]})["job_id"]
        wait_until(lambda: psij.get_job_status(job_id)["stdout"] == "begin\n")
        bridge.end(9)
        start("--bridge", "--port", str(port), expect="bridge: http")
        wait_until(lambda: "e1" in client.list_edges(), 30)
        assert psij.get_job_status(job_id)["state"] == "ACTIVE"
        edge.end(9)
        (home / "go").touch()                     # the job goes on while there is no edge
        status_file = home / ".radical/edge/state/e1/psij/jobs" / job_id / "status.json"
        wait_until(lambda: '"FAILED"' in status_file.read_text())
        start("--edge", "--name", "e1", expect="registered as e1")
        status = psij.get_job_status(job_id)
        assert (status["state"], status["exit_code"]) == ("FAILED", 6)
        assert status["stdout"] == "begin\nend\n"
        psij.close()


def free_port():
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_small_file_is_read_without_room_for_the_largest(tmp_path):
    path = tmp_path / "token"
    radical_edge.write_private(path, "grün\n")
    tracemalloc.start()
    try:
        assert radical_edge.read_private(path) == "grün"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_an_edge_at_rest_has_no_use_for_is_not_imported():
    code = ("import radical_edge, plugins, sys; radical_edge.make_parser().parse_args(['--edge'])\n"
            "print(*sys.modules)")
    imported = subprocess.run([sys.executable, "-S", "-c", code], cwd=str(ROOT), check=True,
                              capture_output=True, text=True).stdout.split()
    assert "asyncio" in imported
    assert not {"ctypes", "datetime", "email", "gzip", "http.client", "http.server",
                "importlib.metadata", "shutil", "socketserver", "tempfile", "urllib.error",
                "urllib.request", "uuid"} & set(imported)


@pytest.mark.parametrize("host, is_own", [
    ("localhost", True), ("LocalHost", True), ("127.0.0.1", True), ("127.1.2.3", True),
    ("::1", True), ("[::1]", True), ("0:0:0:0:0:0:0:1", True), ("127.1", False), ("", False),
    ("0.0.0.0", False), ("128.0.0.1", False), ("::", False), ("::2", False), ("é", False),
    ("127.0.0.1\0", False), ("localhost.example.org", False), ("127.0.0.1.example.org", False)])
def test_which_hosts_are_this_machine(host, is_own):
    assert radical_edge.is_loopback(host) is is_own


def test_the_directory_for_temporary_files_is_that_of_tempfile(tmp_path, monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    for setting in ({}, {"TMP": str(tmp_path)}, {"TMPDIR": "/nonexistent", "TEMP": str(tmp_path)},
                    {"TMPDIR": str(tmp_path / "none")}, {"TMPDIR": ""}):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", None)             # what it found before
            for name, value in setting.items():
                patch.setenv(name, value)
            assert plugins._temporary_folder() == tempfile.gettempdir(), setting


def test_programs_are_found_as_a_shell_finds_them(tmp_path, monkeypatch):
    program, other = tmp_path / "here", tmp_path / "data"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    other.write_text("no program")
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("PATH", f"/nonexistent:{tmp_path}")
    assert plugins.find_program("here") == plugins.find_program(str(program)) == str(program)
    assert plugins.find_program("here", f"{tmp_path}:/bin") == str(program)
    for missing, path in (("data", None), ("folder", None), ("absent", None), ("", None),
                          ("here", "/nonexistent"), ("here", ""), (str(other), None)):
        assert plugins.find_program(missing, path) is None
    monkeypatch.delenv("PATH")
    assert plugins.find_program("sh") in ("/bin/sh", "/usr/bin/sh")


@pytest.mark.parametrize("way", [[SCRIPT], ["-m", "radical_edge"], ["-B", "-X", "utf8", SCRIPT]])
def test_a_bridge_starts_as_a_script_and_as_a_module(way, home):
    process = subprocess.Popen([sys.executable, *way, "--bridge", "--port", "0"], cwd=str(ROOT),
                               stdout=subprocess.PIPE, text=True)
    try:
        assert "first token" in process.stdout.readline()
        assert process.stdout.readline().startswith("bridge: http://127.0.0.1:")
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stdout.close()


def test_what_serves_is_compiled_before_it_starts_and_a_broken_plugin_file_harms_no_bridge(
        tmp_path, home, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT",
                        shutil.copy(SCRIPT, str(tmp_path / "radical_edge.py")))
    for text in ((ROOT / "plugins.py").read_text(), "def broken(:\n"):
        (tmp_path / "plugins.py").write_text(text)
        bridge = Process("--bridge", "--port", "0", expect="bridge: http",
                         env={"PYTHONDONTWRITEBYTECODE": ""})
        assert bridge.end()[0] == 0
        compiled = {path.name.partition(".")[0] for path in tmp_path.glob("__pycache__/*.pyc")}
        assert compiled == {"radical_edge", "plugins"}


def test_the_core_runs_when_it_is_the_only_file(tmp_path, home):
    shutil.copy(SCRIPT, tmp_path / "radical_edge.py")
    process = subprocess.Popen([sys.executable, "-I", "-S", str(tmp_path / "radical_edge.py"),
                                "--bridge", "--edge", "--name", "e1", "--port", "0"],
                               stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[2] == f"edge: e1, with plugins: {radical_edge.WITHOUT_PLUGINS}\n"
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stdout.close()
