"""Tests of the limits, the counters, the audit log and the log lines: real sockets, no mocks.

    $ python -m pytest tests/test_limits.py     # prometheus_client and openapi-spec-validator, if there
"""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import radical_edge
from radical_edge import Kind, Opcode, encode_frame
from test_edge import (ROOT, FakeEdge, Raw, assert_error, certificate, fake_edge,    # noqa: F401
                       needs_module, bridge_url, fake_edge2, only_wire2, start, wait_until)


def metrics(client):
    """Return {"name{labels}": value} of the bridge's /metrics."""
    status, fields, body = client.request("GET", "/metrics")
    assert status == 200 and fields["content-type"].startswith("text/plain")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def count(client, limit):
    """Return how often a limit has refused something."""
    return metrics(client).get(f'radical_edge_limited_total{{limit="{limit}"}}', 0)


def refused(client, reply, status, limit, *words):
    """Check a refusal: its status, the limit that it names, and the counter of that limit."""
    assert_error(reply, status, *words)
    assert reply[1]["x-limit"] == limit
    assert count(client, limit) == 1


# ---------------------------------------------------------------------------
# Limits: each has a status, a counter and a flag
# ---------------------------------------------------------------------------

def test_a_limit_is_changed_by_its_name_and_a_wrong_one_is_explained(monkeypatch):
    for constant, _ in radical_edge.LIMITS.values():
        monkeypatch.setattr(radical_edge, constant, getattr(radical_edge, constant))
    for name, (constant, _) in radical_edge.LIMITS.items():
        kind = type(getattr(radical_edge, constant))
        radical_edge.set_limit(f"{name}=17")
        assert getattr(radical_edge, constant) == 17 and type(getattr(radical_edge, constant)) is kind
    radical_edge.set_limit("head-time=0.5")
    assert radical_edge.HEAD_S == 0.5
    for text in ("nosuch=1", "body", "body=", "body=0", "body=-1", "body=1.5", "body=1e3",
                 "body=0x10", "=1"):
        with pytest.raises(ValueError, match="--limit"):
            radical_edge.set_limit(text)


def test_the_readme_lists_each_limit_with_its_default():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("| limit |"))
    rows = [line.split("|")[1:3] for line in lines[begin + 2:lines.index("", begin)]]
    told = {name: default for names, default in rows for name in re.findall(r"`([a-z-]+)`", names)}
    assert sorted(told) == sorted(radical_edge.LIMITS)
    for name, (constant, _) in radical_edge.LIMITS.items():
        value = getattr(radical_edge, constant)
        shown = [f"{value:,}" if type(value) is int else f"{value:g} s",
                 f"{value // 1024} KiB" if value >= 1024 else "", f"{value // 2 ** 20} MiB"]
        assert any(text and text in told[name] for text in shown), (name, shown, told[name])


