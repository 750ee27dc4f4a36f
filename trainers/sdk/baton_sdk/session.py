"""The calls of a training loop, and the two ways in which it hears that it should stop.

A stop comes over the socket ("stop", with reason and grace) or as a signal (SIGTERM, or SIGUSR1
or SIGUSR2 for jobs that asked for it). Both mean the same, and the first one counts. A signal
handler runs in the main thread between two byte codes, possibly while that thread holds a lock,
so ours only stores one value.

Child processes (data loader workers) inherit the handler. In them a SIGTERM must kill as usual,
or their parent could not end them; so the handler first looks whose process it is in.
"""

import operator
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import SupportsFloat, SupportsIndex

from baton_sdk.link import Link
from baton_sdk.mailbox import Mailbox, Ticket, TicketState

EXIT_RUN_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: "checkpointed, run me again"."""

GRACE_MS = 120_000
"""What a stop allows when neither the message nor BATON_GRACE_MS says: the contract's default."""

FLUSH_TIMEOUT_S = 5.0
"""How long the end of a job may wait for an absent agent to hear the last progress."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class StopRequest:
    """Somebody wants this process to checkpoint and leave with ``EXIT_RUN_AGAIN``."""

    reason: str
    grace_ms: int
    requested_at_s: float
    """On the monotonic clock."""

    @property
    def remaining_s(self) -> float:
        """Seconds of grace that are left, 0 or more."""
        return max(0.0, self.requested_at_s + self.grace_ms / 1000 - time.monotonic())


class Session:
    """One per process. Use ``connect``; usable as a context manager that closes it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket_path = environment.get("BATON_SOCKET", "")
        self._token = environment.get("BATON_TOKEN", "")
        self._grace_ms = int(environment.get("BATON_GRACE_MS") or GRACE_MS)
        self._staging = environment.get("BATON_STAGING_DIR", "")
        self._restore = environment.get("BATON_RESTORE_DIR", "")
        self._restore_step = int(environment.get("BATON_RESTORE_STEP") or 0)
        self._owner_pid = os.getpid()
        self._mailbox = Mailbox()
        self._link: Link | None = None
        self._stop: StopRequest | None = None

    def open(self) -> None:
        """Install the signal handlers (main thread only: Python allows no other) and start the
        link to the agent, if there is one."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)
        if self._socket_path:
            self._link = Link(self._socket_path, self._token, self._mailbox, self._on_stop)
            self._link.open()

    @property
    def under_baton(self) -> bool:
        """Whether an agent started this process."""
        return bool(self._socket_path)

    @property
    def stop_requested(self) -> StopRequest | None:
        """Set once, by the agent or by a signal. Look at it after every step."""
        return self._stop

    @property
    def restore_directory(self) -> Path | None:
        """The files of the last committed checkpoint, verified; None on a first start."""
        return Path(self._restore) if self._restore else None

    @property
    def restore_step(self) -> int:
        """The step of that checkpoint, 0 on a first start."""
        return self._restore_step if self._restore else 0

    @property
    def staging_directory(self) -> Path | None:
        """Where to build checkpoint directories; None outside Baton."""
        return Path(self._staging) if self._staging else None

    def progress(
        self,
        step: SupportsIndex,
        total_steps: SupportsIndex | None = None,
        metrics: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Say how far the training is. Cheap enough for every step: the latest wins."""
        if self._link is None:
            return
        if self._mailbox.put_progress(step, total_steps, metrics):
            self._link.wake()

    def milestone(self, name: str) -> None:
        """Say that a phase is over: imports, load, first_step or evaluated. Once each."""
        if self._link is not None:
            self._mailbox.put_milestone(name, time.time_ns() // 1_000_000)
            self._link.wake()

    def checkpoint(self, path: Path, step: SupportsIndex) -> Ticket:
        """Hand over a finished directory; the agent owns it from here. Returns at once.

        Outside Baton nobody takes it: the ticket is `stored` where the directory lies.
        """
        if self._link is None:
            ticket = Ticket(0, path, operator.index(step))
            ticket.settle(TicketState.STORED)
            return ticket
        ticket = self._mailbox.put_checkpoint(Path(path).absolute(), step)
        self._link.wake()
        return ticket

    def close(self, flush_timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Send what waits, for at most ``flush_timeout_s`` seconds, and end the link."""
        if self._link is not None:
            self._link.close(flush_timeout_s)
            self._link = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_stop(self, reason: str, grace_ms: int | None) -> None:
        if self._stop is None:
            grace_ms = self._grace_ms if grace_ms is None else grace_ms
            self._stop = StopRequest(reason, grace_ms, time.monotonic())

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner_pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._on_stop(signal.Signals(number).name, None)


def connect(environment: Mapping[str, str] | None = None) -> Session:
    """The session of this process, from its environment (``os.environ`` unless told).

    Returns at once, whether the agent can be reached or not. Call it first, before the slow
    imports, so that a stop during them is not lost.
    """
    session = Session(os.environ if environment is None else environment)
    session.open()
    return session
