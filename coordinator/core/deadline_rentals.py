"""What deadlines ask of rented capacity in the live coordinator, and for whom a node was rented.

Problem: `in_time.py` knows claims and rooms, and the state knows jobs, nodes and names. And a node
that was rented for a job and that the next one in the queue takes has cost its price and kept
nothing; who is rented for again each time pays until the budget is used up.

How: of each job that waits, has a deadline and says how much is left of it, it is worked out by
when it would have to run on each type of GPU that there is or that can be rented, as decisions over
all jobs do it (`allocation.latest_start_ms`). Of whom it is not known, and who could start nowhere
at present, nothing follows. For whom a node was ordered, and who is to have what others leave on
one, goes first in its class until it has started (`deadlines.first`), and no more than it needs is
ever ordered for it, unless one did not come.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from coordinator.core import (
    contenders,
    demand_samples,
    gpu_types,
    guard_rails,
    held_ahead,
    in_time,
    needs,
    plan_time,
    power,
    rentals,
)
from coordinator.core.allocation import latest_start_ms
from coordinator.core.capacity_model import Box, Outlook, Power, Source
from coordinator.core.in_time import Claim, Rentable, Room
from coordinator.core.model import CLASS_RANK, GpuFacts, Job, JobIntent
from coordinator.core.scaler import Awaited, RentedFor
from coordinator.core.speeds import Allowance
from coordinator.core.state import Instant, State
from coordinator.core.validate import could_hold, suits
from coordinator.core.which_nodes import is_there

# A node is ordered so long before it has to be ordered at the latest, in minutes of the plan: time
# for a person to agree, and for another try after one that did not come. Sooner would be dearer,
# since somebody may end by then.
NOTICE_MIN = 30
# Those with the nearest deadlines, in one plan.
CLAIMS_MAX = 64


def outlooks(
    state: State, now: Instant, boxes: Sequence[Box], seen: Sequence[Outlook]
) -> list[Outlook]:
    """With the GPUs that keep deadlines, and whose."""
    scaler = state.scaler
    _forget(state)
    scaler.awaited = {}
    rentable = _rentable(state, now)
    jobs = _with_deadlines(state, now) if rentable else []
    if not jobs:
        return list(seen)
    facts = _facts(state)
    claims = _claims(state, now, jobs, facts, rentable)
    freed = held_ahead.freed_ahead(state, now, facts)

    def frees_ms(gpu_type: str, gpus: int) -> float:
        at_ms = held_ahead.after_ms(freed.get(gpu_type, ()), gpus)
        return math.inf if at_ms is None else at_ms

    notice_ms = NOTICE_MIN * state.options.demand_minute_ms
    rooms = _rooms(state, now, boxes, claims)
    gpus: dict[str, int] = {}
    latest_ms = {claim.job_id: claim.latest_ms for claim in claims}
    for one in in_time.late(claims, rooms, frees_ms, rentable, notice_ms):
        at_ms = now.now_ms + latest_ms[one.job_id][one.gpu_type]
        if not one.nodes:
            scaler.rented_for[one.job_id] = RentedFor(one.gpu_type, 0, now.now_ms, at_ms)
            continue
        scaler.awaited.setdefault(one.gpu_type, []).append(Awaited(one.job_id, one.nodes, at_ms))
        per_node = rentable[one.gpu_type].burst.gpus_per_node
        gpus[one.gpu_type] = gpus.get(one.gpu_type, 0) + one.nodes * per_node
    by_type = {each.gpu_type: each for each in seen}
    for gpu_type, count in gpus.items():
        outlook = by_type.get(gpu_type) or _unseen(gpu_type, seen)
        awaited = scaler.awaited[gpu_type]
        by_type[gpu_type] = replace(
            outlook,
            late_gpus=count,
            late_jobs=tuple(each.job_id for each in awaited),
            late_gangs=tuple(each.nodes for each in awaited if each.nodes > 1),
        )
    return [by_type[gpu_type] for gpu_type in sorted(by_type)]


def rented(state: State, now: Instant, gpu_type: str) -> None:
    """A node of the type was ordered: for the first of those that still need one, if any do."""
    rented_for = state.scaler.rented_for
    for each in state.scaler.awaited.get(gpu_type, ()):
        if each.nodes > 0:
            each.nodes -= 1
            before = rented_for.get(each.job_id)
            nodes = 1 if before is None else before.nodes + 1
            rented_for[each.job_id] = RentedFor(gpu_type, nodes, now.now_ms, each.latest_ms)
            return


def _forget(state: State) -> None:
    """Who waits no more, and those whose node did not come: they may have another."""
    failed_ms = state.switching.unrented_ms
    state.scaler.rented_for = {
        job_id: given
        for job_id, given in state.scaler.rented_for.items()
        if job_id in state.queued and failed_ms.get(given.gpu_type, -1) < given.at_ms
    }


def _unseen(gpu_type: str, seen: Sequence[Outlook]) -> Outlook:
    """Nobody has wanted the type yet; what is known of demand is as old as of the others."""
    return Outlook(gpu_type, 0, 0, 0, stale=any(each.stale for each in seen))


def _rentable(state: State, now: Instant) -> dict[str, Rentable]:
    boots = power.boot_times(state)
    bursts = rentals.with_names(state, now, state.options.scaling.rules).bursts
    return {
        gpu_type: Rentable(burst, boots.of(power.rented_model(burst.gpus_per_node, gpu_type)))
        for gpu_type, burst in sorted(bursts.items())
    }


def _with_deadlines(state: State, now: Instant) -> list[Job]:
    """Those that wait and that a node could help, the nearest deadlines first."""
    jobs = [state.jobs[job_id] for job_id in state.queued]
    found = [
        job
        for job in jobs
        if job.spec.deadline_unix_ms > now.unix_ms
        and contenders.competes(job.spec)
        and job.intent is JobIntent.RUN
        and not needs.blocked(state, now, job)
    ]
    return sorted(found, key=lambda job: (job.spec.deadline_unix_ms, job.id))[:CLAIMS_MAX]


def _facts(state: State) -> dict[str, list[GpuFacts]]:
    """Of what there is, on or off, by GPU type."""
    found: dict[str, dict[tuple[str, int], GpuFacts]] = {}
    for _, _, gpus in state.indices.kinds:
        for name, memory_bytes in gpus:
            gpu_type = gpu_types.key_of(name, memory_bytes)
            here = found.setdefault(gpu_type, {})
            here.setdefault((name, memory_bytes), GpuFacts("", name, memory_bytes))
    return {gpu_type: list(here.values()) for gpu_type, here in sorted(found.items())}


def _claims(
    state: State,
    now: Instant,
    jobs: Sequence[Job],
    facts: Mapping[str, Sequence[GpuFacts]],
    rentable: Mapping[str, Rentable],
) -> list[Claim]:
    allowance = Allowance()
    homes = demand_samples.homes(state, [job.id for job in jobs])
    ahead = _ahead(state, {job.id: None for job in jobs}, facts)
    found = []
    for job in jobs:
        spec = job.spec
        own = [name for name, some in facts.items() if any(suits(spec, gpu) for gpu in some)]
        rents = [
            gpu_type
            for gpu_type, offer in rentable.items()
            if could_hold(
                spec,
                gpu_types.facts_of(gpu_type, offer.burst.gpus_per_node),
                spec.memory_bytes,
            )
        ]
        types = tuple(sorted(dict.fromkeys([*own, *rents])))
        contender = contenders.imagined(state, now, job, types, allowance)
        if contender.steps_left is None or contender.deadline_ms is None:
            continue
        latest_ms = {
            option.gpu_type: math.floor(
                latest_start_ms(replace(contender, options=(option,))) - now.now_ms
            )
            for option in contender.options
            if option.rate > 0
        }
        given = state.scaler.rented_for.get(job.id)
        claim = Claim(
            job.id, spec.gpus, spec.ranks, CLASS_RANK[spec.job_class],
            contender.deadline_ms - now.now_ms, latest_ms, homes[job.id],
            spec.memory_bytes, ahead[job.id], 0 if given is None else given.nodes,
            given is not None,
        )  # fmt: skip
        found.append(claim)
    return found


def _ahead(
    state: State, claiming: Mapping[int, None], facts: Mapping[str, Sequence[GpuFacts]]
) -> dict[int, dict[str, int]]:
    """What those want, by type that suits them, that are of a higher class, or of the same and came
    before: for each of these jobs."""
    wanted: dict[int, dict[str, int]] = {rank: {} for rank in CLASS_RANK.values()}
    suited: dict[tuple[object, ...], list[str]] = {}
    same: dict[int, dict[str, int]] = {}
    for job_id in sorted(state.queued):
        spec = state.jobs[job_id].spec
        here = wanted[CLASS_RANK[spec.job_class]]
        if job_id in claiming:
            same[job_id] = dict(here)
            continue
        key = (spec.gpu_types, spec.gpu_memory_bytes_min)
        if key not in suited:
            suited[key] = [
                name for name, some in facts.items() if any(suits(spec, gpu) for gpu in some)
            ]
        for gpu_type in suited[key]:
            here[gpu_type] = here.get(gpu_type, 0) + spec.gpus * spec.ranks
    for job_id, mine in same.items():
        rank = CLASS_RANK[state.jobs[job_id].spec.job_class]
        for other, here in wanted.items():
            for gpu_type, gpus in here.items() if other < rank else ():
                mine[gpu_type] = mine.get(gpu_type, 0) + gpus
    return same


def _rooms(state: State, now: Instant, boxes: Sequence[Box], claims: Sequence[Claim]) -> list[Room]:
    """What is free of nodes that are on, and all of those that boot, or can be started; of these so
    many come within ten minutes, and the others later."""
    options, boots = state.options, power.boot_times(state)
    bounds = options.scaling.rules.bounds
    plan_ms, in_plan = plan_time.plan_ms(options, now.now_ms), plan_time.boots(options, boots)
    kept = _kept(state, {claim.job_id: None for claim in claims})
    found, asleep = [], []
    for box in boxes:
        node = state.nodes[box.node].node
        memory_bytes = node.host.memory_bytes if node.gpus else None
        free_gpus = box.gpus - box.held_gpus - kept.get(box.node, 0)
        if box.power is Power.OFF and box.source is not Source.BURST and not box.closed:
            tired = guard_rails.cycles(box, plan_ms) >= bounds.cycles_per_day_max
            if not (tired or guard_rails.exhausted(box, bounds)):
                asleep.append((boots.of(box.model), box.node, box, memory_bytes))
        elif is_there(box, plan_ms, in_plan) and free_gpus > 0:
            past_ms = max(0, now.unix_ms - node.power.since_unix_ms)
            boots_ms = max(1, boots.of(box.model) - past_ms)
            ready_ms = boots_ms if box.power is Power.STARTING else 0
            rented = box.source is Source.BURST
            room = Room(box.gpu_type, free_gpus, ready_ms, memory_bytes=memory_bytes, rented=rented)
            found.append(room)
    at_once = max(1, guard_rails.up_max(len(boxes), (), plan_ms, bounds))
    window_ms = plan_time.wall_ms(options, guard_rails.WINDOW_MS)
    for place, (boot_ms, _, box, memory_bytes) in enumerate(sorted(asleep, key=lambda a: a[:2])):
        ready_ms = boot_ms + place // at_once * window_ms
        found.append(Room(box.gpu_type, box.gpus, ready_ms, off=True, memory_bytes=memory_bytes))
    return found


def _kept(state: State, claiming: Iterable[int]) -> dict[str, int]:
    """By node: free GPUs that are reserved for a job that has no claim."""
    found: dict[str, int] = {}
    mine = dict.fromkeys(claiming)
    for reservation in state.reservations.values():
        for place in reservation.places if reservation.job_id not in mine else ():
            live = state.nodes.get(place.node)
            known = [live.gpus.get(uuid) for uuid in place.gpu_uuids] if live is not None else []
            free = sum(gpu is not None and not gpu.holders for gpu in known)
            found[place.node] = found.get(place.node, 0) + free
    return found
