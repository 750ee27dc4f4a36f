"""`baton submit`: what is sent, from flags and files, and that a retry never submits twice."""

import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.baton.v1 import jobs_pb2, types_pb2
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal

UNAVAILABLE = Refusal(grpc.StatusCode.UNAVAILABLE, "not durable now: the disk is full")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user stands in an empty directory, and the coordinator takes everything."""
    monkeypatch.chdir(tmp_path)
    fake.answers["Submit"] = [jobs_pb2.SubmitResponse(job_id=12)]
    return tmp_path


def sent(fake: FakeCoordinator) -> types_pb2.JobSpec:
    """The only request there was."""
    (request,) = fake.requests
    assert isinstance(request, jobs_pb2.SubmitRequest)
    return request.spec


def test_a_command_is_sent_as_given(baton: Baton, fake: FakeCoordinator, here: Path) -> None:
    result = baton("submit", "--", "python", "t.py", "--name", "x", "--", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "job 12 submitted\n", "")
    assert sent(fake) == types_pb2.JobSpec(
        command=["python", "t.py", "--name", "x", "--", "--json"], working_directory=str(here)
    )


def test_every_flag_arrives(baton: Baton, fake: FakeCoordinator, here: Path) -> None:
    flags = (
        "--name n --project p --class spare --gpus 2 --gpu-type H100 --gpu-type A100 "
        "--gpu-memory-min 40GB --memory 64GiB --env A=1 --env B=x=y --env C= --workdir sub "
        "--grace 5m --signal USR1 --max-restarts 0 --run-again-exit-code 75 "
        "--run-again-exit-code 99 --replication required --slurm-env --hold"
    ).split()
    assert baton("submit", *flags, "--", "true").exit_code == 0
    expected = types_pb2.JobSpec(
        name="n",
        project="p",
        job_class=types_pb2.JOB_CLASS_SPARE,
        command=["true"],
        environment={"A": "1", "B": "x=y", "C": ""},
        working_directory=str(here / "sub"),
        gpus=2,
        gpu_types=["H100", "A100"],
        gpu_memory_bytes_min=40 * 10**9,
        memory_bytes=64 * 2**30,
        stop_signal=types_pb2.STOP_SIGNAL_USR1,
        max_restarts=0,
        run_again_exit_codes=[75, 99],
        replication=types_pb2.REPLICATION_REQUIRED,
        slurm_environment=True,
        hold=True,
    )
    expected.grace.FromSeconds(300)
    assert sent(fake) == expected


def test_a_reason_and_json(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["Submit"] = [jobs_pb2.SubmitResponse(job_id=12, reason="needs 8 GPUs")]
    assert baton("submit", "--", "true").stdout == "job 12 submitted; needs 8 GPUs\n"
    for arguments in (("--json", "submit", "--", "true"), ("submit", "--json", "--", "true")):
        document = json.loads(baton(*arguments).stdout)
        assert document == {
            "job_id": 12,
            "request_id": fake.requests[-1].request_id,
            "reason": "needs 8 GPUs",
            "jobs": 1,
        }


def test_a_job_that_was_forgotten_is_said_again(baton: Baton, fake: FakeCoordinator) -> None:
    assert baton("submit", "--for-job", "12", "--", "true").exit_code == 0
    assert baton("submit", "--", "true").exit_code == 0
    assert [request.forgotten_job_id for request in fake.requests] == [12, 0]
    assert baton("submit", "--for-job", "0", "--", "true").exit_code == 2


def test_an_empty_workdir_asks_for_the_attempts_own(baton: Baton, fake: FakeCoordinator) -> None:
    assert baton("submit", "--workdir", "", "--", "true").exit_code == 0
    assert sent(fake).working_directory == ""


def test_a_directory_that_is_not_here_is_told_since_it_may_be_on_the_node(
    baton: Baton, fake: FakeCoordinator, here: Path
) -> None:
    result = baton("submit", "--workdir", "/nowhere/at-all", "--", "true")
    assert (result.exit_code, result.stdout) == (0, "job 12 submitted\n")
    assert result.stderr == (
        "baton: /nowhere/at-all is no directory on this machine; it must be one on the node\n"
    )
    assert sent(fake).working_directory == "/nowhere/at-all"


def test_a_job_file_and_flags_over_it(baton: Baton, fake: FakeCoordinator, here: Path) -> None:
    (here / "job.toml").write_text(
        'name = "a"\nclass = "guaranteed"\ncommand = ["python", "t.py"]\ngpus = 2\n'
        'gpu_types = ["H100"]\ngpu_memory_min = "40GiB"\nmemory = 1024\ngrace = "2h"\n'
        'env = { A = "file", B = "file" }\nworkdir = "sub"\nhold = true\nmax_restarts = 5\n'
        'signal = "USR2"\nreplication = "none"\nslurm_env = true\n'
        'run_again_exit_codes = [3]\nproject = "p"\n'
    )
    flags = ("--gpus", "0", "--env", "B=flag", "--no-hold", "--gpu-type", "A100")
    assert baton("submit", "job.toml", *flags).exit_code == 0
    expected = types_pb2.JobSpec(
        name="a",
        project="p",
        job_class=types_pb2.JOB_CLASS_GUARANTEED,
        command=["python", "t.py"],
        environment={"A": "file", "B": "flag"},
        working_directory=str(here / "sub"),
        gpu_types=["A100"],
        gpu_memory_bytes_min=40 * 2**30,
        memory_bytes=1024,
        stop_signal=types_pb2.STOP_SIGNAL_USR2,
        max_restarts=5,
        run_again_exit_codes=[3],
        replication=types_pb2.REPLICATION_NONE,
        slurm_environment=True,
    )
    expected.grace.FromSeconds(7200)
    assert sent(fake) == expected


def test_a_command_replaces_a_files_trainer(
    baton: Baton, fake: FakeCoordinator, here: Path
) -> None:
    (here / "job.toml").write_text('trainer = "finetune"\n[config]\nsteps = 5\n')
    assert baton("submit", "job.toml", "--", "true").exit_code == 0
    assert sent(fake) == types_pb2.JobSpec(command=["true"], working_directory=str(here))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.toml", 'steps = 5\nname = "é"\n[data]\nrate = 0.5\n'),
        ("c.json", '{"steps": 5, "name": "é", "data": {"rate": 0.5}}'),
    ],
)
def test_a_trainer_and_its_configuration(
    baton: Baton, fake: FakeCoordinator, here: Path, name: str, content: str
) -> None:
    (here / name).write_text(content)
    assert baton("submit", "--trainer", "finetune", "--config", name).exit_code == 0
    assert sent(fake).trainer == "finetune"
    assert json.loads(sent(fake).trainer_config_json) == {
        "steps": 5,
        "name": "é",
        "data": {"rate": 0.5},
    }


def test_a_table_in_the_job_file_is_a_configuration(
    baton: Baton, fake: FakeCoordinator, here: Path
) -> None:
    (here / "job.toml").write_text('trainer = "transfer"\n[config]\nsteps = 5\n')
    assert baton("submit", "job.toml").exit_code == 0
    assert json.loads(sent(fake).trainer_config_json) == {"steps": 5}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("gpu = 4", "job.toml: unknown key 'gpu'; did you mean 'gpus'?"),
        ("clas = 1\nnmae = 2", "job.toml: unknown key 'clas'; did you mean 'class'?; "),
        ("zzzzzz = 1", "job.toml: unknown key 'zzzzzz'; the keys are name, project, class, comm"),
        ("job_class = 'spare'", "job.toml: unknown key 'job_class'; did you mean 'class'?"),
        ('gpus = "4"', "job.toml: gpus: expected a whole number, got a string"),
        ("gpus = 4.5", "job.toml: gpus: expected a whole number, got a number"),
        ("gpus = 99999999999", "job.toml: gpus: expected a whole number <= 2147483647"),
        ('command = "python t.py"', "job.toml: command: expected a list, got a string; write the"),
        ("command = [1]", "job.toml: command[0]: expected a string, got a whole number"),
        ('class = "best"', "job.toml: class: 'best' is none of guaranteed, standard, spare"),
        ("grace = 120", "job.toml: grace: expected a string, got a whole number; write it with"),
        ('grace = "120"', "grace: '120' has no unit; write 120s for seconds or 120m for minutes"),
        ('memory = "40G"', "memory: '40G' is ambiguous; write 40GiB"),
        ("memory = -1", "memory: '-1' is not a size"),
        ("hold = 1", "job.toml: hold: expected true or false, got a whole number"),
        ("[env]\nA = 1", "job.toml: env.A: expected a string, got a whole number; write each"),
        ("name = ", "job.toml: not valid TOML, as a job file is: invalid value (at "),
        ("config = 'none.json'", "cannot read "),
        ("[config]\nwhen = 2026-01-01", "config: when: a date or time has no JSON form; write it"),
        ("[config]\na = [{b = nan}]", "config: a[0].b: nan has no JSON form"),
        ("gpus = " + "9" * 5000, "job.toml: "),
        ("memory = 9223372036854775808", "is more than 9223372036854775807 bytes"),
        ("x = " + "[" * 2000, "job.toml: "),
    ],
)
def test_a_wrong_job_file_is_answered_with_a_sentence(
    baton: Baton, fake: FakeCoordinator, here: Path, content: str, said: str
) -> None:
    (here / "job.toml").write_text(content)
    result = baton("submit", "job.toml")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert fake.requests == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "nothing to run: give a command after --, a job file or --trainer"),
        ("--", "there is no command after --"),
        ("python t.py", "write -- before a command: baton submit -- python t.py"),
        ("python t.py --lr 3", "Your own command's options belong after --"),
        ("none.toml", "cannot read none.toml: No such file or directory"),
        ("--trainer finetune -- true", "give a command or --trainer, not both"),
        ("--gpus many -- true", "'many' is not a valid integer"),
        ("--gpus 99999999999 -- true", "--gpus: expected a whole number <= 2147483647"),
        ("--array= -- true", "--array is empty; write it like 0-99"),
        ("--memory 40G -- true", "'40G' is ambiguous"),
        ("--grace 120 -- true", "'120' has no unit"),
        ("--env A -- true", "'A' is not NAME=VALUE"),
        ("--class best -- true", "'best' is not one of 'guaranteed', 'standard', 'spare'"),
        ("--signal KILL -- true", "'KILL' is not one of"),
        (f"--request-id {'x' * 65} -- true", "--request-id has 1 to 64 characters"),
        ("--trainer t --config none.json", "cannot read"),
        ("--trainer finetune", "--trainer needs --config FILE"),
        ("--gpus 1 --share-gpu 8GiB -- true", "--share-gpu is in place of --gpus"),
    ],
)
def test_wrong_usage(baton: Baton, fake: FakeCoordinator, arguments: str, said: str) -> None:
    result = baton("submit", *arguments.split())
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert fake.requests == []


def test_a_refusal_is_shown_as_it_is(baton: Baton, fake: FakeCoordinator) -> None:
    sentence = "asks for 16 GPUs; the largest node, n1, has 8: ask for at most 8"
    fake.answers["Submit"] = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, sentence)]
    result = baton("submit", "--gpus", "16", "--", "true")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"baton: {sentence}\n"
    assert len(fake.requests) == 1


def test_a_retry_carries_the_same_request_id(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["Submit"] = [UNAVAILABLE, UNAVAILABLE, jobs_pb2.SubmitResponse(job_id=12)]
    result = baton("submit", "--", "true")
    assert (result.exit_code, result.stdout) == (0, "job 12 submitted\n")
    first, second, third = fake.requests
    assert first == second == third
    assert len(first.request_id) == 36


def test_two_submissions_have_two_request_ids(baton: Baton, fake: FakeCoordinator) -> None:
    baton("submit", "--", "true")
    baton("submit", "--", "true")
    first, second = fake.requests
    assert first.request_id != second.request_id


def test_retries_end_and_say_how_to_go_on(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["Submit"] = [UNAVAILABLE]
    result = baton("submit", "--request-id", "mine", "--", "true")
    assert result.exit_code == 1
    assert result.stderr == (
        "baton: not durable now: the disk is full; to try again without submitting twice, "
        "add --request-id mine\n"
    )
    assert [request.request_id for request in fake.requests] == ["mine"] * 4


def follow(fake: FakeCoordinator, phase: Any, reason: str) -> None:
    """Script a job that writes two parts and ends."""
    fake.answers["StreamLogs"] = [
        [
            jobs_pb2.StreamLogsResponse(attempt="12.1", node="n1", data=b"step 1\n\xff"),
            jobs_pb2.StreamLogsResponse(attempt="12.2", notice="n1 took its log with it"),
            jobs_pb2.StreamLogsResponse(attempt="12.2", node="n2", data=b"step 2\n"),
        ]
    ]
    job = samples.active_job()
    job.phase = phase
    job.reason = reason
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]


def test_follow_a_success(baton: Baton, fake: FakeCoordinator) -> None:
    follow(fake, types_pb2.JOB_PHASE_SUCCEEDED, "")
    result = baton("submit", "--follow", "--", "true")
    assert result.exit_code == 0
    assert result.stdout_bytes == b"step 1\n\xffstep 2\n"
    assert result.stderr == (
        "baton: job 12 submitted\nbaton: n1 took its log with it\n"
        "baton: from here on attempt 12.2, on n2\nbaton: job 12 succeeded\n"
    )
    assert fake.requests[1] == jobs_pb2.StreamLogsRequest(job_id=12, follow=True)


def test_follow_a_failure(baton: Baton, fake: FakeCoordinator) -> None:
    follow(fake, types_pb2.JOB_PHASE_FAILED, "exit code 1")
    result = baton("submit", "--follow", "--", "false")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "baton: job 12 failed: exit code 1"


def test_follow_a_log_that_ends_too_early(baton: Baton, fake: FakeCoordinator) -> None:
    follow(fake, types_pb2.JOB_PHASE_ACTIVE, "")
    result = baton("submit", "--follow", "--", "true")
    assert result.exit_code == 1
    assert "ended while the job is active; go on with: baton logs -f 12" in result.stderr


def test_follow_in_json(baton: Baton, fake: FakeCoordinator) -> None:
    follow(fake, types_pb2.JOB_PHASE_SUCCEEDED, "")
    result = baton("submit", "--follow", "--json", "--", "true")
    submission, *lines, job = map(json.loads, result.stdout.splitlines())
    assert submission["job_id"] == 12
    assert [line["text"] + line["notice"] for line in lines] == [
        "step 1\n\ufffd",
        "n1 took its log with it",
        "step 2\n",
    ]
    assert job["phase"] == "succeeded"
    assert result.stderr == ""


def test_a_lost_connection_while_following_says_that_the_job_goes_on(
    baton: Baton, fake: FakeCoordinator
) -> None:
    fake.answers["StreamLogs"] = [Refusal(grpc.StatusCode.INTERNAL, "broken")]
    result = baton("submit", "--follow", "--", "true")
    assert result.exit_code == 1
    assert "broken; job 12 goes on: baton logs -f 12" in result.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "c.json: a trainer's configuration is a table of keys and values"),
        ("{", "c.json: not valid JSON: "),
        ("[" * 100_000, "c.json: nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "c.json: not valid JSON: "),
        ('{"a": 1e999}', "c.json: a: inf has no JSON form"),
        ("\xff", "c.json: not UTF-8 text (byte 0)"),
        (" " * 1_048_577, "c.json: larger than 1048576 bytes"),
    ],
)
def test_a_wrong_configuration(
    baton: Baton, fake: FakeCoordinator, here: Path, content: str, said: str
) -> None:
    (here / "c.json").write_text(content, encoding="latin-1")
    result = baton("submit", "--trainer", "finetune", "--config", "c.json")
    assert (result.exit_code, fake.requests) == (2, [])
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_directory_that_is_gone(baton: Baton, fake: FakeCoordinator, here: Path) -> None:
    (here / "gone").mkdir()
    os.chdir(here / "gone")
    (here / "gone").rmdir()
    result = baton("submit", "--", "true")
    assert (result.exit_code, fake.requests) == (2, [])
    assert result.stderr == "baton: the current directory does not exist any more; go to another\n"


def test_silence_is_not_retried_but_says_how_to_go_on(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["Submit"] = [Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "")]
    result = baton("submit", "--request-id", "mine", "--", "true")
    assert (result.exit_code, len(fake.requests)) == (3, 1)
    assert "; to try again without submitting twice, add --request-id mine" in result.stderr


def test_a_share_of_a_gpu_is_one_gpu(baton: Baton, fake: FakeCoordinator) -> None:
    assert baton("submit", "--share-gpu", "8GiB", "--", "true").exit_code == 0
    assert (sent(fake).gpus, sent(fake).shared_gpu_memory_bytes) == (1, 8 * 2**30)


def test_a_share_stands_in_a_job_file(baton: Baton, fake: FakeCoordinator, here: Path) -> None:
    (here / "job.toml").write_text('command = ["true"]\nshare_gpu = "8GB"\n')
    assert baton("submit", "job.toml").exit_code == 0
    assert (sent(fake).gpus, sent(fake).shared_gpu_memory_bytes) == (1, 8 * 10**9)


@pytest.mark.parametrize(
    ("said", "flags", "gpus", "share_bytes"),
    [("gpus = 2", "--share-gpu 8GiB", 1, 8 * 2**30), ('share_gpu = "8GB"', "--gpus 2", 2, 0)],
)
def test_a_flag_replaces_a_files_share_or_whole_gpus(
    baton: Baton,
    fake: FakeCoordinator,
    here: Path,
    *,
    said: str,
    flags: str,
    gpus: int,
    share_bytes: int,
) -> None:
    (here / "job.toml").write_text(f'command = ["true"]\n{said}\n')
    assert baton("submit", "job.toml", *flags.split()).exit_code == 0
    assert (sent(fake).gpus, sent(fake).shared_gpu_memory_bytes) == (gpus, share_bytes)


@pytest.fixture
def local_west(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three hours behind UTC."""
    monkeypatch.setenv("TZ", "<-03>3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("flags", [("--deadline", "2026-11-30T09:00+02:00"), ("job.toml",)])
def test_a_deadline_is_a_time(
    baton: Baton, fake: FakeCoordinator, here: Path, flags: tuple[str, ...]
) -> None:
    (here / "job.toml").write_text('gpus = 1\ndeadline = "2026-11-30T07:00Z"\n')
    assert baton("submit", *flags, "--", "true").exit_code == 0
    assert sent(fake).deadline.ToJsonString() == "2026-11-30T07:00:00Z"
    assert not fake.requests[-1].HasField("deadline_in")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("2026-12-30T09:00:00Z", "2026-12-30T09:00:00Z"),
        ("2026-12-30 09:00:00+02:00", "2026-12-30T07:00:00Z"),
        ("2026-12-30T09:00:00", "2026-12-30T12:00:00Z"),
    ],
)
@pytest.mark.usefixtures("local_west")
def test_a_deadline_may_be_a_time_of_toml(
    baton: Baton, fake: FakeCoordinator, here: Path, said: str, text: str
) -> None:
    """Without an offset it is the local time, as where it stands in quotes."""
    (here / "job.toml").write_text(f"gpus = 1\ndeadline = {said}\n")
    assert baton("submit", "job.toml", "--", "true").exit_code == 0
    assert sent(fake).deadline.ToJsonString() == text


