"""Tells systemd, and tools without one, that this program is ready, alive, reloading or leaving.

Problem: `Type=simple` calls a program started before it can do anything, and calls a stuck one
running for ever. systemd's answer is a datagram to a socket, which needs no library: lines of
NAME=VALUE, to the address in `NOTIFY_SOCKET` (sd_notify(3)); a first character `@` stands for the
zero byte of an abstract address. READY=1 only after everything was opened; WATCHDOG=1 from the only
loop, at half the period that systemd asks for (sd_watchdog_enabled(3)), so that a loop which stands
still is a process that gets restarted. Without that variable nothing happens.

A tool that starts this program on port 0 waits for the port file instead: it appears whole, and
only when the port answers.

Coordinator and agent each have this file, word for word (a test compares them), because neither may
import the other.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final

STATUS_CHARACTERS_MAX: Final = 200  # one line of `systemctl status`


def _monotonic_usec() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000


class Notifier:
    """Sends states to the service manager. Each method answers whether the datagram went out; a
    manager that does not listen is no reason to stop."""

    def __init__(
        self,
        environment: Mapping[str, str],
        pid: int | None = None,
        monotonic_usec: Callable[[], int] = _monotonic_usec,
    ) -> None:
        self._environment = environment
        self._pid = pid
        self._monotonic_usec = monotonic_usec

    def ready(self, status: str = "") -> bool:
        """Everything is open; also the end of a reload."""
        return self._send("READY=1", *_status(status))

    def reloading(self) -> bool:
        """SIGHUP was seen; `ready` must follow. systemd wants the time, to match it to its own
        request."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={self._monotonic_usec()}")

    def stopping(self) -> bool:
        """SIGTERM was seen."""
        return self._send("STOPPING=1")

    def watchdog(self) -> bool:
        """The loop turned; call it every `watchdog_interval_ms`."""
        return self._send("WATCHDOG=1")

    def watchdog_interval_ms(self) -> int | None:
        """How often to call `watchdog`: half of what systemd allows. `None` when it does not watch,
        or watches another process."""
        usec = self._environment.get("WATCHDOG_USEC", "")
        pid = self._environment.get("WATCHDOG_PID", "")
        own_pid = os.getpid() if self._pid is None else self._pid
        if not (usec.isascii() and usec.isdigit()) or pid not in ("", str(own_pid)):
            return None
        return max(int(usec) // 2_000, 1) if int(usec) else None

    def _send(self, *lines: str) -> bool:
        address = self._environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return False
        if address.startswith("@"):
            address = "\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
            link.setblocking(False)  # a manager that hangs must not stop the loop
            try:
                link.connect(address)
                link.send("\n".join(lines).encode())
            except OSError:
                return False
        return True


def write_port_file(path: str, address: str) -> None:
    """Put the bound HOST:PORT and a line end into `path`, whole or not at all. Raises `OSError`."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(f"{address}\n")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _status(text: str) -> tuple[str, ...]:
    """One line, cut: a line break would start another variable."""
    one_line = " ".join(text.split())[:STATUS_CHARACTERS_MAX]
    return (f"STATUS={one_line}",) if one_line else ()
