"""Checkpoints that a disk has altered: a flipped byte, a truncated file.

What verifies nowhere is refused, aloud, and the checkpoint before it is used; what is good
somewhere is fetched from there and put right.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import ballast, chain
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-rot")]

BALLAST_BYTES = 50_000
NODES = ("n1", "n2", "n3")


def began(cluster: Cluster, gate: Gate, step: int) -> tuple[int, str, list[str]]:
    """A job with every step up to this one committed on two of three nodes: its id, its node and
    the one with the replica."""
    cluster.start_coordinator()
    for name in NODES:
        cluster.start_agent(name, h100(1, node=name))
    cluster.wait_for_nodes(*NODES)
    command = gate.job(steps=6, every=1, ballast_bytes=BALLAST_BYTES)
    job_id = work.submit(cluster, command, gpus=1)
    for number in range(1, step + 1):
        gate.open_to(number)
        job = work.wait_committed(cluster, job_id, number)
    replicas = list(job.checkpoint.replicas)
    assert len(replicas) == 2
    return job_id, job.attempts[0].node, replicas


def chunk_of(cluster: Cluster, node: str, step: int) -> Path:
    """Where a node keeps the ballast of this step's checkpoint."""
    data = ballast(step, BALLAST_BYTES)
    for path, found in work.contents_below(cluster.node_directory(node) / "chunks"):
        if found == data:
            return path
    raise AssertionError(f"{node} has no chunk of step {step}")


def flip(path: Path) -> None:
    """One bit of one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Half of it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def skipped_in_events(cluster: Cluster, job_id: int) -> list[str]:
    """What `baton events` says of checkpoints that were not used."""
    done = cluster.baton_json("events", str(job_id))
    return [event["message"] for event in done if event["name"] == "checkpoint.skipped"]


def test_altered_everywhere_falls_back_and_says_so(cluster: Cluster, gate: Gate) -> None:
    job_id, _, replicas = began(cluster, gate, 3)
    for name in replicas:
        flip(chunk_of(cluster, name, 3))
        truncate(chunk_of(cluster, name, 2))
    work.end_process(work.wait_pid(cluster, job_id))
    again = work.wait_running(cluster, job_id, 2)
    assert again.restored_step == 1
    logged = [
        line["reason"]
        for line in cluster.log_lines(again.node)
        if line["event"] == "checkpoint.skipped" and line["attempt"] == f"{job_id}.2"
    ]
    said = skipped_in_events(cluster, job_id)
    assert len(said) == len(logged) == 2
    for sentence, reason in zip(said, logged, strict=True):
        assert sentence.endswith(reason)
    assert "do not match their digest" in said[0]
    assert f"{BALLAST_BYTES} bytes expected, {BALLAST_BYTES // 2} found" in said[1]
    gate.open_to(6)
    work.wait_succeeded(cluster, job_id)
    found = work.lines(cluster, job_id)
    steps = [line["step"] for line in work.events_named(found, "step")]
    assert steps == [1, 2, 3, 2, 3, 4, 5, 6]
    assert found[-1]["value"] == chain(6)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_one_bad_copy_is_repaired_from_the_other(
    cluster: Cluster, gate: Gate, damage: Callable[[Path], None]
) -> None:
    job_id, first, replicas = began(cluster, gate, 2)
    new = next(name for name in replicas if name != first)
    third = next(name for name in NODES if name not in replicas)
    bad = chunk_of(cluster, new, 2)
    damage(bad)
    assert cluster.baton("cordon", third).returncode == 0
    assert cluster.baton("drain", first).returncode == 0
    again = work.wait_running(cluster, job_id, 2)
    assert (again.node, again.restored_step) == (new, 2)
    assert bad.read_bytes() == ballast(2, BALLAST_BYTES)
    assert not skipped_in_events(cluster, job_id)
    gate.open_to(6)
    work.wait_succeeded(cluster, job_id)
    assert work.lines(cluster, job_id)[-1]["value"] == chain(6)
