"""The stream to the coordinator over real gRPC: how a session ends, whoever ends it.

Safety: a session that this side closes ends its reader with `LinkClosed`, as any other end does. A
cancellation passed on would end the task that keeps the link, and the agent would never dial again.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from agent.core.messages import Goodbye, Welcome
from agent.ports import LinkClosed
from agent.transport import Tls
from agent.uplink import GrpcSession, GrpcUplink
from protos.baton.v1 import agent_pb2, agent_pb2_grpc
from tests.e2e.certificates import Authority

DEADLINE_S = 60.0  # for a handshake on a busy machine; reached only when the test fails


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.uplink.DIAL_TIMEOUT_S", DEADLINE_S)


class Coordinator(agent_pb2_grpc.AgentServiceServicer):
    """Welcomes an agent that has said something, then holds the line or ends the call."""

    def __init__(self) -> None:
        self.ending = ""

    async def Session(
        self, request_iterator: AsyncIterator[agent_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[agent_pb2.SessionResponse]:
        async for _ in request_iterator:
            if self.ending:
                await context.abort(grpc.StatusCode.ABORTED, self.ending)
            second = duration_pb2.Duration(seconds=1)
            welcome = agent_pb2.Welcome(leader_epoch=3, heartbeat_interval=second, lease=second)
            yield agent_pb2.SessionResponse(welcome=welcome)


@pytest.fixture
async def coordinator() -> AsyncIterator[tuple[Coordinator, str]]:
    """One that listens, and its address."""
    server, servicer = grpc.aio.server(), Coordinator()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


async def welcomed(address: str) -> GrpcSession:
    """A session on which both sides have spoken."""
    session = await GrpcUplink(address, None).dial()
    await session.send(Goodbye(None))
    order = await session.receive()
    assert isinstance(order, Welcome)
    assert order.leader_epoch == 3
    return session


async def test_close_ends_a_waiting_reader(coordinator: tuple[Coordinator, str]) -> None:
    session = await welcomed(coordinator[1])
    reader = asyncio.create_task(session.receive())
    await asyncio.sleep(0)
    await session.close()
    with pytest.raises(LinkClosed, match="this agent closed the session"):
        await reader
    with pytest.raises(LinkClosed):
        await session.send(Goodbye(None))
    with pytest.raises(LinkClosed):
        await session.receive()


async def test_cancelling_the_reader_is_a_cancellation(
    coordinator: tuple[Coordinator, str],
) -> None:
    session = await welcomed(coordinator[1])
    reader = asyncio.create_task(session.receive())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await session.close()


async def test_the_coordinators_sentence_arrives(coordinator: tuple[Coordinator, str]) -> None:
    servicer, address = coordinator
    session = await welcomed(address)
    servicer.ending = "a newer session took its place"
    await session.send(Goodbye(None))
    with pytest.raises(LinkClosed, match="a newer session took its place"):
        await session.receive()
    await session.close()


async def test_nobody_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.uplink.DIAL_TIMEOUT_S", 0.05)
    with pytest.raises(LinkClosed, match="no coordinator answers at"):
        await GrpcUplink("127.0.0.1:1", None).dial()


async def test_nobody_but_the_coordinator_gives_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate of another node, of the fleet's own authority, does not make one of it."""
    fleet = Authority(tmp_path / "fleet")
    ours = fleet.issue("n1")
    # who is taken is waited for; nobody else is, however long
    for host, is_taken, timeout_s in (("127.0.0.1", True, DEADLINE_S), ("n2", False, 1.0)):
        monkeypatch.setattr("agent.uplink.DIAL_TIMEOUT_S", timeout_s)
        server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServiceServicer_to_server(Coordinator(), server)
        theirs = fleet.issue("n2", host=host).server_credentials()
        port = server.add_secure_port("127.0.0.1:0", theirs)
        await server.start()
        uplink = GrpcUplink(f"127.0.0.1:{port}", Tls(str(ours.cert), str(ours.key), str(ours.ca)))
        if is_taken:
            await (await uplink.dial()).close()
        else:
            with pytest.raises(LinkClosed, match="or TLS with it fails"):
                await uplink.dial()
        await server.stop(None)


async def test_a_certificate_that_is_being_replaced_is_no_end(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pem")
    with pytest.raises(LinkClosed, match="cannot read"):
        await GrpcUplink("127.0.0.1:1", Tls(absent, absent, absent)).dial()
