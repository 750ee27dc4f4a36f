"""A drain of a job with a large frozen part, to a node that has nothing of it: what does not change
travels while it trains, and once; so do the parts of a job of several ranks."""

import itertools
import sys
from pathlib import Path

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-precopy")]

FROZEN_MB = 100  # a second over the network that an agent believes in before it has timed one
FROZEN_BYTES = FROZEN_MB * 1_000_000
HEARD_STEPS = 100
NO_PRECOPY = "gang.no_precopy"


def fleet(cluster: Cluster, *nodes: str) -> None:
    cluster.start_coordinator()
    for name in nodes:
        cluster.start_agent(name, h100(1, node=name))
    cluster.wait_for_nodes(*nodes)


def submit(cluster: Cluster, witness: Path, *more: str, ranks: int = 1) -> int:
    words = [sys.executable, str(work.TRAINERS / "backbone.py"), "--witness", str(witness)]
    words += ["--frozen-mb", str(FROZEN_MB), *more]
    return work.submit(cluster, words, gpus=1, ranks=ranks)


def drained(cluster: Cluster, job_id: int) -> types_pb2.Attempt:
    """Drain its node; the attempt that follows, once it runs."""
    first = cluster.job(job_id).attempts[0].node
    assert cluster.baton("drain", first).returncode == 0
    return work.wait_running(cluster, job_id, 2)


def steps_of(witness: Path) -> list[tuple[int, int]]:
    """Steps with their epochs, in the order in which they were taken."""
    rows = [line.split() for line in witness.read_text("ascii").splitlines()]
    return [(int(step), int(epoch)) for step, epoch, _ in rows]


def wait_steps(cluster: Cluster, witness: Path, step: int) -> None:
    cluster.wait_until(
        lambda: witness.exists() and any(taken >= step for taken, _ in steps_of(witness)),
        work.DEADLINE_S,
        f"step {step}",
    )


def transferred(cluster: Cluster, node: str, direction: str) -> list[int]:
    """The bytes of each checkpoint that this node has moved so, in their order."""
    return [
        line["size_bytes"]
        for line in cluster.log_lines(node)
        if line["event"] == "checkpoint.transferred" and line["direction"] == direction
    ]


def wait_heard(cluster: Cluster, job_id: int, step: int = HEARD_STEPS) -> list[types_pb2.Attempt]:
    """The ranks, once heartbeats have told of so many steps of the slowest: two seconds of them, so
    each agent has said what its rank would gain by a checkpoint ahead of its stop. A step that a
    trainer has taken its agent may not have heard of, nor that the trainer looks for requests."""

    def heard(job: types_pb2.Job) -> bool:
        return job.progress.step >= step

    return list(work.wait_job(cluster, job_id, heard, "heard of some steps").attempts)


def test_what_is_frozen_travels_before_the_stop_and_once(cluster: Cluster, tmp_path: Path) -> None:
    fleet(cluster, "n1", "n2")
    witness = tmp_path / "steps"
    job_id = submit(cluster, witness)
    wait_heard(cluster, job_id, 5)
    sentence = cluster.baton("explain", str(job_id)).stdout
    assert "if n1 dies it continues on n2, where its checkpoints go" in sentence
    again = drained(cluster, job_id)
    assert again.node == "n2"
    wait_steps(cluster, witness, again.restored_step + 1)
    assert cluster.baton("cancel", str(job_id)).returncode == 0
    reason = work.wait_log(cluster, "n1", "attempt.precopy")["reason"]
    assert "can go to n2 before the stop" in reason
    # It trained on after the request, and lost nothing by the stop.
    found = work.lines(cluster, job_id)
    asked, told, left = (
        next(line["step"] for line in found if line["event"] == event)
        for event in ("asked", "told", "left")
    )
    assert asked < told == left == again.restored_step
    taken = [step for step, _ in steps_of(witness)]
    assert taken == list(range(1, len(taken) + 1)), "a step was lost, or done twice"
    # The frozen part went once, though two checkpoints did; and the new node had nothing to fetch.
    first_bytes, *rest_bytes = transferred(cluster, "n1", "push")
    assert first_bytes > FROZEN_BYTES
    assert sum(rest_bytes) < FROZEN_BYTES / 100
    assert transferred(cluster, "n2", "fetch") == []


