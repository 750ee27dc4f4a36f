"""Tells of processes that a kill does not end.

Problem: a process that waits in the kernel for a device (state D) takes no signal until the device
answers, which a broken GPU never does. Its attempt cannot end, and its GPUs stay held, as they
must; but nobody would know why a node has fewer of them.

How: a minute after a kill the attempt is looked at, and from then on once a minute until it is
over. The log names the processes that are still in state D and the GPUs that they hold, once for
each new set of them, and says what to do.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from agent.processes import proc, shim

LOOK_S = 60.0  # a driver that tears down a full node takes tens of seconds
UNINTERRUPTIBLE = b"D"
SUGGESTION = "cordon the node (baton cordon) and reboot it: no signal reaches these processes"

log = structlog.get_logger()


def watch(directory: Path, shim_pid: int, is_over: Callable[[], bool]) -> None:
    """From the moment of the kill; ends by itself when `is_over`."""
    loop = asyncio.get_running_loop()
    loop.call_later(LOOK_S, look, directory, shim_pid, is_over, ())


def look(
    directory: Path, shim_pid: int, is_over: Callable[[], bool], told: tuple[int, ...]
) -> None:
    """Say what is new, and look again later. `told` are the pids that the log has already."""
    if is_over():
        return
    pids = stuck(shim_pid)
    if pids and pids != told:
        gpus = gpus_of(directory)
        log.error(
            "process.unkillable",
            attempt=directory.name,
            pids=list(pids),
            gpus=gpus,
            reason=f"in state D {LOOK_S:.0f} s after SIGKILL; {SUGGESTION}",
        )
    loop = asyncio.get_running_loop()
    loop.call_later(LOOK_S, look, directory, shim_pid, is_over, pids or told)


def stuck(
    shim_pid: int, read_stat: Callable[[int], list[bytes]] = shim.stat_fields
) -> tuple[int, ...]:
    """Those below the shim that wait in the kernel and cannot be interrupted."""
    pids = sorted(process.pid for process in proc.descendants(shim_pid))
    return tuple(pid for pid in pids if read_stat(pid)[:1] == [UNINTERRUPTIBLE])


def gpus_of(directory: Path) -> list[str]:
    """What the attempt was started with; empty when its order to start has gone."""
    try:
        launch = shim.Launch((directory / shim.LAUNCH_NAME).read_bytes())
    except FileNotFoundError:
        return []
    visible = os.fsdecode(launch.environment.get(b"CUDA_VISIBLE_DEVICES", b""))
    return [gpu for gpu in visible.split(",") if gpu]
