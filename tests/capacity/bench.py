"""A clock that the test moves, and an actuator with what it has reported and logged.

Waiting for a state again and again takes no time here: short sleeps move the clock and return. Long
ones, which are deadlines, end when the test says so.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from coordinator.capacity.actuator import Actuator, Group
from coordinator.capacity.driver import Driver
from coordinator.capacity.journal import Journal
from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome, Verb

DEADLINE_MS: Final = 600_000
GROUP: Final = "rack"


class VirtualClock:
    """`slept` counts short sleeps."""

    def __init__(self) -> None:
        self._now_ms = 0
        self.slept = 0
        self._deadlines: list[asyncio.Future[None]] = []
        self._changed = asyncio.Event()

    def now_ms(self) -> int:
        return self._now_ms

    def now_s(self) -> float:
        return self._now_ms / 1000

    def unix_ms(self) -> int:
        return self._now_ms

    async def sleep_ms(self, duration_ms: int) -> None:
        if duration_ms < DEADLINE_MS:
            self._now_ms += duration_ms
            self.slept += 1
            self._changed.set()
            await asyncio.sleep(0)
            return
        waiting = asyncio.get_running_loop().create_future()
        self._deadlines.append(waiting)
        self._changed.set()
        await waiting

    def pass_deadlines(self) -> None:
        self._now_ms += DEADLINE_MS
        for waiting in self._deadlines:
            if not waiting.done():
                waiting.set_result(None)
        self._deadlines = []

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looked at whenever somebody sleeps."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def are_sleeping(self, count: int) -> bool:
        """Are so many deadlines set?"""
        return sum(not waiting.done() for waiting in self._deadlines) == count


class Bench:
    """An actuator over `driver`, with its journal at `path`. `up`: nodes that have said hello.
    `others` are nodes of another group."""

    def __init__(
        self,
        driver: Driver,
        nodes: Sequence[str],
        path: Path,
        clock: VirtualClock,
        others: Sequence[str] = (),
    ) -> None:
        self.clock = clock
        self.up: list[str] = []
        self.outcomes: list[CapacityOutcome] = []
        self.events: list[tuple[str, dict[str, object]]] = []
        self._reported = asyncio.Event()
        journal = Journal(path)
        journal.open()
        groups = dict.fromkeys(nodes, Group(GROUP, driver, DEADLINE_MS))
        groups |= dict.fromkeys(others, Group("others", driver, DEADLINE_MS))
        self.actuator = Actuator(
            groups,
            journal,
            clock,
            self._report,
            is_up=lambda node: node in self.up,
            log=self._log,
        )

    def give(self, key: str, verb: Verb, *nodes: str) -> None:
        self.actuator.give(CapacityOrder(key, verb, nodes))

    async def ordered(self, key: str, verb: Verb, *nodes: str) -> list[CapacityOutcome]:
        """Give it, and wait for as many outcomes as it has nodes."""
        before = len(self.outcomes)
        self.give(key, verb, *nodes)
        return await self.reported(before + len(nodes))

    async def reported(self, count: int) -> list[CapacityOutcome]:
        """The last of `count` outcomes, those that came since."""
        before = len(self.outcomes)
        while len(self.outcomes) < count:
            self._reported.clear()
            await self._reported.wait()
        return self.outcomes[before:]

    def logged(self, event: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.events if name == event]

    def _report(self, outcome: CapacityOutcome) -> None:
        self.outcomes.append(outcome)
        self._reported.set()

    def _log(self, level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        self.events.append((event, dict(fields)))
