"""The trainers' socket when its file is removed, and when there is no descriptor left."""

import errno
import os
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog

from agent import sdk_listener
from agent.sdk_server import SdkServer
from agent.slabs import Slabs
from tests.agent.sdk_house import SECRET, House
from tests.agent.waiting import until


async def test_a_socket_that_was_removed_is_made_again(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its directory, before the next trainer starts; those who are connected stay."""
    before = await house.greeted()
    shutil.rmtree(tmp_path / "run")
    house.server.register("2.1", "other", str(house.staging))
    after = await house.greeted("other")
    house.server.tell("1.1", {"type": "save", "reason": "drain"})
    house.server.tell("2.1", {"type": "stop"})
    assert await before.receive() == {"type": "save", "reason": "drain"}
    assert await after.receive() == {"type": "stop"}
    monkeypatch.setattr(sdk_listener, "LOOK_S", 0.01)
    path = tmp_path / "run" / "trainers.sock"
    path.unlink()
    await house.server.close()
    await house.server.open()
    path.unlink()
    await until(path.exists)  # by itself
    await house.greeted("other")


async def test_a_socket_that_cannot_be_made_again_is_tried_for(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with structlog.testing.capture_logs() as logged:
        for epoch in ("1", "2"):
            house.server.register(f"2.{epoch}", f"other{epoch}", str(house.staging))
        (tmp_path / "run").unlink()
        house.server.register("2.3", "other3", str(house.staging))
    assert [line["event"] for line in logged] == ["trainer.socket_gone", "trainer.socket_made"]
    assert logged[0]["reason"].endswith("File exists")
    await house.greeted("other1")


async def test_another_agent_s_socket_is_left_to_it_also_when_it_accepts_nobody(
    tmp_path: Path,
) -> None:
    """Who connects to one whose queue is full would wait, and the loop with him."""
    path = str(tmp_path / sdk_listener.SOCKET_NAME)
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(path)
        other.listen(0)
        refused = 0
        while refused == 0:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            refused = waiting.connect_ex(path)
        assert refused == errno.EAGAIN
        listener = sdk_listener.Listener(tmp_path, lambda connected: connected.close())
        with pytest.raises(OSError, match="another agent listens on this socket"):
            listener.open()
        assert sdk_listener.SOCKET_NAME in os.listdir(tmp_path)


async def test_a_slab_without_a_descriptor_for_it_costs_a_connection(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    house.server = SdkServer(house.staging.parent / "own", house.note, Slabs(0.1))
    await house.server.open()
    house.server.register("1.1", SECRET, str(house.staging))
    trainer = await house.connect()
    trainer.send({"type": "hello", "version": 1, "token": SECRET, "pid": 42})
    assert await trainer.receive()
    with monkeypatch.context() as patched:
        patched.setattr(os, "dup", refused)
        trainer.send({"type": "slab", "bytes": 4096})
        assert await trainer.receive() is None
    trainer = await house.connect()
    trainer.send({"type": "hello", "version": 1, "token": SECRET, "pid": 42})
    assert await trainer.receive()
    trainer.send({"type": "slab", "bytes": 4096})
    answer = await trainer.receive()
    assert answer is not None
    assert answer["type"] == "slab"
