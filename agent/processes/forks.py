"""Keeps the processes that shims and trainers are forked from, and says which may serve a launch.

Problem: a fork server is a convenience that must never be needed. It may be missing (no torch
here), not ready yet (imports take seconds), killed, or hung, and a job has to start all the same;
and what it forks must not differ from what would have been executed, or a resumed training would
see other library settings than it was checkpointed under.

How: a server is asked only when it has said that it is ready, and never waited for: the request is
one datagram that is taken at once or not at all, and the answer comes over the status pipe of the
attempt, as from any shim. One that ends is started again after a pause that doubles. A trainer is
forked from the warm one only where the variables that libraries read while they are loaded are
those that the server was started with; everything else a forked trainer gets from its launch.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent.core.launch import NCCL_PIPES
from agent.core.values import Launch
from agent.processes import forkserver
from agent.processes.spawn import INTERPRETER

RESTART_FIRST_S = 1.0
# a server that cannot stay up is worth a look a minute: it costs seconds of a core each time
RESTART_MAX_S = 60.0
# the longest title that a forked shim or trainer may need: two paths and some words
PADDING = "-" * 1024
# numpy's BLAS starts its threads when it is loaded, and only a process of one thread can be forked
SERVER_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "PADDING": "-" * 4096}

READ_WHILE_LOADING = (
    "HOME", "XDG_", "LD_", "LC_", "LANG", "PYTHON", "MALLOC_", "GLIBC_", "OMP_", "GOMP_", "KMP_",
    "MKL_", "OPENBLAS_", "NPY_", "TORCH", "PYTORCH_", "ATEN_", "CUDA_", "CUBLAS_", "NVIDIA_", "HF_",
    "HUGGINGFACE_", "USE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "BATON_HOOK",
)  # fmt: skip
"""Beginnings of names that are read once, when an interpreter or a library starts."""

READ_LATER = (
    "CUDA_VISIBLE_DEVICES", "CUDA_MPS_", "TORCHELASTIC_RESTART_COUNT", NCCL_PIPES,
)  # fmt: skip
"""Beginning like that, but looked at when CUDA, torchrun's rendezvous or NCCL is first used (CUDA
programming guide, "CUDA Environment Variables"; NVIDIA's MPS documentation, "Environment
Variables"; torch's ProcessGroupNCCL.cpp, `DumpPipe`). All that a launch adds of itself is here, or
gangs and those that share a GPU would never start warm."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Warmth:
    """What a warm server is made of: the trainers' interpreter, what it imports, and the
    environment that every trainer begins with."""

    interpreter: str
    modules: tuple[str, ...]
    environment: Mapping[str, str]

    def fits(self, launch: Launch) -> bool:
        """Whether this interpreter, and what it has loaded, are what that launch would have got."""
        if launch.arguments[:3] != (self.interpreter, "-P", "-m"):
            return False
        return settings(dict(launch.environment)) == settings(self.environment)

    def server_environment(self) -> dict[str, str]:
        """What the server itself is started with."""
        return {**self.environment, **SERVER_ENVIRONMENT}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that libraries read while they are loaded."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_WHILE_LOADING) and not name.startswith(READ_LATER)
    }


