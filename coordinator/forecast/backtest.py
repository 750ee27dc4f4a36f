"""How good forecasts would have been: at each hour of a series, knowing nothing of what came.

Problem: a model that was fitted on all of a series forecasts it well. So the series is told to a
forecaster step by step, and at each full hour, once `warm_up_h` are over, it is asked. It is judged
by the weighted quantile loss, twice the sum of the pinball losses over the sum of demand, mean over
the quantiles, beside persistence with bands from its own errors, which was asked the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.forecast.forecaster import KINDS, Forecaster
from coordinator.forecast.grid import Told, at_step
from coordinator.forecast.quantiles import pinball


@dataclass(frozen=True, slots=True)
class Score:
    """`loss` and `persistence_loss` are ratios of demand; `covered_95_ratio` is how much of what
    came lay within the band of 95 percent."""

    forecasts: int
    loss: float
    persistence_loss: float
    covered_95_ratio: float

    @property
    def ratio(self) -> float:
        """Below one: better than persistence. One where neither was ever wrong."""
        return self.loss / self.persistence_loss if self.persistence_loss else 1.0


def backtest(
    forecaster: Forecaster,
    values: Sequence[float],
    warm_up_h: int,
    passed: Callable[[int], None] | None = None,
    told: Told | None = None,
) -> Score:
    """Judge a series, NaN where nobody knows; `forecaster` is new, and afterwards has been told all
    of it, with what was `told` beside it. `passed` hears how many steps more are done, for whoever
    waits: it may take a minute. Raises ValueError where it is too short, with a sentence
    that does not name the horizon: it is the same for several."""
    ahead, per_hour = forecaster.ahead, forecaster.per_hour
    losses, persistence_losses, demand = [], [], []
    covered = 0
    for step, gpus in enumerate(values):
        forecaster.observe(gpus, at_step(told or {}, step))
        if passed is not None:
            passed(1)
        actual = values[step + ahead] if step + ahead < len(values) else math.nan
        full_hour = forecaster.steps % per_hour == 0
        if not full_hour or step < warm_up_h * per_hour or math.isnan(gpus) or math.isnan(actual):
            continue
        models = forecaster.by_model()
        if not models:
            continue
        said = forecaster.forecast()
        losses.append(float(pinball(actual, said).mean()))
        persistence_losses.append(float(pinball(actual, models[KINDS[0].name]).mean()))
        demand.append(actual)
        covered += bool(said[0] <= actual <= said[-1])
    if losses and not sum(demand):
        raise ValueError("nothing was wanted at all after the warm-up: there is no loss to compare")
    if not losses:
        raise ValueError(
            f"the series is too short: it has {len(values) / per_hour:.0f} h, and the first"
            f" {warm_up_h} h are only learned from"
        )
    total = sum(demand)
    return Score(
        len(losses),
        2 * sum(losses) / total,
        2 * sum(persistence_losses) / total,
        covered / len(losses),
    )
