"""The Explorer's view of a real Slurm's queues, in real Chromium: see tests/slurm/README.md and
test_explorer.py. RADICAL_EDGE_REQUIRE=explorer,slurm: fail instead of being skipped."""
from __future__ import annotations

import pytest

from test_explorer import driver, look, stage, window        # noqa: F401 (fixtures)
from test_edge import home, start, wait_until                # noqa: F401 (fixtures)


@pytest.fixture
def jobs(slurm):
    """A running and a held job of ours, and a running one of bob's: {what: job id}."""
    made = {"running": slurm.sbatch("root", "-p", "debug", "-J", "of-ours", "-t", "30"),
            "held": slurm.sbatch("root", "-p", "debug", "-H", "-J", "<img src=x onerror=pwned=1>"),
            "bobs": slurm.sbatch("bob", "-p", "batch", "-J", "of-bob", "-t", "30")}
    slurm.wait_for_job(made["running"], "RUNNING")
    slurm.wait_for_job(made["bobs"], "RUNNING")
    yield made
    slurm.reset()


def test_queues_are_seen_with_their_use_and_jobs_are_filtered_and_cancelled(
        slurm, jobs, stage, window):
    stage.start_edge("cluster", "-p", "queue_info", env={
        name: slurm.env[name] for name in ("PATH", "SLURM_CONF")})
    window.sign_in()
    window.open("#/e/cluster/queue_info")
    window.find("[role=img][aria-label^='debug: ']")
    nodes = slurm.run("sinfo", "-h", "-p", "debug", "-o", "%F").strip().split("/")
    told = window.run("return document.querySelector(\"[aria-label^='debug: ']\").ariaLabel")
    assert told.startswith(f"debug: {nodes[0]} nodes in use, {nodes[1]} free"), (told, nodes)
    window.find(".vrow", "of-ours")
    window.find(".vrow", "<img src=x")
    assert "of-bob" not in window.text()
    look(window, "queue_info")
    window.click("button", "Everybody's")
    window.find(".vrow", "of-bob")
    window.choose("select[aria-label=State]", "RUNNING")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 2,
                "the running ones")
    window.type("main input[type=search]", "of-ours")
    window.wait(lambda: window.run("return document.querySelectorAll('.vrow').length") == 1, "ours")
    window.click(".vrow button", "Cancel")
    window.click(".vrow button", "Really?")
    slurm.wait_for_job(jobs["running"], "CANCELLED")
    window.find(".toast", "is being cancelled")
    window.wait(lambda: not window.run("return document.querySelectorAll('.vrow').length"),
                "its end in the list")
