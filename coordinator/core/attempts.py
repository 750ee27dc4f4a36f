"""One execution of a job, from its assignment to what becomes of the job when it ends.

Problem: the same exit status means different things. 143 after a stop request is obedience, 143 out
of the blue is a failure; 75 says "run me again"; a process that dies at its first line will die
again. So an ending is judged from the attempt's whole story, in one place (`settle_exit`), and
every verdict is a sentence in the job's history.

Failures in a row without a commit further on are bounded by the job's `max_restarts`; within that
limit `poison.py` looks whether they repeat at one step. After one without any progress the next
attempt goes to another node where one fits, since a broken node fails everything. A job that has
neither committed nor resumed anything and leaves with an ordinary failure status is not tried
again: a missing module stays missing.
"""

from dataclasses import replace

from coordinator.core import accounting, checkpoints, poison, standby
from coordinator.core.messages import (
    AttemptExited,
    AttemptRefused,
    AttemptStarted,
    StopAttempt,
)
from coordinator.core.model import Attempt, AttemptTimes, Job, JobIntent, Progress
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    ATTEMPT_TRANSITIONS,
    AttemptPhase,
    GpuPhase,
    JobPhase,
    advance,
)
from coordinator.core.placement import Start
from coordinator.core.state import Instant, State, cut

# Between two tries of a failing job: doubling from one second, so that a broken job costs little
# and a passing fault (a full disk, a restarting file server) has minutes to pass.
RETRY_MS_FIRST = 1_000
RETRY_MS_MAX = 60_000
# "Run me again" without ever committing a further step is a loop; this many rounds of it are
# patience enough.
YIELDS_MAX = 20
# A shell reports a child that a signal ended as 128 + its number (POSIX.1-2017, shell, 2.8.2).
SIGNAL_STATUS_BASE = 128
# How long an attempt may go on training while what does not change is sent ahead of it. Nobody
# waits for a drained node by the second, and 60 s carry 7 GB over 1 Gbit/s; who preempts does wait.
# Nothing else allows it: who cancels wants it gone, a held job goes on nowhere, and a requeue is
# asked for by somebody who does not want this attempt to go on.
PRECOPY_DRAIN_MS = 60_000
PRECOPY_PREEMPTION_MS = 10_000


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


def assign(state: State, now: Instant, start: Start) -> None:
    """A new attempt with a higher epoch. From here on the one before it is stale, whatever its node
    believes."""
    job = state.jobs[start.job_id]
    old = state.current(job)
    if old is not None and old.phase is AttemptPhase.UNREACHABLE:
        reason = f"{job.id}.{job.epoch + 1} takes its place"
        change(state, now, old, AttemptPhase.LOST, reason=reason)
        state.tell(now.unix_ms, job.id, "attempt.lost", reason, attempt=old.id, node=old.node)
        job = state.jobs[job.id]
    said = None if old is None else state.progress.get(old.id)
    live = state.nodes[start.node]
    attempt = Attempt(
        job.id,
        job.epoch + 1,
        start.node,
        start.gpu_uuids,
        AttemptPhase.ASSIGNED,
        now.unix_ms,
        replica_node=standby.choose(state, job, start.node),
        times=accounting.following(job, old, said),
    )
    state.put_job(replace(job, phase=JobPhase.ACTIVE, epoch=attempt.epoch, reason=start.why))
    state.put_attempt(attempt)
    for uuid in start.gpu_uuids:
        state.set_gpu(live, uuid, GpuPhase.HELD, attempt.id)
    state.eligible_ms.pop(job.id, None)
    state.avoid.pop(job.id, None)
    state.tell(
        now.unix_ms, job.id, "attempt.assigned", start.why, attempt=attempt.id, node=start.node
    )
    order_start(state, now, attempt)


def order_start(state: State, now: Instant, attempt: Attempt) -> None:
    """Never without the head within reach: an attempt that began further back would undo
    progress."""
    out_of_reach = checkpoints.head_within_reach(state, state.jobs[attempt.job_id])
    if out_of_reach:
        lost(state, now, attempt, out_of_reach)
        return
    state.ordered_ms[attempt.id] = now.now_ms
    state.send(attempt.node, checkpoints.start_order(state, attempt))


