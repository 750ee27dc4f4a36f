"""`baton leases`: what is worth leasing by the month today, with its reasons.

Problem: whoever signs for a month of GPUs wants the numbers before the signature: what was needed
for how much of the time, what each alternative is expected to cost, and what one GPU more is worth.
So a recommendation is a record with all of that, from the hours that the coordinator's attempts
add up to, or from a series in a file. Nothing is leased by it.
"""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli.finite import PRICE, Finite
from coordinator.cli.render import Column, write_json, write_notice, write_table
from coordinator.cli.settings import BadInput, common_options, settings_of

if TYPE_CHECKING:
    from coordinator.core.leasing import Fleet, Recommendation, Terms
    from coordinator.core.linear import SolveLinear

_COLUMNS = (
    Column("GPU TYPE"),
    Column("OWNED", right=True),
    Column("LEASED", right=True),
    Column("LEVEL", right=True),
    Column("LEASE TODAY", right=True),
    Column("ONE MORE $/H", right=True),
    Column("BOUND BY"),
)
_ALTERNATIVES = (
    Column("ALTERNATIVE"),
    Column("LEASED", right=True),
    Column("EXPECTED $", right=True),
)
# What the rule looks back to, and a day for a first hour that is not whole.
PAST_DAYS = 31


@click.command(short_help="Recommend what to lease by the month; nothing is leased.")
@click.option(
    "--demand", type=click.Path(path_type=Path), help="CSV: time, GPUs wanted; instead of asking."
)
@click.option("--column", default="demand", show_default=True, help="Of the CSV: the GPUs.")
@click.option("--gpu-type", default="H100", show_default=True, help="Of the CSV: for its prices.")
@click.option("--owned", type=click.IntRange(0), default=0, help="Of the CSV: GPUs of your own.")
@click.option("--lease-usd", type=PRICE, help="Of one GPU, an hour, by the month.")
@click.option("--burst-usd", type=PRICE, help="Of one GPU, an hour, by the hour.")
@click.option(
    "--flexible",
    "flexible_ratio",
    type=Finite(0, 1),
    default=0.0,
    show_default=True,
    help="Part of the work that may wait for a day. Needs gpu-baton[scheduling].",
)
@click.option("--node-gpus", type=click.IntRange(1), default=1, help="Lease so many at a time.")
@common_options
@click.pass_context
def leases(
    context: click.Context,
    demand: Path | None,
    column: str,
    gpu_type: str,
    *,
    owned: int,
    lease_usd: float | None,
    burst_usd: float | None,
    flexible_ratio: float,
    node_gpus: int,
) -> None:
    """Say what is worth leasing today, for each type of GPU.

    LEVEL is how many GPUs are needed for more of the time than a lease costs of burst; of what is
    missing to it a tenth is leased a day at most. ONE MORE is what one GPU more would save in an
    hour, with what there is. Prices and leases that run are those of the coordinator's
    configuration (docs/cost.md); without a file demand is what its attempts have held and waited
    for.

    \b
      baton leases
      baton leases --demand demand.csv --gpu-type H100 --owned 64 --flexible 0.3
    """
    from coordinator.core.leasing import Fleet

    prices = (lease_usd, burst_usd)
    if demand is not None:
        cases = [(_hours(demand, column), Fleet(gpu_type, owned), _table(gpu_type))]
    else:
        cases = _asked(context)
    solve = _solver() if flexible_ratio else None
    found = []
    for hours, fleet, known in cases:
        terms = _terms(prices, known, node_gpus)
        if terms is None:
            write_notice(f"{fleet.gpu_type}: there is no price by the month and by the hour")
            continue
        found.append(_recommended(hours, fleet, terms, flexible_ratio, solve))
    if not cases:
        write_notice("nothing is known of demand yet: no GPU was held in a whole hour")
    if settings_of(context).as_json:
        write_json(found)
        return
    _show(found)


