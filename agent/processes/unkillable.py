"""Finds processes that a kill does not end.

Problem: a process that waits in the kernel for a device (state D) takes no signal until the device
answers, which a broken GPU never does. Its attempt cannot end, and its GPUs stay held, as they
must; but nobody would know why a node has fewer of them.

How: a minute after a kill the attempt is looked at, and from then on once a minute until it is
over. Each new set of processes that are in state D is told, the empty one included;
`agent/core/stuck.py` has what follows.
"""

import asyncio
import contextlib
from collections.abc import Callable

from agent.core.values import ProcessesStuck
from agent.processes import proc, shim

LOOK_S = 60.0  # a driver that tears down a full node takes tens of seconds
UNINTERRUPTIBLE = b"D"

Tell = Callable[[ProcessesStuck], None]


def stuck(
    shim_pid: int, read_stat: Callable[[int], list[bytes]] = shim.stat_fields
) -> tuple[int, ...]:
    """Those below the shim that wait in the kernel and cannot be interrupted."""
    pids = sorted(process.pid for process in proc.descendants(shim_pid))
    return tuple(pid for pid in pids if is_stuck(read_stat(pid)))


def is_stuck(stat: list[bytes]) -> bool:
    """By the fields of its `stat`, as `shim.stat_fields` gives them."""
    return stat[:1] == [UNINTERRUPTIBLE]


def watch(
    attempt_id: str,
    shim_pid: int,
    is_over: Callable[[], bool],
    tell: Tell,
    *,
    find: Callable[[int], tuple[int, ...]] = stuck,
) -> None:
    """From the moment of the kill; ends by itself when `is_over`."""

    def look(told: tuple[int, ...] | None) -> None:
        if is_over():
            return
        pids = told
        with contextlib.suppress(OSError):  # /proc cannot be read now; it is looked at again
            pids = find(shim_pid)
        if pids is not None and pids != told:
            tell(ProcessesStuck(attempt_id, pids))
        loop.call_later(LOOK_S, look, pids)

    loop = asyncio.get_running_loop()
    loop.call_later(LOOK_S, look, None)
