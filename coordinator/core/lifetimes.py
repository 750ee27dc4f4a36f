"""Ages of jobs in the live coordinator: who has ended, who lives, and what follows for the latter.

Problem: the table (`life_table.py`) is to hear of every end once, in a loop in which everybody
waits, and ten thousand of them at once after a restart.

How: an age is that of a job, from its first attempt on, whatever moved it (`holds.py`). With each
sample of demand it is seen whose attempts have ended; those whose jobs have ended are told with the
ticks, some at a time. A restart begins with all that are kept: the same, but for what was forgotten
with jobs that are not kept any more. Chances are made anew when somebody asks and some minutes have
passed.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Final

from coordinator.core import demand_samples, holds
from coordinator.core.demand_history import DAY_MS
from coordinator.core.life_table import AGE_MS_MIN, Chances, Kind, kind_of
from coordinator.core.model import Job
from coordinator.core.state import Instant, State

# Jobs that are told in a tick: a millisecond; all that are kept within some minutes.
TOLD_MAX: Final = 50
LEFT_MAX: Final = 20_000  # that are still to be told; twice as many as are kept
# Ages move on by little in the meantime, and what is known of them by less.
FRESH_MS: Final = 300_000
# Of more jobs that live every second is looked at, or every third, and so on.
LIVING_MAX: Final = 1_000


def tick(state: State, now: Instant) -> None:
    lives, left = state.scaler.lives, state.demand_history.counted.left
    if lives.forgot_ms is None or now.now_ms - lives.forgot_ms >= DAY_MS:
        lives.table.forget(days=0 if lives.forgot_ms is None else 1)
        lives.forgot_ms = now.now_ms
    for job_id in list(islice(left, max(0, len(left) - LEFT_MAX))):
        del left[job_id]
    for job_id in list(islice(left, TOLD_MAX)):
        del left[job_id]
        job = state.jobs.get(job_id)
        if job is not None and job.ended_unix_ms is not None:
            _tell(state, now, job, job.ended_unix_ms)


def _tell(state: State, now: Instant, job: Job, ended_unix_ms: int) -> None:
    life = holds.newest_life(state, now, job.id)
    counts = demand_samples.counts_as(state, life[-1]) if life else ()
    if counts:
        lasted_ms = ended_unix_ms - life[0].assigned_unix_ms
        kind = kind_of(counts[0][0].gpu_type, job.spec.gpus * job.spec.ranks)
        state.scaler.lives.table.ended(kind, lasted_ms, now.unix_ms - ended_unix_ms)


def chances(state: State, now: Instant) -> Chances:
    """As they are now, or were some minutes ago."""
    lives = state.scaler.lives
    if lives.chances is None or now.now_ms - lives.chances[0] >= FRESH_MS:
        lives.chances = now.now_ms, lives.table.among(_living(state, now))
    return lives.chances[1]


def age_ms(state: State, now: Instant, job_id: int) -> int:
    """Of who holds GPUs. Most have one attempt."""
    ids = state.job_attempts.get(job_id, ())
    if len(ids) == 1 and ids[0] in state.attempts:
        return max(AGE_MS_MIN, now.unix_ms - state.attempts[ids[0]].assigned_unix_ms)
    life = holds.newest_life(state, now, job_id)
    return max(AGE_MS_MIN, now.unix_ms - life[0].assigned_unix_ms) if life else AGE_MS_MIN


def _living(state: State, now: Instant) -> Iterator[tuple[Kind, int, int]]:
    held = state.demand_history.counted.held
    every = 1 + len(held) // LIVING_MAX
    for attempt_id in list(held)[::every]:
        job_id, counts = held[attempt_id]
        attempt = state.attempts.get(attempt_id)
        if attempt is not None and attempt.rank == 0 and counts and job_id not in state.queued:
            spec = state.jobs[job_id].spec
            kind = kind_of(counts[0][0].gpu_type, spec.gpus * spec.ranks)
            yield kind, age_ms(state, now, job_id), every
