"""Whom to believe: experts are weighed, quantile by quantile, by how wrong they were lately.

Problem: the best model of last month is not that of this week, and one that goes astray must not
cost the fleet anything. So weights follow recent losses relative to persistence, which is the one
that is hard to beat; whoever was worse than `MUTE_RATIO` of it over three weeks is not heard; and
where the mixture itself has been clearly worse than persistence for two days, something has
changed, and persistence speaks until it is not so any more.

A record speaks of where demand has been. Models say that it comes back, and where it has fallen
below all that they have learned from, as when a project ends, nobody has seen that it does. So
there persistence counts more: four fifths, where no outcome is known of demand as low as
that, and the less the more are. Not all, for some dips are outages, and over soon. Above all
that was seen nothing is done: what piles up is worked off.

What remains wrong is taken out online: each quantile is moved a little up whenever demand was above
it, and down when not, so that in the long run it is exceeded as often as it says (Gibbs and Candes,
Adaptive Conformal Inference Under Distribution Shift, NeurIPS 2021).
"""

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from coordinator.forecast.quantiles import LEVELS, NORMAL, Floats, pinball

MUTE_RATIO: Final = 1.05
# After so long a loss counts e times less. What is told of a day ahead is wrong for a day on end,
# and a day teaches once: so with each hour ahead memory is longer.
MEMORY_H, MEMORY_H_PER_HOUR = 240.0, 10.0
MUTE_MEMORY_H: Final = 504.0
DRIFT_MEMORY_H, DRIFT_MEMORY_H_PER_HOUR = 48.0, 4.0
DRIFT_RATIO, CALM_RATIO = 1.2, 1.05
# One percent worse: a fifth less weight. Half as much a day ahead, of which less is known.
SHARPNESS, LESS_SHARP_H = 20.0, 24.0
# So many hours of being as good as persistence everybody begins with.
BEGIN_H: Final = 24.0
JUDGED_H_MIN: Final = 48.0  # before anybody is muted
MUTED_WEIGHT: Final = 1e-9
# A miss moves a quantile by this part of the narrowest model's widest band, over the root of the
# hours ahead: so many forecasts are made before the first of them is known to be wrong.
STEP_RATIO: Final = 0.001
# Tails of few outcomes are those of Student's distribution, and a model that was fitted to them has
# used up about half; the first day is not a hundred times as wide as the others for it.
USED_UP: Final = 0.5
OUTCOMES_MIN: Final = 4.0
# Of demand as low as now, with which persistence has half as much as where there are none.
LOW_OUTCOMES: Final = 0.5
ALONE_MAX: Final = 4 / 5  # persistence has so much where there are none at all
# Demand is counted in whole GPUs: nearer than half of one is no miss.
EXACT_GPUS: Final = 0.5
TINY: Final = 1e-9


@dataclass(slots=True)
class Record:
    """How wrong an expert was, and persistence at the same times, by quantile; both forgotten."""

    own: Floats = field(default_factory=lambda: np.zeros(len(LEVELS)))
    persistence: Floats = field(default_factory=lambda: np.zeros(len(LEVELS)))
    long_own: float = 0.0
    long_persistence: float = 0.0
    hours: float = 0.0

    def add(self, own: Floats, persistence: Floats, memory_h: float) -> None:
        keep, long_keep = np.exp(-1 / memory_h), np.exp(-1 / MUTE_MEMORY_H)
        self.own = self.own * keep + own
        self.persistence = self.persistence * keep + persistence
        self.long_own = self.long_own * long_keep + float(own.sum())
        self.long_persistence = self.long_persistence * long_keep + float(persistence.sum())
        self.hours += 1

    def ratios(self) -> Floats:
        """Loss over that of persistence, half by quantile and half over all."""
        begin = BEGIN_H * self.persistence / max(1.0, self.hours)
        by_level = (self.own + begin) / np.maximum(TINY, self.persistence + begin)
        whole: Floats = 0.5 * by_level + 0.5 * by_level.mean()
        return whole if self.hours else np.ones(len(LEVELS))

    @property
    def muted(self) -> bool:
        bound = MUTE_RATIO * self.long_persistence
        return self.hours >= JUDGED_H_MIN and self.long_own > bound


