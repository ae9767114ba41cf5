"""Smuggling and abuse over real sockets, straight to a bridge and through nginx in front of it.

    $ tests/setup-security.sh && python -m pytest tests/test_abuse.py
    $ RADICAL_EDGE_REQUIRE=security python -m pytest tests/test_abuse.py     # do not skip nginx
"""
from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import resource
import socket
import ssl
import threading
import time
import urllib.request
from pathlib import Path

import pytest

import radical_edge
from nginx import pick_port, run_nginx
from radical_edge import Edge
from test_edge import (MATRIX, SCOPES, FakeEdge, Raw, assert_error, bridge_url,         # noqa: F401
                       certificate, needs, start, wait_until)


# ---------------------------------------------------------------------------
# Who may do what: every route, every scope, one table
# ---------------------------------------------------------------------------

# beside those of test_edge.py: route, and the statuses for SCOPES (none, read, client, edge, admin)
FULL_MATRIX = [
    *MATRIX,
    ("GET", "/events?last_event_id=x", (401, 422, 422, 403, 422)),      # let in, and then refused
    ("POST", "/auth", (400, 400, 400, 400, 400)),                       # asks for a token itself
    ("POST", "/e1/echo/register_session", (401, 403, 200, 403, 200)),
    ("POST", "/e1/echo/unregister_session/none", (401, 403, 404, 403, 404)),
    ("GET", "/e1/echo/version", (401, 200, 200, 403, 200)),
    ("GET", "/e1/echo/list_sessions", (401, 200, 200, 403, 200)),
    ("GET", "/e1/echo/health", (401, 200, 200, 403, 200)),
    ("GET", "/e1/echo/ui_config", (401, 200, 200, 403, 200)),
    ("PUT", "/e1/echo/echo", (401, 403, 405, 403, 405)),
    ("DELETE", "/e1/echo/echo", (401, 403, 405, 403, 405)),
    ("PATCH", "/e1/echo/echo", (401, 403, 405, 403, 405)),
    ("OPTIONS", "/e1/echo/echo", (401, 403, 405, 403, 405)),
    ("HEAD", "/e1/echo/hello", (401, 200, 200, 403, 200)),
    ("HEAD", "/edges", (401, 200, 200, 403, 200)),
    ("FOO", "/e1/echo/hello", (401, 403, 405, 403, 405)),
    ("GET", "/nobody/echo/hello", (401, 404, 404, 403, 404)),
    ("GET", "/bridge/echo/hello", (401, 404, 404, 403, 404)),
]


@pytest.mark.parametrize("method, path, statuses", FULL_MATRIX,
                         ids=[f"{method} {path}" for method, path, _ in FULL_MATRIX])
def test_every_route_asks_for_its_scope(edge, raw, tokens, method, path, statuses):
    found = tuple(raw(tokens[1].get(scope)).request(method, path)[0] for scope in SCOPES)
    assert found == statuses


def test_the_table_names_every_route_of_the_bridge_and_of_a_plugin(bridge, edge):
    covered = {(method, path.partition("?")[0]) for method, path, _ in FULL_MATRIX}
    for route in bridge._routes.router.list():
        path = "/" + route.pattern.replace("{name}.js", "x.js").replace("{name}", "nobody")
        assert (route.method, path) in covered, route
    for name in ("register_session", "version", "list_sessions", "health", "ui_config"):
        assert any(path == f"/e1/echo/{name}" for _, path in covered)


def test_each_test_that_security_md_names_is_there():
    folder = Path(__file__).parent
    text = (folder.parent / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text)
    assert len(named) > 50
    for file, name in named:
        path = folder.parent / file if file == "test_edge.py" else folder / (file or "test_abuse.py")
        assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), name


# ---------------------------------------------------------------------------
# Tokens: in the wrong place, expired, revoked in mid-stream
# ---------------------------------------------------------------------------

