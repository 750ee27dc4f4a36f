"""Loopback in the clear, everything else under mutual TLS: refused without, and real handshakes
with.

Safety: a caller without a certificate, or with one from another authority, reaches nothing; and a
client does not talk to a server from another authority either.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

import agent.https
import coordinator.https
import coordinator.transport
from agent.chunks.peers import PeerClient
from agent.chunks.store import ChunkStore
from agent.core.values import ReplicaSource
from agent.peer import PeerServer
from agent.ports import ChunkError
from agent.transport import Tls, TransportError, check_listen, listen, open_channel
from protos.baton.v1 import peer_pb2
from protos.baton.v1.peer_pb2_grpc import PeerServiceStub
from tests.agent.chunk_worlds import no_log
from tests.e2e.certificates import Authority, Key
from tests.wire.slow_link import slow_link

DIGEST = "ab" * 32
NEITHER = "its key is neither RSA nor ECDSA on P-256 or P-384"
READY, TRANSIENT_FAILURE = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
)


def issue(
    authority: Authority, name: str, trusting: Authority | None = None, key: Key | None = None
) -> Tls:
    """What this authority issues, for somebody who trusts it, or another one."""
    files = authority.issue(name, key)
    return Tls(str(files.cert), str(files.key), str((trusting or authority).path))


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "theirs")


@pytest.fixture
async def peer(tmp_path: Path, ours: Authority) -> AsyncIterator[ReplicaSource]:
    """A peer that listens beyond loopback, under mutual TLS."""
    store = ChunkStore(tmp_path / "chunks")
    store.open()
    server = PeerServer(store, no_log, address="0.0.0.0:0", tls=issue(ours, "server"))
    port = await server.open()
    yield ReplicaSource("n2", f"127.0.0.1:{port}")
    await server.close()


async def ask(peer: ReplicaSource, tls: Tls | None) -> list[str]:
    client = PeerClient(tls)
    try:
        return await client.find_missing(peer, [DIGEST])
    finally:
        await client.close()


async def test_the_right_certificate_is_accepted(peer: ReplicaSource, ours: Authority) -> None:
    assert await ask(peer, issue(ours, "client")) == [DIGEST]


async def test_a_handshake_may_take_longer_than_the_pause_between_tries(
    peer: ReplicaSource, ours: Authority
) -> None:
    with slow_link(peer.address) as address:
        assert await ask(replace(peer, address=address), issue(ours, "client")) == [DIGEST]


async def test_no_tls_at_all_is_refused(peer: ReplicaSource) -> None:
    with pytest.raises(ChunkError, match="n2"):
        await ask(peer, None)


async def test_a_client_without_a_certificate_is_refused(
    peer: ReplicaSource, ours: Authority
) -> None:
    credentials = grpc.ssl_channel_credentials(ours.path.read_bytes())
    async with grpc.aio.secure_channel(peer.address, credentials) as channel:
        stub = PeerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.FindMissing(peer_pb2.FindMissingRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_of_another_authority_is_refused(
    peer: ReplicaSource, ours: Authority, theirs: Authority
) -> None:
    stranger = issue(theirs, "stranger", trusting=ours)
    with pytest.raises(ChunkError, match="n2"):
        await ask(peer, stranger)


async def test_a_server_of_another_authority_is_not_talked_to(
    peer: ReplicaSource, ours: Authority, theirs: Authority
) -> None:
    distrusting = issue(ours, "client", trusting=theirs)
    with pytest.raises(ChunkError, match="n2"):
        await ask(peer, distrusting)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:7070", "127.9.9.9:0", "[::1]:7070", "localhost:7070", "unix:/run/baton/x.sock"],
)
def test_loopback_needs_no_tls(address: str) -> None:
    check_listen(address, None)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:7070",
        "[::]:7070",
        "10.0.0.1:7070",
        ":7070",
        "7070",
        "*:7070",
        "",
        "localhost.example.org:7070",
        "127.0.0.1.example.org:7070",
        "127.0.0.1:1,0.0.0.0:7070",
        "dns:///0.0.0.0:7070",
    ],
)
def test_anything_else_is_refused_without_tls_and_accepted_with(address: str) -> None:
    with pytest.raises(TransportError) as caught:
        check_listen(address, None)
    assert str(caught.value) == (
        f"listening on {address} needs mutual TLS: "
        "give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1"
    )
    check_listen(address, Tls("cert", "key", "ca"))


async def test_listen_itself_refuses(tmp_path: Path) -> None:
    server = PeerServer(ChunkStore(tmp_path), no_log, address="0.0.0.0:0", tls=None)
    with pytest.raises(TransportError, match="needs mutual TLS"):
        await server.open()


async def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tls = Tls(str(tmp_path / "no.pem"), str(tmp_path / "no.key"), str(tmp_path / "no-ca.pem"))
    with pytest.raises(TransportError, match=r"cannot read .*no-ca\.pem: No such file"):
        open_channel("127.0.0.1:1", tls)
    with pytest.raises(TransportError, match=r"cannot read .*no\.key: No such file"):
        listen(grpc.aio.server(), "0.0.0.0:0", tls)


@pytest.mark.parametrize("doubt", [agent.https.doubt, coordinator.https.doubt])
def test_what_no_peer_would_take_is_named_before_anybody_calls(
    doubt: Callable[..., str], ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    good, other = issue(ours, "good"), issue(ours, "other")
    foreign = issue(theirs, "foreign", trusting=ours)
    for serves in (False, True):
        assert doubt(good, serves=serves) == ""
        said = f"{foreign.cert_path}, by {ours.path}: unable to get local issuer certificate"
        assert doubt(foreign, serves=serves) == said
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing\n")
    for files, said in (
        (replace(good, key_path=other.key_path), f"{other.key_path} is not the key of the"),
        (replace(good, cert_path=str(wrong)), f"{wrong} is no certificate, or"),
        (replace(good, ca_path=str(wrong)), f"{wrong} has no certificate in PEM"),
    ):
        with pytest.raises((TransportError, coordinator.transport.TransportError), match=said):
            doubt(files)


@pytest.mark.parametrize("doubt", [agent.https.doubt, coordinator.https.doubt])
async def test_what_grpc_takes_stops_nobody(
    doubt: Callable[..., str], ours: Authority, theirs: Authority
) -> None:
    """An authority below a root that is not in the file; a key too short for OpenSSL."""
    theirs.vouch_for(ours)
    files = issue(ours, "good")
    assert await channel_opens(files)
    assert doubt(files) == ""
    weak = issue(ours, "weak", key=rsa.generate_private_key(65537, 1024))  # noqa: S505 - on purpose
    assert await channel_opens(weak)
    assert doubt(weak) == f"{weak.cert_path}, by OpenSSL: EE_KEY_TOO_SMALL"


@pytest.mark.parametrize(
    ("key", "taken"),
    [
        (ec.generate_private_key(ec.SECP256R1()), True),
        (ec.generate_private_key(ec.SECP384R1()), True),
        (rsa.generate_private_key(65537, 2048), True),
        (ec.generate_private_key(ec.SECP521R1()), False),
        (ed25519.Ed25519PrivateKey.generate(), False),
        (ed448.Ed448PrivateKey.generate(), False),
    ],
    ids=["p256", "p384", "rsa", "p521", "ed25519", "ed448"],
)
async def test_a_key_that_grpc_does_not_take_is_named(
    ours: Authority, key: Key, taken: bool
) -> None:
    files = issue(ours, "node", key=key)
    assert await channel_opens(files) is taken
    doubts: list[Callable[..., str]] = [agent.https.doubt, coordinator.https.doubt]
    for doubt in doubts:
        said = doubt(files)
        assert said == ("" if taken else f"{files.cert_path}, by gRPC: {NEITHER}")


async def channel_opens(tls: Tls) -> bool:
    """Or the server does not listen, or it cannot be talked to."""
    server = grpc.aio.server()
    try:
        port = listen(server, "127.0.0.1:0", tls)
    except TransportError:
        return False
    await server.start()
    patient = (("grpc.min_reconnect_backoff_ms", 60_000),)  # that is the limit of a handshake, too
    async with open_channel(f"127.0.0.1:{port}", tls, patient) as channel:
        state = channel.get_state(try_to_connect=True)
        while state not in (READY, TRANSIENT_FAILURE):
            await channel.wait_for_state_change(state)
            state = channel.get_state()
    await server.stop(None)
    return state is READY


async def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path)
    first = PeerServer(store, no_log, address="127.0.0.1:0", tls=None)
    address = f"127.0.0.1:{await first.open()}"
    said = f"cannot listen on {address}: another program listens there already"
    with pytest.raises(TransportError, match=said):
        await PeerServer(store, no_log, address=address, tls=None).open()
    await first.close()


async def test_why_nobody_can_listen_is_said_in_words(ours: Authority) -> None:
    """Also where it is no address of this machine (of a documentation's network, RFC 5737), and
    where the system would take it and gRPC does not."""
    with pytest.raises(TransportError) as caught:
        listen(grpc.aio.server(), "203.0.113.7:7071", issue(ours, "good"))
    assert str(caught.value) == "cannot listen on 203.0.113.7:7071: Cannot assign requested address"
    files = issue(ours, "node", key=ed448.Ed448PrivateKey.generate())
    with pytest.raises(TransportError, match=f"gRPC does not take {files.cert_path} with its key"):
        listen(grpc.aio.server(), "127.0.0.1:0", files)
