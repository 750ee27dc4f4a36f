"""An asyncio event loop whose time is a number.

Problem: a test of leases, back-offs and graces either sleeps on real time (slow, and different on
every machine) or replaces the code under test. asyncio asks its loop for the time and its selector
how long to wait; so a loop that has no selector at all can answer both: when nothing is ready, time
jumps to the next timer. A fleet's afternoon takes a second, and the same seed gives the same order
of everything. (trio's `MockClock` with `autojump_threshold=0` is the same idea.)

What would hang a real program raises here: nothing ready and no timer is a *deadlock*; too many
rounds without time passing is a *livelock*; and the number of rounds is bounded altogether.
"""

import asyncio
from typing import Any

# Rounds of the loop in one run, unless it says otherwise.
ROUNDS_MAX = 3_000_000
# Rounds in which time did not move: a batch of everything takes a few hundred.
ROUNDS_STANDING_MAX = 20_000


class Deadlock(AssertionError):
    """Everybody waits and no timer runs."""


class Livelock(AssertionError):
    """Somebody goes round and round and time does not pass, or the run does not end."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order in which they became ready; touches no file descriptor."""

    # Set by BaseEventLoop; typeshed does not know it.
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, rounds_max: int = ROUNDS_MAX) -> None:
        super().__init__()
        self._rounds_max = rounds_max
        self._now_s = 0.0
        self._selector = self  # what BaseEventLoop asks how long to wait
        self._rounds = 0
        self._rounds_standing = 0

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def select(self, timeout_s: float | None) -> list[object]:
        """Instead of waiting: jump to the next timer. Raises `Deadlock` and `Livelock`."""
        self._rounds += 1
        self._rounds_standing += 1
        if self._rounds > self._rounds_max:
            raise Livelock(f"{self._rounds} rounds and no end at {self._now_s:.3f} s")
        if self._rounds_standing > ROUNDS_STANDING_MAX:
            raise Livelock(f"time stands at {self._now_s:.3f} s for {self._rounds_standing} rounds")
        if timeout_s is None:
            raise Deadlock(f"nothing is ready and no timer runs at {self._now_s:.3f} s")
        if timeout_s > 0:
            self._now_s = max(self._now_s, self._scheduled[0].when())
            self._rounds_standing = 0
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody else is awake to be woken from."""
