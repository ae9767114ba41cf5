#!/usr/bin/env python3
"""Measure tasks through a bridge and an edge next to the same tasks given to rhapsody-py directly.

    tests/setup-rhapsody.sh && .venv-rhapsody/bin/python bench/tasks.py [--tasks 2000] [--rounds 3]

Programs are /bin/true and functions are math.sqrt. The reference is a rhapsody.Session of its own
in this process, with the backend `concurrent`: submit all, wait for all. A session's first tasks
are measured, for which workers start and functions are loaded, and as many again. Without
rhapsody-py there is no reference, and the figures are tasks per second alone.
"""
from __future__ import annotations

import argparse
import asyncio
import logging
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Scene, memory_mib

sys.path.insert(0, str(ROOT))
from radical_edge import BridgeClient  # noqa: E402

KINDS = {"programs": {"executable": "/bin/true"}, "functions": {"function": "math:sqrt",
                                                                "args": [9.0]}}

PORTION = 1000                 # programs given to rhapsody-py at a time: it starts them all at once


async def run_directly(kind: str, tasks: int, folder: str) -> float:
    """Return the tasks per second of rhapsody-py alone."""
    import rhapsody
    session = rhapsody.Session(backends=[await rhapsody.get_backend("concurrent")],
                               uid=f"direct.{time.time_ns()}", work_dir=folder)
    given = {"executable": "/bin/true"} if kind == "programs" else {"function": math.sqrt,
                                                                    "args": [9.0]}
    begin = time.perf_counter()
    made = [rhapsody.ComputeTask(uid=f"t{n}", **given) for n in range(tasks)]
    portion = PORTION if kind == "programs" else tasks
    for at in range(0, tasks, portion):
        await session.submit_tasks(made[at:at + portion])
        await session.wait_tasks(made[at:at + portion])
    rate = tasks / (time.perf_counter() - begin)
    assert all(task["state"] == "DONE" for task in made)
    await session.close()
    return rate


def run_through(session: object, kind: str, tasks: int) -> float:
    """Return the tasks per second through the bridge, with all results at the client."""
    begin = time.perf_counter()
    given = [dict(KINDS[kind]) for _ in range(tasks)]
    uids = [task["uid"] for task in session.submit_tasks(given)]
    ended = session.wait_tasks(uids, 3600)
    rate = tasks / (time.perf_counter() - begin)
    assert all(task["state"] == "DONE" for task in ended) and len(ended) == tasks
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder))
        try:
            scene.wait_online("/bench/rhapsody/version")
            measure(scene, options.tasks, options.rounds, folder)
        finally:
            scene.close()


def measure(scene: Scene, tasks: int, rounds: int, folder: str) -> None:
    """Print a line for each kind of tasks and each backend."""
    with BridgeClient(f"http://127.0.0.1:{scene.port}", token=scene.token) as client:
        edge = client.get_edge_client("bench")
        probe = edge.get_plugin("rhapsody", backends=["local"])
        there = probe.list_backends()["backends"]
        probe.close()
        backends = [name for name in ("local", "concurrent") if there[name]["available"]]
        for kind in KINDS:
            rates = {name: [] for name in ["directly", *backends, *map(again, backends)]}
            for _ in range(rounds):               # by turns: the machine is not always as fast
                measure_round(edge, kind, tasks, folder, rates)
            show(kind, tasks, rates)
        print(f"edge: {memory_mib(scene.edge.pid):.0f} MiB afterwards")


def again(name: str) -> str:
    """Return what the second portion of a session on that backend is called."""
    return f"{name}, again"


def measure_round(edge: object, kind: str, tasks: int, folder: str, rates: dict) -> None:
    """Add a figure to each of `rates`: of a new session's first tasks, and of as many more."""
    if "concurrent" in rates:
        rates["directly"].append(asyncio.run(run_directly(kind, tasks, folder)))
    for name in [name for name in rates if again(name) in rates]:
        with edge.get_plugin("rhapsody", backends=[name]) as session:
            rates[name].append(run_through(session, kind, tasks))
            rates[again(name)].append(run_through(session, kind, tasks))


def show(kind: str, tasks: int, rates: dict) -> None:
    """Print medians, and the best: on a busy machine, many processes wait where one does not."""
    direct = rates.pop("directly") or [0]
    if direct[0]:
        print(f"{tasks} {kind}: rhapsody-py directly {describe(direct)} a second")
    for name, found in rates.items():
        ratio = f", ratio {statistics.median(found) / statistics.median(direct):.2f} (best: " \
            f"{max(found) / max(direct):.2f})" if direct[0] else ""
        print(f"{tasks} {kind}: through the bridge on {name:17} {describe(found)} a second{ratio}")


def describe(rates: list) -> str:
    return f"{statistics.median(rates):,.0f} (best: {max(rates):,.0f})"


if __name__ == "__main__":
    main()
