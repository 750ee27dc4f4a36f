"""Between a directory of files and the chunk store: taking a checkpoint in, and laying one out
again.

Problem: the directory that a trainer hands over is not to be trusted with more than its files. A
symbolic link in it would copy what the agent may read and the trainer may not; a socket would block
the reader; a million files would fill the manifest. And what lies in the store may have rotted
since it was written, so laying it out has to verify again.

`ingest` looks at the whole tree first and refuses before it copies anything; then it reads each
file once, hashing and keeping it in chunks. It reads into a few pieces of memory that go round:
fresh pages for every piece cost a core as much as the reading itself. `ingest_capture` does the
same for the images of files in a trainer's slab: the same chunks, and a checkpoint that is restored
the same way. `lay_out` verifies each chunk as it writes it, carries on past those that are missing
or altered and returns them: the caller repairs the chunks from a peer and calls again for just
those, so that intact ones are read once. What is verified is shared with the store instead of
written where the disk can do that (`reflink`).
"""

import mmap
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import LifoQueue

from agent.chunks.disk import check_room, disk_errors
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    FILES_MAX,
    Absent,
    Altered,
    ChunkRef,
    DiskFull,
    FileEntry,
    Incomplete,
    Invalid,
    Manifest,
    check_path,
    digest_of,
    encode,
)
from agent.chunks.reflink import clone
from agent.chunks.store import ChunkStore, Writing
from agent.chunks.threads import Helpers
from agent.core.values import Origin, StoredCheckpoint
from agent.ports import CapturedFile, CaptureSource

# Of the files of a capture, which no umask has had a say in: a job's data is nobody else's
# business.
CAPTURED_MODE = 0o600

# Chunks that are hashed, written and synced at a time: a disk takes several syncs together in
# hardly more than the time of one. More threads only hold more memory.
WRITERS = 4

# Two slots of each training on a large box; a file has some hundred bytes for 4 MiB.
KNOWN_MAX = 64

# A file's path, its permission bits, and its bytes in pieces of `CHUNK_BYTES_MAX`: the memory that
# holds one, and its size.
_File = tuple[str, int, Iterator[tuple[mmap.mmap, int]]]


def ingest(store: ChunkStore, directory: Path, origin: Origin) -> StoredCheckpoint:
    """Keep every regular file under `directory`, durably; the directory stays as it is. Empty
    directories are not kept.

    Raises `Invalid` with the path for what is no plain file, `DiskFull` after giving back what was
    written, `ChunkError`.
    """
    buffers = _Buffers()
    files = _files_of(directory, scan(directory), buffers)
    return _ingest(store, files, buffers, origin, check=_nothing)[0]


class Known:
    """The chunks of files that may still lie in a slab as they were when they were hashed, of the
    last ones that were asked for. Used by several threads."""

    def __init__(self) -> None:
        self._chunks: dict[CapturedFile, tuple[ChunkRef, ...]] = {}
        self._lock = threading.Lock()

    def of(self, files: Iterable[CapturedFile]) -> list[FileEntry]:
        """Those that are known."""
        with self._lock:
            found = {entry: self._chunks[entry] for entry in files if entry in self._chunks}
        return [FileEntry(entry.path, CAPTURED_MODE, found[entry]) for entry in found]

    def keep(self, files: Iterable[CapturedFile], manifest: Manifest) -> None:
        """What a capture was stored as."""
        chunks = {entry.path: entry.chunks for entry in manifest.files}
        with self._lock:
            for entry in files:
                if entry.identity:
                    self._chunks.pop(entry, None)
                    self._chunks[entry] = chunks[entry.path]
            while len(self._chunks) > KNOWN_MAX:
                del self._chunks[next(iter(self._chunks))]


def ingest_capture(
    store: ChunkStore, source: CaptureSource, origin: Origin, known: Known | None = None
) -> StoredCheckpoint:
    """Keep the files of a capture, durably; the last ones first. A trainer's first are those that
    change least, and while the disk writes the others there is time to see that it has these.

    A file that is `known` is not read again, unless a chunk of it has gone.

    Raises `Invalid` for a name that could land outside a directory, `DiskFull` after giving back
    what was written, and `ChunkError`, also when the capture was overwritten while it was read:
    then no checkpoint names what was kept of it."""
    known = Known() if known is None else known
    held = known.of(source.files)
    try:
        stored, manifest = _ingest_but(store, source, origin, held)
    except Incomplete:
        if not held:
            raise
        stored, manifest = _ingest_but(store, source, origin, [])
    known.keep(source.files, manifest)
    return stored


