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

A disk that stalls is no hang of ours. The next agent would wait for the same disk, and be killed
again while it reads its journal; so `main`, and `link`, which waits for what `main` has to say, may
wait for a commit as long as `JOURNAL_PATIENCE_MS`. It runs in a thread of its own, and the loop
that answers for this goes on turning meanwhile. Beyond that it may be SQLite that hangs, or the
thread; then a restart is worth a try.

What stands still is named in the log before systemd acts, which would otherwise only say "watchdog
timeout"; `-X faulthandler` in the unit adds the stacks of all threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# A batch of a thousand events waits for the core: seconds, not tens.
MAIN_PATIENCE_MS: Final = 10_000
# Beyond its own interval: a reading has deadlines of 5 s at most, and may queue for a thread.
SAMPLING_PATIENCE_MS: Final = 30_000
# Beyond two leases: a dial, a back-off and a close that waits for its peer.
LINK_PATIENCE_MS: Final = 60_000


# As long as the kernel itself waits until it calls a task hung (hung_task_timeout_secs).
JOURNAL_PATIENCE_MS: Final = 120_000


@dataclass(frozen=True, slots=True)
class Beat:
    """A loop, when it last moved, and how long it may take until it does again."""

    loop: str
    moved_ms: int
    patience_ms: int


@dataclass(slots=True)
class Pulse:
    """When each loop last moved, and whether a commit is on its way."""

    main_ms: int = 0
    sampling_ms: int = 0
    link_ms: int = 0
    commits: bool = False

    def begin(self, now_ms: int) -> None:
        self.main_ms = self.sampling_ms = self.link_ms = now_ms

    def committed(self, begun_ms: int, now_ms: int) -> None:
        """It is over, done or not. Whoever waited for a slow one begins to move only now."""
        self.commits = False
        self.main_ms = now_ms
        if now_ms - begun_ms > MAIN_PATIENCE_MS:
            self.link_ms = now_ms

    def beats(self, sample_interval_ms: int, lease_ms: int) -> tuple[Beat, ...]:
        least_ms = JOURNAL_PATIENCE_MS if self.commits else 0
        link_ms = LINK_PATIENCE_MS + 2 * lease_ms
        return (
            Beat("main", self.main_ms, max(least_ms, MAIN_PATIENCE_MS)),
            Beat("sampling", self.sampling_ms, SAMPLING_PATIENCE_MS + sample_interval_ms),
            Beat("link", self.link_ms, max(least_ms, link_ms)),
        )


def standing(now_ms: int, beats: Sequence[Beat]) -> Beat | None:
    """The loop that has outstayed its patience longest; `None` when all move."""
    late = [beat for beat in beats if now_ms - beat.moved_ms > beat.patience_ms]
    return max(late, key=lambda beat: now_ms - beat.moved_ms - beat.patience_ms, default=None)
