"""Linear programs as values: what a planner asks of a solver, and what it gets back.

Problem: a plan that calls a solver cannot be tested without one, nor replayed with another. So the
core writes its program down column by column and row by row, and whoever solves it is a function
(`SolveLinear`) that is handed in; `coordinator/lease_solver.py` has HiGHS behind it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Linear:
    """Minimise the sum of `costs` times x, each x within its bounds and each row's sum within its
    own. Row i has the entries from `starts[i]` to `starts[i + 1]` of `columns` and `factors`."""

    costs: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    row_low: Sequence[float]
    row_high: Sequence[float]
    starts: Sequence[int]
    columns: Sequence[int]
    factors: Sequence[float]


@dataclass(frozen=True, slots=True)
class Optimum:
    """`prices` are by row: by how much the cost grows where its bound grows by one."""

    values: Sequence[float]
    prices: Sequence[float]
    cost: float


# None where nothing was found within the solver's limit.
SolveLinear = Callable[[Linear], Optimum | None]


@dataclass(slots=True)
class Draft:
    """A program that is being written."""

    costs: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    row_low: list[float] = field(default_factory=list)
    row_high: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    columns: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def column(self, cost: float, low: float = 0.0, high: float = math.inf) -> int:
        """A quantity; its number."""
        self.costs.append(cost)
        self.low.append(low)
        self.high.append(high)
        return len(self.costs) - 1

    def row(
        self, entries: Sequence[tuple[int, float]], low: float = -math.inf, high: float = math.inf
    ) -> int:
        """A sum of quantities, each with its factor; its number."""
        for column, factor in entries:
            self.columns.append(column)
            self.factors.append(factor)
        self.starts.append(len(self.columns))
        self.row_low.append(low)
        self.row_high.append(high)
        return len(self.row_low) - 1

    def done(self) -> Linear:
        return Linear(
            tuple(self.costs), tuple(self.low), tuple(self.high), tuple(self.row_low),
            tuple(self.row_high), tuple(self.starts), tuple(self.columns), tuple(self.factors),
        )  # fmt: skip
