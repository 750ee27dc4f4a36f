"""Which of the agent's loops stands still. Pure: time is an argument.

Problem: a process that exists is no process that works, and one loop that turns proves nothing of
the others. An agent whose readings had stopped went on with heartbeats for days, and one whose link
was stuck in a close would have waited for ever beside trainers that nobody led (the tests name
both). systemd restarts what no longer says WATCHDOG=1, and a restart costs no training; so that is
said only while every loop has moved within its patience:

- `main`, the only one that decides. `AgentShell.nudge` wakes it for each look, so an agent that has
  nothing to do is not taken for one that hangs. The supervisor of trainers, the trainers' socket
  and the peers' service have no loops of their own: they live in this one, and stand when it does.
- `sampling`, whose readings come out of worker threads. A driver that blocks does not stop it
  (`telemetry/remote.py`), a pool that has no thread left does.
- `link`, that dials, hears and closes.

What stands still is named in the log before systemd acts, which would otherwise only say "watchdog
timeout"; `-X faulthandler` in the unit adds the stacks of all threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# A commit waits for a slow disk, and a batch of a thousand events for the core: seconds, not tens.
MAIN_PATIENCE_MS: Final = 10_000
# Beyond its own interval: a reading has deadlines of 5 s at most, and may queue for a thread.
SAMPLING_PATIENCE_MS: Final = 30_000
# Beyond two leases: a dial, a back-off and a close that waits for its peer.
LINK_PATIENCE_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Beat:
    """A loop, when it last moved, and how long it may take until it does again."""

    loop: str
    moved_ms: int
    patience_ms: int


def standing(now_ms: int, beats: Sequence[Beat]) -> Beat | None:
    """The loop that has outstayed its patience longest; `None` when all move."""
    late = [beat for beat in beats if now_ms - beat.moved_ms > beat.patience_ms]
    return max(late, key=lambda beat: now_ms - beat.moved_ms - beat.patience_ms, default=None)
