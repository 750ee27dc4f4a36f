"""Transfers whose connections break, and those that get no HTTP at all. Real sockets on loopback;
what cuts connections is a relay between the two sides.

Liveness: a broken connection goes on where it broke, and a transfer whose HTTP fails ends over
gRPC. Safety: what looks like an answer and is none says nothing of the bytes.
"""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, MutableMapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.chunks import http_client
from agent.chunks import peers as peers_module
from agent.chunks.http_client import Broken
from agent.chunks.http_server import (
    FETCH,
    ChunkHttpServer,
)
from agent.chunks.manifest import (
    Absent,
    DiskFull,
)
from agent.peer import PeerService
from protos.baton.v1.peer_pb2_grpc import PeerServiceServicer
from tests.agent.chunk_worlds import Node, candidate, files_under, objects, running
from tests.agent.http_worlds import (
    DATA,
    FIRST,
    FIRST_DIGEST,
    LIFE_MS,
    WANTED,
    World,
    linked,
    relayed,
    transfers_in,
)
from tests.agent.waiting import DEADLINE_S, until


async def all_over(port: int, token: str) -> list[tuple[str, bytes | bytearray]]:
    with linked(port, token) as link:
        return [item async for item in link.get_chunks(WANTED)]


async def test_a_broken_connection_goes_on_where_it_broke(world: World) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    cut = 1_000_000
    async with relayed(world.port, cut, cut, cut) as relay:
        with linked(relay.port, token) as link:
            (digest, data) = await anext(link.get_chunks(WANTED[:1]))
    assert (digest, data) == (FIRST_DIGEST, FIRST)
    asked = [
        line.removeprefix("Range: bytes=")
        for head in relay.heads
        for line in head.split("\r\n")
        if line.startswith("Range")
    ]
    starts = [int(line.rstrip("-")) for line in asked]
    assert len(relay.heads) == 4
    assert starts == sorted(starts)
    assert all(
        cut - 1000 < later - earlier < cut
        for earlier, later in zip([0, *starts[:-1]], starts, strict=True)
    )


async def test_chunks_come_in_order_over_connections_that_all_break(world: World) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    async with relayed(world.port, *[900_000] * 8) as relay:
        got = await all_over(relay.port, token)
    assert [digest for digest, _ in got] == [digest for digest, _ in WANTED]
    assert b"".join(data for _, data in got) == DATA


async def test_what_always_breaks_without_progress_is_given_up(world: World) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    async with relayed(world.port, always=0) as relay:
        with pytest.raises(Broken, match=r"n2 \(127\.0\.0\.1:7\): http: "):
            await all_over(relay.port, token)
    assert len(relay.heads) <= len(WANTED) * (http_client.FAILURES_MAX + 1)


