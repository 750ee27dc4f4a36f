"""The least that could have been paid: leases and burst by somebody who knew all that came.

Problem: a saving against a bad rule says little. What is left to gain is the distance to the best
that was possible, and that is a linear program over the whole series: leases of a term that may
begin on any day, also before the series does, and are paid for by their hours in it; burst by the
hour; and work that may wait until it is due. Nobody can reach it, since nobody knows the series.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.core.deferral import Flexible, add_demand
from coordinator.core.leasing import H_PER_DAY, Terms
from coordinator.core.linear import Draft, SolveLinear


@dataclass(frozen=True, slots=True)
class Hindsight:
    """`leased_gpus` by day; `worth_usd` is what one GPU more, for all of the time, would have
    saved in an hour."""

    usd: float
    leased_gpus: tuple[float, ...]
    worth_usd: float


def hindsight(
    hours: Sequence[float], terms: Terms, solve: SolveLinear, flexible: Flexible | None = None
) -> Hindsight:
    """Of whole days. Raises `ValueError` where the solver finds nothing."""
    days = len(hours) // H_PER_DAY
    draft = Draft()
    first = 1 - terms.days
    lots = {
        begin: draft.column(
            terms.lease_usd * H_PER_DAY * (min(days, begin + terms.days) - max(0, begin))
        )
        for begin in range(first, days)
    }
    leased = [draft.column(0.0) for _ in range(days)]
    for day, total in enumerate(leased):
        running = [(lots[begin], -1.0) for begin in range(day - terms.days + 1, day + 1)]
        draft.row([(total, 1.0), *running], 0.0, 0.0)
    supplies = [[(leased[hour // H_PER_DAY], 1.0)] for hour in range(days * H_PER_DAY)]
    rows = add_demand(
        draft, hours[: days * H_PER_DAY], supplies, terms.burst_usd, flexible or Flexible()
    )
    found = solve(draft.done())
    if found is None:
        raise ValueError(f"no optimum was found for {days} days of leases")
    worth_usd = sum(found.prices[row] for row in rows) / len(rows)
    return Hindsight(found.cost, tuple(found.values[total] for total in leased), worth_usd)
