"""Training steps compiled by ``torch.compile``, and what an exact resume asks of them.

Problem: compiled steps are faster, but a wrapped model has other names in its state dict
(``_orig_mod.``), compiling takes minutes in the middle of a step, and compiled arithmetic rounds
differently.

So the model is compiled in place, which leaves its names, its class and its checkpoints as they
are. The step that compiles is announced as the section ``compile``, so that nobody takes it for a
step that hangs. The compiler is part of the fingerprint that decides how exact a resume is
(``exactness``). Evaluations run as they are written: they are a small part of the time, and would
be compiled again for each of their shapes.

Shapes are fixed (``dynamic=False``): a step has two at most, the pieces and a last smaller one
(``microbatch``), and kernels for exactly these are the fast ones. When pieces get smaller all that
was compiled is forgotten, since torch stops compiling after so many shapes, and a resumed process
that begins with the smaller ones would then compute something else.

Where there is no compiler the training goes on without: a handoff to such a node is no failure.

What was compiled does not travel with a checkpoint. torch has a form for it
(``torch.compiler.save_cache_artifacts``), but that is pickles and machine code, which a node would
run unseen; a checkpoint holds data alone.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

VERSION_TIMEOUT_S = 10.0
"""For a compiler to say its version; from a cold network disk it takes a second or two."""

NO_COMPILER = (
    "'compile' is on, and there is no compiler here (a C++ compiler on PATH or in CXX; on a GPU"
    " Triton, a C compiler and Python's headers, of python3-dev): training goes on without"
)


class Compiling:
    """Of one training. ``wanted``: by its configuration. Until ``open`` nothing is compiled."""

    def __init__(self, model: torch.nn.Module, *, wanted: bool) -> None:
        self.compiler = ""
        """What compiles; empty where nothing is compiled."""

        self._model = model
        self._wanted = wanted
        self._ahead = False

    def open(self, device: torch.device, emit: Callable[..., None]) -> None:
        """The model is where it will be trained, and compiles itself in the next step."""
        if not self._wanted:
            return
        self.compiler = found(device)
        if not self.compiler:
            emit("warning", message=NO_COMPILER)
            return
        self._model.compile(dynamic=False)
        self._ahead = True

    def section(self) -> str:
        """What the step that begins now is to the agent."""
        ahead, self._ahead = self._ahead, False
        return "compile" if ahead else "step"

    def again(self, model: torch.nn.Module) -> bool:
        """From here on pieces have another shape. Whether that is compiled anew."""
        if not self.compiler:
            return False
        torch.compiler.reset()
        self.follow(model)
        self._ahead = False  # it is announced for the step that is taken again
        return True

    def follow(self, model: torch.nn.Module) -> None:
        """Several ranks that ran out of memory go on with another model, which is compiled too."""
        if self.compiler and model is not self._model:
            self._model = model
            self._model.compile(dynamic=False)
            self._ahead = True

    def paused(self) -> AbstractContextManager[object]:
        """Inside, the model computes as it is written, and nothing is compiled or forgotten."""
        if not self.compiler:
            return contextlib.nullcontext()
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance


def found(device: torch.device) -> str:
    """The compiler for this device by name and version, as far as they may decide bits; empty for
    none."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return ""
        # Triton compiles a launcher, a module of Python's, for each kernel.
        launcher = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        return f"triton {importlib.metadata.version('triton')}" if launcher and headers else ""
    return version_of(os.environ.get("CXX", "g++"))


@functools.cache
def version_of(program: str) -> str:
    """The first line of what it says of itself; empty where it cannot be run."""
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.partition("\n")[0].strip() if said.returncode == 0 else ""