async def test_what_cannot_be_imported_by_now_costs_only_the_http(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module comes with the first transfer: a file that has to be opened then."""
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    monkeypatch.setitem(sys.modules, "http.client", None)
    with pytest.raises(Broken, match=r"n2 \(127\.0\.0\.1:7\): http: import of http.client"):
        await all_over(world.port, token)


async def test_a_chunk_that_is_not_there_costs_only_itself(world: World) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    world.store.chunk_path(WANTED[1][0]).unlink()
    with linked(world.port, token) as link:
        stream = link.get_chunks(WANTED)
        assert await anext(stream) == (FIRST_DIGEST, FIRST)
        with pytest.raises(Absent, match=r"n2 .*missing"):
            await anext(stream)
        rest = [digest async for digest, _ in link.get_chunks(WANTED[2:])]
    assert rest == [digest for digest, _ in WANTED[2:]]


async def test_another_size_than_asked_for_is_named(world: World) -> None:
    token = world.transfers.grant(FETCH, *world.keep(DATA), LIFE_MS)
    other = [(FIRST_DIGEST, 7)]
    with linked(world.port, token) as link, pytest.raises(Broken, match=r"n2 .* of 7 bytes"):
        await anext(link.get_chunks(other))


async def test_a_server_that_is_none_of_ours_says_nothing_of_the_bytes() -> None:
    """Its 404 is no "not here"."""

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with linked(port, "token") as link, pytest.raises(Broken, match="HTTP status 404"):
        await anext(link.get_chunks(WANTED[:1]))
    server.close()


async def test_a_link_takes_what_cannot_be_a_request_as_broken(world: World) -> None:
    for port, token in ((world.port, "a\nb"), (world.port, "\u20ac"), (70_000, "token")):
        with linked(port, token) as link, pytest.raises(Broken, match=r"n2 .*: http: "):
            await anext(link.get_chunks(WANTED[:1]))


async def test_a_body_that_nobody_asked_for_is_not_read() -> None:
    """It may be of any size: here it is announced and never comes."""

    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 99999999999\r\n\r\n")

    server = await asyncio.start_server(talkative, "127.0.0.1", 0)
    with linked(server.sockets[0].getsockname()[1], "token") as link:
        with pytest.raises(Broken, match="a body, where none belongs"):
            async with asyncio.timeout(DEADLINE_S):
                await link.put_chunks(given(b"x"))
        assert link.unsent == [("ab" * 32, b"x")]
    server.close()


async def given(data: bytes, then: asyncio.Event | None = None) -> AsyncIterator[tuple[str, bytes]]:
    yield "ab" * 32, data
    if then is not None:
        await then.wait()


def transfer_threads() -> set[int | None]:
    return {each.ident for each in threading.enumerate() if each.name.startswith("transfer")}


async def test_closing_a_link_ends_its_threads(world: World) -> None:
    before = transfer_threads()
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    with linked(silent.sockets[0].getsockname()[1], "token") as link:
        waiting = asyncio.ensure_future(anext(link.get_chunks(WANTED)))
        await until(lambda: bool(link._open))
    with pytest.raises(Broken, match="given up"):
        await waiting
    await until(lambda: not transfer_threads() - before)
    silent.close()


async def test_an_answer_without_end_ends_at_the_deadline() -> None:
    """The peer is never silent, and never gets as far as an answer."""
    before = transfer_threads()
    begun = asyncio.Event()

    async def dragging(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await dribble(writer, b"HTTP/1.1 100 Continue\r\n\r\n", begun)

    server = await asyncio.start_server(dragging, "127.0.0.1", 0)
    with linked(server.sockets[0].getsockname()[1], "token") as link:
        link._access = replace(link._access, deadline_s=0.0)
        with pytest.raises(Broken, match="too slow over http"):
            async with asyncio.timeout(DEADLINE_S):
                await link.put_chunks(given(b"x", begun))
        assert link.unsent == [("ab" * 32, b"x")]
    await until(lambda: not transfer_threads() - before)
    server.close()


async def test_a_last_answer_without_end_ends_with_the_link() -> None:
    """Its connection has let go of the socket, on which the thread still waits."""
    before = transfer_threads()

    async def dragging(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {WANTED[0][1]}\r\n\r\n"
        writer.write(head.encode())
        await dribble(writer, b"x")

    server = await asyncio.start_server(dragging, "127.0.0.1", 0)
    with linked(server.sockets[0].getsockname()[1], "token") as link:
        waiting = asyncio.ensure_future(anext(link.get_chunks(WANTED[:1])))
        await until(lambda: any(connection.sock is None for connection in link._open))
    with pytest.raises(Broken, match="given up"):
        async with asyncio.timeout(DEADLINE_S):
            await waiting
    await until(lambda: not transfer_threads() - before)
    server.close()


async def dribble(
    writer: asyncio.StreamWriter, data: bytes, begun: asyncio.Event | None = None
) -> None:
    with suppress(ConnectionError):
        while True:
            writer.write(data)
            await writer.drain()
            if begun is not None:
                begun.set()
            await asyncio.sleep(0)


# --- the whole way, and the way around ------------------------------------------------------------


async def push_and_fetch(one: Node, two: Node) -> list[MutableMapping[str, Any]]:
    """There, wiped here, and back; returns what was logged."""
    with capture_logs() as logs:
        stored = await one.checkpoint({"backbone": DATA, "head": b"h"}, 1)
        await one.chunks.replicate(stored.digest, two.source)
        for path in objects(one.store):
            path.unlink()
        restored = await one.chunks.restore([candidate(stored, two.source)], str(one.root / "out"))
    assert files_under(restored.directory) == {"backbone": DATA, "head": b"h"}
    return logs


async def test_a_transfer_goes_over_http_and_is_logged_once(one: Node, two: Node) -> None:
    size_bytes = len(DATA) + 1
    logs = await push_and_fetch(one, two)
    assert transfers_in(logs) == [("push", "http", size_bytes), ("fetch", "http", size_bytes)]
    entry = next(entry for entry in logs if entry["event"] == "checkpoint.transferred")
    assert (entry["peer"], "reason" in entry) == ("n2", False)
    assert entry["duration_s"] >= 0


async def test_a_small_transfer_does_not_ask_for_http(one: Node, two: Node) -> None:
    one.client._http_from_bytes = len(DATA) + 2
    size_bytes = len(DATA) + 1
    logs = await push_and_fetch(one, two)
    assert transfers_in(logs) == [("push", "grpc", size_bytes), ("fetch", "grpc", size_bytes)]


async def test_an_older_peer_gets_grpc(
    one: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeerService, "OpenTransfer", PeerServiceServicer.OpenTransfer)
    async with running(tmp_path, "old") as old:
        logs = await push_and_fetch(one, old)
    assert [way for _, way, _ in transfers_in(logs)] == ["grpc", "grpc"]
    reasons = [e["reason"] for e in logs if e["event"] == "checkpoint.transferred"]
    assert all("Method not implemented" in reason for reason in reasons)


async def test_a_port_that_nothing_reaches_is_left_alone_for_a_while(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def start(server: ChunkHttpServer) -> int:
        opened.append(server)
        return 1  # nobody listens there

    monkeypatch.setattr(ChunkHttpServer, "start", start)
    logs = await push_and_fetch(one, two)
    assert [way for _, way, _ in transfers_in(logs)] == ["grpc", "grpc"]
    assert len(opened) == 1
    monkeypatch.setattr(peers_module, "HTTP_REST_S", -1.0)
    one.client._resting.clear()
    await push_and_fetch(one, two)
    assert len(opened) > 1, "rested"


@pytest.mark.parametrize("always", [0, 100])
async def test_what_breaks_for_good_goes_on_over_grpc(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch, always: int
) -> None:
    """The first connections live; after that, each ends within the head of the answer."""
    real = ChunkHttpServer.start
    port = await asyncio.to_thread(real, _http_of(two))
    monkeypatch.setattr(peers_module, "HTTP_REST_S", -1.0)
    async with relayed(port, 5_000_000, 5_000_000, always=always) as relay:
        monkeypatch.setattr(ChunkHttpServer, "start", lambda self: relay.port)
        logs = await push_and_fetch(one, two)
    ways = {direction: way for direction, way, _ in transfers_in(logs)}
    assert ways["fetch"] in ("http then grpc", "grpc")
    assert sum(size for _, _, size in transfers_in(logs)) == 2 * (len(DATA) + 1)


def _http_of(node: Node) -> ChunkHttpServer:
    return node.server._http


async def test_a_broken_push_brings_the_rest_over_grpc(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = await asyncio.to_thread(_http_of(two).start)
    cut = 250  # within the second answer
    async with relayed(port, *[cut] * http_client.CONNECTIONS, always=0) as relay:
        monkeypatch.setattr(ChunkHttpServer, "start", lambda self: relay.port)
        with capture_logs() as logs:
            stored = await one.checkpoint({"backbone": DATA * 5}, 1)
            await one.chunks.replicate(stored.digest, two.source)
    assert await two.chunks.checkpoints() == (stored.digest,)
    (entry,) = [entry for entry in logs if entry["event"] == "checkpoint.transferred"]
    assert entry["way"].endswith("grpc")
    assert "http: " in entry["reason"]
    restored = await two.chunks.restore([candidate(stored)], str(two.root / "out"))
    assert files_under(restored.directory) == {"backbone": DATA * 5}


async def test_a_full_disk_at_the_receiver_is_said_and_leaves_nothing(
    one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = await one.checkpoint({"backbone": DATA}, 1)
    arrived = []
    real = os.statvfs

    def statvfs(path: Path) -> object:
        if two.store.root not in Path(path).parents:
            return real(path)
        arrived.append(path)
        free_bytes = 1 << 40 if len(arrived) < 3 else 0
        return SimpleNamespace(f_frsize=1, f_blocks=1 << 40, f_bavail=free_bytes)

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(DiskFull, match=r"n2 \(.*disk full: writing chunk"):
        await one.chunks.replicate(stored.digest, two.source)
    async with asyncio.timeout(DEADLINE_S):
        # A chunk that was arriving meanwhile may have been kept after the others went.
        while objects(two.store):
            await asyncio.to_thread(two.store.give_back)
    assert await two.chunks.checkpoints() == ()
