"""The plugins that come with Radical Edge; radical_edge.py loads this file from beside it.

    1. sysinfo    the machine: CPU, memory, disks, network, GPUs
    3. tunnels    edges that an edge starts, where only it can reach the bridge
    4. psij       jobs: a local executor of our own, and the batch systems through psij-python
    7. lucid      pilots and tasks through RADICAL-Pilot, which runs in a child process

Optional packages are imported where they are needed, and a plugin that lacks one says so.
"""
from __future__ import annotations

import asyncio
import codecs
import contextlib
import dataclasses
import datetime
import hmac
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Set, Tuple

import radical_edge
from radical_edge import (RELAY_NONCE, RESERVED_NAMES, SSH_OPTIONS, TUNNEL_MODES, BridgeURL,
                          Conflict, DeadlineExceeded, EdgeError, LoopThread, NotFound, NotInstalled,
                          Plugin, PluginClient, PluginSession, PortFile, ProtocolError, Request,
                          Target, TooManyRequests, Unavailable, Unprocessable, Uplink, Workers,
                          answer_relay, encode_port_file, forward_option, is_ssh_host,
                          is_valid_name, make_child_token, parse_bridge_url, repeatable,
                          tunnels_dir, write_private)

__all__ = ["LocalExecutor", "LucidClient", "LucidSession", "PSIJClient", "PSIJSession",
           "PilotChild", "PluginLucid", "PluginPSIJ", "PluginSysInfo", "Relay", "ReverseSSH",
           "SysInfoClient", "SysInfoProvider", "SysInfoSession", "Tunnels"]

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


def run_command(command: List[str], timeout: float = COMMAND_S) -> Optional[str]:
    """Return what a program prints; None when it is not there, fails or takes too long. Blocks."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
    except OSError:
        return None
    killer = threading.Timer(timeout, _kill_group, (process.pid,))
    killer.start()
    with process:
        output = process.stdout.read(MAX_COMMAND_OUTPUT)
        if len(output) == MAX_COMMAND_OUTPUT:
            _kill_group(process.pid)
        process.wait()
        killer.cancel()
    return output.decode(errors="replace") if process.returncode == 0 else None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


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
                done = self._running = threading.Event()
                threading.Thread(target=self._run, args=(done,), name="sysinfo-collect",
                                 daemon=True).start()
        done.wait(self._patience)
        with self._lock:
            return self._value

    def _run(self, done: threading.Event) -> None:
        try:
            value = self._function()
            with self._lock:
                self._value = value
        except Exception:                         # the last answer stays; the next call tries again
            log_sysinfo.exception("metrics could not be collected")
        finally:
            with self._lock:
                self._until = time.monotonic() + self._fresh
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
                thread = threading.Thread(target=self._run, args=(path,), daemon=True,
                                          name="sysinfo-statvfs")
                self._asking[path] = thread
                thread.start()
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
        program = os.environ.get("NVIDIA_SMI_PATH") or shutil.which("nvidia-smi")
        if not program:
            return None
        return run_command([program, f"--query-gpu={query}", "--format=csv,noheader,nounits"])

    @staticmethod
    def _rocm(*options: str) -> Optional[str]:
        program = shutil.which("rocm-smi")
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
# the edge's, not the job's
_SECRET_VARIABLES = ("RADICAL_BRIDGE_TOKEN", "RADICAL_BRIDGE_TOKEN_FILE", "RADICAL_BRIDGE_KEY")
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


def _clean_environment() -> Dict[str, str]:
    """Return the edge's environment without its own secrets."""
    return {name: value for name, value in os.environ.items() if name not in _SECRET_VARIABLES}


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
    found, rest = {}, list(arguments)
    while rest:
        option, sign, value = rest.pop(0).partition("=")
        if re.match("-n[^=]", option):            # "-nNAME"
            option, sign, value = "-n", "=", option[2:] + sign + value
        name = _CHILD_OPTIONS.get(option)
        if name == "tunnel" and not sign:
            value = rest.pop(0) if rest and rest[0] in TUNNEL_MODES else "reverse"
        elif name is not None and not sign:
            value = rest.pop(0) if rest else ""
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
        made["environment"] = {**_child_environment(target, name), **(given or {})}
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
    if executable in (None, "") or executable in CHILD_EXECUTABLES:
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
        for other in self._find():
            if other != pid or not lives:         # the edge was killed before it wrote this down
                self._kill(other, signal.SIGKILL)
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
        """End ssh. Blocks for GRACE_S at the most."""
        if self.pid is None:
            return
        end = time.monotonic() + GRACE_S
        number = signal.SIGTERM
        while self.is_alive():
            self._kill(self.pid, number)
            number = signal.SIGKILL if time.monotonic() > end else signal.SIGTERM
            time.sleep(0.05)
        self.pid = self.started = None

    @staticmethod
    def _kill(pid: int, number: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(pid, number)

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
        self._live.add(edge_name)
        if edge_name not in self._watchers:
            record = self._records[edge_name]
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
QUEUE_POLL_S = 5               # batch queues, by psij-python; its own default is 30
MAX_TAIL = 4096                # bytes of output in a notification
MAX_READ = 1024 * 1024         # bytes of output in one answer
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
    "seconds": ("a number of seconds above 0", lambda value: _is_number(value) and value > 0),
    "environment": ("an object of strings and numbers", lambda value: isinstance(value, dict) and
                    all(_is_text(key) and key and "=" not in key and
                        (_is_text(item) or _is_number(item)) for key, item in value.items())),
    "object": ("an object", lambda value: isinstance(value, dict)),
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
        self.on_change: Callable[["Job"], None] = lambda job: None
        self.begun = asyncio.Event()              # set once it runs, or could not
        self.ended = asyncio.Event()

    @property
    def is_final(self) -> bool:
        """Whether the state will not change any more."""
        return self.state in FINAL_STATES

    @property
    def is_over(self) -> bool:
        """Whether it runs no more, though perhaps nobody knows how it ended."""
        return self.is_final

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
                "message": self.message, "time": self.time}

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
    wrong bytes do. An offset beyond the end gives "" and the offset back.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except FileNotFoundError:
        return "", offset, complete
    at_end = complete and len(data) < limit
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(data, final=at_end)
    return text, offset + len(data) - len(decoder.getstate()[0]), at_end


