"""The client side of the peer service: what another node lacks, sending to it, reading from it.

Problem: a peer may be slow, gone, full, or wrong, and each needs another answer: try again, try
elsewhere, give up, distrust. A status code alone does not tell the operator which peer said what.

So: every call has a deadline that grows with the bytes it moves, every failure becomes one of the
chunk store's errors with the peer's name and address in the sentence, and nothing that a peer sends
is larger than what was asked for. Nor does a peer say how long we wait for it: what it gives leave
for can only shorten our own deadline.

Bytes have two ways: HTTP on several connections (see `http_client`), for which the peer's gRPC
service has to give leave, and gRPC streaming. A transfer that is worth a second connection begins
over HTTP; where that is not to be had (an older agent, a port that nothing reaches) or breaks for
good, the rest goes over gRPC, and what the log says of the transfer names both. A peer whose HTTP
failed is not tried that way again for a minute, or each transfer would wait for it.

Channels are cached, as a TLS handshake per checkpoint would cost more than a small checkpoint; the
cache is bounded, and closes the one that has rested longest.
"""

import asyncio
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import grpc
import structlog

from agent import https
from agent.chunks.http_client import Access, Broken, Data, Link
from agent.chunks.http_server import TOKEN_CHARACTERS_MAX
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
# 256 MiB in one call: a deadline stays meaningful, and a broken call repeats little.
STREAM_CHUNKS_MAX = 64
# Leave, a connection and a handshake cost some round trips; below a few chunks, gRPC's open channel
# has done by then.
HTTP_FROM_BYTES = 16 << 20
# How long a peer's HTTP is left alone after it failed: an agent that was replaced, or a firewall
# that was opened, is noticed within a minute, and nobody waits for it more often.
HTTP_REST_S = 60.0
# Peers that rest; more than a node has to do with in a minute.
HTTP_RESTING_MAX = 64

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


_log = structlog.get_logger("baton.chunks")


def deadline_s(size_bytes: int) -> float:
    """How long moving so many bytes may take before the other side counts as gone."""
    return DEADLINE_BASE_S + size_bytes / RATE_MIN_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Errand:
    """What a transfer is for: the checkpoint with this digest, written under this job and epoch.
    `manifest` is its bytes when it is brought, and empty when it is fetched."""

    job_id: int
    epoch: int
    digest: str
    manifest: bytes = b""

    @property
    def direction(self) -> str:
        return "push" if self.manifest else "fetch"


