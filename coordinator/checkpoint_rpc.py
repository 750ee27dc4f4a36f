"""What people ask of checkpoints: which are kept, keep this one, and its bytes.

Problem: bytes lie on nodes, and people can reach the coordinator. So it asks a node that holds all
of the checkpoint and passes on what it says, unread, as it does with output. A node that goes away
in the middle, or whose copy has rotted (it verifies what it reads, and then denies having it),
costs no more than the chunk in hand: another holder goes on from there. Whoever receives the bytes
verifies them, since only that says anything.

The manifest is looked into for one thing, the order of the chunks, and so must be the right one: a
false one would make every other holder deny having what it names. Of a gang's checkpoint the parts
of all ranks are read, one after the other. What passes through is bounded, whatever a node says: a
few readers at a time, one chunk each.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import grpc
from blake3 import blake3

from coordinator import wire
from coordinator.core import checkpoint_requests as requests
from coordinator.core import messages as m
from coordinator.core.model import SHARED, Checkpoint, CheckpointView, NodeView, Part
from coordinator.core.phases import NodePhase
from protos.baton.v1 import (
    checkpoints_pb2,
    checkpoints_pb2_grpc,
    peer_pb2,
    peer_pb2_grpc,
)

if TYPE_CHECKING:  # a name that exists in the generated .pyi only
    from protos.baton.v1.peer_pb2_grpc import PeerServiceAsyncStub

# Each holds a chunk of 4 MiB on its way, and takes a share of the one event loop that leases hang
# on.
READERS_MAX = 4
# In one call to a node; 256 MiB at most, so that a deadline stays meaningful.
CHUNKS_PER_CALL = 64
# Connecting, a busy disk, and 256 MiB at a tenth of a gigabit link.
CALL_DEADLINE_S = 60.0
# What an agent may send in one message: a manifest, with some room (agent/chunks/manifest.py).
MESSAGE_BYTES_MAX = 16 << 20
# As peer.proto says, of a chunk and of what one message holds of it.
CHUNK_BYTES_MAX = 4 << 20
PIECE_BYTES_MAX = 2 << 20
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),)

Context = grpc.aio.ServicerContext[object, object]
OpenChannel = Callable[[str], grpc.aio.Channel]
Ask = Callable[[Context, m.RequestBody], Awaitable[m.Answer]]
Response = checkpoints_pb2.ReadCheckpointResponse


class NotToBeHad(Exception):
    """No node that holds the checkpoint gives it now; the text says which were asked."""


class CheckpointReader:
    """`open_channel(address)` dials an agent's peer service."""

    def __init__(self, open_channel: OpenChannel) -> None:
        self._open_channel = open_channel
        self.readers_count = 0

    async def read(
        self, parts: Sequence[tuple[Part, Sequence[NodeView]]]
    ) -> AsyncIterator[Response]:
        """Of each part, with who holds it, the manifest, then each chunk's pieces. Raises
        `NotToBeHad`."""
        self.readers_count += 1
        try:
            for part, holders in parts:
                async for response in self._read(part, holders):
                    yield response
        finally:
            self.readers_count -= 1

    async def _read(self, part: Part, holders: Sequence[NodeView]) -> AsyncIterator[Response]:
        said: list[str] = []
        wanted: list[str] | None = None
        done_count = 0
        for holder in holders:
            try:
                async with self._open_channel(holder.node.peer_address) as channel:
                    stub = peer_pb2_grpc.PeerServiceStub(channel)
                    if wanted is None:
                        manifest = await _manifest(stub, part.digest)
                        wanted = chunks_of(manifest)
                        named = peer_pb2.Manifest(digest=part.digest, data=manifest)
                        yield Response(manifest=named)
                    while done_count < len(wanted):
                        batch = wanted[done_count : done_count + CHUNKS_PER_CALL]
                        async for digest, data in _chunks(stub, batch):
                            for piece in _pieces(digest, data):
                                yield Response(chunk=piece)
                            done_count += 1
                return
            except Unusable as error:
                said.append(f"{holder.node.id}: {error}")
            except grpc.aio.AioRpcError as error:
                details = error.details() if error.code() is grpc.StatusCode.NOT_FOUND else ""
                said.append(f"{holder.node.id}: {details or 'does not answer'}")
        raise NotToBeHad("; ".join(said))


