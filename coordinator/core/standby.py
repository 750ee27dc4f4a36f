"""The standby: which node would take a running job next, and when another one is named.

Problem: a handoff is fast when the checkpoint is where the job goes. So each attempt has a standby,
the node that gets its checkpoints. It is chosen as a node that could go on with the job, and then
the fleet changes: its GPUs are taken by somebody who may not be displaced, it is cordoned, a better
one comes free. Copies that follow every change would carry whole states about; copies that follow
none lie where nobody can use them. So the standby moves, in six lines:

1. A node fits better the sooner it could go on with the job: free GPUs, then such as lower classes
   hold, then such as nobody gives up, then none; a node that takes no work comes last.
2. Only a node that fits strictly better takes over; having the last checkpoint, then little to do,
   and then the copies of few others, decides between those that fit equally.
3. It must have been better for `SETTLED_MS`, so that a gap between two short jobs moves nothing.
4. A standby stays for `INTERVAL_MS`.
5. Before a drain or a preemption the copy is needed at once: then only 1 and 2 hold.
6. Where `COPIES_FAILED_MAX` copies in a row have not arrived, another takes over, if there is one.
   That is forgotten when the node has been away and is back, once, and after `FORGOTTEN_MS`: one
   that comes and goes, since its disk is full, is not tried each time.

The next checkpoint goes to the new one first. Only chunks travel that it lacks, so what is frozen
travels once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from coordinator.core import readings, shares
from coordinator.core.live import Rank, StandbyWatch
from coordinator.core.live import StandbyWalk as Walk
from coordinator.core.model import CLASS_RANK, SHARED, Attempt, Job, Replication
from coordinator.core.node_power import silent
from coordinator.core.phases import AttemptPhase, GpuPhase, NodeIntent, NodePhase
from coordinator.core.sentences import quantity
from coordinator.core.shares import Hold
from coordinator.core.standby_order import Place
from coordinator.core.state import Instant, LiveNode, State
from coordinator.core.validate import could_hold, suits

# A node is often free for some seconds between two jobs of one queue.
SETTLED_MS = 10_000
# A large state takes a minute over 1 Gbit/s; a standby that moved oftener would never have it all.
INTERVAL_MS = 60_000
# With the agent's waits, of half a minute first, that is some two minutes: a restart is no reason.
COPIES_FAILED_MAX = 3
# Where none arrived; so many are remembered for an attempt.
FAILED_MAX = 8
# A disk is cleared, a link mended. Too soon costs three copies that fail again, and two minutes.
FORGOTTEN_MS = 3_600_000
# Nodes looked at in one tick, by all reviews: five milliseconds, four times a second. Of thousands
# of nodes each tick looks at some.
LOOKS_PER_TICK_MAX = 400
# Each attempt's turn comes once in so many ticks: a second late is nothing to what must have been
# so for ten.
TICKS_PER_TURN = 4
# Kinds of requests that a node is remembered for, some 200 bytes each.
FITS_MAX = 32


class Fit(IntEnum):
    """How soon a node could go on with a job; more is sooner."""

    CLOSED = 0
    UNABLE = 1
    TAKEN = 2
    DISPLACING = 3
    FREE = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that is up. `holds` the last checkpoint; `load` is how many attempts it has, and
    `copies` of how many others it is the standby."""

    node: str
    fit: Fit
    holds: bool = False
    load: int = 0
    copies: int = 0

    @property
    def rank(self) -> Rank:
        """The least is the best. Who could not take it now anyway had better hold it already."""
        closed, able = self.fit is Fit.CLOSED, self.fit >= Fit.DISPLACING
        return (closed, not able, not self.holds, -self.fit, self.load, self.copies, self.node)


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    return min(candidates, key=lambda candidate: candidate.rank, default=None)


def better(present: Candidate | None, candidates: Sequence[Candidate]) -> Candidate | None:
    """The best of those that fit strictly better than the present standby."""
    if present is None:
        return best(candidates)
    return best([candidate for candidate in candidates if candidate.fit > present.fit])


def move(
    now_ms: int,
    watch: StandbyWatch,
    present: Candidate | None,
    candidates: Sequence[Candidate],
) -> tuple[StandbyWatch, Candidate | None]:
    """The node that takes over now, if one does, and what to remember until the next look."""
    found = better(present, candidates)
    if found is None:
        return replace(watch, better_since_ms=None), None
    since_ms = now_ms if watch.better_since_ms is None else watch.better_since_ms
    stays = watch.moved_ms is not None and now_ms - watch.moved_ms < INTERVAL_MS
    if stays or now_ms - since_ms < SETTLED_MS:
        return replace(watch, better_since_ms=since_ms), None
    return StandbyWatch(moved_ms=now_ms, failed=watch.failed), found


