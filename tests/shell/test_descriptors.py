"""That nobody new can connect is said once, and so is that it is over."""

import asyncio
import errno
import os

import pytest

from coordinator import descriptors


async def test_a_process_without_descriptors_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str, tuple[tuple[str, object], ...]]] = []
    answers = [False, True, True, True, False, False]
    over = asyncio.Event()
    opened = os.open

    def opening(path: str, flags: int) -> int:
        if answers.pop(0):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return opened(path, flags)

    async def turn(seconds: float) -> None:
        assert seconds == descriptors.LOOK_S
        if not answers:
            over.set()
            await asyncio.Event().wait()

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", opening)
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
    assert len(os.listdir("/proc/self/fd")) == len(before)
