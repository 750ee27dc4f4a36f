"""Read what is asked of a GPU once a minute: what it is, how it is connected, what it has given up.

Problem: what does not exist is easily reported as broken. A GPU without NVLink has no link that is
down (NVIDIA/NVSentinel #1481): links are counted by the driver first, and only those are asked. A
GeForce answers a row remapper's zeros without having one (leptonai/gpud #351): rows are remapped
for memory errors, so zeros are believed only of a GPU whose ECC is on. A fabric that the driver
calls "not supported" is none.

The throughput of PCIe is measured by the driver while it is asked for it, 20 ms for each direction,
and trainers wait for its lock. So it is read only where an operator has said so.

GPM (from Hopper on) compares two samples of the GPU's counters: the activity here is that between
one reading and the one before it. The first reading has none.
"""

from functools import partial
from typing import Any, Final

import pynvml

from agent.core.values import GpuInventory
from agent.telemetry.calls import Asking, Call, Driver, Handle

_BATCH: Final = (pynvml.NVML_FI_DEV_ECC_CURRENT, pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT)
_FIELDS: Final = Call.of("nvmlDeviceGetFieldValues", _BATCH)
# By field of `GpuInventory`: the call that answers it.
_PLAIN: Final = {
    "pcie_generation": "nvmlDeviceGetCurrPcieLinkGeneration",
    "pcie_generation_max": "nvmlDeviceGetMaxPcieLinkGeneration",
    "pcie_width": "nvmlDeviceGetCurrPcieLinkWidth",
    "pcie_width_max": "nvmlDeviceGetMaxPcieLinkWidth",
    "vbios_version": "nvmlDeviceGetVbiosVersion",
    "serial": "nvmlDeviceGetSerial",
}
# NVML says KB; where it means 1024 bytes it writes KiB (as for NVLink, in nvml.h).
_KILOBYTE: Final = 1_000
_THROUGHPUT: Final = {
    "pcie_sent_bytes_per_second": pynvml.NVML_PCIE_UTIL_TX_BYTES,
    "pcie_received_bytes_per_second": pynvml.NVML_PCIE_UTIL_RX_BYTES,
}
_REMAPPED: Final = Call.of("nvmlDeviceGetRemappedRows")
_GPM_SUPPORT: Final = Call(
    "nvmlGpmQueryDeviceSupport",
    lambda handle: pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice,
)
_FABRIC_STATES: Final = {
    pynvml.NVML_GPU_FABRIC_STATE_NOT_STARTED: "not_started",
    pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS: "in_progress",
    pynvml.NVML_GPU_FABRIC_STATE_COMPLETED: "completed",
}
_ACTIVITIES: Final = (pynvml.NVML_GPM_METRIC_SM_UTIL, pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL)


class InventoryReader:
    """Keeps, by GPU, the last sample for GPM, and one to take the next in."""

    def __init__(self, driver: Driver, *, pcie_throughput: bool = False) -> None:
        self._driver = driver
        self._pcie_throughput = pcie_throughput
        self._last: dict[str, Any] = {}
        self._spare: dict[str, Any] = {}

    def read(self, uuid: str, handle: Handle) -> GpuInventory:
        asking = Asking(self._driver, handle)
        fields = asking.fields(_FIELDS)
        values: dict[str, Any] = {name: asking.say(Call.of(call)) for name, call in _PLAIN.items()}
        has_ecc = fields.get(pynvml.NVML_FI_DEV_ECC_CURRENT) == pynvml.NVML_FEATURE_ENABLED
        values |= _remapped(asking, has_ecc=has_ecc)
        link_count = int(fields.get(pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT, 0))
        values |= _links(asking, min(link_count, pynvml.NVML_NVLINK_MAX_LINKS))
        values["fabric_state"] = _FABRIC_STATES.get(
            asking.say(Call("nvmlDeviceGetGpuFabricInfoV", _fabric_state))
        )
        values |= self._activity(asking, uuid)
        if self._pcie_throughput:
            values |= _throughput(asking)
        return GpuInventory(uuid=uuid, **values)

    def _activity(self, asking: Asking, uuid: str) -> dict[str, float]:
        """Shares of the time since the last reading."""
        if not asking.say(_GPM_SUPPORT):
            return {}
        sample = self._spare.pop(uuid, None) or pynvml.nvmlGpmSampleAlloc()
        taken = asking.say(Call("nvmlGpmSampleGet", partial(_take_sample, sample)))
        if taken is None:
            self._spare[uuid] = sample
            return {}
        earlier, self._last[uuid] = self._last.get(uuid), sample
        if earlier is None:
            return {}
        self._spare[uuid] = earlier
        ratios = asking.say(Call("nvmlGpmMetricsGet", partial(_activities, earlier, sample)))
        names = ("sm_activity_ratio", "tensor_activity_ratio")
        return dict(zip(names, ratios or (), strict=False))


def _throughput(asking: Asking) -> dict[str, int]:
    said = {
        name: asking.say(Call.of("nvmlDeviceGetPcieThroughput", counter))
        for name, counter in _THROUGHPUT.items()
    }
    return {name: value * _KILOBYTE for name, value in said.items() if value is not None}


def _remapped(asking: Asking, *, has_ecc: bool) -> dict[str, int | bool]:
    said = asking.say(_REMAPPED)
    if said is None or not (has_ecc or any(said)):
        return {}
    corrected, uncorrected, pending, failed = said
    return {
        "remapped_rows_corrected": corrected,
        "remapped_rows_uncorrected": uncorrected,
        "remapped_rows_pending": bool(pending),
        "remapped_rows_failed": bool(failed),
    }


def _links(asking: Asking, count: int) -> dict[str, int]:
    """Of the links that there are, how many are up and how many down."""
    states = [
        asking.say(Call("nvmlDeviceGetNvLinkState", partial(_link_state, link)))
        for link in range(count)
    ]
    said = [state for state in states if state is not None]
    return {"nvlinks_up": sum(said), "nvlinks_down": len(said) - sum(said)} if said else {}


def _link_state(link: int, handle: Handle) -> int:
    return int(pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED)


def _fabric_state(handle: Handle) -> int:
    info = pynvml.c_nvmlGpuFabricInfo_v2_t()
    pynvml.nvmlDeviceGetGpuFabricInfoV(handle, pynvml.byref(info))
    return int(info.state)


def _take_sample(sample: Any, handle: Handle) -> bool:
    pynvml.nvmlGpmSampleGet(handle, sample)
    return True


def _activities(earlier: Any, later: Any, _handle: Handle) -> tuple[float | None, ...]:
    asked = pynvml.c_nvmlGpmMetricsGet_t()
    asked.version = pynvml.NVML_GPM_METRICS_GET_VERSION
    asked.numMetrics = len(_ACTIVITIES)
    asked.sample1, asked.sample2 = earlier, later
    for place, metric_id in enumerate(_ACTIVITIES):
        asked.metrics[place].metricId = metric_id
    pynvml.nvmlGpmMetricsGet(asked)
    return tuple(
        metric.value / 100 if metric.nvmlReturn == pynvml.NVML_SUCCESS else None
        for metric in asked.metrics[: len(_ACTIVITIES)]
    )
