"""Speeds that nobody knew beforehand: estimated, found out in two minutes, and then acted on."""

import random

import pytest

from coordinator.core.allocation import Aims
from coordinator.sim import checks
from coordinator.sim.engine import simulate
from coordinator.sim.learning import Kind, Learning
from coordinator.sim.model import Fleet, Placement, Seen, SimJob, View
from coordinator.sim.ours import Ours
from coordinator.solver import solve

FLEET = Fleet({"V100": 2, "P100": 2, "K80": 2})
MINUTE_MS = 60_000
RATES = {
    ("m", 1): {"V100": 4.0, "P100": 2.0, "K80": 0.5},
    ("n", 1): {"V100": 2.0, "P100": 2.2, "K80": 1.5},
    ("n", 2): {"V100": 3.4, "P100": 3.9, "K80": 2.6},
}


def some_jobs(seed: int, count: int = 16) -> list[SimJob]:
    chance = random.Random(seed)
    return [
        SimJob(
            job_id=number,
            gpus=kind[1],
            steps=chance.uniform(600, 20_000),
            rates=RATES[kind],
            model=kind[0],
            arrival_ms=number * 3 * MINUTE_MS,
            restart_s=60.0,
        )
        for number, kind in enumerate(chance.choices(list(RATES), k=count), start=1)
    ]


def learning(table: dict[Kind, dict[str, float]] | None = None) -> Learning:
    return Learning(Ours(Aims(), solve), table or {})


def view(job: SimJob, now_ms: int, at: str = "", pace: float | None = None) -> View:
    place = Placement(at, job.gpus) if at else None
    seen = Seen(job, job.steps, 0.0, place, 0, pace)
    return View(now_ms, FLEET, FLEET.gpus, [seen])


@pytest.mark.parametrize("seed", range(3))
def test_with_the_whole_table_it_is_ours(seed: int) -> None:
    jobs = some_jobs(seed)
    informed = simulate(jobs, FLEET, learning(RATES))
    assert informed.trace_hash == simulate(jobs, FLEET, Ours(solve=solve)).trace_hash


@pytest.mark.parametrize("seed", range(3))
def test_with_nothing_it_ends_all_and_breaks_no_rule(seed: int) -> None:
    jobs = some_jobs(seed)
    known = {job.job_id: job for job in jobs}
    outcome = simulate(jobs, FLEET, learning())
    assert checks.check_capacity(outcome, FLEET) == []
    assert checks.check_work(outcome, known) == []
    assert checks.check_completions(outcome, known) == []


def test_rates_that_are_hidden_are_not_looked_at() -> None:
    """Two jobs that differ in nothing but what nobody was told are decided over alike."""
    job = SimJob(job_id=1, gpus=1, steps=1e5, rates={"V100": 1.0, "P100": 9.0}, model="m")
    other = SimJob(job_id=1, gpus=1, steps=1e5, rates={"V100": 9.0, "P100": 1.0}, model="m")
    placed = [learning().decide(view(each, 0)) for each in (job, other)]
    assert placed == [{1: Placement("V100", 1)}] * 2, "the faster by facts"


def test_what_was_measured_is_known() -> None:
    job = SimJob(job_id=1, gpus=1, steps=1e5, rates=RATES["m", 1], model="m")
    policy = learning()
    policy.decide(view(job, 0))
    assert not policy.believed["m", 1].absolute
    policy.decide(view(job, 2 * MINUTE_MS, "P100", 2.0))
    told = policy.believed["m", 1]
    assert told.absolute
    assert told.rates["P100"] == 2.0
    assert told.rates["V100"] > 2.0, "faster by facts"


def test_a_bad_place_is_left_when_it_is_found_bad() -> None:
    """By facts a V100 is the faster; of this job it is not."""
    job = SimJob(job_id=1, gpus=1, steps=1e5, rates={"V100": 0.2, "P100": 1.0}, model="m")
    kin = {("m", 1): {"P100": 1.0}}
    policy = learning(kin)
    assert policy.decide(view(job, 0)) == {1: Placement("V100", 1)}
    later = view(job, 20 * MINUTE_MS, "V100", 0.2)
    assert policy.decide(later) == {1: Placement("P100", 1)}


def test_the_same_model_and_its_family_teach_each_other() -> None:
    job = SimJob(job_id=1, gpus=1, steps=1e5, rates=RATES["m", 1], model="m")
    table = {("n", 1): {"V100": 2.0, "P100": 8.0}, ("m", 1): {"V100": 2.0}}
    alone, kin = learning(table), Learning(Ours(solve=solve), table, {"m": "f", "n": "f"})
    for policy in (alone, kin):
        policy.decide(view(job, 0))
    assert kin.believed["m", 1].rates["P100"] > alone.believed["m", 1].rates["P100"]
