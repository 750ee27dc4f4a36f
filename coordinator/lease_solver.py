"""HiGHS behind `SolveLinear`: the linear programs of leases.

Problem: they are thousands of rows that are nearly empty, and a replay has to decide the same, so
the solver is limited by iterations and never by the clock. The package is an extra
(`gpu-baton[scheduling]`); without it leases are decided by `leasing.py` alone.
"""

from typing import Final

import highspy
import numpy as np

from coordinator.core.linear import Linear, Optimum
from coordinator.solver import Silent

# Some twenty times what half a year of hours with deferrable work has taken.
ITERATIONS_MAX: Final = 1_000_000


def solve(program: Linear) -> Optimum | None:
    """The least cost; `None` where the iterations were not enough or nothing fits."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(program.costs), len(program.row_low)
    lp.col_cost_ = np.asarray(program.costs, np.float64)
    lp.col_lower_ = np.asarray(program.low, np.float64)
    lp.col_upper_ = np.asarray(program.high, np.float64)
    lp.row_lower_ = np.asarray(program.row_low, np.float64)
    lp.row_upper_ = np.asarray(program.row_high, np.float64)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.asarray(program.starts, np.int32)
    lp.a_matrix_.index_ = np.asarray(program.columns, np.int32)
    lp.a_matrix_.value_ = np.asarray(program.factors, np.float64)
    highs = Silent()
    for option, setting in (("threads", 1), ("simplex_iteration_limit", ITERATIONS_MAX)):
        highs.setOptionValue(option, setting)
    highs.passModel(lp)
    highs.run()
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    found = highs.getSolution()
    cost = float(highs.getInfo().objective_function_value)
    return Optimum(list(found.col_value), list(found.row_dual), cost)
