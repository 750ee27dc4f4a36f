"""What the coordinator says of the link itself, a part of what `messages.py` says goes into the
core: how often it wants to hear from us, and what has arrived."""

from dataclasses import dataclass

from agent.core.gpu_messages import OWN_RATE


@dataclass(frozen=True, slots=True)
class Welcome:
    """`report_interval_ms` of 0, from an older coordinator: telemetry goes with every heartbeat.
    `unknown` are attempts that the coordinator wants to hear more of."""

    leader_epoch: int
    heartbeat_interval_ms: int
    lease_ms: int
    acknowledged_sequence: int
    telemetry_rate: str = OWN_RATE
    report_interval_ms: int = 0
    unknown: tuple[str, ...] = ()


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
