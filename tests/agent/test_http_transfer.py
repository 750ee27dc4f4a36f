"""Chunks over HTTP(S): who is let in, what is served, and what is taken. Real sockets on loopback.

Safety: no chunk leaves or enters without a token for a checkpoint that names it; nothing that does
not match its digest is kept; with TLS, nobody without a certificate of the fleet says anything.
"""

import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from agent import https
from agent.chunks import http_client, http_server
from agent.chunks import peers as peers_module
from agent.chunks.http_client import Access, Broken, Link
from agent.chunks.http_server import (
    FETCH,
    PUSH,
    REFUSAL_HEADER,
    Busy,
    ChunkHttpServer,
    Refused,
    Transfers,
)
from agent.chunks.manifest import (
    decode,
    digest_of,
)
from agent.chunks.peers import PeerClient
from agent.chunks.store import ChunkStore
from agent.core.values import ReplicaSource
from agent.peer import PeerServer
from agent.transport import Tls, TransportError
from protos.baton.v1 import peer_pb2
from protos.baton.v1.peer_pb2_grpc import (
    PeerServiceServicer,
    PeerServiceStub,
    add_PeerServiceServicer_to_server,
)
from tests.agent.chunk_worlds import Node, age, no_log, objects, running
from tests.agent.http_worlds import (
    DATA,
    FIRST,
    FIRST_DIGEST,
    LIFE_MS,
    WANTED,
    World,
    linked,
    made_of,
    transfers_in,
)
from tests.agent.test_transport import issue
from tests.e2e.certificates import Authority

# --- tokens ---------------------------------------------------------------------------------------


def test_a_token_opens_the_chunks_of_its_checkpoint_and_no_others(world: World) -> None:
    digest, manifest = world.keep(DATA)
    other = world.keep(b"other")[0]
    token = world.transfers.grant(FETCH, digest, manifest, LIFE_MS)
    assert world.ask("GET", f"/chunks/{FIRST_DIGEST}", token)[2] == FIRST
    wrong = {
        "not named by its manifest": f"/chunks/{digest_of(b'other')}",
        "a manifest, not a chunk": f"/chunks/{other}",
        "a path": "/chunks/..%2f..%2fmanifests",
    }
    for why, path in wrong.items():
        status, headers, said = world.ask("GET", path, token)
        assert (status, headers[REFUSAL_HEADER]) == (403, "1"), why
        assert b"names no chunk" in said


def test_there_is_nothing_to_list(world: World) -> None:
    digest, manifest = world.keep(DATA)
    token = world.transfers.grant(FETCH, digest, manifest, LIFE_MS)
    for path in ("/", "/chunks", "/chunks/", f"/objects/{FIRST_DIGEST[:2]}/{FIRST_DIGEST}"):
        assert world.ask("GET", path, token)[0] == 404, path


@pytest.mark.parametrize(
    "forge",
    [
        lambda token: "",
        lambda token: "nonsense",
        lambda token: token[:-1],
        lambda token: token.replace(".1.1.", ".2.1.", 1),
        lambda token: token.replace(".1.1.", ".1.2.", 1),
        lambda token: token.replace(FETCH, PUSH),
        lambda token: ".".join([*token.split(".")[:4], "9999999", token.split(".")[5]]),
        lambda token: ".".join([*token.split(".")[:3], "ab" * 32, *token.split(".")[4:]]),
        lambda token: "x" * 4000,
    ],
    ids="none nonsense short job epoch direction expiry digest long".split(),
)
def test_a_token_for_anything_else_is_refused(world: World, forge: Callable[[str], str]) -> None:
    digest, manifest = world.keep(DATA)
    token = world.transfers.grant(FETCH, digest, manifest, LIFE_MS)
    status, headers, said = world.ask("GET", f"/chunks/{FIRST_DIGEST}", forge(token))
    assert (status, headers["WWW-Authenticate"], headers[REFUSAL_HEADER]) == (401, "Bearer", "1")
    assert b"token" in said


def test_a_token_of_another_agent_or_direction_is_refused(tmp_path: Path, world: World) -> None:
    digest, manifest = world.keep(DATA)
    foreign = Transfers(world.store, world.clock).grant(FETCH, digest, manifest, LIFE_MS)
    world.transfers.grant(FETCH, digest, manifest, LIFE_MS)
    assert world.ask("GET", f"/chunks/{FIRST_DIGEST}", foreign)[0] == 401
    push = world.transfers.grant(PUSH, digest, manifest, LIFE_MS)
    assert world.ask("GET", f"/chunks/{FIRST_DIGEST}", push)[0] == 403


