"""A real Slurm for tests: the fixture `slurm`, and what it gives. See tests/slurm/README.md.

    (conftest.py imports them: slurm, slurm_home)
    def test_something(slurm): job = slurm.sbatch("alice", "-p", "debug")

SLURM_TEST_VERSION: 24.11 (the default) or 22.05. SLURM_TEST_BASE and SLURM_TEST_PORT_OFFSET: an
instance of one's own. An instance that was up stays up; one that the tests brought up goes down.
"""
from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import plugins
from test_edge import REQUIRED, needs

SCRIPTS = Path(__file__).resolve().parent / "slurm"
VERSION = os.environ.get("SLURM_TEST_VERSION", "24.11")
BASE = Path(os.environ.get("SLURM_TEST_BASE", "/opt/slurm-test"))
PROGRAMS = Path(os.environ.get("SLURM_TEST_DIST", "/opt/slurm-test-dist"))
START_S = 600                  # installing it all may take minutes on a slow machine
LOCK_S = 1800                  # another test run has the instance for so long at the most


class SlurmCluster:
    """A cluster that is up, and what tests do with it. env: PATH, SLURM_CONF and the rest."""

    version = VERSION

    def __init__(self, env):
        self.env = env

    @property
    def conf(self):
        """The path of slurm.conf."""
        return self.env["SLURM_CONF"]

    def environment(self, user, **more):
        """Return the whole environment of a process of that user's, nothing of ours in it."""
        entry = pwd.getpwnam(user)
        path = self.env["PATH"].split(":", 1)[0] + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return {"SLURM_CONF": self.conf, "PATH": path, "USER": user, "LOGNAME": user,
                "HOME": entry.pw_dir, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **more}

    def command(self, user, *argv):
        """Return argv, to be run by root, of a program that runs as that user with its groups.

        It may pass through directories that are closed to it, so that it can use the Python of the
        tests, which may lie in root's home; nothing else is left of root's rights.
        """
        keep = "+dac_read_search" if not _may_use_python(user) else "-all"
        return ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups",
                "--bounding-set=-all,+dac_read_search", f"--inh-caps=-all,{keep}",
                f"--ambient-caps=-all,{keep}", *argv]

    def run(self, *argv, user="root", check=True, timeout=60, **env):
        """Return what a program prints, run as that user; its output and errors when it fails."""
        command = argv if user == "root" else self.command(user, *argv)
        done = subprocess.run(command, env=self.environment(user, **env), cwd="/", text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=timeout)
        if check and done.returncode != 0:
            pytest.fail(f"{' '.join(argv)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def sbatch(self, user, *options, script="sleep 600"):
        """Submit a job that runs `script` in sh; return its id."""
        text = self.run("sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", script,
                        user=user)
        return text.strip().partition(";")[0]

    def job(self, job_id):
        """Return {name: value} of `scontrol -o show job`: the truth about a job; {} when gone."""
        text = self.run("scontrol", "-o", "show", "job", job_id, check=False,
                        SLURM_TIME_FORMAT="%s")
        return dict(re.findall(r"(\S+?)=(\S*)", text)) if "JobId=" in text else {}

    def wait_for_job(self, job_id, *states, timeout=60):
        """Wait until the job is in one of the states; return job()."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            if job.get("JobState") in states:
                return job
            if time.monotonic() > deadline:
                pytest.fail(f"job {job_id} is {job.get('JobState')}, not one of {states}")
            time.sleep(0.1)

    @contextlib.contextmanager
    def frozen_controller(self):
        """Let the controller take connections and answer nothing."""
        pid = int((BASE / VERSION / "run/slurmctld.pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def reset(self):
        """Cancel all jobs, put nodes and partitions up."""
        _up("--reset")


@functools.lru_cache(maxsize=None)
def _may_use_python(user):
    code = f"open({plugins.__file__!r})"
    done = subprocess.run(["runuser", "-u", user, "--", sys.executable, "-c", code], cwd="/",
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
    return done.returncode == 0


def _up(*options):
    done = subprocess.run([str(SCRIPTS / "up"), VERSION, *options], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=START_S)
    if done.returncode != 0:
        pytest.fail(f"tests/slurm/up {VERSION}: {done.stderr[-2000:]}")
    env = dict(os.environ)
    for name, value in re.findall(r"^export (\w+)=(.*)$", done.stdout, re.MULTILINE):
        env[name] = value.replace("$PATH", env["PATH"])
    return env


def why_absent():
    """Return what a Slurm lacks here; None when there can be one."""
    if os.geteuid() != 0:
        return "root: the daemons run jobs as several users"
    is_here = (PROGRAMS / VERSION / ".version").exists() and shutil.which("munged")
    if is_here or "slurm" in REQUIRED:            # then `up` installs it
        return None
    return f"sh tests/setup-slurm.sh {VERSION}, as root"


def check_job(job, truth):
    """Compare a record of queue_info with what SlurmCluster.job() says of that job."""
    def date(text):
        return int(text) if text.isdigit() else None

    assert job["state"] == truth["JobState"]
    assert job["user"] == truth["UserId"].split("(")[0]
    assert job["partition"] == truth["Partition"] and job["account"] == truth["Account"]
    assert job["qos"] == truth["QOS"]
    assert abs(job["priority"] - int(truth["Priority"])) < 50     # it changes all the time
    limit = truth["TimeLimit"]
    assert job["time_limit"] == (limit if limit == "UNLIMITED" else
                                 plugins.parse_slurm_duration(limit))
    assert job["submit_time"] == date(truth["SubmitTime"])
    start = job["estimated_start"] if job["state"] == "PENDING" else job["start_time"]
    assert abs((start or 0) - (date(truth["StartTime"]) or 0)) < 60
    assert job["node_list"] == truth["NodeList"].replace("(null)", "")
    assert job["nodes"] == int(truth["NumNodes"].split("-")[0])
    assert (job["reason"] or "None").replace(" ", "_") == truth["Reason"] or \
        job["reason"].startswith(truth["Reason"])
    assert (job["dependency"] or "(null)") == truth["Dependency"]
    if job["state"] in plugins.FINISHED_STATES:
        code, killed = truth["ExitCode"].split(":")
        assert (job["exit_code"] or 0, job["signal"] or 0) == (int(code), int(killed))
        assert job["end_time"] == date(truth["EndTime"])
        assert job["time_used"] == plugins.parse_slurm_duration(truth["RunTime"])


@contextlib.contextmanager
def _alone():
    """Keep other test runs off the instance: each cancels all jobs when it begins."""
    BASE.mkdir(parents=True, exist_ok=True)
    with open(BASE / ".tests.lock", "w") as file:
        deadline = time.monotonic() + LOCK_S
        while not _has_locked(file):
            if time.monotonic() > deadline:
                pytest.fail(f"another test run holds {BASE}/.tests.lock")
            time.sleep(0.5)
        yield


def _has_locked(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is_up():
    try:
        pid = (BASE / VERSION / "run/slurmctld.pid").read_text().strip()
        return "slurmctld" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.fixture(scope="session")
def slurm():
    """A real Slurm with an empty queue; skips, or fails if RADICAL_EDGE_REQUIRE names slurm."""
    absent = why_absent()
    needs("slurm", not absent, absent)
    with _alone():
        was_up = _is_up()
        yield SlurmCluster(_up("--reset"))
        if was_up:
            _up("--reset")
        else:
            subprocess.run([str(SCRIPTS / "down"), VERSION], check=True, timeout=120,
                           stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def slurm_home(slurm):
    """Returns a function: user to a new, empty home directory of that user's, removed later."""
    made = []

    def make(user):
        path = Path(tempfile.mkdtemp(prefix=f"home-{user}-", dir="/tmp"))
        made.append(path)
        entry = pwd.getpwnam(user)
        os.chown(path, entry.pw_uid, entry.pw_gid)
        return path

    yield make
    for path in made:
        shutil.rmtree(path, ignore_errors=True)
