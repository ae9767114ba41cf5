#!/usr/bin/env python3
"""Measure a proxied GET in two checkouts of this project, in one run, and print their ratio.

    python bench/against.py OLD_DIR [NEW_DIR] [--seconds 0.5] [--rounds 12] [--starts 3]
                            [--connections 1,32,128] [--tls]

Both serve at the same time, with a bridge and an edge each, and so does the direct `http.server`
echo. They take turns in short rounds, so that noise of the machine hits all; a ratio is of two
neighbours. All of it is started anew several times, for a process may have luck with where its
memory lies. Printed are the medians of all rounds, and of a ratio the quartiles as well.
"""
from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Iterator

import proxy

KINDS = ("direct", "old", "new")
DIRECT_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"


@contextlib.contextmanager
def serving(root: Path, tls: bool) -> Iterator[proxy.Processes]:
    """Yield the processes of one checkout, ready."""
    with tempfile.TemporaryDirectory() as folder:
        processes = proxy.Processes(Path(folder), tls, root)
        try:
            proxy.wait_until_online(processes)
            yield processes
        finally:
            processes.close()


def run_rounds(old: proxy.Processes, new: proxy.Processes, connections: int,
               options: argparse.Namespace) -> list[dict[str, tuple[float, float]]]:
    """Return of each round {kind: (requests a second, median latency in seconds)}."""
    targets = {"direct": (new.echo_port, DIRECT_REQUEST, new.context),
               "old": (old.bridge_port, proxy.proxied_request(old), old.context),
               "new": (new.bridge_port, proxy.proxied_request(new), new.context)}
    loads = {kind: proxy.Load(port, request, connections, context)
             for kind, (port, request, context) in targets.items()}
    rounds = []
    for number in range(options.rounds + 1):
        found = {}
        for kind in KINDS if number % 2 else reversed(KINDS):    # none is always the first
            count, latencies = loads[kind].run(options.seconds)
            found[kind] = count / options.seconds, statistics.median(latencies)
        rounds.append(found)
    for load in loads.values():
        load.close()
    return rounds[1:]                              # the first was to warm up


def report(title: str, rounds: list[dict[str, tuple[float, float]]]) -> None:
    rates = [statistics.median(found[kind][0] for found in rounds) for kind in KINDS]
    latencies = [statistics.median(found[kind][1] for found in rounds) * 1e6 for kind in KINDS]
    print(f"{title:10}" + "".join(f"{value:9.0f}" for value in (*rates, *latencies))
          + "".join(f"   {quartiles(rounds, *pair)}" for pair in
                    ((0, "new", "old"), (1, "new", "old"), (1, "new", "direct"))), flush=True)


def quartiles(rounds: list[dict[str, tuple[float, float]]], figure: int, upper: str,
              lower: str) -> str:
    """Return the median of a ratio, with its first and third quartile."""
    ratios = [found[upper][figure] / found[lower][figure] for found in rounds]
    first, median, third = statistics.quantiles(ratios, n=4)
    return f"{median:.3f} ({first:.2f} to {third:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=proxy.ROOT)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each turn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--connections", default="1,32,128")
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    counts = [int(text) for text in options.connections.split(",")]
    rounds: dict[int, list] = {count: [] for count in counts}
    for _ in range(options.starts):
        with serving(options.old, options.tls) as old, serving(options.new, options.tls) as new:
            for count in counts:
                rounds[count] += run_rounds(old, new, count, options)
    print("          requests per second        latency, us                "
          "rate, new/old           latency, new/old        latency, new/direct")
    print("conns        direct      old      new   direct      old      new")
    for count in counts:
        report(("tls " if options.tls else "plain ") + str(count), rounds[count])


if __name__ == "__main__":
    main()