def test_a_token_ends(world: World) -> None:
    digest, manifest = world.keep(DATA)
    token = world.transfers.grant(FETCH, digest, manifest, LIFE_MS)
    world.clock.now_ms += LIFE_MS - 1
    assert world.ask("HEAD", f"/chunks/{FIRST_DIGEST}", token)[0] == 200
    # Another transfer of the same checkpoint does not bring this token back.
    world.transfers.grant(FETCH, digest, manifest, LIFE_MS)
    world.clock.now_ms += 1
    status, _, said = world.ask("GET", f"/chunks/{FIRST_DIGEST}", token)
    assert (status, said) == (401, b"the token has expired\n")


def test_grants_are_bounded_and_make_room_when_they_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "GRANTED_CHUNKS_MAX", 6)
    first, second = world.keep(DATA), world.keep(DATA, epoch=2)
    world.transfers.grant(FETCH, *first, LIFE_MS)
    world.transfers.grant(FETCH, *first, LIFE_MS)
    with pytest.raises(Busy, match="1 transfers of 4 chunks are open already"):
        world.transfers.grant(FETCH, *second, LIFE_MS)
    world.clock.now_ms += LIFE_MS
    world.transfers.grant(FETCH, *second, LIFE_MS)


def test_connections_and_arriving_chunks_are_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, manifest = world.keep(DATA)
    path = f"/chunks/{FIRST_DIGEST}"
    fetch = world.transfers.grant(FETCH, digest, manifest, LIFE_MS)
    push = world.transfers.grant(PUSH, digest, manifest, LIFE_MS)
    monkeypatch.setattr(http_server, "REQUESTS_MAX", 0)
    assert world.ask("PUT", path, push, FIRST)[2] == b"0 chunks are arriving already\n"
    assert world.ask("GET", path, fetch)[0] == 200
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 0)
    for verb, token in (("GET", fetch), ("PUT", push)):
        status, headers, said = world.ask(verb, path, token, FIRST if verb == "PUT" else None)
        assert (status, headers["Connection"]) == (503, "close")
        assert said == b"0 connections are open already\n"


# --- what is served and taken ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("0-0", 0, 1),
        ("5-", 5, None),
        ("100-199", 100, 200),
        ("-7", -7, None),
        ("9-99999999", 9, None),
    ],
)
def test_a_range_is_those_bytes(world: World, asked: str, start: int, end: int | None) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    status, headers, body = world.ask(
        "GET", f"/chunks/{FIRST_DIGEST}", token, Range=f"bytes={asked}"
    )
    first, last, _ = slice(start, end).indices(len(FIRST))
    assert status == 206
    assert headers["Content-Range"] == f"bytes {first}-{last - 1}/{len(FIRST)}"
    assert body == FIRST[start:end]


def test_head_and_ranges_beyond_the_end(world: World) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    path = f"/chunks/{FIRST_DIGEST}"
    status, headers, body = world.ask("HEAD", path, token)
    assert (status, headers["Content-Length"], body) == (200, str(len(FIRST)), b"")
    assert world.ask("GET", path, token, Range=f"bytes={len(FIRST)}-")[0] == 416


def test_a_chunk_that_is_gone_or_of_another_size_is_absent(world: World) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    world.store.chunk_path(FIRST_DIGEST).write_bytes(b"short")
    status, headers, said = world.ask("GET", f"/chunks/{FIRST_DIGEST}", token)
    assert (status, headers[REFUSAL_HEADER]) == (404, "1")
    assert b"5 found" in said
    world.store.chunk_path(FIRST_DIGEST).unlink()
    assert world.ask("GET", f"/chunks/{FIRST_DIGEST}", token)[0] == 404


def test_what_is_brought_is_verified_and_announced(world: World) -> None:
    manifest, encoded, pieces = made_of(DATA)
    token = world.transfers.grant(PUSH, digest_of(encoded), manifest, LIFE_MS)
    path = f"/chunks/{FIRST_DIGEST}"
    altered = bytes(len(FIRST))
    assert world.ask("PUT", path, token, altered)[0] == 422
    assert world.ask("PUT", path, token, FIRST[:-1])[0] == 400
    assert world.ask("PUT", f"/chunks/{digest_of(b'stray')}", token, b"stray")[0] == 403
    assert world.ask("PUT", path, "", FIRST)[0] == 401
    assert objects(world.store) == []
    for piece in pieces:
        assert world.ask("PUT", f"/chunks/{digest_of(piece)}", token, piece)[0] == 201
    with world.store.writing() as writing:
        writing.publish(digest_of(encoded), encoded)
    assert world.store.checkpoints() == (digest_of(encoded),)


