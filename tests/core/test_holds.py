"""Who held GPUs: a job is one life whatever moved it, and what is not known any more is said."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.core import holds, jobs
from coordinator.core.demand_history import DAY_MS, MINUTE_MS, OTHER, Series
from coordinator.core.demand_messages import DemandSeries, GetDemand, Hold, Holds
from coordinator.core.messages import CancelJob, Reply, Request
from coordinator.core.model import (
    Attempt,
    AttemptTimes,
    GpuFacts,
    HostFacts,
    Job,
    JobClass,
    JobSpec,
    Node,
    Snapshot,
)
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Instant, Options, State
from tests.core.training_fleet import Fleet

BEGIN = 20_000 * DAY_MS
NOW_MIN = 1_000.0
GIB = 1024**3
ALL = Series()
NODES = {"a": "NVIDIA H100 80GB HBM3", "b": "NVIDIA H100 80GB HBM3", "old": "NVIDIA A100-SXM4-80GB"}


def ms(minutes: float) -> int:
    return BEGIN + round(minutes * MINUTE_MS)


def job(job_id: int, end_min: float | None = None, **spec: Any) -> Job:
    phase = JobPhase.ACTIVE if end_min is None else JobPhase.SUCCEEDED
    ended = None if end_min is None else ms(end_min)
    return Job(job_id, JobSpec(**{"gpus": 1} | spec), phase, BEGIN, ended_unix_ms=ended)


def attempt(
    job_id: int, epoch: int, node: str, begin_min: float, end_min: float | None, **more: Any
) -> Attempt:
    """Its job has waited for it for a minute."""
    end = None if end_min is None else ms(end_min)
    phase = AttemptPhase.RUNNING if end is None else AttemptPhase.LOST
    gpus = tuple(f"{node}/{index}" for index in range(more.pop("gpus", 1)))
    times = AttemptTimes(queued_unix_ms=ms(begin_min - 1))
    begin = ms(begin_min)
    return Attempt(job_id, epoch, node, gpus, phase, begin, begin, end, times=times, **more)


def state_of(known: Iterable[Job], attempts: Iterable[Attempt], **more: Any) -> State:
    state = State(Options(**more))
    nodes = []
    for name, gpu_type in NODES.items():
        gpus = tuple(GpuFacts(f"{name}/{index}", gpu_type, 80 * GIB) for index in range(8))
        nodes.append(Node(name, "j", "a:1", HostFacts(), gpus, forgotten=name == "old"))
    ids = tuple(known)
    last = max((one.id for one in ids), default=0)
    snapshot = Snapshot(jobs=ids, attempts=tuple(attempts), nodes=tuple(nodes), last_job_id=last)
    state.load(snapshot, 0)
    return state


def read(state: State, which: Series = ALL) -> Holds:
    found = holds.read(state, Instant(0, ms(NOW_MIN)), which, BEGIN)
    assert found is not None
    return found


def test_who_runs_comes_first_then_who_ended_last() -> None:
    state = state_of(
        [job(1, 50), job(2, 90), job(3), job(4, 10)],
        [
            attempt(1, 1, "a", -30, 50, gpus=2),
            attempt(2, 1, "a", 20, 90),
            attempt(3, 1, "a", 40, None, gpus=4),
        ],
    )  # the fourth was cancelled before it had begun
    assert read(state) == Holds((Hold(4, 40), Hold(1, 20, 90), Hold(2, -30, 50)))


def test_a_job_that_is_handed_over_is_one_life_and_waits_in_between() -> None:
    """Its node is lost, it goes on elsewhere on more GPUs, is preempted, and waits."""
    first = attempt(1, 1, "b", 0, 300)
    lost = replace(first, times=replace(first.times, over_unix_ms=ms(100)))
    second = attempt(1, 2, "a", 101, 200, gpus=2)
    waits = replace(job(1), phase=JobPhase.QUEUED)
    assert read(state_of([waits], [lost, second])).each == (Hold(2, 0),)
    cancelled = replace(job(1, 250), phase=JobPhase.CANCELLED)
    assert read(state_of([cancelled], [lost, second])).each == (Hold(2, 0, 250),)


def test_one_that_had_ended_and_goes_on_lives_again_and_one_that_is_held_has_left() -> None:
    twice = [attempt(1, 1, "a", 0, 100), attempt(1, 2, "a", 200, None)]
    assert read(state_of([job(1)], twice)).each == (Hold(1, 0, 100), Hold(1, 200))
    left = [attempt(1, 1, "a", 0, 100)]
    held = replace(job(1), phase=JobPhase.HELD)
    assert read(state_of([held], left)).each == (Hold(1, 0, 100),)


def test_ranks_are_one_job_and_a_share_is_a_part() -> None:
    ranks = [
        attempt(1, 1, node, at, None, gpus=4, rank=rank, ranks=2)
        for rank, (node, at) in enumerate((("a", 5), ("b", 6)))
    ]
    share = job(2, shared_gpu_memory_bytes=20 * GIB)
    state = state_of([job(1, gpus=4, ranks=2), share], [*ranks, attempt(2, 1, "a", 9, None)])
    whole, part = read(state).each
    assert whole == Hold(8, 5)
    assert part.gpus == pytest.approx(0.25, abs=0.03)


def test_what_is_asked_for_is_what_is_told() -> None:
    """What ran on a node that was forgotten is still of its type."""
    state = state_of(
        [job(1, 50), job(2, project="nlp"), job(3, job_class=JobClass.SPARE)],
        [attempt(1, 1, "old", 0, 50), attempt(2, 1, "a", 1, None), attempt(3, 1, "a", 2, None)],
    )
    for which, told in (
        (Series("A100 80GB"), Hold(1, 0, 50)),
        (Series(project="nlp"), Hold(1, 1)),
        (Series("H100", job_class="spare"), Hold(1, 2)),
    ):
        assert read(state, which).each == (told,)
    assert holds.read(state, Instant(0, ms(NOW_MIN)), Series(project=OTHER), BEGIN) is None


def test_of_who_ended_before_the_oldest_that_is_kept_not_all_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = [job(number, 10 * number) for number in range(1, 6)]
    attempts = [attempt(number, 1, "a", 1, 10 * number) for number in range(1, 6)]
    state = state_of(known, attempts, jobs_kept=4)
    assert read(state).since_min is None
    jobs._forget_oldest(state, 2)
    assert [hold.end_min for hold in read(state).each] == [50, 40, 30]
    assert read(state).since_min == 30


def test_no_more_than_so_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "ATTEMPTS_MAX", 2)
    attempts = [attempt(number, 1, "a", 1, 10 * number) for number in range(1, 5)]
    ended = state_of([job(number, 10 * number) for number in range(1, 5)], attempts)
    assert read(ended) == Holds((Hold(1, 1, 40), Hold(1, 1, 30)), since_min=20)
    run = [attempt(number, 1, "a", number, None) for number in range(1, 5)]
    assert read(state_of(map(job, range(1, 5)), run)).since_min == NOW_MIN


def test_an_answer_has_them_where_they_are_asked_for() -> None:
    """Of three GPUs two begin, then the third; the first two are left for a job that waits."""
    fleet = Fleet("3xH100")
    fleet.submit(gpus=2)
    fleet.run(60)
    fleet.submit(gpus=1)
    fleet.submit(gpus=2)
    fleet.run(60)
    fleet.rig.handle(Request(1, CancelJob(1)))
    fleet.run(60)
    answers = {}
    for asked in (True, False):
        question = Request(2, GetDemand("h100", period_min=1, holds=asked))
        (reply,) = (one for one in fleet.rig.handle(question) if isinstance(one, Reply))
        assert isinstance(reply.answer, DemandSeries)
        answers[asked] = reply.answer
    assert answers[False].holds is None
    told = answers[True].holds
    assert told is not None
    assert told.since_min is None
    spans = [(hold.gpus, hold.end_min and hold.end_min - hold.begin_min) for hold in told.each]
    assert spans == [(1, None), (2, None), (2, pytest.approx(2, abs=0.1))]
    assert told.each[2].begin_min < told.each[0].begin_min < told.each[1].begin_min
    still_there = sum(hold.gpus for hold in told.each if hold.end_min is None)
    assert still_there == answers[True].held_gpus


def test_minutes_are_those_of_the_series() -> None:
    """A demonstration's are shorter."""
    state = state_of([job(1)], [attempt(1, 1, "a", 3, None)], demand_minute_ms=MINUTE_MS // 60)
    assert read(state).each == (Hold(1, 180),)
