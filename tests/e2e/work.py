"""What the end-to-end tests do with a cluster: submit jobs, wait for what becomes of them, read
what they wrote.

Problem: a test of real processes is either a race or a wait for a condition. Everything here waits
for a condition, ends at a deadline, and says what it saw instead; a job that ends when it should
not ends the wait at once, with the job's own sentence and output.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from agent.processes.shim import stat_fields
from protos.baton.v1 import jobs_pb2, nodes_pb2, types_pb2
from tests.e2e.cluster import Cluster, ClusterError
from tests.e2e.trainers import counting

TRAINERS = Path(counting.__file__).parent
# A node's `trainer_environment`, where built-in trainers are to heed gates as `counting.py` does.
GATES = {"PYTHONPATH": str(TRAINERS / "gated")}
# Between a cause and what must follow it on a busy two-core machine: a lease, a restart of Python,
# a start of a trainer. Far above what it takes, so that only a hang meets it.
DEADLINE_S = 120.0
# For what a job itself does, which may be a training that imports torch first: on the slowest
# machine so far one that takes half a minute elsewhere was not done after two.
JOB_DEADLINE_S = 300.0
Follower = subprocess.Popen[str]
ENDED = (
    types_pb2.JOB_PHASE_SUCCEEDED,
    types_pb2.JOB_PHASE_FAILED,
    types_pb2.JOB_PHASE_CANCELLED,
)


class Gate:
    """A file that says how far a job may go."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.open_to(step)

    def open_to(self, step: int) -> None:
        """Let it go on to this step; a reader never sees half a number."""
        scratch = self.path.with_suffix(".new")
        scratch.write_text(str(step), "ascii")
        os.replace(scratch, self.path)

    def job(self, *, steps: int, every: int = 1, ballast_bytes: int = 1000) -> list[str]:
        """The command of a counting job behind this gate."""
        words = [sys.executable, TRAINERS / "counting.py", "--gate", self.path]
        words += ["--steps", steps, "--every", every, "--ballast-bytes", ballast_bytes]
        return [str(word) for word in words]

    def environment(self) -> dict[str, str]:
        """For a built-in trainer behind this gate, on a node with `GATES`."""
        return {"GATE": str(self.path)}


def submit(cluster: Cluster, command: Sequence[str], **fields: Any) -> int:
    """Submit it; returns the job's id once it is durable."""
    spec = types_pb2.JobSpec(command=command, **fields)
    request = jobs_pb2.SubmitRequest(request_id=uuid.uuid4().hex, spec=spec)
    return cluster.jobs.Submit(request).job_id


def wait_job(
    cluster: Cluster,
    job_id: int,
    wanted: Callable[[types_pb2.Job], bool],
    what: str,
    *,
    deadline_s: float = JOB_DEADLINE_S,
) -> types_pb2.Job:
    """The job as soon as it is as wanted. Raises `ClusterError` when it ends otherwise."""

    def look() -> types_pb2.Job | None:
        job = cluster.job(job_id)
        if wanted(job):
            return job
        if job.phase in ENDED:
            name = types_pb2.JobPhase.Name(job.phase)
            raise ClusterError(f"not {what}: {name}, {job.reason}\n{output(cluster, job_id)}")
        return None

    return cluster.wait_until(look, deadline_s, f"job {job_id}: {what}")


def wait_committed(cluster: Cluster, job_id: int, step: int) -> types_pb2.Job:
    """Until the checkpoint of this step, or a later one, is committed."""

    def wanted(job: types_pb2.Job) -> bool:
        return job.HasField("checkpoint") and job.checkpoint.step >= step

    return wait_job(cluster, job_id, wanted, f"committed step {step}")


def wait_running(cluster: Cluster, job_id: int, epoch: int = 1) -> types_pb2.Attempt:
    """Until the attempt of this epoch, the job's newest, runs."""

    def wanted(job: types_pb2.Job) -> bool:
        return bool(job.attempts) and _running(job.attempts[-1], epoch)

    return wait_job(cluster, job_id, wanted, f"attempt {epoch} running").attempts[-1]


def _running(attempt: types_pb2.Attempt, epoch: int) -> bool:
    return attempt.epoch == epoch and attempt.phase == types_pb2.ATTEMPT_PHASE_RUNNING


def wait_phase(cluster: Cluster, job_id: int, phase: types_pb2.JobPhase.ValueType) -> types_pb2.Job:
    """Until the job is in this phase."""
    name = types_pb2.JobPhase.Name(phase)
    return wait_job(cluster, job_id, lambda job: job.phase == phase, name)


def wait_succeeded(cluster: Cluster, job_id: int) -> types_pb2.Job:
    """Until it has finished well."""
    return wait_phase(cluster, job_id, types_pb2.JOB_PHASE_SUCCEEDED)


