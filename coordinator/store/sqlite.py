"""The store of a single coordinator: one SQLite file, one writer thread, one fsync per batch.

Problem: an acknowledged submission must survive `kill -9` and a power cut, while the event loop
must not wait for a disk. A pool of connections would let two commits race for SQLite's one write
lock; a commit on the loop would stop every session for the length of an fsync. So each of two
threads owns one connection: the writer, on which commits queue in order, and the reader, which
serves history from its own WAL snapshot and never waits for the writer.

- WAL with `synchronous=FULL`: a commit is one append to the log and one fsync
  (https://www.sqlite.org/wal.html; with NORMAL, SQLite's usual advice for WAL, a power cut loses
  the last commits, which were acknowledged).
- One transaction per batch. Its first statement locks the leader's row under our epoch, or changes
  no row: then another coordinator has taken over, and nothing of the batch is written.
- A full disk, an I/O error or a busy file rolls back and is `StoreUnavailable`; the same batch may
  be tried again. Every statement may be repeated, so this also holds when an error hid a commit
  that took effect.
- `<file>.lock` is held with flock(2) while the store is open. It refuses a second coordinator
  before it could do harm; the epoch is what makes it harmless if the lock fails (a network file
  system that only pretends to lock).
- When the last coordinator closed the file, SQLite removed its log; a log that is still there means
  a kill or a power cut. SQLite recovers from both, but from the latter only if the disk kept its
  word, so then, and only then, `PRAGMA quick_check` reads the file (up to 10 ms per MB, and a year
  of history is a GB). What a killed process has written the kernel still has: the lock file says in
  which boot that was. Neither a planned restart nor a crash pays anything. A file that was found
  damaged is looked at until it is whole, although SQLite removes its log when we close it. So is a
  plain copy (`place.py`): the lock file comes along with it, and it may have been made in a commit.
- SQLite goes on writing to files that have been moved or removed under it, and no restart finds
  what it wrote there. So a commit counts only when file and log are still, after it, the ones that
  were opened (`_where`).
- A link is followed, as SQLite does: log, lock and all else lie beside the file itself, whichever
  name it is opened by.

Careful with the file itself: closing any descriptor of it, ours included, would drop every POSIX
lock that SQLite holds in this process (https://www.sqlite.org/howtocorrupt.html, 2.2). Hence it is
opened here only to create it.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from coordinator.core import restored
from coordinator.core.demand_history import DemandLog
from coordinator.core.messages import Record
from coordinator.core.model import Attempt, JobEvent, Snapshot
from coordinator.core.numbering import Numbering, put_back
from coordinator.ports import LeaderLost, StoreUnavailable
from coordinator.store import lock as locking
from coordinator.store import place, rows
from coordinator.store.queries import Queries, load_queries
from coordinator.store.schema import (
    AppliedMigration,
    Migration,
    load_migrations,
    pending_migrations,
)

# Nobody else writes while the lock is held; a backup tool may for a moment. Longer than this, the
# shell should know.
BUSY_TIMEOUT_MS = 2_000
# A burst may let the log grow; after a checkpoint it shrinks to this. Sixteen times SQLite's
# checkpoint threshold of 4 MB.
LOG_BYTES_MAX = 64 * 1024 * 1024

# So old may a plain copy be and pass for the store itself, after a kill (`place.py`).
PLACE_S = 3_600.0

_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o700

# What the machine does to us, as primary result codes; any other error is a bug and propagates.
_MACHINE_CODES = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
)
# When opening, the file may also turn out not to be ours or not to be whole.
_OPENING_CODES = (*_MACHINE_CODES, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)

Result = TypeVar("Result")


class SqliteStore:
    """`coordinator.ports.Store` on the file at `path`; the directory is made (0700) if it is
    missing.

    `exclusive=False` leaves out the lock, so that a test can let two leaders race on one file.
    """

    def __init__(
        self,
        path: Path,
        *,
        exclusive: bool = True,
        busy_timeout_ms: int = BUSY_TIMEOUT_MS,
        migrations: Sequence[Migration] | None = None,
    ) -> None:
        self._path = path
        self._exclusive = exclusive
        self._busy_timeout_ms = busy_timeout_ms
        self._migrations = migrations
        self._opened: _Opened | None = None

    async def open(self) -> Snapshot:
        assert self._opened is None, "this store is open already"
        opened = _Opened(self._path, self._busy_timeout_ms)
        migrations = load_migrations() if self._migrations is None else self._migrations
        try:
            snapshot = await opened.on_writer(
                lambda: opened.open_writer(migrations, exclusive=self._exclusive)
            )
            await opened.on_reader(opened.open_reader)
        except BaseException:
            await opened.close()
            raise
        self._opened = opened
        return snapshot

    async def commit(self, records: Sequence[Record]) -> None:
        opened = self._require_open()
        await opened.on_writer(lambda: opened.write(records))

    async def events(self, job_id: int, after_sequence: int, limit: int) -> list[JobEvent]:
        """At most `EVENTS_PER_JOB_MAX`. Raises `StoreUnavailable` when the file cannot be read."""
        opened = self._require_open()
        return await opened.on_reader(lambda: opened.read_events(job_id, after_sequence, limit))

    def size_bytes(self) -> int | None:
        """The file and its write-ahead log; `None` when the disk does not say."""
        path = os.path.realpath(self._path)
        try:
            size_bytes = os.stat(path).st_size
        except OSError:
            return None
        with suppress(FileNotFoundError):  # SQLite makes it with the first commit
            size_bytes += os.stat(f"{path}-wal").st_size
        return size_bytes

    async def close(self) -> None:
        """Waits for the commit in progress. Closing twice is closing once."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await opened.close()

    def _require_open(self) -> "_Opened":
        assert self._opened is not None, "this store is not open"
        return self._opened


