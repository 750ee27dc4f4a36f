"""The chunk store on its own disk: what goes in comes out, once, and survives dying anywhere on the
way.

Safety: every manifest that a store shows has all its chunks, intact, whichever system call fails or
is the last one before a kill; a sweep never takes what a kept or coming manifest names. The kill is
real: a process of its own leaves through `os._exit` at the n-th `fsync` or `rename`.
"""

import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.chunks import store as store_module
from agent.chunks import tree
from agent.chunks.disk import RESERVED_FREE_BYTES
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    DEFINITE,
    Absent,
    Altered,
    ChunkRef,
    DiskFull,
    FileEntry,
    Incomplete,
    Invalid,
    Manifest,
    decode,
    digest_of,
    encode,
)
from agent.chunks.store import ChunkStore
from agent.chunks.tree import lay_out
from agent.ports import ChunkError
from tests.agent.chunk_worlds import (
    LONG_AGO_S,
    check_whole,
    kept,
    objects,
    opened,
    written,
)

_names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..") and len(name.encode()) <= 255)


_paths = st.lists(_names, min_size=1, max_size=3).map("/".join)


_contents = st.binary(max_size=2000) | st.tuples(
    st.binary(min_size=1, max_size=8), st.integers(-2, 2)
).map(lambda item: (item[0] * CHUNK_BYTES_MAX)[: CHUNK_BYTES_MAX + item[1]])


_modes = st.integers(0, 0o777).map(lambda mode: mode | 0o400)


_trees = st.dictionaries(_paths, st.tuples(_contents, _modes), min_size=1, max_size=5).filter(
    lambda files: not any(a != b and b.startswith(f"{a}/") for a in files for b in files)
)


@settings(max_examples=25)
@given(files=_trees)
def test_a_tree_comes_back_as_it_was(files: dict[str, tuple[bytes, int]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        source = written(Path(base, "in"), {path: data for path, (data, _) in files.items()})
        for path, (_, mode) in files.items():
            (source / path).chmod(mode)
        store = opened(Path(base, "store"))
        stored = kept(store, source)
        assert stored.size_bytes == sum(len(data) for data, _ in files.values())
        manifest = decode(store.read_manifest(stored.digest))
        assert lay_out(store, manifest, Path(base, "out")) == {}
        found = {
            str(path.relative_to(Path(base, "out"))): (
                path.read_bytes(),
                path.stat().st_mode & 0o777,
            )
            for path in Path(base, "out").rglob("*")
            if path.is_file()
        }
        assert found == files


def test_only_changed_chunks_are_written(tmp_path: Path) -> None:
    backbone = bytearray(os.urandom(3 * CHUNK_BYTES_MAX + 5))
    source = written(tmp_path / "in", {"backbone": bytes(backbone), "head": b"one"})
    store = opened(tmp_path / "store")
    first = kept(store, source)
    assert first.new_bytes == first.size_bytes == len(backbone) + 3
    inodes = {path.name: path.stat().st_ino for path in objects(store)}

    backbone[CHUNK_BYTES_MAX] ^= 1
    written(source, {"backbone": bytes(backbone)})
    second = kept(store, source, step=2, parent=first.digest)
    assert second.new_bytes == CHUNK_BYTES_MAX
    assert {
        path.name: path.stat().st_ino for path in objects(store) if path.name in inodes
    } == inodes
    assert len(objects(store)) == len(inodes) + 1
    assert kept(store, source, step=2, parent=first.digest).new_bytes == 0


def test_many_files_need_no_more_memory_than_one(tmp_path: Path) -> None:
    """Each end of a file gives back the buffer that nothing was read into."""
    files = {f"part-{number:03}": b"x" * number for number in range(100)}
    store = opened(tmp_path / "store")
    stored = kept(store, written(tmp_path / "in", files))
    assert stored.size_bytes == sum(map(len, files.values()))


def test_a_truncated_chunk_is_written_again(tmp_path: Path) -> None:
    source = written(tmp_path / "in", {"a": b"0123456789"})
    store = opened(tmp_path / "store")
    kept(store, source)
    objects(store)[0].write_bytes(b"0123")
    assert kept(store, source, step=2).new_bytes == 10
    assert check_whole(store) == 2


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _directory_link(path: Path) -> None:
    path.symlink_to("/etc", target_is_directory=True)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_link, "a symbolic link"),
        (_directory_link, "a symbolic link"),
        (os.mkfifo, "a named pipe"),
        (_socket, "a socket"),
    ],
)
def test_what_is_no_plain_file_is_refused(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    source = written(tmp_path / "in", {"ok": b"1", "sub/ok": b"2"})
    make(source / "sub" / "odd")
    store = opened(tmp_path / "store")
    with pytest.raises(Invalid, match=f"sub/odd is {kind}"):
        kept(store, source)
    assert objects(store) == []


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "FILES_MAX", 3)
    source = written(tmp_path / "in", dict.fromkeys("abcd", b""))
    with pytest.raises(Invalid, match="more than 3 files"):
        kept(opened(tmp_path / "store"), source)


