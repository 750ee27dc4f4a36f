"""An agent as far as a trainer can see: a Unix socket that speaks version 1 of the contract.

It does nothing by itself except greet; a test reads what came, and says what goes back. Waiting
is on queues, with one bound for a machine that has come to a halt.
"""

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent import slabs as agent_slabs

DEADLINE_S = 120.0
POLL_S = 0.005


def until(condition: Callable[[], bool], what: str) -> None:
    """Look again and again, up to the bound: a thread of the SDK is on its way to the condition,
    and the SDK has no hook for those who wait."""
    nothing = threading.Event()
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        nothing.wait(POLL_S)


def line_of(message: Mapping[str, Any]) -> bytes:
    """As it goes over the socket."""
    return json.dumps(message).encode() + b"\n"


class FakeAgent:
    """Listens on ``path`` until ``stop``; any number of connections, one after another."""

    def __init__(
        self, path: Path, *, stores: bool = False, slabs: agent_slabs.Slabs | None = None
    ) -> None:
        self.slabs = slabs
        self.sections = True
        """Whether it knows of sections; a test that wants an older agent says no."""
        self.saves = True
        """Whether it knows of requests to save."""
        self.leaving = True
        """Whether it knows of a program's last word."""
        self.path = path
        self.stores = stores
        self.token = "secret"
        self.received: queue.Queue[dict[str, Any]] = queue.Queue()
        self._listener: socket.socket
        self._thread: threading.Thread
        self._connection: socket.socket | None = None
        self._served = 0
        self._stopping = False

    def environment(self, **more: str) -> dict[str, str]:
        """What a trainer is started with, and more."""
        return {"BATON_SOCKET": str(self.path), "BATON_TOKEN": self.token, **more}

    def start(self) -> None:
        self._stopping = False
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Like a killed agent: the listener and the connection are gone at once."""
        self._stopping = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.path.unlink()

    def drop(self) -> None:
        """Cut the connection."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.fileno() != -1:
            connection.shutdown(socket.SHUT_RDWR)

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def heard_all(self) -> bool:
        """Whether a program has come and gone, and all that it said is read. A program may be gone
        before anybody has accepted its connection."""
        return self._served > 0 and not self.connected

    def send(self, **message: Any) -> None:
        self.send_bytes(line_of(message))

    def send_bytes(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.sendall(data)

    def expect(self, kind: str) -> dict[str, Any]:
        """The next message of this type; the others before it are passed over."""
        while True:
            message = self.received.get(timeout=DEADLINE_S)
            if message["type"] == kind:
                return message

    def checkpoints(self, last_step: int) -> list[dict[str, Any]]:
        """Those that come up to the one of this step."""
        found = [self.expect("checkpoint")]
        while found[-1]["step"] != last_step:
            found.append(self.expect("checkpoint"))
        return found

    def rest(self) -> list[dict[str, Any]]:
        """All that has come and was not looked at."""
        messages = []
        while not self.received.empty():
            messages.append(self.received.get())
        return messages

    def _serve(self) -> None:
        while not self._stopping:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                self._connection = connection
                if self._stopping:
                    return  # accepted while it was being stopped: nobody cuts this one any more
                try:
                    self._read(connection, lines)
                except OSError:
                    continue  # cut by the test
                finally:
                    self._served += 1
                    self._connection = None

    def _read(self, connection: socket.socket, lines: Any) -> None:
        """Answers go where the message came from: a test may cut ``self._connection`` meanwhile."""
        for line in lines:
            if not line.endswith(b"\n"):
                return  # the program was killed in the middle of it
            message = json.loads(line)
            if message["type"] == "hello":
                assert message["version"] == 1
                assert message["token"] == self.token
                known = b"" if self.slabs is None else b',"slabs":true'
                known += b',"sections":true' if self.sections else b""
                known += b',"saves":true' if self.saves else b""
                known += b',"leaving":true' if self.leaving else b""
                connection.sendall(b'{"type":"welcome","version":1%b}\n' % known)
            if message["type"] == "slab" and not message.get("offered") and self.slabs is not None:
                self._grant(connection, self.slabs, message["bytes"])
            if message["type"] == "checkpoint" and self.stores:
                # A program that ends does not wait for answers; what it said before is still read.
                stored = {"type": "stored", "id": message["id"], "digest": "ab"}
                with contextlib.suppress(OSError):
                    connection.sendall(line_of(stored))
            self.received.put(message)

    def _grant(self, connection: socket.socket, slabs: agent_slabs.Slabs, size: int) -> None:
        granted = slabs.grant("1.1", size)
        if isinstance(granted, str):
            connection.sendall(line_of({"type": "slab_refused", "reason": granted}))
            return
        line = {"type": "slab", "bytes": granted.slot_bytes, "slots": granted.slots}
        socket.send_fds(connection, [line_of(line)], [granted.descriptor])
