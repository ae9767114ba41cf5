"""A bridge that sends an edge anything, and an edge that sends a bridge anything: neither can crash,
wedge or fill the other, read what it may not, or reach anybody else through it.

    $ python -m pytest tests/test_hostile.py    # RADICAL_EDGE_LONG=1: a hundred times as many rounds
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest

import radical_edge
from doubles import HostileBridge
from radical_edge import Edge, Kind, Opcode, ProtocolError, encode_frame, get, post, put
from test_edge import FakeEdge, FakeEdge2, fake_edge, wait_until          # noqa: F401

ROUNDS = 2000 if os.environ.get("RADICAL_EDGE_LONG") else 25


class Big(radical_edge.Plugin):
    """Answers much, reads slowly."""

    plugin_name = "big"

    @get("answer/{size}")
    async def answer(self, request):
        return radical_edge.StreamingResponse(
            b"x" * 65536 for _ in range(int(request.path_params["size"]) // 65536))

    @get("hello")
    async def hello(self, request):
        return {"hello": request.request_id}

    @put("never")
    async def never(self, request):
        await radical_edge.asyncio.sleep(3600)

    @post("take")
    async def take(self, request):
        return {"size": len(await request.body())}

    async def on_topology_change(self, edges):
        await radical_edge.asyncio.sleep(0.01)


@pytest.fixture(params=[1, 2], ids=["wire1", "wire2"])
def hostile(request, home, monkeypatch):
    monkeypatch.setattr(radical_edge, "BACKOFF_S", (0.01, 0.05))
    bridge = HostileBridge(request.param)
    edge = Edge(bridge.url, "e1", plugins=["big", "sysinfo"], token="x").start()
    bridge.edge = edge
    bridge.accept()
    yield bridge
    assert edge.stop()
    bridge.close()


def is_well(bridge, *, again=True):
    """Check that the edge still answers, over the link or a new one."""
    for _ in range(5 if again else 1):
        with contextlib.suppress(OSError, AssertionError, ProtocolError, ValueError):
            status, answer = bridge.ask("GET", "/big/hello", {"x-request-id": "well"})
            assert (status, answer) == (200, {"hello": "well"})
            return True
        bridge.accept()
    return False


def memory():
    """Return the process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def anything(randomness):
    """Return a JSON value, mostly a wrong one."""
    return randomness.choice([None, True, -1, 0, 1 << 70, 1.5, "", "x", "\ud800", "\0\n", "x" * 5000, [],
                              {}, [[]], {"a": {"b": []}}, [1, "a"], {"": ""}, "GET", "/big/hello"])


def bad_message(randomness):
    kind = randomness.choice(["request", "ping", "error", "shutdown2", "topology", "registered", "x"])
    fields = {name: anything(randomness) for name in randomness.sample(
        ["req_id", "method", "path", "headers", "body", "is_binary", "edges", "message", "wire", "acked",
         "reason"], 5)}
    return {"type": kind, **fields}


def bad_bytes(bridge, randomness):
    """Return bytes that a bridge could send: frames, half frames, messages of every kind."""
    what = randomness.randrange(7)
    if what == 0:
        return randomness.randbytes(randomness.randrange(1, 200))
    if what == 1:
        return encode_frame(Opcode.TEXT, json.dumps(bad_message(randomness)).encode())
    if what == 2:
        return encode_frame(Opcode.BINARY, randomness.randbytes(randomness.randrange(60)))
    if what == 3:
        head = json.dumps(anything(randomness)).encode()
        prefix = radical_edge._WIRE_PREFIX.pack(randomness.randrange(1, 10), randomness.randrange(2),
                                                len(head), randomness.randrange(5))
        return encode_frame(Opcode.BINARY, prefix + head + randomness.randbytes(20))
    if what == 4:
        return encode_frame(Opcode.PING, randomness.randbytes(125)) * 50
    if what == 5:
        return b"\x81\x7f" + (1 << 62).to_bytes(8, "big")
    return encode_frame(Opcode.TEXT, b"\xff\xfe") + encode_frame(Opcode.CLOSE, b"\x03\xe8bye")


