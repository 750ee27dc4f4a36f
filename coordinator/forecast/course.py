"""What was said hour by hour and what came, and what is said now: the points of a plot.

Problem: bands beside the past that they were fitted on always look good. So, as in `backtest.py`, a
forecaster is told the series step by step, and each band is what it said so many hours before, when
it knew nothing of what came.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.forecast.forecaster import Forecaster
from coordinator.forecast.grid import Told, at_step


@dataclass(frozen=True, slots=True)
class Point:
    """`hours` after the newest step. `quantiles` by `LEVELS`, said as long before as was asked;
    empty where nothing was. `gpus` is what came, `None` where that is not known (yet)."""

    hours: float
    quantiles: tuple[float, ...]
    gpus: float | None


def course(
    forecaster: Forecaster,
    values: Sequence[float],
    shown_h: int,
    told: Told | None = None,
) -> list[Point]:
    """The last `shown_h` hours and those that are ahead, of each `per_hour`th step what was said;
    `forecaster` is new, and hears `told` as in `backtest`."""
    per_hour = forecaster.per_hour
    last, ahead = len(values) - 1, forecaster.ahead
    said: dict[int, tuple[float, ...]] = {}
    for step, gpus in enumerate(values):
        forecaster.observe(gpus, at_step(told or {}, step))
        due = step + ahead
        if (last - due) % per_hour == 0 and due > last - shown_h * per_hour:
            if not math.isnan(gpus):
                said[due] = tuple(map(float, forecaster.forecast()))
    points = []
    for step in range(max(0, last - shown_h * per_hour + 1), last + ahead + 1):
        came = values[step] if step <= last and not math.isnan(values[step]) else None
        if came is not None or step in said:
            points.append(Point((step - last) / per_hour, said.get(step, ()), came))
    return points
