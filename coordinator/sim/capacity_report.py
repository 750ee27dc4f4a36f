"""Figures of a replay: work that waited, energy, money, and how far from what was possible.

Energy and money are those of nodes: `saved_ratio` is against the same fleet always on, doing the
same work. The limit of any such claim is `limit_ratio` of node-hours: 1 - mean / nodes.
"""

from dataclasses import dataclass

from coordinator.sim.capacity_replay import HOUR_MS, Boxes, PowerOutcome, Step

DAY_H = 24


@dataclass(frozen=True, slots=True)
class PowerFigures:
    """Ratios are 0 to 1. `waiting_ratio` of steps; `off_ratio` of node-hours."""

    waiting_ratio: float
    waiting_node_h: float
    off_ratio: float
    energy_kwh: float
    saved_ratio: float
    usd_per_day: float
    starts_per_day: float
    limit_ratio: float


def power_w(step: Step, fleet: Boxes) -> float:
    """Of the whole fleet. What waits is done later, and costs then what it would have now."""
    idle = max(0, step.on + step.starting - step.wanted)
    off = fleet.nodes - step.wanted - idle
    return step.wanted * fleet.busy_w + idle * fleet.idle_w + off * fleet.off_w


def figures(outcome: PowerOutcome, fleet: Boxes) -> PowerFigures:
    steps = [step for step in outcome.steps if step.known]
    step_h = outcome.step_ms / HOUR_MS
    hours = len(steps) * step_h
    kwh = sum(power_w(step, fleet) for step in steps) * step_h / 1_000
    wanted = sum(step.wanted for step in steps)
    always_w = wanted * fleet.busy_w + (fleet.nodes * len(steps) - wanted) * fleet.idle_w
    always_kwh = always_w * step_h / 1_000
    there = sum(step.on + step.starting for step in steps)
    return PowerFigures(
        waiting_ratio=sum(step.waits for step in steps) / len(steps),
        waiting_node_h=sum(step.wanted - step.busy for step in steps) * step_h,
        off_ratio=1 - there / (fleet.nodes * len(steps)),
        energy_kwh=kwh,
        saved_ratio=1 - kwh / always_kwh,
        usd_per_day=kwh * fleet.usd_per_kwh * DAY_H / hours,
        starts_per_day=sum(each.what == "start" for each in outcome.switches) * DAY_H / hours,
        limit_ratio=1 - wanted / (fleet.nodes * len(steps)),
    )
