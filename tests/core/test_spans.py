"""An attempt as spans: the phases that came, in the attempt's frame, below the right parents."""

from dataclasses import replace

import pytest

from coordinator.core import traces
from coordinator.core.model import Attempt, AttemptTimes, Checkpoint, Job, JobEvent, JobSpec
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.spans import (
    Span,
    SpanEvent,
    SpanStatus,
    attempt_spans,
    checkpoint_span,
)

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
JOB = Job(7, JobSpec(command=("train",)), JobPhase.ACTIVE, 1_000, request_id="r")
ATTEMPT = Attempt(
    7, 2, "n1", ("GPU-1",), AttemptPhase.SUCCEEDED, 2_000,
    started_unix_ms=5_000, ended_unix_ms=9_000, exit_code=0, commits=3,
    times=AttemptTimes(queued_unix_ms=1_000, silent_unix_ms=8_900, restore_ms=1_500, start_ms=500),
)  # fmt: skip
STOPPING = JobEvent(7, 5, 7_000, "attempt.stopping", attempt="7.2")


def continuing(flags: str) -> Job:
    environment = (("TRACEPARENT", f"00-{TRACE}-{CALLER}-{flags}"),)
    return replace(JOB, spec=replace(JOB.spec, environment=environment))


def times(spans: tuple[Span, ...]) -> dict[str, tuple[int, int]]:
    return {span.name: (span.begin_unix_ms, span.end_unix_ms) for span in spans}


def test_phases_follow_one_another_in_the_attempts_frame() -> None:
    assert times(attempt_spans(JOB, ATTEMPT, [STOPPING])) == {
        "attempt": (1_000, 9_000),
        "schedule": (1_000, 2_000),
        "start": (2_000, 5_000),
        "restore": (3_000, 4_500),
        "run": (5_000, 7_000),
        "stop": (7_000, 8_900),
        "detect": (8_900, 9_000),
    }


def test_what_did_not_come_has_no_span() -> None:
    refused = replace(
        ATTEMPT, phase=AttemptPhase.REFUSED, started_unix_ms=None, reason="no room",
        times=AttemptTimes(),
    )  # fmt: skip
    spans = attempt_spans(JOB, refused, [])
    assert times(spans) == {
        "attempt": (2_000, 9_000),
        "schedule": (2_000, 2_000),
        "start": (2_000, 9_000),
    }
    assert (spans[0].status, spans[0].reason) == (SpanStatus.ERROR, "no room")
    assert attempt_spans(JOB, replace(ATTEMPT, ended_unix_ms=None), []) == ()


def test_parents() -> None:
    """The trainer's spans hang below the attempt's, which hangs below whoever submitted the job."""
    job = continuing("01")
    spans = {span.name: span for span in attempt_spans(job, ATTEMPT, [])}
    whole = spans["attempt"]
    assert f"00-{whole.trace_id}-{whole.span_id}-01" == traces.traceparent(job, 2)
    assert (whole.trace_id, whole.parent_id, whole.is_parent_remote) == (TRACE, CALLER, True)
    assert spans["restore"].parent_id == spans["start"].span_id
    assert {
        span.parent_id for name, span in spans.items() if name not in ("attempt", "restore")
    } == {whole.span_id}
    assert len({span.span_id for span in spans.values()}) == len(spans)
    alone = attempt_spans(JOB, ATTEMPT, [])[0]
    assert (alone.parent_id, alone.is_parent_remote) == ("", False)


def test_ranks_hang_below_the_first() -> None:
    first, second = (
        attempt_spans(JOB, replace(ATTEMPT, rank=rank, ranks=2), []) for rank in range(2)
    )
    assert (first[0].name, second[0].name) == ("attempt", "rank")
    assert second[0].parent_id == first[0].span_id
    assert second[1].parent_id == second[0].span_id
    ids = [span.span_id for span in (*first, *second)]
    assert len(ids) == len({*ids})


def test_who_does_not_want_spans_gets_none() -> None:
    checkpoint = Checkpoint(7, "ab", "", 2, 40, 100, ("n1",), 6_000)
    assert attempt_spans(continuing("00"), ATTEMPT, []) == ()
    assert checkpoint_span(continuing("00"), checkpoint) is None


def test_a_checkpoint_lies_below_its_attempt() -> None:
    made = checkpoint_span(JOB, Checkpoint(7, "ab", "", 2, 40, 100, ("n1",), 6_000))
    assert made is not None
    assert made.parent_id == attempt_spans(JOB, ATTEMPT, [])[0].span_id
    assert (made.begin_unix_ms, made.end_unix_ms) == (6_000, 6_000)
    assert ("baton.checkpoint.step", 40) in made.attributes


@pytest.mark.parametrize(
    ("phase", "status"),
    [
        (AttemptPhase.SUCCEEDED, SpanStatus.OK),
        (AttemptPhase.FAILED, SpanStatus.ERROR),
        (AttemptPhase.LOST, SpanStatus.ERROR),
        (AttemptPhase.YIELDED, SpanStatus.UNSET),
        (AttemptPhase.CANCELLED, SpanStatus.UNSET),
    ],
)
def test_status(phase: AttemptPhase, status: SpanStatus) -> None:
    whole = attempt_spans(JOB, replace(ATTEMPT, phase=phase), [])[0]
    assert whole.status is status
    assert ("baton.attempt.outcome", phase.value) in whole.attributes


def test_clocks_that_disagree_turn_no_span_round() -> None:
    """An agent whose clock is an hour off, either way."""
    for off_ms in (-3_600_000, 3_600_000):
        wrong = replace(
            ATTEMPT, started_unix_ms=5_000 + off_ms,
            times=replace(ATTEMPT.times, silent_unix_ms=8_900 + off_ms),
        )  # fmt: skip
        lines = [
            replace(STOPPING, unix_ms=7_000 + off_ms),
            JobEvent(7, 4, 6_000 + off_ms, "attempt.milestone", attempt="7.2", message="load"),
        ]
        whole, *parts = attempt_spans(JOB, wrong, lines)
        for part in parts:
            assert whole.begin_unix_ms <= part.begin_unix_ms <= part.end_unix_ms
            assert part.end_unix_ms <= whole.end_unix_ms


def test_milestones_are_the_attempts_own() -> None:
    lines = [
        JobEvent(7, 3, 4_000, "attempt.milestone", attempt="7.1", message="other"),
        JobEvent(7, 4, 6_000, "attempt.milestone", attempt="7.2", message="load"),
    ]
    (run,) = (span for span in attempt_spans(JOB, ATTEMPT, lines) if span.name == "run")
    assert run.events == (SpanEvent("load", 6_000),)
    assert attempt_spans(JOB, ATTEMPT, lines) == attempt_spans(JOB, ATTEMPT, lines)
