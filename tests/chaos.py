#!/usr/bin/env python3
"""Kill, freeze, cut and fill up what runs a workload, and check that nothing of it is lost.

    python tests/chaos.py [--seconds 60] [--seed N]

A bridge and an edge run as processes; between them stands a proxy that can cut or stall the link. A
workload submits jobs (each request twice at the same time), sends notifications and follows the
events, while one fault after the other is made. At the end every job must have run exactly once,
every notification must have arrived, in order, and nothing may be left over. Exit status 0 when it
is so. With root, the edge's state lies on a small tmpfs, which three of the faults fill up. An edge
that cannot start on a full disk says so and ends, and is started again, as systemd would do it.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import radical_edge                               # noqa: E402 (its path is known only now)

HEARTBEAT_S = 0.5
SETTLE_S = 60.0
RESTART_S = 0.2                # between an edge's end of its own and its next start
FULL = b"edge-state cannot be written (No space left on device): make room there"

PLUGIN = """
from radical_edge import Plugin, plugin, post

@plugin("chaos")
class Chaos(Plugin):
    @post("emit/{n}")
    async def emit(self, request):
        n = int(request.path_params["n"])
        await self.send_notification("tick", {"n": n})
        return {"n": n}
"""


def wait_for(condition, seconds=SETTLE_S):
    """Return condition()'s first true value, or its last one after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.05)


