"""Restoring over real loopback gRPC, with disks and peers that lie, and with sources that are gone.

Safety: nothing is laid out, and nothing is kept, whose bytes do not match their digest, whoever
sent it; and no older checkpoint is used while a source of the newer one has not answered. Liveness:
what one copy has lost is repaired from another, and when every source says that it has no whole
copy, the checkpoint before it is used, with a sentence that says why.
"""

import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.chunks.manifest import (
    DEFINITE,
    Denied,
    DiskFull,
    Unreachable,
    digest_of,
)
from agent.chunks.peers import PeerClient, Route
from agent.chunks.service import ChunkService
from agent.chunks.store import ChunkStore
from agent.core.values import Origin, ReplicaSource
from agent.ports import ChunkError
from agent.transport import Tls
from tests.agent.chunk_worlds import (
    FILES,
    NOBODY,
    WAYS,
    LyingStore,
    Node,
    candidate,
    files_under,
    flip,
    running,
    truncate,
    written,
)

# 1 GiB, of which a fiftieth is less than 64 MiB.
FREE_TOTAL_BYTES = 1 << 30


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each test runs over both ways of moving chunks."""
    return str(request.param)


def leave_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """Every file system has this much left."""

    def statvfs(path: object) -> SimpleNamespace:
        return SimpleNamespace(f_frsize=1, f_blocks=FREE_TOTAL_BYTES, f_bavail=free_bytes)

    monkeypatch.setattr(os, "statvfs", statvfs)


def repaired(logged: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many chunks each line says had changed."""
    return [line["chunks_count"] for line in logged if line["event"] == "chunks.repaired"]


async def test_a_node_that_has_nothing_fetches_everything_and_keeps_it(
    one: Node, two: Node
) -> None:
    stored = await one.checkpoint(FILES, 1)
    with capture_logs() as logged:
        restored = await two.chunks.restore(
            [candidate(stored, NOBODY, one.source)], str(two.root / "out")
        )
    assert not repaired(logged), "nothing has changed on this disk"
    assert (restored.digest, restored.step, restored.skipped) == (stored.digest, 1, ())
    assert files_under(restored.directory) == FILES
    assert (two.root / "out").stat().st_mode & 0o777 == 0o700
    assert await two.chunks.checkpoints() == (stored.digest,)
    assert not (two.root / "out.partial").exists()


DAMAGES = pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (flip, "bytes do not match their digest"),
        (truncate, "5000 bytes expected, 10 found"),
        (Path.unlink, "missing"),
    ],
)


@DAMAGES
async def test_a_damaged_chunk_is_repaired_from_the_peer(
    one: Node, two: Node, damage: Callable[[Path], None], complaint: str
) -> None:
    stored = await one.checkpoint(FILES, 1)
    await one.chunks.replicate(stored.digest, two.source)
    damage(one.chunk_path(FILES["backbone"]))
    with capture_logs() as logged:
        restored = await one.chunks.restore([candidate(stored, two.source)], str(one.root / "out"))
    assert repaired(logged) == [1] * (complaint != "missing")
    assert (restored.digest, restored.skipped) == (stored.digest, ())
    assert files_under(restored.directory) == FILES
    assert one.client.fetched == [digest_of(FILES["backbone"])], "and nothing else travels"
    assert one.chunk_path(FILES["backbone"]).read_bytes() == FILES["backbone"]


@DAMAGES
async def test_the_checkpoint_before_is_used_where_nobody_can_repair(
    one: Node, two: Node, damage: Callable[[Path], None], complaint: str
) -> None:
    old = await one.checkpoint({"backbone": b"old"}, 1)
    new = await one.checkpoint(FILES, 2)
    await one.chunks.replicate(new.digest, two.source)
    damage(one.chunk_path(FILES["backbone"]))
    damage(two.chunk_path(FILES["backbone"]))
    restored = await one.chunks.restore(
        [candidate(new, two.source), candidate(old)], str(one.root / "out")
    )
    assert (restored.digest, restored.step) == (old.digest, 1)
    assert files_under(restored.directory) == {"backbone": b"old"}
    [(digest, reason)] = restored.skipped
    assert digest == new.digest
    name = digest_of(FILES["backbone"])[:8]
    assert reason.startswith(f"chunk {name}... of backbone: {complaint}")
    assert two.source.address in reason


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
async def test_a_damaged_manifest_is_repaired_from_the_peer(
    one: Node, two: Node, damage: Callable[[Path], None]
) -> None:
    stored = await one.checkpoint(FILES, 1)
    await one.chunks.replicate(stored.digest, two.source)
    damage(one.manifest_path(stored.digest))
    alone = await one.chunks.restore([candidate(stored)], str(one.root / "out"))
    assert (alone.digest, alone.step, alone.directory) == ("", 0, "")
    assert alone.skipped[0][1].startswith(f"manifest {stored.digest[:8]}...: ")
    restored = await one.chunks.restore([candidate(stored, two.source)], str(one.root / "out"))
    assert restored.digest == stored.digest
    assert one.client.fetched == []
    assert digest_of(one.manifest_path(stored.digest).read_bytes()) == stored.digest


