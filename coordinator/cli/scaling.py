"""`baton plan` and `baton scale`: what the fleet should be now, why, and a person's consent.

Problem: whoever lets a program switch machines asks three things: what would it do now, why did it
do that, and was it right. One table, one record with everything that it went by, and what came of
it beside what was expected. All counts are GPUs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli import scaling_plot
from coordinator.cli.render import Column, write_json, write_notice, write_sentence, write_table
from coordinator.cli.settings import EXIT_FAILED, CommandFailed, common_options, settings_of
from coordinator.cli.units import format_seconds, format_span
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.cli.capacity_client import CapacityClient, Decision, Deed, TypePlan
    from coordinator.cli.demand_client import Told
    from coordinator.cli.values import Node

LEVELS_SHOWN = ("2.5%", "5%", "10%", "25%", "50%", "75%", "90%", "95%", "97.5%")
DECISIONS_DRAWN = 1_000  # all that are kept
_COLUMNS = (
    Column("GPU TYPE"),
    Column("ON", right=True),
    Column("IDLE", right=True),
    Column("LEAVING", right=True),
    Column("STARTING", right=True),
    Column("OFF", right=True),
    Column("RUN", right=True),
    Column("WAIT", right=True),
    Column("NEEDED", right=True),
    Column("KEPT", right=True),
    Column("WANTED", right=True),
    Column("REMARK", wrap=True),
)
_DECISION_COLUMNS = (
    Column("ID"),
    Column("TIME"),
    Column("GPU TYPE"),
    Column("MODE"),
    Column("REGRET", right=True),
    Column("DECISION", wrap=True),
)
_ALTERNATIVE_COLUMNS = (
    Column("ALTERNATIVE"),
    Column("GPUS", right=True),
    Column("EXPECTED $", right=True),
    Column("REALISED $", right=True),
)


def _connect(context: click.Context) -> "CapacityClient":
    from coordinator.cli.capacity_client import CapacityClient

    return CapacityClient(settings_of(context))


def _demand(context: click.Context, gpu_type: str, period_min: int) -> "Told | None":
    """`None` where the coordinator says that there is none: nobody has ever wanted that type."""
    from coordinator.cli.demand_client import DemandClient

    try:
        with DemandClient(settings_of(context)) as client:
            return client.demand(gpu_type, "", "", period_min)
    except CommandFailed as error:
        if error.exit_code != EXIT_FAILED:
            raise
        write_notice(f"no demand of {gpu_type} is drawn: {error}")
        return None


@click.command(short_help="Show what the fleet should be now.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write demand of the last two days, what was on and what is, as an SVG file.",
)
@common_options
@click.pass_context
def plan(context: click.Context, plot: Path | None) -> None:
    """Show the plan of the fleet's size, by GPU type, in GPUs.

    NEEDED is what will be wanted until a node that is started now is there, by the forecast and by
    what runs and waits; KEPT what stays on if it is on, and WANTED what should be on. LEAVING ones
    take nothing new and go off when they are empty. docs/scaling.md has the rule.

    \b
    Example:
      baton plan
      baton plan --plot fleet.svg
    """
    with _connect(context) as client:
        found = client.plan()
        now = client.now()
        decided = client.decisions(DECISIONS_DRAWN, "") if plot is not None else []
    # Demand from before any node had joined is of no type; --json has it all the same.
    types = [one for one in found.types if any(_row(one)[1:-1])] or found.types
    if plot is not None:
        told = [_demand(context, one.gpu_type, scaling_plot.PERIOD_MIN) for one in types]
        scaling_plot.draw_plan(plot, types, told, decided, found.made)
    if settings_of(context).as_json:
        write_json(found)
        return
    if types:
        write_table(_COLUMNS, map(_row, types))
    else:
        write_notice("there is nothing to plan yet: no GPU, and nobody who wants one")
    write_notice(
        f"mode {found.mode}: {found.why}; the plan is for {_percent(found.level)} of cases"
    )
    for one in found.types:
        if one.need_reason:
            write_notice(f"{one.gpu_type}: {one.need_reason}")
        if one.sentence:
            age = format_span(one.decided_time, now) if one.decided_time else ""
            write_notice(f"{one.sentence} ({age} ago)" if age else one.sentence)
    for decision in found.proposed:
        write_notice(f"`baton scale approve {decision.id}` carries out: {_deeds(decision)}")


def _row(one: "TypePlan") -> tuple[object, ...]:
    return (
        one.gpu_type,
        one.on_gpus,
        one.idle_gpus,
        one.leaving_gpus,
        one.starting_gpus,
        one.off_gpus,
        one.running_gpus,
        one.queued_gpus,
        one.need_gpus,
        one.keep_gpus,
        one.wanted_gpus,
        "; ".join(_remarks(one)),
    )


def _remarks(one: "TypePlan") -> Iterator[str]:
    if one.rented_gpus:
        yield f"{quantity(one.rented_gpus, 'is', 'are')} rented by the hour"
    if one.failed_gpus:
        yield f"{one.failed_gpus} did not start"
    if one.closed_gpus:
        yield f"{quantity(one.closed_gpus, 'is', 'are')} closed or lost"
    if one.stale:
        yield "its forecast is too old, or not made yet"
    elif not one.soon_gpus:
        yield "no forecast yet"
    if one.coverage_ratio is not None:
        yield f"bands held {one.coverage_ratio:.0%} of what came"


@click.group()
@common_options
def scale() -> None:
    """Look at decisions of the fleet's size, and agree to them.

    \b
    Examples:
      baton scale list
      baton scale explain scale-7
      baton scale approve scale-7
    """


@scale.command("list")
@click.option("--count", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--gpu-type", default="", help="Only decisions about this type.")
@common_options
@click.pass_context
def list_(context: click.Context, count: int, gpu_type: str) -> None:
    """List decisions, the newest first.

    \b
    Example:
      baton scale list --count 5
    """
    with _connect(context) as client:
        found = client.decisions(count, gpu_type)
    if settings_of(context).as_json:
        write_json(found)
        return
    if not found:
        what = f" about {gpu_type}" if gpu_type else ""
        write_notice(f"there is no decision{what} yet; one is written when nodes have to change")
        return
    write_table(
        _DECISION_COLUMNS,
        [
            (
                one.id,
                f"{one.time:%Y-%m-%d %H:%M}" if one.time else None,
                one.gpu_type,
                one.mode,
                None if one.regret_usd is None else f"${one.regret_usd:.2f}",
                one.sentence,
            )
            for one in found
        ],
    )


@scale.command()
@click.argument("decision")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what was expected, what came and the alternatives as an SVG file.",
)
@common_options
@click.pass_context
def explain(context: click.Context, decision: str, plot: Path | None) -> None:
    """Show all that DECISION went by, and what came of it.

    EXPECTED is what each alternative was expected to cost in work that waits, GPUs that idle,
    cycles and rent; REALISED what it would have cost by the demand that came, and the regret by how
    much the chosen one costs more than the cheapest.

    \b
    Example:
      baton scale explain scale-7
      baton scale explain scale-7 --plot scale-7.svg
    """
    as_json = settings_of(context).as_json
    with _connect(context) as client:
        found = client.decision(decision)
        ordered_on = not as_json and any(_is_order_on(deed) for deed in found.deeds)
        nodes = {node.id: node for node in client.nodes()} if ordered_on else {}
    if plot is not None:
        period_min = scaling_plot.period_min(found, client.now())
        scaling_plot.draw_decision(plot, found, _demand(context, found.gpu_type, period_min))
    if as_json:
        write_json(found)
        return
    _show(found)
    for sentence in _not_up(found, nodes):
        write_notice(sentence)


@scale.command()
@click.argument("decision")
@common_options
@click.pass_context
def approve(context: click.Context, decision: str) -> None:
    """Carry out what DECISION proposes.

    Only of the newest decision of a GPU type: an older one went by an older fleet. What the guard
    rails forbid is not done for it either.

    \b
    Example:
      baton scale approve scale-7
    """
    with _connect(context) as client:
        found = client.approve(decision)
    if settings_of(context).as_json:
        write_json(found)
        return
    click.echo(f"{found.id}: ordered: {_deeds(found)}")
    write_notice("`baton plan` shows what comes of it")


def _deeds(decision: "Decision") -> str:
    told = [f"{one.verb} {' '.join(one.nodes)}" for one in decision.deeds if one.nodes]
    return "; ".join(told) or "nothing"


def _is_order_on(deed: "Deed") -> bool:
    return deed.verb in ("resume", "create") and deed.state != "proposed"


def _not_up(decision: "Decision", nodes: "Mapping[str, Node]") -> Iterator[str]:
    """Of nodes that were ordered on, those that are not on now: the order is no start yet."""
    for deed in filter(_is_order_on, decision.deeds):
        for name in deed.nodes:
            node = nodes.get(name)
            if node is None:
                yield f"{name} is not there any more"
            elif node.power not in ("on", "leaving"):
                why = f": {node.reason}" if node.reason else ""
                yield f"{name} is {node.power or 'unknown'} now{why}"


def _show(one: "Decision") -> None:
    write_sentence(f"{one.id}: {one.sentence}")
    click.echo(f"{one.time:%Y-%m-%d %H:%M:%S} UTC, mode {one.mode}, {one.gpu_type}")
    run, wait = (
        quantity(one.running_gpus, "runs", "run"),
        quantity(one.queued_gpus, "waits", "wait"),
    )
    there = f"{one.there_gpus} on or starting, {run}, {wait}"
    click.echo(f"seen: {there}, {one.guaranteed_gpus} of them guaranteed")
    inputs = "; ".join(_inputs(one))
    if inputs:
        write_sentence(inputs)
    cases = f"{_percent(one.level)} of cases"
    click.echo(f"planned for {cases}: {one.need_gpus} needed, {one.keep_gpus} kept on")
    for span_s, gpus in ((one.soon_s, one.soon_gpus), (one.holds_s, one.later_gpus)):
        if gpus:
            said = ", ".join(
                f"{level} {_gpus(value)}" for level, value in zip(LEVELS_SHOWN, gpus, strict=True)
            )
            within = format_seconds(round(span_s))
            write_sentence(f"maximum demand within {within}, GPUs: {said}")
    if one.coverage_ratio is not None:
        click.echo(f"bands of 95% held {one.coverage_ratio:.0%} of what came in three days")
    click.echo(f"held back by: {one.rail_reason or 'nothing'}")
    states = [f"{deed.state}: {deed.verb} {' '.join(deed.nodes)}" for deed in one.deeds]
    click.echo("; ".join(states) or "nothing was to be done")
    write_table(
        _ALTERNATIVE_COLUMNS,
        [
            (
                each.name,
                each.gpus,
                f"{each.expected_usd:.2f}",
                None if each.realised_usd is None else f"{each.realised_usd:.2f}",
            )
            for each in one.alternatives
        ],
    )
    if one.regret_usd is None:
        write_notice(f"what came of it is known {one.holds_s / 3600:.1f} h after the decision")
    else:
        write_notice(f"{one.mean_gpus:.1f} GPUs were wanted; regret ${one.regret_usd:.2f}")


def _inputs(one: "Decision") -> Iterator[str]:
    """What else it went by, where there was any of it."""
    if one.frees_s is not None:
        yield f"a node is expected to free within {format_seconds(round(one.frees_s))}"
    if one.rent_usd is not None:
        yield f"a rented GPU costs ${one.rent_usd:.2f} an hour"
    if one.patient_gpus:
        yield f"{one.patient_gpus} more may wait"
    if one.ending_gpus:
        yield f"{quantity(one.ending_gpus, 'comes', 'come')} free before a start would be there"
    if one.late_jobs:
        jobs = ", ".join(map(str, one.late_jobs))
        yield f"{quantity(one.late_gpus, 'GPU')} more would keep the deadlines of: {jobs}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g}%"


def _gpus(forecast: float) -> str:
    """More digits of a forecast say nothing."""
    return f"{forecast:.0f}" if forecast >= 10 else f"{forecast:.2g}"
