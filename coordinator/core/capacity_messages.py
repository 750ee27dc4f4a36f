"""What is ordered of whoever switches nodes on and off, and what is heard of it: a part of what
`messages.py` says goes into the core and comes out of it."""

from dataclasses import dataclass

from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome


@dataclass(frozen=True, slots=True)
class Actuate:
    """Give the order to the actuator. Given twice with one key it is one deed."""

    order: CapacityOrder


@dataclass(frozen=True, slots=True)
class Actuated:
    """A driver has said what became of an order at one node."""

    outcome: CapacityOutcome
