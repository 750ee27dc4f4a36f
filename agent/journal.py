"""What this node runs and still has to tell, crash-safe, in one SQLite file.

Problem: an agent that is killed must come back knowing every trainer it answers for and every event
that the coordinator has not acknowledged. A file of our own with checksums and compaction would be
a database written again; SQLite in WAL mode with `synchronous=FULL` is one that others have broken
and mended for twenty years. One batch is one transaction, and so one fsync.

A second agent on the same file, started by hand beside the service, would adopt the same trainers
and take the session from the first one, which takes it back. `<file>.lock` is locked while the
journal is open. It is a POSIX lock, which no child inherits: trainers outlive their agent.

SQLite goes on writing to a file that was moved or removed under it, which no later agent finds. So
a commit counts only when file and log are still, after it, the ones that were opened.

Documents are JSON made by msgspec from the core's dataclasses. Its SQL lives in `queries.sql`.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.core.attempt import AttemptRecord
from agent.core.gpu_messages import GpuLeft, PutGpusLeft
from agent.core.health import GpuHealthChanged
from agent.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptMilestone,
    AttemptRefused,
    AttemptStarted,
    CheckpointProposed,
    SpooledBody,
)
from agent.core.state import (
    DropAttempt,
    DropFence,
    DropSpooled,
    Memory,
    PutAttempt,
    PutFence,
    PutGpusMended,
    PutJournalId,
    PutLeaderEpoch,
    Record,
    SpoolEvent,
)
from agent.ports import JournalUnavailable

_BODIES: dict[str, type[SpooledBody]] = {
    "started": AttemptStarted,
    "exited": AttemptExited,
    "refused": AttemptRefused,
    "milestone": AttemptMilestone,
    "proposed": CheckpointProposed,
    "health": GpuHealthChanged,
}
_NOTHING_OVER = '{"boot_id": "", "mended": []}'
_KINDS = {body: kind for kind, body in _BODIES.items()}

Result = TypeVar("Result")


def load_queries() -> dict[str, str]:
    """The statements of `queries.sql` by name."""
    text = Path(__file__).with_name("queries.sql").read_text("utf-8")
    parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


LOCK_WAIT_S = 10.0  # an agent that was told to stop says goodbye first
LOCK_POLL_S = 0.1


class SqliteJournal:
    """`await open(fresh_id)` once, then `commit`. All of SQLite runs in one thread of its own.
    `lock_wait_s`: for an agent that is leaving, seconds."""

    def __init__(self, path: Path, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._path = path
        self._lock_wait_s = lock_wait_s
        self._lock_fd: int | None = None
        self._queries = load_queries()
        self._connection: sqlite3.Connection | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._opened_at: tuple[tuple[int, int], ...] = ()

    async def open(self, fresh_id: str) -> Memory:
        """Everything that is kept; `fresh_id` becomes the journal's id if there is none yet.

        Raises `JournalUnavailable` with a sentence when the file cannot be opened.
        """
        self._thread = ThreadPoolExecutor(1, "journal")
        return await self._run(lambda: self._open(fresh_id))

    async def commit(self, records: Sequence[Record]) -> None:
        """All of it durable, or none. Raises `JournalUnavailable`."""
        await self._run(lambda: self._commit(records))

    async def close(self) -> None:
        if self._connection is not None:
            await self._run(self._connection.close)
            self._connection = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    async def _run(self, function: Callable[[], Result]) -> Result:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, function)
        except (sqlite3.OperationalError, OSError) as error:
            raise JournalUnavailable(f"{self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise  # a constraint, a misuse: a bug of ours
            raise JournalUnavailable(f"{self._path} is damaged: {error}") from error

    def _open(self, fresh_id: str) -> Memory:
        self._lock()
        self._path.touch(mode=0o600)  # before there is anything in it to read
        connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=5.0
        )
        self._path.chmod(0o600)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        for name, statement in self._queries.items():
            if name.startswith("create_"):
                connection.execute(statement)
        self._connection = connection
        meta = dict(connection.execute(self._queries["read_meta"]))
        if "journal_id" not in meta:
            meta["journal_id"] = fresh_id
        self._put_meta("journal_id", meta["journal_id"])  # whatever was written, the log is there
        self._opened_at = self._where()
        rows = connection.execute(self._queries["read_attempts"])
        attempts = tuple(msgspec.json.decode(text, type=AttemptRecord) for (text,) in rows)
        rows = connection.execute(self._queries["read_spool"])
        spool = tuple(decode_event(text) for (text,) in rows)
        fences = _fences(connection.execute(self._queries["read_fences"]))
        return Memory(
            meta["journal_id"],
            attempts,
            spool,
            int(meta.get("next_sequence", "1")),
            fences,
            int(meta.get("leader_epoch", "0")),
            msgspec.json.decode(meta.get("xids_over", _NOTHING_OVER), type=PutGpusMended),
            msgspec.json.decode(meta.get("gpus_left", "[]"), type=tuple[GpuLeft, ...]),
        )

    def _lock(self) -> None:
        self._lock_fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        give_up_at = time.monotonic() + self._lock_wait_s
        while True:
            try:
                fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                if time.monotonic() < give_up_at:
                    time.sleep(LOCK_POLL_S)
                    continue
                holder = os.pread(self._lock_fd, 20, 0).decode(errors="replace") or "unknown"
                raise JournalUnavailable(
                    f"{self._path} is in use by another agent, pid {holder}: stop that one, or "
                    "give this one a state_directory of its own"
                ) from error
            with contextlib.suppress(OSError):  # for people alone, and the disk may be full
                os.ftruncate(self._lock_fd, 0)
                os.pwrite(self._lock_fd, str(os.getpid()).encode(), 0)
            return

    def _put_meta(self, key: str, value: str) -> None:
        self._execute("put_meta", {"key": key, "value": value})

    def _execute(self, name: str, parameters: dict[str, object]) -> None:
        if self._connection is None:
            raise RuntimeError("the journal is not open")
        self._connection.execute(self._queries[name], parameters)

    def _commit(self, records: Sequence[Record]) -> None:
        if self._connection is None:
            raise RuntimeError("the journal is not open")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for record in records:
                self._write(record)
            self._connection.execute("COMMIT")
        except sqlite3.OperationalError:
            # SQLite may have rolled back already, as it does when the disk is full.
            with contextlib.suppress(sqlite3.OperationalError):
                self._connection.execute("ROLLBACK")
            raise
        if self._where() != self._opened_at:
            raise OSError(
                f"it, or {self._path.name}-wal, is not the file that was opened (it was moved, "
                "removed or replaced): put it back, or restart the agent, which begins with what is"
                " there"
            )

    def _where(self) -> tuple[tuple[int, int], ...]:
        """Which files the journal and its write-ahead log are by their names, now; zeros for one
        that is not there. Raises OSError."""
        found = [(0, 0), (0, 0)]
        for number, name in enumerate((self._path.name, self._path.name + "-wal")):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(self._path.with_name(name))
                found[number] = (status.st_dev, status.st_ino)
        return tuple(found)

    def _write(self, record: Record) -> None:
        match record:
            case PutAttempt():
                document = msgspec.json.encode(record.record).decode()
                self._execute("put_attempt", {"id": record.record.id, "document": document})
            case DropAttempt():
                self._execute("drop_attempt", {"id": record.attempt})
            case SpoolEvent():
                event = record.event
                values = {"sequence": event.sequence, "document": encode_event(event)}
                self._execute("put_spooled", values)
                # Written with the event, so that a sequence is never given out twice.
                self._put_meta("next_sequence", str(event.sequence + 1))
            case DropSpooled():
                self._execute("drop_spooled", {"sequence": record.sequence})
            case PutFence():
                self._execute("put_fence", {"job_id": record.job_id, "epoch": record.epoch})
                self._execute("drop_fenced_ranks", {"job_id": record.job_id})
                for rank in record.ranks:
                    self._execute("put_fenced_rank", {"job_id": record.job_id, "rank": rank})
            case DropFence():
                self._execute("drop_fence", {"job_id": record.job_id})
                self._execute("drop_fenced_ranks", {"job_id": record.job_id})
            case PutLeaderEpoch():
                self._put_meta("leader_epoch", str(record.epoch))
            case PutJournalId():
                self._put_meta("journal_id", record.journal_id)
            case PutGpusMended():
                self._put_meta("xids_over", msgspec.json.encode(record).decode())
            case PutGpusLeft():
                self._put_meta("gpus_left", msgspec.json.encode(record.left).decode())


def _fences(rows: Iterable[tuple[int, int, int | None]]) -> tuple[PutFence, ...]:
    """One row a fence, or one for each of its ranks."""
    fences: dict[int, PutFence] = {}
    for job_id, epoch, rank in rows:
        before = fences.get(job_id, PutFence(job_id, epoch))
        ranks = () if rank is None else (*before.ranks, rank)
        fences[job_id] = PutFence(job_id, epoch, ranks)
    return tuple(fences.values())


def encode_event(event: AgentEvent) -> str:
    """A spooled event as JSON, with the kind of its body beside it."""
    kind = _KINDS[type(event.body)]
    return msgspec.json.encode(
        [event.sequence, event.unix_ms, event.attempt, kind, event.body]
    ).decode()


def decode_event(text: str) -> AgentEvent:
    """The reverse of `encode_event`. Raises `JournalUnavailable` for what a later version wrote."""
    sequence, unix_ms, attempt, kind, body = msgspec.json.decode(text)
    if kind not in _BODIES:
        raise JournalUnavailable(
            f"the journal holds an event '{kind}' of {attempt or 'this node'} that this version"
            " does not know: start the later one again until its agent has met its coordinator"
        )
    return AgentEvent(sequence, unix_ms, attempt, msgspec.convert(body, _BODIES[kind]))
