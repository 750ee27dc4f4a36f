"""What people bring along and expect to work: commands that never heard of Baton, signals that
reach the whole process group, exit statuses with a meaning, the variables of other launchers, and
daemons that keep their files to themselves.
"""

import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import duration_pb2

from protos.baton.v1 import types_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-conventions")]

SIGNALS = [sys.executable, str(work.TRAINERS / "signals.py")]
CANCELLED = types_pb2.JOB_PHASE_CANCELLED
FAILED = types_pb2.JOB_PHASE_FAILED


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator and one agent with two GPUs."""
    with Cluster(tmp_path_factory.mktemp("conventions") / "cluster") as made:
        made.start_coordinator()
        made.start_agent("n1", h100(2))
        made.wait_for_nodes("n1")
        yield made


def wait_said(fleet: Cluster, job_id: int, words: str) -> str:
    """Until the job's output holds these words."""

    def look() -> str:
        said = work.output(fleet, job_id)
        return said if words in said else ""

    return fleet.wait_until(look, work.DEADLINE_S, f"job {job_id} says {words!r}")


def variables(fleet: Cluster, **fields: object) -> dict[str, str]:
    """The environment that a job gets."""
    job_id = work.submit(fleet, ["env"], **fields)
    work.wait_succeeded(fleet, job_id)
    pairs = (line.partition("=") for line in work.output(fleet, job_id).splitlines())
    return {name: value for name, _, value in pairs}


def test_any_command_is_a_job(fleet: Cluster) -> None:
    job_id = work.submit(fleet, ["sh", "-c", "echo to stdout; echo to stderr >&2; pwd"])
    job = work.wait_succeeded(fleet, job_id)
    assert job.attempts[0].exit_code == 0
    said = work.output(fleet, job_id).splitlines()
    assert {"to stdout", "to stderr"} < set(said)
    missing_id = work.submit(fleet, ["no-such-program"])
    missing = work.wait_phase(fleet, missing_id, FAILED)
    assert "no-such-program" in missing.reason


def test_stop_reaches_the_python_child_of_a_shell(fleet: Cluster) -> None:
    command = ["bash", "-c", f"{' '.join(SIGNALS)} --leave-with 0; true"]
    job_id = work.submit(fleet, command)
    wait_said(fleet, job_id, "ready")
    assert fleet.baton("cancel", str(job_id)).returncode == 0
    work.wait_phase(fleet, job_id, CANCELLED)
    assert "got SIGTERM" in work.output(fleet, job_id)


def test_usr1_is_sent_where_it_is_asked_for(fleet: Cluster) -> None:
    job_id = work.submit(fleet, SIGNALS, stop_signal=types_pb2.STOP_SIGNAL_USR1)
    wait_said(fleet, job_id, "ready")
    fleet.baton("cancel", str(job_id))
    work.wait_phase(fleet, job_id, CANCELLED)
    said = work.output(fleet, job_id)
    assert "got SIGUSR1" in said
    assert "SIGTERM" not in said


def test_grace_ends_with_sigkill(fleet: Cluster) -> None:
    grace = duration_pb2.Duration(seconds=5)  # to have time for its word on a busy machine
    job_id = work.submit(fleet, [*SIGNALS, "--stubborn"], grace=grace)
    wait_said(fleet, job_id, "ready")
    fleet.baton("cancel", str(job_id))
    job = work.wait_phase(fleet, job_id, CANCELLED)
    assert "got SIGTERM" in work.output(fleet, job_id)
    assert job.attempts[0].signal == signal.SIGKILL


def test_daemonised_grandchild_dies_with_its_job(fleet: Cluster) -> None:
    job_id = work.submit(fleet, [*SIGNALS, "--daemon"])
    said = wait_said(fleet, job_id, "ready")
    pid = int(said.split()[1])
    assert work.lives(pid)
    fleet.baton("cancel", str(job_id))
    work.wait_phase(fleet, job_id, CANCELLED)
    work.wait_gone(fleet, pid)


def exits(*statuses: int) -> list[str]:
    """A job whose first attempt leaves with the first status, and so on; then with 0."""
    cases = "".join(f"{epoch}) exit {status};; " for epoch, status in enumerate(statuses, 1))
    return ["sh", "-c", f"case $BATON_EPOCH in {cases} *) exit 0;; esac"]


