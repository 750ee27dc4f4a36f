"""The journal holds what the fold of its records says, whatever happens to agent or disk."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core import messages as m
from agent.core import state as s
from agent.core import values as v
from agent.core.attempt import AttemptRecord, Pending, Phase
from agent.core.gpu_messages import GpuLeft, PutGpusLeft
from agent.core.values import Gang, ReplicaSource, RestoreCandidate, RestorePart
from agent.journal import SqliteJournal, decode_event, encode_event
from agent.ports import JournalUnavailable
from tests.agent.journal_writer import batch
from tests.core.agent_memory import MemoryJournal
from tests.sim.box import Box, SimJournal

KILLS = 6
CHILD_DEADLINE_S = 60

TEXT = st.text(max_size=8)  # no lone surrogates: the core lets none in
INT = st.integers(0, 2**62)
SOURCES = st.builds(ReplicaSource, TEXT, TEXT)
PARTS = st.tuples(st.builds(RestorePart, TEXT, st.tuples(SOURCES)))
CANDIDATES = st.builds(RestoreCandidate, TEXT, INT, st.tuples(SOURCES), st.just(()) | PARTS)
GANGS = st.builds(
    Gang, INT, INT, INT, INT, INT, st.tuples(TEXT), TEXT, INT, st.tuples(TEXT), st.booleans()
)
SPECS = st.builds(
    m.JobSpec, TEXT, st.tuples(TEXT), environment=st.tuples(st.tuples(TEXT, TEXT)), grace_ms=INT
)
PENDING = st.none() | st.builds(Pending, TEXT, INT, INT, TEXT, INT, st.integers(1, 1_024))
RECORDS = st.builds(
    AttemptRecord,
    id=st.sampled_from(["1.1", "2.1.0", "3.7.12"]),
    job_id=INT,
    epoch=INT,
    spec=SPECS,
    gpu_uuids=st.tuples(TEXT, TEXT),
    candidates=st.tuples(CANDIDATES),
    replica_target=st.none() | SOURCES,
    replica_required=st.booleans(),
    restart_count=INT,
    token=TEXT,
    phase=st.sampled_from(Phase),
    skipped=st.tuples(st.tuples(TEXT, TEXT)),
    pending=PENDING,
    stop_grace_ms=st.none() | INT,
    exit_code=st.none() | INT,
    exit_signal=st.none() | INT,
    said_exit_code=st.none() | INT,
    gang=st.none() | GANGS,
)
BODIES = st.one_of(
    st.builds(m.AttemptStarted, INT, TEXT, INT, st.tuples(st.tuples(TEXT, TEXT))),
    st.builds(
        m.AttemptExited, st.none() | INT, st.none() | INT, TEXT, st.booleans(), st.none() | INT
    ),
    st.builds(m.AttemptRefused, TEXT, st.booleans()),
    st.builds(m.AttemptMilestone, TEXT),
    st.builds(m.CheckpointProposed, TEXT, TEXT, INT, INT, st.tuples(TEXT, TEXT), INT),
)
OCCUPANCY = st.none() | st.builds(v.GpuOccupancy, TEXT, st.none() | INT, st.none() | st.tuples(INT))
CHANGES = st.one_of(
    st.builds(s.PutAttempt, RECORDS),
    st.builds(s.DropAttempt, st.sampled_from(["1.1", "2.1.0", "9.9"])),
    st.builds(s.DropSpooled, st.integers(0, 12)),
    st.builds(
        s.PutFence,
        st.integers(1, 4),
        st.integers(1, 9),
        st.lists(st.integers(0, 1_023), max_size=3, unique=True).map(tuple),
    ),
    st.builds(s.DropFence, st.integers(1, 4)),
    st.builds(s.PutLeaderEpoch, INT),
    st.builds(s.PutJournalId, TEXT),
    st.builds(s.PutGpusMended, TEXT, st.lists(st.tuples(TEXT, INT), max_size=3).map(tuple)),
    st.builds(
        PutGpusLeft,
        st.lists(st.builds(GpuLeft, TEXT, TEXT, TEXT, OCCUPANCY), max_size=3).map(tuple),
    ),
    BODIES,  # becomes an event with the next sequence
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def numbered(changes: list[object], first: int) -> Iterator[s.Record]:
    for change in changes:
        if isinstance(change, m.SpooledBody):
            yield s.SpoolEvent(m.AgentEvent(first, 1, "1.1", change))
            first += 1
        else:
            assert isinstance(change, s.Record)
            yield change


def simulated() -> SimJournal:
    """The one of `tests/sim`, where nothing goes wrong."""
    calm = AsyncMock(checkers=Mock())
    box = Box("n1", 1, calm)
    box.disk.journal_id = "fresh"
    box.gate.set()
    return SimJournal(box)


@settings(max_examples=40)
@given(st.lists(st.lists(CHANGES, max_size=6), max_size=4))
async def test_file_fold_and_simulation_agree(batches: list[list[object]]) -> None:
    fold, in_simulation = MemoryJournal("fresh"), simulated()
    with tempfile.TemporaryDirectory() as directory:
        for changes in batches:
            journal = SqliteJournal(Path(directory) / "journal.db")
            assert await journal.open("fresh") == fold.memory() == in_simulation.open()
            records = list(numbered(changes, fold.next_sequence))
            await journal.commit(records)
            await in_simulation.commit(records)
            fold.commit(records)
            await journal.close()
        assert in_simulation.open() == fold.memory()
        journal = SqliteJournal(Path(directory) / "journal.db")
        assert await journal.open("another") == fold.memory() or not batches
        await journal.close()


@given(st.builds(m.AgentEvent, INT, INT, TEXT, BODIES))
def test_events_survive_their_json(event: m.AgentEvent) -> None:
    assert decode_event(encode_event(event)) == event


@given(RECORDS)
def test_what_an_older_agent_wrote_loads(record: AttemptRecord) -> None:
    """A field that came later has a default, and one that has gone is passed over."""
    document = json.loads(msgspec.json.encode(record))
    for field in ("stored_id", "stored_path", "stored_digest", "milestones", "gang"):
        del document[field]
    if document["pending"] is not None:
        document["pending"].pop("parts")
    document["of_yore"] = 1
    loaded = msgspec.json.decode(json.dumps(document), type=AttemptRecord)
    pending = record.pending and replace(record.pending, parts=1)
    assert (loaded.id, loaded.spec, loaded.pending) == (record.id, record.spec, pending)
    assert (loaded.stored_digest, loaded.gang) == ("", None)


async def test_fences_of_an_older_agent_hold_whole_epochs(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE fences (job_id INTEGER NOT NULL UNIQUE, epoch INTEGER)")
        connection.execute("INSERT INTO fences VALUES (7, 2)")
    journal = SqliteJournal(path)
    assert (await journal.open("j1")).fences == (s.PutFence(7, 2),)
    await journal.commit([s.PutFence(7, 3, (1,)), s.PutFence(8, 1), s.PutFence(7, 3, (1, 0))])
    await journal.close()
    journal = SqliteJournal(path)
    assert (await journal.open("j2")).fences == (s.PutFence(8, 1), s.PutFence(7, 3, (1, 0)))
    await journal.commit([s.DropFence(7)])
    await journal.close()


async def test_sequences_go_on_after_the_spool_is_empty(path: Path) -> None:
    journal = SqliteJournal(path)
    await journal.open("j1")
    await journal.commit([*batch(1), *batch(2), s.DropSpooled(2)])
    await journal.close()
    memory = await SqliteJournal(path).open("j2")
    assert (memory.journal_id, memory.spool, memory.next_sequence) == ("j1", (), 3)


@pytest.fixture
def other(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An agent that has the journal open until it is told to end."""
    lock = f"import fcntl; f = open('{path}.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    tell = "; f.write('4711'); f.flush(); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", lock + tell], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


