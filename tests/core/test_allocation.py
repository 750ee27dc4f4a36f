"""Which type of GPU a job gets, and who waits: properties over drawn fleets, and cases known by
hand.

Both ways are tested, the core's greedy and the production solver behind it: what must hold may not
depend on what a solver returns.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import allocation
from coordinator.core.allocation import (
    Aims,
    Allocation,
    Columns,
    Contender,
    Option,
    Solve,
    Solved,
    allocate,
)
from coordinator.core.backlog import at_prices
from coordinator.core.horizon import Horizon
from coordinator.solver import solve

NOW_MS = 100 * 3_600_000
H_MS = 3_600_000
AIMS = Aims()
TYPES = ("H100", "A100", "K80")
ROOT = Path(__file__).resolve().parents[2]

both_ways = pytest.mark.parametrize("solver", [None, solve], ids=["greedy", "solver"])


def job(job_id: int, rates: str, gpus: int = 1, hours: float = 1.0, **more: object) -> Contender:
    """A job with rates "H100:4 K80:1" that needs so many hours on its best GPUs."""
    pairs = [pair.split(":") for pair in rates.split()]
    options = tuple(Option(name, gpus, float(rate)) for name, rate in pairs)
    steps = hours * 3600 * max(option.rate for option in options)
    made = Contender(job_id=job_id, options=options, steps_left=steps, submitted_ms=NOW_MS)
    return replace(made, **more)  # type: ignore[arg-type]


def decide(
    jobs: list[Contender], capacity: dict[str, int], solver: Solve | None, aims: Aims = AIMS
) -> Allocation:
    return allocate(jobs, capacity, NOW_MS, aims, solve=solver)


def where(allocation: Allocation) -> dict[int, str]:
    return {job_id: grant.option.gpu_type for job_id, grant in sorted(allocation.grants.items())}


@st.composite
def contenders(draw: st.DrawFn) -> Contender:
    gpus = draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    names = draw(st.lists(st.sampled_from(TYPES), unique=True, max_size=3))
    rates = [draw(st.floats(0.01, 100)) for _ in names]
    options = tuple(Option(name, gpus, rate) for name, rate in zip(names, rates, strict=True))
    since_ms = NOW_MS - draw(st.integers(0, 7_200_000))
    return Contender(
        job_id=0,
        options=options,
        rank=draw(st.integers(0, 2)),
        project=draw(st.sampled_from(["a", "b"])),
        submitted_ms=since_ms - draw(st.integers(0, 36_000_000)),
        steps_left=draw(st.none() | st.floats(0, 1e6)),
        attained_gpu_s=draw(st.floats(0, 1e6)),
        at=draw(st.none() | st.sampled_from(options)) if options else None,
        since_ms=since_ms,
        restart_s=draw(st.floats(0, 600)),
        deadline_ms=draw(st.none() | st.integers(NOW_MS - 10_000, NOW_MS + 10_000_000)),
    )


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Contender], dict[str, int]]:
    """Jobs, and GPUs for those of them that are said to run."""
    drawn = draw(st.lists(contenders(), max_size=14))
    jobs = [replace(each, job_id=number) for number, each in enumerate(drawn, start=1)]
    capacity = {name: draw(st.integers(0, 12)) for name in TYPES}
    left = dict(capacity)
    for number, each in enumerate(jobs):
        if each.at is not None:
            if left[each.at.gpu_type] < each.at.gpus:
                jobs[number] = replace(each, at=None)
            else:
                left[each.at.gpu_type] -= each.at.gpus
    return jobs, capacity


def left_over(
    allocation: Allocation, capacity: dict[str, int], rank: int, jobs: list[Contender]
) -> dict[str, int]:
    """GPUs that are free or that classes after `rank` have."""
    left = dict(capacity)
    for each in jobs:
        grant = allocation.grants.get(each.job_id)
        if grant is not None and each.rank <= rank:
            left[grant.option.gpu_type] -= grant.option.gpus
    return left


@pytest.mark.long
@both_ways
@settings(max_examples=150, deadline=None)
@given(fleet=fleets(), balance=st.floats(0, 1))
def test_what_must_hold_holds(
    solver: Solve | None, fleet: tuple[list[Contender], dict[str, int]], balance: float
) -> None:
    jobs, capacity = fleet
    found = decide(jobs, capacity, solver, Aims(balance=balance))
    assert sorted([*found.grants, *found.waits]) == [each.job_id for each in jobs]
    assert min(left_over(found, capacity, 2, jobs).values()) >= 0, "a GPU is promised twice"
    for each in jobs:
        grant = found.grants.get(each.job_id)
        if grant is not None:
            assert grant.option in each.options, "a gang is whole"
            continue
        # Nobody waits for a GPU that is free, or that a later class has.
        left = left_over(found, capacity, each.rank, jobs)
        fitting = [option for option in each.options if option.gpus <= left[option.gpu_type]]
        assert fitting == [], f"job {each.job_id} waits beside {left}"
    assert found.value <= found.bound * (1 + 1e-6) + 1e-6


@pytest.mark.long
@both_ways
@given(fleet=fleets())
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_question_does_not_matter(
    solver: Solve | None, fleet: tuple[list[Contender], dict[str, int]]
) -> None:
    jobs, capacity = fleet
    backwards = dict(reversed(capacity.items()))
    assert decide(jobs, capacity, solver) == decide(jobs[::-1], backwards, solver)


def test_each_job_goes_where_it_loses_least() -> None:
    """The second is no shorter and of the same age, but ten times slower on the old GPU."""
    jobs = [job(1, "H100:2 K80:1"), job(2, "H100:10 K80:1")]
    assert where(decide(jobs, {"H100": 1, "K80": 1}, solve)) == {1: "K80", 2: "H100"}


@both_ways
def test_short_jobs_go_first_and_with_all_balance_long_ones(solver: Solve | None) -> None:
    jobs = [job(1, "H100:1", hours=8), job(2, "H100:1", hours=1)]
    assert where(decide(jobs, {"H100": 1}, solver, Aims(balance=0))) == {2: "H100"}
    assert where(decide(jobs, {"H100": 1}, solver, Aims(balance=1))) == {1: "H100"}


@both_ways
def test_where_nobody_comes_any_more_the_longest_is_not_left_to_the_end(
    solver: Solve | None,
) -> None:
    """Of two that run, one has the better GPU. Which one depends on the silence, but for who wants
    nothing but the mean, or nothing but the end."""

    def best_gpu(age_h: int, aims: Aims, *others: Contender) -> int:
        submitted_ms = NOW_MS - age_h * 3_600_000
        jobs = [
            job(n, "H100:4 K80:1", hours=hours, submitted_ms=submitted_ms)
            for n, hours in ((1, 5), (2, 1))
        ]
        found = where(decide([*jobs, *others], {"H100": 1, "K80": 1}, solver, aims))
        return next(n for n, name in found.items() if name == "H100")

    somebody = job(3, "K80:1", hours=0.1)
    assert [best_gpu(age_h, AIMS) for age_h in (0, 20)] == [2, 1]
    assert best_gpu(20, AIMS, somebody) == 2, "who comes may not be the last"
    assert [best_gpu(age_h, Aims(balance=0)) for age_h in (0, 20)] == [2, 2]
    both = [times_the_worth(age_h, Aims(balance=1)) for age_h in (0, 20)]
    assert both[0] == pytest.approx(both[1]), "the end is all that counts anyhow"


def test_where_the_end_of_all_counts_who_takes_as_long_as_all_work_may_not_wait() -> None:
    """It counts twice; who takes half as long may."""
    jobs = [job(n, "H100:1", hours=hours) for n, hours in ((1, 10), (2, 5), (3, 2.5))]
    ahead = Horizon(10.0, prices={"H100": 1.0})

    def steps_up() -> list[float]:
        (long,), (half,), (short,) = allocation.worths(jobs, NOW_MS, Aims(balance=1), {}, ahead)
        return [long / half, half / short]

    by_length = 2**allocation.POWER_END
    assert steps_up() == pytest.approx([by_length * 2, by_length], rel=0.04)
    ahead = replace(ahead, hours=1e9)  # nobody takes a part of that
    assert steps_up() == pytest.approx([by_length, by_length], rel=0.001)


def test_what_is_short_is_short_beside_the_others() -> None:
    """Jobs of minutes and of weeks are weighed as jobs of hours are, whatever the balance."""
    assert times_the_worth(0, AIMS) < 1, "the shorter of two goes first"
    for unit in (1 / 6, 10, 100):
        assert times_the_worth(0, AIMS, unit) == pytest.approx(times_the_worth(0, AIMS))


def test_one_that_lies_about_its_length_does_not_change_how_the_others_are_ranked() -> None:
    """It says that it is a thousand times as long: all ends with it, so what is long among the
    others counts for nothing any more, and for no more than that."""
    honest = [job(n, "H100:4 K80:1", hours=0.5 + n / 5) for n in range(1, 25)]
    liar = job(12, "H100:4 K80:1", hours=1000 * (0.5 + 12 / 5))
    before, after = (
        [max(worth) for n, worth in enumerate(found) if n != 11]
        for jobs in (honest, [*honest[:11], liar, *honest[12:]])
        for ahead in [allocation.work_ahead(jobs, {"H100": 2, "K80": 6}, NOW_MS)]
        for found in [allocation.worths(jobs, NOW_MS, AIMS, {}, ahead)]
    )
    assert before == sorted(before, reverse=True)
    assert after == sorted(after, reverse=True)
    moved = [(b / a) / (before[0] / after[0]) for b, a in zip(before, after, strict=True)]
    assert max(moved) < 1.3
    assert min(moved) > 1 / 1.3


def times_the_worth(age_h: int, aims: Aims, unit: float = 1.0) -> float:
    """How many times as much the longer of two is worth, on the same GPU."""
    jobs = [
        job(n, "H100:1", hours=hours * unit, submitted_ms=NOW_MS - age_h * 3_600_000)
        for n, hours in ((1, 5), (2, 1))
    ]
    ahead = allocation.work_ahead(jobs, {"H100": 1}, NOW_MS)
    (long,), (short,) = allocation.worths(jobs, NOW_MS, aims, {}, ahead)
    return long / short


@both_ways
def test_a_class_is_never_outweighed(solver: Solve | None) -> None:
    """Nothing that a thousand spare jobs could be worth moves a guaranteed one, however young they
    are where they run."""
    running = Option("H100", 1, 100.0)
    spare = [
        replace(job(n, "H100:100", hours=0.1), rank=2, at=running, since_ms=NOW_MS)
        for n in range(2, 6)
    ]
    jobs = [job(1, "H100:1", gpus=4, hours=500), *spare]
    assert where(decide(jobs, {"H100": 4}, solver)) == {1: "H100"}


@both_ways
def test_a_job_that_has_just_started_stays_and_later_gives_way(solver: Solve | None) -> None:
    long, short = job(1, "H100:1", hours=50), job(2, "H100:1", hours=1)
    young = replace(long, at=long.options[0], since_ms=NOW_MS - 599_000, restart_s=30)
    old = replace(young, since_ms=NOW_MS - 600_000)
    slow = replace(old, restart_s=120)
    assert where(decide([young, short], {"H100": 1}, solver)) == {1: "H100"}
    assert where(decide([old, short], {"H100": 1}, solver)) == {2: "H100"}
    assert where(decide([slow, short], {"H100": 1}, solver)) == {1: "H100"}, "ten restarts long"


@both_ways
def test_where_the_end_of_all_counts_nobody_is_stopped_in_his_last_minutes(
    solver: Solve | None,
) -> None:
    """A restart is worth a tenth of what follows it at most, and he would come back for less."""
    runs = job(1, "H100:1", hours=0.16)
    ends = replace(runs, at=runs.options[0], since_ms=NOW_MS - 3_600_000, restart_s=60)
    long, late = job(2, "H100:1", hours=5), job(3, "H100:1", hours=5, deadline_ms=NOW_MS + 5 * H_MS)
    longer, blind = replace(ends, steps_left=601), replace(ends, steps_left=None, attained_gpu_s=1)
    to_the_end = Aims(balance=1)
    assert where(decide([ends, long], {"H100": 1}, solver, to_the_end)) == {1: "H100"}
    for other, rival in ((longer, long), (blind, long), (ends, late)):
        found = decide([other, rival], {"H100": 1}, solver, to_the_end)
        assert where(found) == {rival.job_id: "H100"}
    old = replace(long, submitted_ms=NOW_MS - 10**10)
    assert where(decide([ends, old], {"H100": 1}, solver)) == {2: "H100"}, "not at 0.3"


@both_ways
def test_a_small_gain_moves_nobody(solver: Solve | None) -> None:
    since_ms = NOW_MS - 7_200_000
    options = (Option("H100", 1, 1.08), Option("A100", 1, 1.0))
    runs = replace(job(1, "H100:1"), options=options, at=options[1], since_ms=since_ms)
    fleet = {"H100": 1, "A100": 1}
    assert where(decide([runs], fleet, solver)) == {1: "A100"}
    much_faster = (Option("H100", 1, 3.0), options[1])
    assert where(decide([replace(runs, options=much_faster)], fleet, solver)) == {1: "H100"}
    costly = replace(runs, options=much_faster, restart_s=3000.0, since_ms=NOW_MS - 10**8)
    assert where(decide([costly], fleet, solver)) == {1: "A100"}, "nearly all of its stay is lost"


@both_ways
def test_a_deadline_that_has_come_goes_first(solver: Solve | None) -> None:
    long = job(1, "H100:1", hours=10)
    jobs = [long, job(2, "H100:1", hours=0.1)]
    in_time = replace(long, deadline_ms=NOW_MS + 11 * 3_600_000)
    late = replace(long, deadline_ms=NOW_MS + 10 * 3_600_000)
    assert where(decide([in_time, jobs[1]], {"H100": 1}, solver)) == {2: "H100"}
    assert where(decide([late, jobs[1]], {"H100": 1}, solver)) == {1: "H100"}
    hopeless = replace(job(3, "H100:1", hours=30), deadline_ms=NOW_MS + 10 * 3_600_000)
    assert where(decide([hopeless, late], {"H100": 1}, solver)) == {1: "H100"}
    assert where(decide([hopeless, jobs[1]], {"H100": 1}, solver)) == {2: "H100"}, "lost"
    over = replace(long, deadline_ms=NOW_MS)
    assert where(decide([over, jobs[1]], {"H100": 1}, solver)) == {2: "H100"}, "nothing to keep"


@both_ways
def test_who_does_not_say_how_long_counts_by_what_it_had(solver: Solve | None) -> None:
    unknown = [
        replace(job(n, "H100:1"), steps_left=None, attained_gpu_s=had * 3600.0)
        for n, had in ((1, 5.0), (2, 0.5))
    ]
    aims = Aims(balance=0)
    assert where(decide(unknown, {"H100": 1}, solver, aims)) == {2: "H100"}
    known_project = [unknown[0], replace(unknown[1], typical_gpu_s=20 * 3600.0)]
    assert where(decide(known_project, {"H100": 1}, solver, aims)) == {1: "H100"}


@both_ways
def test_tenants_and_age_weigh(solver: Solve | None) -> None:
    jobs = [job(1, "H100:1", project="a"), job(2, "H100:1", project="b")]
    found = allocate(jobs, {"H100": 1}, NOW_MS, Aims(), tenants={"b": 1.5}, solve=solver)
    assert where(found) == {2: "H100"}
    waited = replace(jobs[1], submitted_ms=NOW_MS - 3_600_000)
    assert where(decide([jobs[0], waited], {"H100": 1}, solver)) == {2: "H100"}


@both_ways
def test_a_job_may_take_fewer_gpus(solver: Solve | None) -> None:
    options = (Option("H100", 4, 4.0), Option("H100", 2, 2.2))
    elastic = replace(job(1, "H100:4", gpus=4), options=options)
    found = decide([elastic, job(2, "H100:1", gpus=2)], {"H100": 4}, solver)
    assert {n: grant.option.gpus for n, grant in found.grants.items()} == {1: 2, 2: 2}


def test_a_wait_says_what_it_is_short_of() -> None:
    jobs = [job(1, "H100:1 K80:0.5", hours=1), job(2, "H100:1", hours=4, gpus=2), job(3, "H100:1")]
    found = decide(jobs, {"H100": 2, "K80": 0}, solve)
    assert sorted(found.grants) == [1, 3]
    assert found.waits[2].startswith("needs 2 x H100, 0 free; worth ")
    nobody = decide([replace(jobs[0], options=())], {"H100": 2}, solve)
    assert nobody.waits == {1: "no GPU type of the fleet is known to run it"}


def test_prices_decide_over_who_comes_in_between() -> None:
    options = (Option("H100", 1, 4.0), Option("K80", 1, 1.0))
    free = {"H100": 1, "K80": 1}
    assert at_prices([4.0, 1.0], options, free, {"H100": 3.5, "K80": 0.1}) == options[1]
    assert at_prices([4.0, 1.0], options, free, {"H100": 2.0, "K80": 0.1}) == options[0]
    assert at_prices([4.0, 1.0], options, {"K80": 1}, {"H100": 0.0, "K80": 1.1}) is None


def test_the_solver_beats_the_greedy_where_the_greedy_is_short_sighted() -> None:
    """The first gains a little by the better GPU, and the greedy gives it that."""
    jobs = [job(1, "H100:1 K80:0.9", hours=1), job(2, "H100:1 K80:0.1", hours=1.2)]
    fleet, aims = {"H100": 1, "K80": 1}, Aims(balance=0)
    assert where(decide(jobs, fleet, None, aims)) == {1: "H100", 2: "K80"}
    assert where(decide(jobs, fleet, solve, aims)) == {1: "K80", 2: "H100"}


def test_a_gang_is_not_left_out_for_small_jobs_that_are_worth_less() -> None:
    """The solver takes the first and three quarters of the gang; what fills its place is worth less
    than the gang, even with the first."""
    gang = job(2, "H100:1", gpus=4, hours=0.25)
    jobs = [job(1, "H100:1", hours=0.7), gang, *(job(n, "H100:1", hours=4) for n in (3, 4, 5))]
    found = decide(jobs, {"H100": 4}, solve, Aims(balance=0))
    assert where(found) == {2: "H100"}
    assert found.bound > found.value
    dear = [replace(each, submitted_ms=NOW_MS - 36_000_000) for each in jobs[2:]]
    found = decide([*jobs[:2], *dear], {"H100": 4}, solve, Aims(balance=0, age_h=6))
    assert sorted(found.grants) == [1, 3, 4, 5], "together these are worth more"


def test_a_solver_that_gives_up_leaves_the_greedy() -> None:
    def gives_up(columns: Columns) -> Solved:
        zeros = [0.0] * len(columns.values)
        return Solved(zeros, [0.0] * len(columns.capacity), math.inf)

    jobs = [job(n, "H100:2 K80:1", hours=n) for n in range(1, 9)]
    fleet = {"H100": 2, "K80": 3}
    assert where(decide(jobs, fleet, gives_up)) == where(decide(jobs, fleet, None))


_PROGRAM = """
from tests.core.test_allocation import NOW_MS, job, solve, allocate, Aims
jobs = [job(n, f"H100:{1 + n % 7} A100:{1 + n % 3} K80:1", gpus=1 + n % 2 * 3) for n in range(60)]
for solver in (None, solve):
    found = allocate(jobs, {"H100": 9, "A100": 11, "K80": 20}, NOW_MS, Aims(), solve=solver)
    print(sorted(found.grants.items()), sorted(found.waits.items()), found.prices)
"""


@pytest.mark.long
def test_two_hash_seeds_decide_the_same() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-c", _PROGRAM], cwd=ROOT, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1]
    assert "Grant(" in said[0]


def test_remaining_work_is_counted_on_the_best_type() -> None:
    ahead = allocation.work_ahead(
        [job(1, "H100:4 K80:1", gpus=2, hours=3)], {"H100": 2, "K80": 2}, 0
    )
    assert ahead.hours == pytest.approx(3)
