"""Several ranks on several nodes, as real processes: together or not at all, and all of them again
from one checkpoint when one of them loses its node.

The undisturbed gang and the one that loses a node train the same thing, so their loss curves must
be the same to the last bit: the world has as many ranks before and after.
"""

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-gangs")]

STEPS, EVERY = 120, 10
CONFIG: dict[str, Any] = {
    "steps": STEPS,
    "log_every": 1,
    "evaluate_every": 40,
    "checkpoint_every_steps": EVERY,
    "checkpoint_every_s": 0,
    "warmup_steps": 20,
    "model": "language",
    "train_data": "text.txt",
    "tokenizer": "bytes",
    "window_tokens": 32,
    "batch_size": 6,
}


def start(
    cluster: Cluster, *nodes: str, closed_grace_ms: int = 500, warm_start: bool = False
) -> None:
    """One GPU each, so ranks of one gang are on different nodes. `warm_start`: where a node gets
    more than one of them, it imports once for all, and before the first."""
    cluster.start_coordinator(closed_grace_ms=closed_grace_ms)
    for name in nodes:
        cluster.start_agent(
            name,
            h100(1, node=name),
            warm_start=warm_start,
            trainer_environment=work.GATES,
        )
    cluster.wait_for_nodes(*nodes)
    if warm_start:
        for name in nodes:
            work.wait_log(cluster, name, "fork_server.ready", server="warm")


def submit(cluster: Cluster, models: Path, ranks: int, gate: Gate | None = None) -> int:
    """One that goes as far as the gate is open, if there is one."""
    return work.submit(
        cluster,
        (),
        trainer="finetune",
        trainer_config_json=json.dumps(CONFIG),
        working_directory=str(models),
        gpus=1,
        ranks=ranks,
        environment=gate.environment() if gate else {},
    )


def newest(job: types_pb2.Job) -> list[types_pb2.Attempt]:
    """The ranks of the newest try, in order."""
    return [attempt for attempt in job.attempts if attempt.epoch == job.epoch]


def running(cluster: Cluster, job_id: int, epoch: int, ranks: int) -> list[types_pb2.Attempt]:
    """All ranks of a try, once all of them run."""

    def wanted(job: types_pb2.Job) -> bool:
        phases = [attempt.phase for attempt in newest(job)]
        whole = job.epoch == epoch and len(phases) == ranks
        return whole and all(phase == types_pb2.ATTEMPT_PHASE_RUNNING for phase in phases)

    return newest(work.wait_job(cluster, job_id, wanted, f"{ranks} ranks of try {epoch} run"))


def losses(cluster: Cluster, job_id: int) -> dict[int, float]:
    """By step; a step that was done again must give the same loss, bit for bit."""
    found: dict[int, float] = {}
    for line in work.events_named(work.lines(cluster, job_id), "step"):
        assert found.setdefault(line["step"], line["loss"]) == line["loss"]
    return found


def test_a_gang_that_loses_a_node_ends_where_the_undisturbed_one_ends(
    cluster: Cluster, models: Path, gate: Gate
) -> None:
    """Of three ranks: several survive, and several parts are brought together again."""
    start(cluster, "n1", "n2", "n3", "n4", warm_start=True)
    whole_id = submit(cluster, models, 3)
    whole = work.wait_succeeded(cluster, whole_id)
    assert len({attempt.node for attempt in newest(whole)}) == 3

    gate.open_to(3 * EVERY + 5)
    moved_id = submit(cluster, models, 3, gate)
    first = running(cluster, moved_id, 1, 3)
    committed = work.wait_committed(cluster, moved_id, 3 * EVERY).checkpoint
    assert len(committed.parts) == 2
    victim = first[-1].node
    cluster.kill_node(victim)
    gate.open_to(STEPS)
    again = running(cluster, moved_id, 2, 3)
    assert victim not in {attempt.node for attempt in again}
    starts = {attempt.restored_step for attempt in again}
    assert len(starts) == 1
    assert min(starts) >= committed.step
    moved = work.wait_succeeded(cluster, moved_id)
    assert moved.epoch == 2
    assert moved.checkpoint.step == STEPS

    expected = losses(cluster, whole_id)
    assert list(expected) == [*range(1, STEPS + 1)]
    survived = losses(cluster, moved_id)
    if first[0].node != victim:  # else the log of the first try went with its disk
        assert survived == expected
    assert {step: expected[step] for step in survived} == survived
    assert expected[STEPS] < expected[1]


def test_ranks_wait_until_all_of_them_fit(cluster: Cluster, gate: Gate) -> None:
    start(cluster, "n1", "n2")
    blocker_id = work.submit(cluster, gate.job(steps=1), gpus=1)
    work.wait_running(cluster, blocker_id)
    gang_id = work.submit(cluster, ["true"], gpus=1, ranks=2)
    sentence = cluster.baton("explain", str(gang_id)).stdout
    assert "2 ranks" in sentence
    assert not cluster.job(gang_id).attempts
    gate.open_to(1)
    ended = work.wait_succeeded(cluster, gang_id)
    assert {attempt.node for attempt in ended.attempts} == {"n1", "n2"}
    assert [attempt.rank for attempt in ended.attempts] == [0, 1]
    refused = cluster.baton("submit", "--gpus", "1", "--ranks", "3", "--", "true")
    assert refused.returncode == 1
    assert "ranks" in refused.stderr


