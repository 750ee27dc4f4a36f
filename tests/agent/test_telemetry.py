"""The agent's real probe, through the real binding, against described GPUs.

Problem: the library that a process gets is settled when it starts. So each test starts a child with
its own environment (`tests/fakenvml/probe_child.py`), asks it over a pipe, and changes the
described GPUs under its hands.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.ports import GpuProbe
from agent.telemetry.host import Host
from agent.telemetry.probe import NvmlProbe
from tests.fakenvml.build import (
    DRIVER_VERSION,
    SONAME,
    FakeGpu,
    a100,
    build,
    describe,
    environment,
    h100,
    h200,
    rtx4090,
    with_details,
)

ROOT = Path(__file__).resolve().parents[2]
NO_LIBRARY = "no GPUs: NVML Shared Library Not Found (no driver is installed)"
CHILD_S_MAX = 60  # it answers in milliseconds; a child that hangs must not hang the run

BUSY = FakeGpu(
    uuid="GPU-11111111-2222-3333-4444-555555555555",
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=85_520_809_984,
    memory_reserved_bytes=500_000_000,
    utilization_percent=37,
    memory_used_bytes=12_345_678_901,
    temperature_celsius=61,
    power_mw=412_345,
    energy_mj=9_876_543_210_123,
    sm_clock_mhz=1_755,
    memory_clock_mhz=2_619,
    details=(("clock_event_reasons", 5),),
)
BUSY_SAMPLE = {
    "uuid": BUSY.uuid,
    "utilization_ratio": 0.37,
    "memory_used_bytes": 12_345_678_901,
    "temperature_celsius": 61,
    "power_mw": 412_345,
    "energy_mj": 9_876_543_210_123,
    "sm_clock_mhz": 1_755,
    "memory_clock_mhz": 2_619,
    "clock_event_reasons": 5,
    "error": "",
}
BESIDE = ("age_ms", "usage", "inventory", "condition", "window")
LISTS = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")
VALUES = tuple(key for key in BUSY_SAMPLE if key not in ("uuid", "error"))


class ProbeChild:
    """A process with the probe open. `ask` is one request and its answer."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the child ended with {self._process.wait()}"
        return json.loads(line)

    def gpus(self) -> list[dict[str, Any]]:
        """What is read once a second; `test_classes.py` has the rest."""
        sampled: list[dict[str, Any]] = self.ask("sample")["gpus"]
        return [{key: gpu[key] for key in gpu if key not in BESIDE} for gpu in sampled]


@contextmanager
def probe(
    library: Path, path: Path, *, allowed: Sequence[str] = (), state: Path | None = None
) -> Iterator[ProbeChild]:
    arguments = [str(state or path.parent), *allowed]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fakenvml.probe_child", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment(library, path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(CHILD_S_MAX, process.kill)
        watchdog.start()
        try:
            child = ProbeChild(process)
            assert child.hear() == "open"
            yield child
        finally:
            watchdog.cancel()
            assert process.stdin is not None
            process.stdin.close()
    assert process.returncode == 0


@pytest.fixture
def described(tmp_path: Path) -> Path:
    return tmp_path / "gpus.txt"


def test_who_uses_a_gpu_is_told_as_far_as_the_driver_says(described: Path) -> None:
    used = replace(BUSY, processes=((4242, 1 << 30), (17, 1 << 20)))
    describe([used], described)
    with probe(build(), described) as child:
        known = {"uuid": BUSY.uuid, "memory_used_bytes": 12_345_678_901, "pids": [17, 4242]}
        assert child.ask("occupancy") == [known]
        describe([replace(used, processes=())], described)
        assert child.ask("occupancy") == [known | {"pids": []}]
        describe([replace(used, state="lost")], described)
        unknown = {"uuid": BUSY.uuid, "memory_used_bytes": None, "pids": None}
        assert child.ask("occupancy") == [unknown]
    listless = build(without=LISTS)
    describe([used], described)
    with probe(listless, described) as child:
        assert child.ask("occupancy") == [known | {"pids": None}]


def test_values_and_units_are_those_of_the_file(described: Path) -> None:
    describe([BUSY], described, driver_version="570.86.10")
    with probe(build(), described) as child:
        assert child.ask("gpu_facts") == [
            {
                "uuid": BUSY.uuid,
                "name": BUSY.name,
                "memory_bytes": 85_520_809_984,
                "pci_bus_id": "0000:01:00",
                "place": "",
            }
        ]
        assert child.gpus() == [BUSY_SAMPLE]
        assert child.ask("host_facts")["driver_version"] == "570.86.10"
        assert child.ask("absence") == ""


