"""Tasks on the backends of rhapsody-py, the real ones, through a real bridge and a real edge.

    $ tests/setup-rhapsody.sh                              # .venv-rhapsody: rhapsody-py, dask
    $ python -m pytest tests/test_rhapsody_backends.py     # RADICAL_EDGE_REQUIRE=rhapsody: no skip

The slow ones run only when they are named, after `tests/setup-rhapsody.sh python3 dragon
radical_pilot`: RADICAL_EDGE_REQUIRE=dragon,radical_pilot.
"""
from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import plugins
from radical_edge import Conflict, Unprocessable
from test_edge import LONG, REQUIRED, Process, needs, wait_until
from test_rhapsody import (PATIENCE, connect, modules, processes_with, refusal,  # noqa: F401
                           run, script)

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = {"rhapsody": ROOT / ".venv-rhapsody/bin/python", "dragon": ROOT /
           ".venv-dragon/bin/python", "radical_pilot": ROOT / ".venv-pilot/bin/python"}
MODULES = {"rhapsody": "rhapsody, distributed", "dragon": "rhapsody, dragon, flask",
           "radical_pilot": "rhapsody, radical.pilot"}


@functools.lru_cache(maxsize=None)
def find_python(area):
    """Return a Python that has what an area needs; skip the test when there is none."""
    for python in (str(PYTHONS[area]), sys.executable):
        done = subprocess.run([python, "-c", f"import {MODULES[area]}"], capture_output=True) \
            if os.path.exists(python) else None
        if done is not None and done.returncode == 0:
            return python
    return needs(area, False, f"{MODULES[area]}: run tests/setup-rhapsody.sh python3 {area}")


@pytest.fixture
def edge_with(bridge, tokens, modules, tmp_path):  # noqa: F811
    """Run an edge as a process: edge_with(python, *arguments) starts it, or its successor."""
    made = []

    def start(python, *arguments):
        environment = {"RADICAL_BRIDGE_TOKEN": tokens[1]["edge"]}
        process = Process("--edge", "--name", "e1", "-p", "rhapsody", "--url", bridge.url,
                          *arguments, env=environment, expect="registered as e1", python=python)
        made.append(process)
        wait_until(lambda: "e1" in bridge._registry.links, 30)
        return process

    yield start
    for process in made:
        process.end()


@pytest.fixture(params=["concurrent", "dask"])
def backend(request):
    """The name of a backend that is fast enough for every test."""
    return request.param


@pytest.fixture
def session(edge_with, connect, backend):  # noqa: F811
    """A session on that backend."""
    edge_with(find_python("rhapsody"))
    return connect([backend])


def test_programs_run_with_their_output_directory_and_environment(session, tmp_path):
    done, failed, killed = run(
        session, script("echo out; echo err >&2; pwd; echo $COLOUR", cwd=str(tmp_path),
                        env={"COLOUR": "red"}),
        script("exit 7"), script("kill -9 $$"))
    assert (done["state"], done["exit_code"]) == ("DONE", 0)
    assert (failed["state"], failed["exit_code"]) == ("FAILED", 7)
    assert (killed["state"], killed["exit_code"]) == ("FAILED", 137)
    task = session.get_task(done["uid"])
    assert (task["stdout"], task["stderr"]) == (f"out\n{tmp_path}\nred\n", "err\n")


def test_output_that_is_not_utf_8_is_fine(session):
    [done] = run(session, script(r"printf 'a\377b'"))
    assert done["state"] == "DONE"
    assert session.get_task(done["uid"])["stdout"] == "a\ufffdb"


def test_a_program_that_is_not_there_fails_with_the_reason(session, backend):
    [failed] = run(session, {"executable": "/no/such/program"})
    assert failed["state"] == "FAILED" and failed["exit_code"] != 0
    if backend == "concurrent":                   # of dask's, env(1) says it on stderr
        assert "/no/such/program" in failed["error"]
    else:
        assert "/no/such/program" in session.get_task(failed["uid"])["stderr"]


def test_functions_return_their_values_and_fail_alone(session, modules):  # noqa: F811
    modules("mixed", """
        import sys
        def add(a, b=0): return a + b
        async def later(x): return x
        def data(): return b"\\xff"
        def raises(): return {}["missing"]
        def leaves(): sys.exit(3)
    """)
    added, later, data, raised, left, last = run(
        session, {"function": "mixed:add", "args": [40], "kwargs": {"b": 2}},
        {"function": "mixed:later", "args": [["x"]]}, {"function": "mixed:data"},
        {"function": "mixed:raises"}, {"function": "mixed:leaves"},
        {"function": "mixed:add", "args": [1]})
    assert (added["return_value"], later["return_value"], last["return_value"]) == (42, ["x"], 1)
    assert plugins.decode_return(data) == b"\xff"
    assert raised["state"] == "FAILED" and "KeyError: 'missing'" in raised["error"]
    assert left["state"] == "FAILED" and "SystemExit" in left["error"]


