"""What the core asks of who decides over all jobs, and the answer: a part of what `messages.py`
says goes into the core and comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.core.allocation import Aims, Allocation, Solve
from coordinator.core.standing import Asking, Entrant

# A job's types, those first that are worth most for it, with its speed there.
Order = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class MakeAllocation:
    """A command: weigh these against each other (`allocation.allocate`, where the other fields are
    explained). Nothing in it changes any more, so another thread may read it."""

    asking: Asking
    entrants: tuple[Entrant, ...]
    capacity: Mapping[str, int]
    now_ms: int
    aims: Aims
    tenants: Mapping[str, float]
    solve: Solve | None = None


@dataclass(frozen=True, slots=True)
class AllocationMade:
    """An event: what came of the order `asking`; without an `allocation` nothing, for this
    `reason`. Of those that wait, by id: `order`, `turn` and `notes` as in `standing.Standing`."""

    asking: Asking
    allocation: Allocation | None
    tenants: Mapping[str, float] = field(default_factory=dict)
    order: Mapping[int, Order] = field(default_factory=dict)
    turn: Mapping[int, tuple[bool, float]] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)
    reason: str = ""
