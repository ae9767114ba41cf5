"""What operators do with it: --detach, SIGHUP, new tokens and certificates, the examples, the doctor.

    $ python -m pytest tests/test_operations.py
"""
from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

import radical_edge
from test_edge import (ROOT, SCRIPT, bridge_url, certificate, children_of, run, start,  # noqa: F401
                       wait_until)

EXAMPLES = ROOT / "examples"


def make_certificate(folder):
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key) + ".new",
                    "-out", str(cert) + ".new"], check=True, capture_output=True)
    os.replace(f"{key}.new", key)
    os.replace(f"{cert}.new", cert)
    return str(cert), str(key)


def shown_certificate(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        with context.wrap_socket(sock) as secure:
            return hashlib.sha256(secure.getpeercert(binary_form=True)).hexdigest()


def test_a_signal_at_any_moment_ends_an_edge_that_is_dialling_with_status_0(tmp_path, start):
    cert = Path(make_certificate(tmp_path)[0])
    many = tmp_path / "many.pem"                  # takes most of a second to read, at each dialling
    many.write_text(cert.read_text() * 1500)
    urls = ",".join(f"https://127.0.0.{number}:9" for number in range(1, 9))
    for moment in (0, 0.02, 0.05, 0.1, 0.2, 0.4):
        edge = start("--edge", "--name", "laptop", "--url", urls, "-p", "sysinfo", expect="edge: laptop",
                     env={"SSL_CERT_FILE": str(many)})
        time.sleep(moment)                        # nothing to wait for: any moment must do
        assert edge.end()[0] == 0


def test_a_new_certificate_is_used_without_a_restart_and_a_wrong_one_is_not(tmp_path, start, home):
    cert, key = make_certificate(tmp_path)
    bridge = start("--bridge", "--port", "0", "--cert", cert, "--key", key, expect="bridge: certificate")
    url = bridge_url(bridge)
    port = int(url.rpartition(":")[2])
    first = shown_certificate(port)
    held = http.client.HTTPSConnection("127.0.0.1", port, context=ssl._create_unverified_context())
    held.request("GET", "/health")
    assert held.getresponse().read()
    make_certificate(tmp_path)
    second = wait_until(lambda: [found for found in [shown_certificate(port)] if found != first])[0]
    wait_until(lambda: second in (home / ".radical/edge/url").read_text())     # clients of this host
    assert run("--list").startswith("no edge")
    held.request("GET", "/health")                # who was connected still is
    assert held.getresponse().read()
    held.close()
    Path(cert).write_text("nonsense")
    wait_until(lambda: any("not reloaded" in line for line in bridge.errors))
    assert shown_certificate(port) == second
    assert bridge.process.poll() is None


def test_sighup_reads_files_again_at_once(tmp_path, start, home):
    cert, key = make_certificate(tmp_path)
    bridge = start("--bridge", "--port", "0", "--cert", cert, "--key", key, expect="bridge: certificate")
    for number in range(1, 4):
        bridge.process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum("read again" in line for line in bridge.errors) >= number)
    assert bridge.process.poll() is None
    assert bridge.end()[0] == 0


