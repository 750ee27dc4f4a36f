"""The agent's side of `launcher.py`: trainers that are services of systemd.

Problem: a trainer in a unit of its own is no child of the agent and cannot be handed a descriptor,
and why its unit ended (out of memory, say) only systemd knows, for as long as somebody asks.

How: the handshake that a shim otherwise has over a pipe goes over a FIFO in the attempt's
directory. It stays there, and marks the attempt as one with a unit for an agent that comes later.
Once the shim is gone, systemd is asked how the unit ended, and then to forget it. All of it is
bounded in time, and nothing here is waited for by the loop.
"""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import structlog

from agent.core.values import Launch
from agent.processes import shim
from agent.processes.forks import Warmth
from agent.processes.launcher import MEMORY_BYTES_MIN
from agent.processes.warm_unit import WarmUnit

SOCKET = Path("/run/baton-launcher/launcher.sock")
STATUS_NAME = "status"
# What an agent that begins waits for a launcher that hangs: systemd gives it 180 s for all.
OTHERS_S_MAX = 40.0
LAUNCHER_S_MAX = 35.0  # a little longer than the launcher waits for systemd
ANSWER_BYTES_MAX = 8192
# Its processes have ended; systemd has yet to read so: milliseconds, on a box with time to spare.
ENDED_LOOKS_MAX = 200
ENDED_LOOK_S = 0.01  # a look itself takes more
OVER = ("inactive", "failed")
SUCCESS, OOM_KILL = "success", "oom-kill"

log = structlog.get_logger()


def is_unit(directory: Path) -> bool:
    """Whether the attempt was started as a unit."""
    return (directory / STATUS_NAME).exists()


def request(launch: Launch) -> dict[str, object]:
    """What the launcher is asked for: every GPU that the trainer sees, and its limits. A limit that
    holds no interpreter is the least one that does."""
    environment = dict(launch.environment)
    gpus = [uuid for uuid in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if uuid]
    places = dict(launch.places)
    grace = environment.get("BATON_GRACE_MS", "")
    return {
        "ask": "start",
        "attempt": launch.attempt_id,
        "gpus": [places.get(uuid, uuid) for uuid in gpus],
        "memory_bytes": max(launch.memory_bytes, MEMORY_BYTES_MIN) if launch.memory_bytes else 0,
        "grace_ms": int(grace) if grace.isdecimal() else shim.GRACE_DEFAULT_MS,
    }


def why_ended(properties: dict[str, str]) -> str:
    """The sentence that a unit's end adds to its trainer's exit; empty when it adds nothing."""
    if properties.get("Result") != OOM_KILL:
        return ""
    limit = properties.get("MemoryMax", "")
    if limit.isdecimal() and int(limit) < 2**63:
        return f"out of memory: the job's limit of {limit} bytes"
    return "out of memory: the node has no more, and the job has no limit of its own"