class ForkServer:
    """One server process. `open` starts it, and starts it again whenever it ends."""

    def __init__(
        self, name: str, command: Sequence[str], modules: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self._command = (*command, os.fspath(Path(forkserver.__file__)))
        self._modules = ",".join(modules)
        self._environment = dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._pause_s = RESTART_FIRST_S
        self.ready = asyncio.Event()

    def open(self) -> None:
        """Start it; ready when `ready` is set. Never raises: without it all goes on, slower."""
        self._restart = None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._later(str(error))
            return
        ours.setblocking(False)
        descriptor = theirs.fileno()
        try:
            self._process = subprocess.Popen(
                [*self._command, str(descriptor), self._modules, PADDING],
                env=self._environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[descriptor],
                start_new_session=True,  # Ctrl-C in a terminal is for the agent
            )
        except OSError as error:
            ours.close()
            what = (error.strerror, error.filename)
            self._later(": ".join(str(part) for part in what if part))
            return
        finally:
            theirs.close()
        self._channel = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._hear)

    def ask(self, directory: Path, status_fd: int) -> bool:
        """Have a shim forked for this attempt; False when that cannot be asked for now."""
        if self._channel is None or not self.ready.is_set():
            return False
        try:
            socket.send_fds(self._channel, [os.fsencode(directory)], [status_fd])
        except OSError:  # it has just ended, or its queue is full because it hangs
            return False
        return True

    def end(self) -> None:
        """It does not answer: it is killed, which answers all that it was asked, and replaced."""
        if self._process is not None:
            self._process.kill()

    async def close(self) -> None:
        """End it. What it has forked goes on."""
        if self._restart is not None:
            self._restart.cancel()
        process = self._process
        self._let_go()
        if process is not None:
            process.kill()
            await asyncio.to_thread(process.wait)

    def _hear(self) -> None:
        """It is ready, or it has ended."""
        assert self._channel is not None
        try:
            data = self._channel.recv(forkserver.SAID_BYTES_MAX)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if data == forkserver.READY:
            self.ready.set()
            self._pause_s = RESTART_FIRST_S
            log.info("fork_server.ready", server=self.name, pid=self.pid())
        if data:  # else what it has to say is in its last words, and in its status
            return
        self._ended()

    def _ended(self) -> None:
        process = self._process
        self._let_go()
        assert process is not None
        assert process.stderr is not None
        process.kill()  # its end of the channel is closed: there is nothing more to ask it for
        with process.stderr:
            os.set_blocking(process.stderr.fileno(), False)
            said = (process.stderr.read() or b"").decode(errors="replace").strip()
        status = process.wait()
        reason = said.splitlines()[-1] if said else f"ended with status {status}"
        if status == forkserver.EXIT_NO_MODULE:
            log.info("fork_server.unavailable", server=self.name, reason=reason)
            return
        self._later(reason)

    def _later(self, reason: str) -> None:
        log.warning("fork_server.ended", server=self.name, reason=reason, again_s=self._pause_s)
        self._restart = asyncio.get_running_loop().call_later(self._pause_s, self.open)
        self._pause_s = min(2 * self._pause_s, RESTART_MAX_S)

    def _let_go(self) -> None:
        self.ready.clear()
        if self._channel is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        self._channel = self._process = None

    def pid(self) -> int:
        """Of the process that serves now; 0 between two."""
        return self._process.pid if self._process else 0


class ForkServers:
    """The one for supervisors, and the warm one, if there is to be one."""

    def __init__(self, warmth: Warmth | None = None) -> None:
        kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        self.plain = ForkServer("plain", (INTERPRETER, "-I", "-S"), (), kept)
        self._warmth = warmth
        self.warm: ForkServer | None = None
        if warmth is not None:
            command, environment = (warmth.interpreter, "-P"), warmth.server_environment()
            self.warm = ForkServer("warm", command, warmth.modules, environment)

    def open(self) -> None:
        """Start them; neither is waited for."""
        for server in self._servers():
            server.open()

    async def close(self) -> None:
        """End them; trainers go on."""
        for server in self._servers():
            await server.close()

    def ask(self, launch: Launch, directory: Path, status_fd: int) -> int:
        """Have the shim of a launch forked by who fits best; returns that server's pid, 0 when
        nobody can now."""
        warm, warmth = self.warm, self._warmth
        if warm and warmth and warmth.fits(launch) and warm.ask(directory, status_fd):
            return warm.pid()
        return self.plain.pid() if self.plain.ask(directory, status_fd) else 0

    def end(self, pid: int) -> None:
        """The server of that pid, if it still serves, has not done what it was asked."""
        for server in self._servers():
            if server.pid() == pid:
                log.warning("fork_server.hung", server=server.name, pid=pid)
                server.end()

    def _servers(self) -> list[ForkServer]:
        return [self.plain, *([self.warm] if self.warm else [])]
