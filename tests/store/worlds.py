"""A world is durable state plus the means to open stores on it and to make them fail.

Problem: a suite that is written against one store tests that store's habits. Here the conformance
suite sees only a `World`: a new backend is a new class with two methods and one line in
`conftest.py`.
"""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Protocol

from coordinator.core.messages import Record
from coordinator.core.model import Job, JobEvent, JobSpec, Snapshot
from coordinator.core.phases import JobPhase
from coordinator.ports import Store
from coordinator.store.memory import MemoryDisk, MemoryStore
from coordinator.store.sqlite import SqliteStore

# How long a commit waits for somebody else's write lock. A test where two leaders race must not
# fail on a slow disk; one where the lock is never given back need not wait.
PATIENT_MS = 60_000
IMPATIENT_MS = 10


class World(Protocol):
    def handle(self, *, patience_ms: int = PATIENT_MS) -> Store:
        """Another coordinator's store, not opened, on the same state; several may be open at
        once."""
        ...

    def unavailable(self) -> AbstractContextManager[None]:
        """Every commit of an impatient handle inside raises `StoreUnavailable`."""
        ...


class MemoryWorld:
    def __init__(self) -> None:
        self.disk = MemoryDisk()

    def handle(self, *, patience_ms: int = PATIENT_MS) -> Store:
        return MemoryStore(self.disk)

    @contextmanager
    def unavailable(self) -> Iterator[None]:
        self.disk.fail_next(1_000_000)
        yield
        self.disk.fail_next(0)


class SqliteWorld:
    def __init__(self, path: Path) -> None:
        self.path = path

    def handle(self, *, patience_ms: int = PATIENT_MS) -> Store:
        return SqliteStore(self.path, exclusive=False, busy_timeout_ms=patience_ms)

    @contextmanager
    def unavailable(self) -> Iterator[None]:
        """Holds the write lock, as a backup tool that forgot to let go."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.rollback()


@asynccontextmanager
async def leading(
    world: World, *, patience_ms: int = PATIENT_MS
) -> AsyncIterator[tuple[Store, Snapshot]]:
    """A store that has become leader, and what it found."""
    store = world.handle(patience_ms=patience_ms)
    snapshot = await store.open()
    try:
        yield store, snapshot
    finally:
        await store.close()


async def read_all(world: World) -> Snapshot:
    """What the next coordinator would find."""
    async with leading(world) as (_, snapshot):
        return snapshot


async def write_all(world: World, *batches: list[Record]) -> None:
    async with leading(world) as (store, _):
        for batch in batches:
            await store.commit(batch)


def job(job_id: int, reason: str = "") -> Job:
    spec = JobSpec(name=f"job {job_id}", command=("true",))
    return Job(job_id, spec, JobPhase.QUEUED, submitted_unix_ms=1_790_000_000_000, reason=reason)


def event(job_id: int, sequence: int, message: str = "") -> JobEvent:
    return JobEvent(job_id, sequence, 1_790_000_000_000 + sequence, "test", message=message)
