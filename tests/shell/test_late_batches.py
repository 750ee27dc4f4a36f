"""What an agent says while the disk is full is handled a minute later, and was said then. Nor is
anybody blamed for the minute that it takes to read a large store."""

import asyncio

from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import (
    AgentEvent,
    AttemptExited,
    AttemptMilestone,
    GetJob,
    HeldAttempt,
    Hello,
)
from coordinator.core.model import HostFacts
from coordinator.core.phases import NodePhase
from coordinator.core.state import Options
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryStore
from tests.shell.test_demand_shell import GPUS, VirtualClock, disk_with_a_running_job


async def test_an_event_that_waits_for_a_batch_is_as_old_as_when_it_came() -> None:
    clock, disk, logged = VirtualClock(), disk_with_a_running_job(), list[str]()
    core, store = Coordinator(Options()), MemoryStore(disk)
    core.load(await store.open(), clock.now_ms())
    shell = CoordinatorShell(core, store, clock, lambda level, event, fields: logged.append(event))
    running = asyncio.create_task(shell.run())
    session = shell.open_session(lambda order: None, lambda reason: None)
    held = HeldAttempt("1.1", tuple(gpu.uuid for gpu in GPUS[:3]))
    shell.from_agent(session, Hello("n1", "j", "a", HostFacts(), GPUS, (held,)))
    await shell.request(GetJob(1))  # after the hello
    disk.fail_next(120)  # half a second apart
    loaded = AttemptMilestone("load")
    shell.from_agent(session, AgentEvent(1, clock.unix_ms(), "1.1", loaded, age_ms=0))
    while "store.unavailable" not in logged:
        clock.ends_ms += 500
        await asyncio.sleep(0)
    said_unix_ms, before = clock.unix_ms(), clock.now_ms()
    shell.from_agent(session, AgentEvent(2, said_unix_ms, "1.1", AttemptExited(0), age_ms=0))
    await clock.run_to(2)
    assert disk.failures == 120
    assert clock.now_ms() - before > 50_000
    assert core.state.attempts["1.1"].times.silent_unix_ms == said_unix_ms
    assert "node.clock" not in logged
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await store.close()


async def test_a_node_is_not_lost_for_the_time_that_the_store_was_read() -> None:
    clock, options = VirtualClock(), Options()
    core, store = Coordinator(options), MemoryStore(disk_with_a_running_job())
    core.load(await store.open(), clock.now_ms())
    clock.passed_ms += 10 * options.restart_grace_ms
    shell = CoordinatorShell(core, store, clock, lambda level, event, fields: None)
    running = asyncio.create_task(shell.run())
    await shell.request(GetJob(1))
    assert core.state.nodes["n1"].phase is NodePhase.SUSPECT
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await store.close()
