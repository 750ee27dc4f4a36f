"""What a stopped trainer leaves behind may end by itself, for as long as the job's grace.

Problem: a stop signal reaches the shell and the Python below it at once; the shell dies of it while
Python saves. Who kills what is left when the leader has gone throws that checkpoint away, and who
never kills it keeps the GPU for a daemon. Real processes show both. A save that must not end by
itself waits at a fifo that only the test opens, so nothing depends on how fast a machine is.
"""

import os
import signal
from pathlib import Path

import pytest

from agent.core.values import Launch, ProcessExit
from agent.processes import logs, records, shim
from agent.processes.endings import SUPERVISOR_GONE
from agent.processes.supervisor import Supervisor
from tests.agent.test_processes import DAEMON, PATH, alive, opened, shim_pid_of
from tests.agent.waiting import until

LONG_MS = 600_000  # reached only when the test fails
SHORT_MS = 200

# Takes a while to save after a stop signal: half a second, or until a line comes out of a fifo.
SAVER = """
import os, signal, sys, time
directory, name = sys.argv[1:]

def save(number, frame):
    print("saving", flush=True)
    with open(directory + "/half", "w") as file:
        file.write("first half, ")
        file.flush()
        if os.path.exists(directory + "/gate"):
            open(directory + "/gate").read()
        else:
            time.sleep(0.5)
        file.write("second half")
    os.rename(directory + "/half", directory + "/saved")
    print("saved", flush=True)
    os._exit(75)

signal.signal(getattr(signal, "SIG" + name), save)
with open(directory + "/pid.tmp", "w") as file:
    file.write(str(os.getpid()))
os.rename(directory + "/pid.tmp", directory + "/pid")
while True:
    time.sleep(0.01)  # not for longer: a signal just before the call does not end it
"""
# the second command keeps bash from becoming Python, as it does for scripts of one command
PLAIN = 'python3 -c "$1" "$2" "$3"; exit $?'
# a shell that waits before it obeys, as `sh` with a trap does, and says so in its own words
TRAPPED = 'trap "exit $4" $3; python3 -c "$1" "$2" "$3" & while :; do sleep 0.01; done'


def saving(
    directory: Path, name: str = "TERM", *, grace: str, script: str = PLAIN, status: int = 0
) -> Launch:
    arguments = ("bash", "-c", script, "bash", SAVER, str(directory), name, str(status))
    return Launch("1.1", arguments, (PATH, ("BATON_GRACE_MS", grace)), "/")


async def started(supervisor: Supervisor, launch: Launch, directory: Path) -> tuple[int, int]:
    """Start a shell and its saver; returns the pids of both once a stop signal would be heeded."""
    leader_pid = await supervisor.start(launch)
    await until((directory / "pid").exists)
    await until(lambda: records.read_started(supervisor.attempt_directory("1.1")))
    return leader_pid, int((directory / "pid").read_text())


async def stopped(supervisor: Supervisor, launch: Launch, directory: Path) -> int:
    """As `started`, then a TERM: the shell has gone and the saver is at work; returns its pid."""
    leader_pid, saver_pid = await started(supervisor, launch, directory)
    supervisor.signal("1.1", "TERM")
    await until(lambda: not shim.stat_fields(leader_pid))  # gone and reaped
    await until((directory / "half").exists)
    return saver_pid


def gated(directory: Path) -> Path:
    os.mkfifo(directory / "gate")
    return directory / "gate"


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2"])
async def test_save_below_a_shell_that_dies_of_the_signal_is_finished(
    tmp_path: Path, name: str
) -> None:
    supervisor, exits, _ = await opened(tmp_path / "state")
    _, saver_pid = await started(supervisor, saving(tmp_path, name, grace=str(LONG_MS)), tmp_path)
    supervisor.signal("1.1", name)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, int(getattr(signal, "SIG" + name)))]
    assert (tmp_path / "saved").read_text() == "first half, second half"  # before it was told
    assert not shim.stat_fields(saver_pid)
    log = logs.read(supervisor.attempt_directory("1.1"), 0)
    assert (log.data, log.ended) == (b"saving\nsaved\n", True)
    await supervisor.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
async def test_exit_status_of_a_shell_that_says_it_was_stopped_counts_too(
    tmp_path: Path, number: signal.Signals
) -> None:
    supervisor, exits, _ = await opened(tmp_path / "state")
    status = 128 + number
    name = number.name.removeprefix("SIG")
    launch = saving(tmp_path, name, grace="no number", script=TRAPPED, status=status)
    await started(supervisor, launch, tmp_path)
    supervisor.signal("1.1", name)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", status, None)]
    assert (tmp_path / "saved").read_text() == "first half, second half"
    await supervisor.close()


