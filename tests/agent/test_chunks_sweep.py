"""Sweeping the chunk store while others write to it.

Safety: a sweep never takes a checkpoint that is kept, being published, or perhaps the newest of its
job, nor a chunk that one of those names or a write in progress relies on. Liveness: what a newer
kept checkpoint supersedes is gone after the next sweep, everything else that nobody wants after its
time, and unnamed chunks after a disk ran full.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.chunks import store as store_module
from agent.chunks.manifest import (
    Altered,
    ChunkRef,
    FileEntry,
    Manifest,
    digest_of,
    encode,
)
from agent.chunks.sweep import CHUNK_GRACE_S, ORPHAN_S, UNLISTED_S, Unlisted
from agent.core.values import StoredCheckpoint
from agent.ports import ChunkError
from tests.agent.chunk_worlds import (
    LONG_AGO_S,
    age,
    check_whole,
    kept,
    manifest_path,
    objects,
    opened,
    set_age,
    written,
)


def move_clock(monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    """For the store only; what is on the disk keeps its time stamps."""
    now_s = time.time() + ahead_s
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: now_s))


def test_a_superseded_checkpoint_goes_at_once_and_what_it_shares_stays(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    old = kept(store, written(tmp_path / "in", {"backbone": b"b" * 1000, "head": b"old"}))
    new = kept(store, written(tmp_path / "in", {"head": b"newer"}), step=2, parent=old.digest)
    manifest_bytes = len(store.read_manifest(old.digest))
    assert store.collect(frozenset([new.digest])) == manifest_bytes, "its chunk is too young to go"
    assert store.checkpoints() == (new.digest,)
    store = opened(tmp_path / "store", grace_s=0, orphan_s=0)
    assert store.collect(frozenset([new.digest])) == 3
    assert check_whole(store) == 1
    assert store.collect(frozenset()) > 1000
    assert objects(store) == []


def test_many_checkpoints_leave_only_the_kept_ones(tmp_path: Path) -> None:
    """As a trainer that writes one every few seconds, swept at each commit."""
    store = opened(tmp_path / "store", grace_s=0)
    last = ""
    for step in range(10):
        source = written(tmp_path / "in", {"head": f"step {step}".encode()})
        new = kept(store, source, step=step, parent=last).digest
        store.collect(frozenset([new, last]))
        assert set(store.checkpoints()) == {new, last} - {""}
        last = new
    assert len(objects(store)) == 2
    assert check_whole(store) == 2


@pytest.mark.parametrize("waited_s", [0.0, ORPHAN_S - 60])
def test_a_replica_that_waits_for_the_coordinators_return_stays(
    tmp_path: Path, waited_s: float
) -> None:
    """Its writer is cut off too, and the coordinator lists what it knows: an older one."""
    store = opened(tmp_path / "store")
    known = kept(store, written(tmp_path / "in", {"a": b"known"}))
    newest = kept(store, written(tmp_path / "in", {"a": b"newest"}), step=2)
    elsewhere = kept(store, written(tmp_path / "in", {"a": b"first"}), job_id=2)
    age(store)
    for digest in (newest.digest, elsewhere.digest):
        set_age(manifest_path(store, digest), waited_s)
    assert store.collect(frozenset([known.digest])) == 0
    assert check_whole(store) == 3


def test_a_checkpoint_that_nobody_lists_goes_after_its_time(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    listed = kept(store, written(tmp_path / "in", {"a": b"listed"}))
    refused = kept(store, written(tmp_path / "in", {"a": b"refused"}), step=2)
    ended = kept(store, written(tmp_path / "in", {"a": b"ended"}), job_id=2)
    age(store)
    for digest in (listed.digest, refused.digest, ended.digest):
        set_age(manifest_path(store, digest), ORPHAN_S + 60)
    assert store.collect(frozenset([listed.digest])) > len(b"refused" + b"ended")
    assert store.checkpoints() == (listed.digest,)
    assert len(objects(store)) == 1


def test_a_clock_that_jumps_ahead_makes_no_checkpoint_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only other copy of a job whose coordinator is away; and it goes in the end."""
    store = opened(tmp_path / "store", unlisted_s=UNLISTED_S)
    kept(store, written(tmp_path / "in", {"a": b"newest"}))
    move_clock(monkeypatch, 10 * ORPHAN_S)
    assert [store.collect(frozenset()) for _ in range(3)] == [0, 0, 0]
    assert len(store.checkpoints()) == 1
    assert opened(tmp_path / "store").collect(frozenset()) > 0


