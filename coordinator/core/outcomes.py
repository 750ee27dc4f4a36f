"""What becomes of a job when a try has ended: success, failure, or another try, and when.

Problem: the same exit status means different things. 143 after a stop request is obedience, 143 out
of the blue is a failure; 75 says "run me again", 76 of a gang that its ranks do not understand one
another (`mismatches.py`); a process that dies at its first line will die again. So an ending is
judged from the attempt's whole story, in one place, and every verdict is a sentence in the job's
history. Of a gang all of this happens once, when its last rank has ended
(`gangs.py`), and the story is that of the rank that ended it.

Failures in a row without a commit further on are bounded by the job's `max_restarts`; within that
limit `poison.py` looks whether they repeat at one step. After one without any progress the next
attempt goes to another node where one fits, since a broken node fails everything. A job that has
neither committed nor resumed anything and leaves with an ordinary failure status is not tried
again: a missing module stays missing.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from coordinator.core import checkpoints, claims, mismatches, poison, restored
from coordinator.core.failure_rate import SIGNAL_STATUS_BASE
from coordinator.core.messages import AttemptExited
from coordinator.core.model import Attempt, Job, JobIntent
from coordinator.core.phases import AttemptPhase, JobPhase, NodeIntent, NodePhase
from coordinator.core.sentences import listed, quantity
from coordinator.core.state import Instant, State
from coordinator.core.validate import could_hold

# Between two tries of a failing job: doubling from one second, so that a broken job costs little
# and a passing fault (a full disk, a restarting file server) has minutes to pass.
RETRY_MS_FIRST = 1_000
RETRY_MS_MAX = 60_000
# "Run me again" without ever committing a further step is a loop; this many rounds of it are
# patience enough.
YIELDS_MAX = 20
# A node that lacks what a job needs may be mended: so long after it has said so it is asked again,
# if the job still waits for others. Who mounts a file system needs minutes; a try costs a second.
LACKS_MS = 600_000
AGAIN = "asked to be run again"


def judge(job: Job, attempt: Attempt, body: AttemptExited) -> AttemptPhase:
    """An attempt's end: cancelled if its owner wished so; 0 is success; a stop request or a "run
    me again" status, also of a trainer below a launcher, is a yield; everything else a failure."""
    if job.intent is JobIntent.CANCEL:
        return AttemptPhase.CANCELLED
    if body.exit_code == 0:
        return AttemptPhase.SUCCEEDED
    statuses = {body.exit_code, body.said_exit_code}
    again = not statuses.isdisjoint(job.spec.run_again_exit_codes)
    if attempt.stop_reason or again or mismatches.told(job, attempt, body):
        return AttemptPhase.YIELDED
    return AttemptPhase.FAILED


def yielded(state: State, now: Instant, job: Job, attempt: Attempt, why: str = AGAIN) -> None:
    """It is to be run again, and counted only where it came no further."""
    if _came_further(job, attempt):
        requeue(state, now, job, why)
        return
    yields = job.yields + 1
    if yields > YIELDS_MAX:
        reason = f"{why} {yields} times in a row without a further checkpoint"
        end_job(state, now, job, JobPhase.FAILED, reason)
        return
    job = state.put_job(replace(job, yields=yields))
    retry(state, now, job, f"{why} without having saved anything further")


def mismatched(state: State, now: Instant, job: Job, how: str) -> None:
    """Its ranks did not understand one another, which is counted as nothing where an upgrade may be
    why."""
    if mismatches.unexplained(state, job):
        if job.yields >= YIELDS_MAX:
            often = f"{job.yields + 1} times in a row on nodes with one version of the agent"
            end_job(state, now, job, JobPhase.FAILED, f"{how}; {often}")
            return
        job = state.put_job(replace(job, yields=job.yields + 1))
    wait_ms = mismatches.RETRY_MS if mismatches.again(state, job) else mismatches.RETRY_MS_FIRST
    state.eligible_ms[job.id] = now.now_ms + wait_ms
    requeue(state, now, job, f"{how}; tried again after {wait_ms / 1000:g} s")


def _came_further(job: Job, attempt: Attempt) -> bool:
    """Whether it has committed anything beyond where it began."""
    beyond = not attempt.restored_digest or job.head_step > attempt.restored_step
    return attempt.commits > 0 and beyond