class Unusable(Exception):
    """A node sent what it was not asked for."""


async def read_manifest(channel: grpc.aio.Channel, digest: str) -> bytes:
    """From one node. Raises `AioRpcError`, and `Unusable` for other bytes than were asked for."""
    return await _manifest(peer_pb2_grpc.PeerServiceStub(channel), digest)


async def _manifest(stub: "PeerServiceAsyncStub", digest: str) -> bytes:
    request = peer_pb2.GetManifestRequest(digest=digest)
    response = await stub.GetManifest(request, timeout=CALL_DEADLINE_S)
    if blake3(response.data).hexdigest() != digest:
        raise Unusable(f"sent other than manifest {digest[:12]}")
    return response.data


async def _chunks(
    stub: "PeerServiceAsyncStub", digests: Sequence[str]
) -> AsyncGenerator[tuple[str, bytes], None]:
    """Each chunk, once all of it is here: what another node starts again must not be half sent. Put
    together, as its pieces may be as small as a node likes."""
    request = peer_pb2.GetChunksRequest(digests=digests)
    call = stub.GetChunks(request, timeout=CALL_DEADLINE_S)
    try:
        responses = aiter(call)
        for digest in digests:
            data = bytearray()
            size_bytes = 0  # until the first piece says
            while not data or len(data) < size_bytes:
                response = await anext(responses, None)
                piece = peer_pb2.Chunk() if response is None else response.chunk
                size_bytes = size_bytes or min(piece.size_bytes, CHUNK_BYTES_MAX)
                fits = 1 <= len(piece.data) <= size_bytes - len(data)
                if (piece.digest, piece.size_bytes) != (digest, size_bytes) or not fits:
                    raise Unusable(f"sent other than chunk {digest[:12]}")
                data += piece.data
            yield digest, bytes(data)
    finally:
        call.cancel()


def _pieces(digest: str, data: bytes) -> Iterator[peer_pb2.Chunk]:
    for start in range(0, len(data), PIECE_BYTES_MAX):
        piece = data[start : start + PIECE_BYTES_MAX]
        yield peer_pb2.Chunk(digest=digest, data=piece, size_bytes=len(data))


