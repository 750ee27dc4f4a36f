"""A driver that does not answer, and a sampler that does not: the real process, the real binding.

Problem: what a sick driver does to its caller can be seen only in a process that is really blocked.
The described GPUs block their callers until the description says otherwise; deadlines pass once
they do, and the five minutes between two replacements on a clock of the test's own.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from agent.telemetry.probe import SEEN_NAME
from agent.telemetry.remote import NO_DRIVER_AGAIN_MS, SAMPLER_BYTES_MAX, Deadlines, RemoteGpus
from agent.telemetry.watch import MISSES_MAX, REPLACEMENT_MS
from tests.agent.sampler_worlds import (
    POLLS_MAX,
    Box,
    all_read,
    is_unknown,
    until,
)
from tests.fakenvml.build import (
    DRIVER_VERSION,
    SONAME,
    FakeGpu,
    a100,
    describe,
    h100,
    h200,
    rtx4090,
)

ROOT = Path(__file__).resolve().parents[2]


def hanging(gpu: FakeGpu) -> FakeGpu:
    return replace(gpu, state="hangs")


def test_sixteen_gpus(box: Box) -> None:
    fleet = (*h100(4, node="a"), *h200(4, node="b"), *a100(4, node="c"), *rtx4090(4, node="d"))
    box.describe(*(replace(gpu, power_mw=1_000 + index) for index, gpu in enumerate(fleet)))
    gpus = box.gpus()
    gpus.open()
    samples = until(gpus, all_read)
    assert [sample.uuid for sample in samples] == [gpu.uuid for gpu in fleet]
    assert [sample.power_mw for sample in samples] == [1_000 + index for index in range(16)]
    gpus.close()


def test_zero_gpus_miss_nothing(box: Box) -> None:
    box.describe()
    gpus = box.gpus()
    with capture_logs() as logs:
        gpus.open()
        assert [gpus.samples() for _ in range(MISSES_MAX)] == [()] * MISSES_MAX
    absence = "no GPUs: the driver counts none"
    assert (gpus.facts(), gpus.absence, gpus.driver_version) == ((), absence, DRIVER_VERSION)
    assert logs == []
    gpus.close()


def test_no_library_is_an_answer(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    (box.directory / SONAME).write_bytes(b"")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(box.directory))
    gpus = box.gpus("GPU-x")
    with capture_logs() as logs:
        gpus.open()
        (sample,) = gpus.samples()
    assert gpus.absence == "no GPUs: NVML Shared Library Not Found (no driver is installed)"
    assert sample.error == f"GPU-x cannot be read: {gpus.absence}"
    assert logs == []
    gpus.close()


def test_a_library_of_another_version_than_the_driver(box: Box) -> None:
    box.describe(*h100(2), driver_state="mismatch")
    gpus = box.gpus("GPU-x")
    gpus.open()
    assert (gpus.facts(), gpus.driver_version) == ((), "")
    assert gpus.absence == (
        "no GPUs: RM has detected an NVML/RM version mismatch (the driver was upgraded: reboot)"
    )
    assert gpus.samples()[0].error == f"GPU-x cannot be read: {gpus.absence}"
    gpus.close()


def test_a_driver_that_is_updated_while_it_is_read(box: Box, opened: RemoteGpus) -> None:
    until(opened, all_read)
    mismatch = tuple((field, 18) for field in ("utilization", "power"))
    box.describe(*(replace(gpu, failing=mismatch) for gpu in h100(3)))
    for sample in until(opened, lambda samples: not all_read(samples)):
        assert "has a new driver, which is opened anew" in sample.error


def test_a_driver_call_that_blocks_for_45_s_hides_its_gpu_and_those_behind_it(
    box: Box, opened: RemoteGpus
) -> None:
    """NVIDIA/DCGM #313. What it says when it is released is old, and not believed."""
    first, second, third = h100(3)
    until(opened, all_read)
    pid = opened.pid()
    box.describe(replace(first, power_mw=1), hanging(second), third)
    read, suspect, behind = until(opened, lambda samples: samples[0].power_mw == 1)
    assert read.error == ""
    assert is_unknown(suspect)
    assert "points to this GPU" in suspect.error
    assert is_unknown(behind)
    assert f"by {second.uuid}" in behind.error

    box.now_ms += 45_000
    later = opened.samples()
    assert all(is_unknown(sample) for sample in later), "no value is repeated"
    assert "45.0 s" in later[1].error

    box.describe(*(replace(gpu, power_mw=2) for gpu in h100(3)))
    assert [sample.power_mw for sample in until(opened, all_read)] == [2, 2, 2]
    assert opened.pid() == pid


