"""One decision over whatever waits: the queue and the fleet go to placement, what it says is done.

Problem: a fleet is asked for room at every submission and every end, and nobody may be forgotten
between two of them. So each batch of events ends with one round. It looks at everything that waits
when capacity may have come free, else at the new jobs alone. In which order, and on which types of
GPU, the last decision over all jobs says (`decisions.py`).
"""

from coordinator.core import (
    attempts,
    claims,
    costs,
    decisions,
    mismatches,
    outcomes,
    projects,
    readings,
    reservations,
    reserved,
    trials,
)
from coordinator.core import needs as queue_of
from coordinator.core.offers import is_open, open_rooms
from coordinator.core.phases import AttemptPhase
from coordinator.core.placement import STARTS_PER_PASS_MAX, Need, place_in
from coordinator.core.projects import Standing
from coordinator.core.state import Instant, State

# Changes of wait reasons are logged for the head of the queue only; the rest can be asked for.
WAITS_LOGGED_MAX = 20


def decide(state: State, now: Instant) -> None:
    """One placement pass: over everything that waits when capacity may have come free; over the new
    jobs alone when nothing else has happened, since those that waited before still do not fit.

    While somebody is leaving for somebody else, what is free may be kept for that job, and only a
    whole pass knows.
    """
    trials.admit(state)
    decisions.note(state, now)
    decisions.forget(state, now)
    whole = state.dirty or _leaving(state) or bool(state.standing.promises)
    considered = state.queued if whole else state.fresh
    tenancy = projects.standing_of(state, now) if considered else Standing()
    reservations.note(state, now, considered)
    queue = queue_of.in_turn(state, considered, tenancy.lent)
    state.dirty, state.fresh = False, {}
    needs: list[Need] = []
    waits: dict[int, str] = {}
    for job in queue:
        blocked = queue_of.blocked(state, now, job)
        if not blocked or claims.waits_out(state, now, job):
            needs.append(queue_of.need_of(state, now, job, tenancy.lent))
        if blocked and job.id in state.queued:  # and not one that still has to leave another place
            waits[job.id] = blocked
            trials.step_back(state, now, job)
    stepped_back = state.dirty
    if whole:
        reservations.review(state, now)
    # Nodes come and go, and report, far more often than somebody waits for them.
    plan = None
    if needs:
        rooms = open_rooms(state, tenancy.recallable)
        keeps = reserved.keeps(state, now)
        plan = place_in(needs, rooms, keeps, costs.stakes(state, now))
    if plan is not None:
        for start in plan.starts:
            attempts.assign(state, now, start)
            state.standing.promises.pop(start.job_id, None)
        for displace in plan.displacements:
            victim = state.attempts[displace.attempt]
            job, its = state.jobs[displace.job_id], state.jobs[victim.job_id]
            why = displace.why + projects.why_recalled(tenancy, its, job)
            attempts.stop(state, now, victim, why, attempts.PRECOPY_PREEMPTION_MS)
            claims.note(state, now, job.id)
        lacks = readings.shortage(state) if plan.waits else ""
        for job_id, sentence in plan.waits:
            job = state.jobs[job_id]
            if job.spec.gpus:
                sentence += lacks + state.standing.notes.get(job_id, "")
                promise = state.standing.promises.get(job_id)
                sentence += promise.note if promise is not None else ""
                sentence += reserved.describe(state, now, job)
            sentence += mismatches.describe(state, job) + outcomes.describe_lack(state, now, job)
            waits[job_id] = sentence + projects.why_waits(state, tenancy, job)
        # More may fit than one pass starts, and what others wait for has changed with every start:
        # look again in the next batch.
        placed = sum(len(start.places) for start in plan.starts)
        more = placed >= STARTS_PER_PASS_MAX or (not whole and bool(plan.starts))
        state.dirty = stepped_back or more
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
