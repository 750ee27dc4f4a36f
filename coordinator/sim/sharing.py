"""Our policy with pairs: light jobs that wait go beside others, where both stay fast enough.

Problem: a simulated policy that is handed the table of pairs has no trial, no error and no bad
pair, and says nothing of what sharing is worth. So this one does not see the table. It forecasts as
the production core does (`coordinator/core/pairs.py`), sees what two have made together once they
have done so for two minutes, as agents would tell it, and ends what is not good enough. With
`known` it sees the table all the same: the difference is the price of not knowing. Which two fit
into a GPU's memory is counted beforehand, here as there.

The allocation decides over all jobs but the *guests* on another one's GPU, as if there were no
pairs. Then:

1. A guest stays with its host while that runs where it ran, and nothing bad was measured. One whose
   host has gone is decided over like all others.
2. A job of one GPU that waits becomes the guest of one of its class that has its GPU alone, if the
   forecast is good enough and what it does there is worth more than what the host loses; the most
   gain first.
3. A GPU that nobody wants goes to a guest: alone is faster.

Who has to run now to keep its deadline, and is not in time beside another, has no company
(`coordinator/core/apart.py`): the two are parted, and decided over like all others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.core.allocation import MS_PER_S, Allocation, Contender, is_late, worths
from coordinator.core.horizon import Horizon
from coordinator.core.pairs import (
    SIGHT_VARIANCE_MIN,
    Forecast,
    Kept,
    Lessons,
    Member,
    Sight,
    learn,
)
from coordinator.sim.model import PACE_S, PairRates, Placement, Seen, SimJob, View
from coordinator.sim.ours import Ours
from coordinator.sim.policies import free_gpus

Two = tuple[str, str, str]  # type, model, partner's model
Worth = Mapping[int, Mapping[str, float]]  # of each job on each type


@dataclass(slots=True)
class Sharing:
    """One run's worth. `fits` are those that fit a GPU together; `hosts` are by guest, `tried`
    counts pairs that were made."""

    ours: Ours
    fits: frozenset[Two]
    known: PairRates | None = None
    sights: dict[Two, Sight] = field(default_factory=dict)
    lessons: Lessons = field(default_factory=Lessons)
    forecasts: dict[Two, Forecast] = field(default_factory=dict)
    hosts: dict[int, int] = field(default_factory=dict)
    tried: int = 0

    @property
    def name(self) -> str:
        return f"{self.ours.name}, pairs{' known' if self.known is not None else ''}"

    @property
    def tick_ms(self) -> int:
        return self.ours.tick_ms

    def decide(self, view: View) -> Mapping[int, Placement]:
        jobs = {seen.job.job_id: seen for seen in view.jobs}
        self._learn(jobs)
        contenders = {number: self.ours.contender(seen) for number, seen in jobs.items()}
        hurried = {n: each for n, each in contenders.items() if is_late(each, view.now_ms)}
        guests = {
            guest: host
            for guest, host in self.hosts.items()
            if guest in jobs
            and host in jobs
            and self._stays(jobs[guest], jobs[host])
            and self._in_time(view, jobs[guest].job, jobs[host], hurried)
        }
        while True:
            asked = [each for number, each in contenders.items() if number not in guests]
            allocation = self.ours.allocation(view, asked, self.ours.tenants or {})
            placed = {
                number: Placement(grant.option.gpu_type, grant.option.gpus)
                for number, grant in allocation.grants.items()
            }
            staying = {g: h for g, h in guests.items() if _is_still_there(jobs[h], placed)}
            if len(staying) == len(guests):
                break
            guests = staying
        for guest, host in guests.items():
            _join(placed, guest, host)
        worth = self._worth(view, contenders, allocation)
        self._invite(view, placed, worth, guests, hurried)
        self._spread(view, placed, worth, guests)
        self.hosts = guests
        return placed

    def _learn(self, jobs: Mapping[int, Seen]) -> None:
        """What each keeps beside its partner, once both have been measured."""
        before = len(self.sights)
        for seen in jobs.values():
            place = seen.placement
            if place is None or place.partner is None or seen.pace is None:
                continue
            job, other = seen.job, jobs[place.partner].job
            two = (place.gpu_type, job.model, other.model)
            if two not in self.sights:
                ratio = seen.pace / job.rates[place.gpu_type]
                self.sights[two] = Sight(member(job), member(other), two[0], ratio, PACE_S)
        if len(self.sights) > before:
            self.lessons = learn(self.sights.values())
            self.forecasts.clear()

    def _forecast(self, one: SimJob, other: SimJob, gpu_type: str) -> Forecast:
        two = (gpu_type, one.model, other.model)
        found = self.forecasts.get(two)
        if found is None:
            if self.known is None:
                found = self.lessons.forecast(member(one), member(other), gpu_type)
            else:
                found = _certain(self.known, one, other, gpu_type)
            self.forecasts[two] = found
        return found

    def _stays(self, guest: Seen, host: Seen) -> bool:
        place = guest.placement
        if place is None or place.partner != host.job.job_id:
            return False
        found = self._forecast(guest.job, host.job, place.gpu_type)
        return found.measured is None or found.worth_trying

    def _worth(
        self, view: View, contenders: Mapping[int, Contender], allocation: Allocation
    ) -> Worth:
        """In its class, of which the allocation may have seen a part."""
        found: dict[int, dict[str, float]] = {}
        for rank in dict.fromkeys(each.rank for each in contenders.values()):
            group = [each for each in contenders.values() if each.rank == rank]
            ahead = allocation.ahead.get(rank, Horizon(0.0))
            tenants = self.ours.tenants or {}
            values = worths(group, view.now_ms, self.ours.aims, tenants, ahead)
            for each, row in zip(group, values, strict=True):
                names = [option.gpu_type for option in each.options]
                found[each.job_id] = dict(zip(names, row, strict=True))
        return found

    def _in_time(
        self, view: View, one: SimJob, host: Seen, hurried: Mapping[int, Contender], there: str = ""
    ) -> bool:
        """Whether both are beside one another, `there` or where the host is, of these."""
        name = there or (host.placement.gpu_type if host.placement is not None else "")
        said = self._forecast(one, host.job, name)
        for job, kept in ((one, said.one), (host.job, said.other)):
            if (late := hurried.get(job.job_id)) is not None:
                need_s = (late.steps_left or 0.0) / (job.rates[name] * kept.expected_ratio)
                if view.now_ms + need_s * MS_PER_S > (late.deadline_ms or 0):
                    return False
        return True

    def _invite(
        self,
        view: View,
        placed: dict[int, Placement],
        worth: Worth,
        guests: dict[int, int],
        hurried: Mapping[int, Contender],
    ) -> None:
        jobs = {seen.job.job_id: seen for seen in view.jobs}
        waiting = [seen.job for n, seen in jobs.items() if n not in placed and seen.job.gpus == 1]
        hosts = [n for n, place in placed.items() if place.gpus == 1 and place.partner is None]
        found = []
        for job in waiting:
            for host in hosts:
                other, name = jobs[host].job, placed[host].gpu_type
                if other.rank != job.rank or (name, job.model, other.model) not in self.fits:
                    continue
                if not self._in_time(view, job, jobs[host], hurried, name):
                    continue
                said = self._forecast(job, other, name)
                lost = worth[host][name] * (1 - said.other.expected_ratio)
                gain = worth[job.job_id].get(name, 0.0) * said.one.expected_ratio - lost
                if said.worth_trying and gain > 0:
                    found.append((-gain, job.job_id, host))
        for _, guest, host in sorted(found):
            if guest not in placed and placed[host].partner is None:
                _join(placed, guest, host)
                guests[guest] = host
                self.tried += 1

    def _spread(
        self, view: View, placed: dict[int, Placement], worth: Worth, guests: dict[int, int]
    ) -> None:
        jobs = {seen.job.job_id: seen.job for seen in view.jobs}
        free = free_gpus(view, placed)
        for guest, host in list(guests.items()):
            name = placed[guest].gpu_type
            said = self._forecast(jobs[guest], jobs[host], name)
            here = worth[guest][name] * said.one.expected_ratio
            able = [(value, there) for there, value in worth[guest].items() if free.get(there, 0)]
            value, there = max(able, default=(0.0, name))
            if value > here:
                free[there] -= 1
                placed[guest] = Placement(there, 1)
                placed[host] = Placement(name, 1)
                del guests[guest]


def member(job: SimJob) -> Member:
    """Gavel's models are trainings, and without the size of their batches families."""
    return Member(job.model, job.model.split(" (")[0])


def fitting_pairs(pairs: PairRates) -> frozenset[Two]:
    """Both of whom make steps together; the others need more memory than there is."""
    return frozenset(
        (name, one, other)
        for (name, one, other), rate in pairs.items()
        if rate > 0 and pairs.get((name, other, one), 0.0) > 0
    )


def _certain(known: PairRates, one: SimJob, other: SimJob, gpu_type: str) -> Forecast:
    """What the table says, as if it had been measured."""
    kept = [
        known[gpu_type, job.model, beside.model] / job.rates[gpu_type]
        for job, beside in ((one, other), (other, one))
    ]
    # The least variance that a measurement of hours leaves.
    mine, its = (Kept(math.log(ratio), SIGHT_VARIANCE_MIN) for ratio in kept)
    return Forecast(mine, its, (kept[0], kept[1]), informed=True)


def _is_still_there(host: Seen, placed: Mapping[int, Placement]) -> bool:
    place = placed.get(host.job.job_id)
    return place is not None and host.placement is not None and place[:2] == host.placement[:2]


def _join(placed: dict[int, Placement], guest: int, host: int) -> None:
    name = placed[host].gpu_type
    placed[guest] = Placement(name, 1, host)
    placed[host] = Placement(name, 1, guest)
