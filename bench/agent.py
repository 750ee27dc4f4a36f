"""What an agent at rest costs its node: CPU and memory, with eight GPUs read once a second.

The agent is the real one, connected to a real coordinator, with no job. The GPUs are those of the
stand-in for NVML, which answers in microseconds where a driver takes up to milliseconds, so this
is the agent's own cost and not the driver's. NVML is called in a process of its own, with a row of
its own. Beside it stands what no Python program can go below:
the interpreter asleep, and the interpreter asleep after `import grpc`.

CPU is user and system time of the process over the window, as a share of one core. Memory is the
resident set, and beside it the part that nobody else shares (USS).
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench import report
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

GPUS = 8
WINDOW_S, WINDOW_QUICK_S = 60.0, 10.0
SLICES = 5  # of the window, for the spread
SETTLE_S = 3.0  # start-up is over, and its garbage gone
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """`cpu_ratios` are shares of one core, one per slice of the window."""

    cpu_ratios: list[float]
    rss_mib: float
    uss_mib: float


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    window_s = WINDOW_QUICK_S if asked.quick else WINDOW_S
    report.say(f"agent: {window_s:g} s of an agent at rest, and of its floor")
    floors = {
        "interpreter asleep": "import time; time.sleep(1e6)",
        "interpreter asleep after `import grpc`": "import time, grpc; time.sleep(1e6)",
    }
    sleeping = {
        name: subprocess.Popen([sys.executable, "-P", "-c", script])
        for name, script in floors.items()
    }
    try:
        with (
            tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch,
            Cluster(Path(scratch)) as cluster,
        ):
            cluster.start_coordinator()
            cluster.start_agent("n1", h100(GPUS))
            cluster.wait_for_nodes("n1")
            pids = {f"agent, {GPUS} GPUs at 1 Hz": cluster.pid("n1")}
            pids["its sampler, which calls NVML"] = sampler_pid(cluster.pid("n1"))
            pids["coordinator with one such agent"] = cluster.pid("coordinator")
            pids |= {name: process.pid for name, process in sleeping.items()}
            costs = watch(pids, window_s)
    finally:
        for process in sleeping.values():
            process.kill()
            process.wait()
    report.show("An agent at rest", rows(costs), asked)
    return 0


def sampler_pid(agent_pid: int) -> int:
    """Of the agent's process that calls the driver."""
    children = psutil.Process(agent_pid).children()
    return next(child.pid for child in children if "agent.telemetry.sampler" in child.cmdline())


def watch(pids: dict[str, int], window_s: float) -> dict[str, Cost]:
    """All of them over the same window."""
    time.sleep(SETTLE_S)
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    ratios: dict[str, list[float]] = {name: [] for name in pids}
    for _ in range(SLICES):
        before = {name: used_s(process) for name, process in processes.items()}
        began_s = time.monotonic()
        time.sleep(window_s / SLICES)
        span_s = time.monotonic() - began_s
        for name, process in processes.items():
            ratios[name].append((used_s(process) - before[name]) / span_s)
    costs = {}
    for name, process in processes.items():
        memory = process.memory_full_info()
        costs[name] = Cost(ratios[name], memory.rss / MIB, memory.uss / MIB)
    return costs


def used_s(process: psutil.Process) -> float:
    """Seconds on a core, of all threads, in nanoseconds' detail (Linux, scheduler/sched-stats.rst);
    the usual counters tick a hundred times a second, too coarse for a sleeper."""
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    return (
        sum(int((thread / "schedstat").read_text("ascii").split()[0]) for thread in threads) / 1e9
    )


def rows(costs: dict[str, Cost]) -> list[report.Row]:
    floor = costs["interpreter asleep after `import grpc`"]
    source = "the interpreter after `import grpc`, this run"
    made = []
    for name, cost in costs.items():
        percents = [ratio * 100 for ratio in cost.cpu_ratios]
        made.append(report.row_of(f"{name}: CPU", percents, "% of one core"))
        compared = cost is not floor and not name.startswith("interpreter")
        made.append(
            report.Row(
                name=f"{name}: resident memory",
                value=cost.rss_mib,
                unit="MiB",
                reference=floor.rss_mib if compared else None,
                reference_source=source if compared else "",
            )
        )
        made.append(report.Row(name=f"{name}: of it unshared", value=cost.uss_mib, unit="MiB"))
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
