"""How often something took how long, in a few numbers.

Problem: a mean hides the one commit in a thousand that takes a second, and a list of all of them
grows for ever. So observations are counted by the bucket that they fall into; Prometheus computes
quantiles over any span from that, and over all nodes at once.

Coordinator and agent each have this file, word for word (a test compares them), because neither may
import the other.
"""

from bisect import bisect_left
from itertools import accumulate
from typing import Final

# From what nobody notices to what loses a lease; a factor of four or so between two of them tells a
# slow disk from a stuck one, and each bucket costs a time series.
SECONDS_BOUNDS: Final = (0.005, 0.02, 0.1, 0.5, 2.0, 8.0)


class Histogram:
    """`bounds` are the upper ends of its buckets, ascending, each within its bucket; what is larger
    than all of them falls into one more."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        """The sum of what was observed."""

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, int]]:
        """Upper ends as Prometheus writes them, each with how many were at most that large."""
        ends = (*(str(bound) for bound in self._bounds), "+Inf")
        return list(zip(ends, accumulate(self._counts), strict=True))
