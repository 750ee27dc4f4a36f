"""Facts about processes from /proc, and signals that cannot reach the wrong one.

Problem: a pid is a number that the kernel gives out again. A signal to a bare pid that was read
from a file, or from a scan a moment ago, may hit a stranger. A process is therefore named by pid
and start time (proc(5), field 22) and is signalled through a pidfd that was checked against that
start time after it was opened (pidfd_open(2)).
"""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

from agent.processes.shim import stat_fields


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table. `start_ticks` is in clock ticks since boot."""

    pid: int
    parent_pid: int
    session: int
    start_ticks: int


def read_process(pid: int) -> Process | None:
    """The process with this number right now; None when there is none. Zombies count: their number
    is still taken.
    """
    fields = stat_fields(pid)
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19])) if fields else None


def age_ms(start_ticks: int) -> int:
    """How long ago a process began that has this start time, less what the tick may hide. psutil's
    `create_time` goes by the second of the boot, and by a clock that may be set meanwhile."""
    boot_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    return max(0, boot_ms - (start_ticks + 1) * 1_000 // os.sysconf("SC_CLK_TCK"))


def all_processes() -> Iterator[Process]:
    """Every process that can be seen, in no particular order."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read_process(int(name))) is not None:
            yield process


def descendants(root_pid: int) -> list[Process]:
    """Children, grandchildren and so on of `root_pid`, parents first; without `root_pid` itself."""
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        children.setdefault(process.parent_pid, []).append(process)
    found: list[Process] = []
    frontier = [root_pid]
    while frontier:
        below = children.get(frontier.pop(), [])
        found.extend(below)
        frontier.extend(process.pid for process in below)
    return found


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """A pidfd for exactly that process, or None when it has gone (its number may be another's by
    now).
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # after opening: from here on the number cannot change hands unnoticed
    process = read_process(pid)
    if process is None or process.start_ticks != start_ticks:
        os.close(pidfd)
        return None
    return pidfd


def kill_exactly(process: Process) -> bool:
    """SIGKILL this very process; False when it had gone. PermissionError: another user's."""
    pidfd = open_pidfd(process.pid, process.start_ticks)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def read_bytes(pid: int, name: str) -> bytes:
    """A file such as `environ` or `cmdline` of a process; empty when it has gone or is another
    user's.
    """
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
