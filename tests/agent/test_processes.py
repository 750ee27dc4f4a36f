"""Trainers as real processes: started, signalled, killed, adopted, and each exit told once.

Problem: what can go wrong here (orphans, reused pids, lost exits) is the kernel's doing, so a fake
would prove nothing. Every test runs real programs and waits for a condition, never for a time.
"""

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from agent.core.values import Launch, ProcessExit
from agent.ports import StartError
from agent.processes import proc, records, shim
from agent.processes.endings import NEVER_STARTED, REBOOTED, SUPERVISOR_GONE
from agent.processes.forks import ForkServers
from agent.processes.supervisor import Supervisor
from tests.agent.waiting import open_forks, until

PATH = ("PATH", "/usr/local/bin:/usr/bin:/bin")

# Double fork and setsid, as a daemon does; the grandchild writes its pid into the given file.
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open(sys.argv[1] + ".tmp", "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1] + ".tmp", sys.argv[1])
        time.sleep(600)
    os._exit(0)
os.wait()
"""


def bash(script: str, *arguments: str, attempt_id: str = "1.1", cwd: str = "/") -> Launch:
    return Launch(attempt_id, ("bash", "-c", script, "bash", *arguments), (PATH,), cwd)


def alive(pid: int) -> bool:
    fields = shim.stat_fields(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def shim_pid_of(directory: Path) -> int:
    started = records.read_started(directory)
    assert started is not None
    return started.shim_pid


def zombies() -> set[int]:
    """Children of this process that ended and were not reaped."""
    mine = [process.pid for process in proc.all_processes() if process.parent_pid == os.getpid()]
    return {pid for pid in mine if shim.stat_fields(pid)[:1] == [b"Z"]}


def has_length(exits: list[ProcessExit], number: int) -> bool:
    return len(exits) == number


forks: list[ForkServers] = []
"""The fork servers of the running test, if its shims are forked."""


@pytest.fixture(autouse=True, params=["executed", "forked"])
async def shims(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Everything here must hold however the shim came to be."""
    if request.param == "executed":
        yield
        return
    servers = ForkServers()
    await open_forks(servers)
    forks.append(servers)
    yield
    forks.clear()
    await servers.close()


async def opened(state: Path) -> tuple[Supervisor, list[ProcessExit], tuple[str, ...]]:
    exits: list[ProcessExit] = []
    supervisor = Supervisor(state, forks=forks[0] if forks else None)
    adopted = await supervisor.open(exits.append)
    return supervisor, exits, adopted


@pytest.mark.parametrize(
    ("script", "exit_code", "number"),
    [("exit 0", 0, None), ("exit 75", 75, None), ("kill -SEGV $$", None, signal.SIGSEGV)],
)
async def test_exit_is_told(
    tmp_path: Path, script: str, exit_code: int | None, number: int | None
) -> None:
    supervisor, exits, adopted = await opened(tmp_path)
    assert adopted == ()
    assert await supervisor.start(bash(script)) > 0
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", exit_code, number)]
    await supervisor.close()


async def test_trainer_gets_exactly_what_the_launch_says(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    odd = "two\nlines \udcff 'quotes' \u00e4"
    launch = Launch(
        "1.1",
        ("python3", "-c", "import os,sys; print(ascii((sys.argv[1], dict(os.environ), os.getcwd()"
         ", os.getsid(0) == os.getpid(), sorted(os.listdir('/proc/self/fd'))[:-1])))", odd),
        (PATH, ("LC_ALL", "C.UTF-8"), ("ODD", odd), ("EMPTY", "")),
        str(tmp_path),
    )  # fmt: skip
    await supervisor.start(launch)
    await until(lambda: exits)
    (segment,) = records.segments(supervisor.attempt_directory("1.1"))
    environment = dict(launch.environment)
    seen = (odd, environment, str(tmp_path), True, ["0", "1", "2"])
    assert segment[1].read_text().strip() == ascii(seen)
    await supervisor.close()


async def test_state_is_private(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path / "state")
    await supervisor.start(bash("echo secret"))
    await until(lambda: exits)
    for path in (tmp_path / "state").rglob("*"):
        allowed = 0o700 if path.is_dir() else 0o600
        if path.suffix != ".pyc":
            assert stat.S_IMODE(path.stat().st_mode) == allowed, path
    await supervisor.close()


async def test_starting_twice_is_starting_once(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    launch = bash('echo run >> "$1"; sleep 600', str(tmp_path / "runs"))
    pids = await asyncio.gather(*(supervisor.start(launch) for _ in range(3)))
    assert await supervisor.start(launch) == pids[0]
    assert len(set(pids)) == 1
    runs = tmp_path / "runs"
    await until(lambda: runs.exists() and runs.read_text())
    supervisor.kill("1.1")
    await until(lambda: exits)
    assert await supervisor.start(launch) == pids[0]  # ended, but not settled
    supervisor.forget("1.1")
    with pytest.raises(StartError, match=r"attempt 1\.1 has already run"):
        await supervisor.start(launch)
    assert runs.read_text() == "run\n"
    assert len(exits) == 1
    await supervisor.close()


async def test_failures_to_start_are_sentences(tmp_path: Path) -> None:
    before = zombies()
    supervisor, exits, _ = await opened(tmp_path / "state")
    plain, orphan, headless = (tmp_path / name for name in ("plain", "orphan", "headless"))
    plain.write_text("not a program\n")
    orphan.write_text("#!/no/such/interpreter\n")
    headless.write_text("echo hello\n")
    for script in (orphan, headless):
        script.chmod(0o755)
    path = ("PATH", f"{PATH[1]}:{tmp_path}")
    cases = [
        (("train-nowhere",), "/", "no such file: train-nowhere (looked in PATH=/usr/local/bin"),
        (("group",), "/etc", f"no such file: group (looked in PATH={path[1]}; there is ./group)"),
        (("/no/such/train",), "/", "no such file: /no/such/train"),
        ((str(plain),), "/", f"not executable: {plain}"),
        (("orphan",), "/", f"not executable: {orphan} (the interpreter"),
        ((str(headless),), "/", f"not executable: {headless} (neither a program"),
        (("true",), "/no/such/directory", "no such directory: /no/such/directory"),
        (("true",), str(plain), f"not a directory: {plain}"),
        (("true", "x" * 3_000_000), "/", "cannot start true: Argument list too long"),
        ((), "/", "the command is empty"),
        (("true",), "relative", "the working directory must be an absolute path"),
        (("tr\0ue",), "/", "the command or its working directory contains a NUL byte"),
    ]
    for number, (arguments, directory, sentence) in enumerate(cases, 1):
        launch = Launch(f"1.{number}", arguments, (path,), directory)
        for _ in range(2):  # the second call is told the same
            with pytest.raises(StartError) as caught:
                await supervisor.start(launch)
            assert str(caught.value).startswith(sentence)
        supervisor.forget(launch.attempt_id)
    with pytest.raises(StartError, match="is no attempt id"):
        await supervisor.start(Launch("../1.1", ("true",), (PATH,), "/"))
    await supervisor.start(bash("exit 3", attempt_id="2.1"))
    await until(lambda: exits)
    assert exits == [ProcessExit("2.1", 3, None)]
    await until(lambda: zombies() <= before)
    await supervisor.close()


async def test_start_failure_while_the_agent_was_away_is_told_as_an_exit(tmp_path: Path) -> None:
    first, _, _ = await opened(tmp_path)
    with pytest.raises(StartError):
        await first.start(Launch("1.1", ("/no/such",), (PATH,), "/"))
    await until(lambda: (first.attempt_directory("1.1") / shim.EXIT_NAME).exists())
    await first.close()
    second, exits, adopted = await opened(tmp_path)
    assert adopted == ("1.1",)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, None, "no such file: /no/such")]
    with pytest.raises(StartError, match="no such file: /no/such"):
        await second.start(Launch("1.1", ("/no/such",), (PATH,), "/"))
    await second.close()


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2"])
async def test_signal_reaches_the_whole_group(tmp_path: Path, name: str) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    child = f'trap \'echo child >> "$1"; exit 0\' {name}; touch "$2"; while :; do sleep 0.01; done'
    script = (
        f"trap 'wait; echo parent >> \"$1\"; exit 75' {name};"
        f'bash -c "$3" bash "$1" "$2" & while :; do sleep 0.01; done'
    )
    out, ready = tmp_path / "out", tmp_path / "ready"
    await supervisor.start(bash(script, str(out), str(ready), child))
    await until(ready.exists)
    supervisor.signal("1.1", name)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 75, None)]
    assert sorted(out.read_text().split()) == ["child", "parent"]
    supervisor.signal("1.1", name)  # it has gone: no error
    supervisor.signal("9.9", name)
    await supervisor.close()


