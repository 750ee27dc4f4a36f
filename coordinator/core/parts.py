"""Checkpoints in parts: what the ranks of a gang hand over of one step is committed as one.

Problem: each rank writes its own part and no two are ready at once, so some have to wait for the
others, and a rank may never hand over its part of a step, because it died or skipped it. A
checkpoint of which a part is missing is none.

1. A part waits, durably, until the parts of all ranks for its step are there. A rank that saves
   twice at one step has two there; the first of each belong together.
2. Then they are one checkpoint, which follows the last commit and is named by rank 0's part.
3. Whatever was handed over before what is committed will never be complete and is refused, so that
   the agents forget it.
4. A rank may leave so many unanswered; then it hands over nothing more. Where that many wait, one
   that can never be complete, since another rank has gone on without it, is refused.

Until then each node's list of what to keep names what waits there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from coordinator.core import checkpoints
from coordinator.core.messages import CheckpointProposed, CommitResult
from coordinator.core.model import Attempt, Checkpoint, Job, Part, WaitingPart, attempt_id
from coordinator.core.phases import ATTEMPT_ENDED
from coordinator.core.state import Instant, State

# What an agent leaves unanswered before it takes no more from its trainer (agent/core/pipeline.py).
WAITING_MAX = 8


def propose(state: State, now: Instant, attempt: Attempt, body: CheckpointProposed) -> None:
    """A rank of a gang hands over a part, or rank 0 a whole checkpoint. Saying it twice gives the
    same answer twice, or none twice."""
    job = state.jobs[attempt.job_id]
    refusal = _refuse(state, job, attempt, body)
    if refusal:
        state.log(
            "warning", "checkpoint.refused", job=job.id, attempt=attempt.id,
            digest=body.digest, reason=refusal,
        )  # fmt: skip
        _answer(state, job, attempt.rank, body.digest, refusal)
    elif _committed(state, job, attempt.rank, body.digest):
        for node_id in body.replicas:  # it may have been copied since
            checkpoints.note_copy(state, job.id, job.head, node_id, (attempt.rank,))
        _answer(state, job, attempt.rank, body.digest)
    elif body.parts > 1:
        _wait(state, now, job, attempt, body)
    else:
        whole = checkpoints.proposed(job, attempt, body, now.unix_ms)
        checkpoints.commit(state, attempt, replace(whole, parent=job.head))
        _answer(state, state.jobs[job.id], attempt.rank, body.digest)
        _supersede(state, state.jobs[job.id], body.step, {})


def _refuse(state: State, job: Job, attempt: Attempt, body: CheckpointProposed) -> str:
    stale = checkpoints.refuse_attempt(job, attempt)
    if stale:
        return stale
    if body.parts <= 1 and attempt.rank:
        return f"rank {attempt.rank} hands over a whole checkpoint, which only rank 0 may"
    if body.parts > 1 and body.parts != attempt.ranks:
        return f"it is one of {body.parts} parts, and there are {attempt.ranks} ranks"
    if checkpoints.at_odds(state.gang(job)):
        return checkpoints.AT_ODDS
    if _committed(state, job, attempt.rank, body.digest):
        return ""
    # Of parts the epoch is the fence: whoever has been refused one, or has not heard yet of a
    # commit that others completed, still goes on with the same training.
    if body.parts <= 1 and body.parent not in (job.head, *_waiting_of_first(state, job)):
        return checkpoints.refuse_parent(job, body)
    return checkpoints.refuse_content(state, job, attempt, body)


def _committed(state: State, job: Job, rank: int, digest: str) -> bool:
    """Whether this is that rank's part of the last commit, or all of it."""
    head = next((c for c in state.good_checkpoints(job) if c.digest == job.head), None)
    return head is not None and rank < len(head.pieces) and head.pieces[rank].digest == digest


def _waiting_of_first(state: State, job: Job) -> list[str]:
    return [part.digest for part in state.parts.get(job.id, []) if part.rank == 0]


