"""Where the time of a real training went, when its trainer dies, and when its node does.

The parts must add up, and what must have happened must show: steps done twice, a checkpoint loaded,
a wait in the queue, and a silence until a dead node was noticed. How long each took is nobody's
business here: this is no benchmark.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-goodput")]

NODES = ("n1", "n2")
STEPS, EVERY = 300, 100
MIDDLE = 150  # it waits there for what befalls it
PARTS = tuple(
    field.name
    for field in types_pb2.Accounting.DESCRIPTOR.fields
    if field.name.endswith("_seconds") and field.name != "wall_seconds"
)
CONFIG = {
    "model": "language",
    "train_data": "text.txt",
    "tokenizer": "bytes",
    "window_tokens": 32,
    "batch_size": 4,
    "steps": STEPS,
    "evaluate_every": 150,
    "checkpoint_every_steps": EVERY,
    "checkpoint_every_s": 0,
    "warmup_steps": 20,
}


def kill_trainer(cluster: Cluster, job: types_pb2.Job) -> None:
    """SIGKILL to the training process alone."""
    started = [event for event in cluster.events(job.id) if event.name == "attempt.started"]
    found = re.match(r"process (\d+) ", started[-1].message)
    assert found is not None
    work.end_process(int(found.group(1)))


def kill_node(cluster: Cluster, job: types_pb2.Job) -> None:
    """SIGKILL to everything on the node, and its disk is gone."""
    cluster.kill_node(job.attempts[0].node)


@pytest.mark.parametrize("kill", [kill_trainer, kill_node])
def test_every_second_of_a_job_has_a_name(
    cluster: Cluster, models: Path, gate: Gate, kill: Callable[[Cluster, types_pb2.Job], None]
) -> None:
    cluster.start_coordinator(closed_grace_ms=500)
    for name in NODES:
        cluster.start_agent(name, h100(1, node=name), trainer_environment=work.GATES)
    cluster.wait_for_nodes(*NODES)
    gate.open_to(MIDDLE)
    job_id = work.submit(
        cluster, (), trainer="finetune", trainer_config_json=json.dumps(CONFIG),
        working_directory=str(models), gpus=1, environment=gate.environment(),
    )  # fmt: skip

    def past_a_checkpoint(job: types_pb2.Job) -> bool:
        kept = job.HasField("checkpoint") and job.checkpoint.step == EVERY
        return kept and job.progress.step == MIDDLE

    job = work.wait_job(cluster, job_id, past_a_checkpoint, "past a checkpoint")
    adds_up(job)
    kill(cluster, job)
    gate.open_to(STEPS)
    job = work.wait_succeeded(cluster, job_id)
    adds_up(job)
    first, second = (attempt.accounting for attempt in job.attempts)
    assert first.productive_seconds > 0
    assert (first.recompute_seconds, first.schedule_seconds) == (0, 0)
    assert second.restore_seconds > 0
    assert second.capture_seconds > 0
    assert job.accounting.measured
    if kill is kill_node:
        assert first.detect_seconds > 0
        assert second.recompute_seconds > 0  # after the trainer's own death its last capture counts
    # All of it is written down: a coordinator that is restarted tells the same.
    cluster.kill_coordinator()
    cluster.start_coordinator()
    work.wait_for_coordinator(cluster)
    assert cluster.job(job_id).accounting == job.accounting
    shown = cluster.baton("job", str(job_id)).stdout
    ratio = job.accounting.productive_seconds / job.accounting.wall_seconds
    assert f"goodput {ratio:.1%} of " in shown
    # What is nothing has no line: a trainer that died right after its capture lost no step.
    assert ("  r  recompute " in shown) == (job.accounting.recompute_seconds > 0)
    document = cluster.baton_json("job", str(job_id))["accounting"]
    assert document["recompute_seconds"] == job.accounting.recompute_seconds


def adds_up(job: types_pb2.Job) -> None:
    """Within a hundredth, nothing negative, and the job is the sum of its attempts."""
    accounts = [attempt.accounting for attempt in job.attempts]
    for account in (*accounts, job.accounting):
        parts = [getattr(account, name) for name in PARTS]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(account.wall_seconds, rel=0.01)
    whole_s = sum(account.wall_seconds for account in accounts)
    assert job.accounting.wall_seconds == pytest.approx(whole_s)
    newest = job.attempts[-1]
    if newest.HasField("end_time"):
        ran_s = (newest.end_time.ToDatetime() - newest.assign_time.ToDatetime()).total_seconds()
        known_s = newest.accounting.wall_seconds - newest.accounting.schedule_seconds
        assert known_s == pytest.approx(ran_s, rel=0.01)
