"""Taking checkpoints in and replicating them over real loopback gRPC and to a shared directory.

Safety: nothing outside the staging root is taken in or removed, nothing that rotted is sent.
Liveness: only what the other side lacks travels, and storing, replicating and discarding once more
is as doing it once.
"""

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent.chunks import peers as peers_module
from agent.chunks import service as service_module
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    decode,
    digest_of,
)
from agent.chunks.peers import PeerClient
from agent.chunks.service import ChunkService
from agent.chunks.store import ChunkStore
from agent.chunks.threads import THREADS_MAX
from agent.core.values import Origin, ReplicaSource
from agent.ports import ChunkError, Chunks
from tests.agent.chunk_worlds import (
    FILES,
    NOBODY,
    WAYS,
    Node,
    candidate,
    files_under,
    flip,
    running,
    written,
)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each test runs over both ways of moving chunks."""
    return str(request.param)


def test_the_service_is_the_port(tmp_path: Path) -> None:
    port: Chunks = ChunkService(
        ChunkStore(tmp_path), PeerClient(None), staging_root=tmp_path / "staging"
    )
    assert callable(port.restore)


async def test_replicate_sends_only_what_the_peer_lacks(one: Node, two: Node) -> None:
    backbone = os.urandom(2 * CHUNK_BYTES_MAX + 9)
    first = await one.checkpoint({"backbone": backbone, "head": b"h1"}, 1)
    await one.chunks.replicate(first.digest, two.source)
    manifest_bytes = len(one.store.read_manifest(first.digest))
    assert one.client.received_bytes == [len(backbone) + 2 + manifest_bytes]

    second = await one.checkpoint({"backbone": backbone, "head": b"new"}, 2)
    await one.chunks.replicate(second.digest, two.source)
    manifest_bytes = len(one.store.read_manifest(second.digest))
    assert one.client.received_bytes[1:] == [3 + manifest_bytes]

    await one.chunks.replicate(second.digest, two.source)
    assert one.client.received_bytes[2:] == [manifest_bytes]
    assert set(await two.chunks.checkpoints()) == {first.digest, second.digest}
    restored = await two.chunks.restore([candidate(second)], str(two.root / "out"))
    assert restored.digest == second.digest
    assert files_under(restored.directory) == {"backbone": backbone, "head": b"new"}
    assert two.client.fetched == []


async def test_a_node_never_sends_a_chunk_that_rotted(one: Node, two: Node) -> None:
    stored = await one.checkpoint(FILES, 1)
    flip(one.chunk_path(FILES["backbone"]))
    with pytest.raises(ChunkError, match="do not match their digest"):
        await one.chunks.replicate(stored.digest, two.source)
    assert await two.chunks.checkpoints() == ()


async def test_a_chunk_of_wrong_size_at_the_peer_is_replaced(one: Node, two: Node) -> None:
    """The first try finds it out, the second sends it again."""
    stored = await one.checkpoint(FILES, 1)
    path = two.chunk_path(FILES["backbone"])
    path.write_bytes(b"short")
    await one.chunks.replicate(stored.digest, two.source)
    assert path.read_bytes() == FILES["backbone"]
    assert len(one.client.received_bytes) == 1


async def test_a_peer_that_is_gone_is_named(one: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = await one.checkpoint(FILES, 1)
    tries = []
    real = one.client.find_missing

    async def counted(peer: ReplicaSource, digests: Sequence[str]) -> list[str]:
        tries.append(peer)
        return await real(peer, digests)

    monkeypatch.setattr(one.client, "find_missing", counted)
    with pytest.raises(ChunkError, match=r"n9 \(127\.0\.0\.1:1\)"):
        await one.chunks.replicate(stored.digest, NOBODY)
    assert len(tries) == service_module.TRIES_MAX


async def test_a_checkpoint_that_is_not_here_cannot_be_replicated(one: Node, two: Node) -> None:
    with pytest.raises(ChunkError, match=r"manifest abababab\.\.\.: missing"):
        await one.chunks.replicate("ab" * 32, two.source)


async def test_a_shared_directory_is_a_replica(tmp_path: Path, one: Node, two: Node) -> None:
    (tmp_path / "shared").mkdir()
    shared = ReplicaSource("shared", str(tmp_path / "shared"))
    first = await one.checkpoint(FILES, 1)
    await one.chunks.replicate(first.digest, shared)
    kept = {path: path.stat().st_ino for path in (tmp_path / "shared").rglob("*") if path.is_file()}
    assert len(kept) == 3
    second = await one.checkpoint(FILES | {"sub/head": b"new"}, 2)
    await one.chunks.replicate(second.digest, shared)
    for path, inode in kept.items():
        assert path.stat().st_ino == inode, "what was there is not written again"

    restored = await two.chunks.restore([candidate(second, shared)], str(two.root / "out"))
    assert files_under(restored.directory) == FILES | {"sub/head": b"new"}
    flip(tmp_path / "shared" / "manifests" / f"{second.digest}.json")
    two.manifest_path(second.digest).unlink()
    again = await two.chunks.restore(
        [candidate(second, shared), candidate(first, shared)], str(two.root / "out")
    )
    assert again.digest == first.digest
    assert files_under(again.directory) == FILES


async def test_an_absent_or_odd_shared_directory_is_named(tmp_path: Path, one: Node) -> None:
    stored = await one.checkpoint(FILES, 1)
    with pytest.raises(ChunkError, match="is it mounted"):
        await one.chunks.replicate(stored.digest, ReplicaSource("shared", str(tmp_path / "no")))
    with pytest.raises(ChunkError, match="not an absolute path"):
        await one.chunks.replicate(stored.digest, ReplicaSource("shared", "relative"))


@pytest.mark.parametrize("path", ["{root}/other", "{root}/staging", "{root}/staging/../other", "/"])
async def test_only_directories_below_staging_are_taken_in(one: Node, path: str) -> None:
    (one.root / "other").mkdir()
    (one.root / "other" / "precious").write_bytes(b"x")
    with pytest.raises(ChunkError, match="lies outside"):
        await one.chunks.store(path.format(root=one.root), Origin(1, 1, 1, ""))
    assert (one.root / "other" / "precious").exists()


async def test_storing_a_directory_again_writes_nothing_new(one: Node) -> None:
    directory = written(one.root / "staging" / "ckpt", {"file": b"x"})
    first = await one.chunks.store(str(directory), Origin(1, 1, 1, ""))
    before = {path: path.stat().st_ino for path in one.store.root.rglob("*") if path.is_file()}
    again = await one.chunks.store(str(directory), Origin(1, 1, 1, ""))
    assert (again.digest, again.size_bytes, again.new_bytes) == (first.digest, 1, 0)
    after = {path: path.stat().st_ino for path in one.store.root.rglob("*") if path.is_file()}
    assert after == before


async def test_discarding_twice_is_discarding_once(one: Node) -> None:
    directory = written(one.root / "staging" / "ckpt", {"file": b"x"})
    beside = written(one.root / "staging" / "other", {"file": b"x"})
    with capture_logs() as logs:
        await one.chunks.discard(str(directory))
        await one.chunks.discard(str(directory))
    assert (directory.exists(), beside.exists(), logs) == (False, True, [])


@pytest.mark.parametrize(
    "path", ["{root}/other", "{root}/staging", "{root}/staging/../other", "/", "", "a\0b", "\ud800"]
)
async def test_only_directories_below_staging_are_removed(one: Node, path: str) -> None:
    written(one.root / "other", {"file": b"x"})
    kept = written(one.root / "staging" / "kept", {"file": b"x"})
    with capture_logs() as logs:
        await one.chunks.discard(path.format(root=one.root))
    assert [entry["event"] for entry in logs] == ["checkpoint.source_left"]
    assert (one.root / "other" / "file").exists()
    assert (kept / "file").exists()


async def test_what_cannot_be_removed_is_logged(one: Node) -> None:
    """Links to elsewhere, to themselves and plain files are no directories."""
    elsewhere = written(one.root / "other", {"file": b"x"})
    staging = one.root / "staging"
    (staging / "link").symlink_to(elsewhere)
    (staging / "loop").symlink_to(staging / "loop")
    (staging / "plain").write_bytes(b"x")
    for name in ("link", "link/file", "loop", "loop/below", "plain"):
        with capture_logs() as logs:
            await one.chunks.discard(str(staging / name))
        assert [entry["event"] for entry in logs] == ["checkpoint.source_left"], name
        assert logs[0]["directory"] == str(staging / name)
    assert (elsewhere / "file").exists()
    assert (staging / "plain").exists()


async def test_a_link_in_staging_leads_nowhere(one: Node) -> None:
    (one.root / "other").mkdir()
    (one.root / "other" / "sub").mkdir()
    (one.root / "staging" / "out").symlink_to(one.root / "other")
    for path in ("out", "out/sub"):
        with pytest.raises(ChunkError, match=r"lies outside|not a directory"):
            await one.chunks.store(str(one.root / "staging" / path), Origin(1, 1, 1, ""))
    assert (one.root / "other" / "sub").exists()


async def test_collect_and_restore_through_the_port(one: Node) -> None:
    old = await one.checkpoint(FILES, 1)
    new = await one.checkpoint(FILES | {"sub/head": b"new"}, 2)
    assert await one.chunks.collect(frozenset([old.digest])) == 0, "it may be the newest"
    async with running(one.root, "n3", lambda root: ChunkStore(root, grace_s=0)) as hasty:
        for digest in (old.digest, new.digest):
            await one.chunks.replicate(digest, hasty.source)
        assert await hasty.chunks.collect(frozenset([new.digest])) > 0
        assert await hasty.chunks.checkpoints() == (new.digest,)
        restored = await hasty.chunks.restore(
            [candidate(old), candidate(new)], str(hasty.root / "out")
        )
        assert (restored.digest, restored.skipped[0][0]) == (new.digest, old.digest)
        assert set(decode(hasty.store.read_manifest(new.digest)).sizes_bytes()) == {
            digest_of(FILES["backbone"]),
            digest_of(b"new"),
        }


async def test_the_channel_cache_is_bounded(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "CHANNELS_MAX", 1)
    stored = await one.checkpoint(FILES, 1)
    async with running(one.root, "n3") as three:
        for target in (two.source, three.source, two.source):
            await one.chunks.replicate(stored.digest, target)
            assert list(one.client._entries) == [target.address]
        stream = one.client.get_chunks(two.source, [(digest_of(FILES["backbone"]), 5000)])
        await anext(stream)
        with pytest.raises(ChunkError, match="1 peers are being talked to already"):
            await one.client.find_missing(three.source, [])
        await stream.aclose()


async def test_the_hello_does_not_wait_behind_checkpoints_that_are_hashed(
    one: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node whose threads are all busy for minutes still says what it has."""
    stored = await one.checkpoint(FILES, 1)
    go_on, busy = threading.Event(), threading.Semaphore(0)

    def slow(*_: object, **__: object) -> None:
        busy.release()
        assert go_on.wait(60)
        raise ChunkError("nothing was meant to be stored")

    monkeypatch.setattr(service_module, "ingest", slow)
    directory = str(one.root / "staging" / "more")
    storing = [
        asyncio.create_task(one.chunks.store(directory, Origin(1, 1, 2, "")))
        for _ in range(THREADS_MAX)
    ]
    for _ in storing:
        assert await asyncio.to_thread(busy.acquire, timeout=60)
    try:
        async with asyncio.timeout(60):
            assert await one.chunks.checkpoints() == (stored.digest,)
    finally:
        go_on.set()
        await asyncio.gather(*storing, return_exceptions=True)
