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
3. A job that fits nowhere may displace jobs of lower classes, and within its project's quota also
   those of its own that run on what is lent (`quotas.py`), on the node where that takes the least
   from the highest class harmed, then from the next (`displacement.py`). A gang may also displace
   over all nodes. What it waits for there is reserved for it within the pass.
4. A job that is reserved for takes no second node; jobs behind it may use what it cannot (backfill
   by fit).
5. Everything else waits, with the largest free block and what it lacks in the sentence.

The order by class first and never by weights follows from the invariant that no guaranteed job
waits for a spare one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from coordinator.core.displacement import (
    NOBODY,
    Givers,
    Known,
    Spread,
    StakeOf,
    Way,
    find_way,
    leave,
    nothing_known,
    way_in_order,
)
from coordinator.core.fragmentation import Mix
from coordinator.core.keeps import Keep, hidden
from coordinator.core.model import CLASS_RANK, JobSpec
from coordinator.core.rooms import Answer, Offer, Place, Room, Tenant, able, of_type, open_room
from coordinator.core.sentences import listed
from coordinator.core.shares import alone
from coordinator.core.shortfalls import kept_for, why_not
from coordinator.core.why_here import faster, where

# More starts in one pass than this would delay the replies of the same batch; the rest is placed by
# the next pass.
STARTS_PER_PASS_MAX = 512
# Of the nodes that fit a job so many are weighed against what others ask for, the tightest first:
# in a large fleet most are alike, and each costs some tens of microseconds.
WEIGHED_MAX = 64
# Who has a checkpoint goes where it lies, on a type that is half as fast as the best: what it needs
# is there already, and the next decision over all jobs may move it, with time to copy.
NEAR_SPEED_RATIO = 0.5


Offered = tuple[Room, Answer]
# Shunned, far from its checkpoint and from most of it, how many it opens; what others lose comes
# between these and its fit, and what is left.
Tightness = tuple[bool, bool, bool, int, int, int]


@dataclass(slots=True)  # not frozen: that would be a fourth of a round over a long queue
class Need:
    """A queued job. `replicas` are the nodes that hold its last checkpoint; `avoid` the node that
    refused it just now, or where it got no further, and `elsewhere`: not there, whatever is free;
    `near` are where its last attempt ran and the standby that got its checkpoints. `lent`: it is
    beyond its project's quota (`quotas.py`). `shunned` are attempts that it shares a GPU with last.
    `types` of GPU are those that are worth most for it first, each with how fast it is there; empty
    where all are alike. With `only` it has been promised that type, and with `on` some of these
    nodes; and while it is `leaving` another place for that, room is kept for it. `lasts_ms` is how
    long it is expected to run, if anybody knows. `refused` are those with whom it does not share a
    GPU. `alike` are nodes whose ranks understand one another, where that was not so: nobody leaves
    for it on others (`mismatches.py`)."""

    job_id: int
    spec: JobSpec
    replicas: tuple[str, ...] = ()
    avoid: str = ""
    elsewhere: bool = False
    near: tuple[str, ...] = ()
    lent: bool = False
    shunned: frozenset[str] = frozenset()
    types: tuple[tuple[str, float], ...] = ()
    only: str = ""
    on: tuple[str, ...] = ()
    leaving: bool = False
    lasts_ms: int | None = None
    refused: tuple[Keep, ...] = ()
    alike: tuple[tuple[str, ...], ...] = ()


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


def place_in(
    needs: Sequence[Need],
    rooms: Sequence[Room],
    keeps: Sequence[Keep] = (),
    stake_of: StakeOf = nothing_known,
) -> Plan:
    """The pass; `rooms` are then what is left for others. `stake_of`: what a tenant would lose by
    giving way."""
    known = {room.offer.node: room for room in rooms}
    starts: list[Start] = []
    displacements: list[Displace] = []
    waits: list[tuple[int, str]] = []
    # Within one pass room only shrinks: what did not fit once need not be tried again for an equal
    # request.
    refused: dict[tuple[object, ...], str] = {}
    ways = Known(rooms)
    placed = 0
    held: list[tuple[int, Spread]] = []
    for need in needs:
        kept = kept_from(need, keeps)
        if need.leaving:
            with hidden(kept, known):
                held.append((need.job_id, keep_room(need, rooms) or []))
            continue
        key = (*request_key(need), *(keep.key for keep in kept))
        sentence = refused.get(key)
        if sentence is None and placed < STARTS_PER_PASS_MAX:
            with hidden(kept, known):
                start, victims, sentence = _place_one(need, rooms, stake_of, ways)
            if start is not None:
                starts.append(start)
                placed += len(start.places)
                continue
            displacements += victims
            if not victims and not sentence:
                sentence = _refusal(need, rooms, known, kept) + kept_for(need.spec, held)
                refused[key] = sentence
        waits.append((need.job_id, sentence or "is next in line; the present round is full"))
    return Plan(tuple(starts), tuple(displacements), tuple(waits))


