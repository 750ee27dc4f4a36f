"""Boxes of described GPUs with a real sampler, for tests of what a driver does while it is read.

Problem: to the agent a sampler that is slow and one that hangs are the same, so a test that waits
for a deadline tests the machine. Here a deadline passes once the sampler is known to stand still,
and not by the clock: the stand-in for NVML says whom it blocks, the kernel who was stopped.
"""

import select
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from agent.core.values import GpuSample
from agent.processes.shim import stat_fields
from agent.telemetry import probe
from agent.telemetry.probe import NvmlProbe
from agent.telemetry.remote import SAMPLER, Answer, Deadlines, RemoteGpus
from tests.fakenvml.build import HANGS_VARIABLE, FakeGpu, build, describe, environment

PATIENCE_S = 60.0  # for a process on a busy machine; reached only when the test fails
LOOK_S = 0.002
POLLS_MAX = 200  # for what comes when a process has started
VALUES = [
    field.name for field in fields(GpuSample) if field.name not in ("uuid", "error", "age_ms")
]


class PatientGpus(RemoteGpus):
    """Waits for an answer until `stands` says of its sampler's pid that there will be none."""

    def __init__(self, *arguments: Any, stands: Callable[[int], bool], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._stands = stands

    def _hear(self, end_s: float) -> Answer:
        assert self._channel is not None
        patience_ends_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < patience_ends_s:
            stands = self._stands(self.pid())  # first: it may have answered before it stood still
            if select.select([self._channel], [], [], 0.0 if stands else LOOK_S)[0]:
                return super()._hear(patience_ends_s + PATIENCE_S)
            if stands:
                raise TimeoutError
        raise AssertionError("the sampler neither answers nor stands still")


class Box:
    """One box: its GPUs as described, and a clock."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.path = directory / "gpus.txt"
        self.now_ms = 0
        self._hangs = directory / "hangs.txt"
        monkeypatch.setenv(HANGS_VARIABLE, str(self._hangs))
        for name, value in environment(build(), self.path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(probe, "RemoteGpus", self._patient)

    def gpus(
        self, *allowed: str, command: tuple[str, ...] = SAMPLER, deadlines: Deadlines | None = None
    ) -> RemoteGpus:
        return self._patient(
            allowed or None, deadlines=deadlines, command=command, now_ms=lambda: self.now_ms
        )

    def _patient(self, *arguments: Any, **named: Any) -> PatientGpus:
        return PatientGpus(*arguments, stands=self._stands, **named)

    def _stands(self, pid: int) -> bool:
        """It was stopped, or is blocked by the GPUs as they are described now."""
        if stat_fields(pid)[:1] == [b"T"]:
            return True
        if not self._hangs.exists():
            return False
        described = self.path.stat()
        blocked = f"{pid} {described.st_ino} {described.st_mtime_ns}"
        return self._hangs.read_text() == blocked

    def probe(self, deadlines: Deadlines | None = None) -> NvmlProbe:
        return NvmlProbe(self.directory, deadlines=deadlines, now_ms=lambda: self.now_ms)

    def describe(self, *gpus: FakeGpu, driver_state: str = "ok") -> None:
        describe(gpus, self.path, driver_state=driver_state)


def until(
    gpus: RemoteGpus, holds: Callable[[tuple[GpuSample, ...]], bool]
) -> tuple[GpuSample, ...]:
    for _ in range(POLLS_MAX):
        samples = gpus.samples()
        if holds(samples):
            return samples
    raise AssertionError(f"never came: {samples}")


def all_read(samples: tuple[GpuSample, ...]) -> bool:
    return all(not sample.error for sample in samples)


def is_unknown(sample: GpuSample) -> bool:
    return "is unknown" in sample.error and all(getattr(sample, name) is None for name in VALUES)
