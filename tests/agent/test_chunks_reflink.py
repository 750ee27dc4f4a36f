"""What is laid out may share its bytes with the store, and writing to it alters nothing else."""

import os
from pathlib import Path

import pytest

from agent.chunks import reflink, tree
from agent.chunks.manifest import CHUNK_BYTES_MAX, decode
from agent.chunks.tree import lay_out
from tests.agent.chunk_worlds import kept, opened, written

TAIL = b"no whole block"


def test_a_trainer_that_writes_into_its_directory_alters_nobody_elses(tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK_BYTES_MAX) + TAIL
    store = opened(tmp_path / "store")
    stored = kept(store, written(tmp_path / "in", {"model": content}))
    manifest = decode(store.read_manifest(stored.digest))
    for rank in range(2):
        assert lay_out(store, manifest, tmp_path / f"rank-{rank}") == {}
    with open(tmp_path / "rank-0" / "model", "r+b") as handle:
        for place in (0, CHUNK_BYTES_MAX - 3, len(content) - 4):
            handle.seek(place)
            handle.write(b"other!")
    assert (tmp_path / "rank-1" / "model").read_bytes() == content
    assert lay_out(store, manifest, tmp_path / "rank-2") == {}, "the store verifies"
    assert (tmp_path / "rank-2" / "model").read_bytes() == content


@pytest.mark.parametrize("refused", [(), (0,), (1,), (2,), (0, 2)])
def test_what_is_shared_is_not_written_and_the_rest_is(
    refused: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file system that shares some of the chunks: what it has shared stands in capitals."""
    content = b"a" * CHUNK_BYTES_MAX + b"b" * CHUNK_BYTES_MAX + b"c" * 10
    store = opened(tmp_path / "store")
    stored = kept(store, written(tmp_path / "in", {"model": content}))
    asked = []

    def clone(source: Path, size_bytes: int, target: int, offset_bytes: int) -> bool:
        number = offset_bytes // CHUNK_BYTES_MAX
        asked.append((number, size_bytes))
        if number in refused:
            return False
        os.pwrite(target, source.read_bytes()[:size_bytes].upper(), offset_bytes)
        return True

    monkeypatch.setattr(tree, "clone", clone)
    manifest = decode(store.read_manifest(stored.digest))
    assert lay_out(store, manifest, tmp_path / "out") == {}
    found = (tmp_path / "out" / "model").read_bytes()
    assert found.lower() == content
    assert asked == [(0, CHUNK_BYTES_MAX), (1, CHUNK_BYTES_MAX), (2, 10)]
    written_chunks = [
        n for n in range(3) if found[n * CHUNK_BYTES_MAX : n * CHUNK_BYTES_MAX + 1].islower()
    ]
    assert tuple(written_chunks) == refused


def test_what_cannot_be_shared_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"s" * 8192)
    (tmp_path / "target").write_bytes(b"t" * 100)
    with open(tmp_path / "target", "r+b") as handle:
        assert not reflink.clone(tmp_path / "absent", 8192, handle.fileno(), 0)
        assert not reflink.clone(tmp_path / "source", 8192, handle.fileno(), 1), "not aligned"
    assert (tmp_path / "target").read_bytes() == b"t" * 100


def test_shared_bytes_are_where_they_belong(tmp_path: Path) -> None:
    """On a file system that can: `pytest --basetemp` on XFS or Btrfs."""
    content = os.urandom(8192) + TAIL
    (tmp_path / "source").write_bytes(content)
    with open(tmp_path / "target", "xb") as handle:
        handle.write(b"t" * 100)
        handle.flush()
        if not reflink.clone(tmp_path / "source", len(content), handle.fileno(), 4096):
            pytest.skip("this file system shares no blocks between files")
    assert (tmp_path / "target").read_bytes() == (b"t" * 100).ljust(4096, b"\0") + content
