"""Who says that he ends soon is no reason to start a node, as far as such words have come true.

Problem: a job of a whole node that has five minutes to go frees it before another one has booted.
Yet a plan that counts it as demand until it is gone starts a node for who waits behind it, and
keeps an idle one on for the hours after. But a trainer at its last step may save and evaluate for
an hour, and where one job ends the next one comes as a rule: what usually ends is in the forecast
already.

How, by GPU type, of those GPUs that come free before a node that is started now would be there
(`held_ahead.ending_gpus`):
1. They are taken off the need by which nodes are started, which could not meet it any sooner, and
   off what is kept for later; never off what stays on until then, never off guaranteed demand, and
   not at all while a guaranteed job waits.
2. Only a share of them is, that which the record allows. What was said is kept until its time is
   over. Then the highest demand that came says which share could have been taken off the forecast
   so that it still held; of all these the share is the quantile at which the forecast without them
   is exceeded as seldom as the plan wants it to be.
3. As long as no `SAID_MIN` times as much as ends now has been said to end, and waited for, nothing
   is taken off. The record is volatile: after our own restart it begins anew.

What is reserved needs nothing of this: who it is kept for waits, and is demand already.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from coordinator.core import demand_forecast, held_ahead, odds
from coordinator.core.capacity_model import Box, Outlook
from coordinator.core.demand_history import Series
from coordinator.core.model import JobClass
from coordinator.core.scaler import EndsClaim, EndsRecord
from coordinator.core.state import Instant, State
from coordinator.core.which_nodes import UP

# A claim that is still to be judged so long after those of now is of before the clock was set back
# (by a day at least, `demand_samples.py`), and would be waited for as long.
AHEAD_MIN_MAX: Final = 1_440
# At the plan's usual level one of twenty may be wrong, and one of them has to be seen to be known.
SAID_MIN: Final = 20


def allowed_share(seen: Iterable[tuple[float, float]], ending_gpus: float, level: float) -> float:
    """0 to 1, of `ending_gpus`; `seen` are shares that would have held, and of how many GPUs."""
    by_share = sorted(seen)
    total = sum(gpus for _, gpus in by_share)
    if not by_share or total < SAID_MIN * ending_gpus:
        return 0.0
    wrong_gpus, rest = (1.0 - level) * total, 0.0
    for share, gpus in by_share:
        rest += gpus
        if rest > wrong_gpus:
            return min(1.0, max(0.0, share))
    return 0.0


def outlooks(
    state: State, now: Instant, boxes: Sequence[Box], seen: Sequence[Outlook]
) -> list[Outlook]:
    """With what comes free, as far as it is believed; what was said before is judged."""
    minute = state.demand_history.newest_minute
    if minute is None:
        return list(seen)
    ahead_min = {
        each.gpu_type: demand_forecast.minutes_ahead(state, each.gpu_type) for each in seen
    }
    options = state.options
    boot_ms = {
        gpu_type: soon_min * options.demand_minute_ms - options.scaling.interval_ms
        for gpu_type, (soon_min, _) in ahead_min.items()
    }
    counted = {box.node: None for box in boxes if box.power in UP and not box.closed}
    ending = held_ahead.ending_gpus(state, now, boot_ms, counted)
    risks = any(state.jobs[job_id].spec.job_class is JobClass.GUARANTEED for job_id in state.queued)
    found = []
    for each in seen:
        gpus = ending.get(each.gpu_type, 0.0)
        known = bool(each.soon_gpus) and not each.stale
        soon, later = _shares(state, minute, each, gpus if known else 0.0, ahead_min[each.gpu_type])
        found.append(
            replace(
                each,
                ending_gpus=0 if risks else math.floor(soon * gpus),
                ended_later_gpus=0 if risks else math.floor(later * gpus),
            )
        )
    return found


def _shares(
    state: State, minute: int, outlook: Outlook, gpus: float, ahead_min: tuple[int, int]
) -> tuple[float, float]:
    """Of these GPUs, of the need and of what is kept for later; 0 where nothing ends."""
    rules = state.options.scaling.rules
    soon_min, later_min = minute + ahead_min[0], minute + ahead_min[1]
    found = []
    for name, last, level, forecast in (
        ("soon", soon_min, rules.level, outlook.soon_gpus),
        ("later", max(soon_min, later_min), rules.keep_level, outlook.later_gpus),
    ):
        record = state.scaler.ends.setdefault((outlook.gpu_type, name), EndsRecord())
        if record.claim is not None and record.claim.last - last >= AHEAD_MIN_MAX:
            record.claim = None
        _judge(state, record, minute, outlook.gpu_type)
        found.append(allowed_share(record.seen, gpus, level) if gpus else 0.0)
        if gpus and record.claim is None:
            bound = max(odds.at_level(forecast, level), outlook.running_gpus + outlook.queued_gpus)
            record.claim = EndsClaim(soon_min, last, bound, gpus)
    return found[0], found[1]


def _judge(state: State, record: EndsRecord, minute: int, gpu_type: str) -> None:
    """What was said, once its time is over; one of which a minute is unknown says nothing."""
    said = record.claim
    if said is None or minute < said.last:
        return
    record.claim = None
    count = said.last - said.first + 1
    came = state.demand_history.read(1, said.first, count, Series(gpu_type))
    known = [gpus for gpus in came if gpus is not None]
    if len(known) == count:
        record.seen.append(((said.bound_gpus - max(known)) / said.ending_gpus, said.ending_gpus))
