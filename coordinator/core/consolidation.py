"""A node that is to go off is emptied by handoff, where that pays.

Problem: what is not needed any more takes no new work and empties by itself (`which_nodes.py`), but
one job that has a day to go keeps eight GPUs on for a day. It could run as well on a node that
stays. To move it costs a restart; to leave it costs what the whole node idles meanwhile.

How, after each plan that is carried out, for the first of the leaving nodes that
1. has jobs that can all go on elsewhere: of one rank, with a checkpoint, without a near deadline,
   that have run for ten times what their restart takes (`moves.may_follow`), and nothing else;
2. has a place for each of them, of the same type, beside others on own nodes that stay, that nobody
   was promised; where somebody waits, nothing is free;
3. saves more than it costs: all of its GPUs idle until the last of its jobs is expected to have
   left, but no longer than the plan knows that the node will not be missed (`Rules.later_ms`). That
   has to be more than the restarts, at the price of work that waits. Of a job that does not say
   when it ends the age is known, and so with which chance it is there in some time
   (`held_ahead.py`). Both are estimates, so it has to be more by `PAYBACK_MIN`.

They go as others that are moved (`moves.py`): with a pre-copy, to a room that is kept for them,
told why, and counted among the moves of an hour. One node in one plan: more than go off in ten
minutes need not be empty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.core import (
    costs,
    foresight,
    gpu_types,
    moves,
    plan_time,
    projects,
    reserved,
    stop_bounds,
)
from coordinator.core import needs as queue_of
from coordinator.core.allocation import RUN_PER_RESTART_MIN
from coordinator.core.bursts import MS_PER_H
from coordinator.core.capacity_model import Outlook, Power, Source
from coordinator.core.keeps import Keep, hidden
from coordinator.core.life_table import AGE_MS_MIN
from coordinator.core.model import Attempt, Job
from coordinator.core.offers import open_rooms
from coordinator.core.phases import NodeIntent
from coordinator.core.placement import find, keep_room, kept_from
from coordinator.core.rooms import Room
from coordinator.core.scaling import Rules
from coordinator.core.standing import Promise
from coordinator.core.state import Instant, LiveNode, State

# Leaving nodes that one plan looks at, the emptiest first; the next plan looks again.
NODES_SOUGHT_MAX = 32
# Demand may rise sooner than was likely, and a restart take twice as long as the last ones.
PAYBACK_MIN = 2.0


@dataclass(frozen=True, slots=True)
class Worth:
    """In dollars, of the plan's time: what a node would idle for, and what its jobs lose."""

    gain_usd: float
    cost_usd: float
    idle_ms: float

    @property
    def pays(self) -> bool:
        return self.gain_usd > PAYBACK_MIN * self.cost_usd


@dataclass(frozen=True, slots=True)
class Follower:
    """A job that can go on elsewhere: `end_ms`, in how long it ends by itself (`None`: nobody
    knows), `age_ms`, and what a restart loses, `lost_ms` of all of its `gpus`."""

    gpus: float
    end_ms: int | None
    age_ms: int
    lost_ms: float


def worth(gpus: int, followers: Sequence[Follower], rules: Rules) -> Worth:
    """Of emptying a node of so many GPUs. The last one to leave is as late as the latest of whom
    one alone is expected to leave."""
    idle_ms = max((_stays_ms(one, rules.later_ms) for one in followers), default=0.0)
    lost_ms = sum(one.gpus * one.lost_ms for one in followers)
    return Worth(
        gpus * rules.idle_usd_per_gpu_h * idle_ms / MS_PER_H,
        rules.wait_usd_per_gpu_h * lost_ms / MS_PER_H,
        idle_ms,
    )


def _stays_ms(one: Follower, later_ms: int) -> float:
    """For how long of the next `later_ms` it is expected to be there: the mean of `age / (age + k)`
    over them, where nobody knows."""
    if one.end_ms is not None:
        return float(min(one.end_ms, later_ms))
    age_ms = max(1, one.age_ms)
    return age_ms * math.log1p(later_ms / age_ms)


@dataclass(frozen=True, slots=True)
class _Move:
    job: Job
    gpu_type: str
    target: str


# --- in the live coordinator ----------------------------------------------------------------------


def tick(state: State, now: Instant, leaving: Sequence[str]) -> None:
    """After a plan; `leaving` are the nodes that it wants off, the emptiest first."""
    left = stop_bounds.left(state)
    if left <= 0 or state.queued:
        return
    nodes = [state.nodes[name] for name in leaving if name in state.nodes]
    busy = [live for live in nodes if live.attempts and _is_ours(live)]
    if busy:
        _Look(state, now, left).first_of(busy[:NODES_SOUGHT_MAX])


def settled(state: State, outlooks: Sequence[Outlook]) -> list[Outlook]:
    """Those who have a place kept and are on their way there wait for no node: they count as those
    that run."""
    moving: dict[str, int] = {}
    for job_id, promise in state.standing.promises.items():
        if promise.is_on_its_way and job_id in state.queued:
            spec = state.jobs[job_id].spec
            moving[promise.gpu_type] = moving.get(promise.gpu_type, 0) + spec.gpus * spec.ranks
    found = []
    for each in outlooks:
        gpus = min(each.queued_gpus, moving.get(each.gpu_type, 0))
        queued, running = each.queued_gpus - gpus, each.running_gpus + gpus
        found.append(replace(each, queued_gpus=queued, running_gpus=running) if gpus else each)
    return found