def wait_output(
    cluster: Cluster, job_id: int, wanted: Callable[[list[dict[str, Any]]], bool], what: str
) -> list[dict[str, Any]]:
    """Until the lines that the job wrote are as wanted."""

    def look() -> list[dict[str, Any]]:
        found = lines(cluster, job_id)
        return found if wanted(found) else []

    return cluster.wait_until(look, JOB_DEADLINE_S, f"job {job_id} wrote {what}")


def wait_pid(cluster: Cluster, job_id: int) -> int:
    """The process that a counting job began in. Its output goes through its supervisor, and a
    commit may be there before it."""
    found = wait_output(cluster, job_id, lambda it: bool(events_named(it, "started")), "its start")
    pid: int = events_named(found, "started")[0]["pid"]
    return pid


def wait_step(cluster: Cluster, job_id: int, step: int) -> list[dict[str, Any]]:
    """Until a counting job has said that it did this step."""

    def wanted(found: list[dict[str, Any]]) -> bool:
        return any(line["event"] == "step" and line["step"] == step for line in found)

    return wait_output(cluster, job_id, wanted, f"step {step}")


def wait_for_coordinator(cluster: Cluster) -> None:
    """Until our own channel has found a restarted coordinator."""

    def look() -> bool:
        with contextlib.suppress(grpc.RpcError):
            cluster.nodes.ListNodes(nodes_pb2.ListNodesRequest())
            return True
        return False

    cluster.wait_until(look, DEADLINE_S, "the coordinator answers")


def wait_log(cluster: Cluster, name: str, event: str, **fields: object) -> dict[str, Any]:
    """Until a program has logged this event with these fields."""

    def look() -> dict[str, Any] | None:
        for line in cluster.log_lines(name):
            if line.get("event") == event and fields.items() <= line.items():
                return line
        return None

    return cluster.wait_until(look, DEADLINE_S, f"{name} logged {event} {fields}")


def output(cluster: Cluster, job_id: int, rank: int = 0) -> str:
    """What this rank of the job wrote so far, over all its attempts."""
    call = cluster.jobs.StreamLogs(jobs_pb2.StreamLogsRequest(job_id=job_id, rank=rank))
    return b"".join(part.data for part in call).decode("utf-8", "replace")


@contextlib.contextmanager
def following(cluster: Cluster, job_id: int, path: Path | None = None) -> Iterator[Follower]:
    """`baton logs -f JOB`, for as long as the block; to a file, or to a pipe for the test."""
    command = [sys.executable, "-P", "-m", "coordinator.cli", "logs", "-f", str(job_id)]
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(path.open("w")) if path is not None else subprocess.PIPE
        process = subprocess.Popen(
            command,
            cwd=cluster.directory,
            env={**cluster.helper_environment(), "BATON_COORDINATOR": cluster.address},
            stdout=target,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        yield process


def lines(cluster: Cluster, job_id: int, rank: int = 0) -> list[dict[str, Any]]:
    """The same, for jobs that write JSON lines; others' lines are left out."""
    return parsed(output(cluster, job_id, rank))


def parsed(text: str) -> list[dict[str, Any]]:
    """The JSON lines in a job's output, without a last one that is not finished yet."""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


def events_named(found: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """The lines with this event."""
    return [line for line in found if line["event"] == event]


def history(cluster: Cluster, job_id: int) -> list[str]:
    """The names of the job's events, oldest first."""
    events = cluster.events(job_id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return [event.name for event in events]


def node(cluster: Cluster, name: str) -> types_pb2.Node:
    """A node as it is now."""
    listed = cluster.nodes.ListNodes(nodes_pb2.ListNodesRequest()).nodes
    return next(item for item in listed if item.id == name)


def gpus_free(cluster: Cluster, name: str) -> bool:
    """Whether nothing holds any GPU of this node."""
    return all(gpu.phase == types_pb2.GPU_PHASE_FREE for gpu in node(cluster, name).gpus)


def wait_gone(cluster: Cluster, pid: int) -> None:
    """Until no process has this number."""
    cluster.wait_until(lambda: not lives(pid), DEADLINE_S, f"process {pid} is gone")


def lives(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    fields = stat_fields(pid)
    return bool(fields) and fields[0] != b"Z"


def found_below(place: Path) -> list[Path]:
    """What lies there, of what its owner may be tidying away meanwhile: `rglob` would stumble."""
    return [Path(at, name) for at, inner, files in os.walk(place) for name in (*inner, *files)]


def contents_below(place: Path) -> Iterator[tuple[Path, bytes]]:
    """The files there, with what is in them; not those that are gone before they are read."""
    for path in found_below(place):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            yield path, path.read_bytes()


def end_process(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)
