"""Boxes of described GPUs with a real sampler, for tests of what a driver does while it is read."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from agent.core.values import GpuSample
from agent.telemetry.probe import NvmlProbe
from agent.telemetry.remote import SAMPLER, Deadlines, RemoteGpus
from tests.fakenvml.build import FakeGpu, build, describe, environment

DEADLINES = Deadlines(fast_ms=200, slow_ms=200)
POLLS_MAX = 200  # of a deadline each, for what comes when a process has started
VALUES = [
    field.name for field in fields(GpuSample) if field.name not in ("uuid", "error", "age_ms")
]


class Box:
    """One box: its GPUs as described, and a clock."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.path = directory / "gpus.txt"
        self.now_ms = 0
        for name, value in environment(build(), self.path).items():
            monkeypatch.setenv(name, value)

    def gpus(
        self, *allowed: str, command: tuple[str, ...] = SAMPLER, deadlines: Deadlines = DEADLINES
    ) -> RemoteGpus:
        return RemoteGpus(
            allowed or None, deadlines=deadlines, command=command, now_ms=lambda: self.now_ms
        )

    def probe(self, deadlines: Deadlines = DEADLINES) -> NvmlProbe:
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
