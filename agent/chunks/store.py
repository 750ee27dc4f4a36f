"""The content-addressed store under one directory: chunks, and the manifests that name them.

Problem: a node may be killed, or lose power, between any two instructions, and afterwards every
checkpoint that it claims to hold must be whole. Writing into place fails (half a file with a good
name), and so does write-and-rename alone: without syncs the name can reach the disk before the
bytes, and the manifest before its chunks.

The order that holds:
1. a chunk goes to `temporary/`, is synced, and is renamed to `objects/ab/<digest>`, together with
   others where several are written at a time; one that is there is not written again;
2. every `objects/ab` that a manifest's chunks are in is synced, and beside that the manifest, under
   a name in `temporary/`: they share a commit of the file system's journal;
3. only then is it renamed to `manifests/<digest>.json`, and its directory synced.

Whoever dies on the way leaves temporary files (removed by `open`) and unnamed chunks (removed by a
later sweep). Sweeping runs in the opposite order: manifests go first and are synced away, then the
chunks that no manifest names. Which manifests go is decided in `sweep`: at once those that a newer
kept one of their job supersedes; the others, which may be a job's newest progress and unknown to
the coordinator, only after days.

A sweep and a write meet in one table of pins: a write pins a digest before it looks whether the
chunk (or the manifest) is there, and a sweep looks at the pins with the lock held before it
unlinks. Pins that are given up during a sweep count until it ends, as that sweep may have listed
the manifests before the new one was among them. What other processes rely on (a peer that asked
which chunks are missing) is kept by age: looking at a chunk renews its time stamp, and publishing a
manifest again renews the manifest's. The question comes before the upload and the manifest after
it, so age counts from the beginning of the longest write in progress: else a long upload would find
gone in the end what it left out in the beginning, at every try.

Looking means name and size, not bytes: hashing a backbone on every upload that leaves it out would
cost what leaving it out saves. So a chunk that has rotted in place counts as present when a
checkpoint that shares it is stored or published. Rot is found where bytes are read, which is at
every restore and before a chunk is sent to a peer, and a restore repairs it from another copy, here
too. A checkpoint whose only copy of a chunk has rotted is lost: that is what a replica is for.

On fsync of file and directory: fsync(2); "All File Systems Are Not Created Equal", Pillai et al.,
OSDI 2014.

Everything here blocks, and may be called from several threads; callers bring their own.
"""

import errno
import math
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

import structlog

from agent.chunks.disk import Room, Unnamed, disk_errors, name_all, sync_directory
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    MANIFEST_BYTES_MAX,
    Absent,
    Altered,
    Incomplete,
    Invalid,
    Manifest,
    check_digest,
    decode,
    digest_of,
    short,
)
from agent.chunks.sweep import CHUNK_GRACE_S, ORPHAN_S, UNLISTED_S, Listed, Unlisted
from agent.ports import ChunkError

# As agent.proto says for the hello.
CHECKPOINTS_MAX = 4096
# Files that wait to be synced together: a few hundred MiB, and descriptors that nobody misses.
UNNAMED_MAX = 64
# Nobody writes one 4 MiB chunk for so long; younger temporary files in a shared directory belong to
# somebody alive.
FOREIGN_TEMPORARY_AGE_S_MAX = 3600.0

# This process or machine lacks something for the moment; the bytes on the disk are as they were.
_LACKING = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN))

_MANIFEST_NAME = re.compile(r"([0-9a-f]{64})\.json")

_log = structlog.get_logger("baton.chunks")


