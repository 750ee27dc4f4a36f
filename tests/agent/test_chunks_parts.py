"""Restoring what several ranks wrote: all of it, laid out rank by rank, or none of it.

Safety: nobody resumes from a checkpoint of which one part is lost or altered, and none is given up
while a part is merely out of reach. Liveness: a part that is damaged here is repaired from another
copy, and ranks that restore at the same time fetch each part once.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.chunks.manifest import Unreachable, digest_of
from agent.core.values import ReplicaSource, RestoreCandidate, RestorePart, StoredCheckpoint
from tests.agent.chunk_worlds import NOBODY, Node, candidate, files_under, flip, running

PARTS = [{"state": bytes([rank]) * 3000, "sub/rows": b"rows" * (rank + 1)} for rank in range(3)]
LAID_OUT = {
    f"rank-{rank:05d}/{path}": data
    for rank, files in enumerate(PARTS)
    for path, data in files.items()
}
OLD = {"whole": b"old"}


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Node]:
    async with running(tmp_path, "n1") as node:
        yield node


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Node]:
    async with running(tmp_path, "n2") as node:
        yield node


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Node]:
    async with running(tmp_path, "n3") as node:
        yield node


async def written(nodes: list[Node]) -> list[StoredCheckpoint]:
    """Each rank's part of step 5, on these nodes by rank."""
    return [
        await node.checkpoint(files, 5, rank=rank)
        for rank, (node, files) in enumerate(zip(nodes, PARTS, strict=True))
    ]


def in_parts(stored: list[StoredCheckpoint], sources: list[ReplicaSource]) -> RestoreCandidate:
    own, *others = [
        RestorePart(kept.digest, (source,)) for kept, source in zip(stored, sources, strict=True)
    ]
    return RestoreCandidate(own.digest, 5, own.sources, tuple(others))


async def test_every_part_is_fetched_and_laid_out_under_its_rank(
    one: Node, two: Node, three: Node
) -> None:
    stored = await written([one, two, two])
    wanted = in_parts(stored, [one.source, two.source, two.source])
    restored = await three.chunks.restore([wanted], str(three.root / "out"))
    assert (restored.digest, restored.step, restored.skipped) == (stored[0].digest, 5, ())
    assert files_under(restored.directory) == LAID_OUT
    assert not (three.root / "out.partial").exists()
    assert sorted(await three.chunks.checkpoints()) == sorted(kept.digest for kept in stored)


async def test_parts_are_told_apart_also_where_ranks_wrote_the_same(one: Node) -> None:
    """A rank that has no say in the other's history shares no name with it."""
    stored = [await one.checkpoint({"state": b"same"}, 5, rank=rank) for rank in range(2)]
    assert stored[0].digest != stored[1].digest


async def test_one_lost_part_and_the_checkpoint_before_is_used(one: Node, two: Node) -> None:
    old = await one.checkpoint(OLD, 1)
    stored = await written([one, one, two])
    two.chunk_path(PARTS[2]["state"]).unlink()
    # Rank 1's source keeps silent; without rank 2's part that does not matter.
    one.manifest_path(stored[1].digest).unlink()
    wanted = in_parts(stored, [one.source, NOBODY, two.source])
    restored = await one.chunks.restore([wanted, candidate(old)], str(one.root / "out"))
    assert files_under(restored.directory) == OLD
    [(digest, reason)] = restored.skipped
    assert digest == stored[0].digest
    assert reason.startswith(f"rank 2: chunk {digest_of(PARTS[2]['state'])[:8]}... of state: ")


async def test_a_part_out_of_reach_is_waited_for(one: Node, two: Node) -> None:
    old = await one.checkpoint(OLD, 1)
    stored = await written([one, two, one])
    wanted = in_parts(stored, [one.source, NOBODY, one.source])
    with pytest.raises(Unreachable, match=r"^rank 1: checkpoint .* cannot be had now"):
        await one.chunks.restore([wanted, candidate(old)], str(one.root / "out"))
    assert not (one.root / "out").exists()
    assert not (one.root / "out.partial").exists()
    reached = in_parts(stored, [one.source, two.source, one.source])
    restored = await one.chunks.restore([reached, candidate(old)], str(one.root / "out"))
    assert files_under(restored.directory) == LAID_OUT


async def test_a_part_that_is_altered_here_is_repaired(one: Node, two: Node) -> None:
    stored = await written([one, one, one])
    await one.chunks.replicate(stored[1].digest, two.source)
    flip(one.chunk_path(PARTS[1]["state"]))
    wanted = in_parts(stored, [two.source, two.source, two.source])
    restored = await one.chunks.restore([wanted], str(one.root / "out"))
    assert files_under(restored.directory) == LAID_OUT
    assert one.client.fetched == [digest_of(PARTS[1]["state"])]


async def test_a_shared_directory_has_parts(one: Node, two: Node, tmp_path: Path) -> None:
    (tmp_path / "everybody").mkdir()
    shared = ReplicaSource("shared", str(tmp_path / "everybody"))
    stored = await written([one, one, one])
    for kept in stored:
        await one.chunks.replicate(kept.digest, shared)
    restored = await two.chunks.restore([in_parts(stored, [shared] * 3)], str(two.root / "out"))
    assert files_under(restored.directory) == LAID_OUT


async def test_ranks_on_one_node_fetch_each_part_once(one: Node, two: Node) -> None:
    stored = await written([one, one, one])
    wanted = in_parts(stored, [one.source] * 3)
    both = [two.chunks.restore([wanted], str(two.root / name)) for name in ("rank0", "rank1")]
    for restored in await asyncio.gather(*both):
        assert files_under(restored.directory) == LAID_OUT
    assert len(two.client.fetched) == len(set(two.client.fetched)) == 6
