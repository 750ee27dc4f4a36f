"""Which deadlines waiting would miss, and which rented nodes would keep them.

Problem: a queue can be cheap to wait in and still cost somebody his deadline. Whoever rents for
each that comes near pays for GPUs that would have been free in time; whoever looks only when it is
near is told by a node that takes ten minutes to boot that it is over. And a node that is of no use
to the job, since it is too small, too slow, or comes too late, keeps nothing.

How: of each job it is known when it has to run at the latest, on each type of GPU. In order of
class and urgency each
1. takes what is free now, or comes up by then, as far as those before it in the queue leave it;
2. or else of what is expected to come free by then, after those before it;
3. or else it is late. It is worth nodes of a type that holds its ranks and that would be there by
   then, if it has to be ordered within `notice_ms`: before that nothing is lost by looking again.
   Of several types it is that where it counts as demand, or the cheapest for as long as it needs.
   For none it is worth anything that its deadline is missed with it, too.

All times are in milliseconds from now.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.core.bursts import MS_PER_H, Burst


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that waits and has a deadline: `ranks` of so many GPUs each. `latest_ms`: by GPU type
    that suits it, when it has to run there at the latest. `home`: the type that it counts to as
    demand, where own nodes are started for it. `ahead_gpus`: by type, what those want that come
    before it and have no deadline. `ordered`: so many nodes were rented for it already. `first`:
    it goes before those on rented nodes."""

    job_id: int
    gpus: int
    ranks: int
    rank: int
    deadline_ms: int
    latest_ms: Mapping[str, int]
    home: str = ""
    memory_bytes: int = 0
    ahead_gpus: Mapping[str, int] = field(default_factory=dict)
    ordered: int = 0
    first: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """Free GPUs of one node, from `ready_ms` on. `off`: it has to be started first, which happens
    for demand of its own type alone. `memory_bytes` of the host; `None`: unknown. `rented`: it was
    ordered by the hour."""

    gpu_type: str
    gpus: int
    ready_ms: int = 0
    off: bool = False
    memory_bytes: int | None = None
    rented: bool = False


@dataclass(frozen=True, slots=True)
class Rentable:
    """Nodes of a type that can be rented, `burst.nodes_max` of them; each is there in 95 of 100
    cases after `boot_ms`."""

    burst: Burst
    boot_ms: int


@dataclass(frozen=True, slots=True)
class Late:
    """So many nodes of a type keep the deadline of a job that would be missed without them; with
    none, those do that are rented already, if it goes first there."""

    job_id: int
    gpu_type: str
    nodes: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """How many ranks a claim has in which room, how many have none, and what of those before it
    found none either."""

    ranks: tuple[tuple[int, int], ...]
    left: int
    ahead_gpus: int


def late(
    claims: Sequence[Claim],
    rooms: Sequence[Room],
    frees_ms: Callable[[str, int], float],
    rentable: Mapping[str, Rentable],
    notice_ms: int,
) -> tuple[Late, ...]:
    """`frees_ms`: after how long so many GPUs of a type are expected to have come free of those
    that are held now."""
    view = _View(sorted(rooms, key=lambda room: room.ready_ms), frees_ms, rentable, notice_ms)
    found = []
    for claim in sorted(claims, key=_turn):
        one = view.waits(claim)
        found += [] if one is None else [one]
    return tuple(found)


def _turn(claim: Claim) -> tuple[int, bool, int, int]:
    """Nobody who comes later takes what somebody counts on already, and has no time to replace."""
    return claim.rank, not claim.first, max(claim.latest_ms.values(), default=0), claim.job_id


