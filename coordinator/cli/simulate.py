"""`baton simulate`: what would this fleet do with these jobs, and what if it were another?

Problem: "would four more GPUs help", "what does a class cost the others" are questions to be asked
before money is spent, and on a laptop. So this command needs no coordinator: a trace and a fleet,
or the records of a coordinator, and policies that are run one after another on the same jobs with
the same chances; with a question, each runs on the fleet as it is and as it would be. Every run is
judged by the simulator's checkers; one that fails them is an error, not a row. The rows come from
the production core where the policy is Baton's.
"""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.finite import Finite
from coordinator.cli.fit import Price
from coordinator.cli.render import Column, write_json, write_notice, write_table
from coordinator.cli.settings import BadInput, CommandFailed, common_options, settings_of
from coordinator.cli.simulate_demand import (
    POWER_POLICIES,
    demand_options,
    refuse_demand_options,
    replay_demand,
)

if TYPE_CHECKING:
    from coordinator.core.allocation import Aims, Solve
    from coordinator.sim.journal import Recorded
    from coordinator.sim.model import Outcome, Policy
    from coordinator.sim.report import Figures
    from coordinator.sim.whatif import Case, Question

    Results = dict[str, dict[str, tuple[Figures, Outcome]]]

POLICIES = (
    "baton", "baton-greedy", "fifo", "fifo-aware", "static", "packing", "per-dollar", "max-min",
    "max-min-blind", "fairness", "makespan",
)  # fmt: skip
MS_PER_H = 3_600_000
LEFT_OUT_NAMED_MAX = 4  # jobs that fit nowhere; more is a list that nobody reads
MTBF_H_MIN = 0.1  # below, nodes fail faster than anything ends, and the run would not end either
RATE_ERROR_MAX = 3.0  # beyond that rates are believed twenty times too high or too low
BEFORE, AFTER, CHANGE = "as it is", "as asked", "change"

