"""The trainers' socket: bound, accepted on, and bound anew when somebody has removed its file.

Problem: a socket is reached by its file. Where that is removed under an agent that goes on (by an
operator who clears /run) the listener notices nothing, and those who are connected go on; but
whoever starts from then on has no agent. None of his checkpoints is kept, and the first that
anybody hears of it is that a handoff begins from nothing.

How: each few seconds, and before a trainer is started, the file is looked at. When it is not the
one that was bound another takes its place, directory and all; trainers try again by themselves.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import structlog

SOCKET_NAME = "trainers.sock"
SOCKET_PATH_BYTES_MAX = 100  # sun_path holds 108 (unix(7)); leaves room for temporary names
ACCEPT_PAUSE_S = 1.0  # when the process is out of descriptors, as asyncio's own servers do
LISTEN_BACKLOG = 128  # all trainers of a node reconnect at once after the agent's restart
LOOK_S = 5.0  # trainers try again for longer than that

log = structlog.get_logger()


class Listener:
    """`<runtime directory>/trainers.sock`, within one event loop; each connection is given to
    `connected`, which owns it."""

    def __init__(self, directory: Path, connected: Callable[[socket.socket], None]) -> None:
        self._directory = directory
        self._connected = connected
        self._listener: socket.socket | None = None
        self._bound = (0, 0)
        self._lost = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def path(self) -> str:
        return str(self._directory / SOCKET_NAME)

    def open(self) -> None:
        """Listen. Raises OSError: path too long, directory not usable, another agent listening."""
        self._bind()
        self._look_again()

    def close(self) -> None:
        """Twice is once."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._listener is None:
            return
        ours = self._is_ours()
        self._drop()
        if ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def look(self) -> None:
        """Whether its file is there; else it is made again, now or at a later look."""
        if self._listener is None or self._is_ours():
            return
        try:
            self._bind()
        except OSError as error:
            if not self._lost:
                reason = f"{self.path}: {os.strerror(error.errno or 0)}"
                log.error("trainer.socket_gone", reason=reason)
            self._lost = True
        else:
            self._lost = False
            log.warning("trainer.socket_made", directory=str(self._directory))

    def _look_again(self) -> None:
        self.look()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look_again)

    def _is_ours(self) -> bool:
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._bound

    def _bind(self) -> None:
        path = self.path
        if len(os.fsencode(path)) >= SOCKET_PATH_BYTES_MAX:
            raise OSError(errno.ENAMETOOLONG, "runtime directory too long for a socket", path)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            os.fchmod(listener.fileno(), 0o600)  # bind(2) takes the file's mode from the socket's
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(LISTEN_BACKLOG)
            status = os.stat(path)
        except OSError:
            listener.close()
            raise
        self._drop()
        self._listener, self._bound = listener, (status.st_dev, status.st_ino)
        self._listen(listener)

    def _drop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    def _listen(self, listener: socket.socket) -> None:
        if listener is self._listener:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            connected, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("trainer.not_accepted", reason=error.strerror)
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_PAUSE_S, self._listen, listener)
            return
        connected.setblocking(False)
        self._connected(connected)


def _remove_stale(path: str) -> None:
    """A socket file that nobody listens on any more stands in the way of bind(2)."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            with contextlib.suppress(BlockingIOError):  # so many wait there that no more may
                probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        raise OSError(errno.EADDRINUSE, "another agent listens on this socket", path)
