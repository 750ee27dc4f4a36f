"""Certificates that are renewed, or expire, while programs run and connections are open.

Liveness: who connects after a renewal is shown the new certificate and judged by the new authority,
without a signal or a restart; files that are half replaced change nothing. Safety: an authority
that was taken out of the file lets nobody in any more.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

import agent.certificates
import agent.https
import agent.transport
import coordinator.certificates
import coordinator.https
import coordinator.transport
from agent.chunks.peers import PeerClient
from agent.chunks.store import ChunkStore
from agent.core.values import ReplicaSource
from agent.peer import PeerServer
from agent.ports import ChunkError
from agent.transport import Tls
from protos.baton.v1 import peer_pb2
from protos.baton.v1.peer_pb2_grpc import PeerServiceStub
from tests.agent.chunk_worlds import no_log
from tests.e2e.certificates import Authority, Files

DIGEST = "ab" * 32
FIND = peer_pb2.FindMissingRequest(digests=[DIGEST])
DEADLINE_S = 30.0
# Of one program: its modules transport, https and certificates.
PROGRAMS = (
    (agent.transport, agent.https, agent.certificates),
    (coordinator.transport, coordinator.https, coordinator.certificates),
)


@pytest.fixture
def first(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "first")


@pytest.fixture
def second(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "second")


def tls_of(files: Files, made: type[Any] = Tls) -> Any:
    return made(str(files.cert), str(files.key), str(files.ca))


def replace(files: Files, by: Files) -> None:
    """As `install` does it: each file is another one at once, and the three one after another."""
    for old, new in ((files.cert, by.cert), (files.key, by.key), (files.ca, by.ca)):
        renewed = old.with_suffix(".new")
        renewed.write_bytes(new.read_bytes())
        renewed.replace(old)


async def over_grpc(port: int, as_: Files) -> bool:
    """Whether a connection comes about. No such service is there."""
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", as_.credentials()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await PeerServiceStub(channel).FindMissing(FIND, timeout=DEADLINE_S)
    return caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def over_https(port: int, as_: Files) -> bool:
    context = agent.https.context(ssl.PROTOCOL_TLS_CLIENT, tls_of(as_))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        read = await reader.read()
        writer.close()
    except OSError:
        return False
    return read == b"hello"


@pytest.fixture(params=PROGRAMS, ids=["agent", "coordinator"])
def program(request: pytest.FixtureRequest) -> tuple[ModuleType, ModuleType, ModuleType]:
    found: tuple[ModuleType, ModuleType, ModuleType] = request.param
    return found


async def by_grpc(transport: ModuleType, _: ModuleType, files: Files) -> tuple[int, Any]:
    server = grpc.aio.server()
    port = transport.listen(server, "127.0.0.1:0", tls_of(files, transport.Tls))
    await server.start()
    return port, lambda: server.stop(None)


async def by_https(transport: ModuleType, https: ModuleType, files: Files) -> tuple[int, Any]:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    context = https.renewing(tls_of(files, transport.Tls))
    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)

    async def stop() -> None:
        server.close()

    return server.sockets[0].getsockname()[1], stop


@pytest.mark.parametrize(
    ("serve", "opens"), [(by_grpc, over_grpc), (by_https, over_https)], ids=["grpc", "https"]
)
async def test_who_connects_after_a_renewal_is_shown_the_new_certificate(
    program: tuple[ModuleType, ModuleType, ModuleType],
    serve: Callable[..., Awaitable[tuple[int, Any]]],
    opens: Callable[[int, Files], Awaitable[bool]],
    first: Authority,
    second: Authority,
) -> None:
    files, known = first.issue("server"), first.issue("a-user")
    # What `replace` writes over must not be what a client trusts.
    known.ca.with_name("theirs.pem").write_bytes(known.ca.read_bytes())
    known = Files(known.cert, known.key, known.ca.with_name("theirs.pem"))
    unknown = second.issue("a-user")
    port, stop = await serve(*program[:2], files)
    assert (await opens(port, known), await opens(port, unknown)) == (True, False)
    whole = files.key.read_bytes()
    files.key.write_bytes(unknown.key.read_bytes())  # of no certificate that is there
    assert await opens(port, known)
    files.key.unlink()
    assert await opens(port, known)
    files.key.write_bytes(whole)
    replace(files, second.issue("server"))
    # Also one who trusts the new authority, and has a certificate of the old one.
    mixed = Files(known.cert, known.key, second.path)
    assert await opens(port, unknown)
    assert not await opens(port, known)
    assert not await opens(port, mixed)
    await stop()


def call_again(
    port: int, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[bytes, ssl.SSLSession | None]:
    """What the server says, and the session to be taken up the next time."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as bare,
        context.wrap_socket(bare, server_hostname="127.0.0.1", session=session) as connection,
    ):
        return connection.recv(5), connection.session


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_of_before_lets_nobody_in_whose_authority_is_gone(
    program: tuple[ModuleType, ...], first: Authority, second: Authority, version: ssl.TLSVersion
) -> None:
    files, known = first.issue("server"), first.issue("a-user")
    context = agent.https.context(ssl.PROTOCOL_TLS_CLIENT, tls_of(known))
    context.load_verify_locations(second.path)
    context.maximum_version = version
    port, stop = await by_https(program[0], program[1], files)
    said, session = await asyncio.to_thread(call_again, port, context, None)
    assert said == b"hello"
    again, _ = await asyncio.to_thread(call_again, port, context, session)
    assert again == b"hello"
    replace(files, second.issue("server"))
    try:
        late, _ = await asyncio.to_thread(call_again, port, context, session)
    except OSError:
        late = b""
    assert late == b""
    await stop()


