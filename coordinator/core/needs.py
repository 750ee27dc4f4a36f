"""The queue as placement sees it: who waits, in which order, and what each asks for.

Problem: a round asks it of everybody, an explanation of the one job and those before it, and both
must see the same queue, or what is explained is not what is decided.
"""

from collections.abc import Iterable, Mapping

from coordinator.core import checkpoints, claims, company, coruns, decisions, mismatches, outcomes
from coordinator.core.model import Job
from coordinator.core.phases import JobPhase
from coordinator.core.placement import Need
from coordinator.core.state import Instant, State


def in_turn(state: State, job_ids: Iterable[int], lent: Mapping[int, None]) -> list[Job]:
    """Those of them that wait, and with them those that still have to leave for what they were
    promised. `lent` are those beyond their projects' quotas."""
    waiting = [state.jobs[job_id] for job_id in job_ids if job_id in state.queued]
    if waiting:
        waiting += decisions.leaving(state)
    return decisions.in_turn(state, waiting, lent)


def blocked(state: State, now: Instant, job: Job) -> str:
    """Why it could not start anywhere at present; empty where it could."""
    if state.eligible_ms.get(job.id, 0) > now.now_ms:
        return job.reason
    return checkpoints.head_within_reach(state, job) if job.epoch else ""


def need_of(state: State, now: Instant, job: Job, lent: Mapping[int, None]) -> Need:
    replicas, near = _where_it_was(state, job) if job.epoch else ((), ())  # most have never run
    promise = state.standing.promises.get(job.id)
    keeps = claims.waits_out(state, now, job)
    avoid, elsewhere = outcomes.avoided(state, now, job)
    anywhere = promise is None or (job.id in state.avoid and not keeps)
    return Need(
        job.id,
        job.spec,
        replicas,
        avoid,
        elsewhere,
        near,
        lent=job.id in lent,
        shunned=coruns.shunned(state, job),
        types=decisions.order_of(state, now, job),
        only="" if promise is None else promise.gpu_type,
        on=() if anywhere or promise is None else promise.nodes,
        leaving=keeps or job.phase is not JobPhase.QUEUED,
        lasts_ms=_lasts_ms(state, job),
        refused=company.refused(state, now, job),
        alike=mismatches.alike(state, job),
    )


def _where_it_was(state: State, job: Job) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who holds its last checkpoint, and the nodes of its last attempt with their standbys."""
    good = state.good_checkpoints(job)
    pieces = good[0].pieces if good else ()
    replicas = tuple(dict.fromkeys(name for piece in pieces for name in piece.replicas))
    last = state.gang(job) if replicas else []
    return replicas, tuple(name for rank in last for name in (rank.node, rank.replica_node))


def _lasts_ms(state: State, job: Job) -> int | None:
    """How long it would run, by the pace of its last attempt; `None`: nobody knows."""
    before = state.current(job) if job.epoch else None
    pace = None if before is None else state.paces.get(before.id)
    lasts_ms = None if pace is None else pace.remaining_ms(job.head_step)
    return None if lasts_ms is None else round(lasts_ms)
