"""What the coordinator's shell needs from the world, as Protocols."""

from collections.abc import Sequence
from typing import Protocol

from coordinator.core.capacity_orders import CapacityOrder
from coordinator.core.messages import (
    MakeAllocation,
    MakeForecast,
    MakeLeases,
    PublishLeases,
    Record,
)
from coordinator.core.model import Attempt, Checkpoint, Job, JobEvent, Snapshot
from coordinator.counts import Counts


class Clock(Protocol):
    """`now_ms` is monotonic and only ever compared; `unix_ms` is wall time, for people."""

    def now_ms(self) -> int: ...
    def unix_ms(self) -> int: ...
    async def sleep_ms(self, duration_ms: int) -> None: ...


class StoreUnavailable(Exception):
    """The batch is not durable and nothing of it is; the same batch may be tried again (disk full,
    busy)."""


class LeaderLost(Exception):
    """Another coordinator has taken over: stop, do not retry."""


class Store(Protocol):
    """Durable state. One conformance suite (`tests/store`) holds for every implementation."""

    async def open(self) -> Snapshot:
        """Migrate, become leader with the next epoch, and read everything. Raises
        `StoreUnavailable` with a sentence."""
        ...

    async def commit(self, records: Sequence[Record]) -> None:
        """All of it durable, or none. Raises `StoreUnavailable` or `LeaderLost`."""
        ...

    async def events(self, job_id: int, after_sequence: int, limit: int) -> list[JobEvent]:
        """A job's history, oldest first."""
        ...

    async def close(self) -> None: ...


class Tracer(Protocol):
    """Who shows attempts to a tracing system. Both calls return at once, whatever becomes of it."""

    counts: Counts

    def ended(self, job: Job, attempt: Attempt) -> None:
        """An attempt's end is durable."""
        ...

    def committed(self, job: Job, checkpoint: Checkpoint) -> None:
        """A checkpoint's commit is durable."""
        ...


class Allocating(Protocol):
    """Who decides over all jobs beside the loop; what comes of it comes back through the shell's
    inbox."""

    def make(self, asked: MakeAllocation) -> None:
        """Returns at once, whatever becomes of it."""
        ...


class Forecasting(Protocol):
    """Who makes forecasts beside the loop; they come back through the shell's inbox."""

    def make(self, asked: MakeForecast) -> None:
        """Returns at once, whatever becomes of it."""
        ...


class Leasing(Protocol):
    """Who says beside the loop what is worth leasing, which comes back through the shell's inbox,
    and hands it on. Both calls return at once, whatever becomes of it."""

    def make(self, asked: MakeLeases) -> None: ...
    def publish(self, told: PublishLeases) -> None:
        """What was told is durable."""
        ...


class Actuator(Protocol):
    """Who switches nodes on and off. What came of an order is reported node by node, as a
    `CapacityOutcome`, to whoever opened it."""

    def give(self, order: CapacityOrder) -> None:
        """Returns at once, and never raises. One key is one deed, however often it is given, also
        after a restart; then its outcomes are reported again."""
        ...