def stop(
    state: State, now: Instant, attempt: Attempt, reason: str, precopy_ms: int | None = None
) -> None:
    """Ask an attempt to save and leave. Asking again repeats the order; the first reason stays, and
    who cannot wait for a pre-copy ends the one that is on its way."""
    if attempt.phase in ATTEMPT_ENDED:
        return
    if not attempt.stop_reason:
        if precopy_ms is not None:
            attempt = _aimed(state, attempt)
        fields = {"stop_reason": reason, "reason": reason, "precopy_ms": precopy_ms}
        unreachable = attempt.phase is AttemptPhase.UNREACHABLE
        phase = attempt.phase if unreachable else AttemptPhase.STOPPING
        attempt = change(state, now, attempt, phase, **fields)
        state.tell(
            now.unix_ms, attempt.job_id, "attempt.stopping", reason,
            attempt=attempt.id, node=attempt.node,
        )  # fmt: skip
    elif attempt.precopy_ms is not None and precopy_ms is None:
        attempt = state.put_attempt(replace(attempt, precopy_ms=None))
    order_stop(state, now, attempt)


def _aimed(state: State, attempt: Attempt) -> Attempt:
    """Its copies go where it goes from here on."""
    node_id = standby.aim(state, attempt.id)
    if node_id == attempt.replica_node:
        return attempt
    return checkpoints.send_copies_to(state, attempt, node_id)


def order_stop(state: State, now: Instant, attempt: Attempt) -> None:
    state.ordered_ms[attempt.id] = now.now_ms
    grace_ms = state.jobs[attempt.job_id].spec.grace_ms
    order = StopAttempt(attempt.id, grace_ms, attempt.stop_reason, attempt.precopy_ms)
    state.send(attempt.node, order)


