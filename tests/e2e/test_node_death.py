"""What survives the death of a node: its jobs, from their last committed checkpoint, elsewhere.

A node dies with its disk (`kill_node`), or falls silent and returns (SIGSTOP to everything on it,
and SIGCONT): then it must find that its time is over, whatever it believes.
"""

import os
import signal
from pathlib import Path

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import guardian, work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import chain
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-node-death")]

# A node that dies closes its connections; one that is only slow is not lost.
HASTY = {"heartbeat_interval_ms": 500, "closed_grace_ms": 500}
# For who falls silent: long enough for the other on a busy machine, short enough to wait for.
SILENCE = {"heartbeat_interval_ms": 500, "lease_ms": 20_000}


def steps_in(text: str) -> list[int]:
    """The steps that a counting job's output tells of."""
    return [line["step"] for line in work.events_named(work.parsed(text), "step")]


def start(cluster: Cluster, *names: str, **config: object) -> None:
    """A coordinator that soon notices a death, and agents with one GPU each."""
    cluster.start_coordinator(**HASTY)
    add(cluster, *names, **config)


def add(cluster: Cluster, *names: str, **config: object) -> None:
    for name in names:
        cluster.start_agent(name, h100(1, node=name), **config)
    cluster.wait_for_nodes(*names)


def test_job_of_a_dead_node_goes_on_where_its_replica_lies(cluster: Cluster, gate: Gate) -> None:
    start(cluster, "n1", "n2", "n3")
    gate.open_to(5)
    job_id = work.submit(cluster, gate.job(steps=8, every=2), gpus=1)
    job = work.wait_committed(cluster, job_id, 4)
    first = job.attempts[0].node
    replica = next(name for name in job.checkpoint.replicas if name != first)
    with work.following(cluster, job_id) as reader:
        work.wait_step(cluster, job_id, 5)
        assert reader.stdout is not None
        seen = [reader.stdout.readline()]
        while '"step": 5' not in seen[-1]:
            seen.append(reader.stdout.readline())
        cluster.kill_node(first)
        again = work.wait_running(cluster, job_id, 2)
        assert (again.node, again.restored_step) == (replica, 4)
        gate.open_to(8)
        job = work.wait_succeeded(cluster, job_id)
        rest, remarks = reader.communicate(timeout=work.DEADLINE_S)
        assert reader.returncode == 0
    assert steps_in("".join(seen)) == [1, 2, 3, 4, 5]
    assert steps_in(rest) == [5, 6, 7, 8]
    assert f"{first} is lost, and the rest of the output of attempt {job_id}.1 with it" in remarks
    assert "ipv4" not in remarks
    assert job.attempts[0].phase == types_pb2.ATTEMPT_PHASE_LOST
    assert cluster.node_phases()[first] == types_pb2.NODE_PHASE_LOST
    # Afterwards: what is left, and a sentence in place of what is not.
    read = cluster.baton("logs", str(job_id))
    assert read.returncode == 0
    assert work.parsed(read.stdout)[-1]["value"] == chain(8)
    assert f"{first} is lost, and the output of attempt {job_id}.1 with it" in read.stderr
    names = work.history(cluster, job_id)
    assert names.count("attempt.assigned") == 2
    assert "attempt.unreachable" in names


def test_follower_of_a_restarting_agent_misses_nothing(cluster: Cluster, gate: Gate) -> None:
    # Nobody dies here.
    cluster.start_coordinator(heartbeat_interval_ms=100, closed_grace_ms=60_000)
    cluster.start_agent("n1", h100(1))
    cluster.wait_for_nodes("n1")
    gate.open_to(2)
    job_id = work.submit(cluster, gate.job(steps=4, every=1), gpus=1)
    with work.following(cluster, job_id) as reader:
        assert reader.stdout is not None
        while '"step": 2' not in reader.stdout.readline():
            continue
        cluster.stop_agent("n1")
        gate.open_to(3)
        assert reader.stderr is not None
        assert "n1 does not answer" in reader.stderr.readline()
        cluster.start_agent("n1", h100(1))
        gate.open_to(4)
        assert work.wait_succeeded(cluster, job_id).epoch == 1
        rest, remarks = reader.communicate(timeout=work.DEADLINE_S)
    assert steps_in(rest) == [3, 4], (rest, remarks)
    assert "lost" not in remarks


def signal_node(cluster: Cluster, name: str, number: signal.Signals) -> None:
    """The same signal to everything on a node."""
    for process in guardian.owned(cluster.runtime_directory / name, cluster.node_directory(name)):
        os.kill(process.pid, number)


def written_on(cluster: Cluster, name: str, attempt: str) -> str:
    """What an attempt has written, read from its node's disk while the agent cannot be asked."""
    directory = cluster.node_directory(name) / "attempts" / attempt
    return "".join(path.read_text("utf-8") for path in sorted(directory.glob("log/*.log")))


