"""The store of simulations: everything a `SqliteStore` promises, in dictionaries, without a thread
or a file.

Problem: a fake that keeps the very objects it was given hides what a database would lose, and one
that is thrown away with its coordinator cannot be restarted. So a `MemoryDisk` outlives
coordinators and holds what a disk would hold: JSON documents, written and read by the code of the
SQL stores. A `MemoryStore` is one coordinator's handle on it. Opening a second handle advances the
leader's epoch, and the first one's commits are refused from then on.

Faults are asked for: `disk.fail_next(2)` lets two commits fail, with or without having taken
effect.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from coordinator.core.demand_history import DemandLog
from coordinator.core.lease_messages import with_day
from coordinator.core.messages import (
    AppendEvent,
    DropCheckpoint,
    DropDemand,
    DropJob,
    DropNode,
    DropPart,
    PutAttempt,
    PutCheckpoint,
    PutDemand,
    PutDemandSeries,
    PutJob,
    PutLeaseDay,
    PutNode,
    PutPart,
    PutScaleRecord,
    Record,
)
from coordinator.core.model import Checkpoint, JobEvent, Snapshot, WaitingPart
from coordinator.core.scale_records import RECORDS_MAX
from coordinator.core.state import ATTEMPTS_SHOWN_MAX
from coordinator.ports import LeaderLost, StoreUnavailable
from coordinator.store import rows


class MemoryStore:
    """`coordinator.ports.Store` on a `MemoryDisk`; the constructor's default is an empty disk of
    its own."""

    def __init__(self, disk: "MemoryDisk | None" = None) -> None:
        self.disk = MemoryDisk() if disk is None else disk
        self._leader_epoch = 0
        self._is_open = False

    async def open(self) -> Snapshot:
        assert not self._is_open, "this store is open already"
        self.disk.leader_epoch += 1
        self._leader_epoch = self.disk.leader_epoch
        self._is_open = True
        return self.disk.snapshot()

    async def commit(self, records: Sequence[Record]) -> None:
        assert self._is_open, "this store is not open"
        if self._leader_epoch != self.disk.leader_epoch:
            raise LeaderLost(
                f"another coordinator has taken over: its leader epoch is {self.disk.leader_epoch},"
                f" ours was {self._leader_epoch}, and nothing of this batch was written"
            )
        self.disk.commit(records)

    async def events(self, job_id: int, after_sequence: int, limit: int) -> list[JobEvent]:
        """At most `EVENTS_PER_JOB_MAX`."""
        assert self._is_open, "this store is not open"
        lines = self.disk.jobs[job_id].events if job_id in self.disk.jobs else {}
        page = [sequence for sequence in sorted(lines) if sequence > after_sequence]
        page = page[: max(0, min(limit, rows.EVENTS_PER_JOB_MAX))]
        return [rows.event_decoder.decode(lines[sequence]) for sequence in page]

    async def close(self) -> None:
        """Closing twice is closing once."""
        self._is_open = False


@dataclass(slots=True)
class _JobFolder:
    """All that is stored of one job, so that dropping it is one step. `document` is empty before
    its first `PutJob`."""

    document: str = ""
    attempts: dict[tuple[int, int], str] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)
    parts: dict[tuple[int, str], str] = field(default_factory=dict)
    events: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class MemoryDisk:
    """What is durable. `commits` counts the batches that took effect, `failures` the faults that
    fired."""

    leader_epoch: int = 0
    last_job_id: int = 0
    jobs: dict[int, _JobFolder] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    demand_series: dict[int, str] = field(default_factory=dict)
    demand: dict[tuple[int, int], str] = field(default_factory=dict)
    scale_records: dict[int, str] = field(default_factory=dict)
    lease_days: tuple[int, ...] = ()
    commits: int = 0
    failures: int = 0
    _failures_left: int = 0
    _failures_take_effect: bool = False

    def fail_next(self, count: int, *, take_effect: bool = False) -> None:
        """The next `count` commits raise `StoreUnavailable`; with `take_effect` the batch is
        durable nevertheless, as when an I/O error hides the outcome."""
        self._failures_left = count
        self._failures_take_effect = take_effect

    def commit(self, records: Sequence[Record]) -> None:
        """Encodes everything first, which may find a bug, then applies it, which cannot fail: all
        or nothing."""
        fails = self._failures_left > 0
        if not fails or self._failures_take_effect:
            texts = [_document(record) for record in records]
            for record, text in zip(records, texts, strict=True):
                self._apply(record, text)
            self.commits += 1
        if fails:
            self._failures_left -= 1
            self.failures += 1
            raise StoreUnavailable(
                f"the commit of {len(records)} records was told to fail,"
                f" as the next {self._failures_left} will"
            )

    def snapshot(self) -> Snapshot:
        folders = [self.jobs[job_id] for job_id in sorted(self.jobs)]
        checkpoints: list[Checkpoint] = []
        parts: list[WaitingPart] = []
        for folder in folders:
            values = map(rows.checkpoint_decoder.decode, folder.checkpoints.values())
            checkpoints += sorted(values, key=lambda value: (value.step, value.digest))
            waiting = map(rows.part_decoder.decode, folder.parts.values())
            parts += sorted(waiting, key=lambda part: (part.sequence, part.rank, part.digest))
        return Snapshot(
            leader_epoch=self.leader_epoch,
            last_job_id=self.last_job_id,
            jobs=tuple(
                rows.job_decoder.decode(folder.document) for folder in folders if folder.document
            ),
            attempts=tuple(
                rows.attempt_decoder.decode(folder.attempts[key])
                for folder in folders
                for key in sorted(folder.attempts)
            ),
            checkpoints=tuple(checkpoints),
            nodes=tuple(rows.node_decoder.decode(self.nodes[node]) for node in sorted(self.nodes)),
            parts=tuple(parts),
            demand=self._demand_log(),
            scale_records=tuple(
                rows.scale_record_decoder.decode(self.scale_records[number])
                for number in sorted(self.scale_records)
            ),
            lease_days=self.lease_days,
        )

    def _apply(self, record: Record, text: str) -> None:
        match record:
            case PutJob(job):
                self._folder(job.id).document = text
                self.last_job_id = max(self.last_job_id, job.id)
            case PutAttempt(attempt):
                tries = self._folder(attempt.job_id).attempts
                tries[attempt.epoch, attempt.rank] = text
                if attempt.epoch > ATTEMPTS_SHOWN_MAX:
                    _keep_newest(tries)
            case PutCheckpoint(checkpoint):
                self._folder(checkpoint.job_id).checkpoints[checkpoint.digest] = text
            case PutPart(part):
                self._folder(part.job_id).parts[part.rank, part.digest] = text
            case PutNode(node):
                self.nodes[node.id] = text
            case AppendEvent(event):
                lines = self._folder(event.job_id).events
                lines[event.sequence] = text
                if len(lines) > rows.EVENTS_PER_JOB_MAX:
                    del lines[min(lines)]
            case PutScaleRecord(decided):
                self.scale_records[decided.number] = text
                gone = max(self.scale_records) - RECORDS_MAX
                for old in [each for each in self.scale_records if each <= gone]:
                    del self.scale_records[old]
            case PutLeaseDay(day):
                self.lease_days = with_day(self.lease_days, day)
            case PutDemandSeries(number):
                self.demand_series[number] = text
            case PutDemand(row):
                self.demand[row.period_min, row.step] = text
                gone = rows.last_step_gone(row.period_min, row.step)
                self._keep_demand(lambda period, step: period != row.period_min or step > gone)
            case DropDemand(minute):
                self._keep_demand(lambda period, step: (step + 1) * period <= minute + 1)
            case DropJob(job_id):
                self.jobs.pop(job_id, None)
            case DropNode(node_id):
                self.nodes.pop(node_id, None)
            case DropCheckpoint(job_id, digest):
                if job_id in self.jobs:
                    self.jobs[job_id].checkpoints.pop(digest, None)
            case DropPart(job_id, rank, digest):
                if job_id in self.jobs:
                    self.jobs[job_id].parts.pop((rank, digest), None)
            case _:
                assert_never(record)

    def _keep_demand(self, stays: Callable[[int, int], bool]) -> None:
        self.demand = {key: text for key, text in self.demand.items() if stays(*key)}

    def _demand_log(self) -> DemandLog:
        series = [self.demand_series[number] for number in sorted(self.demand_series)]
        steps = [self.demand[key] for key in sorted(self.demand)]
        return DemandLog(
            tuple(map(rows.series_decoder.decode, series)),
            tuple(map(rows.demand_decoder.decode, steps)),
        )

    def _folder(self, job_id: int) -> _JobFolder:
        return self.jobs.setdefault(job_id, _JobFolder())


def _keep_newest(tries: dict[tuple[int, int], str]) -> None:
    """Of as many tries as are kept; rank 0 counts them."""
    firsts = sorted((epoch for epoch, rank in tries if rank == 0), reverse=True)
    for gone in firsts[ATTEMPTS_SHOWN_MAX : ATTEMPTS_SHOWN_MAX + 1]:
        for key in [known for known in tries if known[0] <= gone]:
            del tries[key]


def _document(record: Record) -> str:
    match record:
        case PutJob(value) | PutAttempt(value) | PutCheckpoint(value) | PutNode(value):
            return rows.document(value)
        case PutPart(part):
            return rows.document(part)
        case AppendEvent(event):
            return rows.document(event)
        case PutScaleRecord(decided):
            return rows.document(decided)
        case PutDemandSeries():
            return rows.document(record)
        case PutDemand(row):
            return rows.document(row)
        case PutLeaseDay() | DropJob() | DropNode() | DropCheckpoint() | DropPart() | DropDemand():
            return ""
        case _:
            assert_never(record)
