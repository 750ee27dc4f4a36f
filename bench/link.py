"""What the link costs one coordinator: 100, 1,000 and 10,000 agents, and all of them after a crash.

The coordinator is the real program with its real store. The agents are `link_agents.py`: a
connection and a stream each, and every five seconds a report of eight GPUs, which the coordinator
answers with a renewal. On top come 100 events a second in total, milestones of running jobs: each
becomes a line of the job's history, durable before it is acknowledged, and the time from sending to
that acknowledgement is the latency from event to decision. Heartbeat and lease are those advised
for a fleet of this size, 5 s and 30 s.

Then the coordinator is killed and started again at once, and the clock runs until the last agent is
welcome. No node may be lost on the way.

CPU is what the kernel charged the coordinator for a window of time, in percent of one core. The
agents share the machine with it, so latencies include theirs; what they take of a core in the same
window is shown, and how late their own event loop was. They make no garbage in cycles and do not
look for it, since a look at ten thousand agents is a second in which none of them hears anything.

At the end the largest fleet talks to `link_plain.py`, a server that decides and keeps nothing: the
floor of gRPC on this machine in this hour, which the figures stand beside.
"""

import asyncio
import gc
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import report
from bench.link_agents import FleetAgent, Herd
from protos.baton.v1 import agent_pb2, jobs_pb2, types_pb2
from tests.e2e.cluster import Cluster

SIZES, SIZES_QUICK = (100, 1_000, 10_000), (100, 300)
HEARTBEAT_MS, LEASE_MS = 5_000, 30_000
EVENTS_PER_S = 100
JOBS = 100  # that events are told of
WINDOW_S, WINDOW_QUICK_S = 30.0, 8.0
CONNECT_S_MAX = 180.0
SETTLE_S = HEARTBEAT_MS / 1000
SEED = 7

