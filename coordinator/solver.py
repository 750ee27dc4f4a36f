"""HiGHS behind the function type that the core asks for: one linear program, prices included.

Problem: the core says what everything is worth; the best that a fleet can do with it is a linear
program with one row for each job and one for each GPU type, and few jobs come out of it in part: at
most as many as there are types. HiGHS solves it. It is limited by iterations, never by the clock,
so that a replay decides the same; where it does not get to the end, nothing is taken from it and
the core's greedy decides.

The package is an extra (`gpu-baton[scheduling]`).
"""

from typing import Final

import highspy
import numpy as np
from numpy.typing import NDArray

from coordinator.core.allocation import Columns, Solved

# Some times as many as 10,000 jobs on nine types have taken.
ITERATIONS_MAX: Final = 200_000

Floats = NDArray[np.float64]


def solve(columns: Columns) -> Solved:
    """The allocation that is worth most, in parts of jobs; each job at most once."""
    values = np.asarray(columns.values, dtype=np.float64)
    jobs = np.asarray(columns.jobs, dtype=np.int32)
    types = np.asarray(columns.types, dtype=np.int32)
    count = len(values)
    rows = columns.job_count + len(columns.capacity)
    upper = np.concatenate([np.ones(columns.job_count), np.asarray(columns.capacity, np.float64)])
    index = np.empty(2 * count, dtype=np.int32)
    index[0::2], index[1::2] = jobs, columns.job_count + types
    entries = np.ones(2 * count)
    entries[1::2] = np.asarray(columns.gpus, dtype=np.float64)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = count, rows
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = values
    lp.col_lower_, lp.col_upper_ = np.zeros(count), np.ones(count)
    lp.row_lower_, lp.row_upper_ = np.full(rows, -highspy.kHighsInf), upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * count + 1, 2, dtype=np.int32)
    lp.a_matrix_.index_, lp.a_matrix_.value_ = index, entries
    found = maximise(lp)
    if found is None:
        return Solved([0.0] * count, [0.0] * len(columns.capacity), float("inf"))
    shares, prices, bound = found
    return Solved(shares.tolist(), np.maximum(0.0, prices[columns.job_count :]).tolist(), bound)


def maximise(lp: highspy.HighsLp) -> tuple[Floats, Floats, float] | None:
    """Values of the columns, prices of the rows, and the objective; None where the iterations were
    not enough or there is no solution."""
    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, setting in (
        ("output_flag", False),
        ("threads", 1),
        ("simplex_iteration_limit", ITERATIONS_MAX),
    ):
        highs.setOptionValue(option, setting)
    highs.passModel(lp)
    highs.run()
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = highs.getSolution()
    objective = highs.getInfo().objective_function_value
    return np.array(solution.col_value), np.array(solution.row_dual), float(objective)
