"""`baton leases`: what is worth leasing by the month today, with its reasons.

Problem: whoever signs for a month of GPUs wants the numbers before the signature: what was needed
for how much of the time, what each alternative is expected to cost, and what one GPU more is worth.
So a recommendation is a record with all of that, from the hours that the coordinator's attempts
add up to, or from a series in a file. Nothing is leased by it.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli.finite import PRICE, Finite
from coordinator.cli.render import Column, write_json, write_notice, write_sentence, write_table
from coordinator.cli.settings import BadInput, common_options, settings_of

if TYPE_CHECKING:
    from coordinator.core.lease_advice import Case
    from coordinator.core.leasing import Recommendation, Terms
    from coordinator.core.linear import SolveLinear

_COLUMNS = (
    Column("GPU TYPE"),
    Column("OWNED", right=True),
    Column("LEASED", right=True),
    Column("LEVEL", right=True),
    Column("LEASE TODAY", right=True),
    Column("ONE MORE $/H", right=True),
    Column("BOUND BY", wrap=True),
)
_ALTERNATIVES = (
    Column("ALTERNATIVE"),
    Column("LEASED", right=True),
    Column("EXPECTED $", right=True),
)
TYPE_OF_FILE = "H100"


@click.command(short_help="Recommend what to lease by the month; nothing is leased.")
@click.option(
    "--demand", type=click.Path(path_type=Path), help="CSV: time, GPUs wanted; instead of asking."
)
@click.option("--column", help="Of the CSV: the GPUs.  [default: demand]")
@click.option("--gpu-type", help="This type alone; of a CSV, for its prices.  [there: H100]")
@click.option("--owned", type=click.IntRange(0), help="Of the CSV: GPUs of your own.")
@click.option("--lease-usd", type=PRICE, help="Of one GPU, an hour, by the month.")
@click.option("--burst-usd", type=PRICE, help="Of one GPU, an hour, by the hour.")
@click.option(
    "--flexible",
    "flexible_ratio",
    type=Finite(0, 1),
    help="Part of the work that may wait for a day. Needs gpu-baton[scheduling].  [default: as jobs"
    " have said; of a CSV: 0]",
)
@click.option("--node-gpus", type=click.IntRange(1), default=1, help="Lease so many at a time.")
@common_options
@click.pass_context
def leases(
    context: click.Context,
    demand: Path | None,
    column: str | None,
    gpu_type: str | None,
    *,
    owned: int | None,
    lease_usd: float | None,
    burst_usd: float | None,
    flexible_ratio: float | None,
    node_gpus: int,
) -> None:
    """Say what is worth leasing today, for each type of GPU.

    LEVEL is how many GPUs are needed for more of the time than a lease costs of burst. What is
    missing to it is leased in lots, one a day and each a tenth of LEVEL at most: with a LEVEL of
    495 and 400 owned, 49 of the 95 that are missing. ONE MORE is what one GPU more would save in
    an hour, with what there is; BOUND BY the rule that had the last word. Prices and leases that
    run are those of the coordinator's configuration; without a file demand is what its attempts
    have held and waited for, and before these are kept what it saw of both. docs/cost.md has it
    all.

    \b
    Examples:
      baton leases
      baton leases --demand demand.csv --gpu-type H100 --owned 64 --flexible 0.3
    """
    from coordinator.core.deferral import Flexible
    from coordinator.core.lease_advice import Case, no_price, recommended
    from coordinator.core.leasing import Fleet

    prices = (lease_usd, burst_usd)
    if gpu_type is not None:
        gpu_type = _known_type(gpu_type, prices)
    if demand is not None:
        name = gpu_type or TYPE_OF_FILE
        hours = _hours(demand, column or "demand")
        cases, now = [Case(hours, Fleet(name, owned or 0), *_table(name))], datetime.now(UTC)
    else:
        for flag, given in (("--column", column), ("--owned", owned)):
            if given is not None:
                raise click.UsageError(f"{flag} is about a file: it says nothing without --demand")
        asked, now = _asked(context)
        cases = [each for each in asked if gpu_type in (None, each.fleet.gpu_type)]
    if flexible_ratio is not None:
        cases = [replace(case, flexible=Flexible(flexible_ratio)) for case in cases]
    solve = _solver(cases, asked=bool(flexible_ratio))
    found = []
    for case in cases:
        terms = _terms(prices, case, node_gpus)
        if terms is None:
            why = f"{no_price(case.fleet.gpu_type)}; give --lease-usd and --burst-usd"
            if demand is not None:
                raise BadInput(why)
            write_notice(why)
            continue
        unix_ms = round(now.timestamp() * 1000)
        found.append(recommended(unix_ms, case, terms, solve))
    if not cases:
        what = f" of {gpu_type}" if gpu_type else ""
        write_notice(f"nothing is known of demand{what} yet: no GPU was held in a whole hour")
    if settings_of(context).as_json:
        write_json(found)
        return
    _show(found)


_Known = tuple[float | None, float | None]


def _known_type(said: str, prices: _Known) -> str:
    """As the table calls it; a type that it does not have needs both prices."""
    from coordinator.core import gpu_types

    keys = [each.key for each in gpu_types.TYPES]
    known = next((key for key in keys if key.lower() == said.lower()), None)
    found = gpu_types.find(said) if known is None else None
    if known is None and found is None and None in prices:
        raise BadInput(
            f"--gpu-type {said}: there is no such type; known are {', '.join(keys)} (any other with"
            " --lease-usd and --burst-usd)"
        )
    return known or (said if found is None else found.key)


def _asked(context: click.Context) -> "tuple[list[Case], datetime]":
    """Of each type that was held in the last weeks, and until when: now by the coordinator's
    clock."""
    from coordinator.cli.cost_client import CostClient, Span  # grpc takes its time
    from coordinator.core.cost_requests import HourlyUse, TypeFleet
    from coordinator.core.lease_advice import PAST_DAYS, cases

    with CostClient(settings_of(context)) as client:
        costs = client.costs(Span(None, None, timedelta(days=PAST_DAYS)), "gpu-type", "")
    uses = [
        HourlyUse(
            use.gpu_type,
            _unix_ms(use.begin_time) or 0,
            tuple(use.gpus),
            use.lease_usd,
            use.burst_usd,
            tuple(use.wanted_gpus),
            use.flexible_ratio,
            use.flexible_hours,
            tuple(use.past_gpus),
        )
        for use in costs.uses
    ]
    fleets = [
        TypeFleet(
            fleet.gpu_type,
            fleet.owned_gpus,
            tuple((lot.gpus, _unix_ms(lot.end_time) or 0) for lot in fleet.lots),
        )
        for fleet in costs.fleets
    ]
    found = cases(uses, fleets, _unix_ms(costs.kept_since_time))
    return list(found), costs.end_time


def _unix_ms(time: datetime | None) -> int | None:
    return None if time is None else round(time.timestamp() * 1000)


def _hours(path: Path, column: str) -> tuple[float, ...]:
    from coordinator.forecast.demand_file import BadDemand, read_series

    try:
        series = read_series(path, column)
    except BadDemand as error:
        raise BadInput(str(error)) from error
    per_hour = series.per_hour
    steps = series.values[len(series.values) % per_hour :]
    starts = range(0, len(steps), per_hour)
    return tuple(sum(steps[at : at + per_hour]) / per_hour for at in starts)


def _table(gpu_type: str) -> _Known:
    from coordinator.core import tariffs

    tariff = tariffs.public(gpu_type)
    return tariff.lease_usd, tariff.burst_usd


def _terms(said: _Known, case: "Case", node_gpus: int) -> "Terms | None":
    from coordinator.core.lease_advice import terms_of

    lease_usd, burst_usd = said
    return terms_of(
        case.lease_usd if lease_usd is None else lease_usd,
        case.burst_usd if burst_usd is None else burst_usd,
        node_gpus,
    )


def _solver(cases: "Sequence[Case]", *, asked: bool) -> "SolveLinear | None":
    """Where some work may wait; `asked`: a person has said so, who is told what that needs."""
    if not any(case.flexible.ratio for case in cases):
        return None
    need = "a solver: pip install 'gpu-baton[scheduling]'"
    try:
        from coordinator.lease_solver import solve
    except ImportError as error:
        if asked:
            raise BadInput(f"--flexible needs {need}") from error
        write_notice(f"LEVEL is found as if no work could wait; for more it takes {need}")
        return None
    return solve


def _show(found: "list[Recommendation]") -> None:
    if not found:
        return
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
        click.echo()
        write_sentence(f"{each.gpu_type}: {each.sentence}")
        if each.alternatives:
            write_table(
                _ALTERNATIVES,
                [
                    (one.name, one.leased_gpus, f"{one.expected_usd:.0f}")
                    for one in each.alternatives
                ],
            )
    if any(each.alternatives for each in found):
        days = found[0].terms.days
        write_notice(f"expected over {days} days, if demand is as it was; nothing was leased")
    for each in found:
        if each.flexible_ratio:
            write_notice(
                f"{each.gpu_type}: {each.flexible_ratio:.0%} of the work may wait for"
                f" {each.flexible_hours} h, and does where that is cheaper"
            )