def chunks_of(manifest: bytes) -> list[str]:
    """Every chunk that a manifest names, once, in order of first use. Raises `Unusable`."""
    try:
        files = json.loads(manifest)["files"]
        return list(dict.fromkeys(str(pair[0]) for entry in files for pair in entry["chunks"]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Unusable(f"its manifest makes no sense ({error})") from None


class CheckpointService(checkpoints_pb2_grpc.CheckpointServiceServicer):
    """`ask` has the core's answer, or ends the call with its refusal."""

    def __init__(self, ask: Ask, reader: CheckpointReader) -> None:
        self._ask = ask
        self._reader = reader

    async def ListCheckpoints(
        self, request: checkpoints_pb2.ListCheckpointsRequest, context: Context
    ) -> checkpoints_pb2.ListCheckpointsResponse:
        kept = await self._kept(context, requests.ListCheckpoints(request.job_id))
        return checkpoints_pb2.ListCheckpointsResponse(checkpoints=map(_encode, kept))

    async def PinCheckpoint(
        self, request: checkpoints_pb2.PinCheckpointRequest, context: Context
    ) -> checkpoints_pb2.PinCheckpointResponse:
        body = requests.PinCheckpoint(request.job_id, _choice(request.choice))
        kept = await self._kept(context, body)
        return checkpoints_pb2.PinCheckpointResponse(checkpoints=map(_encode, kept))

    async def UnpinCheckpoint(
        self, request: checkpoints_pb2.UnpinCheckpointRequest, context: Context
    ) -> checkpoints_pb2.UnpinCheckpointResponse:
        choice = _choice(request.choice) if request.HasField("choice") else None
        kept = await self._kept(context, requests.UnpinCheckpoint(request.job_id, choice))
        return checkpoints_pb2.UnpinCheckpointResponse(checkpoints=map(_encode, kept))

    async def ReadCheckpoint(
        self, request: checkpoints_pb2.ReadCheckpointRequest, context: Context
    ) -> AsyncIterator[Response]:
        body = requests.FindCheckpoint(request.job_id, _choice(request.choice))
        checkpoint = (await self._kept(context, body))[0].checkpoint
        parts = await self._holders(context, checkpoint)
        if self._reader.readers_count >= READERS_MAX:
            full = f"{READERS_MAX} checkpoints are being read already; try again later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        try:
            async for response in self._reader.read(parts):
                yield response
        except NotToBeHad as error:
            what = f"checkpoint {checkpoint.digest[:12]} (step {checkpoint.step})"
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{what} is not to be had: {error}")

    async def _holders(
        self, context: Context, checkpoint: Checkpoint
    ) -> list[tuple[Part, list[NodeView]]]:
        """Of each part the nodes that hold it and are not lost, those that are up first; none ends
        the call."""
        names = {name: None for part in checkpoint.pieces for name in part.replicas}
        page = await self._ask(context, m.ListNodes(nodes=tuple(names)))
        nodes = page.nodes if isinstance(page, m.NodePage) else ()
        found = []
        for rank, part in enumerate(checkpoint.pieces):
            held = [view for view in nodes if view.node.id in part.replicas]
            there = [view for view in held if view.phase is not NodePhase.LOST]
            if not there:
                await context.abort(grpc.StatusCode.UNAVAILABLE, _where(checkpoint, rank, part))
            found.append((part, sorted(there, key=lambda view: view.phase is not NodePhase.UP)))
        return found

    async def _kept(self, context: Context, body: m.RequestBody) -> tuple[CheckpointView, ...]:
        answer = await self._ask(context, body)
        if not isinstance(answer, m.CheckpointPage):
            raise TypeError(f"expected checkpoints, got {type(answer).__name__}")
        return answer.checkpoints


def _where(checkpoint: Checkpoint, rank: int, part: Part) -> str:
    """Of a part that no node within reach holds."""
    what = f"checkpoint {checkpoint.digest[:12]} (step {checkpoint.step})"
    if checkpoint.parts:
        what = f"rank {rank}'s part of {what}"
    sentence = f"{what} lies on {' and '.join(part.replicas) or 'no node any more'}"
    if SHARED in part.replicas:
        return f"{sentence}; what lies in the shared directory alone only agents can read"
    return f"{sentence}, which cannot be reached" if part.replicas else sentence


def _choice(choice: checkpoints_pb2.CheckpointChoice) -> requests.CheckpointChoice:
    return requests.CheckpointChoice(
        choice.digest, choice.step if choice.HasField("step") else None
    )


def _encode(view: CheckpointView) -> checkpoints_pb2.KeptCheckpoint:
    return checkpoints_pb2.KeptCheckpoint(
        checkpoint=wire.encode_checkpoint(view.checkpoint),
        pinned=view.checkpoint.pinned,
        bad=view.checkpoint.bad,
        used_by=view.used_by,
    )


def add_checkpoint_service(server: grpc.aio.Server, ask: Ask, open_channel: OpenChannel) -> str:
    """Returns the service's full name."""
    service = CheckpointService(ask, CheckpointReader(open_channel))
    checkpoints_pb2_grpc.add_CheckpointServiceServicer_to_server(service, server)
    return checkpoints_pb2.DESCRIPTOR.services_by_name["CheckpointService"].full_name
