"""A trainer's output: captured, rotated, read at any offset, followed to its end, and a full disk.

Problem: writer and reader are two processes without a lock. Real shims write here; what a reader
gets is compared, byte for byte, with what the trainer wrote.
"""

import _thread
import asyncio
import inspect
import itertools
import marshal
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from agent.core.values import Launch, ProcessExit
from agent.processes import logs, records, shim, shim_output, spawn
from agent.processes.supervisor import Supervisor
from tests.agent.waiting import DEADLINE_S, until

PATH = ("PATH", "/usr/local/bin:/usr/bin:/bin")
# What a shim may hold back when there is room again finds it, and the record of the end as well.
TINY_DISK_BYTES = 2 * shim_output.WAITING_BYTES_MAX
ROOM_BYTES = 512 * 1024


async def run_trainer(state: Path, script: str, *arguments: str) -> Path:
    """Runs a Python script as attempt 1.1 to its end; returns its directory."""
    exits: list[ProcessExit] = []
    supervisor = Supervisor(state)
    await supervisor.open(exits.append)
    await supervisor.start(Launch("1.1", ("python3", "-c", script, *arguments), (PATH,), "/"))
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 0, None)]
    await supervisor.close()
    return supervisor.attempt_directory("1.1")


@pytest.fixture
def steady_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk stands still for the shims of this test: one that is slow costs no output."""
    compiled, source = spawn._compiled, inspect.getsource(shim_output)
    patient = source.replace("STALL_S = 1.0", "STALL_S = 600.0")
    assert patient != source

    def compile_patient(module: ModuleType) -> bytes:
        if module is not shim_output:
            return compiled(module)
        return marshal.dumps(compile(patient, str(module.__file__), "exec"))

    monkeypatch.setattr(spawn, "_compiled", compile_patient)


def make_log(directory: Path, pieces: dict[int, bytes], *, finished: bool) -> Path:
    (directory / shim.LOG_DIRECTORY_NAME).mkdir(parents=True)
    for offset, data in pieces.items():
        (directory / shim.LOG_DIRECTORY_NAME / f"{offset:020d}.log").write_bytes(data)
    if finished:
        (directory / shim.EXIT_NAME).write_text("{}")
    return directory


async def test_both_streams_in_order(tmp_path: Path) -> None:
    script = (
        "import os\n"
        "for i in range(100):\n"
        "    os.write(1 + i % 2, b'%d\\n' % i)\n"
    )  # fmt: skip
    directory = await run_trainer(tmp_path, script)
    expected = b"".join(b"%d\n" % i for i in range(100))
    assert logs.read(directory, 0) == (expected, len(expected), True, 0)


@pytest.mark.usefixtures("steady_disk")
async def test_rotation_keeps_the_newest_and_counts_what_is_gone(tmp_path: Path) -> None:
    """Each line is its own offset, so any byte that is read back proves its place."""
    lines = 5_000_000  # 80 MB of 16 bytes each: more than what is kept
    script = (
        "import sys\n"
        "for block in range(0, 5_000_000, 50_000):\n"
        "    lines = ('%015d\\n' % (16 * i) for i in range(block, block + 50_000))\n"
        "    sys.stdout.write(''.join(lines))\n"
    )
    directory = await run_trainer(tmp_path, script)
    total_bytes = 16 * lines
    kept = records.segments(directory)
    assert len(kept) == shim_output.SEGMENTS_KEPT
    for (first, path), (following, _) in itertools.pairwise(kept):
        assert path.stat().st_size == shim_output.SEGMENT_BYTES == following - first
    oldest = kept[0][0]
    assert (
        oldest
        == total_bytes // shim_output.SEGMENT_BYTES * shim_output.SEGMENT_BYTES
        - 7 * shim_output.SEGMENT_BYTES
    )

    piece = logs.read(directory, 160, 32)
    assert piece.gone_bytes == oldest - 160
    assert piece.data == b"%015d\n%015d\n" % (oldest, oldest + 16)
    assert piece.next_offset == oldest + 32
    across = logs.read(directory, kept[1][0] - 16, 32)
    assert across.data == b"%015d\n%015d\n" % (kept[1][0] - 16, kept[1][0])
    end = logs.read(directory, total_bytes - 16)
    assert end == (b"%015d\n" % (total_bytes - 16), total_bytes, True, 0)


def test_reading_in_small_steps_gives_every_byte_once(tmp_path: Path) -> None:
    pieces = {100: b"abcdefghij", 110: b"klm", 113: b"", }  # fmt: skip
    directory = make_log(tmp_path / "1.1", pieces, finished=True)
    for step in range(1, 15):
        offset, data, gone = 0, b"", 0
        for _ in range(20):
            piece = logs.read(directory, offset, step)
            offset, data, gone = piece.next_offset, data + piece.data, gone + piece.gone_bytes
            if piece.ended:
                break
        assert (data, gone, offset) == (b"abcdefghijklm", 100, 113)


def test_nothing_yet_is_not_the_end(tmp_path: Path) -> None:
    running = make_log(tmp_path / "1.1", {0: b"abc"}, finished=False)
    assert logs.read(running, 3) == (b"", 3, False, 0)
    assert logs.read(running, 7) == (b"", 7, False, 0)
    empty = make_log(tmp_path / "1.2", {}, finished=False)
    assert logs.read(empty, 0) == (b"", 0, False, 0)
    with pytest.raises(FileNotFoundError, match=r"no log is kept for attempt 1\.3"):
        logs.read(tmp_path / "1.3", 0)
    with pytest.raises(ValueError, match="cannot read 0 bytes"):
        logs.read(running, 0, 0)


async def test_follow_ends_with_the_attempt(tmp_path: Path) -> None:
    """The sleep is the test's: what happens while the reader waits is decided here."""
    directory = make_log(tmp_path / "1.1", {0: b"one\n"}, finished=False)
    segment = directory / shim.LOG_DIRECTORY_NAME / f"{0:020d}.log"
    steps: Iterator[Callable[[], object]] = iter(
        [
            lambda: segment.write_bytes(b"one\ntwo\n"),
            lambda: None,
            lambda: (directory / shim.EXIT_NAME).write_text("{}"),
        ]
    )
    slept: list[float] = []

    async def sleep(duration_s: float) -> None:
        slept.append(duration_s)
        next(steps)()

    pieces = [piece async for piece in logs.follow(directory, sleep=sleep)]
    assert [piece.data for piece in pieces] == [b"one\n", b"two\n", b""]
    assert [piece.ended for piece in pieces] == [False, False, True]
    assert slept == [logs.FOLLOW_POLL_S] * 3


