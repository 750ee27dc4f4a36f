"""What travels beside the lines of the trainers' socket: the memory of captures, and what nobody
asked for."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.core.trainer_messages import TrainerCheckpoint, TrainerHello, TrainerSlab, capture_name
from agent.sdk_connection import DESCRIPTORS_MAX
from agent.slabs import Slabs
from tests.agent.sdk_house import DEADLINE_S, HELLO, WELCOME, House, open_house


class SlabTrainer:
    """A trainer on a plain socket, which can pass descriptors."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(path)
        self.buffer = b""
        self.descriptors: list[int] = []

    def send(self, line: dict[str, object], *descriptors: int) -> None:
        socket.send_fds(self.socket, [json.dumps(line).encode() + b"\n"], descriptors)

    def receive(self) -> dict[str, object]:
        while b"\n" not in self.buffer:
            data, found, _, _ = socket.recv_fds(self.socket, 4096, 4)
            assert data, "closed"
            self.buffer += data
            self.descriptors += found
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def greet(self) -> dict[str, object]:
        self.send(HELLO)
        return self.receive()


@pytest.fixture
def desk() -> Iterator[Slabs]:
    desk = Slabs(0.5, lambda: 1_000_000)
    yield desk
    desk.close()


@pytest.fixture
async def generous(tmp_path: Path, desk: Slabs) -> AsyncIterator[House]:
    async with open_house(tmp_path, desk) as opened:
        yield opened


async def test_a_slab_is_given_kept_and_offered_again(generous: House, desk: Slabs) -> None:
    trainer = SlabTrainer(generous.server.socket_path)
    assert await asyncio.to_thread(trainer.greet) == {**WELCOME, "slabs": True}
    assert (await generous.message())[1] == TrainerHello(1)
    trainer.send({"type": "slab", "bytes": 10_000})
    answer = await asyncio.to_thread(trainer.receive)
    assert answer == {"type": "slab", "bytes": 12_288, "slots": 2}
    assert await generous.message() == ("1.1", TrainerSlab(12_288, 2))
    (held,) = trainer.descriptors
    inode = os.fstat(held).st_ino
    trainer.send({"type": "checkpoint", "id": 3, "slab": 8, "step": 120, "parts": 2})
    named = TrainerCheckpoint(3, capture_name(inode, 8), 120, 2)
    assert await generous.message() == ("1.1", named)
    trainer.send({"type": "slab", "bytes": 10**9})
    refusal = await asyncio.to_thread(trainer.receive)
    assert refusal["type"] == "slab_refused"
    assert "may be given away" in str(refusal["reason"])
    # The next agent has none of it, until the trainer offers what it holds.
    desk.close()
    trainer.send({"type": "slab", "bytes": 12_288, "slots": 2, "offered": True}, held)
    assert await generous.message() == ("1.1", TrainerSlab(12_288, 2))
    trainer.send({"type": "checkpoint", "id": 3, "slab": 8, "step": 120, "parts": 2})
    assert await generous.message() == ("1.1", named)
    reader, writer = os.pipe()
    trainer.send({"type": "slab", "bytes": 12_288, "slots": 2, "offered": True}, reader)
    refusal = await asyncio.to_thread(trainer.receive)
    assert (refusal["type"], refusal["offered"]) == ("slab_refused", True)
    trainer.send({"type": "slab", "bytes": 12_288, "slots": 2, "offered": True})
    assert await asyncio.to_thread(trainer.receive) == {
        "type": "error",
        "reason": "a slab is offered without its descriptor",
    }
    for descriptor in (reader, writer, held):
        os.close(descriptor)
    trainer.socket.close()


def copies(descriptor: int) -> int:
    """How many descriptors of this process are of the same file."""
    wanted, count = os.fstat(descriptor), 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, as that of the listing itself
            count += os.path.samestat(os.fstat(int(name)), wanted)
    return count


async def test_descriptors_that_nobody_asked_for_are_closed(house: House) -> None:
    trainer = SlabTrainer(house.server.socket_path)
    assert await asyncio.to_thread(trainer.greet) == WELCOME
    await house.message()
    nothing = trainer.socket.fileno()
    assert copies(nothing) == 1
    for step in range(20):
        trainer.send({"type": "progress", "step": step}, *[nothing] * 4)
        await house.message()
    assert copies(nothing) <= 1 + DESCRIPTORS_MAX
    trainer.socket.close()
