"""The most that will be wanted at once within the next steps, by quantile.

Problem: a node that is missing for ten minutes of an hour lets work wait, and the median of demand
in an hour does not show it. What a fleet needs until a node could boot is the quantile of the
*maximum*, and it is asked for each minute, so it has to be cheap.

How: the maximum is demand now plus a rise. How large rises are follows how nervous demand was in
the last quarter of an hour, hours and days, and the time of day and week: a regression of the
logarithm, fitted anew once a day.
What is left, rises in units of that scale, has quantiles that hold at any hour; the newer ones
count more. They are moved a little after each outcome, up where it was above and down where not,
so that in the long run each is exceeded as often as it says (Gibbs and Candes, Adaptive Conformal
Inference Under Distribution Shift, NeurIPS 2021). Before a day is known rises are taken to be those
of a random walk whose step of an hour is a root of demand.

What is learned, and when, follows from the numbers of the steps, not from where somebody began to
look: whoever is told the same series anew says the same.

Older days are known by means of ten minutes only (`tell_older`), and a mean hides a part of what
rises and of how nervous demand was. By how much is seen on the days that are known by both, and by
so much the older ones are set right; their rises are never made smaller. What it brings:
docs/experiments.md, "The right nodes on".
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from coordinator.forecast.quantiles import LEVELS, Floats, of_samples

NERVOUS_H: Final = (0.25, 1.0, 3.0, 12.0, 72.0)
# A day, half of one, and a week.
WAVES_H: Final = (24, 12, 168)
# Rises are learned from every ten minutes at most, over two months.
LESSONS_PER_H: Final = 6
KEPT_DAYS: Final = 60
HALF_LIFE_DAYS: Final = 21.0
DAY_H: Final = 24
COVERED_DAYS: Final = 3
# Half a GPU: a rise of none has a logarithm, and nearer than this is no miss.
RISE_MIN: Final = 0.5
RIDGE_HOURS: Final = 3.0
WAVES_RIDGE_HOURS: Final = 30.0  # a wave of two days is none yet
# A scale is not taken further than where most of what was seen was.
SCALE_TAILS: Final = (0.02, 0.99)
# A miss moves a quantile by this part of the distance from the median to the outermost.
STEP_RATIO: Final = 0.005
# Of the maximum of a random walk over one step of it, by LEVELS: |z| of a standard normal.
REFLECTED: Final = np.array([0.031, 0.063, 0.126, 0.319, 0.674, 1.15, 1.645, 1.96, 2.241])
OUTER_LOW, OUTER_HIGH = 0, len(LEVELS) - 1
MEDIAN: Final = len(LEVELS) // 2


@dataclass(frozen=True, slots=True)
class Asked:
    """What was known at a step, and what was said of it where anything was."""

    gpus: float
    features: Floats
    said: Floats | None
    learns: bool


@dataclass(frozen=True, slots=True)
class Fit:
    """The scale of rises by features, and their quantiles in units of it."""

    weights: Floats
    low: float
    high: float
    quantiles: Floats

    def scale(self, features: Floats) -> float:
        return float(np.exp(np.clip(features @ self.weights, self.low, self.high)))


class MaximumForecaster:
    """Of one series over the next `ahead` steps, the present one included. A day of steps begins
    with each number that it divides; `first_step` is that of the first observation."""

    def __init__(self, ahead: int, per_hour: int, first_step: int = 0) -> None:
        if ahead < 1 or per_hour < 1:
            raise ValueError("a maximum is over one step at least, of an hour at most")
        self._ahead, self._per_hour = ahead, per_hour
        self._every = max(1, per_hour // LESSONS_PER_H)
        kept = KEPT_DAYS * DAY_H * per_hour // self._every
        self._features: deque[Floats] = deque(maxlen=kept)
        self._rises: deque[float] = deque(maxlen=kept)
        self._covered: deque[bool] = deque(maxlen=COVERED_DAYS * DAY_H * per_hour)
        self._asked: deque[Asked] = deque()
        self._values: deque[float] = deque(maxlen=ahead)
        self._nervous: list[float] | None = None
        self._newest = math.nan
        self._fit: Fit | None = None
        self._offsets = np.zeros(len(LEVELS))
        self._first_step = self._steps = first_step
        self._known_steps = 0

    def observe(self, gpus: float) -> None:
        """Demand of the next step; NaN where nobody knows. Negative or infinite is an error."""
        if gpus < 0 or math.isinf(gpus):
            raise ValueError(f"demand is a count of GPUs, not {gpus}")
        self._steps += 1
        self._values.append(gpus)
        self._settle()
        if not math.isnan(gpus):
            change = 0.0 if math.isnan(self._newest) else abs(gpus - self._newest)
            self._grow_nervous(change)
            self._newest = gpus
            self._known_steps += 1
        day = DAY_H * self._per_hour
        if self._known_steps >= day and (self._fit is None or self._steps % day == 0):
            self._learn()
        learns = self._steps % self._every == 0
        said = self.forecast() if self._fit is not None else None
        self._asked.append(Asked(gpus, self._now(), said, learns))

    def tell_older(self, means: Sequence[float], first_step: int) -> None:
        """Of the same series `LESSONS_PER_H` means an hour, NaN where nobody knows, from days
        before the first observation on until now; call it once, after the observations. Nothing is
        learned of it where less than a day of lessons is known by both."""
        before = self._first_step * LESSONS_PER_H // self._per_hour - first_step
        if before <= 0:
            return
        ahead = math.ceil(self._ahead * LESSONS_PER_H / self._per_hour)
        by_mean = MaximumForecaster(ahead, LESSONS_PER_H, first_step)
        for gpus in means[:before]:
            by_mean.observe(gpus)
        older = len(by_mean._rises)
        for gpus in means[before:]:
            by_mean.observe(gpus)
        both = min(len(by_mean._rises) - older, len(self._rises))
        if not older or both < DAY_H * LESSONS_PER_H:
            return
        features, rises = (np.array(each) for each in (by_mean._features, by_mean._rises))
        own = np.array(self._features)[:both], np.array(self._rises)[:both]
        hidden = own[0].mean(axis=0) - features[older : older + both].mean(axis=0)
        hidden[1 + len(NERVOUS_H) :] = 0.0  # time is the same for both
        logs = np.log(rises + RISE_MIN)
        grown = max(0.0, np.log(own[1] + RISE_MIN).mean() - logs[older : older + both].mean())
        rises = np.maximum(0.0, np.exp(logs[:older] + grown) - RISE_MIN)
        kept = self._rises.maxlen
        self._features = deque([*(features[:older] + hidden), *self._features], kept)
        self._rises = deque([*map(float, rises), *self._rises], kept)
        self._learn()

    def forecast(self) -> Floats:
        """By `LEVELS`, rising, none below demand now; zeros before the first observation."""
        if math.isnan(self._newest):
            return np.zeros(len(LEVELS))
        if self._fit is None:
            step = math.sqrt(max(1.0, self._newest) * self._ahead / self._per_hour)
            return self._newest + step * REFLECTED
        rise = self._fit.scale(self._now()) * (self._fit.quantiles + self._offsets)
        said: Floats = self._newest + np.maximum.accumulate(np.maximum(0.0, rise))
        return said

    @property
    def coverage(self) -> float | None:
        """How much of what came lay within the 95% bands over three days; None before that."""
        full = len(self._covered) == self._covered.maxlen
        return sum(self._covered) / len(self._covered) if full else None

    def _now(self) -> Floats:
        """A constant, how nervous demand is, and the time."""
        nervous = self._nervous or [0.0] * len(NERVOUS_H)
        turn = 2 * math.pi * self._steps / self._per_hour
        waves = [wave(turn / hours) for hours in WAVES_H for wave in (math.sin, math.cos)]
        return np.array(
            [
                1.0,
                *(math.log(each + RISE_MIN) for each in nervous),
                *waves,
            ]
        )

    def _grow_nervous(self, change: float) -> None:
        """Means of the change of a step, forgotten within so many hours."""
        if self._nervous is None:
            self._nervous = [change] * len(NERVOUS_H)
            return
        for place, hours in enumerate(NERVOUS_H):
            part = 1.0 - math.exp(-1.0 / max(1.0, hours * self._per_hour))
            self._nervous[place] += part * (change - self._nervous[place])

    def _settle(self) -> None:
        """The outcome of what was asked `ahead` steps ago."""
        if len(self._asked) < self._ahead:
            return
        asked = self._asked.popleft()
        highest = max(self._values)  # NaN or not, `isnan` below tells
        if math.isnan(asked.gpus) or any(map(math.isnan, self._values)):
            return
        rise = max(0.0, highest - asked.gpus)
        if asked.learns:
            self._features.append(asked.features)
            self._rises.append(rise)
        if asked.said is None or self._fit is None:
            return
        came = asked.gpus + rise
        held = came <= asked.said + RISE_MIN
        unit = self._fit.quantiles[OUTER_HIGH] - self._fit.quantiles[MEDIAN]
        self._offsets = self._offsets + STEP_RATIO * unit * (LEVELS - held)
        low = came >= asked.said[OUTER_LOW] - RISE_MIN
        self._covered.append(bool(low and held[OUTER_HIGH]))

    def _learn(self) -> None:
        if len(self._rises) < DAY_H * self._per_hour // self._every // 2:
            return
        rises = np.array(self._rises)
        features = np.stack(list(self._features))
        ages_days = np.arange(len(rises), 0, -1) * self._every / (DAY_H * self._per_hour)
        weights = 0.5 ** (ages_days / HALF_LIFE_DAYS)
        target = np.log(rises + RISE_MIN)
        weighed = features * weights[:, None]
        lessons_per_h = self._per_hour / self._every
        penalty = np.full(features.shape[1], RIDGE_HOURS * lessons_per_h)
        penalty[1 + len(NERVOUS_H) :] = WAVES_RIDGE_HOURS * lessons_per_h
        penalty[0] = 1e-6  # the constant is free
        square = weighed.T @ features + np.diag(penalty)
        found = np.asarray(np.linalg.solve(square, weighed.T @ target), np.float64)
        low, high = np.quantile(target, SCALE_TAILS)
        scale = np.exp(np.clip(features @ found, low, high))
        self._fit = Fit(found, float(low), float(high), of_samples(rises / scale, weights))
