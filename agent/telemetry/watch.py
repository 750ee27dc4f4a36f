"""Decides what follows when the sampler does not answer. Pure: time is an argument.

Problem: a process that exists is no process that works. Monitors stood still for 7 to 24 days and
counted as running (NVIDIA/NVSentinel #1477), and calls about one GPU with memory errors blocked for
more than 45 s, with everything that waited for them (NVIDIA/DCGM #313). What counts is an answer
within its deadline. But killing at the first miss would make a slow driver slower, since opening it
is the slowest call of all; and starting a process after each kill would leave a heap of them behind
in state D.

How: one miss warns, three in a row make the driver unresponsive: the sampler is killed and
replaced, at most once in five minutes, and not at all where many are left behind. One that may not
be replaced is left to wait, since it may yet be answered. The GPU that was waited for is a suspect
from then on: it comes last, and while no replacement may be started it is not asked at all, so that
it costs the others at most a few readings in five minutes. An answer clears it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MISSES_MAX: Final = 3
REPLACEMENT_MS: Final = 300_000
# Each holds 20 MiB and a driver's locks; a driver that has blocked so many for good needs a reboot.
LEFT_BEHIND_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Notice:
    """For the log."""

    level: str
    event: str
    fields: tuple[tuple[str, object], ...]


@dataclass(slots=True)
class Watch:
    """Over one sampler and those that replace it. Times are monotonic."""

    misses: int = 0  # in a row
    ended: bool = False
    unresponsive: bool = False
    suspects: tuple[str, ...] = ()  # oldest first
    replaced_ms: int | None = None

    def order(self, now_ms: int, uuids: Sequence[str]) -> tuple[str, ...]:
        """Whom to ask, in this order: suspects last, or not at all."""
        trusted = tuple(uuid for uuid in uuids if uuid not in self.suspects)
        if trusted and self.wait_ms(now_ms):
            return trusted
        return trusted + tuple(uuid for uuid in self.suspects if uuid in uuids)

    def wait_ms(self, now_ms: int) -> int:
        """Until the sampler may be replaced; 0: it may be now."""
        if self.replaced_ms is None:
            return 0
        return max(0, self.replaced_ms + REPLACEMENT_MS - now_ms)

    def heard(self, uuid: str) -> tuple[Notice, ...]:
        """This GPU has answered, in time or not."""
        if uuid not in self.suspects:
            return ()
        self.suspects = tuple(suspect for suspect in self.suspects if suspect != uuid)
        return (Notice("info", "gpu.answers_again", (("gpu", uuid),)),)

    def answered(self) -> tuple[Notice, ...]:
        """A request was answered within its deadline."""
        self.misses = 0
        if not self.unresponsive:
            return ()
        self.unresponsive = False
        return (Notice("info", "gpu.driver_responsive", (("suspects", self.suspects),)),)

    def missed(self, suspect: str) -> tuple[Notice, ...]:
        """A request was not. `suspect` is the GPU that is waited for; empty: it is not known."""
        self.misses += 1
        self._suspect(suspect)
        fields = (("misses", self.misses), ("gpu", suspect))
        if self.misses == 1:
            return (Notice("warning", "sampler.late", fields),)
        if self.misses >= MISSES_MAX and not self.unresponsive:
            self.unresponsive = True
            return (Notice("error", "gpu.driver_unresponsive", fields),)
        return ()

    def lost(self, reason: str, suspect: str) -> tuple[Notice, ...]:
        """The sampler is no more. What it was asked last may be why."""
        self.ended = True
        self._suspect(suspect)
        return (Notice("warning", "sampler.ended", (("reason", reason), ("gpu", suspect))),)

    def replaces(self, now_ms: int, left_behind_count: int) -> bool:
        """Whether the sampler is to be killed now, and another one started."""
        needed = self.ended or self.misses >= MISSES_MAX
        allowed = self.wait_ms(now_ms) == 0 and left_behind_count < LEFT_BEHIND_MAX
        return needed and allowed

    def replaced(self, now_ms: int) -> None:
        """That was done. The new one has as many chances as the old one had."""
        self.replaced_ms = now_ms
        self.misses = 0
        self.ended = False

    def _suspect(self, uuid: str) -> None:
        if uuid and uuid not in self.suspects:
            self.suspects = (*self.suspects, uuid)
