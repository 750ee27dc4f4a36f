"""What the chunk store asks of a disk: sentences for its failures, room to spare, durable names.

Problem: "[Errno 28]" names no checkpoint, and a full disk needs another answer than a broken one.
The agent's own records lie on the same disk. A disk that checkpoints have filled would keep the
agent from recording what it decides, so every write here leaves `RESERVED_FREE_BYTES` free.

A sync for each file, right after it was written, makes the file system commit its journal each
time. So files are written first, all of a batch, and synced after that, several at a time
(`name_all`): one commit serves all of them. Names come last, as ever.

What is written goes past the page cache where that can be (O_DIRECT, open(2)): a copy into fresh
pages costs a core several times what the disk's own transfer does, and what nobody is about to read
would push out of the cache what a training reads.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from agent.chunks.manifest import DiskFull
from agent.chunks.threads import Helpers
from agent.ports import ChunkError

# The agent's records are rewritten within a few MiB; 64 MiB leave room for them, for logs in
# flight, and for an operator who has to log in. A disk so small that this would be much of it (in a
# virtual machine, in a test) keeps its fiftieth part.
RESERVED_FREE_BYTES = 64 << 20
RESERVED_FREE_RATIO = 0.02
# At a time. More wait for the same commit, and threads cost something too.
SYNCS = 8
# Whatever a disk asks of sizes and places is a divisor of this.
DIRECT_BYTES = 4096


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turns an `OSError` into a `ChunkError` sentence, `DiskFull` for no space and for quota."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"disk full: {doing}: {what}") from error
        where = f" ({error.filename})" if error.filename else ""
        raise ChunkError(f"{doing}: {what}{where}") from error


class Room:
    """The free bytes of one file system, for several writers at once: what each has promised itself
    and not written yet is nobody else's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._promised_bytes = 0

    @contextmanager
    def of(self, size_bytes: int, doing: str) -> Iterator[None]:
        """Room for so many bytes, to be written inside. Raises `DiskFull` when that would leave
        less free than is reserved."""
        with self._lock:
            check_room(self._directory, self._promised_bytes + size_bytes, doing)
            self._promised_bytes += size_bytes
        try:
            yield
        finally:
            with self._lock:
                self._promised_bytes -= size_bytes


def check_room(directory: Path, size_bytes: int, doing: str) -> None:
    """Raises `DiskFull` when writing so many bytes would leave less free than is reserved."""
    with disk_errors(doing):
        status = os.statvfs(directory)
    total_bytes = status.f_blocks * status.f_frsize
    if not total_bytes:
        return  # a file system that does not say how large it is
    reserved_bytes = min(RESERVED_FREE_BYTES, int(total_bytes * RESERVED_FREE_RATIO))
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes - size_bytes < reserved_bytes:
        raise DiskFull(
            f"disk full: {doing}: {free_bytes} free bytes left, {reserved_bytes} kept in reserve "
            "for the agent's own records"
        )


def sync_directory(path: Path) -> None:
    """Make the names in it durable. Raises `ChunkError`."""
    with disk_errors(f"syncing {path}"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Unnamed:
    """A new file that nobody knows yet: its bytes are written, and durable after `name_all`."""

    def __init__(self, temporary: Path, path: Path, doing: str) -> None:
        self._temporary = temporary
        self._path = path
        self._doing = doing
        self._descriptor = -1

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of them. Raises `ChunkError`, and leaves nothing then."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with disk_errors(self._doing):
                self._descriptor = os.open(self._temporary, flags, 0o600)
                view = memoryview(data)
                done_bytes = _write_directly(self._descriptor, view)
                while done_bytes < len(view):
                    done_bytes += os.write(self._descriptor, view[done_bytes:])
        except BaseException:
            self.drop()
            raise

    def sync(self) -> None:
        with disk_errors(self._doing):
            os.fsync(self._descriptor)

    def name(self) -> None:
        with disk_errors(self._doing):
            os.rename(self._temporary, self._path)
        self._close()

    def drop(self) -> None:
        """Unless it has its name."""
        if self._descriptor >= 0:
            self._temporary.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


def name_all(files: Sequence[Unnamed], after: Sequence[Path] = ()) -> None:
    """Make all of them durable, and the names in the directories that they come `after`; only then
    give them their names, which are durable when their directories are synced. Raises `ChunkError`,
    and leaves nothing then that has no name.

    Several are synced at a time: on a disk that others write to as well, those that wait together
    wait for one commit of the journal. What goes wrong first is raised when all have ended."""
    syncs: list[Callable[[], None]] = [file.sync for file in files]
    syncs += [partial(sync_directory, path) for path in after]
    try:
        with Helpers(min(SYNCS, len(syncs)), "chunks-sync") as threads:
            for done in [threads.submit(sync) for sync in syncs]:
                done.result()
        for file in files:
            file.name()
    except BaseException:
        for file in files:
            file.drop()
        raise


def _write_directly(descriptor: int, view: memoryview) -> int:
    """Past the page cache, as far as that can be: a file system or the memory's place may forbid
    it, and the end of the bytes may fill no block. Returns how many were written. Raises
    `OSError`."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    done_bytes, whole_bytes = 0, len(view) // DIRECT_BYTES * DIRECT_BYTES
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done_bytes < whole_bytes:
            done_bytes += os.write(descriptor, view[done_bytes:whole_bytes])
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done_bytes
