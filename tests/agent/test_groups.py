"""Control groups of trainers: real ones where this box lets us make any, and directories that stand
in for them for what a kernel does not do when it is asked to."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.values import Launch, ProcessesStuck, ProcessExit
from agent.processes import groups as module
from agent.processes import proc, records, shim, unkillable
from agent.processes.endings import NEVER_STARTED, SUPERVISOR_GONE
from agent.processes.forks import ForkServers
from agent.processes.groups import Groups, NoGroups, is_populated, make_home
from agent.processes.supervisor import Supervisor
from tests.agent.test_processes import DAEMON, PATH, alive, bash
from tests.agent.waiting import open_forks, until


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A real one."""
    try:
        made = make_home(tmp_path)
    except NoGroups as error:
        pytest.skip(f"no control groups can be made here: {error}")
    yield made
    for path in (*made.glob("*"), made):
        shim.tell_group(os.fsencode(path), b"cgroup.kill", b"1")
        with contextlib.suppress(OSError):
            path.rmdir()


@pytest.fixture(params=["executed", "forked"])
async def forks(request: pytest.FixtureRequest) -> AsyncIterator[ForkServers | None]:
    if request.param == "executed":
        yield None
        return
    servers = ForkServers()
    await open_forks(servers)
    yield servers
    await servers.close()


def hidden(pid_file: Path, last_s: int) -> Launch:
    """Nothing is left to know it by: a parent and a session of its own, an empty environment."""
    script = 'env -i "$(command -v python3)" -c "$1" "$2"; exec sleep "$3"'
    base = bash(script, DAEMON, str(pid_file), str(last_s), attempt_id="7.2")
    # a token of its own: by it others' would be killed
    return replace(base, environment=(PATH, ("BATON_TOKEN", str(pid_file))))


@pytest.mark.parametrize("away", [False, True])
async def test_what_hides_from_its_job_dies_with_it_though_the_shim_was_killed(
    tmp_path: Path, home: Path, forks: ForkServers | None, away: bool
) -> None:
    """Also while no agent runs: the next one, started from anywhere, finds the group."""
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tmp_path, forks=forks, groups=Groups(home))
    await supervisor.open(exits.append)
    await supervisor.start(hidden(tmp_path / "pid", 600))
    await until((tmp_path / "pid").exists)
    daemon = int((tmp_path / "pid").read_text())
    directory = supervisor.attempt_directory("7.2")
    await until(lambda: records.read_started(directory) is not None)
    started = records.read_started(directory)
    assert started is not None
    group = home / "baton-job-7.2"
    # and not the shim, which has the end to tell
    inside = {str(started.pid), str(daemon)}
    await until(lambda: set((group / "cgroup.procs").read_text().split()) == inside)
    if away:
        await supervisor.close()
    os.kill(started.shim_pid, signal.SIGKILL)
    if away:
        supervisor = Supervisor(tmp_path, forks=forks, groups=Groups(None))
        assert await supervisor.open(exits.append) == ("7.2",)
    await until(lambda: exits)
    assert not alive(daemon)
    assert exits == [ProcessExit("7.2", None, None, SUPERVISOR_GONE)]
    assert not group.exists()
    await supervisor.close()


async def test_a_group_goes_with_its_job_and_their_home_with_the_last(
    tmp_path: Path, home: Path
) -> None:
    """What the job left behind, and groups that it has made itself, too."""
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tmp_path, groups=Groups(home))
    await supervisor.open(exits.append)
    group = home / "baton-job-7.2"
    await supervisor.start(hidden(tmp_path / "pid", 600))
    await until((tmp_path / "pid").exists)
    (group / "below").mkdir()
    daemon = int((tmp_path / "pid").read_text())
    (group / "below/cgroup.procs").write_text(str(daemon))
    supervisor.kill("7.2")
    await until(lambda: exits)
    assert exits == [ProcessExit("7.2", None, signal.SIGKILL)]
    assert not alive(daemon)
    assert not group.exists()
    assert home.name not in os.listdir(home.parent)
    await supervisor.close()


