"""What an agent at rest costs its node: CPU and memory, with eight GPUs read once a second.

The agent is the real one, connected to a real coordinator, with no job. The GPUs are those of the
stand-in for NVML, which answers in microseconds where a driver takes up to milliseconds, so this
is the agent's own cost and not the driver's. NVML is called in a process of its own, with a row of
its own. Beside it, in the same window: what no Python program can go below, the interpreter asleep,
and asleep after `import grpc`; and exporters that others run for such figures, scraped once a
second (`agent_others.py`), with an agent whose `/metrics` are scraped likewise.

CPU is user and system time of the process over the window, as a share of one core. Memory is the
resident set, and beside it the part that nobody else shares (USS). Agent and sampler share the
interpreter's pages, so together they are the agent's resident set and the sampler's unshared part.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from agent.telemetry.probe import NvmlProbe
from bench import agent_others as others_module
from bench import report
from tests.e2e.cluster import Cluster
from tests.e2e.work import wait_log
from tests.fakenvml.build import build, describe, environment, h100

GPUS = 8
WINDOW_S, WINDOW_QUICK_S = 60.0, 10.0
SLICES = 5  # of the window, for the spread
SETTLE_S = 3.0  # start-up is over, and its garbage gone
READINGS, READINGS_QUICK = 1_000, 200
MIB = 1 << 20

AGENT = f"agent, {GPUS} GPUs at 1 Hz"
SAMPLER = "its sampler, which calls NVML"
SCRAPED = "agent, scraped at 1 Hz"
FLOORS = {
    "interpreter asleep": "import time; time.sleep(1e6)",
    "interpreter asleep after `import grpc`": "import time, grpc; time.sleep(1e6)",
}
CPU_GOAL_PERCENT = 0.5
MEMORY_GOAL_MIB = 65e6 / MIB
READING_GOAL_MS = 5.0


@dataclass(frozen=True, slots=True)
class Cost:
    """`cpu_ratios` are shares of one core, one per slice of the window."""

    cpu_ratios: list[float]
    rss_mib: float
    uss_mib: float


def main(arguments: Sequence[str]) -> int:
    asked = report.options(report.parser(__doc__).parse_args(arguments))
    window_s = WINDOW_QUICK_S if asked.quick else WINDOW_S
    report.say(f"agent: {window_s:g} s of an agent at rest, of its floor, and of others")
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch,
        contextlib.ExitStack() as running,
    ):
        cluster = running.enter_context(Cluster(Path(scratch) / "cluster", patient=False))
        cluster.start_coordinator()
        cluster.start_agent("n1", h100(GPUS))
        cluster.start_agent(
            "n2", h100(GPUS, node="n2"), metrics_listen="127.0.0.1:0", metrics_dcgm_names=True
        )
        cluster.wait_for_nodes("n1", "n2")
        pids = {AGENT: cluster.pid("n1"), SAMPLER: sampler_pid(cluster.pid("n1"))}
        pids["coordinator with two such agents"] = cluster.pid("coordinator")
        pids[SCRAPED] = cluster.pid("n2")
        pids |= {
            name: running.enter_context(process([sys.executable, "-P", "-c", script])).pid
            for name, script in FLOORS.items()
        }
        urls = {SCRAPED: str(wait_log(cluster, "n2", "metrics.serving")["url"])}
        for name, pid, url in others(running, Path(scratch)):
            pids[name], urls[name] = pid, url
        with others_module.Scraper(list(urls.values())) as scraper:
            costs = watch(pids, window_s)
        silent = [name for name, url in urls.items() if not scraper.answers[url]]
    if silent:
        report.say(f"agent: never answered a scrape: {', '.join(silent)}")
    durations_ms = readings_ms(READINGS_QUICK if asked.quick else READINGS)
    report.show("An agent at rest", rows(costs, durations_ms), asked)
    return 0


@contextlib.contextmanager
def process(
    command: Sequence[str], variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """One that ends with the block."""
    started = subprocess.Popen(
        list(command),
        env={**os.environ, **(variables or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def others(running: contextlib.ExitStack, scratch: Path) -> Iterator[tuple[str, int, str]]:
    """Those that can be had here: name, pid and the URL to scrape; they see the same GPUs."""
    description = scratch / "others.gpus"
    describe(h100(GPUS), description)
    gpus = environment(build(), description)
    for name, found in (
        ("nvitop-exporter, scraped at 1 Hz", others_module.nvitop_exporter()),
        ("prometheus-node-exporter, scraped at 1 Hz", others_module.node_exporter()),
    ):
        if found is not None:
            command, variables = found
            port = others_module.free_port()
            if command[-1].endswith(":"):
                command[-1] += str(port)
            else:
                command.append(str(port))
            started = running.enter_context(process(command, {**gpus, **variables}))
            yield name, started.pid, f"http://127.0.0.1:{port}/metrics"


def readings_ms(count: int) -> list[float]:
    """How long a reading of host and GPUs takes, as the agent makes it: over the sampler."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        description = Path(scratch) / "gpus"
        describe(h100(GPUS), description)
        kept = {name: os.environ.get(name) for name in environment(build(), description)}
        os.environ.update(environment(build(), description))
        try:
            with NvmlProbe(Path(scratch)) as probe:
                return [timed_ms(probe) for _ in range(count)]
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def timed_ms(probe: NvmlProbe) -> float:
    began_ns = time.perf_counter_ns()
    sample = probe.sample()
    took_ms = (time.perf_counter_ns() - began_ns) / 1e6
    assert not any(gpu.error for gpu in sample.gpus)
    return took_ms


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


def rows(costs: dict[str, Cost], durations_ms: list[float]) -> list[report.Row]:
    floor = costs["interpreter asleep after `import grpc`"]
    source = "the interpreter after `import grpc`, this run"
    both = [
        100 * (mine + other)
        for mine, other in zip(costs[AGENT].cpu_ratios, costs[SAMPLER].cpu_ratios, strict=True)
    ]
    made = [
        replace(
            report.row_of("agent and sampler together: CPU", both, "% of one core"),
            goal=CPU_GOAL_PERCENT,
        ),
        report.Row(
            name="agent and sampler together: resident memory",
            value=costs[AGENT].rss_mib + costs[SAMPLER].uss_mib,
            unit="MiB",
            goal=MEMORY_GOAL_MIB,
        ),
        report.row_of("a reading of host and GPUs, median", durations_ms, "ms"),
        report.Row(
            name="a reading of host and GPUs, p99",
            value=report.percentile(durations_ms, 0.99),
            unit="ms",
            goal=READING_GOAL_MS,
        ),
    ]
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
