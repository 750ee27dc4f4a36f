"""The real loop, its store, the real actuator and a driver that goes wrong: what becomes of a node.

Problem: the core is right about drivers that lie, the actuator about drivers that hang, and the
wiring may lose an answer. So here they are put together as `main.py` does it; only the clock and
the machines are not real. An agent is heard exactly while its machine has power.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.capacity.actuator import Actuator, Group
from coordinator.capacity.driver import State
from coordinator.capacity.journal import Journal
from coordinator.capacity.simulated import Fault, Simulated, Wrong
from coordinator.core import power, rentals
from coordinator.core.bursts import Burst
from coordinator.core.capacity_model import Power
from coordinator.core.capacity_orders import Verb
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import Heartbeat, Hello
from coordinator.core.model import GpuFacts, HostFacts
from coordinator.core.node_power import PowerOptions
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Rules
from coordinator.core.state import Instant, Options
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryDisk, MemoryStore

NAMES = ("n1", "n2", "n3")
RENTED = "r1"
STEP_MS = 250
DEADLINE_MS = 600_000
# Virtual minutes pass while a thread writes the journal; they must not be anybody's deadline.
PATIENCE_MS = 86_400_000


class SteppedClock:
    """Who sleeps is woken when the test has moved the clock so far."""

    def __init__(self) -> None:
        self._now_ms = 0
        self._sleepers: list[tuple[int, asyncio.Future[None]]] = []

    def now_ms(self) -> int:
        return self._now_ms

    def unix_ms(self) -> int:
        return 1_790_000_000_000 + self._now_ms

    async def sleep_ms(self, duration_ms: int) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now_ms + duration_ms, waiting))
        await waiting

    def step(self) -> None:
        self._now_ms += STEP_MS
        for due_ms, waiting in self._sleepers:
            if due_ms <= self._now_ms and not waiting.done():
                waiting.set_result(None)
        self._sleepers = [each for each in self._sleepers if not each[1].done()]


@dataclass
class House:
    """What outlives a coordinator: disk, journal, machines. `sessions`: by node that is heard."""

    folder: Path
    driver: Simulated
    disk: MemoryDisk = field(default_factory=MemoryDisk)
    clock: SteppedClock = field(default_factory=SteppedClock)
    sessions: dict[str, int] = field(default_factory=dict)
    beats: int = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Coordinator]:
        store = MemoryStore(self.disk)
        options = PowerOptions(
            acts=True, boot_deadline_ms=PATIENCE_MS, stop_deadline_ms=PATIENCE_MS
        )
        rules = Rules(bursts={"H100": Burst(2.0, gpus_per_node=1)}, budget_usd_per_day=100.0)
        scaling = ScalingOptions(rules, names={"H100": {RENTED: None}})
        core = Coordinator(Options(power=options, scaling=scaling))
        core.load(await store.open(), self.clock.now_ms())
        shell = CoordinatorShell(core, store, self.clock, lambda level, event, fields: None)
        journal = Journal(self.folder / "capacity.jsonl")
        journal.open()
        group = Group("rack", self.driver, DEADLINE_MS)
        groups = dict.fromkeys((*NAMES, RENTED), group)
        actuator = Actuator(
            groups,
            journal,
            self.clock,
            shell.actuated,
            is_up=shell.is_up,
            log=lambda level, event, fields: None,
        )
        shell.act_through(actuator)
        self.shell, self.core, self.sessions = shell, core, {}
        running = asyncio.create_task(shell.run())
        try:
            await self.until(lambda: all(self.power(name) for name in NAMES))
            yield core
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await actuator.close()
            await store.close()

    def power(self, name: str) -> Power | None:
        live = self.core.state.nodes.get(name)
        return None if live is None else live.node.power.phase

    def go(self, name: str) -> None:
        state = self.core.state
        now = Instant(self.clock.now_ms(), self.clock.unix_ms())
        power.go(state, now, state.nodes[name], "demand is low")

    def rent(self) -> None:
        now = Instant(self.clock.now_ms(), self.clock.unix_ms())
        assert rentals.rent(self.core.state, now, RENTED, "a queue")

    def start(self, name: str) -> None:
        state = self.core.state
        now = Instant(self.clock.now_ms(), self.clock.unix_ms())
        power.start(state, now, state.nodes[name], "demand is coming")

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.clock.step()
            self._agents()
            for _ in range(10):
                await asyncio.sleep(0)

    async def live(self, duration_ms: int) -> None:
        end_ms = self.clock.now_ms() + duration_ms
        await self.until(lambda: self.clock.now_ms() >= end_ms)

    def _agents(self) -> None:
        self.beats += 1
        for name in (*NAMES, RENTED):
            on = self.driver.states.get(name) is State.ON
            if not on and name in self.sessions:
                self.shell.close_session(self.sessions.pop(name))
            elif on and name not in self.sessions:
                session = self.shell.open_session(lambda order: None, lambda reason: None)
                gpus = (GpuFacts(f"{name}-g0", "NVIDIA H100 80GB HBM3", 80 * 10**9),)
                hello = Hello(name, f"j-{name}", f"{name}:1", HostFacts(), gpus)
                self.sessions[name] = session
                self.shell.from_agent(session, hello)
            elif on:
                self.shell.from_agent(self.sessions[name], Heartbeat(self.beats))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path, Simulated(dict.fromkeys(NAMES, State.ON)))


ENDS = {
    Wrong.HANG: Power.ON,
    Wrong.LIE: Power.ON,
    Wrong.FAIL: Power.ON,
    Wrong.LATE: Power.OFF,
    Wrong.TWICE: Power.OFF,
}


@pytest.mark.parametrize("wrong", Wrong)
async def test_a_node_is_where_its_machine_is_whatever_its_driver_does(
    house: House, wrong: Wrong
) -> None:
    fault = Fault("n3", Verb.SUSPEND, wrong)
    house.driver.faults = [fault]
    async with house.serving():
        house.go("n3")
        await house.until(lambda: house.power("n3") in (Power.ON, Power.OFF))
        assert house.power("n3") is ENDS[wrong]
        assert (house.driver.states["n3"] is State.ON) is (ENDS[wrong] is Power.ON)
        others = [house.power(name) for name in ("n1", "n2")]
    assert fault.fired == 1
    assert others == [Power.ON, Power.ON]


@pytest.mark.parametrize("wrong", [None, *Wrong])
async def test_a_node_that_is_wanted_comes_up_in_the_end(house: House, wrong: Wrong | None) -> None:
    house.driver.faults = [] if wrong is None else [Fault("n3", Verb.RESUME, wrong)]
    async with house.serving():
        house.go("n3")
        await house.until(lambda: house.power("n3") is Power.OFF)
        house.start("n3")
        await house.until(lambda: house.power("n3") is Power.ON)
        assert house.core.state.nodes["n3"].node.intent.value == "open"
    assert all(fault.fired for fault in house.driver.faults)


async def test_a_coordinator_that_dies_after_the_order_switches_nothing_twice(house: House) -> None:
    async with house.serving():
        house.go("n3")
        await house.until(lambda: ("n3", Verb.SUSPEND) in house.driver.deeds)
    async with house.serving():
        await house.until(lambda: house.power("n3") is Power.OFF)
        await house.live(60_000)
    assert house.driver.deeds == [("n3", Verb.SUSPEND)]


@pytest.mark.parametrize("wrong", [None, *Wrong])
async def test_a_rented_machine_is_heard_or_there_is_none(
    house: House, wrong: Wrong | None
) -> None:
    """Whatever its driver does while it is made. Who says "done" and did nothing, and who hangs, is
    abandoned at the deadline, and what there may be is deleted."""
    house.driver.faults = [] if wrong is None else [Fault(RENTED, Verb.CREATE, wrong)]
    async with house.serving():
        house.rent()
        await house.until(lambda: house.power(RENTED) in (Power.ON, Power.OFF))
        assert (house.driver.states.get(RENTED) is State.ON) is (house.power(RENTED) is Power.ON)
        came = wrong in (None, Wrong.LATE, Wrong.TWICE)
        assert house.power(RENTED) is (Power.ON if came else Power.OFF)
    assert [verb for _, verb in house.driver.deeds].count(Verb.CREATE) <= 2
    assert all(fault.fired for fault in house.driver.faults)


@pytest.mark.parametrize("wrong", [None, *Wrong])
async def test_a_rented_machine_is_paid_for_as_long_as_it_is_there(
    house: House, wrong: Wrong | None
) -> None:
    house.driver.faults = [] if wrong is None else [Fault(RENTED, Verb.DELETE, wrong)]
    async with house.serving():
        house.rent()
        await house.until(lambda: house.power(RENTED) is Power.ON)
        house.go(RENTED)
        await house.until(lambda: house.power(RENTED) in (Power.ON, Power.OFF, Power.FAILED))
        its = house.core.state.nodes[RENTED].node.power
        there = house.driver.states[RENTED] is State.ON
        assert (its.rents[-1].end_unix_ms is None) is there
        assert (its.phase is Power.OFF) is not there


async def test_a_coordinator_that_dies_after_the_order_rents_no_second_machine(
    house: House,
) -> None:
    async with house.serving():
        house.rent()
        await house.until(lambda: (RENTED, Verb.CREATE) in house.driver.deeds)
    async with house.serving():
        await house.until(lambda: house.power(RENTED) is Power.ON)
        await house.live(60_000)
    assert house.driver.deeds == [(RENTED, Verb.CREATE)]
