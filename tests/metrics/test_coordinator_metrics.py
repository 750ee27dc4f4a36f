"""What a coordinator's state becomes: counted by what it is, zeros where nothing is."""

from dataclasses import replace

from coordinator.core.census import GPU_TYPES_MAX, OTHER_TYPES, census
from coordinator.core.messages import Submit
from coordinator.core.model import (
    Attempt,
    Checkpoint,
    GpuCordon,
    GpuFacts,
    HostFacts,
    Job,
    JobClass,
    JobSpec,
    Node,
    Snapshot,
)
from coordinator.core.phases import AttemptPhase, GpuPhase, JobPhase, NodeIntent
from coordinator.core.state import Options, State
from coordinator.exposition import exposed
from coordinator.metrics import figures
from tests.core.coordinator_harness import GIGABYTE
from tests.core.test_gpu_health import Fleet
from tests.metrics.reading import Series, named, series
from tests.metrics.views import GIB, coordinator_lag, coordinator_view

SPEC = JobSpec(command=("true",), job_class=JobClass.SPARE)
JOBS = (
    Job(1, SPEC, JobPhase.QUEUED, 1_000, queued_unix_ms=5_000),
    Job(2, SPEC, JobPhase.QUEUED, 4_000),
    Job(3, replace(SPEC, job_class=JobClass.GUARANTEED), JobPhase.ACTIVE, 1_000, head="ab"),
    Job(4, SPEC, JobPhase.SUCCEEDED, 1_000, ended_unix_ms=2_000),
)
NODES = (
    Node("n1", "j1", "", HostFacts(), (GpuFacts("GPU-1", "H100", 80 * GIB),), NodeIntent.DRAINING),
    Node("n2", "j2", "", HostFacts(), (GpuFacts("GPU-2", "A100", 40 * GIB),)),
)
ATTEMPTS = (
    Attempt(3, 1, "n1", ("GPU-1",), AttemptPhase.LOST, 1),
    Attempt(3, 2, "n2", ("GPU-2",), AttemptPhase.RUNNING, 2),
)
SNAPSHOT = Snapshot(
    7, 4, JOBS, ATTEMPTS, (Checkpoint(3, "ab", "", 1, 10, GIB, ("n2",), 1_500),), NODES
)


def said(snapshot: Snapshot, unix_ms: int = 10_000, store_bytes: int | None = 4_096) -> Series:
    view = coordinator_view(snapshot, unix_ms)
    return series(exposed(lambda: figures(view, coordinator_lag(), store_bytes)).decode())


def test_the_fleet_is_counted_by_what_it_is() -> None:
    found = said(SNAPSHOT)
    jobs = {labels: count for labels, count in named(found, "baton_jobs").items() if count}
    assert jobs == {
        ("guaranteed", "active"): 1,
        ("spare", "queued"): 2,
        ("spare", "succeeded"): 1,
    }
    assert named(found, "baton_queue_length") == {
        ("guaranteed",): 0,
        ("standard",): 0,
        ("spare",): 2,
    }
    attempts = {labels: count for labels, count in named(found, "baton_attempts").items() if count}
    assert attempts == {("lost",): 1, ("running",): 1}
    nodes = {labels: count for labels, count in named(found, "baton_nodes").items() if count}
    assert nodes == {("draining", "suspect"): 1, ("open", "suspect"): 1}
    gpus = {labels: count for labels, count in named(found, "baton_gpus").items() if count}
    assert gpus == {("absent", "A100"): 1, ("absent", "H100"): 1}
    assert named(found, "baton_gpus_ill") == {("cordoned",): 0, ("unread",): 0, ("held_back",): 0}
    assert named(found, "baton_checkpoints") == {(): 1}
    assert named(found, "baton_sessions") == {(): 0}
    assert named(found, "baton_sessions_in_line") == {(): 0}
    assert named(found, "baton_coordinator_waits_told_total") == {(): 0}
    assert named(found, "baton_coordinator_leader_epoch") == {(): 7}
    assert named(found, "baton_coordinator_store_size_bytes") == {(): 4_096}
    assert named(found, "baton_coordinator_inbox_length") == {(): 3}
    assert named(found, "baton_coordinator_requests_waiting") == {(): 2}


def test_every_phase_is_there_with_a_zero() -> None:
    found = said(Snapshot())
    assert set(named(found, "baton_jobs").values()) == {0}
    assert len(named(found, "baton_jobs")) == len(JobClass) * len(JobPhase)
    assert set(named(found, "baton_attempts")) == {(phase.value,) for phase in AttemptPhase}


def test_gpus_that_are_closed_for_their_health_are_counted() -> None:
    gpus = tuple(GpuFacts(f"GPU-{n}", "A100", GIB) for n in range(3))
    ill = replace(NODES[0], gpus=gpus, gpu_cordons=(GpuCordon("GPU-1", "gpu GPU-1 is lost", 0),))
    away = replace(NODES[1], gpus=gpus, closed_for="gpu GPU-0 needs a reboot: node cordoned")
    found = named(said(Snapshot(nodes=(ill, away))), "baton_gpus_ill")
    assert found == {("cordoned",): 4, ("unread",): 0, ("held_back",): 0}


def test_what_is_not_known_is_left_out() -> None:
    found = said(Snapshot(), store_bytes=None)
    assert named(found, "baton_queue_wait_seconds") == {}
    assert named(found, "baton_coordinator_store_size_bytes") == {}
    assert named(found, "baton_gpus") == {}


def test_the_longest_wait_is_since_a_job_was_queued_last() -> None:
    assert named(said(SNAPSHOT), "baton_queue_wait_seconds") == {(): 6.0}
    assert named(said(SNAPSHOT, unix_ms=0), "baton_queue_wait_seconds") == {(): 0.0}


def test_types_of_gpus_are_bounded() -> None:
    gpus = tuple(GpuFacts(f"GPU-{n}", f"type {n:03}", GIB) for n in range(GPU_TYPES_MAX + 5))
    state = State(Options())
    state.load(Snapshot(nodes=(replace(NODES[0], gpus=gpus),)), 0)
    counted = dict(census(state, 0).gpus)
    assert len({name for name, _ in counted}) == GPU_TYPES_MAX + 1
    assert counted[OTHER_TYPES, GpuPhase.ABSENT] == 5
    assert sum(counted.values()) == GPU_TYPES_MAX + 5


def test_shares_and_the_line_are_counted() -> None:
    """Two jobs on one GPU beside one that has its GPU alone, and an agent too many."""
    fleet = Fleet({"n1": 2, "n2": 1})
    for share_bytes in (GIGABYTE, 2 * GIGABYTE, 0):
        fleet.ask(Submit(JobSpec(command=("train",), gpus=1, shared_gpu_memory_bytes=share_bytes)))
    state = fleet.rig.core.state
    counted = census(state, 0)
    assert (counted.shares.count, counted.shares.total_bytes) == (2, 3 * GIGABYTE)
    assert counted.shares.gpus == 1
    assert counted.in_line == 0
    state.options = Options(hellos_per_s=1)
    state.admission.free_us = (fleet.rig.now_ms + 5_000) * 1_000
    fleet.hello("n2")
    assert census(state, 0).in_line == 1
