"""One agent's stream at the coordinator over real gRPC: how it ends when the agent misbehaves.

Safety: an agent that does not read is cut off, and the core hears of it at once; otherwise its node
would stay schedulable, and what is ordered there would never start. Liveness: whoever reads hears
why the session has ended.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest

from coordinator import agent_session, rpc
from coordinator.core import messages as m
from coordinator.core.coordinator import Coordinator
from coordinator.core.state import Options
from coordinator.main import SystemClock
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryStore
from protos.baton.v1 import agent_pb2, agent_pb2_grpc

DEADLINE_S = 30.0


class Watched(CoordinatorShell):
    """Tells which sessions have begun and ended."""

    def __init__(self) -> None:
        super().__init__(Coordinator(Options()), MemoryStore(), SystemClock(), lambda *_: None)
        self.begun: asyncio.Queue[int] = asyncio.Queue()
        self.ended: asyncio.Queue[int] = asyncio.Queue()
        self.told = 0

    def open_session(self, send: m.Send, close: object) -> int:  # type: ignore[override]
        session = super().open_session(send, close)  # type: ignore[arg-type]
        self.begun.put_nowait(session)
        return session

    def close_session(self, session: int) -> None:
        super().close_session(session)
        self.ended.put_nowait(session)


@dataclass
class World:
    shell: Watched
    channel: grpc.aio.Channel


@pytest.fixture
async def world() -> AsyncIterator[World]:
    shell, server = Watched(), grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(rpc.AgentService(shell), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield World(shell, channel)
    await server.stop(None)


async def test_an_agent_that_does_not_read_is_cut_off(world: World) -> None:
    call = agent_pb2_grpc.AgentServiceStub(world.channel).Session()
    await call.write(agent_pb2.SessionRequest(goodbye=agent_pb2.Goodbye()))
    async with asyncio.timeout(DEADLINE_S):
        session = await world.shell.begun.get()
        peer = world.shell._peers[session]
        order = m.KeepCheckpoints(tuple("0" * 64 for _ in range(256)))
        for _ in range(agent_session.ORDERS_MAX * 2):
            peer.send(order)
        assert await world.shell.ended.get() == session
        assert session not in world.shell._peers
        # The handler itself ends too, although nobody has read.
        assert await world.shell.ended.get() == session


async def test_an_agent_too_many_waits_on_its_stream(world: World) -> None:
    call = agent_pb2_grpc.AgentServiceStub(world.channel).Session()
    await call.write(agent_pb2.SessionRequest(goodbye=agent_pb2.Goodbye()))
    async with asyncio.timeout(DEADLINE_S):
        peer = world.shell._peers[await world.shell.begun.get()]
        peer.send(m.ComeLater(2_500))
        peer.send(m.EventAck(7))
        answer = await call.read()
        assert isinstance(answer, agent_pb2.SessionResponse)
        assert answer.come_later.wait.ToMilliseconds() == 2_500
        answer = await call.read()
        assert isinstance(answer, agent_pb2.SessionResponse)
        assert answer.event_ack.sequence == 7
        peer.close("test")


async def test_whoever_reads_hears_why(world: World) -> None:
    call = agent_pb2_grpc.AgentServiceStub(world.channel).Session()
    await call.write(agent_pb2.SessionRequest(goodbye=agent_pb2.Goodbye()))
    async with asyncio.timeout(DEADLINE_S):
        session = await world.shell.begun.get()
        world.shell._peers[session].close("a newer session took its place")
        with pytest.raises(grpc.aio.AioRpcError, match="a newer session") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_an_agent_that_has_ended_and_does_not_read_is_cut_off(world: World) -> None:
    call = agent_pb2_grpc.AgentServiceStub(world.channel).Session()
    await call.write(agent_pb2.SessionRequest(goodbye=agent_pb2.Goodbye()))
    async with asyncio.timeout(DEADLINE_S):
        session = await world.shell.begun.get()
        order = m.KeepCheckpoints(tuple("0" * 64 for _ in range(256)))
        for _ in range(500):
            world.shell._peers[session].send(order)
        await call.done_writing()
        assert await world.shell.ended.get() == session


async def test_an_order_that_cannot_be_written_ends_the_session(world: World) -> None:
    """The agent comes back, and is told again."""
    call = agent_pb2_grpc.AgentServiceStub(world.channel).Session()
    await call.write(agent_pb2.SessionRequest(goodbye=agent_pb2.Goodbye()))
    async with asyncio.timeout(DEADLINE_S):
        session = await world.shell.begun.get()
        world.shell._peers[session].send(m.EventAck(1 << 70))
        assert await world.shell.ended.get() == session
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