async def test_chunks_lost_here_and_there_come_together(one: Node, two: Node, way: str) -> None:
    files = {name: name.encode() * 100 for name in "abcd"}
    stored = await one.checkpoint(files, 1)
    await one.chunks.replicate(stored.digest, two.source)
    one.chunk_path(files["a"]).unlink()
    flip(two.chunk_path(files["b"]))
    async with running(one.root, "n3", way=way) as three:
        restored = await three.chunks.restore(
            [candidate(stored, one.source, two.source)], str(three.root / "out")
        )
        assert files_under(restored.directory) == files


@pytest.mark.parametrize("lost", ["manifest", "chunk"])
async def test_no_older_checkpoint_is_used_while_a_source_does_not_answer(
    one: Node, two: Node, lost: str
) -> None:
    old = await one.checkpoint({"backbone": b"old"}, 1)
    new = await one.checkpoint(FILES, 2)
    await one.chunks.replicate(new.digest, two.source)
    for node in (one, two):
        (
            node.manifest_path(new.digest) if lost == "manifest" else node.chunk_path(b"h" * 70)
        ).unlink()
    candidates = [candidate(new, NOBODY, two.source), candidate(old)]
    with pytest.raises(Unreachable) as caught:
        await one.chunks.restore(candidates, str(one.root / "out"))
    sentence = str(caught.value)
    assert sentence.startswith(f"checkpoint {new.digest[:8]}... of step 2 cannot be had now")
    assert f"asked n9 ({NOBODY.address}), n2 ({two.source.address}): " in sentence
    assert not (one.root / "out").exists()
    assert not (one.root / "out.partial").exists()

    restored = await one.chunks.restore(
        [candidate(new, two.source), candidate(old)], str(one.root / "out")
    )
    assert restored.digest == old.digest, "everybody answered"


