"""The agents' half of the torture; `torture.py` says what is done and what is checked.

The leases are short (1 s), so that a fault costs seconds. The plan keeps one promise that the
design does not: it never destroys both copies of a checkpoint. Before a disk is taken away, every
unfinished job has a copy elsewhere; without that a job may rightly wait for a node that is gone.
"""

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from agent.processes import proc
from protos.baton.v1 import jobs_pb2, types_pb2
from tests.e2e import guardian
from tests.e2e.cluster import Cluster
from tests.e2e.trainers import ticking
from tests.e2e.work import ENDED
from tests.fakenvml.build import FakeGpu, h100

NODES = ("n1", "n2", "n3")
AGENT, NODE, SILENCE = "agent killed", "node dead, disk gone", "silent for longer than the lease"
KINDS = (AGENT, NODE, SILENCE)
COORDINATOR = {"heartbeat_interval_ms": 250, "lease_ms": 1_000, "closed_grace_ms": 500}
LEASE_S = 1.0
JOBS_AT_ONCE = 3  # on three nodes of two GPUs: one node may be dead and all still run
GPUS_PER_NODE = 2
STEPS, STEP_MS, CHECKPOINT_MS = 200, 20, 200
SETTLE_S_MAX = 90.0
# Never set: to let a random time pass until the next fault, which is no wait for anything.
PAUSE = threading.Event()
# From the moment its agent is back in touch to its end: a kill, on a busy machine.
STOP_S_MAX = 10.0


@dataclass(slots=True)
class Plan:
    """Where it stands. `jobs` are those submitted; `fired` counts faults by kind."""

    chance: random.Random
    directory: Path
    jobs: list[int] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)

    def witness(self, job_id: int) -> Path:
        return self.directory / f"witness-{self.jobs.index(job_id)}"


@dataclass(frozen=True, slots=True)
class Commit:
    epoch: int
    step: int
    unix_s: float


def torture_agents(faults: int, seed: int, say: Callable[[str], None]) -> list[str]:
    """Let agents and nodes suffer `faults` times; returns what went wrong."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="baton-torture-") as scratch:
        plan = Plan(random.Random(seed), Path(scratch))
        with Cluster(Path(scratch) / "cluster", patient=False) as cluster:
            cluster.start_coordinator(**COORDINATOR)
            for node in NODES:
                cluster.start_agent(node, gpus_of(node))
            cluster.wait_for_nodes(*NODES)
            for number in range(faults):
                keep_busy(cluster, plan)
                suffer(cluster, plan)
                if (number + 1) % 25 == 0:
                    say(f"agents: {number + 1} faults, {len(plan.jobs)} jobs")
            cluster.wait_until(lambda: not unfinished(cluster, plan), SETTLE_S_MAX, "all ended")
            problems = [*left_over(cluster)]
            found = Audit(cluster.log_lines("coordinator"))
            for job_id in plan.jobs:
                problems += found.job(cluster.job(job_id), notes_of(plan.witness(job_id)))
    if faults >= len(KINDS) * 3:
        problems += [f"no fault of the kind '{kind}'" for kind in KINDS if not plan.fired[kind]]
    say(
        f"agents: {faults} faults in {time.monotonic() - began_s:.0f} s ("
        + ", ".join(f"{kind}: {plan.fired[kind]}" for kind in KINDS)
        + f"); {len(plan.jobs)} jobs, {found.attempts} attempts, {found.commits} commits; "
        f"{found.zombies} old copies ran beside their successor, the last step of one came "
        f"{found.lag_s_max:.2f} s after its agent was back; {len(problems)} problems"
    )
    return problems


def gpus_of(node: str) -> tuple[FakeGpu, ...]:
    return h100(GPUS_PER_NODE, node=node)


def unfinished(cluster: Cluster, plan: Plan) -> list[types_pb2.Job]:
    jobs = [cluster.job(job_id) for job_id in plan.jobs[-2 * JOBS_AT_ONCE :]]
    return [job for job in jobs if job.phase not in ENDED]


def keep_busy(cluster: Cluster, plan: Plan) -> None:
    """As many jobs as there should be, and each has a checkpoint to lose."""
    while len(unfinished(cluster, plan)) < JOBS_AT_ONCE:
        words: list[object] = [sys.executable, ticking.__file__]
        words += ["--file", plan.directory / f"witness-{len(plan.jobs)}", "--steps", STEPS]
        words += ["--step-ms", STEP_MS, "--checkpoint-ms", CHECKPOINT_MS]
        spec = types_pb2.JobSpec(
            command=[str(word) for word in words],
            gpus=1,
            max_restarts=1_000,
            replication=types_pb2.REPLICATION_REQUIRED,
        )
        plan.jobs.append(cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=spec)).job_id)
    PAUSE.wait(plan.chance.uniform(0.0, 1.0))


def suffer(cluster: Cluster, plan: Plan) -> None:
    """One fault, and its repair: all nodes are up again afterwards."""
    kind = plan.chance.choice(KINDS)
    node = plan.chance.choice(NODES)
    pause_s = plan.chance.uniform(0.0, 1.0)
    if kind == AGENT:
        cluster.kill_agent(node)
        PAUSE.wait(2 * pause_s)  # within its grace, or beyond it
        cluster.start_agent(node, gpus_of(node))
    elif kind == NODE:
        cluster.wait_until(lambda: dispensable(cluster, plan, node), SETTLE_S_MAX, "copies")
        cluster.kill_node(node)
        PAUSE.wait(pause_s)
        cluster.start_agent(node, gpus_of(node))
    else:
        silence(cluster, node, LEASE_S * 1.5 + pause_s)
    plan.fired[kind] += 1
    cluster.wait_for_nodes(*NODES)


def silence(cluster: Cluster, node: str, span_s: float) -> None:
    """Agent, shims and trainers stop in the middle of whatever they do, and then go on."""
    held = guardian.owned(cluster.runtime_directory / node, cluster.node_directory(node))
    signal_all(held, signal.SIGSTOP)
    PAUSE.wait(span_s)
    signal_all(held, signal.SIGCONT)


def signal_all(processes: list[proc.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue  # it ended by itself, between being listed and now


def dispensable(cluster: Cluster, plan: Plan, node: str) -> bool:
    """Whether every unfinished job's last checkpoint lies on another node as well."""
    for job in unfinished(cluster, plan):
        if job.HasField("checkpoint") and set(job.checkpoint.replicas) <= {node}:
            return False
    return True


