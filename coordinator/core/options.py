"""What an operator may set and decisions depend on; `coordinator/config.py` has words for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.core.allocation import Aims, Solve
from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.node_power import PowerOptions
from coordinator.core.quotas import Quota
from coordinator.core.scaler import ScalingOptions
from coordinator.core.tariffs import Lease, Prices


@dataclass(frozen=True, slots=True)
class Options:
    """Times in milliseconds."""

    heartbeat_interval_ms: int = 1_000
    report_interval_ms: int = 5_000
    suspect_ms: int = 3_000  # three missed heartbeats: nothing new for one that may be dead
    # Eight missed heartbeats: short enough for a handoff within ten seconds, long enough for a
    # switch that reboots a line card or a box that swaps.
    lease_ms: int = 8_000
    # A process that dies closes its connections: time for systemd to restart an agent.
    closed_grace_ms: int = 3_000
    # After our own restart agents need up to five seconds of back-off to find us, and then a lease.
    # As long ranks that came back from a common outage wait for the rest of their gang.
    restart_grace_ms: int = 13_000
    hellos_per_s: int = 500  # agents that are let in (`admission.py`)
    # What follows from verdicts on GPUs (`health.py`): whether anything does, whether from degraded
    # as well, and the circuit breaker.
    cordons_gpus: bool = True
    cordons_degraded: bool = False
    cordon_percent: int = 10
    cordon_window_ms: int = 600_000
    # By name; with none, nobody's turn depends on what anybody has used (`quotas.py`).
    projects: Mapping[str, Quota] = field(default_factory=dict)
    # What is wanted of the fleet, who solves it (without: the greedy), and how many running jobs
    # may be stopped within an hour for it (`moves.py`).
    aims: Aims = field(default_factory=Aims)
    solve: Solve | None = None
    moves_per_hour: int = 60
    # After which wait a large job gets room reserved (0: never), and for how long (`reservations`).
    reservation_wait_ms: int = 600_000
    reservation_ms: int = 1_800_000
    # What GPUs and energy cost, what is leased, and the patterns of nodes that are rented by the
    # hour (`bills.py`); nothing is placed by it.
    prices: Prices = field(default_factory=Prices)
    leases: tuple[Lease, ...] = ()
    burst_nodes: tuple[str, ...] = ()
    power: PowerOptions = field(default_factory=PowerOptions)
    scaling: ScalingOptions = field(default_factory=ScalingOptions)
    jobs_kept: int = 10_000  # of those that have ended (`jobs.py`)
    # How long a minute of demand's history and of the plan lasts: less, and a day is over sooner.
    demand_minute_ms: int = MINUTE_MS
