"""Does again what the system refuses for the moment.

Problem: how a trainer ended is read from a file, and whom a signal may reach from /proc. An agent
that is out of descriptors (EMFILE), or whose disk errs for a second, is refused both. An end that
is not told holds its GPUs until the next restart, and a signal that is not sent is a checkpoint
that nobody asked for; but ending the agent over it would hand all jobs of the node to others.

How: what ends with an `OSError` is told once, and done again each second until it is done. All of
it can be done twice, and looks first whether it is still wanted.
"""

import asyncio
from collections.abc import Callable

import structlog

AGAIN_S = 1.0  # of a kill that waits, nobody notices more; of a thousand tries, no log either

log = structlog.get_logger()


class Again:
    """For one event loop; `close` gives up what is not done."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.TimerHandle] = set()

    def until_done(self, attempt_id: str, doing: str, work: Callable[[], None]) -> None:
        """Do it now, or as soon as the system lets us. `doing` completes "the agent is"."""
        self._try(attempt_id, doing, work, told=False)

    def later(self, attempt_id: str, doing: str, error: OSError, work: Callable[[], None]) -> None:
        """It was refused with this: from the next try on the same."""
        log.warning("process.refused", attempt=attempt_id, doing=doing, reason=str(error))
        self._wait(lambda: self._try(attempt_id, doing, work, told=True))

    def close(self) -> None:
        for timer in self._waiting:
            timer.cancel()
        self._waiting.clear()

    def _try(self, attempt_id: str, doing: str, work: Callable[[], None], *, told: bool) -> None:
        try:
            work()
        except OSError as error:
            if told:
                self._wait(lambda: self._try(attempt_id, doing, work, told=True))
            else:
                self.later(attempt_id, doing, error, work)

    def _wait(self, then: Callable[[], None]) -> None:
        def come() -> None:
            self._waiting.discard(timer)
            then()

        timer = asyncio.get_running_loop().call_later(AGAIN_S, come)
        self._waiting.add(timer)
