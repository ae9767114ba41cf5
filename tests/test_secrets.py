"""No secret anywhere: everything is run once, at the most talkative, and then all that it left is
searched: logs, command lines, environments of children, errors, events, metrics, files.

    $ python -m pytest tests/test_secrets.py
"""
from __future__ import annotations

import base64
import http.client
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import radical_edge
from test_edge import SCRIPT, bridge_url, certificate, run, start, wait_until            # noqa: F401

# the files that secrets are for, by name
KEPT = {"token", "client.key", "keys", "key.pem"}


def descendants(pid):
    """Return the processes that come from `pid`, itself first."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found = [pid]
    for item in found:
        found += [child for child, parent in parents.items() if parent == item]
    return found


def session_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3]
    except (OSError, IndexError):
        return None


class Search:
    """What must be found nowhere: {name: secret}, in any of its spellings."""

    def __init__(self, secrets):
        self.spellings = {}
        for name, secret in secrets.items():
            raw = secret.encode()
            for spelling in (raw, base64.b64encode(raw).rstrip(b"="), raw.hex().encode(),
                             base64.b64encode(b"user:" + raw).rstrip(b"=")):
                self.spellings[spelling] = name

    def check(self, where, data):
        if isinstance(data, str):
            data = data.encode(errors="replace")
        for spelling, name in self.spellings.items():
            assert spelling not in data, f"{name} is in {where}"


def look_at_processes(search, pids, roots):
    """Search the command line of each process, and the environment of all but the roots."""
    for pid in pids:
        for name in ("cmdline",) if pid in roots else ("cmdline", "environ"):
            try:
                search.check(f"/proc/{pid}/{name}", Path(f"/proc/{pid}/{name}").read_bytes())
            except OSError:
                continue                          # it has ended


def test_no_secret_is_left_anywhere(home, certificate, start, tmp_path, monkeypatch):    # noqa: F811
    cert, key, pin = certificate
    folder = home / ".radical/edge"
    bridge = start("--bridge", "--port", "0", "--cert", cert, "--key", key, "--log-level", "DEBUG",
                   expect="bridge: certificate")
    url = bridge_url(bridge)
    admin = (folder / "token").read_text().strip()
    site = run("--token", "add", "site", "--scope", "edge").strip()
    client = run("--token", "add", "alice", "--scope", "client").strip()
    run("--token", "keygen", "alice")
    signing = (folder / "client.key").read_text().split()[1]
    radical_edge.write_private(folder / "keys", (folder / "client.key").read_text())
    private = "".join(Path(key).read_text().splitlines()[1:-1])[:64]
    search = Search({"the admin's token": admin, "the edge's token": site, "the client's token": client,
                     "the signing key": signing, "the private key": private})
    for found in (f"x{admin}y", base64.b64encode(b"user:" + site.encode()).decode()):
        with pytest.raises(AssertionError):       # the search finds what there is
            search.check("a probe", found)
    shown = [("the doctor", run("--check", "--url", url, "--cert", pin))]

    time.sleep(1.1)                               # the bridge has seen the tokens
    edge = start("--edge", "--url", url, "--cert", pin, "--name", "e1", "--log-level", "DEBUG",
                 "--client-key", str(folder / "keys"), expect="edge: e1",
                 env={"RADICAL_BRIDGE_TOKEN": site})
    wait_until(lambda: "e1:" in run("--list"), 30)
    monkeypatch.setenv("RADICAL_CLIENT_KEY", str(folder / "client.key"))
    seen, stop = [], threading.Event()
    listener = threading.Thread(target=listen, args=(url, pin, client, seen, stop))
    listener.start()
    wait_until(lambda: seen)
    try:
        job_output = use_everything(url, pin, client, tmp_path, search,
                                    [bridge.process.pid, edge.process.pid])
        errors = provoke_errors(url, cert, client, site)
        shown += [("a job's output", job_output), ("the answers to mistakes", errors)]
        shown.append(("metrics", ask(url, cert, "GET", "/metrics", admin)))
        shown.append(("the description", ask(url, cert, "GET", "/openapi.json", admin)))
        shown.append(("the topology", ask(url, cert, "POST", "/edge/list", admin)))
    finally:
        stop.set()
        run("--call", "e1/psij/register_session", "{}")          # wakes the listener
    for process in (edge, bridge):
        process.end()
    listener.join(20)
    shown += [("events", json.dumps(seen)), *(("logs", "\n".join(process.lines + process.errors))
                                             for process in (bridge, edge))]
    cookie = re.search(r"radical_edge_[0-9]+=([^;]{40,});", errors)[1]
    for where, text in shown:
        assert text, where
        search.check(where, text)
        assert where != "logs" or cookie not in text
    look_at_files(search, home, tmp_path)


def listen(url, pin, token, seen, stop):
    for event in radical_edge.events(url=url, cert=pin, token=token):
        seen.append(event)
        if stop.is_set():
            return


def ask(url, cert, method, path, token, headers=(), body=None):
    """Return head and body of an answer as text."""
    import ssl
    context = ssl.create_default_context(cafile=cert)
    context.check_hostname = False
    connection = http.client.HTTPSConnection(url.partition("//")[2], context=context, timeout=20)
    fields = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, body, {**fields, **dict(headers)})
    reply = connection.getresponse()
    text = f"{reply.status} {reply.getheaders()}\n{reply.read().decode(errors='replace')}"
    connection.close()
    return text


def use_everything(url, pin, token, tmp_path, search, roots):
    """Run jobs, tasks and transfers; look at all processes meanwhile. Return what a job saw."""
    with radical_edge.BridgeClient(url, cert=pin, token=token) as client:
        edge = client.get_edge_client("e1")
        psij = edge.get_plugin("psij")
        job = psij.submit_job({"executable": "sh", "arguments": [
            "-c", "env; tr '\\0' '\\n' < /proc/self/environ; sleep 2"]})
        pids = [pid for root in roots for pid in descendants(root)]
        sessions = {session_of(pid) for pid in pids}
        others = [int(path.name) for path in Path("/proc").glob("[0-9]*")
                  if session_of(int(path.name)) in sessions]
        look_at_processes(search, {*pids, *others, *find_jobs(job["job_id"])}, {*roots, os.getpid()})
        status = psij.wait_job(job["job_id"], timeout=60)
        edge.get_plugin("sysinfo").get_metrics()
        staging = edge.get_plugin("staging")
        (tmp_path / "file").write_bytes(b"x" * 100_000)
        staging.put(str(tmp_path / "file"), str(tmp_path / "copy"))
        staging.get(str(tmp_path / "copy"), str(tmp_path / "back"))
        tasks = edge.get_plugin("rhapsody")
        made = tasks.submit_tasks([{"executable": "env"}])
        done = tasks.wait_tasks([made[0]["uid"]])
        look_at_processes(search, {pid for root in roots for pid in descendants(root)}, set(roots))
        return status["stdout"] + json.dumps(done) + json.dumps(status)


def find_jobs(job_id):
    """Return the processes that have the job's id in their command line: supervisors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if job_id.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def provoke_errors(url, cert, token, site):
    """Make mistakes with secrets in all the wrong places; return the answers."""
    basic = base64.b64encode(f"user:{token}".encode()).decode()
    return "".join([
        ask(url, cert, "GET", "/edges", token + "x"), ask(url, cert, "GET", "/edges", site),
        ask(url, cert, "GET", "/e1/nosuch/route", token), ask(url, cert, "POST", "/e1/psij/submit/x", token),
        ask(url, cert, "GET", "/edges", None, {"Authorization": f"Basic {basic}"}),
        ask(url, cert, "GET", "/e1/sysinfo/homedir", token, {"Cookie": f"a={token}"}),
        ask(url, cert, "GET", f"/edges?token={token}", None),
        ask(url, cert, "GET", "/edges", None, {"X-Token": token}),
        ask(url, cert, "POST", "/auth", None, body=json.dumps({"token": "wrong"})),
        ask(url, cert, "POST", "/auth", None, body=json.dumps({"token": token})),
        ask(url, cert, "POST", "/bridge/terminate", token),
        subprocess.run([sys.executable, SCRIPT, "--list", "--url",
                        f"https://user:{token}@127.0.0.1:1/"], capture_output=True, text=True).stderr,
        subprocess.run([sys.executable, SCRIPT, "--call", "e1/psij/none", "--url", url, "--cert",
                        "sha256:" + "0" * 64], capture_output=True, text=True).stderr])


