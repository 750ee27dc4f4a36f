"""What must hold in every replay of power, whoever decides, and what Baton's guard rails promise.

Problem: a policy that switches off a node with work, or counts one that boots as there, saves more
than is possible. So a replay is judged by what happened alone: capacity is counted anew from the
switches (`check_capacity`), and the bounds on how many nodes go and come, how long they stay up and
how often they are cycled are looked for in the same list (`check_rails`). Each finding is a
sentence.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import pairwise

from coordinator.core.guard_rails import DAY_MS, WINDOW_MS, Bounds
from coordinator.sim.capacity_replay import Boxes, PowerOutcome, Switch


def check_capacity(outcome: PowerOutcome, fleet: Boxes) -> list[str]:
    """Nodes are counted right, boot as long as they do, and work is on nodes that are up."""
    return [*_counts(outcome, fleet), *_boots(outcome, fleet)]


def check_rails(outcome: PowerOutcome, fleet: Boxes, bounds: Bounds) -> list[str]:
    """What `guard_rails.py` promises of a fleet, as far as a replay can show it."""
    allowed = {
        "stop": max(bounds.down_min, int(bounds.down_ratio * fleet.nodes)),
        "start": max(bounds.up_min, int(bounds.up_ratio * fleet.nodes)),
    }
    found = []
    for what, most in allowed.items():
        window: deque[int] = deque()
        for each in outcome.switches:
            if each.what != what:
                continue
            window.append(each.at_ms)
            while window[0] <= each.at_ms - WINDOW_MS:
                window.popleft()
            if len(window) > most:
                found.append(f"{len(window)} nodes {what} within ten minutes, {most} at most")
    return [*found, *_cycles(outcome, bounds), *_spares(outcome, bounds)]


def _counts(outcome: PowerOutcome, fleet: Boxes) -> Iterator[str]:
    on, starting = fleet.nodes, 0
    switches = deque(outcome.switches)
    for step in outcome.steps:
        while switches and switches[0].at_ms <= step.at_ms:
            each = switches.popleft()
            if each.what == "stop" and each.held_gpus:
                yield f"{each.node} went off at {each.at_ms} with {each.held_gpus} GPUs at work"
            on += {"start": 0, "up": 1, "stop": -1}[each.what]
            starting += {"start": 1, "up": -1, "stop": 0}[each.what]
        if (on, starting) != (step.on, step.starting):
            yield f"at {step.at_ms} {on} nodes are on and {starting} boot, not as counted"
        if step.wanted != fleet.nodes_of(step.gpus):
            yield f"at {step.at_ms} {step.gpus} GPUs take {fleet.nodes_of(step.gpus)} nodes"
        if not 0 <= step.busy <= min(step.on, step.wanted):
            yield f"at {step.at_ms} {step.busy} nodes work, {step.on} are on"


def _boots(outcome: PowerOutcome, fleet: Boxes) -> Iterator[str]:
    state: dict[str, Switch] = {}
    before = {"start": "stop", "up": "start", "stop": "up"}
    for each in outcome.switches:
        last = state.get(each.node)
        follows = "stop" if last is None and each.what == "stop" else before[each.what]
        if (last.what if last else "stop") != follows:
            yield f"{each.node}: {each.what} at {each.at_ms} after {last.what if last else 'on'}"
        elif each.what == "up" and last and each.at_ms - last.at_ms < fleet.boot_ms:
            yield f"{each.node} was up {each.at_ms - last.at_ms} ms after its start"
        state[each.node] = each


def _cycles(outcome: PowerOutcome, bounds: Bounds) -> Iterator[str]:
    starts: dict[str, list[int]] = defaultdict(list)
    for each in outcome.switches:
        mine = starts[each.node]
        if each.what == "start":
            mine.append(each.at_ms)
            lately = sum(at_ms > each.at_ms - DAY_MS for at_ms in mine)
            if lately > bounds.cycles_per_day_max:
                yield f"{each.node} was switched on {lately} times within a day"
        elif each.what == "stop" and mine and each.at_ms - mine[-1] < bounds.up_ms_min:
            yield f"{each.node} went off {each.at_ms - mine[-1]} ms after it was switched on"


def _spares(outcome: PowerOutcome, bounds: Bounds) -> Iterator[str]:
    stops = {each.at_ms for each in outcome.switches if each.what == "stop"}
    for before, step in pairwise(outcome.steps):
        stopped = step.at_ms in stops and step.on <= before.on
        if stopped and step.on - step.busy < bounds.spares_min:
            yield f"at {step.at_ms} nodes went off and {step.on - step.busy} empty ones stayed"
