"""Tasks on the backend `local`, through a real bridge and a real edge.

They need nothing but pytest. What needs rhapsody-py stands in test_rhapsody_backends.py.
"""
from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import plugins
import radical_edge
from radical_edge import (BridgeClient, Conflict, Edge, EdgeError, Forbidden, NotFound,
                          Unprocessable, encode_json)
from test_edge import SCRIPT, wait_until

PATIENCE = 120.0               # seconds; for a machine that does much else


def processes_with(text):
    """Return the pids of living processes that have `text` among their arguments or environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    continue
            for part in ("cmdline", "environ"):
                with open(f"/proc/{name}/{part}", "rb") as file:
                    if text.encode() in file.read() and int(name) != os.getpid():
                        found.append(int(name))
                        break
    return found


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
    pytest.importorskip("cloudpickle", reason="needs cloudpickle")
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

@pytest.mark.parametrize("task, word", [
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
    ({"executable": "true", "timeout": -1}, "timeout"), ({"executable": "true", "cwd": 1}, "cwd"),
    ({"executable": "true", "env": {"A=B": "x"}}, "env"), ({"executable": "true", "bogus": 1},
                                                           "bogus"),
    ({"executable": "true", "backend": "dask"}, "backend"), ({"prompt": "hello"}, "prompt"),
    ({"executable": "true", "ranks": 2}, "ranks"),
    ({"executable": "true", "task_backend_specific_kwargs": {"shell": True}}, "shell"),
    ({"executable": "true", "task_backend_specific_kwargs": {"gpu": 1}}, "gpu"),
])
def test_a_wrong_task_is_422_with_its_field_and_none_of_its_batch_runs(session, tmp_path, task,
                                                                       word):
    path = tmp_path / "ran"
    error = refusal(session._post, f"submit/{session.sid}", {"tasks": [
        script(f"touch {path}", uid="first"), task]})
    assert error.status == 422 and word in error.detail, error
    assert "tasks[1]" in error.detail or "function" in error.detail
    assert session.list_tasks() == {"tasks": []}
    assert run(session, {"executable": "true"})[0]["state"] == "DONE" and not path.exists()


@pytest.mark.parametrize("body, word", [
    ([], "body"), ({}, "template"), ({"tasks": []}, "tasks"), ({"tasks": {}}, "tasks"),
    ({"tasks": [], "uids": []}, "template"), ({"template": {"executable": "true"}}, "uids"),
    ({"template": {"executable": "true"}, "uids": []}, "uids"),
    ({"template": {"executable": "true"}, "uids": ["a", "a"]}, "twice"),
    ({"template": {"executable": "true"}, "uids": ["a", 1]}, "uids[1]"),
    ({"template": {"executable": "true", "uid": "x"}, "uids": ["a"]}, "template.uid"),
    ({"tasks": [{"executable": "true", "uid": "a"}] * 2}, "twice"), ({"more": 1}, "more"),
])
def test_a_wrong_submission_is_422_with_its_field(session, body, word):
    error = refusal(session._post, f"submit/{session.sid}", body)
    assert error.status == 422 and word in error.detail


def test_a_body_that_is_not_json_is_400_and_so_is_damaged_msgpack(session):
    path = session._url(f"submit/{session.sid}")
    assert session._http.post(path, content=b"{").status_code == 400
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


@pytest.mark.parametrize("arguments, status, word", [
    ({"backends": ["nonesuch"]}, 422, "nonesuch"), ({"backends": "local"}, 422, "backends"),
    ({"backends": [7]}, 422, "backends"), ({"backends": [{"name": "local", "x": 1}]}, 422,
                                           "backends"),
    ({"notify_batch_window": -1}, 422, "notify_batch_window"), ({"more": 1}, 422, "more"),
    ({"notify_batch_size": 0}, 422, "notify_batch_size"),
])
def test_a_wrong_registration_is_422_with_its_field(session, arguments, status, word):
    error = refusal(session._post, "register_session", arguments)
    assert error.status == status and word in error.detail


def test_a_backend_that_is_not_installed_is_501_with_what_to_install(session):
    there = session.list_backends()
    assert there["backends"]["local"] == {"available": True, "reason": None}
    missing = {name: entry for name, entry in there["backends"].items() if not entry["available"]}
    for name, entry in missing.items():
        error = refusal(session._post, "register_session", {"backends": [name]})
        assert error.status == 501 and entry["reason"] in error.detail
    assert there["default"] == ("local" if "concurrent" in missing else "concurrent")
