"""The calls of a training loop, and the two ways in which it hears that it should stop.

A stop comes over the socket ("stop", with reason and grace) or as a signal (SIGTERM, or SIGUSR1
or SIGUSR2 for jobs that asked for it). Both mean the same, and the first one counts. A signal
handler runs in the main thread between two byte codes, possibly while that thread holds a lock,
so ours only stores one value.

Where the training is (`enter`, `section`) is told as well, and the agent learns how long that
takes. When it takes far too long, the agent sends one more signal, ``DUMP_SIGNAL``, for which
faulthandler writes the stacks of all threads to standard error: in the signal handler itself, and
so also when the interpreter hangs in C code and runs no Python handler any more. Forked children
have it too. What torch's collectives wait for (``collectives.py``) takes Python, and is asked for
over the socket.

Child processes (data loader workers) inherit the stop handler. In them a SIGTERM must kill as
usual, or their parent could not end them; so the handler first looks whose process it is in.
"""

import atexit
import contextlib
import faulthandler
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import SupportsFloat, SupportsIndex

from baton_sdk import collectives
from baton_sdk.link import Link
from baton_sdk.mailbox import Mailbox, Ticket, TicketState
from baton_sdk.slab import Slab, SlabDesk

EXIT_RUN_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: "checkpointed, run me again"."""

OF_THIS_RANK = "of-this-rank"
"""How the name of a file or directory of one rank's part begins that no other rank reads. Resuming
with as many ranks as wrote it, each finds its own of these, and all find everything else."""

GRACE_MS = 120_000
"""What a stop allows when neither the message nor BATON_GRACE_MS says: the contract's default."""

MEAN_TIME_BETWEEN_FAILURES_S = 86_400.0
"""Where nobody has seen how often things fail. The coordinator believes the same beforehand."""

FLUSH_TIMEOUT_S = 5.0
"""How long the end of a job may wait for an absent agent to hear the last progress."""

STATUS_BITS = 0xFF
"""What wait(2) keeps of a status. An agent closes the connection on which it is told another."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

DUMP_SIGNAL = signal.SIGRTMIN + 5
"""The agent's request for stacks: none that stops a job, none that the C library uses itself."""

STDERR = 2
"""By number: what the agent keeps as the job's log, whatever ``sys.stderr`` is by then."""

