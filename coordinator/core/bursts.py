"""When capacity is rented by the hour, how much, and when it is given back.

Problem: an hour of rented capacity costs several times as much as one of an own node, is paid for
whole, and is the only answer to a queue in front of a full fleet. So work waits for a node to free
as long as that is expected to cost less than the least that renting costs; a deadline that waiting
would miss is kept at that price, too. What is spent in a day is bounded, what is already rented
included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.core.capacity_model import Box, Outlook, Power, Source

MS_PER_H = 3_600_000
HOURS_KEPT = 24


@dataclass(frozen=True, slots=True)
class Burst:
    """Capacity by the hour, of one GPU type: dollars an hour of a GPU, how many a node has, and for
    how many hours one is paid at least. An idle node is given back after `idle_ms`.
    `nodes_max`: so many more can be rented."""

    usd_per_gpu_h: float
    gpus_per_node: int = 8
    hours_min: float = 1.0
    idle_ms: int = 600_000
    nodes_max: int = 1_000_000_000

    @property
    def usd_min(self) -> float:
        """What a GPU costs at least, once it is rented."""
        return self.usd_per_gpu_h * self.hours_min


def worth_gpus(
    outlook: Outlook, missing_gpus: int, burst: Burst, wait_usd_per_gpu_h: float
) -> tuple[int, tuple[int, ...]]:
    """How many of those that are missing are worth to be rented, and for which gangs."""
    late_gpus = min(missing_gpus, outlook.late_gpus)
    if outlook.frees_ms is not None:
        wait_usd = wait_usd_per_gpu_h * outlook.frees_ms / MS_PER_H
        if wait_usd > burst.usd_min:
            gpus = max(late_gpus, min(missing_gpus, outlook.urgent_gpus))
            return gpus, outlook.rentable_gangs or outlook.late_gangs
    return late_gpus, outlook.late_gangs


def ranks_nodes(ranks: int, gpus: int, burst: Burst) -> int:
    """How many nodes a job of so many ranks takes, which one holds."""
    return math.ceil(ranks / (burst.gpus_per_node // gpus))


def whole(wanted: int, possible: int, gangs: Sequence[int]) -> int:
    """How many of the wanted nodes are rented where no more are possible: a part of a gang's would
    be paid for and hold nobody. What is for no gang goes after them."""
    if wanted <= possible:
        return wanted
    taken = 0
    for nodes in gangs:
        # The rest of it is there already.
        nodes = min(nodes, wanted)
        taken += nodes if taken + nodes <= possible else 0
    return taken + min(possible - taken, max(0, wanted - sum(gangs)))


def nodes_of(gpus: int, burst: Burst) -> int:
    return math.ceil(gpus / burst.gpus_per_node)


def usd_per_h(boxes: Sequence[Box], burst: Burst) -> float:
    """What is rented now costs so much."""
    rented = (
        box.gpus for box in boxes if box.source is Source.BURST and box.power is not Power.OFF
    )
    return sum(rented) * burst.usd_per_gpu_h


def affordable(burst: Burst, spent_usd: float, rented_usd_per_h: float, budget_usd: float) -> int:
    """How many nodes more the budget of a day allows; all are paid for `hours_min` from now on."""
    left_usd = budget_usd - spent_usd - rented_usd_per_h * burst.hours_min
    return max(0, math.floor(left_usd / (burst.usd_min * burst.gpus_per_node) + 1e-9))


def unneeded(boxes: Sequence[Box], spare_gpus: int) -> tuple[Box, ...]:
    """Rented nodes that what runs and waits does not need: the emptiest, so that at most so many
    GPUs go."""
    rented = [
        box
        for box in boxes
        if box.source is Source.BURST
        and box.power in (Power.ON, Power.LEAVING)
        and not (box.closed or box.guaranteed or box.uploading or box.refused)
    ]
    taken = []
    for box in sorted(rented, key=lambda box: (box.held_gpus, box.idle_ms, box.node)):
        if box.gpus <= spare_gpus:
            taken.append(box)
            spare_gpus -= box.gpus
    return tuple(taken)


def spent(
    before: tuple[tuple[int, float], ...], now_ms: int, usd: float
) -> tuple[tuple[int, float], ...]:
    """By hour, with this; what is older than a day is dropped."""
    hour = now_ms // MS_PER_H
    kept = [each for each in before if hour - HOURS_KEPT < each[0] <= hour]
    if kept and kept[-1][0] == hour:
        kept[-1] = (hour, kept[-1][1] + usd)
    else:
        kept.append((hour, usd))
    return tuple(kept)
