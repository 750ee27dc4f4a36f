"""The link of the simulation and the one over gRPC, by the same tests.

Problem: what hundreds of fault plans prove, they prove over the link of `tests/sim`. Where that one
promised more than gRPC keeps (an order, a sentence, an end that both sides hear of), they would
prove it of a network that nobody has. So each test here runs over both, from the agent's port to
the coordinator's shell.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import pytest

from agent.core import messages as am
from agent.core.values import HostFacts
from agent.ports import LinkClosed, Session
from agent.uplink import GrpcUplink
from coordinator import rpc
from coordinator.core import messages as m
from coordinator.core.coordinator import Coordinator
from coordinator.core.state import Options
from coordinator.main import SystemClock
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryStore
from protos.baton.v1 import agent_pb2_grpc
from tests.sim.link import Connection, Weather

DEADLINE_S = 30.0
MANY = 200  # more than one flight of packets
HOST = HostFacts("box", "", 8, 1 << 30, "", "1")


class Ear(CoordinatorShell):
    """Which sessions have begun and ended, and what was said in them."""

    def __init__(self) -> None:
        super().__init__(Coordinator(Options()), MemoryStore(), SystemClock(), lambda *_: None)
        self.begun: asyncio.Queue[int] = asyncio.Queue()
        self.heard: asyncio.Queue[m.AgentMessage] = asyncio.Queue()
        self.ended: asyncio.Queue[int] = asyncio.Queue()

    def open_session(self, send: m.Send, close: object) -> int:  # type: ignore[override]
        session = super().open_session(send, close)  # type: ignore[arg-type]
        self.begun.put_nowait(session)
        return session

    def from_agent(self, session: int, message: m.AgentMessage) -> None:
        self.heard.put_nowait(message)

    def close_session(self, session: int) -> None:
        if session in self._peers:
            self.ended.put_nowait(session)
        super().close_session(session)


@dataclass
class Link:
    """`die`: the coordinator's process is gone at once."""

    shell: Ear
    dial: Callable[[], Awaitable[Session]]
    die: Callable[[], Awaitable[None]]

    async def open(self) -> tuple[Session, int]:
        """A session at both ends."""
        agent = await self.dial()
        await agent.send(am.Goodbye(None))
        session = await self.shell.begun.get()
        assert await self.shell.heard.get() == m.Goodbye(None)
        return agent, session

    def order(self, session: int, *orders: m.AgentOrder) -> None:
        for order in orders:
            self.shell._peers[session].send(order)


@dataclass
class Air:
    """Fine weather, and a coordinator that is always scheduled."""

    shell: CoordinatorShell | None
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def fired(self, kind: str) -> None:
        raise AssertionError(f"{kind} in fine weather")

    def trace(self, line: str) -> None:
        pass

    def do(self, work: Callable[[], None]) -> None:
        work()


async def simulated(shell: Ear) -> AsyncIterator[Link]:
    air, opened = Air(shell), list[Connection]()

    async def dial() -> Connection:
        opened.append(Connection(air, Weather(), air, shell))
        opened[-1].open()
        return opened[-1]

    async def die() -> None:
        for connection in opened:
            connection.coordinator_died()

    yield Link(shell, dial, die)


async def over_grpc(shell: Ear) -> AsyncIterator[Link]:
    server = grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(rpc.AgentService(shell), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Link(shell, GrpcUplink(f"127.0.0.1:{port}", None).dial, lambda: server.stop(None))
    await server.stop(None)


@pytest.fixture(params=[simulated, over_grpc])
async def link(request: pytest.FixtureRequest) -> AsyncIterator[Link]:
    async with asyncio.timeout(DEADLINE_S):
        async for made in request.param(Ear()):
            yield made


async def test_what_is_said_arrives_in_order_and_once(link: Link) -> None:
    agent, session = await link.open()
    for sequence in range(1, MANY + 1):
        await agent.send(am.AgentEvent(sequence, 7, "1.1", am.AttemptStarted(1)))
    heard = [await link.shell.heard.get() for _ in range(MANY)]
    assert [each.sequence for each in heard if isinstance(each, m.AgentEvent)] == [
        *range(1, MANY + 1)
    ]
    link.order(session, *(m.EventAck(sequence) for sequence in range(1, MANY + 1)))
    told = [await agent.receive() for _ in range(MANY)]
    assert told == [am.EventAck(sequence) for sequence in range(1, MANY + 1)]
    await agent.close()
    assert await link.shell.ended.get() == session
    assert link.shell.heard.empty()


async def test_who_closes_hears_it_and_so_does_the_coordinator(link: Link) -> None:
    agent, session = await link.open()
    reader = asyncio.create_task(agent.receive())
    await asyncio.sleep(0)
    await agent.close()
    with pytest.raises(LinkClosed, match="closed"):
        await reader
    with pytest.raises(LinkClosed):
        await agent.send(am.Goodbye(None))
    assert await link.shell.ended.get() == session
    await agent.close()


async def test_orders_that_were_given_come_before_the_end_and_its_sentence(link: Link) -> None:
    agent, session = await link.open()
    link.order(session, m.EventAck(1), m.EventAck(2))
    link.shell._peers[session].close("a newer session took its place")
    assert [await agent.receive(), await agent.receive()] == [am.EventAck(1), am.EventAck(2)]
    with pytest.raises(LinkClosed, match="a newer session took its place"):
        await agent.receive()
    assert await link.shell.ended.get() == session
    with pytest.raises(LinkClosed):
        await agent.send(am.Goodbye(None))
    await agent.close()


async def test_what_makes_no_sense_ends_the_session_with_the_reason(link: Link) -> None:
    agent, session = await link.open()
    await agent.send(am.Hello("No Name!", "j", "n1:1", HOST, (), (), ()))
    with pytest.raises(LinkClosed, match="'No Name!' is no node name"):
        await agent.receive()
    assert await link.shell.ended.get() == session
    assert link.shell.heard.empty()
    await agent.close()


async def test_a_coordinator_that_dies_ends_the_session(link: Link) -> None:
    agent, _ = await link.open()
    reader = asyncio.create_task(agent.receive())
    await asyncio.sleep(0)
    await link.die()
    with pytest.raises(LinkClosed):
        await reader
    with pytest.raises(LinkClosed):
        await agent.send(am.Goodbye(None))
    await agent.close()


async def test_a_second_session_takes_nothing_from_the_first(link: Link) -> None:
    first, first_number = await link.open()
    second, second_number = await link.open()
    assert first_number != second_number
    link.order(first_number, m.EventAck(1))
    link.order(second_number, m.EventAck(2))
    assert [await second.receive(), await first.receive()] == [am.EventAck(2), am.EventAck(1)]
    await first.close()
    assert await link.shell.ended.get() == first_number
    link.order(second_number, m.EventAck(3))
    assert await second.receive() == am.EventAck(3)
    await second.close()
