"""Which checkpoints count, where their copies lie, and what a new attempt may resume from.

Problem: after a partition two attempts of one job may both believe that they make its history. So a
commit is a compare-and-swap on (epoch, parent): only the attempt of the job's highest epoch may
commit, and only on top of the head. A stale attempt is refused whatever its node believes, which is
what a fencing token is for (Kleppmann, "How to do distributed locking", 2016).

Copies go to the attempt's standby (`standby.py`), so that a handoff finds them in place.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from coordinator.core import accounting, poison, restored, standby
from coordinator.core.launch import PeerAddress, RestoreCandidate, RestorePart
from coordinator.core.messages import (
    AttemptStarted,
    CheckpointProposed,
    CommitResult,
    HeldAttempt,
    KeepCheckpoints,
    LoneCheckpoint,
    SetReplicaTarget,
)
from coordinator.core.model import (
    SHARED,
    Attempt,
    Checkpoint,
    Job,
    Part,
    Replication,
)
from coordinator.core.node_power import silent
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    JOB_ENDED,
    AttemptPhase,
    NodePhase,
)
from coordinator.core.state import Instant, LiveNode, State, cut

# In one message, either way: a list that long may be cut off, so what it does not name is neither
# dropped by the node nor believed to be gone.
DIGESTS_MAX = 4_096
AT_ODDS = "its ranks started from different checkpoints"

# In which order holders of a copy are asked, after the node itself (0) and the shared directory.
NEARNESS = {NodePhase.UP: 2, NodePhase.SUSPECT: 3, NodePhase.LOST: 4}


def propose(state: State, now: Instant, attempt: Attempt, body: CheckpointProposed) -> None:
    """Compare and swap, and tell the agent either way. Saying it twice gives the same answer
    twice. What ranks of a gang hand over: `parts.py`."""
    job = state.jobs[attempt.job_id]
    if restored.follows_forgotten(state, job, attempt, body.parent):
        body = replace(body, parent=job.head)  # of those between nobody knows any more
    refusal = _refuse_commit(state, job, attempt, body)
    if not refusal and body.digest == job.head:
        for node_id in body.replicas:  # it may have been copied since
            note_copy(state, job.id, job.head, node_id)
    elif not refusal:
        commit(state, attempt, proposed(job, attempt, body, now.unix_ms))
    else:
        state.log(
            "warning", "checkpoint.refused", job=job.id, attempt=attempt.id,
            digest=body.digest, reason=refusal,
        )  # fmt: skip
    head = state.jobs[job.id].head
    result = CommitResult(attempt.id, body.digest, not refusal, refusal, head)
    state.send(attempt.node, result)


def _refuse_commit(state: State, job: Job, attempt: Attempt, body: CheckpointProposed) -> str:
    stale = refuse_attempt(job, attempt)
    if stale or body.digest == job.head:
        return stale
    if body.parts > 1:
        return f"it is one of {body.parts} parts, and the job has one rank"
    if body.parent != job.head:
        return refuse_parent(job, body)
    return refuse_content(state, job, attempt, body)


def refuse_attempt(job: Job, attempt: Attempt) -> str:
    """The fence: empty for an attempt that holds the job."""
    if attempt.epoch != job.epoch:
        return f"epoch {attempt.epoch} is stale; epoch {job.epoch} holds job {job.id}"
    if attempt.phase in ATTEMPT_ENDED:
        return f"attempt {attempt.id} has ended"
    return ""


def refuse_parent(job: Job, body: CheckpointProposed) -> str:
    head = job.head[:12] or "nothing"
    return f"it follows {body.parent[:12] or 'nothing'}, but the last commit is {head}"


def refuse_content(state: State, job: Job, attempt: Attempt, body: CheckpointProposed) -> str:
    """Empty for what may follow the last commit."""
    if body.step < job.head_step:
        return f"its step {body.step} lies before step {job.head_step} of the last commit"
    others = (name for name in body.replicas if name in state.nodes or name == SHARED)
    off_the_node = any(name != attempt.node for name in others)
    if job.spec.replication is Replication.REQUIRED and not off_the_node:
        return "the job asks for a copy off the node and there is none"
    return ""


def proposed(job: Job, attempt: Attempt, body: CheckpointProposed, unix_ms: int) -> Checkpoint:
    return Checkpoint(
        job.id, body.digest, body.parent, attempt.epoch, body.step, body.size_bytes,
        body.replicas, unix_ms,
    )  # fmt: skip


def at_odds(gang: Sequence[Attempt]) -> bool:
    """Whether ranks have resumed from different checkpoints: they make no common step."""
    started = [rank.restored_digest for rank in gang if rank.started_unix_ms is not None]
    return any(digest != started[0] for digest in started)


def commit(state: State, attempt: Attempt, checkpoint: Checkpoint) -> None:
    """It is the job's last one from here on. `attempt` has made it, of a gang rank 0."""
    job = state.jobs[checkpoint.job_id]
    state.put_checkpoint(checkpoint)
    if not job.head or checkpoint.step > job.head_step:
        # The same step once more is no progress: whoever saves on the way out gets no further.
        job = replace(job, failures=0, yields=0)
    trouble = poison.progressed(job.trouble, checkpoint.step)
    state.put_job(replace(job, head=checkpoint.digest, head_step=checkpoint.step, trouble=trouble))
    times = accounting.noted(attempt.times, state.progress.get(attempt.id))
    state.put_attempt(replace(attempt, commits=attempt.commits + 1, times=times))
    several = {"parts": len(checkpoint.pieces)} if checkpoint.parts else {}
    state.log(
        "info", "checkpoint.committed", job=job.id, attempt=attempt.id, step=checkpoint.step,
        digest=checkpoint.digest, size_bytes=checkpoint.size_bytes,
        replicas=list(checkpoint.replicas), **several,
    )  # fmt: skip
    retain(state, state.jobs[job.id])
    _copy_again(state, state.jobs[job.id], checkpoint)


