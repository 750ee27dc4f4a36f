"""What a plan of the fleet's size may never do, whatever the forecast says: each bound has a name.

Problem: a forecast is wrong some day, a collector lies, a rack does not come up again. What that
may cost has to be known beforehand, so it cannot depend on the forecast. A plan asks here before it
switches anything, and says by name what held it back.

Of a node (`of_node`): nobody's guaranteed job and no checkpoint that lies nowhere else yet is
switched off, nor a node that came up lately, was cycled often, or may not come up again. Of the
fleet: how many nodes go and come within ten minutes, how many empty ones stay, what may be spent.
Of what is known (`of_knowledge`): who does not know does not switch anything off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from coordinator.core.capacity_model import Box, Outlook

WINDOW_MS: Final = 600_000
DAY_MS: Final = 86_400_000


class Rail(Enum):
    """The text is what a decision says of it."""

    GUARANTEED = "a guaranteed job is there"
    UPLOADING = "a checkpoint lies nowhere else yet"
    CLOSED = "a person or its health has closed it"
    FLAKY = "it did not come up the last time"
    REFUSED = "it was ordered off and stayed on, and is not tried again yet"
    UP_TIME = "it has not been up for long enough"
    CYCLES = "it was switched on too often today"
    DOWN_RATE = "enough nodes went off in the last ten minutes"
    UP_RATE = "enough nodes were switched on in the last ten minutes"
    SPARES = "some empty nodes of each type stay on"
    BOOT_FAILURES = "nodes did not come up as often as was tried"
    STALE = "what is known of demand is too old"
    CLOCK = "this clock has jumped, or no plan was made for too long"
    COVERAGE = "forecasts were wrong too often for three days"
    NO_FORECAST = "there is no forecast yet"
    BUDGET = "the budget of a day does not suffice"
    NAMES = "no name is free for one more rented node, or the last one did not come"
    APPROVAL = "a person has to agree to what raises spend"


@dataclass(frozen=True, slots=True)
class Bounds:
    """`down_ratio` of all nodes, `down_min` at least, go off within ten minutes; the same with
    `up`. `spares`: empty nodes of a GPU type that stay on; `spares_min` of one that is not named.
    `gap_ms_max` between two plans: with more, nobody knows what happened meanwhile."""

    down_ratio: float = 0.05
    down_min: int = 1
    up_ratio: float = 0.2
    up_min: int = 2
    spares: Mapping[str, int] = field(default_factory=dict)
    spares_min: int = 1
    up_ms_min: int = 7_200_000
    cycles_per_day_max: int = 4
    boot_retries: int = 2
    coverage_min: float = 0.85
    gap_ms_max: int = 600_000


@dataclass(frozen=True, slots=True)
class Switched:
    """So many nodes at that moment."""

    at_ms: int
    nodes: int


def of_node(box: Box, now_ms: int, bounds: Bounds) -> Rail | None:
    """What forbids to switch this one off, or to take it out of use for that; None: nothing."""
    if box.closed:
        return Rail.CLOSED
    if box.guaranteed:
        return Rail.GUARANTEED
    if box.uploading:
        return Rail.UPLOADING
    if box.boot_failures:
        return Rail.FLAKY
    if box.refused:
        return Rail.REFUSED
    if any(at_ms > now_ms - bounds.up_ms_min for at_ms in box.starts_ms):
        return Rail.UP_TIME
    if cycles(box, now_ms) >= bounds.cycles_per_day_max:
        return Rail.CYCLES
    return None


def of_knowledge(
    outlook: Outlook, now_ms: int, before_ms: int | None, bounds: Bounds
) -> Rail | None:
    """What forbids to act on this outlook; `before_ms`: when the last plan was made, if one was."""
    if outlook.stale:
        return Rail.STALE
    if before_ms is not None and not 0 <= now_ms - before_ms <= bounds.gap_ms_max:
        return Rail.CLOCK
    if outlook.coverage is not None and outlook.coverage < bounds.coverage_min:
        return Rail.COVERAGE
    if not outlook.soon_gpus or not outlook.later_gpus:
        return Rail.NO_FORECAST
    return None


def cycles(box: Box, now_ms: int) -> int:
    """How often it was switched on within a day."""
    return sum(at_ms > now_ms - DAY_MS for at_ms in box.starts_ms)


def exhausted(box: Box, bounds: Bounds) -> bool:
    """Whether it was tried often enough to come up."""
    return box.boot_failures > bounds.boot_retries


def down_max(nodes: int, switched: Sequence[Switched], now_ms: int, bounds: Bounds) -> int:
    """How many of so many nodes may go off now."""
    allowed = max(bounds.down_min, int(bounds.down_ratio * nodes))
    return max(0, allowed - _lately(switched, now_ms))


def up_max(nodes: int, switched: Sequence[Switched], now_ms: int, bounds: Bounds) -> int:
    """How many may be switched on now."""
    allowed = max(bounds.up_min, int(bounds.up_ratio * nodes))
    return max(0, allowed - _lately(switched, now_ms))


def recent(switched: Sequence[Switched], now_ms: int) -> tuple[Switched, ...]:
    """Those that still count."""
    return tuple(each for each in switched if now_ms - WINDOW_MS < each.at_ms <= now_ms)


def _lately(switched: Sequence[Switched], now_ms: int) -> int:
    return sum(each.nodes for each in recent(switched, now_ms))
