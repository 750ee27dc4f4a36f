"""Who gives way so that a job fits: where that costs least, and nobody who need not.

Problem: room for a job can be made in many ways, and each costs others what they have not saved,
the time until they run again, and a place. So of those who may leave the lowest class goes first,
in it who runs on what is lent to his project, and of these whoever has least to lose: GPUs times
the seconds that a stop costs each of them (his stake, `costs.py`). Of all nodes, and for a gang of
all of them together, it is done where the stakes are least of the highest class harmed, then of the
next; where nothing is known of stakes, where the GPUs are fewest.

Who displaces one rank of a gang displaces, and counts, all of it.

Many who ask for the same are each told of another node, and of all others the answer is the same
again: what was found of a room is `Known` as long as nothing has changed there.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from coordinator.core.model import CLASS_RANK, JobSpec
from coordinator.core.rooms import Room, Tenant, able

# Rooms and the GPUs that ranks of one job get there; ranks count through them in this order.
Spread = list[tuple[Room, list[tuple[str, ...]]]]
MayLeave = Callable[[Tenant], bool]
StakeOf = Callable[[Tenant], float]
# Whom it harms, the least first: a class, and in it those within their projects' quotas.
TIERS = [(rank, lent) for rank in CLASS_RANK.values() for lent in (False, True)]
SpreadOf = Callable[[Sequence[Room]], Spread | None]


@dataclass(frozen=True, slots=True)
class Way:
    """Who leaves, one tenant for each gang among them, and where the job then runs."""

    victims: tuple[Tenant, ...]
    spread: Spread


def nothing_known(_: Tenant) -> float:
    return 0.0


# Which stakes it harms of which tier, likewise how many GPUs, how many leave, and where.
Harm = tuple[list[float], list[int], int, str]
Victims = tuple[Harm, list[Tenant], list[Room]]
Counts = tuple[Hashable, dict[frozenset[str], int]]


@dataclass(slots=True)
class Known:
    """What one pass over `rooms` has found out. `counts` and `least` are by request and node, with
    what its room was then (`Room.version`, `Room.alone`): how many ranks fit, by who has left, and
    the least harm on it. `orders` is by request who may leave, of all rooms: whoever has less to
    lose first."""

    rooms: Sequence[Room]
    counts: dict[Hashable, dict[str, Counts]] = field(default_factory=dict)
    least: dict[Hashable, dict[str, tuple[Hashable, Victims | None]]] = field(default_factory=dict)
    orders: dict[Hashable, list[Tenant]] = field(default_factory=dict)
    _homes: dict[str, list[Room]] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)

    def homes(self, whole: str) -> list[Room]:
        """Where it is."""
        if not self._homes:
            for room in self.rooms:
                for tenant in room.tenants.values():
                    size = max(1, len(tenant.gpu_uuids))
                    self._sizes[tenant.whole] = self._sizes.get(tenant.whole, 0) + size
                    self._homes.setdefault(tenant.whole, []).append(room)
        return self._homes.get(whole, [])

    def size(self, whole: str) -> int:
        """How many GPUs leave with it."""
        self.homes(whole)
        return self._sizes[whole]


@dataclass(frozen=True, slots=True)
class Givers:
    """Who may leave, what they have to lose, and whether it is accepted that these do. Whoever asks
    with an equal `request`, and has the same to give, is told what is `known`."""

    may_leave: MayLeave
    stake_of: StakeOf = nothing_known
    accept: Callable[[Sequence[Tenant]], bool] = lambda _: True
    request: Hashable = None
    known: Known | None = None


NOBODY = Givers(lambda _: False)


def find_way(
    spec: JobSpec, gpu_type: str, rooms: Sequence[Room], givers: Givers, spread_of: SpreadOf
) -> Way | None:
    """The cheapest way to make room, on one node or, for a gang, on several; none where nobody's
    leaving would do. Attempts that are stopping already count as given. With `gpu_type` only GPUs
    of that type count."""
    known = givers.known or Known(rooms)
    request = givers.request, gpu_type
    known_least = known.least.setdefault(request, {})
    found: list[Victims] = []
    for room in rooms:
        node, now = room.offer.node, (room.version, room.alone)
        before = known_least.get(node)
        if before is None or before[0] != now:
            least = None  # where nobody leaves it does not fit: that was asked before
            if any(one.stopping or givers.may_leave(one) for one in room.tenants.values()):
                least = _least(_Tally(spec, gpu_type, [room], request, known), [room], givers)
            before = known_least[node] = now, least
        if before[1] is not None:
            found.append(before[1])
    if spec.ranks > 1:
        least = _least(_Tally(spec, gpu_type, rooms, request, known), rooms, givers)
        found += [least] if least is not None else []
    if not found:
        return None
    _, victims, within = min(found, key=lambda one: one[0])
    return _way(victims, within, spread_of)


def _least(tally: "_Tally", rooms: Sequence[Room], givers: Givers) -> Victims | None:
    """Whose leaving does the least harm."""
    found: list[Victims] = []
    for victims in _victims(tally, rooms, givers):
        harmed = [[t for t in victims if (t.rank, t.lent) == tier] for tier in TIERS]
        # The highest class first: a spare one more weighs less than a standard one.
        stakes = [sum(givers.stake_of(tenant) for tenant in some) for some in harmed]
        gpus = [sum(tally.known.size(tenant.whole) for tenant in some) for some in harmed]
        harm = (stakes, gpus, len(victims), rooms[0].offer.node)
        # Of many rooms few have places then, and those are asked once more for the best of them.
        found.append((harm, victims, tally.places if len(rooms) > 1 else list(rooms)))
    return min(found, key=lambda one: one[0], default=None)


def way_in_order(
    spec: JobSpec,
    gpu_type: str,
    rooms: Sequence[Room],
    order: Sequence[Tenant],
    spread_of: SpreadOf,
) -> Way | None:
    """The first in this order that have to leave, beside those that leave already. With `gpu_type`
    only GPUs of that type count."""
    victims = _first(_Tally(spec, gpu_type, rooms, None, Known(rooms)), order)
    return None if victims is None else _way(victims, rooms, spread_of)


def leave(rooms: Sequence[Room], wholes: Sequence[str], known: Known | None = None) -> None:
    """From now on these count as leaving."""
    if known is not None:
        rooms = [room for whole in wholes for room in known.homes(whole)]
        for request, order in known.orders.items():
            known.orders[request] = [tenant for tenant in order if tenant.whole not in wholes]
    for room in rooms:
        for tenant in list(room.tenants.values()):
            if tenant.whole in wholes:
                room.dismiss(tenant.attempt)


def _way(victims: Sequence[Tenant], rooms: Sequence[Room], spread_of: SpreadOf) -> Way:
    gone = [tenant.whole for tenant in victims]
    left = [room.without(lambda t: t.stopping or t.whole in gone) for room in rooms]
    spread = spread_of(left)
    assert spread is not None, "as many places as counted"
    known = {room.offer.node: room for room in rooms}
    return Way(tuple(victims), [(known[room.offer.node], shares) for room, shares in spread])


def _victims(tally: "_Tally", rooms: Sequence[Room], givers: Givers) -> Iterator[list[Tenant]]:
    """Sets of tenants that make room, one for each gang among them, without any that is not needed:
    the cheapest together, and on one node also the cheapest that is enough alone."""
    ordered = _ordered(tally, rooms, givers)
    victims = _first(tally, ordered)
    if victims is None:
        return
    yield victims
    if len(victims) < 2 or len(rooms) > 1:
        return
    for tenant in victims:
        tally.stay(tenant.whole)
    for tenant in ordered:
        tally.leave(tenant.whole)
        enough = tally.fits
        tally.stay(tenant.whole)
        if enough:
            yield [tenant]
            return


def _ordered(tally: "_Tally", rooms: Sequence[Room], givers: Givers) -> Sequence[Tenant]:
    """Who may leave, one for each gang, and who has the least to lose first."""
    all_of_them = len(rooms) == len(tally.known.rooms) > 1
    found = tally.known.orders.get(tally.request) if all_of_them else None
    if found is None:
        wholes: dict[str, Tenant] = {}
        for room in rooms:
            for tenant in room.tenants.values():
                if not tenant.stopping and givers.may_leave(tenant):
                    wholes.setdefault(tenant.whole, tenant)
        # Of those who have the same to lose the one that has run the shortest.
        found = sorted(
            wholes.values(),
            key=lambda one: (-one.rank, not one.lent, givers.stake_of(one), -one.order),
        )
        if all_of_them:
            tally.known.orders[tally.request] = found
    return found


def _first(tally: "_Tally", ordered: Sequence[Tenant]) -> list[Tenant] | None:
    """The first that make room, without any that is not needed; they count as leaving then."""
    victims: list[Tenant] = []
    for tenant in ordered:
        if tally.fits:
            break
        victims.append(tenant)
        tally.leave(tenant.whole)
    if not tally.fits:
        return None
    for tenant in reversed(victims):  # spare the highest class, and who has most to lose
        tally.stay(tenant.whole)
        if tally.fits:
            victims = [other for other in victims if other is not tenant]
        else:
            tally.leave(tenant.whole)
    return victims


class _Tally:
    """How many ranks fit when some have left; a room is counted anew only when it has changed."""

    def __init__(
        self,
        spec: JobSpec,
        gpu_type: str,
        rooms: Sequence[Room],
        request: Hashable,
        known: Known,
    ) -> None:
        self.known = known
        self.request = request
        self._known_counts = known.counts.setdefault(request, {})
        self._spec = spec
        self._gpu_type = gpu_type
        self._rooms = rooms
        self._gone: dict[str, None] = {}
        self._places = {room.offer.node: index for index, room in enumerate(rooms)}
        now = {room.offer.node: len(answer.ranks) for room, answer in able(rooms, spec, gpu_type)}
        self._counts = [
            self._count(index)
            if any(tenant.stopping for tenant in room.tenants.values())
            else now.get(room.offer.node, 0)
            for index, room in enumerate(rooms)
        ]
        self._total = sum(self._counts)

    @property
    def places(self) -> list[Room]:
        """The rooms where some would fit."""
        return [room for room, count in zip(self._rooms, self._counts, strict=True) if count]

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
        homes = [self._places.get(room.offer.node) for room in self.known.homes(whole)]
        for index in dict.fromkeys(homes):
            if index is None:
                continue  # a room that is not asked
            count = self._count(index)
            self._total += count - self._counts[index]
            self._counts[index] = count

    def _count(self, index: int) -> int:
        """Of a room as it would be then."""
        room = self._rooms[index]
        there, now = room.tenants.values(), (room.version, room.alone)
        gone = frozenset(t.attempt for t in there if t.stopping or t.whole in self._gone)
        counts = self._known_counts.get(room.offer.node)
        if counts is None or counts[0] != now:
            counts = self._known_counts[room.offer.node] = now, {}
        if gone not in counts[1]:
            left = room.without(lambda tenant: tenant.attempt in gone)
            counts[1][gone] = len(left.takes(self._spec, self._gpu_type))
        return counts[1][gone]