def test_an_open_push_keeps_sweeps_off_until_it_ends(world: World) -> None:
    manifest, encoded, pieces = made_of(DATA)
    digest = digest_of(encoded)
    for end in ("finish", "expire"):
        token = world.transfers.grant(PUSH, digest, manifest, LIFE_MS)
        world.ask("PUT", f"/chunks/{FIRST_DIGEST}", token, FIRST)
        age(world.store)
        assert world.store.give_back() == 0
        if end == "finish":
            world.transfers.finish(PUSH, digest)
        else:
            world.clock.now_ms += LIFE_MS
            world.transfers.drop_expired()
        assert world.ask("PUT", f"/chunks/{FIRST_DIGEST}", token, FIRST)[0] in (401, 403)
        assert world.store.give_back() == len(pieces[0])


def test_a_push_that_ends_while_a_chunk_arrives_leaves_no_pin(world: World) -> None:
    manifest, encoded, _ = made_of(DATA)
    token = world.transfers.grant(PUSH, digest_of(encoded), manifest, LIFE_MS)
    with world.transfers.pushing(f"Bearer {token}", FIRST_DIGEST) as (_, writing):
        world.transfers.finish(PUSH, digest_of(encoded))
        writing.put_chunk(FIRST_DIGEST, FIRST)
        assert world.store.give_back() == 0
    assert world.store.give_back() == len(FIRST)
    with pytest.raises(Refused), world.transfers.pushing(f"Bearer {token}", FIRST_DIGEST):
        pass


def test_a_push_that_rests_for_long_ends_before_its_token(world: World) -> None:
    manifest, encoded, _ = made_of(DATA)
    idle_ms = http_server.IDLE_MS_MAX
    token = world.transfers.grant(PUSH, digest_of(encoded), manifest, 10 * idle_ms)
    for _ in range(3):
        assert world.ask("PUT", f"/chunks/{FIRST_DIGEST}", token, FIRST)[0] == 201
        world.clock.now_ms += idle_ms - 1
        world.transfers.drop_expired()
        age(world.store)
        assert world.store.collect(frozenset()) == 0
    world.clock.now_ms += 1
    world.transfers.drop_expired()
    assert world.store.collect(frozenset()) == len(FIRST)
    assert world.ask("PUT", f"/chunks/{FIRST_DIGEST}", token, FIRST)[0] == 403


def test_the_server_drops_what_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "DROP_EVERY_S", 0.01)
    dropped = threading.Event()
    world = World(tmp_path)
    monkeypatch.setattr(world.transfers, "drop_expired", dropped.set)
    world.store.open()
    world.server.bind()
    world.server.start()
    try:
        assert dropped.wait(30)
    finally:
        world.server.close()


# --- leave ----------------------------------------------------------------------------------------


async def test_who_asks_for_leave_must_name_what_is_here(tmp_path: Path) -> None:
    async with running(tmp_path, "n1") as one:
        await check_leave(one)


async def check_leave(one: Node) -> None:
    stored = await one.checkpoint({"file": b"x"}, 1)
    manifest = one.store.read_manifest(stored.digest)
    fetch, push = peer_pb2.TRANSFER_DIRECTION_FETCH, peer_pb2.TRANSFER_DIRECTION_PUSH
    ask = peer_pb2.OpenTransferRequest
    wrong = {
        grpc.StatusCode.NOT_FOUND: ask(job=1, epoch=1, digest="ab" * 32, direction=fetch),
        grpc.StatusCode.FAILED_PRECONDITION: ask(
            job=2, epoch=1, digest=stored.digest, direction=fetch
        ),
        grpc.StatusCode.INVALID_ARGUMENT: ask(job=1, epoch=1, digest=stored.digest),
        grpc.StatusCode.DATA_LOSS: ask(
            job=1, epoch=1, digest=stored.digest, direction=push, manifest=manifest + b" "
        ),
    }
    async with grpc.aio.insecure_channel(one.source.address) as channel:
        stub = PeerServiceStub(channel)
        for status, request in wrong.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.OpenTransfer(request, timeout=30)
            assert caught.value.code() is status, request
        stale = ask(job=1, epoch=2, digest=stored.digest, direction=push, manifest=manifest)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.OpenTransfer(stale, timeout=30)
        assert "epoch 1, not of job 1, epoch 2" in (caught.value.details() or "")
        right = ask(job=1, epoch=1, digest=stored.digest, direction=fetch)
        answer = await stub.OpenTransfer(right, timeout=30)
    assert answer.valid.ToMilliseconds() > 0
    with linked(answer.port, answer.token) as link:
        assert await anext(link.get_chunks([(digest_of(b"x"), 1)])) == (digest_of(b"x"), b"x")


