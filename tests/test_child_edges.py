"""Tests of edges that an edge starts, through a real Slurm, on a node with a network of its own.

The node is a network namespace with its own slurmd and sshd; of the world it reaches the login
node's end of one cable, and so neither the bridge nor anything else.
"""
from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import plugins                                                            # noqa: E402
import radical_edge                                                       # noqa: E402
from radical_edge import EdgeError, TokenStore                            # noqa: E402
from sshd import Sshd, find_sshd, free_port, make_ssh                     # noqa: E402
from test_edge import (ROOT, certificate, needs, needs_module, start,     # noqa: E402, F401
                       wait_until)

WAIT_S = 90
NODE = "c1"
IP = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def can_have_namespaces():
    """Whether a network namespace can be made here."""
    if not IP or os.geteuid() != 0:
        return False
    name = f"re-try-{os.getpid()}"
    made = subprocess.run([IP, "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run([IP, "netns", "del", name], capture_output=True)
    return made


class Network:
    """A namespace for the compute node, and a cable from it to the login node, which is the host."""

    def __init__(self):
        self.name = f"re{os.getpid()}"
        net = f"10.213.{random.randrange(250)}"
        self.login, self.compute = f"{net}.1", f"{net}.2"
        self.prefix = [IP, "netns", "exec", self.name]
        self._ip("netns", "add", self.name)
        self._ip("link", "add", f"{self.name}a", "type", "veth", "peer", "name", f"{self.name}b",
                 "netns", self.name)
        self._ip("addr", "add", f"{self.login}/30", "dev", f"{self.name}a")
        self._ip("link", "set", f"{self.name}a", "up")
        for words in (("addr", "add", f"{self.compute}/30", "dev", f"{self.name}b"),
                      ("link", "set", f"{self.name}b", "up"), ("link", "set", "lo", "up")):
            self._ip("-n", self.name, *words)

    def can_reach(self, host, port):
        """Whether a program on the compute node can connect."""
        script = f"import socket; socket.create_connection(({host!r}, {port}), 3)"
        return subprocess.run([*self.prefix, sys.executable, "-c", script], capture_output=True,
                              timeout=60).returncode == 0

    def remove(self):
        pids = subprocess.run([IP, "netns", "pids", self.name], capture_output=True, text=True)
        for pid in pids.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._ip("netns", "del", self.name)       # takes the cable along
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "del", f"{self.name}a")

    @staticmethod
    def _ip(*words):
        subprocess.run([IP, *words], check=True, capture_output=True, timeout=60)


class Cluster:
    """A Slurm of one node, which is in the namespace; munge is that of the fixture `slurm`."""

    def __init__(self, slurm, network):
        self.folder = Path(tempfile.mkdtemp(prefix="re-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        base = Path(slurm.conf).read_text().splitlines()
        kept = [line for line in base if line.startswith((
            "AuthInfo=", "AuthType=", "CredType=", "PluginDir=", "SlurmUser=", "SlurmdUser=",
            "ProctrackType=", "TaskPlugin=", "SwitchType=", "MpiDefault=", "KillWait=",
            "SlurmdParameters=", "SchedulerParameters=", "ReturnToService="))]
        self.conf = self.folder / "slurm.conf"
        controller, node = free_port(network.login), free_port()
        self.conf.write_text("\n".join([
            "ClusterName=tiny", f"SlurmctldHost={socket.gethostname().split('.')[0]}"
            f"({network.login})", f"SlurmctldPort={controller}", f"SlurmdPort={node}",
            f"StateSaveLocation={self.folder}/state", f"SlurmdSpoolDir={self.folder}/spool",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd.pid",
            f"NodeName={NODE} NodeHostname={socket.gethostname().split('.')[0]} "
            f"NodeAddr={network.compute} CPUs=4 RealMemory=2000",
            f"PartitionName=all Nodes={NODE} Default=YES MaxTime=60 State=UP", *kept]) + "\n")
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        if slurm.version.startswith("24"):
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self._log = open(self.folder / "log", "ab")
        self._environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        wrapper = Path(shutil.which("sinfo", path=slurm.environment("alice")["PATH"])).read_text()
        programs = Path(wrapper.split("exec ")[1].split()[0]).parent.parent / "sbin"
        self._processes = [
            self._start(str(programs / "slurmctld"), "-D"),
            self._start(*network.prefix, str(programs / "slurmd"), "-D", "-N", NODE, "-d",
                        str(programs / "slurmstepd"))]
        self._slurm = slurm

    def wait_idle(self):
        """Wait until the node has come up."""
        wait_until(lambda: "idle" in self._slurm.run("sinfo", "-h", "-o", "%T", check=False,
                                                     SLURM_CONF=str(self.conf)), WAIT_S,
                   "the idle node")

    def _start(self, *command):
        return subprocess.Popen(command, env=self._environment, cwd="/", stdout=self._log,
                                stdin=subprocess.DEVNULL, stderr=self._log,
                                start_new_session=True)

    def stop(self):
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def node(slurm):
    """(network, cluster) of a compute node that reaches the login node alone."""
    needs("netns", can_have_namespaces(), "root and network namespaces (ip netns)")
    needs("netns", find_sshd() and shutil.which("ssh"), "openssh-server (tests/setup-tunnels.sh)")
    with contextlib.ExitStack() as stack:
        network = Network()
        stack.callback(network.remove)
        cluster = Cluster(slurm, network)
        stack.callback(cluster.stop)
        cluster.wait_idle()
        yield network, cluster


def copy_packages(folder, *names):
    """Copy installed packages, which alice may not be able to read, with all that they need."""
    done, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package = importlib.metadata.distribution(name)
            for file in package.files or ():
                if ".." not in str(file) and "__pycache__" not in str(file):
                    target = folder / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(package.locate_file(file), target)
            todo += [need.split(";")[0].split("[")[0].strip(" ()<>=!~0123456789.,")
                     for need in package.requires or () if "extra ==" not in need]


def find_python():
    """Return a Python that every user can run."""
    for path in ("/usr/local/bin", "/usr/bin"):
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            python = shutil.which(name, path=path)
            if python and subprocess.run([python, "-c", "import sys, ssl; "
                                          "sys.exit(sys.version_info < (3, 9))"]).returncode == 0:
                return python
    return None


class Site:
    """A bridge that only the login node reaches, and alice's edge there."""

    def __init__(self, start, certificate, slurm, node, home, alice_home):
        self._start_process, self.slurm = start, slurm
        self.network, self._cluster = node
        self.home = alice_home
        cert, key, self.pin = certificate
        self.bridge = start("--bridge", "--port", "0", "--cert", cert, "--key", key,
                            expect="bridge: cert")
        self.url = next(line for line in self.bridge.lines
                        if line.startswith("bridge: https")).split()[1]
        self._token = TokenStore(home / ".radical/edge/tokens.json").add("site", "edge")
        self._install()
        self._make_ssh()
        self._log = open(self.home / "edge.log", "ab")
        self.start_parent()
        self.client = radical_edge.BridgeClient(self.url, cert=self.pin)
        self.psij = self.client.get_edge_client("parent").get_plugin("psij")

    def _install(self):
        """Copy the two files, and psij-python, to where alice can read them."""
        self._python = find_python()
        needs("netns", self._python, "a Python 3.9 or later that every user can run")
        self._app = self.home / "app"
        self._app.mkdir()
        for name in ("radical_edge.py", "plugins.py"):
            shutil.copy(ROOT / name, self._app)
        copy_packages(self._app, "psij-python")

    def _make_ssh(self):
        """Make an sshd on each of the two machines, and an ssh of alice's that knows them."""
        folder = self.home / "keys"
        self.login_sshd = Sshd(folder, self.network.login, name="login")
        self.node_sshd = Sshd(folder, self.network.compute, free_port(), self.network.prefix,
                              name="node")
        hosts = {NODE: self.node_sshd, socket.gethostname(): self.login_sshd}
        self._bin = make_ssh(folder, hosts, user="alice")
        entry = pwd.getpwnam("alice")
        for path in (folder / "user_key", folder / "known_hosts"):
            os.chown(path, entry.pw_uid, entry.pw_gid)
        for path in (folder, self._app, self.home):
            path.chmod(0o755)

    def start_parent(self):
        environment = self.slurm.environment("alice", HOME=str(self.home),
                                             RADICAL_BRIDGE_TOKEN=self._token,
                                             PYTHONPATH=str(self._app),
                                             SLURM_CONF=str(self._cluster.conf))
        environment["PATH"] = f"{self._bin}:{environment['PATH']}"
        self.parent = subprocess.Popen(
            self.slurm.command("alice", self._python, str(self._app / "radical_edge.py"), "--edge",
                               "-n", "parent", "-p", "psij", "--url", self.url, "--cert", self.pin,
                               "--heartbeat", "2"),
            env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        wait_until(lambda: self.is_online("parent") or self.parent.poll() is not None, 60,
                   "the parent")
        assert self.parent.poll() is None, self.read_log()

    def read_log(self):
        return (self.home / "edge.log").read_text()[-4000:]

    def kill_parent(self):
        self.parent.kill()
        self.parent.wait()
        wait_until(lambda: not self.is_online("parent"), 60, "the loss of the parent")

    def start_child(self, mode):
        answer = self.psij.submit_tunneled(
            {"arguments": ["-n", "child", "-p", "sysinfo", "--heartbeat", "2"],
             "attributes": {"duration": 1800}}, "slurm", mode)
        assert answer["edge_name"] == "child"
        return answer["job_id"]

    def status(self):
        return self.psij.tunnel_status("child")

    def explain(self, job_id):
        return (self.status(), self.psij.get_job_status(job_id), self.read_log())

    def wait_status(self, status):
        last = {}

        def is_there():
            last.update(self.status())
            return last["status"] == status and dict(last)

        return wait_until(is_there, WAIT_S, f"{status}; it is {last}")

    def is_online(self, name="child"):
        return name in radical_edge.list_edges(url=self.url, cert=self.pin)

    def wait_online(self, job_id):
        deadline = time.monotonic() + WAIT_S
        while not self.is_online():
            assert time.monotonic() < deadline, self.explain(job_id)
            time.sleep(0.1)

    def ask(self):
        """Return what the child says of where it is; None when it does not answer."""
        try:
            return radical_edge.call("child", "sysinfo", "host_role", url=self.url, cert=self.pin)
        except EdgeError:
            return None

    def wait_answer(self):
        return wait_until(self.ask, WAIT_S, "an answer of the child")

    def processes(self, *words):
        """Return the pids of alice's processes with all these words in their command line."""
        uid, found = pwd.getpwnam("alice").pw_uid, []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().decode(errors="replace").split("\0")
                if path.stat().st_uid == uid and all(word in line for word in words):
                    found.append(int(path.parent.name))
        return found

    def cancel(self, job_id):
        """Cancel the child's job, and see to it that nothing of it is left."""
        self.psij.cancel_job(job_id)
        assert self.psij.wait_job(job_id, WAIT_S)["state"] == "CANCELED"
        wait_until(lambda: not self.is_online(), WAIT_S, "the child's end at the bridge")
        self.wait_status("done")
        for words in (("-n", "child"), ("ssh", "-N")):
            wait_until(lambda: not self.processes(*words), WAIT_S, f"the end of {words}")
        assert list((self.home / ".radical/edge/tunnels").iterdir()) == []

    def end(self):
        with contextlib.suppress(EdgeError):
            for job in self.psij.list_jobs()["jobs"]:
                if job["state"] not in plugins.ENDED_STATES:
                    self.psij.cancel_job(job["job_id"])
                    self.psij.wait_job(job["job_id"], WAIT_S)
        self.client.close()
        self.parent.terminate()
        self.parent.wait(30)
        self._log.close()
        self.login_sshd.stop()
        self.node_sshd.stop()


@pytest.fixture
def site(start, certificate, slurm, slurm_home, node, home):
    needs_module("psij")
    made = Site(start, certificate, slurm, node, home, slurm_home("alice"))
    yield made
    made.end()
    assert "Traceback" not in made.read_log(), made.read_log()


def check_that_only_the_login_node_is_reached(site):
    port = int(site.url.rsplit(":", 1)[1])
    assert not site.network.can_reach("127.0.0.1", port)         # its own loopback
    assert not site.network.can_reach(site.network.login, port)  # the bridge is on the host's
    assert not site.network.can_reach("192.0.2.1", 80)
    assert site.network.can_reach(site.network.login, site.login_sshd.port)


def check_that_it_runs_on_the_node(site, job_id):
    answer = site.wait_answer()
    assert answer["role"] == "compute" and answer["scheduler"] == "slurm"
    assert answer["job_id"] == site.psij.get_job_status(job_id)["native_id"]
    (child, *_) = site.processes("-n", "child")
    inside = os.stat(f"/proc/{child}/ns/net").st_ino
    assert inside != os.stat("/proc/self/ns/net").st_ino


def test_through_a_reverse_tunnel_and_again_after_ssh_was_killed(site):
    check_that_only_the_login_node_is_reached(site)
    job_id = site.start_child("reverse")
    site.wait_online(job_id)
    check_that_it_runs_on_the_node(site, job_id)
    before = site.wait_status("active")
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: site.status()["pid"] not in (None, before["pid"]), WAIT_S, "another ssh")
    site.wait_status("active")
    site.wait_answer()
    site.kill_parent()
    assert site.ask()                             # ssh and the child go on without it
    pids = site.processes("ssh", "-R") or site.processes("-R")
    site.start_parent()
    assert site.wait_status("active")["pid"] in pids
    site.wait_answer()
    site.cancel(job_id)


def test_through_a_forward_tunnel_and_again_after_ssh_was_killed(site):
    job_id = site.start_child("forward")          # to SLURM_SUBMIT_HOST
    site.wait_online(job_id)
    check_that_it_runs_on_the_node(site, job_id)
    site.wait_status("active")
    before = site.processes("-N", "-L")
    os.kill(before[-1], signal.SIGKILL)
    wait_until(lambda: set(site.processes("-N", "-L")) - set(before), WAIT_S, "another ssh")
    site.wait_answer()
    site.cancel(job_id)


def test_through_a_relay_and_again_after_the_parent_was_killed(site):
    job_id = site.start_child("relay")
    site.wait_online(job_id)
    check_that_it_runs_on_the_node(site, job_id)
    assert site.wait_status("active")["port"]
    site.kill_parent()
    wait_until(lambda: not site.is_online(), WAIT_S, "the loss of the link")
    site.start_parent()
    site.wait_online(job_id)
    site.wait_answer()
    site.wait_status("active")
    site.cancel(job_id)


def test_without_a_tunnel_the_bridge_is_not_reached(site):
    job_id = site.start_child("none")
    wait_until(lambda: "cannot connect" in site.psij.get_job_status(job_id)["stderr"], WAIT_S)
    assert not site.is_online() and site.status()["status"] == "no_tunnel"
    site.psij.cancel_job(job_id)


def test_a_tunnel_waits_for_as_long_as_the_queue_takes(site):
    held = site.psij.submit_tunneled(
        {"arguments": ["-n", "child", "-p", "sysinfo", "--heartbeat", "2"], "attributes": {
            "duration": 600, "custom_attributes": {"slurm.hold": True}}}, "slurm", True)
    native = held["native_id"]
    assert site.status()["status"] == "pending"
    site.kill_parent()
    site.start_parent()
    assert site.status()["status"] == "pending"   # and is watched again
    site.slurm.run("scontrol", "release", native, SLURM_CONF=str(site._cluster.conf))
    site.wait_online(held["job_id"])
    site.wait_status("active")
    site.cancel(held["job_id"])
