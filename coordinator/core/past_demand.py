"""What was wanted in the hours whose attempts are forgotten: by the samples of demand.

Problem: what to lease follows from what was wanted for weeks. Attempts say that to the minute, but
of jobs that have ended the last ten thousand are kept: a few days of a fleet with many small ones.
The history of demand is kept for two years (`demand_history.py`), by the hour and the type of GPU,
and it is the same quantity: what ran and what waited.

So the hours before all attempts are kept are read from it, and those after it are not. It differs
in two things. Who waits counts where he would most likely go, also if he gave up; and who waits by
his own wish counts as one who has to, which `bills.py` sets right by those that are kept.

What nobody sampled stays unknown, and so does a type without a series of its own, which counts to
the others. Hours before anything was wanted are those of a fleet that did not work yet, and say
nothing of what it will want.
"""

import math

from coordinator.core import holds
from coordinator.core.bills import MS_PER_H
from coordinator.core.demand_history import MINUTE_MS, OTHER, Series
from coordinator.core.lease_advice import PAST_DAYS
from coordinator.core.lease_messages import PastDemand
from coordinator.core.state import State

PERIOD_MIN = 60
DIGITS = 3  # as the means of an hour are kept
PAST_HOURS = PAST_DAYS * 24


def read(state: State, end_unix_ms: int) -> PastDemand | None:
    """Of the last month before that end. `None`: nothing is forgotten."""
    forgot_until_ms = holds.forgot_until_unix_ms(state)
    if forgot_until_ms is None or not state.attempts:
        return None
    # Before the first attempt that is kept there may have been others.
    first_ms = min(attempt.assigned_unix_ms for attempt in state.attempts.values())
    since_ms = max(first_ms, forgot_until_ms)
    history, end_h = state.demand_history, end_unix_ms // MS_PER_H
    begin_h = end_h - PAST_HOURS
    count = min(end_h, -(-since_ms // MS_PER_H)) - begin_h
    if count <= 0 or state.options.demand_minute_ms != MINUTE_MS:
        return PastDemand(since_ms, {})
    all_gpus = history.read(PERIOD_MIN, begin_h, count)
    begun = next((place for place, gpus in enumerate(all_gpus) if gpus), count)
    return PastDemand(
        since_ms,
        {
            gpu_type: tuple(
                math.nan if gpus is None else round(gpus, DIGITS)
                for gpus in history.read(
                    PERIOD_MIN, begin_h + begun, count - begun, Series(gpu_type)
                )
            )
            for gpu_type in history.gpu_types()
            if gpu_type != OTHER
        },
    )