async def test_a_second_agent_does_not_open_it(path: Path, other: subprocess.Popen[bytes]) -> None:
    second = SqliteJournal(path, lock_wait_s=0)
    with pytest.raises(JournalUnavailable, match="in use by another agent, pid 4711: stop"):
        await second.open("j1")
    await second.close()
    other.communicate(b"\n")
    await second.open("j1")
    await second.close()


async def test_nobody_else_can_read_it(path: Path) -> None:
    journal = SqliteJournal(path)
    await journal.open("j1")
    await journal.commit(batch(1))
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()}
    await journal.close()
    assert set(modes.values()) == {"0o600"}
    assert len(modes) == 4, "the file, its lock, its log and its index"


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_file_that_was_moved_away_is_waited_for(path: Path, suffix: str) -> None:
    """SQLite itself goes on writing to it, and no later agent would find what it wrote."""
    journal = SqliteJournal(path)
    await journal.open("j1")
    await journal.commit(batch(1))
    own, away = path.with_name(path.name + suffix), path.with_name("away")
    own.rename(away)
    for _ in range(2):
        with pytest.raises(JournalUnavailable, match=r"journal\.db.* put it back, or restart"):
            await journal.commit(batch(2))
    away.rename(own)
    await journal.commit(batch(2))
    await journal.close()
    memory = await SqliteJournal(path).open("j1")
    assert [record.job_id for record in memory.attempts] == [1, 2]


