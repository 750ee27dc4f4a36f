"""How well demand is forecast, on public series of GPU clusters, beside persistence.

Each series is told to the forecaster step by step; from the third week on (the second where a
series has a month) it is asked at each full hour what comes in 1, 6 and 24 hours. The loss is the
weighted quantile loss over nine quantiles, and persistence has bands from its own errors. Projects
of the two clusters are series of their own: they are what quotas and classes are about, and harder.

The series: GPU demand of Helios (SenseTime; Venus and Earth) and Philly (Microsoft), derived from
public traces. They are not part of Baton: --demand or BATON_BENCH_DEMAND says where they lie. Where
the series of Alibaba's clusters lie there too (`bench/alibaba_series.py` makes them), they are
judged as well, with a mean of their own with the four clusters. Nothing was chosen on them.
"""

import csv
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench import forecast_ages, report
from coordinator.forecast.backtest import Score, backtest
from coordinator.forecast.demand_file import Series, read_series
from coordinator.forecast.forecaster import KINDS, Forecaster, Kind

AHEAD_H = (1, 6, 24)
GOALS = {1: 0.87, 6: 0.82, 24: 0.90}
WORST_GOAL = 1.05
SHORT_H = 24 * 35
REFITS = 10  # of which the median is shown
TIMED_DAYS = 62  # enough for all that is remembered, and those
EARTH = "helios_earth_may_10min.csv"
# All clusters of Helios were down; what was counted then is no demand.
HELIOS_OUTAGE = (datetime(2020, 5, 10), datetime(2020, 5, 13))
CLUSTERS, PROJECTS, ALIBABA = "clusters", "projects", "Alibaba"
ALIBABA_FILES = {
    "spot": "alibaba_spot2026_gpu_type_hourly.csv",
    "openb": "alibaba_openb2023_hourly.csv",
    "dlrm": "alibaba_dlrm2025_hourly.csv",
}
# The largest of each cluster's projects, by mean demand.
PROJECTS_EARTH = ("vc6YE", "vcLJZ", "vcpDC", "vcvlY", "vcTJs")
PROJECTS_PHILLY = ("vc_ee9e8c", "vc_7f04ca", "vc_b436b2", "vc_6214e9", "vc_2869ce")


@dataclass(frozen=True, eq=False)
class Named:
    """A series of the bench; NaN where nobody knows."""

    name: str
    values: list[float]
    per_hour: int
    group: str


# Scores by hours ahead.
Judged = dict[Named, dict[int, Score]]


def masked(read: Series, values: Sequence[float]) -> list[float]:
    """Of Helios: unknown where the cluster was down."""
    step_s = 3600 // read.per_hour
    down = [int((each - read.begin).total_seconds() // step_s) for each in HELIOS_OUTAGE]
    return [math.nan if down[0] <= step < down[1] else gpus for step, gpus in enumerate(values)]


def series(folder: Path, *, quick: bool) -> Iterator[Named]:
    """All of them, or the shortest."""
    if not quick:
        for name, file, column in (
            ("Venus", "helios_venus_10min.csv", "demand"),
            ("Philly nodes", "philly_nodes_10min.csv", "active"),
            ("Philly jobs", "philly_jobs_10min.csv", "demand"),
        ):
            read = read_series(folder / file, column)
            helios = file.startswith("helios")
            values = masked(read, read.values) if helios else list(read.values)
            yield Named(name, values, read.per_hour, CLUSTERS)
    earth = folder / EARTH
    whole = read_series(earth)
    yield Named("Earth", masked(whole, whole.values), whole.per_hour, CLUSTERS)
    if quick:
        return
    for project in PROJECTS_EARTH:
        parts = [read_series(earth, f"{project}_{what}").values for what in ("running", "queued")]
        both = [sum(pair) for pair in zip(*parts, strict=True)]
        yield Named(f"Earth {project}", masked(whole, both), whole.per_hour, PROJECTS)
    for project in PROJECTS_PHILLY:
        read = read_series(folder / "philly_jobs_vc_hourly.csv", project)
        yield Named(f"Philly {project}", list(read.values), read.per_hour, PROJECTS)
    for name, file in ALIBABA_FILES.items():
        if (folder / file).is_file():
            for column in columns(folder / file):
                read = read_series(folder / file, column)
                yield Named(f"{name} {column}", list(read.values), read.per_hour, ALIBABA)


def columns(path: Path) -> list[str]:
    """Of a file of series, without the one that says when."""
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))[1:]