def test_exit_75_and_85_mean_run_me_again(fleet: Cluster) -> None:
    job = work.wait_succeeded(fleet, work.submit(fleet, exits(75, 85), max_restarts=0))
    assert [attempt.exit_code for attempt in job.attempts] == [75, 85, 0]
    yielded = types_pb2.ATTEMPT_PHASE_YIELDED
    assert [attempt.phase for attempt in job.attempts[:2]] == [yielded, yielded]


def test_run_again_statuses_can_be_remapped(fleet: Cluster) -> None:
    job_id = work.submit(fleet, exits(9, 75), run_again_exit_codes=[9])
    job = work.wait_phase(fleet, job_id, FAILED)
    assert [attempt.exit_code for attempt in job.attempts] == [9, 75]


def test_128_plus_n_is_a_signal(fleet: Cluster) -> None:
    job_id = work.submit(fleet, ["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], max_restarts=0)
    job = work.wait_phase(fleet, job_id, FAILED)
    assert job.attempts[0].exit_code == 137
    assert "exit status 137, signal 9 under a shell" in job.reason


def test_gpus_are_named_by_uuid(fleet: Cluster) -> None:
    uuids = sorted(gpu.uuid for gpu in h100(2))
    assert sorted(variables(fleet, gpus=2)["CUDA_VISIBLE_DEVICES"].split(",")) == uuids
    assert variables(fleet)["CUDA_VISIBLE_DEVICES"] == ""


def test_variables_of_other_launchers(fleet: Cluster) -> None:
    plain = variables(fleet)
    assert not [name for name in plain if name.startswith("SLURM")]
    # Who finds a rank takes itself for one of several, and this one is alone.
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert not [name for name in ranks if name in plain]
    assert {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0"}.items() <= plain.items()
    assert variables(fleet, environment={"LOCAL_RANK": "0"})["LOCAL_RANK"] == "0"
    slurm = variables(fleet, gpus=1, slurm_environment=True, environment={"MINE": "too"})
    expected = {
        "SLURM_JOB_ID": slurm["BATON_JOB_ID"],
        "SLURM_RESTART_COUNT": "0",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_PROCID": "0",
        "SLURM_GPUS_ON_NODE": "1",
        "MINE": "too",
    }
    assert expected.items() <= slurm.items()
    assert "BATON_FAKENVML_FILE" not in slurm  # the agent's own environment is not handed on


def test_state_is_for_its_owner_alone(fleet: Cluster) -> None:
    work.wait_succeeded(fleet, work.submit(fleet, ["true"]))
    roots = [fleet.directory / "coordinator", fleet.node_directory("n1")]
    roots.append(fleet.runtime_directory / "n1")
    for root in roots:
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
    # What jobs make themselves has the modes that they choose, behind directories of 0700.
    own = [path for root in roots for path in work.found_below(root) if "work" not in path.parts]
    assert [f"{path} {mode(path):o}" for path in own if mode(path) & 0o077] == []


def mode(path: Path) -> int:
    """0 for what has just been tidied away: an attempt that ended meanwhile."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("program", ["coordinator", "n1"])
def test_sighup_takes_over_the_log_level(fleet: Cluster, program: str) -> None:
    config = fleet.runtime_directory / f"{program}.toml"
    before = config.read_text("utf-8")
    for level in ("debug", "info"):
        config.write_text(f'{before}log_level = "{level}"\n', "utf-8")
        fleet.signal(program, signal.SIGHUP)
        work.wait_log(fleet, program, "config.reloaded", log_level=level)
    config.write_text(f"{before}log_levle = 1\n", "utf-8")
    fleet.signal(program, signal.SIGHUP)
    refused = work.wait_log(fleet, program, "config.refused")
    assert "log_level" in str(refused["reason"])
    config.write_text(before, "utf-8")


def test_every_log_line_is_one_json_object(fleet: Cluster) -> None:
    job_id = work.submit(fleet, ["true"])
    work.wait_succeeded(fleet, job_id)
    for program in ("coordinator", "n1"):
        text = Path(fleet.log_path(program)).read_text("utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()
        assert len(work.parsed(text)) == len(whole)
        for line in work.parsed(text):
            assert {"ts", "level", "event"} <= line.keys()
    assert work.wait_log(fleet, "n1", "attempt.started", node="n1", attempt=f"{job_id}.1")
