"""From the death of a node to the first training step on another one, phase by phase.

A real job (the built-in fine-tuning of a small language model, with a checkpoint replicated every
second) runs on one of three agents. Then something dies, in one of three ways:

- *killed*: SIGKILL to the agent and everything it started, its disk gone. The kernel closes the
  connection, as it does when a process or a box with a living switch port dies.
- *silent*: agent and trainers stopped (SIGSTOP). Connections stay open and nobody answers, as with
  a cut cable or a hung box: only the lease can tell.

- *trainer*: SIGKILL to the trainer alone, as the kernel does when memory runs out. The agent sees
  it at once, and the job starts again on the same node.

*Warm* is the agents' default, trainers forked from a process that has imported their libraries;
*cold* is without. Of *two ranks*, each on a node of its own, one dies; the phases are those of rank
0's next attempt, and the decision waits until the other rank has ended.

Beside them, in the same run and on the same model and data: a plain PyTorch script that saves every
second, under `torchrun --max-restarts`, and a Hugging Face Trainer script in a shell loop that
resumes from its newest checkpoint; their worker gets the same SIGKILL. Neither survives its node.

After each handoff the dead node comes back empty, and the node that runs the job by then is next.
Phases: the coordinator's history and log, the agent's log and the trainer's milestones, all on one
machine's wall clock. *decision* is the coordinator's own share: from the batch in which it found
the node lost, through the commit, to the line that it logs as it sends the start order.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from agent.processes import proc
from bench import handoff_others, report
from protos.baton.v1 import jobs_pb2, types_pb2
from tests.e2e import guardian
from tests.e2e.cluster import ROOT, Cluster
from tests.fakenvml.build import h100

PREPARED = ROOT / ".bench"
NODES = ("n1", "n2", "n3")
KILLED, SILENT, TRAINER = "killed", "silent", "trainer"
REPETITIONS, REPETITIONS_QUICK = 5, 1
WAIT_S_MAX = 120.0
COLD_GOAL_S = 10.0  # and for what is silent under the default lease
# After the coordinator has found out, with a replica and warm trainers.
AFTER_DETECTION_GOAL_S = 2.0
SHORT_LEASE_GOAL_S = 5.0
TRAINER_GOAL_S = 1.0
SHORT_LEASE_MS = 3_000
DECISION_GOAL_S = 0.050
# Slurm's default notices a dead node after SlurmdTimeout, 300 s, and more.
SLURM_S = 557.0
SLURM = "Slurm's default takes 557 to 601 s"
# For as long as anybody repeats this; evaluations would sit in the middle of a measurement.
JOB_CHANGES = {"steps": 1_000_000, "evaluate_every": 1_000_000, "checkpoint_every_s": 1.0}
DECISION = "decision (the coordinator's own share)"
PHASES = (
    "detection",
    DECISION,
    "order reaches the agent's journal",
    "restore and process start",
    "imports",
    "load",
    "first step",
)
RUNNING_PHASES = 4  # the rest is the trainer's own: Python, torch, model and data


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to configure the fleet; `lease_ms` of None is the default (8 s)."""

    name: str
    lease_ms: int | None
    warm: bool = True
    ranks: int = 1

    def goal_s(self, death: str) -> float:
        """For the whole way, from the death to the first new step."""
        if death == TRAINER and self.warm:
            return TRAINER_GOAL_S
        if death == SILENT and self.warm and self.lease_ms == SHORT_LEASE_MS:
            return SHORT_LEASE_GOAL_S
        return COLD_GOAL_S


