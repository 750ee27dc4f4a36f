"""An array of real processes: two trials at a time, each told its index, over a coordinator that is
killed; one line in the list, and one word ends what is left."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-arrays")]

# A shell tells which trial it is by each of the ways, and waits for its own file.
SCRIPT = """
echo "$BATON_ARRAY_INDEX of $BATON_ARRAY_COUNT in $BATON_ARRAY_JOB_ID: \
$SLURM_ARRAY_TASK_ID $SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_MAX {index}"
while [ ! -e "$GATES/{index}" ]; do sleep 0.05; done
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Cluster]:
    """Two agents with two GPUs each: room for more than two trials."""
    with Cluster(tmp_path / "cluster") as made:
        made.start_coordinator()
        for name in ("n1", "n2"):
            made.start_agent(name, h100(2, node=name))
        made.wait_for_nodes("n1", "n2")
        yield made


def running(fleet: Cluster, first_id: int, count: int) -> list[int]:
    active = types_pb2.JOB_PHASE_ACTIVE
    return [n for n in range(first_id, first_id + count) if fleet.job(n).phase == active]


def test_two_of_five_trials_run_at_a_time(fleet: Cluster, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    gates.mkdir()
    said = fleet.baton(
        "submit", "--array", "2-10:2%2", "--gpus", "1", "--slurm-env", "--env", f"GATES={gates}",
        "--", "sh", "-c", SCRIPT,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("array 1 submitted: 5 trials, jobs 1 to 5")
    for job_id in (1, 2):
        work.wait_running(fleet, job_id)
    assert running(fleet, 1, 5) == [1, 2]
    sentence = fleet.baton("explain", "1_10").stdout
    assert "job 5 waits: 2 of its array's 5 trials run, as --array 2-10:2%2 allows; 3 wait" in (
        sentence
    )
    listed = fleet.baton("jobs").stdout.splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["1_[2-10:2%2]"]

    fleet.kill_coordinator()
    (gates / "2").touch()
    fleet.start_coordinator()
    work.wait_succeeded(fleet, 1)
    work.wait_running(fleet, 3)
    assert running(fleet, 1, 5) == [2, 3]
    # It runs a moment before it has said anything.
    said_by_it = fleet.wait_until(lambda: work.output(fleet, 3).strip(), work.DEADLINE_S, "a line")
    assert said_by_it == "6 of 5 in 1: 6 1 10 6"

    for index in (4, 6):
        (gates / str(index)).touch()
    for job_id in (2, 3):
        work.wait_succeeded(fleet, job_id)
    work.wait_running(fleet, 5)
    ended = fleet.baton("cancel", "--array", "1")
    assert ended.stdout == "array 1: cancelling 2 of its 5 trials\n", ended.stderr
    for job_id in (4, 5):
        work.wait_phase(fleet, job_id, types_pb2.JOB_PHASE_CANCELLED)
    spans = [
        (attempt.assign_time.ToMilliseconds(), attempt.end_time.ToMilliseconds())
        for job_id in range(1, 6)
        for attempt in fleet.job(job_id).attempts
    ]
    assert len(spans) == 5, "nobody was started twice"
    assert max(sum(a <= at < b for a, b in spans) for at, _ in spans) == 2
