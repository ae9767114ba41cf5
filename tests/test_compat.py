"""Clients, edges and bridges of radical.edge 0.2 work with ours: theirs as they are, in processes
of their own.

    $ tests/setup-compat.sh                       # .venv-compat, with radical.orbit 0.2.0
    $ python -m pytest tests/test_compat.py       # RADICAL_EDGE_REQUIRE=compat: do not skip
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import plugins
import radical_edge
from legacy_service import make_probe
from radical_edge import Bridge, BridgeClient, Edge, EdgeError
from test_edge import ROOT, EchoPlugin, Relay, needs, wait_until
from test_lucid import fake                                              # noqa: F401 (a fixture)

VENV = ROOT / ".venv-compat"
PYTHON = str(VENV / "bin/python")
PACKAGES = {"radical.edge": ("radical-edge-bridge.py", "radical-edge-service.py"),
            "radical.orbit": ("radical-orbit-bridge.py", "radical-orbit-endpoint.py")}

OURS = ["echo", "sysinfo", "psij", "rhapsody", "staging"]            # plugins of our edges

needs("compat", Path(PYTHON).exists(), "radical.orbit 0.2.0: run tests/setup-compat.sh")


# ---------------------------------------------------------------------------
# Their processes
# ---------------------------------------------------------------------------

class Process:
    """A process of theirs, with a log. close() ends it."""

    def __init__(self, folder, arguments, env=None, **streams):
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith("RADICAL_") and "proxy" not in name.lower()}
        environment.update({"HOME": str(folder), "PYTHONUNBUFFERED": "1",
                            "RADICAL_LOG_LVL": "DEBUG", "PATH": make_path(folder / "bin"),
                            **(env or {})})
        with open(self.log, "w") as log:
            # they write into the current directory, too
            self.process = subprocess.Popen([PYTHON, *map(str, arguments)], env=environment,
                                            cwd=folder, stderr=log, **{"stdout": log, **streams})

    def text(self):
        """Return what it has logged."""
        return self.log.read_text(errors="replace")

    def ended(self):
        """Whether it has ended by itself."""
        return self.process.poll() is not None

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make_path(folder):
    """Return a PATH with everything but batch systems, which change what their edges load."""
    folder.mkdir(exist_ok=True)
    for program in (*Path("/bin").iterdir(), *Path("/usr/bin").iterdir()):
        link = folder / program.name
        if program.name not in ("squeue", "qstat") and not link.is_symlink():
            link.symlink_to(program)
    return str(folder)


class Client(Process):
    """One of their client programs: calls go to tests/legacy_client.py."""

    def __init__(self, folder, package):
        super().__init__(folder, [Path(__file__).with_name("legacy_client.py"), package],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == b"ready\n", self.text()

    def call(self, name, *args, keep=None, **kwargs):
        """Return what a call there returns; raises RuntimeError with the text of its error."""
        order = {"call": name, "args": args, "kwargs": kwargs, "keep": keep}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise RuntimeError(f"{reply['error']}: {reply['text']}")
        return reply["value"]

    def close(self):
        self.process.stdin.close()
        super().close()
        self.process.stdout.close()


def free_port():
    """Return a port that is free now; theirs cannot say which one they took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost and its key: their bridge does not run without."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert],
                   check=True, capture_output=True)
    key.chmod(0o600)
    return cert, key


class TheirBridge(Process):
    """A bridge of theirs."""

    def __init__(self, folder, package, certificate, port=None):
        self.cert, key = map(str, certificate)
        self.port = port or free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        super().__init__(folder, [VENV / "bin" / PACKAGES[package][0], "--cert", self.cert, "--key",
                                  key, "--host", "127.0.0.1", "--port", self.port, "-p", ""])
        wait_until(self.is_up, 60, "their bridge")

    def is_up(self):
        """Whether it accepts connections."""
        assert not self.ended(), self.text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True


@pytest.fixture(scope="module", params=list(PACKAGES))
def their_bridge(request, certificate, tmp_path_factory):
    """A bridge of theirs, for all tests."""
    process = TheirBridge(tmp_path_factory.mktemp("bridge"), request.param, certificate)
    process.package = request.param
    yield process
    process.close()


@pytest.fixture(scope="module")
def their_client(tmp_path_factory):
    """A client program of radical.edge, for all tests."""
    process = Client(tmp_path_factory.mktemp("client"), "radical.edge")
    yield process
    process.close()


def with_token(url, token):
    """Return the URL with a token in it, which is all that theirs can be told."""
    return url.replace("://", f"://edge:{token}@")


@pytest.fixture
def their_edge(request, tokens, tmp_path):
    """Start edges of theirs: their_edge(name, package="radical.edge", url=of our bridge)."""
    started = []

    def start(name, package="radical.edge", url=None, cert=None,
              plugins="probe,sysinfo,psij,rhapsody,staging", env=None):
        program = VENV / "bin" / PACKAGES[package][1]
        url = url or with_token(request.getfixturevalue("bridge").url, tokens[1]["edge"])
        certificate = ["--cert", cert] if cert else []
        process = Process(tmp_path / f"theirs-{len(started)}", [
            Path(__file__).with_name("legacy_service.py"), package, program, "--url", url,
            "--name", name, "-p", plugins, "-l", "DEBUG", *certificate], env)
        started.append(process)
        return process

    yield start
    for process in started:
        process.close()


