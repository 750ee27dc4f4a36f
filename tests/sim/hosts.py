"""The two programs, as processes that can be killed, suspended and started again.

Each start makes what `main.py` makes: a core from what the disk holds, fakes for the ports, and the
real shell around it. A kill cancels the shell's task wherever it waits; what was not on a disk is
gone.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Options as AgentOptions
from agent.core.trainer_messages import TrainerMessage
from agent.ports import LinkClosed, Ports
from agent.shell import AgentShell
from agent.telemetry.xid_table import load_table
from coordinator.core import messages as cm
from coordinator.core.coordinator import Coordinator
from coordinator.core.model import JobEvent, Snapshot
from coordinator.core.state import Options as CoordinatorOptions
from coordinator.core.weighing import answer
from coordinator.ports import LeaderLost, StoreUnavailable
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryDisk, MemoryStore
from tests.events.checking import check
from tests.sim.box import (
    Box,
    SimJournal,
    SimProbe,
    SimProcesses,
    SimSlabs,
    SimTrainers,
    SimWorkspace,
    SimXids,
    Surroundings,
)
from tests.sim.chunks import SimChunks
from tests.sim.link import DIAL_TIMEOUT_MS, LATENCY_MS, Air, Connection, Weather

UNIX_MS = 1_790_000_000_000


class Around(Surroundings, Air, Protocol):
    """What hosts ask of the world."""

    coordinator: "CoordinatorHost"
    deposed: "list[CoordinatorHost]"


class HostClock:
    """Starts somewhere at every boot, runs a little fast or slow, never goes back; wall time
    jumps."""

    def __init__(self, around: Around, drift_ratio: float) -> None:
        self._around = around
        self._drift_ratio = drift_ratio
        self._base_ms = 0.0
        self.gate: asyncio.Event | None = None
        self.wall_jump_ms = 0

    def boot(self) -> None:
        loop_ms = asyncio.get_running_loop().time() * 1000
        self._base_ms = self._around.chance.randint(1_000, 10_000_000) - loop_ms * self._drift_ratio

    def now_ms(self) -> int:
        return int(self._base_ms + asyncio.get_running_loop().time() * 1000 * self._drift_ratio)

    def unix_ms(self) -> int:
        return UNIX_MS + self._around.now_ms() + self.wall_jump_ms

    async def sleep_ms(self, duration_ms: int) -> None:
        await asyncio.sleep(duration_ms / 1000 / self._drift_ratio)
        if self.gate is not None:
            await self.gate.wait()


class AgentHost:
    """A box and the agent on it. Implements `Uplink` and `Chance` for the agent as well."""

    def __init__(self, box: Box, around: Around, drift_ratio: float) -> None:
        self.box = box
        self.weather = Weather()
        self.clock = HostClock(around, drift_ratio)
        self.shell: AgentShell | None = None
        self.core: NodeCore | None = None
        self.journal: SimJournal | None = None
        self.task: asyncio.Task[None] | None = None
        self.connections: list[Connection] = []
        self.busy = False  # some fault has this box in its hands
        self.gone = False  # it never comes back
        self.peers_cut = False
        self._around = around

    @property
    def up(self) -> bool:
        return self.task is not None

    @property
    def connected(self) -> bool:
        return any(c.agent_open and c.coordinator_open for c in self.connections)

    def power_on(self) -> None:
        self.clock.gate = self.box.gate
        self.box.power_on()
        self.clock.boot()
        self.start()

    def power_off(self) -> None:
        self.kill(power=True)
        self.box.power_off()

    def start(self) -> None:
        name = self.box.name
        launch = LaunchOptions(name, "/run/sim", "/attempts", "python", ())
        self.journal = journal = SimJournal(self.box)
        options = AgentOptions(f"{name}:7000", launch, xids=load_table())
        self.core = NodeCore(options, journal.open())
        trainers = SimTrainers(self.box, SimSlabs(), self._said)
        self.box.socket = trainers
        ports = Ports(
            self.clock, self, SimProbe(self.box), SimProcesses(self.box), SimWorkspace(self.box),
            trainers, trainers.slabs, SimChunks(self.box), journal, self, self._log, _at_once,
            SimXids(self.box),
        )  # fmt: skip
        self.shell = AgentShell(self.core, ports)
        self.task = asyncio.get_running_loop().create_task(self.shell.run())
        self.task.add_done_callback(self._ended)
        self._around.trace(f"{name} agent starts")

    def kill(self, power: bool = False) -> None:
        if self.task is None:
            return
        self._around.trace(f"{self.box.name} agent is killed")
        self.task.cancel()
        self._let_go()
        self.box.gate.set()
        for connection in self.connections:
            connection.agent_died(power)
        self.connections.clear()

    def _let_go(self) -> None:
        self.task = self.shell = self.core = None
        self.box.on_exit = self.box.socket = self.box.on_xid = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if task.exception() is not None:
            task.result()  # a bug: the loop's exception handler ends the run
        if task is self.task:
            self._let_go()

    def _said(self, attempt_id: str, message: object) -> None:
        if self.shell is not None:
            assert isinstance(message, TrainerMessage)
            self.shell.on_trainer_message(attempt_id, message)

    def _log(self, level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        check("agent", level, event, fields)
        self._around.trace(f"{self.box.name} {level} {event} {_fields(fields)}")

    # --- Chance -----------------------------------------------------------------------------------

    def token(self) -> str:
        return f"{self._around.chance.getrandbits(128):032x}"

    def draw(self) -> float:
        return self._around.chance.random()

    # --- Uplink -----------------------------------------------------------------------------------

    async def dial(self) -> Connection:
        around, weather = self._around, self.weather
        await around.pause_ms(*LATENCY_MS)
        # While two believe that they lead, an address may lead to either.
        coordinator = around.chance.choice((around.coordinator, *around.deposed))
        half = weather.up_silent or weather.down_silent
        if weather.cut or half or not coordinator.gate.is_set():
            await asyncio.sleep(DIAL_TIMEOUT_MS / 1000)
            raise LinkClosed("no coordinator answers")
        if coordinator.shell is None:
            raise LinkClosed("connection refused")
        connection = Connection(around, weather, coordinator, coordinator.shell)
        connection.open()
        self.connections = [c for c in self.connections if c.agent_open or c.coordinator_open]
        self.connections.append(connection)
        return connection


async def _at_once(work: Callable[..., object], *arguments: object) -> object:
    await asyncio.sleep(0)
    return work(*arguments)


def _fields(fields: tuple[tuple[str, object], ...]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields)


class SimStore:
    """The coordinator's disk takes its time, may be full, and may say so though it was not."""

    def __init__(self, host: "CoordinatorHost", around: Around) -> None:
        self._host = host
        self._around = around
        self._inner = MemoryStore(host.disk)
        self.busy = False
        self._written: Sequence[cm.Record] = ()

    async def open(self) -> Snapshot:
        return await self._inner.open()

    async def commit(self, records: Sequence[cm.Record]) -> None:
        self.busy = True
        await self._around.pause_ms(1, 15)
        await self._host.gate.wait()
        if self._host.full:
            self._around.fired("store_full")
            raise StoreUnavailable("database or disk is full")
        if self._host.unsure:
            self._host.unsure = False
            self._host.disk.fail_next(1, take_effect=True)
            self._around.fired("store_unsure")
        try:
            await self._inner.commit(records)
        except StoreUnavailable:
            self._written = records
            self._around.checkers.committed(records)
            raise
        if records is not self._written:  # else it is there twice, which must be as good as once
            self._around.checkers.committed(records)
        await self._around.pause_ms(0, 5)
        await self._host.gate.wait()
        self.busy = False

    async def events(self, job_id: int, after_sequence: int, limit: int) -> list[JobEvent]:
        return await self._inner.events(job_id, after_sequence, limit)

    async def close(self) -> None:
        await self._inner.close()


