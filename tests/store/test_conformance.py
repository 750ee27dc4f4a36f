"""What every store promises, as one suite; `worlds.py` says how a store joins it.

The properties, all of safety: what was committed is read back and nothing else; a batch is whole or
absent; a leader that was succeeded writes nothing; an id that was given out stays given out; a
batch done twice is done once.
"""

import asyncio
from collections.abc import Callable
from random import Random
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.core.demand_history import KEPT_STEPS, DemandLog, DemandRow, Series
from coordinator.core.lease_messages import DAYS_KEPT
from coordinator.core.messages import (
    AppendEvent,
    DropCheckpoint,
    DropDemand,
    DropJob,
    DropNode,
    DropPart,
    PutAttempt,
    PutCheckpoint,
    PutDemand,
    PutDemandSeries,
    PutJob,
    PutLeaseDay,
    PutNode,
    PutPart,
    PutScaleRecord,
    Record,
)
from coordinator.core.model import (
    Attempt,
    Checkpoint,
    HostFacts,
    Job,
    JobEvent,
    JobSpec,
    Node,
    Snapshot,
    WaitingPart,
)
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.scale_records import RECORDS_MAX, ScaleRecord
from coordinator.core.state import ATTEMPTS_SHOWN_MAX
from coordinator.ports import LeaderLost, Store, StoreUnavailable
from coordinator.store.rows import EVENTS_PER_JOB_MAX
from tests.store.strategies import histories, records
from tests.store.worlds import IMPATIENT_MS, World, event, job, leading, read_all, write_all

Key = TypeVar("Key")
Value = TypeVar("Value")

# Worlds are made inside the test, so a fixture that outlives an example does no harm; a disk has no
# deadline.
EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# hypothesis stops looking for a smaller counterexample after 300 s; a test that is stopped before
# says nothing.
SHRINKING_TIMEOUT_SECONDS = 400

JOB_1: list[Record] = [
    PutJob(job(1)),
    PutAttempt(Attempt(1, 1, "n1", ("GPU-a",), AttemptPhase.RUNNING, assigned_unix_ms=5)),
    PutCheckpoint(Checkpoint(1, "aa" * 32, "", 1, 100, 4096, ("n1", "n2"), committed_unix_ms=6)),
    AppendEvent(event(1, 1, "submitted")),
    AppendEvent(event(1, 2, "started")),
]


def without(table: dict[tuple[int, Key], Value], job_id: int) -> dict[tuple[int, Key], Value]:
    return {key: value for key, value in table.items() if key[0] != job_id}


class Expected:
    """The plainest possible reading of the records, in order."""

    def __init__(self, batches: list[list[Record]]) -> None:
        self.last_job_id = 0
        self.jobs: dict[int, Job] = {}
        self.attempts: dict[tuple[int, tuple[int, int]], Attempt] = {}
        self.checkpoints: dict[tuple[int, str], Checkpoint] = {}
        self.parts: dict[tuple[int, tuple[int, str]], WaitingPart] = {}
        self.nodes: dict[str, Node] = {}
        self.events: dict[tuple[int, int], JobEvent] = {}
        self.series: dict[int, PutDemandSeries] = {}
        self.demand: dict[tuple[int, int], DemandRow] = {}
        self.scaled: dict[int, ScaleRecord] = {}
        self.lease_days: list[int] = []
        for batch in batches:
            for record in batch:
                self.take(record)

    def take(self, record: Record) -> None:
        if isinstance(record, PutJob):
            self.jobs[record.job.id] = record.job
            self.last_job_id = max(self.last_job_id, record.job.id)
        elif isinstance(record, PutAttempt):
            attempt = record.attempt
            self.attempts[attempt.job_id, (attempt.epoch, attempt.rank)] = attempt
        elif isinstance(record, PutCheckpoint):
            checkpoint = record.checkpoint
            self.checkpoints[checkpoint.job_id, checkpoint.digest] = checkpoint
        elif isinstance(record, PutPart):
            part = record.part
            self.parts[part.job_id, (part.rank, part.digest)] = part
        elif isinstance(record, DropPart):
            self.parts.pop((record.job_id, (record.rank, record.digest)), None)
        elif isinstance(record, PutNode):
            self.nodes[record.node.id] = record.node
        elif isinstance(record, DropNode):
            self.nodes.pop(record.node, None)
        elif isinstance(record, AppendEvent):
            self.events[record.event.job_id, record.event.sequence] = record.event
        elif isinstance(record, DropCheckpoint):
            self.checkpoints.pop((record.job_id, record.digest), None)
        elif isinstance(record, PutScaleRecord):
            self.scaled[record.record.number] = record.record
        elif isinstance(record, PutLeaseDay):
            near = [day for day in self.lease_days if abs(day - record.day) <= DAYS_KEPT]
            self.lease_days = sorted({*near, record.day})
        elif isinstance(record, PutDemandSeries):
            self.series[record.number] = record
        elif isinstance(record, PutDemand):
            self.demand[record.row.period_min, record.row.step] = record.row
        elif isinstance(record, DropDemand):
            for period_min, step in list(self.demand):
                if step * period_min + period_min - 1 > record.after_minute:
                    del self.demand[period_min, step]
        else:
            self.jobs.pop(record.job_id, None)
            self.attempts = without(self.attempts, record.job_id)
            self.parts = without(self.parts, record.job_id)
            self.checkpoints = without(self.checkpoints, record.job_id)
            self.events = without(self.events, record.job_id)

    def snapshot(self, leader_epoch: int) -> Snapshot:
        return Snapshot(
            leader_epoch=leader_epoch,
            last_job_id=self.last_job_id,
            jobs=tuple(self.jobs[key] for key in sorted(self.jobs)),
            attempts=tuple(self.attempts[key] for key in sorted(self.attempts)),
            checkpoints=tuple(
                sorted(self.checkpoints.values(), key=lambda c: (c.job_id, c.step, c.digest))
            ),
            nodes=tuple(self.nodes[key] for key in sorted(self.nodes)),
            parts=tuple(
                sorted(
                    self.parts.values(),
                    key=lambda part: (part.job_id, part.sequence, part.rank, part.digest),
                )
            ),
            demand=DemandLog(
                tuple(self.series[number] for number in sorted(self.series)),
                tuple(self.demand[key] for key in sorted(self.demand)),
            ),
            scale_records=tuple(self.scaled[number] for number in sorted(self.scaled)),
            lease_days=tuple(self.lease_days),
        )

    def history(self, job_id: int) -> list[JobEvent]:
        return [self.events[key] for key in sorted(self.events) if key[0] == job_id]


