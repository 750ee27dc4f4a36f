"""`baton simulate --demand`: which nodes would have been on, what would have waited, what it costs.

Problem: savings that nobody can check are not believed. So a series of demand is replayed under
Baton's plan and beside it under the baselines that savings are claimed against, and under one that
knows the future: nobody can save more. Every replay is judged before it is shown; one that counts
capacity wrong, or breaks a guard rail of Baton's, is an error and no row.
"""

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.again import again
from coordinator.cli.demand import ask
from coordinator.cli.render import (
    Column,
    progress,
    write_json,
    write_notice,
    write_plot,
    write_table,
)
from coordinator.cli.settings import BadInput, CommandFailed, settings_of
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.forecast.demand_file import Series
    from coordinator.sim.capacity_inputs import PowerInputs
    from coordinator.sim.capacity_replay import PowerOutcome, PowerPolicy
    from coordinator.sim.capacity_report import PowerFigures

OURS = "baton"
# The options that say something with --demand; those of the second line say nothing without.
OF_BOTH = ("demand", "own_demand", "fleet", "policies")
OF_DEMAND = ("column", "warm_up_h", "plot")
POWER_POLICIES = ("always-on", "idle-timeout", "clairvoyant")
_COLUMNS = (
    Column("POLICY"),
    Column("STEPS WAITING", right=True),
    Column("WAITED NODE-H", right=True),
    Column("NODES OFF", right=True),
    Column("SAVED OF ALWAYS-ON", right=True),
    Column("$/DAY", right=True),
    Column("STARTS/DAY", right=True),
)


_OPTIONS = (
    click.option(
        "--demand",
        type=click.Path(path_type=Path),
        help="CSV: time, GPUs wanted. Instead of jobs: which nodes would be on (docs/simulate.md).",
    ),
    click.option(
        "--own-demand",
        metavar="GPU_TYPE",
        help="Instead of --demand: what the coordinator has seen of this type, up to 90 days.",
    ),
    click.option("--column", default="demand", help="Of --demand, the one that has the GPUs."),
    click.option(
        "--warm-up",
        "warm_up_h",
        type=click.IntRange(0),
        default=336,
        help="Of --demand, hours that are only learned from.  [default: 336]",
    ),
    click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Of --demand, an SVG file: demand, nodes on, needed and idle, money a day.",
    ),
)


def demand_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those of `simulate` that are about a series of demand."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def replay_demand(context: click.Context, given: Mapping[str, Any]) -> None:
    """What `simulate` does with a series."""
    for flag in _said(context, [name for name in given if name not in OF_BOTH + OF_DEMAND]):
        raise BadInput(f"--demand replays nodes, not jobs: {flag} says nothing there")
    policies = given["policies"]
    if context.get_parameter_source("policies") is click.core.ParameterSource.DEFAULT:
        policies = (OURS, *POWER_POLICIES)
    as_json, own = settings_of(context).as_json, given["own_demand"]
    if own is not None and (given["demand"] is not None or _said(context, ("column",))):
        raise BadInput("--own-demand is asked of the coordinator: leave out --demand and --column")
    series = _read(given) if own is None else ask(context, (own, "", ""), ())[0]
    _simulate(given, series, policies, as_json=as_json)
    if as_json:
        return
    if own is None:
        write_notice(f"again: {again(context)}", whole=True)
    else:
        save = f"baton forecast --gpu-type {shlex.quote(own)} --save demand.csv"
        write_notice(f"the same series again: `{save}`, then --demand demand.csv", whole=True)


def refuse_demand_options(context: click.Context) -> None:
    """For jobs these would be passed over in silence."""
    for flag in _said(context, OF_DEMAND):
        raise BadInput(f"{flag} is about a series of demand: it says nothing without --demand")


def _said(context: click.Context, names: Sequence[str]) -> list[str]:
    """Those that stand on the command line or in the environment, as people write them."""
    default = click.core.ParameterSource.DEFAULT
    return [
        parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is not default
    ]


