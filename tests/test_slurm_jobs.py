"""Tests of the psij plugin on a real Slurm, as the user alice; every figure against scontrol's.

Stand-ins for Slurm's programs serve only for what a real one does not do on demand: to hang, to
print garbage or too much, to be absent.
"""
from __future__ import annotations

import contextlib
import json
import os
import pwd
import queue
import signal
import subprocess
import sys
import threading
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import plugins                                                            # noqa: E402
import radical_edge                                                       # noqa: E402
from plugins import Verdict, conclude                                     # noqa: E402
from radical_edge import BridgeClient, EdgeError, Unprocessable           # noqa: E402
from test_edge import (SCRIPT, ask, make_program, needs_module, psij,     # noqa: E402, F401
                       wait_until)

WAIT_S = 90                    # patience for Slurm on a busy machine


# ---------------------------------------------------------------------------
# An edge of alice's, as a process, at a bridge in this process
# ---------------------------------------------------------------------------

class Site:
    """alice's edge on the cluster, and a client with one session of psij."""

    def __init__(self, slurm, bridge, token, home):
        self.slurm, self.home, self._bridge, self._token = slurm, home, bridge, token
        self._log = open(home / "edge.log", "ab")
        os.chmod(home / "edge.log", 0o644)
        self.work = home.joinpath(".psij", "work", "slurm")      # psij-python's files
        self.process = None
        self.start()
        self.client = BridgeClient(bridge.url)
        self.psij = self.client.get_edge_client("hpc").get_plugin("psij")
        self.told = queue.Queue()
        self.psij.register_notification_callback(lambda *args: self.told.put(args[3]))

    def start(self, **env):
        """Start the edge (again); return when it is connected."""
        wait_until(lambda: "hpc" not in self._bridge._registry.links, 60, "the loss of the link")
        command = self.slurm.command("alice", sys.executable, SCRIPT, "--edge", "-n", "hpc", "-p",
                                     "psij", "--url", self._bridge.url, "--heartbeat", "2")
        environment = self.slurm.environment("alice", HOME=str(self.home),
                                             RADICAL_BRIDGE_TOKEN=self._token, **env)
        self.process = subprocess.Popen(command, env=environment, cwd="/", stdin=subprocess.DEVNULL,
                                        stdout=self._log, stderr=self._log)
        wait_until(lambda: "hpc" in self._bridge._registry.links or
                   self.process.poll() is not None, 60, "the edge's link")
        assert self.process.poll() is None, self.read_log()

    def kill(self):
        """End the edge as a power cut does."""
        self.process.kill()
        self.process.wait()

    def read_log(self):
        return (self.home / "edge.log").read_text()[-4000:]

    def submit(self, script, **spec):
        """Submit `script`, to be run by sh; return (job id, native id)."""
        attributes = spec.setdefault("attributes", {})
        attributes.setdefault("duration", 300)
        spec = {"executable": "/bin/sh", "arguments": ["-c", script], **spec}
        answer = self.psij.submit_job(spec, "slurm")
        return answer["job_id"], answer["native_id"]

    def status(self, job_id):
        return self.psij.get_job_status(job_id)

    def wait_state(self, job_id, *states):
        last = {}

        def is_there():
            last.update(self.status(job_id))
            return last["state"] in states and dict(last)

        return wait_until(is_there, WAIT_S, f"{states}; it is {last}")

    def wait(self, job_id):
        found = self.psij.wait_job(job_id, WAIT_S)
        assert found["finished"], (found, self.read_log())
        return found

    def refuse(self, **spec):
        """Submit what must be refused; return the error."""
        with pytest.raises(EdgeError) as caught:
            self.psij.submit_job({"executable": "/bin/true", **spec}, "slurm")
        return caught.value

    def end(self):
        with contextlib.suppress(EdgeError):
            for job in self.psij.list_jobs()["jobs"]:
                if job["state"] not in plugins.ENDED_STATES:
                    with contextlib.suppress(EdgeError):
                        self.psij.cancel_job(job["job_id"])
        self.client.close()
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


@pytest.fixture
def site(slurm, slurm_home, bridge, tokens):
    made = Site(slurm, bridge, tokens[1]["edge"], slurm_home("alice"))
    yield made
    made.end()
    assert "Traceback" not in made.read_log(), made.read_log()


# ---------------------------------------------------------------------------
# What a job is given, and how it ends
# ---------------------------------------------------------------------------