def test_three_misses_replace_the_sampler_and_the_others_are_read_on(
    box: Box, opened: RemoteGpus
) -> None:
    first, second, third = h100(3)
    until(opened, all_read)
    pid = opened.pid()
    box.describe(hanging(first), second, third)
    with capture_logs() as logs:
        until(opened, lambda _: opened.pid() != pid)
    assert [line["event"] for line in logs] == [
        "sampler.late",
        "gpu.driver_unresponsive",
        "sampler.replaced",
    ]
    assert logs[1]["gpu"] == first.uuid

    suspect, *others = until(opened, lambda samples: all_read(samples[1:]))
    assert is_unknown(suspect)
    assert "asked again in 300 s" in suspect.error
    assert all(sample.power_mw is not None for sample in others)
    assert [gpu.uuid for gpu in (first, second, third)] == [facts.uuid for facts in opened.facts()]

    box.now_ms += REPLACEMENT_MS
    suspect, *others = until(opened, lambda samples: all_read(samples[1:]))
    assert "points to this GPU" in suspect.error, "it was asked, after the others"
    box.describe(*h100(3))
    until(opened, all_read)


def test_a_driver_that_blocks_for_everybody_is_to_blame_itself(
    box: Box, opened: RemoteGpus
) -> None:
    box.describe(*h100(3), driver_state="hangs")
    samples = until(opened, lambda samples: is_unknown(samples[0]))
    assert all(is_unknown(sample) for sample in samples)
    assert all("points to the driver or the access" in sample.error for sample in samples)


def test_a_gpu_falls_off_the_bus_while_another_blocks(box: Box, opened: RemoteGpus) -> None:
    lost, healthy, blocked = h100(3)
    until(opened, all_read)
    box.describe(replace(lost, state="lost"), replace(healthy, power_mw=5), hanging(blocked))
    samples = until(opened, lambda samples: samples[1].power_mw == 5)
    assert "has fallen off the bus" in samples[0].error
    assert samples[1].error == ""
    assert is_unknown(samples[2])


def test_a_sampler_that_is_frozen_while_it_counts_as_running(box: Box, opened: RemoteGpus) -> None:
    """NVIDIA/NVSentinel #1477: the process was there, and had said nothing for days."""
    until(opened, all_read)
    frozen = opened.pid()
    os.kill(frozen, signal.SIGSTOP)
    box.now_ms += 3 * 24 * 3_600_000
    with capture_logs() as logs:
        samples = [opened.samples() for _ in range(MISSES_MAX)]
    assert all(is_unknown(sample) for reading in samples for sample in reading)
    assert "gpu.driver_unresponsive" in [line["event"] for line in logs]
    assert opened.pid() != frozen
    until(opened, lambda samples: all_read(samples[1:]))


def test_a_sampler_that_was_killed_is_replaced_once_in_five_minutes(
    box: Box, opened: RemoteGpus
) -> None:
    until(opened, all_read)
    for waits in (False, True):
        killed = opened.pid()
        os.kill(killed, signal.SIGKILL)
        samples = until(opened, lambda samples: is_unknown(samples[0]))
        assert "the sampler ended" in samples[0].error
        assert (opened.pid() == 0) is waits
        box.now_ms += REPLACEMENT_MS if waits else 0
        until(opened, all_read)
        assert opened.pid() not in (0, killed)


