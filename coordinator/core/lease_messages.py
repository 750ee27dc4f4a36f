"""What the core asks of who says what is worth leasing, and the answer: a part of what
`messages.py` says goes into the core and comes out of it.

A day is a number: wall time over 24 hours, by UTC.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.leasing import Recommendation
from coordinator.core.model import Attempt, Job, Node
from coordinator.core.options import Options

# Of days that are remembered, before the newest and after it: a clock that is wrong by more makes a
# history in which nothing else is right either.
DAYS_KEPT: Final = 31


@dataclass(frozen=True, slots=True)
class KeptNode:
    node: Node


@dataclass(frozen=True, slots=True)
class PastDemand:
    """What samples say of the time of which some attempts are forgotten: all are kept since
    `since_unix_ms`. By type GPUs that ran and waited, in whole hours up to the first that begins
    after it; NaN: nobody knows."""

    since_unix_ms: int
    gpus: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class KeptBooks:
    """All that bills are made of (`bills.Books`), as it was at one moment; nothing in it changes
    any more, so another thread may read it."""

    options: Options
    jobs: Mapping[int, Job]
    attempts: Mapping[str, Attempt]
    job_attempts: Mapping[int, Sequence[str]]
    nodes: Mapping[str, KeptNode]
    forgotten: Mapping[str, KeptNode]
    past: PastDemand | None

    def attempts_of(self, job_id: int) -> list[Attempt]:
        return [self.attempts[attempt_id] for attempt_id in self.job_attempts[job_id]]


@dataclass(frozen=True, slots=True)
class MakeLeases:
    """A command, once a day: say what is worth leasing, with what was known at `unix_ms`."""

    day: int
    unix_ms: int
    books: KeptBooks


@dataclass(frozen=True, slots=True)
class Unadvised:
    """Why nothing is said of a type of GPU; empty: of none. `why` is a word for the kind of reason,
    which stays the same while the numbers in `sentence` change."""

    gpu_type: str
    why: str
    sentence: str


@dataclass(frozen=True, slots=True)
class LeasesMade:
    """An event: the recommendations of a day, by type of GPU."""

    day: int
    found: tuple[Recommendation, ...]
    unadvised: tuple[Unadvised, ...] = ()


@dataclass(frozen=True, slots=True)
class PublishLeases:
    """A command: hand a day's recommendations to whoever is configured."""

    found: tuple[Recommendation, ...]


@dataclass(frozen=True, slots=True)
class PutLeaseDay:
    """A record: this day's recommendations are made."""

    day: int


@dataclass(slots=True)
class LeaseDays:
    """`made`: days of which the recommendations are made, durable. `asked`: the last one for which
    they were asked. `said`: of which types it was said why there is none."""

    made: tuple[int, ...] = ()
    asked: int | None = None
    said: dict[tuple[str, str], None] = field(default_factory=dict)


def days_kept(newest: int) -> tuple[int, int]:
    """The first and the last day that is remembered."""
    return newest - DAYS_KEPT, newest + DAYS_KEPT


def with_day(days: Iterable[int], newest: int) -> tuple[int, ...]:
    """What is remembered once another day is made."""
    first, last = days_kept(newest)
    kept = [day for day in days if first <= day <= last]
    return tuple(sorted(dict.fromkeys([*kept, newest])))
