"""How many running jobs are stopped for the better, and how soon: one bound for all who do it.

Problem: a decision over all jobs, room for a large one, a plan that empties nodes, a deadline and
two that are slow on one GPU each have a good reason to stop somebody. Each stop costs a restart and
the traffic of a checkpoint, and five of them with a bound each would be five times as many.

So all count in `moves_per_hour`. Two that lose by one another are the exception: where the bound is
reached both would stay slower than need be, for hours. They part all the same, once the one that
leaves has run for its minimum, of which its restart is a tenth. And before that a job leaves so
only `HURRIES_PER_HOUR`: one that is no company for anybody would else be tried beside one after
the other, twenty an hour.
"""

from coordinator.core import costs
from coordinator.core.allocation import run_s_min
from coordinator.core.model import Attempt
from coordinator.core.state import Instant, State

HOUR_MS = 3_600_000
HURRIES_PER_HOUR = 3


def left(state: State) -> int:
    """How many may be stopped now; 0 or less: nobody."""
    return state.options.moves_per_hour - len(state.standing.moves_ms)


def note(state: State, now: Instant) -> None:
    """One is being stopped."""
    state.standing.moves_ms.append(now.now_ms)


def forget(state: State, now: Instant) -> None:
    """What was longer ago than an hour."""
    moves_ms = state.standing.moves_ms
    state.standing.moves_ms = [at for at in moves_ms if now.now_ms - at < HOUR_MS]


def has_run(state: State, now: Instant, attempt: Attempt) -> bool:
    """For its minimum, as whoever is moved has to."""
    restart_s = costs.restart_s(state, now, state.jobs[attempt.job_id])
    ran_s = (now.unix_ms - attempt.assigned_unix_ms) / 1000
    return ran_s >= run_s_min(restart_s, state.options.aims)


def may_part(state: State, now: Instant, attempt: Attempt) -> bool:
    """Whether one that loses by its company may leave it now."""
    since_unix_ms = now.unix_ms - HOUR_MS
    tries = [one for one in state.attempts_of(attempt.job_id) if one.stretches]
    parted = [one for one in tries if one is not attempt and one.assigned_unix_ms >= since_unix_ms]
    hurries = left(state) > 0 and len(parted) < HURRIES_PER_HOUR
    return hurries or has_run(state, now, attempt)
