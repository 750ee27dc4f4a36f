"""Which nodes are started, which take no new work, and which of these go off now.

Problem: to switch off a node it has to be empty, and work that is spread over all of them never
lets one become so. So the emptiest are closed to new work as long as nobody needs them, and empty
themselves; what runs is not moved for it. A node that did not come up the last time stays on: it
may not come up again. Who is started is whoever failed least, was cycled least and boots fastest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.core import guard_rails
from coordinator.core.boot_times import BootTimes
from coordinator.core.capacity_model import Box, Power, Source
from coordinator.core.guard_rails import Bounds, Rail

UP = (Power.ON, Power.LEAVING)
OVERDUE = 2  # a boot that takes so many times as long as 19 of 20 is not counted on


@dataclass(frozen=True, slots=True)
class Chosen:
    """`rail`: the bound that left others out, if one did."""

    boxes: tuple[Box, ...]
    rail: Rail | None = None

    @property
    def gpus(self) -> int:
        return sum(box.gpus for box in self.boxes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(box.node for box in self.boxes)


def is_there(box: Box, now_ms: int, boots: BootTimes) -> bool:
    """Whether it can be counted on: it is up, or comes up, as far as anybody knows."""
    if box.closed:
        return False
    if box.power in UP:
        return True
    if box.power is not Power.STARTING or box.boot_failures:
        return False
    return now_ms - box.since_ms <= OVERDUE * boots.of(box.model)


def to_start(
    boxes: Sequence[Box],
    gpus: int,
    nodes_max: int,
    now_ms: int,
    *,
    boots: BootTimes,
    bounds: Bounds,
) -> Chosen:
    """As many as these GPUs take, within bounds."""
    if gpus <= 0:
        return Chosen(())
    off = [
        box
        for box in boxes
        if box.power is Power.OFF and box.source is not Source.BURST and not box.closed
    ]
    rested = [box for box in off if guard_rails.cycles(box, now_ms) < bounds.cycles_per_day_max]
    able = [box for box in rested if not guard_rails.exhausted(box, bounds)]
    order = sorted(
        able,
        key=lambda box: (
            box.boot_failures,
            guard_rails.cycles(box, now_ms),
            boots.of(box.model),
            -box.since_ms,
            box.node,
        ),
    )
    taken: list[Box] = []
    missing = gpus
    for box in order:
        if missing <= 0:
            return Chosen(tuple(taken))
        if len(taken) >= nodes_max:
            return Chosen(tuple(taken), Rail.UP_RATE)
        taken.append(box)
        missing -= box.gpus
    if missing <= 0:
        return Chosen(tuple(taken))
    rail = Rail.CYCLES if len(rested) < len(off) else None
    return Chosen(tuple(taken), Rail.BOOT_FAILURES if len(able) < len(rested) else rail)


def to_leave(
    boxes: Sequence[Box],
    spare_gpus: int,
    now_ms: int,
    idle_ms: int,
    *,
    queued_gpus: int,
    bounds: Bounds,
) -> Chosen:
    """Those that are to take no new work, so that at most `spare_gpus` go. A node that what is
    queued may take is not empty for long. A bound is told of only where a node would otherwise be
    ripe (`is_ripe`)."""
    there = [
        box for box in boxes if box.power in UP and box.source is Source.OWNED and not box.closed
    ]
    empty = sum(box.held_gpus == 0 for box in there)
    gpu_type = there[0].gpu_type if there else ""
    spares = bounds.spares.get(gpu_type, bounds.spares_min)
    if queued_gpus and there:
        spares += math.ceil(queued_gpus / min(box.gpus for box in there))
    taken: list[Box] = []
    rail: Rail | None = None
    for box in sorted(there, key=_emptiest_first):
        if box.gpus > spare_gpus:
            continue
        found = guard_rails.of_node(box, now_ms, bounds)
        if found is None and box.held_gpus == 0 and empty <= spares:
            found = Rail.SPARES
        if found is None:
            taken.append(box)
            spare_gpus -= box.gpus
            empty -= box.held_gpus == 0
        elif rail is None and is_ripe(box, now_ms, idle_ms):
            rail = found
    return Chosen(tuple(taken), rail)


def is_ripe(box: Box, now_ms: int, idle_ms: int) -> bool:
    """Whether nothing has run there for longer than that."""
    return box.held_gpus == 0 and box.idle_ms > 0 and now_ms - box.idle_ms > idle_ms


def to_stop(
    leaving: Sequence[Box], nodes_max: int, now_ms: int, idle_ms: int, *, marked: bool
) -> Chosen:
    """Of those, the ones that go off now. `marked`: only who has been closed to new work already,
    so that nothing can begin there meanwhile."""
    ripe = [
        box
        for box in leaving
        if is_ripe(box, now_ms, idle_ms) and (box.power is Power.LEAVING or not marked)
    ]
    if len(ripe) > nodes_max:
        return Chosen(tuple(ripe[:nodes_max]), Rail.DOWN_RATE)
    return Chosen(tuple(ripe))


def _emptiest_first(box: Box) -> tuple[object, ...]:
    return (box.held_gpus, box.idle_ms or box.since_ms, box.node)
