"""A node as placement sees it: who is on it, and what is left of it while a pass goes on.

Problem: a pass starts jobs, keeps places for others and asks what would be free if somebody left.
Done on live state, a question would change the answer of the next one. So a node's offer is a
frozen value, and `Room` is what a pass has made of it so far; `without` answers the question in a
room of its own. What a room was asked it remembers until it changes.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from coordinator.core import gpu_types, shares
from coordinator.core.fragmentation import PARTS, Box, Kind, Mix
from coordinator.core.model import GpuFacts, JobSpec
from coordinator.core.shares import Hold
from coordinator.core.validate import suits

# Kinds of requests whose answers a room remembers, some 200 bytes each; many more are seldom asked
# for at a time.
ANSWERS_MAX = 32


@dataclass(frozen=True, slots=True)
class Place:
    """What one rank gets."""

    node: str
    gpu_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tenant:
    """An attempt on a node, `rank` that of its class. `stopping` ones are about to give back what
    they hold. `gang` is what the ranks of one gang have in common; empty: it stands for itself.
    With `share_bytes` it has its GPU together with others, with one at most if `in_pairs`. `lent`:
    it gives way to those of its class that are within their projects' quotas."""

    attempt: str
    rank: int
    order: int
    gpu_uuids: tuple[str, ...]
    memory_bytes: int
    stopping: bool
    gang: str = ""
    share_bytes: int = 0
    lent: bool = False
    in_pairs: bool = False

    @property
    def whole(self) -> str:
        """With whom it leaves."""
        return self.gang or self.attempt


@dataclass(frozen=True, slots=True)
class Offer:
    """A node that takes work. `free` GPUs are held by nobody; `gpus` are all that are present.
    `gangs`: its agent knows ranks; one from before them takes jobs of one rank. `shares`: likewise
    for jobs that share a GPU. `strays` are GPUs that something holds that should not run there."""

    node: str
    gpus: tuple[GpuFacts, ...]
    free: tuple[str, ...]
    memory_bytes: int
    slots: int
    tenants: tuple[Tenant, ...]
    gangs: bool = True
    shares: bool = True
    strays: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stock:
    """The GPUs of an offer, free or not, by type. `kinds` are one of each that differs in name or
    memory, `type_of` is by uuid."""

    counts: Mapping[str, int]
    kinds: Mapping[tuple[str, int], GpuFacts]
    type_of: Mapping[str, str]


class Answer(NamedTuple):
    """The GPUs that each rank would get; of a share also whether that is beside somebody `shunned`,
    and how well it would do (`shares.rank`)."""

    ranks: list[tuple[str, ...]]
    shuns: bool = False
    opens: int = 0
    fit: int = 0


