"""What a supervisor knows of an attempt whose exit is not settled."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from agent.core.values import ProcessExit
from agent.processes import proc


@dataclass(slots=True, eq=False)
class Attempt:
    """`starting` resolves to the trainer's pid, or to a `StartError`."""

    directory: Path
    starting: asyncio.Future[int]
    shim_pid: int = 0
    shim_fd: int = -1  # pidfd
    status_fd: int = -1
    said: bytes = b""  # what the shim has written to the status pipe
    server: int = 0  # pid of the fork server that was asked for the shim
    start_ticks: int = 0
    timer: asyncio.TimerHandle | None = None
    is_unit: bool = False  # of systemd
    starters: int = 0  # calls of `start` that have not returned; an exit is told after them
    ended: ProcessExit | None = None
    told: bool = False

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def start_failed(self) -> bool:
        starting = self.starting
        return starting.done() and not starting.cancelled() and starting.exception() is not None

    def running_pid(self) -> int:
        """The trainer's pid, or 0 when it could not be started, has ended, or its number is
        another's by now. Raises OSError while /proc cannot be read."""
        if self.ended is not None or self.starting.cancelled() or self.start_failed:
            return 0
        process = proc.read_process(self.starting.result())
        same = process is not None and process.start_ticks == self.start_ticks
        return self.starting.result() if same else 0
