"""One decision over whatever waits: the queue and the fleet go to placement, what it says is done.

Problem: a fleet is asked for room at every submission and every end, and nobody may be forgotten
between two of them. So each batch of events ends with one round. It looks at everything that waits
when capacity may have come free, else at the new jobs alone.
"""

from collections.abc import Iterable

from coordinator.core import attempts, checkpoints, coruns, projects, readings
from coordinator.core.model import CLASS_RANK, Job
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
    state.demand.note_jobs(state.jobs[job_id] for job_id in state.fresh if job_id in state.jobs)
    whole = state.dirty or _leaving(state)
    considered = state.queued if whole else state.fresh
    standing = projects.standing_of(state, now) if considered else Standing()
    queue = _in_turn(state, considered, standing)
    state.dirty, state.fresh = False, {}
    needs: list[Need] = []
    waits: dict[int, str] = {}
    for job in queue:
        blocked = _blocked(state, now, job)
        if blocked:
            waits[job.id] = blocked
        else:
            good = state.good_checkpoints(job)
            pieces = good[0].pieces if good else ()
            replicas = tuple(dict.fromkeys(name for piece in pieces for name in piece.replicas))
            last = state.gang(job) if replicas else []
            near = tuple(name for rank in last for name in (rank.node, rank.replica_node))
            avoid = state.avoid.get(job.id, "")
            shunned = coruns.shunned(state, job)
            lent = job.id in standing.lent
            needs.append(Need(job.id, job.spec, replicas, avoid, near, lent, shunned))
    # Nodes come and go, and report, far more often than somebody waits for them.
    plan = place_in(needs, open_rooms(state, standing.recallable)) if needs else None
    if plan is not None:
        for start in plan.starts:
            attempts.assign(state, now, start)
        for displace in plan.displacements:
            victim = state.attempts[displace.attempt]
            job, its = state.jobs[displace.job_id], state.jobs[victim.job_id]
            why = displace.why + projects.why_recalled(standing, its, job)
            attempts.stop(state, now, victim, why, attempts.PRECOPY_PREEMPTION_MS)
        lacks = readings.shortage(state) if plan.waits else ""
        for job_id, sentence in plan.waits:
            job = state.jobs[job_id]
            sentence += lacks if job.spec.gpus else ""
            waits[job_id] = sentence + projects.why_waits(state, standing, job)
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


def _in_turn(state: State, job_ids: Iterable[int], standing: Standing) -> list[Job]:
    """By class, and in each those first that are within their projects' quotas."""
    waiting = [state.jobs[job_id] for job_id in job_ids if job_id in state.queued]
    lent = standing.lent
    return sorted(waiting, key=lambda j: (CLASS_RANK[j.spec.job_class], j.id in lent, j.id))


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
