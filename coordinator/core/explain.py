"""Why a job waits, or why it runs where it runs: one sentence with numbers.

The sentence is made where the decision is made (`placement.py`, `attempts.py`); this module only
chooses which holds at present, so that log, CLI and page cannot tell different stories.
"""

from coordinator.core import poison, standby
from coordinator.core.model import Job
from coordinator.core.phases import AttemptPhase, JobPhase
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
    if job.phase is JobPhase.ACTIVE and attempt is not None:
        age = seconds((now.unix_ms - attempt.assigned_unix_ms) / 1000)
        if attempt.phase is AttemptPhase.STOPPING:
            return f"job {job.id} is saving and leaving {attempt.node}: {attempt.stop_reason}"
        after = standby.describe(state, job, attempt.node, attempt.replica_node)
        tail += f"; {after}" if after else ""
        return f"job {job.id} {reason}; attempt {attempt.id}, for {age}{tail}"
    if job.phase is JobPhase.CANCELLING and attempt is not None:
        return f"job {job.id} is being cancelled: attempt {attempt.id} is leaving {attempt.node}"
    return f"job {job.id} has {job.phase.value}: {reason}"


def seconds(duration_s: float) -> str:
    """A duration for people: "42 s", "3 min", "5.2 h"."""
    if duration_s < 120:
        return f"{max(0, duration_s):.0f} s"
    if duration_s < 7_200:
        return f"{duration_s / 60:.0f} min"
    return f"{duration_s / 3600:.1f} h"
