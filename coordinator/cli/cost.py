"""`baton cost`: what work has cost, by project, job or type of GPU.

Problem: the month's invoice says what was paid, and not for what. Here the same money is laid over
the attempts that held the GPUs, and what nobody used has a line of its own. A number whose price
nobody has said is "-", and a saving is shown only beside the rule that it is a saving against.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from coordinator.cli.completion import projects
from coordinator.cli.render import (
    UNKNOWN,
    Column,
    write_json,
    write_notice,
    write_plot,
    write_table,
)
from coordinator.cli.savings import CLAIRVOYANT, compared
from coordinator.cli.settings import common_options, settings_of
from coordinator.cli.units import parse_duration

if TYPE_CHECKING:
    from coordinator.cli.cost_client import Costs, Money, Span

_MONEY_COLUMNS = tuple(
    Column(title, right=True)
    for title in (
        "GPU-HOURS", "TOTAL $", "OWN $", "LEASE $", "BURST $", "ENERGY $", "KWH", "$/M TOKENS",
    )
)  # fmt: skip
_BASELINE_COLUMNS = (
    Column("BASELINE"),
    Column("WOULD COST $", right=True),
    Column("SAVED $", right=True),
    Column("SAVED", right=True),
)
IDLE_LEASE = "(idle lease)"
TOTAL = "(total)"


class _Day(click.ParamType[datetime]):
    name = "day"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            return datetime.strptime(str(value), "%Y-%m-%d")
        except ValueError:
            self.fail(f"{value!r} is no day; write it like 2026-11-01", param, ctx)


@click.command(short_help="Show what work has cost, and what idled.")
@click.option(
    "--by",
    type=click.Choice(("project", "job", "gpu-type")),
    default="project",
    show_default=True,
    help="A line for each.",
)
@click.option(
    "--project",
    default="",
    shell_complete=projects,
    help="Of one project alone, without leases that idled.",
)
@click.option(
    "--last",
    default="30d",
    metavar="DURATION",
    show_default=True,
    help="A span until now, as 12h or 30d.",
)
@click.option(
    "--from",
    "begin",
    type=_Day(),
    metavar="YYYY-MM-DD",
    help="The first day, by UTC, instead.",
)
@click.option(
    "--to",
    "end",
    type=_Day(),
    metavar="YYYY-MM-DD",
    help="The day after the last one; else now.",
)
@click.option("--compare", is_flag=True, help="Beside named baselines and the clairvoyant.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write money a day as SVG."
)
@common_options
@click.pass_context
def cost(
    context: click.Context,
    by: str,
    project: str,
    last: str,
    *,
    begin: datetime | None,
    end: datetime | None,
    compare: bool,
    plot: Path | None,
) -> None:
    """Say what work has cost over some time, from the attempts that the coordinator keeps.

    OWN is what own GPUs are written off with while they work, LEASE the used part of leases; what
    of them idled has a line of its own. ENERGY is that of own GPUs at work. $/M TOKENS is told
    where a built-in trainer's configuration says how many tokens a step has. Prices are those of
    the coordinator's configuration (docs/cost.md), else of a dated table.

    \b
    Examples:
      baton cost --by job --last 7d
      baton cost --from 2026-11-01 --to 2026-12-01 --plot november.svg
    """
    from coordinator.cli.cost_client import CostClient  # grpc takes its time

    span = _span(context, last, begin, end)
    with CostClient(settings_of(context)) as client:
        costs = client.costs(span, by, project)
    if span.begin is not None and costs.end_time <= costs.begin_time:
        why = "the span begins later than it is by the coordinator's clock"
        raise click.BadParameter(why, param_hint="--from")
    if compare:
        costs = _compared(costs, project)
    if plot is not None:
        _write_plot(plot, costs)
    if settings_of(context).as_json:
        write_json(costs)
        return
    _show(costs, by)


def _span(
    context: click.Context, last: str, begin: datetime | None, end: datetime | None
) -> "Span":
    from coordinator.cli.cost_client import Span
    from coordinator.core.cost_requests import SPAN_DAYS_MAX

    if begin is not None and context.get_parameter_source("last") is not ParameterSource.DEFAULT:
        raise click.UsageError("--from and --last both say where the span begins: leave one out")
    until = None if end is None else end.replace(tzinfo=UTC)
    since, length, hint = None, timedelta(0), "--from"
    if begin is None:
        hint = "--last"
        try:
            length = timedelta(milliseconds=parse_duration(last))
        except (ValueError, OverflowError) as error:
            raise click.BadParameter(str(error), param_hint=hint) from error
    else:
        since = begin.replace(tzinfo=UTC)
        if until is None:
            return Span(since, None)  # what time it is the coordinator knows
        length = until - since
    if length <= timedelta(0):
        raise click.BadParameter("the span ends where it begins, or earlier", param_hint=hint)
    # A span that ends later than now ends now, which is for the coordinator to say.
    ends = until is None or begin is None or until <= datetime.now(UTC)
    if ends and length > timedelta(days=SPAN_DAYS_MAX):
        raise click.BadParameter(f"a span is {SPAN_DAYS_MAX} days at most", param_hint=hint)
    return Span(since, until, length)


def _compared(costs: "Costs", project: str) -> "Costs":
    from msgspec.structs import replace

    if project:
        return replace(costs, baselines_why="leases are not one project's")
    baselines, why, limit_ratio = compared(costs, costs.begin_time)
    return replace(costs, baselines=baselines or None, baselines_why=why, limit_ratio=limit_ratio)


def _show(costs: "Costs", by: str) -> None:
    heading = (Column(by.replace("-", " ").upper(), shorten=True),)
    rows = [(f"{line.key} {line.name}".strip(), *_cells(line.money)) for line in costs.lines]
    if costs.idle_lease_usd:
        idle = _dollars(costs.idle_lease_usd)
        rows.append((IDLE_LEASE, UNKNOWN, idle, UNKNOWN, idle, *[UNKNOWN] * 4))
    total = list(_cells(costs.total))
    total[1] = _dollars(costs.usd)
    rows.append((TOTAL, *total))
    write_table((*heading, *_MONEY_COLUMNS), rows)
    if costs.baselines:
        paid_usd = costs.usd - costs.total.energy_usd
        click.echo()
        write_table(
            _BASELINE_COLUMNS,
            [
                (
                    each.name,
                    _dollars(each.usd),
                    _dollars(each.saved_usd),
                    f"{100 * each.saved_usd / each.usd:.1f}%" if each.usd else UNKNOWN,
                )
                for each in costs.baselines
            ],
        )
        write_notice(
            f"baselines are for the GPUs that were held, without energy; {_dollars(paid_usd)} were"
            " paid for these"
        )
        if costs.limit_ratio is not None:
            write_notice(
                f"of always-on peak no more than {costs.limit_ratio:.1%} can be saved at the same"
                " price: 1 - mean / peak of what was held"
            )
        if CLAIRVOYANT not in [each.name for each in costs.baselines]:
            write_notice("how far below one could go takes a solver: gpu-baton[scheduling]")
    for sentence in _remarks(costs):
        write_notice(sentence)


def _remarks(costs: "Costs") -> list[str]:
    """What a reader has to know to believe it."""
    found = [f"from {costs.begin_time:%Y-%m-%d %H:%M} to {costs.end_time:%Y-%m-%d %H:%M} UTC"]
    if costs.baselines_why:
        found.append(f"no baselines: {costs.baselines_why}")
    if costs.total.unpriced_gpu_hours:
        found.append(
            f"{costs.total.unpriced_gpu_hours:.3g} GPU-hours have no price and are in no sum but"
            " for their energy; say 'owned_usd' in the coordinator's tariffs"
        )
    if costs.prices_source:
        found.append(f"prices: {costs.prices_source}")
    if costs.total.energy_kwh:
        found.append(f"energy: {costs.energy_source}")
    if costs.kept_since_time is not None:
        found.append(f"attempts are kept since {costs.kept_since_time:%Y-%m-%d %H:%M} UTC")
    return found


def _cells(money: "Money") -> tuple[str | None, ...]:
    tokens = money.usd_per_million_tokens
    return (
        f"{money.gpu_hours:.2f}",
        _dollars(money.usd),
        _dollars(money.owned_usd),
        _dollars(money.lease_usd),
        _dollars(money.burst_usd),
        _dollars(money.energy_usd),
        f"{money.energy_kwh:.2f}",
        None if tokens is None else f"{tokens:.3g}",
    )


def _dollars(usd: float) -> str:
    return f"{usd:.2f}"


def _write_plot(path: Path, costs: "Costs") -> None:
    from coordinator.sim.svg import Chart, Curve, draw

    begin, end = costs.begin_time, costs.end_time
    known = [(day.begin_time, day) for day in costs.days if day.begin_time is not None]
    days = [((at - begin).total_seconds() / 86_400, day) for at, day in known]
    parts = {
        "own": [(at, day.money.owned_usd) for at, day in days],
        "lease, used": [(at, day.money.lease_usd) for at, day in days],
        "lease, idle": [(at, day.idle_lease_usd) for at, day in days],
        "burst": [(at, day.money.burst_usd) for at, day in days],
        "energy": [(at, day.money.energy_usd) for at, day in days],
    }
    curves = [
        Curve(name, [*points, (_end_days(begin, end), points[-1][1])], steps=True)
        for name, points in parts.items()
        if any(usd for _, usd in points)
    ]
    chart = Chart(
        "Money a day", f"days since {begin:%Y-%m-%d %H:%M} UTC", "US dollars a day", curves
    )
    write_plot(path, draw(chart))


def _end_days(begin: datetime, end: datetime) -> float:
    """Days of the span, where the last step of a curve ends."""
    return (end - begin).total_seconds() / 86_400
