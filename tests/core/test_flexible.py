"""Jobs that may wait: no GPU idles for them before their time, and they get no less than others."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core import flexible, validate
from coordinator.core.messages import ExplainJob, Explanation, Reply, Request, Submit, Submitted
from coordinator.core.model import Job, JobSpec
from coordinator.core.phases import JobPhase
from tests.core.test_reservations import RESERVED_MS, WAIT_MS, Stream

HOUR_MS = 3_600_000
LARGE = JobSpec(command=("x",), gpus=4)


def submit(stream: Stream, spec: JobSpec) -> int:
    effects = stream.rig.handle(Request(1, Submit(spec)))
    answer = next(effect.answer for effect in effects if isinstance(effect, Reply))
    assert isinstance(answer, Submitted)
    return answer.job_id


def explained(stream: Stream, job_id: int) -> str:
    effects = stream.rig.handle(Request(1, ExplainJob(job_id)))
    answer = next(effect.answer for effect in effects if isinstance(effect, Reply))
    assert isinstance(answer, Explanation)
    return answer.sentence


def busy(seed: int) -> Stream:
    stream = Stream(seed)
    for _ in range(60):
        stream.step()
    return stream


@pytest.mark.long
def test_liveness_no_room_is_kept_for_one_that_may_wait_until_it_has_waited() -> None:
    stream = busy(3)
    job_id = submit(stream, replace(LARGE, flexible_ms=HOUR_MS))
    since_ms = stream.rig.now_ms
    reserved_after_ms = None
    while reserved_after_ms is None and stream.rig.now_ms < since_ms + 2 * HOUR_MS:
        if stream.state.jobs[job_id].phase is not JobPhase.QUEUED:
            break
        stream.step()
        if stream.state.reservations:
            reserved_after_ms = stream.rig.now_ms - since_ms
    assert reserved_after_ms is None or reserved_after_ms >= HOUR_MS
    urgent = busy(3)
    submit(urgent, LARGE)
    for _ in range((WAIT_MS + RESERVED_MS) // 5_000):
        urgent.step()
        if urgent.state.reservations:
            break
    assert urgent.state.reservations, "else the test says nothing"


def test_it_starts_at_once_where_there_is_room() -> None:
    stream = Stream(1)
    job_id = submit(stream, replace(LARGE, flexible_ms=HOUR_MS))
    assert stream.state.jobs[job_id].phase is JobPhase.ACTIVE


def test_whoever_asks_is_told_how_long_it_may_wait() -> None:
    stream = busy(3)
    job_id = submit(stream, replace(LARGE, flexible_ms=HOUR_MS))
    assert "; by its own wish it may wait for 60 min more, until " in explained(stream, job_id)
    assert "may wait" not in explained(stream, submit(stream, LARGE))


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(-(10**9), 10**9))
def test_what_is_left_falls_and_never_exceeds_what_was_said(
    said_ms: int, since_ms: int, passed_ms: int
) -> None:
    job = Job(1, JobSpec(flexible_ms=said_ms), JobPhase.QUEUED, 0, queued_unix_ms=since_ms)
    left = flexible.left_ms(job, since_ms + passed_ms)
    assert 0 <= left <= said_ms
    assert left == max(0, said_ms - max(0, passed_ms))


@pytest.mark.parametrize("wrong_ms", [-1, validate.FLEXIBLE_MS_MAX + 1])
def test_a_wait_that_cannot_be_is_refused(wrong_ms: int) -> None:
    assert "flexible is" in validate.refuse_spec(replace(LARGE, flexible_ms=wrong_ms))


def test_a_job_without_gpus_is_told_that_it_means_nothing() -> None:
    found = validate.refuse_spec(replace(LARGE, gpus=0, ranks=1, flexible_ms=HOUR_MS))
    assert found == "nothing is kept or rented for a job without GPUs; leave flexible out"