def test_a_gang_sends_what_is_frozen_ahead_and_stops_together(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Each rank its own part, from its own node, to the one that is free."""
    fleet(cluster, "n1", "n2", "n3")
    witness = tmp_path / "steps"
    job_id = submit(cluster, witness, ranks=2)
    before = {attempt.node for attempt in wait_heard(cluster, job_id)}
    (free,) = {"n1", "n2", "n3"} - before
    left = drained(cluster, job_id).restored_step
    wait_steps(cluster, witness, left + 1)
    moved = [attempt for attempt in cluster.job(job_id).attempts if attempt.epoch == 2]
    assert [attempt.restored_step for attempt in moved] == [left, left]
    assert free in {attempt.node for attempt in moved}
    assert cluster.baton("cancel", str(job_id)).returncode == 0
    assert not [line for line in cluster.log_lines("coordinator") if line["event"] == NO_PRECOPY]
    # All trained on after the request, saved at one step, and left after another one.
    asked: list[int] = []
    for rank in range(2):
        found = work.lines(cluster, job_id, rank)[:6]
        events = [line["event"] for line in found]
        assert events == ["began", "asked", "saved", "told", "saved", "left"]
        asked.append(found[1]["step"])
        assert asked[rank] < found[3]["step"] == found[5]["step"] == left
    assert asked[0] == asked[1]
    taken = [step for step, _ in steps_of(witness)]
    assert taken == list(range(1, len(taken) + 1)), "a step was lost, or done twice"
    # Each frozen part went once, though two checkpoints did.
    for node in before:
        reason = work.wait_log(cluster, node, "attempt.precopy")["reason"]
        assert reason == "all ranks do, and stop together"
        first_bytes, *rest_bytes = transferred(cluster, node, "push")
        assert first_bytes >= FROZEN_BYTES  # the heads are equal: who comes second has it there
        assert sum(rest_bytes) < FROZEN_BYTES / 100
    # And the restore fetched no frozen part: each lies where its rank goes on, and nowhere else.
    for attempt in moved:
        assert sum(transferred(cluster, attempt.node, "fetch")) < FROZEN_BYTES / 100
    gone = min(before - {attempt.node for attempt in moved})
    (stayed,) = before - {gone}
    drained_rank = next(one.rank for one in cluster.job(job_id).attempts if one.node == gone)
    assert {attempt.rank: attempt.node for attempt in moved} == {
        drained_rank: free,
        1 - drained_rank: stayed,
    }


def test_a_plain_trainer_is_asked_to_stop_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """One that never looks for a request to save; the same bytes follow after the stop."""
    fleet(cluster, "n1", "n2")
    witness = tmp_path / "steps"
    job_id = submit(cluster, witness, "--plain")
    wait_steps(cluster, witness, 5)
    again = drained(cluster, job_id)
    assert again.node == "n2"
    reason = work.wait_log(cluster, "n1", "attempt.no_precopy")["reason"]
    assert reason == "its trainer does not look for a request to save"
    assert cluster.baton("cancel", str(job_id)).returncode == 0
    epochs = [epoch for _, epoch in steps_of(witness)]
    assert all(now <= later for now, later in itertools.pairwise(epochs))
    told = [line["step"] for line in work.lines(cluster, job_id) if line["event"] == "told"]
    assert told[0] == again.restored_step


def test_a_command_without_the_sdk_is_drained_as_before(cluster: Cluster) -> None:
    fleet(cluster, "n1", "n2")
    job_id = work.submit(cluster, ["sleep", "600"], gpus=1)
    first = work.wait_running(cluster, job_id)
    assert first.node == "n1"
    assert drained(cluster, job_id).node == "n2"
    assert cluster.job(job_id).attempts[0].signal == 15
    assert cluster.baton("cancel", str(job_id)).returncode == 0
