"""Tests of the plugin queue_info that need no scheduler: recorded output of Slurm 24.11 and 22.05
and documented output of PBS, stand-in programs that misbehave, routes over a bridge and an edge.

Against a real Slurm: tests/test_slurm_queues.py.
"""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

import plugins
from plugins import QueueInfoPBS, QueueInfoSlurm
from radical_edge import BridgeClient, Edge, EdgeError, PluginHost
from slurm_cluster import check_job
from test_edge import SCRIPT, ask, wait_until

FIXTURES = Path(__file__).resolve().parent / "slurm/fixtures"
VERSIONS = ("24.11", "22.05")
CLUSTER_STATES = ("idle", "busy", "drain", "down", "not-responding")


@functools.lru_cache(maxsize=None)
def recorded(version):
    """Return {file: text} of what the programs of that version printed."""
    with tarfile.open(FIXTURES / f"{version}.tar.gz") as archive:
        return {member.name.split("/", 1)[1]: archive.extractfile(member).read().decode()
                for member in archive if member.isfile()}


def recorded_json(version, name):
    return json.loads(recorded(version)[f"{name}.json"])


def scontrol_lines(version, name):
    """Return [{key: value}] of `scontrol -o show ...`; names of jobs may hold newlines."""
    rows = re.split(r"(?m)^(?=JobId=|NodeName=|PartitionName=)", recorded(version)[f"{name}.txt"])
    return [dict(re.findall(r"(\w[\w:/.]*)=(\S*)", row)) for row in rows if row]


def parsed_queues(version, state, nodes):
    text = recorded(version)[f"scontrol-partitions-{state}-text.txt"]
    return plugins._queues(plugins.parse_partitions_text(text), nodes)


# ---------------------------------------------------------------------------
# What Slurm prints, in any of its ways, becomes the same values
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("state", CLUSTER_STATES)
@pytest.mark.parametrize("version", VERSIONS)
def test_queues_are_the_same_by_json_and_by_text(version, state):
    by_json = plugins.parse_sinfo(recorded_json(version, f"sinfo-{state}"))
    by_text = plugins.parse_sinfo_text(recorded(version)[f"sinfo-{state}-text.txt"])
    assert parsed_queues(version, state, by_json) == parsed_queues(version, state, by_text)


@pytest.mark.parametrize("state", CLUSTER_STATES)
@pytest.mark.parametrize("version", VERSIONS)
def test_queues_are_what_scontrol_says_of_partitions_and_nodes(version, state):
    nodes = {node["NodeName"]: node for node in
             scontrol_lines(version, f"scontrol-nodes-{state}-text")}
    truth = {partition["PartitionName"]: partition for partition in
             scontrol_lines(version, f"scontrol-partitions-{state}-text")}
    queues = parsed_queues(version, state,
                           plugins.parse_sinfo(recorded_json(version, f"sinfo-{state}")))
    assert sorted(queues) == sorted(truth) == ["batch", "debug", "gpu"]
    for name, queue in queues.items():
        mine = [node for node in nodes.values() if name in node["Partitions"].split(",")]
        up = [node for node in mine if not re.search(
            r"DRAIN|DOWN|MAINT|NOT_RESPONDING|\*", node["State"])]
        assert queue["state"] == truth[name]["State"]
        assert queue["default"] == (truth[name]["Default"] == "YES")
        assert queue["nodes_total"] == int(truth[name]["TotalNodes"]) == len(mine)
        assert queue["nodes_available"] == len(up)
        assert queue["nodes_idle"] == sum(node["State"].startswith("IDLE") for node in up)
        assert queue["cpus_per_node"] == max(int(node["CPUTot"]) for node in mine)
        assert queue["mem_per_node_mb"] == max(int(node["RealMemory"]) for node in mine)
        assert queue["gpus_per_node"] == (4 if any("gpu" in node["Gres"] for node in mine) else 0)
        assert queue["features"] == sorted({feature for node in mine for feature in
                                            node["AvailableFeatures"].split(",")})
    assert [queues[name]["time_limit"] for name in ("debug", "batch", "gpu")] == \
        [1800, "UNLIMITED", 86400]
    assert queues["gpu"]["access"].accounts == ["proj_a"]


@pytest.mark.parametrize("version", VERSIONS)
def test_drained_down_and_silent_nodes_are_not_available(version):
    figures = {}
    for state in CLUSTER_STATES:
        nodes = plugins.parse_sinfo(recorded_json(version, f"sinfo-{state}"))
        queues = parsed_queues(version, state, nodes)
        figures[state] = [queues[name]["nodes_available"] for name in ("debug", "batch", "gpu")]
    assert figures["idle"] == figures["busy"] == [2, 3, 1]
    assert figures["drain"] == [0, 1, 0]          # n1 drains, n2 is in maintenance, n4 is drained
    assert figures["not-responding"] == [0, 0, 0]            # and n3 does not respond


@pytest.mark.parametrize("version", ["v0.0.40", "v0.0.41", "v0.0.42"])
def test_older_data_parsers_tell_the_same_of_nodes(version):
    older, newer = (sorted(map(repr, plugins.parse_sinfo(recorded_json("24.11", name))))
                    for name in (f"sinfo-idle-{version}", "sinfo-idle"))
    assert older == newer and len(newer) == 6


@pytest.mark.parametrize("version", ["v0.0.40", "v0.0.41"])
def test_older_data_parsers_tell_the_same_of_jobs(version):
    older, newer = ([{**job, "estimated_start": None} for job in
                     plugins.parse_squeue(recorded_json("24.11", name), 1.8e9)]
                    for name in (f"squeue-busy-{version}", "squeue-busy"))
    assert older == newer and len(older) > 15


@pytest.mark.parametrize("version", VERSIONS)
def test_jobs_are_the_same_by_json_and_by_text(version):
    by_text = {job["job_id"]: job for job in plugins.parse_squeue_text(
        recorded(version)["squeue-all-states-text.txt"], "##")}
    by_json = {job["job_id"]: job for job in plugins.parse_squeue(
        recorded_json(version, "squeue-all-states"), 1.8e9)}
    assert set(by_json) == set(by_text)
    for job_id, job in by_json.items():
        expected = dict(by_text[job_id])
        for field in ("exit_code", "signal"):     # squeue's text has none
            expected[field] = job[field]
        if job["state"] == "RUNNING":             # it runs on while squeue is called
            expected["time_used"] = job["time_used"]
        if job["estimated_start"] and expected["estimated_start"]:       # backfill goes on, too
            assert abs(job["estimated_start"] - expected["estimated_start"]) < 60
            expected["estimated_start"] = job["estimated_start"]
        if job["state"] == "PENDING":             # and so do priorities
            assert abs(job["priority"] - expected["priority"]) < 50
            expected["priority"] = job["priority"]
        if job["state"] == "CANCELLED":           # what it had asked for is forgotten in part
            expected["cpus"] = job["cpus"]
        assert job == expected, job_id


@pytest.mark.parametrize("version", VERSIONS)
def test_jobs_are_what_scontrol_says_of_them(version):
    truth = {job["JobId"]: job for job in scontrol_lines(version, "scontrol-jobs-all-states-text")}
    jobs = plugins.parse_squeue(recorded_json(version, "squeue-all-states"), 1.8e9)
    raw = recorded_json(version, "squeue-all-states")["jobs"]
    assert len(jobs) == len(truth)
    seen = set()
    for job, row in zip(jobs, raw):
        check_job(job, truth[str(row["job_id"])])
        seen.add(job["state"])
    assert {"PENDING", "RUNNING", "SUSPENDED", "COMPLETED", "FAILED", "CANCELLED",
            "TIMEOUT"} <= seen


