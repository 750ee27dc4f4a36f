"""The driver's errors, from a real sampler under the stand-in for NVML and from a log of the
kernel's form: each is told, at once, and none twice.
"""

import asyncio
import ctypes
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
from structlog.testing import capture_logs

from agent.core.values import DriverLoaded, GpuCondition, XidSeen
from agent.telemetry.kernel_log import KernelLog, Lost, parse_line
from agent.telemetry.probe import NvmlProbe
from agent.telemetry.remote import Deadlines
from agent.telemetry.xid_events import watch_events
from agent.telemetry.xids import Xids
from tests.fakenvml.build import (
    FakeGpu,
    build,
    describe,
    environment,
    h100,
    mig,
    rtx4090,
    with_details,
)

DEADLINE_S = 60.0
PATIENT = Deadlines(fast_ms=60_000, slow_ms=60_000)  # a shared machine may be slow
FALLEN = (
    b"4,1234,5678000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, name=python, "
    b"GPU has fallen off the bus.\n"
)


class Ears:
    """What was told, and a way to wait for it."""

    def __init__(self) -> None:
        self.words: list[XidSeen | DriverLoaded] = []
        self._heard = asyncio.Event()

    def __call__(self, word: XidSeen | DriverLoaded) -> None:
        self.words.append(word)
        self._heard.set()

    @property
    def xids(self) -> list[XidSeen]:
        return [word for word in self.words if isinstance(word, XidSeen)]

    async def until(self, predicate: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not predicate():
                self._heard.clear()
                await self._heard.wait()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the described GPUs."""
    described = tmp_path / "gpus.txt"
    for name, value in environment(build(), described).items():
        monkeypatch.setenv(name, value)
    return described


@pytest.fixture
async def pipe(tmp_path: Path) -> AsyncIterator[tuple[Xids, Ears, int]]:
    """Sources with a pipe for the kernel's log, open; and the end to write to."""
    os.mkfifo(tmp_path / "kmsg")
    xids, ears = Xids(str(tmp_path / "kmsg")), Ears()
    await xids.open(ears)
    writer = os.open(tmp_path / "kmsg", os.O_WRONLY)
    yield xids, ears, writer
    os.close(writer)
    xids.close()


def broken(*gpus: FakeGpu, number: int, code: int) -> list[FakeGpu]:
    """The same, the first with an error."""
    return [replace(gpus[0], xids=((number, code),)), *gpus[1:]]


def test_a_line_of_the_kernel() -> None:
    seen = parse_line(FALLEN.rstrip(), history=False)
    assert isinstance(seen, XidSeen)
    assert (seen.code, seen.pci_bus_id, seen.source) == (79, "0000:3b:00", "kernel")
    assert seen.sequence == 1234
    assert seen.text == "pid=4242, name=python, GPU has fallen off the bus."
    mig = parse_line(b"NVRM: Xid (PCI:00000001:0A:00 GPU-I:05): 43, Ch 8", history=True)
    assert isinstance(mig, XidSeen)
    assert (mig.code, mig.pci_bus_id, mig.history) == (43, "0001:0a:00", True)
    assert parse_line(b"6,1,2,-;NVRM: loading NVIDIA UNIX x86_64", history=False) == DriverLoaded()
    for other in (b"", b"6,1,2,-;usb 1-1: new device", b"NVRM: Xid (PCI:zz): x", b" SUBSYSTEM=pci"):
        assert parse_line(other, history=False) is None


async def test_the_kernels_log_is_told_as_it_comes(pipe: tuple[Xids, Ears, int]) -> None:
    _, ears, writer = pipe
    os.write(writer, b"6,1,2,-;something else\n" + FALLEN[:40])
    os.write(writer, FALLEN[40:])
    await ears.until(lambda: bool(ears.xids))
    assert [(seen.code, seen.history) for seen in ears.xids] == [(79, False)]


async def test_a_storm_is_told_in_few_words(pipe: tuple[Xids, Ears, int]) -> None:
    _, ears, writer = pipe
    os.set_blocking(writer, True)
    await asyncio.to_thread(os.write, writer, FALLEN * 5_000)
    await ears.until(lambda: sum(seen.count for seen in ears.xids) == 5_000)
    assert len(ears.xids) < 200


async def test_what_this_boot_said_before_is_told_at_the_start(tmp_path: Path) -> None:
    """From a file, which grows meanwhile."""
    log = tmp_path / "kmsg"
    log.write_bytes(FALLEN)
    xids, ears = Xids(str(log)), Ears()
    await xids.open(ears)
    assert [seen.history for seen in ears.xids] == [True]
    with log.open("ab") as file:
        file.write(FALLEN.replace(b": 79,", b": 95,"))
    await ears.until(lambda: len(ears.xids) == 2)
    assert (ears.xids[1].code, ears.xids[1].history) == (95, False)
    xids.close()


async def test_a_log_that_may_not_be_read_is_said_once(tmp_path: Path) -> None:
    xids = Xids(str(tmp_path / "none"))
    with capture_logs() as logged:
        await xids.open(Ears())
    assert [entry["event"] for entry in logged] == ["kernel_log.absent"]
    xids.close()
    xids.close()


def test_records_that_were_overwritten_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kmsg").write_bytes(b"")
    log = KernelLog(str(tmp_path / "kmsg"))
    log.open()
    answers: list[bytes | OSError] = [BrokenPipeError(), FALLEN, BlockingIOError()]

    def read(descriptor: int, size_bytes: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(os, "read", read)
    lost, seen = log.read(10)
    assert isinstance(lost, Lost)
    assert isinstance(seen, XidSeen)
    log.close()


async def test_nvml_tells_of_an_error_at_once(path: Path, tmp_path: Path) -> None:
    """What was before it was waited for is not repeated."""
    fleet = h100(2)
    describe(broken(*fleet, number=1, code=13), path)
    xids, ears = Xids(""), Ears()
    probe = NvmlProbe(tmp_path, event_descriptor=xids.make(), deadlines=PATIENT)
    probe.open()
    await xids.open(ears)
    probe.sample()
    number = 1
    while not ears.xids:  # until the sampler's thread waits for them
        number += 1
        describe(broken(*fleet, number=number, code=95), path)
        await asyncio.to_thread(probe.sample)
    assert {(seen.uuid, seen.code) for seen in ears.xids} == {(fleet[0].uuid, 95)}
    probe.close()
    xids.close()


def test_a_gpu_that_is_enumerated_again_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding makes a new object of each handle; the driver would tell of an error twice."""
    registered: list[int | None] = []
    waits = [pynvml.NVMLError_Timeout, pynvml.NVMLError_Timeout, pynvml.NVMLError_FunctionNotFound]

    def wait(events: object, timeout_ms: int) -> None:
        raise waits.pop(0)

    def register(handle: ctypes.c_void_p, kinds: int, events: object) -> None:
        registered.append(handle.value)

    monkeypatch.setattr(pynvml, "nvmlEventSetCreate", object)
    monkeypatch.setattr(pynvml, "nvmlEventSetWait_v2", wait)
    monkeypatch.setattr(pynvml, "nvmlDeviceRegisterEvents", register)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch_events(lambda: {"GPU-a": ctypes.c_void_p(7), "GPU-b": ctypes.c_void_p(8)}, theirs)
    assert registered == [7, 8]
    assert not waits


async def test_an_error_of_a_gpu_in_mig_mode_is_told_of_its_instances(
    path: Path, tmp_path: Path
) -> None:
    whole, *instances = mig(replace(h100(1)[0], pci_bus=0x3B), 2)
    describe([whole, *instances], path)
    xids, ears = Xids(""), Ears()
    probe = NvmlProbe(tmp_path, event_descriptor=xids.make(), deadlines=PATIENT)
    probe.open()
    await xids.open(ears)
    assert [facts.pci_bus_id for facts in probe.gpu_facts()] == ["0000:3b:00"] * 2
    number = 0
    while len({seen.uuid for seen in ears.xids}) < 2:  # until the sampler's thread waits for them
        number += 1
        describe([replace(whole, xids=((number, 95),)), *instances], path)
        await asyncio.to_thread(probe.sample)
    assert {seen.uuid for seen in ears.xids} == {gpu.uuid for gpu in instances}
    probe.close()
    xids.close()


def test_the_drivers_word_on_a_gpu(path: Path, tmp_path: Path) -> None:
    gpus = [
        with_details(replace(h100(1)[0], pci_bus=0x3B), recovery_action=1, remapped_rows_failed=1),
        replace(rtx4090(1, node="n2")[0]),
        replace(h100(1, node="n3")[0], state="lost"),
        replace(h100(1, node="n4")[0], state="reset_required"),
    ]
    healthy = [replace(gpu, state="ok") for gpu in gpus]
    describe(healthy, path)
    with NvmlProbe(tmp_path, deadlines=PATIENT) as probe:
        facts = {facts.uuid: facts for facts in probe.gpu_facts()}
        describe(gpus, path)
        read = {sample.uuid: sample.condition for sample in probe.sample().gpus}
    assert facts[gpus[0].uuid].pci_bus_id == "0000:3b:00"
    assert list(read.values()) == [
        GpuCondition("", 1, True, False),
        GpuCondition("", None, None, None),
        GpuCondition("lost"),
        GpuCondition("reset_required"),
    ]


@pytest.mark.parametrize("symbol", ["nvmlDeviceGetFieldValues", "nvmlDeviceGetRemappedRows"])
def test_an_older_driver_says_less_and_nothing_wrong(
    symbol: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build(without=[symbol])))
    describe([with_details(h100(1)[0], recovery_action=0)], path)
    with NvmlProbe(tmp_path, deadlines=PATIENT) as probe:
        (sample,) = probe.sample().gpus
    assert sample.condition is not None
    assert sample.condition.state == ""
    assert None in (sample.condition.recovery_action, sample.condition.rows_failed)
