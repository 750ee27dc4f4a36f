"""The agent's side of its trainers: start, adopt, signal, kill, and tell each exit once.

Problem: an agent that is restarted finds processes that are no children of its own, so wait(2)
tells it nothing, and a pid from a file may belong to a stranger by now. A trainer may also have
ended, or the box rebooted, in the meantime.

How: every trainer has a shim (see `shim.py`), and the attempt's directory says who that is: pid,
start time, boot. A pidfd of the shim, checked against those, becomes readable when it ends, child
or not (pidfd_open(2)); then `exit.json` says how. A shim that left no record was killed, or the box
went down: the agent writes that record itself, after killing what remains of the attempt. A
directory with `launch` is an attempt whose exit is not settled; `forget` takes that file away and
leaves the log, until newer logs push it out.

Starting is one datagram to a process that forks the shim (`forks.py`), or, where none is ready, one
posix_spawn(3); what comes of it is told in lines over a pipe. Nothing is polled.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from agent.core.ids import find_attempt_id
from agent.core.values import Launch, ProcessesStuck, ProcessExit
from agent.ports import StartError
from agent.processes import proc, records, remains, shim, stacks, unkillable
from agent.processes.again import Again
from agent.processes.attempt import Attempt
from agent.processes.endings import NEVER_STARTED, REBOOTED, SUPERVISOR_GONE, Endings
from agent.processes.forks import ForkServers
from agent.processes.groups import Groups
from agent.processes.retention import LOG_BYTES_MAX, Retention
from agent.processes.spawn import spawn_shim, write_program
from agent.processes.units import Units, is_unit

# a network file system may be slow to hand out a program; a start order is not kept for longer
START_TIMEOUT_S = 60.0
# a fork and a line; a server that takes longer is replaced, and the start goes the slow way
FORK_TIMEOUT_S = 5.0
# only after an agent died between a start and its record: a few milliseconds' window
STARTED_RECORD_POLL_S = 0.05
STATUS_BYTES_MAX = 64 * 1024  # a sentence with a path and a PATH in it: far below

SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2}

log = structlog.get_logger()


class Supervisor:
    """Implements the `Processes` port over the directories `<state>/attempts/<attempt id>/`."""

    def __init__(
        self,
        state_directory: Path,
        *,
        log_bytes_max: int = LOG_BYTES_MAX,
        forks: ForkServers | None = None,
        units: Units | None = None,
        groups: Groups | None = None,
    ) -> None:
        self._state = state_directory
        self._groups = groups or Groups(None)
        self._forks, self._units = forks, units
        self._attempts: dict[str, Attempt] = {}
        self._again = Again()
        self._endings = Endings(self._groups, units, self._again)
        self._retention = Retention(
            self._root,
            lambda: (attempt.directory for attempt in self._attempts.values()),
            log_bytes_max=log_bytes_max,
        )
        self._leaving: set[Attempt] = set()  # forgotten, but the shim is yet to be reaped
        self._on_exit: Callable[[ProcessExit], None] = lambda _: None
        self._on_stuck: Callable[[ProcessesStuck], None] = lambda _: None

    async def open(
        self,
        on_exit: Callable[[ProcessExit], None],
        on_stuck: Callable[[ProcessesStuck], None] = lambda _: None,
    ) -> tuple[str, ...]:
        """Adopt every unsettled attempt; returns their ids. Exits that happened meanwhile are told
        after this returns. Raises OSError when the state directory cannot be used."""
        self._on_exit, self._on_stuck = on_exit, on_stuck
        self._groups.on_stuck = on_stuck
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (self._state, self._root):
            directory.chmod(0o700)
        write_program(self._program)
        self._program.chmod(0o600)
        settled: list[Path] = []
        for directory in sorted(self._root.iterdir()):
            if (directory / shim.LAUNCH_NAME).exists():
                self._adopt(directory)
            elif (directory / shim.EXIT_NAME).exists():
                settled.append(directory)
            else:
                shutil.rmtree(directory)  # the agent died before it had written the order to start
        self._retention.open(settled)
        self._groups.sweep(self._attempts)
        if self._units:
            await self._units.open(self._state, self._attempts)
        return tuple(self._attempts)

    async def start(self, launch: Launch) -> int:
        """Start a trainer and return its pid as soon as its program runs; a second call returns the
        same pid.

        Raises `StartError`, also for an attempt that has run here before and is settled. A failure
        to start is told by that error only, not by `on_exit`, unless the agent went away before it
        could be."""
        attempt = self._attempts.get(launch.attempt_id) or self._spawn(launch)
        attempt.starters += 1
        try:
            pid = await asyncio.shield(attempt.starting)
            # it never ran; the agent before this one saw
            if pid == 0 and attempt.ended is not None:
                raise StartError(attempt.ended.reason)
            return pid
        finally:
            attempt.starters -= 1
            if attempt.ended is not None:
                asyncio.get_running_loop().call_soon(self._tell, attempt)

    def age_ms(self, attempt_id: str) -> int:
        """How long ago the program of an attempt that was started began, at least."""
        attempt = self._attempts.get(attempt_id)
        return proc.age_ms(attempt.start_ticks) if attempt and attempt.start_ticks else 0

    def signal(self, attempt_id: str, signal_name: str) -> None:
        """Send TERM, USR1 or USR2 to the trainer's whole process group; one that has gone is no
        error."""
        number = SIGNALS[signal_name]
        attempt = self._attempts.get(attempt_id)
        if attempt is None or attempt.ended is not None:
            return
        if not attempt.starting.done():
            attempt.starting.add_done_callback(lambda _: self.signal(attempt_id, signal_name))
        else:
            doing = f"sending SIG{signal_name} to"
            self._again.until_done(attempt_id, doing, partial(_signal, attempt, number))

    def dump_stacks(self, attempt_id: str, nccl_pipes: str) -> None:
        """Ask for stacks, and the flight recorder's dump; a process that has gone is no error."""
        attempt = self._attempts.get(attempt_id)

        def ask() -> None:
            if attempt is not None and attempt.ended is None and attempt.shim_pid:
                asked = stacks.ask(proc.descendants(attempt.shim_pid))
                pipes = stacks.trigger(nccl_pipes) if nccl_pipes else 0
                log.info(
                    "process.stacks_asked", attempt=attempt_id, processes=asked, nccl_pipes=pipes
                )

        self._again.until_done(attempt_id, "asking for the stacks of", ask)

    def kill(self, attempt_id: str) -> None:
        """SIGKILL all that the attempt ever started, daemons too; its exit is told as any other."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None or attempt.ended is not None:
            return
        if not attempt.starting.done():
            attempt.starting.add_done_callback(lambda _: self.kill(attempt_id))
        else:
            self._again.until_done(attempt_id, "killing", partial(self._kill, attempt))

    def _kill(self, attempt: Attempt) -> None:
        _signal(attempt, signal.SIGKILL)
        self._groups.kill(attempt.directory)
        if attempt.shim_fd >= 0:  # else nobody is below it, and its number may be another's by now
            remains.kill_all(lambda: proc.descendants(attempt.shim_pid))
            unkillable.watch(
                attempt.id, attempt.shim_pid, lambda: attempt.ended is not None, self._on_stuck
            )

    def forget(self, attempt_id: str) -> None:
        """The exit is settled: what is left is `exit.json` and the log, until newer ones push it
        out. Raises ValueError for an attempt that still runs: that is the caller's bug."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            return
        if attempt.ended is None and not attempt.start_failed:
            raise ValueError(f"attempt {attempt_id} still runs")
        del self._attempts[attempt_id]
        if attempt.shim_fd >= 0:  # it failed to start, and its shim is still writing that down
            self._leaving.add(attempt)
        self._again.until_done(attempt_id, "clearing up after", partial(self._settled, attempt))

    def _settled(self, attempt: Attempt) -> None:
        # `launch` last: without it the attempt is settled
        for name in (shim.STARTED_NAME, shim.LAUNCH_NAME):
            (attempt.directory / name).unlink(missing_ok=True)
        self._retention.add(attempt.directory)

    async def close(self) -> None:
        """Let go of every trainer without touching it; a supervisor opened later adopts them."""
        self._again.close()
        self._retention.close()
        self._groups.close()
        if self._units:
            self._units.close()
        for attempt in (*self._attempts.values(), *self._leaving):
            self._let_go(attempt)
            attempt.starting.cancel()
        self._attempts.clear()
        self._leaving.clear()

    def attempt_directory(self, attempt_id: str) -> Path:
        """Where an attempt's log and records lie, for `logs.py`. Raises ValueError for what is no
        attempt id."""
        if find_attempt_id(attempt_id) is None:
            raise ValueError(f"{attempt_id!r} is no attempt id")
        return self._root / attempt_id

    @property
    def _root(self) -> Path:
        return self._state / "attempts"

    @property
    def _program(self) -> Path:
        return self._state / f"shim.{sys.implementation.cache_tag}.pyc"

    def _spawn(self, launch: Launch) -> Attempt:
        """Start a shim for a new attempt. Raises `StartError`."""
        if refusal := records.refuse_launch(launch):
            raise StartError(refusal)
        directory = self._root / launch.attempt_id
        if directory.exists():
            raise StartError(f"attempt {launch.attempt_id} has already run on this node")
        loop = asyncio.get_running_loop()
        attempt = Attempt(directory, loop.create_future())
        try:
            records.write_launch(directory, launch)
            self._groups.make(directory)
            self._start_shim(attempt, launch)
        except OSError as error:
            with contextlib.suppress(OSError):  # nothing is in it, and the next agent looks, too
                self._groups.clear(directory, lambda: None)
            shutil.rmtree(directory, ignore_errors=True)
            why = records.in_words(error)
            raise StartError(f"cannot start {directory.name}: {why}", permanent=False) from error
        self._attempts[launch.attempt_id] = attempt
        give_up = partial(self._give_up, attempt)
        attempt.timer = loop.call_later(
            START_TIMEOUT_S, self._again.until_done, attempt.id, "giving up the start of", give_up
        )
        return attempt

    def _start_shim(self, attempt: Attempt, launch: Launch | None = None) -> None:
        """By a fork server, given a launch to show it, or as a program. Raises OSError."""
        if launch and self._units:
            attempt.is_unit = True
            attempt.status_fd = self._units.open_status(attempt.directory)
            asyncio.get_running_loop().add_reader(attempt.status_fd, self._on_status, attempt)
            self._units.start(launch, attempt.directory, partial(self._unit_refused, attempt))
            return
        status_read, status_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            attempt.server = 0
            if launch and self._forks:
                attempt.server = self._forks.ask(launch, attempt.directory, status_write)
            if attempt.server:
                asyncio.get_running_loop().call_later(FORK_TIMEOUT_S, self._hurry, attempt)
            else:
                attempt.shim_pid = spawn_shim(self._program, attempt.directory, status_write)
                attempt.shim_fd = _pidfd_of_child(attempt.shim_pid)
                self._watch(attempt)
        except OSError:
            os.close(status_read)
            raise
        finally:
            os.close(status_write)
        attempt.status_fd = status_read
        asyncio.get_running_loop().add_reader(status_read, self._on_status, attempt)

    def _on_status(self, attempt: Attempt) -> None:
        try:
            self._read_status(attempt)
        except OSError as error:
            loop = asyncio.get_running_loop()
            loop.remove_reader(attempt.status_fd)

            def read_on() -> None:
                if attempt.status_fd >= 0:
                    loop.add_reader(attempt.status_fd, self._on_status, attempt)

            self._again.later(attempt.id, "meeting the supervisor of", error, read_on)

    def _read_status(self, attempt: Attempt) -> None:
        """What the shim says: who it is, then how the start went; then the pipe ends. It ends early
        when the shim was killed, and without a word when a fork server did not come to it."""
        try:
            data = os.read(attempt.status_fd, STATUS_BYTES_MAX)
        except BlockingIOError:
            return
        attempt.said += data
        lines = attempt.said.decode(errors="replace").split("\n")
        if attempt.shim_fd < 0 and len(lines) > 1:
            self._meet(attempt, lines[0])
        if data and len(lines) < 3:
            return
        if attempt.server and len(lines) < 2:
            self._start_again(attempt)
            return
        self._stop_reading_status(attempt)
        if attempt.starting.done():
            return
        verb, _, rest = (lines[1] if len(lines) > 1 else "").partition(" ")
        if verb == "started":
            pid, ticks = rest.split()
            attempt.start_ticks = int(ticks)
            attempt.starting.set_result(int(pid))
            log.debug("process.started", attempt=attempt.id, pid=int(pid))
            if attempt.shim_fd < 0:
                self._shim_ended(attempt)  # the whole job was over before we read of its start
        else:
            reason = rest if verb in ("failed", "late") else records.shim_failure(attempt.directory)
            self._fail_start(attempt, reason, permanent=verb == "failed")

    def _meet(self, attempt: Attempt, line: str) -> None:
        """A forked shim is no child of ours: it is known by what it says of itself."""
        _, pid, ticks = line.split()
        attempt.shim_pid = int(pid)
        shim_fd = proc.open_pidfd(attempt.shim_pid, int(ticks))
        if shim_fd is not None:  # else it has ended already, and the pipe says how
            attempt.shim_fd = shim_fd
            self._watch(attempt)

    def _hurry(self, attempt: Attempt) -> None:
        """Nobody has answered yet: the end of the server that was asked is an answer too."""
        if self._forks and attempt.server and attempt.status_fd >= 0 and not attempt.said:
            self._forks.end(attempt.server)

    def _start_again(self, attempt: Attempt) -> None:
        """The fork server ended with our request unheard; nothing was started."""
        asyncio.get_running_loop().remove_reader(attempt.status_fd)
        os.close(attempt.status_fd)
        attempt.status_fd = -1
        try:
            self._start_shim(attempt)
        except OSError as error:
            self._stop_reading_status(attempt)
            self._fail_start(attempt, f"cannot start its supervisor: {records.in_words(error)}")

    def _unit_refused(self, attempt: Attempt, reason: str) -> None:
        if attempt.shim_fd < 0 and not attempt.starting.done():
            self._stop_reading_status(attempt)
            self._fail_start(attempt, f"cannot start its unit: {reason}")

    def _fail_start(self, attempt: Attempt, reason: str, *, permanent: bool = False) -> None:
        """`permanent`: the program itself cannot be started, on whatever node."""
        attempt.starting.set_exception(StartError(reason, permanent=permanent))
        # a caller that was cancelled leaves it unread, which is no fault
        attempt.starting.exception()
        if attempt.shim_fd < 0:
            self._shim_ended(attempt)  # nobody is left whose end would settle it

    def _give_up(self, attempt: Attempt) -> None:
        """Too late: whatever is still on its way must start nothing."""
        if attempt.shim_fd < 0:
            # A shim names itself before it reads `launch`: so it finds none, or we hear of it here.
            (attempt.directory / shim.LAUNCH_NAME).unlink(missing_ok=True)
            attempt.server = 0
            self._read_status(attempt)
        reason = f"the program did not start within {START_TIMEOUT_S:.0f} s"
        if attempt.shim_fd >= 0:
            attempt.said = f"shim\nlate {reason}\n".encode()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(attempt.shim_fd, signal.SIGKILL)
        elif not attempt.starting.done():
            self._stop_reading_status(attempt)
            self._fail_start(attempt, reason)

    def _adopt(self, directory: Path) -> None:
        loop = asyncio.get_running_loop()
        attempt = Attempt(directory, loop.create_future(), is_unit=is_unit(directory))
        self._attempts[directory.name] = attempt
        started = records.read_started(directory)
        if started is not None and started.boot_id != shim.read_boot_id():
            self._end(attempt, REBOOTED)
            return
        if started is not None:
            attempt.shim_pid, ticks = started.shim_pid, started.shim_start_ticks
        else:
            attempt.shim_pid, ticks = remains.find_shim(directory)
        shim_fd = proc.open_pidfd(attempt.shim_pid, ticks) if attempt.shim_pid else None
        if shim_fd is None:
            self._end(attempt, SUPERVISOR_GONE if started else NEVER_STARTED)
            remains.kill_late(directory)
            return
        attempt.shim_fd = shim_fd
        self._await_record(attempt)
        self._watch(attempt)
        log.debug("process.adopted", attempt=directory.name, shim_pid=attempt.shim_pid)

    def _await_record(self, attempt: Attempt) -> None:
        """Adopted in the moment between start and `started.json`: look again until it is there or
        the shim has gone.
        """
        started = None
        with contextlib.suppress(OSError):  # it cannot be read now
            started = records.read_started(attempt.directory)
        if attempt.ended is not None:
            return
        if started is None:
            loop = asyncio.get_running_loop()
            attempt.timer = loop.call_later(STARTED_RECORD_POLL_S, self._await_record, attempt)
            return
        attempt.start_ticks = started.start_ticks
        attempt.starting.set_result(started.pid)

    def _watch(self, attempt: Attempt) -> None:
        asyncio.get_running_loop().add_reader(attempt.shim_fd, self._shim_ended, attempt)

    def _shim_ended(self, attempt: Attempt) -> None:
        if attempt.status_fd >= 0:
            self._read_status(attempt)  # the pipe has been closed, so this settles the start
        self._leaving.discard(attempt)
        if attempt.shim_pid:
            with contextlib.suppress(ChildProcessError):  # forked or adopted: not a child of ours
                os.waitpid(attempt.shim_pid, os.WNOHANG)
        if attempt.start_failed:
            self._let_go(attempt)
            self._endings.of_failed_start(attempt)
            return
        self._end(attempt, SUPERVISOR_GONE)

    def _end(self, attempt: Attempt, unseen_reason: str) -> None:
        self._let_go(attempt)
        self._endings.find(attempt, unseen_reason, partial(self._ended, attempt))

    def _ended(self, attempt: Attempt, ended: ProcessExit, pid: int) -> None:
        attempt.ended = ended
        if not attempt.starting.done():
            attempt.starting.set_result(pid)
        log.debug(
            "process.ended",
            attempt=attempt.id,
            exit_code=ended.exit_code,
            signal=ended.signal,
            reason=ended.reason,
        )
        if attempt.starters == 0:
            asyncio.get_running_loop().call_soon(self._tell, attempt)

    def _tell(self, attempt: Attempt) -> None:
        current = self._attempts.get(attempt.id)
        if current is attempt and attempt.ended is not None and not attempt.told:
            attempt.told = True
            self._on_exit(attempt.ended)

    def _stop_reading_status(self, attempt: Attempt) -> None:
        if attempt.timer is not None:
            attempt.timer.cancel()
            attempt.timer = None
        if attempt.status_fd >= 0:
            asyncio.get_running_loop().remove_reader(attempt.status_fd)
            os.close(attempt.status_fd)
            attempt.status_fd = -1

    def _let_go(self, attempt: Attempt) -> None:
        self._stop_reading_status(attempt)
        if attempt.shim_fd >= 0:
            asyncio.get_running_loop().remove_reader(attempt.shim_fd)
            os.close(attempt.shim_fd)
            attempt.shim_fd = -1


def _signal(attempt: Attempt, number: signal.Signals) -> None:
    """Raises OSError while it cannot be seen whom that would reach."""
    if (pid := attempt.running_pid()) != 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def _pidfd_of_child(pid: int) -> int:
    """Raises OSError, and has ended the child then: nobody else would know of it."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
