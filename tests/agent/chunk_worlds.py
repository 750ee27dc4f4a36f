"""Stores, and nodes on loopback, for the tests of checkpoints.

Problem: a test of the chunk store needs files, a store and a way to look into it; a test of
restoring needs several nodes with disks and servers of their own that can be damaged one by one.
Nothing here pretends: stores are on disk, and nodes talk gRPC.
"""

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.chunks.manifest import (
    decode,
    digest_of,
)
from agent.chunks.peers import PeerClient, Route
from agent.chunks.service import ChunkService
from agent.chunks.store import ChunkStore
from agent.chunks.sweep import CHUNK_GRACE_S, ORPHAN_S
from agent.chunks.tree import ingest
from agent.core.values import Origin, ReplicaSource, RestoreCandidate, StoredCheckpoint
from agent.peer import PeerServer

LONG_AGO_S = 1_000_000_000


def opened(
    root: Path,
    *,
    grace_s: float = CHUNK_GRACE_S,
    orphan_s: float = ORPHAN_S,
    unlisted_s: float = 0.0,
) -> ChunkStore:
    store = ChunkStore(root, grace_s=grace_s, orphan_s=orphan_s, unlisted_s=unlisted_s)
    store.open()
    return store


def written(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def kept(
    store: ChunkStore,
    directory: Path,
    step: int = 1,
    parent: str = "",
    *,
    job_id: int = 1,
    epoch: int = 1,
    rank: int | None = None,
) -> StoredCheckpoint:
    return ingest(store, directory, Origin(job_id, epoch, step, parent, rank))


def objects(store: ChunkStore) -> list[Path]:
    return sorted(path for path in (store.root / "objects").rglob("*") if path.is_file())


def age(store: ChunkStore) -> None:
    for path in [*objects(store), *(store.root / "manifests").iterdir()]:
        os.utime(path, (LONG_AGO_S, LONG_AGO_S))


def set_age(path: Path, age_s: float) -> None:
    stamp_s = time.time() - age_s
    os.utime(path, (stamp_s, stamp_s))


def manifest_path(store: ChunkStore, digest: str) -> Path:
    return store.root / "manifests" / f"{digest}.json"


def check_whole(store: ChunkStore) -> int:
    """The invariant: every manifest's chunks verify. Returns how many manifests there are."""
    digests = store.checkpoints()
    for digest in digests:
        for chunk, size_bytes in decode(store.read_manifest(digest)).sizes_bytes().items():
            store.read_chunk(chunk, size_bytes)
    return len(digests)


# Nobody listens on this port of loopback: reserved by IANA as TCP port service multiplexer.
NOBODY = ReplicaSource("n9", "127.0.0.1:1")


class CountingClient(PeerClient):
    """Remembers what was sent and fetched."""

    def __init__(self, http_from_bytes: int | None) -> None:
        super().__init__(None, http_from_bytes=http_from_bytes)
        self.received_bytes: list[int] = []
        self.fetched: list[str] = []

    async def put(
        self,
        peer: ReplicaSource,
        digest: str,
        manifest: bytes,
        *,
        chunks: AsyncIterator[tuple[str, bytes]],
        chunks_bytes: int,
        route: Route | None = None,
    ) -> int:
        received = await super().put(
            peer, digest, manifest, chunks=chunks, chunks_bytes=chunks_bytes, route=route
        )
        self.received_bytes.append(received)
        return received

    async def get_chunks(
        self,
        peer: ReplicaSource,
        wanted: Sequence[tuple[str, int]],
        route: Route | None = None,
    ) -> AsyncGenerator[tuple[str, bytes | bytearray], None]:
        async for digest, data in super().get_chunks(peer, wanted, route):
            self.fetched.append(digest)
            yield digest, data


class LyingStore(ChunkStore):
    """Gives other bytes of the right size, and a manifest that is not the one asked for."""

    lies_about_manifests = False

    def read_chunk(self, digest: str, size_bytes: int | None = None, *, of: str = "") -> bytes:
        return bytes(byte ^ 1 for byte in super().read_chunk(digest, size_bytes, of=of))

    def chunk_path(self, digest: str) -> Path:
        """What is sent over HTTP is not read before; so the lie lies beside the truth."""
        lie = self.root / f"lie-{digest}"
        lie.write_bytes(self.read_chunk(digest))
        return lie

    def read_manifest(self, digest: str) -> bytes:
        data = super().read_manifest(digest)
        return data.replace(b'"epoch":1', b'"epoch":2') if self.lies_about_manifests else data


@dataclass
class Node:
    root: Path
    store: ChunkStore
    client: CountingClient
    chunks: ChunkService
    source: ReplicaSource
    server: PeerServer

    async def checkpoint(
        self, files: dict[str, bytes], step: int, *, rank: int | None = None
    ) -> StoredCheckpoint:
        directory = self.root / "staging" / f"ckpt-{step}"
        for path, data in files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        stored = await self.chunks.store(str(directory), Origin(1, 1, step, "", rank))
        assert {path: (directory / path).read_bytes() for path in files} == files, "left as it is"
        await self.chunks.discard(str(directory))
        assert not directory.exists()
        return stored

    def chunk_path(self, data: bytes) -> Path:
        digest = digest_of(data)
        return self.store.root / "objects" / digest[:2] / digest

    def manifest_path(self, digest: str) -> Path:
        return self.store.root / "manifests" / f"{digest}.json"


async def no_log(
    attempt: str, offset: int, follow: bool, tail_bytes: int
) -> AsyncIterator[tuple[int, bytes]]:
    raise FileNotFoundError(attempt)
    yield offset, b""


# Tests of a node's traffic run over both of its ways: with HTTP from the first byte on, and never.
WAYS = {"http": 0, "grpc": None}


@asynccontextmanager
async def running(
    root: Path,
    name: str,
    make: Callable[[Path], ChunkStore] = ChunkStore,
    *,
    way: str = "http",
) -> AsyncIterator[Node]:
    (root / name / "staging").mkdir(parents=True)
    store = make(root / name / "chunks")
    client = CountingClient(WAYS[way])
    chunks = ChunkService(store, client, staging_root=root / name / "staging", retry_pause_s=0)
    await chunks.open()
    server = PeerServer(store, no_log, address="127.0.0.1:0", tls=None)
    port = await server.open()
    try:
        source = ReplicaSource(name, f"127.0.0.1:{port}")
        yield Node(root / name, store, client, chunks, source, server)
    finally:
        await chunks.close()
        await server.close()


def files_under(directory: str) -> dict[str, bytes]:
    base = Path(directory)
    return {
        str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()
    }


def candidate(stored: StoredCheckpoint, *sources: ReplicaSource) -> RestoreCandidate:
    return RestoreCandidate(stored.digest, stored.step, sources)


FILES = {"backbone": b"b" * 5000, "sub/head": b"h" * 70}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])
