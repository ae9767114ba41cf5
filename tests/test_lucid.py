"""Tests of the plugin lucid. The fast ones run a small `radical.pilot` of their own, written below,
which fails when told to; the others a real local pilot, where RADICAL-Pilot is installed.

    $ tests/setup-lucid.sh                      # .venv-lucid, with radical.pilot
    $ python -m pytest tests/test_lucid.py      # RADICAL_EDGE_REQUIRE=lucid: do not skip
"""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import plugins
from radical_edge import (BridgeClient, Conflict, DeadlineExceeded, Edge, EdgeError, NotFound,
                          NotInstalled, TooManyRequests, Unavailable, Unprocessable)
from test_edge import SCRIPT, needs, wait_until

REAL_PYTHON = Path(__file__).resolve().parent.parent / ".venv-lucid/bin/python"

FAKE_PILOT = '''
import os, signal, subprocess, threading, time

DONE, FAILED, CANCELED = "DONE", "FAILED", "CANCELED"
FINAL = [DONE, FAILED, CANCELED]
trouble = os.environ.get("FAKE_TROUBLE", "")
if trouble == "import":
    raise ImportError("no netifaces here")

class Session:
    uid = "rp.session.0"
    def __init__(self):
        if trouble == "session":
            raise RuntimeError("no room for a session")
        while os.path.exists(os.environ.get("FAKE_HOLD", "/nowhere")):
            time.sleep(0.01)
        subprocess.Popen(["sleep", "1000"], start_new_session=True)    # as its bridges do
    def close(self, **options):
        pass

class Description(dict):
    def __init__(self, given):
        if "nosuch" in given:
            raise KeyError("nosuch")
        super().__init__(given)

PilotDescription = TaskDescription = Description

class Entity:
    def __init__(self, manager, description):
        self.uid, self.state, self.description = description["uid"], "NEW", description
        self.manager = manager
    def advance(self, state):
        self.state = state
        self.manager.callback(self, state)
    def as_dict(self):
        return {"uid": self.uid, "state": self.state, "exit_code": 0, "stdout": "out",
                "odd": {1, 2}, "nan": float("nan"), "description": self.description}

class Manager:
    def __init__(self, session):
        self.entities, self.callback = {}, None
    def register_callback(self, callback):
        self.callback = callback
    def add(self, description):
        entity = self.entities[description["uid"]] = Entity(self, description)
        entity.advance("SCHEDULING")
        return entity
    def cancel(self, uid):
        if self.entities[uid].state not in FINAL:
            self.entities[uid].advance(CANCELED)
    add_pilots = lambda self, pilots: None

class PilotManager(Manager):
    def submit_pilots(self, description):
        assert description["exit_on_error"] is False
        pilot = self.add(description)
        pilot.advance(FAILED if description["resource"] == "fail" else "PMGR_ACTIVE")
        return pilot
    cancel_pilots = Manager.cancel

class TaskManager(Manager):
    def submit_tasks(self, description):
        what = description["executable"]
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stall":
            time.sleep(1000)
        task = self.add(description)
        task.advance("AGENT_EXECUTING")
        if what == "true":
            threading.Timer(0.05, task.advance, (DONE,)).start()
        if what == "false":
            task.advance(FAILED)
    cancel_tasks = Manager.cancel
'''


