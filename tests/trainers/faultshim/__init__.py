"""The library that kills a process at the n-th change of a directory, built and spoken to.

`faultshim.c` explains it. Like the stand-in for NVML it is compiled once, into a directory named by
the hash of what goes into it, under a scratch name that is renamed into place. A process must be
started with it: ``LD_PRELOAD`` is read once, by the dynamic linker.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("faultshim.c")
CACHE = Path(__file__).resolve().parents[3] / "build" / "faultshim"
LIBRARY = "faultshim.so"
MOMENTS = ("before", "halfway", "after")

_COMPILE = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
_COMPILE_S_MAX = 120  # it takes about one second; a compiler that hangs must not hang the tests


def build() -> Path:
    """The library's path, compiled now if need be. Raises CalledProcessError with gcc's words."""
    recipe = "\0".join([platform.machine(), *_COMPILE]).encode()
    digest = hashlib.sha256(recipe + SOURCE.read_bytes()).hexdigest()
    library = CACHE / digest[:16] / LIBRARY
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=library.parent)
    os.close(handle)
    command = [*_COMPILE, str(SOURCE), "-o", scratch, "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S_MAX)
    os.replace(scratch, library)
    return library


def preloaded() -> bool:
    """Whether this process was started with the library."""
    return LIBRARY in os.environ.get("LD_PRELOAD", "")


def arm(root: Path, at: int, moment: str) -> None:
    """From now on count the calls that change something below ``root`` (absolute, without links),
    and die at number ``at``; 0 for never."""
    arming = ctypes.CDLL(None).faultshim_arm
    arming.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
    arming(os.fsencode(root), at, MOMENTS.index(moment))


def counted() -> int:
    """How many calls there were since ``arm``."""
    counting = ctypes.CDLL(None).faultshim_counted
    counting.restype = ctypes.c_long
    return int(counting())