@dataclass(slots=True)
class Room:
    """What is left of an offer. `holds` are of GPUs that are not free: those of tenants, and what
    is kept for somebody in this pass; who is `alone` counts as having his by himself, for whoever
    asks for a share now. `mix`: what is asked for lately. `changed`: it is not any more as it was
    opened, and `version` counts its changes. `increases`, `answers` and `whole_box` are what was
    answered since the last change; `stock` is of its offer, once asked for."""

    offer: Offer
    free: dict[str, GpuFacts]
    memory_bytes: int
    slots: int
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    holds: dict[str, tuple[Hold, ...]] = field(default_factory=dict)
    mix: Mix | None = None
    changed: bool = False
    version: int = field(default=0, compare=False)
    alone: frozenset[str] = frozenset()
    increases: dict[tuple[object, ...], int] = field(default_factory=dict, compare=False)
    answers: dict[tuple[str, frozenset[str], frozenset[str]], Answer] = field(
        default_factory=dict, compare=False
    )
    whole_box: Box | None = field(default=None, compare=False)
    stock: "Stock | None" = field(default=None, compare=False)

    def by_type(self) -> "Stock":
        if self.stock is None:
            self.stock = stock_of(self.offer.gpus)
        return self.stock

    def suiting(self, spec: JobSpec) -> tuple[int, int]:
        """How many of its GPUs would do for a job: of those that are free, and of all."""
        kinds = self.by_type().kinds
        suited = [kind for kind, gpu in kinds.items() if suits(spec, gpu)]
        if not suited or len(suited) == len(kinds):  # as on nearly all nodes
            return (len(self.free), len(self.offer.gpus)) if suited else (0, 0)
        free, there = (
            sum((gpu.name, gpu.memory_bytes) in suited for gpu in gpus)
            for gpus in (self.free.values(), self.offer.gpus)
        )
        return free, there

    def types_of(self, uuids: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(_type_of(gpu) for gpu in self.offer.gpus if gpu.uuid in uuids))

    def takes(
        self, spec: JobSpec, gpu_type: str = "", shunned: Collection[str] = ()
    ) -> list[tuple[str, ...]]:
        """The GPUs that each of the ranks that fit here would get now, smallest memory first: at
        most as many as the job has. With `gpu_type` no others than of that type; with the attempts
        `shunned` it shares one last."""
        if spec.memory_bytes > self.memory_bytes or (spec.ranks > 1 and not self.offer.gangs):
            return []
        if (spec.shared_gpu_memory_bytes or spec.share_automatic) and not self.offer.shares:
            return []
        if spec.shared_gpu_memory_bytes:
            able = self.shareable(spec)
            if gpu_type:
                able = [(gpu, holds) for gpu, holds in able if _type_of(gpu) == gpu_type]
            chosen = shares.choose(spec, able, shunned)
            return [] if chosen is None else [(chosen,)]
        count = spec.ranks
        if spec.memory_bytes:
            count = min(count, self.memory_bytes // spec.memory_bytes)
        if spec.gpus == 0:
            return [()] * max(0, min(count, self.slots))
        fitting = [gpu for gpu in self.free.values() if suits(spec, gpu)]
        if gpu_type:
            fitting = [gpu for gpu in fitting if _type_of(gpu) == gpu_type]
        count = min(count, len(fitting) // spec.gpus)
        if count == 0:
            return []
        fitting.sort(key=lambda gpu: (gpu.memory_bytes, gpu.uuid))
        uuids = [gpu.uuid for gpu in fitting]
        starts = range(0, count * spec.gpus, spec.gpus)
        return [tuple(uuids[start : start + spec.gpus]) for start in starts]

    def ask(self, request: str, spec: JobSpec, gpu_type: str, shunned: frozenset[str]) -> Answer:
        """What `takes` says, remembered by `request_of` and by who counts as alone."""
        found = Answer(self.takes(spec, gpu_type, shunned))
        if found.ranks and spec.shared_gpu_memory_bytes:
            found = Answer(found.ranks, *self._share_rank(spec, found.ranks[0][0], shunned))
        if len(self.answers) >= ANSWERS_MAX:
            self.answers.clear()
        self.answers[request, shunned, self.alone] = found
        return found

    def _share_rank(
        self, spec: JobSpec, uuid: str, shunned: Collection[str]
    ) -> tuple[bool, int, int]:
        gpu = next(gpu for gpu in self.offer.gpus if gpu.uuid == uuid)
        holds = self.holds.get(uuid, ())
        order = shares.rank(gpu, holds, spec.shared_gpu_memory_bytes)
        return shares.shuns(spec, holds, shunned), *order

    def shareable(self, spec: JobSpec) -> list[tuple[GpuFacts, tuple[Hold, ...]]]:
        """The GPUs that would do for a job, free or with those who have them."""
        return [
            (gpu, self._seen(gpu.uuid))
            for gpu in self.offer.gpus
            if (gpu.uuid in self.free or gpu.uuid in self.holds) and suits(spec, gpu)
        ]

    def _seen(self, uuid: str) -> tuple[Hold, ...]:
        """By who asks for a share."""
        holds = self.holds.get(uuid, ())
        if not self.alone:
            return holds
        return tuple(Hold(one.attempt) if one.attempt in self.alone else one for one in holds)

    def has_share(self, spec: JobSpec) -> bool:
        """Whatever else the node lacks."""
        return shares.choose(spec, self.shareable(spec)) is not None

    def increase(self, spec: JobSpec, ranks: Sequence[tuple[str, ...]]) -> int:
        """What it costs those who come next when ranks of a job get these GPUs."""
        if self.mix is None or not self.mix.total:
            return 0
        key = (spec.memory_bytes, spec.shared_gpu_memory_bytes, spec.share_automatic, *ranks)
        found = self.increases.get(key)
        if found is None:
            found = self.mix.increase(self.box(), self.box(spec, ranks))
            self.increases[key] = found
        return found

    def box(self, spec: JobSpec | None = None, ranks: Sequence[tuple[str, ...]] = ()) -> Box:
        """What is left; with a job, what would be if its ranks had these GPUs as well."""
        if self.whole_box is None:
            left = [self._part(gpu, self.holds.get(gpu.uuid, ())) for gpu in self.offer.gpus]
            gpus = tuple(sorted(part for part in left if part[1]))
            self.whole_box = Box((max(0, self.memory_bytes),), gpus)
        if spec is None:
            return self.whole_box
        taken = [uuid for gpu_uuids in ranks for uuid in gpu_uuids]
        parts = list(self.whole_box.gpus)
        for gpu in self.offer.gpus if taken else ():
            if gpu.uuid in taken:
                holds = self.holds.get(gpu.uuid, ())
                before = self._part(gpu, holds)
                if before[1]:
                    parts.remove(before)
                insort(parts, self._part(gpu, (*holds, shares.taken(spec, holds))))
        memory_bytes = max(0, self.memory_bytes - spec.memory_bytes * len(ranks))
        return Box((memory_bytes,), tuple(part for part in parts if part[1]))

    def _part(self, gpu: GpuFacts, holds: Sequence[Hold]) -> tuple[Kind, int]:
        """What is left of a GPU beside these holds."""
        parts = PARTS if gpu.uuid in self.free and not holds else 0
        if holds and self.offer.shares:
            left_bytes = shares.left_bytes(gpu, holds)
            parts = left_bytes * PARTS // max(1, shares.shareable_bytes(gpu))
        return (gpu.memory_bytes, gpu.name), parts

    def describe_rest(self, spec: JobSpec, ranks: Sequence[tuple[str, ...]]) -> str:
        """What is then free of the node, and to whom it is of use: why it is this node. Empty where
        nobody can say, or nothing is left: nothing fits tighter."""
        after = self.box(spec, ranks)
        if self.mix is None or not self.mix.total or not after.left:
            return ""
        percent = 100 * self.mix.fitting(after) // self.mix.total
        gpus = f"{after.left / PARTS:.2f}" if after.left % PARTS else str(after.left // PARTS)
        unit = "GPU" if after.left == PARTS else "GPUs"
        return f"{gpus} {unit} there, of use to {percent}% of recent requests"

    def forget(self) -> None:
        """It is not any more as it was when it answered."""
        self.changed, self.whole_box, self.version = True, None, self.version + 1
        self.increases.clear()
        self.answers.clear()

    def take(self, spec: JobSpec, gpu_uuids: tuple[str, ...]) -> None:
        self.forget()
        for uuid in gpu_uuids:
            self.free.pop(uuid, None)
            holds = self.holds.get(uuid, ())
            self.holds[uuid] = (*holds, shares.taken(spec, holds))
        self.memory_bytes -= spec.memory_bytes
        self.slots -= 1 if spec.gpus == 0 else 0

    def saved(self) -> "Room":
        """As it is now, to `restore`."""
        return replace(self, free=dict(self.free), holds=dict(self.holds), answers={}, increases={})

    def restore(self, saved: "Room") -> None:
        self.forget()
        self.free, self.holds = saved.free, saved.holds
        self.memory_bytes, self.slots, self.tenants = saved.memory_bytes, saved.slots, saved.tenants

    def dismiss(self, attempt: str) -> None:
        """From here on it counts as stopping."""
        self.changed, self.version = True, self.version + 1
        self.tenants = {**self.tenants, attempt: replace(self.tenants[attempt], stopping=True)}

    def without(self, leaves: Callable[[Tenant], bool]) -> "Room":
        """As it would be when these tenants have left; what is kept for others in this pass stays
        kept."""
        gone = [tenant for tenant in self.tenants.values() if leaves(tenant)]
        facts = {gpu.uuid: gpu for gpu in self.offer.gpus} if gone else {}
        free, holds = dict(self.free), dict(self.holds)
        memory_bytes, slots = self.memory_bytes, self.slots
        for tenant in gone:
            for uuid in tenant.gpu_uuids:
                rest = tuple(h for h in holds.get(uuid, ()) if h.attempt != tenant.attempt)
                holds[uuid] = rest
                if not rest:
                    del holds[uuid]
                    if uuid in facts:
                        free[uuid] = facts[uuid]
            memory_bytes += tenant.memory_bytes
            slots += 0 if tenant.gpu_uuids else 1
        return Room(
            self.offer, free, memory_bytes, slots, holds=holds, alone=self.alone, mix=self.mix
        )


def request_of(spec: JobSpec, gpu_type: str = "") -> str:
    """Equal for who would get the same; a string, since that remembers its hash."""
    size = spec.gpu_memory_bytes_min, spec.memory_bytes, spec.shared_gpu_memory_bytes
    return repr((gpu_type, spec.ranks, spec.gpus, spec.gpu_types, size, spec.share_automatic))


def able(
    rooms: Iterable[Room], spec: JobSpec, gpu_type: str = "", shunned: frozenset[str] = frozenset()
) -> Iterator[tuple[Room, Answer]]:
    """Those where some ranks would fit, and what they would get (`Room.takes`)."""
    request = request_of(spec, gpu_type)
    for room in rooms:
        answer = room.answers.get((request, shunned, room.alone))
        if answer is None:
            answer = room.ask(request, spec, gpu_type, shunned)
        if answer.ranks:
            yield room, answer


def of_type(rooms: Sequence[Room], gpu_type: str) -> list[Room]:
    """Those with a GPU, free or not, of that type."""
    return [room for room in rooms if gpu_type in (room.stock or room.by_type()).counts]


def _type_of(gpu: GpuFacts) -> str:
    return gpu_types.key_of(gpu.name, gpu.memory_bytes)


def stock_of(gpus: Sequence[GpuFacts]) -> Stock:
    kinds: dict[tuple[str, int], GpuFacts] = {}
    for gpu in gpus:
        kinds.setdefault((gpu.name, gpu.memory_bytes), gpu)
    type_of = {gpu.uuid: _type_of(gpu) for gpu in gpus}
    return Stock(Counter(type_of.values()), kinds, type_of)


def open_room(offer: Offer, mix: Mix | None = None) -> Room:
    facts = {gpu.uuid: gpu for gpu in offer.gpus}
    used_bytes = sum(tenant.memory_bytes for tenant in offer.tenants)
    used_slots = sum(1 for tenant in offer.tenants if not tenant.gpu_uuids)
    holds: dict[str, tuple[Hold, ...]] = {uuid: (Hold(""),) for uuid in offer.strays}
    for tenant in offer.tenants:
        hold = Hold(tenant.attempt, tenant.share_bytes, tenant.in_pairs)
        for uuid in tenant.gpu_uuids:
            holds[uuid] = (*holds.get(uuid, ()), hold)
    return Room(
        offer,
        {uuid: facts[uuid] for uuid in offer.free if uuid in facts},
        offer.memory_bytes - used_bytes,
        offer.slots - used_slots,
        {tenant.attempt: tenant for tenant in offer.tenants},
        holds,
        mix,
    )


def most_left_bytes(spec: JobSpec, rooms: Sequence[Room]) -> tuple[int, int, str]:
    """Of all GPUs that would do for a share: the largest that is left of one, beside how many jobs,
    and on which node."""
    found = [
        (shares.left_for(spec, gpu, holds), len(holds), room.offer.node)
        for room in rooms
        for gpu, holds in room.shareable(spec)
        if not shares.closed(holds)
    ]
    return max(found, default=(0, 0, ""))
