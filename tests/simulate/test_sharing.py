"""Pairs in the simulator: tried, measured, kept or ended, and charged for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.allocation import Aims
from coordinator.sim import checks
from coordinator.sim.engine import simulate
from coordinator.sim.gavel import Rates, same_kept
from coordinator.sim.model import PACE_S, Chance, Fleet, Outcome, PairRates, SimJob
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Packing
from coordinator.sim.sharing import Sharing, fitting_pairs
from coordinator.solver import solve

HOUR_MS = 3_600_000
ONE = Fleet({"A100": 1})
TICK_S = 60.0
MODELS = ("m", "n")


def table(kept: float, names: tuple[str, ...] = ("A100",)) -> PairRates:
    """What each does beside each other one, where alone it makes one step a second."""
    return {(name, one, other): kept for name in names for one in MODELS for other in MODELS}


def job(job_id: int, hours: float, **more: object) -> SimJob:
    fields = {"gpus": 1, "rates": {"A100": 1.0}, "model": "m", "restart_s": 360.0, **more}
    return SimJob(job_id=job_id, steps=hours * 3600, **fields)  # type: ignore[arg-type]


def sharing(pairs: PairRates, known: bool = False) -> Sharing:
    ours = Ours(Aims(balance=0), solve)
    return Sharing(ours, fitting_pairs(pairs), pairs if known else None)


def ends_h(outcome: Outcome) -> dict[int, float]:
    return {n: round(ms / HOUR_MS, 4) for n, ms in sorted(outcome.finished_ms.items())}


def test_two_that_are_fast_enough_stay_together() -> None:
    pairs = table(0.8)
    outcome = simulate([job(1, 1), job(2, 2)], ONE, sharing(pairs), pairs=pairs)
    assert ends_h(outcome) == {1: 1.25, 2: 2.25}


def test_two_that_are_too_slow_are_parted_after_two_minutes_and_never_tried_again() -> None:
    """They end as if they had been alone one after the other, but for the trial: both have made
    half of two minutes, and the second has restarted."""
    pairs = table(0.5)
    policy = sharing(pairs)
    jobs = [job(1, 1), job(2, 2), job(3, 9, model="n")]
    outcome = simulate(jobs, ONE, policy, pairs=pairs)
    begun = [line for line in outcome.lines if line.what in ("start", "share")]
    shared = [line for line in begun if line.partner is not None]
    assert [(line.at_ms, line.job_id) for line in shared] == [(0, 1), (0, 2)]
    assert policy.tried == 1, "of another pair the first has said enough"
    first_h = 1 + PACE_S / 2 / 3600
    assert ends_h(outcome)[1] == pytest.approx(first_h, abs=1e-4)
    assert ends_h(outcome)[2] == pytest.approx(1 + 2 + 0.1, abs=1e-4)


def test_who_sees_the_table_tries_nothing_that_is_bad() -> None:
    pairs = table(0.5)
    policy = sharing(pairs, known=True)
    assert ends_h(simulate([job(1, 1), job(2, 2)], ONE, policy, pairs=pairs)) == {1: 1, 2: 3}
    assert policy.tried == 0


def test_who_does_not_fit_is_not_tried() -> None:
    pairs = {**table(0.9), ("A100", "m", "n"): 0.0}
    policy = sharing(pairs)
    simulate([job(1, 1), job(2, 1, model="n")], ONE, policy, pairs=pairs)
    assert policy.tried == 0


@pytest.mark.parametrize(
    ("due_h", "ends_h_by_job"),
    [
        (None, {1: 2.5, 2: 4.5}),  # together, at .8 of the speed
        (2.6, {1: 2.5, 2: 4.5}),
        # After an hour together it has to run alone: its latest start has come.
        (2.2, {1: 2.2, 2: 5.4}),
        (1.0, {1: 2.5, 2: 4.5}),  # lost in any case
    ],
)
@pytest.mark.parametrize("late", [1, 2])
def test_who_would_be_late_in_company_runs_alone(
    late: int, due_h: float | None, ends_h_by_job: dict[int, float]
) -> None:
    """Whether it is the host or the guest."""
    due_ms = None if due_h is None else round(due_h * HOUR_MS)
    other = 3 - late
    ours = job(late, 2, deadline_ms=due_ms, restart_s=0.0)
    jobs = sorted([ours, job(other, 4, restart_s=0.0)], key=lambda each: each.job_id)
    pairs = table(0.8)
    outcome = simulate(jobs, ONE, sharing(pairs), pairs=pairs)
    assert ends_h(outcome) == {late: ends_h_by_job[1], other: ends_h_by_job[2]}
    assert due_h != 2.2 or outcome.finished_ms[late] <= (due_ms or 0)


def test_a_guest_moves_to_a_gpu_that_nobody_wants_and_pays_for_it() -> None:
    """When the third job ends its GPU is free; the guest goes there, and restarts."""
    pairs = table(0.8)
    jobs = [job(1, 2), job(2, 2.5), job(3, 1, model="n", gpus=1)]
    outcome = simulate(jobs, Fleet({"A100": 2}), sharing(pairs), pairs=pairs)
    stops = [(line.what, line.job_id) for line in outcome.lines if line.what == "stop"]
    assert len(stops) == 1
    (_, guest) = stops[0]
    starts = [line.at_ms for line in outcome.lines if (line.what, line.job_id) == ("start", guest)]
    assert len(starts) == 2
    known = {each.job_id: each for each in jobs}
    assert checks.check_work(outcome, known, pairs) == []


def test_the_judge_finds_who_stays_where_it_is_too_slow_and_who_shares_with_nobody() -> None:
    pairs = table(0.55)
    jobs = [job(1, 1), job(2, 2)]
    known = {each.job_id: each for each in jobs}
    outcome = simulate(jobs, ONE, Packing(pairs), pairs=pairs)
    found = checks.check_pairs(outcome, known, pairs, PACE_S + TICK_S)
    assert found
    assert "too slow together" in found[0]
    assert checks.check_pairs(outcome, known, table(0.8), PACE_S + TICK_S) == []
    lines = [line for line in outcome.lines if (line.what, line.job_id) != ("start", 2)]
    alone = checks.check_pairs(outcome._replace(lines=lines[:3]), known, pairs, 10**9)
    assert any("shares with nobody" in sentence for sentence in alone)


def test_what_is_kept_in_one_table_is_kept_in_another() -> None:
    one = Rates({("m", 1): {"A100": 10.0}}, {("A100", "m", "m"): 6.0})
    other = Rates({("m", 1): {"A100": 5.0}}, {})
    assert same_kept(one, other) == {("A100", "m", "m"): 3.0}


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[SimJob], PairRates]:
    names = ("A100", "K80")
    kept = st.sampled_from([0.3, 0.6, 0.72, 0.9])
    pairs = {
        (name, one, other): draw(kept) * speed
        for name, speed in (("A100", 4.0), ("K80", 1.0))
        for one in MODELS
        for other in MODELS
    }
    jobs = [
        SimJob(
            job_id=number, gpus=draw(st.sampled_from([1, 1, 1, 2])),
            steps=draw(st.floats(100, 8_000)),
            rates=dict(zip(names, (4.0, 1.0), strict=True)), model=draw(st.sampled_from(MODELS)),
            rank=draw(st.integers(0, 1)), arrival_ms=draw(st.integers(0, 5_000_000)),
            restart_s=draw(st.sampled_from([0.0, 60.0])),
        )
        for number in range(1, draw(st.integers(2, 9)) + 1)
    ]  # fmt: skip
    return jobs, pairs


@given(case=cases(), failing=st.booleans())
@settings(max_examples=20, deadline=None)
def test_whatever_comes_the_judges_find_nothing(
    case: tuple[list[SimJob], PairRates], failing: bool
) -> None:
    jobs, pairs = case
    fleet = Fleet({"A100": 1, "K80": 2})
    chance = Chance(node_mtbf_h=5.0, node_gpus=1, mend_h=0.3) if failing else Chance()
    outcome = simulate(jobs, fleet, sharing(pairs), chance, pairs)
    known = {each.job_id: each for each in jobs}
    assert checks.check_capacity(outcome, fleet) == []
    assert checks.check_work(outcome, known, pairs) == []
    assert checks.check_completions(outcome, known) == []
    assert checks.check_classes(outcome, known, fleet) == []
    assert checks.check_pairs(outcome, known, pairs, PACE_S + TICK_S) == []
    assert simulate(jobs, fleet, sharing(pairs), chance, pairs) == outcome
