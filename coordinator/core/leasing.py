"""What is worth leasing by the month, beside what is owned and what is rented by the hour.

Problem: an hour of a lease costs less than an hour of burst, but it is paid for whether used or
not, for a month, and nobody knows the month. Leasing the peak pays for idle GPUs, leasing nothing
pays the dear price for what is always needed, and whoever leases everything on one day finds out on
the next that it was the wrong one. So, once a day and for each type of GPU:

1. *Level.* A GPU is worth leasing if it is needed for more than lease / burst of the term: the
   level is the quantile of demand at 1 - lease / burst (the newsvendor's). Demand of the next term
   is taken to be like that of the last day, the last week or the last four weeks, each as likely
   (`DAYS`). Where work may wait, the level is that of a linear program over the same days.
2. *Break even*, the rule of who rents skis: a GPU for which burst has been paid for as many hours
   of the last term as its lease would have cost is leased although the level is lower; and none is
   that was not worth its lease over the last day, whatever the level says. The first follows a
   rise, the second stops at once when demand collapses.
3. *Staggered.* What is missing to the level is leased in lots, one a day and each a tenth of the
   level at most (and always as much as can be leased at all): at a level of 495 with 400 owned, 49
   of the 95 missing ones today and the rest tomorrow. So what is leased runs out a bit each day as
   well, and nothing is renewed above the level. More than a seventh would bet a month on a day or
   two.

`DAYS` and `LOT_RATIO` are among the best on one series (Venus, `bench/scaling_leases.py`), not on
the one with the collapse.

What comes out is a recommendation with its numbers; nobody leases anything by it. `worth_usd` is
what one GPU more would save in an hour, with what there is: the shadow price of a program's rows,
burst times the part of the time in which it would be used without one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.core.capacity_model import LEVELS
from coordinator.core.deferral import Flexible, add_demand, burst_hours
from coordinator.core.linear import Draft, SolveLinear
from coordinator.core.sentences import quantity

DAYS: Final = (1, 7, 28)
LOT_RATIO: Final = 0.1
LOT_RATIO_MAX: Final = 1 / 7
# A week has one of each day; before that nobody knows what a month may be like.
HISTORY_DAYS_MIN: Final = 7
H_PER_DAY: Final = 24
MS_PER_H: Final = 3_600_000
NO_HISTORY: Final = "no history"
# Sums of weights differ in the last digits.
TINY: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Terms:
    """What leases and burst cost in US dollars an hour, how long a lease is, and in how many GPUs
    it comes (a node's)."""

    lease_usd: float
    burst_usd: float
    days: int = 30
    unit_gpus: int = 1
    lot_ratio: float = LOT_RATIO

    def __post_init__(self) -> None:
        if not 0 < self.lot_ratio <= LOT_RATIO_MAX:
            raise ValueError(
                f"at most a seventh of the level is leased a day, not {self.lot_ratio}"
            )
        if min(self.lease_usd, self.burst_usd) <= 0 or self.days < 1 or self.unit_gpus < 1:
            raise ValueError("a lease has a price, a term and GPUs")

    @property
    def used_ratio(self) -> float:
        """Needed for more of the time than this, a GPU is worth leasing."""
        return self.lease_usd / self.burst_usd


@dataclass(frozen=True, slots=True)
class Lot:
    """GPUs that are leased until then."""

    gpus: int
    ends_unix_ms: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """What there is of a type of GPU."""

    gpu_type: str
    owned_gpus: int = 0
    lots: tuple[Lot, ...] = ()


@dataclass(frozen=True, slots=True)
class Alternative:
    """`expected_usd` over the next term, if demand is as it is taken to be and `leased_gpus` stay
    leased; energy is not in it."""

    name: str
    leased_gpus: int
    expected_usd: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`quantiles` are those of demand at `LEVELS`; `level_gpus` counts what is owned. `lease_gpus`
    more should be leased today. `bound` is the rule that has the last word: "level", "break-even
    rise", "break-even fall", "a part a day", "whole lots", "price" or "no history" (docs/cost.md
    explains them). `worth_usd` is of one GPU more, an hour. Of all work `flexible_ratio` may wait
    for `flexible_hours`. Of demand `known_hours` were looked at, of them `sampled_hours` in the
    history of demand, as not all attempts of them are kept."""

    gpu_type: str
    unix_ms: int
    terms: Terms
    owned_gpus: int
    leased_gpus: int
    lease_gpus: int
    level_gpus: int
    bound: str
    sentence: str
    worth_usd: float = 0.0
    quantiles: tuple[float, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    flexible_ratio: float = 0.0
    flexible_hours: int = 0
    known_hours: int = 0
    sampled_hours: int = 0


@dataclass(frozen=True, slots=True)
class Likely:
    """Demand of the next term, as hours that are likely: `gpus` ascending, and how much each hour
    counts, 1 in all."""

    gpus: tuple[float, ...]
    weights: tuple[float, ...]

    def quantile(self, ratio: float) -> float:
        """The least demand that is not exceeded for `ratio` of the time."""
        heap = 0.0
        for gpus, weight in zip(self.gpus, self.weights, strict=True):
            heap += weight
            if heap >= ratio - TINY:
                return gpus
        return self.gpus[-1]

    def above(self, supply: float) -> tuple[float, float]:
        """The part of the time in which more is wanted, and how much more on average of all."""
        pairs = zip(self.gpus, self.weights, strict=True)
        over = [(gpus - supply, weight) for gpus, weight in pairs if gpus > supply]
        return sum(weight for _, weight in over), sum(gpus * weight for gpus, weight in over)


def likely(hours: Sequence[float], days: Sequence[int] = DAYS) -> Likely:
    """The last so many days, each span as likely; hours that nobody knows (NaN) are left out."""
    counted: list[tuple[float, float]] = []
    spans = [span for span in (_last(hours, count) for count in days) if span]
    for span in spans:
        counted += [(gpus, 1.0 / len(span) / len(spans)) for gpus in span]
    counted.sort()
    return Likely(tuple(gpus for gpus, _ in counted), tuple(weight for _, weight in counted))


def recommend(
    unix_ms: int,
    hours: Sequence[float],
    fleet: Fleet,
    terms: Terms,
    *,
    flexible: Flexible | None = None,
    solve: SolveLinear | None = None,
) -> Recommendation:
    """What to lease today. `hours` is the demand of the past, an hour each and the newest last."""
    leased = sum(lot.gpus for lot in fleet.lots if lot.ends_unix_ms > unix_ms)
    known_days = known_hours(hours) / H_PER_DAY
    if known_days < HISTORY_DAYS_MIN:
        said = f"{known_days:.1f} days of demand are known, and {HISTORY_DAYS_MIN} are needed"
        there = fleet.owned_gpus + leased
        return Recommendation(
            fleet.gpu_type, unix_ms, terms, fleet.owned_gpus, leased, 0, there, NO_HISTORY, said
        )
    day = _Day(hours, likely(hours), fleet, leased, terms, flexible or Flexible(), solve)
    found = _level(day)
    level = found.gpus
    wanted = _units(level - day.there, terms.unit_gpus)
    # A part of a small level may be less than what can be leased at all.
    lease = min(wanted, max(terms.unit_gpus, _units(level * terms.lot_ratio, terms.unit_gpus)))
    return Recommendation(
        fleet.gpu_type,
        unix_ms,
        terms,
        fleet.owned_gpus,
        leased,
        lease,
        round(level),
        _bound(day, found, lease, wanted),
        _sentence(day, found, lease),
        _worth_usd(day),
        tuple(day.demand.quantile(ratio) for ratio in LEVELS),
        _alternatives(day, round(level), lease),
        day.flexible.ratio,
        day.flexible.wait_h if day.flexible.ratio else 0,
    )


@dataclass(frozen=True, slots=True)
class _Day:
    """All that today's decision is made of."""

    hours: Sequence[float]
    demand: Likely
    fleet: Fleet
    leased: int
    terms: Terms
    flexible: Flexible
    solve: SolveLinear | None

    @property
    def there(self) -> int:
        return self.fleet.owned_gpus + self.leased


