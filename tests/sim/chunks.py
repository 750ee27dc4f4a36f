"""The checkpoint store of a simulated box: contents instead of bytes, some of them scratched.

Problem: what a store promises (a digest names one content, a copy is whole or is not, older ones
are spared for a while) matters to the shells, its chunks do not. So a checkpoint here is one value,
and reading a scratched copy fails as a real one's verification does.
"""

import hashlib
from collections.abc import Sequence

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

COLLECT_GRACE_MS = 60_000  # as in the real store, younger checkpoints are never collected


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
        return await self._keep(content, f"{origin} {content}")

    async def store_capture(self, source: CaptureSource, origin: Origin) -> StoredCheckpoint:
        assert isinstance(source, SimSource)
        await self._box.around.pause_ms(10, 400)
        source.check()
        return await self._keep(source.content, f"{origin} {source.content}")

    async def _keep(self, content: Content, text: str) -> StoredCheckpoint:
        around, disk = self._box.around, self._box.disk
        if disk.full:
            raise ChunkError("no space left on device")
        digest = hashlib.sha256(text.encode()).hexdigest()
        around.checkers.contents[digest] = content
        disk.copies.setdefault(digest, Copy(content, 1_000_000, around.now_ms()))
        await around.pause_ms(0, 20)
        # Large, and nearly all of it frozen: worth sending ahead.
        return StoredCheckpoint(digest, content.step, 100_000_000, 1_000_000)

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
            peer.disk.copies[digest] = Copy(copy.content, copy.size_bytes, around.now_ms())

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
            contents = [self._find(digest, sources) for digest, sources in pieces]
            found = [content for content in contents if content is not None]
            if len(found) == len(contents):
                self._take([digest for digest, _ in pieces], found)
                for content in found:
                    disk.staging[f"{directory}/{content.rank}"] = content
                return Restored(candidate.digest, candidate.step, directory, tuple(skipped), held)
            skipped.append((candidate.digest, "nobody has a good copy"))
        return Restored("", 0, "", tuple(skipped))

    def _take(self, digests: Sequence[str], contents: Sequence[Content]) -> None:
        """What was fetched lies here too from now on."""
        disk, now_ms = self._box.disk, self._box.around.now_ms()
        for digest, content in zip(digests, contents, strict=True):
            known = disk.copies.get(digest)
            if known is None or not known.intact:
                disk.copies[digest] = Copy(content, 1_000_000, now_ms)

    def _find(self, digest: str, sources: Sequence[ReplicaSource]) -> Content | None:
        """Raises `ChunkError` when somebody who may have it did not answer."""
        around = self._box.around
        silent = []
        here = self._box.disk.copies.get(digest)
        if here is not None and here.intact:
            return here.content
        for source in sources:
            if source.node == self._box.name:
                continue
            peer = around.peer(self._box.name, source.node)
            if peer is None:
                silent.append(source.node)
                continue
            copy = peer.disk.copies.get(digest)
            if copy is not None and copy.intact:
                return copy.content
        if silent:
            raise ChunkError(f"{digest[:12]}: no answer from {', '.join(silent)}")
        return None

    async def checkpoints(self) -> tuple[str, ...]:
        copies = self._box.disk.copies
        return tuple(sorted(copies, key=lambda digest: -copies[digest].stored_ms))

    async def collect(self, keep: frozenset[str]) -> int:
        copies, now_ms = self._box.disk.copies, self._box.around.now_ms()
        await self._box.around.pause_ms(1, 20)
        freed_bytes = 0
        for digest, copy in list(copies.items()):
            if digest not in keep and now_ms - copy.stored_ms > COLLECT_GRACE_MS:
                freed_bytes += copy.size_bytes
                del copies[digest]
        return freed_bytes
