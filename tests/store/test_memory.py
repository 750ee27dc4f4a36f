"""The faults that only the simulated disk can be asked for."""

import pytest

from coordinator.core.messages import AppendEvent, PutJob, Record
from coordinator.ports import StoreUnavailable
from coordinator.store.memory import MemoryDisk, MemoryStore
from tests.store.worlds import event, job


async def test_a_fault_can_hide_a_commit_that_took_effect() -> None:
    disk = MemoryDisk()
    store = MemoryStore(disk)
    await store.open()
    disk.fail_next(2, take_effect=True)
    batch: list[Record] = [PutJob(job(1)), AppendEvent(event(1, 1))]
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await store.commit(batch)
    await store.commit(batch)
    assert (disk.commits, disk.failures) == (3, 2)
    assert disk.snapshot().jobs == (job(1),)
    assert await store.events(1, 0, 10) == [event(1, 1)]
    await store.close()


async def test_exactly_as_many_commits_fail_as_were_asked_to() -> None:
    store = MemoryStore()
    await store.open()
    store.disk.fail_next(1)
    with pytest.raises(StoreUnavailable, match="told to fail"):
        await store.commit([PutJob(job(1))])
    assert store.disk.snapshot().jobs == ()
    await store.commit([PutJob(job(2))])
    assert store.disk.snapshot().jobs == (job(2),)
    await store.close()
