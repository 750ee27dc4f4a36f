"""Where `baton forecast` gets a series from, and where it puts one: coordinator, file, plot.

Problem: a forecast, a replay and a spreadsheet want the same series, and a coordinator that is
asked three times gives three. So what it told can be saved as the file that `--demand` reads.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli.render import write_file, write_plot
from coordinator.cli.settings import CommandFailed, settings_of
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.demand_client import Told
    from coordinator.forecast.demand_file import Series
    from coordinator.forecast.forecaster import Forecaster
    from coordinator.forecast.grid import Told as ToldSeries

# Ten minutes a step, unless there is less of them than this: half a day.
STEPS_MIN = 72
PERIODS_MIN = (10, 1)
SHOWN_H_MAX = 168
# Places of LEVELS: the edges of the bands that are drawn.
BANDS = (("90% said before", 1, 7), ("50% said before", 3, 5))


def ask(
    context: click.Context, asked: tuple[str, str, str], ahead_h: Sequence[int]
) -> "tuple[Series, Told]":
    """What the coordinator has seen of GPU type, project and class; in finer steps where it has not
    seen for long. And what it knows of the future, and of who held GPUs."""
    from coordinator.cli.demand_client import DemandClient
    from coordinator.forecast.demand_file import Series

    with DemandClient(settings_of(context)) as client:
        for period_min in PERIODS_MIN:
            coarse = period_min == PERIODS_MIN[0]
            told = client.demand(*asked, period_min, ahead_h=ahead_h, with_jobs=coarse)
            if len(told.gpus) >= STEPS_MIN:
                break
    if told.begin is None or len(told.gpus) < 3:
        raise CommandFailed(
            f"the coordinator looks at demand once a minute and has seen {len(told.gpus)} so far; a"
            " series needs three at least"
        )
    return Series(told.gpus, 60 // told.period_min, told.begin.replace(tzinfo=None)), told


def save(path: Path, series: "Series") -> None:
    """As a file that `--demand` reads. Raises `CommandFailed`."""
    step = timedelta(hours=1) / series.per_hour
    lines = ["time,demand"]
    for place, gpus in enumerate(series.values):
        at = (series.begin + place * step).isoformat(timespec="minutes")
        lines.append(f"{at}," + ("" if math.isnan(gpus) else f"{gpus:.6g}"))
    write_file(path, "\n".join([*lines, ""]))


def saved(path: Path, series: "Series", *, asked: bool) -> str:
    """What stands in that file, in words; `asked`: the coordinator, which has seen each minute."""
    step_min = 60 // series.per_hour
    said = f"{quantity(len(series.values), 'step')} of {step_min} min in {path}"
    if asked and step_min > 1:
        fine_h = STEPS_MIN * step_min // 60
        said += f", each the mean of its minutes: only a series of less than {fine_h} h has those"
    return said


def plot(
    path: Path,
    series: "Series",
    forecaster: "Forecaster",
    what: str,
    told: "ToldSeries | None" = None,
) -> None:
    """Demand, and the bands that a new forecaster says of it so many hours before; `told` as
    `backtest` has it. Raises `CommandFailed`."""
    from coordinator.forecast.course import course
    from coordinator.sim.svg import Band, Chart, Curve, draw

    points = course(forecaster, series.values, SHOWN_H_MAX, told)
    ahead_h = forecaster.ahead // forecaster.per_hour
    said = [point for point in points if point.quantiles]
    bands = [
        Band(name, [(p.hours, p.quantiles[low], p.quantiles[high]) for p in said])
        for name, low, high in BANDS
    ]
    median = Curve(f"median, {ahead_h} h before", [(p.hours, p.quantiles[4]) for p in said])
    runs: list[list[tuple[float, float]]] = [[]]
    for place, point in enumerate(points):
        if place and point.hours - points[place - 1].hours > 1.5 / series.per_hour:
            runs.append([])
        if point.gpus is None:
            runs.append([])
        else:
            runs[-1].append((point.hours, point.gpus))
    came = Curve("what came", [], parts=[run for run in runs if run])
    end = series.begin + (len(series.values) - 1) * (timedelta(hours=1) / series.per_hour)
    chart = Chart(
        f"GPUs wanted: {what}",
        f"hours after {end:%Y-%m-%d %H:%M} UTC",
        "GPUs, running and waiting",
        [came, median],
        bands=bands,
        mark_x=0.0,
    )
    write_plot(path, draw(chart))
