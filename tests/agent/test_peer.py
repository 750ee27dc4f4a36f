"""The peer service against callers that are wrong, over real loopback gRPC.

Safety: whatever a caller sends, nothing unverified is kept, nothing beyond the limits is held, no
path is reached that a digest or an attempt id does not name; each refusal has its status code.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from agent import peer as peer_module
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    DIGESTS_MAX,
    PIECE_BYTES_MAX,
    ChunkRef,
    FileEntry,
    Manifest,
    digest_of,
    encode,
)
from agent.chunks.peers import PeerClient
from agent.chunks.store import ChunkStore
from agent.core.values import ReplicaSource
from agent.peer import PeerServer
from agent.ports import ChunkError
from agent.transport import open_channel
from protos.baton.v1 import peer_pb2
from protos.baton.v1.peer_pb2_grpc import PeerServiceStub
from tests.held_port import held_port

LOG = bytes(range(256)) * 1024


async def read_log(
    attempt: str, offset: int, follow: bool, tail_bytes: int
) -> AsyncIterator[tuple[int, bytes]]:
    if attempt != "12.3":
        raise FileNotFoundError(attempt)
    start = max(0, len(LOG) - tail_bytes) if tail_bytes else offset
    yield start, LOG[start:]
    if follow:
        yield len(LOG), b"the end"


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    store = ChunkStore(tmp_path / "chunks")
    store.open()
    return store


@pytest.fixture
async def channel(store: ChunkStore) -> AsyncIterator[grpc.aio.Channel]:
    server = PeerServer(store, read_log, address="127.0.0.1:0", tls=None)
    port = await server.open()
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        yield channel
    await server.close()


def chunk(digest: str, data: bytes, size_bytes: int | None = None) -> peer_pb2.PutCheckpointRequest:
    size_bytes = len(data) if size_bytes is None else size_bytes
    piece = peer_pb2.Chunk(digest=digest, data=data, size_bytes=size_bytes)
    return peer_pb2.PutCheckpointRequest(chunk=piece)


def manifest_of(*chunks: bytes) -> peer_pb2.PutCheckpointRequest:
    refs = tuple(ChunkRef(digest_of(data), len(data)) for data in chunks)
    data = encode(Manifest(1, 1, 1, "", (FileEntry("file", 0o600, refs),)))
    return peer_pb2.PutCheckpointRequest(
        manifest=peer_pb2.Manifest(digest=digest_of(data), data=data)
    )


async def put(channel: grpc.aio.Channel, parts: Iterable[peer_pb2.PutCheckpointRequest]) -> int:
    response = await PeerServiceStub(channel).PutCheckpoint(iter(list(parts)), timeout=30)
    return response.received_bytes


def kept(store: ChunkStore) -> list[str]:
    return [path.name for path in (store.root / "objects").rglob("*") if path.is_file()]


A, B = b"a" * 100, b"b" * 200
DIGEST_A = digest_of(A)
LARGE = b"x" * (PIECE_BYTES_MAX + 1)

WRONG_UPLOADS = {
    "other bytes": ([chunk(DIGEST_A, B[:100])], grpc.StatusCode.DATA_LOSS),
    "no manifest": ([chunk(DIGEST_A, A)], grpc.StatusCode.INVALID_ARGUMENT),
    "nothing": ([], grpc.StatusCode.INVALID_ARGUMENT),
    "manifest without chunks": ([manifest_of(A)], grpc.StatusCode.FAILED_PRECONDITION),
    "manifest not last": (
        [manifest_of(), chunk(DIGEST_A, A)],
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "two manifests": ([manifest_of(), manifest_of()], grpc.StatusCode.INVALID_ARGUMENT),
    "manifest of another digest": (
        [
            peer_pb2.PutCheckpointRequest(
                manifest=peer_pb2.Manifest(digest=DIGEST_A, data=manifest_of().manifest.data)
            )
        ],
        grpc.StatusCode.DATA_LOSS,
    ),
    "manifest that is none": (
        [
            peer_pb2.PutCheckpointRequest(
                manifest=peer_pb2.Manifest(digest=digest_of(b"{}"), data=b"{}")
            )
        ],
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "digest that is a path": (
        [chunk("../../../../tmp/x", A)],
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "piece too large": (
        [chunk(digest_of(LARGE), LARGE)],
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "chunk too large": (
        [chunk(DIGEST_A, A, CHUNK_BYTES_MAX + 1)],
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "empty chunk": ([chunk(digest_of(b""), b"")], grpc.StatusCode.INVALID_ARGUMENT),
    "empty piece": ([chunk(DIGEST_A, b"", 100)], grpc.StatusCode.INVALID_ARGUMENT),
    "longer than said": ([chunk(DIGEST_A, A, 99)], grpc.StatusCode.INVALID_ARGUMENT),
    "another chunk in between": (
        [chunk(DIGEST_A, A[:50], 100), chunk(digest_of(B), B)],
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "ends within a chunk": (
        [chunk(DIGEST_A, A[:50], 100), manifest_of()],
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "part that is none": ([peer_pb2.PutCheckpointRequest()], grpc.StatusCode.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("name", WRONG_UPLOADS)
async def test_a_wrong_upload_is_refused_with_its_status(
    store: ChunkStore, channel: grpc.aio.Channel, name: str
) -> None:
    parts, status = WRONG_UPLOADS[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await put(channel, parts)
    assert caught.value.code() is status
    assert caught.value.details()
    assert store.checkpoints() == ()
    assert set(kept(store)) <= {DIGEST_A}
    assert list((store.root / "temporary").iterdir()) == []


async def test_a_right_upload_is_kept_and_can_be_read(
    store: ChunkStore, channel: grpc.aio.Channel
) -> None:
    large = os.urandom(CHUNK_BYTES_MAX)
    digest = digest_of(large)
    half = PIECE_BYTES_MAX
    last = manifest_of(large, A)
    parts = [
        chunk(digest, large[:half], len(large)),
        chunk(digest, large[half:], len(large)),
        chunk(DIGEST_A, A),
        last,
    ]
    assert await put(channel, parts) == len(large) + len(A) + len(last.manifest.data)
    assert store.checkpoints() == (last.manifest.digest,)

    stub = PeerServiceStub(channel)
    request = peer_pb2.GetManifestRequest(digest=last.manifest.digest)
    assert (await stub.GetManifest(request, timeout=30)).data == last.manifest.data
    wanted = peer_pb2.GetChunksRequest(digests=[DIGEST_A, digest])
    pieces = [response.chunk async for response in stub.GetChunks(wanted, timeout=30)]
    assert [piece.digest for piece in pieces] == [DIGEST_A, digest, digest]
    assert all(len(piece.data) <= PIECE_BYTES_MAX for piece in pieces)
    assert b"".join(piece.data for piece in pieces) == A + large


async def test_find_missing_answers_and_is_bounded(
    store: ChunkStore, channel: grpc.aio.Channel
) -> None:
    with store.writing() as writing:
        writing.put_chunk(DIGEST_A, A)
    stub = PeerServiceStub(channel)
    absent = [digest_of(str(number).encode()) for number in range(3)]
    request = peer_pb2.FindMissingRequest(digests=[absent[0], DIGEST_A, *absent[1:]])
    assert list((await stub.FindMissing(request, timeout=30)).digests) == absent
    for digests in (["x" * 64] * (DIGESTS_MAX + 1), ["../x"]):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.FindMissing(peer_pb2.FindMissingRequest(digests=digests), timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    most = peer_pb2.FindMissingRequest(digests=absent[:1] * DIGESTS_MAX)
    assert len((await stub.FindMissing(most, timeout=30)).digests) == DIGESTS_MAX


@pytest.mark.parametrize(
    ("digest", "status"),
    [
        ("ab" * 32, grpc.StatusCode.NOT_FOUND),
        ("../../secret", grpc.StatusCode.INVALID_ARGUMENT),
        (DIGEST_A, grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_what_is_absent_altered_or_no_digest_is_not_given(
    store: ChunkStore, channel: grpc.aio.Channel, digest: str, status: grpc.StatusCode
) -> None:
    (store.root / "objects" / DIGEST_A[:2] / DIGEST_A).write_bytes(b"altered")
    (store.root / "manifests" / f"{DIGEST_A}.json").write_bytes(b"altered")
    stub = PeerServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetManifest(peer_pb2.GetManifestRequest(digest=digest), timeout=30)
    assert caught.value.code() is status
    stream = stub.GetChunks(peer_pb2.GetChunksRequest(digests=[digest]), timeout=30)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(stream))
    assert caught.value.code() is status


async def test_a_full_disk_is_resource_exhausted_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    done = await asyncio.to_thread(
        subprocess.run, mount, capture_output=True, text=True, check=False, timeout=30
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    store = ChunkStore(disk / "chunks")
    store.open()
    server = PeerServer(store, read_log, address="127.0.0.1:0", tls=None)
    port = await server.open()
    try:
        data = [os.urandom(PIECE_BYTES_MAX) for _ in range(4)]
        parts = [chunk(digest_of(item), item) for item in data]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await put(channel, [*parts, manifest_of(*data)])
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = caught.value.details() or ""
        assert details.startswith("disk full: writing chunk")
        assert details.endswith("kept in reserve for the agent's own records")
        assert kept(store) == []
        assert list((store.root / "temporary").iterdir()) == []
    finally:
        await server.close()
        await asyncio.to_thread(subprocess.run, ["umount", str(disk)], check=True, timeout=30)


async def _log(
    channel: grpc.aio.Channel, request: peer_pb2.ReadLogRequest
) -> list[tuple[int, bytes]]:
    stream = PeerServiceStub(channel).ReadLog(request, timeout=30)
    return [(response.offset, response.data) async for response in stream]


async def test_a_log_comes_in_bounded_pieces_with_their_offsets(channel: grpc.aio.Channel) -> None:
    pieces = await _log(channel, peer_pb2.ReadLogRequest(attempt="12.3", offset=10, follow=True))
    assert b"".join(data for _, data in pieces) == LOG[10:] + b"the end"
    assert all(len(data) <= 64 << 10 for _, data in pieces)
    offset = 10
    for start, data in pieces:
        assert start == offset
        offset += len(data)
    tail = await _log(channel, peer_pb2.ReadLogRequest(attempt="12.3", tail_bytes=5))
    assert tail == [(len(LOG) - 5, LOG[-5:])]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (peer_pb2.ReadLogRequest(attempt="12.4"), grpc.StatusCode.NOT_FOUND),
        (peer_pb2.ReadLogRequest(attempt="12.3.0"), grpc.StatusCode.NOT_FOUND),
        (peer_pb2.ReadLogRequest(attempt="12.3.1024"), grpc.StatusCode.INVALID_ARGUMENT),
        (peer_pb2.ReadLogRequest(attempt="../12.3"), grpc.StatusCode.INVALID_ARGUMENT),
        (peer_pb2.ReadLogRequest(attempt="12.3\n"), grpc.StatusCode.INVALID_ARGUMENT),
        (peer_pb2.ReadLogRequest(attempt="12"), grpc.StatusCode.INVALID_ARGUMENT),
        (peer_pb2.ReadLogRequest(attempt="٣.1"), grpc.StatusCode.INVALID_ARGUMENT),
        (peer_pb2.ReadLogRequest(attempt="12.3", offset=-1), grpc.StatusCode.INVALID_ARGUMENT),
        (peer_pb2.ReadLogRequest(attempt="12.3", tail_bytes=-1), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_log_that_is_not_there_or_no_attempt_is_refused(
    channel: grpc.aio.Channel, request_: peer_pb2.ReadLogRequest, status: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _log(channel, request_)
    assert caught.value.code() is status


async def test_log_readers_are_bounded(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "LOG_READERS_MAX", 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _log(channel, peer_pb2.ReadLogRequest(attempt="12.3"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_and_reflection_answer(channel: grpc.aio.Channel) -> None:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    for name in ("", "baton.v1.PeerService"):
        answer = await check(health_pb2.HealthCheckRequest(service=name), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    ask = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [response async for response in ask(iter([question]), timeout=30)]
    names = [service.name for service in answers[0].list_services_response.service]
    assert "baton.v1.PeerService" in names


async def test_a_restarted_peer_is_reached_over_the_channel_that_failed(store: ChunkStore) -> None:
    """After failures that gRPC, left to itself, answers from memory for ever longer."""
    with held_port() as port:
        await check_restart(store, ReplicaSource("n2", f"127.0.0.1:{port}"))


async def check_restart(store: ChunkStore, peer: ReplicaSource) -> None:
    first = PeerServer(store, read_log, address=peer.address, tls=None)
    await first.open()
    client = PeerClient(None)
    digest = "ab" * 32
    try:
        assert await client.find_missing(peer, [digest]) == [digest]
        await first.close()
        with pytest.raises(ChunkError, match="n2"):
            await client.find_missing(peer, [digest])
        second = PeerServer(store, read_log, address=peer.address, tls=None)
        await second.open()
        try:
            async with asyncio.timeout(30):
                while True:
                    try:
                        assert await client.find_missing(peer, [digest]) == [digest]
                    except ChunkError:
                        await asyncio.sleep(0.05)
                    else:
                        break
        finally:
            await second.close()
    finally:
        await client.close()


async def test_channels_dial_again_soon_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The numbers themselves: how soon is not for a test to measure."""
    real = grpc.aio.insecure_channel
    given: list[dict[str, int | str]] = []

    def recording(address: str, options: tuple[tuple[str, int | str], ...]) -> grpc.aio.Channel:
        given.append(dict(options))
        assert len(given[-1]) == len(options), "none is given twice"
        return real(address, options)

    monkeypatch.setattr(grpc.aio, "insecure_channel", recording)
    async with (
        open_channel("127.0.0.1:1", None),
        open_channel(
            "127.0.0.1:1",
            None,
            (("grpc.max_reconnect_backoff_ms", 900), ("grpc.keepalive_time_ms", 7)),
        ),
    ):
        soon = {
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.min_reconnect_backoff_ms": 5000,
            "grpc.max_reconnect_backoff_ms": 5000,
        }
        own = {"grpc.max_reconnect_backoff_ms": 900, "grpc.keepalive_time_ms": 7}
        assert given == [soon, soon | own]