def _place_one(
    need: Need, rooms: Sequence[Room], stake_of: StakeOf, ways: Known
) -> tuple[Start | None, list[Displace], str]:
    """Its start, or who has to leave for it and a sentence about that; who can have nothing of the
    type that it was promised is as any other."""
    if need.alike:
        return _place_alike(need, rooms, stake_of, ways)
    start = _start(need, rooms)
    if start is not None:
        return start, [], ""
    victims, sentence = _displace(need, rooms, stake_of, ways)
    if need.only and not sentence:
        return _place_one(replace(need, only="", on=()), rooms, stake_of, ways)
    return None, victims, sentence


def _place_alike(
    need: Need, rooms: Sequence[Room], stake_of: StakeOf, ways: Known
) -> tuple[Start | None, list[Displace], str]:
    """On nodes that are alike, else where nobody has to leave for it."""
    tries = [replace(need, alike=(), only="", on=nodes) for nodes in need.alike]
    for one in tries:
        start = _start(one, rooms)
        if start is not None:
            return start, [], ""
    for one in tries:
        victims, sentence = _displace(one, rooms, stake_of, ways)
        if sentence:
            return None, victims, sentence
    return _start(replace(need, alike=(), only="", on=()), rooms), [], ""


def kept_from(need: Need, keeps: Sequence[Keep]) -> list[Keep]:
    """What it does not see."""
    if not keeps:
        return list(need.refused)
    rank, own = CLASS_RANK[need.spec.job_class], (need.job_id, need.lasts_ms)
    return [*need.refused, *(k for k in keeps if k.hides_from(rank, *own, lent=need.lent))]


def _refusal(
    need: Need, rooms: Sequence[Room], known: Mapping[str, Room], kept: Sequence[Keep]
) -> str:
    with hidden(kept, known):
        sentence = why_not(need.spec, _others(need, rooms) if need.elsewhere else rooms)
    if not kept:
        return sentence
    if find(need, rooms) is not None:
        return sentence + "".join(f"; {keep.note}" for keep in kept if keep.note)
    reserved = [keep for keep in kept if keep.places]
    nodes = [node for keep in reserved for node, _ in keep.places]
    within = rooms if need.spec.ranks > 1 else _at(nodes, rooms)
    way = find_way(need.spec, "", within, _givers(need), lambda some: _spread(need, some))
    return sentence + "".join(f"; {keep.note_of_way}" for keep in reserved if way is not None)


def request_key(need: Need) -> tuple[object, ...]:
    """Equal for jobs that fit where the other does."""
    spec = need.spec
    return (
        (CLASS_RANK[spec.job_class], need.lent),
        spec.ranks,
        spec.gpus,
        spec.gpu_types,
        spec.gpu_memory_bytes_min,
        (spec.shared_gpu_memory_bytes, spec.share_automatic),
        spec.memory_bytes,
        (need.avoid, need.elsewhere),
        bool(need.alike),
    )


def _start(need: Need, rooms: Sequence[Room]) -> Start | None:
    spread = _spread(need, rooms)
    if spread is None:
        return None
    why = where(need.spec, need.replicas, need.near, spread) + faster(need.types, spread)
    return Start(need.job_id, take(need.spec, spread), why)


def find(need: Need, rooms: Sequence[Room]) -> tuple[Place, ...] | None:
    """Where the job would start; takes nothing."""
    spread = _spread(need, rooms)
    return None if spread is None else _places(spread)


def _places(spread: Spread) -> tuple[Place, ...]:
    return tuple(Place(room.offer.node, uuids) for room, shares in spread for uuids in shares)


def take(spec: JobSpec, spread: Spread) -> tuple[Place, ...]:
    for room, shares in spread:
        for gpu_uuids in shares:
            room.take(spec, gpu_uuids)
    return _places(spread)


def _spread(need: Need, rooms: Sequence[Room]) -> Spread | None:
    """Where all ranks fit: where its last checkpoint lies or most of it, if it is not much slower
    there; else on GPUs of the first type that has room for them, or of several; without the node to
    avoid if that will do. Who shares a GPU only where that pays has one of his own before that, and
    of a type that he was promised nothing else. `None` where they do not."""
    own = _own(need)
    if own is not need:
        spread = _spread(own, rooms)
        if spread is not None or need.only:
            return spread
    if need.types and not need.only:
        others = _others(need, rooms)
        holds, near = _at(need.replicas, others), _at(need.near, others)
        fastest = max(speed for _, speed in need.types)
        quick = [name for name, speed in need.types if speed >= NEAR_SPEED_RATIO * fastest]
        tries = [(some, name) for some in (holds, near) if some for name in quick]
        for some, gpu_type in (*tries, *((others, name) for name, _ in need.types)):
            spread = _search(replace(need, only=gpu_type), some)
            if spread is not None:
                return spread
    return _search(need, rooms)