def failed(state: State, now: Instant, attempt: Attempt, how: str, *, own: bool) -> None:
    """`own`: nothing from outside had a part in it, as far as anybody knows."""
    job = state.jobs[attempt.job_id]
    own = own and attempt.exit_code is not None and attempt.exit_code <= SIGNAL_STATUS_BASE
    # Ranks meet over a network first, on a port that may be taken: a first failure proves nothing.
    own = own and (attempt.ranks == 1 or job.failures > 0)
    hopeless = own and not (attempt.commits or attempt.restored_digest)
    if hopeless:
        reason = f"{how} before its first checkpoint; it would fail again"
        end_job(state, now, job, JobPhase.FAILED, reason)
        return
    failures = job.failures + 1
    unseen = attempt.exit_code is None and attempt.signal is None
    # The box went down, or somebody killed the supervisor: that says nothing of a checkpoint.
    verdict = poison.Verdict.RETRY if unseen else poison.note(state, attempt)
    job = state.jobs[job.id]
    if verdict is poison.Verdict.QUARANTINE:
        poison.quarantine(state, now, replace(job, failures=failures), how)
        return
    if failures > job.spec.max_restarts:
        times = f"{quantity(failures, 'failure')} in a row"
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
        if body.said_exit_code is not None:
            how += f", {body.said_exit_code} below its launcher"
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
    passing = sum(not each.permanent for each in _refusals(state, job))  # the others are failures
    troubles = job.failures + job.yields + passing
    if job.failures == troubles == 1:
        state.eligible_ms.pop(job.id, None)
        claims.keep(state, now, job, 0)
        requeue(state, now, job, f"{reason}; tried again at once")
        return
    wait_ms = min(RETRY_MS_MAX, RETRY_MS_FIRST << min(10, max(0, troubles - 1)))
    state.eligible_ms[job.id] = now.now_ms + wait_ms
    kept = ", and what others left for it is kept" if claims.keep(state, now, job, wait_ms) else ""
    requeue(state, now, job, f"{reason}; tried again after {wait_ms / 1000:g} s{kept}")


def _refusals(state: State, job: Job) -> list[Attempt]:
    """Of the tries in a row, up to now, that a node has refused, the attempt; the last one
    first. Not those before its owner asked again: permanent ones are failures, which that forgets.
    """
    tries: dict[int, Attempt | None] = {}
    for attempt in state.attempts_of(job.id):
        refusal = tries.get(attempt.epoch)
        if attempt.phase is AttemptPhase.REFUSED and not (refusal and refusal.permanent):
            refusal = attempt
        tries[attempt.epoch] = refusal
    found: list[Attempt] = []
    permanent = 0
    for refusal in reversed(tries.values()):
        permanent += refusal is not None and refusal.permanent
        if refusal is None or permanent > job.failures:
            break
        found.append(refusal)
    return found


def lacking(state: State, now: Instant, job: Job) -> Attempt | None:
    """Whose node lacks what it needs, by its last try, where there are others. The next one goes to
    those, and waits for that: while they are full, the one that lacks something has room. Not for
    ever, and then at once: a round is due when that is over."""
    last = next(iter(_refusals(state, job)), None) if job.epoch and job.failures else None
    if last is None or not last.permanent:
        return None
    # Wall time: it is still so after our own restart. Who set it back does not make anybody wait.
    since_ms = now.unix_ms - (last.ended_unix_ms or 0)
    if not 0 <= since_ms < LACKS_MS or not _may_run_elsewhere(state, job, last, job.spec.ranks):
        return None
    over_ms = now.now_ms + LACKS_MS - since_ms
    due_ms = state.indices.asked_again_ms
    state.indices.asked_again_ms = over_ms if due_ms is None else min(due_ms, over_ms)
    return last


def tick(state: State, now: Instant) -> None:
    """Somebody may be asked again who lacked something."""
    due_ms = state.indices.asked_again_ms
    if due_ms is not None and due_ms <= now.now_ms:
        state.indices.asked_again_ms, state.dirty = None, True


def avoided(state: State, now: Instant, job: Job) -> tuple[str, bool]:
    """The node that its next try does not go to if another will do; `True`: not in any case."""
    last = lacking(state, now, job)
    if last is not None:
        return last.node, True
    return state.avoid.get(job.id, ""), False


