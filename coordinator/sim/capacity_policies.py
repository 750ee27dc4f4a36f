"""Who decides which nodes are on: nobody, a timeout, Baton's plan, and one who knows the future.

Problem: savings are a claim against something. Three names say against what: `always-on` wastes
what nobody uses, `idle-timeout` switches off what was idle for an hour and on when work waits, and
`clairvoyant` has each node on exactly while it is wanted, booted in time: nobody can save more
without letting work wait. `baton` is the production core (`coordinator/core/scaling.py`) with the
forecasts that it gets in production.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.core.boot_times import BootTimes
from coordinator.core.capacity_model import Box, Outlook, Power
from coordinator.core.capacity_orders import Verb
from coordinator.core.scaling import Decision, Memory, Mode, Rules, plan
from coordinator.core.which_nodes import is_ripe
from coordinator.forecast.maximum import MaximumForecaster
from coordinator.sim.capacity_replay import HOUR_MS, MODEL, Boxes, Orders, Seen

TIMEOUT_MS: Final = 3_600_000


class AlwaysOn:
    """Nothing is ever switched off."""

    name = "always-on"

    def warm_up(self, gpus: float) -> None:
        """It learns nothing."""

    def decide(self, seen: Seen, boxes: Sequence[Box]) -> Orders:
        return Orders()


class IdleTimeout:
    """Off after an hour without work, on when work waits."""

    name = "idle-timeout"

    def __init__(self, idle_ms: int = TIMEOUT_MS) -> None:
        self._idle_ms = idle_ms

    def warm_up(self, gpus: float) -> None:
        """It learns nothing."""

    def decide(self, seen: Seen, boxes: Sequence[Box]) -> Orders:
        if seen.queued_gpus:
            return Orders(start=_missing(boxes, seen.queued_gpus))
        ripe = [box.node for box in boxes if is_ripe(box, seen.now_ms, self._idle_ms)]
        return Orders(stop=ripe)


class Clairvoyant:
    """As many as are wanted until a node that is started now would be there."""

    name = "clairvoyant"

    def __init__(self, values: Sequence[float], per_hour: int, fleet: Boxes) -> None:
        self._step_ms = HOUR_MS // per_hour
        self._ahead = math.ceil(fleet.boot_ms / self._step_ms)
        known = 0.0
        self._nodes = []
        for gpus in values:
            known = known if math.isnan(gpus) else gpus
            self._nodes.append(fleet.nodes_of(known))

    def warm_up(self, gpus: float) -> None:
        """It knows all."""

    def decide(self, seen: Seen, boxes: Sequence[Box]) -> Orders:
        step = seen.now_ms // self._step_ms
        need = max(self._nodes[step : step + self._ahead + 1])
        there = [box for box in boxes if box.power is not Power.OFF]
        if len(there) < need:
            off = [box.node for box in boxes if box.power is Power.OFF]
            return Orders(start=off[: need - len(there)])
        idle = [box.node for box in there if box.power is Power.ON and not box.held_gpus]
        return Orders(stop=idle[: len(there) - need])


@dataclass(slots=True)
class BatonPower:
    """The plan that runs in production. `rules` without boot times and mode, which follow from the
    fleet; `decisions` are all that were made."""

    fleet: Boxes
    per_hour: int
    rules: Rules
    name: str = "baton"
    decisions: list[Decision] = field(default_factory=list)
    _soon: MaximumForecaster = field(init=False)
    _later: MaximumForecaster = field(init=False)
    _memory: Memory = field(init=False, default_factory=Memory)

    def __post_init__(self) -> None:
        step_ms = HOUR_MS // self.per_hour
        soon = math.ceil((self.fleet.boot_ms + step_ms) / step_ms)
        self._soon = MaximumForecaster(soon, self.per_hour)
        later = max(1, math.ceil(self.rules.later_ms / step_ms))
        self._later = MaximumForecaster(later, self.per_hour)
        bounds = self.rules.bounds
        self.rules = replace(
            self.rules,
            mode=Mode.ACT,
            boots=BootTimes({MODEL: self.fleet.boot_ms}),
            # A series is looked at once a step, however long that is.
            bounds=replace(bounds, gap_ms_max=max(bounds.gap_ms_max, step_ms)),
        )

    def warm_up(self, gpus: float) -> None:
        self._soon.observe(gpus)
        self._later.observe(gpus)

    def decide(self, seen: Seen, boxes: Sequence[Box]) -> Orders:
        self.warm_up(math.nan if seen.stale else seen.gpus)
        most_gpus = self.fleet.nodes * self.fleet.gpus_per_node
        outlook = Outlook(
            self.fleet.gpu_type,
            running_gpus=math.ceil(seen.gpus) - seen.queued_gpus,
            queued_gpus=seen.queued_gpus,
            guaranteed_gpus=0,
            soon_gpus=tuple(min(most_gpus, float(gpus)) for gpus in self._soon.forecast()),
            later_gpus=tuple(min(most_gpus, float(gpus)) for gpus in self._later.forecast()),
            coverage=self._soon.coverage,
            stale=seen.stale,
        )
        planned = plan(seen.now_ms, boxes, [outlook], self.rules, self._memory)
        self._memory = planned.memory
        self.decisions += planned.decisions
        named = {
            verb: [node for each in planned.actions if each.verb is verb for node in each.nodes]
            for verb in (Verb.RESUME, Verb.SUSPEND)
        }
        return Orders(named[Verb.RESUME], named[Verb.SUSPEND], planned.leaving)


def _missing(boxes: Sequence[Box], gpus: int) -> list[str]:
    """Nodes for what waits, less those that boot already."""
    missing = gpus - sum(box.gpus for box in boxes if box.power is Power.STARTING)
    found = []
    for box in boxes:
        if missing > 0 and box.power is Power.OFF:
            found.append(box.node)
            missing -= box.gpus
    return found
