"""Fork servers are a convenience: what they start is the same, and without them all goes on.

Real processes; each test waits for a condition, never for a time.
"""

import asyncio
import contextlib
import importlib.util
import json
import marshal
import os
import py_compile
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.machinery import SourcelessFileLoader
from pathlib import Path

import pytest

from agent.core.attempt import AttemptRecord
from agent.core.launch import LaunchOptions, compose
from agent.core.values import Gang, JobSpec, Launch, ProcessExit
from agent.ports import StartError
from agent.processes import logs, proc, records, shim, shim_output, shim_program, spawn, supervisor
from agent.processes.endings import NEVER_STARTED
from agent.processes.forks import ForkServers, Warmth, settings
from agent.processes.mps import MpsProcesses
from agent.processes.supervisor import Supervisor
from tests.agent.waiting import DEADLINE_S, until

# What a forked trainer finds, said by itself. A module, since only modules are run in place.
TOLD = """
import json, os, signal, sys, slow
assert __name__ == "__main__"
print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "where": os.getcwd(),
    "arguments": sys.argv[1:], "environment": dict(os.environ), "loaded_in": slow.LOADED_IN,
    "descriptors": sorted(os.listdir("/proc/self/fd"), key=int)[:-1],
    "handlers": [int(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGPIPE)],
}))
sys.exit(75)
"""
SLOW = "import os\nLOADED_IN = os.getpid()\n"


def environment(modules: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(modules)}


