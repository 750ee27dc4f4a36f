"""What must hold of a coordinator's state, told from its records alone.

Problem: a check that asks the core's own functions finds right whatever they do. These count again,
in the plainest way.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field

from coordinator.core import contenders, decisions, fleet_scaling, projects, standby
from coordinator.core.gpu_types import key_of
from coordinator.core.indices import Kind, kind
from coordinator.core.messages import AppendEvent, Effect
from coordinator.core.model import (
    CLASS_RANK,
    Attempt,
    GpuFacts,
    Job,
    JobClass,
    JobSpec,
    Part,
    Replication,
)
from coordinator.core.node_power import silent
from coordinator.core.offers import offers_of, open_rooms
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    ATTEMPT_LIVE,
    AttemptPhase,
    GpuPhase,
    JobPhase,
    NodeIntent,
    NodePhase,
)
from coordinator.core.placement import rooms_of
from coordinator.core.rooms import able
from coordinator.core.shares import SHARERS_MAX, SHARES_PERCENT_MAX
from coordinator.core.state import Instant, LiveNode, State
from coordinator.core.validate import suits
from tests.core.coordinator_fleet import HOST
from tests.core.coordinator_harness import UNIX_MS_AT_START

# Whoever is left of a gang after one of these hangs in a collective operation.
SPOILING = (AttemptPhase.FAILED, AttemptPhase.REFUSED, AttemptPhase.LOST)


def check_gang(state: State, job: Job) -> None:
    """It was started whole, and runs whole or is being ended. Parts wait for somebody."""
    gang = state.gang(job)
    assert len(gang) == (job.spec.ranks if job.epoch else 0), "started in part"
    left = [rank for rank in gang if rank.phase in ATTEMPT_LIVE]
    over = [rank for rank in gang if rank.phase in ATTEMPT_ENDED]
    digests = dict.fromkeys(r.restored_digest for r in gang if r.started_unix_ms)
    spoilt = [rank for rank in over if rank.phase in SPOILING] or len(digests) > 1
    for rank in left:
        stopped = rank.stop_reason and rank.phase is AttemptPhase.STOPPING
        assert stopped or not spoilt, f"{rank.id} hangs"
        assert stopped or not over or job.id in state.finish_ms, f"{rank.id} is left alone"
    here = state.parts.get(job.id, [])
    assert not here or left or any(r not in over for r in gang), "parts of nobody"
    assert all(part.epoch == job.epoch for part in here)


def limit_of(job: Job) -> int:
    return int(job.spec.array.partition("%")[2] or 0)


def check_arrays(state: State, written: Iterable[Job]) -> None:
    """By what is durable no array runs more than its limit; those that wait for room count, and
    whoever waits for his turn waits because there are as many, or because he could not start."""
    jobs = list(written)
    placed = Counter(
        job.array_id
        for job in jobs
        if job.phase in (JobPhase.ACTIVE, JobPhase.CANCELLING) or job.id in state.queued
    )
    for job in jobs:
        limit = limit_of(job)
        if not limit:
            assert (job.phase is JobPhase.QUEUED) == (job.id in state.queued)
            continue
        assert placed[job.array_id] <= limit, f"{placed[job.array_id]} of array {job.array_id}"
        if job.phase is JobPhase.QUEUED and job.id not in state.queued:
            good = state.good_checkpoints(job)
            could = not good or state.reachable(good[0])
            assert placed[job.array_id] == limit or not could, f"job {job.id} is forgotten"


def check_store(ours: State, theirs: State) -> None:
    """What a restart from the store finds is what there was."""
    assert theirs.jobs == ours.jobs
    assert theirs.attempts == ours.attempts
    assert theirs.job_attempts == ours.job_attempts
    assert theirs.ledger == ours.ledger, "a restart finds that something else was used"
    assert theirs.last_job_id == ours.last_job_id
    assert theirs.parts == ours.parts
    assert sorted(theirs.finish_ms) == sorted(ours.finish_ms)
    assert theirs.ended == ours.ended
    # Who of those that wait has a place of his array is decided in the first round.
    free = [
        {job_id: None for job_id in one.queued if not limit_of(one.jobs[job_id])}
        for one in (theirs, ours)
    ]
    assert free[0] == free[1]
    for array_id, array in ours.indices.arrays.by_id.items():
        assert theirs.indices.arrays.by_id[array_id].tally() == array.tally()
    assert theirs.requests == ours.requests
    assert sorted(theirs.nodes) == sorted(ours.nodes)
    for name, live in ours.nodes.items():
        assert theirs.nodes[name].node == live.node
        assert sorted(theirs.nodes[name].attempts) == sorted(live.attempts)
        assert theirs.nodes[name].digests == live.digests
    for job in ours.jobs.values():
        assert theirs.good_checkpoints(job) == ours.good_checkpoints(job)
        kept = sorted(ours.checkpoints.get(job.id, []), key=lambda c: c.digest)
        assert sorted(theirs.checkpoints.get(job.id, []), key=lambda c: c.digest) == kept


def check_index(state: State) -> None:
    """What is kept along the way is what a walk through everything finds."""
    pieces: dict[str, dict[int, int]] = {}
    held: dict[str, dict[str, int]] = {name: {} for name in state.nodes}
    every = [
        (kept.job_id, piece)
        for some in state.checkpoints.values()
        for kept in some
        for piece in kept.pieces
    ]
    every += [
        (part.job_id, Part(part.digest, part.size_bytes, part.replicas))
        for some in state.parts.values()
        for part in some
    ]
    for job_id, piece in every:
        jobs = pieces.setdefault(piece.digest, {})
        jobs[job_id] = jobs.get(job_id, 0) + 1
        for name in piece.replicas:
            if name in held:
                held[name][piece.digest] = held[name].get(piece.digest, 0) + 1
    assert state.indices.pieces == pieces
    assert {name: live.digests for name, live in state.nodes.items()} == held
    kinds: dict[Kind, list[str]] = {}
    for name, live in state.nodes.items():
        kinds.setdefault(kind(live.node.host, live.node.gpus), []).append(name)
    found = {one: sorted(names) for one, names in state.indices.kinds.items()}
    assert found == {one: sorted(names) for one, names in kinds.items()}
    for attempt_id in state.indices.open_attempts:
        _check_standby(state, state.attempts[attempt_id])
    check_rooms(state)
    check_boxes(state)


def check_boxes(state: State) -> None:
    """What a plan of the fleet's size sees of nodes that nothing has touched is what they are."""
    now_ms = state.last_tick_ms or 0
    now = Instant(now_ms, UNIX_MS_AT_START + now_ms)
    every = [live for live in state.nodes.values() if fleet_scaling.has_box(live)]
    fresh = [fleet_scaling.box_of(state, now, live) for live in every]
    assert fleet_scaling.boxes_of(state, now) == fresh


