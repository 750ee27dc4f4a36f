"""The agent against the driver of this machine, where there is one: `pytest -m gpu`.

The stand-in answers as we read the manual; only a driver says whether we read it right.
"""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core import clean
from agent.telemetry.probe import NvmlProbe
from agent.telemetry.remote import monotonic_ms
from agent.telemetry.schedule import INVENTORY, PERIODS_MS

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
HELD_BYTES = 512 * MIB


def has_driver() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_driver(), reason="no NVIDIA driver here"),
]


class Clock:
    """The real one, ahead by what a test does not want to wait for."""

    ahead_ms = 0

    def now_ms(self) -> int:
        return monotonic_ms() + self.ahead_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def probe(tmp_path: Path, clock: Clock) -> Iterator[NvmlProbe]:
    with NvmlProbe(tmp_path, rate="watch", now_ms=clock.now_ms) as opened:
        yield opened


def run(code: str, **variables: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/trainers/sdk", **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_gpus_are_those_of_nvidia_smi(probe: NvmlProbe) -> None:
    query = "--query-gpu=uuid,name,memory.total,driver_version"
    told = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [[cell.strip() for cell in line.split(",")] for line in told.splitlines()]
    found = [(gpu.uuid, gpu.name, gpu.memory_bytes // MIB) for gpu in probe.gpu_facts()]
    assert found == [(uuid, name, int(total)) for uuid, name, total, _ in lines]
    assert probe.host_facts().driver_version == lines[0][3]
    assert probe.absence == ""


def test_nothing_that_is_asked_for_fails(probe: NvmlProbe, clock: Clock) -> None:
    """What is not supported is no failure; a wrong structure or argument is one."""
    probe.sample()
    clock.ahead_ms += PERIODS_MS["watch"][INVENTORY]  # activity is that between two readings
    sample = probe.sample()
    assert sample.reading is not None
    assert sample.reading.nvml_errors == ()
    assert {count for _, count in sample.reading.misses} == {0}
    for gpu in sample.gpus:
        assert gpu.error == ""
        known = (gpu.memory_used_bytes, gpu.temperature_celsius, gpu.power_mw, gpu.sm_clock_mhz)
        assert None not in known, gpu
        assert gpu.condition is not None
        assert gpu.usage is not None
        assert gpu.inventory is not None


def test_a_job_sees_the_gpu_of_its_uuid(probe: NvmlProbe) -> None:
    code = "import torch; print(torch.cuda.device_count(), torch.cuda.is_available())"
    assert run(code, CUDA_VISIBLE_DEVICES=probe.gpu_facts()[0].uuid) == "1 True"
    assert run(code, CUDA_VISIBLE_DEVICES="") == "0 False"


def test_a_process_that_went_leaves_its_gpu_clean(probe: NvmlProbe) -> None:
    uuid = probe.gpu_facts()[0].uuid
    code = (
        f"import torch; held = torch.zeros({HELD_BYTES}, dtype=torch.uint8, device='cuda');"
        "torch.cuda.synchronize(); print('ready', flush=True); input()"
    )
    (before,) = probe.occupancy([uuid])
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": uuid},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"ready\n"
    (during,) = probe.occupancy([uuid])
    assert during.memory_used_bytes is not None
    assert before.memory_used_bytes is not None
    assert during.memory_used_bytes - before.memory_used_bytes >= HELD_BYTES
    assert clean.judge(before, during).reason
    holder.kill()
    holder.communicate()
    until_ms, pause = monotonic_ms() + clean.CHECK_MS_MAX, threading.Event()
    while clean.judge(before, probe.occupancy([uuid])[0]).reason:
        assert monotonic_ms() < until_ms, probe.occupancy([uuid])
        pause.wait(0.1)


def test_a_fork_of_what_has_loaded_torch_has_the_gpu() -> None:
    """Warm trainers: no import may open the driver, or no fork can."""
    code = (
        "import os, trainers.warm, torch\n"
        "from agent.processes import forkserver\n"
        "assert not forkserver.why_not(), forkserver.why_not()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(int(torch.ones(3, device='cuda').sum().item()))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert run(code) == "3"
