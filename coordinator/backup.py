"""`baton-coordinator backup FILE`: a copy of the store, while the coordinator works or not.

Problem: the file of a store that is written is no copy of it (its log lies beside it), and a copy
that is put back is a danger: it gives ids again that nodes know for other jobs. So SQLite's own
backup makes the copy, which is one moment of the store in one file, and marks it as a copy, with
the time: whoever opens it knows what it is, and what follows is decided in `core/restored.py`. Of a
plain copy, or a snapshot, it makes such a one as well.

The copy is checked, on disk and whole before it has its name; what had the name before is kept
until then. What a copy leaves that is killed goes with the next one of that name.
"""

import argparse
import glob
import os
import re
import sqlite3
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

from coordinator.config import PROGRAM, from_command_line
from coordinator.store.queries import load_queries

COMMAND = "backup"
# The copy takes the write lock for no longer than the mark needs; a commit is waited for.
BUSY_TIMEOUT_S = 10.0
# What belongs to a store, by the ends of its files' names.
STORE_ENDS = ("", "-wal", "-shm", "-journal", ".lock")


class BackupError(Exception):
    """There is no new copy; the text is a sentence."""


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """What follows the word `backup`. Exit status: 0, or 1 with the reason on stderr; `SystemExit`
    2 for wrong usage. Other flags are the coordinator's own, which say where the store is."""
    parser = argparse.ArgumentParser(
        prog=f"baton-coordinator {COMMAND}",
        description="Copy the coordinator's database, also while it works. A coordinator that is "
        "started on the copy knows that it is one.",
        epilog="Which database: that of /etc/baton/coordinator.toml, unless the coordinator's own "
        "--config or --store-path names another, which may be a plain copy or a snapshot.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="Where the copy goes.")
    parser.add_argument("--replace", action="store_true", help="Take the place of what is there.")
    said, others = parser.parse_known_args(_joined(arguments))
    # Keys are root's, and the service's alone; nothing of TLS is read here.
    environment = {"CREDENTIALS_DIRECTORY": "/", **environment}
    store = Path(from_command_line(others, environment).config.store_path)
    try:
        unix_ms = _written_unix_ms(store)
        size_bytes = backup(store, said.file, unix_ms, replace=said.replace)
    except (BackupError, sqlite3.DatabaseError, OSError) as error:
        sys.stderr.write(f"Error: {store} was not copied to {said.file}: {error}\n")
        return 1
    moment = datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="seconds")
    sys.stdout.write(f"{said.file}: {size_bytes} bytes, {store} as it was at {moment}\n")
    return 0


def _written_unix_ms(store: Path) -> int:
    """When it was written last: now, of one that is in use, and of a plain copy when that was made.
    Raises `BackupError`."""
    found = [Path(f"{os.path.realpath(store)}{end}") for end in STORE_ENDS[:2]]
    times_ns = [path.stat().st_mtime_ns for path in found if path.is_file()]
    if not times_ns:
        raise BackupError("there is no such database")
    return min(max(times_ns), time.time_ns()) // 1_000_000


def _joined(arguments: Sequence[str]) -> list[str]:
    """The coordinator's flags in one word with their values, or a value would pass for FILE."""
    with_value = {PROGRAM.flag(name) for name in (*PROGRAM.types(), "config")}
    words, joined = list(arguments), []
    while words:
        word = words.pop(0)
        joined.append(f"{word}={words.pop(0)}" if word in with_value and words else word)
    return joined


def backup(store: Path, target: Path, unix_ms: int, *, replace: bool = False) -> int:
    """Returns the copy's size in bytes. `unix_ms` is what the copy says of when it was made. Raises
    `BackupError`, `OSError` and `sqlite3.DatabaseError`; then `target` is what it was."""
    if not store.is_file():
        raise BackupError("there is no such database")
    target = Path(os.path.realpath(target))  # a link stays one, whatever it leads to
    if target in [Path(f"{os.path.realpath(store)}{end}") for end in STORE_ENDS]:
        raise BackupError("that is the database itself")
    if target.exists() and not target.is_file():
        raise BackupError("that is no file")
    if not replace and target.exists():
        raise BackupError("that is there already; `--replace` takes its place")
    _sweep(target)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        _copy(store, scratch, unix_ms)
        size_bytes = _sync(scratch, os.O_RDWR)
        os.replace(scratch, target)
        _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        for end in STORE_ENDS:
            with suppress(FileNotFoundError):
                os.unlink(f"{scratch}{end}")
    return size_bytes


def _sweep(target: Path) -> None:
    """What copies have left that were killed."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        pid = re.fullmatch(r"\.([0-9]+)(-wal|-shm|-journal)?", left.name[1 + len(target.name) :])
        if pid and (int(pid[1]) == os.getpid() or not Path("/proc", pid[1]).exists()):
            left.unlink(missing_ok=True)


def _copy(store: Path, scratch: Path, unix_ms: int) -> None:
    """One step, so one moment: in WAL mode a reader holds nobody up."""
    with (
        closing(_connect(f"{store.absolute().as_uri()}?mode=rw")) as source,
        closing(_connect(scratch.absolute().as_uri())) as copy,
    ):
        source.backup(copy)
        # The copy has the mode of its source; one file is enough for it.
        copy.execute("PRAGMA journal_mode = DELETE")
        queries = load_queries()
        copy.execute(queries.mark_copy, {"unix_ms": unix_ms})
        copy.execute(queries.mark_copy_leader)
        findings = [row[0] for row in copy.execute("PRAGMA quick_check")]
        if findings != ["ok"]:
            raise BackupError(f"the database is damaged: {findings[0]}")


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)


def _sync(path: Path, flags: int) -> int:
    """Onto the disk; returns its size in bytes."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
