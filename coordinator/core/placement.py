"""Who runs where: one pure decision over a snapshot of the queue and the fleet.

Problem: a queue that is walked job by job against live state gives answers that depend on what was
started a moment ago, and nobody can say why a job waits. Here one pass sees everything at once and
returns starts, displacements, and a sentence with numbers for every job that waits.

The pass, in five lines:
1. Jobs in order of class, then of submission; a job that returns to the queue keeps its number and
   so its old place.
2. A job takes the node that fits it, preferring one that holds its last checkpoint, then one
   that has most of it, then the one where others lose least by it (`fragmentation.py`), then the
   tightest fit, then the name (of GPUs that are shared, those that are shared already first).
   A gang takes all its places or none:
   one node's if it fits there, else the fewest nodes', the fullest offers first and the rest where
   it fits tightest.
3. A job that fits nowhere may displace jobs of lower classes on the node where that takes the
   fewest GPUs from the highest class harmed, then from the next: lowest class first, then the
   attempt that started last. A gang may also displace over all nodes, and whoever displaces one
   rank of a gang displaces, and counts, all of it. What it waits for there is reserved for it
   within the pass.
4. A job that is reserved for takes no second node; jobs behind it may use what it cannot (backfill
   by fit).
5. Everything else waits, with the largest free block and what it lacks in the sentence.

The order by class first and never by weights follows from the invariant that no guaranteed job
waits for a spare one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop

from coordinator.core.fragmentation import PARTS, Mix
from coordinator.core.keeps import Keep, hidden
from coordinator.core.model import CLASS_RANK, JobSpec
from coordinator.core.rooms import Offer, Room, Tenant, open_room
from coordinator.core.rooms import Place as Place
from coordinator.core.shortfalls import listed, why_not
from coordinator.core.validate import gigabytes

# More starts in one pass than this would delay the replies of the same batch; the rest is placed by
# the next pass.
STARTS_PER_PASS_MAX = 512
# Of the nodes that fit a job so many are weighed against what others ask for, the tightest first:
# in a large fleet most are alike, and each costs some tens of microseconds.
WEIGHED_MAX = 64


@dataclass(frozen=True, slots=True)
class Need:
    """A queued job. `replicas` are the nodes that hold its last checkpoint; `avoid` the node that
    refused it just now, or where it got no further; `near` are where its last attempt ran and
    the standby that got its checkpoints. `lasts_ms` is how long it is expected to run, if anybody
    knows."""

    job_id: int
    spec: JobSpec
    replicas: tuple[str, ...] = ()
    avoid: str = ""
    near: tuple[str, ...] = ()
    lasts_ms: int | None = None


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


# Rooms and the GPUs that ranks of one job get there; ranks count through them in this order.
_Spread = list[tuple[Room, list[tuple[str, ...]]]]


def place(
    needs: Sequence[Need],
    offers: Sequence[Offer],
    mix: Mix | None = None,
    keeps: Sequence[Keep] = (),
) -> Plan:
    """Decide for the whole queue. `needs` must be in order of class and submission; `mix` is what
    has been asked for lately, `keeps` is room that not everybody sees."""
    return place_in(needs, rooms_of(offers, mix), keeps)


def rooms_of(offers: Sequence[Offer], mix: Mix | None = None) -> list[Room]:
    return [open_room(offer, mix) for offer in sorted(offers, key=lambda offer: offer.node)]


def place_in(needs: Sequence[Need], rooms: Sequence[Room], keeps: Sequence[Keep] = ()) -> Plan:
    """The pass; `rooms` are then what is left for others."""
    known = {room.offer.node: room for room in rooms}
    starts: list[Start] = []
    displacements: list[Displace] = []
    waits: list[tuple[int, str]] = []
    # Within one pass room only shrinks: what did not fit once need not be tried again for an equal
    # request.
    refused: dict[tuple[object, ...], str] = {}
    placed = 0
    for need in needs:
        kept = kept_from(need, keeps)
        key = (*request_key(need), *(keep.job_id for keep in kept))
        sentence = refused.get(key)
        if sentence is None and placed < STARTS_PER_PASS_MAX:
            with hidden(kept, known):
                start = _start(need, rooms)
                victims, sentence = ([], "") if start is not None else _displace(need, rooms)
            if start is not None:
                starts.append(start)
                placed += len(start.places)
                continue
            displacements += victims
            if not victims and not sentence:
                sentence = _refusal(need, rooms, known, kept)
                refused[key] = sentence
        waits.append((need.job_id, sentence or "is next in line; the present round is full"))
    return Plan(tuple(starts), tuple(displacements), tuple(waits))


def kept_from(need: Need, keeps: Sequence[Keep]) -> list[Keep]:
    """What it does not see."""
    rank = CLASS_RANK[need.spec.job_class]
    return [keep for keep in keeps if keep.hides_from(need.job_id, rank, need.lasts_ms)]


def _refusal(
    need: Need, rooms: Sequence[Room], known: Mapping[str, Room], kept: Sequence[Keep]
) -> str:
    with hidden(kept, known):
        sentence = why_not(need.spec, rooms)
    if kept and find(need, rooms) is not None:
        sentence += "".join(f"; {keep.note}" for keep in kept)
    return sentence


def request_key(need: Need) -> tuple[object, ...]:
    """Equal for jobs that fit where the other does."""
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
    why = _why_here(need, spread)
    return Start(need.job_id, _take(need.spec, spread), why)


def find(need: Need, rooms: Sequence[Room]) -> tuple[Place, ...] | None:
    """Where the job would start; takes nothing."""
    spread = _spread(need, rooms)
    return None if spread is None else _places(spread)


def _places(spread: _Spread) -> tuple[Place, ...]:
    return tuple(Place(room.offer.node, uuids) for room, shares in spread for uuids in shares)


def _take(spec: JobSpec, spread: _Spread) -> tuple[Place, ...]:
    for room, shares in spread:
        for gpu_uuids in shares:
            room.take(spec, gpu_uuids)
    return _places(spread)


def _spread(need: Need, rooms: Sequence[Room]) -> _Spread | None:
    """Where all ranks fit, without the node to avoid if that will do; `None` where they do not."""
    if need.spec.ranks == 1 and not need.spec.shared_gpu_memory_bytes:
        return first_that_takes(need, rooms)
    return best_of_all(need, rooms)


def first_that_takes(need: Need, rooms: Sequence[Room]) -> _Spread | None:
    """Of a job of one rank how near and how tight it would be is known before it is known whether
    it fits: so rooms are asked in that order, and of a large fleet most are not."""
    spec = need.spec
    hopes = [
        (room.offer.node == need.avoid, *_nearness(need, room), _left(spec, room, 1), index)
        for index, room in enumerate(rooms)  # by name
        if len(room.free) >= spec.gpus
    ]
    heapify(hopes)
    found: _Spread = []
    while hopes and len(found) < WEIGHED_MAX:
        avoided, far, farther, _, index = heappop(hopes)
        room = rooms[index]
        order = (avoided, far, farther)
        if found and order != (found[0][0].offer.node == need.avoid, *_nearness(need, found[0][0])):
            break
        shares = room.takes(spec)
        if shares:
            found.append((room, shares))
            if room.mix is None or not room.mix.total:
                break
    return [min(found, key=lambda pair: _tightness(need, *pair))] if found else None


def best_of_all(need: Need, rooms: Sequence[Room]) -> _Spread | None:
    offered = [(room, room.takes(need.spec)) for room in rooms]
    offered = [(room, shares) for room, shares in offered if shares]
    others = [(room, shares) for room, shares in offered if room.offer.node != need.avoid]
    for usable in (others, offered):
        spread = _fewest_nodes(need, usable)
        if spread is not None:
            return spread
    return None


def _fewest_nodes(need: Need, offered: _Spread) -> _Spread | None:
    """The fullest offers first; what is then left goes where it fits tightest. No smaller number of
    nodes has as many places."""
    offered = list(offered)
    chosen: _Spread = []
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


def _why_here(need: Need, spread: _Spread) -> str:
    if len(spread) > 1:
        first, *rest = [(len(shares), room.offer.node) for room, shares in spread]
        where = [f"{first[0]} of its {need.spec.ranks} ranks on {first[1]}"]
        where += [f"{count} on {node}" for count, node in rest]
        return f"runs with {listed(where)}, the fewest nodes that have room"
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


def _displace(need: Need, rooms: Sequence[Room]) -> tuple[list[Displace], str]:
    """The attempts that must give way for this job where that costs least, on one node or, for a
    gang, on several; none when nowhere would do.

    Attempts that are stopping already count as given; the room is then kept for this job for the
    rest of the pass.
    """
    sizes: dict[str, int] = {}
    for room in rooms:
        for tenant in room.tenants.values():
            size = max(1, len(tenant.gpu_uuids))
            sizes[tenant.whole] = sizes.get(tenant.whole, 0) + size
    best: tuple[tuple[list[int], int, str], list[Tenant], _Spread] | None = None
    for within in [[room] for room in rooms] + ([list(rooms)] if need.spec.ranks > 1 else []):
        found = _victims(need, within)
        if found is None:
            continue
        victims, spread = found
        # GPUs taken from each class, the highest first: a spare one more weighs less than a
        # standard one.
        cost = [
            sum(sizes[tenant.whole] for tenant in victims if tenant.rank == lower)
            for lower in CLASS_RANK.values()
        ]
        key = (cost, len(victims), within[0].offer.node)
        if best is None or key < best[0]:
            best = (key, victims, spread)
    if best is None:
        return [], ""
    _, victims, spread = best
    leave = [tenant.whole for tenant in victims]
    for room in rooms:
        for tenant in list(room.tenants.values()):
            if tenant.whole in leave:
                room.tenants[tenant.attempt] = replace(tenant, stopping=True)
    sentence = _who_leaves(need.spec, spread)
    why = f"gives way to {need.spec.job_class.value} job {need.job_id}"
    return [Displace(tenant.attempt, need.job_id, why) for tenant in victims], sentence


def _who_leaves(spec: JobSpec, spread: _Spread) -> str:
    """Takes the room, too, that they leave."""
    who: dict[str, None] = {}
    nodes: dict[str, None] = {}
    places = _take(spec, spread)
    for room, _ in spread:
        taken = [u for place in places if place.node == room.offer.node for u in place.gpu_uuids]
        leaving = [tenant for tenant in room.tenants.values() if tenant.stopping]
        # Those whose GPUs it gets; when it is memory or a place that lacks, all of them.
        named = [t for t in leaving if any(uuid in taken for uuid in t.gpu_uuids)] or leaving
        who.update(dict.fromkeys(tenant.whole for tenant in named))
        nodes.update(dict.fromkeys([room.offer.node] if named else []))
    verb = "has" if len(who) == 1 else "have"
    return f"{' and '.join(who)} {verb} to save and leave {' and '.join(nodes)} first"


def _victims(need: Need, rooms: Sequence[Room]) -> tuple[list[Tenant], _Spread] | None:
    """Fewest tenants of lower classes that make room, one for each gang among them, and where the
    job would then run."""
    class_rank = CLASS_RANK[need.spec.job_class]
    wholes: dict[str, Tenant] = {}
    for room in rooms:
        for tenant in room.tenants.values():
            if not tenant.stopping and tenant.rank > class_rank:
                wholes.setdefault(tenant.whole, tenant)
    # The lowest class first, and within it the one that has run the shortest.
    return _leavers(
        need, rooms, sorted(wholes.values(), key=lambda tenant: (-tenant.rank, -tenant.order))
    )


def make_room(
    need: Need, rooms: Sequence[Room], order: Sequence[Tenant]
) -> tuple[list[Tenant], tuple[Place, ...]] | None:
    """The first in this order that have to leave for a job, beside those that are leaving, and
    where it would then run."""
    found = _leavers(need, rooms, list(order))
    return None if found is None else (found[0], _places(found[1]))


def _leavers(
    need: Need, rooms: Sequence[Room], lower: list[Tenant]
) -> tuple[list[Tenant], _Spread] | None:
    tally = _Tally(need.spec, rooms)
    victims: list[Tenant] = []
    while not tally.fits and lower:
        victims.append(lower.pop(0))
        tally.leave(victims[-1].whole)
    if not tally.fits:
        return None
    for tenant in reversed(victims):  # spare the highest class, and who has run the longest
        tally.stay(tenant.whole)
        if tally.fits:
            victims = [other for other in victims if other is not tenant]
        else:
            tally.leave(tenant.whole)
    spread = _spread(need, [tally.without(index) for index in range(len(rooms))])
    assert spread is not None, "as many places as counted"
    known = {room.offer.node: room for room in rooms}
    return victims, [(known[room.offer.node], shares) for room, shares in spread]


class _Tally:
    """How many ranks fit when some have left; a room is counted anew only when it has changed."""

    def __init__(self, spec: JobSpec, rooms: Sequence[Room]) -> None:
        self._spec = spec
        self._rooms = rooms
        self._gone: dict[str, None] = {}
        self._homes: dict[str, list[int]] = {}
        for index, room in enumerate(rooms):
            for tenant in room.tenants.values():
                self._homes.setdefault(tenant.whole, []).append(index)
        self._counts = [self._count(index) for index in range(len(rooms))]
        self._total = sum(self._counts)

    @property
    def fits(self) -> bool:
        return self._total >= self._spec.ranks

    def leave(self, whole: str) -> None:
        self._gone[whole] = None
        self._recount(whole)

    def stay(self, whole: str) -> None:
        del self._gone[whole]
        self._recount(whole)

    def _recount(self, whole: str) -> None:
        for index in dict.fromkeys(self._homes[whole]):
            count = self._count(index)
            self._total += count - self._counts[index]
            self._counts[index] = count

    def _count(self, index: int) -> int:
        return len(self.without(index).takes(self._spec))

    def without(self, index: int) -> Room:
        """A room as it would be then."""
        return self._rooms[index].without(
            lambda tenant: tenant.stopping or tenant.whole in self._gone
        )
