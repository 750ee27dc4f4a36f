"""The end of a queue: where nobody comes any more, all is done sooner, and the mean pays little."""

import random

import pytest

from coordinator.core import horizon
from coordinator.sim import checks
from coordinator.sim.engine import simulate
from coordinator.sim.model import Fleet, SimJob
from coordinator.sim.ours import Ours
from coordinator.sim.report import Figures, figures
from coordinator.solver import solve

FLEET = Fleet({"A100": 2, "K80": 4})
SEEDS = (1, 2, 3, 4)


def queue(seed: int) -> dict[int, SimJob]:
    """Thirty jobs at once, a few of them long; some are nearly as fast on the old type."""
    chance = random.Random(seed)
    found = {}
    for number in range(1, 31):
        steps = chance.lognormvariate(0, 1) * 4 * 3600
        rates = {"A100": 4.0, "K80": chance.uniform(0.6, 2.5)}
        found[number] = SimJob(job_id=number, gpus=1, steps=steps, rates=rates, restart_s=60.0)
    return found


def run(jobs: dict[int, SimJob]) -> Figures:
    outcome = simulate(jobs.values(), FLEET, Ours(solve=solve, tick_ms=600_000))
    assert checks.check_work(outcome, jobs, {}) == checks.check_capacity(outcome, FLEET) == []
    return figures(outcome, jobs, FLEET)


def test_a_queue_to_which_nobody_comes_ends_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside decisions that take no notice of the silence."""
    heard = [run(queue(seed)) for seed in SEEDS]
    monkeypatch.setattr(horizon, "QUIET_MAX", 0.0)
    deaf = [run(queue(seed)) for seed in SEEDS]
    assert sum(one.makespan_h for one in heard) < 0.975 * sum(one.makespan_h for one in deaf)
    for one, other in zip(heard, deaf, strict=True):
        assert one.makespan_h < other.makespan_h
        assert one.completion_h.mean < 1.035 * other.completion_h.mean
