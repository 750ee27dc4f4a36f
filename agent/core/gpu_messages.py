"""What core and shell say to each other of GPUs: what is read regularly, and who uses one.

Problem: the driver's list of processes costs milliseconds of its lock, which trainers wait for. So
it is no part of a sample: it is asked for when an attempt has ended, for its GPUs alone.
"""

from dataclasses import dataclass

from agent.core.values import GpuOccupancy, Sample


@dataclass(frozen=True, slots=True)
class InspectGpus:
    """Ask the driver who uses these; the answer is `GpusInspected`."""

    gpu_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GpusInspected:
    occupancies: tuple[GpuOccupancy, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    sample: Sample
