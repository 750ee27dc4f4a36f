"""How many GPUs will be wanted so many hours ahead, with quantiles, from what was wanted so far.

Problem: a forecast is needed from a fleet's first hour on, and models that need weeks do harm
before they have them. So there is a ladder, by hours of clean history, and each rung adds to the
one below:

    less than a day      demand as it is, and a buffer above it (`reactive`)
    a day to a week      persistence, with bands from its own errors
    one to three weeks   bands by how nervous demand is; the hour of the day; each quantile by
                         itself (`skewed.py`), and from ten days on with all that is known; who of
                         those that hold GPUs stays, where that is told: by their ages
                         (`survival.py`), and by what they say themselves
    beyond that          a ridge regression on all of it, and trees where their library is installed
                         and somebody asks for them (`boosted.py`); the two that know least make way

Persistence stays among them all the way up, and `mixture.py` weighs them. Experts are fitted anew
once a day, on a bounded window; an observation costs microseconds, a forecast a millisecond or two.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from coordinator.forecast import experts, skewed
from coordinator.forecast.experts import Drift, Lesson
from coordinator.forecast.grid import HOURS_PER_DAY, Grid
from coordinator.forecast.mixture import Mixture
from coordinator.forecast.quantiles import LEVELS, NORMAL, Floats

# What experts learn from, and a week before it for their means.
KEPT_DAYS: Final = experts.WINDOW_DAYS + 8
DAY_H, WEEK_H, TEN_DAYS_H, THREE_WEEKS_H = 24, 168, 240, 504
# Before anything was seen: demand changes like a random walk whose step of an hour is this part of
# a root of its size (arrivals that know nothing of one another), and at least a GPU.
REACTIVE_RATIO: Final = 1.0


class Expert(Protocol):
    """A model that has learned."""

    def forecast(self, grid: Grid) -> Floats: ...


# From what there is to learn and the steps ahead.
Fit = Callable[[Lesson, int], Expert]


def _spread(drift: Drift, *, scaled: bool) -> Fit:
    return lambda taught, ahead: experts.fit(taught, drift, ahead, scaled=scaled)


@dataclass(frozen=True)
class Kind:
    """A model, from how many hours of clean history on and until when, and by how much it is
    doubted at first. One that `needs_told` counts the hours in which it was told, under its name,
    who stays, and sleeps in others; `told_hourly`: at full hours, and now."""

    name: str
    fit: Fit
    clean_h_min: int
    handicap: float
    needs_told: bool = False
    told_hourly: bool = False
    clean_h_max: float = math.inf

    def told_h(self, taught: Lesson) -> float:
        """Of what there is to learn from."""
        there = ~np.isnan(taught.grid.told[self.name][taught.past])
        if self.told_hourly:
            return int(np.count_nonzero(there & taught.grid.full_hours[taught.past]))
        return int(np.count_nonzero(there)) / taught.grid.per_hour


KINDS: Final = (
    Kind("persistence", _spread(experts.still, scaled=False), DAY_H, 0.03),
    Kind(
        "scaled persistence",
        _spread(experts.still, scaled=True),
        WEEK_H,
        0.0,
        clean_h_max=THREE_WEEKS_H,
    ),
    Kind("profile", _spread(experts.profile, scaled=True), WEEK_H, 0.0),
    Kind("skewed return", skewed.returning, WEEK_H, 0.0, clean_h_max=THREE_WEEKS_H),
    Kind("skewed regression", skewed.regressed, TEN_DAYS_H, 0.0),
    Kind("free regression", skewed.freely, TEN_DAYS_H, 0.0),
    Kind("long regression", skewed.over_weeks, TEN_DAYS_H, 0.0),
    Kind(skewed.AGES, skewed.aged, WEEK_H, 0.0, needs_told=True),
    Kind(skewed.KNOWN_ENDS, skewed.foretold, WEEK_H, 0.0, needs_told=True, told_hourly=True),
    Kind("ridge", _spread(experts.ridge, scaled=True), THREE_WEEKS_H, 0.0),
)


@dataclass(frozen=True, slots=True)
class Levels:
    """Demand of which outcomes were learned, rising, and how many outcomes that have nothing in
    common there are up to each."""

    gpus: Floats
    outcomes: Floats

    @classmethod
    def of(cls, taught: Lesson, ahead: int) -> "Levels":
        gpus = taught.grid.values[taught.past]
        order = np.argsort(gpus, kind="stable")
        return cls(gpus[order], np.cumsum(taught.weights[order]) / ahead)

    def as_low(self, gpus: float) -> float:
        """How many there are of demand that was no more than this."""
        place = int(np.searchsorted(self.gpus, gpus, side="right"))
        return float(self.outcomes[place - 1]) if place else 0.0


@dataclass(frozen=True, slots=True)
class Said:
    """A forecast that waits for what comes; `step` is what it was about."""

    step: int
    forecasts: dict[str, Floats]
    mixed: Floats


class Forecaster:
    """Of one series and one horizon. `first_step` counts from the beginning of a day; of `kinds`,
    persistence is the first."""

    def __init__(
        self, ahead_h: int, per_hour: int, first_step: int = 0, kinds: Sequence[Kind] = KINDS
    ) -> None:
        if ahead_h < 1 or per_hour < 1:
            raise ValueError("a forecast is an hour ahead at least, of a step of an hour at most")
        self.ahead = ahead_h * per_hour
        self.per_hour = per_hour
        self._kinds = tuple(kinds)
        self._values: deque[float] = deque(maxlen=KEPT_DAYS * HOURS_PER_DAY * per_hour)
        self._told: dict[str, deque[float]] = {
            kind.name: deque(maxlen=self._values.maxlen) for kind in kinds if kind.needs_told
        }
        self.steps = first_step  # that were told, and those before the first
        self._clean = 0
        self._mixture = Mixture({kind.name: kind.handicap for kind in kinds}, ahead_h)
        self._fitted: dict[str, Expert] = {}
        self._fitted_at = -1
        self._levels: Levels | None = None
        self._said: deque[Said] = deque()
        self._asked: tuple[int, dict[str, Floats]] = (-1, {})

    def observe(self, gpus: float, told_gpus: Mapping[str, float] | None = None) -> None:
        """Demand of the next step; NaN where nobody knows. `told_gpus`, by model that hears it: as
        many of them as are expected to be wanted still when a forecast is about, as a mean, if
        anybody says so. Negative or infinite is an error."""
        told_gpus = told_gpus or {}
        for count in (gpus, *told_gpus.values()):
            if count < 0 or math.isinf(count):
                raise ValueError(f"demand is a count of GPUs, not {count}")
        self._values.append(gpus)
        for name, told in self._told.items():
            told.append(told_gpus.get(name, math.nan))
        self.steps += 1
        self._clean += not math.isnan(gpus)
        self._judge(gpus)
        if self.steps % self.per_hour == 0 and not math.isnan(gpus):
            forecasts = self._ask()
            if forecasts:
                mixed = self._mixture.combine(forecasts)
                self._said.append(Said(self.steps + self.ahead, forecasts, mixed))

    def forecast(self) -> Floats:
        """By `LEVELS`, of demand `ahead_h` after the newest observation; zeros before the first."""
        forecasts = self._ask()
        return self._mixture.combine(forecasts) if forecasts else self._reactive()

    def weights(self) -> dict[str, float]:
        """How much each model counts at present, over all quantiles; empty on the first day."""
        weights = self._mixture.weights(list(self._fitted)) if self._fitted else {}
        return {name: float(each.mean()) for name, each in weights.items()}

    @property
    def just_fitted(self) -> bool:
        """Whether the newest forecast came from models that were fitted for it."""
        return bool(self._fitted) and self._fitted_at == self.steps

    def _judge(self, gpus: float) -> None:
        while self._said and self._said[0].step <= self.steps:
            said = self._said.popleft()
            if said.step == self.steps and not math.isnan(gpus):
                self._mixture.learn(gpus, said.forecasts, said.mixed)

    def by_model(self) -> dict[str, Floats]:
        """What each model says; empty on the first day."""
        return self._ask()

    def _ask(self) -> dict[str, Floats]:
        if self._asked[0] != self.steps:
            self._asked = (self.steps, self._compute())
        return self._asked[1]

    def _compute(self) -> dict[str, Floats]:
        clean_h = self._clean / self.per_hour
        if clean_h < DAY_H or len(self._values) < 2 * self.ahead:
            return {}
        grid = self._grid()
        if np.isnan(grid.values).all():
            return {}  # an outage of more than a week
        day = HOURS_PER_DAY * self.per_hour
        if not self._fitted or self.steps - self._fitted_at >= day:
            taught = experts.lesson(grid, self.ahead)
            if len(taught.past) < self.per_hour * HOURS_PER_DAY // 2:
                return {}
            hours = {
                kind.name: kind.told_h(taught) if kind.needs_told else clean_h
                for kind in self._kinds
            }
            self._fitted = {
                kind.name: kind.fit(taught, self.ahead)
                for kind in self._kinds
                if kind.clean_h_min <= hours[kind.name] < kind.clean_h_max
            }
            self._fitted_at = self.steps
            self._levels = Levels.of(taught, self.ahead)
            self._mixture.outcomes = float(self._levels.outcomes[-1])
        if self._levels is not None:
            self._mixture.outcomes_as_low = self._levels.as_low(float(grid.known[-1]))
        return {
            name: fitted.forecast(grid)
            for name, fitted in self._fitted.items()
            if name not in self._told or not math.isnan(self._told[name][-1])
        }

    def _grid(self) -> Grid:
        """What is needed now: all of it where experts learn, a week and more where they speak."""
        day = HOURS_PER_DAY * self.per_hour
        learns = not self._fitted or self.steps - self._fitted_at >= day
        taken = slice(None) if learns else slice(-9 * day, None)
        values = np.array(list(self._values)[taken])
        told = {name: np.array(list(each)[taken]) for name, each in self._told.items()}
        return Grid(values, self.per_hour, self.steps - len(values), told)

    def _reactive(self) -> Floats:
        known = [gpus for gpus in self._values if not math.isnan(gpus)]
        newest = known[-1] if known else 0.0
        hours = self.ahead / self.per_hour
        step = REACTIVE_RATIO * math.sqrt(max(1.0, newest) * hours)
        return np.maximum(0.0, newest + step * NORMAL) if known else np.zeros(len(LEVELS))