def main(arguments: Sequence[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--lease-ms", type=int, help="measure with this lease only")
    parser.add_argument("--ranks", type=int, help="measure with so many ranks only (1 or 2)")
    parsed = parser.parse_args(arguments)
    asked = report.options(parsed)
    prepare()
    settings = [
        Setting("default lease, warm", None),
        Setting("3 s lease, warm", SHORT_LEASE_MS),
        Setting("default lease, warm, two ranks", None, ranks=2),
        Setting("default lease, cold", None, warm=False),
    ]
    if parsed.lease_ms is not None:
        settings = [Setting(f"{parsed.lease_ms / 1000:g} s lease, warm", parsed.lease_ms)]
    elif parsed.ranks is not None:
        settings = [one for one in settings if one.warm and one.ranks == parsed.ranks]
    elif asked.quick:
        settings = settings[:1]
    repetitions = REPETITIONS_QUICK if asked.quick else REPETITIONS
    rows: list[report.Row] = []
    notes: list[str] = []
    for setting in settings:
        for death, found in measure(setting, repetitions).items():
            title = f"{setting.name}, {death}"
            rows += rows_of(title, found, setting, setting.goal_s(death))
            notes.append(dominant(title, found))
    report.say("handoff: torchrun and a Hugging Face Trainer, their worker killed")
    others = handoff_others.measure(PREPARED, repetitions)
    rows += [report.row_of(f"{name}, trainer", samples, "s") for name, samples in others.items()]
    report.show("Death of a node to the first new training step", rows, asked, notes)
    return 0


def rows_of(
    title: str, found: list[list[float]], setting: Setting, goal_s: float
) -> list[report.Row]:
    """The whole, with reference and goal, then each phase."""
    whole = [sum(phases) for phases in found]
    running = [sum(phases[:RUNNING_PHASES]) for phases in found]
    after = [sum(phases[1:]) for phases in found]
    after_goal_s = AFTER_DETECTION_GOAL_S if setting.warm else None
    alone = setting.ranks == 1
    goals_s = [DECISION_GOAL_S if alone and name == DECISION else None for name in PHASES]
    return [
        report.row_of(title, whole, "s", goal=goal_s, reference=SLURM_S, source=SLURM),
        report.row_of("- of it until its process runs elsewhere", running, "s", goal=COLD_GOAL_S),
        report.row_of("- of it after the detection", after, "s", goal=after_goal_s),
        *(
            report.row_of(f"- {name}", samples, "s", goal=goal_s)
            for name, samples, goal_s in zip(PHASES, zip(*found, strict=True), goals_s, strict=True)
        ),
    ]


def dominant(title: str, found: list[list[float]]) -> str:
    medians = [report.row_of("", samples, "").value for samples in zip(*found, strict=True)]
    largest = max(range(len(PHASES)), key=lambda index: medians[index])
    share = medians[largest] / sum(medians)
    return f"{title}: dominated by {PHASES[largest]}, {share:.0%} ({len(found)} repetitions)"


def prepare() -> None:
    """Make model and data, once for all benchmarks on this machine."""
    if not (PREPARED / "finetune.json").exists():
        report.say(
            f"handoff: making a small model and its data in {PREPARED.name}/ (once, a minute)"
        )
        command = [sys.executable, "-m", "trainers.prepare", "--out", str(PREPARED)]
        # One thread: several would wait for one another on a machine with little to give.
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env=variables)


def job_spec(ranks: int) -> types_pb2.JobSpec:
    config = json.loads((PREPARED / "finetune.json").read_text(encoding="utf-8"))
    for key in ("model", "train_data"):
        config[key] = str(PREPARED / config[key])
    config_json = json.dumps({**config, **JOB_CHANGES})
    return types_pb2.JobSpec(
        trainer="finetune", gpus=1, ranks=ranks, trainer_config_json=config_json
    )


def measure(setting: Setting, repetitions: int) -> dict[str, list[list[float]]]:
    """Seconds of each phase, by death and repetition, of one job that moves and moves again."""
    found: dict[str, list[list[float]]] = {KILLED: [], SILENT: [], TRAINER: []}
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch,
        Cluster(Path(scratch), patient=False) as cluster,
    ):
        lease = {} if setting.lease_ms is None else {"lease_ms": setting.lease_ms}
        cluster.start_coordinator(**lease)
        for node in NODES:
            cluster.start_agent(node, h100(1, node=node), warm_start=setting.warm)
        wait_until_warm(cluster, setting, *NODES)
        job_id = cluster.jobs.Submit(jobs_pb2.SubmitRequest(spec=job_spec(setting.ranks))).job_id
        for number in range(repetitions):
            for death, samples in found.items():
                report.say(f"handoff: {setting.name}, {death}, {number + 1} of {repetitions}")
                samples.append(one_handoff(cluster, job_id, death, setting))
    return found


