"""A fleet and its jobs as they are, and as they would be: what `baton simulate` compares.

Problem: what one wants to know is a difference, and a difference between two files that were edited
by hand is one of everything that was edited. So a question is a change that is named ("4xH200" is
added, "demo" counts twice) and applied to the same jobs with the same chances.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.core.quotas import Quota
from coordinator.core.sentences import quantity
from coordinator.sim.guesses import known_as, public, with_types
from coordinator.sim.model import Chance, Fleet, PairRates, SimJob

_GPUS = re.compile(r"(?P<first>[1-9]\d{0,5})x((?P<second>[1-9]\d{0,3})x)?(?P<name>[^\s,][^,]*)")
_WEIGHT = re.compile(r"(?P<project>.+)=x(?P<factor>\d+(\.\d+)?)")


class BadQuestion(ValueError):
    """It cannot be asked of this fleet; the text is a sentence."""


@dataclass(frozen=True, slots=True)
class Case:
    """All that a policy is run on. `weights` are those of projects, 1 where none is named."""

    jobs: Sequence[SimJob]
    fleet: Fleet
    chance: Chance = field(default_factory=Chance)
    weights: Mapping[str, float] = field(default_factory=dict)
    pairs: PairRates = field(default_factory=dict)
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    left_out: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gpus:
    """So many of a type."""

    count: int
    name: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is changed."""

    added: Sequence[Gpus] = ()
    removed: Sequence[Gpus] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        return bool(self.added or self.removed or self.weights)


def read_gpus(text: str) -> Gpus:
    """ "4xH200" is four GPUs, "2x8xH200" two nodes of eight."""
    match = _GPUS.fullmatch(text)
    if match is None:
        raise BadQuestion(f"{text!r} is no number of GPUs of one type, like 4xH200 or 2x8xH200")
    return Gpus(int(match["first"]) * int(match["second"] or 1), match["name"])


def read_weight(text: str) -> tuple[str, float]:
    """ "demo=x2": twice as much of the project demo."""
    match = _WEIGHT.fullmatch(text)
    if match is None or float(match["factor"]) == 0:
        raise BadQuestion(f"{text!r} is no project and how many times its quota, like demo=x2")
    return match["project"], float(match["factor"])


def with_prices(fleet: Fleet, prices: Mapping[str, float]) -> Fleet:
    """Dollars an hour of one GPU, by a part of its name; the longest part that fits counts."""
    found = dict(fleet.prices_per_h)
    for name in fleet.gpus:
        given = [(len(part), usd) for part, usd in prices.items() if part.lower() in name.lower()]
        if given:
            found[name] = max(given)[1]
    return replace(fleet, prices_per_h=found)


def check_prices(prices: Mapping[str, float], fleet: Fleet) -> None:
    """Raises `BadQuestion` for a price of no type that is there."""
    for part in prices:
        if not any(part.lower() in name.lower() for name in fleet.gpus):
            there = ", ".join(fleet.gpus)
            raise BadQuestion(f"--price {part}: no GPU type of the fleet is that; it has {there}")


def asked(case: Case, question: Question, prices: Mapping[str, float]) -> Case:
    """The case as it would be."""
    gpus, booting = dict(case.fleet.gpus), dict(case.fleet.booting)
    known_prices = dict(case.fleet.prices_per_h)
    for each in question.added:
        name = _same(each.name, gpus) or each.name
        gpus[name] = gpus.get(name, 0) + each.count
        booting[name] = booting.get(name, 0) + each.count
        if name not in known_prices:
            facts = public(name)
            known_prices[name] = (facts.usd_per_hour if facts else None) or 0.0
    for each in question.removed:
        gone = _same(each.name, gpus)
        if gone is None or gpus[gone] < each.count:
            there = f"{gpus[gone]} x {gone}" if gone else f"none, but {', '.join(gpus)}"
            raise BadQuestion(f"{each.count} x {each.name} cannot be removed: there are {there}")
        gpus[gone] -= each.count
        booting[gone] = min(booting.get(gone, 0), gpus[gone])
    kept = {name: count for name, count in gpus.items() if count}
    fleet = with_prices(Fleet(kept, known_prices, booting), prices)
    jobs = with_types(case.jobs, [name for name in kept if name not in case.fleet.gpus])
    unknown = [n for n in kept if n not in case.fleet.gpus and all(n not in j.rates for j in jobs)]
    if unknown:
        raise BadQuestion(f"nothing says how fast jobs are on {unknown[0]}: {_help(unknown[0])}")
    _check_projects(question.weights, jobs)
    left_out = {job.job_id: why for job in jobs if (why := never_runs(job, fleet))}
    if len(left_out) == len(jobs):
        raise BadQuestion(f"no job could run: {next(iter(left_out.values()), 'there is none')}")
    return replace(
        case,
        jobs=fitting([job for job in jobs if job.job_id not in left_out], fleet),
        left_out=left_out,
        fleet=fleet,
        weights={**case.weights, **_without_quota(question.weights, case.quotas)},
        quotas={
            name: _times(each, question.weights.get(name)) for name, each in case.quotas.items()
        },
    )


def _without_quota(weights: Mapping[str, float], quotas: Mapping[str, Quota]) -> dict[str, float]:
    """A project that has no quota counts so many times as much instead."""
    return {name: factor for name, factor in weights.items() if name not in quotas}


def _times(quota: Quota, factor: float | None) -> Quota:
    return replace(quota, gpu_hours=quota.gpu_hours * (1.0 if factor is None else factor))


def fitting(jobs: Iterable[SimJob], fleet: Fleet) -> list[SimJob]:
    """The jobs with rates on this fleet's types alone. Raises `BadQuestion` where one has none."""
    found = []
    for job in jobs:
        why = never_runs(job, fleet)
        if why:
            raise BadQuestion(why)
        able = {name: rate for name, rate in job.rates.items() if name in fleet.gpus}
        found.append(replace(job, rates=able))
    return found


def never_runs(job: SimJob, fleet: Fleet) -> str:
    """Why it could run on no type of this fleet; empty where it could."""
    able = [name for name, rate in job.rates.items() if rate > 0]
    most = max((fleet.gpus.get(name, 0) for name in able), default=0)
    if most >= job.gpus:
        return ""
    return (
        f"job {job.job_id} could never run: it needs {quantity(job.gpus, 'GPU')} of one type of"
        f" those that can run it ({', '.join(able)}), and there would be {most}"
    )


def _same(name: str, fleet: Mapping[str, int]) -> str | None:
    """The type of the fleet that is meant: by its name, or else as the same GPU."""
    for known in fleet:
        if known.lower() == name.lower():
            return known
    return next((known for known in fleet if known_as(known) == known_as(name)), None)


def _check_projects(weights: Mapping[str, float], jobs: Sequence[SimJob]) -> None:
    projects = {job.project: None for job in jobs}
    for project in weights:
        if project not in projects:
            raise BadQuestion(f"no job is of project {project!r}; there are {', '.join(projects)}")


def _help(name: str) -> str:
    if public(name) is None:
        return "the name is not in the table of GPU types; add its column to the trace"
    return "add its column to the trace"