def test_who_is_not_listed_waits_from_the_first_look_on_and_anew_after_a_last_one() -> None:
    now_s = 0.0
    unlisted = Unlisted(10.0, lambda: now_s)
    assert unlisted.waited(["a", "b"]) == frozenset()
    now_s = 9.0
    assert unlisted.waited(["a"]) == frozenset()
    now_s = 10.0
    assert unlisted.waited(["a", "b"]) == {"a"}, "the other one was listed meanwhile"
    now_s = 20.0
    assert unlisted.waited(["a", "b"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("job_id", "epoch", "step", "goes"),
    [
        (1, 3, 9, True),
        (1, 2, 99, True),
        (1, 3, 11, False),
        (1, 4, 1, False),
        (2, 1, 1, False),
    ],
)
def test_superseded_is_what_lies_before_a_kept_one_of_the_same_job(
    tmp_path: Path, job_id: int, epoch: int, step: int, goes: bool
) -> None:
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"data"})
    other = kept(store, source, step, job_id=job_id, epoch=epoch)
    older = kept(store, source, 1, epoch=1)
    listed = kept(store, source, 10, epoch=3)
    store.collect(frozenset([older.digest, listed.digest]))
    assert (other.digest not in store.checkpoints()) == goes


@pytest.mark.parametrize(
    ("rank", "epoch", "step", "goes"),
    [
        (1, 3, 9, True),
        (1, 3, 11, False),
        (0, 3, 9, False),
        (None, 3, 9, False),
        (0, 2, 99, True),
    ],
)
def test_a_rank_has_a_history_of_its_own(
    tmp_path: Path, rank: int | None, epoch: int, step: int, goes: bool
) -> None:
    """A replica of what one rank wrote, and its node has not proposed yet, beside one that another
    rank's has. Of an epoch that is over nothing is proposed any more."""
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"data"})
    other = kept(store, source, step, epoch=epoch, rank=rank)
    listed = kept(store, source, 10, epoch=3, rank=1)
    store.collect(frozenset([listed.digest]))
    assert (other.digest not in store.checkpoints()) == goes


def test_of_two_at_one_step_the_later_one_supersedes(tmp_path: Path) -> None:
    """A trainer that is told to stop right after a regular checkpoint writes a last one, at the
    same step. Its replica waits for its commit while the earlier one is on the list."""
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"data"})
    regular = kept(store, source, step=5)
    last = kept(store, source, step=5, parent=regular.digest)
    set_age(manifest_path(store, regular.digest), 20)
    set_age(manifest_path(store, last.digest), 10)
    assert store.collect(frozenset([regular.digest])) == 0
    assert check_whole(store) == 2
    assert store.collect(frozenset([last.digest])) > 0
    assert store.checkpoints() == (last.digest,)


def test_a_listed_checkpoint_that_is_not_here_supersedes_nothing(tmp_path: Path) -> None:
    there = opened(tmp_path / "there")
    here = opened(tmp_path / "here")
    source = written(tmp_path / "in", {"a": b"data"})
    newer = kept(there, source, step=2)
    only = kept(here, source, step=1)
    age(here)
    set_age(manifest_path(here, only.digest), 3600)
    assert here.collect(frozenset([newer.digest])) == 0
    assert check_whole(here) == 1


_held = st.lists(
    st.tuples(
        st.integers(1, 2),  # job
        st.integers(1, 2),  # epoch
        st.integers(1, 3),  # step
        st.booleans(),  # on the list of what to keep
        st.sampled_from([60.0, ORPHAN_S - 60, ORPHAN_S + 60]),  # age
    ),
    max_size=8,
    unique_by=lambda item: item[:3],
)


