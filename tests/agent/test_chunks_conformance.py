"""What every chunk store promises, as one suite: the one on disk, and the simulation's.

Safety: a digest names one content; what was restored is what was stored; a copy that is bad is
never given; what may be the newest progress of its job stays. Liveness: doing a thing twice is
doing it once, and what is replaced goes at once.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Protocol

import pytest

from agent.core.values import Origin, ReplicaSource, StoredCheckpoint
from agent.ports import ChunkError, Chunks
from tests.agent.chunk_worlds import (
    Node,
    candidate,
    files_under,
    flip,
    objects,
    running,
    set_age,
    written,
)
from tests.sim.box import Box
from tests.sim.checkers import Checkers, Content
from tests.sim.chunks import SimChunks
from tests.sim.gang import Gang


class World(Protocol):
    """Two nodes, each with a store. What a checkpoint holds is a number here."""

    here: Chunks
    there: Chunks
    target: ReplicaSource  # how `here` reaches the other node

    def built(self, step: int) -> str:
        """A directory on this node, with a content that follows from `step`."""

    def is_there(self, directory: str) -> bool: ...

    def content(self, directory: str) -> int:
        """Of what was laid out on this node."""

    def scratch(self, step: int, *, there: bool = False) -> None:
        """Make what the store keeps of that content bad."""

    def pass_minutes(self, minutes: int) -> None:
        """What lies on this node is so much older."""

    async def silence(self) -> None:
        """The other node does not answer any more."""


class Disks:
    """Two stores on disk, that talk over loopback."""

    def __init__(self, one: Node, two: Node) -> None:
        self._one, self._two = one, two
        self.here: Chunks = one.chunks
        self.there: Chunks = two.chunks
        self.target = two.source

    def built(self, step: int) -> str:
        return str(written(self._one.root / "staging" / f"at-{step}", {"state": _bytes(step)}))

    def is_there(self, directory: str) -> bool:
        return Path(directory).exists()

    def content(self, directory: str) -> int:
        return len(files_under(directory)["state"])

    def scratch(self, step: int, *, there: bool = False) -> None:
        flip((self._two if there else self._one).chunk_path(_bytes(step)))

    def pass_minutes(self, minutes: int) -> None:
        for path in [*objects(self._one.store), *(self._one.store.root / "manifests").iterdir()]:
            set_age(path, 60 * minutes)

    async def silence(self) -> None:
        await self._two.server.close()


def _bytes(step: int) -> bytes:
    return b"s" * step


class Simulated:
    """Two boxes of the simulation, and what they ask of the world around them."""

    def __init__(self) -> None:
        self.checkers = Checkers(pytest.fail, lambda digest: True)
        self.chance = Random(1)
        self._now_ms = 0
        self._boxes = {name: Box(name, 1, self) for name in ("n1", "n2")}
        self.here: Chunks = SimChunks(self._boxes["n1"])
        self.there: Chunks = SimChunks(self._boxes["n2"])
        self.target = ReplicaSource("n2", "n2:1")

    def built(self, step: int) -> str:
        directory = f"/staging/at-{step}"
        self._boxes["n1"].disk.staging[directory] = Content(1, 0, step, (("1.1", 0, step),))
        return directory

    def is_there(self, directory: str) -> bool:
        return directory in self._boxes["n1"].disk.staging

    def content(self, directory: str) -> int:
        return self._boxes["n1"].disk.staging[f"{directory}/0"].step

    def scratch(self, step: int, *, there: bool = False) -> None:
        for copy in self._boxes["n2" if there else "n1"].disk.copies.values():
            copy.intact = copy.intact and copy.content.step != step

    def pass_minutes(self, minutes: int) -> None:
        self._now_ms += 60_000 * minutes

    async def silence(self) -> None:
        self._boxes.pop("n2", None)

    # As `tests.sim.box.Surroundings`; a pause passes and takes no time.

    def now_ms(self) -> int:
        return self._now_ms

    async def pause_ms(self, low_ms: int, high_ms: int) -> None:
        self._now_ms += self.chance.randint(max(1, low_ms), high_ms)

    def trace(self, line: str) -> None: ...

    def fired(self, kind: str) -> None: ...

    def gang(self, job_id: int, epoch: int, world_size: int) -> Gang:
        raise AssertionError("nothing trains here")

    def peer(self, here: str, there: str) -> Box | None:
        return self._boxes.get(there)


@pytest.fixture(params=["disk", "simulation"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "simulation":
        yield Simulated()
        return
    async with running(tmp_path, "n1") as one, running(tmp_path, "n2") as two:
        yield Disks(one, two)


async def stored(
    world: World, step: int, *, job_id: int = 1, epoch: int = 1, rank: int | None = None
) -> StoredCheckpoint:
    return await world.here.store(world.built(step), Origin(job_id, epoch, step, "", rank))


async def test_storing_once_more_writes_nothing_and_gives_the_same(world: World) -> None:
    first, again = await stored(world, 7), await stored(world, 7)
    assert (again.digest, again.step, again.size_bytes) == (first.digest, 7, first.size_bytes)
    assert first.new_bytes > again.new_bytes == 0
    assert await world.here.checkpoints() == (first.digest,)
    assert world.is_there(world.built(7)), "what is stored is left as it is"


async def test_another_origin_is_another_checkpoint(world: World) -> None:
    others = [await stored(world, 7, epoch=2), await stored(world, 7, rank=0)]
    digests = {(await stored(world, 7)).digest, *(other.digest for other in others)}
    assert len(digests) == 3


async def test_a_directory_that_is_not_there_is_refused(world: World) -> None:
    directory = world.built(3)
    await world.here.discard(directory)
    await world.here.discard(directory)
    assert not world.is_there(directory)
    with pytest.raises(ChunkError):
        await world.here.store(directory, Origin(1, 1, 3, ""))


async def test_the_newest_is_listed_first(world: World) -> None:
    digests = [(await stored(world, step)).digest for step in (1, 2, 3)]
    assert await world.here.checkpoints() == tuple(reversed(digests))


async def test_a_replica_is_a_checkpoint_of_the_other_node(world: World) -> None:
    one = await stored(world, 4)
    for _ in range(2):
        await world.here.replicate(one.digest, world.target)
    assert await world.there.checkpoints() == (one.digest,)


async def test_what_is_bad_or_absent_is_not_sent(world: World) -> None:
    one = await stored(world, 4)
    world.scratch(4)
    for digest in (one.digest, "ab" * 32):
        with pytest.raises(ChunkError):
            await world.here.replicate(digest, world.target)
    assert await world.there.checkpoints() == ()


async def test_a_peer_that_does_not_answer_is_named(world: World) -> None:
    one = await stored(world, 4)
    await world.silence()
    with pytest.raises(ChunkError, match="n2"):
        await world.here.replicate(one.digest, world.target)


async def test_what_comes_back_is_what_was_stored(world: World, tmp_path: Path) -> None:
    one = await stored(world, 5)
    restored = await world.here.restore([candidate(one)], str(tmp_path / "out"))
    assert (restored.digest, restored.step, restored.skipped) == (one.digest, 5, ())
    assert world.content(restored.directory) == 5


async def test_a_bad_copy_is_fetched_from_where_it_is_good(world: World, tmp_path: Path) -> None:
    one = await stored(world, 5)
    await world.here.replicate(one.digest, world.target)
    world.scratch(5)
    for _ in range(2):  # and then it is good here
        restored = await world.here.restore([candidate(one, world.target)], str(tmp_path / "out"))
        assert world.content(restored.directory) == 5
        await world.silence()


async def test_of_what_nobody_has_a_good_copy_the_one_before_is_taken(
    world: World, tmp_path: Path
) -> None:
    older, newer = await stored(world, 5), await stored(world, 6)
    for one in (older, newer):
        await world.here.replicate(one.digest, world.target)
    world.scratch(6)
    world.scratch(6, there=True)
    asked = [candidate(one, world.target) for one in (newer, older)]
    restored = await world.here.restore(asked, str(tmp_path / "out"))
    assert (restored.digest, [digest for digest, _ in restored.skipped]) == (
        older.digest,
        [newer.digest],
    )
    assert world.content(restored.directory) == 5
    world.scratch(5)
    world.scratch(5, there=True)
    assert (await world.here.restore(asked, str(tmp_path / "out2"))).digest == ""


async def test_who_does_not_answer_may_have_it(world: World, tmp_path: Path) -> None:
    """Progress does not go back for that."""
    older, newer = await stored(world, 5), await stored(world, 6)
    world.scratch(6)
    await world.silence()
    with pytest.raises(ChunkError):
        await world.here.restore(
            [candidate(newer, world.target), candidate(older)], str(tmp_path / "out")
        )


async def test_what_is_replaced_goes_at_once(world: World) -> None:
    """By a newer one that is kept, of the same epoch or of a later one."""
    gone = [await stored(world, 9), await stored(world, 5, epoch=2)]
    kept = await stored(world, 6, epoch=2)
    assert await world.here.collect(frozenset([kept.digest])) > 0
    assert await world.here.checkpoints() == (kept.digest,)
    assert kept.digest not in {one.digest for one in gone}


async def test_what_may_be_the_newest_progress_stays(world: World) -> None:
    """Newer than what is kept, of another job, or of another rank; also minutes later."""
    kept = await stored(world, 5, epoch=2, rank=0)
    await stored(world, 6, epoch=2, rank=0)
    await stored(world, 1, epoch=3, rank=0)
    await stored(world, 4, epoch=2, rank=1)
    await stored(world, 1, job_id=2)
    everything = await world.here.checkpoints()
    world.pass_minutes(5)
    assert await world.here.collect(frozenset([kept.digest])) == 0
    assert set(await world.here.checkpoints()) == set(everything)
