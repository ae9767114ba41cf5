"""Tests of edges that edges start, and of their tunnels: a real bridge with TLS, a real sshd.

All runs on this machine; test_child_edges.py has a compute node of its own.
"""
from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import plugins                                                            # noqa: E402
import radical_edge                                                       # noqa: E402
from radical_edge import (EdgeError, PortFile, TokenStore, Unprocessable, Uplink,  # noqa: E402
                          encode_port_file, make_child_token, parse_port_file)
from sshd import Sshd, find_sshd, make_ssh                                # noqa: E402
from test_edge import (SCRIPT, certificate, home, needs, psij, start,     # noqa: E402,F401
                       wait_until)

TLS_URL = "https://bridge.example.org:8000"


# ---------------------------------------------------------------------------
# What a child is
# ---------------------------------------------------------------------------

@pytest.fixture
def uplink(home):
    """The way to a bridge with TLS that nobody dials."""
    return Uplink([TLS_URL], "secret", "sha256:" + "0" * 64)


@pytest.mark.parametrize("arguments, said", [
    (["-n", "c1"], {"name": "c1"}), (["--name=c1"], {"name": "c1"}), (["-nc1"], {"name": "c1"}),
    (["--name", "a", "-n", "b"], {"name": "b"}),
    (["-n", "c1", "--tunnel"], {"name": "c1", "tunnel": "reverse"}),
    (["--tunnel", "relay", "-n", "c"], {"name": "c", "tunnel": "relay"}),
    (["--tunnel", "-n", "c"], {"name": "c", "tunnel": "reverse"}),
    (["--tunnel=forward", "--tunnel-via=me@login1", "--url", "u", "-n", "c"],
     {"tunnel": "forward", "via": "me@login1", "url": "u", "name": "c"}),
    (["-p", "psij", "-n"], {"name": ""})])
def test_the_arguments_of_a_child_are_read_as_its_own_command_line_reads_them(arguments, said):
    assert plugins.parse_child_arguments(arguments) == said
    if "" not in said.values():
        parsed = radical_edge.make_parser().parse_args(["--edge", *arguments])
        assert parsed.name == said["name"]
        assert parsed.tunnel == said.get("tunnel", "none")
        assert parsed.tunnel_via == said.get("via")


def test_a_child_with_very_many_arguments_is_read_in_one_pass():
    # each was taken off the front of a list: minutes of the plugin's loop
    many = ["x"] * 1_000_000
    assert plugins.parse_child_arguments([*many, "-n", "c1"]) == {"name": "c1"}


@pytest.mark.parametrize("given, mode", [
    (None, "none"), (False, "none"), (True, "reverse"), ("none", "none"), ("reverse", "reverse"),
    ("forward", "forward"), ("relay", "relay")])
def test_a_tunnel_is_given_by_name_or_as_true_and_false(given, mode):
    assert plugins.parse_tunnel_mode(given) == mode


@pytest.mark.parametrize("given", ["", "ssh", 1, 0, [], {"a": 1}, "Reverse"])
def test_any_other_tunnel_is_refused(given):
    with pytest.raises(Unprocessable, match="tunnel: must be"):
        plugins.parse_tunnel_mode(given)


@pytest.mark.parametrize("executable", [None, "radical-edge-wrapper.sh", "radical-edge-service.sh",
                                        "radical-edge"])
def test_a_child_runs_the_parents_own_python_and_file(uplink, executable):
    spec = {"arguments": ["-n", "c1", "-p", "sysinfo"], "environment": {"A": "b"}}
    if executable:
        spec["executable"] = executable
    child = plugins.make_child(spec, "relay", uplink)
    assert child.edge_name == "c1" and child.mode == "relay" and child.url == TLS_URL
    assert child.spec["executable"] == sys.executable
    assert child.spec["arguments"] == [SCRIPT, "--edge", "-n", "c1", "-p", "sysinfo", "--tunnel",
                                       "relay"]
    environment = child.spec["environment"]
    assert environment["A"] == "b" and environment["RADICAL_BRIDGE_URL"] == TLS_URL
    assert environment["RADICAL_BRIDGE_CERT"] == "sha256:" + "0" * 64
    assert environment["RADICAL_BRIDGE_TOKEN_FILE"].endswith("/.radical/edge/tunnels/c1.token")
    assert "secret" not in json.dumps(child.spec)