@dataclass(slots=True)
class Mixture:
    """Forecasts of several experts as one. `handicaps` is by how much each is taken to be worse
    than persistence until it has shown otherwise; the first is persistence itself."""

    handicaps: dict[str, float]
    ahead_h: float = 1.0
    outcomes: float = math.inf  # that have nothing in common, of which the models learned
    outcomes_as_low: float = math.inf  # of these, those of demand that was as low as it is now
    records: dict[str, Record] = field(default_factory=dict)
    offsets: Floats = field(default_factory=lambda: np.zeros(len(LEVELS)))
    drifted: bool = False
    recent: float = 0.0
    recent_persistence: float = 0.0

    @property
    def _baseline(self) -> str:
        """Persistence, by its name here."""
        return next(iter(self.handicaps))

    def combine(self, forecasts: dict[str, Floats]) -> Floats:
        """By `LEVELS`, rising, not below zero. `forecasts` has persistence at least."""
        alone = {self._baseline: forecasts[self._baseline]}
        heard = alone if self.drifted else forecasts
        weights = self.weights(list(heard))
        mixed = _widened(
            np.sum([weights[name] * forecast for name, forecast in heard.items()], axis=0),
            self.outcomes,
        )
        width = min(np.ptp(each) for each in heard.values())
        return np.maximum(0.0, np.sort(mixed + self.offsets * width))

    def weights(self, names: list[str]) -> dict[str, Floats]:
        """Of each quantile; they add up to one."""
        ratios = {}
        for name in names:
            record = self.records.get(name, Record())
            doubt = BEGIN_H * 3 / (BEGIN_H * 3 + record.hours)
            ratios[name] = record.ratios() + self.handicaps[name] * doubt
        least = np.min(list(ratios.values()), axis=0)
        sharpness = SHARPNESS / (1 + self.ahead_h / LESS_SHARP_H)
        raw = {
            name: np.exp(-sharpness * (ratio - least))
            * (MUTED_WEIGHT if self.records.get(name, Record()).muted else 1.0)
            for name, ratio in ratios.items()
        }
        total = sum(raw.values())
        alone = ALONE_MAX * LOW_OUTCOMES / (LOW_OUTCOMES + self.outcomes_as_low)
        return {
            name: (1.0 - alone) * each / total + alone * (name == self._baseline)
            for name, each in raw.items()
        }

    def learn(self, actual: float, forecasts: dict[str, Floats], mixed: Floats) -> None:
        """What came, once it is known, and what had been said of it; once an hour."""
        losses = {name: pinball(actual, forecast) for name, forecast in forecasts.items()}
        persistence = losses[self._baseline]
        memory_h = MEMORY_H + MEMORY_H_PER_HOUR * self.ahead_h
        for name, loss in losses.items():
            self.records.setdefault(name, Record()).add(loss, persistence, memory_h)
        drift_memory_h = DRIFT_MEMORY_H + DRIFT_MEMORY_H_PER_HOUR * self.ahead_h
        keep = float(np.exp(-1 / drift_memory_h))
        self.recent = self.recent * keep + float(pinball(actual, mixed).sum())
        self.recent_persistence = self.recent_persistence * keep + float(persistence.sum())
        bound = CALM_RATIO if self.drifted else DRIFT_RATIO
        known = self.records[self._baseline].hours >= drift_memory_h
        self.drifted = known and self.recent > bound * self.recent_persistence
        missed = np.abs(actual - mixed) > EXACT_GPUS
        step_ratio = STEP_RATIO / np.sqrt(self.ahead_h)
        self.offsets = self.offsets + step_ratio * missed * (LEVELS - (actual <= mixed))


def _widened(forecast: Floats, outcomes: float) -> Floats:
    """By as much as the quantiles of Student's distribution are wider than the normal ones, in the
    first term of their expansion (Abramowitz and Stegun, 26.7.5)."""
    free = USED_UP * max(OUTCOMES_MIN, outcomes)
    median = forecast[len(LEVELS) // 2]
    wider: Floats = median + (forecast - median) * (1 + (NORMAL**2 + 1) / (4 * free))
    return wider
