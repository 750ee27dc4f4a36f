"""A server for trainers and the other ends of its socket, for tests of what is said on it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

from agent.core.trainer_messages import TrainerHello, TrainerMessage
from agent.sdk_server import SdkServer
from agent.slabs import Slabs

DEADLINE_S = 30.0  # for an answer on a busy machine; reached only when the test fails
SECRET = "secret"
HELLO = {"type": "hello", "version": 1, "token": SECRET, "pid": 1}
WELCOME = {"type": "welcome", "version": 1, "sections": True, "saves": True, "leaving": True}


class Trainer:
    """The other end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, line: object) -> None:
        data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
        self.writer.write(data)

    async def receive(self) -> dict[str, object] | None:
        """The next line; None at the end."""
        async with asyncio.timeout(DEADLINE_S):
            line = await self.reader.readline()
        return json.loads(line) if line else None

    async def refusal(self) -> object:
        """The reason of the one error line before the connection is closed."""
        answer = await self.receive()
        assert answer is not None
        assert answer["type"] == "error"
        assert await self.receive() is None
        return answer["reason"]


class House:
    """A server, what it handed inward, and its trainers."""

    def __init__(self, runtime_directory: Path, staging: Path, slabs: Slabs | None = None) -> None:
        self.messages: list[tuple[str, TrainerMessage]] = []
        self.received = asyncio.Event()
        self.server = SdkServer(runtime_directory, self.note, slabs)
        self.staging = staging
        self.trainers: list[Trainer] = []

    def note(self, attempt_id: str, message: TrainerMessage) -> None:
        self.messages.append((attempt_id, message))
        self.received.set()

    async def message(self) -> tuple[str, TrainerMessage]:
        """The next one that reached the core."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.messages:
                self.received.clear()
                await self.received.wait()
        return self.messages.pop(0)

    async def connect(self) -> Trainer:
        trainer = Trainer(*await asyncio.open_unix_connection(self.server.socket_path))
        self.trainers.append(trainer)
        return trainer

    async def greeted(self, token: str = SECRET, pid: int = 42) -> Trainer:
        trainer = await self.connect()
        trainer.send({"type": "hello", "version": 1, "token": token, "pid": pid})
        assert await trainer.receive() == WELCOME
        assert (await self.message())[1] == TrainerHello(pid)
        return trainer


@contextlib.asynccontextmanager
async def open_house(directory: Path, slabs: Slabs | None = None) -> AsyncIterator[House]:
    """One that knows attempt 1.1."""
    staging = directory / "staging"
    staging.mkdir()
    house = House(directory / "run", staging, slabs)
    await house.server.open()
    house.server.register("1.1", SECRET, str(staging))
    yield house
    await house.server.close()
    for trainer in house.trainers:
        trainer.writer.close()