def wait_until_warm(cluster: Cluster, setting: Setting, *nodes: str) -> None:
    """Until the nodes are up and what their trainers are forked from is ready: a fleet at rest."""
    cluster.wait_for_nodes(*nodes)

    def ready(node: str) -> bool:
        lines = cluster.log_lines(node)  # of all its lives
        servers = [line for line in lines if line.get("server") == "warm"]
        lives = [line for line in lines if line["event"] == "agent.started"]
        return len(servers) >= len(lives)

    if setting.warm:
        cluster.wait_until(lambda: all(ready(node) for node in nodes), WAIT_S_MAX, "warm trainers")


def one_handoff(cluster: Cluster, job_id: int, death: str, setting: Setting) -> list[float]:
    """Let the job's node die; returns the phases in seconds. Afterwards the node is back, empty."""

    def safe_attempt() -> types_pb2.Attempt | None:
        """The running attempt, once it has committed a checkpoint with a copy elsewhere."""
        job = cluster.job(job_id)
        checkpoint = job.checkpoint if job.HasField("checkpoint") else None
        if checkpoint is None or checkpoint.epoch != job.epoch or not is_copied(checkpoint):
            return None
        return job.attempts[-1]

    old = cluster.wait_until(safe_attempt, WAIT_S_MAX, "a replicated checkpoint")
    new_attempt = f"{job_id}.{old.epoch + 1}" + (".0" if setting.ranks > 1 else "")
    died_s = time.time()
    if death == KILLED:
        cluster.kill_node(old.node)
    elif death == TRAINER:
        os.kill(trainer_pid(cluster, old), signal.SIGKILL)
    else:
        runtime, disk = cluster.runtime_directory / old.node, cluster.node_directory(old.node)
        for process in guardian.owned(runtime, disk):
            os.kill(process.pid, signal.SIGSTOP)

    def stepped() -> bool:
        return any(
            event.attempt == new_attempt and event.message == "first_step"
            for event in cluster.events(job_id)
        )

    cluster.wait_until(stepped, WAIT_S_MAX, f"the first step of {new_attempt}")
    seen = "attempt.exited" if death == TRAINER else "attempt.unreachable"
    stamps = [died_s, *stamps_of(cluster, job_id, (old.id, seen), new_attempt)]
    if death == SILENT:
        cluster.kill_node(old.node)
    if death != TRAINER:
        cluster.start_agent(old.node, h100(1, node=old.node), warm_start=setting.warm)
    wait_until_warm(cluster, setting, *NODES)
    return [after - before for before, after in pairwise(stamps)]


def is_copied(checkpoint: types_pb2.Checkpoint) -> bool:
    """Whether each of its parts is on two nodes."""
    parts = [checkpoint.replicas, *(part.replicas for part in checkpoint.parts)]
    return all(len(nodes) > 1 for nodes in parts)


def trainer_pid(cluster: Cluster, attempt: types_pb2.Attempt) -> int:
    """The trainer of an attempt, by the configuration that its command line names."""
    mark = os.fsencode(f"{cluster.node_directory(attempt.node)}/workspaces/{attempt.id}/")
    (pid,) = [
        process.pid
        for process in proc.all_processes()
        if mark in (words := proc.read_bytes(process.pid, "cmdline")) and b"trainers." in words
    ]
    return pid


def stamps_of(cluster: Cluster, job_id: int, seen: tuple[str, str], new: str) -> list[float]:
    """When each phase ended, seconds since 1970, in the order of `PHASES`. `seen` is the old
    attempt and the event that says that its end was found out."""
    at: dict[tuple[str, str], float] = {}
    node = ""
    for event in cluster.events(job_id):
        name = event.message if event.name == "attempt.milestone" else event.name
        at[event.attempt, name] = event.time.ToNanoseconds() / 1e9
        node = event.node if event.attempt == new else node
    return [
        at[seen],
        logged_s(cluster, "coordinator", "attempt.assigned", new),
        logged_s(cluster, node, "attempt.accepted", new),
        at[new, "attempt.started"],
        at[new, "imports"],
        at[new, "load"],
        at[new, "first_step"],
    ]


def logged_s(cluster: Cluster, program: str, event: str, attempt: str) -> float:
    """When a program wrote that line, seconds since 1970."""
    for line in reversed(cluster.log_lines(program)):
        if line["event"] == event and line.get("attempt") == attempt:
            return datetime.fromisoformat(line["ts"]).timestamp()
    raise RuntimeError(f"{program} has not logged {event} of {attempt}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
