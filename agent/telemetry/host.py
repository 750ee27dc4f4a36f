"""Read the host: who it is, and how busy.

Problem: `psutil.cpu_percent(interval=None)` answers for the time since the *same thread* last
asked, and 0.0 the first time. Readings run in a pool of worker threads, so it would answer zero now
and then, and over spans that nobody chose. So the two last readings of the kernel's counters are
kept here, and the ratio is taken between them.

Memory in use is what a new process cannot have without swapping (total less available), not
psutil's `used`, which leaves out shared memory on some kernels: the page cache is free for the
taking, a tmpfs is not.
"""

import os
import socket
import sys
from pathlib import Path
from typing import Final

import psutil

from agent.core.values import HostFacts, HostSample

_DISTRIBUTION: Final = "gpu_baton"  # as installers write it where they put it
_VERSION_UNKNOWN: Final = "0.0.0+unknown"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Host:
    """The box that the agent runs on. Not thread-safe: `probe.py` holds the lock.

    `state_directory` is where checkpoints are kept; the free space of its file system is reported.
    """

    def __init__(self, state_directory: Path) -> None:
        self._state_directory = state_directory
        self._busy_s = 0.0
        self._total_s = 0.0
        self._cpu_utilization_ratio = 0.0

    def open(self) -> None:
        """Take the first reading of the counters, so that the first sample has a span."""
        self._busy_s, self._total_s = _cpu_times_s()

    def facts(self, *, driver_version: str, gpu_absence: str) -> HostFacts:
        """What stays until the next boot. `boot_id` is empty where the kernel does not say."""
        return HostFacts(
            hostname=socket.gethostname(),
            boot_id=boot_id(),
            cpu_count=psutil.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            driver_version=driver_version,
            agent_version=_agent_version(),
            gpu_absence=gpu_absence,
        )

    def sample(self) -> HostSample:
        """CPU over the span since the last sample; memory, disk and load now."""
        memory = psutil.virtual_memory()
        return HostSample(
            cpu_utilization_ratio=self._advance_cpu(),
            memory_used_bytes=memory.total - memory.available,
            disk_free_bytes=_disk_free_bytes(self._state_directory),
            load_1min=os.getloadavg()[0],
        )

    def _advance_cpu(self) -> float:
        busy_s, total_s = _cpu_times_s()
        span_s = total_s - self._total_s
        if span_s > 0.0:  # the counters tick at 100 Hz: two readings within a tick say nothing new
            ratio = (busy_s - self._busy_s) / span_s
            self._cpu_utilization_ratio = min(1.0, max(0.0, ratio))  # iowait may run backwards
            self._busy_s, self._total_s = busy_s, total_s
        return self._cpu_utilization_ratio


def _cpu_times_s() -> tuple[float, float]:
    """Busy and total time of all CPUs since boot. Guest time is in `user` already."""
    times = psutil.cpu_times()
    idle_s = times.idle + times.iowait
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return busy_s, busy_s + idle_s


def _disk_free_bytes(directory: Path) -> int:
    """What an ordinary user may still write; 0 where the directory cannot be asked or used."""
    try:
        return int(psutil.disk_usage(str(directory)).free)
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
