"""What an edge allows, by its owner's policy file: enforced on the edge, whatever a bridge says.

    $ python -m pytest tests/test_policy.py
"""
from __future__ import annotations

import json
import os
import signal

import pytest

import radical_edge
from doubles import HostileBridge
from radical_edge import Edge, Forbidden, Plugin, Policy, post
from test_edge import run, start, wait_until                         # noqa: F401


def policy(**fields):
    return Policy(json.dumps(fields))


@pytest.mark.parametrize("text, words", [
    ("", "line 1: not JSON"), ("{\n\n 'a': 1}", "line 3: not JSON"), ("[]", "line 1: must be"),
    ('{\n "plugins": "psij"}', "line 2: plugins: must be a list"),
    ('{\n "plugins": ["a"],\n "executers": []}', "line 3: executers: there is no such field"),
    ('{\n\n "roots": ["data"]}', "line 3: roots: must be absolute"),
    ('{"executables": ["bin/x"]}', "line 1: executables: must be absolute"),
    ('{\n"scopes": ["client", "king"]}', "line 2: scopes: there are only admin"),
    ('{"users": [7]}', "users: must be a list"), ('{"users": [""]}', "users: must be a list"),
    ('{"options": []}', "options: must be an object")])
def test_a_bad_policy_names_the_line_to_fix(text, words):
    with pytest.raises(ValueError, match=words):
        Policy(text)


def test_a_bad_policy_file_refuses_to_start(tmp_path, home):
    path = tmp_path / "policy.json"
    path.write_text('{\n  "plugin": []\n}')
    text = run("--edge", "--policy", str(path), "--url", "http://127.0.0.1:1", status=1)
    assert f"{path}, line 2: plugin" in text
    (home / ".radical/edge").mkdir(parents=True)
    (home / ".radical/edge/policy.json").write_text("{,}")
    assert "policy.json, line 1" in run("--edge", "--url", "http://127.0.0.1:1", status=1)
    path.write_text("{}")
    path.chmod(0o666)
    assert "chmod go-w" in run("--edge", "--policy", str(path), status=1)
    assert "cannot be read" in run("--edge", "--policy", str(tmp_path / "none"), status=1)


def test_what_a_list_does_not_name_is_refused_and_without_a_list_all_is_allowed(tmp_path):
    for kind in ("plugins", "executors", "scopes", "users"):
        policy().check(kind, "anything")
        allowed = policy(**{kind: ["a*", "client"]})
        allowed.check(kind, "client")
        if kind != "scopes":
            allowed.check(kind, "alice")
        for wrong in ("bob", "", None, "b/a"):
            with pytest.raises(Forbidden, match=kind[:-1]):
                allowed.check(kind, wrong)


def make_program(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_programs_are_matched_by_what_links_lead_to(tmp_path, monkeypatch):
    good, bad = make_program(tmp_path / "ok/good"), make_program(tmp_path / "other/bad")
    os.symlink(bad, tmp_path / "ok/link")
    os.symlink(good, tmp_path / "other/alias")
    rules = policy(executables=[f"{tmp_path}/ok/*"])
    assert rules.check_program(good) == good
    assert rules.check_program(str(tmp_path / "other/alias")) == str(tmp_path / "other/alias")
    for wrong in (bad, str(tmp_path / "ok/link"), str(tmp_path / "ok/../other/bad"), "/bin/sh", "sh",
                  "good", "./good", f"{tmp_path}/ok/../../etc", ""):
        with pytest.raises(Forbidden, match="executable"):
            rules.check_program(wrong)
    monkeypatch.setenv("PATH", str(tmp_path / "ok"))
    assert rules.check_program("good") == good    # found as the edge finds it, and made absolute
    with pytest.raises(Forbidden):
        rules.check_program("link")
    assert policy().check_program("whatever") == "whatever"


def test_a_pattern_may_name_a_link(tmp_path):
    real = make_program(tmp_path / "real")
    os.symlink(real, tmp_path / "link")
    assert policy(executables=[str(tmp_path / "link")]).check_program(str(tmp_path / "link"))


@pytest.mark.parametrize("name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "BASH_ENV", "ENV",
                                  "PYTHONPATH", "PERL5LIB", "NODE_OPTIONS", "JAVA_TOOL_OPTIONS"])
