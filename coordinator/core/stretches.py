"""What an attempt did while the same others had its GPU with it.

Problem: how fast a job is beside another one can be told only from steps that it made while just
that one was there, and what an attempt says of its steps goes on whoever comes and leaves. So its
time is cut where its company changes. What a stretch came to stands in the attempt, so that a
restart and a replay know what was measured; where the present one began is volatile.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stretch:
    """In `seconds` of training beside the attempts `beside` it made so many steps; with none it had
    its GPU alone. `kept_ratio` is that of its speed alone, where both were known by then, and
    `utilization_ratio` the GPU's, of one that was alone."""

    beside: tuple[str, ...]
    steps: int
    seconds: float
    kept_ratio: float | None = None
    utilization_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Watch:
    """The present stretch of an attempt: what it had done when it began, and how many seconds of it
    are written down. `timed`: its trainer says how it spends its time. `looked_ms`: when a place
    elsewhere was looked for last."""

    beside: tuple[str, ...]
    step: int
    spent_s: float
    timed: bool
    written_s: float = 0.0
    looked_ms: int = 0
