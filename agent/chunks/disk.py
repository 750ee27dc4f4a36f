"""What the chunk store asks of a disk: sentences for its failures, room to spare, durable names.

Problem: "[Errno 28]" names no checkpoint, and a full disk needs another answer than a broken one.
The agent's own records lie on the same disk. A disk that checkpoints have filled would keep the
agent from recording what it decides, so every write here leaves `RESERVED_FREE_BYTES` free.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.chunks.manifest import DiskFull
from agent.ports import ChunkError

# The agent's records are rewritten within a few MiB; 64 MiB leave room for them, for logs in
# flight, and for an operator who has to log in. A disk so small that this would be much of it (in a
# virtual machine, in a test) keeps its fiftieth part.
RESERVED_FREE_BYTES = 64 << 20
RESERVED_FREE_RATIO = 0.02


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
    """Make the names in it durable. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
