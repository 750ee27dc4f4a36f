"""The `Chunks` port: checkpoints stored here, copied to a replica, and restored from wherever they
verify.

Problem: a checkpoint is safe only when it survives the node that wrote it, and useful only when
every byte of it is the one that was written. Copying whole checkpoints moves a frozen backbone each
time; restoring without verifying resumes from rot.

Replicating asks the target what it lacks, sends that, and the manifest last, so that the target
never shows a checkpoint that it cannot give back. Restoring takes the candidates in the order
given: manifest and chunks from this disk where they verify; what does not is fetched from the
sources in turn, verified, and put right here too.

A candidate is skipped, and the one before it used, only when this disk and every source answered
that they have no good copy: then nobody can do better. A source that gives no answer (a node that
restarts, a network in two halves, a directory that is not mounted) may still have the copy, and
skipping would throw away work that was safe; so the restore fails with a sentence, and the caller
tries again later or elsewhere. The same holds for whatever goes wrong on this node itself.

What lies in the store is taken as written while it is shared (see `store`); restoring is where rot
is found, and repaired from another copy.

All disk work runs in threads: two for this node's store, and two more for the shared directory, as
a network file system that hangs must not hang the store with it. Draining (hashing and keeping a
new checkpoint, reading it again to send it) has two of its own at a low priority: it must not take
a core from the training that goes on meanwhile, and a restore must not wait behind it. A thread
cannot be interrupted, so long copies go through it chunk by chunk.
"""

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from agent.chunks.disk import disk_errors
from agent.chunks.manifest import (
    DEFINITE,
    Absent,
    Altered,
    Denied,
    DiskFull,
    Incomplete,
    Invalid,
    Manifest,
    Unreachable,
    decode,
    digest_of,
    short,
)
from agent.chunks.objects import SCHEME, ObjectStore
from agent.chunks.peers import Errand, PeerClient, Route, deadline_s
from agent.chunks.store import ChunkStore, Writing
from agent.chunks.tree import ingest, ingest_capture, lay_out
from agent.core.values import ReplicaSource, RestoreCandidate, Restored, StoredCheckpoint
from agent.ports import CaptureSource, ChunkError

