"""How attempts ended: what is left of them is killed, and the record is read, or written.

Problem: a shim's end says only that somebody knows. How its trainer ended is in `exit.json`; where
the shim was killed it is not, and where an operator has removed the state directory nothing is. And
no end counts before everything that the attempt had started is gone. See `supervisor.py`.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog

from agent.core.values import ProcessExit
from agent.processes import records, remains, shim, shim_output
from agent.processes.again import Again
from agent.processes.attempt import Attempt
from agent.processes.groups import Groups
from agent.processes.units import Units

REBOOTED = "ended unseen: the box rebooted"
SUPERVISOR_GONE = "ended unseen: its supervisor was killed"
NEVER_STARTED = "ended unseen: the agent stopped before the trainer was started"
DIRECTORY_GONE = "ended unseen: its directory on the node was removed"

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to
SHELL_SIGNAL_BASE = 128  # a shell's status for a program that a signal has ended is above this

Tell = Callable[[ProcessExit, int], None]
"""How it ended, and the trainer's pid, 0 when it never ran."""

log = structlog.get_logger()


class Endings:
    def __init__(self, groups: Groups, units: Units | None, again: Again) -> None:
        self._groups = groups
        self._units = units
        self._again = again

    def find(self, attempt: Attempt, unseen_reason: str, tell: Tell) -> None:
        """The attempt is over once nothing is left in its group: read how, or record that nobody
        saw it, and tell it. Of a unit, systemd is asked first."""
        then = partial(self._emptied, attempt, unseen_reason, tell)
        clear = partial(self._groups.clear, attempt.directory, then)
        self._again.until_done(attempt.id, "ending what is left of", clear)

    def of_failed_start(self, attempt: Attempt) -> None:
        """Its caller has been told why; readers of its log see it, too."""

        def clear() -> None:
            self._groups.clear(attempt.directory, lambda: None)
            if records.read_exit(attempt.directory) is None:  # killed before it could write its own
                _record_unseen(attempt, str(attempt.starting.exception()))

        self._again.until_done(attempt.id, "clearing up after", clear)

    def _emptied(self, attempt: Attempt, unseen_reason: str, tell: Tell) -> None:
        def read(reason: str) -> None:
            work = partial(_read, attempt, unseen_reason, reason, tell)
            self._again.until_done(attempt.id, "reading the end of", work)

        if attempt.is_unit and self._units and unseen_reason != REBOOTED:
            self._units.ended(attempt.id, read)
        else:
            read("")


def _read(attempt: Attempt, unseen_reason: str, reason: str, tell: Tell) -> None:
    """`reason`: what the end of its unit adds. Raises OSError while it cannot be read."""
    recorded = records.read_exit(attempt.directory)
    if recorded is None:
        if not attempt.directory.is_dir():
            unseen_reason = DIRECTORY_GONE
        if unseen_reason != REBOOTED:
            remains.kill(attempt.directory)
        _record_unseen(attempt, reason or unseen_reason)
        recorded = (ProcessExit(attempt.id, None, None, unseen_reason), 0)
    ended, pid = recorded
    reason = reason or ended.reason or _of_bus_error(ended)
    tell(replace(ended, reason=reason), pid)


def _of_bus_error(ended: ProcessExit) -> str:
    """What is written to a full /dev/shm, as the workers of a data loader do, fails at the write
    and not at the call that made the room: with a signal that says nothing of it. By now that
    memory is free again, but one that is small is so still."""
    if signal.SIGBUS not in (ended.signal, (ended.exit_code or 0) - SHELL_SIGNAL_BASE):
        return ""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return f"a bus error, and there is no {SHARED_MEMORY}"
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return (
        f"a bus error: memory of a file that could not be had, as in a full {SHARED_MEMORY}; that"
        f" has {total} bytes, {free} of them free after the end"
    )


def _record_unseen(attempt: Attempt, reason: str) -> None:
    """Write the record that the shim could not, so that readers of the log see its end."""
    kept = records.segments(attempt.directory)
    end_offset = kept[-1][0] + kept[-1][1].stat().st_size if kept else 0
    text = shim.exit_record(None, 0, reason, log_bytes=end_offset)
    if not shim_output.try_record(os.fsencode(attempt.directory), shim.EXIT_NAME, text):
        log.warning("process.exit_not_recorded", attempt=attempt.id, reason=reason)
