"""Tests of the plugin queue_info against a real Slurm: an edge that runs as a normal user, asked
over a bridge, and each of its figures compared with what `scontrol` says: see tests/slurm/.

    $ sh tests/setup-slurm.sh 24.11
    $ python -m pytest tests/test_slurm_queues.py      # RADICAL_EDGE_REQUIRE=slurm: do not skip
    $ SLURM_TEST_VERSION=22.05 python -m pytest tests/test_slurm_queues.py
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plugins
from radical_edge import BridgeClient, EdgeError
from slurm_cluster import check_job
from test_edge import SCRIPT, wait_until

STATE_S = 150                  # a job that is to run into its limit has one minute, and some grace


@pytest.fixture(scope="module")
def jobs(slurm):
    """Jobs in every state, of three users, and a drained node: {what: job id}."""
    made = {"timeout": slurm.sbatch("root", "-p", "debug", "-t", "1"),
            "failed": slurm.sbatch("root", "-p", "debug", script="exit 3"),
            "completed": slurm.sbatch("root", "-p", "debug", script="true"),
            "cancelled": slurm.sbatch("root", "-p", "debug", "-n", "1")}
    slurm.wait_for_job(made["cancelled"], "RUNNING")
    slurm.run("scancel", made["cancelled"])
    made.update(
        running=slurm.sbatch("alice", "-p", "debug", "-t", "10", "-J", "a|b\n1|c"),
        gpu=slurm.sbatch("alice", "-p", "gpu", "-A", "proj_a", "-q", "gpuq", "--gres=gpu:a100:2",
                         "-c", "2", "--mem=2G", "-t", "5"),
        held=slurm.sbatch("alice", "-p", "debug", "-H"),
        unlimited=slurm.sbatch("root", "-p", "batch", "-t", "UNLIMITED", "-N", "2"),
        array=slurm.sbatch("root", "-p", "debug", "--array=0-5%2", "-t", "5"),
        bobs=slurm.sbatch("bob", "-p", "batch", "-t", "30"))
    made["dependent"] = slurm.sbatch("root", "-p", "debug", "-d", f"afterok:{made['running']}")
    made["later"] = slurm.sbatch("root", "-p", "debug", "-b", "now+1hour")
    for name in ("running", "gpu", "unlimited", "bobs"):
        slurm.wait_for_job(made[name], "RUNNING")
    made["limited"] = slurm.sbatch("alice", "-p", "debug")    # proj_a lets alice run two
    slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=a test")
    slurm.wait_for_job(made["timeout"], "TIMEOUT", timeout=STATE_S)
    yield made
    slurm.reset()


@pytest.fixture
def start_edge(slurm, slurm_home, bridge, tokens):
    """Returns a function: starts an edge as a user, returns its QueueInfoClient."""
    started, clients = [], []

    def start(user, plugin="queue_info", **env):
        environment = slurm.environment(user, HOME=str(slurm_home(user)),
                                        RADICAL_BRIDGE_TOKEN=tokens[1]["edge"], **env)
        command = slurm.command(user, sys.executable, SCRIPT, "--edge", "--url", bridge.url,
                                "--name", user, "-p", "queue_info")
        started.append(subprocess.Popen(command, env=environment, cwd="/"))
        wait_until(lambda: user in bridge._registry.links, 60, f"{user}'s edge")
        if not clients:
            clients.append(BridgeClient(url=bridge.url, token=tokens[1]["client"]))
        return clients[0].get_edge_client(user).get_plugin(plugin)

    yield start
    for client in clients:
        client.close()
    for process in started:
        process.terminate()
        assert process.wait(20) is not None


@pytest.fixture
def alice(start_edge):
    return start_edge("alice")


def truth_of(slurm, kind):
    """Return {name: {key: value}} of `scontrol -o show node` or `partition`."""
    rows = [dict(re.findall(r"(\w[\w:/.]*)=(\S*)", line))
            for line in slurm.run("scontrol", "-o", "show", kind).splitlines()]
    return {row["NodeName" if kind == "node" else "PartitionName"]: row for row in rows if row}


def test_partitions_are_as_scontrol_shows_them(slurm, jobs, alice):
    queues = alice.get_info(user="*", force=True)["queues"]
    nodes, partitions = truth_of(slurm, "node"), truth_of(slurm, "partition")
    assert sorted(queues) == sorted(partitions) == ["batch", "debug", "gpu"]
    for name, queue in queues.items():
        mine = [node for node in nodes.values() if name in node["Partitions"].split(",")]
        up = [node for node in mine if "DRAIN" not in node["State"]]
        limit = partitions[name]["MaxTime"]
        assert queue["time_limit"] == (limit if limit == "UNLIMITED" else
                                       plugins.parse_slurm_duration(limit))
        assert queue["default_time"] == \
            plugins.parse_slurm_duration(partitions[name]["DefaultTime"])
        assert queue["default"] == (partitions[name]["Default"] == "YES")
        assert queue["state"] == partitions[name]["State"]
        assert queue["nodes_total"] == int(partitions[name]["TotalNodes"])
        assert queue["nodes_available"] == len(up)
        assert queue["nodes_idle"] == sum(node["State"].startswith("IDLE") for node in up)
        assert queue["cpus_per_node"] == max(int(node["CPUTot"]) for node in mine)
        assert queue["mem_per_node_mb"] == max(int(node["RealMemory"]) for node in mine)
        assert queue["features"] == sorted({feature for node in mine for feature in
                                            node["AvailableFeatures"].split(",")})
    assert nodes["n2"]["State"].endswith("DRAIN")
    assert (queues["debug"]["nodes_total"], queues["debug"]["nodes_available"]) == (2, 1)
    assert (queues["debug"]["time_limit"], queues["batch"]["time_limit"]) == (1800, "UNLIMITED")
    assert (queues["gpu"]["gpus_per_node"], queues["debug"]["gpus_per_node"]) == (4, 0)


def test_users_see_the_partitions_that_their_accounts_may_use(jobs, alice):
    assert sorted(alice.get_info()["queues"]) == ["batch", "debug", "gpu"]
    assert sorted(alice.get_info(user="bob")["queues"]) == ["batch", "debug"]


def test_every_job_is_as_scontrol_shows_it(slurm, jobs, alice):
    found = {job["job_id"]: job for job in alice.list_all_jobs("*", True, "ALL")["jobs"]}
    expected = {"timeout": "TIMEOUT", "failed": "FAILED", "completed": "COMPLETED",
                "cancelled": "CANCELLED", "running": "RUNNING", "gpu": "RUNNING",
                "held": "PENDING", "limited": "PENDING", "unlimited": "RUNNING",
                "bobs": "RUNNING", "dependent": "PENDING", "later": "PENDING"}
    for name, state in expected.items():
        job = found[jobs[name]]
        assert (name, job["state"]) == (name, state)
        check_job(job, slurm.job(jobs[name]))
    for job in found.values():
        if job["array_tasks"] and job["array_tasks"].isdigit():
            check_job(job, slurm.job(job["job_id"]))
    assert found[jobs["running"]]["job_name"] == "a|b\n1|c"
    assert found[jobs["held"]]["held"] and found[jobs["held"]]["reason"] == "JobHeldUser"
    assert found[jobs["limited"]]["reason"] == "AssocMaxJobsLimit"
    assert found[jobs["gpu"]]["gpus"] == 2 and found[jobs["gpu"]]["qos"] == "gpuq"
    assert found[jobs["unlimited"]]["time_limit"] == "UNLIMITED"
    assert found[jobs["failed"]]["exit_code"] == 3
    assert found[jobs["dependent"]]["dependency"].startswith(f"afterok:{jobs['running']}")
    wait = found[jobs["later"]]["estimated_start"] - found[jobs["later"]]["submit_time"]
    assert 3500 <= wait <= 3700
    used = found[jobs["running"]]["time_used"]
    began = int(slurm.job(jobs["running"])["StartTime"])
    assert 0 <= used <= plugins.time.time() - began + 1


def test_jobs_are_told_by_state_user_and_queue(jobs, alice):
    mine = {job["job_id"] for job in alice.list_all_jobs(force=True)["jobs"]}
    assert mine == {jobs[name] for name in ("running", "gpu", "held", "limited")}
    held = alice.list_all_jobs(state="HELD", force=True)["jobs"]
    assert [job["job_id"] for job in held] == [jobs["held"]]
    pending = {job["job_id"] for job in alice.list_all_jobs("*", True, "pending")["jobs"]}
    assert {jobs["held"], jobs["limited"], jobs["dependent"], jobs["later"]} <= pending
    ended = {job["job_id"] for job in alice.list_all_jobs("*", True, "FAILED,TIMEOUT")["jobs"]}
    assert {jobs["failed"], jobs["timeout"]} <= ended and jobs["completed"] not in ended
    assert [job["job_id"] for job in alice.list_jobs("gpu", "*", True)["jobs"]] == [jobs["gpu"]]
    assert {job["job_id"] for job in alice.list_all_jobs("bob", True)["jobs"]} == {jobs["bobs"]}
    for ask in (lambda: alice.list_jobs("nosuch"), lambda: alice.list_all_jobs("nosuchuser")):
        with pytest.raises(EdgeError) as caught:
            ask()
        assert caught.value.status in (404, 422) and "nosuch" in caught.value.detail


def test_arrays_are_one_row_for_what_waits_and_one_for_each_task_that_runs(jobs, alice):
    rows = [job for job in alice.list_all_jobs("*", True)["jobs"]
            if job["array_job_id"] == jobs["array"]]
    waiting = [job for job in rows if job["state"] == "PENDING"]
    assert len(waiting) == 1 and "%2" in waiting[0]["array_tasks"]
    assert waiting[0]["job_id"] == f"{jobs['array']}_[{waiting[0]['array_tasks']}]"
    tasks = [job for job in rows if job["state"] != "PENDING"]
    assert all(job["job_id"] == f"{jobs['array']}_{job['array_tasks']}" for job in tasks)


def test_accounts_and_limits_are_as_sacctmgr_has_them(slurm, alice):
    rows = {row["account"]: row for row in alice.list_allocations(force=True)["allocations"]}
    assert set(rows) == {"proj_a", "proj_b"} and rows["proj_a"]["user"] == "alice"
    shown = slurm.run("sacctmgr", "-P", "-n", "show", "assoc", "where", "user=alice",
                      "format=account,maxjobs,maxsubmit,maxwall,qos,share")
    for line in shown.splitlines():
        account, jobs, submit, wall, qos, share = line.split("|")
        row = rows[account]
        assert (row["max_jobs"], row["max_submit"]) == tuple(
            int(text) if text else None for text in (jobs, submit))
        assert row["max_wall"] == plugins.parse_slurm_duration(wall)
        assert row["qos"] == sorted(qos.split(",")) and row["fairshare"] == int(share)
    everyone = {(row["account"], row["user"]): row for row in
                alice.list_allocations("*")["allocations"]}
    assert everyone["proj_b", ""]["grp_tres"] == {"cpu": 4, "mem": 8000}
    assert everyone["proj_b", "bob"]["max_tres"] == {"cpu": 2}
    assert everyone["proj_a", ""]["grp_tres_minutes"] == {"cpu": 600000}


def test_ones_own_job_is_cancelled_and_then_there_is_nothing_to_cancel(slurm, jobs, alice):
    job_id = slurm.sbatch("alice", "-p", "batch", "-H")
    assert job_id in {job["job_id"] for job in alice.list_all_jobs()["jobs"]}
    assert alice.cancel_job(job_id) == {"job_id": job_id, "status": "canceled"}
    assert slurm.wait_for_job(job_id, "CANCELLED")
    assert job_id not in {job["job_id"] for job in alice.list_all_jobs()["jobs"]}     # not kept
    with pytest.raises(EdgeError) as caught:
        alice.cancel_job(job_id)
    assert caught.value.status == 409
    assert "already completing or completed" in caught.value.detail


def test_tasks_of_an_array_that_wait_are_cancelled_by_the_id_that_is_shown(slurm, start_edge, jobs):
    bob = start_edge("bob")
    array = slurm.sbatch("bob", "-p", "batch", "--array=0-3%1", "-H")
    shown = [job["job_id"] for job in bob.list_all_jobs(force=True)["jobs"]
             if job["array_job_id"] == array]
    assert shown == [f"{array}_[0-3%1]"]
    bob.cancel_job(shown[0])
    wait_until(lambda: not [job for job in bob.list_all_jobs(force=True)["jobs"]
                            if job["array_job_id"] == array], 30, "the end of the array")


def test_somebody_elses_job_cannot_be_cancelled_and_an_unknown_one_is_unknown(slurm, jobs, alice):
    for job_id, status, words in ((jobs["bobs"], 403, "Access/permission denied"),
                                  ("999999", 404, "Invalid job id specified")):
        with pytest.raises(EdgeError) as caught:
            alice.cancel_job(job_id)
        assert (caught.value.status, words in caught.value.detail) == (status, True)
    assert slurm.job(jobs["bobs"])["JobState"] == "RUNNING"


def run_python(slurm, user, expression, **env):
    """Return the JSON value of an expression of plugins' names, evaluated as that user."""
    code = ("import json, sys; sys.path.insert(0, sys.argv[1]); import plugins\n"
            "print(json.dumps(eval(sys.argv[2], vars(plugins))))")
    return json.loads(slurm.run(sys.executable, "-c", code, str(Path(SCRIPT).parent), expression,
                                user=user, **env))