def test_the_end_of_one_rank_ends_all(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 1 fails; rank 0 would go on for ever."""
    start(cluster, "n1", "n2")
    script = f'if [ "$RANK" = 1 ]; then exit 3; fi; touch {tmp_path}/began; exec sleep 600'
    job_id = work.submit(cluster, ["sh", "-c", script], gpus=1, ranks=2, max_restarts=0)
    job = work.wait_phase(cluster, job_id, types_pb2.JOB_PHASE_FAILED)
    assert "3" in job.reason
    ended = {attempt.rank: attempt for attempt in newest(job)}
    assert ended[1].exit_code == 3
    assert ended[0].phase != types_pb2.ATTEMPT_PHASE_SUCCEEDED


def test_a_drain_moves_a_gang_without_losing_a_step(
    cluster: Cluster, models: Path, gate: Gate
) -> None:
    start(cluster, "n1", "n2", "n3")
    gate.open_to(EVERY + 5)
    job_id = submit(cluster, models, 2, gate)
    first = running(cluster, job_id, 1, 2)
    work.wait_committed(cluster, job_id, EVERY)
    done = cluster.baton("drain", first[0].node)
    assert done.returncode == 0, done.stderr
    again = running(cluster, job_id, 2, 2)
    gate.open_to(STEPS)
    assert first[0].node not in {attempt.node for attempt in again}
    job = work.wait_succeeded(cluster, job_id)
    steps = [line["step"] for line in work.events_named(work.lines(cluster, job_id), "step")]
    assert steps == [*range(1, STEPS + 1)]  # all stopped at one step, and saved it
    assert job.epoch == 2
    # Each rank went where its rows lie, so what followed the stop is what all ranks have the same.
    part_bytes = min(part.size_bytes for part in job.checkpoint.parts)
    for attempt in again:
        fetched_bytes = sum(
            line["size_bytes"]
            for line in cluster.log_lines(attempt.node)
            if line["event"] == "checkpoint.transferred" and line["direction"] == "fetch"
        )
        assert fetched_bytes < part_bytes / 5, (fetched_bytes, part_bytes)


def test_a_restarted_agent_and_coordinator_cost_a_gang_nothing(
    cluster: Cluster, models: Path, gate: Gate
) -> None:
    # What restarts is waited for: the coordinator may see the agent die before it dies itself.
    start(cluster, "n1", "n2", closed_grace_ms=60_000)
    gate.open_to(EVERY + 5)
    job_id = submit(cluster, models, 2, gate)
    running(cluster, job_id, 1, 2)
    work.wait_committed(cluster, job_id, EVERY)
    cluster.kill_agent("n2")
    cluster.kill_coordinator()
    cluster.start_coordinator(closed_grace_ms=60_000)
    cluster.start_agent("n2", h100(1, node="n2"))
    work.wait_for_coordinator(cluster)
    gate.open_to(STEPS)
    job = work.wait_succeeded(cluster, job_id)
    assert job.epoch == 1
    assert list(losses(cluster, job_id)) == [*range(1, STEPS + 1)]


def test_a_launcher_within_one_rank_keeps_checkpoints_and_goes_on_from_them(
    cluster: Cluster, models: Path, gate: Gate
) -> None:
    """To Baton it is one trainer. Its workers leave to be run again, since somebody has stopped one
    of them, and torchrun's status is 1, as of any failure; none is allowed."""
    start(cluster, "n1")
    (models / "launched.json").write_text(json.dumps({**CONFIG, "checkpoint_every_steps": EVERY}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    trainer = ["-m", "trainers.finetune", "--config", "launched.json"]
    gate.open_to(2 * EVERY + 5)
    job_id = work.submit(
        cluster,
        [sys.executable, *launcher, *trainer],
        working_directory=str(models),
        gpus=1,
        max_restarts=0,
        environment=gate.environment(),
    )
    committed = work.wait_committed(cluster, job_id, 2 * EVERY).checkpoint
    assert not committed.parts
    worker, _ = (
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if process.info["cwd"] == str(models)
        and process.info["cmdline"][-4:] == trainer
        and "torch.distributed.run" not in process.info["cmdline"]
    )
    worker.terminate()
    gate.open_to(STEPS)  # for the other one, which nobody has asked to stop
    job = work.wait_succeeded(cluster, job_id)
    assert job.checkpoint.step == STEPS
    first, again = job.attempts
    assert first.reason == "exit status 1, 75 below its launcher"
    assert again.restored_step >= committed.step
    resumed = work.events_named(work.lines(cluster, job_id), "resumed")
    assert [line["level"] for line in resumed] == ["E0"]
