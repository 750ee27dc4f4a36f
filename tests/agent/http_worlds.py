"""One checkpoint served over HTTP, and what stands between it and a client, for the tests of
transfers.

Problem: who is let in and how a broken connection goes on can only be seen from outside, on real
sockets; and a connection must break at the same byte in every run. So there is a relay that cuts
where it is told to, and a clock that tests turn.
"""

import asyncio
import http.client
import os
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from agent.chunks.http_client import Access, Link
from agent.chunks.http_server import (
    ChunkHttpServer,
    Transfers,
)
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    ChunkRef,
    FileEntry,
    Manifest,
    digest_of,
    encode,
)
from agent.chunks.store import ChunkStore
from agent.core.values import ReplicaSource

DATA = os.urandom(3 * CHUNK_BYTES_MAX + 5)
FIRST = DATA[:CHUNK_BYTES_MAX]
FIRST_DIGEST = digest_of(FIRST)
LIFE_MS = 1000


class Clock:
    def __init__(self) -> None:
        self.now_ms = 5_000

    def __call__(self) -> int:
        return self.now_ms


class World:
    """A store with one checkpoint, served over HTTP alone."""

    def __init__(self, root: Path) -> None:
        self.clock = Clock()
        self.store = ChunkStore(root / "chunks", grace_s=0)
        self.transfers = Transfers(self.store, self.clock)
        self.server = ChunkHttpServer(
            self.store, self.transfers, address="127.0.0.1:0", port=0, tls=None
        )
        self.port = 0

    def keep(self, data: bytes, epoch: int = 1) -> tuple[str, Manifest]:
        manifest, encoded, pieces = made_of(data, epoch)
        with self.store.writing() as writing:
            for piece in pieces:
                writing.put_chunk(digest_of(piece), piece)
            writing.publish(digest_of(encoded), encoded)
        return digest_of(encoded), manifest

    def ask(
        self, verb: str, path: str, token: str = "", body: bytes | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            given = {"Authorization": f"Bearer {token}"} if token else {}
            connection.request(verb, path, body, headers | given)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


def made_of(data: bytes, epoch: int = 1) -> tuple[Manifest, bytes, list[bytes]]:
    pieces = [data[at : at + CHUNK_BYTES_MAX] for at in range(0, len(data), CHUNK_BYTES_MAX)]
    refs = tuple(ChunkRef(digest_of(piece), len(piece)) for piece in pieces)
    manifest = Manifest(1, epoch, 1, "", (FileEntry("file", 0o600, refs),))
    return manifest, encode(manifest), pieces


WANTED = [
    (digest_of(DATA[at : at + CHUNK_BYTES_MAX]), len(DATA[at : at + CHUNK_BYTES_MAX]))
    for at in range(0, len(DATA), CHUNK_BYTES_MAX)
]


class Relay:
    """Between client and server; `cuts` says, connection by connection, after how many bytes of the
    answers it ends. None, and when they are used up: never."""

    def __init__(self, port: int, cuts: list[int | None], *, always: int | None = None) -> None:
        self.cuts = cuts
        self.always = always
        self.heads: list[str] = []
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self._target = port

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.ensure_future(self.serve(reader, writer)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.cuts.pop(0) if self.cuts else self.always
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)

        async def onward() -> None:
            while data := await reader.read(1 << 16):
                if data[:4] in (b"GET ", b"PUT "):
                    self.heads.append(data.partition(b"\r\n\r\n")[0].decode())
                inner_writer.write(data)
                await inner_writer.drain()

        task = asyncio.create_task(onward())
        sent = 0
        try:
            while left is None or sent < left:
                data = await inner_reader.read(1 << 16 if left is None else left - sent)
                if not data:
                    break
                writer.write(data)
                await writer.drain()
                sent += len(data)
        except ConnectionError:
            pass  # the client went first
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            writer.close()
            inner_writer.close()


@asynccontextmanager
async def relayed(port: int, *cuts: int | None, always: int | None = None) -> AsyncIterator[Relay]:
    relay = Relay(port, list(cuts), always=always)
    server = await asyncio.start_server(relay.accept, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        for task in relay.tasks:
            task.cancel()
        await asyncio.gather(*relay.tasks, return_exceptions=True)


@contextmanager
def linked(port: int, token: str) -> Iterator[Link]:
    access = Access("127.0.0.1", port, token, None, deadline_s=float("inf"))
    link = Link(ReplicaSource("n2", "127.0.0.1:7"), access, pause_base_s=0.001)
    try:
        yield link
    finally:
        link.close()


def transfers_in(logs: list[MutableMapping[str, Any]]) -> list[tuple[str, str, int]]:
    found = [entry for entry in logs if entry["event"] == "checkpoint.transferred"]
    return [(entry["direction"], entry["way"], entry["size_bytes"]) for entry in found]
