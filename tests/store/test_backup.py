"""`baton-coordinator backup`: one moment of the store in one file that knows that it is a copy."""

import os
import sqlite3
import stat
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.backup import BackupError, backup
from coordinator.core.demand_history import DemandRow, PutDemand
from coordinator.core.messages import AppendEvent, PutJob, Record
from coordinator.core.numbering import EPOCHS_MIN, JOB_IDS_MIN, Numbering
from coordinator.core.phases import JobPhase
from coordinator.core.restored import UNSURE
from coordinator.main import main
from coordinator.store import place
from tests.store.worlds import SqliteWorld, event, job, leading, read_all, write_all

NOW_MS = time.time_ns() // 1_000_000


def whole(job_id: int) -> list[Record]:
    return [PutJob(replace(job(job_id), event_count=1)), AppendEvent(event(job_id, 1))]


@pytest.fixture
def world(tmp_path: Path) -> SqliteWorld:
    return SqliteWorld(tmp_path / "state" / "baton.sqlite3")


async def test_a_copy_is_one_moment_of_a_store_that_is_written(
    world: SqliteWorld, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite3"
    async with leading(world) as (store, _):
        await store.commit(whole(1))
        with closing(sqlite3.connect(world.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # the commit that is on its way holds nobody up
            other.execute("DELETE FROM jobs")
            size_bytes = backup(world.path, copy, NOW_MS)
            other.rollback()
        await store.commit(whole(2))
    assert (size_bytes, stat.S_IMODE(copy.stat().st_mode)) == (copy.stat().st_size, 0o600)
    assert sorted(os.listdir(tmp_path)) == ["copy.sqlite3", "state"]
    found = await read_all(SqliteWorld(copy))
    assert [known.id for known in found.jobs] == [1]
    assert [known.id for known in (await read_all(world)).jobs] == [1, 2]


async def test_who_opens_a_copy_goes_on_above_all_that_was_given(
    world: SqliteWorld, tmp_path: Path
) -> None:
    """Once: the next start finds a store as any other."""
    copy = SqliteWorld(tmp_path / "copy.sqlite3")
    await write_all(world, whole(1))
    backup(world.path, copy.path, NOW_MS - 5_000)
    for _ in range(3):
        await read_all(world)
    first = await read_all(copy)
    assert first.copied_unix_ms == NOW_MS - 5_000
    assert first.last_job_id >= 1 + JOB_IDS_MIN + 50
    assert first.numbering.remembered_job_id == 1
    assert first.numbering.given_job_id == first.last_job_id
    assert first.leader_epoch > EPOCHS_MIN
    assert (first.jobs[0].phase, first.jobs[0].reason) == (JobPhase.HELD, UNSURE)
    async with leading(copy) as (store, again):
        assert [line.name for line in await store.events(1, 0, 9)] == ["test", "job.held"]
    assert (again.copied_unix_ms, again.last_job_id) == (0, first.last_job_id)
    assert (again.numbering, again.leader_epoch) == (first.numbering, first.leader_epoch + 1)
    with closing(sqlite3.connect(copy.path, isolation_level=None)) as earlier:
        earlier.execute("DELETE FROM counters WHERE name = 'given_job_id'")
    assert (await read_all(copy)).numbering == first.numbering
    assert (await read_all(world)).numbering == Numbering()


async def test_a_plain_copy_becomes_one_that_knows_what_it_is(
    world: SqliteWorld, tmp_path: Path
) -> None:
    """It is as old as its file says."""
    await write_all(world, whole(1))
    plain = tmp_path / "plain.sqlite3"
    plain.write_bytes(world.path.read_bytes())
    os.utime(plain, (NOW_MS / 1_000 - 900,) * 2)
    words = ["backup", str(tmp_path / "marked"), "--store-path", str(plain)]
    assert main(words) == 0
    made = (await read_all(SqliteWorld(tmp_path / "marked"))).copied_unix_ms
    assert abs(made - (NOW_MS - 900_000)) < 1_000
    assert main(["backup", str(tmp_path / "none"), "--store-path", str(tmp_path / "no")]) == 1


async def test_a_copy_of_a_copy_is_as_old_as_the_first(world: SqliteWorld, tmp_path: Path) -> None:
    await write_all(world, whole(1))
    backup(world.path, tmp_path / "one", NOW_MS - 900_000)
    backup(tmp_path / "one", tmp_path / "two", NOW_MS)
    assert (await read_all(SqliteWorld(tmp_path / "two"))).copied_unix_ms == NOW_MS - 900_000
    backup(tmp_path / "two", tmp_path / "three", NOW_MS)  # it has been opened: a store as any other
    assert (await read_all(SqliteWorld(tmp_path / "three"))).copied_unix_ms == NOW_MS


async def test_what_an_older_coordinator_has_worked_with_is_no_copy_any_more(
    world: SqliteWorld, tmp_path: Path
) -> None:
    """It takes the lead as any does, and leaves the mark; an upgrade later may not hold its jobs.
    What is copied from there is a copy of that day."""
    copy = SqliteWorld(tmp_path / "copy.sqlite3")
    await write_all(world, whole(1))
    backup(world.path, copy.path, NOW_MS - 900_000)
    with closing(sqlite3.connect(copy.path, isolation_level=None)) as older:
        older.execute("UPDATE leader SET epoch = epoch + 1")
    backup(copy.path, tmp_path / "later", NOW_MS)
    found = await read_all(copy)
    assert (found.copied_unix_ms, found.last_job_id, found.jobs[0].reason) == (0, 1, "")
    assert (await read_all(SqliteWorld(tmp_path / "later"))).copied_unix_ms == NOW_MS


async def test_what_goes_wrong_leaves_the_copy_of_before(
    world: SqliteWorld, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.sqlite3"
    with pytest.raises(BackupError, match="there is no such database"):
        backup(world.path, copy, NOW_MS)
    await write_all(world, whole(1))
    backup(world.path, copy, NOW_MS)
    before = copy.read_bytes()
    with pytest.raises(BackupError, match="--replace"):
        backup(world.path, copy, NOW_MS)
    whole_size = world.path.stat().st_size
    with world.path.open("r+b") as file:
        file.seek(whole_size // 2)
        file.write(b"\xff" * 8_192)
    with pytest.raises((BackupError, sqlite3.DatabaseError)):
        backup(world.path, copy, NOW_MS, replace=True)
    assert copy.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["copy.sqlite3", "state"]


async def test_nothing_but_a_file_gives_way_and_never_the_store(
    world: SqliteWorld, tmp_path: Path
) -> None:
    await write_all(world, whole(1))
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path, tmp_path / "pipe", Path("/")):
        with pytest.raises(BackupError, match="that is no file"):
            backup(world.path, target, NOW_MS, replace=True)
    link = tmp_path / "link"
    link.symlink_to(world.path)
    for target in (world.path, link, Path(f"{world.path}-wal"), Path(f"{world.path}.lock")):
        with pytest.raises(BackupError, match="the database itself"):
            backup(world.path, target, NOW_MS, replace=True)
    assert (await read_all(world)).copied_unix_ms == 0
    link.unlink()
    link.symlink_to("elsewhere")
    for _ in range(2):
        backup(world.path, link, NOW_MS, replace=True)
    assert link.is_symlink()
    assert (await read_all(SqliteWorld(tmp_path / "elsewhere"))).copied_unix_ms == NOW_MS


def ended_pid() -> int:
    with subprocess.Popen(["true"]) as program:
        return program.pid


async def test_what_a_killed_copy_has_left_goes_with_the_next(
    world: SqliteWorld, tmp_path: Path
) -> None:
    """Also where it had our own pid, as in a container. Who still lives goes on."""
    await write_all(world, whole(1))
    pid = ended_pid()
    left = [f".copy.{pid}", f".copy.{pid}-journal", f".copy.{os.getpid()}"]
    others = [f".copy.{os.getppid()}", ".copy.swp", f".copy.x.{pid}"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    backup(world.path, tmp_path / "copy", NOW_MS)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "copy", "state"])


async def test_the_command_says_what_it_has_done(
    world: SqliteWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.sqlite3"
    await write_all(world, whole(1))
    config = tmp_path / "coordinator.toml"
    tls = [f'tls_{name} = "$CREDENTIALS_DIRECTORY/{name}"\n' for name in ("cert", "key", "ca")]
    config.write_text(f'store_path = "{world.path}"\n{"".join(tls)}')
    flags = ["--config", str(config)]  # as the service has it, whose keys nobody else can read
    assert main(["backup", str(copy), *flags]) == 0
    assert capsys.readouterr().out.startswith(f"{copy}: {copy.stat().st_size} bytes, {world.path}")
    assert main(["backup", str(copy), *flags]) == 1
    assert "`--replace` takes its place" in capsys.readouterr().err
    assert main(["backup", "--replace", str(copy), *flags]) == 0
    assert main(["backup", *flags, "--replace", str(copy)]) == 0  # the flags may come first
    assert capsys.readouterr().out.count(f"{world.path} as it was at") == 2
    with pytest.raises(SystemExit) as wrong:
        main(["backup", *flags])
    assert wrong.value.code == 2


def plainly_copied(store: Path, target: Path) -> Path:
    """As `cp` does it, of one that nobody has open."""
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(store.read_bytes())
    return target


@pytest.mark.parametrize("there", ["state/baton.sqlite3", "other/baton.sqlite3"])
async def test_a_plain_copy_that_is_put_back_is_known_at_its_first_start(
    world: SqliteWorld, tmp_path: Path, there: str
) -> None:
    """In the place of what has gone on since, or elsewhere; and what waited in it is held."""
    minute = DemandRow(1, NOW_MS // 60_000 - 90)
    await write_all(world, whole(1), [PutDemand(minute)])
    copy = plainly_copied(world.path, tmp_path / "copies" / "plain")
    await write_all(world, whole(2))
    target = SqliteWorld(plainly_copied(copy, tmp_path / there))
    first = await read_all(target)
    assert first.copied_unix_ms == (minute.step + 1) * 60_000
    assert (first.jobs[0].phase, first.jobs[0].reason) == (JobPhase.HELD, UNSURE)
    assert first.last_job_id >= 1 + JOB_IDS_MIN + 10 * 89 * 60
    assert first.numbering.remembered_job_id == 1
    again = await read_all(target)
    assert (again.copied_unix_ms, again.numbering) == (0, first.numbering)


@pytest.mark.parametrize("killed", [True, False])
async def test_a_plain_copy_of_the_same_start_is_known_too(
    world: SqliteWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Of a coordinator that was stopped since, or that has worked for an hour since."""
    copy = tmp_path / "copy.sqlite3"
    async with leading(world) as (store, _):
        await store.commit(whole(1))
        with closing(sqlite3.connect(world.path)) as here, closing(sqlite3.connect(copy)) as there:
            here.backup(there)
        if killed:
            monkeypatch.setattr(store._opened, "_place_due_s", 0.0)  # type: ignore[attr-defined]
            await store.commit(whole(2))
            monkeypatch.setattr(store._opened, "_leave", lambda: None)  # type: ignore[attr-defined]
    world.path.write_bytes(copy.read_bytes())
    found = await read_all(world)
    assert (found.copied_unix_ms > 0, [one.id for one in found.jobs]) == (True, [1])
    assert found.jobs[0].phase is JobPhase.HELD


async def test_a_store_that_is_moved_with_its_directory_is_none(
    world: SqliteWorld, tmp_path: Path
) -> None:
    await write_all(world, whole(1))
    world.path.parent.rename(tmp_path / "moved")
    found = await read_all(SqliteWorld(tmp_path / "moved" / world.path.name))
    assert (found.copied_unix_ms, found.jobs[0].phase) == (0, JobPhase.QUEUED)


async def test_a_start_that_is_killed_in_its_midst_makes_no_copy(
    world: SqliteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is beside the file, and the commit that should bring it is not."""
    await write_all(world, whole(1))
    write = place._write

    def killed(path: Path, text: str) -> None:
        write(path, text)
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(place, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            await read_all(world)
        monkeypatch.setattr(place, "_write", write)
    assert (await read_all(world)).copied_unix_ms == 0
    # One that an older version has led since says nothing of where it lies.
    with closing(sqlite3.connect(world.path, isolation_level=None)) as older:
        older.execute("UPDATE leader SET epoch = epoch + 1")
    place._file(world.path).unlink()
    assert (await read_all(world)).copied_unix_ms == 0
