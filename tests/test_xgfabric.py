"""Tests of the plugin xgfabric: runs over a bridge and edges that are processes of their own.

The pilot's edge is started by psij's local executor, and by a real Slurm where tests/slurm can have
one (RADICAL_EDGE_REQUIRE=slurm: do not skip).
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import plugins
from plugins import (SensorRecord, WorkflowConfig, classify_edges, config_to_dict, dict_to_config,
                     dict_to_resource_config, make_mock_records, make_parameters,
                     parse_sensor_record, parse_seq_no)
from radical_edge import (BadRequest, BridgeClient, Call, Conflict, Edge, EdgeError, EdgeRequest,
                          NotFound, PluginHost, Unavailable, Unprocessable)
from test_edge import SCRIPT, ask, needs_module, wait_until

STEPS = plugins.WorkflowRun.STEPS
NEEDED = ["rhapsody", "staging", "sysinfo"]


# ---------------------------------------------------------------------------
# Without any edge
# ---------------------------------------------------------------------------

def test_a_configuration_comes_back_as_it_was():
    for name in ("default", "test", "__default__"):
        config = plugins.builtin_workflow(name)
        assert config_to_dict(dict_to_config(config)) == json.loads(json.dumps(config))
        resource = plugins.builtin_resource(name)
        assert dict_to_resource_config(resource).cluster_configs == resource["cluster_configs"]
    assert config_to_dict(dict_to_config({})) == config_to_dict(WorkflowConfig())


def test_unknown_fields_are_left_out_and_numbers_may_be_text():
    config = dict_to_config({"nosuch": 1, "num_simulations": "7", "batch_size": " 2 "})
    assert (config.num_simulations, config.batch_size, config.cspot_limit) == (7, 2, 10)
    resource = dict_to_resource_config({"x": 1, "cluster_configs": {"a": {"nodes": "3", "x": 1}}})
    assert resource.cluster_configs == {"a": {"nodes": 3}}


@pytest.mark.parametrize("field, value, named", [
    ("num_simulations", "seven", "num_simulations"), ("num_simulations", 0, "num_simulations"),
    ("num_simulations", True, "num_simulations"), ("num_simulations", 10 ** 9, "num_simulations"),
    ("batch_size", 0, "batch_size"), ("cspot_limit", -1, "cspot_limit"), ("name", "../x", "name"),
    ("name", ".x", "name"), ("description", 3, "description"),
    ("local_workspace", "relative", "local_workspace"),
    ("local_workspace", "/tmp/../etc", "local_workspace"), ("train_models", "pcr", "train_models"),
    ("train_models", ["a/b"], r"train_models\[0\]"), ("simulation_task", {}, "simulation_task"),
    ("simulation_task", {"executable": "x", "arguments": "a b"}, "simulation_task.arguments"),
    ("simulation_task", {"executable": "x", "arguments": ["{nosuch}"]},
     r"simulation_task.arguments\[0\].*\{nosuch\}.*sim_id"),
    ("simulation_task", {"executable": "{sim_id.__class__}"}, "simulation_task.executable"),
    ("simulation_task", {"executable": "{sim_id:999999999}"}, "simulation_task.executable"),
    ("simulation_task", {"executable": "{sim_id!r}"}, "simulation_task.executable"),
    ("simulation_task", {"executable": "{"}, "simulation_task.executable"),
    ("training_tasks", {"pcr": {"executable": "{sensor_file}"}}, "training_tasks.pcr.executable"),
    ("evaluation_task", {"executable": ""}, "evaluation_task"),
    ("mock_sensor_data", "yes", "mock_sensor_data")])
def test_a_bad_value_is_refused_and_named(field, value, named):
    with pytest.raises(Unprocessable, match=named):
        dict_to_config({field: value})


@pytest.mark.parametrize("cluster, named", [
    ({"duration": "soon"}, "cluster_configs.a.duration"), ({"nodes": 0}, "cluster_configs.a.nodes"),
    ({"cluster_type": "big"}, "immediate, allocate"), ("x", "cluster_configs.a")])
def test_a_bad_cluster_is_refused_and_named(cluster, named):
    with pytest.raises(Unprocessable, match=named):
        dict_to_resource_config({"cluster_configs": {"a": cluster}})


SENSPOT_LINES = {                                # what senspot-get prints: the reading or None
    "3.2:2.9:180.0 time: 1718000000.250000 128.111.45.61 seq_no: 42\n":
        ("2024-06-10T06:13:20Z", 3.2, 2.9, 180.0),
    "100:50:359.5 time: 1718000000": ("2024-06-10T06:13:20Z", 44.704, 22.352, 359.5),
    "-1.5:0:0\ntime: 0": ("1970-01-01T00:00:00Z", -1.5, 0.0, 0.0),
    "": None, "no such woof": None, "1.2.3:4:5 time: 1": None, "nan:1:2 time: 3": None,
    "1:2 time: 3": None, "1:2:3 seq_no: 4": None, "1e999:2:3 time: 4": None,
    "1:2:3 time: 99999999999999": None}


@pytest.mark.parametrize("text", SENSPOT_LINES)
def test_readings_are_parsed_and_nonsense_is_none(text):
    expected = SENSPOT_LINES[text]
    assert parse_sensor_record(text) == (expected and SensorRecord(*expected))


def test_the_last_number_is_found():
    assert parse_seq_no("1:2:3 time: 5 host seq_no: 4711\n") == 4711
    assert parse_seq_no("seq_no: -1") is parse_seq_no("") is None


def test_simulations_are_spread_evenly_over_the_readings():
    records = make_mock_records(4, 1718000000)
    assert len(records) == 8 and records[-1].dt == "2024-06-10T06:13:20Z"
    assert [record.windspeed for record in records[:3]] == [2.0, 2.5, 3.0]
    assert make_parameters(records, 3) == [(2.0, 0.0, 0), (3.75, 0.0, 1), (5.5, 0.0, 2)]
    assert make_parameters(records, 1) == [(2.0, 0.0, 0)]
    calm = [SensorRecord("", 0.5, 0, 0), SensorRecord("", 30.0, 0, 0)]
    with pytest.raises(EdgeError, match="wind speed"):
        make_parameters(calm, 3)


def test_edges_are_classified_by_configuration_name_and_queue():
    edges = {"z": {"plugins": NEEDED}, "a": {"plugins": NEEDED}, "only": {"plugins": ["xgfabric"]},
             "slurm": {"plugins": [*NEEDED, "psij", "queue_info"]},
             "slurm.1": {"plugins": NEEDED}, "ucsb-1": {"plugins": [*NEEDED, "queue_info"]},
             "forced": {"plugins": [*NEEDED, "psij"]}, "half": {"plugins": ["queue_info"]}}
    immediate, allocate = classify_edges(edges, {})
    assert [cluster["name"] for cluster in immediate] == ["a", "forced", "ucsb-1", "z"]
    assert [cluster["name"] for cluster in allocate] == ["slurm"]
    immediate, allocate = classify_edges(edges, {
        "z": {"workflow_path": "~/x"}, "forced": {"cluster_type": "allocate"}, "gone": {},
        "slurm": {"cluster_type": "immediate", "has_gpu": True}})
    assert [cluster["name"] for cluster in immediate] == ["z", "slurm", "a", "ucsb-1"]
    assert immediate[0]["workflow_path"] == "~/x" and immediate[1]["has_gpu"] is True
    assert [cluster["edge_name"] for cluster in allocate] == ["forced"]


def test_a_pilot_asks_the_queue_for_what_is_configured():
    cluster = {"queue": "gpu", "account": "abc", "nodes": 2,
               "custom_attributes": {"slurm.qos": "q"}}
    spec = plugins.make_pilot_spec(cluster, "e.1", "slurm")
    assert spec["arguments"][:2] == ["--name", "e.1"]
    assert spec["attributes"] == {"duration": 3600, "queue_name": "gpu", "node_count": 2,
                                  "account": "abc", "custom_attributes": {"slurm.qos": "q"}}
    assert plugins.make_pilot_spec({}, "e.1", "pbs")["attributes"]["queue_name"] == "regular"
    assert plugins.make_pilot_spec(cluster, "e.1", "local")["attributes"] == {"duration": 3600}


def test_a_workspace_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EdgeError, match="not a directory of ours"):
        plugins.open_workspace(str(tmp_path / "link"))
    (tmp_path / "file").touch()
    with pytest.raises(EdgeError, match="local_workspace"):
        plugins.open_workspace(str(tmp_path / "file"))


def test_a_senspot_that_hangs_ends_with_the_run(tmp_path, monkeypatch):
    program = tmp_path / "senspot-get"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 1000 & sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("SENSPOT_PATH", str(program))
    record = plugins.RunRecord(tmp_path / "run.json", {"state": {}, "run": "r"}, lambda _told: None)
    for url in ("file:///etc/passwd", "-S"):
        with pytest.raises(Unprocessable, match="cspot_woof_url"):
            plugins.Senspot(url, record)
    senspot = plugins.Senspot("woof://127.0.0.1/x", record)
    monkeypatch.setattr(plugins, "SENSPOT_S", 0.5)
    assert senspot.read(3) is None
    monkeypatch.setattr(plugins, "SENSPOT_S", 60)
    stopper = threading.Timer(0.5, record.stop, kwargs={"cancel": True})
    stopper.start()
    with pytest.raises(plugins.RunStopped):
        senspot.read_last()
    stopper.join()
    wait_until(lambda: not group_lives(int((tmp_path / "pid").read_text())))
    monkeypatch.setenv("SENSPOT_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EdgeError, match="senspot-get.*SENSPOT_PATH"):
        plugins.Senspot("woof://127.0.0.1/x", record)


def group_lives(group):
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[2] == str(group) and fields[0] not in "ZX":
                return True
    return False


# ---------------------------------------------------------------------------
# Configurations, through the bridge
# ---------------------------------------------------------------------------

@pytest.fixture
def client(bridge, tokens):
    with BridgeClient(bridge.url, token=tokens[1]["client"]) as made:
        yield made


@pytest.fixture
def fabric(bridge, tokens, client, tmp_path):
    """A client of xgfabric with a session whose working directory is tmp_path/work."""
    (tmp_path / "work").mkdir()
    edge = Edge(bridge.url, "fabric", plugins=["xgfabric"], token=tokens[1]["edge"]).start()
    wait_until(lambda: "fabric" in bridge._registry.links)
    xgfabric = client.get_edge_client("fabric").get_plugin("xgfabric",
                                                           workdir=str(tmp_path / "work"))
    yield xgfabric
    xgfabric.close()
    assert edge.stop()


def test_configurations_are_saved_listed_loaded_and_deleted(fabric, tmp_path):
    assert fabric.get_workdir() == {"path": str(tmp_path / "work")}
    assert fabric.list_configs() == []
    config = {**fabric.get_test_config(), "name": "mine", "description": "my own"}
    assert fabric.save_config(config) == {"status": "saved", "name": "mine"}
    site = {"name": "a-site", "cluster_configs": {"anvil": {"queue": "wide"}}}
    fabric.save_config(site)
    assert [(item["name"], item["description"]) for item in fabric.list_configs()] == \
        [("a-site", ""), ("mine", "my own")]
    assert fabric.load_config("mine") == fabric.load_config("mine.json") == config
    assert fabric.load_config(str(tmp_path / "work/configs/mine")) == config
    assert fabric.load_config("a-site")["cluster_configs"] == site["cluster_configs"]
    assert fabric.delete_config("mine") == {"status": "deleted", "name": "mine"}
    for function in (fabric.load_config, fabric.delete_config):
        with pytest.raises(NotFound, match="mine"):
            function("mine")
    assert fabric.get_default_config()["num_simulations"] == 16
    assert fabric.load_config("__default__") == fabric.get_default_config()


@pytest.mark.parametrize("name", ["../evil", "../../tmp_evil", "/etc/passwd", "a/b", "..", ".", "",
                                  ".hidden", "a\0b", "~/x", "x" * 65])
def test_names_that_leave_the_directory_are_refused(fabric, tmp_path, name):
    with pytest.raises(EdgeError) as caught:
        fabric.save_config({"name": name})
    assert caught.value.status == 422
    for function in (fabric.load_config, fabric.delete_config, fabric.start_workflow):
        if name or function != fabric.start_workflow:            # empty: the default
            with pytest.raises(EdgeError) as caught:
                function(name)
            assert caught.value.status in (400, 404, 422), caught.value
    assert sorted(path.name for path in (tmp_path / "work").rglob("*")) in ([], ["configs"])


def test_a_link_out_of_the_directory_is_not_followed(fabric, tmp_path):
    (tmp_path / "secret.json").write_text('{"name": "secret"}')
    (tmp_path / "work/configs").mkdir()
    (tmp_path / "work/configs/link.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(tmp_path / "work/configs/pipe.json")
    (tmp_path / "work/configs/broken.json").write_text("{")
    for name in ("link", "pipe", "broken"):
        with pytest.raises(EdgeError):
            fabric.load_config(name)
    assert fabric.list_configs() == []
    fabric.save_config({"name": "link"})          # takes the link's place, not its target's
    assert (tmp_path / "secret.json").read_text() == '{"name": "secret"}'


def test_bad_requests_are_the_callers_mistake(fabric, tmp_path):
    for name in ("default", "test", "__default__"):
        with pytest.raises(Unprocessable, match="builtin"):
            fabric.save_config({"name": name})
    with pytest.raises(Unprocessable, match="num_simulations"):
        fabric.save_config({"name": "x", "num_simulations": "seven"})
    with pytest.raises(BadRequest, match="not a directory"):
        fabric.set_workdir(str(tmp_path / "nosuch"))
    with pytest.raises(Unprocessable, match="path"):
        fabric._post(f"workdir/{fabric.sid}", {})
    with pytest.raises(Conflict, match="no workflow"):
        fabric.stop_workflow()
    with pytest.raises(NotFound, match="nosuch"):
        fabric.start_workflow("nosuch")
    with pytest.raises(NotFound, match="nosuch"):
        fabric.start_workflow("test", "nosuch")
    fabric.save_config({"name": "empty"})
    with pytest.raises(Unprocessable, match="simulation_task"):
        fabric.start_workflow("empty")
    with pytest.raises(Unprocessable, match="bridge_url"):       # it would get the edge's token
        fabric.register_session(bridge_url="http://127.0.0.1:1")
    assert fabric.set_workdir(str(tmp_path))["path"] == str(tmp_path)
    assert fabric.get_status()["config_dir"] == str(tmp_path / "configs")
    assert fabric.get_status()["status"] == "idle"


@pytest.fixture
def slow_start(monkeypatch):
    """Hold a run that is being written down: (event: it is, event that lets it go on)."""
    writing, go_on, prepare = threading.Event(), threading.Event(), plugins.XGFabricSession._prepare

    def slowly(*arguments):
        writing.set()
        assert go_on.wait(30)
        prepare(*arguments)

    monkeypatch.setattr(plugins.XGFabricSession, "_prepare", slowly)
    return writing, go_on


def test_a_run_that_is_just_being_written_down_can_be_stopped(fabric, slow_start):
    # it was a 500: there was no run yet that could be told
    writing, go_on = slow_start
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(fabric.start_workflow("test")))]
    threads[0].start()
    assert writing.wait(30)
    threads.append(threading.Thread(target=lambda: answers.append(fabric.stop_workflow())))
    threads[1].start()
    threading.Timer(0.3, go_on.set).start()
    for thread in threads:
        thread.join(60)
    assert sorted(answer["status"] for answer in answers) == ["started", "stopped"]
    assert fabric.get_status()["status"] in ("cancelled", "failed")


def test_a_run_whose_client_goes_away_while_it_is_written_down_begins(home, tmp_path, slow_start):
    # it said that it was running for ever, and began when the edge was started anew
    writing, go_on = slow_start
    host = PluginHost("e1", "edge", home / "state", notify=lambda *_: None, changed=lambda: None,
                      bridge_url="http://127.0.0.1:9")
    host.add(plugins.PluginXGFabric)
    try:
        sid = ask(host, "POST", "/xgfabric/register_session", {"workdir": str(tmp_path)})[1]["sid"]
        call = Call(EdgeRequest("1", "POST", f"/xgfabric/start/{sid}", {}, b'{"workflow": "test"}'))
        answers = []
        call.respond = answers.append
        host.dispatch(call)
        assert writing.wait(30)
        call.cancel()
        wait_until(lambda: answers)               # the handler was told
        go_on.set()
        state = wait_until(lambda: next((found for found in [
            ask(host, "GET", f"/xgfabric/status/{sid}")[1]] if found["end_time"]), None), 60)
        assert state["status"] == "failed" and state["config_name"] == "test"
    finally:
        assert host.stop()


def test_without_a_clients_token_a_run_says_what_to_do(fabric, tokens, home):
    for token in ("edge", "nothing that is known", None):
        path = home / ".radical/edge/token"
        path.unlink(missing_ok=True)
        if token:
            path.write_text(tokens[1].get(token, token))
            path.chmod(0o600)
        assert fabric.start_workflow("test")["status"] == "started"
        state = fabric.wait_workflow(30)
        assert state["status"] == "failed"
        assert "--token add NAME" in state["error"] and "client-token" in state["error"]
    path = home / ".radical/edge/client-token"
    path.write_text(tokens[1]["client"])
    path.chmod(0o644)
    fabric.start_workflow("test")
    assert "can be read by others" in fabric.wait_workflow(30)["error"]
    path.chmod(0o600)
    fabric.start_workflow("test")
    state = fabric.wait_workflow(30)
    assert "No immediate cluster is connected" in state["error"]
    assert (state["status"], state["phase"]) == ("failed", "verifying")


# ---------------------------------------------------------------------------
# Runs, over edges that are processes with homes of their own
# ---------------------------------------------------------------------------

HOOKS = '''
"""Kills or holds the edge at a moment of a run that a file in XG_HOOKS names: kill-STEP-MOMENT."""
import os, signal, sys
from pathlib import Path
import radical_edge

radical_edge.load_builtin_plugins()
plugins = sys.modules.get("radical_edge_plugins") or sys.modules["plugins"]
folder, counts = Path(os.environ["XG_HOOKS"]), {}

def where(record):
    return "ending" if record.data["ending"] else record.data["step"]

def reach(record, moment):
    try:
        (folder / f"kill-{where(record)}-{moment}").unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

def hold(record, step):
    while (folder / f"hold-{step}").exists():
        (folder / f"reached-{step}").touch()
        record.pause(0.02)

def wrap_step(step):
    original = getattr(plugins.WorkflowRun, f"_do_{step}")
    def wrapped(self):
        reach(self.record, "begin")
        hold(self.record, step)
        original(self)
    setattr(plugins.WorkflowRun, f"_do_{step}", wrapped)

def persist(self, function, edge=""):
    step = where(self._record)
    number = counts[step] = counts.get(step, 0) + 1              # of this process
    reach(self._record, f"before-{number}")
    result = original_persist(self, function, edge)
    reach(self._record, f"after-{number}")
    return result

for step in plugins.WorkflowRun.STEPS:
    wrap_step(step)
original_persist, plugins.OtherEdges._persist = plugins.OtherEdges._persist, persist
'''


DELAY = """
import os, time
with open("/proc/self/cmdline") as file:
    is_pilot = "queue." in file.read()            # queue.1, or another name while that is taken
