"""How the driver says that a GPU is: there or lost, and what it needs.

Problem: "the call failed" is three different facts. A GPU that has fallen off the bus, one that the
driver wants reset, and a driver that knows no such call each give an error code, and only the first
two say something of the GPU. What is not supported stays `None`, and is never taken for well or
ill: an old driver has no recovery action.

The recovery action is one field value, without a lock on the GPU's engines, and is read with each
sample. How its memory is changes when a GPU is reset, or after an XID: `inventory.py` reads that
once a minute, and `details.py` puts it beside.

Source: NVML API Reference Guide, field 230.
"""

from typing import Final

import pynvml

from agent.core.values import GpuCondition
from agent.telemetry.calls import ENTRY_IS_ABSENT, Asking, Call, Driver, Handle, value_of

_LOST: Final = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
    pynvml.NVML_ERROR_NOT_FOUND,
)


def condition_after(error: pynvml.NVMLError) -> GpuCondition | None:
    """What a failed call says of its GPU; `None`: nothing."""
    if error.value in _LOST:
        return GpuCondition("lost")
    if error.value == pynvml.NVML_ERROR_RESET_REQUIRED:
        return GpuCondition("reset_required")
    return None


def pci_bus_id(driver: Driver, handle: Handle) -> str:
    """As the kernel's log has it, `0000:3b:00`; empty where the driver does not say."""
    pci = Asking(driver, handle).say(_PCI)
    return "" if pci is None else f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}"


def read_condition(driver: Driver, handle: Handle) -> GpuCondition | None:
    """Without what is known of its memory. `None`: the driver gives no answer."""
    try:
        entry = driver.first((_ACTION,), handle)
    except pynvml.NVMLError as error:
        return condition_after(error)
    if entry is None or entry.nvmlReturn in ENTRY_IS_ABSENT:
        return GpuCondition()
    if entry.nvmlReturn != pynvml.NVML_SUCCESS:
        driver.failed(_ACTION.name, entry.nvmlReturn)
        return condition_after(pynvml.NVMLError(entry.nvmlReturn))
    return GpuCondition(recovery_action=int(value_of(entry.valueType, entry.value)))


def _recovery_action(handle: Handle) -> pynvml.c_nvmlFieldValue_t | None:
    try:
        (entry,) = pynvml.nvmlDeviceGetFieldValues(
            handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        )
    except pynvml.NVMLError_InvalidArgument:
        return None  # an old driver may refuse an id that it does not know
    return entry


_ACTION: Final = Call("nvmlDeviceGetFieldValues", _recovery_action)
_PCI: Final = Call.of("nvmlDeviceGetPciInfo_v3")