@pytest.fixture
def old(bridge, their_edge):
    """An edge of theirs, named "old", on our bridge."""
    process = their_edge("old")
    wait_for_edge(bridge, "old", process)
    return process


def wait_for_edge(bridge, name, process):
    """Return once one of their edges is registered at our bridge."""
    def is_here():
        assert not process.ended(), process.text()
        return name in bridge._registry.links

    wait_until(is_here, 60, f"the edge {name}")


@pytest.fixture
def edge(bridge, tokens):
    """An edge of ours, named "e1", on our bridge."""
    running = Edge(bridge.url, "e1", plugins=OURS,
                   token=tokens[1]["edge"]).start()
    assert running.online.wait(20)
    wait_until(lambda: "e1" in bridge._registry.links)
    yield running
    assert running.stop()


@pytest.fixture
def client(bridge, tokens):
    """A client of ours, of our bridge."""
    with BridgeClient(bridge.url, token=tokens[1]["admin"]) as made:
        yield made


def get_json(client, path):
    """Return what a GET answers."""
    return client.http.get(path).raise_for_status().json()


# ---------------------------------------------------------------------------
# Their edge on our bridge
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("package", PACKAGES)
def test_their_edge_registers_serves_and_hears_of_others(package, bridge, their_edge, client, edge):
    process = their_edge("old", package)
    wait_for_edge(bridge, "old", process)
    described = client.get_topology()["edges"]["old"]
    assert described["endpoint"] == {"type": package}
    assert described["plugins"]["probe"] == {
        "type": "probe", "namespace": "/old/probe", "version": "7", "enabled": True,
        "ui_config": described["plugins"]["probe"]["ui_config"]}
    assert described["plugins"]["probe"]["ui_config"]["title"] == "Probe"
    assert get_json(client, "/old/probe/query?a=1&b=x%20y") == {"a": "1", "b": "x y"}
    seen = wait_until(lambda: get_json(client, "/old/probe/topologies")["topologies"])
    assert set(seen[-1]["e1"]["plugins"]) == set(OURS)
    assert "probe" in seen[-1]["old"]["plugins"]


