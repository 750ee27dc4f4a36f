"""The ranks of a job as one thing: they start together, and the end of one is the end of all.

Problem: ranks of one training wait for one another in every collective operation. When one is gone
the others hang and can save nothing, and a job that goes on with some of them, or is queued while
some still hold their GPUs, is in two places at once. So what happens to one rank is looked at here,
over all ranks of the try (those of the highest epoch; a job of one rank is a gang of one):

1. A rank that fails, is refused or is lost has *broken* the gang: the others are killed at once,
   and what they had captured is rescued by their agents.
2. What becomes of the job is decided once, when no rank is left on a node in touch (`_conclude`).
   Then the GPUs of all of them are free for the next try.
3. Stop requests go to all ranks, with the job's grace.
4. A rank that ends well while others go on gives them that grace to end too; then they are stopped.
5. A rank out of reach breaks the gang only when another is known to be in touch. An outage of the
   coordinator, or a cut from all nodes, looks the same at first: leases end one by one. So one that
   is in touch must have been heard after the other's lease had ended, and if it was out of reach
   itself just now, the others get as long to return as after a restart of the coordinator. If all
   are out of reach, the job is queued as any other: the ranks go on if they all come back first.
6. Ranks that resumed from different checkpoints are no training: that, too, breaks the gang.
7. Of the places of a new try each rank gets the one where its part of the last checkpoint lies.

Whether a gang is broken follows from what is recorded of its ranks, so a coordinator that restarts
repeats the same orders. The only time that counts, of rule 4, then begins anew.
"""

from collections.abc import Sequence
from dataclasses import replace

from coordinator.core import (
    arrays,
    checkpoints,
    claims,
    costs,
    mismatches,
    outcomes,
    parts,
    precopy,
    ranks,
    standby,
    traces,
)
from coordinator.core.launch import Gang
from coordinator.core.messages import StartAttempt
from coordinator.core.model import Attempt, Job, JobIntent, Part
from coordinator.core.phases import (
    ATTEMPT_ENDED,
    ATTEMPT_LIVE,
    AttemptPhase,
    JobPhase,
    NodePhase,
)
from coordinator.core.rooms import Place
from coordinator.core.state import Instant, State
from coordinator.core.validate import GRACE_MS_MAX

RUNNING_JOB = (JobPhase.ACTIVE, JobPhase.CANCELLING)
_BREAKING = (AttemptPhase.FAILED, AttemptPhase.REFUSED, AttemptPhase.LOST)
# Above what services use, below what Linux gives out (ip_local_port_range). One that is taken is
# another one on the next try. The time of submission tells fleets on one host apart, whose jobs
# have the same numbers.
PORT_FIRST = 20_000
PORTS = 10_000
SIGKILL = 9
# Disks and networks are slower when many save at once, as when a node is drained.
GRACE_PER_SAVE = 2
LEFT_BEHIND = "some of its ranks ended and the others had to be stopped"
PARTS_MISSING = "its gang has ended before all parts were there"


def by_parts(places: Sequence[Place], pieces: Sequence[Part]) -> tuple[Place, ...]:
    """By rank, such that ranks go where their parts of the last checkpoint lie, those on one node
    still follow one another. From rank 0 on, the node that holds most of what comes next is taken,
    and of several the one that holds least of the rest: whoever was sent the parts of all can take
    any rank."""
    if len(pieces) != len(places):
        return tuple(places)
    blocks: dict[str, list[Place]] = {}
    for place in places:
        blocks.setdefault(place.node, []).append(place)
    held: dict[str, dict[int, None]] = {node: {} for node in blocks}
    for rank, piece in enumerate(pieces):
        for node in piece.replicas:
            held.get(node, {})[rank] = None
    ordered: list[Place] = []
    while blocks:
        first = len(ordered)

        def order(node: str, first: int = first) -> tuple[int, int]:
            mine = range(first, first + len(blocks[node]))
            here = sum(rank in held[node] for rank in mine)
            return -here, len(held[node])

        ordered += blocks.pop(min(blocks, key=order))
    return tuple(ordered)


# --- what a rank is told --------------------------------------------------------------------------


def start_order(state: State, attempt: Attempt) -> StartAttempt:
    job = state.jobs[attempt.job_id]
    return StartAttempt(
        attempt.id,
        state.indices.failures.told(arrays.launched(job)),
        attempt.gpu_uuids,
        checkpoints.candidates(state, job, attempt.node),
        checkpoints.replica_target(state, attempt),
        restart_count=state.numbering.restarts(job.id, attempt.epoch),
        gang=_place(state, job, attempt) if attempt.ranks > 1 else None,
        traceparent=traces.traceparent(job, attempt.epoch),
    )


