"""Where a checkpoint goes: into the agent's slab, into a directory for the agent, or onto our disk.

Problem: the loop wants one sentence, "keep this state", and there are three ways with different
costs. A capture stops the training for a moment, and now and then for the rest of a copy; a
directory for as long as the disk takes. So the slab is asked for early, after the first step, when
the optimizer has all of its state; where there is none (an older agent, a host without the memory,
no Baton) a directory is written as ever.

While the agent still reads both slots a capture is put off to the next step, and the step after
that: a training never waits for a disk. Only the last one of a process waits, within the time that
it is given, and becomes a directory then.

Ranks that share one attempt (``launcher``) have one place at the agent, and it takes whole
checkpoints there. So they write their parts into one directory while the training waits, and the
first hands it over once all have written theirs: whoever reads it finds what ranks of Baton's own
would have handed over one by one.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baton_sdk
from trainers import capture, checkpoint, ranges
from trainers.configuration import AUTOMATIC_S, LoopOptions
from trainers.ranks import ALONE, RankError, World

CHANGED_WHILE_CAPTURED = (
    "the model writes to its parameters while it computes: that checkpoint is dropped, and from"
    " here on the training waits for all of every copy"
)

STANDALONE_CHECKPOINTS_MAX = 2
"""Kept outside Baton: the last one, and one more in case a disk error spoils it."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint that was handed over."""

    ticket: baton_sdk.Ticket
    state: dict[str, Any]
    """Its JSON state."""

    captured: bool
    """Whether it went into the slab."""

    stall_s: float
    """How long the training stood still for it."""


