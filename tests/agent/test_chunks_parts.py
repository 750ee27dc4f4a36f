"""Restoring what several ranks wrote: all of it, laid out rank by rank, or none of it.

Safety: nobody resumes from a checkpoint of which one part is lost or altered, and none is given up
while a part is merely out of reach. Liveness: a part that is damaged here is repaired from another
copy, and ranks that restore at the same time fetch each part once. What one rank alone reads lies
with that rank, and no node says that it holds what it has some of.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import baton_sdk
from agent.chunks import restoring
from agent.chunks.manifest import Unreachable, digest_of
from agent.core.values import Gang, ReplicaSource, RestoreCandidate, RestorePart, StoredCheckpoint
from tests.agent.chunk_worlds import NOBODY, Node, candidate, files_under, flip, running
from trainers import ranges

PARTS = [{"state": bytes([rank]) * 3000, "sub/rows": b"rows" * (rank + 1)} for rank in range(3)]
LAID_OUT = {
    f"rank-{rank:05d}/{path}": data
    for rank, files in enumerate(PARTS)
    for path, data in files.items()
}
OLD = {"whole": b"old"}


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


# --- what one rank alone reads ----------------------------------------------------------------

# All three ways to say it: by the file's name, by a directory above it, and both.
OWN = ("of-this-rank.bin", "of-this-rank/rows", "sub/of-this-rank-moments/of-this-rank")
FOR_ALL = ("state", "sub/rows", "not-of-this-rank")


def sharded(rank: int) -> dict[str, bytes]:
    return {name: f"{name} of {rank}".encode() * 100 for name in (*OWN, *FOR_ALL)}


def seen_by(rank: int | None, ranks: int = 3) -> dict[str, bytes]:
    return {
        f"rank-{other:05d}/{name}": data
        for other in range(ranks)
        for name, data in sharded(other).items()
        if name in FOR_ALL or rank in (None, other)
    }


def place(rank: int, world_size: int = 3) -> Gang:
    nodes = ("n1", "n2", "n3")
    return Gang(rank, world_size, 0, 1, rank, nodes, "127.0.0.1", 20_000, own_parts=True)


async def shards(nodes: Sequence[Node]) -> list[StoredCheckpoint]:
    return [await node.checkpoint(sharded(rank), 5, rank=rank) for rank, node in enumerate(nodes)]


@pytest.mark.parametrize("rank", range(3))
async def test_a_rank_gets_its_own_part_and_of_the_others_what_all_read(
    one: Node, two: Node, three: Node, rank: int
) -> None:
    """The part lies where the rank goes on; of the others small things are fetched."""
    stored = await shards([one, one, two])
    if rank < 2:
        await one.chunks.replicate(stored[rank].digest, three.source)
    else:
        await two.chunks.replicate(stored[rank].digest, three.source)
    wanted = in_parts(stored, [one.source, one.source, two.source])
    restored = await three.chunks.restore([wanted], str(three.root / "out"), place(rank))
    assert files_under(restored.directory) == seen_by(rank)
    assert restored.held_ranks == (rank,)
    assert sorted(three.client.fetched) == sorted(
        digest_of(sharded(other)[name]) for other in range(3) if other != rank for name in FOR_ALL
    )
    # It has some of the others' parts, and says that it has none: nobody may be sent here for them.
    assert await three.chunks.checkpoints() == (stored[rank].digest,)
    await three.chunks.collect(frozenset({stored[rank].digest}))
    again = await three.chunks.restore([wanted], str(three.root / "out"), place(rank))
    assert files_under(again.directory) == seen_by(rank)


OLDER = replace(place(0), own_parts=False)  # its coordinator takes it for a holder of all parts


@pytest.mark.parametrize("gang", [None, place(0, 2), place(0, 4), place(0, 1), OLDER])
async def test_another_number_of_ranks_and_an_older_coordinator_get_all_of_it(
    one: Node, two: Node, gang: Gang | None
) -> None:
    stored = await shards([one, one, one])
    restored = await two.chunks.restore(
        [in_parts(stored, [one.source] * 3)], str(two.root / "out"), gang
    )
    assert files_under(restored.directory) == seen_by(None)
    assert restored.held_ranks == ()
    assert len(await two.chunks.checkpoints()) == 3


async def test_parts_that_name_nothing_of_their_own_are_everybodys(one: Node, two: Node) -> None:
    """What a script reads that knows nothing of this, and what older trainers wrote."""
    stored = await written([one, one, one])
    wanted = in_parts(stored, [one.source] * 3)
    restored = await two.chunks.restore([wanted], str(two.root / "out"), place(1))
    assert files_under(restored.directory) == LAID_OUT
    assert restored.held_ranks == ()


async def test_who_reads_a_torn_file_skips_its_checkpoint_and_others_do_not(
    one: Node, two: Node
) -> None:
    """The coordinator hears both, and has all of them go back (`core/test_gangs.py`)."""
    old = await one.checkpoint(OLD, 1)
    await one.chunks.replicate(old.digest, two.source)
    stored = await shards([one, two, two])
    flip(two.chunk_path(sharded(1)[OWN[0]]))
    wanted = in_parts(stored, [one.source, two.source, two.source])
    before = candidate(old, one.source)
    first = await one.chunks.restore([wanted, before], str(one.root / "out"), place(0))
    assert (first.digest, first.skipped) == (stored[0].digest, ())
    second = await two.chunks.restore([wanted, before], str(two.root / "out"), place(1))
    assert files_under(second.directory) == OLD
    [(digest, reason)] = second.skipped
    assert digest == stored[0].digest
    assert reason.startswith(f"rank 1: chunk {digest_of(sharded(1)[OWN[0]])[:8]}... of {OWN[0]}")


async def test_ranks_on_one_node_have_both_parts_there(one: Node, two: Node) -> None:
    stored = await shards([one, one])
    own, other = (RestorePart(kept.digest, (one.source,)) for kept in stored)
    wanted = RestoreCandidate(own.digest, 5, own.sources, (other,))
    found = await asyncio.gather(
        *(
            two.chunks.restore([wanted], str(two.root / f"out{rank}"), place(rank, 2))
            for rank in range(2)
        )
    )
    for rank, restored in enumerate(found):
        assert files_under(restored.directory) == seen_by(rank, 2)
    assert len(two.client.fetched) == len(set(two.client.fetched)) == 12
    assert len(await two.chunks.checkpoints()) == 2


def test_names_of_ranks_are_the_same_for_agents_and_trainers() -> None:
    """Neither program imports the other, and each reads what the other has written."""
    assert restoring.OF_THIS_RANK == baton_sdk.OF_THIS_RANK
    assert [restoring.part_name(rank) for rank in (0, 7, 12_345)] == [
        ranges.name_of_part(rank) for rank in (0, 7, 12_345)
    ]