while is_pilot and os.path.exists(os.path.join(os.environ["HOME"], "hold-pilot")):
    time.sleep(0.05)
"""


class Sites:
    """Edges as processes, each with a home of its own below `folder`."""

    def __init__(self, bridge, tokens, folder, cluster=None):
        self._bridge, self._tokens, self.folder = bridge, tokens[1], folder
        self.slurm = cluster                      # None: pilots are local jobs
        self._edges = {}                          # by name: the process
        self.hooks = folder / "hooks"
        self.hooks.mkdir()

    def home(self, name):
        path = self.folder / f"home-{name}"
        path.mkdir(exist_ok=True)
        return path

    def start(self, name, wanted, *arguments, **environment):
        """Start an edge and return once it is connected."""
        command = [sys.executable, SCRIPT, "--edge", "--url", self._bridge.url, "--name", name,
                   "-p", wanted, *arguments]
        environment = {**os.environ, "HOME": str(self.home(name)), "XG_HOOKS": str(self.hooks),
                       "RADICAL_BRIDGE_TOKEN": self._tokens["edge"], **environment}
        with open(self.folder / f"{name}.log", "ab") as output:
            self._edges[name] = subprocess.Popen(command, env=environment, stdout=output,
                                                 stderr=output, cwd=str(self.home(name)))
        wait_until(lambda: name in self._bridge._registry.links or self.is_dead(name), 30)

    def start_fabric(self, wanted="xgfabric"):
        """Start the edge that runs workflows, with hooks and with a client's token."""
        token = self.home("fabric") / ".radical/edge/client-token"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(self._tokens["client"])
        token.chmod(0o600)
        (self.folder / "hooks.py").write_text(HOOKS)
        self.start("fabric", wanted, "--plugin-file", str(self.folder / "hooks.py"))

    def is_dead(self, name):
        return self._edges[name].poll() is not None

    def end(self, name):
        process = self._edges.pop(name)
        process.kill()
        process.wait()

    def end_all(self):
        for name in list(self._edges):
            self.end(name)

    def list_extra(self):
        """Return the command lines of all processes below the homes, but for the edges started."""
        known = {process.pid for process in self._edges.values()}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                homes = f"HOME={self.folder}/home-".encode()
                if int(path.name) not in known and homes in (path / "environ").read_bytes() and \
                        (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.append((path / "cmdline").read_bytes().replace(b"\0", b" ")[:200])
        return found

    def read_ran(self, name):
        """Return what tasks have written to the file `ran` of an edge's home."""
        path = self.home(name) / "ran"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def read_status(self):
        """Return the status of the run, from its record: the edge may be dead."""
        path, = self.home("fabric").glob(".radical/edge/state/fabric/xgfabric/runs/session*.json")
        return json.loads(path.read_text())["state"]["status"]

    def logs(self):
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}"
                         for path in self.folder.glob("*.log"))


