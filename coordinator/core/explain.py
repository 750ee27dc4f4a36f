"""Why a job waits, or why it runs where it runs: one sentence with numbers.

The sentence is made where the decision is made (`placement.py`, `gangs.py`); this module only
chooses which holds at present, so that log, CLI and page cannot tell different stories.
"""

from coordinator.core import coruns, poison, projects, standby
from coordinator.core.model import Job
from coordinator.core.phases import ATTEMPT_LIVE, AttemptPhase, JobPhase
from coordinator.core.state import Instant, State


def explain(state: State, now: Instant, job: Job) -> str:
    reason = state.wait_reason(job)
    aside = poison.describe(state, job)
    tail = f"; {aside}" if aside and "set aside" not in reason else ""
    if job.phase is JobPhase.QUEUED:
        return f"job {job.id} waits: {reason}{tail}"
    if job.phase is JobPhase.HELD:
        if job.trouble is not None and job.trouble.quarantined:
            return f"job {job.id} is held: {reason}"
        return f"job {job.id} is held: `baton release {job.id}` lets it start"
    attempt = state.current(job)
    if job.phase in (JobPhase.ACTIVE, JobPhase.CANCELLING) and job.spec.ranks > 1:
        return _explain_gang(state, now, job) + tail + _lent(state, now, job)
    if job.phase is JobPhase.ACTIVE and attempt is not None:
        age = seconds((now.unix_ms - attempt.assigned_unix_ms) / 1000)
        if attempt.phase is AttemptPhase.STOPPING:
            return f"job {job.id} is saving and leaving {attempt.node}: {attempt.stop_reason}"
        after = standby.describe(state, job, attempt.node, attempt.replica_node)
        tail += (f"; {after}" if after else "") + _lent(state, now, job)
        beside = coruns.describe(state, job)
        tail += f"; {beside}" if beside else ""
        return f"job {job.id} {reason}; attempt {attempt.id}, for {age}{tail}"
    if job.phase is JobPhase.CANCELLING and attempt is not None:
        return f"job {job.id} is being cancelled: attempt {attempt.id} is leaving {attempt.node}"
    return f"job {job.id} has {job.phase.value}: {reason}"


def _lent(state: State, now: Instant, job: Job) -> str:
    why = projects.why_runs(state, now, job)
    return f"; {why}" if why else ""


def _explain_gang(state: State, now: Instant, job: Job) -> str:
    """All of its ranks, and those that are not as they should be."""
    gang = state.gang(job)
    left = [rank for rank in gang if rank.phase in ATTEMPT_LIVE]
    nodes = " and ".join(dict.fromkeys(rank.node for rank in left))
    what = f"{len(left)} of {len(gang)} ranks"
    if job.phase is JobPhase.CANCELLING:
        return f"job {job.id} is being cancelled: {what} are leaving {nodes}"
    stopped = next((rank for rank in left if rank.stop_reason), None)
    if stopped is not None:
        return f"job {job.id} is ending: {what} are leaving {nodes}: {stopped.stop_reason}"
    away = next((rank for rank in gang if rank.phase is AttemptPhase.UNREACHABLE), None)
    if away is not None:
        on = f"rank {away.rank} on {away.node} is out of reach"
        return f"job {job.id} runs with {what}, on {nodes}, and ends if {on} for longer"
    running = sum(1 for rank in gang if rank.phase is AttemptPhase.RUNNING)
    age = seconds((now.unix_ms - gang[0].assigned_unix_ms) / 1000)
    reason = state.wait_reason(job)
    return f"job {job.id} {reason}; try {job.epoch}, {running} of {len(gang)} running, for {age}"


def seconds(duration_s: float) -> str:
    """A duration for people: "42 s", "3 min", "5.2 h"."""
    if duration_s < 120:
        return f"{max(0, duration_s):.0f} s"
    if duration_s < 7_200:
        return f"{duration_s / 60:.0f} min"
    return f"{duration_s / 3600:.1f} h"
