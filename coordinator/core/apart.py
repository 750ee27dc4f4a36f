"""Who shares a GPU only where that pays, and has to have one to himself to keep a deadline.

Problem: company that pays costs a job up to a third of its speed, and with that its deadline, which
it would keep alone. From its latest start on, by its speed alone, such a job has to run alone. It
is asked at each decision over all jobs, of those for which it is late (`deadlines.py`) and that
would not be in time as fast as they are beside the other:

1. The other one leaves by checkpoint, if it shares only where that pays, too, which is never one of
   a higher class, nor one within its project's quota for one beyond. It must not lose more than by
   any move within its class (`moves.py`): it has run for its minimum and has saved, nothing is
   promised to it, and it has no deadline near. That costs the one in a hurry nothing.
2. Else it leaves itself, if it has saved and a GPU is free, of a type on which it may be in time.
   That is promised to it.
3. Else they stay, and the next decision looks again.

Nobody comes beside it then (`company.py`). Each that leaves counts among the moves of an hour. Who
asked to share whatever comes of it is neither sent away for that, nor gets out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coordinator.core import contenders, coruns, costs, deadlines, moves, stop_bounds
from coordinator.core.allocation import (
    MS_PER_S,
    Contender,
    Option,
    is_late,
    latest_start_ms,
    run_s_min,
)
from coordinator.core.contenders import DEADLINE_MARGIN_MS
from coordinator.core.model import CLASS_RANK, Attempt, JobIntent
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.standing import Entrant, Promise
from coordinator.core.state import Instant, State


def make(state: State, now: Instant, aside: Sequence[Entrant], lent: Mapping[int, None]) -> None:
    """Of these, who share a GPU or will, each that has to run alone now; `lent` are the jobs beyond
    their projects' quotas."""
    late = deadlines.late(state)
    for entrant in aside:
        job, attempt = entrant.job, state.current(entrant.job)
        if stop_bounds.left(state) <= 0:
            return
        runs = job.phase is JobPhase.ACTIVE and attempt is not None
        if runs and attempt is not None and job.id in late and job.spec.share_automatic:
            _part(state, now, entrant, attempt, lent)


def _part(
    state: State, now: Instant, entrant: Entrant, attempt: Attempt, lent: Mapping[int, None]
) -> None:
    others = [state.attempts.get(holder) for holder in contenders.beside(state, attempt)]
    other = others[0] if len(others) == 1 else None
    if other is None or any(
        each.phase is not AttemptPhase.RUNNING for each in (attempt, other)
    ):  # it starts, or one leaves already
        return
    job = entrant.job
    (here,) = entrant.contender.options
    if _in_time(now, entrant.contender, here.rate * coruns.kept_ratio(state, attempt, other)):
        return
    why = f"job {job.id}, {deadlines.must_start(now, job, alone=True)}"
    within = entrant.contender.lent and other.job_id not in lent
    if not within and _may_leave(state, now, entrant, other):
        moves.send_away(state, now, state.jobs[other.job_id], f"gives way to {why}", "")
        return
    free = coruns.free_elsewhere(state, job, attempt, _too_slow(now, entrant)) if job.head else ""
    if free:
        why = "moves to where it has a GPU to itself, to keep its deadline"
        moves.send_away(state, now, job, why, "")
        until_ms = moves.until_left_ms(state, now, [job.id])
        state.standing.promises[job.id] = Promise(free, until_ms, now.now_ms)


def _in_time(now: Instant, contender: Contender, rate: float) -> bool:
    need_ms = (contender.steps_left or 0.0) / rate * MS_PER_S
    return now.now_ms + need_ms <= (contender.deadline_ms or 0)


def _may_leave(state: State, now: Instant, entrant: Entrant, other: Attempt) -> bool:
    job, contender = state.jobs[other.job_id], entrant.contender
    restart_s = costs.restart_s(state, now, job)
    away_s = run_s_min(restart_s, state.options.aims) + restart_s
    return (
        job.spec.share_automatic
        and CLASS_RANK[job.spec.job_class] >= contender.rank
        and job.intent is JobIntent.RUN
        and bool(job.head)
        and job.id not in state.standing.promises
        and stop_bounds.has_run(state, now, other)
        and not deadlines.is_close(state, now, job, away_s * MS_PER_S + DEADLINE_MARGIN_MS)
    )


def _too_slow(now: Instant, entrant: Entrant) -> list[str]:
    """The types on which it would be too late by more than speeds may be wrong."""
    found = []
    for gpu_type, rate in zip(entrant.rates.types, entrant.rates.mean, strict=True):
        there = replace(entrant.contender, options=(Option(gpu_type, 1, rate),))
        if latest_start_ms(there) <= now.now_ms and not is_late(there, now.now_ms):
            found.append(gpu_type)
    return found