@asynccontextmanager
async def routed_by(leave: peer_pb2.OpenTransferResponse) -> AsyncIterator[peers_module.Route]:
    """How a transfer of 1 MiB goes with a peer that answers so."""

    async def open_transfer(request: object, context: object) -> peer_pb2.OpenTransferResponse:
        return leave

    servicer: Any = type("Peer", (PeerServiceServicer,), {})()
    servicer.OpenTransfer = open_transfer
    server = grpc.aio.server()
    add_PeerServiceServicer_to_server(servicer, server)
    peer = ReplicaSource("n2", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    client = PeerClient(None, http_from_bytes=0)
    try:
        errand = peers_module.Errand(1, 1, "ab" * 32)
        async with client.routed(peer, errand, 1 << 20) as route:
            yield route
    finally:
        await client.close()
        await server.stop(None)


@pytest.mark.parametrize(
    ("port", "token"),
    [(0, "t"), (-1, "t"), (70_000, "t"), (1, ""), (1, "a\nb"), (1, "\u20ac"), (1, "x" * 257)],
)
async def test_leave_that_makes_no_request_is_not_taken(port: int, token: str) -> None:
    leave = peer_pb2.OpenTransferResponse(port=port, token=token)
    leave.valid.FromSeconds(60)
    async with routed_by(leave) as route:
        assert route.link is None
        assert route.reason.startswith("n2 (127.0.0.1:")


async def test_a_peer_cannot_set_our_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = peer_pb2.OpenTransferResponse(port=1, token="t")
    monkeypatch.setattr(peers_module, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    for given_s, taken_s in ((10**9, peers_module.deadline_s(1 << 20)), (3, 3.0), (-5, -5.0)):
        leave.valid.seconds = given_s
        async with routed_by(leave) as route:
            assert route.link is not None
            assert route.link._access.deadline_s == 1000.0 + taken_s


# --- TLS ------------------------------------------------------------------------------------------


def test_a_port_off_loopback_without_tls_is_refused(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path)
    server = ChunkHttpServer(store, Transfers(store), address="0.0.0.0:0", port=0, tls=None)
    with pytest.raises(TransportError, match="needs mutual TLS"):
        server.bind()


def test_a_port_in_use_is_named_when_the_agent_starts(world: World, tmp_path: Path) -> None:
    server = ChunkHttpServer(
        world.store, world.transfers, address="127.0.0.1:0", port=world.port, tls=None
    )
    with pytest.raises(TransportError, match="cannot listen on") as caught:
        server.bind()
    where = f"127.0.0.1:{world.port}"
    assert str(caught.value) == f"cannot listen on {where} for chunks: Address already in use"


@asynccontextmanager
async def secured(root: Path, tls: Tls) -> AsyncIterator[tuple[ReplicaSource, World]]:
    world = World(root)
    world.store.open()
    server = PeerServer(world.store, no_log, address="127.0.0.1:0", tls=tls)
    port = await server.open()
    try:
        yield ReplicaSource("n2", f"127.0.0.1:{port}"), world
    finally:
        await server.close()


async def test_https_has_grpcs_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "CONNECT_DEADLINE_S", 60.0)  # a handshake may be slow here
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    async with secured(tmp_path / "n2", issue(ours, "server")) as (peer, world):
        digest, manifest = world.keep(DATA)
        client = PeerClient(issue(ours, "client"), http_from_bytes=0)
        errand = peers_module.Errand(manifest.job_id, manifest.epoch, digest)
        try:
            with capture_logs() as logs:
                async with client.routed(peer, errand, len(DATA)) as route:
                    got = [item async for item in client.get_chunks(peer, WANTED, route)]
                    assert route.link is not None
                    access = route.link._access
            assert b"".join(data for _, data in got) == DATA
            assert transfers_in(logs) == [("fetch", "https", len(DATA))]
        finally:
            await client.close()

        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.load_verify_locations(ours.path)
        stranger = https.context(ssl.PROTOCOL_TLS_CLIENT, issue(theirs, "stranger", trusting=ours))
        distrusting = https.context(
            ssl.PROTOCOL_TLS_CLIENT, issue(ours, "distrusting", trusting=theirs)
        )
        for context in (None, bare, stranger, distrusting):
            wrong = Access(access.host, access.port, access.token, context, access.deadline_s)
            link = Link(peer, wrong, pause_base_s=0.001)
            with pytest.raises(Broken, match="n2"):
                await anext(link.get_chunks(WANTED[:1]))
            link.close()
        right = Access(access.host, access.port, access.token, access.context, access.deadline_s)
        link = Link(peer, right)
        assert await anext(link.get_chunks(WANTED[:1])) == (FIRST_DIGEST, FIRST)
        link.close()
    assert decode(world.store.read_manifest(digest)) == manifest


def test_an_agent_that_moves_nothing_pays_for_nothing() -> None:
    """10 MiB for aiohttp and 19 MiB for object stores come with the first that is moved."""
    script = "import sys, agent.main; print({'aiohttp', 'fsspec', 'botocore'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"