def test_a_job_runs_as_alice_and_its_output_and_states_come_back(site):
    job_id, native = site.submit("id -un; pwd; echo err >&2; while [ ! -e ~/go ]; do sleep 0.1; "
                                 "done")
    site.wait_state(job_id, "ACTIVE")             # what is shorter than a look may never be seen so
    truth = site.slurm.job(native)
    assert truth["JobState"] == "RUNNING" and truth["JobName"] == "sh"
    assert truth["UserId"].startswith("alice(")
    (site.home / "go").touch()
    found = site.wait(job_id)
    assert (found["state"], found["exit_code"]) == ("COMPLETED", 0)
    assert found["stdout"] == f"alice\n{site.home}\n" and found["stderr"] == "err\n"
    assert found["eof"] and found["native_id"] == native
    states = [site.told.get(timeout=30)["state"] for _ in range(3)]
    assert states == ["QUEUED", "ACTIVE", "COMPLETED"]


@pytest.mark.parametrize("script, code, slurms", [
    ("exit 3", 3, "3:0"), ("kill -9 $$", 137, "137:0"), ("exec /nonsense", 127, "127:0")])
def test_a_jobs_exit_code_is_ours_and_slurms(site, script, code, slurms):
    job_id, native = site.submit(script)
    found = site.wait(job_id)
    assert (found["state"], found["exit_code"]) == ("FAILED", code)
    truth = site.slurm.wait_for_job(native, "FAILED")
    assert truth["ExitCode"] == slurms


def test_what_is_asked_for_is_what_slurm_was_asked_for(site):
    job_id, native = site.submit(
        "sleep 600", name="my job/1", directory="/tmp",
        resources={"node_count": 2, "processes_per_node": 2, "cpu_cores_per_process": 1,
                   "memory": 300 * 2 ** 20},
        attributes={"duration": 5400, "queue_name": "batch", "account": "proj_a",
                    "custom_attributes": {"slurm.comment": "it's for you; really", "slurm.nice": 7,
                                          "slurm.requeue": True, "slurm.hold": True,
                                          "pbs.l": "ignored=here"}})
    truth = site.slurm.job(native)
    assert truth["JobName"] == "my_job_1" and truth["Partition"] == "batch"
    assert truth["NumNodes"].split("-")[0] == "2" and truth["NumTasks"] == "4"
    assert truth["TimeLimit"] == "01:30:00" and truth["WorkDir"] == "/tmp"
    assert truth["Account"] == "proj_a" and truth["Requeue"] == "1" and truth["Nice"] == "7"
    assert truth["MinMemoryNode"] == "300M" and truth["CPUs/Task"] == "1"
    raw = site.slurm.run("scontrol", "-o", "show", "job", native)
    assert "Comment=it's for you; really " in raw
    listed = next(job for job in site.psij.list_jobs()["jobs"] if job["job_id"] == job_id)
    assert (listed["queue_name"], listed["account"], listed["node_count"]) == ("batch", "proj_a", 2)
    assert site.status(job_id)["duration"] == 5400
    wait_until(lambda: "Held" in (site.status(job_id)["message"] or ""), WAIT_S)
    assert site.psij.cancel_job(job_id)["status"] == "canceled"
    assert site.wait(job_id)["state"] == "CANCELED"


def test_gpus_are_asked_for_by_process(site):
    job_id, native = site.submit(
        "echo $CUDA_VISIBLE_DEVICES", resources={"process_count": 1, "gpu_cores_per_process": 2},
        attributes={"duration": 120, "queue_name": "gpu", "account": "proj_a"})
    assert "gres/gpu=2" in site.slurm.run("scontrol", "-o", "show", "job", native)
    assert site.wait(job_id)["stdout"] == "0,1\n"


def test_without_a_duration_the_queues_own_default_counts(site):
    job_id, native = site.submit("sleep 600", attributes={"duration": None, "queue_name": "batch",
                                                          "account": "proj_a"})
    assert site.slurm.job(native)["TimeLimit"] == "01:00:00"     # DefaultTime of the partition
    site.psij.cancel_job(job_id)


def test_every_kind_of_text_reaches_the_job_as_it_is(site):
    texts = ["", " ", "a b", "$HOME", "`id`", "it's", 'say "x"', "back\\slash", "new\nline",
             "ü€😀", "*", "{{mustache}}", "-n", ";", "&&"]
    script = 'import json, os, sys; print(json.dumps([sys.argv[1:], os.environ["A"]]))'
    answer = site.psij.submit_job(
        {"executable": "python3",
         "arguments": ["-c", script, *texts], "environment": {"A": "\n".join(texts), "N": 1.5}},
        "slurm")
    found = site.wait(answer["job_id"])
    assert json.loads(found["stdout"]) == [texts, "\n".join(texts)]