@pytest.mark.parametrize("percent", [0, 1, 100])
def test_utilization_is_a_ratio(described: Path, percent: int) -> None:
    describe([replace(BUSY, utilization_percent=percent)], described)
    with probe(build(), described) as child:
        assert child.gpus()[0]["utilization_ratio"] == percent / 100


def test_a_mixed_box_of_sixteen_gpus(described: Path) -> None:
    fleet = (
        *h100(4, node="a"),
        *h200(4, node="b"),
        *a100(4, node="c"),
        *rtx4090(4, node="d"),
    )
    gpus = [replace(gpu, power_mw=100_000 + index) for index, gpu in enumerate(fleet)]
    describe(gpus, described)
    with probe(build(), described) as child:
        facts = child.ask("gpu_facts")
        assert [(fact["uuid"], fact["name"], fact["memory_bytes"]) for fact in facts] == [
            (gpu.uuid, gpu.name, gpu.memory_bytes) for gpu in gpus
        ]
        sampled = child.gpus()
        assert [gpu["uuid"] for gpu in sampled] == [gpu.uuid for gpu in gpus]
        assert [gpu["power_mw"] for gpu in sampled] == [gpu.power_mw for gpu in gpus]


def test_not_supported_is_none_and_zero_is_zero(described: Path) -> None:
    idle = replace(BUSY, power_mw=0, energy_mj=0)
    describe([replace(idle, unsupported=("utilization", "temperature", "sm_clock"))], described)
    with probe(build(), described) as child:
        assert child.gpus() == [
            BUSY_SAMPLE
            | {"power_mw": 0, "energy_mj": 0}
            | {"utilization_ratio": None, "temperature_celsius": None, "sm_clock_mhz": None}
        ]


def test_a_gpu_that_supports_nothing_is_not_in_error(described: Path) -> None:
    every = ("utilization", "memory", "temperature", "power", "energy", "sm_clock", "memory_clock")
    describe([replace(BUSY, unsupported=every, details=())], described)
    with probe(build(), described) as child:
        assert child.gpus() == [{"uuid": BUSY.uuid, **dict.fromkeys(VALUES), "error": ""}]
        # the driver does not say how much memory there is: nothing can be promised on it
        assert child.ask("gpu_facts")[0]["memory_bytes"] == 0


def test_one_failing_field_hides_no_other(described: Path) -> None:
    describe([replace(BUSY, failing=(("power", 999),))], described)
    with probe(build(), described) as child:
        assert child.gpus() == [BUSY_SAMPLE | {"power_mw": None}]


def test_memory_that_fails_is_said_of_the_gpu(described: Path) -> None:
    describe([replace(BUSY, failing=(("memory", 999),))], described)
    with probe(build(), described) as child:
        (gpu,) = child.ask("sample")["gpus"]
        assert (gpu["memory_used_bytes"], gpu["power_mw"]) == (None, BUSY.power_mw)
        assert gpu["condition"]["unread"] == "its memory cannot be read: Unknown Error"


def test_a_gpu_that_only_fails_is_in_error(described: Path) -> None:
    fields = ("utilization", "memory", "temperature", "power", "energy", "sm_clock", "memory_clock")
    failing = tuple((field, 999) for field in fields)
    describe([replace(BUSY, failing=failing, details=())], described)
    with probe(build(), described) as child:
        reason = f"{BUSY.uuid} answers nothing: Unknown Error"
        assert child.gpus() == [{"uuid": BUSY.uuid, **dict.fromkeys(VALUES), "error": reason}]


@pytest.mark.parametrize(
    ("state", "words"),
    [("lost", "fallen off the bus"), ("reset_required", "nvidia-smi --gpu-reset")],
)
def test_a_gpu_is_lost_while_running_and_comes_back(
    described: Path, state: str, words: str
) -> None:
    healthy, sick = h100(2)
    describe([sick, healthy], described)
    with probe(build(), described) as child:
        facts = child.ask("gpu_facts")
        assert [gpu["error"] for gpu in child.gpus()] == ["", ""]

        describe([replace(sick, state=state), replace(healthy, power_mw=1)], described)
        lost, other = child.gpus()
        assert lost["uuid"] == sick.uuid
        assert sick.uuid in lost["error"]
        assert words in lost["error"]
        assert all(lost[value] is None for value in VALUES)
        assert (other["uuid"], other["power_mw"], other["error"]) == (healthy.uuid, 1, "")
        assert child.ask("gpu_facts") == facts, "a lost GPU is not dropped in silence"

        describe([sick, healthy], described)
        assert [gpu["error"] for gpu in child.gpus()] == ["", ""]


