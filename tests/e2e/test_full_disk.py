"""A full disk, as a small tmpfs, under the coordinator's store and under an agent's checkpoints.

Nothing may be promised that is not durable, nothing that was promised may be lost, training goes
on, and all is well again once there is room, without a restart.
"""

import ctypes
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from protos.baton.v1 import jobs_pb2, types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import chain
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-full-disk")]

MIB = 1 << 20
DETACH = 2  # MNT_DETACH, <sys/mount.h>: also while somebody still has a file open
FILL_STEP_BYTES = 4096


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of this size; the test is skipped where mounting is not permitted."""
    path.mkdir(parents=True, mode=0o700)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={size_bytes},mode=0700".encode()
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, options) != 0:
        pytest.skip(f"mount a tmpfs: {os.strerror(ctypes.get_errno())} (it needs root)")
    try:
        yield path
    finally:
        assert libc.umount2(os.fsencode(path), DETACH) == 0


def fill(disk: Path) -> Path:
    """Take every byte that is left; returns the file to remove."""
    path = disk / "filler"
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(FILL_STEP_BYTES))
        except OSError:
            return path


def wait_said(cluster: Cluster, job_id: int, rank: int, event: str, step: int) -> None:
    """Until this rank of a counting job has said so of this step."""

    def look() -> bool:
        found = work.events_named(work.lines(cluster, job_id, rank), event)
        return any(line["step"] == step for line in found)

    cluster.wait_until(look, work.DEADLINE_S, f"rank {rank} of job {job_id}: {event} {step}")


def request_of(request_id: str) -> jobs_pb2.SubmitRequest:
    """A job that never starts, with enough in it to need room."""
    spec = types_pb2.JobSpec(command=["true", "x" * 20_000], hold=True)
    return jobs_pb2.SubmitRequest(request_id=request_id, spec=spec)


def test_full_store_refuses_and_recovers(cluster: Cluster, tmp_path: Path) -> None:
    calls: dict[str, grpc.Future[jobs_pb2.SubmitResponse]] = {}

    def submit_until_refused() -> grpc.RpcError | None:
        """One more each time. The first that finds no room waits for some; the next are refused."""
        request_id = uuid.uuid4().hex
        calls[request_id] = cluster.jobs.Submit.future(request_of(request_id))
        ended = [call.exception() for call in calls.values() if call.done()]
        return next((error for error in ended if isinstance(error, grpc.RpcError)), None)

    with small_disk(tmp_path / "store", 8 * MIB) as disk:
        store_path = str(disk / "baton.sqlite3")
        cluster.start_coordinator(store_path=store_path)
        for _ in range(3):
            assert submit_until_refused() is None
        for call in calls.values():
            call.result(work.DEADLINE_S)
        filler = fill(disk)
        refusal = cluster.wait_until(submit_until_refused, work.DEADLINE_S, "a refusal")
        assert refusal.code() is grpc.StatusCode.UNAVAILABLE
        assert "full" in str(refusal.details())
        work.wait_log(cluster, "coordinator", "store.unavailable")
        filler.unlink()
        work.wait_log(cluster, "coordinator", "store.available")
        acknowledged = {
            request_id: call.result().job_id
            for request_id, call in calls.items()
            if call.exception(work.DEADLINE_S) is None
        }
        assert 0 < len(set(acknowledged.values())) == len(acknowledged) < len(calls)
        cluster.kill_coordinator()
        cluster.start_coordinator(store_path=store_path)
        work.wait_for_coordinator(cluster)
        # Said again, each is one job: the same one where it was acknowledged.
        repeated = {
            request_id: cluster.jobs.Submit(request_of(request_id)).job_id for request_id in calls
        }
        assert acknowledged.items() <= repeated.items()
        assert len(set(repeated.values())) == len(calls)
        cluster.stop()


def test_full_chunk_disk_costs_checkpoints_and_no_training(
    cluster: Cluster, gate: Gate, tmp_path: Path
) -> None:
    node = cluster.node_directory("n1")
    node.mkdir(parents=True, mode=0o700)
    with small_disk(node / "chunks", 16 * MIB) as disk:
        cluster.start_coordinator()
        cluster.start_agent("n1", h100(1))
        cluster.wait_for_nodes("n1")
        gate.open_to(1)
        command = gate.job(steps=4, every=1, ballast_bytes=2 * MIB)
        job_id = work.submit(cluster, command, gpus=1)
        work.wait_committed(cluster, job_id, 1)
        filler = fill(disk)
        gate.open_to(2)
        failed = work.wait_log(cluster, "n1", "checkpoint.failed", attempt=f"{job_id}.1")
        assert failed["reason"].startswith("disk full: ")
        found = work.wait_output(
            cluster, job_id, lambda it: bool(work.events_named(it, "refused")), "a refusal"
        )
        assert work.events_named(found, "refused")[0]["reason"].startswith("disk full: ")
        gate.open_to(3)
        work.wait_step(cluster, job_id, 3)
        assert cluster.job(job_id).checkpoint.step == 1
        filler.unlink()
        gate.open_to(4)
        work.wait_committed(cluster, job_id, 4)
        job = work.wait_succeeded(cluster, job_id)
        assert job.epoch == 1
        found = work.lines(cluster, job_id)
        assert len(work.events_named(found, "started")) == 1
        assert found[-1]["value"] == chain(4)
        cluster.stop()


def test_full_disk_under_one_rank_commits_nothing_and_ends_nothing(
    cluster: Cluster, gate: Gate, tmp_path: Path
) -> None:
    """The other rank has room and keeps its parts; without the missing one they are none."""
    full = cluster.node_directory("n2")
    full.mkdir(parents=True, mode=0o700)
    with small_disk(full / "chunks", 32 * MIB) as disk:
        cluster.start_coordinator()
        for name in ("n1", "n2"):
            cluster.start_agent(name, h100(1, node=name))
        cluster.wait_for_nodes("n1", "n2")
        gate.open_to(1)
        command = gate.job(steps=5, every=1, ballast_bytes=2 * MIB)
        job_id = work.submit(cluster, command, gpus=1, ranks=2)
        first = work.wait_committed(cluster, job_id, 1)
        assert [len(first.checkpoint.parts), first.epoch] == [1, 1]
        (rank,) = [attempt.rank for attempt in first.attempts if attempt.node == "n2"]
        filler = fill(disk)
        for step in (2, 3):
            gate.open_to(step)
            for each in (0, 1):  # both go on
                said = "refused" if each == rank else "checkpoint"
                wait_said(cluster, job_id, each, said, step)
        refused = work.events_named(work.lines(cluster, job_id, rank), "refused")
        assert [line["step"] for line in refused] == [2, 3]
        assert all(line["reason"].startswith("disk full: ") for line in refused)
        assert cluster.job(job_id).checkpoint.step == 1
        filler.unlink()
        gate.open_to(4)
        work.wait_committed(cluster, job_id, 4)
        gate.open_to(5)
        job = work.wait_succeeded(cluster, job_id)
        assert job.epoch == 1
        assert job.checkpoint.step == 5
        for each in (0, 1):
            found = work.lines(cluster, job_id, each)
            assert len(work.events_named(found, "started")) == 1
            assert found[-1]["value"] == chain(5)
            committed = [line["step"] for line in work.events_named(found, "committed")]
            assert committed[:2] == [1, 4]
        cluster.stop()


def test_full_state_disk_delays_and_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with small_disk(cluster.node_directory("n1"), 16 * MIB) as disk:
        cluster.start_coordinator()
        cluster.start_agent("n1", h100(1))
        cluster.wait_for_nodes("n1")
        release = tmp_path / "release"
        script = f"while [ ! -e {release} ]; do sleep 0.02; done; exit 3"
        job_id = work.submit(cluster, ["sh", "-c", script], gpus=1)
        work.wait_running(cluster, job_id)
        started = next(e for e in cluster.events(job_id) if e.name == "attempt.started")
        filler = fill(disk)
        release.touch()
        # It ends, and there is no room to write down how.
        work.wait_gone(cluster, int(started.message.split()[1]))
        assert cluster.job(job_id).phase == types_pb2.JOB_PHASE_ACTIVE
        filler.unlink()
        job = work.wait_phase(cluster, job_id, types_pb2.JOB_PHASE_FAILED)
        assert [attempt.exit_code for attempt in job.attempts] == [3]
        next_id = work.submit(cluster, ["echo", "room again"])
        work.wait_succeeded(cluster, next_id)
        assert work.output(cluster, next_id) == "room again\n"
        cluster.stop()
