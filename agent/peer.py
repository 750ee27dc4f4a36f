"""What this node serves to other agents and to the coordinator: checkpoints and logs, nothing that
runs anything.

Problem: whoever reaches this port could fill the disk, fill the memory, read any file through a
crafted digest or attempt id, or slip in bytes that a later restore would trust. TLS says who calls,
not that the caller is healthy.

So: every digest and attempt id is matched against its pattern before it becomes a path; a chunk is
held in memory once, up to 4 MiB, and verified before it gets its name; a manifest is accepted only
when all its chunks are here; calls, log readers and messages are bounded. Every refusal is a status
code, as peer.proto says, with a sentence. Large transfers move their chunks over HTTP beside this
service, with the leave that `OpenTransfer` gives (see `chunks.http_server`). Disk work runs in two
threads of its own, so that a checkpoint being hashed here does not make a peer's deadline pass.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, ParamSpec, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from agent.callers import Caller, Guard
from agent.chunks.http_server import FETCH, PUSH, Busy, ChunkHttpServer, Transfers
from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    CHUNKS_MAX,
    DIGESTS_MAX,
    MESSAGE_BYTES_MAX,
    PIECE_BYTES_MAX,
    Absent,
    Altered,
    DiskFull,
    Incomplete,
    Invalid,
    Manifest,
    decode,
    digest_of,
    short,
)
from agent.chunks.peers import deadline_s, pieces
from agent.chunks.store import ChunkStore, Writing
from agent.chunks.threads import crew
from agent.core.ids import find_attempt_id
from agent.ports import ChunkError
from agent.transport import Tls, listen
from protos.baton.v1 import peer_pb2
from protos.baton.v1.peer_pb2_grpc import (
    PeerServiceServicer,
    add_PeerServiceServicer_to_server,
)

# Peers send to and read from a node a few at a time; each call may hold a chunk and its message, so
# about 1 GiB at worst.
CALLS_MAX = 64
# Half of the calls: people who follow logs must not keep checkpoints out.
LOG_READERS_MAX = 32
# As peer.proto says.
LOG_PIECE_BYTES_MAX = 64 << 10
# Disk work for peers, beside the agent's own.
THREADS_MAX = 2
# How long calls in progress may go on when the agent stops; a peer tries again elsewhere.
CLOSE_GRACE_S = 1.0

SERVICE_NAME = peer_pb2.DESCRIPTOR.services_by_name["PeerService"].full_name

# (attempt id, offset, follow, tail_bytes) -> (offset of the first byte, bytes)...; raises
# `FileNotFoundError` for no log.
ReadLog = Callable[[str, int, bool, int], AsyncIterator[tuple[int, bytes]]]

_DIRECTIONS = {
    peer_pb2.TRANSFER_DIRECTION_FETCH: FETCH,
    peer_pb2.TRANSFER_DIRECTION_PUSH: PUSH,
}

_STATUS: tuple[tuple[type[ChunkError], grpc.StatusCode], ...] = (
    (Altered, grpc.StatusCode.DATA_LOSS),
    (DiskFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Incomplete, grpc.StatusCode.FAILED_PRECONDITION),
    (Absent, grpc.StatusCode.NOT_FOUND),
    (Invalid, grpc.StatusCode.INVALID_ARGUMENT),
)

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")
_Context = grpc.aio.ServicerContext[object, object]


class PeerService(PeerServiceServicer):
    """Serves `store`, and the logs that `read_log` gives; lets callers into `http`, which asks
    `transfers`. `executor` does the disk work."""

    def __init__(
        self,
        store: ChunkStore,
        read_log: ReadLog,
        executor: ThreadPoolExecutor,
        *,
        transfers: Transfers,
        http: ChunkHttpServer,
    ) -> None:
        self._store = store
        self._read_log = read_log
        self._executor = executor
        self._transfers = transfers
        self._http = http
        self._starting = asyncio.Lock()
        self._log_readers_count = 0

    async def FindMissing(
        self, request: peer_pb2.FindMissingRequest, context: _Context
    ) -> peer_pb2.FindMissingResponse:
        digests = list(request.digests)
        try:
            if len(digests) > DIGESTS_MAX:
                raise Invalid(f"{len(digests)} digests; at most {DIGESTS_MAX} are allowed")
            missing = await self._run(self._store.missing, digests)
        except ChunkError as error:
            await _abort(context, error)
        return peer_pb2.FindMissingResponse(digests=missing)

    async def PutCheckpoint(
        self,
        request_iterator: AsyncIterator[peer_pb2.PutCheckpointRequest],
        context: _Context,
    ) -> peer_pb2.PutCheckpointResponse:
        try:
            with self._store.writing() as writing:
                received_bytes = await self._receive(request_iterator, writing)
        except DiskFull as error:
            await self._run(self._store.give_back)
            await _abort(context, error)
        except ChunkError as error:
            await _abort(context, error)
        return peer_pb2.PutCheckpointResponse(received_bytes=received_bytes)

    async def GetManifest(
        self, request: peer_pb2.GetManifestRequest, context: _Context
    ) -> peer_pb2.GetManifestResponse:
        try:
            data = await self._run(self._store.read_manifest, request.digest)
        except ChunkError as error:
            await _abort(context, _as_absent(error))
        return peer_pb2.GetManifestResponse(data=data)

    async def GetChunks(
        self, request: peer_pb2.GetChunksRequest, context: _Context
    ) -> AsyncIterator[peer_pb2.GetChunksResponse]:
        digests = list(request.digests)
        try:
            if len(digests) > DIGESTS_MAX:
                raise Invalid(f"{len(digests)} digests; at most {DIGESTS_MAX} are allowed")
            for digest in digests:
                data = await self._run(self._store.read_chunk, digest)
                for piece in pieces(digest, data):
                    yield peer_pb2.GetChunksResponse(chunk=piece)
        except ChunkError as error:
            await _abort(context, _as_absent(error))

    async def OpenTransfer(
        self, request: peer_pb2.OpenTransferRequest, context: _Context
    ) -> peer_pb2.OpenTransferResponse:
        direction = _DIRECTIONS.get(request.direction)
        if direction is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "neither a fetch nor a push")
        try:
            manifest = await self._run(self._manifest, request, direction)
        except ChunkError as error:
            await _abort(context, _as_absent(error) if direction == FETCH else error)
        if (manifest.job_id, manifest.epoch) != (request.job, request.epoch):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"manifest {short(request.digest)} is of job {manifest.job_id}, epoch "
                f"{manifest.epoch}, not of job {request.job}, epoch {request.epoch}",
            )
        try:
            async with self._starting:
                port = await asyncio.to_thread(self._http.start)
        except ChunkError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        valid_s = deadline_s(manifest.size_bytes)
        valid_ms = round(valid_s * 1000)
        try:
            token = await self._run(
                self._transfers.grant, direction, request.digest, manifest, valid_ms
            )
        except ChunkError as error:
            await _abort(context, error)
        response = peer_pb2.OpenTransferResponse(port=port, token=token)
        response.valid.FromMilliseconds(valid_ms)
        return response

    async def ReadLog(
        self, request: peer_pb2.ReadLogRequest, context: _Context
    ) -> AsyncIterator[peer_pb2.ReadLogResponse]:
        invalid = _check_log_request(request)
        if invalid:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, invalid)
        if self._log_readers_count >= LOG_READERS_MAX:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{LOG_READERS_MAX} logs are being read already"
            )
        self._log_readers_count += 1
        try:
            pieces = self._read_log(
                request.attempt, request.offset, request.follow, request.tail_bytes
            )
            async for offset, data in pieces:
                for start in range(0, len(data), LOG_PIECE_BYTES_MAX):
                    yield peer_pb2.ReadLogResponse(
                        offset=offset + start, data=data[start : start + LOG_PIECE_BYTES_MAX]
                    )
        except FileNotFoundError:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no log of attempt {request.attempt} on this node"
            )
        finally:
            self._log_readers_count -= 1

    async def _receive(
        self, requests: AsyncIterator[peer_pb2.PutCheckpointRequest], writing: Writing
    ) -> int:
        """Chunks, each in consecutive pieces, then one manifest, then nothing. Returns the bytes of
        all of them."""
        received_bytes = 0
        chunks_count = 0
        assembly = _Assembly()
        manifest = None
        async for request in requests:
            if manifest is not None:
                raise Invalid("something follows the manifest, which must be last")
            if request.WhichOneof("part") == "manifest":
                manifest = request.manifest
                received_bytes += len(manifest.data)
                continue
            received_bytes += len(request.chunk.data)
            chunk = assembly.add(request.chunk)
            if chunk is not None:
                chunks_count += 1
                if chunks_count > CHUNKS_MAX:
                    raise Invalid(f"more than {CHUNKS_MAX} chunks in one checkpoint")
                await self._run(writing.put_chunk, assembly.digest, chunk)
        assembly.check_finished()
        if manifest is None:
            raise Invalid("the upload ended without a manifest")
        await self._run(writing.publish, manifest.digest, manifest.data)
        self._transfers.finish(PUSH, manifest.digest)
        return received_bytes

    def _manifest(self, request: peer_pb2.OpenTransferRequest, direction: str) -> Manifest:
        """The caller's for a push, this node's own for a fetch; verified. Raises `ChunkError`."""
        if direction == FETCH:
            return decode(self._store.read_manifest(request.digest))
        if digest_of(request.manifest) != request.digest:
            raise Altered(f"manifest {request.digest[:8]!r}...: bytes do not match their digest")
        return decode(request.manifest)

    async def _run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> _Result:
        call = partial(work, *args, **kw)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


class _Assembly:
    """The chunk whose pieces are arriving."""

    def __init__(self) -> None:
        self.digest = ""
        self._size_bytes = 0
        self._data = bytearray()

    def add(self, piece: peer_pb2.Chunk) -> bytes | None:
        """Returns the chunk's bytes with its last piece. Raises `Invalid`."""
        if not self._data:
            if not 1 <= piece.size_bytes <= CHUNK_BYTES_MAX:
                raise Invalid(
                    f"chunk of {piece.size_bytes} bytes; 1 to {CHUNK_BYTES_MAX} are allowed"
                )
            self.digest, self._size_bytes = piece.digest, piece.size_bytes
        if piece.digest != self.digest or piece.size_bytes != self._size_bytes:
            raise Invalid(f"a piece of another chunk before the end of {short(self.digest)}")
        room_bytes = min(PIECE_BYTES_MAX, self._size_bytes - len(self._data))
        if not 1 <= len(piece.data) <= room_bytes:
            raise Invalid(f"a piece of {len(piece.data)} bytes; 1 to {room_bytes} are allowed here")
        self._data += piece.data
        if len(self._data) < self._size_bytes:
            return None
        chunk, self._data = bytes(self._data), bytearray()
        return chunk

    def check_finished(self) -> None:
        if self._data:
            raise Invalid(f"the upload ended within chunk {short(self.digest)}")


