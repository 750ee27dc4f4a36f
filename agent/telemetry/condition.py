"""How the driver says that a GPU is: there or lost, what it needs, how its memory is.

Problem: "the call failed" is three different facts. A GPU that has fallen off the bus, one that the
driver wants reset, and a driver that knows no such call each give an error code, and only the first
two say something of the GPU. What is not supported stays `None`, and is never taken for well or
ill: an RTX 4090 has no row remapping and answers zeros (leptonai/gpud #351), an old driver has no
recovery action.

Remapped rows change when a GPU is reset, or after an XID: they are read once a minute. The recovery
action is one field value, without a lock on the GPU's engines.

Source: NVML API Reference Guide, field 230 and nvmlDeviceGetRemappedRows.
"""

import time
from typing import Any, Final

import pynvml

from agent.core.values import GpuCondition

ROWS_S: Final = 60.0

_LOST: Final = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
    pynvml.NVML_ERROR_NOT_FOUND,
)
_SILENT: Final = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_InvalidArgument,
)


def condition_after(error: pynvml.NVMLError) -> GpuCondition | None:
    """What a failed call says of its GPU; `None`: nothing."""
    if error.value in _LOST:
        return GpuCondition("lost")
    if error.value == pynvml.NVML_ERROR_RESET_REQUIRED:
        return GpuCondition("reset_required")
    return None


def pci_bus_id(handle: Any) -> str:
    """As the kernel's log has it, `0000:3b:00`; empty where the driver does not say."""
    try:
        pci = pynvml.nvmlDeviceGetPciInfo_v3(handle)
    except pynvml.NVMLError:
        return ""
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}"


class Conditions:
    """Of all GPUs; remembers the rows of each until they are read again."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[float, bool | None, bool | None]] = {}

    def read(self, uuid: str, handle: Any) -> GpuCondition | None:
        """`None`: the driver gives no answer."""
        try:
            action = _recovery_action(handle)
            failed, pending = self._rows_of(uuid, handle)
        except pynvml.NVMLError as error:
            return condition_after(error)
        return GpuCondition("", action, failed, pending)

    def _rows_of(self, uuid: str, handle: Any) -> tuple[bool | None, bool | None]:
        known = self._rows.get(uuid)
        now_s = time.monotonic()
        if known is not None and now_s - known[0] < ROWS_S:
            return known[1], known[2]
        failed, pending = _remapped_rows(handle)
        self._rows[uuid] = (now_s, failed, pending)
        return failed, pending


def _recovery_action(handle: Any) -> int | None:
    """Raises `NVMLError` for every failure that is not about support."""
    field = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
    try:
        (answer,) = pynvml.nvmlDeviceGetFieldValues(handle, [field])
    except _SILENT:
        return None
    if answer.nvmlReturn == pynvml.NVML_SUCCESS:
        return int(answer.value.uiVal)
    error = pynvml.NVMLError(answer.nvmlReturn)
    if isinstance(error, _SILENT):
        return None
    raise error


def _remapped_rows(handle: Any) -> tuple[bool | None, bool | None]:
    """Whether remapping has failed, and whether it waits for a reset; as `_recovery_action`."""
    try:
        _, _, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    except _SILENT:
        return None, None
    return bool(failed), bool(pending)
