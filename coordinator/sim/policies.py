"""What others do: queues, partitions, pairs and prices. No job that runs is ever displaced here.

Problem: "30% cheaper" says nothing before it is said than what. These are the ways in which fleets
are run today, each as simple as it is described: FIFO with and without an eye for the GPU's type,
teams that own their GPUs, pairs of jobs on one GPU (Gandiva), and the most work for a dollar.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from coordinator.sim.model import News, PairRates, Placement, SimJob, View

# Gandiva keeps a pair when the two together do more than one alone.
PAIR_RATIO_MIN: Final = 1.0
# What costs nothing, or nobody knows what, is taken to cost next to nothing.
PRICE_MIN: Final = 1e-3


def running(view: View) -> dict[int, Placement]:
    """What runs goes on; whose partner has ended has its GPU alone."""
    here = {seen.job.job_id for seen in view.jobs if seen.placement is not None}
    return {
        seen.job.job_id: (
            seen.placement
            if seen.placement.partner is None or seen.placement.partner in here
            else seen.placement._replace(partner=None)
        )
        for seen in view.jobs
        if seen.placement is not None
    }


def free_gpus(view: View, placed: Mapping[int, Placement]) -> dict[str, int]:
    """By type. Both of a pair count half, and a pair has whole GPUs."""
    free = dict(view.capacity)
    halves = dict.fromkeys(free, 0)
    for place in placed.values():
        halves[place.gpu_type] += place.gpus * (2 if place.partner is None else 1)
    return {name: free[name] - halves[name] // 2 for name in free}


def fitting(job: SimJob, free: Mapping[str, int]) -> list[str]:
    """Types on which it could start now, the one with most free GPUs first."""
    able = [n for n, rate in job.rates.items() if rate > 0 and free.get(n, 0) >= job.gpus]
    return sorted(able, key=lambda name: (-free[name], name))


def first_place(job: SimJob, free: Mapping[str, int], aware: bool) -> Placement | None:
    """Where it starts now; `aware`: where it is fastest."""
    able = fitting(job, free)
    if not able:
        return None
    name = max(able, key=lambda each: job.rates[each]) if aware else able[0]
    return Placement(name, job.gpus)


def first_come(
    waiting: Iterable[SimJob], free: dict[str, int], aware: bool
) -> dict[int, Placement]:
    """The head of the queue and whoever follows, until one does not fit."""
    placed = {}
    for job in waiting:
        place = first_place(job, free, aware)
        if place is None:
            break
        free[place.gpu_type] -= place.gpus
        placed[job.job_id] = place
    return placed


def waiting_jobs(view: View) -> list[SimJob]:
    """In the order of classes, and in each in the order in which they came."""
    found = [seen.job for seen in view.jobs if seen.placement is None]
    return sorted(found, key=lambda job: job.rank)


@dataclass(slots=True)
class Fifo:
    """`aware`: the head of the queue gets the GPUs it is fastest on, of those that are free. News
    is answered from the queue as it is known, a heap by class and order: a long queue costs no
    more than a short one."""

    aware: bool = False
    tick_ms: int = 0
    queue: list[tuple[int, int, SimJob]] = field(default_factory=list)
    places: int = 0
    free: dict[str, int] = field(default_factory=dict)
    held: dict[int, Placement] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "FIFO, type-aware" if self.aware else "FIFO, type-blind"

    def decide(self, view: View) -> Mapping[int, Placement]:
        self.held = running(view)
        self.free = free_gpus(view, self.held)
        self.queue, self.places = [], 0
        self._come(seen.job for seen in view.jobs if seen.placement is None)
        self._start()
        return dict(self.held)

    def hear(self, news: News) -> Mapping[int, Placement]:
        for job_id in news.ended:
            place = self.held.pop(job_id)
            self.free[place.gpu_type] += place.gpus
        self._come(news.came)
        return self._start()

    def _come(self, jobs: Iterable[SimJob]) -> None:
        for job in jobs:
            self.places += 1
            heapq.heappush(self.queue, (job.rank, self.places, job))

    def _start(self) -> dict[int, Placement]:
        """The head of the queue and whoever follows, until one does not fit."""
        started = {}
        while self.queue and (place := first_place(self.queue[0][2], self.free, self.aware)):
            _, _, job = heapq.heappop(self.queue)
            self.free[place.gpu_type] -= place.gpus
            started[job.job_id] = place
        self.held.update(started)
        return started


@dataclass(frozen=True, slots=True)
class StaticPartition:
    """Each team owns GPUs of one type. Jobs belong to teams in turn, so that each has its part of
    them by its part of the GPUs; one that a team's GPUs cannot run goes to the next."""

    tick_ms: int = 0

    @property
    def name(self) -> str:
        return "static partition"

    def decide(self, view: View) -> Mapping[int, Placement]:
        placed = running(view)
        free = free_gpus(view, placed)
        queues: dict[str, list[SimJob]] = {name: [] for name in free}
        for job in waiting_jobs(view):
            queues[self._team(job, view)].append(job)
        for name, queue in queues.items():
            placed.update(first_come(queue, {name: free[name]}, aware=False))
        return placed

    def _team(self, job: SimJob, view: View) -> str:
        names = sorted(view.fleet.gpus)
        # A multiple of the golden ratio spreads consecutive numbers evenly.
        left = (job.job_id * 0.6180339887498949) % 1.0 * sum(view.fleet.gpus.values())
        first = 0
        while left >= view.fleet.gpus[names[first]]:
            left -= view.fleet.gpus[names[first]]
            first += 1
        order = names[first:] + names[:first]
        return next(
            name
            for name in order
            if job.rates.get(name, 0.0) > 0 and view.fleet.gpus[name] >= job.gpus
        )


