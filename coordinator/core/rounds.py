"""One decision over whatever waits: the queue and the fleet go to placement, what it says is done.

Problem: a fleet is asked for room at every submission and every end, and nobody may be forgotten
between two of them. So each batch of events ends with one round. It looks at everything that waits
when capacity may have come free, else at the new jobs alone. In which order, and on which types of
GPU, the last decision over all jobs says (`decisions.py`).
"""

from collections.abc import Sequence

from coordinator.core import attempts, checkpoints, costs, decisions, readings
from coordinator.core.model import CLASS_RANK, Job
from coordinator.core.offers import is_open, offers_of
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.placement import STARTS_PER_PASS_MAX, Need, place
from coordinator.core.rooms import Offer
from coordinator.core.state import Instant, State

# Changes of wait reasons are logged for the head of the queue only; the rest can be asked for.
WAITS_LOGGED_MAX = 20


def decide(state: State, now: Instant) -> None:
    """One placement pass: over everything that waits when capacity may have come free; over the new
    jobs alone when nothing else has happened, since those that waited before still do not fit.

    While somebody is leaving for somebody else, what is free may be kept for that job, and only a
    whole pass knows.
    """
    state.demand.note_jobs(state.jobs[job_id] for job_id in state.fresh if job_id in state.jobs)
    decisions.note(state, now)
    decisions.forget(state, now)
    whole = state.dirty or _leaving(state) or bool(state.standing.promises)
    considered = state.queued if whole else state.fresh
    waiting = [state.jobs[job_id] for job_id in considered if job_id in state.queued]
    if waiting:
        waiting += decisions.leaving(state)
    state.dirty, state.fresh = False, {}
    needs: list[Need] = []
    waits: dict[int, str] = {}
    for job in decisions.in_turn(state, waiting):
        blocked = _blocked(state, now, job)
        if blocked:
            waits[job.id] = blocked
        else:
            needs.append(_need(state, now, job))
    # Nodes come and go, and report, far more often than somebody waits for them.
    offers = offers_of(state) if needs else []
    plan = place(needs, _staked(state, now, needs, offers), state.demand.mix()) if needs else None
    if plan is not None:
        for start in plan.starts:
            attempts.assign(state, now, start)
            state.standing.promises.pop(start.job_id, None)
        for displace in plan.displacements:
            victim = state.attempts[displace.attempt]
            attempts.stop(state, now, victim, displace.why, attempts.PRECOPY_PREEMPTION_MS)
        lacks = readings.shortage(state) if plan.waits else ""
        for job_id, sentence in plan.waits:
            dearer = state.standing.notes.get(job_id, "")
            waits[job_id] = sentence + (lacks + dearer if state.jobs[job_id].spec.gpus else "")
        # More may fit than one pass starts, and what others wait for has changed with every start:
        # look again in the next batch.
        placed = sum(len(start.places) for start in plan.starts)
        state.dirty = placed >= STARTS_PER_PASS_MAX or (not whole and bool(plan.starts))
    _note_waits(state, waits)


def _leaving(state: State) -> bool:
    """Whether somebody is about to leave a node that takes work."""
    for attempt_id in state.indices.open_attempts:
        attempt = state.attempts[attempt_id]
        if attempt.phase is AttemptPhase.STOPPING and is_open(state.nodes[attempt.node]):
            return True
    return False


def _need(state: State, now: Instant, job: Job) -> Need:
    good = state.good_checkpoints(job)
    pieces = good[0].pieces if good else ()
    replicas = tuple(dict.fromkeys(name for piece in pieces for name in piece.replicas))
    last = state.gang(job) if replicas else []
    near = tuple(name for rank in last for name in (rank.node, rank.replica_node))
    promise = state.standing.promises.get(job.id)
    return Need(
        job.id,
        job.spec,
        replicas,
        state.avoid.get(job.id, ""),
        near,
        types=decisions.order_of(state, now, job),
        only="" if promise is None else promise.gpu_type,
        leaving=job.phase is not JobPhase.QUEUED,
    )


def _staked(
    state: State, now: Instant, needs: Sequence[Need], offers: Sequence[Offer]
) -> Sequence[Offer]:
    """With what a stop would cost each tenant, where somebody may have to give way."""
    first = min(CLASS_RANK[need.spec.job_class] for need in needs)
    if not any(tenant.rank > first for offer in offers for tenant in offer.tenants):
        return offers
    return costs.staked(state, now, offers)


def _blocked(state: State, now: Instant, job: Job) -> str:
    eligible_ms = state.eligible_ms.get(job.id, 0)
    if eligible_ms > now.now_ms:
        return job.reason
    return checkpoints.head_within_reach(state, job)


def _note_waits(state: State, waits: dict[int, str]) -> None:
    logged = 0
    for job_id, sentence in waits.items():
        if state.waits.get(job_id) != sentence:
            state.waits[job_id] = sentence
            if logged < WAITS_LOGGED_MAX:
                state.log("info", "job.waiting", job=job_id, reason=sentence)
                logged += 1
