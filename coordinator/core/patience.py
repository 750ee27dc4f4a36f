"""Jobs that may wait keep no node on, and have none started, until their time comes.

Problem: what makes a fleet dear is its peaks, and who says that he can wait (`flexible.py`) was
counted among them like anybody else: nodes were started for him that nobody would have missed an
hour later. But a wish is no leave to forget him: from the moment on at which a node has to be
started for him to run in time he is demand like any other.

How: the latest start of a job that waits is the end of its allowance, or, where it has a deadline
as well, that which the deadline leaves, if that is known; else it is urgent. What starts later than
a node takes to be there does not count in the demand until then; what starts later than a node has
to stay off to be worth it does not count in the demand of that time either. Both are taken from
what is forecast, for a forecast is of all that waits.

A guaranteed job is always counted, and so is one that shares a GPU: what it takes of it is little.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.core import demand_forecast, demand_samples, flexible
from coordinator.core.capacity_model import Outlook
from coordinator.core.model import Job
from coordinator.core.state import Instant, State


@dataclass(frozen=True, slots=True)
class Patient:
    """Counts to `gpu_type`. `beyond`: not before a node that is switched off now has been worth
    it."""

    gpu_type: str
    gpus: int
    beyond: bool


def left_ms(state: State, now: Instant, job: Job) -> int:
    """For how long no node has to be there for it; 0 for one that is urgent."""
    if not flexible.is_counted_late(job.spec):
        return 0
    left = flexible.left_ms(job, now.unix_ms)
    if not job.spec.deadline_unix_ms or not left:
        return left
    latest_ms = state.standing.latest_ms.get(job.id, math.inf)
    return 0 if latest_ms == math.inf else min(left, max(0, math.floor(latest_ms) - now.now_ms))


def patients(state: State, now: Instant) -> dict[int, Patient]:
    """Those that wait and are not demand yet; not who is on his way to a place, and is taken out of
    the demand for that (`consolidation.settled`)."""
    promises = state.standing.promises
    moving = {each: None for each, promise in promises.items() if promise.is_on_its_way}
    able = {
        job_id: left
        for job_id in state.queued
        if job_id not in moving and (left := left_ms(state, now, state.jobs[job_id])) > 0
    }
    found: dict[int, Patient] = {}
    ahead_ms: dict[str, tuple[int, int]] = {}
    for job_id, gpu_type in demand_samples.homes(state, able).items() if able else ():
        if gpu_type not in ahead_ms:
            soon_min, later_min = demand_forecast.minutes_ahead(state, gpu_type)
            minute_ms = state.options.demand_minute_ms
            ahead_ms[gpu_type] = soon_min * minute_ms, later_min * minute_ms
        soon_ms, later_ms = ahead_ms[gpu_type]
        spec, left = state.jobs[job_id].spec, able[job_id]
        if left > soon_ms:
            beyond = left > soon_ms + later_ms
            found[job_id] = Patient(gpu_type, spec.gpus * spec.ranks, beyond)
    return found


def outlooks(state: State, now: Instant, seen: Sequence[Outlook]) -> list[Outlook]:
    """Without those."""
    return without(patients(state, now).values(), seen)


def without(patient: Iterable[Patient], seen: Sequence[Outlook]) -> list[Outlook]:
    waiting: dict[str, int] = {}
    beyond: dict[str, int] = {}
    for each in patient:
        waiting[each.gpu_type] = waiting.get(each.gpu_type, 0) + each.gpus
        beyond[each.gpu_type] = beyond.get(each.gpu_type, 0) + each.gpus * each.beyond
    return [
        _without(each, min(each.queued_gpus, waiting[each.gpu_type]), beyond[each.gpu_type])
        if each.gpu_type in waiting
        else each
        for each in seen
    ]


def _without(outlook: Outlook, gpus: int, beyond_gpus: int) -> Outlook:
    late = min(gpus, beyond_gpus)
    return replace(
        outlook,
        queued_gpus=outlook.queued_gpus - gpus,
        patient_gpus=gpus,
        soon_gpus=tuple(max(0.0, quantile - gpus) for quantile in outlook.soon_gpus),
        later_gpus=tuple(max(0.0, quantile - late) for quantile in outlook.later_gpus),
    )
