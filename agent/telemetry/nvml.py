"""Read the GPUs of this box through NVML.

Problem: the obvious loop over indices with one `try` around it is wrong in four ways. An index
names another GPU after a reboot or a replaced card; one unsupported counter (energy on an old card,
utilization under MIG) hides all the others; a GPU that has fallen off the bus takes the healthy
ones with it; and an old driver lacks functions, each of which then raises on every reading for
ever.

So: enumerate once, keep each handle under its UUID, and read field by field. For every field there
are calls, newest first. A call that the driver does not have is forgotten; one that this GPU does
not support gives `None`; an answer that means the GPU itself is gone ends its reading with a
sentence. A GPU that was seen once is never dropped in silence: its handle stays, and its samples
say what is wrong.

NVML's units are made Baton's here and nowhere else: utilization per cent -> ratio. Memory (bytes),
power (mW), energy (mJ since the driver was loaded), clocks (MHz) and temperature (degrees Celsius)
are already ours.

Source: NVML API Reference Guide (docs.nvidia.com/deploy/nvml-api). It deprecates
`nvmlDeviceGetTemperature` and says of `nvmlDeviceGetMemoryInfo` that version 1 counts the driver's
own reservation as used. MIG instances are not enumerated: a GPU in MIG mode shows as one GPU.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

import pynvml

from agent.core.values import GpuCondition, GpuFacts, GpuOccupancy, GpuSample
from agent.telemetry.condition import Conditions, condition_after, pci_bus_id

_Handle = Any  # the binding's opaque pointer
_Call = Callable[[_Handle], float]

# Four times the largest box there is; a driver that claims more is not believed.
_GPUS_MAX: Final = 64

_NOT_IN_DRIVER: Final = (
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_ArgumentVersionMismatch,
)
_GPU_IS_GONE: Final = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "has fallen off the bus; reboot the node",
    pynvml.NVML_ERROR_RESET_REQUIRED: "needs a reset: nvidia-smi --gpu-reset",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "is no longer known to the driver; reboot the node",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "has no driver; load it and restart the agent",
    pynvml.NVML_ERROR_UNINITIALIZED: "has no driver; load it and restart the agent",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "has a new driver; restart the agent",
}


class NvmlGpus:
    """The GPUs of this box. Not thread-safe: `sampler.py` has one thread.

    `allowed_uuids` limits what is seen; an allowed GPU that the driver does not know is sampled
    with an error. `None` means all.
    """

    def __init__(self, allowed_uuids: Collection[str] | None = None) -> None:
        self._allowed_uuids = None if allowed_uuids is None else tuple(allowed_uuids)
        self._initialised = False
        self._handles: dict[str, _Handle] = {}
        self._reasons: dict[str, str] = {}
        self._gone: dict[str, GpuCondition | None] = {}
        self._conditions = Conditions()
        self._calls: dict[str, list[_Call]] = {}
        self.absence = "NVML was not opened"
        """Why there is no NVML, or a GPU less than the driver counts, as a sentence; else empty."""

    def open(self) -> bool:
        """Initialise NVML, if that was not done yet. No library or no driver is no error; see
        `absence`."""
        if not self._initialised:
            try:
                # else a box whose every GPU is lost could not say its driver version
                pynvml.nvmlInitWithFlags(pynvml.NVML_INIT_FLAG_NO_GPUS)
            except pynvml.NVMLError as error:
                self.absence = f"no GPUs: {error}"
                return False
            self._initialised = True
            self.absence = ""
            self._calls = {field: list(calls) for field, calls in _READINGS.items()}
        return True

    def driver_version(self) -> str:
        """For example `550.54.15`; empty when there is no library or no driver."""
        if not self._initialised:
            return ""
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError:
            return ""

    def adopt(self, uuids: Collection[str]) -> None:
        """Learn the handles of GPUs that are known from before, without a call about a GPU that
        could hang."""
        for uuid in uuids:
            try:
                self._handles[uuid] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            except pynvml.NVMLError as error:
                gone = _GPU_IS_GONE.get(error.value, "cannot be found")
                self._reasons[uuid] = f"{uuid} {gone} ({error})"
                self._gone[uuid] = condition_after(error)

    def enumerate(self) -> Iterator[GpuFacts]:
        """Learn handles by index, keep them by UUID. A GPU that cannot say its UUID is skipped."""
        try:
            count = min(pynvml.nvmlDeviceGetCount(), _GPUS_MAX)
        except pynvml.NVMLError as error:
            self.absence = f"no GPUs: {error}"
            return
        self.absence = ""
        for index in range(count):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                uuid = str(pynvml.nvmlDeviceGetUUID(handle))
                name = str(pynvml.nvmlDeviceGetName(handle))
            except pynvml.NVMLError as error:
                # nameless now; if it was seen before, its sample tells why
                self.absence = f"the GPU at index {index} cannot be named: {error}"
                continue
            if self._allowed_uuids is None or uuid in self._allowed_uuids:
                total = self._first_answer("memory_bytes", handle)
                self._handles[uuid] = handle
                bus_id = pci_bus_id(handle)
                yield GpuFacts(uuid, name, memory_bytes=int(total or 0), pci_bus_id=bus_id)

    def sample(self, uuid: str) -> GpuSample:
        """One reading. Of a GPU without a handle it says why there is none."""
        if uuid in self._handles:
            return self._sample(uuid, self._handles[uuid])
        reason = self.absence or "the driver does not know it"
        sentence = self._reasons.get(uuid, f"{uuid} cannot be read: {reason}")
        return GpuSample(uuid=uuid, error=sentence, condition=self._gone.get(uuid))

    def handles(self) -> Mapping[str, _Handle]:
        """Those known by now, by UUID; it may be asked in another thread."""
        return self._handles

    def usage(self, uuid: str) -> GpuOccupancy:
        """Who uses a GPU: its memory, and the processes that compute or draw on it. What cannot be
        read is `None`."""
        handle = self._handles.get(uuid)
        if handle is None:
            return GpuOccupancy(uuid)
        used = self._first_answer("memory_used_bytes", handle)
        return GpuOccupancy(uuid, None if used is None else int(used), running_pids(handle))

    def _sample(self, uuid: str, handle: _Handle) -> GpuSample:
        values: dict[str, Any] = {}
        failure = ""
        for field in _SAMPLED:
            try:
                values[field] = self._read(field, handle)
            except pynvml.NVMLError as error:
                if error.value in _GPU_IS_GONE:
                    reason = f"{uuid} {_GPU_IS_GONE[error.value]} ({error})"
                    return GpuSample(uuid, error=reason, condition=condition_after(error))
                failure = str(error)
        if failure and all(value is None for value in values.values()):
            return GpuSample(uuid=uuid, error=f"{uuid} answers nothing: {failure}")
        return GpuSample(uuid=uuid, condition=self._conditions.read(uuid, handle), **values)

    def _first_answer(self, field: str, handle: _Handle) -> float | None:
        try:
            return self._read(field, handle)
        except pynvml.NVMLError:
            return None

    def _read(self, field: str, handle: _Handle) -> float | None:
        """The answer of the newest call that this GPU supports; `None` when there is none.

        Raises `NVMLError` for every failure that is not about support.
        """
        calls = self._calls[field]
        for call in tuple(calls):
            try:
                return call(handle)
            except _NOT_IN_DRIVER:
                # one driver serves all GPUs, and does not grow functions while it runs
                calls.remove(call)
            except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
                continue
        return None


def running_pids(handle: _Handle) -> tuple[int, ...] | None:
    """Each process once, in order; `None` where the driver has no list of those that compute."""
    lists = []
    # By version: the binding's function without one raises no `NVMLError` where the driver is old.
    for call in (
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
    ):
        try:
            lists.append([int(process.pid) for process in call(handle)])
        except pynvml.NVMLError:
            if not lists:
                return None
    return tuple(sorted(dict.fromkeys(pid for pids in lists for pid in pids)))


def _utilization_ratio(handle: _Handle) -> float:
    return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100.0


def _memory_bytes_v2(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).total)


def _memory_bytes_v1(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)


def _memory_used_bytes_v2(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).used)


def _memory_used_bytes_v1(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def _temperature_celsius(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU))


def _temperature_celsius_old(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _power_mw(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetPowerUsage(handle))


def _energy_mj(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _sm_clock_mhz(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))


def _memory_clock_mhz(handle: _Handle) -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM))


_READINGS: Final[dict[str, tuple[_Call, ...]]] = {
    "memory_bytes": (_memory_bytes_v2, _memory_bytes_v1),
    "utilization_ratio": (_utilization_ratio,),
    "memory_used_bytes": (_memory_used_bytes_v2, _memory_used_bytes_v1),
    "temperature_celsius": (_temperature_celsius, _temperature_celsius_old),
    "power_mw": (_power_mw,),
    "energy_mj": (_energy_mj,),
    "sm_clock_mhz": (_sm_clock_mhz,),
    "memory_clock_mhz": (_memory_clock_mhz,),
}
_SAMPLED: Final = tuple(field for field in _READINGS if field != "memory_bytes")