def _is_ours(live: LiveNode) -> bool:
    its = live.node.power
    own = its.phase is Power.LEAVING and its.ours and its.source is not Source.BURST
    return own and live.node.intent is NodeIntent.CORDONED and not live.strays


class _Look:
    """The rooms on nodes that stay, without those that were promised."""

    def __init__(self, state: State, now: Instant, left: int) -> None:
        self.state, self.now, self.left = state, now, left
        self.lent = projects.standing_of(state, now).lent
        self.keeps: Sequence[Keep] = reserved.keeps(state, now)
        rooms = open_rooms(state)
        self.known = {room.offer.node: room for room in rooms}
        for need in moves.promised(state):
            with hidden(kept_from(need, self.keeps), self.known):
                keep_room(need, rooms)
        # Who goes to an empty node keeps that one on instead.
        self.rooms = [room for room in rooms if room.tenants and self._stays(room.offer.node)]

    def _stays(self, name: str) -> bool:
        its = self.state.nodes[name].node.power
        return its.phase is Power.ON and its.source is not Source.BURST

    def first_of(self, nodes: Sequence[LiveNode]) -> None:
        for live in nodes:
            followers = self._followers(live)
            if not followers or len(followers) > self.left:
                continue
            gpus = len(live.gpus)
            found = worth(gpus, [one for _, _, one in followers], self.state.options.scaling.rules)
            wanted = self._moves(followers) if found.pays else None
            if wanted is not None:
                self._carry_out(live, found, wanted)
                return

    def _followers(self, live: LiveNode) -> list[tuple[Job, str, Follower]]:
        """All who run there, with the type that they need; none where one of them has to stay."""
        found = []
        for attempt_id in live.attempts:
            attempt = self.state.attempts[attempt_id]
            job = self.state.jobs[attempt.job_id]
            gpus = [live.gpus[uuid] for uuid in attempt.gpu_uuids if uuid in live.gpus]
            types = {gpu_types.key_of(gpu.facts.name, gpu.facts.memory_bytes): None for gpu in gpus}
            follower = self._follower(job, attempt)
            # Of a GPU that its node does not list any more the type may not be known.
            if follower is None or len(types) != 1 or len(gpus) < len(attempt.gpu_uuids):
                return []
            found.append((job, next(iter(types)), follower))
        return sorted(found, key=lambda one: (-one[0].spec.gpus, one[0].id))

    def _follower(self, job: Job, attempt: Attempt) -> Follower | None:
        state, now = self.state, self.now
        restart_s = costs.restart_s(state, now, job)
        ran_ms = max(0, now.unix_ms - attempt.assigned_unix_ms)
        if not moves.may_follow(state, now, attempt):
            return None
        if ran_ms < RUN_PER_RESTART_MIN * restart_s * 1_000:
            return None

        def in_plan(wall_ms: float) -> int:
            return plan_time.plan_ms(state.options, round(wall_ms))

        at_ms = foresight.end_ms(state, now, attempt)
        return Follower(
            job.spec.gpus,
            None if at_ms is None else in_plan(at_ms - now.now_ms),
            max(AGE_MS_MIN, in_plan(ran_ms)),
            in_plan(restart_s * 1_000),
        )

    def _moves(self, followers: Sequence[tuple[Job, str, Follower]]) -> list[_Move] | None:
        """Each one's own, the largest first; the rooms are as before where one has none."""
        saved: list[tuple[Room, Room]] = []
        found = []
        for job, gpu_type, _ in followers:
            need = replace(queue_of.need_of(self.state, self.now, job, self.lent), only=gpu_type)
            with hidden(kept_from(need, self.keeps), self.known):
                places = find(need, self.rooms)
            if places is None:
                for room, before in reversed(saved):
                    room.restore(before)
                return None
            room = self.known[places[0].node]
            saved.append((room, room.saved()))
            room.take(job.spec, places[0].gpu_uuids)
            found.append(_Move(job, gpu_type, places[0].node))
        return found

    def _carry_out(self, live: LiveNode, found: Worth, wanted: Sequence[_Move]) -> None:
        state, now = self.state, self.now
        idles = foresight.seconds(found.idle_ms / 1_000)
        for move in wanted:
            reason = (
                f"moves to {move.target} so that {live.node.id} can go off: its {len(live.gpus)}"
                f" GPUs would else be on for {idles} more, for {found.gain_usd:.2g} dollars, and"
                f" restarts cost {found.cost_usd:.2g}"
            )
            moves.send_away(state, now, move.job, reason, move.target)
            until_ms = moves.until_left_ms(state, now, [move.job.id])
            promise = Promise(move.gpu_type, until_ms, now.now_ms, (move.target,))
            state.standing.promises[move.job.id] = promise
