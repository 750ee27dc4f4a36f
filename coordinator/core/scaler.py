"""What the plan of the fleet's size goes by while the coordinator runs, and what an operator sets.

Problem: a plan is a value and forgets; somebody has to keep what the next one needs to know, and
the decisions that people ask for. Only the records are durable: how many nodes were switched within
ten minutes a restarted coordinator takes from theirs (`power_memory.py`), and a decision that still
holds it says once more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.core.scale_records import RECORDS_MAX, ScaleRecord
from coordinator.core.scaling import Memory, Mode, Rules


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """`mode` is `None` where the age of the history decides. `names` by GPU type: those that rented
    nodes may have."""

    rules: Rules = field(default_factory=Rules)
    mode: Mode | None = None
    interval_ms: int = 60_000
    names: Mapping[str, Mapping[str, None]] = field(default_factory=dict)


@dataclass(slots=True)
class Scaler:
    """`records` by number, oldest first; `proposed`: by GPU type the decision that waits for a
    person. `made`: when the last plan was, by both clocks; `seen_job_id`: the
    newest job then."""

    memory: Memory = field(default_factory=Memory)
    due_ms: int | None = None
    made: tuple[int, int] | None = None
    last_number: int = 0
    seen_job_id: int = 0
    records: dict[int, ScaleRecord] = field(default_factory=dict)
    proposed: dict[str, int] = field(default_factory=dict)

    def load(self, records: tuple[ScaleRecord, ...]) -> None:
        """Take over what is durable. What was proposed has to be proposed anew."""
        self.records = {record.number: record for record in records[-RECORDS_MAX:]}
        self.last_number = max(self.records, default=0)