def test_the_environment_is_inherited_or_not_and_never_the_edges_token(site):
    job_id, _ = site.submit("env", environment={"MINE": "x y"})
    output = site.wait(job_id)["stdout"]
    assert "MINE=x y\n" in output and "SLURM_JOB_ID=" in output and "RADICAL_" not in output
    assert site._token not in output
    job_id, _ = site.submit("env", inherit_environment=False)
    assert "PYTHONDONTWRITEBYTECODE" in output
    assert "PYTHONDONTWRITEBYTECODE" not in site.wait(job_id)["stdout"]


def test_output_goes_where_it_was_asked_to_also_both_into_one_file(site):
    out = site.home / "out"
    out.mkdir()
    os.chown(out, *pwd.getpwnam("alice")[2:4])
    job_id, _ = site.submit("echo one; echo two >&2; echo three", directory=str(out),
                            stdout_path="both.txt", stderr_path="both.txt")
    found = site.wait(job_id)
    assert found["state"] == "COMPLETED"
    assert (out / "both.txt").read_text() == "one\ntwo\nthree\n" == found["stdout"]


def test_scripts_before_and_after_are_run_and_a_failing_one_is_told(site):
    good, bad = site.home / "pre.sh", site.home / "bad.sh"
    good.write_text("export FROM_PRE=yes\n")
    bad.write_text("echo no module today\nnonsense-command\n")
    job_id, _ = site.submit("echo $FROM_PRE", pre_launch=str(good))
    assert site.wait(job_id)["stdout"] == "yes\n"
    job_id, _ = site.submit("echo never", pre_launch=str(bad))
    found = site.wait(job_id)
    assert found["state"] == "FAILED" and "nonsense-command" in found["message"]
    assert found["stdout"] == ""


def test_a_job_on_two_nodes_runs_a_process_on_each(site):
    job_id, native = site.submit("sort $PSIJ_NODEFILE; echo $SLURM_JOB_NUM_NODES",
                                 resources={"node_count": 2, "processes_per_node": 1},
                                 attributes={"duration": 120, "queue_name": "debug"})
    found = site.wait(job_id)
    assert found["stdout"] == "n1\nn2\n2\n"
    assert site.slurm.job(native)["NodeList"] == "n[1-2]"


def test_the_walltime_ends_a_job_and_is_named(site):
    job_id, native = site.submit("sleep 600")
    site.wait_state(job_id, "ACTIVE")
    # Slurm counts walltimes in minutes: this one is over at once
    site.slurm.run("scontrol", "update", f"jobid={native}", "timelimit=0-00:00:01", check=False)
    truth = site.slurm.wait_for_job(native, "TIMEOUT", timeout=150)
    found = site.wait(job_id)
    assert found["state"] == "FAILED" and "TIMEOUT" in found["message"]
    assert truth["JobState"] == "TIMEOUT"


def test_queued_and_running_jobs_are_cancelled_for_good(site):
    blocker, native = site.submit("sleep 600", resources={"node_count": 2,
                                                          "exclusive_node_use": True},
                                  attributes={"duration": 600, "queue_name": "debug"})
    site.wait_state(blocker, "ACTIVE")
    waiting, second = site.submit("echo never", resources={"node_count": 2},
                                  attributes={"duration": 600, "queue_name": "debug"})
    wait_until(lambda: site.status(waiting)["message"], WAIT_S, "the reason why it waits")
    assert site.status(waiting)["state"] == "QUEUED"
    assert site.status(waiting)["message"] == site.slurm.job(second)["Reason"]
    for job_id, number in ((waiting, second), (blocker, native)):
        assert site.psij.cancel_job(job_id) == {"job_id": job_id, "status": "canceled"}
        assert site.wait(job_id)["state"] == "CANCELED"
        assert site.status(job_id)["exit_code"] is None
        site.slurm.wait_for_job(number, "CANCELLED")
        with pytest.raises(radical_edge.Conflict):
            site.psij.cancel_job(job_id)


def test_what_root_cancels_is_canceled_too(site):
    job_id, native = site.submit("sleep 600")
    site.wait_state(job_id, "ACTIVE")
    site.slurm.run("scancel", native)
    assert site.wait(job_id)["state"] == "CANCELED"


def test_many_jobs_are_looked_after_by_one_squeue(site):
    ids = [site.submit(f"exit {number % 3}", attributes={"duration": 60})[0]
           for number in range(4)]
    for number, job_id in enumerate(ids):
        assert site.wait(job_id)["exit_code"] == number % 3
    folder = site.work
    assert folder.stat().st_mode & 0o777 == 0o700
    wait_until(lambda: not list(folder.iterdir()), WAIT_S, "the removal of the jobs' files")


# ---------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------

