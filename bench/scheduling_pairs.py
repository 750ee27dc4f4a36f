"""What sharing GPUs brings: Baton with pairs, without them, and Gandiva-style packing.

Gavel publishes two tables. The rates of pairs are the same in both, those of jobs alone differ: in
the one that its physical traces are used with, many a job is faster alone than its pairs were ever
measured against, and 43% of the pairs on a V100 are slower together; in the other 22% are. So every
policy runs with both: with the table as it is, and with what each job keeps of its speed taken from
the other table. `known` sees the rates of pairs beforehand; the others forecast, and are charged
for each trial. All runs are verified, and that two which are too slow are parted in time.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import report
from coordinator.core.allocation import Aims
from coordinator.sim import checks, gavel
from coordinator.sim.engine import simulate
from coordinator.sim.model import PACE_S, PairRates, Policy, SimJob
from coordinator.sim.ours import Ours
from coordinator.sim.policies import Packing
from coordinator.sim.report import Figures, figures
from coordinator.sim.sharing import Sharing, fitting_pairs
from coordinator.solver import solve

RESTART_S = 60.0
BALANCES = (0.0, 0.3, 1.0)
WIDTH = 140


def rows(folder: Path, asked: report.Options) -> list[report.Row]:
    """For each trace: with pairs, of without."""
    rates = gavel.read_rates(folder / gavel.RATES)
    kept = gavel.same_kept(gavel.read_rates(folder / gavel.SIMULATED_RATES), rates)
    found = []
    for trace, file in (("continuous", gavel.CONTINUOUS), ("static", gavel.STATIC)):
        known = gavel.read_trace(folder / file, rates, RESTART_S)
        jobs = {job.job_id: job for job in known}
        for which, pairs in (("kept", kept), ("as published", rates.pairs)):
            ran = {name: _run(policy, jobs, pairs) for name, policy in _policies(pairs)}
            if not asked.json:
                _show(f"{trace}, pairs {which}", ran)
            found += _rows(f"{trace}, pairs {which}", ran)
    return found


def _policies(pairs: PairRates) -> list[tuple[str, Policy]]:
    named: list[tuple[str, Policy]] = [("packing", Packing(pairs))]
    fits = fitting_pairs(pairs)
    for balance in BALANCES:
        aims = Aims(balance=balance)
        said = f"Baton, balance {balance:g}"
        named.append((said, Ours(aims, solve)))
        named.append((f"{said}, pairs", Sharing(Ours(aims, solve), fits)))
        named.append((f"{said}, pairs known", Sharing(Ours(aims, solve), fits, pairs)))
    return named


def _run(policy: Policy, jobs: dict[int, SimJob], pairs: PairRates) -> tuple[Figures, int]:
    fleet = gavel.PHYSICAL_FLEET
    outcome = simulate(jobs.values(), fleet, policy, pairs=pairs)
    found = [
        *checks.check_capacity(outcome, fleet),
        *checks.check_work(outcome, jobs, pairs),
        *checks.check_completions(outcome, jobs),
    ]
    if not isinstance(policy, Packing):
        found += checks.check_classes(outcome, jobs, fleet)
        found += checks.check_pairs(outcome, jobs, pairs, PACE_S + policy.tick_ms / 1000)
    if found:
        raise SystemExit(f"{policy.name}: {found[0]} (of {len(found)})")
    tried = policy.tried if isinstance(policy, Sharing) else 0
    return figures(outcome, jobs, fleet), tried


def _show(title: str, ran: dict[str, tuple[Figures, int]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for heading in (
        "mean h", "p99 h", "makespan h", "fairness worst", "provisioned $", "used $", "restarts",
        "pairs made",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, (found, tried) in ran.items():
        table.add_row(
            name,
            *(f"{v:.2f}" for v in (found.completion_h.mean, found.completion_h.p99)),
            *(f"{v:.1f}" for v in (found.makespan_h, found.fairness.worst)),
            *(f"{v:.0f}" for v in (found.provisioned_cost, found.used_cost)),
            str(found.restarts),
            str(tried),
        )
    Console(width=WIDTH).print(table)


def _rows(title: str, ran: dict[str, tuple[Figures, int]]) -> list[report.Row]:
    alone, together = ran["Baton, balance 0.3"][0], ran["Baton, balance 0.3, pairs"][0]
    packing = ran["packing"][0]
    source = "Baton without pairs, same run"
    return [
        _row(f"{title}: mean", together.completion_h.mean, alone.completion_h.mean, source),
        _row(f"{title}: p99", together.completion_h.p99, alone.completion_h.p99, source),
        _row(f"{title}: makespan", together.makespan_h, alone.makespan_h, source),
        _row(
            f"{title}: mean", together.completion_h.mean, packing.completion_h.mean,
            "packing, same run",
        ),
    ]  # fmt: skip


def _row(name: str, value: float, reference: float, source: str) -> report.Row:
    return report.Row(
        name=name, value=value, unit="h", reference=reference, reference_source=source
    )
