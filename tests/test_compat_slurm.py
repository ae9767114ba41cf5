"""queue_info and psij on a real Slurm: clients of radical.edge 0.2 and our edges, our clients and
its edges. See test_compat.py and tests/slurm/README.md.

    $ tests/setup-compat.sh && sh tests/setup-slurm.sh 24.11
    $ python -m pytest tests/test_compat_slurm.py   # RADICAL_EDGE_REQUIRE=compat,slurm: do not skip
"""
from __future__ import annotations

from test_compat import across, client, their_client, their_edge         # noqa: F401 (fixtures)
from test_edge import wait_until


def test_queues_and_jobs_of_a_real_slurm_are_asked_for_across(across, slurm):  # noqa: F811
    env = {name: slurm.env[name] for name in ("PATH", "SLURM_CONF")}
    ask = across("queue_info", "queue_info", env)
    running = slurm.sbatch("root", "-p", "debug", "-t", "30", "-J", "of-ours")
    held = slurm.sbatch("root", "-p", "debug", "-t", "30", "-H")
    bobs = slurm.sbatch("bob", "-p", "batch", "-t", "30")
    slurm.wait_for_job(running, "RUNNING")
    assert ask("backend") == "slurm" and ask("nodelist") == []
    assert ask("job_allocation") is None
    queues = ask("get_info", user="*", force=True)["queues"]
    assert set(queues) == {"batch", "debug", "gpu"} == set(ask("get_info")["queues"])
    assert set(queues["gpu"]) >= {
        "name", "state", "time_limit", "default", "nodes_total", "nodes_available", "nodes_idle",
        "cpus_per_node", "mem_per_node_mb", "gpus_per_node", "max_jobs_per_user", "features"}
    assert queues["debug"]["state"] == "UP" and queues["gpu"]["gpus_per_node"] > 0
    jobs = {job["job_id"]: job for job in ask("list_jobs", "debug", force=True)["jobs"]}
    assert set(jobs) >= {running, held} and bobs not in jobs
    assert set(jobs[running]) >= {
        "job_id", "job_name", "user", "partition", "state", "nodes", "cpus", "time_limit",
        "time_used", "submit_time", "start_time", "priority", "account", "node_list"}
    assert {name: jobs[running][name] for name in ("job_name", "user", "partition", "state")} == {
        "job_name": "of-ours", "user": "root", "partition": "debug", "state": "RUNNING"}
    assert jobs[held]["state"] == "PENDING"
    for user, expected in (("bob", {bobs}), ("*", {running, held, bobs}), (None, {running, held})):
        jobs = ask("list_all_jobs", user=user, force=True)["jobs"]
        assert {job["job_id"] for job in jobs} & {running, held, bobs} == expected
    rows = ask("list_allocations", user="alice", force=True)["allocations"]
    assert {(row["account"], row["user"]) for row in rows} >= {("proj_a", "alice")}
    assert set(rows[0]) >= {"account", "user", "fairshare", "qos", "max_jobs", "max_submit",
                            "max_wall", "grp_tres", "allocated_node_hours", "used_node_hours",
                            "remaining_node_hours"}
    assert ask("cancel_job", held) == {"job_id": held, "status": "canceled"}
    slurm.wait_for_job(held, "CANCELLED")
    slurm.reset()


def test_a_machine_with_queues_is_known_as_one_by_any_edge(across, slurm, client):  # noqa: F811
    across("queue_info", "queue_info", {name: slurm.env[name] for name in ("PATH", "SLURM_CONF")})
    with client.get_edge_client("far").get_plugin("queue_info") as queues:
        assert queues.is_enabled() is True        # theirs has no such route


def test_batch_jobs_are_submitted_across_and_end_with_their_state(across, slurm):  # noqa: F811
    ask = across("psij", "psij", {name: slurm.env[name] for name in ("PATH", "SLURM_CONF")})
    job_id = ask("submit_job", {
        "executable": "/bin/sh", "arguments": ["-c", "exit 3"],
        "attributes": {"duration": 600, "queue_name": "debug"}}, "slurm")["job_id"]
    job = wait_until(lambda: {job["job_id"]: job for job in ask("list_jobs")["jobs"]}[job_id]
                     ["state"] == "FAILED" and ask("get_job_status", job_id), 120, "the job's end")
    assert (job["executor"], job["exit_code"], job["queue_name"]) == ("slurm", 3, "debug")
    assert slurm.job(job["native_id"])["Partition"] == "debug"
    long = ask("submit_job", {"executable": "/bin/sleep", "arguments": ["600"], "attributes": {
        "duration": 600, "queue_name": "debug"}}, "slurm")["job_id"]
    native = wait_until(lambda: ask("get_job_status", long)["native_id"], 60)
    slurm.wait_for_job(native, "RUNNING", "PENDING")
    assert ask("cancel_job", long) == {"job_id": long, "status": "canceled"}
    slurm.wait_for_job(native, "CANCELLED")