def test_a_detached_bridge_has_its_files_and_ends_cleanly(home, tmp_path):
    began = time.monotonic()
    text = run("--bridge", "--edge", "--name", "e1", "--port", "0", "--detach")
    folder = home / ".radical/edge/state/bridge"
    pid = int((folder / "pid").read_text())
    try:
        assert f"detached: process {pid}" in text and "bridge: http" in text
        assert time.monotonic() - began < 60
        assert (folder / "pid").stat().st_mode & 0o777 == (folder / "log").stat().st_mode & 0o777 == 0o600
        assert os.getsid(pid) != os.getsid(0) and os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        wait_until(lambda: run("--list").startswith("e1:"))
        wait_until(lambda: "POST /edge/list" in (folder / "log").read_text())
        os.replace(folder / "log", folder / "log.1")             # as logrotate does
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: (folder / "log").exists())
        run("--list")
        wait_until(lambda: "POST /edge/list" in (folder / "log").read_text())
        for process in (pid, *children_of(pid)):                 # the bridge, and its edge
            wait_until(lambda: {os.readlink(f"/proc/{process}/fd/{number}") for number in (1, 2)} ==
                       {str(folder / "log")})
        os.replace(folder / "log", folder / "log.2")
        (folder / "log").mkdir()                  # cannot be opened for writing, by anybody
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: "the old file is written on" in (folder / "log.2").read_text())
        assert "belongs to process" in run("--bridge", "--port", "0", "--detach", status=1)
        assert (folder / "pid").read_text().strip() == str(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}") or
               " Z " in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:4])
    assert not (folder / "pid").exists()


def test_a_detached_process_that_cannot_start_says_why_and_fails(home):
    text = run("--bridge", "--host", "0.0.0.0", "--detach", status=1)
    assert "is public" in text
    assert not (home / ".radical/edge/state/bridge/pid").exists()


def test_the_terminal_that_is_closed_ends_a_process_in_the_foreground(home):
    pid, terminal = os.forkpty()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)             # nohup would have it ignored
        os.execv(sys.executable, [sys.executable, SCRIPT, "--bridge", "--port", "0"])
    text = b""
    while b"bridge: http" not in text:
        text += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -signal.SIGHUP)


def test_the_doctor_looks_at_files_and_clock(start, home, tmp_path):
    start("--bridge", "--port", "0", expect="bridge: http")
    text = run("--check", "--name", "e9")
    assert "files    ok" in text and "clock    ok" in text and "token, tokens.json" in text
    (home / ".radical/edge/token").chmod(0o644)
    assert "files    FAILED" in run("--check", status=1)


def test_the_unit_for_systemd_is_well_formed():
    text = (EXAMPLES / "radical-edge-bridge.service").read_text()
    sections = [line for line in text.splitlines() if line.startswith("[")]
    assert sections == ["[Unit]", "[Service]", "[Install]"]
    flags = {word for word in text.replace("\\\n", " ").split() if word.startswith("--")}
    known = {option for action in radical_edge.make_parser()._actions
             for option in action.option_strings}
    assert {flag for flag in flags if not flag.startswith(("--system", "--home", "--shell", "--now"))} \
        <= known
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", "--man=no",
                               str(EXAMPLES / "radical-edge-bridge.service")], capture_output=True, text=True)
        assert "Unknown" not in done.stderr and "bad" not in done.stderr.lower()


def test_the_batch_script_starts_an_edge_and_ends_it_on_sigterm(start, home, tmp_path):
    bridge = start("--bridge", "--port", "0", expect="bridge: http")
    script = EXAMPLES / "edge.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], check=True)
    assert all(line.startswith("#SBATCH --") for line in script.read_text().splitlines()
               if line.startswith("#SBATCH"))
    (tmp_path / "bin").mkdir()
    os.symlink(sys.executable, tmp_path / "bin/python3")
    job = subprocess.Popen(["bash", str(script)], env={
        **os.environ, "RADICAL_BRIDGE_URL": bridge_url(bridge), "SLURM_CLUSTER_NAME": "c",
        "SLURM_JOB_ID": "7", "RADICAL_EDGE_DIR": str(ROOT),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    wait_until(lambda: "c-7:" in run("--list"), 30)
    job.send_signal(signal.SIGTERM)
    job.wait(20)
    wait_until(lambda: "c-7:" not in run("--list"), 30)


def test_the_readiness_of_a_bridge_that_ends_is_said(bridge, raw):
    client = raw()
    assert json.loads(client.request("GET", "/health/ready")[2]) == {"ready": True}
    bridge.stopping = True
    assert client.request("GET", "/health/ready")[0] == 503
    bridge.stopping = False