async def test_a_group_that_nobody_answers_for_is_emptied(tmp_path: Path, home: Path) -> None:
    """The state directory was lost, or is another one's."""
    left = home / "baton-job-9.1"
    left.mkdir(parents=True)
    process = await asyncio.create_subprocess_exec("sleep", "600")
    (left / "cgroup.procs").write_text(str(process.pid))
    supervisor = Supervisor(tmp_path, groups=Groups(home))
    await supervisor.open(lambda _: None)
    assert await process.wait() == -signal.SIGKILL
    await until(lambda: not left.exists())
    await supervisor.close()


# --- stand-ins ------------------------------------------------------------------------------------


class StandIn(Groups):
    """Groups that are plain directories; what lives in one is what its file says."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, remove=lambda group: shutil.rmtree(group) if group != home else None)

    def make(self, directory: Path) -> None:
        super().make(directory)
        group = self.of(directory)
        for name in ("cgroup.kill", "cgroup.procs"):
            (group / name).touch()
        self.populate(directory, 1)

    def of(self, directory: Path) -> Path:
        assert self._home is not None
        return self._home / f"baton-job-{directory.name}"

    def populate(self, directory: Path, populated: int) -> None:
        group = self.of(directory)
        (group / "cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")


async def test_nobody_has_ended_before_his_group_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in it waits in the kernel for a device; that is told, and its GPU stays taken."""
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    monkeypatch.setattr(unkillable, "LOOK_S", 0.001)
    monkeypatch.setattr(unkillable, "UNINTERRUPTIBLE", b"S")
    exits: list[ProcessExit] = []
    told: list[ProcessesStuck] = []
    groups = StandIn(tmp_path / "groups")
    supervisor = Supervisor(tmp_path, groups=groups)
    await supervisor.open(exits.append, told.append)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    await supervisor.start(Launch("7.2", ("cat", str(gate)), (PATH,), "/"))
    directory = supervisor.attempt_directory("7.2")
    stuck = await asyncio.create_subprocess_exec("sleep", "600")
    await until(lambda: unkillable.is_stuck(shim.stat_fields(stuck.pid)))
    (groups.of(directory) / "cgroup.procs").write_text(f"{stuck.pid}\n")
    gate.write_text("")  # who looks after its end finds this process, and not an empty group before
    await until(lambda: told and told[-1].pids)
    assert records.read_exit(directory) is not None, "the trainer itself is over"
    assert exits == []
    assert (groups.of(directory) / "cgroup.kill").read_text() == "1"
    groups.populate(directory, 0)
    await until(lambda: exits)
    assert exits == [ProcessExit("7.2", 0, None)]
    assert told == [ProcessesStuck("7.2", (stuck.pid,))]
    assert not groups.of(directory).exists()
    stuck.kill()
    await stuck.wait()
    await supervisor.close()