def read_tail(path: Path, limit: int = MAX_TAIL) -> str:
    """Return the last `limit` bytes of a file, from the begin of a character on. Blocks."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError:
        return ""
    if size > limit:
        data = data.lstrip(bytes(range(0x80, 0xC0)))    # continuation bytes: half a character
    return data.decode(errors="replace")


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
        except OSError:                           # the disk is full; the end must not be lost
            if not final:
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
            os.kill(pid, signal.SIGTERM)
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
            await asyncio.to_thread(shutil.rmtree, job.folder, True)

    # -- inside

    def _prepare(self, job: Job) -> None:
        """Write down what is to run, before it runs. Blocks."""
        run = make_local_run(job.spec, job.stdout, job.stderr)
        job.stdout, job.stderr = Path(run["stdout"]), Path(run["stderr"])
        shutil.rmtree(job.folder, True)           # of the same job, if it never ran
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
    with contextlib.suppress(ProcessLookupError):
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


# -- batch systems, through psij-python

_SUBMIT_PROGRAMS = {"slurm": ("sbatch", "squeue"), "pbs": ("qsub", "qstat"),
                    "pbs_classic": ("qsub", "qstat"), "lsf": ("bsub", "bjobs"),
                    "cobalt": ("qsub", "qstat"), "flux": ("flux",)}
_NAME_OPTIONS = {"slurm": "slurm.job-name", "pbs": "pbs.N", "pbs_classic": "pbs.N", "lsf": "lsf.J"}


class BatchExecutors:
    """The executors of psij-python, one of each name. Its calls block and run in threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()             # one import, one instance of each
        self._executors: Dict[str, Any] = {}      # by name; guarded by _lock
        self._handles: Dict[str, Any] = {}        # psij's jobs, by job_id; the loop's
        self.jobs: Dict[str, Job] = {}            # by job_id; the loop's

    async def open(self) -> None:
        """Find the jobs of earlier processes: what became of them is not known."""
        for record in await asyncio.to_thread(self._load):
            job = Job(record["job_id"], record["sid"], record["executor"], record["spec"],
                      self._folder / record["job_id"])
            job.stdout, job.stderr = Path(record["stdout"]), Path(record["stderr"])
            job.native_id, job.state = record.get("native_id"), record.get("state", "UNKNOWN")
            job.exit_code, job.message = record.get("exit_code"), record.get("message")
            if not job.is_final:
                job.state = "UNKNOWN"
                job.message = "the edge was restarted: ask the batch system about the native id"
            self.jobs[job.job_id] = job

    async def submit(self, job: Job) -> None:
        """Submit a job. Raises NotInstalled without psij-python, Unprocessable when refused."""
        handle = await asyncio.to_thread(self._make, job)
        self.jobs[job.job_id], self._handles[job.job_id] = job, handle
        job.update("QUEUED")
        try:
            await asyncio.to_thread(self._get(job.executor).submit, handle)
        except Exception as error:                # psij-python's own, and what plugins of it raise
            del self.jobs[job.job_id], self._handles[job.job_id]
            reason = str(getattr(error, "exception", None) or error) or type(error).__name__
            raise Unprocessable(f"job_spec: {job.executor} refused the job: {reason}") from None
        job.native_id = str(handle.native_id)
        await self._store(job)

    async def cancel(self, job: Job) -> None:
        """Ask the batch system to end a job; its state follows at the next poll."""
        handle = self._handles.get(job.job_id)
        if handle is None:
            raise Conflict(f"the job was submitted before the edge was restarted: cancel "
                           f"{job.native_id} with the batch system")
        try:
            await asyncio.to_thread(handle.cancel)
        except Exception as error:
            raise Unavailable(f"{job.executor} did not cancel the job: {error}") from None

    @staticmethod
    async def never_ran(job: Job) -> bool:
        """Nobody knows: the scheduler may have got the job. So it is not submitted again."""
        return False

    async def find_node(self, job: Job) -> str:
        """Return the first host of a running job. Raises Unavailable while it is not known."""
        folder = (await asyncio.to_thread(self._get, job.executor)).work_directory
        nodes = await asyncio.to_thread(_read, str(folder / f"{job.native_id}.nodefile"))
        if not nodes.split():                     # the job writes it as the first thing
            raise Unavailable(f"{job.executor} has not said yet on which node the job runs")
        return nodes.split()[0]

    async def forget(self, job: Job) -> None:
        """Delete what is stored of a finished job."""
        if job.is_final and self.jobs.pop(job.job_id, None) is not None:
            self._handles.pop(job.job_id, None)
            await asyncio.to_thread(shutil.rmtree, job.folder, True)

    def _get(self, name: str) -> Any:
        """Return the executor of this name. Blocks; raises NotInstalled or Unprocessable."""
        with self._lock:
            if name not in self._executors:
                self._executors[name] = self._open_executor(name)
            return self._executors[name]

    def _open_executor(self, name: str) -> Any:
        try:
            import psij
        except ImportError:
            raise NotInstalled(f"executor: {name!r} needs psij-python on the edge: "
                               "pip install psij-python") from None
        known = psij.JobExecutor.get_executor_names()
        if name not in known:
            raise Unprocessable(f"executor: there is no {name!r}; there are: local, "
                                f"{', '.join(sorted(set(known) - {'local'}))}")
        missing = [program for program in _SUBMIT_PROGRAMS.get(name, ())
                   if not shutil.which(program)]
        if missing:
            raise Unprocessable(f"executor: {name} is not on this machine: there is no "
                                f"{' and no '.join(missing)}")
        try:
            instance = psij.JobExecutor.get_instance(name)
            config = type(instance.config)() if instance.config is not None else None
            if hasattr(config, "queue_polling_interval"):
                config.queue_polling_interval = QUEUE_POLL_S
                config.initial_queue_polling_delay = 1
                instance = psij.JobExecutor.get_instance(name, config=config)
            return instance
        except Exception as error:
            raise Unprocessable(f"executor: {name} cannot be used here: {error}") from None

    def _make(self, job: Job) -> Any:
        """Return psij's description of a job, with a callback for its states. Blocks."""
        self._get(job.executor)
        import psij
        job.folder.mkdir(parents=True, mode=0o700)
        try:
            handle = psij.Job(self._translate(psij, job))
        except Unprocessable:
            raise
        except Exception as error:                # typeguard's and psij's own
            raise Unprocessable(f"job_spec: {error or type(error).__name__}") from None
        handle._id = job.job_id
        handle.set_job_status_callback(
            lambda _job, status: self._loop.call_soon_threadsafe(self._on_status, job, status))
        return handle

    @staticmethod
    def _translate(psij: Any, job: Job) -> Any:
        spec, given = job.spec, dict(job.spec["attributes"])
        if job.executor == "pbs":
            for name in {"gpu_cores_per_process", "cpu_cores_per_process"} & set(spec["resources"]):
                raise Unprocessable(f"resources.{name}: psij-python drops it for PBS; ask for it "
                                    "with the custom attribute pbs.l")
        if "name" in spec and job.executor in _NAME_OPTIONS:     # psij-python itself drops it
            given["custom_attributes"] = {_NAME_OPTIONS[job.executor]: spec["name"],
                                          **given.get("custom_attributes", {})}
        if "duration" in given:
            given["duration"] = datetime.timedelta(seconds=given["duration"])
        job.stdout = Path(spec.get("stdout_path", job.stdout))
        job.stderr = Path(spec.get("stderr_path", job.stderr))
        plain = {name: spec[name] for name in (
            "executable", "arguments", "name", "inherit_environment", "environment", "pre_launch",
            "post_launch", "launcher") if name in spec}
        paths = {name: Path(spec[name]).expanduser() for name in ("directory", "stdin_path")
                 if name in spec}
        resources = psij.ResourceSpecV1(**spec["resources"]) if spec["resources"] else None
        return psij.JobSpec(**plain, **paths, stdout_path=job.stdout, stderr_path=job.stderr,
                            resources=resources, attributes=psij.JobAttributes(**given))

    def _on_status(self, job: Job, status: Any) -> None:
        """Take psij's word, but for a success of which there is no exit code."""
        state, message = status.state.name, status.message
        if state == "COMPLETED" and status.exit_code is None:
            state, message = "UNKNOWN", "the job left the queue without an exit code"
        if state != "NEW" and job.update(state, message=message, exit_code=status.exit_code):
            asyncio.ensure_future(self._store(job))

    async def _store(self, job: Job) -> None:
        record = {"job_id": job.job_id, "sid": job.sid, "executor": job.executor, "spec": job.spec,
                  "native_id": job.native_id, "state": job.state, "exit_code": job.exit_code,
                  "message": job.message, "stdout": str(job.stdout), "stderr": str(job.stderr)}
        await asyncio.to_thread(write_private, job.folder / "batch.json",
                                json.dumps(record))

    def _load(self) -> List[Dict[str, Any]]:
        records = [_json_object(_read(str(path))) for path in self._folder.glob("*/batch.json")]
        return [record for record in records if "job_id" in record]


