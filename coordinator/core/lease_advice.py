"""What is worth leasing in this fleet: its own history, its own prices, and the rule.

Problem: a person who asks (`baton leases`) and a coordinator that says it by itself each day must
not have two answers. So what both do stands here once: which hours of a type count, what there is
of it, what it costs, and what is said where one of these is not known. The person's question comes
over the wire as the same values (`HourlyUse`, `TypeFleet`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.core import bills
from coordinator.core.cost_requests import CostPage, GetCosts, Grouping, HourlyUse, TypeFleet
from coordinator.core.deferral import Flexible
from coordinator.core.lease_messages import LeasesMade, MakeLeases, Unadvised
from coordinator.core.leasing import (
    MS_PER_H,
    NO_HISTORY,
    Fleet,
    Lot,
    Recommendation,
    Terms,
    known_hours,
    recommend,
)
from coordinator.core.linear import SolveLinear
from coordinator.core.state import Instant

# What the rule looks back to, and a day for a first hour that is not whole.
PAST_DAYS: Final = 31
NOTHING: Final = "nothing is known of demand yet: no GPU was held in a whole hour"


@dataclass(frozen=True, slots=True)
class Case:
    """A type of GPU: demand by the hour, the newest last, what there is, what it costs an hour, and
    which part of demand may wait. The first `sampled` hours are of the history of demand."""

    hours: tuple[float, ...]
    fleet: Fleet
    lease_usd: float | None
    burst_usd: float | None
    flexible: Flexible = field(default_factory=Flexible)
    sampled: int = 0


def advise(asked: MakeLeases, solve: SolveLinear | None = None) -> LeasesMade:
    """What `baton leases` would say at that moment; it may run in any thread. Without a solver the
    level is found as if no work could wait."""
    begin_ms = max(0, asked.unix_ms - PAST_DAYS * bills.MS_PER_DAY)
    body = GetCosts(begin_ms, asked.unix_ms, Grouping.GPU_TYPE)
    books, at = asked.books, Instant(0, asked.unix_ms)
    page = bills.answer(books, at, body, books.past)
    assert isinstance(page, CostPage), page
    found: list[Recommendation] = []
    unadvised: list[Unadvised] = []
    for case in cases(page.uses, page.fleets, page.kept_since_unix_ms):
        gpu_type, terms = case.fleet.gpu_type, terms_of(case.lease_usd, case.burst_usd)
        if terms is None:
            unadvised.append(Unadvised(gpu_type, "price", no_price(gpu_type)))
            continue
        said = recommended(asked.unix_ms, case, terms, solve)
        if said.bound == NO_HISTORY:
            unadvised.append(Unadvised(gpu_type, "history", f"{gpu_type}: {said.sentence}"))
        else:
            found.append(said)
    if not found and not unadvised:
        unadvised.append(Unadvised("", "history", NOTHING))
    return LeasesMade(asked.day, tuple(found), tuple(unadvised))


def cases(
    uses: Iterable[HourlyUse], fleets: Iterable[TypeFleet], kept_since_unix_ms: int | None
) -> Iterator[Case]:
    """Of each type that was held in the last weeks."""
    there = {fleet.gpu_type: fleet for fleet in fleets}
    for use in uses:
        known = there.get(use.gpu_type, TypeFleet(use.gpu_type, 0))
        lots = tuple(Lot(gpus, ends_unix_ms) for gpus, ends_unix_ms in known.lots)
        begun = _begun(use, kept_since_unix_ms)
        yield Case(
            (*use.past_gpus, *use.wanted_gpus[begun:]),
            Fleet(use.gpu_type, known.owned_gpus, lots),
            use.lease_usd,
            use.burst_usd,
            Flexible(min(1.0, use.flexible_ratio), max(1, use.flexible_hours)),
            len(use.past_gpus),
        )


def recommended(
    unix_ms: int, case: Case, terms: Terms, solve: SolveLinear | None
) -> Recommendation:
    """What to lease today, and how it is known what was wanted."""
    said = recommend(unix_ms, case.hours, case.fleet, terms, flexible=case.flexible, solve=solve)
    known, sampled = known_hours(case.hours), known_hours(case.hours[: case.sampled])
    if not sampled:
        return replace(said, known_hours=known)
    told = (
        f"{sampled} of the {known} hours of demand are known from samples, the others from attempts"
    )
    sentence = f"{said.sentence}; {told}"
    return replace(said, sentence=sentence, known_hours=known, sampled_hours=sampled)


def _begun(use: HourlyUse, kept_since_unix_ms: int | None) -> int:
    """Of hours of which attempts are not kept any more attempts say nothing."""
    if kept_since_unix_ms is None:
        return 0
    return max(0, -((use.begin_unix_ms - kept_since_unix_ms) // MS_PER_H))


def terms_of(lease_usd: float | None, burst_usd: float | None, unit_gpus: int = 1) -> Terms | None:
    """`None` where a price is not known."""
    if not lease_usd or not burst_usd:
        return None
    return Terms(lease_usd, burst_usd, unit_gpus=unit_gpus)


def no_price(gpu_type: str) -> str:
    """The sentence for that."""
    return f"{gpu_type}: no price by the month and by the hour is known"
