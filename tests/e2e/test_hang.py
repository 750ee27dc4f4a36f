"""A trainer that hangs is found, says where it hangs, and goes on from its checkpoint."""

import sys

import pytest

from tests.e2e import work
from tests.e2e.cluster import ROOT, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-hang")]

# The first attempt takes as many as an agent learns from (8), the second fewer.
SAVED, STEPS = 3, 10


def test_a_hung_trainer_is_dumped_and_handed_off(cluster: Cluster) -> None:
    cluster.start_coordinator()
    # What it learns of steps of 20 ms lies far below.
    cluster.start_agent("n1", hang_floor_ms=1_000)
    cluster.wait_for_nodes("n1")
    command = [sys.executable, "-m", "tests.e2e.trainers.hanging"]
    command += ["--steps", str(STEPS), "--saved", str(SAVED)]
    job_id = work.submit(cluster, command, working_directory=str(ROOT))
    job = work.wait_succeeded(cluster, job_id)
    hung, resumed = job.attempts
    assert (hung.restored_step, resumed.restored_step) == (0, SAVED)
    assert "hung in step for" in hung.reason
    assert "stacks are in its log" in hung.reason
    shown = cluster.baton("logs", str(job_id)).stdout
    assert "in waits_for_a_peer_that_never_speaks" in shown
    assert "Thread 0x" in shown
    said = work.wait_log(cluster, "n1", "attempt.hung", attempt=f"{job_id}.1", section="step")
    assert said["seconds"] > said["limit_seconds"] >= 1.0
    found = work.lines(cluster, job_id)
    steps = [line["step"] for line in found if line["event"] in ("started", "finished")]
    assert steps == [0, SAVED, STEPS]