def test_what_sbatch_refuses_is_422_with_sbatchs_words(site):
    error = site.refuse(attributes={"queue_name": "nonsense"})
    assert error.status == 422 and "invalid partition specified: nonsense" in error.detail
    error = site.refuse(attributes={"account": "nobodys"})
    assert error.status == 422 and "Invalid account" in error.detail
    error = site.refuse(attributes={"custom_attributes": {"slurm.nonsense": "1"}})
    assert error.status == 422 and "nonsense" in error.detail
    assert site.psij.list_jobs()["jobs"] == []
    assert list(site.work.iterdir()) == []
    assert list((site.home / ".radical/edge/state/hpc/psij/jobs").iterdir()) == []


@pytest.mark.parametrize("spec, field", [
    ({"attributes": {"queue_name": "a\n#SBATCH --hold"}}, "attributes.queue_name"),
    ({"attributes": {"account": 'a" --hold'}}, "attributes.account"),
    ({"attributes": {"custom_attributes": {"qos": "x"}}}, "custom_attributes.qos"),
    ({"attributes": {"custom_attributes": {"slurm.a b": "x"}}}, "custom_attributes.slurm.a b"),
    ({"attributes": {"custom_attributes": {"slurm.qos": [1]}}}, "custom_attributes.slurm.qos"),
    ({"attributes": {"custom_attributes": {"slurm.qos": "$(id)"}}}, "custom_attributes.slurm.qos"),
    ({"environment": {"A B": "x"}}, "environment.A B"),
    ({"environment": {"A;id": "x"}}, "environment.A;id"),
    ({"stdout_path": "/tmp/a b"}, "stdout_path"),
    ({"stdout_path": "/nonsense/file"}, "stdout_path"),
    ({"stdin_path": "/nonsense"}, "stdin_path"),
    ({"directory": "/nonsense"}, "directory"),
    ({"pre_launch": "/nonsense"}, "pre_launch"),
    ({"launcher": "nonsense"}, "launcher"),
    ({"resources": {"node_count": 2, "process_count": 3}}, "job_spec")])
def test_what_would_not_reach_the_job_as_it_is_is_422_and_names_the_field(site, spec, field):
    error = site.refuse(**spec)
    assert error.status == 422 and error.detail.startswith(field), error.detail


def test_executors_that_are_not_here_say_what_is_missing(site):
    for name, program in (("pbs", "qsub"), ("lsf", "bsub"), ("cobalt", "qsub")):
        with pytest.raises(Unprocessable, match=program):
            site.psij.submit_job({"executable": "/bin/true"}, name)
    with pytest.raises(Unprocessable, match="there are: local, slurm"):
        site.psij.submit_job({"executable": "/bin/true"}, "flux")


# ---------------------------------------------------------------------------
# kill -9
# ---------------------------------------------------------------------------

def test_a_killed_edge_finds_one_queued_and_one_running_job_again(site):
    running, first = site.submit("echo begun; while [ ! -e ~/go ]; do sleep 0.1; done; exit 5",
                                 resources={"node_count": 2, "exclusive_node_use": True},
                                 attributes={"duration": 600, "queue_name": "debug"})
    site.wait_state(running, "ACTIVE")
    queued, second = site.submit("echo later; exit 6", resources={"node_count": 2},
                                 attributes={"duration": 600, "queue_name": "debug"})
    site.kill()
    site.start()                                  # before either has ended
    assert site.status(running)["state"] == "ACTIVE" and site.status(queued)["state"] == "QUEUED"
    assert site.status(running)["native_id"] == first
    site.kill()
    (site.home / "go").touch()
    for number, code in ((first, "5:0"), (second, "6:0")):
        assert site.slurm.wait_for_job(number, "FAILED", timeout=WAIT_S)["ExitCode"] == code
    site.start()                                  # after both have ended
    for job_id, code, output in ((running, 5, "begun\n"), (queued, 6, "later\n")):
        found = site.wait(job_id)
        assert (found["state"], found["exit_code"], found["stdout"]) == ("FAILED", code, output)
    told = {}
    with contextlib.suppress(queue.Empty):
        while len([state for state in told.values() if state == "FAILED"]) < 2:
            item = site.told.get(timeout=30)
            told[item["job_id"]] = item["state"]
    assert told == {running: "FAILED", queued: "FAILED"}


def test_the_exit_code_comes_from_accounting_when_its_file_is_lost(site):
    jobs = [site.submit(script)[:2] for script in ("exit 0", "exit 7")]
    site.kill()
    for _, native in jobs:
        site.slurm.wait_for_job(native, "COMPLETED", "FAILED")
    for path in site.work.glob("*.ec"):
        path.unlink()
    site.start()
    assert site.wait(jobs[1][0])["exit_code"] == 7
    assert [site.wait(job_id)["state"] for job_id, _ in jobs] == ["COMPLETED", "FAILED"]