CPU_GOAL, RSS_GOAL_GB, P99_GOAL_MS = 50.0, 1.4, 20.0
RECONNECT_FLOOR_S = 13.8
FLOOR = "plain grpc.aio, the same agents"
FLOOR_ELSEWHERE = "plain grpc.aio, 9,900 streams, elsewhere"


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured with `agents` of them."""

    agents: int
    cpu_percent: float
    generator_cpu_percent: float
    generator_late_ms: list[float]
    rss_gb: float
    event_ms: list[float]
    renewal_ms: list[float]
    reports_per_s: float
    join_s: float
    reconnect_s: float
    rss_peak_gb: float
    restart_cpu_s: float
    in_line: int
    dropped: int
    lost: int


@dataclass(frozen=True, slots=True)
class Plain:
    """What a server that only answers did with `agents` of them."""

    agents: int
    cpu_percent: float
    rss_gb: float
    event_ms: list[float]
    renewal_ms: list[float]


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--agents", type=int, action="append", help="this many; may be repeated")
    given = parser.parse_args(arguments)
    asked = report.options(given)
    sizes = given.agents or (SIZES_QUICK if asked.quick else SIZES)
    _raise_descriptor_limit(max(sizes))
    gc.disable()
    found = []
    for size in sizes:
        with (
            tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch,
            Cluster(Path(scratch) / "fleet", patient=False) as cluster,
        ):
            window_s = WINDOW_QUICK_S if asked.quick else WINDOW_S
            found.append(asyncio.run(measure(cluster, size, window_s)))
    report.say("link: plain grpc.aio instead of the coordinator")
    plain = asyncio.run(measure_plain(max(sizes), WINDOW_QUICK_S if asked.quick else WINDOW_S))
    shown = [row for one in found for row in rows(one, plain)]
    report.show("The link", shown, asked, notes(found))
    return 0


def rows(found: Found, plain: Plain) -> list[report.Row]:
    whole, beside = found.agents == max(SIZES), found.agents == plain.agents

    def row(
        name: str, value: float, unit: str, floor: float | None = None, goal: float | None = None
    ) -> report.Row:
        """`floor`: of plain gRPC, where as many agents were asked there; `goal`: of the largest."""
        return report.Row(
            name=f"{found.agents:,} agents: {name}",
            value=value,
            unit=unit,
            goal=goal if whole else None,
            reference=floor if beside else None,
            reference_source="" if floor is None else FLOOR,
        )

    def p99(samples: Sequence[float]) -> float:
        return report.percentile(samples, 0.99)

    ours, floor = found.event_ms, plain.event_ms
    p50, p50_floor = report.percentile(ours, 0.5), report.percentile(floor, 0.5)
    to_renewal = f"report to renewal, p99 of {len(found.renewal_ms)}"
    reconnect = row("kill -9 to the last one welcome", found.reconnect_s, "s")
    least_s = RECONNECT_FLOOR_S if whole else None
    core = "% of a core"
    return [
        row("CPU of the coordinator", found.cpu_percent, core, plain.cpu_percent, CPU_GOAL),
        row("CPU of the agents, all in one process", found.generator_cpu_percent, core),
        row("how late that process comes to a timer, p99", p99(found.generator_late_ms), "ms"),
        row("resident memory", found.rss_gb, "GB", plain.rss_gb, RSS_GOAL_GB),
        row(f"event to decision, p99 of {len(ours)}", p99(ours), "ms", p99(floor), P99_GOAL_MS),
        row("the same, p50", p50, "ms", p50_floor),
        row(to_renewal, p99(found.renewal_ms), "ms", p99(plain.renewal_ms)),
        row("all joined a new coordinator in", found.join_s, "s"),
        replace(reconnect, reference=least_s, reference_source=FLOOR_ELSEWHERE),
        row("CPU of the coordinator until then", found.restart_cpu_s, "s"),
        row("resident memory, most", found.rss_peak_gb, "GB"),
        row("told to wait in line", found.in_line, "times"),
        row("sessions that broke at work", found.dropped, "sessions"),
        replace(row("nodes declared lost", found.lost, "nodes"), goal=0),
    ]


def notes(found: Sequence[Found]) -> list[str]:
    """How cost grows from one size to the next."""
    said = []
    for small, large in itertools.pairwise(found):
        times = large.agents / small.agents
        said.append(
            f"{times:.3g} x the agents ({small.agents:,} to {large.agents:,}): "
            f"{large.cpu_percent / small.cpu_percent:.3g} x the CPU, "
            f"{large.rss_gb / small.rss_gb:.3g} x the memory, "
            f"{large.reconnect_s / small.reconnect_s:.3g} x the time to reconnect"
        )
    return said


async def measure(cluster: Cluster, size: int, window_s: float) -> Found:
    """One coordinator with `size` agents: joined, at work, killed, joined again."""
    report.say(f"link: {size:,} agents join")
    config = {"heartbeat_interval_ms": HEARTBEAT_MS, "lease_ms": LEASE_MS}
    await asyncio.to_thread(cluster.start_coordinator, **config)
    herd = Herd(cluster.address, SEED)
    began_s = time.perf_counter()
    herd.grow(size)
    await herd.all_connected(CONNECT_S_MAX)
    join_s = time.perf_counter() - began_s
    report.say(f"link: joined in {join_s:.1f} s; {JOBS} jobs start")
    await asyncio.to_thread(_submit, cluster)
    workers = await _workers(herd)
    await asyncio.sleep(SETTLE_S)
    report.say(f"link: at work for {window_s:g} s")
    herd.tally.clear()
    cpu_s = _cpu_s(cluster.pid("coordinator"))
    own_cpu_s, began_s = time.process_time(), time.perf_counter()
    late_ms = await _tell_events(workers, window_s)
    lasted_s = time.perf_counter() - began_s
    own_cpu_percent = 100 * (time.process_time() - own_cpu_s) / lasted_s
    cpu_percent = 100 * (_cpu_s(cluster.pid("coordinator")) - cpu_s) / lasted_s
    rss_gb = _memory_gb(cluster.pid("coordinator"), "VmRSS")
    event_ms = [1000 * span_s for span_s in herd.tally.event_s]
    renewal_ms = [1000 * span_s for span_s in herd.tally.renewal_s]
    reports_per_s, dropped = herd.tally.reports / lasted_s, herd.tally.closed
    report.say(f"link: {cpu_percent:.1f}% of a core; the coordinator is killed")
    herd.tally.clear()
    began_s = time.perf_counter()
    await asyncio.to_thread(cluster.kill_coordinator)
    await asyncio.to_thread(cluster.start_coordinator, **config)
    await herd.all_connected(CONNECT_S_MAX)
    reconnect_s = time.perf_counter() - began_s
    restart_cpu_s = _cpu_s(cluster.pid("coordinator"))
    in_line = herd.tally.in_line
    more_s = LEASE_MS / 1000 if window_s == WINDOW_S else SETTLE_S
    report.say(f"link: all back in {reconnect_s:.1f} s; {more_s:g} s more for late losses")
    await asyncio.sleep(more_s)
    rss_peak_gb = _memory_gb(cluster.pid("coordinator"), "VmHWM")
    await herd.stop()
    lost = sum(1 for line in cluster.log_lines("coordinator") if line["event"] == "node.lost")
    return Found(
        size, cpu_percent, own_cpu_percent, late_ms, rss_gb, event_ms, renewal_ms, reports_per_s,
        join_s, reconnect_s, rss_peak_gb, restart_cpu_s, in_line, dropped, lost,
    )  # fmt: skip


async def measure_plain(size: int, window_s: float) -> Plain:
    """The same agents and events, and nobody behind the stream."""
    command = [sys.executable, "-m", "bench.link_plain", str(HEARTBEAT_MS // 1000)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert server.stdout is not None
        port = await asyncio.to_thread(server.stdout.readline)
        herd = Herd(f"127.0.0.1:{int(port)}", SEED)
        herd.grow(size)
        await herd.all_connected(CONNECT_S_MAX)
        await asyncio.sleep(SETTLE_S)
        herd.tally.clear()
        cpu_s, began_s = _cpu_s(server.pid), time.perf_counter()
        await _tell_events([(agent, "1.1") for agent in herd.agents[:JOBS]], window_s)
        cpu_percent = 100 * (_cpu_s(server.pid) - cpu_s) / (time.perf_counter() - began_s)
        rss_gb = _memory_gb(server.pid, "VmRSS")
        await herd.stop()
    finally:
        server.kill()
        server.wait()
    event_ms = [1000 * span_s for span_s in herd.tally.event_s]
    renewal_ms = [1000 * span_s for span_s in herd.tally.renewal_s]
    return Plain(size, cpu_percent, rss_gb, event_ms, renewal_ms)


def _submit(cluster: Cluster) -> None:
    spec = types_pb2.JobSpec(command=["sleep", "infinity"], gpus=1)
    for _ in range(JOBS):
        cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=spec))


async def _workers(herd: Herd) -> list[tuple[FleetAgent, str]]:
    """All attempts, once each has its job."""
    async with asyncio.timeout(CONNECT_S_MAX):
        while True:
            found = [(agent, name) for agent in herd.agents for name in agent.attempts]
            if len(found) >= JOBS:
                return found
            await asyncio.sleep(0.1)


async def _tell_events(workers: Sequence[tuple[FleetAgent, str]], window_s: float) -> list[float]:
    """Milestones, one after the other in even steps, then until all of them are answered. Returns
    how late each was told, in milliseconds."""
    late_ms = []
    began_s = time.perf_counter()
    for number in range(int(window_s * EVENTS_PER_S)):
        due_s = began_s + number / EVENTS_PER_S
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        late_ms.append(1000 * (time.perf_counter() - due_s))
        agent, attempt = workers[number % len(workers)]
        milestone = agent_pb2.AttemptMilestone(name=f"milestone-{number}")
        agent.event(agent_pb2.AgentEvent(attempt=attempt, milestone=milestone))
    async with asyncio.timeout(CONNECT_S_MAX):
        while any(agent.spool for agent, _ in workers):  # noqa: ASYNC110 - a hundred of them
            await asyncio.sleep(0.01)
    return late_ms


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far (proc(5), `stat`, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_gb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"/proc/{pid}/status has no {name}")


def _raise_descriptor_limit(agents: int) -> None:
    """One connection each, here and, as it is inherited, in the coordinator."""
    need = agents + 1_000
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < need:
        raise SystemExit(f"{agents} agents need {need} open files; this shell allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
