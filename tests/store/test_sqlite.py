"""What a file and a process can do to the SQLite store: kills, full disks, other coordinators,
other versions, damage."""

import errno
import filecmp
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from coordinator.core.messages import AppendEvent, PutAttempt, PutJob, Record
from coordinator.core.model import Attempt, JobSpec
from coordinator.core.phases import AttemptPhase
from coordinator.ports import StoreUnavailable
from coordinator.store.queries import load_queries
from coordinator.store.schema import load_migrations, read_migration
from coordinator.store.sqlite import SqliteStore
from tests.store.crash_writer import whole_job
from tests.store.worlds import IMPATIENT_MS, SqliteWorld, event, job, leading, read_all, write_all

REPOSITORY = Path(__file__).parents[2]
# More than a writer can commit before it is killed, and a bound if nobody kills it.
BATCHES_MAX = 20_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "baton.sqlite3"


@contextmanager
def crash_writer(path: Path, batches: int) -> Iterator[subprocess.Popen[str]]:
    """A store open in another process, killed at the end, if not before."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.store.crash_writer", str(path), str(batches)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


@contextmanager
def writing_by_hand(path: Path) -> Iterator[sqlite3.Connection]:
    """Another connection, as a database shell would have it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


@pytest.mark.parametrize("seed", range(5))
async def test_a_kill_loses_no_acknowledged_batch_and_leaves_none_half_done(
    path: Path, seed: int
) -> None:
    """Twice on one file, so that the second writer starts from what the first kill left."""
    random = Random(seed)
    for _ in range(2):
        with crash_writer(path, BATCHES_MAX) as process:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(random.randrange(1, 400))]
            process.kill()
            said += process.stdout.readlines()
        # The kill may cut the last line short; what has no end was not said.
        acknowledged = max(int(line) for line in said if line.endswith("\n"))
        assert process.returncode == -9

        store = SqliteStore(path)
        found = await store.open()
        committed = found.last_job_id
        assert committed in (acknowledged, acknowledged + 1)
        expected = list(range(1, committed + 1))
        assert [value.id for value in found.jobs] == expected
        assert [value.job_id for value in found.attempts] == expected
        assert [value.job_id for value in found.checkpoints] == expected
        assert [line.sequence for line in await store.events(committed, 0, 10)] == [1, 2]
        assert await store.events(committed + 1, 0, 10) == []
        await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield mount
    # Lazily: a failed test may have left its store open, and its mount must not outlive it.
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(directory: Path) -> Path:
    """A file that takes what is left."""
    filler = directory / "filler"
    page = bytes(4096)
    with filler.open("wb", buffering=0) as file, suppress_disk_full():
        while True:
            file.write(page)
    return filler


@contextmanager
def suppress_disk_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


async def test_a_full_disk_is_unavailable_until_there_is_space(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "state" / "baton.sqlite3")
    await store.open()
    await store.commit(whole_job(1))
    filler = fill(small_disk)
    large = [record for job_id in range(2, 300) for record in whole_job(job_id)]
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=r"full.* 0 bytes free"):
            await store.commit(large)
        assert [line.sequence for line in await store.events(1, 0, 10)] == [1, 2]
        assert await store.events(2, 0, 10) == []
    filler.unlink()
    await store.commit(large)
    await store.close()
    found = await store.open()
    assert [value.id for value in found.jobs] == list(range(1, 300))
    await store.close()


@pytest.mark.parametrize("moved", ["state", "state/baton.sqlite3", "state/baton.sqlite3-wal"])
async def test_nothing_is_acknowledged_that_no_restart_would_find(
    path: Path, tmp_path: Path, moved: str
) -> None:
    """SQLite itself goes on writing to a file that has no name any more."""
    store = SqliteStore(path)
    await store.open()
    await store.commit(whole_job(1))
    (tmp_path / moved).rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"baton\.sqlite3.* put it back, or restart"):
            await store.commit(whole_job(2))
    (tmp_path / "away").rename(tmp_path / moved)
    await store.commit(whole_job(2))
    await store.close()
    found = await store.open()
    assert [value.id for value in found.jobs] == [1, 2]
    await store.close()


