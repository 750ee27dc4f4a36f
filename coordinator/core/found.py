"""Checkpoints that nodes have and a store that was put back does not know: a job goes on from the
newest.

Problem: what was committed after the copy was made nobody knows any more, and the copy's own last
one may be gone by then, since nodes keep few. A job that nobody runs would begin anew from a day
ago, or not at all, beside its newest checkpoint.

How: a hello lists what is whole on its node's disk. What of that is not known to a store that was a
copy is noted (`unlisted`), somebody reads beside the loop what it says of itself
(`coordinator/manifests.py`), and the newest, by epoch and then by step, is the last of its job from
here on. Whether it was committed it does not say, and that is not needed: nobody who has forgotten
the commits can have another one's in its place, and only an attempt that held the job has a higher
epoch. So it is done for a job that is held because of the copy; for one that runs, of its attempt's
own alone, and of what it says that it continues.

Ranks' parts of one step are one checkpoint when all of them are there, on whichever nodes. A rank
that saved twice at one step has two there, and nobody can say which belong together: then an older
step counts.

A job that was submitted after the copy, and that nobody runs, is known by its checkpoints alone. So
that they can be had it is there again, held, and without a request until somebody says it
(`submitted_again`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from coordinator.core import checkpoints, poison, restored
from coordinator.core.checkpoint_requests import Manifest, NoteManifests
from coordinator.core.job_requests import ON_HOLD
from coordinator.core.model import Checkpoint, Job, JobIntent, JobSpec, Part
from coordinator.core.phases import JobPhase
from coordinator.core.state import JOBS_OPEN_MAX, Instant, LiveNode, State

Pieces = list[tuple[Manifest, tuple[str, ...]]]  # by rank, with the nodes that have them
Place = tuple[int, int, int]  # epoch, step, job

OVERTAKEN = "a later attempt has gone on from before it"


def unlisted(state: State, present: Mapping[str, None]) -> tuple[str, ...]:
    """Of what lies on a node, what a store that was put back does not know."""
    if state.proven.remembered_job_id is None:
        return ()
    return tuple(digest for digest in present if digest not in state.indices.pieces)


def unread(state: State) -> list[tuple[str, str, tuple[str, ...]]]:
    """Nodes within reach, where their peers reach them, and what on them nobody has read yet."""
    if state.proven.remembered_job_id is None:
        return []
    return [
        (live.node.id, live.node.peer_address, live.unlisted)
        for live in state.nodes.values()
        if live.unlisted and live.session is not None
    ]


def note(state: State, now: Instant, live: LiveNode, body: NoteManifests) -> None:
    done = dict.fromkeys(body.digests)
    live.unlisted = tuple(digest for digest in live.unlisted if digest not in done)
    for manifest in sorted(body.manifests, key=lambda one: (one.epoch, one.step)):
        job = state.jobs.get(manifest.job_id) or _forgotten(state, now, manifest)
        if job is None:
            continue
        if manifest.digest in state.indices.pieces:
            _note_copy(state, job, live, manifest)
        elif manifest.rank is None:
            _consider(state, now, job, [(manifest, (live.node.id,))])
        else:
            live.parts_found[manifest.digest] = manifest
    if not live.unlisted:  # its second part of a step might be unread
        parts = [one for one in live.parts_found.values() if one.job_id in state.jobs]
        _put_together(state, now, [_place(one) for one in parts])


def _forgotten(state: State, now: Instant, manifest: Manifest) -> Job | None:
    """A job for it, if it can only be of one that was submitted after the copy. Its epoch stays 0:
    an attempt of it that is still to be heard of is newer."""
    if not state.proven.is_forgotten(manifest.job_id):
        return None
    if len(state.jobs) - len(state.ended) >= JOBS_OPEN_MAX:
        return None
    job_id, spec = manifest.job_id, JobSpec(name="unknown")
    reason = restored.FORGOTTEN.format(job=job_id)
    job = state.put_job(
        Job(
            job_id, spec, JobPhase.HELD, now.unix_ms, intent=JobIntent.HOLD, reason=reason,
            event_count=1,
        )
    )  # fmt: skip
    state.write_line(job, now.unix_ms, "job.held", reason)
    return job


def submitted_again(state: State, now: Instant, job: Job, spec: JobSpec, request_id: str) -> None:
    """Somebody says what a job is that is known by its checkpoints alone: it waits, as any."""
    state.put_job(replace(job, spec=spec, request_id=request_id, reason=restored.UNSURE))
    nodes = state.nodes.values()
    parts = [one for live in nodes for one in live.parts_found.values() if one.job_id == job.id]
    _put_together(state, now, [_place(one) for one in parts])
    job = state.jobs[job.id]
    if spec.hold:
        state.put_job(replace(job, reason=ON_HOLD))
    else:
        state.put_job(replace(job, phase=JobPhase.QUEUED, intent=JobIntent.RUN, reason=""))
    what = "its owner has said what it is, after the database was put back from a copy"
    state.tell(now.unix_ms, job.id, "job.submitted", what)


def _note_copy(state: State, job: Job, live: LiveNode, manifest: Manifest) -> None:
    for known in state.checkpoints.get(job.id, ()):
        if any(piece.digest == manifest.digest for piece in known.pieces):
            ranks = () if manifest.rank is None else (manifest.rank,)
            checkpoints.note_copy(state, job.id, known.digest, live.node.id, ranks)
            return


def _place(part: Manifest) -> Place:
    return part.epoch, part.step, part.job_id


def _put_together(state: State, now: Instant, places: Iterable[Place]) -> None:
    """Of these steps, in their order, those of which the parts of all ranks are there."""
    found: dict[Place, dict[int, dict[Manifest, tuple[str, ...]]]] = {one: {} for one in places}
    for live in state.nodes.values() if found else ():
        for one in live.parts_found.values():
            if _place(one) in found:
                holders = found[_place(one)].setdefault(one.rank or 0, {})
                holders[one] = (*holders.get(one, ()), live.node.id)
    for place in sorted(found):
        job, by_rank = state.jobs[place[2]], found[place]
        ranks = [by_rank.get(rank, {}) for rank in range(job.spec.ranks)]
        if job.spec.ranks > 1 and all(len(parts) == 1 for parts in ranks):
            _consider(state, now, job, [next(iter(parts.items())) for parts in ranks])


def _consider(state: State, now: Instant, job: Job, pieces: Pieces) -> None:
    if _is_last(state, job, pieces):
        _take(state, now, job, pieces)


def _is_last(state: State, job: Job, pieces: Pieces) -> bool:
    """Whether it can only be of the time after the copy, and is later than what is known."""
    manifest, attempt = pieces[0][0], state.current(job)
    if not restored.is_unsure(job):
        if job.phase is not JobPhase.ACTIVE or attempt is None:
            return False
        own = manifest.epoch == job.epoch and _lies_with_its_ranks(state, job, pieces)
        if not own and manifest.digest != attempt.restored_digest:
            return False
    kept = state.checkpoints.get(job.id, ())
    head = next(((one.epoch, one.step) for one in kept if one.digest == job.head), (0, 0))
    forgotten = state.proven.may_be_forgotten(job.id, manifest.epoch)
    return forgotten and (manifest.epoch, manifest.step) > head


def _lies_with_its_ranks(state: State, job: Job, pieces: Pieces) -> bool:
    """What an attempt has made is on its node, too; others may tell of anything."""
    return all(
        rank.node in holders for rank, (_, holders) in zip(state.gang(job), pieces, strict=False)
    )


def _take(state: State, now: Instant, job: Job, pieces: Pieces) -> None:
    (first, nodes), *others = pieces
    for known in state.good_checkpoints(job):
        if known.step > first.step:
            state.put_checkpoint(replace(known, bad=OVERTAKEN))
    parts = tuple(Part(one.digest, one.size_bytes, holders) for one, holders in others)
    state.put_checkpoint(
        Checkpoint(
            job.id, first.digest, first.parent, first.epoch, first.step,
            sum(one.size_bytes for one, _ in pieces), nodes, now.unix_ms, parts=parts,
        )
    )  # fmt: skip
    trouble = poison.progressed(job.trouble, first.step)
    job = state.put_job(replace(job, head=first.digest, head_step=first.step, trouble=trouble))
    what = f"step {first.step} of attempt {job.id}.{first.epoch} is the last checkpoint"
    state.tell(now.unix_ms, job.id, "checkpoint.found", what, node=nodes[0])
    checkpoints.retain(state, job)