def test_a_wrapper_of_the_users_own_is_run_as_it_is_with_the_flag_of_old(uplink):
    child = plugins.make_child({"executable": "/opt/my-wrapper", "arguments": ["-n", "c1"]}, True,
                               uplink)
    assert child.spec["executable"] == "/opt/my-wrapper"
    assert child.spec["arguments"] == ["-n", "c1", "--tunnel"]
    child = plugins.make_child({"executable": "w", "arguments": ["-n", "c", "--tunnel"]}, True,
                               uplink)
    assert child.spec["arguments"] == ["-n", "c", "--tunnel"]


BAD_CHILDREN = [
    (None, False, "job_spec.arguments"), ({}, False, "job_spec.arguments"),
    ({"arguments": "-n c1"}, False, "job_spec.arguments"),
    ({"arguments": ["-p", "psij"]}, False, "-n or --name"),
    ({"arguments": ["-n"]}, False, "-n or --name"),
    ({"arguments": ["-n", "../x"]}, False, "-n or --name"),
    ({"arguments": ["-n", "bridge"]}, False, "-n or --name"),
    ({"arguments": ["-n", "c", "--tunnel-via", "-oProxyCommand=x"]}, "forward", "--tunnel-via"),
    ({"arguments": ["-n", "c", "--tunnel", "relay"]}, "reverse", "--tunnel relay"),
    ({"arguments": ["-n", "c", "--url", "http://127.0.0.1:1"]}, "relay", "unencrypted"),
    ({"arguments": ["-n", "c", "--url", "https://a,https://b"]}, "reverse", "one bridge"),
    ({"arguments": ["-n", "c", "--url", "ftp://a"]}, False, "bridge URL"),
    ({"arguments": ["-n", "c", "--url", "http://a.example.org"]}, False, "unencrypted"),
    ({"arguments": ["-n", "c"]}, "ssh", "tunnel: must be")]


@pytest.mark.parametrize("spec, tunnel, words", BAD_CHILDREN)
def test_what_cannot_become_an_edge_is_422_and_names_the_field(uplink, spec, tunnel, words):
    with pytest.raises(Unprocessable) as caught:
        plugins.make_child(spec, tunnel, uplink)
    assert words in caught.value.detail


def test_ssh_is_refused_where_the_parent_itself_needs_a_proxy_and_a_relay_is_not(
        uplink, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:3128")
    for mode in ("reverse", "forward"):
        with pytest.raises(Unprocessable, match="relay"):
            plugins.make_child({"arguments": ["-n", "c"]}, mode, uplink)
    assert plugins.make_child({"arguments": ["-n", "c"]}, "relay", uplink).mode == "relay"


# ---------------------------------------------------------------------------
# Port files and tokens
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    PortFile(1), PortFile(65535), PortFile(4000, "ab" * 32, ("10.0.0.1", "login1", "fd00::1"))])
def test_a_port_file_comes_back_as_it_was_written(content):
    assert parse_port_file(encode_port_file(content)) == content


def test_the_port_file_of_an_older_edge_is_read():
    assert parse_port_file("41234\n") == parse_port_file("41234") == PortFile(41234)


@pytest.mark.parametrize("text", ["", "0", "65536", "-1", "x", "1e3", " 5", "80\nshort", "٤٢",
                                  "80\n" + "ab" * 32 + "\n-oProxyCommand=x"])
def test_what_is_no_port_file_is_refused(text):
    with pytest.raises(ValueError):
        parse_port_file(text)


def test_a_port_file_that_others_can_read_is_refused(home):
    tunnel = radical_edge.Tunnel("reverse", "c1", None, threading.Event())
    radical_edge.write_private(radical_edge.tunnels_dir() / "c1.port", "4000\n")
    (radical_edge.tunnels_dir() / "c1.port").chmod(0o644)
    with pytest.raises(EdgeError, match="chmod 600"):
        tunnel.open(radical_edge.parse_bridge_url(TLS_URL))


