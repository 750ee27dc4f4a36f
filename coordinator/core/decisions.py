"""The decision over all jobs in the live coordinator: when it is made, and what follows from it.

Problem: which job is worth most where can only be said of all jobs together (`allocation.py`), and
that costs a tenth of a second of a large fleet, a thousand times what a placement may take. So it
is made beside the rounds, seldom, and they go by what it has left (`standing.py`):

1. It is made every `TICK_MS`, and `QUIET_MS` after something has happened that it does not know;
   the more jobs and nodes there are, the longer after the one before (`CONTENDER_MS` and `NODE_MS`
   each): a few percent of a core at most.
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

from collections.abc import Iterable, Mapping, Sequence

from coordinator.core import apart, claims, contenders, deadlines, moves, projects, stop_bounds
from coordinator.core.allocation import Allocation, allocate, is_late, latest_start_ms, worths
from coordinator.core.contenders import Entrant, Field
from coordinator.core.horizon import Horizon
from coordinator.core.model import CLASS_RANK, Job, JobIntent
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.standing import Fleet
from coordinator.core.state import Instant, State

TICK_MS = 60_000
QUIET_MS = 1_500
CONTENDER_MS = 10
NODE_MS = 1
# What a price may say of a wait is worth saying where it decides: not for a hundredth.
DEARER_RATIO = 1.05


# --- when -----------------------------------------------------------------------------------------


def note(state: State, now: Instant) -> None:
    """A round is made since something has happened; what a decision has done itself it knows."""
    standing = state.standing
    if standing.stale_ms is None and standing.decided_ms != now.now_ms:
        standing.stale_ms = now.now_ms


def tick(state: State, now: Instant) -> None:
    standing = state.standing
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
    """Over all jobs; the round at the end of this batch goes by it."""
    standing = state.standing
    standing.decided_ms, standing.stale_ms = now.now_ms, None
    standing.fleet, standing.order, standing.turn, standing.notes = None, {}, {}, {}
    standing.latest_ms, standing.late_ms, standing.alone_ms = {}, {}, {}
    forget(state, now)
    jobs = contenders.contending(state)
    if not jobs:
        return
    standing.fleet = contenders.fleet_of(state)
    lent = projects.standing_of(state, now).lent
    standing.tenants = projects.tenants_of(state, now)
    field = contenders.field_of(state, now, standing.fleet, jobs, lent)
    allocation = allocate(
        [entrant.contender for entrant in field.entrants],
        field.capacity,
        now.now_ms,
        state.options.aims,
        tenants=standing.tenants,
        solve=state.options.solve,
    )
    standing.prices, standing.ahead = allocation.prices, allocation.ahead
    aside = deadlines.entrants(state, now, field.aside, standing.fleet, lent)
    standing.latest_ms = {
        entrant.job.id: latest_start_ms(entrant.contender)
        for entrant in (*field.entrants, *aside)
        if now.now_ms < (entrant.contender.deadline_ms or 0)
    }
    standing.late_ms = {
        entrant.job.id: standing.latest_ms[entrant.job.id]
        for entrant in (*field.entrants, *aside)
        if is_late(entrant.contender, now.now_ms)
    }
    standing.alone_ms = deadlines.alone_by(now, (*field.entrants, *aside))
    _remember(state, now, field, allocation)
    moves.make(state, now, field, allocation, aside)
    apart.make(state, now, aside, lent)
    state.dirty = bool(state.queued) or state.dirty


def _remember(state: State, now: Instant, field: Field, allocation: Allocation) -> None:
    standing = state.standing
    kept: dict[int | str, int] = {}
    for entrant in field.entrants:
        job, current = entrant.job, state.current(entrant.job)
        for key in (job.id, "" if current is None else current.id):
            if key in standing.since_ms:
                kept[key] = standing.since_ms[key]
        if job.phase is not JobPhase.QUEUED:
            continue
        grant = allocation.grants.get(job.id)
        granted = "" if grant is None else grant.option.gpu_type
        worth = _worth(state, now, entrant)
        standing.order[job.id] = _order(state, entrant, worth, granted)
        gpus = job.spec.ranks * job.spec.gpus
        if entrant.known and worth:
            standing.turn[job.id] = (grant is not None, max(worth) / gpus)
        if entrant.known and grant is None:
            standing.notes[job.id] = _note(entrant, worth, standing.prices)
    standing.since_ms = kept


def _worth(state: State, now: Instant, entrant: Entrant) -> list[float]:
    contender = entrant.contender
    ahead = state.standing.ahead.get(contender.rank, Horizon(0.0))
    aims, tenants = state.options.aims, state.standing.tenants
    return worths([contender], now.now_ms, aims, tenants, ahead)[0]


def _order(
    state: State, entrant: Entrant, worth: Sequence[float], granted: str = ""
) -> tuple[tuple[str, float], ...]:
    """Its types, what it was granted first, then by what is left of their worth after the price;
    empty where there is no choice, or nothing to choose by."""
    prices, fleet = state.standing.prices, state.standing.fleet
    rates, options = entrant.rates, entrant.contender.options
    if fleet is None or len(fleet.counts) < 2 or not rates.told:
        return ()
    surplus = [
        value - option.gpus * prices.get(option.gpu_type, 0.0)
        for value, option in zip(worth, options, strict=True)
    ]
    places = sorted(
        range(len(options)),
        key=lambda place: (options[place].gpu_type != granted, -surplus[place], place),
    )
    return tuple((options[place].gpu_type, rates.mean[place]) for place in places)


def _note(entrant: Entrant, worth: Sequence[float], prices: Mapping[str, float]) -> str:
    """Where it comes nearest to running, if it is a price that it does not pay there."""
    options = entrant.contender.options
    found = [
        (value / option.gpus - prices.get(option.gpu_type, 0.0), value / option.gpus, place)
        for place, (value, option) in enumerate(zip(worth, options, strict=True))
    ]
    if not found:
        return ""
    _, value, place = max(found)
    gpu_type = options[place].gpu_type
    price = prices.get(gpu_type, 0.0)
    if price <= DEARER_RATIO * value:
        return ""
    return f"; a GPU of type {gpu_type} is worth {value:.2g} to it, and {price:.2g} to others"


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
            found = _order(state, entrant, _worth(state, now, entrant))
        standing.order[job.id] = found
    return found


def _fleet(state: State) -> Fleet:
    """As it was at the last decision, unless nodes of another kind have come."""
    standing = state.standing
    if standing.fleet is None or standing.fleet.kinds != len(state.indices.kinds):
        standing.fleet = contenders.fleet_of(state)
        standing.order = {}
    return standing.fleet
