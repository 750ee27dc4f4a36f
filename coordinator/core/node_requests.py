"""What people ask of nodes beside taking them in and out of service, a part of what `messages.py`
says goes into the core: how often their GPUs are read."""

from dataclasses import dataclass

from coordinator.core.model import TelemetryRate


@dataclass(frozen=True, slots=True)
class SetTelemetryRate:
    node: str
    rate: TelemetryRate
