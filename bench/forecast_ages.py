"""What the ages of running jobs, and what they say of their end, add to a forecast of demand.

Problem: the public series are sums, and the jobs behind them are not among them. So jobs are drawn:
they come by the hour of the day, most are short and small, lengths are log-normal (half last less
than a quarter of an hour, one in a hundred for days), and a few take several boxes. Nobody says how
long he needs. The same forecaster hears the same series twice, once with what a life table says of
those who are there. That the drawn lengths are like those of a fleet is an assumption.

Then some of them do say when they end: all, half of them, or all of them wrong, namely that they
take twice as long as they do. Of those who say nothing the life table says it.

Real ones, where a list of them is at hand (`bench.forecast --jobs FILE`): a CSV file with the
columns `timestamp` (ISO), `duration` (s) and `num_gpus`, such as the list of Philly's jobs in the
artifacts of Sia (siasosp23/artifacts on GitHub, aaf7a0d, sia-simulator/traces/philly.csv).
"""

import csv
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, time
from itertools import takewhile
from pathlib import Path

import numpy as np

from bench import report
from coordinator.forecast.forecaster import Forecaster
from coordinator.forecast.quantiles import LEVELS, Floats, pinball
from coordinator.forecast.skewed import AGES, KNOWN_ENDS
from coordinator.forecast.survival import HOUR_S, Holds, stays

HOURS = 24 * 42
WARM_UP_H = 24 * 21
JOBS_PER_HOUR = 18.0
DAILY_RATIO = 0.5  # by how much arrivals rise and fall with the hour
MEDIAN_S, SIGMA = 800.0, 2.2
SIZES = (1, 1, 1, 1, 1, 2, 4, 8, 8, 16)
SEEDS = (1, 2)
# Who says when he ends: a part of all, and how many times as late as he does.
TELLERS = {
    "ends of all jobs": (1.0, 1.0),
    "ends of half the jobs": (0.5, 1.0),
    "ends of all jobs, twice as late": (1.0, 2.0),
}


@dataclass(frozen=True)
class Hour:
    """`held` GPUs at its end, and of them as many as the table expects to stay, or those who say
    it: for each of `TELLERS`."""

    held: float
    stays: tuple[float, ...]
    say: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Job:
    """In seconds from the beginning of the series."""

    begin_s: float
    lasts_s: float
    gpus: int


def drawn(seed: int) -> Iterator[Job]:
    """Without end, as they come."""
    chance = random.Random(seed)
    next_s = 0.0
    while True:
        lasts_s = chance.lognormvariate(math.log(MEDIAN_S), SIGMA)
        yield Job(next_s, lasts_s, chance.choice(SIZES))
        wave = 1 + DAILY_RATIO * math.sin(2 * math.pi * next_s / (24 * HOUR_S))
        next_s += HOUR_S * chance.expovariate(JOBS_PER_HOUR * wave)