@pytest.mark.parametrize(
    "said", [b"nonsense", b"[]", b'{"id": 99}', b'{"id": 1, "sample": {"uuid": 7}}']
)
def test_a_sampler_that_talks_nonsense_is_ended(box: Box, said: bytes) -> None:
    script = f"import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.send({said!r})"
    command = (sys.executable, "-c", f"{script}; s.recv(99); s.recv(99)")
    gpus = box.gpus("GPU-x", command=command)
    with capture_logs() as logs:
        gpus.open()
    assert gpus.absence.startswith("the sampler ended: it ")
    assert [line["event"] for line in logs] == ["sampler.ended"]
    assert gpus.pid() == 0
    assert is_unknown(gpus.samples()[0])
    gpus.close()


ANSWERS = """
import ctypes, json, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
while said := channel.recv(9999):
    answer = {"id": json.loads(said)["id"], "done": True}
    %s
    channel.send(json.dumps(answer).encode())
"""


def test_a_sampler_that_floods_its_standard_error_is_not_held_up(box: Box) -> None:
    """And the last of it is told with its end."""
    flood = "ctypes.CDLL(None).write(2, b'noise ' * 9999, 59_994)"  # as a library does
    command = (sys.executable, "-c", ANSWERS % flood)
    gpus = box.gpus("GPU-x", command=command)
    with capture_logs() as logs:
        gpus.open()
        for _ in range(20):
            gpus.samples()
        assert logs == []
        pid = gpus.pid()
        os.kill(pid, signal.SIGKILL)
        until(gpus, lambda _: gpus.pid() != pid)
    assert "; it said: " in logs[0]["reason"]
    assert len(logs[0]["reason"]) < 2_000
    gpus.close()


def test_a_sampler_that_eats_memory_ends_and_not_its_box(box: Box) -> None:
    eaten = f"hoard = [b'x' * (64 << 20), b'y' * {SAMPLER_BYTES_MAX}]"
    gpus = box.gpus("GPU-x", command=(sys.executable, "-c", ANSWERS % eaten))
    with capture_logs() as logs:
        gpus.open()
    assert logs[0]["event"] == "sampler.ended"
    assert "it said: MemoryError" in logs[0]["reason"]
    gpus.close()


def test_a_sampler_that_cannot_be_started_is_no_error(box: Box) -> None:
    gpus = box.gpus("GPU-x", command=("/nonexistent",))
    gpus.open()
    assert "No such file" in gpus.absence
    assert "the sampler ended" in gpus.samples()[0].error
    gpus.close()


def test_an_agent_that_starts_while_the_driver_hangs_keeps_its_gpus(box: Box) -> None:
    """Jobs run on them: a hello without them would take them away."""
    box.describe(*h100(2))
    with box.probe() as probe:
        facts = probe.gpu_facts()
    box.describe(*h100(2), driver_state="hangs")
    with box.probe() as probe:
        assert "its GPUs are those of before" in probe.absence
        assert probe.gpu_facts() == facts
        assert len(facts) == 2
        assert probe.host_facts().driver_version == DRIVER_VERSION
        sample = probe.sample()
        assert sample.host.memory_used_bytes > 0
        assert [is_unknown(gpu) for gpu in sample.gpus] == [True, True]
        box.describe(*h100(2))
        for _ in range(POLLS_MAX):
            if all_read(probe.sample().gpus):
                break
        else:
            raise AssertionError("the driver was released, and its GPUs were not read")


def test_nobody_waits_longer_than_a_deadline(box: Box) -> None:
    """By the clock, for once: of one that never answers."""
    script = (
        "import socket, sys, signal; s = socket.socket(fileno=int(sys.argv[1])); signal.pause()"
    )
    command = (sys.executable, "-c", script)
    deadlines = Deadlines(fast_ms=2, slow_ms=2, first_ms=1)
    gpus = RemoteGpus(["GPU-x"], deadlines=deadlines, command=command, now_ms=lambda: box.now_ms)
    with capture_logs() as logs:
        gpus.open()
        assert gpus.absence == "the driver did not answer within 1 ms"
        assert [is_unknown(sample) for sample in gpus.samples()] == [True]
    assert [line["event"] for line in logs] == ["sampler.late"]
    gpus.close()