def _at(nodes: Sequence[str], rooms: Sequence[Room]) -> list[Room]:
    return [room for room in rooms if room.offer.node in nodes] if nodes else []


def _others(need: Need, rooms: Sequence[Room]) -> Sequence[Room]:
    return [r for r in rooms if r.offer.node != need.avoid] if need.avoid else rooms


def _own(need: Need) -> Need:
    automatic = need.spec.share_automatic and need.spec.shared_gpu_memory_bytes
    return replace(need, spec=alone(need.spec)) if automatic else need


def _search(need: Need, rooms: Sequence[Room]) -> Spread | None:
    rooms = _promised(need, rooms)
    if need.spec.ranks == 1 and not need.spec.shared_gpu_memory_bytes:
        return first_that_takes(need, rooms)
    return best_of_all(need, rooms)


def _promised(need: Need, rooms: Sequence[Room]) -> Sequence[Room]:
    rooms = _others(need, rooms) if need.elsewhere else rooms
    rooms = _at(need.on, rooms) if need.on else rooms
    return of_type(rooms, need.only) if need.only else rooms


def first_that_takes(need: Need, rooms: Sequence[Room]) -> Spread | None:
    """Of a job of one rank how near and how tight it would be is known before it is known whether
    it fits: so rooms are asked in that order, and of a large fleet most are not."""
    spec, prefers = need.spec, bool(need.avoid or need.replicas or need.near)
    hopes = [room for room in rooms if len(room.free) >= spec.gpus]  # by name
    hopes.sort(key=lambda room: len(room.free) if spec.gpus else -room.slots)
    if prefers:
        hopes.sort(key=lambda room: _far(need, room))
    found: list[Offered] = []
    for room, answer in able(hopes, spec, need.only):
        if prefers and found and _far(need, room) != _far(need, found[0][0]):
            break
        found.append((room, answer))
        if room.mix is None or not room.mix.total or len(found) >= WEIGHED_MAX:
            break
    return [_tightest(need, found, 1)] if found else None


def best_of_all(need: Need, rooms: Sequence[Room]) -> Spread | None:
    offered = list(able(rooms, need.spec, need.only, need.shunned))
    others = [one for one in offered if one[0].offer.node != need.avoid] if need.avoid else offered
    for usable in (others, offered):
        spread = _fewest_nodes(need, usable)
        if spread is not None:
            return spread
    return None


def _fewest_nodes(need: Need, offered: Sequence[Offered]) -> Spread | None:
    """The fullest offers first; what is then left goes where it fits tightest. No smaller number of
    nodes has as many places."""
    if need.spec.ranks == 1:
        return [_tightest(need, offered, 1)] if offered else None
    by_count: dict[int, list[Offered]] = {}
    for one in offered:
        by_count.setdefault(len(one[1].ranks), []).append(one)
    for count, some in by_count.items():
        most = WEIGHED_MAX + need.spec.ranks
        by_count[count] = _by_name(one for _, one in _foremost(need, some, count, most))
    chosen: Spread = []
    left = need.spec.ranks
    while left:
        enough = [each for count, some in by_count.items() if count >= left for each in some]
        if enough:
            chosen.append(_tightest(need, _by_name(enough), left))
            break
        if not by_count:
            return None
        most = max(by_count)
        chosen.append(_tightest(need, by_count[most], most))
        left -= most
        rest = [one for one in by_count.pop(most) if one[0] is not chosen[-1][0]]
        by_count.update({most: rest} if rest else {})
    return sorted(chosen, key=lambda pair: pair[0].offer.node)


def _by_name(offered: Iterable[Offered]) -> list[Offered]:
    return sorted(offered, key=lambda pair: pair[0].offer.node)


def _tightest(
    need: Need, offered: Sequence[Offered], ranks: int
) -> tuple[Room, list[tuple[str, ...]]]:
    def tightness(pair: tuple[Tightness, Offered]) -> tuple[object, ...]:
        tight, (room, answer) = pair
        increase = room.increase(need.spec, answer.ranks[:ranks])
        return tight[:4], increase, tight[4:], room.offer.node

    _, (room, answer) = min(_foremost(need, offered, ranks, WEIGHED_MAX), key=tightness)
    return room, answer.ranks[:ranks]


