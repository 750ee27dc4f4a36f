"""A checkpoint's way from the trainer's directory to the coordinator's word.

Problem: a checkpoint counts only when it would survive this node, yet training must not wait for
that. So the way has stations, one checkpoint at a time per attempt, and the trainer is told at two:

1. *offered*: the trainer hands over a directory, or names a capture in its slab. While another is
   on its way it waits here, and a newer one takes its place ("refused: superseded").
2. *storing*: hashed and durable in this node's chunk store -> the trainer hears `stored`. From here
   on it is journalled (`pending`) and survives the agent.
3. *replicating*: copied to the peer that the coordinator named, or to the shared directory.
4. *proposed*: spooled, and so delivered once, in order, however long the coordinator is away. Its
   parent is the one proposed before it.
5. *answered*: `committed` or `refused`.

When the process has ended its last checkpoint still goes this way; the end is reported after it.
A process that was killed may have finished a capture and not have said so. So, where it had a slab,
the newest capture in there is looked for first, and goes the same way if it has not gone it yet:
a kill at any instant loses what was done since the last capture, and nothing before it.
"""

from dataclasses import replace

from agent.core import endings
from agent.core.attempt import LiveAttempt, Offered, Pending, Phase, Proposal
from agent.core.copies import target_of
from agent.core.messages import (
    AttemptExited,
    CaptureFound,
    CheckpointProposed,
    CollectCheckpoints,
    CommitResult,
    DiscardSource,
    FindCapture,
    KeepCheckpoints,
    ReleaseSlab,
    ReplicateCheckpoint,
    ReplicationDone,
    ReplicationFailed,
    SetReplicaTarget,
    StoreCheckpoint,
    StoreDone,
    StoreFailed,
)
from agent.core.state import Instant, State, sentence
from agent.core.trainer_messages import TrainerCheckpoint, capture_place, is_capture

# Proposals that the coordinator has not answered. While it is away newer checkpoints wait at the
# first station, so that an outage of days holds this many on disk and not thousands.
UNANSWERED_MAX = 8
REPLICA_RETRY_MS = 5_000
# Likewise of what counts already, which nobody waits for: when many nodes die at once, those who go
# on elsewhere may all ask the same standby, which takes some tens of copies at a time.
RESTORED_RETRY_MS = 30_000
# Each try in a row that fails doubles the wait, up to here: a full disk stays full for hours, and
# the coordinator names another standby where there is one.
COPY_RETRY_MS_MAX = 300_000
# After its process has ended an attempt waits this long for a required copy, then reports its end
# without that checkpoint: the GPUs are needed.
SETTLE_MS_MAX = 120_000
# A smaller copy says more of round trips than of the link.
TIMED_BYTES_MIN = 16_000_000


def offer(state: State, live: LiveAttempt, message: TrainerCheckpoint) -> None:
    """The trainer hands over a directory or a capture. The same number again is the same offer,
    sent twice; a capture's name is its own, whoever says it."""
    record = live.record
    capture = message.path if is_capture(message.path) else live.handed_capture
    offered = Offered(message.id, message.path, message.step, message.parts, capture)
    # By its path too: a second program of the same attempt counts its checkpoints from 1 again.
    stored = record.stored_path == _plain(offered.path) and (
        record.stored_id == offered.trainer_id or is_capture(offered.path)
    )
    if stored and record.stored_digest:
        state.tell(record.id, type="stored", id=message.id, digest=record.stored_digest)
        return
    if offered in (live.storing, live.offered) or _on_its_way(live, offered.path):
        return
    if _is_past(live, offered.path):
        _refuse(state, live, offered, "superseded")
        return
    live.handed_capture = capture
    superseded, live.offered = live.offered, offered
    if superseded is not None:
        _refuse(state, live, superseded, "superseded")
    if record.phase is Phase.ENDED:
        live.offered = None
        _refuse(state, live, offered, "the attempt has ended")
    advance_pipeline(state, live)


