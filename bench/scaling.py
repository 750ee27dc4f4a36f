"""The right fleet before the demand arrives: what waits, and what is saved, beside who knows.

Power: two series of public clusters are replayed (`coordinator/sim/capacity_replay.py`) with nodes
that boot for ten minutes: Philly, 440 nodes, each wanted whole, and Venus, 133 nodes of eight GPUs,
packed. From the first five twelfths of each the forecast only learns; what is shown is the rest, as
means over several beginnings. Baton runs as it is shipped, where waiting costs 19 times what idling
does (the quantile is 0.95), and once more with 24 times (0.96), which is tuned on Philly and so
told of Venus. Energy: an idle node takes three tenths of a busy one; always-on is the reference of
what is saved.

The series are not part of Baton: --demand or BATON_BENCH_DEMAND says where they lie.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from bench import report, scaling_leases
from coordinator.core.scaling import Rules
from coordinator.forecast.demand_file import read_series
from coordinator.sim.capacity_checks import check_capacity, check_rails
from coordinator.sim.capacity_policies import BatonPower, Clairvoyant, IdleTimeout
from coordinator.sim.capacity_replay import Boxes, PowerPolicy, replay
from coordinator.sim.capacity_report import PowerFigures, figures

LEARNED: Final = (5, 12)  # of each series
# The fleet is all on at a beginning, so each is another history.
BEGINNINGS: Final = 3
APART_H: Final = 60
# What a GPU-hour of waiting costs, for one of idling: tuned to the goals of Philly, so it is to be
# judged by Venus.
TUNED: Final = 24.0
QUICK_H: Final = 24 * 14


@dataclass(frozen=True)
class Case:
    """A series and its fleet; goals and what others had, in percent."""

    name: str
    file: str
    column: str
    fleet: Boxes
    waiting_goal: float
    saved_goal: float
    timeout: tuple[float, float]
    prototype: tuple[float, float]
    limit: float


CASES: Final = (
    Case(
        "Philly, 440 nodes", "philly_nodes_10min.csv", "active", Boxes(440, 1),
        0.6, 10.9, (12.5, 11.6), (0.76, 10.7), 11.7,
    ),
    Case(
        "Venus, 133 nodes", "helios_venus_10min.csv", "demand", Boxes(133, 8),
        0.3, 3.2, (9.2, 3.9), (0.36, 2.9), 4.1,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A case with its series; `learned`: so many steps."""

    case: Case
    values: tuple[float, ...]
    per_hour: int

    @property
    def learned(self) -> int:
        return len(self.values) * LEARNED[0] // LEARNED[1]


def run(known: Known, policy: PowerPolicy, begin: int, end: int | None = None) -> PowerFigures:
    """Judged; one that breaks what must hold is no figure."""
    fleet = known.case.fleet
    outcome = replay(known.values[:end], known.per_hour, fleet, policy, begin)
    wrong = check_capacity(outcome, fleet)
    if isinstance(policy, BatonPower):
        wrong += check_rails(outcome, fleet, policy.rules.bounds)
    if wrong:
        raise RuntimeError(f"{known.case.name}, {policy.name}: {wrong[0]}")
    return figures(outcome, fleet)


def baton(known: Known, wait_ratio: float) -> BatonPower:
    rules = Rules()
    priced = replace(rules, wait_usd_per_gpu_h=wait_ratio * rules.idle_usd_per_gpu_h)
    return BatonPower(known.case.fleet, known.per_hour, priced)


def power_rows(known: Known, *, quick: bool) -> list[report.Row]:
    case, name = known.case, known.case.name
    begins = [known.learned + n * APART_H * known.per_hour for n in range(BEGINNINGS)]
    end = begins[0] + QUICK_H * known.per_hour if quick else None
    begins = begins[:1] if quick else begins
    usual = Rules().wait_usd_per_gpu_h / Rules().idle_usd_per_gpu_h

    def over_begins(make: Callable[[], PowerPolicy]) -> list[PowerFigures]:
        return [run(known, make(), at, end) for at in begins]

    knows = over_begins(lambda: Clairvoyant(known.values, known.per_hour, case.fleet))
    limit = statistics.fmean(100 * each.saved_ratio for each in knows)
    goals = (case.waiting_goal, case.saved_goal)
    rows: list[report.Row] = []
    for ratio in (usual,) if quick else (usual, TUNED):
        ours = over_begins(partial(baton, known, ratio))
        words = f"{name}, waiting {ratio:g} times as dear as idling"
        rows += _pair(words, ours, case.prototype, "prototype", goals)
    rows += _pair(
        f"{name}, idle timeout", over_begins(IdleTimeout), case.timeout, "as the goals were set"
    )
    rows.append(
        report.Row(
            name=f"{name}, clairvoyant: energy saved",
            value=limit,
            unit="%",
            reference=case.limit,
            reference_source="as the goals were set",
            more_is_better=True,
        )
    )
    unused = statistics.fmean(100 * each.limit_ratio for each in knows)
    rows.append(report.Row(name=f"{name}: node-hours nobody wants", value=unused, unit="%"))
    return rows


def _pair(
    name: str,
    found: Sequence[PowerFigures],
    reference: tuple[float, float],
    source: str,
    goals: tuple[float, float] | None = None,
) -> list[report.Row]:
    """Means over beginnings of what waits and what is saved."""
    waiting = [100 * each.waiting_ratio for each in found]
    saved = [100 * each.saved_ratio for each in found]
    return [
        report.Row(
            name=f"{name}: {what}",
            value=statistics.fmean(values),
            unit=unit,
            low=min(values) if len(values) > 1 else None,
            high=max(values) if len(values) > 1 else None,
            reference=reference[place],
            reference_source=source,
            goal=goals[place] if goals else None,
            more_is_better=place == 1,
        )
        for place, (what, unit, values) in enumerate(
            (("work waits", "% of steps", waiting), ("energy saved", "%", saved))
        )
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    report.data_option(parser, report.DEMAND)
    given = parser.parse_args(arguments)
    asked = report.options(given)
    cases = CASES[:1] if asked.quick else CASES
    if not given.demand or not all((given.demand / case.file).is_file() for case in cases):
        report.nothing_measured("scaling", CASES[0].file, report.DEMAND, asked)
        return
    rows: list[report.Row] = []
    for case in cases:
        report.say(f"scaling: {case.name}")
        read = read_series(given.demand / case.file, case.column)
        rows += power_rows(Known(case, read.values, read.per_hour), quick=asked.quick)
    rows += scaling_leases.rows(given.demand, quick=asked.quick)
    notes = (
        *scaling_leases.NOTES,
        "means over beginnings, lowest and highest beside them; after what is only learned from",
        "the honest limit: who saves against always-on cannot save more than the node-hours that"
        " nobody wants (1 - mean / nodes) at what an idle node takes; clairvoyant is that limit",
    )
    report.show("The size of the fleet", rows, asked, notes)


if __name__ == "__main__":
    main()