def judge(each: Named, ahead_h: int, kinds: Sequence[Kind]) -> Score:
    """A month is too short for three weeks of warm-up."""
    hours = len(each.values) / each.per_hour
    warm_up_h = 24 * 14 if hours <= SHORT_H else 24 * 21
    return backtest(Forecaster(ahead_h, each.per_hour, kinds=kinds), each.values, warm_up_h)


def cost(each: Named, kinds: Sequence[Kind]) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU, of refits of all models and of forecasts without one."""
    refits: list[float] = []
    forecasts: list[float] = []
    forecaster = Forecaster(24, each.per_hour, kinds=kinds)
    for gpus in each.values[-TIMED_DAYS * 24 * each.per_hour :]:
        begin = time.process_time()
        forecaster.observe(gpus)
        said = forecaster.forecast()
        spent_ms = 1e3 * (time.process_time() - begin)
        if said.any() and forecaster.weights():
            (refits if forecaster.just_fitted else forecasts).append(spent_ms)
    return refits[-REFITS:], forecasts[-REFITS * 24 :]


def _means(judged: Judged, ahead_h: int) -> list[report.Row]:
    """Of the clusters with their projects, and of the clusters with Alibaba's, where they are."""
    rows = []
    there = {each.group for each in judged}
    for group in (PROJECTS, ALIBABA):
        if group in there or group == PROJECTS:
            logs = [
                math.log(scores[ahead_h].ratio)
                for each, scores in judged.items()
                if each.group in (CLUSTERS, group)
            ]
            whose = f"{len(logs)} series, clusters and {group}"
            name = f"{ahead_h} h ahead: geometric mean of loss over persistence, {whose}"
            mean = math.exp(statistics.fmean(logs))
            rows.append(report.Row(name=name, value=mean, unit="ratio", goal=GOALS[ahead_h]))
    return rows


def rows_of(judged: Judged) -> list[report.Row]:
    rows = []
    for ahead_h in AHEAD_H:
        for each, scores in judged.items():
            score = scores[ahead_h]
            rows.append(
                report.Row(
                    name=f"{each.name}, {ahead_h} h ahead: loss",
                    value=100 * score.loss,
                    unit="% of demand",
                    reference=100 * score.persistence_loss,
                    reference_source="persistence with bands",
                )
            )
        rows += _means(judged, ahead_h)
        ratios = [scores[ahead_h].ratio for scores in judged.values()]
        covered = [100 * scores[ahead_h].covered_95_ratio for scores in judged.values()]
        rows += [
            report.Row(
                name=f"{ahead_h} h ahead: the worst of them",
                value=max(ratios),
                unit="ratio",
                goal=WORST_GOAL,
            ),
            report.row_of(f"{ahead_h} h ahead: of 95% bands, held", covered, "%"),
        ]
    return rows


def _trees() -> Kind:
    from coordinator.forecast import boosted

    return boosted.KIND


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    report.data_option(parser, report.DEMAND)
    parser.add_argument(
        "--trees", action="store_true", help="with the model of the extra `forecast` (lightgbm)"
    )
    parser.add_argument("--jobs", type=Path, metavar="FILE", help="real jobs (forecast_ages.py)")
    given = parser.parse_args(arguments)
    asked = report.options(given)
    if not given.demand or not (given.demand / EARTH).is_file():
        report.nothing_measured("forecast", EARTH, report.DEMAND, asked)
        return
    kinds = (*KINDS, _trees()) if given.trees else KINDS
    judged: Judged = {}
    last: Named | None = None
    for each in series(given.demand, quick=asked.quick):
        report.say(f"forecast: {each.name}, {len(each.values) / each.per_hour:.0f} h")
        judged[each] = {ahead_h: judge(each, ahead_h, kinds) for ahead_h in AHEAD_H}
        last = last or each
    rows = rows_of(judged)
    if last is not None:
        refits, forecasts = cost(last, kinds)
        rows += [
            report.row_of(f"a refit of one series ({last.name})", refits, "ms of CPU"),
            report.row_of("a forecast and an observation", forecasts, "ms of CPU"),
        ]
    if not asked.quick:
        report.say("forecast: made-up jobs, with and without their ages")
        rows += forecast_ages.rows((1, 24))
    if given.jobs is not None:
        report.say(f"forecast: jobs of {given.jobs}, with and without their ages")
        rows += forecast_ages.rows(AHEAD_H, given.jobs)
    show_notes = ("asked at each full hour; nothing later is known when it is asked",)
    report.show("Forecasts of demand", rows, asked, show_notes)


if __name__ == "__main__":
    main()