def make_quick(folder):
    """Return a workflow whose tasks note that they ran, and wait while HOME has a file `hold`."""
    def task(label, end="echo done"):
        wait = 'while [ -e "$HOME/hold" ]; do sleep 0.05; done'
        return {"executable": "/bin/sh",
                "arguments": ["-c", f'echo {label} >> "$HOME/ran"; {wait}; {end}']}
    slow = 'if [ -e "$HOME/hold-{sim_id}" ]; then sleep 600; fi; echo 1 2 3 {sim_id}'
    return {"name": "quick", "local_workspace": str(folder / "space"), "num_simulations": 4,
            "batch_size": 2, "train_models": ["pcr", "none"], "mock_sensor_data": True,
            "simulation_task": task("sim {sim_id}", slow),
            "training_tasks": {"pcr": task("training {model}")},
            "evaluation_task": task("evaluation")}


def make_resources(sites):
    """Return resources in which `works` runs simulations and `queue` has what starts pilots."""
    queue = {"queue": "debug", "nodes": 1} if sites.slurm else {"executor": "local",
                                                                "cluster_type": "allocate"}
    return {"name": "sites", "cluster_configs": {
        "works": {"cluster_type": "immediate", "workflow_path": "~/flow", "backend": "local"},
        "queue": {"workflow_path": "~/flow", "backend": "local", "duration": 600, **queue}}}