async def test_another_database_in_its_place_gets_nothing(path: Path, tmp_path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy").rename(path)
    with pytest.raises(StoreUnavailable, match="replaced"):
        await store.commit(whole_job(1))
    await store.close()


async def test_a_second_coordinator_is_refused_until_the_first_is_gone(path: Path) -> None:
    with crash_writer(path, 1) as process:
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=rf"another coordinator, pid {process.pid}:"):
                await SqliteStore(path).open()
        process.kill()
        process.wait()
        store = SqliteStore(path)
        assert (await store.open()).leader_epoch == 2
        await store.close()


class Overtaken(list[Record]):
    """Records during whose writing another coordinator, held up by no lock file, tries to take
    over."""

    def __init__(self, records: list[Record], path: Path) -> None:
        super().__init__(records)
        self.path = path
        self.outcomes: list[str] = []

    def __iter__(self) -> Iterator[Record]:
        with writing_by_hand(self.path) as successor:
            successor.execute("PRAGMA busy_timeout = 0")
            try:
                successor.execute(load_queries().advance_leader)
            except sqlite3.OperationalError as error:
                self.outcomes.append(str(error))
            else:
                self.outcomes.append("has taken over in the middle of a commit")
        return super().__iter__()


async def test_nobody_becomes_leader_between_the_check_and_the_records(path: Path) -> None:
    """The trap: a check that does not hold the leader's row until the end lets a stale leader
    write."""
    async with leading(SqliteWorld(path)) as (store, _):
        records = Overtaken([PutJob(job(1))], path)
        await store.commit(records)
    assert records.outcomes == ["database is locked"]
    found = await read_all(SqliteWorld(path))
    assert (found.leader_epoch, found.jobs) == (2, (job(1),))


async def test_the_lock_is_given_back_by_closing_and_by_a_refused_open(path: Path) -> None:
    tomorrow = read_migration("0009.pre.more.sql", "-- Since 9.9.9: more.\nSELECT nonsense;\n")
    first = SqliteStore(path, migrations=[*load_migrations(), tomorrow])
    with pytest.raises(sqlite3.OperationalError, match="nonsense"):
        await first.open()
    second, third = SqliteStore(path), SqliteStore(path)
    await second.open()
    with pytest.raises(StoreUnavailable, match=f"pid {os.getpid()}:"):
        await third.open()
    await second.close()
    assert (await third.open()).leader_epoch == 2
    await third.close()


def modes(directory: Path) -> dict[str, int]:
    return {
        str(found.relative_to(directory)): stat.S_IMODE(found.stat().st_mode)
        for found in directory.rglob("*")
    }


async def test_files_are_their_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "baton.sqlite3"
    store = SqliteStore(path)
    for _ in range(2):
        await store.open()
        await store.commit([PutJob(job(1))])
        names = [f"{path.name}{suffix}" for suffix in ("", "-wal", "-shm", ".lock")]
        files = {f"state/{name}": 0o600 for name in (*names, f".{path.name}.place")}
        assert modes(tmp_path) == {"state": 0o700, **files}
        await store.close()
        os.chmod(path, 0o644)


MORE = """-- Since 9.9.9: a table; with two statements.
CREATE TABLE more (a TEXT);
INSERT INTO more (a) VALUES ('once');
"""


async def test_a_new_migration_is_applied_once_and_whole(path: Path) -> None:
    known = load_migrations()
    await write_all(SqliteWorld(path), [PutJob(job(1))])
    broken = read_migration("0009.pre.more.sql", MORE.replace("INTO more", "INTO nowhere"))
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        await SqliteStore(path, migrations=[*known, broken]).open()
    whole = read_migration("0009.pre.more.sql", MORE)
    for epoch in (2, 3):
        store = SqliteStore(path, migrations=[*known, whole])
        found = await store.open()
        assert (found.leader_epoch, found.jobs) == (epoch, (job(1),))
        await store.close()
    with writing_by_hand(path) as shell:
        assert shell.execute("SELECT a FROM more").fetchall() == [("once",)]


async def test_a_database_of_a_newer_version_is_refused(path: Path) -> None:
    newer = read_migration("0009.post.less.sql", "-- Since 9.9.9: less.\nSELECT 1;\n")
    store = SqliteStore(path, migrations=[*load_migrations(), newer])
    await store.open()
    await store.close()
    with pytest.raises(StoreUnavailable, match=r"0009\.post\.less\.sql.* 9\.9\.9 or newer"):
        await SqliteStore(path).open()


