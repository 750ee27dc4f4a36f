"""Failures that repeat at one step: first the checkpoint is suspected, then the job.

Problem: a training that dies at the same step each time it resumes has one of two causes. The
checkpoint holds something that kills it (a state gone to NaN, a position in the data at a broken
record that was reached with a bad state), or the program would die there from any state. Retrying
from the same checkpoint helps with neither, and throwing the checkpoint away loses work where it
was not to blame. The retry limit alone sees only a number.

So a job remembers where it failed and from which checkpoints (`Trouble`):

1. Two failures at one step, restored from the same checkpoint, while that is the last one: it is
   *set aside*, and the next attempt starts from the one before it.
2. Another failure at that step, from whatever checkpoint, or two at another one: the job is
   *quarantined*, held with a sentence. So it is at once where no checkpoint before is within reach,
   and after three failures there from checkpoints that were each saved on the way out. If nothing
   was committed meanwhile, what was set aside is the last checkpoint again: others fail likewise,
   so it is not to blame, and nothing is lost.
3. A commit beyond that step is progress, and all of this is forgotten.

Only exits that somebody saw count here: no stops, no lost nodes, no process that was gone after a
reboot. A node may be to blame as well, so the next attempt goes to another one where it can
(`outcomes.py`). Every failure counts towards the job's `max_restarts` too. One that quarantines the
job does so whatever that limit is, since a sentence about the place says more than a number;
otherwise the limit is looked at first, so a job with few restarts fails before its checkpoint is
suspected.
"""

from dataclasses import replace
from enum import Enum

from coordinator.core.model import Attempt, Checkpoint, Job, JobIntent, Trouble
from coordinator.core.phases import JobPhase
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State, cut

# From one checkpoint, at one step. One may be chance.
FAILURES_SUSPECT = 2
# At one step, from whatever checkpoints: as many as one that is set aside leads to.
FAILURES_HOPELESS = 3
# Restores that are remembered, for the sentence; verdicts need three at most.
TRIED_MAX = 8


class Verdict(Enum):
    """What a failure leads to."""

    RETRY = "retry"
    STEP_BACK = "step back"
    QUARANTINE = "quarantine"


def judge(
    trouble: Trouble | None, restored: tuple[str, int], step: int, *, last: bool, older: bool
) -> tuple[Trouble, Verdict]:
    """What follows from a failure at `step` of an attempt that was restored from `restored`, a
    digest and its step. `last`: that is still the last checkpoint; `older`: one before it is
    within reach."""
    if trouble is None or step != trouble.step:
        # Another place, and no commit beyond the one before: what was set aside remains so.
        return replace(trouble or Trouble(step), step=step, tried=(restored,)), Verdict.RETRY
    tried = (*trouble.tried, restored)[-TRIED_MAX:]
    trouble = replace(trouble, tried=tried)
    if trouble.set_aside:
        return trouble, Verdict.QUARANTINE
    if last and tried.count(restored) >= FAILURES_SUSPECT:
        return trouble, Verdict.STEP_BACK if older else Verdict.QUARANTINE
    return trouble, Verdict.RETRY if len(tried) < FAILURES_HOPELESS else Verdict.QUARANTINE


def note(state: State, attempt: Attempt) -> Verdict:
    """Remember a failure; what follows from it is for the caller to do."""
    if not attempt.restored_digest:
        return Verdict.RETRY
    job = state.jobs[attempt.job_id]
    # What it last said; one that said nothing has not gone beyond what it resumed from.
    step = max(attempt.restored_step, attempt.times.step or 0)
    good = state.good_checkpoints(job)
    trouble, verdict = judge(
        job.trouble,
        (attempt.restored_digest, attempt.restored_step),
        step,
        last=attempt.restored_digest == job.head,
        older=len(good) > 1 and state.reachable(good[1]),
    )
    state.put_job(replace(job, trouble=trouble))
    return verdict


