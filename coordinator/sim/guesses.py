"""How fast simulated jobs are on GPU types for which nobody has given a rate.

Problem: "what if I add four H200" is asked by those who have none, so no job has a rate there. The
production estimator (`coordinator/core/estimates.py`) answers from what the job does on types that
are known, from public facts, and from what other jobs did on both. Where it cannot say anything, a
job does not run on the type, and that is told.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from coordinator.core import gpu_types, rates
from coordinator.core.estimates import (
    NOTHING,
    Knowledge,
    Measurement,
    Observation,
    Place,
    estimate,
)
from coordinator.core.gpu_types import GpuType
from coordinator.sim.model import SimJob

# A rate that stands in a trace is taken for one that was measured over an hour.
GIVEN_S = 3600.0
_JOB = "job"


def public(name: str) -> GpuType | None:
    """The facts of a type that is called by its key, or as people call it."""
    named = next((known for known in gpu_types.TYPES if known.key == name), None)
    return named or gpu_types.find(name)


def known_as(name: str) -> str:
    """What the estimator calls it."""
    facts = public(name)
    return facts.key if facts is not None else name


def halves(names: Iterable[str]) -> bool:
    """Whether a job that runs on these, and does not say in what it computes, is taken to compute
    in 16 bits: not where one of them cannot, or the others would seem forty times as fast."""
    facts = [public(name) for name in names]
    return all(known is None or known.bfloat16 for known in facts)


def guess(
    measured: Iterable[Measurement],
    place: Place,
    knowledge: Knowledge = NOTHING,
    *,
    half: bool,
) -> float | None:
    """Steps a second at `place` of a job that did what was `measured`; None: nobody can say."""
    kin = [Observation(_JOB, one) for one in measured]
    said = estimate(knowledge, kin, _JOB, place, rates.place_prior(place, half=half))
    return None if said is None else said.steps_per_s


def measurement(place: Place, steps_per_s: float, seconds: float, *, half: bool) -> Measurement:
    """With what facts say of it."""
    return Measurement(place, rates.place_prior(place, half=half), steps_per_s, seconds)


def with_types(jobs: Iterable[SimJob], names: Iterable[str]) -> list[SimJob]:
    """The jobs with a rate on each of these types, given or guessed."""
    names = tuple(names)
    return [replace(job, rates=_rates(job, names)) for job in jobs]


def _rates(job: SimJob, names: tuple[str, ...]) -> Mapping[str, float]:
    missing = [name for name in names if name not in job.rates]
    told = tuple(sorted(job.rates.items()))
    found = {name: _given(told, name, job.gpus) for name in missing}
    return {**job.rates, **{name: rate for name, rate in found.items() if rate is not None}}


@lru_cache(maxsize=4096)
def _given(told: tuple[tuple[str, float], ...], name: str, gpus: int) -> float | None:
    """Traces repeat their models."""
    half = halves(other for other, rate in told if rate > 0)
    seen = [
        measurement(Place(known_as(other), gpus), rate, GIVEN_S, half=half)
        for other, rate in told
        if rate > 0
    ]
    return guess(seen, Place(known_as(name), gpus), half=half)
