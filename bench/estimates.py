"""How well a job's speed is known on types that it has not met, on Gavel's table of throughputs.

Problem: an estimator that was shown the answers is always good. Here a part of a table of real
measurements is hidden, with a seed; what is left is the fleet's history, with noise. Then each job
is measured for two minutes on one type, with the noise of two minutes, and asked for at every place
that is hidden. Fleet knowledge is learned from the *other* jobs, so no job teaches about itself
twice. The error is |log(estimate / table)|: 0.2 is a fifth too fast or too slow.

Three models see the same data: *prior*, facts about the types alone; *additive*, each type's error
learned from the fleet; *completed*, and what is special about each job (rank two). *New job*: the
fleet's history is half of the table, and nothing is known of the job but its two minutes.

The table: `simulation_throughputs.csv.gz` and `physical_cluster_throughputs.csv.gz` of Gavel
(Stanford Future Data Systems, MIT licence) as CSV, 26 jobs alone on 1, 2, 4 and 8 GPUs of three
types. It is not part of Baton: --tables or BATON_BENCH_GAVEL says where it lies. The two
tables share the values of several GPUs. Constants were chosen on the first, with other seeds.
"""

import csv
import gzip
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import report
from coordinator.core import estimates
from coordinator.core.estimates import (
    BAND_DEVIATIONS,
    Knowledge,
    Measurement,
    Observation,
    Place,
)
from coordinator.core.rates import place_prior
from coordinator.sim.gavel import family

GOAL = 0.2
BAND_PERCENT_MIN = 75.0  # of a band that is said to hold 80
TABLES = ("physical_cluster_throughputs", "simulation_throughputs")
SEEDS, SEEDS_QUICK = 5, 3
HIDDEN_PERCENTS = (50, 80)
MINUTES_S = 120.0  # of the job itself
HISTORY_S = 3_600.0  # of what is in the table
MODELS = ("prior", "additive", "completed")
DATA = replace(report.GAVEL, flag="--tables", what="Gavel's tables")
GPU_TYPES = {"v100": "V100", "p100": "P100", "k80": "K80"}

Table = dict[str, dict[Place, float]]


@dataclass(frozen=True)
class Asked:
    """One draw: what the fleet knows, what each job measured itself, and what is asked."""

    history: list[Observation]
    own: dict[str, Measurement]
    hidden: list[tuple[str, Place, float]]


def read(path: Path) -> Table:
    """Steps a second of jobs alone on a server's GPUs; what did not run is left out."""
    table: Table = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rate = float(row["steps_per_s"])
            if row["colocated_model"] or row["gpu_type"] not in GPU_TYPES or rate <= 0:
                continue
            place = Place(GPU_TYPES[row["gpu_type"]], int(row["scale_factor"]))
            table.setdefault(row["model"], {})[place] = rate
    return table


def measure(chance: random.Random, place: Place, rate: float, seconds: float) -> Measurement:
    """With the noise that the estimator expects of so many seconds."""
    exact = Measurement(place, place_prior(place), rate, seconds)
    noisy = rate * math.exp(chance.gauss(0, math.sqrt(exact.variance)))
    return Measurement(place, place_prior(place), noisy, seconds)


def draw(table: Table, percent: int, seed: int) -> Asked:
    chance = random.Random(seed)
    history, own, hidden = [], {}, []
    for job, rates in sorted(table.items()):
        start = chance.choice([place for place in sorted(rates) if place.gpus == 1])
        own[job] = measure(chance, start, rates[start], MINUTES_S)
        for place, rate in sorted(rates.items()):
            seen = measure(chance, place, rate, HISTORY_S)
            if chance.random() * 100 >= percent:
                history.append(Observation(job, seen))
            elif place != start:
                hidden.append((job, place, rate))
    return Asked(history, own, hidden)


@dataclass(frozen=True)
class Error:
    """Of one hidden place: `log` is negative where it was said too slow, `deviation` is how wrong
    the estimate thought it might be."""

    place: Place
    log: float
    deviation: float


def errors(asked: Asked, model: str, *, new_job: bool) -> list[Error]:
    """Of every hidden place."""
    found = []
    for job, measured in sorted(asked.own.items()):
        others = [one for one in asked.history if one.job != job]
        kin = [one for one in asked.history if one.job == job and not new_job]
        kin.append(Observation(job, measured))
        if model == "prior":
            knowledge = Knowledge(completes=False)
        else:
            knowledge = estimates.learn(others, completes=model == "completed")
            kin += [one for one in others if family(one.job) == family(job)]
        for name, place, rate in asked.hidden:
            if name == job:
                said = estimates.estimate(knowledge, kin, job, place, place_prior(place))
                assert said is not None, "it was measured"
                log = said.mean - math.log(rate)
                found.append(Error(place, log, math.sqrt(said.variance)))
    return found


def median(found: Sequence[Error]) -> float:
    return statistics.median(abs(one.log) for one in found)


def root_mean_square(found: Sequence[Error]) -> float:
    return math.sqrt(statistics.fmean(one.log**2 for one in found))


def median_alone(found: Sequence[Error]) -> float:
    """Of jobs on one GPU."""
    return median([one for one in found if one.place.gpus == 1])


def within(found: Sequence[Error]) -> float:
    """The share within the band that should hold eight of ten."""
    inside = [one for one in found if abs(one.log) <= BAND_DEVIATIONS * one.deviation]
    return 100 * len(inside) / len(found)


FIGURES = (
    ("median log error", median, "ln"),
    ("RMS log error", root_mean_square, "ln"),
    ("median log error, one GPU", median_alone, "ln"),
    ("within the band of 80%", within, "%"),
)


def rows_of(table: Table, name: str, seeds: int) -> list[report.Row]:
    cases = [(f"{percent}% hidden", percent, False) for percent in HIDDEN_PERCENTS]
    cases.append(("new job", 50, True))
    rows = []
    for label, percent, new_job in cases:
        draws = [draw(table, percent, seed) for seed in range(seeds)]
        by_facts: dict[str, float] = {}
        for model in MODELS:
            report.say(f"{name}: {label}, {model}")
            samples = [errors(asked, model, new_job=new_job) for asked in draws]
            for figure, of, unit in FIGURES:
                title = f"{name.split('_')[0]}, {label}, {model}: {figure}"
                row = report.row_of(title, [of(sample) for sample in samples], unit)
                reference = by_facts.setdefault(figure, row.value)
                if unit == "%":
                    rows.append(replace(row, goal=BAND_PERCENT_MIN, more_is_better=True))
                elif model == "prior":
                    rows.append(row)
                else:
                    source = "facts alone, same run"
                    goal = GOAL if model == "completed" else None
                    rows.append(
                        replace(row, reference=reference, reference_source=source, goal=goal)
                    )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    report.data_option(parser, DATA)
    given = parser.parse_args(arguments)
    asked = report.options(given)
    names = TABLES[:1] if asked.quick else TABLES
    missing = [n for n in names if not given.tables or not (given.tables / f"{n}.csv.gz").is_file()]
    if missing:
        report.nothing_measured("estimates", f"{missing[0]}.csv.gz", DATA, asked)
        return
    rows = []
    for name in names:
        table = read(given.tables / f"{name}.csv.gz")
        rows += rows_of(table, name, SEEDS_QUICK if asked.quick else SEEDS)
    notes = (
        f"errors of hidden places after {MINUTES_S:g} s of the job on one GPU; median over seeds",
    )
    report.show("Speed on types not met, Gavel's tables", rows, asked, notes)


if __name__ == "__main__":
    main()
