"""What core and shell say to each other of GPUs: what is read regularly, and who uses one.

Problem: the driver's list of processes costs milliseconds of its lock, which trainers wait for. So
it is no part of a sample: it is asked for when an attempt has ended, for its GPUs alone.
"""

from dataclasses import dataclass
from typing import Final

from agent.core.values import GpuOccupancy, GpuSample, HostSample, Sample

# The coordinator orders none: our configuration counts.
OWN_RATE: Final = "own"


@dataclass(frozen=True, slots=True)
class InspectGpus:
    """Ask the driver who uses these; the answer is `GpusInspected`."""

    gpu_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GpusInspected:
    occupancies: tuple[GpuOccupancy, ...]


@dataclass(frozen=True, slots=True)
class GpuLeft:
    """A GPU that an attempt has left and that was not seen clean since; `before` is what it is
    compared with, as long as the box is not booted."""

    uuid: str
    attempt: str
    boot_id: str
    before: GpuOccupancy | None = None


@dataclass(frozen=True, slots=True)
class PutGpusLeft:
    """A record: all of them. Replaces what was put before."""

    left: tuple[GpuLeft, ...]


@dataclass(frozen=True, slots=True)
class FollowRate:
    """Read the GPUs as often as the coordinator says: off, slow, normal, watch, or `OWN_RATE`."""

    rate: str


@dataclass(frozen=True, slots=True)
class Sampled:
    sample: Sample


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the coordinator, with a heartbeat; in the place of a report that was not sent yet."""

    host: HostSample
    gpus: tuple[GpuSample, ...]
    sampled_ms: int
