"""The decision over all jobs in its thread, and its way through the real loop."""

import asyncio
import threading

from coordinator.allocator import Allocator
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
    """An allocator at work, and what it has answered."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[AllocationMade] = asyncio.Queue()
        self.allocator = Allocator(self.answers.put_nowait)
        self.asked = 0

    def ask(self, solve: Solve) -> None:
        self.asked += 1
        asking, capacity = (1, self.asked), {"H100": 1}
        self.allocator.make(MakeAllocation(asking, (WAITS,), capacity, 0, Aims(), {}, solve))


async def test_the_loop_goes_on_while_it_is_solved() -> None:
    loop, began, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow(columns: Columns) -> Solved:
        loop.call_soon_threadsafe(began.set)
        assert may_end.wait(PATIENCE_S), "the loop stands still"
        return unsolved(columns)

    weighing = Weighing()
    running = asyncio.create_task(weighing.allocator.run())
    weighing.ask(slow)
    await began.wait()
    weighing.ask(unsolved)
    weighing.ask(unsolved)
    may_end.set()
    made = [await weighing.answers.get(), await weighing.answers.get()]
    assert [each.asking for each in made] == [(1, 1), (1, 3)], "the newest, not one after another"
    assert all(each.allocation is not None and 1 in each.allocation.grants for each in made)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_goes_wrong_is_an_answer_and_the_next_one_is_right() -> None:
    def broken(_: Columns) -> Solved:
        raise MemoryError("no room")

    weighing = Weighing()
    running = asyncio.create_task(weighing.allocator.run())
    weighing.ask(broken)
    failed = await weighing.answers.get()
    assert (failed.allocation, failed.reason) == (None, "MemoryError('no room')")
    weighing.ask(unsolved)
    assert (await weighing.answers.get()).allocation is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_an_order_of_the_core_is_answered_through_the_inbox() -> None:
    clock, store = VirtualClock(), MemoryStore(disk_with_a_running_job())
    core, logged = Coordinator(Options()), list[str]()
    core.load(await store.open(), clock.now_ms())
    shell = CoordinatorShell(core, store, clock, lambda level, event, fields: logged.append(event))
    answered = asyncio.Event()

    def post(made: AllocationMade) -> None:
        shell.allocation_made(made)
        answered.set()

    allocator = Allocator(post)
    shell.allocate_by(allocator)
    beside = [asyncio.create_task(shell.run()), asyncio.create_task(allocator.run())]
    clock.ends_ms = 60_000
    await answered.wait()
    await shell.request(GetJob(1))  # it comes after the answer
    assert core.state.standing.made_ms is not None
    assert core.state.standing.asked is None
    assert "allocation.failed" not in logged
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
