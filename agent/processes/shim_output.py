"""What a shim writes to the disk: output in segments, and records; and the thread that does it.

Problem: a trainer must never wait for its log. A full disk says so at once. One that stalls (a
server that is away, a device that tries again) answers nothing at all, and whoever writes to it
stops, for minutes or for good: then nobody reads the trainer's pipe, and it stops as well.

How: while the trainer runs, `Writer` does all that touches the disk, in a thread of its own. What
waits for it is bounded. Beyond that the trainer is held to the disk's pace, as long as the disk has
one; after a second without any, output is lost, and its place in the log says how much. Part of the
program of a shim (see `shim_program.py`): standard library only, and little of that.
"""

import _thread
import os
import sys
import time
from _queue import Empty, SimpleQueue  # without what `queue` imports beside it

TYPE_CHECKING = False  # `typing` itself would cost 5 ms
if TYPE_CHECKING:
    from collections.abc import Callable

SEGMENT_BYTES = 8 * 1024 * 1024  # dropping the oldest loses little of what people look at
# 64 MiB an attempt: a day of a chatty progress bar; 8 such jobs on a node stay below 1 GiB
SEGMENTS_KEPT = 8
WAITING_BYTES_MAX = 4 * 1024 * 1024  # half a segment; more would be the job's memory
STALL_S = 1.0  # a busy disk answers within it
RECORD_RETRY_FIRST_MS = 100
RECORD_RETRY_MAX_MS = 5_000  # the node's GPUs wait for a record that finds no room

LOST_MARKER = b"\n[baton] %d bytes of output were lost here: the log could not be written\n"


class OutputLog:
    """Output in segments named by the offset of their first byte; a full disk neither blocks nor
    fails it. Offsets count the bytes that were kept, so they are contiguous; what was lost is in
    `lost_bytes_total`, and a marker line stands in its place as soon as there is room again.
    """

    def __init__(self, directory: bytes) -> None:
        self.directory = directory
        self.offset = self.lost_bytes_total = 0
        self._segment_fd, self._segment_bytes = -1, 0
        self._segments: list[bytes] = []
        self._lost_bytes = 0  # since the last marker
        self._owed = b""  # the rest of a marker that found no room for all of itself

    def write(self, data: bytes) -> None:
        """Append `data`, or as much of it as the disk takes."""
        self._settle()
        taken = 0 if self._owed or self._lost_bytes else self._append(data)
        self.lose(len(data) - taken)

    def lose(self, count: int) -> None:
        """So many bytes have never come here: the next marker says so."""
        self._lost_bytes += count
        self.lost_bytes_total += count

    def _settle(self) -> None:
        if not self._owed and not self._lost_bytes:
            return
        marker = LOST_MARKER % self._lost_bytes if self._lost_bytes else b""
        taken = self._append(self._owed + marker)
        if taken > len(self._owed):
            self._lost_bytes = 0
            self._owed = (self._owed + marker)[taken:]
        else:
            self._owed = self._owed[taken:]

    def _append(self, data: bytes) -> int:
        view = memoryview(data)
        taken = 0
        while taken < len(data):
            try:
                full = self._segment_fd < 0 or self._segment_bytes >= SEGMENT_BYTES
                if full or os.fstat(self._segment_fd).st_nlink == 0:  # somebody has removed it
                    self._rotate()
                room = SEGMENT_BYTES - self._segment_bytes
                count = os.write(self._segment_fd, view[taken : taken + room])
            except OSError:  # no space, no quota: the caller counts what is lost
                break
            taken += count
            self._segment_bytes += count
            self.offset += count
        return taken

    def _rotate(self) -> None:
        if not os.path.isdir(self.directory):  # nobody could ever read the rest
            os.mkdir(self.directory, 0o700)
        while len(self._segments) >= SEGMENTS_KEPT:  # before: a full disk needs the room
            if os.path.exists(oldest := self._segments.pop(0)):  # nobody has removed it
                os.unlink(oldest)
        path = self.directory + b"/%020d.log" % self.offset
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._segment_fd >= 0:
            os.close(self._segment_fd)
        self._segment_fd, self._segment_bytes = fd, 0
        self._segments.append(path)