def step_back(state: State, now: Instant, job: Job) -> str:
    """Set the last checkpoint aside; returns a sentence that says so."""
    bad, before = state.good_checkpoints(job)[:2]
    assert job.trouble is not None
    times = job.trouble.tried.count((bad.digest, bad.step))
    why = f"{quantity(times, 'attempt')} from it failed at step {job.trouble.step}"
    state.put_checkpoint(replace(bad, bad=f"set aside: {why}"))
    trouble = replace(job.trouble, set_aside=bad.digest)
    state.put_job(replace(job, head=before.digest, head_step=before.step, trouble=trouble))
    sentence = (
        f"checkpoint {bad.digest[:12]} (step {bad.step}) is set aside, since {why}; the next"
        f" attempt starts from {before.digest[:12]} (step {before.step})"
    )
    state.tell(now.unix_ms, job.id, "checkpoint.set_aside", sentence)
    return sentence


def quarantine(state: State, now: Instant, job: Job, how: str) -> None:
    """Hold it, with a sentence that says why; `how` its last attempt ended."""
    assert job.trouble is not None
    count, tried = len(job.trouble.tried), _tried(state, job, job.trouble)
    job = put_back(state, job)
    assert job.trouble is not None
    sentence = (
        f"quarantined: {how} at step {job.trouble.step}, {quantity(count, 'time')}, {tried};"
        f" `baton logs {job.id}` shows what it wrote, and `baton requeue {job.id}` runs it again"
        f" from step {job.head_step}"
    )
    sentence = cut(sentence)
    trouble = replace(job.trouble, quarantined=True)
    state.put_job(
        replace(job, phase=JobPhase.HELD, intent=JobIntent.HOLD, reason=sentence, trouble=trouble)
    )
    state.tell(now.unix_ms, job.id, "job.quarantined", sentence)


def _tried(state: State, job: Job, trouble: Trouble) -> str:
    """ "restored from aaaa (step 120) twice and from bbbb (step 100) once"."""
    words = {1: "once", 2: "twice"}
    parts = []
    for digest, step in dict.fromkeys(trouble.tried):
        count = trouble.tried.count((digest, step))
        times = words.get(count, f"{count} times")
        parts.append(f"from checkpoint {digest[:12]} (step {step}) {times}")
    only = ""
    if len(parts) == 1 and not trouble.set_aside:
        older = len(state.good_checkpoints(job)) > 1
        only = "the one before it is out of reach" if older else "there is none before it"
        only = f", and {only}"
    return f"restored {' and '.join(parts)}{only}"


def put_back(state: State, job: Job) -> Job:
    """What was set aside is the last checkpoint again, unless something was committed instead."""
    trouble = job.trouble
    if trouble is None or not trouble.set_aside:
        return job
    aside, good = _aside(state, job), state.good_checkpoints(job)
    # What was committed since has a later epoch, for nobody else commits beside an attempt.
    if aside is not None and all(one.epoch <= aside.epoch for one in good):
        # Dropped first: the last checkpoint stands last, wherever it stood meanwhile.
        state.drop_checkpoint(aside)
        state.put_checkpoint(replace(aside, bad=""))
        job = replace(job, head=aside.digest, head_step=aside.step)
    return state.put_job(replace(job, trouble=replace(trouble, set_aside="")))


def _aside(state: State, job: Job) -> Checkpoint | None:
    digest = job.trouble.set_aside if job.trouble is not None else ""
    kept = state.checkpoints.get(job.id, [])
    return next((one for one in kept if one.digest == digest), None)


def progressed(trouble: Trouble | None, step: int) -> Trouble | None:
    """What is left of it after a commit at `step`."""
    return None if trouble is None or step > trouble.step else trouble


def describe(state: State, job: Job) -> str:
    """Which checkpoint is not used at present, and why; empty when all are."""
    aside = _aside(state, job)
    if aside is None:
        return ""
    return f"checkpoint {aside.digest[:12]} (step {aside.step}) is {aside.bad}"
