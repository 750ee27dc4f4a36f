"""A machine whose clock is not the coordinator's: what is said of times is right there all the
same."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from protos.baton.v1 import costs_pb2, jobs_pb2
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
    fake.unix_ms = round((samples.NOW.timestamp() + hours * 3600) * 1000)
    assert baton("jobs", "--all").stdout.splitlines()[1].split()[7] == "1h02m"


@pytest.mark.parametrize("hours", [-25, 25])
def test_until_now_is_the_coordinators_now(baton: Baton, fake: FakeCoordinator, hours: int) -> None:
    """A month of costs and of leases: it is told how long a span is and not when; what an older
    one needs besides is by this machine's clock."""
    until = datetime.now(UTC) + timedelta(hours=hours)
    answer = costs_pb2.GetCostsResponse()
    answer.begin_time.FromDatetime(until - timedelta(days=2))
    answer.end_time.FromDatetime(until)
    fleet = answer.fleets.add(gpu_type="H100")
    fleet.lots.add(gpus=20).end_time.FromDatetime(until - timedelta(hours=1))
    fleet.lots.add(gpus=7).end_time.FromDatetime(until + timedelta(hours=1))
    use = answer.uses.add(gpu_type="H100", lease_usd=1.0, burst_usd=2.0)
    use.begin_time.FromDatetime(until - timedelta(days=30))
    use.wanted_gpus.extend([50.0] * 720)
    fake.answers["GetCosts"] = [answer]
    shown = baton("cost", "--last", "2d")
    assert f"from {until - timedelta(days=2):%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC" in (
        shown.stderr
    )
    (advised,) = json.loads(baton("leases", "--json").stdout)
    assert advised["leased_gpus"] == 7
    of_cost, of_leases = fake.requests
    assert (of_cost.last.ToSeconds(), of_leases.last.ToSeconds()) == (2 * 86_400, 31 * 86_400)
    for asked in fake.requests:
        assert not asked.HasField("end_time")
        begin = asked.begin_time.ToDatetime(UTC) + asked.last.ToTimedelta()
        assert abs(begin - datetime.now(UTC)) < timedelta(minutes=5)
