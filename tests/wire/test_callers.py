"""Who is let into which service, over real handshakes: users give work, nodes join, and neither
does what is the other's."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest

import agent.callers
import coordinator.callers
import coordinator.transport
from agent.chunks.store import ChunkStore
from agent.peer import PeerServer
from agent.transport import Tls
from coordinator import rpc
from coordinator.access import Access, der_of, own_of
from coordinator.callers import Caller, Guard
from coordinator.core.coordinator import Coordinator
from coordinator.core.state import Options
from coordinator.main import SystemClock
from coordinator.peers import LogReader
from coordinator.shell import CoordinatorShell
from coordinator.store.memory import MemoryStore
from protos.baton.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    nodes_pb2,
    nodes_pb2_grpc,
    peer_pb2,
    peer_pb2_grpc,
)
from tests.agent.chunk_worlds import no_log
from tests.e2e.certificates import Authority, Files

DEADLINE_S = 30.0


@pytest.fixture
def fleet(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "fleet")


@asynccontextmanager
async def serving(
    authority: Authority, *users: str, named: str = "head"
) -> AsyncIterator[tuple[str, Files]]:
    """A coordinator whose fleet has the node n1: its address, and its own certificate."""
    own = authority.issue(named)
    tls = coordinator.transport.Tls(str(own.cert), str(own.key), str(own.ca))
    access = Access(users, own_of(tls), lambda name: name == "n1")
    server = grpc.aio.server(interceptors=[Guard(access.refuse_user, but_for=(rpc.AGENTS,))])
    store, core, clock = MemoryStore(), Coordinator(Options()), SystemClock()
    core.load(await store.open(), clock.now_ms())
    shell = CoordinatorShell(core, store, clock, lambda *_: None)
    reader = LogReader(lambda _: pytest.fail("nobody is asked for logs"))
    await rpc.add_services(
        server,
        shell,
        store,
        logs=reader,
        open_channel=lambda _: pytest.fail("nobody is called"),
        access=access,
    )
    port = coordinator.transport.listen(server, "127.0.0.1:0", tls)
    await server.start()
    running = asyncio.create_task(shell.run())
    yield f"127.0.0.1:{port}", own
    await server.stop(None)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


Call = Callable[[grpc.aio.Channel], Awaitable[None]]


async def refused(call: Call, address: str, as_: Files) -> str:
    """What it is told, or nothing where it is let in."""
    async with grpc.aio.secure_channel(address, as_.credentials()) as channel:
        try:
            await call(channel)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                return str(error.details())
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
    return ""


async def list_nodes(channel: grpc.aio.Channel) -> None:
    stub = nodes_pb2_grpc.NodeServiceStub(channel)
    await stub.ListNodes(nodes_pb2.ListNodesRequest(), timeout=DEADLINE_S)


async def follow_logs(channel: grpc.aio.Channel) -> None:
    """Answers stream; there is no such job."""
    stub = jobs_pb2_grpc.JobServiceStub(channel)
    async for _ in stub.StreamLogs(jobs_pb2.StreamLogsRequest(job_id=1), timeout=DEADLINE_S):
        pass


async def find_missing(channel: grpc.aio.Channel) -> None:
    stub = peer_pb2_grpc.PeerServiceStub(channel)
    await stub.FindMissing(peer_pb2.FindMissingRequest(), timeout=DEADLINE_S)


def joining(node: str) -> Call:
    async def join(channel: grpc.aio.Channel) -> None:
        call = agent_pb2_grpc.AgentServiceStub(channel).Session(timeout=DEADLINE_S)
        hello = agent_pb2.Hello(node=node, journal_id="j")
        await call.write(agent_pb2.SessionRequest(hello=hello))
        await call.read()

    return join


@pytest.mark.parametrize("call", [list_nodes, follow_logs])
async def test_a_node_gives_no_work_and_whoever_is_none_does(fleet: Authority, call: Call) -> None:
    async with serving(fleet) as (address, own):
        told = await refused(call, address, fleet.issue("n1"))
        assert "the certificate names node n1" in told
        for name in ("ann", "n2"):
            assert await refused(call, address, fleet.issue(name)) == ""
        # One certificate for everything: what the coordinator may, who has its key may.
        assert await refused(call, address, own) == ""


async def test_the_certificate_for_everything_may_do_everything_after_its_renewal(
    fleet: Authority,
) -> None:
    """It names a node, too: the coordinator's own machine has an agent."""
    async with serving(fleet, named="n1") as (address, own):
        for _ in range(2):
            assert await refused(list_nodes, address, own) == ""
            assert await refused(joining("n1"), address, own) == ""
            before = own.credentials()
            fleet.issue("n1")
        async with grpc.aio.secure_channel(address, before) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="the certificate names node n1"):
                await list_nodes(channel)


