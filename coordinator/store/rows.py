"""Records to rows and rows to values, the same for every SQL database.

Problem: a table with a column per field needs a migration per field. Here a value is one JSON
document in a `document` column, written and read straight from the frozen dataclasses of the core;
besides it stand only the columns that keys, orders and people need. A document of an older version
lacks newer fields and gets their defaults; one of a newer version has fields unknown to us, which
are ignored. So a field may come with a default, and may go, without touching the database.

Order of statements: records take effect in their order, but a batch of five hundred jobs with their
history arrives interleaved, and one `executemany` of five hundred rows costs less than five hundred
statements. Puts of different kinds write different tables, so they commute; of two puts with one
key only the last counts; drops commute with drops. Hence a batch is cut where puts and drops
alternate, and inside a piece there is one statement per kind.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import assert_never

import msgspec

from coordinator.core.demand_history import KEPT_STEPS, DemandRow
from coordinator.core.lease_messages import days_kept
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
from coordinator.core.model import Attempt, Checkpoint, Job, JobEvent, Node, WaitingPart
from coordinator.core.scale_records import RECORDS_MAX, ScaleRecord
from coordinator.core.state import ATTEMPTS_SHOWN_MAX
from coordinator.store.queries import Queries

# A job that is moved about for weeks writes some ten lines a move; 500 lines are fifty moves, and
# about 100 kB a job. The newest are kept. Kubernetes keeps events for an hour whatever their
# number, which loses the quiet job's story.
EVENTS_PER_JOB_MAX = 500

Row = dict[str, int | str]
Statement = tuple[str, list[Row]]

job_decoder = msgspec.json.Decoder(Job)
attempt_decoder = msgspec.json.Decoder(Attempt)
checkpoint_decoder = msgspec.json.Decoder(Checkpoint)
node_decoder = msgspec.json.Decoder(Node)
part_decoder = msgspec.json.Decoder(WaitingPart)
event_decoder = msgspec.json.Decoder(JobEvent)
series_decoder = msgspec.json.Decoder(PutDemandSeries)
demand_decoder = msgspec.json.Decoder(DemandRow)
scale_record_decoder = msgspec.json.Decoder(ScaleRecord)
_encoder = msgspec.json.Encoder()


_Value = (
    Job | Attempt | Checkpoint | WaitingPart | Node | JobEvent | PutDemandSeries | DemandRow
    | ScaleRecord
)  # fmt: skip


def document(value: _Value) -> str:
    """The JSON text of a value. Raises `UnicodeEncodeError` for lone surrogates: a bug of whoever
    let them in."""
    return _encoder.encode(value).decode()


def statements(queries: Queries, records: Sequence[Record]) -> Iterator[Statement]:
    """A batch as statements with their rows, each for one `executemany`, to be run in this
    order."""
    for drops, run in groupby(records, key=lambda record: isinstance(record, _Drop)):
        yield from (_drop_statements if drops else _put_statements)(queries, run)


_Drop = DropJob | DropCheckpoint | DropPart | DropNode | DropDemand


def _put_statements(queries: Queries, records: Iterable[Record]) -> Iterator[Statement]:
    jobs: dict[int, Job] = {}
    attempts: dict[tuple[int, int, int], Attempt] = {}
    checkpoints: dict[tuple[int, str], Checkpoint] = {}
    parts: dict[tuple[int, int, str], WaitingPart] = {}
    nodes: dict[str, Node] = {}
    events: dict[tuple[int, int], JobEvent] = {}
    series: dict[int, PutDemandSeries] = {}
    demand: dict[tuple[int, int], DemandRow] = {}
    scaled: dict[int, ScaleRecord] = {}
    lease_days: list[int] = []
    for record in records:
        match record:
            case PutJob(job):
                jobs[job.id] = job
            case PutAttempt(attempt):
                attempts[attempt.job_id, attempt.epoch, attempt.rank] = attempt
            case PutCheckpoint(checkpoint):
                checkpoints[checkpoint.job_id, checkpoint.digest] = checkpoint
            case PutPart(part):
                parts[part.job_id, part.rank, part.digest] = part
            case PutNode(node):
                nodes[node.id] = node
            case AppendEvent(event):
                events[event.job_id, event.sequence] = event
            case PutDemandSeries(number):
                series[number] = record
            case PutDemand(row):
                demand[row.period_min, row.step] = row
            case PutScaleRecord(decided):
                scaled[decided.number] = decided
            case PutLeaseDay(day):
                lease_days.append(day)
            case DropJob() | DropCheckpoint() | DropPart() | DropNode() | DropDemand():
                raise AssertionError(f"{record} among puts")
            case _:
                assert_never(record)
    if jobs:
        yield queries.put_job, [_job_row(job) for job in jobs.values()]
        yield queries.raise_last_job_id, [{"job_id": max(jobs)}]
    firsts = [_attempt_row(attempt) for attempt in attempts.values() if attempt.rank == 0]
    others = [_rank_row(attempt) for attempt in attempts.values() if attempt.rank != 0]
    if firsts:
        yield queries.put_attempt, firsts
    if others:
        yield queries.put_rank, others
    # Tries are counted from 1: a job that has not come so far has no more than that.
    long = dict.fromkeys(job_id for job_id, epoch, _ in attempts if epoch > ATTEMPTS_SHOWN_MAX)
    if long:
        trims: list[Row] = [{"job_id": each, "attempts_max": ATTEMPTS_SHOWN_MAX} for each in long]
        yield queries.trim_ranks, trims
        yield queries.trim_attempts, trims
    if checkpoints:
        yield queries.put_checkpoint, [_checkpoint_row(value) for value in checkpoints.values()]
    if parts:
        yield queries.put_part, [_part_row(part) for part in parts.values()]
    if nodes:
        yield queries.put_node, [{"id": n.id, "document": document(n)} for n in nodes.values()]
    if events:
        yield from _event_statements(queries, events)
    if series:
        yield queries.put_demand_series, [_series_row(value) for value in series.values()]
    if demand:
        yield queries.put_demand, [_demand_row(row) for row in demand.values()]
        yield queries.trim_demand, _demand_trims(demand.values())
    if scaled:
        yield queries.put_scale_record, [_scale_row(record) for record in scaled.values()]
        yield queries.trim_scale_records, [{"last_number": max(scaled) - RECORDS_MAX}]
    for day in lease_days:  # which are kept depends on their order
        yield from _lease_day_statements(queries, day)


def _event_statements(
    queries: Queries, events: Mapping[tuple[int, int], JobEvent]
) -> Iterator[Statement]:
    yield queries.put_event, [_event_row(event) for event in events.values()]
    # Lines are counted from 1: a history that has not come so far has no more than that.
    long = dict.fromkeys(job_id for job_id, line in events if line > EVENTS_PER_JOB_MAX)
    if long:
        kept: list[Row] = [{"job_id": each, "events_max": EVENTS_PER_JOB_MAX} for each in long]
        yield queries.trim_events, kept


def _lease_day_statements(queries: Queries, day: int) -> Iterator[Statement]:
    first, last = days_kept(day)
    yield queries.put_lease_day, [{"day": day}]
    yield queries.trim_lease_days, [{"first_day": first, "last_day": last}]


def _drop_statements(queries: Queries, run: Iterable[Record]) -> Iterator[Statement]:
    records = list(run)
    job_rows: list[Row] = []
    checkpoint_rows: list[Row] = []
    part_rows: list[Row] = []
    for record in records:
        if isinstance(record, DropJob):
            job_rows.append({"job_id": record.job_id})
        elif isinstance(record, DropCheckpoint):
            checkpoint_rows.append({"job_id": record.job_id, "digest": record.digest})
        elif isinstance(record, DropPart):
            key: Row = {"job_id": record.job_id, "attempt_rank": record.rank}
            part_rows.append({**key, "digest": record.digest})
    afters = [record.after_minute for record in records if isinstance(record, DropDemand)]
    if afters:
        yield queries.drop_demand, [{"after_minute": min(afters)}]
    if job_rows:
        yield queries.drop_events, job_rows
        yield queries.drop_checkpoints, job_rows
        yield queries.drop_parts, job_rows
        yield queries.drop_ranks, job_rows
        yield queries.drop_attempts, job_rows
        yield queries.drop_job, job_rows
    if checkpoint_rows:
        yield queries.drop_checkpoint, checkpoint_rows
    if part_rows:
        yield queries.drop_part, part_rows
    node_rows: list[Row] = [{"id": drop.node} for drop in records if isinstance(drop, DropNode)]
    if node_rows:
        yield queries.drop_node, node_rows


def _job_row(job: Job) -> Row:
    return {
        "id": job.id,
        "request_id": job.request_id,
        "phase": job.phase.value,
        "job_class": job.spec.job_class.value,
        "project": job.spec.project,
        "document": document(job),
    }


def _attempt_row(attempt: Attempt) -> Row:
    return {
        "job_id": attempt.job_id,
        "epoch": attempt.epoch,
        "node": attempt.node,
        "phase": attempt.phase.value,
        "document": document(attempt),
    }


def _rank_row(attempt: Attempt) -> Row:
    return {**_attempt_row(attempt), "attempt_rank": attempt.rank}


def _part_row(part: WaitingPart) -> Row:
    return {
        "job_id": part.job_id,
        "attempt_rank": part.rank,
        "digest": part.digest,
        "sequence": part.sequence,
        "document": document(part),
    }


def _checkpoint_row(checkpoint: Checkpoint) -> Row:
    return {
        "job_id": checkpoint.job_id,
        "digest": checkpoint.digest,
        "step": checkpoint.step,
        "document": document(checkpoint),
    }


def _event_row(event: JobEvent) -> Row:
    return {
        "job_id": event.job_id,
        "sequence": event.sequence,
        "unix_ms": event.unix_ms,
        "name": event.name,
        "attempt": event.attempt,
        "node": event.node,
        "message": event.message,
    }


def _series_row(named: PutDemandSeries) -> Row:
    return {
        "series_number": named.number,
        "gpu_type": named.series.gpu_type,
        "project": named.series.project,
        "job_class": named.series.job_class,
        "document": document(named),
    }


def _scale_row(record: ScaleRecord) -> Row:
    return {
        "record_number": record.number,
        "gpu_type": record.gpu_type,
        "unix_ms": record.unix_ms,
        "document": document(record),
    }


def _demand_row(row: DemandRow) -> Row:
    return {"period_min": row.period_min, "step": row.step, "document": document(row)}


def last_step_gone(period_min: int, newest_step: int) -> int:
    """Of a period, when this step has come; what has no ring is kept as long as the finest has."""
    return newest_step - KEPT_STEPS.get(period_min, KEPT_STEPS[1])


def _demand_trims(rows: Iterable[DemandRow]) -> list[Row]:
    newest: dict[int, int] = {}
    for row in rows:
        newest[row.period_min] = max(row.step, newest.get(row.period_min, row.step))
    return [
        {"period_min": period_min, "last_step": last_step_gone(period_min, step)}
        for period_min, step in newest.items()
    ]
