"""What a call costs the trainers: milliseconds for which it may hold the driver's lock.

Problem: an agent that takes a thousandth of a core can still slow a training down, since launches
of kernels wait for the lock that its calls hold. What counts is therefore calls by their cost, and
the budget is five milliseconds for a GPU and second (`tests/agent/test_classes.py` holds the class
`normal` to it, with what the stand-in was really called).

Only the process list (4.5 ms) and the throughput of PCIe (it sleeps 20 ms for each direction) are
measured figures; the latter is asked for only where an operator wants it. The others are upper
bounds that we assume, from what such calls take of wall time: a short one answers from the driver's
memory, a long one asks the board's controller. A measurement on a card may replace them.
"""

from collections.abc import Mapping
from typing import Final

LOCK_BUDGET_MS: Final = 5.0  # for each GPU and second

_SHORT_MS: Final = 0.1
_LONG_MS: Final = 0.5

COSTS_MS: Final[Mapping[str, float]] = {
    "nvmlDeviceGetUtilizationRates": _SHORT_MS,
    "nvmlDeviceGetMemoryInfo_v2": _SHORT_MS,
    "nvmlDeviceGetMemoryInfo": _SHORT_MS,
    "nvmlDeviceGetTemperatureV": _SHORT_MS,
    "nvmlDeviceGetTemperature": _SHORT_MS,
    "nvmlDeviceGetPowerUsage": _LONG_MS,
    "nvmlDeviceGetTotalEnergyConsumption": _LONG_MS,
    "nvmlDeviceGetClockInfo": _SHORT_MS,
    "nvmlDeviceGetCurrentClocksEventReasons": _SHORT_MS,
    "nvmlDeviceGetCurrentClocksThrottleReasons": _SHORT_MS,
    "nvmlDeviceGetFieldValues": _LONG_MS,
    "nvmlDeviceGetTotalEccErrors": _LONG_MS,
    "nvmlDeviceGetSamples": _LONG_MS,
    "nvmlDeviceGetComputeRunningProcesses_v3": 4.5,
    "nvmlDeviceGetComputeRunningProcesses_v2": 4.5,
    "nvmlDeviceGetRemappedRows": _LONG_MS,
    "nvmlDeviceGetCurrPcieLinkGeneration": _SHORT_MS,
    "nvmlDeviceGetMaxPcieLinkGeneration": _SHORT_MS,
    "nvmlDeviceGetCurrPcieLinkWidth": _SHORT_MS,
    "nvmlDeviceGetMaxPcieLinkWidth": _SHORT_MS,
    "nvmlDeviceGetVbiosVersion": _SHORT_MS,
    "nvmlDeviceGetSerial": _SHORT_MS,
    "nvmlDeviceGetNvLinkState": _SHORT_MS,
    "nvmlDeviceGetGpuFabricInfoV": _LONG_MS,
    "nvmlGpmQueryDeviceSupport": _SHORT_MS,
    "nvmlGpmSampleGet": _LONG_MS,
    "nvmlGpmMetricsGet": _SHORT_MS,
    # which GPUs there are: without persistence mode a handle may cost an initialisation, but not
    # while a sampler has them open
    "nvmlSystemGetDriverVersion": _SHORT_MS,
    "nvmlDeviceGetCount_v2": _SHORT_MS,
    "nvmlDeviceGetHandleByIndex_v2": _LONG_MS,
    "nvmlDeviceGetUUID": _SHORT_MS,
    "nvmlDeviceGetName": _SHORT_MS,
    "nvmlDeviceGetPciInfo_v3": _SHORT_MS,
    "nvmlDeviceGetMigMode": _SHORT_MS,
    "nvmlDeviceGetPcieThroughput": 20.0,
}


def lock_ms(calls: Mapping[str, int]) -> float:
    """Of so many calls each. Raises `KeyError` for one whose cost nobody has thought about."""
    return sum(COSTS_MS[name] * count for name, count in calls.items())
