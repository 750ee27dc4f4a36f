"""When all work that is there could be done, and what an hour of each job's is a part of it.

Problem: whether a long job has to start now or may wait is a question about the whole queue: where
there is work for days, five hours are short. And an hour of a job is not an hour of the fleet: it
depends on which types the others need. Both follow from one price for a GPU-hour of each type. A
job is done most cheaply on the type with the least price for its work; at any prices the cost of
all work, over what the fleet earns in an hour, is a bound on the hours that it takes (of the linear
program that would end everything at once, these are the dual values), and the prices that make the
bound highest are the right ones. Dear types become dearer, and those that nobody wants cheaper, a
fixed number of times; where jobs are many, evenly drawn ones say it for all.

And whether the last of these jobs to end is the last of all depends on who is still to come. Nobody
knows, but the longer nobody has come, the less likely somebody does before the work is done
(`Horizon.quiet`).
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

ROUNDS: Final = 40
# The price of a type follows its load by this power at first, and by less in each round.
STEP: Final = 1.0
# Prices are those of this many jobs; some milliseconds on nine types.
PRICED_MAX: Final = 256
# However long nobody has come: the longest job counts for up to twenty times as much by it.
QUIET_MAX: Final = 0.95
# Who takes as long as all others together counts twice, at half of that for hardly more.
LAST_MAX: Final = 0.5
LAST_POWER: Final = 4
# What jobs have left on average on Gavel's continuous trace, by the mean that it makes shortest.
TYPICAL_GPU_H: Final = 3.0


@dataclass(frozen=True, slots=True)
class Work:
    """Of one job: GPU-hours on its best type, on how many GPUs at once, and how fast it is on types
    relative to the best; one that is not named cannot run it."""

    gpu_hours: float
    gpus: int
    relative: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Horizon:
    """`hours` are those that the work takes at least; `prices` of a GPU-hour are 1 on average over
    the GPUs. `quiet` is near 0 while jobs come, up to `QUIET_MAX` where none has come for much
    longer than all work takes. `mean_gpu_h`: of what a job has left."""

    hours: float
    prices: Mapping[str, float] = field(default_factory=dict)
    quiet: float = 0.0
    mean_gpu_h: float = TYPICAL_GPU_H

    def scaled(self, gpu_hours: float) -> float:
        """A job's GPU-hours as they would be were the jobs here as long as those on which balances
        were chosen: what is short is a question about the others, not about the hour."""
        return gpu_hours * TYPICAL_GPU_H / self.mean_gpu_h

    def last(self, part: float) -> float:
        """How certainly a job that takes this part of the hours is the last to end, if it waits:
        hardly, while the others have as much to do; by half where it takes as long as all."""
        return LAST_MAX * part**LAST_POWER

    def cost(self, relative: Mapping[str, float]) -> float:
        """What a GPU-hour of such a job's work on its best type costs where that is cheapest, in
        GPU-hours of an average GPU; 1 for one that has nowhere to run."""
        costs = (self.prices[n] / ratio for n, ratio in relative.items() if n in self.prices)
        return min(costs, default=1.0)


def horizon(
    works: Sequence[Work], longest_h: float, capacity: Mapping[str, int], silence_h: float = 0.0
) -> Horizon:
    """Of all this work on so many GPUs, where the last job came `silence_h` ago. No job takes
    longer than `longest_h` on its best type."""
    gpus = {name: count for name, count in capacity.items() if count > 0}
    total = sum(gpus.values())
    mean_gpu_h = sum(work.gpu_hours for work in works) / len(works) if works else TYPICAL_GPU_H
    able = [places for work in works if (places := _hours(work, gpus))]
    if not able:
        return Horizon(longest_h, {}, _quiet(silence_h, longest_h), mean_gpu_h)
    drawn = able[:: math.ceil(len(able) / PRICED_MAX)]
    prices = [1.0] * len(gpus)
    best, best_prices = -1.0, prices
    for round_number in range(ROUNDS):
        loads, cost = _loads(drawn, prices)
        if cost > best:
            best, best_prices = cost, prices
        even = cost / total
        power = STEP / (1.0 + round_number / 4)
        moved = [
            price * ((load / count + even) / (2 * even)) ** power
            for price, load, count in zip(prices, loads, gpus.values(), strict=True)
        ]
        earns = sum(map(operator.mul, gpus.values(), moved))
        prices = [price * total / earns for price in moved]
    _, cost = _loads(able, best_prices)
    named = dict(zip(gpus, best_prices, strict=True))
    hours = max(longest_h, cost / total)
    return Horizon(hours, named, _quiet(silence_h, hours), mean_gpu_h)


def _quiet(silence_h: float, hours: float) -> float:
    """The chance that nobody comes for so many hours, where a silence is expected to last as long
    again as it has lasted (Lindy's law: Pareto's distribution with shape 2)."""
    lasts = silence_h / (silence_h + hours) if silence_h > 0 else 0.0
    return min(QUIET_MAX, lasts**2)


def _hours(work: Work, gpus: Mapping[str, int]) -> list[tuple[int, float]]:
    """The GPU-hours that it takes on each type with room for it, by the type's place in `gpus`."""
    return [
        (place, work.gpu_hours / work.relative[name])
        for place, (name, count) in enumerate(gpus.items())
        if count >= work.gpus and name in work.relative
    ]


def _loads(
    works: Sequence[Sequence[tuple[int, float]]], prices: Sequence[float]
) -> tuple[list[float], float]:
    """GPU-hours of each type where all work goes where it is cheapest, and what it costs. One loop
    and no small objects in it: this is the larger part of a decision over a thousand jobs."""
    loads = [0.0] * len(prices)
    total = 0.0
    for work in works:
        least, where, longs = math.inf, 0, 0.0
        for place, hours in work:
            cost = prices[place] * hours
            if cost < least:
                least, where, longs = cost, place, hours
        loads[where] += longs
        total += least
    return loads, total
