"""A coordinator's records as a trace: what was measured, estimated, and left out."""

from dataclasses import replace

import pytest

from coordinator.core.model import (
    Attempt,
    AttemptTimes,
    GpuCordon,
    GpuFacts,
    HostFacts,
    Job,
    JobClass,
    JobSpec,
    Node,
    Snapshot,
    TrainerTime,
)
from coordinator.core.phases import AttemptPhase, JobPhase, NodeIntent
from coordinator.sim import checks
from coordinator.sim.engine import simulate
from coordinator.sim.journal import Recorded, recorded
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Fifo
from coordinator.solver import solve

GIB = 1024**3
T0 = 1_700_000_000_000
H100, RTX = "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"
A, B = ("a0",), ("b0",)


def node(name: str, count: int, gpu: str, memory_gib: int, **more: object) -> Node:
    facts = tuple(GpuFacts(f"{name}{i}", gpu, memory_gib * GIB) for i in range(count))
    made = Node(name, f"journal-{name}", "", HostFacts(), facts)
    return replace(made, **more)  # type: ignore[arg-type]


NODES = (node("a", 2, H100, 80), node("b", 4, RTX, 24))


def spec(**more: object) -> JobSpec:
    return replace(JobSpec(command=("train",), gpus=1), **more)  # type: ignore[arg-type]


def job(job_id: int, phase: JobPhase, at_s: float = 0, asks: JobSpec | None = None) -> Job:
    return Job(job_id, asks or spec(), phase, T0 + round(at_s * 1000))


def attempt(
    job_id: int, uuids: tuple[str, ...], begin_s: float, train_s: float, **times: object
) -> Attempt:
    """It trained for so long from `begin_s` on, and ended."""
    begin = T0 + round(begin_s * 1000)
    told = AttemptTimes(ready_ms=0, speaks=True, trainer=TrainerTime(step_s=train_s))
    return Attempt(
        job_id, 1, uuids[0][0], uuids, AttemptPhase.SUCCEEDED, begin, begin,
        begin + round(train_s * 1000), times=replace(told, **times),  # type: ignore[arg-type]
    )  # fmt: skip


def read(*pairs: tuple[Job, list[Attempt]], nodes: tuple[Node, ...] = NODES) -> Recorded:
    jobs = tuple(pair[0] for pair in pairs)
    attempts = tuple(each for pair in pairs for each in pair[1])
    return recorded(Snapshot(jobs=jobs, attempts=attempts, nodes=nodes))


def done(job_id: int = 1, at_s: float = 0, asks: JobSpec | None = None) -> Job:
    return job(job_id, JobPhase.SUCCEEDED, at_s, asks)


def test_a_job_that_tells_its_steps_has_their_rate() -> None:
    asks = spec(project="vision", job_class=JobClass.GUARANTEED, name="resnet")
    seen = read((done(asks=asks), [attempt(1, A, 10, 1000, step=5000)]))
    (one,) = seen.jobs
    assert one.steps == 5000
    assert one.rates["H100"] == pytest.approx(5.0)
    assert 0.5 < one.rates["RTX 4090"] < 4.0, "estimated by facts from what it did elsewhere"
    assert (one.project, one.rank, one.model, one.arrival_ms) == ("vision", 0, "resnet", 0)
    assert (seen.measured, seen.guessed, seen.typical) == (1, 1, 0)
    assert seen.fleet.gpus == {"H100": 2, "RTX 4090": 4}
    assert seen.fleet.prices_per_h == {"H100": 3.99, "RTX 4090": 0.29}


def test_a_program_that_tells_nothing_takes_as_long_as_it_took() -> None:
    """On the type where it trained most; the rest is converted."""
    silent = {"trainer": None, "speaks": False}
    first = attempt(1, A, 0, 900, **silent)
    second = replace(attempt(1, B, 2000, 300, **silent), epoch=2)
    (one,) = read((done(), [first, second])).jobs
    assert one.rates["H100"] == pytest.approx(1.0)
    assert one.steps == pytest.approx(900 + 300 * one.rates["RTX 4090"])


def test_what_was_made_twice_counts_once() -> None:
    """The second attempt begins at step 2000, where the first had reached 3000."""
    first = replace(attempt(1, A, 0, 300, step=3000), phase=AttemptPhase.LOST)
    second = replace(
        attempt(1, A, 400, 400, step=6000, reached_step=3000),
        epoch=2, restored_step=2000, restored_digest="d",
    )  # fmt: skip
    (one,) = read((done(), [first, second])).jobs
    assert one.steps == 6000
    assert one.rates["H100"] == pytest.approx(10.0)


def test_who_still_waits_is_taken_to_be_as_long_as_its_project_s() -> None:
    ended = [(done(n), [attempt(n, B, 0, s)]) for n, s in ((1, 100), (2, 700), (3, 900))]
    waits: tuple[Job, list[Attempt]] = (job(4, JobPhase.QUEUED, 50), [])
    (one,) = (each for each in read(*ended, waits).jobs if each.job_id == 4)
    seconds = {name: one.steps / rate for name, rate in one.rates.items()}
    assert seconds["H100"] < 700 < seconds["RTX 4090"] * 1.01
    assert read(*ended, waits).typical == 1


def test_a_job_that_runs_has_at_least_what_it_has_had() -> None:
    running = replace(
        attempt(2, A, 0, 5000), phase=AttemptPhase.RUNNING, ended_unix_ms=None,
    )  # fmt: skip
    short = (done(1), [attempt(1, A, 0, 10)])
    later = (done(3, 4990), [attempt(3, B, 4990, 10)])
    one = read(short, (job(2, JobPhase.ACTIVE), [running]), later).jobs[1]
    assert one.job_id == 2
    assert one.steps / one.rates["H100"] == pytest.approx(5000, rel=0.01)


