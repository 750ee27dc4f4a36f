"""What one decision costs at 100, 1,000 and 10,000 GPUs and jobs, and how near it is to the best.

The fleet has nine GPU types; each job can run on all of them, at rates drawn by a seed, and half of
the GPUs' worth of jobs run already. Measured is all of a decision, from jobs as the core sees them
to grants and sentences, in seconds of one core.

The linear program's bound counts jobs in part. Where eleven GPUs of a type are shared by gangs of
up to four, whole jobs do not reach it, so at the smallest size the value is also given beside the
best in whole jobs, which is searched for until it is proven.
"""

import random
import statistics
import time
from dataclasses import replace
from functools import partial

from bench import report
from coordinator.core.allocation import Aims, Allocation, Contender, Option, Solve, allocate
from coordinator.solver import EXHAUSTIVE, solve

TYPES = tuple(f"type{number}" for number in range(9))
SIZES = (100, 1_000, 10_000)
GOALS_S = {1_000: 0.3, 10_000: 3.0}
VALUE_GOAL = 0.999
NOW_MS = 100 * 3_600_000
SEEDS = (1, 2, 3)
SEEDS_BEST = range(1, 9)


def rows(quick: bool) -> list[report.Row]:
    """Rows for all sizes; the largest is left out where it has to be quick."""
    found = []
    for size in SIZES[: 2 if quick else 3]:
        for name, solver in (("", solve), (", greedy", None)):
            costs, values = [], []
            for seed in SEEDS:
                contenders = jobs(size, seed)
                begin_s = time.process_time()
                made = _decide(contenders, size, solver)
                costs.append(time.process_time() - begin_s)
                values.append(made.value / _decide(contenders, size, solve).bound)
            label = f"{size:,} GPUs and jobs{name}"
            goal = None if name else GOALS_S.get(size)
            found.append(report.row_of(f"decision, {label}", costs, "s of a core", goal=goal))
            found.append(
                report.Row(
                    name=f"value, {label}",
                    value=statistics.median(values),
                    unit="of the LP's bound",
                    low=min(values),
                    high=max(values),
                    goal=None if name else VALUE_GOAL,
                    more_is_better=True,
                )
            )
    return [*found, _beside_the_best(SIZES[0])]


def _beside_the_best(size: int) -> report.Row:
    """Production's value over that of the proven best."""
    values = []
    for seed in SEEDS_BEST:
        contenders = jobs(size, seed)
        best = _decide(contenders, size, partial(solve, search=EXHAUSTIVE))
        values.append(_decide(contenders, size, solve).value / best.value)
    row = report.row_of(f"value, {size:,} GPUs and jobs", values, "of the best in whole jobs")
    return replace(row, goal=VALUE_GOAL, more_is_better=True)


def jobs(count: int, seed: int) -> list[Contender]:
    """Jobs that want about twice what there is."""
    chance = random.Random(seed)
    left = dict.fromkeys(TYPES, count // len(TYPES) // 2)
    found = []
    for number in range(1, count + 1):
        gpus = chance.choice((1, 1, 1, 2, 2, 4))
        options = tuple(
            Option(name, gpus, (1 + place) * chance.uniform(0.5, 2.0))
            for place, name in enumerate(TYPES)
        )
        here = chance.choice(options)
        runs = left[here.gpu_type] >= gpus
        left[here.gpu_type] -= gpus if runs else 0
        found.append(
            Contender(
                job_id=number,
                options=options,
                submitted_ms=NOW_MS - chance.randrange(36_000_000),
                steps_left=10 ** chance.uniform(3, 6),
                attained_gpu_s=chance.uniform(0, 1e5) if runs else 0.0,
                at=here if runs else None,
                since_ms=NOW_MS - chance.randrange(7_200_000),
                restart_s=60.0,
            )
        )
    return found


def _decide(contenders: list[Contender], size: int, solver: Solve | None) -> Allocation:
    capacity = dict.fromkeys(TYPES, size // len(TYPES))
    return allocate(contenders, capacity, NOW_MS, Aims(), solve=solver)
