"""How chunks get onto a disk: past the page cache or beside it, the bytes are the same.

Safety: whatever a file system allows, what is read back is what was kept.
"""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from agent.chunks.disk import DIRECT_BYTES
from agent.chunks.manifest import CHUNK_BYTES_MAX, decode
from agent.chunks.threads import Threads
from agent.chunks.tree import lay_out
from tests.agent.chunk_worlds import check_whole, kept, objects, opened, written


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
