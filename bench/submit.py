"""From submitting a trivial command to its first instruction, and 500 of them from end to end.

The command is `bash -c 'echo $EPOCHREALTIME > FILE'`: its first act is to note the time, with a
builtin, so what is measured ends where the user's program begins (bash's own start, about 2 ms, is
in it). One job at a time on an idle node, so that nothing waits for a place: the figure is the way
itself, `Submit` -> durable -> placed -> durable -> ordered -> journalled -> shim -> command. The
phases come from the job's history and the two programs' logs, to the millisecond.

Throughput is the time from the first submission to the end of the last of 500 jobs, each durable
when it was acknowledged and again when it ended.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import grpc

from bench import report
from protos.baton.v1 import jobs_pb2, jobs_pb2_grpc, types_pb2
from tests.e2e.cluster import Cluster

JOBS, JOBS_QUICK = 200, 50
CLI_JOBS, CLI_JOBS_QUICK = 10, 3
BURST_JOBS = 500
BURST_CLIENTS = 16
ROUNDS, ROUNDS_QUICK = 3, 1
END_S_MAX = 120.0
POLL_S = 0.002  # a stat of one file; the job's own stamp is what counts
SETTLE_S = 0.05  # between two jobs, so that the end of one is not in the start of the next

SLURM = "Slurm tuned, such a machine"
FLUX = "Flux, such a machine"
RAY = "Ray jobs, such a machine"


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        with Cluster(Path(scratch) / "one", patient=False) as cluster:
            cluster.start_coordinator()
            cluster.start_agent("n1")
            cluster.wait_for_nodes("n1")
            report.say("submit: one at a time")
            one = first_instructions(cluster, JOBS_QUICK if asked.quick else JOBS)
            report.say("submit: through the command line")
            cli = command_line(cluster, CLI_JOBS_QUICK if asked.quick else CLI_JOBS)
        bursts: dict[int, list[float]] = {}
        for nodes in (1, 3):
            rounds = ROUNDS_QUICK if asked.quick else ROUNDS
            bursts[nodes] = [throughput(Path(scratch), nodes, r) for r in range(rounds)]
    report.show("Submit to first instruction", rows(one, cli, bursts), asked, notes(one))
    return 0


def rows(
    one: dict[str, list[float]], cli: list[float], bursts: dict[int, list[float]]
) -> list[report.Row]:
    whole = one["whole way"]
    made = []
    for name, ratio, goal_ms, references in (
        ("p50", 0.50, 50.0, ((500.0, SLURM), (330.0, FLUX), (890.0, RAY))),
        ("p99", 0.99, 150.0, ((980.0, SLURM), (630.0, FLUX), (1360.0, RAY))),
    ):
        for reference_ms, source in references:
            made.append(
                report.Row(
                    name=f"first instruction, {name} of {len(whole)}",
                    value=report.percentile(whole, ratio),
                    unit="ms",
                    goal=goal_ms,
                    reference=reference_ms,
                    reference_source=source,
                )
            )
    made += [report.row_of(f"- {name}", found, "ms") for name, found in one.items()]
    made.append(report.row_of("through the CLI (a Python start each)", cli, "ms"))
    for nodes, found in bursts.items():
        middle = statistics.median(found)
        for reference, source in ((72.0, SLURM), (41.0, FLUX), (1.35, RAY)):
            made.append(
                report.Row(
                    name=f"{BURST_JOBS} trivial jobs, {nodes} node{'s' if nodes > 1 else ''}",
                    value=middle,
                    unit="jobs/s",
                    low=min(found),
                    high=max(found),
                    goal=100.0,
                    reference=reference,
                    reference_source=source,
                    more_is_better=True,
                )
            )
    return made


def notes(one: dict[str, list[float]]) -> list[str]:
    parts = {name: statistics.median(found) for name, found in one.items() if name != "whole way"}
    largest = max(parts, key=lambda name: parts[name])
    return [f"dominated by: {largest} ({report.number(parts[largest])} ms of the median)"]


def first_instructions(cluster: Cluster, count: int) -> dict[str, list[float]]:
    """Milliseconds of each phase of `count` jobs, one after the other."""
    whole: dict[int, tuple[float, float, float]] = {}
    for number in range(count):
        stamp = cluster.directory / f"stamp-{number}"
        asked_s = time.time()
        job_id = cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=stamp_spec(stamp))).job_id
        answered_s = time.time()
        began_s = wait_stamp(stamp)
        whole[job_id] = (asked_s, answered_s, began_s)
        wait_ended(cluster, job_id)
        time.sleep(SETTLE_S)
    accepted_s = {
        line["attempt"]: datetime.fromisoformat(line["ts"]).timestamp()
        for line in cluster.log_lines("n1")
        if line["event"] == "attempt.accepted"
    }
    found: dict[str, list[float]] = {
        "whole way": [],
        "acknowledged": [],
        "placed, durable and ordered (until the agent has it in its journal)": [],
        "agent, shim and bash start": [],
    }
    for job_id, (asked_s, answered_s, began_s) in whole.items():
        there_s = accepted_s[f"{job_id}.1"]
        spans = (began_s - asked_s, answered_s - asked_s, there_s - asked_s, began_s - there_s)
        for samples, span_s in zip(found.values(), spans, strict=True):
            samples.append(span_s * 1000)
    return found


def command_line(cluster: Cluster, count: int) -> list[float]:
    """Milliseconds from the start of `baton submit` to the job's first instruction."""
    found = []
    for number in range(count):
        stamp = cluster.directory / f"cli-{number}"
        asked_s = time.time()
        done = cluster.baton("submit", "--", *stamp_spec(stamp).command)
        if done.returncode != 0:
            raise RuntimeError(f"baton submit failed: {done.stderr}")
        found.append((wait_stamp(stamp) - asked_s) * 1000)
    return found


