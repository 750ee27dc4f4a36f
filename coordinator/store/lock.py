"""The lock file beside a store: who has the store open, and in which boot it was used last.

Problem: two coordinators must not write one file. And whether it has to be read through after a
start (`sqlite.py`) depends on whether the kernel that was told to write it still runs, which
nothing in the file itself says.

How: flock(2), which ends with its process, on a file that holds two lines: the pid of who has it,
for people, and the id of the boot (proc_sys_kernel(5)), or that the store is yet to be checked. It
is never removed, or two processes could lock two files.
"""

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from coordinator.ports import StoreUnavailable

UNCHECKED = "unchecked"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BYTES_MAX = 64  # a pid and a boot's id, or that word, a line each
_FILE_MODE = 0o600


class Lock(NamedTuple):
    """`before`: in which boot the file was used last, or `UNCHECKED`; empty: nobody knows."""

    descriptor: int
    before: str


def take(path: Path) -> Lock:
    """It keeps what it says of the file until `note` says otherwise. Raises `StoreUnavailable` when
    another has it, and OSError."""
    lock_path = path.with_name(path.name + ".lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
    with ExitStack() as undo:
        undo.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = next(iter(_words(descriptor)), "unknown")
            raise StoreUnavailable(
                f"the database {path} is in use by another coordinator, pid {holder}:"
                " stop that one, or give this one a database of its own"
            ) from error
        # Read once it is ours: until then its holder may write there.
        lock = Lock(descriptor, next(iter(_words(descriptor)[1:]), ""))
        note(lock, lock.before)
        undo.pop_all()
    return lock


def note(lock: Lock | None, said: str) -> None:
    """Durable, since a power cut is what it is for; and cut to its length last, or a kill in
    between, or a full disk, would leave nothing of what it said."""
    if lock is not None:
        text = f"{os.getpid()}\n{said}\n".encode()
        os.pwrite(lock.descriptor, text, 0)
        os.ftruncate(lock.descriptor, len(text))
        os.fsync(lock.descriptor)


def boot_id() -> str:
    """Another one after each start of this machine; empty where the kernel does not say."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _words(descriptor: int) -> list[str]:
    return os.pread(descriptor, _BYTES_MAX, 0).decode(errors="replace").split()
