"""How long to wait before dialling again: exponential, capped, with full jitter.

Ten thousand agents that lose one coordinator at the same instant come back at the same instant
unless chance spreads them; "full jitter" (a uniform draw from zero to the cap of the round) spreads
them best for the least total work (Brooker, "Exponential Backoff and Jitter", AWS Architecture
Blog, 2015). The draw is an argument, so the function stays pure.

A coordinator that lets in only so many a second says when to come. Nobody dials before that, and
jitter comes on top of it, never off it.
"""

FIRST_MS = 100
CAP_MS = 5_000
# Told to wait longer, we ask again: the coordinator that said so may be gone.
TOLD_MS_MAX = 600_000


def backoff_ms(failures: int, draw: float, told_ms: int = 0) -> int:
    """The wait after `failures` failed tries in a row, for a `draw` that is uniform in 0 to 1;
    `told_ms`: the coordinator wants us no sooner than then."""
    ceiling_ms = min(CAP_MS, FIRST_MS << min(failures, 10))
    return min(told_ms, TOLD_MS_MAX) + int(ceiling_ms * draw)
