"""Odd values in every field of the plugins' routes: a refusal that says what is wrong, never a 500.

    $ python -m pytest tests/test_odd_input.py
"""
from __future__ import annotations

import contextlib
import copy
import http.client
import json
import logging
import os
import urllib.parse

import pytest

import plugins
import radical_edge
from radical_edge import Edge
from test_edge import make_program, needs_module, wait_until

# JSON texts, for some of these no Python value can stand
ODD_VALUES = {
    "null": "null", "true": "true", "false": "false", "zero": "0", "one": "1", "minus one": "-1",
    "a fraction": "0.5", "minus zero": "-0.0", "1e400": "1e400", "-1e400": "-1e400", "NaN": "NaN",
    "Infinity": "Infinity", "1e10": "10000000000", "1e18": "999999999999999999",
    "30 digits": "1" + "0" * 30, "400 digits": "1" + "0" * 400, "no text": '""', "a space": '" "',
    "a NUL": '"a\\u0000b"', "half a character": '"\\ud800"', "a byte": '"\\udcff"',
    "a line feed": '"a\\nb"', "5000 characters": json.dumps("x" * 5000), "a path": '"../../../x"',
    "a dash": '"-x"', "a star": '"*"', "a number as text": '"7"', "braces": '"{0.__class__}{x!r}"',
    "an empty list": "[]", "a list of lists": "[[[]]]", "a list of null": "[null]",
    "a list of all": '[1, "a", null, {}, true, 1e999]', "an empty object": "{}",
    "an object": '{"a": {"b": [1]}}', "odd keys": '{"": 1, "\\u0000": 2, "\\ud800": 3, "a=b": "c"}',
    "a deep list": "[" * 300 + "]" * 300, "a deep object": '{"a":' * 300 + "1" + "}" * 300}

JOB = {"job_spec": {
    "executable": "/bin/true", "arguments": ["a"], "directory": "/tmp", "name": "n",
    "inherit_environment": True, "environment": {"A": "b"}, "stdin_path": "/dev/null",
    "stdout_path": "/dev/null", "stderr_path": "/dev/null",
    "pre_launch": "/dev/null", "post_launch": "/dev/null", "launcher": "single",
    "resources": {"node_count": 1, "process_count": 1, "processes_per_node": 1,
                  "cpu_cores_per_process": 1, "gpu_cores_per_process": 1,
                  "exclusive_node_use": False, "memory": 1},
    "attributes": {"duration": 60, "queue_name": "q", "account": "a", "project_name": "p",
                   "reservation_id": "r", "node_count": 1, "custom_attributes": {"slurm.qos": "x"}},
    "custom_attributes": {"slurm.qos": "y"}}, "executor": "local"}
SLURM_JOB = {**JOB, "executor": "slurm"}
LOCAL_JOB = {"executor": "local", "job_spec": {
    **{name: value for name, value in JOB["job_spec"].items() if name not in (
        "custom_attributes", "pre_launch", "post_launch")},
    "resources": {"node_count": 1, "exclusive_node_use": False}, "attributes": {"duration": 60}}}
CHILD = {"job_spec": {"executable": "/bin/true", "arguments": ["--name", "c1"]},
         "executor": "local", "tunnel": "none"}
TASK = {"uid": "t", "executable": "/bin/true", "arguments": ["a"], "backend": "local", "name": "n",
        "timeout": 5, "cwd": "/tmp", "env": {"A": "b"}, "ranks": 1, "capture_stdio": True,
        "input_files": [], "output_files": [], "metadata": {},
        "task_backend_specific_kwargs": {"cwd": "/tmp", "env": {"A": "b"}, "shell": False}}
FUNCTION = {"function": "os:getpid", "args": [1], "kwargs": {"a": 1}, "_pickled_fields": ["args"]}
PROMPT = {"prompt": "x", "model": "m", "temperature": 0.5, "max_tokens": 1, "stop_sequences": ["a"]}
CONFIG = {"name": "c", "description": "d", "local_workspace": "/tmp/w", "cspot_limit": 1,
          "cspot_woof_url": "woof://x", "num_simulations": 1, "batch_size": 1,
          "train_models": ["m"],
          "simulation_task": {"executable": "{workflow_path}/x", "arguments": ["{sim_id:03d}"]},
          "training_tasks": {"m": {"executable": "x", "arguments": []}},
          "evaluation_task": {"executable": "x", "arguments": []}, "mock_sensor_data": True}