def _place(state: State, job: Job, attempt: Attempt) -> Gang:
    gang = state.gang(job)
    nodes = tuple(dict.fromkeys(rank.node for rank in gang))
    here = [rank for rank in gang if rank.node == attempt.node]
    host = state.nodes[nodes[0]].node.peer_address.rpartition(":")[0].strip("[]")
    return Gang(
        rank=attempt.rank,
        world_size=attempt.ranks,
        local_rank=attempt.rank - here[0].rank,
        local_world_size=len(here),
        node_rank=nodes.index(attempt.node),
        nodes=nodes,
        master_host=host,
        master_port=PORT_FIRST + (job.id * 31 + attempt.epoch + job.submitted_unix_ms) % PORTS,
        node_gpu_uuids=tuple(uuid for rank in here for uuid in rank.gpu_uuids),
    )


def stop(state: State, now: Instant, job: Job, reason: str, precopy_ms: int | None = None) -> None:
    """Ask all ranks to leave; those of a broken gang are killed. Asking again repeats the
    orders."""
    gang = [rank for rank in state.gang(job) if rank.phase not in ATTEMPT_ENDED]
    if precopy_ms is not None and not _sends_ahead(state, job, gang):
        precopy_ms = None
    if precopy_ms is not None:
        gang = [rank if rank.stop_reason else _aimed(state, rank) for rank in gang]
    _stop(state, now, job, gang, reason, precopy_ms=precopy_ms)


def _sends_ahead(state: State, job: Job, gang: list[Attempt]) -> bool:
    """Whether a checkpoint goes ahead of the stop, where that is decided here: of several ranks,
    the first time that they are asked."""
    if job.spec.ranks == 1 or any(rank.stop_reason for rank in gang):
        return True
    targets = [standby.aim(state, rank.id) for rank in gang]
    why_not = precopy.why_not(state, job, gang, targets)
    if why_not:
        state.log("info", "gang.no_precopy", job=job.id, reason=why_not)
    return not why_not


def committed(state: State, now: Instant, job: Job) -> None:
    """The job may have another checkpoint: ranks that hold their stop back until one has arrived go
    on with it."""
    gang = [rank for rank in state.gang(job) if rank.phase not in ATTEMPT_ENDED]
    waiting = [rank for rank in gang if rank.precopy_ms is not None]
    if job.spec.ranks > 1 and waiting and precopy.arrived(state, job, gang):
        stop(state, now, job, waiting[0].stop_reason)


def _aimed(state: State, attempt: Attempt) -> Attempt:
    """Its copies go where it goes from here on."""
    node_id = standby.aim(state, attempt.id)
    if node_id == attempt.replica_node:
        return attempt
    return checkpoints.send_copies_to(state, attempt, node_id)


def _stop(
    state: State,
    now: Instant,
    job: Job,
    gang: Sequence[Attempt],
    reason: str,
    *,
    precopy_ms: int | None = None,
) -> None:
    patience_ms = grace_ms(state, job)
    state.finish_ms.pop(job.id, None)
    told = False
    for rank in gang:
        first = ranks.stop(state, now, rank, reason, patience_ms, precopy_ms=precopy_ms)
        if first and not told:  # one line of history for all of them
            told = True
            state.tell(
                now.unix_ms, job.id, "attempt.stopping", reason, attempt=rank.id, node=rank.node
            )


def grace_ms(state: State, job: Job) -> int | None:
    """How long a rank that is stopped has to save: what its owner allows, and twice what saving has
    taken. `None`: none, since it could not."""
    if broken(job, state.gang(job)):
        return None
    saves_ms = round(GRACE_PER_SAVE * costs.save_s(state, job) * 1000)
    return max(job.spec.grace_ms, min(saves_ms, GRACE_MS_MAX))


def broken(job: Job, gang: Sequence[Attempt]) -> bool:
    """Whether those that are left can neither go on nor save."""
    if any(rank.phase in _BREAKING for rank in gang) or checkpoints.at_odds(gang):
        return True
    return mismatches.found(job, gang) is not None


# --- what happens to a rank -----------------------------------------------------------------------


