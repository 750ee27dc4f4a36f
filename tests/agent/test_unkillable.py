"""Processes that outlive a kill in state D are told as often as they change."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from agent.core.values import ProcessesStuck
from agent.processes import unkillable
from agent.processes.unkillable import UNINTERRUPTIBLE, stuck


@pytest.fixture
def child() -> Iterator[int]:
    """Below this process, which stands for the shim."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def test_only_uninterruptible_ones_are_stuck(child: int) -> None:
    assert child not in stuck(os.getpid())
    assert child in stuck(os.getpid(), lambda pid: [UNINTERRUPTIBLE, b"1"])
    assert child not in stuck(os.getpid(), lambda pid: [])


async def test_the_first_look_is_told_and_each_new_set_also_the_empty_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here: tuple[int, ...] = ()
    looks: list[tuple[Callable[..., object], tuple[object, ...]]] = []
    told: list[ProcessesStuck] = []
    over = False
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(
        loop, "call_later", lambda delay_s, call, *given: looks.append((call, given))
    )
    unkillable.watch("7.1", 1, lambda: over, told.append, find=lambda shim_pid: here)
    for pids in ((), (41, 42), (41, 42), (42,), (), ()):
        here = pids
        look, given = looks.pop()
        look(*given)
    over, here = True, (43,)
    look, given = looks.pop()
    look(*given)
    assert looks == [], "nobody looks after what is over"
    assert told == [ProcessesStuck("7.1", pids) for pids in ((), (41, 42), (42,), ())]
