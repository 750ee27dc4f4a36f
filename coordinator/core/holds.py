"""Since when who holds GPUs, and who held them before: what a forecast learns ages from.

Problem: a series says how much is held, not by whom, and whoever has run for a day mostly runs for
another. Ages of those who ran at each moment of the past are in no series. But they are in the
attempts, which are kept anyway.

How: a job is one life, from its first attempt on, however often it was handed over, until it has
ended: what waits to go on is wanted still. It has two where it had ended, or was held, and somebody
let it go on. It counts with the GPUs of its last attempts, on which types these are.

Not all jobs are kept, and not all that are kept are looked at: the newest. Until a moment, which
the answer names, some that had ended are missing; of those that ended later all are there, and so
all that held anything since.
"""

from collections.abc import Iterator
from typing import Final

from coordinator.core import jobs
from coordinator.core.accounting import end_unix_ms
from coordinator.core.demand_history import OTHER, Series, matches
from coordinator.core.demand_messages import Hold, Holds
from coordinator.core.demand_samples import counts_as
from coordinator.core.model import Attempt, Job
from coordinator.core.phases import JobPhase
from coordinator.core.state import Instant, State

# That are looked at in the loop, some microseconds each; ten thousand jobs that have ended are kept
# at most, and mostly have one.
ATTEMPTS_MAX: Final = 100_000
# Between an end and the next wait, if the job went on by itself.
GAP_MS: Final = 60_000


def read(state: State, now: Instant, which: Series, begin_unix_ms: int) -> Holds | None:
    """In minutes after that begin. `None`: which jobs are in `which` is not known any more."""
    if OTHER in (which.gpu_type, which.project):
        return None
    minute_ms = state.options.demand_minute_ms

    def minutes(unix_ms: int) -> float:
        return (unix_ms - begin_unix_ms) / minute_ms

    since_ms = forgot_until_unix_ms(state)
    found: list[Hold] = []
    looked = 0
    for job in _newest_first(state):
        attempts = state.attempts_of(job.id)
        looked += len(attempts)
        if looked > ATTEMPTS_MAX:
            since_ms = job.ended_unix_ms or now.unix_ms
            break
        for life in _lives(attempts, now):
            gpus = sum(
                count
                for attempt in life
                if attempt.epoch == life[-1].epoch
                for series, count in counts_as(state, attempt)
                if matches(which, series)
            )
            if gpus:
                end_ms = _end_ms(job, life, now, newest=life[-1] is attempts[-1])
                begin, end = minutes(life[0].assigned_unix_ms), end_ms and minutes(end_ms)
                found.append(Hold(gpus, begin, end))
    return Holds(tuple(found), None if since_ms is None else minutes(since_ms))


def forgot_until_unix_ms(state: State) -> int | None:
    """Of jobs that ended before some are not kept any more; `None`: all are."""
    left = jobs.first_to_forget(state)
    if left is None or len(state.jobs) >= state.last_job_id:
        return None
    return state.jobs[left].ended_unix_ms


def _newest_first(state: State) -> Iterator[Job]:
    """Those that may go on, then the others, the last to end first."""
    for job_id in state.job_attempts:
        if job_id not in state.ended:
            yield state.jobs[job_id]
    for job_id in reversed(state.ended):
        yield state.jobs[job_id]


def newest_life(state: State, now: Instant, job_id: int) -> list[Attempt]:
    """Of a job its attempts since it last began; none where it never did."""
    life: list[Attempt] = []
    for each in _lives(state.attempts_of(job_id), now):
        life = each
    return life


def _lives(attempts: list[Attempt], now: Instant) -> Iterator[list[Attempt]]:
    life: list[Attempt] = []
    for attempt in attempts:
        queued_ms = attempt.times.queued_unix_ms
        if life and queued_ms is not None and attempt.epoch != life[-1].epoch:
            if queued_ms - end_unix_ms(life[-1], now.unix_ms) > GAP_MS:
                yield life
                life = []
        life.append(attempt)
    if life:
        yield life


def _end_ms(job: Job, life: list[Attempt], now: Instant, *, newest: bool) -> int | None:
    """`None`: it goes on, or waits to."""
    if not newest or job.phase is JobPhase.HELD:
        return end_unix_ms(life[-1], now.unix_ms)
    return job.ended_unix_ms