@pytest.mark.parametrize(
    ("number", "script", "ended"),
    [
        (signal.SIGKILL, PLAIN, ProcessExit("1.1", None, signal.SIGKILL)),
        (signal.SIGSEGV, PLAIN, ProcessExit("1.1", None, signal.SIGSEGV)),
        (signal.SIGTERM, TRAPPED, ProcessExit("1.1", 75, None)),
    ],
)
async def test_after_any_other_end_leftovers_are_killed_at_once(
    tmp_path: Path, number: int, script: str, ended: ProcessExit
) -> None:
    supervisor, exits, _ = await opened(tmp_path / "state")
    launch = saving(tmp_path, grace=str(LONG_MS), script=script, status=75)
    leader_pid, saver_pid = await started(supervisor, launch, tmp_path)
    os.kill(leader_pid, number)  # the shell alone: its child would wait for ever
    await until(lambda: exits)
    assert exits == [ended]
    assert not shim.stat_fields(saver_pid)
    await supervisor.close()


async def test_grace_bounds_the_wait_even_for_one_that_never_stops_writing(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path / "state")
    script = (
        '(trap "" TERM; echo $BASHPID > "$1.tmp"; mv "$1.tmp" "$1"; while :; do echo on; done) &'
        " wait"
    )
    file = tmp_path / "pid"
    environment = (PATH, ("BATON_GRACE_MS", str(SHORT_MS)))
    arguments = ("bash", "-c", script, "bash", str(file))
    await supervisor.start(Launch("1.1", arguments, environment, "/"))
    await until(file.exists)
    supervisor.signal("1.1", "TERM")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGTERM)]
    assert not alive(int(file.read_text()))
    await supervisor.close()


async def test_daemon_of_a_stopped_job_lives_no_longer_than_the_grace(tmp_path: Path) -> None:
    supervisor, exits, _ = await opened(tmp_path / "state")
    file = tmp_path / "pid"
    arguments = ("bash", "-c", 'python3 -c "$1" "$2"; exec sleep 600', "bash", DAEMON, str(file))
    environment = (PATH, ("BATON_GRACE_MS", str(SHORT_MS)))
    await supervisor.start(Launch("1.1", arguments, environment, "/"))
    await until(file.exists)
    supervisor.signal("1.1", "TERM")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGTERM)]
    assert not alive(int(file.read_text()))
    await supervisor.close()


async def test_kill_during_the_wait_ends_it(tmp_path: Path) -> None:
    gated(tmp_path)
    supervisor, exits, _ = await opened(tmp_path / "state")
    saver_pid = await stopped(supervisor, saving(tmp_path, grace=str(LONG_MS)), tmp_path)
    assert alive(saver_pid)
    assert exits == []
    supervisor.kill("1.1")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGTERM)]  # how the leader ended
    assert not alive(saver_pid)
    assert not (tmp_path / "saved").exists()
    await supervisor.close()


@pytest.mark.parametrize("killed", [False, True])
async def test_adoption_during_the_wait(tmp_path: Path, killed: bool) -> None:
    gate = gated(tmp_path)
    launch = saving(tmp_path, grace=str(LONG_MS))
    first, first_exits, _ = await opened(tmp_path / "state")
    saver_pid = await stopped(first, launch, tmp_path)
    await first.close()
    second, exits, adopted = await opened(tmp_path / "state")
    assert adopted == ("1.1",)
    assert await second.start(launch) > 0
    with pytest.raises(ValueError, match="still runs"):
        second.forget("1.1")
    second.signal("1.1", "TERM")  # what is left has heard it already
    assert alive(saver_pid)
    if killed:
        second.kill("1.1")
    else:
        gate.write_text("go on\n")
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, signal.SIGTERM)]
    assert (tmp_path / "saved").exists() is not killed
    assert not alive(saver_pid)
    assert first_exits == []
    await second.close()


async def test_killed_shim_during_the_wait_takes_the_leftovers_along(tmp_path: Path) -> None:
    gated(tmp_path)
    supervisor, exits, _ = await opened(tmp_path / "state")
    saver_pid = await stopped(supervisor, saving(tmp_path, grace=str(LONG_MS)), tmp_path)
    os.kill(shim_pid_of(supervisor.attempt_directory("1.1")), signal.SIGKILL)
    await until(lambda: exits)
    assert exits == [ProcessExit("1.1", None, None, SUPERVISOR_GONE)]
    await until(lambda: not alive(saver_pid))
    await supervisor.close()


@pytest.mark.parametrize(
    ("text", "grace_ms"),
    [
        (b"0", 0),
        (b"30000", 30_000),
        (b"9999999999", shim.GRACE_MAX_MS),
        (b"9" * 5_000, shim.GRACE_DEFAULT_MS),
        (b"-1", shim.GRACE_DEFAULT_MS),
        (b"", shim.GRACE_DEFAULT_MS),
        ("\u0663".encode(), shim.GRACE_DEFAULT_MS),
    ],
)
def test_grace_of_a_launch(text: bytes, grace_ms: int) -> None:
    assert shim.Launch(b"/\x001\0true\0BATON_GRACE_MS=" + text).grace_ms() == grace_ms
    assert shim.Launch(b"/\x001\0true").grace_ms() == shim.GRACE_DEFAULT_MS