def test_variables_that_make_a_program_another_one_are_refused(tmp_path, name):
    good = make_program(tmp_path / "good")
    rules = policy(executables=[good])
    with pytest.raises(Forbidden, match=name):
        rules.check_job("local", {"executable": good, "environment": {name: "x"}})
    rules.check_job("local", {"executable": good, "environment": {"OMP_NUM_THREADS": "4"}})
    policy().check_job("local", {"executable": "sh", "environment": {name: "x"}})


class Ask(Plugin):
    """A third party's plugin that asks the policy."""

    plugin_name = "ask"

    @post("open")
    async def open(self, request):
        allowed = self.policy.options("ask") or {}
        name = (await request.json())["name"]
        if name not in allowed.get("names", [name]):
            raise Forbidden(f"name: the policy of this edge does not allow {name!r}")
        return {"opened": name}


@pytest.fixture(params=[1, 2], ids=["wire1", "wire2"])
def governed(request, home):
    """Start an edge with a policy behind a bridge that the test plays."""
    made = []

    def make(**fields):
        bridge = HostileBridge(request.param)
        edge = Edge(bridge.url, "e1", plugins=["psij", "ask"], token="x",
                    policy=policy(**fields)).start()
        bridge.accept()
        bridge.edge = edge
        made.append(bridge)
        return bridge

    yield make
    for bridge in made:
        assert bridge.edge.stop()
        bridge.close()


def submit(bridge, spec, executor="local", **who):
    headers = {f"x-forwarded-{name}": value for name, value in who.items()}
    status, answer = bridge.ask("POST", "/psij/register_session", headers, b"{}")
    if status != 200:
        return status, answer
    return bridge.ask("POST", f"/psij/submit/{answer['sid']}", headers, json.dumps(
        {"job_spec": spec, "executor": executor}).encode())


def test_plugins_that_are_not_allowed_are_not_there(governed):
    bridge = governed(plugins=["ask"])
    assert list(bridge.registered["plugins"]) == ["ask"]
    status, answer = bridge.ask("GET", "/psij/version")
    assert status == 404 and "policy" in answer["detail"]


def test_executors_and_executables_are_checked_on_the_edge(governed, tmp_path):
    good = make_program(tmp_path / "good")
    bridge = governed(executors=["local"], executables=[good])
    assert submit(bridge, {"executable": good})[0] == 200
    for spec, executor in (({"executable": "sh"}, "local"), ({"executable": good}, "slurm"),
                           ({"executable": good, "environment": {"LD_PRELOAD": "x"}}, "local"),
                           ({"executable": good, "pre_launch": "/bin/sh"}, "local")):
        status, answer = submit(bridge, spec, executor)
        assert status == 403 and "policy" in answer["detail"], (spec, answer)


def test_scopes_and_users_are_checked_on_the_edge(governed):
    bridge = governed(scopes=["client"], users=["alice", "team-*"])
    for user, scope, status in (("alice", "client", 200), ("team-7", "client", 200),
                                ("alice", "admin", 403), ("mallory", "client", 403),
                                ("", "", 403)):
        headers = {"x-forwarded-user": user, "x-forwarded-scope": scope}
        assert bridge.ask("GET", "/ask/version", headers)[0] == status


def test_a_third_partys_plugin_asks_in_the_same_way(governed):
    bridge = governed(options={"ask": {"names": ["a"]}})
    assert bridge.ask("POST", "/ask/open", body=b'{"name": "a"}')[0] == 200
    assert bridge.ask("POST", "/ask/open", body=b'{"name": "b"}')[0] == 403


def test_roots_for_files_are_those_of_the_policy(tmp_path):
    (tmp_path / "data/in").mkdir(parents=True)
    data, inner = str(tmp_path / "data"), str(tmp_path / "data/in")
    narrow = radical_edge._narrow
    assert narrow({"a": 1}, None) == {"a": 1} and narrow({}, policy()) == {}
    assert narrow({}, policy(roots=[data])) == {"staging_roots": [data]}
    assert narrow({"staging_roots": [inner]}, policy(roots=[data])) == {"staging_roots": [inner]}
    for outside in ("/", str(tmp_path), data + "2", data + "/../x"):
        with pytest.raises(ValueError, match="policy"):
            narrow({"staging_roots": [outside]}, policy(roots=[data]))