async def test_follow_a_running_trainer_across_agents(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "print('first', flush=True)\n"
        "sys.stdin = open(sys.argv[1])\n"
        "print('then ' + sys.stdin.read(), flush=True)\n"
    )

    os.mkfifo(tmp_path / "gate")
    exits: list[ProcessExit] = []
    first = Supervisor(tmp_path / "state")
    await first.open(exits.append)
    arguments = ("python3", "-c", script, str(tmp_path / "gate"))
    await first.start(Launch("1.1", arguments, (PATH,), "/"))
    pieces = logs.follow(first.attempt_directory("1.1"))
    data = (await anext(pieces)).data
    assert data == b"first\n"
    await first.close()
    second = Supervisor(tmp_path / "state")
    await second.open(exits.append)
    (tmp_path / "gate").write_text("done")
    async with asyncio.timeout(DEADLINE_S):
        async for piece in pieces:
            data += piece.data
    assert data == b"first\nthen done\n"
    await until(lambda: exits)
    await second.close()


async def test_follow_ends_when_the_log_makes_room_for_others(tmp_path: Path) -> None:
    directory = make_log(tmp_path / "1.1", {0: b"one\n"}, finished=False)

    async def sleep(_: float) -> None:
        directory.rename(tmp_path / "gone")

    pieces = [piece.data async for piece in logs.follow(directory, sleep=sleep)]
    assert pieces == [b"one\n"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system; skipped where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={TINY_DISK_BYTES}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "baton-test", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount program")
    if mounted.returncode != 0:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.usefixtures("steady_disk")
async def test_full_disk_loses_output_but_never_stops_the_trainer(
    tmp_path: Path, tiny_disk: Path
) -> None:
    """It writes far more than fits and than may wait, and gets through, so that some is lost; then
    there is room, and a marker."""
    lines = (shim_output.WAITING_BYTES_MAX + 4 * ROOM_BYTES) // 16
    script = (
        "import os, sys\n"
        "for i in range(int(sys.argv[3])):\n"
        "    os.write(1, b'%015d\\n' % i)\n"
        "open(sys.argv[1], 'w').close()\n"
        "open(sys.argv[2]).read()\n"
        "print('after', flush=True)\n"
    )

    full, gate = tmp_path / "full", tmp_path / "gate"
    os.mkfifo(gate)
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tiny_disk / "state")
    await supervisor.open(exits.append)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(TINY_DISK_BYTES - ROOM_BYTES))
    arguments = ("python3", "-c", script, str(full), str(gate), str(lines))
    await supervisor.start(Launch("1.1", arguments, (PATH,), "/"))
    await until(full.exists)  # the trainer got through although the disk is full
    ballast.unlink()
    gate.write_text("go")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 0, None)]
    directory = supervisor.attempt_directory("1.1")
    data = logs.read(directory, 0, 8 * 1024 * 1024).data
    head, _, tail = data.partition(b"\n[baton] ")
    marker, _, rest = tail.partition(b"\n")
    assert marker.endswith(b"could not be written")
    lost_bytes = int(marker.split()[0])
    written = b"".join(b"%015d\n" % i for i in range(lines)) + b"after\n"
    assert len(head) > ROOM_BYTES // 2
    assert lost_bytes > 0
    # what was still in the pipe when there was room again comes after the marker
    assert written == head + written[len(head) : len(head) + lost_bytes] + rest
    assert rest.endswith(b"after\n")
    await supervisor.close()