class Units:
    """Starts, kills and settles units by the launcher at `socket_path`; with a `warmth`, those that
    it fits are forked from a process that has loaded it."""

    def __init__(
        self,
        socket_path: Path = SOCKET,
        *,
        systemctl: str = "systemctl",
        warmth: Warmth | None = None,
    ) -> None:
        self._socket_path = socket_path
        self._systemctl = systemctl
        self.warm = WarmUnit(warmth, self._ask) if warmth else None
        self._tasks: set[asyncio.Future[None]] = set()

    def open_status(self, directory: Path) -> int:
        """The reading end of the attempt's handshake. Raises OSError."""
        path = directory / STATUS_NAME
        os.mkfifo(path, 0o600)
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self, launch: Launch, directory: Path, on_refused: Callable[[str], None]) -> None:
        """Have the shim of this attempt started; it says itself how that went, unless
        `on_refused` does."""
        self._spawn(self._start(launch, directory, on_refused))

    async def open(self, state_directory: Path, attempts: Collection[str]) -> None:
        """Beside those `attempts`, which have records here, nothing is left in a unit."""
        await self.kill_others(attempts)
        if self.warm:
            self.warm.open(state_directory)

    async def kill_others(self, attempts: Collection[str]) -> None:
        """SIGKILL what is in the units of attempts that have no records here: nobody answers for
        it, and its GPUs are needed. `attempts` are looked at until that is done, which goes on
        beside the caller when it takes longer than `OTHERS_S_MAX`."""
        killing = self._spawn(self._kill_others(attempts))
        await asyncio.wait({killing}, timeout=OTHERS_S_MAX)

    async def _kill_others(self, attempts: Collection[str]) -> None:
        for attempt_id in await self.attempts():
            if attempt_id not in attempts:
                log.error("process.unit_unknown", attempt=attempt_id)
                await self._tell({"ask": "kill", "attempt": attempt_id})
                await self._tell({"ask": "forget", "attempt": attempt_id})

    def ended(self, attempt_id: str, tell: Callable[[str], None]) -> None:
        """Its shim has gone: `tell` gets what the unit's end adds, once systemd knows."""
        self._spawn(self._ended(attempt_id, tell))

    async def attempts(self) -> tuple[str, ...]:
        """Those that systemd has a unit of, running or failed."""
        text = await self._ask_systemd(
            "list-units", "--all", "--plain", "--no-legend", "--no-pager", "baton-job-*.service"
        )
        names = (line.split()[0] for line in text.splitlines() if line.strip())
        return tuple(name.removeprefix("baton-job-").removesuffix(".service") for name in names)

    def close(self) -> None:
        """Wait for nothing any more; the units of attempts go on."""
        if self.warm:
            self.warm.close()
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Awaitable[None]) -> "asyncio.Future[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _start(
        self, launch: Launch, directory: Path, on_refused: Callable[[str], None]
    ) -> None:
        asked = request(launch)
        if self.warm and await self.warm.start(launch, directory, asked):
            return
        refused = await self._ask(asked)
        if refused:
            # A launcher that was slow may have started it all the same. A shim names itself before
            # it reads `launch`: so it finds none, or is heard in one of the next two rounds.
            (directory / shim.LAUNCH_NAME).unlink(missing_ok=True)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            on_refused(refused)

    async def _tell(self, asked: dict[str, object]) -> None:
        refused = await self._ask(asked)
        if refused:
            log.warning("unit.refused", attempt=asked["attempt"], ask=asked["ask"], reason=refused)

    async def _ended(self, attempt_id: str, tell: Callable[[str], None]) -> None:
        properties: dict[str, str] = {}
        for _ in range(ENDED_LOOKS_MAX):
            text = await self._ask_systemd(
                "show", "--property=ActiveState,Result,MemoryMax", f"baton-job-{attempt_id}.service"
            )
            properties = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            if properties.get("ActiveState", OVER[0]) in OVER:
                break
            await asyncio.sleep(ENDED_LOOK_S)
        if properties.get("Result") != SUCCESS:  # else it is forgotten without a word of ours
            await self._tell({"ask": "forget", "attempt": attempt_id})
        tell(why_ended(properties))

    async def _ask(self, asked: dict[str, object]) -> str:
        """The launcher's refusal; empty when it did what was asked."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
            channel.setblocking(False)
            try:
                async with asyncio.timeout(LAUNCHER_S_MAX):
                    await loop.sock_connect(channel, os.fspath(self._socket_path))
                    await loop.sock_sendall(channel, json.dumps(asked).encode())
                    answer = json.loads(await loop.sock_recv(channel, ANSWER_BYTES_MAX))
            except TimeoutError:
                return f"the launcher did not answer within {LAUNCHER_S_MAX:.0f} s"
            except (OSError, ValueError) as error:
                return f"the launcher cannot be asked: {error}"
        return str(answer.get("refused", "")) if isinstance(answer, dict) else "no answer"

    async def _ask_systemd(self, *words: str) -> str:
        """What systemctl says; empty when it cannot be asked in time."""
        try:
            process = await asyncio.create_subprocess_exec(
                self._systemctl,
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError:
            return ""
        try:
            async with asyncio.timeout(LAUNCHER_S_MAX):
                text, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            return ""
        return text.decode(errors="replace")