class Writer:
    """Writes to `log` what it is offered, in a thread; before that it does `record` until that
    says that it is done. One thread offers and closes.
    """

    def __init__(self, log: OutputLog, record: "Callable[[], bool]") -> None:
        self._log = log
        self._record = record
        self._queue: SimpleQueue[bytes | int | None] = SimpleQueue()  # a number: bytes lost here
        self._offered_bytes = 0  # counted by who offers alone, and
        self._taken_bytes = 0  # by the thread alone, each with what an object takes beside its text
        self._lost_bytes = 0  # since the last offer that was taken
        self._stalled_at_bytes = -1  # what had been taken when it last took nothing for too long
        self._moved = _thread.allocate_lock()  # let go by the thread with each piece
        self._over = _thread.allocate_lock()
        self._over.acquire()
        self._started = False
        self._start()

    def offer(self, data: bytes) -> None:
        """Have `data` written. Waits for a disk that is slow, and not for one that stands still."""
        if not self._started:
            self._start()
        size = sys.getsizeof(data)
        if not self._find_room(size):
            self._lost_bytes += len(data)
            return
        self._tell_lost()
        self._offered_bytes += size
        self._queue.put(data)

    def close(self) -> None:
        """All that was taken is on the disk after this, however long that takes."""
        self._tell_lost()
        self._queue.put(None)
        if self._started:
            self._over.acquire()
        else:
            self._run()

    def _start(self) -> None:
        try:
            _thread.start_new_thread(self._run, ())
            self._started = True
        except RuntimeError:  # the user has no more threads: asked for again with the next output
            self._started = False

    def _find_room(self, size: int) -> bool:
        while self._offered_bytes + size - (taken := self._taken_bytes) > WAITING_BYTES_MAX:
            if taken == self._stalled_at_bytes or not self._moved.acquire(timeout=STALL_S):
                self._stalled_at_bytes = taken
                return False
        return True

    def _tell_lost(self) -> None:
        if self._lost_bytes:
            self._queue.put(self._lost_bytes)
            self._lost_bytes = 0

    def _run(self) -> None:
        try:
            self._write_all()
        finally:
            self._over.release()

    def _write_all(self) -> None:
        recorded, retry_at_s = False, 0.0
        while True:
            if not recorded and time.monotonic() >= retry_at_s:
                recorded = self._record()
                retry_at_s = time.monotonic() + RECORD_RETRY_MAX_MS / 1000
            try:
                item = self._queue.get(timeout=None if recorded else RECORD_RETRY_MAX_MS / 1000)
            except Empty:
                continue
            if item is None:
                self._log.write(b"")  # a last chance for the marker
                return
            if isinstance(item, int):
                self._log.lose(item)
                continue
            self._log.write(item)
            self._taken_bytes += sys.getsizeof(item)
            if self._moved.locked():
                self._moved.release()


def write_record(directory: bytes, name: str, text: str) -> None:
    """Write a file that is there whole or not at all, also after a power cut. Raises OSError."""
    path = directory + b"/" + name.encode()
    with open(path + b".tmp", "wb", opener=private_opener) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + b".tmp", path)
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def try_record(directory: bytes, name: str, text: str) -> bool:
    """Like `write_record`; False when the disk did not take it."""
    try:
        write_record(directory, name, text)
    except OSError:
        return False
    return True


def private_opener(path: str | bytes, flags: int) -> int:
    """For `open`: only the agent's user may read what lies in an attempt's directory."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def record_until_done(directory: bytes, name: str, text: str) -> None:
    """Write it, waiting for room on the disk; gives up when the directory has gone."""
    retry_ms = RECORD_RETRY_FIRST_MS
    while os.path.isdir(directory) and not try_record(directory, name, text):
        time.sleep(retry_ms / 1000)
        retry_ms = min(2 * retry_ms, RECORD_RETRY_MAX_MS)
