"""Starts a shim as a program of its own, where no fork server is ready.

Problem: what a child of the agent inherits by accident (descriptors, signals, variables) outlives
the agent with the trainer. posix_spawn(3) says all of it in one call, and costs no copy of the
agent's memory.
"""

import os
import signal
from pathlib import Path

from agent.processes import shim


def spawn_shim(interpreter: str, program: Path, directory: Path, status_fd: int) -> int:
    """Returns its pid. Raises OSError."""
    errors = str(directory / "shim.err")
    file_actions = [
        (os.POSIX_SPAWN_DUP2, status_fd, shim.STATUS_FD),
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT, 0o600),
    ]
    # A Python that is built shared may need this one to start; nothing else is handed on.
    kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    return os.posix_spawn(
        interpreter,
        [interpreter, "-I", "-S", str(program), str(directory)],
        kept,
        file_actions=file_actions,
        setsid=True,
        setsigmask=[],
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )
