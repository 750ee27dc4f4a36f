"""What core and shell say to each other of who uses a GPU, which no sample tells.

Problem: the driver's list of processes costs milliseconds of its lock, which trainers wait for. So
it is no part of a sample: it is asked for when an attempt has ended, for its GPUs alone.
"""

from dataclasses import dataclass

from agent.core.values import GpuUsage


@dataclass(frozen=True, slots=True)
class InspectGpus:
    """Ask the driver who uses these; the answer is `GpusInspected`."""

    gpu_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GpusInspected:
    usages: tuple[GpuUsage, ...]