def check_rooms(state: State) -> None:
    """What is kept from pass to pass is what would be made anew of every node, and so is what it
    remembers."""
    # Whoever opens rooms may renew the mix; at which pass that happens is for the passes to say.
    demand, state.demand = state.demand, copy(state.demand)
    kept, anew = open_rooms(state), rooms_of(offers_of(state), state.demand.mix())
    fleet = contenders.fleet_of(state)
    state.demand = demand
    assert kept == anew
    assert fleet == contenders._fleet(anew, len(state.indices.kinds))
    for mine, other in zip(kept, anew, strict=True):
        assert mine.box() == other.box()
        assert mine.by_type() == other.by_type()
        for job in state.jobs.values():
            assert list(able([mine], job.spec)) == list(able([other], job.spec))
            ranks = mine.takes(job.spec)
            assert mine.increase(job.spec, ranks) == other.increase(job.spec, ranks)


def _check_standby(state: State, attempt: Attempt) -> None:
    """Who is named after a few were asked is who would be named after all were."""
    job = state.jobs[attempt.job_id]
    places = [
        (len(live.attempts), standby._copies(state, job, name), name)
        for name, live in state.nodes.items()
        if not silent(live.node.power)
    ]
    assert standby._in_order(state, job) == sorted(places)
    asked: list[standby.Candidate] = []
    for live in state.nodes.values():
        assert standby.fit(state, job, live) is standby._fit(state, job, live), live.node.id
        if live.phase is NodePhase.UP and standby.may_be(live) and live.node.id != attempt.node:
            asked.append(standby.candidate(state, job, live, attempt.rank))
    asked = asked if job.spec.replication is not Replication.NONE else []
    best = standby.best(asked)
    found = standby.choose(state, job, attempt.node, attempt.rank)
    assert found == ("" if best is None else best.node)
    present = state.nodes.get(attempt.replica_node)
    now = None if present is None else standby.candidate(state, job, present, attempt.rank)
    better = standby.better(now, asked)
    aim = standby.aim(state, attempt.id)
    assert aim == (attempt.replica_node if better is None else better.node)


def takes_work(live: LiveNode) -> bool:
    return live.phase is NodePhase.UP and live.node.intent is NodeIntent.OPEN