# --- of the state ---------------------------------------------------------------------------------


def may_be(live: LiveNode) -> bool:
    """A node that is lost takes no copies, and one that is being switched off not for long."""
    return live.phase is not NodePhase.LOST and not silent(live.node.power)


def choose(state: State, job: Job, node_id: str, rank: int = 0, but: Sequence[str] = ()) -> str:
    """The standby of an attempt on `node_id`, any `but` these; empty when the job wants none or no
    such node is up."""
    return _best_of_all(state, job, (node_id, *but), rank, -1)


def _best_of_all(state: State, job: Job, but: Sequence[str], rank: int, least: int) -> str:
    """The best of those that fit better than `least`, any `but` these; empty where there is none.
    It takes long to say how soon a node could go on with the job, so of those without its last
    checkpoint no more are asked than up to the first that could at once."""
    if job.spec.replication is Replication.NONE:
        return ""
    good = state.good_checkpoints(job)
    pieces = good[0].pieces if good else ()
    holders = pieces[rank].replicas if rank < len(pieces) else ()
    first, soonest, alike = "", least, _alike(job)
    for place in _in_order(state, job):
        name = place[-1]
        live = state.nodes[name]
        if live.phase is NodePhase.UP and name not in but and name not in holders:
            found = _known_fit(state, job, live, alike)
            if found > soonest:
                first, soonest = name, found
            if found == Fit.FREE:
                break
    others = [state.nodes[name] for name in (first, *holders) if name in state.nodes]
    able = [live for live in others if _takes_copies(live) and live.node.id not in but]
    asked = [candidate(state, job, live, rank) for live in able]
    chosen = best([each for each in asked if each.fit > least])
    return "" if chosen is None else chosen.node


def _takes_copies(live: LiveNode) -> bool:
    return live.phase is NodePhase.UP and may_be(live)


def _in_order(state: State, job: Job) -> Sequence[Place]:
    """Nodes that may be its standby once they are up, by how much they have to do."""

    def place_of(name: str) -> Place | None:
        live = state.nodes.get(name)
        if live is None or silent(live.node.power):
            return None
        return len(live.attempts), state.indices.standbys[name], name

    return state.indices.standby_order.places(place_of, gang=job.spec.ranks > 1)


def candidate(state: State, job: Job, live: LiveNode, rank: int = 0) -> Candidate:
    good = state.good_checkpoints(job)
    pieces = good[0].pieces if good else ()
    holds = rank < len(pieces) and live.node.id in pieces[rank].replicas
    copies = _copies(state, job, live.node.id)
    return Candidate(live.node.id, fit(state, job, live), holds, len(live.attempts), copies)


def _copies(state: State, job: Job, node_id: str) -> int:
    """The ranks of a gang stay together, as they would go on."""
    return state.indices.standbys[node_id] if job.spec.ranks == 1 else 0


def fit(state: State, job: Job, live: LiveNode) -> Fit:
    return Fit(_known_fit(state, job, live, _alike(job)))


def _alike(job: Job) -> tuple[object, ...]:
    """Equal for jobs that fit equally."""
    spec = job.spec
    request = (spec.gpus, spec.gpu_types, spec.gpu_memory_bytes_min, spec.memory_bytes)
    share = (spec.shared_gpu_memory_bytes, spec.share_automatic)
    return CLASS_RANK[spec.job_class], spec.ranks > 1, request, share


def _known_fit(state: State, job: Job, live: LiveNode, alike: tuple[object, ...]) -> int:
    """Remembered until the node changes: when many start or leave, each of them asks all nodes."""
    known = state.rooms.fits.setdefault(live.node.id, {})
    found = known.get(alike)
    if found is None:
        if len(known) >= FITS_MAX:
            known.clear()
        found = known[alike] = _fit(state, job, live)
    return found


def _fit(state: State, job: Job, live: LiveNode) -> Fit:
    if live.node.intent is not NodeIntent.OPEN:
        return Fit.CLOSED
    spec = job.spec
    closed = readings.closed(live)
    there = [gpu for gpu in live.node.gpus if gpu.uuid not in closed]
    able = could_hold(spec, there, live.node.host.memory_bytes)
    if not able or (spec.ranks > 1 and not live.gangs):
        return Fit.UNABLE
    if spec.shared_gpu_memory_bytes and not live.shares:
        return Fit.UNABLE
    free = lower = 0
    for uuid, gpu in live.gpus.items():
        if uuid in closed or gpu.phase is GpuPhase.ABSENT or not suits(spec, gpu.facts):
            continue
        holds = [
            (Hold(holder, state.share_bytes(holder)), _gives_way(state, job, holder))
            for holder in gpu.holders
        ]
        now, then = shares.gives_room(gpu.facts, holds, spec)
        free += now
        lower += then and not now
    staying_bytes = used_bytes = 0
    for attempt_id in live.attempts:
        held_bytes = state.jobs[state.attempts[attempt_id].job_id].spec.memory_bytes
        used_bytes += held_bytes
        staying_bytes += 0 if _gives_way(state, job, attempt_id) else held_bytes
    left_bytes = live.node.host.memory_bytes - spec.memory_bytes
    if free >= spec.gpus and used_bytes <= left_bytes:
        return Fit.FREE
    enough = free + lower >= spec.gpus and staying_bytes <= left_bytes
    return Fit.DISPLACING if enough else Fit.TAKEN