def _on_its_way(live: LiveAttempt, path: str) -> bool:
    """Whether this capture is being stored or waits for it; of a directory the path alone does not
    say so."""
    known = [offered.path for offered in (live.storing, live.offered) if offered is not None]
    return is_capture(path) and path in known


def _is_past(live: LiveAttempt, path: str) -> bool:
    """Whether this capture, or what was handed over after it, is stored or on its way: a newer one
    of the same slab, or a directory. Its slot still holds it then, and it comes up again when a
    trainer that did not hear an answer hands over again, or when its process is gone; progress must
    not go back to it."""
    if not is_capture(path):
        return False
    slab, sequence = capture_place(path)
    names = [offered.capture for offered in (live.storing, live.offered) if offered is not None]
    places = [capture_place(name) for name in (*names, live.record.past_capture) if name]
    return any(known == slab and newest >= sequence for known, newest in places)


def take_slab(state: State, live: LiveAttempt) -> None:
    """The trainer has memory for captures. One that comes too late has it for nothing."""
    if live.record.phase is Phase.ENDED:
        state.commands.append(ReleaseSlab(live.record.id))
    live.slab = live.record.phase is not Phase.ENDED


def search_slab(state: State, live: LiveAttempt) -> None:
    """The process is gone: look for a capture that it did not live to hand over."""
    if live.slab and not live.searching:
        live.searching = True
        state.commands.append(FindCapture(live.record.id))


def capture_found(state: State, now: Instant, live: LiveAttempt, found: CaptureFound) -> None:
    """Store it, unless it or what came after it is stored or on its way. One that still waits then
    is older, and is superseded."""
    if not live.searching:
        return
    live.searching = False
    known = not found.name or _is_past(live, found.name)
    if not known and live.record.phase is Phase.SETTLING:
        state.log("info", "checkpoint.rescued", attempt=live.record.id, step=found.step)
        rescued = Offered(0, found.name, found.step, found.parts, found.name)
        superseded, live.offered = live.offered, rescued
        if superseded is not None:
            _refuse(state, live, superseded, "superseded")
    advance_pipeline(state, live)
    settle(state, now, live)


def _plain(path: str) -> str:
    """A path as the journal can carry it (PEP 383)."""
    return path.encode("utf-8", "replace").decode()


def _refuse(state: State, live: LiveAttempt, refused: Offered, reason: str) -> None:
    state.tell(live.record.id, type="refused", id=refused.trainer_id, reason=reason)
    _discard(state, live, refused.path)


def _discard(state: State, live: LiveAttempt, path: str) -> None:
    """Unless the trainer has since built another checkpoint in the same place. A capture's slot is
    the trainer's again as soon as it hears the answer."""
    if is_capture(path):
        return
    if all(known is None or known.path != path for known in (live.storing, live.offered)):
        state.commands.append(DiscardSource(path))


def advance_pipeline(state: State, live: LiveAttempt) -> None:
    """Take the next station, if the one ahead is free."""
    record = live.record
    pending = record.pending is not None and not record.pending.restored
    busy = live.storing is not None or pending or live.offered is None
    # Not before it is known to run: the coordinator hears of the start first.
    if busy or record.phase not in (Phase.RUNNING, Phase.SETTLING):
        return
    if len(live.unanswered) >= UNANSWERED_MAX and not _leaves(live):
        return
    live.storing, live.offered = live.offered, None
    storing = live.storing
    if storing is not None:
        part = storing.parts > 1
        state.commands.append(
            StoreCheckpoint(record.id, storing.path, storing.step, record.head, part)
        )