BOTH = pytest.mark.parametrize("sites", ["local", "slurm"], indirect=True)


@pytest.fixture
def sites(request, bridge, tokens, tmp_path):
    """Three edges: fabric, works, and queue, of which pilots are local jobs or those of Slurm."""
    cluster = None
    if getattr(request, "param", "local") == "slurm":
        cluster = request.getfixturevalue("slurm")
        needs_module("psij")
    made = Sites(bridge, tokens, tmp_path, cluster)
    made.start("works", "sysinfo,staging,rhapsody")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(DELAY)
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    if cluster is None:
        made.start("queue", "sysinfo,psij", **environment)
    else:
        made.start("queue", "sysinfo,psij,queue_info", **environment, SLURM_CONF=cluster.conf,
                   PATH=cluster.env["PATH"])
    made.start_fabric()
    yield made
    made.end_all()
    wait_until(lambda: not made.list_extra(), 20, f"the end of {made.list_extra()}")


@pytest.fixture
def run(sites, client, tmp_path):
    """A client of xgfabric with the configurations `quick` and `sites`."""
    (tmp_path / "work").mkdir()
    xgfabric = client.get_edge_client("fabric").get_plugin("xgfabric",
                                                           workdir=str(tmp_path / "work"))
    xgfabric.save_config(make_quick(tmp_path))
    xgfabric.save_config(make_resources(sites))
    return xgfabric