def test_an_edge_inside_a_job_tells_its_allocation(slurm, jobs):
    ask = "QueueInfoSlurm().job_allocation()"
    assert run_python(slurm, "alice", ask) is None
    found = run_python(slurm, "alice", ask, SLURM_JOB_ID=jobs["gpu"])
    assert found == {"job_id": jobs["gpu"], "partition": "gpu", "n_nodes": 1, "nodelist": "n4",
                     "cpus_per_node": 2, "gpus_per_node": 2, "account": "proj_a",
                     "job_name": "wrap", "runtime": 300}
    two = run_python(slurm, "root", ask, SLURM_JOB_ID=jobs["unlimited"])
    assert (two["n_nodes"], two["runtime"]) == (2, None)


def test_the_nodes_of_a_job_are_those_that_run_it(slurm, jobs):
    named = slurm.run("scontrol", "show", "hostnames", slurm.job(jobs["unlimited"])["NodeList"])
    assert run_python(slurm, "alice", f"QueueInfoSlurm.get_job_nodes({jobs['unlimited']})") == \
        named.split()
    for job in (jobs["held"], "999999"):
        assert run_python(slurm, "alice", f"QueueInfoSlurm.get_job_nodes({job})") == []


def test_a_controller_that_hangs_leaves_the_last_answer_until_it_goes_on(slurm, jobs, alice):
    before = alice.list_all_jobs("*", force=True)
    with slurm.frozen_controller():
        answer = alice.list_all_jobs("*", force=True)
        assert answer["stale"] is True and answer["jobs"] == before["jobs"]
        assert "has not answered for 10 s" in answer["problem"]
        assert alice.backend() == "slurm"
    wait_until(lambda: "stale" not in alice.list_all_jobs("*", force=True), 120, "a fresh answer")


