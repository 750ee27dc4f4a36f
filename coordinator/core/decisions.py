"""The decision over all jobs in the live coordinator: when it is made, and what follows from it.

Problem: which job is worth most where can only be said of all jobs together (`allocation.py`), and
that costs seconds of a core in a large fleet, ten thousand times what a placement may take. So it
is made beside the rounds, seldom, and they go by what it has left (`standing.py`):

1. It is ordered every `TICK_MS`, and `QUIET_MS` after something has happened that it does not know;
   the more jobs and nodes there are, the longer after the one before (`CONTENDER_MS` and `NODE_MS`
   each): a few percent of a core at most. Somebody beside the loop makes it of what was gathered
   (`weighing.py`), and until the answer is there all goes by the one before. Of the answer only
   what is still true is taken: whoever has been started, stopped, ended, cancelled, held or lost
   since is left out (`contenders.stays`), and what is promised is looked for in the rooms of now.
   One is asked for at a time, and what fails is asked for again in `TICK_MS`. What is not answered
   within `ANSWER_MS_MAX` is given up: somebody else is asked at once, without the solver, which is
   left out for a while then, each time for longer, and after `HANGS_MAX` for good.
2. A job takes the first of its types that has room for it: the one that it was granted, then the
   others by what they are worth above their price. That is a preference, so no GPU idles beside a
   job that it could run. A job that has come since is priced by the same prices.
3. Those of a class who say how much they have left take turns by what they are worth, among
   themselves: each in a place of one of them. All others stand in the order of submission. Whoever
   must start now to keep a deadline comes before them (`deadlines.py`). Classes are never weighed
   against each other.
4. Who runs is stopped for it only by `moves.py`, and what somebody was stopped for is kept by a
   promise: the job goes first in its class, to that type, until it has started or the time is over
   in which everybody must have left.

Where nothing is known of speeds or of what is left, nothing of all this differs from one queue in
the order of submission, class by class.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from coordinator.core import (
    apart,
    claims,
    contenders,
    deadlines,
    moves,
    projects,
    stop_bounds,
    weighing,
)
from coordinator.core.allocation import is_late, latest_start_ms, worths
from coordinator.core.allocation_messages import AllocationMade, MakeAllocation
from coordinator.core.horizon import Horizon
from coordinator.core.model import CLASS_RANK, Job, JobIntent
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.standing import Asked, Entrant, Field, Fleet
from coordinator.core.state import Instant, State

TICK_MS = 60_000
QUIET_MS = 1_500
CONTENDER_MS = 10
NODE_MS = 1
# A hundred times what 20,000 jobs take: a busy machine's answer is worth waiting for, and a thread
# that hangs is not freed by another question.
ANSWER_MS_MAX = 300_000
# Each time that nobody answers a thread is lost until the coordinator is restarted, and perhaps a
# core; the greedy is worth a few percent less.
SOLVER_RESTS_H = 1  # twice as long the next time
HANGS_MAX = 3


# --- when -----------------------------------------------------------------------------------------


def note(state: State, now: Instant) -> None:
    """A round is made since something has happened; what a decision has done itself it knows."""
    standing = state.standing
    if standing.stale_ms is None and standing.made_ms != now.now_ms:
        standing.stale_ms = now.now_ms


def tick(state: State, now: Instant) -> None:
    standing, asked = state.standing, state.standing.asked
    if asked is not None and now.now_ms - asked.at_ms >= ANSWER_MS_MAX:
        _give_up(state, now, asked)
    elif asked is not None:
        if now.now_ms - standing.timed_ms >= TICK_MS:  # no deadline waits for an answer
            _gather(state, now)
        return
    if standing.decided_ms is None:
        standing.decided_ms = now.now_ms - QUIET_MS
    since_ms = now.now_ms - standing.decided_ms
    apart_ms = CONTENDER_MS * (len(state.queued) + len(state.indices.open_attempts))
    apart_ms += NODE_MS * len(state.nodes)
    quiet = standing.stale_ms is not None and now.now_ms - standing.stale_ms >= QUIET_MS
    if since_ms >= TICK_MS or (quiet and since_ms >= apart_ms):
        decide(state, now)


# --- what -----------------------------------------------------------------------------------------


def decide(state: State, now: Instant) -> None:
    """Gather all jobs and have them weighed against each other; what comes of it says `made`."""
    standing = state.standing
    standing.decided_ms, standing.stale_ms = now.now_ms, None
    forget(state, now)
    standing.asked = asked = _gather(state, now)
    if asked is None:
        standing.fleet, standing.order, standing.turn, standing.notes = None, {}, {}, {}
        standing.entrants, standing.since_ms = {}, {}
        return
    state.commands.append(
        MakeAllocation(
            asked.asking,
            asked.field.entrants,
            asked.field.capacity,
            now.now_ms,
            state.options.aims,
            projects.tenants_of(state, now),
            state.options.solve if now.now_ms >= standing.unsolved_until_ms else None,
        )
    )


def _gather(state: State, now: Instant) -> Asked | None:
    """All jobs as they are, also who must start when; `None` where there are none."""
    jobs = contenders.contending(state)
    if not jobs:
        _note_times(state, now, Field((), {}), ())
        return None
    fleet = contenders.fleet_of(state)
    lent = projects.standing_of(state, now).lent
    field = contenders.field_of(state, now, fleet, jobs, lent)
    aside = tuple(deadlines.entrants(state, now, field.aside, fleet, lent))
    _note_times(state, now, field, aside)
    return Asked((state.leader_epoch, now.now_ms), now.now_ms, field, aside, fleet)


def _note_times(state: State, now: Instant, field: Field, aside: Sequence[Entrant]) -> None:
    """Who has to start when, and since when who is there."""
    standing, entrants = state.standing, (*field.entrants, *aside)
    standing.timed_ms = now.now_ms
    standing.latest_ms = {
        entrant.job.id: latest_start_ms(entrant.contender)
        for entrant in entrants
        if now.now_ms < (entrant.contender.deadline_ms or 0)
    }
    standing.late_ms = {
        entrant.job.id: standing.latest_ms[entrant.job.id]
        for entrant in entrants
        if is_late(entrant.contender, now.now_ms)
    }
    standing.alone_ms = deadlines.alone_by(now, entrants)
    standing.since_ms = {
        key: at_ms
        for key, at_ms in standing.since_ms.items()
        if key in standing.entrants or key in state.indices.open_attempts
    }


def made(state: State, now: Instant, event: AllocationMade) -> bool:
    """Take what is still true of it; the round at the end of this batch goes by it. An answer that
    nobody waits for (it comes late, twice, or from a life before this one) changes nothing. Returns
    whether there is a new decision."""
    standing, asked = state.standing, state.standing.asked
    if asked is None or asked.asking != event.asking:
        return False
    if event.allocation is None:
        standing.asked = None
        state.log("warning", "allocation.failed", reason=event.reason)
        standing.stale_ms = now.now_ms + TICK_MS - QUIET_MS  # whatever happens, not before
        return False
    standing.asked, standing.made_ms = None, now.now_ms
    standing.prices, standing.ahead = event.allocation.prices, event.allocation.ahead
    standing.tenants, standing.fleet = event.tenants, asked.fleet
    standing.order, standing.turn = dict(event.order), event.turn
    standing.notes = event.notes
    lent = projects.standing_of(state, now).lent
    aside = [each for each in asked.aside if contenders.stands(state, each, lent)]
    moves.make(state, now, asked.field, event.allocation, aside=aside, lent=lent)
    apart.make(state, now, aside, lent)
    state.dirty = bool(state.queued) or state.dirty
    return True


def _give_up(state: State, now: Instant, asked: Asked) -> None:
    """Who hangs may answer yet; it is not waited for, nor taken."""
    standing = state.standing
    standing.asked, standing.hangs = None, standing.hangs + 1
    reason = f"no answer has come for {(now.now_ms - asked.at_ms) // 1_000} s"
    if state.options.solve is not None:
        is_over = standing.hangs >= HANGS_MAX
        rests_h = math.inf if is_over else SOLVER_RESTS_H * 2 ** (standing.hangs - 1)
        standing.unsolved_until_ms = now.now_ms + rests_h * 3_600_000
        until = "until a restart" if is_over else f"for {rests_h} h"
        reason += f"; decisions are made without the solver {until}"
    state.log("error", "allocation.hangs", reason=reason)


def forget(state: State, now: Instant) -> None:
    """Promises that were kept, or cannot be any more, and moves of more than an hour ago."""
    standing = state.standing
    claims.forget(state)
    for job_id, promise in list(standing.promises.items()):
        job = state.jobs.get(job_id)
        waits = job is not None and (job.phase is JobPhase.QUEUED or leaves(state, job))
        if not waits or promise.until_ms <= now.now_ms:
            del standing.promises[job_id]
    stop_bounds.forget(state, now)


# --- what rounds ask ------------------------------------------------------------------------------


def leaves(state: State, job: Job) -> bool:
    """Whether it is about to give back its place, to go on elsewhere."""
    if job.phase is not JobPhase.ACTIVE or job.intent is not JobIntent.RUN:
        return False
    return any(rank.phase is AttemptPhase.STOPPING for rank in state.gang(job))


def leaving(state: State) -> list[Job]:
    """Who has been promised something and still has to leave."""
    jobs = [state.jobs[job_id] for job_id in state.standing.promises]
    return [job for job in jobs if job.phase is not JobPhase.QUEUED]


def in_turn(state: State, waiting: Iterable[Job], lent: Mapping[int, None]) -> list[Job]:
    """By class, in each those first that have a promise, and then those within their quotas; of
    these whose latest start has come, or for whom a node was rented. What is kept for another try
    of a job beyond its quota comes after those within theirs."""
    standing = state.standing
    first = deadlines.first(state)

    def tier(job: Job) -> tuple[int, int, bool, bool]:
        promise = standing.promises.get(job.id)
        is_lent = job.id in lent and (promise is None or promise.claim)
        # Who can go to some nodes alone chooses before who may go to any of a type.
        after = 2 if promise is None or is_lent else int(not promise.nodes)
        rank = CLASS_RANK[job.spec.job_class]
        return rank, after, is_lent, job.id not in first

    ordered = sorted(waiting, key=lambda job: (*tier(job), first.get(job.id, (0, 0.0)), job.id))
    places: dict[tuple[int, int, bool, bool], list[int]] = {}
    for place, job in enumerate(ordered):
        if job.id in standing.turn and job.id not in standing.promises and job.id not in first:
            places.setdefault(tier(job), []).append(place)
    for some in places.values():
        jobs = [ordered[place] for place in some]
        jobs.sort(key=lambda job: _turn(standing.turn[job.id], job.id))
        for place, job in zip(some, jobs, strict=True):
            ordered[place] = job
    return ordered


def _turn(turn: tuple[bool, float], job_id: int) -> tuple[bool, float, int]:
    granted, worth = turn
    return not granted, -worth, job_id


def order_of(state: State, now: Instant, job: Job) -> tuple[tuple[str, float], ...]:
    """The types that are worth most for it first; of one that has come since the last decision by
    its prices."""
    standing = state.standing
    if not contenders.competes(job.spec):
        return ()
    found = standing.order.get(job.id)
    if found is None:
        found, fleet = (), _fleet(state)
        if len(fleet.counts) > 1:
            entrant = contenders.newcomer(state, now, job, fleet)
            found = weighing.order_of(entrant, _worth(state, now, entrant), standing.prices)
        standing.order[job.id] = found
    return found


def _worth(state: State, now: Instant, entrant: Entrant) -> list[float]:
    contender = entrant.contender
    ahead = state.standing.ahead.get(contender.rank, Horizon(0.0))
    aims, tenants = state.options.aims, state.standing.tenants
    return worths([contender], now.now_ms, aims, tenants, ahead)[0]


def _fleet(state: State) -> Fleet:
    """As it was at the last decision, unless nodes of another kind have come."""
    standing = state.standing
    if standing.fleet is None or standing.fleet.kinds != len(state.indices.kinds):
        standing.fleet = contenders.fleet_of(state)
        standing.order = {}
    return standing.fleet
