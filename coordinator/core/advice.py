"""What would let a waiting job start: other requests that fit now, and nodes that would take it.

Problem: whoever reads that his job waits asks next what to do about it, and advice that is not true
costs him a submission. So nothing is advised that placement was not asked: for each suggestion the
altered request is tried in what the queue leaves, in the place that a new submission would have,
behind all of its class. The old job is to be cancelled once the new one has started.

What is tried, in this order: fewer GPUs, fewer ranks, another type of GPU, less memory of each, a
share of one, a smaller share, a higher class, a node that a person has closed. Of each kind the
least change that does.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from coordinator.core import claims, company, costs, projects, reservations, reserved
from coordinator.core import needs as queue_of
from coordinator.core.explanations import Suggestion
from coordinator.core.foresight import where
from coordinator.core.keeps import Keep, hidden
from coordinator.core.model import CLASS_ORDER, CLASS_RANK, Job, JobSpec
from coordinator.core.offers import offer_of, offers_of
from coordinator.core.phases import NodeIntent, NodePhase
from coordinator.core.placement import Need, find, kept_from, place_in, rooms_of
from coordinator.core.rooms import Place, Room, most_left_bytes, open_room
from coordinator.core.state import Instant, LiveNode, State
from coordinator.core.validate import suits

SUGGESTIONS_MAX = 3  # more is a list that nobody reads
TYPES_TRIED_MAX = 16
CLOSED_NODES_TRIED_MAX = 2  # each that would do costs a round
# Options take whole gigabytes, so that they can be typed.
GIGABYTE = 10**9

_Variant = tuple[str, JobSpec]


def suggest(
    state: State, now: Instant, job: Job, queue: Sequence[Job]
) -> tuple[tuple[Suggestion, ...], bool]:
    """What would let it start, and whether somebody leaves for it already: then nothing is
    advised. `queue` is everybody who waits, in turn."""
    others = [other for other in queue if other.id != job.id]
    before = queue[: queue.index(job)]
    rooms = _left_by(state, now, before)
    own = queue_of.need_of(state, now, job, projects.standing_of(state, now).lent)
    stopped = [room.without(lambda tenant: tenant.stopping) for room in rooms]
    keeps = reserved.keeps(state, now)
    if any(_seen(own, some, keeps) is not None for some in (rooms, stopped)):
        return (), True
    rank = CLASS_RANK[job.spec.job_class]
    rooms = _left_by(state, now, [o for o in others if CLASS_RANK[o.spec.job_class] <= rank])
    found: list[Suggestion] = []
    with hidden(kept_from(own, keeps), {room.offer.node: room for room in rooms}):
        variants = list(_variants(job.spec, rooms))
    for change, spec in variants:
        altered = _altered(state, now, job, spec)
        places = _seen(altered, rooms, keeps)
        if places is not None:
            found.append(Suggestion(change, f"now on {where(spec, places, rooms)}"))
        if len(found) == SUGGESTIONS_MAX:
            return tuple(found), False
    found += _higher_class(state, now, job, others)
    if not reservations.others_in_line(state, now, job):
        found += _closed_node(state, now, own, before, rooms)
    return tuple(found[:SUGGESTIONS_MAX]), False


def _altered(state: State, now: Instant, job: Job, spec: JobSpec) -> Need:
    """Of a new submission, which is beside others what the job would be."""
    refused = company.refused(state, now, replace(job, spec=spec))
    return Need(state.last_job_id + 1, spec, refused=refused)


def _left_by(
    state: State, now: Instant, jobs: Sequence[Job], opened: LiveNode | None = None
) -> list[Room]:
    """What these leave of the fleet, with what they keep while others leave for them; a node may
    be `opened` for them."""
    offers = offers_of(state)
    if opened is not None:
        offers.append(offer_of(state, opened))
    rooms = rooms_of(offers, state.demand.last_mix)
    able = [
        job
        for job in jobs
        if claims.waits_out(state, now, job) or not queue_of.blocked(state, now, job)
    ]
    lent = projects.standing_of(state, now).lent
    needs = [queue_of.need_of(state, now, job, lent) for job in able]
    place_in(needs, rooms, reserved.keeps(state, now), costs.stakes(state, now))
    return rooms


def _seen(need: Need, rooms: Sequence[Room], keeps: Sequence[Keep]) -> tuple[Place, ...] | None:
    """Where it would start among what it may use."""
    with hidden(kept_from(need, keeps), {room.offer.node: room for room in rooms}):
        return find(need, rooms)


def _variants(spec: JobSpec, rooms: Sequence[Room]) -> Iterator[_Variant]:
    """One of each kind, that fits as far as it alone is concerned."""

    def fits(changed: JobSpec) -> bool:
        return find(Need(0, changed), rooms) is not None

    if spec.gpus > 1:
        gpus = _most(spec.gpus - 1, lambda count: fits(replace(spec, gpus=count)))
        if gpus:
            yield f"--gpus {gpus}", replace(spec, gpus=gpus)
    if spec.ranks > 1:
        ranks = _most(spec.ranks - 1, lambda count: fits(replace(spec, ranks=count)))
        if ranks:
            yield f"--ranks {ranks}", replace(spec, ranks=ranks)
    kinds = {gpu.name: None for room in rooms for gpu in room.free.values()}
    if spec.gpu_types:
        for name in sorted(kinds)[:TYPES_TRIED_MAX]:
            other = replace(spec, gpu_types=(name,))
            if fits(other):
                yield f"--gpu-type {shlex.quote(name)}", other
                break
    yield from _less_memory(spec, rooms, fits)


def _less_memory(
    spec: JobSpec, rooms: Sequence[Room], fits: Callable[[JobSpec], bool]
) -> Iterator[_Variant]:
    if spec.gpu_memory_bytes_min:
        sizes = {gpu.memory_bytes // GIGABYTE: None for r in rooms for gpu in r.free.values()}
        below = [size for size in sizes if 0 < size * GIGABYTE < spec.gpu_memory_bytes_min]
        for size in sorted(below, reverse=True)[:TYPES_TRIED_MAX]:
            smaller = replace(spec, gpu_memory_bytes_min=size * GIGABYTE)
            if fits(smaller):
                yield f"--gpu-memory-min {size}GB", smaller
                break
    if spec.gpus == 1 and spec.ranks == 1 and not spec.share_automatic:
        # What is left of one for the smallest share of all: as much may be had.
        least = replace(spec, shared_gpu_memory_bytes=GIGABYTE)
        able = [room for room in rooms if room.offer.shares and room.takes(least)]
        size = most_left_bytes(least, able)[0] // GIGABYTE
        share = replace(spec, shared_gpu_memory_bytes=size * GIGABYTE)
        if size and fits(share):
            yield f"--share-gpu {size}GB", share


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, of 1 to `limit`; 0: none. What fits, fits with fewer too."""
    low = 0
    while low < limit:
        middle = (low + limit + 1) // 2
        low, limit = (middle, limit) if fits(middle) else (low, middle - 1)
    return low