@pytest.mark.parametrize("moment", ["before sbatch", "during sbatch", "after sbatch"])
def test_a_submission_that_the_edge_did_not_survive_is_not_made_twice(site, moment):
    """sbatch is Slurm's own, but tells the test when it is called, and waits."""
    folder = site.home / "bin"
    folder.mkdir()
    real = site.slurm.environment("alice")["PATH"].split(":")[0] + "/sbatch"
    order = {"before sbatch": 'touch "$HOME/called"; sleep 600; exit 1',
             "during sbatch": f'touch "$HOME/called"; sleep 3; exec {real} "$@"',
             "after sbatch": f'{real} "$@"; touch "$HOME/called"; sleep 600'}[moment]
    make_program(folder, "sbatch", f"#!/bin/sh\n{order}\n")
    os.chmod(folder, 0o755)
    site.kill()
    site.start(PATH=f"{folder}:{site.slurm.environment('alice')['PATH']}")
    sid, key = site.psij.sid, "11111111-2222-3333-4444-555555555555"
    body = {"job_spec": {"executable": "/bin/sh", "arguments": ["-c", "echo once >>~/runs"],
                         "name": f"once-{sid[-8:]}", "attributes": {"duration": 60}},
            "executor": "slurm"}
    thread = threading.Thread(target=lambda: submit_with_key(site, sid, body, key), daemon=True)
    thread.start()
    wait_until((site.home / "called").exists, 60, "the call of sbatch")
    site.kill()
    if moment != "during sbatch":
        kill_programs(folder / "sbatch")
    site.start()
    answer = wait_until(lambda: submit_with_key(site, sid, body, key), 60, "an answer")
    thread.join(60)
    found = site.wait(answer["job_id"])
    assert found["state"] == "COMPLETED"
    assert (site.home / "runs").read_text() == "once\n"
    listed = site.slurm.run("squeue", "-h", "-t", "all", "-n", f"once-{sid[-8:]}", "-o", "%A")
    assert listed.split() == [found["native_id"]]


def submit_with_key(site, sid, body, key):
    """Submit with an Idempotency-Key; return the answer, None for a 503."""
    token = radical_edge.default_token()
    request = urllib.request.Request(
        f"{site._bridge.url}/hpc/psij/submit/{sid}", json.dumps(body).encode(),
        {"Authorization": f"Bearer {token}", "Idempotency-Key": key,
         "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        assert error.code == 503, error.read()
    except OSError:
        pass
    return None


def kill_programs(script):
    """Kill the processes that run a script, and what they started."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if os.fsencode(str(script)) in path.read_bytes():
                os.killpg(os.getpgid(int(path.parent.name)), signal.SIGKILL)


# ---------------------------------------------------------------------------
# A scheduler in trouble
# ---------------------------------------------------------------------------

def test_jobs_outlive_a_controller_that_is_away(site):
    job_id, native = site.submit("while [ ! -e ~/go ]; do sleep 0.1; done; exit 4")
    site.wait_state(job_id, "ACTIVE")
    pid = int((Path(site.slurm.conf).parent.parent / "run/slurmctld.pid").read_text())
    os.kill(pid, signal.SIGSTOP)                  # squeue waits, and then fails
    try:
        site.kill()
        site.start()
        wait_until(lambda: "not up to date" in (site.status(job_id)["message"] or ""), 150,
                   "the trouble in the message")
        assert site.status(job_id)["state"] == "ACTIVE"
    finally:
        os.kill(pid, signal.SIGCONT)
    (site.home / "go").touch()
    assert site.wait(job_id)["exit_code"] == 4


STAND_INS = {"sbatch": "echo Submitted batch job 77", "scancel": "exit 0",
             "squeue": "echo '77|RUNNING|n1|None'", "sacct": "exit 1", "scontrol": "exit 1"}


@pytest.fixture
def programs(psij, tmp_path, monkeypatch):
    """Stand-ins for Slurm's programs: programs(squeue="...") changes what one does."""
    needs_module("psij")
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(plugins, "QUEUE_POLL_S", 0.2)
    monkeypatch.setattr(plugins, "SOON_S", 0.05)
    monkeypatch.setattr(plugins, "TROUBLE_S", 0.2)

    def change(**texts):
        for name, text in texts.items():
            make_program(folder, f".{name}.new", f"#!/bin/sh\n{text}\n")
            os.replace(folder / f".{name}.new", folder / name)

    change(**STAND_INS)
    yield change
    change(squeue="echo '77|CANCELLED|n1|None'")  # so that nothing is left to look after
    wait_until(lambda: all(job["state"] in plugins.ENDED_STATES for job in
                           psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]), 30)


def submit(psij):
    status, value = psij.try_submit("slurm", executable="/bin/true")
    assert status == 200, value
    return value["job_id"]


@pytest.mark.parametrize("trouble, words", [
    ("sleep 600", "takes more than 1 s"), ("echo garbage in here", "cannot be read"),
    ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
     "Unable to contact slurm controller"),
    ("head -c 200000000 /dev/zero", "printed more than 16 MiB"),
    ("while :; do echo '77|RUNNING|n1|None'; done", "printed more than 16 MiB"),
    ("exit 9", "exit status 9"), ("kill -9 $$", "exit status -9")])