@pytest.mark.parametrize("version", VERSIONS)
def test_pending_jobs_tell_why_when_and_what_they_wait_for(version):
    jobs = {}
    for job in plugins.parse_squeue(recorded_json(version, "squeue-busy"), 1.8e9):
        if job["state"] not in plugins.FINISHED_STATES:
            jobs[job["job_name"], job["array_tasks"]] = job
    assert jobs["held", None]["held"] and jobs["held", None]["reason"] == "JobHeldUser"
    assert jobs["dependent", None]["dependency"].startswith("afterok:")
    assert not jobs["dependent", None]["held"]
    assert jobs["later", None]["estimated_start"] > jobs["later", None]["submit_time"] + 3000
    waiting, first = jobs["array", "2-5%2"], jobs["array", "0"]
    assert waiting["job_id"] == f"{waiting['array_job_id']}_[2-5%2]"
    assert first["job_id"] == f"{waiting['array_job_id']}_0" and first["state"] == "RUNNING"
    assert jobs["gpujob", None]["gpus"] == 2
    assert jobs["unlimited", None]["time_limit"] == "UNLIMITED"
    assert jobs["unlimited", None]["end_time"] is None
    assert jobs["suspended", None]["state"] == "SUSPENDED"
    assert not jobs["suspended", None]["held"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_name_that_looks_like_a_row_is_a_name(version):
    by_json = plugins.parse_squeue(recorded_json(version, "squeue-all-states"), 0)
    by_text = plugins.parse_squeue_text(recorded(version)["squeue-all-states-text.txt"], "##")
    for jobs in (by_json, by_text):
        assert 'odd|name,\n"of a job"' in [job["job_name"] for job in jobs]


def test_allocations_are_the_same_by_json_and_by_text():
    def ordered(rows):
        return sorted(rows, key=lambda row: (row["account"], row["user"]))

    for name in ("show-assoc", "show-assoc-user-alice"):
        by_json = plugins.parse_associations(recorded_json("24.11", f"sacctmgr-{name}"))
        text = recorded("24.11")[f"sacctmgr-{name.replace('show-', '')}-text.txt"]
        assert ordered(by_json) == ordered(plugins.parse_associations_text(text))
    assert len(by_json) == 2
    nobody = recorded_json("24.11", "sacctmgr-show-assoc-user-nobody")
    assert plugins.parse_associations(nobody) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_allocations_have_the_limits_that_were_set(version):
    rows = {(row["account"], row["user"]): row for row in plugins.parse_associations_text(
        recorded(version)["sacctmgr-assoc-text.txt"])}
    alice, project = rows["proj_a", "alice"], rows["proj_b", ""]
    assert (alice["max_jobs"], alice["max_submit"], alice["max_wall"]) == (2, 5, 7200)
    assert alice["qos"] == ["gpuq", "high", "normal"] and alice["default_qos"] == "normal"
    assert (project["grp_jobs"], project["grp_submit"], project["max_wall"]) == (4, 20, 3600)
    assert project["grp_tres"] == {"cpu": 4, "mem": 8000} and project["fairshare"] == 5
    assert rows["proj_a", ""]["grp_tres_minutes"] == {"cpu": 600000}
    assert rows["proj_b", "bob"]["max_tres"] == {"cpu": 2}


def test_shapes_of_other_versions_are_understood():
    number = plugins.slurm_number
    assert number({"set": True, "infinite": False, "number": 5}) == number(5) == number("5") == 5
    assert number({"set": False, "infinite": True, "number": 0}) == math.inf
    assert number(0xFFFFFFFF) == number("UNLIMITED") == math.inf
    assert number({"set": False, "infinite": False, "number": 0}) is None
    assert number(0xFFFFFFFE) is number(None) is number("N/A") is number(True) is None
    assert set(plugins.slurm_states("IDLE+DRAIN*")) == {"IDLE", "DRAIN", "NOT_RESPONDING"}
    assert set(plugins.slurm_states("idle~")) == {"IDLE", "POWERED_DOWN"}
    assert set(plugins.slurm_states(["DOWN", "DRAIN"])) == {"DOWN", "DRAIN"}
    bare = {"job_id": 7, "user_id": 0, "job_state": "RUNNING", "partition": "p",      # as in 21.08
            "time_limit": 0xFFFFFFFF, "start_time": 100, "priority": 3}
    job = plugins.parse_squeue({"jobs": [bare]}, 160)[0]
    assert (job["user"], job["time_limit"], job["time_used"]) == ("root", "UNLIMITED", 60)
    listed = {**bare, "job_state": ["CANCELLED", "COMPLETING"],                # as 23.11 and later
              "exit_code": {"return_code": {"set": True, "number": 0},
                            "signal": {"id": {"set": True, "number": 9}}}, "end_time": 150,
              "het_job_id": {"set": True, "number": 6},
              "het_job_offset": {"set": True, "number": 1}}
    job = plugins.parse_squeue({"jobs": [listed]}, 160)[0]
    assert (job["state"], job["signal"], job["exit_code"]) == ("COMPLETING", 9, None)
    assert (job["job_id"], job["time_used"]) == ("6+1", 50)


def test_one_odd_row_does_not_cost_the_others(caplog):
    document = json.loads(json.dumps(recorded_json("24.11", "squeue-busy")))
    odd = document["jobs"][3]
    odd.update(time_limit={"set": True, "number": 1e308}, exit_code="?")
    document["jobs"].append(None)
    jobs = plugins.parse_squeue(document, 1.8e9)
    assert len(jobs) == len(document["jobs"]) - 1
    assert (jobs[3]["job_id"], jobs[3]["user"], jobs[3]["state"]) == \
        (str(odd["job_id"]), odd["user_name"], "UNKNOWN")
    assert "2 of" in caplog.text
    nodes = json.loads(json.dumps(recorded_json("22.05", "sinfo-busy")))
    nodes["nodes"][0] = None
    assert {facts.queue for facts in plugins.parse_sinfo(nodes)} == {"batch", "debug", "gpu"}


@pytest.mark.parametrize("text, seconds", [
    ("30:00", 1800), ("1-00:00:00", 86400), ("2:03:04", 7384), ("0:05", 5),
    ("infinite", "UNLIMITED"), ("UNLIMITED", "UNLIMITED"), ("N/A", None), ("", None),
    ("INVALID", None)])
def test_durations_are_seconds(text, seconds):
    assert plugins.parse_slurm_duration(text) == seconds


@pytest.mark.parametrize("gres, count", [
    ("gpu:a100:4", 4), ("gpu:a100:4(S:0-1),gpu:h100:2", 6), ("gpu:2", 2), ("gpu", 1),
    ("gpu:a100", 1), ("(null)", 0), ("", 0), (None, 0), ("gres/gpu:a100:2", 2), ("gres:gpu:1", 1),
    ("shard:8,mps:4", 0), ("cpu=2,mem=2G,node=1,gres/gpu=2,gres/gpu:a100=2", 2),
    ("cpu=1,gres/gpu:a100=3", 3)])
def test_gpus_are_counted_once(gres, count):
    assert plugins.parse_gpus(gres) == count


@pytest.mark.parametrize("text, unit, mebibytes", [
    ("8000M", "M", 8000), ("16G", "M", 16384), ("500", "M", 500), ("16777216kb", "", 16384),
    ("16gb", "", 16384), ("1048576", "", 1), ("1048576b", "", 1), ("2T", "M", 2097152),
    ("x", "M", None)])
def test_memory_is_in_mebibytes(text, unit, mebibytes):
    assert plugins.parse_mebibytes(text, unit) == mebibytes


def test_host_lists_are_expanded_as_scontrol_does():
    assert plugins.expand_hostlist("n[1-4],gpu[01-02,10]") == \
        recorded("24.11")["scontrol-show-hostnames.txt"].split()
    assert plugins.expand_hostlist("r[1-2]n[08-09]-ib,login") == \
        ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib", "login"]
    assert plugins.expand_hostlist("") == []
    for bad in ("n[1-x]", "n[1-999999999]", "a[1-999]b[1-999]"):
        with pytest.raises(ValueError):
            plugins.expand_hostlist(bad)


@pytest.mark.parametrize("value", ["-u", "a b", "a,b", "a;b", "a\n", "", "--user=x", "$(id)",
                                   "x" * 200])
def test_what_could_be_an_option_or_several_names_is_refused(value):
    for check in (plugins.check_user, plugins.check_queue, plugins.check_job_id):
        with pytest.raises(EdgeError) as caught:
            check(value)
        assert caught.value.status == 422


@pytest.mark.parametrize("job_id", ["1", "12_3", "12_[2-5%2]", "12_[1,3,5-7:2%4]", "9+1",
                                    "77.server", "77[].pbs-01.site.edu", "77[3].server"])
def test_ids_of_jobs_of_every_kind_are_taken(job_id):
    assert plugins.check_job_id(job_id) == job_id


# ---------------------------------------------------------------------------
# Answers that are kept
# ---------------------------------------------------------------------------

class Counted(plugins.QueueInfo):
    """A backend that counts its runs, and waits, fails or answers as a test wants."""

    backend = "counted"

    def __init__(self, ttl=60.0):
        super().__init__(ttl)
        self.runs, self.failing, self.gate = 0, None, threading.Event()
        self.gate.set()

    def _collect_info(self):
        return {"queues": {}}

    def _collect_jobs(self, queue, user, finished):
        self.runs += 1
        number = self.runs
        assert self.gate.wait(20)
        if self.failing:
            raise self.failing
        return {"jobs": [{"job_id": str(number), "state": "RUNNING", "held": False}]}

    def _collect_allocations(self, user):
        return {"allocations": []}

    def _cancel(self, job_id):
        pass

    def job_allocation(self):
        return None

    def ids(self, **options):
        return [job["job_id"] for job in self.list_all_jobs(**options)["jobs"]]


def test_an_answer_is_kept_until_it_is_old_or_forced_or_a_job_is_cancelled():
    backend = Counted()
    assert [backend.ids(), backend.ids()] == [["1"], ["1"]]
    assert backend.ids(force=True) == ["2"] == backend.ids()
    assert backend.ids(user="somebody") == ["3"]              # another question
    backend.cancel_job("7")
    assert backend.ids() == ["4"]
    hurried = Counted(ttl=0.0)
    assert [hurried.ids(), hurried.ids()] == [["1"], ["2"]]


def in_threads(count, function):
    """Start threads that call function; return (threads, results)."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(function())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def test_many_who_ask_at_once_cost_one_run():
    backend = Counted()
    backend.gate.clear()
    threads, results = in_threads(20, backend.ids)
    wait_until(lambda: backend.runs == 1)
    backend.gate.set()
    for thread in threads:
        thread.join(20)
    assert results == [["1"]] * 20 and backend.runs == 1


def test_who_forces_gets_an_answer_that_was_begun_after_that():
    backend = Counted()
    backend.gate.clear()
    first, early = in_threads(1, backend.ids)
    wait_until(lambda: backend.runs == 1)
    kept = next(iter(backend._answers._kept.values()))
    asked, start = [], backend._answers._start_locked
    backend._answers._start_locked = lambda *args: asked.append(start(*args)) or asked[-1]
    forced, late = in_threads(5, lambda: backend.ids(force=True))
    wait_until(lambda: len(asked) == 5)
    assert kept.again is not None
    backend.gate.set()
    for thread in first + forced:
        thread.join(20)
    assert early == [["1"]] and late == [["2"]] * 5 and backend.runs == 2


def test_a_job_cancelled_while_jobs_are_listed_makes_that_listing_old():
    backend = Counted()
    backend.gate.clear()
    threads, results = in_threads(1, backend.ids)
    wait_until(lambda: backend.runs == 1)
    backend.cancel_job("7")
    later, after = in_threads(1, backend.ids)     # joins no run from before the cancellation
    wait_until(lambda: next(iter(backend._answers._kept.values())).again is not None)
    backend.gate.set()
    for thread in threads + later:
        thread.join(20)
    assert results == [["1"]] and after == [["2"]] and backend.ids() == ["2"]


def test_an_old_answer_is_better_than_none_and_says_so(monkeypatch):
    backend = Counted(ttl=0.0)
    assert backend.ids() == ["1"]
    backend.failing = plugins.Unavailable("the controller is away")
    answer = backend.list_all_jobs()
    assert answer["jobs"][0]["job_id"] == "1" and answer["stale"] is True
    assert answer["problem"] == "the controller is away" and answer["age"] >= 0
    backend.failing = None
    assert "stale" not in backend.list_all_jobs()
    monkeypatch.setattr(plugins, "QUEUES_PATIENCE_S", 0.05)
    backend.gate.clear()
    answer = backend.list_all_jobs()              # slow, this time
    assert answer["stale"] is True and "has not answered" in answer["problem"]
    backend.gate.set()
    wait_until(lambda: not [kept for kept in backend._answers._kept.values() if kept.running])
    backend.failing = plugins.Unavailable("the controller is away")
    monkeypatch.setattr(plugins, "QUEUES_STALE_S", 0.0)
    with pytest.raises(EdgeError, match="away"):
        backend.list_all_jobs()                   # too old by now


def test_what_is_asked_for_first_is_collected_before_anybody_asks(caplog):
    backend = Counted()
    backend.start_prefetch()
    wait_until(lambda: len(backend._answers._kept) == 2 and
               all(kept.answer for kept in backend._answers._kept.values()))
    assert [key[0] for key in backend._answers._kept] == ["info", "allocations"]
    def fail():
        raise plugins.Unavailable("the controller is away")

    backend._collect_info = fail
    backend._answers.expire("info")
    backend.start_prefetch()
    wait_until(lambda: "cannot be asked now: HTTP 503: the controller is away" in caplog.text)


def test_a_failure_without_an_older_answer_is_told_and_not_kept():
    backend = Counted()
    backend.failing = plugins.Unavailable("the controller is away")
    with pytest.raises(EdgeError, match="away"):
        backend.ids()
    backend.failing = None
    assert backend.ids() == ["2"]
    backend.failing = KeyError("a field that is not there")
    with pytest.raises(EdgeError) as caught:
        backend.ids(force=True, user="other")
    assert caught.value.status == 502 and "not understood" in caught.value.detail


def test_answers_are_evicted_the_least_recently_asked_for_first(monkeypatch):
    monkeypatch.setattr(plugins, "MAX_ANSWERS", 3)
    backend = Counted()
    for user in ("a", "b", "c"):
        backend.ids(user=user)
    assert backend.ids(user="a") == ["1"]
    assert backend.ids(user="d") == ["4"]         # takes the place of b's
    assert backend.ids(user="a") == ["1"] and backend.ids(user="b") == ["5"]
    assert len(backend._answers._kept) == 3
    monkeypatch.setattr(plugins, "MAX_RECORDS", 1)           # each of them has one
    backend.ids(user="b")
    assert [key[2] for key in backend._answers._kept] == ["b"]


def test_without_a_batch_system_the_routes_say_so(home, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    host = PluginHost("x", "edge", home / "state", notify=lambda *_: None, changed=lambda: None)
    monkeypatch.setattr(plugins.PluginQueueInfo, "is_enabled", lambda self: True)
    host.add(plugins.PluginQueueInfo)
    try:
        assert ask(host, "GET", "/queue_info/is_enabled")[1] == {"available": False}
        assert ask(host, "GET", "/queue_info/job_allocation")[1] == {"allocation": None}
        assert ask(host, "GET", "/queue_info/backend")[1] == {"backend": "none"}
        status, value = ask(host, "POST", "/queue_info/register_session", {})
        assert status == 501 and "no batch system" in value["detail"]
    finally:
        assert host.stop()


def test_too_many_questions_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(plugins, "MAX_COLLECTING", 2)
    backend = Counted()
    backend.gate.clear()
    threads = []
    for user in ("a", "b"):
        threads += in_threads(1, lambda user=user: backend.ids(user=user))[0]
    wait_until(lambda: backend.runs == 2)
    with pytest.raises(EdgeError) as caught:
        backend.ids(user="c")
    assert caught.value.status == 429
    backend.gate.set()
    for thread in threads:
        thread.join(20)


# ---------------------------------------------------------------------------
# Stand-in programs
# ---------------------------------------------------------------------------

@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Returns a function that puts a shell script on PATH; "calls" logs what was run."""
    folder, tools = tmp_path / "bin", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    for name in ("cat", "env", "head", "sed", "setsid", "sleep", "tail", "touch", "tr"):
        (tools / name).symlink_to(shutil.which(name))        # the machine may have a scheduler
    monkeypatch.setenv("PATH", f"{folder}:{tools}")
    for name in ("SLURM_CONF", "SLURM_JOB_ID", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)

    def put(name, script):
        path = folder / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >>{folder}/calls\n{script}\n')
        path.chmod(0o755)

    put.folder = folder
    put.calls = lambda: (folder / "calls").read_text().splitlines() \
        if (folder / "calls").exists() else []
    return put


UNRECOGNIZED = 'case "$*" in *--json*) echo "$0: unrecognized option" >&2; exit 1;; esac\n'


def replay(put, version, state="busy", with_json=True):
    """Let stand-ins print what the programs of that version printed in that state."""
    for name, text in recorded(version).items():
        (put.folder / name).write_text(text)
    refuse = "" if with_json else UNRECOGNIZED
    at = put.folder
    put("sinfo", f'{refuse}case "$*" in *--version*) echo "slurm {version}";; *--json*) cat '
        f'{at}/sinfo-{state}.json;; *) cat {at}/sinfo-{state}-text.txt;; esac')
    put("squeue", f'{refuse}case "$*" in *--json*) cat {at}/squeue-{state}.json;; *) '
        'for last; do :; done; sed "s/^##/${last%%|*}/" ' f'{at}/squeue-{state}-text.txt;; esac')
    put("scontrol", f'case "$*" in *config*) cat {at}/scontrol-show-config.txt;; *) '
        f'cat {at}/scontrol-partitions-{state}-text.txt;; esac')
    put("sacctmgr", f'{refuse if with_json and version == "24.11" else UNRECOGNIZED}'
        f'case "$*" in *--json*) cat {at}/sacctmgr-show-assoc.json;; '
        f'*) cat {at}/sacctmgr-assoc-text.txt;; esac')
    put("scancel", "exit 0")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_text_fallback_gives_the_same_answers(version, programs):
    answers = []
    for with_json in (True, False):
        replay(programs, version, with_json=with_json)
        backend = QueueInfoSlurm()
        jobs = {job["job_id"]: job for job in backend.list_all_jobs("alice")["jobs"]}
        for job in jobs.values():
            job.update(time_used=None, estimated_start=None)
        answers.append((backend.get_info("*"), jobs,
                        sorted(backend.list_allocations("*")["allocations"],
                               key=lambda row: (row["account"], row["user"]))))
        assert backend._textual == (set() if with_json and version == "24.11" else
                                    {"sacctmgr"} if with_json else {"sinfo", "squeue", "sacctmgr"})
    assert answers[0] == answers[1]
    assert {job["user"] for job in answers[0][1].values()} == {"alice"}
    tried = [call for call in programs.calls() if call.startswith("squeue") and "--json" in call]
    assert len(tried) == 2                        # one of each backend


@pytest.mark.parametrize("version", VERSIONS)
def test_filters_hold_where_squeue_ignores_them(version, programs):
    replay(programs, version, "all-states")       # as 22.05 does with --json
    (programs.folder / "sinfo-all-states.json").write_text(recorded(version)["sinfo-idle.json"])
    (programs.folder / "scontrol-partitions-all-states-text.txt").write_text(
        recorded(version)["scontrol-partitions-idle-text.txt"])
    backend = QueueInfoSlurm()
    assert {job["partition"] for job in backend.list_jobs("gpu", "*")["jobs"]} == {"gpu"}
    assert {job["user"] for job in backend.list_all_jobs("bob")["jobs"]} == {"bob"}
    live = {job["state"] for job in backend.list_all_jobs("*")["jobs"]}
    assert live == {"PENDING", "RUNNING", "SUSPENDED"}
    held = backend.list_all_jobs("*", state="held")["jobs"]
    assert held and all(job["held"] and job["state"] == "PENDING" for job in held)
    ended = backend.list_all_jobs("*", state="FAILED,timeout,canceled")["jobs"]
    assert {job["state"] for job in ended} == {"FAILED", "TIMEOUT", "CANCELLED"}
    everything = backend.list_all_jobs("*", state="ALL")["jobs"]
    assert len(everything) > len(ended) + len(held)
    with pytest.raises(EdgeError, match="state: 'SLEEPING'"):
        backend.list_all_jobs(state="SLEEPING")


def test_a_user_sees_the_queues_that_accounts_and_groups_allow(programs):
    replay(programs, "24.11", "idle")
    backend = QueueInfoSlurm()
    programs("sacctmgr", f'case "$*" in *user=alice*) cat {programs.folder}/'
             'sacctmgr-show-assoc-user-alice.json;; *) printf \'{"associations": [{"account": '
             '"proj_b", "user": "bob", "partition": "debug"}]}\';; esac')
    assert list(backend.get_info("alice")["queues"]) == ["batch", "debug", "gpu"]
    assert list(backend.get_info("bob")["queues"]) == ["debug"]      # bound to that partition
    assert list(backend.get_info("*")["queues"]) == ["batch", "debug", "gpu"]
    assert "access" not in backend.get_info("*")["queues"]["gpu"]
    rights = plugins.Rights("x", frozenset({"staff"}), [])
    queue = {"name": "q", "access": plugins.Access(groups=["staff"])}
    assert plugins.may_use(queue, rights)
    assert not plugins.may_use({"name": "q", "access": plugins.Access(groups=["wheel"])}, rights)
    denied = {"name": "q", "access": plugins.Access(denied_accounts=["a"])}
    mine = [{"account": "a", "partition": ""}]
    assert not plugins.may_use(denied, rights._replace(associations=mine))
    assert plugins.may_use(denied, rights._replace(associations=mine + [
        {"account": "b", "partition": ""}]))


def test_a_site_without_accounting_has_no_allocations(programs):
    replay(programs, "24.11", "idle")
    programs("sacctmgr", 'echo "You are not running a supported accounting_storage plugin" >&2\n'
             "exit 1")
    backend = QueueInfoSlurm()
    assert backend.list_allocations() == {"allocations": []}
    assert list(backend.get_info()["queues"]) == ["batch", "debug", "gpu"]
    (programs.folder / "sacctmgr").unlink()
    assert QueueInfoSlurm().list_allocations() == {"allocations": []}


def test_programs_see_neither_the_users_defaults_nor_the_edges_secrets(programs, monkeypatch):
    replay(programs, "24.11")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SINFO_FORMAT", "%n")
    monkeypatch.setenv("RADICAL_BRIDGE_TOKEN", "t0p")
    programs("squeue", f'env >{programs.folder}/env; cat {programs.folder}/squeue-busy.json')
    QueueInfoSlurm("/etc/hosts").list_all_jobs()
    seen = (programs.folder / "env").read_text()
    assert "SQUEUE_FORMAT" not in seen and "SINFO_FORMAT" not in seen and "t0p" not in seen
    assert "SLURM_CONF=/etc/hosts" in seen and "SLURM_TIME_FORMAT=%s" in seen


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name, status", [("foreign", 403), ("unknown", 404), ("finished", 409),
                                          ("no-controller", 503)])
