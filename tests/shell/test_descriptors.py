"""That nobody new can connect is said once, and so is that it is over."""

import asyncio
import errno
import os
from types import SimpleNamespace

import pytest

from coordinator import descriptors


async def test_a_process_without_descriptors_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str, tuple[tuple[str, object], ...]]] = []
    answers = [False, True, True, True, False, False]
    over = asyncio.Event()
    really_open, really_close = os.open, os.close
    opened, given_back = list[int](), list[int]()

    def opening(path: str, flags: int) -> int:
        if answers.pop(0):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        opened.append(really_open(path, flags))
        return opened[-1]

    def closing(descriptor: int) -> None:
        given_back.append(descriptor)
        really_close(descriptor)

    here = SimpleNamespace(
        open=opening,
        close=closing,
        strerror=os.strerror,
        O_RDONLY=os.O_RDONLY,
        O_CLOEXEC=os.O_CLOEXEC,
    )

    async def turn(seconds: float) -> None:
        assert seconds == descriptors.LOOK_S
        if not answers:
            over.set()
            await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr("coordinator.descriptors.os", here)
        patched.setattr(asyncio, "sleep", turn)
        watching = asyncio.create_task(
            descriptors.watch(lambda level, event, fields: told.append((level, event, fields)))
        )
        await over.wait()
        watching.cancel()
    assert told == [
        ("error", "descriptors.none", (("reason", "Too many open files"),)),
        ("info", "descriptors.again", ()),
    ]
    assert given_back == opened
    assert len(opened) == 3
