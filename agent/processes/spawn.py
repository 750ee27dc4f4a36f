"""Starts a shim as a program of its own, where no fork server is ready.

Problem: what a child of the agent inherits by accident (descriptors, signals, variables) outlives
the agent with the trainer. posix_spawn(3) says all of it in one call, and costs no copy of the
agent's memory.
"""

import importlib.util
import marshal
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from agent.processes import shim, shim_output, shim_program
from agent.processes.shim_program import HEADER_BYTES

if TYPE_CHECKING:
    from importlib.abc import InspectLoader

# The one below a virtual environment, which the shim has no use for and would look through.
INTERPRETER = os.path.realpath(sys.executable)


def write_program(program: Path) -> None:
    """The shim, compiled, where every start finds it: each would compile it again, for half as long
    as the rest takes. Nor is it compiled here: it has been for the import, and the compiler's
    memory, 1.5 MiB, would stay ours. Raises OSError."""
    new = program.with_suffix(".new")
    # A .pyc that is executed by path is taken as it is; its source is not looked for.
    header = importlib.util.MAGIC_NUMBER + bytes(HEADER_BYTES - len(importlib.util.MAGIC_NUMBER))
    new.write_bytes(header + b"".join(map(_compiled, (shim_program, shim_output, shim))))
    new.replace(program)


def _compiled(module: ModuleType) -> bytes:
    loader = cast("InspectLoader", module.__spec__.loader)  # type: ignore[union-attr]
    return marshal.dumps(loader.get_code(module.__name__))  # there may be no source


def spawn_shim(program: Path, directory: Path, status_fd: int) -> int:
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
        INTERPRETER,
        [INTERPRETER, "-I", "-S", str(program), str(directory)],
        kept,
        file_actions=file_actions,
        setsid=True,
        setsigmask=[],
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )
