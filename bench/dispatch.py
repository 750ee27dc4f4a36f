"""Submit to first instruction, a burst, a preemption, and rest: ours beside Slurm and Ray.

Ours is a coordinator and an agent with mutual TLS on, every submission durable when it is answered
(`submit.py` and `preempt.py` say what exactly is measured). Slurm and Ray do the same jobs in the
same run, each alone in a network of its own, where they are found: Slurm's programs on PATH or in
the folders of `--slurm`, Ray in the interpreter of `--ray-python`. How they are set up stands in
`dispatch_others.py`. What is not found is said, with what installs it, and its row quotes what was
measured on such a machine before.

At rest: CPU in percent of a core over the window, and resident memory; our agent without its
sampler of GPUs, of which there are none here, as there are none for the others.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench import agent, dispatch_others, namespace, preempt, report, submit
from bench.dispatch_others import Found
from protos.baton.v1 import jobs_pb2
from tests.e2e.certificates import Authority
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

OTHERS_S_MAX = 600.0
SLURM, RAY = "Slurm", "Ray"
QUOTED = ", known from such a machine"
COORDINATOR_CPU_GOAL, COORDINATOR_MIB_GOAL = 1.0, 120.0


@dataclass(frozen=True, slots=True)
class Amounts:
    """How often, and for how long."""

    jobs: int
    bursts: int
    preemptions: int
    rest_s: float
    others: dict[str, float]


FULL = Amounts(
    200, 3, 10, 30.0,
    {"jobs": 30, "burst": 500, "preemptions": 5, "rest_s": 20, "ray_jobs": 15, "ray_burst": 20},
)  # fmt: skip
QUICK = Amounts(
    30, 1, 3, 5.0,
    {"jobs": 4, "burst": 60, "preemptions": 1, "rest_s": 3, "ray_jobs": 2, "ray_burst": 2},
)  # fmt: skip

# What is quoted where a program is not here.
KNOWN = {
    SLURM: Found(version="25.11 tuned" + QUOTED, burst_per_s=72.0, first_s=[0.50, 0.98]),
    RAY: Found(version="2.60" + QUOTED, burst_per_s=1.35, first_s=[0.89, 1.36]),
}


@dataclass(frozen=True, slots=True)
class Ours:
    """What was measured of us: in ms, per second, and the costs at rest."""

    first_ms: list[float]
    bursts: list[float]
    preemptions: list[preempt.Preemption]
    costs: dict[str, agent.Cost]


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--slurm", default=os.environ["PATH"], help="folders of Slurm's programs")
    parser.add_argument("--ray-python", default="", help="the interpreter that has ray[default]")
    given = parser.parse_args(arguments)
    asked = report.options(given)
    amounts = QUICK if asked.quick else FULL
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        ours = measure(Path(scratch), amounts)
    others: dict[str, Found] = {}
    skipped: list[str] = []
    missing = dispatch_others.slurm_missing(given.slurm)
    if missing:
        why = f"no `{missing}` in {given.slurm}: {dispatch_others.SLURM_INSTALL}, or --slurm"
        skipped.append(f"Slurm is left out: {why}")
    else:
        others |= other(SLURM, given.slurm, amounts, skipped)
    if given.ray_python:
        others |= other(RAY, given.ray_python, amounts, skipped)
    else:
        how = f"{dispatch_others.RAY_INSTALL}, then --ray-python FOLDER/bin/python"
        skipped.append(f"Ray is left out: {how}")
    report.show("Dispatch", rows(ours, others), asked, notes(others, skipped))
    for line in skipped if asked.json else ():
        report.say(f"dispatch: {line}")
    return 0


def other(name: str, where: str, amounts: Amounts, skipped: list[str]) -> dict[str, Found]:
    """What was found of one of them, or why nothing was."""
    report.say(f"dispatch: {name}")
    words = [name.lower(), where, json.dumps(amounts.others)]
    try:
        return {name: namespace.call("dispatch_others", words, OTHERS_S_MAX)}
    except namespace.NamespaceError as error:
        skipped.append(f"{name} is left out: {error}")
        return {}


@contextmanager
def secured(directory: Path, nodes: Sequence[str]) -> Iterator[Cluster]:
    """A cluster in which everybody shows a certificate; each node has one GPU of the stand-in."""
    authority = Authority(directory.with_suffix(".certificates"))
    with Cluster(directory, patient=False) as cluster:
        cluster.credentials = authority.issue("user").credentials()
        cluster.start_coordinator(**authority.issue("coordinator").config())
        for name in nodes:
            cluster.start_agent(name, h100(1, node=name), **authority.issue(name).config())
        cluster.wait_for_nodes(*nodes)
        yield cluster


def measure(scratch: Path, amounts: Amounts) -> Ours:
    with secured(scratch / "one", ["n1"]) as cluster:
        report.say("dispatch: one at a time")
        first_ms = submit.first_instructions(cluster, amounts.jobs)["whole way"]
        report.say("dispatch: preemptions")
        preemptions = preempted(cluster, scratch / "witness", amounts.preemptions)
        report.say(f"dispatch: {amounts.rest_s:g} s of rest")
        pids = {"coordinator": cluster.pid("coordinator"), "agent": cluster.pid("n1")}
        costs = agent.watch(pids, amounts.rest_s)
    bursts = [burst(scratch / f"burst-{number}") for number in range(amounts.bursts)]
    return Ours(first_ms, bursts, preemptions, costs)


def burst(directory: Path) -> float:
    """Trivial jobs per second, from the first call to the last end."""
    report.say(f"dispatch: {submit.BURST_JOBS} jobs at once")
    with secured(directory, ["n1"]) as cluster:
        began_s = time.time()
        asyncio.run(submit.submit_burst(cluster.address, cluster.credentials))
        return submit.BURST_JOBS / (submit.last_end_s(cluster) - began_s)


def preempted(cluster: Cluster, witness: Path, count: int) -> list[preempt.Preemption]:
    """A spare trainer under bash makes room, again and again."""
    spec = preempt.spare_spec(witness, shell=True)  # noqa: S604 - the job's own shell
    spare = cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=spec)).job_id
    found = [preempt.one_preemption(cluster, spare, witness) for _ in range(count)]
    cluster.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id=spare))
    return found


def rows(ours: Ours, others: dict[str, Found]) -> list[report.Row]:
    made = []
    for name, ratio, goal in (("p50", 0.50, 50.0), ("p99", 0.99, 150.0)):
        row = report.Row(
            name=f"submit to first instruction, {name} of {len(ours.first_ms)}",
            value=report.percentile(ours.first_ms, ratio),
            unit="ms",
            goal=goal,
        )
        made += [
            replace(row, reference=reference * 1000, reference_source=source)
            for reference, source in references(others, "first_s", ratio)
        ]
    row = report.row_of(f"{submit.BURST_JOBS} trivial jobs, durable, TLS", ours.bursts, "jobs/s")
    row = replace(row, goal=100.0, more_is_better=True)
    made += [
        replace(row, reference=reference, reference_source=source)
        for reference, source in references(others, "burst_per_s", 0.5)
    ]
    return made + preemption_rows(ours, others) + rest_rows(ours, others)


def references(others: dict[str, Found], key: str, ratio: float) -> Iterator[tuple[float, str]]:
    """Of each of the others what was found in this run, or else what is known of it."""
    for name in (SLURM, RAY):
        found = others.get(name, KNOWN[name])
        value = found["burst_per_s"] if key == "burst_per_s" else 0.0
        if key == "first_s":
            value = report.percentile(found["first_s"], ratio)
        count = found.get("burst_jobs" if key == "burst_per_s" else "", len(found["first_s"]))
        here = f", {count} in this run" if name in others else ""
        said = found["version"]
        yield value, (said if name.lower() in said.lower() else f"{name} {said}") + here


def preemption_rows(ours: Ours, others: dict[str, Found]) -> list[report.Row]:
    whole = [one for one in ours.preemptions if one.told_s and one.committed_s]
    if not whole:
        raise RuntimeError("no preemption ended with a checkpoint that was committed")
    told = [one.told_s - one.asked_s for one in whole if one.told_s]
    saved = [one.committed_s - one.told_s for one in whole if one.told_s and one.committed_s]
    following = [one.began_s - one.committed_s for one in whole if one.committed_s]
    made = [
        replace(report.row_of("preemption: submit to told", told, "s"), goal=preempt.TOLD_GOAL_S),
        report.row_of("preemption: told to save committed", saved, "s"),
        replace(
            report.row_of("preemption: committed to next start", following, "s"),
            goal=preempt.NEXT_GOAL_S,
        ),
    ]
    found = others.get(SLURM)
    if found is not None and found["told_s"]:
        source = f"{found['version']}, tuned, {len(found['told_s'])} in this run"
        for index, key in ((0, found["told_s"]), (2, found["next_s"])):
            said = source if index == 0 else f"{source}, told to next start"
            made[index] = replace(
                made[index], reference=statistics.median(key), reference_source=said
            )
    return made


def rest_rows(ours: Ours, others: dict[str, Found]) -> list[report.Row]:
    made = []
    for name, cost in ours.costs.items():
        strict = name == "coordinator"
        percents = [100 * ratio for ratio in cost.cpu_ratios]
        row = report.row_of(f"at rest, {name}: CPU", percents, "% of a core")
        made.append(replace(row, goal=COORDINATOR_CPU_GOAL if strict else None))
        made.append(
            report.Row(
                name=f"at rest, {name}: resident memory",
                value=cost.rss_mib,
                unit="MiB",
                goal=COORDINATOR_MIB_GOAL if strict else None,
            )
        )
    for name, found in others.items():
        for program, percent in found["cpu_percent"].items():
            who = f"at rest, {name}, {program}"
            made.append(report.Row(name=f"{who}: CPU", value=percent, unit="% of a core"))
            mib = found["resident_mib"][program]
            made.append(report.Row(name=f"{who}: resident memory", value=mib, unit="MiB"))
    return made


def notes(others: dict[str, Found], skipped: list[str]) -> list[str]:
    said = list(skipped)
    if SLURM in others:
        said.append("Slurm's jobs are not durable when sbatch returns, nor encrypted on their way")
    return said


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