class _Opened:
    """Two threads, each with the one connection that only it touches, and what is to be undone at
    the end."""

    def __init__(self, path: Path, busy_timeout_ms: int) -> None:
        self._named, self._path = path, Path(os.path.realpath(path))
        self._busy_timeout_ms = busy_timeout_ms
        self._queries = load_queries()
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._reader_thread = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._writer_undo = ExitStack()
        self._reader_undo = ExitStack()
        self._leader_epoch = 0
        self._opened_at: tuple[tuple[int, int], ...] = ()
        self._place_due_s = 0.0

    async def on_writer(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._writer_thread, function)

    async def on_reader(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._reader_thread, function)

    async def close(self) -> None:
        # The writer last: the last connection to leave copies the log into the file and removes it.
        await self.on_reader(self._reader_undo.close)
        try:
            await self.on_writer(self._leave)
        finally:  # a file that is damaged is let go as well
            await self.on_writer(self._writer_undo.close)
            self._reader_thread.shutdown(wait=False)
            self._writer_thread.shutdown(wait=False)

    def open_writer(self, migrations: Sequence[Migration], *, exclusive: bool) -> Snapshot:
        with _machine_errors(self._path, "opened", _OPENING_CODES):
            _make_file(self._path)
            lock = locking.take(self._path) if exclusive else None
            if lock is not None:
                self._writer_undo.callback(os.close, lock.descriptor)
            checked = lock is not None and lock.before == locking.boot_id() != ""
            damaged = lock is not None and lock.before == locking.UNCHECKED
            due = damaged or (_log_is_left(self._path) and not checked)
            self._writer = self._connect()
            self._writer_undo.enter_context(closing(self._writer))
            if due:
                locking.note(lock, locking.UNCHECKED)
                _check_integrity(self._path, self._writer)
            locking.note(lock, locking.boot_id())
            with _transaction(self._writer):
                _migrate(self._writer, self._queries, migrations)
                self._writer.execute(self._queries.advance_leader)
                snapshot = read_snapshot(self._writer, self._queries)
                if not snapshot.copied_unix_ms:
                    copied_unix_ms = place.copied_unix_ms(
                        self._writer, self._queries, self._path, snapshot
                    )
                    if copied_unix_ms and not due:
                        _check_integrity(self._path, self._writer)
                    snapshot = replace(snapshot, copied_unix_ms=copied_unix_ms)
                if snapshot.copied_unix_ms:
                    snapshot = _put_back(self._writer, self._queries, snapshot)
                number = place.note(self._writer, self._queries, self._path, snapshot.leader_epoch)
            place.settle(self._path, number)
            self._place_due_s = time.monotonic() + PLACE_S
            self._leader_epoch = snapshot.leader_epoch
            self._opened_at = _where(self._named)
            return snapshot

    def open_reader(self) -> None:
        with _machine_errors(self._path, "opened", _OPENING_CODES):
            self._reader = self._connect()
            self._reader_undo.enter_context(closing(self._reader))
            self._reader.execute("PRAGMA query_only = ON")

    def _leave(self) -> None:
        """Copies from until now are none of the store as it will be found; if that cannot be
        written, as another one leads or the disk is full, the next start does it."""
        self._place_due_s = 0.0
        with suppress(LeaderLost, StoreUnavailable):
            if self._leader_epoch:
                self.write(())

    def write(self, records: Sequence[Record]) -> None:
        epoch, number = self._leader_epoch, 0
        with (
            _machine_errors(self._path, "written", _MACHINE_CODES),
            _transaction(self._writer) as connection,
        ):
            if connection.execute(self._queries.lock_leader, {"epoch": epoch}).rowcount != 1:
                raise LeaderLost(
                    f"another coordinator has taken over {self._path}: its leader epoch is no"
                    f" longer {epoch}, and nothing of this batch was written"
                )
            for statement, parameters in rows.statements(self._queries, records):
                connection.executemany(statement, parameters)
            if time.monotonic() >= self._place_due_s:
                number = place.note(connection, self._queries, self._path, epoch)
        with _machine_errors(self._path, "found", _MACHINE_CODES):
            if _where(self._named) != self._opened_at:
                raise StoreUnavailable(
                    f"the database {self._path} or its log {self._path.name}-wal is not the file"
                    " that was opened (it was moved, removed or replaced): put it back, or restart"
                    " the coordinator, which begins with what is there"
                )
        if number:
            with _machine_errors(self._path, "written", _MACHINE_CODES):
                place.settle(self._path, number)
            self._place_due_s = time.monotonic() + PLACE_S

    def read_events(self, job_id: int, after_sequence: int, limit: int) -> list[JobEvent]:
        page = {
            "job_id": job_id,
            "after_sequence": after_sequence,
            "events_max": max(0, min(limit, rows.EVENTS_PER_JOB_MAX)),
        }
        with _machine_errors(self._path, "read", _MACHINE_CODES):
            return [JobEvent(*row) for row in self._reader.execute(self._queries.list_events, page)]

    def _connect(self) -> sqlite3.Connection:
        # `isolation_level=None`: transactions begin where this module says so, not where the driver
        # guesses.
        connection = sqlite3.connect(
            self._path, timeout=self._busy_timeout_ms / 1000, isolation_level=None
        )
        with ExitStack() as undo:
            undo.enter_context(closing(connection))
            journal_mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if journal_mode != "wal":
                raise StoreUnavailable(
                    f"{self._path} lies on a file system without shared memory for SQLite's log"
                    f" (journal mode {journal_mode}): put it on a local disk"
                )
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES_MAX}")
            undo.pop_all()
        return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing. IMMEDIATE takes the write lock at once: a later upgrade could fail with half
    the batch done."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.commit()
    except BaseException:
        connection.rollback()  # does nothing where SQLite has rolled back by itself
        raise