STACKS_S = 0.5
"""Until the stacks of all threads are written, as far as they are into the same log: their lines
and others would mix. The agent waits five seconds for both."""


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

    def __init__(self, environment: Mapping[str, str], *, silent: bool = False) -> None:
        self._silent = silent
        self._socket_path = environment.get("BATON_SOCKET", "")
        self._token = environment.get("BATON_TOKEN", "")
        self._grace_ms = int(environment.get("BATON_GRACE_MS") or GRACE_MS)
        self._staging = environment.get("BATON_STAGING_DIR", "")
        self._restore = environment.get("BATON_RESTORE_DIR", "")
        self._restore_step = int(environment.get("BATON_RESTORE_STEP") or 0)
        self._rank = int(environment.get("BATON_RANK") or 0)
        self._world_size = int(environment.get("BATON_WORLD_SIZE") or 1)
        self._gpu_memory_ratio = float(environment.get("BATON_GPU_MEMORY_RATIO") or 1.0)
        told_s = environment.get("BATON_MEAN_TIME_BETWEEN_FAILURES_S")
        self._mean_time_between_failures_s = float(told_s or MEAN_TIME_BETWEEN_FAILURES_S)
        self._owner_pid = os.getpid()
        self._mailbox = Mailbox()
        self._slabs = SlabDesk(self._mailbox)
        self._link: Link | None = None
        self._stop: StopRequest | None = None
        self._section = ""
        self._heeds_saves = False
        self._save_requested = False

    def open(self) -> None:
        """Install the signal handlers (main thread only: Python allows no other) and start the
        link to the agent, if there is one."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)
        if self._socket_path:
            faulthandler.register(DUMP_SIGNAL, file=STDERR, all_threads=True, chain=False)
        if self._socket_path and not self._silent:
            self._link = Link(
                self._socket_path,
                self._token,
                self._mailbox,
                self._slabs,
                on_stop=self._on_stop,
                on_save=self._on_save,
                on_hang=self._on_hang,
            )
            self._link.open()
            atexit.register(self._close_at_exit)

    @property
    def under_baton(self) -> bool:
        """Whether an agent started this process."""
        return bool(self._socket_path)

    @property
    def rank(self) -> int:
        """Which of the job's ranks this process belongs to, from 0. Below a launcher that the rank
        itself has started, the ``RANK`` in the environment is another one."""
        return self._rank

    @property
    def world_size(self) -> int:
        """How many ranks Baton has started for this job; as many may hand over a part of a
        checkpoint each."""
        return self._world_size

    @property
    def gpu_memory_ratio(self) -> float:
        """How much of its GPU's memory this job may take, for
        ``torch.cuda.set_per_process_memory_fraction`` before anything is on the GPU; 1 where the
        job has it alone."""
        return self._gpu_memory_ratio

    @property
    def mean_time_between_failures_s(self) -> float:
        """Seconds between failures of what this job runs on, as the coordinator had seen them when
        it was started; a day where it had seen next to nothing."""
        return self._mean_time_between_failures_s

    @property
    def stop_requested(self) -> StopRequest | None:
        """Set once, by the agent or by a signal. Look at it after every step."""
        return self._stop

    def take_save_request(self) -> bool:
        """Whether the agent has asked for a checkpoint since the last call, while the training
        goes on: the job will have to leave soon, and what has not changed by then is on its way
        already. Cheap enough for every step.

        Who never calls it is not asked, and neither is a job that gains nothing by it.
        """
        if not self._heeds_saves and self._link is not None:
            self._heeds_saves = True
            self._mailbox.put_heeds_saves()
            self._link.wake()
        requested, self._save_requested = self._save_requested, False
        return requested

    @property
    def restore_directory(self) -> Path | None:
        """The files of the last committed checkpoint, verified; None on a first start. Where ranks
        handed over a part each, every rank finds all parts, in ``rank-00000``, ``rank-00001`` and
        so on."""
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
        seconds: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Say how far the training is. Cheap enough for every step: the latest wins.

        ``seconds`` is how this process has spent its time so far, none counted twice: step_s (steps
        without waiting for input), evaluate_s, input_wait_s, capture_s (in which a checkpoint kept
        the training waiting) and restore_s. `baton job` makes the job's goodput of it.
        """
        if self._link is None:
            return
        if self._mailbox.put_progress(step, total_steps, metrics, seconds):
            self._link.wake()

    def milestone(self, name: str) -> None:
        """Say that a phase is over: imports, load, first_step or evaluated. Once each."""
        if self._link is not None:
            self._mailbox.put_milestone(name, time.time_ns() // 1_000_000)
            self._link.wake()

    def enter(self, name: str) -> None:
        """Say what the training does from here on: init, compile, step, eval or save, or a name of
        its own; empty for nothing that takes a known time. Cheap enough for every step.

        The agent learns how long each section takes, from one call to the next. One that takes far
        longer is called hung: the stacks of all threads go to the job's log, and the job goes on
        from its last checkpoint. A training that never calls this has no limits, nor does one with
        BATON_HANG_LIMIT=0 in its environment. For one thread, the training's.
        """
        self._section = name
        if self._link is not None:
            if self._mailbox.put_section(name, time.time_ns() // 1_000_000):
                self._link.wake()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """The block is this section; after it the one from before goes on, as a new one."""
        before = self._section
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def checkpoint(self, path: Path, step: SupportsIndex, parts: int = 1) -> Ticket:
        """Hand over a finished directory; the agent owns it from here. Returns at once.

        ``parts``: of how many. Where each of W ranks saves a part of the state, all of them hand
        over their own for the same step with ``parts=W``; 1 is a whole checkpoint, from rank 0.

        Outside Baton nobody takes it: the ticket is `stored` where the directory lies.
        """
        if self._link is None:
            ticket = Ticket(0, path, operator.index(step), parts=parts)
            ticket.settle(TicketState.STORED)
            return ticket
        ticket = self._mailbox.put_checkpoint(Path(path).absolute(), step, parts=parts)
        self._link.wake()
        return ticket

    def slab(self, slot_bytes: int, wait_s: float = 0.0) -> Slab | None:
        """Memory of the agent's for captures of up to ``slot_bytes`` each, mapped and ready; asks
        for it where that has not been done, and waits at most ``wait_s`` seconds for it.

        None until it is there, and where there is no agent, an older one, or one that refused: then
        a checkpoint goes through a directory.
        """
        if self._link is None:
            return None
        return self._slabs.slab(slot_bytes, wait_s)

    def capture(
        self,
        slab: Slab,
        slot: int,
        files: Sequence[tuple[str, int, int]],
        step: SupportsIndex,
        *,
        parts: int = 1,
        written: Mapping[str, int] | None = None,
    ) -> Ticket:
        """Hand over what was written into a slot since ``slab.begin(slot)``: ``files`` are (name,
        offset in the slot, bytes), and become the files of a checkpoint, or of one of so many
        ``parts`` of it. A file in ``written`` has a number, 1 or more, that it had in this slot of
        this slab only while its bytes were these. Returns at once; the slot is the agent's until
        the ticket is answered. Raises ValueError for what fits no header."""
        whole_step, sequence = operator.index(step), self._slabs.next_sequence()
        slab.publish(slot, files, sequence=sequence, step=whole_step, parts=parts, written=written)
        ticket = self._mailbox.put_checkpoint(None, whole_step, sequence=sequence, parts=parts)
        slab.take(slot, ticket)
        if self._link is not None:
            self._link.wake()
        return ticket

    def after_step(
        self,
        step: int,
        save: Callable[[Path], object],
        *,
        every_steps: int,
        total_steps: int | None = None,
        metrics: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """All that a plain loop needs, after each of its steps: progress, a checkpoint when one is
        due, asked for or a stop is wanted, and the end of the process after a stop (SystemExit 75).

        ``save`` writes the state of the training into the directory that it gets, before it
        returns. Outside Baton this does nothing, but that a signal ends the process as it would
        without this session, which has taken it. For one process: of ranks that train together only
        rank 0 may call this, and what it saves is the whole checkpoint; the others call
        ``progress``. They must agree on a stop, which ``stop_requested`` leaves to them. Raises
        RuntimeError on any other rank.
        """
        if self._rank:
            raise RuntimeError(
                f"after_step was called on rank {self._rank} of {self._world_size}: it saves a "
                "whole checkpoint, so rank 0 alone may call it; call progress on the others"
            )
        self.progress(step, total_steps, metrics)
        stop, staging = self._stop, self.staging_directory
        if stop is not None and not self.under_baton:
            _end_by(signal.Signals[stop.reason])
        asked = self.take_save_request()
        if staging is None or (stop is None and not asked and step % every_steps != 0):
            return
        directory = staging / f"after-step-{os.getpid()}-{step}"
        directory.mkdir()
        save(directory)
        ticket = self.checkpoint(directory, step)
        if stop is not None and step != total_steps:
            ticket.wait_stored(stop.remaining_s)
            self.close()
            sys.exit(EXIT_RUN_AGAIN)

    def leaving(self, status: int, reason: str = "") -> None:
        """Say with what status this process will end, and why in one sentence. A launcher above it
        has a status of its own for workers that left with any: of torchrun's 1 the agent knows then
        that it was ``EXIT_RUN_AGAIN``, say, and the reason stands in the job's history. Of the
        status eight bits count, as for exit(3).

        To be said last, and only where all processes below the launcher leave for this reason:
        which of them the launcher's status is about, nobody can tell.
        """
        if self._link is not None:
            self._mailbox.put_leaving(operator.index(status) & STATUS_BITS, reason)
            self._link.wake()

    def close(self, flush_timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Send what waits, for at most ``flush_timeout_s`` seconds, and end the link."""
        if self._link is not None:
            if self._section:
                self.enter("")  # what comes after this is no business of the agent's
            self._link.close(flush_timeout_s)
            self._link = None
            atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        """A program that just ends has handed over a checkpoint, too. Forked children have not."""
        if os.getpid() == self._owner_pid:
            self.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_stop(self, reason: str, grace_ms: int | None) -> None:
        if self._stop is None:
            grace_ms = self._grace_ms if grace_ms is None else grace_ms
            self._stop = StopRequest(reason, grace_ms, time.monotonic())

    def _on_save(self) -> None:
        self._save_requested = True

    def _on_hang(self) -> None:
        """In the link's thread, which has nothing better to do: the training hangs."""
        time.sleep(STACKS_S)
        collectives.write(STDERR, self._rank)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner_pid:
            _end_by(number)
            return
        self._on_stop(signal.Signals(number).name, None)


def _end_by(number: int) -> None:
    """As if nobody had asked to hear of this signal."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def connect(environment: Mapping[str, str] | None = None, *, silent: bool = False) -> Session:
    """The session of this process, from its environment (``os.environ`` unless told).

    ``silent``: of processes that train together in one attempt, each but the one that speaks to the
    agent for all. It knows its directories, hears of a stop by signal and writes its stacks when
    asked; whatever it tells goes nowhere, and a checkpoint that it hands over is `stored` where it
    lies.

    Returns at once, whether the agent can be reached or not. Call it first, before the slow
    imports, so that a stop during them is not lost.
    """
    session = Session(os.environ if environment is None else environment, silent=silent)
    session.open()
    return session
