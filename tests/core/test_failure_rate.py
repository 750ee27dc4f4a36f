"""How often things fail: what counts, once for each failure, and who is told."""

from dataclasses import replace

import pytest

from coordinator.core import messages as m
from coordinator.core.failure_rate import DAY_MS, FAILURES_MAX, JOBS_MAX, VARIABLE, FailureRate
from coordinator.core.model import Attempt, HostFacts, JobSpec
from coordinator.core.phases import AttemptPhase
from tests.core.coordinator_harness import UNIX_MS_AT_START, Rig

HOUR_MS = 3_600_000
HOUR_S, DAY_S = HOUR_MS / 1000, DAY_MS / 1000
RUNNING = Attempt(7, 1, "n1", (), AttemptPhase.RUNNING, 0, started_unix_ms=1_000)
ENDED = replace(RUNNING, phase=AttemptPhase.LOST, ended_unix_ms=1_000 + HOUR_MS)
FAILED = replace(ENDED, phase=AttemptPhase.FAILED)


def mean_s(rate: FailureRate) -> float:
    found = rate.mean_time_s(1)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("ended", "counts"),
    [
        (ENDED, True),
        (replace(FAILED, signal=9), True),
        (replace(FAILED, exit_code=137), True),
        (replace(FAILED, exit_code=1, commits=1), True),
        (replace(FAILED, exit_code=1), False),
        (replace(ENDED, stop_reason="n1 is drained"), False),
        (replace(ENDED, phase=AttemptPhase.SUCCEEDED, exit_code=0), False),
        (replace(ENDED, phase=AttemptPhase.YIELDED, exit_code=75), False),
    ],
)
def test_what_is_a_failure(ended: Attempt, counts: bool) -> None:
    rate = FailureRate()
    rate.note(RUNNING, ended)
    rate.note(ended, replace(ended, reason="told twice"))
    assert (rate.run_ms, rate.failures) == (HOUR_MS, counts)


def test_what_never_started_says_nothing() -> None:
    rate = FailureRate()
    rate.note(None, replace(ENDED, started_unix_ms=None))
    rate.note(None, RUNNING)
    assert (rate.run_ms, rate.failures) == (0, 0)


def test_a_gang_fails_once_and_all_its_ranks_have_run() -> None:
    rate = FailureRate()
    for epoch in (1, 2):
        for rank in range(4):
            rate.note(None, replace(ENDED, epoch=epoch, rank=rank, ranks=4))
    assert (rate.run_ms, rate.failures) == (8 * HOUR_MS, 2)
    alone_s = (DAY_S + 8 * 3_600) / 3
    assert mean_s(rate) == pytest.approx(alone_s)
    assert rate.mean_time_s(4) == pytest.approx(alone_s / 4), "four can fail"


def test_little_is_believed_at_first_and_what_is_long_ago_counts_less() -> None:
    rate = FailureRate()
    assert rate.mean_time_s(1) is None
    for job_id in range(3 * JOBS_MAX):
        rate.note(None, replace(ENDED, job_id=job_id))
        assert HOUR_S < mean_s(rate) < DAY_S
        assert rate.failures <= FAILURES_MAX
        assert len(rate._failed) <= JOBS_MAX
    assert mean_s(rate) < 1.5 * HOUR_S
    for job_id in range(FAILURES_MAX):
        rate.note(None, replace(ENDED, job_id=job_id, ended_unix_ms=100 * HOUR_MS))
    assert mean_s(rate) > 50 * HOUR_S, "it was mended"


def test_a_fleet_where_nothing_fails_says_so_after_a_day() -> None:
    rate = FailureRate()
    done = replace(ENDED, phase=AttemptPhase.SUCCEEDED, ended_unix_ms=1_000 + DAY_MS)
    rate.note(None, done)
    assert rate.mean_time_s(1) == 2 * DAY_S


def test_who_starts_after_a_failure_is_told_also_by_a_restarted_coordinator() -> None:
    rig = Rig()
    hello = m.Hello("n1", "j", "", HostFacts(cpu_count=4), ())
    rig.handle(m.FromAgent(1, hello))
    sequence = 0

    def say(attempt: str, body: m.AgentEventBody) -> None:
        nonlocal sequence
        sequence += 1
        unix_ms = UNIX_MS_AT_START + rig.now_ms
        rig.handle(m.FromAgent(1, m.AgentEvent(sequence, unix_ms, attempt, body)))

    def told(spec: JobSpec) -> str | None:
        effects = rig.handle(m.Request(1, m.Submit(spec)))
        (order,) = [
            effect.order
            for effect in effects
            if isinstance(effect, m.Send) and isinstance(effect.order, m.StartAttempt)
        ]
        environment = dict(order.spec.environment)
        assert environment["A"] == "b"
        assert len(environment) == len(order.spec.environment)
        return environment.get(VARIABLE)

    spec = JobSpec(command=("train",), environment=(("A", "b"),), max_restarts=0)
    assert told(spec) is None
    say("1.1", m.AttemptStarted(7))
    rig.now_ms += HOUR_MS
    say("1.1", m.AttemptExited(None, signal=9))
    expected = f"{(DAY_S + 3_600) / 2:.0f}"
    assert told(spec) == expected
    rig.restart()
    rig.handle(m.FromAgent(1, hello))
    assert told(spec) == expected