def test_pickled_functions_run_where_they_are_allowed(edge_with, connect, backend):  # noqa: F811
    python = find_python("rhapsody")
    edge_with(python, "--allow-pickle")
    text = subprocess.run([python, "-c", "import base64, cloudpickle; print(base64.b64encode("
                           "cloudpickle.dumps(lambda n: {n})).decode())"], capture_output=True,
                          text=True, check=True).stdout.strip()
    [done] = run(connect([backend]), {"function": plugins.PICKLED + text, "args": [5]})
    assert done["_return_value_encoding"] == "cloudpickle"


WRONG_TASKS = [
    ({"function": "no_such_module_here:f"}, "no_such_module_here"),
    ({"function": "math:pi"}, "function"), ({"prompt": "hello"}, "prompt"),
    ({"function": "math:sqrt", "cwd": "/"}, "cwd"), ({"executable": "true", "ranks": 2}, "ranks"),
    ({"executable": "true", "backend": "local"}, "backend"),
]


def test_a_wrong_task_is_422_and_none_of_its_batch_runs(session, tmp_path):
    for task, word in WRONG_TASKS:
        error = refusal(session.submit_tasks, [script(f"touch {tmp_path}/ran"), task])
        assert isinstance(error, Unprocessable) and word in error.detail, (task, error)
        assert session.list_tasks() == {"tasks": []} and not (tmp_path / "ran").exists(), task


def test_cancel_of_running_programs_leaves_no_process(session):
    mark = f"cancel-{os.getpid()}-{time.time_ns()}"
    uids = [task["uid"] for task in session.submit_tasks(
        [script("sleep 1000 & setsid sleep 1000; sleep 1000", env={"MARK": mark})] * 2)]
    wait_until(lambda: len(processes_with(mark)) == 6, 60)       # three of each: all have begun
    for uid in uids:
        assert session.cancel_task(uid) == {"uid": uid, "status": "canceled"}
    assert not processes_with(mark)
    assert {task["state"] for task in session.wait_tasks(uids, 5)} == {"CANCELED"}
    assert run(session, {"executable": "true"})[0]["state"] == "DONE"


def test_programs_that_are_cancelled_while_they_are_started_leave_no_process(session):
    mark = f"starting-{os.getpid()}-{time.time_ns()}"
    uids = [task["uid"] for task in session.submit_tasks(
        [script("sleep 1000", env={"MARK": mark})] * 40)]
    for uid in uids:
        session.cancel_task(uid)
    assert {task["state"] for task in session.wait_tasks(uids, 30)} == {"CANCELED"}
    later = run(session, *[{"executable": "true"}] * 20)         # by now all has been looked at
    assert {task["state"] for task in later} == {"DONE"}
    assert not processes_with(mark)


def test_a_program_that_takes_longer_than_its_timeout_is_ended(session):
    mark = f"late-{os.getpid()}-{time.time_ns()}"
    [failed] = run(session, script("sleep 1000", timeout=1, env={"MARK": mark}))
    assert (failed["state"], failed["reason"]) == ("FAILED", "timeout")
    assert not processes_with(mark)


