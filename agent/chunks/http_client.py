"""One transfer with one peer over HTTP(S): several connections at once, and each broken one goes on
where it broke.

Problem: one connection is one core's work at either end, and on a long link one window's worth of
bytes; a connection that breaks at 90 % must not cost the 90 %. And HTTP may not work at all where
gRPC does: a port that a firewall eats, an agent that is older.

So `Link` keeps up to `CONNECTIONS` requests in the air, each in a thread of its own with blocking
sockets: `http.client` receives straight into the chunk's buffer (no copies, the interpreter's lock
released), and the agent's loop sees whole chunks only. Chunks come in the order asked for. What a
request lost is asked for again with a Range from the byte where it broke, `FAILURES_MAX` times
without a new byte, with growing pauses; then the link is `Broken` and the caller goes on with gRPC.
So it is at the deadline, whatever a thread still waits for: a peer can draw out an answer for ever
without ever being silent.

What arrives has the right size but is not verified yet: the store hashes it before it keeps it.
What the peer itself refuses is one of the chunk store's errors with the peer's name, as over gRPC.
"""

import asyncio
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from agent.chunks.http_server import REFUSAL_HEADER
from agent.chunks.manifest import Absent, Altered, DiskFull, Invalid, short
from agent.chunks.threads import crew
from agent.core.values import ReplicaSource
from agent.ports import ChunkError

if TYPE_CHECKING:  # imported with a node's first transfer: with the parsers of mail, a megabyte
    import http.client

# Four fill a 25 Gbit link where one core hashes or decrypts 1 to 2 GB/s; more only take turns on
# the disk. A transfer holds twice as many chunks in memory, 32 MiB.
CONNECTIONS = 4
AHEAD = 2 * CONNECTIONS
# Of one chunk, in a row, without a byte of progress: with the pauses below that is half a second,
# within which a stray reset has passed and a restarted agent, whose key is another, has answered.
FAILURES_MAX = 4
PAUSE_BASE_S = 0.05
PAUSE_MAX_S = 1.0
# No handshake takes so long on a network where a transfer is worth beginning.
CONNECT_DEADLINE_S = 5.0
# Without a byte, from a peer whose disk is busy.
SILENCE_S_MAX = 20.0
# Our own sentences are shorter.
_REFUSAL_BYTES_MAX = 1000

_REFUSALS: Mapping[int, type[ChunkError]] = {
    400: Invalid,
    404: Absent,
    422: Altered,
    507: DiskFull,
}
# Worth another try on the same link: busy, or slow to hear us.
_PASSING = frozenset((408, 503))

Data = bytes | bytearray
_Result = TypeVar("_Result")


class Broken(ChunkError):
    """HTTP does not work, or not any more; it says nothing of the bytes."""


@dataclass(frozen=True, slots=True)
class Access:
    """Where a peer serves chunks, and what lets us in until `deadline_s` (monotonic)."""

    host: str
    port: int
    token: str
    context: ssl.SSLContext | None
    deadline_s: float