def listed(path: Path) -> list[Job]:
    """Of a file, as they came, counted from the midnight after the first tenth of them: the oldest
    are those that had been there for weeks already."""
    with path.open(encoding="utf-8", newline="") as file:
        read = [
            (datetime.fromisoformat(row["timestamp"]), float(row["duration"]), int(row["num_gpus"]))
            for row in csv.DictReader(file)
        ]
    read.sort(key=lambda job: job[0])
    begin = datetime.combine(read[len(read) // 10][0].date(), time())
    jobs = [Job((came - begin).total_seconds(), lasts_s, gpus) for came, lasts_s, gpus in read]
    return [job for job in jobs if job.begin_s + job.lasts_s > 0]


def holds_of(jobs: Iterable[Job], hours: float) -> Holds:
    """Of those that begin within these hours."""
    known = list(takewhile(lambda job: job.begin_s < hours * HOUR_S, jobs))
    begin_s, lasts_s, gpus = np.array([(job.begin_s, job.lasts_s, job.gpus) for job in known]).T
    return Holds(gpus, begin_s / HOUR_S, (begin_s + lasts_s) / HOUR_S)


def hours(jobs: Iterable[Job], count: int, ahead_h: tuple[int, ...]) -> list[Hour]:
    """Of a fleet that has room for all: at the end of each of `count` hours."""
    holds = holds_of(jobs, count)
    stay = stays(holds, count - 1, 1, ahead_h).T
    held = [
        float(holds.gpus @ ((holds.begin_h < hour) & (holds.end_h > hour)))
        for hour in range(1, count)
    ]
    say = [said(holds, count - 1, ahead_h, *teller) for teller in TELLERS.values()]
    return [
        Hour(gpus, tuple(each), tuple(tuple(one[:, at]) for one in say))
        for at, (gpus, each) in enumerate(zip(held, stay, strict=True))
    ]


def said(holds: Holds, count: int, ahead_h: tuple[int, ...], ratio: float, times: float) -> Floats:
    """How many of the GPUs that are held at the end of each hour are held still so many hours
    later, if `ratio` of the jobs say so; shape (hours ahead, hours)."""
    chance = np.random.default_rng(len(holds.gpus))
    says = chance.random(len(holds.gpus)) < ratio
    silent = Holds(holds.gpus[~says], holds.begin_h[~says], holds.end_h[~says])
    gpus, begin_h, end_h = holds.gpus[says], holds.begin_h[says], holds.end_h[says]
    told_h = begin_h + times * (end_h - begin_h)
    found = (
        stays(silent, count, 1, ahead_h) if len(silent.gpus) else np.zeros((len(ahead_h), count))
    )
    for hour in range(1, count + 1):
        here = (begin_h < hour) & (end_h > hour)
        for place, hours_on in enumerate(ahead_h):
            found[place, hour - 1] += gpus @ (here & (told_h > hour + hours_on))
    return found


def _losses(past: list[Hour], ahead_h: int, which: int) -> tuple[list[float], list[float]]:
    """Weighted quantile loss and error of the median, in percent of demand; blind, by ages, and by
    ages and each of `TELLERS`."""
    made = [Forecaster(ahead_h, 1) for _ in range(2 + len(TELLERS))]
    losses, errors, demand = [0.0] * len(made), [0.0] * len(made), 0.0
    for at, each in enumerate(past[:-ahead_h]):
        ages = {AGES: each.stays[which]}
        heard = [{}, ages, *({**ages, KNOWN_ENDS: say[which]} for say in each.say)]
        for forecaster, told in zip(made, heard, strict=True):
            forecaster.observe(each.held, told)
        if at < WARM_UP_H:
            continue
        actual = past[at + ahead_h].held
        demand += actual
        for place, said in enumerate(each.forecast() for each in made):
            losses[place] += 200 * float(pinball(actual, said).mean())
            errors[place] += 100 * abs(actual - float(said[len(LEVELS) // 2]))
    return [loss / demand for loss in losses], [error / demand for error in errors]


def rows(ahead_h: tuple[int, ...], file: Path | None = None) -> list[report.Row]:
    """Means over the seeds, or of the jobs of the file."""
    if file is None:
        pasts = [hours(drawn(seed), HOURS, ahead_h) for seed in SEEDS]
    else:
        jobs = listed(file)
        pasts = [hours(jobs, int(jobs[-1].begin_s // HOUR_S) + 1, ahead_h)]
    whose = "made-up jobs" if file is None else f"jobs of {file.name}"
    made = []
    for which, ahead in enumerate(ahead_h):
        told = [_losses(past, ahead, which) for past in pasts]
        for kind, name in enumerate(("loss", "error of the median")):
            blind, *others = np.mean([each[kind] for each in told], axis=0)
            for what, value in zip(("ages of jobs", *TELLERS), others, strict=True):
                made.append(
                    report.Row(
                        name=f"{whose}, {ahead} h ahead: {name} with {what}",
                        value=float(value),
                        unit="% of demand",
                        reference=float(blind),
                        reference_source="the same without",
                    )
                )
    return made
