"""Who runs where: one pure decision over a snapshot of the queue and the fleet.

Problem: a queue that is walked job by job against live state gives answers that depend on what was
started a moment ago, and nobody can say why a job waits. Here one pass sees everything at once and
returns starts, displacements, and a sentence with numbers for every job that waits.

The pass, in five lines:
1. Jobs in order of class, then of submission; a job that returns to the queue keeps its number and
   so its old place.
2. A job takes the node that fits it, with GPUs of the type that is worth most for it where several
   types would do (`decisions.py`), preferring one that holds its last checkpoint, then one
   that has most of it, then the one where others lose least by it (`fragmentation.py`), then the
   tightest fit, then the name (of GPUs that are shared, those that are shared already first).
   A gang takes all its places or none:
   one node's if it fits there, else the fewest nodes', the fullest offers first and the rest where
   it fits tightest.
3. A job that fits nowhere may displace jobs of lower classes on the node where that takes the
   least from the highest class harmed, then from the next (`displacement.py`). A gang may also
   displace over all nodes. What it waits for there is reserved for it within the pass.
4. A job that is reserved for takes no second node; jobs behind it may use what it cannot (backfill
   by fit).
5. Everything else waits, with the largest free block and what it lacks in the sentence.

The order by class first and never by weights follows from the invariant that no guaranteed job
waits for a spare one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop

from coordinator.core.displacement import Spread, Way, find_way, leave
from coordinator.core.fragmentation import PARTS, Mix
from coordinator.core.model import CLASS_RANK, JobSpec
from coordinator.core.rooms import Offer, Room, Tenant, most_left_bytes, open_room
from coordinator.core.shares import SHARERS_MAX
from coordinator.core.validate import could_hold, describe_need, describe_ranks, gigabytes, suits

# More starts in one pass than this would delay the replies of the same batch; the rest is placed by
# the next pass.
STARTS_PER_PASS_MAX = 512
# Of the nodes that fit a job so many are weighed against what others ask for, the tightest first:
# in a large fleet most are alike, and each costs some tens of microseconds.
WEIGHED_MAX = 64
# Of the nodes that have places for a gang; a sentence that names all of a large fleet is not read.
NODES_NAMED_MAX = 4


@dataclass(frozen=True, slots=True)
class Need:
    """A queued job. `replicas` are the nodes that hold its last checkpoint; `avoid` the node that
    refused it just now, or where it got no further; `near` are where its last attempt ran and
    the standby that got its checkpoints. `types` of GPU are those that are worth most for it first,
    each with how fast it is there; empty where all are alike. With `only` it has been promised that
    type; and while it is `leaving` another place for that, room is kept for it."""

    job_id: int
    spec: JobSpec
    replicas: tuple[str, ...] = ()
    avoid: str = ""
    near: tuple[str, ...] = ()
    types: tuple[tuple[str, float], ...] = ()
    only: str = ""
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """What one rank gets."""

    node: str
    gpu_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """`places` are by rank."""

    job_id: int
    places: tuple[Place, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Displace:
    """`attempt`, and with it its gang, gives way to `job_id`."""

    attempt: str
    job_id: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    starts: tuple[Start, ...]
    displacements: tuple[Displace, ...]
    waits: tuple[tuple[int, str], ...]


def place(needs: Sequence[Need], offers: Sequence[Offer], mix: Mix | None = None) -> Plan:
    """Decide for the whole queue. `needs` must be in order of class and submission; `mix` is what
    has been asked for lately."""
    rooms = [open_room(offer, mix) for offer in sorted(offers, key=lambda offer: offer.node)]
    starts: list[Start] = []
    displacements: list[Displace] = []
    waits: list[tuple[int, str]] = []
    # Within one pass room only shrinks: what did not fit once need not be tried again for an equal
    # request.
    refused: dict[tuple[object, ...], str] = {}
    placed = 0
    for need in needs:
        if need.leaving:
            keep_room(need, rooms, _nobody)
            continue
        key = _request_key(need)
        sentence = refused.get(key)
        if sentence is None and placed < STARTS_PER_PASS_MAX:
            start, victims, sentence = _place_one(need, rooms)
            if start is not None:
                starts.append(start)
                placed += len(start.places)
                continue
            displacements += victims
            if not victims and not sentence:
                sentence = _why_not(need.spec, rooms)
                refused[key] = sentence
        waits.append((need.job_id, sentence or "is next in line; the present round is full"))
    return Plan(tuple(starts), tuple(displacements), tuple(waits))


def _place_one(need: Need, rooms: Sequence[Room]) -> tuple[Start | None, list[Displace], str]:
    """Its start, or who has to leave for it and a sentence about that; who can have nothing of the
    type that it was promised is as any other."""
    start = _start(need, rooms)
    if start is not None:
        return start, [], ""
    victims, sentence = _displace(need, rooms)
    if need.only and not sentence:
        return _place_one(replace(need, only=""), rooms)
    return None, victims, sentence


def _request_key(need: Need) -> tuple[object, ...]:
    spec = need.spec
    return (
        spec.job_class,
        spec.ranks,
        spec.gpus,
        spec.gpu_types,
        spec.gpu_memory_bytes_min,
        spec.shared_gpu_memory_bytes,
        spec.memory_bytes,
        need.avoid,
    )


def _start(need: Need, rooms: Sequence[Room]) -> Start | None:
    spread = _spread(need, rooms)
    if spread is None:
        return None
    why = _why_here(need, spread) + _why_type(need, spread)
    return Start(need.job_id, take(need.spec, spread), why)


def take(spec: JobSpec, spread: Spread) -> tuple[Place, ...]:
    places = []
    for room, shares in spread:
        for gpu_uuids in shares:
            room.take(spec, gpu_uuids)
            places.append(Place(room.offer.node, gpu_uuids))
    return tuple(places)


def _spread(need: Need, rooms: Sequence[Room]) -> Spread | None:
    """Where all ranks fit, on GPUs of the first type that has room for them, or of several; without
    the node to avoid if that will do. `None` where they do not."""
    if need.types and not need.only:
        others = [room for room in rooms if room.offer.node != need.avoid]
        for gpu_type, _ in need.types:
            spread = _search(replace(need, only=gpu_type), others)
            if spread is not None:
                return spread
    return _search(need, rooms)


def _search(need: Need, rooms: Sequence[Room]) -> Spread | None:
    if need.only:
        rooms = [room for room in rooms if room.has_type(need.only)]
    if need.spec.ranks == 1 and not need.spec.shared_gpu_memory_bytes:
        return first_that_takes(need, rooms)
    return best_of_all(need, rooms)


def first_that_takes(need: Need, rooms: Sequence[Room]) -> Spread | None:
    """Of a job of one rank how near and how tight it would be is known before it is known whether
    it fits: so rooms are asked in that order, and of a large fleet most are not."""
    spec = need.spec
    hopes = [
        (room.offer.node == need.avoid, *_nearness(need, room), _left(spec, room, 1), index)
        for index, room in enumerate(rooms)  # by name
        if len(room.free) >= spec.gpus
    ]
    heapify(hopes)
    found: Spread = []
    while hopes and len(found) < WEIGHED_MAX:
        avoided, far, farther, _, index = heappop(hopes)
        room = rooms[index]
        order = (avoided, far, farther)
        if found and order != (found[0][0].offer.node == need.avoid, *_nearness(need, found[0][0])):
            break
        shares = room.takes(spec, need.only)
        if shares:
            found.append((room, shares))
            if room.mix is None or not room.mix.total:
                break
    return [min(found, key=lambda pair: _tightness(need, *pair))] if found else None


def best_of_all(need: Need, rooms: Sequence[Room]) -> Spread | None:
    offered = [(room, room.takes(need.spec, need.only)) for room in rooms]
    offered = [(room, shares) for room, shares in offered if shares]
    others = [(room, shares) for room, shares in offered if room.offer.node != need.avoid]
    for usable in (others, offered):
        spread = _fewest_nodes(need, usable)
        if spread is not None:
            return spread
    return None


def _fewest_nodes(need: Need, offered: Spread) -> Spread | None:
    """The fullest offers first; what is then left goes where it fits tightest. No smaller number of
    nodes has as many places."""
    offered = list(offered)
    chosen: Spread = []
    left = need.spec.ranks
    while left:
        enough = [(room, shares[:left]) for room, shares in offered if len(shares) >= left]
        if enough:
            chosen.append(min(enough, key=lambda pair: _tightness(need, *pair)))
            break
        if not offered:
            return None
        fullest = min(offered, key=lambda pair: (-len(pair[1]), _tightness(need, *pair)))
        offered.remove(fullest)
        chosen.append(fullest)
        left -= len(fullest[1])
    return sorted(chosen, key=lambda pair: pair[0].offer.node)


def _tightness(
    need: Need, room: Room, shares: Sequence[tuple[str, ...]]
) -> tuple[bool, bool, int, int, int, int, str]:
    spec = need.spec
    opens, fit = room.share_rank(spec, shares[0][0]) if spec.shared_gpu_memory_bytes else (0, 0)
    increase, left = room.increase(spec, shares), _left(spec, room, len(shares))
    return (*_nearness(need, room), opens, increase, fit, left, room.offer.node)


def _nearness(need: Need, room: Room) -> tuple[bool, bool]:
    """Who is near and has not got the last checkpoint has most of it from those before."""
    return room.offer.node not in need.replicas, room.offer.node not in need.near


def _left(spec: JobSpec, room: Room, ranks: int) -> int:
    return len(room.free) - ranks * spec.gpus if spec.gpus else -room.slots


def _why_here(need: Need, spread: Spread) -> str:
    if len(spread) > 1:
        first, *rest = [(len(shares), room.offer.node) for room, shares in spread]
        where = [f"{first[0]} of its {need.spec.ranks} ranks on {first[1]}"]
        where += [f"{count} on {node}" for count, node in rest]
        return f"runs with {_listed(where)}, the fewest nodes that have room"
    room, shares = spread[0]
    node = room.offer.node
    gpu_uuids = [uuid for share in shares for uuid in share]
    names = sorted({gpu.name for gpu in room.offer.gpus if gpu.uuid in gpu_uuids})
    where_ = f"{len(gpu_uuids)} x {', '.join(names)} on {node}" if names else node
    if need.spec.shared_gpu_memory_bytes:
        cap = gigabytes(need.spec.shared_gpu_memory_bytes)
        others = len(room.holds.get(gpu_uuids[0], ()))
        beside = f" beside {others} other{'s' if others > 1 else ''}" if others else ""
        where_ = f"{cap} of a shared {', '.join(names)} on {node}{beside}"
    if node in need.replicas:
        return f"runs on {where_}, where its last checkpoint lies"
    if node in need.near:
        return f"runs on {where_}, where most of its last checkpoint lies"
    if need.spec.gpus == 0 and not (need.spec.memory_bytes and room.mix and room.mix.total):
        return f"runs on {where_}, which has the most free places"
    leaves = _leaves(need.spec, room, shares)
    if leaves:
        return f"runs on {where_} and leaves {leaves}"
    if need.spec.gpus == 0:
        return f"runs on {where_}, where no GPU is free that could need its memory"
    return f"runs on {where_}, the tightest fit"


def _why_type(need: Need, spread: Spread) -> str:
    """What the choice of its type means for its speed; empty where nothing is known of that, or
    where it runs on several."""
    speeds = dict(need.types)
    types = [name for name in speeds if any(name in _types(*pair) for pair in spread)]
    if len(types) != 1 or len(set(speeds.values())) == 1:
        return ""
    here = speeds.pop(types[0])
    best = max(speeds, key=lambda name: speeds[name])
    slower = [name for name in speeds if speeds[name] < here]
    if speeds[best] > here:
        return f"; on {best} it would be about {speeds[best] / here:.1f} times as fast"
    than = max(slower, key=lambda name: speeds[name])
    return f"; it is about {here / speeds[than]:.1f} times as fast there as on {than}"


def _types(room: Room, shares: Sequence[tuple[str, ...]]) -> list[str]:
    taken = [uuid for gpu_uuids in shares for uuid in gpu_uuids]
    return room.types_of(taken)


def _nobody(_: Tenant) -> bool:
    return False


def _leaves(spec: JobSpec, room: Room, shares: Sequence[tuple[str, ...]]) -> str:
    """What is then free of the node, and to whom it is of use: why it is this node. Empty where
    nobody can say, or nothing is left: nothing fits tighter."""
    after = room.box(spec, shares)
    if room.mix is None or not room.mix.total or not after.left:
        return ""
    percent = 100 * room.mix.fitting(after) // room.mix.total
    gpus = f"{after.left / PARTS:.2f}" if after.left % PARTS else str(after.left // PARTS)
    unit = "GPU" if after.left == PARTS else "GPUs"
    return f"{gpus} {unit} there, of use to {percent}% of recent requests"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _displace(need: Need, rooms: Sequence[Room]) -> tuple[list[Displace], str]:
    """The attempts that must give way for this job where that costs least, and whom it waits for;
    none when nowhere would do. The room is then kept for this job for the rest of the pass."""
    class_rank = CLASS_RANK[need.spec.job_class]
    way = make_way(need, rooms, lambda tenant: tenant.rank > class_rank)
    if way is None:
        return [], ""
    why = f"gives way to {need.spec.job_class.value} job {need.job_id}"
    sentence = _who_leaves(need.spec, way.spread)
    return [Displace(tenant.attempt, need.job_id, why) for tenant in way.victims], sentence


def make_way(
    need: Need,
    rooms: Sequence[Room],
    may_leave: Callable[[Tenant], bool],
    accept: Callable[[Sequence[Tenant]], bool] = lambda _: True,
) -> Way | None:
    """Who has to leave so that the job fits, none where those do that leave already; if that is
    accepted they count as leaving from then on."""
    way = find_way(need.spec, need.only, rooms, may_leave, lambda some: _spread(need, some))
    if way is None or (way.victims and not accept(way.victims)):
        return None
    leave(rooms, [tenant.whole for tenant in way.victims])
    return way


def keep_room(
    need: Need,
    rooms: Sequence[Room],
    may_leave: Callable[[Tenant], bool],
    accept: Callable[[Sequence[Tenant]], bool] = lambda _: True,
) -> Spread | None:
    """Keep for it what it would get now, or when those have left that are leaving or may."""
    spread = keep_free(need, rooms)
    if spread is None:
        way = make_way(need, rooms, may_leave, accept)
        if way is not None:
            take(need.spec, way.spread)
            return way.spread
    return spread


def keep_free(need: Need, rooms: Sequence[Room]) -> Spread | None:
    """Keep for it what it would get now."""
    spread = _spread(need, rooms)
    if spread is not None:
        take(need.spec, spread)
    return spread


def _who_leaves(spec: JobSpec, spread: Spread) -> str:
    """Takes the room, too, that they leave."""
    who: dict[str, None] = {}
    nodes: dict[str, None] = {}
    places = take(spec, spread)
    for room, _ in spread:
        taken = [u for place in places if place.node == room.offer.node for u in place.gpu_uuids]
        leaving = [tenant for tenant in room.tenants.values() if tenant.stopping]
        # Those whose GPUs it gets; when it is memory or a place that lacks, all of them.
        named = [t for t in leaving if any(uuid in taken for uuid in t.gpu_uuids)] or leaving
        who.update(dict.fromkeys(tenant.whole for tenant in named))
        nodes.update(dict.fromkeys([room.offer.node] if named else []))
    verb = "has" if len(who) == 1 else "have"
    return f"{' and '.join(who)} {verb} to save and leave {' and '.join(nodes)} first"


def _why_not(spec: JobSpec, rooms: Sequence[Room]) -> str:
    if spec.ranks > 1:
        return _why_not_all(spec, rooms)
    if spec.shared_gpu_memory_bytes and rooms:
        return _why_no_share(spec, rooms)
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


def _why_no_share(spec: JobSpec, rooms: Sequence[Room]) -> str:
    need = f"needs {describe_need(spec)}"
    knowing = [room for room in rooms if room.offer.shares]
    outdated = len(rooms) - len(knowing)
    which, them = ("1 node runs", "it") if outdated == 1 else (f"{outdated} nodes run", "them")
    tail = f"; {which} an agent that cannot share GPUs: upgrade {them}" if outdated else ""
    total = sum(sum(1 for gpu in room.offer.gpus if suits(spec, gpu)) for room in knowing)
    if total == 0:
        return f"{need}; no node that takes work at present has one{tail}"
    left_bytes, jobs, node = most_left_bytes(spec, knowing)
    if left_bytes >= spec.shared_gpu_memory_bytes:
        able = [room for room in knowing if room.has_share(spec)]
        return (
            f"{need}; the share is free, but at most {_most_memory(able)} of memory is where it is"
        )
    if not jobs:
        taken = "the only one that fits is" if total == 1 else f"all {total} that fit are"
        return f"{need}; {taken} taken{tail}"
    beside = f"beside {jobs} job{'s' if jobs > 1 else ''} ({SHARERS_MAX} at most)"
    left = gigabytes(left_bytes)
    return f"{need}; the most that is left of one is {left}, on {node} {beside}{tail}"


def _why_not_all(spec: JobSpec, rooms: Sequence[Room]) -> str:
    outdated = [room.offer for room in rooms if not room.offer.gangs]
    count = sum(1 for offer in outdated if could_hold(spec, offer.gpus, offer.memory_bytes))
    which, them = ("1 node runs", "it") if count == 1 else (f"{count} nodes run", "them")
    tail = f"; {which} an agent from before gangs: upgrade {them}" if count else ""
    return _which_places(spec, rooms) + tail


def _which_places(spec: JobSpec, rooms: Sequence[Room]) -> str:
    need = f"needs {describe_ranks(spec)}"
    if not rooms:
        return f"{need}; no node takes work at present"
    counts = [(len(room.takes(spec)), room.offer.node) for room in rooms]
    free = sorted((pair for pair in counts if pair[0]), key=lambda pair: (-pair[0], pair[1]))
    total = sum(count for count, _ in free)
    if not total:
        return f"{need}; a place for none of them is free"
    if len(free) == 1:
        some = "a place for 1 is" if total == 1 else f"places for {total} are"
        return f"{need}; {some} free, on {free[0][1]}"
    where = [f"{count} on {node}" for count, node in free[:NODES_NAMED_MAX]]
    if len(free) > NODES_NAMED_MAX:
        rest = free[NODES_NAMED_MAX:]
        where.append(f"{sum(count for count, _ in rest)} on {len(rest)} more")
    return f"{need}; places for {total} are free, {_listed(where)}"


def _most_memory(rooms: Iterable[Room]) -> str:
    return gigabytes(max((max(0, room.memory_bytes) for room in rooms), default=0))