def _gives_way(state: State, job: Job, attempt_id: str) -> bool:
    attempt = state.attempts.get(attempt_id)
    if attempt is None:
        return False  # a stray: it leaves, but it is not known when
    held = state.jobs[attempt.job_id].spec.job_class
    return CLASS_RANK[held] > CLASS_RANK[job.spec.job_class]


def aim(state: State, attempt_id: str) -> str:
    """Where an attempt that leaves at once should send its copies: the present standby, unless a
    node fits better."""
    attempt = state.attempts[attempt_id]
    job = state.jobs[attempt.job_id]
    present = _present(state, job, attempt.replica_node, attempt.rank)
    if present is not None and present.fit is Fit.FREE:
        return attempt.replica_node  # nobody fits better
    least = -1 if present is None else present.fit
    but = (attempt.node, *_failed(state, attempt))
    return _best_of_all(state, job, but, attempt.rank, least) or attempt.replica_node


def instead(state: State, now: Instant, attempt: Attempt) -> str:
    """The node that takes over from a standby at which no copies arrive: one where that has not
    been so, else where that is longest ago, since it may have been mended. Empty where there is no
    other, or one has just taken over: the agent may not have heard of it yet. Each that has failed
    makes the next one later, for it may be the attempt's own node that is at fault."""
    watch, job = _watch(state, attempt), state.jobs[attempt.job_id]
    times = _failed(state, attempt, now)
    wait_ms = INTERVAL_MS * max(1, len(times))
    if watch.moved_ms is not None and now.now_ms - watch.moved_ms < wait_ms:
        return ""
    present = attempt.replica_node
    times.pop(present, None)
    chosen, failed = _another(state, job, attempt, list(times)[1 - FAILED_MAX :], (present,))
    known = _remembered(watch, now)
    often = 1 + sum(count for name, _, count in known if name == present)
    kept = [one for one in known if one[0] != present and (one[0] in failed or one[0] not in times)]
    noted = (*kept[1 - FAILED_MAX :], (present, now.now_ms, often))
    state.standby_watches[attempt.id] = StandbyWatch(now.now_ms, failed=noted)
    return chosen


def in_place(state: State, job: Job, attempt: Attempt) -> str:
    """The node that takes over from a standby that is not there any more."""
    return _another(state, job, attempt, list(_failed(state, attempt)))[0]


def _another(
    state: State, job: Job, attempt: Attempt, failed: Sequence[str], but: Sequence[str] = ()
) -> tuple[str, Sequence[str]]:
    """Any `but` these: one that has not failed, else the one that did so longest ago. With it those
    that count as failed after that."""
    chosen = choose(state, job, attempt.node, attempt.rank, (*failed, *but))
    while not chosen and failed:
        failed = failed[1:]
        chosen = choose(state, job, attempt.node, attempt.rank, (*failed, *but))
    return chosen, failed


def review(state: State, now: Instant) -> list[tuple[str, str]]:
    """Look at a few attempts, all in turn; returns which standbys move, and where to. Where there
    are more nodes than may be looked at in one tick, the next one goes on with the same attempt."""
    running = list(state.indices.open_attempts)
    nodes = list(state.nodes.values())
    looks, seen, moves = LOOKS_PER_TICK_MAX, 0, []
    if state.walk is not None and state.walk.attempt in state.indices.open_attempts:
        state.reviewed = running.index(state.walk.attempt)  # others before it may have ended
    while TICKS_PER_TURN * seen < len(running) and looks > 0:
        attempt_id = running[state.reviewed % len(running)]
        begun, state.walk = state.walk, None
        walk = begun if begun is not None and begun.attempt == attempt_id else Walk(attempt_id)
        attempt = state.attempts[attempt_id]
        looks -= 1
        present = _present(state, state.jobs[attempt.job_id], attempt.replica_node, attempt.rank)
        # Without a standby `checkpoints.retarget` finds one as soon as there is any.
        if attempt.phase is AttemptPhase.RUNNING and present is not None:
            if present.fit is not Fit.FREE:  # else nobody is better
                part = nodes[walk.place : walk.place + looks]
                looks -= _look(state, attempt, present, walk, part)
                if walk.place < len(nodes):
                    state.walk = walk
                    break
            moves += _moved(state, now, attempt, present, walk)
        seen += 1
        state.reviewed = (state.reviewed + 1) % len(running)
    return moves