def test_a_squeue_in_trouble_ends_no_job_and_says_what_it_is(psij, programs, monkeypatch, trouble,
                                                            words):
    monkeypatch.setattr(plugins, "SCHEDULER_S", 1.0 if "sleep" in trouble else 30.0)
    job_id = submit(psij)
    psij.wait(job_id, "ACTIVE")
    programs(squeue=trouble)
    wait_until(lambda: words in (psij.status(job_id)["message"] or ""), 60, words)
    looks = wait_until(lambda: psij.status(job_id)["state"] == "ACTIVE" and 1, 10)
    assert looks and psij.shell("true")           # and other jobs go on
    programs(squeue="echo '77|RUNNING|n1|None'")
    wait_until(lambda: psij.status(job_id)["message"] is None, 60, "the end of the trouble")
    assert psij.status(job_id)["state"] == "ACTIVE"
    ended = [item for item in psij.said if item.get("job_id") == job_id]
    assert [item["state"] for item in ended] == ["QUEUED", "ACTIVE"]


def test_a_squeue_that_prints_much_costs_little_memory(programs):
    programs(squeue="head -c 200000000 /dev/zero")
    tracemalloc.start()
    with pytest.raises(plugins.SchedulerTrouble):
        plugins.run_scheduler(["squeue"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2 ** 20


def test_a_program_that_is_absent_is_trouble_too(programs):
    with pytest.raises(plugins.SchedulerTrouble, match="nonsense cannot be run"):
        plugins.run_scheduler(["nonsense"])


def test_one_odd_row_of_squeue_freezes_no_other_job(psij, programs):
    job_id = submit(psij)
    psij.wait(job_id, "ACTIVE")
    programs(squeue="echo '5|OUT_OF_ORDER|n1|OutOfMemory'; echo '|||'; echo 'x'; "
                    "echo '6_[1-3]|PENDING||(Priority)'; echo '7|FAILED|n2|RaisedSignal:53(x|y)'; "
                    "echo '77|FAILED|n1|NonZeroExitCode'",
             sacct="echo '77|FAILED|3:0'")
    found = psij.wait(job_id)
    assert (found["state"], found["exit_code"]) == ("FAILED", 3)


def test_of_what_nobody_knows_the_state_is_unknown_and_never_completed(psij, programs, monkeypatch):
    monkeypatch.setattr(plugins, "GONE_S", 1.0)
    job_id = submit(psij)
    psij.wait(job_id, "ACTIVE")
    programs(squeue="exit 0")                     # it has left the queue, and there is no exit code
    found = psij.wait(job_id, "UNKNOWN")
    assert found["exit_code"] is None and "no exit code" in found["message"]
    psij.restart()
    assert psij.status(job_id)["state"] == "UNKNOWN"
    programs(sacct="echo '77|FAILED|6:0'")        # somebody remembers after all
    psij.restart()
    assert psij.wait(job_id, "FAILED")["exit_code"] == 6


def test_an_unknown_state_of_ones_own_job_is_told_and_changes_nothing(psij, programs):
    job_id = submit(psij)
    psij.wait(job_id, "ACTIVE")
    programs(squeue="echo '77|DANCING|n1|None'")
    wait_until(lambda: psij.status(job_id)["message"] == "Slurm says DANCING", 30)
    assert psij.status(job_id)["state"] == "ACTIVE"


def test_an_sbatch_that_hangs_is_503_and_the_job_is_found_if_it_turns_up(psij, programs,
                                                                         monkeypatch, tmp_path):
    monkeypatch.setattr(plugins, "SCHEDULER_S", 2.0)
    programs(sbatch=f'echo "$1" >{tmp_path}/script; sleep 600')
    status, value = psij.try_submit("slurm", executable="/bin/true")
    assert status == 503 and "takes more than" in value["detail"]
    (job,) = psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]
    assert job["state"] == "NEW" and job["native_id"] is None and "takes more" in job["message"]
    assert psij.cancel(job["job_id"])[0] == 409
    script = (tmp_path / "script").read_text().strip()
    programs(squeue=f"case \"$*\" in *%o*) echo '77|{script}';; "
                    "*) echo '77|RUNNING|n1|None';; esac")
    assert psij.wait(job["job_id"], "ACTIVE")["native_id"] == "77"


def test_many_submissions_and_cancels_that_hang_hold_up_no_other_job(psij, programs, tmp_path):
    """As many threads as asyncio has by itself waited for sbatch: local jobs had none."""
    job_id = submit(psij)
    psij.wait(job_id, "ACTIVE")
    programs(sbatch=f"touch {tmp_path}/hangs.$$; while ! [ -e {tmp_path}/go ]; do sleep 0.1; done; "
                    "echo Submitted batch job 77",
             scancel=f"while ! [ -e {tmp_path}/go ]; do sleep 0.1; done")
    threads = [threading.Thread(target=submit, args=(psij,)) for _ in range(40)]
    threads += [threading.Thread(target=psij.cancel, args=(job_id,)) for _ in range(40)]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(list(tmp_path.glob("hangs.*"))) == plugins.MAX_SUBMITTING, 30)
        assert psij.wait(psij.shell("echo local"))["stdout"] == "local\n"
        assert psij.status(job_id)["state"] == "ACTIVE"
        assert len(list(tmp_path.glob("hangs.*"))) == plugins.MAX_SUBMITTING
    finally:
        (tmp_path / "go").touch()
        for thread in threads:
            thread.join(60)


