"""What the fleet is now, counted: what the metrics say beside what the shell counts itself.

Problem: counters that are raised and lowered along the way are wrong after the first forgotten
place, and after a restart. So nothing is kept for the sake of being counted: this goes through the
state when it is asked, which costs a few milliseconds for ten thousand jobs.
"""

from dataclasses import dataclass

from coordinator.core.model import CLASS_ORDER, JobClass
from coordinator.core.phases import AttemptPhase, GpuPhase, JobPhase, NodeIntent, NodePhase
from coordinator.core.state import State

# Names of GPUs are what agents say, and each is a time series; no fleet has as many types.
GPU_TYPES_MAX = 64
OTHER_TYPES = "other"


@dataclass(frozen=True, slots=True)
class Census:
    """Numbers of things by what they are; what there could be is there with a zero, but for types
    of GPUs. `waiting_s`: how long the job that was queued first has been queued; `None` when none
    is. Ended jobs and attempts are counted as long as they are kept."""

    jobs: tuple[tuple[tuple[JobClass, JobPhase], int], ...]
    attempts: tuple[tuple[AttemptPhase, int], ...]
    nodes: tuple[tuple[tuple[NodePhase, NodeIntent], int], ...]
    gpus: tuple[tuple[tuple[str, GpuPhase], int], ...]
    checkpoints: int
    sessions: int
    waiting_s: float | None
    leader_epoch: int


def census(state: State, unix_ms: int) -> Census:
    """The state as it is; one step for each job, attempt and GPU."""
    jobs = {(one, phase): 0 for one in CLASS_ORDER for phase in JobPhase}
    for job in state.jobs.values():
        jobs[job.spec.job_class, job.phase] += 1
    attempts = dict.fromkeys(AttemptPhase, 0)
    for attempt in state.attempts.values():
        attempts[attempt.phase] += 1
    nodes = {(phase, intent): 0 for phase in NodePhase for intent in NodeIntent}
    for live in state.nodes.values():
        nodes[live.phase, live.node.intent] += 1
    return Census(
        tuple(jobs.items()),
        tuple(attempts.items()),
        tuple(nodes.items()),
        _gpus(state),
        sum(len(kept) for kept in state.checkpoints.values()),
        len(state.sessions),
        _waiting_s(state, unix_ms),
        state.leader_epoch,
    )


def _gpus(state: State) -> tuple[tuple[tuple[str, GpuPhase], int], ...]:
    found: dict[str, dict[GpuPhase, int]] = {}
    for _, live in sorted(state.nodes.items()):
        for gpu in live.gpus.values():
            known = gpu.facts.name in found or len(found) < GPU_TYPES_MAX
            name = gpu.facts.name if known else OTHER_TYPES
            by_phase = found.setdefault(name, dict.fromkeys(GpuPhase, 0))
            by_phase[gpu.phase] += 1
    return tuple(
        ((name, phase), count) for name in sorted(found) for phase, count in found[name].items()
    )


def _waiting_s(state: State, unix_ms: int) -> float | None:
    """Wall time, as it outlives a coordinator; a clock that was set back counts as no wait."""
    since = [state.jobs[job_id] for job_id in state.queued]
    if not since:
        return None
    first_unix_ms = min(
        job.submitted_unix_ms if job.queued_unix_ms is None else job.queued_unix_ms for job in since
    )
    return max(0, unix_ms - first_unix_ms) / 1000