def test_a_childs_token_registers_that_child_alone_and_dies_with_its_maker(home):
    store = TokenStore(home / "tokens.json")
    token = store.add("site", "edge", edges="hpc*")
    later = int(time.time()) + 60
    made = make_child_token(token, "hpc-1", later)
    found = store.find(made)
    assert found == radical_edge.Identity("site", radical_edge.Scope.EDGE, "hpc-1", later)
    assert not found.may("use") and not found.may("look")
    assert store.find(make_child_token(token, "other", later)) is None   # not the maker's either
    assert store.find(make_child_token(token, "hpc-1", int(time.time()) - 1)) is None
    for wrong in (made[:-1], made.replace("hpc-1", "hpc-2"), made.replace(str(later), "9" * 11),
                  made + "~", "child~", "child~~~~", made.upper(), made[:-1] + "é"):
        assert store.find(wrong) is None
    with pytest.raises(ValueError):
        make_child_token(made, "hpc-1x", later)
    store.revoke("site")
    assert store.find(made) is None


def test_a_token_that_may_not_register_makes_no_children(home):
    store = TokenStore(home / "tokens.json")
    for scope, good in (("admin", True), ("edge", True), ("client", False), ("read", False)):
        made = make_child_token(store.add(scope, scope), "c", int(time.time()) + 60)
        found = store.find(made)
        assert (found is not None) == good
        assert found is None or found.scope is radical_edge.Scope.EDGE


# ---------------------------------------------------------------------------
# The routes, without a bridge
# ---------------------------------------------------------------------------

@pytest.fixture
def sleeper(tmp_path):
    """A job_spec that stands for a child: a program that takes any arguments and sleeps."""
    path = tmp_path / "sleeper"
    path.write_text("#!/bin/sh\nexec sleep 600\n")
    path.chmod(0o755)
    return {"executable": str(path), "arguments": ["-n", "c1"]}


def submit_child(psij, spec, tunnel, executor="local"):
    return psij.post(f"submit_tunneled/{psij.sid}", {"job_spec": spec, "executor": executor,
                                                    "tunnel": tunnel})


def tunnel_of(psij, name="c1"):
    status, value = psij.get(f"tunnel_status/{name}")
    assert status == 200, value
    return value


def test_mistakes_are_told_and_leave_nothing_behind(psij, sleeper, home):
    assert submit_child(psij, {**sleeper, "arguments": []}, True)[0] == 422
    assert submit_child(psij, {**sleeper, "color": 1}, True)[0] == 422
    assert submit_child(psij, {**sleeper, "executable": ["x"]}, True)[0] == 422
    assert submit_child(psij, {**sleeper, "environment": 7}, True)[0] == 422
    assert submit_child(psij, {**sleeper, "arguments": ["-n", "e1"]}, True)[0] == 422
    assert submit_child(psij, sleeper, "ssh")[0] == 422
    assert submit_child(psij, sleeper, False, executor="nonsense")[0] in (422, 501)
    assert submit_child(psij, {**sleeper, "directory": "/nonsense"}, False)[0] == 422
    assert psij.post(f"submit_tunneled/{psij.sid}", {"spec": 1})[0] == 422
    assert psij.post("submit_tunneled/session.none", {"job_spec": sleeper})[0] == 404
    assert psij.get("tunnel_status/..%2f..")[0] == 422
    assert tunnel_of(psij) == {"edge_name": "c1", "status": "no_tunnel", "mode": "none",
                               "port": None, "pid": None, "error": None, "job_id": None}
    assert list(home.rglob("c1.*")) == []


def test_an_edge_name_has_one_watcher_and_is_free_again_at_the_end(psij, sleeper):
    radical_edge.write_private(radical_edge.tunnels_dir() / "c1.port", "4000\n")      # stale
    status, value = submit_child(psij, sleeper, "none")
    assert status == 200 and value["edge_name"] == "c1" and value["job_id"]
    assert not (radical_edge.tunnels_dir() / "c1.port").exists()
    assert tunnel_of(psij)["status"] == "no_tunnel"
    status, answer = submit_child(psij, sleeper, True)
    assert status == 409 and value["job_id"] in answer["detail"]
    psij.cancel(value["job_id"])
    wait_until(lambda: submit_child(psij, sleeper, "none")[0] == 200, 20)