RESOURCES = {"name": "r", "bridge_url": "http://x", "bridge_cert": "c", "cluster_configs": {"e": {
    "queue": "q", "account": "a", "duration": 1, "nodes": 1, "executor": "slurm", "backend": "b",
    "workflow_path": "w", "custom_attributes": {"a": 1}, "tunnel": "none", "has_gpu": True,
    "cluster_type": "allocate"}}}
FILE = {"filename": "odd", "content": "YQ==", "overwrite": True}
UPLOAD = {"path": "odd", "upload": "u" * 8, "size": 1, "overwrite": True}
COMMIT = {**UPLOAD, "sha256": "0" * 64, "mode": "0644", "mtime": 1.5}

# plugin, route ("{sid}" is a session of that plugin), a body with all fields
POSTS = [
    ("psij", "submit/{sid}", LOCAL_JOB), ("psij", "submit/{sid}", SLURM_JOB),
    ("psij", "submit_tunneled/{sid}", CHILD), ("psij", "register_session", {"x": 1}),
    ("staging", "put/{sid}", FILE), ("staging", "get/{sid}", FILE), ("staging", "list/{sid}", FILE),
    ("staging", "upload", UPLOAD), ("staging", "upload/commit", COMMIT),
    ("staging", "files/read", {"path": "~", "names": ["odd"]}),
    ("staging", "mkdir", {"path": "odd.d", "parents": True}),
    ("staging", "rename", {"src": "odd", "dst": "odd2", "overwrite": True}),
    ("staging", "delete", {"path": "odd2", "recursive": False}),
    ("rhapsody", "register_session", {"backends": [{"name": "local", "options": {}}],
                                      "notify_batch_window": 1, "notify_batch_size": 5}),
    ("rhapsody", "submit/{sid}", {"tasks": [TASK]}),
    ("rhapsody", "submit/{sid}", {"tasks": [FUNCTION]}),
    ("rhapsody", "submit/{sid}", {"tasks": [PROMPT]}),
    ("rhapsody", "submit/{sid}", {"template": {"executable": "/bin/true"}, "uids": ["u1", "u2"]}),
    ("rhapsody", "wait/{sid}", {"uids": ["t"], "timeout": 0}),
    ("xgfabric", "register_session", {"workdir": "/tmp"}),
    ("xgfabric", "workdir/{sid}", {"path": "/tmp"}), ("xgfabric", "config/{sid}", CONFIG),
    ("xgfabric", "config/{sid}", RESOURCES),
    ("xgfabric", "start/{sid}", {"workflow": "nosuch", "resource": "nosuch"}),
    ("queue_info", "register_session", {"x": 1}), ("sysinfo", "register_session", {"x": 1})]

# with all their fields they are refused, whatever the values are
UNUSABLE = [{"tasks": [FUNCTION]}, {"tasks": [PROMPT]}]

ODD_TEXTS = ["", " ", "-1", "1", "007", "1e400", "nan", "1" * 18, "9" * 18, "9" * 40, "\0", "\n",
             "..", "../..", "*", "-x", "{x}", "a" * 3000, "\u00e9", "%", "true", "[1]",
             "a,b", "1_[1-3]"]
