"""What starts between two decisions over all jobs, at a cost that does not grow with the fleet.

Problem: a decision over thousands of jobs takes a tenth of a second and more, and on a large fleet
something happens many times a minute. So between two of them little is decided, and that at once: a
job that has just come is priced by the last decision's prices (`at_prices`), and GPUs that have
come free go to whoever waits and is worth most for a GPU, by what it was worth then. Nobody is
stopped or moved. Where an earlier class could have GPUs that a later one holds that is not enough,
and the answer is that all must be decided.

Those who wait stand in heaps by class, type and count of GPUs, so that whoever fits next is at the
head of one of few heaps.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.core.allocation import Aims, Allocation, Contender, Option, worths
from coordinator.core.horizon import Horizon

Tier = tuple[int, bool]  # class, and whether what it runs on is lent
Place = tuple[Tier, str, int]  # tier, type, GPUs


@dataclass(slots=True)
class Backlog:
    """Who waits and who runs since a decision over all; it is changed by what happens after it."""

    aims: Aims
    tenants: Mapping[str, float]
    prices: Mapping[str, float]
    ahead: Mapping[int, Horizon]
    free: dict[str, int]
    waiting: dict[int, Contender] = field(default_factory=dict)
    heaps: dict[Place, list[tuple[float, int, Option]]] = field(default_factory=dict)
    running: dict[int, Place] = field(default_factory=dict)
    held: dict[tuple[Tier, str], int] = field(default_factory=dict)

    def happened(
        self, ended: Iterable[int], came: Iterable[Contender], now_ms: int
    ) -> dict[int, Option] | None:
        """Who starts now that these have ended and those have come; None where it has to be decided
        over all jobs."""
        for job_id in ended:
            tier, name, gpus = self.running.pop(job_id)
            self.held[tier, name] -= gpus
            self.free[name] += gpus
        started: dict[int, Option] = {}
        self._fill(started)
        for contender in sorted(came, key=lambda c: (*_tier(c), c.submitted_ms, c.job_id)):
            ahead = self.ahead.get(contender.rank, Horizon(0.0))
            (worth,) = worths([contender], now_ms, self.aims, self.tenants, ahead)
            option = at_prices(worth, contender.options, self.free, self.prices)
            if option is None:
                self.wait(contender, worth)
            else:
                self._start(contender, option, started)
        self._fill(started)
        return None if self._inverted() else started

    def wait(self, contender: Contender, worth: Iterable[float]) -> None:
        self.waiting[contender.job_id] = contender
        for option, value in zip(contender.options, worth, strict=True):
            if value > 0:
                heap = self.heaps.setdefault((_tier(contender), option.gpu_type, option.gpus), [])
                heapq.heappush(heap, (-value / max(1, option.gpus), contender.job_id, option))

    def run(self, contender: Contender, option: Option) -> None:
        tier, name = _tier(contender), option.gpu_type
        self.running[contender.job_id] = (tier, name, option.gpus)
        self.held[tier, name] = self.held.get((tier, name), 0) + option.gpus
        self.free[name] -= option.gpus

    def _start(self, contender: Contender, option: Option, started: dict[int, Option]) -> None:
        self.run(contender, option)
        started[contender.job_id] = option

    def _fill(self, started: dict[int, Option]) -> None:
        """Earlier classes first, in each those within their quotas, the most worth for a GPU first:
        no GPU idles that one of them could use."""
        while True:
            heads = [
                (place[0], *heap[0][:2], place)
                for place, heap in self.heaps.items()
                if place[2] <= self.free.get(place[1], 0) and self._waits(heap)
            ]
            if not heads:
                return
            *_, job_id, place = min(heads)
            _, _, option = heapq.heappop(self.heaps[place])
            self._start(self.waiting.pop(job_id), option, started)

    def _waits(self, heap: list[tuple[float, int, Option]]) -> bool:
        """Whether anybody in it still does; who has started on another type is dropped."""
        while heap and heap[0][1] not in self.waiting:
            heapq.heappop(heap)
        return bool(heap)

    def _inverted(self) -> bool:
        """Whether somebody waits for what is free or a later class's. What is lent within a class
        has to run for its minimum first, and is recalled by the next decision over all."""
        for ((rank, _), name, gpus), heap in self.heaps.items():
            later = sum(n for (other, at), n in self.held.items() if at == name and other[0] > rank)
            if later and self.free.get(name, 0) + later >= gpus and self._waits(heap):
                return True
        return False


def _tier(contender: Contender) -> Tier:
    return contender.rank, contender.lent


def backlog_of(
    contenders: Iterable[Contender],
    capacity: Mapping[str, int],
    allocation: Allocation,
    aims: Aims,
    tenants: Mapping[str, float],
) -> Backlog:
    """What a decision over these jobs leaves to be decided by what happens next."""
    found = Backlog(aims, tenants, allocation.prices, allocation.ahead, dict(capacity))
    for contender in contenders:
        grant = allocation.grants.get(contender.job_id)
        if grant is None:
            found.wait(contender, allocation.waiting_worth[contender.job_id])
        else:
            found.run(contender, grant.option)
    return found


def at_prices(
    worth: Sequence[float],
    options: Sequence[Option],
    free: Mapping[str, int],
    prices: Mapping[str, float],
) -> Option | None:
    """What a job that has just come starts with before the next decision: of the options that fit
    the one that is worth most above its price, and at least its price."""
    found = [
        (value - option.gpus * prices.get(option.gpu_type, 0.0), -place)
        for place, (value, option) in enumerate(zip(worth, options, strict=True))
        if value > 0 and option.gpus <= free.get(option.gpu_type, 0)
    ]
    surplus, place = max(found, default=(-1.0, 0))
    return options[-place] if surplus >= 0 else None
