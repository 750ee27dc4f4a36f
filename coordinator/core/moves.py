"""Who is stopped so that somebody else, or he himself, has what is worth more.

Problem: a decision over all jobs says what would be best, and every step there costs: a job that is
stopped saves, waits and comes up again, and while it does so its GPUs and those that it goes to do
nothing. A scheduler that follows each decision at once spends the day moving. So of what the
decision says only steps are taken, and each by itself has to be worth it:

1. Only a job of which it is known how much is left is moved, or makes another one of its class
   leave. The decision itself keeps a job where it is for `run_s_min`, or ten times what its restart
   takes, and charges the restart of those it moves (`allocation.py`).
2. Who moves for his own sake goes where it is faster for certain: also at the low end of its
   estimate.
3. It goes where there is room now, or where those leave whom the decision has there no more; it is
   worth more there than they all are where they are, less what they are worth where they go. Who
   has to start now to keep a deadline is worth that in any case (`deadlines.py`), and for him all
   may have to leave: the decision counts GPUs by type, and whom it stops may be on several nodes.
4. Each that is stopped counts, and within an hour no more than `moves_per_hour` are
   (`stop_bounds.py`).
5. What somebody was stopped for is promised to him, for as long as those who leave may take to
   save, and not longer: then he is one of many again. Rooms are taken as they are promised, so that
   nothing is promised twice, and of what is free enough is left for those who were granted it and
   wait.

The stop is that of a preemption, with a pre-copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.core import (
    attempts,
    checkpoints,
    claims,
    contenders,
    costs,
    deadlines,
    gangs,
    outcomes,
    reserved,
    stop_bounds,
)
from coordinator.core.allocation import Allocation, Option, run_s_min, worths
from coordinator.core.contenders import DEADLINE_MARGIN_MS, competes
from coordinator.core.displacement import NOBODY, Givers, Spread, StakeOf, leave, nothing_known
from coordinator.core.horizon import Horizon
from coordinator.core.keeps import Keep, hidden
from coordinator.core.model import Attempt, Job, JobIntent, Replication
from coordinator.core.offers import open_rooms
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.placement import Need, keep_free, keep_room, kept_from
from coordinator.core.rooms import Room, Tenant
from coordinator.core.standing import Entrant, Field, Promise
from coordinator.core.state import Instant, State

# Between the last moment of a grace and the start of who waits for it: reports, and a batch.
SLACK_MS = 30_000
# However long somebody may take to save: what is kept for a job does nothing meanwhile.
PROMISE_MS_MAX = 600_000
# In one decision: who would have to leave for whom, over all nodes; about ten microseconds a node.
# What is worth most is looked at first, and the next decision looks again.
SEARCHES_MAX = 32
ROOMS_SEARCHED_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Wish:
    """Where the decision wants a job that is not there, and what is gained by that."""

    entrant: Entrant
    option: Option
    gain: float


def make(
    state: State,
    now: Instant,
    field: Field,
    allocation: Allocation,
    *,
    aside: Sequence[Entrant],
    lent: Mapping[int, None],
) -> None:
    """Stop whom the decision has elsewhere, as far as it is worth that, of those who are as they
    were when it was ordered. Of those `aside`, over whom it does not decide, whoever has to start
    now may go where others leave for him. `lent` are the jobs beyond their projects' quotas."""
    budget = stop_bounds.left(state)
    plan = _Plan(state, now, field, allocation, aside=aside, lent=lent)
    moving = [wish for wish in plan.wishes if wish.entrant.contender.at is not None]
    if budget <= 0 or not plan.wishes or not (moving or plan.stoppable):
        return
    plan.open(budget)
    for wish in plan.wishes:
        plan.grant(wish)
    plan.resettle()
    _carry_out(state, now, plan)