def _wait(state: State, now: Instant, job: Job, attempt: Attempt, body: CheckpointProposed) -> None:
    waiting = state.parts.get(job.id, [])
    for known in waiting:
        if (known.rank, known.digest) == (attempt.rank, body.digest):
            # It may have been copied since.
            copies = dict.fromkeys((*known.replicas, *body.replicas))
            state.put_part(replace(known, replicas=tuple(copies)))
            return
    part = WaitingPart(
        job.id, attempt.epoch, attempt.rank, body.step, body.digest, body.parent,
        body.size_bytes, body.replicas, 1 + max((p.sequence for p in waiting), default=0),
    )  # fmt: skip
    state.put_part(part)
    together: dict[int, WaitingPart] = {}
    for other in state.parts[job.id]:
        if other.step == body.step:
            together.setdefault(other.rank, other)
    if len(together) == attempt.ranks:
        _commit(state, now, job, together)
    else:
        _make_room(state, job, attempt.ranks)


def _commit(state: State, now: Instant, job: Job, together: dict[int, WaitingPart]) -> None:
    own, *others = [together[rank] for rank in sorted(together)]
    checkpoint = Checkpoint(
        job.id, own.digest, job.head, own.epoch, own.step,
        sum(part.size_bytes for part in together.values()), own.replicas, now.unix_ms,
        parts=tuple(Part(part.digest, part.size_bytes, part.replicas) for part in others),
    )  # fmt: skip
    checkpoints.commit(state, state.gang(job)[0], checkpoint)
    job = state.jobs[job.id]
    for part in (own, *others):
        state.drop_part(part)
        _answer(state, job, part.rank, part.digest)
    _supersede(state, job, own.step, together)


def _supersede(state: State, job: Job, step: int, together: dict[int, WaitingPart]) -> None:
    """Refuse what was handed over before what is committed now."""
    for part in list(state.parts.get(job.id, [])):
        taken = together.get(part.rank)
        before = taken is not None and part.sequence < taken.sequence
        if before or part.step < step or (not together and part.rank == 0):
            _drop(state, job, part, f"superseded by step {step}")


def _make_room(state: State, job: Job, ranks: int) -> None:
    """Where a rank has as many waiting as it may, the oldest goes that can never be complete; of
    more than that, the oldest in any case."""
    by_rank: dict[int, list[WaitingPart]] = {rank: [] for rank in range(ranks)}
    for part in state.parts[job.id]:
        by_rank[part.rank].append(part)
    full = [mine for mine in by_rank.values() if len(mine) >= WAITING_MAX]
    hopeless = _hopeless(state, job, by_rank) if full else frozenset()
    for mine in full:
        oldest = next((part for part in mine if part.step in hopeless), None)
        if oldest is not None:
            _drop(state, job, oldest, "superseded: another rank has gone on without this step")
        elif len(mine) > WAITING_MAX:
            _drop(state, job, mine[0], f"superseded: {WAITING_MAX} later ones wait")


def _hopeless(
    state: State, job: Job, by_rank: Mapping[int, Sequence[WaitingPart]]
) -> frozenset[int]:
    """The steps of which some rank will never hand over its part: each goes through the steps in
    order. Asked once for all parts, since it is asked whenever one of many comes."""
    waiting = dict.fromkeys(part.step for mine in by_rank.values() for part in mine)
    found: list[int] = []
    for rank in state.gang(job):
        steps = dict.fromkeys(part.step for part in by_rank[rank.rank])
        ended, newest = rank.phase in ATTEMPT_ENDED, max(steps, default=0)
        found += [step for step in waiting if step not in steps and (ended or newest > step)]
    return frozenset(found)


def forget(state: State, job: Job, reason: str) -> None:
    """The gang has ended, or another takes its place: nothing that waits will be complete."""
    for part in list(state.parts.get(job.id, [])):
        _drop(state, job, part, reason)


def _drop(state: State, job: Job, part: WaitingPart, reason: str) -> None:
    state.drop_part(part)
    _answer(state, job, part.rank, part.digest, reason)


def _answer(state: State, job: Job, rank: int, digest: str, refusal: str = "") -> None:
    attempt = state.attempts.get(attempt_id(job.id, job.epoch, rank, job.spec.ranks))
    if attempt is not None:
        result = CommitResult(attempt.id, digest, not refusal, refusal, job.head)
        state.send(attempt.node, result)


def reconcile(
    state: State, node_id: str, present: Mapping[str, None], job_ids: Iterable[int]
) -> None:
    """What waits and is not on its node's disk any more does not wait there."""
    for job_id in job_ids:
        for part in list(state.parts.get(job_id, ())):
            replicas = checkpoints.believed(part.digest, part.replicas, node_id, present)
            if not replicas:
                state.drop_part(part)
            elif replicas != part.replicas:
                state.put_part(replace(part, replicas=replicas))
