"""The checkpoint store of a simulated box: contents instead of bytes, some of them scratched.

Problem: what a store promises (a digest names one content, a copy is whole or is not, older ones
are spared for a while) matters to the shells, its chunks do not. So a checkpoint here is one value,
and reading a scratched copy fails as a real one's verification does.
"""

import hashlib
from collections.abc import Sequence

from agent.chunks.manifest import Manifest
from agent.chunks.sweep import ORPHAN_S, Listed
from agent.core.values import (
    Gang,
    Origin,
    ReplicaSource,
    RestoreCandidate,
    Restored,
    StoredCheckpoint,
)
from agent.ports import CaptureSource, ChunkError
from tests.sim.box import Box, Copy, SimSource
from tests.sim.checkers import Content

NEW_BYTES = 1_000_000  # of each checkpoint


class SimChunks:
    """The checkpoint store: a dictionary of contents, some of them scratched."""

    def __init__(self, box: Box) -> None:
        self._box = box

    async def store(self, directory: str, origin: Origin) -> StoredCheckpoint:
        around = self._box.around
        await around.pause_ms(10, 400)
        content = self._box.disk.staging.get(directory)
        if content is None:
            raise ChunkError(f"{directory} is not there")
        return await self._keep(content, origin)

    async def store_capture(self, source: CaptureSource, origin: Origin) -> StoredCheckpoint:
        assert isinstance(source, SimSource)
        await self._box.around.pause_ms(10, 400)
        source.check()
        return await self._keep(source.content, origin)

    async def _keep(self, content: Content, origin: Origin) -> StoredCheckpoint:
        around, disk = self._box.around, self._box.disk
        if disk.full:
            raise ChunkError("no space left on device")
        digest = hashlib.sha256(f"{origin} {content}".encode()).hexdigest()
        around.checkers.contents[digest] = content
        new_bytes = 0 if digest in disk.copies else NEW_BYTES
        disk.copies.setdefault(digest, Copy(content, origin, around.now_ms()))
        await around.pause_ms(0, 20)
        # Large, and nearly all of it frozen: worth sending ahead.
        return StoredCheckpoint(digest, content.step, 100_000_000, new_bytes)

    async def discard(self, directory: str) -> None:
        self._box.disk.staging.pop(directory, None)

    async def replicate(self, digest: str, target: ReplicaSource) -> None:
        around = self._box.around
        copy = self._box.disk.copies.get(digest)
        if copy is None or not copy.intact:
            raise ChunkError(f"checkpoint {digest[:12]} cannot be read here")
        await around.pause_ms(20, 800)
        peer = around.peer(self._box.name, target.node)
        if peer is None:
            raise ChunkError(f"{target.node} at {target.address} does not answer")
        if peer.disk.full:
            raise ChunkError(f"{target.node}: no space left on device")
        known = peer.disk.copies.get(digest)
        if known is None or not known.intact:
            peer.disk.copies[digest] = Copy(copy.content, copy.origin, around.now_ms())

    async def restore(
        self, candidates: Sequence[RestoreCandidate], directory: str, gang: Gang | None = None
    ) -> Restored:
        """As the real one: skipped only where everybody answered. Of every other checkpoint in
        parts a rank reads its own alone."""
        disk = self._box.disk
        skipped: list[tuple[str, str]] = []
        await self._box.around.pause_ms(10, 600)
        for candidate in candidates:
            pieces = [
                (candidate.digest, candidate.sources),
                *((part.digest, part.sources) for part in candidate.parts),
            ]
            held: tuple[int, ...] = ()
            apart = gang is not None and gang.own_parts
            if gang is not None and apart and candidate.parts and int(candidate.digest[0], 16) % 2:
                held = (gang.rank,)
                pieces = [pieces[gang.rank]]
            copies = [self._find(digest, sources) for digest, sources in pieces]
            found = [copy for copy in copies if copy is not None]
            if len(found) == len(copies):
                self._take([digest for digest, _ in pieces], found)
                for copy in found:
                    disk.staging[f"{directory}/{copy.content.rank}"] = copy.content
                return Restored(candidate.digest, candidate.step, directory, tuple(skipped), held)
            skipped.append((candidate.digest, "nobody has a good copy"))
        return Restored("", 0, "", tuple(skipped))

    def _take(self, digests: Sequence[str], copies: Sequence[Copy]) -> None:
        """What was fetched lies here too from now on."""
        disk, now_ms = self._box.disk, self._box.around.now_ms()
        for digest, copy in zip(digests, copies, strict=True):
            known = disk.copies.get(digest)
            if known is None or not known.intact:
                disk.copies[digest] = Copy(copy.content, copy.origin, now_ms)

    def _find(self, digest: str, sources: Sequence[ReplicaSource]) -> Copy | None:
        """Raises `ChunkError` when somebody who may have it did not answer."""
        around = self._box.around
        silent = []
        here = self._box.disk.copies.get(digest)
        if here is not None and here.intact:
            return here
        for source in sources:
            if source.node == self._box.name:
                continue
            peer = around.peer(self._box.name, source.node)
            if peer is None:
                silent.append(source.node)
                continue
            copy = peer.disk.copies.get(digest)
            if copy is not None and copy.intact:
                return copy
        if silent:
            raise ChunkError(f"{digest[:12]}: no answer from {', '.join(silent)}")
        return None

    async def checkpoints(self) -> tuple[str, ...]:
        copies = self._box.disk.copies
        return tuple(sorted(copies, key=lambda digest: -copies[digest].stored_ms))

    async def collect(self, keep: frozenset[str]) -> int:
        copies, now_ms = self._box.disk.copies, self._box.around.now_ms()
        await self._box.around.pause_ms(1, 20)
        listed = Listed()
        for digest in keep.intersection(copies):
            listed.add(_manifest(copies[digest]), copies[digest].stored_ms)
        gone = [
            digest
            for digest, copy in copies.items()
            if digest not in keep
            and (
                listed.supersede(_manifest(copy), copy.stored_ms)
                or now_ms - copy.stored_ms > ORPHAN_S * 1000
            )
        ]
        for digest in gone:
            del copies[digest]
        return NEW_BYTES * len(gone)


def _manifest(copy: Copy) -> Manifest:
    """What the real store's rule of what may go looks at."""
    job_id, epoch, step, parent, rank = copy.origin
    return Manifest(job_id, epoch, step, parent, (), rank)
