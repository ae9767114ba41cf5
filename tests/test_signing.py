"""End-to-end signing: a bridge that has been taken over can neither make up nor repeat a request.

    $ python -m pytest tests/test_signing.py
"""
from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import threading
import time

import pytest

import radical_edge
from doubles import HostileBridge
from radical_edge import (BridgeClient, Edge, EdgeError, Plugin, SignatureCheck, Signer, SigningKey,
                          Unauthorized, check_signature, post, put, read_signing_keys)
from test_edge import needs_module, run, wait_until

SECRET = bytes(range(32))
KEY = SigningKey("alice", SECRET)
KEY_LINE = f"alice {base64.urlsafe_b64encode(SECRET).decode().rstrip('=')}"


class Deeds(Plugin):
    """Counts what it was made to do."""

    plugin_name = "deeds"

    def __init__(self, app, instance_name=None):
        super().__init__(app, instance_name)
        self.done = []

    @post("do/{what}")
    async def do(self, request):
        self.done.append((request.path_params["what"], await request.body(),
                          request.headers.get("x-mode")))
        return {"done": len(self.done), "mode": request.headers.get("x-mode"),
                "type": request.headers.get("content-type")}

    @put("file")
    async def take(self, request):
        data = b"".join([piece async for piece in request.stream()])
        self.done.append(("file", len(data), hashlib.sha256(data).hexdigest()))
        return {"size": len(data)}

    @radical_edge.delete("file")
    async def drop(self, request):
        self.done.append(("drop",))
        return {}

    @radical_edge.get("look")
    async def look(self, request):
        return {"seen": len(self.done)}


@pytest.fixture
def key_file(home):
    path = home / ".radical/edge/keys"
    radical_edge.write_private(path, f"# clients that may\n{KEY_LINE}\n")
    return path


@pytest.fixture(params=[1, 2], ids=["wire1", "wire2"])
def hostile(request, key_file):
    """(a bridge that the test plays, the edge's plugin): the edge demands signatures."""
    bridge = HostileBridge(request.param)
    edge = Edge(bridge.url, "e1", plugins=["deeds"], token="x", client_key=str(key_file)).start()
    bridge.accept()
    bridge.edge = edge
    yield bridge, edge.host._hosted["deeds"].plugin
    assert edge.stop()
    bridge.close()


def signed(method, path, body=b"", *, key=KEY, edge="e1", fields=()):
    """Return the fields of a signed request to /e1/..., in the lower case of the wire."""
    fields = dict(fields)
    found = Signer(key).sign(method, f"/{edge}{path}", hashlib.sha256(body).digest(), fields)
    return {name.lower(): value for name, value in {**fields, **found}.items()}


# ---------------------------------------------------------------------------
# What a hostile bridge tries
# ---------------------------------------------------------------------------

def test_a_signed_request_is_done_and_one_that_only_reads_needs_no_signature(hostile):
    bridge, plugin = hostile
    assert bridge.ask("GET", "/deeds/look")[0] == 200
    status, answer = bridge.ask("POST", "/deeds/do/this", signed("POST", "/deeds/do/this", b"hello"),
                                b"hello")
    assert (status, answer["done"]) == (200, 1) and plugin.done == [("this", b"hello", None)]


def test_a_made_up_request_is_refused(hostile):
    bridge, plugin = hostile
    stranger = SigningKey("alice", bytes(32))
    for method, path in (("POST", "/deeds/do/x"), ("PUT", "/deeds/file"), ("DELETE", "/deeds/file"),
                         ("POST", "/deeds/register_session"), ("PATCH", "/deeds/file")):
        for fields in ({}, {"authorization": "Bearer admin"}, signed(method, path, key=stranger),
                       signed(method, path, key=SigningKey("bob", SECRET)),
                       {"signature": "sig1=:AAAA:", "signature-input": "sig1=()"}):
            status, answer = bridge.ask(method, path, fields)
            assert status == 401 and answer["status_code"] == 401, (method, path, fields)
    assert plugin.done == []