def assert_clean(sites, client):
    """Nothing of a run is left: no process, no session, no job."""
    wait_until(lambda: not sites.list_extra(), 60, f"the end of {sites.list_extra()}")
    for route in ("works/rhapsody", "works/staging", "queue/psij"):
        assert client.http.get(f"/{route}/list_sessions").json()["sessions"] == [], route
    if sites.slurm:
        wait_until(lambda: not sites.slurm.run("squeue", "-h"), 60, "an empty queue")


def hold_second_batch(sites):
    """Let the pilot's edge come once the second batch runs on `works`, where it never ends."""
    for number in (2, 3):
        (sites.home("works") / f"hold-{number}").touch()
    (sites.home("queue") / "hold-pilot").touch()


def let_pilot_come(sites):
    wait_until(lambda: "sim 3" in sites.read_ran("works"), 60, sites.logs())
    (sites.home("queue") / "hold-pilot").unlink()


def explain(sites, state):
    return json.dumps(state, indent=1) + sites.logs()


def list_results(sites, name):
    return {path.name: path.read_text()
            for path in (sites.home(name) / "flow/simulations").glob("*")}


@BOTH
def test_a_run_moves_to_the_pilots_edge_when_it_comes(sites, run, client, tmp_path):
    told = []
    run.register_notification_callback(lambda *change: told.append(change[3]), "workflow_status")
    hold_second_batch(sites)
    assert run.start_workflow("quick", "sites") == {"status": "started", "config": "quick"}
    with pytest.raises(Conflict, match="running already"):
        run.start_workflow("quick", "sites")
    let_pilot_come(sites)
    state = run.wait_workflow(120)
    assert (state["status"], state["phase"], state["progress"], state["error"]) == \
        ("completed", "done", 100, None), explain(sites, state)
    assert sorted(sites.read_ran("works")) == [f"sim {number}" for number in range(4)]
    assert sorted(sites.read_ran("queue")) == ["evaluation", "sim 2", "sim 3", "training pcr"]
    results = list_results(sites, "queue")
    assert sorted(results.values()) == [f"1 2 3 {number}\n" for number in range(4)]
    assert sorted(results) == sorted(plugins.result_name(*item) for item in make_parameters(
        make_mock_records(4, 0), 4))
    assert len(list_results(sites, "works")) == 2
    for name in ("works", "queue"):
        lines = (sites.home(name) / "flow/data/sensor_out.csv").read_text().splitlines()
        assert lines[0] == "dt,windspeed,windavg,winddir" and len(lines) == 9
    assert (state["active_cluster"], state["completed_simulations"]) == ("queue", 4)
    assert list(state["pilot_jobs"]) == ["queue"] and state["end_time"] > state["start_time"]
    assert_clean(sites, client)
    assert not list((tmp_path / "space/staging").iterdir())

    wait_until(lambda: told[-1].get("status") == "completed")
    phases = [change["phase"] for change in told if not change["delta"]]
    assert list(dict.fromkeys(phases)) == [
        "connecting", "verifying", "data_acquisition", "pilot_submit", "staging", "simulations",
        "migration_check", "migration", "training", "evaluation", "done"]
    assert all("immediate_clusters" in change for change in told if not change["delta"])
    assert all("config_name" not in change for change in told if change["delta"])
    progress = [change["progress"] for change in told]
    assert progress == sorted(progress) and progress[-1] == 100
    run.close()


