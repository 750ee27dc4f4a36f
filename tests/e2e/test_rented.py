"""A node that is rented, with real processes: made by a site's command, it enrols itself, does the
work that waited for it, and is given back when nobody needs it.
"""

from pathlib import Path

import pytest

from tests.e2e import scaling_switch, work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-rented")]
RENTED = "cloud-1"
# A minute of the plan is a quarter of a second, so the ten that it idles for are 2.5 s.
CONFIG = {
    "demand_minute_ms": 250,
    "scaling_mode": "act",
    "scaling_interval_ms": 1_000,
    "scaling_boot_ms": 2_000,
    "scaling_boot_deadline_ms": 300_000,
    "scaling_spares": 0,
    "scaling_budget_usd_per_day": 100_000,
    "scaling_spends_alone": True,
    "closed_grace_ms": 1_000,
}


def test_a_rented_node_enrols_itself_works_and_is_given_back(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster") as cluster:
        scripts = scaling_switch.written(cluster)
        rented = {
            "nodes": RENTED, "driver": "burst", "gpu_type": "H100", "gpus_per_node": 1,
            "create_program": scripts["resume_program"],
            "delete_program": scripts["suspend_program"],
        }  # fmt: skip
        cluster.start_coordinator(**CONFIG, capacity={"rented": rented})
        cluster.start_agent("n1", h100(1))
        launch = cluster.prepare_agent(RENTED, h100(1, node=RENTED), restart_absence_ms=500)
        scaling_switch.describe(cluster, RENTED, launch)
        cluster.wait_for_nodes("n1")
        assert set(cluster.node_phases()) == {"n1"}, "nobody has rented anything yet"
        done = tmp_path / "done"
        until_done = ["sh", "-c", f"until [ -e {done} ]; do sleep 0.2; done"]
        first = work.submit(cluster, until_done, gpus=1)
        second = work.submit(cluster, ["true"], gpus=1)

        (attempt,) = work.wait_succeeded(cluster, second).attempts
        assert attempt.node == RENTED
        cluster.wait_until(
            lambda: set(cluster.node_phases()) == {"n1"},
            work.DEADLINE_S,
            "the rented node is given back",
        )
        assert not (cluster.directory / f"{RENTED}.pid").exists(), "its machine is gone"
        done.touch()
        assert work.wait_succeeded(cluster, first).attempts[0].node == "n1"