def free_port(random_):
    """Return a port that no outgoing connection gets by chance while the bridge is down."""
    while True:
        port = random_.randrange(20_000, 30_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Proxy:
    """Passes bytes between the edge and the bridge, unless it is told to cut or to stall."""

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs = set()                       # guarded by _lock: (socket, socket, stalled)
        self._ended = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """Close all connections."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            pair.dead.set()                       # one that is stalled ends as well
        for sock in (sock for pair in pairs for sock in pair.sockets):
            with contextlib.suppress(OSError):    # it was closed in this moment
                sock.shutdown(socket.SHUT_RDWR)

    def stall(self):
        """Pass nothing on any more over the connections that there are, without closing them."""
        with self._lock:
            for pair in self._pairs:
                pair.stalled.set()

    def close(self):
        self._ended = True
        self._listener.shutdown(socket.SHUT_RDWR)                # it wakes the accepting thread
        self._listener.close()
        self.cut()

    def _accept(self):
        while not self._ended:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                if not self._ended:
                    near.close()
                continue
            pair = Pair(near, far)
            with self._lock:
                self._pairs.add(pair)
            threading.Thread(target=self._pass, args=(pair,), daemon=True).start()

    def _pass(self, pair):
        try:
            while not pair.stalled.is_set():
                for sock in select.select(pair.sockets, [], [], 0.2)[0]:
                    data = b"" if pair.stalled.is_set() else sock.recv(65536)
                    if not data:
                        return
                    pair.other(sock).sendall(data)
            pair.dead.wait(30)                    # half open: neither end hears of the other
        except OSError:
            pass
        finally:
            pair.close()
            with self._lock:
                self._pairs.discard(pair)


class Pair:
    """The two connections of one link, on their way through the proxy."""

    def __init__(self, near, far):
        self.sockets = (near, far)
        self.stalled, self.dead = threading.Event(), threading.Event()

    def other(self, sock):
        return self.sockets[sock is self.sockets[0]]

    def close(self):
        for sock in self.sockets:
            sock.close()


class Scene:
    """The processes, where their state lies, and the faults that can be made."""

    def __init__(self, folder, python, random_):
        self.folder, self.python = folder, python
        self.state, self.plugin = folder / "edge-state", folder / "chaos_plugin.py"
        self.plugin.write_text(PLUGIN)
        self.state.mkdir()
        self.port = free_port(random_)
        self.proxy = Proxy(self.port)
        self.faults = collections.Counter()
        self.log = open(folder / "log", "ab")
        self.mounted = os.getuid() == 0 and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.state)],
            stderr=subprocess.DEVNULL).returncode == 0
        self.bridge = self.edge = None
        self._edge_lock = threading.Lock()        # who has it may end the edge and start another
        self._stopping = threading.Event()
        self.restarts = 0                         # of edges that had ended by themselves
        self.start_bridge()
        wait_for(lambda: (folder / ".radical/edge/token").exists(), 10)
        self.token = (folder / ".radical/edge/token").read_text().strip()
        self.start_edge()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start_bridge(self):
        self.bridge = self._start("--bridge", "--port", str(self.port), "--grace", "20")

    def start_edge(self):
        self.edge = self._start("--edge", "--name", "e1", "--url",
                                f"http://127.0.0.1:{self.proxy.port}", "--state", str(self.state),
                                "--plugin-file", str(self.plugin), "-p", "chaos,psij")

    def _start(self, *arguments):
        return subprocess.Popen(
            [self.python, str(ROOT / "radical_edge.py"), *arguments, "--heartbeat",
             str(HEARTBEAT_S), "--log-level", "WARNING"], stdout=self.log, stderr=self.log,
            env={**os.environ, "HOME": str(self.folder)})

    def _supervise(self):
        """Start the edge again whenever it has ended by itself."""
        while not self._stopping.wait(RESTART_S):
            with self._edge_lock:
                if self.edge.poll() is not None:
                    self.restarts += 1
                    self.start_edge()

    # -- faults

    def kill_bridge(self, _random):
        self.bridge.kill()
        self.bridge.wait()
        self.start_bridge()

    def kill_edge(self, _random):
        with self._edge_lock:
            self.edge.kill()
            self.edge.wait()
            self.start_edge()

    def cut_link(self, _random):
        self.proxy.cut()

    def stall_link(self, _random):
        self.proxy.stall()

    def freeze_bridge(self, random_):
        self._freeze(self.bridge, random_)

    def freeze_edge(self, random_):
        self._freeze(self.edge, random_)

    @staticmethod
    def _freeze(process, random_):
        process.send_signal(signal.SIGSTOP)
        time.sleep(random_.uniform(3, 5) * HEARTBEAT_S)
        process.send_signal(signal.SIGCONT)

    def fill_disk(self, _random):
        with self._full_disk():
            time.sleep(1.0)

    def kill_edge_on_full_disk(self, random_):
        with self._full_disk():
            self.kill_edge(random_)
            time.sleep(random_.uniform(0.2, 2.0))

    def fill_disk_at_start(self, random_):
        """Fill up the disk at some point of an edge's start."""
        self.kill_edge(random_)
        time.sleep(random_.uniform(0.0, 0.5))
        with self._full_disk():
            time.sleep(1.0)

    @contextlib.contextmanager
    def _full_disk(self):
        filler = self.state / "filler"
        try:
            with open(filler, "wb", buffering=0) as file:
                while file.write(bytes(65536)):
                    pass
        except OSError:
            pass
        try:
            yield
        finally:
            filler.unlink()

    def make_faults(self, random_, end):
        """Make one fault after the other until `end`."""
        faults = [self.kill_bridge, self.kill_edge, self.cut_link, self.stall_link,
                  self.freeze_bridge, self.freeze_edge]
        if self.mounted:
            faults += [self.fill_disk, self.kill_edge_on_full_disk, self.fill_disk_at_start]
        while time.monotonic() < end:
            time.sleep(random_.uniform(0.5, 3.0))
            fault = random_.choice(faults)
            self.faults[fault.__name__] += 1
            fault(random_)

    # -- the end

    def stop(self):
        """End both processes; return their exit statuses."""
        self._stopping.set()
        self._supervisor.join()
        for process in (self.edge, self.bridge):
            process.send_signal(signal.SIGTERM)
        try:
            return [process.wait(15) for process in (self.edge, self.bridge)]
        finally:
            for process in (self.edge, self.bridge):
                process.kill()
            self.proxy.close()

    def unexplained_ends(self):
        """Return how many times the edge ended by itself without a full disk."""
        return max(0, self.restarts - (self.folder / "log").read_bytes().count(FULL))

    def clean(self):
        self._stopping.set()
        self._supervisor.join()
        for process in (self.edge, self.bridge):
            process.kill()
        self.log.close()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.state)], check=False)

    def usage(self):
        """Return (threads, open files) of bridge and edge."""
        return [(len(os.listdir(f"/proc/{process.pid}/task")),
                 len(os.listdir(f"/proc/{process.pid}/fd")))
                for process in (self.bridge, self.edge)] if os.path.isdir("/proc/self") else []

    def left_processes(self):
        """Return the command lines of processes that have our HOME."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if f"HOME={self.folder}".encode() in environment and command:
                found.append(command.replace(b"\0", b" ").decode()[:100])
        return found

    def half_written(self):
        """Return the state files that cannot be read, and the temporary ones that were left."""
        bad = []
        for base in (self.state, self.folder / ".radical"):
            for path in base.rglob("*.json"):
                try:
                    json.loads(path.read_text())
                except ValueError:
                    bad.append(str(path.relative_to(self.folder)))
        return bad


class Workload:
    """Jobs, notifications, and somebody who follows the events."""

    def __init__(self, scene):
        self.scene = scene
        self.client = radical_edge.BridgeClient(scene.url, token=scene.token)
        self.stopping, self.following = threading.Event(), threading.Event()
        self.jobs, self.unanswered = {}, []       # job_id by number; numbers without an answer
        self.ticks = 0                            # the last that was acknowledged
        self.found = []                           # ticks in the order of their arrival
        self.ended = set()                        # jobs whose end was told
        self.counts = collections.Counter()
        self.out = scene.folder / "out"
        self.out.mkdir()
        self.sid = wait_for(self._open_session)
        self._threads = [threading.Thread(target=target, daemon=True)
                         for target in (self._submit, self._emit, self._follow)]

    def start(self):
        self._threads[-1].start()
        self.following.wait(SETTLE_S)             # the first event came: nothing is missed from now
        for thread in self._threads[:2]:
            thread.start()

    def stop(self):
        self.stopping.set()
        for thread in self._threads[:2]:
            thread.join(SETTLE_S)

    def _open_session(self):
        try:
            return self.client.http.post("/e1/psij/register_session").raise_for_status() \
                .json()["sid"]
        except radical_edge.EdgeError:
            return None

    def _ask(self, path, body, key):
        """POST until there is a definite answer; None when there was none to the end."""
        end = None
        while True:
            try:
                reply = self.client.http.post(path, json=body, headers={"Idempotency-Key": key})
                if reply.status_code not in (404, 429, 502, 503, 504):
                    return reply
                self.counts[f"answer {reply.status_code}"] += 1
            except radical_edge.EdgeError:
                self.counts["no answer"] += 1
            if self.stopping.is_set():
                end = end or time.monotonic() + SETTLE_S / 2
                if time.monotonic() > end:
                    return None
            time.sleep(0.1)

    def _submit(self):
        number = 0
        while not self.stopping.is_set():
            number += 1
            path = self.out / str(number)
            spec = {"executable": "/bin/sh", "arguments": ["-c", f"echo x >> {path}"]}
            body, replies = {"job_spec": spec, "executor": "local"}, []
            twins = [threading.Thread(target=lambda: replies.append(self._ask(
                f"/e1/psij/submit/{self.sid}", body, f"job {number}"))) for _ in range(2)]
            for twin in twins:
                twin.start()
            for twin in twins:
                twin.join()
            ids = {reply.json().get("job_id") or reply.text for reply in replies if reply}
            if len(ids) == 1 and replies[0] and replies[0].status_code == 200:
                self.jobs[number] = ids.pop()
            else:
                self.unanswered.append((number, ids))

    def _emit(self):
        while not self.stopping.is_set():
            reply = self._ask(f"/e1/chaos/emit/{self.ticks + 1}", None, f"tick {self.ticks + 1}")
            if reply is None:
                return
            if reply.status_code == 409:          # killed before it answered: it may be told twice
                reply = self._ask(f"/e1/chaos/emit/{self.ticks + 1}", None,
                                  f"tick {self.ticks + 1} again")
            if reply is not None and reply.status_code == 200:
                self.ticks += 1
            self.counts["notifications"] += 1

    def _follow(self):
        for event in radical_edge.events(url=self.scene.url, token=self.scene.token):
            self.following.set()
            if event["topic"] == "gap":
                self.counts["gaps"] += 1
            if event["topic"] != "notification":
                continue
            data = event["data"]
            if data["topic"] == "tick":
                self.found.append(data["data"]["n"])
            elif data["data"]["state"] in ("COMPLETED", "FAILED", "CANCELED"):
                self.ended.add(data["data"]["job_id"])
                self.counts["job ends told"] += 1

    # -- what must hold at the end

    def check(self):
        """Return what does not hold, in a list of sentences."""
        wait_for(lambda: set(range(1, self.ticks + 1)) <= set(self.found))
        wait_for(lambda: set(self.jobs.values()) <= self.ended)
        first = list(dict.fromkeys(self.found))
        runs = {number: self._runs(number) for number in self.jobs}
        listed = wait_for(self._list_jobs) or {}
        failures = {
            "jobs that did not run exactly once": [
                (n, count, listed.get(self.jobs[n])) for n, count in runs.items() if count != 1],
            "unanswered jobs that ran twice": [n for n, _ in self.unanswered if self._runs(n) > 1],
            "jobs that the session has lost": [n for n, job in self.jobs.items()
                                               if job not in listed],
            "jobs whose end was not told": [n for n, job in self.jobs.items()
                                            if job not in self.ended],
            "notifications that did not arrive": sorted(
                set(range(1, self.ticks + 1)) - set(self.found)),
            "notifications out of order": [] if first == sorted(first) else [first],
            "gaps": [self.counts["gaps"]] if self.counts["gaps"] else [],
        }
        return [f"{what}: {which[:10]}" for what, which in failures.items() if which]

    def _runs(self, number):
        path = self.out / str(number)
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _list_jobs(self):
        try:
            reply = self.client.http.get(f"/e1/psij/list_jobs/{self.sid}").raise_for_status()
            return {job["job_id"]: f"{job['state']}: {job['message']}"
                    for job in reply.json()["jobs"]}
        except radical_edge.EdgeError:
            return None


def run(options, folder):
    """Run the whole; return what does not hold."""
    random_ = random.Random(options.seed)
    scene = Scene(folder, options.python, random_)
    try:
        workload = Workload(scene)
        before = scene.usage()
        workload.start()
        scene.make_faults(random_, time.monotonic() + options.seconds)
        workload.stop()
        failures = workload.check()
        grown = wait_for(lambda: not has_grown(before, scene.usage()), 20)
        if not grown:
            failures.append(f"threads and files grew from {before} to {scene.usage()}")
        workload.client.close()
        statuses = scene.stop()
        if statuses != [0, 0]:
            failures.append(f"exit statuses of edge and bridge: {statuses}")
        if scene.unexplained_ends():
            failures.append(f"ends of an edge without a reason: {scene.unexplained_ends()}")
        left = wait_for(lambda: not scene.left_processes(), 10) or scene.left_processes()
        if left is not True:
            failures.append(f"processes left over: {left}")
        failures += [f"half-written: {path}" for path in scene.half_written()]
        report(options, scene, workload, before)
        if failures and options.keep:
            shutil.copy(folder / "log", options.keep)
        return failures
    finally:
        scene.clean()


def has_grown(before, after):
    """Whether threads or files are more than a few more than they were."""
    return any(new > old + 12 for pair in zip(before, after) for old, new in zip(*pair))


def report(options, scene, workload, before):
    faults = ", ".join(f"{name} {count}" for name, count in sorted(scene.faults.items()))
    counts = ", ".join(f"{name} {count}" for name, count in sorted(workload.counts.items()))
    print(f"{options.seconds:.0f} s, seed {options.seed}; faults: {faults}; "
          f"an edge that could not start was started again {scene.restarts} times")
    print(f"jobs answered {len(workload.jobs)}, unanswered {len(workload.unanswered)}; "
          f"notifications acknowledged {workload.ticks}, told {len(workload.found)}, "
          f"twice {len(workload.found) - len(set(workload.found))}; {counts}")
    print(f"threads and files of bridge and edge at first: {before}")
    for number, answers in workload.unanswered[:5]:
        print(f"unanswered: {number}: {answers}")
    if not scene.mounted:
        print("left out: the full disk, which needs root and tmpfs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10 ** 6))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--keep", help="where to keep the processes' log when something fails")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="radical-edge-chaos-"))
    try:
        failures = run(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for failure in failures:
        print(f"FAILED: {failure}")
    print("nothing was lost" if not failures else f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
