"""Chunks over HTTP(S): what peers read and bring once this node's gRPC service has let them.

Problem: gRPC copies each byte several times and wraps it in messages; a restore of many gigabytes
costs CPU that the trainers on this node own. The kernel can send a file by itself (sendfile(2)),
and every HTTP library can ask for a part of one again. But an open file server is a hole.

So control stays with gRPC: `OpenTransfer` names a job, an epoch and a manifest, and gives a token
bound to the three and to a direction (HMAC-SHA256 under a key that this process drew at random),
with an end. A request carries the token; the chunk that it names must be one that this manifest
names, with the size it gives, and nothing is ever listed. 401: no token, a wrong one, an expired
one. 403: not this chunk. Every refusal made here has a sentence for a body and the header
`Baton-Refusal`, so that a client can tell it from what some other server on that port might say.

What is sent is not hashed here, as the receiver hashes it anyway; what is brought is hashed before
it gets its name. A push holds a `Writing` until it is published, so that no sweep takes what it
leaves out because it is here; or until its token ends or it has not been heard for minutes, so that
a pusher that died does not hold sweeps up for as long as its checkpoint might have taken.

The server has a thread and a loop of its own: sendfile(2) waits for the disk, and the agent's loop,
which renews leases, must not. The port is bound when the agent starts, so that a wrong one is found
then. aiohttp (parser, ranges, sendfile) costs 10 MiB and half a second, so it is imported with the
first transfer, and an agent that never moves a checkpoint never pays for it.
"""

import asyncio
import hashlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent import https
from agent.chunks.manifest import (
    Altered,
    DiskFull,
    Invalid,
    Manifest,
    short,
)
from agent.chunks.store import ChunkStore, Writing
from agent.chunks.threads import crew
from agent.ports import ChunkError
from agent.transport import Tls, TransportError, check_listen, system_says

if TYPE_CHECKING:
    import ssl

    from aiohttp import web

# Directions, as they stand in a token.
FETCH = "fetch"
PUSH = "push"

REFUSAL_HEADER = "Baton-Refusal"
# As many as gRPC calls at a time; each may hold a chunk that is arriving, so 256 MiB at worst.
REQUESTS_MAX = 64
# Four for each transfer that can be open; whoever comes over another is sent away.
CONNECTIONS_MAX = 256
# A node takes part in a few transfers at a time.
GRANTS_MAX = 64
# Of all grants together; at some 150 bytes for each, 150 MB at worst. One manifest of the largest
# kind names a quarter of them.
GRANTED_CHUNKS_MAX = 1_000_000
# Between two chunks of a transfer its client waits for its own disk, seconds at most. One that
# pauses longer goes on over gRPC.
IDLE_MS_MAX = 300_000
# How late that is noticed; dropping what has ended costs microseconds.
DROP_EVERY_S = 60.0
# A chunk of 4 MiB in this time is 0.2 MB/s: whoever is slower is gone.
BODY_DEADLINE_S = 20.0
# Between two requests on one connection; a client opens another when it comes later.
KEEP_ALIVE_S = 30.0
# As much as the peer service gives its calls when the agent stops.
CLOSE_GRACE_S = 1.0
# Opening files for senders, beside the threads that write.
THREADS_MAX = 2
# Read at a time where the kernel cannot send by itself; larger as each read is a thread's errand,
# smaller than a chunk so that reading and encrypting overlap.
READ_BYTES = 1 << 20
# As peer.proto says.
TOKEN_CHARACTERS_MAX = 256


class _ReadingLoop(asyncio.SelectorEventLoop):
    """For TLS, where the kernel cannot send files: asyncio's own stand-in for sendfile(2) costs
    three times as much CPU as aiohttp's, which reads `READ_BYTES` at a time (`bench.transfer`)."""

    async def sendfile(self, *_: object, **__: object) -> int:
        raise NotImplementedError


class Busy(ChunkError):
    """So many transfers are open that there is no room for another."""


