"""Captures in memory that outlives whoever dies: the trainer, or the agent."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import chain
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-capture")]


def started(cluster: Cluster) -> None:
    cluster.start_coordinator(closed_grace_ms=60_000)
    cluster.start_agent("n1", h100(1), trainer_environment=work.GATES)
    cluster.wait_for_nodes("n1")


def submit(cluster: Cluster, gate: Gate, steps: int, *more: object) -> int:
    words = [sys.executable, work.TRAINERS / "capturing.py", "--gate", gate.path, "--steps", steps]
    return work.submit(cluster, [str(word) for word in (*words, *more)], gpus=1)


def test_a_trainer_killed_right_after_a_capture_loses_nothing(cluster: Cluster, gate: Gate) -> None:
    """Nobody had heard of the capture: the agent finds it in the slab, before it tells the end."""
    started(cluster)
    job_id = submit(cluster, gate, 6, "--dies-after", 4)
    gate.open_to(3)
    work.wait_committed(cluster, job_id, 3)
    gate.open_to(6)
    job = work.wait_succeeded(cluster, job_id)
    assert job.attempts[0].signal == signal.SIGKILL
    assert job.attempts[1].restored_step == 4
    found = work.lines(cluster, job_id)
    assert [line["step"] for line in work.events_named(found, "step")] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["value"] == chain(6)
    assert work.wait_log(cluster, "n1", "checkpoint.rescued")["step"] == 4


def test_a_trainer_killed_from_outside_while_its_agent_is_busy_loses_nothing(
    cluster: Cluster, gate: Gate
) -> None:
    """The agent's process stands still while the last capture is taken and the trainer dies."""
    started(cluster)
    job_id = submit(cluster, gate, 9)
    gate.open_to(2)
    work.wait_committed(cluster, job_id, 2)
    pid = work.wait_pid(cluster, job_id)
    cluster.signal("n1", signal.SIGSTOP)
    gate.open_to(4)
    log = next(cluster.node_directory("n1").glob(f"attempts/{job_id}.1/**/*.log*"), None)
    assert log is not None, list(cluster.node_directory("n1").glob(f"attempts/{job_id}.1/**/*"))
    cluster.wait_until(
        lambda: b'"step": 4' in log.read_bytes(), work.DEADLINE_S, "step 4, with the agent stopped"
    )
    # Both slots are taken by then, or being written: what is whole is kept, whichever it is.
    os.kill(pid, signal.SIGKILL)
    cluster.signal("n1", signal.SIGCONT)
    gate.open_to(9)
    job = work.wait_succeeded(cluster, job_id)
    assert job.attempts[1].restored_step >= 3
    assert work.lines(cluster, job_id)[-1]["value"] == chain(9)


def test_the_slab_outlives_its_agent(cluster: Cluster, gate: Gate) -> None:
    started(cluster)
    job_id = submit(cluster, gate, 6)
    gate.open_to(2)
    work.wait_committed(cluster, job_id, 2)
    pid = work.wait_pid(cluster, job_id)
    cluster.kill_agent("n1")
    gate.open_to(3)  # a capture that no agent hears of
    cluster.start_agent("n1", h100(1))
    work.wait_committed(cluster, job_id, 3)
    assert work.lives(pid)
    gate.open_to(6)
    job = work.wait_succeeded(cluster, job_id)
    assert (job.epoch, job.checkpoint.step) == (1, 6)
    assert work.lines(cluster, job_id)[-1]["value"] == chain(6)


def test_a_built_in_trainer_captures_and_resumes_from_it(
    cluster: Cluster, models: Path, gate: Gate
) -> None:
    """Its process is killed; the next attempt reads what the agent made of the slab."""
    started(cluster)
    options = {
        "model": "vision",
        "train_data": "images.npz",
        "evaluation_data": "images.npz",
        "head_hidden": 16,
        "steps": 200,
        "evaluate_every": 200,
        "checkpoint_every_steps": 20,
    }
    gate.open_to(70)
    job_id = work.submit(
        cluster,
        (),
        trainer="transfer",
        trainer_config_json=json.dumps(options),
        working_directory=str(models),
        gpus=1,
        environment=gate.environment(),
    )
    work.wait_committed(cluster, job_id, 60)
    os.kill(work.wait_log(cluster, "n1", "attempt.started")["pid"], signal.SIGKILL)
    gate.open_to(200)
    job = work.wait_succeeded(cluster, job_id)
    found = work.lines(cluster, job_id)
    kept = work.events_named(found, "checkpoint")
    assert [line["captured"] for line in kept].count(True) >= 3
    assert job.attempts[1].restored_step >= 60
    later = [line["step"] for line in kept if line["step"] > job.attempts[1].restored_step]
    assert len(set(later)) == len(later), "nothing that was captured was lost"