def stored(state: State, now: Instant, live: LiveAttempt, done: StoreDone) -> None:
    offered = live.storing
    if offered is None or live.record.phase is Phase.ENDED:
        return
    live.storing = None
    kept, head = done.stored, live.record.head
    # Of a job's first checkpoint all is new, which says nothing of how much will change.
    live.change_bytes = kept.new_bytes if head else 0
    live.stored_bytes = kept.size_bytes
    about = kept.digest, kept.step, kept.size_bytes, head
    pending = Pending(*about, offered.trainer_id, offered.parts)
    state.put(
        live,
        pending=pending,
        stored_id=offered.trainer_id,
        stored_path=_plain(offered.path),
        stored_digest=kept.digest,
        past_capture=offered.capture or live.record.past_capture,
    )
    _discard(state, live, offered.path)
    state.tell(live.record.id, type="stored", id=offered.trainer_id, digest=kept.digest)
    state.log(
        "info",
        "checkpoint.stored",
        attempt=live.record.id,
        digest=kept.digest,
        step=kept.step,
        size_bytes=kept.size_bytes,
        new_bytes=kept.new_bytes,
    )
    replicate(state, now, live)


def store_failed(state: State, now: Instant, live: LiveAttempt, failed: StoreFailed) -> None:
    """The trainer goes on; its next checkpoint is another try."""
    offered = live.storing
    if offered is None:
        return
    live.storing = None
    _refuse(state, live, offered, sentence(failed.reason))
    state.log("error", "checkpoint.failed", attempt=live.record.id, reason=failed.reason)
    if live.record.phase is Phase.SETTLING and not is_capture(offered.path):
        search_slab(state, live)  # the capture before it may still be there
    advance_pipeline(state, live)
    settle(state, now, live)


def replicate(state: State, now: Instant, live: LiveAttempt) -> None:
    """Copy the pending checkpoint off the node, if the job wants that and there is somewhere."""
    record = live.record
    if record.pending is None or live.replicating is not None:
        return
    target = target_of(state, live)
    live.replica_retry_ms = None
    if target is not None:
        live.replicating, live.copy_since_ms = target, now.now_ms
        state.commands.append(ReplicateCheckpoint(record.id, record.pending.digest, target))
    elif record.replica_required:
        live.replica_retry_ms = now.now_ms + REPLICA_RETRY_MS
    elif not record.pending.restored:
        propose(state, now, live, ())


def copy_restored(state: State, now: Instant, live: LiveAttempt) -> None:
    """It has started from a checkpoint that its standby has not got: the node before has died, say.
    Then the only copy may be here until the first commit, which may be an hour away. So it is sent
    at once, unless ranks on other nodes have it; what is stored meanwhile takes its place, and what
    it has in common with that need not be sent again."""
    record, target = live.record, target_of(state, live)
    if not record.restored_digest or target is None or record.phase is not Phase.RUNNING:
        return
    everywhere = not record.held_ranks and record.gang is not None and len(record.gang.nodes) > 1
    restored = next(one for one in record.candidates if one.digest == record.restored_digest)
    pieces = [(restored.digest, restored.sources), *((p.digest, p.sources) for p in restored.parts)]
    rank = 0 if record.gang is None else record.gang.rank
    if everywhere or rank >= len(pieces):
        return
    digest, sources = pieces[rank]
    if all(source.node != target.node for source in sources):
        parts, parent = len(pieces), record.head
        pending = Pending(digest, restored.step, 0, parent, 0, parts, restored=True)
        state.put(live, pending=pending)
        replicate(state, now, live)


def retarget(state: State, now: Instant, live: LiveAttempt, order: SetReplicaTarget) -> None:
    """Its copies go elsewhere; what it began with does too, as long as it has stored nothing, and
    its last commit where no other node has that any more. An older word of the coordinator knows of
    another last commit."""
    before = target_of(state, live)
    state.put(live, replica_target=order.target, replica_required=order.required)
    target, record = target_of(state, live), live.record
    live.copies_failed = live.copies_failed if target == before else 0
    moved = target is not None and (before is None or before.node != target.node)
    lone = order.lone if record.phase is Phase.RUNNING and record.pending is None else None
    if lone is not None and lone.digest == record.head:
        pending = Pending(lone.digest, lone.step, 0, lone.digest, 0, lone.parts, restored=True)
        state.put(live, pending=pending)
    elif moved and record.pending is None and not record.stored_digest:
        copy_restored(state, now, live)
    if _leaves(live) or order.lost:
        hurry(state, now, live, lost=order.lost)
    replicate(state, now, live)


