"""The plugins that come with Radical Edge; radical_edge.py loads this file from beside it.

    1. sysinfo     the machine: CPU, memory, disks, network, GPUs
    2. queue_info  the batch system: queues, jobs, allocations, of Slurm or PBS
    3. tunnels     edges that an edge starts, where only it can reach the bridge
    4. psij        jobs: a local executor of our own, and the batch systems through psij-python
    5. staging     files: there and back, over every break, and never out of the allowed roots
    6. rhapsody    tasks: a local backend of our own, and the backends of rhapsody-py
    7. lucid       pilots and tasks through RADICAL-Pilot, which runs in a child process
    8. xgfabric    a workflow over several edges

Optional packages are imported where they are needed, and a plugin that lacks one says so.
"""
from __future__ import annotations

import abc
import asyncio
import base64
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import grp
import hashlib
import hmac
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import mmap
import os
import pwd
import queue
import random
import re
import secrets
import selectors
import shlex
import signal
import socket
import stat
import string
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from pathlib import Path
from typing import (Any, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List, NamedTuple,
                    Optional, Set, Tuple, Type, Union)

import radical_edge
from radical_edge import (RELAY_NONCE, RESERVED_NAMES, SSH_OPTIONS, TUNNEL_MODES, BadGateway,
                          BadRequest, BridgeClient, BridgeURL, Conflict, ContentTooLarge,
                          DeadlineExceeded, EdgeError, FileResponse, Forbidden, Gone, HttpResponse,
                          InsufficientStorage, LoopThread, NotFound, NotInstalled, Plugin,
                          PluginClient, PluginSession, Policy, PortFile, PreconditionFailed,
                          ProtocolError, Request, Response, StreamingResponse, Target,
                          TooManyRequests, Unauthorized, Unavailable, Unprocessable, Uplink,
                          Workers, answer_relay, default_token, delete, encode_digest, encode_json,
                          encode_port_file, forward_option, get, home_dir, http_troubles,
                          is_ssh_host, is_valid_name, make_child_token, make_etag, note_for_audit,
                          parse_bridge_url, parse_msgpack, post, put, read_private, refuse_constant,
                          repeatable, tunnels_dir, write_private)

__all__ = ["ClusterStatus", "FileExists", "FileMissing", "LocalExecutor", "LucidClient",
           "LucidSession", "OldEdge", "PSIJClient", "PSIJSession", "PilotChild", "PluginLucid",
           "PluginPSIJ", "PluginQueueInfo", "PluginRhapsody", "PluginStaging", "PluginSysInfo",
           "PluginXGFabric", "QueueInfo", "QueueInfoClient", "QueueInfoPBS", "QueueInfoSession",
           "QueueInfoSlurm", "Relay", "ResourceConfig", "ReverseSSH", "RhapsodyClient",
           "RhapsodySession", "StagingClient", "StagingSession", "SysInfoClient", "SysInfoProvider",
           "SysInfoSession", "Tunnels", "WorkflowConfig", "WorkflowState", "XGFabricClient",
           "XGFabricSession", "config_to_dict", "decode_return", "dict_to_config",
           "dict_to_resource_config"]

# ---------------------------------------------------------------------------
# 1. sysinfo: what the machine is and how busy it is. Parsers turn text into values; the provider
#    reads files and runs programs, never on a loop and never without a time limit.
# ---------------------------------------------------------------------------

log_sysinfo = logging.getLogger("radical_edge.sysinfo")

COMMAND_S = 3.0                # a GPU tool may take so long
DISKS_S = 1.0                  # all mounts together; one that hangs is reported without figures
FRESH_S = 0.2                  # callers within so long share one answer
CPU_WINDOW_S = 0.1             # the shortest time over which CPU use is measured
MAX_COMMAND_OUTPUT = 1024 * 1024     # bytes
MAX_ERROR_OUTPUT = 64 * 1024   # bytes of what a program prints as errors; the rest is not kept
READ_PIECE = 64 * 1024         # bytes; what a pipe holds
RETRY_S = 10.0                 # what could not be found out once is tried again so much later
STOP_CHECK_S = 0.5             # a program that runs on is ended so soon after it should be
KILLED_S = 2.0                 # a program that is killed and does not end is left behind then
# the edge's, not the job's
_SECRET_VARIABLES = ("RADICAL_BRIDGE_TOKEN", "RADICAL_BRIDGE_TOKEN_FILE", "RADICAL_BRIDGE_KEY")

SHARED_FILESYSTEMS = frozenset((
    "nfs", "nfs4", "cifs", "smb", "smbfs", "lustre", "gpfs", "beegfs", "pvfs2", "orangefs",
    "glusterfs", "cephfs", "ceph", "afs", "dvs", "fuse.sshfs"))
_DISK_FILESYSTEMS = frozenset(("overlay", "zfs", "btrfs"))    # "nodev", and yet people's disks
_ALLOCATION_VARIABLES = (("SLURM_JOB_ID", "slurm"), ("PBS_JOBID", "pbs"), ("LSB_JOBID", "lsf"),
                         ("COBALT_JOBID", "cobalt"), ("FLUX_JOB_ID", "flux"))


class Mount(NamedTuple):
    """A line of /proc/mounts."""
    device: str
    mount: str
    fstype: str
    options: str


def parse_mounts(text: str, nodev: Iterable[str] = ()) -> List[Mount]:
    """Return the mounts of /proc/mounts that hold people's data, one for each device.

    nodev: file systems without a device, of which only shared ones and the like are kept.
    Octal escapes are decoded (fstab(5)); loop devices, squashfs and snaps are left out.
    """
    hidden, found = set(nodev) - SHARED_FILESYSTEMS - _DISK_FILESYSTEMS, {}
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        mount = Mount(*(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
                        for field in fields[:4]))
        skipped = mount.fstype in hidden or mount.fstype == "squashfs" or \
            mount.device.startswith("/dev/loop") or "/snap/" in mount.mount + "/"
        if not skipped:
            key = mount.device if mount.device.startswith("/") or ":" in mount.device \
                else mount.mount
            found.setdefault(key, mount)          # bind mounts come later
    return list(found.values())


def parse_nodev(text: str) -> List[str]:
    """Return the file systems that /proc/filesystems lists as having no device."""
    return [line.split("\t", 1)[1].strip() for line in text.splitlines()
            if line.startswith("nodev\t")]


def parse_meminfo(text: str) -> Dict[str, Any]:
    """Return {"total", "available", "percent", "used"} of /proc/meminfo, in bytes."""
    values = {match[1]: int(match[2]) * 1024
              for match in re.finditer(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total = values.get("MemTotal", 0)
    free = values.get("MemFree", 0)
    cached = values.get("Buffers", 0) + values.get("Cached", 0) + values.get("SReclaimable", 0)
    available = min(values.get("MemAvailable", free + cached), total)     # older kernels lack it
    used = total - available
    percent = round(100 * used / total, 1) if total else 0.0
    return {"total": total, "available": available, "percent": percent, "used": used}


def parse_cpu_times(text: str) -> Tuple[int, int]:
    """Return (busy, total) in clock ticks, from the first line of /proc/stat.

    guest times are left out: user and nice contain them already (proc(5)).
    """
    numbers = [int(number) for number in text.split("\n", 1)[0].split()[1:9]]
    idle = sum(numbers[3:5])                      # idle and iowait
    return sum(numbers) - idle, sum(numbers)


def parse_cpuinfo(text: str) -> Dict[str, Any]:
    """Return {"model", "vendor", "cores_physical" or None} of /proc/cpuinfo."""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    vendor = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(.+)$", text, re.MULTILINE)
    cores = set()
    for block in text.split("\n\n"):
        ids = dict(re.findall(r"^(physical id|core id)\s*:\s*(\d+)$", block, re.MULTILINE))
        if "core id" in ids:
            cores.add((ids.get("physical id", "0"), ids["core id"]))
    return {"model": model[1].strip() if model else "", "vendor": vendor[1].strip() if vendor else
            "", "cores_physical": len(cores) or None}


def parse_net_dev(text: str) -> Dict[str, Tuple[int, int]]:
    """Return {interface: (bytes received, bytes sent)} of /proc/net/dev."""
    found = {}
    for line in text.splitlines()[2:]:
        name, _, numbers = line.partition(":")
        values = numbers.split()
        if len(values) >= 9:
            found[name.strip()] = (int(values[0]), int(values[8]))
    return found


def _number(text: str) -> Optional[float]:
    """Return a figure of nvidia-smi, None for "[N/A]", "[Not Supported]" and the like."""
    try:
        value = float(text.strip().split()[0])
    except (ValueError, IndexError):
        return None
    return value if value == value and abs(value) != float("inf") else None


def _rows(text: str, columns: int) -> List[List[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == columns and row[0].isdigit()]


def parse_nvidia_static(text: str) -> List[Dict[str, Any]]:
    """Return the GPUs of `nvidia-smi --query-gpu=index,name,driver_version,uuid` (CSV)."""
    return [{"id": f"nvidia-{index}", "index": int(index), "name": name, "driver_version": driver,
             "uuid": gpu, "vendor": "NVIDIA"} for index, name, driver, gpu in _rows(text, 4)]


def parse_nvidia_use(text: str) -> Dict[int, Dict[str, Any]]:
    """Return {index: use} of `nvidia-smi --query-gpu=index,utilization.gpu,utilization.memory,
    memory.total,memory.used,memory.free` (CSV): util_* in percent, mem_* in MiB, or None."""
    names = ("util_gpu", "util_mem", "mem_total", "mem_used", "mem_free")
    return {int(row[0]): dict(zip(names, map(_number, row[1:]))) for row in _rows(text, 6)}


def parse_rocm_static(text: str) -> List[Dict[str, Any]]:
    """Return the GPUs of `rocm-smi --showproductname --showdriverversion --showuniqueid --json`."""
    cards = _json_object(text)
    driver = cards.get("system", {}).get("Driver version", "")
    gpus = []
    for name, card in sorted(cards.items()):
        if re.fullmatch(r"card\d+", name) and isinstance(card, dict):
            index = int(name[4:])
            product = next((card[key] for key in ("Card series", "Card Series", "Card model",
                                                  "Card Model") if key in card), "AMD GPU")
            gpus.append({"id": f"amd-{index}", "index": index, "name": product,
                         "driver_version": card.get("Driver version", driver),
                         "uuid": card.get("Unique ID", ""), "vendor": "AMD"})
    return gpus


def parse_rocm_use(text: str) -> Dict[int, Dict[str, Any]]:
    """Return {index: use} of `rocm-smi --showuse --showmeminfo vram --json`; as for NVIDIA."""
    found = {}
    for name, card in _json_object(text).items():
        if re.fullmatch(r"card\d+", name) and isinstance(card, dict):
            total, used = (_mebibytes(card.get(key)) for key in
                           ("VRAM Total Memory (B)", "VRAM Total Used Memory (B)"))
            free = None if total is None or used is None else total - used
            found[int(name[4:])] = {"util_gpu": _number(str(card.get("GPU use (%)", ""))),
                                    "util_mem": 0.0, "mem_total": total, "mem_used": used,
                                    "mem_free": free}
    return found


def _json_object(text: str) -> Dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _mebibytes(value: Any) -> Optional[float]:
    number = _number(str(value))
    return None if number is None else number / 1048576


def _read(path: str, limit: int = MAX_COMMAND_OUTPUT) -> str:
    """Return a file's text, "" when it cannot be read: containers hide much of /proc and /sys."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(limit)
    except OSError:
        return ""


def _clean_environment() -> Dict[str, str]:
    """Return the edge's environment without its own secrets."""
    return {name: value for name, value in os.environ.items() if name not in _SECRET_VARIABLES}


def find_program(name: str, path: Optional[str] = None) -> Optional[str]:
    """Return the path of a program, searched for in `path` or PATH as a shell does, or None.

    Not shutil.which(): of all that shutil loads, an edge at rest needs nothing else.
    """
    searched = os.environ.get("PATH", os.defpath) if path is None else path
    folders = searched.split(os.pathsep) if searched else []
    for found in [name] if "/" in name else [os.path.join(folder, name) for folder in folders]:
        if os.path.isfile(found) and os.access(found, os.X_OK):
            return found
    return None


def remove_folder(path: Any) -> None:
    """Remove a directory and all that is in it, as far as that is possible."""
    import shutil                                 # see find_program()
    shutil.rmtree(path, True)


class Ran(NamedTuple):
    """How a program ended, and what it printed."""
    code: int                                     # negative: the signal that ended it
    output: str
    error: str                                    # the first MAX_ERROR_OUTPUT bytes


class TooMuchOutput(BadGateway):
    """A program printed more than it may."""


def run_program(command: List[str], timeout: float, limit: int,
                env: Optional[Dict[str, str]] = None,
                stopped: Optional[threading.Event] = None) -> Ran:
    """Run a program without a shell and without input. Blocks for `timeout` seconds at the most.

    It and what it started in its process group are killed when the time is over, when it has
    printed more than `limit` bytes, and when `stopped` is set. Raises NotInstalled,
    DeadlineExceeded, TooMuchOutput, Unavailable.
    """
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=env, start_new_session=True)
    except OSError as error:
        raise NotInstalled(f"{command[0]} cannot be run: {error.strerror or error}") from None
    deadline = time.monotonic() + timeout
    try:
        output, errors = _read_both(process, deadline, limit, stopped)
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{command[0]} takes more than {timeout:g} s") from None
    finally:
        _end_program(process)
    return Ran(code, output.decode(errors="replace"), errors.decode(errors="replace"))


def _read_both(process: "subprocess.Popen[bytes]", deadline: float, limit: int,
               stopped: Optional[threading.Event]) -> Tuple[bytes, bytes]:
    """Return what a program prints until it closes both its outputs."""
    output, errors = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, errors)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(process.args, left)
            if stopped is not None and stopped.is_set():
                raise Unavailable("the plugin is being stopped")
            _read_pieces(selector, min(left, STOP_CHECK_S))
            del errors[MAX_ERROR_OUTPUT:]
            if len(output) > limit:
                raise TooMuchOutput(f"{process.args[0]} printed more than {limit >> 20} MiB")
    return bytes(output), bytes(errors)


def _read_pieces(selector: selectors.BaseSelector, timeout: float) -> None:
    for key, _ in selector.select(timeout):
        data = os.read(key.fd, READ_PIECE)
        key.data.extend(data)
        if not data:
            selector.unregister(key.fileobj)


def _end_program(process: "subprocess.Popen[bytes]") -> None:
    process.stdout.close()
    process.stderr.close()
    if process.returncode is None:
        _kill_group(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):     # one that even SIGKILL cannot end
            process.wait(KILLED_S)


def run_command(command: List[str], timeout: float = COMMAND_S) -> Optional[str]:
    """Return what a program prints; None when it is not there, fails or takes too long. Blocks."""
    try:
        ran = run_program(command, timeout, MAX_COMMAND_OUTPUT)
    except EdgeError:
        return None
    return ran.output if ran.code == 0 else None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _send_signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):        # it has ended meanwhile
            os.kill(pid, number)


def _start_thread(name: str, function: Callable[..., None], *args: Any) -> threading.Thread:
    """Return a daemon thread that runs `function(*args)`. Raises Unavailable when there is none."""
    thread = threading.Thread(target=function, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise Unavailable("the system gives this process no more threads: try again later"
                          ) from None
    return thread


class _Shared:
    """Runs a slow function once for all who ask meanwhile, and keeps the answer for `fresh` s.

    Who waits longer than `patience` seconds gets the last answer, or `default` before there is one.
    """

    def __init__(self, function: Callable[[], Any], fresh: float, patience: float,
                 default: Any) -> None:
        self._function, self._fresh, self._patience = function, fresh, patience
        self._lock = threading.Lock()
        self._value = default                     # guarded by _lock
        self._until = 0.0                         # monotonic; guarded by _lock
        self._running: Optional[threading.Event] = None          # guarded by _lock

    def get(self) -> Any:
        """Return the answer, at most `patience` seconds from now. Blocks."""
        with self._lock:
            if time.monotonic() < self._until:
                return self._value
            done = self._running
            if done is None:
                done = threading.Event()
                _start_thread("sysinfo-collect", self._run, done)
                self._running = done
        done.wait(self._patience)
        with self._lock:
            return self._value

    def _run(self, done: threading.Event) -> None:
        fresh = min(self._fresh, RETRY_S)
        try:
            value = self._function()
            with self._lock:
                self._value = value
            fresh = self._fresh
        except Exception:                         # the last answer stays; the next call tries again
            log_sysinfo.exception("metrics could not be collected")
        finally:
            with self._lock:
                self._until = time.monotonic() + fresh
                self._running = None
            done.set()


class _Disks:
    """Sizes of mounts. A mount that hangs is not asked again before its last call returned."""

    def __init__(self, statvfs: Callable[[str], Any] = os.statvfs) -> None:
        self._statvfs = statvfs
        self._lock = threading.Lock()
        self._asking: Dict[str, threading.Thread] = {}           # guarded by _lock
        self._sizes: Dict[str, Tuple[int, int, float]] = {}      # guarded by _lock

    def measure(self, mounts: List[Mount]) -> List[Dict[str, Any]]:
        """Return {"mount", "device", "fstype", "type", "total", "used", "percent"} of each.

        The sizes are None for a mount that did not answer within DISKS_S.
        """
        deadline = time.monotonic() + DISKS_S
        threads = [self._ask(mount.mount) for mount in mounts]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            sizes = {mount.mount: self._sizes.get(mount.mount) for mount in mounts
                     if mount.mount not in self._asking}
        return [self._describe(mount, sizes.get(mount.mount)) for mount in mounts]

    def _ask(self, path: str) -> threading.Thread:
        with self._lock:
            thread = self._asking.get(path)
            if thread is None:
                thread = self._asking[path] = _start_thread("sysinfo-statvfs", self._run, path)
            return thread

    def _run(self, path: str) -> None:
        sizes = None
        with contextlib.suppress(OSError):
            status = self._statvfs(path)
            total = status.f_blocks * status.f_frsize
            used = total - status.f_bfree * status.f_frsize
            usable = used + status.f_bavail * status.f_frsize    # root's reserve is nobody's
            sizes = (total, used, round(100 * used / usable, 1) if usable else 0.0)
        with self._lock:
            if sizes is not None:
                self._sizes[path] = sizes
            del self._asking[path]

    @staticmethod
    def _describe(mount: Mount, sizes: Optional[Tuple[int, int, float]]) -> Dict[str, Any]:
        total, used, percent = sizes or (None, None, None)
        return {"mount": mount.mount, "device": mount.device, "fstype": mount.fstype,
                "type": classify_disk(mount.device, mount.fstype), "total": total, "used": used,
                "percent": percent}


def classify_disk(device: str, fstype: str) -> str:
    """Return "shared", "local ssd", "local hdd", "local unknown" or "unknown"."""
    if fstype in SHARED_FILESYSTEMS:
        return "shared"
    if not device.startswith("/dev/"):
        return "unknown"
    name = os.path.basename(os.path.realpath(device))
    if re.match(r"x?vd[a-z]", name):              # virtual: it says that it turns, whatever it is
        return "local unknown"
    queue = "queue/rotational"                    # of the whole disk; a partition's is one above
    for path in (f"/sys/class/block/{name}/{queue}", f"/sys/class/block/{name}/../{queue}"):
        rotational = _read(path).strip()
        if rotational:
            return "local hdd" if rotational == "1" else "local ssd"
    return "local unknown"


def _ipv4_address(interface: str) -> Optional[str]:
    """Return an interface's IPv4 address, None without one (netdevice(7), SIOCGIFADDR)."""
    try:
        import fcntl                              # not on every platform
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(sock.fileno(), 0x8915, request)[20:24])
    except (ImportError, OSError):
        return None


def _psutil() -> Any:
    """Return psutil, None where it is not installed."""
    try:
        import psutil
        return psutil
    except ImportError:
        return None


class SysInfoProvider:
    """Collects what get_metrics() returns, from /proc and /sys, and from psutil where it is."""

    def __init__(self, *, use_psutil: bool = True) -> None:
        self._psutil = _psutil() if use_psutil else None
        self._disks = _Disks()
        self._cpu_lock = threading.Lock()
        self._cpu_times = (0, 0)                  # busy, total at the last sample; _cpu_lock
        self._cpu_sampled = 0.0                   # monotonic; guarded by _cpu_lock
        self._cpu_percent = 0.0                   # guarded by _cpu_lock
        self._static = _Shared(self._detect, float("inf"), 2 * COMMAND_S, {"cpu": {}, "gpus": []})
        self._gpu_use = _Shared(self._collect_gpu_use, 1.0, COMMAND_S, {})
        self._metrics = _Shared(self._collect, FRESH_S, 4 * COMMAND_S, None)

    def start_prefetch(self) -> None:
        """Detect the hardware in the background, so that the first answer is fast."""
        threading.Thread(target=self._static.get, name="sysinfo-prefetch", daemon=True).start()
        self._sample_cpu()

    def get_metrics(self) -> Dict[str, Any]:
        """Return {"system", "cpu", "memory", "disks", "network", "gpus"}. Blocks, within bounds.

        bytes for memory, disks and network; MiB for GPU memory; seconds for uptime; percent from 0
        to 100; MHz for freq_mhz; None for what is not known. Raises Unavailable when the machine
        does not answer.
        """
        metrics = self._metrics.get()
        if metrics is None:
            raise Unavailable("the machine's figures are not there yet: try again")
        return metrics

    def _collect(self) -> Dict[str, Any]:
        static = self._static.get()
        return {"system": self._collect_system(), "cpu": {**static["cpu"], **self._collect_cpu()},
                "memory": self._collect_memory(), "disks": self._disks.measure(self._list_mounts()),
                "network": self._collect_network(), "gpus": self._collect_gpus(static["gpus"])}

    # -- once

    def _detect(self) -> Dict[str, Any]:
        cpu = parse_cpuinfo(_read("/proc/cpuinfo"))
        machine = os.uname().machine
        logical = os.cpu_count() or 1
        physical = cpu["cores_physical"]
        if self._psutil is not None:
            physical = self._psutil.cpu_count(logical=False) or physical
        return {"cpu": {"model": cpu["model"] or machine, "vendor": cpu["vendor"],
                        "cores_physical": physical or logical, "cores_logical": logical},
                "gpus": self._detect_gpus()}

    def _detect_gpus(self) -> List[Dict[str, Any]]:
        nvidia = self._nvidia("index,name,driver_version,uuid")
        rocm = self._rocm("--showproductname", "--showdriverversion", "--showuniqueid")
        return [*parse_nvidia_static(nvidia or ""), *parse_rocm_static(rocm or ""),
                *self._detect_intel()]

    @staticmethod
    def _detect_intel() -> List[Dict[str, Any]]:
        found = []
        for path in sorted(Path("/sys/class/drm").glob("card[0-9]")):
            if _read(f"{path}/device/vendor").strip() == "0x8086":
                index = int(path.name[4:])
                found.append({"id": f"intel-{index}", "index": index, "name": "Intel GPU",
                              "driver_version": "", "uuid": "", "vendor": "Intel"})
        return found

    # -- each time

    @staticmethod
    def _collect_system() -> Dict[str, Any]:
        name = os.uname()
        uptime = _read("/proc/uptime").split()
        seconds = float(uptime[0]) if uptime else time.clock_gettime(time.CLOCK_MONOTONIC)
        return {"hostname": socket.gethostname(), "uptime": seconds,
                "kernel": f"{name.sysname} {name.release}", "arch": name.machine}

    def _collect_cpu(self) -> Dict[str, Any]:
        try:
            load = list(os.getloadavg())
        except OSError:
            load = [0.0, 0.0, 0.0]
        return {"percent": self._sample_cpu(), "load_avg": load, "freq_mhz": self._frequency()}

    def _sample_cpu(self) -> float:
        """Return the CPU use in percent since the last sample; callers close together share it."""
        with self._cpu_lock:
            now = time.monotonic()
            if now - self._cpu_sampled < CPU_WINDOW_S:
                return self._cpu_percent
            text = _read("/proc/stat")
            if text.startswith("cpu "):
                busy, total = parse_cpu_times(text)
                elapsed = total - self._cpu_times[1]
                if elapsed > 0:                   # the first time: since the machine was started
                    use = 100 * (busy - self._cpu_times[0]) / elapsed
                    self._cpu_percent = round(min(100.0, max(0.0, use)), 1)
                self._cpu_times = busy, total
            self._cpu_sampled = now
            return self._cpu_percent

    def _frequency(self) -> Optional[float]:
        if self._psutil is not None and hasattr(self._psutil, "cpu_freq"):
            with contextlib.suppress(Exception):  # psutil fails in some containers
                return float(self._psutil.cpu_freq().current)
        found = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$",
                                                      _read("/proc/cpuinfo"), re.MULTILINE)]
        return sum(found) / len(found) if found else None

    def _collect_memory(self) -> Dict[str, Any]:
        if self._psutil is None:
            return parse_meminfo(_read("/proc/meminfo"))
        memory = self._psutil.virtual_memory()
        used = memory.total - memory.available    # psutil's own differs from version to version
        percent = round(100 * used / memory.total, 1) if memory.total else 0.0
        return {"total": memory.total, "available": memory.available, "percent": percent,
                "used": used}

    def _list_mounts(self) -> List[Mount]:
        text = _read("/proc/self/mounts")
        if text or self._psutil is None:
            return parse_mounts(text, parse_nodev(_read("/proc/filesystems")))
        return [Mount(part.device, part.mountpoint, part.fstype, part.opts)
                for part in self._psutil.disk_partitions(all=False)]

    def _collect_network(self) -> List[Dict[str, Any]]:
        found = []
        for name, (received, sent) in self._count_traffic().items():
            ip = _ipv4_address(name)
            if name == "lo" or ip is None or _read(f"/sys/class/net/{name}/operstate") == "down\n":
                continue
            speed = _read(f"/sys/class/net/{name}/speed").strip()
            found.append({"interface": name, "ip": ip,
                          "mac": _read(f"/sys/class/net/{name}/address").strip(),
                          "rx_bytes": received, "tx_bytes": sent,
                          "speed_mbps": int(speed) if speed.isdigit() else None})
        return found

    def _count_traffic(self) -> Dict[str, Tuple[int, int]]:
        if self._psutil is None:
            return parse_net_dev(_read("/proc/net/dev"))
        return {name: (count.bytes_recv, count.bytes_sent)
                for name, count in self._psutil.net_io_counters(pernic=True).items()}

    def _collect_gpus(self, static: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        nothing = dict.fromkeys(("util_gpu", "util_mem", "mem_total", "mem_used", "mem_free"))
        if not any(gpu["vendor"] in ("NVIDIA", "AMD") for gpu in static):
            return [{**gpu, **nothing} for gpu in static]
        use = self._gpu_use.get()
        return [{**gpu, **nothing, **use.get((gpu["vendor"], gpu["index"]), {})} for gpu in static]

    def _collect_gpu_use(self) -> Dict[Tuple[str, int], Dict[str, Any]]:
        found = {}
        vendors = {gpu["vendor"] for gpu in self._static.get()["gpus"]}
        if "NVIDIA" in vendors:
            text = self._nvidia("index,utilization.gpu,utilization.memory,memory.total,memory.used,"
                                "memory.free")
            found.update({("NVIDIA", index): use
                          for index, use in parse_nvidia_use(text or "").items()})
        if "AMD" in vendors:
            text = self._rocm("--showuse", "--showmeminfo", "vram")
            found.update({("AMD", index): use for index, use in parse_rocm_use(text or "").items()})
        return found

    @staticmethod
    def _nvidia(query: str) -> Optional[str]:
        program = os.environ.get("NVIDIA_SMI_PATH") or find_program("nvidia-smi")
        if not program:
            return None
        return run_command([program, f"--query-gpu={query}", "--format=csv,noheader,nounits"])

    @staticmethod
    def _rocm(*options: str) -> Optional[str]:
        program = find_program("rocm-smi")
        return run_command([program, *options, "--json"]) if program else None


class SysInfoSession(PluginSession):
    """A session that asks the provider, which all sessions of an edge share."""

    def __init__(self, sid: str, provider: SysInfoProvider) -> None:
        super().__init__(sid)
        self._provider = provider

    async def get_metrics(self) -> Dict[str, Any]:
        """Return what SysInfoProvider.get_metrics() does."""
        self._check_active()
        return await asyncio.to_thread(self._provider.get_metrics)


class SysInfoClient(PluginClient):
    """A program's access to an edge's figures."""

    def homedir(self) -> str:
        """Return the home directory of the user as whom the edge runs. Needs no session."""
        return self._get("homedir")["homedir"]

    def host_role(self) -> Dict[str, Any]:
        """Return {"role": "bridge" | "login" | "compute", "scheduler", "job_id"}."""
        return self._get("host_role")

    def get_metrics(self) -> Dict[str, Any]:
        """Return what SysInfoProvider.get_metrics() does, on the edge."""
        return self._get(f"metrics/{self._require_session()}")


class PluginSysInfo(Plugin):
    """Tells what machine the edge runs on and how busy it is."""

    plugin_name = "sysinfo"
    session_class = SysInfoSession
    client_class = SysInfoClient
    version = "0.0.1"
    ui_config = {
        "icon": "🖥️", "title": "System Info",
        "description": "Live CPU, memory, disk, network and GPU metrics.",
        "refresh_button": True,
        "monitors": [{"id": "metrics", "title": "System Metrics", "type": "metrics",
                      "css_class": "sysinfo-content", "auto_load": "metrics/{sid}"}]}

    def __init__(self, app: Any, instance_name: Optional[str] = None) -> None:
        super().__init__(app, instance_name)
        self._provider = SysInfoProvider()
        self.add_route_get("homedir", self.homedir_endpoint)
        self.add_route_get("host_role", self.host_role_endpoint)
        self.add_route_get("metrics/{sid}", self.get_metrics_endpoint)

    async def start(self) -> None:
        self._provider.start_prefetch()

    def _create_session(self, sid: str) -> PluginSession:
        return SysInfoSession(sid, self._provider)

    async def homedir_endpoint(self, request: Request) -> Any:
        """Answer {"homedir"}."""
        return {"homedir": os.path.expanduser("~")}

    async def host_role_endpoint(self, request: Request) -> Any:
        """Answer {"role", "scheduler", "job_id"}; the latter are null outside an allocation."""
        if self._app.state.role == "bridge":
            return {"role": "bridge", "scheduler": None, "job_id": None}
        for variable, scheduler in _ALLOCATION_VARIABLES:
            if os.environ.get(variable):
                return {"role": "compute", "scheduler": scheduler, "job_id": os.environ[variable]}
        return {"role": "login", "scheduler": None, "job_id": None}

    async def get_metrics_endpoint(self, request: Request) -> Any:
        """Answer the machine's figures."""
        return await self._forward(request.path_params["sid"], SysInfoSession.get_metrics)


# ---------------------------------------------------------------------------
# 2. queue_info: what a batch system tells of its queues, jobs and allocations. Parsers turn what
#    its programs print into values that are the same for every backend: times in seconds (since the
#    epoch where they are dates), memory in MiB. Backends run the programs: never on a loop, never
#    through a shell, each with a time limit and a bound on what it prints. Answers are kept.
# ---------------------------------------------------------------------------

log_queues = logging.getLogger("radical_edge.queue_info")

QUEUES_TTL_S = 60.0            # an answer is fresh for so long
QUEUES_PATIENCE_S = 10.0       # who could have an older answer waits so long for a fresh one
QUEUES_STALE_S = 3600.0        # an answer older than that is not given any more
SCHEDULER_S = 60.0             # a scheduler's program may take so long
COLLECT_S = 90.0               # what needs several programs may take so long
VERSION_S = 5.0                # to find out whether the scheduler's programs work at all
MAX_SCHEDULER_OUTPUT = 16 * 1024 * 1024   # bytes; JSON of that size is 100 MiB of values
MAX_ANSWERS = 64               # answers kept
MAX_RECORDS = 100_000          # jobs, queues and allocations in them; one of a job is 2 KiB
MAX_COLLECTING = 16            # answers being collected at once
MAX_PROGRAMS = 4               # scheduler's programs at once: they cost the site's controller
MAX_HOSTS = 100_000            # names in one host list
UNLIMITED = "UNLIMITED"
EVERYONE = "*"

FINISHED_STATES = frozenset((
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL",
    "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"))
_FLAG_STATES = (               # beside a base state; Slurm's own programs show the first of them
    "COMPLETING", "STAGE_OUT", "CONFIGURING", "RESIZING", "REQUEUE_FED", "REQUEUE_HOLD",
    "SPECIAL_EXIT", "STOPPED", "REQUEUED", "SIGNALING", "RECONFIG_FAIL", "RESV_DEL_HOLD",
    "POWER_UP_NODE", "EXPEDITING")
LIVE_STATES = frozenset(("PENDING", "RUNNING", "SUSPENDED", "UNKNOWN", *_FLAG_STATES))
UNAVAILABLE_NODES = frozenset((
    "DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILED", "FAILING", "FUTURE", "INVAL",
    "INVALID_REG", "MAINT", "MAINTENANCE", "NOT_RESPONDING", "NO_RESPOND", "POWERED_DOWN",
    "POWER_DOWN", "POWERING_DOWN", "REBOOT_ISSUED", "UNKNOWN"))
_BUSY_NODES = frozenset(("BLOCKED", "COMPLETING", "POWERING_UP", "RESERVED"))     # idle is not free
_NODE_SUFFIXES = {"*": "NOT_RESPONDING", "~": "POWERED_DOWN", "#": "POWERING_UP",
                  "!": "POWER_DOWN", "%": "POWERING_DOWN", "$": "MAINT", "@": "REBOOT_REQUESTED",
                  "^": "REBOOT_ISSUED", "-": "PLANNED"}

QUEUE_FIELDS = ("name", "state", "time_limit", "default", "default_time", "nodes_total",
                "nodes_available", "nodes_idle", "cpus_per_node", "mem_per_node_mb",
                "gpus_per_node", "max_jobs_per_user", "features")
JOB_FIELDS = ("job_id", "job_name", "user", "partition", "state", "nodes", "cpus", "gpus",
              "time_limit", "time_used", "submit_time", "start_time", "estimated_start", "end_time",
              "priority", "account", "qos", "node_list", "reason", "held", "array_job_id",
              "array_tasks", "dependency", "exit_code", "signal")
ALLOCATION_FIELDS = ("account", "user", "cluster", "partition", "fairshare", "qos", "default_qos",
                     "max_jobs", "max_submit", "max_wall", "max_tres", "grp_jobs", "grp_submit",
                     "grp_wall", "grp_tres", "grp_tres_minutes", "allocated_node_hours",
                     "used_node_hours", "remaining_node_hours")

# What squeue prints for _parse_job_line(): the name, in which anything may stand, comes last, and
# each row begins with a marker that nobody can guess.
SQUEUE_FORMAT = "%i|%F|%K|%T|%r|%u|%P|%a|%q|%D|%C|%l|%M|%V|%S|%e|%Q|%b|%E|%N|%j"
SINFO_FORMAT = "%R|%N|%T|%c|%m|%G|%f"
SACCTMGR_COLUMNS = ("cluster", "account", "user", "partition", "share", "qos", "defaultqos",
                    "maxjobs", "maxsubmit", "maxwall", "maxtres", "grpjobs", "grpsubmit",
                    "grpwall", "grptres", "grptresmins")

_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+\\-]{0,127}\$?")
_QUEUE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}")
_JOB_ID = re.compile(r"[0-9]{1,18}(?:_[0-9]{1,9}|_\[[0-9,:%-]{1,1024}\]|\+[0-9]{1,6}|"
                     r"\[[0-9,:-]{0,64}\])?(?:\.[A-Za-z0-9][A-Za-z0-9.-]{0,127})?")


def _record(fields: Tuple[str, ...], known: Dict[str, Any]) -> Dict[str, Any]:
    """Return {field: value}, None where nothing is known: a record has all its fields, always."""
    return {field: known.get(field) for field in fields}


def check_user(user: Optional[str]) -> str:
    """Return a user's name, our own for None. Raises Unprocessable for what can be none."""
    if user is None:
        try:
            return pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            raise Unavailable(f"the edge's user id {os.getuid()} has no name: give user=") from None
    if user != EVERYONE and not _USER_NAME.fullmatch(user):
        raise Unprocessable(f"user: {user[:80]!r} is not a user name, nor '*' for everyone")
    return user


def check_queue(queue: str) -> str:
    """Return a queue's name. Raises Unprocessable for what can be none."""
    if not _QUEUE_NAME.fullmatch(queue):
        raise Unprocessable(f"queue: {queue[:80]!r} is not the name of a queue")
    return queue


def check_job_id(job_id: Any) -> str:
    """Return a job's id. Raises Unprocessable for what can be none."""
    if not _JOB_ID.fullmatch(str(job_id)):
        raise Unprocessable(f"job_id: {str(job_id)[:80]!r} is not a job's id")
    return str(job_id)


def parse_states(text: Optional[str]) -> Optional[FrozenSet[str]]:
    """Return the states that a filter "PENDING,HELD" names; None for all jobs that live.

    ALL is every state. HELD is a pending job that somebody holds. Raises Unprocessable.
    """
    if not text:
        return None
    known = LIVE_STATES | FINISHED_STATES | {"HELD"}
    names = {name.strip().upper().replace("CANCELED", "CANCELLED") for name in text.split(",")}
    if "ALL" in names:
        return known
    for name in sorted(names - known):
        raise Unprocessable(f"state: {name[:40]!r} is not a job's state; there are: ALL, "
                            f"{', '.join(sorted(known))}")
    return frozenset(names)


def has_state(job: Dict[str, Any], states: Optional[FrozenSet[str]]) -> bool:
    """Whether a job is in one of the states that parse_states() returned."""
    if states is None:
        return job["state"] not in FINISHED_STATES
    return job["state"] in states or (job["held"] and "HELD" in states)


_ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)     # of a row


def _parse_rows(rows: Iterable[Any], parse: Callable[[Any], Any],
                replace: Callable[[Any], Any] = lambda row: None) -> List[Any]:
    """Return parse(row) of each row; one odd row must not cost the others.

    For one that cannot be parsed there is what replace(row) returns, or nothing for None. Raises
    what parse() did when it can parse none.
    """
    parsed: List[Any] = []
    odd: List[Exception] = []
    for row in rows:
        try:
            parsed.append(parse(row))
        except _ODD as error:
            odd.append(error)
            parsed.append(replace(row))
    if odd and len(odd) == len(parsed):
        raise odd[0]
    if odd:
        log_queues.warning("%d of %d rows that the scheduler printed are not understood: %s: %s",
                           len(odd), len(parsed), type(odd[0]).__name__, odd[0])
    return [row for row in parsed if row is not None]


# -- Slurm: text and JSON to values. Newer versions wrap numbers as {"set", "infinite", "number"},
#    older ones print them bare, with null or the largest numbers for "not set" and "no limit".

_UNSET_NUMBERS = frozenset((0xFFFE, 0xFFFFFFFE, 0xFFFFFFFFFFFFFFFE))      # NO_VAL of slurm.h
_INFINITE_NUMBERS = frozenset((0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF))           # INFINITE


def slurm_number(value: Any) -> Optional[float]:
    """Return a number of Slurm's JSON, of any version: math.inf for no limit, None for not set."""
    if isinstance(value, dict):
        if value.get("infinite"):
            return math.inf
        return slurm_number(value.get("number")) if value.get("set", True) else None
    if isinstance(value, str):
        number = _number(value)
        return math.inf if value.upper() in ("UNLIMITED", "INFINITE") else number
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value in _UNSET_NUMBERS:
        return None
    return math.inf if value in _INFINITE_NUMBERS else value


def _whole(value: Any) -> Optional[int]:
    number = slurm_number(value)
    return None if number is None or math.isinf(number) else int(number)


def _positive(value: Any) -> Optional[int]:
    return _whole(value) or None                  # dates, and ids of arrays: 0 is none


def _minutes(value: Any) -> Any:
    """Return seconds for JSON's minutes, UNLIMITED for no limit, None when not set."""
    number = slurm_number(value)
    if number is None or math.isinf(number):
        return None if number is None else UNLIMITED
    return int(number * 60)


def parse_slurm_duration(text: str) -> Any:
    """Return the seconds of "1-02:03:04", "30:00" and the like, UNLIMITED, or None."""
    if text.upper() in ("INFINITE", "UNLIMITED"):
        return UNLIMITED
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_slurm_date(text: str) -> Optional[int]:
    """Return a date as seconds since the epoch; None for "N/A", "Unknown" and the like."""
    if text.isdigit():
        return int(text) or None
    with contextlib.suppress(ValueError, OverflowError):      # SLURM_TIME_FORMAT had no effect
        return int(time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    return None


def slurm_states(value: Any) -> List[str]:
    """Return the states of a node, job or partition: of a list, "IDLE+DRAIN" or "idle*"."""
    parts = value if isinstance(value, list) else re.split(r"[+,]", str(value or ""))
    states = []
    for part in parts:
        name = str(part).strip().upper()
        while name and name[-1] in _NODE_SUFFIXES:
            states.append(_NODE_SUFFIXES[name[-1]])
            name = name[:-1]
        states.insert(0, name)
    return [state for state in states if state]


def parse_gpus(gres: Any) -> int:
    """Return the number of GPUs in "gpu:a100:4(S:0-1),gpu:2", "gres/gpu=4" or "gres/gpu:2"."""
    counts = {"typed": 0, "plain": 0}
    for item in re.sub(r"\([^)]*\)", "", str(gres or "")).split(","):
        name, _, rest = re.sub(r"^gres[/:]", "", item.strip()).replace("=", ":").partition(":")
        if name == "gpu":
            last = rest.rpartition(":")[2]
            typed = ":" in rest or not last.isdigit()
            counts["typed" if typed else "plain"] += int(last) if last.isdigit() else 1
    if "=" in str(gres):                          # "gres/gpu=4,gres/gpu:a100=4" tells it twice
        return counts["plain"] or counts["typed"]
    return sum(counts.values())


def parse_tres(value: Any) -> Dict[str, int]:
    """Return {"cpu": 64, "mem": MiB, "gres/gpu": 4} of a limit: JSON's list, or "cpu=64,mem=8G"."""
    found = {}
    if isinstance(value, str):
        for item in filter(None, value.split(",")):
            name, _, count = item.partition("=")
            found[name] = parse_mebibytes(count) if name == "mem" else _whole(count)
    for item in value if isinstance(value, list) else ():
        name = "/".join(filter(None, (item.get("type"), item.get("name"))))
        found[name] = _whole(item.get("count"))
    return {name: count for name, count in sorted(found.items()) if count is not None}


def parse_mebibytes(text: str, unit: str = "M") -> Optional[int]:
    """Return the MiB of "8000M", "16gb" or, for a bare number, of that many `unit`s."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGTP]?)(?:I?B|N|C|W)?", text.strip().upper())
    if match is None or _number(match[1]) is None:
        return None
    suffix = match[2] or ("" if text.strip().upper().endswith("B") else unit)
    powers = {"": -20, "K": -10, "M": 0, "G": 10, "T": 20, "P": 30}
    return int(float(match[1]) * 2.0 ** powers[suffix])


def _names(value: Any) -> List[str]:
    """Return the names in a list, or in "a,b"; none for "(null)" and the like."""
    parts = value if isinstance(value, list) else str(value or "").split(",")
    return [str(part).strip() for part in parts if part and
            str(part).strip() not in ("", "(null)", "N/A", "None")]


def expand_hostlist(text: str) -> List[str]:
    """Return the names that a host list "n[1-3,07],login1" stands for.

    Raises ValueError for one that is malformed or stands for more than MAX_HOSTS names.
    """
    hosts: List[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            parts = [plain] if plain else _expand_ranges(ranges)
            if len(names) * len(parts) + len(hosts) > MAX_HOSTS:
                raise ValueError(f"a host list of more than {MAX_HOSTS} names")
            names = [name + part for name in names for part in parts]
        hosts += names
    return hosts


def _expand_ranges(text: str) -> List[str]:
    numbers: List[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item)
        if match is None:
            raise ValueError(f"{item[:40]!r} is not a range of a host list")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first + len(numbers) >= MAX_HOSTS:
            raise ValueError(f"a host list of more than {MAX_HOSTS} names")
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers


class Access(NamedTuple):
    """Who may use a queue; None is everybody. In PBS' lists "-name" excludes, "+name" includes."""
    users: Optional[List[str]] = None
    groups: Optional[List[str]] = None
    accounts: Optional[List[str]] = None
    denied_accounts: Optional[List[str]] = None


class NodeFacts(NamedTuple):
    """Some nodes of a queue that are alike."""
    queue: str
    count: int
    states: FrozenSet[str]
    cpus: int
    memory: int                                   # MiB
    gpus: int
    features: List[str]

    @property
    def is_available(self) -> bool:
        """Whether it takes jobs, now or when those that it runs have ended."""
        return not self.states & UNAVAILABLE_NODES

    @property
    def is_idle(self) -> bool:
        """Whether it could begin a job now."""
        return self.is_available and not self.states & _BUSY_NODES and \
            bool(self.states & {"IDLE", "PLANNED"}) and "MIXED" not in self.states


def make_queue(known: Dict[str, Any], nodes: List[NodeFacts]) -> Dict[str, Any]:
    """Return a queue's record: what is `known` of it and the figures of its nodes.

    The figures "per node" are those of its largest node.
    """
    figures = {
        "nodes_total": sum(facts.count for facts in nodes),
        "nodes_available": sum(facts.count for facts in nodes if facts.is_available),
        "nodes_idle": sum(facts.count for facts in nodes if facts.is_idle),
        "cpus_per_node": max((facts.cpus for facts in nodes), default=0),
        "mem_per_node_mb": max((facts.memory for facts in nodes), default=0),
        "gpus_per_node": max((facts.gpus for facts in nodes), default=0),
        "features": sorted({name for facts in nodes for name in facts.features})}
    return {**_record(QUEUE_FIELDS, {**known, **figures}), "access": known.get("access", Access())}


def _queues(known: List[Dict[str, Any]], nodes: List[NodeFacts]) -> Dict[str, Dict[str, Any]]:
    by_queue: Dict[str, List[NodeFacts]] = {}
    for facts in nodes:
        by_queue.setdefault(facts.queue, []).append(facts)
    return {queue["name"]: make_queue(queue, by_queue.get(queue["name"], []))
            for queue in sorted(known, key=lambda queue: queue["name"])}


def parse_sinfo(document: Dict[str, Any]) -> List[NodeFacts]:
    """Return the nodes of `sinfo -N --json`.

    21.08 and 22.05 print {"nodes": [...]}. From 23.02 on it is {"sinfo": [{"partition", "node",
    "nodes", ...}]}, a row for each node of each partition. Without `-N` a row stands for all nodes
    of a state, with the features of one of them.
    """
    if "sinfo" not in document:
        return list(itertools.chain(*_parse_rows(document["nodes"], _parse_sinfo_node)))
    return _parse_rows(document["sinfo"], _parse_sinfo_row)


def _parse_sinfo_row(row: Dict[str, Any]) -> NodeFacts:
    return NodeFacts(row["partition"]["name"], _whole(row["nodes"].get("total")) or 0,
                     frozenset(slurm_states(row["node"].get("state"))),
                     _whole(row["cpus"].get("maximum")) or 0,
                     _whole(row["memory"].get("maximum")) or 0,
                     parse_gpus(row["gres"].get("total")), _names(row["features"].get("total")))


def _limited(value: Any) -> Optional[List[str]]:
    names = _names(value)
    return None if not names or names == ["ALL"] else names


def _parse_sinfo_node(node: Dict[str, Any]) -> List[NodeFacts]:
    states = frozenset(slurm_states(node.get("state")) + slurm_states(node.get("state_flags")))
    return [NodeFacts(queue, 1, states, _whole(node.get("cpus")) or 0,
                      _whole(node.get("real_memory")) or 0, parse_gpus(node.get("gres")),
                      _names(node.get("features"))) for queue in _names(node.get("partitions"))]


def parse_sinfo_text(text: str) -> List[NodeFacts]:
    """Return the nodes of `sinfo -h -N -o SINFO_FORMAT`, a line for each in each partition."""
    rows = [line.split("|", 6) for line in text.splitlines()]
    return [NodeFacts(row[0], 1, frozenset(slurm_states(row[2])), _whole(row[3].rstrip("+")) or 0,
                      _whole(row[4].rstrip("+")) or 0, parse_gpus(row[5]), _names(row[6]))
            for row in rows if len(row) == 7]


def parse_partitions_text(text: str) -> List[Dict[str, Any]]:
    """Return the queues of `scontrol -o show partition`."""
    queues = []
    for line in text.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" in facts:
            queues.append({
                "name": facts["PartitionName"], "state": facts.get("State", "UNKNOWN"),
                "default": facts.get("Default") == "YES" if "Default" in facts else None,
                "time_limit": parse_slurm_duration(facts.get("MaxTime", UNLIMITED)) or UNLIMITED,
                "default_time": parse_slurm_duration(facts.get("DefaultTime", "")),
                "access": Access(groups=_limited(facts.get("AllowGroups")),
                                 accounts=_limited(facts.get("AllowAccounts")),
                                 denied_accounts=_limited(facts.get("DenyAccounts")))})
    return queues


def parse_squeue(document: Dict[str, Any], now: float) -> List[Dict[str, Any]]:
    """Return the jobs of `squeue --json`, of 21.08 or later. now: seconds since the epoch."""
    return _parse_rows(document["jobs"], lambda job: _parse_squeue_job(job, now), _unknown_job)


def _unknown_job(job: Any) -> Optional[Dict[str, Any]]:
    """Return a record that says no more than that there is such a job: else it seems to be gone."""
    if not isinstance(job, dict) or not _whole(job.get("job_id")):
        return None
    return _record(JOB_FIELDS, {"job_id": str(_whole(job["job_id"])), "user": job.get("user_name"),
                                "partition": str(job.get("partition")), "state": "UNKNOWN",
                                "held": False})


def _parse_squeue_job(job: Dict[str, Any], now: float) -> Dict[str, Any]:
    states = slurm_states(job.get("job_state"))
    state = next((flag for flag in _FLAG_STATES if flag in states), (states or ["UNKNOWN"])[0])
    limit = UNLIMITED if job.get("time_limit") is None else _minutes(job["time_limit"])
    start, end = _positive(job.get("start_time")), _positive(job.get("end_time"))
    pending, finished = "PENDING" in states, bool(FINISHED_STATES & set(states))
    if not finished and limit == UNLIMITED:
        end = None                                # Slurm makes one up, a year ahead
    tres = job.get("tres_alloc_str") or job.get("tres_req_str") or ""
    known = {
        **_parse_squeue_ids(job), "job_name": job.get("name"), "user": _job_user(job),
        "partition": job.get("partition"), "state": state, "nodes": _whole(job.get("node_count")),
        "cpus": _whole(job.get("cpus")) or parse_tres(tres).get("cpu"), "time_limit": limit,
        "gpus": parse_gpus(tres) or parse_gpus(job.get("tres_per_node")) *
        (_whole(job.get("node_count")) or 1),
        "time_used": 0 if pending else _parse_time_used(job, states, now if not finished else end),
        "submit_time": _positive(job.get("submit_time")), "start_time": None if pending else start,
        "estimated_start": start if pending else None, "end_time": None if pending else end,
        "priority": _whole(job.get("priority")), "account": job.get("account") or None,
        "qos": job.get("qos") or None, "node_list": job.get("nodes") or "",
        "reason": _reason(job.get("state_description") or job.get("state_reason")),
        "dependency": job.get("dependency") or None,
        "held": pending and (_whole(job.get("priority")) == 0 or _is_hold(job.get("state_reason")))}
    if finished:
        known.update(_parse_exit_code(job.get("exit_code")))
    return _record(JOB_FIELDS, known)


def _reason(text: Any) -> Optional[str]:
    return None if text in (None, "", "None") else str(text)


def _is_hold(reason: Any) -> bool:
    return str(reason).startswith("JobHeld")


def _job_user(job: Dict[str, Any]) -> Optional[str]:
    if job.get("user_name"):
        return job["user_name"]
    with contextlib.suppress(KeyError, TypeError):           # 21.08 has no names
        return pwd.getpwuid(job["user_id"]).pw_name
    return None


def _parse_squeue_ids(job: Dict[str, Any]) -> Dict[str, Any]:
    """Return job_id as squeue shows it and scancel takes it, and to which array the job belongs."""
    number = int(_whole(job["job_id"]))           # raises for a row that is of no job
    array, task = _positive(job.get("array_job_id")), _whole(job.get("array_task_id"))
    hetero, offset = _positive(job.get("het_job_id")), _whole(job.get("het_job_offset"))
    if hetero:
        return {"job_id": f"{hetero}+{offset or 0}"}
    if not array:
        return {"job_id": str(number)}
    pending = job.get("array_task_string") or ""
    tasks = pending if pending or task is None else str(task)
    return {"job_id": f"{array}_[{pending}]" if pending else f"{array}_{tasks}",
            "array_job_id": str(array), "array_tasks": tasks}


def _parse_time_used(job: Dict[str, Any], states: List[str], until: Optional[float]) -> int:
    """Return how long a job has run, without the time for which it was suspended."""
    before = _whole(job.get("pre_sus_time")) or 0
    suspended, start = _positive(job.get("suspend_time")), _positive(job.get("start_time"))
    if "SUSPENDED" in states:
        return before
    begin = suspended or start
    return before + max(0, int(until - begin)) if begin and until else before


def _parse_exit_code(value: Any) -> Dict[str, Any]:
    """Return {"exit_code", "signal"}: of {"return_code", "signal": {"id"}}, or of a wait status."""
    if isinstance(value, dict):
        killed = value.get("signal") or {}
        signal_number = _positive(killed.get("id", killed.get("signal_id")))
        code = _whole(value.get("return_code"))
    else:
        status = _whole(value) or 0
        code, signal_number = status >> 8, status & 0x7F or None
    return {"exit_code": None if signal_number else code, "signal": signal_number}


def parse_squeue_text(text: str, marker: str) -> List[Dict[str, Any]]:
    """Return the jobs of `squeue -h -o marker|SQUEUE_FORMAT`. Names may contain anything."""
    jobs = []
    for row in text.split(marker + "|")[1:]:
        fields = row[:-1].split("|", 20) if row.endswith("\n") else row.split("|", 20)
        if len(fields) == 21:
            jobs.append(_parse_job_line(fields))
    return jobs


def _parse_job_line(fields: List[str]) -> Dict[str, Any]:
    (job_id, array, task, state, reason, user, partition, account, qos, nodes, cpus, limit, used,
     submitted, start, end, priority, gres, dependency, hosts, name) = fields
    is_array = "_" in job_id
    pending, finished = state == "PENDING", state in FINISHED_STATES
    time_limit, started = parse_slurm_duration(limit), parse_slurm_date(start)
    ended = None if time_limit == UNLIMITED and not finished else parse_slurm_date(end)
    return _record(JOB_FIELDS, {
        "job_id": job_id, "job_name": name, "user": user, "partition": partition, "state": state,
        "array_job_id": array if is_array else None, "array_tasks": task if is_array else None,
        "nodes": _whole(nodes), "cpus": _whole(cpus), "gpus": parse_gpus(gres) *
        (_whole(nodes) or 1), "time_limit": time_limit, "time_used": parse_slurm_duration(used),
        "submit_time": parse_slurm_date(submitted), "start_time": None if pending else started,
        "estimated_start": started if pending else None, "end_time": None if pending else ended,
        "priority": _whole(priority), "account": _text(account), "qos": _text(qos),
        "node_list": hosts, "reason": _reason(reason), "dependency": _text(dependency),
        "held": pending and (_whole(priority) == 0 or _is_hold(reason))})


def _text(value: str) -> Optional[str]:
    return None if value in ("", "(null)", "N/A") else value


def parse_associations(document: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the allocations of `sacctmgr show assoc --json`, of 23.02 or later."""
    return _parse_rows(document["associations"], _parse_association)


def _parse_association(row: Dict[str, Any]) -> Dict[str, Any]:
    limits = row.get("max") or {}
    jobs, tres = limits.get("jobs") or {}, limits.get("tres") or {}
    per, group = jobs.get("per") or {}, tres.get("group") or {}
    account_wall = ((limits.get("per") or {}).get("account") or {}).get("wall_clock")
    shares = _whole(row.get("shares_raw"))
    return _allocation({
        "account": row.get("account"), "user": row.get("user") or "", "cluster": row.get("cluster"),
        "partition": row.get("partition") or "", "fairshare": "parent" if shares == 0x7FFFFFFF else
        shares, "qos": sorted(_names(row.get("qos"))),
        "default_qos": _text((row.get("default") or {}).get("qos") or ""),
        "max_jobs": _whole(jobs.get("active")), "max_submit": _whole(jobs.get("total")),
        "max_wall": _seconds(per.get("wall_clock")),
        "max_tres": parse_tres((tres.get("per") or {}).get("job")),
        "grp_jobs": _whole(per.get("count")), "grp_submit": _whole(per.get("submitted")),
        "grp_wall": _seconds(account_wall), "grp_tres": parse_tres(tres.get("total")),
        "grp_tres_minutes": parse_tres(group.get("minutes"))})


def _seconds(value: Any) -> Optional[int]:
    seconds = _minutes(value)
    return None if seconds == UNLIMITED else seconds          # no limit of this kind


def parse_associations_text(text: str) -> List[Dict[str, Any]]:
    """Return the allocations of `sacctmgr -P -n show assoc format=` with SACCTMGR_COLUMNS."""
    rows = [dict(zip(SACCTMGR_COLUMNS, line.split("|"))) for line in text.splitlines()
            if line.count("|") == len(SACCTMGR_COLUMNS) - 1]
    return [_allocation({
        "account": row["account"], "user": row["user"], "cluster": row["cluster"],
        "partition": row["partition"], "fairshare": _whole(row["share"]) if row["share"].isdigit()
        else _text(row["share"]), "qos": sorted(_names(row["qos"])),
        "default_qos": _text(row["defaultqos"]), "max_jobs": _whole(row["maxjobs"]),
        "max_submit": _whole(row["maxsubmit"]), "max_wall": parse_slurm_duration(row["maxwall"]),
        "max_tres": parse_tres(row["maxtres"]), "grp_jobs": _whole(row["grpjobs"]),
        "grp_submit": _whole(row["grpsubmit"]), "grp_wall": parse_slurm_duration(row["grpwall"]),
        "grp_tres": parse_tres(row["grptres"]), "grp_tres_minutes": parse_tres(row["grptresmins"])})
        for row in rows]


def _allocation(known: Dict[str, Any]) -> Dict[str, Any]:
    minutes = known["grp_tres_minutes"].get("node")          # Slurm tells what is used elsewhere
    hours = None if minutes is None else minutes / 60
    return _record(ALLOCATION_FIELDS, {**known, "allocated_node_hours": hours})


# -- PBS Pro: the JSON and the text of its programs both become {name: {attribute: text}}.

_PBS_STATES = {"B": "RUNNING", "E": "COMPLETING", "F": "COMPLETED", "H": "PENDING", "M": "PENDING",
               "Q": "PENDING", "R": "RUNNING", "S": "SUSPENDED", "T": "PENDING", "U": "SUSPENDED",
               "W": "PENDING", "X": "COMPLETED"}
_PBS_NODE_STATES = {
    "free": "IDLE", "job-busy": "ALLOCATED", "job-exclusive": "ALLOCATED", "busy": "ALLOCATED",
    "resv-exclusive": "RESERVED", "offline": "DRAIN", "down": "DOWN", "maintenance": "MAINT",
    "stale": "NOT_RESPONDING", "state-unknown": "UNKNOWN", "state-unresolvable": "UNKNOWN",
    "provisioning": "REBOOT_ISSUED", "wait-provisioning": "REBOOT_ISSUED", "sleep": "POWERED_DOWN",
    "initializing": "POWERING_UP", "unresolvable": "DOWN"}
PBS_SIGNAL_BASE = 256          # Exit_status of a job that a signal ended, less the signal

PbsEntries = Dict[str, Dict[str, str]]


def parse_pbs_text(text: str) -> PbsEntries:
    """Return the entries of `qstat -f`, `qstat -Qf` or `pbsnodes -a`.

    An entry begins at the line's start ("Job Id: 1.server", "Queue: workq", "node1"); attributes
    are indented, and a line that begins with a tab continues the one before.
    """
    entries: PbsEntries = {}
    attributes: Dict[str, str] = {}
    name = ""
    for line in re.sub(r"\n\t", "", text).splitlines():
        heading = re.fullmatch(r"(?:Job Id: |Queue: )?(\S+)\s*", line)
        attribute = re.fullmatch(r"\s+(\S+) = ?(.*)", line)
        if attribute:
            name = attribute[1]
            attributes[name] = attribute[2]
        elif heading and not line[0].isspace():
            attributes = entries.setdefault(heading[1], {})
    return {name: facts for name, facts in entries.items() if facts}


def parse_pbs_json(document: Dict[str, Any], section: str) -> PbsEntries:
    """Return the entries of `-F json`: those in "Jobs", "Queue" or "nodes"."""
    return {name: _flatten(attributes) for name, attributes in
            (document.get(section) or {}).items()}


def _flatten(attributes: Dict[str, Any]) -> Dict[str, str]:
    flat: Dict[str, str] = {}
    for name, value in attributes.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": str(item) for key, item in value.items()
                         if name != "Variable_List"})
        else:
            flat[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat


def parse_pbs_duration(text: Optional[str]) -> Optional[int]:
    """Return the seconds of "48:00:00", "1:02:03:04" or "3600"; None for anything else."""
    if not text or not re.fullmatch(r"\d+(:\d+){0,3}(\.\d+)?", text):
        return None
    units = [1, 60, 3600, 86400]
    parts = text.partition(".")[0].split(":")
    return sum(int(part) * unit for part, unit in zip(reversed(parts), units))


def parse_pbs_date(text: Optional[str]) -> Optional[int]:
    """Return "Wed Nov 25 10:11:16 2026", or seconds, as seconds since the epoch."""
    if not text or text.isdigit():
        return int(text or 0) or None
    with contextlib.suppress(ValueError, OverflowError):
        return int(time.mktime(time.strptime(text, "%a %b %d %H:%M:%S %Y")))
    return None


def parse_pbs_queues(queues: PbsEntries, nodes: PbsEntries) -> Dict[str, Dict[str, Any]]:
    """Return the queues in which jobs run or are sent on, with the figures of their nodes.

    A node that names a queue is for that one alone; where nodes have a Qlist, a queue has those
    that list what its chunks ask for; otherwise all nodes are for all queues.
    """
    hosts = _pbs_hosts(nodes)
    found = {}
    for name, facts in sorted(queues.items()):
        mine = [node for node, where in hosts if _pbs_serves(name, facts, where)]
        found[name] = {**make_queue(_pbs_queue(name, facts), mine), **_pbs_bounds(facts)}
    return found


def _pbs_queue(name: str, facts: Dict[str, str]) -> Dict[str, Any]:
    enabled, started = facts.get("enabled") == "True", facts.get("started") == "True"
    state = "UP" if enabled and started else "DOWN" if enabled else "DRAIN" if started else \
        "INACTIVE"                                # Slurm's words: takes jobs, starts them
    limit = parse_pbs_duration(facts.get("resources_max.walltime"))
    runs = re.search(r"u:PBS_GENERIC=(\d+)", facts.get("max_run", ""))
    lists = {kind: _names(facts.get(f"acl_{kind}s")) if facts.get(f"acl_{kind}_enable") == "True"
             else None for kind in ("user", "group")}
    return {"name": name, "state": state, "time_limit": UNLIMITED if limit is None else limit,
            "default_time": parse_pbs_duration(facts.get("resources_default.walltime")),
            "max_jobs_per_user": int(runs[1]) if runs else _whole(facts.get("max_user_run")),
            "access": Access(users=lists["user"], groups=lists["group"])}


def _pbs_bounds(facts: Dict[str, str]) -> Dict[str, Any]:
    return {"walltime_min": parse_pbs_duration(facts.get("resources_min.walltime")),
            "walltime_max": parse_pbs_duration(facts.get("resources_max.walltime")),
            "nodes_min": _whole(facts.get("resources_min.nodect")),
            "nodes_max": _whole(facts.get("resources_max.nodect"))}


def _pbs_serves(queue: str, facts: Dict[str, str], where: Dict[str, str]) -> bool:
    if facts.get("queue_type", "Execution").startswith("R"):
        return False                              # a routing queue has no nodes
    if where.get("queue"):
        return where["queue"] == queue
    wanted = facts.get("default_chunk.Qlist")
    listed = _names(where.get("resources_available.Qlist"))
    return wanted in listed if wanted or listed else True


def _pbs_hosts(nodes: PbsEntries) -> List[Tuple[NodeFacts, Dict[str, str]]]:
    """Return the hosts, each with the sum of its virtual nodes, and what the first tells of it."""
    hosts: Dict[str, List[Dict[str, str]]] = {}
    for name, facts in nodes.items():
        hosts.setdefault(facts.get("resources_available.host", name), []).append(facts)
    return [(_pbs_host(parts), parts[0]) for parts in hosts.values()]


def _pbs_host(parts: List[Dict[str, str]]) -> NodeFacts:
    states = {_PBS_NODE_STATES.get(state.strip(), "UNKNOWN") for part in parts
              for state in part.get("state", "").split(",")}
    if any(part.get("jobs") for part in parts):
        states.add("MIXED")
    sums = [sum(_whole(part.get(f"resources_available.{name}")) or 0 for part in parts)
            for name in ("ncpus", "ngpus")]
    memory = sum(parse_mebibytes(part.get("resources_available.mem", "0kb"), "") or 0
                 for part in parts)
    return NodeFacts("", 1, frozenset(states), sums[0], memory, sums[1], [])


def parse_pbs_jobs(entries: PbsEntries, now: float) -> List[Dict[str, Any]]:
    """Return the jobs of `qstat -f`. now: seconds since the epoch."""
    return _parse_rows(entries.items(), lambda entry: _parse_pbs_job(*entry, now))


def _parse_pbs_job(job_id: str, facts: Dict[str, str], now: float) -> Dict[str, Any]:
    state, exits = _pbs_state(facts)
    pending, start = state == "PENDING", parse_pbs_date(facts.get("stime"))
    used = parse_pbs_duration(facts.get("resources_used.walltime"))
    if used is None:
        used = max(0, int(now - start)) if start and state == "RUNNING" else 0
    limit = parse_pbs_duration(facts.get("Resource_List.walltime"))
    hosts = [item.split("/")[0] for item in facts.get("exec_host", "").split("+") if item]
    array = re.match(r"(\d+)\[(\d*)\](.*)", job_id)
    return _record(JOB_FIELDS, {
        "job_id": job_id, "job_name": facts.get("Job_Name"),
        "user": facts.get("Job_Owner", "").split("@")[0] or None, "partition": facts.get("queue"),
        "state": state, "nodes": _whole(facts.get("Resource_List.nodect")),
        "cpus": _whole(facts.get("Resource_List.ncpus")),
        "gpus": _whole(facts.get("Resource_List.ngpus")) or 0,
        "time_limit": UNLIMITED if limit is None else limit, "time_used": used,
        "submit_time": parse_pbs_date(facts.get("ctime")), "start_time": None if pending else start,
        "estimated_start": parse_pbs_date(facts.get("estimated.start_time")) if pending else None,
        "end_time": parse_pbs_date(facts.get("obittime") or facts.get("mtime"))
        if state in FINISHED_STATES else start + limit if start and limit and not pending else None,
        "priority": _whole(facts.get("Priority")),
        "account": facts.get("Account_Name") or _pbs_project(facts), "qos": facts.get("QOS"),
        "node_list": ",".join(dict.fromkeys(hosts)), "reason": facts.get("comment"),
        "held": pending and facts.get("Hold_Types", "n") not in ("n", ""),
        "array_job_id": f"{array[1]}[]{array[3]}" if array else None,
        "array_tasks": (array[2] or facts.get("array_indices_submitted")) if array else None,
        "dependency": facts.get("depend"), **exits})


def _pbs_project(facts: Dict[str, str]) -> Optional[str]:
    project = facts.get("project")
    return None if project == "_pbs_project_default" else project


def _pbs_state(facts: Dict[str, str]) -> Tuple[str, Dict[str, Any]]:
    """Return the state, and the exit code and signal of a job that has ended."""
    state = _PBS_STATES.get(facts.get("job_state", ""), "UNKNOWN")
    status = facts.get("Exit_status", "")
    if state != "COMPLETED" or not re.fullmatch(r"-?\d+", status):
        cancelled = state == "COMPLETED" and not status and "stime" not in facts
        return "CANCELLED" if cancelled else state, {}
    code = int(status)
    if code < 0:                                  # PBS itself could not run it, or ended it
        return "FAILED", {}
    if code >= PBS_SIGNAL_BASE:
        killed = code - PBS_SIGNAL_BASE
        by_user = killed in (signal.SIGTERM, signal.SIGKILL)
        return "CANCELLED" if by_user else "FAILED", {"signal": killed}
    return "FAILED" if code else "COMPLETED", {"exit_code": code}


def parse_sbank(text: str) -> List[Dict[str, Any]]:
    """Return the allocations of `sbank-list-allocations`: a table with its heads underlined."""
    lines = text.splitlines()
    ruler = next((at for at, line in enumerate(lines) if re.fullmatch(r"\s*-{3,}[\s-]*", line)), 0)
    if not ruler:
        return []
    columns = [match.span() for match in re.finditer(r"-+", lines[ruler])]
    heads = [lines[ruler - 1][start:end].strip().lower() for start, end in columns]
    rows = []
    for line in lines[ruler + 1:]:
        row = dict(zip(heads, (line[start:end].strip() for start, end in columns)))
        if not row.get("allocation", "").isdigit():
            break                                 # the totals
        rows.append(_sbank_allocation(row))
    return rows


def _sbank_allocation(row: Dict[str, str]) -> Dict[str, Any]:
    used, left = (_number((row.get(name) or "").replace(",", "")) for name in
                  ("charged", "available balance"))
    known = {"account": row.get("project"), "user": "", "qos": [], "max_tres": {}, "grp_tres": {},
             "grp_tres_minutes": {}, "used_node_hours": used, "remaining_node_hours": left,
             "allocated_node_hours": None if used is None or left is None else used + left}
    return {**_record(ALLOCATION_FIELDS, known), "allocation_id": row.get("allocation"),
            "suballocation_id": row.get("suballocation"), "start_date": row.get("start"),
            "end_date": row.get("end"), "resource": row.get("resource"),
            "jobs": _whole((row.get("jobs") or "").replace(",", ""))}


# -- Answers that are kept, and the backends that collect them.

class _Answer(NamedTuple):
    value: Dict[str, Any]
    collected: float                              # monotonic

    @property
    def size(self) -> int:
        """The number of records."""
        return sum(len(records) for records in self.value.values())


class _Run(NamedTuple):
    """A collector at work; who waits for it holds the future."""
    future: "concurrent.futures.Future[Dict[str, Any]]"
    started: float                                # monotonic


class _Kept:
    """The last answer to a question, and who is about to replace it. _Answers' lock guards it."""

    __slots__ = ("answer", "fresh_until", "running", "overtaken", "again")

    def __init__(self) -> None:
        self.answer: Optional[_Answer] = None
        self.fresh_until = 0.0                    # monotonic
        self.running: Optional[_Run] = None
        self.overtaken = False                    # `running` may tell what is not so any more
        self.again: Optional[_Run] = None         # starts when `running` has ended


class _Answers:
    """Answers by key, collected once for all who ask meanwhile and kept for `ttl` seconds.

    When a collector is slow or fails, its callers get the last answer with "stale", "age" and
    "problem" in it, as long as that is not older than QUEUES_STALE_S.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._lock = threading.Lock()
        self._kept: "collections.OrderedDict[Tuple[Any, ...], _Kept]" = collections.OrderedDict()
        # by key, the least recently asked for first; guarded by _lock

    def get(self, key: Tuple[Any, ...], collect: Callable[[], Dict[str, Any]],
            force: bool = False, longest: float = math.inf) -> Dict[str, Any]:
        """Return the answer; with `force`, one whose collector starts from now on. Blocks.

        longest: seconds to wait, if less than usual. Raises what the collector raised,
        DeadlineExceeded, TooManyRequests.
        """
        with self._lock:
            kept = self._find_locked(key)
            if not force and time.monotonic() < kept.fresh_until:
                return kept.answer.value
            run = self._start_locked(key, kept, collect, force)
            last = kept.answer
        age = time.monotonic() - last.collected if last else math.inf
        usable = age < QUEUES_STALE_S
        patience = min(longest, QUEUES_PATIENCE_S if usable else COLLECT_S)
        try:
            return run.future.result(max(0.0, run.started + patience - time.monotonic()))
        except concurrent.futures.TimeoutError:
            problem: EdgeError = DeadlineExceeded("the scheduler has not answered for "
                                                  f"{patience:g} s: try again later")
        except EdgeError as error:
            problem = error
        if not usable:
            raise problem
        return {**last.value, "stale": True, "age": round(age, 1), "problem": problem.detail}

    def prefetch(self, key: Tuple[Any, ...], collect: Callable[[], Dict[str, Any]]) -> None:
        """Begin to collect an answer that will be asked for soon; what goes wrong is logged."""
        with self._lock:
            run = self._start_locked(key, self._find_locked(key), collect, False)
        run.future.add_done_callback(_log_problem)

    def expire(self, kind: str) -> None:
        """Let no answer of a kind count as fresh, nor one that is just being collected."""
        with self._lock:
            for key, kept in self._kept.items():
                if key[0] == kind:
                    kept.fresh_until = 0.0
                    kept.overtaken = kept.running is not None

    def _find_locked(self, key: Tuple[Any, ...]) -> _Kept:
        kept = self._kept.setdefault(key, _Kept())
        self._kept.move_to_end(key)
        sizes = {old: entry.answer.size if entry.answer else 0
                 for old, entry in self._kept.items()}
        records = sum(sizes.values())
        for old, size in sizes.items():
            if len(self._kept) <= MAX_ANSWERS and records <= MAX_RECORDS:
                break
            if old != key and self._kept[old].running is None:
                del self._kept[old]
                records -= size
        return kept

    def _start_locked(self, key: Tuple[Any, ...], kept: _Kept,
                      collect: Callable[[], Dict[str, Any]], force: bool) -> _Run:
        if kept.running is not None:
            if not force and not kept.overtaken:
                return kept.running
            if kept.again is None:
                kept.again = _Run(concurrent.futures.Future(), time.monotonic())
            return kept.again
        if sum(entry.running is not None for entry in self._kept.values()) >= MAX_COLLECTING:
            raise TooManyRequests(f"the scheduler is asked {MAX_COLLECTING} questions already: try "
                                  "again later")
        run = _Run(concurrent.futures.Future(), time.monotonic())
        _start_thread("queue_info-collect", self._run, key, kept, run, collect)
        kept.running = run
        return run

    def _run(self, key: Tuple[Any, ...], kept: _Kept, run: _Run,
             collect: Callable[[], Dict[str, Any]]) -> None:
        """Collect, and then go on with who asked for a later answer, in the same thread."""
        next_run: Optional[_Run] = run
        while next_run is not None:
            next_run = self._run_once(key, kept, next_run, collect)

    def _run_once(self, key: Tuple[Any, ...], kept: _Kept, run: _Run,
                  collect: Callable[[], Dict[str, Any]]) -> Optional[_Run]:
        value, problem = None, None
        try:
            value = collect()
        except EdgeError as error:
            problem = error
        except Exception as error:                # output of a shape that no version is known for
            log_queues.exception("%s: what the scheduler printed is not understood", key[0])
            problem = BadGateway("what the scheduler printed is not understood "
                                 f"({type(error).__name__}: {error})"[:300])
        with self._lock:
            now = time.monotonic()
            if value is not None:
                kept.answer = _Answer(value, now)
                kept.fresh_until = 0.0 if kept.overtaken else now + self._ttl
            kept.running, kept.again, kept.overtaken = kept.again, None, False
            next_run = kept.running
        if problem is None:
            run.future.set_result(value)
        else:
            run.future.set_exception(problem)
        return next_run


def _log_problem(future: "concurrent.futures.Future[Dict[str, Any]]") -> None:
    problem = future.exception()
    if problem is not None:
        log_queues.warning("the batch system cannot be asked now: %s", problem)


class Rights(NamedTuple):
    """What decides which queues a user sees."""
    user: str
    groups: FrozenSet[str]
    associations: List[Dict[str, Any]]            # empty when there is no accounting, or none known


def _groups_of(user: str) -> FrozenSet[str]:
    names = set()
    with contextlib.suppress(KeyError, OSError):
        for number in os.getgrouplist(user, pwd.getpwnam(user).pw_gid):
            with contextlib.suppress(KeyError):
                names.add(grp.getgrgid(number).gr_name)
    return frozenset(names)


def _is_listed(entries: List[str], names: Iterable[str]) -> bool:
    """Whether a list of "name", "+name", "-name", "*" admits a name; the first match decides."""
    wanted = set(names)
    for entry in entries:
        if entry.lstrip("+-").split("@")[0] in wanted | {"*"}:
            return not entry.startswith("-")
    return False


def may_use(queue: Dict[str, Any], rights: Rights) -> bool:
    """Whether a queue's lists and the user's associations let the user submit to it."""
    access, accounts = queue["access"], {row["account"] for row in rights.associations}
    bound = {row["partition"] for row in rights.associations}
    if bound and "" not in bound and queue["name"] not in bound:
        return False
    if access.users is not None and not _is_listed(access.users, [rights.user]):
        return False
    if access.groups is not None and not _is_listed(access.groups, rights.groups):
        return False
    if not accounts:
        return True                               # accounts are nothing here, or nothing is known
    if access.accounts is not None:
        return bool(accounts & set(access.accounts))
    return bool(accounts - set(access.denied_accounts or ()))


class QueueInfo(abc.ABC):
    """What a batch system tells of its queues, jobs and allocations; subclasses ask one kind.

    Answers are kept for `ttl` seconds. `user` is a name, None for the user as whom this process
    runs, "*" for everyone. All methods block, for COLLECT_S at the most, and any thread may call
    them; `workers` has threads for that. Times are in seconds and memory is in MiB; a time limit is
    "UNLIMITED" where there is none. An answer that could not be renewed says so: it has "stale":
    true, its "age" and the "problem".
    """

    backend = ""                                  # "slurm", "pbs"
    programs: Tuple[str, ...] = ()                # what must be on PATH

    def __init__(self, ttl: float = QUEUES_TTL_S) -> None:
        self.workers = Workers("queue_info")
        self._answers = _Answers(ttl)
        self._slots = threading.BoundedSemaphore(MAX_PROGRAMS)
        self._stopped = threading.Event()

    # -- what subclasses ask of their batch system; all may raise EdgeError

    @abc.abstractmethod
    def _collect_info(self) -> Dict[str, Any]:
        """Return {"queues": {name: make_queue()}}, for everyone."""

    @abc.abstractmethod
    def _collect_jobs(self, queue: Optional[str], user: str, finished: bool) -> Dict[str, Any]:
        """Return {"jobs": [{JOB_FIELDS}]}; those that have ended too if `finished`."""

    @abc.abstractmethod
    def _collect_allocations(self, user: str) -> Dict[str, Any]:
        """Return {"allocations": [{ALLOCATION_FIELDS}]}."""

    @abc.abstractmethod
    def _cancel(self, job_id: str) -> None:
        """Cancel a job. Raises NotFound, Forbidden and Conflict with the scheduler's own words."""

    @abc.abstractmethod
    def job_allocation(self) -> Optional[Dict[str, Any]]:
        """Return the allocation within which this process runs; None outside of one.

        {"job_id", "partition", "n_nodes", "nodelist", "cpus_per_node", "gpus_per_node", "account",
        "job_name", "runtime"}; the latter is the time limit in seconds, None without one. Raises
        EdgeError, a RuntimeError, when there is one of which nothing can be found out.
        """

    # -- what callers use

    def find_fault(self) -> Optional[str]:
        """Return why this batch system cannot be asked on this machine; None when it can."""
        missing = [name for name in self.programs if find_program(name) is None]
        return f"{', '.join(missing)} not found on PATH" if missing else None

    def start_prefetch(self) -> None:
        """Begin to collect, at the same time, what is asked for first: queues and allocations."""
        self._answers.prefetch(("info",), self._collect_info)
        with contextlib.suppress(EdgeError):      # a user id without a name: that caller is told
            me = check_user(None)
            self._answers.prefetch(("allocations", me), lambda: self._collect_allocations(me))

    def get_info(self, user: Optional[str] = None, force: bool = False) -> Dict[str, Any]:
        """Return {"queues": {name: {QUEUE_FIELDS}}}: those to which the user may submit."""
        name = check_user(user)
        info = self._answers.get(("info",), self._collect_info, force)
        queues = info["queues"]
        if name != EVERYONE:
            rights = self._find_rights(name)
            queues = {key: queue for key, queue in queues.items() if may_use(queue, rights)}
        return {**info, "queues": {key: {field: value for field, value in queue.items()
                                         if field != "access"} for key, queue in queues.items()}}

    def list_jobs(self, queue: str, user: Optional[str] = None, force: bool = False,
                  state: Optional[str] = None) -> Dict[str, Any]:
        """Return {"jobs": [{JOB_FIELDS}]} of a queue. state: as parse_states(). Raises NotFound."""
        answer = self._list_jobs(check_queue(queue), user, force, state)
        if answer["jobs"]:
            return answer
        with contextlib.suppress(Unavailable, BadGateway, DeadlineExceeded, TooManyRequests):
            known = self._answers.get(("info",), self._collect_info)["queues"]
            if queue not in known:
                raise NotFound(f"there is no queue {queue!r}; there are: "
                               f"{', '.join(sorted(known)) or 'none'}"[:1000])
        return answer

    def list_all_jobs(self, user: Optional[str] = None, force: bool = False,
                      state: Optional[str] = None) -> Dict[str, Any]:
        """Return {"jobs": [{JOB_FIELDS}]} of all queues. state: see parse_states()."""
        return self._list_jobs(None, user, force, state)

    def list_allocations(self, user: Optional[str] = None, force: bool = False) -> Dict[str, Any]:
        """Return {"allocations": [{ALLOCATION_FIELDS}]}: the user's; "*" has those of accounts."""
        name = check_user(user)
        return self._answers.get(("allocations", name), lambda: self._collect_allocations(name),
                                 force)

    def cancel_job(self, job_id: Any) -> Dict[str, Any]:
        """Cancel a job; return {"job_id", "status": "canceled"}.

        Raises NotFound, Forbidden for another user's, Conflict for one that has ended.
        """
        checked = check_job_id(job_id)
        self._cancel(checked)
        self._answers.expire("jobs")
        return {"job_id": checked, "status": "canceled"}

    def stop(self) -> None:
        """End the programs that run, and the threads."""
        self._stopped.set()
        self.workers.stop()

    # -- for subclasses

    def _run(self, *command: str, env: Optional[Dict[str, str]] = None) -> Ran:
        """Run a scheduler's program, when less than MAX_PROGRAMS are running."""
        if not self._slots.acquire(timeout=SCHEDULER_S):
            raise Unavailable("the scheduler's programs are all waiting for it: try again later")
        try:
            return run_program(list(command), SCHEDULER_S, MAX_SCHEDULER_OUTPUT, env,
                               self._stopped)
        finally:
            self._slots.release()

    def _list_jobs(self, queue: Optional[str], user: Optional[str], force: bool,
                   state: Optional[str]) -> Dict[str, Any]:
        states, name = parse_states(state), check_user(user)
        finished = states is not None and bool(states & FINISHED_STATES)
        answer = self._answers.get(("jobs", queue, name, finished),
                                   lambda: self._collect_jobs(queue, name, finished), force)
        return {**answer, "jobs": [job for job in answer["jobs"] if has_state(job, states)]}

    def _find_rights(self, user: str) -> Rights:
        associations: List[Dict[str, Any]] = []
        with contextlib.suppress(EdgeError):      # queues can be told without accounting
            associations = self._answers.get(
                ("allocations", user), lambda: self._collect_allocations(user),
                longest=QUEUES_PATIENCE_S)["allocations"]
        return Rights(user, _groups_of(user), associations)


def _matches(job: Dict[str, Any], queue: Optional[str], user: str) -> bool:
    """Whether a job is in a queue (a pending one may be in several) and of a user."""
    return (queue is None or queue in str(job["partition"]).split(",")) and \
        user in (EVERYONE, job["user"])


def describe_allocation(jobs: List[Dict[str, Any]], who: str) -> Dict[str, Any]:
    """Return what QueueInfo.job_allocation() does, of the job's record. Raises Unavailable."""
    if not jobs or not jobs[0]["nodes"]:
        raise Unavailable(f"{who} does not know the job's nodes")
    job, nodes, limit = jobs[0], jobs[0]["nodes"], jobs[0]["time_limit"]
    return {"job_id": job["job_id"], "partition": job["partition"], "n_nodes": nodes,
            "nodelist": job["node_list"], "cpus_per_node": (job["cpus"] or 0) // nodes,
            "gpus_per_node": job["gpus"] // nodes, "account": job["account"],
            "job_name": job["job_name"], "runtime": None if limit == UNLIMITED else limit}


def scheduler_error(program: str, ran: Ran) -> EdgeError:
    """Return the error for a program that failed, in its own words."""
    words = " ".join(ran.error.split()) or " ".join(ran.output[:1000].split())
    prefix = "" if words.startswith(program.split()[0]) else f"{program}: "
    detail = prefix + (words[:500] or f"exit status {ran.code}")
    away = re.search(r"unable to contact|connect|communicat|timed out|not respond", words, re.I)
    return Unavailable(detail) if away else BadGateway(detail)


def _parse_document(program: str, text: str, *sections: str) -> Dict[str, Any]:
    """Return the JSON object that a program printed. Raises BadGateway for anything else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not any(section in document for section in sections):
        raise BadGateway(f"{program} did not print the JSON that was asked for, but "
                         f"{text[:80]!r}")
    return document


class QueueInfoSlurm(QueueInfo):
    """Asks Slurm, 21.08 or later: by `--json` where its programs have it, else by their text.

    slurm_conf: the path of a slurm.conf, to ask another cluster than the machine's own.
    """

    backend = "slurm"
    programs = ("sinfo", "squeue", "scontrol", "scancel")

    def __init__(self, slurm_conf: Optional[str] = None, ttl: float = QUEUES_TTL_S) -> None:
        super().__init__(ttl)
        self._slurm_conf = slurm_conf
        self._textual: Set[str] = set()           # programs without --json; only ever added to
        self._cluster: Optional[str] = None       # its name, once known; never changes

    def find_fault(self) -> Optional[str]:
        """Return why Slurm cannot be asked on this machine; None when it can."""
        if self._slurm_conf is not None and not os.access(self._slurm_conf, os.R_OK):
            return f"slurm_conf: {self._slurm_conf} cannot be read"
        fault = super().find_fault()
        if fault is not None:
            return fault
        try:
            ran = run_program(["sinfo", "--version"], VERSION_S, MAX_COMMAND_OUTPUT, self._env())
        except EdgeError as error:
            return error.detail
        return None if ran.code == 0 else scheduler_error("sinfo --version", ran).detail

    @staticmethod
    def get_job_nodes(native_id: Any, env: Optional[Dict[str, str]] = None) -> List[str]:
        """Return the names of the nodes on which a job runs; [] when that cannot be found out.

        env: the environment for squeue, with SLURM_CONF perhaps; the process' own by default.
        """
        try:
            job_id = check_job_id(native_id)
            ran = run_program(["squeue", "-h", "-o", "%N", "-j", job_id], SCHEDULER_S,
                              MAX_SCHEDULER_OUTPUT, slurm_environment(env))
            return list(dict.fromkeys(host for line in ran.output.splitlines()
                                      for host in expand_hostlist(line.strip())))
        except (EdgeError, ValueError):
            return []

    def job_allocation(self) -> Optional[Dict[str, Any]]:
        job_id = os.environ.get("SLURM_JOB_ID")
        if not job_id or self._is_elsewhere():
            return None
        if not _JOB_ID.fullmatch(job_id):
            raise Unavailable(f"SLURM_JOB_ID is {job_id[:40]!r}, which is no job's id")
        return describe_allocation(self._squeue_text("-t", "all", "-j", job_id),
                                   f"SLURM_JOB_ID is {job_id}, but squeue")

    # -- inside

    def _collect_info(self) -> Dict[str, Any]:
        # partitions by text: it is the same in all versions, and JSON lacks which is the default
        queues = parse_partitions_text(self._ask("scontrol", "-a", "-o", "show",
                                                 "partition").output)
        document = self._ask_json("sinfo", "--all", "-N", sections=("sinfo", "nodes"))
        if document is not None:
            return {"queues": _queues(queues, parse_sinfo(document))}
        ran = self._ask("sinfo", "--all", "-h", "-N", "-o", SINFO_FORMAT)
        return {"queues": _queues(queues, parse_sinfo_text(ran.output))}

    def _collect_jobs(self, queue: Optional[str], user: str, finished: bool) -> Dict[str, Any]:
        narrowed = ["-t", "all"] if finished else []
        narrowed += ["-p", queue] if queue is not None else []
        narrowed += ["--user", user] if user != EVERYONE else []
        document = self._ask_json("squeue", "--all", *narrowed, sections=("jobs",))
        jobs = self._squeue_text("--all", *narrowed) if document is None else \
            parse_squeue(document, time.time())
        return {"jobs": [job for job in jobs if _matches(job, queue, user)]}

    def _squeue_text(self, *arguments: str) -> List[Dict[str, Any]]:
        marker = secrets.token_hex(16)
        ran = self._ask("squeue", "-h", *arguments, "-o", f"{marker}|{SQUEUE_FORMAT}")
        return parse_squeue_text(ran.output, marker)

    def _collect_allocations(self, user: str) -> Dict[str, Any]:
        narrowed = [f"cluster={self._find_cluster()}"]
        narrowed += [f"user={user}"] if user != EVERYONE else []
        command = ("show", "assoc", "where", *narrowed)
        try:
            document = self._ask_json("sacctmgr", *command, sections=("associations",))
            if document is not None:
                return {"allocations": parse_associations(document)}
            columns = f"format={','.join(SACCTMGR_COLUMNS)}"
            ran = self._ask("sacctmgr", "-P", "-n", *command, columns)
            return {"allocations": parse_associations_text(ran.output)}
        except NotInstalled:
            return {"allocations": []}            # a site without accounting
        except BadGateway as error:
            if "accounting_storage" not in error.detail:
                raise
            return {"allocations": []}

    def _cancel(self, job_id: str) -> None:
        ran = self._run("scancel", "-v", re.sub(r"%\d+", "", job_id), env=self._env())
        words = [line for line in ran.error.splitlines() if "error" in line]
        problem = scheduler_error("scancel", Ran(ran.code, "", "\n".join(words)))
        for pattern, error in (("Invalid job id", NotFound), ("denied", Forbidden),
                               ("already completing or completed", Conflict)):
            if any(pattern in line for line in words):
                raise error(problem.detail)
        if words or ran.code != 0:                # scancel's exit status is 0 for unknown jobs
            raise problem

    def _find_cluster(self) -> str:
        """Return the cluster's name: a database may hold the associations of several."""
        if self._cluster is None:
            ran = self._ask("scontrol", "show", "config")
            found = re.search(r"^ClusterName\s*=\s*([\w.-]+)\s*$", ran.output, re.MULTILINE)
            if found is None:
                raise BadGateway("scontrol show config: no ClusterName")
            self._cluster = found[1]
        return self._cluster

    def _is_elsewhere(self) -> bool:
        """Whether the allocation of this process is one of another cluster than this."""
        here = os.environ.get("SLURM_CLUSTER_NAME")
        return self._slurm_conf is not None and here is not None and \
            here.lower() != self._find_cluster().lower()

    def _ask(self, program: str, *arguments: str) -> Ran:
        """Return what a program printed. Raises EdgeError when it failed."""
        ran = self._run(program, *arguments, env=self._env())
        if "Invalid user" in ran.error:
            raise Unprocessable(f"user: {' '.join(ran.error.split())[:200]}")
        if ran.code != 0:
            raise scheduler_error(program, ran)
        return ran

    def _ask_json(self, program: str, *arguments: str,
                  sections: Tuple[str, ...]) -> Optional[Dict[str, Any]]:
        """Return what a program printed as JSON; None where it has none, or too much of it."""
        if program in self._textual:
            return None
        try:
            ran = self._ask(program, "--json", *arguments)
        except TooMuchOutput as error:
            log_queues.info("%s: text will be asked for", error.detail)
            if program == "sinfo":                # a large cluster does not become a small one
                self._textual.add(program)
            return None
        except BadGateway as error:
            if not re.search(r"unrecogni[sz]ed option|invalid option|json|serializ", error.detail):
                raise
            log_queues.info("%s has no --json: text will be asked for", program)
            self._textual.add(program)
            return None
        document = _parse_document(f"{program} --json", ran.output, *sections)
        if document.get("errors"):                # 22.05 has the exit status 0 even then
            words = [str(error.get(name)) for error in document["errors"]
                     for name in ("source", "description", "error") if error.get(name)]
            raise Unavailable(f"{program}: {': '.join(words)}"[:500])
        return document

    def _env(self) -> Dict[str, str]:
        return slurm_environment(None, self._slurm_conf)


def slurm_environment(env: Optional[Dict[str, str]] = None,
                      slurm_conf: Optional[str] = None) -> Dict[str, str]:
    """Return an environment in which Slurm's programs print what the parsers expect.

    The user's own defaults for them (SQUEUE_FORMAT and the like) would change that.
    """
    changing = ("SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_", "SLURM_JSON", "SLURM_YAML")
    made = {name: value for name, value in (os.environ if env is None else env).items()
            if not name.startswith(changing) and name not in _SECRET_VARIABLES}
    made.update(SLURM_TIME_FORMAT="%s", SLURM_BITSTR_LEN="0", SLURM_JSON="compact")
    if slurm_conf is not None:
        made["SLURM_CONF"] = slurm_conf
        made.pop("SLURM_CLUSTERS", None)
    return made


class QueueInfoPBS(QueueInfo):
    """Asks PBS Pro or OpenPBS, by `-F json` where that can be read, else by text."""

    backend = "pbs"
    programs = ("qstat", "pbsnodes", "qdel")

    def __init__(self, ttl: float = QUEUES_TTL_S) -> None:
        super().__init__(ttl)
        self._no_history = False                  # `qstat -x` is refused; only ever set

    def job_allocation(self) -> Optional[Dict[str, Any]]:
        job_id = os.environ.get("PBS_JOBID")
        if not job_id:
            return None
        entries = self._entries("Jobs", "qstat", "-f", check_job_id(job_id))
        return describe_allocation(parse_pbs_jobs(entries, time.time()),
                                   f"PBS_JOBID is {job_id}, but qstat")

    def _collect_info(self) -> Dict[str, Any]:
        queues = self._entries("Queue", "qstat", "-Q", "-f")
        return {"queues": parse_pbs_queues(queues, self._entries("nodes", "pbsnodes", "-a"))}

    def _collect_jobs(self, queue: Optional[str], user: str, finished: bool) -> Dict[str, Any]:
        where = [queue] if queue is not None else []
        history = ["-x"] if finished and not self._no_history else []
        try:
            entries = self._entries("Jobs", "qstat", "-f", *history, *where)
        except BadGateway as error:
            if "history" not in error.detail or not history:
                raise
            self._no_history = True
            entries = self._entries("Jobs", "qstat", "-f", *where)
        jobs = parse_pbs_jobs(entries, time.time())
        return {"jobs": [job for job in jobs if _matches(job, queue, user)]}

    def _collect_allocations(self, user: str) -> Dict[str, Any]:
        if find_program("sbank-list-allocations") is None:
            return {"allocations": []}            # PBS has none of its own
        narrowed = ["-u", user] if user != EVERYONE else []
        ran = self._ask("sbank-list-allocations", *narrowed)
        return {"allocations": parse_sbank(ran.output)}

    def _cancel(self, job_id: str) -> None:
        ran = self._run("qdel", job_id, env=_clean_environment())
        if ran.code == 0:
            return
        problem = scheduler_error("qdel", ran)
        for pattern, error in (("Unknown Job", NotFound), ("Unauthorized", Forbidden),
                               ("finished|invalid for state", Conflict)):
            if re.search(pattern, ran.error):
                raise error(problem.detail)
        raise problem

    def _entries(self, section: str, program: str, *arguments: str) -> PbsEntries:
        """Return what a program prints of queues, nodes or jobs.

        JSON of PBS is not always JSON: values that users made up are not escaped by old versions.
        """
        options, names = self._split(arguments)
        try:
            ran = self._ask(program, *options, "-F", "json", *names)
            if not ran.output.strip():
                return {}
            return parse_pbs_json(_parse_document(program, ran.output, section, "timestamp"),
                                  section)
        except BadGateway as error:
            if "history" in error.detail:
                raise
        text = self._ask(program, *options, *names).output
        entries = parse_pbs_text(text)
        if text.strip() and not entries:
            raise BadGateway(f"{program} printed nothing that could be read: {text[:80]!r}")
        return entries

    @staticmethod
    def _split(arguments: Tuple[str, ...]) -> Tuple[List[str], List[str]]:
        return ([item for item in arguments if item.startswith("-")],
                [item for item in arguments if not item.startswith("-")])

    def _ask(self, program: str, *arguments: str) -> Ran:
        ran = self._run(program, *arguments, env=_clean_environment())
        if "Unknown queue" in ran.error:
            raise NotFound(" ".join(ran.error.split())[:200])
        if ran.code != 0:
            raise scheduler_error(program, ran)
        return ran


def find_queue_info(slurm_conf: Optional[str] = None) -> Optional[QueueInfo]:
    """Return the backend for this machine's batch system; None when it has none that is known."""
    if slurm_conf is not None or find_program("squeue"):
        return QueueInfoSlurm(slurm_conf)
    return QueueInfoPBS() if find_program("qstat") else None


def parse_clusters(text: str) -> Dict[str, str]:
    """Return {instance name: path of its slurm.conf} of "name=path", by lines or commas.

    Raises Unprocessable. Lines that begin with # are left out.
    """
    found = {}
    for item in re.split(r"[,\n]", re.sub(r"(?m)^\s*#.*$", "", text)):
        name, equals, path = (part.strip() for part in item.partition("="))
        if not item.strip():
            continue
        if not equals or not path.startswith("/") or not is_valid_name(name):
            raise Unprocessable(f"clusters: {item.strip()[:80]!r} is not NAME=/path/to/slurm.conf")
        found[name] = path
    return found


def read_clusters() -> Dict[str, str]:
    """Return parse_clusters() of RADICAL_QUEUE_CLUSTERS, or of ~/.radical/edge/clusters."""
    text = os.environ.get("RADICAL_QUEUE_CLUSTERS")
    return parse_clusters(_read(str(home_dir() / "clusters")) if text is None else text)


class QueueInfoSession(PluginSession):
    """A session that asks the backend, which all sessions of a plugin share."""

    def __init__(self, sid: str, backend: QueueInfo) -> None:
        super().__init__(sid)
        self._backend = backend

    async def get_info(self, user: Optional[str] = None, force: bool = False) -> Dict[str, Any]:
        """Return what QueueInfo.get_info() does."""
        return await self._ask(self._backend.get_info, user, force)

    async def list_jobs(self, queue: str, user: Optional[str] = None, force: bool = False,
                        state: Optional[str] = None) -> Dict[str, Any]:
        """Return what QueueInfo.list_jobs() does."""
        return await self._ask(self._backend.list_jobs, queue, user, force, state)

    async def list_all_jobs(self, user: Optional[str] = None, force: bool = False,
                            state: Optional[str] = None) -> Dict[str, Any]:
        """Return what QueueInfo.list_all_jobs() does."""
        return await self._ask(self._backend.list_all_jobs, user, force, state)

    async def list_allocations(self, user: Optional[str] = None,
                               force: bool = False) -> Dict[str, Any]:
        """Return what QueueInfo.list_allocations() does."""
        return await self._ask(self._backend.list_allocations, user, force)

    async def cancel_job(self, job_id: str) -> Dict[str, Any]:
        """Return what QueueInfo.cancel_job() does."""
        return await self._ask(self._backend.cancel_job, job_id)

    async def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        self._check_active()
        return await self._backend.workers.call(function, *args)


def is_of_old_edge(error: EdgeError) -> bool:
    """Whether an edge of radical.edge 0.2 says that it lacks a route, which ours have."""
    return error.status == 404 and error.detail.startswith("No route: ")


class QueueInfoClient(PluginClient):
    """A program's access to an edge's batch system. Units and shapes: see QueueInfo."""

    def get_info(self, user: Optional[str] = None, force: bool = False) -> Dict[str, Any]:
        """Return {"queues": {name: {...}}}; user: None is the edge's, "*" sees all queues."""
        return self._get(f"get_info/{self._require_session()}", user=user, force=_flag(force))

    def list_jobs(self, queue: str, user: Optional[str] = None, force: bool = False,
                  state: Optional[str] = None) -> Dict[str, Any]:
        """Return {"jobs": [...]} of a queue. state: "PENDING,HELD", "ALL"; None: all that live."""
        path = f"list_jobs/{self._require_session()}/{urllib.parse.quote(queue, safe='')}"
        return self._get(path, user=user, force=_flag(force), state=state)

    def list_all_jobs(self, user: Optional[str] = None, force: bool = False,
                      state: Optional[str] = None) -> Dict[str, Any]:
        """Return {"jobs": [...]} of all queues."""
        return self._get(f"list_all_jobs/{self._require_session()}", user=user,
                         force=_flag(force), state=state)

    def list_allocations(self, user: Optional[str] = None, force: bool = False) -> Dict[str, Any]:
        """Return {"allocations": [...]}: accounts and limits."""
        return self._get(f"list_allocations/{self._require_session()}", user=user,
                         force=_flag(force))

    def cancel_job(self, job_id: str) -> Dict[str, Any]:
        """Cancel a job; return {"job_id", "status": "canceled"}. Raises EdgeError: 403, 404..."""
        path = f"cancel/{self._require_session()}/{urllib.parse.quote(str(job_id), safe='')}"
        return self._post(path)

    def is_enabled(self) -> bool:
        """Whether the edge's machine has a batch system that works. Needs no session."""
        try:
            return self._get("is_enabled")["available"]
        except NotFound as error:
            if not is_of_old_edge(error):
                raise
            return self.backend() != "none"

    def backend(self) -> str:
        """Return "slurm", "pbs" or "none". Needs no session."""
        return self._get("backend")["backend"]

    def job_allocation(self) -> Optional[Dict[str, Any]]:
        """Return the allocation within which the edge runs, None outside of one. No session."""
        return self._get("job_allocation")["allocation"]

    def nodelist(self) -> List[str]:
        """Return the names of that allocation's nodes, [] outside of one. Needs no session."""
        return self._get("nodelist")["nodelist"]


def _flag(value: bool) -> Optional[str]:
    return "true" if value else None


class PluginQueueInfo(Plugin):
    """Tells of a batch system's queues, jobs and allocations, and cancels jobs.

    There is an instance named queue_info for the machine's own cluster, and one for each other
    cluster that read_clusters() names. slurm_conf: instead of what it says.
    """

    plugin_name = "queue_info"
    session_class = QueueInfoSession
    client_class = QueueInfoClient
    version = "0.0.1"
    ui_config = {
        "icon": "📋", "title": "Queue Info",
        "description": "Inspect Slurm partitions, jobs and allocations.",
        "refresh_button": True,
        "monitors": [{"id": "partitions", "title": "Partitions / Queues", "type": "table",
                      "css_class": "queueinfo-content", "auto_load": "get_info/{sid}"}]}

    def __init__(self, app: Any, instance_name: str = "queue_info",
                 slurm_conf: Optional[str] = None) -> None:
        super().__init__(app, instance_name)
        conf = read_clusters().get(instance_name) if slurm_conf is None else slurm_conf
        self._backend = find_queue_info(conf)
        for route, handler in (
                ("is_enabled", self.is_enabled_endpoint), ("backend", self.backend_endpoint),
                ("job_allocation", self.job_allocation_endpoint),
                ("allocation", self.job_allocation_endpoint), ("nodelist", self.nodelist_endpoint),
                ("get_info/{sid}", self.get_info), ("list_jobs/{sid}/{queue}", self.list_jobs),
                ("list_all_jobs/{sid}", self.list_all_jobs),
                ("list_allocations/{sid}", self.list_allocations)):
            self.add_route_get(route, handler)
        self.add_route_post("cancel/{sid}/{job_id}", self.cancel_job)

    @classmethod
    def instance_names(cls) -> List[str]:
        return list(dict.fromkeys([cls.plugin_name, *read_clusters()]))

    def is_enabled(self) -> bool:
        """Return whether there is a batch system whose programs work."""
        if self._backend is None:
            self.why_disabled = "neither Slurm (squeue) nor PBS (qstat) is found on PATH"
            return False
        fault = self._backend.find_fault()
        if fault is not None:
            self.why_disabled = f"{self._backend.backend}: {fault}"
        return fault is None

    async def start(self) -> None:
        if self._backend is not None:
            self._backend.start_prefetch()

    async def stop(self) -> None:
        if self._backend is not None:
            self._backend.stop()

    def _create_session(self, sid: str) -> PluginSession:
        if self._backend is None:
            raise NotInstalled("there is no batch system on this machine")
        return QueueInfoSession(sid, self._backend)

    def get_job_allocation(self) -> Optional[Dict[str, Any]]:
        """Return what QueueInfo.job_allocation() does. Blocks."""
        return self._backend.job_allocation() if self._backend is not None else None

    def get_nodelist(self) -> List[str]:
        """Return the names of the nodes of that allocation, [] outside of one. Blocks."""
        allocation = self.get_job_allocation() or {}
        try:
            return expand_hostlist(allocation.get("nodelist") or "")
        except ValueError as error:
            raise BadGateway(f"nodelist: {error}") from None

    async def is_enabled_endpoint(self, request: Request) -> Any:
        """Answer {"available"}: whether the batch system's programs work now."""
        return {"available": self._backend is not None and
                await self._backend.workers.call(self.is_enabled)}

    async def backend_endpoint(self, request: Request) -> Any:
        """Answer {"backend": "slurm" | "pbs" | "none"}."""
        return {"backend": self._backend.backend if self._backend is not None else "none"}

    async def job_allocation_endpoint(self, request: Request) -> Any:
        """Answer {"allocation"}: the one within which the edge runs, or null."""
        return {"allocation": self._backend and
                await self._backend.workers.call(self._backend.job_allocation)}

    async def nodelist_endpoint(self, request: Request) -> Any:
        """Answer {"nodelist"}: the names of that allocation's nodes, [] outside of one."""
        return {"nodelist": await self._backend.workers.call(self.get_nodelist)}

    async def get_info(self, request: Request) -> Any:
        """Answer the queues. ?user=&force="""
        return await self._forward(request.path_params["sid"], QueueInfoSession.get_info,
                                   *_user_and_force(request))

    async def list_jobs(self, request: Request) -> Any:
        """Answer the jobs of a queue. ?user=&force=&state="""
        return await self._forward(request.path_params["sid"], QueueInfoSession.list_jobs,
                                   request.path_params["queue"], *_user_and_force(request),
                                   request.query_params.get("state"))

    async def list_all_jobs(self, request: Request) -> Any:
        """Answer the jobs of all queues. ?user=&force=&state="""
        return await self._forward(request.path_params["sid"], QueueInfoSession.list_all_jobs,
                                   *_user_and_force(request), request.query_params.get("state"))

    async def list_allocations(self, request: Request) -> Any:
        """Answer accounts and limits. ?user=&force="""
        return await self._forward(request.path_params["sid"], QueueInfoSession.list_allocations,
                                   *_user_and_force(request))

    async def cancel_job(self, request: Request) -> Any:
        """Cancel a job; answer {"job_id", "status"}."""
        note_for_audit(job=request.path_params["job_id"])
        return await self._forward(request.path_params["sid"], QueueInfoSession.cancel_job,
                                   request.path_params["job_id"])


def _user_and_force(request: Request) -> Tuple[Optional[str], bool]:
    return request.query_params.get("user") or None, request.query_bool("force")


# ---------------------------------------------------------------------------
# 3. tunnels: how an edge that an edge started on a compute node reaches the bridge. What a child
#    is; the ssh of a reverse tunnel; the relay, with a loop of its own; and the watchers of all
#    three. The child's own side is in radical_edge.py, section 12.
# ---------------------------------------------------------------------------

log_tunnels = logging.getLogger("radical_edge.tunnels")

GRACE_S = 5.0                  # between SIGTERM and SIGKILL
SSH_START_S = 45.0             # until ssh must have opened its port
SSH_BACKOFF_S = (1.0, 60.0)    # first and longest pause before ssh is started again
SSH_FAILURES = 3               # in a row: the tunnel is then reported as failed, and tried on
WATCH_S = 0.25                 # jobs and ssh processes are looked at so often
CHILD_TOKEN_S = 30 * 86400     # a child's token lives so long; its watcher renews it every day
RENEW_S = 86400.0
ADMISSION_S = 10.0             # a relay's peer proves within so long that it is the child
MAX_STRANGERS = 64             # connections of one relay that have not proved it yet
MAX_RELAYED = 16               # connections of one relay that have
RELAY_PIECE = 256 * 1024       # bytes moved at once
HALF_CLOSED_S = 15.0           # one direction of a relayed connection outlives the other so long
KEEP_TUNNELS_S = 7 * 86400     # what became of a tunnel is known so long

# what edges of radical.edge 0.x were started with: it stands for the parent's own Python and file
CHILD_EXECUTABLES = frozenset(("radical-edge-wrapper.sh", "radical-edge-service.sh",
                               "radical-edge-service", "radical-edge"))
_CHILD_OPTIONS = {"-n": "name", "--name": "name", "--url": "url", "--tunnel-via": "via",
                  "--tunnel": "tunnel"}


def process_started(pid: int) -> int:
    """Return when a process was started, in clock ticks; 0 where that cannot be known."""
    try:
        return int(_read(f"/proc/{pid}/stat", 4096).rpartition(")")[2].split()[19])
    except (ValueError, IndexError):
        return 0


def is_same_process(pid: Optional[int], started: Optional[int]) -> bool:
    """Whether the process lives and is the one that was started then: numbers are used again."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False                              # somebody else's: the number was used again
    state = _read(f"/proc/{pid}/stat", 4096).rpartition(")")[2].split()[:1]
    return process_started(pid) == (started or 0) and state != ["Z"]


# -- what is to be started

class Child(NamedTuple):
    """An edge to be started as a job: its name, how it gets to which bridge, and its job_spec."""
    edge_name: str
    mode: str
    url: str
    via: Optional[str]
    spec: Dict[str, Any]


def parse_tunnel_mode(value: Any) -> str:
    """Return "none", "reverse", "forward" or "relay"; true and false, as 0.x has them, are taken.

    Raises Unprocessable.
    """
    if value is None or isinstance(value, bool):
        return "reverse" if value else "none"
    if value not in TUNNEL_MODES:
        raise Unprocessable("tunnel: must be true, false, 'none', 'reverse', 'forward' or 'relay'")
    return value


def parse_child_arguments(arguments: List[str]) -> Dict[str, str]:
    """Return what a child's arguments say of "name", "url", "via" and "tunnel"."""
    found, rest = {}, collections.deque(arguments)
    while rest:
        option, sign, value = rest.popleft().partition("=")
        if re.match("-n[^=]", option):            # "-nNAME"
            option, sign, value = "-n", "=", option[2:] + sign + value
        name = _CHILD_OPTIONS.get(option)
        if name == "tunnel" and not sign:
            value = rest.popleft() if rest and rest[0] in TUNNEL_MODES else "reverse"
        elif name is not None and not sign:
            value = rest.popleft() if rest else ""
        if name is not None:
            found[name] = value
    return found


def make_child(spec: Any, tunnel: Any, uplink: Uplink) -> Child:
    """Return the child that a job_spec describes, with the job_spec that starts it.

    Raises Unprocessable, which names the field, for what cannot become an edge or reach a bridge.
    """
    mode = parse_tunnel_mode(tunnel)
    arguments = spec.get("arguments") if isinstance(spec, dict) else None
    if not isinstance(arguments, list) or not all(isinstance(item, str) for item in arguments):
        raise Unprocessable("job_spec.arguments: must be a list with -n or --name and the name of "
                            "the edge to start")
    said = parse_child_arguments(arguments)
    for flag in ("--policy", "--client-key"):
        if any(item.partition("=")[0] == flag for item in arguments):
            raise Unprocessable(f"job_spec.arguments: {flag} is not for clients to say: an edge "
                                "that this one starts has the rules of this one")
    name, via = said.get("name"), said.get("via")
    if not is_valid_name(name) or name in RESERVED_NAMES:
        raise Unprocessable("job_spec.arguments: must have -n or --name and a name of 1 to 64 "
                            "letters, digits, '.', '_' or '-' for the edge to start")
    if via is not None and not is_ssh_host(via):
        raise Unprocessable("job_spec.arguments: --tunnel-via must be a host, or user@host")
    if said.get("tunnel", mode) != mode:
        raise Unprocessable(f"job_spec.arguments: --tunnel {said['tunnel']} is not what the field "
                            f"tunnel says, {mode!r}")
    target = _find_target(said.get("url"), mode, uplink)
    made = _make_child_spec(spec, arguments, mode, "tunnel" in said)
    given = made.get("environment")
    if given is None or isinstance(given, dict):  # otherwise parse_job_spec() says what it must be
        made["environment"] = {**_child_environment(target, name), **(given or {}),
                               **uplink.inherited()}
    return Child(name, mode, str(target.url), via, made)


def _find_target(url: Optional[str], mode: str, uplink: Uplink) -> Target:
    """Return the bridge for a child: of several, the first. Raises Unprocessable."""
    try:
        text = url.split(",") if url else uplink.urls[:1]
        if mode in ("reverse", "relay") and len(text) > 1:
            raise ValueError(f"a {mode} tunnel leads to one bridge: give one --url")
        target = uplink.find(text[0])
    except ValueError as error:
        raise Unprocessable(f"job_spec.arguments: {error}") from None
    insecure = os.environ.get("RADICAL_BRIDGE_INSECURE") == "1"
    if mode == "relay" and not target.url.tls and not insecure:
        raise Unprocessable("tunnel: relay would carry the token unencrypted over the internal "
                            "network: it needs a bridge with TLS, or --insecure")
    if mode in ("reverse", "forward") and not uplink.is_direct(target.url):
        raise Unprocessable(f"tunnel: {mode} cannot be used here, for this edge reaches the bridge "
                            "through a proxy or tunnel of its own: take 'relay'")
    return target


def _make_child_spec(spec: Dict[str, Any], arguments: List[str], mode: str,
                     has_mode: bool) -> Dict[str, Any]:
    flags = [] if mode == "none" or has_mode else \
        ["--tunnel"] if mode == "reverse" else ["--tunnel", mode]
    executable = spec.get("executable")
    if executable in (None, "") or isinstance(executable, str) and executable in CHILD_EXECUTABLES:
        return {**spec, "executable": sys.executable,
                "arguments": [str(Path(radical_edge.__file__).resolve()), "--edge",
                              *[item for item in arguments if item != "--edge"], *flags]}
    return {**spec, "arguments": [*arguments, *flags]}


def _child_environment(target: Target, edge_name: str) -> Dict[str, str]:
    """Return the variables from which a child knows its bridge. The token is in a file."""
    values = {"RADICAL_BRIDGE_URL": str(target.url)}
    if target.token:
        values["RADICAL_BRIDGE_TOKEN_FILE"] = str(tunnels_dir() / f"{edge_name}.token")
    if target.cert:
        is_pin = target.cert.lower().startswith("sha256:")
        values["RADICAL_BRIDGE_CERT"] = target.cert if is_pin else os.path.abspath(target.cert)
    if os.environ.get("RADICAL_BRIDGE_INSECURE") == "1":
        values["RADICAL_BRIDGE_INSECURE"] = "1"
    return values


# -- reverse: ssh from here to the compute node

def parse_allocated_port(text: str) -> Optional[int]:
    """Return the port that `ssh -R 0` says it was given; None before it says so."""
    match = re.search(r"^Allocated port ([0-9]{1,5}) for remote forward", text, re.MULTILINE)
    return int(match[1]) if match else None


class ReverseSSH:
    """One `ssh -R` to a compute node. It outlives the edge; the next one takes it over.

    log_path: where ssh writes what it says; also the mark by which its process is known.
    """

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._process: Optional["subprocess.Popen[bytes]"] = None    # None: taken over
        self.pid: Optional[int] = None
        self.started: Optional[int] = None        # with the pid it names a process for good

    def adopt(self, pid: Optional[int], started: Optional[int]) -> bool:
        """Take over the process of an earlier edge, if it still lives; end any other. Blocks."""
        lives = is_same_process(pid, started)
        # others: the edge was killed before it wrote this down
        _send_signal([other for other in self._find() if other != pid or not lives], signal.SIGKILL)
        self.pid, self.started = (pid, started) if lives else (None, None)
        return lives

    def start(self, node: str, url: BridgeURL) -> None:
        """Start ssh. Blocks. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._log_path.unlink()
        self._log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._process = subprocess.Popen(
            ["ssh", *SSH_OPTIONS, "-E", str(self._log_path), "-R",
             f"127.0.0.1:0:{forward_option(url)}", "--", node],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd="/", env=_clean_environment())
        self.pid, self.started = self._process.pid, process_started(self._process.pid)

    def is_alive(self) -> bool:
        """Whether ssh still runs."""
        if self._process is not None and self._process.poll() is not None:
            return False
        return is_same_process(self.pid, self.started)

    def read_port(self) -> Optional[int]:
        """Return the port at which ssh listens on the node; None before it does."""
        return parse_allocated_port(_read(str(self._log_path)))

    def read_reason(self) -> str:
        """Return ssh's last words."""
        lines = [line.strip() for line in _read(str(self._log_path)).splitlines() if line.strip()]
        return "; ".join(lines[-3:])[-500:] or "it said nothing"

    def stop(self) -> None:
        """End ssh. Blocks for GRACE_S and KILLED_S at the most."""
        begin = time.monotonic()
        while self.pid is not None and self.is_alive():
            waited = time.monotonic() - begin
            if waited > GRACE_S + KILLED_S:       # it hangs in the kernel, on a dead file system
                log_tunnels.error("ssh, process %d, cannot be ended", self.pid)
                break
            _send_signal([self.pid], signal.SIGKILL if waited > GRACE_S else signal.SIGTERM)
            time.sleep(0.05)
        self.pid = self.started = None

    def _find(self) -> List[int]:
        """Return the pids of our ssh processes with this log file."""
        mark = b"\0-E\0" + os.fsencode(str(self._log_path)) + b"\0"
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.stat().st_uid == os.geteuid() and mark in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:                       # it has just ended
                continue
        return found


# -- relay: this process listens on the internal network

def internal_addresses(via: Optional[str] = None) -> List[str]:
    """Return the addresses at which compute nodes may find this host. Blocks (name look-up).

    Those of `via` if that is given; else all private ones (RFC 1918 and the like), or what the
    host's own name stands for. Never the loopback, unless `via` says so.
    """
    if via is None:
        import ipaddress
        names = [name for _, name in socket.if_nameindex()]
        found = [address for address in map(_ipv4_address, names) if address and
                 ipaddress.ip_address(address).is_private and _is_reachable(address)]
        if found:
            return found
    host = via.rpartition("@")[2] if via else socket.gethostname()
    try:
        known = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = list(dict.fromkeys(item[4][0] for item in known))
    return addresses if via else [address for address in addresses if _is_reachable(address)]


def _is_reachable(address: str) -> bool:
    import ipaddress
    number = ipaddress.ip_address(address.partition("%")[0])
    return not (number.is_loopback or number.is_link_local or number.is_unspecified)


class _Relayed:
    """The relay for one child: whom to admit, where to lead it, where it listens."""

    def __init__(self, edge_name: str, url: BridgeURL, secret: str) -> None:
        self.edge_name, self.url, self.secret = edge_name, url, secret
        self.servers: List[asyncio.AbstractServer] = []
        self.strangers = self.admitted = 0        # open connections; the relay loop's
        self.tasks: Set["asyncio.Task[None]"] = set()


class Relay:
    """Forwards bytes between children and the bridge, for who knows a child's secret.

    It has a thread and a loop of its own, so that no plugin's work delays what passes through.
    Nothing is forwarded, and the bridge not even dialled, before the secret was proved. What passes
    is TLS between child and bridge, which is not looked into.
    """

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink
        self._thread: Optional[LoopThread] = None
        self._workers = Workers("relay", 8)       # for dialling
        self._relayed: Dict[str, _Relayed] = {}   # by edge name; the relay loop's

    async def open(self, edge_name: str, url: BridgeURL, secret: str, addresses: List[str],
                   port: int = 0) -> Tuple[int, List[str]]:
        """Listen for a child; return (port, the addresses that worked). Of another loop.

        port: the one to take if it is free. Raises Unavailable when no address works.
        """
        if self._thread is None:
            self._thread = LoopThread("relay").start()
        return await asyncio.wrap_future(self._thread.submit(
            self._listen(_Relayed(edge_name, url, secret), addresses, port)))

    async def close(self, edge_name: str) -> None:
        """Listen no more for a child, and end its connections. Of another loop."""
        if self._thread is not None:
            await asyncio.wrap_future(self._thread.submit(self._end(edge_name)))

    def stop(self) -> None:
        """End all. Blocks."""
        self._workers.stop()
        if self._thread is not None:
            self._thread.stop()

    # -- on the relay loop

    async def _listen(self, relayed: _Relayed, addresses: List[str],
                      port: int) -> Tuple[int, List[str]]:
        await self._end(relayed.edge_name)
        working: List[str] = []
        trouble = "this host has no internal address: give --tunnel-via HOST"
        for address in addresses:
            for number in dict.fromkeys((port, 0)) if not working else (port,):
                try:
                    server = await asyncio.start_server(
                        lambda reader, writer: self._on_connection(relayed, reader, writer),
                        address, number, limit=RELAY_PIECE)
                except OSError as error:
                    trouble = f"{address}: {error.strerror or error}"
                    continue
                port = server.sockets[0].getsockname()[1]
                relayed.servers.append(server)
                working.append(address)
                break
        if not working:
            raise Unavailable(f"the relay cannot listen: {trouble}")
        self._relayed[relayed.edge_name] = relayed
        return port, working

    async def _end(self, edge_name: str) -> None:
        relayed = self._relayed.pop(edge_name, None)
        if relayed is not None:
            for server in relayed.servers:
                server.close()
            for task in list(relayed.tasks):
                task.cancel()

    async def _on_connection(self, relayed: _Relayed, reader: asyncio.StreamReader,
                             writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        task = asyncio.current_task()
        relayed.tasks.add(task)
        try:
            if await self._admit(relayed, reader, writer):
                await self._lead(relayed, reader, writer)
            else:
                log_tunnels.warning("%s: relay: refused %s", relayed.edge_name, peer)
        except (OSError, EdgeError, ValueError, ProtocolError) as error:
            log_tunnels.warning("%s: relay: %s: %s", relayed.edge_name, peer, error)
        except asyncio.CancelledError:            # the child's job has ended, or we do
            pass
        finally:
            relayed.tasks.discard(task)
            writer.close()

    async def _admit(self, relayed: _Relayed, reader: asyncio.StreamReader,
                     writer: asyncio.StreamWriter) -> bool:
        """Return whether the peer knows the secret; it has ADMISSION_S to prove it."""
        if relayed.strangers >= MAX_STRANGERS:
            return False
        relayed.strangers += 1
        try:
            nonce = os.urandom(RELAY_NONCE)
            writer.write(nonce)
            answer = await asyncio.wait_for(reader.readexactly(RELAY_NONCE), ADMISSION_S)
        except (asyncio.IncompleteReadError, asyncio.TimeoutError):
            return False
        finally:
            relayed.strangers -= 1
        return hmac.compare_digest(answer, answer_relay(relayed.secret, nonce)) and \
            relayed.admitted < MAX_RELAYED

    async def _lead(self, relayed: _Relayed, reader: asyncio.StreamReader,
                    writer: asyncio.StreamWriter) -> None:
        relayed.admitted += 1
        try:
            try:
                sock = await self._workers.call(self._uplink.open_route, relayed.url)
            except Exception:
                writer.write(b"-")
                raise
            sock.setblocking(False)
            theirs = await asyncio.open_connection(sock=sock, limit=RELAY_PIECE)
            writer.write(b"+")
            await _join_streams((reader, writer), theirs)
        finally:
            relayed.admitted -= 1


async def _join_streams(one: Tuple[asyncio.StreamReader, asyncio.StreamWriter],
                        other: Tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Move bytes both ways until both have ended, or one did HALF_CLOSED_S ago."""
    for _, writer in (one, other):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pumps = [asyncio.ensure_future(_pump(one[0], other[1])),
             asyncio.ensure_future(_pump(other[0], one[1]))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(pumps, timeout=HALF_CLOSED_S)
    finally:
        for pump in pumps:
            pump.cancel()
        other[1].close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Move bytes one way, no faster than they are taken, until the end."""
    with contextlib.suppress(OSError, asyncio.CancelledError):
        while True:
            data = await reader.read(RELAY_PIECE)
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


# -- the watchers

@dataclasses.dataclass
class TunnelRecord:
    """A child and the state of its tunnel: what is kept on disk. The plugin's loop owns it."""
    edge_name: str
    mode: str
    url: str
    via: Optional[str]
    sid: str
    job_id: str
    secret: str                                   # that admits the child to a relay
    status: str = "pending"
    error: Optional[str] = None
    port: Optional[int] = None
    pid: Optional[int] = None                     # of ssh, on `host`
    pid_started: Optional[int] = None
    host: str = ""
    was_active: bool = False
    ended: bool = False                           # nothing more will be done about it
    time: float = 0.0                             # of the last change, seconds since the epoch

    def encode(self) -> str:
        """Return the JSON text from which decode() makes the record again."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Optional["TunnelRecord"]:
        """Return the record of encode(); None for anything else."""
        values = _json_object(text)
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            record = cls(**{name: value for name, value in values.items() if name in known})
            parse_bridge_url(record.url)
        except (TypeError, ValueError, AttributeError):
            return None
        is_good = is_valid_name(record.edge_name) and record.mode in TUNNEL_MODES
        return record if is_good else None

    def describe(self) -> Dict[str, Any]:
        """Return what tunnel_status answers."""
        return {"edge_name": self.edge_name, "status": self.status, "mode": self.mode,
                "port": self.port if self.status == "active" else None,
                "pid": None if self.ended else self.pid, "error": self.error,
                "job_id": self.job_id}


class Tunnels:
    """The children of this edge and their tunnels: one watcher each, on the plugin's loop.

    folder: of the records, so that an edge that was killed goes on. find_job(job_id) returns the
    Job, or None; find_node(job) the host to which a reverse tunnel leads. on_change(described) is
    called for each new status.
    """

    def __init__(self, folder: Path, uplink: Uplink, find_job: Callable[[str], Any],
                 find_node: Callable[[Any], Any],
                 on_change: Callable[[Dict[str, Any]], None]) -> None:
        self._folder, self._uplink, self._find_job = folder, uplink, find_job
        self._find_node, self._on_change = find_node, on_change
        self._relay = Relay(uplink)
        self._records: Dict[str, TunnelRecord] = {}              # by edge name
        self._live: Set[str] = set()              # names of those being submitted or watched
        self._watchers: Dict[str, "asyncio.Task[None]"] = {}     # by edge name
        self._online: Set[str] = set()            # names of the edges that are connected

    async def open(self) -> None:
        """Go on with what an earlier process has begun."""
        for record in await asyncio.to_thread(self._load):
            self._records[record.edge_name] = record
            if not record.ended:
                self.watch(record.edge_name)

    def close(self) -> None:
        """Stop watching. ssh goes on, as the jobs do: the next process takes it over."""
        for task in self._watchers.values():
            task.cancel()
        self._relay.stop()

    def describe(self, edge_name: str) -> Dict[str, Any]:
        """Return {"edge_name", "status", "mode", "port", "pid", "error", "job_id"}."""
        record = self._records.get(edge_name)
        if record is None:
            return {"edge_name": edge_name, "status": "no_tunnel", "mode": "none", "port": None,
                    "pid": None, "error": None, "job_id": None}
        return record.describe()

    def has_started(self, job_id: str) -> bool:
        """Whether a job is an edge that this one has started."""
        return any(record.job_id == job_id for record in self._records.values())

    def on_topology(self, names: Iterable[str]) -> None:
        """Take notice of which edges are connected."""
        self._online = set(names)

    async def prepare(self, child: Child, sid: str, job_id: str) -> None:
        """Write down a child that is about to be submitted. Raises Conflict for a live name."""
        known = self._records.get(child.edge_name)
        if child.edge_name in self._live:
            if known.job_id == job_id:
                return                            # the same submission, sent again
            raise Conflict(f"the edge {child.edge_name!r} has been started already, by the job "
                           f"{known.job_id}: cancel that, or take another name")
        record = TunnelRecord(child.edge_name, child.mode, child.url, child.via, sid, job_id,
                              secrets.token_hex(32), time=time.time(),
                              status="no_tunnel" if child.mode == "none" else "pending")
        self._records[child.edge_name] = record
        self._live.add(child.edge_name)
        try:
            await asyncio.to_thread(self._prepare, record)
        except BaseException as error:
            self._drop(record)
            if isinstance(error, ValueError):     # the edge's token is good for itself alone
                raise Unprocessable(f"tunnel: {error}") from None
            raise

    async def abandon(self, edge_name: str) -> None:
        """Forget a child whose job was refused."""
        record = self._records[edge_name]
        self._drop(record)
        await asyncio.to_thread(self._clean, record)
        await asyncio.to_thread(self._unlink, self._path(record))

    def watch(self, edge_name: str) -> None:
        """Open the child's tunnel once its job runs, and keep it up until the job ends."""
        record = self._records.get(edge_name)
        if record is not None and not record.ended and edge_name not in self._watchers:
            self._live.add(edge_name)
            self._watchers[edge_name] = asyncio.ensure_future(self._watch(record))

    # -- one child

    async def _watch(self, record: TunnelRecord) -> None:
        keeper = {"none": self._keep_nothing, "reverse": self._keep_ssh,
                  "forward": self._keep_forward, "relay": self._keep_relay}[record.mode]
        renewing = asyncio.ensure_future(self._renew_token(record))
        try:
            while self._state(record) not in ("ACTIVE", None) and not self._has_ended(record):
                await asyncio.sleep(WATCH_S)      # as long as the queue takes
            await keeper(record)                  # also if it has ended: there may be an old ssh
            await self._finish(record)
        except Exception as error:                # ours; what it says is all that can be known
            log_tunnels.exception("%s: watcher failed", record.edge_name)
            await self._set(record, "failed", error=f"the watcher failed: {error}", ended=True)
        finally:                                  # cancelled: the next process goes on
            renewing.cancel()
            self._live.discard(record.edge_name)
            self._watchers.pop(record.edge_name, None)

    def _state(self, record: TunnelRecord) -> Optional[str]:
        job = self._find_job(record.job_id)
        return job.state if job is not None else None

    def _has_ended(self, record: TunnelRecord) -> bool:
        job = self._find_job(record.job_id)
        return job is None or job.is_over

    async def _keep_nothing(self, record: TunnelRecord) -> None:
        while not self._has_ended(record):
            await asyncio.sleep(WATCH_S)

    async def _keep_forward(self, record: TunnelRecord) -> None:
        """The child's own ssh is out of sight: its tunnel is up when the child is connected."""
        while not self._has_ended(record):
            online = record.edge_name in self._online
            await self._set(record, "active" if online else "pending")
            await asyncio.sleep(WATCH_S)

    async def _keep_relay(self, record: TunnelRecord) -> None:
        pause = SSH_BACKOFF_S[0]
        url = parse_bridge_url(record.url)
        while not self._has_ended(record):
            addresses = await asyncio.to_thread(internal_addresses, record.via)
            try:
                port, hosts = await self._relay.open(record.edge_name, url, record.secret,
                                                     addresses, record.port or 0)
            except Unavailable as error:
                await self._set(record, "failed", error=error.detail)
                pause = await self._pause(record, pause)
                continue
            await self._offer(record, PortFile(port, record.secret, tuple(hosts[:8])))
            await self._keep_nothing(record)
        await self._relay.close(record.edge_name)

    async def _keep_ssh(self, record: TunnelRecord) -> None:
        ssh = ReverseSSH(self._folder / f"{record.edge_name}.ssh")
        here = record.host == os.uname().nodename
        alive = await asyncio.to_thread(ssh.adopt, record.pid if here else None,
                                        record.pid_started)
        failures, pause = 0, SSH_BACKOFF_S[0]
        while not self._has_ended(record):
            try:
                if not alive:
                    await self._start_ssh(record, ssh)
                await self._follow_ssh(record, ssh)
                failures, pause = 0, SSH_BACKOFF_S[0]
            except (OSError, EdgeError) as error:
                failures += 1
                await self._report_ssh(record, str(error), failures)
            alive = False
            await self._end_ssh(record, ssh)
            pause = await self._pause(record, pause)
        await self._end_ssh(record, ssh)

    async def _end_ssh(self, record: TunnelRecord, ssh: ReverseSSH) -> None:
        await asyncio.to_thread(ssh.stop)
        record.pid = record.pid_started = None
        await asyncio.to_thread(self._unlink, _port_path(record))

    async def _start_ssh(self, record: TunnelRecord, ssh: ReverseSSH) -> None:
        node = await self._find_node(self._find_job(record.job_id))
        if not is_ssh_host(node):
            raise Unavailable(f"the job runs on {node!r}, which is no host name")
        await asyncio.to_thread(ssh.start, node, parse_bridge_url(record.url))
        record.pid, record.pid_started = ssh.pid, ssh.started
        record.host = os.uname().nodename
        await self._store(record)                 # before it is of use: the next edge must find it

    async def _follow_ssh(self, record: TunnelRecord, ssh: ReverseSSH) -> None:
        """Return when the job has ended, or ssh after it had worked. Raises Unavailable if not."""
        end = time.monotonic() + SSH_START_S
        port = None
        while ssh.is_alive() and not self._has_ended(record):
            if port is None:
                port = await asyncio.to_thread(ssh.read_port)
                if port is not None:
                    await self._offer(record, PortFile(port))
                elif time.monotonic() > end:
                    break
            await asyncio.sleep(WATCH_S)
        if not self._has_ended(record):
            reason = await asyncio.to_thread(ssh.read_reason)
            if port is None:
                raise Unavailable(f"ssh: {reason}")
            log_tunnels.warning("%s: ssh ended and is started again: %s", record.edge_name, reason)
            await self._set(record, "pending", error=f"ssh ended: {reason}")

    async def _report_ssh(self, record: TunnelRecord, reason: str, failures: int) -> None:
        log_tunnels.warning("%s: no tunnel yet: %s", record.edge_name, reason)
        await self._set(record, "failed" if failures >= SSH_FAILURES else "pending", error=reason)

    async def _pause(self, record: TunnelRecord, pause: float) -> float:
        """Wait, but not beyond the job's end; return how long to wait next time."""
        end = time.monotonic() + pause * random.uniform(0.5, 1.5)
        while time.monotonic() < end and not self._has_ended(record):
            await asyncio.sleep(WATCH_S)
        return min(2 * pause, SSH_BACKOFF_S[1])

    async def _offer(self, record: TunnelRecord, content: PortFile) -> None:
        """Tell the child where its tunnel is."""
        await asyncio.to_thread(write_private, _port_path(record), encode_port_file(content))
        record.port = content.port
        await self._set(record, "active")
        await self._store(record)

    async def _finish(self, record: TunnelRecord) -> None:
        """Take notice of the job's end."""
        job = self._find_job(record.job_id)
        await asyncio.to_thread(self._clean, record)
        if record.mode == "none":
            await self._set(record, "no_tunnel", ended=True)
        elif record.was_active or job is not None and job.state == "CANCELED":
            await self._set(record, "done", ended=True)
        elif job is None:
            await self._set(record, "failed", ended=True, error="its job is not known: the edge "
                            "was killed before it was submitted, or the session was closed")
        else:
            text = f"the job ended before the tunnel was up: it is {job.state}"
            code = f", exit code {job.exit_code}" if job.exit_code is not None else ""
            more = f" ({job.message})" if job.message else ""
            await self._set(record, "failed", ended=True, error=text + code + more)

    async def _set(self, record: TunnelRecord, status: str, *, error: Optional[str] = None,
                   ended: bool = False) -> None:
        if (record.status, record.error) == (status, error) and not ended:
            return
        record.status, record.error, record.time = status, error, time.time()
        record.was_active = record.was_active or status == "active"
        record.ended = ended
        await self._store(record)
        self._on_change(record.describe())

    # -- files

    def _path(self, record: TunnelRecord) -> Path:
        return self._folder / f"{record.edge_name}.json"

    async def _store(self, record: TunnelRecord) -> None:
        try:
            await asyncio.to_thread(write_private, self._path(record), record.encode())
        except OSError as error:                  # true all the same, until the edge is killed
            log_tunnels.error("%s: cannot be written: %s", self._path(record), error)

    def _load(self) -> List[TunnelRecord]:
        found = []
        for path in sorted(self._folder.glob("*.json")):
            record = TunnelRecord.decode(_read(str(path)))
            if record is None:
                log_tunnels.error("%s cannot be read", path)
            elif record.ended and record.time < time.time() - KEEP_TUNNELS_S:
                self._unlink(path)
            else:
                found.append(record)
        return found

    def _prepare(self, record: TunnelRecord) -> None:
        """Write the record and the child's token; delete what an earlier child left. Blocks."""
        self._unlink(_port_path(record))
        self._write_token(record)
        write_private(self._path(record), record.encode())

    def _write_token(self, record: TunnelRecord) -> None:
        token = self._uplink.find(record.url).token
        if token:
            made = make_child_token(token, record.edge_name, int(time.time() + CHILD_TOKEN_S))
            write_private(tunnels_dir() / f"{record.edge_name}.token", made + "\n")

    async def _renew_token(self, record: TunnelRecord) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await asyncio.to_thread(self._write_token, record)
            except (OSError, ValueError, EdgeError) as error:    # the old one is good for weeks
                log_tunnels.error("%s: its token cannot be renewed: %s", record.edge_name, error)

    def _clean(self, record: TunnelRecord) -> None:
        self._unlink(_port_path(record))
        self._unlink(tunnels_dir() / f"{record.edge_name}.token")
        self._unlink(self._folder / f"{record.edge_name}.ssh")

    def _drop(self, record: TunnelRecord) -> None:
        self._records.pop(record.edge_name, None)
        self._live.discard(record.edge_name)

    @staticmethod
    def _unlink(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _port_path(record: TunnelRecord) -> Path:
    return tunnels_dir() / f"{record.edge_name}.port"


# ---------------------------------------------------------------------------
# 4. psij: jobs. First what a job is, then the local executor and its supervisors, then the batch
#    systems through psij-python, then session, client and plugin.
# ---------------------------------------------------------------------------

log_psij = logging.getLogger("radical_edge.psij")

START_S = 5.0                  # a job that takes longer to start is QUEUED when submit answers
POLL_S = 0.25                  # jobs of an earlier edge process are looked at so often
MAX_TAIL = 4096                # bytes of output in a notification
MAX_READ = 1024 * 1024         # bytes of output in one answer
MAX_DURATION_S = 10 * 366 * 86400     # of a job; much more than that, the system's calls refuse
KEEP_JOBS_S = 7 * 86400        # finished jobs whose session is gone are kept so long

FINAL_STATES = frozenset(("COMPLETED", "FAILED", "CANCELED"))
ENDED_STATES = FINAL_STATES | {"UNKNOWN"}        # nothing more will be heard of it, as it seems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


_KINDS: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    "text": ("a string", _is_text),
    "texts": ("a list of strings",
              lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "count": ("a whole number of 1 or more", _is_count),
    "seconds": (f"a number of seconds above 0, at most {MAX_DURATION_S}",
                lambda value: _is_number(value) and 0 < value <= MAX_DURATION_S),
    "environment": ("an object of strings and numbers", lambda value: isinstance(value, dict) and
                    all(_is_text(key) and key and "=" not in key and
                        (_is_text(item) or _is_number(item)) for key, item in value.items())),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "number": ("a number", _is_number),
}
_SPEC_FIELDS = {
    "executable": "text", "arguments": "texts", "directory": "text", "name": "text",
    "inherit_environment": "flag", "environment": "environment", "stdin_path": "text",
    "stdout_path": "text", "stderr_path": "text", "resources": "object", "attributes": "object",
    "custom_attributes": "object", "pre_launch": "text", "post_launch": "text", "launcher": "text"}
_RESOURCE_FIELDS = {
    "node_count": "count", "process_count": "count", "processes_per_node": "count",
    "cpu_cores_per_process": "count", "gpu_cores_per_process": "count",
    "exclusive_node_use": "flag", "memory": "count"}
_ATTRIBUTE_FIELDS = {
    "duration": "seconds", "queue_name": "text", "account": "text", "project_name": "text",
    "reservation_id": "text", "node_count": "count", "custom_attributes": "object"}


def parse_job_spec(value: Any) -> Dict[str, Any]:
    """Return a job description, checked and with nothing but what the caller set.

    Raises Unprocessable, which names the field. Empty strings and nulls, as forms send them, count
    as not set. attributes.node_count and the top-level custom_attributes, which older clients send,
    are moved to where they belong.
    """
    spec = _check_fields(value, _SPEC_FIELDS, "job_spec", "")
    if not spec.get("executable"):
        raise Unprocessable("executable: name the program to run")
    spec["resources"] = _check_fields(spec.get("resources", {}), _RESOURCE_FIELDS, "resources",
                                      "resources.")
    spec["attributes"] = attributes = _check_fields(spec.get("attributes", {}), _ATTRIBUTE_FIELDS,
                                                    "attributes", "attributes.")
    nodes = attributes.pop("node_count", None)
    if nodes is not None and spec["resources"].setdefault("node_count", nodes) != nodes:
        raise Unprocessable("attributes.node_count: differs from resources.node_count")
    custom = {**attributes.pop("custom_attributes", {}), **spec.pop("custom_attributes", {})}
    if custom:
        attributes["custom_attributes"] = custom
    return spec


def _check_fields(value: Any, fields: Dict[str, str], whole: str, prefix: str) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise Unprocessable(f"{whole}: must be an object")
    for name, item in value.items():
        if name not in fields:
            raise Unprocessable(f"{prefix}{name}: there is no such field; there are: "
                                f"{', '.join(sorted(fields))}")
        kind, check = _KINDS[fields[name]]
        if item not in (None, "") and not check(item):
            raise Unprocessable(f"{prefix}{name}: must be {kind}")
    return {name: item for name, item in value.items() if item not in (None, "", {}, [])
            or name == "arguments" and item == []}


class Job:
    """A job and what is known of it. The plugin's loop owns it."""

    def __init__(self, job_id: str, sid: str, executor: str, spec: Dict[str, Any],
                 folder: Path) -> None:
        self.job_id, self.sid, self.executor, self.spec = job_id, sid, executor, spec
        self.folder = folder                      # where all that is kept of it lies
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.native_id: Optional[str] = None
        self.state = "NEW"
        self.message: Optional[str] = None
        self.exit_code: Optional[int] = None
        self.time = time.time()                   # of the last change, seconds since the epoch
        self.note: Optional[str] = None           # what is to be said of it while it lives
        self.submitted = self.time                # to a batch system
        self.unsure_until = 0.0                   # it may still turn up there; epoch
        self.gone = False                         # it runs no more, whatever its state says
        self.on_change: Callable[["Job"], None] = lambda job: None
        self.settling = asyncio.Lock()            # held by who finds out whether it was submitted
        self.begun = asyncio.Event()              # set once it runs, or could not
        self.ended = asyncio.Event()

    @property
    def is_final(self) -> bool:
        """Whether the state will not change any more."""
        return self.state in FINAL_STATES

    @property
    def is_over(self) -> bool:
        """Whether it runs no more, though perhaps nobody knows how it ended."""
        return self.is_final or self.gone

    def update(self, state: str, *, message: Optional[str] = None, exit_code: Optional[int] = None,
               when: Optional[float] = None) -> bool:
        """Take a new state, unless there is a final one already; return whether it was taken."""
        if self.is_final or state == self.state:
            return False
        self.state, self.message, self.exit_code = state, message, exit_code
        self.time = when or time.time()
        if state not in ("NEW", "QUEUED"):
            self.begun.set()
        if self.is_final:
            self.ended.set()
        self.on_change(self)
        return True

    def describe(self) -> Dict[str, Any]:
        """Return what list_jobs says of the job."""
        attributes, resources = self.spec["attributes"], self.spec["resources"]
        return {"job_id": self.job_id, "native_id": self.native_id, "state": self.state,
                "exit_code": self.exit_code, "executable": self.spec["executable"],
                "arguments": self.spec.get("arguments", []), "executor": self.executor,
                "queue_name": attributes.get("queue_name"), "account": attributes.get("account"),
                "node_count": resources.get("node_count"), "name": self.spec.get("name"),
                "message": self.message or self.note, "time": self.time}

    def describe_whole(self) -> Dict[str, Any]:
        """Return what status says of the job, without its output."""
        return {**self.describe(), "directory": self.spec.get("directory"),
                "duration": self.spec["attributes"].get("duration"),
                "finished": self.state in ENDED_STATES}


def read_output(path: Path, offset: int, *, complete: bool,
                limit: int = MAX_READ) -> Tuple[str, int, bool]:
    """Return (text, next offset in bytes, whether that was all) of a job's output. Blocks.

    Reading on from the returned offset gives every byte once. A UTF-8 character that is not all
    there yet is left for the next time; at the end of a complete output it becomes U+FFFD, as other
    wrong bytes do. An offset beyond the end gives "" and the offset back; so does what is no file,
    which jobs may name as well as one: a pipe or a terminal might never give anything.
    """
    try:
        with _open_output(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), limit, offset) if offset < size else b""
    except OSError:
        return "", offset, complete
    at_end = complete and len(data) < limit
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(data, final=at_end)
    return text, offset + len(data) - len(decoder.getstate()[0]), at_end


def read_tail(path: Path, limit: int = MAX_TAIL) -> str:
    """Return the last `limit` bytes of a file, from the begin of a character on. Blocks."""
    try:
        with _open_output(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError:
        return ""
    if size > limit:
        data = data.lstrip(bytes(range(0x80, 0xC0)))    # continuation bytes: half a character
    return data.decode(errors="replace")


def _open_output(path: Union[str, Path]) -> Any:
    """Return a regular file, open to be read. Raises OSError, also for anything else."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


# -- the local executor

# The program that runs one job, as `python -I -S supervise.py DIRECTORY`. It outlives the edge:
# it has a session of its own, and keeps nothing of the edge open but its end of a pipe. It needs
# little more memory than a shell, and unlike a shell it knows its job's group, times and signals.
_SUPERVISOR = r'''
import errno, json, os, select, signal, sys, time

os.chdir(sys.argv[1])
PROC = "/proc/%d/stat"

def started(pid):
    """When a process was started, in clock ticks; 0 where that cannot be known."""
    try:
        with open(PROC % pid) as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0

def write(path, value):
    text = json.dumps(value)
    with open(path + ".new", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)

def report(final=False, **status):
    status["time"] = time.time()
    try:
        os.write(1, json.dumps(status).encode() + b"\n")     # to the edge, if it still lives
    except OSError:
        pass
    while True:
        try:
            return write("status.json", status)
        except OSError as error:                  # the disk is full; the end must not be lost
            if not final or error.errno == errno.ENOENT:         # the job was forgotten meanwhile
                return
            time.sleep(1)

def signal_group(number):
    try:
        os.killpg(child, number)
        return True
    except OSError:
        return False                              # nobody is left

def group_lives():
    """Whether a process of the group still runs; zombies, which init has yet to reap, do not."""
    if not signal_group(0):
        return False
    found = False
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        try:
            with open("/proc/%s/stat" % name) as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if len(fields) > 2 and fields[2] == str(child):
            found = True
            if fields[0] not in "ZX":
                return True
    return not found and not os.path.isdir("/proc/self")

def run_job():
    """In the child: become the job. Returns an error's number and text when that fails."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        what = job["directory"]
        os.chdir(what)
        what = job["stdin"]
        os.dup2(os.open(what, os.O_RDONLY), 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        what = job["stdout"]
        os.dup2(os.open(what, flags, 0o600), 1)
        if job["stderr"] == job["stdout"]:
            os.dup2(1, 2)
        else:
            what = job["stderr"]
            os.dup2(os.open(what, flags, 0o600), 2)
        what = job["command"][0]
        os.execvpe(what, job["command"], job["environment"])
    except OSError as error:
        return error.errno, "%s: %s" % (what, error.strerror)
    except ValueError as error:
        return 22, "%s: %s" % (what, error)

# only one process runs the job, whatever becomes of the edge meanwhile
with open("job.json") as file:
    job = json.load(file)["run"]
def make_claim(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        me = [os.getpid(), started(os.getpid()), os.uname()[1]]
        os.write(descriptor, json.dumps(me).encode())
        os.fsync(descriptor)
    except OSError:                               # the disk is full: it is not begun
        os.unlink(path)
        raise
    os.close(descriptor)

own = "claim.%d" % os.getpid()
try:
    make_claim(own)
    os.link(own, "claim")                         # whole, or not at all
    os.unlink(own)
except FileExistsError:
    os.unlink(own)
    sys.exit("the job was claimed before")
except OSError as error:
    if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
        raise
    os.unlink(own)
    make_claim("claim")                           # a file system without hard links

asked = []
woken, wake = os.pipe()
os.set_blocking(wake, False)
os.set_blocking(woken, False)
signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
signal.signal(signal.SIGTERM, lambda *_: asked.append("canceled"))
signal.signal(signal.SIGCHLD, lambda *_: None)
failed_r, failed_w = os.pipe()                    # closed by a successful exec
child = os.fork()
if child == 0:
    number, text = run_job()
    os.write(failed_w, json.dumps([number, text]).encode())
    os._exit(127)
os.close(failed_w)
with open(failed_r, "rb") as file:
    failure = file.read()
if failure:
    os.waitpid(child, 0)
    number, text = json.loads(failure.decode())
    report(True, state="FAILED", exit_code=126 if number == 13 else 127, message=text)
    sys.exit()

report(state="ACTIVE", pid=child, started=started(child))
begun = time.monotonic()
reason = message = killed = None
exit_code = None
while exit_code is None:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        exit_code = os.waitstatus_to_exitcode(status) if hasattr(os, "waitstatus_to_exitcode") \
            else os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        break
    now = time.monotonic()
    if reason is None and asked:
        reason, killed = "CANCELED", now + job["grace"]
        signal_group(signal.SIGTERM)
    elif reason is None and job["duration"] and now - begun >= job["duration"]:
        reason, killed = "FAILED", now + job["grace"]
        message = "the walltime of %g s was over" % job["duration"]
        signal_group(signal.SIGTERM)
    elif killed is not None and now >= killed:
        signal_group(signal.SIGKILL)
        killed = now + 1
    due = [time_at - now for time_at in
           (killed, begun + job["duration"] if job["duration"] and reason is None else None)
           if time_at is not None]
    select.select([woken], [], [], max(0, min(due)) if due else None)
    try:
        os.read(woken, 4096)
    except OSError:
        pass

# what the job left running ends with it, as in a batch system; first politely
if signal_group(signal.SIGTERM):
    end = time.monotonic() + job["grace"]
    while group_lives() and time.monotonic() < end:
        time.sleep(0.02)
    signal_group(signal.SIGKILL)
code = 128 - exit_code if exit_code < 0 else exit_code
if reason is None:
    reason = "COMPLETED" if code == 0 else "FAILED"
    if exit_code < 0:
        message = "killed by signal %d" % -exit_code
report(True, state=reason, exit_code=None if reason == "CANCELED" else code, message=message)
'''


class LocalExecutor:
    """Runs jobs on this machine, each under a supervisor that outlives the edge.

    folder/<job_id>/ holds job.json (what to run, written first), claim (the supervisor's pid),
    status.json (its last word) and the output. All methods run on one loop.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = folder.parent / "supervise.py"
        self._loop = asyncio.get_running_loop()
        self.jobs: Dict[str, Job] = {}            # by job_id, of all sessions
        self._tasks: Dict[str, "asyncio.Task[None]"] = {}        # that follow a job, by job_id
        # by the file descriptor of the pipe on which a supervisor reports
        self._pipes: Dict[int, Tuple[Job, "subprocess.Popen[bytes]"]] = {}

    async def open(self) -> None:
        """Find the jobs of earlier processes."""
        for record, status in await asyncio.to_thread(self._load):
            job = Job(record["job_id"], record["sid"], "local", record["spec"],
                      self._folder / record["job_id"])
            job.stdout, job.stderr = Path(record["run"]["stdout"]), Path(record["run"]["stderr"])
            self.jobs[job.job_id] = job
            self._apply(job, status)
            if not job.is_final:
                self._tasks[job.job_id] = asyncio.ensure_future(self._watch(job))

    def close(self) -> None:
        """Stop watching; the jobs go on."""
        for task in self._tasks.values():
            task.cancel()
        for descriptor in list(self._pipes):
            self._drop_pipe(descriptor)

    async def submit(self, job: Job) -> None:
        """Start a job; return when it runs, or START_S later if that takes longer.

        Raises Unprocessable for what a local job cannot have, by name.
        """
        await asyncio.to_thread(self._prepare, job)
        try:
            descriptor, supervisor = await asyncio.to_thread(self._launch, job)
        except OSError as error:
            raise Unavailable(f"the job could not be started: {error}") from None
        self.jobs[job.job_id] = job
        job.update("QUEUED")
        self._pipes[descriptor] = job, supervisor
        self._loop.add_reader(descriptor, self._on_report, descriptor, bytearray())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(job.begun.wait(), START_S)
        if await self.never_ran(job):
            del self.jobs[job.job_id]
            raise Unavailable("the job could not be started: is there room on the disk for "
                              f"{self._folder}?")

    async def cancel(self, job: Job) -> None:
        """End a job's processes; return when it has ended. The supervisor decides the race."""
        pid, started, host = await asyncio.to_thread(_read_claim, job.folder)
        if job.state == "UNKNOWN":
            raise Conflict(f"the job was started on {host}: cancel it with an edge there")
        if is_same_process(pid, started):
            _send_signal([pid], signal.SIGTERM)
        else:
            await self._cancel_orphan(job)
        try:
            await asyncio.wait_for(job.ended.wait(), 2 * GRACE_S + 5)
        except asyncio.TimeoutError:
            raise Unavailable("the job was told to end and has not yet: look again") from None

    @staticmethod
    async def never_ran(job: Job) -> bool:
        """Whether the edge was killed before the job began: it may be started anew."""
        path = job.folder / "claim"               # empty: the edge's own, so that nobody begins it
        return job.is_final and await asyncio.to_thread(
            lambda: path.exists() and path.stat().st_size == 0)

    async def forget(self, job: Job) -> None:
        """Delete a finished job's directory."""
        if job.is_final and self.jobs.pop(job.job_id, None) is not None:
            await asyncio.to_thread(remove_folder, job.folder)

    # -- inside

    def _prepare(self, job: Job) -> None:
        """Write down what is to run, before it runs. Blocks."""
        run = make_local_run(job.spec, job.stdout, job.stderr)
        job.stdout, job.stderr = Path(run["stdout"]), Path(run["stderr"])
        remove_folder(job.folder)                 # of the same job, if it never ran
        job.folder.mkdir(parents=True, mode=0o700)
        write_private(job.folder / "job.json", json.dumps(
            {"job_id": job.job_id, "sid": job.sid, "spec": job.spec, "submitted": job.time,
             "run": run}))
        if not self._program.exists():
            write_private(self._program, _SUPERVISOR)

    def _launch(self, job: Job) -> Tuple[int, "subprocess.Popen[bytes]"]:
        """Start the supervisor; return the pipe on which it reports, and its process. Blocks."""
        receiver, sender = os.pipe()
        try:
            with open(job.folder / "supervisor.log", "wb") as trouble:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(self._program), str(job.folder)],
                    stdin=subprocess.DEVNULL, stdout=sender, stderr=trouble,
                    start_new_session=True, cwd="/", env=_clean_environment())
        except BaseException:
            os.close(receiver)
            raise
        finally:
            os.close(sender)
        os.set_blocking(receiver, False)
        return receiver, process

    def _on_report(self, descriptor: int, buffer: bytearray) -> None:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        job, supervisor = self._pipes[descriptor]
        buffer += data
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            self._apply(job, json.loads(line))
        if not data:                              # the supervisor has ended, or was killed
            self._drop_pipe(descriptor)
            self._tasks[job.job_id] = asyncio.ensure_future(self._reap(job, supervisor))

    def _drop_pipe(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        del self._pipes[descriptor]

    async def _reap(self, job: Job, supervisor: "subprocess.Popen[bytes]") -> None:
        await asyncio.to_thread(supervisor.wait)
        await self._watch(job)

    async def _watch(self, job: Job) -> None:
        """Follow a job whose supervisor reports to nobody, or is gone."""
        while not job.is_final:
            self._apply(job, await asyncio.to_thread(self._look, job.folder))
            await asyncio.sleep(POLL_S)
        self._tasks.pop(job.job_id, None)

    def _apply(self, job: Job, status: Dict[str, Any]) -> None:
        if status.get("pid"):
            job.native_id = str(status["pid"])
        job.update(status["state"], message=status.get("message"),
                   exit_code=status.get("exit_code"), when=status.get("time"))

    def _load(self) -> List[Tuple[Dict[str, Any], Dict[str, Any]]]:
        """Return (job.json, status) of every job on disk. Blocks."""
        found = []
        for path in sorted(self._folder.glob("*/job.json")):
            record = _json_object(_read(str(path)))
            if {"job_id", "sid", "spec", "run"} <= set(record):
                found.append((record, self._look(path.parent)))
            else:                                 # the edge was killed while it wrote this
                log_psij.error("%s cannot be read; its job did not run", path)
        return found

    def _look(self, folder: Path) -> Dict[str, Any]:
        """Return the truth about a job of which nobody reports. Blocks."""
        status = _read_status(folder)
        if status.get("state") in FINAL_STATES:
            return status
        pid, started, host = _read_claim(folder)
        if host != os.uname().nodename and pid is not None:      # a home that several hosts share
            return {"state": "UNKNOWN", "message": f"the job was started on {host}: an edge there "
                                                   "can tell"}
        if is_same_process(pid, started):
            return status or {"state": "QUEUED"}
        status = _read_status(folder)             # it may just have ended, in good order
        if status.get("state") in FINAL_STATES:
            return status
        if is_same_process(status.get("pid"), status.get("started")):
            return status
        if not status and self._claim(folder):
            message = "it did not run: the edge ended, or the disk was full, before it was started"
        else:
            message = "the job's supervisor was killed; the exit code is not known"
        return self._settle(folder, "FAILED", message)

    @staticmethod
    def _claim(folder: Path) -> bool:
        """Whether no supervisor has ever run the job; from now on none will."""
        try:
            os.close(os.open(folder / "claim", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return True
        except OSError:
            return False

    @staticmethod
    def _settle(folder: Path, state: str, message: str) -> Dict[str, Any]:
        """Write the final status that no supervisor is left to write."""
        if (folder / "canceled").exists():
            state, message = "CANCELED", "canceled after its supervisor was killed"
        status = {"state": state, "exit_code": None, "message": message, "time": time.time()}
        try:
            write_private(folder / "status.json", json.dumps(status))
        except OSError as error:                  # true all the same; the next edge finds it out
            log_psij.error("%s: the state cannot be written: %s", folder, error)
        return status

    async def _cancel_orphan(self, job: Job) -> None:
        """End a job whose supervisor was killed; _watch() sees its end, and the mark tells why."""
        status = await asyncio.to_thread(_read_status, job.folder)
        pid = status.get("pid")
        if not job.is_final and is_same_process(pid, status.get("started")):
            await asyncio.to_thread((job.folder / "canceled").touch)
            await _end_group(pid)


def _read_status(folder: Path) -> Dict[str, Any]:
    return _json_object(_read(str(folder / "status.json")))


def _read_claim(folder: Path) -> Tuple[Optional[int], Optional[int], str]:
    """Return the supervisor's (pid, start, host); (None, None, "") when it did not start."""
    try:
        pid, started, host = json.loads(_read(str(folder / "claim")))
        return int(pid), int(started), str(host)
    except (ValueError, TypeError):
        return None, None, ""


async def _end_group(pid: int) -> None:
    """End a process group: SIGTERM, time for its first process to obey, SIGKILL for the rest."""
    started = process_started(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):   # the latter: setuid programs
        os.killpg(pid, signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        while is_same_process(pid, started) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        os.killpg(pid, signal.SIGKILL)


def make_local_run(spec: Dict[str, Any], stdout: Path, stderr: Path) -> Dict[str, Any]:
    """Return what the supervisor needs to run a job: command, environment, paths, times.

    Raises Unprocessable for what a local job cannot have, by name. Nothing reaches a shell but the
    scripts of pre_launch and post_launch, which are sourced, as positional parameters.
    """
    _refuse_for_local(spec)
    directory = _existing(spec.get("directory", "~"), "directory", os.path.isdir)
    paths = {"stdin": spec.get("stdin_path", os.devnull),
             "stdout": spec.get("stdout_path", str(stdout)),
             "stderr": spec.get("stderr_path", str(stderr))}
    paths = {name: os.path.join(directory, os.path.expanduser(path))
             for name, path in paths.items()}
    _existing(paths["stdin"], "stdin_path", os.path.exists)
    if Path(paths["stdin"]).is_fifo():            # to open it waits for a writer, without end
        raise Unprocessable(f"stdin_path: {paths['stdin']!r} is a named pipe; give a file")
    for name in ("stdout", "stderr"):
        if f"{name}_path" in spec:
            _existing(os.path.dirname(paths[name]), f"{name}_path", os.path.isdir)
    inherited = _clean_environment() if spec.get("inherit_environment", True) else {}
    environment = {**inherited, **{key: str(value)
                                   for key, value in spec.get("environment", {}).items()}}
    return {"command": _local_command(spec, directory), "environment": environment,
            "directory": directory, **paths, "grace": GRACE_S,
            "duration": spec["attributes"].get("duration")}


def _refuse_for_local(spec: Dict[str, Any]) -> None:
    attributes, resources = spec["attributes"], spec["resources"]
    for name in ("queue_name", "account", "project_name", "reservation_id", "custom_attributes"):
        if name in attributes:
            raise Unprocessable(f"attributes.{name}: the local executor has no queues or accounts; "
                                "leave it out")
    for name, value in resources.items():
        if name in ("gpu_cores_per_process", "memory") or \
                name == "exclusive_node_use" and value or \
                name != "exclusive_node_use" and value != 1:
            raise Unprocessable(f"resources.{name}: the local executor runs one process on this "
                                "machine and sets no limits; leave it out")
    if spec.get("launcher", "single") != "single":
        raise Unprocessable("launcher: the local executor knows only 'single'")


def _existing(path: str, field: str, check: Callable[[str], bool]) -> str:
    full = os.path.abspath(os.path.expanduser(path))
    if not check(full):
        raise Unprocessable(f"{field}: {full!r} is not there")
    return full


def _local_command(spec: Dict[str, Any], directory: str) -> List[str]:
    executable = os.path.expanduser(spec["executable"])
    command = [executable, *spec.get("arguments", [])]
    scripts = [os.path.join(directory, os.path.expanduser(spec[name])) if name in spec else ""
               for name in ("pre_launch", "post_launch")]
    for name, path in zip(("pre_launch", "post_launch"), scripts):
        if path:
            _existing(path, name, os.path.isfile)
    if not any(scripts):
        return command
    text = ('set -e; if [ -n "$1" ]; then . "$1"; fi; post=$2; shift 2; set +e; "$@"; code=$?; '
            'set -e; if [ -n "$post" ]; then . "$post"; fi; exit $code')
    return ["/bin/sh", "-c", text, "radical-edge-job", *scripts, *command]


# -- batch systems: what their programs print

QUEUE_POLL_S = 5.0             # between two looks at a queue; psij-python's own default is 30
SOON_S = 1.0                   # after a job was submitted or cancelled
TROUBLE_S = 60.0               # longest pause after a look that failed
EXIT_CODE_S = 20.0             # a job's exit code may reach a shared file system so much later
GONE_S = 60.0                  # a job of which nobody knows anything for so long is UNKNOWN
UNSURE_S = 120.0               # after sbatch had to be killed, the job may still turn up
MAX_ARGUMENT_IDS = 500         # jobs named on one command line
MAX_ALONE = 50                 # jobs asked for one by one, when asking for all has failed
MAX_SUBMITTING = 4             # submissions at a time, and as many cancellations, and looks


class Verdict(NamedTuple):
    """What a batch system says of a job; `state` is one of ours, the others None if not said."""
    state: str
    message: Optional[str] = None
    exit_code: Optional[int] = None
    node: Optional[str] = None                    # the first one, where the script runs


# squeue(1), sacct(1): JOB STATE CODES
_SLURM_STATES = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
                     "RESV_DEL_HOLD", "SPECIAL_EXIT", "REVOKED"), "QUEUED"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
                     "RESIZING"), "ACTIVE"),
    **dict.fromkeys(("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE",
                     "PREEMPTED", "LAUNCH_FAILED", "RECONFIG_FAIL"), "FAILED"),
    "COMPLETED": "COMPLETED", "CANCELLED": "CANCELED"}
_SLURM_WORDS = {"TIMEOUT": "the walltime was over", "OUT_OF_MEMORY": "out of memory",
                "NODE_FAIL": "a node failed", "BOOT_FAIL": "a node did not boot",
                "DEADLINE": "the deadline was over", "PREEMPTED": "another job took its place"}
_PBS_JOB_STATES = {**dict.fromkeys("HMQTUWS", "QUEUED"), **dict.fromkeys("BER", "ACTIVE"),
               **dict.fromkeys("FX", "COMPLETED")}
_PBS_CANCELED = frozenset((265, 271))             # 256 and the signal of qdel: KILL or TERM
_LSF_STATES = {**dict.fromkeys(("PEND", "PROV", "PSUSP", "WAIT"), "QUEUED"),
               **dict.fromkeys(("RUN", "USUSP", "SSUSP", "UNKWN", "ZOMBI"), "ACTIVE"),
               "DONE": "COMPLETED", "EXIT": "FAILED"}


def _slurm_verdict(state: str, reason: str = "", code: str = "", node: str = "") -> Verdict:
    """Return the verdict of Slurm's words. state: also "CANCELLED by 1000". code: "3:0"."""
    word = state.split(" ")[0].rstrip("+")
    ours = _SLURM_STATES.get(word, "UNKNOWN")
    reason = "" if reason in ("None", "N/A", "(null)", "NonZeroExitCode") else reason
    match = re.fullmatch(r"([0-9]+):([0-9]+)", code)
    number = None if not match else 128 + int(match[2]) if match[2] != "0" else int(match[1])
    if ours == "FAILED" and number == 0:          # as after a timeout
        number = None
    message = reason or None
    if ours == "UNKNOWN":
        message = f"Slurm says {word[:40]}"
    elif ours == "FAILED" and word != "FAILED":
        message = f"{_SLURM_WORDS.get(word, 'it failed')} ({word})"
    return Verdict(ours, message, number if ours in ("FAILED", "COMPLETED") else None,
                   node if is_ssh_host(node) else None)


def parse_squeue_states(text: str) -> Dict[str, Verdict]:
    """Return {job id: verdict} of `squeue -h -o %A|%T|%B|%r`. Odd lines cost nobody else."""
    found = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 3)
        if len(fields) == 4 and re.fullmatch("[0-9]+", fields[0]):
            found[fields[0]] = _slurm_verdict(fields[1], fields[3], node=fields[2])
    return found


def parse_sacct(text: str) -> Dict[str, Verdict]:
    """Return {job id: verdict} of `sacct -n -P -X -o JobIDRaw,State,ExitCode`; the last counts."""
    found = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 3 and re.fullmatch("[0-9]+", fields[0]):
            found[fields[0]] = _slurm_verdict(fields[1], code=fields[2])
    return found


def parse_scontrol_job(text: str) -> Dict[str, Verdict]:
    """Return {job id: verdict} of `scontrol -o show job`."""
    found = {}
    for line in text.splitlines():
        values = dict(re.findall(r"(?:^|\s)(JobId|JobState|Reason|ExitCode|BatchHost)=(\S*)", line))
        if {"JobId", "JobState"} <= set(values):
            found[values["JobId"]] = _slurm_verdict(
                values["JobState"], values.get("Reason", ""), values.get("ExitCode", ""),
                values.get("BatchHost", ""))
    return found


def parse_qstat(text: str) -> Dict[str, Verdict]:
    """Return {job id: verdict} of `qstat -f -F json -x` of PBS Pro."""
    jobs = _json_object(text).get("Jobs")
    found = {}
    for job_id, job in jobs.items() if isinstance(jobs, dict) else ():
        if isinstance(job, dict) and isinstance(job.get("job_state"), str):
            found[job_id] = _pbs_verdict(job)
    return found


def _pbs_verdict(job: Dict[str, Any]) -> Verdict:
    state, code = _PBS_JOB_STATES.get(job["job_state"][:1], "UNKNOWN"), job.get("Exit_status")
    code = code if isinstance(code, int) else None
    message = job.get("comment") if isinstance(job.get("comment"), str) else None
    if state == "COMPLETED" and code is not None:
        state = "CANCELED" if code in _PBS_CANCELED else "COMPLETED" if code == 0 else "FAILED"
    node = str(job.get("exec_host", "")).partition("/")[0]
    return Verdict(state, message, code if state in ("COMPLETED", "FAILED") else None,
                   node if is_ssh_host(node) else None)


def parse_bjobs(text: str) -> Dict[str, Verdict]:
    """Return {job id: verdict} of `bjobs -json -o "JOBID STAT EXIT_REASON ..."` of LSF."""
    records = _json_object(text).get("RECORDS")
    found = {}
    for record in records if isinstance(records, list) else ():
        if isinstance(record, dict) and "JOBID" in record and "STAT" in record:
            reasons = [str(record[name]) for name in ("EXIT_REASON", "KILL_REASON",
                                                      "SUSPEND_REASON") if record.get(name)]
            killed = any("bkill" in reason.lower() or "owner" in reason.lower()
                         for reason in reasons) and record["STAT"] == "EXIT"
            state = "CANCELED" if killed else _LSF_STATES.get(str(record["STAT"]), "UNKNOWN")
            found[str(record["JOBID"])] = Verdict(state, "; ".join(reasons) or None)
    return found


def conclude(said: Optional[Verdict], exit_code: Optional[int],
             waited: float) -> Optional[Verdict]:
    """Return how a job has ended, by all that is known; None to look again later.

    said: what the batch system says of its end, None when it does not know the job. exit_code: what
    the job's own script wrote down. waited: seconds since it was first found to have ended.
    """
    if said is not None and said.state == "CANCELED":
        return said._replace(exit_code=None)
    if exit_code is not None:
        if exit_code == 0:
            return Verdict("COMPLETED", exit_code=0)
        message = said.message if said and said.state == "FAILED" else None
        return Verdict("FAILED", message, exit_code)
    if said is not None and said.state == "FAILED" and (
            said.exit_code is not None or said.message or waited >= EXIT_CODE_S):
        return said
    if said is not None and said.state == "COMPLETED" and said.exit_code == 0 and \
            waited >= EXIT_CODE_S:                # our script ends as the job did
        return said
    if waited < GONE_S:
        return None
    return Verdict("UNKNOWN", "the batch system has ended or forgotten the job, and there is no "
                              "exit code of it")


# -- batch systems: their programs

class SchedulerTrouble(Unavailable):
    """A batch system's program hangs, prints garbage or fails, which says nothing of any job."""


class SubmissionUnsure(Unavailable):
    """The program that submits had to be killed: the job may be there, or may come."""


def run_scheduler(command: List[str]) -> Ran:
    """Run a batch system's program, with bounds for time and memory. Blocks.

    Raises SchedulerTrouble when it is not there, takes more than SCHEDULER_S, or prints too much.
    """
    try:
        return run_program(command, SCHEDULER_S, MAX_SCHEDULER_OUTPUT, _clean_environment())
    except EdgeError as error:
        raise SchedulerTrouble(error.detail) from None


# -- batch systems: the scripts that psij-python writes

_DIRECTIVE = re.compile(r'^(#(?:SBATCH|PBS|BSUB|COBALT) -{1,2}[A-Za-z0-9_-]+[= ])"(.*)"$')
_EXIT_CODE_LINE = re.compile(r'^echo "\$\?" > "(.*)/(\$\w+)\.ec"$', re.MULTILINE)
_REDIRECT_LINE = re.compile(r'^exec &>> "', re.MULTILINE)


def repair_script(text: str, job_id: str, *, has_duration: bool = True) -> str:
    """Return a submit script of psij-python's as it should be.

    Directives are quoted once, not twice, and True stands for a directive without a value. The
    exit code appears at once and whole, and is the script's own too, so that the batch system's
    accounting has it. A file JOB_ID.id tells under which number the job was started.
    """
    lines = [_repair_directive(line) for line in text.split("\n")]
    if not has_duration:                          # LSF's template cannot do without
        lines = [line for line in lines if not line.startswith("#BSUB -W ")]
    text = "\n".join(lines)
    match = _EXIT_CODE_LINE.search(text)
    if match is None:
        return text
    folder, number = match[1], match[2]
    ended = (f'_psij_ec=$?\necho "$_psij_ec" > "{folder}/{number}.ec.new"\n'
             f'mv "{folder}/{number}.ec.new" "{folder}/{number}.ec"\nexit $_psij_ec')
    text = text[:match.start()] + ended + text[match.end():]
    begun = f'echo "{number}" > "{folder}/{job_id}.id"\n'
    return _REDIRECT_LINE.sub(lambda found: begun + found[0], text, count=1)


def _repair_directive(line: str) -> str:
    match = _DIRECTIVE.match(line)
    if match is None:
        return line
    words = shlex.split(match[2]) if match[2].startswith("'") else [match[2]]
    if words == ["True"]:
        return match[1].rstrip("= ")
    return f'{match[1]}"{words[0] if words else ""}"'


# what may be in a directive: it is within double quotes there, and never reaches a shell
_DIRECTIVE_TEXT = re.compile(r'[^"\\`$\x00-\x1f\x7f]{1,1024}')
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9@%+=:,./_-]{1,1024}")       # what no quoting changes
_PATH_TEXT = re.compile(r"[A-Za-z0-9@%+=:,./_~-]{1,4096}")       # the launcher does not quote paths


def check_batch_spec(spec: Dict[str, Any], name: str) -> None:
    """Raise Unprocessable, with the field's name, for what would not reach the job as it is."""
    attributes = spec["attributes"]
    pattern = _DIRECTIVE_TEXT if name == "slurm" else _PLAIN_TEXT
    wrong = "may have no quotes, '$', backslashes or control characters" if name == "slurm" else \
        "may have only letters, digits and @%+=:,./_-"
    for field in ("queue_name", "account", "project_name", "reservation_id"):
        if field in attributes and not pattern.fullmatch(attributes[field]):
            raise Unprocessable(f"attributes.{field}: {wrong}")
    for key, value in attributes.get("custom_attributes", {}).items():
        scheduler, dot, option = key.partition(".")
        if not dot or not re.fullmatch("[A-Za-z0-9_-]{1,64}", option):
            raise Unprocessable(f"custom_attributes.{key[:80]}: must be SCHEDULER.OPTION, such as "
                                "slurm.qos or pbs.l")
        if not isinstance(value, (str, int, float)) or not pattern.fullmatch(str(value)):
            raise Unprocessable(f"custom_attributes.{key}: must be true or false, a number or a "
                                f"string, and {wrong}")
    for key in spec.get("environment", {}):
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
            raise Unprocessable(f"environment.{key[:80]}: a batch job's variables have letters, "
                                "digits and '_'")
    for field in ("directory", "stdin_path", "stdout_path", "stderr_path", "pre_launch",
                  "post_launch"):
        if field in spec and not _PATH_TEXT.fullmatch(spec[field]):
            raise Unprocessable(f"{field}: a batch job's paths have only letters, digits and "
                                "@%+=:,./_~-")
    if name.startswith("pbs"):
        _refuse_for_pbs(spec)


def _refuse_for_pbs(spec: Dict[str, Any]) -> None:
    for field in {"gpu_cores_per_process", "cpu_cores_per_process"} & set(spec["resources"]):
        raise Unprocessable(f"resources.{field}: psij-python drops it for PBS; ask for it with "
                            "the custom attribute pbs.l")


def resolve_batch_paths(spec: Dict[str, Any]) -> Dict[str, str]:
    """Return the absolute paths of a batch job's spec. Blocks; raises Unprocessable.

    Directories must be there already: a job whose output has no place fails without a trace.
    """
    folder = _existing(spec.get("directory", "~"), "directory", os.path.isdir)
    paths = {"directory": folder}
    for field in ("stdin_path", "stdout_path", "stderr_path", "pre_launch", "post_launch"):
        if field in spec:
            paths[field] = os.path.join(folder, os.path.expanduser(spec[field]))
            if field in ("stdout_path", "stderr_path"):
                _existing(os.path.dirname(paths[field]), field, os.path.isdir)
            else:
                _existing(paths[field], field, os.path.exists)
    return paths


# -- batch systems: the executors of psij-python

_SUBMIT_PROGRAMS = {"slurm": ("sbatch", "squeue", "scancel"), "pbs": ("qsub", "qstat", "qdel"),
                    "pbs_classic": ("qsub", "qstat", "qdel"), "lsf": ("bsub", "bjobs", "bkill"),
                    "cobalt": ("qsub", "qstat", "qdel")}
_PSIJ_CLASSES = {"slurm": ("slurm", "SlurmJobExecutor"), "pbs": ("pbs", "PBSJobExecutor"),
                 "pbs_classic": ("pbs_classic", "PBSClassicJobExecutor"),
                 "lsf": ("lsf", "LsfJobExecutor"), "cobalt": ("cobalt", "CobaltJobExecutor")}
_NAME_OPTIONS = {"slurm": "slurm.job-name", "pbs": "pbs.N", "pbs_classic": "pbs.N", "lsf": "lsf.J"}


class _NoPolling:
    """Takes the place of psij-python's polling thread, which loses jobs: BatchExecutors looks."""

    def register_job(self, job: Any) -> None:
        """Do nothing."""


def _make_careful(base: Any) -> Any:
    """Return a subclass of a batch executor of psij-python with its programs under our control."""

    class CarefulExecutor(base):                  # type: ignore[misc]
        """Writes scripts and submits as psij-python does; nobody polls, nothing hangs."""

        def _start_queue_poll_thread(self) -> Any:
            return _NoPolling()

        def _ensure_work_dir(self) -> None:       # scripts have the job's environment in them
            self.work_directory.mkdir(parents=True, exist_ok=True, mode=0o700)

        def _run_command(self, command: List[str]) -> str:
            result = run_scheduler(command)
            if result.code != 0:
                raise subprocess.CalledProcessError(
                    result.code, command, output=scheduler_error(command[0], result).detail)
            return result.output

        def job_id_from_submit_output(self, out: str) -> str:
            match = re.search("Submitted batch job ([0-9]+)", out)       # "... on cluster c1"
            try:
                native_id = match[1] if match else super().job_id_from_submit_output(out)
            except Exception:                     # psij-python's own
                native_id = ""
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._\[\]-]{0,127}", native_id):
                raise SchedulerTrouble(f"{self.name} took the job, but names no job id: "
                                       f"{out[:80]!r}")
            return native_id

        def generate_submit_script(self, job: Any, context: Dict[str, Any], file: Any) -> None:
            from datetime import timedelta
            given = job.spec.attributes.duration
            if given is None and "lsf" in base.__name__.lower():
                job.spec.attributes.duration = timedelta(minutes=1)
            text = io.StringIO()
            super().generate_submit_script(job, context, text)
            job.spec.attributes.duration = given
            file.write(repair_script(text.getvalue(), job.id, has_duration=given is not None))

    return CarefulExecutor


class BatchDriver:
    """One executor of psij-python: submits, cancels, and asks the batch system. Its calls block.

    Raises NotInstalled without psij-python, Unprocessable for a batch system that is not here.
    """

    seconds = 1                                   # of which walltimes are multiples

    def __init__(self, name: str) -> None:
        self.name = name
        cls = self._load(name)
        # not psij-python's default, which it takes from HOME when it is imported
        root = Path(os.path.expanduser("~")) / ".psij" / "work"
        if not _PLAIN_TEXT.fullmatch(str(root)):
            raise Unprocessable(f"executor: {name} cannot work in {root}: its name has characters "
                                "that job scripts cannot have")
        from psij.executors.batch.batch_scheduler_executor import BatchSchedulerExecutorConfig
        self._executor = cls(url=None, config=BatchSchedulerExecutorConfig(work_directory=root))
        self.work_directory: Path = self._executor.work_directory

    def make(self, job: Job) -> Any:
        """Return psij-python's form of a job. Raises Unprocessable, which names the field."""
        import psij
        check_batch_spec(job.spec, self.name)
        paths = resolve_batch_paths(job.spec)
        job.stdout = Path(paths.get("stdout_path", job.stdout))
        job.stderr = Path(paths.get("stderr_path", job.stderr))
        if not _PLAIN_TEXT.fullmatch(str(job.folder)):
            raise Unprocessable(f"stdout_path: the edge's state directory {job.folder.parent} has "
                                "characters that job scripts cannot have: take another with "
                                "--state")
        try:
            handle = psij.Job(self._translate(psij, job, paths))
            self._executor._get_launcher_from_job(handle)
        except Exception as error:                # typeguard's and psij-python's own
            text = str(error) or type(error).__name__
            field = "launcher" if "launcher" in text else "job_spec"
            raise Unprocessable(f"{field}: {text}") from None
        handle._id = job.job_id
        return handle

    def submit(self, handle: Any) -> str:
        """Submit; return the native id. Raises Unprocessable with the batch system's own words.

        Raises SubmissionUnsure when nobody knows whether the job was taken.
        """
        try:
            self._executor.submit(handle)
        except SchedulerTrouble as error:
            raise SubmissionUnsure(error.detail) from None
        except Exception as error:                # psij-python's own
            reason = str(getattr(error, "exception", None) or error) or type(error).__name__
            self.clean(handle.id, None)
            raise Unprocessable(f"job_spec: {self.name} refused the job: {reason}") from None
        return str(handle.native_id)

    def cancel(self, native_id: str) -> None:
        """Ask the batch system to end a job. Raises Unavailable with its own words."""
        command = self._executor.get_cancel_command(native_id)
        result = run_scheduler(command)
        if result.code != 0:
            raise Unavailable(scheduler_error(command[0], result).detail)

    def ask(self, native_ids: List[str]) -> Dict[str, Verdict]:
        """Return {native id: verdict} of the jobs that the queue knows; raises SchedulerTrouble.

        A program that fails for one job of several is asked for each alone.
        """
        found: Dict[str, Verdict] = {}
        for begin in range(0, len(native_ids), MAX_ARGUMENT_IDS):
            some = native_ids[begin:begin + MAX_ARGUMENT_IDS]
            try:
                found.update(self._ask(some))
            except SchedulerTrouble:
                if len(some) == 1 or len(some) > MAX_ALONE:
                    raise
                found.update(self._ask_alone(some))
        return found

    def ask_history(self, native_ids: List[str], since: float) -> Dict[str, Verdict]:
        """Return {native id: verdict} of jobs that have left the queue, where that is recorded."""
        return {}

    def find(self, job_id: str, since: float) -> Optional[str]:
        """Return the native id under which a job was submitted, None if it certainly was not.

        Raises SchedulerTrouble when that cannot be told.
        """
        known = _read(str(self.work_directory / f"{job_id}.id"), 256).strip()
        if known:
            return known                          # its script has begun
        if not (self.work_directory / f"{job_id}.job").exists():
            return None                           # not even its script was written
        if self.is_submitting(job_id):
            raise SchedulerTrouble(f"{self.name}: the job is just being submitted")
        return self._find(job_id, since)

    def is_submitting(self, job_id: str) -> bool:
        """Whether a program that submits the job runs, perhaps of an edge that was killed."""
        script = os.fsencode(str(self.work_directory / f"{job_id}.job"))
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.stat().st_uid == os.geteuid() and script in path.read_bytes():
                    return True
            except OSError:                       # it has just ended
                continue
        return False

    def read_exit_code(self, native_id: str) -> Optional[int]:
        """Return what a job's script wrote down at its end; None if there is nothing."""
        text = _read(str(self.work_directory / f"{native_id}.ec"), 64).strip()
        return int(text) if re.fullmatch("[0-9]{1,3}", text) else None

    def read_trouble(self, native_id: str) -> Optional[str]:
        """Return what the launcher complained of, such as a failing pre_launch script."""
        text = _read(str(self.work_directory / f"{native_id}.out"), 65536)
        lines = [line for line in text.split("\n")
                 if line.strip() and "_PSI_J_LAUNCHER_DONE" not in line]
        return None if "_PSI_J_LAUNCHER_DONE" in text else "\n".join(lines)[-1000:] or None

    def find_node(self, native_id: str) -> Optional[str]:
        """Return the first host of a running job; None while that is not known."""
        nodes = _read(str(self.work_directory / f"{native_id}.nodefile"), 65536).split()
        return nodes[0] if nodes else None

    def clean(self, job_id: str, native_id: Optional[str]) -> None:
        """Delete psij-python's files of a job."""
        names = [f"{job_id}.job", f"{job_id}.id"]
        if native_id:
            names += [f"{native_id}.{suffix}" for suffix in ("ec", "ec.new", "out", "nodefile")]
        for name in names:
            with contextlib.suppress(OSError):
                (self.work_directory / name).unlink()

    # -- inside

    @staticmethod
    def _load(name: str) -> Any:
        if name not in _PSIJ_CLASSES:
            raise Unprocessable(f"executor: there is no {name[:80]!r}; there are: local, "
                                f"{', '.join(_PSIJ_CLASSES)}")
        try:
            import psij
        except ImportError:
            raise NotInstalled(f"executor: {name!r} needs psij-python on the edge: "
                               "pip install psij-python") from None
        missing = [program for program in _SUBMIT_PROGRAMS[name] if not find_program(program)]
        if missing:
            raise Unprocessable(f"executor: {name} is not on this machine: there is no "
                                f"{' and no '.join(missing)}")
        try:
            base = getattr(importlib.import_module(f"{psij.__name__}.executors.batch."
                                                   f"{_PSIJ_CLASSES[name][0]}"),
                           _PSIJ_CLASSES[name][1])
        except (ImportError, AttributeError) as error:
            raise NotInstalled(f"executor: this psij-python has no {name}: {error}") from None
        cls = _make_careful(base)
        cls._NAME_, cls._VERSION_ = name, getattr(base, "_VERSION_", None)   # see get_instance()
        return cls

    def _ask(self, native_ids: List[str]) -> Dict[str, Verdict]:
        command = self._executor.get_status_command(native_ids)
        result = run_scheduler(command)
        try:
            found = self._parse(result)
        except Exception as error:                # psij-python's own; garbage was printed
            raise SchedulerTrouble(f"{command[0]} printed what cannot be read "
                                   f"({type(error).__name__})") from None
        if not found and result.code != 0 and not self._is_unknown_job(result):
            raise SchedulerTrouble(scheduler_error(command[0], result).detail)
        return found

    def _ask_alone(self, native_ids: List[str]) -> Dict[str, Verdict]:
        found: Dict[str, Verdict] = {}
        trouble: Optional[SchedulerTrouble] = None
        for native_id in native_ids:
            try:
                found.update(self._ask([native_id]))
            except SchedulerTrouble as error:     # of this job alone
                trouble = error
                found[native_id] = Verdict("UNKNOWN", error.detail)
        if trouble is not None and all(item.state == "UNKNOWN" for item in found.values()):
            raise trouble
        return found

    def _parse(self, result: Ran) -> Dict[str, Verdict]:
        statuses = self._executor.parse_status_output(0, result.output)
        return {native_id: Verdict(status.state.name, status.message)
                for native_id, status in statuses.items()}

    @staticmethod
    def _is_unknown_job(result: Ran) -> bool:
        """Whether a program failed only because the jobs have left the queue."""
        return re.search("unknown job|not found|invalid job id|no matching job|has finished",
                         result.error + result.output[:1000], re.IGNORECASE) is not None

    def _find(self, job_id: str, since: float) -> Optional[str]:
        raise SchedulerTrouble(f"the edge was killed while it submitted: whether {self.name} has "
                               f"got the job of the script {job_id}.job cannot be told")

    def _translate(self, psij: Any, job: Job, paths: Dict[str, str]) -> Any:
        spec, given = job.spec, dict(job.spec["attributes"])
        given["custom_attributes"] = self._custom_attributes(job)
        duration = given.pop("duration", None)
        plain = {name: spec[name] for name in ("inherit_environment", "launcher") if name in spec}
        plain.update({name: Path(paths[name]) for name in (
            "directory", "stdin_path", "pre_launch", "post_launch") if name in paths})
        executable, arguments = os.path.expanduser(spec["executable"]), spec.get("arguments", [])
        stderr = job.stderr
        if job.stderr == job.stdout:              # opened twice, each would write over the other
            arguments = ["-c", 'exec "$@" 2>&1', "radical-edge-job", executable, *arguments]
            executable, stderr = "/bin/sh", Path(os.devnull)
        environment = {name: str(value) for name, value in spec.get("environment", {}).items()}
        made = psij.JobSpec(
            executable=executable, arguments=arguments, stdout_path=job.stdout, stderr_path=stderr,
            environment=environment, attributes=psij.JobAttributes(**given), **plain,
            resources=psij.ResourceSpecV1(**spec["resources"]) if spec["resources"] else None)
        from datetime import timedelta
        # psij-python's own default is 10 minutes: without a duration the queue's default counts
        made.attributes.duration = None if duration is None else \
            timedelta(seconds=math.ceil(duration / self.seconds) * self.seconds)
        return made

    def _custom_attributes(self, job: Job) -> Dict[str, Any]:
        """Return the custom attributes with the job's name, which psij-python itself drops."""
        given = job.spec["attributes"].get("custom_attributes", {})
        found = {name: value if isinstance(value, bool) else str(value)
                 for name, value in given.items() if value is not False}
        option = _NAME_OPTIONS.get(self.name)
        if option and option not in found:
            name = job.spec.get("name") or os.path.basename(job.spec["executable"])
            found[option] = re.sub(r"[^A-Za-z0-9_.+-]", "_", name)[:64] or "job"
        return found


class SlurmDriver(BatchDriver):
    """Slurm, of any version that has squeue -o; accounting is used where there is some."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._nodes: Dict[str, str] = {}          # by native id; replaced as a whole

    def ask_history(self, native_ids: List[str], since: float) -> Dict[str, Verdict]:
        """Return what scontrol and sacct say of jobs; whichever is not there says nothing."""
        found: Dict[str, Verdict] = {}
        for begin in range(0, len(native_ids), MAX_ARGUMENT_IDS):
            some = native_ids[begin:begin + MAX_ARGUMENT_IDS]
            command = ["sacct", "-n", "-P", "-X", "-j", ",".join(some), "-o",
                       "JobIDRaw,State,ExitCode", "-S", self._format_time(since)]
            with contextlib.suppress(SchedulerTrouble):
                found.update(parse_sacct(run_scheduler(command).output))
        for native_id in [item for item in native_ids if item not in found][:MAX_ALONE]:
            with contextlib.suppress(SchedulerTrouble):
                found.update(parse_scontrol_job(
                    run_scheduler(["scontrol", "-o", "show", "job", native_id]).output))
        return {native_id: verdict for native_id, verdict in found.items()
                if verdict.state in FINAL_STATES}

    def find_node(self, native_id: str) -> Optional[str]:
        """Return the host where the job's script runs, as squeue said last, or its node file."""
        return self._nodes.get(native_id) or super().find_node(native_id)

    def ask(self, native_ids: List[str]) -> Dict[str, Verdict]:
        """Return {native id: verdict} of what squeue lists; raises SchedulerTrouble."""
        rows = self._squeue("%A|%T|%B|%r")
        found = parse_squeue_states(rows)
        if rows.strip() and not found:
            raise SchedulerTrouble(f"squeue printed what cannot be read: {rows.strip()[:80]!r}")
        self._nodes = {native_id: verdict.node for native_id, verdict in found.items()
                       if verdict.node}
        return {native_id: found[native_id] for native_id in native_ids if native_id in found}

    def _find(self, job_id: str, since: float) -> Optional[str]:
        name = f"/{job_id}.job"
        for line in self._squeue("%A|%o").splitlines():          # %o: the script
            native_id, _, command = line.strip().partition("|")
            if command.strip().endswith(name):
                return native_id
        with contextlib.suppress(SchedulerTrouble):              # it may have left the queue
            result = run_scheduler(["sacct", "-n", "-P", "-X", "-o", "JobIDRaw,SubmitLine", "-S",
                                    self._format_time(since)])
            for line in result.output.splitlines():
                native_id, _, command = line.strip().partition("|")
                if name in command:
                    return native_id
        return None

    @staticmethod
    def _squeue(fields: str) -> str:
        # -a: also of partitions that are hidden
        result = run_scheduler(["squeue", "-h", "-a", "-t", "all", "-u", str(os.geteuid()), "-o",
                                fields])
        if result.code != 0:
            raise SchedulerTrouble(scheduler_error("squeue", result).detail)
        return result.output

    @staticmethod
    def _format_time(since: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 3600))


class PBSDriver(BatchDriver):
    """PBS Pro and its like, by the JSON of qstat."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._nodes: Dict[str, str] = {}          # by native id; replaced as a whole

    def ask(self, native_ids: List[str]) -> Dict[str, Verdict]:
        """Return {native id: verdict} of what qstat knows; raises SchedulerTrouble."""
        found = super().ask(native_ids)
        self._nodes = {native_id: verdict.node for native_id, verdict in found.items()
                       if verdict.node}
        return found

    def find_node(self, native_id: str) -> Optional[str]:
        """Return the first host that qstat named last."""
        return self._nodes.get(native_id)         # the node file is on the node

    def _parse(self, result: Ran) -> Dict[str, Verdict]:
        found = parse_qstat(result.output)
        if result.output.strip() and not found and not self._is_unknown_job(result):
            raise ValueError("no JSON of qstat")
        return found

    def _custom_attributes(self, job: Job) -> Dict[str, Any]:
        found = super()._custom_attributes(job)
        found["pbs.N"] = re.sub("^[^A-Za-z]", "j", found["pbs.N"])[:15]      # as older ones want
        return found


class LSFDriver(BatchDriver):
    """LSF, by the JSON of bjobs, and with walltimes in minutes."""

    seconds = 60

    def _parse(self, result: Ran) -> Dict[str, Verdict]:
        found = parse_bjobs(result.output)
        if result.output.strip() and "RECORDS" not in result.output and \
                not self._is_unknown_job(result):
            raise ValueError("no JSON of bjobs")
        return found


_DRIVERS = {"slurm": SlurmDriver, "pbs": PBSDriver, "lsf": LSFDriver}


class BatchExecutors:
    """The jobs of all batch systems, and who looks after them. On one loop.

    folder/<job_id>/batch.json holds all that is known of a job: written before it is submitted, and
    before anything of it is told. The drivers' calls run in threads; what runs the batch system's
    programs, which may hang, has threads of its own, so that it holds up nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._submitters, self._cancellers, self._lookers = (
            Workers(f"psij-{what}", MAX_SUBMITTING) for what in ("submit", "cancel", "look"))
        self._lock = threading.Lock()             # one import, one driver of each name
        self._drivers: Dict[str, BatchDriver] = {}               # by name; guarded by _lock
        self.jobs: Dict[str, Job] = {}            # by job_id; the loop's
        self._submitting: Dict[str, "asyncio.Task[None]"] = {}   # by job_id
        self._pollers: Dict[str, "asyncio.Task[None]"] = {}      # by executor name
        self._wake: Dict[str, asyncio.Event] = {}                # by executor name
        self._ended_since: Dict[str, float] = {}  # monotonic, by job_id

    async def open(self) -> None:
        """Find the jobs of earlier processes and go on looking after those that live."""
        for record in await asyncio.to_thread(self._load):
            job = Job(record["job_id"], record["sid"], record["executor"], record["spec"],
                      self._folder / record["job_id"])
            for name in ("native_id", "state", "exit_code", "message", "submitted", "unsure_until"):
                setattr(job, name, record.get(name, getattr(job, name)))
            job.stdout, job.stderr = Path(record["stdout"]), Path(record["stderr"])
            job.time = record.get("time", job.time)
            # who was asked for days about such a job will not tell any more
            job.gone = job.state == "UNKNOWN" and job.time < time.time() - KEEP_JOBS_S
            self.jobs[job.job_id] = job
            if not job.is_over:
                self._look_after(job.executor)

    def close(self) -> None:
        """Stop looking; the jobs go on."""
        for task in [*self._pollers.values(), *self._submitting.values()]:
            task.cancel()
        for workers in (self._submitters, self._cancellers, self._lookers):
            workers.stop()

    async def submit(self, job: Job) -> None:
        """Submit a job. Raises NotInstalled without psij-python, Unprocessable when refused.

        Raises SubmissionUnsure when the batch system did not answer in time; it is found out later.
        """
        driver = await asyncio.to_thread(self._get, job.executor)
        handle = await asyncio.to_thread(driver.make, job)
        self.jobs[job.job_id] = job
        task = asyncio.ensure_future(self._submit(driver, job, handle))
        self._submitting[job.job_id] = task
        task.add_done_callback(lambda _: self._submitting.pop(job.job_id, None))
        await asyncio.shield(task)                # whoever waits may go away; the job is submitted

    async def cancel(self, job: Job) -> None:
        """Ask the batch system to end a job; its state follows soon."""
        if job.native_id is None:
            raise Conflict("the batch system has not said yet whether it has got the job: look "
                           "again")
        driver = await asyncio.to_thread(self._get, job.executor)
        await self._cancellers.call(driver.cancel, job.native_id)
        self._look_after(job.executor)

    async def never_ran(self, job: Job) -> bool:
        """Whether the job was certainly not submitted, so that it may be, with the same id.

        Raises SchedulerTrouble when that cannot be told now.
        """
        if job.job_id in self._submitting:
            await asyncio.wait([self._submitting[job.job_id]])
        if job.native_id is None and job.job_id in self.jobs:
            driver = await asyncio.to_thread(self._get, job.executor)
            await self._settle(driver, job)
            if job.native_id is None and not job.is_final:
                raise SchedulerTrouble("whether the job was submitted is not known yet: look again")
        return job.native_id is None

    async def find_node(self, job: Job) -> str:
        """Return the first host of a running job. Raises Unavailable while it is not known."""
        driver = await asyncio.to_thread(self._get, job.executor)
        node = await asyncio.to_thread(driver.find_node, job.native_id)
        if node is None:
            raise Unavailable(f"{job.executor} has not said on which node the job runs")
        return node

    async def forget(self, job: Job) -> None:
        """Delete what is stored of a job that is over."""
        if job.is_over and self.jobs.pop(job.job_id, None) is not None:
            await asyncio.to_thread(remove_folder, job.folder)

    # -- submitting

    async def _submit(self, driver: BatchDriver, job: Job, handle: Any) -> None:
        try:
            await asyncio.to_thread(remove_folder, job.folder)   # if it never ran before
            await asyncio.to_thread(
                lambda: job.folder.mkdir(parents=True, exist_ok=True, mode=0o700))
            job.submitted = time.time()
            await self._store(job)                # first: a killed edge must find it again
            job.native_id = await self._submitters.call(driver.submit, handle)
        except SubmissionUnsure as error:
            log_psij.error("%s: %s", job.job_id, error.detail)
            job.note, job.unsure_until = error.detail, time.time() + UNSURE_S
            await self._store(job)
            self._look_after(job.executor)
            raise
        except Exception:
            self.jobs.pop(job.job_id, None)
            raise
        await self._take(job, Verdict("QUEUED"))
        self._look_after(job.executor)

    async def _settle(self, driver: BatchDriver, job: Job) -> None:
        """Find out what became of a submission that nobody saw the end of.

        One at a time: of two, the later would write this over what is known of a new submission.
        """
        async with job.settling:
            if job.job_id not in self._submitting and job.native_id is None and not job.is_final:
                await self._settle_locked(driver, job)

    async def _settle_locked(self, driver: BatchDriver, job: Job) -> None:
        try:
            native_id = await self._lookers.call(driver.find, job.job_id, job.submitted)
        except SchedulerTrouble as error:
            job.note = error.detail
            if time.time() > job.submitted + UNSURE_S and job.state != "UNKNOWN":
                await self._take(job, Verdict("UNKNOWN", error.detail))
            return
        if native_id is not None:
            job.native_id = native_id
            await self._take(job, Verdict("QUEUED"))
        elif time.time() > job.unsure_until:
            await self._take(job, Verdict("FAILED", "it was not submitted: the edge ended, or the "
                                                    "batch system did not answer"))

    # -- looking

    def _look_after(self, name: str) -> None:
        """See to it that the jobs of an executor are looked at, and soon."""
        self._wake.setdefault(name, asyncio.Event()).set()
        if name not in self._pollers:
            self._pollers[name] = asyncio.ensure_future(self._poll(name))

    async def _poll(self, name: str) -> None:
        failures = 0
        try:
            while True:
                live = [job for job in self.jobs.values() if job.executor == name and
                        not job.is_over]
                if not live:
                    return
                failures = 0 if await self._try_look(name, live, failures) else failures + 1
                await self._pause(name, min(QUEUE_POLL_S * 2 ** failures, TROUBLE_S))
        finally:
            del self._pollers[name]

    async def _try_look(self, name: str, live: List[Job], failures: int) -> bool:
        """Look once; return whether that worked. Jobs are as they are: that is no end of any."""
        try:
            await self._look(await asyncio.to_thread(self._get, name), live)
            return True
        except EdgeError as error:
            detail = error.detail
        except Exception as error:                # ours; the jobs must be looked at all the same
            log_psij.exception("%s: looking at the queue failed", name)
            detail = str(error)
        for job in live:
            job.note = f"not up to date: {detail}"
        if failures & (failures + 1) == 0:        # the first, the second, the fourth ... in a row
            log_psij.warning("%s: the queue cannot be read: %s", name, detail)
        return False

    async def _pause(self, name: str, seconds: float) -> None:
        """Wait until the next look; not so long when something was submitted or cancelled."""
        wake = self._wake[name]
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(wake.wait(), seconds)
        if wake.is_set():
            wake.clear()
            await asyncio.sleep(min(SOON_S, seconds))

    async def _look(self, driver: BatchDriver, live: List[Job]) -> None:
        for job in [job for job in live if job.native_id is None]:
            await self._settle(driver, job)
        known = [job for job in live if job.native_id is not None]
        if not known:
            return
        said = await self._lookers.call(driver.ask, [job.native_id for job in known])
        ended = []
        for job in known:
            verdict = said.get(job.native_id)
            if verdict is None or verdict.state in FINAL_STATES:
                ended.append((job, verdict))
            else:
                self._ended_since.pop(job.job_id, None)
                job.note = verdict.message
                if verdict.state != "UNKNOWN":
                    await self._take(job, verdict._replace(message=None, exit_code=None))
        await self._conclude(driver, ended)

    async def _conclude(self, driver: BatchDriver,
                        ended: List[Tuple[Job, Optional[Verdict]]]) -> None:
        """Find out how jobs that run no more have ended."""
        codes = {job: await asyncio.to_thread(driver.read_exit_code, job.native_id)
                 for job, _ in ended}
        asked = [job for job, verdict in ended if codes[job] is None and (
            verdict is None or verdict.exit_code is None and verdict.state != "CANCELED")]
        history = await self._lookers.call(
            driver.ask_history, [job.native_id for job in asked],
            min(job.submitted for job in asked)) if asked else {}
        for job, verdict in ended:
            past = history.get(job.native_id)
            if past is not None:                  # it has the exit code, the queue the words
                message = verdict.message if verdict else None
                verdict = past._replace(message=past.message or message)
            since = self._ended_since.setdefault(job.job_id, time.monotonic())
            last = conclude(verdict, codes[job], time.monotonic() - since)
            if last is not None:
                await self._end(driver, job, last)

    async def _end(self, driver: BatchDriver, job: Job, last: Verdict) -> None:
        if last.state == "FAILED" and last.message is None:
            text = await asyncio.to_thread(driver.read_trouble, job.native_id)
            last = last._replace(message=text)
        job.gone = True
        await self._take(job, last)
        self._ended_since.pop(job.job_id, None)
        if job.is_final:                          # stored: nothing else is needed any more
            await asyncio.to_thread(driver.clean, job.job_id, job.native_id)

    async def _take(self, job: Job, verdict: Verdict) -> None:
        """Give a job a state that is told only after it was stored."""
        if job.is_final or (verdict.state, verdict.message) == (job.state, job.message):
            return
        await self._store(job, verdict)
        if verdict.state == job.state:
            job.message = verdict.message
        else:
            job.update(verdict.state, message=verdict.message, exit_code=verdict.exit_code)
        job.note = None if job.is_over else job.note

    # -- files and drivers

    def _get(self, name: str) -> BatchDriver:
        """Return the driver of this name. Blocks; raises NotInstalled or Unprocessable."""
        with self._lock:
            if name not in self._drivers:
                kind = name if name in _DRIVERS else "pbs" if name == "pbs_classic" else ""
                self._drivers[name] = _DRIVERS.get(kind, BatchDriver)(name)
            return self._drivers[name]

    async def _store(self, job: Job, verdict: Optional[Verdict] = None) -> None:
        state = verdict or Verdict(job.state, job.message, job.exit_code)
        record = {"job_id": job.job_id, "sid": job.sid, "executor": job.executor, "spec": job.spec,
                  "native_id": job.native_id, "state": state.state, "exit_code": state.exit_code,
                  "message": state.message, "stdout": str(job.stdout), "stderr": str(job.stderr),
                  "submitted": job.submitted, "unsure_until": job.unsure_until,
                  "time": time.time() if verdict else job.time}
        try:
            await asyncio.to_thread(write_private, job.folder / "batch.json", json.dumps(record))
        except OSError as error:                  # the disk is full
            if job.native_id is None:             # it is not submitted: all or nothing
                raise Unavailable(f"the job cannot be written down: {error}") from None
            log_psij.error("%s: the state cannot be written: %s", job.job_id, error)

    def _load(self) -> List[Dict[str, Any]]:
        records = [_json_object(_read(str(path))) for path in self._folder.glob("*/batch.json")]
        needed = {"job_id", "sid", "executor", "spec", "stdout", "stderr"}
        return [record for record in records if needed <= set(record)]


# -- session, client, plugin

class PSIJSession(PluginSession):
    """The jobs of one client. They outlive the edge; closing the session does not end them."""

    poll_interval = QUEUE_POLL_S

    def __init__(self, sid: str, **kwargs: Any) -> None:
        super().__init__(sid)
        if kwargs:
            raise Unprocessable(f"{sorted(kwargs)[0]}: a psij session takes no arguments")
        self._jobs: Dict[str, Job] = {}           # by job_id
        self._changes: "asyncio.Queue[Tuple[Job, Dict[str, Any]]]" = asyncio.Queue()
        self._teller: Optional["asyncio.Task[None]"] = None

    async def start(self) -> None:
        """Find the session's jobs again after a restart of the edge."""
        self._teller = asyncio.ensure_future(self._tell())
        for executor in await self._plugin.executors():
            for job in [job for job in executor.jobs.values() if job.sid == self.sid]:
                self._jobs[job.job_id] = job
                job.on_change = self._on_change
                if job.is_final and not _told_path(job).exists():
                    self._on_change(job)          # it ended while the edge was away

    def is_busy(self) -> bool:
        """A session with live jobs does not expire."""
        return any(job.state not in ENDED_STATES for job in self._jobs.values())

    async def submit_job(self, job_spec_dict: Dict[str, Any], executor_name: str = "local",
                         key: Optional[str] = None) -> Dict[str, Any]:
        """Start a job; return {"job_id", "native_id"}. Raises Unprocessable or NotInstalled.

        key: what the client calls this job; a second submission of the same runs it no second time,
        even when the edge was killed in between.
        """
        self._check_active()
        return await self._submit(self._make_job_id(key), parse_job_spec(job_spec_dict),
                                  executor_name)

    async def submit_tunneled(self, job_spec_dict: Dict[str, Any], executor_name: str = "local",
                              tunnel: Any = False, key: Optional[str] = None) -> Dict[str, Any]:
        """Start an edge as a job, and its tunnel; return {"job_id", "native_id", "edge_name"}.

        tunnel: see parse_tunnel_mode(). key: as for submit_job(). Raises Unprocessable, also
        without a name for the edge, and Conflict when an edge of this name has been started.
        """
        self._check_active()
        child = make_child(job_spec_dict, tunnel, self._plugin.uplink)
        if child.edge_name == self._plugin._app.state.edge_name:
            raise Unprocessable("job_spec.arguments: --name is the name of this edge: take another")
        spec, job_id = parse_job_spec(child.spec), self._make_job_id(key)
        executor = await self._plugin.executor(executor_name)    # 422 before anything is written
        tunnels, known = self._plugin.tunnels, self._jobs.get(job_id)
        if known is None or await executor.never_ran(known):
            await tunnels.prepare(child, self.sid, job_id)
        try:
            answer = await self._submit(job_id, spec, executor_name)
        finally:                                  # also when the client went away meanwhile
            if job_id in self._jobs:
                tunnels.watch(child.edge_name)
            else:
                await tunnels.abandon(child.edge_name)
        return {**answer, "edge_name": child.edge_name}

    def _make_job_id(self, key: Optional[str]) -> str:
        import uuid                               # here: a quarter of a MiB
        return str(uuid.uuid5(uuid.UUID(int=0), f"{self.sid} {key}") if key else uuid.uuid4())

    async def _submit(self, job_id: str, spec: Dict[str, Any],
                      executor_name: str) -> Dict[str, Any]:
        await asyncio.to_thread(self._plugin.policy.check_job, executor_name, spec)
        executor = await self._plugin.executor(executor_name)
        known = self._jobs.get(job_id)
        if known is not None and not await executor.never_ran(known):
            return {"job_id": job_id, "native_id": known.native_id}
        self._check_job_count(len(self._jobs))
        note_for_audit(job=job_id, executor=executor_name, executable=spec["executable"][:256])
        job = Job(job_id, self.sid, executor_name, spec, self._plugin.jobs_dir / job_id)
        job.on_change = self._on_change
        self._jobs[job_id] = job
        # to its end, although the client may go away meanwhile
        await asyncio.shield(asyncio.ensure_future(self._start(executor, job)))
        return {"job_id": job_id, "native_id": job.native_id}

    async def _start(self, executor: Any, job: Job) -> None:
        try:
            await executor.submit(job)
        except Exception:
            if job.job_id not in executor.jobs:   # it did not start
                del self._jobs[job.job_id]
                await asyncio.to_thread(remove_folder, job.folder)
            raise

    async def get_job_status(self, job_id: str, stdout_offset: int = 0,
                             stderr_offset: int = 0) -> Dict[str, Any]:
        """Return the job's state, description and output from the byte offsets on.

        stdout_offset and stderr_offset in the answer are where to read on. `eof` is True once the
        job has ended and all of its output was read.
        """
        job = self._find(job_id)
        status = job.describe_whole()
        complete = status["finished"]             # known before the output is read: none is missed
        ends = []
        for name, offset in (("stdout", stdout_offset), ("stderr", stderr_offset)):
            text, after, end = await asyncio.to_thread(read_output, getattr(job, name), offset,
                                                       complete=complete)
            status.update({name: text, f"{name}_offset": after})
            ends.append(end)
        return {**status, "eof": all(ends)}

    async def get_job_spec(self, job_id: str) -> Dict[str, Any]:
        """Return {"job_spec", "executor"}, as submit takes them, to submit the job once more.

        Apart from the status, which is asked for often: the environment may hold secrets. Raises
        Conflict for an edge, which needs more than its job.
        """
        job = self._find(job_id)
        if self._plugin.tunnels.has_started(job_id):
            raise Conflict("this job is an edge: start it anew with submit_tunneled")
        return {"job_spec": job.spec, "executor": job.executor}

    async def list_jobs(self) -> Dict[str, Any]:
        """Return {"jobs": [...]}, the oldest first."""
        return {"jobs": [job.describe() for job in self._jobs.values()]}

    async def cancel_job(self, job_id: str) -> Dict[str, Any]:
        """End a job; return {"job_id", "status": "canceled"}. Raises Conflict when it has ended."""
        job = self._find(job_id)
        if not job.is_final:
            await (await self._plugin.executor(job.executor)).cancel(job)
            if job.state == "CANCELED" or not job.is_final:
                return {"job_id": job_id, "status": "canceled"}
        raise Conflict(f"the job has ended already: it is {job.state}")

    async def close(self) -> Dict[str, Any]:
        """Forget the jobs that have ended; the others go on, and their output stays."""
        for job in list(self._jobs.values()):
            if job.is_final:
                await (await self._plugin.executor(job.executor)).forget(job)
        if self._teller is not None:
            self._teller.cancel()
        return await super().close()

    def _find(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(f"there is no job {job_id[:80]!r} in this session: see list_jobs")
        return job

    def _on_change(self, job: Job) -> None:
        self._changes.put_nowait((job, {"job_id": job.job_id, "state": job.state,
                                        "exit_code": job.exit_code, "message": job.message}))

    async def _tell(self) -> None:
        """Notify of each change, in order, with the last bytes of the output."""
        while True:
            job, change = await self._changes.get()
            stdout, stderr = [await asyncio.to_thread(read_tail, path)
                              for path in (job.stdout, job.stderr)]
            told = {**change, "stdout": stdout, "stderr": stderr}
            await self._plugin.send_notification("job_status", told)     # safe from now on
            if change["state"] in FINAL_STATES:
                with contextlib.suppress(OSError):               # its directory may be gone
                    await asyncio.to_thread(_told_path(job).touch)


def _told_path(job: Job) -> Path:
    """Return the file that exists once the end of a job was told."""
    return job.folder / "told"


class PSIJClient(PluginClient):
    """A program's access to the jobs of one session."""

    def submit_job(self, job_spec: Dict[str, Any], executor: str = "local") -> Dict[str, Any]:
        """Start a job; return {"job_id", "native_id"}. job_spec: see parse_job_spec()."""
        return self._post(f"submit/{self._require_session()}",
                          {"job_spec": job_spec, "executor": executor})

    def get_job_status(self, job_id: str, stdout_offset: int = 0,
                       stderr_offset: int = 0) -> Dict[str, Any]:
        """Return a job's state and its output from the byte offsets on; at most 1 MiB of each."""
        return self._get(f"status/{self._require_session()}/{job_id}", stdout_offset=stdout_offset,
                         stderr_offset=stderr_offset)

    def get_job_spec(self, job_id: str) -> Dict[str, Any]:
        """Return {"job_spec", "executor"}, which are the arguments of submit_job()."""
        return self._get(f"job_spec/{self._require_session()}/{job_id}")

    def submit_tunneled(self, job_spec: Dict[str, Any], executor: str = "local",
                        tunnel: Any = False) -> Dict[str, Any]:
        """Start an edge as a job; return {"job_id", "native_id", "edge_name"}.

        job_spec: its arguments must have -n or --name; without an executable the edge's own Python
        and radical_edge.py are run. tunnel: how it reaches the bridge: False or "none", True or
        "reverse", "forward", "relay".
        """
        return self._post(f"submit_tunneled/{self._require_session()}",
                          {"job_spec": job_spec, "executor": executor, "tunnel": tunnel})

    def tunnel_status(self, edge_name: str) -> Dict[str, Any]:
        """Return {"edge_name", "status", "mode", "port", "pid", "error", "job_id"}; no session.

        status: "pending", "active", "failed", "done" or "no_tunnel".
        """
        return self._get(f"tunnel_status/{edge_name}")

    def list_jobs(self) -> Dict[str, Any]:
        """Return {"jobs": [...]} of this session."""
        return self._get(f"list_jobs/{self._require_session()}")

    def cancel_job(self, job_id: str) -> Dict[str, Any]:
        """End a job; return {"job_id", "status"}. Raises Conflict when it has ended already."""
        return self._post(f"cancel/{self._require_session()}/{job_id}")

    def wait_job(self, job_id: str, timeout: Optional[float] = None) -> Dict[str, Any]:
        """Return a job's status once it has ended or got lost, with its first MiB of output.

        Asks again and again, and so does not depend on notifications. timeout: seconds; after them
        the status is returned as it is.
        """
        end = None if timeout is None else time.monotonic() + timeout
        pause = 0.05
        while True:
            status = self.get_job_status(job_id)
            if status["finished"] or end is not None and time.monotonic() >= end:
                return status
            time.sleep(pause if end is None else max(0, min(pause, end - time.monotonic())))
            pause = min(pause * 1.5, 2.0)


class PluginPSIJ(Plugin):
    """Runs jobs: on this machine, and on batch systems where psij-python is installed."""

    plugin_name = "psij"
    session_class = PSIJSession
    client_class = PSIJClient
    version = "0.0.1"
    ui_config = {
        "icon": "🚀", "title": "PsiJ Jobs",
        "description": "Submit and monitor HPC batch jobs via PsiJ.",
        "forms": [{
            "id": "submit", "title": "📝 Submit Job", "layout": "grid2",
            "submit": {"label": "🚀 Submit Job", "style": "success"},
            "fields": [
                {"name": "exec", "type": "text", "label": "Executable", "column": 0,
                 "css_class": "p-exec", "default": "radical-edge-wrapper.sh"},
                {"name": "args", "type": "text", "label": "Arguments (space-separated)",
                 "column": 0, "css_class": "p-args",
                 "placeholder": "auto-filled with --url and --name"},
                {"name": "executor", "type": "select", "label": "Executor", "column": 0,
                 "css_class": "p-executor", "options": ["local", "slurm", "pbs", "lsf"]},
                {"name": "queue", "type": "text", "label": "Queue / Partition", "column": 1,
                 "css_class": "p-queue", "placeholder": "optional", "required": False},
                {"name": "account", "type": "text", "label": "Account / Project", "column": 1,
                 "css_class": "p-account", "placeholder": "optional", "required": False},
                {"name": "duration", "type": "text", "label": "Duration (seconds)", "column": 1,
                 "css_class": "p-duration", "placeholder": "e.g. 600", "required": False},
                {"name": "node_count", "type": "number", "label": "Number of Nodes", "column": 1,
                 "css_class": "p-node-count", "placeholder": "e.g. 1", "required": False},
                {"name": "custom", "type": "custom_attributes", "label": "🔧 Custom Attributes",
                 "column": 1, "css_class": "p-custom-attr", "required": False}]}],
        "monitors": [{"id": "jobs", "title": "📊 Job Monitor", "type": "task_list",
                      "css_class": "psij-output", "empty_text": "No jobs submitted yet."}],
        "notifications": {"topic": "job_status", "id_field": "job_id", "state_field": "state"}}

    def __init__(self, app: Any, instance_name: str = "psij") -> None:
        super().__init__(app, instance_name)
        self._opening = asyncio.Lock()
        self._local: Optional[LocalExecutor] = None
        self._batch: Optional[BatchExecutors] = None
        self.uplink: Uplink = app.state.uplink
        self.tunnels = Tunnels(self.state_dir / "tunnels", self.uplink, self._find_job,
                               self._find_node, self._tell_tunnel)
        self.add_route_post("submit/{sid}", self.submit_job)
        self.add_route_post("submit_tunneled/{sid}", self.submit_tunneled)
        self.add_route_get("tunnel_status/{edge_name}", self.tunnel_status)
        self.add_route_get("status/{sid}/{job_id}", self.get_job_status)
        self.add_route_get("job_spec/{sid}/{job_id}", self.get_job_spec)
        self.add_route_get("list_jobs/{sid}", self.list_jobs)
        self.add_route_post("cancel/{sid}/{job_id}", self.cancel_job)

    @property
    def jobs_dir(self) -> Path:
        """Where every job has a directory of its own."""
        return self.state_dir / "jobs"

    async def start(self) -> None:
        """Delete what finished long ago and whose session is gone; go on with the tunnels."""
        executors = await self.executors()
        await self.tunnels.open()
        for executor in executors:
            for job in list(executor.jobs.values()):
                if job.sid not in self._sessions and job.time < time.time() - KEEP_JOBS_S:
                    await executor.forget(job)

    async def stop(self) -> None:
        """Stop watching; the jobs go on."""
        self.tunnels.close()
        for executor in (self._local, self._batch):
            if executor is not None:
                executor.close()

    async def on_topology_change(self, edges: Dict[str, Any]) -> None:
        self.tunnels.on_topology(edges)

    async def executors(self) -> Tuple[LocalExecutor, BatchExecutors]:
        """Return both kinds of executors, with the jobs of earlier processes."""
        async with self._opening:                 # sessions are restored before start()
            if self._local is None:
                local, batch = LocalExecutor(self.jobs_dir), BatchExecutors(self.jobs_dir)
                await local.open()
                await batch.open()
                self._local, self._batch = local, batch
        return self._local, self._batch

    async def executor(self, name: str) -> Any:
        """Return what runs the jobs of this executor's name. Raises Unprocessable for no name."""
        if not isinstance(name, str) or not name:
            raise Unprocessable("executor: must be a name, such as 'local' or 'slurm'")
        local, batch = await self.executors()
        return local if name == "local" else batch

    @repeatable
    async def submit_job(self, request: Request) -> Any:
        """Start a job of {"job_spec", "executor"}; answer {"job_id", "native_id"}."""
        body = await request.json_object()
        for name in body:
            if name not in ("job_spec", "executor"):
                raise Unprocessable(f"{name}: there is no such field; send job_spec and executor")
        return await self._forward(request.path_params["sid"], PSIJSession.submit_job,
                                   body.get("job_spec"), body.get("executor", "local"),
                                   request.idempotency_key)

    @repeatable
    async def submit_tunneled(self, request: Request) -> Any:
        """Start an edge of {"job_spec", "executor", "tunnel"} as a job; answer {"job_id",
        "native_id", "edge_name"}."""
        body = await request.json_object()
        for name in body:
            if name not in ("job_spec", "executor", "tunnel"):
                raise Unprocessable(f"{name}: there is no such field; send job_spec, executor and "
                                    "tunnel")
        return await self._forward(request.path_params["sid"], PSIJSession.submit_tunneled,
                                   body.get("job_spec"), body.get("executor", "local"),
                                   body.get("tunnel", False), request.idempotency_key)

    async def tunnel_status(self, request: Request) -> Any:
        """Answer {"edge_name", "status", "mode", "port", "pid", "error", "job_id"}; no session."""
        name = request.path_params["edge_name"]
        if not is_valid_name(name):
            raise Unprocessable("edge_name: must be 1 to 64 letters, digits, '.', '_' or '-'")
        return self.tunnels.describe(name)

    async def get_job_status(self, request: Request) -> Any:
        """Answer a job's state, and its output from ?stdout_offset and ?stderr_offset on."""
        return await self._forward(
            request.path_params["sid"], PSIJSession.get_job_status, request.path_params["job_id"],
            request.query_int("stdout_offset", 0), request.query_int("stderr_offset", 0))

    async def get_job_spec(self, request: Request) -> Any:
        """Answer {"job_spec", "executor"} of a job, as it was submitted."""
        return await self._forward(request.path_params["sid"], PSIJSession.get_job_spec,
                                   request.path_params["job_id"])

    async def list_jobs(self, request: Request) -> Any:
        """Answer {"jobs"} of the session."""
        return await self._forward(request.path_params["sid"], PSIJSession.list_jobs)

    async def cancel_job(self, request: Request) -> Any:
        """End a job; answer {"job_id", "status"}."""
        return await self._forward(request.path_params["sid"], PSIJSession.cancel_job,
                                   request.path_params["job_id"])

    # -- for tunnels

    def _find_job(self, job_id: str) -> Optional[Job]:
        for executor in (self._local, self._batch):
            if executor is not None and job_id in executor.jobs:
                return executor.jobs[job_id]
        return None

    async def _find_node(self, job: Job) -> str:
        """Return the first host on which a job runs. Raises Unavailable."""
        if job.executor == "local":
            return "localhost"
        return await self._batch.find_node(job)

    def _tell_tunnel(self, described: Dict[str, Any]) -> None:
        self._dispatch_notify("tunnel_status", described)


# ---------------------------------------------------------------------------
# 5. staging: files. First the roots, under which each path is opened name by name; then files on
#    their way, small files in a row, what an edge does with files, and session, client and plugin.
# ---------------------------------------------------------------------------

log_staging = logging.getLogger("radical_edge.staging")

MAX_PATH = 4096                # bytes of a path, as in Linux
MAX_LINKS = 40                 # symbolic links on the way to one file, as in Linux
MAX_DEPTH = 512                # levels of a tree: each costs an open directory
MAX_DIR_ENTRIES = 100_000      # of a directory, in one answer
MAX_JSON_FILE = 32 * 1024 * 1024     # bytes of a file that travels as base64
# bytes of one that does so to or from an edge of radical.edge 0.2: a message, less what is around
MAX_OLD_FILE = (radical_edge.MAX_OLD_MESSAGE - 64 * 1024) // 4 * 3
MAX_UPLOADS = 32               # at a time; each holds a thread of the plugin
MAX_KNOWN_DIGESTS = 1024       # of files and of partial files, of each kind
MAX_TAIL_READ = 1024 * 1024    # bytes of a file's end in one answer
SMALL_FILE = 256 * 1024        # bytes; smaller files of a tree travel in batches
BATCH_FILES = 400              # files in one batch
BATCH_SIZE = 4 * 1024 * 1024   # bytes of them, about
COPY_SIZE = 256 * 1024         # bytes written and hashed at once
PARTIAL_S = 7 * 86400          # partial files that nobody goes on with are kept so long
STALL_S = 60.0                 # a connection on which nothing moves is given up by clients
TAIL_POLL_S = 0.25             # a file that is followed is looked at so often
MAX_TAIL_WAIT = 60             # seconds for which one request follows a file

_PARTIAL = re.compile(r"\.radical-edge-[0-9a-f]{32}\.part")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STEP = _DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # passes where it may not list
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC     # a FIFO must not block, a link not lead on
_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))
_OS_ERRORS: Dict[int, Type[EdgeError]] = {
    errno.ENOENT: NotFound, errno.EACCES: Forbidden, errno.EPERM: Forbidden, errno.EROFS: Forbidden,
    errno.ENOTDIR: BadRequest, errno.EINVAL: Unprocessable, errno.ENAMETOOLONG: Unprocessable,
    errno.ELOOP: Conflict, errno.EEXIST: Conflict, errno.EISDIR: Conflict,
    errno.ENOTEMPTY: Conflict, errno.EXDEV: Conflict, errno.EBUSY: Conflict,
    errno.ETXTBSY: Conflict,
    errno.ENOSPC: InsufficientStorage, errno.EDQUOT: InsufficientStorage,
    errno.EFBIG: InsufficientStorage, errno.EMFILE: Unavailable, errno.ENFILE: Unavailable,
    errno.ESTALE: Unavailable, errno.EIO: Unavailable}


def _read_umask() -> int:
    mask = os.umask(0o77)                         # there is no other way to read it
    os.umask(mask)
    return mask


NEW_MODE = 0o666 & ~_read_umask()                 # of a file for which nobody asks another


class FileExists(Conflict, FileExistsError):
    """There is a file already, and it was not to be replaced."""


class FileMissing(NotFound, FileNotFoundError):
    """There is no such file or directory."""


class OldEdge(NotInstalled):
    """The edge is one of radical.edge 0.2, which moves single files in the JSON forms alone."""


def parse_file_path(value: Any, field: str = "path") -> str:
    """Return a path that a client sent. Raises Unprocessable for what cannot be one.

    Bytes that are not UTF-8 are surrogates in it, as in all of Python's file names.
    """
    if not isinstance(value, str) or not value:
        raise Unprocessable(f"{field}: must be the path of a file or directory")
    try:
        size = len(os.fsencode(value))
    except UnicodeEncodeError:
        raise Unprocessable(f"{field}: {value[:80]!r} is no text that a path may hold") from None
    if "\0" in value or size > MAX_PATH:
        raise Unprocessable(f"{field}: may hold neither a NUL nor more than {MAX_PATH} bytes")
    return value


def explain_os_error(error: OSError, path: str) -> EdgeError:
    """Return the error for a caller that an error of the system stands for."""
    cls = _OS_ERRORS.get(error.errno or 0)
    if cls is None:
        log_staging.error("%r: %s", path, error)
        return EdgeError(f"{path!r}: {error.strerror}")
    hint = {errno.ENOTDIR: "Not a directory", errno.EXDEV: "on another file system: copy it",
            errno.ELOOP: "it was changed while it was looked up: try again",
            errno.ENAMETOOLONG: "path: a name in it is longer than the file system takes"}
    text = f"{hint.get(error.errno or 0, error.strerror)}: {path!r}"
    return FileMissing(text) if cls is NotFound else cls(text)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what the system says into what the caller is told."""
    try:
        yield
    except EdgeError:
        raise
    except OSError as error:
        raise explain_os_error(error, path) from None


def _split(path: str) -> List[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _identity(status: os.stat_result) -> Tuple[int, int]:
    return status.st_dev, status.st_ino


class Roots:
    """The directories under which files may be touched, and the way to all that is in them.

    A path is opened name by name, each relative to the directory before it, and a symbolic link is
    read and followed here, so that whatever is changed meanwhile can lead nowhere else. private:
    directories that are closed although they lie under a root; they can be neither moved nor
    deleted with what they lie in.
    """

    def __init__(self, paths: Iterable[str], private: Iterable[str] = ()) -> None:
        given = [os.path.abspath(os.path.expanduser(path)) for path in paths]
        real = {path: os.path.realpath(path) for path in given}
        # one that lies in another is reached through that: its own path could be swapped there
        self.paths = [path for path in dict.fromkeys(real.values()) if not any(
            _is_within(path, other) for other in real.values() if other != path)]
        self._aliases = sorted({tuple(_split(path)) for path in [*given, *self.paths]},
                               key=len, reverse=True)
        self._real = {tuple(_split(path)): real.get(path, path) for path in [*self.paths, *given]}
        self._private = [os.path.realpath(os.path.expanduser(path)) for path in private]
        self._was_private = {_identity(os.stat(path)) for path in self._private
                             if os.path.isdir(path)}
        home = os.path.realpath(os.path.expanduser("~"))
        self._base = home if any(_is_within(home, root) for root in self.paths) else self.paths[0]

    def find(self, path: str, *, follow: bool = True, parents: bool = False) -> "Place":
        """Return the place that a path leads to, whether or not something is there. Blocks.

        path: absolute, or relative to the home directory. follow: whether a symbolic link at the
        end is followed. parents: make the directories that are missing on the way.
        Raises Forbidden for what is not under a root, NotFound, BadRequest, Conflict.
        """
        with _explained(path):
            walk = _Walk(self, self._expand(path), parents)
            try:
                name = walk.run(follow)
            except BaseException:
                walk.close()
                raise
            return Place(self, walk.fd, name, walk.path)

    def split(self, path: str) -> Tuple[str, List[str]]:
        """Return (root, names from there on) of an absolute path. Raises Forbidden."""
        names = tuple(_split(path))
        for alias in self._aliases:
            if names[:len(alias)] == alias:
                return self._locate(self._real[alias], names[len(alias):])
        raise Forbidden(f"path: {path!r} is outside of {' and '.join(map(repr, self.paths))}, all "
                        "that this edge lets be touched: see --staging-root")

    def private_ids(self) -> Set[Tuple[int, int]]:
        """Return the (device, inode) of what is private, now and when the roots were made."""
        return self._was_private | set(self._identify(self._private))

    def check_movable(self, status: os.stat_result, path: str) -> None:
        """Raise Forbidden when something private lies in a directory, or is it."""
        holders = {str(parent) for private in self._private for parent in Path(private).parents}
        closed = self.private_ids() | set(self._identify(holders)) | set(self._identify(self.paths))
        if _identity(status) in closed:
            raise Forbidden(f"path: {path!r} is a root, or the edge's own files lie in it")

    def _expand(self, path: str) -> str:
        if path == "~" or path.startswith("~/"):
            return os.path.expanduser("~") + path[1:]
        return path if path.startswith("/") else f"{self._base}/{path}"

    def _locate(self, real: str, names: Tuple[str, ...]) -> Tuple[str, List[str]]:
        """Return (root, names) of what lies at `names` under a directory that roots contain."""
        root = next(root for root in self.paths if _is_within(real, root))
        return root, [*_split(real)[len(_split(root)):], *names]

    @staticmethod
    def _identify(paths: Iterable[str]) -> Iterator[Tuple[int, int]]:
        for path in paths:
            with contextlib.suppress(OSError):
                yield _identity(os.stat(path))


def _temporary_folder() -> str:
    """Return the directory for temporary files: tempfile.gettempdir(), without what that loads."""
    named = [os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    return next((path for path in map(os.path.abspath, [*named, "/tmp", "/var/tmp"])
                 if os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)), "/tmp")


def _is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


class _Walk:
    """One way from a root to a place. It holds one directory open, `fd`, which outlives it."""

    def __init__(self, roots: Roots, path: str, parents: bool) -> None:
        self._roots, self._asked, self._parents = roots, path, parents
        self._private = roots.private_ids()
        self._links = 0
        self.fd = -1

    @property
    def path(self) -> str:
        """Where the walk has led to, without its last name."""
        return "/".join([self._root.rstrip("/"), *self._done])

    def run(self, follow: bool) -> str:
        """Go to the directory of the last name; return that name, "." for a root."""
        self._start(self._asked)
        while self._pending:
            name = self._pending.popleft()
            if name == "..":
                self._ascend()
            elif self._pending:
                self._descend(name)
            elif not follow or not self._follow(name):
                return name
        return self._ascend() if self._done else "."

    def close(self) -> None:
        """Close the present directory: the walk has failed."""
        if self.fd >= 0:
            os.close(self.fd)

    def _start(self, path: str) -> None:
        self._root, names = self._roots.split(path)
        self._pending = collections.deque(names)
        self._done: List[str] = []
        self._enter(os.open(self._root, _STEP))

    def _enter(self, fd: int) -> None:
        """Take an open directory as the present one."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = fd
        if _identity(os.fstat(fd)) in self._private:
            raise Forbidden(f"path: {self._asked!r} leads into the edge's own files")

    def _ascend(self) -> str:
        """Go one level up, by going down from the root again; return the name that was left."""
        if not self._done:
            raise Forbidden(f"path: {self._asked!r} leads out of {self._root!r}")
        *names, last = self._done
        self._done = []
        self._enter(os.open(self._root, _STEP))
        for name in names:                        # they were directories, no links
            self._enter(os.open(name, _STEP, dir_fd=self.fd))
            self._done.append(name)
        return last

    def _descend(self, name: str) -> None:
        try:
            fd = os.open(name, _STEP, dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP) and self._follow(name):
                return
            if error.errno != errno.ENOENT or not self._parents:
                raise
            with contextlib.suppress(FileExistsError):           # somebody else made it
                os.mkdir(name, dir_fd=self.fd)
            fd = os.open(name, _STEP, dir_fd=self.fd)
        self._done.append(name)
        self._enter(fd)

    def _follow(self, name: str) -> bool:
        """Put a symbolic link's target before the names that are left; False when it is none."""
        try:
            target = os.readlink(name, dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return False
            raise
        self._check_link(name)
        self._links += 1
        if self._links > MAX_LINKS:
            raise Unprocessable(f"path: {self._asked!r} leads through more than {MAX_LINKS} links")
        rest = self._pending
        if target.startswith("/"):
            self._start(target)
        else:
            self._pending = collections.deque(_split(target))
        self._pending.extend(rest)
        return True

    def _check_link(self, name: str) -> None:
        """Refuse a link that somebody else left in /tmp, as Linux does (proc_sys_fs(5))."""
        folder = os.fstat(self.fd)
        owner = os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_uid
        shared = folder.st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_ISVTX | stat.S_IWOTH
        if shared and owner not in (os.geteuid(), folder.st_uid):
            raise Forbidden(f"path: {name!r} is a link that another user made in a directory where "
                            "everybody may")


class Place:
    """A name in an open directory: what a path has led to. Use it in `with`, which closes it.

    name: "." for a root itself. path: for people.
    """

    __slots__ = ("fd", "name", "path", "roots")

    def __init__(self, roots: Roots, fd: int, name: str, folder: str) -> None:
        self.roots, self.fd, self.name = roots, fd, name
        self.path = (folder or "/") if name == "." else f"{folder}/{name}"

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_exc: Any) -> None:
        os.close(self.fd)

    def look(self, name: str = "") -> Optional[os.stat_result]:
        """Return what is there, or beside it as `name`; links not followed. None for nothing."""
        try:
            return os.stat(name or self.name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def require(self) -> os.stat_result:
        """Return what is there. Raises FileMissing for nothing."""
        status = self.look()
        if status is None:
            raise FileMissing(f"there is no {self.path!r}")
        return status

    def open_file(self) -> int:
        """Return a descriptor of the regular file that is there, to be read. Raises EdgeError.

        It is looked at before, for to open a device may have effects.
        """
        self.check_regular(self.require())
        fd = os.open(self.name, os.O_RDONLY | _FILE, dir_fd=self.fd)
        try:
            self.check_regular(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open_dir(self) -> int:
        """Return a descriptor of the directory that is there, to be listed."""
        fd = os.open(self.name, os.O_RDONLY | _DIRECTORY, dir_fd=self.fd)
        if _identity(os.fstat(fd)) in self.roots.private_ids():
            os.close(fd)
            raise Forbidden(f"path: {self.path!r} leads into the edge's own files")
        return fd

    def check_regular(self, status: os.stat_result) -> None:
        """Raise Conflict for a directory, Unprocessable for what else is no regular file."""
        if stat.S_ISDIR(status.st_mode):
            raise Conflict(f"path: {self.path!r} is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise Unprocessable(f"path: {self.path!r} is not a regular file")

    def check_free(self, overwrite: bool) -> Optional[os.stat_result]:
        """Return what a file put here would replace. Raises FileExists when it must not."""
        if self.name == ".":
            raise Conflict(f"path: {self.path!r} is a directory")
        status = self.look()
        if status is not None:
            self.check_regular(status)
            if not overwrite:
                raise FileExists(f"{self.path!r} exists already: ask for overwrite to replace it")
        return status


def local_place(path: Union[str, Path]) -> Place:
    """Return the place of a path on the own machine, whose user may go anywhere."""
    real = os.path.realpath(os.path.expanduser(os.fspath(path)))
    folder = os.path.dirname(real)
    os.makedirs(folder, exist_ok=True)
    return Roots([folder]).find(real)


_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}


def describe_file(status: os.stat_result) -> Dict[str, Any]:
    """Return {"type", "size", "mode", "mtime"}: mode in octal, mtime in seconds since the epoch.

    type: "file", "dir", "link" or "unknown"; only a file has a size that is not None.
    """
    kind = _TYPES.get(stat.S_IFMT(status.st_mode), "unknown")
    return {"type": kind, "size": status.st_size if kind == "file" else None,
            "mode": f"{stat.S_IMODE(status.st_mode):04o}", "mtime": status.st_mtime}


class TreeWalk:
    """Iterates over all in a directory, parents first; close() it.

    Yields (relative path, open directory, name, status). Links are not followed, and what is
    private is left out. on_leave(open directory, name) is called after the last in a directory.
    partials: whether files on their way are shown. closed: takes the paths of directories that may
    not be listed; None to raise what the system says.
    Raises Unprocessable for more than MAX_DEPTH levels.
    """

    def __init__(self, place: Place,
                 on_leave: Callable[[int, str], None] = lambda fd, name: None, *,
                 partials: bool = False, closed: Optional[List[str]] = None) -> None:
        self._private, self._on_leave = place.roots.private_ids(), on_leave
        self._partials, self._closed = partials, closed
        # the directories on the way to the present one: (descriptor, names that are left, prefix)
        self._levels: List[Tuple[int, Iterator[str], str]] = []
        self._enter(place.open_dir(), "")

    def __iter__(self) -> Iterator[Tuple[str, int, str, os.stat_result]]:
        while self._levels:
            fd, names, prefix = self._levels[-1]
            name = next(names, None)
            if name is None:
                self._leave()
                continue
            status = self._look(fd, name)
            if status is None:
                continue
            yield prefix + name, fd, name, status
            if stat.S_ISDIR(status.st_mode):
                self._visit(fd, name, prefix + name)

    def close(self) -> None:
        """Close the directories that are open."""
        while self._levels:
            os.close(self._levels.pop()[0])

    def _visit(self, fd: int, name: str, path: str) -> None:
        try:
            self._enter(self._open(fd, name), path + "/")
        except PermissionError:
            if self._closed is None:
                raise
            self._closed.append(path)

    def _enter(self, fd: int, prefix: str) -> None:
        if len(self._levels) == MAX_DEPTH:
            os.close(fd)
            raise Unprocessable(f"path: the tree has more than {MAX_DEPTH} levels")
        self._levels.append((fd, iter(()), prefix))
        self._levels[-1] = fd, iter(sorted(os.listdir(fd))), prefix

    def _leave(self) -> None:
        fd, _, prefix = self._levels.pop()
        os.close(fd)
        if self._levels:
            self._on_leave(self._levels[-1][0], prefix.rstrip("/").rpartition("/")[2])

    def _look(self, fd: int, name: str) -> Optional[os.stat_result]:
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:                 # it went meanwhile
            return None
        hidden = _PARTIAL.fullmatch(name) and not self._partials
        return None if hidden or _identity(status) in self._private else status

    def _open(self, fd: int, name: str) -> int:
        made = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=fd)
        if _identity(os.fstat(made)) in self._private:           # it was swapped meanwhile
            os.close(made)
            raise Forbidden(f"path: {name!r} leads into the edge's own files")
        return made


# -- files on their way

class RunningDigest:
    """The SHA-256 of a file's first `position` bytes, taken while they pass by.

    Pieces may come again, after a break; what is missing in between is read from the file.
    """

    def __init__(self) -> None:
        self._hash, self.position = hashlib.sha256(), 0

    def add(self, fd: int, offset: int, piece: Union[bytes, memoryview]) -> None:
        """Take a piece of the file open as `fd`, which begins at `offset`."""
        self._catch_up(fd, offset)
        fresh = memoryview(piece)[max(0, self.position - offset):]
        self._hash.update(fresh)
        self.position += len(fresh)

    def finish(self, fd: int, size: int) -> str:
        """Return the digest of the file's first `size` bytes, in hexadecimal."""
        if self.position > size:                  # it was cut
            self.__init__()                       # type: ignore[misc]
        self._catch_up(fd, size)
        return self._hash.copy().hexdigest()

    def _catch_up(self, fd: int, offset: int) -> None:
        while self.position < offset:
            piece = os.pread(fd, min(COPY_SIZE, offset - self.position), self.position)
            if not piece:
                raise Conflict("the file became shorter while it was read")
            self._hash.update(piece)
            self.position += len(piece)


class _Behind:
    """Runs calls in a thread of its own, in their order, not more than a few behind. In `with`.

    The first error of a call is raised by the next run(), or at the end.
    """

    DEPTH = 4

    def __init__(self) -> None:
        self._calls: "queue.Queue[Optional[Callable[[], None]]]" = queue.Queue(self.DEPTH)
        self._error: Optional[BaseException] = None              # set by the thread, once
        self._thread = threading.Thread(target=self._work, name="staging-digest", daemon=True)

    def __enter__(self) -> "_Behind":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_exc: Any) -> None:
        self._calls.put(None)
        self._thread.join()
        if kind is None:
            self._check()

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function(*args)` soon."""
        self._check()
        self._calls.put(functools.partial(function, *args))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        for call_ in iter(self._calls.get, None):
            if self._error is None:
                try:
                    call_()
                except BaseException as error:    # raised where the calls come from
                    self._error = error


def _gather(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the pieces joined to about COPY_SIZE; what came before an error, before it."""
    waiting: List[bytes] = []
    size = 0
    try:
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= COPY_SIZE:
                yield b"".join(waiting)
                waiting, size = [], 0
    except EdgeError:
        if waiting:
            yield b"".join(waiting)
        raise
    if waiting:
        yield b"".join(waiting)


def write_pieces(fd: int, offset: int, pieces: Iterable[bytes], digest: RunningDigest, *,
                 on_written: Callable[[int], None] = lambda end: None,
                 turn: Any = contextlib.nullcontext()) -> int:
    """Write pieces to a file from `offset` on, hash them meanwhile, and return where they end.

    What came before an error is written. on_written(end) is called after each piece. turn: entered
    around each write.
    """
    with _Behind() as behind:
        for piece in _gather(pieces):
            with turn:
                behind.run(digest.add, fd, offset, piece)
                offset = write_all(fd, offset, piece)
            on_written(offset)
    return offset


def write_all(fd: int, offset: int, data: bytes) -> int:
    """Write data to a file at `offset`; return where it ends."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset, view = offset + written, view[written:]
    return offset


def move_new(source: Place, name: str, target: Place) -> None:
    """Give a file of the source's directory the target's name, which must be free. No race.

    Raises FileExistsError.
    """
    try:
        os.link(name, target.name, src_dir_fd=source.fd, dst_dir_fd=target.fd,
                follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # a file system without hard links: claim the name, then take its place
        os.close(os.open(target.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, 0o600,
                         dir_fd=target.fd))
        os.replace(name, target.name, src_dir_fd=source.fd, dst_dir_fd=target.fd)
    else:
        os.unlink(name, dir_fd=source.fd)


def partial_name(place: Place, key: str) -> str:
    """Return the name of a partial file, which the key tells apart from others."""
    text = f"{place.name}\0{key}".encode(errors="surrogateescape")
    return f".radical-edge-{hashlib.sha256(text).hexdigest()[:32]}.part"


class Partial:
    """A file on its way into a place: beside it, under a name of its own, until it is whole.

    key: names the same partial file again, after a break; "" for one that is new. make: False to
    raise FileMissing when it is not there. Use it in `with`, which closes it, and deletes a new one
    that was not committed.
    """

    def __init__(self, place: Place, key: str = "", *, make: bool = True) -> None:
        self.name = partial_name(place, key or secrets.token_hex(16))
        self._place, self._key = place, key
        flags = os.O_RDWR | _FILE | (os.O_CREAT if make else 0) | (0 if key else os.O_EXCL)
        try:
            self.fd = os.open(self.name, flags, 0o600, dir_fd=place.fd)
        except FileNotFoundError:
            if make:
                raise
            raise FileMissing("upload: none of this name goes to this path: begin it") from None
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() \
                or status.st_nlink != 1:
            os.close(self.fd)
            raise Forbidden(f"path: {self.name!r} beside {place.path!r} is not this edge's own")

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_exc: Any) -> None:
        os.close(self.fd)
        if not self._key:
            self.delete()

    @property
    def status(self) -> os.stat_result:
        """What the system says of it."""
        return os.fstat(self.fd)

    def check_there(self) -> None:
        """Raise Unavailable when it was deleted or committed: it must not be written any more."""
        status = self._place.look(self.name)
        if status is None or _identity(status) != _identity(self.status):
            raise Unavailable("upload: it was ended by another request: look, and try again",
                              headers={"Retry-After": "1"})

    def delete(self) -> None:
        """Delete it, if it is still there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self._place.fd)

    def commit(self, *, overwrite: bool, mode: Optional[int] = None,
               mtime: Optional[float] = None, sync: bool = True) -> os.stat_result:
        """Give it its mode and time, and let it take its place at once; return what is there.

        mode: None for that of the file it replaces, or NEW_MODE. sync: False to leave it to the
        system when it goes to the disk. Raises FileExists.
        """
        place = self._place
        replaced = place.check_free(overwrite)
        if mode is None:
            mode = replaced.st_mode if replaced is not None else NEW_MODE
        os.fchmod(self.fd, mode & 0o777)
        if mtime is not None:
            whole = math.floor(mtime)             # one float has not enough digits for both
            os.utime(self.fd, ns=(time.time_ns(), whole * 10**9 + round((mtime - whole) * 1e9)))
        if sync:
            os.fsync(self.fd)
        if overwrite:
            os.replace(self.name, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd)
        else:
            try:
                move_new(place, self.name, place)
            except FileExistsError:
                # NFS says so as well when it has done it, but its answer was lost
                if _identity(place.require()) != _identity(self.status):
                    raise FileExists(f"{place.path!r} exists already: it was made meanwhile"
                                     ) from None
                self.delete()
        return self.status


def delete_old_partials(place: Place) -> None:
    """Delete the partial files beside a place that nobody went on with for PARTIAL_S."""
    oldest = time.time() - PARTIAL_S
    fd = os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=place.fd)
    try:
        with os.scandir(fd) as entries:
            old = [entry.name for entry in entries if _PARTIAL.fullmatch(entry.name)
                   and entry.stat(follow_symlinks=False).st_mtime < oldest]
        for name in old:
            os.unlink(name, dir_fd=fd)
            log_staging.info("deleted an old partial file beside %r", place.path)
    except OSError as error:                      # not ours to delete or list, or gone
        log_staging.info("old partial files beside %r: %s", place.path, error)
    finally:
        os.close(fd)


# -- small files in a row: for each, the size of a head (4 bytes), the head, and the content

def encode_entry(head: Dict[str, Any], content: bytes = b"") -> bytes:
    """Return one entry of a batch. head: {"path", "type", "mode", "mtime", "sha256"}."""
    encoded = json.dumps({**head, "size": len(content)}).encode()
    return b"%b%b%b" % (struct.pack("!I", len(encoded)), encoded, content)


def parse_entries(pieces: Iterable[bytes]) -> Iterator[Tuple[Dict[str, Any], bytes]]:
    """Yield (head, content) of each entry of a batch, its digest checked.

    Raises BadRequest for a batch that is cut or damaged.
    """
    reader = _Reader(pieces)
    while True:
        prefix = reader.read(4, may_end=True)
        if not prefix:
            return
        size, = struct.unpack("!I", prefix)
        if size > 4 * MAX_PATH + 1024:
            raise BadRequest(f"batch: an entry's head of {size} bytes")
        head = _json_object(reader.read(size).decode("ascii", "replace"))
        parse_file_path(head.get("path"))
        length = head.get("size")
        if not isinstance(length, int) or isinstance(length, bool) or \
                not 0 <= length <= SMALL_FILE:
            raise BadRequest(f"batch: a file has 0 to {SMALL_FILE} bytes")
        content = reader.read(length)
        if head.get("type") == "file" and hashlib.sha256(content).hexdigest() != head.get("sha256"):
            raise BadRequest(f"batch: {head['path']!r} was damaged on its way: send it again")
        yield head, content


class _Reader:
    """Reads so many bytes at a time from pieces of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._buffer, self._at = iter(pieces), b"", 0

    def read(self, size: int, *, may_end: bool = False) -> bytes:
        """Return `size` bytes; b"" at the end if it may be here. Raises BadRequest."""
        found = [self._take(size)]
        left = size - len(found[0])
        while left:
            self._buffer, self._at = next(self._pieces, b""), 0
            if not self._buffer:
                if may_end and left == size:
                    return b""
                raise BadRequest("batch: it ends in the middle of an entry")
            found.append(self._take(left))
            left -= len(found[-1])
        return b"".join(found)

    def _take(self, size: int) -> bytes:
        piece = self._buffer[self._at:self._at + size]
        self._at += len(piece)
        return piece


def parse_mode(value: Any) -> Optional[int]:
    """Return a file mode given as octal text, None for none. Raises Unprocessable."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3,4}", value):
        raise Unprocessable("mode: must be octal digits in a string, such as '0644'")
    return int(value, 8) & 0o777


def parse_mtime(value: Any) -> Optional[float]:
    """Return a time in seconds since the epoch, None for none. Raises Unprocessable."""
    if value is None:
        return None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        seconds = float(value)
        if abs(seconds) < 1e11 and not isinstance(value, bool):
            return seconds
    raise Unprocessable("mtime: must be a number of seconds since the epoch")


def parse_digest(field: str) -> Optional[str]:
    """Return the SHA-256, in hexadecimal, of a Repr-Digest field (RFC 9530); None without one.

    Raises BadRequest when it is malformed.
    """
    match = re.search(r"(?:^|,)\s*sha-256=:([^:]*):", field)
    if match is None:
        return None
    try:
        digest = base64.b64decode(match[1], validate=True)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise BadRequest("Repr-Digest: sha-256 has 32 bytes, in base64 between colons")
    return digest.hex()


def parse_flag(value: Any, field: str) -> bool:
    """Return a flag of a query or a JSON object. Raises Unprocessable."""
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise Unprocessable(f"{field}: {text[:40]!r} is not true or false")
    return text in ("true", "1", "yes")


def parse_upload_name(value: Any) -> str:
    """Return the name that a client gave its upload. Raises Unprocessable."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]{8,128}", value):
        raise Unprocessable("upload: must be a name of 8 to 128 letters, digits, '.', '_' or '-'")
    return value


def parse_sha256(value: Any) -> Optional[str]:
    """Return a SHA-256 in hexadecimal, None for none. Raises Unprocessable."""
    if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise Unprocessable("sha256: must be 64 hexadecimal digits in lower case")
    return value


# -- what an edge does with files

class _Turn:
    """The right to change a partial file, until another request takes it over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()             # held while the file is changed
        self._is_over = False                     # guarded by _lock

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_over:
            self._lock.release()
            raise Unavailable("upload: another request goes on with it: look, and try again",
                              headers={"Retry-After": "1"})

    def __exit__(self, *_exc: Any) -> None:
        self._lock.release()

    def end(self) -> None:
        """Wait for the change that is being made, and allow no more."""
        with self._lock:
            self._is_over = True


class Uploads:
    """Files that come to an edge, in one request or, after a break, in several. Any thread; blocks.

    The partial file itself says how far an upload is: no record is kept beside it. Only its digest
    so far is remembered, or else read again from the file.
    """

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._slots = threading.BoundedSemaphore(MAX_UPLOADS)
        self._lock = threading.Lock()
        # by what a partial file is; guarded by _lock
        self._turns: Dict[Tuple[Any, ...], _Turn] = {}
        # likewise, the oldest first; guarded by _lock
        self._digests: "collections.OrderedDict[Tuple[Any, ...], RunningDigest]" = \
            collections.OrderedDict()
        self._cleaned: Dict[Tuple[int, int], float] = {}         # directories; races do no harm

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of MAX_UPLOADS places. Raises Unavailable."""
        if not self._slots.acquire(blocking=False):
            raise Unavailable(f"{MAX_UPLOADS} uploads are under way here: try again in a moment",
                              headers={"Retry-After": "1"})
        try:
            yield
        finally:
            self._slots.release()

    def put(self, path: str, pieces: Iterable[bytes], *, overwrite: bool, sha256: Optional[str],
            mode: Optional[int] = None, mtime: Optional[float] = None) -> Dict[str, Any]:
        """Make a file of pieces, all of it or nothing; return what describe_done() does."""
        with self.slot(), self._roots.find(path, parents=True) as place, _explained(path):
            place.check_free(overwrite)
            with Partial(place) as partial:
                digest = RunningDigest()
                size = write_pieces(partial.fd, 0, pieces, digest)
                found = digest.finish(partial.fd, size)
                check_same(sha256, found)
                status = partial.commit(overwrite=overwrite, mode=mode, mtime=mtime)
            return describe_done(place, status, found)

    def begin(self, path: str, name: str, size: int, *, overwrite: bool) -> Dict[str, Any]:
        """Begin an upload or find it again; return {"path", "upload", "offset"}: how far it is.

        Raises FileExists, and InsufficientStorage when the disk has no room for the rest.
        """
        with self._roots.find(path, parents=True) as place, _explained(path):
            place.check_free(overwrite)
            self._clean(place)
            with Partial(place, name) as partial, self._claim(partial) as (turn, _), turn:
                if partial.status.st_size > size:
                    os.ftruncate(partial.fd, 0)
                offset = partial.status.st_size
                room = os.fstatvfs(partial.fd)
                if room.f_bavail * room.f_frsize < size - offset:
                    partial.delete()
                    raise InsufficientStorage(f"{place.path!r}: the file system has no room for "
                                              f"{size - offset} bytes more")
            return {"path": place.path, "upload": name, "offset": offset}

    def write(self, path: str, name: str, offset: int, pieces: Iterable[bytes]) -> Dict[str, Any]:
        """Append to an upload, which must be `offset` bytes long; return {"offset"}: its length.

        What arrived before a break is kept. When the disk is full, nothing is. Raises Conflict for
        another offset.
        """
        with self.slot(), self._roots.find(path) as place, _explained(path):
            with Partial(place, name, make=False) as partial, \
                    self._claim(partial) as (turn, digest):
                size = partial.status.st_size
                if size != offset:
                    raise Conflict(f"offset: {size} bytes are here, not {offset}: go on from there")
                try:
                    end = write_pieces(partial.fd, offset, pieces, digest, turn=turn)
                except OSError:
                    partial.delete()
                    raise
            return {"path": place.path, "offset": end}

    def commit(self, path: str, name: str, *, sha256: Optional[str], overwrite: bool,
               mode: Optional[int] = None, mtime: Optional[float] = None) -> Dict[str, Any]:
        """Let an upload that is whole take its place; return what describe_done() does.

        May be repeated: what was done is found out. Raises Unprocessable, and deletes what came,
        when the digest is another.
        """
        with self._roots.find(path) as place, _explained(path):
            done = self._find_done(place, name, sha256)
            if done is not None:
                return done
            with Partial(place, name, make=False) as partial, \
                    self._claim(partial) as (turn, digest), turn:
                found = digest.finish(partial.fd, partial.status.st_size)
                if sha256 not in (None, found):
                    partial.delete()
                check_same(sha256, found)
                status = partial.commit(overwrite=overwrite, mode=mode, mtime=mtime)
            self._forget(partial, status)
            return describe_done(place, status, found)

    def drop(self, path: str, name: str) -> None:
        """Delete what came of an upload."""
        with self._roots.find(path) as place, _explained(path):
            with Partial(place, name, make=False) as partial, \
                    self._claim(partial) as (turn, _), turn:
                partial.delete()

    def offset(self, path: str, name: str) -> Dict[str, Any]:
        """Return {"path", "upload", "offset"}. Raises FileMissing for no such upload."""
        with self._roots.find(path) as place, _explained(path):
            with Partial(place, name, make=False) as partial:
                return {"path": place.path, "upload": name, "offset": partial.status.st_size}

    # -- inside

    @staticmethod
    def _find_done(place: Place, name: str, sha256: Optional[str]) -> Optional[Dict[str, Any]]:
        """Return the answer of a commit that was done before, but never answered; else None."""
        part = partial_name(place, name)
        there, target = place.look(part), place.look()
        if target is None or there is not None and _identity(there) != _identity(target):
            return None
        fd = place.open_file()
        try:
            status = os.fstat(fd)
            found = RunningDigest().finish(fd, status.st_size)
        finally:
            os.close(fd)
        if found != sha256:
            return None
        if there is not None:                     # killed between the two steps of move_new()
            os.unlink(part, dir_fd=place.fd)
        return describe_done(place, status, found)

    @contextlib.contextmanager
    def _claim(self, partial: Partial) -> Iterator[Tuple[_Turn, RunningDigest]]:
        """Give the turn to change a partial file, and its digest so far.

        It ends that of an earlier request, whose client may be gone without anybody's notice.
        """
        key, turn = (partial.name, *_identity(partial.status)), _Turn()
        with self._lock:
            before, digest = self._turns.get(key), self._digests.pop(key, None)
            self._turns[key] = turn
        if before is not None:
            before.end()
        if digest is None or digest.position > partial.status.st_size:
            digest = RunningDigest()
        try:
            partial.check_there()                 # it may have been committed meanwhile
            yield turn, digest
        finally:
            with self._lock:
                if self._turns.get(key) is turn:
                    del self._turns[key]
                    self._digests[key] = digest
                while len(self._digests) > MAX_KNOWN_DIGESTS:
                    self._digests.popitem(last=False)

    def _forget(self, partial: Partial, status: os.stat_result) -> None:
        with self._lock:
            self._digests.pop((partial.name, *_identity(status)), None)

    def _clean(self, place: Place) -> None:
        """Delete old partial files beside a place, but do not look for them all the time."""
        folder, now = _identity(os.fstat(place.fd)), time.monotonic()
        if now - self._cleaned.get(folder, -PARTIAL_S) > 3600:
            if len(self._cleaned) > MAX_KNOWN_DIGESTS:
                self._cleaned.clear()
            self._cleaned[folder] = now
            delete_old_partials(place)


def check_same(wanted: Optional[str], found: str) -> None:
    """Raise Unprocessable when a file's SHA-256 is not the one that its sender has."""
    if wanted not in (None, found):
        raise Unprocessable(f"sha256: what arrived has {found}, not {wanted}: it was changed while "
                            "it was sent, or damaged; send it again")


def describe_done(place: Place, status: os.stat_result, sha256: str) -> Dict[str, Any]:
    """Return {"path", "size", "mode", "mtime", "type", "sha256", "etag"} of a file."""
    return {"path": place.path, **describe_file(status), "sha256": sha256,
            "etag": make_etag(status)}


class Files:
    """What an edge does with the files under its roots. Any thread; blocks."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.uploads = Uploads(roots)
        self._lock = threading.Lock()
        # by what a file is, the oldest first; guarded by _lock
        self._digests: "collections.OrderedDict[Tuple[int, ...], str]" = collections.OrderedDict()

    # -- to look

    def describe(self, path: str, *, follow: bool = True, digest: bool = False) -> Dict[str, Any]:
        """Return {"path", "type", "size", "mode", "mtime", "etag"} and, if asked for, "sha256"."""
        with self.roots.find(path, follow=follow) as place, _explained(path):
            status = place.require()
            told = {"path": place.path, **describe_file(status), "etag": make_etag(status)}
            if digest:
                fd = place.open_file()
                try:
                    status = os.fstat(fd)
                    told = describe_done(place, status, self._digest(fd, status))
                finally:
                    os.close(fd)
            return told

    def list_dir(self, path: str) -> Dict[str, Any]:
        """Return {"path", "entries": [{"name", "type", "size", "mode", "mtime"}]}, by name.

        A link is described as what it leads to, if that may be seen. At most MAX_DIR_ENTRIES; then
        "truncated" is true.
        """
        with self.roots.find(path) as place, _explained(path):
            place.require()
            fd = place.open_dir()
            try:
                names = sorted(name for name in os.listdir(fd) if not _PARTIAL.fullmatch(name))
                entries = [self._describe_entry(place, fd, name)
                           for name in names[:MAX_DIR_ENTRIES]]
            finally:
                os.close(fd)
            told = {"path": place.path, "entries": entries}
            return {**told, "truncated": True} if len(names) > MAX_DIR_ENTRIES else told

    def list_tree(self, path: str) -> Iterator[Dict[str, Any]]:
        """Yield {"path", "type", ...} of all in a directory, then {"end", "entries", "closed"}.

        path: relative to the directory. A link has the "target" that it leads to, of the kind
        describe() returns, if that may be seen. closed: directories that the edge may not list.
        """
        with self.roots.find(path) as place, _explained(path):
            place.require()
            count, closed = 0, []                 # type: int, List[str]
            with contextlib.closing(TreeWalk(place, closed=closed)) as walk:
                for relative, _, _, status in walk:
                    count += 1
                    yield {"path": relative, **self._resolve(place, relative, status)}
            yield {"end": True, "entries": count, "closed": closed}

    def read_tail(self, path: str, *, offset: Optional[int] = None, lines: Optional[int] = None,
                  limit: int = 4096) -> Dict[str, Any]:
        """Return {"path", "text", "offset", "next", "size"}: the end of a file, or what follows.

        offset: where to begin, None for the last `limit` bytes, or `lines` lines of them. An offset
        behind the end begins anew: the file was replaced. next: where to go on. Whole characters.
        """
        with self.roots.find(path) as place, _explained(path):
            fd = place.open_file()
            try:
                size = os.fstat(fd).st_size
                begin = max(0, size - limit) if offset is None else offset if offset <= size else 0
                data = os.pread(fd, limit, begin)
            finally:
                os.close(fd)
            if offset is None:
                skipped = _skip_to_tail(data, lines, begin > 0)
                begin, data = begin + skipped, data[skipped:]
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            text = decoder.decode(data)
            end = begin + len(data) - len(decoder.getstate()[0])
            return {"path": place.path, "text": text, "offset": begin, "next": end, "size": size}

    # -- to read

    def open(self, path: str, request: Optional[Request] = None) -> FileResponse:
        """Return a file as an answer, or the range of it that the request asks for."""
        with self.roots.find(path) as place, _explained(path):
            fd = place.open_file()
            status = os.fstat(fd)
            response = FileResponse(fd, request, headers={
                "x-file-mode": f"{stat.S_IMODE(status.st_mode):04o}",
                "x-file-mtime": repr(status.st_mtime)})
            known = self._get_digest(status)
            if known is not None:
                response.headers["repr-digest"] = encode_digest(bytes.fromhex(known))
            elif response.status_code == 200:
                response.content = _HashedPieces(response.content, os.dup(fd), self._keep_digest)
            return response

    def read(self, path: str) -> Tuple[str, bytes]:
        """Return (path, content) of a file of at most MAX_JSON_FILE bytes."""
        with self.roots.find(path) as place, _explained(path):
            fd = place.open_file()
            with os.fdopen(fd, "rb") as file:
                content = file.read(MAX_JSON_FILE + 1)
            if len(content) > MAX_JSON_FILE:
                raise ContentTooLarge(f"{place.path!r} has more than {MAX_JSON_FILE} bytes: GET "
                                      "file?path= streams it")
            return place.path, content

    def read_batch(self, path: str, names: List[str]) -> Iterator[bytes]:
        """Yield an entry of a batch for each name in a directory that is a small file.

        For another the entry's type is "large" or, with what is wrong, "error".
        """
        for name in names:
            try:
                with self.roots.find(f"{path.rstrip('/')}/{name}") as place, _explained(name):
                    yield self._read_entry(name, place)
            except EdgeError as error:
                yield encode_entry({"path": name, "type": "error", "error": error.detail,
                                    "status": int(error.status)})

    # -- to change

    def write_batch(self, path: str, pieces: Iterable[bytes], *,
                    overwrite: bool) -> Dict[str, Any]:
        """Write the entries of a batch under a directory; return {"written", "unchanged"}.

        Each file is whole or not there. One that is there already with the same content counts as
        unchanged, so that a batch may be sent again. Raises FileExists for another content.
        """
        counts = {"written": 0, "unchanged": 0}
        with self.uploads.slot():
            for head, content in parse_entries(pieces):
                name = parse_relative(head["path"])
                with self.roots.find(f"{path.rstrip('/')}/{name}", parents=True) as place, \
                        _explained(name):
                    counts[write_entry(place, head, content, overwrite)] += 1
        return counts

    def make_dir(self, path: str, *, parents: bool = True) -> Dict[str, Any]:
        """Make a directory; return {"path", "created"}. With parents it may be there already."""
        with self.roots.find(path, parents=parents) as place, _explained(path):
            created = make_dir(place)
            if not created and not parents:
                raise FileExists(f"{place.path!r} exists already")
            return {"path": place.path, "created": created}

    def rename(self, source: str, target: str, *, overwrite: bool) -> Dict[str, Any]:
        """Give a file, a link or a directory another name; return {"path"}: the new one.

        Raises FileExists, and Conflict when the two are on different file systems.
        """
        with self.roots.find(source, follow=False) as old, \
                self.roots.find(target, follow=False, parents=True) as new, _explained(source):
            for place in (old, new):
                status = place.look()
                if status is not None:
                    self.roots.check_movable(status, place.path)
            old_status = old.require()
            if overwrite:
                os.replace(old.name, new.name, src_dir_fd=old.fd, dst_dir_fd=new.fd)
            else:
                self._rename_new(old, new, stat.S_ISDIR(old_status.st_mode))
            return {"path": new.path}

    def delete(self, path: str, *, recursive: bool = False) -> Dict[str, Any]:
        """Delete a file, a link or a directory; return {"path", "deleted": how many}.

        Raises Conflict for a directory that is not empty, unless it is recursive.
        """
        with self.roots.find(path, follow=False) as place, _explained(path):
            status = place.require()
            self.roots.check_movable(status, place.path)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(place.name, dir_fd=place.fd)
                return {"path": place.path, "deleted": 1}
            count = self._empty(place) if recursive else 0
            os.rmdir(place.name, dir_fd=place.fd)
            return {"path": place.path, "deleted": count + 1}

    # -- inside

    def _describe_entry(self, place: Place, fd: int, name: str) -> Dict[str, Any]:
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:                           # it went meanwhile
            return {"name": name, "type": "unknown", "size": None}
        told = self._resolve(place, name, status)
        told.update(told.pop("target", {}))
        return {"name": name, **told}

    def _resolve(self, place: Place, name: str, status: os.stat_result) -> Dict[str, Any]:
        told = describe_file(status)
        if told["type"] == "link":
            with contextlib.suppress(EdgeError):  # it leads to nothing, or out of the roots
                target = self.describe(f"{place.path}/{name}")
                told["target"] = {key: target[key] for key in ("type", "size", "mode", "mtime")}
        return told

    def _read_entry(self, name: str, place: Place) -> bytes:
        with os.fdopen(place.open_file(), "rb") as file:
            status, content = os.fstat(file.fileno()), file.read(SMALL_FILE + 1)
        if len(content) > SMALL_FILE:
            return encode_entry({"path": name, "type": "large"})
        return encode_entry({"path": name, **describe_file(status),
                             "sha256": hashlib.sha256(content).hexdigest()}, content)

    @staticmethod
    def _rename_new(old: Place, new: Place, is_dir: bool) -> None:
        try:
            if not is_dir:
                move_new(old, old.name, new)
                return
            os.mkdir(new.name, dir_fd=new.fd)     # claims the name: a directory may take its place
        except FileExistsError:
            raise FileExists(f"{new.path!r} exists already: ask for overwrite to replace it"
                             ) from None
        try:
            os.rename(old.name, new.name, src_dir_fd=old.fd, dst_dir_fd=new.fd)
        except OSError:
            os.rmdir(new.name, dir_fd=new.fd)
            raise

    @staticmethod
    def _empty(place: Place) -> int:
        """Delete all in a directory; return how many. What is a link is deleted, not followed."""
        count = 0
        with contextlib.closing(TreeWalk(place, on_leave=lambda parent, name: os.rmdir(
                name, dir_fd=parent), partials=True)) as walk:
            for _, parent, name, status in walk:
                count += 1
                if not stat.S_ISDIR(status.st_mode):
                    os.unlink(name, dir_fd=parent)
        return count

    @staticmethod
    def _version(status: os.stat_result) -> Tuple[int, ...]:
        return (*_identity(status), status.st_mtime_ns, status.st_ctime_ns, status.st_size)

    def _get_digest(self, status: os.stat_result) -> Optional[str]:
        with self._lock:
            return self._digests.get(self._version(status))

    def _keep_digest(self, status: os.stat_result, digest: str) -> None:
        with self._lock:
            self._digests[self._version(status)] = digest
            while len(self._digests) > MAX_KNOWN_DIGESTS:
                self._digests.popitem(last=False)

    def _digest(self, fd: int, status: os.stat_result) -> str:
        known = self._get_digest(status)
        if known is None:
            known = RunningDigest().finish(fd, status.st_size)
            if self._version(os.fstat(fd)) != self._version(status):
                raise Conflict("the file was changed while it was read: try again")
            self._keep_digest(status, known)
        return known


class _HashedPieces:
    """A file's pieces on their way out; at the end its digest is known as well.

    It fails when the file was changed meanwhile, so that nobody takes a mixture for a file.
    """

    def __init__(self, pieces: Any, fd: int,
                 keep: Callable[[os.stat_result, str], None]) -> None:
        self._pieces, self._fd, self._keep = pieces, fd, keep
        self._status = os.fstat(fd)
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._hash.update(piece)
            yield piece
        if make_etag(os.fstat(self._fd)) != make_etag(self._status):
            raise Conflict("the file was changed while it was read")
        self._keep(self._status, self._hash.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._pieces.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def parse_relative(value: Any) -> str:
    """Return a path in a tree. Raises Unprocessable for one that leads out of it."""
    path = parse_file_path(value)
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise Unprocessable(f"path: {path!r} is not a plain path in a tree")
    return path


def write_entry(place: Place, head: Dict[str, Any], content: bytes, overwrite: bool) -> str:
    """Write one entry of a batch; return "written" or "unchanged"."""
    mode, mtime = parse_mode(head.get("mode")), parse_mtime(head.get("mtime"))
    if head.get("type") == "dir":
        made = make_dir(place, (0o777 if mode is None else mode) | 0o700)
        return "written" if made else "unchanged"
    if head.get("type") != "file":
        raise Unprocessable("type: must be 'file' or 'dir'")
    try:
        place.check_free(overwrite)
        with Partial(place) as partial:
            write_all(partial.fd, 0, content)
            # not synced: a tree of small files would take a disk's time for each
            partial.commit(overwrite=overwrite, mode=mode, mtime=mtime, sync=False)
    except FileExists:                            # perhaps of this batch, sent before a break
        if not _has_content(place, content):
            raise
        return "unchanged"
    return "written"


def make_dir(place: Place, mode: int = 0o777) -> bool:
    """Make a directory; return False when there is one. Raises FileExists for something else."""
    try:
        os.mkdir(place.name, mode, dir_fd=place.fd)
        return True
    except FileExistsError:                       # perhaps made this moment, for a file in it
        if not stat.S_ISDIR(place.require().st_mode):
            raise FileExists(f"{place.path!r} exists already, and is no directory") from None
        return False


def _has_content(place: Place, content: bytes) -> bool:
    with os.fdopen(place.open_file(), "rb") as file:
        return os.fstat(file.fileno()).st_size == len(content) and file.read() == content


def _skip_to_tail(data: bytes, lines: Optional[int], is_cut: bool) -> int:
    """Return where the last `lines` lines begin, or else the first whole character."""
    if lines is not None:
        at = len(data) - data.endswith(b"\n")
        for _ in range(lines):
            at = data.rfind(b"\n", 0, at)
            if at < 0:
                break
        if at >= 0:
            return at + 1
    at = 0
    while is_cut and at < min(3, len(data)) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


class StagingSession(PluginSession):
    """The JSON forms, with content in base64, as clients of radical.edge 0.2 use them."""

    def __init__(self, sid: str, files: Files) -> None:
        super().__init__(sid)
        self._files = files

    async def put_file(self, filename: Any, content_b64: Any,
                       overwrite: bool = False) -> Dict[str, Any]:
        """Write a file; return {"path", "size"}. Raises FileExists."""
        self._check_active()
        path = _note(parse_file_path(filename, "filename"))
        done = await asyncio.to_thread(self._put, path, content_b64, overwrite)
        return {"path": done["path"], "size": done["size"], "sha256": done["sha256"]}

    async def get_file(self, filename: Any) -> Dict[str, Any]:
        """Return {"path", "size", "content"} of a file of at most MAX_JSON_FILE bytes."""
        self._check_active()
        path = parse_file_path(filename, "filename")
        return await asyncio.to_thread(self._get, path)

    async def list_dir(self, path: Any) -> Dict[str, Any]:
        """Return what Files.list_dir() does."""
        self._check_active()
        return await asyncio.to_thread(self._files.list_dir, parse_file_path(path))

    def _put(self, path: str, content_b64: Any, overwrite: bool) -> Dict[str, Any]:
        try:
            content = base64.b64decode(content_b64, validate=True)
        except (ValueError, TypeError):
            raise Unprocessable("content: must be the file's bytes in base64") from None
        return self._files.uploads.put(path, [content], overwrite=overwrite, sha256=None)

    def _get(self, path: str) -> Dict[str, Any]:
        path, content = self._files.read(path)
        return {"path": path, "size": len(content), "content": base64.b64encode(content).decode()}


# -- the client's side

Progress = Callable[[int, int], None]


class _Patience:
    """Lets a transfer be tried again until nothing has moved for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.on_progress()

    def on_progress(self) -> None:
        """Take notice that something moved."""
        self._end, self._pause = time.monotonic() + self._seconds, 0.1

    def wait(self, error: EdgeError) -> None:
        """Wait a little, or raise the error when it is for good or has lasted too long."""
        passing = error.status in (408, 429, 502, 503, 504) or _is_edge_gone(error)
        if not passing or time.monotonic() > self._end:
            raise error
        log_staging.info("%s; trying again", error)
        time.sleep(self._pause * random.uniform(0.5, 1.5))
        self._pause = min(2 * self._pause, 2.0)


def _is_edge_gone(error: EdgeError) -> bool:
    return error.status == 404 and error.detail.startswith("no edge named")


class _Sender:
    """One file on its way to an edge."""

    def __init__(self, client: "StagingClient", source: Union[str, Path], target: str,
                 overwrite: bool, progress: Optional[Progress]) -> None:
        self._client, self._target, self._overwrite = client, target, overwrite
        self._progress = progress or (lambda done, total: None)
        self._source = os.path.realpath(source)
        self._digest = RunningDigest()
        self._patience = _Patience(client.patience)

    def run(self) -> Dict[str, Any]:
        """Send it, over every break; return what the edge says of it."""
        self._fd = os.open(self._source, os.O_RDONLY | _FILE)
        try:
            self._status = os.fstat(self._fd)
            if not stat.S_ISREG(self._status.st_mode):
                raise Unprocessable(f"src: {self._source!r} is not a regular file")
            # the same for the same file, so that a new process goes on where a killed one was
            text = f"{socket.gethostname()}\0{self._source}\0{_identity(self._status)}\0" \
                f"{make_etag(self._status)}\0{self._target}"
            self._name = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
            return self._try_until_done()
        finally:
            os.close(self._fd)

    def _try_until_done(self) -> Dict[str, Any]:
        damaged = 0
        while True:
            try:
                return self._go_on()
            except Unprocessable as error:
                damaged += 1
                if not error.detail.startswith("sha256:") or damaged > 1:
                    raise
                log_staging.warning("%s: %s; from the start again", self._source, error.detail)
            except EdgeError as error:
                # not as long as was believed: an earlier request had written more
                moved = error.status == 409 and error.detail.startswith("offset:")
                self._patience.wait(Unavailable(error.detail) if moved else error)

    def _go_on(self) -> Dict[str, Any]:
        size, told = self._status.st_size, {"path": self._target, "upload": self._name}
        offset = self._client.ask("upload", {**told, "size": size,
                                             "overwrite": self._overwrite})["offset"]
        while offset < size:
            offset = self._send(offset)
        sha256 = self._digest.finish(self._fd, size)
        if make_etag(os.fstat(self._fd)) != make_etag(self._status):
            raise Conflict(f"{self._source!r} was changed while it was sent")
        done = self._client.ask("upload/commit", {
            **told, "sha256": sha256, "overwrite": self._overwrite,
            "mode": f"{stat.S_IMODE(self._status.st_mode):04o}", "mtime": self._status.st_mtime})
        if done["sha256"] != sha256:
            raise BadGateway(f"{self._target!r} is another file than the one that was sent")
        self._progress(size, size)
        return done

    def _send(self, offset: int) -> int:
        end = min(self._status.st_size, offset + self._client.segment)
        with _Behind() as behind:
            part = _Part(self._fd, offset, end, functools.partial(self._on_read, behind),
                         is_signed=self._client.is_signed)
            reply = self._client.send("PUT", "upload", content=part, timeout=STALL_S,
                                      headers={"Content-Length": str(end - offset)},
                                      path=self._target, upload=self._name, offset=offset)
        if reply.status_code == 413 and self._client.shorten():
            return offset
        self._patience.on_progress()
        return self._client.value(reply)["offset"]

    def _on_read(self, behind: _Behind, offset: int, piece: bytes) -> None:
        behind.run(self._digest.add, self._fd, offset, piece)
        self._patience.on_progress()
        self._progress(offset + len(piece), self._status.st_size)


class _Part:
    """The bytes of a file from `begin` to `end`, for http.client to read.

    on_read(offset, piece) is called for what is read to be sent. is_signed: whether all is read
    once before that, for the signature.
    """

    def __init__(self, fd: int, begin: int, end: int, on_read: Callable[[int, bytes], None], *,
                 is_signed: bool) -> None:
        self._fd, self._at, self._end = fd, begin, end
        self._on_read, self._is_silent = on_read, is_signed

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def seek(self, offset: int) -> None:
        """Go back: what is read from now on is sent."""
        self._at, self._is_silent = offset, False

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes more. Raises Conflict when the file became shorter."""
        piece = os.pread(self._fd, min(size, self._end - self._at), self._at)
        if not piece and self._at < self._end:
            raise Conflict("src: the file became shorter while it was sent")
        if piece and not self._is_silent:
            self._on_read(self._at, piece)
        self._at += len(piece)
        return piece


class _Receiver:
    """One file on its way from an edge into a place here."""

    def __init__(self, client: "StagingClient", source: str, place: Place, overwrite: bool,
                 progress: Optional[Progress]) -> None:
        self._client, self._source, self._place = client, source, place
        self._overwrite, self._progress = overwrite, progress or (lambda done, total: None)
        self._patience = _Patience(client.patience)
        self._damaged = 0

    def run(self) -> Dict[str, Any]:
        """Fetch it, over every break; return what is here then."""
        self._place.check_free(self._overwrite)
        delete_old_partials(self._place)
        while True:
            try:
                return self._fetch(self._client.stat(self._source))
            except PreconditionFailed:
                log_staging.info("%r was changed: from the start again", self._source)
                self._patience.wait(Unavailable(f"{self._source!r} is changed all the time"))
            except EdgeError as error:
                self._patience.wait(error)

    def _fetch(self, told: Dict[str, Any]) -> Dict[str, Any]:
        if told["type"] != "file":
            raise Unprocessable(f"path: {self._source!r} is not a regular file")
        key = f"{self._client.url}\0{self._source}\0{told['etag']}"
        with Partial(self._place, key) as partial:
            size, digest = told["size"], RunningDigest()
            if partial.status.st_size > size:
                os.ftruncate(partial.fd, 0)
            while partial.status.st_size < size:
                self._receive(partial, digest, told)
            found = digest.finish(partial.fd, size)
            if not self._is_right(found, told):
                partial.delete()
                raise Unavailable(f"{self._source!r} was damaged on its way")
            status = partial.commit(overwrite=self._overwrite, mode=parse_mode(told["mode"]),
                                    mtime=told["mtime"])
        self._progress(size, size)
        return describe_done(self._place, status, found)

    def _is_right(self, found: str, told: Dict[str, Any]) -> bool:
        """Compare the digests of both ends; only once is a difference worth another try."""
        there = self._client.stat(self._source, digest=True)
        if there["etag"] != told["etag"]:
            raise PreconditionFailed(f"{self._source!r} was changed while it was fetched")
        if there["sha256"] != found:
            self._damaged += 1
            if self._damaged > 1:
                raise EdgeError(f"{self._source!r}: what arrived is damaged, {found} and not "
                                f"{there['sha256']}")
        return there["sha256"] == found

    def _receive(self, partial: Partial, digest: RunningDigest, told: Dict[str, Any]) -> None:
        offset = partial.status.st_size
        end = min(told["size"], offset + self._client.segment)
        headers = {"If-Match": told["etag"], "Range": f"bytes={offset}-{end - 1}"}
        if (offset, end) == (0, told["size"]):    # whole: the edge takes its digest on the way
            del headers["Range"]
        try:
            with self._client.stream("file", headers=headers, path=self._source) as pieces:
                write_pieces(partial.fd, offset, pieces, digest,
                             on_written=self._on_written(told["size"]))
        except ContentTooLarge:
            if not self._client.shorten():
                raise
        if partial.status.st_size > told["size"]:
            raise BadGateway(f"{self._source!r}: more came than was asked for")

    def _on_written(self, total: int) -> Callable[[int], None]:
        def on_written(end: int) -> None:
            self._patience.on_progress()
            self._progress(end, total)
        return on_written


class _Jobs:
    """Runs the parts of a transfer in a few threads, so many at a time. In `with`."""

    THREADS = 4

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(self.THREADS, "staging")
        self._pending: Set["concurrent.futures.Future[Any]"] = set()

    def __enter__(self) -> "_Jobs":
        return self

    def __exit__(self, kind: Any, *_exc: Any) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            for future in self._pending:
                future.cancel()
            self._pool.shutdown()

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Run `function(*args)`; raise what an earlier one has raised."""
        self._wait(2 * self.THREADS)
        self._pending.add(self._pool.submit(function, *args))

    def _wait(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            done, self._pending = concurrent.futures.wait(
                self._pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                future.result()


class _Tree:
    """What is known of a tree on its way. The threads of _Jobs add to it."""

    def __init__(self, progress: Optional[Progress]) -> None:
        self._lock = threading.Lock()
        self._progress = progress or (lambda done, total: None)
        self._files = self._size = self._total = 0               # guarded by _lock
        self._skipped: List[str] = []             # guarded by _lock

    def skip(self, name: str) -> None:
        """Leave out what is neither a file nor a directory, nor a link to a file."""
        with self._lock:
            self._skipped.append(name)

    def expect(self, size: int) -> None:
        """Take notice of a file that will come."""
        with self._lock:
            self._total += size

    def add(self, files: int, size: int) -> None:
        """Take notice of files that have arrived."""
        with self._lock:
            self._files += files
            self._size += size
            self._progress(self._size, self._total)

    def describe(self, path: str) -> Dict[str, Any]:
        """Return {"path", "files", "size", "skipped"}."""
        return {"path": path, "files": self._files, "size": self._size, "skipped": self._skipped}


class _Batch:
    """Names that fill up until they are worth a request."""

    def __init__(self, send: Callable[[List[Any]], None]) -> None:
        self._send, self._items, self._size = send, [], 0        # type: Any, List[Any], int

    def add(self, item: Any, size: int) -> None:
        """Add something of `size` bytes."""
        self._items.append(item)
        self._size += size
        if len(self._items) >= BATCH_FILES or self._size >= BATCH_SIZE:
            self.flush()

    def flush(self) -> None:
        """Send what there is."""
        items, self._items, self._size = self._items, [], 0
        if items:
            self._send(items)


class StagingClient(PluginClient):
    """A program's access to an edge's files.

    A transfer goes on by itself over lost connections and restarts, until nothing has moved for
    `patience` seconds. progress(done, total) is called with bytes; of a tree, total grows while it
    is looked through. Paths on the edge are absolute or relative to the home directory there.
    Errors are EdgeError; FileExists and FileMissing are the builtin ones of that kind as well.
    With an edge of radical.edge 0.2 put(), get() and list() work, for files of MAX_OLD_FILE bytes
    and without mode and time; all else raises OldEdge.
    """

    patience = 60.0
    SHORT_SEGMENT = 4 * 1024 * 1024       # bytes in one request, where wire version 1 takes part

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_signed = self._http.is_signing
        # what is signed is read twice: the second time from memory
        self.segment = self.SHORT_SEGMENT if self.is_signed else sys.maxsize

    def register_session(self, **kwargs: Any) -> None:
        """Make a session on the edge."""
        super().register_session(**kwargs)
        if self._http.get("/health").is_error:    # a bridge of radical.edge has no such route
            self.shorten()                        # and would make one message of a whole file

    def put(self, src: Union[str, Path], dst: str, overwrite: bool = False, *,
            progress: Optional[Progress] = None) -> Dict[str, Any]:
        """Send a file, or a directory with all that is in it; return {"path", "size", ...}.

        Mode and time are kept. Raises FileExists, and the builtin FileNotFoundError.
        """
        if os.path.isdir(src):
            return self.put_tree(src, dst, overwrite, progress=progress)
        try:
            return _Sender(self, src, dst, overwrite, progress).run()
        except OldEdge:
            return self._put_json(src, dst, overwrite, progress)

    def get(self, src: str, dst: Union[str, Path], overwrite: bool = False, *,
            progress: Optional[Progress] = None) -> Dict[str, Any]:
        """Fetch a file, or a directory with all that is in it; return {"path", "size", ...}."""
        try:
            if self._retry(self.stat, src)["type"] == "dir":
                return self.get_tree(src, dst, overwrite, progress=progress)
        except OldEdge:
            return self._get_json(src, dst, overwrite, progress)
        with local_place(dst) as place, _explained(place.path):
            return _Receiver(self, src, place, overwrite, progress).run()

    def put_tree(self, src: Union[str, Path], dst: str, overwrite: bool = False, *,
                 progress: Optional[Progress] = None) -> Dict[str, Any]:
        """Send a directory; return {"path", "files", "size", "skipped"}.

        A link to a file is sent as that file; other links and special files are skipped. A file
        that is there already with the same content is not an error, so that it can be repeated.
        """
        tree, top = _Tree(progress), os.path.realpath(src)
        path = self._retry(self.mkdir, dst)["path"]
        with local_place(top) as place, _Jobs() as jobs, _explained(top):
            batch = _Batch(lambda items: jobs.run(self._send_batch, tree, top, path, items,
                                                  overwrite))
            closed: List[str] = []
            with contextlib.closing(TreeWalk(place, closed=closed)) as walk:
                for name, _, _, status in walk:
                    self._put_one(tree, batch, jobs, (top, name, status, path, overwrite))
            batch.flush()
            for name in closed:
                tree.skip(name)
        return tree.describe(path)

    def get_tree(self, src: str, dst: Union[str, Path], overwrite: bool = False, *,
                 progress: Optional[Progress] = None) -> Dict[str, Any]:
        """Fetch a directory; return {"path", "files", "size", "skipped"}. See put_tree()."""
        tree, top = _Tree(progress), os.path.realpath(os.path.expanduser(os.fspath(dst)))
        os.makedirs(top, exist_ok=True)
        files = Files(Roots([top]))               # whatever the edge says, nothing gets out of it
        source = self._retry(self.stat, src)["path"]
        with _Jobs() as jobs:
            batch = _Batch(lambda items: jobs.run(self._fetch_batch, tree, files, source, top,
                                                  items, overwrite))
            for entry in self._retry(self._list_tree, source):
                name, told = parse_relative(entry["path"]), entry.get("target", entry)
                if told["type"] == "file" and told["size"] > SMALL_FILE:
                    tree.expect(told["size"])
                    jobs.run(self._fetch_one, tree, files, source, top, name, overwrite)
                elif told["type"] == "file":
                    tree.expect(told["size"])
                    batch.add(name, told["size"])
                elif entry["type"] == "dir":
                    files.make_dir(f"{top}/{name}")
                else:
                    tree.skip(name)
            batch.flush()
        return tree.describe(top)

    def list(self, path: str) -> Dict[str, Any]:
        """Return {"path", "entries": [{"name", "type", "size", "mode", "mtime"}]}."""
        try:
            return self.value(self.send("GET", "list", path=path))
        except OldEdge:                           # without mode and mtime
            return self.ask(f"list/{self._require_session()}", {"path": _old_path(path)})

    def stat(self, path: str, *, follow: bool = True, digest: bool = False) -> Dict[str, Any]:
        """Return {"path", "type", "size", "mode", "mtime", "etag"}, and "sha256" with `digest`."""
        return self.value(self.send("GET", "stat", path=path, follow=follow, digest=digest))

    def mkdir(self, path: str, *, parents: bool = True) -> Dict[str, Any]:
        """Make a directory; return {"path", "created"}."""
        return self.ask("mkdir", {"path": path, "parents": parents})

    def rename(self, src: str, dst: str, overwrite: bool = False) -> Dict[str, Any]:
        """Rename what is on the edge; return {"path"}. Raises FileExists."""
        return self.ask("rename", {"src": src, "dst": dst, "overwrite": overwrite})

    def delete(self, path: str, *, recursive: bool = False) -> Dict[str, Any]:
        """Delete a file or a directory; return {"path", "deleted"}."""
        return self.ask("delete", {"path": path, "recursive": recursive})

    def tail(self, path: str, *, lines: Optional[int] = None, bytes: Optional[int] = None,
             offset: Optional[int] = None, wait: float = 0) -> Dict[str, Any]:
        """Return {"path", "text", "offset", "next", "size"}: a file's end, or what follows offset.

        wait: seconds to wait for something behind the offset.
        """
        given = {"lines": lines, "bytes": bytes, "offset": offset, "wait": int(wait) or None}
        return self.value(self.send("GET", "tail", path=path, **{
            name: value for name, value in given.items() if value is not None}))

    def follow(self, path: str, *, lines: int = 10) -> Iterator[str]:
        """Yield the last lines of a file, and then, for ever, what is appended to it."""
        told = self.tail(path, lines=lines)
        while True:
            if told["text"]:
                yield told["text"]
            told = self._retry(self.tail, path, offset=told["next"], wait=20,
                               bytes=MAX_TAIL_READ)

    # -- for the parts of a transfer

    @property
    def url(self) -> str:
        """The plugin's path on the bridge."""
        return self._base_url

    def ask(self, route: str, body: Dict[str, Any]) -> Any:
        """Return what a POST route answers to a JSON object."""
        # in ASCII: names that are not UTF-8 have no other form in JSON
        return self.value(self._http.post(self._url(route), content=json.dumps(body).encode(),
                                          headers={"Content-Type": "application/json"}))

    def send(self, method: str, route: str, *, content: Any = None,
             headers: Optional[Dict[str, str]] = None, timeout: Optional[float] = None, path: str,
             **query: Any) -> HttpResponse:
        """Send a request about a path; return its reply, whatever the status."""
        return self._http.request(method, self._url(route), content=content, headers=headers,
                                  params=_encode_query(path, query), timeout=timeout)

    @contextlib.contextmanager
    def stream(self, route: str, *, method: str = "GET", headers: Optional[Dict[str, str]] = None,
               content: Any = None, path: str) -> Iterator[Iterator[bytes]]:
        """Give the pieces of an answer. Raises EdgeError, Unavailable when it breaks off."""
        with self._http.stream(method, self._url(route), headers=headers, content=content,
                               params=_encode_query(path, {}), timeout=STALL_S) as reply:
            yield _read_reply(reply)

    def shorten(self) -> bool:
        """Send and fetch in short segments from now on; False when they are short already."""
        was, self.segment = self.segment, self.SHORT_SEGMENT
        return was != self.SHORT_SEGMENT

    @staticmethod
    def value(reply: HttpResponse) -> Any:
        """Return a reply's JSON value. Raises EdgeError, FileExists, FileMissing."""
        try:
            return reply.raise_for_status().json()
        except EdgeError as error:
            raise _sharpen(error) from None

    # -- inside

    def _put_json(self, src: Union[str, Path], dst: str, overwrite: bool,
                  progress: Optional[Progress]) -> Dict[str, Any]:
        with open(src, "rb") as file:
            content = file.read(MAX_OLD_FILE + 1)
        if len(content) > MAX_OLD_FILE:
            raise ContentTooLarge(f"src: an edge of radical.edge 0.2 takes {MAX_OLD_FILE} bytes")
        done = self.ask(f"put/{self._require_session()}", {
            "filename": _old_path(dst), "content": base64.b64encode(content).decode(),
            "overwrite": overwrite})
        if progress is not None:
            progress(len(content), len(content))
        return done

    def _get_json(self, src: str, dst: Union[str, Path], overwrite: bool,
                  progress: Optional[Progress]) -> Dict[str, Any]:
        told = self.ask(f"get/{self._require_session()}", {"filename": _old_path(src)})
        try:
            content = base64.b64decode(told["content"], validate=True)
        except (KeyError, TypeError, ValueError):
            raise BadGateway(f"{src!r}: the answer has no content in base64") from None
        path = os.path.realpath(os.path.expanduser(os.fspath(dst)))
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        done = Files(Roots([folder])).uploads.put(path, [content], overwrite=overwrite, sha256=None)
        if progress is not None:
            progress(len(content), len(content))
        return done

    def _retry(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        patience = _Patience(self.patience)
        while True:
            try:
                return function(*args, **kwargs)
            except EdgeError as error:
                patience.wait(error)

    def _put_one(self, tree: _Tree, batch: _Batch, jobs: _Jobs,
                 part: Tuple[str, str, os.stat_result, str, bool]) -> None:
        top, name, status, path, overwrite = part
        if stat.S_ISLNK(status.st_mode):
            with contextlib.suppress(OSError):    # it leads nowhere
                target = os.stat(f"{top}/{name}")
                status = target if stat.S_ISREG(target.st_mode) else status
        if stat.S_ISDIR(status.st_mode):
            batch.add((name, None), 0)
        elif not stat.S_ISREG(status.st_mode):
            tree.skip(name)
        elif status.st_size > SMALL_FILE:
            tree.expect(status.st_size)
            jobs.run(self._send_one, tree, f"{top}/{name}", f"{path}/{name}", overwrite)
        else:
            tree.expect(status.st_size)
            batch.add((name, status), status.st_size)

    def _send_one(self, tree: _Tree, source: str, target: str, overwrite: bool) -> None:
        try:
            size = _Sender(self, source, target, overwrite, None).run()["size"]
        except FileExists:
            there = self._retry(self.stat, target, digest=True)
            with open(source, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if there.get("sha256") != RunningDigest().finish(file.fileno(), size):
                    raise
        tree.add(1, size)

    def _send_batch(self, tree: _Tree, top: str, path: str, items: List[Any],
                    overwrite: bool) -> None:
        entries, size = [], 0
        for name, status in items:
            content = b"" if status is None else _read_small(f"{top}/{name}")
            head = {"path": name, "type": "dir"} if status is None else {
                "path": name, **describe_file(status),
                "sha256": hashlib.sha256(content).hexdigest()}
            entries.append(encode_entry(head, content))
            size += len(content)
        params = _encode_query(path, {"overwrite": overwrite})
        self._retry(lambda: self.value(self._http.post(
            self._url("files/write"), content=b"".join(entries), params=params)))
        tree.add(sum(status is not None for _, status in items), size)

    def _list_tree(self, path: str) -> List[Dict[str, Any]]:
        with self.stream("tree", path=path) as pieces:
            lines = b"".join(pieces).splitlines()
        entries = [json.loads(line) for line in lines]
        last = entries.pop() if entries else {}
        if not last.get("end"):
            raise Unavailable("the list of the tree was cut short")
        return [*entries, *({"path": path, "type": "closed"} for path in last.get("closed", ()))]

    def _fetch_one(self, tree: _Tree, files: Files, source: str, top: str, name: str,
                   overwrite: bool) -> None:
        with files.roots.find(f"{top}/{name}", parents=True) as place, _explained(place.path):
            if not self._is_here(place, f"{source}/{name}", overwrite):
                _Receiver(self, f"{source}/{name}", place, overwrite, None).run()
            tree.add(1, place.require().st_size)

    def _is_here(self, place: Place, source: str, overwrite: bool) -> bool:
        """Whether the very file is here already, from an earlier attempt."""
        if overwrite or place.look() is None:
            return False
        fd = place.open_file()
        try:
            found = RunningDigest().finish(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        return self._retry(self.stat, source, digest=True)["sha256"] == found

    def _fetch_batch(self, tree: _Tree, files: Files, source: str, top: str, names: List[str],
                     overwrite: bool) -> None:
        self._retry(self._fetch_batch_once, tree, files, source, top, names, overwrite)
        for name in names:                        # it has grown meanwhile
            self._fetch_one(tree, files, source, top, name, overwrite)

    def _fetch_batch_once(self, tree: _Tree, files: Files, source: str, top: str,
                          names: List[str], overwrite: bool) -> None:
        """Fetch files; take those that came off `names`, so that the rest may be tried again."""
        body = json.dumps({"path": source, "names": names}).encode()
        with self.stream("files/read", method="POST", path=source, content=body,
                         headers={"Content-Length": str(len(body))}) as pieces:
            for head, content in parse_entries(pieces):
                if head.get("type") == "error":
                    raise _sharpen(EdgeError(str(head.get("error")), head.get("status")))
                if head["path"] not in names:
                    raise BadGateway(f"{head['path']!r} was not asked for")
                if head.get("type") == "file":
                    self._keep(files, top, head, content, overwrite)
                    names.remove(head["path"])
                    tree.add(1, len(content))

    @staticmethod
    def _keep(files: Files, top: str, head: Dict[str, Any], content: bytes,
              overwrite: bool) -> None:
        path = f"{top}/{parse_relative(head['path'])}"
        with files.roots.find(path, parents=True) as place, _explained(path):
            write_entry(place, head, content, overwrite)


def _encode_query(path: str, query: Dict[str, Any]) -> Dict[str, Any]:
    return {"path": os.fsencode(path), **query}


def _read_small(path: str) -> bytes:
    with open(path, "rb") as file:
        content = file.read(SMALL_FILE + 1)
    if len(content) > SMALL_FILE:
        raise Conflict(f"{path!r} was changed while it was sent")
    return content


def _read_reply(reply: Any) -> Iterator[bytes]:
    """Yield a reply's body. Raises Unavailable when it breaks off."""
    expected, got = reply.headers.get("Content-Length"), 0
    while True:
        try:
            piece = reply.read(COPY_SIZE)
        except http_troubles() as error:
            raise Unavailable(f"the connection was lost: {error}") from None
        if not piece:
            break
        got += len(piece)
        yield piece
    if expected is not None and got < int(expected):
        raise Unavailable("the connection was lost")


def _old_path(path: str) -> str:
    """Return a path as radical.edge 0.2 takes it: what is relative is so to the home directory."""
    return path if path.startswith(("/", "~")) else f"~/{path}"


def _sharpen(error: EdgeError) -> EdgeError:
    """Return the error, as the builtin of its kind as well where there is one."""
    if is_of_old_edge(error):
        return OldEdge("an edge of radical.edge 0.2 has put(), get() and list(), and for single "
                       "files alone", request_id=error.request_id)
    if error.status == 409 and re.search("exists already|already exists", error.detail):
        cls: Type[EdgeError] = FileExists
    elif error.status == 404 and not _is_edge_gone(error):
        cls = FileMissing
    else:
        return error
    return cls(error.detail, request_id=error.request_id)


class PluginStaging(Plugin):
    """Moves files to and from the edge's machine, under the roots that it allows.

    A session is needed for the JSON forms alone: what the others do is known by path and by the
    name of the upload, so that it goes on over every restart.
    """

    plugin_name = "staging"
    session_class = StagingSession
    client_class = StagingClient
    uses_roots = True
    version = "0.0.1"
    ui_config = {"icon": "📁", "title": "File Staging",
                 "description": "Transfer files between this machine and the edge's."}

    def __init__(self, app: Any, instance_name: Optional[str] = None) -> None:
        super().__init__(app, instance_name)
        roots = app.state.options.get("staging_roots") or ["~", _temporary_folder()]
        self._files = Files(Roots(roots, [str(home_dir()), str(app.state.state_dir)]))
        self.add_route_post("put/{sid}", self.put_endpoint)
        self.add_route_post("get/{sid}", self.get_endpoint)
        self.add_route_post("list/{sid}", self.list_endpoint)

    def _create_session(self, sid: str) -> PluginSession:
        return StagingSession(sid, self._files)

    # -- JSON forms

    async def put_endpoint(self, request: Request) -> Any:
        """Write {"filename", "content" in base64, "overwrite"}; answer {"path", "size"}."""
        body = await request.json_object()
        return _reply(await self._forward(
            request.path_params["sid"], StagingSession.put_file, _named(body), body.get("content"),
            parse_flag(body.get("overwrite", False), "overwrite")))

    async def get_endpoint(self, request: Request) -> Any:
        """Answer {"path", "size", "content" in base64} of the file {"filename"}."""
        body = await request.json_object()
        return _reply(await self._forward(request.path_params["sid"], StagingSession.get_file,
                                          _named(body)))

    async def list_endpoint(self, request: Request) -> Any:
        """Answer {"path", "entries"} of the directory {"path"}."""
        body = await request.json_object()
        return _reply(await self._forward(request.path_params["sid"], StagingSession.list_dir,
                                          _named(body)))

    # -- whole files

    @get("file")
    def get_file(self, request: Request) -> Any:
        """Answer the file ?path, or a range of it; If-Match for this version alone."""
        check_may_read(request)
        return self._files.open(_parse_query(request)["path"], request)

    @put("file")
    def put_file(self, request: Request) -> Any:
        """Make the body the file ?path (&overwrite, mode, mtime), checked by Repr-Digest."""
        query = _parse_query(request)
        if "content-range" in request.headers:
            raise BadRequest("Content-Range: a file is put whole here: begin an upload to go on")
        fields = request.headers
        done = self._files.uploads.put(
            query["path"], request.iter_body(), overwrite=query["overwrite"], mode=query["mode"],
            mtime=query["mtime"], sha256=parse_digest(
                fields.get("repr-digest") or fields.get("content-digest", "")))
        return _reply(done, 201, {"etag": done["etag"],
                                  "repr-digest": encode_digest(bytes.fromhex(done["sha256"]))})

    @delete("file")
    def delete_file(self, request: Request) -> Any:
        """Delete ?path; a directory that is not empty with &recursive."""
        query = _parse_query(request)
        return _reply(self._files.delete(query["path"], recursive=query["recursive"]))

    # -- uploads that go on after a break

    @repeatable
    @post("upload")
    def begin_upload(self, request: Request) -> Any:
        """Begin or resume {"path", "upload", "size", "overwrite"}; answer {"offset"}."""
        body = _parse_path_body(request)
        size = body.get("size", 0)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise Unprocessable("size: must be the file's number of bytes")
        return _reply(self._files.uploads.begin(body["path"], parse_upload_name(body.get("upload")),
                                                size, overwrite=body["overwrite"]))

    @get("upload")
    def get_upload(self, request: Request) -> Any:
        """Answer {"offset"}: how far the upload ?path&upload is."""
        query = _parse_query(request)
        return _reply(self._files.uploads.offset(query["path"],
                                                 parse_upload_name(query.get("upload"))))

    @put("upload")
    def write_upload(self, request: Request) -> Any:
        """Append the body to the upload ?path&upload, &offset bytes long; answer {"offset"}."""
        query = _parse_query(request)
        return _reply(self._files.uploads.write(
            query["path"], parse_upload_name(query.get("upload")), _parse_count(query, "offset", 0),
            request.iter_body()))

    @delete("upload")
    def drop_upload(self, request: Request) -> Any:
        """Give up the upload ?path&upload."""
        query = _parse_query(request)
        self._files.uploads.drop(query["path"], parse_upload_name(query.get("upload")))
        return _reply({"path": query["path"]})

    @repeatable
    @post("upload/commit")
    def commit_upload(self, request: Request) -> Any:
        """Let {"path", "upload", "sha256", "overwrite", "mode", "mtime"} take its place."""
        body = _parse_path_body(request)
        return _reply(self._files.uploads.commit(
            body["path"], parse_upload_name(body.get("upload")), overwrite=body["overwrite"],
            sha256=parse_sha256(body.get("sha256")), mode=parse_mode(body.get("mode")),
            mtime=parse_mtime(body.get("mtime"))))

    # -- trees

    @get("tree")
    def get_tree(self, request: Request) -> Any:
        """Answer what is in the directory ?path, at all levels: a JSON object a line."""
        entries = self._files.list_tree(_parse_query(request)["path"])
        first = next(entries)                     # what is wrong with the path shows now
        lines = (json.dumps(entry).encode() + b"\n" for entry in itertools.chain([first], entries))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @post("files/read")
    def read_files(self, request: Request) -> Any:
        """Answer small files of {"path", "names"} in a row; see encode_entry()."""
        body = _parse_path_body(request)
        names = body.get("names")
        if not isinstance(names, list) or len(names) > BATCH_FILES:
            raise Unprocessable(f"names: must be a list of at most {BATCH_FILES} paths")
        names = [parse_relative(name) for name in names]
        return StreamingResponse(self._files.read_batch(body["path"], names))

    @repeatable
    @post("files/write")
    def write_files(self, request: Request) -> Any:
        """Write small files in a row, see encode_entry(), under ?path (&overwrite)."""
        query = _parse_query(request)
        return _reply(self._files.write_batch(query["path"], request.iter_body(),
                                              overwrite=query["overwrite"]))

    # -- names

    @get("stat")
    def get_stat(self, request: Request) -> Any:
        """Answer what is at ?path (&follow=false for a link itself, &digest=true for SHA-256)."""
        query = _parse_query(request)
        if query["digest"]:
            check_may_read(request)
        return _reply(self._files.describe(query["path"], follow=query["follow"],
                                           digest=query["digest"]))

    @get("list")
    def get_list(self, request: Request) -> Any:
        """Answer {"path", "entries"} of the directory ?path."""
        return _reply(self._files.list_dir(_parse_query(request)["path"]))

    @get("tail")
    async def get_tail(self, request: Request) -> Any:
        """Answer the end of the file ?path: the last &bytes or &lines, or what follows &offset.

        With &wait seconds the answer waits for something behind the offset.
        """
        check_may_read(request)
        query = _parse_query(request)
        wait, lines = _parse_count(query, "wait", 0), _parse_count(query, "lines", None)
        limit = _parse_count(query, "bytes", MAX_TAIL_READ if lines else 4096)
        read = functools.partial(self._files.read_tail, query["path"], lines=lines,
                                 limit=min(limit, MAX_TAIL_READ),
                                 offset=_parse_count(query, "offset", None))
        end = time.monotonic() + min(wait, MAX_TAIL_WAIT)
        while True:
            told = await asyncio.to_thread(read)
            if told["text"] or time.monotonic() >= end:
                return _reply(told)
            await asyncio.sleep(TAIL_POLL_S)

    @post("mkdir")
    def make_dir(self, request: Request) -> Any:
        """Make the directory {"path", "parents": true}; answer {"path", "created"}."""
        body = _parse_path_body(request)
        return _reply(self._files.make_dir(body["path"], parents=parse_flag(
            body.get("parents", True), "parents")))

    @post("rename")
    def rename(self, request: Request) -> Any:
        """Rename {"src"} to {"dst"}, over what is there with {"overwrite"}; answer {"path"}."""
        body = request.parse_json()
        if not isinstance(body, dict):
            raise Unprocessable("body: must be a JSON object, {...}")
        return _reply(self._files.rename(
            _note(parse_file_path(body.get("src"), "src"), "src"),
            _note(parse_file_path(body.get("dst"), "dst"), "dst"),
            overwrite=parse_flag(body.get("overwrite", False), "overwrite")))

    @post("delete")
    def delete_path(self, request: Request) -> Any:
        """Delete {"path"}; a directory that is not empty with {"recursive"}."""
        body = _parse_path_body(request)
        return _reply(self._files.delete(body["path"], recursive=parse_flag(
            body.get("recursive", False), "recursive")))


def check_may_read(request: Request) -> None:
    """Raise Forbidden for a token that may only look: names and sizes, but no contents."""
    if request.scope == "read":
        raise Forbidden("a token of scope 'read' may list files, not read them: use a client's")


def _reply(value: Any, status: int = 200, headers: Optional[Dict[str, str]] = None) -> Response:
    # in ASCII: names that are not UTF-8 have no other form in JSON
    return Response(json.dumps(value).encode(), status, headers, "application/json")


def _note(path: str, name: str = "path") -> str:
    """Let the audit log say which path it was; return it."""
    note_for_audit(**{name: path.encode(errors="backslashreplace").decode()})
    return path


def _named(body: Dict[str, Any]) -> Any:
    return next((body[name] for name in ("filename", "path") if name in body), None)


def _parse_query(request: Request) -> Dict[str, Any]:
    """Return the query, its path in bytes that need not be UTF-8, and what is not there."""
    pairs = urllib.parse.parse_qsl(request.query, keep_blank_values=True, max_num_fields=100,
                                   errors="surrogateescape")
    query: Dict[str, Any] = dict(pairs)
    query["path"] = _note(parse_file_path(query.get("path")))
    for name, default in (("overwrite", False), ("recursive", False), ("digest", False),
                          ("follow", True)):
        query[name] = parse_flag(query.get(name, default), name)
    query["mode"], query["mtime"] = parse_mode(query.get("mode")), parse_mtime(query.get("mtime"))
    return query


def _parse_count(query: Dict[str, Any], name: str, default: Optional[int]) -> Any:
    text = query.get(name)
    if text is not None and not re.fullmatch(r"[0-9]{1,18}", text):
        raise Unprocessable(f"{name}: {text[:40]!r} is not a whole number of 0 or more")
    return default if text is None else int(text)


def _parse_path_body(request: Request) -> Dict[str, Any]:
    body = request.parse_json()
    if not isinstance(body, dict):
        raise Unprocessable("body: must be a JSON object, {...}")
    return {**body, "path": _note(parse_file_path(body.get("path"))),
            "overwrite": parse_flag(body.get("overwrite", False), "overwrite")}


# ---------------------------------------------------------------------------
# 6. rhapsody: tasks. First what a task is; then the task host, a process that runs the tasks of one
#    session on one backend and outlives the edge; then the edge's end of it, session, client and
#    plugin. The host alone writes a backend's log while it lives; the session owns the table of
#    tasks.
# ---------------------------------------------------------------------------

log_tasks = logging.getLogger("radical_edge.rhapsody")

MAX_TASKS = 200_000            # of one session; a new session may have as many again
MAX_LISTED = 10_000            # tasks in one answer of list_tasks
MAX_RETURN = 4 * 1024 * 1024   # bytes of a function's return value, as it is sent
MAX_EVENT = 64 * 1024          # bytes of a task's end that are told; more is fetched with `task`
MAX_REPLY = 8 * 1024 * 1024    # bytes of return values in one answer of `wait`
MAX_TIMEOUT_S = 1e9            # of waiting for a task
MAX_ERROR = 2048               # characters of an error's text
MAX_TRACEBACK = 16 * 1024      # characters
MAX_OUTPUT_TAIL = 64 * 1024    # bytes of stdout and of stderr in an answer of `task`
MAX_HOST_LINE = 128 * 1024 * 1024   # bytes of a message between edge and task host
MAX_BATCH = 8 * 1024 * 1024    # bytes of a request with tasks, as the client cuts them
UIDS_IN_BATCH = 8192           # tasks in a request, as the client cuts them
NOTIFY_WINDOW_S = 0.25         # the ends of tasks within so long are told together
NOTIFY_ITEMS = 1024            # or so many of them
NOTIFY_BYTES = 512 * 1024      # or so many bytes
ENDS_IN_MESSAGE = 1000         # of tasks, from a host to its edge
MAX_UNREAD = 64 * 1024 * 1024  # bytes; an edge that does not read is cut off, and reads the log
TURN_S = 0.005                 # a host reports so often; what began and ended within is told once
WAIT_S = 20.0                  # the client asks again so often while it waits
HOST_START_S = 30.0            # a host's process must be there within so long
BACKEND_START_S = 300.0        # and its backend ready; pilots wait in queues
HOST_CALL_S = 60.0             # a host must answer within so long
CLOSE_S = 15.0                 # a backend has so long to close in good order
IMPORT_S = 30.0                # a function's module must be imported within so long
FOLDER_CHECK_S = 10.0          # a host without an edge looks so often whether its folder is there
FIRST_EDGE_S = 60.0            # a host that no edge has found by then ends

STILL_INITIALIZING = "session is still initializing"     # a 409 that says this comes too early
TASK_FINAL_STATES = frozenset(("DONE", "FAILED", "CANCELED", "COMPLETED"))
LOCAL_BACKEND = "local"
BACKEND_ALIASES = {"dragon_v3": "dragon"}
PICKLED = "cloudpickle::"      # a field that is a pickle begins with it; base64 follows
EDGE_RESTART = "edge_restart"  # the reason of tasks that ended with their host, nobody saw how

_UID_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@+-]{0,127}")
_FUNCTION_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_HOST_MARK = "RADICAL_EDGE_TASKS"     # in the environment of a host and all that it starts
_TASK_MARK = "RADICAL_EDGE_TASK"      # in that of one task

_TASK_FIELDS = {
    "uid": "text", "executable": "text", "arguments": "texts", "function": "text", "args": "list",
    "kwargs": "object", "backend": "text", "name": "text", "timeout": "seconds", "cwd": "text",
    "env": "environment", "ranks": "count", "capture_stdio": "flag", "input_files": "list",
    "output_files": "list", "metadata": "object", "task_backend_specific_kwargs": "object",
    "_pickled_fields": "texts"}
_AI_FIELDS = {
    "prompt": "text", "model": "text", "inference_endpoint": "text", "system_prompt": "text",
    "temperature": "number", "max_tokens": "count", "top_p": "number", "top_k": "count",
    "stop_sequences": "texts"}
# what a task object of rhapsody-py has beside its description
_RESULT_FIELDS = frozenset(("state", "stdout", "stderr", "exit_code", "return_value", "response",
                            "exception", "task_type", "future", "_future"))


class TaskPolicy(NamedTuple):
    """What an edge allows of tasks."""
    allow_pickle: bool
    backends: Tuple[str, ...]                     # of the session; the first is the default


def parse_task(value: Any, policy: TaskPolicy, where: str) -> Dict[str, Any]:
    """Return a task's description, checked; `cwd` and `env` stand where backends look for them.

    where: how errors call the task. Raises Unprocessable, which names the field, and Forbidden for
    a pickle where they are not allowed.
    """
    if not isinstance(value, dict):
        raise Unprocessable(f"{where}: must be an object")
    given = {name: item for name, item in value.items()
             if item is not None and name not in _RESULT_FIELDS}
    pickled = _find_pickled(given, policy, where)
    plain = {name: item for name, item in given.items() if name not in pickled}
    task = {**_check_fields(plain, {**_TASK_FIELDS, **_AI_FIELDS}, where, f"{where}."), **pickled}
    _check_kind(task, where)
    backend = task.get("backend", policy.backends[0])
    task["backend"] = BACKEND_ALIASES.get(backend, backend)
    if task["backend"] not in policy.backends:
        raise Unprocessable(f"{where}.backend: {backend[:80]!r} is not of this session, which has "
                            f"{', '.join(policy.backends)}")
    _move_place(task, where)
    _refuse_for_backend(task, where)
    return task


def _find_pickled(task: Dict[str, Any], policy: TaskPolicy, where: str) -> Dict[str, str]:
    """Return the fields that are pickles."""
    names = {name for name in ("function", "args", "kwargs")
             if isinstance(task.get(name), str) and task[name].startswith(PICKLED)}
    listed = task.get("_pickled_fields", [])
    if isinstance(listed, list) and set(map(str, listed)) - names:
        raise Unprocessable(f"{where}._pickled_fields: names fields that do not begin with "
                            f"{PICKLED!r}")
    if names and not policy.allow_pickle:
        raise Forbidden(f"{where}.{sorted(names)[0]}: pickled function tasks are disabled on this "
                        "edge, for a pickle is remote code. Name the function, as in "
                        "'package.module:function', or start the edge with --allow-pickle")
    return {name: task[name] for name in names}


def _check_kind(task: Dict[str, Any], where: str) -> None:
    kinds = [name for name in ("executable", "function", "prompt") if task.get(name)]
    if len(kinds) != 1:
        raise Unprocessable(f"{where}: give one of executable and function" if not kinds else
                            f"{where}.{kinds[1]}: a task has either this or {kinds[0]}")
    foreign = {"executable": ("args", "kwargs"), "function": ("arguments",),
               "prompt": ("args", "kwargs", "arguments")}[kinds[0]]
    for name in foreign:
        if task.get(name):
            raise Unprocessable(f"{where}.{name}: does not go with {kinds[0]}")
    function = task.get("function", "")
    if function and not function.startswith(PICKLED) and not _FUNCTION_PATTERN.fullmatch(function):
        raise Unprocessable(f"{where}.function: {function[:80]!r} is not like "
                            "'package.module:function'")


def _move_place(task: Dict[str, Any], where: str) -> None:
    """Move cwd and env into task_backend_specific_kwargs, and check what is there."""
    place = dict(task.get("task_backend_specific_kwargs", {}))
    for name in ("cwd", "env"):
        if name in task:
            place[name] = task.pop(name)
        if place.get(name) is None:
            place.pop(name, None)
        elif not _KINDS[_TASK_FIELDS[name]][1](place[name]):
            raise Unprocessable(f"{where}.{name}: must be {_KINDS[_TASK_FIELDS[name]][0]}")
    if place.pop("shell", False):
        raise Unprocessable(f"{where}.task_backend_specific_kwargs.shell: nothing is given to a "
                            "shell; name one as the executable, with arguments '-c' and the text")
    if "env" in place:
        place["env"] = {key: str(item) for key, item in place["env"].items()}
    task.pop("task_backend_specific_kwargs", None)
    if place:
        task["task_backend_specific_kwargs"] = place


def _refuse_for_backend(task: Dict[str, Any], where: str) -> None:
    """Refuse what the task's backend would ignore or fail with."""
    backend, place = task["backend"], task.get("task_backend_specific_kwargs", {})
    if "prompt" in task and backend != "noop":
        raise Unprocessable(f"{where}.prompt: the backend {backend!r} runs no AI tasks")
    if backend == LOCAL_BACKEND:
        for name in place:
            if name not in ("cwd", "env"):
                raise Unprocessable(f"{where}.task_backend_specific_kwargs.{name}: the backend "
                                    "'local' knows cwd and env")
    if backend in (LOCAL_BACKEND, "concurrent", "dask") and task.get("ranks", 1) != 1:
        raise Unprocessable(f"{where}.ranks: the backend {backend!r} runs one process for a task")
    if backend == "radical_pilot" and "function" in task:
        raise Unprocessable(f"{where}.function: the backend 'radical_pilot' runs executables alone")
    if backend in ("concurrent", "dask", "dragon") and "function" in task:
        for name in ("cwd", "env", "timeout"):
            if name in place or name in task:
                raise Unprocessable(f"{where}.{name}: the backend {backend!r} has it for "
                                    "executables alone; 'local' has it for functions too")


class Submission(NamedTuple):
    """A request's tasks, checked: descriptions without uids, and the uids.

    There is one description for each uid, or a single one for all: a template.
    """
    tasks: List[Dict[str, Any]]
    uids: List[str]

    def select(self, backend: str) -> "Submission":
        """Return the part that is for one backend."""
        if len(self.tasks) == 1:
            return self
        chosen = [(task, uid) for task, uid in zip(self.tasks, self.uids)
                  if task["backend"] == backend]
        return Submission([task for task, _ in chosen], [uid for _, uid in chosen])


def parse_submission(body: Any, policy: TaskPolicy, name_task: Callable[[int], str]) -> Submission:
    """Return the tasks of {"tasks": [...]} or {"template": {...}, "uids": [...]}, all checked.

    name_task: gives a uid to the task at an index that has none. Raises what parse_task() does.
    """
    if not isinstance(body, dict):
        raise Unprocessable('body: must be {"tasks": [...]} or {"template": {...}, "uids": [...]}')
    for name in body:
        if name not in ("tasks", "template", "uids"):
            raise Unprocessable(f"{name[:80]}: there is no such field; send tasks, or template "
                                "and uids")
    if "tasks" in body and len(body) > 1:
        raise Unprocessable("template: does not go with tasks")
    if "tasks" not in body:
        tasks, uids = [parse_task(body.get("template"), policy, "template")], body.get("uids")
        if tasks[0].pop("uid", None) is not None:
            raise Unprocessable("template.uid: the uids stand in uids")
        where = "uids"
    else:
        tasks, where = body["tasks"], "tasks"
        if isinstance(tasks, list):
            tasks = [parse_task(task, policy, f"tasks[{index}]")
                     for index, task in enumerate(tasks)]
            uids = [task.pop("uid", None) or name_task(index) for index, task in enumerate(tasks)]
        else:
            uids = None
    return Submission(tasks, _check_uids(uids, where))


def check_tasks(tasks: List[Dict[str, Any]], policy: Policy) -> None:
    """Raise Forbidden for a task that the edge's policy does not allow."""
    for task in tasks:
        policy.check("executors", task["backend"])
        if task.get("executable"):
            settings = task.get("task_backend_specific_kwargs") or {}
            named = [settings.get(name) for name in ("environment", "env")]
            task["executable"] = policy.check_program(task["executable"], [
                name for names in named if isinstance(names, dict) for name in names])
        elif task.get("function") and policy.restricts("executables"):
            raise Forbidden("function: the policy of this edge allows only some executables")


def _check_uids(uids: Any, where: str) -> List[str]:
    if not isinstance(uids, list) or not uids:
        raise Unprocessable(f"{where}: must be a list, and not an empty one")
    if len(uids) > MAX_TASKS:
        raise Unprocessable(f"{where}: {len(uids)} tasks are too many; a session has {MAX_TASKS}")
    seen = set()
    for index, uid in enumerate(uids):
        if not isinstance(uid, str) or not _UID_PATTERN.fullmatch(uid):
            raise Unprocessable(f"{where}[{index}].uid: {str(uid)[:80]!r} is not 1 to 128 letters, "
                                "digits or any of _ . : @ + -")
        if uid in seen:
            raise Unprocessable(f"{where}[{index}].uid: {uid!r} stands there twice")
        seen.add(uid)
    return uids


def parse_wait(body: Dict[str, Any]) -> Tuple[Optional[List[str]], Optional[float]]:
    """Return (uids or None for all, timeout in seconds or None) of a wait request."""
    for name in body:
        if name not in ("uids", "timeout"):
            raise Unprocessable(f"{name[:80]}: there is no such field; send uids and timeout")
    uids, timeout = body.get("uids"), body.get("timeout")
    if uids is not None and not (isinstance(uids, list) and len(uids) <= MAX_TASKS and
                                 all(isinstance(uid, str) for uid in uids)):
        raise Unprocessable("uids: must be a list of uids")
    if timeout is not None and not (_is_number(timeout) and 0 <= timeout <= MAX_TIMEOUT_S):
        raise Unprocessable("timeout: must be a number of seconds, at most "
                            f"{MAX_TIMEOUT_S:g}, or null for ever")
    return uids, timeout


# -- what a function returns and raises

def encode_return(value: Any, allow_pickle: bool) -> Dict[str, Any]:
    """Return {"return_value", "_return_value_encoding"} for a function's value.

    JSON values stay what they are, bytes become base64, and anything else a pickle where that is
    allowed, or its str(). Raises ValueError when that has more than MAX_RETURN bytes.
    """
    if value is None:
        return {"return_value": None}
    try:
        text, encoding = encode_json(value), None
        text.encode()                             # lone surrogates are no text
    except (TypeError, ValueError, RecursionError):
        value, encoding = _encode_other(value, allow_pickle)
        text = value
    if len(text) > MAX_RETURN:
        raise ValueError(f"the return value takes {len(text)} bytes, and {MAX_RETURN} are allowed: "
                         "write it to a file and return the file's name")
    return {"return_value": value, **({"_return_value_encoding": encoding} if encoding else {})}


def _encode_other(value: Any, allow_pickle: bool) -> Tuple[str, Optional[str]]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode(), "base64"
    if allow_pickle:
        with contextlib.suppress(Exception):      # not everything can be pickled
            import cloudpickle
            return base64.b64encode(cloudpickle.dumps(value)).decode(), "cloudpickle"
    return str(value).encode(errors="replace").decode(), "str"


def decode_return(task: Dict[str, Any], allow_pickle: bool = False) -> Any:
    """Return a task's return value as the function returned it, as far as that can be.

    allow_pickle: unpickle it. That is remote code: do it only when the edge is trusted.
    """
    value, encoding = task.get("return_value"), task.get("_return_value_encoding")
    if encoding == "base64":
        return base64.b64decode(value)
    if encoding == "cloudpickle":
        if not allow_pickle:
            raise ValueError("the return value is a pickle: give allow_pickle=True to load it")
        return _import_cloudpickle().loads(base64.b64decode(value))
    return value


def _import_cloudpickle() -> Any:
    try:
        import cloudpickle
    except ImportError:
        raise NotInstalled("functions are sent by cloudpickle: pip install cloudpickle, or name "
                           "the function, as in 'package.module:function'") from None
    return cloudpickle


def load_function(text: str) -> Callable[..., Any]:
    """Return the function that "package.module:name" names, or that a pickle is.

    Raises LookupError with the reason, whatever the module does when it is imported.
    """
    try:
        if text.startswith(PICKLED):
            return _import_cloudpickle().loads(base64.b64decode(text[len(PICKLED):]))
        module, _, path = text.partition(":")
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except BaseException as error:
        raise LookupError(f"{text[:80]!r} cannot be loaded: {type(error).__name__}: "
                          f"{error}") from None
    if not callable(found):
        raise LookupError(f"{text[:80]!r} is not a function")
    return found


def call_function(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what a function returns; of a coroutine function, its result."""
    if inspect.iscoroutinefunction(function):
        return asyncio.run(function(*args, **kwargs))
    return function(*args, **kwargs)


def load_arguments(task: Dict[str, Any]) -> Tuple[Any, Any]:
    """Return a function task's (args, kwargs), unpickled where they are pickles."""
    loaded = [task.get("args") or [], task.get("kwargs") or {}]
    for index, value in enumerate(loaded):
        if isinstance(value, str):
            loaded[index] = _import_cloudpickle().loads(base64.b64decode(value[len(PICKLED):]))
    return tuple(loaded[0]), dict(loaded[1])


def describe_exception(error: BaseException) -> Dict[str, Any]:
    """Return what is told of a task whose function raised."""
    kind = type(error).__name__
    text = f"{kind}: {error}"[:MAX_ERROR].encode(errors="replace").decode()
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"state": "FAILED", "exit_code": code or 1, "error": text, "exception": kind,
            "traceback": trace[-MAX_TRACEBACK:].encode(errors="replace").decode()}


def run_function(task: Dict[str, Any], allow_pickle: bool,
                 load: Callable[[str], Callable[..., Any]] = load_function) -> Dict[str, Any]:
    """Run a function task; return how it ended, whatever it does short of ending the process."""
    try:
        args, kwargs = load_arguments(task)
        value = call_function(load(task["function"]), args, kwargs)
        return {"state": "DONE", "exit_code": 0, **encode_return(value, allow_pickle)}
    except BaseException as error:                # sys.exit() too: it is the function's, not ours
        return describe_exception(error)


# -- the log of a task host

class TaskLog:
    """The file in which a task host writes what it took on and how it ended; a JSON value a line.

    A line is one of: a description; {"taken": [[uid, number, offset, size], ...], "key"}, which
    makes the descriptions there tasks; and {"uid", "state", ...}, the end of one. Offset and size
    are of the description's line. Not synced: kill -9 costs nothing, a power cut may.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._size = os.fstat(self._descriptor).st_size
        if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":
            self._write(b"\n")                    # the last writer was killed in a line

    def append(self, values: Iterable[Any]) -> List[Tuple[int, int]]:
        """Write values, all or none; return each one's (offset, size). Raises OSError."""
        lines = [encode_json(value).encode(errors="replace") + b"\n" for value in values]
        return self._append_lines(lines)

    def take(self, submission: Dict[str, Any]) -> List[Tuple[str, int, int, int]]:
        """Write down a submission; return (uid, number, offset, size) of each task.

        submission: {"tasks", "uids", "first", "key"}; the tasks' numbers begin with "first".
        """
        tasks, uids, first = submission["tasks"], submission["uids"], submission["first"]
        lines = [encode_json(task).encode(errors="replace") + b"\n" for task in tasks]
        places, offset = [], self._size
        for line in lines:
            places.append((offset, len(line)))
            offset += len(line)
        if len(places) < len(uids):
            places *= len(uids)
        taken = [(uid, first + index, *place)
                 for index, (uid, place) in enumerate(zip(uids, places))]
        head = encode_json({"taken": taken, "key": submission.get("key")})
        self._append_lines([*lines, head.encode() + b"\n"])
        return taken

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _append_lines(self, lines: List[bytes]) -> List[Tuple[int, int]]:
        places, offset = [], self._size
        for line in lines:
            places.append((offset, len(line)))
            offset += len(line)
        self._write(b"".join(lines))
        return places

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._descriptor, left):]
        except OSError:                           # the disk is full: nothing of it must count
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)


def read_log(path: Path, offset: int = 0) -> Iterator[Tuple[int, int, Dict[str, Any]]]:
    """Yield (offset, size, value) of a log's lines that are "taken" or an end. Blocks.

    offset: of the line to begin with. Descriptions are passed over without being parsed; so is
    what a killed writer left.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            value = {}
            if line.startswith((b'{"taken"', b'{"uid"')) and line.endswith(b"\n"):
                value = _json_object(line.decode(errors="replace"))
            if value:
                yield offset, len(line), value
            offset += len(line)


def read_entry(path: Path, place: Tuple[int, int]) -> Dict[str, Any]:
    """Return the value at (offset, size) of a log; {} when it is not there. Blocks."""
    try:
        with open(path, "rb") as file:
            line = os.pread(file.fileno(), place[1], place[0])
            return _json_object(line.decode(errors="replace"))
    except OSError:
        return {}


# -- the task host: a process without threads of its own

class HostTask:
    """A task in its host, and what is known of its running. The host's loop owns it."""

    __slots__ = ("uid", "number", "spec", "running", "has_output", "pid", "slot", "reason", "timer",
                 "waiters", "handle")

    def __init__(self, uid: str, number: int, spec: Dict[str, Any]) -> None:
        self.uid, self.number, self.spec = uid, number, spec
        self.running = self.has_output = False    # the latter: there are files, perhaps empty ones
        self.pid = self.slot = -1                 # of its process or its worker; of its message
        self.reason: Optional[str] = None         # why it is being ended: "canceled" or "timeout"
        self.timer: Any = None
        self.waiters: List["asyncio.Future[None]"] = []          # of those who wait for its end
        self.handle: Any = None                   # what the library calls it


class TaskHost:
    """Runs the tasks of one session on one backend, in a process of its own that outlives the edge.

    folder: where the log and the output are. It listens on a socket for one edge at a time, takes
    submissions and cancellations, and tells how tasks begin and end. Without an edge it goes on
    until its tasks have ended; the next edge reads in the log what it missed.
    """

    def __init__(self, folder: Path, settings: Dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.log = TaskLog(folder / "tasks.log")
        self.mark = os.environ.get(_HOST_MARK, "")
        self.live: Dict[str, HostTask] = {}       # by uid
        self._loop = asyncio.get_running_loop()
        self._state, self._error = "initializing", None
        self._begun: List[HostTask] = []          # since the last report
        self._ended: List[Dict[str, Any]] = []    # likewise
        self._reporting: Optional[asyncio.TimerHandle] = None
        self._edge: Optional[asyncio.StreamWriter] = None
        self._done = asyncio.Event()
        self._calls: Set["asyncio.Task[None]"] = set()
        self._made: Set[int] = set()              # directories for output that exist
        self.backend: Any = make_host_backend(self)

    async def run(self) -> None:
        """Serve until the edge says so, or there is neither an edge nor a task."""
        server = await _listen(self.settings["address"], self._serve)
        opening = asyncio.ensure_future(self._open())
        self._loop.call_later(FIRST_EDGE_S, self._end_if_idle)
        watching = asyncio.ensure_future(self._watch_folder())
        await self._done.wait()
        server.close()
        opening.cancel()
        watching.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.backend.close(), CLOSE_S)
        self._report()
        if self._edge is not None:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._edge.drain(), 2)
        self.log.close()

    # -- for backends

    def on_begin(self, task: HostTask) -> None:
        """Take notice that a task runs."""
        if task.running or task.uid not in self.live:
            return
        task.running = True
        self._begun.append(task)
        seconds = task.spec.get("timeout")
        if seconds:
            task.timer = self._loop.call_later(seconds, self._stop, task, "timeout")
        self._report_soon()

    def on_end(self, task: HostTask, outcome: Dict[str, Any]) -> None:
        """Take notice how a task ended; the first word counts."""
        if self.live.pop(task.uid, None) is None:
            return
        if task.timer is not None:
            task.timer.cancel()
        if task.reason == "canceled" and outcome["state"] == "FAILED":
            outcome = {"state": "CANCELED", "exit_code": None}
        elif task.reason == "timeout" and outcome["state"] != "DONE":
            outcome = {**outcome, "state": "FAILED", "reason": "timeout",
                       "error": f"it ran for more than its timeout of {task.spec['timeout']:g} s"}
        entry = {"uid": task.uid, **outcome, "time": time.time()}
        if task.has_output:
            entry.update(self._find_output(task))
        self._ended.append(entry)
        for waiter in task.waiters:
            _set_done(waiter)
        self._report_soon()

    def output(self, task: HostTask, name: str) -> str:
        """Return where a task's "stdout" or "stderr" is kept; make the directory."""
        path = output_path(self.folder, task.number, name)
        if task.number // 1000 not in self._made:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            self._made.add(task.number // 1000)
        return path

    def fail(self, error: str) -> None:
        """Take notice that the backend can run no more tasks."""
        self._state, self._error = "failed", error
        self._send({"state": self._state, "error": self._error})

    # -- inside: the edge

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not _is_own_peer(writer):
            writer.close()
            return
        if self._edge is not None:
            self._edge.close()                    # of an edge that was killed, or frozen
        self._edge = writer
        running = [task.uid for task in self.live.values() if task.running]
        self._send({"hello": {"state": self._state, "error": self._error, "running": running}})
        try:
            while True:
                line = await reader.readline()
                if not line:
                    break
                self._on_message(json.loads(line))
        except (OSError, ValueError):             # it broke off in a line
            pass
        finally:
            if self._edge is writer:
                self._edge = None
            writer.close()
            self._end_if_idle()

    def _on_message(self, message: Dict[str, Any]) -> None:
        handler = {"submit": self._submit, "check": self._check, "cancel": self._cancel,
                   "close": self._close}[message["op"]]
        call = asyncio.ensure_future(self._answer(handler, message))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _answer(self, handler: Callable[..., Any], message: Dict[str, Any]) -> None:
        """Answer a message; what goes wrong is told, and costs no other task."""
        try:
            await handler(message)
        except Exception as error:
            log_tasks.exception("%s", message["op"])
            status = 503 if isinstance(error, OSError) else 422
            self._send({"id": message["id"], "status": status,
                        "error": f"tasks: {type(error).__name__}: {error}"[:MAX_ERROR]})

    def _send(self, message: Dict[str, Any]) -> None:
        if self._edge is not None and not self._edge.is_closing():
            self._edge.write(encode_json(message).encode(errors="replace") + b"\n")

    async def _check(self, message: Dict[str, Any]) -> None:
        """Say whether the backend would take the tasks, and all functions can be loaded."""
        error = await self._find_fault(message)
        self._send({"id": message["id"], **(error or {})})

    async def _find_fault(self, message: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        try:
            self.backend.check(message["tasks"])
        except ValueError as error:
            return {"status": 422, "error": f"tasks{error}"}
        for name in message["functions"]:
            reason = await self.backend.check_function(name)
            if reason is not None:
                return {"status": 422, "error": f"function: {reason}"}
        return None

    async def _submit(self, message: Dict[str, Any]) -> None:
        """Take tasks: from the answer on they are safe."""
        fault = await self._find_fault(message)
        if fault is not None:
            self._send({"id": message["id"], **fault})
            return
        tasks, taken = message["tasks"], self.log.take(message)
        self._send({"id": message["id"], "taken": taken, "key": message["key"]})
        specs = tasks if len(tasks) > 1 else tasks * len(taken)
        new = [HostTask(uid, number, spec) for (uid, number, _, _), spec in zip(taken, specs)]
        self.live.update((task.uid, task) for task in new)
        self.backend.submit(new)

    async def _cancel(self, message: Dict[str, Any]) -> None:
        """End tasks; answer once they have ended, with the reasons of those that cannot be."""
        refused, waiting = {}, []
        for uid in message["uids"]:
            task = self.live.get(uid)
            if task is None:
                continue                          # it has ended: the edge knows, or will soon
            reason = self._stop(task, "canceled")
            if reason:
                refused[uid] = reason
            elif uid in self.live:
                waiter = self._loop.create_future()
                task.waiters.append(waiter)
                waiting.append(waiter)
        if waiting:
            await asyncio.wait(waiting, timeout=2 * GRACE_S + 5)
        self._report()                            # so that the edge knows before it gets the answer
        self._send({"id": message["id"], "refused": refused})

    def _stop(self, task: HostTask, reason: str) -> Optional[str]:
        """Begin to end a task; return why it cannot be, if so."""
        earlier, task.reason = task.reason, task.reason or reason
        refused = None if earlier else self.backend.stop(task)
        if refused:
            task.reason = None
        return refused

    async def _close(self, message: Dict[str, Any]) -> None:
        self._send({"id": message["id"]})
        self._end()

    def _end(self) -> None:
        """End all tasks, and then this process."""
        for task in list(self.live.values()):
            self._stop(task, "canceled")
        self._done.set()

    async def _watch_folder(self) -> None:
        """End when the folder was deleted while there is no edge: no other would find this host."""
        missing = 0
        while missing < 2:                        # once may be a file system's hiccup
            await asyncio.sleep(FOLDER_CHECK_S)
            try:
                os.stat(self.folder / "settings.json")
                missing = 0
            except FileNotFoundError:
                missing += self._edge is None
            except OSError:
                pass
        self._end()

    def _end_if_idle(self) -> None:
        if self._edge is None and not self.live:
            self._done.set()

    # -- inside: the backend, and reports

    async def _open(self) -> None:
        try:
            await self.backend.open()
            gc.freeze()                           # what is here stays: never look through it again
            self._state = "ready"
        except Exception as error:
            self._state, self._error = "failed", f"{type(error).__name__}: {error}"[:MAX_ERROR]
            log_tasks.exception("the backend %s cannot be used", self.settings["backend"])
        self._send({"state": self._state, "error": self._error})

    def _report_soon(self) -> None:
        if self._reporting is not None and self.live:
            return
        if self._reporting is not None:
            self._reporting.cancel()
        # once nothing lives, nothing comes that could be told with it
        self._reporting = self._loop.call_later(TURN_S if self.live else 0, self._report)

    def _report(self) -> None:
        """Write down and tell what has changed; what cannot be written is tried again."""
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None
        try:
            places = self.log.append(self._ended)
        except OSError as error:
            log_tasks.error("%s: the ends of %d tasks cannot be written: %s", self.folder,
                            len(self._ended), error)
            self._reporting = self._loop.call_later(1.0, self._report)
            return
        ended, self._ended = self._ended, []
        running = [task.uid for task in self._begun if task.uid in self.live]
        self._begun = []
        told = [[*place, _shorten_end(entry, place[1])] for place, entry in zip(places, ended)]
        for at in range(0, max(len(told), len(running), 1), ENDS_IN_MESSAGE):
            self._send({"running": running[at:at + ENDS_IN_MESSAGE],
                        "ended": told[at:at + ENDS_IN_MESSAGE]})
        self._drop_slow_edge()
        if self._edge is None:
            self._end_if_idle()

    def _drop_slow_edge(self) -> None:
        if self._edge is not None and self._edge.transport.get_write_buffer_size() > MAX_UNREAD:
            self._edge.transport.abort()

    def _find_output(self, task: HostTask) -> Dict[str, int]:
        """Return {"stdout_size", "stderr_size"} in bytes, of those that are not empty."""
        found = {}
        for name in ("stdout", "stderr"):
            path = self.output(task, name)
            with contextlib.suppress(OSError):
                size = os.stat(path).st_size
                if size:
                    found[f"{name}_size"] = size
                else:
                    os.unlink(path)
        return found


def output_path(folder: Path, number: int, name: str) -> str:
    """Return where the output of a task is kept: a thousand tasks to a directory."""
    return f"{folder}/output/{number // 1000}/{number}.{name}"


def _shorten_end(entry: Dict[str, Any], size: int) -> Dict[str, Any]:
    """Return what is told of a task's end: all of it, unless that is too much."""
    if size <= MAX_EVENT:
        return entry
    value = {name: item for name, item in entry.items()
             if name not in ("return_value", "_return_value_encoding", "traceback")}
    return {**value, "return_value_omitted": True}


def _set_done(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _listen(address: str, serve: Callable[..., Any]) -> Any:
    return await asyncio.start_unix_server(serve, address, limit=MAX_HOST_LINE)


def _is_own_peer(writer: asyncio.StreamWriter) -> bool:
    """Whether the other end of a local socket is a process of this user's."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True                               # the socket lies in a private directory then
    sock = writer.get_extra_info("socket")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", raw)[1] == os.getuid()


def make_address() -> str:
    """Return where a task host is to listen: a name that no file system keeps, where those exist.

    (unix(7), "Abstract sockets". They outlive a cleaning of /tmp, and work on any file system.)
    """
    name = f"radical-edge-{secrets.token_hex(12)}"
    if sys.platform == "linux":
        return "\0" + name
    import tempfile
    return os.path.join(tempfile.mkdtemp(prefix="radical-edge-"), "socket")


def find_marked(name: str, value: str) -> List[int]:
    """Return the processes whose environment has name=value: all that a host or a task has started.

    Processes of other users cannot be seen. Blocks; [] where there is no /proc.
    """
    wanted, own, found = f"{name}={value}".encode(), os.getpid(), []
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if not entry.isdigit() or int(entry) == own:
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                found.append(int(entry))
    return found


def end_marked(name: str, value: str, grace: float, patience: float = 0.0) -> None:
    """End the processes that find_marked() finds: SIGTERM, `grace` seconds, SIGKILL. Blocks.

    patience: seconds that they have to end by themselves before that.
    """
    begin, told = time.monotonic(), set()
    while True:
        found = find_marked(name, value)
        waited = time.monotonic() - begin - patience
        if not found:
            return
        if waited > grace + GRACE_S:
            log_tasks.error("processes %s cannot be ended", found)
            return
        if waited >= grace:
            _send_signal(found, signal.SIGKILL)
        elif waited >= 0:
            _send_signal(set(found) - told, signal.SIGTERM)
            told.update(found)
        time.sleep(0.02)


def run_task_host(folder: str) -> None:
    """Be the task host of a folder, whose settings.json says what for. The process is its own."""
    _configure_host()
    settings = json.loads(_read(os.path.join(folder, "settings.json")))

    async def main() -> None:
        await TaskHost(Path(folder), settings).run()

    asyncio.run(main())
    logging.shutdown()
    os._exit(0)                                   # whatever threads a library has left


def _configure_host() -> None:
    logging.basicConfig(level=logging.WARNING,
                        format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource                           # many tasks, and a few files for each
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -- the local backend: processes for executables, workers for functions

def _count_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else \
        os.cpu_count() or 1


class LocalTasks:
    """The backend `local`: needs nothing but the standard library.

    At most --task-limit executables and as many functions run at a time, in the order of
    submission; by default as many as there are CPUs.
    """

    def __init__(self, host: TaskHost) -> None:
        limit = host.settings["task_limit"] or _count_cpus()
        self._executables = Executables(host, limit)
        self._functions = FunctionWorkers(host, limit)

    async def open(self) -> None:
        """Watch for the ends of processes."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def check(self, tasks: List[Dict[str, Any]]) -> None:
        """Refuse what only this backend knows it cannot run: nothing."""

    async def check_function(self, name: str) -> Optional[str]:
        """Return why a function cannot be loaded, if so."""
        return await self._functions.check(name)

    def submit(self, tasks: List[HostTask]) -> None:
        """Run tasks, as soon as there is room."""
        self._functions.add([task for task in tasks if "function" in task.spec])
        self._executables.add([task for task in tasks if "executable" in task.spec])

    def stop(self, task: HostTask) -> Optional[str]:
        """Begin to end a task."""
        owner = self._functions if "function" in task.spec else self._executables
        owner.stop(task)
        return None

    async def close(self) -> None:
        """Return when all processes have ended, at most CLOSE_S later."""
        self._functions.close()
        while self._executables.running or self._functions.workers:
            await asyncio.sleep(0.02)

    def _reap(self) -> None:
        while True:
            try:
                # only looked at, so that the number is still taken when its group is signalled
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            _kill_group(info.si_pid)              # what a task leaves running ends with it
            _, status = os.waitpid(info.si_pid, 0)
            code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            if not self._executables.on_exit(info.si_pid, code):
                self._functions.on_exit(info.si_pid, code)


def _describe_exit(code: int) -> Dict[str, Any]:
    if code == 0:
        return {"state": "DONE", "exit_code": 0}
    error = f"killed by signal {code - 128}" if code > 128 else f"exit code {code}"
    return {"state": "FAILED", "exit_code": code, "error": error}


_FULL_MACHINE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class Executables:
    """Programs as tasks: each in a process group of its own, its output in files."""

    def __init__(self, host: TaskHost, limit: int) -> None:
        self._host, self._limit = host, limit
        self._loop = asyncio.get_running_loop()
        self._queue: Deque[HostTask] = collections.deque()
        self.running: Dict[int, HostTask] = {}    # by pid
        self._base = dict(os.environ)
        self._home = os.path.expanduser("~")
        self._here = ""                           # the working directory of this process
        self._null = os.open(os.devnull, os.O_RDWR)
        self._found: Dict[Tuple[str, Optional[str]], str] = {}   # programs on the PATH

    def add(self, tasks: List[HostTask]) -> None:
        """Run programs, as soon as there is room."""
        self._queue.extend(tasks)
        self._fill()

    def on_exit(self, pid: int, code: int) -> bool:
        """Take notice that a process has ended; False when it is no task's."""
        task = self.running.pop(pid, None)
        if task is None:
            return False
        self._host.on_end(task, _describe_exit(code))
        self._fill()
        return True

    def stop(self, task: HostTask) -> None:
        """End a program and all it has started: SIGTERM, and SIGKILL after GRACE_S."""
        if task.pid == -1:
            with contextlib.suppress(ValueError):
                self._queue.remove(task)
            self._host.on_end(task, {"state": "FAILED", "exit_code": None})
            return
        with contextlib.suppress(OSError):
            os.killpg(task.pid, signal.SIGTERM)
        self._loop.call_later(GRACE_S, self._kill, task)

    def _kill(self, task: HostTask) -> None:
        if self.running.get(task.pid) is task:
            _kill_group(task.pid)

    def _fill(self) -> None:
        while self._queue and len(self.running) < self._limit:
            task = self._queue.popleft()
            try:
                task.pid = self._spawn(task)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", 0) in _FULL_MACHINE and self.running:
                    self._queue.appendleft(task)  # when another has ended
                    return
                self._host.on_end(task, self._explain(error))
                continue
            self.running[task.pid] = task
            self._host.on_begin(task)

    @staticmethod
    def _explain(error: Exception) -> Dict[str, Any]:
        code = 127 if isinstance(error, (FileNotFoundError, NotADirectoryError)) else 126
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        return {"state": "FAILED", "exit_code": code,
                "error": f"it could not be started: {reason}"}

    def _spawn(self, task: HostTask) -> int:
        """Start a program; return its process id. Raises OSError."""
        spec = task.spec
        place = spec.get("task_backend_specific_kwargs", {})
        self._enter(place.get("cwd"))
        environment = {**self._base, **place.get("env", {}), _TASK_MARK: f"{self._host.mark}/"
                       f"{task.number}"}
        program = self._find(spec["executable"], environment.get("PATH"))
        streams = [(os.POSIX_SPAWN_DUP2, self._null, 0)]
        opened = []
        try:
            for target, name in ((1, "stdout"), (2, "stderr")):
                opened.append(self._open_output(task, name))
                streams.append((os.POSIX_SPAWN_DUP2, opened[-1], target))
            return os.posix_spawn(
                program, [spec["executable"], *spec.get("arguments", ())], environment,
                file_actions=streams, setpgroup=0, setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT))
        except OSError as error:
            error.filename = error.filename or program
            raise
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _enter(self, directory: Optional[str]) -> None:
        """Change to a task's directory: this process has no threads that would mind."""
        wanted = os.path.join(self._home, os.path.expanduser(directory or self._home))
        if wanted != self._here:
            os.chdir(wanted)
            self._here = wanted

    def _find(self, executable: str, path: Optional[str]) -> str:
        executable = os.path.expanduser(executable)
        if "/" in executable:
            return executable
        key = executable, path
        if key not in self._found:
            found = find_program(executable, path)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "no such program on the PATH", executable)
            self._found[key] = found
        return self._found[key]

    def _open_output(self, task: HostTask, name: str) -> int:
        path = self._host.output(task, name)
        task.has_output = True
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)


_WORKER_HEAD = struct.Struct(">cII")   # of what a worker says: kind, slot, size of what follows
MAX_DESCRIPTOR = 65536                 # a forked process closes those below
_SLOTS = 256                           # messages for workers that may be on their way
MAX_EARLY_DEATHS = 5
_EARLY_WORKERS = 2                     # are there when the first function is sent
MAX_MESSAGE_TO_WORKER = 32 * 1024      # bytes; what is longer goes through a file


class FunctionWorkers:
    """Functions as tasks, in processes that are forked from the host and used again and again.

    All idle workers read from one socket that keeps messages apart, so that a task goes to whoever
    is free first. A worker says when it begins a task (S) and how that ended (R), or that it was
    told not to begin (X). When a worker dies, the task it had begun has failed, and no other.
    """

    def __init__(self, host: TaskHost, limit: int) -> None:
        self._host, self._limit = host, limit
        self._loop = asyncio.get_running_loop()
        kind = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
        self._out, self._in = socket.socketpair(socket.AF_UNIX, kind)
        self._out.setblocking(False)
        self._forbidden = mmap.mmap(-1, _SLOTS)   # shared with the workers: 1 where not to begin
        self._queue: Deque[HostTask] = collections.deque()
        self._free = list(range(_SLOTS))
        self._sent: Dict[int, HostTask] = {}      # by slot, in the order of sending
        self.workers: Dict[int, "_Worker"] = {}   # by pid
        self._checks: Dict[str, "asyncio.Future[Optional[str]]"] = {}
        self._closed = False
        self._encoded: Tuple[Any, bytes] = (None, b"")           # the last description
        self._early = 0                           # workers in a row that died before they began

    def add(self, tasks: List[HostTask]) -> None:
        """Run functions, as soon as there is room."""
        self._queue.extend(tasks)
        self._fill()

    async def check(self, name: str) -> Optional[str]:
        """Return why a function cannot be loaded, in a worker of its own; None when it can."""
        known = self._checks.get(name)
        if known is None:
            known = self._checks[name] = self._loop.create_future()
            pid, receiver = _fork_checker(name)
            timer = self._loop.call_later(IMPORT_S, _kill_group, pid)
            self._loop.add_reader(receiver, self._on_checked, name, receiver, bytearray(), timer)
            while len(self.workers) < min(self._limit, _EARLY_WORKERS) and not self._closed:
                self._start_worker()              # meanwhile: there will be work for them
        error = await asyncio.shield(known)
        if error is not None:
            self._checks.pop(name, None)          # its author may put it right
        return error

    def stop(self, task: HostTask) -> None:
        """End a function: with its process, if it has begun."""
        if task.slot == -1:
            with contextlib.suppress(ValueError):
                self._queue.remove(task)
        elif task.running:
            with contextlib.suppress(OSError):
                os.killpg(task.pid, signal.SIGTERM)
            self._loop.call_later(GRACE_S, self._kill, task)
            return
        else:
            self._forbidden[task.slot] = 1        # should it begin all the same, see _on_start()
        self._host.on_end(task, {"state": "FAILED", "exit_code": None})

    def close(self) -> None:
        """Let the workers end."""
        self._closed = True
        self._out.close()
        self._in.close()
        for pid in self.workers:
            _kill_group(pid)

    def on_exit(self, pid: int, code: int) -> None:
        """Take notice that a worker has ended."""
        worker = self.workers.pop(pid, None)
        if worker is None:
            return                                # a checker
        self._on_readable(worker)                 # its last words
        self._loop.remove_reader(worker.receiver)
        os.close(worker.receiver)
        if worker.task is not None:
            worker.move_output(self._host)
            worker.task.has_output = True
            outcome = _describe_exit(code)
            if code == 0:
                outcome = {"state": "FAILED", "exit_code": 0}
            self._release(worker.task)
            self._host.on_end(worker.task, {
                **outcome, "state": "FAILED",
                "error": f"its process ended: {outcome.get('error', 'exit code 0')}"})
        worker.remove_output()
        self._early = 0 if worker.has_begun else self._early + 1
        if not self._closed and self._early < MAX_EARLY_DEATHS:
            self._loop.call_later(1.0, self._recover, None)
            self._fill()
        elif self._early:
            self._give_up()

    # -- inside

    def _kill(self, task: HostTask) -> None:
        if task.pid in self.workers and self.workers[task.pid].task is task:
            _kill_group(task.pid)

    def _fill(self) -> None:
        """Send tasks, a few more than there are workers, and have enough workers."""
        while self._queue and self._free and len(self._sent) < 2 * self._limit + 8 and \
                not self._closed:
            task = self._queue[0]
            slot = self._free[-1]
            try:
                self._out.send(self._encode(slot, task))
            except BlockingIOError:
                break
            self._queue.popleft()
            self._free.pop()
            self._forbidden[slot] = 0
            task.slot = slot
            self._sent[slot] = task
        while len(self.workers) < min(self._limit, len(self._sent)) and not self._closed:
            self._start_worker()

    def _encode(self, slot: int, task: HostTask) -> bytes:
        """Return the message for a worker; of a long one, the name of a file that has it."""
        if task.spec is not self._encoded[0]:     # the tasks of a template share one
            self._encoded = task.spec, encode_json(task.spec).encode()
        message = b"%d\n%d\n%s" % (slot, task.number, self._encoded[1])
        if len(message) <= MAX_MESSAGE_TO_WORKER:
            return message
        path = self._host.folder / f"message.{task.number}"
        path.write_bytes(message)
        return b"@" + str(path).encode()

    def _start_worker(self) -> None:
        worker = _Worker(self._host, self._in, self._forbidden)
        self.workers[worker.pid] = worker
        self._loop.add_reader(worker.receiver, self._on_readable, worker)

    def _on_readable(self, worker: "_Worker") -> None:
        for kind, slot, body in worker.read():
            task = self._sent.get(slot)
            if task is None:
                continue
            if kind == b"S":
                self._on_start(worker, task)
                continue
            worker.task = None
            self._release(task)
            if kind == b"R":
                self._host.on_end(task, json.loads(body))
        self._fill()

    def _on_start(self, worker: "_Worker", task: HostTask) -> None:
        task.pid, worker.task, worker.has_begun = worker.pid, task, True
        if task.uid in self._host.live:
            self._host.on_begin(task)
        else:
            _kill_group(worker.pid)               # canceled just as it began

    def _release(self, task: HostTask) -> None:
        if self._sent.pop(task.slot, None) is not None:
            self._free.append(task.slot)

    def _recover(self, suspects: Optional[List[HostTask]]) -> None:
        """Send again what a worker took from the socket and died before it said so.

        Messages are taken in order: a task that has not begun, though a later one has, was lost,
        unless it is just about to. So what is found is looked at once more a second later.
        """
        slots = list(self._sent)
        last = max((index for index, slot in enumerate(slots) if self._sent[slot].running),
                   default=-1)
        lost = [self._sent[slot] for slot in slots[:last] if not self._sent[slot].running]
        if suspects is None:
            if lost:
                self._loop.call_later(1.0, self._recover, lost)
            return
        lost = [task for task in lost if task in suspects]
        for task in lost:
            log_tasks.warning("%s: its worker died before it began; sent again", task.uid)
            self._forbidden[task.slot] = 1
            del self._sent[task.slot]             # the slot is not used again
            task.slot = -1
        self._queue.extendleft(reversed(lost))
        self._fill()

    def _give_up(self) -> None:
        """Workers die before they begin anything: say so, rather than start them for ever."""
        for task in [*self._sent.values(), *self._queue]:
            self._host.on_end(task, {"state": "FAILED", "exit_code": None, "error":
                                     "processes for functions end before they begin; see host.log"})
        self._sent.clear()
        self._queue.clear()
        self._early = 0

    def _on_checked(self, name: str, receiver: int, buffer: bytearray,
                    timer: asyncio.TimerHandle) -> None:
        data = os.read(receiver, 65536)
        buffer += data
        if data:
            return
        timer.cancel()                            # its number may be another's soon
        self._loop.remove_reader(receiver)
        os.close(receiver)
        error = buffer[1:].decode(errors="replace") if buffer else \
            f"{name!r} cannot be loaded: it ended the process, or took more than {IMPORT_S:.0f} s"
        future = self._checks[name]
        if not future.done():
            future.set_result(error or None)


class _Worker:
    """A process that runs functions, seen from the host."""

    def __init__(self, host: TaskHost, tasks: socket.socket, forbidden: mmap.mmap) -> None:
        self._folder = host.folder
        self.task: Optional[HostTask] = None      # the one that it has begun
        self.has_begun = False                    # whether it ever did
        self._buffer = bytearray()
        self.receiver, sender = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _become_worker([tasks.fileno(), sender])
            _FunctionLoop(host, tasks, sender, forbidden).run()
        os.close(sender)
        os.set_blocking(self.receiver, False)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)        # the worker does so too; whoever is first

    def read(self) -> List[Tuple[bytes, int, bytes]]:
        """Return what the worker has said: (kind, slot, body)."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(self.receiver, 262144)
                self._buffer += data
                if len(data) < 262144:
                    break
        found, at = [], 0
        while len(self._buffer) - at >= _WORKER_HEAD.size:
            kind, slot, size = _WORKER_HEAD.unpack_from(self._buffer, at)
            if len(self._buffer) - at - _WORKER_HEAD.size < size:
                break
            at += _WORKER_HEAD.size
            found.append((kind, slot, bytes(self._buffer[at:at + size])))
            at += size
        del self._buffer[:at]
        return found

    def move_output(self, host: TaskHost) -> None:
        """Give what it has written to the task that ended it."""
        for name in ("stdout", "stderr"):
            with contextlib.suppress(OSError):
                os.rename(_worker_output(self._folder, self.pid, name),
                          host.output(self.task, name))

    def remove_output(self) -> None:
        """Delete its files, which are empty now."""
        for name in ("stdout", "stderr"):
            with contextlib.suppress(OSError):
                os.unlink(_worker_output(self._folder, self.pid, name))


def _worker_output(folder: Path, pid: int, name: str) -> Path:
    return folder / f"worker.{pid}.{name}"


def _become_worker(keep: List[int]) -> None:
    """In a forked process: a process group of its own, and nothing of the host's loop.

    keep: the descriptors that stay open. The edge must see the host's end, whoever else lives.
    """
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    asyncio.set_event_loop(None)
    kept = [2, *sorted(keep), _end_of_descriptors()]
    for low, high in zip(kept, kept[1:]):
        os.closerange(low + 1, high)


def _end_of_descriptors() -> int:
    """Return a number above all open descriptors: before Python 3.10, each number costs a call."""
    try:
        return max(map(int, os.listdir("/proc/self/fd"))) + 1
    except OSError:                               # there is no /proc
        return MAX_DESCRIPTOR


def _fork_checker(name: str) -> Tuple[int, int]:
    """Load a function in a process of its own; return its pid and where it says how that went."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = ""
        try:
            _become_worker([sender])
            load_function(name)
        except BaseException as error:
            text = str(error)
        os.write(sender, b"!" + text.encode(errors="replace")[:MAX_ERROR])
        os._exit(0)
    os.close(sender)
    return pid, receiver


class _FunctionLoop:
    """A worker, seen from within: takes tasks from the socket and runs them, one by one."""

    def __init__(self, host: TaskHost, tasks: socket.socket, sender: int,
                 forbidden: mmap.mmap) -> None:
        self._host, self._tasks, self._sender, self._forbidden = host, tasks, sender, forbidden
        self._functions: Dict[str, Callable[..., Any]] = {}      # by name, and the last pickle
        self._environment, self._here = dict(os.environ), os.path.expanduser("~")

    def run(self) -> None:
        """Work until the host is gone; does not return."""
        try:
            with contextlib.suppress(OSError):    # there may be no such directory
                os.chdir(self._here)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                self._capture(descriptor, name)
            self._tasks.setblocking(True)
            while self._take():
                pass
        except BaseException:
            log_tasks.exception("worker")
        os._exit(0)

    def _take(self) -> bool:
        message = self._tasks.recv(2 * MAX_MESSAGE_TO_WORKER)
        if not message:
            return False
        if message.startswith(b"@"):
            path = message[1:].decode()
            message = Path(path).read_bytes()
            os.unlink(path)
        first, second, text = message.split(b"\n", 2)
        slot, number = int(first), int(second)
        if self._forbidden[slot]:
            self._say(b"X", slot)
            return True
        self._say(b"S", slot)
        outcome = self._run(json.loads(text), number)
        outcome.update(self._keep_output(number))
        self._say(b"R", slot, encode_json(outcome).encode(errors="replace"))
        return True

    def _say(self, kind: bytes, slot: int, body: bytes = b"") -> None:
        left = memoryview(_WORKER_HEAD.pack(kind, slot, len(body)) + body)
        while left:
            left = left[os.write(self._sender, left):]

    def _run(self, task: Dict[str, Any], number: int) -> Dict[str, Any]:
        place = task.get("task_backend_specific_kwargs", {})
        os.environ[_TASK_MARK] = f"{self._host.mark}/{number}"
        allow = self._host.settings["allow_pickle"]
        if not place:
            return run_function(task, allow, self._load)
        try:
            os.environ.update(place.get("env", {}))
            os.chdir(os.path.expanduser(place.get("cwd", self._here)))
            return run_function(task, allow, self._load)
        except OSError as error:
            return describe_exception(error)
        finally:
            with contextlib.suppress(OSError):
                os.chdir(self._here)
            os.environ.clear()
            os.environ.update(self._environment)

    def _load(self, text: str) -> Callable[..., Any]:
        if text not in self._functions:
            function = load_function(text)
            if text.startswith(PICKLED):          # of these only the last: they may be large
                self._functions = {name: item for name, item in self._functions.items()
                                   if not name.startswith(PICKLED)}
            self._functions[text] = function
        return self._functions[text]

    def _capture(self, descriptor: int, name: str) -> None:
        path = _worker_output(self._host.folder, os.getpid(), name)
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)

    def _keep_output(self, number: int) -> Dict[str, int]:
        """Move what a function has printed to where the task's output is kept; return its sizes."""
        sizes = {}
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the function may have closed or replaced it
                stream.flush()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            size = os.fstat(descriptor).st_size
            if size:
                sizes[f"{name}_size"] = size
                target = output_path(self._host.folder, number, name)
                os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
                os.rename(_worker_output(self._host.folder, os.getpid(), name), target)
                self._capture(descriptor, name)
        return sizes


# -- the backends of rhapsody-py, in a host

_IN_CONCURRENT = 64            # tasks given to `concurrent` at a time, which would start them all
_IN_FLIGHT_OTHERS = 4096       # to the others, which queue by themselves
_SAY_RUNNING_EARLY = ("dask", "dragon")           # of what still waits for a worker
BEGIN_CHECK_S = 0.1            # a program of theirs is RUNNING so soon after it has begun


def make_host_backend(host: TaskHost) -> Any:
    """Return what runs a host's tasks."""
    if host.settings["backend"] == LOCAL_BACKEND:
        return LocalTasks(host)
    return LibraryTasks(host, host.settings["backend"])


class LibraryTasks:
    """A backend of rhapsody-py. Its calls may block: this process has nothing else to do."""

    def __init__(self, host: TaskHost, name: str) -> None:
        self._host, self._name = host, name
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._queue: Deque[HostTask] = collections.deque()
        self._given: Dict[str, HostTask] = {}     # what the backend has, by the uid it knows
        self._feeding: Optional["asyncio.Task[None]"] = None
        self._watching: Optional[asyncio.TimerHandle] = None     # of _unbegun
        self._stopping: Set["asyncio.Task[None]"] = set()
        self._functions: Dict[str, Callable[..., Any]] = {}      # by name
        self._unbegun: Dict[str, HostTask] = {}   # programs in _given that have not begun yet
        self._ending: Set[str] = set()            # what _stop() is about to end, by that uid
        self._begun: Set[int] = set()             # functions whose thread has begun; any thread
        self._stopped: Set[int] = set()           # functions that were to end; any thread. They
        #                                           stay, for their thread may be about to begin
        self._limit = _IN_FLIGHT_OTHERS if name != "concurrent" else \
            host.settings["task_limit"] or _IN_CONCURRENT
        self._backend: Any = None
        self._work = host.folder / "work"

    async def open(self) -> None:
        """Start the backend. Raises what the library does."""
        import rhapsody
        arguments = _backend_arguments(self._name, self._host)
        self._backend = await asyncio.wait_for(
            _await(rhapsody.get_backend(self._name, *arguments)), BACKEND_START_S)
        rhapsody.Session(backends=[self._backend], uid="work", work_dir=str(self._host.folder))
        self._backend.register_callback(self._on_state)
        if self._name == "radical_pilot":
            self._stopping.add(asyncio.ensure_future(self._watch_pilot()))

    def check(self, tasks: List[Dict[str, Any]]) -> None:
        """Let the library look at tasks. Raises ValueError."""
        import rhapsody
        for index, spec in enumerate(tasks):
            given = {name: item for name, item in spec.items() if name in
                     ("executable", "arguments", "input_files", "output_files", *_AI_FIELDS)}
            if "function" in spec:
                given["function"] = print         # the real one was loaded, or is a pickle
            try:
                rhapsody.BaseTask.from_dict({**given, "uid": "t", "backend": self._name})
            except Exception as error:            # its own, pydantic's and typeguard's
                raise ValueError(f"[{index}]: {error}") from None

    async def check_function(self, name: str) -> Optional[str]:
        """Return why a function cannot be loaded, if so."""
        try:
            await asyncio.wait_for(self._loop.run_in_executor(None, load_function, name), IMPORT_S)
        except LookupError as error:
            return str(error)
        except asyncio.TimeoutError:
            return f"{name!r} cannot be loaded within {IMPORT_S:.0f} s"
        return None

    def submit(self, tasks: List[HostTask]) -> None:
        """Give tasks to the backend, as soon as it has room."""
        self._queue.extend(tasks)
        self._feed_soon()

    def stop(self, task: HostTask) -> Optional[str]:
        """Begin to end a task; return why it cannot be ended, if so."""
        if task.handle is None:
            with contextlib.suppress(ValueError):
                self._queue.remove(task)
            self._host.on_end(task, {"state": "FAILED", "exit_code": None})
            return None
        if self._name == "concurrent" and "function" in task.spec:
            self._stopped.add(task.number)
            if task.number in self._begun:
                return "a function that has begun cannot be stopped in the backend 'concurrent', " \
                       "for it runs in a thread; 'local' has processes for them"
        stopping = asyncio.ensure_future(self._stop(task))
        self._stopping.add(stopping)
        stopping.add_done_callback(self._stopping.discard)
        return None

    async def close(self) -> None:
        """Shut the backend down; what it leaves is ended by the edge, which knows its mark."""
        if self._backend is not None:
            await _await(self._backend.shutdown())

    # -- inside

    def _feed_soon(self) -> None:
        if self._feeding is None and self._queue:
            self._feeding = asyncio.ensure_future(self._feed())

    async def _feed(self) -> None:
        try:
            while self._queue and len(self._given) < self._limit:
                room = self._limit - len(self._given)
                batch = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
                await self._give(batch)
        finally:
            self._feeding = None

    async def _give(self, batch: List[HostTask]) -> None:
        objects = []
        for task in batch:
            try:
                made = self._make(task)
            except Exception as error:            # a pickle of something that is not here
                self._host.on_end(task, describe_exception(error))
                continue
            task.handle = made
            self._given[made["uid"]] = task
            objects.append(made)
        try:
            await self._backend.submit_tasks(objects)
        except Exception as error:
            log_tasks.exception("%s refused %d tasks", self._name, len(objects))
            for made in objects:
                self._finish(made, describe_exception(error))

    def _make(self, task: HostTask) -> Any:
        """Return a task as the library has it."""
        import rhapsody
        spec = task.spec
        given = {name: item for name, item in spec.items() if name not in
                 ("backend", "function", "args", "kwargs", "timeout", "ranks", "_pickled_fields",
                  "metadata", "task_backend_specific_kwargs")}
        given.update(uid=f"t{task.number}", backend=self._name)
        if "function" in spec:
            args, kwargs = load_arguments(spec)
            given.update(function=self._guard(task), args=list(args), kwargs=kwargs)
        elif "executable" in spec:
            place = spec.get("task_backend_specific_kwargs", {})
            mark = {_TASK_MARK: f"{self._host.mark}/{task.number}"}
            given.update(_TRANSLATE.get(self._name, _translate_plain)(self._gate(task), place, mark),
                         capture_stdio=True)
        return rhapsody.BaseTask.from_dict(given)

    def _gate(self, task: HostTask) -> Dict[str, Any]:
        """Return a task's program; with dask, one that does not begin when it has been cancelled.

        A worker may be late to start it. What the gate lets through has its mark by then.
        """
        if self._name != "dask":
            return task.spec
        return {**task.spec, "executable": "/bin/sh", "arguments": [
            "-c", _GATE, "sh", str(self._closed_gate(task)), task.spec["executable"],
            *task.spec.get("arguments", ())]}

    def _closed_gate(self, task: HostTask) -> Path:
        return self._host.folder / f"{task.number}.canceled"

    def _guard(self, task: HostTask) -> Callable[..., Any]:
        """Return a task's function such that sys.exit() in it does not end the backend."""
        name = task.spec["function"]
        function = self._functions.get(name) or load_function(name)
        if not name.startswith(PICKLED):
            self._functions[name] = function
        if self._name == "concurrent":
            return functools.partial(self._call_here, task.number, function)
        return functools.partial(_call_guarded, function)

    def _call_here(self, number: int, function: Callable[..., Any], *args: Any,
                   **kwargs: Any) -> Any:
        if number in self._stopped:
            raise RuntimeError("canceled")
        self._begun.add(number)
        return _call_guarded(function, *args, **kwargs)

    def _on_state(self, made: Any, state: Any) -> None:
        """Take a backend's word; radical.pilot calls in threads of its own."""
        if threading.get_ident() == self._thread:
            self._take_state(made, str(state))
        else:
            self._loop.call_soon_threadsafe(self._take_state, made, str(state))

    def _take_state(self, made: Any, state: str) -> None:
        task = self._given.get(made["uid"])
        if task is None or state == "CANCELED" and made["uid"] in self._ending:
            return                                # the latter has ended when its processes have
        if state in ("RUNNING", "AGENT_EXECUTING"):
            if self._name in _SAY_RUNNING_EARLY and "executable" in task.spec:
                self._unbegun[made["uid"]] = task
                self._watch_soon()
            else:
                self._host.on_begin(task)
        elif state in TASK_FINAL_STATES:
            try:
                outcome = self._describe(task, made, state)
            except ValueError as error:           # the return value is too long
                outcome = describe_exception(error)
            self._finish(made, outcome)

    def _finish(self, made: Any, outcome: Dict[str, Any]) -> None:
        task = self._given.pop(made["uid"], None)
        self._unbegun.pop(made["uid"], None)
        if task is not None:
            self._begun.discard(task.number)
            self._host.on_end(task, outcome)
            tasks = getattr(self._backend, "tasks", None)
            if isinstance(tasks, dict) and self._name != "radical_pilot":
                tasks.pop(made["uid"], None)      # concurrent would keep it for ever
        self._feed_soon()

    def _watch_soon(self) -> None:
        if self._watching is None and self._unbegun:
            self._watching = self._loop.call_later(BEGIN_CHECK_S, self._look_for_begun)

    def _look_for_begun(self) -> None:
        """Tell of programs that have begun: a worker makes the files for their output first."""
        self._watching = None
        with contextlib.suppress(OSError):        # there is no such directory yet
            for name in os.listdir(self._work):
                task = self._unbegun.pop(name.partition(".")[0], None)
                if task is not None:
                    self._host.on_begin(task)
        self._watch_soon()

    def _describe(self, task: HostTask, made: Any, state: str) -> Dict[str, Any]:
        """Return how a task ended; also moves its output. `state` alone says whether it worked."""
        if "executable" in task.spec:
            task.has_output = True
            for name in ("stdout", "stderr"):
                self._keep_output(task, made, name)
        error, code = made.get("exception"), made.get("exit_code")
        if code is None and isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code                     # the way of dragon
        if state in ("DONE", "COMPLETED"):
            value = made.get("return_value") if "function" in task.spec or "prompt" in task.spec \
                else None
            return {"state": "DONE", "exit_code": 0 if code is None else code,
                    **encode_return(value, self._host.settings["allow_pickle"])}
        if state == "CANCELED" and task.reason:
            return {"state": "CANCELED", "exit_code": None}
        if state == "CANCELED":                   # nobody asked for that: it lost its workers
            return {"state": "FAILED", "exit_code": None, "error":
                    f"the backend {self._name!r} gave it up; see host.log of the session"}
        if isinstance(error, BaseException) and "function" in task.spec:
            return describe_exception(error)
        if code is not None and code < 0:
            code = 128 - code
        told = _describe_exit(code or 1)
        return {**told, "error": str(error)[:MAX_ERROR] if error else told["error"],
                "exit_code": code}

    def _keep_output(self, task: HostTask, made: Any, name: str) -> None:
        """Move a task's output, or write it, to where the host keeps it."""
        source, target = f"{self._work}/{made['uid']}.{name}", self._host.output(task, name)
        text = made.get(name)
        try:
            os.rename(source, target)
        except OSError:                           # radical.pilot has text, and no file
            if text and str(text) != source:
                Path(target).write_text(str(text), encoding="utf-8", errors="replace")

    async def _stop(self, task: HostTask) -> None:
        """Cancel a task in the backend, and end the processes that it leaves."""
        uid = task.handle["uid"]
        if self._name != "radical_pilot":         # whose own word comes when the agent has ended it
            self._ending.add(uid)
        if self._name == "dask" and "executable" in task.spec:
            self._closed_gate(task).touch()
        try:
            await _await(self._backend.cancel_task(uid))
        except Exception as error:                # dragon: it has just ended
            log_tasks.info("%s: cancel: %s", task.uid, error)
        mark = f"{self._host.mark}/{task.number}"
        await self._loop.run_in_executor(None, end_marked, _TASK_MARK, mark, GRACE_S)
        if "executable" in task.spec:
            await asyncio.sleep(0.2)              # it may have been about to start
            await self._loop.run_in_executor(None, end_marked, _TASK_MARK, mark, 0.0)
        if uid in self._ending:
            self._ending.discard(uid)
            note = {"error": "what had begun goes on in the worker until it returns"} \
                if "function" in task.spec else {}
            self._finish(task.handle, {"state": "CANCELED", "exit_code": None, **note})

    async def _watch_pilot(self) -> None:
        """Tell of a pilot that has ended: its tasks would wait for ever."""
        while True:
            await asyncio.sleep(1.0)
            state = self._backend.resource_pilot.state
            if state in TASK_FINAL_STATES:
                for task in [*self._given.values(), *self._queue]:
                    self._host.on_end(task, {"state": "FAILED", "exit_code": None,
                                             "error": f"the pilot has ended: it is {state}"})
                self._given.clear()
                self._queue.clear()
                self._host.fail(f"the pilot has ended: it is {state}; register a new session")
                return


async def _await(value: Any) -> Any:
    """Return a value, awaited if need be: what is awaitable differs from backend to backend."""
    return await value if inspect.isawaitable(value) else value


def _call_guarded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function; what would end the process or its loop becomes an ordinary exception."""
    try:
        return call_function(function, args, kwargs)
    except Exception:
        raise
    except BaseException as error:                # SystemExit, KeyboardInterrupt
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _translate_plain(spec: Dict[str, Any], place: Dict[str, Any],
                     mark: Dict[str, str]) -> Dict[str, Any]:
    """Return what `concurrent` needs: an environment is the whole environment there."""
    return {"task_backend_specific_kwargs": {
        **place, "cwd": _expand(place.get("cwd", "~")),
        "env": {**os.environ, **place.get("env", {}), **mark}}}


# starts a program unless the file $1 is there; nothing of a task is read by the shell
_GATE = 'test ! -e "$1" || exit 143; shift; exec "$@"'


def _translate_dask(spec: Dict[str, Any], place: Dict[str, Any],
                    mark: Dict[str, str]) -> Dict[str, Any]:
    """Return what dask needs: env(1) sets variables, for the environment is the worker's."""
    variables = [f"{key}={item}" for key, item in {**place.get("env", {}), **mark}.items()]
    return {"executable": "/usr/bin/env",
            "arguments": [*variables, spec["executable"], *spec.get("arguments", ())],
            "task_backend_specific_kwargs": {
                **{name: item for name, item in place.items() if name != "env"},
                "cwd": _expand(place.get("cwd", "~"))}}


def _translate_dragon(spec: Dict[str, Any], place: Dict[str, Any],
                      mark: Dict[str, str]) -> Dict[str, Any]:
    """Return what dragon needs: a process template, one for each rank."""
    template = {"cwd": _expand(place.get("cwd", "~")),
                "env": {**os.environ, **place.get("env", {}), **mark}}
    ranks = spec.get("ranks", 1)
    kind = {"process_templates": [(ranks, template)]} if ranks > 1 else \
        {"process_template": template}
    rest = {name: item for name, item in place.items() if name not in ("cwd", "env")}
    program = find_program(spec["executable"]) or spec["executable"]
    return {"executable": program, "task_backend_specific_kwargs": {**kind, **rest}}


def _translate_pilot(spec: Dict[str, Any], place: Dict[str, Any],
                     mark: Dict[str, str]) -> Dict[str, Any]:
    """Return what radical.pilot needs: the names of its task descriptions."""
    rest = {name: item for name, item in place.items() if name not in ("cwd", "env")}
    where = {"sandbox": _expand(place["cwd"])} if "cwd" in place else {}
    return {"task_backend_specific_kwargs": {
        "environment": {**place.get("env", {}), **mark}, "ranks": spec.get("ranks", 1), **where,
        **rest}}


_TRANSLATE = {"dask": _translate_dask, "dragon": _translate_dragon,
              "radical_pilot": _translate_pilot}


def _expand(directory: str) -> str:
    home = os.path.expanduser("~")
    return os.path.join(home, os.path.expanduser(directory))


def _backend_arguments(name: str, host: TaskHost) -> Tuple[Any, ...]:
    """Return the arguments of a backend's constructor: the session's options, and our defaults."""
    options = host.settings["options"]
    if name in ("dask", "dragon"):
        import cloudpickle                        # both need it themselves
        cloudpickle.register_pickle_by_value(sys.modules[__name__])   # workers know no plugins.py
    if name == "dask":
        if "address" in options:
            return (options,)
        return ({"dashboard_address": None, "local_directory": str(host.folder / "dask"),
                 **options},)
    if name == "radical_pilot":
        return ({"resource": "local.localhost", "runtime": 60, "cores": os.cpu_count() or 1,
                 "sandbox": str(host.folder), **options, "exit_on_error": False},)
    return (options,) if options and name == "dragon" else ()


# -- which backends there are

_NEEDS = {"concurrent": ("rhapsody",), "noop": ("rhapsody",), "dask": ("rhapsody", "distributed"),
          "dragon": ("rhapsody", "dragon", "flask"),
          "radical_pilot": ("rhapsody", "radical.pilot")}
_PACKAGES = {"rhapsody": "rhapsody-py", "distributed": "'dask[distributed]'",
             "dragon": "dragonhpc", "flask": "flask gunicorn", "radical.pilot": "radical.pilot"}
BACKENDS = (LOCAL_BACKEND, *_NEEDS)


def find_missing(backend: str) -> Optional[str]:
    """Return why a backend cannot be used here, and what to do; None when it can. Blocks."""
    missing = [package for package in _NEEDS.get(backend, ()) if not _is_installed(package)]
    if "dragon" in missing and sys.version_info < (3, 11):
        return "dragonhpc needs Python 3.11 or later on the edge"
    if missing:
        packages = " ".join(_PACKAGES[package] for package in missing)
        return f"{' and '.join(missing)} cannot be imported: pip install {packages} on the edge"
    if backend == "dragon" and _find_dragon() is None:
        return "the program `dragon` is not beside the edge's Python nor on the PATH"
    return None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):             # a parent package is missing
        return False


def _find_dragon() -> Optional[str]:
    beside = os.path.join(os.path.dirname(sys.executable), "dragon")
    return beside if os.access(beside, os.X_OK) else find_program("dragon")


def default_backend() -> str:
    """Return the backend of a session that names none: "concurrent" where rhapsody-py is."""
    return "concurrent" if find_missing("concurrent") is None else LOCAL_BACKEND


def parse_backends(value: Any) -> List[Dict[str, Any]]:
    """Return [{"name", "options"}] of register_session's `backends`: names, or such objects.

    None and [] stand for the default. Raises Unprocessable for a name there is not, and
    NotInstalled, with what to do, for one that cannot be used here. Blocks.
    """
    if value is not None and not isinstance(value, list):
        raise Unprocessable("backends: must be a list of names, such as ['local']")
    found: Dict[str, Dict[str, Any]] = {}
    for entry in map(parse_backend, value or [default_backend()]):
        missing = find_missing(entry["name"])
        if missing:
            raise NotInstalled(f"backends: {entry['name']!r} cannot be used: {missing}")
        found[entry["name"]] = entry
    return list(found.values())


def parse_backend(value: Any) -> Dict[str, Any]:
    """Return {"name", "options"} of a backend's name, or of such an object. Raises Unprocessable.

    The name is the backend's own, where an alias was given.
    """
    entry = value if isinstance(value, dict) else {"name": value}
    name, options = entry.get("name"), entry.get("options", {})
    if set(entry) - {"name", "options"} or not isinstance(options, dict):
        raise Unprocessable('backends: an object is {"name": ..., "options": {...}}')
    name = BACKEND_ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in BACKENDS:
        raise Unprocessable(f"backends: there is no {str(name)[:80]!r}; there are "
                            f"{', '.join(BACKENDS)}")
    return {"name": name, "options": options}


# -- the edge's end of a task host

class BackendLink:
    """A backend of a session, seen from the edge: starts its task host, or finds it again.

    folder: where the host's log, settings and output are. The session's table, and its on_state(),
    are told on the session's loop, in the order in which things happened.
    """

    def __init__(self, session: "RhapsodySession", name: str, options: Dict[str, Any],
                 folder: Path) -> None:
        self.name, self.folder = name, folder
        self._session, self._table, self._options = session, session.table, options
        self.state, self.error = "initializing", None
        self.next_number = 0                      # of a task; it names the files with its output
        self.read_to = 0                          # how far the table has read the log
        self.told = 0                             # how far the ends in it were told
        self._calls: Dict[int, "asyncio.Future[Dict[str, Any]]"] = {}    # by the message's id
        self._next = 0
        self._writer: Optional[asyncio.StreamWriter] = None
        self._process: Optional["subprocess.Popen[bytes]"] = None
        self._mark = self._address = ""
        self._reading: Optional["asyncio.Task[None]"] = None
        self._opened = asyncio.Event()            # set once the host says ready or failed
        self._closing = False

    @property
    def log(self) -> Path:
        """The host's log."""
        return self.folder / "tasks.log"

    async def connect(self) -> bool:
        """Find the host of an earlier edge; False, and its remains ended, when it is gone.

        Raises Unavailable when it is on another machine and has tasks.
        """
        settings = _json_object(await asyncio.to_thread(_read, str(self.folder / "settings.json")))
        if not settings:
            return False
        self._mark, self._address = settings["mark"], settings["address"]
        if settings["host"] != os.uname().nodename:              # a home that several hosts share
            if self._table.has_live(self):
                raise Unavailable(f"its tasks were started on {settings['host']}: an edge there "
                                  "can tell")
            return False
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await self._dial(settings["address"])
            return True
        await asyncio.to_thread(end_marked, _HOST_MARK, self._mark, 0.0, 1.0)
        return False

    async def launch(self) -> None:
        """Start a host, and return once it is there; on_state tells when it is ready.

        Raises Unavailable when it does not come up.
        """
        settings = {"address": make_address(), "backend": self.name, "options": self._options,
                    "mark": secrets.token_hex(12), "host": os.uname().nodename,
                    "task_limit": self._session.task_limit,
                    "allow_pickle": self._session.allow_pickle}
        self._mark, self._address = settings["mark"], settings["address"]
        self._process = await asyncio.to_thread(self._spawn, settings)
        end = time.monotonic() + HOST_START_S * (4 if self.name == "dragon" else 1)
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await self._dial(settings["address"])
                return
            if self._process.poll() is not None or time.monotonic() > end:
                tail = await asyncio.to_thread(read_tail, self.folder / "host.log", 2000)
                raise Unavailable(f"the task host did not start: {tail.strip() or 'no reason'}")
            await asyncio.sleep(0.02)

    async def wait_opened(self) -> None:
        """Wait until the backend is ready or has failed."""
        await self._opened.wait()

    async def call(self, op: str, *, patience: float = HOST_CALL_S,
                   **message: Any) -> Dict[str, Any]:
        """Return the host's answer. Raises Unavailable when there is none, and what it refuses."""
        if self._writer is None:
            raise Unavailable(f"the backend {self.name!r} is not running")
        self._next += 1
        number = self._next
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        data = encode_json({"op": op, "id": number, **message}).encode(errors="replace")
        self._writer.write(data + b"\n")
        try:
            answer = await asyncio.wait_for(asyncio.shield(future), patience)
        except asyncio.TimeoutError:
            raise Unavailable(f"the backend {self.name!r} did not answer within {patience:.0f} s: "
                              "look again") from None
        finally:
            self._calls.pop(number, None)
        if "error" in answer:
            kind = Unprocessable if answer["status"] == 422 else Unavailable
            raise kind(answer["error"])
        return answer

    def fail(self, reason: str) -> None:
        """Take notice that the backend cannot be used."""
        self.state, self.error = "failed", reason
        self._opened.set()
        self._session.on_state(self)

    def detach(self) -> None:
        """Leave the host alone: it goes on without this edge."""
        self._closing = True
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()

    async def close(self) -> None:
        """End the host, its tasks, and whatever they have started."""
        self._closing = True
        with contextlib.suppress(EdgeError):
            await self.call("close", patience=2.0)
            if self._reading is not None:
                await asyncio.wait([self._reading], timeout=2 * CLOSE_S)
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
        await asyncio.to_thread(self._end_all)

    # -- inside

    def _spawn(self, settings: Dict[str, Any]) -> "subprocess.Popen[bytes]":
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(self.folder / "settings.json", json.dumps(settings))
        write_private(self.folder / "host.py", _HOST_PROGRAM.format(
            directory=str(Path(__file__).resolve().parent)))
        command = [sys.executable, str(self.folder / "host.py"), str(self.folder)]
        environment = {**_clean_environment(), _HOST_MARK: settings["mark"]}
        apart: Dict[str, Any] = {"start_new_session": True}
        if self.name == "dragon":                 # its launcher hangs in a session of its own
            apart = {"process_group": 0}
            command = [_find_dragon() or "dragon", "-s", *command]
        if self.name in ("dragon", "radical_pilot"):
            environment.update(_activated_environment())
        if self.name == "radical_pilot":          # its logs go to what PWD says
            environment.update(RADICAL_BASE=str(self.folder), PWD=str(self.folder))
        with open(self.folder / "host.log", "ab") as trouble:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=trouble,
                                    stderr=trouble, cwd=self.folder, env=environment, **apart)

    async def _dial(self, address: str) -> None:
        reader, writer = await asyncio.open_unix_connection(address, limit=MAX_HOST_LINE)
        if not _is_own_peer(writer):
            writer.close()
            raise OSError("the socket is another user's")
        hello = json.loads(await asyncio.wait_for(reader.readline(), HOST_CALL_S) or b"{}")
        if "hello" not in hello:
            raise OSError("the task host has just ended")
        self._writer = writer
        self._on_message({**hello["hello"], "ended": []})
        self._reading = asyncio.ensure_future(self._read(reader, writer))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                line = await reader.readline()
                if not line.endswith(b"\n"):
                    break
                self._on_message(json.loads(line))
        except (OSError, ValueError):             # it broke off
            pass
        finally:
            writer.close()
            self._writer = None
            for future in self._calls.values():
                if not future.done():
                    future.set_result({"status": 503, "error": f"the backend {self.name!r} ended "
                                       "before it answered"})
        if not self._closing:
            await self._on_lost()

    def _on_message(self, message: Dict[str, Any]) -> None:
        if "taken" in message:
            self._table.on_taken(self, message["taken"], message["key"])
        if "id" in message:
            future = self._calls.get(message["id"])
            if future is not None and not future.done():
                future.set_result(message)
        if message.get("running") or message.get("ended"):
            self._table.on_progress(self, message.get("running", ()), message.get("ended", ()))
        if "state" in message:
            self.state, self.error = message["state"], message.get("error")
            if self.state != "initializing":
                self._opened.set()
                self._session.on_state(self)

    async def _on_lost(self) -> None:
        """Find the host again; if it has died, say so of its tasks, and start another."""
        was_ready = self.state == "ready"
        try:
            if await self.connect():
                await self._table.load(self)      # what was written meanwhile
                return
            log_tasks.error("%s: the task host of %s has died", self._session.sid, self.name)
            if was_ready:
                self.state = "initializing"
                self._opened.clear()
            await asyncio.to_thread(self._end_all)
            await self._table.load(self)
            await self._table.settle(self, "host_died", "the process that ran the session's tasks "
                                     "has died")
            if not was_ready:
                self.fail(self.error or "its process has died")
            elif not self._closing:
                await self.launch()
        except (EdgeError, OSError) as error:
            self.fail(str(getattr(error, "detail", error)))

    def _end_all(self) -> None:
        """End what the host and its tasks have left, and reap the host. Blocks."""
        end_marked(_HOST_MARK, self._mark, 1.0)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        if self._address.startswith("/"):
            remove_folder(os.path.dirname(self._address))


_HOST_PROGRAM = """\
import sys
sys.path[0] = {directory!r}
import plugins
sys.path.append(sys.path.pop(0))      # behind what the user has installed
if __name__ == "__main__":            # multiprocessing imports this file in its children
    plugins.run_task_host(sys.argv[1])
"""


def _activated_environment() -> Dict[str, str]:
    """Return what activating the edge's virtual environment would set."""
    beside = os.path.dirname(sys.executable)
    return {"VIRTUAL_ENV": os.path.dirname(beside),
            "PATH": os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])}


# -- session, client, plugin

class TaskRecord:
    """What a session keeps of a task in memory; all else is in the host's log."""

    __slots__ = ("uid", "link", "number", "key", "described", "state", "exit_code", "ended")

    def __init__(self, uid: str, link: BackendLink, number: int, key: Optional[str],
                 described: Tuple[int, int]) -> None:
        self.uid, self.link, self.number, self.key = uid, link, number, key
        self.described = described                # (offset, size) of its description in the log
        self.state = "QUEUED"
        self.exit_code: Optional[int] = None
        self.ended: Optional[Tuple[int, int]] = None             # of its end

    def describe(self) -> Dict[str, Any]:
        """Return what the table knows."""
        return {"uid": self.uid, "state": self.state, "exit_code": self.exit_code,
                "backend": self.link.name}


class _TaskWaiter:
    """Somebody who waits for tasks to end."""

    def __init__(self, pending: Set[str]) -> None:
        self.pending = pending
        self.done = asyncio.Event()


_TOLD = ("uid", "state", "exit_code", "return_value", "_return_value_encoding", "error",
         "exception", "traceback", "reason", "return_value_omitted")


class _TaskNews:
    """Tells of tasks: what begins at once, what ends in batches, one flush pending at a time."""

    def __init__(self, session: "RhapsodySession", window: float, items: int) -> None:
        self._session, self._window, self._items = session, window, items
        self._waiting: List[Dict[str, Any]] = []
        self._bytes = 0
        self._told: Dict[BackendLink, int] = {}   # how far each log is told with what waits
        self._pending: Optional[asyncio.TimerHandle] = None
        self._sending: Set["asyncio.Task[None]"] = set()

    def on_running(self, uids: List[str]) -> None:
        """Tell that tasks run."""
        for at in range(0, len(uids), NOTIFY_ITEMS):
            self._session.notify(*self._make([{"uid": uid, "state": "RUNNING"}
                                              for uid in uids[at:at + NOTIFY_ITEMS]]))

    def on_end(self, link: BackendLink, end: int, entry: Dict[str, Any], size: int) -> None:
        """Tell that a task has ended, soon.

        end: of the entry in the backend's log. size: what it takes of a notification, in bytes.
        """
        if self._waiting and self._bytes + size > NOTIFY_BYTES:
            self.flush()
        self._waiting.append({name: entry[name] for name in _TOLD if name in entry})
        self._bytes += size
        self._told[link] = end
        if len(self._waiting) >= self._items:
            self.flush()
        elif self._pending is None:
            loop = asyncio.get_running_loop()
            self._pending = loop.call_later(self._window, self.flush)

    def flush(self) -> None:
        """Tell now what waits."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        told, self._told = self._told, {}
        if waiting:                               # tasks begin in the order in which they are made
            sending = asyncio.ensure_future(self._send(self._make(waiting), told))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def close(self) -> None:
        """Tell what waits, and return once that is safe, or a disk seems to hang."""
        self.flush()
        if self._sending:
            await asyncio.wait(set(self._sending), timeout=1.0)

    async def _send(self, message: Tuple[str, Dict[str, Any]],
                    told: Dict[BackendLink, int]) -> None:
        """Tell ends, and then write down that they were told; a later edge tells the rest."""
        await self._session._plugin.send_notification(*message)
        for link, end in told.items():
            if end > link.told:
                link.told = end
                with contextlib.suppress(OSError):    # then some are told once more
                    await asyncio.to_thread(_write_told, link.folder, end)

    def _make(self, tasks: List[Dict[str, Any]]) -> Tuple[str, Dict[str, Any]]:
        sid = self._session.sid
        if len(tasks) == 1:
            return "task_status", {"sid": sid, **tasks[0]}
        return "task_status_batch", {"sid": sid, "tasks": tasks}


class TaskTable:
    """The tasks of a session, as they are known to be. The plugin's loop owns it."""

    def __init__(self, news: _TaskNews) -> None:
        self.records: Dict[str, TaskRecord] = {}  # by uid, the oldest first
        self.live: Dict[str, TaskRecord] = {}     # those that have not ended
        self.reserved: Set[str] = set()           # uids that are being submitted
        self.waiters: Set[_TaskWaiter] = set()
        self._news = news

    def reserve(self, submission: Submission, key: Optional[str]) -> Submission:
        """Return what of a submission is new, and reserve its uids; who submits gives them back.

        Tasks that an earlier submission of the same key has brought are left out. Raises Conflict
        when a uid is another's, or when there are too many tasks.
        """
        if len(self.records) + len(self.reserved) + len(submission.uids) > MAX_TASKS:
            raise Conflict(f"a session has at most {MAX_TASKS} tasks: register another")
        taken = [uid for uid in submission.uids if uid in self.reserved or uid in self.records and
                 (key is None or self.records[uid].key != key)]
        if taken:
            raise Conflict(f"uid: {', '.join(taken[:5])}{' ...' if taken[5:] else ''}: there is "
                           f"such a task already, so that none of the {len(submission.uids)} was "
                           "submitted")
        fresh = [index for index, uid in enumerate(submission.uids) if uid not in self.records]
        tasks = submission.tasks if len(submission.tasks) == 1 else \
            [submission.tasks[index] for index in fresh]
        uids = [submission.uids[index] for index in fresh]
        self.reserved.update(uids)
        return Submission(tasks, uids)

    def on_taken(self, link: BackendLink, taken: List[List[Any]], key: Optional[str]) -> None:
        """Take notice that a host has tasks: [uid, number, offset, size] each."""
        for uid, number, offset, size in taken:
            link.next_number = max(link.next_number, number + 1)
            if uid not in self.records:
                record = TaskRecord(uid, link, number, key, (offset, size))
                self.records[uid] = self.live[uid] = record

    def on_progress(self, link: BackendLink, running: Iterable[str],
                    ended: Iterable[List[Any]]) -> None:
        """Take notice of tasks that run, and of ends: [offset, size, entry] each."""
        begun = [uid for uid in running if uid in self.live and self.live[uid].state != "RUNNING"]
        for uid in begun:
            self.live[uid].state = "RUNNING"
        if begun:
            self._news.on_running(begun)
        for offset, size, entry in ended:
            # it may have been in the log that was read meanwhile
            if self._end(entry, (offset, size)) and offset >= link.told:
                self._news.on_end(link, offset + size, entry, min(size, MAX_EVENT))

    async def wait(self, uids: List[str], timeout: Optional[float]) -> None:
        """Return once none of these tasks is live, or after `timeout` seconds."""
        pending = {uid for uid in uids if uid in self.live}
        if not pending:
            return
        waiter = _TaskWaiter(pending)
        self.waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter.done.wait(), timeout)
        except asyncio.TimeoutError:
            pass
        finally:
            self.waiters.discard(waiter)

    def has_live(self, link: BackendLink) -> bool:
        """Return whether a backend has tasks that have not ended."""
        return any(record.link is link for record in self.live.values())

    async def load(self, link: BackendLink) -> None:
        """Read on in a backend's log."""
        start = link.read_to
        for offset, size, value in await asyncio.to_thread(
                lambda: list(read_log(link.log, start))):
            if "taken" in value:
                self.on_taken(link, value["taken"], value.get("key"))
            else:
                self.on_progress(link, (), [[offset, size, _shorten_end(value, size)]])
            link.read_to = offset + size

    async def settle(self, link: BackendLink, reason: str, error: str) -> None:
        """Say of all live tasks of a host that is gone that they have failed."""
        lost = [record for record in self.live.values() if record.link is link]
        if lost:
            entries = [{"uid": record.uid, "state": "FAILED", "exit_code": None, "error": error,
                        "reason": reason, "time": time.time()} for record in lost]
            places = await asyncio.to_thread(_append_to_log, link.log, entries)
            self.on_progress(link, (), [[*place, entry] for place, entry in zip(places, entries)])

    async def close(self) -> None:
        """Tell what has not been told, and send all who wait away."""
        await self._news.close()
        for waiter in self.waiters:
            waiter.done.set()

    def _end(self, entry: Dict[str, Any], place: Tuple[int, int]) -> bool:
        """Take a task's end; return whether it is new."""
        record = self.live.pop(entry["uid"], None)
        if record is None:
            return False
        record.state, record.exit_code = entry["state"], entry.get("exit_code")
        record.ended = place
        for waiter in self.waiters:
            waiter.pending.discard(record.uid)
            if not waiter.pending:
                waiter.done.set()
        return True


class RhapsodySession(PluginSession):
    """The tasks of one client, on one or more backends. They outlive the edge.

    backend_names: names or {"name", "options"} objects; the first is the default of tasks. What a
    session keeps is under its folder: each backend's log, settings and output.
    """

    task_limit: Optional[int] = None              # see --task-limit
    allow_pickle = False                          # see --allow-pickle

    def __init__(self, sid: str, backend_names: Optional[List[Any]] = None, *,
                 notify_batch_window: float = NOTIFY_WINDOW_S,
                 notify_batch_size: int = NOTIFY_ITEMS) -> None:
        super().__init__(sid)
        self._wanted = backend_names
        self._links: Dict[str, BackendLink] = {}  # by the backend's name
        self.table = TaskTable(_TaskNews(self, notify_batch_window, notify_batch_size))
        self._opening: Optional["asyncio.Task[None]"] = None
        self._usable = False                      # whether it ever was ready
        self._status: Tuple[str, Optional[str]] = ("initializing", None)         # as last told

    @property
    def folder(self) -> Path:
        """Where all that is kept of the session lies."""
        return self._plugin.state_dir / "tasks" / self.sid

    # -- life

    async def start(self) -> None:
        """Begin to initialize; `session_status` tells how that ends."""
        self._opening = asyncio.ensure_future(self._open_all())

    async def initialize(self) -> None:
        """Return once the backends are ready. Raises Unavailable with the reason if one is not."""
        if self._opening is None:
            await self.start()
        await asyncio.shield(self._opening)
        for link in self._links.values():
            await link.wait_opened()
        self._check_ready()

    async def _open_all(self) -> None:
        wanted = self._wanted or [await asyncio.to_thread(default_backend)]
        for entry in map(parse_backend, wanted):
            name = entry["name"]
            self._links[name] = BackendLink(self, name, entry["options"], self.folder / name)
        await asyncio.gather(*[self._open(link) for link in self._links.values()])

    async def _open(self, link: BackendLink) -> None:
        """Find a backend's tasks of earlier processes, and its host, or start one."""
        link.told = await asyncio.to_thread(_read_told, link.folder)
        await self.table.load(link)
        if self.table.records:
            self._usable = True                   # the session was ready before the edge ended
        try:
            if not await link.connect():
                await self.table.load(link)       # its last words
                await self.table.settle(link, EDGE_RESTART, "the edge was restarted, and the "
                                        "task's host was gone; how it ended is not known")
                missing = await asyncio.to_thread(find_missing, link.name)
                if missing:
                    raise NotInstalled(missing)
                await link.launch()
            await self.table.load(link)           # what was written until it was connected
        except (EdgeError, OSError) as error:
            link.fail(str(getattr(error, "detail", error)))

    async def close(self) -> Dict[str, Any]:
        """End all tasks and backends, and delete what was kept of them."""
        await super().close()
        if self._opening is not None:             # or it would start what nobody ends
            await asyncio.wait([self._opening], timeout=CLOSE_S)
            self._opening.cancel()
        await asyncio.gather(*[link.close() for link in self._links.values()])
        await self.table.close()
        await asyncio.to_thread(remove_folder, self.folder)
        return {}

    async def detach(self) -> None:
        """Leave the tasks alone: the edge ends, they go on."""
        if self._opening is not None:
            self._opening.cancel()
        for link in self._links.values():
            link.detach()
        await self.table.close()

    def is_busy(self) -> bool:
        """A session with live tasks does not expire."""
        return bool(self.table.live or self.table.reserved)

    def get_status(self) -> Dict[str, Any]:
        """Return {"sid", "status", "error", "backends"}: initializing, ready or failed."""
        links = list(self._links.values())
        failed = [f"{link.name}: {link.error}" for link in links if link.state == "failed"]
        waiting = not links or any(link.state == "initializing" for link in links)
        status = "failed" if failed else "initializing" if waiting else "ready"
        return {"sid": self.sid, "status": status, "error": "; ".join(failed) or None,
                "backends": [{"name": link.name, "status": link.state, "error": link.error}
                             for link in links]}

    # -- tasks

    async def submit_tasks(self, task_dicts: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Submit tasks, all or none; return [{"uid", "state"}]. See parse_task()."""
        return await self.submit({"tasks": task_dicts}, None)

    async def submit(self, body: Any, key: Optional[str]) -> List[Dict[str, Any]]:
        """Submit what parse_submission() takes, all or none; return [{"uid", "state"}].

        key: what the client calls this submission. A second one with the same key runs nothing a
        second time, even when the edge was killed in between. Raises Conflict for uids that are
        taken, and before the session is ready.
        """
        self._check_active()
        self._check_ready()
        policy = TaskPolicy(self.allow_pickle, tuple(self._links))
        digest = hashlib.sha256(f"{self.sid} {key}".encode()).hexdigest()[:24] if key else None
        seed = digest or secrets.token_hex(12)
        submission = await asyncio.to_thread(
            parse_submission, body, policy,
            lambda index: f"task.{hashlib.sha256(f'{seed} {index}'.encode()).hexdigest()[:16]}")
        await asyncio.to_thread(check_tasks, submission.tasks, self._plugin.policy)
        note_for_audit(tasks=len(submission.uids), first=submission.uids[0])
        fresh = self.table.reserve(submission, digest)
        if fresh.uids:
            await asyncio.shield(asyncio.ensure_future(self._hand_over(fresh, digest)))
        return [{"uid": uid, "state": self.table.records[uid].state} for uid in submission.uids]

    async def wait_tasks(self, uids: List[str],
                         timeout: Optional[float] = None) -> List[Dict[str, Any]]:
        """Return the tasks once they have ended, or as they are after `timeout` seconds.

        An unknown uid is reported as {"uid", "state": "UNKNOWN"}. Raises NotFound when all are.
        """
        return json.loads(await self.wait(uids, timeout))

    async def wait(self, uids: Optional[List[str]], timeout: Optional[float]) -> bytes:
        """Return what wait_tasks() does, as JSON text. uids: None for all."""
        self._check_active()
        self._check_usable()
        records = self.table.records
        wanted = list(records) if uids is None else uids
        if wanted and not any(uid in records for uid in wanted):
            raise NotFound(f"there is no task {wanted[0][:80]!r} in this session: see list_tasks")
        await self.table.wait(wanted, timeout)
        self._check_active()
        known = [records.get(uid) or uid for uid in wanted]
        return await asyncio.to_thread(_encode_states, known)

    async def list_tasks(self, offset: int = 0, limit: int = 1000) -> Dict[str, Any]:
        """Return {"tasks": [...], "total", "next_offset"}, the oldest first, without output.

        next_offset: where the next page begins, None after the last one.
        """
        self._check_usable()
        records = self.table.records
        total = len(records)
        page = list(itertools.islice(records.values(), offset, offset + limit))
        end = offset + len(page)
        tasks = await asyncio.to_thread(_describe_records, page)
        return {"tasks": tasks, "total": total, "next_offset": end if end < total else None}

    async def get_task(self, uid: str, stdout_offset: Optional[int] = None,
                       stderr_offset: Optional[int] = None) -> Dict[str, Any]:
        """Return a task: description, state, result, and output.

        Of the output the last MAX_OUTPUT_TAIL bytes; or, with offsets in bytes, up to MAX_READ from
        there on, and in stdout_offset and stderr_offset where to read on.
        """
        record = self._find(uid)
        return await asyncio.to_thread(_describe_whole_task, record, record.describe(),
                                       {"stdout": stdout_offset, "stderr": stderr_offset})

    async def cancel_task(self, uid: str) -> Dict[str, Any]:
        """End a task and its processes; return {"uid", "status": "canceled"}.

        Raises Conflict when it has ended already, or when its backend cannot end it.
        """
        record = self._find(uid)
        if record.state not in TASK_FINAL_STATES:
            answer = await record.link.call("cancel", uids=[uid])
            if uid in answer["refused"]:
                raise Conflict(answer["refused"][uid])
        if record.uid in self.table.live:
            raise Unavailable("the task was told to end and has not yet: look again")
        if record.state != "CANCELED":
            raise Conflict(f"the task has ended already: it is {record.state}")
        return {"uid": uid, "status": "canceled"}

    async def cancel_all(self) -> Dict[str, Any]:
        """End all tasks; return {"canceled": how many, "refused": {uid: why not}}."""
        self._check_usable()
        chosen = list(self.table.live.values())
        refused: Dict[str, str] = {}
        for link in self._links.values():
            uids = [record.uid for record in chosen if record.link is link]
            if uids:
                refused.update((await link.call("cancel", uids=uids))["refused"])
        canceled = sum(record.state == "CANCELED" for record in chosen)
        return {"canceled": canceled, **({"refused": refused} if refused else {})}

    async def get_statistics(self) -> Dict[str, Any]:
        """Return {"tasks", "live", "states": {state: n}, "backends": {name: {state: n}}, "status"}.

        tasks: how many there are; live: how many of them have not ended.
        """
        self._check_usable()
        states: Dict[str, int] = collections.Counter()
        backends: Dict[str, Dict[str, int]] = {name: collections.Counter() for name in self._links}
        for record in self.table.records.values():
            states[record.state] += 1
            backends[record.link.name][record.state] += 1
        return {"tasks": len(self.table.records), "live": len(self.table.live), "states": states,
                "backends": backends, "status": self.get_status()["status"]}

    # -- for links

    def on_state(self, link: BackendLink) -> None:
        """Tell of the session's status when it has changed."""
        status = self.get_status()
        self._usable = self._usable or status["status"] == "ready"
        told = status["status"], status["error"]
        if told == self._status or status["status"] == "initializing":
            return
        self._status = told
        self.notify("session_status", {"sid": self.sid, "status": told[0],
                                       **({"error": told[1]} if told[1] else {})})

    # -- inside

    def _check_usable(self) -> None:
        self._check_active()
        if not self._usable:
            self._check_ready()

    def _check_ready(self) -> None:
        status = self.get_status()
        if status["status"] == "initializing":
            raise Conflict(f"{STILL_INITIALIZING}: try again, or wait for session_status",
                           headers={"Retry-After": "1"})
        if status["status"] == "failed":
            raise Unavailable(f"the session could not be initialized: {status['error']}")

    def _find(self, uid: str) -> TaskRecord:
        self._check_usable()
        record = self.table.records.get(uid)
        if record is None:
            raise NotFound(f"there is no task {uid[:80]!r} in this session: see list_tasks")
        return record

    async def _hand_over(self, submission: Submission, key: Optional[str]) -> None:
        """Give tasks to their hosts: none of them, unless each host finds its part right."""
        try:
            names = list(dict.fromkeys(task["backend"] for task in submission.tasks))
            parts = [(self._links[name], submission.select(name)) for name in names]
            if len(parts) > 1:
                for link, part in parts:
                    await link.call("check", functions=_list_functions(part.tasks),
                                    tasks=part.tasks)
            for link, part in parts:
                first, link.next_number = link.next_number, link.next_number + len(part.uids)
                await link.call("submit", tasks=part.tasks, uids=part.uids, key=key, first=first,
                                functions=_list_functions(part.tasks))
        finally:
            for uid in submission.uids:
                self.table.reserved.discard(uid)


def _list_functions(tasks: List[Dict[str, Any]]) -> List[str]:
    return sorted({task["function"] for task in tasks
                   if "function" in task and not task["function"].startswith(PICKLED)})


def _append_to_log(path: Path, entries: List[Dict[str, Any]]) -> List[Tuple[int, int]]:
    log = TaskLog(path)
    try:
        return log.append(entries)
    finally:
        log.close()


def _read_told(folder: Path) -> int:
    text = _read(str(folder / "told"), 40).strip()
    return int(text) if text.isdigit() else 0


def _write_told(folder: Path, told: int) -> None:
    (folder / "told").write_text(f"{told}\n", encoding="ascii")


def _encode_states(records: List[Union[TaskRecord, str]]) -> bytes:
    """Return a JSON list of tasks' states and results; the log's own lines, where they have ended.

    records: a uid stands for a task that is not known. Blocks.
    """
    pieces, room, files = [], MAX_REPLY, {}
    try:
        for record in records:
            if isinstance(record, str):
                unknown = {"uid": record[:200], "state": "UNKNOWN",
                           "error": "there is no such task"}
                pieces.append(encode_json(unknown).encode(errors="replace"))
                continue
            if record.ended is None:
                pieces.append(encode_json(record.describe()).encode())
                continue
            if record.link.log not in files:
                files[record.link.log] = os.open(record.link.log, os.O_RDONLY)
            line = os.pread(files[record.link.log], record.ended[1], record.ended[0])
            room -= len(line)
            if room < 0 or len(line) > MAX_REPLY // 2:
                entry = _shorten_end(_json_object(line.decode()), len(line))
                line = encode_json(entry).encode()
            pieces.append(line.rstrip(b"\n"))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return b"[" + b",".join(pieces) + b"]"


def _describe_records(records: List[TaskRecord]) -> List[Dict[str, Any]]:
    """Return what list_tasks says of tasks. Blocks."""
    described: Dict[Tuple[Path, int], Dict[str, Any]] = {}
    found = []
    for record in records:
        place = record.link.log, record.described[0]
        if place not in described:
            task = read_entry(record.link.log, record.described)
            described[place] = {name: task[name] for name in ("name", "executable", "function",
                                                              "arguments") if name in task}
            if len(str(described[place])) > 2 * MAX_ERROR:       # a pickle, or very many arguments
                described[place] = {name: str(item)[:80] + " ..." for name, item in
                                    described[place].items()}
        found.append({**record.describe(), **described[place]})
    return found


def _describe_whole_task(record: TaskRecord, state: Dict[str, Any],
                         offsets: Dict[str, Optional[int]]) -> Dict[str, Any]:
    """Return all there is to say of a task. Blocks."""
    task = read_entry(record.link.log, record.described)
    ended = read_entry(record.link.log, record.ended) if record.ended else {}
    for name in ("function", "args", "kwargs"):
        if str(task.get(name)).startswith(PICKLED):
            task[name] = f"a pickle of {len(task[name]) - len(PICKLED)} bytes"
    whole = {**task, "return_value": None, "error": None, **ended, **state}
    for name, offset in offsets.items():
        path = output_path(record.link.folder, record.number, name)
        with contextlib.suppress(OSError):
            whole[f"{name}_size"] = os.stat(path).st_size
        whole.setdefault(f"{name}_size", 0)
        if offset is None:
            whole[name] = read_tail(path, MAX_OUTPUT_TAIL)
            continue
        text, after, _ = read_output(path, offset, complete=record.ended is not None)
        whole.update({name: text, f"{name}_offset": after})
    return whole


class RhapsodyClient(PluginClient):
    """A program's access to the tasks of one session. Any thread may use it."""

    MAX_AT_ONCE = 4                               # requests with tasks

    def __init__(self, http_client: Any, base_url: str, bridge_client: Any = None,
                 edge_id: Optional[str] = None, plugin_name: Optional[str] = None) -> None:
        super().__init__(http_client, base_url, bridge_client, edge_id, plugin_name)
        self._nonce = secrets.token_hex(8)        # with the tasks, it names a submission

    def register_session(self, backends: Optional[List[Any]] = None, **options: Any) -> None:
        """Make a session, and return once its backends are ready.

        backends: names, such as ["local"], or {"name", "options"} objects; the first is the default
        of tasks. options: notify_batch_window, in seconds, and notify_batch_size.
        Raises EdgeError with the reason when a backend cannot be used.
        """
        super().register_session(backends=backends, **options)
        self._wait_ready()

    def submit_tasks(self, task_dicts: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Submit tasks; return [{"uid", "state"}] in their order. See parse_task() for the fields.

        A task without uid gets one. Functions that are callables are pickled, which the edge must
        allow. Many tasks go in several requests, each of which is taken whole or not at all: what
        one of them raises says how many were. Calling it again after Unavailable, with the same
        uids, runs none of them twice.
        """
        tasks = [encode_task(task) for task in task_dicts]
        if not tasks:
            return []
        bodies = list(cut_submission(tasks))
        with concurrent.futures.ThreadPoolExecutor(min(self.MAX_AT_ONCE, len(bodies))) as pool:
            futures = [pool.submit(self._submit, body) for body in bodies]
        failed = [future.exception() for future in futures if future.exception() is not None]
        if failed:
            self._raise(failed, len(bodies))
        return [state for future in futures for state in future.result()]

    def wait_tasks(self, uids: List[str], timeout: Optional[float] = None) -> List[Dict[str, Any]]:
        """Return the tasks, in the order of `uids`: once all have ended, or after `timeout` s.

        Each has uid, state, exit_code, and return_value or error; get_task() has the output too.
        The state of one that has not ended by then is QUEUED or RUNNING. It asks the edge, which
        answers when there is something to say, and so does not depend on notifications.
        """
        end = None if timeout is None else time.monotonic() + timeout
        found: Dict[str, Dict[str, Any]] = {}
        for at in range(0, len(uids), UIDS_IN_BATCH):
            self._wait_some(uids[at:at + UIDS_IN_BATCH], end, found)
        for uid, task in found.items():
            if task.pop("return_value_omitted", False):
                found[uid] = self.get_task(uid)
        return [found[uid] for uid in uids]

    def list_tasks(self) -> Dict[str, Any]:
        """Return {"tasks": [...]} of this session, the oldest first, without output."""
        tasks: List[Dict[str, Any]] = []
        offset: Optional[int] = 0
        while offset is not None:
            page = self._get(f"list_tasks/{self._require_session()}", offset=offset,
                             limit=MAX_LISTED)
            tasks += page["tasks"]
            offset = page.get("next_offset")      # radical.edge answers all at once
        return {"tasks": tasks}

    def get_task(self, uid: str, stdout_offset: Optional[int] = None,
                 stderr_offset: Optional[int] = None) -> Dict[str, Any]:
        """Return a task with its result and the end of its output; see RhapsodySession.get_task."""
        return self._get(f"task/{self._require_session()}/{uid}", stdout_offset=stdout_offset,
                         stderr_offset=stderr_offset)

    def cancel_task(self, uid: str) -> Dict[str, Any]:
        """End a task; return {"uid", "status"}. Raises Conflict when it has ended already."""
        return self._post(f"cancel/{self._require_session()}/{uid}")

    def cancel_all(self) -> Dict[str, Any]:
        """End all tasks of the session; return {"canceled": how many}."""
        return self._post(f"cancel_all/{self._require_session()}")

    def get_statistics(self) -> Dict[str, Any]:
        """Return how many tasks are in which state."""
        return self._get(f"statistics/{self._require_session()}")

    def get_status(self) -> Dict[str, Any]:
        """Return {"sid", "status", "error", "backends"} of the session."""
        return self._get(f"session/{self._require_session()}")

    def list_backends(self) -> Dict[str, Any]:
        """Return {"default", "backends": {name: {"available", "reason"}}}. Needs no session."""
        return self._get("backends")

    # -- inside

    def _wait_ready(self) -> None:
        end, pause = time.monotonic() + BACKEND_START_S, 0.02
        while True:
            status = self._ask_status()
            if status["status"] == "ready":
                return
            if status["status"] == "failed" or time.monotonic() > end:
                self.close()
                raise Unavailable(f"the session is not ready: {status['error'] or 'it takes long'}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    def _ask_status(self) -> Dict[str, Any]:
        try:
            return self.get_status()
        except NotFound as error:
            if not is_of_old_edge(error):
                raise
        # it has no such route, but refuses others until it is ready
        reply = self._http.get(self._url(f"list_tasks/{self._require_session()}"))
        if reply.status_code == 409:
            return {"status": "initializing", "error": None}
        if reply.is_error:
            return {"status": "failed", "error": reply.text[:500]}
        return {"status": "ready", "error": None}

    def _submit(self, body: bytes) -> List[Dict[str, Any]]:
        path = self._url(f"submit/{self._require_session()}")
        while True:
            key = hashlib.sha256(self._nonce.encode() + body).hexdigest()[:32]
            reply = self._http.post(path, content=body, headers={
                "Content-Type": "application/json", "Idempotency-Key": key})
            if not reply.is_error:
                return reply.json()
            if reply.status_code != 503:
                self._nonce = secrets.token_hex(8)               # an answer: no retry of it
            if reply.status_code != 409 or STILL_INITIALIZING.encode() not in reply.content:
                reply.raise_for_status()
            self._wait_ready()                    # the edge, or a backend, was just restarted

    @staticmethod
    def _raise(failed: List[BaseException], total: int) -> None:
        first = failed[0]
        if not isinstance(first, EdgeError):
            raise first
        if total > 1:
            details = "; ".join(str(getattr(error, "detail", error)) for error in failed[:3])
            first.detail = f"{len(failed)} of {total} requests with tasks failed: {details}"
        raise first

    def _wait_some(self, uids: List[str], end: Optional[float],
                   found: Dict[str, Dict[str, Any]]) -> None:
        left = uids
        while left:
            patience = WAIT_S if end is None else max(0.0, min(WAIT_S, end - time.monotonic()))
            reply = self._http.post(
                self._url(f"wait/{self._require_session()}"), json={"uids": left,
                                                                    "timeout": patience},
                headers={"Idempotency-Key": ""})  # it only reads: no answer need be kept
            for task in reply.raise_for_status().json():
                found[task["uid"]] = task
            left = [uid for uid in left
                    if found[uid]["state"] not in TASK_FINAL_STATES | {"UNKNOWN"}]
            if end is not None and time.monotonic() >= end:
                return


def encode_task(task: Dict[str, Any]) -> Dict[str, Any]:
    """Return a task as it is sent: with a uid, and callables, or what JSON cannot have, pickled."""
    sent = {name: value for name, value in task.items()
            if value is not None and name not in _RESULT_FIELDS}
    pickled = []
    for name in ("function", "args", "kwargs"):
        value = sent.get(name)
        if value is None or isinstance(value, str) or not callable(value) and _is_json(value):
            continue
        data = _import_cloudpickle().dumps(value)
        sent[name] = PICKLED + base64.b64encode(data).decode()
        pickled.append(name)
    if pickled:
        sent["_pickled_fields"] = pickled
    sent.setdefault("uid", f"task.{secrets.token_hex(8)}")
    return sent


def _is_json(value: Any) -> bool:
    """Whether a value is the same after a journey as JSON."""
    try:
        return json.loads(encode_json(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def cut_submission(tasks: List[Dict[str, Any]]) -> Iterator[bytes]:
    """Yield the bodies of requests for tasks: a template where they differ in nothing but the uid.

    Each has at most UIDS_IN_BATCH tasks and, unless one task alone is longer, MAX_BATCH bytes.
    """
    template = {name: value for name, value in tasks[0].items() if name != "uid"}
    if len(tasks) > 1 and all({**task, "uid": None} == {**template, "uid": None}
                              for task in tasks):
        for at in range(0, len(tasks), UIDS_IN_BATCH):
            uids = [task["uid"] for task in tasks[at:at + UIDS_IN_BATCH]]
            yield encode_json({"template": template, "uids": uids}).encode()
        return
    batch, size = [], 0
    for text in map(encode_json, tasks):
        if batch and (size + len(text) > MAX_BATCH or len(batch) >= UIDS_IN_BATCH):
            yield b'{"tasks":[' + ",".join(batch).encode() + b"]}"
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield b'{"tasks":[' + ",".join(batch).encode() + b"]}"


class PluginRhapsody(Plugin):
    """Runs tasks: programs and functions, many of them, within an allocation or a machine."""

    plugin_name = "rhapsody"
    session_class = RhapsodySession
    client_class = RhapsodyClient
    version = "0.0.1"
    ui_config = {
        "icon": "🎼", "title": "Rhapsody Tasks",
        "description": "Submit compute tasks, wait for results, view stdout/stderr.",
        "forms": [{
            "id": "submit", "title": "📝 Submit Task", "layout": "single",
            "submit": {"label": "▶ Submit Task", "style": "success"},
            "fields": [
                {"name": "exec", "type": "text", "label": "Executable", "css_class": "rh-exec",
                 "default": "/bin/echo"},
                {"name": "args", "type": "text", "label": "Arguments (space-separated)",
                 "css_class": "rh-args", "default": "hello from rhapsody"},
                {"name": "backends", "type": "select", "label": "Backend",
                 "css_class": "rh-backends", "options": ["concurrent", "dragon_v3"]}]}],
        "monitors": [{"id": "tasks", "title": "📊 Task Monitor", "type": "task_list",
                      "css_class": "rh-output", "empty_text": "No tasks submitted yet."}],
        "notifications": {"topic": "task_status", "id_field": "uid", "state_field": "state"}}

    def __init__(self, app: Any, instance_name: str = "rhapsody") -> None:
        super().__init__(app, instance_name)
        self._missing: Dict[str, Optional[str]] = {}             # by backend: why it is not there
        self.add_route_post("submit/{sid}", self.submit_tasks)
        self.add_route_post("wait/{sid}", self.wait_tasks)
        self.add_route_get("list_tasks/{sid}", self.list_tasks)
        self.add_route_get("task/{sid}/{uid}", self.get_task)
        self.add_route_post("cancel/{sid}/{uid}", self.cancel_task)
        self.add_route_post("cancel_all/{sid}", self.cancel_all)
        self.add_route_get("statistics/{sid}", self.get_statistics)
        self.add_route_get("session/{sid}", self.get_session)
        self.add_route_get("backends", self.list_backends)

    async def start(self) -> None:
        """Look which backends there are; delete what is left of sessions that are gone."""
        self._missing = await asyncio.to_thread(
            lambda: {name: find_missing(name) for name in BACKENDS})
        for folder in await asyncio.to_thread(lambda: list(self.state_dir.glob("tasks/*"))):
            if folder.name not in self._sessions:
                await asyncio.to_thread(_delete_left_session, folder)

    async def stop(self) -> None:
        """Leave the tasks alone; they go on."""
        await asyncio.gather(*[record.session.detach() for record in self._sessions.values()])

    def remarks(self) -> List[str]:
        """Say which backends cannot be used here, and why."""
        return [f"backend {name}: {reason}" for name, reason in self._missing.items() if reason]

    def describe_ui(self) -> Dict[str, Any]:
        """Return ui_config, with the backends that are really there as well; the default first."""
        config = copy.deepcopy(super().describe_ui())
        field = config["forms"][0]["fields"][2]
        there = [name for name, reason in self._missing.items() if reason is None]
        field["options"] += [name for name in there if name not in field["options"]]
        if "concurrent" not in there:
            field["default"] = LOCAL_BACKEND
        return config

    def _create_session(self, sid: str, backends: Optional[List[Any]] = None,
                        notify_batch_window: float = NOTIFY_WINDOW_S,
                        notify_batch_size: int = NOTIFY_ITEMS) -> PluginSession:
        if not _is_number(notify_batch_window) or not 0 <= notify_batch_window <= 60:
            raise Unprocessable("notify_batch_window: must be a number of seconds from 0 to 60")
        if not _is_count(notify_batch_size) or notify_batch_size > NOTIFY_ITEMS:
            raise Unprocessable(f"notify_batch_size: must be a whole number from 1 to "
                                f"{NOTIFY_ITEMS}")
        session = RhapsodySession(sid, backends, notify_batch_window=notify_batch_window,
                                  notify_batch_size=notify_batch_size)
        options = getattr(self._app.state, "options", {})
        session.allow_pickle = bool(options.get("allow_pickle"))
        session.task_limit = options.get("task_limit")
        return session

    async def register_session(self, request: Request) -> Any:
        """Make a session of {"backends", "notify_batch_window", "notify_batch_size"}, all optional.

        Answers {"sid", "status": "initializing"} at once; the topic session_status tells the rest.
        """
        arguments = {name: value for name, value in (await request.json_object()).items()
                     if value is not None}
        # resolved now, so that the default is the same after a restart
        arguments["backends"] = await asyncio.to_thread(parse_backends, arguments.get("backends"))
        sid = f"session.{secrets.token_hex(8)}"
        await self._open_session(sid, request.user, arguments)
        await self._store_now()
        return {"sid": sid, "status": "initializing"}

    @repeatable
    async def submit_tasks(self, request: Request) -> Any:
        """Submit {"tasks": [...]} or {"template", "uids"}; answer [{"uid", "state"}].

        The body is JSON, or msgpack when Content-Type says so.
        """
        session = self._find(request.path_params["sid"]).session
        data = await request.body()
        kind = request.headers.get("content-type", "")
        body = await asyncio.to_thread(_parse_body, data, "msgpack" in kind)
        return await session.submit(body, request.idempotency_key)

    async def wait_tasks(self, request: Request) -> Any:
        """Answer the tasks of {"uids", "timeout"} once they have ended, or after the timeout."""
        session = self._find(request.path_params["sid"]).session
        uids, timeout = parse_wait(await request.json_object())
        return Response(await session.wait(uids, timeout), media_type="application/json")

    async def list_tasks(self, request: Request) -> Any:
        """Answer {"tasks", "total", "next_offset"}; ?offset= and ?limit= select a page."""
        limit = min(request.query_int("limit", 1000, 1), MAX_LISTED)
        return await self._forward(request.path_params["sid"], RhapsodySession.list_tasks,
                                   request.query_int("offset", 0), limit)

    async def get_task(self, request: Request) -> Any:
        """Answer a task; ?stdout_offset= and ?stderr_offset= read its output from there on."""
        offsets = [request.query_int(name, 0) if name in request.query_params else None
                   for name in ("stdout_offset", "stderr_offset")]
        return await self._forward(request.path_params["sid"], RhapsodySession.get_task,
                                   request.path_params["uid"], *offsets)

    async def cancel_task(self, request: Request) -> Any:
        """End a task; answer {"uid", "status"}."""
        return await self._forward(request.path_params["sid"], RhapsodySession.cancel_task,
                                   request.path_params["uid"])

    async def cancel_all(self, request: Request) -> Any:
        """End all tasks of the session; answer {"canceled": how many}."""
        return await self._forward(request.path_params["sid"], RhapsodySession.cancel_all)

    async def get_statistics(self, request: Request) -> Any:
        """Answer how many tasks are in which state."""
        return await self._forward(request.path_params["sid"], RhapsodySession.get_statistics)

    async def get_session(self, request: Request) -> Any:
        """Answer {"sid", "status", "error", "backends"}."""
        return await self._forward(request.path_params["sid"], RhapsodySession.get_status)

    async def list_backends(self, request: Request) -> Any:
        """Answer {"default", "backends": {name: {"available", "reason"}}}."""
        return {"default": await asyncio.to_thread(default_backend),
                "backends": {name: {"available": reason is None, "reason": reason}
                             for name, reason in self._missing.items()}}


def _parse_body(data: bytes, is_msgpack: bool) -> Any:
    """Return a request's body. Raises BadRequest. Blocks for long, when it is long."""
    try:
        if not is_msgpack:
            return json.loads(data, parse_constant=refuse_constant)
        value = parse_msgpack(data)
        encode_json(value)                        # from here on, tasks travel as JSON
        return value
    except (TypeError, ValueError, RecursionError, ProtocolError) as error:
        raise BadRequest(f"the body is not {'msgpack of JSON values' if is_msgpack else 'JSON'}: "
                         f"{error}") from None


def _delete_left_session(folder: Path) -> None:
    """End and delete what is left of a session: the edge was killed while it closed it. Blocks."""
    for path in folder.glob("*/settings.json"):
        mark = _json_object(_read(str(path))).get("mark")
        if mark:
            end_marked(_HOST_MARK, mark, 0.0)
    remove_folder(folder)


# ---------------------------------------------------------------------------
# 7. lucid: pilots and tasks of RADICAL-Pilot, which runs in a child process of its own: it blocks
#    for seconds, ends its process when a pilot fails, and leaves processes behind. First the
#    child's program, then who speaks with it, then session, client and plugin.
# ---------------------------------------------------------------------------

log_lucid = logging.getLogger("radical_edge.lucid")

CHILD_START_S = 180.0          # managers and their processes; 10 s on a quiet machine
CHILD_CALL_S = 90.0            # submitting and cancelling; a child that takes longer is stuck
CHILD_CLOSE_S = 20.0           # pilots are cancelled, which takes 3 s; then everything is killed
CANCEL_WAIT_S = 20.0           # until RADICAL-Pilot confirms a cancellation
PILOT_END_S = 20.0             # after its pilot ended, a task is told its state within so long
MAX_WAIT_S = 300.0             # of one task_wait request
MAX_CHILDREN = 8               # sessions with a child, which has a dozen processes
MAX_ENTRIES = 10_000           # pilots and tasks of a session; the oldest finished ones go
MAX_DESCRIPTION = 1024 * 1024  # bytes of a description as JSON
MAX_LINE = 16 * 1024 * 1024    # bytes of a line between edge and child

PILOT_FINAL = frozenset(("DONE", "FAILED", "CANCELED", "LOST"))
_TOLD_STATES = PILOT_FINAL | {"AGENT_EXECUTING"}     # of a task; it has a dozen more

# Runs as `python child.py LINK LIFELINE`. The first process is a supervisor, the second one
# RADICAL-Pilot. All that either leaves behind becomes a child of the supervisor, which kills it
# when the second ends, or when the edge, which holds the other end of LIFELINE, closes it or dies.
# LINK carries a JSON object a line: {"id", "op", ...} in; {"id", "value"}, {"id", "error"} and
# {"event", ...} out.
_PILOT_CHILD = r'''
import ctypes, json, os, select, signal, socket, sys, threading, time

link, lifeline = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
os.set_inheritable(link.fileno(), False)
os.set_inheritable(lifeline, False)

def prctl(option, value):
    try:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    except (OSError, AttributeError):
        pass                                      # not Linux: the edge's own means must do

def find_children():
    me, found = str(os.getpid()), []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else ()):
        try:
            with open("/proc/%s/stat" % name) as file:
                if file.read().rpartition(")")[2].split()[1] == me:
                    found.append(int(name))
        except OSError:
            pass
    return found

def kill_all():
    """Kill child after child: orphans become ours, so that in the end there is none."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for pid in find_children() or [worker]:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.02)

def supervise():
    link.close()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)     # RADICAL-Pilot signals whole groups
    ended = False
    while not ended:
        if lifeline in select.select([lifeline, woken], [], [], 5)[0]:
            break
        try:
            os.read(woken, 4096)
        except OSError:
            pass
        while True:
            pid = os.waitpid(-1, os.WNOHANG)[0] if not ended else 0
            ended = ended or pid == worker
            if not pid:
                break
    kill_all()
    os._exit(0)

prctl(36, 1)                                      # PR_SET_CHILD_SUBREAPER
worker = os.fork()
if worker:
    supervise()
prctl(1, signal.SIGKILL)                          # PR_SET_PDEATHSIG: if the supervisor is killed
os.close(lifeline)

sending = threading.Lock()

def send(**message):
    line = json.dumps(message, default=str).encode() + b"\n"
    with sending:
        link.sendall(line)

def plain(value):
    """A JSON value: what JSON lacks becomes text, and a number that it lacks null."""
    return json.loads(json.dumps(value, default=str, skipkeys=True),
                      parse_constant=lambda name: None)

def report(kind, entity, state):
    info = plain(entity.as_dict()) if state in rp.FINAL else None
    send(event=kind, uid=entity.uid, state=state, info=info)

def on_pilot(pilot, state):
    report("pilot", pilot, state)

def on_task(task, state):
    report("task", task, state)

try:
    import radical.pilot as rp
except Exception as error:
    send(event="failed", missing=True, error="%s: %s" % (type(error).__name__, error))
    sys.exit(1)
try:
    session = rp.Session()
    pilots, tasks = rp.PilotManager(session=session), rp.TaskManager(session=session)
    pilots.register_callback(on_pilot)
    tasks.register_callback(on_task)
except Exception as error:
    send(event="failed", missing=False, error="%s: %s" % (type(error).__name__, error))
    os._exit(1)

def submit_pilot(description):
    pilot = pilots.submit_pilots(rp.PilotDescription({**description, "exit_on_error": False}))
    tasks.add_pilots(pilot)

def submit_task(description):
    tasks.submit_tasks(rp.TaskDescription(description))

operations = {"pilot_submit": submit_pilot, "task_submit": submit_task,
              "pilot_cancel": lambda uid: pilots.cancel_pilots(uid),
              "task_cancel": lambda uid: tasks.cancel_tasks(uid),
              "close": lambda _: session.close(download=False)}
send(event="ready", uid=session.uid, pid=os.getpid())
for line in link.makefile("rb"):
    request = json.loads(line)
    try:
        operations[request["op"]](request["value"])
        send(id=request["id"], value=None)
    except Exception as error:                    # typed errors of many kinds: all are refusals
        send(id=request["id"], error="%s: %s" % (type(error).__name__, error))
    if request["op"] == "close":
        break
os._exit(0)
'''


class PilotRefused(Exception):
    """RADICAL-Pilot did not take what it was given; the text says why."""


class PilotChild:
    """RADICAL-Pilot in a child process with a supervisor. All methods run on one loop.

    folder: where it lives, as its HOME, RADICAL_BASE and working directory. on_event(message) is
    called for each {"event": ...} of the child, and at last for {"event": "gone"}.
    """

    def __init__(self, folder: Path, on_event: Callable[[Dict[str, Any]], None]) -> None:
        self._folder, self._on_event = folder, on_event
        self._ids = itertools.count()
        self._calls: Dict[int, "asyncio.Future[Any]"] = {}       # by id
        self._writer: Optional[asyncio.StreamWriter] = None
        self._lifeline = -1                       # open while the child may live
        self._reading: Optional["asyncio.Task[None]"] = None

    async def start(self) -> None:
        """Start the process; {"event": "ready"} or "failed" follows. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.to_thread(self._launch, theirs)
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
        self._reading = asyncio.ensure_future(self._read(reader, process))

    async def call(self, operation: str, value: Any, timeout: float = CHILD_CALL_S) -> Any:
        """Run an operation in the child. Raises PilotRefused, Unavailable when the child is gone.

        A child that does not answer within `timeout` seconds is killed: it never will.
        """
        number, future = next(self._ids), asyncio.get_running_loop().create_future()
        if self._writer is None or self._lifeline < 0:
            raise Unavailable("the process that runs RADICAL-Pilot has ended")
        self._calls[number] = future
        self._writer.write(encode_line({"id": number, "op": operation, "value": value}))
        try:
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            self.kill()
            raise Unavailable("RADICAL-Pilot did not answer and was ended") from None
        finally:
            self._calls.pop(number, None)

    async def close(self) -> None:
        """Cancel the pilots in good order, then end all that is left; return when it is gone."""
        with contextlib.suppress(PilotRefused, Unavailable):
            await self.call("close", None, CHILD_CLOSE_S)
        self.kill()
        if self._reading is not None:
            await asyncio.wait([self._reading])

    def kill(self) -> None:
        """Make the supervisor kill everything."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _launch(self, link: socket.socket) -> "subprocess.Popen[bytes]":
        """Start the supervisor. Blocks."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        program = self._folder / "child.py"
        write_private(program, _PILOT_CHILD)
        python = pilot_python()
        theirs, lifeline = os.pipe()
        try:
            with open(self._folder / "child.log", "ab") as output:
                process = subprocess.Popen(
                    [python, str(program), str(link.fileno()), str(theirs)],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    pass_fds=(link.fileno(), theirs), start_new_session=True,
                    cwd=str(self._folder), env=child_environment(python, self._folder))
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(theirs)
        self._lifeline = lifeline
        return process

    async def _read(self, reader: asyncio.StreamReader,
                    process: "subprocess.Popen[bytes]") -> None:
        try:
            while True:
                line = await reader.readline()
                if not line.endswith(b"\n"):
                    break
                self._take(json.loads(line))
        except (OSError, ValueError) as error:    # a line that is too long or no JSON
            log_lucid.error("%s: its child broke the protocol: %s", self._folder.name, error)
        finally:
            self.kill()
            self._writer.close()
        await asyncio.to_thread(process.wait)
        for future in list(self._calls.values()):
            _fail(future, Unavailable("the process that runs RADICAL-Pilot has ended"))
        self._on_event({"event": "gone"})

    def _take(self, message: Dict[str, Any]) -> None:
        if "event" in message:
            self._on_event(message)
            return
        future = self._calls.get(message["id"])
        if future is None or future.done():
            log_lucid.warning("%s: answer %s of the child came too late", self._folder.name,
                              message["id"])
        elif "error" in message:
            future.set_exception(PilotRefused(message["error"]))
        else:
            future.set_result(message["value"])


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def encode_line(value: Any) -> bytes:
    """Return a JSON value as one line."""
    return json.dumps(value).encode() + b"\n"


def pilot_python() -> str:
    """Return the Python that has radical.pilot: RADICAL_LUCID_PYTHON, or the edge's own."""
    return os.environ.get("RADICAL_LUCID_PYTHON") or sys.executable


def child_environment(python: str, folder: Path) -> Dict[str, str]:
    """Return the environment in which RADICAL-Pilot works.

    It starts programs of its own by name, in shells of its own, so that the virtual environment
    must be an activated one; and it litters HOME, which therefore is the session's directory.
    """
    programs = os.path.dirname(os.path.abspath(python))
    environment = {**_clean_environment(), "HOME": str(folder), "RADICAL_BASE": str(folder),
                   "PWD": str(folder), "PYTHONUNBUFFERED": "1"}      # PWD: where its logs go
    environment["PATH"] = os.pathsep.join([programs, environment.get("PATH", os.defpath)])
    environment.pop("VIRTUAL_ENV", None)
    prefix = os.path.dirname(programs)
    if os.path.exists(os.path.join(prefix, "pyvenv.cfg")):
        environment["VIRTUAL_ENV"] = prefix
    return environment


def parse_description(value: Any, kind: str) -> Dict[str, Any]:
    """Return a copy of a pilot's or task's description, with a uid. Raises Unprocessable.

    What the fields mean, RADICAL-Pilot knows; here are only their bounds.
    """
    if not isinstance(value, dict) or not value:
        raise Unprocessable("description: must be an object with the fields of a RADICAL-Pilot "
                            f"{kind} description")
    if len(json.dumps(value)) > MAX_DESCRIPTION:
        raise Unprocessable(f"description: has more than {MAX_DESCRIPTION} bytes")
    uid = value.get("uid") or f"{kind}.{secrets.token_hex(6)}"
    if not isinstance(uid, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", uid):
        raise Unprocessable("description.uid: must be 1 to 100 letters, digits, '.', '_' or '-'")
    return {**value, "uid": uid}


def parse_task_description(value: Any) -> Dict[str, Any]:
    """Return what parse_description() does. The task's HOME is the user's, not the child's."""
    description = parse_description(value, "task")
    environment = description.get("environment")
    if environment is None:
        environment = {}
    if not isinstance(environment, dict):
        raise Unprocessable("description.environment: must be an object")
    return {**description, "environment": {"HOME": os.path.expanduser("~"), **environment}}


class Tracked:
    """A pilot or a task, and what is known of it. The plugin's loop owns it."""

    def __init__(self, description: Dict[str, Any], state: str = "NEW",
                 reason: Optional[str] = None, kept: Optional[Dict[str, Any]] = None) -> None:
        self.uid, self.description = description["uid"], description
        self.state, self.reason = state, reason
        self.info: Dict[str, Any] = kept or {}    # what RADICAL-Pilot says of it at its end
        self.ended = asyncio.Event()
        if self.is_final:
            self.ended.set()

    @property
    def is_final(self) -> bool:
        """Whether the state will not change any more."""
        return self.state in PILOT_FINAL

    def update(self, state: str, reason: Optional[str] = None,
               info: Optional[Dict[str, Any]] = None) -> bool:
        """Take a new state, unless there is a final one already; return whether it was taken."""
        if self.is_final or state == self.state:
            return False
        self.state, self.reason, self.info = state, reason, info or {}
        if self.is_final:
            self.ended.set()
        return True

    def describe(self) -> Dict[str, Any]:
        """Return what is known, with the names of Task.as_dict()."""
        blank = {"uid": self.uid, "name": self.description.get("name"), "exit_code": None,
                 "stdout": None, "stderr": None, "description": self.description}
        return {**blank, **self.info, "state": self.state, "reason": self.reason}

    def summarize(self) -> Dict[str, Any]:
        """Return what list says."""
        return {"uid": self.uid, "state": self.state, "reason": self.reason,
                "exit_code": self.info.get("exit_code")}

    def keep(self) -> List[Any]:
        """Return what is stored; Tracked(*kept) is the same, but for its output."""
        kept = {name: self.info[name] for name in ("exit_code", "task_sandbox")
                if name in self.info}
        return [self.description, self.state, self.reason, kept]


class LucidSession(PluginSession):
    """A session of RADICAL-Pilot: its pilots and its tasks. They end with the edge."""

    def __init__(self, sid: str) -> None:
        super().__init__(sid)
        self.status = "starting"                  # then "ready"; at last "failed" or "ended"
        self._error: Optional[EdgeError] = None   # why calls fail, unless ready
        self._pid: Optional[int] = None           # of the process that runs RADICAL-Pilot
        self._pilots: Dict[str, Tracked] = {}
        self._tasks: Dict[str, Tracked] = {}
        self._child: Optional[PilotChild] = None  # None in a restored session
        self._starting: Optional["asyncio.Task[None]"] = None
        self._timers: List[asyncio.TimerHandle] = []
        self._loss = "child_died"                 # why the child will have ended

    async def start(self) -> None:
        """Start the child, in the background. A restored session has none any more."""
        if self.status == "starting":
            self._child = PilotChild(self._plugin.folder(self.sid), self._on_event)
            self._starting = asyncio.ensure_future(self._start_child(self._child))
            self._call_later(CHILD_START_S, self._on_late)

    def is_busy(self) -> bool:
        """A session with live pilots does not expire."""
        return any(not pilot.is_final for pilot in self._pilots.values())

    @property
    def has_child(self) -> bool:
        """Whether a process runs for this session."""
        return self.status in ("starting", "ready")

    def snapshot(self) -> Any:
        """Return pilots and tasks, for a later process to say what became of them."""
        return {"status": self.status, "error": self._error and self._error.detail,
                "pilots": [pilot.keep() for pilot in self._pilots.values()],
                "tasks": [task.keep() for task in self._tasks.values()]}

    def restore(self, state: Any) -> None:
        """Take what an earlier process left: what lived then is lost."""
        for kind, table in (("pilots", self._pilots), ("tasks", self._tasks)):
            for kept in state[kind]:
                entry = Tracked(*kept)
                table[entry.uid] = entry
        self.status = "failed" if state["status"] == "failed" else "ended"
        self._error = Conflict(state["error"] or "the edge was restarted, and RADICAL-Pilot with "
                               "it: register a new session")
        asyncio.get_running_loop().call_soon(self._lose_all, "edge_restart")

    # -- what clients ask for

    async def pilot_submit(self, description: Any) -> Dict[str, Any]:
        """Submit a pilot; return {"pid"}. Raises Unprocessable, Conflict or NotInstalled."""
        entry = Tracked(parse_description(description, "pilot"))
        entry.description["exit_on_error"] = False       # it would end the child
        await self._submit("pilot_submit", self._pilots, entry)
        return {"pid": entry.uid}

    def _check_program(self, description: Dict[str, Any]) -> None:
        policy = self._plugin.policy
        policy.check("executors", "radical.pilot")
        if policy.restricts("executables"):
            if not isinstance(description.get("executable"), str) or not description["executable"] \
                    or description.get("pre_exec") or description.get("post_exec"):
                raise Forbidden("description: the policy of this edge allows only some "
                                "executables, and no pre_exec, post_exec or functions")
            description["executable"] = policy.check_program(description["executable"],
                                                             description.get("environment") or ())

    async def task_submit(self, description: Any) -> Dict[str, Any]:
        """Submit a task; return {"tid"}. It waits for a pilot. Raises as pilot_submit() does."""
        entry = Tracked(parse_task_description(description))
        self._check_program(entry.description)
        self._require_child()
        if self._pilots and not self.is_busy():
            raise Conflict("all pilots of the session have ended: submit another one first")
        await self._submit("task_submit", self._tasks, entry)
        return {"tid": entry.uid}

    async def task_wait(self, tid: str, timeout: float = MAX_WAIT_S) -> Dict[str, Any]:
        """Return {"tid", "task"} once the task has ended.

        timeout: seconds. Raises DeadlineExceeded when it has not ended by then.
        """
        task = self._find(self._tasks, tid, "task")
        try:
            await asyncio.wait_for(task.ended.wait(), timeout)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"the task is {task.state} after {timeout:g} s: wait "
                                   "again") from None
        return {"tid": tid, "task": task.describe()}

    async def get_task(self, tid: str) -> Dict[str, Any]:
        """Return {"tid", "task"} as things are."""
        return {"tid": tid, "task": self._find(self._tasks, tid, "task").describe()}

    async def get_pilot(self, pid: str) -> Dict[str, Any]:
        """Return {"pid", "pilot"} as things are."""
        return {"pid": pid, "pilot": self._find(self._pilots, pid, "pilot").describe()}

    async def task_cancel(self, tid: str) -> Dict[str, Any]:
        """End a task; return {"tid", "status": "canceled"}. Raises Conflict if it has ended."""
        await self._cancel("task_cancel", self._find(self._tasks, tid, "task"))
        return {"tid": tid, "status": "canceled"}

    async def pilot_cancel(self, pid: str) -> Dict[str, Any]:
        """End a pilot; return {"pid", "status": "canceled"}. Raises Conflict if it has ended."""
        await self._cancel("pilot_cancel", self._find(self._pilots, pid, "pilot"))
        return {"pid": pid, "status": "canceled"}

    async def list(self) -> Dict[str, Any]:
        """Return {"pilots", "tasks"}: uid, state, reason and exit_code of each."""
        return {"pilots": [pilot.summarize() for pilot in self._pilots.values()],
                "tasks": [task.summarize() for task in self._tasks.values()]}

    async def get_status(self) -> Dict[str, Any]:
        """Return {"status": starting, ready, failed or ended, "error", "pid" of the child}."""
        return {"sid": self.sid, "status": self.status, "pid": self._pid,
                "error": self._error and self._error.detail}

    async def close(self) -> Dict[str, Any]:
        """End the pilots, the tasks and the child, and delete their directory."""
        self._loss = "session_closed"
        for timer in self._timers:
            timer.cancel()
        if self._child is not None:
            await asyncio.wait([self._starting])
            await self._child.close()
        await asyncio.to_thread(remove_folder, self._plugin.folder(self.sid))
        return await super().close()

    async def stop(self) -> None:
        """End the child because the edge ends; what it ran is lost."""
        self._lose_all("edge_restart")
        if self._child is not None:
            self._child.kill()

    # -- inside

    async def _start_child(self, child: PilotChild) -> None:
        try:
            await child.start()
        except OSError as error:
            self._end("failed", Unavailable(f"the child could not be started: {error}"))

    def _on_late(self) -> None:
        if self.status == "starting":
            self._end("failed", Unavailable(f"RADICAL-Pilot took more than {CHILD_START_S:.0f} s "
                                            "to start"))
            self._child.kill()

    def _call_later(self, seconds: float, function: Callable[[], None]) -> None:
        self._timers = [timer for timer in self._timers
                        if timer.when() > asyncio.get_running_loop().time()]
        self._timers.append(asyncio.get_running_loop().call_later(seconds, function))

    def _on_event(self, message: Dict[str, Any]) -> None:
        kind = message["event"]
        if kind == "ready" and self.status == "starting":
            self.status, self._pid = "ready", message["pid"]
            self.notify("session_status", {"sid": self.sid, "status": "ready"})
        elif kind == "failed":
            error = message["error"]
            self._end("failed", NotInstalled(f"radical.pilot cannot be imported ({error}): pip "
                                             "install radical.pilot") if message["missing"]
                      else Unavailable(f"RADICAL-Pilot did not start: {error}"))
        elif kind == "gone":
            self._end("ended", Conflict("the process that ran RADICAL-Pilot has ended: register "
                                        "a new session"))
        elif kind in ("pilot", "task"):
            self._on_state(kind, message)

    def _end(self, status: str, error: EdgeError) -> None:
        """Take notice that there is no child any more, unless that is known."""
        if not self.has_child:
            return
        self.status, self._error = status, error
        log_lucid.warning("%s: %s", self.sid, error.detail)
        self.notify("session_status", {"sid": self.sid, "status": status, "error": error.detail})
        self._lose_all(self._loss)

    def _on_state(self, kind: str, message: Dict[str, Any]) -> None:
        entry = (self._pilots if kind == "pilot" else self._tasks).get(message["uid"])
        if entry is None or not entry.update(message["state"], info=message.get("info")):
            return
        if kind == "pilot" or entry.state in _TOLD_STATES:
            self._tell(kind, entry)
        if entry.is_final:
            self.keep()
        if kind == "pilot" and entry.is_final:
            self._call_later(PILOT_END_S, self._lose_stranded)

    def _tell(self, kind: str, entry: Tracked) -> None:
        told = {"sid": self.sid, **entry.summarize(), {"pilot": "pid", "task": "tid"}[kind]:
                entry.uid}
        self.notify(f"{kind}_status", told)

    def _lose_stranded(self) -> None:
        """Give up the tasks that a pilot took with it: RADICAL-Pilot leaves some waiting."""
        if not self.is_busy():
            self._lose([task for task in self._tasks.values() if task.state.startswith("AGENT")],
                       "task", "pilot_ended")

    def _lose_all(self, reason: str) -> None:
        self._lose(self._pilots.values(), "pilot", reason)
        self._lose(self._tasks.values(), "task", reason)
        self.keep()

    def _lose(self, entries: Iterable[Tracked], kind: str, reason: str) -> None:
        for entry in entries:
            if entry.update("LOST", reason):
                self._tell(kind, entry)

    def _require_child(self) -> PilotChild:
        if self.status == "starting":
            raise Conflict("the session is still starting, which takes 10 s or more: ask for its "
                           "status, and try again when it is ready", headers={"Retry-After": "5"})
        if self._error is not None:
            raise self._error
        return self._child

    async def _submit(self, operation: str, table: Dict[str, Tracked], entry: Tracked) -> None:
        self._check_active()
        child = self._require_child()
        if entry.uid in table:
            raise Conflict(f"description.uid: there is a {entry.uid!r} in this session already")
        self._make_room(table)
        table[entry.uid] = entry                  # states may be told before the call returns
        # to its end, although the client may go away meanwhile
        await asyncio.shield(asyncio.ensure_future(self._send(child, operation, table, entry)))

    @staticmethod
    async def _send(child: PilotChild, operation: str, table: Dict[str, Tracked],
                    entry: Tracked) -> None:
        try:
            await child.call(operation, entry.description)
        except PilotRefused as error:
            del table[entry.uid]
            raise Unprocessable(f"description: RADICAL-Pilot refuses it: {error}") from None
        except EdgeError:
            entry.update("LOST", "child_died")    # it may have been begun
            raise

    @staticmethod
    def _make_room(table: Dict[str, Tracked]) -> None:
        if len(table) < MAX_ENTRIES:
            return
        oldest = next((uid for uid, entry in table.items() if entry.is_final), None)
        if oldest is None:
            raise TooManyRequests(f"the session has {MAX_ENTRIES} that have not ended: wait for "
                                  "some of them")
        del table[oldest]

    async def _cancel(self, operation: str, entry: Tracked) -> None:
        if not entry.is_final:
            try:
                await self._require_child().call(operation, entry.uid)
                await asyncio.wait_for(entry.ended.wait(), CANCEL_WAIT_S)
            except PilotRefused as error:
                raise Unavailable(f"RADICAL-Pilot did not cancel it: {error}") from None
            except asyncio.TimeoutError:
                raise Unavailable("it was told to end and has not yet: look again") from None
            if entry.state == "CANCELED":
                return
        raise Conflict(f"it has ended already: it is {entry.state}")

    @staticmethod
    def _find(table: Dict[str, Tracked], uid: str, kind: str) -> Tracked:
        if uid not in table:
            raise NotFound(f"there is no {kind} {uid[:80]!r} in this session: see list")
        return table[uid]


class LucidClient(PluginClient):
    """A program's access to the pilots and tasks of one session."""

    def wait_ready(self, timeout: float = CHILD_START_S) -> None:
        """Return once RADICAL-Pilot works. Raises EdgeError when it fails or takes longer."""
        end = time.monotonic() + timeout
        while True:
            status = self.get_status()
            if status["status"] == "ready":
                return
            if status["status"] != "starting":
                raise Unavailable(f"the session is {status['status']}: {status['error']}")
            if time.monotonic() > end:
                raise DeadlineExceeded(f"RADICAL-Pilot was not ready after {timeout:g} s")
            time.sleep(0.25)

    def pilot_submit(self, description: Dict[str, Any]) -> Dict[str, Any]:
        """Submit a pilot, once the session is ready; return {"pid"}."""
        self.wait_ready()
        return self._post(f"pilot_submit/{self._require_session()}", {"description": description})

    def task_submit(self, description: Dict[str, Any]) -> Dict[str, Any]:
        """Submit a task, once the session is ready; return {"tid"}."""
        self.wait_ready()
        return self._post(f"task_submit/{self._require_session()}", {"description": description})

    def task_wait(self, tid: str, timeout: Optional[float] = None) -> Dict[str, Any]:
        """Return {"tid", "task"} once the task has ended, in any state.

        timeout: seconds, None for no limit. Raises DeadlineExceeded.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 60.0 if end is None else max(0.0, min(60.0, end - time.monotonic()))
            try:
                return self._get(f"task_wait/{self._require_session()}/{tid}",
                                 timeout=f"{left:.3f}")
            except DeadlineExceeded:
                if end is not None and time.monotonic() >= end:
                    raise

    def task_cancel(self, tid: str) -> Dict[str, Any]:
        """End a task; return {"tid", "status"}. Raises Conflict when it has ended already."""
        return self._post(f"task_cancel/{self._require_session()}/{tid}")

    def pilot_cancel(self, pid: str) -> Dict[str, Any]:
        """End a pilot; return {"pid", "status"}. Raises Conflict when it has ended already."""
        return self._post(f"pilot_cancel/{self._require_session()}/{pid}")

    def get_task(self, tid: str) -> Dict[str, Any]:
        """Return {"tid", "task"}."""
        return self._get(f"task/{self._require_session()}/{tid}")

    def get_pilot(self, pid: str) -> Dict[str, Any]:
        """Return {"pid", "pilot"}."""
        return self._get(f"pilot/{self._require_session()}/{pid}")

    def list(self) -> Dict[str, Any]:
        """Return {"pilots", "tasks"} of this session."""
        return self._get(f"list/{self._require_session()}")

    def get_status(self) -> Dict[str, Any]:
        """Return {"status": starting, ready, failed or ended, "error", "pid"}."""
        return self._get(f"status/{self._require_session()}")


class PluginLucid(Plugin):
    """Runs pilots and tasks through RADICAL-Pilot, wherever that is installed."""

    plugin_name = "lucid"
    session_class = LucidSession
    client_class = LucidClient
    version = "0.0.1"
    ui_config = {
        "icon": "✈️", "title": "RADICAL-Pilot",
        "description": "Pilots and tasks through RADICAL-Pilot.",
        "monitors": [{"id": "tasks", "title": "📊 Task Monitor", "type": "task_list",
                      "css_class": "lucid-output", "empty_text": "No tasks submitted yet."}],
        "notifications": {"topic": "task_status", "id_field": "tid", "state_field": "state"}}

    def __init__(self, app: Any, instance_name: str = "lucid") -> None:
        super().__init__(app, instance_name)
        self.add_route_post("pilot_submit/{sid}", self.pilot_submit)
        self.add_route_post("task_submit/{sid}", self.task_submit)
        self.add_route_get("task_wait/{sid}/{tid}", self.task_wait)
        for method, path, function in (
                ("POST", "task_cancel/{sid}/{tid}", LucidSession.task_cancel),
                ("POST", "pilot_cancel/{sid}/{pid}", LucidSession.pilot_cancel),
                ("GET", "task/{sid}/{tid}", LucidSession.get_task),
                ("GET", "pilot/{sid}/{pid}", LucidSession.get_pilot),
                ("GET", "list/{sid}", LucidSession.list),
                ("GET", "status/{sid}", LucidSession.get_status)):
            self.add_route(method, path, self._make_handler(function))

    def is_enabled(self) -> bool:
        """Whether radical.pilot is there, in the Python that the child will run."""
        python = pilot_python()
        # a child that finds no more than this process need not be asked, which takes 50 ms
        may_be_here = python != sys.executable or "PYTHONPATH" in os.environ or \
            importlib.util.find_spec("radical") is not None
        search = "import importlib.util, sys; sys.exit(importlib.util.find_spec('radical.pilot')" \
                 " is None)"
        if may_be_here and run_command([python, "-c", search], 10 * COMMAND_S) is not None:
            return True
        self.why_disabled = (f"radical.pilot is not installed for {python}: pip install "
                             "radical.pilot, or name another Python in RADICAL_LUCID_PYTHON")
        return False

    def folder(self, sid: str) -> Path:
        """Return the directory of a session and its child."""
        return self.state_dir / "sessions" / sid

    async def start(self) -> None:
        """Delete what sessions left that are gone."""
        await asyncio.to_thread(self._clean, set(self._sessions))

    async def stop(self) -> None:
        """End the children: nothing of RADICAL-Pilot can be found again by a later process."""
        for record in self._sessions.values():
            await record.session.stop()

    async def pilot_submit(self, request: Request) -> Any:
        """Submit the pilot of {"description"}; answer {"pid"}."""
        return await self._submit(request, LucidSession.pilot_submit)

    async def task_submit(self, request: Request) -> Any:
        """Submit the task of {"description"}; answer {"tid"}."""
        return await self._submit(request, LucidSession.task_submit)

    async def task_wait(self, request: Request) -> Any:
        """Answer {"tid", "task"} once it has ended; 504 after ?timeout= seconds."""
        timeout = parse_seconds(request.query_params.get("timeout", f"{MAX_WAIT_S}"), "timeout")
        return await self._forward(request.path_params["sid"], LucidSession.task_wait,
                                   request.path_params["tid"], min(timeout, MAX_WAIT_S))

    async def _submit(self, request: Request, function: Callable[..., Any]) -> Any:
        body = await request.json_object()
        answer = await self._forward(request.path_params["sid"], function, body.get("description"))
        await self._store_now()                   # so that a later process can tell what became
        return answer

    def _make_handler(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def handler(request: Request) -> Any:
            params = dict(request.path_params)
            return await self._forward(params.pop("sid"), function, *params.values())
        handler.__doc__ = function.__doc__
        return handler

    def _create_session(self, sid: str, **kwargs: Any) -> PluginSession:
        if kwargs:
            raise Unprocessable(f"{sorted(kwargs)[0]}: a lucid session takes no arguments")
        if sum(record.session.has_child for record in self._sessions.values()) >= MAX_CHILDREN:
            raise TooManyRequests(f"there are {MAX_CHILDREN} sessions with a process already: "
                                  "unregister one")
        return LucidSession(sid)

    def _clean(self, known: Any) -> None:
        for folder in (self.state_dir / "sessions").glob("*"):
            if folder.name not in known:
                remove_folder(folder)


def parse_seconds(text: str, name: str) -> float:
    """Return a query value as seconds. Raises Unprocessable for anything but 0 or more."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", text):
        raise Unprocessable(f"{name}: {text[:40]!r} is not a number of seconds, 0 or more")
    return float(text)


# ---------------------------------------------------------------------------
# 8. xgfabric: a workflow over several edges: sensor data, simulations, training, evaluation. First
#    what is configured, measured and chosen, without I/O; then files and programs; then the calls
#    to other edges; then a run, in a thread of its own; then session, client and plugin.
# ---------------------------------------------------------------------------

log_xgfabric = logging.getLogger("radical_edge.xgfabric")

PATIENCE_S = 600.0             # another edge, or the bridge, may be away so long
CONNECT_S = 30.0               # ... when a run begins
CLEAN_UP_S = 30.0              # ... and when it cleans up
CALL_S = 60.0                  # one call to another edge
POLL_TASKS_S = 2.0             # one wait for tasks; a cancellation waits as long
LOOK_S = 15.0                  # between looks at the state of the pilot's job
STOP_WAIT_S = 45.0             # stop answers then, although the run still cleans up
SENSPOT_S = 30.0               # one call of senspot-get
MAX_SENSOR_FAILURES = 10       # readings in a row that cannot be used
MAX_LOG = 50                   # messages in the state
MAX_CONFIG = 1024 * 1024       # bytes of a configuration file
MAX_CONFIGS = 1000             # files in the configuration directory

DEFAULT_CONFIG = "__default__"
BUILTIN_NAMES = (DEFAULT_CONFIG, "default", "test")
DEFAULT_WORKFLOW_PATH = "~/xgfabric/intheloop"
PILOT_PLUGINS = "sysinfo,staging,rhapsody"
BATCH_EXECUTORS = ("slurm", "pbs", "lsf", "cobalt")
TASK_DONE = frozenset(("DONE", "COMPLETED"))
TASK_FINAL = TASK_DONE | {"FAILED", "CANCELED"}
CLIENT_TOKEN = "client-token"  # the file beside `token` with which a run calls other edges
TOKEN_HELP = ("a run calls other edges as a client: on the bridge make a token with --token add "
              "NAME, and put it into ~/.radical/edge/client-token on this edge (chmod 600)")

_SENSPOT_PLACES = ("~/bin", "~/common/cspot/build/bin",
                   "/global/common/software/m5290/cspot/build/bin")
_CONFIG_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_FORMAT_SPEC = re.compile(r"[<>^]?0?[0-9]{0,2}(\.[0-9]{1,2})?[defgs]?")
_SIMULATION_PLACES = ("workflow_path", "sim_output_dir", "wind_speed", "sim_id", "wind_dir")
_TRAINING_PLACES = ("workflow_path", "sensor_dir", "sim_dir", "output_dir", "model")
_EVALUATION_PLACES = ("workflow_path", "sensor_file", "eval_output")


@dataclasses.dataclass
class ResourceConfig:
    """Where to run: the bridge, and of each cluster, by its edge's name, what its queue needs.

    A cluster has queue, account, duration (seconds), nodes, executor, custom_attributes, tunnel (of
    psij's submit_tunneled), workflow_path, backend (of rhapsody), has_gpu and cluster_type
    ("immediate" or "allocate"), all optional. The edge's own bridge is used; bridge_url is only for
    a session without one.
    """
    name: str = "default"
    bridge_url: str = "https://localhost:8000"
    bridge_cert: Optional[str] = None
    cluster_configs: Dict[str, Dict] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class WorkflowConfig:
    """What to run: {"executable", "arguments"} of each task, with {placeholders}, and how often."""
    name: str = "default"
    description: str = ""
    local_workspace: str = "/tmp/xgfabric_workspace"
    cspot_woof_url: str = "woof://128.111.45.61/davisstations/daviscupsout"
    cspot_limit: int = 10
    num_simulations: int = 16
    batch_size: int = 4
    train_models: List[str] = dataclasses.field(default_factory=lambda: ["pcr", "pinn", "fno"])
    simulation_task: Optional[Dict] = None
    training_tasks: Dict[str, Dict] = dataclasses.field(default_factory=dict)
    evaluation_task: Optional[Dict] = None
    mock_sensor_data: bool = False


@dataclasses.dataclass
class ClusterStatus:
    """An edge as a run sees it. cluster_type: "immediate" or "allocate"."""
    name: str
    edge_name: str
    cluster_type: str
    has_gpu: bool = False
    online: bool = False
    tasks_running: int = 0
    pilot_job_id: Optional[str] = None
    pilot_status: Optional[str] = None


@dataclasses.dataclass
class WorkflowState:
    """How far a run is. status: "idle", "running", "completed", "failed" or "cancelled".

    progress: percent. Times are UTC, ISO 8601. log: {"time", "level", "message"}, the newest first.
    """
    status: str = "idle"
    phase: str = ""
    progress: int = 0
    message: str = ""
    start_time: Optional[str] = None
    end_time: Optional[str] = None
    error: Optional[str] = None
    active_cluster: Optional[str] = None
    completed_simulations: int = 0
    total_simulations: int = 0
    current_batch: int = 0
    total_batches: int = 0
    pilot_jobs: Dict[str, str] = dataclasses.field(default_factory=dict)
    immediate_clusters: List[Dict] = dataclasses.field(default_factory=list)
    allocate_clusters: List[Dict] = dataclasses.field(default_factory=list)
    log: List[Dict] = dataclasses.field(default_factory=list)
    config_name: Optional[str] = None
    config_dir: Optional[str] = None


# -- what is configured

def config_to_dict(cfg: WorkflowConfig) -> Dict:
    """Return a configuration as a JSON value."""
    return dataclasses.asdict(cfg)


def dict_to_config(d: Dict) -> WorkflowConfig:
    """Return the configuration of a JSON value; unknown fields are left out.

    Raises Unprocessable, which names the field.
    """
    return WorkflowConfig(**_take_fields(d, _WORKFLOW_FIELDS, "config", ""))


def dict_to_resource_config(d: Dict) -> ResourceConfig:
    """Return the resource configuration of a JSON value; unknown fields are left out.

    Raises Unprocessable, which names the field.
    """
    return ResourceConfig(**_take_fields(d, _RESOURCE_CONFIG_FIELDS, "resource", ""))


_Check = Callable[[Any, str], Any]


def _take_fields(value: Any, checks: Dict[str, _Check], whole: str, prefix: str) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise Unprocessable(f"{whole}: must be an object")
    return {name: check(value[name], prefix + name) for name, check in checks.items()
            if value.get(name) is not None}


def _take_text(value: Any, field: str) -> str:
    if not _is_text(value) or len(value) > 4096:
        raise Unprocessable(f"{field}: must be a string of at most 4096 characters")
    return value


def _take_name(value: Any, field: str) -> str:
    if not isinstance(value, str) or not _CONFIG_NAME.fullmatch(value):
        raise Unprocessable(f"{field}: must be 1 to 64 letters, digits, '_', '.' or '-', and not "
                            "begin with '.' or '-'")
    return value


def _take_flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise Unprocessable(f"{field}: must be true or false")
    return value


def _take_count(limit: int) -> _Check:
    def check(value: Any, field: str) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            value = int(value)                    # forms send text
        if not _is_count(value) or value > limit:
            raise Unprocessable(f"{field}: must be a whole number from 1 to {limit}")
        return value
    return check


def _take_choice(*choices: str) -> _Check:
    def check(value: Any, field: str) -> str:
        if value not in choices:
            raise Unprocessable(f"{field}: must be one of {', '.join(choices)}")
        return value
    return check


def _take_workspace(value: Any, field: str) -> str:
    path = os.path.expanduser(_take_text(value, field))
    if not os.path.isabs(path) or ".." in path.split("/"):
        raise Unprocessable(f"{field}: must be an absolute path without '..'")
    return value


def _take_names(value: Any, field: str) -> List[str]:
    if not isinstance(value, list) or len(value) > 100:
        raise Unprocessable(f"{field}: must be a list of names")
    return [_take_name(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _take_task(places: Iterable[str]) -> _Check:
    """Return what checks a task template: an executable, arguments, and known placeholders only."""
    def check(value: Any, field: str) -> Dict[str, Any]:
        if not isinstance(value, dict) or not value.get("executable"):
            raise Unprocessable(f"{field}: must be an object with executable and arguments")
        arguments = value.get("arguments", [])
        if not isinstance(arguments, list) or len(arguments) > 1000:
            raise Unprocessable(f"{field}.arguments: must be a list of strings")
        _check_template(value["executable"], f"{field}.executable", places)
        for index, argument in enumerate(arguments):
            _check_template(argument, f"{field}.arguments[{index}]", places)
        return {"executable": value["executable"], "arguments": arguments}
    return check


def _check_template(text: Any, field: str, places: Iterable[str]) -> None:
    """Refuse what str.format_map() would fail at, or take for more than a placeholder."""
    try:
        parts = list(string.Formatter().parse(_take_text(text, field)))
    except ValueError as error:
        raise Unprocessable(f"{field}: {error}; write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in places or conversion or not _FORMAT_SPEC.fullmatch(spec or ""):
            raise Unprocessable(f"{field}: there is no placeholder {{{name[:40]}}}; there are: "
                                f"{', '.join(places)}; write {{{{ and }}}} for braces")


def _take_training_tasks(value: Any, field: str) -> Dict[str, Dict]:
    if not isinstance(value, dict) or len(value) > 100:
        raise Unprocessable(f"{field}: must be an object of models and their tasks")
    check = _take_task(_TRAINING_PLACES)
    return {_take_name(model, field): check(task, f"{field}.{model}")
            for model, task in value.items()}


def _take_object(value: Any, field: str) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise Unprocessable(f"{field}: must be an object")
    return value


def _take_clusters(value: Any, field: str) -> Dict[str, Dict]:
    if not isinstance(value, dict) or len(value) > 1000:
        raise Unprocessable(f"{field}: must be an object of edge names and their settings")
    return {_take_name(edge, field): _take_fields(cluster, _CLUSTER_FIELDS, f"{field}.{edge}",
                                                  f"{field}.{edge}.")
            for edge, cluster in value.items()}


_WORKFLOW_FIELDS: Dict[str, _Check] = {
    "name": _take_name, "description": _take_text, "local_workspace": _take_workspace,
    "cspot_woof_url": _take_text, "cspot_limit": _take_count(10_000),
    "num_simulations": _take_count(10_000), "batch_size": _take_count(1000),
    "train_models": _take_names, "simulation_task": _take_task(_SIMULATION_PLACES),
    "training_tasks": _take_training_tasks, "evaluation_task": _take_task(_EVALUATION_PLACES),
    "mock_sensor_data": _take_flag}
_CLUSTER_FIELDS: Dict[str, _Check] = {
    "queue": _take_text, "account": _take_text, "duration": _take_count(10 * 366 * 86400),
    "nodes": _take_count(1_000_000), "executor": _take_name, "workflow_path": _take_text,
    "custom_attributes": _take_object, "backend": _take_name, "tunnel": _take_text,
    "has_gpu": _take_flag, "cluster_type": _take_choice("immediate", "allocate")}
_RESOURCE_CONFIG_FIELDS: Dict[str, _Check] = {
    "name": _take_name, "bridge_url": _take_text, "bridge_cert": _take_text,
    "cluster_configs": _take_clusters}


def _task(command: str) -> Dict[str, Any]:
    executable, *arguments = shlex.split(command)
    return {"executable": executable, "arguments": arguments}


_DEFAULT_WORKFLOW = {
    "name": "default", "cspot_limit": 9,
    "description": "CFD simulations of the wind at a screen house, and models trained on them",
    "simulation_task": _task(
        "{workflow_path}/simulation/runme.sh {workflow_path}/simulation/cups_structure.zip 32 "
        "{wind_speed} 0.0 0.0 {sim_output_dir} '1 4 1' {sim_id} {wind_dir}"),
    "training_tasks": {
        "pcr": _task("{workflow_path}/training/pcr/train_pcr.sh {sensor_dir} --simulations-dir "
                     "{sim_dir} --output-dir {output_dir}/pcr"),
        "pinn": _task("python3 {workflow_path}/training/pinn/train_pinn.py {sim_dir} pinn_model "
                      "--output_dir {output_dir}/pinn"),
        "fno": _task("python3 {workflow_path}/training/fno/train_fno.py --data-dir {sim_dir} "
                     "--output-dir {output_dir}/fno")},
    "evaluation_task": _task("python3 {workflow_path}/evaluation/evaluate.py {sensor_file} "
                             "{eval_output}")}
_TEST_WORKFLOW = {
    "name": "test", "description": "Small stand-ins for all tasks, and made-up sensor data",
    "cspot_limit": 9, "num_simulations": 4, "batch_size": 2, "train_models": ["pcr"],
    "mock_sensor_data": True, "simulation_task": _task("bash -c \"sleep 3 && echo '1 2 3 4'\""),
    "training_tasks": {"pcr": _task("bash -c \"sleep 1 && echo 'training done'\"")},
    "evaluation_task": _task("bash -c \"sleep 1 && echo 'evaluation done'\"")}
_TEST_RESOURCE = {
    "name": "test", "cluster_configs": {
        "anvil": {"queue": "wholenode", "account": "dmr140125", "duration": 600, "nodes": 1,
                  "executor": "slurm", "workflow_path": DEFAULT_WORKFLOW_PATH},
        "frontier": {"queue": "batch", "account": "fus183", "duration": 600, "nodes": 1,
                     "executor": "slurm", "workflow_path": DEFAULT_WORKFLOW_PATH},
        "ucsb": {"workflow_path": DEFAULT_WORKFLOW_PATH, "cluster_type": "immediate"}}}


def builtin_workflow(name: str) -> Optional[Dict]:
    """Return the workflow configuration that comes with the plugin, None if it is not a builtin."""
    if name not in BUILTIN_NAMES:
        return None
    return config_to_dict(dict_to_config(_TEST_WORKFLOW if name == "test" else _DEFAULT_WORKFLOW))


def builtin_resource(name: str) -> Optional[Dict]:
    """Return the resource configuration that comes with the plugin, None if there is none."""
    if name not in BUILTIN_NAMES:
        return None
    return dataclasses.asdict(dict_to_resource_config(
        _TEST_RESOURCE if name == "test" else {"name": "default"}))


def render_task(template: Dict[str, Any], values: Dict[str, Any]) -> Dict[str, Any]:
    """Return {"executable", "arguments"} with the values in place of their placeholders."""
    return {"executable": template["executable"].format_map(values),
            "arguments": [argument.format_map(values) for argument in template["arguments"]]}


# -- what is measured

class SensorRecord(NamedTuple):
    """A reading: UTC time, wind speed and its average in m/s, direction in degrees."""
    dt: str
    windspeed: float
    windavg: float
    winddir: float


def parse_seq_no(text: str) -> Optional[int]:
    """Return the number of the last record, of what `senspot-get -W` prints; None without one."""
    match = re.search(r"seq_no:\s+([0-9]{1,18})\b", text)
    return int(match[1]) if match else None


def parse_sensor_record(text: str) -> Optional[SensorRecord]:
    """Return the reading that senspot-get printed: "speed:average:direction ... time: epoch".

    Some stations send miles per hour: speeds above 50 are taken for such. None for a line that is
    no reading.
    """
    number = r"(-?[0-9]{1,9}(?:\.[0-9]{0,9})?)"
    when = r"([0-9]{1,11}(?:\.[0-9]{0,9})?)(?![0-9])"
    match = re.search(rf"(?<![\w.:-]){number}:{number}:{number}\b.*?\btime:\s*{when}", text,
                      re.DOTALL)
    if match is None:
        return None
    speed, average, direction, seconds = map(float, match.groups())
    if speed > 50:
        speed, average = speed * 0.44704, average * 0.44704
    return SensorRecord(_format_time(seconds), round(speed, 4), round(average, 4), direction)


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def make_mock_records(count: int, now: float) -> List[SensorRecord]:
    """Return made-up readings, 8 or more, five minutes apart; the last is of `now`."""
    count = max(count, 8)
    return [SensorRecord(_format_time(now - 300 * (count - 1 - index)), 2.0 + 0.5 * index,
                         2.0 + 0.5 * index, 90.0 + 5 * index) for index in range(count)]


def encode_sensor_csv(records: Iterable[SensorRecord]) -> str:
    """Return readings as CSV with a line of names."""
    lines = [",".join(map(str, record)) for record in records]
    return "\n".join([",".join(SensorRecord._fields), *lines]) + "\n"


def make_parameters(records: Iterable[SensorRecord], count: int) -> List[Tuple[float, float, int]]:
    """Return (wind speed, wind direction, id) of each simulation, in even steps over the readings.

    Raises EdgeError when no reading has a speed between 0.5 and 30 m/s.
    """
    speeds = [record.windspeed for record in records if 0.5 < record.windspeed < 30]
    if not speeds:
        raise EdgeError("no reading has a wind speed between 0.5 and 30 m/s")
    step = (max(speeds) - min(speeds)) / max(1, count - 1)
    return [(round(min(speeds) + index * step, 2), 0.0, index) for index in range(count)]


# -- what is chosen

def classify_edges(edges: Dict[str, Any], clusters: Dict[str, Dict]
                   ) -> Tuple[List[Dict], List[Dict]]:
    """Return the clusters that run tasks at once, and those where a pilot must be queued.

    edges: {name: {"plugins": names}}. cluster_type decides, then the name: what has "ucsb" in it is
    immediate; then whether the edge has queue_info. Edges that lack the plugins for their part, and
    children of others (NAME.1), are left out. Those that are configured come first, in that order.
    """
    immediate, allocate = [], []
    order = [name for name in clusters if name in edges]
    for name in order + sorted(set(edges) - set(order)):
        plugins, settings = set(edges[name].get("plugins") or ()), clusters.get(name, {})
        parent, _, number = name.rpartition(".")
        if number.isdigit() and parent in edges:
            continue
        queued = "queue_info" in plugins and "ucsb" not in name
        kind = settings.get("cluster_type") or ("allocate" if queued else "immediate")
        needed = {"psij"} if kind == "allocate" else {"rhapsody", "staging"}
        if needed <= plugins:
            status = ClusterStatus(name, name, kind, online=True)
            described = {**dataclasses.asdict(status), **settings}
            (allocate if kind == "allocate" else immediate).append(described)
    return immediate, allocate


def result_name(wind_speed: float, wind_dir: float, sim_id: int) -> str:
    """Return the name of the file in which a simulation leaves its result."""
    return f"sim_{sim_id}_ws_{wind_speed}_wd_{wind_dir}.csv"


def make_pilot_spec(cluster: Dict[str, Any], child: str, executor: str) -> Dict[str, Any]:
    """Return the job_spec of the pilot whose edge will be named `child`, for submit_tunneled."""
    attributes: Dict[str, Any] = {"duration": cluster.get("duration", 3600)}
    if executor != "local":                       # which has neither queues nor nodes
        attributes.update(queue_name=cluster.get("queue", "regular"),
                          node_count=cluster.get("nodes", 1))
        for name in ("account", "custom_attributes"):
            if cluster.get(name):
                attributes[name] = cluster[name]
    return {"arguments": ["--name", child, "-p", PILOT_PLUGINS], "attributes": attributes}


def describe_failure(label: str, task: Dict[str, Any], command: Dict[str, Any]) -> str:
    """Return a line about a task that failed, of bounded length."""
    words = " ".join([command["executable"], *command["arguments"]])
    parts = [f"FAILED {label}: state={task.get('state')} exit={task.get('exit_code')}", words[:120]]
    for name in ("exception", "error", "stderr"):
        text = str(task.get(name) or "").strip()
        if text:
            parts.append(text[-200:])
    return " | ".join(parts)


# -- files and programs

class ConfigFiles:
    """Configurations as JSON files of one directory, NAME.json. Its methods block; any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list(self) -> List[Dict[str, Any]]:
        """Return {"name", "description", "modified"} of each file, by name."""
        found = []
        for path in sorted(self._folder.glob("*.json"))[:MAX_CONFIGS]:
            try:
                config = self._read(path)
                modified = _format_time(path.lstat().st_mtime)
            except (EdgeError, OSError) as error:
                log_xgfabric.warning("%s: left out: %s", path, error)
                continue
            found.append({"name": path.stem, "modified": modified,
                          "description": str(config.get("description", ""))[:4096]})
        return found

    def load(self, name: Any) -> Dict[str, Any]:
        """Return what a file holds, as it is. Raises NotFound, or Unprocessable for a bad name."""
        return self._read(self._find(name))

    def save(self, data: Any) -> str:
        """Check a workflow or resource configuration and write it; return its name.

        What has cluster_configs is a resource configuration. Raises Unprocessable by field.
        """
        _take_object(data, "config")
        name = _take_name(data.get("name"), "name")
        if name in BUILTIN_NAMES:
            raise Unprocessable(f"name: {name!r} is that of a builtin configuration")
        checked = dataclasses.asdict(dict_to_resource_config(data) if "cluster_configs" in data
                                     else dict_to_config(data))
        try:
            text = json.dumps(checked, indent=2) + "\n"
        except TypeError as error:                # bytes, of a body of msgpack
            raise Unprocessable(f"config: must hold JSON values only: {error}") from None
        path = self._find(name)
        if len(text) > MAX_CONFIG:
            raise Unprocessable(f"config: has more than {MAX_CONFIG} bytes")
        if not path.exists() and len(list(self._folder.glob("*.json"))) >= MAX_CONFIGS:
            raise TooManyRequests(f"there are {MAX_CONFIGS} configurations: delete some")
        try:
            write_private(path, text)
        except OSError as error:
            raise Unprocessable(f"config: {path} cannot be written: {error.strerror}") from None
        return name

    def delete(self, name: Any) -> str:
        """Delete a file; return its name. Raises NotFound, or Unprocessable for a bad name."""
        path = self._find(name)
        try:
            path.unlink()
        except OSError:
            raise NotFound(f"there is no configuration {path.stem!r} in {self._folder}") from None
        return path.stem

    def _find(self, name: Any) -> Path:
        """Return the path of a file in the directory; it may be named by its path there."""
        text = name if isinstance(name, str) else ""
        folder, _, last = text.rpartition("/")
        if folder and os.path.realpath(os.path.expanduser(folder)) != \
                os.path.realpath(self._folder):
            raise Unprocessable(f"name: {text[:80]!r} is not in the configuration directory, "
                                f"{self._folder}")
        return self._folder / (_take_name(last[:-5] if last.endswith(".json") else last, "name") +
                               ".json")

    def _read(self, path: Path) -> Dict[str, Any]:
        try:
            # neither links, which may lead elsewhere, nor pipes, which may never end
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                value = json.loads(file.read(MAX_CONFIG + 1))
        except OSError:
            raise NotFound(f"there is no configuration {path.stem!r} in {self._folder}") from None
        except (ValueError, RecursionError) as error:
            raise Unprocessable(f"{path}: is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise Unprocessable(f"{path}: must be a JSON object")
        return value


class Senspot:
    """Readings of a sensor, through the program senspot-get of CSPOT. Blocks."""

    def __init__(self, url: str, record: "RunRecord") -> None:
        if url.partition("://")[0 if "://" in url else 1] not in ("http", "https", "woof", "") or \
                url.startswith("-"):
            raise Unprocessable(f"cspot_woof_url: {url[:80]!r} is no URL with woof, http or https")
        self._url, self._record = url, record
        self._program = self._find()

    def read_last(self) -> int:
        """Return the number of the last record. Raises EdgeError when there is none."""
        output = self._run()
        number = parse_seq_no(output)
        if number is None:
            raise EdgeError(f"{self._program} -W {self._url} gives no seq_no: "
                            f"{(output or 'it failed')[:200].strip()!r}")
        return number

    def read(self, number: int) -> Optional[SensorRecord]:
        """Return a record, None when it cannot be read or used."""
        return parse_sensor_record(self._run("-S", str(number)))

    def _run(self, *options: str) -> str:
        """Return what the program prints, "" when it fails. Raises RunStopped."""
        command = [self._program, "-W", self._url, *options]
        try:
            ran = run_program(command, SENSPOT_S, MAX_COMMAND_OUTPUT,
                              stopped=self._record.stopping)
        except EdgeError as error:
            self._record.check()
            log_xgfabric.warning("%s", error.detail)
            return ""
        return ran.output if ran.code == 0 else ""

    @staticmethod
    def _find() -> str:
        given = os.environ.get("SENSPOT_PATH")
        places = [os.path.join(os.path.expanduser(place), "senspot-get")
                  for place in _SENSPOT_PLACES]
        for path in (given, find_program("senspot-get"), *places):
            if path and os.path.isfile(path) and os.access(path, os.X_OK):
                return path
        raise EdgeError("there is no program senspot-get: install CSPOT, or name it in "
                        "SENSPOT_PATH; or set mock_sensor_data")


def open_workspace(path: str) -> Path:
    """Return the directory for a run's local files, made if need be. Raises EdgeError.

    The default is below /tmp, where others may have put something of that name.
    """
    folder = Path(os.path.expanduser(path))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise EdgeError(f"local_workspace: {folder} is not a directory of ours")
        for name in ("data", "staging"):
            (folder / name).mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise EdgeError(f"local_workspace: {folder}: {error.strerror}") from None
    return folder


def client_token() -> Optional[str]:
    """Return the token with which runs call other edges: that of ~/.radical/edge/client-token, or
    else the edge's own, which will do where it is a client's or an admin's."""
    return read_private(home_dir() / CLIENT_TOKEN) or default_token()


# -- a run: what is known of it, how it calls other edges, what it does

class RunStopped(Exception):
    """The run was cancelled, or the edge ends and it is to go on later."""


class RunRecord:
    """What is known of a run: on disk after each change, and told to subscribers.

    data: JSON values from which it goes on after a restart; state: what clients see. The run's
    thread owns both; others get copies through describe(), and may call stop().
    """

    def __init__(self, path: Path, data: Dict[str, Any],
                 notify: Callable[[Dict[str, Any]], None]) -> None:
        self._path, self._notify = path, notify
        self.data, self.state = data, WorkflowState(**data["state"])
        self._published = dataclasses.asdict(self.state)         # replaced as a whole
        self.stopping = threading.Event()         # ends pauses and programs
        self._halted = False                      # the edge ends; set once, before stopping
        self.cancelled = False                    # by the user; likewise
        self._cleaning = False                    # the thread's: too late to be cancelled
        self.patience = PATIENCE_S

    @classmethod
    def load(cls, path: Path, notify: Callable[[Dict[str, Any]], None]) -> Optional["RunRecord"]:
        """Return what an earlier process left; None without a file. Blocks."""
        try:
            text = read_private(path)
            return cls(path, json.loads(text), notify) if text else None
        except (EdgeError, ValueError, TypeError, KeyError) as error:
            log_xgfabric.error("%s: cannot be read, the run is lost: %s", path, error)
            return None

    def describe(self) -> Dict[str, Any]:
        """Return the state as a JSON value. Any thread."""
        return self._published

    def stop(self, *, cancel: bool) -> None:
        """Make check() raise: for good, or until another process goes on. Any thread."""
        if cancel:
            self.cancelled = True
        else:
            self._halted = True
        if not cancel or not self._cleaning:
            self.stopping.set()

    def check(self) -> None:
        """Raise RunStopped when the run is to stop."""
        if self._halted or self.cancelled and not self._cleaning:
            raise RunStopped

    def pause(self, seconds: float) -> None:
        """Wait, unless the run is to stop."""
        self.stopping.wait(seconds)
        self.check()

    def begin_clean_up(self) -> None:
        """Let check() pass again, unless the edge ends, and do not wait long for anybody."""
        self._cleaning, self.patience = True, CLEAN_UP_S
        if not self._halted:
            self.stopping.clear()

    def keep(self, **values: Any) -> None:
        """Take values into data, and store them."""
        self.data.update(values)
        self.data["state"] = dataclasses.asdict(self.state)
        try:
            write_private(self._path, json.dumps(self.data))
        except OSError as error:                  # a full disk: what is done is true all the same
            log_xgfabric.error("%s: cannot be written: %s", self._path, error)

    def update(self, message: str = "", level: str = "info", **changes: Any) -> None:
        """Change the state, log a message, store both and tell subscribers.

        They are told what changed, and everything when the phase or the status did.
        """
        changes["progress"] = max(self.state.progress, changes.get("progress", 0))
        if message:
            now = time.strftime("%H:%M:%S", time.gmtime())
            entry = {"time": now, "level": level, "message": message}
            self.state.log = [entry, *self.state.log[:MAX_LOG - 1]]
            changes["message"] = message
            log_xgfabric.log(logging.WARNING if level != "info" else logging.INFO, "%s: %s",
                             self.data["run"], message)
        for name, value in changes.items():
            setattr(self.state, name, value)
        self.keep()
        whole, self._published = "phase" in changes or "status" in changes, self.data["state"]
        told = self._published if whole else {**changes, "log": self.state.log[:bool(message)]}
        self._notify({"delta": not whole, **told})


class OtherEdges:
    """Calls to the plugins of other edges, by one run, from its thread. Its methods block.

    A session is made once, and each POST is done once: their Idempotency-Keys follow from the run.
    An edge, or the bridge, may be away for record.patience seconds.
    """

    def __init__(self, make_client: Callable[[], BridgeClient], record: RunRecord) -> None:
        self._make_client, self._record = make_client, record
        self._client: Optional[BridgeClient] = None

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    def topology(self) -> Dict[str, Dict[str, Any]]:
        """Return {edge: {"plugins", ...}} of what is connected now."""
        return self._persist(lambda: self._connected().get_topology()["edges"])

    def get(self, edge: str, route: str, **params: Any) -> Any:
        """Return what a GET route answers, "plugin/route". Raises EdgeError."""
        return self._persist(lambda: self._send("GET", edge, route, params=params), edge)

    def post(self, edge: str, route: str, body: Dict[str, Any], key: str = "") -> Any:
        """Return what a POST route answers. key: what this request is called, within the run.

        Without a key it is a question, which may be asked again. Raises EdgeError.
        """
        key = f"{self._record.data['run']}.{key}" if key else ""
        return self._persist(lambda: self._send(
            "POST", edge, route, json=body, headers={"Idempotency-Key": key}), edge)

    def session(self, edge: str, plugin_name: str, **arguments: Any) -> str:
        """Return the id of the run's session in a plugin, which is made at the first call."""
        sessions, name = self._record.data["sessions"], f"{edge}/{plugin_name}"
        if not sessions.get(name):
            self._record.keep(sessions={**sessions, name: ""})   # may be made from here on
            answer = self.post(edge, f"{plugin_name}/register_session", arguments,
                               f"session.{name}")
            self._record.keep(sessions={**sessions, name: answer["sid"]})
        return self._record.data["sessions"][name]

    def put_file(self, edge: str, local: Path, remote: str) -> None:
        """Copy a file to an edge, in place of what is there; its directory is made if need be."""
        self.make_dir(edge, os.path.dirname(remote))
        staging = self._staging(edge)
        self._persist(lambda: staging.put(str(local), remote, overwrite=True), edge)

    def make_dir(self, edge: str, path: str) -> None:
        """Make a directory on an edge, with those above it, unless it is there."""
        staging = self._staging(edge)
        self._persist(lambda: staging.mkdir(path), edge)

    def get_file(self, edge: str, remote: str, local: Path) -> None:
        """Copy a file from an edge, in place of what is there. Raises NotFound."""
        staging = self._staging(edge)
        self._persist(lambda: staging.get(remote, str(local), overwrite=True), edge)

    def has_file(self, edge: str, remote: str) -> bool:
        """Whether there is such a file on an edge."""
        staging = self._staging(edge)
        try:
            self._persist(lambda: staging.stat(remote), edge)
            return True
        except NotFound:
            return False

    def expand(self, edge: str, path: str) -> str:
        """Return a path on an edge, with its home directory in place of '~'."""
        if not path.startswith("~"):
            return path
        homes = self._record.data["homes"]
        if edge not in homes:
            home = self.get(edge, "sysinfo/homedir")["homedir"]
            self._record.keep(homes={**homes, edge: home})
        return self._record.data["homes"][edge] + path[1:]

    # -- inside

    def _connected(self) -> BridgeClient:
        if self._client is None:
            self._client = self._make_client()
        return self._client

    def _staging(self, edge: str) -> Any:
        client = PluginStaging.client_class(
            self._connected().http, f"/{edge}/staging", bridge_client=self._connected(),
            edge_id=edge, plugin_name="staging")
        client._sid = self.session(edge, "staging")
        client.patience = 5.0                     # seconds; _persist() has more, and can be stopped
        return client

    def _send(self, method: str, edge: str, route: str, **options: Any) -> Any:
        headers = {"X-Request-Timeout": f"{CALL_S:g}", **options.pop("headers", {})}
        reply = self._connected().http.request(method, f"/{edge}/{route}", headers=headers,
                                               **options)
        return reply.raise_for_status().json()

    def _persist(self, function: Callable[[], Any], edge: str = "") -> Any:
        """Return what function() does; call it again while the edge or the bridge is away."""
        end, told = time.monotonic() + self._record.patience, False
        while True:
            self._record.check()
            try:
                return function()
            except (Unauthorized, Forbidden) as error:
                raise EdgeError(f"{error.detail}: {TOKEN_HELP}") from None
            except EdgeError as error:
                if not self._is_away(error, edge):
                    raise
                if time.monotonic() > end:
                    raise EdgeError(f"{edge or 'the bridge'} has been away for too long: "
                                    f"{error.detail}") from None
                if not told:
                    self._record.update(f"waiting for {edge or 'the bridge'}: {error.detail}",
                                        "warning")
                told = True
            self._record.pause(1.0)

    def _is_away(self, error: EdgeError, edge: str) -> bool:
        if isinstance(error, (Unavailable, BadGateway, DeadlineExceeded)):
            return True
        if isinstance(error, Conflict) and STILL_INITIALIZING in error.detail:
            return True                           # of rhapsody: that edge was just restarted
        if not isinstance(error, NotFound) or not edge:
            return False
        try:                                      # no such edge, or no such thing on the edge?
            return edge not in self._connected().get_topology()["edges"]
        except EdgeError:
            return True


class RemoteTasks:
    """Tasks on other edges, for one run: where it works, what it is called, how it ends."""

    def __init__(self, edges: OtherEdges, record: RunRecord) -> None:
        self._edges, self._record = edges, record

    def active_edge(self) -> str:
        """Return the edge on which the run works now."""
        return self._record.data["active"] or self._record.data["immediate"]["edge_name"]

    def folder(self, edge: str) -> str:
        """Return the workflow's directory on an edge."""
        path = self._cluster(edge).get("workflow_path", DEFAULT_WORKFLOW_PATH)
        return self._edges.expand(edge, path.rstrip("/"))

    def name(self, label: str) -> str:
        """Return the uid of a task, which no other run has."""
        return f"xgfabric.{self._record.data['run']}.{label}"

    def run(self, label: str, template: Dict[str, Any], places: Iterable[str], **more: Any) -> None:
        """Run one task at the active edge to its end, once. Raises EdgeError when it fails."""
        if label in self._record.data["finished"]:
            return
        edge, uid = self.active_edge(), self.name(label)
        folder = self.folder(edge)
        known = {"workflow_path": folder, "sensor_dir": f"{folder}/data",
                 "sim_dir": f"{folder}/simulations", "output_dir": f"{folder}/models",
                 "sensor_file": f"{folder}/data/sensor_out.csv",
                 "eval_output": f"{folder}/evaluation", **more}
        command = render_task(template, {place: known[place] for place in places})
        self.submit(edge, [{"uid": uid, **command}], label)
        ended: List[Dict[str, Any]] = []
        while not ended:
            ended = self.wait(edge, [uid])
        if ended[0]["state"] not in TASK_DONE:
            raise EdgeError(describe_failure(label, self.get(edge, uid), command))
        self._record.keep(finished=[*self._record.data["finished"], label])

    def submit(self, edge: str, tasks: List[Dict[str, Any]], key: str) -> None:
        """Submit tasks, once: also when an edge was killed while it worked on that."""
        sid = self.open_session(edge)
        try:
            self._edges.post(edge, f"rhapsody/submit/{sid}", {"tasks": tasks}, key)
        except Conflict:                          # some of them are there
            states = self._ask(edge, [task["uid"] for task in tasks], 0)
            missing = [task for task in tasks if states.get(task["uid"], "UNKNOWN") == "UNKNOWN"]
            if missing:
                self._edges.post(edge, f"rhapsody/submit/{sid}", {"tasks": missing},
                                 f"{key}.again")

    def wait(self, edge: str, uids: List[str]) -> List[Dict[str, Any]]:
        """Return {"uid", "state"} of the tasks that have ended, after POLL_TASKS_S at most."""
        states = self._ask(edge, uids, POLL_TASKS_S)
        if "UNKNOWN" in states.values() or not states:
            raise EdgeError(f"rhapsody on {edge} does not know the tasks of this run any more")
        return [{"uid": uid, "state": state} for uid, state in states.items()
                if state in TASK_FINAL]

    def get(self, edge: str, uid: str) -> Dict[str, Any]:
        """Return all that is known of a task."""
        return self._edges.get(edge, f"rhapsody/task/{self.open_session(edge)}/{uid}")

    def open_session(self, edge: str) -> str:
        """Return the run's session in an edge's rhapsody, once it is ready."""
        known = self._record.data["sessions"].get(f"{edge}/rhapsody")
        backend = self._cluster(edge).get("backend")
        sid = self._edges.session(edge, "rhapsody", **({"backends": [backend]} if backend else {}))
        while not known:
            told = self._edges.get(edge, f"rhapsody/session/{sid}")
            if told["status"] == "failed":
                raise EdgeError(f"rhapsody on {edge}: {told['error']}")
            if told["status"] == "ready":
                break
            self._record.pause(0.2)               # it is initializing
        return sid

    def _ask(self, edge: str, uids: List[str], timeout: float) -> Dict[str, str]:
        """Return {uid: state}; {} when none is known."""
        try:
            tasks = self._edges.post(edge, f"rhapsody/wait/{self.open_session(edge)}",
                                     {"uids": uids, "timeout": timeout})
        except NotFound:
            return {}
        return {task["uid"]: task["state"] for task in tasks}

    def _cluster(self, edge: str) -> Dict[str, Any]:
        """Return the cluster of an edge, or of a pilot's edge."""
        data = self._record.data
        return data["allocate"] if edge == data["child"] else data["immediate"]


class Pilot:
    """The job that starts an edge within an allocation, for one run."""

    def __init__(self, edges: OtherEdges, record: RunRecord) -> None:
        self._edges, self._record = edges, record
        self._looked = 0.0                        # monotonic; at the job

    def find_backend(self, edge: str) -> str:
        """Return the batch system of an edge: "slurm", "pbs" ... or "none"."""
        return self._edges.get(edge, "queue_info/backend").get("backend") or "none"

    def submit(self, cluster: Dict[str, Any]) -> Tuple[str, str]:
        """Return the job's id and the name that its edge will have. Raises EdgeError."""
        edge, executor = cluster["edge_name"], cluster.get("executor")
        if executor is None:
            backend = self.find_backend(edge)
            executor = backend if backend in BATCH_EXECUTORS else "slurm"
        sid, begun = self._edges.session(edge, "psij"), self._record.data["child"]
        taken = self._edges.topology()
        free = [name for name in (f"{edge}.{number}" for number in range(1, 10))
                if name not in taken and name != begun]
        for child in [begun] * (begun is not None) + free:
            self._record.keep(child=child)
            body = {"job_spec": make_pilot_spec(cluster, child, executor), "executor": executor,
                    "tunnel": cluster.get("tunnel", "none")}
            try:
                answer = self._edges.post(edge, f"psij/submit_tunneled/{sid}", body,
                                          f"pilot.{child}")
                return answer["job_id"], child
            except Conflict as error:             # one of that name is on its way
                self._record.update(f"{child}: {error.detail}", "warning")
        raise EdgeError(f"there are nine pilots of {edge} already")

    def is_online(self) -> bool:
        """Whether the pilot's edge is there, with what tasks need."""
        child = self._record.data["child"]
        if child is None:
            return False
        plugins = self._edges.topology().get(child, {}).get("plugins", {})
        if {"rhapsody", "staging"} <= set(plugins):
            return True
        if time.monotonic() > self._looked + LOOK_S:
            self._looked = time.monotonic()
            try:
                self._look(self._record.data["allocate"])
            except EdgeError as error:            # only what is told of the pilot suffers
                log_xgfabric.warning("%s: the pilot's job: %s", child, error.detail)
        return False

    def _look(self, cluster: Dict[str, Any]) -> None:
        """Tell the state of the job when it has changed."""
        edge, name = cluster["edge_name"], cluster["name"]
        job_id = self._record.state.pilot_jobs.get(name)
        sid = self._edges.session(edge, "psij")
        status = self._edges.get(edge, f"psij/status/{sid}/{job_id}")
        clusters = self._record.state.allocate_clusters
        known = next((item for item in clusters if item["name"] == name), {})
        if known.get("pilot_status") == status["state"]:
            return
        clusters = [{**item, "pilot_job_id": job_id, "pilot_status": status["state"]}
                    if item["name"] == name else item for item in clusters]
        reason = f": {status['message']}" if status.get("message") else ""
        self._record.update(f"pilot {job_id} on {name} is {status['state']}{reason}",
                            allocate_clusters=clusters)


def place_in_workspace(config: WorkflowConfig, record: RunRecord, name: str) -> Path:
    """Return where a run has a file on its way; another one may have the same workspace."""
    return open_workspace(config.local_workspace) / "staging" / f"{record.data['run']}.{name}"


class Simulations:
    """The simulations of one run, in batches."""

    def __init__(self, config: WorkflowConfig, edges: OtherEdges, tasks: RemoteTasks,
                 pilot: Pilot, record: RunRecord) -> None:
        self._config, self._edges, self._tasks = config, edges, tasks
        self._pilot, self._record = pilot, record

    def list_remaining(self) -> List[List[Any]]:
        """Return the parameters of those that have not ended."""
        return [item for item in self._record.data["parameters"]
                if str(item[2]) not in self._record.data["outcome"]]

    def run(self, *, until_pilot: bool) -> None:
        """Run what has not ended; with until_pilot, stop when the pilot's edge is there."""
        while True:
            batch = self._record.data["batch"]
            if batch is None:
                batch = None if until_pilot and self._pilot.is_online() else self._make_batch()
            if batch is None:
                return
            if not self._run_batch(batch, until_pilot):
                self._abandon(batch)
            self._record.keep(batch=None)

    def move(self, child: str) -> None:
        """Copy the results to the pilot's edge, by way of this one."""
        results = self._record.data["results"]
        for index, (name, source) in enumerate(results.items()):
            if name not in self._record.data["moved"]:
                local = self._place(name)
                self._edges.get_file(self._record.data["immediate"]["edge_name"], source, local)
                self._edges.put_file(child, local, self._target(child, name))
                local.unlink()
                self._record.keep(moved=[*self._record.data["moved"], name])
            self._record.update(f"moved {name}", progress=50 + (index + 1) * 10 // len(results))

    def _make_batch(self) -> Optional[Dict[str, Any]]:
        left, size = self.list_remaining(), self._config.batch_size
        if not left:
            return None
        number, total = self._record.state.current_batch + 1, -(-len(left) // size)
        batch = {"number": number, "edge": self._tasks.active_edge(), "parameters": left[:size]}
        self._record.keep(batch=batch)
        progress = 0 if self._record.data["active"] else 15 + 30 * number // (number - 1 + total)
        self._record.update(f"batch {number} of {number - 1 + total}", current_batch=number,
                            total_batches=number - 1 + total, progress=progress)
        return batch

    def _run_batch(self, batch: Dict[str, Any], until_pilot: bool) -> bool:
        """Run a batch to its end; return False when the pilot's edge came in between."""
        edge, made = batch["edge"], self._make_tasks(batch)
        self._tasks.submit(edge, [task for _, task in made.values()], f"batch.{batch['number']}")
        waiting = [uid for uid, (parameters, _) in made.items()
                   if str(parameters[2]) not in self._record.data["outcome"]]
        while waiting:
            for ended in self._tasks.wait(edge, waiting):
                self._take_result(edge, ended, *made[ended["uid"]])
                waiting.remove(ended["uid"])
            if waiting and until_pilot and self._pilot.is_online():
                return False
        return True

    def _make_tasks(self, batch: Dict[str, Any]) -> Dict[str, Tuple[List[Any], Dict[str, Any]]]:
        """Return {uid: (parameters, task)} of a batch."""
        folder, made = self._tasks.folder(batch["edge"]), {}
        for speed, direction, number in batch["parameters"]:
            uid = self._tasks.name(f"sim.{batch['number']}.{number}")
            command = render_task(self._config.simulation_task, {
                "workflow_path": folder, "sim_output_dir": f"{folder}/simulations",
                "wind_speed": speed, "wind_dir": direction, "sim_id": number})
            made[uid] = ([speed, direction, number], {"uid": uid, **command})
        return made

    def _take_result(self, edge: str, ended: Dict[str, Any], parameters: List[Any],
                     command: Dict[str, Any]) -> None:
        """Note how a simulation ended."""
        data, message = self._record.data, ""
        if ended["state"] in TASK_DONE:
            path = self._find_result(edge, ended["uid"], result_name(*parameters))
            data["results"] = {**data["results"], os.path.basename(path): path}
        else:
            task = self._tasks.get(edge, ended["uid"])
            message = describe_failure(f"sim {parameters[2]}", task, command)
        data["outcome"] = {**data["outcome"], str(parameters[2]): ended["state"]}
        self._record.update(message, "error" if message else "info",
                            error=message or self._record.state.error,
                            completed_simulations=len(data["outcome"]))

    def _find_result(self, edge: str, uid: str, name: str) -> str:
        """Return the path of a simulation's result: its file, or what it printed if it has none."""
        path = self._target(edge, name)
        if not self._edges.has_file(edge, path):
            local = self._place(name)
            write_private(local, str(self._tasks.get(edge, uid).get("stdout") or ""))
            self._edges.put_file(edge, local, path)
            local.unlink()
        return path

    def _abandon(self, batch: Dict[str, Any]) -> None:
        """End what still runs of a batch: it will run at the pilot's edge."""
        edge = batch["edge"]
        sid = self._tasks.open_session(edge)
        self._edges.post(edge, f"rhapsody/cancel_all/{sid}", {}, f"abandon.{batch['number']}")
        self._record.update("the pilot's edge is there: what has not ended will run on it")

    def _place(self, name: str) -> Path:
        return place_in_workspace(self._config, self._record, name)

    def _target(self, edge: str, name: str) -> str:
        return f"{self._tasks.folder(edge)}/simulations/{name}"


class WorkflowRun:
    """One run of a workflow, in a thread of its own. It goes on from its record.

    Each step may be begun again: what it has done is in the record, and what it asks of other edges
    has a name (a session, a key, a task's uid) that was stored before.
    """

    STEPS = ("connecting", "verifying", "data_acquisition", "pilot_submit", "staging",
             "simulations", "migration_check", "migration", "remaining_simulations", "training",
             "evaluation")

    def __init__(self, record: RunRecord, make_client: Callable[[], BridgeClient],
                 on_end: Callable[[], None]) -> None:
        self.record, self._on_end = record, on_end
        self._config = dict_to_config(record.data["config"])
        self._clusters = dict_to_resource_config(record.data["resource"]).cluster_configs
        self._edges = OtherEdges(make_client, record)
        self._tasks, self._pilot = RemoteTasks(self._edges, record), Pilot(self._edges, record)
        self._simulations = Simulations(self._config, self._edges, self._tasks, self._pilot, record)
        self.thread = threading.Thread(target=self._run, daemon=True,
                                       name=f"xgfabric-{record.data['run']}")

    def _run(self) -> None:
        try:
            ending = self.record.data["ending"] or self._attempt()
            if ending is not None:
                self._finish(**ending)
        except RunStopped:
            pass                                  # the edge ends; the next process goes on
        except Exception as error:
            log_xgfabric.exception("%s: the run broke off", self.record.data["run"])
            self.record.update("the run broke off", "error", status="failed",
                               error=f"{type(error).__name__}: see the edge's log")
        finally:
            self._edges.close()
            self._on_end()

    def _attempt(self) -> Optional[Dict[str, Any]]:
        """Do the steps that are left; return how the run ends, None if another process goes on."""
        try:
            for step in self.STEPS[self.STEPS.index(self.record.data["step"]):]:
                self.record.keep(step=step)
                getattr(self, f"_do_{step}")()
                self.record.check()
            return {"status": "completed", "error": self.record.state.error}
        except RunStopped:
            return {"status": "cancelled", "error": None} if self.record.cancelled else None
        except (EdgeError, ValueError, OSError) as error:    # the latter two: bad URLs, local files
            return {"status": "failed", "error": getattr(error, "detail", str(error))}
        except Exception as error:                # a defect of ours; what was begun is ended still
            log_xgfabric.exception("%s: the run broke off", self.record.data["run"])
            return {"status": "failed", "error": f"{type(error).__name__}: see the edge's log"}

    def _finish(self, status: str, error: Optional[str]) -> None:
        """Clean up, then say how it ended."""
        self.record.begin_clean_up()
        self.record.keep(ending={"status": status, "error": error})
        words = {"completed": "the workflow is complete", "failed": f"failed: {error}",
                 "cancelled": "cancelled by the user"}[status]
        level = "error" if status == "failed" else "info"
        self.record.update(f"{words}; cleaning up", level, error=error)
        self._clean_up()
        done = {"phase": "done", "progress": 100} if status == "completed" else {}
        self.record.update(words, level, status=status, error=error,
                           end_time=_format_time(time.time()), **done)

    def _enter(self, phase: str, message: str, **changes: Any) -> None:
        self.record.update(message, phase=phase, **changes)

    # -- the steps

    def _do_connecting(self) -> None:
        self._enter("connecting", "connecting to the bridge")
        self.record.patience = CONNECT_S          # a wrong URL or certificate is told soon
        self._edges.topology()
        self.record.patience = PATIENCE_S

    def _do_verifying(self) -> None:
        self._enter("verifying", "looking for clusters")
        immediate, allocate = classify_edges(self._edges.topology(), self._clusters)
        for cluster in list(allocate):            # queue_info may be there without a batch system
            if "cluster_type" not in self._clusters.get(cluster["name"], {}) and \
                    self._pilot.find_backend(cluster["name"]) not in BATCH_EXECUTORS:
                allocate.remove(cluster)
        if not immediate:
            raise EdgeError("No immediate cluster is connected (an edge with the plugins rhapsody "
                            "and staging, and without a queue, or with the cluster_type immediate)")
        self.record.keep(immediate=immediate[0], allocate=(allocate or [None])[0])
        self.record.update(f"simulations begin on {immediate[0]['name']}",
                           immediate_clusters=immediate, allocate_clusters=allocate,
                           active_cluster=immediate[0]["name"])

    def _do_data_acquisition(self) -> None:
        self._enter("data_acquisition", "reading sensor data")
        workspace = open_workspace(self._config.local_workspace)
        if self._config.mock_sensor_data:
            records = make_mock_records(self._config.num_simulations, time.time())
        else:
            records = self._read_sensor()
        write_private(workspace / "data/sensor_out.csv", encode_sensor_csv(records))
        parameters = make_parameters(records, self._config.num_simulations)
        self.record.keep(records=records, parameters=parameters)
        self.record.update(f"{len(records)} readings", progress=10)

    def _do_pilot_submit(self) -> None:
        cluster = self.record.data["allocate"]
        if cluster is None:
            return
        self._enter("pilot_submit", f"submitting a pilot to {cluster['name']}")
        try:
            job_id, child = self._pilot.submit(cluster)
        except EdgeError as error:                # the simulations can do without
            self.record.keep(child=None)
            self.record.update(f"no pilot on {cluster['name']}: {error.detail}", "error")
            return
        jobs = {**self.record.state.pilot_jobs, cluster["name"]: job_id}
        self.record.update(f"pilot {job_id} on {cluster['name']} will be {child}", pilot_jobs=jobs)

    def _do_staging(self) -> None:
        self._enter("staging", "copying sensor data")
        self._put_sensor_data(self._tasks.active_edge())

    def _do_simulations(self) -> None:
        self._enter("simulations", "simulating", progress=15)
        self._simulations.run(until_pilot=self.record.data["child"] is not None)

    def _do_migration_check(self) -> None:
        self._enter("migration_check", "looking for the pilot's edge")
        self.record.keep(migrating=self._pilot.is_online())

    def _do_migration(self) -> None:
        if not self.record.data["migrating"]:
            return
        child = self.record.data["child"]
        self._enter("migration", f"moving to {child}", progress=50)
        self._simulations.move(child)
        self._put_sensor_data(child)
        self.record.keep(active=child)
        self.record.update(f"the workflow goes on at {child}", progress=60,
                           active_cluster=self.record.data["allocate"]["name"])

    def _do_remaining_simulations(self) -> None:
        if self._simulations.list_remaining():
            self._enter("simulations", "simulating what is left")
            self._simulations.run(until_pilot=False)
        if not self.record.data["results"]:
            raise EdgeError(f"All {self._config.num_simulations} simulations failed; the last one: "
                            f"{self.record.state.error}")

    def _do_training(self) -> None:
        models = self._config.train_models
        self._enter("training", "training", progress=60)
        for index, model in enumerate(models):
            template = self._config.training_tasks.get(model)
            if template is None:
                self.record.update(f"there is no training task for {model}: left out", "warning")
                continue
            self._tasks.run(f"training.{model}", template, _TRAINING_PLACES, model=model)
            self.record.update(f"{model} is trained", progress=60 + (index + 1) * 25 // len(models))

    def _do_evaluation(self) -> None:
        self._enter("evaluation", "evaluating", progress=90)
        if self._config.evaluation_task is None:
            self.record.update("there is no evaluation task: left out", "warning")
        else:
            self._tasks.run("evaluation", self._config.evaluation_task, _EVALUATION_PLACES)

    # -- sensor data

    def _read_sensor(self) -> List[SensorRecord]:
        """Return the last cspot_limit readings, the newest first; go on with those read before."""
        senspot = Senspot(self._config.cspot_woof_url, self.record)
        records = [SensorRecord(*record) for record in self.record.data["records"]]
        number = self.record.data["next_seq"]
        number = senspot.read_last() if number is None else number
        failures, limit = 0, self._config.cspot_limit
        while len(records) < limit and number >= 0 and failures < MAX_SENSOR_FAILURES:
            reading = senspot.read(number)
            number, failures = number - 1, failures + 1
            if reading is not None:
                failures = 0
                records.append(reading)
                self.record.keep(records=records, next_seq=number)
                self.record.update(progress=len(records) * 10 // limit)
        if not records:
            raise EdgeError(f"{self._config.cspot_woof_url} gives no reading that can be used")
        return records

    def _put_sensor_data(self, edge: str) -> None:
        """Copy the readings to an edge, and make the directories for what tasks write."""
        folder = self._tasks.folder(edge)
        for name in ("simulations", "models", "evaluation"):
            self._edges.make_dir(edge, f"{folder}/{name}")
        local = place_in_workspace(self._config, self.record, "sensor_out.csv")
        records = [SensorRecord(*record) for record in self.record.data["records"]]
        write_private(local, encode_sensor_csv(records))
        self._edges.put_file(edge, local, f"{folder}/data/sensor_out.csv")
        local.unlink()

    # -- the end

    def _clean_up(self) -> None:
        """End what still runs, through the sessions that began it, and close them."""
        sessions = self.record.data["sessions"]
        for name in sorted(sessions, key=lambda name: name.endswith("/psij")):   # pilots at last
            edge, plugin_name = name.split("/")
            try:
                self._end_session(edge, plugin_name)
            except (Gone, NotFound):
                pass                              # it has ended by itself
            except EdgeError as error:
                self.record.update(f"{name} could not be cleaned up: {error.detail}", "error")
                continue
            self.record.keep(sessions={key: sid for key, sid in
                                       self.record.data["sessions"].items() if key != name})

    def _end_session(self, edge: str, plugin_name: str) -> None:
        sid = self._edges.session(edge, plugin_name)
        if plugin_name == "rhapsody":
            self._edges.post(edge, f"rhapsody/cancel_all/{sid}", {}, f"end.{edge}")
        elif plugin_name == "psij":
            for job in self._edges.get(edge, f"psij/list_jobs/{sid}")["jobs"]:
                if job["state"] not in FINAL_STATES:
                    self._cancel_job(edge, sid, job["job_id"])
        self._edges.post(edge, f"{plugin_name}/unregister_session/{sid}", {},
                         f"close.{edge}.{plugin_name}")

    def _cancel_job(self, edge: str, sid: str, job_id: str) -> None:
        try:
            self._edges.post(edge, f"psij/cancel/{sid}/{job_id}", {}, f"cancel.{job_id}")
            self.record.update(f"pilot {job_id} on {edge} is cancelled")
        except Conflict:
            pass                                  # it has just ended by itself


# -- session, client, plugin

class XGFabricSession(PluginSession):
    """Configurations, and one run at a time, which goes on after a restart of the edge.

    workdir: its directory `configs` holds the configurations. bridge_url, bridge_cert: how a run
    reaches other edges; the default is what the resource configuration says.
    """

    def __init__(self, sid: str, workdir: Optional[str] = None, edge_name: Optional[str] = None,
                 bridge_url: Optional[str] = None, bridge_cert: Optional[str] = None) -> None:
        super().__init__(sid)
        self._workdir = check_workdir(workdir or os.environ.get("XGFABRIC_WORKDIR") or os.getcwd())
        self._edge_name, self._bridge = edge_name, (bridge_url, bridge_cert)
        self._connected: Dict[str, Any] = {}      # edges, as the bridge last told
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._run: Optional[WorkflowRun] = None   # the last one, perhaps of an earlier process
        self._starting = asyncio.Lock()           # a run begins, or is told to stop
        self._ended = asyncio.Event()             # set while no run is under way
        self._ended.set()

    async def start(self) -> None:
        """Go on with the run of an earlier process."""
        self._loop = asyncio.get_running_loop()
        record = await asyncio.to_thread(RunRecord.load, self._record_path, self._on_change)
        if record is not None:
            self._run = WorkflowRun(record, self._make_client, self._on_end)
            if record.state.status == "running":
                self._begin()

    def is_busy(self) -> bool:
        """A session whose run is under way does not expire."""
        return not self._ended.is_set()

    def snapshot(self) -> Any:
        """Return the working directory; a run stores itself."""
        return {"workdir": str(self._workdir)}

    def restore(self, state: Any) -> None:
        """Take what snapshot() returned."""
        self._workdir = Path(state["workdir"])

    def update_connected_edges(self, edges: Dict[str, Any]) -> None:
        """Update what is known of connected edges. edges: {name: {"plugins": names}}."""
        self._connected = edges

    # -- configurations

    async def get_config_dir(self) -> Dict:
        """Return {"path"} of the working directory."""
        return {"path": str(self._workdir)}

    async def set_config_dir(self, path: str) -> Dict:
        """Use another working directory; return {"path", "status"}. Raises BadRequest."""
        self._workdir = await asyncio.to_thread(check_workdir, path)
        self.keep()
        return {"path": str(self._workdir), "status": "ok"}

    async def list_configs(self) -> List[Dict]:
        """Return {"name", "description", "modified"} of the saved configurations."""
        return await asyncio.to_thread(self._files.list)

    async def load_config(self, name: str) -> Dict:
        """Return a builtin configuration, or a saved one, of a workflow or resources, by its name.

        Raises NotFound, or Unprocessable for what is not in the configuration directory.
        """
        return builtin_workflow(name) or await asyncio.to_thread(self._files.load, name)

    async def save_config(self, data: Dict) -> Dict:
        """Save a workflow or resource configuration; return {"status", "name"}."""
        return {"status": "saved", "name": await asyncio.to_thread(self._files.save, data)}

    async def delete_config(self, name: str) -> Dict:
        """Delete a saved configuration; return {"status", "name"}. Raises NotFound."""
        return {"status": "deleted", "name": await asyncio.to_thread(self._files.delete, name)}

    # -- the run

    async def get_status(self) -> Dict:
        """Return the state of the run, and of the clusters while there is none."""
        state = self._run.record.describe() if self._run else dataclasses.asdict(WorkflowState())
        if self.is_busy():
            return {**state, "config_dir": str(self._files_dir)}
        clusters = {} if self._run is None else self._run.record.data["resource"]["cluster_configs"]
        immediate, allocate = classify_edges(self._connected, clusters)
        return {**state, "config_dir": str(self._files_dir), "immediate_clusters": immediate,
                "allocate_clusters": allocate}

    async def start_workflow(self, workflow: str = DEFAULT_CONFIG,
                             resource: str = DEFAULT_CONFIG) -> Dict:
        """Begin a run; return {"status": "started", "config"}.

        workflow, resource: names as for load_config(). Raises Conflict while a run is under way.
        """
        self._check_active()
        config = config_to_dict(dict_to_config(await self.load_config(workflow)))
        if config["simulation_task"] is None:
            raise Unprocessable(f"workflow: {config['name']!r} has no simulation_task")
        known = builtin_resource(resource) or await asyncio.to_thread(self._files.load, resource)
        resources = dataclasses.asdict(dict_to_resource_config(known))
        # to its end, although the client may go away meanwhile
        await asyncio.shield(asyncio.ensure_future(self._start_run(config, resources)))
        return {"status": "started", "config": config["name"]}

    async def stop_workflow(self) -> Dict:
        """Cancel the run; return {"status": "stopped"} once nothing of it runs any more.

        "stopping" when that takes longer than STOP_WAIT_S. Raises Conflict when there is no run.
        """
        async with self._starting:
            if not self.is_busy():
                raise Conflict("no workflow is running")
            self._run.record.stop(cancel=True)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ended.wait(), STOP_WAIT_S)
        return {"status": "stopping" if self.is_busy() else "stopped"}

    async def close(self) -> dict:
        """Cancel the run, and forget it. Returns {}."""
        while self.is_busy():
            await self.stop_workflow()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._record_path.unlink)
        return await super().close()

    def halt(self) -> None:
        """Let the run wait for the next process of this edge."""
        if self._run is not None:
            self._run.record.stop(cancel=False)

    # -- inside

    @property
    def _files_dir(self) -> Path:
        return self._workdir / "configs"

    @property
    def _files(self) -> ConfigFiles:
        return ConfigFiles(self._files_dir)

    @property
    def _record_path(self) -> Path:
        return self._plugin.state_dir / "runs" / f"{self.sid}.json"

    async def _start_run(self, config: Dict, resources: Dict) -> None:
        async with self._starting:
            if self.is_busy():
                raise Conflict("a workflow is running already: stop it first")
            await asyncio.to_thread(self._prepare, config, resources)
            self._begin()

    def _prepare(self, config: Dict, resources: Dict) -> None:
        """Write down a new run. Blocks."""
        state = WorkflowState(status="running", start_time=_format_time(time.time()),
                              config_name=config["name"], config_dir=str(self._files_dir),
                              total_simulations=config["num_simulations"],
                              total_batches=-(-config["num_simulations"] // config["batch_size"]))
        data = {"run": secrets.token_hex(6), "config": config, "resource": resources,
                "state": dataclasses.asdict(state), "step": WorkflowRun.STEPS[0], "ending": None,
                "sessions": {}, "homes": {}, "records": [], "next_seq": None, "parameters": [],
                "immediate": None, "allocate": None, "child": None, "active": None,
                "migrating": False, "batch": None, "outcome": {}, "results": {}, "moved": [],
                "finished": []}
        record = RunRecord(self._record_path, data, self._on_change)
        record.keep()
        self._run = WorkflowRun(record, self._make_client, self._on_end)

    def _begin(self) -> None:
        self._ended.clear()
        self._run.thread.start()

    def _on_change(self, change: Dict[str, Any]) -> None:
        self.notify("workflow_status", {"sid": self.sid, **change})

    def _on_end(self) -> None:
        with contextlib.suppress(RuntimeError):   # the loop is closed: the edge ends
            self._loop.call_soon_threadsafe(self._ended.set)

    def _make_client(self) -> BridgeClient:
        """Return a client of the bridge. Blocks; raises EdgeError or ValueError."""
        url, cert = self._bridge
        if not url:
            resources = self._run.record.data["resource"]
            url, cert = resources["bridge_url"], resources["bridge_cert"]
        token = client_token()
        if token is None:
            raise EdgeError(f"there is no token: {TOKEN_HELP}")
        return BridgeClient(url, cert, token, timeout=CALL_S + 15)


def check_workdir(path: Any) -> Path:
    """Return a directory's absolute path. Raises BadRequest when there is none. Blocks."""
    full = Path(os.path.abspath(os.path.expanduser(_take_text(path, "path"))))
    if not full.is_dir():
        raise BadRequest(f"path: {full} is not a directory")
    return full


class XGFabricClient(PluginClient):
    """A program's access to the configurations and the run of one session."""

    def get_workdir(self) -> Dict:
        """Return {"path"} of the working directory."""
        return self._get(f"workdir/{self._require_session()}")

    def set_workdir(self, path: str) -> Dict:
        """Use another working directory; return {"path", "status"}."""
        return self._post(f"workdir/{self._require_session()}", {"path": path})

    def list_configs(self) -> List[Dict]:
        """Return {"name", "description", "modified"} of the saved configurations."""
        return self._get(f"configs/{self._require_session()}")

    def load_config(self, name: str) -> Dict:
        """Return a configuration by name."""
        name = urllib.parse.quote(name, safe="")
        return self._get(f"config/{self._require_session()}/{name}")

    def save_config(self, config: Dict) -> Dict:
        """Save a configuration; what has cluster_configs is one of resources."""
        return self._post(f"config/{self._require_session()}", config)

    def delete_config(self, name: str) -> Dict:
        """Delete a saved configuration."""
        name = urllib.parse.quote(name, safe="")
        return self._post(f"config/{self._require_session()}/{name}/delete")

    def get_default_config(self) -> Dict:
        """Return the default configuration, to begin with."""
        return self.load_config("default")

    def get_test_config(self) -> Dict:
        """Return the test configuration: small stand-ins for the tasks, no CSPOT needed."""
        return self.load_config("test")

    def get_status(self) -> Dict:
        """Return the state of the run, and of the clusters."""
        return self._get(f"status/{self._require_session()}")

    def start_workflow(self, workflow: str = DEFAULT_CONFIG,
                       resource: str = DEFAULT_CONFIG) -> Dict:
        """Begin a run; return {"status", "config"}."""
        return self._post(f"start/{self._require_session()}",
                          {"workflow": workflow, "resource": resource})

    def stop_workflow(self) -> Dict:
        """Cancel the run; return {"status"} once nothing of it runs any more."""
        return self._post(f"stop/{self._require_session()}")

    def wait_workflow(self, timeout: Optional[float] = None) -> Dict:
        """Return the state of the run once it has ended. timeout: seconds, then as it is."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            state = self.get_status()
            if state["status"] != "running" or end is not None and time.monotonic() >= end:
                return state
            time.sleep(0.5)


class PluginXGFabric(Plugin):
    """Runs a workflow over several edges: sensor data, simulations, training, evaluation."""

    plugin_name = "xgfabric"
    session_class = XGFabricSession
    client_class = XGFabricClient
    version = "0.1.0"
    ui_config = {"icon": "🌊", "title": "XGFabric Workflow",
                 "description": "CFDaAI workflow orchestrator for HPC clusters.",
                 "custom_template": True}

    def __init__(self, app: Any, workdir: Optional[str] = None,
                 instance_name: str = "xgfabric") -> None:
        super().__init__(app, instance_name)
        self._workdir = workdir
        self._edges: Dict[str, Any] = {}          # as the bridge last told
        self.add_route_get("workdir/{sid}", self.get_workdir)
        self.add_route_post("workdir/{sid}", self.set_workdir)
        self.add_route_get("configs/{sid}", self.list_configs)
        self.add_route_get("config/{sid}/default", self.get_default_config)
        self.add_route_get("config/{sid}/test", self.get_test_config)
        self.add_route_get("config/{sid}/{name}", self.load_config)
        self.add_route_post("config/{sid}", self.save_config)
        self.add_route_post("config/{sid}/{name}/delete", self.delete_config)
        self.add_route_get("status/{sid}", self.get_status)
        self.add_route_post("start/{sid}", self.start_workflow)
        self.add_route_post("stop/{sid}", self.stop_workflow)

    async def stop(self) -> None:
        """Let the runs wait for the next process."""
        for record in self._sessions.values():
            record.session.halt()

    async def on_topology_change(self, edges: dict) -> None:
        """Tell the sessions of edges that came or went."""
        self._edges = edges
        for record in self._sessions.values():
            record.session.update_connected_edges(edges)

    def _create_session(self, sid: str, workdir: Optional[str] = None) -> PluginSession:
        # of the bridge the client has no say: it would get the token of this edge
        state = self._app.state
        uplink = getattr(state, "uplink", None)
        urls = ",".join(url for url in uplink.urls if url) if uplink else ""
        cert = uplink.find(uplink.urls[0]).cert if uplink else None
        session = XGFabricSession(sid, workdir or self._workdir, state.edge_name,
                                  urls or state.bridge_url, cert)
        session.update_connected_edges(self._edges)
        return session

    async def get_workdir(self, request: Request) -> Any:
        """Answer {"path"} of the working directory."""
        return await self._forward(request.path_params["sid"], XGFabricSession.get_config_dir)

    async def set_workdir(self, request: Request) -> Any:
        """Use the directory of {"path"}; answer {"path", "status"}."""
        body = await request.json_object()
        return await self._forward(request.path_params["sid"], XGFabricSession.set_config_dir,
                                   body.get("path"))

    async def list_configs(self, request: Request) -> Any:
        """Answer [{"name", "description", "modified"}] of the saved configurations."""
        return await self._forward(request.path_params["sid"], XGFabricSession.list_configs)

    async def get_default_config(self, request: Request) -> Any:
        """Answer the default configuration."""
        return await self._forward(request.path_params["sid"], XGFabricSession.load_config,
                                   "default")

    async def get_test_config(self, request: Request) -> Any:
        """Answer the test configuration."""
        return await self._forward(request.path_params["sid"], XGFabricSession.load_config, "test")

    async def load_config(self, request: Request) -> Any:
        """Answer a configuration."""
        return await self._forward(request.path_params["sid"], XGFabricSession.load_config,
                                   request.path_params["name"])

    async def save_config(self, request: Request) -> Any:
        """Save the configuration that the body is; answer {"status", "name"}."""
        return await self._forward(request.path_params["sid"], XGFabricSession.save_config,
                                   await request.json_object())

    async def delete_config(self, request: Request) -> Any:
        """Delete a saved configuration; answer {"status", "name"}."""
        return await self._forward(request.path_params["sid"], XGFabricSession.delete_config,
                                   request.path_params["name"])

    async def get_status(self, request: Request) -> Any:
        """Answer the state of the run, and of the clusters."""
        return await self._forward(request.path_params["sid"], XGFabricSession.get_status)

    async def start_workflow(self, request: Request) -> Any:
        """Begin a run of {"workflow" or "config_name", "resource"}; answer {"status", "config"}."""
        body = await request.json_object()
        workflow = body.get("workflow") or body.get("config_name") or DEFAULT_CONFIG
        return await self._forward(request.path_params["sid"], XGFabricSession.start_workflow,
                                   workflow, body.get("resource") or DEFAULT_CONFIG)

    async def stop_workflow(self, request: Request) -> Any:
        """Cancel the run; answer {"status"}."""
        return await self._forward(request.path_params["sid"], XGFabricSession.stop_workflow)