_COLUMNS = (
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
# Options of the same names as `[chance]` of a fleet's file has keys.
_CHANCE = {
    "node_mtbf_h": "A node fails so often, in hours; 0: never.",
    "mend_h": "It is mended after so long.",
    "boot_s": "And boots for so long, as do nodes that are added.",
    "checkpoint_s": "A job saves after so much training; 0: only when it is stopped.",
    "save_s": "And stands still for so long meanwhile.",
    "rate_error": "Deviation of the logarithm of believed rates; 0: they are right.",
}


def _chance_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, help_text in reversed(_CHANCE.items()):
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
    default=("baton", "fifo"),
    show_default=True,
    help="May be given several times.",
)
@demand_options
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
      [chance]
      node_mtbf_h = 2000

    Every key of [chance] is an option, too. FAIRNESS is how long a job took over what it would have
    taken had the fleet been shared equally at every moment. COST is that of the whole fleet until
    the last job's end. What Baton does with quotas of projects is seen with a table of each in the
    fleet's file:

    \b
      [projects.vision]
      gpu_hours_per_day = 48

    The policies:

    \b
      baton          Baton's allocation, with its solver
      baton-greedy   the same without a solver
      fifo           first come, first served, on the type with most free GPUs
      fifo-aware     the same, on the type that the job is fastest on
      static         each team owns GPUs of one type
      packing        fifo-aware, and pairs on one GPU as Gandiva makes them (--pairs)
      per-dollar     the most work for a dollar
      max-min        least attained service, by Gavel's linear program
      max-min-blind  the same, blind to the type
      fairness       finish-time fairness (Themis)
      makespan       the earliest end of all

    \b
      baton simulate jobs.csv --fleet fleet.toml --add-nodes 4xH200
      baton simulate --journal /var/lib/baton/coordinator/baton.sqlite3 --quota demo=x2
      baton simulate --demand demand.csv --plot nodes.svg
    """
    context = click.get_current_context()
    if given["demand"] is not None:
        replay_demand(context, given, _again)
    else:
        refuse_demand_options(context)
        _simulate(context, given)


def _simulate(context: click.Context, given: Mapping[str, Any]) -> None:
    cases = _cases(given)
    found: Results = {}
    for name in dict.fromkeys(given["policies"]):
        policies = {when: _policy(name, given["balance"], each) for when, each in cases.items()}
        found[name] = {when: _run(each, policies[when]) for when, each in cases.items()}
    if given["plots"] is not None:
        _write_plots(given["plots"], found, cases)
    if settings_of(context).as_json:
        _write_json(found)
        return
    _write_table(found)
    if given["quota"]:
        _write_projects(found, cases)
    write_notice(f"again: {_again(context)}")


def _cases(given: Mapping[str, Any]) -> "dict[str, Case]":
    """The fleet as it is, and as it would be where that is asked."""
    from coordinator.sim.inputs import BadFile
    from coordinator.sim.whatif import BadQuestion, asked, check_prices, fitting, with_prices

    for name in POWER_POLICIES:
        if name in given["policies"]:
            raise BadInput(f"{name} decides which nodes are on: it needs --demand")
    if "packing" in given["policies"] and given["pairs"] is None:
        raise BadInput("packing needs to know what jobs make beside each other: --pairs FILE.csv")
    prices = dict(given["prices"])
    try:
        question = _question(given)
        case = _case(given, [each.name for each in question.added])
        case = dataclasses.replace(case, fleet=with_prices(case.fleet, prices))
        cases = {BEFORE: dataclasses.replace(case, jobs=fitting(case.jobs, case.fleet))}
        if question.asks:
            cases[AFTER] = after = asked(case, question, prices)
            rest = [job for job in case.jobs if job.job_id not in after.left_out]
            cases[BEFORE] = dataclasses.replace(case, jobs=fitting(rest, case.fleet))
            _say_of(question, case, cases[AFTER], given["policies"])
        check_prices(prices, cases.get(AFTER, cases[BEFORE]).fleet)
    except (BadFile, BadQuestion) as error:
        raise BadInput(str(error)) from error
    return cases


def _say_of(question: "Question", case: "Case", after: "Case", policies: Sequence[str]) -> None:
    """What the figures rest on that nobody has told."""
    for why in list(after.left_out.values())[:LEFT_OUT_NAMED_MAX]:
        write_notice(f"{why}; it is left out of both")
    if len(after.left_out) > LEFT_OUT_NAMED_MAX:
        write_notice(f"so are {len(after.left_out) - LEFT_OUT_NAMED_MAX} jobs more")
    for name in after.fleet.gpus:
        if name not in case.fleet.gpus:
            usd = after.fleet.prices_per_h.get(name, 0.0)
            write_notice(f"{name}: ${usd:g} an hour each (--price says otherwise)")
    for project in question.weights:
        if project not in case.quotas:
            write_notice(
                f"project {project} has no quota in --fleet ([projects.{project}]): its jobs count"
                f" {question.weights[project]:g} times as much instead"
            )
    if question.weights and not any(name.startswith("baton") for name in policies):
        write_notice("--quota changes nothing here: of all policies only Baton's know projects")


def _question(given: Mapping[str, Any]) -> "Question":
    from coordinator.sim.whatif import Question, read_gpus, read_weight

    return Question(
        added=[read_gpus(text) for text in given["add_nodes"]],
        removed=[read_gpus(text) for text in given["remove"]],
        weights=dict(read_weight(text) for text in given["quota"]),
    )


def _case(given: Mapping[str, Any], added: list[str]) -> "Case":
    """The fleet and the jobs as they are; of types that are added, rates where they are known."""
    from coordinator.sim.inputs import read_fleet, read_jobs, read_pairs
    from coordinator.sim.model import Chance
    from coordinator.sim.whatif import Case

    inputs = None if given["fleet"] is None else read_fleet(given["fleet"], given["seed"])
    chance = Chance(seed=given["seed"]) if inputs is None else inputs.chance
    told = {name: given[name] for name in (*_CHANCE, "node_gpus") if given[name] is not None}
    chance = dataclasses.replace(chance, **told, blind=given["blind"] or chance.blind)
    if 0 < chance.node_mtbf_h < MTBF_H_MIN:
        raise BadInput(
            f"node_mtbf_h is {chance.node_mtbf_h:g}: {MTBF_H_MIN:g} hours at least, or 0"
        )
    if chance.rate_error > RATE_ERROR_MAX:
        raise BadInput(f"rate_error is {chance.rate_error:g}: {RATE_ERROR_MAX:g} at most")
    pairs = {} if given["pairs"] is None else read_pairs(given["pairs"])
    if given["journal"] is not None:
        if given["trace"] is not None:
            raise BadInput("give TRACE or --journal, not both")
        types = [] if inputs is None else list(inputs.fleet.gpus)
        seen = _journal(given["journal"], [*types, *added])
        fleet = seen.fleet if inputs is None else inputs.fleet
        quotas = {} if inputs is None else inputs.quotas
        return Case(seen.jobs, fleet, chance, pairs=pairs, quotas=quotas)
    if given["trace"] is None or inputs is None:
        raise BadInput("give TRACE and --fleet, or --journal")
    jobs = read_jobs(given["trace"], inputs, added)
    return Case(jobs, inputs.fleet, chance, pairs=pairs, quotas=inputs.quotas)


def _journal(path: Path, types: list[str]) -> "Recorded":
    from coordinator.ports import StoreUnavailable
    from coordinator.sim.journal import recorded
    from coordinator.store.reading import read_journal

    try:
        seen = recorded(read_journal(path), types)
    except StoreUnavailable as error:
        raise BadInput(str(error)) from error
    if not seen.jobs:
        out = ", ".join(f"{count} {why}" for why, count in seen.left_out.items())
        raise BadInput(f"{path} has no job to simulate{f' ({out})' if out else ''}")
    gpus = ", ".join(f"{count} x {name}" for name, count in seen.fleet.gpus.items())
    out = "".join(f"; {count} left out that {why}" for why, count in seen.left_out.items())
    write_notice(
        f"journal: {len(seen.jobs)} jobs on {gpus}; {seen.measured} rates measured,"
        f" {seen.guessed} estimated; {seen.typical} jobs taken to be as long as others{out}"
    )
    return seen


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
    return _ours(aims, case, solve) if name == "baton" else Rounds(goals[name])


def _ours(aims: "Aims", case: "Case", solve: "Solve | None") -> "Policy":
    from coordinator.sim.ours import Ours

    return Ours(aims, solve, tenants=case.weights, quotas=case.quotas)


def _run(case: "Case", policy: "Policy") -> "tuple[Figures, Outcome]":
    """Judged."""
    from coordinator.core.quotas import PARTS, weight_parts
    from coordinator.sim import checks, engine, report
    from coordinator.sim.ours import Ours

    known = {job.job_id: job for job in case.jobs}
    try:
        outcome = engine.simulate(case.jobs, case.fleet, policy, case.chance, case.pairs)
    except engine.BrokenPolicy as error:
        raise CommandFailed(str(error)) from error
    wrong = [
        *checks.check_capacity(outcome, case.fleet),
        *checks.check_work(outcome, known, case.pairs, case.chance),
        *checks.check_completions(outcome, known),
    ]
    if case.quotas and isinstance(policy, Ours):
        weights = {name: weight_parts(name) / PARTS for name in case.fleet.gpus}
        wrong += checks.check_quotas(outcome, known, case.fleet, case.quotas, weights)
    if wrong:
        raise CommandFailed(f"{policy.name}: the simulation is wrong: {wrong[0]}")
    return report.figures(outcome, known, case.fleet), outcome


def _write_json(found: "Results") -> None:
    rows = []
    for name, by_case in found.items():
        for when, (each, _) in by_case.items():
            where = {"fleet": when} if AFTER in by_case else {}
            rows.append({"policy": name, **where, **dataclasses.asdict(each)})
    write_json(rows)


def _write_table(found: "Results") -> None:
    """With a question, what changes by it stands below."""
    asks = any(AFTER in by_case for by_case in found.values())
    rows: list[tuple[object, ...]] = []
    for name, by_case in found.items():
        for when, (each, _) in by_case.items():
            rows.append((name, *((when,) if asks else ()), *_cells(each)))
        if asks:
            rows.append((name, CHANGE, *_changes(by_case[BEFORE][0], by_case[AFTER][0])))
    named = (Column("POLICY"), *((Column("FLEET"),) if asks else ()))
    write_table((*named, *_COLUMNS), rows)


def _write_projects(found: "Results", cases: "Mapping[str, Case]") -> None:
    """Whose jobs gain by a quota, and whose lose: mean completion by project."""
    columns = [Column("POLICY"), Column("PROJECT"), Column("JOBS", right=True)]
    columns += [Column(f"MEAN H {words.upper()}", right=True) for words in (BEFORE, AFTER, CHANGE)]
    rows = []
    projects = sorted({job.project for job in cases[BEFORE].jobs})
    for name, by_case in found.items():
        for project in projects:
            jobs = [job for job in cases[BEFORE].jobs if job.project == project]
            before, after = (
                sum(by_case[when][1].finished_ms[job.job_id] - job.arrival_ms for job in jobs)
                / len(jobs)
                / MS_PER_H
                for when in (BEFORE, AFTER)
            )
            change = f"{after / before - 1:+.1%}" if before else None
            cells = (f"{before:.2f}", f"{after:.2f}", change)
            rows.append((name, project, len(jobs), *cells))
    write_table(columns, rows)


def _write_plots(folder: Path, found: "Results", cases: "Mapping[str, Case]") -> None:
    from coordinator.sim import plots

    runs = []
    for name, by_case in found.items():
        for when, (_, outcome) in by_case.items():
            case = cases[when]
            known = {job.job_id: job for job in case.jobs}
            label = f"{name}, {when}" if AFTER in cases else name
            runs.append(plots.Shown(label, outcome, known, case.fleet))
    drawn = plots.files(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in drawn.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{folder} cannot be written ({error.strerror or error})") from error
    write_notice(f"plots: {len(drawn)} files in {folder}")


def _cells(found: "Figures") -> tuple[object, ...]:
    return (
        *(f"{hours:.2f}" for hours in _hours(found)),
        *(f"{ratio:.2f}" for ratio in (found.fairness.p99, found.fairness.worst)),
        *(f"{ratio:.1%}" for ratio in (found.busy_ratio, found.busy_waiting_ratio)),
        f"{found.provisioned_cost:.0f}",
        found.restarts,
        found.trace_hash,
    )


def _hours(found: "Figures") -> tuple[float, ...]:
    spread = found.completion_h
    return spread.mean, spread.p99, spread.worst, found.makespan_h


def _changes(before: "Figures", after: "Figures") -> tuple[object, ...]:
    """Percent of what it was; of shares of time, points."""

    def relative(one: float, other: float) -> str | None:
        return f"{other / one - 1:+.1%}" if one else None

    pairs = zip(_hours(before), _hours(after), strict=True)
    return (
        *(relative(one, other) for one, other in pairs),
        relative(before.fairness.p99, after.fairness.p99),
        relative(before.fairness.worst, after.fairness.worst),
        f"{100 * (after.busy_ratio - before.busy_ratio):+.1f}",
        f"{100 * (after.busy_waiting_ratio - before.busy_waiting_ratio):+.1f}",
        relative(before.provisioned_cost, after.provisioned_cost),
        f"{after.restarts - before.restarts:+d}",
        "",
    )


def _again(context: click.Context) -> str:
    """The command with everything that it was given, and the seed whether or not it was."""
    words = ["baton simulate"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        always = parameter.name in ("policies", "seed", "balance")
        if parameter.name is None or value is None or value is False or not parameter.expose_value:
            continue
        given = context.get_parameter_source(parameter.name)
        if given is click.core.ParameterSource.DEFAULT and not always:
            continue
        words += _said(parameter, value)
    return " ".join(words)


def _said(parameter: click.Parameter, value: Any) -> list[str]:
    if isinstance(parameter, click.Argument):
        return [shlex.quote(str(value))]
    flag = parameter.opts[0]
    if value is True:
        return [flag]
    found = []
    for each in value if parameter.multiple else (value,):
        text = "=".join(map(str, each)) if isinstance(each, tuple) else f"{each}"
        found.append(f"{flag} {shlex.quote(text)}")
    return found