def replicated(state: State, now: Instant, live: LiveAttempt, done: ReplicationDone) -> None:
    live.replicating, pending = None, live.record.pending
    live.copies_failed = 0
    if pending is not None and pending.digest == done.digest:
        _note_copy(now, live, done.node)
        propose(state, now, live, (done.node,))
        target = target_of(state, live)
        named = target is not None and target.node != done.node  # while that was on its way
        if pending.restored and named and live.record.phase is Phase.RUNNING:
            state.put(live, pending=pending)
            replicate(state, now, live)
    else:
        replicate(state, now, live)  # what was stored while this was on its way


def _note_copy(now: Instant, live: LiveAttempt, node: str) -> None:
    """What a node had the last time it is not sent again."""
    sent_bytes = live.change_bytes if live.copied_to == node else live.stored_bytes
    if sent_bytes >= TIMED_BYTES_MIN:
        live.copy_bytes_per_ms = sent_bytes // max(1, now.now_ms - live.copy_since_ms)
    live.copied_to = node


def replication_failed(
    state: State, now: Instant, live: LiveAttempt, failed: ReplicationFailed
) -> None:
    """A job that requires a copy waits for one; for any other the local checkpoint counts, unless
    there is another node to try by now. What counts is tried again until something is stored."""
    tried, live.replicating = live.replicating, None
    record = live.record
    live.copies_failed += tried == target_of(state, live)
    if record.pending is None or record.pending.digest != failed.digest:
        replicate(state, now, live)
        return
    state.log(
        "warning",
        "checkpoint.not_replicated",
        attempt=record.id,
        digest=failed.digest,
        reason=failed.reason,
    )
    if target_of(state, live) not in (None, tried):
        replicate(state, now, live)
    elif record.replica_required:
        live.replica_retry_ms = now.now_ms + _copy_wait_ms(live, REPLICA_RETRY_MS)
    else:
        if not record.pending.restored:
            propose(state, now, live, ())
        if live.record.phase is Phase.RUNNING:
            if not record.pending.restored:
                state.put(live, pending=replace(record.pending, restored=True))
            live.replica_retry_ms = now.now_ms + _copy_wait_ms(live, RESTORED_RETRY_MS)


def _copy_wait_ms(live: LiveAttempt, first_ms: int) -> int:
    doublings = 0 if _leaves(live) else min(10, max(0, live.copies_failed - 1))
    return min(COPY_RETRY_MS_MAX, first_ms << doublings)


def hurry(state: State, now: Instant, live: LiveAttempt, *, lost: bool = False) -> None:
    """It leaves, and its last checkpoint is behind a copy. One that waits is tried now, and one
    that goes to who is its standby no more begins again elsewhere: that node may be silent, and
    then it is a minute before that is known. Where it is known (`lost`), nothing waits for it."""
    pending = live.record.pending
    if pending is None or (pending.restored and not lost):
        return
    if live.replicating not in (None, target_of(state, live)):
        live.replicating = None
        replicate(state, now, live)
    elif live.replica_retry_ms is not None:
        replicate(state, now, live)


def _leaves(live: LiveAttempt) -> bool:
    return bool(live.record.stop_reason) or live.record.phase is Phase.SETTLING


def propose(state: State, now: Instant, live: LiveAttempt, copies: tuple[str, ...]) -> None:
    pending = live.record.pending
    if pending is None:
        return
    parent = live.record.head
    trainer_id = None if pending.restored else pending.trainer_id
    if not pending.restored or pending.digest not in live.unanswered:
        live.unanswered[pending.digest] = Proposal(trainer_id, parent)
    replicas = (state.options.node, *copies)
    state.put(live, pending=None, head=pending.digest)
    body = CheckpointProposed(
        pending.digest, parent, pending.step, pending.size_bytes, replicas, pending.parts
    )
    state.spool_event(now, live.record.id, body)
    advance_pipeline(state, live)
    settle(state, now, live)


