"""The production core as a policy of the simulator: `coordinator/core/allocation.py` decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.core.allocation import Aims, Contender, Option, Solve, allocate
from coordinator.sim.model import Placement, Seen, View


@dataclass(frozen=True, slots=True)
class Ours:
    """`solve` is the production solver; None leaves the core's greedy."""

    aims: Aims = field(default_factory=Aims)
    solve: Solve | None = None
    tick_ms: int = 60_000
    tenants: Mapping[str, float] | None = None

    @property
    def name(self) -> str:
        return "Baton" if self.solve else "Baton, greedy"

    def decide(self, view: View) -> Mapping[int, Placement]:
        allocation = allocate(
            [contender(seen) for seen in view.jobs],
            view.capacity,
            view.now_ms,
            self.aims,
            tenants=self.tenants,
            solve=self.solve,
        )
        return {
            job_id: Placement(grant.option.gpu_type, grant.option.gpus)
            for job_id, grant in allocation.grants.items()
        }


def contender(seen: Seen) -> Contender:
    """A simulated job as the core sees it."""
    job = seen.job
    options = tuple(Option(name, job.gpus, rate) for name, rate in job.rates.items() if rate > 0)
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