def test_a_lost_gpu_costs_one_call(described: Path) -> None:
    describe([replace(BUSY)], described)
    with probe(build(), described) as child:
        child.gpus()
        describe([replace(BUSY, state="lost")], described)
        child.ask("calls")
        child.gpus()
        assert sum(child.ask("calls").values()) == 1


def test_a_gpu_that_is_lost_at_the_start_hides_no_other(described: Path) -> None:
    sick, healthy = h100(2)
    describe([replace(sick, state="lost"), healthy], described)
    with probe(build(), described) as child:
        assert [fact["uuid"] for fact in child.ask("gpu_facts")] == [healthy.uuid]
        assert [gpu["error"] for gpu in child.gpus()] == [""]
        assert child.ask("absence") == "the GPU at index 0 cannot be named: GPU is lost"

        describe([sick, healthy], described)
        assert {fact["uuid"] for fact in child.ask("gpu_facts")} == {sick.uuid, healthy.uuid}
        assert child.ask("absence") == ""


def test_gpus_are_addressed_by_uuid_when_their_order_changes(described: Path) -> None:
    first, second = (replace(gpu, power_mw=index) for index, gpu in enumerate(h100(2)))
    describe([first, second], described)
    with probe(build(), described) as child:
        before = {gpu["uuid"]: gpu["power_mw"] for gpu in child.gpus()}
        describe([second, first], described)
        assert {gpu["uuid"]: gpu["power_mw"] for gpu in child.gpus()} == before
        assert before == {first.uuid: 0, second.uuid: 1}


def test_a_gpu_that_was_removed_is_in_error_and_a_new_one_is_found(described: Path) -> None:
    old, new = h100(2)
    new = replace(new, pci_bus=2)
    describe([old], described)
    with probe(build(), described) as child:
        describe([new], described)
        assert [gpu["uuid"] for gpu in child.gpus()] == [old.uuid]
        assert [fact["uuid"] for fact in child.ask("gpu_facts")] == [old.uuid, new.uuid]
        missing, found = child.gpus()
        assert (missing["uuid"], found["uuid"]) == (old.uuid, new.uuid)
        assert "fallen off the bus" in missing["error"]
        assert found["error"] == ""


def test_the_allow_list_hides_other_gpus_and_reports_unknown_ones(described: Path) -> None:
    gpus = h100(3)
    describe(gpus, described)
    unknown = "GPU-00000000-0000-0000-0000-000000000000"
    with probe(build(), described, allowed=[unknown, gpus[1].uuid]) as child:
        assert [fact["uuid"] for fact in child.ask("gpu_facts")] == [gpus[1].uuid]
        known, missing = child.gpus()
        assert (known["uuid"], known["error"]) == (gpus[1].uuid, "")
        assert missing["uuid"] == unknown
        assert missing["error"] == f"{unknown} cannot be read: the driver does not know it"


def test_a_driver_without_gpus(described: Path) -> None:
    describe([], described)
    with probe(build(), described) as child:
        assert child.ask("gpu_facts") == []
        assert child.gpus() == []
        host = child.ask("host_facts")
        assert host["driver_version"] == DRIVER_VERSION
        assert host["gpu_absence"] == "no GPUs: the driver counts none"


def test_a_library_without_a_driver_until_it_is_loaded(described: Path) -> None:
    describe(h100(1), described, driver_version="")
    with probe(build(), described) as child:
        assert child.gpus() == []
        assert child.ask("host_facts")["driver_version"] == ""
        assert child.ask("absence") == "no GPUs: Driver Not Loaded (see `modprobe nvidia`)"

        describe(h100(1), described)
        assert [fact["uuid"] for fact in child.ask("gpu_facts")] == [h100(1)[0].uuid]
        assert [gpu["error"] for gpu in child.gpus()] == [""]
        assert child.ask("host_facts")["driver_version"] == DRIVER_VERSION
        assert child.ask("absence") == ""


def test_no_library_is_zero_gpus(described: Path) -> None:
    """A file that is no library hides a real one, so this holds on a box with GPUs too."""
    (described.parent / SONAME).write_bytes(b"")
    with probe(described.parent, described) as child:
        assert child.ask("gpu_facts") == []
        assert child.gpus() == []
        assert child.ask("host_facts")["driver_version"] == ""
        assert child.ask("absence") == child.ask("host_facts")["gpu_absence"] == NO_LIBRARY


