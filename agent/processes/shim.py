"""The supervisor of one trainer: a small program, standard library only, that outlives the agent.

Problem: who holds the output pipe, and who learns the exit status, while the agent is being
restarted or upgraded? As a child of the agent the trainer would lose both. Output straight into a
file cannot rotate under a process that knows nothing of it, and a bare process group misses the
daemons that a script leaves behind (double fork, `setsid`).

How: the agent starts it (`shim_program.py`) in a session of its own, or has it forked by a process
that has all this loaded (see `forkserver.py`).
1. The shim makes itself a child subreaper (prctl(2)): every orphan below it becomes its child,
   whatever its session.
2. It starts the trainer from `launch` in a session of its own, with PR_SET_PDEATHSIG so that it
   cannot outlive the shim, tells the agent over the status pipe, then writes `started.json`.
3. It copies the one output pipe into segments `log/<offset of the first byte>.log`, dropping bytes
   rather than ever stopping to read: a trainer must not hang on a disk (see `shim_output.py`).
4. When the trainer ends it kills what is left until wait(2) says that there are no children, then
   writes `exit.json`. One ending is different: a stop signal goes to the whole process group, and
   of `bash -c 'python train.py; exit $?'` the shell dies at once while Python is still saving its
   checkpoint. After such an end (see `stop_was_heeded`) what is left has the job's grace to end by
   itself. Nothing is polled: no children, no descendants; and each child's end is a SIGCHLD.

`launch` is separated by NUL, the only byte that execve(2) cannot carry: working directory, number
of arguments, arguments, then `NAME=value` entries. That saves the 7 ms that `json` takes to start,
as the C module below `signal` saves its enums. All is imported before the trainer starts: the
standard library on disk may be another one when it ends, days later.
"""

import os
import select
import time

TYPE_CHECKING = False  # `typing` itself would cost 5 ms
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

try:
    # the C half of it, without 4 ms of enums
    import _signal as signal  # type: ignore[import-not-found]
except ImportError:  # an interpreter that keeps it elsewhere
    import signal

if TYPE_CHECKING or __name__.startswith("agent."):
    from agent.processes.shim_output import OutputLog, Writer, record_until_done, try_record
else:  # of a shim's program, or a fork server's, which know no package of ours
    from shim_output import OutputLog, Writer, record_until_done, try_record

LAUNCH_NAME = "launch"
STARTED_NAME = "started.json"
EXIT_NAME = "exit.json"
LOG_DIRECTORY_NAME = "log"
GROUP_NAME = "cgroup"  # where there is one: the directory of the trainer's control group

STATUS_FD = 3  # the agent's end of the handshake, right after the standard three
READ_BYTES = 64 * 1024  # one full pipe, Linux's default capacity
# after the last child is gone only a stranger with our pipe can still write: 16 pipes full
DRAIN_BYTES_MAX = 1024 * 1024
LEFTOVER_RESCAN_MS = 50  # one in the middle of its last system call is looked for again
GRACE_DEFAULT_MS = 120_000  # what a job gets that asks for none
GRACE_MAX_MS = 2**31 - 1  # 24 days, the longest that poll(2) can wait

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # how jobs may be stopped
START_FAILED_STATUS = 127  # what shells use; the sentence in the error pipe is what counts


class StartFailure(Exception):
    """The trainer could not be started; the text is the sentence for the user."""


class Launch:
    """The parsed `launch` file; everything is bytes, as the kernel has it."""

    def __init__(self, data: bytes) -> None:
        directory, count, *rest = data.split(b"\0")
        self.working_directory = directory
        self.arguments = rest[: int(count)]
        self.group = b""  # see `groups.py`; empty: it has none
        self.environment: dict[bytes, bytes] = {}
        for entry in rest[int(count) :]:
            name, _, value = entry.partition(b"=")
            self.environment[name] = value

    def grace_ms(self) -> int:
        """How long what a stopped trainer leaves behind may take to end, 0 to `GRACE_MAX_MS`."""
        text = self.environment.get(b"BATON_GRACE_MS", b"")
        # `isdigit` of bytes knows ASCII only; more digits than the bound has are not looked at
        if not text.isdigit() or len(text) > len(str(GRACE_MAX_MS)):
            return GRACE_DEFAULT_MS
        return min(int(text), GRACE_MAX_MS)