@BOTH
def test_a_run_goes_on_after_kill_9_in_every_step(sites, run, client):
    hold_second_batch(sites)
    moments = [f"kill-{step}-{moment}" for step in (*STEPS, "ending")
               for moment in ("begin", "before-1", "after-1", "after-2")]
    for moment in moments:
        (sites.hooks / moment).touch()
    with contextlib.suppress(Unavailable):        # the first kill may come before the answer
        run.start_workflow("quick", "sites")
    kills, end = 0, time.monotonic() + 400
    while True:
        assert time.monotonic() < end, sites.logs()
        if sites.is_dead("fabric"):
            kills += 1
            sites.start_fabric()
        if "sim 3" in sites.read_ran("works"):
            (sites.home("queue") / "hold-pilot").unlink(missing_ok=True)
        if sites.read_status() != "running":
            break
        time.sleep(0.02)
    state = run.get_status()
    assert (state["status"], state["error"]) == ("completed", None), explain(sites, state)
    left = {path.name for path in sites.hooks.glob("kill-*")}
    for step in STEPS:                            # every step was begun, and cut off where it calls
        assert f"kill-{step}-begin" not in left
    for step in ("connecting", "verifying", "pilot_submit", "staging", "simulations",
                 "migration", "remaining_simulations", "training", "evaluation", "ending"):
        assert not {f"kill-{step}-before-1", f"kill-{step}-after-1"} & left, (step, left)
    assert kills == len(moments) - len(left) > 25
    assert sorted(sites.read_ran("works")) == [f"sim {number}" for number in range(4)]
    assert sorted(sites.read_ran("queue")) == ["evaluation", "sim 2", "sim 3", "training pcr"]
    assert len(list_results(sites, "queue")) == 4
    assert len(list((sites.home("queue") / ".radical/edge/state/queue/psij/jobs").glob("*"))) <= 1
    assert_clean(sites, client)