def _foremost(
    need: Need, offered: Sequence[Offered], ranks: int, most: int
) -> Iterator[tuple[Tightness, Offered]]:
    """Those that would be the tightest if nobody asked what others lose by it, of equal ones the
    first by name, as they are `offered`. Who is near and has not got the last checkpoint has most
    of it from those before."""
    gpus, replicas, near = ranks * need.spec.gpus, need.replicas, need.near
    alike: dict[Tightness, list[Offered]] = {}
    for one in offered:
        room, (_, shuns, opens, fit) = one
        node, left = room.offer.node, len(room.free) - gpus if gpus else -room.slots
        tight = (shuns, node not in replicas, node not in near, opens, fit, left)
        alike.setdefault(tight, []).append(one)
    return islice(((tight, one) for tight in sorted(alike) for one in alike[tight]), most)


def _far(need: Need, room: Room) -> tuple[bool, bool, bool]:
    node = room.offer.node
    return node == need.avoid, node not in need.replicas, node not in need.near


def _displace(
    need: Need, rooms: Sequence[Room], stake_of: StakeOf, ways: Known
) -> tuple[list[Displace], str]:
    """The attempts that must give way for this job where that costs least, and whom it waits for;
    none when nowhere would do. The room is then kept for this job for the rest of the pass."""
    way = make_way(need, rooms, _givers(need, stake_of, ways))
    if way is None:
        return [], ""
    why = f"gives way to {need.spec.job_class.value} job {need.job_id}"
    sentence = _who_leaves(need.spec, way.spread)
    return [Displace(tenant.attempt, need.job_id, why) for tenant in way.victims], sentence


def _givers(need: Need, stake_of: StakeOf = nothing_known, ways: Known | None = None) -> Givers:
    """Whoever is of a lower class, or within it beyond a quota."""
    own = CLASS_RANK[need.spec.job_class], need.lent
    return Givers(
        lambda tenant: (tenant.rank, tenant.lent) > own,
        stake_of,
        request=request_key(need),
        known=ways,
    )


def make_way(need: Need, rooms: Sequence[Room], givers: Givers) -> Way | None:
    """Who has to leave so that the job fits, none where those do that leave already; if that is
    accepted they count as leaving from then on."""
    if need.only:
        need = _own(need)
    able = _promised(need, rooms)
    way = find_way(need.spec, need.only, able, givers, lambda some: _spread(need, some))
    if way is None or (way.victims and not givers.accept(way.victims)):
        return None
    leave(rooms, [tenant.whole for tenant in way.victims], givers.known)
    return way


def keep_room(need: Need, rooms: Sequence[Room], givers: Givers = NOBODY) -> Spread | None:
    """Keep for it what it would get now, or when those have left that are leaving or may."""
    spread = keep_free(need, rooms)
    way = make_way(need, rooms, givers) if spread is None else None
    if way is None:
        return spread
    take(need.spec, way.spread)
    return way.spread


def keep_free(need: Need, rooms: Sequence[Room]) -> Spread | None:
    """Keep for it what it would get now."""
    spread = _spread(need, rooms)
    if spread is not None:
        take(need.spec, spread)
    return spread


def _who_leaves(spec: JobSpec, spread: Spread) -> str:
    """Takes the room, too, that they leave."""
    jobs: dict[str, None] = {}
    nodes: dict[str, None] = {}
    places = take(spec, spread)
    for room, _ in spread:
        taken = [u for place in places if place.node == room.offer.node for u in place.gpu_uuids]
        leaving = [tenant for tenant in room.tenants.values() if tenant.stopping]
        # Those whose GPUs it gets; when it is memory or a place that lacks, all of them.
        named = [t for t in leaving if any(uuid in taken for uuid in t.gpu_uuids)] or leaving
        jobs.update(dict.fromkeys(tenant.whole.partition(".")[0] for tenant in named))
        nodes.update(dict.fromkeys([room.offer.node] if named else []))
    who = f"job {next(iter(jobs))} has" if len(jobs) == 1 else f"jobs {listed([*jobs])} have"
    return f"{who} to save and leave {listed([*nodes])} first"


def make_room(
    need: Need, rooms: Sequence[Room], order: Sequence[Tenant]
) -> tuple[tuple[Tenant, ...], tuple[Place, ...]] | None:
    """The first in this order that have to leave for a job, beside those that are leaving, and
    where it would then run."""
    way = way_in_order(need.spec, need.only, rooms, order, lambda some: _spread(need, some))
    return None if way is None else (way.victims, _places(way.spread))