def describe_lack(state: State, now: Instant, job: Job) -> str:
    """Of a job that waits for room."""
    last = lacking(state, now, job)
    if last is None:
        return ""
    after = f"it is asked again {LACKS_MS // 60_000} min after that"
    return f"; {last.node} could not start it: {last.reason}; {after}"


def _was_asked_again(state: State, now: Instant, job: Job) -> bool:
    """Whether the last try was made since the node of the one before may have been mended."""
    last, *before = _refusals(state, job)
    if not before or not before[0].permanent or before[0].node != last.node:
        return False
    return now.unix_ms - (before[0].ended_unix_ms or 0) >= LACKS_MS


def _all_lacking(state: State, job: Job) -> dict[str, None]:
    """The nodes that lack what it needs, as all ranks of these tries have it."""
    tries = {each.epoch: None for each in _refusals(state, job) if each.permanent}
    ranks = [each for each in state.attempts_of(job.id) if each.epoch in tries]
    return {rank.node: None for rank in ranks if rank.permanent}


def refusal(gang: Sequence[Attempt]) -> Attempt | None:
    """Of the ranks that were not started the one that says most: what its node lacks comes before
    what may pass, and what was said first before what was said of one that was to stop."""
    refused = [rank for rank in gang if rank.phase is AttemptPhase.REFUSED]
    return max(refused, key=lambda rank: (rank.permanent, not rank.stop_reason), default=None)


def refused(state: State, now: Instant, job: Job, attempt: Attempt) -> None:
    """Its node could not start it. A command or a directory that is not there may be on another
    node, which is asked before the job has failed: one that lacks a file system which all others
    have mounted would else end all that waits. That counts as a failure, unless it has only said so
    again."""
    told = f"{attempt.node} could not start it: {attempt.reason}"
    if attempt.permanent:
        counted = replace(job, failures=job.failures + 1)
        others = [node for node in _all_lacking(state, counted) if node != attempt.node]
        if others or not _was_asked_again(state, now, counted):
            job = state.put_job(counted)
        hopeless = others or not _may_run_elsewhere(state, job, attempt)
        # Nothing has run, so who may not be run again may still be tried on another node.
        if hopeless or job.failures > max(1, job.spec.max_restarts):
            nor = f"; nor could {listed(others)}" if others else ""
            end_job(state, now, job, JobPhase.FAILED, told + nor)
            return
    state.avoid[job.id] = attempt.node
    without = f" (`baton requeue --abandon {job.id}` goes on without its last checkpoint)"
    hint = without if checkpoints.may_abandon(state, job) else ""
    retry(state, now, job, f"{told}{hint}")


def _may_run_elsewhere(state: State, job: Job, attempt: Attempt, nodes_min: int = 1) -> bool:
    able = (
        live
        for live in state.nodes.values()
        if live.phase is not NodePhase.LOST
        and live.node.intent is NodeIntent.OPEN
        and live.node.id != attempt.node
        and (live.gangs or job.spec.ranks == 1)
        and (live.shares or not job.spec.shared_gpu_memory_bytes)
        and could_hold(job.spec, live.node.gpus, live.node.host.memory_bytes)
    )
    return next(islice(able, nodes_min - 1, None), None) is not None


def requeue(state: State, now: Instant, job: Job, reason: str) -> None:
    """Back to its old place, or to where its owner wants it."""
    if job.intent is JobIntent.CANCEL:
        end_job(state, now, job, JobPhase.CANCELLED, "cancelled by its owner")
        return
    if job.intent is JobIntent.HOLD:
        why = job.reason if restored.is_unsure(job) else "held by its owner"
        state.put_job(replace(job, phase=JobPhase.HELD, reason=why))
        state.tell(now.unix_ms, job.id, "job.held", why)
        return
    state.put_job(replace(job, phase=JobPhase.QUEUED, reason=reason, queued_unix_ms=now.unix_ms))
    state.tell(now.unix_ms, job.id, "job.queued", reason)


def end_job(state: State, now: Instant, job: Job, phase: JobPhase, reason: str) -> None:
    if phase is not JobPhase.SUCCEEDED:
        job = poison.put_back(state, job)
    if phase is JobPhase.CANCELLED and state.numbering.may_be_forgotten(job.id, job.epoch):
        reason += restored.CANCELLED_ALL
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