async def test_the_version_before_reads_one_row_a_try(path: Path) -> None:
    """Its own tables hold rank 0 of a gang and nothing twice, so that it can be rolled back to."""
    ranks = [
        Attempt(1, 1, f"n{rank}", (), AttemptPhase.RUNNING, 5, rank=rank, ranks=3)
        for rank in range(3)
    ]
    await write_all(SqliteWorld(path), [PutJob(job(1)), *map(PutAttempt, ranks)])
    with writing_by_hand(path) as shell:
        assert shell.execute("SELECT epoch, node FROM attempts").fetchall() == [(1, "n0")]
        assert shell.execute("SELECT attempt_rank FROM ranks").fetchall() == [(1,), (2,)]
    assert (await read_all(SqliteWorld(path))).attempts == tuple(ranks)


async def test_an_edited_migration_is_refused(path: Path) -> None:
    await write_all(SqliteWorld(path), [PutJob(job(1))])
    known, *rest = load_migrations()
    edited = read_migration(known.name, known.text + "CREATE TABLE more (a TEXT);\n")
    with pytest.raises(StoreUnavailable, match="was edited after it was applied"):
        await SqliteStore(path, migrations=[edited, *rest]).open()
    assert (await read_all(SqliteWorld(path))).leader_epoch == 2


async def test_a_file_that_is_no_database_is_refused() -> None:
    """This very source, for instance; refusing it leaves it as it was."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(shutil.copy(__file__, directory))
        with pytest.raises(StoreUnavailable, match="not a database"):
            await SqliteStore(path).open()
        assert filecmp.cmp(path, __file__, shallow=False)


async def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        await SqliteStore(tmp_path / "file" / "baton.sqlite3").open()


def damaged_copy_of_a_killed_coordinator_s(path: Path, directory: Path) -> Path:
    """A log is left, and a page that opening would not read, the root of the history, is gone."""
    with crash_writer(path, 30) as process:
        assert process.stdout is not None
        for _ in range(30):
            process.stdout.readline()
    with writing_by_hand(path) as shell:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'events'"
        root_page = shell.execute(query).fetchone()[0]
        shell.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shell.execute("UPDATE leader SET epoch = epoch + 1")
        copy = directory / path.name
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    with copy.open("r+b") as file:
        file.seek((root_page - 1) * 4096)
        file.write(b"\x77" * 4096)
    return copy


@pytest.mark.parametrize("before", [None, "", "7\n", "7\nanother-boot\n"])
async def test_damage_is_found_after_a_power_cut(
    path: Path, tmp_path: Path, before: str | None
) -> None:
    """And found again, by whoever starts next: SQLite has removed the log meanwhile."""
    copy = damaged_copy_of_a_killed_coordinator_s(path, tmp_path)
    if before is not None:
        copy.with_name(f"{copy.name}.lock").write_text(before)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"damaged|malformed"):
            await SqliteStore(copy).open()


async def test_a_file_is_not_read_through_after_a_mere_kill(path: Path, tmp_path: Path) -> None:
    """That what would have been found is not found shows that nobody has looked."""
    copy = damaged_copy_of_a_killed_coordinator_s(path, tmp_path)
    shutil.copy(f"{path}.lock", f"{copy}.lock")
    store = SqliteStore(copy)
    assert len((await store.open()).jobs) == 30
    await store.close()


async def test_a_plain_copy_is_read_through(path: Path, tmp_path: Path) -> None:
    """`cp baton.sqlite3*` takes the lock file along, which says that there was no power cut."""
    copy = damaged_copy_of_a_killed_coordinator_s(path, tmp_path)
    with writing_by_hand(copy) as shell:
        shell.execute("UPDATE leader SET epoch = epoch - 1")
    shutil.copy(f"{path}.lock", f"{copy}.lock")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"damaged"):
            await SqliteStore(copy).open()
    shutil.copy(path.with_name(f".{path.name}.place"), copy.with_name(f".{copy.name}.place"))
    assert (await read_all(SqliteWorld(copy))).copied_unix_ms == 0  # nobody has looked


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
async def test_a_kill_while_the_lock_file_is_written_leaves_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Before or after either call; the log is gone by then, and the word is all there is."""
    copy = damaged_copy_of_a_killed_coordinator_s(path, tmp_path)
    with pytest.raises(StoreUnavailable, match="damaged"):
        await SqliteStore(copy).open()
    real = getattr(os, call)

    def killed_before(*_: object) -> None:
        raise KeyboardInterrupt

    def killed_after(*arguments: object) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    for killed in (killed_before, killed_after):
        with monkeypatch.context() as here:
            here.setattr(os, call, killed)
            with pytest.raises(KeyboardInterrupt):
                await SqliteStore(copy).open()
        assert not copy.with_name(f"{copy.name}-wal").exists()
        with pytest.raises(StoreUnavailable, match="damaged"):
            await SqliteStore(copy).open()


