"""What part of a node's GPUs those who come next could not use, and which choice adds least to it.

Problem: GPUs stay idle while jobs wait, since what is free lies in pieces that nobody asks for: the
fifth of a GPU beside a sharer, single GPUs where gangs of four wait, eight GPUs of a node whose
host memory is gone. The tightest fit does not see that; it counts GPUs and not who could use them.

1. Requests are known by how often they came lately, the **mix**. A node's fragmentation is, on
   average over the mix, the GPU capacity that is left of it and that a request cannot use: all of
   it where the request does not fit, else those of its GPUs that are too full or of another kind
   (Weng et al., "Beware of Fragmentation", USENIX ATC 2023).
2. That looks one request ahead: a node is as good as empty until the very moment when its host
   resources do not suffice for one more. So the capacity counts, too, for which nothing of the host
   is left at what the mix takes on average (`STARVED_TENTHS` of it). On public traces that gains as
   much again as the first point does over the best fit (`bench/fragmentation.py`).
3. A request goes where the sum grows least. Who asks breaks ties; the tightest fit is a good way.

All of it is in whole numbers, thousandths of a GPU times requests, so equal nodes are equal and a
replay decides the same. What is known of a state of a node is remembered: nodes are many, states
are few, and a start changes one.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

PARTS = 1_000  # of a whole GPU
# How much of the capacity counts that the host cannot feed. From 1 to 10 tenths the allocation of
# the trace that it was chosen on differs by less than the seeds do.
STARVED_TENTHS = 3
# States whose value is remembered; some 300 bytes each. A large fleet has some thousands at a time.
STATES_MAX = 50_000

Kind = tuple[int, str]  # of a GPU: its memory in bytes and its name, so that small ones come first


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as far as it matters here: `gpus` on one node, and of each of its host resources
    some. `wants` says what of which GPU; only the `parts` that the mix is made with reads it."""

    gpus: int
    host: tuple[int, ...]
    wants: Hashable = ()


class Box(NamedTuple):
    """What is left of a node: of each host resource, and of each GPU as thousandths, in order.
    GPUs of which nothing is left may be missing."""

    host: tuple[int, ...]
    gpus: tuple[tuple[Kind, int], ...]

    @property
    def left(self) -> int:
        return sum(parts for _, parts in self.gpus)