def test_a_file_that_may_be_read_at_last_is_another_one(
    program: tuple[ModuleType, ...], first: Authority
) -> None:
    """Who copies as root and gives it away afterwards changes none of its bytes."""
    files = first.issue("server")
    tls = tls_of(files, program[0].Tls)
    before = tls.stamp()
    assert tls.stamp() == before
    end_s = time.monotonic() + DEADLINE_S
    while tls.stamp() == before and time.monotonic() < end_s:  # a file system's clock may be coarse
        files.cert.chmod(0o640)
    assert tls.stamp() != before


async def test_what_is_connected_outlives_its_certificate_and_who_connects_does_not(
    first: Authority,
) -> None:
    server = grpc.aio.server()
    files, user = first.issue("server"), first.issue("a-user")
    port = agent.transport.listen(server, "127.0.0.1:0", tls_of(files))
    await server.start()
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", user.credentials()) as channel:
        await channel.channel_ready()
        first.issue("server", left=-timedelta(minutes=1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await PeerServiceStub(channel).FindMissing(FIND, timeout=DEADLINE_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert not await over_grpc(port, user)
        first.issue("server")
        assert await over_grpc(port, user)
    await server.stop(None)


async def test_peers_are_called_with_the_renewed_certificate(
    first: Authority, tmp_path: Path
) -> None:
    """A channel that is kept would connect anew with the one that has expired."""
    store = ChunkStore(tmp_path / "chunks")
    store.open()
    served, mine = first.issue("n2"), first.issue("n1", left=-timedelta(minutes=1))
    server = PeerServer(store, no_log, address="127.0.0.1:0", tls=tls_of(served))
    peer = ReplicaSource("n2", f"127.0.0.1:{await server.open()}")
    client = PeerClient(tls_of(mine))
    with pytest.raises(ChunkError):
        await client.find_missing(peer, [DIGEST])
    first.issue("n1")
    assert await client.find_missing(peer, [DIGEST]) == [DIGEST]
    with client._calling(peer) as stub:  # a call that is under way ends on its own channel
        first.issue("n1")
        assert await client.find_missing(peer, [DIGEST]) == [DIGEST]
        assert (await stub.FindMissing(FIND)).digests == [DIGEST]
    await client.close()
    await server.close()


class Log:
    """What was emitted, and a sleep that ends the watch after so many looks."""

    def __init__(self, looks: int) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []
        self._looks = looks
        self.before_look: dict[int, Callable[[], object]] = {}
        self.look = 0

    def emit(self, level: str, event: str, fields: tuple[tuple[str, object], ...]) -> None:
        self.lines.append((level, event, dict(fields)))

    async def sleep(self, _: float) -> None:
        self.look += 1
        if self.look > self._looks:
            raise asyncio.CancelledError
        self.before_look.pop(self.look, lambda: None)()


async def watched(program: tuple[ModuleType, ...], files: Files, log: Log) -> None:
    transport, _, certificates = program
    with pytest.raises(asyncio.CancelledError):
        await certificates.watch(tls_of(files, transport.Tls), log.emit, sleep=log.sleep)


async def test_that_a_certificate_will_expire_is_said_once_a_day(
    program: tuple[ModuleType, ...], first: Authority
) -> None:
    long = first.issue("long", left=timedelta(days=15))
    # The authority of the tests lives for an hour: it is what ends first.
    log = Log(program[2].LOOKS_PER_DAY * 2)
    await watched(program, long, log)
    assert [event for _, event, _ in log.lines] == ["tls.expiring"] * 3
    level, _, fields = log.lines[0]
    assert (level, fields["file"], fields["days"]) == ("warning", str(first.path), 0)


async def test_the_days_that_are_left_are_counted(
    program: tuple[ModuleType, ...], tmp_path: Path
) -> None:
    lasting = Authority(tmp_path / "lasting", left=timedelta(days=400))
    log = Log(0)
    for days in (13, 15):
        await watched(program, lasting.issue("n1", left=timedelta(days=days, hours=1)), log)
    (line,) = log.lines
    assert line[1] == "tls.expiring"
    assert (line[2]["file"], line[2]["days"]) == (str(tmp_path / "lasting/n1.pem"), 13)


async def test_what_expires_under_way_is_said_then_and_not_a_day_later(
    program: tuple[ModuleType, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenSSL says it, which has no clock but the system's."""
    lasting = Authority(tmp_path / "lasting", left=timedelta(days=400))
    files = lasting.issue("n1", left=timedelta(days=30))
    log = Log(4)
    transport, _, certificates = program
    asked: list[object] = []

    def judge(tls: object) -> object:
        asked.append(tls)
        doubt = "n1.pem: certificate has expired" if len(asked) > 1 else ""
        return program[1].Judged(doubt, "n1.pem", 0.0 if doubt else 100.0)

    def now_s() -> float:
        return 10.0 + 40.0 * log.look

    monkeypatch.setattr(program[1], "judge", judge)
    tls = tls_of(files, transport.Tls)
    with pytest.raises(asyncio.CancelledError):
        await certificates.watch(tls, log.emit, now_s=now_s, sleep=log.sleep)
    assert [event for _, event, _ in log.lines] == ["tls.expiring", "tls.doubted"]
    assert log.look == 5


async def test_a_renewal_is_told_when_all_its_files_are_there(
    program: tuple[ModuleType, ...], tmp_path: Path
) -> None:
    lasting = Authority(tmp_path / "lasting", left=timedelta(days=400))
    files = lasting.issue("n1", left=timedelta(days=30))
    other = lasting.issue("other", left=timedelta(days=60))
    log = Log(10)
    log.before_look[2] = lambda: files.key.write_bytes(other.key.read_bytes())
    log.before_look[3] = lambda: files.cert.write_bytes(other.cert.read_bytes())
    log.before_look[6] = lambda: lasting.issue("n1", left=-timedelta(minutes=1))
    await watched(program, files, log)
    assert [event for _, event, _ in log.lines] == ["tls.renewed", "tls.doubted"]
    assert log.lines[1][2]["reason"] == f"{files.cert}, by {files.ca}: certificate has expired"


def test_both_programs_watch_with_the_same_text() -> None:
    texts = [Path(str(it.__file__)).read_text() for _, _, it in PROGRAMS]
    assert texts[0].replace("agent", "coordinator") == texts[1].replace("agent", "coordinator")
