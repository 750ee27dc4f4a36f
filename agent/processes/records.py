"""What lies in an attempt's directory, read back as values.

Problem: the records are written by another process, which may have been cut off by a power failure
or a full disk. A file that is absent, empty or not what it should be must read as "nobody recorded
this", never as a crash of the agent.
"""

import contextlib
import errno
import json
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.core.ids import find_attempt_id
from agent.core.values import Launch, ProcessExit
from agent.processes.shim import (
    EXIT_NAME,
    LAUNCH_NAME,
    LOG_DIRECTORY_NAME,
    STARTED_NAME,
)
from agent.processes.shim_output import private_opener

SETTLED_NAME = "settled"
SEGMENT_NAME = re.compile(r"([0-9]{20})\.log")


@dataclass(frozen=True, slots=True)
class Started:
    """`started.json`: who runs, named so that neither a reused pid nor a reboot fools anybody."""

    pid: int
    start_ticks: int
    shim_pid: int
    shim_start_ticks: int
    boot_id: str


def read_started(directory: Path) -> Started | None:
    """None when there is no such record, or not a whole one."""
    record = _read_json(directory / STARTED_NAME)
    try:
        return Started(
            int(record["pid"]),
            int(record["start_ticks"]),
            int(record["shim_pid"]),
            int(record["shim_start_ticks"]),
            str(record["boot_id"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def read_exit(directory: Path) -> tuple[ProcessExit, int] | None:
    """How the attempt ended, and the trainer's pid (0 when it never ran); None when that is not
    recorded.
    """
    record = _read_json(directory / EXIT_NAME)
    try:
        exit_code, number = record["exit_code"], record["signal"]
        ended = ProcessExit(
            attempt_id=directory.name,
            exit_code=None if exit_code is None else int(exit_code),
            signal=None if number is None else int(number),
            reason=str(record["reason"]),
        )
        return ended, int(record["pid"])
    except (KeyError, TypeError, ValueError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def refuse_launch(launch: Launch) -> str:
    """Why this cannot be given to execve(2), as a sentence; empty when it can."""
    # Also a directory's name, so nothing else is let through.
    if find_attempt_id(launch.attempt_id) is None:
        return f"{launch.attempt_id!r} is no attempt id"
    if not launch.arguments or not launch.arguments[0]:
        return "the command is empty"
    if not os.path.isabs(launch.working_directory):
        return f"the working directory must be an absolute path, not {launch.working_directory!r}"
    for name, value in launch.environment:
        if not name or "=" in name:
            return f"environment variable {name!r} has an impossible name"
        if "\0" in name + value:
            return f"environment variable {name!r} contains a NUL byte"
    if "\0" in "".join(launch.arguments) + launch.working_directory:
        return "the command or its working directory contains a NUL byte"
    return ""


def write_launch(directory: Path, launch: Launch) -> None:
    """Make the attempt's directory and its `launch` file, as `shim.py` describes it. Raises
    OSError.
    """
    directory.mkdir(mode=0o700)
    (directory / LOG_DIRECTORY_NAME).mkdir(mode=0o700)
    fields = [launch.working_directory, str(len(launch.arguments)), *launch.arguments]
    fields += [f"{name}={value}" for name, value in launch.environment]
    temporary = directory / (LAUNCH_NAME + ".tmp")
    with open(temporary, "wb", opener=private_opener) as file:
        file.write(b"\0".join(os.fsencode(field) for field in fields))
    temporary.rename(directory / LAUNCH_NAME)


def segments(directory: Path) -> list[tuple[int, Path]]:
    """The log segments of an attempt with the offset of their first byte, oldest first."""
    try:
        entries = list((directory / LOG_DIRECTORY_NAME).iterdir())
    except FileNotFoundError:
        return []
    matches = ((SEGMENT_NAME.fullmatch(path.name), path) for path in entries)
    return sorted((int(match[1]), path) for match, path in matches if match)


def in_words(error: OSError) -> str:
    """Why no process was started. What the kernel says of one too many is for a call that waits."""
    if error.errno != errno.EAGAIN:
        return str(error)
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    own = "no limit" if limit == resource.RLIM_INFINITY else str(limit)
    return (
        "there are as many processes as may be: of the agent's user (RLIMIT_NPROC, "
        f"{own}), of its control group (pids.max) or of the system (kernel.threads-max)"
    )


def shim_failure(directory: Path) -> str:
    """Why a shim ended without a word: the last line that it left on its standard error, if any."""
    try:
        lines = (directory / "shim.err").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    detail = f": {lines[-1]}" if lines else ""
    if BlockingIOError.__name__ in detail:
        detail = f": {in_words(BlockingIOError(errno.EAGAIN, detail))}"
    return f"the trainer's supervisor ended before it could start it{detail}"


def settled_as(directory: Path) -> int:
    """Which one it was, counted from 1, of those that were settled on this node; 0 when that is not
    recorded.
    """
    try:
        return int((directory / SETTLED_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return 0


def write_settled(directory: Path, number: int) -> None:
    """Not at the price of a flush: it orders logs, and nothing else."""
    with (
        contextlib.suppress(OSError),  # a full disk: it counts as older than it is
        open(directory / SETTLED_NAME, "wb", opener=private_opener) as file,
    ):
        file.write(b"%d" % number)


def log_bytes(directory: Path) -> int:
    """What the kept output of an attempt takes on disk, also while it is being rotated. What cannot
    be looked at counts for nothing: the next look may see it."""
    total_bytes = 0
    with contextlib.suppress(OSError):
        for _, path in segments(directory):
            with contextlib.suppress(FileNotFoundError):
                total_bytes += path.stat().st_size
    return total_bytes
