"""A year of demand in a minute: which nodes are on under a policy, and what waits for them.

Problem: whether a rule for switching nodes off is any good is seen after months, on one's own
users. So a series of demand is replayed against nodes that boot as slowly as real ones: what is
wanted is placed, the policy sees the same boxes that it sees in production and says what to switch,
and each step says how many nodes were on, booted, worked, and how many were missing.

Work is packed: so many GPUs need so many whole nodes, the last one that got work is the first to
be free, and a node that became idle last gets work first. Nobody's work is moved. What the fleet
as a whole cannot hold is not counted as waiting for a node. In a gap of the series demand stays
what it was, and the policy is told that it is stale.

Energy is that of the nodes: the work is done in any case, so policies differ in what idles and
boots. Orders are carried out at once; whoever is ordered to boot is there after `boot_s`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from coordinator.core.capacity_model import Box, Power

HOUR_MS: Final = 3_600_000
MODEL: Final = "box"
# Of a node with eight GPUs: ten kilowatts at full load seldom come together, and an idle one takes
# a third of what a busy one does.
BUSY_W, IDLE_W, OFF_W = 5_000.0, 1_500.0, 0.0


@dataclass(frozen=True, slots=True)
class Boxes:
    """A fleet of equal nodes, and what one takes."""

    nodes: int
    gpus_per_node: int = 8
    gpu_type: str = "GPU"
    boot_s: float = 600.0
    busy_w: float = BUSY_W
    idle_w: float = IDLE_W
    off_w: float = OFF_W
    usd_per_kwh: float = 0.12

    @property
    def boot_ms(self) -> int:
        return round(self.boot_s * 1_000)

    def nodes_of(self, gpus: float) -> int:
        """As many as hold so many GPUs, and no more than there are."""
        return min(self.nodes, math.ceil(gpus / self.gpus_per_node - 1e-9))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a policy is told: GPUs wanted, of which so many wait; `stale`: nobody knows."""

    now_ms: int
    gpus: float
    queued_gpus: int
    stale: bool


@dataclass(frozen=True, slots=True)
class Orders:
    """Nodes by name. `leaving`: all that are to take no new work."""

    start: Sequence[str] = ()
    stop: Sequence[str] = ()
    leaving: Sequence[str] = ()


class PowerPolicy(Protocol):
    """Who decides which nodes are on."""

    @property
    def name(self) -> str: ...

    def warm_up(self, gpus: float) -> None:
        """Demand of a step before the replay begins; NaN in a gap."""

    def decide(self, seen: Seen, boxes: Sequence[Box]) -> Orders:
        """At each step, once."""


@dataclass(frozen=True, slots=True)
class Step:
    """Nodes from this moment to the next: `wanted` (no more than there are), `busy` with it, `on`,
    and `starting`. `known`: not in a gap."""

    at_ms: int
    gpus: float
    wanted: int
    busy: int
    on: int
    starting: int
    known: bool

    @property
    def waits(self) -> bool:
        """Whether work waits for a node that is off or boots."""
        return self.busy < self.wanted


@dataclass(frozen=True, slots=True)
class Switch:
    """`what` is start, up or stop; `held_gpus` of the node at that moment."""

    at_ms: int
    node: str
    what: str
    held_gpus: int = 0


@dataclass(frozen=True, slots=True)
class PowerOutcome:
    """What happened, in order; `step_ms` is the time between two steps."""

    policy: str
    step_ms: int
    steps: tuple[Step, ...]
    switches: tuple[Switch, ...]


