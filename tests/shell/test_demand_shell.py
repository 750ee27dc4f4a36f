"""The real loop over virtual minutes, its store and its forecaster: what becomes of demand when the
disk is full and the coordinator is restarted.

Problem: each part may be right and the wiring lose every sample. So here they are put together as
`main.py` does it, and only the clock is not real.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from coordinator.core.coordinator import Coordinator
from coordinator.core.demand_history import MINUTE_MS, Series
from coordinator.core.messages import PutAttempt, PutJob, PutNode
from coordinator.core.model import Attempt, GpuFacts, HostFacts, Job, JobSpec, Node
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Options
from coordinator.forecast.live import LiveForecaster
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryDisk, MemoryStore

BEGIN_MIN = 29_833_320
GPUS = tuple(GpuFacts(f"g{n}", "NVIDIA H100 80GB HBM3", 80 * 10**9) for n in range(4))
H100 = Series("H100")


class VirtualClock:
    """An hour passes as fast as the loop goes round, while `ends_ms` is not reached."""

    def __init__(self) -> None:
        self.passed_ms = 0
        self.ends_ms = 0
        self.reached = asyncio.Event()

    def now_ms(self) -> int:
        return self.passed_ms

    def unix_ms(self) -> int:
        return BEGIN_MIN * MINUTE_MS + self.passed_ms

    async def sleep_ms(self, duration_ms: int) -> None:
        while self.passed_ms >= self.ends_ms:
            self.reached.set()
            await asyncio.sleep(0)
        self.passed_ms += duration_ms
        await asyncio.sleep(0)

    async def run_to(self, minute: int) -> None:
        self.ends_ms = minute * MINUTE_MS
        self.reached.clear()
        await self.reached.wait()


@asynccontextmanager
async def serving(disk: MemoryDisk, clock: VirtualClock) -> AsyncIterator[Coordinator]:
    store = MemoryStore(disk)
    core = Coordinator(Options())
    core.load(await store.open(), clock.now_ms())
    shell = CoordinatorShell(core, store, clock, lambda level, event, fields: None)
    forecaster = LiveForecaster({}, shell.forecast_made)
    shell.forecast_by(forecaster)
    beside = [asyncio.create_task(shell.run()), asyncio.create_task(forecaster.run())]
    try:
        yield core
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await store.close()


def disk_with_a_running_job() -> MemoryDisk:
    disk = MemoryDisk()
    job = Job(1, JobSpec(command=("x",), gpus=3), JobPhase.ACTIVE, 0, epoch=1)
    uuids = tuple(gpu.uuid for gpu in GPUS[:3])
    disk.commit(
        [
            PutNode(Node("n1", "j", "a", HostFacts(), GPUS)),
            PutJob(job),
            PutAttempt(Attempt(1, 1, "n1", uuids, AttemptPhase.RUNNING, 0)),
        ]
    )
    return disk


async def test_samples_outlive_a_restart_and_what_was_not_committed_is_unknown() -> None:
    disk, clock = disk_with_a_running_job(), VirtualClock()
    async with serving(disk, clock) as core:
        await clock.run_to(5)
        seen = core.state.demand_history.read(1, BEGIN_MIN, 5, H100)
    assert seen == [3.0] * 5
    clock.passed_ms = 8 * MINUTE_MS + 1
    async with serving(disk, clock) as core:
        await clock.run_to(10)
        seen = core.state.demand_history.read(1, BEGIN_MIN, 10, H100)
    assert seen[:5] == [3.0] * 5
    assert seen[6:8] == [None, None]
    assert seen[8:] == [3.0, 3.0]


async def test_a_full_disk_makes_a_gap_and_no_zero() -> None:
    disk, clock = disk_with_a_running_job(), VirtualClock()
    async with serving(disk, clock) as core:
        await clock.run_to(2)
        disk.fail_next(600)  # tries, half a second apart: five minutes at least
        await clock.run_to(20)
        seen = core.state.demand_history.read(1, BEGIN_MIN, 20, H100)
    kept = [step - BEGIN_MIN for period_min, step in sorted(disk.demand) if period_min == 1]
    assert disk.failures == 600
    assert dict.fromkeys(seen) == {3.0: None, None: None}
    gap = [minute for minute, gpus in enumerate(seen) if gpus is None]
    assert len(gap) >= 4
    assert gap == list(range(gap[0], gap[0] + len(gap)))
    assert [minute for minute in range(20) if minute not in gap] == kept[: 20 - len(gap)]


async def test_forecasts_come_back_through_the_inbox() -> None:
    clock = VirtualClock()
    async with serving(disk_with_a_running_job(), clock) as core:
        await clock.run_to(1)
        while core.state.forecast is None:
            clock.ends_ms += MINUTE_MS
            await asyncio.sleep(0)
        came_ms, made = core.state.forecast
    (h100,) = made.types
    assert h100.gpu_type == "H100"
    assert 3.0 <= h100.soon_gpus[0] < h100.soon_gpus[-1] < h100.later_gpus[-1]
    assert made.minute <= BEGIN_MIN + came_ms // MINUTE_MS
