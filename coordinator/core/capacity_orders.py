"""Orders to whoever switches nodes on and off, and what came of them.

Problem: a driver may hang, lie, or do a thing twice. So every order has a key, and one key is one
deed however often it is given; what a driver says is checked against the node itself, which says
hello or falls silent.
"""

from dataclasses import dataclass
from enum import Enum


class Verb(Enum):
    RESUME = "resume"
    SUSPEND = "suspend"
    CREATE = "create"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class CapacityOrder:
    """`nodes` by name; of CREATE the names that the new nodes will have."""

    key: str
    verb: Verb
    nodes: tuple[str, ...]
    gpu_type: str = ""


@dataclass(frozen=True, slots=True)
class CapacityOutcome:
    """Of one node of an order. `done`: the driver says so; `reason` is a sentence where not.
    `postponed`: nothing was begun, for no reason of the node's or its driver's; it may be ordered
    again."""

    key: str
    node: str
    done: bool
    reason: str = ""
    postponed: bool = False