def _copy_again(state: State, job: Job, checkpoint: Checkpoint) -> None:
    """Who got a copy may have been lost before that came here: then `retarget` asked for what was
    the last commit until now."""
    for rank in state.gang(job):
        its = checkpoint.pieces[rank.rank : rank.rank + 1]
        copied = any(len(piece.replicas) > 1 for piece in its) and rank.phase not in ATTEMPT_ENDED
        if copied and lone(state, job, rank) is not None:
            state.send(rank.node, target_order(state, job, rank))


def retain(state: State, job: Job) -> None:
    """Keep the head and its last predecessors, of an ended job the head alone; beside them what is
    pinned, and what is set aside and may turn out not to be to blame."""
    keep = 1 if job.phase in JOB_ENDED else job.spec.keep_checkpoints
    good = state.good_checkpoints(job)[:keep]
    kept = [checkpoint.digest for checkpoint in good]
    if job.trouble is not None:
        kept.append(job.trouble.set_aside)
    for checkpoint in list(state.checkpoints.get(job.id, [])):
        if checkpoint.digest not in kept and not checkpoint.pinned:
            state.drop_checkpoint(checkpoint)


def fall_back(state: State, now: Instant, attempt: Attempt, body: AttemptStarted) -> bool:
    """The head did not verify anywhere and an older checkpoint, or none, was used: what is newer
    than that one is never offered again. False when the attempt resumed from elsewhere though the
    head was not found bad, or from nothing though a checkpoint is set aside: that one is the head
    then. What verified for one rank of a gang is good, whatever others found, before or after, if
    it looked at all parts: who looked at its own says nothing of the one that another rank lacks.
    """
    job = state.jobs[attempt.job_id]
    if body.restored_digest == job.head:
        return True
    gang = state.gang(job)
    others = [rank for rank in gang if rank.rank != attempt.rank and rank.started_unix_ms]
    if any(rank.restored_digest == body.restored_digest for rank in others):
        return True  # what they have committed since is what they all continue
    of_head = [rank for rank in others if rank.restored_digest == job.head]
    if of_head and not body.held_ranks:
        _stand_again(state, now, job, attempt, body.restored_digest)
    if any(not rank.held_ranks for rank in of_head):
        return False
    reasons = dict(body.skipped)
    good = {checkpoint.digest: checkpoint for checkpoint in state.good_checkpoints(job)}
    if job.head not in reasons or body.restored_digest not in ("", *good):
        return False
    step = 0
    for digest, checkpoint in good.items():
        if digest == body.restored_digest:
            step = checkpoint.step
            break
        bad = cut(reasons.get(digest, "")) or "an older one was used"
        state.put_checkpoint(replace(checkpoint, bad=bad))
    job = state.put_job(replace(job, head=body.restored_digest, head_step=step))
    return bool(body.restored_digest) or not poison.put_back(state, job).head