def _higher_class(
    state: State, now: Instant, job: Job, others: Sequence[Job]
) -> Iterator[Suggestion]:
    """The lowest class in which it would start, or somebody would leave for it."""
    rank = CLASS_RANK[job.spec.job_class]
    for job_class in reversed(CLASS_ORDER[:rank]):
        ahead = [o for o in others if CLASS_RANK[o.spec.job_class] <= CLASS_RANK[job_class]]
        rooms = _left_by(state, now, ahead)
        spec = replace(job.spec, job_class=job_class)
        need = _altered(state, now, job, spec)
        change = f"--class {job_class.value}"
        keeps = reserved.keeps(state, now)
        places = _seen(need, rooms, keeps)
        if places is not None:
            yield Suggestion(change, f"now on {where(spec, places, rooms)}")
            return
        if any(tenant.stopping for room in rooms for tenant in room.tenants.values()):
            return  # somebody has a claim already, and it is not known who gets what he leaves
        plan = place_in([need], rooms, keeps, costs.stakes(state, now))
        if plan.displacements:
            wholes = [_whole(state, displace.attempt) for displace in plan.displacements]
            who = wholes[0] if len(wholes) == 1 else f"{wholes[0]} and {len(wholes) - 1} more"
            yield Suggestion(change, f"{who} would give way to it")
            return


def _whole(state: State, attempt_id: str) -> str:
    return f"job {state.attempts[attempt_id].job_id}"


def _closed_node(
    state: State, now: Instant, need: Need, before: Sequence[Job], rooms: Sequence[Room]
) -> Iterator[Suggestion]:
    """A node that a person has closed, and nobody else, and that would do; those `before` the job
    choose first."""
    closed = [
        live
        for _, live in sorted(state.nodes.items())
        if live.phase is NodePhase.UP
        and live.node.intent in (NodeIntent.CORDONED, NodeIntent.DRAINED)
        and not live.node.closed_for
        and any(suits(need.spec, gpu.facts) for gpu in live.gpus.values())
    ]
    for live in closed[:CLOSED_NODES_TRIED_MAX]:
        opened = open_room(offer_of(state, live))
        alone = [opened] if need.spec.ranks == 1 else [*rooms, opened]
        if find(need, alone) is None:
            continue
        every = _left_by(state, now, before, live)
        places = _seen(need, every, reserved.keeps(state, now))
        if places is not None:
            there = where(need.spec, places, every)
            yield Suggestion(f"baton uncordon {live.node.id}", f"now on {there}")
            return
