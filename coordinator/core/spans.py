"""An attempt as spans of its trace: what a tracing system is shown when the attempt is over.

Problem: whoever looks at a pipeline in a tracing system sees the submission and what the trainer
traces of itself, and between them a gap: the queue, the fetching of a checkpoint, a node that died.
The coordinator knows all of it, with times; here it becomes spans, by a function of what is written
down and of nothing else. So a replay, or a second export after a restart, makes the same spans with
the same ids, and the ids fit the `traceparent` that the trainer was started with (`traces.py`).

Below the span of the attempt lie its phases, in the frame of `accounting.py`: *schedule*, *start*
with *restore* in it, *run*, *stop* from the request on, *detect* from the last sign of life until
it was known to be over. A phase that did not come has no span. Of a gang rank 0 has the attempt's
span, and each other rank one of its own below it. A committed checkpoint is a span without length,
made when it is committed, since few checkpoints are still known when the attempt ends.

Clocks of agents and of the coordinator differ: every time is put into the attempt's frame, so that
no span ends before it begins or lies outside its parent. Milestones become events of the phase
*run*.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from coordinator.core import accounting, traces
from coordinator.core.model import Attempt, Checkpoint, Job, JobEvent
from coordinator.core.phases import AttemptPhase

Value = str | int | float
Attributes = tuple[tuple[str, Value], ...]
FAILURES = (AttemptPhase.FAILED, AttemptPhase.LOST, AttemptPhase.REFUSED)


class SpanStatus(Enum):
    """`UNSET` is neither: an attempt that was stopped has not failed, and has not finished."""

    UNSET = "unset"
    OK = "ok"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SpanEvent:
    name: str
    unix_ms: int


@dataclass(frozen=True, slots=True)
class Span:
    """Ids are hexadecimal digits as in a traceparent; `parent_id` is empty at the root.
    `is_parent_remote`: the parent is a span of whoever submitted the job."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begin_unix_ms: int
    end_unix_ms: int
    attributes: Attributes = ()
    events: tuple[SpanEvent, ...] = ()
    status: SpanStatus = SpanStatus.UNSET
    reason: str = ""
    is_parent_remote: bool = False


@dataclass(frozen=True, slots=True)
class _Frame:
    """When an attempt's time began and ended, and what lies between, in milliseconds since 1970.
    `restored`: from when to when its node fetched a checkpoint."""

    begin: int
    assigned: int
    restored: tuple[int, int] | None
    started: int | None
    stopping: int | None
    silent: int
    end: int


def attempt_spans(job: Job, attempt: Attempt, history: Iterable[JobEvent]) -> tuple[Span, ...]:
    """Of an attempt that has ended; none where the submitter's trace is not sampled. `history` are
    lines of its job, others' among them."""
    if attempt.ended_unix_ms is None or not traces.is_sampled(job, attempt.epoch):
        return ()
    lines = [line for line in history if line.attempt == attempt.id]
    frame = _frame(attempt, lines)
    whole = _whole(job, attempt, frame)
    milestones = tuple(
        SpanEvent(line.message, _within(frame.begin, line.unix_ms, frame.end))
        for line in lines
        if line.name == "attempt.milestone"
    )
    parts = [
        Span(
            name,
            whole.trace_id,
            _own_id(job, attempt, name),
            _own_id(job, attempt, "start") if name == "restore" else whole.span_id,
            begin,
            end,
            events=milestones if name == "run" else (),
        )
        for name, begin, end in _phases(frame)
    ]
    return (whole, *parts)


def checkpoint_span(job: Job, checkpoint: Checkpoint) -> Span | None:
    """Of one that has just been committed, below its attempt."""
    epoch = checkpoint.epoch
    if not traces.is_sampled(job, epoch):
        return None
    return Span(
        "checkpoint",
        traces.trace_id(job, epoch),
        traces.span_id(job, epoch, f"checkpoint/{checkpoint.digest}"),
        traces.span_id(job, epoch),
        checkpoint.committed_unix_ms,
        checkpoint.committed_unix_ms,
        (
            ("baton.job", job.id),
            ("baton.checkpoint.step", checkpoint.step),
            ("baton.checkpoint.digest", checkpoint.digest),
            ("baton.checkpoint.size_bytes", checkpoint.size_bytes),
        ),
    )


