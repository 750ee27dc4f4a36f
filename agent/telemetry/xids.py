"""The driver's errors from both witnesses, told as they come: NVML's events and the kernel's log.

Problem: an error must be with the coordinator within a second, and a storm of them (11,760 on one
node have been seen) must not keep the agent's loop from anything else. So both sources are waited
for by the loop itself, without a thread and without a period; each turn takes a bounded number, and
what is the same GPU and code within a turn is told once, with a count.

Which errors are the same one, told by both, is for `agent/core/health.py` to judge.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import msgspec
import structlog

from agent.core.values import DriverLoaded, XidSeen
from agent.telemetry.kernel_log import KernelLog, Lost

TURN_MAX: Final = 256
LOOK_AGAIN_S: Final = 0.2  # at a log that cannot be waited for
_EVENT_BYTES_MAX: Final = 1_024

log = structlog.get_logger()


class _Event(msgspec.Struct, frozen=True):
    """What `xid_events.py` says."""

    uuid: str
    code: int
    unix_ms: int


class Xids:
    """`make` before the sampler starts, `open` in the loop. An empty `kernel_log` is not read."""

    def __init__(self, kernel_log: str) -> None:
        self._path = kernel_log
        self._log = KernelLog(kernel_log)
        self._ours: socket.socket | None = None
        self._theirs: socket.socket | None = None
        self._told: Callable[[XidSeen | DriverLoaded], None] = lambda word: None
        self._again: asyncio.TimerHandle | None = None

    def make(self) -> int:
        """Make the socket for events; returns the descriptor for samplers to write to."""
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ours.setblocking(False)
        return self._theirs.fileno()

    async def open(self, told: Callable[[XidSeen | DriverLoaded], None]) -> None:
        """Tell what this boot's log says, and from then on what comes."""
        self._told = told
        loop = asyncio.get_running_loop()
        if self._path:
            try:
                self._log.open()
                said = await asyncio.to_thread(self._log.history)
            except OSError as error:
                self._log.close()
                reason = f"{self._path}: {error.strerror}; NVML is the only witness"
                log.warning("kernel_log.absent", reason=reason)
            else:
                self._tell(said)
                self._wait_for_log(loop)
        if self._ours is not None:
            loop.add_reader(self._ours, self._on_events)

    def close(self) -> None:
        """Closing twice is closing once."""
        with contextlib.suppress(RuntimeError):  # no loop runs: none waits for it either
            loop = asyncio.get_running_loop()
            if self._log.descriptor >= 0 and self._log.waits:
                loop.remove_reader(self._log.descriptor)
            if self._ours is not None:
                loop.remove_reader(self._ours)
        if self._again is not None:
            self._again.cancel()
        self._log.close()
        for end in (self._ours, self._theirs):
            if end is not None:
                end.close()
        self._ours = self._theirs = self._again = None

    def _wait_for_log(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._log.waits:
            loop.add_reader(self._log.descriptor, self._on_log)
        else:
            self._again = loop.call_later(LOOK_AGAIN_S, self._look_again, loop)

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._on_log()
        self._wait_for_log(loop)

    def _on_log(self) -> None:
        self._tell(self._log.read(TURN_MAX))

    def _on_events(self) -> None:
        found: list[XidSeen] = []
        assert self._ours is not None
        for _ in range(TURN_MAX):
            try:
                message = self._ours.recv(_EVENT_BYTES_MAX)
            except BlockingIOError:
                break
            event = msgspec.json.decode(message, type=_Event)
            found.append(XidSeen(event.code, "nvml", event.unix_ms, uuid=event.uuid))
        self._tell(found)

    def _tell(self, words: Iterable[XidSeen | DriverLoaded | Lost]) -> None:
        same: dict[tuple[str, str, int], XidSeen] = {}
        lost = 0
        for word in words:
            if isinstance(word, Lost):
                lost += 1
            elif isinstance(word, DriverLoaded):
                self._told_all(same)
                self._told(word)
            else:
                key = (word.uuid, word.pci_bus_id, word.code)
                before = same.pop(key, None)
                if before is not None:
                    count = before.count + 1
                    word = replace(word, count=count, first_unix_ms=before.since_unix_ms)
                same[key] = word
        self._told_all(same)
        if lost:
            reason = "the kernel's log was written faster than it was read"
            log.warning("kernel_log.lost", count=lost, reason=reason)

    def _told_all(self, same: dict[tuple[str, str, int], XidSeen]) -> None:
        for seen in same.values():
            self._told(seen)
        same.clear()