def _carry_out(state: State, now: Instant, plan: "_Plan") -> None:
    for job_id, reason in plan.stops.items():
        send_away(state, now, state.jobs[job_id], reason, plan.targets.get(job_id, ""))
    for job_id, (gpu_type, leaving) in plan.promised.items():
        until_ms = until_left_ms(state, now, leaving)
        state.standing.promises[job_id] = Promise(gpu_type, until_ms, now.now_ms)
        claims.note(state, now, job_id)


def send_away(state: State, now: Instant, job: Job, reason: str, node: str) -> None:
    """Stop it so that it goes on elsewhere, with copies that go to `node`, if one is known."""
    attempt = state.gang(job)[0]
    copied = job.spec.ranks == 1 and job.spec.replication is not Replication.NONE
    if copied and node not in ("", attempt.node, attempt.replica_node):
        attempt = checkpoints.send_copies_to(state, attempt, node)
    stop_bounds.note(state, now)
    attempts.stop(state, now, attempt, reason, attempts.PRECOPY_PREEMPTION_MS)


def may_follow(state: State, now: Instant, attempt: Attempt) -> bool:
    """Whether a job of one rank that runs loses no more than a restart by going on elsewhere on
    GPUs of the same type, for others' sake."""
    job = state.jobs[attempt.job_id]
    runs = attempt.phase is AttemptPhase.RUNNING and job.intent is JobIntent.RUN
    return (
        runs
        and job.spec.ranks == 1
        and competes(job.spec)
        and not job.spec.shared_gpu_memory_bytes
        and bool(state.good_checkpoints(job))
        and job.id not in state.standing.promises
        and not deadlines.is_close(state, now, job)
        and (gangs.grace_ms(state, job) or 0) <= PROMISE_MS_MAX - SLACK_MS
    )


def until_left_ms(state: State, now: Instant, leaving: Sequence[int]) -> int:
    """For how long what these leave is kept."""
    graces = [gangs.grace_ms(state, state.jobs[job_id]) or 0 for job_id in leaving]
    wait_ms = attempts.PRECOPY_PREEMPTION_MS + max(graces, default=0)
    return now.now_ms + min(PROMISE_MS_MAX, wait_ms + SLACK_MS)


def promised(state: State) -> list[Need]:
    """Who was promised what before, those first who can go to some nodes alone."""
    found = sorted(state.standing.promises.items(), key=lambda pair: not pair[1].nodes)
    return [
        Need(job_id, state.jobs[job_id].spec, only=promise.gpu_type, on=promise.nodes)
        for job_id, promise in found
    ]


