"""What agents are told of the link itself, a part of what `messages.py` says comes out of the core:
how often they are to be heard from, and what has arrived."""

from dataclasses import dataclass

from coordinator.core.model import TelemetryRate


@dataclass(frozen=True, slots=True)
class Welcome:
    leader_epoch: int
    heartbeat_interval_ms: int
    lease_ms: int
    acknowledged_sequence: int
    telemetry_rate: TelemetryRate = TelemetryRate.OWN
    report_interval_ms: int = 5_000


@dataclass(frozen=True, slots=True)
class ComeLater:
    """Before the welcome: more agents want in than are let in at once. The welcome comes in the
    same session, after about so long."""

    wait_ms: int


@dataclass(frozen=True, slots=True)
class LeaseRenewal:
    heartbeat_sequence: int


@dataclass(frozen=True, slots=True)
class EventAck:
    sequence: int
