"""HiGHS behind the function type that the core asks for: one linear program, prices included.

Problem: the core says what everything is worth; the best that a fleet can do with it is a linear
program with one row for each job and one for each GPU type, and few jobs come out of it in part: at
most as many as there are types. HiGHS solves it. It is limited by iterations, never by the clock,
so that a replay decides the same; where it does not get to the end, nothing is taken from it and
the core's greedy decides.

Where jobs are few a job in part is much, so up to `WHOLE_COLUMNS_MAX` columns are then searched for
the best in whole jobs: among the columns that the prices nearly pay for, with a bound on the nodes,
and, of more than `FEW_COLUMNS_MAX`, only where jobs in part are worth more than a few thousandths.

Each decision starts cold. From the basis of the last decision HiGHS needs more iterations, not
fewer, where there are thousands of jobs (`bench/scheduling_warm.py`), and ends at other prices
where several are right: a coordinator that has just started, and a replay, would decide otherwise.
The package is an extra (`gpu-baton[scheduling]`).
"""

import math
from dataclasses import dataclass
from typing import Final

import highspy
import numpy as np
from numpy.typing import NDArray

from coordinator.core.allocation import Columns, Solved, unsolved

# Some times as many as 10,000 jobs on nine types have taken.
ITERATIONS_MAX: Final = 200_000
TOLERANCE: Final = 1e-6

# Beyond that the jobs that come out in part are a ten-thousandth of the value.
WHOLE_COLUMNS_MAX: Final = 20_000
# Where columns are more than so many, jobs in part that are worth less than this of all are not
# worth a search.
FEW_COLUMNS_MAX: Final = 1_000
PARTS_RATIO_MIN: Final = 3e-3

# Where the linear program leaves nearly everything whole, these two ways of HiGHS to find something
# at once, and what it does to make the program smaller, take half of a search and find no more.
SEARCH_OPTIONS: Final = (
    ("threads", 1),
    ("presolve", "off"),
    ("mip_heuristic_run_feasibility_jump", False),
    ("mip_heuristic_run_root_reduced_cost", False),
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Search:
    """How hard whole jobs are looked for: a column that falls short of its price by more than
    `near_ratio` is in no allocation that is nearly best."""

    near_ratio: float = 0.05
    nodes_max: int = 50
    gap_ratio: float = 1e-4


PRODUCTION: Final = Search()
# To the proven best, however long it takes: what a benchmark measures the other by.
EXHAUSTIVE: Final = Search(math.inf, 1_000_000, 0.0)


def solve(columns: Columns, search: Search = PRODUCTION) -> Solved:
    """The allocation that is worth most, in parts of jobs; each job at most once."""
    lp = program(columns)
    found = maximise(lp)
    if found is None:
        return unsolved(columns)
    shares, prices, bound = found
    values = np.asarray(columns.values, dtype=np.float64)
    count = len(values)
    parts = np.where((shares > TOLERANCE) & (shares < 1 - TOLERANCE), shares, 0.0)
    least = 0.0 if count <= FEW_COLUMNS_MAX else PARTS_RATIO_MIN * bound
    of_gpus = prices[columns.job_count :]
    if count <= WHOLE_COLUMNS_MAX and values @ parts > least:
        paid = prices[np.asarray(columns.jobs)]
        paid = paid + np.asarray(columns.gpus) * of_gpus[np.asarray(columns.types)]
        near = np.flatnonzero(values >= paid - search.near_ratio * np.abs(values))
        shares = _whole(columns, near, shares, search)
    return Solved(shares.tolist(), np.maximum(0.0, of_gpus).tolist(), bound)


def program(columns: Columns) -> highspy.HighsLp:
    """The linear program: a row for each job, then one for each type."""
    count = len(columns.values)
    rows = columns.job_count + len(columns.capacity)
    index = np.empty(2 * count, dtype=np.int32)
    index[0::2] = np.asarray(columns.jobs, dtype=np.int32)
    index[1::2] = columns.job_count + np.asarray(columns.types, dtype=np.int32)
    entries = np.ones(2 * count)
    entries[1::2] = np.asarray(columns.gpus, dtype=np.float64)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = count, rows
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = np.asarray(columns.values, dtype=np.float64)
    lp.col_lower_, lp.col_upper_ = np.zeros(count), np.ones(count)
    lp.row_lower_ = np.full(rows, -highspy.kHighsInf)
    lp.row_upper_ = np.append(np.ones(columns.job_count), np.asarray(columns.capacity, np.float64))
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, 2 * count + 1, 2, dtype=np.int32)
    lp.a_matrix_.index_, lp.a_matrix_.value_ = index, entries
    return lp