def module_launch(modules: Path, name: str, attempt_id: str = "1.1", **variables: str) -> Launch:
    values = {**environment(modules), **variables}
    arguments = (sys.executable, "-P", "-m", name, "--flag")
    return Launch(attempt_id, arguments, tuple(sorted(values.items())), str(modules))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is slow does not hang: else another one would start what a test has ordered of it."""
    monkeypatch.setattr(supervisor, "FORK_TIMEOUT_S", DEADLINE_S)


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder with a module that is slow to load and one that needs it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW)
    (folder / "told.py").write_text(TOLD)
    return folder


@asynccontextmanager
async def running(
    tmp_path: Path, modules: Path, *imports: str
) -> AsyncIterator[tuple[Supervisor, ForkServers, list[ProcessExit]]]:
    """A supervisor whose fork servers are ready."""
    warmth = Warmth(sys.executable, imports, environment(modules))
    servers = ForkServers(warmth)
    servers.open()
    assert servers.warm is not None
    exits: list[ProcessExit] = []
    keeper = Supervisor(tmp_path / "state", forks=servers)
    await keeper.open(exits.append)
    async with asyncio.timeout(DEADLINE_S):
        await servers.plain.ready.wait()
        if imports == ("slow",):
            await servers.warm.ready.wait()
    yield keeper, servers, exits
    await keeper.close()
    await servers.close()


def output(keeper: Supervisor, attempt_id: str = "1.1") -> str:
    return logs.read(keeper.attempt_directory(attempt_id), 0).data.decode()


async def test_module_runs_in_a_fork_of_what_has_loaded_it(tmp_path: Path, modules: Path) -> None:
    async with running(tmp_path, modules, "slow") as (keeper, servers, exits):
        pid = await keeper.start(module_launch(modules, "told", BATON_TOKEN="x"))
        await until(lambda: exits)
        assert servers.warm is not None
        assert exits == [ProcessExit("1.1", 75, None)]
        told = json.loads(output(keeper))
    assert told["pid"] == told["session"] == pid
    assert told["loaded_in"] not in (pid, told["parent"])
    assert told["arguments"] == ["--flag"]
    assert told["where"] == str(modules)
    assert told["environment"] == {**environment(modules), "BATON_TOKEN": "x"}
    assert told["descriptors"] == ["0", "1", "2"]
    assert told["handlers"] == [signal.SIG_DFL, signal.SIG_IGN]


@pytest.mark.parametrize(
    ("name", "variables"),
    [("told", {"OMP_NUM_THREADS": "3"}), ("told", {"LD_PRELOAD": ""}), ("told", {"HF_HOME": "/x"})],
)
async def test_what_was_loaded_under_other_settings_is_loaded_again(
    tmp_path: Path, modules: Path, name: str, variables: dict[str, str]
) -> None:
    async with running(tmp_path, modules, "slow") as (keeper, _, exits):
        pid = await keeper.start(module_launch(modules, name, **variables))
        await until(lambda: exits)
        assert json.loads(output(keeper))["loaded_in"] == pid


async def test_other_programs_are_executed_as_they_are(tmp_path: Path, modules: Path) -> None:
    async with running(tmp_path, modules, "slow") as (keeper, _, exits):
        launch = Launch("1.1", ("bash", "-c", "cat /proc/$$/cmdline; true"), (), "/")
        await keeper.start(launch)
        await until(lambda: exits)
        assert exits == [ProcessExit("1.1", 0, None)]
        assert output(keeper) == "bash\0-c\0cat /proc/$$/cmdline; true\0"


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("raise SystemExit('no such model')", 1, "no such model\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import atexit; atexit.register(print, 'the last word')", 0, "the last word\n"),
        ("import sys; sys.exit([1])", 1, "[1]\n"),
    ],
)
async def test_a_module_ends_as_it_would_on_its_own(
    tmp_path: Path, modules: Path, text: str, status: int, said: str
) -> None:
    (modules / "ends.py").write_text(text)
    async with running(tmp_path, modules, "slow") as (keeper, _, exits):
        await keeper.start(module_launch(modules, "ends"))
        await until(lambda: exits)
        assert exits == [ProcessExit("1.1", status, None)]
        assert output(keeper).endswith(said)


async def test_processes_say_what_they_are(tmp_path: Path, modules: Path) -> None:
    (modules / "waits.py").write_text("import signal; signal.pause()")
    async with running(tmp_path, modules, "slow") as (keeper, _, exits):
        pid = await keeper.start(module_launch(modules, "waits"))
        await until(lambda: records.read_started(keeper.attempt_directory("1.1")))
        started = records.read_started(keeper.attempt_directory("1.1"))
        assert started is not None
        await until(lambda: proc.read_bytes(pid, "cmdline").startswith(sys.executable.encode()))
        words = proc.read_bytes(pid, "cmdline").rstrip(b"\0").split(b"\0")
        assert words == [os.fsencode(word) for word in module_launch(modules, "waits").arguments]
        assert os.fsencode(keeper.attempt_directory("1.1")) in proc.read_bytes(
            started.shim_pid, "cmdline"
        ).split(b"\0")
        keeper.kill("1.1")
        await until(lambda: exits)


async def test_a_server_that_died_is_replaced_and_nothing_waits_for_it(
    tmp_path: Path, modules: Path
) -> None:
    async with running(tmp_path, modules, "slow") as (keeper, servers, exits):
        assert servers.warm is not None
        for server in (servers.plain, servers.warm):
            os.kill(server.pid(), signal.SIGKILL)
        await keeper.start(module_launch(modules, "told"))
        await until(lambda: exits)
        assert exits == [ProcessExit("1.1", 75, None)]
        async with asyncio.timeout(DEADLINE_S):
            await servers.plain.ready.wait()
            await servers.warm.ready.wait()


async def test_a_request_that_dies_with_its_server_is_done_without_it(
    tmp_path: Path, modules: Path
) -> None:
    async with running(tmp_path, modules, "slow") as (keeper, servers, exits):
        pid = servers.plain.pid()
        os.kill(pid, signal.SIGSTOP)
        starting = asyncio.create_task(keeper.start(Launch("1.1", ("true",), (), "/")))
        await until(lambda: (keeper.attempt_directory("1.1") / shim.LAUNCH_NAME).exists())
        os.kill(pid, signal.SIGKILL)
        assert await starting > 0
        await until(lambda: exits)
        assert exits == [ProcessExit("1.1", 0, None)]


async def test_a_hung_server_is_replaced_and_the_start_goes_the_slow_way(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FORK_TIMEOUT_S", 0.0)
    async with running(tmp_path, modules, "slow") as (keeper, servers, exits):
        hung = servers.plain.pid()
        os.kill(hung, signal.SIGSTOP)
        assert await keeper.start(Launch("1.1", ("true",), (), "/")) > 0
        await until(lambda: exits)
        assert exits == [ProcessExit("1.1", 0, None)]
        await until(lambda: servers.plain.pid() not in (0, hung))


async def test_a_late_shim_is_not_left_to_what_counts_as_ended(
    tmp_path: Path, modules: Path
) -> None:
    async with running(tmp_path, modules, "slow") as (keeper, servers, _):
        os.kill(servers.plain.pid(), signal.SIGSTOP)
        token = f"late-{tmp_path}"  # other tests run beside this one, and all see all processes
        launch = Launch("1.1", ("sleep", "600"), (("BATON_TOKEN", token),), "/")
        starting = asyncio.create_task(keeper.start(launch))
        await until(lambda: (keeper.attempt_directory("1.1") / shim.LAUNCH_NAME).exists())
        await asyncio.sleep(0)
        await keeper.close()  # as an agent that ends between the request and the fork
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        # The next one finds no shim, says so, and then the fork goes through after all.
        after = Supervisor(tmp_path / "state")
        exits: list[ProcessExit] = []
        assert await after.open(exits.append) == ("1.1",)
        os.kill(servers.plain.pid(), signal.SIGCONT)
        await until(lambda: exits)
        assert exits == [ProcessExit("1.1", None, None, NEVER_STARTED)]
        # It takes requests in their order: once this one has run, the one before is through.
        second = Supervisor(tmp_path / "second", forks=servers)
        ended: list[ProcessExit] = []
        await second.open(ended.append)
        await second.start(Launch("2.1", ("true",), (), "/"))
        await until(lambda: ended)
        assert [process for process in proc.all_processes() if has_token(process.pid, token)] == []
        await after.close()
        await second.close()


def has_token(pid: int, token: str) -> bool:
    return f"BATON_TOKEN={token}".encode() in proc.read_bytes(pid, "environ").split(b"\0")


async def test_what_a_forked_trainer_leaves_behind_is_known_by_its_token(
    tmp_path: Path, modules: Path
) -> None:
    (modules / "daemon.py").write_text(
        "import os, signal\nif os.fork() == 0:\n    os.setsid()\nsignal.pause()"
    )
    token = f"daemon-{tmp_path}"
    async with running(tmp_path, modules, "slow") as (keeper, _, exits):
        await keeper.start(module_launch(modules, "daemon", BATON_TOKEN=token))
        await until(lambda: len([p for p in proc.all_processes() if has_token(p.pid, token)]) == 2)
        await until(lambda: records.read_started(keeper.attempt_directory("1.1")))
        started = records.read_started(keeper.attempt_directory("1.1"))
        assert started is not None
        os.kill(started.shim_pid, signal.SIGKILL)
        await until(lambda: exits)
        await until(lambda: not [p for p in proc.all_processes() if has_token(p.pid, token)])


async def test_what_is_given_up_is_not_started_later(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "START_TIMEOUT_S", 0.0)
    async with running(tmp_path, modules, "slow") as (keeper, servers, exits):
        pid = servers.plain.pid()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(StartError, match="did not start within") as refused:
            await keeper.start(Launch("1.1", ("touch", str(tmp_path / "ran")), (), "/"))
        assert not refused.value.permanent  # another node may do better
        keeper.forget("1.1")
        monkeypatch.setattr(supervisor, "START_TIMEOUT_S", DEADLINE_S)
        os.kill(pid, signal.SIGCONT)
        # The server takes requests in their order: once the second has run, the first is through.
        await keeper.start(Launch("2.1", ("true",), (), "/"))
        await until(lambda: exits)
        assert not (tmp_path / "ran").exists()
        assert [exit_.attempt_id for exit_ in exits] == ["2.1"]


@pytest.mark.parametrize(
    "text",
    [
        "import no_such_module",
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        # as whoever asks whether there is a GPU does with /dev/nvidiactl
        "import __main__; __main__.DEVICES = '/dev/zer'; kept = open('/dev/zero')",
    ],
)
async def test_what_cannot_be_forked_from_is_not_used(
    tmp_path: Path, modules: Path, text: str
) -> None:
    (modules / "odd.py").write_text(text)
    async with running(tmp_path, modules, "odd") as (keeper, servers, exits):
        pid = await keeper.start(module_launch(modules, "told"))
        await until(lambda: exits)
        assert json.loads(output(keeper))["loaded_in"] == pid
        assert servers.warm is not None
        assert not servers.warm.ready.is_set()


def test_settings_are_what_is_read_while_loading() -> None:
    late = {"BATON_TOKEN": "t", "CUDA_VISIBLE_DEVICES": "GPU-1", "RANK": "0", "USER": "me"}
    early = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/p", "HF_HUB_OFFLINE": "1", "LD_PRELOAD": "x"}
    assert settings({**late, **early}) == early


@pytest.mark.parametrize("slurm", [False, True])
@pytest.mark.parametrize(
    ("gpus", "ranks_here", "share_bytes"),
    [((), 1, 0), (("A",), 1, 0), (("A", "B"), 1, 0), (("A",), 2, 0), (("A",), 1, 1 << 30)],
)
@pytest.mark.parametrize("world_size", [1, 4])
def test_nothing_that_the_agent_adds_keeps_a_launch_from_the_warm_server(
    gpus: tuple[str, ...], ranks_here: int, world_size: int, share_bytes: int, slurm: bool
) -> None:
    base = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "HF_HOME": "/models"}
    spec = JobSpec(trainer="lora", slurm_environment=slurm, shared_gpu_memory_bytes=share_bytes)
    gang = Gang(0, world_size, 0, ranks_here, 0, ("n1", "n2"), "n1", 20_000, gpus)
    record = AttemptRecord(
        "7.1", 7, 1, spec, gpus, (), None, False, 0, "t", gang=gang if world_size > 1 else None
    )
    node = LaunchOptions("n1", "/socket", "/attempts", sys.executable, tuple(base.items()))
    launch = compose(record, node)
    if share_bytes:
        mps = MpsProcesses(Supervisor(Path("/state")), Path("/mps"), "control")
        launch = mps._as_client(launch, "A")
    added = set(dict(launch.environment)) - set(base)
    assert {"CUDA_VISIBLE_DEVICES", "BATON_TOKEN"} < added
    assert Warmth(sys.executable, (), base).fits(launch)


def test_the_program_of_a_start_needs_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image may be built with bytecode alone (`compileall -b`)."""
    program, kept = tmp_path / "program.pyc", []
    for module in (shim_program, shim_output, shim):
        bare = tmp_path / "bare.pyc"
        py_compile.compile(str(module.__file__), str(bare), doraise=True)
        kept.append(SourcelessFileLoader(module.__name__, str(bare)).get_code(module.__name__))
        last = tmp_path / f"{module.__name__}.pyc"
        bare.rename(last)
        spec = importlib.util.spec_from_file_location(module.__name__, last)
        assert spec is not None
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(spawn, name, importlib.util.module_from_spec(spec))
    spawn.write_program(program)
    with program.open("rb") as file:
        file.seek(16)
        made = [marshal.load(file) for _ in kept]  # noqa: S302 - our own, as it runs
    assert kept == made
