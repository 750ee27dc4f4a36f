"""What not knowing speeds costs: Baton with a part of the table of rates, and with all of it.

A half, four fifths or all of Gavel's measured rates (of models, GPUs and types) are hidden.
What is hidden is estimated as in production and known once a job has run there for two minutes
(`coordinator/sim/learning.py`); the oracle is the same policy with the whole table. Both are
charged for restarts, and so for what was tried and found bad. Jobs say how many steps they make.

Nothing was chosen on these runs. Speeds in the simulator do not wobble: what noise does to
estimates is in `bench/estimates.py`.
"""

import random
from collections.abc import Mapping
from pathlib import Path

from bench import report
from coordinator.sim import checks, gavel
from coordinator.sim.engine import simulate
from coordinator.sim.learning import Learning
from coordinator.sim.model import Policy, SimJob
from coordinator.sim.ours import Ours
from coordinator.sim.report import Figures, figures
from coordinator.solver import solve

RESTART_S = 60.0
HIDDEN_PERCENTS = (50, 80)
SEEDS, SEEDS_QUICK = 5, 3
MEAN_GOAL = 1.08  # of the oracle's

Table = Mapping[tuple[str, int], Mapping[str, float]]


def rows(folder: Path, asked: report.Options) -> list[report.Row]:
    """Mean, p99 and makespan over the oracle's, for each trace and share that is hidden."""
    rates = gavel.read_rates(folder / gavel.RATES)
    families = {model: gavel.family(model) for model, _ in rates.alone}
    traces = {"continuous": gavel.CONTINUOUS, "static": gavel.STATIC}
    found = []
    for trace, file in list(traces.items())[: 1 if asked.quick else 2]:
        known = gavel.read_trace(folder / file, rates, RESTART_S)
        jobs = {job.job_id: job for job in known}
        oracle = _run(Ours(solve=solve), jobs)
        draws: dict[str, list[Table]] = {
            f"{percent}% hidden": [
                hide(rates.alone, percent, seed)
                for seed in range(SEEDS_QUICK if asked.quick else SEEDS)
            ]
            for percent in HIDDEN_PERCENTS
        }
        draws["all hidden"] = [{}]
        for label, tables in draws.items():
            report.say(f"{trace}: {label}")
            ran = [_run(Learning(Ours(solve=solve), table, families), jobs) for table in tables]
            found += _rows(f"{trace}, {label}", ran, oracle)
    return found


def hide(table: Table, percent: int, seed: int) -> Table:
    """What is left of it."""
    chance = random.Random(seed)
    return {
        kind: {name: r for name, r in sorted(rates.items()) if chance.random() * 100 >= percent}
        for kind, rates in sorted(table.items())
    }


def _run(policy: Policy, jobs: dict[int, SimJob]) -> Figures:
    fleet = gavel.PHYSICAL_FLEET
    outcome = simulate(jobs.values(), fleet, policy)
    found = [
        *checks.check_capacity(outcome, fleet),
        *checks.check_work(outcome, jobs),
        *checks.check_completions(outcome, jobs),
        *checks.check_classes(outcome, jobs, fleet),
    ]
    if found:
        raise SystemExit(f"{policy.name}: {found[0]} (of {len(found)})")
    return figures(outcome, jobs, fleet)


def _rows(label: str, ran: list[Figures], oracle: Figures) -> list[report.Row]:
    means = [each.completion_h.mean for each in ran]
    tails = [each.completion_h.p99 for each in ran]
    ends = [each.makespan_h for each in ran]
    return [
        _row(f"{label}: mean completion", means, oracle.completion_h.mean, MEAN_GOAL),
        _row(f"{label}: p99 completion", tails, oracle.completion_h.p99, None),
        _row(f"{label}: makespan", ends, oracle.makespan_h, None),
    ]


def _row(name: str, hours: list[float], oracle_h: float, goal: float | None) -> report.Row:
    return report.row_of(name, [each / oracle_h for each in hours], "of the oracle's", goal=goal)
