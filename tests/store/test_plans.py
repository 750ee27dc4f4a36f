"""No statement walks through a table that grows, of the coordinator's store and of the agent's
journal.

What SQLite would do is asked of SQLite, so that nobody needs a million rows to see it: a `SCAN` of
a table that is not read as a whole is a start, a commit or a page that takes longer every month.
"""

import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from agent.journal import SqliteJournal
from agent.journal import load_queries as load_journal_queries
from coordinator.store.queries import load_queries
from coordinator.store.sqlite import SqliteStore

# One row, or a handful that are fixed.
SMALL = frozenset({"leader", "counters"})
# After a wrong clock alone; what is kept of demand is bounded.
SELDOM = frozenset({"drop_demand"})
# At the start, in the order of an index: the whole of it never lies in one sorting.
WHOLE = re.compile(r"list_(?!events)|read_")
SCAN = re.compile(r"SCAN (?P<table>\w+)")


async def databases(directory: Path) -> list[tuple[Path, Mapping[str, str]]]:
    store, journal = SqliteStore(directory / "store"), SqliteJournal(directory / "journal")
    await store.open()
    await store.close()
    await journal.open("j1")
    await journal.close()
    stored = asdict(load_queries())
    return [(directory / "store", stored), (directory / "journal", load_journal_queries())]


def plan(connection: sqlite3.Connection, statement: str) -> list[str]:
    names = dict.fromkeys(re.findall(r":(\w+)", statement), 1)
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", names)]


def faults(name: str, steps: list[str]) -> list[str]:
    """What of a plan takes longer the more there is."""
    whole = WHOLE.match(name) is not None
    found = []
    for step in steps:
        scan = SCAN.match(step)
        if scan is not None and not whole and scan["table"] not in SMALL and name not in SELDOM:
            found.append(f"{name}: {step}")
        if step == "USE TEMP B-TREE FOR ORDER BY":
            found.append(f"{name}: {step}")
    return found


async def test_every_statement_finds_its_rows_by_an_index(tmp_path: Path) -> None:
    seen = 0
    for path, queries in await databases(tmp_path):
        with closing(sqlite3.connect(path)) as connection:
            for name, text in queries.items():
                statement = "\n".join(re.findall(r"^(?!--).*$", text, re.MULTILINE)).strip()
                if not statement.startswith("CREATE"):
                    assert faults(name, plan(connection, statement)) == []
                    seen += 1
    assert seen > 60


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("drop_old_events", "DELETE FROM events WHERE unix_ms < :unix_ms"),
        ("list_jobs", "SELECT document FROM jobs ORDER BY project"),
        ("list_events", "SELECT message FROM events WHERE node = :node"),
    ],
)
async def test_a_statement_without_an_index_is_found(
    tmp_path: Path, name: str, statement: str
) -> None:
    (path, _), _ = await databases(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        assert faults(name, plan(connection, statement)) != []
