"""What is read every ten seconds and once a minute, how often, and of whom nothing.

Problem: "not supported" is easily passed on as down or zero, and what readings cost the driver's
lock is seen only where calls arrive. So the real sampler reads described GPUs, whose library writes
down each call; seconds pass on a clock of the test's own.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest

from agent.core.values import GpuInventory, GpuProcess, GpuSample, GpuUsage
from agent.telemetry import schedule
from agent.telemetry.remote import Deadlines, RemoteGpus
from tests.fakenvml.build import (
    FakeGpu,
    a100,
    build,
    describe,
    environment,
    h100,
    mig,
    rtx4090,
    with_details,
)
from tests.fakenvml.costs import LOCK_BUDGET_MS, lock_ms

GPUS = 8
SECONDS = 120
PATIENT = Deadlines(fast_ms=60_000, slow_ms=60_000)  # a shared machine may be slow
USAGE_VALUES = [field.name for field in fields(GpuUsage) if field.name != "uuid"]


class Box:
    """One box: its GPUs as described, what its library was called, and a clock."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "gpus.txt"
        self.calls_path = directory / "calls.txt"
        self.calls_path.touch()
        self.now_ms = 0

    @contextmanager
    def opened(
        self, rate: str = "normal", *, pcie_throughput: bool = False
    ) -> Iterator[RemoteGpus]:
        gpus = RemoteGpus(
            None,
            deadlines=PATIENT,
            now_ms=lambda: self.now_ms,
            rate=rate,
            pcie_throughput=pcie_throughput,
        )
        gpus.open()
        yield gpus
        gpus.close()

    def take_calls(self) -> Counter[str]:
        calls = Counter(self.calls_path.read_text(encoding="ascii").split())
        self.calls_path.write_bytes(b"")
        return calls


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    made = Box(tmp_path)
    monkeypatch.setenv("BATON_FAKENVML_CALLS", str(made.calls_path))
    use(made, monkeypatch, build())
    return made