class Mix:
    """How often which request came. `parts` says how much of a GPU of some kind a request takes:
    `PARTS` of each if it wants more than one, 0 where that kind does not do."""

    def __init__(self, counts: Mapping[Ask, int], parts: Callable[[Ask, Kind], int]) -> None:
        self._asks = [(ask, count) for ask, count in counts.items() if ask.gpus and count]
        self._parts = parts
        self.total = sum(count for _, count in self._asks)
        hosts = [ask.host for ask, _ in self._asks]
        # The amounts that anybody asks for; what lies between two of them is the same to all.
        self._steps = [sorted(dict.fromkeys(amounts)) for amounts in zip(*hosts, strict=True)]
        self._demands: dict[Kind, tuple[int, ...]] = {}
        self._ladders: dict[tuple[Kind, tuple[int, ...]], tuple[list[int], list[int]]] = {}
        self._wholes: dict[tuple[tuple[Kind, ...], tuple[int, ...]], int] = {}
        self._costs: dict[Box, int] = {}
        self._fitting: dict[Box, int] = {}

    def increase(self, before: Box, after: Box) -> int:
        """What a change of a node costs those who come next; the least is the best."""
        return self.cost(after) - self.cost(before)

    def cost(self, box: Box) -> int:
        """Expected fragmentation and what the host cannot feed, in tenths of `lost`."""
        found = self._costs.get(box)
        if found is None:
            if len(self._costs) >= STATES_MAX:
                self._costs.clear()
            found = 10 * self.lost(box) + STARVED_TENTHS * self.total * self.starved(box)
            self._costs[box] = found
        return found

    def lost(self, box: Box) -> int:
        """The expected fragmentation, times `total`."""
        ranks = self._ranks(box.host)
        usable = 0
        whole: list[Kind] = []
        for kind, parts in box.gpus:
            needs, sums = self._ladder(kind, ranks, box.host)
            usable += parts * sums[bisect_right(needs, parts)]
            if parts == PARTS:
                whole.append(kind)
        if len(whole) > 1:
            usable += self._usable_together(tuple(whole), ranks, box.host)
        return self.total * box.left - usable

    def starved(self, box: Box) -> int:
        """The capacity for which no host resources are left, at what requests take on average."""
        left = box.left
        needs = [0] * (len(box.host) + 1)
        for kind in dict.fromkeys(kind for kind, _ in box.gpus):
            needs = [have + more for have, more in zip(needs, self._demand(kind), strict=False)]
        parts, hosts = needs[0], needs[1:]
        fed = [have * parts // need for have, need in zip(box.host, hosts, strict=False) if need]
        return max(0, left - min(fed, default=left))

    def fitting(self, box: Box) -> int:
        """How many of the requests of the mix fit there; of `total`."""
        found = self._fitting.get(box)
        if found is None:
            if len(self._fitting) >= STATES_MAX:
                self._fitting.clear()
            found = sum(count for ask, count in self._asks if self._fits(box, ask))
            self._fitting[box] = found
        return found

    def _fits(self, box: Box, ask: Ask) -> bool:
        able = sum(1 for kind, left in box.gpus if 0 < self._parts(ask, kind) <= left)
        return able >= ask.gpus and _feeds(box.host, ask)

    def _ranks(self, host: tuple[int, ...]) -> tuple[int, ...]:
        pairs = zip(self._steps, host, strict=False)
        return tuple(bisect_right(steps, have) for steps, have in pairs)

    def _ladder(
        self, kind: Kind, ranks: tuple[int, ...], host: tuple[int, ...]
    ) -> tuple[list[int], list[int]]:
        """How much of one GPU requests need, in order, and how many need no more than each."""
        found = self._ladders.get((kind, ranks))
        if found is None:
            counts: dict[int, int] = {}
            for ask, count in self._asks:
                parts = self._parts(ask, kind) if ask.gpus == 1 and _feeds(host, ask) else 0
                if parts:
                    counts[parts] = counts.get(parts, 0) + count
            sums = [0]
            for parts in sorted(counts):
                sums.append(sums[-1] + counts[parts])
            found = self._ladders[kind, ranks] = (sorted(counts), sums)
        return found

    def _usable_together(
        self, whole: tuple[Kind, ...], ranks: tuple[int, ...], host: tuple[int, ...]
    ) -> int:
        """By those who want several whole GPUs."""
        found = self._wholes.get((whole, ranks))
        if found is None:
            found = 0
            for ask, count in self._asks:
                if ask.gpus > 1 and _feeds(host, ask):
                    able = sum(1 for kind in whole if self._parts(ask, kind) == PARTS)
                    found += count * PARTS * able if able >= ask.gpus else 0
            self._wholes[whole, ranks] = found
        return found

    def _demand(self, kind: Kind) -> tuple[int, ...]:
        """Of all requests that this kind of GPU would do for: parts of GPUs, then host
        resources."""
        found = self._demands.get(kind)
        if found is None:
            sums = [0] * (len(self._steps) + 1)
            for ask, count in self._asks:
                parts = self._parts(ask, kind) * ask.gpus
                if parts:
                    each = zip(sums, (parts, *ask.host), strict=True)
                    sums = [have + count * more for have, more in each]
            found = self._demands[kind] = tuple(sums)
        return found


def afters_of(box: Box, ask: Ask, parts: Callable[[Ask, Kind], int]) -> Iterator[Box]:
    """What is left of a node after a request, for each GPU that a share could be of; none where it
    does not fit. Who wants whole GPUs gets the smallest."""
    if not _feeds(box.host, ask):
        return
    host = tuple(have - need for have, need in zip(box.host, ask.host, strict=True))
    if ask.gpus == 0:
        yield Box(host, box.gpus)
        return
    able = [
        (index, kind, left - need)
        for index, (kind, left) in enumerate(box.gpus)
        for need in [parts(ask, kind)]
        if 0 < need <= left
    ]
    if len(able) < ask.gpus:
        return
    if ask.gpus > 1:
        yield Box(host, _changed(box.gpus, able[: ask.gpus]))
        return
    seen: dict[tuple[Kind, int], None] = {}
    for change in able:
        if change[1:] not in seen:
            seen[change[1:]] = None
            yield Box(host, _changed(box.gpus, [change]))


def _changed(
    gpus: tuple[tuple[Kind, int], ...], changes: list[tuple[int, Kind, int]]
) -> tuple[tuple[Kind, int], ...]:
    made = dict(enumerate(gpus))
    made.update((index, (kind, left)) for index, kind, left in changes)
    return tuple(sorted(pair for pair in made.values() if pair[1]))


def _feeds(host: tuple[int, ...], ask: Ask) -> bool:
    return all(need <= have for need, have in zip(ask.host, host, strict=True))