def _stand_again(state: State, now: Instant, job: Job, attempt: Attempt, digest: str) -> None:
    """A rank has resumed from what another rank of its gang could not verify: it is the last
    checkpoint again. Never in time for this try, whose ranks are at odds."""
    kept = state.checkpoints.get(job.id, [])
    aside = job.trouble.set_aside if job.trouble is not None else ""
    good = next((one for one in kept if one.digest == digest and one.bad), None)
    if good is not None and digest != aside:
        state.put_checkpoint(replace(good, bad=""))
        state.put_job(replace(job, head=digest, head_step=good.step))
        what = f"{digest[:12]} (step {good.step}) verified on {attempt.node}; it is the last again"
        state.tell(
            now.unix_ms, job.id, "checkpoint.verified", what, attempt=attempt.id, node=attempt.node
        )


def note_copy(
    state: State, job_id: int, digest: str, node_id: str, held_ranks: Sequence[int] = ()
) -> None:
    """Whoever resumed from a checkpoint holds all of it, or the parts of these ranks: one copy
    more, should another rot."""
    for checkpoint in list(state.checkpoints.get(job_id, [])):
        if checkpoint.digest == digest:
            pieces = [
                piece
                if node_id in piece.replicas or (held_ranks and rank not in held_ranks)
                else replace(piece, replicas=(*piece.replicas, node_id))
                for rank, piece in enumerate(checkpoint.pieces)
            ]
            _put_pieces(state, checkpoint, pieces)


def _put_pieces(state: State, checkpoint: Checkpoint, pieces: Sequence[Part]) -> None:
    """With other replicas, if they are."""
    changed = replace(checkpoint, replicas=pieces[0].replicas, parts=tuple(pieces[1:]))
    if changed != checkpoint:
        state.put_checkpoint(changed)


def head_within_reach(state: State, job: Job) -> str:
    """Empty when the job may start; otherwise the sentence that says which node its last checkpoint
    waits for."""
    good = state.good_checkpoints(job)
    if not good or state.reachable(good[0]):
        return ""
    pieces = good[0].pieces
    rank = next(i for i, piece in enumerate(pieces) if not state.piece_reachable(piece))
    what, holders = f"its last checkpoint (step {good[0].step})", pieces[rank].replicas
    if good[0].parts:
        what = f"rank {rank}'s part of {what}"
    without = f"`baton requeue --abandon {job.id}` goes on without it"
    if not holders:
        return f"{what} lies on no node any more; {without}"
    off = any(name in state.nodes and silent(state.nodes[name].node.power) for name in holders)
    lost = "which is" if len(holders) == 1 else "which are"
    lost += " lost or switched off" if off else " lost"
    return (
        f"{what} lies only on {' and '.join(holders)}, {lost}: it goes on when"
        f" {'that node' if len(holders) == 1 else 'one of them'} is back; {without}"
    )


def may_abandon(state: State, job: Job) -> bool:
    """Whether the last checkpoint is out of reach: all who hold it are lost, or some are and those
    who are not could not give it to the last attempt."""
    good = state.good_checkpoints(job)
    return bool(good) and _out_of_reach(state, job, good[0])


