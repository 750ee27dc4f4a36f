"""A journal is read by somebody who is not its coordinator: whatever state the file is in, nothing
of it changes and nobody is held up."""

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.core.messages import PutJob
from coordinator.core.model import Snapshot
from coordinator.ports import StoreUnavailable
from coordinator.store.reading import read_journal
from coordinator.store.sqlite import SqliteStore
from tests.store.crash_writer import whole_job
from tests.store.worlds import job


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "baton.sqlite3"


async def written(path: Path) -> SqliteStore:
    """A coordinator's store with two jobs, still open."""
    store = SqliteStore(path)
    await store.open()
    await store.commit(whole_job(1))
    await store.commit(whole_job(2))
    return store


def contents(folder: Path) -> dict[str, bytes]:
    """All but the index of a log, which holds the marks of its readers."""
    files = sorted(folder.iterdir())
    return {each.name: each.read_bytes() for each in files if not each.name.endswith("-shm")}


def jobs_of(snapshot: Snapshot) -> list[int]:
    assert len(snapshot.attempts) == len(snapshot.checkpoints) == len(snapshot.jobs)
    return [each.id for each in snapshot.jobs]


async def test_a_running_coordinator_s_is_read_and_it_goes_on(path: Path) -> None:
    store = await written(path)
    before = contents(path.parent)
    snapshot = await asyncio.to_thread(read_journal, path)
    assert jobs_of(snapshot) == [1, 2]
    assert contents(path.parent) == before
    await store.commit(whole_job(3))
    assert jobs_of(await asyncio.to_thread(read_journal, path)) == [1, 2, 3]
    await store.close()
    left = [f".{path.name}.place", path.name, f"{path.name}.lock"]
    assert sorted(each.name for each in path.parent.iterdir()) == left


def test_a_stopped_coordinator_s_is_read_where_nobody_may_write(path: Path) -> None:
    async def write() -> None:
        await (await written(path)).close()

    asyncio.run(write())
    before = contents(path.parent)
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert jobs_of(read_journal(path)) == [1, 2]
    finally:
        path.parent.chmod(0o700)
    assert contents(path.parent) == before, "no log, no index, and nobody became leader"


async def test_a_copy_with_its_log_is_read_and_stays_a_copy(path: Path, tmp_path: Path) -> None:
    store = await written(path)
    copy = tmp_path / "laptop" / "copy.sqlite3"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    shutil.copyfile(f"{path}-wal", f"{copy}-wal")
    await store.close()
    before = contents(copy.parent)
    assert jobs_of(await asyncio.to_thread(read_journal, copy)) == [1, 2], "from the log"
    assert contents(copy.parent) == before


async def test_a_writer_in_the_middle_is_not_waited_for(path: Path) -> None:
    store = await written(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM jobs")
        assert jobs_of(await asyncio.to_thread(read_journal, path)) == [1, 2]
        other.rollback()
    await store.close()


def _nothing(path: Path) -> None:
    path.parent.mkdir()


def _text(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("job,arrival_s\n" * 100)


def _foreign(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE jobs (id)")
        connection.commit()


def _alter(path: Path, statement: str) -> None:
    async def write() -> None:
        store = SqliteStore(path)
        await store.open()
        await store.commit([PutJob(job(1))])
        await store.close()

    asyncio.run(write())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()


def _newer(path: Path) -> None:
    _alter(path, "INSERT INTO schema_migrations VALUES ('9999.pre.later.sql', 'x', '9.9.9')")


def _older(path: Path) -> None:
    _alter(path, "DELETE FROM schema_migrations WHERE name LIKE '0002%'")


def _garbled(path: Path) -> None:
    _alter(path, "UPDATE jobs SET document = '{'")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_nothing, "cannot be read (No such file or directory)"),
        (_text, "is no SQLite database"),
        (_foreign, "is no coordinator's database"),
        (_newer, "which this version does not know"),
        (_older, "is of an older version and lacks 0002.pre.gangs.sql"),
        (_garbled, "holds what is no document of ours"),
    ],
)
def test_what_cannot_be_used_is_said(
    path: Path, make: Callable[[Path], None], sentence: str
) -> None:
    make(path)
    before = contents(path.parent)
    with pytest.raises(StoreUnavailable) as caught:
        read_journal(path)
    assert sentence in str(caught.value)
    assert contents(path.parent) == before


def test_a_directory_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        read_journal(tmp_path)
    assert os.listdir(tmp_path) == []