def at_odds(state: State, now: Instant, attempt: Attempt) -> bool:
    """A rank has started. Whether others resumed from another checkpoint than it; the order of the
    news says nothing."""
    job = state.jobs[attempt.job_id]
    gang = state.gang(job)
    if not checkpoints.at_odds(gang):
        return False
    started = [rank for rank in gang if rank.started_unix_ms is not None]
    behind = min(started, key=lambda rank: rank.restored_step)
    ahead = max(started, key=lambda rank: rank.restored_step)
    state.avoid[job.id] = behind.node
    what = f"rank {behind.rank} from step {behind.restored_step} on {behind.node}"
    than = f"rank {ahead.rank} from step {ahead.restored_step} on {ahead.node}"
    _stop_rest(state, now, job, f"{checkpoints.AT_ODDS}: {what}, {than}")
    return True


def _stop_rest(state: State, now: Instant, job: Job, reason: str) -> None:
    """Whoever is not being stopped yet; for the others the next heartbeat repeats the order as it
    is now."""
    left = [rank for rank in state.gang(job) if rank.phase not in ATTEMPT_ENDED]
    _stop(state, now, job, [rank for rank in left if not rank.stop_reason], reason)


def ended(state: State, now: Instant, attempt: Attempt) -> None:
    """A rank has ended, however it did."""
    job = state.jobs[attempt.job_id]
    if attempt.epoch != job.epoch:
        return
    gang = state.gang(job)
    if job.phase not in RUNNING_JOB:
        if all(rank.phase in ATTEMPT_ENDED for rank in gang):
            parts.forget(state, job, PARTS_MISSING)  # it was queued, and nobody comes back
    elif not any(rank.phase in ATTEMPT_LIVE for rank in gang):
        _conclude(state, now, job, gang)
    elif broken(job, gang):
        if mismatches.found(job, gang) is None:
            claims.keep(state, now, job, claims.KILLED_MS_MAX)
        _stop_rest(state, now, job, _story_of(attempt))
    elif not attempt.stop_reason:
        state.finish_ms.setdefault(job.id, now.now_ms + job.spec.grace_ms)


def _story_of(rank: Attempt) -> str:
    if rank.ranks == 1:
        return rank.reason
    return f"rank {rank.rank} on {rank.node}: {rank.reason}"


def cut_off(state: State, now: Instant, job: Job) -> None:
    """A rank is out of reach. Whether that ends the gang is seen when others are heard, or not."""
    gang = state.gang(job)
    if job.phase in RUNNING_JOB and not any(rank.phase in ATTEMPT_LIVE for rank in gang):
        _conclude(state, now, job, gang)


def returned(state: State, now: Instant, attempt: Attempt) -> None:
    """A rank is back in touch. It goes on if all others do, or may come back too."""
    job = state.jobs[attempt.job_id]
    if attempt.ranks == 1 or attempt.stop_reason:
        return
    gang = state.gang(job)
    reasons = [rank.stop_reason for rank in gang if rank.stop_reason]
    if reasons or broken(job, gang):
        _stop(state, now, job, [attempt], reasons[0] if reasons else "its gang has ended")
    elif any(rank.phase in ATTEMPT_ENDED for rank in gang):
        state.finish_ms.setdefault(job.id, now.now_ms + job.spec.grace_ms)


# --- the passing of time --------------------------------------------------------------------------


def resume(state: State, now_ms: int) -> None:
    """After a restart: those who had time to end get all of it again."""
    for job in state.jobs.values():
        if job.spec.ranks == 1 or job.phase not in RUNNING_JOB:
            continue
        gang = state.gang(job)
        left = any(rank.phase in ATTEMPT_LIVE and not rank.stop_reason for rank in gang)
        over = any(rank.phase in ATTEMPT_ENDED and not rank.stop_reason for rank in gang)
        if left and over and not broken(job, gang):
            state.finish_ms[job.id] = now_ms + job.spec.grace_ms


def tick(state: State, now: Instant) -> None:
    for job_id, finish_ms in list(state.finish_ms.items()):
        if finish_ms <= now.now_ms:
            state.finish_ms.pop(job_id)
            _overdue(state, now, state.jobs[job_id])
    for attempt_id in list(state.indices.unreachable):
        attempt = state.attempts[attempt_id]
        lost = state.nodes[attempt.node].phase is NodePhase.LOST
        if lost and attempt.ranks > 1 and attempt.phase is AttemptPhase.UNREACHABLE:
            _tear(state, now, state.jobs[attempt.job_id])


def _overdue(state: State, now: Instant, job: Job) -> None:
    gang = state.gang(job)
    over = next((rank for rank in gang if rank.phase in ATTEMPT_ENDED), None)
    if over is None or job.phase not in RUNNING_JOB:
        return
    waited = f"the others had {job.spec.grace_ms / 1000:g} s to end too"
    _stop_rest(state, now, job, f"rank {over.rank} has ended ({over.reason}), and {waited}")