def wrong_places(token):
    basic = base64.b64encode(f"{token}:".encode()).decode()      # as the user, not as the password
    return [("a query", f"/edges?token={token}&access_token={token}", []),
            ("a user in the target", f"http://{token}@127.0.0.1/edges", []),
            ("a path", f"/{token}/edges", []), ("X-Token", "/edges", [("X-Token", token)]),
            ("no kind", "/edges", [("Authorization", token)]),
            ("another kind", "/edges", [("Authorization", f"Digest {token}")]),
            ("a user of Basic", "/edges", [("Authorization", f"Basic {basic}")]),
            ("Proxy-Authorization", "/edges", [("Proxy-Authorization", f"Bearer {token}")]),
            ("a cookie", "/edges", [("Cookie", f"radical_edge={token}; token={token}")]),
            ("two kinds", "/edges", [("Authorization", f"Bearer {token}, Bearer {token}")]),
            ("an empty one", "/edges", [("Authorization", "Bearer ")]),
            ("a cut one", "/edges", [("Authorization", f"Bearer {token[:-1]}")]),
            ("a longer one", "/edges", [("Authorization", f"Bearer {token}x")]),
            ("another case", "/edges", [("Authorization", f"Bearer {token.swapcase()}")])]


@pytest.mark.parametrize("index", range(14))
def test_a_token_in_the_wrong_place_is_none(bridge, raw, tokens, index):
    _, path, headers = wrong_places(tokens[1]["admin"])[index]
    assert raw(None).request("GET", path, headers=headers)[0] in (400, 401, 404)


def test_two_authorizations_are_refused(bridge, raw, tokens):
    headers = [("Authorization", "Bearer x"), ("Authorization", f"Bearer {tokens[1]['admin']}")]
    assert raw(None).request("GET", "/edges", headers=headers)[0] == 400


def test_a_token_that_expires_ends_what_it_has_begun(bridge, raw, tokens, monkeypatch):
    monkeypatch.setattr(radical_edge, "RELOAD_S", 0.1)
    short = tokens[0].add("short", "read", expires=time.time() + 1.5)
    edge_token = tokens[0].add("short-edge", "edge", expires=time.time() + 1.5)
    wait_until(lambda: raw(short).request("GET", "/edges")[0] == 200)
    stream = raw(short)
    stream.send_request("GET", "/events")
    assert stream.reply()[0] == 200
    fake = FakeEdge(bridge, edge_token, "f1")
    fake.hear("topology")
    wait_until(lambda: raw(short).request("GET", "/edges")[0] == 401)
    with contextlib.suppress(ConnectionError):
        while stream.sock.recv(65536):
            pass
    assert fake.hear("none") == {"close": 1008}
    fake.close()


def test_a_token_that_is_revoked_ends_its_event_stream_and_its_link(bridge, raw, tokens, edge):
    stream = raw(tokens[1]["client"])
    stream.send_request("GET", "/events")
    assert stream.reply()[0] == 200
    tokens[0].revoke("client-1")
    tokens[0].revoke("edge-1")
    data = b""
    while not data.endswith(b"0\r\n\r\n"):        # with the last chunk: it is told, not cut off
        piece = stream.sock.recv(65536)
        assert piece
        data += piece
    wait_until(lambda: "e1" not in bridge._registry.links)
    assert raw(tokens[1]["client"]).request("GET", "/edges")[0] == 401


def test_a_read_token_sees_events_and_changes_nothing(edge, raw, tokens):
    client = raw(tokens[1]["read"])
    for method, path in (("POST", "/e1/echo/register_session"), ("POST", "/edge/disconnect/e1"),
                         ("POST", "/bridge/terminate"), ("PUT", "/e1/echo/x"), ("DELETE", "/e1/echo/x")):
        assert_error(client.request(method, path), 403, "scope")


# ---------------------------------------------------------------------------
# Browsers that were led here: Host, Origin, cross-site requests, WebSocket
# ---------------------------------------------------------------------------

@pytest.fixture
def cookie(raw, tokens):
    reply = raw(None).request("POST", "/auth", json.dumps({"token": tokens[1]["admin"]}).encode())
    return ("Cookie", reply[1]["set-cookie"].partition(";")[0])


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example",
                                  "evil.example:8000", "127.0.0.1@evil.example", "[::1].evil.example",
                                  "0x7f.1.evil", "169.254.169.254", "10.0.0.1"])
