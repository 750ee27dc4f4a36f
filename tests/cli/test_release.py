"""`baton release --restored`: all that is held since the database was put back, in any number."""

import json

import grpc
import pytest

from protos.baton.v1 import jobs_pb2, types_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal

NONE = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no job is held")


def answer(jobs: int) -> jobs_pb2.ReleaseJobResponse:
    return jobs_pb2.ReleaseJobResponse(job=types_pb2.Job(id=1), jobs=jobs)


def test_it_is_asked_until_none_is_left(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ReleaseJob"] = [answer(1000), answer(3), NONE]
    assert baton("release", "--restored").stdout == "released 1003 jobs\n"
    assert [(one.job_id, one.restored) for one in fake.requests] == [(0, True)] * 3
    fake.answers["ReleaseJob"] = [answer(1), NONE]
    assert json.loads(baton("release", "--restored", "--json").stdout) == {"jobs": 1}
    fake.answers["ReleaseJob"] = [answer(0)]  # none of ours says so, and nobody asks for ever
    assert baton("release", "--restored").exit_code == 0


def test_where_none_is_held_that_is_said(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ReleaseJob"] = [NONE]
    result = baton("release", "--restored")
    assert (result.exit_code, result.stderr) == (1, "baton: no job is held\n")


def test_an_older_coordinator_does_not_know_it(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ReleaseJob"] = [Refusal(grpc.StatusCode.NOT_FOUND, "there is no job 0")]
    result = baton("release", "--restored")
    assert result.exit_code == 1
    assert result.stderr == "baton: the coordinator knows no --restored; is it older?\n"


@pytest.mark.parametrize("words", [(), ("12", "--restored"), ("--restored", "--array")])
def test_either_jobs_or_all(baton: Baton, fake: FakeCoordinator, words: tuple[str, ...]) -> None:
    result = baton("release", *words)
    assert (result.exit_code, fake.requests) == (2, [])
    assert "give either jobs, or --restored alone" in result.stderr