def test_a_bridge_that_sends_anything_does_not_crash_an_edge(hostile, caplog):
    randomness = random.Random(7)
    for _ in range(ROUNDS):
        with contextlib.suppress(OSError):
            for _ in range(randomness.randrange(1, 6)):
                hostile.send(bad_bytes(hostile, randomness))
        assert is_well(hostile)
    assert "message failed" not in caplog.text    # nothing came as a surprise


def test_a_bridge_cannot_write_lines_into_the_log_of_an_edge(hostile, caplog):
    for name in ("a\nb", "x\r\nE radical_edge.edge: forged", "\x1b[31m"):
        hostile.ask("GET", "/big/crash" + name.replace("\n", "%0a"), {"x-request-id": name})
        hostile.say(type="topology", edges={name: {"plugins": [name]}})
    hostile.say(type="error", message="refused\nE radical_edge.edge: forged")
    wait_until(lambda: "refuses this edge" in caplog.text)
    assert not any("\n" in record.getMessage() or "\x1b" in record.getMessage()
                   for record in caplog.records)


def test_a_bridge_that_reads_no_answers_does_not_fill_an_edge(hostile, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_LINK_BUFFER", 4 * 1024 * 1024)
    monkeypatch.setattr(radical_edge, "MAX_HELD", 8 * 1024 * 1024)
    monkeypatch.setattr(radical_edge, "MAX_STREAMS", 50)
    is_well(hostile)
    before = memory()
    with contextlib.suppress(OSError):
        for _ in range(600):
            hostile.start("GET", "/big/answer/2000000")
        for _ in range(3000):
            hostile.send(encode_frame(Opcode.PING, bytes(125)) * 20)
    wait_until(lambda: memory() - before < 200e6, 20, "an end of the growth")
    hostile.sock.close()
    hostile.accept()
    assert is_well(hostile)


def test_a_bridge_that_sends_bodies_without_end_does_not_fill_an_edge(hostile, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_HELD", 4 * 1024 * 1024)
    monkeypatch.setattr(radical_edge, "MAX_STREAMS", 10)
    before = memory()
    statuses = set()
    with contextlib.suppress(OSError, AssertionError):
        numbers = []
        for _ in range(40):
            if hostile.wire == 2:
                number = next(hostile._ids)
                hostile.say_wire(Kind.REQUEST, number, ["PUT", "/big/never", {}], b"x" * 60_000)
                numbers.append(number)
            else:
                numbers.append(hostile.start("PUT", "/big/never", body=b"x" * 500_000))
        statuses.add(hostile.answer(numbers[-1])[0])
    assert statuses == {503}                      # the last ones were too many
    assert memory() - before < 200e6
    hostile.sock.close()
    hostile.accept()
    assert is_well(hostile)


def test_a_bridge_that_sends_more_than_it_may_loses_the_link_and_no_more(home, monkeypatch):
    monkeypatch.setattr(radical_edge, "BACKOFF_S", (0.01, 0.05))
    bridge = HostileBridge(2)
    edge = Edge(bridge.url, "e1", plugins=["big"], token="x").start()
    bridge.accept()
    number = next(bridge._ids)
    bridge.say_wire(Kind.REQUEST, number, ["PUT", "/big/never", {}])
    with contextlib.suppress(OSError):
        for _ in range(200):
            bridge.say_wire(Kind.DATA, number, body=bytes(65536))
    assert bridge.is_left()
    bridge.accept()
    assert is_well(bridge)
    assert edge.stop()
    bridge.close()


def test_topologies_that_come_too_fast_are_told_late_and_not_collected(hostile):
    edges = {f"e{number}": {"plugins": ["x" * 100]} for number in range(2000)}
    before = memory()
    for _ in range(100):
        hostile.say(type="topology", edges=edges)
    assert is_well(hostile, again=False)
    assert memory() - before < 150e6


@pytest.mark.parametrize("path", [
    "/../etc/passwd", "/big/../../etc/passwd", "//etc/passwd", "/big/%2e%2e/x", "/big/hello/..", "",
    "big/hello", "/big/hello%00", "/big/" + "a" * 60_000, "http://x/big/hello", "*",
    "/big/%ff", "/sysinfo/metrics/..%2f..%2fetc"])
def test_paths_that_lead_elsewhere_lead_nowhere(hostile, path):
    status, answer = hostile.ask("GET", path)
    assert status in (400, 404) and answer["error"] is True
    assert is_well(hostile, again=False)


def test_files_outside_of_the_roots_cannot_be_read(home, tmp_path):
    if "staging" not in radical_edge.Plugin.get_plugin_names():
        radical_edge.load_builtin_plugins()
    (tmp_path / "root").mkdir()
    secret = tmp_path / "secret"
    secret.write_text("not for you")
    os.symlink(secret, tmp_path / "root/link")
    os.symlink(tmp_path, tmp_path / "root/up")
    bridge = HostileBridge(2)
    edge = Edge(bridge.url, "e1", plugins=["staging"], token="x",
                policy=radical_edge.Policy(json.dumps({"roots": [str(tmp_path / "root")]}))).start()
    routes = bridge.accept()["plugins"]["staging"]["routes"]
    status, made = bridge.ask("POST", "/staging/register_session", body=b"{}")
    names = [str(secret), "../secret", "link", "up/secret", str(tmp_path / "root/../secret"), "/etc/passwd",
             "/proc/self/environ", str(home / ".radical/edge/token"), "~/.radical/edge/token"]
    import urllib.parse
    for method, pattern in routes:
        for name in names:
            quoted = urllib.parse.quote(name, safe="")
            path = pattern.replace("{sid}", made.get("sid", "x"))
            for parameter in ("{path}", "{name}"):
                path = path.replace(parameter, quoted)
            status, answer = bridge.ask(
                method, f"/staging/{path}?path={quoted}&src={quoted}&source={quoted}",
                body=json.dumps({"path": name, "src": name, "source": name, "paths": [name]}).encode()
                if method in ("POST", "PUT") else b"")
            text = json.dumps(answer)
            assert "not for you" not in text and "root:x:0" not in text, (method, pattern, name)
    assert secret.read_text() == "not for you"
    assert edge.stop()
    bridge.close()


# ---------------------------------------------------------------------------
# A hostile edge
# ---------------------------------------------------------------------------

def edge_bytes(randomness):
    """Return bytes that an edge could send to a bridge."""
    what = randomness.randrange(6)
    mask = b"abcd"
    if what == 0:
        return randomness.randbytes(randomness.randrange(1, 200))
    if what == 1:
        kind = randomness.choice(["register", "response", "notification", "topology", "pong", "x"])
        fields = {name: anything(randomness) for name in randomness.sample(
            ["req_id", "status", "headers", "body", "edge", "plugin", "topic", "data", "edges",
             "plugins", "endpoint", "edge_name", "instance", "wire"], 6)}
        return encode_frame(Opcode.TEXT, json.dumps({"type": kind, **fields}).encode(), mask=mask)
    if what in (2, 3):
        head = json.dumps([anything(randomness) for _ in range(randomness.randrange(4))]).encode()
        prefix = radical_edge._WIRE_PREFIX.pack(randomness.randrange(1, 9), randomness.randrange(2),
                                                len(head), randomness.randrange(5))
        return encode_frame(Opcode.BINARY, prefix + head + randomness.randbytes(20), mask=mask)
    if what == 4:
        return encode_frame(Opcode.PING, bytes(125), mask=mask) * 50
    return encode_frame(Opcode.CLOSE, b"\x03\xe8", mask=mask)


def test_an_edge_that_sends_anything_crashes_no_bridge_and_harms_no_other(bridge, tokens, edge, raw,
                                                                         caplog):
    randomness = random.Random(8)
    client = raw()
    for number in range(ROUNDS):
        with contextlib.suppress(OSError, AssertionError, radical_edge.Refused, ValueError):
            fake = (FakeEdge if number % 2 else FakeEdge2)(bridge, tokens[1]["edge"], "f1")
            for _ in range(randomness.randrange(1, 8)):
                fake.send(edge_bytes(randomness))
            fake.close()
        assert client.request("GET", "/e1/echo/hello")[0] == 200
        assert client.request("POST", "/edge/list")[0] == 200
        assert client.request("GET", "/openapi.json")[0] == 200
    assert "message failed" not in caplog.text and "internal error" not in caplog.text


def test_an_edge_that_reads_nothing_does_not_fill_the_bridge(bridge, tokens, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_LINK_BUFFER", 4 * 1024 * 1024)
    monkeypatch.setattr(bridge._registry, "_grace", 1.0)
    fake = FakeEdge(bridge, tokens[1]["edge"], "f1")
    fake.hear("topology")
    before = memory()
    with contextlib.suppress(OSError):
        for _ in range(3000):
            fake.send(encode_frame(Opcode.PING, bytes(125), mask=b"abcd") * 20)
    body = bytes(1_000_000)
    statuses = []

    def ask():
        with contextlib.suppress(OSError, AssertionError):
            statuses.append(raw().request("POST", "/f1/p/x", body)[0])

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(statuses) >= 5, 20, "refusals")
    assert set(statuses) == {503} and memory() - before < 200e6
    fake.close()
    for thread in threads:
        thread.join(20)


def test_an_edge_neither_speaks_nor_acts_for_another(bridge, tokens, edge, raw, fake_edge):
    fake = fake_edge("f1")
    fake.hear("topology")
    client = raw()
    client.send_request("GET", "/events")
    client.reply()
    fake.say(type="topology", edges={"e1": {"plugins": {"evil": {}}}, "f1": {"plugins": {"p": {
        "namespace": "/e1/echo", "type": "echo"}}}})
    fake.say(type="notification", edge="e1", plugin="echo", topic="said", data={"text": "forged"})
    fake.say(type="response", req_id="1", status=200, headers={}, body="forged")
    fake.say(type="shutdown", reason="x")
    fake.say(type="request", req_id="1", method="POST", path="/e1/echo/echo", headers={}, body="x")
    seen = b""
    while b"forged" not in seen:
        seen += client.sock.recv(65536)
    assert b'"edge":"f1"' in seen and b'"edge":"e1","plugin"' not in seen
    topology = json.loads(raw().request("POST", "/edge/list")[2])["data"]["edges"]
    assert "evil" not in topology["e1"]["plugins"]
    assert topology["f1"]["plugins"]["p"]["namespace"] == "/f1/p"
    refused = fake_edge("e1")                     # another token's edge has this name? the same token
    assert refused.hear("none") == {"close": 1008}
    assert raw().request("GET", "/e1/echo/hello")[0] == 200


def test_what_an_edge_answers_does_not_reach_a_browser_as_a_page_of_ours(bridge, raw, fake_edge):
    fake = fake_edge("f1")
    fake.say(type="topology", edges={"f1": {"plugins": {"p": {"ui_module": "alert(1)"}}}})
    fake.hear("topology")
    client = raw()
    client.send_request("GET", "/f1/p/page")
    request = fake.hear("request")
    fake.say(type="response", req_id=request["req_id"], status=200, body="<script>alert(1)</script>",
             headers={"Content-Type": "text/html", "Set-Cookie": "radical_edge=x", "Location": "//evil",
                      "Access-Control-Allow-Origin": "*", "Content-Security-Policy": "default-src *",
                      "X-Frame-Options": "x", "Refresh": "0", "Clear-Site-Data": "*"})
    status, fields, _ = client.reply()
    assert status == 200 and fields["content-security-policy"] == "sandbox; default-src 'none'"
    assert fields["x-content-type-options"] == "nosniff"
    assert not {"set-cookie", "location", "access-control-allow-origin", "refresh",
                "clear-site-data"} & set(fields)
    module = wait_until(lambda: [reply for reply in [raw().request("GET", "/plugins/p.js?edge=f1")]
                                 if reply[0] == 200])[0]
    assert "sandbox" in module[1]["content-security-policy"]


def test_a_hostile_edge_cannot_wedge_the_loop_of_a_bridge(bridge, tokens, edge, raw):
    """Deeply nested and very wide messages; what they cost is bounded."""
    fake = FakeEdge(bridge, tokens[1]["edge"], "f1")
    fake.hear("topology")
    for text in ("[" * 100_000, '{"type":"topology","edges":' + '{"a":' * 5000 + "1" + "}" * 5001,
                 '{"type":"x",' + ",".join(f'"{n}":0' for n in range(100_000)) + "}"):
        with contextlib.suppress(OSError):
            fake.send(encode_frame(Opcode.TEXT, text.encode(), mask=b"abcd"))
    began = time.monotonic()
    assert raw().request("GET", "/e1/echo/hello")[0] == 200
    assert time.monotonic() - began < 20
    with contextlib.suppress(OSError):
        fake.sock.shutdown(socket.SHUT_RDWR)
    fake.close()