_Known = tuple[float | None, float | None]


def _asked(context: click.Context) -> "list[tuple[list[float], Fleet, _Known]]":
    """Of each type that was held in the last weeks."""
    from coordinator.cli.cost_client import CostClient  # grpc takes its time
    from coordinator.core.leasing import Fleet, Lot

    settings = settings_of(context)
    settings.check()
    now = datetime.now(UTC)
    with CostClient(settings) as client:
        costs = client.costs(now - timedelta(days=PAST_DAYS), now, "gpu-type", "")
    fleets = {fleet.gpu_type: fleet for fleet in costs.fleets}
    found = []
    for use in costs.uses:
        fleet = fleets.get(use.gpu_type)
        lots = [] if fleet is None else fleet.lots
        there = Fleet(
            use.gpu_type,
            0 if fleet is None else fleet.owned_gpus,
            tuple(
                Lot(lot.gpus, round(lot.end_time.timestamp() * 1000))
                for lot in lots
                if lot.end_time is not None
            ),
        )
        begun = _since(costs.kept_since_time, use.begin_time)
        found.append((use.wanted_gpus[begun:], there, (use.lease_usd, use.burst_usd)))
    return found


def _since(kept: datetime | None, begin: datetime | None) -> int:
    """Hours before the first attempt that is kept say nothing."""
    if kept is None or begin is None:
        return 0
    return max(0, math.ceil((kept - begin).total_seconds() / 3600))


def _hours(path: Path, column: str) -> list[float]:
    from coordinator.forecast.demand_file import BadDemand, read_series

    try:
        series = read_series(path, column)
    except BadDemand as error:
        raise BadInput(str(error)) from error
    per_hour = series.per_hour
    steps = series.values[len(series.values) % per_hour :]
    return [sum(steps[at : at + per_hour]) / per_hour for at in range(0, len(steps), per_hour)]


def _table(gpu_type: str) -> _Known:
    from coordinator.core import tariffs

    tariff = tariffs.public(gpu_type)
    return tariff.lease_usd, tariff.burst_usd


def _terms(said: _Known, known: _Known, node_gpus: int) -> "Terms | None":
    from coordinator.core.leasing import Terms

    lease_usd, burst_usd = (
        other if own is None else own for own, other in zip(said, known, strict=True)
    )
    if not lease_usd or not burst_usd:
        return None
    return Terms(lease_usd, burst_usd, unit_gpus=node_gpus)


def _recommended(
    hours: list[float],
    fleet: "Fleet",
    terms: "Terms",
    flexible_ratio: float,
    solve: "SolveLinear | None",
) -> "Recommendation":
    from coordinator.core.deferral import Flexible
    from coordinator.core.leasing import recommend

    unix_ms = round(datetime.now(UTC).timestamp() * 1000)
    flexible = Flexible(flexible_ratio)
    return recommend(unix_ms, hours, fleet, terms, flexible=flexible, solve=solve)


def _solver() -> "SolveLinear":
    try:
        from coordinator.lease_solver import solve
    except ImportError as error:
        raise BadInput("--flexible needs a solver: pip install 'gpu-baton[scheduling]'") from error
    return solve


def _show(found: "list[Recommendation]") -> None:
    rows = [
        (
            each.gpu_type,
            each.owned_gpus,
            each.leased_gpus,
            each.level_gpus,
            each.lease_gpus,
            f"{each.worth_usd:.2f}",
            each.bound,
        )
        for each in found
    ]
    write_table(_COLUMNS, rows)
    for each in found:
        click.echo(f"\n{each.gpu_type}: {each.sentence}")
        if each.alternatives:
            write_table(
                _ALTERNATIVES,
                [
                    (one.name, one.leased_gpus, f"{one.expected_usd:.0f}")
                    for one in each.alternatives
                ],
            )
    if found:
        days = found[0].terms.days
        write_notice(f"expected over {days} days, if demand is as it was; nothing was leased")
