"""The production core as a policy of the simulator: `coordinator/core/allocation.py` decides.

Problem: on a large fleet a decision over all jobs at each arrival and each end would take hours. So
where jobs and types are many, all of them are decided on the tick (and when something fails), and
what happens in between goes to `coordinator/core/backlog.py`; where they are few, as on most
fleets, every event is a decision over all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.allocation import Aims, Allocation, Contender, Option, Solve, allocate
from coordinator.core.backlog import Backlog, backlog_of
from coordinator.core.quotas import Quota
from coordinator.sim.model import News, Placement, Seen, SimJob, View
from coordinator.sim.policies import running
from coordinator.sim.tenants import Tenants
from coordinator.sim.undisputed import at_rest, undisputed

# Jobs times types: up to so many a decision takes some 20 ms.
FEW_MAX: Final = 1_000


@dataclass(slots=True)
class Ours:
    """`solve` is the production solver; None leaves the core's greedy. It remembers the last
    decision over all of them where jobs times types were more than `few_max`."""

    aims: Aims = field(default_factory=Aims)
    solve: Solve | None = None
    tick_ms: int = 60_000
    tenants: Mapping[str, float] | None = None
    few_max: int = FEW_MAX
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    backlog: Backlog | None = None
    books: Tenants | None = None
    options: dict[int, tuple[SimJob, tuple[Option, ...]]] = field(default_factory=dict)
    at_rest: bool = False

    @property
    def name(self) -> str:
        return "Baton" if self.solve else "Baton, greedy"

    def decide(self, view: View) -> Mapping[int, Placement]:
        plain = not self.quotas and len(view.jobs) * len(view.capacity) <= self.few_max
        self.at_rest = plain and at_rest(view.jobs, self.aims)
        if self.at_rest:
            self.backlog = None
            return running(view)
        contenders = [self.contender(seen) for seen in view.jobs]
        tenants = self.tenants or {}
        found = None
        if plain:
            found = undisputed(contenders, view.capacity, view.now_ms, self.aims, tenants)
        if found is not None:
            self.backlog = None
            return {n: Placement(option.gpu_type, option.gpus) for n, option in found.items()}
        if self.quotas:
            if self.books is None:
                self.books = Tenants(self.quotas)
            contenders, weights = self.books.judge(contenders, view.now_ms)
            tenants = {**tenants, **weights}
        allocation = self.allocation(view, contenders, tenants)
        self.backlog = None
        if len(contenders) * len(view.capacity) > self.few_max:
            self.backlog = backlog_of(contenders, view.capacity, allocation, self.aims, tenants)
        if self.books is not None:
            options = {job_id: grant.option for job_id, grant in allocation.grants.items()}
            self.books.decided(contenders, options, view.now_ms)
        return {
            job_id: Placement(grant.option.gpu_type, grant.option.gpus)
            for job_id, grant in allocation.grants.items()
        }

    def allocation(
        self, view: View, contenders: Sequence[Contender], tenants: Mapping[str, float]
    ) -> Allocation:
        """The core's decision over these jobs."""
        return allocate(
            contenders, view.capacity, view.now_ms, self.aims, tenants=tenants, solve=self.solve
        )

    def hear(self, news: News) -> Mapping[int, Placement] | None:
        """Who starts by it; None where the fleet is small or it takes a decision over all."""
        if self.backlog is None:
            return None
        came = [self.contender(_arrived(job, news.blind)) for job in news.came]
        if self.books is not None:
            self.books.ended(news.ended, news.now_ms)
            came = self.books.arrived(came, news.now_ms)
        started = self.backlog.happened(news.ended, came, news.now_ms)
        if started is None:
            return None
        if self.books is not None:
            self.books.started(started, news.now_ms)
        return {n: Placement(option.gpu_type, option.gpus) for n, option in started.items()}

    def contender(self, seen: Seen) -> Contender:
        """Its options are the same at each decision."""
        known = self.options.get(seen.job.job_id)
        if known is None or known[0] is not seen.job:
            known = (seen.job, options_of(seen.job))
            self.options[seen.job.job_id] = known
        return contender(seen, known[1])


def options_of(job: SimJob) -> tuple[Option, ...]:
    """All types that can run it."""
    return tuple(Option(name, job.gpus, rate) for name, rate in job.rates.items() if rate > 0)


def _arrived(job: SimJob, blind: bool) -> Seen:
    return Seen(job, None if blind else job.steps, 0.0, None, 0)


def contender(seen: Seen, options: tuple[Option, ...]) -> Contender:
    """A simulated job as the core sees it."""
    job = seen.job
    at = None
    if seen.placement is not None:
        at = next(option for option in options if option.gpu_type == seen.placement.gpu_type)
    return Contender(
        job_id=job.job_id,
        options=options,
        rank=job.rank,
        project=job.project,
        submitted_ms=job.arrival_ms,
        steps_left=seen.steps_left,
        attained_gpu_s=seen.attained_gpu_s,
        at=at,
        since_ms=seen.since_ms,
        restart_s=job.restart_s,
        deadline_ms=job.deadline_ms,
    )
