"""One trainer's connection: lines in, lines out, and now and then a descriptor beside a line.

Problem: asyncio's streams read with recv(2), and a descriptor that is sent beside the bytes
(SCM_RIGHTS, unix(7)) is closed by the kernel unless it is asked for with recvmsg(2). So the few
things that a stream does are done here on the plain socket: cut lines, wait when there is nothing,
buffer what the other end does not take yet.

A descriptor arrives with the bytes that it was sent beside, or before them, never after. So whoever
handles a line that announces one takes the oldest that has come. Those that nobody takes are closed
with the connection, and there is a bound on how many wait.

An attempt may have several connections: one that is new after an agent's restart beside the old
one, or one for each of a launcher's ranks. `Registration` knows which of them a word is for.
"""

import asyncio
import contextlib
import os
import socket
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RECEIVE_BYTES = 64 * 1024
QUEUED_MESSAGES_MAX = 64  # answers to as many checkpoints as anybody has in flight; the newest stay
PROGRAMS_MAX = 1024  # of an attempt whose numbers are known; a loop of a shell may start more
CHECKPOINT_BITS = 40  # of a checkpoint's number inward; what is above them is the program's
DESCRIPTORS_MAX = 4  # a trainer has one slab; more of them waiting is no trainer of ours


class LineTooLong(Exception):
    """More bytes than allowed without an end of line."""


class Connection:
    """Owns `connected`, a non-blocking stream socket. Used within one event loop. `number` tells it
    from others; for its user are `in_sections`: the trainer behind it has spoken of sections, and
    `program`: which of an attempt's programs it is."""

    def __init__(self, connected: socket.socket, line_bytes_max: int, number: int = 0) -> None:
        self.number = number
        self.in_sections = False
        self.program = 0
        self._socket = connected
        self._line_bytes_max = line_bytes_max
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._pending: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._readable: asyncio.Future[None] | None = None
        self._writing = False
        self._ended = False
        self._closed = False

    @property
    def is_closing(self) -> bool:
        return self._closed

    @property
    def pending_bytes(self) -> int:
        """Of what was sent and the other end has not taken."""
        return sum(len(data) for data, _ in self._pending)

    async def read_line(self) -> bytes | None:
        """The next whole line; None at the end (an unfinished one is dropped) and after `close`.
        Raises `LineTooLong`, and `ConnectionError` when the other end is gone."""
        searched = 0
        while not self._closed:
            end = self._received.find(b"\n", searched)
            if 0 <= end < self._line_bytes_max:
                line = bytes(self._received[: end + 1])
                del self._received[: end + 1]
                return line
            if end >= 0 or len(self._received) > self._line_bytes_max:
                raise LineTooLong
            if self._ended:
                return None
            searched = len(self._received)
            await self._receive()
        return None

    def take_descriptor(self) -> int | None:
        """The oldest that has come and was not taken; the caller closes it."""
        return self._descriptors.popleft() if self._descriptors else None

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Now, or as soon as the other end takes it. The descriptors stay the caller's."""
        if self._closed:
            return
        self._pending.append((data, tuple(os.dup(descriptor) for descriptor in descriptors)))
        if not self._writing:
            self._flush()

    def close(self) -> None:
        """What the socket's own buffer does not take now is lost: the other end has not been
        reading. Twice is once."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        loop.remove_writer(self._socket)
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)
        for _, descriptors in self._pending:
            _close_all(descriptors)
        self._pending.clear()
        _close_all(self._descriptors)
        self._descriptors.clear()
        self._socket.close()

    async def _receive(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._socket, RECEIVE_BYTES, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            await self._wait_readable()
            return
        self._descriptors.extend(descriptors)
        while len(self._descriptors) > DESCRIPTORS_MAX:
            os.close(self._descriptors.popleft())
        self._received += data
        self._ended = not data

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._readable = loop.create_future()
        loop.add_reader(self._socket, _wake, self._readable)
        try:
            await self._readable
        finally:
            self._readable = None
            if not self._closed:
                loop.remove_reader(self._socket)

    def _flush(self) -> None:
        while self._pending:
            data, descriptors = self._pending[0]
            try:
                sent = socket.send_fds(self._socket, [data], descriptors)
            except BlockingIOError:
                self._watch(True)
                return
            except OSError:  # gone; whoever reads learns it
                for _, waiting in self._pending:
                    _close_all(waiting)
                self._pending.clear()
                break
            _close_all(descriptors)
            if sent == len(data):
                self._pending.popleft()
            else:
                self._pending[0] = (data[sent:], ())
        self._watch(False)

    def _watch(self, wanted: bool) -> None:
        if wanted == self._writing:
            return
        self._writing = wanted
        loop = asyncio.get_running_loop()
        if wanted:
            loop.add_writer(self._socket, self._flush)
        else:
            loop.remove_writer(self._socket)


@dataclass(slots=True, eq=False)
class Registration:
    """An attempt that may speak: its connections, newest last, and what waits for the next one, of
    which program or of any. Each program counts its checkpoints from 1, so a checkpoint's number
    inward is the program's and then its own. `programs` are by pid."""

    token: str
    staging_directory: str  # real path
    connections: list[Connection] = field(default_factory=list)
    queued: deque[tuple[int | None, bytes]] = field(
        default_factory=lambda: deque(maxlen=QUEUED_MESSAGES_MAX)
    )
    programs: dict[int, int] = field(default_factory=dict)
    programs_seen: int = 0
    warnings: Counter[str] = field(default_factory=Counter)  # that were due, by event

    @property
    def live(self) -> list[Connection]:
        return [connection for connection in self.connections if not connection.is_closing]

    def join(self, connection: Connection, pid: int) -> None:
        """A program keeps its number over connections; the first one's is 0, also after an agent's
        restart."""
        if pid not in self.programs:
            self.programs[pid] = self.programs_seen % PROGRAMS_MAX
            self.programs_seen += 1
            if len(self.programs) > PROGRAMS_MAX:
                del self.programs[next(iter(self.programs))]
        connection.program = self.programs[pid]
        self.connections.append(connection)

    def whom(self, program: int | None, message: Mapping[str, object]) -> list[Connection]:
        """Those whom a word concerns: a stop and a hang all, an answer who asked, anything else the
        newest."""
        if message.get("type") in ("stop", "hung"):
            return self.live
        return [one for one in self.live if program is None or one.program == program][-1:]


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