def throughput(scratch: Path, nodes: int, number: int) -> float:
    """Jobs per second of a burst, on a fresh cluster, from the first call to the last end."""
    report.say(f"submit: {BURST_JOBS} jobs on {nodes} node(s), round {number + 1}")
    with Cluster(scratch / f"burst-{nodes}-{number}", patient=False) as cluster:
        cluster.start_coordinator()
        names = [f"n{index + 1}" for index in range(nodes)]
        for name in names:
            cluster.start_agent(name)
        cluster.wait_for_nodes(*names)
        began_s = time.time()
        asyncio.run(submit_burst(cluster.address))
        return BURST_JOBS / (last_end_s(cluster) - began_s)


async def submit_burst(address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
    """All of them, by some clients side by side."""
    async with contextlib.AsyncExitStack() as stack:
        made = (
            grpc.aio.secure_channel(address, credentials)
            if credentials
            else grpc.aio.insecure_channel(address)
        )
        channel = await stack.enter_async_context(made)
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        spec = types_pb2.JobSpec(command=["true"])
        left = iter(range(BURST_JOBS))

        async def client() -> None:
            for _ in left:
                await stub.Submit(jobs_pb2.SubmitRequest(spec=spec))

        await asyncio.gather(*(client() for _ in range(BURST_CLIENTS)))


def last_end_s(cluster: Cluster) -> float:
    """When the last job ended, on the wall clock; raises when one did not succeed."""
    active = [types_pb2.JOB_PHASE_QUEUED, types_pb2.JOB_PHASE_ACTIVE]
    end_s = time.monotonic() + END_S_MAX
    # A page of one: asking must not cost what is being measured.
    while cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest(phases=active, page_size=1)).jobs:
        if time.monotonic() > end_s:
            raise RuntimeError(f"{BURST_JOBS} jobs did not end within {END_S_MAX:g} s")
        time.sleep(0.1)
    jobs = cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=1000)).jobs
    ended = [job for job in jobs if job.phase == types_pb2.JOB_PHASE_SUCCEEDED]
    if len(ended) != BURST_JOBS:
        raise RuntimeError(f"only {len(ended)} of {BURST_JOBS} jobs succeeded")
    return max(job.end_time.ToNanoseconds() for job in ended) / 1e9


def stamp_spec(stamp: Path) -> types_pb2.JobSpec:
    """A job that notes the time in `stamp` and ends."""
    script = f"echo $EPOCHREALTIME > {stamp}.part; mv {stamp}.part {stamp}"
    return types_pb2.JobSpec(command=["bash", "-c", script])


def wait_stamp(stamp: Path) -> float:
    """The time in `stamp`, seconds since 1970, once it is there."""
    end_s = time.monotonic() + END_S_MAX
    while not stamp.exists():
        if time.monotonic() > end_s:
            raise RuntimeError(f"the job did not start within {END_S_MAX:g} s")
        time.sleep(POLL_S)
    return float(stamp.read_text(encoding="ascii"))


def wait_ended(cluster: Cluster, job_id: int) -> None:
    end_s = time.monotonic() + END_S_MAX
    while cluster.job(job_id).phase != types_pb2.JOB_PHASE_SUCCEEDED:
        if time.monotonic() > end_s:
            raise RuntimeError(f"job {job_id} did not succeed within {END_S_MAX:g} s")
        time.sleep(5 * POLL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
