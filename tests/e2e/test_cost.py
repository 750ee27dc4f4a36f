"""`baton cost` and `baton leases` against a real coordinator: what ran on own, leased and hourly
nodes costs what that costs, and a coordinator that was killed bills the same."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from protos.baton.v1 import jobs_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-cost")]

NODES = ("own-1", "lease-1", "cloud-1")


def test_what_ran_is_billed_by_where_it_ran_and_again_after_a_kill(tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    lease = {
        "gpu_type": "H100",
        "gpus": 4,
        "begin": str(today - timedelta(days=1)),
        "end": str(today + timedelta(days=2)),
        "nodes": "lease-*",
        "usd": 2.0,
    }
    prices: dict[str, Any] = {
        "tariffs": {"H100": {"owned_usd": 1.0, "burst_usd": 4.0}},
        "leases": {"first": lease},
        "burst_nodes": ["cloud-*"],
    }
    with Cluster(tmp_path / "cluster") as fleet:
        fleet.start_coordinator(**prices)
        for name in NODES:
            fleet.start_agent(name, h100(1, node=name))
        fleet.wait_for_nodes(*NODES)
        script = f"until [ -e {tmp_path}/done ]; do sleep 0.05; done"
        jobs = [
            work.submit(fleet, ("sh", "-c", script), gpus=1, project=f"p{number}")
            for number in range(len(NODES))
        ]
        for job_id in jobs:
            work.wait_running(fleet, job_id)
        (tmp_path / "done").touch()
        where = {
            work.wait_succeeded(fleet, job_id).attempts[-1].node: f"p{number}"
            for number, job_id in enumerate(jobs)
        }
        assert sorted(where) == sorted(NODES), "each had a GPU of its own"

        def bill() -> dict[str, dict[str, Any]]:
            found = fleet.baton_json("cost", "--from", str(today - timedelta(days=1)))
            assert found["idle_lease_usd"] > 0
            return {line["key"]: line["money"] for line in found["lines"]}

        before = bill()
        own, leased, hourly = (before[where[name]] for name in NODES)
        assert own["owned_usd"] == pytest.approx(own["gpu_hours"] * 1.0)
        assert own["energy_kwh"] == pytest.approx(own["gpu_hours"] * 0.7 * 1.5)
        assert leased["lease_usd"] == pytest.approx(leased["gpu_hours"] * 2.0)
        assert hourly["burst_usd"] == pytest.approx(hourly["gpu_hours"] * 4.0)
        assert leased["energy_usd"] == hourly["energy_usd"] == 0
        fleet.kill_coordinator()
        fleet.start_coordinator(**prices)
        work.wait_for_coordinator(fleet)
        assert bill() == before
        advice = fleet.baton("leases")
        assert advice.returncode == 0
        assert fleet.jobs.ListJobs(jobs_pb2.ListJobsRequest()).jobs, "and it still has the jobs"
