"""What is read of GPUs and hosts, as an agent says it.

Problem: a figure that a driver does not give is not zero, and one that was read a while ago is not
the present. So every figure may be missing, and a reading says how old it is.
"""

from dataclasses import dataclass
from typing import NamedTuple

from coordinator.core.windows import GpuWindow


@dataclass(frozen=True, slots=True)
class GpuDetails:
    """What is read of a GPU less often; `None` as in `GpuTelemetry`. Of ECC errors, *volatile* ones
    count since the driver was loaded, *aggregate* ones since the board was made."""

    processes: int | None = None
    ecc_volatile_corrected: int | None = None
    ecc_volatile_uncorrected: int | None = None
    ecc_aggregate_corrected: int | None = None
    ecc_aggregate_uncorrected: int | None = None
    remapped_rows_corrected: int | None = None
    remapped_rows_uncorrected: int | None = None
    remapped_rows_pending: bool | None = None
    remapped_rows_failed: bool | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    nvlinks_up: int | None = None
    nvlinks_down: int | None = None
    sm_activity_ratio: float | None = None
    tensor_activity_ratio: float | None = None


class GpuTelemetry(NamedTuple):
    """`None` means that the driver does not say, never zero. `age_ms`: it was read so long ago. A
    tuple, since one is made for each GPU of each report: a dataclass takes three times as long."""

    uuid: str
    utilization_ratio: float | None = None
    memory_used_bytes: int | None = None
    temperature_celsius: int | None = None
    power_mw: int | None = None
    energy_mj: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    error: str = ""
    details: GpuDetails | None = None
    age_ms: int = 0
    window: GpuWindow | None = None


@dataclass(frozen=True, slots=True)
class HostTelemetry:
    cpu_utilization_ratio: float
    memory_used_bytes: int
    disk_free_bytes: int
    load_1min: float
