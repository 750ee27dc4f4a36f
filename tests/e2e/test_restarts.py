"""What training survives on a node that stays: the death of the trainer, the agent, the
coordinator, in each order, and restarts of both.

A closed connection is waited for here, so that a slow machine's restart is a restart and not the
loss of a node.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.baton.v1 import jobs_pb2, types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import chain
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-restarts")]

PATIENT = {"closed_grace_ms": 60_000}
UNDISTURBED = [
    "job.submitted", "attempt.assigned", "attempt.started", "attempt.exited", "job.succeeded",
]  # fmt: skip
SUBMITTERS = 4


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator and one agent; every test leaves both running."""
    with Cluster(tmp_path_factory.mktemp("restarts") / "cluster") as made:
        made.start_coordinator(**PATIENT)
        made.start_agent("n1", h100(2))
        made.wait_for_nodes("n1")
        yield made


def began(fleet: Cluster, gate: Gate, *, steps: int = 6, every: int = 2) -> tuple[int, int]:
    """A counting job that runs and has committed step 2: its id, and its process."""
    gate.open_to(2)
    job_id = work.submit(fleet, gate.job(steps=steps, every=every), gpus=1)
    work.wait_committed(fleet, job_id, 2)
    return job_id, work.wait_pid(fleet, job_id)


def finished_undisturbed(fleet: Cluster, gate: Gate, job_id: int, steps: int = 6) -> None:
    """It goes on in the process that it began in, and its history has each event once."""
    gate.open_to(steps)
    job = work.wait_succeeded(fleet, job_id)
    found = work.lines(fleet, job_id)
    assert len(work.events_named(found, "started")) == 1
    assert [line["step"] for line in work.events_named(found, "step")] == [*range(1, steps + 1)]
    assert found[-1]["value"] == chain(steps)
    assert job.epoch == 1
    assert job.checkpoint.step == steps
    names = work.history(fleet, job_id)
    assert [name for name in names if not name.startswith("attempt.milestone")] == UNDISTURBED


@contextlib.contextmanager
def followed(fleet: Cluster, job_id: int) -> Iterator[None]:
    """Somebody who follows the job's output all the while sees each line of it once."""
    heard = fleet.directory / "heard"
    with (
        heard.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "coordinator.cli", "logs", "-f", str(job_id)],
            env={**fleet.helper_environment(), "BATON_COORDINATOR": fleet.address},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        ) as follower,
    ):
        try:
            fleet.wait_until(lambda: heard.read_bytes(), work.DEADLINE_S, "something is heard")
            yield
            _, remarks = follower.communicate(timeout=work.DEADLINE_S)
        finally:
            follower.kill()
    assert (follower.returncode, heard.read_text()) == (0, work.output(fleet, job_id))
    said = f"baton: {fleet.address} does not answer; the output goes on when it does\n"
    assert remarks == said


