"""A drain of a job with a large frozen part, to a node that has nothing of it: what does not change
travels while it trains, and once."""

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


def fleet(cluster: Cluster, *nodes: str) -> None:
    cluster.start_coordinator()
    for name in nodes:
        cluster.start_agent(name, h100(1, node=name))
    cluster.wait_for_nodes(*nodes)


def submit(cluster: Cluster, witness: Path, *more: str) -> int:
    words = [sys.executable, str(work.TRAINERS / "backbone.py"), "--witness", str(witness)]
    words += ["--frozen-mb", str(FROZEN_MB), *more]
    return work.submit(cluster, words, gpus=1)


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


def test_what_is_frozen_travels_before_the_stop_and_once(cluster: Cluster, tmp_path: Path) -> None:
    fleet(cluster, "n1", "n2")
    witness = tmp_path / "steps"
    job_id = submit(cluster, witness)
    wait_steps(cluster, witness, 5)
    sentence = cluster.baton("explain", str(job_id)).stdout
    assert "if n1 dies it goes on on n2, where its checkpoints go" in sentence
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
    sent = [line for line in cluster.log_lines("n1") if line["event"] == "checkpoint.transferred"]
    sizes = [line["size_bytes"] for line in sent if line["direction"] == "push"]
    assert sizes[0] > FROZEN_BYTES
    assert sum(sizes[1:]) < FROZEN_BYTES / 100
    got = [line for line in cluster.log_lines("n2") if line["event"] == "checkpoint.transferred"]
    assert all(line["direction"] != "fetch" for line in got)


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
