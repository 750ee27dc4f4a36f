"""The client side of the peer service: what another node lacks, sending to it, reading from it.

Problem: a peer may be slow, gone, full, or wrong, and each needs another answer: try again, try
elsewhere, give up, distrust. A status code alone does not tell the operator which peer said what.

So: every call has a deadline that grows with the bytes it moves, every failure becomes one of the
chunk store's errors with the peer's name and address in the sentence, and nothing that a peer sends
is larger than what was asked for. Channels are cached, as a TLS handshake per checkpoint would cost
more than a small checkpoint; the cache is bounded, and closes the one that has rested longest.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from agent.chunks.manifest import (
    DIGESTS_MAX,
    MESSAGE_BYTES_MAX,
    PIECE_BYTES_MAX,
    Absent,
    Altered,
    Denied,
    DiskFull,
    Incomplete,
    Invalid,
    short,
)
from agent.core.values import ReplicaSource
from agent.ports import ChunkError
from agent.transport import Tls, TransportError, open_channel
from protos.baton.v1 import peer_pb2
from protos.baton.v1.peer_pb2_grpc import PeerServiceStub

if TYPE_CHECKING:  # a name that exists in the generated .pyi only
    from protos.baton.v1.peer_pb2_grpc import PeerServiceAsyncStub

# A node replicates to one peer and restores from a few; every channel costs a connection and its
# buffers.
CHANNELS_MAX = 16
# Connecting, a TLS handshake, and a peer whose disk is busy.
DEADLINE_BASE_S = 20.0
# A tenth of a gigabit link: whoever is slower is as good as gone.
RATE_MIN_BYTES_PER_S = 12_500_000
# Four requests' worth at most per 100,000 chunks; keeps a question under 2 MiB.
QUESTION_DIGESTS_MAX = DIGESTS_MAX // 4

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)

# What each status says: the first four are answers about the bytes, the next three say only that
# this peer does not talk to this node. The rest (unavailable, deadline...) is a plain `ChunkError`,
# worth another try.
_ERRORS: dict[grpc.StatusCode, type[ChunkError]] = {
    grpc.StatusCode.NOT_FOUND: Absent,
    grpc.StatusCode.FAILED_PRECONDITION: Incomplete,
    grpc.StatusCode.DATA_LOSS: Altered,
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.UNIMPLEMENTED: Denied,
    grpc.StatusCode.UNAUTHENTICATED: Denied,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
}


def deadline_s(size_bytes: int) -> float:
    """How long moving so many bytes may take before the other side counts as gone."""
    return DEADLINE_BASE_S + size_bytes / RATE_MIN_BYTES_PER_S


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    stub: "PeerServiceAsyncStub"
    users_count: int = 0


class PeerClient:
    """Talks to any number of peers. `close` when done. Every method raises `ChunkError` naming the
    peer."""

    def __init__(self, tls: Tls | None) -> None:
        self._tls = tls
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        entries, self._entries = self._entries, OrderedDict()
        for entry in entries.values():
            await entry.channel.close()
        await asyncio.gather(*self._closing)

    async def find_missing(self, peer: ReplicaSource, digests: Sequence[str]) -> list[str]:
        """Which of these chunks the peer lacks, in the order asked."""
        missing: set[str] = set()
        with self._calling(peer) as stub:
            for start in range(0, len(digests), QUESTION_DIGESTS_MAX):
                request = peer_pb2.FindMissingRequest(
                    digests=digests[start : start + QUESTION_DIGESTS_MAX]
                )
                response = await stub.FindMissing(request, timeout=DEADLINE_BASE_S)
                missing.update(response.digests)
        return [digest for digest in digests if digest in missing]

    async def put(
        self,
        peer: ReplicaSource,
        digest: str,
        manifest: bytes,
        *,
        chunks: AsyncIterator[tuple[str, bytes]],
        chunks_bytes: int,
    ) -> int:
        """Send these chunks, then the manifest; returns the bytes that the peer received of chunks
        and manifest.

        Raises `DiskFull` when the peer's disk is full.
        """
        with self._calling(peer, exhausted=DiskFull) as stub:
            call = stub.PutCheckpoint(timeout=deadline_s(chunks_bytes + len(manifest)))
            try:
                # Raised when the peer ended the call before hearing all of it; the status says why.
                with suppress(asyncio.InvalidStateError):
                    async for chunk_digest, data in chunks:
                        for piece in _pieces(chunk_digest, data):
                            await call.write(peer_pb2.PutCheckpointRequest(chunk=piece))
                    last = peer_pb2.Manifest(digest=digest, data=manifest)
                    await call.write(peer_pb2.PutCheckpointRequest(manifest=last))
                    await call.done_writing()
                response = await call
            finally:
                call.cancel()
        return response.received_bytes

    async def get_manifest(self, peer: ReplicaSource, digest: str) -> bytes:
        """Not verified yet."""
        with self._calling(peer) as stub:
            request = peer_pb2.GetManifestRequest(digest=digest)
            response = await stub.GetManifest(request, timeout=deadline_s(MESSAGE_BYTES_MAX))
        return response.data

    async def get_chunks(
        self, peer: ReplicaSource, wanted: Sequence[tuple[str, int]]
    ) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yields (digest, bytes) for each (digest, size) in order: of that size, but not verified
        yet.

        Raises `Absent` or `Incomplete` for the first one that the peer does not give.
        """
        with self._calling(peer) as stub:
            request = peer_pb2.GetChunksRequest(digests=[digest for digest, _ in wanted])
            call = stub.GetChunks(request, timeout=deadline_s(sum(size for _, size in wanted)))
            try:
                pieces = aiter(call)
                for digest, size_bytes in wanted:
                    data = bytearray()
                    while len(data) < size_bytes:
                        response = await anext(pieces, None)
                        if response is None:
                            raise Incomplete(f"{_name(peer)} ended before chunk {short(digest)}")
                        piece = response.chunk
                        room_bytes = size_bytes - len(data)
                        if piece.digest != digest or not 1 <= len(piece.data) <= room_bytes:
                            expected = f"chunk {short(digest)} of {size_bytes} bytes"
                            raise Incomplete(f"{_name(peer)} sent other than {expected}")
                        data += piece.data
                    yield digest, bytes(data)
            finally:
                call.cancel()

    @contextmanager
    def _calling(
        self, peer: ReplicaSource, exhausted: type[ChunkError] = ChunkError
    ) -> Iterator["PeerServiceAsyncStub"]:
        try:
            entry = self._entry(peer.address)
        except TransportError as error:
            raise Denied(f"{_name(peer)}: {error}") from error
        entry.users_count += 1
        try:
            yield entry.stub
        except grpc.aio.AioRpcError as error:
            kind = _ERRORS.get(error.code(), ChunkError)
            details = error.details() or error.code().name
            # gRPC uses this status too, for a peer that is merely busy; that passes.
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "disk full" in details:
                kind = exhausted
            raise kind(f"{_name(peer)}: {details}") from error
        finally:
            entry.users_count -= 1

    def _entry(self, address: str) -> _Entry:
        entry = self._entries.get(address)
        if entry is None:
            self._make_room()
            channel = open_channel(address, self._tls, _OPTIONS)
            entry = self._entries[address] = _Entry(channel, PeerServiceStub(channel))
        self._entries.move_to_end(address)
        return entry

    def _make_room(self) -> None:
        if len(self._entries) < CHANNELS_MAX:
            return
        for address, entry in self._entries.items():
            if not entry.users_count:
                del self._entries[address]
                task = asyncio.get_running_loop().create_task(entry.channel.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
                return
        raise ChunkError(f"{CHANNELS_MAX} peers are being talked to already")


def _name(peer: ReplicaSource) -> str:
    return f"{peer.node} ({peer.address})"


def _pieces(digest: str, data: bytes) -> Iterator[peer_pb2.Chunk]:
    for start in range(0, len(data), PIECE_BYTES_MAX):
        piece = data[start : start + PIECE_BYTES_MAX]
        yield peer_pb2.Chunk(digest=digest, data=piece, size_bytes=len(data))
