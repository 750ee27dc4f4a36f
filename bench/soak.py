"""Whether agent and coordinator grow: their memory over an hour of ordinary work.

Problem: a leak of a kilobyte a minute shows in no test and ends a daemon after weeks. An agent with
eight GPUs reads them once a second, and every few seconds a short job runs on it, so that starts,
ends, events and the journal take part; each program's memory is written down all the while.

Growth is the median of the last sixth of the run less that of the second sixth: the first is
warming up. With the hour comes the goal of the agent, less than 1 MB; `--minutes` makes it shorter
or longer, `--quick` half a minute, which shows that it runs and says nothing of growth.

Memory is what nobody else shares (USS): the resident set also counts pages of libraries, which come
and go with whoever else maps them.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench import report
from bench.agent import MIB, sampler_pid
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

GPUS = 8
MINUTES, MINUTES_QUICK = 60.0, 0.5
JOB_EVERY_S = 5.0
PARTS = 6  # of the run
GOAL_MIB = 1e6 / MIB


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long (default 60)")
    parsed = parser.parse_args(arguments)
    asked = report.options(parsed)
    minutes = MINUTES_QUICK if asked.quick else parsed.minutes
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch,
        Cluster(Path(scratch) / "cluster", patient=False) as cluster,
    ):
        cluster.start_coordinator()
        cluster.start_agent("n1", h100(GPUS))
        cluster.wait_for_nodes("n1")
        pids = {
            "agent": cluster.pid("n1"),
            "sampler": sampler_pid(cluster.pid("n1")),
            "coordinator": cluster.pid("coordinator"),
        }
        memory, jobs = soak(cluster, pids, minutes * 60)
    measured = minutes >= MINUTES
    notes = [f"{minutes:g} minutes, {jobs} jobs"]
    if not measured:
        notes.append(
            f"less than {MINUTES:g} minutes: growth includes warming up, no goal is judged"
        )
    report.show("Memory over time", rows(memory, measured=measured), asked, notes)
    return 0


def soak(
    cluster: Cluster, pids: dict[str, int], span_s: float
) -> tuple[dict[str, list[float]], int]:
    """USS in MiB over the run, by program, and how many jobs ran."""
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    memory: dict[str, list[float]] = {name: [] for name in pids}
    began_s = time.monotonic()
    said_s = began_s
    jobs = 0
    while time.monotonic() < began_s + span_s:
        next_s = time.monotonic() + JOB_EVERY_S
        work.wait_succeeded(cluster, work.submit(cluster, ["true"], gpus=1))
        jobs += 1
        for name, process in processes.items():
            memory[name].append(process.memory_full_info().uss / MIB)
        if time.monotonic() - said_s > span_s / PARTS:
            said_s = time.monotonic()
            now = ", ".join(f"{name} {found[-1]:.2f} MiB" for name, found in memory.items())
            report.say(f"soak: {(said_s - began_s) / 60:.0f} minutes, {jobs} jobs: {now}")
        time.sleep(max(0.0, next_s - time.monotonic()))
    return memory, jobs


def rows(memory: dict[str, list[float]], *, measured: bool) -> list[report.Row]:
    made = []
    for name, found in memory.items():
        part = max(1, len(found) // PARTS)
        early, late = found[part : 2 * part] or found[:1], found[-part:]
        made.append(report.row_of(f"{name}: unshared memory at the end", late, "MiB"))
        made.append(
            report.Row(
                name=f"{name}: growth",
                value=statistics.median(late) - statistics.median(early),
                unit="MiB",
                goal=GOAL_MIB if measured and name != "coordinator" else None,
            )
        )
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
