"""A coordinator's database, read by somebody who is not its coordinator, who alters nothing.

Problem: opening a store makes its opener the leader, and opening an SQLite file in WAL mode writes
beside it. A question about the past must do neither, whether the coordinator runs, was killed, or
whether the file is a copy on a laptop. So there are three ways, and none writes where the file is:

- There is a log with its index (`-wal`, `-shm`): a coordinator runs, or was killed. The file is
  opened with `mode=ro`; a reader of a log holds up no writer.
- There is a log without an index: a copy of both. SQLite would have to make the index there, so the
  two are copied to a temporary folder first.
- There is no log: nobody has it open. `immutable=1` reads it without a lock and without a file.
"""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import msgspec

from coordinator.core.model import Snapshot
from coordinator.ports import StoreUnavailable
from coordinator.store.queries import load_queries
from coordinator.store.schema import AppliedMigration, load_migrations, pending_migrations
from coordinator.store.sqlite import read_snapshot

# A coordinator's own commits take milliseconds; a backup tool may hold the file for longer.
BUSY_TIMEOUT_S = 5.0
_MAGIC = b"SQLite format 3\0"


def read_journal(path: Path) -> Snapshot:
    """Everything durable in the database at `path`, at one instant. Raises `StoreUnavailable` with
    a sentence where that cannot be read."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise StoreUnavailable(f"{path} is no SQLite database")
        with _connected(path) as connection:
            return _read(path, connection)
    except sqlite3.DatabaseError as error:
        raise StoreUnavailable(f"{path} cannot be read ({error})") from error
    except msgspec.DecodeError as error:
        raise StoreUnavailable(f"{path} holds what is no document of ours ({error})") from error
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be read ({error.strerror or error})") from error


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    log, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    if not log.exists():
        with closing(_connect(path, "mode=ro&immutable=1")) as connection:
            yield connection
    elif index.exists():
        with closing(_connect(path, "mode=ro")) as connection:
            yield connection
    else:
        with tempfile.TemporaryDirectory(prefix="baton-journal-") as folder:
            copy = Path(folder) / "copy.sqlite3"
            shutil.copyfile(path, copy)
            shutil.copyfile(log, copy.with_name(copy.name + "-wal"))
            with closing(_connect(copy, "mode=rw")) as connection:
                yield connection


def _connect(path: Path, how: str) -> sqlite3.Connection:
    name = f"file:{quote(str(path.absolute()))}?{how}"
    return sqlite3.connect(name, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)


def _read(path: Path, connection: sqlite3.Connection) -> Snapshot:
    """In one transaction, which sees one instant."""
    queries = load_queries()
    connection.execute("PRAGMA query_only = ON")
    connection.execute("BEGIN")
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    if "schema_migrations" not in names:
        raise StoreUnavailable(f"{path} is no coordinator's database")
    applied = [AppliedMigration(*row) for row in connection.execute(queries.list_schema_migrations)]
    missing = pending_migrations(load_migrations(), applied)
    if missing:
        raise StoreUnavailable(
            f"{path} is of an older version and lacks {missing[0].name}: start this version's"
            " coordinator on it (or on a copy) once"
        )
    return read_snapshot(connection, queries)