@contextmanager
def _machine_errors(path: Path, verb: str, codes: Sequence[int]) -> Iterator[None]:
    """Says in a sentence what the machine refused; other errors pass through as what they are."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # The low byte of an extended result code is the primary one; the driver's own errors have
        # none.
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF not in codes:
            raise
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CORRUPT:
            raise StoreUnavailable(_damaged(path, str(error))) from error
        reason = f"{error} ({error.sqlite_errorname})"
        raise StoreUnavailable(_sentence(path, verb, reason)) from error
    except OSError as error:
        raise StoreUnavailable(_sentence(path, verb, str(error))) from error


def _sentence(path: Path, verb: str, reason: str) -> str:
    try:
        status = os.statvfs(path.parent)
    except OSError as error:
        return f"the database {path} cannot be {verb}: {reason}; its directory: {error.strerror}"
    free_bytes = status.f_bavail * status.f_frsize
    return (
        f"the database {path} cannot be {verb}: {reason};"
        f" its file system has {free_bytes} bytes free"
    )


def _make_file(path: Path) -> None:
    """Creates directory and file for the owner alone; SQLite gives its log the file's mode."""
    path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE))
    except FileExistsError:
        path.chmod(_FILE_MODE)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # a synced file without its name in the directory is lost all the same
    finally:
        os.close(directory)


def _where(path: Path) -> tuple[tuple[int, int], ...]:
    """Which files the database and its write-ahead log are by their names, now; zeros for one that
    is not there. Raises OSError."""
    found, leads_to = [(0, 0), (0, 0)], os.path.realpath(path)
    for number, end in enumerate(("", "-wal")):
        with suppress(FileNotFoundError):
            status = os.stat(f"{leads_to}{end}")
            found[number] = (status.st_dev, status.st_ino)
    return tuple(found)