def test_an_empty_a_missing_and_a_linked_directory_are_refused(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(Invalid, match="holds no file"):
        kept(store, tmp_path / "empty")
    with pytest.raises(ChunkError, match="No such file"):
        kept(store, tmp_path / "missing")
    with pytest.raises(Invalid, match="not a directory"):
        kept(store, tmp_path / "link")


def test_digests_never_become_other_paths(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    for digest in ("../../../../etc/passwd", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"):
        with pytest.raises(Invalid):
            store.read_chunk(digest)
        with pytest.raises(Invalid):
            store.read_manifest(digest)
        with pytest.raises(Invalid):
            store.missing([digest])


def test_a_manifest_without_its_chunks_is_not_published(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    entry = FileEntry("x", 0o600, (ChunkRef("ab" * 32, 5),))
    data = encode(Manifest(job_id=1, epoch=2, step=3, parent="", files=(entry,)))
    with store.writing() as writing, pytest.raises(Incomplete, match="abababab"):
        writing.publish(digest_of(data), data)
    assert store.checkpoints() == ()


def test_a_disk_that_does_not_show_its_chunks_is_no_crash(tmp_path: Path) -> None:
    """A peer would be told of a bug of this node's."""
    store = opened(tmp_path / "store")
    entry = FileEntry("x", 0o600, (ChunkRef("ab" * 32, 5),))
    data = encode(Manifest(job_id=1, epoch=2, step=3, parent="", files=(entry,)))
    (tmp_path / "store" / "objects" / "ab").rmdir()
    (tmp_path / "store" / "objects" / "ab").touch()
    with store.writing() as writing, pytest.raises(ChunkError, match="Not a directory"):
        writing.publish(digest_of(data), data)


def test_checkpoints_are_listed_newest_first_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"x"})
    digests = []
    for step in range(4):
        digests.append(kept(store, source, step=step).digest)
        os.utime(store.root / "manifests" / f"{digests[-1]}.json", (step, step))
    assert store.checkpoints() == tuple(reversed(digests))
    monkeypatch.setattr(store_module, "CHECKPOINTS_MAX", 2)
    assert store.checkpoints() == tuple(reversed(digests[2:]))


class _Calls:
    """Counts `os.fsync` and `os.rename`, and does `at_last` instead of the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int | None = None) -> None:
        self.names: list[str] = []
        self.hasty: list[str] = []
        """What got its name before its bytes were durable."""
        self._durable: set[int] = set()
        self._lock = threading.Lock()
        self._last = last
        for name in ("fsync", "rename"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            with self._lock:
                self.names.append(self._describe(name, arguments))
                last = len(self.names) == self._last
            if last:
                raise OSError(errno.EIO, "injected")
            if name == "rename":
                inode = os.stat(str(arguments[0])).st_ino
                self.hasty += [str(arguments[1])] if inode not in self._durable else []
            real(*arguments)
            if name == "fsync":
                self._durable.add(os.fstat(int(str(arguments[0]))).st_ino)

        return call

    def _describe(self, name: str, arguments: tuple[object, ...]) -> str:
        if name == "rename":
            return f"rename to {Path(str(arguments[1])).parent.name}"
        path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        return f"sync directory {path.name}" if path.is_dir() else "sync file"


_FILES = {name: name.encode() * 10 for name in ("a", "b", "sub/c", "sub/d")}


@pytest.mark.parametrize("unnamed_max", [1, 3, 64])
def test_bytes_are_durable_before_names_and_chunks_before_manifests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed_max: int
) -> None:
    """However many are synced together."""
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", _FILES)
    monkeypatch.setattr(store_module, "UNNAMED_MAX", unnamed_max)
    with monkeypatch.context() as patch:
        calls = _Calls(patch)
        kept(store, source)
    prefixes = sorted({path.parent.name for path in objects(store)})
    chunks, rest = calls.names[: 2 * len(_FILES)], calls.names[2 * len(_FILES) :]
    assert chunks.count("sync file") == len(_FILES)
    assert sum(call.startswith("rename to") for call in chunks) == len(_FILES)
    if unnamed_max > len(_FILES):
        assert chunks[: len(_FILES)] == ["sync file"] * len(_FILES), "one after the other"
    assert calls.hasty == []
    # What the manifest relies on may be synced beside its bytes, but is before it has its name.
    beside = [f"sync directory {prefix}" for prefix in prefixes]
    assert sorted(rest[:-2]) == [*beside, "sync file"]
    assert rest[-2:] == ["rename to manifests", "sync directory manifests"]


def test_every_failing_call_leaves_a_whole_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "in", _FILES)
    for last in range(1, 100):
        store = opened(tmp_path / f"store-{last}")
        with monkeypatch.context() as patch:
            calls = _Calls(patch, last)
            try:
                kept(store, source)
            except ChunkError as error:
                assert "Input/output error" in str(error) or "injected" in str(error)  # noqa: PT017
        if len(calls.names) < last:
            break
        again = opened(store.root)
        check_whole(again)
        assert list((store.root / "temporary").iterdir()) == []
        kept(again, source)
        assert check_whole(again) == 1
    else:
        pytest.fail("never ran to the end")
    assert last > 10


_DIE = """
import os, sys, threading
from pathlib import Path
from agent.chunks.store import ChunkStore
from agent.chunks.tree import ingest
from agent.core.values import Origin
store = ChunkStore(Path(sys.argv[1]))
store.open()
left = int(sys.argv[3])
lock = threading.Lock()
def dying(real):
    def call(*arguments):
        global left
        with lock:
            left -= 1
            if left == 0:
                os._exit(9)
        real(*arguments)
    return call
os.fsync, os.rename = dying(os.fsync), dying(os.rename)
ingest(store, Path(sys.argv[2]), Origin(1, 1, 1, ""))
"""


def test_dying_at_any_call_leaves_a_whole_store(tmp_path: Path) -> None:
    source = written(tmp_path / "in", {"a": b"first", "b": b"second"})
    store = opened(tmp_path / "store")
    died = 0
    trash = 0
    for last in range(1, 100):
        command = [sys.executable, "-c", _DIE, str(store.root), str(source), str(last)]
        status = subprocess.run(command, check=False, timeout=60).returncode
        if status == 0:
            break
        assert status == 9
        died += 1
        trash += len(list((store.root / "temporary").iterdir()))
        again = opened(store.root)
        assert list((store.root / "temporary").iterdir()) == []
        check_whole(again)
        # Start over, so that each death happens at another call.
        shutil.rmtree(store.root)
        opened(store.root)
    assert check_whole(opened(store.root)) == 1
    assert died >= 9
    assert trash > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "small"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(target)]
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True, timeout=30)


def test_a_full_disk_says_so_and_is_left_clean(tmp_path: Path, small_disk: Path) -> None:
    store = opened(small_disk / "chunks")
    small = kept(store, written(tmp_path / "small-in", {"a": os.urandom(100_000)}))
    with pytest.raises(DiskFull, match=r"disk full: writing chunk .* kept in reserve"):
        kept(store, written(tmp_path / "in", {"a": os.urandom(10 << 20)}), step=2)
    assert list((store.root / "temporary").iterdir()) == []
    assert len(objects(store)) == 1
    assert store.checkpoints() == (small.digest,)
    kept(store, written(tmp_path / "in-2", {"a": os.urandom(4 << 20)}), step=3)
    assert check_whole(store) == 2


def test_a_full_disk_while_laying_out_says_so(tmp_path: Path, small_disk: Path) -> None:
    store = opened(tmp_path / "store")
    stored = kept(store, written(tmp_path / "in", {"a": os.urandom(10 << 20)}))
    manifest = decode(store.read_manifest(stored.digest))
    with pytest.raises(DiskFull, match="disk full: laying out a checkpoint of 10485760 bytes"):
        lay_out(store, manifest, small_disk / "out")
    assert list(small_disk.iterdir()) == [], "refused before the first byte"


def test_a_rotted_manifest_is_written_again(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"data"})
    stored = kept(store, source)
    path = store.root / "manifests" / f"{stored.digest}.json"
    path.write_bytes(path.read_bytes()[:-1])
    kept(store, source)
    assert check_whole(store) == 1


@pytest.mark.parametrize(
    ("total_bytes", "reserved_bytes"),
    [(1 << 40, RESERVED_FREE_BYTES), (RESERVED_FREE_BYTES, RESERVED_FREE_BYTES // 50)],
)
def test_the_reserve_for_the_agents_records_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total_bytes: int, reserved_bytes: int
) -> None:
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"x" * 100})
    free_bytes = reserved_bytes + 99

    def statvfs(path: object) -> SimpleNamespace:
        return SimpleNamespace(f_frsize=1, f_blocks=total_bytes, f_bavail=free_bytes)

    monkeypatch.setattr(os, "statvfs", statvfs)
    sentence = (
        f": {free_bytes} free bytes left, {reserved_bytes} kept in reserve "
        "for the agent's own records"
    )
    with pytest.raises(DiskFull, match=f"^disk full: writing chunk .*{sentence}$"):
        kept(store, source)
    assert objects(store) == []
    free_bytes = reserved_bytes + 1000
    kept(store, source)
    free_bytes = 0
    assert kept(store, source).new_bytes == 0, "nothing new needs no room"
    shared = ChunkStore(store.root, shared=True)
    with shared.writing() as writing:
        assert writing.put_chunk(digest_of(b"y"), b"y") == 1, "the agent's records are elsewhere"
    total_bytes = 0
    assert kept(store, source, step=2).new_bytes == 0, "a file system without a size is trusted"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_process_out_of_files_does_not_make_bytes_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = opened(tmp_path / "store")
    stored = kept(store, written(tmp_path / "in", {"a": b"data"}))

    def failing(number: int) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(store_module, "open", failing(number), raising=False)
    with pytest.raises(ChunkError, match="cannot be read now") as caught:
        store.read_manifest(stored.digest)
    assert not isinstance(caught.value, DEFINITE)
    monkeypatch.setattr(store_module, "open", failing(errno.EIO), raising=False)
    with pytest.raises(Altered):
        store.read_manifest(stored.digest)
    with pytest.raises(ChunkError) as caught:
        ChunkStore(store.root, shared=True).read_manifest(stored.digest)
    assert not isinstance(caught.value, DEFINITE), "over a network it may be the network's"


def test_opening_removes_temporary_files_and_a_shared_store_only_old_ones(tmp_path: Path) -> None:
    for shared in (False, True):
        root = tmp_path / f"shared-{shared}"
        root.mkdir()
        store = ChunkStore(root, shared=shared)
        store.open()
        (root / "temporary" / "young").write_bytes(b"x")
        (root / "temporary" / "old").write_bytes(b"x")
        os.utime(root / "temporary" / "old", (LONG_AGO_S, LONG_AGO_S))
        store.open()
        left = [path.name for path in (root / "temporary").iterdir()]
        assert left == (["young"] if shared else [])


def test_directories_are_private(tmp_path: Path) -> None:
    store = opened(tmp_path / "state" / "chunks")
    for directory in [store.root, *(path for path in store.root.rglob("*") if path.is_dir())]:
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_shared_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ChunkError, match="is it mounted"):
        ChunkStore(tmp_path / "absent", shared=True).open()
    assert not (tmp_path / "absent").exists()


def test_a_chunk_that_is_not_here_is_absent(tmp_path: Path) -> None:
    with pytest.raises(Absent, match=r"chunk abababab\.\.\. of model: missing"):
        opened(tmp_path / "store").read_chunk("ab" * 32, 5, of="model")
