"""An sshd of a test's own, and an `ssh` on PATH that trusts it. Used by the suites of tunnels."""
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def find_sshd():
    """Return the path of the sshd program, or None."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def free_port(host="127.0.0.1"):
    """Return a port that is free now."""
    with socket.create_server((host, 0)) as sock:
        return sock.getsockname()[1]


def make_key(path):
    """Make a key without a passphrase; return its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True,
                   stdin=subprocess.DEVNULL)
    return Path(f"{path}.pub").read_text()


class Sshd:
    """A real sshd in the foreground, as an ordinary process; key login only, known host key.

    folder: for keys and configuration. prefix: a command to run it under, such as a namespace's.
    """

    def __init__(self, folder, address="127.0.0.1", port=None, prefix=(), name="sshd"):
        self.folder, self.address, self.name = Path(folder), address, name
        self.port = port or free_port(address)
        self._prefix = list(prefix)
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)              # sshd insists
        for key in (f"{name}_host", "user_key"):
            if not (self.folder / key).exists():
                make_key(self.folder / key)
        self.host_key = (self.folder / f"{name}_host.pub").read_text()
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        self._config = self.folder / f"{name}_config"
        self._config.write_text(
            f"Port {self.port}\nListenAddress {address}\nHostKey {self.folder}/{name}_host\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "AllowTcpForwarding yes\nPermitRootLogin prohibit-password\n")
        self.process = None
        self.start()

    def start(self):
        """Start sshd; return when it listens."""
        self._log = open(self.folder / f"{self.name}.log", "ab")
        self.process = subprocess.Popen(
            [*self._prefix, find_sshd(), "-D", "-e", "-f", str(self._config)],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True)
        for _ in range(200):
            try:
                subprocess.run([*self._prefix, "bash", "-c",
                                f"exec 3<>/dev/tcp/{self.address}/{self.port}"],
                               check=True, capture_output=True, timeout=10)
                return
            except subprocess.CalledProcessError:
                assert self.process.poll() is None, self.read_log()
                try:
                    self.process.wait(0.05)
                except subprocess.TimeoutExpired:
                    pass
        pytest.fail(f"sshd does not listen: {self.read_log()}")

    def read_log(self):
        return (self.folder / f"{self.name}.log").read_text(errors="replace")[-2000:]

    def stop(self):
        """End sshd and the connections that it serves."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
            self.process.wait(20)
            self.process = None
            self._log.close()


def make_ssh(folder, hosts, user=None):
    """Put an `ssh` that reads our configuration into folder/bin; return that directory.

    hosts: {alias: Sshd}. The configuration checks host keys, against those of `hosts` alone.
    """
    folder = Path(folder)
    known, config = [], ["StrictHostKeyChecking yes", f"UserKnownHostsFile {folder}/known_hosts",
                         "GlobalKnownHostsFile /dev/null"]
    for alias, sshd in hosts.items():
        known.append(f"[{sshd.address}]:{sshd.port} {' '.join(sshd.host_key.split()[:2])}\n")
        config += [f"Host {alias}", f"  HostName {sshd.address}", f"  Port {sshd.port}",
                   f"  IdentityFile {sshd.folder}/user_key", "  IdentitiesOnly yes"]
        config += [f"  User {user}"] if user else []
    (folder / "known_hosts").write_text("".join(known))
    (folder / "ssh_config").write_text("\n".join(config) + "\n")
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    real = shutil.which("ssh", path="/usr/local/bin:/usr/bin:/bin")
    (bin_dir / "ssh").write_text(f'#!/bin/sh\nexec {real} -F {folder}/ssh_config "$@"\n')
    (bin_dir / "ssh").chmod(0o755)
    return bin_dir