def _whole(columns: Columns, near: NDArray[np.intp], shares: Floats, search: Search) -> Floats:
    """The best in whole jobs among the columns that are `near`; `shares` where none is found."""
    jobs, rows = np.unique(np.asarray(columns.jobs)[near], return_inverse=True)
    types, gpus, values = (
        np.asarray(each)[near].tolist() for each in (columns.types, columns.gpus, columns.values)
    )
    lp = program(Columns(rows.tolist(), types, gpus, values, len(jobs), columns.capacity))
    lp.integrality_ = [highspy.HighsVarType.kInteger] * len(near)
    highs = Silent()
    for option, setting in (*SEARCH_OPTIONS, ("mip_max_nodes", search.nodes_max)):
        highs.setOptionValue(option, setting)
    highs.setOptionValue("mip_rel_gap", search.gap_ratio)
    highs.passModel(lp)
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return shares
    found = np.zeros(len(shares))
    found[near] = highs.getSolution().col_value
    return found


def level(
    rates: Floats, needs: Floats, gpus: Floats, capacity: Floats
) -> tuple[Floats, float] | None:
    """The parts of their time that jobs spend on each type so that the worst off, by rate over
    need, is as well off as can be, and how well that is. `rates` has a row for each job."""
    jobs, types = rates.shape
    count = jobs * types
    rows = 2 * jobs + types
    job = np.repeat(np.arange(jobs), types)
    name = np.tile(np.arange(types), jobs)
    index = np.stack([job, jobs + job, 2 * jobs + name], axis=1).ravel()
    entries = np.stack([rates.ravel(), np.ones(count), np.repeat(gpus, types)], axis=1).ravel()
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = count + 1, rows
    lp.sense_ = highspy.ObjSense.kMaximize
    # What the worst off cannot use goes to the others, for next to nothing.
    best = np.maximum(rates.max(axis=1, keepdims=True), 1e-12)
    lp.col_cost_ = np.append((1e-6 / count) * (rates / best).ravel(), 1.0)
    lp.col_lower_ = np.zeros(count + 1)
    lp.col_upper_ = np.append((rates > 0).ravel().astype(np.float64), highspy.kHighsInf)
    lp.row_lower_ = np.append(np.zeros(jobs), np.full(jobs + types, -highspy.kHighsInf))
    lp.row_upper_ = np.concatenate([np.full(jobs, highspy.kHighsInf), np.ones(jobs), capacity])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    starts = np.append(np.arange(0, 3 * count + 1, 3), 3 * count + jobs)
    lp.a_matrix_.start_ = starts.astype(np.int32)
    lp.a_matrix_.index_ = np.append(index, np.arange(jobs)).astype(np.int32)
    lp.a_matrix_.value_ = np.append(entries, -needs)
    found = maximise(lp)
    if found is None:
        return None
    return found[0][:count].reshape(jobs, types), float(found[0][count])


class Silent(highspy.Highs):
    """Without the callbacks, which print a banner on standard output when they are set up."""

    def __init__(self) -> None:
        super(highspy.Highs, self).__init__()
        self.setOptionValue("output_flag", False)


def maximise(lp: highspy.HighsLp) -> tuple[Floats, Floats, float] | None:
    """Values of the columns, prices of the rows, and the objective; None where the iterations were
    not enough or there is no solution."""
    highs = Silent()
    for option, setting in (
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
