"""What checkpoints say of themselves, read from nodes of which one does not answer."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from blake3 import blake3

from coordinator.core import messages as m
from coordinator.core.checkpoint_requests import Manifest, NoteManifests
from coordinator.manifests import TOLD_MAX, ManifestReader
from protos.baton.v1 import peer_pb2, peer_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]


def encoded(step: int, **others: object) -> bytes:
    """As agent/chunks/manifest.py writes it."""
    files = [{"path": path, "size_bytes": 3, "mode": 420, "chunks": []} for path in "ab"]
    place = {"version": 1, "hash": "blake3", "job": 7, "epoch": 2, "step": step, "parent": ""}
    return json.dumps({**place, "files": files, **others}).encode()


WHOLE = [encoded(step) for step in range(TOLD_MAX)]
PART, TORN, ALTERED = encoded(1, rank=0), b"{", b"other than what was asked for"
# What no store can hold, of an agent that lies.
HUGE = [encoded(2**70), encoded(1, epoch=-1)]
HUGE += [encoded(1, files=[{"size_bytes": 2**62}] * 2)]
ON_DISK = {blake3(data).hexdigest(): data for data in (*WHOLE, PART, TORN, *HUGE)}
ON_DISK |= {"0" * 64: ALTERED}


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """A node's peer service."""

    async def get_manifest(
        request: peer_pb2.GetManifestRequest, context: Context
    ) -> peer_pb2.GetManifestResponse:
        if request.digest not in ON_DISK:
            await context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        return peer_pb2.GetManifestResponse(data=ON_DISK[request.digest])

    peer: Any = type("Peer", (peer_pb2_grpc.PeerServiceServicer,), {})()
    peer.GetManifest = get_manifest
    server = grpc.aio.server()
    peer_pb2_grpc.add_PeerServiceServicer_to_server(peer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_what_makes_sense_is_told_and_who_does_not_answer_is_left(address: str) -> None:
    told: list[NoteManifests] = []

    async def request(body: m.RequestBody) -> m.Answer:
        assert isinstance(body, NoteManifests)
        told.append(body)
        return m.NodePage(())

    digests = ("f" * 64, *ON_DISK)
    wanted = [("n1", "127.0.0.1:1", digests), ("n2", address, digests)]
    await ManifestReader(lambda: wanted, request, grpc.aio.insecure_channel).look()
    assert {body.node for body in told} == {"n2"}
    assert tuple(digest for body in told for digest in body.digests) == digests
    assert max(len(body.digests) for body in told) == TOLD_MAX
    found = [one for body in told for one in body.manifests]
    assert found[3] == Manifest(blake3(WHOLE[3]).hexdigest(), 7, 2, 3, "", 6)
    assert [one.step for one in found[:-1]] == [*range(TOLD_MAX)]
    assert found[-1] == Manifest(blake3(PART).hexdigest(), 7, 2, 1, "", 6, rank=0)
