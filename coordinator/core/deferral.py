"""Work that may wait: how it enters a program, and how it is served hour by hour.

Problem: a GPU that is rented for one dear hour is wasted if the work of that hour could have run in
the next cheap one. Jobs may say that they can wait (`--flexible 24h`); of demand that is a part, in
GPU-hours, each of which has to be served before it has waited for too long. Here work is a fluid:
it can be cut as one likes, so what is said of the gain is the most that there is.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.core.linear import Draft


@dataclass(frozen=True, slots=True)
class Flexible:
    """`ratio` of all demand may wait for `wait_h` hours, in steps of an hour."""

    ratio: float = 0.0
    wait_h: int = 24


def add_demand(
    draft: Draft,
    demand: Sequence[float],
    supplies: Sequence[Sequence[tuple[int, float]]],
    burst_usd: float,
    flexible: Flexible,
) -> list[int]:
    """Rows that serve `demand`, an hour each, from what stands in `supplies` for the hour and from
    burst at so much an hour. The numbers of the rows; all work is served by the end."""
    come = 0.0
    arrived = [come := come + flexible.ratio * gpus for gpus in demand]
    rows: list[int] = []
    before = -1
    for hour, (gpus, supply) in enumerate(zip(demand, supplies, strict=True)):
        entries = [*supply, (draft.column(burst_usd), 1.0)]
        if flexible.ratio:
            due = arrived[hour - flexible.wait_h] if hour >= flexible.wait_h else 0.0
            least = arrived[-1] if hour == len(demand) - 1 else due
            served = draft.column(0.0, least, arrived[hour])
            entries.append((served, -1.0))
            if before >= 0:
                entries.append((before, 1.0))
                draft.row([(served, 1.0), (before, -1.0)], low=0.0)
            before = served
        rows.append(draft.row(entries, low=(1.0 - flexible.ratio) * gpus))
    return rows


def burst_hours(
    demand: Sequence[float], supply: Sequence[float], flexible: Flexible
) -> list[float]:
    """GPU-hours of burst in each hour by the rule that the live queue keeps: urgent work first,
    then what waits on whatever is idle, the oldest first; burst for what is urgent or has waited
    for as long as it may."""
    waiting: deque[tuple[int, float]] = deque()
    found: list[float] = []
    for hour, (gpus, there) in enumerate(zip(demand, supply, strict=True)):
        waiting.append((hour, flexible.ratio * gpus))
        left = there - (1.0 - flexible.ratio) * gpus
        burst = max(0.0, -left)
        left = max(0.0, left)
        last = hour == len(demand) - 1
        while waiting and (left > 0.0 or last or waiting[0][0] <= hour - flexible.wait_h):
            since, amount = waiting.popleft()
            served = min(left, amount)
            left -= served
            if served < amount and (last or since <= hour - flexible.wait_h):
                burst += amount - served
            elif served < amount:
                waiting.appendleft((since, amount - served))
        found.append(burst)
    return found