def _out_of_reach(state: State, job: Job, checkpoint: Checkpoint) -> bool:
    if not state.reachable(checkpoint):
        return True
    refused = any(rank.phase is AttemptPhase.REFUSED for rank in state.gang(job))
    names = [name for piece in checkpoint.pieces for name in piece.replicas]
    holders = [state.nodes[name] for name in names if name in state.nodes]
    return refused and any(live.phase is NodePhase.LOST for live in holders)


def abandon_unreachable(state: State, job: Job) -> int:
    """The owner gives up what nobody can reach; returns how many checkpoints that were. One that is
    set aside is still better than none."""
    count = 0
    for checkpoint in list(state.good_checkpoints(job)):
        if not _out_of_reach(state, job, checkpoint):
            break
        state.put_checkpoint(replace(checkpoint, bad="given up by its owner"))
        count += 1
    good = state.good_checkpoints(job)
    head, step = (good[0].digest, good[0].step) if good else ("", 0)
    job = state.put_job(replace(job, head=head, head_step=step))
    if not good:
        poison.put_back(state, job)
    return count


def candidates(state: State, job: Job, node_id: str) -> tuple[RestoreCandidate, ...]:
    """What an attempt on `node_id` may resume from, newest first, with the nearest copy first.

    A lost node is named too, last: its peers may reach it where we do not, and as long as it has
    not answered nobody may say that the checkpoint is gone."""
    found = []
    for checkpoint in state.good_checkpoints(job):
        own, *others = [
            RestorePart(piece.digest, _sources(state, piece, node_id))
            for piece in checkpoint.pieces
        ]
        if own.sources and all(part.sources for part in others):
            found.append(RestoreCandidate(own.digest, checkpoint.step, own.sources, tuple(others)))
    return tuple(found)


def _sources(state: State, piece: Part, node_id: str) -> tuple[PeerAddress, ...]:
    sources = []
    for holder in piece.replicas:
        live = state.nodes.get(holder)
        if holder == SHARED:
            sources.append(((1, holder), PeerAddress(SHARED, "")))
        elif live is not None:
            near = 0 if holder == node_id else NEARNESS[live.phase]
            sources.append(((near, holder), PeerAddress(holder, live.node.peer_address)))
    return tuple(address for _, address in sorted(sources, key=lambda pair: pair[0]))


def replica_target(state: State, attempt: Attempt) -> PeerAddress | None:
    live = state.nodes.get(attempt.replica_node)
    return None if live is None else PeerAddress(live.node.id, live.node.peer_address)


def retarget(state: State, job_ids: Iterable[int] = ()) -> None:
    """After a node came or went: every attempt whose copies have nowhere to go gets another node
    for them. Of these jobs it had copies: where that leaves one, it is copied to the standby."""
    fewer = dict.fromkeys(job_ids)
    for attempt_id in list(state.indices.open_attempts):
        attempt = state.attempts[attempt_id]
        target = state.nodes.get(attempt.replica_node)
        job = state.jobs[attempt.job_id]
        if target is not None and standby.may_be(target):
            if attempt.job_id in fewer and lone(state, job, attempt) is not None:
                state.send(attempt.node, target_order(state, job, attempt))
            continue
        chosen = standby.in_place(state, job, attempt)
        if chosen != attempt.replica_node:
            lost = target is None or target.phase is NodePhase.LOST
            send_copies_to(state, attempt, chosen, lost=lost)


def lone(state: State, job: Job, attempt: Attempt) -> LoneCheckpoint | None:
    """What of the last commit this attempt's node has alone, of the nodes that are within reach.
    Copied with the next commit only, it would be alone for an hour where commits are so seldom."""
    head, target = state.good_checkpoints(job)[:1], state.nodes.get(attempt.replica_node)
    pieces = head[0].pieces if head else ()
    if target is None or attempt.rank >= len(pieces):
        return None
    piece = pieces[attempt.rank]
    others = tuple(name for name in piece.replicas if name != attempt.node)
    if others == piece.replicas or state.piece_reachable(replace(piece, replicas=others)):
        return None
    return LoneCheckpoint(piece.digest, head[0].step, len(pieces))


