"""A machine whose clock is not the coordinator's: what is said of times is right there all the
same."""

import time
from datetime import timedelta

import pytest

from protos.baton.v1 import jobs_pb2
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator


@pytest.mark.parametrize("hours", [-25, 25])
def test_ages_are_by_the_coordinators_clock(
    baton: Baton, fake: FakeCoordinator, hours: int
) -> None:
    """What it has written down, by a clock that is far from this machine's."""
    job = samples.active_job()
    job.submit_time.FromDatetime(job.submit_time.ToDatetime() + timedelta(hours=hours))
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse(jobs=[job])]
    fake.unix_ms = round((time.time() + hours * 3600) * 1000)
    assert baton("jobs", "--all").stdout.splitlines()[1].split()[7] == "1h02m"