class ChunkStore:
    """Chunks and manifests under `root`. `shared` says that other machines write there too, and
    that the agent's own records are elsewhere. A sweep spares chunks for `grace_s` after they were
    written or asked about, longer while a write is in progress; and manifests that may be a job's
    newest for `orphan_s` and `unlisted_s`, as `sweep` has it."""

    def __init__(
        self,
        root: Path,
        *,
        shared: bool = False,
        grace_s: float = CHUNK_GRACE_S,
        orphan_s: float = ORPHAN_S,
        unlisted_s: float = UNLISTED_S,
    ) -> None:
        self._root = root
        self._shared = shared
        self._grace_s = grace_s
        self._orphan_s = orphan_s
        self._unlisted = Unlisted(unlisted_s)
        self._objects = root / "objects"
        self._manifests = root / "manifests"
        self._temporary = root / "temporary"
        self._lock = threading.Lock()
        self._room = Room(self._temporary)
        self._pins: Counter[str] = Counter()
        self._sweeps_count = 0
        self._late_releases: list[set[str]] = []
        self._began_s: dict[Writing, float] = {}

    @property
    def root(self) -> Path:
        return self._root

    def open(self) -> None:
        """Make the directories and remove what a dead writer left. Raises `ChunkError`."""
        with disk_errors(f"opening the chunk store {self._root}"):
            if self._shared:
                # Making it would hide a file system that is not mounted, and fill the local disk
                # instead.
                if not self._root.is_dir():
                    raise ChunkError(
                        f"shared directory {self._root} does not exist (is it mounted?)"
                    )
            else:
                self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._root.chmod(0o700)
            for directory in (self._objects, self._manifests, self._temporary):
                directory.mkdir(mode=0o700, exist_ok=True)
            for number in range(256):
                (self._objects / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
            for directory in (self._objects, self._root):
                sync_directory(directory)
            self._remove_stale_temporaries()

    def writing(self) -> "Writing":
        """A write in progress, for use in a `with` statement; it pins what it relies on until the
        block ends."""
        return Writing(self)

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Which of these chunks are not here, by name. Those that are will survive sweeps for
        `grace_s`. Raises `Invalid`."""
        return [digest for digest in digests if not self._touch(self._object_path(digest))]

    def chunk_path(self, digest: str) -> Path:
        """Where that chunk is, or would be. Raises `Invalid`."""
        return self._object_path(digest)

    def read_chunk(self, digest: str, size_bytes: int | None = None, *, of: str = "") -> bytes:
        """The verified bytes. Raises `Absent` or `Altered`, or a plain `ChunkError` when the disk
        did not answer; the sentence names `of`, the file that the chunk belongs to."""
        path = self._object_path(digest)
        name = f"chunk {short(digest)} of {of}" if of else f"chunk {short(digest)}"
        data = self._read_up_to(path, CHUNK_BYTES_MAX, name)
        if size_bytes is not None and len(data) != size_bytes:
            raise Altered(f"{name}: {size_bytes} bytes expected, {len(data)} found")
        if digest_of(data) != digest:
            raise Altered(f"{name}: bytes do not match their digest")
        return data

    def read_manifest(self, digest: str) -> bytes:
        """The verified bytes. Raises `Absent` or `Altered`, or a plain `ChunkError` when the disk
        did not answer."""
        name = f"manifest {short(digest)}"
        data = self._read_up_to(self._manifest_path(digest), MANIFEST_BYTES_MAX, name)
        if digest_of(data) != digest:
            raise Altered(f"{name}: bytes do not match their digest")
        return data

    def checkpoints(self) -> tuple[str, ...]:
        """Digests of the checkpoints here, newest first, at most `CHECKPOINTS_MAX`."""
        with disk_errors(f"listing {self._manifests}"):
            return tuple(digest for digest, _ in self._list_manifests()[:CHECKPOINTS_MAX])

    def collect(self, keep: frozenset[str]) -> int:
        """Remove manifests not in `keep` that are superseded, or written and last published more
        than `orphan_s` before this call; then chunks that no manifest names, when last written or
        asked about more than `grace_s` before this call and every write in progress.

        Returns the bytes freed. While a manifest that stays cannot be read, no chunk is removed:
        any may be its own. Not so for one that has rotted and is not in `keep`: nobody will ever
        read its chunks by it, and it must not fill the disk until it goes.
        """
        with self._lock:
            began_s = min((time.time(), *self._began_s.values()))
        return self._collect(keep, began_s - self._grace_s)

    def give_back(self) -> int:
        """Remove every chunk that no manifest names and no write in progress relies on, however
        young, or from the future. Returns the bytes freed; a peer that needs one asks again."""
        return self._collect(None, math.inf)

    def _collect(self, keep: frozenset[str] | None, young_after_s: float) -> int:
        """`keep` None: every manifest stays."""
        with self._sweep(), disk_errors(f"sweeping {self._root}"):
            found = self._list_manifests()
            others = [item for item in found if keep is not None and item[0] not in keep]
            listed = Listed()
            named: set[str] = set()
            unread: dict[str, ChunkError] = {}
            for digest, written_ns in found:
                if keep is None or digest in keep:
                    manifest = self._look_into(digest)
                    if isinstance(manifest, Manifest):
                        listed.add(manifest, written_ns)
                        named.update(manifest.sizes_bytes())
                    else:
                        unread[digest] = manifest
            freed_bytes = 0
            waited = self._unlisted.waited(dict(others)) if keep is not None else ()
            for digest, written_ns in others:
                manifest = self._look_into(digest)
                after_s = time.time() - self._orphan_s if digest in waited else -math.inf
                if isinstance(manifest, Manifest) and listed.supersede(manifest, written_ns):
                    after_s = math.inf
                gone_bytes = self._unlink_if_old(self._manifest_path(digest), digest, after_s)
                if gone_bytes is not None:
                    freed_bytes += gone_bytes
                elif isinstance(manifest, Manifest):
                    named.update(manifest.sizes_bytes())
                elif not isinstance(manifest, Altered):
                    unread[digest] = manifest
            sync_directory(self._manifests)
            for digest, error in unread.items():
                _log.warning("chunks.sweep_postponed", digest=digest, reason=str(error))
            return freed_bytes + (0 if unread else self._drop_chunks(named, young_after_s))

    def _look_into(self, digest: str) -> Manifest | ChunkError:
        """The manifest, or why it cannot be read."""
        try:
            return decode(self.read_manifest(digest))
        except ChunkError as error:
            return error

    def _drop_chunks(self, named: set[str], young_after_s: float) -> int:
        freed_bytes = 0
        for directory in sorted(self._objects.iterdir()):
            for entry in list(os.scandir(directory)):
                if entry.name not in named:
                    path = Path(entry.path)
                    freed_bytes += self._unlink_if_old(path, entry.name, young_after_s) or 0
        return freed_bytes

    def _unlink_if_old(self, path: Path, digest: str, young_after_s: float) -> int | None:
        """Returns the bytes freed; None when it stays: it is young, or a write in progress relies
        on it."""
        with self._lock:
            if digest in self._pins:
                return None
            try:
                status = path.stat()
            except FileNotFoundError:
                return 0  # another sweep took it
            if status.st_mtime > young_after_s:
                return None
            path.unlink()
            return status.st_size

    def _list_manifests(self) -> list[tuple[str, int]]:
        """(digest, time stamp in nanoseconds), newest first."""
        found = []
        for entry in os.scandir(self._manifests):
            match = _MANIFEST_NAME.fullmatch(entry.name)
            if match:
                try:
                    found.append((match[1], entry.stat().st_mtime_ns))
                except FileNotFoundError:
                    continue  # a sweep took it
        return sorted(found, key=lambda item: (-item[1], item[0]))

    @contextmanager
    def _sweep(self) -> Iterator[None]:
        with self._lock:
            self._sweeps_count += 1
        try:
            yield
        finally:
            with self._lock:
                self._sweeps_count -= 1
                late, self._late_releases = self._late_releases, []
            for digests in late:
                self._unpin(digests)

    def _pin(self, digest: str) -> None:
        with self._lock:
            self._pins[digest] += 1

    def _unpin(self, digests: set[str]) -> None:
        with self._lock:
            if self._sweeps_count:
                self._late_releases.append(digests)
                return
            for digest in digests:
                self._pins[digest] -= 1
                if not self._pins[digest]:
                    del self._pins[digest]

    def _object_path(self, digest: str) -> Path:
        check_digest(digest)
        return self._objects / digest[:2] / digest

    def _manifest_path(self, digest: str) -> Path:
        return self._manifests / f"{check_digest(digest)}.json"

    def _touch(self, path: Path) -> bool:
        with disk_errors(f"looking for {path.name}"):
            try:
                os.utime(path)
            except FileNotFoundError:
                return False
        return True

    def _renew_manifest(self, digest: str) -> bool:
        """Whether it is here and whole; a sweep then counts its age from now."""
        try:
            self.read_manifest(digest)
        except (Absent, Altered):
            return False
        return self._touch(self._manifest_path(digest))

    def _write(self, path: Path, data: bytes | bytearray, doing: str) -> None:
        """All of it under its name, or nothing."""
        name_all([self._written(path, data, doing)])

    def _written(self, path: Path, data: bytes | bytearray | memoryview, doing: str) -> Unnamed:
        """The bytes of a file, on their way to the disk, that is to be called so."""
        file = Unnamed(self._temporary / secrets.token_hex(16), path, doing)
        with nullcontext() if self._shared else self._room.of(len(data), doing):
            file.write(data)
        return file

    def _read_up_to(self, path: Path, bytes_max: int, name: str) -> bytes:
        """Raises `Absent`; `Altered` when it is longer, or when this node's disk does not give it;
        a plain `ChunkError` for what says nothing of the bytes."""
        try:
            with open(path, "rb") as handle:
                data = handle.read(bytes_max + 1)
        except FileNotFoundError:
            # A directory that is not mounted has no file either.
            if self._shared and not os.path.isdir(self._objects):
                raise ChunkError(
                    f"shared directory {self._root} holds no chunk store (is it mounted?)"
                ) from None
            raise Absent(f"{name}: missing") from None
        except OSError as error:
            # Over a network any error may be the network's.
            if self._shared or error.errno in _LACKING:
                raise ChunkError(f"{name}: cannot be read now: {error.strerror}") from error
            raise Altered(f"{name}: cannot be read: {error.strerror}") from error
        if len(data) > bytes_max:
            raise Altered(f"{name}: more than {bytes_max} bytes found")
        return data

    def _remove_stale_temporaries(self) -> None:
        alive_after_s = time.time() - FOREIGN_TEMPORARY_AGE_S_MAX
        for path in self._temporary.iterdir():
            try:
                if not self._shared or path.stat().st_mtime < alive_after_s:
                    path.unlink()
            except FileNotFoundError:
                continue  # its writer finished, or another node cleaned up first


class Writing:
    """One checkpoint on its way into a store. Chunks may be put by several threads; the block is
    left when they are done."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._pinned: set[str] = set()
        self._coming: set[str] = set()
        self._unnamed: list[Unnamed] = []

    def __enter__(self) -> "Writing":
        with self._store._lock:
            self._store._began_s[self] = time.time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._unnamed:
            file.drop()
        with self._store._lock:
            del self._store._began_s[self]
        with self._lock:
            pinned, self._pinned = self._pinned, set()
        self._store._unpin(pinned)

    def pin(self, digest: str) -> None:
        """No sweep removes this chunk or manifest until the block ends. A late thread pins none."""
        with self._lock:
            if digest not in self._pinned and self in self._store._began_s:
                self._store._pin(digest)
                self._pinned.add(digest)

    def put_chunk(self, digest: str, data: bytes | bytearray, *, replace: bool = False) -> int:
        """Keep a chunk; returns the bytes written, 0 when it was here with that size (unless
        `replace`).

        Raises `Altered` when the bytes do not match, `DiskFull`, `Invalid`.
        """
        check_digest(digest)
        if not 1 <= len(data) <= CHUNK_BYTES_MAX:
            raise Invalid(
                f"chunk {short(digest)} of {len(data)} bytes; 1 to {CHUNK_BYTES_MAX} are allowed"
            )
        if digest_of(data) != digest:
            raise Altered(f"chunk {short(digest)}: bytes do not match their digest")
        path, doing = self._pinned_path(digest, len(data))
        here = not replace and self._is_here(path, len(data), doing)
        if not here:
            self._store._write(path, data, doing)
        return 0 if here else len(data)

    def keep(self, data: bytes | bytearray | memoryview) -> tuple[str, int]:
        """Keep 1 to `CHUNK_BYTES_MAX` bytes of this node's own; returns their digest, and the bytes
        written. They have their name when they were published. Raises `DiskFull`."""
        digest = digest_of(data)
        path, doing = self._pinned_path(digest, len(data))
        with self._lock:
            if digest in self._coming:
                return digest, 0
            self._coming.add(digest)
        if self._is_here(path, len(data), doing):
            return digest, 0
        self._name([self._store._written(path, data, doing)], UNNAMED_MAX)
        return digest, len(data)

    def _name(self, more: list[Unnamed], count_min: int) -> None:
        """What was kept, and this, as soon as there is so much of it."""
        with self._lock:
            files = self._unnamed + more
            self._unnamed = files if len(files) < count_min else []
        name_all(files if len(files) >= count_min else [])

    def _pinned_path(self, digest: str, size_bytes: int) -> tuple[Path, str]:
        """Where that chunk goes, and what is being done then."""
        path = self._store._object_path(digest)
        self.pin(digest)
        return path, f"writing chunk {short(digest)} of {size_bytes} bytes to {path.parent}"

    def _is_here(self, path: Path, size_bytes: int, doing: str) -> bool:
        with disk_errors(doing):
            return self._store._touch(path) and path.stat().st_size == size_bytes

    def publish(self, digest: str, data: bytes) -> Manifest:
        """Keep a manifest, once every chunk that it names is here and durable. One that is here is
        not written again, and counts as young again.

        Raises `Altered`, `Invalid`, `Incomplete`, `DiskFull`. A chunk of the wrong size is removed,
        so that the sender's next question finds it missing.
        """
        path = self._store._manifest_path(digest)
        if digest_of(data) != digest:
            raise Altered(f"manifest {short(digest)}: bytes do not match their digest")
        manifest = decode(data)
        sizes_bytes = manifest.sizes_bytes()
        self.pin(digest)
        self._name([], 1)
        with disk_errors(f"looking for the chunks of manifest {short(digest)}"):
            for chunk_digest, size_bytes in sizes_bytes.items():
                self._check_present(chunk_digest, size_bytes)
        doing = f"writing manifest {short(digest)} of {len(data)} bytes to {path.parent}"
        here = self._store._renew_manifest(digest)
        files = [] if here else [self._store._written(path, data, doing)]
        prefixes = sorted({chunk_digest[:2] for chunk_digest in sizes_bytes})
        name_all(files, after=[self._store._objects / prefix for prefix in prefixes])
        # Also when it was here: whoever wrote it may have died before its name was durable.
        sync_directory(path.parent)
        return manifest

    def _check_present(self, digest: str, size_bytes: int) -> None:
        self.pin(digest)
        path = self._store._object_path(digest)
        try:
            found_bytes = path.stat().st_size
        except FileNotFoundError:
            raise Incomplete(
                f"the manifest names chunk {short(digest)}, which is not here"
            ) from None
        if found_bytes != size_bytes:
            path.unlink(missing_ok=True)
            raise Incomplete(
                f"chunk {short(digest)}: {size_bytes} bytes expected, {found_bytes} found"
            )