class Watch:
    """The shim between start and exit record: copy output, pass SIGTERM on, reap, clear up."""

    def __init__(
        self, trainer_pid: int, output_fd: int, wake_fd: int, writer: Writer, launch: Launch
    ) -> None:
        self.trainer_pid = trainer_pid
        self.output_fd = output_fd
        self.wake_fd = wake_fd
        self.writer = writer
        self.grace_ms = launch.grace_ms()
        self.group = launch.group
        self.status: int | None = None
        self.childless = False
        # both by the monotonic clock, both of use only once there is a status
        self._grace_ends_s = 0.0
        self._next_look_s = 0.0

    def run(self) -> int:
        """Until the trainer and all it left are gone and the pipe is empty; returns its status."""
        poller = select.poll()
        poller.register(self.output_fd, select.POLLIN)
        poller.register(self.wake_fd, select.POLLIN)
        while not self.childless or self.status is None:
            for fd, _ in poller.poll(self._wait_ms()):
                if fd == self.wake_fd:
                    self._wake()
                elif self._copy() == 0:
                    poller.unregister(self.output_fd)
            # by the clock and not when all is quiet: what is left may never stop writing
            if self.status is not None and time.monotonic() >= self._next_look_s:
                self._reap()
        drained_bytes = 0
        while drained_bytes < DRAIN_BYTES_MAX and (count := self._copy()) > 0:
            drained_bytes += count
        self.writer.close()
        return self.status

    def _wait_ms(self) -> float | None:
        """How long nothing needs doing unless the kernel says so; None for ever."""
        if self.status is None:
            return None
        return max(0.0, (self._next_look_s - time.monotonic()) * 1000)

    def _copy(self) -> int:
        """Move one read from the pipe to the log: its size, 0 at the end, -1 for nothing yet."""
        try:
            data = os.read(self.output_fd, READ_BYTES)
        except BlockingIOError:
            return -1
        if data:
            self.writer.offer(data)
        return len(data)

    def _wake(self) -> None:
        numbers = os.read(self.wake_fd, 512)
        if signal.SIGTERM in numbers and self.status is None:
            # not reaped yet, so the number is still its own
            os.killpg(self.trainer_pid, signal.SIGTERM)
        self._reap()

    def _reap(self) -> None:
        while not self.childless:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.childless = True
                return
            if pid == 0:
                break
            if pid == self.trainer_pid:
                self.status = status
                left_ms = self.grace_ms if stop_was_heeded(status) else 0
                self._grace_ends_s = self._next_look_s = time.monotonic() + left_ms / 1000
        if self.status is not None and time.monotonic() >= self._grace_ends_s:
            self._kill_children()
            self._next_look_s = time.monotonic() + LEFTOVER_RESCAN_MS / 1000

    def _kill_children(self) -> None:
        """One level at a time: the children of what dies become ours, and its death wakes us. A
        group is killed at once, with what became another user."""
        tell_group(self.group, b"cgroup.kill", b"1")
        for name in os.listdir("/proc"):
            if name.isdigit() and stat_fields(int(name))[1:2] == [b"%d" % os.getpid()]:
                try:
                    # our child, not reaped: it cannot be anybody else
                    os.kill(int(name), signal.SIGKILL)
                except PermissionError:
                    continue  # it became another user (sudo); its end is waited for instead


def stop_was_heeded(status: int) -> bool:
    """Whether a wait(2) status says "ended by a stop signal", in the kernel's words or a shell's
    (128 + its number): then others in the group may still be heeding theirs.
    """
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) in STOP_SIGNALS
    return os.WEXITSTATUS(status) - 128 in STOP_SIGNALS


def stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/<pid>/stat after the command name (which may hold anything): state, ppid,
    pgrp, session...

    Index 19 is the start time in clock ticks since boot (proc(5), field 22). Empty when there is no
    such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_launch(directory: bytes) -> Launch:
    """What is to be started there. Raises OSError."""
    with open(directory + b"/" + LAUNCH_NAME.encode(), "rb") as file:
        return Launch(file.read())


