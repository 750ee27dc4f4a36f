"""Asks the processes of a hung attempt to say where they are.

Problem: a signal that a program does not expect ends it, and a job may be made of any programs: a
shell, data loaders, compilers. So nobody is asked who has not said that it wants to be: the SDK
sets up a handler for one real-time signal (faulthandler, which writes all threads' stacks to
standard error from within the signal handler, also when the interpreter hangs in C code), and
/proc shows which signals a process catches (SigCgt in proc_pid_status(5)). Ranks and forked workers
have the handler as well, and are asked one by one.

torch's flight recorder listens on a named pipe per rank where TORCH_NCCL_DEBUG_INFO_PIPE_FILE says
so, and dumps its collectives when anything is written into it (ProcessGroupNCCL.hpp, DumpPipe). The
pipes are the job's own, so what is written to is looked at first: a pipe of our user's, and with
somebody reading it.
"""

import asyncio
import contextlib
import glob
import os
import signal
import stat
from collections.abc import Iterable

from agent.processes import proc

# As in `baton_sdk.session`. 32 to 34 are the C library's own, TERM, USR1 and USR2 stop jobs.
DUMP_SIGNAL = signal.SIGRTMIN + 5
# They share one pipe, and faulthandler writes word by word: two at once would mix their lines.
APART_S = 0.05
PIPES_MAX = 64  # more ranks than any box has GPUs


def ask(processes: Iterable[proc.Process]) -> int:
    """Have those that can write their stacks, one after the other; returns how many."""
    willing = [process for process in processes if catches(process.pid)]
    loop = asyncio.get_running_loop()
    for index, process in enumerate(willing):
        loop.call_later(index * APART_S, _ask_one, process)
    return len(willing)


def _ask_one(process: proc.Process) -> None:
    pidfd = proc.open_pidfd(process.pid, process.start_ticks)
    if pidfd is None:
        return
    try:
        if catches(process.pid):
            signal.pidfd_send_signal(pidfd, DUMP_SIGNAL)
    except (ProcessLookupError, PermissionError):
        return  # gone, or another user's
    finally:
        os.close(pidfd)


def catches(pid: int, number: int = DUMP_SIGNAL) -> bool:
    """Whether this process has a handler for the signal."""
    for line in proc.read_bytes(pid, "status").splitlines():
        if line.startswith(b"SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def trigger(pipes: str) -> int:
    """Write into every pipe named `<pipes><rank>.pipe` that is read; returns how many."""
    written = 0
    for path in sorted(glob.glob(glob.escape(pipes) + "*.pipe"))[:PIPES_MAX]:
        with contextlib.suppress(OSError):  # gone, or nobody reads it
            found = os.lstat(path)
            if stat.S_ISFIFO(found.st_mode) and found.st_uid == os.geteuid():
                descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    os.write(descriptor, b"1")
                    written += 1
                finally:
                    os.close(descriptor)
    return written
