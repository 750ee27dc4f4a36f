"""`baton forecast`: how many GPUs will be wanted, and how far such forecasts have been right.

Problem: a number for tomorrow is worth what it is known to be wrong by. So beside each forecast
stand its bands, and what the same forecaster would have said over the whole series, judged against
persistence, at each hour as if nothing later were known.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli import demand
from coordinator.cli.render import (
    UNKNOWN,
    Column,
    progress,
    write_json,
    write_notice,
    write_table,
)
from coordinator.cli.settings import BadInput, common_options, settings_of
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.demand_client import Held, Told
    from coordinator.forecast.backtest import Score
    from coordinator.forecast.demand_file import Series
    from coordinator.forecast.forecaster import Forecaster, Kind
    from coordinator.forecast.grid import Told as ToldSeries
    from coordinator.forecast.quantiles import Floats
    from coordinator.forecast.survival import Holds

_COLUMNS = (
    Column("AHEAD", right=True),
    Column("MEDIAN", right=True),
    Column("50%"),
    Column("90%"),
    Column("95%"),
    Column("LOSS %", right=True),
    Column("PERSISTENCE %", right=True),
    Column("RATIO", right=True),
    Column("95% HELD", right=True),
    Column("MODELS", wrap=True),
)
AHEAD_H_MAX = 168
HEARD_MIN = 0.05  # a model that counts less is not named
BOOSTING_MODULE = "lightgbm"


@click.command(short_help="Forecast demand from a series, with its bands and its record.")
@click.option(
    "--demand",
    type=click.Path(path_type=Path),
    help="CSV: time, GPUs wanted. Without it: what the coordinator has seen.",
)
@click.option("--gpu-type", default="", help="What the coordinator has seen of this type alone.")
@click.option("--project", default="", help="The same of a project.")
@click.option(
    "--class",
    "job_class",
    type=click.Choice(("guaranteed", "standard", "spare")),
    default=None,
    help="The same of a class of jobs.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the series to this CSV: up to 12 h by the minute, beyond by ten minutes.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="An SVG: what came, and the bands said before, at the first --ahead.",
)
@click.option("--column", default="demand", show_default=True, help="Which one has the GPUs.")
@click.option(
    "--ahead",
    "ahead_h",
    multiple=True,
    type=click.IntRange(1, AHEAD_H_MAX),
    default=(1, 6, 24),
    show_default=True,
    help="Hours ahead; may be given several times.",
)
@click.option(
    "--warm-up",
    "warm_up_h",
    type=click.IntRange(24),
    default=336,
    show_default=True,
    help="Hours of the series before forecasts are judged.",
)
@common_options
@click.pass_context
def forecast(context: click.Context, /, ahead_h: tuple[int, ...], **given: Any) -> None:
    """Say how many GPUs will be wanted, from what was: by the coordinator, or in a file.

    \b
      time,demand
      2026-03-01T00:00,602
      2026-03-01T00:10,599

    Demand is what runs and what waits, at equal steps; an empty cell is an outage, from which
    nothing is learned. The coordinator looks once a minute; --save writes what it saw. LOSS is the
    weighted quantile loss of the same forecasts over the series, PERSISTENCE that of "as now" with
    bands from its own errors; a RATIO below 1 is a gain.

    \b
      baton forecast --gpu-type H100 --plot demand.svg
      baton forecast --demand demand.csv --ahead 1 --ahead 24
    """
    ahead_h = tuple(dict.fromkeys(ahead_h))
    series, what, known = _series(context, given, ahead_h)
    if given["save"] is not None:
        demand.save(given["save"], series)
        write_notice(demand.saved(given["save"], series, asked=known is not None))
    new, beside = _maker(series), _beside(series, known, ahead_h)
    with progress(len(ahead_h) * len(series.values), "judging forecasts") as passed:
        told = [
            _tell(new(hours), series, beside.get(hours, {}), given["warm_up_h"], passed)
            for hours in ahead_h
        ]
    for sentence in _unjudged(told):
        write_notice(sentence)
    if known is not None:
        held = {one.ahead_h: one for one in known.held}
        told = [dataclasses.replace(each, held=held.get(each.ahead_h)) for each in told]
    if given["plot"] is not None:
        demand.plot(given["plot"], series, new(ahead_h[0]), what, beside.get(ahead_h[0]))
    if settings_of(context).as_json:
        write_json([dataclasses.asdict(each) for each in told])
        return
    write_table(_COLUMNS, [_row(each) for each in told])
    if known is not None and known.held_gpus and known.held:
        parts = [
            f"in {one.ahead_h} h {one.certain_gpus:.0f} for certain and"
            f" {one.expected_gpus:.0f} as expected"
            for one in known.held
        ]
        now = quantity(round(known.held_gpus), "GPU is", "GPUs are")
        write_notice(f"{now} held now; of these {'; '.join(parts)}")


def _series(
    context: click.Context, given: Mapping[str, Any], ahead_h: Sequence[int]
) -> "tuple[Series, str, Told | None]":
    """And what it is of, for people; and what the coordinator said, where it was asked."""
    from coordinator.forecast.demand_file import BadDemand, read_series

    asked = (given["gpu_type"], given["project"], given["job_class"] or "")
    if given["demand"] is None:
        series, told = demand.ask(context, asked, ahead_h)
        return series, ", ".join(filter(None, asked)) or "all", told
    if any(asked):
        raise click.UsageError(
            "--gpu-type, --project and --class are asked of the coordinator; a file has one series:"
            " leave them out, or --demand"
        )
    try:
        return read_series(given["demand"], given["column"]), given["demand"].name, None
    except BadDemand as error:
        raise BadInput(str(error)) from error


@dataclasses.dataclass(frozen=True)
class _Told:
    """Of one horizon. `gpus` are by quantile; `backtest` is None where `unjudged` says why, `held`
    where no coordinator was asked."""

    ahead_h: int
    gpus: dict[str, float]
    weights: dict[str, float]
    backtest: "Score | None"
    held: "Held | None" = None
    unjudged: str = ""


def _maker(series: "Series") -> "Callable[[int], Forecaster]":
    """New forecasters of it, by hours ahead."""
    from coordinator.forecast.forecaster import KINDS, THREE_WEEKS_H, Forecaster

    kinds: tuple[Kind, ...] = KINDS
    enough = len(series.values) >= THREE_WEEKS_H * series.per_hour
    if enough and importlib.util.find_spec(BOOSTING_MODULE) is not None:
        try:
            from coordinator.forecast.boosted import KIND
        except (ImportError, OSError) as error:  # it needs an OpenMP that its wheel does not have
            write_notice(f"{BOOSTING_MODULE} cannot be loaded, and is not heard: {error}")
        else:
            kinds = (*kinds, KIND)
    return lambda hours: Forecaster(hours, series.per_hour, series.first_step, kinds)


def _beside(
    series: "Series", known: "Told | None", ahead_h: Sequence[int]
) -> "dict[int, ToldSeries]":
    """By hours ahead, what a forecaster hears beside each step; nothing where nobody knows."""
    from coordinator.forecast import foretold, skewed

    found: dict[int, dict[str, Floats]] = {hours: {} for hours in ahead_h}
    if known is not None and known.holds is not None:
        for hours, said in zip(ahead_h, _by_ages(series, known.holds, ahead_h), strict=True):
            found[hours][skewed.AGES] = said
    if known is not None and known.foretold is not None:
        steps, per_hour = len(series.values), series.per_hour
        each = foretold.still_wanted(known.foretold, steps, per_hour, ahead_h)
        for hours, said in zip(ahead_h, each, strict=True):
            found[hours][skewed.KNOWN_ENDS] = said
    return dict(found)


def _by_ages(series: "Series", holds: "Holds", ahead_h: Sequence[int]) -> "list[Floats]":
    from coordinator.forecast.forecaster import WEEK_H
    from coordinator.forecast.survival import still_wanted

    with progress(len(series.values), "replaying ages of jobs") as passed:
        found = still_wanted(holds, series.values, series.per_hour, ahead_h, passed=passed)
    all_h = len(series.values) / series.per_hour
    known_h = all_h - holds.since_h
    if known_h < WEEK_H <= all_h:
        write_notice(
            "ages of jobs are not heard: the coordinator no longer keeps all that ended more than"
            f" {max(0.0, known_h):.0f} h ago, and {WEEK_H} h are needed"
        )
    return found


def _tell(
    forecaster: "Forecaster",
    series: "Series",
    beside: "ToldSeries",
    warm_up_h: int,
    passed: Callable[[int], None],
) -> _Told:
    from coordinator.forecast.backtest import backtest
    from coordinator.forecast.quantiles import LEVELS

    score, unjudged = None, ""
    try:
        score = backtest(forecaster, series.values, warm_up_h, passed, beside)
    except ValueError as error:
        unjudged = str(error)
    said = forecaster.forecast()
    by_level = {f"{level:g}": float(gpus) for level, gpus in zip(LEVELS, said, strict=True)}
    hours = forecaster.ahead // forecaster.per_hour
    return _Told(hours, by_level, forecaster.weights(), score, unjudged=unjudged)


def _unjudged(told: Sequence[_Told]) -> Iterator[str]:
    """Each reason once, with the horizons that it is about."""
    for why in dict.fromkeys(each.unjudged for each in told if each.unjudged):
        horizons = ", ".join(f"{each.ahead_h} h" for each in told if each.unjudged == why)
        yield f"forecasts of {horizons} ahead are not judged: {why}"


def _row(told: _Told) -> tuple[str, ...]:
    gpus = list(told.gpus.values())
    bands = [f"{gpus[low]:.0f} to {gpus[-1 - low]:.0f}" for low in (3, 1, 0)]
    score = told.backtest
    judged = [UNKNOWN] * 4
    if score is not None:
        percents = (score.loss, score.persistence_loss)
        judged = [f"{100 * each:.2f}" for each in percents]
        judged += [f"{score.ratio:.3f}", f"{100 * score.covered_95_ratio:.1f}%"]
    heard = sorted(told.weights.items(), key=lambda pair: -pair[1])
    models = [f"{name} {100 * weight:.0f}%" for name, weight in heard if weight >= HEARD_MIN]
    median = f"{gpus[len(gpus) // 2]:.0f}"
    return (f"{told.ahead_h} h", median, *bands, *judged, ", ".join(models) or UNKNOWN)