def test_a_refused_cancel_has_a_status_and_the_schedulers_words(version, name, status, programs):
    kept = recorded(version)[f"scancel-{name}.stderr"]
    code, words = kept.partition("\n")[0].partition("=")[2], kept.partition("\n")[2]
    (programs.folder / "words").write_text(words)
    programs("scancel", f"cat {programs.folder}/words >&2; exit {code}")
    with pytest.raises(EdgeError) as caught:
        QueueInfoSlurm().cancel_job("31")
    assert caught.value.status == status
    assert re.search(r"scancel: error: Kill job error on job id \d+: ", caught.value.detail)


def test_a_cancelled_job_is_named_and_pending_array_tasks_can_be(programs):
    programs("scancel", 'echo "scancel: Terminating job $2" >&2')
    assert QueueInfoSlurm().cancel_job("12_[2-5%2]") == \
        {"job_id": "12_[2-5%2]", "status": "canceled"}
    assert programs.calls() == ["scancel -v 12_[2-5]"]


def test_the_nodes_of_a_job_are_named_or_there_are_none(programs):
    programs("squeue", 'echo "n[1-2,07]"')
    assert QueueInfoSlurm.get_job_nodes(12) == ["n1", "n2", "n07"]
    assert QueueInfoSlurm.get_job_nodes("-j") == []
    programs("squeue", "exit 1")
    assert QueueInfoSlurm.get_job_nodes("12") == []
    assert QueueInfoSlurm.get_job_nodes("12", {"PATH": "/nowhere"}) == []


