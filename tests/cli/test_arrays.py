"""Arrays at a terminal: asked for as Slurm's users know it, one line in a list, and one word for
all trials."""

import json
import re
from pathlib import Path

import pytest

from protos.baton.v1 import jobs_pb2
from protos.baton.v1 import types_pb2 as t
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator

ARRAY = "0-99%8"


def trial(
    job_id: int, phase: t.JobPhase.ValueType = t.JOB_PHASE_QUEUED, array: str = ARRAY
) -> t.Job:
    """Of the array whose first job is 12."""
    return t.Job(
        id=job_id,
        spec=t.JobSpec(name="train", command=["train", "--seed={index}"], gpus=1, array=array),
        phase=phase,
        reason="8 of its array's 100 trials run",
        submit_time=samples.ago(3_630),
        trial=t.Trial(
            array_job_id=12, index=job_id - 12, trials=100, running=8, waiting=41, over=51
        ),
    )


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_an_array_is_asked_for(
    baton: Baton, fake: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake.answers["Submit"] = [jobs_pb2.SubmitResponse(job_id=12, jobs=100)]
    said = baton("submit", "--array", ARRAY, "--gpus", "1", "--", "train", "{index}")
    assert (said.exit_code, said.stdout) == (
        0, "array 12 submitted: 100 trials, jobs 12 to 111\n",
    )  # fmt: skip
    assert said.stderr == ""
    (tmp_path / "job.toml").write_text('command = ["train"]\narray = "1-3"\n')
    assert json.loads(baton("submit", "job.toml", "--json").stdout)["jobs"] == 100
    assert baton("submit", "job.toml", "--array", "7").exit_code == 0
    assert [request.spec.array for request in fake.requests] == [ARRAY, "1-3", "7"]
    assert list(fake.requests[0].spec.command) == ["train", "{index}"]
    followed = baton("submit", "job.toml", "--follow")
    assert followed.exit_code == 2
    assert "baton logs -f" in followed.stderr


def test_a_list_has_one_line_for_all_trials(baton: Baton, fake: FakeCoordinator) -> None:
    answers = [
        jobs_pb2.ListJobsResponse(jobs=[trial(111)]),
        jobs_pb2.ListJobsResponse(jobs=[trial(40, t.JOB_PHASE_SUCCEEDED)]),
    ]
    fake.answers["ListJobs"] = list(answers)
    header, line = baton("jobs").stdout.splitlines()
    assert cells(header)[:3] == ["JOB", "NAME", "CLASS"]
    assert cells(line) == [
        "12_[0-99%8]", "train", "-", "active", "1", "-", "51/100", "1h00m",
        "8 run, 41 wait, 51 are over",
    ]  # fmt: skip
    assert [request.fold_arrays for request in fake.requests] == [True, True]
    assert max(map(len, (header, line))) <= 100


@pytest.mark.parametrize("flag", ["--trials", "--json"])
def test_trials_are_listed_for_who_asks_and_for_programs(
    baton: Baton, fake: FakeCoordinator, flag: str
) -> None:
    fake.answers["ListJobs"] = [
        jobs_pb2.ListJobsResponse(jobs=[trial(111), trial(12, t.JOB_PHASE_ACTIVE)]),
        jobs_pb2.ListJobsResponse(),
    ]
    shown = baton("jobs", flag).stdout
    assert [request.fold_arrays for request in fake.requests] == [False, False]
    if flag == "--trials":
        assert [cells(line)[0] for line in shown.splitlines()[1:]] == ["111", "12"]
    else:
        assert json.loads(shown)[0]["trial"] == {
            "array_job_id": 12, "index": 99, "trials": 100, "running": 8, "waiting": 41, "held": 0,
            "over": 51,
        }  # fmt: skip


def test_a_job_shows_its_array(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=trial(15))]
    shown = baton("job", "15").stdout
    assert "trial 3 of array 12_[0-99%8], of which 8 run, 41 wait, 51 are over" in shown
    assert "  command    train --seed=3\n" in shown


