"""Nodes that exist in memory alone, switched on and off with faults that stand as data.

Problem: what a hanging or lying device does to a fleet must be tried before a device does it; and
who tries out a policy wants to see its orders without a machine that obeys. So this driver keeps
states in memory, passes the suite of the real ones, and does wrong exactly what its fault plan
says; the plan counts what fired.

As `driver = "simulated"` it has no faults: a coordinator that acts can be watched without danger.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from coordinator.capacity.driver import WANTED, CapacityError, State, reverse
from coordinator.core.capacity_orders import CapacityOrder, Verb

DEEDS_MAX: Final = 10_000  # what is remembered of what was done; the oldest goes first


class Wrong(Enum):
    """`hang`: nothing is done and no answer comes. `late`: it is done, and no answer comes. `lie`:
    the answer is "done", and nothing is. `twice`: it is done two times. `fail`: a reason comes."""

    HANG = "hang"
    LATE = "late"
    LIE = "lie"
    TWICE = "twice"
    FAIL = "fail"


@dataclass(slots=True)
class Fault:
    """The next `times` that `verb` is applied to `node`; `fired` counts them."""

    node: str
    verb: Verb
    wrong: Wrong
    times: int = 1
    fired: int = 0


@dataclass(slots=True)
class Simulated:
    """`states` of nodes that were never named: off. `deeds` are node and verb, as they were done,
    oldest first."""

    states: dict[str, State] = field(default_factory=dict)
    faults: Sequence[Fault] = ()
    deeds: list[tuple[str, Verb]] = field(default_factory=list)
    takes_lists: bool = False

    def plan(self, order: CapacityOrder) -> list[str]:
        wanted = WANTED[order.verb].value
        return [f"note in memory that {node} is {wanted}" for node in order.nodes]

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        return {node: self.states.get(node, State.OFF) for node in nodes}

    async def apply(self, order: CapacityOrder) -> None:
        for node in order.nodes:
            await self._switch(node, order.verb)

    async def roll_back(self, order: CapacityOrder) -> None:
        await self.apply(reverse(order))

    async def _switch(self, node: str, verb: Verb) -> None:
        wrong = self._wrong(node, verb)
        if wrong is Wrong.FAIL:
            raise CapacityError(f"{node} does not {verb.value}: its fault plan says so")
        if wrong not in (Wrong.HANG, Wrong.LIE):
            self.states[node] = WANTED[verb]
            self.deeds += [(node, verb)] * (2 if wrong is Wrong.TWICE else 1)
            del self.deeds[:-DEEDS_MAX]
        if wrong in (Wrong.HANG, Wrong.LATE):
            await asyncio.Event().wait()

    def _wrong(self, node: str, verb: Verb) -> Wrong | None:
        for fault in self.faults:
            if (fault.node, fault.verb) == (node, verb) and fault.fired < fault.times:
                fault.fired += 1
                return fault.wrong
        return None