def test_what_became_of_a_submission_is_found_out_by_one_at_a_time(psij, programs, monkeypatch):
    """Two wrote down that it had failed, the later one over what a new submission had written."""
    both, failed, store = threading.Barrier(2), [], plugins.BatchExecutors._store

    def find(_driver, _job_id, _since):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1.0)

    async def count(self, job, verdict=None):
        failed.extend([job] if verdict and verdict.state == "FAILED" else [])
        await store(self, job, verdict)

    monkeypatch.setattr(plugins.SlurmDriver, "find", find)
    monkeypatch.setattr(plugins.BatchExecutors, "_store", count)
    monkeypatch.setattr(plugins, "UNSURE_S", 0.0)
    programs(sbatch="echo it is done!")           # whether it was taken, nobody knows
    body = {"job_spec": {"executable": "/bin/true"}, "executor": "slurm"}

    def send():
        return ask(psij.host, "POST", f"/psij/submit/{psij.sid}", body,
                   {"idempotency-key": "the-same-one"})

    assert send()[0] == 503
    programs(sbatch="echo Submitted batch job 77")
    status, answer = wait_until(lambda: next((got for got in [send()] if got[0] != 503), None), 30)
    assert (status, answer["native_id"]) == (200, "77") and len(failed) == 1
    psij.wait(answer["job_id"], "ACTIVE")


@pytest.mark.parametrize("words", ["", "it is done!"])
def test_an_sbatch_that_names_no_job_is_503_and_the_job_is_looked_for(psij, programs, monkeypatch,
                                                                     words):
    monkeypatch.setattr(plugins, "UNSURE_S", 0.5)
    programs(sbatch=f"echo '{words}'")
    status, value = psij.try_submit("slurm", executable="/bin/true")
    assert status == 503 and "names no job id" in value["detail"]
    (job,) = psij.get(f"list_jobs/{psij.sid}")[1]["jobs"]
    found = psij.wait(job["job_id"])
    assert found["state"] == "FAILED" and "was not submitted" in found["message"]


def test_a_scancel_that_fails_is_told_with_its_words_and_the_job_lives(psij, programs):
    job_id = submit(psij)
    psij.wait(job_id, "ACTIVE")
    programs(scancel="echo 'scancel: error: Kill job error: Access denied' >&2; exit 1")
    status, value = psij.cancel(job_id)
    assert status == 503 and "Access denied" in value["detail"]
    assert psij.status(job_id)["state"] == "ACTIVE"


# ---------------------------------------------------------------------------
# Parsers and rules, without programs
# ---------------------------------------------------------------------------

def test_the_nodes_of_pbs_jobs_are_those_that_qstat_named_last(programs, home):
    def tell(job_id, **values):
        jobs = {"Jobs": {job_id: {"job_state": "R", **values}}}
        programs(qsub="exit 0", qdel="exit 0", qstat=f"echo '{json.dumps(jobs)}'")
        return driver.ask([job_id])[job_id].state

    programs(qsub="exit 0", qdel="exit 0", qstat="exit 0")
    driver = plugins.PBSDriver("pbs")
    assert tell("1.server", exec_host="n1/0*2+n2/0") == "ACTIVE"
    assert driver.find_node("1.server") == "n1"
    tell("2.server")
    assert driver.find_node("1.server") is driver.find_node("2.server") is None


