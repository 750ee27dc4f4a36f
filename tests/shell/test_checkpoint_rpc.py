"""The bytes of a checkpoint through the coordinator, from agents that do not all keep their word.

Safety: each chunk is passed on whole and once, in order, whichever node it came from. Liveness: one
holder that has it is enough. Both over real gRPC, with agents whose answers are scripted.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

import grpc
import pytest
from blake3 import blake3

from coordinator import checkpoint_rpc
from coordinator.core import messages as m
from coordinator.core.checkpoint_requests import FindCheckpoint
from coordinator.core.model import (
    SHARED,
    Checkpoint,
    CheckpointView,
    HostFacts,
    Node,
    NodeView,
    Part,
)
from coordinator.core.phases import NodePhase
from protos.baton.v1 import checkpoints_pb2 as pb
from protos.baton.v1 import checkpoints_pb2_grpc, peer_pb2, peer_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]

DEADLINE_S = 30.0
CHUNKS = {f"{number:064x}": bytes([number]) * (number + 1) for number in range(150)}
MANIFEST = json.dumps(
    {"files": [{"chunks": [[digest, len(data)] for digest, data in CHUNKS.items()]}] * 2}
).encode()
DIGEST = blake3(MANIFEST).hexdigest()
CHUNK = "cd" * 32


@dataclass
class Agent:
    """Has the checkpoint, all but `lacks`; sends a wrong chunk in place of `mixes_up`."""

    lacks: str = ""
    mixes_up: str = ""
    manifest: bytes = MANIFEST
    wait: asyncio.Event | None = None
    lies: bool = False
    asked: list[int] = field(default_factory=list)

    async def get_manifest(
        self, request: peer_pb2.GetManifestRequest, context: Context
    ) -> peer_pb2.GetManifestResponse:
        assert request.digest == blake3(self.manifest).hexdigest() or self.lies
        if self.wait is not None:
            await self.wait.wait()
        return peer_pb2.GetManifestResponse(data=self.manifest)

    async def get_chunks(
        self, request: peer_pb2.GetChunksRequest, context: Context
    ) -> AsyncIterator[peer_pb2.GetChunksResponse]:
        self.asked.append(len(request.digests))
        for digest in request.digests:
            data = CHUNKS[digest]
            pieces = [data[at : at + 50] for at in range(0, len(data), 50)]
            for place, piece in enumerate(pieces):
                if digest == self.lacks and place == len(pieces) - 1:
                    await context.abort(grpc.StatusCode.NOT_FOUND, "bytes do not match")
                name = "f" * 64 if digest == self.mixes_up else digest
                chunk = peer_pb2.Chunk(digest=name, data=piece, size_bytes=len(data))
                yield peer_pb2.GetChunksResponse(chunk=chunk)


@dataclass
class World:
    """A coordinator's service whose core says which nodes there are."""

    nodes: list[NodeView] = field(default_factory=list)
    holders: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    servers: list[grpc.aio.Server] = field(default_factory=list)
    stub: Any = None

    async def ask(self, context: object, body: m.RequestBody) -> m.Answer:
        if isinstance(body, m.ListNodes):
            return m.NodePage(tuple(self.nodes))
        assert isinstance(body, FindCheckpoint)
        kept = Checkpoint(body.job_id, DIGEST, "", 1, 10, 1, self.holders, 0, parts=self.parts)
        return m.CheckpointPage((CheckpointView(kept),))

    async def serve(self, add: Callable[[grpc.aio.Server], object]) -> str:
        server = grpc.aio.server()
        add(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.servers.append(server)
        return f"127.0.0.1:{port}"

    async def join(self, name: str, agent: Agent, phase: NodePhase = NodePhase.UP) -> None:
        peer: Any = type("Peer", (peer_pb2_grpc.PeerServiceServicer,), {})()
        peer.GetManifest, peer.GetChunks = agent.get_manifest, agent.get_chunks
        address = await self.serve(
            lambda server: peer_pb2_grpc.add_PeerServiceServicer_to_server(peer, server)
        )
        node = Node(name, "j", address, HostFacts(), ())
        self.nodes.append(NodeView(node, phase, (), (), ""))
        self.holders = (*self.holders, name)

    async def read(self) -> dict[str, bytes]:
        """The chunks as they come, with the manifest under its digest."""
        found: dict[str, bytes] = {}
        last = ""
        call = self.stub.ReadCheckpoint(pb.ReadCheckpointRequest(job_id=1))
        async with asyncio.timeout(DEADLINE_S):
            async for response in call:
                part = response.chunk if response.HasField("chunk") else response.manifest
                assert part.digest == last or part.digest not in found, "begun again, or twice"
                last = part.digest
                found[last] = found.get(last, b"") + part.data
        return found


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    address = await made.serve(
        lambda server: checkpoint_rpc.add_checkpoint_service(
            server, made.ask, lambda peer: grpc.aio.insecure_channel(peer)
        )
    )
    async with grpc.aio.insecure_channel(address) as channel:
        made.stub = checkpoints_pb2_grpc.CheckpointServiceStub(channel)
        yield made
    for server in made.servers:
        await server.stop(None)


WHOLE = {DIGEST: MANIFEST, **CHUNKS}


async def test_all_of_it_in_order_and_in_bounded_calls(world: World) -> None:
    agent = Agent()
    await world.join("n1", agent)
    found = await world.read()
    assert found == WHOLE
    assert list(found) == list(WHOLE)
    assert agent.asked == [64, 64, 22]


@pytest.mark.parametrize("place", [0, 63, 64, 149])
@pytest.mark.parametrize("fault", ["lacks", "mixes_up"])
async def test_another_holder_goes_on_where_one_fails(fault: str, place: int, world: World) -> None:
    agent = Agent()
    setattr(agent, fault, list(CHUNKS)[place])
    await world.join("n1", agent)
    await world.join("n2", Agent())
    found = await world.read()
    assert found == WHOLE
    assert list(found) == list(WHOLE)


async def test_when_nobody_has_it_every_answer_is_told(world: World) -> None:
    await world.join("n1", Agent(lacks=list(CHUNKS)[3]))
    await world.join("n2", Agent(mixes_up=list(CHUNKS)[3]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == (
        f"checkpoint {DIGEST[:12]} (step 10) is not to be had: n1: bytes do not match; n2: sent"
        " other than chunk 000000000000"
    )


@pytest.mark.parametrize("manifest", [b"[]", b'{"files": [{"chunks": [["%064x", 7]]}]}' % 999])
async def test_another_manifest_is_the_nodes_fault(manifest: bytes, world: World) -> None:
    """One with sense would make every other holder deny what it names."""
    await world.join("n1", Agent(manifest=manifest, lies=True))
    await world.join("n2", Agent())
    assert await world.read() == WHOLE


class Said:
    """A call that answers with these pieces of `CHUNK`, and must not be asked for more."""

    def __init__(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        self.left = list(pieces)
        self.cancelled = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> peer_pb2.GetChunksResponse:
        size_bytes, data = self.left.pop(0)
        chunk = peer_pb2.Chunk(digest=CHUNK, data=data, size_bytes=size_bytes)
        return peer_pb2.GetChunksResponse(chunk=chunk)

    def cancel(self) -> None:
        self.cancelled = True

    async def read(self) -> tuple[str, bytes]:
        stub: Any = SimpleNamespace(GetChunks=lambda request, timeout: self)
        async with aclosing(checkpoint_rpc._chunks(stub, [CHUNK])) as chunks:
            return await anext(chunks)


@pytest.mark.parametrize(
    "pieces",
    [
        [(1 << 60, b"x")],
        [((4 << 20) + 1, b"x")],
        [(0, b"x")],
        [(-1, b"x")],
        [(10, b"")],
        [(10, b"x" * 11)],
        [(10, b"x" * 6), (10, b"x" * 5)],
        [(10, b"x" * 6), (11, b"x")],
    ],
    ids="huge large zero negative empty long longer changed".split(),
)
async def test_a_lie_about_a_size_ends_the_call_at_once(pieces: list[tuple[int, bytes]]) -> None:
    said = Said([*pieces, (10, b"never asked for")])
    with pytest.raises(checkpoint_rpc.Unusable, match=f"sent other than chunk {CHUNK[:12]}"):
        await said.read()
    assert said.left == [(10, b"never asked for")]
    assert said.cancelled


async def test_crumbs_are_put_together_and_passed_on_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A message costs far more memory than the byte that it may hold."""
    whole = bytes(range(250))
    digest, data = await Said([(250, whole[at : at + 1]) for at in range(250)]).read()
    assert (digest, data) == (CHUNK, whole)
    monkeypatch.setattr(checkpoint_rpc, "PIECE_BYTES_MAX", 100)
    pieces = list(checkpoint_rpc._pieces(digest, data))
    assert [len(piece.data) for piece in pieces] == [100, 100, 50]
    assert b"".join(piece.data for piece in pieces) == whole
    assert {(piece.digest, piece.size_bytes) for piece in pieces} == {(CHUNK, 250)}


def test_a_manifest_without_sense_is_said() -> None:
    with pytest.raises(checkpoint_rpc.Unusable, match="makes no sense"):
        checkpoint_rpc.chunks_of(b"[]")


async def test_lost_nodes_are_not_asked_and_the_shared_directory_cannot_be(world: World) -> None:
    await world.join("n1", Agent(), NodePhase.LOST)
    with pytest.raises(grpc.aio.AioRpcError, match="lies on n1, which cannot be reached"):
        await world.read()
    world.holders = (SHARED,)
    with pytest.raises(grpc.aio.AioRpcError, match="only agents can read"):
        await world.read()
    world.holders = ()
    with pytest.raises(grpc.aio.AioRpcError, match="lies on no node any more"):
        await world.read()


async def test_the_parts_of_all_ranks_come_one_after_the_other(world: World) -> None:
    """From whoever holds each; one that nobody within reach holds is named before any is sent."""
    other = MANIFEST.replace(b"}", b" }")
    digest = blake3(other).hexdigest()
    await world.join("n1", Agent())
    await world.join("n2", Agent(manifest=other))
    world.holders, world.parts = ("n1",), (Part(digest, 1, ("n2",)),)
    call = world.stub.ReadCheckpoint(pb.ReadCheckpointRequest(job_id=1))
    async with asyncio.timeout(DEADLINE_S):
        said = [r.manifest.digest or r.chunk.digest async for r in call]
    assert [name for name in said if name in (DIGEST, digest)] == [DIGEST, digest]
    each = list(dict.fromkeys(CHUNKS))
    assert list(dict.fromkeys(said[: said.index(digest)])) == [DIGEST, *each]
    assert list(dict.fromkeys(said[said.index(digest) :])) == [digest, *each]
    world.parts = (Part(digest, 1, ("n3",)),)
    with pytest.raises(grpc.aio.AioRpcError, match=r"rank 1's part of checkpoint .* lies on n3"):
        await world.read()


async def test_no_more_readers_than_the_bound(world: World) -> None:
    gate = asyncio.Event()
    await world.join("n1", Agent(wait=gate))
    readers = [asyncio.create_task(world.read()) for _ in range(checkpoint_rpc.READERS_MAX + 1)]
    try:
        done, waiting = await asyncio.wait(
            readers, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        (refused,) = done
        with pytest.raises(grpc.aio.AioRpcError, match="are being read already") as caught:
            await refused
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.set()
        assert [await reader for reader in waiting] == [WHOLE] * checkpoint_rpc.READERS_MAX
    finally:
        gate.set()
        await asyncio.gather(*readers, return_exceptions=True)
    assert await world.read() == WHOLE