async def test_signal_during_the_start_is_not_lost(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    starting = asyncio.ensure_future(supervisor.start(bash("sleep 600")))
    await asyncio.sleep(0)
    supervisor.signal("1.1", "TERM")
    assert not starting.done()
    await starting
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGTERM)]
    await supervisor.close()


async def test_kill_reaches_a_daemonised_grandchild(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    file = tmp_path / "pid"
    script = 'trap "" TERM; python3 -c "$1" "$2"; while :; do sleep 0.1; done'
    trainer_pid = await supervisor.start(bash(script, DAEMON, str(file)))
    await until(file.exists)
    daemon_pid = int(file.read_text())
    assert os.getsid(daemon_pid) != os.getsid(trainer_pid)
    supervisor.kill("1.1")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGKILL)]
    assert not alive(daemon_pid)
    await supervisor.close()


async def test_what_a_trainer_leaves_behind_is_gone_before_its_exit_is_told(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    file = tmp_path / "pid"
    script = 'python3 -c "$1" "$2"; while [ ! -e "$2" ]; do sleep 0.01; done; exit 4'
    await supervisor.start(bash(script, DAEMON, str(file)))
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 4, None)]
    assert not alive(int(file.read_text()))
    await supervisor.close()


async def test_orphans_are_reaped_while_the_trainer_runs(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    script = 'for i in 1 2 3 4 5; do (true &); done; touch "$1"; sleep 600'
    trainer_pid = await supervisor.start(bash(script, str(tmp_path / "ready")))
    await until((tmp_path / "ready").exists)
    await until(lambda: records.read_started(supervisor.attempt_directory("1.1")))
    shim_pid = shim_pid_of(supervisor.attempt_directory("1.1"))

    def children() -> list[int]:
        return [p.pid for p in proc.descendants(shim_pid) if p.parent_pid == shim_pid]

    await until(lambda: children() == [trainer_pid])
    supervisor.kill("1.1")
    await until(lambda: exits)
    await supervisor.close()


async def test_shim_passes_sigterm_on(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    script = 'trap "exit 75" TERM; touch "$1"; while :; do sleep 0.01; done'
    await supervisor.start(bash(script, str(tmp_path / "ready")))
    await until((tmp_path / "ready").exists)
    await until(lambda: records.read_started(supervisor.attempt_directory("1.1")))
    os.kill(shim_pid_of(supervisor.attempt_directory("1.1")), signal.SIGTERM)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 75, None)]
    await supervisor.close()


