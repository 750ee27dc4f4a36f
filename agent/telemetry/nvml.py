"""Read the GPUs of this box through NVML.

Problem: the obvious loop over indices with one `try` around it is wrong in four ways. An index
names another GPU after a reboot or a replaced card; one unsupported counter (energy on an old card,
utilization under MIG) hides all the others; a GPU that has fallen off the bus takes the healthy
ones with it; and an old driver lacks functions, each of which then raises on every reading for
ever.

So: enumerate seldom, keep each handle under its UUID, read field by field. For every field there
are calls, newest first (`calls.py`); an answer that means the GPU itself is gone ends its reading
with a sentence. A GPU that was seen once is never dropped in silence: its handle stays, and its
samples say what is wrong. `usage.py` and `inventory.py` read what is asked less often. A MIG
instance has its GPU's place on the bus, since the kernel's log names nothing else.

NVML's units are made Baton's here and nowhere else: utilization per cent -> ratio. Memory (bytes),
power (mW), energy (mJ since the driver was loaded), clocks (MHz) and temperature (degrees Celsius)
are already ours.

Source: NVML API Reference Guide (docs.nvidia.com/deploy/nvml-api). It deprecates
`nvmlDeviceGetTemperature` and says of `nvmlDeviceGetMemoryInfo` that version 1 counts the driver's
own reservation as used.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import pynvml

from agent.core.values import (
    GpuCondition,
    GpuFacts,
    GpuInventory,
    GpuOccupancy,
    GpuSample,
    GpuUsage,
)
from agent.telemetry.calls import GPU_IS_GONE, Asking, Call, Driver, Handle
from agent.telemetry.condition import condition_after, pci_bus_id, read_condition
from agent.telemetry.inventory import InventoryReader
from agent.telemetry.services import is_of_another_service
from agent.telemetry.usage import UsageReader, held_bytes

# Four times the largest box there is; a driver that claims more is not believed.
_GPUS_MAX: Final = 64
# What a GPU is cut into at most, seven today, with room for the next one.
_INSTANCES_MAX: Final = 16


class NvmlGpus:
    """The GPUs of this box. Not thread-safe: `sampler.py` has one thread.

    `allowed_uuids` limits what is seen; an allowed GPU that the driver does not know is sampled
    with an error. `None` means all.
    """

    def __init__(
        self, allowed_uuids: Collection[str] | None = None, *, pcie_throughput: bool = False
    ) -> None:
        self._allowed_uuids = None if allowed_uuids is None else tuple(allowed_uuids)
        self._initialised = False
        self._handles: dict[str, Handle] = {}
        self._reasons: dict[str, str] = {}
        self._gone: dict[str, GpuCondition | None] = {}
        self._wholes: dict[str, Handle] = {}  # by instance, the GPU that it is of
        self._listed: list[str] = []
        self._driver = Driver()
        self._usage = UsageReader(self._driver)
        self._inventory = InventoryReader(self._driver, pcie_throughput=pcie_throughput)
        self.absence = "NVML was not opened"
        """Why there is no NVML, or a GPU less than the driver counts, as a sentence; else empty."""
        self.outdated = ""
        """Why only another process can go on: a library stays as it was loaded. Else empty."""

    def open(self, *, again: bool = False) -> bool:
        """Initialise NVML, if that was not done yet. No library or no driver is no error; see
        `absence`. `again`: some time after it has failed, when the library may be another one."""
        if not self._initialised:
            try:
                # else a box whose every GPU is lost could not say its driver version
                pynvml.nvmlInitWithFlags(pynvml.NVML_INIT_FLAG_NO_GPUS)
            except pynvml.NVMLError as error:
                self.absence = _no_gpus(error)
                if again and error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
                    self.outdated = self.absence
                return False
            self._initialised = True
            self.absence = ""
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
                gone = GPU_IS_GONE.get(error.value, "cannot be found")
                self._reasons[uuid] = f"{uuid} {gone} ({error})"
                self._gone[uuid] = condition_after(error)

    def enumerate(self) -> Iterator[GpuFacts]:
        """Learn handles by index, keep them by UUID. A GPU that cannot say its UUID is skipped.
        One in MIG mode is no place for a job, but each of its instances is."""
        self._listed.clear()
        try:
            count = min(pynvml.nvmlDeviceGetCount(), _GPUS_MAX)
        except pynvml.NVMLError as error:
            self.absence = _no_gpus(error)
            self._note_change(error)
            return
        self.absence = "" if count else "no GPUs: the driver counts none"
        for index in range(count):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                uuid = str(pynvml.nvmlDeviceGetUUID(handle))
                if self._is_cut(handle):
                    self._reasons[uuid] = f"{uuid} is in MIG mode; its instances are what jobs use"
                    self._handles.pop(uuid, None)
                    yield from self._instances(uuid, handle)
                else:
                    yield from self._learn(uuid, handle, pci_bus_id(self._driver, handle))
                self._listed.append(uuid)
            except pynvml.NVMLError as error:
                # nameless now; if it was seen before, its sample tells why
                self.absence = f"the GPU at index {index} cannot be named: {error}"

    def take_listed(self) -> list[str]:
        """Whole GPUs that have said all that they are since this was last asked, by UUID: what was
        of them and was not named then is no more."""
        listed, self._listed = self._listed, []
        return listed

    def _is_cut(self, handle: Handle) -> bool:
        """Raises `NVMLError`: one that fails to say it is neither, else its instances would be no
        more, and all of it another GPU."""
        mode = self._driver.first((_MIG_MODE,), handle)
        return mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE

    def _instances(self, parent: str, handle: Handle) -> Iterator[GpuFacts]:
        found = 0
        bus_id = pci_bus_id(self._driver, handle)
        for index in range(min(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle), _INSTANCES_MAX)):
            try:
                instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            except pynvml.NVMLError_NotFound:
                continue  # places need not be taken in order
            found += 1
            uuid = str(pynvml.nvmlDeviceGetUUID(instance))
            asking = Asking(self._driver, instance)
            numbers = [asking.say(call) for call in _INSTANCE_NUMBERS]
            known = None not in numbers
            self._wholes[uuid] = handle
            place = "/".join((parent, *map(str, numbers))) if known else ""
            yield from self._learn(uuid, instance, bus_id, place)
        if not found:
            self.absence = f"{parent} is in MIG mode and has no instance: nvidia-smi mig -cgi"

    def _learn(self, uuid: str, handle: Handle, bus_id: str, place: str = "") -> Iterator[GpuFacts]:
        name = str(pynvml.nvmlDeviceGetName(handle))
        if self._allowed_uuids is None or uuid in self._allowed_uuids:
            total = Asking(self._driver, handle).say(*_MEMORY)
            self._handles[uuid] = handle
            yield GpuFacts(uuid, name, int(total or 0), bus_id, place)

    def sample(self, uuid: str) -> GpuSample:
        """One reading. Of a GPU without a handle it says why there is none."""
        if uuid in self._handles:
            return self._sample(uuid, self._handles[uuid])
        reason = self.absence or "the driver does not know it"
        sentence = self._reasons.get(uuid, f"{uuid} cannot be read: {reason}")
        return GpuSample(uuid=uuid, error=sentence, condition=self._gone.get(uuid))

    def handles(self) -> Mapping[str, Handle]:
        """Those known by now, by UUID; it may be asked in another thread."""
        return self._handles

    def occupancy(self, uuid: str) -> GpuOccupancy:
        """Who uses a GPU, but for other services: its memory, and the processes that compute or
        draw on it. What cannot be read is `None`."""
        handle = self._handles.get(uuid)
        if handle is None:
            return GpuOccupancy(uuid)
        asking = Asking(self._driver, handle)
        used_bytes = asking.say(*_SAMPLED["memory_used_bytes"])
        held = held_bytes(asking)
        others = [pid for pid in held or () if is_of_another_service(pid)]
        for pid in others:
            bytes_of_other = (held or {}).pop(pid)
            known = used_bytes is not None and bytes_of_other is not None
            used_bytes = max(0, used_bytes - bytes_of_other) if known else None
        return GpuOccupancy(uuid, used_bytes, None if held is None else tuple(held))

    def usage(self, uuid: str) -> GpuUsage:
        """What is read every ten seconds; of a GPU without a handle nothing."""
        handle = self._handles.get(uuid)
        return GpuUsage(uuid) if handle is None else self._usage.read(uuid, handle)

    def inventory(self, uuid: str) -> GpuInventory:
        """What is read once a minute; of a GPU without a handle nothing."""
        handle = self._handles.get(uuid)
        return GpuInventory(uuid) if handle is None else self._inventory.read(uuid, handle)

    def take_failures(self) -> list[tuple[str, str, int]]:
        """Call, code and how often, since this was last asked. What is not supported is none."""
        return self._driver.take_failures()

    def _sample(self, uuid: str, handle: Handle) -> GpuSample:
        values: dict[str, Any] = {}
        failure = unread = ""
        for field, calls in _SAMPLED.items():
            try:
                values[field] = self._driver.first(calls, handle)
            except pynvml.NVMLError as error:
                if error.value in GPU_IS_GONE:
                    return self._lost(uuid, error)
                failure = str(error)
                if field == "memory_used_bytes":
                    unread = f"its memory cannot be read: {failure}"
        if failure and all(value is None for value in values.values()):
            return GpuSample(uuid=uuid, error=f"{uuid} answers nothing: {failure}")
        condition = read_condition(self._driver, handle)
        if condition is not None and unread:
            condition = replace(condition, unread=unread)
        if uuid.startswith("MIG-") and uuid not in self._wholes:
            # It was adopted; now that it has answered, this call will not hang either.
            with suppress(pynvml.NVMLError):
                self._wholes[uuid] = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        return GpuSample(uuid=uuid, condition=condition, **values)

    def _lost(self, uuid: str, error: pynvml.NVMLError) -> GpuSample:
        """An instance whose GPU answers was destroyed, which is no fault of anything."""
        self._note_change(error)
        whole = self._wholes.get(uuid)
        if whole is not None and Asking(self._driver, whole).say(_MIG_MODE) is not None:
            reason = f"{uuid} is no instance of its GPU any more ({error})"
            return GpuSample(uuid, error=reason)
        reason = f"{uuid} {GPU_IS_GONE[error.value]} ({error})"
        return GpuSample(uuid, error=reason, condition=condition_after(error))

    def _note_change(self, error: pynvml.NVMLError) -> None:
        if error.value in _OTHER_DRIVER:
            self.outdated = f"the driver that it had opened is no more ({error})"


def _no_gpus(error: pynvml.NVMLError) -> str:
    hint = _HINTS.get(error.value, "")
    return f"no GPUs: {str(error).rstrip('.')}{hint and f' ({hint})'}"


_OTHER_DRIVER: Final = (
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
)
# What an operator would look up.
_HINTS: Final = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no driver is installed",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "the driver's library is too old",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "see `modprobe nvidia`",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was upgraded: reboot",
    pynvml.NVML_ERROR_NO_PERMISSION: "the agent may not open /dev/nvidiactl",
}


def _memory_bytes(field: str) -> tuple[Call, ...]:
    def read(*version: object) -> Callable[[Handle], int]:
        return lambda handle: int(getattr(pynvml.nvmlDeviceGetMemoryInfo(handle, *version), field))

    return (
        Call("nvmlDeviceGetMemoryInfo_v2", read(pynvml.nvmlMemory_v2)),
        Call("nvmlDeviceGetMemoryInfo", read()),
    )


def _utilization_ratio(handle: Handle) -> float:
    return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100.0


_INSTANCE_NUMBERS: Final = (
    Call.of("nvmlDeviceGetGpuInstanceId"),
    Call.of("nvmlDeviceGetComputeInstanceId"),
)
_MIG_MODE: Final = Call.of("nvmlDeviceGetMigMode")
_MEMORY: Final = _memory_bytes("total")
# By field of `GpuSample`, newest call first.
_SAMPLED: Final[dict[str, tuple[Call, ...]]] = {
    "utilization_ratio": (Call("nvmlDeviceGetUtilizationRates", _utilization_ratio),),
    "memory_used_bytes": _memory_bytes("used"),
    "temperature_celsius": (
        Call.of("nvmlDeviceGetTemperatureV", pynvml.NVML_TEMPERATURE_GPU),
        Call.of("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
    ),
    "power_mw": (Call.of("nvmlDeviceGetPowerUsage"),),
    "energy_mj": (Call.of("nvmlDeviceGetTotalEnergyConsumption"),),
    "sm_clock_mhz": (Call.of("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),),
    "memory_clock_mhz": (Call.of("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),),
    "clock_event_reasons": (
        Call.of("nvmlDeviceGetCurrentClocksEventReasons"),
        Call.of("nvmlDeviceGetCurrentClocksThrottleReasons"),
    ),
}