def _ingest_but(
    store: ChunkStore, source: CaptureSource, origin: Origin, held: Sequence[FileEntry]
) -> tuple[StoredCheckpoint, Manifest]:
    buffers, paths = _Buffers(), {entry.path for entry in held}
    files = (
        (check_path(entry.path), CAPTURED_MODE, _pieces(source, entry, buffers))
        for entry in reversed(source.files)
        if entry.path not in paths
    )
    return _ingest(store, files, buffers, origin, check=source.check, held=held)


def scan(directory: Path) -> list[str]:
    """Relative paths of every file, sorted. Raises `Invalid` for links, devices, sockets, pipes,
    and for too many."""
    with disk_errors(f"reading the checkpoint {directory}"):
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise Invalid(f"{directory} is not a directory")
        found: list[str] = []
        entries_count = 0
        pending = [""]
        while pending:
            prefix = pending.pop()
            with os.scandir(directory / prefix) as entries:
                for entry in entries:
                    entries_count += 1
                    if entries_count > FILES_MAX:
                        raise Invalid(
                            f"{directory} has more than {FILES_MAX} files and directories"
                        )
                    path = check_path(prefix + entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{path}/")
                    elif entry.is_file(follow_symlinks=False):
                        found.append(path)
                    else:
                        raise _not_plain(directory / path, os.lstat(entry.path).st_mode)
    if not found:
        raise Invalid(f"{directory} holds no file")
    return sorted(found)


def lay_out(
    store: ChunkStore, manifest: Manifest, into: Path, only: Collection[str] | None = None
) -> dict[str, Absent | Altered]:
    """Write the files under `into`; with `only`, just the chunks with these digests, into files of
    an earlier call.

    Returns the chunks that are missing or altered, each with which of the two. Raises `DiskFull`,
    before the first byte where the whole has no room; `ChunkError`. Nothing is synced: a machine
    that loses power loses the attempt that would have read these files too.
    """
    wrong: dict[str, Absent | Altered] = {}
    doing = f"laying out a checkpoint of {manifest.size_bytes} bytes under {into}"
    if only is None:
        check_room(into.parent, manifest.size_bytes, doing)
    with disk_errors(doing):
        for entry in manifest.files:
            if only is None:
                (into / entry.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not any(chunk.digest in only for chunk in entry.chunks):
                continue
            _lay_out_file(store, entry, into, only, wrong)
    return wrong


class _Buffers:
    """Memory for the pieces that are being written, and for the one that is being read. The one
    used last is the next one, so that what was never needed was never touched."""

    def __init__(self) -> None:
        self._free: LifoQueue[mmap.mmap] = LifoQueue()
        for _ in range(WRITERS + 1):
            # Aligned to pages, as a disk wants it that is written to directly.
            buffer = mmap.mmap(-1, CHUNK_BYTES_MAX, flags=mmap.MAP_PRIVATE)
            with suppress(OSError):  # a kernel may have none
                # The first use of 4 MiB in small pages takes seven times as long as the next one.
                buffer.madvise(mmap.MADV_HUGEPAGE)
            self._free.put(buffer)

    def take(self) -> mmap.mmap:
        """One of them; waits for a writer where all are in use."""
        return self._free.get()

    def give_back(self, buffer: mmap.mmap) -> None:
        """One that nothing was read into."""
        self._free.put(buffer)

    def keep(self, writing: Writing, buffer: mmap.mmap, size_bytes: int) -> tuple[str, int]:
        """Its first bytes, as a chunk; it is free after that."""
        try:
            with memoryview(buffer) as whole, whole[:size_bytes] as piece:
                return writing.keep(piece)
        finally:
            self._free.put(buffer)


def _ingest(
    store: ChunkStore,
    files: Iterable[_File],
    buffers: _Buffers,
    origin: Origin,
    *,
    check: Callable[[], None],
    held: Sequence[FileEntry] = (),
) -> tuple[StoredCheckpoint, Manifest]:
    """Keep the files and publish them as a checkpoint, together with those that are `held`; `check`
    is asked in between."""
    try:
        # The inner threads take this one's priority over; all of them have ended before a failure
        # gives back what they wrote.
        with store.writing() as writing, Helpers(WRITERS, "chunks-writer") as writers:
            entries, new_bytes = _kept(partial(buffers.keep, writing), writers, files)
            check()
            entries += held
            # Sorted, whoever lists them: the same files are the same manifest.
            entries.sort(key=lambda entry: entry.path)
            manifest = Manifest(files=tuple(entries), **origin._asdict())
            data = encode(manifest)
            digest = digest_of(data)
            writing.publish(digest, data)
    except DiskFull:
        store.give_back()
        raise
    return StoredCheckpoint(digest, manifest.step, manifest.size_bytes, new_bytes), manifest


def _kept(
    keep: Callable[[mmap.mmap, int], tuple[str, int]],
    writers: Helpers,
    files: Iterable[_File],
) -> tuple[list[FileEntry], int]:
    """The files in chunks, and the bytes written for them; as many pieces at a time as there is
    memory for, also where one file ends and the next begins: waiting there for the disk would leave
    it idle after. Nor does a piece that is here already wait for one before it to be written."""
    waiting: deque[tuple[list[ChunkRef], int, Future[tuple[str, int]]]] = deque()
    found: list[tuple[str, int, list[ChunkRef]]] = []
    new_bytes = 0

    def take_oldest() -> int:
        chunks, size_bytes, future = waiting.popleft()
        digest, written_bytes = future.result()
        chunks.append(ChunkRef(digest, size_bytes))
        return written_bytes

    for path, mode, pieces in files:
        found.append((path, mode, []))
        for buffer, size_bytes in pieces:
            waiting.append((found[-1][2], size_bytes, writers.submit(keep, buffer, size_bytes)))
            while waiting and waiting[0][2].done():
                new_bytes += take_oldest()
    while waiting:
        new_bytes += take_oldest()
    return [FileEntry(path, mode, tuple(chunks)) for path, mode, chunks in found], new_bytes


def _nothing() -> None:
    """A directory is the agent's own: nobody writes into it any more."""


def _files_of(directory: Path, paths: Iterable[str], buffers: _Buffers) -> Iterator[_File]:
    # Not following and not blocking: it may have been exchanged for a link or a pipe since it was
    # looked at.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    for path in paths:
        with (
            disk_errors(f"reading {directory / path}"),
            open(
                directory / path, "rb", buffering=0, opener=lambda name, _: os.open(name, flags)
            ) as handle,
        ):
            mode = os.fstat(handle.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise _not_plain(directory / path, mode)
            yield path, stat.S_IMODE(mode) & 0o777, _read_pieces(handle.fileno(), buffers)


def _pieces(
    source: CaptureSource, entry: CapturedFile, buffers: _Buffers
) -> Iterator[tuple[mmap.mmap, int]]:
    for offset_bytes in range(0, entry.size_bytes, CHUNK_BYTES_MAX):
        size_bytes = min(CHUNK_BYTES_MAX, entry.size_bytes - offset_bytes)
        buffer = buffers.take()
        with memoryview(buffer) as whole, whole[:size_bytes] as piece:
            source.read_into(entry.offset_bytes + offset_bytes, piece)
        yield buffer, size_bytes


def _read_pieces(descriptor: int, buffers: _Buffers) -> Iterator[tuple[mmap.mmap, int]]:
    while True:
        buffer = buffers.take()
        size_bytes = _read_full(descriptor, buffer)
        if not size_bytes:
            buffers.give_back(buffer)
            return
        yield buffer, size_bytes


def _read_full(descriptor: int, buffer: mmap.mmap) -> int:
    """A plain read may return less than there is; chunk borders must not depend on that."""
    size_bytes = 0
    with memoryview(buffer) as whole:
        while size_bytes < len(whole):
            with whole[size_bytes:] as rest:
                more_bytes = os.readv(descriptor, [rest])
            if not more_bytes:
                break
            size_bytes += more_bytes
    return size_bytes


def _lay_out_file(
    store: ChunkStore,
    entry: FileEntry,
    into: Path,
    only: Collection[str] | None,
    wrong: dict[str, Absent | Altered],
) -> None:
    complete = True
    with open(into / entry.path, "xb" if only is None else "r+b") as handle:
        offset_bytes = 0
        for chunk in entry.chunks:
            if only is None or chunk.digest in only:
                try:
                    data = store.read_chunk(chunk.digest, chunk.size_bytes, of=entry.path)
                except (Absent, Altered) as error:
                    wrong.setdefault(chunk.digest, error)
                    complete = False
                else:
                    path = store.chunk_path(chunk.digest)
                    if not clone(path, len(data), handle.fileno(), offset_bytes):
                        # Again for each chunk: others write to this disk meanwhile.
                        check_room(into, len(data), f"laying out {into / entry.path}")
                        handle.seek(offset_bytes)
                        handle.write(data)
            offset_bytes += chunk.size_bytes
    # Last, since the mode may forbid writing, and only then is there nothing left to write.
    if complete:
        os.chmod(into / entry.path, entry.mode)


def _not_plain(path: Path, mode: int) -> Invalid:
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISDIR, "a directory"),
    )
    kind = next((name for matches, name in kinds if matches(mode)), "a device")
    return Invalid(f"{path} is {kind}; a checkpoint holds plain files only")