def test_who_is_user_and_node_by_one_certificate_is_told_the_way_out() -> None:
    """One that was issued for a box and whoever works there: with `users` it is both."""
    both = Caller(("ann", "n1", "localhost"))
    told = Access(is_node=lambda name: name == "n1").refuse_user(both)
    assert told.startswith("the certificate names node n1, and nodes run jobs and give none")
    assert told.endswith("or list the user that it names as well in the coordinator's 'users'")
    listed = Access(users=("ann",), is_node=lambda name: name == "n1")
    assert (listed.refuse_user(both), listed.refuse_node(both, "n1")) == ("", "")


async def test_users_that_are_listed_are_all_there_are_and_no_nodes(fleet: Authority) -> None:
    async with serving(fleet, "ann", "*.people.example", "head") as (address, own):
        for name in ("ann", "ben.people.example"):
            assert await refused(list_nodes, address, fleet.issue(name)) == ""
            told = await refused(joining(name), address, fleet.issue(name))
            assert f"{name} is a user's name" in told
        for name in ("n1", "n2", "prometheus", "annette"):
            told = await refused(list_nodes, address, fleet.issue(name))
            assert told.startswith(f"the certificate names {name}, localhost, 127.0.0.1, who is")
            assert await refused(joining(name), address, fleet.issue(name)) == ""
        assert await refused(list_nodes, address, own) == ""
        assert await refused(joining("head"), address, own) == ""


async def test_nobody_joins_as_whom_the_certificate_does_not_name(fleet: Authority) -> None:
    async with serving(fleet) as (address, _):
        told = await refused(joining("n1"), address, fleet.issue("ann"))
        assert told.startswith("the certificate names ann, localhost, 127.0.0.1, not node n1")


async def test_whoever_is_no_peer_reads_no_checkpoint(fleet: Authority, tmp_path: Path) -> None:
    store = ChunkStore(tmp_path / "chunks")
    store.open()
    own = fleet.issue("n1")
    tls = Tls(str(own.cert), str(own.key), str(own.ca))
    callers = ("head", "n*")
    server = PeerServer(store, no_log, address="127.0.0.1:0", tls=tls, callers=callers)
    address = f"127.0.0.1:{await server.open()}"
    for name in ("head", "n2"):
        assert await refused(find_missing, address, fleet.issue(name)) == ""
    told = await refused(find_missing, address, fleet.issue("ann"))
    assert told.startswith("the certificate names ann,")
    await server.close()


def test_a_certificate_is_the_same_however_it_is_written(fleet: Authority) -> None:
    pem = fleet.issue("head").cert.read_bytes()
    assert der_of(b"chain of head\n" + pem + fleet.path.read_bytes()) == der_of(pem) != b""
    assert der_of(b"") == der_of(b"-----BEGIN CERTIFICATE-----\n!") == b""
    assert Access().refuse_node(Caller(("n1",)), "n1") == ""


def test_both_programs_have_the_same_text() -> None:
    texts = [Path(str(it.__file__)).read_text() for it in (agent.callers, coordinator.callers)]
    assert texts[0] == texts[1]
