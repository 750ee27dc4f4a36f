"""A model that asks each quantile by itself, since demand does not fall as it rises.

Problem: a drift and a spread make bands of one shape. But a project that holds nothing can only
rise, one far above its week falls by whole jobs, and what has been quiet for long is likelier to
stay than to move a little. A band that is one shape at all times is too wide at most of them.

So there are two steps. How far demand rises where it rises, and how far it falls, are two
regressions of a logarithm: on how nervous and how large demand is, and how far from its means
(`_Reaches`). Then each quantile is a sum of these two and of what drifts are made of, by quantile
regression (Koenker and Bassett, Econometrica 46, 1978), solved by weighted least squares over and
over (Hunter and Lange, Quantile Regression via an MM Algorithm, Journal of Computational and
Graphical Statistics 9, 2000). A penalty holds it near what the two alone say. It grows with the
hours ahead: six weeks have a thousand hours, and only forty days.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.forecast.columns import and_lately, from_means
from coordinator.forecast.experts import (
    SCALE_TAILS,
    SMALL_GPUS,
    SMALL_RATIO,
    Lesson,
)
from coordinator.forecast.grid import CHANGE_MIN, HOURS_PER_DAY, HOURS_PER_WEEK, Grid
from coordinator.forecast.quantiles import LEVELS, Floats, of_samples

# Half an hour apart: steps that are nearer teach the same.
ROWS_PER_HOUR: Final = 2
REACH_RIDGE_HOURS: Final = 60.0
# Of a loss whose unit is how far demand usually goes.
PENALTY: Final = 0.03
PENALTY_POWER: Final = 0.8  # of the hours ahead
FREE_RATIO: Final = 0.25
LONG_POWER: Final = 0.25  # of a weight: its half-life is four times as long
# A miss within so much of the usual reach is a square, not an angle: it has a least.
ROUND_RATIO: Final = 0.05
QUIET_RATIO: Final = 0.2  # a reach of less counts as this much there
ROUNDS_MAX: Final = 12
ENOUGH: Final = 1e-3  # a step that changes no number by more is the last
# Models that hear what is told beside the series (`Grid.told`), by that name.
AGES: Final = "ages"
KNOWN_ENDS: Final = "known ends"

Columns = Callable[[Grid], Floats]
Rows = NDArray[np.intp] | slice
NEWEST: Final = slice(-1, None)


@dataclass(frozen=True)
class _Reaches:
    """How far demand goes, up and down: a column each. `typical_gpus` makes distances comparable
    between fleets."""

    typical_gpus: float
    mean: Floats
    spread: Floats
    found: Floats
    low: Floats
    high: Floats

    def __call__(self, grid: Grid, rows: Rows) -> Floats:
        seen = (_circumstances(grid, self.typical_gpus, rows) - self.mean) / self.spread
        return np.exp(np.clip(seen @ self.found, self.low, self.high))


@dataclass(frozen=True)
class Skewed:
    """Fitted. `found` has a column a quantile, in units of `unit_gpus`, of the change beyond what
    is `due`."""

    reaches: _Reaches
    columns: Columns
    due: Columns
    spread: Floats
    unit_gpus: float
    found: Floats

    def forecast(self, grid: Grid) -> Floats:
        """Of demand `ahead` steps after the newest, by `LEVELS`; never below zero."""
        reach = self.reaches(grid, NEWEST) / self.unit_gpus
        change = _rows(reach, self.columns(grid)[NEWEST] / self.spread) @ self.found
        newest = grid.known[-1] + self.due(grid)[-1]
        said: Floats = np.maximum(0.0, np.sort(newest + self.unit_gpus * change[0]))
        return said


def returning(taught: Lesson, ahead: int) -> Skewed:
    """With the means of the last day and week."""
    return fit(taught, from_means, ahead)


def regressed(taught: Lesson, ahead: int) -> Skewed:
    """With all that the ridge regression looks at, and what came and left lately."""
    return fit(taught, lambda grid: and_lately(grid, ahead), ahead)


def freely(taught: Lesson, ahead: int) -> Skewed:
    """The same, held less: where demand breathes by the day there is more to learn."""
    return fit(taught, lambda grid: and_lately(grid, ahead), ahead, held_ratio=FREE_RATIO)


def over_weeks(taught: Lesson, ahead: int) -> Skewed:
    """The same again, where weeks ago count nearly as much as yesterday."""
    return freely(replace(taught, weights=taught.weights**LONG_POWER), ahead)


def aged(taught: Lesson, ahead: int) -> Skewed:
    """From those who are there now and are of an age to stay (`survival.py`): what comes
    besides."""
    return _told(AGES, taught, ahead)


def foretold(taught: Lesson, ahead: int) -> Skewed:
    """The same from what jobs said of their end, which was told at full hours."""
    full = taught.grid.full_hours[taught.past]
    return _told(KNOWN_ENDS, _of(taught, full), ahead, rows_per_hour=1)


def _told(name: str, taught: Lesson, ahead: int, rows_per_hour: int = ROWS_PER_HOUR) -> Skewed:
    kept = _of(taught, ~np.isnan(taught.grid.told[name][taught.past]))

    def leaving(grid: Grid) -> Floats:
        return grid.told[name] - grid.known

    def columns(grid: Grid) -> Floats:
        return np.concatenate([from_means(grid), leaving(grid)[:, None]], axis=1)

    return fit(kept, columns, ahead, leaving, rows_per_hour=rows_per_hour)


def _of(taught: Lesson, there: NDArray[np.bool_]) -> Lesson:
    """These rows of it."""
    return Lesson(taught.grid, taught.past[there], taught.weights[there], taught.changes[there])


def _nothing(grid: Grid) -> Floats:
    return np.zeros(len(grid.values))


def fit(
    taught: Lesson,
    columns: Columns,
    ahead: int,
    due: Columns = _nothing,
    *,
    held_ratio: float = 1.0,
    rows_per_hour: int = ROWS_PER_HOUR,
) -> Skewed:
    """Learn from every half hour of the lesson; of one row an hour, from all of them. `due` is a
    change that is expected anyway; `held_ratio` is of the usual penalty."""
    grid = taught.grid
    apart = max(1, grid.per_hour // rows_per_hour)
    taken = (len(grid.values) - taught.past) % apart == 0 if rows_per_hour > 1 else slice(None)
    past, weights = taught.past[taken], taught.weights[taken]
    changes = taught.changes[taken] - due(grid)[past]
    reaches = _reaches(grid, past, weights, ahead // apart, changes)
    reach = reaches(grid, past)
    alone = of_samples(changes / np.where(changes > 0, reach[:, 0], reach[:, 1]), weights)
    unit_gpus = float(np.average(reach.mean(axis=1), weights=weights))
    reach = reach / unit_gpus
    beside = columns(grid)[past]
    spread = np.sqrt(np.average(beside**2, axis=0, weights=weights)) + 1e-6
    seen = _rows(reach, beside / spread)
    begin = np.zeros((seen.shape[1], len(LEVELS)))
    begin[0], begin[1] = np.maximum(alone, 0.0), np.minimum(alone, 0.0)
    found = _quantile_regression(
        _Task(
            seen,
            changes / unit_gpus,
            weights / weights.sum(),
            ROUND_RATIO * np.maximum(reach.mean(axis=1), QUIET_RATIO),
            held_ratio * PENALTY * (ahead / grid.per_hour) ** PENALTY_POWER,
        ),
        begin,
    )
    return Skewed(reaches, columns, due, spread, unit_gpus, found)


def _rows(reach: Floats, beside: Floats) -> Floats:
    return np.concatenate([reach, np.ones((len(reach), 1)), beside], axis=1)


def _circumstances(grid: Grid, typical_gpus: float, rows: Rows) -> Floats:
    """A constant first; what a reach depends on."""
    sizes = np.stack([grid.known, grid.mean(HOURS_PER_DAY), grid.mean(HOURS_PER_WEEK)], axis=1)
    far = from_means(grid)[rows] / typical_gpus
    return np.concatenate(
        [grid.nervousness[rows], np.log(sizes[rows] + 1.0), np.arcsinh(far)], axis=1
    )


def _reaches(
    grid: Grid, past: NDArray[np.intp], weights: Floats, ahead: int, changes: Floats
) -> _Reaches:
    """`ahead` is in rows: so many have one outcome in common, so the penalty has to hold against
    as many times the weight."""
    median = float(np.median(np.abs(changes)))
    typical_gpus = median + CHANGE_MIN
    seen = _circumstances(grid, typical_gpus, past)
    mean = np.average(seen, axis=0, weights=weights)
    spread = np.sqrt(np.average((seen - mean) ** 2, axis=0, weights=weights)) + 1e-6
    mean[0], spread[0] = 0.0, 1.0
    seen = (seen - mean) / spread
    weighed = seen * weights[:, None]
    penalty = np.full(seen.shape[1], REACH_RIDGE_HOURS * ahead)
    penalty[0] = 1e-6  # the constant is free
    gone = np.maximum(np.stack([changes, -changes], axis=1), 0.0)
    target = np.log(gone + SMALL_RATIO * median + SMALL_GPUS)
    square = weighed.T @ seen + np.diag(penalty)
    found: Floats = np.linalg.solve(square, weighed.T @ target).astype(np.float64)
    low, high = np.quantile(target, SCALE_TAILS, axis=0)
    return _Reaches(typical_gpus, mean, spread, found, low, high)


@dataclass(frozen=True)
class _Task:
    """Rows of `seen`, what followed, how much each counts (one in all), and how round it is."""

    seen: Floats
    followed: Floats
    weights: Floats
    rounded: Floats
    penalty: float


def _quantile_regression(task: _Task, begin: Floats) -> Floats:
    """The numbers by which each quantile is the sum of what is seen; a column a quantile."""
    found = begin.copy()
    held = task.penalty * np.eye(len(begin))
    for place, level in enumerate(LEVELS):
        pull = task.seen.T @ (task.weights * (level - 0.5))
        for _ in range(ROUNDS_MAX):
            wrong = task.followed - task.seen @ found[:, place]
            steep = 0.5 * task.weights / np.maximum(task.rounded, np.abs(wrong))
            away = found[:, place] - begin[:, place]
            slope = pull + task.seen.T @ (steep * wrong) - task.penalty * away
            curve = task.seen.T @ (task.seen * steep[:, None]) + held
            step = np.linalg.solve(curve, slope)
            found[:, place] += step
            if np.abs(step).max() < ENOUGH:
                break
    return found