def read_group(directory: bytes) -> bytes:
    """The control group that was made for this attempt's trainer; empty when there is none."""
    try:
        with open(directory + b"/" + GROUP_NAME.encode(), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def tell_group(group: bytes, name: bytes, word: bytes) -> bool:
    """Write a word to a file of a control group; False where that cannot be done, or there is
    none: then all is as without one.
    """
    if not group:
        return False
    try:
        fd = os.open(group + b"/" + name, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.write(fd, word) == len(word)
    except OSError:
        return False
    finally:
        os.close(fd)


def read_boot_id() -> str:
    """The kernel's id of this boot: a pid and a start time mean nothing after another one."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def unix_ms() -> int:
    """Wall time, for people."""
    return time.time_ns() // 1_000_000


def exit_record(
    status: int | None,
    trainer_pid: int,
    reason: str = "",
    *,
    log_bytes: int = 0,
    lost_bytes: int = 0,
) -> str:
    """The text of `exit.json`; code and signal are null when nobody saw the trainer end."""
    exit_code = signal_number = "null"
    if status is not None and os.WIFSIGNALED(status):
        signal_number = str(os.WTERMSIG(status))
    elif status is not None:
        exit_code = str(os.WEXITSTATUS(status))
    quoted = '""'
    if reason:
        import json  # only for failures to start, which are told at once

        quoted = json.dumps(reason)
    return (
        f'{{"exit_code":{exit_code},"signal":{signal_number},"reason":{quoted},"pid":{trainer_pid},'
        f'"unix_ms":{unix_ms()},"log_bytes":{log_bytes},"log_bytes_lost":{lost_bytes}}}\n'
    )


def start_trainer(
    launch: Launch, output_fd: int, libc: "ctypes.CDLL", enter: "Callable[[Launch], None]"
) -> int:
    """Fork and `enter`; returns the pid once the program runs. Raises `StartFailure`."""
    error_read, error_write = os.pipe2(os.O_CLOEXEC)
    shim_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            become_trainer(launch, output_fd, libc, shim_pid)
            enter(launch)
        except OSError as error:
            os.write(error_write, explain(error, launch).encode(errors="surrogateescape"))
        finally:
            os._exit(START_FAILED_STATUS)
    os.close(error_write)
    report = b""
    while chunk := os.read(error_read, READ_BYTES):  # ends when exec closes the other end
        report += chunk
    os.close(error_read)
    if report:
        os.waitpid(pid, 0)
        raise StartFailure(report.decode(errors="replace"))
    return pid


def become_trainer(launch: Launch, output_fd: int, libc: "ctypes.CDLL", shim_pid: int) -> None:
    """In the child: all between fork and exec. Raises OSError with the file in `filename`."""
    import ctypes  # by `hold`, before the fork

    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
        # the last two are ignored by Python, and exec keeps what is ignored
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    tell_group(launch.group, b"cgroup.procs", b"0")  # all that it will ever start is in there
    libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != shim_pid:
        os._exit(START_FAILED_STATUS)  # the shim went between fork and prctl
    os.dup2(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    os.chdir(launch.working_directory)


def execute(launch: Launch) -> None:
    """Become the program, found as a shell finds it; returns never. Raises OSError likewise."""
    program = launch.arguments[0]
    if b"/" in program:
        # no shell is the point
        os.execve(program, launch.arguments, launch.environment)  # noqa: S606
    denied: OSError | None = None
    for directory in search_path(launch).split(b":"):
        path = (directory or b".") + b"/" + program
        try:
            os.execve(path, launch.arguments, launch.environment)  # noqa: S606 - as above
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            if os.path.exists(path):  # and not its interpreter, or the right to it is missing
                denied = error  # as execvp(3): a later directory may have a usable one
    raise denied or FileNotFoundError(2, "not on the path", program)


def search_path(launch: Launch) -> bytes:
    """Where a command without a slash is looked for: the trainer's own PATH."""
    return launch.environment.get(b"PATH", os.fsencode(os.defpath))


def explain(error: OSError, launch: Launch) -> str:
    """The sentence for a failure to start."""
    subject = os.fsdecode(error.filename or b"")
    if error.filename == launch.working_directory:
        if isinstance(error, FileNotFoundError):
            return f"no such directory: {subject}"
        if isinstance(error, NotADirectoryError):
            return f"not a directory: {subject}"
        return f"cannot enter directory {subject}: {error.strerror}"
    if isinstance(error, FileNotFoundError) and b"/" not in error.filename:
        there = f"; there is ./{subject}" if os.path.exists(error.filename) else ""
        return f"no such file: {subject} (looked in PATH={os.fsdecode(search_path(launch))}{there})"
    if isinstance(error, FileNotFoundError) and os.path.exists(error.filename):
        return f"not executable: {subject} (the interpreter of its first line does not exist)"
    if isinstance(error, FileNotFoundError):
        return f"no such file: {subject}"
    if isinstance(error, PermissionError):
        return f"not executable: {subject}"
    if error.strerror == os.strerror(8):  # ENOEXEC
        return f"not executable: {subject} (neither a program nor a script that begins with #!)"
    return f"cannot start {os.fsdecode(launch.arguments[0])}: {error.strerror}"


def tell_agent(line: str) -> None:
    """One line on the status pipe. An agent that has gone reads the records instead."""
    try:
        os.write(STATUS_FD, line.encode(errors="replace"))
    except OSError:
        return


def accompany(shim_pid: int) -> None:
    """Pass SIGTERM on to a shim that somebody else has forked, until it has ended."""
    try:
        shim_fd = os.pidfd_open(shim_pid)
    except ProcessLookupError:
        return
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    poller = select.poll()
    poller.register(shim_fd, select.POLLIN)
    poller.register(wake_read, select.POLLIN)
    while shim_fd not in (ready := [fd for fd, _ in poller.poll()]):
        if wake_read in ready and signal.SIGTERM in os.read(wake_read, 512):
            try:
                signal.pidfd_send_signal(shim_fd, signal.SIGTERM)
            except ProcessLookupError:
                return


def hold(directory: bytes, enter: "Callable[[Launch], None]" = execute) -> None:
    """Hold one trainer from start to exit record. `enter` makes a forked child the trainer."""
    import ctypes  # only where something is held: the agent shares this file, and has no use for it

    if os.getsid(0) != os.getpid():
        os.setsid()
    # whatever a library in the agent let through
    os.closerange(STATUS_FD + 1, os.sysconf("SC_OPEN_MAX"))
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    libc.prctl(PR_SET_NAME, b"baton-shim")
    # Should the status pipe be missing, its number must not go to a file of ours.
    if not os.path.exists(f"/proc/self/fd/{STATUS_FD}"):
        os.dup2(2, STATUS_FD)
    os.set_inheritable(STATUS_FD, False)
    shim_ticks = stat_fields(os.getpid())[19].decode()
    tell_agent(f"shim {os.getpid()} {shim_ticks}\n")
    # Who gives an unheard shim up takes `launch` away, or writes the end, and then reads the pipe:
    # so it either knows of us, or there is nothing here for us to start.
    if os.path.exists(directory + b"/" + EXIT_NAME.encode()):
        return
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: None)  # the wake-up pipe carries the number
    launch = read_launch(directory)
    launch.group = read_group(directory)
    output_read, output_write = os.pipe2(os.O_CLOEXEC)
    try:
        trainer_pid = start_trainer(launch, output_write, libc, enter)
    except StartFailure as failure:
        reason = str(failure)
        tell_agent(f"failed {reason}\n")
        os.close(STATUS_FD)
        record_until_done(directory, EXIT_NAME, exit_record(None, 0, reason))
        return
    trainer_ticks = stat_fields(trainer_pid)[19].decode()
    tell_agent(f"started {trainer_pid} {trainer_ticks}\n")
    os.close(STATUS_FD)
    os.close(output_write)
    os.set_blocking(output_read, False)
    started_record = (
        f'{{"pid":{trainer_pid},"start_ticks":{trainer_ticks},"shim_pid":{os.getpid()},'
        f'"shim_start_ticks":{shim_ticks},"boot_id":"{read_boot_id()}","unix_ms":{unix_ms()}}}\n'
    )
    log = OutputLog(directory + b"/" + LOG_DIRECTORY_NAME.encode())
    writer = Writer(log, lambda: try_record(directory, STARTED_NAME, started_record))
    watch = Watch(trainer_pid, output_read, wake_read, writer, launch)
    status = watch.run()
    text = exit_record(status, trainer_pid, log_bytes=log.offset, lost_bytes=log.lost_bytes_total)
    record_until_done(directory, EXIT_NAME, text)