async def test_killed_shim_takes_its_trainer_and_daemons_along(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path)
    file = tmp_path / "pid"
    script = 'python3 -c "$1" "$2"; while :; do sleep 0.1; done'
    base = bash(script, DAEMON, str(file))
    token = ("BATON_TOKEN", f"unique-{tmp_path}")
    launch = Launch("1.1", base.arguments, (PATH, token), "/")
    trainer_pid = await supervisor.start(launch)
    await until(file.exists)
    await until(lambda: records.read_started(supervisor.attempt_directory("1.1")))
    os.kill(shim_pid_of(supervisor.attempt_directory("1.1")), signal.SIGKILL)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, None, SUPERVISOR_GONE)]
    await until(lambda: not alive(trainer_pid) and not alive(int(file.read_text())))
    assert records.read_exit(supervisor.attempt_directory("1.1")) == (exits[0], 0)
    await supervisor.close()


async def test_killed_shim_takes_its_trainer_along_while_no_agent_runs(tmp_path: Path) -> None:
    supervisor, _, _ = await opened(tmp_path)
    trainer_pid = await supervisor.start(bash("exec sleep 600"))
    directory = supervisor.attempt_directory("1.1")
    await until(lambda: records.read_started(directory))
    await supervisor.close()
    os.kill(shim_pid_of(directory), signal.SIGKILL)
    await until(lambda: not alive(trainer_pid))
    supervisor, exits, _ = await opened(tmp_path)
    await until(exits.__len__)
    assert exits == [ProcessExit("1.1", None, None, SUPERVISOR_GONE)]
    await supervisor.close()


