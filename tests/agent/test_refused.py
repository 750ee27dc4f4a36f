"""What the system refuses for a moment is done again: an end is told, a kill reaches its job.

Problem: an agent that is out of descriptors, or whose disk errs for a second, once lost the end of
a trainer until its next restart, or ended over it, and all jobs of the node went elsewhere.
Trainers are real here; what is refused, and until when, the test says.
"""

import asyncio
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core.values import Launch, ProcessExit
from agent.ports import StartError
from agent.processes import again, proc, records, supervisor
from agent.processes.endings import DIRECTORY_GONE
from agent.processes.forks import ForkServers
from agent.processes.groups import is_populated
from agent.processes.spawn import spawn_shim
from agent.processes.supervisor import Supervisor
from tests.agent.waiting import DEADLINE_S, open_forks, until

PATH = ("PATH", "/usr/local/bin:/usr/bin:/bin")


class Refusing:
    """Stands before `work`, and refuses it as the kernel does until `lets`."""

    def __init__(self, work: Callable[..., object], number: int = errno.EMFILE) -> None:
        self._work = work
        self._number = number
        self.lets = False
        self.refused_count = 0

    def __call__(self, *arguments: object, **named: object) -> object:
        if self.lets:
            return self._work(*arguments, **named)
        self.refused_count += 1
        raise OSError(self._number, os.strerror(self._number))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "AGAIN_S", 0.01)


def bash(script: str) -> Launch:
    return Launch("1.1", ("bash", "-c", script), (PATH,), "/")


async def opened(
    state: Path, forks: ForkServers | None = None
) -> tuple[Supervisor, list[ProcessExit]]:
    exits: list[ProcessExit] = []
    made = Supervisor(state, forks=forks)
    await made.open(exits.append)
    return made, exits


@pytest.mark.parametrize(("owner", "name"), [(records, "read_exit"), (proc, "all_processes")])
async def test_an_end_that_cannot_be_read_is_told_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    made, exits = await opened(tmp_path)
    await made.start(bash("sleep 600"))
    directory = tmp_path / "attempts" / "1.1"
    await until(lambda: records.read_started(directory))
    started = records.read_started(directory)
    assert started is not None
    refusing = Refusing(getattr(owner, name))
    monkeypatch.setattr(owner, name, refusing)
    os.kill(started.shim_pid, 9)  # nobody has written how it ended, so /proc is looked through
    await until(lambda: refusing.refused_count > 2)
    assert exits == []
    refusing.lets = True
    await until(lambda: exits)
    assert [(ended.exit_code, ended.signal) for ended in exits] == [(None, None)]
    await made.close()


async def test_an_end_is_told_though_the_state_directory_was_removed(tmp_path: Path) -> None:
    made, exits = await opened(tmp_path / "state")
    await made.start(bash(f"while [ -e {tmp_path}/state ]; do sleep 0.01; done"))
    # the last that is written while it runs: whatever is added below it, `rmtree` ends over
    await until(lambda: records.read_started(tmp_path / "state" / "attempts" / "1.1"))
    shutil.rmtree(tmp_path / "state")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, None, DIRECTORY_GONE)]
    made.forget("1.1")
    await made.close()


async def test_a_kill_that_cannot_be_aimed_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, exits = await opened(tmp_path)
    trapped = tmp_path / "trapped"
    await made.start(bash(f"trap '' TERM; touch {trapped}; sleep 600 & wait"))
    await until(trapped.exists)  # or it ends of the first signal, and not of the kill
    refusing = Refusing(proc.read_process)
    monkeypatch.setattr(proc, "read_process", refusing)
    made.signal("1.1", "TERM")
    made.kill("1.1")
    await until(lambda: refusing.refused_count > 4)
    refusing.lets = True
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, 9)]
    await made.close()


async def test_an_attempt_whose_files_stay_is_settled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, exits = await opened(tmp_path)
    await made.start(bash("exit 0"))
    await until(lambda: exits)
    refusing = Refusing(Path.unlink, errno.EIO)
    monkeypatch.setattr(Path, "unlink", lambda path, **named: refusing(path, **named))
    made.forget("1.1")
    await until(lambda: refusing.refused_count > 2)
    refusing.lets = True
    await until(lambda: not (tmp_path / "attempts" / "1.1" / "launch").exists())
    await made.close()


async def test_a_shim_without_a_descriptor_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would run a trainer that nobody knows of."""
    made, exits = await opened(tmp_path)
    spawned: list[int] = []

    def spawn(program: Path, directory: Path, status_fd: int) -> int:
        spawned.append(spawn_shim(program, directory, status_fd))
        return spawned[-1]

    monkeypatch.setattr("agent.processes.supervisor.spawn_shim", spawn)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", Refusing(os.pidfd_open))
        with pytest.raises(StartError, match="Too many open files") as refused:
            await made.start(bash("sleep 600"))
    assert not refused.value.permanent
    with pytest.raises(ProcessLookupError):
        os.kill(spawned[0], 0)
    await made.start(bash("exit 0"))
    await until(lambda: exits)
    await made.close()


async def test_a_forked_shim_is_met_when_there_is_a_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trainer runs already, and must not be taken for one whose shim has ended."""
    monkeypatch.setattr(
        supervisor, "FORK_TIMEOUT_S", DEADLINE_S
    )  # a server that is slow is waited for
    forks = ForkServers()
    await open_forks(forks)
    made, exits = await opened(tmp_path, forks)
    refusing = Refusing(proc.open_pidfd)
    monkeypatch.setattr(proc, "open_pidfd", refusing)
    release = tmp_path / "release"
    script = f"while [ ! -e {release} ]; do sleep 0.01; done; exit 3"

    async def let() -> None:
        await until(lambda: refusing.refused_count > 2)
        refusing.lets = True

    letting = asyncio.ensure_future(let())
    assert await made.start(bash(script)) > 0
    await letting
    assert exits == []
    release.touch()
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 3, None)]
    await made.close()
    await forks.close()


def test_a_group_that_cannot_be_looked_at_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_populated(tmp_path)
    monkeypatch.setattr(Path, "read_text", Refusing(Path.read_text))
    assert is_populated(tmp_path)
