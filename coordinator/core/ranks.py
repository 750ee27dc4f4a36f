"""One attempt's own steps: the only functions that change its phase, and the order to stop.

Problem: an attempt is a whole job, or one rank of a gang whose other ranks it concerns. What such a
step means for the job is decided in `gangs.py`; mixed with the step itself, one of the two would be
forgotten somewhere. Here nothing is known of jobs but their grace.
"""

from dataclasses import replace

from coordinator.core import accounting
from coordinator.core.messages import StopAttempt
from coordinator.core.model import Attempt, AttemptTimes
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    ATTEMPT_TRANSITIONS,
    AttemptPhase,
    advance,
)
from coordinator.core.state import Instant, State


def change(
    state: State, now: Instant, attempt: Attempt, phase: AttemptPhase, **fields: object
) -> Attempt:
    """The only way from one attempt phase to the next. An ended attempt gives back its GPUs."""
    advance(ATTEMPT_TRANSITIONS, attempt.phase, phase, f"attempt {attempt.id}")
    times = fields.pop("times", attempt.times)
    assert isinstance(times, AttemptTimes)
    fields["times"] = accounting.noted(times, state.progress.get(attempt.id))
    if phase in ATTEMPT_ENDED:
        fields["ended_unix_ms"] = now.unix_ms
        live = state.nodes.get(attempt.node)
        if live is not None:
            state.release_gpus(live, attempt.id)
    return state.put_attempt(replace(attempt, phase=phase, **fields))  # type: ignore[arg-type]


def stop(
    state: State,
    now: Instant,
    attempt: Attempt,
    reason: str,
    grace_ms: int | None,
    *,
    precopy_ms: int | None = None,
) -> bool:
    """Ask one attempt to save and leave within `grace_ms`, or kill it. Asking again repeats the
    order; the first reason stays, and who cannot wait for a pre-copy ends the one that is on its
    way. Whether it had not been asked before."""
    first = not attempt.stop_reason
    if first:
        unreachable = attempt.phase is AttemptPhase.UNREACHABLE
        phase = attempt.phase if unreachable else AttemptPhase.STOPPING
        fields = {"stop_reason": reason, "reason": reason, "precopy_ms": precopy_ms}
        attempt = change(state, now, attempt, phase, **fields)
    elif attempt.precopy_ms is not None and precopy_ms is None:
        attempt = state.put_attempt(replace(attempt, precopy_ms=None))
    order_stop(state, now, attempt, grace_ms)
    return first


def order_stop(state: State, now: Instant, attempt: Attempt, grace_ms: int | None) -> None:
    state.ordered_ms[attempt.id] = now.now_ms
    precopy_ms = None if grace_ms is None else attempt.precopy_ms
    order = StopAttempt(attempt.id, grace_ms, attempt.stop_reason, precopy_ms)
    state.send(attempt.node, order)


def lose(state: State, now: Instant, attempt: Attempt, reason: str) -> None:
    """It is over though nobody saw it end."""
    times = attempt.times
    if times.silent_unix_ms is None:
        times = replace(times, silent_unix_ms=last_heard_unix_ms(state, now, attempt))
    change(state, now, attempt, AttemptPhase.LOST, reason=reason, times=times)
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.lost", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip


def last_heard_unix_ms(state: State, now: Instant, attempt: Attempt) -> int:
    """When its node last gave a sign of life; for one that a restarted coordinator has not heard
    yet, what is written down of it."""
    live = state.nodes.get(attempt.node)
    if live is None or live.newest_session < 0:
        written = [attempt.assigned_unix_ms, attempt.started_unix_ms or 0]
        for checkpoint in state.checkpoints.get(attempt.job_id, []):
            if checkpoint.epoch == attempt.epoch:
                written.append(checkpoint.committed_unix_ms)
        return max(written)
    return now.unix_ms - (now.now_ms - live.heard_ms)
