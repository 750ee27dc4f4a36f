"""Restoring: a checkpoint from wherever it verifies, laid out for an attempt to resume from.

Problem: useful is a checkpoint only when every byte of it is the one that was written; restoring
without verifying resumes from rot. Candidates are taken in the order given: manifest and chunks
from this disk where they verify; what does not is fetched from the sources in turn, verified, and
put right here too.

A candidate is skipped, and the one before it used, only when this disk and every source answered
that they have no good copy: then nobody can do better. A source that gives no answer (a node that
restarts, a network in two halves, a directory that is not mounted) may still have the copy, and
skipping would throw away work that was safe; so the restore fails with a sentence, and the caller
tries again later or elsewhere. The same holds for whatever goes wrong on this node itself.

A checkpoint in parts is what each rank of a gang wrote, a checkpoint of its own on disks and wires.
It is laid out as one, a directory for each rank, and is as good as its worst part: without one of
them the others are worth nothing, also where a source of a third one keeps silent. Ranks that
start on one node restore the same parts at the same time, so each part is fetched by one of them
and found by the others.

Each rank's part lies where that rank goes on, and nowhere near the others: all parts for every rank
would be a full transfer after each stop. So a file whose name, or that of a directory above it,
begins with `of-this-rank` is laid out for the rank that wrote it alone, if as many ranks read as
wrote. The rank whose part it is verifies it; all together have verified everything. With other
numbers of ranks nobody can say here who reads what, and all of it is laid out for everybody; so it
is for a coordinator from before that, which takes whoever resumed for a holder of all parts.
"""

import asyncio
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

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
from agent.chunks.peers import Errand, PeerClient, Route
from agent.chunks.shared_storage import SHARED_NODE, SharedStorage
from agent.chunks.store import ChunkStore, Writing
from agent.chunks.threads import Threads
from agent.chunks.tree import lay_out
from agent.core.values import Gang, ReplicaSource, RestoreCandidate, Restored
from agent.ports import ChunkError

# The second try covers a connection that had gone stale.
TRIES_MAX = 2
# How the names of files begin that no other rank reads; docs/trainers.md promises it to users.
OF_THIS_RANK = "of-this-rank"

_log = structlog.get_logger("baton.chunks")


def part_name(rank: int) -> str:
    """The directory of one rank's part, beside those of the others."""
    return f"rank-{rank:05d}"


def common(manifest: Manifest) -> Manifest:
    """What of a rank's part the other ranks read."""
    read = (entry for entry in manifest.files if not _of_its_rank(entry.path))
    return replace(manifest, files=tuple(read))


def _of_its_rank(path: str) -> bool:
    return any(name.startswith(OF_THIS_RANK) for name in path.split("/"))