class Link:
    """`close` when done."""

    def __init__(
        self, peer: ReplicaSource, access: Access, *, pause_base_s: float = PAUSE_BASE_S
    ) -> None:
        self._name = f"{peer.node} ({peer.address})"
        self._access = access
        self._pause_base_s = pause_base_s
        self._threads = crew(CONNECTIONS, "transfer")
        self._closed = threading.Event()
        self._idle: deque[http.client.HTTPConnection] = deque()
        # With the sockets, as a connection lets go of its own with the head of its last answer.
        self._open: dict[http.client.HTTPConnection, socket.socket] = {}
        # What a `put_chunks` that broke has brought, and what it had in hand and has not.
        self.sent_bytes = 0
        self.unsent: list[tuple[str, bytes]] = []

    @property
    def scheme(self) -> str:
        return "http" if self._access.context is None else "https"

    def close(self) -> None:
        """Ends what is in the air; threads follow at once, or when their connecting fails."""
        self._closed.set()
        for connected in list(self._open.values()):
            _hang_up(connected)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def get_chunks(
        self, wanted: Sequence[tuple[str, int]]
    ) -> AsyncGenerator[tuple[str, Data], None]:
        """Yields (digest, bytes) for each (digest, size), in order: of that size, not verified yet.

        Raises `Absent` for the first one that the peer lacks, `Broken` when HTTP stopped working
        before it.
        """
        loop = asyncio.get_running_loop()
        flying: deque[tuple[str, asyncio.Future[bytearray]]] = deque()
        left = deque(wanted)
        try:
            while left or flying:
                while left and len(flying) < AHEAD:
                    digest, size_bytes = left.popleft()
                    future = loop.run_in_executor(self._threads, self._get, digest, size_bytes)
                    flying.append((digest, future))
                digest, future = flying.popleft()
                data = await self._in_time(future)
                yield digest, data
        finally:
            for _, future in flying:
                future.cancel()

    async def put_chunks(self, chunks: AsyncIterator[tuple[str, bytes]]) -> None:
        """Bring these chunks. Raises `DiskFull`, `Altered` and other refusals; and `Broken`, with
        what the peer has not taken in `unsent`, where `chunks` goes on with the rest."""
        loop = asyncio.get_running_loop()
        flying: deque[tuple[str, bytes, asyncio.Future[None]]] = deque()

        async def land() -> None:
            _, data, future = flying[0]
            await self._in_time(future)
            flying.popleft()
            self.sent_bytes += len(data)

        try:
            async for digest, data in chunks:
                future = loop.run_in_executor(self._threads, self._put, digest, data)
                flying.append((digest, data, future))
                if len(flying) >= AHEAD:
                    await land()
            while flying:
                await land()
        except Broken:
            # The others are as broken, or arrive twice, which costs only themselves.
            self.unsent = [(digest, data) for digest, data, _ in flying]
            raise
        finally:
            for _, _, future in flying:
                future.cancel()

    async def _in_time(self, future: asyncio.Future[_Result]) -> _Result:
        """Its thread, where that is late, ends when the link is closed."""
        try:
            async with asyncio.timeout(self._access.deadline_s - time.monotonic()):
                return await future
        except TimeoutError:
            raise self._too_slow() from None

    def _get(self, digest: str, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        view = memoryview(data)
        got_bytes = 0

        def once(connection: "http.client.HTTPConnection") -> None:
            nonlocal got_bytes
            part = {"Range": f"bytes={got_bytes}-"} if got_bytes else {}
            connection.request("GET", f"/chunks/{digest}", headers=self._authorized() | part)
            response = connection.getresponse()
            self._check(response, 206 if got_bytes else 200)
            span = f"bytes {got_bytes}-{size_bytes - 1}/{size_bytes}"
            if response.length != size_bytes - got_bytes or (
                got_bytes and response.headers.get("Content-Range") != span
            ):
                # Also what a connection that ended within the head looks like: no verdict on the
                # peer, gRPC will have one.
                raise ConnectionError(f"other than chunk {short(digest)} of {size_bytes} bytes")
            while got_bytes < size_bytes:
                count = response.readinto(view[got_bytes:])
                if not count:
                    raise ConnectionError(f"ended {size_bytes - got_bytes} bytes early")
                got_bytes += count
                self._check_deadline()

        self._insist(once, lambda: got_bytes)
        return data

    def _put(self, digest: str, data: bytes) -> None:
        def once(connection: "http.client.HTTPConnection") -> None:
            connection.request("PUT", f"/chunks/{digest}", data, self._authorized())
            response = connection.getresponse()
            self._check(response, 201)
            if response.length != 0:
                raise ConnectionError("an answer with a body, where none belongs")
            response.read()

        self._insist(once, lambda: 0)

    def _insist(
        self, once: "Callable[[http.client.HTTPConnection], None]", progress: Callable[[], int]
    ) -> None:
        """Until it succeeds, or has failed too often since the last progress."""
        try:
            import http.client
        except (ImportError, OSError) as error:  # no descriptor is left, say: gRPC has its own
            raise Broken(f"{self._name}: {self.scheme}: {error}") from error

        failures = 0
        while True:
            before = progress()
            try:
                self._on_a_connection(once)
                return
            except (OSError, http.client.HTTPException) as error:
                failures = 1 if progress() > before else failures + 1
                what = str(error) or type(error).__name__
                if failures > FAILURES_MAX:
                    raise Broken(f"{self._name}: {self.scheme}: {what}") from error
            except (ValueError, OverflowError) as error:
                # What the peer or its address says makes no request; it never will.
                raise Broken(f"{self._name}: {self.scheme}: {error}") from error
            self._check_deadline()
            pause_s = min(PAUSE_MAX_S, self._pause_base_s * 2 ** (failures - 1))
            if self._closed.wait(pause_s):
                raise Broken(f"{self._name}: given up")

    def _on_a_connection(self, once: "Callable[[http.client.HTTPConnection], None]") -> None:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        reusable = False
        try:
            once(connection)
            reusable = connection.sock is not None
        finally:
            if reusable:
                self._idle.append(connection)
            else:
                # The peer has ended it, or what else comes belongs to the request that failed.
                self._open.pop(connection, None)
                connection.close()

    def _connect(self) -> "http.client.HTTPConnection":
        """Raises `Broken` where trying again within a second cannot help."""
        import http.client

        host, port, context = self._access.host, self._access.port, self._access.context
        connection = (
            http.client.HTTPConnection(host, port, timeout=CONNECT_DEADLINE_S)
            if context is None
            else http.client.HTTPSConnection(
                host, port, timeout=CONNECT_DEADLINE_S, context=context
            )
        )
        try:
            connection.connect()
        except (TimeoutError, ssl.SSLError) as error:
            raise Broken(f"{self._name}: {self.scheme} on port {port}: {error}") from error
        connection.sock.settimeout(SILENCE_S_MAX)
        self._open[connection] = connection.sock
        if self._closed.is_set():
            _hang_up(connection.sock)
        return connection

    def _authorized(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._access.token}"}

    def _check(self, response: "http.client.HTTPResponse", status: int) -> None:
        """Raises what a refusal means."""
        if response.status == status:
            return
        # Of ours, each says how long it is; a chunked one could have no end.
        ours = response.headers.get(REFUSAL_HEADER) is not None and response.length is not None
        said = response.read(_REFUSAL_BYTES_MAX).decode("utf-8", "replace").strip() if ours else ""
        if ours and response.status in _PASSING:
            raise ConnectionError(said)
        sentence = f"{self._name}: {said or response.reason}"
        if ours and response.status in _REFUSALS:
            raise _REFUSALS[response.status](sentence)
        raise Broken(f"{sentence} (HTTP status {response.status})")

    def _check_deadline(self) -> None:
        if time.monotonic() > self._access.deadline_s:
            raise self._too_slow()

    def _too_slow(self) -> Broken:
        return Broken(f"{self._name}: too slow over {self.scheme}")


def _hang_up(connected: socket.socket) -> None:
    """Wakes the thread that waits on it; the thread closes it."""
    # Closed already, perhaps.
    with suppress(OSError):
        # The plain socket's: TLS's own would take its state from under that thread.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