async def test_an_empty_store_is_empty(world: World) -> None:
    assert await read_all(world) == Snapshot(leader_epoch=1)


@pytest.mark.timeout(SHRINKING_TIMEOUT_SECONDS)
@EXAMPLES
@given(batches=histories())
async def test_any_history_of_batches_is_read_back(
    make_world: Callable[[], World], batches: list[list[Record]]
) -> None:
    world = make_world()
    expected = Expected(batches)
    await write_all(world, *batches)
    async with leading(world) as (store, snapshot):
        assert snapshot == expected.snapshot(leader_epoch=2)
        for job_id in (1, 2, 3):
            assert await store.events(job_id, 0, 100) == expected.history(job_id)


@pytest.mark.timeout(SHRINKING_TIMEOUT_SECONDS)
@EXAMPLES
@given(batches=histories(), last=st.lists(records(), min_size=1, max_size=8))
async def test_a_batch_done_twice_is_done_once(
    make_world: Callable[[], World], batches: list[list[Record]], last: list[Record]
) -> None:
    world = make_world()
    await write_all(world, *batches, last, last)
    expected = Expected([*batches, last])
    async with leading(world) as (store, snapshot):
        assert snapshot == expected.snapshot(leader_epoch=2)
        for job_id in (1, 2, 3):
            assert await store.events(job_id, 0, 100) == expected.history(job_id)


async def test_a_restart_sees_exactly_the_committed_batches(world: World) -> None:
    for number in range(1, 6):
        async with leading(world) as (store, snapshot):
            assert snapshot.leader_epoch == number
            assert [found.id for found in snapshot.jobs] == list(range(1, number))
            await store.commit([PutJob(job(number))])


async def test_commits_take_effect_in_the_order_of_their_calls(world: World) -> None:
    async with leading(world) as (store, _):
        await asyncio.gather(*(store.commit([PutJob(job(1, f"{n}"))]) for n in range(20)))
    assert [found.reason for found in (await read_all(world)).jobs] == ["19"]


async def test_an_unavailable_store_writes_nothing_and_takes_the_batch_later(world: World) -> None:
    await write_all(world, [PutNode(Node("n1", "j", "", HostFacts(), ()))])
    async with leading(world, patience_ms=IMPATIENT_MS) as (store, before):
        with world.unavailable():
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await store.commit(JOB_1)
            assert await store.events(1, 0, 10) == []
        await store.commit(JOB_1)
        assert len(await store.events(1, 0, 10)) == 2
    after = await read_all(world)
    assert (before.jobs, before.last_job_id) == ((), 0)
    assert after == Expected([JOB_1, [PutNode(n) for n in before.nodes]]).snapshot(3)