@dataclass(slots=True)
class _Fleet:
    """`busy` and `idle` are places in `boxes`; the last is the first to change."""

    boxes: list[Box]
    busy: list[int] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    starting: dict[int, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    switches: list[Switch] = field(default_factory=list)


def replay(
    values: Sequence[float],
    per_hour: int,
    fleet: Boxes,
    policy: PowerPolicy,
    begin: int = 0,
    *,
    passed: Callable[[int], None] = lambda _: None,
) -> PowerOutcome:
    """From step `begin` of the series on, all nodes on; the policy has seen what was before.
    `passed` is told of each step."""
    step_ms = HOUR_MS // per_hour
    for gpus in values[:begin]:
        policy.warm_up(gpus)
        passed(1)
    state = _begun(fleet, begin * step_ms)
    known_gpus = next((gpus for gpus in reversed(values[:begin]) if not math.isnan(gpus)), 0.0)
    steps = []
    for number in range(begin, len(values)):
        now_ms = number * step_ms
        stale = math.isnan(values[number])
        known_gpus = known_gpus if stale else values[number]
        wanted = fleet.nodes_of(known_gpus)
        _boot(state, now_ms)
        _work(state, wanted, now_ms)
        held_gpus = len(state.busy) * fleet.gpus_per_node
        queued = 0 if len(state.busy) == wanted else math.ceil(known_gpus - held_gpus)
        orders = policy.decide(Seen(now_ms, known_gpus, queued, stale), state.boxes)
        _carry_out(state, orders, now_ms, fleet.boot_ms)
        _work(state, wanted, now_ms)
        on = len(state.busy) + len(state.idle)
        steps.append(
            Step(now_ms, known_gpus, wanted, len(state.busy), on, len(state.starting), not stale)
        )
        passed(1)
    return PowerOutcome(policy.name, step_ms, tuple(steps), tuple(state.switches))


def _begun(fleet: Boxes, now_ms: int) -> _Fleet:
    digits = len(str(fleet.nodes))
    boxes = [
        Box(
            f"n{number + 1:0{digits}}",
            MODEL,
            fleet.gpu_type,
            fleet.gpus_per_node,
            Power.ON,
            now_ms,
            idle_ms=max(1, now_ms),
        )
        for number in range(fleet.nodes)
    ]
    places = {box.node: place for place, box in enumerate(boxes)}
    return _Fleet(boxes, idle=list(range(fleet.nodes))[::-1], places=places)


def _boot(state: _Fleet, now_ms: int) -> None:
    """Those that are up by now."""
    for place, up_ms in list(state.starting.items()):
        if up_ms <= now_ms:
            del state.starting[place]
            box = replace(state.boxes[place], power=Power.ON, since_ms=up_ms, idle_ms=now_ms)
            state.boxes[place] = box
            state.idle.append(place)
            state.switches.append(Switch(up_ms, box.node, "up"))


def _work(state: _Fleet, wanted: int, now_ms: int) -> None:
    """So many nodes have work, as far as there are open ones."""
    while len(state.busy) > wanted:
        place = state.busy.pop()
        state.boxes[place] = replace(state.boxes[place], held_gpus=0, idle_ms=now_ms)
        state.idle.append(place)
    closed = []
    while len(state.busy) < wanted and state.idle:
        place = state.idle.pop()
        box = state.boxes[place]
        if box.power is Power.LEAVING:
            closed.append(place)
            continue
        state.boxes[place] = replace(box, held_gpus=box.gpus, idle_ms=0)
        state.busy.append(place)
    state.idle.extend(reversed(closed))


def _carry_out(state: _Fleet, orders: Orders, now_ms: int, boot_ms: int) -> None:
    leaving = frozenset(orders.leaving)
    for place in (*state.busy, *state.idle):
        box = state.boxes[place]
        power = Power.LEAVING if box.node in leaving else Power.ON
        if box.power is not power:
            state.boxes[place] = replace(box, power=power, since_ms=now_ms)
    stopped = {state.places[name] for name in orders.stop}
    for place in sorted(stopped):
        box = state.boxes[place]
        state.switches.append(Switch(now_ms, box.node, "stop", box.held_gpus))
        state.boxes[place] = replace(box, power=Power.OFF, since_ms=now_ms, held_gpus=0, idle_ms=0)
    if stopped:
        state.idle = [place for place in state.idle if place not in stopped]
        state.busy = [place for place in state.busy if place not in stopped]
    for name in orders.start:
        place = state.places[name]
        box = state.boxes[place]
        state.switches.append(Switch(now_ms, box.node, "start"))
        starts = (*(at for at in box.starts_ms if at > now_ms - 24 * HOUR_MS), now_ms)
        state.boxes[place] = replace(box, power=Power.STARTING, since_ms=now_ms, starts_ms=starts)
        state.starting[place] = now_ms + boot_ms