def test_returning_zombie_finds_its_time_over(cluster: Cluster, gate: Gate) -> None:
    cluster.start_coordinator(**SILENCE)
    add(cluster, "n1", "n2")
    gate.open_to(3)
    job_id = work.submit(cluster, gate.job(steps=8, every=2), gpus=1)
    first = work.wait_committed(cluster, job_id, 2).attempts[0].node
    other = {"n1": "n2", "n2": "n1"}[first]
    pid = work.wait_step(cluster, job_id, 3)[0]["pid"]
    # The agent stands still; its trainer saves step 4, which nobody takes; then all stands still.
    os.kill(cluster.pid(first), signal.SIGSTOP)
    gate.open_to(4)
    cluster.wait_until(
        lambda: '"checkpoint", "step": 4' in written_on(cluster, first, f"{job_id}.1"),
        work.DEADLINE_S,
        "the cut-off trainer saves step 4",
    )
    signal_node(cluster, first, signal.SIGSTOP)
    again = work.wait_running(cluster, job_id, 2)
    assert (again.node, again.restored_step) == (other, 2)
    gate.open_to(6)
    mine = work.wait_committed(cluster, job_id, 6).checkpoint
    assert mine.epoch == 2
    gate.open_to(7)
    signal_node(cluster, first, signal.SIGCONT)
    refused = work.wait_log(cluster, first, "checkpoint.refused", attempt=f"{job_id}.1")
    assert refused["reason"] == f"epoch 1 is stale; epoch 2 holds job {job_id}"
    work.wait_gone(cluster, pid)
    cluster.wait_for_nodes(first)
    cluster.wait_until(
        lambda: work.gpus_free(cluster, first), work.DEADLINE_S, f"the GPU of {first} is free"
    )
    assert cluster.job(job_id).checkpoint.digest == mine.digest
    gate.open_to(8)
    job = work.wait_succeeded(cluster, job_id)
    assert (job.epoch, job.checkpoint.epoch, job.checkpoint.step) == (2, 2, 8)
    assert work.lines(cluster, job_id)[-1]["value"] == chain(8)
    commits = [
        (line["attempt"], line["step"])
        for line in cluster.log_lines("coordinator")
        if line.get("event") == "checkpoint.committed"
    ]
    assert commits == [(f"{job_id}.1", 2), *((f"{job_id}.2", step) for step in (4, 6, 8))]
    assert work.history(cluster, job_id).count("job.succeeded") == 1


def test_a_shared_directory_outlives_every_node(
    cluster: Cluster, gate: Gate, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    start(cluster, "n1", "n2", shared_directory=str(shared))
    gate.open_to(3)
    job_id = work.submit(cluster, gate.job(steps=4, every=2), gpus=1)
    job = work.wait_committed(cluster, job_id, 2)
    first = job.attempts[0].node
    assert list(job.checkpoint.replicas) == [first, "shared"]
    other = {"n1": "n2", "n2": "n1"}[first]
    held = work.found_below(cluster.node_directory(other) / "chunks")
    assert not [path for path in held if path.suffix == ".json"]
    work.wait_step(cluster, job_id, 3)
    cluster.kill_node(first)
    again = work.wait_running(cluster, job_id, 2)
    assert (again.node, again.restored_step) == (other, 2)
    gate.open_to(4)
    assert list(work.wait_succeeded(cluster, job_id).checkpoint.replicas) == [other, "shared"]
    assert work.lines(cluster, job_id)[-1]["value"] == chain(4)


def test_required_replica_waits_for_a_second_node(cluster: Cluster, gate: Gate) -> None:
    start(cluster, "n1")
    gate.open_to(2)
    required = types_pb2.REPLICATION_REQUIRED
    command = gate.job(steps=4, every=2)
    job_id = work.submit(cluster, command, gpus=1, replication=required)
    work.wait_log(cluster, "n1", "checkpoint.stored", attempt=f"{job_id}.1", step=2)
    assert not cluster.job(job_id).HasField("checkpoint")
    cluster.start_agent("n2", h100(1, node="n2"))
    job = work.wait_committed(cluster, job_id, 2)
    assert list(job.checkpoint.replicas) == ["n1", "n2"]
    gate.open_to(4)
    work.wait_succeeded(cluster, job_id)


def test_node_and_coordinator_die_together(cluster: Cluster, gate: Gate) -> None:
    start(cluster, "n1", "n2")
    gate.open_to(3)
    job_id = work.submit(cluster, gate.job(steps=4, every=2), gpus=1)
    first = work.wait_committed(cluster, job_id, 2).attempts[0].node
    cluster.kill_coordinator()
    cluster.kill_node(first)
    cluster.start_coordinator(**HASTY, restart_grace_ms=8_000)
    work.wait_for_coordinator(cluster)
    again = work.wait_running(cluster, job_id, 2)
    assert (again.node != first, again.restored_step) == (True, 2)
    gate.open_to(4)
    work.wait_succeeded(cluster, job_id)
    assert work.lines(cluster, job_id)[-1]["value"] == chain(4)


def test_a_name_comes_back_with_an_empty_disk(cluster: Cluster, gate: Gate) -> None:
    start(cluster, "n1", "n2")
    gate.open_to(3)
    job_id = work.submit(cluster, gate.job(steps=4, every=2), gpus=1)
    first = work.wait_committed(cluster, job_id, 2).attempts[0].node
    cluster.kill_node(first)
    # At once, before its lease has ended: it remembers nothing, and nothing waits for it.
    cluster.start_agent(first, h100(1, node=first))
    again = work.wait_running(cluster, job_id, 2)
    assert again.restored_step == 2
    cluster.wait_for_nodes("n1", "n2")  # or the last checkpoint may find nobody to be copied to
    gate.open_to(4)
    job = work.wait_succeeded(cluster, job_id)
    assert work.lines(cluster, job_id)[-1]["value"] == chain(4)
    assert sorted(job.checkpoint.replicas) == ["n1", "n2"]
