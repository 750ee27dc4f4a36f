"""Who runs where: one pure decision over a snapshot of the queue and the fleet.

Problem: a queue that is walked job by job against live state gives answers that depend on what was
started a moment ago, and nobody can say why a job waits. Here one pass sees everything at once and
returns starts, displacements, and a sentence with numbers for every job that waits.

The pass, in five lines:
1. Jobs in order of class, then of submission; a job that returns to the queue keeps its number and
   so its old place.
2. A job takes the node that fits it, preferring one that holds its last checkpoint, then one
   that has most of it, then the tightest fit, then the name.
3. A job that fits nowhere may displace jobs of lower classes on the node where that takes the
   fewest GPUs from the highest class harmed, then from the next: lowest class first, then the
   attempt that started last. What it waits for there is reserved for it within the pass.
4. A job that is reserved for takes no second node; jobs behind it may use what it cannot (backfill
   by fit).
5. Everything else waits, with the largest free block and what it lacks in the sentence.

The order by class first and never by weights follows from the invariant that no guaranteed job
waits for a spare one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from coordinator.core.model import CLASS_RANK, GpuFacts, JobSpec
from coordinator.core.validate import describe_need, gigabytes, suits

# Jobs without GPUs share the cores: four a core keeps a burst of small ones moving without swamping
# the node's trainers.
SLOTS_PER_CPU = 4
# More starts in one pass than this would delay the replies of the same batch; the rest is placed by
# the next pass.
STARTS_PER_PASS_MAX = 512


@dataclass(frozen=True, slots=True)
class Need:
    """A queued job. `replicas` are the nodes that hold its last checkpoint; `avoid` the node that
    refused it just now, or where it got no further; `near` are where its last attempt ran and
    the standby that got its checkpoints."""

    job_id: int
    spec: JobSpec
    replicas: tuple[str, ...] = ()
    avoid: str = ""
    near: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tenant:
    """An attempt on a node. `stopping` ones are about to give back what they hold."""

    attempt: str
    rank: int
    order: int
    gpu_uuids: tuple[str, ...]
    memory_bytes: int
    stopping: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """A node that takes work. `free` GPUs are held by nobody; `gpus` are all that are present."""

    node: str
    gpus: tuple[GpuFacts, ...]
    free: tuple[str, ...]
    memory_bytes: int
    slots: int
    tenants: tuple[Tenant, ...]


@dataclass(frozen=True, slots=True)
class Start:
    job_id: int
    node: str
    gpu_uuids: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Displace:
    """`attempt` gives way to `job_id`."""

    attempt: str
    job_id: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    starts: tuple[Start, ...]
    displacements: tuple[Displace, ...]
    waits: tuple[tuple[int, str], ...]


@dataclass(slots=True)
class _Room:
    """What is left of an offer while the pass goes on."""

    offer: Offer
    free: dict[str, GpuFacts]
    memory_bytes: int
    slots: int
    tenants: dict[str, Tenant] = field(default_factory=dict)
    # GPUs that are not free yet and already kept for somebody in this pass.
    claimed: dict[str, None] = field(default_factory=dict)

    def takes(self, spec: JobSpec) -> tuple[str, ...] | None:
        """The GPUs that the job would get now, smallest memory first; `None` when it does not
        fit."""
        if spec.memory_bytes > self.memory_bytes or (spec.gpus == 0 and self.slots < 1):
            return None
        fitting = [gpu for gpu in self.free.values() if suits(spec, gpu)]
        if len(fitting) < spec.gpus:
            return None
        fitting.sort(key=lambda gpu: (gpu.memory_bytes, gpu.uuid))
        return tuple(gpu.uuid for gpu in fitting[: spec.gpus])

    def take(self, spec: JobSpec, gpu_uuids: tuple[str, ...]) -> None:
        for uuid in gpu_uuids:
            self.free.pop(uuid, None)
        self.memory_bytes -= spec.memory_bytes
        self.slots -= 1 if spec.gpus == 0 else 0


def place(needs: Sequence[Need], offers: Sequence[Offer]) -> Plan:
    """Decide for the whole queue. `needs` must be in order of class and submission."""
    rooms = [_room(offer) for offer in sorted(offers, key=lambda offer: offer.node)]
    starts: list[Start] = []
    displacements: list[Displace] = []
    waits: list[tuple[int, str]] = []
    # Within one pass room only shrinks: what did not fit once need not be tried again for an equal
    # request.
    refused: dict[tuple[object, ...], str] = {}
    for need in needs:
        key = _request_key(need)
        sentence = refused.get(key)
        if sentence is None and len(starts) < STARTS_PER_PASS_MAX:
            start = _start(need, rooms)
            if start is not None:
                starts.append(start)
                continue
            victims, sentence = _displace(need, rooms)
            displacements += victims
            if not victims and not sentence:
                sentence = _why_not(need.spec, rooms)
                refused[key] = sentence
        waits.append((need.job_id, sentence or "is next in line; the present round is full"))
    return Plan(tuple(starts), tuple(displacements), tuple(waits))


def _room(offer: Offer) -> _Room:
    facts = {gpu.uuid: gpu for gpu in offer.gpus}
    used_bytes = sum(tenant.memory_bytes for tenant in offer.tenants)
    used_slots = sum(1 for tenant in offer.tenants if not tenant.gpu_uuids)
    return _Room(
        offer,
        {uuid: facts[uuid] for uuid in offer.free if uuid in facts},
        offer.memory_bytes - used_bytes,
        offer.slots - used_slots,
        {tenant.attempt: tenant for tenant in offer.tenants},
    )


def _request_key(need: Need) -> tuple[object, ...]:
    spec = need.spec
    return (
        spec.job_class,
        spec.gpus,
        spec.gpu_types,
        spec.gpu_memory_bytes_min,
        spec.memory_bytes,
        need.avoid,
    )


def _start(need: Need, rooms: Sequence[_Room]) -> Start | None:
    best: tuple[tuple[bool, bool, bool, int, str], _Room, tuple[str, ...]] | None = None
    for room in rooms:
        gpu_uuids = room.takes(need.spec)
        if gpu_uuids is None:
            continue
        node = room.offer.node
        left = len(room.free) - len(gpu_uuids) if need.spec.gpus else -room.slots
        # Who is near and has not got the last checkpoint has most of it from those before.
        far = (node not in need.replicas, node not in need.near)
        rank = (node == need.avoid, *far, left, node)
        if best is None or rank < best[0]:
            best = (rank, room, gpu_uuids)
    if best is None:
        return None
    _, room, gpu_uuids = best
    room.take(need.spec, gpu_uuids)
    return Start(need.job_id, room.offer.node, gpu_uuids, _why_here(need, room, gpu_uuids))


def _why_here(need: Need, room: _Room, gpu_uuids: tuple[str, ...]) -> str:
    node = room.offer.node
    names = sorted({gpu.name for gpu in room.offer.gpus if gpu.uuid in gpu_uuids})
    where = f"{len(gpu_uuids)} x {', '.join(names)} on {node}" if names else node
    if node in need.replicas:
        return f"runs on {where}, where its last checkpoint lies"
    if node in need.near:
        return f"runs on {where}, where most of its last checkpoint lies"
    if need.spec.gpus == 0:
        return f"runs on {where}, which has the most free places"
    return f"runs on {where}, the tightest fit"


def _displace(need: Need, rooms: Sequence[_Room]) -> tuple[list[Displace], str]:
    """The attempts that must give way for this job on the node where that costs least; none when no
    node would do.

    Attempts that are stopping already count as given; the node's room is then kept for this job for
    the rest of the pass.
    """
    rank = CLASS_RANK[need.spec.job_class]
    best: tuple[tuple[list[int], int, str], _Room, list[Tenant], tuple[str, ...]] | None = None
    for room in rooms:
        found = _victims(need.spec, rank, room)
        if found is None:
            continue
        victims, gpu_uuids = found
        # GPUs taken from each class, the highest first: a spare one more weighs less than a
        # standard one.
        cost = [
            sum(max(1, len(tenant.gpu_uuids)) for tenant in victims if tenant.rank == lower)
            for lower in CLASS_RANK.values()
        ]
        key = (cost, len(victims), room.offer.node)
        if best is None or key < best[0]:
            best = (key, room, victims, gpu_uuids)
    if best is None:
        return [], ""
    _, room, victims, gpu_uuids = best
    room.take(need.spec, gpu_uuids)
    room.claimed.update(dict.fromkeys(gpu_uuids))
    for tenant in victims:
        room.tenants[tenant.attempt] = replace(tenant, stopping=True)
    node = room.offer.node
    why = f"gives way to {need.spec.job_class.value} job {need.job_id}"
    leaving = [tenant for tenant in room.tenants.values() if tenant.stopping]
    # Those whose GPUs it gets; when it is memory or a place that lacks, all of them.
    named = [t for t in leaving if any(uuid in gpu_uuids for uuid in t.gpu_uuids)] or leaving
    who = " and ".join(tenant.attempt for tenant in named)
    sentence = f"{who} {'has' if len(named) == 1 else 'have'} to save and leave {node} first"
    return [Displace(tenant.attempt, need.job_id, why) for tenant in victims], sentence


def _victims(spec: JobSpec, rank: int, room: _Room) -> tuple[list[Tenant], tuple[str, ...]] | None:
    """Fewest tenants of lower classes that make room, and the GPUs that the job would then hold."""
    gone = [tenant for tenant in room.tenants.values() if tenant.stopping]
    lower = [t for t in room.tenants.values() if not t.stopping and t.rank > rank]
    # The lowest class first, and within it the one that has run the shortest.
    lower.sort(key=lambda tenant: (-tenant.rank, -tenant.order))
    victims: list[Tenant] = []
    gpu_uuids = _fits_without(spec, room, gone)
    while gpu_uuids is None and lower:
        victims.append(lower.pop(0))
        gpu_uuids = _fits_without(spec, room, gone + victims)
    if gpu_uuids is None:
        return None
    for tenant in reversed(victims):  # spare the highest class, and who has run the longest
        fewer = [other for other in victims if other is not tenant]
        without = _fits_without(spec, room, gone + fewer)
        if without is not None:
            victims, gpu_uuids = fewer, without
    return victims, gpu_uuids


def _fits_without(spec: JobSpec, room: _Room, gone: Sequence[Tenant]) -> tuple[str, ...] | None:
    facts = {gpu.uuid: gpu for gpu in room.offer.gpus}
    free = dict(room.free)
    memory_bytes, slots = room.memory_bytes, room.slots
    for tenant in gone:
        for uuid in tenant.gpu_uuids:
            if uuid in facts and uuid not in room.claimed:
                free[uuid] = facts[uuid]
        memory_bytes += tenant.memory_bytes
        slots += 0 if tenant.gpu_uuids else 1
    return _Room(room.offer, free, memory_bytes, slots).takes(spec)


def _why_not(spec: JobSpec, rooms: Sequence[_Room]) -> str:
    need = f"needs {describe_need(spec)} on one node"
    if not rooms:
        return f"{need}; no node takes work at present"
    if spec.gpus == 0:
        slots = sum(max(0, room.slots) for room in rooms)
        most = _most_memory(room for room in rooms if room.slots > 0)
        return f"{need}; {slots} places are free, and at most {most} of memory beside one"
    counts = [
        (sum(1 for gpu in room.free.values() if suits(spec, gpu)), room.offer.node)
        for room in rooms
    ]
    largest, node = max(counts, key=lambda pair: pair[0])
    total = sum(sum(1 for gpu in room.offer.gpus if suits(spec, gpu)) for room in rooms)
    if largest >= spec.gpus:
        able = zip(rooms, counts, strict=True)
        most = _most_memory(room for room, (count, _) in able if count >= spec.gpus)
        return f"{need}; the GPUs are free, but at most {most} of memory is where they are"
    if total == 0:
        return f"{need}; no node that takes work at present has any"
    if largest == 0:
        taken = (
            "the only one that fits is taken" if total == 1 else f"all {total} that fit are taken"
        )
        return f"{need}; {taken}"
    return f"{need}; the largest free block is {largest} on {node}, of {total} that fit"


def _most_memory(rooms: Iterable[_Room]) -> str:
    return gigabytes(max((max(0, room.memory_bytes) for room in rooms), default=0))
