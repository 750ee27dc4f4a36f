"""Ends everything that a cluster started, also when the cluster's own process was killed.

Problem: trainers are made to outlive their agent, so a test or a demo that dies in the middle
leaves processes behind that train for nobody. Cleaning up in `finally` misses the SIGKILL of an
impatient user or of a test runner, and killing by program name hits other people's processes.

So a process belongs to a cluster by a mark that nobody else has, the path of its runtime directory:
daemons and helpers carry it as `BATON_E2E_CLUSTER`, trainers and what they start at the beginning
of `BATON_SOCKET`, and a shim is known by its command line in the cluster's state directory. And a
guardian, a process of its own session, holds the reading end of a pipe whose other end is held by
the cluster alone: when the pipe ends, however that came about, the guardian ends the rest.

    python -m tests.e2e.guardian RUNTIME_DIRECTORY STATE_DIRECTORY < pipe
"""

import os
import shutil
import sys
import threading
import time
from pathlib import Path

from agent.processes import proc

MARK = "BATON_E2E_CLUSTER"
# A killed process is gone in milliseconds; one in uninterruptible sleep waits for its disk.
END_DEADLINE_S = 20.0
POLL_S = 0.02


def owned(runtime_directory: Path, state_directory: Path) -> list[proc.Process]:
    """What carries the marks of this cluster, or, given a node's directories, of this node."""
    own = os.getpid()
    marks = (
        os.fsencode(f"{MARK}={runtime_directory}/"),
        os.fsencode(f"BATON_SOCKET={runtime_directory}/"),
    )
    within = os.fsencode(f"{state_directory}/")
    return [
        process
        for process in proc.all_processes()
        if process.pid != own and _is_marked(process.pid, marks, within)
    ]


def _is_marked(pid: int, marks: tuple[bytes, ...], within: bytes) -> bool:
    entries = proc.read_bytes(pid, "environ").split(b"\0")
    if any(entry.startswith(marks) for entry in entries):
        return True
    words = proc.read_bytes(pid, "cmdline").split(b"\0")
    shim = len(words) >= 5 and words[1:3] == [b"-I", b"-S"] and b"shim." in words[3]
    # One that was forked names its attempt's directory after the bare name of its program.
    return shim and any(word.startswith(within) for word in words[3:5])


def end(runtime_directory: Path, state_directory: Path) -> int:
    """SIGKILL them all until none is left; returns how many there were.

    Raises `TimeoutError` for what cannot be killed.
    """
    killed: set[proc.Process] = set()
    deadline_s = time.monotonic() + END_DEADLINE_S
    pause = threading.Event()
    while left := owned(runtime_directory, state_directory):
        for process in left:
            if process not in killed and proc.kill_exactly(process):
                killed.add(process)
        if time.monotonic() > deadline_s:
            numbers = ", ".join(str(process.pid) for process in left)
            raise TimeoutError(f"still there {END_DEADLINE_S:.0f} s after SIGKILL: {numbers}")
        pause.wait(POLL_S)
    return len(killed)


def main() -> int:
    """Wait for the pipe to end, then end the cluster and take its runtime directory away."""
    runtime_directory, state_directory = Path(sys.argv[1]), Path(sys.argv[2])
    while sys.stdin.buffer.read(1):
        pass
    end(runtime_directory, state_directory)
    shutil.rmtree(runtime_directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
