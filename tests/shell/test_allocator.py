"""The decision over all jobs in a thread of its own, and its way through the real loop."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from coordinator.allocator import FULL, THREADS_MAX, Allocator
from coordinator.core.allocation import Aims, Columns, Contender, Option, Solve, Solved, unsolved
from coordinator.core.allocation_messages import AllocationMade, MakeAllocation
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import GetJob
from coordinator.core.model import Job, JobSpec
from coordinator.core.phases import JobPhase
from coordinator.core.standing import Entrant, Rates
from coordinator.core.state import Options
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryStore
from tests.shell.test_demand_shell import VirtualClock, disk_with_a_running_job

WAITS = Entrant(
    Job(1, JobSpec(command=("x",), gpus=1), JobPhase.QUEUED, 0),
    Contender(job_id=1, options=(Option("H100", 1, 1.0),)),
    Rates(("H100",), (1.0,), (1.0,)),
    known=False,
)
PATIENCE_S = 20


class Weighing:
    """An allocator at work, what it has answered, and a solver that hangs until it is let go."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[AllocationMade] = asyncio.Queue()
        self.allocator = Allocator(self.answers.put_nowait)
        self.asked = 0
        self.hanging: asyncio.Queue[None] = asyncio.Queue()
        self.may_end = threading.Event()
        self._loop = asyncio.get_running_loop()

    def ask(self, solve: Solve) -> None:
        self.asked += 1
        asking, capacity = (1, self.asked), {"H100": 1}
        self.allocator.make(MakeAllocation(asking, (WAITS,), capacity, 0, Aims(), {}, solve))

    def hang(self, columns: Columns) -> Solved:
        self._loop.call_soon_threadsafe(self.hanging.put_nowait, None)
        assert self.may_end.wait(PATIENCE_S), "the loop stands still"
        return unsolved(columns)

    async def answered(self) -> AllocationMade:
        async with asyncio.timeout(PATIENCE_S):
            return await self.answers.get()


@pytest.fixture
async def weighing() -> AsyncIterator[Weighing]:
    here = Weighing()
    yield here
    here.may_end.set()
    here.allocator.close()


async def test_nobody_waits_for_a_thread_that_hangs(weighing: Weighing) -> None:
    weighing.ask(weighing.hang)
    await weighing.hanging.get()
    weighing.ask(unsolved)
    made = await weighing.answered()
    assert made.asking == (1, 2)
    assert made.allocation is not None
    assert 1 in made.allocation.grants
    assert weighing.answers.empty()
    weighing.may_end.set()
    assert (await weighing.answered()).asking == (1, 1), "its number says that it is late"


async def test_threads_that_hang_are_few(weighing: Weighing) -> None:
    for _ in range(THREADS_MAX):
        weighing.ask(weighing.hang)
        await weighing.hanging.get()
    weighing.ask(unsolved)
    refused = weighing.answers.get_nowait()
    assert (refused.asking, refused.allocation) == ((1, THREADS_MAX + 1), None)
    assert refused.reason == FULL
    weighing.may_end.set()
    for _ in range(THREADS_MAX):
        await weighing.answered()
    weighing.ask(unsolved)
    assert (await weighing.answered()).allocation is not None, "those that have ended are forgotten"


async def test_what_goes_wrong_is_an_answer_and_the_next_one_is_right(weighing: Weighing) -> None:
    def broken(_: Columns) -> Solved:
        raise MemoryError("no room")

    weighing.ask(broken)
    failed = await weighing.answered()
    assert (failed.allocation, failed.reason) == (None, "MemoryError('no room')")
    weighing.ask(unsolved)
    assert (await weighing.answered()).allocation is not None


async def test_no_thread_is_started_after_the_beginning(
    weighing: Weighing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory `Thread.start` waits for one that has died. Who hangs is passed by."""

    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    for _ in range(THREADS_MAX - 1):
        weighing.ask(weighing.hang)
        await weighing.hanging.get()
    weighing.ask(unsolved)
    made = await weighing.answered()
    assert (made.asking, made.reason) == ((1, THREADS_MAX), "")
    assert made.allocation is not None
    with pytest.raises(OSError, match="the system has no thread left for allocation"):
        Allocator(weighing.answers.put_nowait)


async def test_an_order_of_the_core_is_answered_through_the_inbox() -> None:
    clock, store = VirtualClock(), MemoryStore(disk_with_a_running_job())
    core, logged = Coordinator(Options()), list[str]()
    core.load(await store.open(), clock.now_ms())
    shell = CoordinatorShell(core, store, clock, lambda level, event, fields: logged.append(event))
    answered = asyncio.Event()

    def post(made: AllocationMade) -> None:
        shell.allocation_made(made)
        answered.set()

    class Once(Allocator):
        """While its thread is at work no time passes, or the core would ask again meanwhile."""

        def make(self, asked: MakeAllocation) -> None:
            clock.ends_ms = 0
            super().make(asked)

    allocator = Once(post)
    shell.allocate_by(allocator)
    running = asyncio.create_task(shell.run())
    clock.ends_ms = 60_000
    await answered.wait()
    await shell.request(GetJob(1))  # it comes after the answer
    assert core.state.standing.made_ms is not None
    assert core.state.standing.asked is None
    assert "allocation.failed" not in logged
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    allocator.close()