def test_slurms_words_are_read():
    rows = plugins.parse_squeue_states("12|PENDING||Resources\n13|RUNNING|n1|None\n"
                                "14|TIMEOUT|n1|TimeLimit\n15|CANCELLED|n1|None\n")
    assert rows["12"] == Verdict("QUEUED", "Resources")
    assert rows["13"] == Verdict("ACTIVE", None, None, "n1")
    assert rows["14"].state == "FAILED" and "walltime" in rows["14"].message
    assert rows["15"].state == "CANCELED"
    past = plugins.parse_sacct("12|COMPLETED|0:0\n13|FAILED|3:0\n14|FAILED|0:9\n"
                               "15|CANCELLED by 1000|0:15\n16|TIMEOUT|0:0\n17|FAILED\n")
    assert [(past[key].state, past[key].exit_code) for key in sorted(past)] == [
        ("COMPLETED", 0), ("FAILED", 3), ("FAILED", 137), ("CANCELED", None), ("FAILED", None)]
    shown = plugins.parse_scontrol_job(
        "JobId=7 JobName=a=b JobState=FAILED Reason=NonZeroExitCode ExitCode=4:0 BatchHost=n2\n")
    assert shown == {"7": Verdict("FAILED", None, 4, "n2")}


def test_pbs_and_lsf_are_read_and_one_odd_job_spoils_no_other():
    jobs = {"1.srv": {"job_state": "R", "exec_host": "cn7/0*8+cn8/0*8", "comment": "runs"},
            "2.srv": {"job_state": "F", "Exit_status": 3}, "3.srv": {"job_state": "F",
                                                                     "Exit_status": 271},
            "4.srv": {"job_state": "F", "Exit_status": 0}, "5.srv": {"job_state": 7}, "6.srv": [],
            "7.srv": {"job_state": "?"}}
    found = plugins.parse_qstat(json.dumps({"Jobs": jobs}))
    assert found["1.srv"] == Verdict("ACTIVE", "runs", None, "cn7")
    assert found["2.srv"] == Verdict("FAILED", None, 3)
    assert found["3.srv"].state == "CANCELED" and found["4.srv"].exit_code == 0
    assert found["7.srv"].state == "UNKNOWN" and not {"5.srv", "6.srv"} & set(found)
    records = [{"JOBID": "1", "STAT": "RUN"}, {"JOBID": "2", "STAT": "EXIT",
               "EXIT_REASON": "TERM_OWNER: job killed by owner"}, {"ERROR": "no"},
               {"JOBID": "3", "STAT": "EXIT", "EXIT_REASON": ""}, {"JOBID": "4", "STAT": "DONE"}]
    found = plugins.parse_bjobs(json.dumps({"RECORDS": records}))
    assert [found[key].state for key in "1234"] == ["ACTIVE", "CANCELED", "FAILED", "COMPLETED"]
    for text in ("", "garbage", "[]", '{"Jobs": 3}', '{"RECORDS": {}}'):
        assert plugins.parse_qstat(text) == plugins.parse_bjobs(text) == {}


@pytest.mark.parametrize("said, code, waited, expected", [
    (None, 0, 0, ("COMPLETED", 0)), (None, 3, 0, ("FAILED", 3)), (None, None, 0, None),
    (None, None, 1e4, ("UNKNOWN", None)),
    (Verdict("CANCELED"), 0, 0, ("CANCELED", None)), (Verdict("CANCELED"), None, 0,
                                                     ("CANCELED", None)),
    (Verdict("COMPLETED"), None, 1e4, ("UNKNOWN", None)),
    (Verdict("COMPLETED", None, 0), None, 0, None),
    (Verdict("COMPLETED", None, 0), None, 1e4, ("COMPLETED", 0)),
    (Verdict("FAILED", "a node failed (NODE_FAIL)"), None, 0, ("FAILED", None)),
    (Verdict("FAILED"), None, 0, None), (Verdict("FAILED"), None, 1e4, ("FAILED", None)),
    (Verdict("FAILED", None, 9), None, 0, ("FAILED", 9)),
    (Verdict("FAILED", "the walltime was over (TIMEOUT)"), 143, 0, ("FAILED", 143))])
def test_how_a_job_ended_follows_from_all_that_is_known(said, code, waited, expected):
    found = conclude(said, code, waited)
    assert found and (found.state, found.exit_code) == expected or found is expected is None


def test_a_script_that_is_not_psij_pythons_is_left_alone():
    text = "#!/bin/sh\n#SBATCH --hold\necho x\n"
    assert plugins.repair_script(text, "id") == text