class Restorer:
    """Of one node; any number of restores at a time."""

    def __init__(
        self,
        store: ChunkStore,
        peers: PeerClient,
        threads: Threads,
        shared: SharedStorage,
        *,
        retry_pause_s: float,
    ) -> None:
        self._store = store
        self._peers = peers
        self._threads = threads
        self._shared = shared
        self._retry_pause_s = retry_pause_s
        # By digest, while it is restored for somebody.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def restore(
        self, candidates: Sequence[RestoreCandidate], directory: str, gang: Gang | None = None
    ) -> Restored:
        """See `Chunks.restore`. `directory` is replaced. Raises `Unreachable`, `DiskFull` and other
        `ChunkError`s, and falls back to an older checkpoint for none of them."""
        skipped = []
        for candidate in candidates:
            try:
                held = await self._restore_one(candidate, Path(directory), gang)
            except DiskFull:
                await self._threads.run(self._store.give_back)
                raise
            except DEFINITE as error:
                _log.debug(
                    "checkpoint.candidate_refused", digest=candidate.digest, reason=str(error)
                )
                skipped.append((candidate.digest, str(error)))
            else:
                return Restored(candidate.digest, candidate.step, directory, tuple(skipped), held)
        return Restored("", 0, "", tuple(skipped))

    async def _restore_one(
        self, candidate: RestoreCandidate, directory: Path, gang: Gang | None
    ) -> tuple[int, ...]:
        """The ranks whose parts are here then, as in `Restored`."""
        fresh = directory.with_name(directory.name + ".partial")
        try:
            await self._threads.run(_make_fresh, fresh)
            held: tuple[int, ...] = ()
            if candidate.parts:
                held = await self._lay_out_parts(candidate, fresh, _own_part(candidate, gang))
            else:
                await self._lay_out(candidate, fresh)
            await self._threads.run(_put_in_place, fresh, directory)
            return held
        finally:
            await self._threads.run(shutil.rmtree, fresh, ignore_errors=True)

    async def _lay_out_parts(
        self, candidate: RestoreCandidate, into: Path, own: int | None
    ) -> tuple[int, ...]:
        """All of them, for rank `own` what it reads, `None`: everything; or it raises what is wrong
        with one, by its rank; of one that is lost before one that is out of reach."""
        pieces = [
            RestoreCandidate(candidate.digest, candidate.step, candidate.sources),
            *(
                RestoreCandidate(part.digest, candidate.step, part.sources)
                for part in candidate.parts
            ),
        ]
        held: list[int] = []
        unanswered: ChunkError | None = None
        for rank, piece in enumerate(pieces):
            try:
                await self._threads.run(_make_fresh, into / part_name(rank))
                for_all = own is not None and rank != own
                if await self._lay_out(piece, into / part_name(rank), for_all=for_all):
                    held.append(rank)
            except DiskFull:
                raise
            except DEFINITE as error:
                raise type(error)(f"rank {rank}: {error}") from error
            except ChunkError as error:
                unanswered = unanswered or type(error)(f"rank {rank}: {error}")
        if unanswered is not None:
            raise unanswered
        return () if len(held) == len(pieces) else tuple(held)

    async def _lay_out(
        self, candidate: RestoreCandidate, into: Path, *, for_all: bool = False
    ) -> bool:
        """One that is whole, or one part; `for_all`: no more of it than all ranks read. Whether all
        of it lies here then: else no manifest may say so."""
        lock = self._locks.setdefault(candidate.digest, asyncio.Lock())
        async with lock:
            with self._store.writing() as writing:
                data, whole = await self._find_manifest(candidate)
                manifest = common(whole) if for_all else whole
                await self._threads.run(pin_all, writing, manifest)
                wrong = await self._threads.run(lay_out, self._store, manifest, into)
                if wrong:
                    await self._repair(candidate, manifest, wrong, writing)
                    still = await self._threads.run(lay_out, self._store, manifest, into, wrong)
                    if still:
                        # It was given, and this disk did not keep it: another node's may.
                        raise ChunkError(f"repaired in vain: {next(iter(still.values()))}")
                if manifest == whole:
                    await self._threads.run(writing.publish, candidate.digest, data)
                return manifest == whole

    async def _find_manifest(self, candidate: RestoreCandidate) -> tuple[bytes, Manifest]:
        """Raises `Absent` when nobody has it, `Unreachable` when somebody may."""
        failures: list[ChunkError] = []
        try:
            data = await self._threads.run(self._store.read_manifest, candidate.digest)
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
            return await self._shared.run(self._shared.at(source).read_manifest, digest)
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
        wrong: Mapping[str, Absent | Altered],
        writing: Writing,
    ) -> None:
        """Fetch the chunks in `wrong` into the store. Raises `Absent` when nobody has one of them,
        `Unreachable` when somebody may; the sentence says what was wrong here and at each
        source."""
        sizes_bytes = manifest.sizes_bytes()
        wanted = {chunk: sizes_bytes[chunk] for chunk in wrong}
        failures: dict[str, list[ChunkError]] = {chunk: [why] for chunk, why in wrong.items()}
        altered = sum(isinstance(why, Altered) for why in wrong.values())
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
                if altered:  # what was missing has only travelled
                    _log.info("chunks.repaired", digest=candidate.digest, chunks_count=altered)
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
            await self._threads.run(writing.put_chunk, chunk, data, replace=True)
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
                shared = self._shared.at(source)
                data = await self._shared.run(shared.read_chunk, chunk, size_bytes)
            except DEFINITE as error:
                refused[chunk] = type(error)(f"{source.address}: {error}")
            except ChunkError as error:
                handled = list(wanted).index(chunk)
                return refused | dict.fromkeys(list(wanted)[handled:], error)
            else:
                await self._keep(source, chunk, data, writing)
        return refused


def _own_part(candidate: RestoreCandidate, gang: Gang | None) -> int | None:
    """The rank that gets its part alone, beside what all read; `None`: it gets all parts."""
    if gang is None or not gang.own_parts or gang.world_size != len(candidate.parts) + 1:
        return None
    return gang.rank


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


def pin_all(writing: Writing, manifest: Manifest) -> None:
    """Every chunk of a checkpoint that is about to be read, or sent."""
    for chunk in manifest.sizes_bytes():
        writing.pin(chunk)
