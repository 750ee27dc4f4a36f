"""The trace of an attempt: W3C's form, the caller's trace continued, the same in a replay."""

import re
from dataclasses import replace

import pytest

from coordinator.core import traces
from coordinator.core.model import Job, JobSpec
from coordinator.core.phases import JobPhase

GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
FORM = r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})"


def job_with(**changed: object) -> Job:
    job = Job(1, JobSpec(command=("train",)), JobPhase.ACTIVE, 1_790_000_000_000, request_id="r")
    return replace(job, **changed)  # type: ignore[arg-type]


def in_trace(value: str) -> Job:
    return job_with(
        spec=JobSpec(command=("train",), environment=(("A", "b"), ("TRACEPARENT", value)))
    )


def parts(job: Job, epoch: int) -> tuple[str, ...]:
    match = re.fullmatch(FORM, traces.traceparent(job, epoch))
    assert match is not None
    assert match[1] == traces.trace_id(job, epoch)
    return match.groups()


def test_each_attempt_has_a_trace_of_its_own_and_a_replay_the_same() -> None:
    assert parts(job_with(), 1) == parts(job_with(), 1)
    others = [
        parts(job_with(), 2),
        parts(job_with(id=2), 1),
        parts(job_with(request_id="another fleet's"), 1),
    ]
    one = parts(job_with(), 1)
    for index in (0, 1):
        assert len({one[index], *(other[index] for other in others)}) == 4
    assert one[2] == "01"


def test_a_trace_that_the_job_names_goes_on() -> None:
    first, second = parts(in_trace(GIVEN), 1), parts(in_trace(GIVEN), 2)
    assert first[0] == second[0] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert len({first[1], second[1], "00f067aa0ba902b7"}) == 3  # spans of their own, below it
    assert first[2] == "00"  # whoever does not sample decides for all below


@pytest.mark.parametrize(
    "value",
    [
        "",
        "none",
        GIVEN.upper(),
        f"{GIVEN}-more",
        GIVEN.replace("00-4", "ff-4"),
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
    ],
)
def test_what_is_no_traceparent_is_not_continued(value: str) -> None:
    assert not traces.is_traceparent(value)
    assert parts(in_trace(value), 1) == parts(job_with(), 1)