def started(
    state: State, now: Instant, unix_ms: int, attempt: Attempt, body: AttemptStarted
) -> None:
    if attempt.started_unix_ms is not None:
        return  # said twice; what it has committed since stands
    job = state.jobs[attempt.job_id]
    resumes = checkpoints.fall_back(state, job, body)
    checkpoints.note_copy(state, job.id, body.restored_digest, attempt.node)
    for digest, reason in body.skipped:
        state.tell(
            now.unix_ms, job.id, "checkpoint.skipped", f"{digest[:12]}: {cut(reason)}",
            attempt=attempt.id, node=attempt.node,
        )  # fmt: skip
    phase = AttemptPhase.STOPPING if attempt.stop_reason else AttemptPhase.RUNNING
    change(
        state, now, attempt, phase, started_unix_ms=unix_ms,
        restored_digest=body.restored_digest, restored_step=body.restored_step,
        times=replace(attempt.times, restore_ms=body.restore_ms, start_ms=body.start_ms),
    )  # fmt: skip
    where = f"from step {body.restored_step}" if body.restored_digest else "from the beginning"
    state.tell(
        unix_ms, job.id, "attempt.started", f"process {body.pid} {where}",
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    if not resumes:
        # The head stands, so nothing that it makes can be committed; another node may do better.
        state.avoid[job.id] = attempt.node
        stop(
            state,
            now,
            state.attempts[attempt.id],
            f"it started {where} and not from the last commit",
        )


def progressed(state: State, now: Instant, attempt: Attempt, progress: Progress) -> None:
    """What its trainer last said. Only the first word is written down at once."""
    state.progress[attempt.id] = progress
    if attempt.started_unix_ms is not None and attempt.times.ready_ms is None:
        times = accounting.first_word(attempt, progress, now.unix_ms)
        state.put_attempt(replace(attempt, times=times))


def milestone(state: State, unix_ms: int, attempt: Attempt, name: str) -> None:
    """A moment that its trainer finds worth timing, by its node's clock."""
    state.tell(
        unix_ms, attempt.job_id, "attempt.milestone", cut(name),
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    if attempt.started_unix_ms is not None:
        times = accounting.ready(attempt.times, name, unix_ms - attempt.started_unix_ms)
        if times != attempt.times:
            state.put_attempt(replace(attempt, times=times))


def refused(state: State, now: Instant, attempt: Attempt, body: AttemptRefused) -> None:
    """The node could not start it. What another node would refuse too ends the job."""
    reason = cut(body.reason)
    change(state, now, attempt, AttemptPhase.REFUSED, reason=reason)
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.refused", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    job = state.jobs[attempt.job_id]
    if job.intent is JobIntent.CANCEL:
        end_job(state, now, job, JobPhase.CANCELLED, "cancelled by its owner")
    elif body.permanent:
        end_job(state, now, job, JobPhase.FAILED, reason)
    else:
        state.avoid[job.id] = attempt.node
        without = f" (`baton requeue --abandon {job.id}` goes on without its last checkpoint)"
        hint = without if checkpoints.may_abandon(state, job) else ""
        retry(state, now, job, f"{attempt.node} could not start it: {reason}{hint}")


def exited(state: State, now: Instant, unix_ms: int, attempt: Attempt, body: AttemptExited) -> None:
    """A trainer has ended. Decide what that was, then what becomes of the job."""
    job = state.jobs[attempt.job_id]
    how = describe_exit(body)
    phase = judge(job, attempt, body)
    reason = f"{how}; {attempt.stop_reason}" if attempt.stop_reason else how
    change(
        state, now, attempt, phase,
        exit_code=body.exit_code, signal=body.signal, reason=cut(reason),
        times=replace(attempt.times, silent_unix_ms=unix_ms),
    )  # fmt: skip
    state.tell(
        unix_ms, job.id, "attempt.exited", cut(reason), attempt=attempt.id, node=attempt.node
    )
    job = state.jobs[job.id]
    if phase is AttemptPhase.SUCCEEDED:
        end_job(state, now, job, JobPhase.SUCCEEDED, "finished")
    elif phase is AttemptPhase.CANCELLED:
        end_job(state, now, job, JobPhase.CANCELLED, "cancelled by its owner")
    elif attempt.stop_reason:
        requeue(state, now, job, attempt.stop_reason)
    elif phase is AttemptPhase.YIELDED:
        _yielded(state, now, job, attempt)
    else:
        _failed(state, now, attempt, body, how)


def judge(job: Job, attempt: Attempt, body: AttemptExited) -> AttemptPhase:
    """The attempt's end: cancelled if its owner wished so; 0 is success; a stop request or a "run
    me again" status is a yield; everything else is a failure."""
    if job.intent is JobIntent.CANCEL:
        return AttemptPhase.CANCELLED
    if body.exit_code == 0:
        return AttemptPhase.SUCCEEDED
    if attempt.stop_reason or body.exit_code in job.spec.run_again_exit_codes:
        return AttemptPhase.YIELDED
    return AttemptPhase.FAILED


def _yielded(state: State, now: Instant, job: Job, attempt: Attempt) -> None:
    if _came_further(job, attempt):
        requeue(state, now, job, "asked to be run again")
        return
    yields = job.yields + 1
    if yields > YIELDS_MAX:
        reason = f"asked to be run again {yields} times in a row without a further checkpoint"
        end_job(state, now, job, JobPhase.FAILED, reason)
        return
    job = state.put_job(replace(job, yields=yields))
    retry(state, now, job, "asked to be run again without having saved anything further")


def _came_further(job: Job, attempt: Attempt) -> bool:
    """Whether it has committed anything beyond where it began."""
    beyond = not attempt.restored_digest or job.head_step > attempt.restored_step
    return attempt.commits > 0 and beyond


def _failed(state: State, now: Instant, attempt: Attempt, body: AttemptExited, how: str) -> None:
    job = state.jobs[attempt.job_id]
    own = body.exit_code is not None and body.exit_code <= SIGNAL_STATUS_BASE
    hopeless = own and not (attempt.commits or attempt.restored_digest)
    if hopeless:
        reason = f"{how} before its first checkpoint; it would again"
        end_job(state, now, job, JobPhase.FAILED, reason)
        return
    failures = job.failures + 1
    unseen = body.exit_code is None and body.signal is None
    # The box went down, or somebody killed the supervisor: that says nothing of a checkpoint.
    verdict = poison.Verdict.RETRY if unseen else poison.note(state, attempt)
    job = state.jobs[job.id]
    if verdict is poison.Verdict.QUARANTINE:
        poison.quarantine(state, now, replace(job, failures=failures), how)
        return
    if failures > job.spec.max_restarts:
        times = f"{failures} failure{'s' if failures > 1 else ''} in a row"
        reason = f"{how}; {times} without a further checkpoint, and {job.spec.max_restarts} allowed"
        end_job(state, now, job, JobPhase.FAILED, reason)
        return
    job = state.put_job(replace(job, failures=failures))
    told = f"{how}; failure {failures} of {job.spec.max_restarts} allowed"
    if verdict is poison.Verdict.STEP_BACK:
        told += f"; {poison.step_back(state, now, job)}"
    if not _came_further(job, attempt):
        # A preference among the nodes that fit, so that no job waits for it.
        state.avoid[job.id] = attempt.node
    retry(state, now, state.jobs[job.id], told)


def describe_exit(body: AttemptExited) -> str:
    if body.exit_code is not None:
        how = f"exit status {body.exit_code}"
        if body.exit_code > SIGNAL_STATUS_BASE:
            how += f", signal {body.exit_code - SIGNAL_STATUS_BASE} under a shell"
    elif body.signal is not None:
        how = f"ended by signal {body.signal}"
    else:
        how = "ended unseen"
    return f"{how} ({body.reason})" if body.reason else how


def retry(state: State, now: Instant, job: Job, reason: str) -> None:
    """Back to the queue. A first failure is bad luck (a process killed for memory) and costs no
    wait; after that the wait doubles with every failure or refusal in a row.
    """
    refusals = 0
    for attempt in reversed(state.attempts_of(job.id)):
        if attempt.phase is not AttemptPhase.REFUSED:
            break
        refusals += 1
    troubles = job.failures + job.yields + refusals
    if job.failures == troubles == 1:
        state.eligible_ms.pop(job.id, None)
        requeue(state, now, job, f"{reason}; tried again at once")
        return
    wait_ms = min(RETRY_MS_MAX, RETRY_MS_FIRST << min(10, max(0, troubles - 1)))
    state.eligible_ms[job.id] = now.now_ms + wait_ms
    requeue(state, now, job, f"{reason}; tried again after {wait_ms / 1000:g} s")


def requeue(state: State, now: Instant, job: Job, reason: str) -> None:
    """Back to its old place, or to where its owner wants it."""
    if job.intent is JobIntent.CANCEL:
        end_job(state, now, job, JobPhase.CANCELLED, "cancelled by its owner")
        return
    if job.intent is JobIntent.HOLD:
        state.put_job(replace(job, phase=JobPhase.HELD, reason="held by its owner"))
        state.tell(now.unix_ms, job.id, "job.held", "held by its owner")
        return
    state.put_job(replace(job, phase=JobPhase.QUEUED, reason=reason, queued_unix_ms=now.unix_ms))
    state.tell(now.unix_ms, job.id, "job.queued", reason)


def end_job(state: State, now: Instant, job: Job, phase: JobPhase, reason: str) -> None:
    if phase is not JobPhase.SUCCEEDED:
        job = poison.put_back(state, job)
    state.put_job(
        replace(
            job, phase=phase, intent=JobIntent.RUN, reason=reason, ended_unix_ms=now.unix_ms,
            trouble=None,
        )
    )  # fmt: skip
    state.tell(now.unix_ms, job.id, f"job.{phase.value}", reason)
    state.eligible_ms.pop(job.id, None)
    state.avoid.pop(job.id, None)
    checkpoints.retain(state, state.jobs[job.id])


def unreachable(state: State, now: Instant, attempt: Attempt, reason: str) -> None:
    """Its node is out of reach: the job waits for another node, or for this one, whichever is
    first."""
    silent_unix_ms = _last_heard_unix_ms(state, now, attempt)
    times = replace(attempt.times, silent_unix_ms=silent_unix_ms, over_unix_ms=now.unix_ms)
    attempt = change(state, now, attempt, AttemptPhase.UNREACHABLE, reason=reason, times=times)
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.unreachable", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    job = state.jobs[attempt.job_id]
    if job.intent is not JobIntent.RUN:
        lost(state, now, attempt, reason)
    else:
        requeue(state, now, job, reason)


def _last_heard_unix_ms(state: State, now: Instant, attempt: Attempt) -> int:
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


def returned(state: State, now: Instant, attempt: Attempt) -> None:
    """Its node is back before anybody took its place: nothing has happened."""
    if attempt.phase is not AttemptPhase.UNREACHABLE:
        return
    phase = AttemptPhase.ASSIGNED
    if attempt.stop_reason:
        phase = AttemptPhase.STOPPING
    elif attempt.started_unix_ms is not None:
        phase = AttemptPhase.RUNNING
    reason = f"{attempt.node} is back, and it still runs there"
    times = replace(attempt.times, silent_unix_ms=None, over_unix_ms=None)
    change(state, now, attempt, phase, reason="", times=times)
    state.put_job(replace(state.jobs[attempt.job_id], phase=JobPhase.ACTIVE, reason=reason))
    state.eligible_ms.pop(attempt.job_id, None)
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.returned", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip


def lost(state: State, now: Instant, attempt: Attempt, reason: str) -> None:
    """The attempt is over though nobody saw it end."""
    times = attempt.times
    if times.silent_unix_ms is None:
        times = replace(times, silent_unix_ms=_last_heard_unix_ms(state, now, attempt))
    change(state, now, attempt, AttemptPhase.LOST, reason=reason, times=times)
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.lost", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    job = state.jobs[attempt.job_id]
    if job.phase in (JobPhase.ACTIVE, JobPhase.CANCELLING):
        requeue(state, now, job, reason)
