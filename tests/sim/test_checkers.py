"""What the simulator's checkers take for lost, of jobs that are tried more often than a short run
can try them."""

from dataclasses import replace

import pytest

from coordinator.core.messages import PutAttempt, PutJob, Record
from coordinator.core.model import Attempt, Snapshot
from coordinator.core.phases import AttemptPhase
from coordinator.core.state import ATTEMPTS_SHOWN_MAX
from coordinator.store.memory import MemoryDisk, MemoryStore
from tests.sim.checkers import Checkers
from tests.store.worlds import job

TRIES = ATTEMPTS_SHOWN_MAX + 3


@pytest.fixture
async def written() -> tuple[Checkers, list[str], Snapshot]:
    """A job and a gang, tried so often; what the checkers say, and what a store has of it."""
    said: list[str] = []
    checkers = Checkers(said.append, lambda _: True)
    disk = MemoryDisk()
    store = MemoryStore(disk)
    await store.open()
    for number, ranks in ((1, 1), (2, 2)):
        for epoch in range(1, TRIES + 1):
            lost = Attempt(number, epoch, "n1", (), AttemptPhase.LOST, 5, ranks=ranks)
            batch = [PutAttempt(replace(lost, rank=rank)) for rank in range(ranks)]
            whole: list[Record] = [PutJob(job(number)), *batch]
            await store.commit(whole)
            checkers.committed(whole)
    await store.close()
    return checkers, said, await MemoryStore(disk).open()


async def test_tries_that_a_store_does_not_keep_are_not_lost(
    written: tuple[Checkers, list[str], Snapshot],
) -> None:
    checkers, said, snapshot = written
    assert len(snapshot.attempts) == 3 * ATTEMPTS_SHOWN_MAX
    checkers.loaded(snapshot)
    assert said == []


@pytest.mark.parametrize("missing", [0, ATTEMPTS_SHOWN_MAX, -1])
async def test_one_that_it_keeps_is_missed(
    written: tuple[Checkers, list[str], Snapshot], missing: int
) -> None:
    checkers, said, snapshot = written
    kept = list(snapshot.attempts)
    del kept[missing]
    checkers.loaded(replace(snapshot, attempts=tuple(kept)))
    assert said == ["the attempts that came back are not those that were written"]
