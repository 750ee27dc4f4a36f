"""What the fleet is now, counted: what the metrics say beside what the shell counts itself.

Problem: counters that are raised and lowered along the way are wrong after the first forgotten
place, and after a restart. So nothing is kept for the sake of being counted: this goes through the
state when it is asked. `docs/metrics.md` says what that costs.
"""

from collections import Counter
from dataclasses import dataclass

from coordinator.core.capacity_model import Power
from coordinator.core.model import CLASS_ORDER, JobClass
from coordinator.core.node_power import is_gone, silent
from coordinator.core.phases import AttemptPhase, GpuPhase, JobPhase, NodeIntent, NodePhase
from coordinator.core.state import LiveNode, State

# Names of GPUs are what agents say, and each is a time series; no fleet has as many types.
GPU_TYPES_MAX = 64
OTHER_TYPES = "other"


@dataclass(frozen=True, slots=True)
class Shares:
    """`gpus` are those of which somebody has a share, `count` is how many shares there are on
    them, and `total_bytes` what all of them may take together."""

    gpus: int
    count: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Census:
    """Numbers of things by what they are; what there could be is there with a zero, but for types
    of GPUs. `waiting_s`: how long the job that was queued first has been queued; `None` when none
    is. `queued` are those that wait for room, and not for others of their array. Ended jobs and
    attempts are counted as long as they are kept."""

    jobs: tuple[tuple[tuple[JobClass, JobPhase], int], ...]
    queued: tuple[tuple[JobClass, int], ...]
    attempts: tuple[tuple[AttemptPhase, int], ...]
    nodes: tuple[tuple[tuple[NodePhase, NodeIntent], int], ...]
    powers: tuple[tuple[Power, int], ...]
    gpus: tuple[tuple[tuple[str, GpuPhase], int], ...]
    ill: tuple[tuple[str, int], ...]
    shares: Shares
    checkpoints: int
    sessions: int
    in_line: int
    waiting_s: float | None
    leader_epoch: int


def census(state: State, unix_ms: int) -> Census:
    """The state as it is; one step for each job, attempt and GPU."""
    # By the values of enumerations: their members are hashed by a function in Python.
    jobs = Counter((job.spec.job_class._value_, job.phase._value_) for job in state.jobs.values())
    queued = Counter(state.jobs[job_id].spec.job_class._value_ for job_id in state.queued)
    attempts = Counter(attempt.phase._value_ for attempt in state.attempts.values())
    lives = state.nodes.values()
    nodes = Counter(
        (live.phase._value_, live.node.intent._value_) for live in lives if not _is_off(live)
    )
    powers = Counter(
        live.node.power.phase._value_ for live in lives if not is_gone(live.node.power)
    )
    return Census(
        tuple(
            ((one, phase), jobs[one.value, phase.value])
            for one in CLASS_ORDER
            for phase in JobPhase
        ),
        tuple((one, queued[one.value]) for one in CLASS_ORDER),
        tuple((phase, attempts[phase.value]) for phase in AttemptPhase),
        tuple(
            ((phase, intent), nodes[phase.value, intent.value])
            for phase in NodePhase
            for intent in NodeIntent
        ),
        tuple((phase, powers[phase.value]) for phase in Power),
        _gpus(state),
        _ill(state),
        _shares(state),
        sum(len(kept) for kept in state.checkpoints.values()),
        len(state.sessions),
        len(state.admission.line),
        _waiting_s(state, unix_ms),
        state.leader_epoch,
    )


def _is_off(live: LiveNode) -> bool:
    """Silent on purpose: counted by its power, and not among the lost."""
    return live.phase is NodePhase.LOST and silent(live.node.power)


def _shares(state: State) -> Shares:
    gpus = count = total_bytes = 0
    for live in state.nodes.values():
        for gpu in live.gpus.values():
            given = [size for holder in gpu.holders if (size := state.share_bytes(holder))]
            gpus += bool(given)
            count += len(given)
            total_bytes += sum(given)
    return Shares(gpus, count, total_bytes)


def _ill(state: State) -> tuple[tuple[str, int], ...]:
    """GPUs that get no work for what they are, a whole node's where it has to be rebooted; and
    those that the fleet's limit on that keeps open."""
    lives = state.nodes.values()
    cordoned = sum(
        len(live.node.gpus) if live.node.closed_for else len(live.node.gpu_cordons)
        for live in lives
    )
    unread = sum(bool(gpu.unread) for live in lives for gpu in live.gpus.values())
    return (("cordoned", cordoned), ("unread", unread), ("held_back", len(state.held_back)))


def _gpus(state: State) -> tuple[tuple[tuple[str, GpuPhase], int], ...]:
    """Of too many types those of which there are most keep their names."""
    found = Counter(
        (gpu.facts.name, gpu.phase._value_)
        for live in state.nodes.values()
        for gpu in live.gpus.values()
    )
    sizes: Counter[str] = Counter()
    for (name, _), count in found.items():
        sizes[name] += count
    kept = sorted(sizes, key=lambda name: (-sizes[name], name))[:GPU_TYPES_MAX]
    shown = dict.fromkeys([*sorted(kept), *([OTHER_TYPES] if len(sizes) > len(kept) else [])])
    counts: Counter[tuple[str, str]] = Counter()
    for (name, phase_value), count in found.items():
        counts[name if name in shown else OTHER_TYPES, phase_value] += count
    return tuple(((name, phase), counts[name, phase.value]) for name in shown for phase in GpuPhase)


def _waiting_s(state: State, unix_ms: int) -> float | None:
    """Wall time, as it outlives a coordinator; a clock that was set back counts as no wait."""
    since = [state.jobs[job_id] for job_id in state.queued]
    if not since:
        return None
    first_unix_ms = min(
        job.submitted_unix_ms if job.queued_unix_ms is None else job.queued_unix_ms for job in since
    )
    return max(0, unix_ms - first_unix_ms) / 1000