@pytest.mark.parametrize("limit, data, status", [
    ("head", b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n", 414),
    ("head", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
    ("head", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\na: " + b"b" * 33_000, 431),
    ("body", b"POST /auth HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 70000\r\n\r\n", 413)])
def test_what_is_too_large_is_refused_and_counted(bridge, raw, limit, data, status):
    client = raw(None)
    client.send(data)
    refused(raw(), client.reply(), status, limit)


def test_a_body_that_a_route_takes_whole_has_a_limit(edge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_BODY", 70_000)
    client = raw()
    client.send_request("POST", "/e1/echo/echo", bytes(80_000))
    refused(raw(), client.reply(), 413, "body")


def test_a_token_has_only_so_many_requests_a_second(bridge, raw, tokens, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_RATE", 5)
    busy, other = raw(tokens[1]["client"]), raw()
    replies = [busy.request("GET", "/edges") for _ in range(20)]
    late = [reply for reply in replies if reply[0] == 429]
    assert len(late) >= 5 and {reply[0] for reply in replies} == {200, 429}
    assert late[0][1]["retry-after"] == "1" and late[0][1]["x-limit"] == "request-rate"
    assert count(other, "request-rate") == len(late)
    wait_until(lambda: busy.request("GET", "/edges")[0] == 200)


def test_a_token_has_only_so_many_sessions_in_a_plugin(edge, raw, tokens, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_SESSIONS", 2)
    client = raw(tokens[1]["client"])
    sids = [json.loads(client.request("POST", "/e1/echo/register_session")[2])["sid"]
            for _ in range(2)]
    reply = client.request("POST", "/e1/echo/register_session")
    refused(raw(), reply, 429, "sessions", "unregister")
    assert raw().request("POST", "/e1/echo/register_session")[0] == 200    # another token's
    assert client.request("POST", f"/e1/echo/unregister_session/{sids[0]}")[0] == 200
    assert client.request("POST", "/e1/echo/register_session")[0] == 200


def test_a_session_has_only_so_many_jobs(edge, raw, home, monkeypatch):
    import plugins
    edge.host.add(plugins.PluginPSIJ)
    client = raw()
    wait_until(lambda: client.request("GET", "/e1/psij/version")[0] == 200)
    sid = json.loads(client.request("POST", "/e1/psij/register_session")[2])["sid"]
    monkeypatch.setattr(radical_edge, "MAX_JOBS", 1)
    body = json.dumps({"job_spec": {"executable": "true"}, "executor": "local"}).encode()
    job = json.loads(client.request("POST", f"/e1/psij/submit/{sid}", body)[2])["job_id"]
    refused(raw(), client.request("POST", f"/e1/psij/submit/{sid}", body), 429, "jobs", "1 jobs")
    wait_until(lambda: json.loads(client.request("GET", f"/e1/psij/status/{sid}/{job}")[2])["state"]
               == "COMPLETED")


def test_an_edge_has_only_so_many_requests_waiting(bridge, raw, fake_edge, monkeypatch):  # noqa: F811
    monkeypatch.setattr(radical_edge, "MAX_PENDING", 1)
    fake = fake_edge("f1")
    fake.hear("topology")
    raw().send_request("GET", "/f1/p/x")
    fake.hear("request")
    refused(raw(), raw().request("GET", "/f1/p/x"), 503, "pending", "too much")


def test_an_address_has_only_so_many_wrong_tokens(bridge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "LOGIN_FAILURES", 1)
    assert raw("wrong").request("GET", "/edges")[0] == 401
    refused(raw(), raw("wrong").request("GET", "/edges"), 429, "login", "wait")


def test_an_address_has_only_so_many_connections(bridge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_PER_ADDRESS", 2)
    monkeypatch.setattr(radical_edge.ConnectionLimit, "EXEMPT", ("nothing",))
    clients = [raw() for _ in range(2)]
    assert [client.request("GET", "/health")[0] for client in clients] == [200, 200]
    one_more = raw()
    refused(clients[0], one_more.reply(), 429, "per-address")
    assert one_more.is_closed()
    clients[1].close()
    wait_until(lambda: bridge.open.total == 1)
    assert raw().request("GET", "/health")[0] == 200


@pytest.mark.parametrize("address, key", [
    ("127.0.0.1", ""), ("::1", ""), ("::ffff:127.0.0.9", ""), ("192.0.2.7", "192.0.2.7"),
    ("::ffff:192.0.2.7", "::ffff:192.0.2.7"), ("2001:db8:1:2:3:4:5:6", "20010db800010002"),
    ("2001:db8:1:2::9", "20010db800010002"), ("fe80::1%eth0", "fe80000000000000")])
def test_addresses_of_a_network_are_counted_together_and_ours_not_at_all(address, key):
    limit = radical_edge.ConnectionLimit(100)
    limit.enter(address)
    assert limit._counts == ({key: 1} if key else {}) and limit.total == 1
    limit.leave(address)
    assert limit._counts == {} and limit.total == 0


def test_all_connections_together_have_a_limit(bridge, raw, monkeypatch):
    client = raw()
    assert client.request("GET", "/health")[0] == 200
    monkeypatch.setattr(radical_edge, "MAX_CONNECTIONS", 1)
    refused(client, raw().reply(), 503, "connections")
    assert json.loads(client.request("GET", "/health")[2])["ready"] is False
    assert_error(client.request("GET", "/health/ready"), 503, "connections")
    assert client.request("GET", "/health/live")[0] == 200


def test_every_connection_is_counted_until_its_end_and_no_longer(tokens, certificate, edge, bridge,
                                                                raw):
    cert, key, _ = certificate
    secure = radical_edge.Bridge(port=0, tokens=tokens[0], cert=cert, key=key,
                                 state_dir=bridge._state_dir.with_name("secure")).start()
    for _ in range(3):
        client = raw()
        assert client.request("GET", "/e1/echo/hello")[0] == 200
        client.close()
        client = raw()
        client.send(b"GET / HTTP/1.1\r\n\r\n")  # no Host
        assert client.reply()[0] == 400
        client.close()
        raw().close()
        client = raw()
        client.send_request("GET", "/events")
        client.reply()
        client.close()
        sock = socket.create_connection(secure._listener.server_address, timeout=10)
        sock.sendall(b"no TLS at all, but long enough to be seen as something else\r\n\r\n")
        assert _is_closed(sock)
        sock.close()
    wait_until(lambda: bridge.open.total == 1 == len(bridge.connections))    # the edge's
    wait_until(lambda: secure.open.total == 0)
    assert secure.stop()


def test_the_systems_limit_of_files_is_kept_clear_of(home):
    code = ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); "
            "import radical_edge; print(radical_edge.open_file_room())")
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True,
                           cwd=os.path.dirname(radical_edge.__file__))
    assert int(found.stdout) == 100


def test_a_bridge_without_free_files_neither_spins_nor_loses_who_is_there(tokens, home):
    code = ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
            "import radical_edge, sys; radical_edge._raise_file_limit = lambda: None; "
            "sys.exit(radical_edge.main(['--bridge', '--port', '0']))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               cwd=os.path.dirname(radical_edge.__file__), text=True)
    try:
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        first = Raw(None, tokens[1]["admin"], socket.create_connection(("127.0.0.1", port)))
        first.sock.settimeout(10)
        assert first.request("GET", "/health")[0] == 200
        others = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        wait_until(lambda: count(first, "connections") > 0)
        used = _cpu_seconds(process.pid)
        assert first.request("GET", "/edges")[0] == 200
        time.sleep(1.0)                           # to see what an idle second costs
        assert _cpu_seconds(process.pid) - used < 0.6
        for sock in [*others, first.sock]:
            sock.close()
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stdout.close()


def _cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_bridge_takes_only_so_many_registrations(bridge, raw, fake_edge, monkeypatch):  # noqa: F811
    monkeypatch.setattr(radical_edge, "MAX_EDGES", 1)
    fake_edge("f1").hear("topology")
    with pytest.raises(radical_edge.Refused) as caught:
        fake_edge("f2")
    assert caught.value.status == 503
    assert count(raw(), "registrations") == 1


def test_what_an_edge_says_of_itself_has_limits(bridge, raw, fake_edge):       # noqa: F811
    large = {"p": {"ui_config": "x" * (radical_edge.MAX_DESCRIBED + 1)}}
    assert fake_edge("f1", endpoint={"x": large}).hear("none") == {"close": 1009}
    with contextlib.suppress(OSError):            # refused at its head, before all was sent
        fake_edge("f2", endpoint={"x": "y" * radical_edge.MAX_REGISTER})
    for bad in ("\ud800", float("nan")):
        assert fake_edge("f3", endpoint={"x": bad}).hear("none") == {"close": 1007}
    names = json.loads(raw().request("POST", "/edge/list")[2])["data"]["edges"]
    assert names == {}


def test_the_edges_of_one_token_have_a_share_of_what_edges_may_say(bridge, raw, tokens, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_TOLD", 100_000)

    def register(name, size, token=tokens[1]["edge"]):
        fake = FakeEdge(bridge, token, name, endpoint={"x": "y" * size}, instance=name)
        return fake, fake.hear("topology")

    first, second = register("f1", 40_000)[0], register("f2", 40_000)[0]
    third, answer = register("f3", 40_000)
    assert answer == {"close": 1008} and count(raw(), "registrations") == 1
    other = register("f4", 90_000, tokens[0].add("edge-2", "edge"))
    assert other[1]["type"] == "topology"         # another token has a share of its own
    again = register("f1", 50_000)                # and who comes back has what it had
    assert again[1]["type"] == "topology"
    again[0].say(type="topology", edges={"f1": {"plugins": {"p": {"ui_config": "z" * 70_000}}}})
    wait_until(lambda: again[0].hear("none") == {"close": 1008})
    second.close()
    wait_until(lambda: list(bridge._registry.links) == ["f4"] and "f2" in bridge._registry.absent)
    last, answer = register("f5", 70_000)         # those that may be back count, too
    assert answer == {"close": 1008}
    for fake in (first, third, other[0], again[0], last):
        fake.close()


def test_the_edges_of_one_token_leave_room_for_others(bridge, raw, tokens, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_EDGES", 4)
    fakes = [FakeEdge(bridge, tokens[1]["edge"], name) for name in ("f1", "f2", "f3")]
    assert [fake.hear("topology").get("close") for fake in fakes] == [None, None, 1008]
    fakes.append(FakeEdge(bridge, tokens[0].add("edge-2", "edge"), "f4"))
    assert fakes[-1].hear("topology")["type"] == "topology"
    assert count(raw(), "registrations") == 1
    for fake in fakes:
        fake.close()


def test_links_of_a_token_hold_only_so_much_before_they_have_registered(bridge, raw, tokens,
                                                                        monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_TOLD", 1_000_000)
    url = radical_edge.parse_bridge_url(bridge.url)

    def begin(token):
        """Begin a register message of 600,000 bytes, and send half of it."""
        sock, _ = radical_edge.open_websocket(url, token, None)
        sock.settimeout(30)
        sock.sendall(encode_frame(Opcode.TEXT, b"{" * 600_000, mask=b"abcd")[:300_000])
        return sock

    def held():
        return bridge._registry.opening.get("edge-1", 0)

    socks = [begin(tokens[1]["edge"]) for _ in range(3)]
    wait_until(lambda: held() == 900_000)
    socks.append(begin(tokens[1]["edge"]))
    while socks[-1].recv(65536):                  # ended, with a reason
        pass
    assert count(raw(), "registrations") >= 1
    wait_until(lambda: held() == 900_000)
    other = FakeEdge(bridge, tokens[0].add("edge-2", "edge"), "f2")
    assert other.hear("topology")["type"] == "topology"          # another token has its own share
    for sock in socks:
        sock.close()
    wait_until(lambda: bridge._registry.opening == {})
    fakes = [FakeEdge(bridge, tokens[1]["edge"], name, endpoint={"x": "y" * 300_000})
             for name in ("f3", "f4", "f5")]      # and who has registered is told, not held
    assert [fake.hear("topology")["type"] for fake in fakes] == ["topology"] * 3
    assert bridge._registry.opening == {}
    for fake in (other, *fakes):
        fake.close()


def test_answers_of_an_older_edge_that_nobody_reads_have_a_limit(
        bridge, raw, fake_edge, monkeypatch):      # noqa: F811
    monkeypatch.setattr(radical_edge, "MAX_BODIES", 60_000_000)
    fake, clients = fake_edge("f1"), [raw() for _ in range(4)]
    fake.hear("topology")

    def ask(client, size):
        client.send_request("GET", "/f1/p/x")
        req_id = fake.hear("request")["req_id"]
        fake.say(type="response", req_id=req_id, status=200, headers={}, body="x" * size)

    for client in clients[:3]:
        ask(client, 25_000_000)                   # more than the system takes on the way
    refused(raw(), clients[2].reply(), 503, "pending", "unread")
    ask(clients[3], 200_000)                      # small ones go on
    assert clients[3].reply()[0] == 200
    assert len(clients[0].reply()[2]) == 25_000_000
    ask(clients[2], 25_000_000)                   # what was read is not counted any more
    assert len(clients[2].reply()[2]) == 25_000_000
    clients[1].close()                            # nor is what nobody will read
    wait_until(lambda: bridge.answers.held == 0)


def test_a_first_head_and_a_later_one_have_their_time(bridge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "HEAD_S", 0.3)
    first, later = raw(), raw()
    assert later.request("GET", "/health")[0] == 200
    for client in (first, later):
        client.send(b"GET /health HTTP/1.1\r\nHos")
    assert [client.reply()[0] for client in (first, later)] == [408, 408]
    monkeypatch.undo()
    assert count(raw(), "head-time") == 2


def test_a_body_has_its_time(edge, raw, monkeypatch):
    monkeypatch.setattr(radical_edge, "BODY_IDLE_S", 0.3)
    client = raw()
    client.send(b"POST /e1/echo/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
                b"Authorization: Bearer " + client.token.encode() + b"\r\n\r\nhel")
    reply = client.reply()
    monkeypatch.undo()
    refused(raw(), reply, 408, "body-time")


def send_upload_head(client, path, length):
    client.send(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
                f"Authorization: Bearer {client.token}\r\n\r\n".encode())


@pytest.mark.parametrize("length", [60_000, 10 ** 6])    # taken whole, passed on in pieces
def test_a_body_that_drips_without_end_is_given_up(edge, raw, monkeypatch, length):
    monkeypatch.setattr(radical_edge, "MIN_BODY_RATE", 1_000_000)
    monkeypatch.setattr(radical_edge, "BODY_RATE_S", 1.0)
    client, other = raw(), raw()
    send_upload_head(client, "/e1/echo/echo", length)
    client.sock.settimeout(0.1)
    for _ in range(300):                          # MIN_PROGRESS ten times a second: never idle
        client.send(bytes(radical_edge.MIN_PROGRESS))
        with contextlib.suppress(socket.timeout):
            refused(other, client.reply(), 408, "body-rate")
            break
    else:
        pytest.fail("the drip was taken for a body")
    wait_until(lambda: metrics(other)["radical_edge_requests_pending"] == 0)


class Slow(radical_edge.Plugin):
    """Reads nothing of a body until it is told to."""

    plugin_name = "slow"

    async def start(self):
        self.loop, self.read = asyncio.get_running_loop(), asyncio.Event()
        self.begun, self.gone = threading.Event(), threading.Event()

    @radical_edge.post("take")
    async def take(self, request):
        try:
            self.begun.set()
            await self.read.wait()
            return {"size": sum([len(piece) async for piece in request.stream()])}
        except asyncio.CancelledError:
            self.gone.set()
            raise

    def read_on(self):
        self.loop.call_soon_threadsafe(self.read.set)


@only_wire2
@pytest.mark.parametrize("at", ["e1", "bridge"])
def test_the_time_in_which_we_do_not_read_is_not_held_against_a_body(bridge, edge, raw, monkeypatch,
                                                                    at):
    for name in ("BODY_IDLE_S", "BODY_RATE_S"):
        monkeypatch.setattr(radical_edge, name, 3.0)
    made = (edge.host if at == "e1" else bridge._host).add(Slow)
    client = raw()
    wait_until(lambda: client.request("GET", f"/{at}/slow/version")[0] == 200)
    send_upload_head(client, f"/{at}/slow/take", 20_000_000)
    sender = threading.Thread(target=client.send, args=(bytes(20_000_000),))
    sender.start()
    wait_until(lambda: any(connection._paused for connection in bridge.connections))
    time.sleep(3.0 + 4 * radical_edge.SWEEP_S)    # both deadlines would be over
    made.read_on()
    reply = client.reply()
    sender.join()
    assert (reply[0], json.loads(reply[2])) == (200, {"size": 20_000_000})


@only_wire2
@pytest.mark.parametrize("at", ["e1", "bridge"])
def test_a_handler_is_cancelled_when_the_body_it_waits_for_is_given_up(bridge, edge, raw, monkeypatch,
                                                                      at):
    monkeypatch.setattr(radical_edge, "BODY_IDLE_S", 3.0)
    made = (edge.host if at == "e1" else bridge._host).add(Slow)
    client = raw()
    wait_until(lambda: client.request("GET", f"/{at}/slow/version")[0] == 200)
    send_upload_head(client, f"/{at}/slow/take", 10 ** 6)
    assert made.begun.wait(30)
    made.read_on()
    refused(raw(), client.reply(), 408, "body-time")
    assert made.gone.wait(30)


def test_a_clock_of_a_body_goes_by_progress_and_rate_and_stands_still_while_paused():
    clock = radical_edge.BodyClock(1000.0)
    assert (clock.deadline, clock.limit) == (1030.0, "body-time")
    clock.on_data(1023, 1029.0)
    assert clock.deadline == 1030.0
    clock.on_data(1, 1029.0)
    assert clock.deadline == 1059.0
    clock.pause(1039.0)
    clock.pause(1040.0)
    assert clock.deadline == float("inf")
    clock.resume(1139.0)
    assert clock.deadline == 1159.0
    for now in range(1150, 1220, 10):             # 100 bytes a second: never idle, and too slow
        clock.on_data(1024, float(now))
    assert (clock.deadline, clock.limit) == (1220.0, "body-rate")    # 120 s and what was paused
    clock.on_data(60_000, 1219.0)
    assert (clock.deadline, clock.limit) == (1249.0, "body-time")


def test_a_handshake_has_its_time_in_all_however_it_drips(tokens, certificate,   # noqa: F811
                                                           monkeypatch):
    monkeypatch.setattr(radical_edge, "HANDSHAKE_S", 1.0)
    cert, key, _ = certificate
    bridge = radical_edge.Bridge(port=0, tokens=tokens[0], cert=cert, key=key).start()
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        hello = context.wrap_bio(incoming, outgoing)
        with pytest.raises(ssl.SSLWantReadError):
            hello.do_handshake()
        data = outgoing.read()
        began = time.monotonic()
        sock = socket.create_connection(bridge._listener.server_address, timeout=0.1)
        while not _is_closed(sock):
            assert time.monotonic() - began < 20
            if data:
                try:
                    sock.sendall(data[:1])
                except OSError:
                    break
                data = data[1:]
        assert data, "the whole hello was taken, a byte every tenth of a second"
        sock.close()
        client = http.client.HTTPSConnection("127.0.0.1", bridge._listener.server_address[1],
                                             context=ssl._create_unverified_context())
        told = 'radical_edge_limited_total{limit="handshake-time"} 1'
        wait_until(lambda: told in fetch_text(client, "/metrics", tokens[1]["read"]))
        client.close()
    finally:
        assert bridge.stop()


def fetch_text(client, path, token):
    client.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    return client.getresponse().read().decode()


def _is_closed(sock):
    try:
        return sock.recv(100) == b""
    except socket.timeout:
        return False
    except OSError:
        return True


def test_an_edge_that_never_registers_is_left(bridge, tokens, monkeypatch):
    monkeypatch.setattr(radical_edge, "HANDSHAKE_S", 0.3)
    sock, _ = radical_edge.open_websocket(radical_edge.parse_bridge_url(bridge.url),
                                          tokens[1]["edge"], None)
    sock.settimeout(10)
    assert sock.recv(100)[:1] == b"\x88"           # a close frame
    sock.close()


# -- notifications

def test_a_notification_of_an_older_edge_has_a_size(bridge, raw, fake_edge, caplog,   # noqa: F811
                                                    monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_NOTIFICATION", 1000)
    fake = fake_edge("f1")
    fake.hear("topology")
    for data in ("x" * 2000, "small"):
        fake.say(type="notification", edge="f1", plugin="p", topic="t", data=data)
    wait_until(lambda: bridge._hub.log.last_id >= bridge._hub.log.first_id)
    client = raw()
    assert metrics(client)['radical_edge_events_dropped_total{reason="size"}'] == 1
    assert count(client, "notification") == 1
    assert metrics(client)["radical_edge_notifications_total"] == 1
    assert "notification dropped (size)" in caplog.text


def test_notifications_of_an_older_edge_have_a_rate(bridge, raw, fake_edge, monkeypatch):  # noqa: F811
    monkeypatch.setattr(radical_edge, "NOTIFY_BURST", 10)
    monkeypatch.setattr(radical_edge, "MAX_NOTIFY_RATE", 1)
    fake = fake_edge("f1")
    fake.hear("topology")
    for number in range(30):
        fake.say(type="notification", edge="f1", plugin="p", topic="t", data=number)
    client = raw()
    wait_until(lambda: sum(metrics(client).get(name, 0) for name in (
        'radical_edge_events_dropped_total{reason="rate"}', "radical_edge_notifications_total"))
        == 30)
    assert 10 <= metrics(client)["radical_edge_notifications_total"] < 30
    assert count(client, "notification-rate") == metrics(client)[
        'radical_edge_events_dropped_total{reason="rate"}']


@only_wire2
def test_notifications_that_come_too_fast_are_slowed_down_and_none_is_lost(edge, bridge, raw,
                                                                          monkeypatch):
    monkeypatch.setattr(radical_edge, "NOTIFY_BURST", 50)
    monkeypatch.setattr(radical_edge, "MAX_NOTIFY_RATE", 400)
    total = 3 * radical_edge.NOTIFY_WINDOW
    for number in range(total):
        edge.host.notify("echo", "n", number)
    client = raw()
    wait_until(lambda: metrics(client)["radical_edge_notifications_total"] == total, 30)
    assert metrics(client)["radical_edge_notifications_delayed_total"] > 0
    assert count(client, "notification-rate") > 0
    wait_until(lambda: edge.journal.first > edge.journal.last, 30)    # all were acknowledged


def test_notifications_that_wait_for_no_acknowledgement_cost_the_link(fake_edge2, bridge,   # noqa: F811
                                                                      monkeypatch):
    monkeypatch.setattr(radical_edge, "NOTIFY_BURST", 1)
    monkeypatch.setattr(radical_edge, "MAX_NOTIFY_RATE", 1)
    first = fake_edge2.known or 1
    with pytest.raises((AssertionError, OSError)):
        for number in range(first, first + 8 * radical_edge.NOTIFY_WINDOW):
            fake_edge2.say_wire(Kind.NOTIFICATION, 0, [number, "p", "t"], b"1")
        while True:
            fake_edge2.hear_wire(Kind.REQUEST)
    wait_until(lambda: not bridge._registry.links)


# ---------------------------------------------------------------------------
# What is told: counters, health, the audit log, log lines
# ---------------------------------------------------------------------------

def test_metrics_are_valid_and_name_routes_not_paths(edge, bridge, raw):
    parser = needs_module("prometheus_client.parser", "security")
    client = raw()
    for path in ("/e1/echo/hello", "/e1/echo/hello?x=1", "/e1/echo/fail/418", "/edges",
                 "/e1/echo/nosuch/route", "/nobody/echo/hello", "/health/ready", "/x"):
        client.request("GET", path)
    body = client.request("GET", "/metrics")[2].decode()
    families = {family.name: family for family in parser.text_string_to_metric_families(body)}
    samples = {(sample.labels["route"], sample.labels["status"]): sample.value
               for sample in families["radical_edge_requests"].samples}
    assert samples["/{edge}/echo/hello", "200"] == 2
    assert samples["/{edge}/echo/fail/{status}", "418"] == 1
    assert samples["/edges", "200"] == 1 and samples["/other", "404"] >= 3
    histogram = families["radical_edge_request_seconds"]
    buckets = [sample.value for sample in histogram.samples if sample.name.endswith("_bucket")]
    assert histogram.type == "histogram" and buckets == sorted(buckets)
    assert buckets[-1] == sum(samples.values())
    for name in ("edges", "subscribers", "connections", "requests_pending", "event_lag",
                 "link_unsent_bytes", "journal_unwritten", "ready"):
        assert families[f"radical_edge_{name}"].type == "gauge"
    assert families["radical_edge_auth_failures"].type == "counter"


def test_routes_that_an_edge_makes_up_do_not_fill_the_metrics(monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_COUNTED_ROUTES", 10)
    counters = radical_edge.Counters()
    for number in range(100):
        counters.count_request(f'{{edge}}/p/{number}"\\\n', 200, 0.001)
    text = counters.encode({})
    assert text.count("radical_edge_requests_total{") == 11
    assert 'route="/other",status="200"} 90' in text
    parser = needs_module("prometheus_client.parser", "security")
    families = list(parser.text_string_to_metric_families(text))
    routes = {sample.labels["route"] for sample in families[0].samples}
    assert '/{edge}/p/7"\\\n' in routes


def test_lag_is_what_the_slowest_subscriber_has_not_got(edge, bridge, raw):
    assert metrics(raw())["radical_edge_event_lag"] == 0
    client = raw()
    client.send_request("GET", "/events")
    wait_until(lambda: bridge._hub.subscribers)
    for subscriber in bridge._hub.subscribers:
        subscriber.is_waiting = True              # as one whose channel is full
        subscriber.position -= 5
    assert metrics(raw())["radical_edge_event_lag"] == 5


def read_audit(folder):
    path = folder / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_changes_something_is_written_down_on_both_sides(edge, raw, home, tokens):
    client = raw(tokens[1]["client"])
    sid = json.loads(client.request("POST", "/e1/echo/register_session",
                                    headers=[("X-Request-ID", "audit-1")])[2])["sid"]
    client.request("GET", "/e1/echo/hello")
    client.request("POST", "/e1/echo/json?secret=query", b"{bad", headers=[("X-Request-ID", "a2")])
    client.request("POST", f"/e1/echo/unregister_session/{sid}")
    client.request("POST", "/edge/disconnect/e1")
    raw(None).request("POST", "/edge/list")
    state = home / ".radical/edge/state"
    wait_until(lambda: len(read_audit(state / "bridge")) >= 6)
    wait_until(lambda: len(read_audit(state / "e1")) >= 3)
    entries = read_audit(state / "bridge")
    assert [(item["token"], item["method"], item["route"], item["status"], item["outcome"])
            for item in entries] == [
        ("edge-1", "GET", "register", 101, "done"),
        ("client-1", "POST", "{edge}/echo/register_session", 200, "done"),
        ("client-1", "POST", "{edge}/echo/json", 400, "refused"),
        ("client-1", "POST", "{edge}/echo/unregister_session/{sid}", 200, "done"),
        ("client-1", "POST", "edge/disconnect/{name}", 403, "refused"),
        (None, "POST", "edge/list", 401, "refused")]
    assert entries[1]["edge"] == "e1" and entries[1]["request"] == "audit-1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entries[1]["time"])
    own = read_audit(state / "e1")
    assert [(item["request"], item["route"], item["status"]) for item in own[:2]] == [
        ("audit-1", "echo/register_session", 200), ("a2", "echo/json", 400)]
    assert own[2]["sid"] == sid and own[2]["token"] == "client-1"
    for path in (state / "e1", state / "bridge"):
        assert (path / "audit.jsonl").stat().st_mode & 0o777 == 0o600
        text = (path / "audit.jsonl").read_text()
        assert "secret" not in text and not any(token in text for token in tokens[1].values())


def test_a_plugin_adds_what_a_request_was_about(host_with_audit):
    ask, entries = host_with_audit
    assert ask("POST", "/noter/do/42").status_code == 200
    entry = wait_until(entries)[0]
    assert entry["job"] == "j-42" and entry["number"] == "42" and entry["route"] == "noter/do/{number}"


class Noter(radical_edge.Plugin):
    """Notes what it did."""

    plugin_name = "noter"

    @radical_edge.post("do/{number}")
    def do(self, request):
        radical_edge.note_for_audit(job="j-" + request.path_params["number"])
        return {}


@pytest.fixture
def host_with_audit(tmp_path):
    log = radical_edge.AuditLog(tmp_path / "audit.jsonl")
    log.open()
    host = radical_edge.PluginHost("e1", "edge", tmp_path, notify=lambda *_: None,
                                   changed=lambda: None, audit=log)
    host.add(Noter)

    def ask(method, path):
        call = Answered(radical_edge.EdgeRequest("r", method, path, {}, b""))
        host.dispatch(call)
        assert call.done.wait(10)
        return call.response

    yield ask, lambda: read_audit(tmp_path)
    assert host.stop()
    log.close()


class Answered(radical_edge.Call):
    """Keeps its answer."""

    def __init__(self, incoming):
        super().__init__(incoming)
        self.done = threading.Event()

    def respond(self, response):
        self.response = response
        self.done.set()


def test_the_audit_log_rotates_and_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(radical_edge.AuditLog, "MAX_BYTES", 1000)
    log = radical_edge.AuditLog(tmp_path / "audit.jsonl")
    log.open()
    for number in range(200):
        log.write({"number": number, "text": "\ud800\n"})
        wait_until(lambda: not log.unwritten)
    log.close()
    files = sorted(tmp_path.glob("audit*"))
    assert 2 <= len(files) <= 1 + radical_edge.AuditLog.KEPT
    newest = [json.loads(line)["number"] for path in files for line in path.read_text().splitlines()]
    assert max(newest) == 199 and all(path.stat().st_size < 2000 for path in files)


def test_a_disk_that_cannot_be_written_blocks_nothing_and_is_told(tmp_path, caplog):
    (tmp_path / "no").write_text("a file, and no directory")
    log = radical_edge.AuditLog(tmp_path / "no" / "audit.jsonl")
    log.open()
    for number in range(3):
        log.write({"number": number})
        wait_until(lambda: not log.unwritten)
    log.close()
    assert log.dropped == 3 and caplog.text.count("is not recorded") == 1


def test_an_audit_log_that_falls_behind_drops_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(radical_edge.AuditLog, "MAX_WAITING", 5)
    log = radical_edge.AuditLog(tmp_path / "audit.jsonl")
    for number in range(8):
        log.write({"number": number})
    assert log.dropped == 3
    log.open()
    log.close()
    assert [entry["number"] for entry in read_audit(tmp_path)] == [0, 1, 2, 3, 4]


def test_log_lines_are_json_when_asked_for(start, home):                     # noqa: F811
    bridge = start("--bridge", "--port", "0", "--log", "json", "--limit", "login=1",
                   expect="bridge: http")
    url = bridge_url(bridge)
    for status in (401, 429):
        connection = http.client.HTTPConnection(url.partition("//")[2])
        connection.request("GET", "/edges?x=1", headers={"Authorization": "Bearer wrong"})
        assert connection.getresponse().status == status
        connection.close()
    wait_until(lambda: any("GET /edges 429" in line for line in bridge.errors))
    lines = [json.loads(line) for line in bridge.errors]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert any(line["logger"] == "radical_edge.bridge" for line in lines)


# ---------------------------------------------------------------------------
# What a hostile edge may say without breaking what others see
# ---------------------------------------------------------------------------

def test_names_that_are_no_text_break_neither_journal_nor_lists(fake_edge2, bridge, raw):  # noqa: F811
    head = '[%d,"p","\\ud800"]' % ((fake_edge2.known or 0) + 1)
    prefix = radical_edge._WIRE_PREFIX.pack(Kind.NOTIFICATION, 1, len(head), 0)
    fake_edge2.send(radical_edge.encode_frame(radical_edge.Opcode.BINARY,
                                              prefix + head.encode() + b"1", mask=b"abcd"))
    wait_until(lambda: not bridge._registry.links)
    assert raw().request("POST", "/edge/list")[0] == 200
    assert bridge._journal._thread.is_alive()


def test_a_journal_takes_names_that_are_no_text(tmp_path):
    journal = radical_edge.Journal(tmp_path, max_records=10, max_bytes=10_000)
    journal.open()
    record = journal.append(["\ud800"], b"1")
    written = threading.Event()
    journal.when_written(record.number, written.set)
    assert written.wait(10)
    journal.close()


def test_routes_and_modules_that_are_no_text_break_no_page(bridge, raw, tokens, monkeypatch):
    monkeypatch.setattr(FakeEdge, "say", lambda self, **message: self.send(encode_frame(
        Opcode.TEXT, json.dumps({**message, "plugins": {"p": {
            "routes": [["GET", "\ud800"], ["\ud800", "x"], ["GET", "ok"], 7],
            "ui_module": "// \ud800"}}}).encode(), mask=b"abcd")))
    fake = FakeEdge(bridge, tokens[1]["edge"], "f1")
    fake.hear("topology")
    client = raw()
    paths = json.loads(client.request("GET", "/openapi.json")[2])["paths"]
    assert [path for path in paths if path.startswith("/f1")] == ["/f1/p/ok"]
    assert client.request("GET", "/plugins/p.js")[2] == b"// ?"
    fake.close()