@pytest.fixture
def damaged(path: Path) -> Path:
    path.write_bytes(b"not a database, and long enough to be sure of that" * 20)
    return path


async def test_a_file_that_is_no_journal_is_named(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalUnavailable, match=r"journal\.db"):
        await SqliteJournal(damaged).open("j1")
    with pytest.raises(JournalUnavailable, match="missing"):
        await SqliteJournal(tmp_path / "missing" / "journal.db").open("j1")


async def test_what_a_later_version_has_to_tell_is_not_lost_by_an_older_one(path: Path) -> None:
    """It says what to do, and leaves the journal as it is."""
    before = SqliteJournal(path)
    await before.open("j1")
    await before.close()
    later = json.dumps([7, 5, "3.1", "levitated", {"height_mm": 3}])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO spool (sequence, document) VALUES (7, ?)", (later,))
        connection.commit()
    for _ in range(2):
        journal = SqliteJournal(path)
        with pytest.raises(JournalUnavailable, match=r"'levitated' of 3\.1 .* the later one"):
            await journal.open("j1")
        await journal.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT sequence FROM spool").fetchall() == [(7,)]


def write_and_die(path: Path, answers: int) -> int:
    """Killed right after so many answers, which is amid a later commit; returns the last answer."""
    command = [sys.executable, "-m", "tests.agent.journal_writer", str(path), "100000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(answers)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read().splitlines(keepends=True)
        child.wait(CHILD_DEADLINE_S)
    return max(int(line) for line in said if line.endswith("\n"))


@pytest.mark.parametrize("answers", range(1, 1 + 7 * KILLS, 7))
async def test_a_kill_loses_nothing_that_was_said(path: Path, answers: int) -> None:
    said = write_and_die(path, answers)
    memory = await SqliteJournal(path).open("j2")
    last = memory.next_sequence - 1
    assert last in (said, said + 1), "everything that was said, and at most one more"
    expected = list(range(1, last + 1))
    assert [record.job_id for record in memory.attempts] == expected
    assert [event.sequence for event in memory.spool] == expected
    assert [fence.job_id for fence in memory.fences] == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs privileges")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


async def test_a_full_disk_is_waited_out(small_disk: Path) -> None:
    """Nothing of the batch is kept, and once there is room the very same batch is."""
    journal = SqliteJournal(small_disk / "journal.db")
    await journal.open("j1")
    await journal.commit(batch(1))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4_096))
        except OSError:
            pass
    big = [record for number in range(2, 60) for record in batch(number)]
    for _ in range(2):
        with pytest.raises(JournalUnavailable, match="full"):
            await journal.commit(big)
    ballast.unlink()
    await journal.commit(big)
    await journal.close()
    memory = await SqliteJournal(small_disk / "journal.db").open("j1")
    assert [record.job_id for record in memory.attempts] == list(range(1, 60))
    assert memory.next_sequence == 60