def test_what_stays_is_what_is_listed_or_young_and_newest(tmp_path: Path) -> None:
    store = opened(tmp_path / "store", grace_s=0)

    @settings(max_examples=20)
    @given(held=_held)
    def check(held: list[tuple[int, int, int, bool, float]]) -> None:
        # One store for all examples: making another is slower than an example.
        for path in [*objects(store), *(store.root / "manifests").iterdir()]:
            path.unlink()
        keep, stays = set(), set()
        for job, epoch, step, listed, age_s in held:
            source = written(tmp_path / "in", {"a": f"{job} {epoch} {step}".encode()})
            digest = kept(store, source, step, job_id=job, epoch=epoch).digest
            set_age(manifest_path(store, digest), age_s)
            newer = any(
                other[3] and other[0] == job and other[1:3] > (epoch, step) for other in held
            )
            if listed:
                keep.add(digest)
            if listed or not (newer or age_s > ORPHAN_S):
                stays.add(digest)
        store.collect(frozenset(keep))
        assert set(store.checkpoints()) == stays
        assert check_whole(store) == len(stays) == len(objects(store))

    check()


def test_a_write_that_was_given_up_pins_nothing_any_more(tmp_path: Path) -> None:
    """The thread of who was cancelled goes on with it for a while."""
    store = opened(tmp_path / "store", grace_s=0)
    digest = digest_of(b"data")
    with store.writing() as writing:
        writing.put_chunk(digest, b"data")
    writing.pin(digest)
    assert store.collect(frozenset()) == 4


def test_collect_leaves_a_write_in_progress_alone(tmp_path: Path) -> None:
    store = opened(tmp_path / "store", grace_s=0)
    digest = digest_of(b"data")
    with store.writing() as writing:
        writing.put_chunk(digest, b"data")
        assert store.collect(frozenset()) == 0
        assert store.give_back() == 0
    assert store.collect(frozenset()) == 4


def test_collect_leaves_what_was_published_while_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path / "store", grace_s=0, orphan_s=0)
    other = kept(store, written(tmp_path / "other", {"x": b"other"}))
    shared = written(tmp_path / "in", {"a": b"shared by both"})
    kept(store, shared)
    real = store.read_manifest

    def publish_meanwhile(digest: str) -> bytes:
        monkeypatch.setattr(store, "read_manifest", real)
        # The same chunk, named by a manifest that the sweep has not listed.
        kept(store, shared, step=2)
        return real(digest)

    monkeypatch.setattr(store, "read_manifest", publish_meanwhile)
    store.collect(frozenset([other.digest]))
    assert check_whole(store) == 2
    store.collect(frozenset([other.digest]))
    assert len(objects(store)) == 1, "the pins were given up in the end"


def test_collect_spares_what_a_peer_has_just_asked_about(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    digest = digest_of(b"data")
    with store.writing() as writing:
        writing.put_chunk(digest, b"data")
    age(store)
    assert store.missing([digest, "ab" * 32]) == ["ab" * 32]
    assert store.collect(frozenset()) == 0


def test_an_upload_may_take_longer_than_chunks_are_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a peer was told it may leave out is still here when its manifest arrives."""
    store = opened(tmp_path / "store")
    backbone, head = b"backbone", b"head"
    with store.writing() as writing:
        writing.put_chunk(digest_of(backbone), backbone)
    assert store.missing([digest_of(backbone), digest_of(head)]) == [digest_of(head)]
    chunks = tuple(ChunkRef(digest_of(data), len(data)) for data in (backbone, head))
    manifest = encode(Manifest(1, 1, 1, "", (FileEntry("model", 0o600, chunks),)))
    with store.writing() as writing:
        writing.put_chunk(digest_of(head), head)
        move_clock(monkeypatch, 2 * CHUNK_GRACE_S)
        assert store.collect(frozenset()) == 0
        writing.publish(digest_of(manifest), manifest)
    assert check_whole(store) == 1


def test_unnamed_chunks_go_after_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path / "store")
    with store.writing() as writing:
        writing.put_chunk(digest_of(b"data"), b"data")
    assert store.collect(frozenset()) == 0
    move_clock(monkeypatch, CHUNK_GRACE_S + 1)
    assert store.collect(frozenset()) == 4


def test_collect_spares_what_was_published_again(tmp_path: Path) -> None:
    """As a replica whose writer waits for the coordinator's return, and sends it once more."""
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"data"})
    waiting = kept(store, source)
    other = kept(store, source, step=2)
    age(store)
    assert kept(store, source) == StoredCheckpoint(waiting.digest, 1, 4, 0)
    assert store.checkpoints() == (waiting.digest, other.digest)
    assert store.collect(frozenset()) > 0
    assert store.checkpoints() == (waiting.digest,)
    assert check_whole(store) == 1


