"""What the ages of running jobs add to a forecast of demand, on made-up jobs.

Problem: the public series are sums, and the jobs behind them are not among them. So jobs are drawn:
they come by the hour of the day, most are short and small, lengths are log-normal (half last less
than a quarter of an hour, one in a hundred for days), and a few take several boxes. Nobody says how
long he needs. The same forecaster hears the same series twice, once with what a life table says of
those who are there. That the drawn lengths are like those of a fleet is an assumption; the gain is
of this mixture of jobs and of no other.
"""

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from bench import report
from coordinator.forecast.forecaster import Forecaster
from coordinator.forecast.quantiles import LEVELS, pinball
from coordinator.forecast.survival import LifeTable, Running

HOUR_S = 3600.0
HOURS = 24 * 42
WARM_UP_H = 24 * 21
JOBS_PER_HOUR = 18.0
DAILY_RATIO = 0.5  # by how much arrivals rise and fall with the hour
MEDIAN_S, SIGMA = 800.0, 2.2
SIZES = (1, 1, 1, 1, 1, 2, 4, 8, 8, 16)
SEEDS = (1, 2)


@dataclass(frozen=True)
class Hour:
    """`held` GPUs at its end, and of them as many as the table expects to stay."""

    held: float
    stays: tuple[float, ...]


def hours(seed: int, ahead_h: tuple[int, ...]) -> Iterator[Hour]:
    """Of a fleet that has room for all."""
    chance = random.Random(seed)
    table = LifeTable()
    there: list[tuple[float, float, int]] = []  # end, begin, GPUs
    next_s = 0.0
    for hour in range(1, HOURS):
        now_s = hour * HOUR_S
        while next_s < now_s:
            lasts_s = chance.lognormvariate(math.log(MEDIAN_S), SIGMA)
            heapq.heappush(there, (next_s + lasts_s, next_s, chance.choice(SIZES)))
            wave = 1 + DAILY_RATIO * math.sin(2 * math.pi * next_s / (24 * HOUR_S))
            next_s += HOUR_S * chance.expovariate(JOBS_PER_HOUR * wave)
        while there and there[0][0] <= now_s:
            end_s, begin_s, gpus = heapq.heappop(there)
            table.ended(gpus, end_s - begin_s)
        if hour % 24 == 0:
            table.forget(days=1)
        running = [Running(gpus, now_s - begin_s) for _, begin_s, gpus in there]
        stays = tuple(table.known_gpus(running, each * HOUR_S) for each in ahead_h)
        yield Hour(float(sum(each.gpus for each in running)), stays)


def _losses(past: list[Hour], ahead_h: int, which: int) -> tuple[list[float], list[float]]:
    """Weighted quantile loss and error of the median, in percent of demand; blind, then told."""
    blind, told = Forecaster(ahead_h, 1), Forecaster(ahead_h, 1)
    losses, errors, demand = [0.0, 0.0], [0.0, 0.0], 0.0
    for at, each in enumerate(past[:-ahead_h]):
        blind.observe(each.held)
        told.observe(each.held, each.stays[which])
        if at < WARM_UP_H:
            continue
        actual = past[at + ahead_h].held
        demand += actual
        for place, said in enumerate((blind.forecast(), told.forecast())):
            losses[place] += 200 * float(pinball(actual, said).mean())
            errors[place] += 100 * abs(actual - float(said[len(LEVELS) // 2]))
    return [loss / demand for loss in losses], [error / demand for error in errors]


def rows(ahead_h: tuple[int, ...]) -> list[report.Row]:
    """Means over the seeds."""
    pasts = [list(hours(seed, ahead_h)) for seed in SEEDS]
    made = []
    for which, ahead in enumerate(ahead_h):
        told = [_losses(past, ahead, which) for past in pasts]
        for kind, name in enumerate(("loss", "error of the median")):
            blind, aged = (sum(each[kind][place] for each in told) / len(told) for place in (0, 1))
            made.append(
                report.Row(
                    name=f"made-up jobs, {ahead} h ahead: {name} with ages of jobs",
                    value=aged,
                    unit="% of demand",
                    reference=blind,
                    reference_source="the same without",
                )
            )
    return made