@dataclass(slots=True)
class Route:
    """How one transfer goes: over `link` as long as that works, else over gRPC. `reason` says why
    not over HTTP."""

    link: Link | None = None
    reason: str = ""
    moved_bytes: dict[str, int] = field(default_factory=dict)

    def moved(self, way: str, count_bytes: int) -> None:
        if count_bytes:
            self.moved_bytes[way] = self.moved_bytes.get(way, 0) + count_bytes

    def end_link(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.close()


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    stub: "PeerServiceAsyncStub"
    users_count: int = 0
    retired: bool = False  # who uses it goes on, and nobody new does


class PeerClient:
    """Talks to any number of peers. `close` when done. Every method raises `ChunkError` naming the
    peer. Transfers from `http_from_bytes` on try HTTP first; None: none does."""

    def __init__(self, tls: Tls | None, *, http_from_bytes: int | None = HTTP_FROM_BYTES) -> None:
        self._tls = tls
        self._stamp = tls.stamp() if tls else ()
        self._http_from_bytes = http_from_bytes
        self._context: ssl.SSLContext | None = None
        # Until when (monotonic) a peer's HTTP is left alone, and why.
        self._resting: dict[str, tuple[float, str]] = {}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        entries, self._entries = self._entries, OrderedDict()
        for entry in entries.values():
            await entry.channel.close()
        await asyncio.gather(*self._closing)

    def _renew(self) -> None:
        """What was opened with certificates of before is not used again: it would connect anew with
        one that has expired by then."""
        before, self._stamp = self._stamp, self._tls.stamp() if self._tls else ()
        if self._stamp == before:
            return
        self._context = None
        entries, self._entries = self._entries, OrderedDict()
        for entry in entries.values():
            entry.retired = True
            if not entry.users_count:
                self._shut(entry)

    @asynccontextmanager
    async def routed(
        self, peer: ReplicaSource, errand: Errand, size_bytes: int
    ) -> AsyncIterator[Route]:
        """The way for moving about `size_bytes` of one checkpoint, within the block. Asking for it
        never fails; what was moved, and how, is logged in the end."""
        began_s = time.monotonic()
        route = await self._route(peer, errand, size_bytes)
        try:
            yield route
        finally:
            route.end_link()
            if route.moved_bytes:
                _log.info(
                    "checkpoint.transferred",
                    direction=errand.direction,
                    digest=errand.digest,
                    peer=peer.node,
                    way=" then ".join(route.moved_bytes),
                    size_bytes=sum(route.moved_bytes.values()),
                    duration_s=round(time.monotonic() - began_s, 3),
                    **({"reason": route.reason} if route.reason else {}),
                )

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
        route: Route | None = None,
    ) -> int:
        """Send these chunks, then the manifest; returns the bytes that the peer received of chunks
        and manifest.

        Raises `DiskFull` when the peer's disk is full.
        """
        route = route or Route()
        sent_bytes = 0
        link = route.link
        if link is not None:
            try:
                await link.put_chunks(chunks)
            except Broken as error:
                self._give_up(peer, route, error)
                chunks = _first(link.unsent, chunks)
            sent_bytes = link.sent_bytes
            route.moved(link.scheme, sent_bytes)
        with self._calling(peer, exhausted=DiskFull) as stub:
            call = stub.PutCheckpoint(timeout=deadline_s(chunks_bytes + len(manifest)))
            try:
                # Raised when the peer ended the call before hearing all of it; the status says why.
                with suppress(asyncio.InvalidStateError):
                    async for chunk_digest, data in chunks:
                        for piece in pieces(chunk_digest, data):
                            await call.write(peer_pb2.PutCheckpointRequest(chunk=piece))
                        route.moved("grpc", len(data))
                    last = peer_pb2.Manifest(digest=digest, data=manifest)
                    await call.write(peer_pb2.PutCheckpointRequest(manifest=last))
                    await call.done_writing()
                response = await call
            finally:
                call.cancel()
        return sent_bytes + response.received_bytes

    async def get_manifest(self, peer: ReplicaSource, digest: str) -> bytes:
        """Not verified yet."""
        with self._calling(peer) as stub:
            request = peer_pb2.GetManifestRequest(digest=digest)
            response = await stub.GetManifest(request, timeout=deadline_s(MESSAGE_BYTES_MAX))
        return response.data

    async def get_chunks(
        self,
        peer: ReplicaSource,
        wanted: Sequence[tuple[str, int]],
        route: Route | None = None,
    ) -> AsyncGenerator[tuple[str, Data], None]:
        """Yields (digest, bytes) for each (digest, size) in order: of that size, but not verified
        yet.

        Raises `Absent` or `Incomplete` for the first one that the peer does not give.
        """
        route = route or Route()
        done = 0
        link = route.link
        if link is not None:
            try:
                async with aclosing(link.get_chunks(wanted)) as fetched:
                    async for digest, data in fetched:
                        done += 1
                        route.moved(link.scheme, len(data))
                        yield digest, data
            except Broken as error:
                self._give_up(peer, route, error)
        for start in range(done, len(wanted), STREAM_CHUNKS_MAX):
            part = wanted[start : start + STREAM_CHUNKS_MAX]
            async with aclosing(self._stream_chunks(peer, part)) as stream:
                async for digest, data in stream:
                    route.moved("grpc", len(data))
                    yield digest, data

    async def _stream_chunks(
        self, peer: ReplicaSource, wanted: Sequence[tuple[str, int]]
    ) -> AsyncGenerator[tuple[str, Data], None]:
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
                    yield digest, data
            finally:
                call.cancel()

    async def _route(self, peer: ReplicaSource, errand: Errand, size_bytes: int) -> Route:
        if self._http_from_bytes is None or size_bytes < self._http_from_bytes:
            return Route()
        until_s, reason = self._resting.get(peer.address, (0.0, ""))
        if time.monotonic() < until_s:
            return Route(reason=reason)
        push = bool(errand.manifest)
        request = peer_pb2.OpenTransferRequest(
            job=errand.job_id,
            epoch=errand.epoch,
            digest=errand.digest,
            direction=peer_pb2.TRANSFER_DIRECTION_PUSH
            if push
            else peer_pb2.TRANSFER_DIRECTION_FETCH,
            manifest=errand.manifest,
        )
        self._renew()
        try:
            if self._tls is not None and self._context is None:
                self._context = https.context(ssl.PROTOCOL_TLS_CLIENT, self._tls)
            with self._calling(peer) as stub:
                response = await stub.OpenTransfer(request, timeout=DEADLINE_BASE_S)
        except (ChunkError, TransportError) as error:
            return Route(reason=str(error))
        if not _sensible(response):
            return Route(reason=f"{_name(peer)} gives leave with a port or token that cannot be")
        valid_s = min(response.valid.seconds, deadline_s(size_bytes))
        access = Access(
            peer.address.rpartition(":")[0].strip("[]"),
            response.port,
            response.token,
            self._context,
            time.monotonic() + valid_s,
        )
        try:
            return Route(Link(peer, access))
        except OSError as error:  # no thread is left for it
            return Route(reason=str(error))

    def _give_up(self, peer: ReplicaSource, route: Route, error: Broken) -> None:
        """Go on without HTTP, now and for a while."""
        route.end_link()
        route.reason = str(error)
        now_s = time.monotonic()
        waking = [name for name, (until_s, _) in self._resting.items() if until_s <= now_s]
        oldest = islice(self._resting, max(0, len(self._resting) + 1 - HTTP_RESTING_MAX))
        for name in {*waking, *oldest}:
            del self._resting[name]
        self._resting[peer.address] = (now_s + HTTP_REST_S, str(error))

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
            if entry.retired and not entry.users_count:
                self._shut(entry)

    def _entry(self, address: str) -> _Entry:
        self._renew()
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
                self._shut(entry)
                return
        raise ChunkError(f"{CHANNELS_MAX} peers are being talked to already")

    def _shut(self, entry: _Entry) -> None:
        task = asyncio.get_running_loop().create_task(entry.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _name(peer: ReplicaSource) -> str:
    return f"{peer.node} ({peer.address})"


def _sensible(leave: peer_pb2.OpenTransferResponse) -> bool:
    """As peer.proto says; anything else might not even fit a request."""
    token = leave.token
    return (
        1 <= leave.port <= 65535
        and 1 <= len(token) <= TOKEN_CHARACTERS_MAX
        and token.isascii()
        and token.isprintable()
    )


def pieces(digest: str, data: bytes) -> Iterator[peer_pb2.Chunk]:
    """A chunk as it travels over gRPC, either way."""
    for start in range(0, len(data), PIECE_BYTES_MAX):
        piece = data[start : start + PIECE_BYTES_MAX]
        yield peer_pb2.Chunk(digest=digest, data=piece, size_bytes=len(data))


async def _first(
    unsent: Sequence[tuple[str, bytes]], rest: AsyncIterator[tuple[str, bytes]]
) -> AsyncGenerator[tuple[str, bytes], None]:
    for item in unsent:
        yield item
    async for item in rest:
        yield item