def test_tasks_are_checked_too(tmp_path):
    import plugins
    good = make_program(tmp_path / "good")
    rules = policy(executors=["local"], executables=[good])
    plugins.check_tasks([{"backend": "local", "executable": good}], rules)
    for task in ({"backend": "dask", "executable": good}, {"backend": "local", "executable": "sh"},
                 {"backend": "local", "function": "os:system"},
                 {"backend": "local", "executable": good,
                  "task_backend_specific_kwargs": {"env": {"PATH": "/tmp"}}}):
        with pytest.raises(Forbidden):
            plugins.check_tasks([task], rules)


def test_sighup_reads_the_policy_again_and_a_bad_one_changes_nothing(start, home, tmp_path):
    path, data = tmp_path / "policy.json", tmp_path / "data"
    data.mkdir()
    (data / "in").write_text("within")
    (tmp_path / "out").write_text("outside")
    path.write_text("{}")
    both = start("--bridge", "--edge", "--name", "e1", "--port", "0", "-p", "psij,staging,sysinfo",
                 "--policy", str(path), expect="registered as e1")

    def read_again(text, expected):
        before = sum(expected in line for line in both.errors)
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        both.process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum(expected in line for line in both.errors) > before)

    def get(name, status=0):
        return run("--call", f"e1/staging/stat?path={tmp_path}/{name}", status=status)

    def submit_true(status):
        return run("--call", "e1/psij/submit/{sid}", '{"job_spec": {"executable": "/bin/true"}}',
                   status=status)

    sid = radical_edge.call("e1", "staging", "register_session", {})["sid"]
    get("out")
    submit_true(0)
    read_again(json.dumps({"plugins": ["staging", "psij"], "roots": [str(data)],
                           "executables": ["/none"]}), "the policy was read again")
    wait_until(lambda: "e1: psij, staging\n" in run("--list"))
    assert "policy" in run("--call", "e1/sysinfo/homedir", status=1)
    for text, expected in (("{,", "policy.json, line 1"), ('{"plugin": []}', "there is no such field"),
                           (None, "cannot be read")):
        read_again(text, f"not reloaded: --policy {path}" if text is None else expected)
        get("data/in")                            # what was read before counts
        assert "is outside of" in get("out", status=1)
        assert "policy" in submit_true(1)
        assert run("--list") == "e1: psij, staging\n"
    assert radical_edge.call("e1", "staging", f"list/{sid}", {"path": str(data)})["entries"]
    read_again("{}", "the policy was read again")
    wait_until(lambda: "sysinfo" in run("--list"))
    get("out")
    submit_true(0)
    assert both.end()[0] == 0


def test_edges_that_an_edge_starts_have_its_rules(monkeypatch):
    import plugins
    monkeypatch.setenv("RADICAL_EDGE_POLICY", "/owner/policy.json")
    monkeypatch.setenv("RADICAL_CLIENT_KEY", "/owner/keys")
    spec = {"executable": "python3", "arguments": ["radical_edge.py", "--edge", "--name", "c1"],
            "environment": {"RADICAL_EDGE_POLICY": "/mine", "RADICAL_CLIENT_KEY": ""}}
    child = plugins.make_child(spec, "none", radical_edge.Uplink(["http://127.0.0.1:1"], "t"))
    assert child.spec["environment"]["RADICAL_EDGE_POLICY"] == "/owner/policy.json"
    assert child.spec["environment"]["RADICAL_CLIENT_KEY"] == "/owner/keys"
    for more in (["--policy", "/mine"], ["--policy=/mine"], ["--client-key=/mine"]):
        with pytest.raises(radical_edge.Unprocessable, match="rules"):
            plugins.make_child({**spec, "arguments": spec["arguments"] + more}, "none",
                               radical_edge.Uplink(["http://127.0.0.1:1"], "t"))


def test_jobs_of_a_session_have_a_limit(governed, monkeypatch):
    monkeypatch.setattr(radical_edge, "MAX_JOBS", 1)
    bridge = governed()
    status, answer = bridge.ask("POST", "/psij/register_session", body=b"{}")
    path = f"/psij/submit/{answer['sid']}"
    body = json.dumps({"job_spec": {"executable": "true"}}).encode()
    assert bridge.ask("POST", path, body=body)[0] == 200
    status, answer = bridge.ask("POST", path, body=body)
    assert status == 429 and "1 jobs" in answer["detail"]


def test_the_doctor_says_what_the_policy_does_not_allow(home, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"plugins": ["sysinfo"]}')
    text = run("--check", "--url", "http://127.0.0.1:1", "--policy", str(path), status=1)
    assert "plugin   sysinfo: ok" in text and "psij: plugin: the policy" in text
