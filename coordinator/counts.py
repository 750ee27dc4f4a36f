"""What the coordinator's shell counts of its own work, for the metrics.

Problem: these things pass and leave no trace in the state: rounds of the loop, messages, requests,
commits. They are counted in one value, in the shell, so that neither core nor adapters know of it.
All of it begins at zero with the process, which Prometheus expects of a counter.
"""

from dataclasses import dataclass, field
from typing import Final

from coordinator.core.census import Census
from coordinator.histogram import SECONDS_BOUNDS, Histogram

# A batch holds 2048 at most; each bucket is ten times as much company for one fsync.
BATCH_BOUNDS: Final = (1.0, 10.0, 100.0, 1_000.0)


@dataclass(slots=True)
class Counts:
    """`commit_s` are the store's, `batch_events` what was handled together. `messages` are agents',
    of which `messages_lost` found no room; `requests` people's, of which `requests_refused` could
    not be taken in. `sessions` are all streams that agents ever opened.
    Of `capacity_orders`, by node, `capacity_failures` were not carried out, as far as drivers say.
    Spans are the tracing system's, of which those are dropped that it did not take."""

    rounds: int = 0
    batch_events: Histogram = field(default_factory=lambda: Histogram(BATCH_BOUNDS))
    commit_s: Histogram = field(default_factory=lambda: Histogram(SECONDS_BOUNDS))
    commit_failures: int = 0
    sessions: int = 0
    messages: int = 0
    messages_lost: int = 0
    orders: int = 0
    requests: int = 0
    requests_refused: int = 0
    checkpoints_accepted: int = 0
    checkpoints_refused: int = 0
    waits_told: int = 0
    spans_exported: int = 0
    spans_dropped: int = 0
    capacity_orders: int = 0
    capacity_failures: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """What a scrape sees. `counts` are the shell's own: look, and do not keep."""

    census: Census
    counts: Counts
    inbox_length: int
    requests_waiting: int
    store_up: bool