# -- session, client, plugin

class PSIJSession(PluginSession):
    """The jobs of one client. They outlive the edge; closing the session does not end them."""

    poll_interval = float(QUEUE_POLL_S)

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
        spec, job_id = parse_job_spec(child.spec), self._make_job_id(key)
        await self._plugin.executor(executor_name)               # 422 before anything is written
        tunnels = self._plugin.tunnels
        await tunnels.prepare(child, self.sid, job_id)
        try:
            answer = await self._submit(job_id, spec, executor_name)
        except Exception:
            await tunnels.abandon(child.edge_name)
            raise
        tunnels.watch(child.edge_name)
        return {**answer, "edge_name": child.edge_name}

    def _make_job_id(self, key: Optional[str]) -> str:
        return str(uuid.uuid5(uuid.UUID(int=0), f"{self.sid} {key}") if key else uuid.uuid4())

    async def _submit(self, job_id: str, spec: Dict[str, Any],
                      executor_name: str) -> Dict[str, Any]:
        executor = await self._plugin.executor(executor_name)
        known = self._jobs.get(job_id)
        if known is not None and not await executor.never_ran(known):
            return {"job_id": job_id, "native_id": known.native_id}
        job = Job(job_id, self.sid, executor_name, spec, self._plugin.jobs_dir / job_id)
        job.on_change = self._on_change
        self._jobs[job_id] = job
        try:
            await executor.submit(job)
        except Exception:                         # it did not start; a cancellation tells nothing
            del self._jobs[job_id]
            await asyncio.to_thread(shutil.rmtree, job.folder, True)
            raise
        return {"job_id": job_id, "native_id": job.native_id}

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
        if self._local is not None:
            self._local.close()

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


class Refused(Exception):
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
        """Run an operation in the child. Raises Refused, or Unavailable when the child is gone.

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
        with contextlib.suppress(Refused, Unavailable):
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
            future.set_exception(Refused(message["error"]))
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
    uid = value.get("uid") or f"{kind}.{uuid.uuid4().hex[:12]}"
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

    async def task_submit(self, description: Any) -> Dict[str, Any]:
        """Submit a task; return {"tid"}. It waits for a pilot. Raises as pilot_submit() does."""
        entry = Tracked(parse_task_description(description))
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
        await asyncio.to_thread(shutil.rmtree, self._plugin.folder(self.sid), True)
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
                           "status, and try again when it is ready")
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
        except Refused as error:
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
            except Refused as error:
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
        search = "import importlib.util, sys; sys.exit(importlib.util.find_spec('radical.pilot')" \
                 " is None)"
        if run_command([python, "-c", search], 10 * COMMAND_S) is not None:
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
                shutil.rmtree(folder, True)


def parse_seconds(text: str, name: str) -> float:
    """Return a query value as seconds. Raises Unprocessable for anything but 0 or more."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", text):
        raise Unprocessable(f"{name}: {text[:40]!r} is not a number of seconds, 0 or more")
    return float(text)