async def test_adoption_by_a_new_supervisor(tmp_path: Path) -> None:
    first, first_exits, _ = await opened(tmp_path)
    script = 'trap "exit 85" TERM; touch "$1"; while :; do sleep 0.01; done'
    launch = bash(script, str(tmp_path / "ready"))
    pid = await first.start(launch)
    await until((tmp_path / "ready").exists)
    await first.close()
    assert alive(pid)
    second, exits, adopted = await opened(tmp_path)
    assert adopted == ("1.1",)
    assert await second.start(launch) == pid
    with pytest.raises(ValueError, match="still runs"):
        second.forget("1.1")
    second.signal("1.1", "TERM")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", 85, None)]
    assert first_exits == []
    await second.close()


async def test_adopted_trainer_that_is_no_child_of_this_process(tmp_path: Path) -> None:
    """The usual case after an agent's restart: wait(2) knows nothing, the pidfd does."""
    program = (
        "import asyncio, pathlib, sys\n"
        "from agent.core.values import Launch\n"
        "from agent.processes.supervisor import Supervisor\n"
        "async def main():\n"
        "    supervisor = Supervisor(pathlib.Path(sys.argv[1]))\n"
        "    await supervisor.open(lambda ended: None)\n"
        "    await supervisor.start(Launch('1.1', ('/bin/sleep', '600'), (), '/'))\n"
        "asyncio.run(main())\n"
    )
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), cwd=Path(__file__).parents[2]
    )
    assert await agent.wait() == 0  # gone at once: perhaps before `started.json` was written
    supervisor, exits, adopted = await opened(tmp_path)
    assert adopted == ("1.1",)
    supervisor.kill("1.1")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGKILL)]
    await supervisor.close()


async def test_exit_while_away_is_told_once_and_until_forgotten(tmp_path: Path) -> None:
    first, first_exits, _ = await opened(tmp_path)
    await first.start(bash('read -r < "$1"; exit 7', str(fifo(tmp_path))))
    directory = first.attempt_directory("1.1")
    await first.close()
    with (tmp_path / "fifo").open("w") as gate:
        gate.write("go\n")
    await until((directory / shim.EXIT_NAME).exists)
    for _ in range(2):
        supervisor, exits, adopted = await opened(tmp_path)
        assert adopted == ("1.1",)
        assert exits == []  # told after `open` has returned, so that the caller knows the id
        await until(exits.__len__)
        assert exits == [ProcessExit("1.1", 7, None)]
        last = supervisor
    last.forget("1.1")
    last.forget("1.1")
    await last.close()
    last, exits, adopted = await opened(tmp_path)
    assert adopted == ()
    await asyncio.sleep(0)
    assert exits == first_exits == []
    await last.close()


def fifo(directory: Path) -> Path:
    os.mkfifo(directory / "fifo")
    return directory / "fifo"


