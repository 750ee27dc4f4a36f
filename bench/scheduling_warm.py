"""Whether a linear program is done sooner from the basis of the decision before (a warm start).

Problem: decisions follow one another by a minute and are nearly the same, so it seems a waste that
each starts from nothing. The jobs of `bench/scheduling_scale.py` are decided once a minute; in each
minute one in a hundred of those that run ends and another comes. Each minute's program is solved
cold, as production does, and from the basis in which the minute before ended: in seconds of a core
and in iterations. Both reach the same value; what a GPU is worth there may differ, as several
prices can be right, and that is printed as well.
"""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np
from numpy.typing import NDArray

from bench import report
from bench.scheduling_scale import NOW_MS, TYPES, jobs
from coordinator.core.allocation import Aims, Allocation, Columns, Contender, Solved, allocate
from coordinator.solver import ITERATIONS_MAX, Silent, program, solve

SIZES = (100, 1_000, 10_000)
MINUTES = 4
ENDS = 0.01
MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True)
class Ended:
    """One solution: what it took, and the prices of GPUs at its end."""

    cpu_s: float
    iterations: int
    prices: NDArray[np.float64]
    basis: highspy.HighsBasis


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    rows = [row for size in SIZES[: 2 if asked.quick else 3] for row in _rows(size)]
    report.show("A decision's linear program, from the basis of the last one", rows, asked)
    return 0


def _rows(size: int) -> list[report.Row]:
    pairs = _minutes(size)
    label = f"{size:,} GPUs and jobs"
    cold, warm = ([pair[place] for pair in pairs] for place in (0, 1))
    differ = [float(np.abs(a.prices - b.prices).max()) for a, b in pairs]
    return [
        report.row_of(f"cold, {label}", [each.cpu_s for each in cold], "s of a core"),
        report.row_of(f"warm, {label}", [each.cpu_s for each in warm], "s of a core"),
        report.row_of(f"cold, {label}", [each.iterations for each in cold], "iterations"),
        report.row_of(f"warm, {label}", [each.iterations for each in warm], "iterations"),
        report.row_of(f"prices differ by up to, {label}", differ, "of a value"),
    ]


def _minutes(size: int) -> list[tuple[Ended, Ended]]:
    chance = random.Random(1)
    there = [replace(job, since_ms=0) for job in jobs(size, 1)]
    basis, found = None, []
    for minute in range(MINUTES):
        now_ms = NOW_MS + minute * MINUTE_MS
        asked: list[Columns] = []

        def remember(columns: Columns, asked: list[Columns] = asked) -> Solved:
            asked.append(columns)
            return solve(columns)

        capacity = dict.fromkeys(TYPES, size // len(TYPES))
        made = allocate(there, capacity, now_ms, Aims(), solve=remember)
        cold = _end(asked[0])
        if basis is not None:
            found.append((cold, _end(asked[0], basis)))
        basis = cold.basis
        there = _a_minute_later(there, made, now_ms + MINUTE_MS, chance)
    return found


def _end(columns: Columns, basis: highspy.HighsBasis | None = None) -> Ended:
    lp = program(columns)
    begin_s = time.process_time()
    highs = Silent()
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("simplex_iteration_limit", ITERATIONS_MAX)
    highs.passModel(lp)
    if basis is not None:
        highs.setBasis(basis)
    highs.run()
    cpu_s = time.process_time() - begin_s
    prices = np.array(highs.getSolution().row_dual)[columns.job_count :]
    return Ended(cpu_s, highs.getInfo().simplex_iteration_count, prices, highs.getBasis())


def _a_minute_later(
    before: Sequence[Contender], made: Allocation, now_ms: int, chance: random.Random
) -> list[Contender]:
    """Nobody is too young to be moved: so each program has the same columns."""
    fresh = jobs(len(before), now_ms)
    found = []
    for job, other in zip(before, fresh, strict=True):
        grant = made.grants.get(job.job_id)
        if grant is None:
            found.append(replace(job, at=None))
        elif chance.random() < ENDS:
            new = replace(other, at=None, attained_gpu_s=0.0, submitted_ms=now_ms, since_ms=0)
            found.append(new)
        else:
            had_gpu_s = job.attained_gpu_s + 60.0 * grant.option.gpus
            left = max(1.0, (job.steps_left or 0.0) - 60.0 * grant.option.rate)
            found.append(replace(job, at=grant.option, attained_gpu_s=had_gpu_s, steps_left=left))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