@pytest.mark.parametrize("day", ["2026-12-01", "20261201", "2026-W49", "2026-W49-2"])
def test_a_deadline_that_is_a_day_is_refused(
    baton: Baton, fake: FakeCoordinator, here: Path, day: str
) -> None:
    """Its first moment is what is meant least often."""
    result = baton("submit", "--gpus", "1", "--deadline", day, "--", "true")
    assert (result.exit_code, fake.requests) == (2, [])
    assert "no time of it" in result.stderr


@pytest.mark.parametrize("said", ["2026-12-01", "09:00:00", "6"])
def test_a_deadline_of_toml_without_a_day_or_a_time_is_refused(
    baton: Baton, fake: FakeCoordinator, here: Path, said: str
) -> None:
    (here / "job.toml").write_text(f"gpus = 1\ndeadline = {said}\n")
    result = baton("submit", "job.toml", "--", "true")
    assert (result.exit_code, fake.requests) == (2, [])
    assert "deadline: " in result.stderr
    assert "write it like 2026-1" in result.stderr


def test_a_deadline_may_be_so_long_from_now(baton: Baton, fake: FakeCoordinator) -> None:
    before = datetime.now(UTC) + timedelta(hours=6)
    assert baton("submit", "--gpus", "1", "--deadline", "6h", "--", "true").exit_code == 0
    after = datetime.now(UTC) + timedelta(hours=6)
    assert before <= sent(fake).deadline.ToDatetime(tzinfo=UTC) <= after
    # What counts: by the coordinator's clock. The other is for one that does not know this.
    assert fake.requests[-1].deadline_in.ToTimedelta() == timedelta(hours=6)


@pytest.mark.parametrize("text", ["9 o'clock", "6", "", "2026-13-01T00:00", "99999999999999d"])
def test_a_deadline_that_is_no_time_is_refused(
    baton: Baton, fake: FakeCoordinator, here: Path, text: str
) -> None:
    result = baton("submit", "--gpus", "1", "--deadline", text, "--", "true")
    assert (result.exit_code, fake.requests) == (2, [])
    (here / "job.toml").write_text(f'gpus = 1\ndeadline = "{text}"\n')
    result = baton("submit", "job.toml", "--", "true")
    assert (result.exit_code, fake.requests) == (2, [])
    assert "deadline" in result.stderr


def test_no_deadline_is_unsaid(baton: Baton, fake: FakeCoordinator) -> None:
    assert baton("submit", "--", "true").exit_code == 0
    assert not sent(fake).HasField("deadline")
