"""A year of leases in a second: what a rule would have paid over a series of demand, hour by hour.

Problem: whether a rule for leases saves money is known when the leases have run out. So it is
replayed over demand that has been: each day it is shown the hours until then, what it leases stays
for its term, and what was missing is rented by the hour. Beside it stand rules that people follow
(the peak for ever, all by the hour, last month's peak) and the least that anybody could have paid
who had known the series (`clairvoyant.py`).

Money is counted over the hours from `begin` on; a lease counts for those of its hours that lie in
them. Rules begin before, so that a start in the middle of a year is not one with empty hands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.core.deferral import Flexible, burst_hours
from coordinator.core.leasing import H_PER_DAY, MS_PER_H, Fleet, Lot, Terms, recommend
from coordinator.core.linear import SolveLinear

# Days of history before the first lease: fewer, and the rule has no recommendation.
FIRST_DAY: Final = 7
MONTH_DAYS: Final = 30
IDLE_H: Final = 1
MS_PER_DAY: Final = H_PER_DAY * MS_PER_H


@dataclass(frozen=True, slots=True)
class Bill:
    """In US dollars. `gpu_hours` are those that were leased, rented by the hour, and leased without
    use."""

    lease_usd: float
    burst_usd: float
    leased_gpu_hours: float
    burst_gpu_hours: float
    idle_gpu_hours: float

    @property
    def usd(self) -> float:
        return self.lease_usd + self.burst_usd


def replayed(
    hours: Sequence[float],
    terms: Terms,
    *,
    flexible: Flexible | None = None,
    solve: SolveLinear | None = None,
) -> list[int]:
    """How many GPUs are leased in each hour where every recommendation is followed."""
    lots: list[Lot] = []
    leased: list[int] = []
    for day in range(len(hours) // H_PER_DAY):
        now_ms = day * MS_PER_DAY
        if day >= FIRST_DAY:
            lots = [lot for lot in lots if lot.ends_unix_ms > now_ms]
            past = hours[: day * H_PER_DAY]
            fleet = Fleet("", lots=tuple(lots))
            said = recommend(now_ms, past, fleet, terms, flexible=flexible, solve=solve)
            if said.lease_gpus:
                lots.append(Lot(said.lease_gpus, now_ms + terms.days * MS_PER_DAY))
        leased += [sum(lot.gpus for lot in lots)] * H_PER_DAY
    return leased


def bill(
    hours: Sequence[float],
    leased: Sequence[float],
    terms: Terms,
    flexible: Flexible | None = None,
) -> Bill:
    """Of these hours; work that may wait is served within them."""
    burst = burst_hours(hours, leased, flexible or Flexible())
    leased_h, burst_h = float(sum(leased)), sum(burst)
    idle_h = max(0.0, leased_h + burst_h - sum(hours))
    return Bill(terms.lease_usd * leased_h, terms.burst_usd * burst_h, leased_h, burst_h, idle_h)


Rule = Callable[[Sequence[float], int], float]


def always_on_peak(hours: Sequence[float], begin: int) -> float:
    """The most that is wanted from then on, as if one knew it, for all of the time."""
    return max(hours[begin:])


def all_burst(_hours: Sequence[float], _begin: int) -> float:
    """Nothing is leased."""
    return 0.0


def last_month_peak(hours: Sequence[float], begin: int) -> float:
    """The most that was wanted in the month before, and burst beyond it."""
    return max(hours[max(0, begin - MONTH_DAYS * H_PER_DAY) : begin])


BASELINES: Final[dict[str, Rule]] = {
    "always-on peak": always_on_peak,
    "all burst": all_burst,
    "last month's peak + burst": last_month_peak,
}


def baseline(name: str, hours: Sequence[float], begin: int, terms: Terms) -> Bill:
    """What it costs from hour `begin` on."""
    supply = BASELINES[name](hours, begin)
    return bill(hours[begin:], [supply] * (len(hours) - begin), terms)


def idle_timeout(hours: Sequence[float], begin: int, terms: Terms) -> Bill:
    """GPUs rented by the hour, and given back after `IDLE_H` hours without use."""
    held = [max(hours[max(0, at - IDLE_H) : at + 1]) for at in range(begin, len(hours))]
    rented, used = sum(held), sum(hours[begin:])
    return Bill(0.0, terms.burst_usd * rented, 0.0, rented, rented - used)
