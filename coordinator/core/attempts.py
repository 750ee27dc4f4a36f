"""One execution of a job, from its assignment to its end: what its node says, and what it is told.

Problem: news of an attempt comes twice, late, or after its end was decided without it, and changes
three things at once: the attempt, its GPUs and its job. So each piece of news has one function
here, which takes the attempt's own step (`ranks.py`), writes a line of history, and hands on what
the step means for the rest of its gang and for the job (`gangs.py`). A job of one rank is a gang of
one.
"""

from dataclasses import replace

from coordinator.core import accounting, checkpoints, gangs, outcomes, pace, parts, ranks, standby
from coordinator.core.ledger import attempt_parts
from coordinator.core.messages import AttemptExited, AttemptRefused, AttemptStarted
from coordinator.core.model import Attempt, Job, JobIntent, Progress
from coordinator.core.phases import ATTEMPT_ENDED, AttemptPhase, JobPhase
from coordinator.core.placement import Start
from coordinator.core.state import Instant, State, cut

# How long an attempt may go on training while what does not change is sent ahead of it. Nobody
# waits for a drained node by the second, and 60 s carry 7 GB over 1 Gbit/s; who preempts does wait.
# Nothing else allows it: who cancels wants it gone, a held job goes on nowhere, and a requeue is
# asked for by somebody who does not want this attempt to go on.
PRECOPY_DRAIN_MS = 60_000
PRECOPY_PREEMPTION_MS = 10_000
# Of one start; nobody keeps so many checkpoints, and each is a line of history.
SKIPPED_TOLD_MAX = 64


def assign(state: State, now: Instant, start: Start) -> None:
    """A new attempt with a higher epoch, or one for each rank. From here on those before are stale,
    whatever their nodes believe."""
    job = state.jobs[start.job_id]
    epoch = state.numbering.next_epoch(job.id, job.epoch)
    old = state.current(job)
    for rank in state.gang(job):
        if rank.phase is AttemptPhase.UNREACHABLE:
            reason = f"attempt {job.id}.{epoch} takes its place"
            ranks.change(state, now, rank, AttemptPhase.LOST, reason=reason)
            state.tell(now.unix_ms, job.id, "attempt.lost", reason, attempt=rank.id, node=rank.node)
    parts.forget(state, job, "its gang was started anew before all parts were there")
    job = state.jobs[job.id]
    said = None if old is None else state.progress.get(old.id)
    times = accounting.following(job, old, said)
    job = state.put_job(replace(job, phase=JobPhase.ACTIVE, epoch=epoch, reason=start.why))
    good = state.good_checkpoints(job)
    places = gangs.by_parts(start.places, good[0].pieces if good else ())
    for number, place in enumerate(places):
        attempt = Attempt(
            job.id,
            job.epoch,
            place.node,
            place.gpu_uuids,
            AttemptPhase.ASSIGNED,
            now.unix_ms,
            replica_node=standby.choose(state, job, place.node, number),
            times=times,
            rank=number,
            ranks=job.spec.ranks,
            quota_parts=attempt_parts(job.spec, place.gpu_uuids, state.nodes[place.node].node.gpus),
        )
        state.put_attempt(attempt)
        state.nodes[place.node].used_ms = now.now_ms
        for uuid in place.gpu_uuids:
            state.hold_gpu(state.nodes[place.node], uuid, attempt.id)
    state.eligible_ms.pop(job.id, None)
    state.avoid.pop(job.id, None)
    first = state.gang(job)[0]
    state.tell(
        now.unix_ms, job.id, "attempt.assigned", start.why, attempt=first.id, node=first.node
    )
    for attempt in state.gang(job):
        order_start(state, now, attempt)


def order_start(state: State, now: Instant, attempt: Attempt) -> None:
    """Never without the head within reach: an attempt that began further back would undo
    progress."""
    if state.attempts[attempt.id].phase is not AttemptPhase.ASSIGNED:
        return  # another rank of its gang could not be started
    out_of_reach = checkpoints.head_within_reach(state, state.jobs[attempt.job_id])
    if out_of_reach:
        lost(state, now, attempt, out_of_reach)
        return
    state.ordered_ms[attempt.id] = now.now_ms
    state.send(attempt.node, gangs.start_order(state, attempt))


def stop(
    state: State, now: Instant, attempt: Attempt, reason: str, precopy_ms: int | None = None
) -> None:
    """Ask it, and with it all ranks of its gang, to save and leave. Asking again repeats the
    orders; the first reason stays, and who cannot wait for a pre-copy ends the one that is on its
    way."""
    gangs.stop(state, now, state.jobs[attempt.job_id], reason, precopy_ms)


def order_stop(state: State, now: Instant, attempt: Attempt) -> None:
    ranks.order_stop(state, now, attempt, gangs.grace_ms(state, state.jobs[attempt.job_id]))


