"""Trees that ask each quantile by itself. Imports `lightgbm`, which is an extra.

Problem: a regression is a sum, and what happens in one corner of what it looks at (a Monday morning
after a quiet weekend) bends it everywhere. Trees find such corners, and where there are none they
do harm; so they are one model of the mixture, from three weeks on, and the mixture finds out.

How: gradient-boosted trees of the pinball loss (Friedman, Greedy Function Approximation, Annals of
Statistics 29, 2001; LightGBM, Ke and others, NeurIPS 2017), for each quantile a few small ones. All
is in units of how far demand usually goes from where it is, so that a quiet night and a project
that has grown teach one another. A leaf needs days, not hours: hours of one day have one outcome in
common. The same lesson gives the same trees: one thread, no chance, a fixed number of rounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import lightgbm
import numpy as np
from numpy.typing import NDArray

from coordinator.forecast import experts
from coordinator.forecast.columns import and_lately
from coordinator.forecast.forecaster import THREE_WEEKS_H, Kind
from coordinator.forecast.grid import HOURS_PER_DAY, HOURS_PER_WEEK, Grid
from coordinator.forecast.quantiles import LEVELS, Floats

ROUNDS: Final = 60
# A leaf is at least what so many outcomes are that have nothing in common, and so many hours.
LEAF_OUTCOMES_MIN: Final = 3
LEAF_HOURS_MIN: Final = 40
SETTINGS: Final = {
    "objective": "quantile",
    "num_leaves": 8,
    "learning_rate": 0.05,
    "max_bin": 63,  # of a thousand rows; a third of the time that the usual 255 take
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 1,
    "verbosity": -1,
}


@dataclass(frozen=True)
class Boosted:
    """Fitted: a row of trees for each quantile, of changes in units of the scale."""

    ahead: int
    scale: Callable[[Grid], Floats]
    trees: Sequence[lightgbm.Booster]

    def forecast(self, grid: Grid) -> Floats:
        """Of demand `ahead` steps after the newest, by `LEVELS`; never below zero."""
        unit = self.scale(grid)[-1:]
        seen = _seen(grid, self.ahead, unit, slice(-1, None))
        changes = [float(np.asarray(each.predict(seen))[0]) for each in self.trees]
        said: Floats = np.maximum(0.0, np.sort(grid.known[-1] + unit[0] * np.array(changes)))
        return said


def fit(taught: experts.Lesson, ahead: int) -> Boosted:
    """Learn from every hour of the lesson."""
    grid = taught.grid
    taken = (len(grid.values) - taught.past) % grid.per_hour == 0
    past = taught.past[taken]
    scale = experts.scale_of(taught, taught.changes)
    unit = scale(grid)[past]
    leaf = max(LEAF_HOURS_MIN, LEAF_OUTCOMES_MIN * ahead // grid.per_hour)
    settings = {**SETTINGS, "min_data_in_leaf": leaf}
    rows = lightgbm.Dataset(
        _seen(grid, ahead, unit, past),
        taught.changes[taken] / unit,
        weight=taught.weights[taken],
        params=settings,
        free_raw_data=False,
    )
    # Kept as they are: to write a model as text and read it again is a tenth of the time.
    trees = [
        lightgbm.train(
            {**settings, "alpha": float(level)}, rows, ROUNDS, keep_training_booster=True
        )
        for level in LEVELS
    ]
    return Boosted(ahead, scale, trees)


def _seen(grid: Grid, ahead: int, unit: Floats, rows: NDArray[np.intp] | slice) -> Floats:
    sizes = np.stack([grid.known, grid.mean(HOURS_PER_DAY), grid.mean(HOURS_PER_WEEK)], axis=1)
    return np.concatenate(
        [
            and_lately(grid, ahead)[rows] / unit[:, None],
            grid.nervousness[rows, 1:],
            np.log(sizes[rows] + 1.0),
        ],
        axis=1,
    )


KIND: Final = Kind("boosted trees", fit, THREE_WEEKS_H, 0.0)
