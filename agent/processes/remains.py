"""Finds and kills what belongs to an attempt by what the kernel says of it.

Problem: when a shim was killed, what its trainer had started has no parent that knows it, and a pid
in a file may be another's by now. So processes are known by what only they have: their session, the
token in their environment, the directory on a shim's command line.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from agent.processes import proc, records, shim

# each pass kills what the one before saw being forked; a fork bomb is left to the cgroup's limit
KILL_PASSES_MAX = 10


def kill(directory: Path) -> None:
    """Without its shim the trainer is dead, but not what it had started: that is known by session
    and token.
    """
    started = records.read_started(directory)
    session = started.pid if started else 0
    leader = proc.read_process(session) if started else None
    if started and leader and leader.start_ticks != started.start_ticks:
        session = 0  # the number is another's by now
    token = _token_entry(directory)

    def remains() -> list[proc.Process]:
        return [
            process
            for process in proc.all_processes()
            if (session and process.session == session)
            or (token and token in proc.read_bytes(process.pid, "environ").split(b"\0"))
        ]

    kill_all(remains)


def kill_late(directory: Path) -> None:
    """After the end of an attempt without a shim was written down: one that was still being forked,
    and read the directory before that, is seen now, and must not hold what counts as ended."""
    late_pid, start_ticks = find_shim(directory)
    descriptor = proc.open_pidfd(late_pid, start_ticks) if late_pid else None
    if descriptor is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)
        kill(directory)


def find_shim(directory: Path) -> tuple[int, int]:
    """The shim that serves this directory, by its command line: (pid, start ticks), or zeros."""
    for process in proc.all_processes():
        words = proc.read_bytes(process.pid, "cmdline").split(b"\0")
        if len(words) >= 5 and words[4] == os.fsencode(directory) and words[1:3] == [b"-I", b"-S"]:
            return process.pid, process.start_ticks
    return 0, 0


def _token_entry(directory: Path) -> bytes:
    """The environment entry that no other attempt has; empty when the order to start had none, or
    was removed."""
    try:
        launch = shim.Launch((directory / shim.LAUNCH_NAME).read_bytes())
    except FileNotFoundError:
        return b""
    token = launch.environment.get(b"BATON_TOKEN", b"")
    return b"BATON_TOKEN=" + token if token else b""


def kill_all(find: Callable[[], list[proc.Process]]) -> None:
    """SIGKILL what `find` finds until it twice finds nothing new that can be killed: one look may
    miss a process whose parent ends, and whose place in the tree changes, while /proc is read.
    """
    seen: set[proc.Process] = set()
    looks_in_vain = 0
    for _ in range(KILL_PASSES_MAX):
        fresh = [process for process in find() if process not in seen]
        looks_in_vain = 0 if fresh else looks_in_vain + 1
        if looks_in_vain == 2:
            return
        for process in fresh:
            seen.add(process)
            with contextlib.suppress(PermissionError):  # it became another user: not ours to kill
                proc.kill_exactly(process)