@dataclass(frozen=True, slots=True)
class Packing:
    """FIFO with an eye for the type; and who still waits and needs one GPU joins another such job
    where the two together do more than one of them alone."""

    pairs: PairRates
    tick_ms: int = 0

    @property
    def name(self) -> str:
        return "packing"

    def decide(self, view: View) -> Mapping[int, Placement]:
        placed = running(view)
        waiting = waiting_jobs(view)
        placed.update(first_come(waiting, free_gpus(view, placed), aware=True))
        jobs = {seen.job.job_id: seen.job for seen in view.jobs}
        for job in waiting:
            if job.job_id in placed or job.gpus > 1:
                continue
            best = max(self._gains(job, placed, jobs), default=(0.0, 0))
            if best[0] > PAIR_RATIO_MIN:
                name = placed[-best[1]].gpu_type
                placed[job.job_id] = Placement(name, 1, -best[1])
                placed[-best[1]] = Placement(name, 1, job.job_id)
        return placed

    def _gains(
        self, job: SimJob, placed: Mapping[int, Placement], jobs: Mapping[int, SimJob]
    ) -> list[tuple[float, int]]:
        found = []
        for other, place in placed.items():
            name, host = place.gpu_type, jobs[other]
            if place.gpus > 1 or place.partner is not None or job.rates.get(name, 0.0) <= 0:
                continue
            ours = self.pairs.get((name, job.model, host.model), 0.0)
            theirs = self.pairs.get((name, host.model, job.model), 0.0)
            if ours > 0 and theirs > 0:
                found.append((ours / job.rates[name] + theirs / host.rates[name], -other))
        return found


@dataclass(frozen=True, slots=True)
class PerDollar:
    """The most work for a dollar: each GPU that is free goes to whoever gains most by it for its
    price, measured by what the job does on the type it is fastest on."""

    tick_ms: int = 0

    @property
    def name(self) -> str:
        return "throughput per dollar"

    def decide(self, view: View) -> Mapping[int, Placement]:
        placed = running(view)
        free = free_gpus(view, placed)
        prices = view.fleet.prices_per_h
        waiting = waiting_jobs(view)
        found = [
            (-rate / max(job.rates.values()) / max(PRICE_MIN, prices.get(name, 0.0)), place, name)
            for place, job in enumerate(waiting)
            for name, rate in job.rates.items()
            if rate > 0
        ]
        for _, place, name in sorted(found):
            job = waiting[place]
            if job.job_id not in placed and free.get(name, 0) >= job.gpus:
                free[name] -= job.gpus
                placed[job.job_id] = Placement(name, job.gpus)
        return placed
