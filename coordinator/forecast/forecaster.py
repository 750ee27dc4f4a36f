"""How many GPUs will be wanted so many hours ahead, with quantiles, from what was wanted so far.

Problem: a forecast is needed from a fleet's first hour on, and models that need weeks do harm
before they have them. So there is a ladder, by hours of clean history, and each rung adds to the
one below:

    less than a day      demand as it is, and a buffer above it (`reactive`)
    a day to a week      persistence, with bands from its own errors
    one to three weeks   bands by how nervous demand is; a return to the mean; the hour of the day
    beyond that          a ridge regression on all of it

Persistence stays among them all the way up, and `mixture.py` weighs them. Experts are fitted anew
once a day, on a bounded window; an observation costs microseconds, a forecast about a millisecond.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

from coordinator.forecast import experts
from coordinator.forecast.experts import Drift, Fitted
from coordinator.forecast.grid import HOURS_PER_DAY, Grid
from coordinator.forecast.mixture import STEP_RATIO, Mixture
from coordinator.forecast.quantiles import LEVELS, Floats

# What experts learn from, and a week before it for their means.
KEPT_DAYS: Final = experts.WINDOW_DAYS + 8
DAY_H, WEEK_H, THREE_WEEKS_H = 24, 168, 504
# Before anything was seen: demand changes like a random walk whose step of an hour is this part of
# a root of its size (arrivals that know nothing of one another), and at least a GPU.
REACTIVE_RATIO: Final = 1.0
# Standard normal quantiles of LEVELS.
NORMAL: Final = np.array([-1.96, -1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645, 1.96])


@dataclass(frozen=True)
class Kind:
    """A model, from how many hours of clean history on, and by how much it is doubted at first."""

    name: str
    drift: Drift
    scaled: bool
    clean_h_min: int
    handicap: float


KINDS: Final = (
    Kind("persistence", experts.still, False, DAY_H, 0.03),
    Kind("scaled persistence", experts.still, True, WEEK_H, 0.0),
    Kind("damped", experts.damped, False, WEEK_H, 0.02),
    Kind("scaled damped", experts.damped, True, WEEK_H, 0.0),
    Kind("profile", experts.profile, True, WEEK_H, 0.03),
    Kind("ridge", experts.ridge, True, THREE_WEEKS_H, 0.06),
)


@dataclass(frozen=True, slots=True)
class Said:
    """A forecast that waits for what comes; `step` is what it was about."""

    step: int
    forecasts: dict[str, Floats]
    mixed: Floats


class Forecaster:
    """Of one series and one horizon. `first_step` counts from the beginning of a day."""

    def __init__(self, ahead_h: int, per_hour: int, first_step: int = 0) -> None:
        if ahead_h < 1 or per_hour < 1:
            raise ValueError("a forecast is an hour ahead at least, of a step of an hour at most")
        self.ahead = ahead_h * per_hour
        self._per_hour = per_hour
        self._values: deque[float] = deque(maxlen=KEPT_DAYS * HOURS_PER_DAY * per_hour)
        self._next = first_step
        self._clean = 0
        self._mixture = Mixture(
            {kind.name: kind.handicap for kind in KINDS}, STEP_RATIO / math.sqrt(ahead_h)
        )
        self._fitted: dict[str, Fitted] = {}
        self._fitted_at = -1
        self._said: deque[Said] = deque()
        self._asked: tuple[int, dict[str, Floats]] = (-1, {})

    def observe(self, gpus: float) -> None:
        """Demand of the next step; NaN where nobody knows. Negative or infinite is an error."""
        if gpus < 0 or math.isinf(gpus):
            raise ValueError(f"demand is a count of GPUs, not {gpus}")
        self._values.append(gpus)
        self._next += 1
        self._clean += not math.isnan(gpus)
        self._judge(gpus)
        if self._next % self._per_hour == 0 and not math.isnan(gpus):
            forecasts = self._ask()
            if forecasts:
                mixed = self._mixture.combine(forecasts)
                self._said.append(Said(self._next + self.ahead, forecasts, mixed))

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
        return bool(self._fitted) and self._fitted_at == self._next

    def _judge(self, gpus: float) -> None:
        while self._said and self._said[0].step <= self._next:
            said = self._said.popleft()
            if said.step == self._next and not math.isnan(gpus):
                self._mixture.learn(gpus, said.forecasts, said.mixed)

    def by_model(self) -> dict[str, Floats]:
        """What each model says; empty on the first day."""
        return self._ask()

    def _ask(self) -> dict[str, Floats]:
        if self._asked[0] != self._next:
            self._asked = (self._next, self._compute())
        return self._asked[1]

    def _compute(self) -> dict[str, Floats]:
        clean_h = self._clean / self._per_hour
        if clean_h < DAY_H or len(self._values) < 2 * self.ahead:
            return {}
        grid = self._grid()
        day = HOURS_PER_DAY * self._per_hour
        if not self._fitted or self._next - self._fitted_at >= day:
            taught = experts.lesson(grid, self.ahead)
            if len(taught.past) < self._per_hour * HOURS_PER_DAY // 2:
                return {}
            self._fitted = {
                kind.name: experts.fit(taught, kind.drift, self.ahead, scaled=kind.scaled)
                for kind in KINDS
                if clean_h >= kind.clean_h_min
            }
            self._fitted_at = self._next
        return {name: fitted.forecast(grid) for name, fitted in self._fitted.items()}

    def _grid(self) -> Grid:
        """What is needed now: all of it where experts learn, a week and more where they speak."""
        day = HOURS_PER_DAY * self._per_hour
        learns = not self._fitted or self._next - self._fitted_at >= day
        values = np.array(self._values) if learns else np.array(list(self._values)[-9 * day :])
        return Grid(values, self._per_hour, self._next - len(values))

    def _reactive(self) -> Floats:
        known = [gpus for gpus in self._values if not math.isnan(gpus)]
        newest = known[-1] if known else 0.0
        hours = self.ahead / self._per_hour
        step = REACTIVE_RATIO * math.sqrt(max(1.0, newest) * hours)
        return np.maximum(0.0, newest + step * NORMAL) if known else np.zeros(len(LEVELS))