def left_over(cluster: Cluster) -> list[str]:
    """Trainers that live though every job has ended, after the time that a stop takes."""

    def trainers() -> list[int]:
        owned = guardian.owned(cluster.runtime_directory, cluster.directory)
        return [p.pid for p in owned if b"ticking.py" in proc.read_bytes(p.pid, "cmdline")]

    end_s = time.monotonic() + STOP_S_MAX
    while (alive := trainers()) and time.monotonic() < end_s:
        PAUSE.wait(0.1)
    return [f"trainer {pid} lives though every job has ended" for pid in alive]


def notes_of(witness: Path) -> list[dict[str, Any]]:
    """What a job's trainers noted, oldest first; none when it never began."""
    if not witness.exists():
        return []
    return [json.loads(line) for line in witness.read_text("utf-8").splitlines()]


class Audit:
    """The coordinator's log against the trainers' notes."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.attempts = self.commits = self.zombies = 0
        self.lag_s_max = 0.0
        self._commits: dict[str, list[Commit]] = {}
        self._assigned: dict[str, tuple[str, float]] = {}
        self._up: dict[str, list[float]] = {node: [] for node in NODES}
        for line in lines:
            at_s = datetime.fromisoformat(line["ts"]).timestamp()
            if line["event"] == "checkpoint.committed":
                job, _, epoch = line["attempt"].partition(".")
                self._commits.setdefault(job, []).append(Commit(int(epoch), line["step"], at_s))
            elif line["event"] == "attempt.assigned":
                self._assigned[line["attempt"]] = (line["node"], at_s)
            elif line["event"] == "node.up":
                self._up[line["node"]].append(at_s)

    def job(self, job: types_pb2.Job, notes: list[dict[str, Any]]) -> list[str]:
        """What is not as it must be with one job."""
        commits = self._commits.get(str(job.id), [])
        self.commits += len(commits)
        self.attempts += job.epoch
        problems = []
        if job.phase != types_pb2.JOB_PHASE_SUCCEEDED:
            problems.append(f"job {job.id} ended otherwise: {job.reason}")
        if not any(note["event"] == "done" and note["step"] == STEPS for note in notes):
            problems.append(f"job {job.id} never did its last step")
        for before, after in pairwise(commits):
            if after.step < before.step or after.epoch < before.epoch:
                problems.append(f"job {job.id}: commit {after} came after {before}")
        known = {(commit.epoch, commit.step) for commit in commits}
        for note in notes:
            if note["event"] == "committed" and (note["epoch"], note["step"]) not in known:
                problems.append(f"job {job.id}: a trainer heard of a commit that is none: {note}")
            if note["event"] == "began":
                head = max((c.step for c in commits if c.epoch < note["epoch"]), default=0)
                if note["step"] != head:
                    problems.append(f"job {job.id}: began at another step than {head}: {note}")
        return problems + self._old_copies(job, notes)

    def _old_copies(self, job: types_pb2.Job, notes: list[dict[str, Any]]) -> list[str]:
        """Copies that were replaced: when did each take its last step?"""
        problems = []
        for epoch in range(1, job.epoch):
            node, _ = self._assigned[f"{job.id}.{epoch}"]
            _, replaced_s = self._assigned[f"{job.id}.{epoch + 1}"]
            ticks = [n["unix_ns"] / 1e9 for n in notes if n["epoch"] == epoch]
            if not ticks or ticks[-1] <= replaced_s:
                continue
            self.zombies += 1
            back_s = next((at_s for at_s in self._up[node] if at_s > replaced_s), None)
            if back_s is None:
                continue  # its agent never came back; `left_over` sees that nothing lives
            self.lag_s_max = max(self.lag_s_max, ticks[-1] - back_s)
            if ticks[-1] - back_s > STOP_S_MAX:
                problems.append(f"{job.id}.{epoch} went on for {ticks[-1] - back_s:.1f} s")
        return problems
