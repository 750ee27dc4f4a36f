"""What every way to switch nodes on and off can do: tell their state, say what it would do, do it,
and take it back. Whether a deed is as ordered (`verify`) follows from the state, for all alike.

Problem: a machine's power is somebody else's device or program. It may hang, do a thing twice, or
say "done" when nothing has happened. So a driver does one thing at a time and keeps nothing in
mind; keys, deadlines and retries are the actuator's (`actuator.py`). What a driver owes:

- `apply` may be given the same order again, after a restart or a reply that was lost: a node that
  is as ordered already is left alone, or switched to where it is.
- Whoever waits for `apply` may stop waiting (the task is cancelled). What it has started on this
  machine, it then ends; what goes on elsewhere may still succeed, which harms nothing.
- It raises `CapacityError` with a sentence, and never a secret in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Final, Protocol

from coordinator.core.capacity_orders import CapacityOrder, Verb


class State(Enum):
    """Of a node, as its driver sees it. A burst node that exists is on. `unknown`: nobody can say,
    and the node's own hello or silence must."""

    ON = "on"
    OFF = "off"
    UNKNOWN = "unknown"


class CapacityError(Exception):
    """The order could not be carried out; the text is a sentence for people."""


class Driver(Protocol):
    """One conformance suite (tests/capacity/test_drivers.py) holds for every implementation.
    `takes_lists`: one call does for all nodes of an order, else each node has a call of its own."""

    @property
    def takes_lists(self) -> bool: ...

    def plan(self, order: CapacityOrder) -> list[str]:
        """What `apply` would do, as sentences. Nothing is done. Raises `CapacityError` for a verb
        that this driver does not know."""
        ...

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        """Of each of them. Raises `CapacityError`."""
        ...

    async def apply(self, order: CapacityOrder) -> None:
        """Raises `CapacityError`; then none of its nodes counts as done."""
        ...

    async def roll_back(self, order: CapacityOrder) -> None:
        """Leave nothing of an order that has failed. Raises `CapacityError`."""
        ...


WANTED: Final[Mapping[Verb, State]] = {
    Verb.RESUME: State.ON,
    Verb.SUSPEND: State.OFF,
    Verb.CREATE: State.ON,
    Verb.DELETE: State.OFF,
}
REVERSE: Final[Mapping[Verb, Verb]] = {
    Verb.RESUME: Verb.SUSPEND,
    Verb.SUSPEND: Verb.RESUME,
    Verb.CREATE: Verb.DELETE,
    Verb.DELETE: Verb.CREATE,
}


async def verify(driver: Driver, order: CapacityOrder) -> dict[str, str]:
    """For each node of an order that the driver says is done: empty, or what is wrong. Where the
    driver cannot see, it is believed; the node itself is the witness then."""
    states = await driver.state(order.nodes)
    wanted = WANTED[order.verb]
    found = {node: states.get(node, State.UNKNOWN) for node in order.nodes}
    return {
        node: ""
        if state in (wanted, State.UNKNOWN)
        else f"{node} is {state.value}, although its driver has done what makes it {wanted.value}"
        for node, state in found.items()
    }


def reverse(order: CapacityOrder) -> CapacityOrder:
    """The order that takes `order` back."""
    return replace(order, key=f"{order.key}.back", verb=REVERSE[order.verb])


def is_resume(driver: str, order: CapacityOrder) -> bool:
    """Of a driver that switches nodes and makes none. Raises `CapacityError` for other verbs."""
    if order.verb not in (Verb.RESUME, Verb.SUSPEND):
        raise unknown_verb(driver, order)
    return order.verb is Verb.RESUME


def unknown_verb(driver: str, order: CapacityOrder) -> CapacityError:
    """What a driver answers to a verb that is none of its own."""
    return CapacityError(f"the driver '{driver}' does not {order.verb.value} nodes")
