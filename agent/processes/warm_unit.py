"""The process that warm trainers are forked from, where trainers are units of systemd.

Problem: what is forked stays in the control group, the mounts and under the filters of who forks
it. A child of the agent would hand on all that the agent is denied, and none of a job's limits.

How: the launcher runs the fork server (`forkserver.py`) as a service of its own, with the
properties that trainers' services have. It dials a socket in its directory. A request is the
attempt's directory and a gate, an end of a socket pair. Over it the fork says its number, the
launcher moves that into a service of its own, with the limits and the GPUs of its attempt, and only
then the gate is opened, and it becomes the shim. A gate that closes ends it, whoever failed; so
nothing is ever started without limits, nor twice, and the start goes the slow way.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from agent.core.values import Launch
from agent.processes import forkserver, records
from agent.processes.forks import PADDING, RESTART_FIRST_S, RESTART_MAX_S, Warmth

NAME = "warm"  # of its directory, and in the log
CHANNEL_NAME = "channel"
DIAL_S_MAX = 60.0  # an interpreter that starts, on a box that is busy
FORK_S_MAX = 5.0  # it takes milliseconds; a server that takes longer is replaced

Ask = Callable[[dict[str, object]], Awaitable[str]]
"""Of the launcher; what comes back is why it refuses, empty when it has done it."""

log = structlog.get_logger()


class WarmUnit:
    """Keeps one such service while the agent is there. `ready`: it may be asked."""

    def __init__(self, warmth: Warmth, ask: Ask) -> None:
        self._warmth = warmth
        self._ask = ask
        self._channel: socket.socket | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()

    def open(self, state_directory: Path) -> None:
        """Have it started, again whenever it ends; not waited for."""
        self._keeping = asyncio.create_task(self._keep(state_directory / NAME))

    def close(self) -> None:
        """Let it end. What it has forked goes on."""
        if self._keeping is not None:
            self._keeping.cancel()

    async def start(self, launch: Launch, directory: Path, asked: dict[str, object]) -> bool:
        """Have the shim of an attempt forked and moved, which from then on speaks for itself; false
        when it was not, and never will be. `asked`: what the launcher needs to know of it."""
        channel = self._channel
        if channel is None or not self.ready.is_set() or not self._warmth.fits(launch):
            return False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                with theirs:
                    socket.send_fds(channel, [os.fsencode(directory)], [theirs.fileno()])
                refused = await self._through(ours, asked)
            except TimeoutError:
                log.warning("fork_server.hung", server=NAME, pid=_peer_pid(channel))
                with contextlib.suppress(OSError):
                    channel.shutdown(socket.SHUT_RDWR)
                return False
            except OSError as error:
                refused = records.in_words(error)
        if refused:
            log.warning("unit.refused", attempt=launch.attempt_id, ask="move", reason=refused)
        return not refused

    async def _through(self, gate: socket.socket, asked: dict[str, object]) -> str:
        """Let what was forked through the gate; returns why not. Raises TimeoutError when nothing
        was forked in good time, and OSError."""
        gate.setblocking(False)
        async with asyncio.timeout(FORK_S_MAX):
            said = await _heard(gate)
        if not said:
            return "the warm process has ended"
        refused = await self._ask({**asked, "ask": "move", "pid": int(said)})
        if not refused:
            await asyncio.get_running_loop().sock_sendall(gate, forkserver.GO)
        return refused

    async def _keep(self, directory: Path) -> None:
        pause_s = RESTART_FIRST_S
        while True:
            try:
                reason = await self._serve(directory)
            except TimeoutError:
                reason = f"it did not come up within {DIAL_S_MAX:.0f} s"
            except OSError as error:
                reason = records.in_words(error)
            if reason is None:
                return
            if self.ready.is_set():
                pause_s = RESTART_FIRST_S
            self._let_go()
            log.warning("fork_server.ended", server=NAME, reason=reason, again_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_MAX_S)

    async def _serve(self, directory: Path) -> str | None:
        """From its start to its end; returns why it has ended, `None` when there can be none here.
        Raises OSError and TimeoutError."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            self._lay_out(directory)
            listener.bind(os.fspath(directory / CHANNEL_NAME))
            listener.listen()
            listener.setblocking(False)
            if refused := await self._ask({"ask": "warm"}):
                return refused
            async with asyncio.timeout(DIAL_S_MAX):
                channel, _ = await loop.sock_accept(listener)
        with channel:
            self._channel = channel
            said = await _heard(channel)
            if said == forkserver.UNAVAILABLE:
                log.info("fork_server.unavailable", server=NAME, reason=_last_words(directory))
                return None
            if said == forkserver.READY:
                self.ready.set()
                log.info("fork_server.ready", server=NAME, pid=_peer_pid(channel))
                await _heard(channel)
        return _last_words(directory)

    def _lay_out(self, directory: Path) -> None:
        """What its unit executes. Raises OSError."""
        shutil.rmtree(directory, ignore_errors=True)
        warmth, channel = self._warmth, os.fspath(directory / CHANNEL_NAME)
        program = (warmth.interpreter, "-P", forkserver.__file__, channel)
        arguments = (*program, ",".join(warmth.modules), PADDING)
        environment = tuple(sorted(warmth.server_environment().items()))
        records.write_launch(directory, Launch(NAME, arguments, environment, "/"))

    def _let_go(self) -> None:
        self.ready.clear()
        self._channel = None


async def _heard(channel: socket.socket) -> bytes:
    """What the other end says next; nothing when it has gone."""
    try:
        return await asyncio.get_running_loop().sock_recv(channel, forkserver.SAID_BYTES_MAX)
    except ConnectionError:
        return b""


def _last_words(directory: Path) -> str:
    try:
        said = (directory / "shim.err").read_text(errors="replace").strip()
    except OSError:
        said = ""
    return said.splitlines()[-1] if said else "ended without a word"


def _peer_pid(channel: socket.socket) -> int:
    try:
        size = struct.calcsize("3i")
        found = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        return 0
    pid: int = struct.unpack("3i", found)[0]
    return pid
