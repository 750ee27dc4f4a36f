"""What the agent's shell counts of its own work, for the metrics.

Problem: these things pass and leave no trace in the state: rounds of the loop, messages, readings,
commits. They are counted in one value, in the shell, so that neither core nor adapters know of it.
All of it begins at zero with the process, which Prometheus expects of a counter.
"""

from dataclasses import dataclass, field

from agent.core.census import Census
from agent.core.messages import CheckpointProposed
from agent.core.state import Record, SpoolEvent
from agent.core.values import Sample
from agent.histogram import SECONDS_BOUNDS, Histogram


@dataclass(slots=True)
class Counts:
    """`commit_s` are the journal's. `samples_late` took longer than the interval between them.
    `gpu_failures` counts, by UUID, readings of a GPU that said nothing but an error."""

    rounds: int = 0
    events: int = 0
    commit_s: Histogram = field(default_factory=lambda: Histogram(SECONDS_BOUNDS))
    sessions: int = 0
    messages_sent: int = 0
    orders_received: int = 0
    samples: int = 0
    samples_late: int = 0
    sample_duration_ms: int | None = None
    gpu_failures: dict[str, int] = field(default_factory=dict)
    checkpoints_stored: int = 0
    checkpoint_bytes_stored: int = 0
    checkpoints_replicated: int = 0
    checkpoints_proposed: int = 0
    store_failures: int = 0
    replication_failures: int = 0

    def sampled(self, sample: Sample, duration_ms: int, interval_ms: int) -> None:
        self.samples += 1
        self.samples_late += duration_ms > interval_ms
        self.sample_duration_ms = duration_ms
        for gpu in sample.gpus:
            failed = self.gpu_failures.get(gpu.uuid, 0) + bool(gpu.error)
            self.gpu_failures[gpu.uuid] = failed

    def committed(self, records: list[Record], duration_ms: int) -> None:
        self.commit_s.observe(duration_ms / 1000)
        for record in records:
            # Spooled once, however often it is sent.
            if isinstance(record, SpoolEvent):
                self.checkpoints_proposed += isinstance(record.event.body, CheckpointProposed)


@dataclass(frozen=True, slots=True)
class View:
    """What a scrape sees. `counts` are the shell's own: look, and do not keep."""

    census: Census
    counts: Counts
    inbox_length: int
    outbox_length: int
