"""A store that was put back from a copy knows less than the nodes do; what follows from that.

Problem: what a node lists that the store does not know looks like what is over, and is killed; what
the store knows and no node lists looks lost, and begins again from a checkpoint of that day, under
an epoch that has later ones swept. After a copy was put back, both are wrong.

How: numbers go on above all that may have been given (`numbering.py`). Of what is open in the copy,
a job goes on if its node says that it runs; any other is held until somebody says what is to be
(`held`). An attempt that can only be of the time after the copy is taken back (`taken_back.py`);
where that cannot be, it is left alone, and shown.

Where nobody has said that the store is a copy, a node that tells of a later attempt has either run
it, since the store is a snapshot that does not know what it is, or it lies. Nobody can tell which,
so it is left alone, and said (`tell_behind`); its job stays whose it is, unless it is that node's
own. What is further above than any copy's age explains, a node says in error, and it counts for
nothing: else one that lies would have all ids used up.
"""

from collections.abc import Iterator
from dataclasses import replace

from coordinator.core.capacity_model import Power
from coordinator.core.messages import (
    AppendEvent,
    HeldAttempt,
    PutAttempt,
    PutJob,
    PutNode,
    Record,
)
from coordinator.core.model import Attempt, Job, JobEvent, JobIntent, Snapshot
from coordinator.core.numbering import EPOCHS_MIN, JOB_IDS_MIN, put_back
from coordinator.core.phases import ATTEMPT_ENDED, AttemptPhase, JobPhase
from coordinator.core.sentences import listed
from coordinator.core.state import Instant, LiveNode, State

UNSURE = (
    "the coordinator's database was put back from a copy, and whether this job has run since then"
    " is not known; `baton release` starts it from the last checkpoint that is known, `baton"
    " cancel` ends it"
)
FORGOTTEN = (
    "its request was forgotten with the coordinator's database, and whether it had finished; with"
    " `baton submit --for-job {job}` it goes on from its last checkpoint, `baton checkpoint export"
    " {job}` takes that out, `baton cancel {job}` ends it"
)
# Ends the reason of a job that was cancelled here; what has been started of it since goes with it.
CANCELLED_ALL = ", with all that was started of it since the copy"
SHOWN_MAX = 5
# For what its node says that it is, and for the other ranks' nodes; then people hear of it.
PATIENCE_MS = 10_000
TOLD = -1


def held(snapshot: Snapshot, unix_ms: int, epochs: int) -> Iterator[Record]:
    """What nobody is sure of: it is held, or will be unless its node says that it runs. Keys of
    orders to switch a node go on above those that its driver knows (by `epochs`), but for one under
    way, which must stay what it is."""
    for node in snapshot.nodes:
        if node.power.phase in (Power.ON, Power.OFF, Power.FAILED):
            changes = node.power.changes + epochs
            yield PutNode(replace(node, power=replace(node.power, changes=changes)))
    unsure = {job.id: job for job in snapshot.jobs if job.intent is JobIntent.RUN}
    for attempt in snapshot.attempts:
        job = unsure.get(attempt.job_id)
        away = attempt.phase is AttemptPhase.UNREACHABLE
        if away and job is not None and job.phase is JobPhase.QUEUED:
            # Another may have its place since. If it is back and nobody has, it is taken back.
            yield PutAttempt(
                replace(attempt, phase=AttemptPhase.LOST, ended_unix_ms=unix_ms, reason=UNSURE)
            )
    for job in unsure.values():
        if job.phase is JobPhase.ACTIVE:
            yield PutJob(replace(job, intent=JobIntent.HOLD, reason=UNSURE))
        elif job.phase is JobPhase.QUEUED:
            number = job.event_count + 1
            yield PutJob(
                replace(
                    job, phase=JobPhase.HELD, intent=JobIntent.HOLD, reason=UNSURE,
                    event_count=number,
                )
            )  # fmt: skip
            yield AppendEvent(JobEvent(job.id, number, unix_ms, "job.held", message=UNSURE))


def is_unsure(job: Job) -> bool:
    """Whether nobody has said what became of it: it was open in the copy, or is newer."""
    return job.intent is JobIntent.HOLD and (job.reason == UNSURE or is_forgotten(job))


def is_forgotten(job: Job) -> bool:
    """Whether its request is not known (`found.py`)."""
    return not job.spec.command and not job.spec.trainer


def confirm(state: State, job: Job) -> None:
    """A node has said that it runs there. Of several ranks all must be there."""
    if not is_unsure(job) or job.phase is not JobPhase.ACTIVE:
        return
    gang = state.gang(job)
    there = [state.nodes[rank.node].session is not None for rank in gang]
    if all(there) and not any(rank.phase in ATTEMPT_ENDED for rank in gang):
        state.put_job(replace(job, intent=JobIntent.RUN, reason="has run on since the copy"))


