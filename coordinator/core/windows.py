"""What a GPU was like between two reports of its agent, as the agent has added it up.

Problem: the last reading of five seconds may be the one that is not typical. So a report brings
how low and how high each figure was, and its mean.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    min: float
    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class GpuWindow:
    """Over `readings` of it. `None`: the driver did not say it in any of them."""

    readings: int
    utilization_ratio: Spread | None = None
    memory_used_bytes: Spread | None = None
    temperature_celsius: Spread | None = None
    power_mw: Spread | None = None