def _look(
    state: State, attempt: Attempt, present: Candidate, walk: Walk, part: Sequence[LiveNode]
) -> int:
    """Go on with a walk through the next nodes; returns how many were looked at. It is at its end
    with the first that is `_perfect` and has no more copies than the one that the last such walk
    found: in a fleet of thousands with idle nodes that is soon."""
    job = state.jobs[attempt.job_id]
    closed = (attempt.node, *_failed(state, attempt))
    perfect, few = _perfect(state, job, attempt), state.indices.few_copies.get(_alike(job), 0)
    for looked, live in enumerate(part, start=1):
        walk.place += 1
        if _takes_copies(live) and live.node.id not in closed:
            asked = candidate(state, job, live, attempt.rank)
            if asked.fit > present.fit and (walk.found is None or asked.rank < walk.found):
                walk.found = asked.rank
                if asked.rank[:-2] == perfect and asked.copies <= few:
                    walk.place = len(state.nodes)
                    return looked
    return len(part)


def _perfect(state: State, job: Job, attempt: Attempt) -> tuple[bool, bool, bool, int, int]:
    """The rank, but for copies and name, that nobody who might take over can surpass: a free and
    empty node, with the last checkpoint where any other has it."""
    good = state.good_checkpoints(job)
    pieces = good[0].pieces if good else ()
    holders = pieces[attempt.rank].replicas if attempt.rank < len(pieces) else ()
    held = any(name not in (attempt.node, attempt.replica_node, SHARED) for name in holders)
    return Candidate("", Fit.FREE, holds=held).rank[:-2]


def _moved(
    state: State, now: Instant, attempt: Attempt, present: Candidate, walk: Walk
) -> list[tuple[str, str]]:
    """What follows from a walk that has come to its end; who was the best on the way is looked at
    once more."""
    job = state.jobs[attempt.job_id]
    live = None if walk.found is None else state.nodes.get(walk.found[-1])
    if walk.found is not None:
        few = state.indices.few_copies
        if len(few) >= FITS_MAX:
            few.clear()
        few[_alike(job)] = walk.found[-2]
    there = live is not None and _takes_copies(live)
    others = [candidate(state, job, live, attempt.rank)] if live is not None and there else []
    watch = _watch(state, attempt)
    watch = replace(watch, failed=_remembered(watch, now))
    state.standby_watches[attempt.id], found = move(now.now_ms, watch, present, others)
    return [] if found is None else [(attempt.id, found.node)]


def _watch(state: State, attempt: Attempt) -> StandbyWatch:
    return state.standby_watches.get(attempt.id, StandbyWatch())


def _failed(state: State, attempt: Attempt, now: Instant | None = None) -> dict[str, int]:
    """Where no copies of it arrived, and when that was seen, the oldest first: of nodes that have
    not been away since, or have failed again after that. `now`: neither after so long a time, which
    each review looks at."""
    watch = _watch(state, attempt)
    return {
        name: at_ms
        for name, at_ms, often in (watch.failed if now is None else _remembered(watch, now))
        if often > 1 or name not in state.nodes or state.nodes[name].joined_ms <= at_ms
    }


def _remembered(watch: StandbyWatch, now: Instant) -> tuple[tuple[str, int, int], ...]:
    return tuple(one for one in watch.failed if now.now_ms - one[1] < FORGOTTEN_MS)


def _present(state: State, job: Job, node_id: str, rank: int) -> Candidate | None:
    live = state.nodes.get(node_id)
    return None if live is None else candidate(state, job, live, rank)


def describe(state: State, job: Job, node_id: str, standby: str) -> str:
    """What becomes of a job on `node_id` if that node dies, for people; empty where it has no
    standby."""
    live = state.nodes.get(standby)
    if live is None:
        return ""
    if live.phase is NodePhase.UP and fit(state, job, live) >= Fit.DISPLACING:
        # There may be one node that is free, and then it is everybody's.
        others = max(0, state.indices.standbys[standby] - 1)
        too = f", as do those of {quantity(others, 'other attempt')}" if others else ""
        return f"if {node_id} dies it continues on {standby}, where its checkpoints go{too}"
    return f"its checkpoints go to {standby}, which could not take it now"