def test_an_edge_is_not_told_as_a_job_that_could_be_submitted_without_its_tunnel(psij, sleeper):
    job_id = submit_child(psij, sleeper, "none")[1]["job_id"]
    for _ in range(2):
        status, answer = psij.get(f"job_spec/{psij.sid}/{job_id}")
        assert status == 409 and "submit_tunneled" in answer["detail"]
        psij.restart()


def test_the_same_submission_sent_again_starts_no_second_child(psij, sleeper):
    body = {"job_spec": sleeper, "tunnel": False}
    session = psij.host._hosted["psij"].plugin._sessions[psij.sid].session
    hosted = psij.host._hosted["psij"]

    def submit():
        return hosted.thread.submit(session.submit_tunneled(
            body["job_spec"], "local", body["tunnel"], key="k1")).result(20)

    first = submit()
    assert submit() == first
    assert len(psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]) == 1
    psij.cancel(first["job_id"])
    wait_until(lambda: psij.host._hosted["psij"].plugin.tunnels._records["c1"].ended, 20)
    before = tunnel_of(psij)
    assert submit() == first and tunnel_of(psij) == before       # also long after


def test_a_client_that_went_away_leaves_a_child_that_is_watched(psij, sleeper, monkeypatch):
    hosted = psij.host._hosted["psij"]
    session = hosted.plugin._sessions[psij.sid].session
    submit = session._submit

    async def slow(*arguments):
        answer = await submit(*arguments)
        entered.set()
        await asyncio.sleep(600)
        return answer

    entered = threading.Event()
    monkeypatch.setattr(session, "_submit", slow)
    future = hosted.thread.submit(session.submit_tunneled(sleeper, "local", "forward"))
    assert entered.wait(20)
    future.cancel()
    (job,) = psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]
    assert submit_child(psij, sleeper, "forward")[0] == 409
    psij.cancel(job["job_id"])
    wait_until(lambda: tunnel_of(psij)["status"] == "done", 20)


def test_a_tunnel_that_ssh_cannot_open_is_failed_with_sshs_words(psij, sleeper, tmp_path,
                                                                 monkeypatch):
    monkeypatch.setattr(plugins, "SSH_BACKOFF_S", (0.05, 0.1))
    program = tmp_path / "bin" / "ssh"            # the stand-in of a node without an sshd
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor i; do [ "$last" = -E ] && log=$i; last=$i; done\n'
                       'echo "ssh: connect to host n1 port 22: Connection refused" >"$log"\n'
                       'exit 255\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    job_id = submit_child(psij, sleeper, True)[1]["job_id"]
    found = wait_until(lambda: tunnel_of(psij)["status"] == "failed" and tunnel_of(psij), 20)
    assert "Connection refused" in found["error"] and found["port"] is None
    psij.cancel(job_id)
    wait_until(lambda: tunnel_of(psij)["status"] == "done", 20)


def test_a_child_that_ends_before_its_tunnel_is_up_says_how(psij, tmp_path, monkeypatch):
    spec = {"executable": "/bin/sh", "arguments": ["-c", "exit 3", "-n", "c1"]}
    assert submit_child(psij, spec, "forward")[0] == 200
    found = wait_until(lambda: tunnel_of(psij)["status"] == "failed" and tunnel_of(psij), 20)
    assert "FAILED, exit code 3" in found["error"]
    wait_until(lambda: [item for item in psij.said if item.get("status") == "failed"])


# ---------------------------------------------------------------------------
# The relay
# ---------------------------------------------------------------------------

@pytest.fixture
def relay(home):
    """A relay in this process to a listener in place of the bridge: (relay, port, listener)."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.3)
    url = radical_edge.parse_bridge_url(f"http://127.0.0.1:{listener.getsockname()[1]}")
    made = plugins.Relay(Uplink([str(url)]))
    port, hosts = asyncio.run(made.open("c1", url, "5e" * 32, ["127.0.0.1"]))
    assert hosts == ["127.0.0.1"]
    yield made, port, listener
    made.stop()
    listener.close()


def answer(port, secret):
    """Connect to a relay and answer its challenge with a secret; return the socket."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    nonce = radical_edge._recv_exactly(sock, radical_edge.RELAY_NONCE)
    sock.sendall(radical_edge.answer_relay(secret, nonce))
    return sock


