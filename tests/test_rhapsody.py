"""Tasks on the backend `local`, through a real bridge and a real edge.

They need nothing but pytest. What needs rhapsody-py stands in test_rhapsody_backends.py.
"""
from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import plugins
import radical_edge
from radical_edge import (BridgeClient, Conflict, Edge, EdgeError, Forbidden, NotFound,
                          encode_json)
from test_edge import LONG, SCRIPT, needs_module, start, wait_until  # noqa: F401

PATIENCE = 120.0               # seconds; for a machine that does much else


def processes_with(text):
    """Return the pids of living processes that have `text` among their arguments or environment."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if pid != os.getpid() and text.encode() in describe_process(pid)]


def describe_process(pid):
    """Return a process's arguments and environment; b"" of one that has ended."""
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
            return (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
    return b""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Make modules for function tasks importable on the edge: modules(name, text)."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(name, text):
        (folder / f"{name}.py").write_text(textwrap.dedent(text))

    return write


@pytest.fixture
def options():
    """What the command line of the edge says to plugins; a test may change it."""
    return {"allow_pickle": False, "task_limit": 2}


@pytest.fixture
def task_edge(bridge, tokens, options):
    """Start an edge in this process, named "e1", with the plugin; end it, and what it started."""
    running = []

    def start(**more):
        edge = Edge(bridge.url, "e1", plugins=["rhapsody"], token=tokens[1]["edge"],
                    options={**options, **more}).start()
        running.append(edge)
        assert edge.online.wait(30)
        wait_until(lambda: "e1" in bridge._registry.links, 30)
        return edge

    yield start
    for edge in running:
        assert edge.stop()


@pytest.fixture
def connect(bridge, tokens):
    """Open a session: connect(backends) gives a RhapsodyClient; its tasks end with the test."""
    made = []

    def open_session(backends=("local",), scope="admin", **kwargs):
        client = BridgeClient(bridge.url, token=tokens[1][scope])
        made.append((client, None))
        tasks = client.get_edge_client("e1").get_plugin("rhapsody", backends=list(backends),
                                                        **kwargs)
        made.append((client, tasks))
        return tasks

    yield open_session
    for client, tasks in reversed(made):
        if tasks is not None:
            tasks.close()
        else:
            client.close()


@pytest.fixture
def session(modules, task_edge, connect):
    """A session on an edge with the local backend."""
    task_edge()
    return connect()


def run(session, *tasks, timeout=PATIENCE):
    """Submit tasks and return them once they have ended."""
    uids = [task["uid"] for task in session.submit_tasks(list(tasks))]
    return session.wait_tasks(uids, timeout)


def script(text, **more):
    """Return a task that runs a shell script."""
    return {"executable": "/bin/sh", "arguments": ["-c", text], **more}


def refusal(function, *args, **kwargs):
    """Return the EdgeError that a call raises."""
    with pytest.raises(EdgeError) as caught:
        function(*args, **kwargs)
    return caught.value


# ---------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------

def test_a_program_runs_and_its_output_and_exit_code_are_told(session):
    done, failed = run(session, script("echo out; echo err >&2"), script("exit 7"))
    assert (done["state"], done["exit_code"]) == ("DONE", 0)
    assert (failed["state"], failed["exit_code"]) == ("FAILED", 7)
    task = session.get_task(done["uid"])
    assert (task["stdout"], task["stderr"]) == ("out\n", "err\n")
    assert task["executable"] == "/bin/sh" and task["backend"] == "local"
    assert (task["stdout_size"], task["stderr_size"]) == (4, 4)


def test_output_is_kept_in_a_file_and_comes_as_a_tail_or_from_an_offset_on(session):
    size = plugins.MAX_OUTPUT_TAIL + 1000
    [done] = run(session, script(f"head -c {size} /dev/zero | tr '\\0' x; printf end"))
    task = session.get_task(done["uid"])
    assert task["stdout_size"] == size + 3
    assert len(task["stdout"]) == plugins.MAX_OUTPUT_TAIL and task["stdout"].endswith("xend")
    task = session.get_task(done["uid"], stdout_offset=size)
    assert (task["stdout"], task["stdout_offset"]) == ("end", size + 3)


def test_output_that_is_not_utf_8_is_fine(session):
    [done] = run(session, script(r"printf 'a\377b'"))
    assert done["state"] == "DONE"
    assert session.get_task(done["uid"])["stdout"] == "a\ufffdb"


def test_a_program_has_its_directory_and_environment(session, tmp_path):
    [done] = run(session, script("pwd; echo $COLOUR; echo $RADICAL_BRIDGE_TOKEN",
                                 cwd=str(tmp_path), env={"COLOUR": "red", "N": 3}))
    assert session.get_task(done["uid"])["stdout"] == f"{tmp_path}\nred\n\n"
    [nested] = run(session, script("pwd; echo $COLOUR", task_backend_specific_kwargs={
        "cwd": "/", "env": {"COLOUR": "blue"}}))
    assert session.get_task(nested["uid"])["stdout"] == "/\nblue\n"


def test_a_program_without_a_directory_of_its_own_runs_in_the_home_directory(session, home):
    [done] = run(session, {"executable": "pwd"})
    assert session.get_task(done["uid"])["stdout"] == f"{home}\n"


@pytest.mark.parametrize("task, code, word", [
    ({"executable": "no-such-program-anywhere"}, 127, "no such program"),
    ({"executable": "/no/such/file"}, 127, "/no/such/file"),
    ({"executable": "/etc/hostname"}, 126, "/etc/hostname"),
    ({"executable": "/bin/true", "cwd": "/no/such/directory"}, 127, "/no/such/directory"),
])
def test_a_program_that_cannot_be_started_fails_with_the_reason(session, task, code, word):
    [failed] = run(session, task)
    assert (failed["state"], failed["exit_code"]) == ("FAILED", code)
    assert word in failed["error"]


def test_a_program_killed_by_a_signal_has_failed(session):
    [failed] = run(session, script("kill -9 $$"))
    assert (failed["state"], failed["exit_code"]) == ("FAILED", 137)
    assert "signal 9" in failed["error"]


def test_what_a_program_leaves_running_ends_with_it(session):
    mark = f"left-{os.getpid()}-{time.time_ns()}"
    run(session, script(f"sleep 1000 & : {mark}", env={"MARK": mark}))
    wait_until(lambda: not processes_with(mark), 10)


def test_a_program_that_takes_longer_than_its_timeout_is_ended(session):
    mark = f"late-{os.getpid()}-{time.time_ns()}"
    [failed] = run(session, script("sleep 1000", timeout=0.3, env={"MARK": mark}))
    assert failed["state"] == "FAILED" and failed["reason"] == "timeout"
    assert "0.3 s" in failed["error"]
    assert not processes_with(mark)


def test_no_more_programs_run_at_a_time_than_the_limit(session):
    uids = [task["uid"] for task in session.submit_tasks([script("sleep 1000")] * 5)]
    wait_until(lambda: session.get_statistics()["states"].get("RUNNING") == 2, 30)
    assert session.get_statistics()["states"] == {"RUNNING": 2, "QUEUED": 3}
    assert session.cancel_all() == {"canceled": 5}
    assert {task["state"] for task in session.wait_tasks(uids, 30)} == {"CANCELED"}


# ---------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------

def test_functions_return_json_values_bytes_and_text(session, modules):
    modules("values", """
        def json(*args, **kwargs): return {"args": args, "kwargs": kwargs}
        def data(): return b"\\xff\\x00"
        def other(): return {1, }
        def nothing(): return None
        def nan(): return float("nan")
        def lone(): return "a\\ud800b"
        async def later(x): return x + 1
        class Kind:
            def method(): return "method"
    """)
    ended = run(session, {"function": "values:json", "args": [1, "zwei"], "kwargs": {"k": [None]}},
                *[{"function": f"values:{name}"} for name in ("data", "other", "nothing", "nan",
                                                              "lone", "Kind.method")],
                {"function": "values:later", "args": [41]})
    assert [task["state"] for task in ended] == ["DONE"] * 8
    assert ended[0]["return_value"] == {"args": [1, "zwei"], "kwargs": {"k": [None]}}
    assert ended[1]["_return_value_encoding"] == "base64"
    assert plugins.decode_return(ended[1]) == b"\xff\x00"
    assert [(task["return_value"], task.get("_return_value_encoding")) for task in ended[2:]] == [
        ("{1}", "str"), (None, None), ("nan", "str"), ("a?b", "str"), ("method", None), (42, None)]


def test_what_a_function_prints_is_its_tasks_output(session, modules):
    modules("talk", """
        import os, sys
        def talk(text):
            print(text)
            os.write(2, b"raw " + text.encode())
        def silent(): pass
    """)
    ended = run(session, *[{"function": "talk:talk", "args": [f"number {n}"]} for n in range(5)],
                {"function": "talk:silent"})
    texts = [session.get_task(task["uid"]) for task in ended]
    assert [task["stdout"] for task in texts] == [f"number {n}\n" for n in range(5)] + [""]
    assert [task["stderr"] for task in texts] == [f"raw number {n}" for n in range(5)] + [""]


@pytest.mark.parametrize("body, code, word", [
    ("raise KeyError('lost')", 1, "KeyError: 'lost'"), ("import sys; sys.exit(3)", 3, "SystemExit"),
    ("import os; os._exit(4)", 4, "exit code 4"), ("import os; os.abort()", 134, "signal 6"),
    ("import os; os.kill(os.getpid(), 9)", 137, "signal 9"), ("raise KeyboardInterrupt", 1, "Key"),
    ("import os; os._exit(0)", 0, "its process ended"),
])
def test_whatever_a_function_does_fails_its_own_task_and_no_other(session, modules, body, code,
                                                                  word):
    modules("trouble", f"""
        def make():
            {body}
        def fine(n): return n
    """)
    tasks = [{"function": "trouble:fine", "args": [n]} for n in range(20)]
    ended = run(session, *tasks[:10], {"function": "trouble:make"}, *tasks[10:])
    failed = ended.pop(10)
    assert [task["return_value"] for task in ended] == list(range(20))
    assert (failed["state"], failed["exit_code"]) == ("FAILED", code) and word in failed["error"]


def test_a_function_has_a_traceback_and_what_it_printed_before_it_died(session, modules):
    modules("dying", """
        import os
        def raises(): return 1 / 0
        def dies():
            print("last words", flush=True)
            os._exit(9)
    """)
    raised, died = run(session, {"function": "dying:raises"}, {"function": "dying:dies"})
    assert raised["exception"] == "ZeroDivisionError" and "1 / 0" in raised["traceback"]
    assert session.get_task(died["uid"])["stdout"] == "last words\n"


def test_a_function_has_its_directory_and_environment_and_leaves_none_behind(session, modules):
    modules("place", """
        import os
        def where(): return os.getcwd(), os.environ.get("COLOUR")
    """)
    tasks = [{"function": "place:where", "cwd": "/", "env": {"COLOUR": "red"}},
             {"function": "place:where"}] * 3
    ended = run(session, *tasks)
    assert [task["return_value"] for task in ended[::2]] == [["/", "red"]] * 3
    assert all(task["return_value"][1] is None for task in ended[1::2])


def test_a_return_value_has_a_limit(session, modules):
    modules("big", "def big(n): return 'x' * n")
    fine, failed = run(session, {"function": "big:big", "args": [plugins.MAX_RETURN - 10]},
                       {"function": "big:big", "args": [plugins.MAX_RETURN]})
    assert len(fine["return_value"]) == plugins.MAX_RETURN - 10
    assert failed["state"] == "FAILED" and str(plugins.MAX_RETURN) in failed["error"]


def test_large_arguments_reach_a_function(session, modules):
    modules("sizes", "def size(text): return len(text)")
    [done] = run(session, {"function": "sizes:size", "args": ["x" * 1_000_000]})
    assert done["return_value"] == 1_000_000


def test_a_running_function_is_ended_with_its_process(session, modules):
    mark = f"function-{os.getpid()}-{time.time_ns()}"
    modules("slow", f"""
        import subprocess
        def slow(): subprocess.run(["sleep", "1000"], env={{"MARK": "{mark}"}})
    """)
    [task] = session.submit_tasks([{"function": "slow:slow"}])
    wait_until(lambda: processes_with(mark), 30)
    assert session.cancel_task(task["uid"]) == {"uid": task["uid"], "status": "canceled"}
    wait_until(lambda: not processes_with(mark), 10)
    assert run(session, {"function": "math:sqrt", "args": [4]})[0]["return_value"] == 2.0


def test_functions_that_need_each_other_run_at_the_same_time(session, modules, tmp_path):
    modules("meet", """
        import os, time
        def meet(path, me, other):
            open(os.path.join(path, me), "w").close()
            end = time.monotonic() + 60
            while not os.path.exists(os.path.join(path, other)):
                assert time.monotonic() < end
                time.sleep(0.01)
            return me
    """)
    ended = run(session, *[{"function": "math:sqrt", "args": [4]}] * 20,
                {"function": "meet:meet", "args": [str(tmp_path), "a", "b"]},
                {"function": "meet:meet", "args": [str(tmp_path), "b", "a"]})
    assert [task["state"] for task in ended] == ["DONE"] * 22


# ---------------------------------------------------------------------------
# Pickles
# ---------------------------------------------------------------------------

def test_pickled_functions_are_refused_unless_the_edge_allows_them(session):
    text = plugins.PICKLED + base64.b64encode(b"cos\nsystem\n(S'true'\ntR.").decode()
    error = refusal(session.submit_tasks, [{"function": text, "_pickled_fields": ["function"]}])
    assert isinstance(error, Forbidden) and "--allow-pickle" in error.detail
    error = refusal(session.submit_tasks, [{"function": "math:sqrt", "args": text}])
    assert isinstance(error, Forbidden) and "tasks[0].args" in error.detail


def test_callables_are_pickled_where_the_edge_allows_it(task_edge, connect):
    needs_module("cloudpickle")
    task_edge(allow_pickle=True)
    session, offset = connect(), 40
    closure, other = run(session, {"function": lambda n: n + offset, "args": [2]},
                         {"function": lambda items: items, "args": [{1, 2}]})
    assert closure["return_value"] == 42
    assert other["_return_value_encoding"] == "cloudpickle"
    with pytest.raises(ValueError, match="allow_pickle"):
        plugins.decode_return(other)
    assert plugins.decode_return(other, allow_pickle=True) == {1, 2}


def test_a_damaged_pickle_fails_its_task(task_edge, connect):
    task_edge(allow_pickle=True)
    [failed] = run(connect(), {"function": plugins.PICKLED + "AAAA"})
    assert failed["state"] == "FAILED" and "cannot be loaded" in failed["error"]


# ---------------------------------------------------------------------------
# What is refused, and that nothing has run then
# ---------------------------------------------------------------------------

WRONG_TASKS = [                                  # and a word of the refusal
    ({}, "executable and function"), (7, "must be an object"), ({"executable": ""}, "executable"),
    ({"executable": 7}, "executable"), ({"executable": "a\0b"}, "executable"),
    ({"executable": "true", "function": "a:b"}, "function"),
    ({"executable": "true", "arguments": "x"}, "arguments"),
    ({"executable": "true", "arguments": [1]}, "arguments"),
    ({"executable": "true", "args": [1]}, "args"), ({"function": "a:b", "arguments": ["x"]}, "arg"),
    ({"function": "no colon"}, "function"), ({"function": "os:../../x"}, "function"),
    ({"function": "no_such_module_here:f"}, "no_such_module_here"),
    ({"function": "math:no_such_name"}, "no_such_name"), ({"function": "math:pi"}, "function"),
    ({"executable": "true", "uid": "../x"}, "uid"),
    ({"executable": "true", "uid": 5}, "uid"), ({"executable": "true", "uid": "x" * 129}, "uid"),
    ({"executable": "true", "timeout": -1}, "timeout"),
    ({"executable": "true", "timeout": 10 ** 400}, "timeout"),
    ({"executable": "true", "cwd": 1}, "cwd"),
    ({"executable": "true", "env": {"A=B": "x"}}, "env"), ({"executable": "true", "bogus": 1},
                                                           "bogus"),
    ({"executable": "true", "backend": "dask"}, "backend"), ({"prompt": "hello"}, "prompt"),
    ({"executable": "true", "ranks": 2}, "ranks"),
    ({"executable": "true", "task_backend_specific_kwargs": {"shell": True}}, "shell"),
    ({"executable": "true", "task_backend_specific_kwargs": {"gpu": 1}}, "gpu"),
]


def test_a_wrong_task_is_422_with_its_field_and_none_of_its_batch_runs(session, tmp_path):
    path = tmp_path / "ran"
    for task, word in WRONG_TASKS:
        error = refusal(session._post, f"submit/{session.sid}", {"tasks": [
            script(f"touch {path}", uid="first"), task]})
        assert error.status == 422 and word in error.detail, (task, error)
        assert "tasks[1]" in error.detail or "function" in error.detail, (task, error)
        assert session.list_tasks() == {"tasks": []}, task
    assert run(session, {"executable": "true"})[0]["state"] == "DONE" and not path.exists()


WRONG_SUBMISSIONS = [
    ([], "body"), ({}, "template"), ({"tasks": []}, "tasks"), ({"tasks": {}}, "tasks"),
    ({"tasks": [], "uids": []}, "template"), ({"template": {"executable": "true"}}, "uids"),
    ({"template": {"executable": "true"}, "uids": []}, "uids"),
    ({"template": {"executable": "true"}, "uids": ["a", "a"]}, "twice"),
    ({"template": {"executable": "true"}, "uids": ["a", 1]}, "uids[1]"),
    ({"template": {"executable": "true", "uid": "x"}, "uids": ["a"]}, "template.uid"),
    ({"tasks": [{"executable": "true", "uid": "a"}] * 2}, "twice"), ({"more": 1}, "more"),
]


def test_a_wrong_submission_is_422_with_its_field(session):
    for body, word in WRONG_SUBMISSIONS:
        error = refusal(session._post, f"submit/{session.sid}", body)
        assert error.status == 422 and word in error.detail, (body, error)


def test_a_body_that_is_not_json_is_400_and_so_is_damaged_msgpack(session):
    path = session._url(f"submit/{session.sid}")
    assert session._http.post(path, content=b"{").status_code == 400
    nan = b'{"tasks":[{"function":"math:sqrt","args":[NaN]}]}'
    assert session._http.post(path, content=nan).status_code == 400
    bytes_ = b"\x81\xa5tasks\x91\x82\xa8function\xa9math:sqrt\xa4args\x91\xc4\x01\xff"
    assert session._http.post(path, content=bytes_, headers={
        "Content-Type": "application/msgpack"}).status_code == 400
    reply = session._http.post(path, content=b"\x81", headers={"Content-Type":
                                                               "application/msgpack"})
    assert reply.status_code == 400 and "msgpack" in reply.json()["detail"]


def test_a_submission_may_be_msgpack(session):
    body = b"\x82\xa8template\x81\xaaexecutable\xa4true\xa4uids\x92\xa1a\xa1b"
    reply = session._http.post(session._url(f"submit/{session.sid}"), content=body,
                               headers={"Content-Type": "application/msgpack"})
    assert [task["uid"] for task in reply.raise_for_status().json()] == ["a", "b"]
    assert {task["state"] for task in session.wait_tasks(["a", "b"], PATIENCE)} == {"DONE"}


def test_a_uid_is_taken_once_and_a_batch_with_it_is_refused_whole(session):
    run(session, {"executable": "true", "uid": "mine"})
    error = refusal(session.submit_tasks, [{"executable": "true", "uid": "new"},
                                           {"executable": "false", "uid": "mine"}])
    assert isinstance(error, Conflict) and "mine" in error.detail
    assert [task["uid"] for task in session.list_tasks()["tasks"]] == ["mine"]


WRONG_REGISTRATIONS = [
    ({"backends": ["nonesuch"]}, "nonesuch"), ({"backends": "local"}, "backends"),
    ({"backends": [7]}, "backends"), ({"backends": [{"name": "local", "x": 1}]}, "backends"),
    ({"notify_batch_window": -1}, "notify_batch_window"), ({"more": 1}, "more"),
    ({"notify_batch_size": 0}, "notify_batch_size"),
]


def test_a_wrong_registration_is_422_with_its_field(session):
    for arguments, word in WRONG_REGISTRATIONS:
        error = refusal(session._post, "register_session", arguments)
        assert error.status == 422 and word in error.detail, (arguments, error)


def test_a_backend_that_is_not_installed_is_501_with_what_to_install(session):
    there = session.list_backends()
    assert there["backends"]["local"] == {"available": True, "reason": None}
    missing = {name: entry for name, entry in there["backends"].items() if not entry["available"]}
    for name, entry in missing.items():
        error = refusal(session._post, "register_session", {"backends": [name]})
        assert error.status == 501 and entry["reason"] in error.detail
    assert there["default"] == ("local" if "concurrent" in missing else "concurrent")


# ---------------------------------------------------------------------------
# Waiting, listing, cancelling, notifications
# ---------------------------------------------------------------------------

def test_wait_honours_its_timeout_and_tells_states_and_unknown_uids(session):
    [task] = session.submit_tasks([script("sleep 1000", uid="slow")])
    wait_until(lambda: session.wait_tasks(["slow"], 0)[0]["state"] == "RUNNING", 30)
    begin = time.monotonic()
    slow, unknown = session.wait_tasks(["slow", "nobody"], 0.3)
    assert 0.3 <= time.monotonic() - begin < 15
    assert (slow["state"], unknown["state"]) == ("RUNNING", "UNKNOWN")
    assert isinstance(refusal(session.wait_tasks, ["nobody"], 1), NotFound)
    assert session.wait_tasks([], 1) == []
    for body in ({"timeout": "x"}, {"timeout": -1}, {"uids": "slow"}, {"uids": [1]}, {"more": 1},
                 {"timeout": 10 ** 400}):
        error = refusal(session._post, f"wait/{session.sid}", body)
        assert error.status == 422 and list(body)[0] in error.detail


def test_waiting_needs_no_notifications_and_outlives_a_broken_connection(session, bridge):
    session.submit_tasks([script("sleep 1", uid="a")])
    results = []
    waiting = threading.Thread(target=lambda: results.extend(session.wait_tasks(["a"])))
    waiting.start()
    for connection in list(bridge.connections):
        bridge.loop.call_soon_threadsafe(connection.channel.close, "cut")
    waiting.join(PATIENCE)
    assert [task["state"] for task in results] == ["DONE"]


def test_a_waiter_that_goes_away_leaves_nothing_behind(session, task_edge, raw):
    session.submit_tasks([script("sleep 1000", uid="a")])
    connection = raw()
    connection.send_request("POST", f"/e1/rhapsody/wait/{session.sid}",
                            encode_json({"uids": ["a"]}).encode())
    waiters = find_session(session).table.waiters
    wait_until(lambda: waiters, 30)
    connection.close()
    wait_until(lambda: not waiters, 30)


def find_session(client):
    """Return the session object of an edge in this process."""
    import gc
    return next(item for item in gc.get_objects()
                if isinstance(item, plugins.RhapsodySession) and item.sid == client.sid)


def test_tasks_are_listed_in_pages_without_their_output(session):
    tasks = [script("echo much", uid=f"t{n:02}") for n in range(25)]
    run(session, *tasks)
    page = session._get(f"list_tasks/{session.sid}", offset=10, limit=10)
    assert [task["uid"] for task in page["tasks"]] == [f"t{n:02}" for n in range(10, 20)]
    assert (page["total"], page["next_offset"]) == (25, 20)
    assert "stdout" not in page["tasks"][0] and page["tasks"][0]["executable"] == "/bin/sh"
    assert session._get(f"list_tasks/{session.sid}", offset=20)["next_offset"] is None
    assert len(session.list_tasks()["tasks"]) == 25
    for query in ({"limit": 0}, {"offset": -1}, {"limit": "x"}):
        assert refusal(session._get, f"list_tasks/{session.sid}", **query).status == 422


def test_cancel_ends_the_program_and_what_it_started_and_says_the_truth(session):
    mark = f"cancel-{os.getpid()}-{time.time_ns()}"
    stubborn = script("trap '' TERM; sleep 1000 & sleep 1000; sleep 1000", uid="stubborn",
                      env={"MARK": mark})
    session.submit_tasks([stubborn, script("sleep 1000", uid="b", env={"MARK": mark}),
                          script("sleep 1000", uid="queued", env={"MARK": mark})])
    wait_until(lambda: len(processes_with(mark)) >= 3, 30)
    assert session.cancel_task("queued")["status"] == "canceled"
    assert session.cancel_task("b") == {"uid": "b", "status": "canceled"}
    assert session.cancel_task("stubborn")["status"] == "canceled"   # by SIGKILL, in the end
    assert not processes_with(mark)
    assert {task["state"] for task in session.wait_tasks(["stubborn", "b", "queued"], 1)} == \
        {"CANCELED"}
    assert session.cancel_task("b") == {"uid": "b", "status": "canceled"}
    run(session, {"executable": "true", "uid": "done"})
    error = refusal(session.cancel_task, "done")
    assert isinstance(error, Conflict) and "DONE" in error.detail
    assert isinstance(refusal(session.cancel_task, "nobody"), NotFound)


def test_a_closed_session_leaves_no_process_and_no_file(task_edge, connect, home, modules):
    mark = f"close-{os.getpid()}-{time.time_ns()}"
    modules("endless", "import time\ndef endless(): time.sleep(1000)")
    task_edge()
    session = connect()
    session.submit_tasks([script("setsid sleep 1000 & sleep 1000", env={"MARK": mark}),
                          {"function": "endless:endless"}])
    wait_until(lambda: len(processes_with(mark)) >= 3, 30)
    folder = home / ".radical/edge/state/e1/rhapsody/tasks" / session.sid
    host_mark = json.loads((folder / "local/settings.json").read_text())["mark"]
    sid = session.sid
    session.close()
    assert not processes_with(mark) and not processes_with(host_mark) and not folder.exists()
    session._sid = sid
    assert isinstance(refusal(session.get_statistics), NotFound)
    session._sid = None


def test_a_session_with_live_tasks_does_not_expire_and_another_does(task_edge, connect,
                                                                    monkeypatch):
    edge = task_edge()
    plugin = edge.host._hosted["rhapsody"]
    busy, idle = connect(), connect()
    busy.submit_tasks([script("sleep 1000", uid="a")])
    plugin.thread.submit(plugin.plugin._expire(time.time() + 1)).result(60)
    assert busy.wait_tasks(["a"], 0)[0]["state"] in ("QUEUED", "RUNNING")
    assert refusal(idle.get_statistics).status == 410
    idle._sid = None
    assert busy.cancel_all() == {"canceled": 1}


def test_notifications_tell_each_end_once_in_batches(task_edge, connect):
    task_edge()
    session = connect()
    told, sizes = {}, []

    def on_event(_edge, _plugin, topic, data):
        assert data["sid"] == session.sid
        tasks = data["tasks"] if topic == "task_status_batch" else [data]
        if tasks[0]["state"] != "RUNNING":
            sizes.append(len(tasks))
        for task in tasks:
            told.setdefault(task["uid"], []).append(task)

    session.register_notification_callback(on_event, "task_status")
    session.register_notification_callback(on_event, "task_status_batch")
    uids = [task["uid"] for task in session.submit_tasks(
        [{"function": "math:sqrt", "args": [n]} for n in range(1500)] +
        [script("echo no; exit 3", uid="failed"), script("sleep 0.5", uid="slow")])]
    session.wait_tasks(uids, PATIENCE)
    wait_until(lambda: len([uid for uid in told if told[uid][-1]["state"] in ("DONE", "FAILED")]) ==
               len(uids), 60)
    for uid in uids:
        assert [task["state"] for task in told[uid]][-1] in ("DONE", "FAILED")
        assert len(told[uid]) == len({task["state"] for task in told[uid]}) <= 2
    assert [task["state"] for task in told["slow"]] == ["RUNNING", "DONE"]
    failed = told["failed"][-1]
    assert failed["exit_code"] == 3 and "stdout" not in failed and "exit code 3" in failed["error"]
    assert told[uids[4]][-1]["return_value"] == 2.0
    assert max(sizes) <= plugins.NOTIFY_ITEMS and len(sizes) < 100


def test_the_batch_of_notifications_is_the_sessions_choice(task_edge, connect):
    task_edge()
    session = connect(notify_batch_size=1, notify_batch_window=30)
    topics = []
    session.register_notification_callback(lambda _e, _p, topic, data: topics.append(topic))
    run(session, *[{"function": "math:sqrt", "args": [4]}] * 20)
    wait_until(lambda: topics.count("task_status") >= 20, 30)
    assert "task_status_batch" not in {topic for topic in topics if topic != "task_status_batch"}


def test_a_registration_answers_at_once_and_tells_when_it_is_ready(task_edge, tokens, bridge):
    task_edge()
    with BridgeClient(bridge.url, token=tokens[1]["admin"]) as client:
        events = []
        client.register_callback(callback=lambda *event: events.append(event))
        answer = client.http.post("/e1/rhapsody/register_session",
                                  json={"backends": ["local"]}).json()
        assert answer["status"] == "initializing"
        early = client.http.post(f"/e1/rhapsody/submit/{answer['sid']}",
                                 json={"tasks": [{"executable": "true"}]})
        assert early.status_code in (200, 409)   # 409 unless the host was very fast
        if early.status_code == 409:
            assert "still initializing" in early.json()["detail"]
        wait_until(lambda: [event[3] for event in events if event[2] == "session_status"], 60)
        assert [event[3] for event in events if event[2] == "session_status"] == [
            {"sid": answer["sid"], "status": "ready"}]
        client.http.post(f"/e1/rhapsody/unregister_session/{answer['sid']}").raise_for_status()


def test_a_backend_that_cannot_start_is_told_with_the_reason(task_edge, connect, monkeypatch):
    task_edge()
    monkeypatch.setattr(plugins, "_HOST_PROGRAM", "raise SystemExit('no luck today')\n")
    error = refusal(connect)
    assert error.status == 503 and "no luck today" in error.detail


def test_statistics_count_states_and_backends(session):
    run(session, {"executable": "true"}, {"executable": "false"}, {"function": "math:sqrt",
                                                                   "args": [1]})
    assert session.get_statistics() == {
        "tasks": 3, "live": 0, "states": {"DONE": 2, "FAILED": 1},
        "backends": {"local": {"DONE": 2, "FAILED": 1}}, "status": "ready"}


def test_a_session_is_its_owners(task_edge, connect, tokens, bridge):
    task_edge()
    session = connect(scope="client")
    other = BridgeClient(bridge.url, token=tokens[0].add("other", "client"))
    try:
        reply = wait_until(lambda: [reply for reply in [
            other.http.get(f"/e1/rhapsody/statistics/{session.sid}")] if reply.status_code != 401],
            30)[0]
        assert reply.status_code == 403
    finally:
        other.close()


# ---------------------------------------------------------------------------
# Many
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("task, value", [
    ({"executable": "/bin/true"}, None), ({"function": "math:sqrt", "args": [9]}, 3.0)],
    ids=["programs", "functions"])
def test_thousands_of_tasks_through_a_bridge_are_counted(task_edge, connect, task, value):
    task_edge()
    session = connect()
    many = 10_000 if LONG or "function" in task else 2_000     # programs cost ten times as much
    uids = [task["uid"] for task in session.submit_tasks([dict(task) for _ in range(many)])]
    assert len(set(uids)) == many
    ended = session.wait_tasks(uids, 600)
    assert [task["uid"] for task in ended] == uids
    assert {task["state"] for task in ended} == {"DONE"}
    assert {task.get("return_value") for task in ended} == {value}
    assert session.get_statistics()["states"] == {"DONE": many}
    assert len(session.list_tasks()["tasks"]) == many


def test_tasks_that_differ_go_in_batches_and_a_template_is_sent_once():
    same = [{"uid": f"u{n}", "executable": "true"} for n in range(20_000)]
    bodies = [json.loads(body) for body in plugins.cut_submission(same)]
    assert [len(body["uids"]) for body in bodies] == [8192, 8192, 20_000 - 2 * 8192]
    assert bodies[0]["template"] == {"executable": "true"}
    large = [{"uid": f"u{n}", "executable": "true", "arguments": [str(n) * 500_000]}
             for n in range(10, 50)]
    bodies = list(plugins.cut_submission(large))
    assert len(bodies) > 1 and all(len(body) <= plugins.MAX_BATCH + 20 for body in bodies)
    assert sum((json.loads(body)["tasks"] for body in bodies), []) == large


def test_bulky_results_do_not_stay_in_the_edges_memory(session, modules):
    modules("bulky", "def bulky(n): return 'x' * n")
    ended = run(session, *[{"function": "bulky:bulky", "args": [500_000]} for _ in range(40)])
    assert {len(task["return_value"]) for task in ended} == {500_000}
    found = find_session(session)
    assert sum(len(repr([getattr(record, name) for name in record.__slots__ if name != "link"]))
               for record in found.table.records.values()) < 100_000


# ---------------------------------------------------------------------------
# Retries
# ---------------------------------------------------------------------------

def test_a_submission_that_is_sent_again_runs_once(session, tmp_path):
    path = tmp_path / "count"
    body = {"tasks": [script(f"echo x >> {path}", uid="once"), script(f"echo x >> {path}")]}
    url, key = session._url(f"submit/{session.sid}"), {"Idempotency-Key": "k" * 20}
    answers = [session._http.post(url, json=body, headers=key).raise_for_status().json()
               for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    session.wait_tasks([task["uid"] for task in answers[0]], PATIENCE)
    assert path.read_text() == "x\nx\n"
    other = session._http.post(url, json=body, headers={"Idempotency-Key": "o" * 20})
    assert other.status_code == 409


# ---------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------

@pytest.fixture
def killable(bridge, tokens, start, connect, modules):
    """Run the edge as a process of its own: killable() starts it, or its successor."""

    def start_edge(*more):
        process = start("--edge", "--name", "e1", "-p", "rhapsody", "--task-limit", "2", "--url",
                        bridge.url, *more, env={"RADICAL_BRIDGE_TOKEN": tokens[1]["edge"]},
                        expect="registered as e1")
        wait_until(lambda: "e1" in bridge._registry.links, 30)
        return process

    return start_edge


def test_an_edge_that_is_killed_meanwhile_tells_the_truth_afterwards(killable, connect, tmp_path,
                                                                     modules):
    """Tasks go on without the edge; each runs once, and the next edge knows how each has ended."""
    modules("slow", f"""
        import os, time
        def slow(n):
            with open({str(tmp_path / "ran")!r}, "a") as file:
                file.write(f"f{{n}}\\n")
            while not os.path.exists({str(tmp_path / "go")!r}):
                time.sleep(0.02)
            return n
    """)
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done"
    edge = killable()
    session = connect()
    run(session, script("echo early", uid="early"))
    session.submit_tasks(
        [script(f"echo p{n} >> {tmp_path}/ran; {wait}; echo out; exit {n % 2}", uid=f"p{n}")
         for n in range(6)] + [{"function": "slow:slow", "args": [n], "uid": f"f{n}"}
                               for n in range(6)])
    uids = [f"p{n}" for n in range(6)] + [f"f{n}" for n in range(6)]
    wait_until(lambda: session.get_statistics()["states"].get("RUNNING") == 4, 60)
    edge.end(9)
    edge = killable()
    states = {task["uid"]: task["state"] for task in session.wait_tasks(uids, 0)}
    assert sorted(states.values()) == ["QUEUED"] * 8 + ["RUNNING"] * 4
    edge.end(9)
    (tmp_path / "go").touch()                     # they end while there is no edge
    wait_until(lambda: (tmp_path / "ran").read_text().count("\n") == 12, PATIENCE)
    killable()
    ended = session.wait_tasks(uids, PATIENCE)
    assert [task["state"] for task in ended] == ["DONE", "FAILED"] * 3 + ["DONE"] * 6
    assert [task["return_value"] for task in ended[6:]] == list(range(6))
    assert session.get_task("p0")["stdout"] == "out\n"
    assert session.get_task("early")["stdout"] == "early\n"
    assert sorted((tmp_path / "ran").read_text().split()) == sorted(uids)
    error = refusal(session.submit_tasks, [{"executable": "true", "uid": "p0"}])
    assert isinstance(error, Conflict)
    assert run(session, {"executable": "true"})[0]["state"] == "DONE"


def test_an_edge_whose_hosts_are_killed_too_tells_the_truth_and_leaves_no_process(
        killable, connect, home):
    mark = f"both-{os.getpid()}-{time.time_ns()}"
    edge = killable()
    session = connect()
    run(session, script("echo early", uid="early"))
    session.submit_tasks([script("setsid sleep 1000 & sleep 1000", uid=f"t{n}",
                                 env={"MARK": mark}) for n in range(3)])
    wait_until(lambda: len(processes_with(mark)) >= 6, 30)
    settings = home / f".radical/edge/state/e1/rhapsody/tasks/{session.sid}/local/settings.json"
    host_mark = json.loads(settings.read_text())["mark"]
    edge.end(9)
    for pid in processes_with(f"{session.sid}/local/host.py"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes_with(f"{session.sid}/local/host.py"), 10)
    assert processes_with(mark)                   # orphans, which somebody must end
    killable()
    ended = session.wait_tasks(["early", "t0", "t1", "t2"], PATIENCE)
    assert [task["state"] for task in ended] == ["DONE"] + ["FAILED"] * 3
    assert {task["reason"] for task in ended[1:]} == {plugins.EDGE_RESTART}
    wait_until(lambda: not processes_with(mark), 30)
    assert host_mark not in settings.read_text()
    assert session.get_task("early")["stdout"] == "early\n"
    session.submit_tasks([{"executable": "true", "uid": "after"}])
    assert session.wait_tasks(["after"], PATIENCE)[0]["state"] == "DONE"


def test_a_host_that_is_killed_fails_its_tasks_and_is_started_again(session):
    mark = f"host-{os.getpid()}-{time.time_ns()}"
    session.submit_tasks([script("sleep 1000", uid=f"t{n}", env={"MARK": mark}) for n in range(3)])
    wait_until(lambda: processes_with(mark), 30)
    for pid in processes_with(f"{session.sid}/local/host.py"):
        os.kill(pid, signal.SIGKILL)
    ended = session.wait_tasks(["t0", "t1", "t2"], PATIENCE)
    assert {(task["state"], task["reason"]) for task in ended} == {("FAILED", "host_died")}
    assert not processes_with(mark)
    assert run(session, {"executable": "true"})[0]["state"] == "DONE"


def test_ends_that_nobody_was_told_of_are_told_by_the_next_edge(killable, connect, tmp_path):
    edge = killable()
    session = connect()
    told = {}
    session.register_notification_callback(
        lambda _e, _p, _t, data: [told.setdefault(task["uid"], task["state"])
                                  for task in data.get("tasks", [data]) if "uid" in task and
                                  task["state"] != "RUNNING"])
    session.submit_tasks([script(f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; "
                                 f"touch {tmp_path}/{n}", uid=f"t{n}") for n in range(4)])
    edge.end(9)
    (tmp_path / "go").touch()
    wait_until(lambda: (tmp_path / "3").exists(), PATIENCE)
    killable()
    wait_until(lambda: told == {f"t{n}": "DONE" for n in range(4)}, 60)


def test_an_edge_that_ends_in_good_order_leaves_the_tasks_running(killable, connect, tmp_path):
    edge = killable()
    session = connect()
    session.submit_tasks([script(f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done", uid="a")])
    wait_until(lambda: session.wait_tasks(["a"], 0)[0]["state"] == "RUNNING", 30)
    status, _ = edge.end()
    assert status == 0
    killable()
    assert session.wait_tasks(["a"], 0)[0]["state"] == "RUNNING"
    (tmp_path / "go").touch()
    assert session.wait_tasks(["a"], PATIENCE)[0]["state"] == "DONE"


def test_tasks_that_run_on_another_machine_are_neither_lost_nor_run_again(killable, connect, home):
    edge = killable()
    session = connect()
    session.submit_tasks([script("sleep 1000", uid="a")])
    path = home / f".radical/edge/state/e1/rhapsody/tasks/{session.sid}/local/settings.json"
    edge.end(9)
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "host": "login-7"}))     # a home that both share
    edge = killable()
    wait_until(lambda: session.get_status()["status"] == "failed", 30)
    assert "login-7" in session.get_status()["error"]
    assert session.wait_tasks(["a"], 0)[0]["state"] == "QUEUED"
    assert refusal(session.submit_tasks, [{"executable": "true"}]).status == 503
    edge.end(9)
    path.write_text(json.dumps(settings))
    killable()
    wait_until(lambda: session.wait_tasks(["a"], 0)[0]["state"] == "RUNNING", 30)


def test_a_host_whose_folder_was_deleted_ends_with_its_tasks(killable, connect, home):
    mark = f"deleted-{os.getpid()}-{time.time_ns()}"
    edge = killable()
    session = connect()
    session.submit_tasks([script("sleep 1000", env={"MARK": mark})])
    wait_until(lambda: processes_with(mark), 30)
    edge.end(9)
    shutil.rmtree(home / f".radical/edge/state/e1/rhapsody/tasks/{session.sid}")
    wait_until(lambda: not processes_with(mark) and
               not processes_with(f"{session.sid}/local/host.py"), 60)
    killable()


def test_an_idle_host_ends_with_its_edge(killable, connect):
    edge = killable()
    session = connect()
    run(session, {"executable": "true"}, {"function": "math:sqrt", "args": [1]})
    assert processes_with(f"{session.sid}/local/host.py")
    edge.end(9)
    wait_until(lambda: not processes_with(f"{session.sid}/local/host.py"), 30)
    killable()


# ---------------------------------------------------------------------------
# Logs and exceptions, without an edge
# ---------------------------------------------------------------------------

def test_a_log_is_read_up_to_where_its_writer_was_killed(tmp_path):
    path = tmp_path / "tasks.log"
    log = plugins.TaskLog(path)
    taken = log.take({"tasks": [{"executable": "a"}], "uids": ["x", "y"], "first": 3, "key": "k"})
    [end] = log.append([{"uid": "x", "state": "DONE"}])
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"uid": "y", "sta')
    assert plugins.read_entry(path, tuple(taken[0][2:])) == {"executable": "a"}
    assert [row[:2] for row in taken] == [("x", 3), ("y", 4)]
    log = plugins.TaskLog(path)                   # the next writer
    log.append([{"uid": "y", "state": "FAILED"}])
    log.close()
    values = [value for _, _, value in plugins.read_log(path)]
    assert values[0] == {"taken": [list(row) for row in taken], "key": "k"}
    assert values[1:] == [{"uid": "x", "state": "DONE"}, {"uid": "y", "state": "FAILED"}]
    assert plugins.read_entry(path, end) == {"uid": "x", "state": "DONE"}
    assert [value for _, _, value in plugins.read_log(path, end[0])] == values[1:]


def test_a_full_disk_leaves_a_log_whole(tmp_path, monkeypatch):
    log = plugins.TaskLog(tmp_path / "tasks.log")
    log.append([{"uid": "x", "state": "DONE"}])
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]) if
                        len(data) > 10 else (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError):
        log.append([{"uid": "yyyy", "state": "DONE"}])
    monkeypatch.undo()
    log.append([{"uid": "z", "state": "DONE"}])
    log.close()
    assert [value["uid"] for _, _, value in plugins.read_log(tmp_path / "tasks.log")] == ["x", "z"]


def test_the_check_says_which_backends_are_missing_and_why(tmp_path, home):
    done = subprocess.run([sys.executable, SCRIPT, "--check", "-p", "rhapsody", "--url",
                           "http://127.0.0.1:1"], capture_output=True, text=True, timeout=60)
    assert "rhapsody: ok" in done.stdout
    missing = [name for name in plugins.BACKENDS if plugins.find_missing(name)]
    for name in missing:
        assert f"backend {name}: {plugins.find_missing(name)}" in done.stdout