def test_the_allocation_of_the_edge_itself(programs, monkeypatch):
    replay(programs, "24.11")
    backend = QueueInfoSlurm()
    assert backend.job_allocation() is None
    monkeypatch.setenv("SLURM_JOB_ID", "34")
    row = next(line for line in recorded("24.11")["squeue-busy-text.txt"].splitlines()
               if "gpujob" in line and "RUNNING" in line)
    (programs.folder / "squeue-busy-text.txt").write_text(row + "\n")
    found = backend.job_allocation()
    assert found == {"job_id": row.split("|")[1], "partition": "gpu", "n_nodes": 1,
                     "nodelist": "n4", "cpus_per_node": 2, "gpus_per_node": 2, "account": "proj_a",
                     "job_name": "gpujob", "runtime": 300}
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "another")
    assert QueueInfoSlurm("/etc/hosts").job_allocation() is None      # that cluster's, not ours
    programs("squeue", "exit 0")
    with pytest.raises(RuntimeError, match="does not know"):
        backend.job_allocation()


# ---------------------------------------------------------------------------
# Schedulers that hang, print garbage, print far too much, or are not there
# ---------------------------------------------------------------------------

def refused(function, *args, **options):
    """Return the error that a call raises."""
    with pytest.raises(EdgeError) as caught:
        function(*args, **options)
    return caught.value