def test_gpus_that_the_driver_names_late_are_found(box: Box) -> None:
    box.describe(*h100(2), driver_state="hangs")
    gpus = box.gpus()
    gpus.open()
    assert gpus.facts() == ()
    box.describe(*h100(2))
    samples = until(gpus, lambda samples: len(samples) == 2 and all_read(samples))
    assert [facts.uuid for facts in gpus.facts()] == [sample.uuid for sample in samples]
    gpus.close()


def test_a_driver_that_is_loaded_after_the_start_is_found_within_a_minute(box: Box) -> None:
    describe(h100(2), box.path, driver_version="")
    gpus = box.gpus()
    gpus.open()
    assert (gpus.samples(), gpus.driver_version) == ((), "")
    box.describe(*h100(2))
    box.now_ms = NO_DRIVER_AGAIN_MS - 1
    assert gpus.samples() == ()
    box.now_ms = NO_DRIVER_AGAIN_MS
    samples = gpus.samples()
    assert [sample.uuid for sample in samples] == [gpu.uuid for gpu in h100(2)]
    assert all_read(samples)
    assert (gpus.driver_version, gpus.absence) == (DRIVER_VERSION, "")
    gpus.close()


@pytest.mark.parametrize("kept", ["of another boot", "torn", "none"])
def test_gpus_of_another_boot_are_forgotten(box: Box, kept: str) -> None:
    box.describe(*h100(2))
    with box.probe() as probe:
        assert len(probe.gpu_facts()) == 2
    seen = box.directory / SEEN_NAME
    if kept == "none":
        seen.unlink()
    elif kept == "torn":
        seen.write_bytes(seen.read_bytes()[:-9])
    else:
        seen.write_bytes(seen.read_bytes().replace(b'"boot_id":"', b'"boot_id":"0'))
    box.describe(*h100(2), driver_state="hangs")
    with box.probe(Deadlines(first_ms=100)) as probe:
        assert probe.absence == "the driver did not answer within 100 ms"
        assert probe.gpu_facts() == ()


def test_a_sampler_ends_with_its_agent_even_when_it_is_blocked(box: Box) -> None:
    box.describe(*h100(1), driver_state="hangs")
    script = (
        "from agent.telemetry.remote import *; gpus = RemoteGpus(deadlines=Deadlines(first_ms=1));"
        "gpus.open(); print(gpus.pid(), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as agent:
        assert agent.stdout is not None
        sampler = psutil.Process(int(_pid_line(agent)))
        agent.kill()
    psutil.wait_procs([sampler], timeout=60)
    assert not sampler.is_running() or sampler.status() == psutil.STATUS_ZOMBIE


def _pid_line(agent: subprocess.Popen[bytes]) -> bytes:
    """Past what is logged."""
    assert agent.stdout is not None
    for line in agent.stdout:
        if line.strip().isdigit():
            return line
    raise AssertionError("it said no pid")


def imported(module: str) -> set[str]:
    """By a new interpreter that imports this module."""
    script = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", script]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return set(said.stdout.split())


AS_A_PROGRAM = """
import os, runpy, socket, sys
ours, its = socket.socketpair()
ours.close()
sys.argv = ["", str(its.detach()), str(os.getppid())]
runpy.run_module("agent.telemetry.sampler", run_name="__main__")
print(*sys.modules)
"""


def test_the_sampler_imports_little_and_the_agent_no_binding() -> None:
    command = [sys.executable, "-P", "-c", AS_A_PROGRAM]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    modules = set(said.stdout.split())
    assert "pynvml" in modules
    assert not modules & {"grpc", "google", "asyncio", "msgspec", "structlog", "psutil", "sqlite3"}
    assert not modules & {"pathlib", "shutil", "subprocess", "tempfile"}
    assert {name for name in modules if name.startswith("agent.")} == {
        "agent.core",
        "agent.core.values",
        "agent.telemetry",
        "agent.telemetry.calls",
        "agent.telemetry.condition",
        "agent.telemetry.inventory",
        "agent.telemetry.nvml",
        "agent.telemetry.services",
        "agent.telemetry.usage",
        "agent.telemetry.xid_events",
    }
    later = {"pynvml", "email", "importlib.metadata", "grpc_reflection.v1alpha.reflection"}
    assert not imported("agent.main") & later