class Saver:
    """Of one training, in its one thread."""

    def __init__(
        self, session: baton_sdk.Session, options: LoopOptions, world: World = ALONE
    ) -> None:
        self._session = session
        self._options = options
        self._world = world
        self._capturer = capture.Capturer(session, parts=world.size)
        self._stall_s: float | None = None
        self._state: dict[str, Any] = {}
        self._ticket: baton_sdk.Ticket | None = None
        self._prepared = False
        self._postponed = False

    @property
    def overlaps(self) -> bool:
        """Whether captures run beside the training: not when its model has changed one."""
        return not self._capturer.changing

    @property
    def parent(self) -> Path | None:
        """Where directories are made; None: nowhere is anything kept."""
        if self._session.staging_directory is not None:
            return self._session.staging_directory
        chosen = self._options.checkpoint_directory
        return Path(chosen) if chosen else None

    @property
    def _mean_time_between_failures_s(self) -> float:
        chosen_s = self._options.mean_time_between_failures_s
        return chosen_s if chosen_s != AUTOMATIC_S else self._session.mean_time_between_failures_s

    @property
    def prepared(self) -> bool:
        """Whether the memory was asked for, or there is no use in asking."""
        return self._prepared or not self._session.under_baton

    @property
    def blocked(self) -> bool:
        """Whether a capture now would be put off."""
        return self._capturer.blocked

    @property
    def waiting(self) -> bool:
        """Whether the agent has not taken the last checkpoint yet: a newer one would take its
        place."""
        return self._ticket is not None and self._ticket.state is baton_sdk.TicketState.PENDING

    def prepare(self, live: checkpoint.Snapshot) -> None:
        """Ask for the memory that a state like this needs. Returns at once."""
        self._prepared = True
        if self._world.shared:
            self._capturer.measure(live)
        else:
            self._capturer.prepare(live)

    def due(self, step: int, waited_s: float) -> bool:
        """Whether it is time, so many seconds after the last one: every so many steps, every so
        many seconds, when the agent asks, and when one was put off; 0 switches steps or seconds
        off. Not while the agent still reads every slot: then it is put off."""
        options = self._options
        every_s = options.checkpoint_every_s
        if every_s == AUTOMATIC_S:
            every_s = capture.interval_s(
                self._stall_s, self._capturer.state_bytes, self._mean_time_between_failures_s
            )
        by_steps = options.checkpoint_every_steps
        self._postponed = (
            self._session.take_save_request()  # first: who looks at every step is asked
            or self._postponed
            or (by_steps > 0 and step % by_steps == 0)
            or (every_s > 0 and waited_s >= every_s)
        )
        return self._postponed and not self._capturer.blocked

    def save(
        self, live: checkpoint.Snapshot, step: int, *, wait_s: float = 0.0, last: bool = False
    ) -> Kept | None:
        """Keep a state, whose tensors are the live ones. None: it is put off, there is nowhere, or
        it is begun, and ``settle`` comes before the next update. The ``last`` one is neither put
        off nor only begun; it waits at most ``wait_s`` seconds for a slot. Raises OSError when it
        cannot be written; the training is unharmed."""
        parent = self.parent
        if parent is None:
            return None
        began_s = time.perf_counter()
        self._state = live.state
        ticket = None
        memory = not self._world.shared
        if memory and last:
            ticket = self._capturer.take(live, step, wait_s=wait_s, whole=True)
        elif memory and self._capturer.begin(live, step):
            self._postponed = False
            return self.settle(wait=not self.overlaps)
        self._postponed = ticket is None and self._capturer.busy and not last
        if self._postponed:
            return None
        captured = ticket is not None
        if ticket is None:
            ticket = self._write(live, step, parent / f"checkpoint-{step:09d}")
        self._ticket = ticket
        self._stall_s = time.perf_counter() - began_s
        if self._world.first and not self._session.under_baton:
            for old in standalone_checkpoints(parent)[:-STANDALONE_CHECKPOINTS_MAX]:
                shutil.rmtree(old)
        return Kept(ticket, self._state, captured, self._stall_s)

    def wait_stored(self, timeout_s: float) -> bool:
        """Whether the last checkpoint is on the agent's disk, within so many seconds. Of ranks that
        share an attempt none goes before that: their launcher would end the one that waits."""
        stored = self._ticket is not None and self._ticket.wait_stored(timeout_s)
        if self._world.shared:
            ((of_first,), *_) = self._world.gather([float(stored)])
            return of_first > 0
        return stored

    def _write(self, live: checkpoint.Snapshot, step: int, directory: Path) -> baton_sdk.Ticket:
        """A collective where the ranks share an attempt: there, what one rank cannot write, none
        has written."""
        world = self._world
        own = directory / ranges.name_of_part(world.rank)
        if world.shared:
            self._write_together(live, own)
            return self._session.checkpoint(directory, step)
        if world.alone or self._session.under_baton:
            own = directory
        self._write_own(live, own)
        return self._session.checkpoint(own, step, parts=world.size)

    def _write_own(self, live: checkpoint.Snapshot, own: Path) -> None:
        hashed = not self._session.under_baton
        self._state = checkpoint.write(checkpoint.copied(live), own, hashed=hashed)

    def _write_together(self, live: checkpoint.Snapshot, own: Path) -> None:
        failure = ""
        try:
            self._write_own(live, own)
        except OSError as error:
            failure = str(error)
        try:
            self._world.check_none_failed(failure)
        except RankError as error:
            if self._world.first:
                shutil.rmtree(own.parent, ignore_errors=True)
            raise OSError(str(error)) from error

    def settle(self, *, wait: bool = True) -> Kept | None:
        """What has become of the checkpoint that was begun; parameters may change from here on.
        Without ``wait`` only if that is known by now. None also where it was dropped: then it is
        due again."""
        if not self._capturer.begun:
            return None
        ticket = self._capturer.settle(wait=wait)
        if ticket is None:
            self._postponed = not self._capturer.begun
            return None
        self._ticket = ticket
        self._stall_s = self._capturer.stall_s
        return Kept(ticket, self._state, True, self._stall_s or 0.0)


def standalone_checkpoints(parent: Path) -> list[Path]:
    """Oldest first: the names hold the step in nine digits."""
    return sorted(parent.glob("checkpoint-?????????"))
