"""`baton simulate`: what would this fleet do with these jobs, and what if it were another?

Problem: "would four more GPUs help", "what does a class cost the others" are questions to be asked
before money is spent, and on a laptop. So this command needs no coordinator: a trace and a fleet,
or the records of a coordinator, and policies that are run one after another on the same jobs with
the same chances; with a question, each runs on the fleet as it is and as it would be. Every run is
judged by the simulator's checkers; one that fails them is an error, not a row. The rows come from
the production core where the policy is Baton's.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.again import again
from coordinator.cli.finite import Finite
from coordinator.cli.fit import Price
from coordinator.cli.render import progress, write_notice
from coordinator.cli.settings import CommandFailed, common_options, settings_of
from coordinator.cli.simulate_cases import CHANCE, read_cases
from coordinator.cli.simulate_demand import (
    POWER_POLICIES,
    demand_options,
    refuse_demand_options,
    replay_demand,
)
from coordinator.cli.simulate_report import (
    write_figures,
    write_plots,
    write_projects,
    write_rows,
)

if TYPE_CHECKING:
    from coordinator.cli.simulate_report import Results
    from coordinator.core.allocation import Aims, Solve
    from coordinator.sim.model import Outcome, Policy
    from coordinator.sim.ours import Ours
    from coordinator.sim.report import Figures
    from coordinator.sim.whatif import Case

POLICIES = (
    "baton", "baton-greedy", "baton-pairs", "fifo", "fifo-aware", "static", "packing", "per-dollar",
    "max-min", "max-min-blind", "fairness", "makespan",
)  # fmt: skip


def _chance_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, help_text in reversed(CHANCE.items()):
        option = click.option(f"--{name.replace('_', '-')}", name, type=Finite(0), help=help_text)
        command = option(command)
    return command


@click.command(short_help="Try policies on a trace and a fleet, in virtual time.")
@click.argument("trace", required=False, type=click.Path(path_type=Path))
@click.option("--fleet", type=click.Path(path_type=Path), help="TOML: GPU types, prices, chances.")
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    help="A coordinator's baton.sqlite3 instead of TRACE: jobs, rates and GPUs from its records. "
    "It is only read; the coordinator may run, and a copy will do.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice((*POLICIES, *POWER_POLICIES)),
    metavar="NAME",
    default=("baton", "fifo"),
    show_default=True,
    help="One of those above, or with --demand always-on, idle-timeout and clairvoyant. May be "
    "given several times.",
)
@demand_options
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The coordinator's configuration (/etc/baton/coordinator.toml), for its quotas alone; "
    "projects of --fleet are in the place of all of these.",
)
@click.option("--pairs", type=click.Path(path_type=Path), help="CSV: rates of jobs that share.")
@click.option("--add-nodes", multiple=True, help="What if there were: 4xH200, or 2x8xH200.")
@click.option("--remove", multiple=True, help="What if these were not there: 2xA100.")
@click.option(
    "--quota", multiple=True, help="What if a project counted more: demo=x2 (Baton's policies)."
)
@click.option(
    "--price",
    "prices",
    multiple=True,
    type=Price(),
    help="US dollars an hour of one GPU with this in its name; repeatable.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of failures and errors.")
@click.option("--node-gpus", type=click.IntRange(1), help="GPUs that fail together.")
@_chance_options
@click.option("--blind", is_flag=True, help="Nobody says how long jobs are.")
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    help="A directory for SVG files: use by type, queue, completions, cost, fairness.",
)
@click.option(
    "--balance",
    type=Finite(0, 1),
    default=0.3,
    show_default=True,
    help="Baton's: 0 the shortest mean completion, 1 the earliest end of all.",
)
@common_options
def simulate(**given: Any) -> None:
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
      [gpus.K80]
      count = 4
      price_per_h = 0.45
      [chance]
      node_mtbf_h = 2000

    Every key of [chance] is an option, too. FAIRNESS is how long a job took over what it would have
    taken had the fleet been shared equally at every moment. COST is that of the whole fleet until
    the last job's end. LATE are those that ended after their deadline_s, which counts as arrival_s
    does. What Baton does with quotas of projects is seen with --config, or with a table of each in
    the fleet's file:

    \b
      [projects.vision]
      gpu_hours_per_day = 48

    The policies:

    \b
      baton          Baton's allocation, with its solver
      baton-greedy   the same without a solver
      baton-pairs    baton, where all jobs of one GPU share (--pairs)
      fifo           first come, first served, on the type with most free GPUs
      fifo-aware     the same, on the type that the job is fastest on
      static         each team owns GPUs of one type
      packing        fifo-aware, with pairs on one GPU as Gandiva's (--pairs)
      per-dollar     the most work for a dollar
      max-min        least attained service, by Gavel's linear program
      max-min-blind  the same, blind to the type
      fairness       finish-time fairness (Themis)
      makespan       the earliest end of all

    \b
      baton simulate jobs.csv --fleet fleet.toml --add-nodes 4xH200
      baton simulate --journal baton.sqlite3 --quota demo=x2
      baton simulate --demand demand.csv --plot nodes.svg
      baton simulate --own-demand H100 --policy baton --policy idle-timeout
    """
    context = click.get_current_context()
    if given["demand"] is not None or given["own_demand"] is not None:
        replay_demand(context, given)
    else:
        refuse_demand_options(context)
        _simulate(context, given)


