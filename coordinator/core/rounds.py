"""One decision over whatever waits: the queue and the fleet go to placement, what it says is done.

Problem: a fleet is asked for room at every submission and every end, and nobody may be forgotten
between two of them. So each batch of events ends with one round. It looks at everything that waits
when capacity may have come free, else at the new jobs alone.
"""

from coordinator.core import attempts, readings, reservations
from coordinator.core import needs as queue_of
from coordinator.core.offers import is_open, offers_of
from coordinator.core.phases import AttemptPhase
from coordinator.core.placement import STARTS_PER_PASS_MAX, Need, place
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
    whole = state.dirty or _leaving(state)
    considered = state.queued if whole else state.fresh
    reservations.note(state, now, considered)
    queue = queue_of.in_turn(state, considered)
    state.dirty, state.fresh = False, {}
    needs: list[Need] = []
    waits: dict[int, str] = {}
    for job in queue:
        blocked = queue_of.blocked(state, now, job)
        if blocked:
            waits[job.id] = blocked
        else:
            needs.append(queue_of.need_of(state, job))
    # Nodes come and go, and report, far more often than somebody waits for them.
    offers = offers_of(state) if needs else []
    if whole:
        reservations.review(state, now, offers)
    keeps = reservations.keeps(state, now)
    plan = place(needs, offers, state.demand.mix(), keeps) if needs else None
    if plan is not None:
        for start in plan.starts:
            attempts.assign(state, now, start)
        for displace in plan.displacements:
            victim = state.attempts[displace.attempt]
            attempts.stop(state, now, victim, displace.why, attempts.PRECOPY_PREEMPTION_MS)
        lacks = readings.shortage(state) if plan.waits else ""
        for job_id, sentence in plan.waits:
            job = state.jobs[job_id]
            waits[job_id] = sentence + (lacks if job.spec.gpus else "")
            waits[job_id] += reservations.describe(state, now, job)
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


def _note_waits(state: State, waits: dict[int, str]) -> None:
    logged = 0
    for job_id, sentence in waits.items():
        if state.waits.get(job_id) != sentence:
            state.waits[job_id] = sentence
            if logged < WAITS_LOGGED_MAX:
                state.log("info", "job.waiting", job=job_id, reason=sentence)
                logged += 1