def check_waiting_programs(session, tmp_path):
    """Fill the session's only worker; what waits behind is QUEUED, and its timeout stands still."""
    uids = [task["uid"] for task in session.submit_tasks(
        [script(f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"),
         *[script("echo late", timeout=6)] * 3])]
    wait_until(lambda: session.get_task(uids[0])["state"] == "RUNNING", PATIENCE)
    waiting = session.wait_tasks(uids[1:], 8)
    assert [task["state"] for task in waiting] == ["QUEUED"] * 3, waiting
    (tmp_path / "go").touch()
    ended = session.wait_tasks(uids, PATIENCE)
    assert {task["state"] for task in ended} == {"DONE"}, ended


def test_a_program_that_waits_for_a_worker_is_queued_and_its_timeout_has_not_begun(
        edge_with, connect, tmp_path):  # noqa: F811
    edge_with(find_python("rhapsody"))
    options = {"n_workers": 1, "threads_per_worker": 1}
    check_waiting_programs(connect([{"name": "dask", "options": options}]), tmp_path)


CLUSTER = """
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address=None)
    print(cluster.scheduler_address, flush=True)
    input()
"""


def test_tasks_of_a_cluster_that_dies_have_failed_and_nobody_has_canceled_them(
        edge_with, connect, tmp_path):  # noqa: F811
    python = find_python("rhapsody")
    edge_with(python)
    with subprocess.Popen([python, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as cluster:
        try:
            address = cluster.stdout.readline().strip()
            session = connect([{"name": "dask", "options": {"address": address}}])
            [task] = session.submit_tasks([script(
                f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done")])
            wait_until((tmp_path / "begun").exists, PATIENCE)
        finally:
            cluster.kill()
    [ended] = session.wait_tasks([task["uid"]], PATIENCE)
    (tmp_path / "go").touch()
    assert ended["state"] == "FAILED" and "gave it up" in ended["error"], ended


def test_a_closed_session_leaves_no_process(session, home):
    mark = f"close-{os.getpid()}-{time.time_ns()}"
    session.submit_tasks([script("setsid sleep 1000 & sleep 1000", env={"MARK": mark})])
    wait_until(lambda: processes_with(mark), 60)
    sid = session.sid
    session.close()
    assert not processes_with(mark) and not processes_with(sid)
    assert not (home / ".radical/edge/state/e1/rhapsody/tasks" / sid).exists()


def test_a_function_that_has_begun_in_a_thread_cannot_be_ended_and_that_is_said(
        edge_with, connect, modules, tmp_path):  # noqa: F811
    modules("slow", f"""
        import os, time
        def slow():
            open({str(tmp_path / "begun")!r}, "w").close()
            while not os.path.exists({str(tmp_path / "go")!r}):
                time.sleep(0.02)
    """)
    edge_with(find_python("rhapsody"))
    session = connect(["concurrent"])
    [task] = session.submit_tasks([{"function": "slow:slow"}])
    wait_until((tmp_path / "begun").exists, 60)
    error = refusal(session.cancel_task, task["uid"])
    assert isinstance(error, Conflict) and "local" in error.detail
    (tmp_path / "go").touch()
    assert session.wait_tasks([task["uid"]], PATIENCE)[0]["state"] == "DONE"


@pytest.mark.parametrize("task, value", [
    ({"executable": "/bin/true"}, None), ({"function": "math:sqrt", "args": [9]}, 3.0)],
    ids=["programs", "functions"])
def test_thousands_of_tasks_through_a_bridge_are_counted(session, backend, task, value):
    many = 10_000                                 # which take dask minutes
    if not LONG:
        many = {("concurrent", "executable"): 2_000, ("dask", "executable"): 500,
                ("dask", "function"): 1_000}.get((backend, next(iter(task))), many)
    uids = [task["uid"] for task in session.submit_tasks([dict(task) for _ in range(many)])]
    ended = session.wait_tasks(uids, 900)
    assert [task["uid"] for task in ended] == uids
    odd = [task for task in ended if task["state"] != "DONE"]
    assert not odd, f"{len(odd)}, such as {odd[:3]}"
    assert {task.get("return_value") for task in ended} == {value}
    assert session.get_statistics()["states"] == {"DONE": many}


def test_an_edge_that_is_killed_meanwhile_tells_the_truth_afterwards(
        edge_with, connect, backend, tmp_path):  # noqa: F811
    python = find_python("rhapsody")
    edge = edge_with(python)
    session = connect([backend])
    run(session, script("echo early", uid="early"))
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    uids = [f"p{n}" for n in range(6)]
    session.submit_tasks([script(f"echo p{n} >> {tmp_path}/ran; {wait}; echo out; exit {n % 2}",
                                 uid=f"p{n}") for n in range(6)])
    wait_until(lambda: (tmp_path / "ran").exists(), 60)
    edge.end(9)
    (tmp_path / "go").touch()
    wait_until(lambda: (tmp_path / "ran").read_text().count("\n") == 6, PATIENCE)
    edge_with(python)
    ended = session.wait_tasks(uids, PATIENCE)
    assert [task["state"] for task in ended] == ["DONE", "FAILED"] * 3
    assert session.get_task("p0")["stdout"] == "out\n"
    assert session.get_task("early")["stdout"] == "early\n"
    assert sorted((tmp_path / "ran").read_text().split()) == uids
    wait_until(lambda: session.get_status()["status"] == "ready", PATIENCE)
    assert run(session, {"executable": "true"})[0]["state"] == "DONE"


def test_an_edge_whose_host_is_killed_too_tells_the_truth_and_leaves_no_process(
        edge_with, connect, backend):  # noqa: F811
    mark = f"both-{os.getpid()}-{time.time_ns()}"
    python = find_python("rhapsody")
    edge = edge_with(python)
    session = connect([backend])
    session.submit_tasks([script("sleep 1000", uid="a", env={"MARK": mark})])
    wait_until(lambda: processes_with(mark), 60)
    edge.end(9)
    for pid in processes_with(f"{session.sid}/{backend}/host.py"):
        os.kill(pid, signal.SIGKILL)
    edge_with(python)
    [ended] = session.wait_tasks(["a"], PATIENCE)
    assert (ended["state"], ended["reason"]) == ("FAILED", plugins.EDGE_RESTART)
    wait_until(lambda: not processes_with(mark), 30)
    wait_until(lambda: session.get_status()["status"] == "ready", PATIENCE)


def test_a_session_has_several_backends_and_a_task_names_one(edge_with, connect):  # noqa: F811
    edge_with(find_python("rhapsody"))
    session = connect(["concurrent", "local", "noop"])
    tasks = [{"executable": "true", "backend": name} for name in ("local", "noop", "concurrent")]
    run(session, *tasks, {"executable": "true"})
    assert sorted(task["backend"] for task in session.list_tasks()["tasks"]) == [
        "concurrent", "concurrent", "local", "noop"]
    error = refusal(session.submit_tasks, [{"executable": "true", "backend": "local"}, {
        "function": "no_such_module_here:f", "backend": "concurrent"}])
    assert isinstance(error, Unprocessable)
    assert session.get_statistics()["tasks"] == 4


def test_the_default_is_concurrent_where_rhapsody_py_is_installed(edge_with, connect):  # noqa: F811
    edge_with(find_python("rhapsody"))
    session = connect([])
    run(session, {"executable": "true"})
    assert session.list_tasks()["tasks"][0]["backend"] == "concurrent"


# ---------------------------------------------------------------------------
# The slow ones: a minute each
# ---------------------------------------------------------------------------

def needs_naming(area):
    """Return a slow area; skip the test when RADICAL_EDGE_REQUIRE does not name it."""
    needs(area, area in REQUIRED, f"RADICAL_EDGE_REQUIRE={area}: it is slow")
    return area


@pytest.fixture(params=["dragon", "radical_pilot"])
def slow_backend(request):
    """The name of a backend that must be asked for."""
    return needs_naming(request.param)


OPTIONS = {"radical_pilot": {"cores": 2, "runtime": 10}, "dragon": {}}


def test_a_slow_backend_runs_tasks_cancels_them_and_leaves_nothing(
        edge_with, connect, slow_backend, tmp_path, home):  # noqa: F811
    mark = f"slow-{os.getpid()}-{time.time_ns()}"
    edge_with(find_python(slow_backend))
    session = connect([{"name": slow_backend, "options": OPTIONS[slow_backend]}])
    done, failed = run(session, script("echo out; echo $COLOUR", env={"COLOUR": "red"}),
                       script("exit 3"), timeout=400)
    assert done["state"] == "DONE" and (failed["state"], failed["exit_code"]) == ("FAILED", 3)
    assert session.get_task(done["uid"])["stdout"].split() == ["out", "red"]
    if slow_backend == "dragon":
        value, failed = run(session, {"function": "math:sqrt", "args": [9]},
                            {"function": "sys:exit", "args": [3]}, timeout=400)
        assert value["return_value"] == 3.0 and failed["state"] == "FAILED"
    else:
        error = refusal(session.submit_tasks, [{"function": "math:sqrt", "args": [9]}])
        assert isinstance(error, Unprocessable) and "function" in error.detail
    [task] = session.submit_tasks([{"executable": "sleep", "arguments": ["1000"],
                                    "env": {"MARK": mark}}])
    wait_until(lambda: processes_with(mark), 120)
    assert session.cancel_task(task["uid"])["status"] == "canceled"
    wait_until(lambda: not processes_with(mark), 60)
    sid = session.sid
    session.close()
    wait_until(lambda: not processes_with(sid), 60)
    assert not (home / ".radical/edge/state/e1/rhapsody/tasks" / sid).exists()


def test_a_pilot_that_ends_fails_its_tasks_and_the_edge_lives(edge_with, connect):  # noqa: F811
    edge = edge_with(find_python(needs_naming("radical_pilot")))
    session = connect([{"name": "radical_pilot", "options": {"cores": 2, "runtime": 1}}])
    session.submit_tasks([{"executable": "sleep", "arguments": ["1000"], "uid": "a"}])
    [ended] = session.wait_tasks(["a"], 400)      # the pilot may run for a minute
    assert ended["state"] in ("FAILED", "CANCELED")
    assert edge.process.poll() is None
    assert session.get_statistics()["tasks"] == 1


def test_a_resource_that_there_is_not_fails_the_session_with_the_reason(
        edge_with, connect):  # noqa: F811
    edge = edge_with(find_python(needs_naming("radical_pilot")))
    error = refusal(connect, [{"name": "radical_pilot", "options": {"resource": "no.where"}}])
    assert error.status == 503 and "unknown" in error.detail
    assert edge.process.poll() is None
