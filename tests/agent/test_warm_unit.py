"""Warm starts where trainers are units: what is forked has its limits before it starts anything.

The launcher is real, systemd is not (see `unit_worlds.py`); the warm process is one of its own, as
a service would be.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent.core.values import Launch, ProcessExit
from agent.processes import launcher, logs, proc, records, shim, warm_unit
from agent.processes.endings import NEVER_STARTED
from agent.processes.forks import Warmth
from agent.processes.launcher import Refused, Settings
from agent.processes.supervisor import Supervisor
from agent.processes.warm_unit import WarmUnit
from tests.agent.unit_worlds import GPU, World, launching
from tests.agent.waiting import DEADLINE_S, until

# Says in which process what it needs was loaded; a module, since only modules are run in place.
TOLD = """
import json, os, slow, sys
print(json.dumps({"pid": os.getpid(), "loaded_in": slow.LOADED_IN, "token": os.environ["TOKEN"]}))
sys.exit(75)
"""
SLOW = "import os\nLOADED_IN = os.getpid()\n"
MEMORY_BYTES = 1 << 30


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    here = World(tmp_path)
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "slow.py").write_text(SLOW)
    (modules / "told.py").write_text(TOLD)
    with launching(here):
        yield here


def environment(world: World) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(world.root / "modules")}


def told(world: World, attempt_id: str = "1.1", **variables: str) -> Launch:
    values = {**environment(world), "CUDA_VISIBLE_DEVICES": GPU, "TOKEN": "x", **variables}
    arguments = (sys.executable, "-P", "-m", "told")
    return Launch(attempt_id, arguments, tuple(sorted(values.items())), "/", MEMORY_BYTES)


@asynccontextmanager
async def running(
    world: World, module: str = "slow"
) -> AsyncIterator[tuple[Supervisor, WarmUnit, list[ProcessExit]]]:
    """A supervisor, with the warm process ready where there can be one."""
    units = world.units_of(Warmth(sys.executable, (module,), environment(world)))
    exits: list[ProcessExit] = []
    keeper = Supervisor(world.state, units=units)
    await keeper.open(exits.append)
    assert units.warm is not None
    if module == "slow":
        await ready(units.warm)
    yield keeper, units.warm, exits
    await keeper.close()


async def ready(warm: WarmUnit) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await warm.ready.wait()


def output(keeper: Supervisor, attempt_id: str = "1.1") -> dict[str, object]:
    text = logs.read(keeper.attempt_directory(attempt_id), 0).data.decode()
    found: dict[str, object] = json.loads(text)
    return found


def warm_pid(warm: WarmUnit) -> int:
    assert warm._channel is not None
    return warm_unit._peer_pid(warm._channel)


def services(world: World) -> list[str]:
    return [word for word in world.run_words() if word.startswith("--unit=")]


async def test_a_trainer_is_forked_and_moved_to_a_unit_of_its_own(world: World) -> None:
    async with running(world) as (keeper, warm, exits):
        server = warm_pid(warm)
        pid = await keeper.start(told(world))
        await until(lambda: exits)
        assert exits == [ProcessExit("1.1", 75, None)]
        assert output(keeper) == {"pid": pid, "loaded_in": server, "token": "x"}
    assert services(world) == ["--unit=baton-warm.service", "--unit=baton-job-1.1.service"]
    (asked,) = world.bus()
    *_, unit, group, count, moved = asked.split()
    assert (unit, group, count) == ("baton-job-1.1.service", "/", "1")
    assert moved not in (str(pid), str(server))  # its supervisor
    words = world.run_words()
    assert words[-2:] == ["--hold", moved]
    mine = words[words.index("--unit=baton-job-1.1.service") :]
    properties = {word.removeprefix("--property=") for word in mine}
    limits = {f"MemoryMax={MEMORY_BYTES}", "MemorySwapMax=0", "TimeoutStopSec=120000ms"}
    assert properties > {*launcher.FIXED_PROPERTIES, *limits, "Delegate="}
    assert "DeviceAllow=/dev/nvidia3 rw" in properties


async def test_many_are_forked_from_one(world: World) -> None:
    async with running(world) as (keeper, warm, exits):
        server = warm_pid(warm)
        for number in range(1, 9):
            await keeper.start(told(world, f"{number}.1"))
        await until(lambda: len(exits) == 8)
        assert {output(keeper, one.attempt_id)["loaded_in"] for one in exits} == {server}


async def test_what_cannot_be_moved_starts_cold_and_once(world: World) -> None:
    (world.root / "bus-fails").write_text("Process migration not available.\n")
    async with running(world) as (keeper, warm, exits):
        with capture_logs() as captured:
            pid = await keeper.start(told(world))
            await until(lambda: exits)
        assert output(keeper)["loaded_in"] == pid
        assert exits == [ProcessExit("1.1", 75, None)]
        assert warm.ready.is_set()
    (line,) = [entry for entry in captured if entry["event"] == "unit.refused"]
    assert line["reason"] == "Process migration not available."
    unit = "baton-job-1.1.service"
    assert services(world) == ["--unit=baton-warm.service", *[f"--unit={unit}"] * 2]
    undone = ["kill --kill-whom=all --signal=KILL", "stop", "reset-failed"]
    assert world.asked()[2:5] == [f"{words} -- {unit}" for words in undone]


async def test_other_programs_and_other_settings_start_cold(world: World) -> None:
    async with running(world) as (keeper, _, exits):
        await keeper.start(Launch("1.1", ("true",), (), "/"))
        pid = await keeper.start(told(world, "2.1", OMP_NUM_THREADS="3"))
        await until(lambda: len(exits) == 2)
        assert output(keeper, "2.1")["loaded_in"] == pid
    assert world.bus() == []


async def test_one_that_dies_is_started_anew_and_nothing_waits_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_unit, "RESTART_FIRST_S", 0.01)
    async with running(world) as (keeper, warm, exits):
        before = warm_pid(warm)
        os.kill(before, signal.SIGKILL)
        pid = await keeper.start(told(world))
        await until(lambda: exits)
        assert output(keeper)["loaded_in"] == pid
        await until(lambda: warm.ready.is_set() and warm_pid(warm) != before)
        await keeper.start(told(world, "2.1"))
        await until(lambda: len(exits) == 2)
        assert output(keeper, "2.1")["loaded_in"] == warm_pid(warm)
    assert world.asked().count("stop -- baton-warm.service") == 2


async def test_one_that_hangs_is_replaced_and_the_start_goes_the_slow_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_unit, "FORK_S_MAX", 0.05)
    monkeypatch.setattr(warm_unit, "RESTART_FIRST_S", 0.01)
    async with running(world) as (keeper, warm, exits):
        hung = warm_pid(warm)
        os.kill(hung, signal.SIGSTOP)
        pid = await keeper.start(told(world))
        await until(lambda: exits)
        assert output(keeper)["loaded_in"] == pid
        await until(lambda: warm.ready.is_set() and warm_pid(warm) != hung)
        os.kill(hung, signal.SIGCONT)  # as systemd would have killed it
        await until(lambda: proc.read_process(hung) is None)
    # What it was asked for before is nothing that it starts now.
    assert exits == [ProcessExit("1.1", 75, None)]


async def test_an_agent_that_ends_before_the_move_leaves_nothing_that_starts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(world) as (keeper, warm, _):
        asking = asyncio.Event()

        async def hangs(asked: dict[str, object]) -> str:
            asking.set()
            await asyncio.Event().wait()
            return str(asked)

        monkeypatch.setattr(warm, "_ask", hangs)
        starting = asyncio.create_task(keeper.start(told(world)))
        async with asyncio.timeout(DEADLINE_S):
            await asking.wait()
        waiting = [p.pid for p in proc.all_processes() if p.parent_pid == warm_pid(warm)]
        assert len(waiting) == 1
        await keeper.close()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await until(lambda: proc.read_process(waiting[0]) is None)
    exits: list[ProcessExit] = []
    later = Supervisor(world.state)
    assert await later.open(exits.append) == ("1.1",)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, None, NEVER_STARTED)]
    await later.close()


async def test_what_cannot_be_imported_is_said_once(world: World) -> None:
    with capture_logs() as captured:
        async with running(world, "no_such_module") as (keeper, warm, exits):
            await until(lambda: any(e["event"] == "fork_server.unavailable" for e in captured))
            pid = await keeper.start(told(world))
            await until(lambda: exits)
            assert output(keeper)["loaded_in"] == pid
            assert warm._keeping is not None
            assert warm._keeping.done()
    (line,) = [entry for entry in captured if entry["event"] == "fork_server.unavailable"]
    assert line["reason"] == "No module named 'no_such_module'"


async def test_without_a_launcher_it_is_tried_again_later(tmp_path: Path) -> None:
    world = World(tmp_path)
    with capture_logs() as captured:
        warmth = Warmth(sys.executable, (), {})
        keeper = Supervisor(world.state, units=world.units_of(warmth))
        await keeper.open(lambda _: None)
        await until(lambda: any(e["event"] == "fork_server.ended" for e in captured))
        await keeper.close()
    (line,) = [entry for entry in captured if entry["event"] == "fork_server.ended"]
    assert "the launcher cannot be asked" in line["reason"]


async def test_a_unit_that_is_stopped_stops_its_trainer(world: World) -> None:
    """systemd tells the first process of a service alone, at a shutdown say."""
    waits = "import signal, time, slow\nprint('waits', flush=True)\ntime.sleep(600)\n"
    (world.root / "modules" / "waits.py").write_text(waits)
    launch = told(world)
    async with running(world) as (keeper, _, exits):
        await keeper.start(replace(launch, arguments=(*launch.arguments[:3], "waits")))
        await until(lambda: logs.read(keeper.attempt_directory("1.1"), 0).data != b"")
        (first,) = [p.pid for p in proc.all_processes() if is_first(p.pid, world)]
        os.kill(first, signal.SIGTERM)
        await until(lambda: exits)
        await until(lambda: not is_first(first, world))
    assert exits == [ProcessExit("1.1", None, signal.SIGTERM)]


def is_first(pid: int, world: World) -> bool:
    words = proc.read_bytes(pid, "cmdline").split(b"\0")
    return b"--hold" in words and os.fsencode(world.state) in words[3]


# --- the launcher --------------------------------------------------------------------------------

MOVE: dict[str, object] = {
    "ask": "move", "attempt": "1.1", "gpus": [], "memory_bytes": 0, "grace_ms": 1, "pid": 2,
}  # fmt: skip


@pytest.mark.parametrize("pid", [0, 1, -1, 2**22 + 1, True, "2", 2.0, None])
def test_what_is_no_process_is_refused(pid: object) -> None:
    launcher.parse(json.dumps(MOVE).encode())
    with pytest.raises(Refused, match="'pid'"):
        launcher.parse(json.dumps({**MOVE, "pid": pid}).encode())


@pytest.fixture
def grouped(world: World, tmp_path: Path) -> Settings:
    """Settings that look at control groups, in a directory of the test's."""
    (tmp_path / "groups" / str(os.getpid())).mkdir(parents=True)
    unit = "baton-agent.service"
    return replace(world.settings, agent_unit=unit, control_groups=tmp_path / "groups")