def look_at_files(search, home, tmp_path):
    """Search every file for secrets, but those that are for them; none of ours may be others' to read."""
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            path = Path(folder) / name
            if path.is_symlink() or not path.is_file():
                continue
            if name not in KEPT:
                search.check(str(path), path.read_bytes())
            if (home / ".radical") in path.parents:
                mode = stat.S_IMODE(path.stat().st_mode)
                assert not mode & 0o077 or _is_closed(path, home), f"{path} has mode {mode:04o}"


def _is_closed(path, home):
    """Whether a directory on the way to a file keeps others out."""
    return any(not stat.S_IMODE(parent.stat().st_mode) & 0o077 for parent in path.parents
               if home / ".radical" in (parent, *parent.parents))


def test_the_environment_of_a_job_is_told_to_who_may_and_left_nowhere_else(home, start):  # noqa: F811
    both = start("--bridge", "--edge", "--port", "0", "--name", "e1", "-p", "psij", "--log-level",
                 "DEBUG", expect="registered as e1")
    secret, seen = "s3cret-" * 5, []
    search = Search({"what the environment has": secret})
    with radical_edge.BridgeClient(bridge_url(both)) as client:
        client.register_callback(callback=lambda *event: seen.append(event))
        psij = client.get_edge_client("e1").get_plugin("psij")
        job = psij.submit_job({"executable": "/bin/true", "environment": {"KEY": secret}})["job_id"]
        status = psij.wait_job(job, timeout=60)
        again = psij.submit_job(**psij.get_job_spec(job))["job_id"]
        assert psij.get_job_spec(again)["job_spec"]["environment"] == {"KEY": secret}
        wait_until(lambda: [event[3]["state"] for event in seen].count("COMPLETED") == 2)
        shown = [("the status", json.dumps([status, psij.list_jobs()])),
                 *((path, client.http.get(path).text) for path in ("/metrics", "/openapi.json"))]
    both.end()
    shown += [("events", json.dumps(seen)), ("logs", "\n".join(both.lines + both.errors))]
    for where, text in shown:
        search.check(where, text)
    files = [path for path in (home / ".radical").rglob("*") if path.is_file()]
    kept = [path for path in files if path.name == "job.json"]   # what the jobs are started with
    assert len(kept) == 2 and all(secret.encode() in path.read_bytes() for path in kept)
    for path in files:
        if path not in kept:
            search.check(str(path), path.read_bytes())
