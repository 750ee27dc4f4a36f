"""What the driver says of a GPU reaches `baton nodes --json`, changes when it changes, and is
absent where the driver does not say: the production path, from NVML's stand-in to the command line.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import FakeGpu, describe, h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-telemetry")]

FIRST, SECOND = h100(2)
GIB = 1 << 30


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One agent that reads its two GPUs ten times a second."""
    with Cluster(tmp_path_factory.mktemp("telemetry") / "cluster") as made:
        made.start_coordinator(heartbeat_interval_ms=100, report_interval_ms=100)
        made.start_agent("n1", (FIRST, SECOND), sample_interval_ms=100)
        made.wait_for_nodes("n1")
        yield made


def show(fleet: Cluster, *gpus: FakeGpu) -> None:
    """From now on the driver tells this."""
    describe(gpus, fleet.node_directory("n1").with_suffix(".gpus"))


def wait_shown(
    fleet: Cluster, wanted: Callable[[list[dict[str, Any]]], bool], what: str
) -> list[dict[str, Any]]:
    """What the command line shows of both GPUs, once it is as wanted. All that is wanted belongs
    into the question: the driver may tell something new in the middle of a reading."""
    order = [FIRST.uuid, SECOND.uuid]

    def look() -> list[dict[str, Any]]:
        (node,) = [fleet.baton_json("nodes")[0]]
        gpus = sorted(node["gpus"], key=lambda gpu: order.index(gpu["uuid"]))
        said = [gpu["telemetry"] for gpu in gpus]
        return said if all(said) and wanted(said) else []

    return fleet.wait_until(look, work.DEADLINE_S, what)


def test_readings_follow_the_driver(fleet: Cluster) -> None:
    busy = replace(
        FIRST,
        utilization_percent=87,
        temperature_celsius=71,
        power_mw=512_000,
        memory_used_bytes=40 * GIB,
    )
    show(fleet, busy, SECOND)
    told = {
        "utilization_ratio": 0.87,
        "temperature_celsius": 71,
        "power_mw": 512_000,
        "memory_used_bytes": 40 * GIB,
    }
    said = wait_shown(fleet, lambda it: told.items() <= it[0].items(), f"{told}")
    assert said[1]["utilization_ratio"] == 0
    show(fleet, replace(busy, utilization_percent=3, temperature_celsius=44), SECOND)
    now = {"utilization_ratio": 0.03, "temperature_celsius": 44}
    wait_shown(fleet, lambda it: now.items() <= it[0].items(), f"{now}")
    table = fleet.baton("nodes").stdout
    assert "44 °C" in table


def test_what_the_driver_does_not_say_is_null(fleet: Cluster) -> None:
    show(fleet, FIRST, replace(SECOND, unsupported=("power", "energy", "utilization")))
    unsaid = {
        "power_mw": None,
        "energy_mj": None,
        "utilization_ratio": None,
        "temperature_celsius": SECOND.temperature_celsius,
        "error": "",
    }
    wait_shown(
        fleet,
        lambda it: unsaid.items() <= it[1].items() and it[0]["power_mw"] == FIRST.power_mw,
        f"{unsaid}",
    )


def test_lost_gpu_says_so_and_the_other_goes_on(fleet: Cluster) -> None:
    show(fleet, replace(FIRST, temperature_celsius=50), replace(SECOND, state="lost"))
    said = wait_shown(
        fleet,
        lambda it: bool(it[1]["error"]) and it[1]["temperature_celsius"] is None,
        "an error in place of a reading",
    )
    assert "lost" in said[1]["error"].lower()
    wait_shown(fleet, lambda it: it[0]["temperature_celsius"] == 50, "50 degrees")


def test_host_figures_are_real(fleet: Cluster) -> None:
    (node,) = [fleet.baton_json("nodes")[0]]
    assert node["host"]["cpu_count"] > 0
    assert 0 < node["telemetry"]["memory_used_bytes"] < node["host"]["memory_bytes"]
    assert node["telemetry"]["disk_free_bytes"] > 0


def test_an_operator_says_how_often_gpus_are_read(fleet: Cluster) -> None:
    show(fleet, replace(FIRST, power_mw=99_000), SECOND)
    wait_shown(fleet, lambda it: it[0]["power_mw"] == 99_000, "99 W")
    assert fleet.baton_json("telemetry", "n1", "--rate", "off")["telemetry_rate"] == "off"
    said = wait_shown(fleet, lambda it: it[0]["power_mw"] is None, "no reading")
    assert [gpu["error"] for gpu in said] == ["", ""]
    assert "telemetry off, by order" in fleet.baton("nodes").stdout
    fleet.baton_json("telemetry", "n1", "--rate", "own")
    wait_shown(fleet, lambda it: it[0]["power_mw"] == 99_000, "99 W again")


def test_what_is_read_less_often_is_there_where_the_gpu_has_it(fleet: Cluster) -> None:
    said = wait_shown(fleet, lambda it: all(gpu["details"] for gpu in it), "details")
    details = said[0]["details"]
    assert (details["nvlinks_up"], details["nvlinks_down"]) == (18, 0)
    assert (details["pcie_width"], details["pcie_width_max"]) == (16, 16)
    assert (details["ecc_volatile_uncorrected"], details["remapped_rows_failed"]) == (0, False)
    assert details["processes"] == 0
