"""What happens in the demo, in its order: prepare, start, submit, kill, watch, conclude.

Problem: a demonstration that simulates its disaster demonstrates nothing. Here everything is the
real thing on loopback: the programs that a fleet runs, the command line that a user types, jobs
that train, and a node that dies as in a power cut with a broken disk. The one thing that is a
stand-in is the NVML library, and only where there is no GPU, or the tests want to know none.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from agent.core.values import GpuFacts
from agent.telemetry.probe import NvmlProbe
from protos.baton.v1 import nodes_pb2, types_pb2
from tests.e2e import demo_report
from tests.e2e.cluster import ROOT, Cluster, ClusterError
from tests.e2e.demo_view import JobRow, NodeRow, View
from tests.fakenvml.build import BuildError, FakeGpu, a100, h100, rtx4090

DATA = ROOT / ".demo"
NODES = ("n1", "n2", "n3")
FAKE_GPUS = {"n1": h100, "n2": a100, "n3": rtx4090}
# With one H100 a step of the little model takes a few milliseconds; the job must last long enough
# to lose its node in the middle.
GPU_STEPS = 6_000
GPU_CHECKPOINT_EVERY_S = 1.0
KILL_RATIO = 0.4
KILL_CHECKPOINTS_MIN = 2
# Ten times what a quiet two-core machine needs.
TRAINING_DEADLINE_S = 900.0
KILL_LINE = "{node} dies: SIGKILL to its agent and all it started ({count} processes), disk gone"

_JOB_PHASES = {value: name for name, value in types_pb2.JobPhase.items()}
_NODE_PHASES = {value: name for name, value in types_pb2.NodePhase.items()}
_ENDED = ("succeeded", "failed", "cancelled")


@dataclass(slots=True)
class Watched:
    """What the demo has seen of the fine-tuning job."""

    job_id: int
    other_id: int
    committed: list[str] = field(default_factory=list)  # digests, each once
    step: int = 0
    killed_node: str = ""
    killed_s: float = 0.0
    last_step_before_kill: int = 0
    said: dict[str, str] = field(default_factory=dict)


def run(
    *,
    steps: int | None,
    lease_ms: int | None,
    comparison: bool,
    stand_in: bool,
    keep: bool,
    as_json: bool,
) -> int:
    """Tell the whole story. Returns the exit status."""
    with View(as_json=as_json) as view:
        sweep()
        directory = DATA / f"run-{os.getpid()}"
        cluster = Cluster(directory, patient=False)
        held = False
        try:
            with cluster:
                gpus = () if stand_in else _real_gpus(cluster.directory)
                _prepare(cluster, view, comparison=comparison)
                summary = _tell(cluster, view, gpus, steps=steps, lease_ms=lease_ms)
            view.text()
            for line in demo_report.lines(summary):
                view.text(line)
            failures = summary.failures()
            held = not failures
            if as_json:
                sys.stdout.write(json.dumps(summary.document()) + "\n")
        except (ClusterError, BuildError, demo_report.ReportError, grpc.RpcError) as error:
            failures = [sentence(error)]
        finally:
            view.end_table()
            sweep()
            if held and not keep:
                shutil.rmtree(directory, ignore_errors=True)
        view.text()
        for failure in failures:
            view.text(f"FAILED: {failure}")
        if keep or not held:
            view.text(f"Logs and state are in {directory.relative_to(ROOT)}/")
        if held:
            view.text("A node died, and its work did not.")
        return 0 if held else 1


def _prepare(cluster: Cluster, view: View, *, comparison: bool) -> None:
    view.title("Preparing model and data (once, offline; about half a minute)")
    _helper(cluster, view, "trainers.prepare", "--out", str(DATA))
    if comparison:
        view.title("Was anything transferred? The same head, trained on three backbones")
        _helper(cluster, view, "trainers.compare", "--data", str(DATA))


def _tell(
    cluster: Cluster,
    view: View,
    gpus: Sequence[GpuFacts],
    *,
    steps: int | None,
    lease_ms: int | None,
) -> demo_report.Summary:
    _start_fleet(cluster, view, gpus, lease_ms)
    view.title("Submitting two jobs")
    config = _finetune_config(steps, on_gpu=bool(gpus))
    job_id = _submit(cluster, view, "finetune", config)
    other_id = _submit(cluster, view, "transfer", "transfer.json")
    view.title("Training; a node will die in the middle")
    watched = Watched(job_id, other_id)

    def ended() -> bool:
        return _look(cluster, view, watched)

    cluster.wait_until(ended, TRAINING_DEADLINE_S, "both jobs end")
    view.end_table()
    return _conclude(cluster, watched)


def _start_fleet(
    cluster: Cluster, view: View, gpus: Sequence[GpuFacts], lease_ms: int | None
) -> None:
    view.title("Starting one coordinator and three agents")
    cluster.start_coordinator(**({} if lease_ms is None else {"lease_ms": lease_ms}))
    view.text(f"  coordinator on {cluster.address}, its state in SQLite")
    if not gpus:
        view.text("  no GPU here: agents read a stand-in for NVML, training runs on the CPU")
    elif len(gpus) < len(NODES):
        view.text(f"  {len(gpus)} GPU here for three nodes: they share it")
    for index, node in enumerate(NODES):
        if gpus:
            dealt = gpus[index :: len(NODES)] or gpus[index % len(gpus) :][:1]
            cluster.start_agent(node, None, gpus=[gpu.uuid for gpu in dealt], warm_start=True)
            names = ", ".join(gpu.name for gpu in dealt)
        else:
            fake: tuple[FakeGpu, ...] = FAKE_GPUS[node](1, node=node)
            cluster.start_agent(node, fake, warm_start=True)
            names = f"{fake[0].name} (stand-in)"
        view.text(f"  agent {node}: {names}")
    cluster.wait_for_nodes(*NODES)


def _submit(cluster: Cluster, view: View, trainer: str, config: str) -> int:
    arguments = ["submit", "--gpus", "1", "--trainer", trainer, "--config", f".demo/{config}"]
    view.command(" ".join(["baton", *arguments]))
    submission = cluster.baton_json(*arguments, directory=ROOT)
    view.text(f"  job {submission['job_id']} submitted")
    return int(submission["job_id"])


# --- watching -------------------------------------------------------------------------------------


def _look(cluster: Cluster, view: View, watched: Watched) -> bool:
    """One look at the fleet: show it, kill the node when it is time; whether both jobs ended."""
    nodes = _nodes(cluster)
    for node in nodes:
        if node.phase != "up" or node.id in watched.said:
            tail = f": {node.reason}" if node.reason else ""
            _say_once(view, watched, node.id, f"{node.id} is {node.phase}{tail}")
    jobs = [cluster.job(watched.job_id), cluster.job(watched.other_id)]
    lost = [node.id for node in nodes if node.phase == "lost"]
    rows = [_row(job, lost) for job in jobs]
    for job, row in zip(jobs, rows, strict=True):
        _say_changes(view, watched, job, row)
    finetune, row = jobs[0], rows[0]
    if finetune.HasField("checkpoint") and finetune.checkpoint.digest not in watched.committed:
        watched.committed.append(finetune.checkpoint.digest)
    if not watched.killed_node or finetune.epoch == 1:
        watched.last_step_before_kill = max(watched.last_step_before_kill, row.step)
    view.show(rows, nodes)
    if not watched.killed_node and _is_time(watched, row):
        watched.killed_node = row.node
        watched.killed_s = time.time()
        count = cluster.kill_node(row.node)
        view.happened(KILL_LINE.format(node=row.node, count=count), style="bold red")
    return all(row.phase in _ENDED for row in rows)


def _is_time(watched: Watched, row: JobRow) -> bool:
    enough = len(watched.committed) >= KILL_CHECKPOINTS_MIN
    return enough and row.phase == "active" and row.step >= KILL_RATIO * row.total_steps > 0


def _say_changes(view: View, watched: Watched, job: types_pb2.Job, row: JobRow) -> None:
    """A line for each thing that is new about a job."""
    if row.phase == "active":
        attempt = job.attempts[-1]
        unreachable = attempt.phase == types_pb2.ATTEMPT_PHASE_UNREACHABLE
        started = attempt.HasField("start_time")
        now = f"waits: {attempt.reason}" if unreachable else f"starts on {row.node}"
        if started and not unreachable:
            restored = attempt.HasField("restored_step")
            whence = f"from step {attempt.restored_step}" if restored else "from the beginning"
            now = f"runs on {row.node}, {whence}"
        if attempt.epoch > 1:
            now = f"attempt {attempt.id} {now}"
    else:
        now = f"{row.phase}: {job.reason}" if job.reason else row.phase
    _say_once(view, watched, f"{row.id}", f"job {row.id} {row.name} {now}")
    if row.replicas:
        copies = " and ".join(row.replicas)
        _say_once(view, watched, f"{row.id} at", f"job {row.id} is safe on {copies}")


def _say_once(view: View, watched: Watched, about: str, line: str) -> None:
    if watched.said.get(about) != line:
        watched.said[about] = line
        view.happened(line)


def _row(job: types_pb2.Job, lost: Sequence[str]) -> JobRow:
    """Copies on `lost` nodes are known, and of no use before these return."""
    progress = job.progress if job.HasField("progress") else None
    loss = progress.metrics.get("loss") if progress else None
    return JobRow(
        id=job.id,
        name=job.spec.name or job.spec.trainer,
        phase=_word(_JOB_PHASES[job.phase], "JOB_PHASE_"),
        node=job.attempts[-1].node if job.attempts else "-",
        step=progress.step if progress else -1,
        total_steps=progress.total_steps if progress else 0,
        loss=loss,
        checkpoint_step=job.checkpoint.step,
        replicas=tuple(node for node in job.checkpoint.replicas if node not in lost),
    )


def _nodes(cluster: Cluster) -> list[NodeRow]:
    listed = cluster.nodes.ListNodes(nodes_pb2.ListNodesRequest()).nodes
    return [
        NodeRow(
            node.id,
            ", ".join(gpu.name for gpu in node.gpus),
            _word(_NODE_PHASES[node.phase], "NODE_PHASE_"),
            node.reason,
            tuple(node.attempts),
        )
        for node in listed
    ]


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


# --- around it ------------------------------------------------------------------------------------


def _conclude(cluster: Cluster, watched: Watched) -> demo_report.Summary:
    for job_id in (watched.job_id, watched.other_id):
        job = cluster.job(job_id)
        if job.phase != types_pb2.JOB_PHASE_SUCCEEDED:
            raise ClusterError(f"job {job_id} did not succeed: {job.reason}")
    if not watched.killed_node:
        raise ClusterError("the job ended before its node could die; give it more --steps")
    events: list[dict[str, Any]] = cluster.baton_json("events", str(watched.job_id))
    moments = demo_report.timeline(events, watched.killed_s, watched.killed_node)
    job = cluster.job(watched.job_id)
    outcomes = [
        demo_report.read_outcome(cluster.baton("logs", str(job_id)).stdout)
        for job_id in (watched.job_id, watched.other_id)
    ]
    return demo_report.Summary(
        killed_node=watched.killed_node,
        resumed_on=job.attempts[-1].node,
        moments=tuple(moments),
        phases=tuple(demo_report.phases(moments)),
        last_step_before_kill=watched.last_step_before_kill,
        restored_step=job.attempts[-1].restored_step,
        total_steps=job.progress.total_steps,
        finetune=outcomes[0],
        transfer=outcomes[1],
    )


def _helper(cluster: Cluster, view: View, module: str, *arguments: str) -> None:
    """Run one of the trainers' own commands, and show what it says."""
    errors = cluster.log_path(module)
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=cluster.helper_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; the cluster ends it
        )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            view.text(f"  {line.rstrip()}".replace(f"{ROOT}/", ""))
    if process.wait() != 0:
        last = errors.read_text("utf-8", "replace").strip().splitlines()[-1:]
        raise ClusterError(f"python -m {module} failed: {' '.join(last)}")


def _finetune_config(steps: int | None, *, on_gpu: bool) -> str:
    """The prepared configuration's name, or that of one beside it with other figures."""
    if steps is None and not on_gpu:
        return "finetune.json"
    values = json.loads((DATA / "finetune.json").read_text("utf-8"))
    values["steps"] = steps or GPU_STEPS
    if on_gpu:
        values["checkpoint_every_s"] = GPU_CHECKPOINT_EVERY_S
    name = f"finetune-{values['steps']}.json"
    (DATA / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    return name


def _real_gpus(directory: Path) -> Sequence[GpuFacts]:
    with NvmlProbe(directory) as probe:
        return probe.gpu_facts()


def sweep() -> None:
    """Remove what demos that were killed have left: their state, and half-made folders."""
    if not DATA.is_dir():
        return
    for path in (*DATA.glob("run-*"), *DATA.glob(".*")):
        number = path.name.replace("run-", ".").rpartition(".")[2]
        if not number.isdigit() or Path(f"/proc/{number}").exists():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sentence(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        return f"the coordinator did not answer: {error.details()}"
    return str(error)