def test_killed_trainer_resumes_from_its_last_commit(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    gate.open_to(3)
    work.wait_step(fleet, job_id, 3)
    os.kill(pid, signal.SIGKILL)
    again = work.wait_running(fleet, job_id, 2)
    assert again.restored_step == 2
    gate.open_to(6)
    job = work.wait_succeeded(fleet, job_id)
    assert job.attempts[0].signal == signal.SIGKILL
    found = work.lines(fleet, job_id)
    assert [line["step"] for line in work.events_named(found, "step")] == [1, 2, 3, 3, 4, 5, 6]
    assert found[-1]["value"] == chain(6)


def test_killed_agent_adopts_its_trainer(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    fleet.kill_agent("n1")
    gate.open_to(4)  # a checkpoint that no agent takes
    fleet.start_agent("n1", h100(2))
    work.wait_committed(fleet, job_id, 4)
    assert work.lives(pid)
    finished_undisturbed(fleet, gate, job_id)


def test_trainer_that_ends_without_an_agent_is_told_by_the_next(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    command = ["bash", "-c", f"while [ $(cat {gate.path}) -lt 6 ]; do sleep 0.02; done; exit 3"]
    other_id = work.submit(fleet, command)
    work.wait_running(fleet, other_id)
    fleet.kill_agent("n1")
    os.kill(pid, signal.SIGKILL)
    work.wait_gone(fleet, pid)
    gate.open_to(6)
    fleet.start_agent("n1", h100(2))
    assert work.wait_succeeded(fleet, job_id).attempts[0].signal == signal.SIGKILL
    failed = work.wait_phase(fleet, other_id, types_pb2.JOB_PHASE_FAILED)
    assert failed.attempts[0].exit_code == 3


def test_agent_says_goodbye_and_comes_back(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    fleet.stop_agent("n1")
    fleet.wait_until(
        lambda: fleet.node_phases()["n1"] == types_pb2.NODE_PHASE_SUSPECT,
        work.DEADLINE_S,
        "the coordinator has heard the goodbye",
    )
    assert "asked for 60 s" in work.node(fleet, "n1").reason
    assert work.lives(pid)
    read = fleet.baton("logs", str(job_id))
    assert (read.returncode, read.stdout) == (0, "")
    remark = f"the output of attempt {job_id}.1 is on n1: n1 does not answer"
    assert read.stderr.strip().endswith(remark)
    fleet.start_agent("n1", h100(2))
    fleet.wait_for_nodes("n1")
    finished_undisturbed(fleet, gate, job_id)


def test_agent_restarts_while_the_coordinator_is_away(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    fleet.kill_coordinator()
    gate.open_to(4)
    stored = {"attempt": f"{job_id}.1", "step": 4}
    work.wait_log(fleet, "n1", "checkpoint.stored", **stored)
    fleet.kill_agent("n1")
    gate.open_to(5)
    fleet.start_agent("n1", h100(2))
    fleet.start_coordinator(**PATIENT)
    work.wait_for_coordinator(fleet)
    assert work.wait_committed(fleet, job_id, 4).epoch == 1
    assert work.lives(pid)
    finished_undisturbed(fleet, gate, job_id)


def test_job_that_ends_during_an_outage_is_settled_after_it(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    fleet.kill_coordinator()
    gate.open_to(6)
    work.wait_gone(fleet, pid)
    fleet.start_coordinator(**PATIENT)
    work.wait_for_coordinator(fleet)
    finished_undisturbed(fleet, gate, job_id)


class Submitter:
    """Submits until it is told to stop; remembers what was acknowledged, and what was not."""

    def __init__(self, fleet: Cluster) -> None:
        self.fleet = fleet
        self.acknowledged: dict[str, int] = {}
        self.unanswered: list[str] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.unanswered:
            request_id = uuid.uuid4().hex
            try:
                self.acknowledged[request_id] = submit_held(self.fleet, request_id)
            except grpc.RpcError:
                self.unanswered.append(request_id)


def submit_held(fleet: Cluster, request_id: str) -> int:
    """A job that never starts."""
    spec = types_pb2.JobSpec(command=["true"], hold=True)
    return fleet.jobs.Submit(jobs_pb2.SubmitRequest(request_id=request_id, spec=spec)).job_id


def test_killed_coordinator_loses_nothing_acknowledged(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    with followed(fleet, job_id):
        killed_under_submitters(fleet, gate, job_id)
        assert work.lives(pid)
        finished_undisturbed(fleet, gate, job_id)


def killed_under_submitters(fleet: Cluster, gate: Gate, job_id: int) -> None:
    submitters = [Submitter(fleet) for _ in range(SUBMITTERS)]
    moment = random.Random(7).randrange(50, 150)

    def enough() -> bool:
        return sum(len(submitter.acknowledged) for submitter in submitters) >= moment

    fleet.wait_until(enough, work.DEADLINE_S, f"{moment} submissions")
    fleet.kill_coordinator()
    for submitter in submitters:
        submitter.thread.join(work.DEADLINE_S)
    gate.open_to(4)
    work.wait_log(fleet, "n1", "checkpoint.stored", attempt=f"{job_id}.1", step=4)
    fleet.start_coordinator(**PATIENT)
    work.wait_for_coordinator(fleet)
    acknowledged: dict[str, int] = {}
    for submitter in submitters:
        acknowledged.update(submitter.acknowledged)
    assert len(set(acknowledged.values())) == len(acknowledged)
    for request_id, known_id in acknowledged.items():
        assert fleet.job(known_id).phase == types_pb2.JOB_PHASE_HELD
        assert submit_held(fleet, request_id) == known_id
    repeated = [
        submit_held(fleet, request_id)
        for submitter in submitters
        for request_id in submitter.unanswered
    ]
    assert not set(repeated) & {*acknowledged.values(), job_id}


def test_stopped_coordinator_answers_again_where_it_was(fleet: Cluster, gate: Gate) -> None:
    job_id, pid = began(fleet, gate)
    with followed(fleet, job_id):
        fleet.stop_coordinator()
        assert work.lives(pid)
        fleet.start_coordinator(**PATIENT)
        work.wait_for_coordinator(fleet)
        finished_undisturbed(fleet, gate, job_id)
    for wrong in ({"after_attempt": "0.1"}, {"after_offset": -2}, {"tail_bytes": -1}, {"rank": 1}):
        request = jobs_pb2.StreamLogsRequest(job_id=job_id, **wrong)
        with pytest.raises(grpc.RpcError) as raised:
            list(fleet.jobs.StreamLogs(request))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def put_back(fleet: Cluster, copy: Path) -> None:
    """As docs/operations.md says: nothing of the old database stays beside the copy."""
    fleet.kill_coordinator()
    store = fleet.directory / "coordinator" / "baton.sqlite3"
    for old in store.parent.glob(f"{store.name}*"):
        old.unlink()
    copy.rename(store)
    fleet.start_coordinator(**PATIENT)
    work.wait_for_coordinator(fleet)
    fleet.wait_for_nodes("n1")


def test_a_copy_of_the_database_put_back_ends_no_training(
    fleet: Cluster, gate: Gate, tmp_path: Path
) -> None:
    """The copy knows neither the second attempt of one job, nor that another has finished, nor that
    there are two more: one is known again by what its node was told to run, one by what it left."""
    job_id, first_pid = began(fleet, gate)
    over_gate = Gate(tmp_path / "over")
    over_id, _ = began(fleet, over_gate)
    copy = tmp_path / "copy.sqlite3"
    config = fleet.runtime_directory / "coordinator.toml"
    words = ["-m", "coordinator", "backup", str(copy), "--config", str(config)]
    done = subprocess.run([sys.executable, *words], env=fleet.helper_environment(), check=False)
    assert done.returncode == 0
    over_gate.open_to(6)
    work.wait_succeeded(fleet, over_id)
    os.kill(first_pid, signal.SIGKILL)
    work.wait_running(fleet, job_id, 2)
    found = work.wait_output(
        fleet, job_id, lambda it: len(work.events_named(it, "started")) > 1, "its second start"
    )
    pid = work.events_named(found, "started")[-1]["pid"]
    late_gate = Gate(tmp_path / "late")
    late_id, _ = began(fleet, late_gate)
    late_gate.open_to(6)
    work.wait_succeeded(fleet, late_id)
    other_gate = Gate(tmp_path / "other")
    other_id, other_pid = began(fleet, other_gate)
    put_back(fleet, copy)
    gate.open_to(6)
    job = work.wait_succeeded(fleet, job_id)
    assert (job.epoch, job.checkpoint.step, work.lives(other_pid)) == (2, 6, True)
    assert len(work.events_named(work.lines(fleet, job_id), "started")) == 2
    assert not work.lives(pid)
    work.wait_log(fleet, "coordinator", "attempt.taken_back", attempt=f"{other_id}.1")
    assert work.submit(fleet, ["true"]) > other_id + 100_000
    # Of what had finished only the last checkpoint is left, which the copy does not know.
    work.wait_committed(fleet, over_id, 6)
    assert fleet.baton("release", str(over_id)).returncode == 0
    job = work.wait_succeeded(fleet, over_id)
    assert job.checkpoint.step == 6
    assert work.events_named(work.lines(fleet, over_id), "started")[-1]["step"] == 6
    # A job of after the copy that nobody runs is its last checkpoint, until it is said again.
    work.wait_committed(fleet, late_id, 6)
    words = ["submit", "--for-job", str(late_id), "--", *late_gate.job(steps=8, every=2)]
    assert fleet.baton(*words).stdout.startswith(f"job {late_id} submitted")
    late_gate.open_to(8)
    assert work.wait_succeeded(fleet, late_id).checkpoint.step == 8
    assert work.events_named(work.lines(fleet, late_id), "started")[-1]["step"] == 6
    other_gate.open_to(6)
    other = work.wait_succeeded(fleet, other_id)
    assert (other.epoch, other.checkpoint.step, other.spec.name) == (1, 6, job.spec.name)
