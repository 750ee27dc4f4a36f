"""Read what is asked of a GPU every ten seconds: who uses it, how busy it really was, its errors.

Problem: a utilization that is read once a second misses what happens in between, and the list of
processes costs the driver's lock for milliseconds, which trainers wait for. The driver keeps a
buffer of samples, some seconds long, which costs one reading: lowest, highest and the 95th
percentile say more than ten readings. What can be asked in one batch is (each entry has a return
code of its own), so error counters cost one call and not six.

A buffer is asked for what came after the last reading: nothing is counted twice, and no new sample
is no answer (`None`), not a zero.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import pynvml

from agent.core.values import GpuProcess, GpuUsage
from agent.telemetry.calls import Asking, Call, Driver, Handle, value_of

# More than any share is cut into; a list that is longer is cut, and its sum is then a lower bound.
PROCESSES_MAX: Final = 128

_BATCH: Final = (
    pynvml.NVML_FI_DEV_ECC_SBE_VOL_TOTAL,
    pynvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL,
    pynvml.NVML_FI_DEV_ECC_SBE_AGG_TOTAL,
    pynvml.NVML_FI_DEV_ECC_DBE_AGG_TOTAL,
    pynvml.NVML_FI_DEV_MEMORY_TEMP,
    pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER,
)
_FIELDS: Final = Call.of("nvmlDeviceGetFieldValues", _BATCH)
_ECC: Final = {
    "ecc_volatile_corrected": pynvml.NVML_FI_DEV_ECC_SBE_VOL_TOTAL,
    "ecc_volatile_uncorrected": pynvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL,
    "ecc_aggregate_corrected": pynvml.NVML_FI_DEV_ECC_SBE_AGG_TOTAL,
    "ecc_aggregate_uncorrected": pynvml.NVML_FI_DEV_ECC_DBE_AGG_TOTAL,
}
_PROCESSES: Final = (
    Call.of("nvmlDeviceGetComputeRunningProcesses_v3"),
    Call.of("nvmlDeviceGetComputeRunningProcesses_v2"),
)
_GRAPHICS: Final = (
    Call.of("nvmlDeviceGetGraphicsRunningProcesses_v3"),
    Call.of("nvmlDeviceGetGraphicsRunningProcesses_v2"),
)
# By field: the driver's buffer, and what its figures are divided by.
_BUFFERS: Final = {
    "utilization_ratio": (pynvml.NVML_GPU_UTILIZATION_SAMPLES, 100),
    "memory_utilization_ratio": (pynvml.NVML_MEMORY_UTILIZATION_SAMPLES, 100),
    "power_mw": (pynvml.NVML_TOTAL_POWER_SAMPLES, 1),
}


class UsageReader:
    """Knows, by GPU and buffer, the last sample that was seen."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._seen_us: dict[tuple[str, int], int] = {}

    def read(self, uuid: str, handle: Handle) -> GpuUsage:
        asking = Asking(self._driver, handle)
        fields = asking.fields(_FIELDS)
        values: dict[str, Any] = {name: _whole(fields.get(id_)) for name, id_ in _ECC.items()}
        if not fields:
            values = _ecc_one_by_one(asking)
        values["memory_temperature_celsius"] = _whole(fields.get(pynvml.NVML_FI_DEV_MEMORY_TEMP))
        values["pcie_replays"] = _whole(fields.get(pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER))
        for name in _BUFFERS:
            values |= self._spread(asking, uuid, name)
        return GpuUsage(uuid=uuid, processes=_processes(asking), **values)

    def _spread(self, asking: Asking, uuid: str, name: str) -> dict[str, float]:
        buffer, divisor = _BUFFERS[name]
        seen_us = self._seen_us.get((uuid, buffer), 0)
        call = Call("nvmlDeviceGetSamples", partial(_new_samples, buffer, seen_us))
        value_type, samples = asking.say(call) or (0, ())
        samples = [sample for sample in samples if sample.timeStamp > seen_us]
        if not samples:
            return {}
        self._seen_us[uuid, buffer] = max(sample.timeStamp for sample in samples)
        found = sorted(value_of(value_type, sample.sampleValue) / divisor for sample in samples)
        figures = {"min": found[0], "max": found[-1], "p95": percentile(found, 0.95)}
        whole = divisor == 1
        return {
            f"{name}_{which}": int(value) if whole else value for which, value in figures.items()
        }


def held_bytes(asking: Asking) -> dict[int, int | None] | None:
    """How much memory each process holds that computes or draws, by pid in order, `None` where it
    is not told; `None` where the driver has no list of those that compute."""
    computing = asking.say(*_PROCESSES)
    if computing is None:
        return None
    drawing = asking.say(*_GRAPHICS) or ()
    held: dict[int, int | None] = {}
    for process in (*computing, *drawing):  # one in both lists has its memory in both
        pid, used_bytes = int(process.pid), process.usedGpuMemory
        known_bytes = held.get(pid)
        if used_bytes is not None:
            held[pid] = max(int(used_bytes), known_bytes or 0)
        else:
            held[pid] = known_bytes
    return dict(sorted(held.items()))


def percentile(ordered: Sequence[float], share: float) -> float:
    """By nearest rank: a figure that was really read. `ordered` is not empty."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _new_samples(buffer: int, seen_us: int, handle: Handle) -> Any:
    try:
        return pynvml.nvmlDeviceGetSamples(handle, buffer, seen_us)
    except pynvml.NVMLError_NotFound:
        return None  # none since; that is no failure


def _processes(asking: Asking) -> tuple[GpuProcess, ...] | None:
    listed = asking.say(*_PROCESSES)
    if listed is None:
        return None
    return tuple(
        GpuProcess(int(process.pid), _whole(process.usedGpuMemory))
        for process in listed[:PROCESSES_MAX]
    )


def _ecc_one_by_one(asking: Asking) -> dict[str, int | None]:
    """For a driver that has no batches."""
    kinds = {
        "corrected": pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        "uncorrected": pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    }
    counters = {"volatile": pynvml.NVML_VOLATILE_ECC, "aggregate": pynvml.NVML_AGGREGATE_ECC}
    return {
        f"ecc_{since}_{kind}": asking.say(
            Call.of("nvmlDeviceGetTotalEccErrors", kinds[kind], counters[since])
        )
        for since in counters
        for kind in kinds
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
