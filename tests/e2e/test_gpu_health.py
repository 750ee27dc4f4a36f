"""Errors of GPUs under jobs that train: the jobs go on elsewhere, and people see why."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import FakeGpu, describe, h100, with_details

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-gpu-health")]

LINE = "4,1,1000000,-;NVRM: Xid (PCI:0000:01:00): {}\n"


def gpu_of(fleet: Cluster, name: str) -> dict[str, Any]:
    """A node's only GPU, as people see it."""
    found: dict[str, Any] = next(
        node["gpus"][0] for node in fleet.baton_json("nodes") if node["id"] == name
    )
    return found


def start(fleet: Cluster, logs: Path) -> dict[str, Path]:
    """Two nodes with a GPU and a log of the kernel each."""
    logs.mkdir()
    paths = {name: logs / name for name in ("n1", "n2")}
    fleet.start_coordinator()
    for name, path in paths.items():
        path.write_text("")
        fleet.start_agent(name, h100(1, node=name), kernel_log=str(path))
    fleet.wait_for_nodes(*paths)
    return paths


def say(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(LINE.format(text))


def put(fleet: Cluster, name: str, gpu: FakeGpu) -> None:
    describe([gpu], fleet.node_directory(name).with_suffix(".gpus"))


@pytest.mark.parametrize(
    ("message", "verdict", "reason"),
    [
        ("95, pid=7, name=python, Uncontained ECC error", "needs_reset", "xid 95"),
        ("79, pid=7, name=python, GPU has fallen off the bus.", "lost", "xid 79"),
    ],
)
def test_a_job_leaves_a_gpu_with_an_error(
    message: str, verdict: str, reason: str, tmp_path: Path, gate: Gate
) -> None:
    with Cluster(tmp_path / "cluster") as fleet:
        logs = start(fleet, tmp_path / "logs")
        gate.open_to(2)
        job_id = work.submit(fleet, gate.job(steps=6, every=2), gpus=1)
        job = work.wait_committed(fleet, job_id, 2)
        here = job.attempts[-1].node
        (there,) = [name for name in logs if name != here]

        say(logs[here], message)
        fleet.wait_until(
            lambda: (gpu_of(fleet, here)["health"] or {}).get("verdict") == verdict,
            work.DEADLINE_S,
            f"{here} says {verdict}",
        )
        gpu = gpu_of(fleet, here)
        assert reason in gpu["health"]["reason"]
        assert gpu["health"]["xids"][0]["count"] == 1
        assert gpu["cordon"].endswith(": cordoned")
        moved = work.wait_running(fleet, job_id, epoch=2)
        assert moved.node == there
        gate.open_to(6)
        work.wait_succeeded(fleet, job_id)
        steps = [line["step"] for line in work.lines(fleet, job_id) if "step" in line]
        assert max(steps) == 6

        table = fleet.baton("nodes").stdout
        assert "cordoned" in table
        # Somebody resets it: the energy counter begins anew.
        put(fleet, here, with_details(h100(1, node=here)[0], recovery_action=0))
        fleet.wait_until(
            lambda: gpu_of(fleet, here)["cordon"] == "", work.DEADLINE_S, f"{here} is open again"
        )


def test_a_gpu_falls_off_the_bus_while_its_job_trains(tmp_path: Path, gate: Gate) -> None:
    """NVML alone says so."""
    with Cluster(tmp_path / "cluster") as fleet:
        logs = start(fleet, tmp_path / "logs")
        gate.open_to(2)
        job_id = work.submit(fleet, gate.job(steps=4, every=2), gpus=1)
        here = work.wait_committed(fleet, job_id, 2).attempts[-1].node
        put(fleet, here, replace(h100(1, node=here)[0], state="lost", xids=((1, 79),)))
        moved = work.wait_running(fleet, job_id, epoch=2)
        assert moved.node != here
        assert moved.node in logs
        lost = work.node(fleet, here).gpus[0]
        assert lost.health.verdict == types_pb2.GPU_VERDICT_LOST
        gate.open_to(4)
        work.wait_succeeded(fleet, job_id)