# The node name under which a start order or replica target means a directory instead of a peer.
SHARED_NODE = "shared"
# One that hashes and one that waits for the disk keep a box's disk busy without taking cores from
# trainers.
THREADS_MAX = 2
# Of the threads that drain, between a trainer's 0 and the 19 that never runs on a full machine: a
# checkpoint is wanted soon.
DRAIN_NICE = 10
# The second try covers a chunk swept or damaged between question and upload, and a connection that
# had gone stale.
TRIES_MAX = 2
# Long enough for a restarted peer to listen again, short beside a checkpoint interval.
RETRY_PAUSE_S = 0.5
# An object store answers each of these by itself, in a second together: far from the deadline.
SHARED_QUESTION_DIGESTS_MAX = 256

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

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
        self._local: ThreadPoolExecutor | None = None
        self._drains: ThreadPoolExecutor | None = None
        self._remote: ThreadPoolExecutor | None = None
        self._listing: ThreadPoolExecutor | None = None
        self._objects: dict[str, ObjectStore] = {}

    async def open(self) -> None:
        """Open the store. Raises `ChunkError`."""
        self._local = ThreadPoolExecutor(THREADS_MAX, "chunks")
        self._drains = ThreadPoolExecutor(THREADS_MAX, "chunks-drain", _lower_priority)
        self._remote = ThreadPoolExecutor(THREADS_MAX, "chunks-shared")
        self._listing = ThreadPoolExecutor(1, "chunks-listing")
        await self._run(self._store.open)

    async def close(self) -> None:
        """Wait for local disk work in progress, and close every connection. A shared directory that
        hangs is left."""
        await self._peers.close()
        remote, own = self._remote, (self._local, self._drains, self._listing)
        self._local = self._remote = self._drains = self._listing = None
        if remote is not None:
            remote.shutdown(wait=False, cancel_futures=True)
        for executor in own:
            if executor is not None:
                await asyncio.to_thread(executor.shutdown)

    async def checkpoints(self) -> tuple[str, ...]:
        """Digests of the checkpoints on this node, newest first, bounded for the hello.

        In a thread of its own: the hello must not wait behind checkpoints that are being hashed, or
        the node's lease would end while they are.
        """
        assert self._listing is not None, "not opened"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._listing, self._store.checkpoints)

    async def store(
        self, directory: str, *, job_id: int, epoch: int, step: int, parent: str
    ) -> StoredCheckpoint:
        """See `Chunks.store`."""

        def take() -> StoredCheckpoint:
            source = self._checked_source(directory)
            return ingest(self._store, source, job_id=job_id, epoch=epoch, step=step, parent=parent)

        return await self._drain(take)

    async def store_capture(
        self, source: CaptureSource, *, job_id: int, epoch: int, step: int, parent: str
    ) -> StoredCheckpoint:
        """See `Chunks.store_capture`."""
        take = partial(ingest_capture, self._store, source, job_id=job_id, epoch=epoch)
        return await self._drain(take, step=step, parent=parent)

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

        await self._run(remove)

    async def replicate(self, digest: str, target: ReplicaSource) -> None:
        """See `Chunks.replicate`. Has an end: two tries, each with a deadline that grows with the
        bytes to send."""
        data = await self._run(self._store.read_manifest, digest)
        manifest = decode(data)
        push = self._push_shared if target.node == SHARED_NODE else self._push
        for tries_left in range(TRIES_MAX - 1, -1, -1):
            try:
                with self._store.writing() as writing:
                    await self._run(_pin_all, writing, manifest)
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
                    node=target.node,
                    reason=str(error),
                )
            await asyncio.sleep(self._retry_pause_s)

    async def restore(self, candidates: Sequence[RestoreCandidate], directory: str) -> Restored:
        """See `Chunks.restore`. `directory` is replaced. Raises `Unreachable`, `DiskFull` and other
        `ChunkError`s, and falls back to an older checkpoint for none of them."""
        skipped = []
        for candidate in candidates:
            try:
                await self._restore_one(candidate, Path(directory))
            except DiskFull:
                await self._run(self._store.give_back)
                raise
            except DEFINITE as error:
                _log.debug(
                    "checkpoint.candidate_refused", digest=candidate.digest, reason=str(error)
                )
                skipped.append((candidate.digest, str(error)))
            else:
                return Restored(candidate.digest, candidate.step, directory, tuple(skipped))
        return Restored("", 0, "", tuple(skipped))

    async def collect(self, keep: frozenset[str]) -> int:
        """See `Chunks.collect`. How long what is spared is the store's `grace_s` and `orphan_s`."""
        return await self._run(self._store.collect, keep)

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
        shared = self._shared(target)
        sizes_bytes = manifest.sizes_bytes()
        try:
            async with asyncio.timeout(deadline_s(manifest.size_bytes)):
                await self._run_shared(shared.open)
                with shared.writing() as writing:
                    digests = list(sizes_bytes)
                    for start in range(0, len(digests), SHARED_QUESTION_DIGESTS_MAX):
                        asked = digests[start : start + SHARED_QUESTION_DIGESTS_MAX]
                        for chunk in await self._run_shared(shared.missing, asked):
                            chunk_data = await self._read(chunk, sizes_bytes[chunk])
                            await self._run_shared(writing.put_chunk, chunk, chunk_data)
                    await self._run_shared(writing.publish, digest, data)
        except TimeoutError:
            raise ChunkError(f"shared storage {target.address} does not answer") from None

    async def _restore_one(self, candidate: RestoreCandidate, directory: Path) -> None:
        fresh = directory.with_name(directory.name + ".partial")
        with self._store.writing() as writing:
            try:
                data, manifest = await self._find_manifest(candidate)
                await self._run(_pin_all, writing, manifest)
                await self._run(_make_fresh, fresh)
                wrong = await self._run(lay_out, self._store, manifest, fresh)
                if wrong:
                    await self._repair(candidate, manifest, wrong, writing)
                    still = await self._run(lay_out, self._store, manifest, fresh, wrong)
                    if still:
                        # It was given, and this disk did not keep it: another node's may.
                        raise ChunkError(f"repaired in vain: {next(iter(still.values()))}")
                await self._run(writing.publish, candidate.digest, data)
                await self._run(_put_in_place, fresh, directory)
            finally:
                await self._run(shutil.rmtree, fresh, ignore_errors=True)

    async def _find_manifest(self, candidate: RestoreCandidate) -> tuple[bytes, Manifest]:
        """Raises `Absent` when nobody has it, `Unreachable` when somebody may."""
        failures: list[ChunkError] = []
        try:
            data = await self._run(self._store.read_manifest, candidate.digest)
            return data, decode(data)
        except DEFINITE as error:
            failures.append(error)
        for source in candidate.sources:
            try:
                data = await self._fetch_manifest(source, candidate.digest)
                return data, decode(data)
            except ChunkError as error:
                failures.append(error)
        raise _not_had(candidate, [failures])

    async def _fetch_manifest(self, source: ReplicaSource, digest: str) -> bytes:
        """The verified bytes. Asks a peer that gives no answer `TRIES_MAX` times."""
        if source.node == SHARED_NODE:
            return await self._run_shared(self._shared(source).read_manifest, digest)
        for tries_left in range(TRIES_MAX - 1, -1, -1):
            try:
                data = await self._peers.get_manifest(source, digest)
                break
            except ChunkError as error:
                if not tries_left or isinstance(error, (Denied, *DEFINITE)):
                    raise
            await asyncio.sleep(self._retry_pause_s)
        if digest_of(data) != digest:
            raise Altered(
                f"manifest {short(digest)} from {source.node}: bytes do not match their digest"
            )
        return data

    async def _repair(
        self,
        candidate: RestoreCandidate,
        manifest: Manifest,
        wrong: dict[str, str],
        writing: Writing,
    ) -> None:
        """Fetch the chunks in `wrong` into the store. Raises `Absent` when nobody has one of them,
        `Unreachable` when somebody may; the sentence says what was wrong here and at each
        source."""
        sizes_bytes = manifest.sizes_bytes()
        wanted = {chunk: sizes_bytes[chunk] for chunk in wrong}
        failures: dict[str, list[ChunkError]] = {
            chunk: [Altered(reason)] for chunk, reason in wrong.items()
        }
        errand = Errand(manifest.job_id, manifest.epoch, candidate.digest)
        for source in candidate.sources:
            if source.node == SHARED_NODE:
                refused = await self._fetch_shared(source, wanted, writing)
            else:
                async with self._peers.routed(source, errand, sum(wanted.values())) as route:
                    refused = await self._fetch(source, wanted, writing, route)
            for chunk, error in refused.items():
                failures[chunk].append(error)
            wanted = {chunk: wanted[chunk] for chunk in refused}
            if not wanted:
                _log.info("chunks.repaired", digest=candidate.digest, chunks_count=len(wrong))
                return
        raise _not_had(candidate, [failures[chunk] for chunk in wanted])

    async def _fetch(
        self, source: ReplicaSource, wanted: dict[str, int], writing: Writing, route: Route
    ) -> dict[str, ChunkError]:
        """Fetch from a peer what it has; returns the rest, each with its failure. A chunk that it
        lacks or falsifies costs only itself; a peer that fails without giving anything is given up
        after `TRIES_MAX`."""
        refused: dict[str, ChunkError] = {}
        left = list(wanted.items())
        tries_left = TRIES_MAX
        while left:
            done = 0
            try:
                async with aclosing(self._peers.get_chunks(source, left, route)) as stream:
                    async for chunk, data in stream:
                        altered = await self._keep(source, chunk, data, writing)
                        if altered:
                            refused[chunk] = altered
                        done += 1
            except (Absent, Altered, Incomplete) as error:
                refused[left[done][0]] = error
                done += 1
            except DiskFull:
                raise
            except ChunkError as error:
                tries_left -= not done
                if not tries_left or isinstance(error, (Invalid, Denied)):
                    return refused | {chunk: error for chunk, _ in left[done:]}
                await asyncio.sleep(self._retry_pause_s)
            left = left[done:]
        return refused

    async def _keep(
        self, source: ReplicaSource, chunk: str, data: bytes | bytearray, writing: Writing
    ) -> Altered | None:
        """Returns why not, or nothing."""
        try:
            await self._run(writing.put_chunk, chunk, data, replace=True)
        except Altered:
            where = f"{source.node} ({source.address})"
            return Altered(f"{where} sent other bytes for chunk {short(chunk)}")
        return None

    async def _fetch_shared(
        self, source: ReplicaSource, wanted: dict[str, int], writing: Writing
    ) -> dict[str, ChunkError]:
        """As `_fetch`; a directory that fails is given up at once, as its deadline was long."""
        refused: dict[str, ChunkError] = {}
        for chunk, size_bytes in wanted.items():
            try:
                shared = self._shared(source)
                data = await self._run_shared(shared.read_chunk, chunk, size_bytes)
            except DEFINITE as error:
                refused[chunk] = type(error)(f"{source.address}: {error}")
            except ChunkError as error:
                handled = list(wanted).index(chunk)
                return refused | dict.fromkeys(list(wanted)[handled:], error)
            else:
                await self._keep(source, chunk, data, writing)
        return refused

    async def _read(self, chunk: str, size_bytes: int) -> bytes:
        return await self._drain(self._store.read_chunk, chunk, size_bytes)

    def _shared(self, source: ReplicaSource) -> ChunkStore | ObjectStore:
        if source.address.startswith(SCHEME):
            # Kept, as a connection is; there is one address in the configuration.
            return self._objects.setdefault(source.address, ObjectStore(source.address))
        if not source.address.startswith("/"):
            raise Denied(f"shared directory {source.address!r} is not an absolute path")
        return ChunkStore(Path(source.address), shared=True)

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

    async def _run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> _Result:
        assert self._local is not None, "not opened"
        call = partial(work, *args, **kw)
        return await asyncio.get_running_loop().run_in_executor(self._local, call)

    async def _drain(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> _Result:
        """As `_run`, at the low priority."""
        assert self._drains is not None, "not opened"
        call = partial(work, *args, **kw)
        return await asyncio.get_running_loop().run_in_executor(self._drains, call)

    async def _run_shared(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> _Result:
        """Raises `ChunkError` when the shared directory does not answer in time."""
        assert self._remote is not None, "not opened"
        call = partial(work, *args, **kw)
        future = asyncio.get_running_loop().run_in_executor(self._remote, call)
        try:
            return await asyncio.wait_for(future, deadline_s(0))
        except TimeoutError:
            raise ChunkError("the shared directory does not answer") from None


def _lower_priority() -> None:
    """Of this thread alone: on Linux a thread has a nice value of its own (setpriority(2))."""
    thread = threading.get_native_id()
    nice = max(DRAIN_NICE, os.getpriority(os.PRIO_PROCESS, thread))  # nobody may raise it again
    os.setpriority(os.PRIO_PROCESS, thread, nice)


def _not_had(candidate: RestoreCandidate, failures: Collection[Sequence[ChunkError]]) -> ChunkError:
    """What to raise, given the failures, here and at each source, of each thing that nobody gave.
    One that everybody denies having makes the candidate worthless, whoever kept silent on the
    others."""
    for errors in failures:
        if all(isinstance(error, DEFINITE) for error in errors):
            return Absent(_sentence(errors))
    sources = ", ".join(f"{source.node} ({source.address})" for source in candidate.sources)
    return Unreachable(
        f"checkpoint {short(candidate.digest)} of step {candidate.step} cannot be had now, and may "
        f"be whole where nobody answered; asked {sources}: {_sentence(next(iter(failures)))}"
    )


def _sentence(errors: Sequence[ChunkError]) -> str:
    return "; ".join(str(error) for error in errors)


def _pin_all(writing: Writing, manifest: Manifest) -> None:
    for chunk in manifest.sizes_bytes():
        writing.pin(chunk)


def _make_fresh(directory: Path) -> None:
    with disk_errors(f"making {directory}"):
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(mode=0o700, parents=True)


def _put_in_place(fresh: Path, directory: Path) -> None:
    with disk_errors(f"putting {directory} in place"):
        if directory.exists():
            shutil.rmtree(directory)
        fresh.rename(directory)
