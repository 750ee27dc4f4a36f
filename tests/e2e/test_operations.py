"""What owners of jobs and operators of nodes do: drain, uncordon, preempt, hold, release, requeue,
and ask why a job waits. A stop is asked for and confirmed: nothing starts in a job's place before
its checkpoint is committed.
"""

import re
from collections.abc import Iterator

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import chain
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-operations")]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator and two agents with one GPU each; every test leaves all GPUs free."""
    with Cluster(tmp_path_factory.mktemp("operations") / "cluster") as made:
        made.start_coordinator()
        for name in ("n1", "n2"):
            made.start_agent(name, h100(1, node=name))
        made.wait_for_nodes("n1", "n2")
        yield made


def run(fleet: Cluster, *words: object) -> str:
    """A command that must succeed; what it said."""
    done = fleet.baton(*(str(word) for word in words))
    assert done.returncode == 0, done.stderr
    return done.stdout


def began(fleet: Cluster, gate: Gate, **fields: object) -> types_pb2.Job:
    """A job of 6 steps at step 3, of which step 2 is committed."""
    gate.open_to(3)
    job_id = work.submit(fleet, gate.job(steps=6, every=2), gpus=1, **fields)
    work.wait_step(fleet, job_id, 3)
    return work.wait_committed(fleet, job_id, 2)


def finished_without_repeating(fleet: Cluster, gate: Gate, job_id: int) -> types_pb2.Job:
    """It was stopped with a checkpoint of its own, so no step was done twice."""
    gate.open_to(6)
    job = work.wait_succeeded(fleet, job_id)
    steps = [line["step"] for line in work.events_named(work.lines(fleet, job_id), "step")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert work.lines(fleet, job_id)[-1]["value"] == chain(6)
    return job


def test_drain_moves_a_job_by_handoff(fleet: Cluster, gate: Gate) -> None:
    job = began(fleet, gate)
    first = job.attempts[0].node
    run(fleet, "drain", first)
    again = work.wait_running(fleet, job.id, 2)
    assert (again.node != first, again.restored_step) == (True, 3)
    drained = types_pb2.NODE_INTENT_DRAINED
    fleet.wait_until(
        lambda: work.node(fleet, first).intent == drained, work.DEADLINE_S, f"{first} is drained"
    )
    # With one node closed and the other taken, the next one waits, and says for what.
    waiting_id = work.submit(fleet, ["true"], gpus=1)
    sentence = run(fleet, "explain", waiting_id)
    assert re.search(rf"job {waiting_id} waits: needs 1 GPU\b.*taken", sentence)
    assert fleet.job(waiting_id).phase == types_pb2.JOB_PHASE_QUEUED
    listed = fleet.baton_json("nodes")
    assert {node["id"]: node["intent"] for node in listed}[first] == "drained"
    run(fleet, "uncordon", first)
    assert work.wait_succeeded(fleet, waiting_id).attempts[0].node == first
    finished_without_repeating(fleet, gate, job.id)


def test_more_than_any_node_has_is_refused_with_numbers(fleet: Cluster) -> None:
    done = fleet.baton("submit", "--gpus", "2", "--", "true")
    assert done.returncode == 1
    assert "the most that any node has is 1" in done.stderr


def test_guaranteed_job_displaces_a_spare_one_after_its_commit(
    fleet: Cluster, gate: Gate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = began(fleet, gate, job_class=types_pb2.JOB_CLASS_SPARE)
    other_gate = Gate(tmp_path_factory.mktemp("other") / "gate")
    standard_id = work.submit(fleet, other_gate.job(steps=1), gpus=1)
    work.wait_running(fleet, standard_id)
    urgent = types_pb2.JOB_CLASS_GUARANTEED
    urgent_id = work.submit(fleet, other_gate.job(steps=1), gpus=1, job_class=urgent)
    assert work.wait_running(fleet, urgent_id).node == job.attempts[0].node
    assert work.wait_running(fleet, standard_id).epoch == 1  # the lowest class gives way
    log = [line for line in fleet.log_lines("coordinator") if line.get("job")]
    order = [
        (line["event"], line["job"])
        for line in log
        if (line["event"], line["job"], line.get("step", 3))
        in (("checkpoint.committed", job.id, 3), ("attempt.assigned", urgent_id, 3))
    ]
    assert order == [("checkpoint.committed", job.id), ("attempt.assigned", urgent_id)]
    assert f"guaranteed job {urgent_id}" in fleet.job(job.id).attempts[0].reason
    other_gate.open_to(1)
    work.wait_succeeded(fleet, urgent_id)
    work.wait_succeeded(fleet, standard_id)
    again = finished_without_repeating(fleet, gate, job.id).attempts[-1]
    assert again.restored_step == 3


def test_hold_checkpoints_and_release_resumes_there(fleet: Cluster, gate: Gate) -> None:
    job = began(fleet, gate)
    run(fleet, "hold", job.id)
    held = work.wait_phase(fleet, job.id, types_pb2.JOB_PHASE_HELD)
    assert held.checkpoint.step == 3
    assert "baton release" in run(fleet, "explain", job.id)
    run(fleet, "release", job.id)
    assert work.wait_running(fleet, job.id, 2).restored_step == 3
    finished_without_repeating(fleet, gate, job.id)


def test_requeue_checkpoints_and_starts_again(fleet: Cluster, gate: Gate) -> None:
    job = began(fleet, gate)
    run(fleet, "requeue", job.id)
    assert work.wait_running(fleet, job.id, 2).restored_step == 3
    finished_without_repeating(fleet, gate, job.id)
    # A finished job runs again from where it ended.
    run(fleet, "requeue", job.id)
    again = work.wait_job(fleet, job.id, lambda it: it.epoch == 3, "running again")
    assert again.checkpoint.step == 6
    assert work.wait_succeeded(fleet, job.id).attempts[-1].restored_step == 6


def test_held_submission_waits_for_its_release(fleet: Cluster) -> None:
    submitted = fleet.baton_json("submit", "--hold", "--", "true")
    job_id = submitted["job_id"]
    assert fleet.job(job_id).phase == types_pb2.JOB_PHASE_HELD
    assert fleet.baton("release", str(job_id)).returncode == 0
    work.wait_succeeded(fleet, job_id)
    refused = fleet.baton("release", str(job_id))
    assert refused.returncode == 1
    assert refused.stderr.strip()


def test_follow_shows_both_attempts_and_ends_with_the_job(fleet: Cluster) -> None:
    script = "echo this is attempt $BATON_EPOCH; [ $BATON_EPOCH = 2 ] || exit 75"
    done = fleet.baton("submit", "--follow", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "this is attempt 1\nthis is attempt 2\n"


def test_no_coordinator_is_exit_status_3(fleet: Cluster) -> None:
    done = fleet.baton("nodes", "--coordinator", "127.0.0.1:1")
    assert done.returncode == 3
    assert "127.0.0.1:1" in done.stderr