def places_for(state: State, live: LiveNode, job: Job, disturbing: bool) -> int:
    """How many ranks of the job would fit if all that is stopping, and with `disturbing` all that
    is of a lower class, were gone?"""
    if job.spec.shared_gpu_memory_bytes:
        return _places_beside(state, live, job, disturbing)
    facts: list[GpuFacts] = [g.facts for g in live.gpus.values() if g.phase is GpuPhase.FREE]
    leaving: list[str] = []
    memory_bytes, slots = live.node.host.memory_bytes, HOST.cpu_count * 4
    for attempt_id in live.attempts:
        attempt = state.attempts[attempt_id]
        spec = state.jobs[attempt.job_id].spec
        lower = CLASS_RANK[spec.job_class] > CLASS_RANK[job.spec.job_class]
        if attempt.phase is AttemptPhase.STOPPING or (disturbing and lower):
            leaving.append(attempt_id)
        else:
            memory_bytes -= spec.memory_bytes
            slots -= 0 if attempt.gpu_uuids else 1
    facts += [
        gpu.facts
        for gpu in live.gpus.values()
        if gpu.holders and all(holder in leaving for holder in gpu.holders)
    ]
    count = slots
    if job.spec.gpus:
        count = sum(1 for gpu in facts if suits(job.spec, gpu)) // job.spec.gpus
    if memory_bytes < job.spec.memory_bytes:
        return 0
    if job.spec.memory_bytes:
        count = min(count, memory_bytes // job.spec.memory_bytes)
    return max(0, count)


def check_guaranteed(state: State, now_ms: int) -> None:
    """The first guaranteed job in line either has who must leave for it leaving already, or
    nobody's leaving would help. One for whom nobody leaves since another one of its class has the
    room reserved says so, and the next one is the first."""
    lent = projects.standing_of(state, Instant(now_ms, UNIX_MS_AT_START + now_ms)).lent
    for job in decisions.in_turn(state, map(state.jobs.__getitem__, state.queued), lent):
        good = state.good_checkpoints(job)
        blocked = state.eligible_ms.get(job.id, 0) > now_ms or (
            good and not state.reachable(good[0])
        )
        if job.spec.job_class is not JobClass.GUARANTEED or blocked:
            continue
        nodes = [live for live in state.nodes.values() if takes_work(live)]
        places = [
            sum(places_for(state, live, job, disturbing) for live in nodes)
            for disturbing in (True, False)
        ]
        could, will = (count >= job.spec.ranks for count in places)
        kept = state.reservations.get(CLASS_RANK[job.spec.job_class])
        if kept is not None and f"reserved for job {kept.job_id} " in state.wait_reason(job):
            continue
        assert will or not could, f"job {job.id} waits: {state.wait_reason(job)}"
        return


def _places_beside(state: State, live: LiveNode, job: Job, disturbing: bool) -> int:
    """The same for a job that shares a GPU: there is room for one of it, or for none."""
    memory_bytes = live.node.host.memory_bytes - job.spec.memory_bytes
    staying: list[str] = []
    for attempt_id in live.attempts:
        attempt = state.attempts[attempt_id]
        spec = state.jobs[attempt.job_id].spec
        lower = CLASS_RANK[spec.job_class] > CLASS_RANK[job.spec.job_class]
        if attempt.phase is not AttemptPhase.STOPPING and not (disturbing and lower):
            staying.append(attempt_id)
            memory_bytes -= spec.memory_bytes
    if memory_bytes < 0:
        return 0
    for gpu in live.gpus.values():
        if gpu.phase is GpuPhase.ABSENT or not suits(job.spec, gpu.facts):
            continue
        if any(holder not in live.attempts for holder in gpu.holders):
            continue  # a stray leaves some time
        beside = [held_share(state, holder) for holder in gpu.holders if holder in staying]
        total_bytes = sum(beside) + job.spec.shared_gpu_memory_bytes
        pairs = [job.spec, *(spec_of(state, one) for one in gpu.holders if one in staying)]
        if beside and any(spec.share_automatic for spec in pairs):
            continue  # whether they are put together is not a matter of room
        fits = total_bytes * 100 <= gpu.facts.memory_bytes * SHARES_PERCENT_MAX
        if all(beside) and len(beside) < SHARERS_MAX and fits:
            return 1
    return 0


def spec_of(state: State, attempt_id: str) -> JobSpec:
    return state.jobs[state.attempts[attempt_id].job_id].spec


def held_share(state: State, attempt_id: str) -> int:
    return spec_of(state, attempt_id).shared_gpu_memory_bytes


def check_gpu(state: State, live: LiveNode, uuid: str) -> None:
    """One attempt is promised all of it, or several not more than what may be shared."""
    promised = [one for one in live.attempts if uuid in state.attempts[one].gpu_uuids]
    holders, phase = live.gpus[uuid].holders, live.gpus[uuid].phase
    if phase is not GpuPhase.ABSENT:
        assert all(one in holders for one in promised), f"{uuid}: {promised}, held by {holders}"
        assert all(one in promised or one in live.strays for one in holders), "held by nobody"
        assert (phase is GpuPhase.HELD) == bool(holders)
    if len(promised) > 1:
        held_shares = [held_share(state, one) for one in promised]
        assert all(held_shares), f"{uuid} is promised twice: {promised}"
        assert len(promised) <= SHARERS_MAX
        specs = [spec_of(state, one) for one in promised]
        if any(spec.share_automatic for spec in specs):
            assert len({spec.job_class for spec in specs}) == 1, f"{uuid}: a pair of two classes"
            assert len(specs) == 2, f"{uuid}: more than a pair"
        memory_bytes = live.gpus[uuid].facts.memory_bytes
        assert sum(held_shares) * 100 <= memory_bytes * SHARES_PERCENT_MAX, "beyond its memory"


# In a stop's reason, that it is for a better allocation, and for whom of its class.
STOPPED_FOR = re.compile(r"moves to |gives way to job (?P<job>\d+)")
MAKES_ROOM = re.compile(r"to make room on \S+ for job (?P<job>\d+)")
HOUR_MS = 3_600_000

# Told when the head moves though nothing was committed; what was set aside is put back at rest.
HEAD_MOVES = (
    *("checkpoint.skipped", "checkpoint.abandoned", "checkpoint.verified", "checkpoint.set_aside"),
    "checkpoint.found",
    *("job.quarantined", "job.failed", "job.cancelled"),
)


@dataclass
class History:
    """What a job's commits must look like from outside."""

    epoch: int = 0
    head: str = ""
    head_step: int = 0


@dataclass
class Moves:
    """Who was stopped for somebody of his class, or to run better: within an hour few are. A
    coordinator that restarts counts anew."""

    most: int
    times_ms: list[int] = field(default_factory=list)

    def judge(self, effects: Iterable[Effect], jobs: Mapping[int, Job], now_ms: int) -> None:
        for effect in effects:
            if not isinstance(effect, AppendEvent) or effect.event.name != "attempt.stopping":
                continue
            found = STOPPED_FOR.search(effect.event.message)
            if found is None:
                continue
            self.times_ms.append(now_ms)
            if found["job"]:
                ours = jobs[effect.event.job_id].spec.job_class
                assert jobs[int(found["job"])].spec.job_class is ours, "a class inversion"
            large = MAKES_ROOM.search(effect.event.message)
            if large is not None:
                its, mover = jobs[int(large["job"])].spec, jobs[effect.event.job_id].spec
                assert CLASS_RANK[mover.job_class] >= CLASS_RANK[its.job_class], "a class inversion"
                assert mover.gpus * mover.ranks < its.gpus * its.ranks, "a large one for a small"
        lately = [at for at in self.times_ms if now_ms - at < HOUR_MS]
        assert len(lately) <= self.most, f"{len(lately)} moves within an hour"

    def restarted(self) -> None:
        self.times_ms.clear()


def check_promises(state: State) -> None:
    """What is kept for those who were stopped, or wait for them, is no more than there is, and ends
    after ten minutes."""
    promised: Counter[str] = Counter()
    by_node: Counter[str] = Counter()
    for job_id, promise in state.standing.promises.items():
        job = state.jobs[job_id]
        assert promise.until_ms - promise.since_ms <= 600_000
        stopping = any(rank.phase is AttemptPhase.STOPPING for rank in state.gang(job))
        if job.phase is JobPhase.QUEUED or stopping:
            promised[promise.gpu_type] += job.spec.ranks * job.spec.gpus
            if len(promise.nodes) == 1 and promise.nodes[0] in state.nodes:  # else forgotten since
                by_node[promise.nodes[0]] += job.spec.ranks * job.spec.gpus
    gpus = [gpu for live in state.nodes.values() for gpu in live.node.gpus]
    there = Counter(key_of(gpu.name, gpu.memory_bytes) for gpu in gpus)
    assert all(count <= there[gpu_type] for gpu_type, count in promised.items()), promised
    assert all(count <= len(state.nodes[node].gpus) for node, count in by_node.items()), by_node