def test_a_second_cluster_is_asked_through_its_own_slurm_conf(slurm, slurm_home, jobs, start_edge):
    conf = slurm_home("alice") / "slurm.conf"
    conf.write_text(Path(slurm.conf).read_text())
    second = start_edge("alice", "second", RADICAL_QUEUE_CLUSTERS=f"second={conf}",
                        SLURM_CONF="/nowhere/slurm.conf")     # the machine's own is not there
    assert second.backend() == "slurm"
    assert jobs["bobs"] in {job["job_id"] for job in second.list_all_jobs("*")["jobs"]}


def test_a_controller_that_cannot_be_reached_is_503_in_slurms_own_words(slurm, slurm_home):
    broken = slurm_home("alice") / "slurm.conf"
    text = re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=9\nMessageTimeout=5",
                  Path(slurm.conf).read_text())
    broken.write_text(text)                       # nobody listens at that port
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import plugins\n"
            "try: print(plugins.QueueInfoSlurm(sys.argv[2]).list_all_jobs())\n"
            "except plugins.EdgeError as error: print(error)")
    said = slurm.run(sys.executable, "-c", code, str(Path(SCRIPT).parent), str(broken),
                     user="alice", timeout=120)
    assert re.match(r"HTTP 503: .*(Unable to contact slurm controller|looking for jobs)", said)
