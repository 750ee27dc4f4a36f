"""A driver that blocks, under an agent with a job: both go on, and the GPUs say what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import describe, h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-sick-driver")]

PATIENT = {"closed_grace_ms": 60_000}
BLOCKED = [replace(gpu, state="hangs") for gpu in h100(2)]


def unknown_gpus(fleet: Cluster) -> bool:
    """No GPU has a value, and each says why."""
    read = [gpu.telemetry for gpu in work.node(fleet, "n1").gpus]
    return len(read) == len(BLOCKED) and all(
        "is unknown" in telemetry.error and not telemetry.HasField("power_mw") for telemetry in read
    )


def test_a_blocked_driver_costs_readings_and_nothing_else(tmp_path: Path, gate: Gate) -> None:
    """Also when the agent starts anew: a job keeps its GPU though nobody can ask for it."""
    with Cluster(tmp_path / "cluster") as fleet:
        fleet.start_coordinator(**PATIENT)
        fleet.start_agent("n1", h100(2))
        fleet.wait_for_nodes("n1")
        gate.open_to(2)
        job_id = work.submit(fleet, gate.job(steps=6, every=2), gpus=1)
        work.wait_committed(fleet, job_id, 2)

        describe(BLOCKED, fleet.node_directory("n1").with_suffix(".gpus"))
        fleet.wait_until(lambda: unknown_gpus(fleet), work.DEADLINE_S, "GPUs are unknown")
        gate.open_to(4)
        work.wait_committed(fleet, job_id, 4)

        fleet.stop_agent("n1")
        fleet.start_agent("n1", BLOCKED)
        fleet.wait_for_nodes("n1")
        phases = [gpu.phase for gpu in work.node(fleet, "n1").gpus]
        assert sorted(phases) == [types_pb2.GPU_PHASE_FREE, types_pb2.GPU_PHASE_HELD]
        gate.open_to(6)
        job = work.wait_succeeded(fleet, job_id)
        assert job.epoch == 1
        assert len(work.events_named(work.lines(fleet, job_id), "started")) == 1