# plugin, method, path and query, in which each {} is one of ODD_TEXTS in turn
PATHS = [
    ("psij", "GET", "status/{sid}/{}"), ("psij", "GET", "job_spec/{sid}/{}"),
    ("psij", "POST", "cancel/{sid}/{}"),
    ("psij", "GET", "tunnel_status/{}"), ("psij", "GET", "status/{sid}/{job}?stdout_offset={}"),
    ("psij", "GET", "status/{sid}/{job}?stderr_offset={}"), ("psij", "GET", "list_jobs/{}"),
    ("psij", "POST", "unregister_session/{}"), ("psij", "POST", "submit/{}"),
    *[("queue_info", "GET", path) for path in (
        "get_info/{sid}?user={}", "get_info/{sid}?force={}", "list_jobs/{sid}/{}",
        "list_jobs/{sid}/q?state={}")],
    ("queue_info", "GET", "list_all_jobs/{sid}?user={}"),
    ("queue_info", "GET", "list_allocations/{sid}?user={}"), ("queue_info", "GET", "backend"),
    ("queue_info", "POST", "cancel/{sid}/{}"), ("queue_info", "GET", "job_allocation"),
    ("queue_info", "GET", "is_enabled"), ("sysinfo", "GET", "metrics/{}"),
    *[("staging", "GET", f"{route}?path={{}}") for route in ("file", "tree", "stat", "list", "tail",
                                                              "upload")],
    *[("staging", "GET", f"tail?path=odd&{name}={{}}") for name in ("wait", "lines", "bytes",
                                                                    "offset")],
    *[("staging", "GET", f"stat?path=odd&{name}={{}}") for name in ("follow", "digest", "mode",
                                                                    "mtime", "overwrite")],
    ("staging", "GET", "upload?path=odd&upload={}"),
    ("staging", "DELETE", "upload?path=odd&upload={}"),
    ("staging", "PUT", "upload?path=odd&upload=uuuuuuuu&offset={}"),
    ("staging", "PUT", "file?path=odd&overwrite=1&mtime={}"),
    ("staging", "PUT", "file?path=odd&overwrite=1&mode={}"), ("staging", "PUT", "file?path={}"),
    ("staging", "DELETE", "file?path=nosuch{}"), ("staging", "POST", "files/write?path=odd.d/{}"),
    ("rhapsody", "GET", "task/{sid}/{}"), ("rhapsody", "POST", "cancel/{sid}/{}"),
    ("rhapsody", "GET", "list_tasks/{sid}?offset={}"),
    ("rhapsody", "GET", "list_tasks/{sid}?limit={}"),
    ("rhapsody", "GET", "task/{sid}/task-one?stdout_offset={}"),
    ("rhapsody", "GET", "statistics/{}"), ("rhapsody", "GET", "session/{}"),
    ("xgfabric", "GET", "config/{sid}/{}"), ("xgfabric", "POST", "config/{sid}/{}/delete"),
    ("xgfabric", "POST", "stop/{sid}"), ("xgfabric", "GET", "status/{sid}"),
    ("xgfabric", "GET", "configs/{sid}")]

PROGRAMS = {"sbatch": "echo Submitted batch job 77", "scancel": "exit 0",
            "sinfo": "case \"$*\" in *json*) echo '{\"sinfo\": []}';; esac",
            "squeue": "case \"$*\" in *json*) echo '{\"jobs\": []}';; "
                      "*%A*) echo '77|CANCELLED|n1|None';; esac",
            "scontrol": "echo 'ClusterName = c'; echo 'PartitionName=q State=UP'",
            "sacct": "exit 1", "sacctmgr": "echo '{\"associations\": []}'"}


class Asker:
    """A client of a bridge and an edge with the plugins, over one connection."""

    def __init__(self, bridge, token):
        self._token = token
        self._http = http.client.HTTPConnection("127.0.0.1", bridge._listener.server_address[1],
                                                timeout=120)
        self.known = {name: json.loads(self.ask("POST", f"/e1/{name}/register_session", b"{}")[1])[
            "sid"] for name in ("psij", "staging", "rhapsody", "xgfabric", "queue_info", "sysinfo")}

    def ask(self, method, path, body=b"", kind="application/json"):
        """Return (status, body) of a reply."""
        self._http.request(method, path, body, {"Authorization": f"Bearer {self._token}",
                                                "Content-Type": kind})
        reply = self._http.getresponse()
        return reply.status, reply.read()

    def close(self):
        self._http.close()


@pytest.fixture
def asker(bridge, tokens, home, tmp_path, monkeypatch):
    needs_module("psij")
    for name, text in PROGRAMS.items():
        make_program(tmp_path, name, f"#!/bin/sh\n{text}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XGFABRIC_WORKDIR", str(tmp_path))
    monkeypatch.setattr(plugins, "QUEUE_POLL_S", 0.2)
    radical_edge.load_builtin_plugins()
    edge = Edge(bridge.url, "e1", token=tokens[1]["edge"], plugins=[
        "psij", "staging", "rhapsody", "xgfabric", "queue_info", "sysinfo"]).start()
    assert edge.online.wait(30)
    made = Asker(bridge, tokens[1]["admin"])
    wait_until(lambda: json.loads(made.ask("GET", f"/e1/rhapsody/session/{made.known['rhapsody']}")[
        1])["status"] == "ready", 30)
    yield made
    for name, sid in made.known.items():
        if name == "psij":
            for job in json.loads(made.ask("GET", f"/e1/psij/list_jobs/{sid}")[1])["jobs"]:
                if job["state"] not in plugins.ENDED_STATES:
                    made.ask("POST", f"/e1/psij/cancel/{sid}/{job['job_id']}")
        assert made.ask("POST", f"/e1/{name}/unregister_session/{sid}")[0] == 200
    for sid in json.loads(made.ask("GET", "/e1/rhapsody/list_sessions")[1])["sessions"]:
        made.ask("POST", f"/e1/rhapsody/unregister_session/{sid}")
    made.close()
    assert edge.stop()