async def test_a_batch_with_an_impossible_record_leaves_nothing(world: World) -> None:
    """Our own bug in the last record of a batch: it is raised as what it is, and the first records
    are not there."""
    lone_surrogate = JobSpec(name="\ud800")
    async with leading(world) as (store, _):
        with pytest.raises(UnicodeEncodeError):
            await store.commit(
                [
                    *JOB_1,
                    DropCheckpoint(1, "aa" * 32),
                    PutJob(Job(9, lone_surrogate, JobPhase.QUEUED, 0)),
                ]
            )
        assert await store.events(1, 0, 10) == []
        await store.commit([PutJob(job(2))])
    assert await read_all(world) == Expected([[PutJob(job(2))]]).snapshot(2)


async def test_a_succeeded_leader_writes_nothing(world: World) -> None:
    async with leading(world) as (old, _):
        await old.commit(JOB_1)
        async with leading(world) as (new, found):
            assert found == Expected([JOB_1]).snapshot(2)
            for _ in range(2):
                with pytest.raises(LeaderLost, match="taken over"):
                    await old.commit([PutJob(job(2)), DropJob(1), AppendEvent(event(1, 3))])
            await new.commit([PutJob(job(3))])
            assert [line.sequence for line in await new.events(1, 0, 10)] == [1, 2]
        with pytest.raises(LeaderLost):
            await old.commit([])
    assert await read_all(world) == Expected([JOB_1, [PutJob(job(3))]]).snapshot(3)


@pytest.mark.parametrize("seed", range(12))
async def test_a_leader_that_races_with_its_successor_is_cut_off_cleanly(
    world: World, seed: int
) -> None:
    """The successor's snapshot holds every batch that the old leader saw accepted, and it gets no
    more after it."""
    ready = asyncio.Event()
    ready_after = Random(seed).randrange(1, 25)
    accepted: list[int] = []

    async def lead_until_lost(store: Store) -> None:
        for job_id in range(1, 100_000):
            await store.commit([PutJob(job(job_id)), AppendEvent(event(job_id, 1))])
            accepted.append(job_id)
            if len(accepted) == ready_after:
                ready.set()
            await asyncio.sleep(0)

    async with leading(world) as (old, _):
        old_leader = asyncio.create_task(lead_until_lost(old))
        await ready.wait()
        async with leading(world) as (_, found):
            with pytest.raises(LeaderLost):
                await old_leader
        assert [value.id for value in found.jobs] == accepted
    assert (await read_all(world)).jobs == found.jobs


async def test_the_last_job_id_never_goes_back(world: World) -> None:
    await write_all(world, [PutJob(job(7)), PutJob(job(4))], [DropJob(7)], [PutJob(job(5))])
    assert (await read_all(world)).last_job_id == 7
    await write_all(world, [DropJob(4), DropJob(5), PutJob(job(9)), DropJob(9)])
    after = await read_all(world)
    assert (after.last_job_id, after.jobs) == (9, ())


async def test_dropping_a_job_leaves_nothing_of_it_and_all_of_others(world: World) -> None:
    job_2: list[Record] = [
        PutJob(job(2)),
        PutAttempt(Attempt(2, 1, "n2", (), AttemptPhase.RUNNING, assigned_unix_ms=5)),
        PutCheckpoint(Checkpoint(2, "aa" * 32, "", 1, 100, 4096, ("n2",), committed_unix_ms=6)),
        AppendEvent(event(2, 1)),
    ]
    await write_all(world, [*JOB_1, *job_2], [DropJob(1), DropJob(1), DropJob(77)])
    async with leading(world) as (store, snapshot):
        assert snapshot == Expected([job_2]).snapshot(leader_epoch=2)
        assert await store.events(1, 0, 10) == []
        assert await store.events(2, 0, 10) == [event(2, 1)]


@pytest.mark.parametrize("batch_size", [1_000, 7])
async def test_a_history_keeps_its_newest_lines_in_order(world: World, batch_size: int) -> None:
    newest = EVENTS_PER_JOB_MAX + 40
    lines = [event(1, sequence) for sequence in range(1, newest + 1)]
    others = [event(2, sequence) for sequence in range(1, 4)]
    batches: list[list[Record]] = [[AppendEvent(line) for line in others]]
    for start in range(0, newest, batch_size):
        batches.append([AppendEvent(line) for line in lines[start : start + batch_size]])
    async with leading(world) as (store, _):
        for batch in [*batches, batches[-1]]:
            await store.commit(batch)
        assert await store.events(1, 0, 10_000) == lines[40:]
        assert await store.events(2, 0, 10_000) == others