async def test_a_kill_after_the_end_of_a_shim_reaches_nobody_but_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left may wait in the kernel for hours, and the shim's number be another's by then."""
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    exits: list[ProcessExit] = []
    groups = StandIn(tmp_path / "groups")
    supervisor = Supervisor(tmp_path, groups=groups)
    await supervisor.open(exits.append)
    await supervisor.start(Launch("7.2", ("true",), (PATH,), "/"))
    attempt = supervisor._attempts["7.2"]
    await until(lambda: attempt.shim_fd < 0)
    stranger = await asyncio.create_subprocess_exec("sh", "-c", "sleep 600; true")
    await until(lambda: proc.descendants(stranger.pid))
    attempt.shim_pid = stranger.pid
    supervisor.kill("7.2")
    (child,) = proc.descendants(stranger.pid)
    assert alive(child.pid)
    assert exits == []
    groups.populate(attempt.directory, 0)
    await until(lambda: exits)
    stranger.kill()
    os.kill(child.pid, signal.SIGKILL)
    await stranger.wait()
    await supervisor.close()


async def test_without_a_right_to_a_group_a_job_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tmp_path, groups=Groups(tmp_path / "file"))
    await supervisor.open(exits.append)
    await supervisor.start(Launch("7.2", ("true",), (PATH,), "/"))
    await until(lambda: exits)
    assert exits == [ProcessExit("7.2", 0, None)]
    await supervisor.close()


async def test_the_group_of_an_attempt_is_no_other_directory(tmp_path: Path) -> None:
    """A record that was altered, or not written whole, ends nobody else."""
    directory = tmp_path / "7.2"
    directory.mkdir()
    other = tmp_path / "baton-job-7.1"
    other.mkdir()
    (other / "cgroup.kill").touch()
    (directory / shim.GROUP_NAME).write_text(str(other))
    groups = Groups(None, remove=shutil.rmtree)
    groups.kill(directory)
    ended: list[str] = []
    groups.clear(directory, lambda: ended.append(NEVER_STARTED))
    assert ended == [NEVER_STARTED]
    assert (other / "cgroup.kill").read_text() == ""


class Kernel:
    """What /proc says of this process, and the hierarchy that it is in."""

    def __init__(self, directory: Path, own: str = "/", root: str = "/") -> None:
        self.proc, self.mount = directory / "proc", directory / "mount"
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()
        (self.proc / "self/cgroup").write_text(f"4:memory:/elsewhere\n0::{own}\n")
        (self.proc / "self/mountinfo").write_text(
            "24 1 0:21 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            f"25 1 0:22 {root} {self.mount} rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
        )

    def files(self, group: Path) -> None:
        group.mkdir(parents=True, exist_ok=True)
        for name in ("cgroup.procs", "cgroup.kill"):
            (group / name).touch()


@pytest.mark.parametrize(
    ("own", "root", "below"),
    [("/", "/", "."), ("/a/b", "/", "a/b"), ("/box/a", "/box", "a"), ("/box", "/box", ".")],
)
def test_an_agent_finds_its_own_group(tmp_path: Path, own: str, root: str, below: str) -> None:
    kernel = Kernel(tmp_path, own, root)
    assert module.own_group(kernel.proc) == kernel.mount / below


def test_what_is_no_group_of_ours_is_left_alone(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "/elsewhere", "/box")
    with pytest.raises(NoGroups, match="no hierarchy of control groups of version 2"):
        make_home(tmp_path, proc=kernel.proc)
    with pytest.raises(NoGroups, match="No such file"):
        make_home(tmp_path, proc=tmp_path / "nothing")


def test_below_systemd_only_what_it_has_delegated_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path)
    with pytest.raises(NoGroups, match="systemd has not delegated"):
        make_home(tmp_path, proc=kernel.proc, systemd=tmp_path)
    assert list(kernel.mount.iterdir()) == []
    marks = {"user.delegate": b"1"}
    monkeypatch.setattr(os, "getxattr", lambda _, name: marks[name])
    monkeypatch.setattr(os, "access", lambda *_: True)
    home = make_home(tmp_path, proc=kernel.proc, systemd=tmp_path)
    assert home.parent == kernel.mount / "."
    assert home == make_home(tmp_path, proc=kernel.proc, systemd=tmp_path), "over restarts"
    assert home != make_home(tmp_path / "x", proc=kernel.proc, systemd=tmp_path)


def test_a_kernel_without_the_kill_gets_no_groups(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.files(kernel.mount)
    with pytest.raises(NoGroups, match="cannot be written to"):
        make_home(tmp_path, proc=kernel.proc, systemd=tmp_path / "none")
    assert not list(kernel.mount.glob("baton-*"))


def test_a_group_that_is_gone_is_empty(tmp_path: Path) -> None:
    assert not is_populated(tmp_path / "gone")