async def test_reboot_and_reused_pid_are_seen(tmp_path: Path) -> None:
    first, _, _ = await opened(tmp_path)
    for attempt_id in ("1.1", "1.2"):
        await first.start(bash("sleep 600", attempt_id=attempt_id))
        await until(partial(records.read_started, first.attempt_directory(attempt_id)))
    directories = [first.attempt_directory(attempt_id) for attempt_id in ("1.1", "1.2")]
    await first.close()
    for directory in directories:  # real ones go first: from here on the records are a lie
        os.kill(shim_pid_of(directory), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # a forked one is the kernel's to reap
            os.waitpid(shim_pid_of(directory), 0)  # noqa: ASYNC222 - it has just been killed
        await until(partial(lambda pid: not alive(pid), shim_pid_of(directory)))
    for directory, field, value in [
        (directories[0], "boot_id", "another boot"),
        (directories[1], "shim_pid", os.getpid()),  # alive, with another start time
    ]:
        record = json.loads((directory / shim.STARTED_NAME).read_text())
        record[field] = value
        (directory / shim.STARTED_NAME).write_text(json.dumps(record))
    never = tmp_path / "attempts" / "1.3"
    records.write_launch(never, bash("true", attempt_id="1.3"))
    (tmp_path / "attempts" / "1.4").mkdir()  # the agent died before it had written anything
    second, exits, adopted = await opened(tmp_path)
    assert adopted == ("1.1", "1.2", "1.3")
    await until(lambda: len(exits) == 3)
    assert exits == [
        ProcessExit("1.1", None, None, REBOOTED),
        ProcessExit("1.2", None, None, SUPERVISOR_GONE),
        ProcessExit("1.3", None, None, NEVER_STARTED),
    ]
    assert not (tmp_path / "attempts" / "1.4").exists()
    await second.close()


async def test_many_exits_are_each_told_once_and_no_zombie_stays(tmp_path: Path) -> None:
    before = zombies()
    supervisor, exits, _ = await opened(tmp_path)
    for number in range(20):
        await supervisor.start(bash(f"exit {number}", attempt_id=f"1.1.{number}"))
    await until(lambda: len(exits) == 20)
    told = sorted(exits, key=lambda ended: ended.exit_code or 0)
    assert told == [ProcessExit(f"1.1.{number}", number, None) for number in range(20)]
    assert zombies() <= before
    await supervisor.close()


async def test_oldest_settled_logs_make_room(tmp_path: Path) -> None:
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tmp_path, log_bytes_max=2_500)
    await supervisor.open(exits.append)
    for count, attempt in enumerate(("1.1", "4.1", "3.1", "2.1"), 1):
        await supervisor.start(bash("head -c 1000 /dev/zero", attempt_id=attempt))
        await until(partial(has_length, exits, count))
        supervisor.forget(attempt)
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == ["2.1", "3.1"]
    await supervisor.close()
    # the clock was a day ahead, and has been set right since
    ahead_s = time.time() + 86_400
    os.utime(tmp_path / "attempts/3.1" / shim.EXIT_NAME, (ahead_s, ahead_s))
    smaller = Supervisor(tmp_path, log_bytes_max=1_500)
    await smaller.open(exits.append)
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["2.1"]
    await smaller.close()


async def test_running_logs_count_and_are_not_touched(tmp_path: Path) -> None:
    exits: list[ProcessExit] = []
    supervisor = Supervisor(tmp_path, log_bytes_max=2_500)
    await supervisor.open(exits.append)
    for number in (1, 2):
        await supervisor.start(bash("head -c 1000 /dev/zero", attempt_id=f"1.{number}"))
        await until(partial(has_length, exits, number))
        supervisor.forget(f"1.{number}")
    await supervisor.start(bash("head -c 3000 /dev/zero; exec sleep 600", attempt_id="2.1"))
    running = tmp_path / "attempts/2.1"
    await until(lambda: records.log_bytes(running) == 3_000)
    await supervisor.start(bash("exit 0", attempt_id="3.1"))
    await until(partial(has_length, exits, 3))
    supervisor.forget("3.1")
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["2.1"]
    assert records.log_bytes(running) == 3_000
    supervisor.kill("2.1")
    await until(partial(has_length, exits, 4))
    await supervisor.close()