def answered(state: State, live: LiveAttempt, result: CommitResult) -> None:
    """The coordinator's word. After a refusal the next proposal follows the last accepted one."""
    follows = _follows(live, result.digest)
    proposal = live.unanswered.pop(result.digest, None)
    trainer_id = None if proposal is None else proposal.trainer_id
    if result.accepted:
        state.put(live, committed=result.digest)
        if trainer_id is not None:
            state.tell(live.record.id, type="committed", id=trainer_id, digest=result.digest)
    else:
        if follows:
            pending = live.record.pending
            pending = None if pending is not None and pending.restored else pending
            state.put(live, head=result.head, committed=result.head, pending=pending)
        state.log(
            "warning",
            "checkpoint.refused",
            attempt=live.record.id,
            digest=result.digest,
            reason=result.reason,
        )
        if trainer_id is not None:
            state.tell(live.record.id, type="refused", id=trainer_id, reason=result.reason)
    advance_pipeline(state, live)


def _follows(live: LiveAttempt, digest: str) -> bool:
    """Whether what was proposed last rests on this checkpoint. It does not when an earlier refusal
    has made a new beginning since, and then a late refusal must not undo that."""
    head = live.record.head
    while head != digest:
        proposal = live.unanswered.get(head)
        if proposal is None or proposal.parent == head:  # a copy of what it began with
            return False
        head = proposal.parent
    return True


def settle(state: State, now: Instant, live: LiveAttempt) -> None:
    """Once the process is gone and its last checkpoint proposed, say how it ended."""
    record = live.record
    waiting = live.storing is not None or live.offered is not None or live.searching
    waiting = waiting or (record.pending is not None and not record.pending.restored)
    if record.phase is not Phase.SETTLING or waiting:
        return
    # What comes after its end stops nothing, and is not noted.
    by_itself = not record.stop_reason
    code, signal, reason = record.exit_code, record.exit_signal, record.exit_reason
    body = AttemptExited(code, signal, reason, by_itself, endings.said_of(record))
    sequence = state.spool_event(now, record.id, body)
    state.put(live, Phase.ENDED, last_sequence=sequence, pending=None)
    live.settle_ms = None
    if live.slab:
        live.slab = False
        state.commands.append(ReleaseSlab(record.id))


def give_up(state: State, now: Instant, live: LiveAttempt) -> None:
    """What is still on its way takes too long; the end is reported without it. A copy that is only
    wished for is given up alone: the checkpoint counts where it lies."""
    reason = f"it was not done within {SETTLE_MS_MAX} ms of the attempt's end"
    left = [offered for offered in (live.storing, live.offered) if offered is not None]
    live.storing = live.offered = None
    live.searching = False
    for offered in left:
        _refuse(state, live, offered, reason)
    pending = live.record.pending
    if pending is not None and not live.record.replica_required:
        propose(state, now, live, ())
        return
    digest = pending.digest if pending is not None else ""
    state.log("error", "checkpoint.abandoned", attempt=live.record.id, digest=digest, reason=reason)
    state.put(live, pending=None)
    settle(state, now, live)


def keep(state: State, order: KeepCheckpoints) -> None:
    """The coordinator's list, and what it cannot know of yet."""
    keep = dict.fromkeys(order.digests)
    for live in state.attempts.values():
        record = live.record
        keep.update(dict.fromkeys((record.head, record.committed, *live.unanswered)))
        if record.pending is not None:
            keep[record.pending.digest] = None
        if record.phase is Phase.ACCEPTED:
            for candidate in record.candidates:
                digests = (candidate.digest, *(part.digest for part in candidate.parts))
                keep.update(dict.fromkeys(digests))
    for event in state.spool.values():
        if isinstance(event.body, CheckpointProposed):
            keep[event.body.digest] = None
    keep.pop("", None)
    state.commands.append(CollectCheckpoints(tuple(keep)))