def _tear(state: State, now: Instant, job: Job) -> None:
    """Give up the ranks out of reach if the others are known to be in touch, and have been for long
    enough if they were out of reach themselves."""
    gang = state.gang(job)
    if job.phase not in RUNNING_JOB:
        return
    away = [rank for rank in gang if rank.phase is AttemptPhase.UNREACHABLE]
    lost_ms = min(state.nodes[rank.node].deadline_ms for rank in away)
    if any(state.nodes[rank.node].expected_ms > now.now_ms for rank in away):
        return  # it has said hello, and stands in line
    patience_ms = state.options.restart_grace_ms
    for rank in gang:
        live = state.nodes[rank.node]
        heard = live.phase is NodePhase.UP and live.heard_ms >= lost_ms
        settled = live.back_ms is None or now.now_ms - live.back_ms >= patience_ms
        if rank.phase in ATTEMPT_LIVE and heard and settled:
            for missing in away:
                ranks.lose(state, now, missing, missing.reason)
            ended(state, now, state.attempts[away[0].id])
            return


# --- what becomes of the job ----------------------------------------------------------------------


def _conclude(state: State, now: Instant, job: Job, gang: Sequence[Attempt]) -> None:
    """No rank is left that anybody is in touch with."""
    state.finish_ms.pop(job.id, None)
    away = [rank for rank in gang if rank.phase is AttemptPhase.UNREACHABLE]
    if away and job.intent is JobIntent.RUN and not broken(job, gang):
        outcomes.requeue(state, now, job, away[0].reason)  # or they are back first
        return
    for rank in away:
        ranks.lose(state, now, rank, rank.reason)
    job = state.jobs[job.id]
    parts.forget(state, job, PARTS_MISSING)
    _settle(state, now, job, state.gang(job))


def _settle(state: State, now: Instant, job: Job, gang: Sequence[Attempt]) -> None:
    def first(phase: AttemptPhase) -> Attempt | None:
        return next((rank for rank in gang if rank.phase is phase), None)

    failed, refused = first(AttemptPhase.FAILED), outcomes.refusal(gang)
    lost, mismatched = first(AttemptPhase.LOST), mismatches.found(job, gang)
    stopped = next((rank for rank in gang if rank.stop_reason), None)
    done = [rank for rank in gang if rank.phase is AttemptPhase.SUCCEEDED]
    if len(done) == len(gang):
        outcomes.end_job(state, now, job, JobPhase.SUCCEEDED, "finished")
    elif job.intent is JobIntent.CANCEL:
        outcomes.end_job(state, now, job, JobPhase.CANCELLED, "cancelled by its owner")
    elif lost is not None:
        # The others see their connections break, and fail, before anybody knows that a node died.
        outcomes.requeue(state, now, job, lost.reason)
    elif mismatched is not None:
        # Of the others some may have seen a connection break, or have been killed as they waited.
        outcomes.mismatched(state, now, job, _story_of(mismatched))
    elif failed is not None:
        # A rank that a signal ended may be why the others failed, whoever was heard first; but for
        # those that we had killed.
        own = all(rank.exit_code is not None or _is_killed(rank) for rank in gang)
        outcomes.failed(state, now, _as_one(gang, failed), _story_of(failed), own=own)
    elif refused is not None:
        outcomes.refused(state, now, job, refused)
    elif checkpoints.at_odds(gang):
        outcomes.yielded(state, now, job, _as_one(gang, gang[0]), checkpoints.AT_ODDS)
    elif stopped is not None and not any(not rank.stop_reason for rank in gang):
        outcomes.requeue(state, now, job, stopped.stop_reason)
    elif stopped is not None:
        outcomes.yielded(state, now, job, _as_one(gang, stopped), LEFT_BEHIND)
    else:
        outcomes.yielded(state, now, job, _as_one(gang, gang[0]))


def _is_killed(rank: Attempt) -> bool:
    return bool(rank.stop_reason) and rank.signal == SIGKILL and not rank.ended_by_itself


def _as_one(gang: Sequence[Attempt], cause: Attempt) -> Attempt:
    """The whole try, told as the story of the rank that ended it: rank 0 commits for all, and not
    every rank says how far it is."""
    started = next((rank for rank in gang if rank.started_unix_ms is not None), cause)
    step = max((rank.times.step for rank in gang if rank.times.step is not None), default=None)
    return replace(
        cause,
        commits=gang[0].commits,
        restored_digest=started.restored_digest,
        restored_step=started.restored_step,
        times=replace(cause.times, step=step),
    )