def _simulate(context: click.Context, given: Mapping[str, Any]) -> None:
    cases = read_cases(given)
    found: Results = {}
    names = list(dict.fromkeys(given["policies"]))
    jobs = len(names) * sum(len(each.jobs) for each in cases.values())
    with progress(jobs, "simulating") as passed:
        for name in names:
            policies = {when: _policy(name, given["balance"], each) for when, each in cases.items()}
            found[name] = {when: _run(each, policies[when], passed) for when, each in cases.items()}
    if given["plots"] is not None:
        write_plots(given["plots"], found, cases)
    if settings_of(context).as_json:
        write_figures(found)
        return
    write_rows(found)
    if given["quota"]:
        write_projects(found, cases)
    write_notice(f"again: {again(context)}", whole=True)


def _policy(name: str, balance: float, case: "Case") -> "Policy":
    from coordinator.core.allocation import Aims
    from coordinator.sim import policies

    aims = Aims(balance=balance)
    made: dict[str, Callable[[], Policy]] = {
        "baton-greedy": lambda: _ours(aims, case, None),
        "fifo": policies.Fifo,
        "fifo-aware": lambda: policies.Fifo(aware=True),
        "static": policies.StaticPartition,
        "packing": lambda: policies.Packing(case.pairs),
        "per-dollar": policies.PerDollar,
    }
    return made[name]() if name in made else _solved(name, aims, case)


def _solved(name: str, aims: "Aims", case: "Case") -> "Policy":
    """A policy that solves linear programs, for which an extra has to be there."""
    try:
        from coordinator.sim.rounds import Goal, Rounds
        from coordinator.sim.sharing import Sharing, fitting_pairs
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
    if name == "baton-pairs":
        return Sharing(_ours(aims, case, solve), fitting_pairs(case.pairs))
    return _ours(aims, case, solve) if name == "baton" else Rounds(goals[name])


def _ours(aims: "Aims", case: "Case", solve: "Solve | None") -> "Ours":
    from coordinator.sim.ours import Ours

    return Ours(aims, solve, tenants=case.weights, quotas=case.quotas)


def _run(
    case: "Case", policy: "Policy", passed: Callable[[int], None]
) -> "tuple[Figures, Outcome]":
    """Judged."""
    from coordinator.core.quotas import PARTS, weight_parts
    from coordinator.sim import checks, engine, report
    from coordinator.sim.model import PACE_S
    from coordinator.sim.ours import Ours
    from coordinator.sim.sharing import Sharing

    known = {job.job_id: job for job in case.jobs}
    try:
        outcome = engine.simulate(
            case.jobs, case.fleet, policy, case.chance, case.pairs, passed=passed
        )
    except engine.BrokenPolicy as error:
        raise CommandFailed(str(error)) from error
    wrong = [
        *checks.check_capacity(outcome, case.fleet),
        *checks.check_work(outcome, known, case.pairs, case.chance),
        *checks.check_completions(outcome, known),
    ]
    if isinstance(policy, Sharing):
        trial_s = PACE_S + policy.tick_ms / 1000
        wrong += checks.check_pairs(outcome, known, case.pairs, trial_s)
    if case.quotas and isinstance(policy, Ours):
        weights = {name: weight_parts(name) / PARTS for name in case.fleet.gpus}
        wrong += checks.check_quotas(outcome, known, case.fleet, case.quotas, weights)
    if wrong:
        raise CommandFailed(f"{policy.name}: the simulation is wrong: {wrong[0]}")
    return report.figures(outcome, known, case.fleet), outcome