class SimAllocating:
    """Who decides over all jobs: he answers after a while, now and then never or twice, and tells
    the successor what an earlier process has asked. His chance is his own: a fault strikes whom it
    struck before there was anything to decide."""

    def __init__(self, host: "CoordinatorHost", chance: random.Random) -> None:
        self._host = host
        self._chance = chance

    def make(self, asked: cm.MakeAllocation) -> None:
        chance, loop = self._chance, asyncio.get_running_loop()
        for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 1, 2))):
            loop.call_later(chance.uniform(0.0, 3.0), self._host.do, lambda: self._told(asked))

    def _told(self, asked: cm.MakeAllocation) -> None:
        if self._host.shell is not None:
            self._host.shell.allocation_made(answer(asked))


class CoordinatorHost:
    def __init__(self, around: Around, disk: MemoryDisk) -> None:
        self.disk = disk
        self.clock = HostClock(around, 1.0)
        self.gate = asyncio.Event()  # closed while the process is suspended
        self.gate.set()
        self.full = False
        self.unsure = False
        self.shell: CoordinatorShell | None = None
        self.core: Coordinator | None = None
        self.store: SimStore | None = None
        self.task: asyncio.Task[None] | None = None
        self._around = around
        self._held: list[Callable[[], None]] = []

    async def start(self) -> None:
        self.clock.gate = self.gate
        self.clock.boot()
        self.store = SimStore(self, self._around)
        snapshot = await self.store.open()
        self._around.checkers.loaded(snapshot)
        self.core = Coordinator(CoordinatorOptions())
        self.core.load(snapshot, self.clock.now_ms())
        self.shell = CoordinatorShell(self.core, self.store, self.clock, self._log)
        self.shell.allocate_by(SimAllocating(self, random.Random(self.clock.now_ms())))
        self.task = asyncio.get_running_loop().create_task(self.shell.run())
        self.task.add_done_callback(self._ended)
        self._around.trace(f"coordinator starts with leader epoch {snapshot.leader_epoch}")

    def kill(self) -> None:
        if self.task is not None:
            self._around.trace("coordinator is killed")
            self.task.cancel()
        self.task = self.shell = self.core = self.store = None
        self._held.clear()
        self.gate.set()

    def crowd(self, ahead_ms: int) -> None:
        """As if so many agents stood in line that the next is let in after this."""
        if self.core is not None:
            self.core.state.admission.free_us = (self.clock.now_ms() + ahead_ms) * 1_000

    def stall(self) -> None:
        self.gate.clear()

    def resume(self) -> None:
        self.gate.set()
        held, self._held = self._held, []
        for work in held:
            work()

    def do(self, work: Callable[[], None]) -> None:
        """What the network hands to the process waits while it is suspended."""
        if self.gate.is_set():
            work()
        else:
            self._held.append(work)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        if not isinstance(task.exception(), LeaderLost):
            task.result()  # a bug: the loop's exception handler ends the run
        self._around.trace("a deposed coordinator stops")
        self.kill()

    def _log(self, level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        check("coordinator", level, event, fields)
        if event == "node.lost" and self.core is not None:
            live = self.core.state.nodes[str(dict(fields)["node"])]
            self._around.checkers.lost(live.node.id, live.expected_ms - self.clock.now_ms())
        self._around.trace(f"coordinator {level} {event} {_fields(fields)}")