def started(
    state: State, now: Instant, unix_ms: int, attempt: Attempt, body: AttemptStarted
) -> None:
    if attempt.started_unix_ms is not None:
        return  # said twice; what it has committed since stands
    job = state.jobs[attempt.job_id]
    resumes = checkpoints.fall_back(state, now, attempt, body)
    held_ranks = body.held_ranks[: attempt.ranks]
    checkpoints.note_copy(state, job.id, body.restored_digest, attempt.node, held_ranks)
    for digest, reason in body.skipped[:SKIPPED_TOLD_MAX]:
        state.tell(
            now.unix_ms, job.id, "checkpoint.skipped", f"{digest[:12]}: {cut(reason)}",
            attempt=attempt.id, node=attempt.node,
        )  # fmt: skip
    phase = AttemptPhase.STOPPING if attempt.stop_reason else AttemptPhase.RUNNING
    attempt = ranks.change(
        state, now, attempt, phase, started_unix_ms=unix_ms,
        restored_digest=body.restored_digest, restored_step=body.restored_step,
        held_ranks=held_ranks,
        times=replace(attempt.times, restore_ms=body.restore_ms, start_ms=body.start_ms),
    )  # fmt: skip
    where = f"from step {body.restored_step}" if body.restored_digest else "from the beginning"
    state.tell(
        unix_ms, job.id, "attempt.started", f"process {body.pid} {where}",
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    if gangs.at_odds(state, now, attempt):
        return
    if not resumes:
        # The head stands, so nothing that it makes can be committed; another node may do better.
        state.avoid[job.id] = attempt.node
        stop(state, now, attempt, f"it started {where} and not from the last commit")


def progressed(state: State, now: Instant, attempt: Attempt, progress: Progress) -> None:
    """What its trainer last said. Only the first word is written down at once."""
    state.progress[attempt.id] = progress
    state.paces[attempt.id] = pace.told(state.paces.get(attempt.id), progress, now.now_ms)
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
    """The node could not start it."""
    reason = cut(body.reason)
    attempt = ranks.change(
        state, now, attempt, AttemptPhase.REFUSED, reason=reason, permanent=body.permanent
    )
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.refused", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    gangs.ended(state, now, attempt)


def exited(state: State, now: Instant, unix_ms: int, attempt: Attempt, body: AttemptExited) -> None:
    """A trainer has ended. Decide what that was; what becomes of the job is the gang's matter."""
    job = state.jobs[attempt.job_id]
    how = outcomes.describe_exit(body)
    phase = outcomes.judge(job, attempt, body)
    reason = f"{how}; {attempt.stop_reason}" if attempt.stop_reason else how
    attempt = ranks.change(
        state, now, attempt, phase,
        exit_code=body.said_exit_code or body.exit_code, signal=body.signal, reason=cut(reason),
        ended_by_itself=body.by_itself,
        times=replace(attempt.times, silent_unix_ms=unix_ms),
    )  # fmt: skip
    state.tell(
        unix_ms, job.id, "attempt.exited", cut(reason), attempt=attempt.id, node=attempt.node
    )
    gangs.ended(state, now, attempt)


def unreachable(state: State, now: Instant, attempt: Attempt, reason: str) -> None:
    """Its node is out of reach: the job waits for another node, or for this one, whichever is
    first."""
    if attempt.phase in ATTEMPT_ENDED:
        return  # given up with its gang
    silent_unix_ms = ranks.last_heard_unix_ms(state, now, attempt)
    times = replace(attempt.times, silent_unix_ms=silent_unix_ms, over_unix_ms=now.unix_ms)
    unreachable = AttemptPhase.UNREACHABLE
    attempt = ranks.change(state, now, attempt, unreachable, reason=reason, times=times)
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.unreachable", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    job = state.jobs[attempt.job_id]
    if job.intent is not JobIntent.RUN:
        lost(state, now, attempt, reason)
    else:
        gangs.cut_off(state, now, job)


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
    attempt = ranks.change(state, now, attempt, phase, reason=attempt.stop_reason, times=times)
    job = state.jobs[attempt.job_id]
    if job.phase is JobPhase.QUEUED:
        state.put_job(replace(job, phase=JobPhase.ACTIVE, reason=reason))
    state.eligible_ms.pop(attempt.job_id, None)
    state.tell(
        now.unix_ms, attempt.job_id, "attempt.returned", reason,
        attempt=attempt.id, node=attempt.node,
    )  # fmt: skip
    gangs.returned(state, now, attempt)


def lost(state: State, now: Instant, attempt: Attempt, reason: str) -> None:
    """The attempt is over though nobody saw it end."""
    if attempt.phase in ATTEMPT_ENDED:
        return  # given up with its gang
    ranks.lose(state, now, attempt, reason)
    gangs.ended(state, now, state.attempts[attempt.id])


def let_go(state: State, now: Instant, job: Job, reason: str) -> None:
    """A queued job whose last attempt is out of reach gives it up, with all its ranks."""
    for attempt in state.gang(job):
        if attempt.phase is AttemptPhase.UNREACHABLE:
            lost(state, now, attempt, reason)
