"""Small jobs move together so that a large one fits: what it unlocks has to exceed what it costs.

Problem: small jobs come and go, and after an hour two GPUs are free on each of four nodes. A job of
four waits beside eight free GPUs, for somebody to end by chance. Nobody has to give up anything for
it: who runs on the one node can run as well on the other, and loses no more than a restart.

How, with each decision over all jobs (`decisions.py`), in the order of the queue:

1. Only a job of several GPUs is looked at, for which nobody leaves already, and only where enough
   GPUs of one type are free for it, over nodes that have not enough each. Nobody moves for one
   that may wait (`flexible.py`), unless it has to run now for a deadline.
2. Who moves is of its class or a lower one, is smaller than it, runs as one rank on that type, has
   a checkpoint to go on from, has run for its minimum (`allocation.run_s_min`), and has time to do
   so before a deadline. He goes to another node where GPUs of the same type are free that nobody
   was promised.
3. For each of its ranks that lacks room it is done where the stakes of those who move are least
   (`costs.py`), of those nodes first of which most is free.
4. It is done where the job would else wait, times its GPUs, for longer than all the restarts cost.
   How long it would wait is known where others say when they end (`reservations.choose`); else it
   is taken to be as long again as it has waited.
5. What is free and what comes free is promised by node: to the job, and to who moves. Each of those
   counts among the moves of an hour (`moves.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.core import (
    attempts,
    claims,
    contenders,
    costs,
    deadlines,
    flexible,
    foresight,
    moves,
    projects,
    reservations,
    reserved,
    stop_bounds,
)
from coordinator.core import needs as queue_of
from coordinator.core.allocation import run_s_min
from coordinator.core.displacement import Givers, Spread, Way, find_way
from coordinator.core.keeps import hidden
from coordinator.core.model import CLASS_RANK, Job
from coordinator.core.offers import open_rooms
from coordinator.core.placement import Need, find, keep_free, keep_room, kept_from, request_key
from coordinator.core.rooms import Place, Room, Tenant, of_type
from coordinator.core.sentences import listed, quantity
from coordinator.core.standing import Promise
from coordinator.core.state import Instant, State
from coordinator.core.validate import suits

# In one decision: of those who wait so many are looked at, the first in the queue, and for so many
# it is sought who could move; with both 60 ms at 1,000 nodes, 0.5 s at 10,000 (CPU time).
LOOKED_AT_MAX = 256
SOUGHT_MAX = 2
# Nodes that are looked at for each rank, those first of which most is free; on each some 100 us.
NODES_SOUGHT_MAX = 32


@dataclass(frozen=True, slots=True)
class Move:
    """A job that leaves `source`, where it makes room, for `target`."""

    job_id: int
    source: str
    target: str
    stake_gpu_s: float


@dataclass(frozen=True, slots=True)
class _Wait:
    """How long a job would wait; if that is not `known`, as long again as it has."""

    ms: int
    known: bool

    @property
    def words(self) -> str:
        duration = foresight.seconds(self.ms / 1000)
        return f"would else wait {duration}" if self.known else f"has waited {duration}"


def make_room(state: State, now: Instant) -> None:
    """After each decision over all jobs."""
    left = stop_bounds.left(state)
    if left > 0 and any(_is_large(state.jobs[job_id]) for job_id in state.queued):
        _Round(state, now, left).look()


def _is_large(job: Job) -> bool:
    return contenders.competes(job.spec) and job.spec.ranks * job.spec.gpus > 1


class _Trial:
    """Rooms that are changed to see what comes of it, and are as before where nothing does."""

    def __init__(self) -> None:
        self._saved: list[tuple[Room, Room]] = []

    @property
    def mark(self) -> int:
        return len(self._saved)

    def touch(self, room: Room) -> None:
        self._saved.append((room, room.saved()))

    def undo(self, mark: int = 0) -> None:
        for room, saved in reversed(self._saved[mark:]):
            room.restore(saved)
        del self._saved[mark:]


class _Round:
    """The queue in turn, each with what those before it have left."""

    def __init__(self, state: State, now: Instant, left: int) -> None:
        self.state, self.now, self.left = state, now, left
        self.sought = 0
        self.rooms = open_rooms(state)
        self.known = {room.offer.node: room for room in self.rooms}
        self.keeps = reserved.keeps(state, now)
        self.lent = projects.standing_of(state, now).lent
        self.late = deadlines.late(state)
        self.stake_of = costs.stakes(state, now)
        self.fleet = state.standing.fleet or contenders.fleet_of(state)
        for need in moves.promised(state):
            with hidden(kept_from(need, self.keeps), self.known):
                keep_room(need, self.rooms)
        self.emptying = [
            room for room in self.rooms if any(one.stopping for one in room.tenants.values())
        ]

    def look(self) -> None:
        refused: dict[tuple[object, ...], None] = {}
        state = self.state
        for job in queue_of.in_turn(state, state.queued, self.lent)[:LOOKED_AT_MAX]:
            if job.id in state.standing.promises or queue_of.blocked(state, self.now, job):
                continue
            waits_ms = flexible.left_ms(job, self.now.unix_ms)
            need = queue_of.need_of(state, self.now, job, self.lent)
            kept = kept_from(need, self.keeps)
            key = (*request_key(need), *(keep.job_id for keep in kept))
            if key in refused:
                continue
            with hidden(kept, self.known):
                if self._fits(need):
                    continue
                refused[key] = None
                if _is_large(job) and (not waits_ms or job.id in self.late):
                    self._make_room(job, need)
            if self.sought >= SOUGHT_MAX or self.left <= 0:
                return

    def _fits(self, need: Need) -> bool:
        """Now, or when those have left that are leaving."""
        if keep_free(need, self.rooms) is not None:
            return True
        within = self.emptying if need.spec.ranks == 1 else self.rooms
        return bool(self.emptying) and keep_room(need, within) is not None

    # --- who moves --------------------------------------------------------------------------------

    def _make_room(self, job: Job, need: Need) -> None:
        order = [name for name, _ in need.types] or contenders.types_for(job.spec, self.fleet)
        scattered = [name for name in order if self._is_scattered(need, name)]
        if not scattered:
            return
        self.sought += 1
        wait = self._wait(job, need)
        for gpu_type in scattered:
            trial = _Trial()
            found = self._clear(job, gpu_type, trial)
            if found is not None and self._is_worth(job, wait, found[0]):
                self._carry_out(job, gpu_type, wait, *found)
                return
            trial.undo()

    def _is_scattered(self, need: Need, gpu_type: str) -> bool:
        spec = need.spec
        free = sum(
            self.fleet.type_of(room.offer.node, uuid) == gpu_type and suits(spec, gpu)
            for room in self.rooms
            for uuid, gpu in room.free.items()
        )
        return free >= spec.ranks * spec.gpus

    def _clear(
        self, job: Job, gpu_type: str, trial: _Trial
    ) -> tuple[list[Move], list[Place]] | None:
        """Who has to move so that all of its ranks fit on this type, and where those are then."""
        one = Need(job.id, replace(job.spec, ranks=1), only=gpu_type)
        able = [
            room
            for room in of_type(self.rooms, gpu_type)
            if job.spec.ranks == 1 or room.offer.gangs
        ]
        found: list[Move] = []
        places: list[Place] = []
        for _ in range(job.spec.ranks):
            free = find(one, able)
            if free is not None:
                self._take(one, free[0], trial)
                places.append(free[0])
                continue
            cleared = self._clear_one(one, able, trial, self.left - len(found))
            if cleared is None:
                return None
            found += cleared[0]
            places.append(cleared[1])
        return found, places

    def _clear_one(
        self, one: Need, able: Sequence[Room], trial: _Trial, left: int
    ) -> tuple[list[Move], Place] | None:
        """Room for one rank where that costs least."""
        spec = one.spec

        def spread_of(some: Sequence[Room]) -> Spread | None:
            shares = some[0].takes(spec, one.only)[:1]
            return [(some[0], shares)] if shares else None

        rank = CLASS_RANK[spec.job_class], one.job_id in self.lent
        size = spec.gpus * self.state.jobs[one.job_id].spec.ranks
        givers = Givers(lambda tenant: self._may_move(tenant, rank, size, one.only), self.stake_of)
        sources = sorted(able, key=lambda room: (-len(room.free), room.offer.node))
        ways: list[tuple[float, str, Way]] = []
        for source in sources[:NODES_SOUGHT_MAX]:
            way = find_way(spec, one.only, [source], givers, spread_of)
            if way is not None and 0 < len(way.victims) <= left:
                stake = sum(map(self.stake_of, way.victims))
                ways.append((stake, source.offer.node, way))
        for _, _, way in sorted(ways, key=lambda found: found[:2]):
            made = self._move_all(one, way, able, trial)
            if made is not None:
                return made
        return None

    def _move_all(
        self, one: Need, way: Way, able: Sequence[Room], trial: _Trial
    ) -> tuple[list[Move], Place] | None:
        """Each to a place of its own, the largest first; none where one of them has none."""
        mark = trial.mark
        ((source, shares),) = way.spread
        place = Place(source.offer.node, shares[0])
        self._take(one, place, trial)
        others = [room for room in able if room is not source]
        found = []
        for tenant in sorted(way.victims, key=lambda one: (-len(one.gpu_uuids), one.attempt)):
            source.dismiss(tenant.attempt)
            job = self.state.jobs[self.state.attempts[tenant.attempt].job_id]
            need = replace(queue_of.need_of(self.state, self.now, job, self.lent), only=one.only)
            with hidden(kept_from(need, self.keeps), self.known):
                target = find(need, others)
            if target is None:
                trial.undo(mark)
                return None
            self._take(need, target[0], trial)
            stake = self.stake_of(tenant)
            found.append(Move(job.id, source.offer.node, target[0].node, stake))
        return found, place

    def _take(self, need: Need, place: Place, trial: _Trial) -> None:
        room = self.known[place.node]
        trial.touch(room)
        room.take(need.spec, place.gpu_uuids)

    def _may_move(self, tenant: Tenant, rank: tuple[int, bool], size: int, gpu_type: str) -> bool:
        state, now = self.state, self.now
        attempt = state.attempts[tenant.attempt]
        job = state.jobs[attempt.job_id]
        small = job.spec.gpus < size
        below = (CLASS_RANK[job.spec.job_class], job.id in self.lent) >= rank
        if not (small and below and moves.may_follow(state, now, attempt)):
            return False
        ran_s = max(0, now.unix_ms - attempt.assigned_unix_ms) / 1000
        return contenders.place_of(state, job, self.fleet) == gpu_type and ran_s >= run_s_min(
            costs.restart_s(state, now, job), state.options.aims
        )

    # --- what it is worth -------------------------------------------------------------------------

    def _wait(self, job: Job, need: Need) -> _Wait:
        anywhere = replace(need, only="", on=())
        ends_ms = foresight.ends(self.state, self.now)
        choice = reservations.choose(anywhere, self.rooms, ends_ms, self.now)
        if choice is not None and not choice.unknown:
            return _Wait(choice.free_in_ms, True)
        since_ms = self.state.waiting_ms.get(job.id, self.now.now_ms)
        return _Wait(self.now.now_ms - since_ms, False)

    def _is_worth(self, job: Job, wait: _Wait, found: Sequence[Move]) -> bool:
        saves_s = [costs.save_s(self.state, self.state.jobs[move.job_id]) for move in found]
        leave_ms = attempts.PRECOPY_PREEMPTION_MS + round(max(saves_s, default=0.0) * 1000)
        gpus = job.spec.ranks * job.spec.gpus
        gain_gpu_s = gpus * (wait.ms - leave_ms) / 1000
        return bool(found) and gain_gpu_s > sum(move.stake_gpu_s for move in found)

    # --- what follows -----------------------------------------------------------------------------

    def _carry_out(
        self, job: Job, gpu_type: str, wait: _Wait, found: Sequence[Move], places: Sequence[Place]
    ) -> None:
        state, now = self.state, self.now
        self.left -= len(found)
        gpus = job.spec.ranks * job.spec.gpus
        for move in found:
            mover = state.jobs[move.job_id]
            restart = foresight.seconds(move.stake_gpu_s / mover.spec.gpus)
            reason = (
                f"moves to {move.target} to make room on {move.source} for job {job.id}, which"
                f" {wait.words} for {quantity(gpus, 'GPU')}; a restart takes about {restart} here"
            )
            moves.send_away(state, now, mover, reason, move.target)
        until_ms = moves.until_left_ms(state, now, [move.job_id for move in found])
        for move in found:
            promise = Promise(gpu_type, until_ms, now.now_ms, (move.target,))
            state.standing.promises[move.job_id] = promise
        nodes = tuple(dict.fromkeys(place.node for place in places))
        note = f"; makes room: {_told(found)}, since it {wait.words}"
        state.standing.promises[job.id] = Promise(gpu_type, until_ms, now.now_ms, nodes, note)
        claims.note(state, now, job.id)


def _told(found: Sequence[Move]) -> str:
    by_way: dict[tuple[str, str], list[int]] = {}
    for move in found:
        by_way.setdefault((move.source, move.target), []).append(move.job_id)
    ways = []
    for (source, target), job_ids in by_way.items():
        who, verb = ("job", "moves") if len(job_ids) == 1 else ("jobs", "move")
        ways.append(f"{who} {listed([str(one) for one in job_ids])} {verb} {source} -> {target}")
    return listed(ways)
