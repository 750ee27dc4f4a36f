"""Jobs that share a GPU compute at the same time, and each is held to its memory: NVIDIA's MPS.

Problem: processes that share a GPU take turns on it, and nothing but their own good will keeps one
from the other's memory. MPS runs their work side by side and refuses what is beyond a client's
limit; but it is a daemon that somebody has to start before the first client, end after the last
one, and replace when it has died. And a program is no client of it by itself.

How: this stands before the supervisor, as the same port. Before a job that shares its GPU is
started, that GPU gets a control daemon of its own, which sees that GPU alone and has its pipes in
a directory of ours, and the job's environment says where. One after the other's clients are kept as
files, so an agent that comes back knows whose daemon still has clients. The last one's exit ends
it, which also takes the server's context off the GPU. Whether a daemon lives is asked of itself:
its control program answers for it, where a pid could be somebody else's by now. It is asked before
each start, and twice a minute while there are clients: of a daemon that has died the log tells
then. Its clients are left alone, since the server that they compute through may have outlived it;
who starts next gets a new daemon.

Where there is no control program, or it fails, jobs start without it and take turns, and the log
says so: a job is worth more than its neighbour's comfort. The daemon runs as the agent does, and
serves that user alone; so it is not used for jobs in units of their own, which have another user.

Source: NVIDIA's "Multi-Process Service", on environment variables and nvidia-cuda-mps-control.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path

import structlog

from agent.core.values import Launch, ProcessesStuck, ProcessExit
from agent.ports import Processes, StartError

CONTROL = "nvidia-cuda-mps-control"
ANSWER_S_MAX = 10.0  # it answers in milliseconds; ending its server takes a second or two
LOOK_S = 30.0  # a small program for each shared GPU; whoever starts asks anyway
MIB = 1024**2

log = structlog.get_logger()


def limit_of(share_bytes: int) -> str:
    """For CUDA_MPS_PINNED_DEVICE_MEM_LIMIT: of the first and only GPU that a client sees."""
    return f"0={max(1, share_bytes // MIB)}M"


class MpsProcesses:
    """The `Processes` port over `inner`. `control` is the control program; empty: none is started,
    and what an agent before this one started is still ended. `sleep` takes seconds."""

    def __init__(
        self,
        inner: Processes,
        directory: Path,
        control: str,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._inner = inner
        self._sleep = sleep
        self._watching: asyncio.Task[None] | None = None
        self._dead: dict[str, None] = {}  # daemons of which that was told
        self._directory = directory
        self._control = control
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._gpus: dict[str, str] = {}  # of each client
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_exit: Callable[[ProcessExit], None] = lambda _: None

    # --- the port ---------------------------------------------------------------------------------

    async def open(
        self,
        on_exit: Callable[[ProcessExit], None],
        on_stuck: Callable[[ProcessesStuck], None],
    ) -> tuple[str, ...]:
        self._on_exit = on_exit
        adopted = await self._inner.open(self._exited, on_stuck)
        for uuid, clients in self._remembered().items():
            for attempt_id in clients:
                if attempt_id in adopted:
                    self._gpus[attempt_id] = uuid
                else:
                    self._client_path(uuid, attempt_id).unlink(missing_ok=True)
            # A control program that hangs holds nobody up who begins.
            self._spawn(self._end_unless_used(uuid))
        if self._control:
            self._watching = asyncio.ensure_future(self._watch())
        return adopted

    async def start(self, launch: Launch) -> int:
        if not launch.shared_gpu_memory_bytes or not self._control:
            return await self._inner.start(launch)
        uuid = dict(launch.environment).get("CUDA_VISIBLE_DEVICES", "")
        async with self._locks[uuid]:
            why_not = await self._begin(uuid, launch.attempt_id)
        if why_not:
            log.warning("mps.not_started", gpu=uuid, attempt=launch.attempt_id, reason=why_not)
            return await self._inner.start(launch)
        self._gpus[launch.attempt_id] = uuid
        try:
            return await self._inner.start(self._as_client(launch, uuid))
        except StartError:
            self._left(launch.attempt_id)
            raise

    def age_ms(self, attempt_id: str) -> int:
        return self._inner.age_ms(attempt_id)

    def signal(self, attempt_id: str, signal_name: str) -> None:
        self._inner.signal(attempt_id, signal_name)

    def dump_stacks(self, attempt_id: str, nccl_pipes: str) -> None:
        self._inner.dump_stacks(attempt_id, nccl_pipes)

    def kill(self, attempt_id: str) -> None:
        self._inner.kill(attempt_id)

    def forget(self, attempt_id: str) -> None:
        self._inner.forget(attempt_id)

    async def close(self) -> None:
        """Daemons go on, as their clients do."""
        if self._watching is not None:
            self._watching.cancel()
        for task in list(self._tasks):
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._inner.close()

    # --- clients ----------------------------------------------------------------------------------

    def _as_client(self, launch: Launch, uuid: str) -> Launch:
        environment = {
            **dict(launch.environment),
            **self._addresses(uuid),
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": limit_of(launch.shared_gpu_memory_bytes),
        }
        return replace(launch, environment=tuple(sorted(environment.items())))

    def _exited(self, ended: ProcessExit) -> None:
        self._left(ended.attempt_id)
        self._on_exit(ended)

    def _left(self, attempt_id: str) -> None:
        uuid = self._gpus.pop(attempt_id, "")
        if uuid:
            self._client_path(uuid, attempt_id).unlink(missing_ok=True)
            self._spawn(self._end_unless_used(uuid))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _remembered(self) -> dict[str, list[str]]:
        """The clients of each daemon, as an agent before this one knew them."""
        if not self._directory.is_dir():
            return {}
        return {
            home.name: [path.name for path in (home / "clients").glob("*")]
            for home in sorted(self._directory.iterdir())
        }

    # --- daemons ----------------------------------------------------------------------------------

    async def _begin(self, uuid: str, attempt_id: str) -> str:
        """Have a daemon for the GPU, and the attempt among its clients. Why not; empty: done."""
        try:
            for name in ("pipe", "log", "clients"):
                (self._directory / uuid / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            # Before the daemon is there: an agent that dies now leaves one that is known of.
            self._client_path(uuid, attempt_id).touch()
        except OSError as error:
            return f"{self._directory / uuid} cannot be written to: {error.strerror}"
        if not await self._run(uuid, asked="get_server_list"):
            return ""
        failed = await self._run(uuid, "-d")
        if failed:
            self._client_path(uuid, attempt_id).unlink(missing_ok=True)
            return failed
        self._dead.pop(uuid, None)
        log.info("mps.started", gpu=uuid)
        return ""

    async def _watch(self) -> None:
        while True:
            await self._sleep(LOOK_S)
            for uuid in sorted(set(self._gpus.values())):
                await self._look(uuid)

    async def _look(self, uuid: str) -> None:
        async with self._locks[uuid]:
            clients = [client for client, gpu in self._gpus.items() if gpu == uuid]
            if not clients:  # the last one has left meanwhile
                return
            reason = await self._run(uuid, asked="get_server_list")
        if not reason:
            self._dead.pop(uuid, None)
        elif uuid not in self._dead:
            self._dead[uuid] = None
            log.warning("mps.died", gpu=uuid, attempts=len(clients), reason=reason)

    async def _end_unless_used(self, uuid: str) -> None:
        async with self._locks[uuid]:
            home = self._directory / uuid
            if any((home / "clients").glob("*")) or not home.exists():
                return
            failed = await self._run(uuid, asked="quit") if self._control else "no control program"
            log.info("mps.ended", gpu=uuid, reason=failed or "its last client has left")
            await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)

    async def _run(self, uuid: str, *words: str, asked: str = "") -> str:
        """Call the control program, with a line for the daemon; why it failed, empty: it did
        not."""
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "CUDA_VISIBLE_DEVICES": uuid,
            **self._addresses(uuid),
        }
        try:
            process = await asyncio.create_subprocess_exec(
                self._control, *words,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"{self._control} cannot be started: {error.strerror}"
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                await process.communicate(f"{asked}\n".encode() if asked else None)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return f"{CONTROL} did not answer within {ANSWER_S_MAX:.0f} s"
        return f"{CONTROL} ended with status {process.returncode}" if process.returncode else ""

    def _addresses(self, uuid: str) -> dict[str, str]:
        home = self._directory / uuid
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(home / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(home / "log"),
        }

    def _client_path(self, uuid: str, attempt_id: str) -> Path:
        return self._directory / uuid / "clients" / attempt_id