def send_copies_to(
    state: State, attempt: Attempt, standby_node: str, *, lost: bool = False
) -> Attempt:
    """From the next checkpoint on, and the last one at once where there is no other copy. Of a
    standby that is `lost`, what is on its way there as well."""
    attempt = state.put_attempt(replace(attempt, replica_node=standby_node))
    order = target_order(state, state.jobs[attempt.job_id], attempt)
    state.send(attempt.node, replace(order, lost=lost))
    return attempt


def move_standbys(state: State, now: Instant) -> None:
    for attempt_id, node_id in standby.review(state, now):
        attempt = state.attempts[attempt_id]
        reason = f"{node_id} could go on with it sooner than {attempt.replica_node}"
        send_copies_to(state, attempt, node_id)
        state.log("info", "standby.moved", attempt=attempt_id, node=node_id, reason=reason)


def heard(state: State, now: Instant, node_id: str, held: Sequence[HeldAttempt]) -> None:
    """A heartbeat has listed what its node holds: who has a standby at which nothing arrives gets
    another one. Of what runs elsewhere a node's word is nothing."""
    for item in held:
        attempt = state.attempts.get(item.attempt)
        if item.copies_failed < standby.COPIES_FAILED_MAX or attempt is None:
            continue
        if attempt.phase is not AttemptPhase.RUNNING or attempt.replica_node not in state.nodes:
            continue
        other = standby.instead(state, now, attempt) if attempt.node == node_id else ""
        if other:
            failed = (
                f"{item.copies_failed} copies in a row did not arrive at {attempt.replica_node}"
            )
            send_copies_to(state, attempt, other)
            state.log("warning", "standby.failed", attempt=attempt.id, node=other, reason=failed)


def tell_back(state: State, node_id: str) -> None:
    """A node has come back, maybe at another address: whoever sends it copies tries again at once,
    and there, or a job that requires one would wait for minutes, or for ever at the old door."""
    for attempt_id in state.indices.open_attempts:
        attempt = state.attempts[attempt_id]
        if attempt.replica_node == node_id:
            job = state.jobs[attempt.job_id]
            state.send(attempt.node, target_order(state, job, attempt))


def target_order(state: State, job: Job, attempt: Attempt) -> SetReplicaTarget:
    required = job.spec.replication is Replication.REQUIRED
    target = replica_target(state, attempt)
    return SetReplicaTarget(attempt.id, target, required, lone(state, job, attempt))


def reconcile_copies(
    state: State, node_id: str, present: Mapping[str, None], job_ids: Iterable[int]
) -> None:
    """A hello says which checkpoints lie on the node's disk: believe it, in both directions."""
    for job_id in job_ids:
        for checkpoint in list(state.checkpoints.get(job_id, ())):
            pieces = [
                replace(piece, replicas=believed(piece.digest, piece.replicas, node_id, present))
                for piece in checkpoint.pieces
            ]
            _put_pieces(state, checkpoint, pieces)


def believed(
    digest: str, replicas: tuple[str, ...], node_id: str, present: Mapping[str, None]
) -> tuple[str, ...]:
    """Who holds it, now that this node has said what it holds."""
    if digest in present:
        return replicas if node_id in replicas else (*replicas, node_id)
    if len(present) >= DIGESTS_MAX:
        return replicas
    return tuple(holder for holder in replicas if holder != node_id)


def keep_order(live: LiveNode) -> KeepCheckpoints | None:
    """What the node must keep; `None` where the list would not fit one message."""
    if len(live.digests) > DIGESTS_MAX:
        return None
    return KeepCheckpoints(tuple(sorted(live.digests)))