@dataclass(slots=True)
class _View:
    """What those before have left. `granted` by type: of what comes free."""

    rooms: list[Room]
    frees_ms: Callable[[str, int], float]
    rentable: Mapping[str, Rentable]
    notice_ms: int
    granted: dict[str, int] = field(default_factory=dict)
    rented: dict[str, int] = field(default_factory=dict)

    def waits(self, claim: Claim) -> Late | None:
        """It has what comes in time, or else what is worth to be rented for it."""
        for gpu_type in sorted(claim.latest_ms):
            taken = self._look(claim, gpu_type)
            if self._comes_in_time(claim, gpu_type, taken):
                shares = any(self.rooms[index].rented for index, _ in taken.ranks)
                return Late(claim.job_id, gpu_type, 0) if shares and not claim.first else None
        return self._rent_for(claim)

    def _comes_in_time(self, claim: Claim, gpu_type: str, taken: _Taken) -> bool:
        """Whether it would start there in time without anything being rented; then it has that."""
        freed = taken.left * claim.gpus
        granted = self.granted.get(gpu_type, 0) + freed
        if freed:
            needed = granted + taken.ahead_gpus
            if self.frees_ms(gpu_type, needed) > claim.latest_ms[gpu_type]:
                return False
        self.granted[gpu_type] = granted
        self._take(claim, taken)
        return True

    def _rent_for(self, claim: Claim) -> Late | None:
        """The nodes that are worth it; `None`: nothing keeps its deadline, or there is time."""
        choices = []
        for gpu_type in self.rentable:
            taken = self._look(claim, gpu_type)
            nodes = self._nodes(claim, gpu_type, taken)
            if nodes is None:
                continue
            burst = self.rentable[gpu_type].burst
            needs_h = (claim.deadline_ms - claim.latest_ms[gpu_type]) / MS_PER_H
            hours = max(burst.hours_min, needs_h)
            usd = nodes * burst.gpus_per_node * burst.usd_per_gpu_h * hours
            choices.append((gpu_type != claim.home, usd, gpu_type, nodes, taken))
        if not choices:
            return None
        _, _, gpu_type, nodes, taken = min(choices, key=lambda choice: choice[:3])
        self._take(claim, taken)
        offer = self.rentable[gpu_type]
        self.rented[gpu_type] = self.rented.get(gpu_type, 0) + nodes
        spare_gpus = nodes * offer.burst.gpus_per_node - taken.left * claim.gpus
        if spare_gpus >= 1 and nodes:
            self.rooms.append(Room(gpu_type, spare_gpus, offer.boot_ms))
        return Late(claim.job_id, gpu_type, nodes) if nodes else None

    def _nodes(self, claim: Claim, gpu_type: str, taken: _Taken) -> int | None:
        """How many nodes more of the type it takes; `None`: it is not to be had there in time."""
        offer = self.rentable[gpu_type]
        per_node = offer.burst.gpus_per_node // claim.gpus
        latest_ms = claim.latest_ms.get(gpu_type)
        if not per_node or latest_ms is None or latest_ms < offer.boot_ms:
            return None
        if latest_ms - offer.boot_ms > self.notice_ms:
            return None
        # What was rented for it and went to somebody else is not rented again.
        owed = max(0, math.ceil(claim.ranks / per_node) - claim.ordered)
        nodes = min(owed, math.ceil(taken.left / per_node))
        names = offer.burst.nodes_max - self.rented.get(gpu_type, 0)
        return nodes if nodes <= names else None

    def _look(self, claim: Claim, gpu_type: str) -> _Taken:
        left = claim.ranks
        ahead = 0 if claim.first else claim.ahead_gpus.get(gpu_type, 0)
        latest_ms = claim.latest_ms.get(gpu_type, -1)
        ranks = []
        for index, room in enumerate(self.rooms):
            if room.gpu_type != gpu_type or room.ready_ms > latest_ms:
                continue
            if room.off and gpu_type != claim.home:
                continue
            # What is free now and still free after a round is of no use to those before it.
            theirs = min(ahead, room.gpus) if room.ready_ms else 0
            ahead -= theirs
            if room.memory_bytes is not None and room.memory_bytes < claim.memory_bytes:
                continue
            here = min(left, (room.gpus - theirs) // claim.gpus)
            if here:
                ranks.append((index, here))
                left -= here
        return _Taken(tuple(ranks), left, ahead)

    def _take(self, claim: Claim, taken: _Taken) -> None:
        for index, ranks in taken.ranks:
            room = self.rooms[index]
            self.rooms[index] = replace(room, gpus=room.gpus - ranks * claim.gpus)
