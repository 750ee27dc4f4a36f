"""What becomes of the trials of an array (`arrays.py`): who gets a place, and what is asked of all.

Problem: a place that has come free must be somebody's at once, and nobody else's while an attempt
of his may still run on a node that is away, over restarts as well. A trial that cannot start, since
its checkpoint is out of reach for nobody knows how long, must not keep one from the others. And
whoever plans for the time after the trials that run must know that others of their array follow.

How: at the begin of each round free places are given to those behind, those first that have begun
before, then in the order of their indices; not to who cannot start. Who waits for a checkpoint out
of reach gives his place up; where an attempt of his may come back with it, after `RETURN_MS_MAX`,
and then that is given up, too. How long a trial takes is the median of the array's last ones that
succeeded.
"""

import heapq
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, TypeVar

from coordinator.core import attempts, checkpoints, costs
from coordinator.core.arrays import Array
from coordinator.core.messages import (
    Answer,
    CancelJob,
    HoldJob,
    Refusal,
    RefusalKind,
    ReleaseJob,
    RequeueJob,
)
from coordinator.core.model import CLASS_RANK, Job, JobView
from coordinator.core.phases import ATTEMPT_ENDED, JobPhase
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State

# For so long others wait for a node that is away, as for a gang that fails at its start: longer
# than most outages, and short beside a trial.
RETURN_MS_MAX: Final = 600_000
# Of what is to come nobody looks further (`held_ahead.LOOKS_MIN`), and then it has to be over.
LASTS_MS_MAX: Final = 6 * 86_400_000

_Verb = TypeVar("_Verb", CancelJob, HoldJob, ReleaseJob, RequeueJob)


def admit(state: State) -> None:
    """Those who get a place are looked at in this round as if they had just come."""
    for array_id in list(state.indices.arrays.wanting):
        array = state.indices.arrays.by_id[array_id]
        able = (order for job_id in array.behind if (order := _order(state, state.jobs[job_id])))
        for _, _, job_id in heapq.nsmallest(array.free, able) if array.free else ():
            array.behind.pop(job_id)
            state.queued[job_id] = state.fresh[job_id] = None
        if not (array.behind and array.free):
            state.indices.arrays.wanting.pop(array_id)


def _order(state: State, job: Job) -> tuple[bool, bool, int] | None:
    """Lowest first; `None`: it cannot start. After our restart an attempt may still run
    somewhere."""
    open_still = _may_return(state, job)
    if not open_still and checkpoints.head_within_reach(state, job):
        return None
    return not open_still, job.epoch == 0, job.id


def _may_return(state: State, job: Job) -> bool:
    return any(attempt.phase not in ATTEMPT_ENDED for attempt in state.gang(job))


def step_back(state: State, now: Instant, job: Job) -> None:
    """It waits for what is not there; if that is its checkpoint, its place is another's."""
    array = state.indices.arrays.of(job)
    if array is None or not array.behind or job.id in state.standing.promises:
        return
    if not checkpoints.head_within_reach(state, job):
        return
    if _may_return(state, job):
        if now.now_ms - state.waiting_ms.get(job.id, now.now_ms) < RETURN_MS_MAX:
            return
        attempts.let_go(state, now, job, "others of its array have waited for its place")
    state.queued.pop(job.id)
    array.behind[job.id] = None
    state.indices.arrays.wanting[job.array_id] = None
    state.dirty = True


def each(
    state: State,
    now: Instant,
    body: _Verb,
    verb: Callable[[State, Instant, _Verb], Answer],
    leave: Collection[JobPhase] = (),
) -> Answer:
    """The same of all trials, but for those in a phase to `leave`; refused where there is none for
    whom it makes sense."""
    job = state.jobs.get(body.job_id)
    array = None if job is None else state.indices.arrays.of(job)
    if array is None:
        which = f"there is no job {body.job_id}" if job is None else f"job {job.id} is of no array"
        return Refusal(RefusalKind.NOT_FOUND, which)
    asked = [each for each, phase in sorted(array.phases.items()) if phase not in leave]
    left = array.counts[JobPhase.ACTIVE], array.counts[JobPhase.SUCCEEDED]
    answers = [verb(state, now, replace(body, job_id=each, array=False)) for each in asked]
    views = [answer for answer in answers if isinstance(answer, JobView)]
    if views:
        return replace(views[0], changed=len(views), left=left if leave else (0, 0))
    none = f"this can be done for no trial of array {state.jobs[body.job_id].array_id}"
    for no in (answer for answer in answers if isinstance(answer, Refusal)):
        return Refusal(no.kind, f"{none}; {no.sentence}")
    runs, over = quantity(left[0], "runs", "run"), quantity(left[1], "has", "have")
    words = [runs] * bool(left[0]) + [f"{over} succeeded"] * bool(left[1])
    return Refusal(RefusalKind.WRONG_PHASE, f"{none}; {' and '.join(words)}: see --all")


def followed(state: State, whole: str, job: Job) -> bool:
    """Whether others of its array, who come before the job, take what this one leaves."""
    left = state.jobs[int(whole.partition(".")[0])]
    array = state.indices.arrays.of(left)
    if array is None or not array.behind or left.array_id == job.array_id:
        return False
    ranks = [CLASS_RANK[one.spec.job_class] for one in (left, job)]
    return (ranks[0], left.array_id) < (ranks[1], job.id)


@dataclass(frozen=True, slots=True)
class Refill:
    """`times` so many trials more follow in each place of an array, on average; `trial_ms`: one
    takes so long; `None`: none has ended yet."""

    times: float
    trial_ms: float | None

    def lasts_ms(self, guess_ms: float) -> int:
        """`guess_ms`: of whoever is there now."""
        each_ms = guess_ms if self.trial_ms is None else self.trial_ms
        return round(min(LASTS_MS_MAX, self.times * each_ms))


NO_REFILL = Refill(0.0, 0.0)


def refills(state: State, now: Instant) -> dict[int, Refill]:
    """By array, where somebody is behind."""
    return {
        array_id: Refill(len(array.behind) / array.plan.limit, _trial_ms(state, now, array))
        for array_id, array in state.indices.arrays.by_id.items()
        if array.behind
    }


def _trial_ms(state: State, now: Instant, array: Array) -> float | None:
    found = []
    for job_id in array.ended:
        job = state.jobs.get(job_id)
        if job is not None and job.spec.gpus:
            had_gpu_s = costs.attained_gpu_s(state.attempts_of(job_id), now)
            found.append(1_000 * had_gpu_s / (job.spec.ranks * job.spec.gpus))
    return median(found) if found else None