def _read(given: Mapping[str, Any]) -> "Series":
    from coordinator.forecast.demand_file import BadDemand, read_series

    try:
        return read_series(given["demand"], given["column"])
    except BadDemand as error:
        raise BadInput(str(error)) from error


def _simulate(
    given: Mapping[str, Any], series: "Series", policies: Sequence[str], *, as_json: bool
) -> None:
    """Replay the series under these policies, and print a row for each."""
    from coordinator.sim.capacity_inputs import read_boxes
    from coordinator.sim.toml_file import BadFile

    for name in policies:
        if name not in (OURS, *POWER_POLICIES):
            words = ", ".join((OURS, *POWER_POLICIES))
            raise BadInput(f"{name} decides over jobs, not over nodes; with --demand: {words}")
    try:
        most = max((gpus for gpus in series.values if not math.isnan(gpus)), default=0.0)
        inputs = read_boxes(given["fleet"], most)
    except BadFile as error:
        raise BadInput(str(error)) from error
    begin = given["warm_up_h"] * series.per_hour
    judged = sum(not math.isnan(gpus) for gpus in series.values[begin:])
    if judged == 0:
        hours = len(series.values) / series.per_hour
        warm_up_h = given["warm_up_h"]
        raise BadInput(
            f"the series has {hours:.3g} h, and nothing is known after the first {warm_up_h} h,"
            " which are only learned from; --warm-up takes fewer"
        )
    names = list(dict.fromkeys(policies))
    with progress(len(names) * len(series.values), "replaying") as passed:
        found = {name: _run(name, series, inputs, begin, passed) for name in names}
    if given["plot"] is not None:
        _write_plot(given["plot"], {name: each[1] for name, each in found.items()}, inputs)
    if as_json:
        write_json(
            [{"policy": name, **dataclasses.asdict(row)} for name, (row, _) in found.items()]
        )
        return
    write_table(_COLUMNS, [_cells(name, row) for name, (row, _) in found.items()])
    limit = next(iter(found.values()))[0].limit_ratio
    write_notice(
        f"limit: {quantity(inputs.fleet.nodes, 'node')}, of which demand leaves {limit:.1%} unused"
        " on average: no policy can have more than that off without letting work wait"
    )


def _run(
    name: str,
    series: "Series",
    inputs: "PowerInputs",
    begin: int,
    passed: Callable[[int], None],
) -> "tuple[PowerFigures, PowerOutcome]":
    from coordinator.sim.capacity_checks import check_capacity, check_rails
    from coordinator.sim.capacity_replay import replay
    from coordinator.sim.capacity_report import figures

    policy = _policy(name, series, inputs)
    outcome = replay(series.values, series.per_hour, inputs.fleet, policy, begin, passed=passed)
    wrong = check_capacity(outcome, inputs.fleet)
    if name == OURS:
        wrong += check_rails(outcome, inputs.fleet, inputs.rules.bounds)
    if wrong:
        raise CommandFailed(f"{name}: the replay is wrong: {wrong[0]}")
    return figures(outcome, inputs.fleet), outcome


def _policy(name: str, series: "Series", inputs: "PowerInputs") -> "PowerPolicy":
    from coordinator.sim import capacity_policies as known

    if name == OURS:
        return known.BatonPower(inputs.fleet, series.per_hour, inputs.rules)
    if name == "clairvoyant":
        return known.Clairvoyant(series.values, series.per_hour, inputs.fleet)
    return known.AlwaysOn() if name == "always-on" else known.IdleTimeout()


def _write_plot(path: Path, runs: "Mapping[str, PowerOutcome]", inputs: "PowerInputs") -> None:
    from coordinator.sim.capacity_plots import drawing

    write_plot(path, drawing(runs, inputs.fleet))


def _cells(name: str, row: "PowerFigures") -> tuple[object, ...]:
    return (
        name,
        f"{row.waiting_ratio:.2%}",
        f"{row.waiting_node_h:.1f}",
        f"{row.off_ratio:.1%}",
        f"{row.saved_ratio:.1%}",
        f"{row.usd_per_day:.0f}",
        f"{row.starts_per_day:.1f}",
    )