class _Plan:
    """Steps towards a decision, each in the room that those before it have left. `stops` has the
    reason for each that is stopped, `promised` the type and who has to leave for it, `targets` the
    node."""

    def __init__(
        self,
        state: State,
        now: Instant,
        field: Field,
        allocation: Allocation,
        *,
        aside: Sequence[Entrant],
        lent: Mapping[int, None],
    ) -> None:
        self.state = state
        self.now = now
        self.ahead = allocation.ahead
        self.late = deadlines.late(state)
        self.grants = {job_id: grant.option for job_id, grant in allocation.grants.items()}
        fleet = contenders.fleet_of(state)
        asked = [e for e in field.entrants if self.late or self._is_moved(e)]
        asked = [e for e in asked if contenders.stays(state, e, fleet, lent)]
        self.stoppable = {e.job.id: e for e in asked if self._may_stop(e)}
        self.may_go = {job_id: e for job_id, e in self.stoppable.items() if self._is_moved(e)}
        wishes = [wish for entrant in asked if (wish := self._wish(entrant)) is not None]
        wishes += [wish for entrant in aside if (wish := self._wish_aside(entrant)) is not None]
        self.wishes = sorted(
            wishes,
            key=lambda w: (
                w.entrant.contender.rank,
                w.entrant.job.id not in self.late,
                -w.gain,
                w.entrant.job.id,
            ),
        )
        self.rooms: Sequence[Room] = ()
        self.stake_of: StakeOf = nothing_known
        self.left = 0
        self.known: Mapping[str, Room] = {}
        self.keeps: Sequence[Keep] = ()
        self.searches = 0
        self.stops: dict[int, str] = {}
        self.promised: dict[int, tuple[str, Sequence[int]]] = {}
        self.targets: dict[int, str] = {}

    def open(self, budget: int) -> None:
        """What was promised before is kept first."""
        self.left = budget
        self.rooms = open_rooms(self.state)
        self.known = {room.offer.node: room for room in self.rooms}
        self.keeps = reserved.keeps(self.state, self.now)
        self.searches = max(1, min(SEARCHES_MAX, ROOMS_SEARCHED_MAX // max(1, len(self.rooms))))
        self.stake_of = costs.stakes(self.state, self.now)
        for need in promised(self.state):
            self._keep(need, NOBODY)

    def _keep(self, need: Need, givers: Givers | None = None) -> Spread | None:
        """What it would get of the room that it may use: now, or when these have left."""
        with hidden(kept_from(need, self.keeps), self.known):
            if givers is None:
                return keep_free(need, self.rooms)
            return keep_room(need, self.rooms, givers)

    def grant(self, wish: Wish) -> None:
        job, option = wish.entrant.job, wish.option
        runs = wish.entrant.contender.at is not None
        own = int(runs and job.id not in self.stops)
        victims: list[int] = []
        givers = self.stoppable if job.id in self.late else self.may_go

        def accept(tenants: Sequence[Tenant]) -> bool:
            victims[:] = [self.state.attempts[one.attempt].job_id for one in tenants]
            return self._is_worth(wish, victims) and own + len(victims) <= self.left

        def may_leave(tenant: Tenant) -> bool:
            who, mine = (
                givers.get(self.state.attempts[tenant.attempt].job_id),
                wish.entrant.contender,
            )
            if who is None or who.contender.rank < mine.rank:
                return False
            # Who is within its quota would be given the place back at once.
            lent = who.contender.lent or not mine.lent or who.contender.rank > mine.rank
            return lent or who.job.id in self.may_go

        if own > self.left or (runs and job.id in self.promised):
            return
        avoid, elsewhere = outcomes.avoided(self.state, self.now, job)
        need = Need(job.id, job.spec, (), avoid, elsewhere, only=option.gpu_type)
        spread = self._keep(need)
        if spread is None and wish.entrant.known and self.searches > 0:
            self.searches -= 1
            spread = self._keep(need, Givers(may_leave, self.stake_of, accept))
        if spread is None:
            return
        for victim in victims:
            self._stop(victim, self._gives_way(wish, givers[victim]))
        if own:
            self._stop(job.id, self._moves(wish, victims))
        if runs or victims:
            self._promise(job, option, spread, [*victims, *([job.id] if runs else [])])

    def resettle(self) -> None:
        """Who had to leave and was granted something else gets it, if there is room."""
        for job_id in list(self.stops):
            option = self.grants.get(job_id)
            if option is None or job_id in self.promised:
                continue
            job = self.state.jobs[job_id]
            need = Need(job_id, job.spec, only=option.gpu_type)
            spread = self._keep(need, NOBODY)
            if spread is not None:
                self._promise(job, option, spread, [job_id])
                self.stops[job_id] = f"moves to {option.gpu_type} and {self.stops[job_id]}"

    def _stop(self, job_id: int, reason: str) -> None:
        job = self.state.jobs[job_id]
        self.stops[job_id] = reason
        self.left -= 1
        leave(self.rooms, [f"{job_id}.{job.epoch}"])

    def _promise(self, job: Job, option: Option, spread: Spread, leaving: Sequence[int]) -> None:
        self.promised[job.id] = option.gpu_type, leaving
        self.targets[job.id] = spread[0][0].offer.node

    # --- what is worth it -------------------------------------------------------------------------

    def _wish(self, entrant: Entrant) -> Wish | None:
        job, at = entrant.job, entrant.contender.at
        option = self.grants.get(job.id)
        if option is None or option == at or job.id in self.state.standing.promises:
            return None
        if at is None:
            waits = job.phase is JobPhase.QUEUED
            return Wish(entrant, option, self._value(entrant, option)) if waits else None
        gain = self._value(entrant, option) - self._value(entrant, at)
        rates = entrant.rates
        sure = rates.low[rates.types.index(option.gpu_type)] > at.rate
        if gain <= 0 or not sure or not self._may_stop(entrant):
            return None
        return Wish(entrant, option, gain)

    def _wish_aside(self, entrant: Entrant) -> Wish | None:
        job, options = entrant.job, entrant.contender.options
        waits = job.phase is JobPhase.QUEUED and job.id not in self.state.standing.promises
        if not waits or job.id not in self.late:
            return None
        return Wish(entrant, max(options, key=lambda option: option.rate), 0.0)

    def _is_moved(self, entrant: Entrant) -> bool:
        """Whether the decision has it elsewhere, or nowhere."""
        return self.grants.get(entrant.job.id) != entrant.contender.at

    def _may_stop(self, entrant: Entrant) -> bool:
        contender = entrant.contender
        promised = entrant.job.id in self.state.standing.promises
        if not entrant.known or contender.at is None or promised:
            return False
        gang = self.state.gang(entrant.job)
        ran_s = (self.now.now_ms - contender.since_ms) / 1000
        running = all(rank.phase is AttemptPhase.RUNNING for rank in gang)
        least_s = run_s_min(contender.restart_s, self.state.options.aims)
        # Whoever gets its GPUs has them for his minimum: it could not be back before.
        away_ms = round((least_s + contender.restart_s) * 1000) + DEADLINE_MARGIN_MS
        if deadlines.is_close(self.state, self.now, entrant.job, away_ms):
            return False
        return running and ran_s >= least_s

    def _is_worth(self, wish: Wish, victims: Sequence[int]) -> bool:
        """Whether it gains more than those of its class lose; nobody is asked to give way to one of
        whom it is not known how much is left."""
        if not wish.entrant.known:
            return False
        if wish.entrant.job.id in self.late:
            return not any(victim in self.late for victim in victims)
        loss = 0.0
        for victim in victims:
            entrant = self.may_go[victim]
            at, option = entrant.contender.at, self.grants.get(victim)
            if at is not None and entrant.contender.rank == wish.entrant.contender.rank:
                loss += self._value(entrant, at)
                loss -= self._value(entrant, option) if option is not None else 0.0
        return wish.gain > loss

    def _value(self, entrant: Entrant, option: Option) -> float:
        contender = entrant.contender
        tenants = self.state.standing.tenants
        ahead = self.ahead.get(contender.rank, Horizon(0.0))
        (found,) = worths([contender], self.now.now_ms, self.state.options.aims, tenants, ahead)
        return found[contender.options.index(option)]

    # --- what is said of it -----------------------------------------------------------------------

    def _moves(self, wish: Wish, victims: Sequence[int]) -> str:
        at, option = wish.entrant.contender.at, wish.option
        assert at is not None, "who moves is somewhere"
        ratio = option.rate / at.rate
        who = " and ".join(str(victim) for victim in victims)
        place = f", in the place of job {who}" if victims else ""
        return (
            f"moves to {option.gpu_type}, where it is {ratio:.1f} times as fast as on"
            f" {at.gpu_type}{place}"
        )

    def _gives_way(self, wish: Wish, victim: Entrant) -> str:
        at, option = victim.contender.at, wish.option
        assert at is not None, "who gives way is somewhere"
        job = wish.entrant.job
        if victim.contender.rank > wish.entrant.contender.rank:
            return f"gives way to {job.spec.job_class.value} job {job.id}"
        if job.id in self.late:
            return f"gives way to job {job.id}, {deadlines.must_start(self.now, job)}"
        theirs = self._value(wish.entrant, option) / option.gpus
        own = self._value(victim, at) / at.gpus
        return (
            f"gives way to job {job.id}: a GPU of type {at.gpu_type} is worth {theirs:.2g} to that"
            f" one, and {own:.2g} here"
        )
