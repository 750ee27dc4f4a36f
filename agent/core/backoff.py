"""How long to wait before dialling again: exponential, capped, with full jitter.

Ten thousand agents that lose one coordinator at the same instant come back at the same instant
unless chance spreads them; "full jitter" (a uniform draw from zero to the cap of the round) spreads
them best for the least total work (Brooker, "Exponential Backoff and Jitter", AWS Architecture
Blog, 2015). The draw is an argument, so the function stays pure.
"""

FIRST_MS = 100
CAP_MS = 5_000


def backoff_ms(failures: int, draw: float) -> int:
    """The wait after `failures` failed tries in a row, for a `draw` that is uniform in 0 to 1."""
    ceiling_ms = min(CAP_MS, FIRST_MS << min(failures, 10))
    return int(ceiling_ms * draw)
