"""A built-in trainer that loses its node in the middle ends where it would have ended anyway.

Two jobs of the same configuration train side by side, and one loses its node with its disk. Its
loss curve, put together from both attempts, its evaluations and its last metric must be those of
the undisturbed one, to the last bit (one thread, on the CPU). The nodes but the first fork their
trainers from a warm process, which must not show in a single bit either.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from agent.processes import proc
from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-exact-resume")]

NODES = ("n1", "n2", "n3")
STEPS, EVERY = 400, 40
MIDDLE = 210  # both wait there, until one of them has lost its node
LOOP = {
    "steps": STEPS,
    "log_every": 1,
    "evaluate_every": 100,
    "checkpoint_every_steps": EVERY,
    "checkpoint_every_s": 0,
    "warmup_steps": 20,
}
JOBS: dict[str, dict[str, Any]] = {
    "finetune": {
        "model": "language",
        "train_data": "text.txt",
        "tokenizer": "bytes",
        "window_tokens": 32,
        "batch_size": 4,
    },
    "transfer": {
        "model": "vision",
        "train_data": "images.npz",
        "evaluation_data": "images.npz",
        "head_hidden": 16,
        "freeze": False,
        "batch_size": 4,
    },
}


def submit(cluster: Cluster, trainer: str, models: Path, gate: Gate) -> int:
    """With one GPU each, no two of them are on one node."""
    return work.submit(
        cluster,
        (),
        trainer=trainer,
        trainer_config_json=json.dumps({**LOOP, **JOBS[trainer]}),
        working_directory=str(models),
        gpus=1,
        environment=gate.environment(),
    )


def curve(lines: list[dict[str, Any]], event: str) -> dict[int, dict[str, Any]]:
    """By step what was said, but for how long it waited; what was said twice must be the same, bit
    for bit."""
    found: dict[int, dict[str, Any]] = {}
    for said in work.events_named(lines, event):
        line = {name: value for name, value in said.items() if name != "input_wait_ms"}
        assert found.setdefault(line["step"], line) == line
    return found


def is_forked(cluster: Cluster, attempt: types_pb2.Attempt) -> bool:
    """The supervisor of a forked trainer was forked from the same process, with torch in it."""
    mark = f"{cluster.node_directory(attempt.node)}/workspaces/{attempt.id}/".encode()
    (shim_pid,) = [
        process.parent_pid
        for process in proc.all_processes()
        if mark in (words := proc.read_bytes(process.pid, "cmdline")) and b"trainers." in words
    ]
    return b"/libtorch" in proc.read_bytes(shim_pid, "maps")


@pytest.mark.parametrize("trainer", list(JOBS))
def test_lost_node_changes_nothing_in_the_result(
    cluster: Cluster, models: Path, gate: Gate, tmp_path: Path, trainer: str
) -> None:
    cluster.start_coordinator(closed_grace_ms=500)
    for name in NODES:
        gpus, warm_start = h100(1, node=name), name != NODES[0]
        cluster.start_agent(name, gpus, warm_start=warm_start, trainer_environment=work.GATES)
    cluster.wait_for_nodes(*NODES)
    for name in NODES[1:]:
        work.wait_log(cluster, name, "fork_server.ready", server="warm")
    gate.open_to(MIDDLE)
    whole_id, moved_id = (submit(cluster, trainer, models, gate) for _ in range(2))
    said = tmp_path / "followed"
    with work.following(cluster, moved_id, said):

        def half_way(job: types_pb2.Job) -> bool:
            kept = job.checkpoint.step if job.HasField("checkpoint") else 0
            return kept >= EVERY and job.progress.step == MIDDLE

        undisturbed_job, job = (
            work.wait_job(cluster, job_id, half_way, "half way") for job_id in (whole_id, moved_id)
        )
        for attempt in (undisturbed_job.attempts[0], job.attempts[0]):
            assert is_forked(cluster, attempt) == (attempt.node != NODES[0])
        cluster.wait_until(
            lambda: f'"step": {MIDDLE - 1},' in said.read_text("utf-8"),
            work.DEADLINE_S,
            "the follower has read what will be lost",
        )
        cluster.kill_node(job.attempts[0].node)
        gate.open_to(STEPS)
        moved = work.wait_succeeded(cluster, moved_id)
        whole = work.wait_succeeded(cluster, whole_id)
        cluster.wait_until(
            lambda: '"event": "finished"' in said.read_text("utf-8"),
            work.DEADLINE_S,
            "the follower has read all of it",
        )
    assert (whole.epoch, moved.epoch) == (1, 2)
    restored_step = moved.attempts[1].restored_step
    assert EVERY <= restored_step < MIDDLE
    undisturbed = work.lines(cluster, whole_id)
    handed_over = work.parsed(said.read_text("utf-8"))
    begins = work.events_named(handed_over, "started")
    assert [line["step"] for line in begins] == [0, restored_step]
    losses = curve(undisturbed, "step")
    assert list(losses) == [*range(1, STEPS + 1)]
    assert curve(handed_over, "step") == losses
    assert curve(handed_over, "evaluated") == curve(undisturbed, "evaluated")
    assert handed_over[-1] == undisturbed[-1]
    assert handed_over[-1]["event"] == "finished"
    assert losses[STEPS]["loss"] != losses[1]["loss"]
