"""What leases and burst cost over demand that has been, beside the least that was possible.

Leases of 30 days, burst at twice their price, whole series of GPU demand by the hour. A rule is
shown each day what was wanted until then (`coordinator/core/leasing.py`), follows its own
recommendations from the second week on, and pays from the start that is named: for the hours of its
leases from then on, and for burst. The clairvoyant knows all of it: a linear program
(`coordinator/sim/clairvoyant.py`). Every figure is a ratio to that one.

The first start is the one for which reference figures exist; a single start is an anecdote, so the
goal is judged by the mean over starts: from a month of history on, until 30 days are left. Of the
variants that were tried the rule is among the best on Venus (within 0.0005); what it comes to on
the Philly series was seen while trying, so neither is held out.

The series: GPU demand of Helios (SenseTime; Venus) and Philly (Microsoft), derived from public
traces. They are not part of Baton: --demand or BATON_BENCH_DEMAND says where they lie.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench import report
from coordinator.core.deferral import Flexible
from coordinator.core.leasing import H_PER_DAY, Terms
from coordinator.forecast.demand_file import read_series
from coordinator.lease_solver import solve
from coordinator.sim.clairvoyant import hindsight
from coordinator.sim.lease_replay import BASELINES, baseline, bill, replayed

TERMS = Terms(lease_usd=1.0, burst_usd=2.0)
FLEXIBLE = Flexible(ratio=0.3, wait_h=24)
MONTH_DAYS = 30
STARTS = 12  # at most so many, evenly over the days that may be one
REFERENCE = "prototype, from the same start"


@dataclass(frozen=True)
class Case:
    """A series, the start of the reference figures, these by baseline, the prototype's, and the
    goal; nothing of it where there is none."""

    name: str
    file: str
    column: str
    start_day: int
    references: dict[str, float]
    prototype: float | None
    goal: float | None


CASES = (
    Case(
        "Venus",
        "helios_venus_hourly.csv",
        "demand",
        75,
        {"always-on peak": 1.528, "all burst": 1.899, "last month's peak + burst": 1.066},
        1.028,
        1.025,
    ),
    Case(
        "Philly jobs",
        "philly_jobs_10min.csv",
        "demand",
        38,
        {"always-on peak": 2.268, "all burst": 1.599, "last month's peak + burst": 2.511},
        1.187,
        1.15,
    ),
    Case("Philly nodes", "philly_nodes_10min.csv", "active", 37, {}, None, None),
)


def hourly(path: Path, column: str) -> list[float]:
    """Means by the hour, whole days; a gap is taken to have been on the line between its ends."""
    series = read_series(path, column)
    known = [(step, gpus) for step, gpus in enumerate(series.values) if not math.isnan(gpus)]
    filled = list(series.values)
    for (before, low), (after, high) in pairwise(known):
        for step in range(before + 1, after):
            filled[step] = low + (high - low) * (step - before) / (after - before)
    filled = [gpus for gpus in filled if not math.isnan(gpus)]
    per_day = series.per_hour * H_PER_DAY
    whole = len(filled) // per_day * per_day
    return [
        statistics.fmean(filled[step : step + series.per_hour])
        for step in range(0, whole, series.per_hour)
    ]


def starts(days: int, *, quick: bool) -> list[int]:
    """Days of the series: after a month of history, and a month before its end."""
    possible = list(range(MONTH_DAYS, days - MONTH_DAYS + 1))
    count = min(len(possible), 3 if quick else STARTS)
    return [possible[round(n * (len(possible) - 1) / (count - 1))] for n in range(count)]


def over_clairvoyant(hours: list[float], leased: list[int], day: int) -> float:
    begin = day * H_PER_DAY
    return (
        bill(hours[begin:], leased[begin:], TERMS).usd / hindsight(hours[begin:], TERMS, solve).usd
    )


def rows_of(case: Case, hours: list[float], *, quick: bool) -> Iterator[report.Row]:
    begin = case.start_day * H_PER_DAY
    best = hindsight(hours[begin:], TERMS, solve)
    name = f"{case.name}: cost over clairvoyant"
    for rule in BASELINES:
        yield report.Row(
            name=f"{name}, {rule}",
            value=baseline(rule, hours, begin, TERMS).usd / best.usd,
            unit="ratio",
            reference=case.references.get(rule),
            reference_source=REFERENCE if case.references else "",
        )
    leased = replayed(hours, TERMS)
    yield report.Row(
        name=f"{name}, Baton from day {case.start_day}",
        value=over_clairvoyant(hours, leased, case.start_day),
        unit="ratio",
        reference=case.prototype,
        reference_source=REFERENCE if case.prototype else "",
    )
    days = starts(len(hours) // H_PER_DAY, quick=quick)
    ratios = [over_clairvoyant(hours, leased, day) for day in days]
    yield report.Row(
        name=f"{name}, Baton, mean of {len(ratios)} starts",
        value=statistics.fmean(ratios),
        unit="ratio",
        low=min(ratios),
        high=max(ratios),
        goal=case.goal,
    )
    yield from deferral_rows(case, hours, best.usd, quick=quick)
    rest = hours[begin:]
    yield report.Row(
        name=f"{case.name}: the most that can be saved against always-on peak",
        value=100 * (1 - statistics.fmean(rest) / max(rest)),
        unit="%",
    )
    yield report.Row(
        name=f"{case.name}: worth of one GPU more, all of the time",
        value=best.worth_usd / TERMS.lease_usd,
        unit="leases",
    )


def deferral_rows(
    case: Case, hours: list[float], best_usd: float, *, quick: bool
) -> Iterator[report.Row]:
    """30% of the work may wait up to a day."""
    begin = case.start_day * H_PER_DAY
    waiting = hindsight(hours[begin:], TERMS, solve, FLEXIBLE)
    yield report.Row(
        name=f"{case.name}: clairvoyant bill cut where 30% may wait a day",
        value=100 * (1 - waiting.usd / best_usd),
        unit="%",
        more_is_better=True,
    )
    if quick:
        return
    leased = replayed(hours, TERMS, flexible=FLEXIBLE, solve=solve)
    paid = bill(hours[begin:], leased[begin:], TERMS, FLEXIBLE)
    yield report.Row(
        name=f"{case.name}: the same work, cost over its clairvoyant, Baton",
        value=paid.usd / waiting.usd,
        unit="ratio",
    )


def rows(folder: Path, *, quick: bool = False) -> list[report.Row]:
    """Of all series that lie in the folder."""
    found: list[report.Row] = []
    for case in CASES:
        path = folder / case.file
        if path.is_file():
            report.say(f"leases: {case.name}")
            found += rows_of(case, hourly(path, case.column), quick=quick)
    return found


NOTES = (
    "of the variants tried the rule is among the best on Venus; the others were seen meanwhile",
    "leases of 30 days, burst at twice their price; a lease counts for its hours after the start",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    report.data_option(parser, report.DEMAND)
    given = parser.parse_args(arguments)
    asked = report.options(given)
    found = rows(given.demand, quick=asked.quick) if given.demand else []
    if not found:
        report.nothing_measured("scaling_leases", CASES[0].file, report.DEMAND, asked)
        return
    exact = (f"{row.name}: {row.value:.4f}" for row in found if row.unit == "ratio")
    report.show("Leases and burst over demand that has been", found, asked, (*exact, *NOTES))


if __name__ == "__main__":
    main()