def test_dns_rebinding_gets_nothing_even_with_a_cookie(bridge, edge, raw, cookie, host):
    for path in ("/", "/edges", "/e1/echo/hello", "/health"):
        client = raw(None)
        client.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{cookie[0]}: {cookie[1]}\r\n\r\n".encode())
        assert_error(client.reply(), 403, "--allow-host")
        client = raw(None)                        # the absolute form counts, whatever Host says
        client.send(f"GET http://{host}{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                    f"{cookie[0]}: {cookie[1]}\r\n\r\n".encode())
        assert client.reply()[0] in (400, 403)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example",
                                    "http://127.0.0.1:1", "http://evil.example/http://127.0.0.1",
                                    "http://127.0.0.1@evil.example", "", "file://"])
@pytest.mark.parametrize("kind", ["application/json", "text/plain",
                                  "application/x-www-form-urlencoded"])
def test_a_page_of_another_site_changes_nothing_with_the_cookie(bridge, edge, raw, cookie, origin, kind):
    headers = [cookie, ("Origin", origin), ("Content-Type", kind)]
    for method, path in (("POST", "/e1/echo/register_session"), ("POST", "/edge/disconnect/e1"),
                         ("POST", "/bridge/terminate"), ("POST", "/logout"), ("PUT", "/e1/echo/x"),
                         ("DELETE", "/e1/echo/x"), ("FOO", "/e1/echo/x")):
        assert_error(raw(None).request(method, path, b"{}", headers), 403, "Origin")
    assert raw().request("GET", "/e1/echo/hello")[0] == 200


def test_a_cookie_is_not_sent_by_other_sites_and_not_read_by_scripts(raw, tokens, bridge):
    reply = raw(None).request("POST", "/auth", json.dumps({"token": tokens[1]["admin"]}).encode())
    flags = {part.strip() for part in reply[1]["set-cookie"].split(";")[1:]}
    # no Path: it is the page's own then, wherever a proxy has put that; and no Domain
    assert {"HttpOnly", "SameSite=Strict", f"Max-Age={radical_edge.COOKIE_S}"} == flags


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1"])
def test_a_websocket_from_a_page_does_not_register(bridge, raw, cookie, origin):
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
               ("Sec-WebSocket-Key", base64.b64encode(bytes(16)).decode()), ("Origin", origin)]
    for extra in ([], [cookie]):
        assert raw(None).request("GET", "/register", headers=[*upgrade, *extra])[0] in (401, 403)
    assert not bridge._registry.unregistered


def test_no_other_site_may_read_an_answer(edge, raw):
    for path in ("/edges", "/e1/echo/hello", "/health", "/"):
        fields = raw().request("GET", path, headers=[("Origin", "https://evil.example")])[1]
        assert not any(name.startswith("access-control-") for name in fields)
        assert fields["x-content-type-options"] == "nosniff"


# ---------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------

PATHS = {                                        # path, the status to expect straight
    "/e1/echo/../../edges": 400, "/e1/echo/..%2f..%2fedges": 404, "/e1/echo/%2e%2e/hello": 400,
    "/e1/echo/%2e%2e%2fedges": 404, "/..": 400, "/%2e%2e/etc/passwd": 400, "/e1/%2e/hello": 400,
    "//e1/echo/hello": 404, "/e1//echo/hello": 404, "/e1/echo//hello": 404, "/e1/echo/hello/": 404,
    "/e1%2fecho%2fhello": 404, "/e1/echo%2fhello": 404, "/e1/echo/hello%00": 400, "/%00": 400,
    "/e1/echo/hello%0d%0aX:y": 400, "/e1/echo/%c0%ae%c0%ae/x": 400, "/e1/echo/hello;x=y": 404,
    "/e1/echo/hello%3fx": 404, "/E1/echo/hello": 404, "/e1/ECHO/hello": 404, "/e1/echo/hello\\..": 404,
    "/edge/disconnect/..%2f..%2fbridge%2fterminate": 405, "/plugins/..%2f..%2fetc%2fpasswd.js": 404,
    "/bridge/terminate/../x": 400, "/e1/echo/hel%6co": 200}


@pytest.mark.parametrize("path", PATHS)
def test_tricks_with_paths_lead_nowhere(edge, raw, path):
    status, _, body = raw().request("GET", path)
    assert status == PATHS[path] and b"root:" not in body


