"""Jobs that share the GPU of a node: they run at once, and who does not fit waits for its turn."""

from pathlib import Path

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-shares")]

GIB = 2**30


def wait_reason(fleet: Cluster, job_id: int, words: str) -> str:
    """The sentence with which it waits, as soon as it has these words."""
    job = work.wait_job(
        fleet,
        job_id,
        lambda job: job.phase == types_pb2.JOB_PHASE_QUEUED and words in job.reason,
        f"job {job_id} waits: {words}",
    )
    return job.reason


def test_two_jobs_share_a_gpu_and_others_wait(tmp_path: Path, gate: Gate) -> None:
    """The stand-in has 80 GiB, of which 72 may be shared."""
    with Cluster(tmp_path / "cluster") as fleet:
        fleet.start_coordinator()
        fleet.start_agent("n1", h100(1, node="n1"))
        fleet.wait_for_nodes("n1")
        command = gate.job(steps=4, every=2)
        gate.open_to(2)
        sharing = [
            work.submit(fleet, command, gpus=1, shared_gpu_memory_bytes=30 * GIB) for _ in range(2)
        ]
        for job_id in sharing:
            work.wait_committed(fleet, job_id, 2)
        (gpu,) = work.node(fleet, "n1").gpus
        assert [share.attempt for share in gpu.shares] == [f"{job_id}.1" for job_id in sharing]
        assert "2 jobs share 60 GiB" in fleet.baton("nodes").stdout

        third = work.submit(fleet, command, gpus=1, shared_gpu_memory_bytes=20 * GIB)
        sentence = wait_reason(fleet, third, "the most that is left of one is")
        assert "on n1 beside 2 jobs (8 at most)" in sentence
        whole = work.submit(fleet, command, gpus=1)
        assert "the only one that fits is taken" in wait_reason(fleet, whole, "needs 1 GPU")

        gate.open_to(4)
        for job_id in [*sharing, third, whole]:
            work.wait_succeeded(fleet, job_id)
        (gpu,) = work.node(fleet, "n1").gpus
        assert (gpu.phase, list(gpu.shares)) == (types_pb2.GPU_PHASE_FREE, [])


def test_a_whole_job_waits_until_the_last_sharer_has_left(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster") as fleet:
        fleet.start_coordinator()
        fleet.start_agent("n1", h100(1, node="n1"))
        fleet.wait_for_nodes("n1")
        gates = [Gate(tmp_path / f"gate{number}", 2) for number in range(2)]
        sharing = [
            work.submit(fleet, gate.job(steps=4, every=2), gpus=1, shared_gpu_memory_bytes=GIB)
            for gate in gates
        ]
        for job_id in sharing:
            work.wait_committed(fleet, job_id, 2)
        whole = work.submit(fleet, ["true"], gpus=1)
        gates[0].open_to(4)
        work.wait_succeeded(fleet, sharing[0])
        assert fleet.job(whole).phase == types_pb2.JOB_PHASE_QUEUED
        (gpu,) = work.node(fleet, "n1").gpus
        assert [share.attempt for share in gpu.shares] == [f"{sharing[1]}.1"]
        gates[1].open_to(4)
        work.wait_succeeded(fleet, sharing[1])
        work.wait_succeeded(fleet, whole)
