"""What the plan of the fleet's size goes by while the coordinator runs, and what an operator sets.

Problem: a plan is a value and forgets; somebody has to keep what the next one needs to know, and
the decisions that people ask for. Only the records are durable: how many nodes were switched within
ten minutes a restarted coordinator takes from theirs (`power_memory.py`), and a decision that still
holds it says once more.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.capacity_model import Outlook
from coordinator.core.life_table import Chances, LifeTable
from coordinator.core.scale_records import RECORDS_MAX, ScaleRecord
from coordinator.core.scaling import Memory, Mode, Rules

ENDS_SEEN_MAX: Final = 200  # of which a tenth may be wrong, and is known to a few percent


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """`mode` is `None` where the age of the history decides. `names` by GPU type: those that rented
    nodes may have."""

    rules: Rules = field(default_factory=Rules)
    mode: Mode | None = None
    interval_ms: int = 60_000
    names: Mapping[str, Mapping[str, None]] = field(default_factory=dict)


@dataclass(slots=True)
class Awaited:
    """A job that so many nodes more would keep the deadline of, and when it has to run there."""

    job_id: int
    nodes: int
    latest_ms: float


@dataclass(frozen=True, slots=True)
class RentedFor:
    """So many nodes of a type were ordered for a job's deadline, the last one `at_ms`; 0: it is to
    have what others leave on theirs. `latest_ms`: when it has to run."""

    gpu_type: str
    nodes: int
    at_ms: int
    latest_ms: float


@dataclass(frozen=True, slots=True)
class EndsClaim:
    """So many GPUs were said to be free from minute `first` on; until `last` demand is not to be
    above `bound_gpus`, less of these a share that is found out (`known_ends.py`)."""

    first: int
    last: int
    bound_gpus: float
    ending_gpus: float


@dataclass(slots=True)
class EndsRecord:
    """What is waited for, and of what came the share that would have held, and of how many
    GPUs."""

    claim: EndsClaim | None = None
    seen: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=ENDS_SEEN_MAX))


@dataclass(slots=True)
class Lives:
    """Who has ended at which age, since when nothing of it was forgotten, and what followed from it
    last (`lifetimes.py`)."""

    table: LifeTable = field(default_factory=LifeTable)
    forgot_ms: int | None = None
    chances: tuple[int, Chances] | None = None


@dataclass(slots=True)
class Scaler:
    """`records` by number, oldest first; `proposed`: by GPU type the decision that waits for a
    person. `made`: when the last plan was, by both clocks; `seen_job_id`: the
    newest job then. `awaited` by GPU type: whose deadlines ask for nodes of it, as the last plan
    has it; `rented_for`: by job, what was ordered for its deadline (`deadline_rentals.py`).
    `ends`: by GPU type, of what is needed soon and later. `outlooks`: what the last plan saw of
    each type."""

    memory: Memory = field(default_factory=Memory)
    due_ms: int | None = None
    made: tuple[int, int] | None = None
    last_number: int = 0
    seen_job_id: int = 0
    records: dict[int, ScaleRecord] = field(default_factory=dict)
    proposed: dict[str, int] = field(default_factory=dict)
    awaited: dict[str, list[Awaited]] = field(default_factory=dict)
    rented_for: dict[int, RentedFor] = field(default_factory=dict)
    ends: dict[tuple[str, str], EndsRecord] = field(default_factory=dict)
    outlooks: dict[str, Outlook] = field(default_factory=dict)
    lives: Lives = field(default_factory=Lives)

    def load(self, records: tuple[ScaleRecord, ...]) -> None:
        """Take over what is durable. What was proposed has to be proposed anew."""
        self.records = {record.number: record for record in records[-RECORDS_MAX:]}
        self.last_number = max(self.records, default=0)
