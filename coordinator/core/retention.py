"""Which checkpoints are kept: the newest few of an open job, the last of an ended one, and every
one that a user pins.

Problem: the checkpoint that somebody wants next month (the best evaluation, the one before the data
changed) is never the newest, and a rule of "the last three" drops it within minutes. Copied away by
hand it is no longer known to be whole, nor to what it belongs.

A pin is a word in the checkpoint's own record, and the record is what everything else follows: as
long as it stands, the nodes' lists of what to keep name the checkpoint, so no sweep touches a chunk
of it. Pins outlive their job; of a job that has ended without any, the last checkpoint stays for as
long as the job is remembered. What is dropped for being over the number is decided in
`checkpoints.retain`.
"""

from dataclasses import replace

from coordinator.core import checkpoints
from coordinator.core.checkpoint_requests import (
    CheckpointChoice,
    FindCheckpoint,
    ListCheckpoints,
    PinCheckpoint,
    UnpinCheckpoint,
)
from coordinator.core.messages import Answer, CheckpointPage, Refusal, RefusalKind
from coordinator.core.model import Checkpoint, CheckpointView, Job
from coordinator.core.phases import ATTEMPT_ENDED, JOB_ENDED
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State

# Somebody who wants more wants an archive: export them.
PINS_PER_JOB_MAX = 64
# In the fleet. With what jobs keep by themselves, a node's list must stay within one message
# (`DIGESTS_MAX`), and the jobs that cannot be forgotten within `jobs_kept`.
PINS_MAX = 1_000
# As git does: fewer digits are a typing error.
DIGEST_CHARACTERS_MIN = 6
# Of a wish that nothing fits: how many steps the answer names.
STEPS_NAMED_MAX = 8


def list_checkpoints(state: State, body: ListCheckpoints) -> Answer:
    job = state.jobs.get(body.job_id)
    return _no_job(body.job_id) if job is None else _page(state, job)


def find(state: State, body: FindCheckpoint) -> Answer:
    """The one that is meant, as a page of one."""
    job = state.jobs.get(body.job_id)
    if job is None:
        return _no_job(body.job_id)
    fitting = _fitting(state, job, body.choice)
    if isinstance(fitting, Refusal):
        return fitting
    return CheckpointPage((_view(state, job, fitting[0]),))


def pin(state: State, now: Instant, body: PinCheckpoint) -> Answer:
    job = state.jobs.get(body.job_id)
    if job is None:
        return _no_job(body.job_id)
    fitting = _fitting(state, job, body.choice)
    if isinstance(fitting, Refusal):
        return fitting
    chosen = fitting[0]
    if not chosen.pinned:
        full = _refuse_pin(state, job)
        if full:
            return Refusal(RefusalKind.EXHAUSTED, full)
        state.put_checkpoint(replace(chosen, pinned=True))
        what = f"{_named(chosen)} is kept until it is unpinned"
        state.tell(now.unix_ms, job.id, "checkpoint.pinned", what)
    return _page(state, job)


def _refuse_pin(state: State, job: Job) -> str:
    mine = pins(state, job.id)
    if mine >= PINS_PER_JOB_MAX:
        return f"job {job.id} has {mine} pins and {PINS_PER_JOB_MAX} is the limit; unpin some"
    everywhere = sum(pins(state, known) for known in state.checkpoints)
    if everywhere >= PINS_MAX:
        return (
            f"{quantity(everywhere, 'checkpoint is', 'checkpoints are')} pinned and {PINS_MAX} is"
            " the limit of the fleet; unpin some, or export them"
        )
    return ""


def unpin(state: State, now: Instant, body: UnpinCheckpoint) -> Answer:
    job = state.jobs.get(body.job_id)
    if job is None:
        return _no_job(body.job_id)
    fitting: list[Checkpoint] | Refusal = list(state.checkpoints.get(job.id, []))
    if body.choice is not None:
        fitting = _fitting(state, job, body.choice)
    if isinstance(fitting, Refusal):
        return fitting
    for kept in [one for one in fitting if one.pinned]:
        state.put_checkpoint(replace(kept, pinned=False))
        what = f"{_named(kept)} is kept no longer than the newest are"
        state.tell(now.unix_ms, job.id, "checkpoint.unpinned", what)
    checkpoints.retain(state, state.jobs[job.id])
    return _page(state, job)


def pins(state: State, job_id: int) -> int:
    """How many of a job's checkpoints are pinned."""
    return sum(kept.pinned for kept in state.checkpoints.get(job_id, []))


def _fitting(state: State, job: Job, choice: CheckpointChoice) -> list[Checkpoint] | Refusal:
    """Those that may be meant, newest first and at least one: several only where they are of one
    step, since a trainer may save twice at it."""
    kept = state.checkpoints.get(job.id, [])[::-1]
    if choice.digest:
        if len(choice.digest) < DIGEST_CHARACTERS_MIN:
            least = f"give at least {DIGEST_CHARACTERS_MIN} digits of it"
            return Refusal(RefusalKind.INVALID, f"digest {choice.digest!r} is too short; {least}")
        found = [one for one in kept if one.digest.startswith(choice.digest)]
        if len(found) > 1:
            of_it = f"of job {job.id} begin with {choice.digest!r}"
            many = f"{quantity(len(found), 'checkpoint')} {of_it}"
            return Refusal(RefusalKind.INVALID, f"{many}; give more digits")
        wish = f"a checkpoint {choice.digest[:12]}"
    elif choice.step is not None:
        found = [one for one in kept if one.step == choice.step]
        wish = f"a checkpoint of step {choice.step}"
    else:
        found = state.good_checkpoints(job)[:1]
        wish = "a checkpoint"
    if found:
        return found
    steps = ", ".join(str(one.step) for one in kept[:STEPS_NAMED_MAX])
    has = f"it keeps those of steps {steps}" if kept else "it has committed none"
    return Refusal(RefusalKind.NOT_FOUND, f"job {job.id} does not keep {wish}; {has}")


def _page(state: State, job: Job) -> CheckpointPage:
    kept = state.checkpoints.get(job.id, [])[::-1]
    return CheckpointPage(tuple(_view(state, job, checkpoint) for checkpoint in kept))


def _view(state: State, job: Job, checkpoint: Checkpoint) -> CheckpointView:
    users = ["head"] if checkpoint.digest == job.head else []
    for attempt in state.attempts_of(job.id):
        running = attempt.phase not in ATTEMPT_ENDED and job.phase not in JOB_ENDED
        if running and attempt.restored_digest == checkpoint.digest:
            users.append(attempt.id)
    return CheckpointView(checkpoint, tuple(users))


def _named(checkpoint: Checkpoint) -> str:
    return f"checkpoint {checkpoint.digest[:12]} (step {checkpoint.step})"


def _no_job(job_id: int) -> Refusal:
    return Refusal(RefusalKind.NOT_FOUND, f"there is no job {job_id}")