def use(box: Box, monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    for name, value in environment(library, box.path).items():
        monkeypatch.setenv(name, value)


def read(box: Box, *described: FakeGpu) -> tuple[GpuSample, ...]:
    describe(described, box.path)
    with box.opened() as gpus:
        return gpus.samples()


def usage_of(sample: GpuSample) -> GpuUsage:
    assert sample.usage is not None
    return sample.usage


def inventory_of(sample: GpuSample) -> GpuInventory:
    assert sample.inventory is not None
    return sample.inventory


def lock_ms_a_second(box: Box, rate: str, *, pcie_throughput: bool = False) -> float:
    """Of each GPU, over two minutes in which processes run on all of them."""
    described = [replace(gpu, processes=((4242, 1 << 30),)) for gpu in h100(GPUS)]
    describe([with_details(gpu, clock_event_reasons=0) for gpu in described], box.path)
    with box.opened(rate, pcie_throughput=pcie_throughput) as gpus:
        box.take_calls()
        for _ in range(SECONDS):
            assert all(not sample.error for sample in gpus.samples())
            box.now_ms += 1_000
    return lock_ms(box.take_calls()) / SECONDS / GPUS


def test_the_normal_rate_keeps_the_lock_budget(box: Box) -> None:
    assert 0.0 < lock_ms_a_second(box, "normal") < LOCK_BUDGET_MS


def test_the_throughput_of_pcie_keeps_it_too_where_it_is_wanted(box: Box) -> None:
    assert lock_ms_a_second(box, "normal", pcie_throughput=True) < LOCK_BUDGET_MS


def test_the_throughput_of_pcie_is_read_only_where_it_is_wanted(box: Box) -> None:
    gpu = with_details(h100(1)[0], pcie_sent_kb=25_000_000, pcie_received_kb=7)
    describe([gpu, *a100(1, node="n2")], box.path)
    call = "nvmlDeviceGetPcieThroughput"
    with box.opened() as gpus:
        found = inventory_of(gpus.samples()[0])
    assert (found.pcie_sent_bytes_per_second, box.take_calls()[call]) == (None, 0)
    with box.opened(pcie_throughput=True) as gpus:
        found, other = map(inventory_of, gpus.samples())
        assert box.take_calls()[call] == 4
        box.now_ms += 30_000
        gpus.samples()
        box.now_ms += 29_999
        gpus.samples()
        assert box.take_calls()[call] <= 4, "once a minute"
        errors = gpus.reading().nvml_errors
    assert found.pcie_sent_bytes_per_second == 25_000_000_000
    assert found.pcie_received_bytes_per_second == 7_000
    assert (other.pcie_sent_bytes_per_second, errors) == (None, ()), "not supported is no zero"


def test_processes_once_a_second_would_break_the_lock_budget(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = {**schedule.PERIODS_MS["normal"], schedule.USAGE: 1_000}
    monkeypatch.setattr(schedule, "PERIODS_MS", {**schedule.PERIODS_MS, "normal": eager})
    assert lock_ms_a_second(box, "normal") > LOCK_BUDGET_MS


def test_off_calls_nothing_and_is_no_error(box: Box) -> None:
    assert lock_ms_a_second(box, "off") == 0.0


def test_a_rate_is_taken_over_by_the_next_reading(box: Box) -> None:
    describe([replace(gpu, power_mw=7) for gpu in h100(2)], box.path)
    with box.opened() as gpus:
        gpus.samples()
        gpus.set_rate("off")
        box.take_calls()
        assert gpus.samples() == tuple(GpuSample(facts.uuid) for facts in gpus.facts())
        assert not box.take_calls()
        gpus.set_rate("normal")
        assert [sample.power_mw for sample in gpus.samples()] == [7, 7]


def test_a_slow_rate_says_how_old_its_figures_are(box: Box) -> None:
    describe(h100(1), box.path)
    with box.opened("slow") as gpus:
        assert gpus.samples()[0].age_ms == 0
        box.now_ms += 3_000
        assert gpus.samples()[0].age_ms == 3_000


def test_usage_is_what_the_driver_says(box: Box) -> None:
    (gpu,) = h100(1)
    gpu = replace(gpu, processes=((4242, 1 << 33), (17, 5)))
    gpu = with_details(
        gpu,
        ecc_volatile_corrected=3,
        ecc_aggregate_uncorrected=1,
        pcie_replays=9,
        utilization_percent_samples=",".join(str(value) for value in range(1, 101)),
        power_mw_samples="100,300,200",
    )
    usage = usage_of(read(box, gpu)[0])
    assert usage.processes == (GpuProcess(4242, 1 << 33), GpuProcess(17, 5))
    assert (usage.ecc_volatile_corrected, usage.ecc_volatile_uncorrected) == (3, 0)
    assert (usage.ecc_aggregate_corrected, usage.ecc_aggregate_uncorrected) == (0, 1)
    assert (usage.memory_temperature_celsius, usage.pcie_replays) == (40, 9)
    assert (usage.utilization_ratio_min, usage.utilization_ratio_max) == (0.01, 1.0)
    assert usage.utilization_ratio_p95 == 0.95
    assert (usage.power_mw_min, usage.power_mw_p95, usage.power_mw_max) == (100, 300, 300)


def test_samples_of_the_driver_count_once(box: Box) -> None:
    describe(h100(1), box.path)
    with box.opened() as gpus:
        assert usage_of(gpus.samples()[0]).power_mw_max == 70_000
        box.now_ms += 20_000
        assert usage_of(gpus.samples()[0]).power_mw_max is None, "there is no new one"


def test_activity_is_between_two_readings(box: Box) -> None:
    describe(
        [with_details(h100(1)[0], sm_activity_percent=80, tensor_activity_percent=25)], box.path
    )
    with box.opened() as gpus:
        assert inventory_of(gpus.samples()[0]).sm_activity_ratio is None
        box.now_ms += 60_000
        later = inventory_of(gpus.samples()[0])
        assert (later.sm_activity_ratio, later.tensor_activity_ratio) == (0.8, 0.25)


def test_links_and_rows_are_what_the_driver_says(box: Box) -> None:
    gpu = with_details(
        h100(1)[0], nvlinks_up=16, nvlinks_down=2, remapped_rows_uncorrected=1,
        remapped_rows_pending=1, pcie_width=8,
    )  # fmt: skip
    found = inventory_of(read(box, gpu)[0])
    assert (found.nvlinks_up, found.nvlinks_down, found.fabric_state) == (16, 2, "completed")
    assert (found.remapped_rows_uncorrected, found.remapped_rows_pending) == (1, True)
    assert found.remapped_rows_failed is False
    assert (found.pcie_width, found.pcie_width_max, found.pcie_generation) == (8, 16, 5)
    assert (found.vbios_version, found.serial) == ("96.00.74.00.01", "1650000000000")


def test_nvlink_that_is_not_supported_is_not_down(box: Box) -> None:
    """NVIDIA/NVSentinel #1481."""
    found = inventory_of(read(box, *rtx4090(1))[0])
    assert (found.nvlinks_up, found.nvlinks_down, found.fabric_state) == (None, None, None)


def test_remapped_rows_of_a_4090_are_unknown(box: Box) -> None:
    """leptonai/gpud #351: it answers zeros, and has nothing to remap."""
    found, other = (inventory_of(sample) for sample in read(box, *rtx4090(1), *h100(1, node="n2")))
    assert (found.remapped_rows_corrected, found.remapped_rows_failed) == (None, None)
    assert (other.remapped_rows_corrected, other.remapped_rows_failed) == (0, False)


def test_a_4090_has_no_ecc_and_no_gpm(box: Box) -> None:
    describe(rtx4090(1), box.path)
    with box.opened() as gpus:
        gpus.samples()
        box.now_ms += 60_000
        (sample,) = gpus.samples()
    usage = usage_of(sample)
    assert sample.error == ""
    assert all(getattr(usage, name) is None for name in USAGE_VALUES if name.startswith("ecc_"))
    assert inventory_of(sample).sm_activity_ratio is None
    assert gpus.reading().nvml_errors == ()


def test_an_a100_has_no_gpm(box: Box) -> None:
    found = inventory_of(read(box, *a100(1))[0])
    assert (found.sm_activity_ratio, found.fabric_state, found.nvlinks_up) == (None, None, 12)


def test_mig_instances_are_gpus_of_their_own(box: Box) -> None:
    whole, *instances = mig(h100(1)[0], 3)
    describe([whole, *instances, *h100(1, node="other")], box.path)
    with box.opened() as gpus:
        expected = [gpu.uuid for gpu in (*instances, *h100(1, node="other"))]
        assert [facts.uuid for facts in gpus.facts()] == expected
        assert gpus.facts()[0].memory_bytes == whole.memory_bytes // 3
        places = [facts.place for facts in gpus.facts()]
        assert places == [*(f"{whole.uuid}/{number}/0" for number in (1, 2, 3)), ""]
        samples = gpus.samples()
    assert [sample.error for sample in samples] == [""] * 4
    assert [sample.memory_used_bytes for sample in samples] == [0] * 4
    assert [sample.utilization_ratio for sample in samples] == [None, None, None, 0.0]


def test_a_gpu_in_mig_mode_without_instances_says_so(box: Box) -> None:
    describe([replace(h100(1)[0], mig=True)], box.path)
    with box.opened() as gpus:
        assert gpus.facts() == ()
        assert "is in MIG mode and has no instance" in gpus.absence


def test_an_older_driver_knows_less_and_fails_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ("nvmlDeviceGetFieldValues", "nvmlDeviceGetSamples", "nvmlGpmQueryDeviceSupport",
               "nvmlDeviceGetGpuFabricInfoV", "nvmlDeviceGetMigMode",
               "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2",
               "nvmlDeviceGetRemappedRows")  # fmt: skip
    use(box, monkeypatch, build(without=missing))
    describe(h100(1), box.path)
    with box.opened() as gpus:
        (sample,) = gpus.samples()
        errors = gpus.reading().nvml_errors
    assert (sample.error, errors) == ("", ())
    assert all(getattr(usage_of(sample), name) is None for name in USAGE_VALUES)
    assert inventory_of(sample).pcie_generation == 5
    assert inventory_of(sample).remapped_rows_corrected is None


def test_failures_are_counted_by_call_and_code(box: Box) -> None:
    (gpu,) = h100(1)
    failing = (("power", 999), ("ecc_volatile_corrected", 999), ("pcie_width", 999))
    describe([replace(gpu, failing=failing)], box.path)
    with box.opened() as gpus:
        (sample,) = gpus.samples()
        gpus.samples()
        errors = {call: (code, count) for call, code, count in gpus.reading().nvml_errors}
    assert errors == {
        "nvmlDeviceGetPowerUsage": ("unknown", 2),
        "nvmlDeviceGetFieldValues": ("unknown", 1),
        "nvmlDeviceGetCurrPcieLinkWidth": ("unknown", 1),
    }
    assert usage_of(sample).ecc_volatile_corrected is None
    assert usage_of(sample).ecc_volatile_uncorrected == 0


def test_a_lost_gpu_has_nothing_beside_its_error(box: Box) -> None:
    (gpu,) = h100(1)
    describe([gpu], box.path)
    with box.opened() as gpus:
        assert gpus.samples()[0].usage is not None
        describe([replace(gpu, state="lost")], box.path)
        (lost,) = gpus.samples()
    assert "fallen off the bus" in lost.error
    assert (lost.usage, lost.inventory) == (None, None)
