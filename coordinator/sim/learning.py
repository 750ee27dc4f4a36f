"""Our policy where the speeds of jobs are not known beforehand, but found out as a fleet does.

Problem: a policy that is handed the table of rates decides as no scheduler can. So this one is
handed a part of it, and nothing but the number of GPUs and the steps of the jobs that it sees.
Rates that it does not know come from the production estimator (`coordinator/core/estimates.py`):
from public facts, from what the rest of the table says of types, and from what the job's model and
its family have done elsewhere. Once a job has run somewhere for two minutes, its rate there is
known, and tells of other types, of other jobs of its model, and of types for all.

Until anything of a model has been measured only the ratios between types can be said; then nobody
knows how long the job takes, and it is decided over as one that does not say (`steps_left` None).
With the whole table this is `Ours` as it is: the difference is the price of not knowing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Final

from coordinator.core import estimates
from coordinator.core.allocation import Contender
from coordinator.core.estimates import NOTHING, Knowledge, Observation, Place, estimate
from coordinator.core.rates import place_prior
from coordinator.sim.guesses import GIVEN_S, known_as, measurement
from coordinator.sim.model import PACE_S, Placement, Seen, SimJob, View
from coordinator.sim.ours import Ours, options_of

Kind = tuple[str, int]  # model, GPUs
# As often as production learns of types (`coordinator/core/speeds.py`).
LEARNED_MS: Final = 600_000
# What a job takes on its GPUs where none has ended yet.
TYPICAL_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Believed:
    """Of one kind, by type; not `absolute`: only the ratios mean something."""

    rates: Mapping[str, float]
    absolute: bool


@dataclass(slots=True)
class Learning:
    """One run's worth. `table` is what is known beforehand, and `families` say which models are
    alike. `measured` is what was found out; `believed` and `jobs` are kept until more is known."""

    ours: Ours
    table: Mapping[Kind, Mapping[str, float]]
    families: Mapping[str, str] = field(default_factory=dict)
    measured: dict[tuple[str, int, str], float] = field(default_factory=dict)
    observations: dict[str, list[Observation]] = field(default_factory=dict)
    knowledge: Knowledge = NOTHING
    learned_ms: int | None = None
    learned_of: int = 0
    believed: dict[Kind, Believed] = field(default_factory=dict)
    jobs: dict[int, SimJob] = field(default_factory=dict)
    before: dict[int, Seen] = field(default_factory=dict)
    took_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for (model, gpus), rates in sorted(self.table.items()):
            for name, rate in sorted(rates.items()):
                self._note((model, gpus, name), rate, GIVEN_S)

    @property
    def name(self) -> str:
        return f"{self.ours.name}, learning"

    @property
    def tick_ms(self) -> int:
        return self.ours.tick_ms

    def decide(self, view: View) -> Mapping[int, Placement]:
        self._see(view)
        contenders = [self._contender(seen) for seen in view.jobs]
        allocation = self.ours.allocation(view, contenders, self.ours.tenants or {})
        return {
            job_id: Placement(grant.option.gpu_type, grant.option.gpus)
            for job_id, grant in allocation.grants.items()
        }

    def _see(self, view: View) -> None:
        """What was measured since, and how long those took that are gone."""
        here = {seen.job.job_id: seen for seen in view.jobs}
        self.took_s += [
            seen.attained_gpu_s / seen.job.gpus
            for job_id, seen in self.before.items()
            if job_id not in here
        ]
        self.before = here
        for seen in view.jobs:
            if seen.placement is not None and seen.pace is not None:
                at = (seen.job.model, seen.job.gpus, seen.placement.gpu_type)
                if at not in self.measured:
                    self._note(at, seen.pace, PACE_S)
        due = self.learned_ms is None or view.now_ms - self.learned_ms >= LEARNED_MS
        if due and len(self.measured) > self.learned_of:
            self.learned_ms, self.learned_of = view.now_ms, len(self.measured)
            known = [one for _, group in sorted(self.observations.items()) for one in group]
            self.knowledge = estimates.learn(known)
            self.believed.clear()

    def _note(self, at: tuple[str, int, str], rate: float, seconds: float) -> None:
        model, gpus, name = at
        self.measured[at] = rate
        seen = measurement(Place(known_as(name), gpus), rate, seconds, half=False)
        family = self._family(model)
        self.observations.setdefault(family, []).append(Observation(model, seen))
        for kind in [each for each in self.believed if self._family(each[0]) == family]:
            del self.believed[kind]

    def _family(self, model: str) -> str:
        return self.families.get(model, model)

    def _contender(self, seen: Seen) -> Contender:
        told = self._believed(seen.job)
        job = self.jobs.get(seen.job.job_id)
        if job is None or job.rates is not told.rates:
            job = self.jobs[seen.job.job_id] = replace(seen.job, rates=told.rates)
        contender = self.ours.contender(replace(seen, job=job))
        if told.absolute:
            return contender
        typical_gpu_s = job.gpus * (median(self.took_s) if self.took_s else TYPICAL_S)
        return replace(
            contender,
            steps_left=None,
            attained_gpu_s=min(contender.attained_gpu_s, typical_gpu_s),
            typical_gpu_s=typical_gpu_s,
        )

    def _believed(self, job: SimJob) -> Believed:
        kind = (job.model, job.gpus)
        found = self.believed.get(kind)
        if found is None:
            found = self.believed[kind] = self._estimated(job)
        return found

    def _estimated(self, job: SimJob) -> Believed:
        """Of the true rates nothing is used but on which types there is one."""
        kin = self.observations.get(self._family(job.model), [])
        absolute = any(one.job == job.model for one in kin)
        rates = {}
        for option in options_of(job):
            rate = self.measured.get((job.model, job.gpus, option.gpu_type))
            if rate is None:
                place = Place(known_as(option.gpu_type), job.gpus)
                prior = place_prior(place)
                if not absolute:
                    prior = replace(prior, work_known=True)
                said = estimate(self.knowledge, kin, job.model, place, prior)
                rate = 0.0 if said is None else said.steps_per_s
            rates[option.gpu_type] = rate
        least = min((rate for rate in rates.values() if rate > 0), default=1.0)
        return Believed({name: rate or least for name, rate in rates.items()}, absolute)