async def test_of_a_job_that_is_tried_for_ever_the_newest_tries_are_kept(world: World) -> None:
    """As many as a coordinator shows; of a gang with all their ranks."""
    newest = ATTEMPTS_SHOWN_MAX + 3

    def tried(job_id: int, epoch: int, rank: int, ranks: int) -> PutAttempt:
        place = Attempt(job_id, epoch, "n1", (), AttemptPhase.LOST, 5, rank=rank, ranks=ranks)
        return PutAttempt(place)

    alone = [tried(1, epoch, 0, 1) for epoch in range(1, newest + 1)]
    gang = [tried(2, epoch, rank, 2) for epoch in range(1, newest + 1) for rank in range(2)]
    few = [tried(3, epoch, 0, 1) for epoch in (1, 2, 5_000_000)]  # numbered anew: `numbering.py`
    batches: list[list[Record]] = [[PutJob(job(each)) for each in (1, 2, 3)]]
    batches += [[record] for record in alone]
    await write_all(world, *batches, [*gang, *few], [alone[-1]])
    kept = (await read_all(world)).attempts
    assert [found.epoch for found in kept if found.job_id == 1] == list(range(4, newest + 1))
    assert [(found.epoch, found.rank) for found in kept if found.job_id == 2] == [
        (epoch, rank) for epoch in range(4, newest + 1) for rank in range(2)
    ]
    assert [found.epoch for found in kept if found.job_id == 3] == [1, 2, 5_000_000]


async def test_the_oldest_decisions_leave_the_store(world: World) -> None:
    def decided(number: int) -> PutScaleRecord:
        words = (number, 0, "H100", "act", "one node starts", 0.95)
        return PutScaleRecord(ScaleRecord(*words, 8, 0, 0, 8, 16, 16))

    await write_all(world, [decided(number) for number in range(1, 4)])
    await write_all(world, [decided(RECORDS_MAX + 2)])
    await write_all(world, [decided(3)])  # what is judged late is written again
    kept = [record.number for record in (await read_all(world)).scale_records]
    assert kept == [3, RECORDS_MAX + 2]


async def test_days_far_from_the_newest_leave_the_store(world: World) -> None:
    """Also those that a wrong clock had: the newest is the last that was written."""
    await write_all(world, [PutLeaseDay(100), PutLeaseDay(101), PutLeaseDay(101)])
    await write_all(world, [PutLeaseDay(101 + DAYS_KEPT)])
    assert (await read_all(world)).lease_days == (101, 101 + DAYS_KEPT)
    await write_all(world, [PutLeaseDay(900), PutLeaseDay(102)])
    assert (await read_all(world)).lease_days == (102,)


@pytest.mark.parametrize("period_min", KEPT_STEPS)
async def test_demand_leaves_the_store_with_its_ring(world: World, period_min: int) -> None:
    kept = KEPT_STEPS[period_min]
    steps = [7, 8, 9, kept + 7, kept + 8]
    still = ((0.5,) * 7,)
    rows = [DemandRow(period_min, step, (0,), (float(step),), still) for step in steps]
    other = DemandRow(10 if period_min == 1 else 1, 3)
    await write_all(world, [PutDemandSeries(0, Series("H100", "nlp", "spare"))], [PutDemand(other)])
    for row in rows[:3]:
        await write_all(world, [PutDemand(row)])
    await write_all(world, [PutDemand(row) for row in rows[3:]])
    found = (await read_all(world)).demand
    assert [row for row in found.rows if row.period_min == period_min] == rows[2:]
    assert other in found.rows
    assert found.series == (PutDemandSeries(0, Series("H100", "nlp", "spare")),)


async def test_a_history_is_read_in_pages(world: World) -> None:
    lines = [event(1, sequence, f"line {sequence}") for sequence in range(1, 11)]
    async with leading(world) as (store, _):
        await store.commit([AppendEvent(line) for line in reversed(lines)])
        assert await store.events(1, 0, 4) == lines[:4]
        assert await store.events(1, 4, 4) == lines[4:8]
        assert await store.events(1, 8, 4) == lines[8:]
        assert await store.events(1, 10, 4) == []
        assert await store.events(1, 0, 0) == []
        assert await store.events(1, 0, -1) == []


async def test_closing_twice_is_closing_once_and_a_closed_store_opens_again(world: World) -> None:
    store = world.handle()
    await store.open()
    await store.commit([PutJob(job(1))])
    await store.close()
    await store.close()
    assert (await store.open()).jobs == (job(1),)
    await store.commit([PutJob(job(2))])
    await store.close()
