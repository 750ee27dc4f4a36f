"""How the training process spends its time, in cumulative seconds that never overlap.

Problem: a stopwatch around a step also times the wait for input inside the step, and the sum of all
stopwatches is then longer than the day. So there is one clock for all of them: what is measured
inside something is taken out of what is around it, whether it was measured here or added by
somebody with a clock of its own, as the prefetcher does.

The totals go to the agent with every progress line. One thread: the training's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The names of the contract; others are passed over by the agent.
STEP_S = "step_s"
EVALUATE_S = "evaluate_s"
INPUT_WAIT_S = "input_wait_s"
CAPTURE_S = "capture_s"
RESTORE_S = "restore_s"


class Timing:
    """The totals of one process. `clock` gives seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._totals_s: dict[str, float] = {}
        # Of each measurement that is open: the seconds inside it that have a name already.
        self._inside_s: list[float] = []

    def add(self, name: str, seconds: float) -> None:
        """Seconds that somebody else has measured, just now: they count for `name` alone, and not
        for what is being measured around them."""
        self._totals_s[name] = self._totals_s.get(name, 0.0) + seconds
        if self._inside_s:
            self._inside_s[-1] += seconds

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the block, without what is measured or added inside it."""
        began_s = self._clock()
        self._inside_s.append(0.0)
        try:
            yield
        finally:
            whole_s = self._clock() - began_s
            inside_s = self._inside_s.pop()
            self._totals_s[name] = self._totals_s.get(name, 0.0) + max(0.0, whole_s - inside_s)
            if self._inside_s:
                self._inside_s[-1] += whole_s

    def totals(self) -> dict[str, float]:
        """Seconds so far by name, each 0 or more; what is being measured now is not in it yet."""
        return dict(self._totals_s)