def test_no_library_tells_of_allowed_gpus_why(described: Path) -> None:
    (described.parent / SONAME).write_bytes(b"")
    with probe(described.parent, described, allowed=[BUSY.uuid]) as child:
        reason = f"{BUSY.uuid} cannot be read: {NO_LIBRARY}"
        assert [gpu["error"] for gpu in child.gpus()] == [reason]


def test_an_old_driver_falls_back_and_is_not_asked_twice(described: Path) -> None:
    describe([BUSY, *h100(1)], described)
    missing = (
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetTotalEnergyConsumption",
    )
    with probe(build(without=missing), described) as child:
        assert child.ask("gpu_facts")[0]["memory_bytes"] == BUSY.memory_bytes
        expected = BUSY_SAMPLE | {
            "memory_used_bytes": 12_345_678_901 + 500_000_000,  # version 1 counts the reserved too
            "energy_mj": None,
        }
        assert child.gpus()[0] == expected
        child.ask("calls")
        assert child.gpus()[0] == expected
        assert not set(child.ask("calls")) & set(missing)


def test_a_sample_asks_only_for_what_changes(described: Path) -> None:
    describe([with_details(gpu, clock_event_reasons=0) for gpu in h100(8)], described)
    with probe(build(), described) as child:
        child.gpus()
        child.ask("calls")
        child.gpus()
        assert child.ask("calls") == {
            "nvmlDeviceGetFieldValues": 8,
            "nvmlDeviceGetUtilizationRates": 8,
            "nvmlDeviceGetMemoryInfo_v2": 8,
            "nvmlDeviceGetTemperatureV": 8,
            "nvmlDeviceGetPowerUsage": 8,
            "nvmlDeviceGetTotalEnergyConsumption": 8,
            "nvmlDeviceGetClockInfo": 16,
            "nvmlDeviceGetCurrentClocksEventReasons": 8,
        }


def test_host_facts_are_the_kernels(described: Path) -> None:
    describe([], described)
    with probe(build(), described) as child:
        facts = child.ask("host_facts")
    assert facts["hostname"] == os.uname().nodename
    assert facts["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert facts["cpu_count"] == psutil.cpu_count()
    assert facts["memory_bytes"] == psutil.virtual_memory().total
    assert facts["agent_version"] == importlib.metadata.version("gpu-baton")


def test_host_sample_is_within_the_machine(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.open()
    sample = host.sample()
    assert 0.0 <= sample.cpu_utilization_ratio <= 1.0
    assert 0 < sample.memory_used_bytes < psutil.virtual_memory().total
    assert 0 < sample.disk_free_bytes <= psutil.disk_usage(str(tmp_path)).total
    assert sample.load_1min >= 0.0


def test_a_state_directory_that_is_gone_has_no_room(tmp_path: Path) -> None:
    host = Host(tmp_path / "gone")
    host.open()
    assert host.sample().disk_free_bytes == 0


CpuTimes = namedtuple("CpuTimes", "user nice system idle iowait irq softirq steal guest guest_nice")


def test_cpu_ratio_is_of_the_span_whichever_thread_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter(
        [
            CpuTimes(100, 0, 50, 1000, 10, 0, 0, 0, 90, 0),
            CpuTimes(102, 0, 51, 1006, 11, 0, 0, 0, 92, 0),  # 3 s busy of 10 s
            CpuTimes(102, 0, 51, 1006, 11, 0, 0, 0, 92, 0),  # no tick since: the last answer
            CpuTimes(112, 0, 51, 1006, 11, 0, 0, 0, 99, 0),  # nothing but busy
            CpuTimes(112, 0, 51, 1018, 9, 0, 0, 0, 99, 0),  # idle; iowait ran backwards
        ]
    )
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))
    host = Host(tmp_path)
    host.open()
    ratios: list[float] = []
    for _ in range(4):
        thread = threading.Thread(target=lambda: ratios.append(host.sample().cpu_utilization_ratio))
        thread.start()
        thread.join()
    assert ratios == [0.3, 0.3, 1.0, 0.0]


def test_the_probe_is_the_port_and_closes_twice(tmp_path: Path) -> None:
    probe_here = NvmlProbe(tmp_path, allowed_uuids=())
    port: GpuProbe = probe_here
    with probe_here:
        assert port.sample().gpus == ()
        assert port.gpu_facts() == ()
    probe_here.close()
    assert probe_here.host_facts().driver_version == ""