def places_of(value, path=()):
    """Yield the path of a JSON value and of all that is in it."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else \
            enumerate(value) if isinstance(value, list) else ():
        yield from places_of(item, (*path, key))


def put_at(body, path, value):
    """Return a copy of a body with the value at the path."""
    if not path:
        return value
    changed = copy.deepcopy(body)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def with_odd(body, path, text):
    """Return a body as JSON, with `text` at the path."""
    return json.dumps(put_at(body, path, "\1mark")).replace('"\\u0001mark"', text).encode()


REFUSALS = (400, 403, 404, 405, 409, 410, 413, 422, 429, 501, 503, 507)


def find_fault(status, body):
    """Return what is wrong with an answer: it must be a success, or say what is wrong."""
    value = json.loads(body) if status >= 400 else None
    if status < 400 or status in REFUSALS and value["error"] is True and len(value["detail"]) > 8 \
            and not any(word in value["detail"] for word in ("Traceback", ".py", "Error(")):
        return None
    return status, body[:200]


def assert_none(faults, caplog):
    """Fail with all faults that were found, and with what was logged with a traceback."""
    logged = [(record.getMessage()[:200], record.exc_text) for record in caplog.records
              if record.exc_info]
    assert not faults and not logged, "\n".join(map(str, [*faults, *logged]))


@pytest.mark.parametrize("plugin, route, body", POSTS, ids=lambda item: item if isinstance(
    item, str) else ",".join(item)[:30])
def test_odd_values_in_a_body_are_refused_by_name_or_taken(asker, caplog, plugin, route, body):
    caplog.set_level(logging.WARNING)
    path = f"/e1/{plugin}/" + route.replace("{sid}", asker.known[plugin])
    faults = []
    if "submit" in route and "template" not in body:              # else it says nothing
        status, answer = asker.ask("POST", path, json.dumps(body).encode())
        assert status == 200 or body in UNUSABLE, answer
    for place in places_of(body):
        for name, text in ODD_VALUES.items():
            fault = find_fault(*asker.ask("POST", path, with_odd(body, place, text)))
            faults += [(place, name, fault)] if fault else []
    assert_none(faults, caplog)


def test_what_msgpack_has_and_json_has_not_is_refused_or_taken(asker, caplog):
    caplog.set_level(logging.WARNING)
    faults = []
    for plugin, route, body in POSTS:
        path = f"/e1/{plugin}/" + route.replace("{sid}", asker.known[plugin])
        for place in places_of(body):
            for value in (b"a", b"\xff", float("nan"), {b"k": 1}, {1: 2}, {"a": b"\xff"}):
                with contextlib.suppress(ValueError):            # of what the encoder has no form
                    data = radical_edge.encode_msgpack(put_at(body, place, value))
                    fault = find_fault(*asker.ask("POST", path, data, "application/msgpack"))
                    faults += [(route, place, value, fault)] if fault else []
    assert_none(faults, caplog)


def test_odd_texts_in_paths_and_queries_are_refused_by_name_or_taken(asker, caplog, home):
    caplog.set_level(logging.WARNING)
    (home / "odd").write_text("hello")
    status, answer = asker.ask("POST", f"/e1/psij/submit/{asker.known['psij']}", json.dumps(
        {"job_spec": {"executable": "/bin/echo", "arguments": ["hello"]}}).encode())
    job = json.loads(answer)["job_id"]
    asker.ask("POST", f"/e1/rhapsody/submit/{asker.known['rhapsody']}", json.dumps(
        {"tasks": [{"uid": "task-one", "executable": "/bin/echo"}]}).encode())
    faults = []
    for plugin, method, template in PATHS:
        template = template.replace("{sid}", asker.known[plugin]).replace("{job}", job)
        for text in ODD_TEXTS if "{}" in template else [""]:
            path = template.replace("{}", urllib.parse.quote(text, safe=""))
            fault = find_fault(*asker.ask(method, f"/e1/{plugin}/{path}"))
            faults += [(method, plugin, path[:200], fault)] if fault else []
    assert_none(faults, caplog)