def test_bodies_of_text_and_of_any_bytes_reach_their_edge_as_they_are(old, client):
    for body in (b"", b"text", "grüße \0 \u2028".encode(), b'{"a": 1}', bytes(range(256)) * 999):
        answer = client.http.post("/old/probe/digest", content=body).raise_for_status().json()
        assert answer == {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    packed = radical_edge.encode_msgpack({"tasks": b"\xff\x00", "n": 7})
    answer = client.http.post("/old/probe/digest", content=packed).json()
    assert answer["size"] == len(packed)


def test_a_body_that_their_edge_cannot_take_is_413_and_the_link_stays(old, client):
    limit = radical_edge.MAX_OLD_MESSAGE
    assert client.http.post("/old/probe/digest", content=b"x" * (limit - 10_000)).json()["size"]
    answer = client.http.post("/old/probe/digest", content=b"\0" * (limit // 2)).json()
    assert answer["size"] == limit // 2           # in JSON it would be three times the limit
    for body in (b"x" * limit, b"\xff" * limit):
        with pytest.raises(EdgeError) as caught:
            client.http.post("/old/probe/digest", content=body).raise_for_status()
        assert caught.value.status == 413 and str(limit) in caught.value.detail
    assert len(get_json(client, f"/old/probe/large/{12 * 1024 * 1024}")["text"]) == 12 << 20
    assert "Connection closed" not in old.text()


def test_errors_of_their_edge_keep_their_status_and_their_reason(old, client):
    for path, status, words in (("/old/probe/nope", 404, "No route"),
                                ("/old/nope/x", 404, "No route"),
                                ("/old/sysinfo/metrics/s.1", 404, "unknown session id"),
                                ("/old/probe/wait/long", 500, "could not convert"),
                                ("/none/probe/query", 404, "none")):
        with pytest.raises(EdgeError, match=words) as caught:
            get_json(client, path)
        assert caught.value.status == status


def test_notifications_of_their_edge_reach_our_callbacks_in_order(old, client):
    probe = client.get_edge_client("old").get_plugin("probe")
    got = []
    probe.register_notification_callback(lambda *event: got.append(event), topic="said")
    for text in "abc":
        assert probe._get(f"say/{probe.sid}/{text}") == {"said": text}
    wait_until(lambda: len(got) == 3)
    assert got == [("old", "probe", "said", {"text": text}) for text in "abc"]
    probe.close()


def test_our_client_classes_run_a_job_on_their_edge(old, client):
    sysinfo = client.get_edge_client("old").get_plugin("sysinfo")
    assert sysinfo.homedir() == str(old.log.parent)
    assert sysinfo.get_metrics()["system"]["hostname"] == socket.gethostname()
    assert sysinfo.host_role()["role"] in ("standalone", "login", "compute")
    psij = client.get_edge_client("old").get_plugin("psij")
    states = []
    psij.register_notification_callback(lambda *event: states.append(event[3]), "job_status")
    job = psij.submit_job({"executable": "/bin/sh", "arguments": ["-c", "echo out; exit 3"]})
    final = wait_until(lambda: [item for item in states if item["state"] == "FAILED"], 30)
    assert (final[0]["job_id"], final[0]["exit_code"]) == (job["job_id"], 3)
    assert psij.get_job_status(job["job_id"])["stdout"] == "out\n"
    assert [item["job_id"] for item in psij.list_jobs()["jobs"]] == [job["job_id"]]
    with pytest.raises(radical_edge.NotFound):     # of which the page makes a form
        psij.get_job_spec(job["job_id"])
    job = psij.submit_job({"executable": "/bin/sleep", "arguments": ["100"]})
    assert psij.cancel_job(job["job_id"])["status"] == "canceled"
    wait_until(lambda: psij.get_job_status(job["job_id"])["state"] == "CANCELED", 30)
    sysinfo.close()
    psij.close()


def test_our_client_classes_run_tasks_on_their_edge(old, client):
    rhapsody = client.get_edge_client("old").get_plugin("rhapsody", backends=["concurrent"])
    tasks = rhapsody.submit_tasks([{"executable": "/bin/echo", "arguments": ["hi"]}] * 3)
    uids = [task["uid"] for task in tasks]
    assert [task["state"] for task in rhapsody.wait_tasks(uids, timeout=60)] == ["DONE"] * 3
    assert rhapsody.get_task(uids[0])["stdout"].strip() == "hi"
    assert len(rhapsody.list_tasks()["tasks"]) == 3
    rhapsody.close()


def test_our_client_classes_move_single_files_to_and_from_their_edge(old, client, tmp_path):
    staging = client.get_edge_client("old").get_plugin("staging")
    home, content, seen = old.log.parent, os.urandom(3_000_000), []
    (tmp_path / "here").write_bytes(content)
    told = staging.put(tmp_path / "here", "new/folder/there", progress=lambda *at: seen.append(at))
    assert (told["path"], told["size"]) == (f"{home}/new/folder/there", 3_000_000)
    assert (home / "new/folder/there").read_bytes() == content
    assert seen[-1] == (3_000_000, 3_000_000)
    with pytest.raises(FileExistsError):
        staging.put(tmp_path / "here", f"{home}/new/folder/there")
    staging.put(tmp_path / "here", "~/new/folder/there", overwrite=True)
    assert staging.get("new/folder/there", tmp_path / "a/back")["size"] == 3_000_000
    assert (tmp_path / "a/back").read_bytes() == content
    with pytest.raises(FileExistsError):
        staging.get("new/folder/there", tmp_path / "a/back")
    staging.get("new/folder/there", tmp_path / "a/back", overwrite=True)
    assert staging.list("new")["entries"] == [{"name": "folder", "type": "dir", "size": None}]
    with pytest.raises(FileNotFoundError):
        staging.get("none", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "large").write_bytes(b"\xff" * plugins.MAX_OLD_FILE)
    staging.put(tmp_path / "large", "large")
    staging.get("large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"\xff" * plugins.MAX_OLD_FILE
    (tmp_path / "large").write_bytes(b"\xff" * (plugins.MAX_OLD_FILE + 1))
    with pytest.raises(EdgeError, match="takes .* bytes") as caught:
        staging.put(tmp_path / "large", "large", overwrite=True)
    assert caught.value.status == 413
    for call, *arguments in ((staging.put, tmp_path, "tree"), (staging.stat, "large"),
                             (staging.mkdir, "folder"), (staging.delete, "large")):
        with pytest.raises(EdgeError, match="put.*get.*list") as caught:
            call(*arguments)
        assert caught.value.status == 501
    assert (home / "large").stat().st_size == plugins.MAX_OLD_FILE and not old.ended()
    staging.close()


def test_a_plugin_of_theirs_that_blocks_its_edge_does_not_lose_it(tokens, their_edge):
    """Their plugins share a loop with the link, and some block it for minutes."""
    bridge = Bridge(port=0, tokens=tokens[0], heartbeat=0.5).start()
    try:
        process = their_edge("busy", url=with_token(bridge.url, tokens[1]["edge"]))
        wait_for_edge(bridge, "busy", process)
        with BridgeClient(bridge.url, token=tokens[1]["admin"]) as client:
            assert get_json(client, "/busy/probe/block/4") == {}         # eight heartbeats
        assert process.text().count("Connected to") == 1
    finally:
        assert bridge.stop()


def test_their_edge_ends_when_told_and_is_gone(old, bridge, client):
    client.disconnect_edge("old")
    old.process.wait(20)
    assert "Shutdown requested" in old.text()
    wait_until(lambda: "old" not in client.list_edges())


def test_a_second_edge_of_theirs_with_a_live_name_is_refused_and_told_why(old, their_edge, client):
    second = their_edge("old")
    second.process.wait(60)
    assert "Registration error: Edge 'old' already used" in second.text()
    assert get_json(client, "/old/probe/query?x=1") == {"x": "1"} and not old.ended()


def test_their_edge_without_a_right_token_stays_outside(bridge, their_edge):
    process = their_edge("old", url=with_token(bridge.url, "wrong"))
    wait_until(lambda: "401" in process.text(), 60)
    assert not bridge._registry.links


def test_their_edge_comes_back_to_a_bridge_that_was_restarted(tokens, their_edge, home):
    port = free_port()
    first = Bridge(port=port, tokens=tokens[0]).start()
    process = their_edge("old", url=with_token(first.url, tokens[1]["edge"]))
    wait_for_edge(first, "old", process)
    assert first.stop()
    second = Bridge(port=port, tokens=tokens[0]).start()
    try:
        with BridgeClient(second.url, token=tokens[1]["admin"]) as client:
            wait_until(lambda: "old" in second._registry.links, 60)
            assert get_json(client, "/old/probe/query?x=1") == {"x": "1"}
    finally:
        assert second.stop()


def test_a_post_to_their_edge_is_not_repeated_when_its_link_is_lost(old, bridge, client):
    """They do not know Idempotency-Key: whoever asks again might run a job twice."""
    failures = []

    def count():
        try:
            client.http.post("/old/probe/count/3").raise_for_status()
        except EdgeError as error:
            failures.append(error)

    thread = threading.Thread(target=count)
    thread.start()
    wait_until(lambda: bridge._registry.links["old"].pending)
    wait_until(lambda: get_json(client, "/old/probe/runs")["runs"] == 1)
    bridge._thread.call(bridge._registry.links["old"].channel.close, "cut")
    thread.join(30)
    assert failures[0].status == 503 and "may have been done" in failures[0].detail
    assert wait_until(lambda: get_json(client, "/old/probe/runs")["runs"], 30) == 1


def test_a_plugin_that_was_written_for_theirs_runs_on_our_edge(edge, client):
    edge.host.add(make_probe(radical_edge), "probe")
    wait_until(lambda: "probe" in client.get_topology()["edges"]["e1"]["plugins"])
    assert get_json(client, "/e1/probe/query?a=1") == {"a": "1"}
    assert client.http.post("/e1/probe/digest", content=b"\xff" * 9).json()["size"] == 9
    probe = client.get_edge_client("e1").get_plugin("probe")
    got = []
    probe.register_notification_callback(lambda *event: got.append(event), topic="said")
    assert probe._get(f"say/{probe.sid}/hi") == {"said": "hi"}
    wait_until(lambda: got == [("e1", "probe", "said", {"text": "hi"})])
    seen = wait_until(lambda: get_json(client, "/e1/probe/topologies")["topologies"])
    assert "probe" in seen[-1]["e1"]["plugins"]


# ---------------------------------------------------------------------------
# Our edge on their bridge
# ---------------------------------------------------------------------------

@pytest.fixture
def ours(their_bridge, home, request):
    """An edge of ours on their bridge, under a name of its own."""
    name = f"ours-{abs(hash(request.node.name)) % 10 ** 8}"
    running = Edge(their_bridge.url, name, plugins=OURS,
                   cert=their_bridge.cert).start()
    assert running.online.wait(20)
    yield running
    assert running.stop()


class Https:
    """Requests to their bridge, without any client's help."""

    def __init__(self, bridge):
        self.bridge, self.context = bridge, ssl.create_default_context(cafile=bridge.cert)

    def __call__(self, method, path, body=None, **headers):
        """Return (status, fields, body)."""
        request = urllib.request.Request(self.bridge.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60, context=self.context) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def json(self, method, path, value=None):
        """Return the value that a request answers."""
        body = None if value is None else json.dumps(value).encode()
        status, _, content = self(method, path, body)
        assert status == 200, content
        return json.loads(content)


@pytest.fixture
def https(their_bridge):
    return Https(their_bridge)


def test_our_edge_registers_and_serves_at_their_bridge(their_bridge, ours, https):
    word = "edges" if their_bridge.package == "radical.edge" else "endpoints"
    listed = https.json("POST", f"/{word[:-1]}/list")["data"][word][ours.name]
    assert listed["endpoint"]["type"] == "radical.edge"
    assert listed["plugins"]["echo"]["namespace"] == f"/{ours.name}/echo"
    assert https.json("GET", f"/{word}")["total"] >= 1
    assert https.json("GET", f"/{ours.name}/echo/hello?a=1") == {"user": None, "query": {"a": "1"}}
    assert https.json("POST", f"/{ours.name}/echo/json", {"ü": [1, None]}) == {
        "got": {"ü": [1, None]}}
    sid = https.json("POST", f"/{ours.name}/sysinfo/register_session")["sid"]
    assert "cpu" in https.json("GET", f"/{ours.name}/sysinfo/metrics/{sid}")
    assert https.json("POST", f"/{ours.name}/sysinfo/unregister_session/{sid}") == {"ok": True}


def test_bodies_of_any_bytes_come_back_through_their_bridge(ours, https):
    for body in (b"text", b"\xff\x00" * 50_000, bytes(range(256)), "ü\0".encode()):
        status, _, answer = https("POST", f"/{ours.name}/echo/echo", body)
        assert (status, answer) == (200, body)
    packed = radical_edge.encode_msgpack({"got": "x", "bytes": "ü"})
    assert json.loads(https("POST", f"/{ours.name}/echo/json", packed,
                            **{"Content-Type": "application/msgpack"})[2]) == {
        "got": {"got": "x", "bytes": "ü"}}


def test_an_answer_that_their_bridge_cannot_take_is_413_and_the_link_stays(ours, https):
    class Large(EchoPlugin):
        plugin_name = "large"

        @radical_edge.get("bytes/{size}")
        async def bytes(self, request):
            return radical_edge.Response(b"\xff" * int(request.path_params["size"]))

    ours.host.add(Large, "large")
    status, _, content = wait_until(lambda: https("GET", f"/{ours.name}/large/bytes/7000000"))
    assert (status, len(content)) == (200, 7_000_000)
    status, _, content = https("GET", f"/{ours.name}/large/bytes/9000000")
    assert status == 413 and "a bridge of version 1 takes" in json.loads(content)["detail"]
    assert https("GET", f"/{ours.name}/echo/hello")[0] == 200


def test_errors_of_our_edge_keep_their_status_through_their_bridge(ours, https):
    for path, status in (("echo/nope", 404), ("nope/x", 404), ("echo/fail/409", 409),
                         ("echo/number?n=x", 422), ("echo/crash", 500),
                         ("sysinfo/metrics/s.1", 404)):
        found, fields, content = https("GET", f"/{ours.name}/{path}")
        error = json.loads(content)
        assert (found, error["error"], error["status_code"]) == (status, True, status)
        assert "secret" not in error["detail"]


def test_our_edge_ends_when_their_bridge_tells_it(their_bridge, ours, https):
    word = "edge" if their_bridge.package == "radical.edge" else "endpoint"
    assert https.json("POST", f"/{word}/disconnect/{ours.name}")["status"] == "shutdown"
    assert ours.ended.wait(20)


def test_a_name_that_is_taken_at_their_bridge_is_waited_for(their_bridge, ours, home):
    refusals = []
    second = Edge(their_bridge.url, ours.name, plugins=["echo"], cert=their_bridge.cert,
                  state_dir=home / "second")
    handler = logging.Handler()
    handler.emit = lambda record: refusals.append(record.getMessage())
    radical_edge.edge_log.addHandler(handler)
    try:
        second.start()
        wait_until(lambda: any("already used" in text for text in refusals), 20)
        assert not second.online.is_set()
        ours.request_stop()
        ours._transport.submit(ours._close_links()).result(10)
        assert second.online.wait(60)
    finally:
        radical_edge.edge_log.removeHandler(handler)
        assert second.stop()


def test_our_edge_comes_back_to_their_bridge(certificate, tmp_path, home):
    bridge = TheirBridge(tmp_path / "bridge", "radical.edge", certificate)
    edge = Edge(bridge.url, "back", plugins=["echo"], cert=bridge.cert).start()
    try:
        assert edge.online.wait(20)
        bridge.close()
        wait_until(lambda: edge._links[0].state.name != "OPEN")
        bridge = TheirBridge(tmp_path / "bridge", "radical.edge", certificate, bridge.port)
        wait_until(lambda: Https(bridge)("GET", "/back/echo/hello")[0] == 200, 60)
    finally:
        assert edge.stop()
        bridge.close()


# ---------------------------------------------------------------------------
# Our clients on their bridge; their clients on our bridge, and on theirs with our edge
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("their_bridge", ["radical.edge"], indirect=True)
@pytest.mark.parametrize("content", [b"\0", b"\xff"], ids=["zeros", "no text"])
def test_our_client_moves_large_files_through_their_bridge(their_bridge, ours, tmp_path, home,
                                                           content):
    (tmp_path / "here").write_bytes(content * 20_000_000)
    with BridgeClient(their_bridge.url, cert=their_bridge.cert) as client:
        staging = client.get_edge_client(ours.name).get_plugin("staging")
        assert staging.put(tmp_path / "here", "there")["size"] == 20_000_000
        assert (home / "there").read_bytes() == content * 20_000_000
        staging.get("there", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content * 20_000_000
        staging.close()


@pytest.mark.parametrize("their_bridge", ["radical.edge"], indirect=True)
def test_our_client_classes_and_functions_work_at_their_bridge(their_bridge, ours):
    options = {"url": their_bridge.url, "cert": their_bridge.cert, "token": "unused"}
    assert ours.name in radical_edge.list_edges(**options)
    assert "psij" in radical_edge.list_plugins(ours.name, **options)
    assert radical_edge.call(ours.name, "echo", "json", {"a": 1}, **options) == {"got": {"a": 1}}
    with BridgeClient(their_bridge.url, cert=their_bridge.cert) as client:
        assert client.wait_for_edge(["none", ours.name], timeout=20) == ours.name
        with pytest.raises(TimeoutError, match=f"has .*{ours.name}"):
            client.wait_for_edge("none", timeout=2)
        topologies, states = [], []
        client.register_topology_callback(topologies.append)
        wait_until(lambda: any(ours.name in edges for edges in topologies))
        psij = client.get_edge_client(ours.name).get_plugin("psij")
        psij.register_notification_callback(lambda *event: states.append(event), "job_status")
        job = psij.submit_job({"executable": "/bin/sh", "arguments": ["-c", "echo hi"]})
        assert psij.wait_job(job["job_id"], timeout=30)["stdout"] == "hi\n"
        wait_until(lambda: any(event[3]["state"] == "COMPLETED" for event in states), 20)
        assert states[0][:3] == (ours.name, "psij", "job_status")
        psij.close()


def test_our_client_does_not_repeat_a_post_that_only_theirs_have_seen(certificate, tmp_path,
                                                                     their_edge):
    """Neither their bridge nor their edge knows Idempotency-Key; the client finds that out."""
    bridge = TheirBridge(tmp_path / "bridge", "radical.edge", certificate)
    relay, errors = Relay(bridge.port), []
    process = their_edge("twice", url=bridge.url, plugins="probe", cert=bridge.cert)
    https = Https(bridge)

    def count():
        with BridgeClient(f"https://127.0.0.1:{relay.port}", cert=bridge.cert) as client:
            try:
                client.http.post("/twice/probe/count/2")
            except EdgeError as error:
                errors.append(error)

    def has_run():
        assert not process.ended(), process.text()
        status, _, content = https("GET", "/twice/probe/runs")
        return status == 200 and json.loads(content)["runs"]

    thread = threading.Thread(target=count)
    try:
        wait_until(lambda: https("GET", "/twice/probe/runs")[0] == 200, 60)
        thread.start()
        wait_until(has_run, 20)
        relay.cut()
        thread.join(30)
        assert errors[0].status == 503 and "look before you try again" in errors[0].detail
        assert has_run() == 1
    finally:
        relay.close()
        bridge.close()


@pytest.fixture(params=["our bridge, our edge", "our bridge, their edge", "their bridge, our edge"])
def scene(request, tokens, tmp_path, certificate):
    """(bridge's URL, certificate or None, edge's name, URL without token)"""
    if request.param == "their bridge, our edge":
        bridge = TheirBridge(tmp_path / "bridge", "radical.edge", certificate)
        running = Edge(bridge.url, "e1", plugins=OURS,
                       cert=bridge.cert).start()
        assert running.online.wait(20)
        yield bridge.url, bridge.cert, "e1"
        assert running.stop()
        bridge.close()
        return
    ours = request.getfixturevalue("bridge")
    name = "e1" if request.param.endswith("our edge") else "old"
    request.getfixturevalue("edge" if name == "e1" else "old")
    yield with_token(ours.url, tokens[1]["admin"]), None, name


@pytest.fixture
def their_session(scene, their_client):
    """Their client of the scene's bridge and edge: objects "bridge", "edge", "sysinfo", "psij"."""
    url, cert, name = scene
    their_client.call("client.BridgeClient", url, cert=cert, keep="bridge")
    their_client.call("bridge.get_edge_client", name, keep="edge")
    yield their_client
    their_client.call("bridge.close")


def test_their_client_lists_and_looks(their_session, scene):
    call, name = their_session.call, scene[2]
    assert name in call("bridge.list_edges")
    assert call("bridge.wait_for_edge", name, timeout=10) == name
    assert call("edge.list_plugins")["psij"]["namespace"] == f"/{name}/psij"
    call("edge.get_plugin", "sysinfo", keep="sysinfo")
    assert call("sysinfo.homedir").startswith("/")
    assert call("sysinfo.host_role")["role"] in ("standalone", "login", "compute")
    metrics = call("sysinfo.get_metrics")
    assert metrics["system"]["hostname"] == socket.gethostname()
    assert {part: set(metrics[part]) - {"user"} for part in ("system", "cpu", "memory")} == {
        "system": {"hostname", "uptime", "kernel", "arch"},
        "cpu": {"model", "vendor", "cores_physical", "cores_logical", "percent", "load_avg",
                "freq_mhz"},
        "memory": {"total", "available", "percent", "used"}}
    assert set(metrics["disks"][0]) == {"mount", "device", "fstype", "type", "total", "used",
                                        "percent"}
    assert isinstance(metrics["network"], list) and isinstance(metrics["gpus"], list)
    call("sysinfo.close")
    with pytest.raises(RuntimeError, match="No active session"):
        call("sysinfo.get_metrics")
    with pytest.raises(RuntimeError, match="'nope' unknown"):
        call("edge.get_plugin", "nope")


def test_their_client_runs_jobs_and_is_called_back(their_session, scene):
    call = their_session.call
    call("edge.get_plugin", "psij", keep="psij")
    assert call("bridge.wait_for_listener", timeout=20)
    call("psij.register_notification_callback", "$on_event", topic="job_status")
    job = call("psij.submit_job", {"executable": "/bin/sh", "arguments": [
        "-c", "echo out; echo err >&2; exit 3"], "attributes": {"duration": 600}})
    event = call("find_event", {"job_id": job["job_id"], "state": "FAILED"})
    assert event[:3] == [scene[2], "psij", "job_status"]
    assert set(event[3]) >= {"job_id", "state", "exit_code", "stdout", "stderr"}
    assert (event[3]["exit_code"], event[3]["stdout"], event[3]["stderr"]) == (3, "out\n", "err\n")
    status = call("psij.get_job_status", job["job_id"])
    assert (status["state"], status["stdout_offset"], status["executor"]) == ("FAILED", 4, "local")
    assert set(status) >= {
        "job_id", "native_id", "state", "message", "exit_code", "time", "executable", "arguments",
        "executor", "directory", "queue_name", "account", "node_count", "duration", "stdout",
        "stderr", "stdout_offset", "stderr_offset"}
    assert call("psij.get_job_status", job["job_id"], stdout_offset=2)["stdout"] == "t\n"
    listed = call("psij.list_jobs")["jobs"]
    assert [item["job_id"] for item in listed] == [job["job_id"]]
    assert set(listed[0]) >= {"job_id", "native_id", "state", "exit_code", "executable",
                              "arguments", "executor", "queue_name", "account", "node_count"}
    job = call("psij.submit_job", {"executable": "/bin/sleep", "arguments": ["100"]})
    assert call("psij.cancel_job", job["job_id"]) == {"job_id": job["job_id"], "status": "canceled"}
    assert call("find_event", {"job_id": job["job_id"], "state": "CANCELED"})
    with pytest.raises(RuntimeError, match="HTTP 404"):
        call("psij.get_job_status", "nope")
    call("psij.close")


def test_their_client_runs_tasks(their_session, scene):
    """Theirs sends msgpack, waits for session_status, and learns of tasks by notifications."""
    call, backend = their_session.call, "concurrent" if scene[2] == "old" else "local"
    call("edge.get_plugin", "rhapsody", backends=[backend], keep="rhapsody")
    tasks = [{"uid": f"t{number}", "executable": "/bin/sh", "arguments": ["-c", f"exit {number}"]}
             for number in range(3)]
    assert [task["uid"] for task in call("rhapsody.submit_tasks", tasks)] == ["t0", "t1", "t2"]
    done = call("rhapsody.wait_tasks", ["t0", "t1", "t2"], timeout=60)
    assert [task["state"] for task in done] == ["DONE", "FAILED", "FAILED"]
    alike = [{"executable": "/bin/echo", "arguments": ["hi"]} for _ in range(20)]
    uids = [task["uid"] for task in call("rhapsody.submit_tasks", alike)]    # as a template
    assert {task["state"] for task in call("rhapsody.wait_tasks", uids, timeout=60)} == {"DONE"}
    assert call("rhapsody.get_task", uids[0])["stdout"].strip() == "hi"
    assert len(call("rhapsody.list_tasks")["tasks"]) == 23
    slow = call("rhapsody.submit_tasks", [{"executable": "/bin/sleep", "arguments": ["100"]}])
    call("rhapsody.cancel_task", slow[0]["uid"])
    ended = call("rhapsody.wait_tasks", [slow[0]["uid"]], timeout=60)
    assert ended[0]["state"] in ("CANCELED", "CANCELLED")
    with pytest.raises(RuntimeError, match="HTTP 404"):
        call("rhapsody.get_task", "nope")
    call("rhapsody.close")


def test_their_client_moves_files(their_session, tmp_path):
    call = their_session.call
    call("edge.get_plugin", "sysinfo", keep="sysinfo")
    call("edge.get_plugin", "staging", keep="staging")
    home, content = call("sysinfo.homedir"), os.urandom(1_000_000)
    (tmp_path / "here").write_bytes(content)
    told = call("staging.put", str(tmp_path / "here"), "~/new/folder/there")
    assert (told["path"], told["size"]) == (f"{home}/new/folder/there", 1_000_000)
    with pytest.raises(RuntimeError, match="FileExistsError"):
        call("staging.put", str(tmp_path / "here"), "~/new/folder/there")
    call("staging.put", str(tmp_path / "here"), "~/new/folder/there", overwrite=True)
    told = call("staging.get", "~/new/folder/there", str(tmp_path / "back"))
    assert told == {"path": str(tmp_path / "back"), "size": 1_000_000}
    assert (tmp_path / "back").read_bytes() == content
    listed = call("staging.list", "~/new")
    assert listed["path"] == f"{home}/new"
    assert [(item["name"], item["type"], item["size"]) for item in listed["entries"]] == [
        ("folder", "dir", None)]
    listed = call("staging.list", "~/new/folder")["entries"]
    assert (listed[0]["name"], listed[0]["type"], listed[0]["size"]) == ("there", "file", 1_000_000)
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        call("staging.get", "~/none", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="HTTP 40[03]|outside|escapes"):
        call("staging.list", "/etc")
    call("staging.close")
    call("sysinfo.close")


@pytest.fixture(params=["their client, our edge", "our client, their edge"])
def across(request, bridge, tokens, client, their_edge, monkeypatch):
    """Returns a function: across(plugin, plugins, env) starts an edge named "far" and returns
    ask(method, *args, **kwargs), which calls that method of the plugin's client class. caller:
    another client program of theirs than their_client."""
    undo = contextlib.ExitStack()

    def ours(plugin, plugins, env, caller=None):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        edge = Edge(bridge.url, "far", plugins=plugins.split(","), token=tokens[1]["edge"]).start()
        undo.callback(edge.stop)
        assert edge.online.wait(20)
        call = (caller or request.getfixturevalue("their_client")).call
        call("client.BridgeClient", with_token(bridge.url, tokens[1]["admin"]), keep="bridge")
        undo.callback(call, "bridge.close")
        call("bridge.get_edge_client", "far", keep="edge")
        call("edge.get_plugin", plugin, keep="plugin")
        undo.callback(call, "plugin.close")
        return lambda method, *args, **kwargs: call(f"plugin.{method}", *args, **kwargs)

    def theirs(plugin, plugins, env):
        process = their_edge("far", plugins=plugins, env=env)
        wait_for_edge(bridge, "far", process)
        made = undo.enter_context(client.get_edge_client("far").get_plugin(plugin))
        return lambda method, *args, **kwargs: getattr(made, method)(*args, **kwargs)

    with undo:
        yield ours if request.param.endswith("our edge") else theirs


def test_workflows_are_configured_started_and_stopped_across(across, tmp_path):
    ask = across("xgfabric", "xgfabric,sysinfo,staging,rhapsody", {})
    assert Path(ask("get_workdir")["path"]).is_dir()
    assert ask("set_workdir", str(tmp_path)) == {"status": "ok", "path": str(tmp_path)}
    assert ask("get_workdir") == {"path": str(tmp_path)} and ask("list_configs") == []
    assert ask("get_default_config") == ask("load_config", "default")
    test = ask("get_test_config")
    assert test["mock_sensor_data"] is True and test["simulation_task"]["executable"] == "bash"
    assert ask("save_config", {**test, "name": "mine"}) == {"status": "saved", "name": "mine"}
    assert [item["name"] for item in ask("list_configs")] == ["mine"]
    assert ask("load_config", "mine")["num_simulations"] == test["num_simulations"]
    assert ask("delete_config", "mine") == {"status": "deleted", "name": "mine"}
    with pytest.raises(RuntimeError, match="HTTP 404.*mine"):
        ask("load_config", "mine")
    assert ask("get_status")["status"] == "idle"
    assert ask("start_workflow", "test", "test") == {"status": "started", "config": "test"}
    assert set(ask("get_status")) >= {field.name for field in dataclasses.fields(
        plugins.WorkflowState)}
    try:
        assert ask("stop_workflow") == {"status": "stopped"}
    except RuntimeError as error:                 # it has failed already
        assert "HTTP 409" in str(error) and ask("get_status")["status"] == "failed"
    wait_until(lambda: ask("get_status")["status"] in ("cancelled", "failed"), 30)


@pytest.fixture
def pilot_client(fake, tmp_path):                                        # noqa: F811
    """A client program of radical.edge that finds a radical.pilot: it does not know lucid else."""
    process = Client(tmp_path / "pilot-client", "radical.edge")
    yield process
    process.close()


@pytest.mark.parametrize("across", ["their client, our edge"], indirect=True)
def test_their_client_runs_a_task_in_a_pilot_of_our_lucid(pilot_client, across):
    ask = across("lucid", "lucid", {}, pilot_client)
    pid = wait_until(lambda: submit_pilot(ask), 60, "RADICAL-Pilot")["pid"]
    assert pid.startswith("pilot")
    tid = ask("task_submit", {"executable": "true"})["tid"]
    done = ask("task_wait", tid)
    assert done["tid"] == tid and done["task"]["uid"] == tid
    assert (done["task"]["state"], done["task"]["exit_code"]) == ("DONE", 0)
    with pytest.raises(RuntimeError, match="HTTP 404"):
        ask("task_wait", "task.nope")


def submit_pilot(ask):
    """Return the answer, None as long as RADICAL-Pilot is starting: theirs waits in the request."""
    try:
        return ask("pilot_submit", {"resource": "local.localhost", "cores": 1, "runtime": 5})
    except RuntimeError as error:
        assert "HTTP 409" in str(error)


def test_their_client_hears_of_edges_that_come(their_session, scene):
    call = their_session.call
    call("bridge.register_topology_callback", "$on_event")
    name = scene[2]
    event = call("find_topology", name)
    assert "psij" in event[name]["plugins"] and "endpoint" in event[name]


def test_sseclient_reads_our_events(bridge, edge, tokens, their_client):
    url = with_token(bridge.url, tokens[1]["admin"])
    first = their_client.call("read_sse", url, 1)[0]
    assert first["event"] == "message"            # without a name: onmessage fires
    assert first["data"]["topic"] == "topology"
    assert set(first["data"]["data"]) == {"bridge", "edges"}
    assert first["data"]["data"]["bridge"] == {"url": bridge.url}


def test_their_client_sends_any_bytes_and_ids_that_others_send_too(bridge, edge, tokens,
                                                                  their_client):
    url = with_token(bridge.url, tokens[1]["client"])
    for _ in range(2):                            # both count req.000000, req.000001, ...
        their_client.call("client.BridgeClient", url, keep="bridge")
        assert their_client.call("post", "$bridge", "/e1/echo/echo", 1 << 20) == [200, True, ""]
        assert their_client.call("post", "$bridge", "/e1/echo/echo", 8 << 20) == [200, True, ""]
        their_client.call("bridge.close")


def test_a_token_of_ours_limits_what_their_client_may_do(bridge, edge, tokens, their_client):
    url = with_token(bridge.url, tokens[1]["read"])
    their_client.call("client.BridgeClient", url, keep="bridge")
    assert their_client.call("bridge.list_edges") == ["e1"]
    assert their_client.call("post", "$bridge", "/e1/echo/echo", 256)[0] == 403
    their_client.call("bridge.close")
    their_client.call("client.BridgeClient", bridge.url, keep="bridge")
    with pytest.raises(RuntimeError, match="HTTP 401"):
        their_client.call("bridge.list_edges")
    their_client.call("bridge.close")
