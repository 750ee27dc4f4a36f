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
own alone, and of what it says that it continues. Ranks' parts are not put together.
"""

from collections.abc import Mapping
from dataclasses import replace

from coordinator.core import checkpoints, poison, restored
from coordinator.core.checkpoint_requests import Manifest, NoteManifests
from coordinator.core.model import Checkpoint, Job
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
        if job is None or job.spec.ranks > 1:
            continue
        if any(one.digest == manifest.digest for one in state.checkpoints.get(job.id, ())):
            checkpoints.note_copy(state, job.id, manifest.digest, body.node)
        elif _is_last(state, job, manifest):
            _take(state, now, job, body.node, manifest)


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


def _take(state: State, now: Instant, job: Job, node: str, manifest: Manifest) -> None:
    for known in state.good_checkpoints(job):
        if known.step > manifest.step:
            state.put_checkpoint(replace(known, bad=OVERTAKEN))
    state.put_checkpoint(
        Checkpoint(
            job.id, manifest.digest, manifest.parent, manifest.epoch, manifest.step,
            manifest.size_bytes, (node,), now.unix_ms,
        )
    )  # fmt: skip
    trouble = poison.progressed(job.trouble, manifest.step)
    job = state.put_job(
        replace(job, head=manifest.digest, head_step=manifest.step, trouble=trouble)
    )
    what = f"step {manifest.step} of attempt {job.id}.{manifest.epoch} is the last checkpoint"
    state.tell(now.unix_ms, job.id, "checkpoint.found", what, node=node)
    checkpoints.retain(state, job)