async def test_a_disk_that_stalls_costs_output_and_never_stops_the_trainer(tmp_path: Path) -> None:
    """It stands still: the first segment is a pipe that nobody reads, so that to open it waits."""
    script = (
        "import os, sys\n"
        "for i in range(6 * 1024 * 1024 // 4096):\n"
        "    os.write(1, b'%04095d\\n' % i)\n"
        "open(sys.argv[1], 'w').close()\n"
        "open(sys.argv[2]).read()\n"
    )
    through, gate, hook = tmp_path / "through", tmp_path / "gate", tmp_path / "hook"
    os.mkfifo(gate)
    # before the trainer writes anything, and in the place of the log's first segment
    hook.write_text(script)
    stalled = tmp_path / "state/attempts/1.1/log" / f"{0:020d}.log"
    launch = 'mkfifo "$4" && exec python3 "$1" "$2" "$3"'
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tmp_path / "state")
    await supervisor.open(exits.append)
    words = ("bash", "-c", launch, "bash", *map(str, (hook, through, gate, stalled)))
    await supervisor.start(Launch("1.1", words, (PATH,), "/"))
    await until(through.exists)
    supervisor.signal("1.1", "TERM")  # and it is still heard; nothing is lost by it
    reader = asyncio.create_task(asyncio.to_thread(stalled.read_bytes))  # the disk is back
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGTERM)]
    written = b"".join(b"%04095d\n" % i for i in range(6 * 1024 * 1024 // 4096))
    kept = re.split(rb"\n\[baton\] ([0-9]+) bytes of output were lost here.*\n", await reader)
    place, lost_bytes = 0, 0
    for piece, lost in zip(kept[::2], [*map(int, kept[1::2]), 0], strict=True):
        assert written[place : place + len(piece)] == piece
        place += len(piece) + lost
        lost_bytes += lost
    assert place == len(written), "each marker stands where output is missing, and says how much"
    assert 0 < lost_bytes < len(written) - shim_output.WAITING_BYTES_MAX // 2
    await supervisor.close()


class Disk(shim_output.OutputLog):
    """Keeps what is written in memory, a piece whenever it is let."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.kept = b""
        self.pieces = threading.Semaphore(0)

    def write(self, data: bytes) -> None:
        if data:
            assert self.pieces.acquire(timeout=DEADLINE_S)
        self.kept += data


def test_a_slow_disk_loses_nothing_and_sets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim_output, "WAITING_BYTES_MAX", 1_000)
    monkeypatch.setattr(shim_output, "STALL_S", DEADLINE_S)
    disk = Disk()
    writer = shim_output.Writer(disk, lambda: True)
    pieces = [b"%0300d" % number for number in range(20)]
    offered: list[bytes] = []

    def offer() -> None:
        for piece in pieces:
            writer.offer(piece)
            offered.append(piece)

    trainer = threading.Thread(target=offer)
    trainer.start()
    for number in range(1, len(pieces) + 1):
        disk.pieces.release()
        assert len(offered) <= number + 3, "it is ahead of the disk by what may wait"
    trainer.join(DEADLINE_S)
    writer.close()
    assert disk.kept == b"".join(pieces)
    assert disk.lost_bytes_total == 0


def test_of_a_disk_that_stands_still_one_wait_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim_output, "WAITING_BYTES_MAX", 1_000)
    monkeypatch.setattr(shim_output, "STALL_S", 0.001)
    disk = Disk()
    writer = shim_output.Writer(disk, lambda: True)
    for number in range(10):
        # the fourth finds no room and waits; who comes after it must not
        monkeypatch.setattr(shim_output, "STALL_S", 0.001 if number <= 3 else DEADLINE_S)
        writer.offer(b"%0300d" % number)
    for _ in range(10):
        disk.pieces.release()
    writer.close()
    assert disk.kept == b"".join(b"%0300d" % number for number in range(3))
    assert disk.lost_bytes_total == 7 * 300


def test_a_writer_without_a_thread_of_its_own_yet_writes_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    log = shim_output.OutputLog(bytes(tmp_path))
    directory = bytes(tmp_path)
    writer = shim_output.Writer(log, lambda: shim_output.try_record(directory, "record", "{}"))
    writer.offer(b"said")
    writer.close()
    assert log.offset == 4
    assert (tmp_path / "record").read_text() == "{}"


async def test_exit_record_waits_for_room_on_a_full_disk(tmp_path: Path, tiny_disk: Path) -> None:
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tiny_disk / "state")
    await supervisor.open(exits.append)
    script = (
        "import os, sys\n"
        "try:\n"
        "    file = open(sys.argv[1], 'wb', buffering=0)\n"
        "    while True: file.write(bytes(1 << 20))\n"
        "except OSError:\n"
        "    open(sys.argv[2], 'w').close()\n"
    )
    full = tmp_path / "full"
    arguments = ("python3", "-c", script, str(tiny_disk / "ballast"), str(full))
    trainer_pid = await supervisor.start(Launch("1.1", arguments, (PATH,), "/"))
    await until(full.exists)
    await until(lambda: not shim.stat_fields(trainer_pid))
    directory = supervisor.attempt_directory("1.1")
    await until((directory / (shim.EXIT_NAME + ".tmp")).exists)  # it tried
    assert records.read_exit(directory) is None
    assert exits == []
    (tiny_disk / "ballast").unlink()
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 0, None)]
    await supervisor.close()


@pytest.mark.parametrize("whole", [True, False])
def test_a_log_that_is_removed_while_it_is_written_goes_on(tmp_path: Path, whole: bool) -> None:
    """The directory, or what is in it; only what nobody can read any more is gone."""
    (tmp_path / shim.LOG_DIRECTORY_NAME).mkdir()
    log = shim_output.OutputLog(bytes(tmp_path / shim.LOG_DIRECTORY_NAME))
    log.write(b"before")
    for path in (tmp_path / shim.LOG_DIRECTORY_NAME).iterdir():
        path.unlink()
    if whole:
        (tmp_path / shim.LOG_DIRECTORY_NAME).rmdir()
    log.write(b"after")
    piece = logs.read(tmp_path, 0)
    assert (piece.data, piece.gone_bytes, log.lost_bytes_total) == (b"after", 6, 0)


def test_what_somebody_else_has_removed_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim_output, "SEGMENT_BYTES", 4)
    directory = tmp_path / shim.LOG_DIRECTORY_NAME
    directory.mkdir()
    log = shim_output.OutputLog(bytes(directory))
    log.write(b"0123" * shim_output.SEGMENTS_KEPT)
    for path in directory.iterdir():
        path.unlink()
    log.write(b"4567")
    assert (logs.read(tmp_path, 0).data, log.lost_bytes_total) == (b"4567", 0)


def test_a_full_disk_has_room_for_the_next_segment_when_the_oldest_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim_output, "SEGMENT_BYTES", 4)
    open_file = os.open

    def limited(path: bytes, flags: int, mode: int = 0o777) -> int:
        if len(list(tmp_path.iterdir())) >= shim_output.SEGMENTS_KEPT:
            raise OSError(28, "No space left on device")
        return open_file(path, flags, mode)

    log = shim_output.OutputLog(bytes(tmp_path))
    monkeypatch.setattr(os, "open", limited)
    log.write(b"0123" * (2 * shim_output.SEGMENTS_KEPT))
    assert log.lost_bytes_total == 0
    assert len(list(tmp_path.iterdir())) == shim_output.SEGMENTS_KEPT


def test_marker_that_found_half_its_room_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_bytes = 4
    log = shim_output.OutputLog(bytes(tmp_path))
    write = os.write

    def limited(fd: int, data: memoryview) -> int:
        nonlocal room_bytes
        if room_bytes == 0:
            raise OSError(28, "No space left on device")
        count = write(fd, data[:room_bytes])
        room_bytes -= count
        return count

    monkeypatch.setattr(os, "write", limited)
    log.write(b"abcdef")  # 2 lost
    room_bytes = 10
    log.write(b"ghi")  # 10 bytes of the marker, 3 more lost
    room_bytes = 10_000
    log.write(b"jkl")
    expected = b"abcd" + shim_output.LOST_MARKER % 2 + shim_output.LOST_MARKER % 3 + b"jkl"
    (segment,) = tmp_path.iterdir()
    assert segment.read_bytes() == expected
    assert (log.lost_bytes_total, log.offset) == (5, len(expected))