@pytest.mark.parametrize("target", ["http://127.0.0.1/e1/echo/hello", "HTTP://127.0.0.1/e1/echo/hello"])
def test_an_absolute_target_is_its_path(edge, raw, target):
    assert raw().request("GET", target)[0] == 200


@pytest.mark.parametrize("target", ["https://u:p@127.0.0.1/", "ftp://127.0.0.1/", "127.0.0.1:80", "e1/echo",
                                    "*", "?x", "#", "file:///etc/passwd"])
def test_other_targets_are_refused(bridge, raw, target):
    for method in ("GET", "CONNECT", "POST"):
        assert raw().request(method, target)[0] in (400, 404)


# ---------------------------------------------------------------------------
# The slow and the many
# ---------------------------------------------------------------------------

def drip(sock, data, until):
    with contextlib.suppress(OSError):
        for byte in data:
            if until.is_set():
                return
            sock.sendall(bytes([byte]))
            until.wait(0.05)


@pytest.mark.parametrize("kind, data", [
    ("heads", b"GET /edges HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-a: b\r\n" * 500),
    ("bodies", b"POST /auth HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000)])
def test_hundreds_of_slow_clients_delay_nobody_and_are_ended(edge, bridge, raw, monkeypatch, kind, data):
    monkeypatch.setattr(radical_edge, "HEAD_S", 2.0)
    monkeypatch.setattr(radical_edge, "BODY_IDLE_S", 2.0)
    until, connections = threading.Event(), [raw(None) for _ in range(300)]
    cut = data.index(b"\r\n\r\n") + 4 if kind == "bodies" else 30
    for connection in connections:
        connection.send(data[:cut])
    threads = [threading.Thread(target=drip, args=(connection.sock, data[cut:], until))
               for connection in connections[:20]]
    for thread in threads:
        thread.start()
    try:
        client = raw()
        for _ in range(20):
            assert client.request("GET", "/e1/echo/hello")[0] == 200
        for connection in connections:
            connection.sock.settimeout(60)
            with contextlib.suppress(ConnectionError):
                assert connection.reply()[0] == 408
    finally:
        until.set()
        for thread in threads:
            thread.join()


def test_slow_tls_handshakes_delay_nobody_and_are_ended(tokens, certificate, monkeypatch):   # noqa: F811
    monkeypatch.setattr(radical_edge, "HANDSHAKE_S", 2.0)
    cert, key, _ = certificate
    bridge = radical_edge.Bridge(port=0, tokens=tokens[0], cert=cert, key=key).start()
    slow = [socket.create_connection(bridge._listener.server_address, timeout=60) for _ in range(200)]
    for sock in slow:
        sock.sendall(b"\x16\x03\x01\x02\x00")     # the head of a record, and nothing after it
    context = ssl.create_default_context(cafile=cert)
    context.check_hostname = False
    sock = context.wrap_socket(socket.create_connection(bridge._listener.server_address, timeout=60))
    client = Raw(None, tokens[1]["admin"], sock)
    assert client.request("GET", "/edges")[0] == 200
    for sock in slow:
        with contextlib.suppress(ConnectionError):
            assert sock.recv(100)[:1] in (b"", b"\x15")          # the end, or an alert before it
        sock.close()
    client.close()
    wait_until(lambda: bridge.open.total == 0)
    assert bridge.stop()


def test_slow_tls_handshakes_that_have_all_threads_shut_nobody_out(tokens, certificate,   # noqa: F811
                                                                   monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_OPENING", 3)
    monkeypatch.setattr(radical_edge, "HANDSHAKE_S", 600.0)      # whoever is slow here, has time
    cert, key, _ = certificate
    bridge = radical_edge.Bridge(port=0, tokens=tokens[0], cert=cert, key=key).start()
    slow = [socket.create_connection(bridge._listener.server_address, timeout=60) for _ in range(30)]
    wait_until(lambda: len(bridge.handshakes) == 27)
    context = ssl.create_default_context(cafile=cert)
    for number in range(10):
        sock = socket.create_connection(bridge._listener.server_address, timeout=60)
        client = Raw(None, tokens[1]["admin"], context.wrap_socket(sock, server_hostname="127.0.0.1"))
        assert client.request("GET", "/edges")[0] == 200
        assert client.request("POST", "/auth", b" " * 50_000)[0] == 400
        client.close()
    junk = socket.create_connection(bridge._listener.server_address, timeout=60)
    junk.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        assert not junk.recv(100).startswith(b"HTTP/1.1 2")
    junk.close()
    slow[-1].close()                              # who goes is forgotten at once, the others in time
    wait_until(lambda: len(bridge.handshakes) == 26 and bridge.open.total == 29)
    late = list(bridge.handshakes)[:20]
    for handshake in late:
        bridge.loop.call_soon_threadsafe(handshake.end, True)
    wait_until(lambda: len(bridge.handshakes) == 6 and bridge.open.total == 9)
    counted = ("limited_total", 'limit="handshake-time"')
    assert bridge.records.counters._counts[counted] == 20
    for sock in slow[:3]:                         # those that have threads, which end so
        sock.close()
    assert bridge.stop() and not bridge.handshakes
    for sock in slow:
        sock.close()


def test_ten_thousand_idle_connections_cost_little_and_delay_nobody(start, home):        # noqa: F811
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needs("system", hard == resource.RLIM_INFINITY or hard >= 12_000, "12,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (12_000, hard))
    sockets = []
    try:
        bridge = start("--bridge", "--port", "0", "--log-level", "WARNING", expect="bridge: http")
        address = ("127.0.0.1", int(bridge_url(bridge).rpartition(":")[2]))
        # the first must not be idle for too long before the last has come: fewer, on a slow machine
        end = time.monotonic() + radical_edge.KEEP_ALIVE_S / 3
        while len(sockets) < 10_000 and time.monotonic() < end:
            sockets.append(socket.create_connection(address, timeout=30))
            sockets[-1].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert len(sockets) >= 1_000
        token = (home / ".radical/edge/token").read_text().strip()
        client = Raw(None, token, socket.create_connection(address, timeout=30))
        open_now = re.compile(rb"connections %d\n" % (len(sockets) + 1))
        wait_until(lambda: open_now.search(client.request("GET", "/metrics")[2]), 60)
        for sock in sockets[:: len(sockets) // 100]:
            assert sock.recv(12) == b"HTTP/1.1 200"
        for _ in range(20):
            assert client.request("GET", "/edges")[0] == 200
        status = Path(f"/proc/{bridge.process.pid}/status").read_text()
        assert int(re.search(r"Threads:\s+(\d+)", status)[1]) < 100
        assert int(re.search(r"VmRSS:\s+(\d+)", status)[1]) < 400_000            # kB
        client.close()
    finally:
        for sock in sockets:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_bomb_of_fields_is_refused_before_it_is_stored(bridge, raw):
    for bomb in (b"a: b\r\n" * 100_000, b"a: " + b"b" * 1_000_000, b"a" * 1_000_000,
                 b"".join(b"x%d: y\r\n" % number for number in range(10_000))):
        client = raw()
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            client.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + bomb)
            assert client.reply()[0] in (400, 431)
            assert client.is_closed()
    assert raw().request("GET", "/health")[0] == 200


def test_a_flood_of_pipelined_requests_is_answered_in_order_in_little_memory(edge, raw):
    client = raw()
    line = f"GET /e1/echo/hello?n=%d HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.token}\r\n\r\n"
    sender = threading.Thread(target=lambda: [client.send((line % n).encode()) for n in range(3000)])
    sender.start()
    for number in range(3000):
        assert json.loads(client.reply()[2])["query"] == {"n": str(number)}
    sender.join()


# ---------------------------------------------------------------------------
# Smuggling: straight, and through nginx, which must count the same requests as we do
# ---------------------------------------------------------------------------

SMUGGLING = {
    "CL.TE": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n",
    "TE.CL": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\nGET /smuggled HTTP/1.1\r\n"
             b"Host: x\r\nContent-Length: 15\r\n\r\nx=1\r\n0\r\n\r\n",
    "TE.TE": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n",
    "TE with a space": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n",
    "TE with a tab": b"Transfer-Encoding:\tchunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n",
    "TE with a vertical tab": b"Transfer-Encoding: \x0bchunked\r\nContent-Length: 0\r\n\r\n",
    "TE folded": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "TE in a list": b"Transfer-Encoding: identity, chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "CL twice": b"Content-Length: 0\r\nContent-Length: 34\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    "CL in a list": b"Content-Length: 0, 34\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    "CL with a sign": b"Content-Length: +0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    "CL in hexadecimal": b"Content-Length: 0x22\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    "bare LF": b"Content-Length: 0\nX: y\r\n\r\n", "bare LF at the end": b"X: y\n\nGET /smuggled HTTP/1.1\r\n\r\n",
    "bare CR": b"X: y\rContent-Length: 34\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    "a chunk of wrong size": b"Transfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n",
    "a chunk with LF": b"Transfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\nGET /smuggled HTTP/1.1\r\n",
    "a chunk extension with LF": b"Transfer-Encoding: chunked\r\n\r\n5;x\ny\r\nhello\r\n0\r\n\r\n",
    "a chunk size with a sign": b"Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    "a chunk size in 0x": b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk size that overflows": b"Transfer-Encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n0\r\n\r\n",
    "a trailer that frames": b"Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 34\r\n\r\n",
    "a name with NUL": b"Content-Length\x00: 34\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    "hop by hop": b"Connection: Content-Length, Authorization\r\nContent-Length: 3\r\n\r\nabc",
    "upgrade": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
               b"Content-Length: 0\r\n\r\n",
}


def send_smuggling(sock, token, name, path="/e1/echo/echo"):
    """Send a POST with tricks and a good request after it; return all that comes back."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n".encode()
    sock.settimeout(3)
    data = b""
    with contextlib.suppress(OSError):
        sock.sendall(head + SMUGGLING[name])
        sock.sendall(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Token: {token}\r\n\r\n".encode())
        while True:
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
    return data


@pytest.mark.parametrize("name", SMUGGLING)
def test_nothing_is_smuggled_straight(edge, bridge, raw, tokens, name, caplog):
    data = send_smuggling(raw().sock, tokens[1]["admin"], name)
    assert data.startswith(b"HTTP/1.1 ")
    bridge._thread.submit(_flush(bridge)).result(60)
    assert not any("/smuggled" in record.getMessage() for record in caplog.records)
    statuses = re.findall(rb"HTTP/1\.1 (\d\d\d)", data)
    assert len(statuses) <= 2 and raw().request("GET", "/e1/echo/hello")[0] == 200


async def _flush(bridge):
    bridge.records.flush()


@pytest.fixture
def nginx(bridge, tmp_path):
    """Return the port of an nginx that has the bridge under /prefix/, as the README says."""
    port = pick_port()
    with run_nginx(tmp_path / "nginx", port, prefix=bridge._listener.server_address[1]):
        yield port


def through(port, token):
    return Raw(None, token, socket.create_connection(("127.0.0.1", port), timeout=60))


@pytest.mark.parametrize("name", SMUGGLING)
def test_nothing_is_smuggled_through_nginx(nginx, edge, bridge, raw, tokens, name, caplog):
    sock = socket.create_connection(("127.0.0.1", nginx), timeout=60)
    send_smuggling(sock, tokens[1]["admin"], name, "/prefix/e1/echo/echo")
    sock.close()
    bridge._thread.submit(_flush(bridge)).result(60)
    assert not any("smuggled" in record.getMessage() for record in caplog.records)
    for number in range(8):                       # whose answer is whose, over nginx's connections
        client = through(nginx, tokens[1]["admin"])
        reply = client.request("GET", f"/prefix/e1/echo/hello?n={number}")
        assert reply[0] == 200 and json.loads(reply[2])["query"] == {"n": str(number)}
        client.close()


@pytest.mark.parametrize("path", PATHS)
def test_tricks_with_paths_lead_nowhere_through_nginx(nginx, edge, tokens, path):
    client = through(nginx, tokens[1]["client"])
    status, _, body = client.request("GET", "/prefix" + path)
    client.close()
    assert b"root:" not in body and status < 500
    if status == 200:                             # nginx decodes and merges: still what a client may
        assert json.loads(body).get("user", "client-1") == "client-1"


def test_an_edge_events_and_bodies_work_through_nginx(nginx, bridge, tokens, raw):
    url = f"http://127.0.0.1:{nginx}/prefix"
    edge = Edge(url, "n1", plugins=["echo"], token=tokens[1]["edge"]).start()
    try:
        assert edge.online.wait(60)
        stream = radical_edge.events(url=url, token=tokens[1]["client"], edge="n1")
        assert next(stream)["topic"] == "topology"
        edge.host.notify("echo", "said", {"text": "hello"})
        event = next(item for item in stream if item["topic"] == "notification")
        assert event["data"]["data"] == {"text": "hello"}
        stream.close()
        body = os.urandom(3_000_000)
        with radical_edge.BridgeClient(url, token=tokens[1]["client"]) as client:
            assert client.http.post("/n1/echo/echo", content=body).content == body
    finally:
        assert edge.stop()


@pytest.mark.parametrize("where", ["paths", "ports"])
def test_who_signs_in_to_two_bridges_of_one_host_is_signed_in_to_both(home, tmp_path, where):
    bridges, tokens = [], []
    for name in ("a", "b"):
        store = radical_edge.TokenStore(tmp_path / f"{name}.json")
        tokens.append(store.add(f"of-{name}", "client"))
        bridges.append(radical_edge.Bridge(port=0, tokens=store, state_dir=tmp_path / name).start())
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())

    def ask(url, path, body=None):
        with browser.open(url + path, None if body is None else json.dumps(body).encode()) as reply:
            return json.load(reply)

    with contextlib.ExitStack() as stack:
        for bridge in bridges:
            stack.callback(bridge.stop)
        urls = [bridge.url for bridge in bridges]
        if where == "paths":
            port = pick_port()
            ports = {name: bridge._listener.server_address[1]
                     for name, bridge in zip("ab", bridges)}
            stack.enter_context(run_nginx(tmp_path / "nginx", port, **ports))
            urls = [f"http://127.0.0.1:{port}/{name}" for name in "ab"]
        for url, token in zip(urls, tokens):
            ask(url, "/auth", {"token": token})
        assert [ask(url, "/auth")["name"] for url in urls] == ["of-a", "of-b"]
        assert all(ask(url, "/edges")["total"] == 0 for url in urls)
        ask(urls[0], "/logout", {})
        assert [ask(url, "/auth")["name"] for url in urls] == [None, "of-b"]


@pytest.mark.parametrize("port", ["", ":8000", ":x", ":8_0", ":" + "8" * 70, ":²"])
def test_whatever_the_host_says_the_cookie_has_a_name(bridge, raw, tokens, port):
    client = raw(None)
    body = json.dumps({"token": tokens[1]["admin"]}).encode()
    client.send(b"POST /auth HTTP/1.1\r\nHost: 127.0.0.1%b\r\nContent-Length: %d\r\n\r\n%b"
                % (port.encode("latin-1"), len(body), body))
    status, fields, _ = client.reply()
    name = "radical_edge_8000" if port == ":8000" else "radical_edge"
    assert status in (200, 400) and (status == 400 or fields["set-cookie"].startswith(name + "="))
    if port in ("", ":8000"):
        assert status == 200


def test_credentials_and_what_nginx_adds_do_not_reach_an_edge(nginx, bridge, tokens):
    fake = FakeEdge(bridge, tokens[1]["edge"], "f1")
    fake.hear("topology")
    client = through(nginx, tokens[1]["client"])
    client.send_request("GET", "/prefix/f1/p/x", headers=[
        ("Cookie", "a=b"), ("X-Forwarded-User", "root"), ("X-Forwarded-Scope", "admin"),
        ("Proxy-Authorization", "x")])
    request = fake.hear("request")
    names = {name.lower() for name in request["headers"]}
    assert not names & {"authorization", "cookie", "proxy-authorization", "host", "connection"}
    assert request["headers"]["x-forwarded-user"] == "client-1"
    assert request["headers"]["x-forwarded-scope"] == "client"
    fake.say(type="response", req_id=request["req_id"], status=200, headers={}, body="ok")
    assert client.reply()[0] == 200
    client.close()
    fake.close()
