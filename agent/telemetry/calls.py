"""Ask the driver one thing: the newest call for it that this driver and this GPU have.

Problem: "no" has four meanings, and each wants something else. The driver does not have the
function, and will not have it tomorrow: it is never called again. This GPU does not support it: the
answer is `None`, which is no failure and never a zero. The GPU itself is gone: nothing else is
asked of it. And a call failed: that is counted by call and code, since a driver that fails now and
then is sick long before it is dead.

Source: NVML API Reference Guide (docs.nvidia.com/deploy/nvml-api), nvmlReturn_t.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pynvml

Handle = Any  # the binding's opaque pointer

GPU_IS_GONE: Final = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "has fallen off the bus; reboot the node",
    pynvml.NVML_ERROR_RESET_REQUIRED: "needs a reset: nvidia-smi --gpu-reset",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "is no longer known to the driver; reboot the node",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "has no driver; load it",
    pynvml.NVML_ERROR_UNINITIALIZED: "has no driver; load it",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "has a new driver, which is opened anew",
}
_NOT_IN_DRIVER: Final = (
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_ArgumentVersionMismatch,
)
_NOT_OF_THIS_GPU: Final = (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission)
# Of an entry in a batch; an id that an older driver does not know is an invalid argument to it.
ENTRY_IS_ABSENT: Final = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_NO_DATA,
)
_CODES: Final = {
    value: name.removeprefix("NVML_ERROR_").lower()
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_ERROR_")
}
# By nvmlValueType_t.
_VALUE_FIELDS: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclass(frozen=True, slots=True)
class Call:
    """`name` is the driver's function, `read` calls it through the binding."""

    name: str
    read: Callable[[Handle], Any]

    @classmethod
    def of(cls, name: str, *arguments: object) -> "Call":
        """The binding's function of this name; the arguments follow the handle."""
        return cls(name, lambda handle: getattr(pynvml, name)(handle, *arguments))


class Driver:
    """What is known of this driver, and how often it failed."""

    def __init__(self) -> None:
        self._missing: dict[str, None] = {}
        self._failures: Counter[tuple[str, str]] = Counter()

    def first(self, calls: tuple[Call, ...], handle: Handle) -> Any:
        """The answer of the newest call that this GPU supports; `None` when there is none.

        Raises `NVMLError` for every failure that is not about support.
        """
        for call in calls:
            if call.name in self._missing:
                continue
            try:
                return call.read(handle)
            except _NOT_IN_DRIVER:
                # one driver serves all GPUs, and does not grow functions while it runs
                self._missing[call.name] = None
            except _NOT_OF_THIS_GPU:
                continue
            except pynvml.NVMLError as error:
                self.failed(call.name, error.value)
                raise
        return None

    def failed(self, name: str, code: int) -> None:
        self._failures[name, _CODES.get(code, str(code))] += 1

    def take_failures(self) -> list[tuple[str, str, int]]:
        """Call, code and how often, since this was last asked."""
        taken = [(call, code, count) for (call, code), count in self._failures.items()]
        self._failures.clear()
        return taken


class Asking:
    """One GPU that is asked several things, each of which may fail without hiding the others; but a
    GPU that is gone is asked no more."""

    def __init__(self, driver: Driver, handle: Handle) -> None:
        self._driver = driver
        self._handle = handle
        self._is_gone = False

    def say(self, *calls: Call) -> Any:
        """`None` where the GPU does not say, for whatever reason."""
        if self._is_gone:
            return None
        try:
            return self._driver.first(calls, self._handle)
        except pynvml.NVMLError as error:
            self._is_gone = error.value in GPU_IS_GONE
            return None

    def fields(self, batch: Call) -> dict[int, float]:
        """Of a batch of field values those that were answered, by id: each has a return code of its
        own."""
        answered: dict[int, float] = {}
        for entry in self.say(batch) or ():
            if entry.nvmlReturn == pynvml.NVML_SUCCESS:
                answered[entry.fieldId] = value_of(entry.valueType, entry.value)
            elif entry.nvmlReturn not in ENTRY_IS_ABSENT:
                self._driver.failed(batch.name, entry.nvmlReturn)
        return answered


def value_of(value_type: int, value: Any) -> float:
    """What a union holds."""
    return float(getattr(value, _VALUE_FIELDS[value_type]))
