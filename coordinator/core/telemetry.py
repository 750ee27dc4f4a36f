"""What is read of GPUs and hosts, as an agent says it.

Problem: of ten thousand nodes 16,000 readings of a GPU come a second, each with dozens of figures,
and nearly all are replaced before anybody has looked. So of a reading the core takes what it
decides by; the rest it keeps as it came, for whoever shows it.
"""

from dataclasses import dataclass
from typing import NamedTuple


class GpuReading(NamedTuple):
    """`error`: why the last try to read it failed. `read_between`: it was read since the report
    before. `used_ratio`: how much it was in use since then; `None` where nobody says, never zero.
    `age_ms`: it was read so long ago. `figures`: all that was said, as the bytes of the contract,
    empty where nothing was. A tuple, since one is made for each GPU of each report: a dataclass
    takes three times as long."""

    uuid: str
    error: str = ""
    age_ms: int = 0
    read_between: bool = False
    used_ratio: float | None = None
    figures: bytes = b""


@dataclass(frozen=True, slots=True)
class HostTelemetry:
    cpu_utilization_ratio: float
    memory_used_bytes: int
    disk_free_bytes: int
    load_1min: float
