"""The queue as placement sees it: who waits, in which order, and what each asks for.

Problem: a round asks it of everybody, an explanation of the one job and those before it, and both
must see the same queue, or what is explained is not what is decided.
"""

from collections.abc import Iterable

from coordinator.core import checkpoints
from coordinator.core.model import CLASS_RANK, Job
from coordinator.core.placement import Need
from coordinator.core.state import Instant, State


def in_turn(state: State, job_ids: Iterable[int]) -> list[Job]:
    """Those of them that wait, in order of class and submission."""
    waiting = [state.jobs[job_id] for job_id in job_ids if job_id in state.queued]
    return sorted(waiting, key=lambda job: (CLASS_RANK[job.spec.job_class], job.id))


def blocked(state: State, now: Instant, job: Job) -> str:
    """Why it could not start anywhere at present; empty where it could."""
    if state.eligible_ms.get(job.id, 0) > now.now_ms:
        return job.reason
    return checkpoints.head_within_reach(state, job)


def need_of(state: State, job: Job) -> Need:
    good = state.good_checkpoints(job)
    pieces = good[0].pieces if good else ()
    replicas = tuple(dict.fromkeys(name for piece in pieces for name in piece.replicas))
    last = state.gang(job) if replicas else []
    near = tuple(name for rank in last for name in (rank.node, rank.replica_node))
    before = state.current(job)
    pace = None if before is None else state.paces.get(before.id)
    lasts_ms = None if pace is None else pace.remaining_ms(job.head_step)
    return Need(
        job.id, job.spec, replicas, state.avoid.get(job.id, ""), near,
        None if lasts_ms is None else round(lasts_ms),
    )  # fmt: skip
