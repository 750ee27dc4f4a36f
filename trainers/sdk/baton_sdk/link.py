"""The thread that owns the socket to the agent.

Problem: the agent is restarted and upgraded while training goes on, so a connection is a passing
thing. The thread dials, says hello, waits for the welcome, then alternates between sending what
the mailbox has due and reading answers; when anything at all is wrong with the connection it
drops it, waits a little longer than the last time (with jitter, so that eight trainers do not
return to a fresh agent in the same millisecond), and starts again from hello. What the agent had
not answered is sent again; the agent recognises a checkpoint by its id.

Memory for captures (``slab.py``) comes and goes as a descriptor beside a line. Whatever we hold is
offered first on every connection, before the checkpoints that lie in it are offered again.

A pair of sockets wakes the thread when the loop has left something in the mailbox, so nothing is
polled.
"""

import json
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from baton_sdk.mailbox import LINE_BYTES_MAX, Mailbox, TicketState, encode
from baton_sdk.slab import SlabDesk

VERSION = 1
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
"""An agent restart takes about a second; after five seconds of absence speed no longer matters."""

WELCOME_TIMEOUT_S = 10.0
"""An agent that does not answer a hello in this time is stuck; another connection may do better."""

SEND_TIMEOUT_S = 10.0
"""Local socket buffers hold thousands of lines; a send that waits this long has no reader."""

RECEIVE_BYTES = 64 * 1024

ANSWERS = {state.value for state in TicketState if state is not TicketState.PENDING}


