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
"""

from collections.abc import Mapping
from dataclasses import replace

from coordinator.core import checkpoints, poison, restored
from coordinator.core.checkpoint_requests import Manifest, NoteManifests
from coordinator.core.model import Checkpoint, Job, Part
from coordinator.core.phases import JobPhase
from coordinator.core.state import Instant, LiveNode, State

OVERTAKEN = "a later attempt has gone on from before it"


def unlisted(state: State, present: Mapping[str, None]) -> tuple[str, ...]:
    """Of what lies on a node, what a store that was put back does not know."""
    if state.numbering.remembered_job_id is None:
        return ()
    return tuple(digest for digest in present if digest not in state.indices.pieces)


def unread(state: State) -> list[tuple[str, str, tuple[str, ...]]]:
    """Nodes within reach, where their peers reach them, and what on them nobody has read yet."""
    return [
        (live.node.id, live.node.peer_address, live.unlisted)
        for live in state.nodes.values()
        if live.unlisted and live.session is not None
    ]


def note(state: State, now: Instant, live: LiveNode, body: NoteManifests) -> None:
    done = dict.fromkeys(body.digests)
    live.unlisted = tuple(digest for digest in live.unlisted if digest not in done)
    for manifest in sorted(body.manifests, key=lambda one: (one.epoch, one.step)):
        job = state.jobs.get(manifest.job_id)
        if job is None:
            continue
        if manifest.digest in state.indices.pieces:
            _note_copy(state, job, live, manifest)
        elif manifest.rank is None:
            _consider(state, now, job, [(manifest, (live.node.id,))])
        else:
            live.parts_found[manifest.digest] = manifest
    if live.parts_found and not live.unlisted:  # its second one of a step might be unread
        for pieces in _together(state, live):
            _consider(state, now, state.jobs[pieces[0][0].job_id], pieces)


Pieces = list[tuple[Manifest, tuple[str, ...]]]


def _note_copy(state: State, job: Job, live: LiveNode, manifest: Manifest) -> None:
    for known in state.checkpoints.get(job.id, ()):
        if any(piece.digest == manifest.digest for piece in known.pieces):
            ranks = () if manifest.rank is None else (manifest.rank,)
            checkpoints.note_copy(state, job.id, known.digest, live.node.id, ranks)
            return


def _together(state: State, live: LiveNode) -> list[Pieces]:
    """Of each step of which it has a part, the parts of all ranks in order, with the nodes that
    have them; in the order of steps. Where one is not there: none."""
    mine = {(one.epoch, one.step, one.job_id): None for one in live.parts_found.values()}
    found: dict[tuple[int, int, int, int], dict[Manifest, tuple[str, ...]]] = {}
    for other in state.nodes.values():
        for one in other.parts_found.values():
            if (one.epoch, one.step, one.job_id) in mine:
                holders = found.setdefault((one.epoch, one.step, one.job_id, one.rank or 0), {})
                holders[one] = (*holders.get(one, ()), other.node.id)
    steps = []
    for place in sorted(mine):
        job = state.jobs.get(place[2])
        ranks = [found.get((*place, rank), {}) for rank in range(job.spec.ranks if job else 0)]
        if ranks and all(len(parts) == 1 for parts in ranks):
            steps.append([next(iter(parts.items())) for parts in ranks])
    return steps


def _consider(state: State, now: Instant, job: Job, pieces: Pieces) -> None:
    if _is_last(state, job, pieces[0][0]):
        _take(state, now, job, pieces)


def _is_last(state: State, job: Job, manifest: Manifest) -> bool:
    """Whether it can only be of the time after the copy, and is later than what is known."""
    if not restored.is_unsure(job):
        attempt = state.current(job)
        if job.phase is not JobPhase.ACTIVE or attempt is None:
            return False
        if manifest.epoch != job.epoch and manifest.digest != attempt.restored_digest:
            return False
    kept = state.checkpoints.get(job.id, ())
    head = next(((one.epoch, one.step) for one in kept if one.digest == job.head), (0, 0))
    forgotten = state.numbering.may_be_forgotten(job.id, manifest.epoch)
    return forgotten and (manifest.epoch, manifest.step) > head


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