@dataclass(frozen=True, slots=True)
class _Level:
    """How many GPUs are worth having without burst, which rule says so, and how many it were before
    a fall."""

    gpus: float
    rule: str
    before_gpus: float


def _level(day: _Day) -> _Level:
    if day.terms.used_ratio >= 1:
        return _Level(0.0, "price", 0.0)
    level, rule = _level_over(day, DAYS), "level"
    rise = _level_over(day, (day.terms.days,))
    if rise > level:
        level, rule = rise, "break-even rise"
    fall = _level_over(day, DAYS[:1]) if _last(day.hours, DAYS[0]) else level
    if fall < level:
        return _Level(fall, "break-even fall", level)
    return _Level(level, rule, level)


def _bound(day: _Day, level: _Level, lease: int, wanted: int) -> str:
    """The rule that has the last word."""
    if lease < wanted:
        return "a part a day"
    # Less is missing than can be leased at all.
    is_less = not wanted and round(level.gpus) > day.there
    return "whole lots" if is_less else level.rule


def _level_over(day: _Day, days: Sequence[int]) -> float:
    """The level that is cheapest if demand is as in these spans of days, each as likely."""
    if day.flexible.ratio and day.solve is not None:
        draft = Draft()
        level = draft.column(day.terms.lease_usd)
        _add_spans(draft, day, days, [(level, 1.0)])
        found = day.solve(draft.done())
        if found is not None:
            return found.values[level]
    return likely(day.hours, days).quantile(1.0 - day.terms.used_ratio)


