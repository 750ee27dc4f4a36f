"""What quantiles of demand come to: one in between, and how much is short or idle on average.

Problem: a forecast is nine numbers (`LEVELS`), and a decision needs others: a quantile in between,
and what a capacity of so many GPUs is expected to lack or to leave unused. Between two levels
demand is taken to be spread evenly, and beyond the outermost to be there.
"""

from collections.abc import Sequence
from itertools import pairwise

from coordinator.core.capacity_model import LEVELS


def at_level(gpus: Sequence[float], level: float) -> float:
    """The quantile of this level, 0 to 1; `gpus` are by `LEVELS`."""
    if level <= LEVELS[0]:
        return gpus[0]
    points = list(zip(LEVELS, gpus, strict=True))
    for (low, below), (high, above) in pairwise(points):
        if level <= high:
            return below + (above - below) * (level - low) / (high - low)
    return gpus[-1]


def mean_short(gpus: Sequence[float], capacity_gpus: float) -> float:
    """By how much demand is above this capacity, on average over all that may come."""
    return sum(
        (high - low) * _mean_above(below - capacity_gpus, above - capacity_gpus)
        for (low, below), (high, above) in pairwise(_whole(gpus))
    )


def mean_idle(gpus: Sequence[float], capacity_gpus: float) -> float:
    """And below it."""
    return sum(
        (high - low) * _mean_above(capacity_gpus - above, capacity_gpus - below)
        for (low, below), (high, above) in pairwise(_whole(gpus))
    )


def _whole(gpus: Sequence[float]) -> list[tuple[float, float]]:
    return [(0.0, gpus[0]), *zip(LEVELS, gpus, strict=True), (1.0, gpus[-1])]


def _mean_above(low: float, high: float) -> float:
    """Of what is spread evenly from `low` to `high`, the mean of the part above zero."""
    if low >= 0:
        return (low + high) / 2
    return high * high / (2 * (high - low)) if high > 0 else 0.0
