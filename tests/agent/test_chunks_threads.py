"""A system without threads: a crew is whole or none, and helpers are done without."""

import errno
import threading
from pathlib import Path

import pytest

from agent.chunks.manifest import decode
from agent.chunks.store import ChunkStore
from agent.chunks.threads import Helpers, crew
from agent.chunks.tree import ingest
from agent.core.values import Origin


class Threads:
    """So many more can be started, as of a user who has nearly all that he may have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        self._start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self._give(thread))

    def _give(self, thread: threading.Thread) -> None:
        if not self.left:
            raise RuntimeError("can't start new thread")
        self.left -= 1
        self._start(thread)


def test_a_crew_needs_no_thread_later(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(monkeypatch, 3)
    with crew(3, "crew") as executor:
        assert threads.left == 0
        done = [executor.submit(pow, 2, number) for number in range(50)]
        assert [future.result() for future in done] == [2**number for number in range(50)]


def test_a_crew_is_whole_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    Threads(monkeypatch, 2)
    with pytest.raises(OSError, match="no thread left for crew") as refused:
        crew(3, "crew")
    assert refused.value.errno == errno.EAGAIN
    for thread in threading.enumerate():
        if thread.name.startswith("crew"):
            thread.join()
    assert threading.active_count() == before


def fail() -> None:
    raise ValueError("as of a thread")


@pytest.mark.parametrize("left", [0, 1, 2])
def test_helpers_do_the_same_with_threads_and_without(
    monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    Threads(monkeypatch, left)
    with Helpers(2, "helpers") as helpers:
        assert helpers.submit(pow, 2, 5).result() == 32
        with pytest.raises(ValueError, match="as of a thread"):
            helpers.submit(fail).result()


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_checkpoint_is_kept_though_there_are_no_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: int
) -> None:
    store = ChunkStore(tmp_path / "store")
    store.open()
    staged = tmp_path / "staged"
    staged.mkdir()
    for number in range(20):
        (staged / str(number)).write_bytes(b"%d" % number * 1000)
    Threads(monkeypatch, left)
    stored = ingest(store, staged, Origin(1, 1, 7, "", None))
    assert len(decode(store.read_manifest(stored.digest)).files) == 20
