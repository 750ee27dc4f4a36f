"""How chunks get onto a disk: past the page cache or beside it, the bytes are the same.

Safety: whatever a file system allows, what is read back is what was kept.
"""

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

import pytest

from agent.chunks import disk
from agent.chunks.disk import DIRECT_BYTES
from agent.chunks.manifest import CHUNK_BYTES_MAX, decode
from agent.chunks.threads import Threads
from agent.chunks.tree import ingest_capture, lay_out
from agent.core.values import Origin
from agent.ports import CapturedFile, ChunkError
from tests.agent.chunk_worlds import check_whole, kept, objects, opened, written

DEADLINE_S = 60.0


def test_bytes_past_the_page_cache_and_beside_it_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends that fill no block, and file systems that know no other way."""
    sizes = (1, DIRECT_BYTES - 1, DIRECT_BYTES, 3 * DIRECT_BYTES + 7, CHUNK_BYTES_MAX + 5)
    files = {str(size): os.urandom(size) for size in sizes}
    source = written(tmp_path / "in", files)
    direct = kept(opened(tmp_path / "direct"), source)
    fcntl_ = fcntl.fcntl

    def refusing(descriptor: int, command: int, argument: int = 0) -> object:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such thing here")
        return fcntl_(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    cached = kept(opened(tmp_path / "cached"), source)
    assert direct == cached
    for name in ("direct", "cached"):
        store = opened(tmp_path / name)
        assert check_whole(store) == 1
        into = tmp_path / f"out-{name}"
        into.mkdir()
        assert lay_out(store, decode(store.read_manifest(direct.digest)), into) == {}
        assert {path.name: path.read_bytes() for path in into.iterdir()} == files


def test_a_chunk_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    twice = {"a": bytes(CHUNK_BYTES_MAX * 2), "b": bytes(CHUNK_BYTES_MAX)}
    assert kept(store, written(tmp_path / "in", twice)).new_bytes == CHUNK_BYTES_MAX
    assert len(objects(store)) == 1
    assert list((store.root / "temporary").iterdir()) == []


async def test_a_service_that_may_not_lower_priorities_drains_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "the service's filter")

    monkeypatch.setattr(os, "setpriority", refused)
    threads = Threads()
    threads.open()
    assert await threads.drain(lambda: "drained") == "drained"
    await threads.close()


@pytest.mark.parametrize("count", [2, 12])
def test_the_other_files_are_read_while_one_is_written(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stands still between two files has nothing to do that it could have done; and
    however many are here already, they are seen while the one that changes is written."""
    names = [f"{number:02}" for number in range(count)]
    all_read = threading.Event()
    read: list[int] = []

    class Capture:
        files = tuple(
            CapturedFile(name, number * DIRECT_BYTES, DIRECT_BYTES)
            for number, name in enumerate(names)
        )

        def __init__(self, step: int) -> None:
            self.step = step

        def read(self, offset_bytes: int, size_bytes: int) -> bytes:
            return bytes(size_bytes)

        def read_into(self, offset_bytes: int, target: memoryview) -> None:
            last = offset_bytes == (count - 1) * DIRECT_BYTES
            target[:2] = bytes([offset_bytes // DIRECT_BYTES, self.step if last else 0])
            read.append(offset_bytes // DIRECT_BYTES)
            if len(read) == count:
                all_read.set()

        def check(self) -> None:
            pass

    store = opened(tmp_path / "store")
    ingest_capture(store, Capture(1), Origin(1, 1, 1, ""))
    all_read.clear()
    read.clear()
    waited: list[bool] = []
    write = disk.Unnamed.write

    def held(file: disk.Unnamed, data: bytes | bytearray | memoryview) -> None:
        waited.append(all_read.wait(DEADLINE_S))
        write(file, data)

    monkeypatch.setattr(disk.Unnamed, "write", held)
    stored = ingest_capture(store, Capture(2), Origin(1, 1, 2, ""))
    assert read[0] == count - 1, "what changes least comes last"
    assert waited == [True, True], "of the one that has changed, and of the manifest"
    assert len(objects(store)) == count + 1
    assert [entry.path for entry in decode(store.read_manifest(stored.digest)).files] == names


def test_memory_in_small_pages_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without large pages says EINVAL."""
    source = written(tmp_path / "in", {"a": os.urandom(CHUNK_BYTES_MAX + 5)})
    large = kept(opened(tmp_path / "large"), source)
    refused: list[int] = []

    class Small(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            refused.append(option)
            raise OSError(errno.EINVAL, "no such thing here")

    monkeypatch.setattr(mmap, "mmap", Small)
    assert kept(opened(tmp_path / "small"), source) == large
    assert refused


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("taken_bytes", [0, DIRECT_BYTES])
def test_a_direct_write_that_is_refused_goes_on_through_the_cache(
    refusal: int, taken_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems take the flag and refuse the write, the first one or a later one."""
    direct: list[int] = []
    write = os.write

    def refusing(descriptor: int, data: memoryview) -> int:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            return write(descriptor, data)
        direct.append(len(data))
        if len(direct) > 1 or not taken_bytes:
            raise OSError(refusal, "no such thing here")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        done_bytes = write(descriptor, data[:taken_bytes])
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return done_bytes

    monkeypatch.setattr(os, "write", refusing)
    data = os.urandom(3 * DIRECT_BYTES + 7)
    file = disk.Unnamed(tmp_path / "temporary", tmp_path / "named", "writing")
    file.write(data)
    disk.name_all([file])
    assert (tmp_path / "named").read_bytes() == data
    assert direct == [3 * DIRECT_BYTES, 2 * DIRECT_BYTES][: 2 if taken_bytes else 1]


def test_a_direct_write_that_fails_otherwise_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a broken disk says is no reason to try the same bytes again."""

    def broken(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "write", broken)
    file = disk.Unnamed(tmp_path / "temporary", tmp_path / "named", "writing")
    with pytest.raises(ChunkError, match="broken"):
        file.write(bytes(DIRECT_BYTES))
    assert list(tmp_path.iterdir()) == []