def test_collect_leaves_a_manifest_that_is_being_published_again(tmp_path: Path) -> None:
    """Whether it is too old to stay, or superseded."""
    store = opened(tmp_path / "store", grace_s=0, orphan_s=0)
    source = written(tmp_path / "in", {"a": b"data"})
    stored = kept(store, source)
    newer = kept(store, source, step=2)
    with store.writing() as writing:
        writing.publish(stored.digest, store.read_manifest(stored.digest))
        assert store.collect(frozenset([newer.digest])) == 0
        assert check_whole(store) == 2
        assert store.collect(frozenset()) > 0
        assert store.checkpoints() == (stored.digest,)
        assert check_whole(store) == 1
    assert store.collect(frozenset()) > 4
    assert check_whole(store) == 0


def test_giving_back_never_takes_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not one that was published after it listed them."""
    store = opened(tmp_path / "store")
    source = written(tmp_path / "in", {"a": b"data"})
    kept(store, source)
    real = store._list_manifests

    def publish_after() -> list[tuple[str, int]]:
        listed = real()
        monkeypatch.setattr(store, "_list_manifests", real)
        kept(store, source, step=2)
        return listed

    monkeypatch.setattr(store, "_list_manifests", publish_after)
    assert store.give_back() == 0
    assert check_whole(store) == 2


def test_giving_back_takes_what_was_written_before_the_clock_was_set_back(tmp_path: Path) -> None:
    """Or a disk that is full then stays full for as long as it was ahead."""
    store = opened(tmp_path / "store")
    digest = digest_of(b"data")
    with store.writing() as writing:
        writing.put_chunk(digest, b"data")
    a_day_ahead_s = time.time() + 86_400
    os.utime(store.chunk_path(digest), (a_day_ahead_s, a_day_ahead_s))
    assert store.give_back() == 4


def test_collect_removes_no_chunk_while_a_kept_manifest_cannot_be_read(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    stored = kept(store, written(tmp_path / "in", {"a": b"data"}))
    age(store)
    path = manifest_path(store, stored.digest)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(Altered):
        store.read_manifest(stored.digest)
    assert store.collect(frozenset([stored.digest])) == 0
    path.write_bytes(whole)
    assert check_whole(store) == 1


def test_a_rotted_manifest_that_nobody_lists_stays_its_time_and_protects_nothing(
    tmp_path: Path,
) -> None:
    """It would keep every chunk of the node from being swept for days."""
    store = opened(tmp_path / "store")
    rotted = kept(store, written(tmp_path / "in", {"a": b"rotted"}))
    listed = kept(store, written(tmp_path / "in", {"a": b"listed"}), step=2)
    age(store)
    path = manifest_path(store, rotted.digest)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.collect(frozenset([listed.digest])) == len(b"rotted")
    assert set(store.checkpoints()) == {rotted.digest, listed.digest}
    os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    assert store.collect(frozenset([listed.digest])) > 0
    assert store.checkpoints() == (listed.digest,)
    assert check_whole(store) == 1


def test_a_manifest_that_cannot_be_read_for_the_moment_protects_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path / "store")
    waiting = kept(store, written(tmp_path / "in", {"a": b"waiting"}))
    age(store)
    set_age(manifest_path(store, waiting.digest), 3600)

    def lacking(digest: str) -> bytes:
        raise ChunkError("out of files")

    with monkeypatch.context() as patch:
        patch.setattr(store, "read_manifest", lacking)
        assert store.collect(frozenset()) == 0
    assert check_whole(store) == 1
