"""The maximum of the next minutes, from how far demand has risen within as many minutes lately.

Problem: a node that takes ten minutes to boot has to be started for the most that is wanted until
then, which is more than what is wanted at their end: a forecast of the end is too low. And what a
fleet of this size does within minutes nobody knows before having watched it for a day.

So, each minute:
1. Of the last two weeks, minute by minute: by how much the maximum of the `ahead` minutes after it
   was above or below it. The quantiles of that, on top of what is wanted now, are the forecast.
   Where a minute of those is unknown nothing is learned from it.
2. With less than a day of it, what is wanted now and a buffer on top: the running maximum of a
   random walk, whose step of an hour is a root of the size of demand (arrivals that know nothing of
   one another); of it the quantile q is that of a normal distribution at (1 + q) / 2. Below the
   median it is what is wanted now: GPUs are whole, and often nothing comes.
"""

import math
from array import array
from statistics import NormalDist
from typing import Final

import numpy as np

from coordinator.forecast.quantiles import LEVELS, Floats

MINUTES_PER_DAY: Final = 1_440
KEPT_MIN: Final = 14 * MINUTES_PER_DAY
# What is learned changes slowly, and takes some ten milliseconds.
LEARN_EVERY_MIN: Final = 10
# Standard normal quantiles of the running maximum, in the order of LEVELS.
_RUNNING: Final = np.array(
    [NormalDist().inv_cdf((1 + level) / 2) if level >= 0.5 else 0.0 for level in LEVELS]
)


class RecentMaximum:
    """Of one series; a step is a minute."""

    def __init__(self, kept_min: int = KEPT_MIN) -> None:
        self._kept_min = kept_min
        self._values = array("d")
        self._rises: dict[int, tuple[int, Floats | None]] = {}
        self._seen = 0

    def observe(self, gpus: float) -> None:
        """Demand of the next minute; NaN where nobody knows."""
        self._seen += 1
        self._values.append(gpus)
        if len(self._values) >= 2 * self._kept_min:
            del self._values[: -self._kept_min]

    def forecast(self, ahead_min: int) -> Floats:
        """By `LEVELS`, of the maximum over the next minutes; the newest one must be known."""
        newest = self._values[-1]
        if math.isnan(newest):
            raise ValueError("a forecast is made from a minute that is known")
        learned_at, rises = self._rises.get(ahead_min, (-LEARN_EVERY_MIN, None))
        if self._seen - learned_at >= LEARN_EVERY_MIN:
            rises = self._learn(ahead_min)
            self._rises[ahead_min] = self._seen, rises
        if rises is None:
            step = math.sqrt(max(1.0, newest) * ahead_min / 60)
            return newest + step * _RUNNING
        return np.maximum(0.0, newest + rises)

    def _learn(self, ahead_min: int) -> Floats | None:
        values = np.array(self._values[-self._kept_min :])
        if len(values) - int(np.isnan(values).sum()) < MINUTES_PER_DAY + ahead_min:
            return None
        after = np.lib.stride_tricks.sliding_window_view(values[1:], ahead_min).max(axis=1)
        rises = after - values[: len(after)]
        rises = rises[~np.isnan(rises)]
        return np.quantile(rises, LEVELS) if len(rises) >= MINUTES_PER_DAY // 2 else None
