"""A checkpoint that kills whoever resumes from it is stepped over; a program that dies anyway is
held, with a sentence."""

import sys
from pathlib import Path

import pytest

from protos.baton.v1 import jobs_pb2, types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-poison")]

STEPS, BAD = 8, 4


def began(cluster: Cluster, marker: Path, *words: str) -> int:
    """The job of a poisoned training, on one node."""
    cluster.start_coordinator()
    cluster.start_agent("n1")
    cluster.wait_for_nodes("n1")
    command = [sys.executable, str(work.TRAINERS / "poisoned.py"), "--marker", str(marker)]
    command += ["--steps", str(STEPS), "--bad", str(BAD), *words]
    return work.submit(cluster, command)


def test_a_poisoned_checkpoint_is_stepped_over(cluster: Cluster, tmp_path: Path) -> None:
    job_id = began(cluster, tmp_path / "marker")
    job = work.wait_succeeded(cluster, job_id)
    # The one that made it, two that were restored from it, and one from the checkpoint before.
    restored = [attempt.restored_step for attempt in job.attempts]
    assert restored == [0, BAD, BAD, BAD - 1]
    assert job.checkpoint.step == STEPS
    (said,) = [e.message for e in cluster.events(job_id) if e.name == "checkpoint.set_aside"]
    failed = f"2 attempts from it failed at step {BAD + 2}"
    assert f"(step {BAD}) is set aside, since {failed}" in said
    assert work.wait_log(cluster, "coordinator", "checkpoint.set_aside", reason=said)


def test_a_program_that_dies_from_any_checkpoint_is_held(cluster: Cluster, tmp_path: Path) -> None:
    job_id = began(cluster, tmp_path / "marker", "--always")
    job = work.wait_phase(cluster, job_id, types_pb2.JOB_PHASE_HELD)
    sentence = cluster.baton("explain", str(job_id)).stdout
    assert f"job {job_id} is held: quarantined: exit status 1 at step {BAD + 2}" in sentence
    for part in (f"(step {BAD}) twice", f"(step {BAD - 1}) once", f"`baton logs {job_id}`"):
        assert part in sentence
    assert "quarantined" in [name.rpartition(".")[2] for name in work.history(cluster, job_id)]
    assert job.checkpoint.step == BAD
    assert f"the state of step {BAD + 2} is bad" in work.output(cluster, job_id)
    request = jobs_pb2.RequeueJobRequest(job_id=job_id)
    assert cluster.jobs.RequeueJob(request).job.phase != types_pb2.JOB_PHASE_HELD
    again = work.wait_running(cluster, job_id, len(job.attempts) + 1)
    assert again.restored_step == BAD