def test_a_run_whose_tasks_are_on_its_own_edge_goes_on_after_kill_9(sites, run, client):
    everything = "xgfabric,rhapsody,staging,sysinfo"
    sites.end("fabric")
    sites.start_fabric(everything)
    run.save_config({"name": "own", "cluster_configs": {
        "fabric": {"cluster_type": "immediate", "workflow_path": "~/flow", "backend": "local"}}})
    hold = sites.home("fabric") / "hold"
    hold.touch()
    run.start_workflow("quick", "own")
    wait_until(lambda: "sim 0" in sites.read_ran("fabric"), 60, sites.logs())
    sites.end("fabric")
    hold.unlink()
    sites.start_fabric(everything)                # the tasks' session opens while the run asks
    state = run.wait_workflow(120)
    assert (state["status"], state["error"]) == ("completed", None), explain(sites, state)
    assert sorted(sites.read_ran("fabric")) == [
        "evaluation", *(f"sim {number}" for number in range(4)), "training pcr"]
    wait_until(lambda: not sites.list_extra(), 60, f"the end of {sites.list_extra()}")


@BOTH
def test_a_run_is_cancelled_in_every_step_and_nothing_is_left(sites, run, client):
    for step in STEPS:
        (sites.hooks / f"hold-{step}").touch()
        hold_second_batch(sites)
        run.start_workflow("quick", "sites")
        if STEPS.index(step) > STEPS.index("simulations"):
            let_pilot_come(sites)
        wait_until((sites.hooks / f"reached-{step}").exists, 60, f"{step}: {sites.logs()}")
        assert run.stop_workflow() == {"status": "stopped"}
        state = run.get_status()
        assert (state["status"], state["error"]) == ("cancelled", None), explain(sites, state)
        assert state["end_time"] and state["message"] == "cancelled by the user"
        assert_clean(sites, client)
        (sites.hooks / f"hold-{step}").unlink()
        (sites.home("works") / "ran").unlink(missing_ok=True)
    with pytest.raises(Conflict):
        run.stop_workflow()


@pytest.mark.parametrize("edge, line", [("works", "sim 1"), ("queue", "training pcr"),
                                        ("queue", "evaluation")])
def test_a_run_is_cancelled_while_tasks_run_and_they_end(sites, run, client, edge, line):
    hold = sites.home(edge) / "hold"
    hold_second_batch(sites)
    if line == "sim 1":
        hold.touch()
    run.start_workflow("quick", "sites")
    if edge == "queue":
        (sites.hooks / "hold-training").touch()   # until no simulation runs that would wait, too
        let_pilot_come(sites)
        wait_until((sites.hooks / "reached-training").exists, 60, sites.logs())
        hold.touch()
        (sites.hooks / "hold-training").unlink()
    if line == "evaluation":
        wait_until(lambda: "training pcr" in sites.read_ran("queue"), 60)
        (sites.hooks / "hold-evaluation").touch()
        hold.unlink()
        wait_until((sites.hooks / "reached-evaluation").exists, 60)
        hold.touch()
        (sites.hooks / "hold-evaluation").unlink()
    wait_until(lambda: line in sites.read_ran(edge), 60, sites.logs())
    assert run.stop_workflow() == {"status": "stopped"}
    assert run.get_status()["status"] == "cancelled"
    assert_clean(sites, client)
    hold.unlink()
    if line == "sim 1":                           # the session is free for another run
        (sites.home("works") / "ran").unlink()
        assert run.start_workflow("quick", "sites")["status"] == "started"
        let_pilot_come(sites)
        assert run.wait_workflow(120)["status"] == "completed"
        assert_clean(sites, client)


def test_failed_simulations_are_told_and_do_not_stop_a_run_but_all_of_them_do(sites, run, client,
                                                                              tmp_path):
    task = {"executable": "/bin/sh", "arguments": ["-c", "echo oh no >&2; exit {sim_id}"]}
    only = {"name": "only", "cluster_configs": {"works": {"workflow_path": "~/flow",
                                                          "backend": "local"}}}
    config = {**make_quick(tmp_path), "name": "some", "simulation_task": task}
    run.save_config(config)
    run.save_config({**config, "name": "all", "simulation_task": {
        "executable": "/bin/sh", "arguments": ["-c", "echo oh no >&2; exit 3"]}})
    run.save_config({**config, "name": "untrained", "training_tasks": {
        "pcr": {"executable": "/nosuch/program"}}})
    run.save_config(only)
    run.start_workflow("some", "only")
    state = run.wait_workflow(60)
    assert (state["status"], state["completed_simulations"]) == ("completed", 4)
    assert "FAILED sim" in state["error"] and "oh no" in state["error"], state
    assert len(list_results(sites, "works")) == 1
    run.start_workflow("all", "only")
    state = run.wait_workflow(60)
    assert state["status"] == "failed" and "All 4 simulations failed" in state["error"]
    assert "exit=3" in state["error"]
    run.start_workflow("untrained", "only")
    state = run.wait_workflow(60)
    assert state["status"] == "failed" and "FAILED training.pcr" in state["error"]
    assert_clean(sites, client)