def test_a_restart_takes_what_it_took() -> None:
    again = replace(
        attempt(1, A, 0, 100, restore_ms=20_000, start_ms=10_000),
        restored_digest="d", ended_unix_ms=T0 + 130_000,
    )  # fmt: skip
    plain = (done(2, 5), [attempt(2, B, 5, 100)])
    seen = read((done(), [again]), plain)
    assert [each.restart_s for each in seen.jobs] == [30, 30], "the fleet's where it has none"


def test_a_deadline_counts_from_where_the_journal_begins() -> None:
    due = done(2, 30, asks=spec(deadline_unix_ms=T0 + 500_000))
    seen = read((done(), [attempt(1, A, 0, 100)]), (due, [attempt(2, B, 30, 100)]))
    ours = [(each.arrival_ms, each.deadline_ms) for each in seen.jobs]
    assert ours == [(0, None), (30_000, 500_000)]


def test_what_cannot_be_simulated_is_counted() -> None:
    seen = read(
        (done(1), [attempt(1, A, 0, 100)]),
        (done(2, asks=spec(gpus=0)), []),
        (job(3, JobPhase.CANCELLED), []),
        (job(4, JobPhase.HELD), []),
        (job(5, JobPhase.QUEUED, asks=spec(gpus=64)), []),
        (job(6, JobPhase.QUEUED, asks=spec(gpu_types=("B200",))), []),
    )
    assert [each.job_id for each in seen.jobs] == [1]
    left_out = {"ask for no GPU": 1, "never trained": 2, "fit no GPU of the fleet": 2}
    assert dict(seen.left_out) == left_out


def test_a_gang_is_all_of_its_gpus_and_asks_for_what_it_asked() -> None:
    asks = spec(gpus=2, ranks=2, gpu_memory_bytes_min=20 * GIB, gpu_types=("4090", "H100"))
    (one,) = read((done(asks=asks), [attempt(1, ("b0", "b1"), 0, 100, step=50)])).jobs
    assert one.gpus == 4
    asks = replace(asks, gpu_memory_bytes_min=40 * GIB)
    assert read((done(asks=asks), [])).jobs == []


def test_what_takes_no_work_is_not_of_the_fleet() -> None:
    cordon = GpuCordon("a0", "ill", T0)
    nodes = (
        replace(NODES[0], gpu_cordons=(cordon,)),
        replace(NODES[1], intent=NodeIntent.CORDONED),
        replace(node("c", 8, H100, 80), intent=NodeIntent.DRAINED),
    )
    seen = read((done(), [attempt(1, A, 0, 100, step=50)]), nodes=nodes)
    assert seen.fleet.gpus == {"H100": 1, "RTX 4090": 4}
    assert seen.jobs[0].rates["H100"] == pytest.approx(0.5), "what the ill one did counts"


def test_what_it_makes_of_records_can_be_simulated_and_is_the_same_again() -> None:
    pairs = [
        (done(n, n * 40), [attempt(n, (A, B)[n % 2], n * 40, 200 + n * 50, step=n * 1000)])
        for n in range(1, 30)
    ]
    seen = read(*pairs)
    assert seen == read(*pairs)
    known = {each.job_id: each for each in seen.jobs}
    for policy in (Fifo(), Ours(solve=solve)):
        outcome = simulate(seen.jobs, seen.fleet, policy)
        assert checks.check_work(outcome, known) == []
        assert checks.check_completions(outcome, known) == []


def test_nothing_at_all_is_nothing() -> None:
    assert recorded(Snapshot()).jobs == []


def test_who_says_how_many_steps_there_are_is_as_long_as_that() -> None:
    """Whether it still runs, or waits for its next attempt; who has ended did what it did."""
    told = attempt(1, A, 0, 100, step=1_000, total_steps=50_000)
    open_, ended = (
        read((job(1, phase), [told])).jobs[0] for phase in (JobPhase.QUEUED, JobPhase.SUCCEEDED)
    )
    assert (open_.steps, ended.steps) == (50_000, 1_000)
    assert read((job(1, JobPhase.QUEUED), [told])).typical == 0


def test_a_trial_that_its_arrays_limit_held_back_comes_when_it_began() -> None:
    """Of four at two a time: the first two came with the array, the third began when one of them
    had ended, and the fourth has not begun when the records end."""
    phases = [JobPhase.SUCCEEDED] * 3 + [JobPhase.QUEUED]
    trials = [
        replace(job(n, phase, 100, spec(array="0-3%2")), array_id=1, array_index=n - 1)
        for n, phase in enumerate(phases, start=1)
    ]
    runs = [[attempt(1, A, 110, 300)], [attempt(2, A, 120, 500)], [attempt(3, A, 420, 900)], []]
    seen = read(*zip(trials, runs, strict=True), (done(9, 0), [attempt(9, B, 0, 60)]))
    assert {one.job_id: one.arrival_ms for one in seen.jobs} == {
        9: 0, 1: 100_000, 2: 100_000, 3: 420_000, 4: 1_320_000,
    }  # fmt: skip
    free = [replace(one, spec=spec(array="0-3")) for one in trials]
    seen = read(*zip(free, runs, strict=True), (done(9, 0), [attempt(9, B, 0, 60)]))
    assert [one.arrival_ms for one in seen.jobs if one.job_id < 9] == [100_000] * 4
