"""Read the host: who it is, and how busy.

Problem: how busy the cores are is a ratio of counters over a span, and psutil keeps the last
reading by thread. Readings run in a pool of worker threads, so it would answer zero now and then,
and over spans that nobody chose. So the two last readings of the kernel's counters are kept here,
and the ratio is taken between them. All in all three lines of /proc are wanted (proc_meminfo(5),
proc_stat(5)), for which a library would be a megabyte in every agent.

Memory in use is what a new process cannot have without swapping (total less available), not what
the kernel counts as used: the page cache is free for the taking, a tmpfs is not.
"""

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Final

from agent.core.values import HostFacts, HostSample

_DISTRIBUTION: Final = "gpu_baton"  # as installers write it where they put it
_VERSION_UNKNOWN: Final = "0.0.0+unknown"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_MEMORY: Final = Path("/proc/meminfo")
_CPU: Final = Path("/proc/stat")


class Host:
    """The box that the agent runs on. Not thread-safe: `probe.py` holds the lock.

    `state_directory` is where checkpoints are kept; the free space of its file system is reported.
    """

    def __init__(self, state_directory: Path) -> None:
        self._state_directory = state_directory
        self._busy = self._total = 0
        self._cpu_utilization_ratio = 0.0

    def open(self) -> None:
        """Take the first reading of the counters, so that the first sample has a span."""
        self._busy, self._total = _cpu_ticks()

    def facts(self, *, driver_version: str) -> HostFacts:
        """What stays until the next boot. `boot_id` is empty where the kernel does not say."""
        return HostFacts(
            hostname=socket.gethostname(),
            boot_id=boot_id(),
            cpu_count=os.cpu_count() or 1,
            memory_bytes=_memory_bytes()[0],
            driver_version=driver_version,
            agent_version=_agent_version(),
        )

    def sample(self) -> HostSample:
        """CPU over the span since the last sample; memory, disk and load now."""
        total_bytes, available_bytes = _memory_bytes()
        return HostSample(
            cpu_utilization_ratio=self._advance_cpu(),
            memory_used_bytes=total_bytes - available_bytes,
            disk_free_bytes=_disk_free_bytes(self._state_directory),
            load_1min=os.getloadavg()[0],
        )

    def _advance_cpu(self) -> float:
        busy, total = _cpu_ticks()
        span = total - self._total
        if span > 0:  # a hundred a second: two readings within a tick say nothing new
            ratio = (busy - self._busy) / span
            self._cpu_utilization_ratio = min(1.0, max(0.0, ratio))  # iowait may run backwards
            self._busy, self._total = busy, total
        return self._cpu_utilization_ratio


def _cpu_ticks() -> tuple[int, int]:
    """Busy and total of all CPUs since boot. Guest time is in `user` already."""
    with _CPU.open(encoding="ascii") as file:
        all_cpus = file.readline().split()
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, all_cpus[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def _memory_bytes() -> tuple[int, int]:
    """Total and available."""
    said = dict(line.split(":", 1) for line in _MEMORY.read_text("ascii").splitlines())
    total_kib, available_kib = (int(said[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return total_kib << 10, available_kib << 10


def _disk_free_bytes(directory: Path) -> int:
    """What an ordinary user may still write; 0 where the directory cannot be asked or used."""
    try:
        return int(shutil.disk_usage(directory).free)
    except OSError:
        return 0


def boot_id() -> str:
    """The kernel's; empty where it does not say."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _agent_version() -> str:
    """`importlib.metadata` brings the parsers of mail and of archives, another megabyte; the name
    of a distribution's directory has its version, too (PyPA's "Recording installed projects")."""
    for place in sys.path:
        for found in Path(place).glob(f"{_DISTRIBUTION}-*.dist-info"):
            return found.stem.partition("-")[2]
    return _VERSION_UNKNOWN  # run from a source tree that was never installed