SENSPOT = '''#!{python}
"""Stands in for senspot-get: the station's records 0 to 20, of which some are no good."""
import sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["-W"].startswith("woof://"), options
number = int(options.get("-S", 20))
if number % 4 == 1:
    sys.exit("no such record")
speed = 20.0 if number % 4 == 2 else 3.0 + number / 10
unit = "66.5:60.0" if number == 16 else f"{{speed:.2f}}:{{speed - 0.5:.2f}}"
print(f"{{unit}}:{{90 + number}}.0 time: {{1718000000 + 300 * number}}.250000 "
      f"128.111.45.61 seq_no: {{number}}")
'''


def test_the_default_workflow_runs_as_it_is_with_a_real_parser(sites, client, tmp_path):
    senspot = tmp_path / "bin/senspot-get"
    senspot.parent.mkdir()
    senspot.write_text(SENSPOT.format(python=sys.executable))
    senspot.chmod(0o755)
    sites.end("fabric")
    os.environ["SENSPOT_PATH"] = str(senspot)     # of the edge; the fixture `home` restores nothing
    try:
        sites.start_fabric()
    finally:
        del os.environ["SENSPOT_PATH"]
    base = sites.home("works") / plugins.DEFAULT_WORKFLOW_PATH[2:]
    simulate = ('#!/bin/sh\nmkdir -p "$6"\n'
                'echo "$2 $3 $7" > "$6/sim_$8_ws_$3_wd_$9.csv"\n')
    programs = {"simulation/runme.sh": simulate,
                "training/pcr/train_pcr.sh": '#!/bin/sh\nls "$1" "$3" && mkdir -p "$5"\n',
                "training/pinn/train_pinn.py": "import os, sys; os.makedirs(sys.argv[4])\n",
                "training/fno/train_fno.py": "import os, sys; os.makedirs(sys.argv[4])\n",
                "evaluation/evaluate.py": "import os, sys; open(sys.argv[1]); "
                                          "assert os.path.isdir(sys.argv[2])\n"}
    for name, text in programs.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
        (base / name).chmod(0o755)
    with contextlib.closing(client.get_edge_client("fabric").get_plugin("xgfabric")) as run:
        run.start_workflow()
        state = run.wait_workflow(180)
        assert (state["status"], state["error"]) == ("completed", None), explain(sites, state)
    assert state["completed_simulations"] == 16 and state["config_name"] == "default"
    assert sorted(path.name for path in (base / "models").iterdir()) == ["fno", "pcr", "pinn"]
    assert len(list((base / "simulations").iterdir())) == 16
    rows = (base / "data/sensor_out.csv").read_text().splitlines()[1:]
    assert len(rows) == 9 and rows[0].startswith("2024-06-10T07:53:20Z,5.0,4.5,110.0")
    assert any(",29.7282,26.8224,106.0" in row for row in rows)    # miles per hour
    shutil.rmtree("/tmp/xgfabric_workspace", ignore_errors=True)  # another suite may use it, too


def test_the_test_workflow_moves_into_an_allocation(sites, run, client):
    check_test_workflow(sites, run, client)


@pytest.mark.parametrize("sites", ["slurm"], indirect=True)
def test_the_test_workflow_moves_into_an_allocation_of_slurm(sites, run, client):
    check_test_workflow(sites, run, client)
    state = run.get_status()
    assert state["pilot_jobs"]["queue"]
    shown = sites.slurm.run("sacct", "-X", "-n", "-P", "-o", "State,Partition,NNodes")
    assert shown.splitlines()[-1].startswith("CANCELLED") and shown.rstrip().endswith("|debug|1")


def check_test_workflow(sites, run, client):
    """Run `test` as it is; its simulations end before the pilot's edge is waited for."""
    (sites.hooks / "hold-migration_check").touch()
    (sites.home("queue") / "hold-pilot").touch()
    run.start_workflow("test", "sites")
    wait_until((sites.hooks / "reached-migration_check").exists, 90, sites.logs())
    (sites.home("queue") / "hold-pilot").unlink()
    wait_until(lambda: "queue.1" in client.list_edges(), 90, sites.logs())
    (sites.hooks / "hold-migration_check").unlink()
    state = run.wait_workflow(120)
    assert (state["status"], state["error"]) == ("completed", None), explain(sites, state)
    assert (state["active_cluster"], state["completed_simulations"]) == ("queue", 4)
    assert (state["current_batch"], state["total_batches"]) == (2, 2)
    assert list(list_results(sites, "queue").values()) == ["1 2 3 4\n"] * 4
    assert_clean(sites, client)
    shutil.rmtree("/tmp/xgfabric_workspace", ignore_errors=True)  # another suite may use it, too