def _frame(attempt: Attempt, lines: Sequence[JobEvent]) -> _Frame:
    times, assigned = attempt.times, attempt.assigned_unix_ms
    begin = assigned if times.queued_unix_ms is None else min(assigned, times.queued_unix_ms)
    end = max(assigned, accounting.end_unix_ms(attempt, assigned))
    silent = end if times.silent_unix_ms is None else _within(assigned, times.silent_unix_ms, end)
    started, restored = attempt.started_unix_ms, None
    if started is not None:
        started = _within(assigned, started, silent)
        until = _within(assigned, started - (times.start_ms or 0), started)
        since = _within(assigned, until - (times.restore_ms or 0), until)
        restored = (since, until) if since < until else None
    asked = [line.unix_ms for line in lines if line.name == "attempt.stopping"]
    first = assigned if started is None else started
    stopping = _within(first, asked[0], silent) if asked else None
    return _Frame(begin, assigned, restored, started, stopping, silent, end)


def _within(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))


def _phases(frame: _Frame) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each phase that came."""
    leaving = frame.silent if frame.stopping is None else frame.stopping
    yield "schedule", frame.begin, frame.assigned
    yield "start", frame.assigned, leaving if frame.started is None else frame.started
    if frame.restored is not None:
        yield "restore", *frame.restored
    if frame.started is not None:
        yield "run", frame.started, leaving
    if frame.stopping is not None:
        yield "stop", frame.stopping, frame.silent
    if frame.silent < frame.end:
        yield "detect", frame.silent, frame.end


def _own_id(job: Job, attempt: Attempt, phase: str = "") -> str:
    """Rank 0 has the span that the trainers' own spans hang below."""
    if attempt.rank == 0 and not phase:
        return traces.span_id(job, attempt.epoch)
    return traces.span_id(job, attempt.epoch, f"rank/{attempt.rank}/{phase}")


def _whole(job: Job, attempt: Attempt, frame: _Frame) -> Span:
    remote = traces.parent_span_id(job)
    status = SpanStatus.ERROR if attempt.phase in FAILURES else SpanStatus.UNSET
    return Span(
        "attempt" if attempt.rank == 0 else "rank",
        traces.trace_id(job, attempt.epoch),
        _own_id(job, attempt),
        remote if attempt.rank == 0 else traces.span_id(job, attempt.epoch),
        frame.begin,
        frame.end,
        _attributes(job, attempt),
        status=SpanStatus.OK if attempt.phase is AttemptPhase.SUCCEEDED else status,
        reason=attempt.reason if status is SpanStatus.ERROR else "",
        is_parent_remote=attempt.rank == 0 and bool(remote),
    )


def _attributes(job: Job, attempt: Attempt) -> Attributes:
    """What is unknown is left out. The environment and the command may hold secrets."""
    known: list[tuple[str, Value | None]] = [
        ("baton.job", job.id),
        ("baton.job.name", job.spec.name or None),
        ("baton.job.project", job.spec.project),
        ("baton.job.class", job.spec.job_class.value),
        ("baton.attempt", attempt.id),
        ("baton.attempt.epoch", attempt.epoch),
        ("baton.attempt.rank", attempt.rank if attempt.ranks > 1 else None),
        ("baton.attempt.outcome", attempt.phase.value),
        ("baton.attempt.reason", attempt.reason or None),
        ("baton.attempt.exit_code", attempt.exit_code),
        ("baton.attempt.signal", attempt.signal),
        ("baton.attempt.commits", attempt.commits),
        ("baton.attempt.restored_step", attempt.restored_step),
        ("baton.attempt.step", attempt.times.step),
        ("baton.node", attempt.node),
        ("baton.gpus", len(attempt.gpu_uuids)),
    ]
    account = accounting.account(attempt, None, attempt.assigned_unix_ms)
    known += [(f"baton.time.{part}", getattr(account, part)) for part in accounting.PARTS]
    return tuple((name, value) for name, value in known if value is not None)