VERBS = {
    "cancel": ("cancelling", jobs_pb2.CancelJobResponse),
    "hold": ("holding", jobs_pb2.HoldJobResponse),
    "release": ("releasing", jobs_pb2.ReleaseJobResponse),
    "requeue": ("requeueing", jobs_pb2.RequeueJobResponse),
}


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (
            "-- train {index}",
            "{index} in the command is left as it is: only with --array it stands for an index",
        ),
        ("--env A={index} -- train", "{index} in --env A is left as it is"),
        (
            "--env A={index} --array 0-99%8 -- train",
            "{index} in --env A is left as it is: the trial's index is in BATON_ARRAY_INDEX",
        ),
    ],
)
def test_an_index_that_nobody_fills_in_is_noted_and_no_mistake(
    baton: Baton, fake: FakeCoordinator, arguments: str, note: str
) -> None:
    """A literal {index} is right in the f-string of `python -c`."""
    fake.answers["Submit"] = [jobs_pb2.SubmitResponse(job_id=12)]
    said = baton("submit", *arguments.split())
    assert (said.exit_code, said.stderr) == (0, f"baton: {note}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_for_the_whole_array(baton: Baton, fake: FakeCoordinator, verb: str) -> None:
    fake.answers[f"{verb.title()}Job"] = [VERBS[verb][1](job=trial(12), jobs=49)]
    said = baton(verb, "--array", "12")
    assert (said.exit_code, said.stdout) == (
        0,
        f"array 12: {VERBS[verb][0]} 49 of its 100 trials\n",
    )
    document = json.loads(baton(verb, "12", "--array", "--json").stdout)
    left = {"left_running": 0, "left_succeeded": 0} if verb == "requeue" else {}
    assert document == {"array_job_id": 12, "trials": 100, "jobs": 49, **left}
    assert [(request.job_id, request.array) for request in fake.requests] == [(12, True)] * 2
    fake.answers[f"{verb.title()}Job"] = [VERBS[verb][1](job=trial(12), jobs=100)]
    assert baton(verb, "--array", "12").stdout.endswith("ing all of its 100 trials\n")


def test_a_requeue_says_whom_it_leaves(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["RequeueJob"] = [
        jobs_pb2.RequeueJobResponse(job=trial(12), jobs=3, left_running=1, left_succeeded=4)
    ]
    assert baton("requeue", "--array", "12").stdout == (
        "array 12: requeueing 3 of its 100 trials; 1 runs and 4 have succeeded: see --all\n"
    )
    baton("requeue", "--array", "--all", "12")
    assert [request.all_trials for request in fake.requests] == [False, True]
    assert baton("requeue", "--all", "12").exit_code == 2


def test_an_older_coordinator_has_changed_one_job_alone(
    baton: Baton, fake: FakeCoordinator
) -> None:
    fake.answers["CancelJob"] = [jobs_pb2.CancelJobResponse(job=t.Job(id=12))]
    said = baton("cancel", "--array", "12")
    assert said.exit_code == 1
    assert "only job 12 was changed" in said.stderr


def test_a_trial_is_known_by_its_index(baton: Baton, fake: FakeCoordinator) -> None:
    """As in Slurm; Python alone would take 12_3 for 123."""
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=trial(12, array="1,3,8-16:4%2"))]
    fake.answers["CancelJob"] = [jobs_pb2.CancelJobResponse(job=trial(14))]
    assert baton("cancel", "12_8").exit_code == 0
    assert [request.job_id for request in fake.requests] == [12, 14]
    said = baton("cancel", "12_2")
    assert said.exit_code == 1
    assert "array 12 is 1,3,8-16:4%2; it has no index 2" in said.stderr
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=t.Job(id=12))]
    said = baton("cancel", "12_1")
    assert "job 12 is not the first of an array" in said.stderr
    for text in ("12_", "_3", "1_2_3"):
        said = baton("cancel", text)
        assert said.exit_code == 2
        assert "is not a valid job number" in said.stderr
