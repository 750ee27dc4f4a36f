"""The models of a forecast: each says by how much demand will change, and how sure that is.

Problem: over an hour nothing beats "as now", over a day demand comes back to its mean, and some
fleets breathe with the hour of the day; which of it holds is a matter of the fleet and of the week.
So there are a few models, all cheap, each fitted anew once a day on the last weeks, and
`mixture.py` finds out whom to believe.

Those here have one form: demand now, plus a drift, plus a spread, whose quantiles are those of what
the model got wrong. `drift` is none, the usual change at that hour (`profile`), or a ridge
regression on the means of hours and days, on the time, and on the same hours of yesterday and last
week. `scaled` experts divide what went wrong by how nervous demand was, by a regression of its
logarithm (`Grid.nervousness`), so that a quiet night has narrow bands. Those whose bands change
their shape are in `skewed.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.forecast.columns import all_of_it
from coordinator.forecast.grid import HOURS_PER_DAY, Grid
from coordinator.forecast.quantiles import Floats, of_samples

WINDOW_DAYS: Final = 42  # that is learned from: six of each weekday
HALF_LIFE_DAYS: Final = 14.5  # how fast it is forgotten within
# Of all weight, on the diagonal of features of variance one, times the root of the hours ahead:
# a tenth pulls to no drift at all.
RIDGE: Final = 0.1
SCALE_RIDGE_HOURS: Final = 5.0
# What went wrong by almost nothing has no logarithm to learn from: this part of the median.
SMALL_RATIO: Final = 0.3
SMALL_GPUS: Final = 0.05
# A scale is not taken further than where nine of ten samples were.
SCALE_TAILS: Final = (0.02, 0.98)
# A quiet hour teaches drift at most so many times as much as a usual one.
QUIET_MAX: Final = 4.0
PROFILE_DAYS: Final = 3.0  # as many days of no change as each hour begins with


@dataclass(frozen=True)
class Lesson:
    """What there is to learn from: the steps `past` whose outcome is known, and what happened."""

    grid: Grid
    past: NDArray[np.intp]
    weights: Floats
    changes: Floats


@dataclass(frozen=True)
class Fitted:
    """An expert that has learned. `quantiles` are of what went wrong, in units of the scale."""

    drift: Callable[[Grid], Floats]
    scale: Callable[[Grid], Floats]
    quantiles: Floats

    def forecast(self, grid: Grid) -> Floats:
        """Of demand `ahead` steps after the newest, by `LEVELS`; never below zero."""
        newest = grid.known[-1] + self.drift(grid)[-1]
        said: Floats = np.maximum(0.0, newest + self.scale(grid)[-1] * self.quantiles)
        return said


Drift = Callable[[Lesson, Floats, int], Callable[[Grid], Floats]]


def lesson(grid: Grid, ahead: int) -> Lesson:
    """The last weeks of it, the newer the heavier."""
    changes = grid.change_ahead(ahead)
    day = HOURS_PER_DAY * grid.per_hour
    past = np.flatnonzero(~np.isnan(changes))
    past = past[past >= len(changes) - ahead - WINDOW_DAYS * day]
    age_days = (len(changes) - past) / day
    return Lesson(grid, past, 0.5 ** (age_days / HALF_LIFE_DAYS), changes[past])


def fit(taught: Lesson, drift: Drift, ahead: int, *, scaled: bool) -> Fitted:
    """An expert with this drift."""
    usual = scale_of(taught, taught.changes)(taught.grid)[taught.past]
    trust = taught.weights * np.minimum(QUIET_MAX, np.median(usual) / usual)
    drifts = drift(taught, trust, ahead)
    wrong = taught.changes - drifts(taught.grid)[taught.past]
    scale = scale_of(taught, wrong) if scaled else _level
    relative = wrong / scale(taught.grid)[taught.past]
    return Fitted(drifts, scale, of_samples(relative, taught.weights))


def _level(grid: Grid) -> Floats:
    return np.ones(len(grid.values))


def scale_of(taught: Lesson, wrong: Floats) -> Callable[[Grid], Floats]:
    """How far from zero `wrong` usually is, by how nervous demand was."""
    size = np.abs(wrong)
    target = np.log(size + SMALL_RATIO * np.median(size) + SMALL_GPUS)
    features = taught.grid.nervousness[taught.past]
    weighed = features * taught.weights[:, None]
    square = weighed.T @ features
    penalty = np.full(len(square), SCALE_RIDGE_HOURS * taught.grid.per_hour)
    penalty[0] = 1e-6  # the constant is free
    found = np.linalg.solve(square + np.diag(penalty), weighed.T @ target)
    low, high = np.quantile(target, SCALE_TAILS)

    def scale(grid: Grid) -> Floats:
        return np.exp(np.clip(grid.nervousness @ found, low, high))

    return scale


def still(taught: Lesson, trust: Floats, ahead: int) -> Callable[[Grid], Floats]:
    """Demand stays what it is."""
    return lambda grid: np.zeros(len(grid.values))


def profile(taught: Lesson, trust: Floats, ahead: int) -> Callable[[Grid], Floats]:
    """It changes as it usually does from this hour of the day on."""
    hour = taught.grid.hour_of_day()[taught.past].astype(np.intp)
    summed = np.bincount(hour, taught.weights * taught.changes, HOURS_PER_DAY)
    weight = np.bincount(hour, taught.weights, HOURS_PER_DAY)
    usual = summed / (weight + PROFILE_DAYS * taught.grid.per_hour)
    return lambda grid: usual[grid.hour_of_day().astype(np.intp)]


def ridge(taught: Lesson, trust: Floats, ahead: int) -> Callable[[Grid], Floats]:
    """Its distance from several means, and what followed a day and a week ago."""

    return _regression(taught, trust, lambda grid: all_of_it(grid, ahead), ahead)


def _regression(
    taught: Lesson, trust: Floats, features: Callable[[Grid], Floats], ahead: int
) -> Callable[[Grid], Floats]:
    seen = features(taught.grid)[taught.past]
    spread = np.sqrt((seen**2 * taught.weights[:, None]).sum(0) / taught.weights.sum()) + 1e-6
    seen = seen / spread
    weighed = seen * trust[:, None]
    pull = RIDGE * np.sqrt(ahead / taught.grid.per_hour)
    square = weighed.T @ seen + pull * trust.sum() * np.eye(seen.shape[1])
    found = np.linalg.solve(square, weighed.T @ taught.changes) / spread
    return lambda grid: features(grid) @ found