def test_a_scheduler_that_hangs_is_given_up_and_killed(programs, monkeypatch):
    monkeypatch.setattr(plugins, "SCHEDULER_S", 0.5)
    replay(programs, "24.11")
    programs("squeue", f"echo $$ >{programs.folder}/pid; sleep 1000 & sleep 1000")
    error = refused(QueueInfoSlurm().list_all_jobs)
    assert error.status == 504 and "squeue takes more than" in error.detail
    group = int((programs.folder / "pid").read_text())
    wait_until(lambda: not group_lives(group), what="the end of squeue and what it started")


def group_lives(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def test_a_program_whose_child_keeps_its_output_open_does_not_hang(programs, monkeypatch):
    monkeypatch.setattr(plugins, "SCHEDULER_S", 0.5)
    replay(programs, "24.11")
    programs("squeue", "setsid sleep 3 & echo '{}'")
    assert refused(QueueInfoSlurm().list_all_jobs).status == 504


@pytest.mark.parametrize("printed", ["echo 'Segmentation fault'", "head -c 100000 /dev/urandom",
                                     "true", "echo '[1, 2]'", "echo '{\"jobs\": 5}'", "echo null",
                                     "echo '{\"jobs\": [{\"job_state\": 7}, 3]}'",
                                     "head -c 100000 /dev/zero | tr '\\0' '['"])
def test_garbage_is_an_error_that_says_so(printed, programs):
    replay(programs, "24.11")
    programs("squeue", printed)
    error = refused(QueueInfoSlurm().list_all_jobs)
    assert error.status == 502 and len(error.detail) < 1000
    assert re.search("did not print the JSON|not understood", error.detail)


def test_two_hundred_megabytes_cost_neither_memory_nor_time(programs, monkeypatch):
    replay(programs, "24.11")
    programs("squeue", "exec head -c 200000000 /dev/zero")
    code = ("import re, sys; sys.path.insert(0, sys.argv[1]); import plugins\n"
            "try: plugins.QueueInfoSlurm().list_all_jobs()\n"
            "except plugins.EdgeError as error: print(error.status.value, error.detail)\n"
            # getrusage() would count what the parent had before exec; this does not
            "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())\n"
            "print(int(peak[1]) // 1024)")
    done = subprocess.run([sys.executable, "-c", code, str(Path(SCRIPT).parent)],
                          stdout=subprocess.PIPE, text=True, timeout=60)
    words, used = done.stdout.splitlines()
    assert words == "502 squeue printed more than 16 MiB" and int(used) < 200
    assert sum(call.startswith("squeue") for call in programs.calls()) == 2      # JSON, then text


def test_too_much_json_is_asked_for_again_as_text(programs, monkeypatch):
    monkeypatch.setattr(plugins, "MAX_SCHEDULER_OUTPUT", 50_000)
    replay(programs, "24.11")
    assert len(recorded("24.11")["squeue-busy.json"]) > 50_000
    assert len(QueueInfoSlurm().list_all_jobs("*")["jobs"]) > 10


def test_a_flood_of_errors_is_cut(programs):
    programs("scancel", "head -c 5000000 /dev/zero | tr '\\0' 'e' >&2; echo error >&2; exit 1")
    error = refused(QueueInfoSlurm().cancel_job, "1")
    assert error.status == 502 and len(error.detail) < 600


def test_a_scheduler_that_is_gone_is_told(programs):
    error = refused(QueueInfoSlurm().list_all_jobs)
    assert error.status == 501 and "squeue cannot be run: No such file" in error.detail
    assert QueueInfoSlurm().find_fault() == \
        "sinfo, squeue, scontrol, scancel not found on PATH"
    replay(programs, "24.11")
    assert QueueInfoSlurm().find_fault() is None
    assert QueueInfoSlurm("/nowhere/slurm.conf").find_fault() == \
        "slurm_conf: /nowhere/slurm.conf cannot be read"
    programs("sinfo", "echo 'sinfo: fatal: Could not establish a configuration source' >&2; exit 1")
    assert "Could not establish" in QueueInfoSlurm().find_fault()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_controller_that_is_away_is_503_in_its_own_words(version, programs):
    replay(programs, version)
    kept, at = recorded(version), programs.folder
    if "squeue-no-controller.stderr" in kept:
        programs("squeue", f"tail -n +2 {at}/squeue-no-controller.stderr >&2; exit 1")
    else:                                         # 22.05 tells it in JSON, and ends with 0
        programs("squeue", f"cat {at}/squeue-no-controller.json")
    error = refused(QueueInfoSlurm().list_all_jobs)
    assert error.status == 503
    assert re.search("Unable to contact slurm controller|Failed while looking for jobs",
                     error.detail)


def test_stopping_ends_the_programs_that_run(programs):
    replay(programs, "24.11")
    programs("squeue", "sleep 1000")
    backend = QueueInfoSlurm()
    results = []
    waiting, _ = in_threads(1, lambda: results.append(refused(backend.list_all_jobs)))
    wait_until(lambda: any(call.startswith("squeue") for call in programs.calls()))
    backend.stop()
    waiting[0].join(20)
    assert results[0].status == 503 and "being stopped" in results[0].detail


# ---------------------------------------------------------------------------
# PBS: output as its reference guide and its sites document it
# ---------------------------------------------------------------------------

PBS_QUEUES = """\
Queue: workq
    queue_type = Execution
    total_jobs = 12
    state_count = Transit:0 Queued:1 Held:0 Waiting:0 Running:11 Exiting:0 Begun
\t:0
    resources_max.nodect = 10
    resources_max.walltime = 24:00:00
    resources_min.nodect = 1
    resources_min.walltime = 00:05:00
    resources_default.walltime = 01:00:00
    max_run = [u:PBS_GENERIC=5]
    enabled = True
    started = True

Queue: gpuq
    queue_type = Execution
    acl_user_enable = True
    acl_users = -mallory,alice,bob@login1
    default_chunk.Qlist = gpuq
    enabled = True
    started = False

Queue: staff
    queue_type = Execution
    acl_group_enable = True
    acl_groups = wheel,operators
    enabled = False
    started = True

"""
PBS_NODES = """\
n1
     Mom = n1.site.edu
     ntype = PBS
     state = free
     pcpus = 64
     resources_available.arch = linux
     resources_available.host = n1
     resources_available.mem = 131072mb
     resources_available.ncpus = 64
     resources_available.ngpus = 0
     resources_available.vnode = n1
     resources_assigned.ncpus = 0

n2
     Mom = n2.site.edu
     state = job-busy
     jobs = 17.pbs/0, 18.pbs/1
     resources_available.host = n2
     resources_available.mem = 134217728kb
     resources_available.ncpus = 64

n3
     Mom = n3.site.edu
     state = offline,down
     resources_available.host = n3
     resources_available.mem = 128gb
     resources_available.ncpus = 64

g1[0]
     state = free
     resources_available.Qlist = gpuq
     resources_available.host = g1
     resources_available.mem = 64gb
     resources_available.ncpus = 32
     resources_available.ngpus = 2

g1[1]
     state = free
     resources_available.Qlist = gpuq
     resources_available.host = g1
     resources_available.mem = 64gb
     resources_available.ncpus = 32
     resources_available.ngpus = 2

"""
PBS_JOBS = """\
Job Id: 17.pbs
    Job_Name = run me
    Job_Owner = alice@login1.site.edu
    resources_used.walltime = 00:10:30
    job_state = R
    queue = workq
    ctime = Wed Nov 25 10:00:00 2026
    exec_host = n2/0*32+n2/1*32
    Hold_Types = n
    Priority = 0
    qtime = Wed Nov 25 10:00:00 2026
    Resource_List.ncpus = 64
    Resource_List.nodect = 1
    Resource_List.walltime = 02:00:00
    stime = Wed Nov 25 10:01:00 2026
    project = climate
    Variable_List = PBS_O_HOME=/home/alice,SECRET=xyzzy,PBS_O_PATH=/usr/bin:/bin
\t:/opt/pbs/bin
    comment = Job run at Wed Nov 25 at 10:01 on (n2:ncpus=64)

Job Id: 18[].pbs
    Job_Name = sweep
    Job_Owner = bob@login1.site.edu
    job_state = H
    queue = workq
    ctime = Wed Nov 25 10:00:00 2026
    Hold_Types = u
    Priority = 10
    array = True
    array_indices_submitted = 0-9:3
    depend = afterok:17.pbs@pbs
    Resource_List.ncpus = 2
    Resource_List.ngpus = 1
    Resource_List.nodect = 2
    Account_Name = wind

"""
PBS_ENDED = """\
Job Id: 9.pbs
    Job_Owner = alice@login1
    job_state = F
    queue = workq
    Exit_status = 3
    stime = Wed Nov 25 09:00:00 2026
    obittime = Wed Nov 25 09:30:00 2026
    resources_used.walltime = 00:30:00

Job Id: 10.pbs
    Job_Owner = alice@login1
    job_state = F
    queue = workq
    Exit_status = 271
    stime = Wed Nov 25 09:00:00 2026

Job Id: 11.pbs
    Job_Owner = alice@login1
    job_state = F
    queue = workq

Job Id: 12.pbs
    Job_Owner = alice@login1
    job_state = F
    queue = workq
    Exit_status = 0
    stime = Wed Nov 25 09:00:00 2026

"""


def nested(entries):
    """Return entries as PBS' JSON has them: resources in objects of their own, numbers bare."""
    document = {}
    for name, facts in entries.items():
        made = document[name] = {}
        for key, value in facts.items():
            outer, dot, inner = key.partition(".")
            if outer == "jobs":
                made[outer] = [job.strip() for job in value.split(",")]
            elif dot:
                made.setdefault(outer, {})[inner] = int(value) if value.isdigit() else value
            else:
                made[outer] = int(value) if value.isdigit() and outer == "Priority" else value
    return document


def put_pbs(put, with_json, jobs=PBS_JOBS, history="cat {at}/ended.txt"):
    at = put.folder
    for name, section, text in (("queues", "Queue", PBS_QUEUES), ("nodes", "nodes", PBS_NODES),
                                ("jobs", "Jobs", jobs), ("ended", "Jobs", jobs + PBS_ENDED)):
        (at / f"{name}.txt").write_text(text)
        document = {"timestamp": 1795601000, "pbs_version": "2022.1.1", "pbs_server": "pbs",
                    section: nested(plugins.parse_pbs_text(text))}
        (at / f"{name}.json").write_text(json.dumps(document))
    kind = "json" if with_json else "txt"
    refuse = "" if with_json else \
        'case "$*" in *json*) echo "qstat: illegal option -- F" >&2; exit 2;; esac\n'
    put("qstat", f'{refuse}case "$*" in *-Q*) cat {at}/queues.{kind};; *-x*) '
        f'{history.format(at=at).replace("txt", kind)};; *) cat {at}/jobs.{kind};; esac')
    put("pbsnodes", f"{refuse}cat {at}/nodes.{kind}")
    put("qdel", "exit 0")


@pytest.mark.parametrize("with_json", [True, False], ids=["json", "text"])
def test_pbs_queues_have_the_figures_of_their_nodes(with_json, programs):
    put_pbs(programs, with_json)
    queues = QueueInfoPBS().get_info("*")["queues"]
    assert list(queues) == ["gpuq", "staff", "workq"]
    workq, gpuq = queues["workq"], queues["gpuq"]
    assert (workq["state"], gpuq["state"], queues["staff"]["state"]) == ("UP", "DOWN", "DRAIN")
    assert (workq["time_limit"], workq["default_time"], gpuq["time_limit"]) == \
        (86400, 3600, "UNLIMITED")
    assert (workq["nodes_total"], workq["nodes_available"], workq["nodes_idle"]) == (3, 2, 1)
    assert (workq["cpus_per_node"], workq["mem_per_node_mb"], workq["gpus_per_node"]) == \
        (64, 131072, 0)
    assert (gpuq["nodes_total"], gpuq["cpus_per_node"], gpuq["gpus_per_node"]) == (1, 64, 4)
    assert gpuq["mem_per_node_mb"] == 131072 and workq["max_jobs_per_user"] == 5
    assert [workq[name] for name in ("walltime_min", "walltime_max", "nodes_min", "nodes_max")] == \
        [300, 86400, 1, 10]
    assert set(workq) == {*plugins.QUEUE_FIELDS, "walltime_min", "walltime_max", "nodes_min",
                          "nodes_max"}


def test_pbs_queues_are_for_those_whom_their_lists_name(programs):
    put_pbs(programs, True)
    backend = QueueInfoPBS()
    assert list(backend.get_info("alice")["queues"]) == ["gpuq", "workq"]
    assert list(backend.get_info("bob")["queues"]) == ["gpuq", "workq"]
    assert list(backend.get_info("mallory")["queues"]) == ["workq"]
    assert list(backend.get_info("nobody")["queues"]) == ["workq"]


@pytest.mark.parametrize("with_json", [True, False], ids=["json", "text"])
def test_pbs_jobs_have_the_same_words_and_units_as_slurms(with_json, programs):
    put_pbs(programs, with_json)
    running, held = QueueInfoPBS().list_all_jobs("*")["jobs"]
    assert list(running) == list(held) == list(plugins.JOB_FIELDS)
    began = int(time.mktime(time.strptime("2026-11-25 10:01", "%Y-%m-%d %H:%M")))
    assert {name: running[name] for name in ("job_id", "job_name", "user", "partition", "state",
                                             "nodes", "cpus", "gpus", "time_limit", "time_used",
                                             "start_time", "end_time", "node_list", "account")} == {
        "job_id": "17.pbs", "job_name": "run me", "user": "alice", "partition": "workq",
        "state": "RUNNING", "nodes": 1, "cpus": 64, "gpus": 0, "time_limit": 7200,
        "time_used": 630, "start_time": began, "end_time": began + 7200, "node_list": "n2",
        "account": "climate"}
    assert (held["state"], held["held"], held["array_job_id"], held["array_tasks"]) == \
        ("PENDING", True, "18[].pbs", "0-9:3")
    assert (held["dependency"], held["time_limit"], held["priority"], held["gpus"]) == \
        ("afterok:17.pbs@pbs", "UNLIMITED", 10, 1)
    assert "xyzzy" not in json.dumps([running, held])         # jobs' environments are no answer
    assert QueueInfoPBS().list_jobs("workq", "bob")["jobs"] == [held]
    assert QueueInfoPBS().list_all_jobs("*", state="HELD")["jobs"] == [held]


def test_pbs_jobs_that_have_ended_are_read_from_its_history(programs):
    put_pbs(programs, True)
    found = QueueInfoPBS().list_all_jobs("alice", state="ALL")["jobs"]
    jobs = {job["job_id"]: job for job in found}
    assert [(jobs[f"{number}.pbs"]["state"], jobs[f"{number}.pbs"]["exit_code"],
             jobs[f"{number}.pbs"]["signal"]) for number in (9, 10, 11, 12)] == [
        ("FAILED", 3, None), ("CANCELLED", None, 15), ("CANCELLED", None, None),
        ("COMPLETED", 0, None)]
    assert jobs["9.pbs"]["time_used"] == 1800
    assert jobs["9.pbs"]["end_time"] - jobs["9.pbs"]["start_time"] == 1800
    put_pbs(programs, True, history='echo "qstat: PBS is not configured to maintain job history" '
            ">&2; exit 1")
    backend = QueueInfoPBS()
    for _ in range(2):
        assert len(backend.list_all_jobs("*", state="ALL", force=True)["jobs"]) == 2
    assert sum("-x" in call for call in programs.calls()[-3:]) == 1


def test_pbs_json_that_is_none_is_replaced_by_text(programs):
    put_pbs(programs, True)
    (programs.folder / "jobs.json").write_text('{"timestamp": 1, "Jobs": {"17.pbs": {"a": "b"c"}}}')
    at = programs.folder
    programs("qstat", f'case "$*" in *json*) cat {at}/jobs.json;; *) cat {at}/jobs.txt;; esac')
    assert len(QueueInfoPBS().list_all_jobs("*")["jobs"]) == 2
    programs("qstat", "head -c 1000 /dev/urandom")
    assert refused(QueueInfoPBS().list_all_jobs, "*").status == 502
    programs("qstat", "true")
    assert QueueInfoPBS().list_all_jobs("*") == {"jobs": []}
    programs("qstat", "echo 'qstat: Unknown queue nosuch' >&2; exit 170")
    assert refused(QueueInfoPBS().list_jobs, "nosuch").status == 404
    programs("qstat", "echo 'Connection refused' >&2; echo 'qstat: cannot connect to server pbs "
             "(errno=15010)' >&2; exit 1")
    assert refused(QueueInfoPBS().list_all_jobs, "*").status == 503


@pytest.mark.parametrize("words, status", [
    ("qdel: Unknown Job Id 99.pbs", 404), ("qdel: Unauthorized Request  17.pbs", 403),
    ("qdel: Job has finished 9.pbs", 409), ("qdel: Request invalid for state of job 9.pbs", 409),
    ("qdel: cannot connect to server pbs (errno=111)", 503), ("qdel: something else", 502)])
def test_qdels_refusals_have_a_status_and_its_own_words(words, status, programs):
    programs("qdel", f"echo '{words}' >&2; exit 1")
    error = refused(QueueInfoPBS().cancel_job, "17.pbs")
    assert error.status == status and " ".join(words.split()) == error.detail
    programs("qdel", "exit 0")
    assert QueueInfoPBS().cancel_job("17.pbs") == {"job_id": "17.pbs", "status": "canceled"}


def test_allocations_of_sites_that_have_sbank(programs):
    assert QueueInfoPBS().list_allocations() == {"allocations": []}
    programs("sbank-list-allocations", """cat <<'END'
 Allocation Suballocation Start      End        Resource Project Jobs  Charged Available Balance
 ---------- ------------- ---------- ---------- -------- ------- ----- ------- -----------------
 6687       6555          2026-01-01 2027-01-01 polaris  Climate 1,234 1,500.5 8,499.5
 6688       6556          2026-01-01 2027-01-01 aurora   Wind    0     0.0     100.0

Totals:
  Rows: 2
END""")
    first, second = QueueInfoPBS().list_allocations("*")["allocations"]
    assert {name: first[name] for name in ("account", "allocation_id", "suballocation_id",
                                           "resource", "start_date", "jobs", "used_node_hours",
                                           "remaining_node_hours", "allocated_node_hours")} == {
        "account": "Climate", "allocation_id": "6687", "suballocation_id": "6555",
        "resource": "polaris", "start_date": "2026-01-01", "jobs": 1234, "used_node_hours": 1500.5,
        "remaining_node_hours": 8499.5, "allocated_node_hours": 10000.0}
    assert second["account"] == "Wind"


def test_the_allocation_of_an_edge_in_a_pbs_job(programs, monkeypatch):
    put_pbs(programs, True, jobs=PBS_JOBS.split("Job Id: 18")[0])
    assert QueueInfoPBS().job_allocation() is None
    monkeypatch.setenv("PBS_JOBID", "17.pbs")
    found = QueueInfoPBS().job_allocation()
    assert (found["job_id"], found["n_nodes"], found["nodelist"], found["runtime"]) == \
        ("17.pbs", 1, "n2", 7200)


# ---------------------------------------------------------------------------
# Over a bridge and an edge
# ---------------------------------------------------------------------------

@pytest.fixture
def serve(bridge, tokens):
    """Returns a function: starts an edge with these plugins, returns (edge, its EdgeClient)."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(BridgeClient(url=bridge.url, token=tokens[1]["client"]))

        def start(plugins_wanted=("queue_info", "echo")):
            edge = Edge(bridge.url, "e1", plugins=list(plugins_wanted),
                        token=tokens[1]["edge"]).start()
            stack.callback(edge.stop)
            assert edge.online.wait(10)
            wait_until(lambda: "e1" in bridge._registry.links)
            return edge, client.get_edge_client("e1")

        yield start


def test_every_route_answers_in_its_shape(serve, programs):
    replay(programs, "24.11")
    _edge, client = serve()
    with client.get_plugin("queue_info") as queues:
        assert queues.is_enabled() is True and queues.backend() == "slurm"
        assert queues.job_allocation() is None
        assert queues._get("allocation") == {"allocation": None}
        assert queues.nodelist() == []
        info = queues.get_info(user="*")["queues"]
        assert list(info) == ["batch", "debug", "gpu"]
        assert list(info["debug"]) == list(plugins.QUEUE_FIELDS)
        jobs = queues.list_jobs("debug", user="*")["jobs"]
        assert jobs and list(jobs[0]) == list(plugins.JOB_FIELDS)
        assert {job["partition"] for job in jobs} == {"debug"}
        hers = queues.list_all_jobs("alice", force=True)["jobs"]
        assert {job["user"] for job in hers} == {"alice"}
        held = queues.list_all_jobs("*", state="HELD")["jobs"]
        assert held and all(job["reason"].startswith("JobHeld") for job in held)
        rows = queues.list_allocations(user="*")["allocations"]
        assert list(rows[0]) == list(plugins.ALLOCATION_FIELDS)
        assert queues.cancel_job("34") == {"job_id": "34", "status": "canceled"}
    described = client.list_plugins()["queue_info"]
    assert described["ui_config"]["monitors"][0]["auto_load"] == "get_info/{sid}"
    assert described["type"] == "queue_info"


def test_an_edge_in_an_allocation_names_its_nodes(serve, programs, monkeypatch):
    put_pbs(programs, True, jobs=PBS_JOBS.split("Job Id: 18")[0])
    monkeypatch.setenv("PBS_JOBID", "17.pbs")
    edge, client = serve()
    with client.get_plugin("queue_info") as queues:
        assert queues.nodelist() == ["n2"]
        plugin = edge.host._hosted["queue_info"].plugin
        for told, expected in (("nid[0001-3,07],login1",
                                ["nid0001", "nid0002", "nid0003", "nid07", "login1"]), ("", [])):
            monkeypatch.setattr(plugin, "get_job_allocation", lambda told=told: {"nodelist": told})
            assert queues.nodelist() == expected
        monkeypatch.setattr(plugin, "get_job_allocation", lambda: {"nodelist": "n[1-9999999]"})
        assert refused(queues.nodelist).status == 502


def test_a_users_mistake_names_its_field(serve, programs):
    replay(programs, "24.11")
    _edge, client = serve()
    with client.get_plugin("queue_info") as queues:
        sid = queues.sid
        for path, status, word in (
                (f"get_info/{sid}?user=-x", 422, "user"),
                (f"get_info/{sid}?force=maybe", 422, "force"),
                (f"list_all_jobs/{sid}?state=ASLEEP", 422, "state"),
                (f"list_jobs/{sid}/--all", 422, "queue"), (f"list_jobs/{sid}/nosuch", 404, "debug"),
                ("list_all_jobs/session.none", 404, "session")):
            error = refused(queues._get, path)
            assert (error.status, word in error.detail) == (status, True), path
        for job_id, status in (("-1", 422), ("1;id", 422), ("--user=bob", 422)):
            assert refused(queues.cancel_job, job_id).status == status
    assert not any(call.startswith("scancel") for call in programs.calls())


def test_a_hanging_scheduler_disturbs_nothing_else(serve, programs, monkeypatch):
    monkeypatch.setattr(plugins, "QUEUES_PATIENCE_S", 0.2)
    replay(programs, "24.11")
    edge, client = serve()
    with client.get_plugin("queue_info") as queues, client.get_plugin("echo") as echo:
        before = queues.get_info("*")
        programs("sinfo", f"touch {programs.folder}/hangs; sleep 1000")
        answers = []
        waiting = [threading.Thread(target=lambda: answers.append(queues.get_info("*", force=True)))
                   for _ in range(10)]
        for thread in waiting:
            thread.start()
        wait_until((programs.folder / "hangs").exists)
        assert echo._get("hello")["query"] == {}              # another plugin
        assert queues.backend() == "slurm"        # and other routes of this one
        assert queues.list_all_jobs("alice", force=True)["jobs"]
        for thread in waiting:
            thread.join(20)
        assert len(answers) == 10
        assert all(answer["queues"] == before["queues"] and answer["stale"] for answer in answers)
        assert sum(call.startswith("sinfo") and "--json" in call for call in programs.calls()) <= 3


def test_a_machine_without_a_batch_system_says_so(serve, programs, home):
    edge, client = serve()
    assert "queue_info" not in client.list_plugins()
    assert edge.host.disabled["queue_info"] == \
        "neither Slurm (squeue) nor PBS (qstat) is found on PATH"
    done = subprocess.run([sys.executable, SCRIPT, "--check", "-p", "queue_info"], timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "queue_info: neither Slurm (squeue) nor PBS (qstat) is found on PATH" in done.stdout


def test_each_cluster_that_is_configured_is_an_instance(serve, programs, monkeypatch, tmp_path):
    replay(programs, "24.11")
    conf = tmp_path / "b.conf"
    conf.write_text("ClusterName=b\n")
    at = programs.folder
    programs("squeue", f'case "$SLURM_CONF" in *b.conf) echo \'{{"jobs": []}}\';; '
             f"*) cat {at}/squeue-busy.json;; esac")
    monkeypatch.setenv("RADICAL_QUEUE_CLUSTERS", f"cluster_b={conf}, cluster_c=/nowhere/slurm.conf")
    edge, client = serve()
    assert set(client.list_plugins()) == {"queue_info", "cluster_b", "echo"}
    assert "/nowhere/slurm.conf cannot be read" in edge.host.disabled["cluster_c"]
    with client.get_plugin("queue_info") as own, client.get_plugin("cluster_b") as other:
        assert type(other) is plugins.QueueInfoClient
        assert own.list_all_jobs("*")["jobs"] and other.list_all_jobs("*")["jobs"] == []


def test_clusters_are_read_from_the_environment_or_a_file(home, monkeypatch):
    assert plugins.read_clusters() == {}
    (home / ".radical/edge").mkdir(parents=True, exist_ok=True)
    (home / ".radical/edge/clusters").write_text("# ours\nb = /etc/slurm-b/slurm.conf\n\n")
    assert plugins.read_clusters() == {"b": "/etc/slurm-b/slurm.conf"}
    monkeypatch.setenv("RADICAL_QUEUE_CLUSTERS", "c=/c.conf,d=/d.conf")
    assert plugins.read_clusters() == {"c": "/c.conf", "d": "/d.conf"}
    for bad in ("c", "c=relative", "a b=/c.conf", "=/c.conf"):
        monkeypatch.setenv("RADICAL_QUEUE_CLUSTERS", bad)
        assert refused(plugins.read_clusters).status == 422
    host = PluginHost("x", "edge", home / "state", notify=lambda *_: None, changed=lambda: None)
    host.load(["queue_info"])
    assert "clusters: '=/c.conf' is not NAME=/path" in host.disabled["queue_info"]
