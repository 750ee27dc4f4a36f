"""Decisions that nobody disputes: what is best for each job has room for all of them.

Problem: a trace of weeks is decided on each of its minutes, and on most of them the fleet has room
for everybody. What a job is worth beside others (`core/horizon.py`, the linear program) then
changes nothing: each gets the option that is worth most to it, which no other allocation reaches.
So that is looked at first, and only where room is short, or two options of a job are worth about
the same, is the whole decision made. `tests/simulate/test_undisputed.py` holds the two equal.

It is not in `core/allocation.py`, as a live coordinator wants more of a decision than who runs
where: values, prices and the horizon are what arrivals are judged by until the next one, and what
`baton explain` tells, so hardly more than the solver's part of the time could be saved there.

Where all run and time alone would move nobody, the answer stays until something happens.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from coordinator.core.allocation import Aims, Contender, Option, is_late, stays, worths
from coordinator.core.horizon import Horizon
from coordinator.sim.model import Seen

# How much is left to others changes what all options of a job are worth by one factor.
ANY_WORK: Final = Horizon(1.0)
# Below that a solver may take either of two options: its tolerance is that of sums over all jobs.
CLEAR_RATIO: Final = 1e-3


def undisputed(
    contenders: Sequence[Contender],
    capacity: Mapping[str, int],
    now_ms: int,
    aims: Aims,
    tenants: Mapping[str, float],
) -> dict[int, Option] | None:
    """What each of them gets; None where it takes a decision over all of them together."""
    fewest = sum(min((o.gpus for o in each.options), default=0) for each in contenders)
    if fewest > sum(capacity.values()):
        return None
    free = dict(capacity)
    found: dict[int, Option] = {}
    for contender, worth in zip(
        contenders, worths(contenders, now_ms, aims, tenants, ANY_WORK), strict=True
    ):
        option = _clear_best(contender, worth)
        runs = contender.at is not None
        if runs and stays(contender, now_ms, aims) and not is_late(contender, now_ms):
            option = contender.at
        if option is None or free.get(option.gpu_type, 0) < option.gpus:
            return None
        free[option.gpu_type] -= option.gpus
        found[contender.job_id] = option
    return found


def _clear_best(contender: Contender, worth: Sequence[float]) -> Option | None:
    best, place = max(zip(worth, range(len(worth)), strict=True), default=(0.0, 0))
    clear = best * (1.0 - CLEAR_RATIO)
    if best <= 0 or any(value > clear for other, value in enumerate(worth) if other != place):
        return None
    return contender.options[place]


def at_rest(jobs: Sequence[Seen], aims: Aims) -> bool:
    """Whether all of them run where they are worth most however much they have left."""
    stay = (1.0 + aims.stay_ratio * (1.0 + aims.balance)) * (1.0 - CLEAR_RATIO)
    return all(
        seen.placement is not None
        and seen.job.deadline_ms is None
        and seen.job.rates[seen.placement.gpu_type] * stay > max(seen.job.rates.values())
        for seen in jobs
    )
