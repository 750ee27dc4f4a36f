"""Which checkpoints a node may forget, when the coordinator's list of what to keep is not all.

Problem: the coordinator lists what it knows. The newest progress of a job may be what it does not
know yet: a replica on this node whose writer trains on while the coordinator is away, and proposes
it hours later. Dropping what is not listed after some minutes loses the only other copy; sparing
everything for that long piles up, with a checkpoint every few seconds, hundreds of those that were
replaced.

Age does not tell the two apart; their place in the job's history does. A checkpoint that is not
listed is

1. *superseded* when a listed one of the same job lies on this node too and is newer: of a greater
   epoch, or of the same epoch and a greater step. It goes at once: nobody falls back to it, as the
   coordinator lists what jobs may fall back to;
2. otherwise it may be the newest of its job: newer than every listed one here, or of a job of which
   none is listed here, or one that cannot be read. It stays until it was written, or last
   published, more than `ORPHAN_S` ago, and has not been listed for `UNLISTED_S` of this process:
   times of files jump with the wall clock, and one that is wrong for a while after a boot would
   have all of them be a week old at once.

Two checkpoints of one epoch and step (a last one, right after a regular one) are told apart by when
they were written here. The later one may be waiting for its commit while the earlier one is listed,
so it is not superseded, and the earlier one is, as soon as the later one is listed.

The ranks of a gang have histories of their own: what one of them wrote last says nothing of what
another one has written and nobody has proposed yet. So a part is superseded by a part of its own
rank, or by anything of a later epoch, under which none of the earlier one can still be proposed.

The sweep itself is the store's; here is only what it decides by.
"""

import time
from collections.abc import Callable, Iterable

from agent.chunks.manifest import Manifest

# How long a coordinator may be gone, or a writer cut off, and still find its unlisted replica: a
# week covers a long weekend with nobody on call. What waits so long is little: one or a few
# checkpoints of each job that ended, moved away or lost its writer while it was not listed.
ORPHAN_S = 7 * 86_400.0
# A clock that is wrong is set right within minutes where NTP runs; nodes that are switched off at
# night still come to it.
UNLISTED_S = 3_600.0
# Chunks are on a node without a manifest between a peer's question which are missing and the upload
# that follows within seconds, and between two tries of an upload that broke. What is gone then is
# sent again, so this need not be long; the upload itself does not count against it.
CHUNK_GRACE_S = 60.0


class Listed:
    """The newest listed checkpoint of each job on this node, and of each rank of it."""

    def __init__(self) -> None:
        self._newest: dict[tuple[int, int | None], tuple[int, int, int]] = {}
        self._epochs: dict[int, int] = {}

    def add(self, manifest: Manifest, written_ns: int) -> None:
        """A checkpoint that is listed, lies here and can be read; `written_ns` is the time stamp of
        its manifest."""
        place = (manifest.epoch, manifest.step, written_ns)
        job_id, whose = manifest.job_id, (manifest.job_id, manifest.rank)
        self._newest[whose] = max(place, self._newest.get(whose, place))
        self._epochs[job_id] = max(manifest.epoch, self._epochs.get(job_id, 0))

    def supersede(self, manifest: Manifest, written_ns: int) -> bool:
        """Whether this checkpoint, which is not listed, may go at once. Ask after every `add`."""
        if manifest.epoch < self._epochs.get(manifest.job_id, 0):
            return True
        newest = self._newest.get((manifest.job_id, manifest.rank))
        return newest is not None and (manifest.epoch, manifest.step, written_ns) < newest


class Unlisted:
    """Since when, by the monotonic clock, each checkpoint has not been listed."""

    def __init__(self, wait_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._wait_s = wait_s
        self._now_s = now_s
        self._since_s: dict[str, float] = {}

    def waited(self, digests: Iterable[str]) -> frozenset[str]:
        """Those of these, which are all that are not listed now, that have waited long enough."""
        now_s, before = self._now_s(), self._since_s
        since = {digest: before.get(digest, now_s) for digest in digests}
        self._since_s = since
        return frozenset(digest for digest in since if now_s - since[digest] >= self._wait_s)