class Link:
    """Connection, reconnection and the contract's lines. One thread, started by ``open``."""

    def __init__(
        self,
        path: str,
        token: str,
        mailbox: Mailbox,
        slabs: SlabDesk,
        *,
        on_stop: Callable[[str, int | None], None],
        on_save: Callable[[], None],
        on_hang: Callable[[], None],
    ) -> None:
        self._path = path
        self._token = token
        self._mailbox = mailbox
        self._slabs = slabs
        self._on_stop = on_stop
        self._on_save = on_save
        self._on_hang = on_hang
        self._closing = threading.Event()
        self._close_by_s = 0.0
        self._wake_reader: socket.socket
        self._wake_writer: socket.socket
        self._thread: threading.Thread
        # Jitter only: never the global generator, whose state belongs to the training.
        self._jitter = random.Random(os.getpid())
        self._backoff_s = BACKOFF_FIRST_S

    def open(self) -> None:
        """Start the thread. Returns at once; there need not be an agent yet."""
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._mailbox.nudge = self.wake
        self._thread = threading.Thread(target=self._run, name="baton-link", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that the mailbox changed. Never blocks."""
        try:
            self._wake_writer.send(b"w")
        except BlockingIOError:
            return  # full of earlier wake-ups, one of which will do
        except OSError:
            return  # closed: nobody is left to wake

    def close(self, flush_timeout_s: float) -> None:
        """Send what waits, for at most ``flush_timeout_s`` seconds, and end the thread."""
        self._close_by_s = time.monotonic() + flush_timeout_s
        self._closing.set()
        self.wake()
        self._thread.join(flush_timeout_s)
        if not self._thread.is_alive():
            self._wake_writer.close()
            self._wake_reader.close()

    def _run(self) -> None:
        while not self._serve_one_connection():
            if not self._pause(self._backoff_s * self._jitter.uniform(0.5, 1.0)):
                return
            self._backoff_s = min(BACKOFF_MAX_S, self._backoff_s * 2)

    def _serve_one_connection(self) -> bool:
        """True when it ended because we are closing, False when another is needed."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                lines = self._greet(connection)
                self._backoff_s = BACKOFF_FIRST_S
                try:
                    self._talk(connection, lines)
                finally:
                    lines.close()
        except (OSError, ValueError):
            return False  # an absent, restarting or confused agent: all the same to training
        return True

    def _greet(self, connection: socket.socket) -> "_Lines":
        connection.settimeout(WELCOME_TIMEOUT_S)
        connection.connect(self._path)
        hello = {"type": "hello", "version": VERSION, "token": self._token, "pid": os.getpid()}
        connection.sendall(encode(hello))
        lines = _Lines(connection)
        self._mailbox.new_connection()
        deadline_s = time.monotonic() + WELCOME_TIMEOUT_S
        while time.monotonic() < deadline_s:
            lines.receive()
            for message in lines:
                if message.get("type") == "welcome":
                    connection.settimeout(SEND_TIMEOUT_S)
                    self._mailbox.welcomed(message)
                    for offer, descriptor in self._slabs.welcomed(message):
                        _send(connection, encode(offer), descriptor)
                    return lines
                self._handle(message, lines)
        raise TimeoutError("the agent did not answer hello")

    def _talk(self, connection: socket.socket, lines: "_Lines") -> None:
        """Until closed. Raises OSError or ValueError when the connection is of no more use."""
        while True:
            for message in lines:
                self._handle(message, lines)
            closing = self._closing.is_set()
            for request in self._slabs.take():
                connection.sendall(encode(request))
            for line in self._mailbox.take(time.monotonic(), everything=closing):
                connection.sendall(line)
            if closing:
                return
            wait_s = self._mailbox.seconds_until_due(time.monotonic())
            if self._slabs.waiting:
                continue
            readable, _, _ = select.select([connection, self._wake_reader], [], [], wait_s)
            if self._wake_reader in readable:
                self._wake_reader.recv(RECEIVE_BYTES)
            if connection in readable:
                lines.receive()

    def _handle(self, message: Mapping[str, object], lines: "_Lines") -> None:
        kind = message.get("type")
        if kind in ANSWERS:
            self._mailbox.answer(message)
        elif kind == "stop":
            grace_ms = message.get("grace_ms")
            self._on_stop(
                str(message.get("reason", "")), grace_ms if isinstance(grace_ms, int) else None
            )
        elif kind == "save":
            self._on_save()
        elif kind == "hung":
            self._on_hang()
        elif kind == "slab":
            descriptor = lines.take_descriptor()
            if descriptor is not None:
                self._slabs.granted(message, descriptor)
        elif kind == "slab_refused":
            self._slabs.refused(message)
        # Any other type comes from a newer agent: the contract lets us ignore it.

    def _pause(self, wait_s: float) -> bool:
        """Wait before the next attempt. False when it is time to give up for good."""
        until_s = time.monotonic() + wait_s
        while not self._closing.is_set():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return True
            if select.select([self._wake_reader], [], [], left_s)[0]:
                self._wake_reader.recv(RECEIVE_BYTES)
        left_s = self._close_by_s - time.monotonic()
        if left_s <= 0 or self._mailbox.seconds_until_due(time.monotonic()) is None:
            return False
        time.sleep(min(BACKOFF_FIRST_S, left_s))
        return True


def _send(connection: socket.socket, line: bytes, descriptor: int | None) -> None:
    """A line with a descriptor beside it. Raises OSError."""
    descriptors = [] if descriptor is None else [descriptor]
    sent = socket.send_fds(connection, [line], descriptors)
    connection.sendall(line[sent:])


class _Lines:
    """Cuts a byte stream into JSON objects, and keeps the descriptors that came beside them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._parsed: list[dict[str, object]] = []
        self._descriptors: list[int] = []

    def take_descriptor(self) -> int | None:
        """The oldest one that nobody has taken; it comes with its line or before it."""
        return self._descriptors.pop(0) if self._descriptors else None

    def close(self) -> None:
        """Descriptors that nobody took are given back."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def receive(self) -> None:
        """Read once. Raises OSError at the end of the stream, ValueError for a line that is no
        JSON object or too long."""
        data, descriptors, _, _ = socket.recv_fds(
            self._connection, RECEIVE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
        )
        self._descriptors += descriptors
        if not data:
            raise ConnectionError("the agent closed the connection")
        *whole, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LINE_BYTES_MAX:
            raise ValueError("the agent sent a line above the limit")
        for line in whole:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("the agent sent a line that is no JSON object")
            self._parsed.append(message)

    def __iter__(self) -> Iterator[dict[str, object]]:
        """What has been read and not been looked at."""
        while self._parsed:
            yield self._parsed.pop(0)