def test_a_relay_moves_bytes_both_ways_for_who_knows_the_secret(relay):
    _, port, listener = relay
    sock = answer(port, "5e" * 32)
    theirs, _ = listener.accept()
    assert sock.recv(1) == b"+"
    data = os.urandom(3_000_000)
    sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
    sender.start()
    theirs.settimeout(10)
    assert b"".join(iter(lambda: theirs.recv(65536), b"")) == data
    sender.join()
    theirs.sendall(b"bye")                        # after the other direction has ended
    theirs.close()
    assert sock.recv(10) == b"bye" and sock.recv(1) == b""
    sock.close()


def test_a_relay_does_not_even_dial_for_a_stranger(relay):
    _, port, listener = relay
    for secret in ("5f" * 32, ""):
        sock = answer(port, secret)
        with pytest.raises((EdgeError, OSError)):
            radical_edge._recv_exactly(sock, 1)
        sock.close()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 32)
        assert len(radical_edge._recv_exactly(sock, 32)) == 32
        try:
            assert sock.recv(100) == b""
        except ConnectionError:
            pass
    with pytest.raises(socket.timeout):
        listener.accept()


def test_an_answer_that_was_overheard_is_of_no_use(relay):
    _, port, _ = relay
    one = socket.create_connection(("127.0.0.1", port), timeout=10)
    heard = radical_edge.answer_relay("5e" * 32, radical_edge._recv_exactly(one, 32))
    one.close()
    two = socket.create_connection(("127.0.0.1", port), timeout=10)
    radical_edge._recv_exactly(two, 32)
    two.sendall(heard)
    with pytest.raises((EdgeError, OSError)):
        radical_edge._recv_exactly(two, 1)
    two.close()


def test_strangers_that_say_nothing_keep_nobody_out(relay, monkeypatch):
    _, port, listener = relay
    monkeypatch.setattr(plugins, "ADMISSION_S", 0.5)
    monkeypatch.setattr(plugins, "MAX_STRANGERS", 4)
    silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(12)]

    def try_in():
        try:
            sock = answer(port, "5e" * 32)
            good = sock.recv(1) == b"+"
            sock.close()
            return good
        except (EdgeError, OSError):
            return False

    assert wait_until(try_in, 20)
    for sock in silent:
        sock.close()


def test_a_child_is_told_when_its_parent_cannot_reach_the_bridge(relay):
    _, port, listener = relay
    listener.close()
    sock = answer(port, "5e" * 32)
    assert sock.recv(10) == b"-"
    sock.close()


# ---------------------------------------------------------------------------
# Children for real, on this machine: bridge with TLS, parent and child are processes
# ---------------------------------------------------------------------------

class Site:
    """A bridge with TLS and a parent edge, and children that the tests start there."""

    def __init__(self, start, certificate):
        self._start = start
        cert, key, self.pin = certificate
        self.bridge = start("--bridge", "--port", "0", "--cert", cert, "--key", key,
                            expect="bridge: cert")
        self.url = next(line for line in self.bridge.lines if line.startswith("bridge: https")
                        ).split()[1]
        self.parent = None
        self.start_parent()
        self.client = radical_edge.BridgeClient(self.url, cert=self.pin)
        self.psij = self.client.get_edge_client("parent").get_plugin("psij")

    def start_parent(self):
        self.parent = self._start("--edge", "--name", "parent", "-p", "psij", "--url", self.url,
                                  "--cert", self.pin, expect="registered as parent")

    def kill_parent(self):
        self.parent.process.kill()
        self.parent.process.wait()

    def start_child(self, mode, name="child", **spec):
        spec.setdefault("arguments", ["-n", name, "-p", "sysinfo", "--heartbeat", "2"])
        return self.psij.submit_tunneled(spec, "local", mode)["job_id"]

    def status(self, name="child"):
        return self.psij.tunnel_status(name)

    def wait_status(self, status, name="child"):
        last = {}

        def is_there():
            last.update(self.status(name))
            return last["status"] == status and dict(last)

        return wait_until(is_there, 60, f"{status}; it is {last}")

    def is_online(self, name="child"):
        return name in radical_edge.list_edges(url=self.url, cert=self.pin)

    def wait_online(self, name="child"):
        wait_until(lambda: self.is_online(name), 60, f"{name} at the bridge")

    def ask_child(self, name="child"):
        return radical_edge.call(name, "sysinfo", "homedir", url=self.url, cert=self.pin)

    def end(self):
        for job in self.psij.list_jobs()["jobs"]:
            if job["state"] not in plugins.FINAL_STATES:
                self.psij.cancel_job(job["job_id"])
        self.client.close()


