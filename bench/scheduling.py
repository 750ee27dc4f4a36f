"""Scheduling a mixed fleet: Baton's allocation beside the ways in which fleets are run today.

Gavel's own traces of its physical experiments, on its 8 V100, 16 P100 and 24 K80, with the steps a
second that its authors measured. Every policy runs in the same simulator and is charged the same
60 s for each restart; every run is verified by the checkers of `coordinator/sim/checks.py`. The
reference of a row is the best that any of ten Gavel policies reached in Gavel's simulator, where a
restart costs nothing; the three figures of the continuous trace are from three of them.

The constants of Baton's objective (`Aims`) were chosen on the continuous trace; the static one was
looked at afterwards. There is no chance in these runs, so there is no spread either.

The traces are not part of Baton: `--gavel FOLDER`, or BATON_BENCH_GAVEL, names a folder with
`trace_physical_max_min_fairness.csv`, `trace_physical_minimize_makespan.csv`,
`physical_cluster_throughputs.csv.gz` and `simulation_throughputs.csv.gz` (MIT licence,
github.com/stanford-futuredata/gavel, as CSV).
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import (
    report,
    scheduling_learning,
    scheduling_pairs,
    scheduling_scale,
    scheduling_speed,
)
from coordinator.core.allocation import Aims
from coordinator.sim import checks, gavel
from coordinator.sim.engine import simulate
from coordinator.sim.model import Fleet, PairRates, Policy, SimJob
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Fifo, Packing, PerDollar, StaticPartition
from coordinator.sim.report import Figures, figures
from coordinator.sim.rounds import Goal, Rounds
from coordinator.solver import solve

RESTART_S = 60.0
SOURCE = "best of ten Gavel policies, no restart cost"
WIDTH = 170


@dataclass(frozen=True, slots=True)
class Ran:
    """One policy on one trace, and what its decisions cost in seconds of a core."""

    name: str
    figures: Figures
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    jobs: dict[int, SimJob]
    pairs: PairRates


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    report.data_option(parser, report.GAVEL)
    parsed = parser.parse_args(arguments)
    asked = report.options(parsed)
    rows = []
    try:
        traces = _traces(parsed.gavel) if parsed.gavel else []
    except gavel.NoTrace as error:
        report.say(f"scheduling: {error}")
        return 1
    if not traces:
        report.say(
            "scheduling: no traces (give --gavel FOLDER or set BATON_BENCH_GAVEL); scale only"
        )
    for trace in traces:
        ran = [_run(trace, policy) for policy in _policies(trace.pairs)]
        if not asked.json:
            _show(trace, ran)
        rows += _rows(trace, {each.name: each.figures for each in ran})
    if traces and not asked.quick:
        rows += scheduling_pairs.rows(parsed.gavel, asked)
    if traces:
        rows += scheduling_learning.rows(parsed.gavel, asked)
    rows += scheduling_scale.rows(asked.quick)
    if not asked.quick:
        rows += scheduling_speed.rows()
    report.show("Scheduling: Baton, 60 s for each restart", rows, asked)
    return 0


def _traces(folder: Path) -> list[Trace]:
    rates = gavel.read_rates(folder / gavel.RATES)
    return [
        Trace(
            name,
            {job.job_id: job for job in gavel.read_trace(folder / file, rates, RESTART_S)},
            rates.pairs,
        )
        for name, file in (("continuous", gavel.CONTINUOUS), ("static", gavel.STATIC))
    ]


def _policies(pairs: PairRates) -> list[tuple[str, Policy]]:
    named: list[Policy] = [
        Fifo(),
        Fifo(aware=True),
        StaticPartition(),
        Packing(pairs),
        PerDollar(),
        *(Rounds(goal) for goal in Goal),
    ]
    ours = [
        ("Baton, greedy", Ours()),
        ("Baton, shortest mean", Ours(Aims(balance=0.0), solve)),
        ("Baton", Ours(solve=solve)),
        ("Baton, earliest end", Ours(Aims(balance=1.0), solve)),
    ]
    return [*((policy.name, policy) for policy in named), *ours]


def _run(trace: Trace, named: tuple[str, Policy]) -> Ran:
    name, policy = named
    fleet: Fleet = gavel.PHYSICAL_FLEET
    begin_s = time.process_time()
    outcome = simulate(trace.jobs.values(), fleet, policy, pairs=trace.pairs)
    cpu_s = time.process_time() - begin_s
    found = [
        *checks.check_capacity(outcome, fleet),
        *checks.check_work(outcome, trace.jobs, trace.pairs),
        *checks.check_completions(outcome, trace.jobs),
    ]
    if isinstance(policy, Ours):
        found += checks.check_classes(outcome, trace.jobs, fleet)
    if found:
        raise SystemExit(f"{name} on {trace.name}: {found[0]} (of {len(found)})")
    return Ran(name, figures(outcome, trace.jobs, fleet), cpu_s)


def _show(trace: Trace, ran: Sequence[Ran]) -> None:
    table = Table(title=f"{trace.name}: {len(trace.jobs)} jobs", title_justify="left")
    table.add_column("policy")
    for heading in (
        "mean h", "p99 h", "worst h", "makespan h", "fairness mean", "p99", "worst",
        "busy all", "busy*", "training*", "provisioned $", "used $", "restarts", "CPU s",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for each in ran:
        found = each.figures
        table.add_row(
            each.name,
            *(f"{v:.2f}" for v in (found.completion_h.mean, found.completion_h.p99)),
            *(f"{v:.1f}" for v in (found.completion_h.worst, found.makespan_h)),
            *(f"{v:.2f}" for v in (found.fairness.mean, found.fairness.p99, found.fairness.worst)),
            *(f"{v:.3f}" for v in (found.busy_ratio, found.busy_waiting_ratio)),
            f"{found.training_waiting_ratio:.3f}",
            *(f"{v:.0f}" for v in (found.provisioned_cost, found.used_cost)),
            str(found.restarts),
            f"{each.cpu_s:.1f}",
        )
    console = Console(width=WIDTH)
    console.print(table)
    console.print("* of GPU-seconds while a job waits; training: without restarts", highlight=False)


def _rows(trace: Trace, ran: dict[str, Figures]) -> list[report.Row]:
    ours, earliest = ran["Baton"], ran["Baton, earliest end"]
    if trace.name == "continuous":
        rows = [
            _row("continuous, mean completion", ours.completion_h.mean, 3.73, 3.30),
            _row("continuous, p99 completion", ours.completion_h.p99, 8.60, 9.3),
            _row("continuous, makespan", ours.makespan_h, 16.2, 17.1),
        ]
    else:
        rows = [
            _row("static, mean completion", ours.completion_h.mean, 8.46, 6.9),
            _row("static, makespan", ours.makespan_h, 17.4, 18.3),
            _share("static, busy while a job waits", ours.busy_waiting_ratio, 0.992, 0.95),
            _share("static, busy until the last end", ours.busy_ratio, 0.992, 0.95),
            _row("static, balance 1: makespan", earliest.makespan_h, 17.4, 17.4),
            _share("static, balance 1: busy, waiting", earliest.busy_waiting_ratio, 0.992, 0.992),
            _share("static, balance 1: busy until the end", earliest.busy_ratio, 0.992, 0.992),
        ]
    for name in ("FIFO, type-blind", "static partition", "packing"):
        rows.append(
            report.Row(
                name=f"{trace.name}, provisioned cost",
                value=ours.provisioned_cost,
                unit="$",
                reference=ran[name].provisioned_cost,
                reference_source=f"{name}, same run",
            )
        )
    best = 261.0 if trace.name == "continuous" else 279.0
    rows.append(
        report.Row(
            name=f"{trace.name}, provisioned cost",
            value=ours.provisioned_cost,
            unit="$",
            reference=best,
            reference_source=SOURCE,
        )
    )
    return rows


def _row(name: str, value: float, reference: float, goal: float) -> report.Row:
    return report.Row(
        name=name, value=value, unit="h", reference=reference, reference_source=SOURCE, goal=goal
    )


def _share(name: str, value: float, reference: float, goal: float) -> report.Row:
    return report.Row(
        name=name,
        value=value,
        unit="of GPU-seconds",
        reference=reference,
        reference_source=SOURCE,
        goal=goal,
        more_is_better=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