def _log_is_left(path: Path) -> bool:
    log_path = path.with_name(path.name + "-wal")
    return log_path.exists() and log_path.stat().st_size > 0


def _check_integrity(path: Path, connection: sqlite3.Connection) -> None:
    findings = [row[0] for row in connection.execute("PRAGMA quick_check")]
    if findings != ["ok"]:
        raise StoreUnavailable(_damaged(path, f"{len(findings)} findings, first: {findings[0]}"))


def _damaged(path: Path, how: str) -> str:
    return (
        f"the database {path} is damaged ({how}): restore a backup, or move the file away to start"
        " with an empty one"
    )


def _migrate(
    connection: sqlite3.Connection, queries: Queries, migrations: Sequence[Migration]
) -> None:
    connection.execute(queries.create_schema_migrations)
    applied = [AppliedMigration(*row) for row in connection.execute(queries.list_schema_migrations)]
    for migration in pending_migrations(migrations, applied):
        for statement in migration.statements():
            connection.execute(statement)
        connection.execute(
            queries.add_schema_migration,
            {
                "name": migration.name,
                "checksum": migration.checksum,
                "since": migration.since,
            },
        )


def _put_back(connection: sqlite3.Connection, queries: Queries, snapshot: Snapshot) -> Snapshot:
    """The store is a copy that nobody has worked with: what that means is durable before anybody
    does."""
    unix_ms = time.time_ns() // 1_000_000
    epoch_max = max((attempt.epoch for attempt in snapshot.attempts), default=0)
    age_ms = unix_ms - snapshot.copied_unix_ms
    back = put_back(snapshot.numbering, snapshot.last_job_id, epoch_max, age_ms)
    records = list(restored.held(snapshot, unix_ms, back.leader_epochs))
    for statement, parameters in rows.statements(queries, records):
        connection.executemany(statement, parameters)
    counters = {
        **asdict(back.numbering), "last_job_id": back.last_job_id, "copied_unix_ms": 0,
    }  # fmt: skip
    named = [{"name": name, "value": value} for name, value in counters.items()]
    connection.executemany(queries.put_counter, named)
    connection.execute(queries.raise_leader, {"epochs": back.leader_epochs})
    return replace(read_snapshot(connection, queries), copied_unix_ms=snapshot.copied_unix_ms)


def read_snapshot(connection: sqlite3.Connection, queries: Queries) -> Snapshot:
    """Everything durable, as it is for this connection's transaction."""

    def documents(query: str) -> Iterator[str]:
        return (row[0] for row in connection.execute(query))

    counters = dict(connection.execute(queries.list_counters))
    leader_epoch = connection.execute(queries.read_leader).fetchone()[0]
    # One that an earlier coordinator has put back does not say which ids may have been given.
    all_given = counters["last_job_id"] if "remembered_job_id" in counters else 0
    # Another than the first after the copy is one too many, and had no eyes for the mark.
    void = leader_epoch > counters.get("copied_leader_epoch", leader_epoch) + 1
    return Snapshot(
        leader_epoch=leader_epoch,
        last_job_id=counters["last_job_id"],
        numbering=Numbering(
            counters.get("remembered_job_id"),
            counters.get("given_job_id", all_given),
            counters.get("epoch_floor", 0),
        ),
        copied_unix_ms=0 if void else counters.get("copied_unix_ms", 0),
        jobs=tuple(map(rows.job_decoder.decode, documents(queries.list_jobs))),
        attempts=_attempts(
            [*documents(queries.list_attempts), *documents(queries.list_ranks)],
        ),
        checkpoints=tuple(map(rows.checkpoint_decoder.decode, documents(queries.list_checkpoints))),
        nodes=tuple(map(rows.node_decoder.decode, documents(queries.list_nodes))),
        parts=tuple(map(rows.part_decoder.decode, documents(queries.list_parts))),
        scale_records=tuple(
            map(rows.scale_record_decoder.decode, documents(queries.list_scale_records))
        ),
        lease_days=tuple(row[0] for row in connection.execute(queries.list_lease_days)),
        demand=DemandLog(
            tuple(map(rows.series_decoder.decode, documents(queries.list_demand_series))),
            tuple(map(rows.demand_decoder.decode, documents(queries.list_demand))),
        ),
    )


def _attempts(documents: Sequence[str]) -> tuple[Attempt, ...]:
    """From two tables, in one order."""
    found = map(rows.attempt_decoder.decode, documents)
    return tuple(sorted(found, key=lambda attempt: (attempt.job_id, attempt.epoch, attempt.rank)))
