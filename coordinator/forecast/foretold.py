"""What jobs said of their end, hour by hour, as a forecast hears it beside the series.

Problem: of a job that says how many steps it has it is known when it ends, and neither its age nor
the series says so. But whether that comes true is another matter: trainings end early, are tried
again, or others come in their place. A forecast that was told it of today alone could not have
learned how far to believe it.

How: the coordinator keeps at the end of each hour how many of the GPUs that were wanted then were
expected, then, to be wanted still in some hours, by what their jobs said of their end and, of those
that said nothing, by their age (`held_ahead.py` in its core). Each is heard at the step that ended
with that hour, and what it expects now at the newest. Between two of its horizons it is a straight
line; beyond the last nothing is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.forecast.quantiles import Floats

# A step is sampled for the last time so long before it is over.
EARLY_MIN = 1.0


@dataclass(frozen=True, slots=True)
class Foretold:
    """At each of some moments, in minutes after the begin of a series, how many GPUs were expected
    to be wanted still after as many hours; shape (moments, hours ahead)."""

    minutes: Floats
    ahead_h: Floats
    gpus: Floats


def still_wanted(
    foretold: Foretold, steps: int, per_hour: int, ahead_h: Sequence[int]
) -> list[Floats]:
    """For each of these: at the steps at whose end something was said, what is expected to be
    wanted still so many hours later; NaN at all others."""
    ended = np.floor((foretold.minutes + EARLY_MIN) * per_hour / 60).astype(np.intp) - 1
    there = (ended >= 0) & (ended < steps)
    found = []
    for hours in ahead_h:
        said = np.full(steps, np.nan)
        said[ended[there]] = [
            np.interp(hours, foretold.ahead_h, gpus, left=np.nan, right=np.nan)
            for gpus in foretold.gpus[there]
        ]
        found.append(said)
    return found
