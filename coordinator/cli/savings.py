"""What the same GPUs had cost by rules that have names, and what nobody could have gone below.

Problem: "we saved 40%" says nothing without "against what", and a baseline can always be found that
is bad enough. So these are the ones that people really run (the peak for ever; by the hour with a
timeout; last month's peak with burst on top), counted over the GPUs that were held in each hour,
and beside them stands the clairvoyant: leases of a month that may begin on any day, by somebody who
knew all hours. Where a price is not known nothing is compared.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from coordinator.cli.cost_client import Baseline, Costs
    from coordinator.core.leasing import Terms

PEAK: Final = "always-on peak"
CLAIRVOYANT: Final = "clairvoyant (nobody could)"
SOLVER_MODULE: Final = "highspy"
S_PER_H: Final = 3_600.0
HOURS_MIN: Final = 24
Price = Callable[[Sequence[float], int, "Terms"], float]


def compared(costs: "Costs", begin: datetime) -> "tuple[list[Baseline], str, float | None]":
    """The baselines, or a sentence that says why there are none; and which part of always-on peak
    is the most that could be saved: 1 - mean / peak, over the types by their price."""
    from coordinator.cli.cost_client import Baseline
    from coordinator.core.leasing import Terms

    unpriced = [u.gpu_type for u in costs.uses if not u.lease_usd or not u.burst_usd]
    if unpriced:
        of = ", ".join(unpriced)
        return [], f"there is no price by the month and by the hour of {of}", None
    if costs.total.unpriced_gpu_hours:
        return [], "own GPUs have no price: 'owned_usd' in the coordinator's tariffs", None
    series: list[tuple[list[float], int, Terms]] = []
    for use in costs.uses:
        assert use.begin_time is not None
        assert use.lease_usd
        assert use.burst_usd
        before = max(0, -int((use.begin_time - begin).total_seconds() // S_PER_H))
        if len(use.gpus) - before < HOURS_MIN:
            return [], f"less than {HOURS_MIN} hours of the span have passed", None
        series.append((use.gpus, before, Terms(use.lease_usd, use.burst_usd)))
    if not series:
        return [], "no GPU was held", None
    paid_usd = costs.usd - costs.total.energy_usd
    found = []
    for name, price in _rules(costs, begin):
        usd = sum(price(*each) for each in series)
        found.append(Baseline(name=name, usd=usd, saved_usd=usd - paid_usd))
    used_usd = sum(terms.lease_usd * sum(gpus[before:]) for gpus, before, terms in series)
    peak_usd = next(each.usd for each in found if each.name == PEAK)
    return found, "", 1.0 - used_usd / peak_usd if peak_usd else None


def _rules(costs: "Costs", begin: datetime) -> Iterator[tuple[str, Price]]:
    from coordinator.sim import lease_replay

    def of(name: str) -> Price:
        return lambda gpus, at, terms: lease_replay.baseline(name, gpus, at, terms).usd

    yield PEAK, of(PEAK)
    yield "idle timeout 1 h", lambda *case: lease_replay.idle_timeout(*case).usd
    month = timedelta(days=lease_replay.MONTH_DAYS)
    if costs.kept_since_time is not None and costs.kept_since_time <= begin - month:
        yield "last month's peak + burst", of("last month's peak + burst")
    if importlib.util.find_spec(SOLVER_MODULE) is not None:
        yield CLAIRVOYANT, _clairvoyant_usd


def _clairvoyant_usd(gpus: Sequence[float], begin: int, terms: "Terms") -> float:
    """Of whole days; the hours of the last one that are missing count as the mean of its others."""
    from coordinator.lease_solver import solve
    from coordinator.sim.clairvoyant import hindsight

    hours = list(gpus[begin:])
    rest = hours[len(hours) // HOURS_MIN * HOURS_MIN :]
    whole = hours + [sum(rest) / len(rest)] * (HOURS_MIN - len(rest)) if rest else hours
    return hindsight(whole, terms, solve).usd * len(hours) / len(whole)
