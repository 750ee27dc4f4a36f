"""The `Chunks` port: checkpoints stored here, copied to a replica, and restored from wherever they
verify.

Problem: a checkpoint is safe only when it survives the node that wrote it. Copying whole
checkpoints moves a frozen backbone each time.

Replicating asks the target what it lacks, sends that, and the manifest last, so that the target
never shows a checkpoint that it cannot give back. Restoring has a file of its own
(`restoring.py`), as have the threads that do the work (`threads.py`) and storage that nodes share
(`shared_storage.py`).

What lies in the store is taken as written while it is shared (see `store`); restoring is where rot
is found, and repaired from another copy.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import structlog

from agent.chunks.manifest import Absent, Denied, DiskFull, Invalid, Manifest, decode
from agent.chunks.peers import Errand, PeerClient, deadline_s
from agent.chunks.restoring import Restorer, pin_all
from agent.chunks.shared_storage import SHARED_NODE, SharedStorage
from agent.chunks.store import ChunkStore
from agent.chunks.threads import Threads
from agent.chunks.tree import Known, ingest, ingest_capture
from agent.core.values import (
    Gang,
    Origin,
    ReplicaSource,
    RestoreCandidate,
    Restored,
    StoredCheckpoint,
)
from agent.ports import CaptureSource, ChunkError

# The second try covers a chunk swept or damaged between question and upload, and a connection that
# had gone stale.
TRIES_MAX = 2
# Long enough for a restarted peer to listen again, short beside a checkpoint interval.
RETRY_PAUSE_S = 0.5
# An object store answers each of these by itself, in a second together: far from the deadline.
SHARED_QUESTION_DIGESTS_MAX = 256

_log = structlog.get_logger("baton.chunks")


class ChunkService:
    """`staging_root` is the directory below which trainers build checkpoints; nothing else is ever
    taken in or removed.

    `open` before use, `close` after.
    """

    def __init__(
        self,
        store: ChunkStore,
        peers: PeerClient,
        *,
        staging_root: Path,
        retry_pause_s: float = RETRY_PAUSE_S,
    ) -> None:
        self._store = store
        self._peers = peers
        self._staging_root = staging_root
        self._retry_pause_s = retry_pause_s
        self._threads = Threads()
        self._known = Known()
        self._shared = SharedStorage()
        self._restorer = Restorer(
            store, peers, self._threads, self._shared, retry_pause_s=retry_pause_s
        )

    async def open(self) -> None:
        """Open the store. Raises `ChunkError`."""
        self._threads.open()
        self._shared.open()
        await self._threads.run(self._store.open)

    async def close(self) -> None:
        """Wait for local disk work in progress, and close every connection. A shared directory that
        hangs is left."""
        await self._peers.close()
        self._shared.close()
        await self._threads.close()

    async def checkpoints(self) -> tuple[str, ...]:
        """Digests of the checkpoints on this node, newest first, bounded for the hello."""
        return await self._threads.list(self._store.checkpoints)

    async def store(self, directory: str, origin: Origin) -> StoredCheckpoint:
        """See `Chunks.store`."""

        def take() -> StoredCheckpoint:
            return ingest(self._store, self._checked_source(directory), origin)

        return await self._threads.drain(take)

    async def store_capture(self, source: CaptureSource, origin: Origin) -> StoredCheckpoint:
        """See `Chunks.store_capture`."""
        return await self._threads.drain(ingest_capture, self._store, source, origin, self._known)

    async def discard(self, directory: str) -> None:
        """See `Chunks.discard`."""

        def remove() -> None:
            try:
                source = self._checked_source(directory)
                shutil.rmtree(source)
            except Invalid as error:
                _log.warning("checkpoint.source_left", directory=directory, reason=str(error))
            except OSError as error:
                # Not found may also mean something within, that its trainer removed meanwhile.
                if not isinstance(error, FileNotFoundError) or os.path.lexists(source):
                    _log.warning("checkpoint.source_left", directory=directory, reason=str(error))

        await self._threads.run(remove)

    async def replicate(self, digest: str, target: ReplicaSource) -> None:
        """See `Chunks.replicate`. Has an end: two tries, each with a deadline that grows with the
        bytes to send."""
        data = await self._threads.run(self._store.read_manifest, digest)
        manifest = decode(data)
        push = self._push_shared if target.node == SHARED_NODE else self._push
        for tries_left in range(TRIES_MAX - 1, -1, -1):
            try:
                with self._store.writing() as writing:
                    await self._threads.run(pin_all, writing, manifest)
                    await push(digest, data, manifest, target)
                return
            except (DiskFull, Invalid, Denied, Absent):
                raise
            except ChunkError as error:
                if not tries_left:
                    raise
                _log.info(
                    "checkpoint.replication_retried",
                    digest=digest,
                    peer=target.node,
                    reason=str(error),
                )
            await asyncio.sleep(self._retry_pause_s)

    async def restore(
        self, candidates: Sequence[RestoreCandidate], directory: str, gang: Gang | None = None
    ) -> Restored:
        """See `Chunks.restore`. `directory` is replaced. Raises `Unreachable`, `DiskFull` and other
        `ChunkError`s, and falls back to an older checkpoint for none of them."""
        return await self._restorer.restore(candidates, directory, gang)

    async def collect(self, keep: frozenset[str]) -> int:
        """See `Chunks.collect`. How long what is spared is the store's `grace_s` and `orphan_s`."""
        return await self._threads.run(self._store.collect, keep)

    async def _push(
        self, digest: str, data: bytes, manifest: Manifest, target: ReplicaSource
    ) -> None:
        sizes_bytes = manifest.sizes_bytes()
        missing = await self._peers.find_missing(target, list(sizes_bytes))

        async def chunks() -> AsyncIterator[tuple[str, bytes]]:
            for chunk in missing:
                yield chunk, await self._read(chunk, sizes_bytes[chunk])

        missing_bytes = sum(sizes_bytes[chunk] for chunk in missing)
        errand = Errand(manifest.job_id, manifest.epoch, digest, data)
        async with self._peers.routed(target, errand, missing_bytes) as route:
            await self._peers.put(
                target, digest, data, chunks=chunks(), chunks_bytes=missing_bytes, route=route
            )

    async def _push_shared(
        self, digest: str, data: bytes, manifest: Manifest, target: ReplicaSource
    ) -> None:
        shared = self._shared.at(target)
        sizes_bytes = manifest.sizes_bytes()
        try:
            async with asyncio.timeout(deadline_s(manifest.size_bytes)):
                await self._shared.run(shared.open)
                with shared.writing() as writing:
                    digests = list(sizes_bytes)
                    for start in range(0, len(digests), SHARED_QUESTION_DIGESTS_MAX):
                        asked = digests[start : start + SHARED_QUESTION_DIGESTS_MAX]
                        for chunk in await self._shared.run(shared.missing, asked):
                            chunk_data = await self._read(chunk, sizes_bytes[chunk])
                            await self._shared.run(writing.put_chunk, chunk, chunk_data)
                    await self._shared.run(writing.publish, digest, data)
        except TimeoutError:
            raise ChunkError(f"shared storage {target.address} does not answer") from None

    async def _read(self, chunk: str, size_bytes: int) -> bytes:
        return await self._threads.drain(self._store.read_chunk, chunk, size_bytes)

    def _checked_source(self, directory: str) -> Path:
        """Raises `Invalid`. A trainer names the directory, so any text may come."""
        source = Path(directory)
        try:
            root = Path(os.path.realpath(self._staging_root))
            # The parent may be reached over links, the directory itself may not be one: `ingest`
            # and `rmtree` look.
            real = Path(os.path.realpath(source.parent)) / source.name
        except ValueError as error:
            raise Invalid(f"checkpoint {directory!r} is not a path: {error}") from None
        if source.name in ("", "..") or root not in real.parents:
            raise Invalid(f"checkpoint {directory} lies outside {self._staging_root}")
        return real