@pytest.fixture
def site(start, certificate, home):
    made = Site(start, certificate)
    yield made
    made.end()


def find_processes(word):
    """Return the pids of processes of which the command line has this word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def all_files(home, mode):
    folder = home / ".radical/edge/tunnels"
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == mode, path
    return sorted(path.name for path in folder.iterdir())


def check_child_is_gone(site, job_id, home):
    site.psij.cancel_job(job_id)
    wait_until(lambda: not site.is_online(), 30, "the child's end")
    assert site.wait_status("done")["port"] is None
    assert all_files(home, 0o600) == []


def use_relay_on_loopback(site):
    """Return the arguments with which the relay listens on this machine alone."""
    return ["-n", "child", "-p", "sysinfo", "--heartbeat", "2", "--tunnel-via", "127.0.0.1"]


def test_a_child_comes_up_through_a_relay_with_a_token_for_itself_alone(site, home):
    job_id = site.start_child("relay", arguments=use_relay_on_loopback(site))
    site.wait_online()
    assert site.ask_child() == {"homedir": str(home)}
    status = site.wait_status("active")
    assert status["port"] and status["mode"] == "relay"
    assert all_files(home, 0o600) == ["child.port", "child.token"]
    token = (home / ".radical/edge/tunnels/child.token").read_text().strip()
    own = (home / ".radical/edge/token").read_text().strip()
    assert own not in token
    with pytest.raises(radical_edge.Forbidden):
        radical_edge.list_edges(url=site.url, cert=site.pin, token=token)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert token not in line and own not in line
    check_child_is_gone(site, job_id, home)


def test_a_relayed_child_verifies_the_bridge_itself(site, home):
    arguments = [*use_relay_on_loopback(site), "--cert", "sha256:" + "0" * 64]
    job_id = site.start_child("relay", arguments=arguments)
    wait_until(lambda: "not the pinned one" in site.psij.get_job_status(job_id)["stderr"], 60)
    assert not site.is_online()


def test_a_relay_goes_on_after_the_parent_was_killed(site, home):
    job_id = site.start_child("relay", arguments=use_relay_on_loopback(site))
    site.wait_online()
    site.wait_status("active")
    site.kill_parent()
    wait_until(lambda: not site.is_online(), 60, "the loss of the link")
    site.start_parent()
    site.wait_online()
    assert site.ask_child() == {"homedir": str(home)}
    assert site.wait_status("active")["job_id"] == job_id
    check_child_is_gone(site, job_id, home)


def test_a_child_without_a_tunnel_dials_the_bridge_itself(site, home):
    job_id = site.start_child("none")
    site.wait_online()
    assert site.ask_child() == {"homedir": str(home)}
    assert site.status()["status"] == "no_tunnel"
    site.psij.cancel_job(job_id)
    wait_until(lambda: all_files(home, 0o600) == [], 30)


@pytest.fixture
def sshd(tmp_path, monkeypatch):
    """A real sshd that stands for login and compute node alike."""
    needs("sshd", find_sshd() and shutil.which("ssh"), "openssh-server (tests/setup-tunnels.sh)")
    running = Sshd(tmp_path / "ssh")
    bin_dir = make_ssh(tmp_path / "ssh", {"localhost login1": running})
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    yield running
    running.stop()


def test_a_child_comes_up_through_a_reverse_tunnel_and_recovers_from_a_killed_ssh(
        sshd, site, home):
    job_id = site.start_child(True)
    site.wait_online()
    assert site.ask_child() == {"homedir": str(home)}
    status = site.wait_status("active")
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(lambda: site.status()["pid"] not in (None, status["pid"]), 60, "another ssh")
    site.wait_status("active")
    wait_until(lambda: try_ask(site), 60, "an answer through the new tunnel")
    pid = site.status()["pid"]
    check_child_is_gone(site, job_id, home)
    wait_until(lambda: not plugins.is_same_process(pid, plugins.process_started(pid)), 20)


def try_ask(site):
    try:
        return site.ask_child()
    except EdgeError:
        return None


def test_a_reverse_tunnel_outlives_a_killed_parent_and_is_taken_over(sshd, site, home):
    job_id = site.start_child("reverse")
    site.wait_online()
    before = site.wait_status("active")
    site.kill_parent()
    assert site.ask_child() == {"homedir": str(home)}            # ssh goes on by itself
    site.start_parent()
    after = site.wait_status("active")
    assert (after["pid"], after["port"]) == (before["pid"], before["port"])
    assert site.ask_child() == {"homedir": str(home)}
    check_child_is_gone(site, job_id, home)
    assert find_processes(str(home / ".radical/edge/state/parent/psij/tunnels/child.ssh")) == []


def test_a_job_that_ended_while_the_parent_was_away_takes_its_ssh_with_it(sshd, site, home):
    site.start_child("reverse")
    site.wait_online()
    pid = site.wait_status("active")["pid"]
    site.kill_parent()
    radical_edge._urlopen([radical_edge.find_bridge(site.url, cert=site.pin)], "POST",
                          "/edge/disconnect/child")
    wait_until(lambda: not site.is_online(), 30)
    site.start_parent()
    site.wait_status("done")
    assert not plugins.is_same_process(pid, plugins.process_started(pid))
    assert all_files(home, 0o600) == []


def test_an_unknown_host_key_is_not_trusted(sshd, site, home, tmp_path):
    (tmp_path / "ssh/known_hosts").write_text("")
    job_id = site.start_child("reverse")
    found = wait_until(lambda: "Host key verification failed" in (site.status()["error"] or ""), 60)
    assert found and not site.is_online()
    site.psij.cancel_job(job_id)


def test_a_child_opens_a_forward_tunnel_itself_and_recovers_from_a_killed_ssh(sshd, site, home):
    job_id = site.start_child("forward", arguments=[
        "-n", "child", "-p", "sysinfo", "--heartbeat", "2", "--tunnel-via", "login1"])
    site.wait_online()
    assert site.ask_child() == {"homedir": str(home)}
    site.wait_status("active")
    pid = find_forward("login1")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: find_forward("login1") not in (None, pid), 60, "another ssh")
    wait_until(lambda: try_ask(site), 60, "an answer through the new tunnel")
    check_child_is_gone(site, job_id, home)
    wait_until(lambda: find_forward("login1") is None, 20, "the end of ssh")


def find_forward(via):
    """Return the pid of the `ssh -L` to a host; None without one."""
    for pid in find_processes(via):
        try:
            if b"\0-L\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    return None


def test_the_login_node_of_a_forward_tunnel_comes_from_the_batch_system(monkeypatch, home):
    with pytest.raises(ValueError, match="--tunnel-via"):
        radical_edge.Tunnel("forward", "c1", None, threading.Event())
    for name in ("SLURM_SUBMIT_HOST", "PBS_O_HOST"):
        monkeypatch.setenv(name, "login7")
        assert radical_edge.Tunnel("forward", "c1", None, threading.Event())._via == "login7"
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="--tunnel-via"):
        radical_edge.Tunnel("forward", "c1", "-oProxyCommand=x", threading.Event())


def test_a_child_that_waits_for_its_tunnel_ends_when_it_is_told_to(start, home, certificate):
    begin = time.monotonic()
    child = start("--edge", "-n", "child", "-p", "sysinfo", "--url", TLS_URL, "--log-level",
                  "DEBUG", "--tunnel", expect="CONNECTING after dial")
    assert child.end(signal.SIGTERM)[0] == 0
    assert time.monotonic() - begin < 30          # it does not wait until the end of its patience