TAMPERED = {
    "another path": dict(path="/deeds/do/that"), "a query": dict(path="/deeds/do/this?x=1"),
    "an encoded path": dict(path="/deeds/do/%74his"), "another body": dict(body=b"hellO"),
    "no body": dict(body=b""), "another method": dict(method="PUT"),
    "a longer body": dict(body=b"hello, and more"),
    "another digest": dict(fields={"content-digest": "sha-256=:" + base64.b64encode(
        hashlib.sha256(b"evil").digest()).decode() + ":"}, body=b"evil"),
    "another mode": dict(fields={"x-mode": "overwrite"}),
    "another key": dict(fields={"idempotency-key": "other"}),
    "no key": dict(fields={"idempotency-key": None}),
    "no digest": dict(fields={"content-digest": None}),
    "no signature": dict(fields={"signature": None}),
    "another signature": dict(fields={"signature": "sig1=:" + base64.b64encode(bytes(32)).decode()
                                      + ":"}),
    "two signatures": dict(add={"signature-input": ', sig2=("@method");created=1'}),
    "a parameter more": dict(add={"signature-input": ';expires=9999999999'}),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_request_that_was_changed_on_its_way_is_refused(hostile, name):
    bridge, plugin = hostile
    change = TAMPERED[name]
    fields = signed("POST", "/deeds/do/this", b"hello", fields={"idempotency-key": "k1", "x-mode": "a"})
    fields.update(change.get("fields", {}))
    for field, more in change.get("add", {}).items():
        fields[field] += more
    fields = {field: value for field, value in fields.items() if value is not None}
    status, _ = bridge.ask(change.get("method", "POST"), change.get("path", "/deeds/do/this"), fields,
                           change.get("body", b"hello"))
    assert status in (400, 401) and plugin.done == []


def test_a_signature_for_another_edge_is_refused(hostile):
    bridge, plugin = hostile
    fields = signed("POST", "/deeds/do/this", edge="e2")
    assert bridge.ask("POST", "/deeds/do/this", fields)[0] == 401 and plugin.done == []


def test_a_repeated_request_is_refused_whatever_is_changed_that_is_not_signed(hostile):
    bridge, plugin = hostile
    fields = signed("POST", "/deeds/do/this", fields={"idempotency-key": "k"})
    assert bridge.ask("POST", "/deeds/do/this", fields)[0] == 200
    for extra in ({}, {"x-request-id": "another"}, {"x-forwarded-user": "bob"}, {"x-new": "y"}):
        status, answer = bridge.ask("POST", "/deeds/do/this", {**fields, **extra})
        assert status == 401 and "used before" in answer["detail"]
    assert len(plugin.done) == 1


def test_requests_may_come_in_another_order_and_each_is_done_once(hostile):
    bridge, plugin = hostile
    prepared = [signed("POST", f"/deeds/do/{number}") for number in range(20)]
    numbers = [bridge.start("POST", f"/deeds/do/{number}", prepared[number])
               for number in reversed(range(20))]
    again = [bridge.start("POST", f"/deeds/do/{number}", prepared[number]) for number in range(20)]
    assert len({*numbers, *again}) == 40
    wait_until(lambda: len(plugin.done) == 20)
    assert sorted(int(what) for what, _, _ in plugin.done) == list(range(20))
    assert bridge.ask("GET", "/deeds/look")[1] == {"seen": 20}


def test_a_field_that_is_not_signed_does_not_reach_the_handler(hostile):
    bridge, _ = hostile
    fields = {**signed("POST", "/deeds/do/this", fields={"content-type": "a/b"}), "x-mode": "evil"}
    status, answer = bridge.ask("POST", "/deeds/do/this", fields)
    assert status == 200 and answer["mode"] is None and answer["type"] == "a/b"


@pytest.mark.parametrize("ago, status", [(280, 200), (-290, 200), (310, 401), (-340, 401),
                                         (10**9, 401)])
def test_a_signature_is_good_for_five_minutes_on_either_side(hostile, monkeypatch, ago, status):
    bridge, plugin = hostile
    now = time.time()
    monkeypatch.setattr(radical_edge.time, "time", lambda: now - ago)
    fields = signed("POST", "/deeds/do/this")
    monkeypatch.undo()
    found, answer = bridge.ask("POST", "/deeds/do/this", fields)
    assert found == status and len(plugin.done) == (status == 200)
    if status == 401:
        assert "by our clock" in answer["detail"]


def test_a_bridge_that_says_shut_down_is_not_obeyed_unless_a_client_signed_it(hostile):
    bridge, _ = hostile
    for request in (None, {}, "x", {"signature": 7}, signed("POST", "", edge="edge/disconnect/e2"),
                    signed("POST", "/deeds/do/this")):
        bridge.say(type="shutdown", reason="because I say so", request=request)
    assert bridge.ask("GET", "/deeds/look")[0] == 200 and not bridge.edge.stopping
    bridge.say(type="shutdown", reason="please", request=signed("POST", "", edge="edge/disconnect/e1"))
    assert bridge.edge.ended.wait(10)


def test_a_used_signature_stays_used_when_the_edge_is_started_anew(key_file, home):
    bridge = HostileBridge()
    fields = signed("POST", "/deeds/do/this")
    for status in (200, 401):
        edge = Edge(bridge.url, "e1", plugins=["deeds"], token="x", client_key=str(key_file)).start()
        bridge.accept()
        assert bridge.ask("POST", "/deeds/do/this", fields)[0] == status
        assert edge.stop()
    bridge.close()


def test_a_disk_that_cannot_remember_a_signature_lets_none_pass(hostile, monkeypatch):
    bridge, plugin = hostile
    check = plugin._app.state.edge_service._signatures
    monkeypatch.setattr(check._journal, "_failing", True)
    monkeypatch.setattr(check._journal, "_write", lambda records: [])
    status, answer = bridge.ask("POST", "/deeds/do/this", signed("POST", "/deeds/do/this"))
    assert status == 503 and "disk" in answer["detail"] and plugin.done == []


def test_more_signatures_than_are_remembered_are_refused_and_none_is_forgotten(hostile, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_NONCES", 3)
    bridge, plugin = hostile
    fields = [signed("POST", "/deeds/do/this") for _ in range(4)]
    assert [bridge.ask("POST", "/deeds/do/this", item)[0] for item in fields] == [200, 200, 200, 429]
    assert bridge.ask("POST", "/deeds/do/this", fields[0])[0] == 401


def test_old_signatures_are_forgotten_in_time(tmp_path, key_file, monkeypatch):
    check = SignatureCheck(key_file, tmp_path / "s", "e1")
    check.open()
    monkeypatch.setattr(radical_edge, "SIGNATURE_S", 0.05)
    for _ in range(50):
        fields = signed("POST", "/deeds/do/this")
        try:
            check._take(radical_edge.EdgeRequest("r", "POST", "", fields, b""), "/e1/deeds/do/this")
        except Unauthorized:                      # created is in whole seconds
            pass
        time.sleep(0.03)
    assert len(check._used) < 50
    check.close()


# ---------------------------------------------------------------------------
# Bodies that stream
# ---------------------------------------------------------------------------

@pytest.fixture
def streaming(key_file):
    bridge = HostileBridge(2)
    edge = Edge(bridge.url, "e1", plugins=["deeds"], token="x", client_key=str(key_file)).start()
    bridge.accept()
    yield bridge, edge.host._hosted["deeds"].plugin
    assert edge.stop()
    bridge.close()


def test_an_upload_in_pieces_is_whole_or_not_at_all(streaming):
    bridge, plugin = streaming
    pieces = [b"a" * 1000, b"b" * 1000, b"c"]
    whole = b"".join(pieces)
    status, answer = bridge.ask("PUT", "/deeds/file", signed("PUT", "/deeds/file", whole), pieces=pieces)
    assert (status, answer) == (200, {"size": 2001})
    for wrong in (pieces[:-1], [*pieces, b"d"], [pieces[1], pieces[0], pieces[2]],
                  [b"x" * 1000, *pieces[1:]]):
        fields = signed("PUT", "/deeds/file", whole)
        status, answer = bridge.ask("PUT", "/deeds/file", fields, pieces=wrong)
        assert status == 400 and "Content-Digest" in answer["detail"]
    assert len(plugin.done) == 1


# ---------------------------------------------------------------------------
# The client, the command line, the whole way through a bridge that knows no key
# ---------------------------------------------------------------------------

@pytest.fixture
def demanding(bridge, tokens, wire, key_file):
    edge = Edge(bridge.url, "e1", plugins=["deeds", "echo"], token=tokens[1]["edge"],
                client_key=str(key_file)).start()
    assert edge.online.wait(10)
    wait_until(lambda: "e1" in bridge._registry.links)
    yield edge.host._hosted["deeds"].plugin
    edge.stop()


def test_the_client_signs_by_itself(demanding, bridge, key_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(os.urandom(3_000_000))
    with BridgeClient(bridge.url, client_key=str(key_file)) as client:
        plugin = client.get_edge_client("e1").get_plugin("echo")
        assert plugin._get("hello")["query"] == {}
        plugin.unregister_session()
        reply = client.http.post("/e1/deeds/do/a%20b?x=%C3%A4", json={"ü": 1})
        assert reply.status_code == 200, reply.text
        with open(tmp_path / "file", "rb") as file:
            assert client.http.request("PUT", "/e1/deeds/file", content=file).json() == {
                "size": 3_000_000}
        with pytest.raises(ValueError, match="read twice"):
            client.http.request("PUT", "/e1/deeds/file", content=iter([b"a"]))
        with client.http.stream("PUT", "/e1/deeds/file", content=io.BytesIO(b"abc")) as answer:
            assert json.loads(answer.read()) == {"size": 3}
        assert client.http.request("DELETE", "/e1/deeds/file").status_code == 200
    assert radical_edge.call("e1", "deeds", "do/x", {}, url=bridge.url, client_key=str(key_file))
    with pytest.raises(Unauthorized, match="--client-key"):
        radical_edge.call("e1", "deeds", "do/x", {}, url=bridge.url)
    monkeypatch.setenv("RADICAL_CLIENT_KEY", str(key_file))
    assert radical_edge.call("e1", "deeds", "do/x", {}, url=bridge.url)
    assert len(demanding.done) == 6


def test_the_client_signs_anew_when_a_bridge_has_used_its_signature(demanding, bridge, key_file,
                                                                    monkeypatch):
    with BridgeClient(bridge.url, client_key=str(key_file)) as client:
        sign, first = Signer.sign, []

        def sign_once_the_same(self, *args):
            if len(first) == 2:
                return sign(self, *args)
            first.append(first[0] if first else sign(self, *args))
            return first[0]

        monkeypatch.setattr(Signer, "sign", sign_once_the_same)
        key = {"Idempotency-Key": "one"}
        for _ in range(2):
            reply = client.http.request("POST", "/e1/deeds/do/x", headers=key)
            assert reply.status_code == 200, reply.text
    assert len(demanding.done) == 1


def test_a_signed_disconnect_ends_the_edge_and_an_unsigned_one_does_not(demanding, bridge, key_file,
                                                                        raw):
    edge = wait_until(lambda: bridge._registry.links.get("e1"))
    assert raw().request("POST", "/edge/disconnect/e1")[0] == 200
    wait_until(lambda: bridge._registry.links.get("e1") not in (None, edge))   # it came back
    with BridgeClient(bridge.url, client_key=str(key_file)) as client:
        client.disconnect_edge("e1")
    wait_until(lambda: "e1" not in bridge._registry.links)


def test_the_bridge_never_sees_the_key_and_the_audit_log_names_it(demanding, bridge, key_file, home):
    radical_edge.call("e1", "deeds", "do/x", {}, url=bridge.url, client_key=str(key_file))
    path = home / ".radical/edge/state/e1/audit.jsonl"
    wait_until(lambda: path.exists() and '"key": "alice"' in path.read_text())
    secret = KEY_LINE.split()[1]
    for folder, _, names in os.walk(home / ".radical/edge/state"):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert secret.encode() not in file.read()


def test_keys_are_made_and_used_on_the_command_line(home, demanding, bridge, key_file):
    text = run("--token", "keygen", "bob")
    made = home / ".radical/edge/client.key"
    assert made.stat().st_mode & 0o777 == 0o600 and str(made) in text
    assert made.read_text().split()[1] not in text
    assert "there already" in run("--token", "keygen", "bob", status=1)
    arguments = ("--url", bridge.url, "--call", "e1/deeds/do/x", "{}")
    assert "401" not in run("--client-key", str(key_file), *arguments)
    assert "knows" in run(*arguments, status=1)    # bob's key, which this edge does not have
    with open(key_file, "a", encoding="utf-8") as file:
        file.write(made.read_text())
    demanding._app.state.edge_service._signatures.reload()
    assert json.loads(run(*arguments))["done"] == 2


@pytest.mark.parametrize("text, words", [
    ("", "no key"), ("# nothing\n\n", "no key"), ("alice", "line 1"), (KEY_LINE + "\nbob short", "line 2"),
    (KEY_LINE + "\n" + KEY_LINE, "line 2"), ("a/b " + KEY_LINE.split()[1], "line 1")])
def test_a_bad_key_file_names_the_line(home, text, words):
    path = home / "keys"
    radical_edge.write_private(path, text)
    with pytest.raises(EdgeError, match=words):
        read_signing_keys(path)


def test_a_key_file_that_others_can_read_or_that_is_not_there_is_refused(home):
    with pytest.raises(EdgeError, match="keygen"):
        Edge("http://127.0.0.1:1", "e1", client_key=str(home / "none"))
    path = home / "keys"
    path.write_text(KEY_LINE)
    path.chmod(0o644)
    with pytest.raises(EdgeError, match="chmod 600"):
        read_signing_keys(path)


# ---------------------------------------------------------------------------
# The signature itself, by RFC 9421
# ---------------------------------------------------------------------------

def test_the_signature_is_that_of_rfc_9421():
    """Appendix B.2.5 signs with hmac-sha256; here its key and its way of writing the base."""
    secret = base64.b64decode("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBt"
                              "bmHhIDi6pcl8jsasjlTMtDQ==")
    import hmac
    base = "\n".join(['"date": Tue, 20 Apr 2021 02:07:55 GMT', '"@authority": example.com',
                      '"content-type": application/json', '"@signature-params": ("date" "@authority" '
                      '"content-type");created=1618884473;keyid="test-shared-secret"'])
    code = base64.b64encode(hmac.new(secret, base.encode(), hashlib.sha256).digest()).decode()
    assert code == "pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8="
    ours = radical_edge._signature_base("GET", "/", {
        "date": "Tue, 20 Apr 2021 02:07:55 GMT", "content-type": "application/json"},
        ["date", "content-type"], "(X)").decode()
    assert ours == ('"date": Tue, 20 Apr 2021 02:07:55 GMT\n"content-type": application/json\n'
                    '"@signature-params": (X)')


def test_any_order_of_parameters_and_any_label_is_read():
    fields = {"content-digest": radical_edge.encode_digest(hashlib.sha256(b"").digest())}
    params = ('("@query" "@path" "content-digest" "@method");keyid="alice";alg="hmac-sha256"'
              f';nonce="0123456789abcdef";created={int(time.time())};tag="x y"')
    base = radical_edge._signature_base("POST", "/e1/a?b", fields,
                                        ["@query", "@path", "content-digest", "@method"], params)
    import hmac
    code = base64.b64encode(hmac.new(SECRET, base, hashlib.sha256).digest()).decode()
    fields.update({"signature-input": f"my-sig={params}", "signature": f"my-sig=:{code}:"})
    found = check_signature({"alice": KEY}, "POST", "/e1/a?b", fields)
    assert (found.key_id, found.nonce) == ("alice", "0123456789abcdef")


def test_signatures_of_noise_are_refused_and_nothing_else():
    hypothesis = needs_module("hypothesis", "security")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=500, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.dictionaries(st.sampled_from(["signature", "signature-input",
                                                       "content-digest"]), st.text()), st.text())
    def check(fields, target):
        with pytest.raises(Unauthorized):
            check_signature({"alice": KEY}, "POST", target, fields)

    check()


def test_many_threads_sign_different_nonces():
    found, lock = set(), threading.Lock()

    def work():
        for _ in range(50):
            value = signed("POST", "/x")["signature-input"]
            with lock:
                found.add(value)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200


def test_files_are_signed_on_their_way_up_and_down(bridge, tokens, key_file, tmp_path):
    radical_edge.load_builtin_plugins()
    (tmp_path / "root").mkdir()
    edge = Edge(bridge.url, "e1", plugins=["staging"], token=tokens[1]["edge"], client_key=str(key_file),
                options={"staging_roots": [str(tmp_path / "root")]}).start()
    assert edge.online.wait(10)
    wait_until(lambda: "e1" in bridge._registry.links)
    data = os.urandom(5_000_000)
    (tmp_path / "here").write_bytes(data)
    with BridgeClient(bridge.url, client_key=str(key_file)) as client:
        staging = client.get_edge_client("e1").get_plugin("staging")
        staging.put(str(tmp_path / "here"), str(tmp_path / "root/there"))
        assert (tmp_path / "root/there").read_bytes() == data
        staging.get(str(tmp_path / "root/there"), str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    assert edge.stop()