async def test_a_link_is_the_file_that_it_leads_to(path: Path, tmp_path: Path) -> None:
    """By either name the same lock, the same log, and no copy."""
    link = tmp_path / "link.sqlite3"
    link.symlink_to(path)
    for name in (link, path, link):
        store, other = SqliteStore(name), SqliteStore(link if name == path else path)
        assert (await store.open()).copied_unix_ms == 0
        with pytest.raises(StoreUnavailable, match="in use by another coordinator"):
            await other.open()
        await store.commit(whole_job(1))
        log = path.with_name(f"{path.name}-wal")
        assert store.size_bytes() == sum(os.stat(each).st_size for each in (path, log))
        log.rename(tmp_path / "away")
        with pytest.raises(StoreUnavailable, match="put it back, or restart"):
            await store.commit(whole_job(1))
        (tmp_path / "away").rename(log)
        await store.close()
    assert sorted(os.listdir(tmp_path)) == ["link.sqlite3", "state"]


async def test_a_link_that_leads_elsewhere_now_is_another_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.sqlite3"
    link.symlink_to(path)
    store = SqliteStore(link)
    await store.open()
    link.unlink()
    link.symlink_to(tmp_path / "other.sqlite3")
    with pytest.raises(StoreUnavailable, match="replaced"):
        await store.commit(whole_job(1))
    await store.close()


async def test_a_damaged_file_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(path)
    await store.open()

    def damaged(*_: object) -> None:
        raise sqlite3.DatabaseError("malformed")

    monkeypatch.setattr(store._opened, "write", damaged)
    with pytest.raises(sqlite3.DatabaseError):
        await store.close()
    monkeypatch.undo()
    await read_all(SqliteWorld(path))


async def test_history_is_read_while_somebody_writes(path: Path) -> None:
    world = SqliteWorld(path)
    async with leading(world) as (store, _):
        await store.commit([AppendEvent(event(1, 1))])
        with world.unavailable():
            assert await store.events(1, 0, 10) == [event(1, 1)]


async def test_a_busy_file_says_so(path: Path) -> None:
    world = SqliteWorld(path)
    async with leading(world, patience_ms=IMPATIENT_MS) as (store, _):
        with (
            world.unavailable(),
            pytest.raises(StoreUnavailable, match=r"locked .*SQLITE_BUSY.*\d+ bytes free"),
        ):
            await store.commit([PutJob(job(1))])


async def test_our_own_mistake_is_not_called_unavailable(path: Path) -> None:
    """A missing table is a bug: it propagates, so that the coordinator crashes where it is seen."""
    batch: list[Record] = [PutJob(job(1)), AppendEvent(event(1, 1))]
    async with leading(SqliteWorld(path)) as (store, _):
        with writing_by_hand(path) as shell:
            shell.execute("DROP TABLE events")
        with pytest.raises(sqlite3.OperationalError, match="no such table: events"):
            await store.commit(batch)
    assert (await read_all(SqliteWorld(path))).jobs == ()


async def test_a_job_of_the_version_before_is_of_no_array(path: Path) -> None:
    """Its document lacks what was added, and no row has to be written anew for that."""
    kept = replace(job(1), spec=JobSpec(command=("train",), gpus=1))
    await write_all(SqliteWorld(path), [PutJob(kept)])
    with writing_by_hand(path) as shell:
        (text,) = shell.execute("SELECT document FROM jobs").fetchone()
        document = json.loads(text)
        for name in ("array_id", "array_index"):
            del document[name]
        del document["spec"]["array"]
        shell.execute("UPDATE jobs SET document = ?", (json.dumps(document),))
    (found,) = (await read_all(SqliteWorld(path))).jobs
    assert found == kept
    trial = replace(kept, spec=replace(kept.spec, array="0-99%8"), array_id=1, array_index=7)
    await write_all(SqliteWorld(path), [PutJob(trial)])
    assert (await read_all(SqliteWorld(path))).jobs == (trial,)
