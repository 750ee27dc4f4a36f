"""What agents are told of the link itself, a part of what `messages.py` says comes out of the core:
how often they are to be heard from, and what has arrived; and what they say that runs there."""

from dataclasses import dataclass

from coordinator.core.model import JobSpec, TelemetryRate


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """An attempt that a node answers for; `live` until its process has ended. `stuck.py`; `None`:
    the node does not know. `precopy.py`; `None`: the node does not say. `copies_failed`: tries in a
    row in which nothing arrived at its standby. Where its node was asked (`taken_back.py`), `spec`
    is what it was started with, and `checkpoint` what it continues; "": it began from nothing."""

    attempt: str
    gpu_uuids: tuple[str, ...]
    live: bool = True
    stuck: tuple[int, ...] | None = None
    precopy_gain_ms: int | None = None
    copies_failed: int = 0
    spec: JobSpec | None = None
    checkpoint: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """`unknown`: attempts that the node is asked about (`taken_back.py`)."""

    leader_epoch: int
    heartbeat_interval_ms: int
    lease_ms: int
    acknowledged_sequence: int
    telemetry_rate: TelemetryRate = TelemetryRate.OWN
    report_interval_ms: int = 5_000
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
