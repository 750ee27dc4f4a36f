"""What `baton simulate` is asked about: the fleet and the jobs as they are, and as they would be.

Problem: jobs come from a trace or from a coordinator's records, chances from the fleet's file or
from options, and a question changes some of it. What comes out are cases to be run as they stand,
and a sentence for each figure that they rest on and that nobody has told.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.cli.render import write_notice
from coordinator.cli.settings import BadInput
from coordinator.cli.simulate_demand import POWER_POLICIES
from coordinator.core.sentences import quantity

if TYPE_CHECKING:
    from coordinator.sim.journal import Recorded
    from coordinator.sim.whatif import Case, Question

BEFORE, AFTER = "as it is", "as asked"
LEFT_OUT_NAMED_MAX = 4  # jobs that fit nowhere; more is a list that nobody reads
PACKING = ("packing", "baton-pairs")
MODELS_NAMED_MAX = 8
MTBF_H_MIN = 0.1  # below, nodes fail faster than anything ends, and the run would not end either
RATE_ERROR_MAX = 3.0  # beyond that rates are believed twenty times too high or too low
# Options of the same names as `[chance]` of a fleet's file has keys.
CHANCE = {
    "node_mtbf_h": "A node fails so often, in hours; 0: never.",
    "mend_h": "It is mended after so long.",
    "boot_s": "And boots for so long, as do nodes that are added.",
    "checkpoint_s": "A job saves after so much training; 0: only when it is stopped.",
    "save_s": "And stands still for so long meanwhile.",
    "rate_error": "Deviation of the logarithm of believed rates; 0: they are right.",
}


def read_cases(given: Mapping[str, Any]) -> "dict[str, Case]":
    """The fleet as it is, and as it would be where that is asked."""
    from coordinator.sim.toml_file import BadFile
    from coordinator.sim.whatif import BadQuestion, asked, check_prices, fitting, with_prices

    for name in POWER_POLICIES:
        if name in given["policies"]:
            raise BadInput(f"{name} decides which nodes are on: it needs --demand")
    packing = [name for name in given["policies"] if name in PACKING]
    if packing and given["pairs"] is None:
        raise BadInput(
            f"{packing[0]} needs to know what jobs make beside each other: --pairs FILE.csv"
        )
    prices = dict(given["prices"])
    try:
        question = _question(given)
        case = _case(given, [each.name for each in question.added])
        case = dataclasses.replace(case, fleet=with_prices(case.fleet, prices))
        cases = {BEFORE: dataclasses.replace(case, jobs=fitting(case.jobs, case.fleet))}
        types = [*case.fleet.gpus, *(each.name for each in question.added)]
        if packing:
            _check_pairs(given["pairs"], case, types)
        if "baton-pairs" in packing and case.quotas:
            raise BadInput("baton-pairs knows no quotas: leave [projects] and --config out")
        if question.asks:
            cases[AFTER] = after = asked(case, question, prices)
            rest = [job for job in case.jobs if job.job_id not in after.left_out]
            cases[BEFORE] = dataclasses.replace(case, jobs=fitting(rest, case.fleet))
            _say_of(question, case, cases[AFTER], given["policies"])
        check_prices(prices, cases.get(AFTER, cases[BEFORE]).fleet)
    except (BadFile, BadQuestion) as error:
        raise BadInput(str(error)) from error
    return cases


def _check_pairs(path: Path, case: "Case", types: Sequence[str]) -> None:
    """That they are of these GPUs and jobs: else nobody is packed, in silence."""
    there = dict.fromkeys(gpu_type for gpu_type, _, _ in case.pairs)
    known = [name for name in types if name in there]
    if not known:
        raise BadInput(
            f"{path} has pairs on {', '.join(there) or 'no GPU type'}, and the fleet has"
            f" {', '.join(types)}: none of them would be shared"
        )
    models = dict.fromkeys(job.model for job in case.jobs)
    if not any(one in models and other in models for _, one, other in case.pairs):
        named = ", ".join(sorted(models)[:MODELS_NAMED_MAX])
        raise BadInput(f"{path} has no pair of two models of the jobs, which are {named}")
    for name in types:
        if name not in there:
            write_notice(f"{path} has no pairs on {name}: none of these is shared")
    for name in there:
        if name not in types:
            write_notice(f"{path} has pairs on {name}, of which the fleet has none")


def _say_of(question: "Question", case: "Case", after: "Case", policies: Sequence[str]) -> None:
    """What the figures rest on that nobody has told."""
    for why in list(after.left_out.values())[:LEFT_OUT_NAMED_MAX]:
        write_notice(f"{why}; it is left out of both")
    if len(after.left_out) > LEFT_OUT_NAMED_MAX:
        more = len(after.left_out) - LEFT_OUT_NAMED_MAX
        write_notice("so is 1 job more" if more == 1 else f"so are {more} jobs more")
    for name in after.fleet.gpus:
        if name not in case.fleet.gpus:
            usd = after.fleet.prices_per_h.get(name, 0.0)
            write_notice(f"{name}: ${usd:g} an hour each (--price says otherwise)")
    for project in question.weights:
        if project not in case.quotas:
            write_notice(
                f"project {project} has no quota in --config or --fleet"
                f" ([projects.{project}]): its jobs count"
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
    from coordinator.sim.inputs import read_fleet, read_jobs, read_pairs, read_quotas
    from coordinator.sim.model import Chance
    from coordinator.sim.whatif import Case

    inputs = None if given["fleet"] is None else read_fleet(given["fleet"], given["seed"])
    chance = Chance(seed=given["seed"]) if inputs is None else inputs.chance
    told = {name: given[name] for name in (*CHANCE, "node_gpus") if given[name] is not None}
    chance = dataclasses.replace(chance, **told, blind=given["blind"] or chance.blind)
    if 0 < chance.node_mtbf_h < MTBF_H_MIN:
        raise BadInput(
            f"node_mtbf_h is {chance.node_mtbf_h:g}: {MTBF_H_MIN:g} hours at least, or 0"
        )
    if chance.rate_error > RATE_ERROR_MAX:
        raise BadInput(f"rate_error is {chance.rate_error:g}: {RATE_ERROR_MAX:g} at most")
    pairs = {} if given["pairs"] is None else read_pairs(given["pairs"])
    quotas = {} if given["config"] is None else read_quotas(given["config"])
    if inputs is not None and inputs.quotas:
        quotas = inputs.quotas
    if given["journal"] is not None:
        if given["trace"] is not None:
            raise BadInput("give TRACE or --journal, not both")
        types = [] if inputs is None else list(inputs.fleet.gpus)
        seen = _journal(given["journal"], [*types, *added])
        fleet = seen.fleet if inputs is None else inputs.fleet
        return Case(seen.jobs, fleet, chance, pairs=pairs, quotas=quotas)
    if given["trace"] is None or inputs is None:
        raise BadInput("give TRACE and --fleet, or --journal, or --demand")
    jobs = read_jobs(given["trace"], inputs, added)
    for name in inputs.fleet.gpus:
        if not any(name in job.rates for job in jobs):
            write_notice(f"{name}: nobody runs there, since no job of the trace has a rate there")
    return Case(jobs, inputs.fleet, chance, pairs=pairs, quotas=quotas)


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
        f"journal: {quantity(len(seen.jobs), 'job')} on {gpus};"
        f" {quantity(seen.measured, 'rate')} measured,"
        f" {seen.guessed} estimated; {quantity(seen.typical, 'job')} taken to be as long as"
        f" others{out}"
    )
    return seen
