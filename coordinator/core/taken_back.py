"""Attempts that a store which was put back does not know, and that are their jobs' again.

Problem: what runs was ordered after the copy was made, perhaps of a job that was submitted after
it, and every rank of a gang is heard of alone. Whoever only leaves them alone refuses their
checkpoints, and loses their work with the next node that dies.

How: the node keeps what it was told to run, whole. So in the welcome it is asked what those are
that can only be of the time after the copy (`restored.is_newer`), and its first heartbeats say so.
An attempt is taken back when all ranks of its epoch are there, each on a node within reach; until
then they are left alone, and shown. Of a job that nobody knows its request is all that comes back:
not when it was submitted, under which request id, or of which array it was a trial.

What an attempt resumed from, or committed last, it says as well: that is its job's last checkpoint
as soon as somebody has read what it is (`found.py`).
"""

from dataclasses import replace

from coordinator.core import checkpoints, ranks, restored, standby
from coordinator.core.ledger import attempt_parts
from coordinator.core.messages import HeldAttempt, Hello
from coordinator.core.model import Attempt, Job, JobIntent, JobSpec, attempt_id
from coordinator.core.phases import ATTEMPT_ENDED, AttemptPhase, JobPhase
from coordinator.core.sentences import listed
from coordinator.core.state import JOBS_OPEN_MAX, Instant, LiveNode, State
from coordinator.core.validate import refuse_spec

# More than run on a node: four a core without GPUs. One message bears a part of them (`link.py`).
ASKED_MAX = 1_024
NODES_SHOWN_MAX = 5

Gang = list[tuple[LiveNode, HeldAttempt]]


def asked(state: State, body: Hello) -> tuple[str, ...]:
    """Which of its attempts a node has to say more of."""
    newer = [
        one.attempt
        for one in body.attempts
        if one.live and restored.is_newer(state, body.node, one)
    ]
    return tuple(newer[:ASKED_MAX])


def take_back(state: State, now: Instant, live: LiveNode, item: HeldAttempt) -> bool:
    """It is its job's from here on, with the other ranks of its epoch. False where that cannot be,
    or not yet; then it is left alone."""
    if item.attempt in live.unknown and item.spec is None:
        return False  # it has said nothing new; who tells what the job is takes all ranks back
    job_id, epoch = restored.named(item.attempt)
    explained = restored.is_explained(state, live.node.id, item)
    if not (explained or live.behind):
        restored.tell_behind(state, live)
    live.unknown[item.attempt] = item
    job = state.jobs.get(job_id)
    known = job is not None and not restored.is_forgotten(job)
    spec = job.spec if job is not None and known else _told(state, job_id, epoch)
    if spec is None or (not known and _refuse(spec)):
        return False
    if job is None and len(state.jobs) - len(state.ended) >= JOBS_OPEN_MAX:
        return False
    gang = _gathered(state, job_id, epoch, spec)
    if gang is None or (job is not None and job.phase is JobPhase.CANCELLING):
        return False
    if not explained and not _has_it(state, job, gang):
        return False
    spec = spec if known else replace(spec, array="", hold=False)
    job = _known_again(state, now, job_id, spec) if job is None else _free(state, now, job, item)
    _run_on(state, now, replace(job, spec=spec, epoch=epoch), gang)
    return True


def _refuse(spec: JobSpec) -> str:
    """A node may say anything; of a trial its environment has what nobody else may set."""
    return refuse_spec(replace(spec, environment=(), array=""))


def _told(state: State, job_id: int, epoch: int) -> JobSpec | None:
    """What its job is, by one rank's word: an older agent that has started another cannot say."""
    for live in state.nodes.values():
        for name, item in live.unknown.items():
            if item.spec is not None and restored.named(name) == (job_id, epoch):
                return item.spec
    return None


def _gathered(state: State, job_id: int, epoch: int, spec: JobSpec) -> Gang | None:
    """All ranks, in order, with the nodes that run them; `None`: some are not there, or have other
    GPUs than such a job gets, or two nodes tell of one."""
    count = spec.ranks
    wanted = {attempt_id(job_id, epoch, rank, count): rank for rank in range(count)}
    found: dict[int, tuple[LiveNode, HeldAttempt]] = {}
    for live in state.nodes.values():
        for name, item in live.unknown.items() if live.session is not None else ():
            if name in wanted and len(set(item.gpu_uuids)) == len(item.gpu_uuids) == spec.gpus:
                if wanted[name] in found:
                    return None
                found[wanted[name]] = live, item
    return [found[rank] for rank in range(count)] if len(found) == count else None


def _has_it(state: State, job: Job | None, gang: Gang) -> bool:
    """Whether these nodes have the job already, each the same rank."""
    if job is None or job.phase is not JobPhase.ACTIVE:
        return False
    return [live.node.id for live, _ in gang] == [rank.node for rank in state.gang(job)]


def _known_again(state: State, now: Instant, job_id: int, spec: JobSpec) -> Job:
    reason = "its submission was forgotten with the coordinator's database; its node has told it"
    job = state.put_job(
        Job(job_id, spec, JobPhase.QUEUED, now.unix_ms, reason=reason, event_count=1)
    )
    state.write_line(job, now.unix_ms, "job.submitted", reason)
    return job


def _free(state: State, now: Instant, job: Job, item: HeldAttempt) -> Job:
    """Of the attempt that the copy knows."""
    for rank in state.gang(job):
        if rank.phase not in ATTEMPT_ENDED:
            ranks.lose(state, now, rank, f"{item.attempt} took its place after the copy was made")
    job = state.jobs[job.id]
    if job.phase not in (JobPhase.QUEUED, JobPhase.ACTIVE):
        job = state.put_job(replace(job, phase=JobPhase.QUEUED, ended_unix_ms=None))
    return job


def _run_on(state: State, now: Instant, job: Job, gang: Gang) -> None:
    names = list(dict.fromkeys(live.node.id for live, _ in gang))
    more = f" and {len(names) - NODES_SHOWN_MAX} more" if len(names) > NODES_SHOWN_MAX else ""
    where = f"{listed(names[:NODES_SHOWN_MAX])}{more}"
    reason = f"runs on {where} since before the copy was put back, and is taken back"
    state.put_job(replace(job, phase=JobPhase.ACTIVE, intent=JobIntent.RUN, reason=reason))
    for rank, (live, item) in enumerate(gang):
        attempt = state.put_attempt(
            Attempt(
                job.id, job.epoch, live.node.id, item.gpu_uuids, AttemptPhase.RUNNING, now.unix_ms,
                started_unix_ms=now.unix_ms,
                restored_digest=gang[0][1].checkpoint,
                replica_node=standby.choose(state, job, live.node.id, rank),
                rank=rank, ranks=len(gang),
                quota_parts=attempt_parts(job.spec, item.gpu_uuids, live.node.gpus),
            )
        )  # fmt: skip
        live.unknown.pop(item.attempt)
        live.strays.pop(item.attempt, None)
        state.send(live.node.id, checkpoints.target_order(state, job, attempt))
    first = state.gang(state.jobs[job.id])[0]
    state.tell(now.unix_ms, job.id, "attempt.taken_back", reason, attempt=first.id, node=first.node)


def heard(state: State, attempt: Attempt, item: HeldAttempt) -> None:
    """Its node was asked, and it was taken back meanwhile. A checkpoint of several is rank 0's."""
    if item.checkpoint and attempt.rank == 0 and not attempt.restored_digest:
        for rank in state.gang(state.jobs[attempt.job_id]):
            state.put_attempt(replace(rank, restored_digest=item.checkpoint))