async def test_what_every_source_denies_is_lost_whoever_keeps_silent_on_the_rest(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer answers that it lacks one chunk, and is gone when asked for the next."""
    files = {"a": b"a" * 10, "b": b"b" * 10}
    new = await one.checkpoint(files, 2)
    old = await one.checkpoint({"a": b"old"}, 1)
    for data in files.values():
        one.chunk_path(data).unlink()
    real = one.client.get_chunks

    async def then_gone(
        peer: ReplicaSource, wanted: Sequence[tuple[str, int]], route: Route
    ) -> AsyncGenerator[tuple[str, bytes | bytearray], None]:
        asked = (two.source, route) if len(wanted) == 2 else (NOBODY, Route())
        async for item in real(asked[0], wanted, asked[1]):
            yield item

    monkeypatch.setattr(one.client, "get_chunks", then_gone)
    candidates = [candidate(new, two.source), candidate(old)]
    restored = await one.chunks.restore(candidates, str(one.root / "out"))
    assert (restored.digest, restored.skipped[0][0]) == (old.digest, new.digest)
    assert digest_of(files["a"])[:8] in restored.skipped[0][1]


async def test_a_peer_that_answers_at_the_second_try_is_used(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = await one.checkpoint(FILES, 1)
    real = two.client.get_manifest
    peers = iter([NOBODY, one.source])

    async def restarted(peer: ReplicaSource, digest: str) -> bytes:
        return await real(next(peers), digest)

    monkeypatch.setattr(two.client, "get_manifest", restarted)
    restored = await two.chunks.restore([candidate(stored, one.source)], str(two.root / "out"))
    assert files_under(restored.directory) == FILES


@pytest.mark.parametrize("unmounted", ["empty", "gone", "relative"])
async def test_a_shared_directory_that_is_not_mounted_is_no_answer(
    tmp_path: Path, one: Node, two: Node, unmounted: str
) -> None:
    mounted = tmp_path / "shared"
    mounted.mkdir()
    shared = ReplicaSource("shared", str(mounted) if unmounted != "relative" else "shared")
    old = await two.checkpoint(FILES, 1)
    new = await one.checkpoint({"other": b"x"}, 2)
    await one.chunks.replicate(new.digest, ReplicaSource("shared", str(mounted)))
    mounted.rename(tmp_path / "elsewhere")
    if unmounted == "empty":
        mounted.mkdir()
    candidates = [candidate(new, shared), candidate(old)]
    with pytest.raises(Unreachable, match=r"is it mounted|not an absolute path"):
        await two.chunks.restore(candidates, str(two.root / "out"))

    one.chunk_path(b"x").unlink()
    with pytest.raises(Unreachable, match=r"is it mounted|not an absolute path"):
        await one.chunks.restore(candidates, str(one.root / "out"))
    if unmounted == "empty":
        mounted.rmdir()
    (tmp_path / "elsewhere").rename(mounted)
    if unmounted != "relative":
        restored = await two.chunks.restore(candidates, str(two.root / "out"))
        assert restored.digest == new.digest


async def test_a_fault_of_this_node_makes_no_candidate_bad(one: Node) -> None:
    """What is in the way of laying out says nothing of the checkpoint."""
    old = await one.checkpoint(FILES, 1)
    new = await one.checkpoint({"other": b"x"}, 2)
    (one.root / "file").write_bytes(b"not a directory")
    with pytest.raises(ChunkError, match="Not a directory") as caught:
        await one.chunks.restore([candidate(new), candidate(old)], str(one.root / "file" / "out"))
    assert not isinstance(caught.value, DEFINITE)


async def test_a_peer_that_may_not_be_called_says_nothing_of_the_bytes(
    tmp_path: Path, one: Node
) -> None:
    """The certificates cannot be read, so nobody was asked."""
    stored = await one.checkpoint(FILES, 1)
    files = [str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem")]
    tls = Tls(ca_path=files[0], cert_path=files[1], key_path=files[2])
    service = ChunkService(
        ChunkStore(tmp_path / "n4" / "chunks"), PeerClient(tls), staging_root=tmp_path
    )
    await service.open()
    try:
        with pytest.raises(Unreachable, match=r"cannot read .*ca\.pem"):
            await service.restore([candidate(stored, one.source)], str(tmp_path / "out"))
        copy = await service.store(
            str(written(tmp_path / "in", {"file": b"x"})), Origin(1, 1, 1, "")
        )
        with pytest.raises(Denied, match=r"n1 .*cannot read"):
            await service.replicate(copy.digest, one.source)
    finally:
        await service.close()


async def test_a_restore_leaves_room_for_the_agents_own_records(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await two.checkpoint({"old": b"old"}, 1)
    new = await one.checkpoint(FILES, 2)
    candidates = [candidate(new, one.source), candidate(old)]
    leave_free(monkeypatch, FREE_TOTAL_BYTES // 50 + 5069)
    with pytest.raises(DiskFull, match=r"laying out a checkpoint of 5070 bytes .* kept in reserve"):
        await two.chunks.restore(candidates, str(two.root / "out"))
    assert not (two.root / "out.partial").exists()
    leave_free(monkeypatch, FREE_TOTAL_BYTES // 50 + 5070)
    restored = await two.chunks.restore(candidates, str(two.root / "out"))
    assert restored.digest == new.digest


async def test_a_lying_peer_is_refused_and_the_next_one_asked(
    tmp_path: Path, one: Node, way: str
) -> None:
    async with (
        running(tmp_path, "n2", LyingStore, way=way) as liar,
        running(tmp_path, "n3", way=way) as three,
    ):
        stored = await one.checkpoint(FILES, 1)
        await one.chunks.replicate(stored.digest, liar.source)
        alone = await three.chunks.restore(
            [candidate(stored, liar.source)], str(three.root / "out")
        )
        assert alone.digest == ""
        assert "n2" in alone.skipped[0][1]
        assert "sent other bytes for chunk" in alone.skipped[0][1]
        assert [path for path in (three.store.root / "objects").rglob("*") if path.is_file()] == []
        assert not (three.root / "out").exists()
        both = await three.chunks.restore(
            [candidate(stored, liar.source, one.source)], str(three.root / "out")
        )
        assert files_under(both.directory) == FILES


async def test_a_lie_about_a_manifest_is_refused(
    tmp_path: Path, one: Node, two: Node, way: str
) -> None:
    async with running(tmp_path, "n3", LyingStore, way=way) as liar:
        stored = await one.checkpoint(FILES, 1)
        await one.chunks.replicate(stored.digest, liar.source)
        assert isinstance(liar.store, LyingStore)
        liar.store.lies_about_manifests = True
        restored = await two.chunks.restore([candidate(stored, liar.source)], str(two.root / "out"))
        assert restored.digest == ""
        assert "from n3: bytes do not match their digest" in restored.skipped[0][1]