class Reflection(grpc.GenericRpcHandler):
    """gRPC's server reflection, of which each agent's first question brings the modules: a person
    with a stock tool may ask one of five hundred agents, and it is a megabyte in each."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        if not handler_call_details.method.startswith("/grpc.reflection.v1alpha."):
            return None
        from grpc_reflection.v1alpha import reflection, reflection_pb2

        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        return grpc.stream_stream_rpc_method_handler(
            reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )


class PeerServer:
    """`PeerService`, health and reflection on one address; chunks over HTTP on `chunk_port` of its
    host, 0 for a free one, for who has leave from here. `callers`: patterns of the names that may
    call; empty: all. `open` before use, `close` after."""

    def __init__(
        self,
        store: ChunkStore,
        read_log: ReadLog,
        *,
        address: str,
        tls: Tls | None,
        chunk_port: int = 0,
        callers: Sequence[str] = (),
    ) -> None:
        self._store = store
        self._callers = callers
        self._read_log = read_log
        self._address = address
        self._tls = tls
        self._transfers = Transfers(store)
        self._http = ChunkHttpServer(
            store, self._transfers, address=address, port=chunk_port, tls=tls
        )
        self._server: grpc.aio.Server | None = None
        self._executor: ThreadPoolExecutor | None = None

    async def open(self) -> int:
        """Start serving; returns the port. Raises `TransportError`."""
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            # Two agents on one port would share its connections between them, silently.
            ("grpc.so_reuseport", 0),
            # A reader whose machine has died closes nothing; gRPC would keep its place for hours.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ]
        guards = [Guard(self._refuse)] if self._callers else []
        server = grpc.aio.server(
            options=options, maximum_concurrent_rpcs=CALLS_MAX, interceptors=guards
        )
        port = listen(server, self._address, self._tls)
        self._http.bind()
        self._executor = crew(THREADS_MAX, "peer")
        service = PeerService(
            self._store,
            self._read_log,
            self._executor,
            transfers=self._transfers,
            http=self._http,
        )
        add_PeerServiceServicer_to_server(service, server)
        serving = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(serving, server)
        for name in ("", SERVICE_NAME):
            await serving.set(name, health_pb2.HealthCheckResponse.SERVING)
        server.add_generic_rpc_handlers((Reflection(),))
        await server.start()
        self._server = server
        return port

    def _refuse(self, caller: Caller) -> str:
        if caller.is_any_of(self._callers):
            return ""
        return f"the certificate names {caller}; this agent's setting 'peers' lists who may call"

    async def close(self) -> None:
        """Stop serving; calls in progress get `CLOSE_GRACE_S`."""
        server, self._server = self._server, None
        executor, self._executor = self._executor, None
        if server is not None:
            await server.stop(CLOSE_GRACE_S)
        await asyncio.to_thread(self._http.close)
        self._transfers.close()
        if executor is not None:
            await asyncio.to_thread(executor.shutdown)


def _check_log_request(request: peer_pb2.ReadLogRequest) -> str:
    """Why it is refused, or nothing."""
    if find_attempt_id(request.attempt) is None:
        return f"not an attempt id such as 12.3: {request.attempt[:80]!r}"
    if request.offset < 0 or request.tail_bytes < 0:
        return "offset and tail_bytes must not be negative"
    return ""


def _as_absent(error: ChunkError) -> ChunkError:
    """To a reader an altered copy is no copy, and peer.proto has one word for that."""
    return Absent(str(error)) if isinstance(error, Altered) else error


async def _abort(context: _Context, error: ChunkError) -> NoReturn:
    for kind, status in _STATUS:
        if isinstance(error, kind):
            await context.abort(status, str(error))
    await context.abort(grpc.StatusCode.INTERNAL, str(error))
    raise AssertionError("abort raises")
