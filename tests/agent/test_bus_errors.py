"""A trainer that a bus error ends is told with the room in /dev/shm, which usually lacks then."""

import os
import signal
from pathlib import Path

import pytest

from agent.core.values import Launch, ProcessExit
from agent.processes import endings
from agent.processes.supervisor import Supervisor
from tests.agent.waiting import until

PATH = ("PATH", "/usr/local/bin:/usr/bin:/bin")
# The file system gives the address space, and has not the memory for it.
WRITES = """
import mmap, os, sys
fd = os.memfd_create("room")
os.ftruncate(fd, mmap.PAGESIZE)
room = mmap.mmap(fd, mmap.PAGESIZE)
os.ftruncate(fd, 0)
room[0] = 1
"""


async def ended(state: Path, *command: str) -> ProcessExit:
    exits: list[ProcessExit] = []
    made = Supervisor(state)
    await made.open(exits.append)
    await made.start(Launch("1.1", command, (PATH,), "/"))
    await until(lambda: exits)
    await made.close()
    return exits[0]


async def test_a_bus_error_is_told_with_the_room_that_there_is(tmp_path: Path) -> None:
    found = os.statvfs(endings.SHARED_MEMORY)
    for state, command in (
        ("direct", ("python3", "-c", WRITES)),
        ("shell", ("sh", "-c", 'python3 -c "$0"; exit $?', WRITES)),
    ):
        exit_ = await ended(tmp_path / state, *command)
        assert signal.SIGBUS in (exit_.signal, (exit_.exit_code or 0) - 128)
        assert exit_.reason.startswith("a bus error: ")
        assert f"/dev/shm; that has {found.f_blocks * found.f_frsize} bytes, " in exit_.reason


async def test_where_there_is_no_shared_memory_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "SHARED_MEMORY", str(tmp_path / "none"))
    exit_ = await ended(tmp_path, "sh", "-c", "kill -BUS $$")
    assert exit_.reason == f"a bus error, and there is no {tmp_path}/none"


@pytest.mark.parametrize("end", ["kill -SEGV $$", "exit 7", "exit 0", "exit 134"])
async def test_any_other_end_is_told_as_it_was(tmp_path: Path, end: str) -> None:
    assert (await ended(tmp_path, "sh", "-c", end)).reason == ""