def enter(settings: Settings, unit: str) -> None:
    path = settings.control_groups / str(os.getpid()) / "cgroup"
    path.write_text(f"0::/system.slice/{unit}\n")


@pytest.mark.parametrize("unit", ["baton-agent.service", "baton-job-1.2.service", "ssh.service"])
def test_nothing_is_moved_but_what_the_warm_process_forked(
    world: World, grouped: Settings, unit: str
) -> None:
    enter(grouped, unit)
    with pytest.raises(Refused, match=r"is not of baton-warm\.service"):
        launcher.perform(grouped, {**MOVE, "pid": os.getpid()})
    assert world.bus() == []


@pytest.mark.parametrize("moved", [True, False])
def test_it_has_been_moved_once_the_kernel_says_so(
    world: World, grouped: Settings, monkeypatch: pytest.MonkeyPatch, *, moved: bool
) -> None:
    for directory in (world.state, world.state / "attempts", world.state / "attempts/1.1"):
        directory.mkdir(mode=0o700)
    enter(grouped, "baton-warm.service")
    asked: list[str] = []

    def run(words: Sequence[str]) -> None:
        asked.append(words[0])
        if words[0] == grouped.busctl and moved:
            enter(grouped, "baton-job-1.1.service")

    monkeypatch.setattr(launcher, "run", run)
    with (
        contextlib.nullcontext()
        if moved
        else pytest.raises(Refused, match=r"was not moved to baton-job-1\.1\.service")
    ):
        launcher.perform(grouped, {**MOVE, "pid": os.getpid()})
    assert asked == [grouped.systemd_run, grouped.busctl]
    assert len(world.asked()) == (0 if moved else 3), "nothing is left of it"


def test_a_process_that_has_gone_is_refused(grouped: Settings) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(OSError, match="No such process"):
        launcher.perform(grouped, {**MOVE, "pid": pid})


def test_the_warm_process_has_the_properties_of_trainers(world: World) -> None:
    world.state.mkdir(mode=0o700)
    launch = Launch("warm", ("true",), (), "/")
    records.write_launch(world.state / "warm", launch)
    words = launcher.command(world.settings, {"ask": "warm"})
    properties = {word.removeprefix("--property=") for word in words if "--property=" in word}
    assert properties > set(launcher.FIXED_PROPERTIES)
    assert f"User={world.settings.job_user}" in properties
    (world.state / "warm" / shim.LAUNCH_NAME).unlink()
    (world.state / "warm" / "log").rmdir()
    (world.state / "warm").rmdir()
    (world.state / "warm").symlink_to(world.root)
    with pytest.raises(Refused, match="warm has no directory"):
        launcher.command(world.settings, {"ask": "warm"})