class Refused(Exception):
    """A request that is not granted: an HTTP status, and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(slots=True)
class _Grant:
    """`writing` is a push's, held in `held` until the grant has ended and nobody writes."""

    sizes_bytes: dict[str, int]
    expires_ms: int
    used_ms: int
    writing: Writing | None = None
    writers_count: int = 0
    ended: bool = False
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def ends_ms(self) -> int:
        return min(self.expires_ms, self.used_ms + IDLE_MS_MAX)

    def end(self) -> None:
        self.ended = True
        if not self.writers_count:
            self.held.close()


class Transfers:
    """Who may move which chunks. Safe for several threads; `now_ms` is monotonic."""

    def __init__(
        self,
        store: ChunkStore,
        now_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self._store = store
        self._now_ms = now_ms
        self._key = secrets.token_bytes(32)
        self._grants: dict[tuple[str, str], _Grant] = {}
        self._lock = threading.Lock()

    def grant(self, direction: str, digest: str, manifest: Manifest, valid_ms: int) -> str:
        """Let whoever has the token that this returns move the chunks of `manifest`, whose digest
        is `digest`, for `valid_ms`, with no pause of `IDLE_MS_MAX`. Raises `Busy`."""
        sizes_bytes = manifest.sizes_bytes()
        with self._lock:
            self._drop_expired()
            now_ms = self._now_ms()
            expires_ms = now_ms + valid_ms
            known = self._grants.get((direction, digest))
            if known is not None:
                known.expires_ms = max(known.expires_ms, expires_ms)
                known.used_ms = now_ms
            else:
                self._check_room(len(sizes_bytes))
                grant = _Grant(sizes_bytes, expires_ms, used_ms=now_ms)
                self._grants[direction, digest] = grant
                if direction == PUSH:
                    self._hold(grant)
        return self._signed(f"{direction}.{manifest.job_id}.{manifest.epoch}.{digest}.{expires_ms}")

    def fetching(self, authorization: str, chunk: str) -> int:
        """Size of a chunk that may be read. Raises `Refused`."""
        with self._lock:
            return self._admit(authorization, FETCH, chunk)[1]

    @contextmanager
    def pushing(self, authorization: str, chunk: str) -> Iterator[tuple[int, Writing]]:
        """Size of a chunk that may be brought, and where to put it within the block. Raises
        `Refused`."""
        with self._lock:
            grant, size_bytes = self._admit(authorization, PUSH, chunk)
            grant.writers_count += 1
        assert grant.writing is not None, "every push has one"
        try:
            yield size_bytes, grant.writing
        finally:
            with self._lock:
                grant.writers_count -= 1
                if grant.ended:
                    grant.end()

    def finish(self, direction: str, digest: str) -> None:
        """That transfer is over, or was never begun; its tokens are worth nothing any more."""
        with self._lock:
            grant = self._grants.pop((direction, digest), None)
            if grant is not None:
                grant.end()

    def finish_push_of(self, authorization: str) -> None:
        """As `finish`, for the push that a token was given for. Raises `Refused`."""
        self.finish(PUSH, self._checked(authorization, PUSH))

    def drop_expired(self) -> None:
        """What a caller that died has left open must not hold sweeps up until the next one."""
        with self._lock:
            self._drop_expired()

    def close(self) -> None:
        with self._lock:
            grants, self._grants = self._grants, {}
            for grant in grants.values():
                grant.end()

    def _admit(self, authorization: str, direction: str, chunk: str) -> tuple[_Grant, int]:
        digest = self._checked(authorization, direction)
        grant = self._grants.get((direction, digest))
        if grant is None:
            raise Refused(403, f"no {direction} of {short(digest)} is open")
        grant.used_ms = self._now_ms()
        size_bytes = grant.sizes_bytes.get(chunk)
        if size_bytes is None:
            raise Refused(403, f"checkpoint {short(digest)} names no chunk {chunk[:8]!r}...")
        return grant, size_bytes

    def _hold(self, grant: _Grant) -> None:
        grant.writing = grant.held.enter_context(self._store.writing())
        # Now: what is sent first must not be swept before what is sent last.
        for chunk in grant.sizes_bytes:
            grant.writing.pin(chunk)

    def _check_room(self, chunks_count: int) -> None:
        granted_count = sum(len(grant.sizes_bytes) for grant in self._grants.values())
        if len(self._grants) >= GRANTS_MAX or granted_count + chunks_count > GRANTED_CHUNKS_MAX:
            raise Busy(f"{len(self._grants)} transfers of {granted_count} chunks are open already")

    def _drop_expired(self) -> None:
        now_ms = self._now_ms()
        for key, grant in list(self._grants.items()):
            if grant.ends_ms <= now_ms:
                del self._grants[key]
                grant.end()

    def _checked(self, authorization: str, direction: str) -> str:
        """The manifest's digest, of a token that is genuine, of this direction, and not expired."""
        scheme, _, token = authorization.partition(" ")
        if scheme != "Bearer" or not token:
            raise Refused(401, "this needs the token that OpenTransfer gives")
        text = token.rpartition(".")[0]
        genuine = len(token) <= TOKEN_CHARACTERS_MAX and token.isascii()
        if not genuine or not hmac.compare_digest(self._signed(text), token):
            raise Refused(401, "the token was not given by this agent since it started")
        granted, _, _, digest, expires_ms = text.split(".")
        if int(expires_ms) <= self._now_ms():
            raise Refused(401, "the token has expired")
        if granted != direction:
            raise Refused(403, f"the token is for a {granted}, and this is a {direction}")
        return digest

    def _signed(self, text: str) -> str:
        mac = hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
        return f"{text}.{mac}"


class ChunkHttpServer:
    """`bind` with the agent, `start` with the first transfer, `close` at the end. `address` is the
    peer service's: HTTP goes to its host, on `port`, 0 for a free one."""

    def __init__(
        self,
        store: ChunkStore,
        transfers: Transfers,
        *,
        address: str,
        port: int,
        tls: Tls | None,
    ) -> None:
        self._store = store
        self._transfers = transfers
        self._address = address
        self._port = port
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._requests_count = 0
        self._connections: Callable[[], int] = lambda: 0

    def bind(self) -> int:
        """Returns the port. Raises `TransportError`, also for a port off loopback without TLS."""
        check_listen(self._address, self._tls)
        if self._tls is not None:
            self._context = https.renewing(self._tls)
        host = self._address.rpartition(":")[0].strip("[]")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server(
                (host, self._port), family=family, dualstack_ipv6=host == "::"
            )
        except OSError as error:
            where = f"{host}:{self._port}"
            says = system_says(error)
            raise TransportError(f"cannot listen on {where} for chunks: {says}") from error
        return int(self._listener.getsockname()[1])

    def start(self) -> int:
        """Serve, once; returns the port. Blocks, and must not be called twice at once. Raises
        `ChunkError`."""
        if self._listener is None:
            raise ChunkError("this agent does not listen for chunks")
        if self._thread is None:
            started: Future[None] = Future()
            try:
                workers = crew(THREADS_MAX, "chunks-http")
                self._thread = threading.Thread(
                    target=self._run, args=(started, workers), name="chunks-http", daemon=True
                )
                self._thread.start()
                started.result()
            except ChunkError:
                self._thread = None
                raise
            except (OSError, RuntimeError) as error:
                self._thread = None
                raise ChunkError(f"chunks are not served over HTTP: {error}") from error
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Blocks until requests in progress have had `CLOSE_GRACE_S`."""
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            thread.join()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def _run(self, started: "Future[None]", workers: ThreadPoolExecutor) -> None:
        factory = None if self._context is None else _ReadingLoop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(self._serve(started, workers))

    async def _serve(self, started: "Future[None]", workers: ThreadPoolExecutor) -> None:
        assert self._listener is not None, "not bound"
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(workers)
        self._stopping = asyncio.Event()
        try:
            from aiohttp import web

            application = web.Application()
            application.router.add_get("/chunks/{digest}", self._get)  # HEAD comes with it
            application.router.add_put("/chunks/{digest}", self._put)
            runner = web.AppRunner(
                application,
                access_log=None,
                keepalive_timeout=KEEP_ALIVE_S,
                shutdown_timeout=CLOSE_GRACE_S,
            )
            await runner.setup()
            server = runner.server
            assert server is not None, "setup makes it"
            self._connections = lambda: len(server.connections)
            # A copy, since the loop closes its own and `close` ours.
            site = web.SockSite(runner, self._listener.dup(), ssl_context=self._context)
            await site.start()
        except (ImportError, OSError) as error:
            started.set_exception(ChunkError(f"chunks cannot be served over HTTP: {error}"))
            return
        started.set_result(None)
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), DROP_EVERY_S)
            self._transfers.drop_expired()
        await runner.cleanup()

    async def _get(self, request: "web.Request") -> "web.StreamResponse":
        from aiohttp import web

        chunk = request.match_info["digest"]
        try:
            self._check_crowd()
            size_bytes = self._transfers.fetching(_authorization(request), chunk)
            path = self._store.chunk_path(chunk)
            found_bytes = (await asyncio.to_thread(path.stat)).st_size
            if found_bytes != size_bytes:
                raise Refused(
                    404, f"chunk {short(chunk)}: {size_bytes} bytes expected, {found_bytes} found"
                )
        except FileNotFoundError:
            return _refusal(Refused(404, f"chunk {short(chunk)}: missing"))
        except OSError as error:
            # Says nothing of the bytes: gRPC knows how to answer.
            return _refusal(Refused(500, f"chunk {short(chunk)}: {error.strerror}"))
        except Refused as refused:
            return _refusal(refused)
        headers = {"Content-Type": "application/octet-stream"}
        return web.FileResponse(path, chunk_size=READ_BYTES, headers=headers)

    async def _put(self, request: "web.Request") -> "web.StreamResponse":
        from aiohttp import web

        self._requests_count += 1
        chunk = request.match_info["digest"]
        try:
            self._check_crowd()
            if self._requests_count > REQUESTS_MAX:
                raise Refused(503, f"{REQUESTS_MAX} chunks are arriving already")
            with self._transfers.pushing(_authorization(request), chunk) as (size_bytes, writing):
                if request.content_length != size_bytes:
                    raise Refused(400, f"chunk {short(chunk)} has {size_bytes} bytes")
                data = await _body(request, size_bytes)
                await asyncio.to_thread(writing.put_chunk, chunk, data)
        except Refused as refused:
            return _refusal(refused)
        except DiskFull as error:
            # It holds what has come so far; nobody will bring the rest.
            self._transfers.finish_push_of(_authorization(request))
            await asyncio.to_thread(self._store.give_back)
            return _refusal(Refused(507, str(error)))
        except Altered as error:
            return _refusal(Refused(422, str(error)))
        except Invalid as error:
            return _refusal(Refused(400, str(error)))
        except ChunkError as error:
            return _refusal(Refused(500, str(error)))
        finally:
            self._requests_count -= 1
        return web.Response(status=201)

    def _check_crowd(self) -> None:
        if self._connections() > CONNECTIONS_MAX:
            raise Refused(503, f"{CONNECTIONS_MAX} connections are open already")


def _authorization(request: "web.Request") -> str:
    return request.headers.get("Authorization", "")


async def _body(request: "web.Request", size_bytes: int) -> bytearray:
    """Raises `Refused` when less comes, or not in time; more than was said never comes."""
    data = bytearray(size_bytes)
    end = 0
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            async for piece in request.content.iter_any():
                data[end : end + len(piece)] = piece
                end += len(piece)
    except TimeoutError:
        raise Refused(408, f"{size_bytes} bytes did not come in {BODY_DEADLINE_S:g} s") from None
    if end != size_bytes:
        raise Refused(400, f"{end} bytes came instead of {size_bytes}")
    return data


def _refusal(refused: Refused) -> "web.Response":
    from aiohttp import web

    headers = {REFUSAL_HEADER: "1"}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    response = web.Response(status=refused.status, text=f"{refused}\n", headers=headers)
    if refused.status == 503:
        response.force_close()
    return response
