"""`baton simulate`: what would this fleet do with these jobs, and what would another policy?

Problem: "would four more GPUs help", "what does a class cost the others" are questions to be asked
before money is spent, and on a laptop. So this command needs no coordinator: a trace, a fleet, and
policies that are run one after another on the same jobs with the same chances. Every run is judged
by the simulator's checkers; one that fails them is an error, not a row. The rows come from the
production core where the policy is Baton's.
"""

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli.render import Column, write_json, write_notice, write_table
from coordinator.cli.settings import BadInput, CommandFailed, common_options, settings_of

if TYPE_CHECKING:
    from coordinator.core.allocation import Aims
    from coordinator.core.quotas import Quota
    from coordinator.sim.inputs import Inputs
    from coordinator.sim.model import Policy, SimJob
    from coordinator.sim.report import Figures

POLICIES = (
    "baton", "baton-greedy", "fifo", "fifo-aware", "static", "per-dollar", "max-min",
    "max-min-blind", "fairness", "makespan",
)  # fmt: skip

_COLUMNS = (
    Column("POLICY"),
    Column("MEAN H", right=True),
    Column("P99 H", right=True),
    Column("WORST H", right=True),
    Column("MAKESPAN H", right=True),
    Column("FAIRNESS P99", right=True),
    Column("WORST", right=True),
    Column("BUSY", right=True),
    Column("WHILE ONE WAITS", right=True),
    Column("COST", right=True),
    Column("RESTARTS", right=True),
    Column("TRACE"),
)


@click.command(short_help="Try policies on a trace and a fleet, in virtual time.")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--fleet", required=True, type=click.Path(path_type=Path), help="TOML: GPU types, prices."
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(POLICIES),
    default=("baton", "fifo"),
    show_default=True,
    help="May be given several times.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of failures and errors.")
@click.option(
    "--balance",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Baton's: 0 the shortest mean completion, 1 the earliest end of all.",
)
@common_options
@click.pass_context
def simulate(
    context: click.Context,
    trace: Path,
    fleet: Path,
    policies: tuple[str, ...],
    *,
    seed: int,
    balance: float,
) -> None:
    """Run the jobs of TRACE (CSV) on a fleet under one or more policies.

    \b
      job,arrival_s,gpus,steps,class,project,A100,K80
      1,0,1,36000,standard,vision,12.5,1.9
      2,60,1,90000,spare,text,12.5,

    Under a GPU type stand the steps a second that the job makes there, on all its GPUs; nothing: it
    does not run there. Columns that may be left out: class, project, model, restart_s, deadline_s.
    The fleet:

    \b
      restart_s = 60
      [gpus.A100]
      count = 8
      price_per_h = 1.9
      [chance]
      node_mtbf_h = 2000

    FAIRNESS is how long a job took over what it would have taken had the fleet been shared equally
    at every moment. COST is that of the whole fleet until the last job's end. What Baton does with
    quotas of projects is seen with a table of each in the fleet's file:

    \b
      [projects.vision]
      gpu_hours_per_day = 48

    \b
      baton simulate jobs.csv --fleet fleet.toml --policy baton --policy fifo
    """
    from coordinator.sim.inputs import BadFile, read_fleet, read_jobs

    try:
        inputs = read_fleet(fleet, seed)
        jobs = read_jobs(trace, inputs)
    except BadFile as error:
        raise BadInput(str(error)) from error
    found = {
        name: _run(jobs, inputs, _policy(name, balance, inputs.quotas))
        for name in dict.fromkeys(policies)
    }
    if settings_of(context).as_json:
        write_json([{"policy": name, **dataclasses.asdict(each)} for name, each in found.items()])
        return
    write_table(_COLUMNS, [_row(name, each) for name, each in found.items()])
    chosen = [f"--policy {name}" for name in found]
    files = [shlex.quote(str(trace)), "--fleet", shlex.quote(str(fleet))]
    words = ["baton simulate", *files, *chosen, f"--seed {seed} --balance {balance:g}"]
    write_notice(f"again: {' '.join(words)}")


def _policy(name: str, balance: float, quotas: "Mapping[str, Quota]") -> "Policy":
    from coordinator.core.allocation import Aims
    from coordinator.sim import policies
    from coordinator.sim.ours import Ours

    aims = Aims(balance=balance)
    made: dict[str, Callable[[], Policy]] = {
        "baton-greedy": lambda: Ours(aims, quotas=quotas),
        "fifo": policies.Fifo,
        "fifo-aware": lambda: policies.Fifo(aware=True),
        "static": policies.StaticPartition,
        "per-dollar": policies.PerDollar,
    }
    return made[name]() if name in made else _solved(name, aims, quotas)


def _solved(name: str, aims: "Aims", quotas: "Mapping[str, Quota]") -> "Policy":
    """A policy that solves linear programs, for which an extra has to be there."""
    try:
        from coordinator.sim.ours import Ours
        from coordinator.sim.rounds import Goal, Rounds
        from coordinator.solver import solve
    except ImportError as error:
        raise CommandFailed(
            f"{error.name} is not installed: pip install 'gpu-baton[scheduling]', or take "
            "--policy baton-greedy, which needs no solver"
        ) from error
    goals = {
        "max-min": Goal.MAX_MIN,
        "max-min-blind": Goal.MAX_MIN_BLIND,
        "fairness": Goal.FINISH_TIME_FAIRNESS,
        "makespan": Goal.MAKESPAN,
    }
    return Ours(aims, solve, quotas=quotas) if name == "baton" else Rounds(goals[name])


def _run(jobs: "list[SimJob]", inputs: "Inputs", policy: "Policy") -> "Figures":
    from coordinator.core.quotas import PARTS, weight_parts
    from coordinator.sim import checks, engine, report
    from coordinator.sim.ours import Ours

    known = {job.job_id: job for job in jobs}
    try:
        outcome = engine.simulate(jobs, inputs.fleet, policy, inputs.chance)
    except engine.BrokenPolicy as error:
        raise CommandFailed(str(error)) from error
    wrong = [
        *checks.check_capacity(outcome, inputs.fleet),
        *checks.check_work(outcome, known),
        *checks.check_completions(outcome, known),
    ]
    if inputs.quotas and isinstance(policy, Ours):
        weights = {name: weight_parts(name) / PARTS for name in inputs.fleet.gpus}
        wrong += checks.check_quotas(outcome, known, inputs.fleet, inputs.quotas, weights)
    if wrong:
        raise CommandFailed(f"{policy.name}: the simulation is wrong: {wrong[0]}")
    return report.figures(outcome, known, inputs.fleet)


def _row(name: str, found: "Figures") -> tuple[object, ...]:
    return (
        name,
        f"{found.completion_h.mean:.2f}",
        f"{found.completion_h.p99:.2f}",
        f"{found.completion_h.worst:.2f}",
        f"{found.makespan_h:.2f}",
        f"{found.fairness.p99:.2f}",
        f"{found.fairness.worst:.2f}",
        f"{found.busy_ratio:.1%}",
        f"{found.busy_waiting_ratio:.1%}",
        f"{found.provisioned_cost:.0f}",
        found.restarts,
        found.trace_hash,
    )
