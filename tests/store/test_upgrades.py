"""A database of every older shape becomes one of today's, whole or not at all, with all that was in
it."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.core.demand_history import DemandRow, PutDemand, PutDemandSeries, Series
from coordinator.core.messages import (
    AppendEvent,
    PutAttempt,
    PutCheckpoint,
    PutJob,
    PutNode,
    PutPart,
    PutScaleRecord,
    Record,
)
from coordinator.core.model import (
    Attempt,
    Checkpoint,
    HostFacts,
    JobEvent,
    Node,
    Snapshot,
    WaitingPart,
)
from coordinator.core.phases import AttemptPhase
from coordinator.core.scale_records import ScaleRecord
from coordinator.store import rows
from coordinator.store.queries import load_queries
from coordinator.store.schema import Migration, load_migrations
from coordinator.store.sqlite import SqliteStore
from tests.store.worlds import event, job

LOST = AttemptPhase.LOST
# What each migration has brought a table for; nothing is of a version that had not its table.
BROUGHT: dict[str, list[Record]] = {
    "0001.pre.initial.sql": [
        PutJob(job(7)),
        PutAttempt(Attempt(7, 1, "n1", ("GPU-a",), LOST, 5, ranks=2)),
        PutCheckpoint(Checkpoint(7, "aa" * 32, "", 1, 100, 4096, ("n1",), committed_unix_ms=6)),
        PutNode(Node("n1", "j1", "n1:1", HostFacts(), ())),
        AppendEvent(event(7, 1)),
    ],
    "0002.pre.gangs.sql": [
        PutAttempt(Attempt(7, 1, "n2", ("GPU-b",), LOST, 5, rank=1, ranks=2)),
        PutPart(WaitingPart(7, 1, 1, 200, "bb" * 32, "", 4096, ("n2",), 1)),
    ],
    "0003.pre.demand.sql": [
        PutDemandSeries(0, Series("H100", "vision", "standard")),
        PutDemand(DemandRow(60, 9, (0,), (3.5,))),
    ],
    "0004.pre.scaling.sql": [
        PutScaleRecord(ScaleRecord(3, 0, "H100", "act", "one starts", 0.95, 8, 0, 0, 8, 16, 16))
    ],
    "0005.pre.lease_days.sql": [],
}
TODAY = load_migrations()


def make(path: Path, migrations: tuple[Migration, ...]) -> list[Record]:
    """A database as it was when these were all; returns what it holds."""
    queries, held = load_queries(), list[Record]()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(queries.create_schema_migrations)
        for each in migrations:
            for statement in each.statements():
                connection.execute(statement)
            applied = {"name": each.name, "checksum": each.checksum, "since": each.since}
            connection.execute(queries.add_schema_migration, applied)
            for text, parameters in rows.statements(queries, BROUGHT[each.name]):
                connection.executemany(text, parameters)
            held += BROUGHT[each.name]
    return held


async def opened(path: Path) -> tuple[Snapshot, list[JobEvent]]:
    store = SqliteStore(path)
    snapshot = await store.open()
    history = await store.events(7, 0, 10)
    await store.close()
    return snapshot, history


def check(found: Snapshot, history: list[JobEvent], held: list[Record]) -> None:
    """All of it is there, and nothing else."""
    scaled = [PutScaleRecord(each) for each in found.scale_records]
    there: list[Record] = [
        *map(PutJob, found.jobs), *map(PutAttempt, found.attempts),
        *map(PutCheckpoint, found.checkpoints), *map(PutNode, found.nodes),
        *map(AppendEvent, history), *map(PutPart, found.parts), *found.demand.series,
        *map(PutDemand, found.demand.rows), *scaled,
    ]  # fmt: skip
    assert sorted(map(repr, there)) == sorted(map(repr, held))
    assert found.last_job_id == 7


def test_every_migration_has_its_example() -> None:
    assert list(BROUGHT) == [migration.name for migration in TODAY]


@pytest.mark.parametrize("count", range(1, len(TODAY) + 1))
async def test_an_older_database_becomes_one_of_today(tmp_path: Path, count: int) -> None:
    path = tmp_path / "baton.sqlite3"
    held = make(path, TODAY[:count])
    for _ in range(2):
        check(*await opened(path), held)


# More pages than SQLite holds back, so that they are in the log already; then it kills itself.
KILLED = """
import asyncio, os, sys
from pathlib import Path
from coordinator.store import sqlite
from coordinator.store.schema import load_migrations, read_migration
text = '''-- Since 9.9.9: a table of 16 MB, and one table less.
CREATE TABLE more (a TEXT);
DROP TABLE checkpoints;
INSERT INTO more WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 4000)
SELECT hex(zeroblob(2000)) FROM n;
SELECT die();
'''
connect = sqlite._Opened._connect
def armed(self):
    connection = connect(self)
    connection.create_function("die", 0, lambda: os.kill(os.getpid(), 9))
    return connection
sqlite._Opened._connect = armed
migrations = [*load_migrations(), read_migration("9999.pre.more.sql", text)]
asyncio.run(sqlite.SqliteStore(Path(sys.argv[1]), migrations=migrations).open())
"""


def killed_in_a_migration(path: Path) -> int:
    """Returns how large the log is that is left."""
    process = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    return path.with_name(f"{path.name}-wal").stat().st_size


async def test_a_kill_in_the_middle_of_a_migration_leaves_what_was_before(tmp_path: Path) -> None:
    path = tmp_path / "baton.sqlite3"
    held = make(path, TODAY[:2])
    assert killed_in_a_migration(path) > 4 << 20
    check(*await opened(path), held)
    with closing(sqlite3.connect(path)) as connection:
        tables = "SELECT count(*) FROM sqlite_master WHERE name = 'more'"
        assert connection.execute(tables).fetchone() == (0,)