def _worth_usd(day: _Day) -> float:
    """What one GPU more would save in an hour."""
    at_once = day.terms.burst_usd * day.demand.above(day.there)[0]
    if not day.flexible.ratio or day.solve is None:
        return at_once
    draft = Draft()
    there = draft.column(0.0, float(day.there), float(day.there))
    rows = _add_spans(draft, day, DAYS, [(there, 1.0)])
    found = day.solve(draft.done())
    return at_once if found is None else sum(found.prices[row] for row in rows)


def _add_spans(
    draft: Draft, day: _Day, days: Sequence[int], supply: list[tuple[int, float]]
) -> list[int]:
    """Each span on its own, from the same supply; the rows of all hours."""
    rows: list[int] = []
    spans = [span for span in (_last(day.hours, count) for count in days) if span]
    for span in spans:
        burst_usd = day.terms.burst_usd / len(span) / len(spans)
        rows += add_demand(draft, span, [supply] * len(span), burst_usd, day.flexible)
    return rows


def _alternatives(day: _Day, level: int, lease: int) -> tuple[Alternative, ...]:
    """What else could be done today, by what it is expected to cost over the term."""
    owned = day.fleet.owned_gpus
    month = _last(day.hours, day.terms.days)
    peak = math.ceil(max(month, default=0.0))
    choices = (
        ("all burst", 0),
        ("nothing new", day.leased),
        ("last month's peak", max(0, peak - owned)),
        ("the level at once", max(day.leased, level - owned)),
        ("chosen", day.leased + lease),
    )
    return tuple(Alternative(name, leased, _expected_usd(day, leased)) for name, leased in choices)


def _expected_usd(day: _Day, leased: int) -> float:
    over = _mean_burst(day, day.fleet.owned_gpus + leased)
    hours = day.terms.days * H_PER_DAY
    return hours * (day.terms.lease_usd * leased + day.terms.burst_usd * over)


def _mean_burst(day: _Day, supply: int) -> float:
    """GPUs of burst, on average of all hours: what may wait waits, in each span for itself."""
    if not day.flexible.ratio:
        return day.demand.above(supply)[1]
    spans = [span for span in (_last(day.hours, count) for count in DAYS) if span]
    means = [
        sum(burst_hours(span, [supply] * len(span), day.flexible)) / len(span) for span in spans
    ]
    return sum(means) / len(means)


def _sentence(day: _Day, level: _Level, lease: int) -> str:
    terms, gpus = day.terms, round(level.gpus)
    have = f"{quantity(day.fleet.owned_gpus, 'is', 'are')} owned and {day.leased} leased"
    if level.rule == "price":
        return (
            f"lease nothing: a lease at ${terms.lease_usd:.2f} an hour is no cheaper than burst at"
            f" ${terms.burst_usd:.2f}, which is paid for only while it is used; {have}"
        )
    why = {
        "break-even rise": ", counting the last term alone",
        "break-even fall": f" of the last day, and before that it was {level.before_gpus:.0f}",
        "level": "",
    }[level.rule]
    many = quantity(gpus, "GPU is", "GPUs are")
    needed = f"{many} needed for more than {100 * terms.used_ratio:.0f}% of the time{why}"
    missing = gpus - day.there
    if lease:
        more = f" of the {missing} that are missing," if lease < missing else ""
        return (
            f"lease {lease}{more} for {terms.days} days at ${terms.lease_usd:.2f} an hour: "
            f"{needed}, where burst at ${terms.burst_usd:.2f} is dearer; {have}"
        )
    if missing > 0:
        few = quantity(missing, "is", "are")
        return (
            f"lease nothing: {few} missing, fewer than a lot of {terms.unit_gpus}: {needed}; {have}"
        )
    by = " by break-even" if level.before_gpus > max(day.there, level.gpus) else ""
    return f"lease nothing{by}: {needed}; {have}"


def known_hours(hours: Sequence[float]) -> int:
    return sum(not math.isnan(gpus) for gpus in hours)


def _last(hours: Sequence[float], days: int) -> list[float]:
    """What is known of the last so many days."""
    return [gpus for gpus in hours[-days * H_PER_DAY :] if not math.isnan(gpus)]


def _units(gpus: float, unit: int) -> int:
    """As many whole units as fit, none below zero."""
    return max(0, math.floor(gpus / unit + TINY)) * unit