def is_newer(state: State, node_id: str, item: HeldAttempt) -> bool:
    """Whether it can only have been ordered after what the store knows, if its node is right."""
    job_id, epoch = named(item.attempt)
    job = state.jobs.get(job_id)
    if job is not None and job.phase is JobPhase.CANCELLED and job.reason.endswith(CANCELLED_ALL):
        return False
    if job is not None:
        most = max(job.epoch + EPOCHS_MIN, state.numbering.epoch_floor)
        return job.epoch < epoch <= most or _given_up_unseen(state, node_id, job, item)
    # Once a node's word has moved the numbers on, no other word does.
    moved = state.numbering != state.proven
    beyond = not moved and state.last_job_id < job_id <= state.last_job_id + JOB_IDS_MIN
    return beyond or state.numbering.is_forgotten(job_id)


def is_explained(state: State, node_id: str, item: HeldAttempt) -> bool:
    """Whether a copy that says what it is may have forgotten such an attempt, or it was this node's
    before: then its job is not taken from anybody on one node's word alone."""
    job_id, epoch = named(item.attempt)
    job = state.jobs.get(job_id)
    if job is None:
        return state.proven.is_forgotten(job_id)
    may_be = state.proven.may_be_forgotten(job_id, epoch)
    return may_be or _given_up_unseen(state, node_id, job, item)


def _given_up_unseen(state: State, node_id: str, job: Job, item: HeldAttempt) -> bool:
    """It came too late, and its job is held until somebody says what is to be."""
    known = state.attempts.get(item.attempt)
    lost = known is not None and known.phase is AttemptPhase.LOST and known.node == node_id
    return lost and job.phase is JobPhase.HELD and is_unsure(job)


def tell_behind(state: State, live: LiveNode) -> None:
    """Its node was answered for, or runs, what is not in the store and what no copy explains, and
    nothing is said before it is in there. So the store is a snapshot, or the node errs. The numbers
    are those of a copy from here on, until the next start, and what this node should run is held
    unless it says that it does: all else would be on the word of one node."""
    if state.numbering == state.proven:
        epoch_max = max((one.epoch for one in state.attempts.values()), default=0)
        back = put_back(state.numbering, state.last_job_id, epoch_max, 0)
        state.numbering, state.last_job_id = back.numbering, back.last_job_id
    live.behind = True
    for attempt_id in live.attempts:
        job = state.jobs[state.attempts[attempt_id].job_id]
        if job.phase is JobPhase.ACTIVE and job.intent is JobIntent.RUN:
            state.put_job(replace(job, intent=JobIntent.HOLD, reason=UNSURE))
    reason = (
        f"{live.node.id} knows of events or jobs that it does not have: it is a snapshot, or that"
        " node errs. What runs there goes on, and what should run there and does not is held; but a"
        " job that waited may be started beside itself, and what is not known commits nothing. If"
        " it is a snapshot, stop the coordinator and put back what `baton-coordinator backup` makes"
        " of it"
    )
    state.log("error", "store.behind", node=live.node.id, reason=reason)


def leave_alone(state: State, now: Instant, live: LiveNode, attempt: str) -> int:
    """Returns since when its node is known to run it, or `TOLD` once people were."""
    since_ms = live.strays.get(attempt, now.now_ms)
    if since_ms == TOLD or now.now_ms - since_ms < PATIENCE_MS:
        return since_ms
    state.log(
        "error", "attempt.unknown", attempt=attempt, node=live.node.id, reason=_advice(attempt)
    )
    return TOLD


def describe(live: LiveNode) -> str:
    """What runs there that nobody knows, for `baton nodes`; empty: nothing."""
    unknown = [one for one, since_ms in live.strays.items() if since_ms == TOLD]
    if not unknown:
        return ""
    more = f" and {len(unknown) - SHOWN_MAX} more" if len(unknown) > SHOWN_MAX else ""
    return f"runs {listed(unknown[:SHOWN_MAX])}{more}: {_advice(unknown[0])}"


def _advice(attempt: str) -> str:
    return (
        "the coordinator's database does not know it, and leaves it alone: its agent is too old to"
        " say what it is, other ranks of its job are not there, or no restored copy explains it. It"
        f" ends by itself, or with its process on its node (`systemctl stop baton-job-{attempt}"
        ".service`, where jobs are services)"
    )


def follows_forgotten(state: State, job: Job, attempt: Attempt, parent: str) -> bool:
    """Whether an attempt that holds its job may continue a commit that the store has forgotten."""
    known = any(one.digest == parent for one in state.checkpoints.get(job.id, ()))
    live = state.nodes.get(attempt.node)
    numbering = state.numbering if live is not None and live.behind else state.proven
    forgotten = numbering.may_be_forgotten(job.id, attempt.epoch)
    return bool(parent) and not known and forgotten


def named(attempt: str) -> tuple[int, int]:
    """Job and epoch of an attempt, by its id."""
    job_id, epoch = attempt.split(".")[:2]
    return int(job_id), int(epoch)
