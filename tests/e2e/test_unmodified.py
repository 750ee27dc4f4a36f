"""Scripts that know nothing of Baton: a Hugging Face Trainer that loses its node goes on, a torn
checkpoint stops nobody, and every other program is left as it was.

What the interrupted training must equal is the same script run without Baton: every loss and the
final weights, to the last bit (one thread, on the CPU).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import scripts, work
from tests.e2e.cluster import TRAINER_VARIABLES, Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-unmodified")]

STEPS, EVERY = 12, 3
FILE = str(Path(scripts.__file__).parent / "hf_script.py")
SCRIPT = [sys.executable, FILE, "--steps", str(STEPS), "--save-steps", str(EVERY)]
HASTY = {"closed_grace_ms": 500}  # nodes die here, and are not waited for


@dataclass(frozen=True)
class Undisturbed:
    """What the script says and leaves when nobody disturbs it."""

    losses: dict[int, float]
    digest: str
    directory: Path
    distributed: str


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The script, run by hand."""
    directory = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        SCRIPT, cwd=directory, env={**os.environ, **TRAINER_VARIABLES}, check=True,
        capture_output=True, text=True, timeout=work.JOB_DEADLINE_S,
    )  # fmt: skip
    found = work.parsed(done.stdout)
    return Undisturbed(losses_in(found), digest_in(found), directory, distributed_in(found))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, where nothing happens."""
    with Cluster(tmp_path_factory.mktemp("calm")) as made:
        made.start_coordinator()
        made.start_agent("n1", h100(1, node="n1"))
        made.wait_for_nodes("n1")
        yield made


def losses_in(found: list[dict[str, Any]]) -> dict[int, float]:
    """By step."""
    return {line["step"]: line["loss"] for line in work.events_named(found, "step")}


def digest_in(found: list[dict[str, Any]]) -> str:
    """Of the final weights."""
    return str(work.events_named(found, "end")[0]["digest"])


def distributed_in(found: list[dict[str, Any]]) -> str:
    """What Accelerate takes the training for; "NO": one process without a group."""
    return str(work.events_named(found, "begin")[0]["distributed"])


def test_a_trainer_script_survives_its_node(
    cluster: Cluster, gate: Gate, undisturbed: Undisturbed
) -> None:
    cluster.start_coordinator(**HASTY)
    for name in ("n1", "n2"):
        cluster.start_agent(name, h100(1, node=name))
    cluster.wait_for_nodes("n1", "n2")
    reached = 2 * EVERY + 2
    gate.open_to(reached)
    job_id = work.submit(cluster, [*SCRIPT, "--gate", str(gate.path)], gpus=1)

    def safe(job: types_pb2.Job) -> bool:
        return job.checkpoint.step == 2 * EVERY and len(job.checkpoint.replicas) == 2

    job = work.wait_job(cluster, job_id, safe, "two copies")
    before = work.wait_step(cluster, job_id, reached)
    first = job.attempts[0].node
    cluster.kill_node(first)
    gate.open_to(STEPS)
    work.wait_job(cluster, job_id, ended_well, "done")
    after = work.lines(cluster, job_id)
    assert work.events_named(before, "begin")[0]["step"] == 0
    assert distributed_in(before) == undisturbed.distributed == "NO"
    # Nothing is repeated but the steps since the last save.
    assert work.events_named(after, "begin")[0]["step"] == 2 * EVERY
    assert sorted(losses_in(after)) == list(range(2 * EVERY + 1, STEPS + 1))
    assert losses_in(before) | losses_in(after) == undisturbed.losses
    assert digest_in(after) == undisturbed.digest
    job = cluster.job(job_id)
    assert (job.epoch, job.checkpoint.step) == (2, STEPS)
    assert (job.progress.step, job.progress.total_steps) == (STEPS, STEPS)
    said = work.output(cluster, job_id)
    assert f"resuming from step {2 * EVERY}, the last committed checkpoint" in said


def test_shards_of_two_nodes_survive_one_of_them(cluster: Cluster, gate: Gate) -> None:
    """Nobody has all of the model, and the half of it that lay on the lost node goes on elsewhere.
    What was trained after the checkpoint is trained again, to the same last bit."""
    cluster.start_coordinator(**HASTY)
    for name in ("n1", "n2", "n3"):
        cluster.start_agent(name, h100(1, node=name))
    cluster.wait_for_nodes("n1", "n2", "n3")
    reached = 2 * EVERY + 2
    gate.open_to(reached)
    command = [*SCRIPT, "--gate", str(gate.path), "--sharded"]
    job_id = work.submit(cluster, command, gpus=1, ranks=2)

    def safe(job: types_pb2.Job) -> bool:
        own, parts = job.checkpoint.replicas, [part.replicas for part in job.checkpoint.parts]
        copied = [len(replicas) for replicas in (own, *parts)] == [2, 2]
        return job.checkpoint.step == 2 * EVERY and copied

    job = work.wait_job(cluster, job_id, safe, "two copies")
    before = work.wait_step(cluster, job_id, reached)
    first, second = (attempt.node for attempt in job.attempts)
    assert first != second
    cluster.kill_node(second)
    gate.open_to(STEPS)
    job = work.wait_job(cluster, job_id, ended_well, "done")
    assert second not in {attempt.node for attempt in job.attempts if attempt.epoch == 2}
    assert job.checkpoint.step == STEPS
    after = work.lines(cluster, job_id)
    assert [line["step"] for line in work.events_named(after, "begin")][-1] == 2 * EVERY
    again = losses_of_last_try(after)
    assert sorted(again) == list(range(2 * EVERY + 1, STEPS + 1))
    repeated = {step: loss for step, loss in losses_in(before).items() if step in again}
    assert repeated == {step: again[step] for step in (reached - 1, reached)}
    said = work.output(cluster, job_id)
    assert f"resuming from step {2 * EVERY}, the last committed checkpoint" in said


def losses_of_last_try(found: list[dict[str, Any]]) -> dict[int, float]:
    """By step, from where it began."""
    begun = max(number for number, line in enumerate(found) if line["event"] == "begin")
    return losses_in(found[begun:])


def ended_well(job: types_pb2.Job) -> bool:
    return job.phase == types_pb2.JOB_PHASE_SUCCEEDED


def test_a_torn_newest_checkpoint_is_set_aside(
    calm: Cluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.directory / "output", tmp_path / "output")
    weights = tmp_path / "output" / f"checkpoint-{STEPS}" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    job_id = work.submit(calm, [*SCRIPT, "--resume"], working_directory=str(tmp_path))
    work.wait_job(calm, job_id, ended_well, "done")
    found = work.lines(calm, job_id)
    assert work.events_named(found, "begin")[0]["step"] == STEPS - EVERY
    assert digest_in(found) == undisturbed.digest
    assert f"checkpoint-{STEPS} is torn (model.safetensors has" in work.output(calm, job_id)
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert names >= {f"checkpoint-{STEPS}", f"torn-checkpoint-{STEPS}"}


LOOK = """
import baton_sdk, json, sys
finders = [type(finder).__name__ for finder in sys.meta_path]
foreign = sorted({"torch", "transformers", "baton_hook"} & set(sys.modules))
print(json.dumps({"event": "seen", "watched": "_Watch" in finders, "foreign": foreign}))
"""


def test_other_programs_are_left_as_they_were(calm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text('print(\'{"event": "own"}\')\n')
    command = [sys.executable, "-c", LOOK]
    plain = work.submit(calm, command)
    off = work.submit(calm, command, environment={"BATON_HOOK": "0"})
    own = work.submit(calm, command, environment={"PYTHONPATH": str(tmp_path)})
    for job_id in (plain, off, own):
        work.wait_succeeded(calm, job_id)
    seen = {"event": "seen", "watched": True, "foreign": []}
    assert work.lines(calm, plain) == [seen]
    assert work.lines(calm, off) == [{**seen, "watched": False}]
    assert work.lines(calm, own) == [{"event": "own"}, seen]


def test_variables_of_baton_stay_its_own(calm: Cluster) -> None:
    done = calm.baton("submit", "--env", "BATON_HOOKS=0", "--", "true")
    assert done.returncode == 1
    assert "BATON_HOOKS is Baton's own" in done.stderr
    assert json.loads(calm.baton("--json", "submit", "--env", "BATON_HOOK=0", "--", "true").stdout)
