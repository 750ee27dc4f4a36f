"""Demand at equal steps of time, as experts look at it: without gaps, and how nervous it is.

Problem: a collector that is away leaves holes, and an outage of the cluster looks like no demand at
all. Whoever learns from either forecasts the next outage. So a gap is a NaN: it is bridged by a
straight line where a mean needs a value, and nothing is ever learned from it or judged by it.

How nervous demand is, `nervousness`, is what bands are scaled by: the mean change of a step over
the last hours and days, and the time of day and of week.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.forecast.quantiles import Floats

HOURS_PER_DAY: Final = 24
HOURS_PER_WEEK: Final = 168
NERVOUS_HOURS: Final = (3, 12, 48, 168)
# Half a GPU: the change of a step has a logarithm where nothing changed.
CHANGE_MIN: Final = 0.5
# By model that hears it, for each step: as many of the GPUs wanted then as were expected, then, to
# be wanted still when a forecast is about. NaN where nobody said.
Told = Mapping[str, Floats]


def at_step(told: Told, step: int) -> dict[str, float]:
    return {name: float(said[step]) for name, said in told.items()}


@dataclass(frozen=True)
class Grid:
    """`values` are GPUs, one each `1 / per_hour` hours, the newest last; NaN where nobody knows.
    `first` is the number of the first step since the beginning of a day: what was dropped keeps
    the time of day. `told` has a series, as long as `values`, for each model that hears any."""

    values: Floats
    per_hour: int
    first: int = 0
    told: Told = field(default_factory=dict)
    _made: dict[Hashable, Floats] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def steps(self) -> Floats:
        """Their numbers since the beginning of a day."""
        return np.arange(self.first, self.first + len(self.values), dtype=np.float64)

    @cached_property
    def known(self) -> Floats:
        """The values, gaps bridged."""
        there = np.flatnonzero(~np.isnan(self.values))
        return np.interp(np.arange(len(self.values)), there, self.values[there])

    def mean(self, hours: int) -> Floats:
        """Of the last `hours` at each step, itself included; of fewer at the beginning."""
        return self.once(hours, lambda: _trailing(self.known, hours * self.per_hour))

    def once(self, key: Hashable, make: Callable[[], Floats]) -> Floats:
        """What `make` makes of this grid under that key, made only the first time: several models
        look at the same."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def least(self, hours: int) -> Floats:
        """From `hours` ago until each step, both included; of fewer at the beginning."""
        return _trailing_least(self.known, hours * self.per_hour + 1)

    def most(self, hours: int) -> Floats:
        """Like `least`."""
        return -_trailing_least(-self.known, hours * self.per_hour + 1)

    def change_ahead(self, ahead: int) -> Floats:
        """By how much demand changes within `ahead` steps; NaN where that is not known (yet)."""
        change = np.full(len(self.values), np.nan)
        if ahead < len(self.values):
            change[:-ahead] = self.values[ahead:] - self.values[:-ahead]
        return change

    @cached_property
    def full_hours(self) -> NDArray[np.bool_]:
        """Whether an hour is over at the end of each step."""
        ends = np.arange(self.first + 1, self.first + len(self.values) + 1)
        full: NDArray[np.bool_] = ends % self.per_hour == 0
        return full

    def hour_of_day(self) -> Floats:
        return (self.steps // self.per_hour) % HOURS_PER_DAY

    @cached_property
    def nervousness(self) -> Floats:
        """Shape (steps, features): a constant, the logarithms, and waves of the day and week."""
        changes = np.abs(np.diff(self.known, prepend=self.known[0]))
        columns = [np.ones(len(changes))]
        for hours in NERVOUS_HOURS:
            mean = _trailing(changes, hours * self.per_hour) * self.per_hour
            columns.append(np.log(mean + CHANGE_MIN))
        turn = 2 * np.pi * self.steps / self.per_hour
        for hours_ in (HOURS_PER_DAY, HOURS_PER_DAY // 2, HOURS_PER_WEEK):
            columns += [np.sin(turn / hours_), np.cos(turn / hours_)]
        return np.stack(columns, axis=1)


def _trailing(values: Floats, steps: int) -> Floats:
    summed = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - steps)
    mean: Floats = (summed[ends] - summed[starts]) / (ends - starts)
    return mean


def _trailing_least(values: Floats, steps: int) -> Floats:
    """In a time that does not grow with `steps`: of two blocks that a window touches, what is least
    from its begin on, and up to its end (van Herk, Pattern Recognition Letters 13, 1992)."""
    filler = np.full(-len(values) % steps, np.inf)
    blocks = np.concatenate([np.full(steps, np.inf), values, filler]).reshape(-1, steps)
    until = np.minimum.accumulate(blocks, axis=1).ravel()
    since = np.minimum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    ends = np.arange(steps, steps + len(values))
    return np.minimum(since[ends - steps + 1], until[ends])
