"""Whether the file of a store lies where its last coordinator left it, or is a copy of that file.

Problem: a plain copy (`cp`) of the database that is put back does not know that it is one. A job
that waited in it is started, though it may have run since, beside itself, before the first node
says that it knows more.

How: at each start and end, and once an hour, the store gets a random number, which is written down
beside its file as well. Who finds a store that has a number, and not the same one beside it, has a
copy: of another place, or of an earlier hour. Before the commit that brings the number both stand
beside the file, it and the one before, so that a kill in between does not look like that. A number
that another than the last leader has given, since an older version has worked here meanwhile, says
nothing.

What is not seen: a snapshot of the whole directory, which brings both; and, after a kill, a copy of
the last hour that takes the place of the same file. There the nodes' word is left
(`core/restored.py`).
"""

import os
import secrets
import sqlite3
import time
from pathlib import Path

from coordinator.core.model import Snapshot
from coordinator.store.queries import Queries

# Not one of the files that `cp baton.sqlite3*` takes along.
NAME = ".{store}.place"
NUMBER, LEADER = "place", "place_leader_epoch"  # counters
_MINUTE_MS = 60_000
_READ_BYTES_MAX = 256


def copied_unix_ms(
    connection: sqlite3.Connection, queries: Queries, path: Path, snapshot: Snapshot
) -> int:
    """When the copy was made, at the latest, in the transaction of a new leader; 0: it is none."""
    counters = dict(connection.execute(queries.list_counters))
    number = counters.get(NUMBER, 0)
    if not number or counters.get(LEADER) != snapshot.leader_epoch - 1:
        return 0
    if number in _beside(path):
        return 0
    # While a coordinator works it writes down each minute; the file's own time may be of today.
    minutes = [(row.step + 1) * row.period_min for row in snapshot.demand.rows]
    return min(max(minutes, default=0) * _MINUTE_MS or _now_ms(), _now_ms())


def note(connection: sqlite3.Connection, queries: Queries, path: Path, leader_epoch: int) -> int:
    """It lies here, in the transaction that makes it so, as the last of what may fail. Returns the
    number, to `settle` it once that is committed."""
    number = secrets.randbits(62) | 1
    counters = dict(connection.execute(queries.list_counters))
    values = {NUMBER: number, LEADER: leader_epoch}
    named = [{"name": name, "value": value} for name, value in values.items()]
    connection.executemany(queries.put_counter, named)
    _write(path, f"{counters.get(NUMBER, 0)} {number}\n")
    return number


def settle(path: Path, number: int) -> None:
    _write(path, f"{number}\n")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _file(path: Path) -> Path:
    return path.with_name(NAME.format(store=path.name))


def _beside(path: Path) -> tuple[int, ...]:
    try:
        with _file(path).open("rb") as file:
            words = file.read(_READ_BYTES_MAX).split()
    except FileNotFoundError:
        return ()
    return tuple(int(word) for word in words if word.isdigit())


def _write(path: Path, text: str) -> None:
    """All of it or what was there, also after a power cut."""
    target = _file(path)
    scratch = target.with_name(f"{target.name}.new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(scratch, target)
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