def processes(home):
    """Return the ids of the processes that have this HOME, or one below it; not our own."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if f"HOME={home}".encode() in (path / "environ").read_bytes() and state != "Z":
                found.append(int(path.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The small radical.pilot, for children of this process; what goes wrong goes into the log."""
    package = tmp_path / "site/radical"
    package.mkdir(parents=True)
    (package / "pilot.py").write_text(FAKE_PILOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return monkeypatch


@contextlib.contextmanager
def running_edge(bridge, token):
    edge = Edge(bridge.url, "site", plugins=["lucid"], token=token).start()
    try:
        assert edge.online.wait(10)
        wait_until(lambda: "site" in bridge._registry.links)
        yield edge
    finally:
        assert edge.stop()


@pytest.fixture
def client(bridge, tokens):
    with BridgeClient(bridge.url, token=tokens[1]["client"]) as made:
        yield made


@pytest.fixture
def lucid(fake, bridge, tokens, client, home):
    """A function that returns a client of lucid with a session; an edge in this process."""
    with running_edge(bridge, tokens[1]["edge"]):
        yield lambda: client.get_edge_client("site").get_plugin("lucid")
    wait_until(lambda: not processes(home), what="the end of all processes")


def collect(lucid):
    """Return a list that fills with (topic, data) of the plugin's notifications."""
    told = []
    lucid.register_notification_callback(lambda edge, plugin, topic, data:
                                         told.append((topic, data)))
    return told


def states(told, key, uid):
    return [data["state"] for topic, data in told if data.get(key) == uid]


# ---------------------------------------------------------------------------
# With the small one: what goes wrong, and that it is told
# ---------------------------------------------------------------------------

def test_tasks_run_and_their_states_are_told(lucid):
    session = lucid()
    told = collect(session)
    pid = session.pilot_submit({"resource": "local.localhost", "exit_on_error": True})["pid"]
    tids = [session.task_submit({"executable": "true"})["tid"] for _ in range(10)]
    for tid in tids:
        task = session.task_wait(tid, 20)["task"]
        assert (task["uid"], task["state"], task["stdout"]) == (tid, "DONE", "out")
        assert task["nan"] is None and task["odd"] == "{1, 2}"
        assert task["description"]["environment"]["HOME"] == os.environ["HOME"]
    assert [task["state"] for task in session.list()["tasks"]] == ["DONE"] * 10
    assert session.get_pilot(pid)["pilot"]["state"] == "PMGR_ACTIVE"
    wait_until(lambda: all(states(told, "tid", tid) == ["AGENT_EXECUTING", "DONE"]
                           for tid in tids), what=f"all states in {told}")
    assert states(told, "pid", pid) == ["SCHEDULING", "PMGR_ACTIVE"]
    session.close()


def test_a_failed_task_is_failed(lucid):
    session = lucid()
    tid = session.task_submit({"executable": "false", "uid": "mine"})["tid"]
    assert tid == "mine"
    assert session.task_wait(tid)["task"]["state"] == "FAILED"
    with pytest.raises(Conflict, match="mine"):
        session.task_submit({"executable": "true", "uid": "mine"})
    session.close()


@pytest.mark.parametrize("description, error, reason", [
    (None, Unprocessable, "description: must be an object"), ([], Unprocessable, "description"),
    ({"executable": "true", "nosuch": 1}, Unprocessable, "refuses it.*nosuch"),
    ({"executable": "true", "uid": "../x"}, Unprocessable, "description.uid"),
    ({"executable": "true", "uid": 3}, Unprocessable, "description.uid"),
    ({"executable": "true", "environment": []}, Unprocessable, "description.environment"),
    ({"executable": "x" * (1 << 20)}, Unprocessable, "bytes")])
def test_a_bad_description_is_refused_by_name_and_leaves_nothing(lucid, description, error, reason):
    session = lucid()
    session.wait_ready()
    with pytest.raises(error, match=reason):
        session.task_submit(description)
    assert session.list()["tasks"] == []
    session.close()


def test_waiting_honours_its_timeout_and_many_waiters_starve_nobody(lucid):
    session = lucid()
    tid = session.task_submit({"executable": "wait"})["tid"]
    with pytest.raises(DeadlineExceeded, match="AGENT_EXECUTING"):
        session.task_wait(tid, 0.1)
    for bad in ("x", "-1", "nan", ""):
        with pytest.raises(Unprocessable, match="timeout"):
            session._get(f"task_wait/{session.sid}/{tid}", timeout=bad)
    found = []
    waiters = [threading.Thread(target=lambda: found.append(session.task_wait(tid, 60)))
               for _ in range(100)]
    for waiter in waiters:
        waiter.start()
    other = session.task_submit({"executable": "true"})["tid"]
    assert session.task_wait(other, 30)["task"]["state"] == "DONE"
    assert session.task_cancel(tid) == {"tid": tid, "status": "canceled"}
    for waiter in waiters:
        waiter.join(30)
    assert [answer["task"]["state"] for answer in found] == ["CANCELED"] * 100
    with pytest.raises(Conflict, match="ended already: it is CANCELED"):
        session.task_cancel(tid)
    with pytest.raises(NotFound, match="nothing"):
        session.task_cancel("nothing")
    session.close()


def test_a_session_that_starts_says_so_and_others_go_on(lucid, fake, tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    fake.setenv("FAKE_HOLD", str(hold))
    session = lucid()
    assert session.get_status()["status"] == "starting"
    with pytest.raises(Conflict, match="still starting"):
        session._post(f"task_submit/{session.sid}", {"description": {"executable": "true"}})
    hold.unlink()
    session.wait_ready(30)
    assert session.task_wait(session.task_submit({"executable": "true"})["tid"])
    session.close()


@pytest.mark.parametrize("trouble, error, reason", [
    ("import", NotInstalled, "no netifaces here.*pip install radical.pilot"),
    ("session", Unavailable, "no room for a session")])
def test_a_child_that_cannot_start_is_reported_with_the_reason(lucid, fake, trouble, error, reason):
    fake.setenv("FAKE_TROUBLE", trouble)
    session = lucid()
    told = collect(session)
    status = wait_until(lambda: session.get_status()["status"] != "starting" and
                        session.get_status())
    assert status["status"] == "failed"
    with pytest.raises(error, match=reason):
        session._post(f"pilot_submit/{session.sid}", {"description": {"resource": "x"}})
    with pytest.raises(Unavailable, match="failed"):
        session.wait_ready()
    assert all(data["status"] == "failed" for _, data in told)
    session.close()


def test_a_child_that_is_slow_to_start_is_given_up(lucid, fake, tmp_path):
    (tmp_path / "hold").touch()
    fake.setenv("FAKE_HOLD", str(tmp_path / "hold"))
    fake.setattr(plugins, "CHILD_START_S", 0.5)
    session = lucid()
    wait_until(lambda: session.get_status()["status"] == "failed")
    assert "took more than" in session.get_status()["error"]


@pytest.mark.parametrize("victim", ["child", "supervisor"])
def test_a_killed_child_is_reported_and_the_edge_lives(lucid, home, victim):
    session = lucid()
    told = collect(session)
    pid = session.pilot_submit({"resource": "local.localhost"})["pid"]
    done = session.task_submit({"executable": "true"})["tid"]
    session.task_wait(done)
    live = session.task_submit({"executable": "wait"})["tid"]
    child = session.get_status()["pid"]
    if victim == "supervisor":
        child = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(child, signal.SIGKILL)
    task = session.task_wait(live, 30)["task"]
    assert (task["state"], task["reason"]) == ("LOST", "child_died")
    assert session.get_task(done)["task"]["state"] == "DONE"
    wait_until(lambda: states(told, "tid", live)[-1:] == states(told, "pid", pid)[-1:] == ["LOST"])
    assert ("session_status", "ended") in [(topic, data.get("status")) for topic, data in told]
    with pytest.raises(Conflict, match="register a new session"):
        session._post(f"task_submit/{session.sid}", {"description": {"executable": "true"}})
    if victim == "child":                         # without its supervisor, RP's heartbeat ends them
        wait_until(lambda: not processes(home))
    again = lucid()
    assert again.task_wait(again.task_submit({"executable": "true"})["tid"])
    for orphan in processes(home) if victim == "supervisor" else ():
        os.kill(orphan, signal.SIGKILL)


def test_a_child_that_dies_while_it_submits_is_no_silent_loss(lucid):
    session = lucid()
    session.wait_ready()
    with pytest.raises(Unavailable, match="has ended"):
        session.task_submit({"executable": "die", "uid": "t"})
    assert session.get_task("t")["task"]["state"] == "LOST"


def test_a_child_that_does_not_answer_is_ended(lucid, fake):
    fake.setattr(plugins, "CHILD_CALL_S", 0.5)
    fake.setattr(plugins.PilotChild.call, "__defaults__", (0.5,))
    session = lucid()
    session.wait_ready()
    with pytest.raises(Unavailable, match="did not answer"):
        session.task_submit({"executable": "stall"})
    wait_until(lambda: session.get_status()["status"] == "ended")


def test_a_failed_pilot_is_reported_and_takes_its_tasks_with_it(lucid, fake):
    fake.setattr(plugins, "PILOT_END_S", 0.3)
    session = lucid()
    tid = session.task_submit({"executable": "wait"})["tid"]
    pid = session.pilot_submit({"resource": "fail"})["pid"]
    assert session.task_wait(tid, 20)["task"]["reason"] == "pilot_ended"
    assert session.get_pilot(pid)["pilot"]["state"] == "FAILED"
    with pytest.raises(Conflict, match="all pilots of the session have ended"):
        session.task_submit({"executable": "true"})
    live = session.pilot_submit({"resource": "local.localhost"})["pid"]
    assert session.task_wait(session.task_submit({"executable": "true"})["tid"])
    assert session.pilot_cancel(live)["status"] == "canceled"
    with pytest.raises(Conflict):
        session.pilot_cancel(live)


def test_too_many_sessions_and_too_many_tasks_are_refused(lucid, fake):
    fake.setattr(plugins, "MAX_CHILDREN", 1)
    fake.setattr(plugins, "MAX_ENTRIES", 2)
    session = lucid()
    with pytest.raises(TooManyRequests, match="unregister one"):
        lucid()
    for executable in ("true", "wait", "wait"):   # the first has ended: it makes room
        tid = session.task_submit({"executable": executable})["tid"]
        if executable == "true":
            session.task_wait(tid)
    with pytest.raises(TooManyRequests, match="2 that have not ended"):
        session.task_submit({"executable": "wait"})
    session.close()
    lucid().close()


def test_a_closed_session_leaves_no_process_and_no_file(lucid, home):
    session = lucid()
    session.pilot_submit({"resource": "local.localhost"})
    folder = home / ".radical/edge/state/site/lucid/sessions"
    assert processes(home) and list(folder.iterdir())
    session.close()
    assert not list(folder.iterdir())
    wait_until(lambda: not processes(home))
    at_once = lucid()                             # while it starts
    at_once.close()
    assert not list(folder.iterdir())


def test_without_radical_pilot_it_says_what_to_install(bridge, tokens, client, monkeypatch):
    monkeypatch.setenv("RADICAL_LUCID_PYTHON", "/bin/false")
    with running_edge(bridge, tokens[1]["edge"]) as edge:
        assert "pip install radical.pilot" in edge.host.disabled["lucid"]
        with pytest.raises(EdgeError, match="not loaded.*radical.pilot is not installed"):
            client.http.post("/site/lucid/register_session").raise_for_status()


# ---------------------------------------------------------------------------
# Edges that are processes of their own
# ---------------------------------------------------------------------------

@contextlib.contextmanager
def edge_process(bridge, token, python=sys.executable):
    home = os.environ["HOME"]
    command = [str(python), SCRIPT, "--edge", "--url", bridge.url, "--name", "site", "-p", "lucid"]
    process = subprocess.Popen(command, cwd=home, env={**os.environ, "PWD": home,
                                                       "RADICAL_BRIDGE_TOKEN": token})
    try:
        wait_until(lambda: "site" in bridge._registry.links, 60)
        yield process
    finally:
        process.kill()
        process.wait()
        wait_until(lambda: "site" not in bridge._registry.links)


def test_after_kill_9_of_the_edge_nothing_runs_on_and_the_truth_is_told(
        fake, bridge, tokens, client, home):
    with edge_process(bridge, tokens[1]["edge"]):
        session = client.get_edge_client("site").get_plugin("lucid")
        pid = session.pilot_submit({"resource": "local.localhost"})["pid"]
        done = session.task_submit({"executable": "true"})["tid"]
        session.task_wait(done)
        live = session.task_submit({"executable": "wait"})["tid"]
        time.sleep(0.2)                           # the end of `done` is stored soon, not at once
    wait_until(lambda: not processes(home), what="the end of the child and its processes")
    with edge_process(bridge, tokens[1]["edge"]):
        task = session.task_wait(live, 10)["task"]
        assert (task["state"], task["reason"]) == ("LOST", "edge_restart")
        assert task["description"]["executable"] == "wait"
        assert session.get_pilot(pid)["pilot"]["state"] == "LOST"
        task = session.get_task(done)["task"]
        assert (task["state"], task["exit_code"]) == ("DONE", 0)
        assert session.get_status()["status"] == "ended"
        with pytest.raises(Conflict, match="register a new session"):
            session._post(f"pilot_submit/{session.sid}", {"description": {"resource": "x"}})
        session.close()
    assert not processes(home)


@pytest.fixture
def real(bridge, tokens, home, monkeypatch):
    """An edge whose Python has the real radical.pilot."""
    needs("lucid", REAL_PYTHON.exists(), "radical.pilot: run tests/setup-lucid.sh")
    with edge_process(bridge, tokens[1]["edge"], REAL_PYTHON) as process:
        yield process
    wait_until(lambda: not processes(home), 30, "the end of all processes")


def test_a_real_pilot_runs_ten_tasks_and_its_death_is_reported(real, client, home):
    session = client.get_edge_client("site").get_plugin("lucid")
    told = collect(session)
    pid = session.pilot_submit({"resource": "local.localhost", "cores": 2, "runtime": 15})["pid"]
    tids = [session.task_submit({"executable": "/bin/sh", "arguments": ["-c", f"echo {n} $HOME"]}
                                )["tid"] for n in range(10)]
    tasks = [session.task_wait(tid, 240)["task"] for tid in tids]
    assert [(task["state"], task["exit_code"]) for task in tasks] == [("DONE", 0)] * 10, tasks
    assert [task["stdout"].split() for task in tasks] == [[str(n), str(home)] for n in range(10)]

    failing = session.task_submit({"executable": "/bin/false"})["tid"]
    assert session.task_wait(failing, 60)["task"]["state"] == "FAILED"
    with pytest.raises(Unprocessable, match="nosuch"):
        session.task_submit({"executable": "/bin/true", "nosuch": 1})
    with pytest.raises(Unprocessable, match="site 'no' is unknown"):
        session.pilot_submit({"resource": "no.such", "cores": 1, "runtime": 5})

    canceled = session.task_submit({"executable": "/bin/sleep", "arguments": ["600"]})["tid"]
    live = session.task_submit({"executable": "/bin/sleep", "arguments": ["601"]})["tid"]
    wait_until(lambda: states(told, "tid", live) and states(told, "tid", canceled), 60)
    session.task_cancel(canceled)
    assert session.get_task(canceled)["task"]["state"] == "CANCELED"

    os.kill(session.get_status()["pid"], signal.SIGKILL)
    task = session.task_wait(live, 60)["task"]
    assert (task["state"], task["reason"]) == ("LOST", "child_died")
    wait_until(lambda: states(told, "pid", pid)[-1:] == ["LOST"])
    assert real.poll() is None and session.get_status()["status"] == "ended"
    wait_until(lambda: len(processes(home)) == 1, 30, "the end of all processes but the edge")
    session.close()
    assert not list((home / ".radical/edge/state/site/lucid/sessions").iterdir())
    assert [path.name for path in home.iterdir()] == [".radical"]
    assert [path.name for path in (home / ".radical").iterdir()] == ["edge"]
