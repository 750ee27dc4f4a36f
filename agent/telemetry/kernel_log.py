"""Reads the kernel's log for what NVIDIA's driver says of its GPUs.

Problem: NVML tells of an error to who waits at that moment; the kernel's log keeps it, with the
text that says more than the code. But the log is a ring: it is read from its oldest record at the
start, so that an agent that was away loses no verdict, and a reader that is too slow misses records
and must hear so (EPIPE). Not every system lets everybody read it; then it is one witness less, said
once.

`/dev/kmsg` gives one record a read: `priority,sequence,microseconds since boot,flags;text`, then
lines that begin with a blank. What tests give is a pipe or a file, with any number of such lines at
once; a file cannot be waited for and is looked at again and again.

Source: Documentation/ABI/testing/dev-kmsg in the Linux kernel; NVIDIA, Xid Errors.
"""

import os
import re
import stat
import time
from dataclasses import dataclass
from typing import Final

from agent.core.values import DriverLoaded, XidSeen

READ_BYTES: Final = 16_384  # a record has at most 8 KiB
LINE_BYTES_MAX: Final = 16_384  # of a pipe; the rest of a longer line is no record
# A ring of 16 MiB has fewer; who has more sees the newest alone.
HISTORY_READS_MAX: Final = 200_000

_HEADER: Final = re.compile(rb"^\d+,(\d+),(\d+),[^;]*;")
_XID: Final = re.compile(
    r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})[^)]*\): "
    r"(\d{1,5})(?:, (.*))?$"
)
_LOADED: Final = "NVRM: loading NVIDIA"

Word = XidSeen | DriverLoaded


def parse_line(line: bytes, *, history: bool) -> Word | None:
    """What a line of the log says of GPUs; `None`: nothing."""
    if b"NVRM: " not in line:
        return None
    header = _HEADER.match(line)
    text = line[header.end() if header else 0 :].decode("utf-8", "replace").strip()
    if _LOADED in text:
        return DriverLoaded()
    found = _XID.search(text)
    if found is None:
        return None
    age_ms, sequence = 0, None
    if header is not None:
        sequence = int(header[1])
        age_ms = max(0, time.monotonic_ns() // 1_000_000 - int(header[2]) // 1000)
    domain, bus, device = (int(part, 16) for part in found.groups()[:3])
    return XidSeen(
        int(found[4]),
        "kernel",
        time.time_ns() // 1_000_000 - age_ms,
        pci_bus_id=f"{domain:04x}:{bus:02x}:{device:02x}",
        text=found[5] or "",
        history=history,
        age_ms=age_ms,
        sequence=sequence,
    )


@dataclass(frozen=True, slots=True)
class Lost:
    """Records were overwritten before they were read."""


class KernelLog:
    """One open log. Never blocks. Not thread-safe."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._rest = b""
        self.descriptor = -1
        self.waits = True
        """Whether the descriptor can be waited for."""

    def open(self) -> None:
        """Raises `OSError`."""
        mode = os.stat(self._path).st_mode
        # A pipe that is also open for writing has no end when its writer goes.
        access = os.O_RDWR if stat.S_ISFIFO(mode) else os.O_RDONLY
        self.waits = not stat.S_ISREG(mode)
        self.descriptor = os.open(self._path, access | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        """Closing twice is closing once."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def history(self) -> list[Word | Lost]:
        """All that is there already."""
        found: list[Word | Lost] = []
        for _ in range(HISTORY_READS_MAX):
            words = self._read_once(history=True)
            if words is None:
                return found
            found += words
        os.lseek(self.descriptor, 0, os.SEEK_END)
        return [*found, Lost()]

    def read(self, reads_max: int) -> list[Word | Lost]:
        """What has come since, at most so many reads."""
        found: list[Word | Lost] = []
        for _ in range(reads_max):
            words = self._read_once(history=False)
            if words is None:
                break
            found += words
        return found

    def _read_once(self, *, history: bool) -> list[Word | Lost] | None:
        """`None`: there is no more at present."""
        try:
            data = os.read(self.descriptor, READ_BYTES)
        except BlockingIOError:
            return None
        except BrokenPipeError:
            return [Lost()]
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:LINE_BYTES_MAX]
        words = (parse_line(line, history=history) for line in lines)
        return [word for word in words if word is not None]
