"""What replays of power looked like: demand, the nodes that were on for it, and money a day.

Problem: whether a plan follows demand or lags behind it is seen at a glance, and in no mean. Three
charts of one time axis stand below one another in one file; each point is the mean of its part of
the time, so that months fit on a page. A colour means the same policy in all of them, and black
what is wanted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from coordinator.sim.capacity_replay import HOUR_MS, Boxes, PowerOutcome, Step
from coordinator.sim.capacity_report import DAY_H, power_w
from coordinator.sim.svg import COLOURS, Chart, Curve, stack

BINS: Final = 300
TIME: Final = "time since the replay began, h"
# As svg.py counts looks: what is wanted, what one policy's nodes do (its colour, dashed).
DEMAND: Final = COLOURS.index("#000000")
DASHED: Final = len(COLOURS)


def drawing(runs: Mapping[str, PowerOutcome], fleet: Boxes) -> str:
    """The text of an SVG file; at least one run, the first of which is shown in detail."""
    name, first = next(iter(runs.items()))

    def curves(said: str, of: Callable[[Step], float]) -> list[Curve]:
        return [
            Curve(f"{said}{policy}", _course(run, of), look=look)
            for look, (policy, run) in enumerate(runs.items())
        ]

    def usd(step: Step) -> float:
        return power_w(step, fleet) / 1_000 * fleet.usd_per_kwh * DAY_H

    needed = Curve("needed", _course(first, lambda step: step.wanted), look=DEMAND)
    idle = _course(first, lambda step: step.on - step.busy)
    nodes = [needed, *curves("on, ", lambda step: step.on + step.starting)]
    nodes.append(Curve(f"idle, {name}", idle, look=DASHED))
    money = curves("", usd)
    demand = [Curve("running and waiting", _course(first, lambda step: step.gpus), look=DEMAND)]
    charts = (
        Chart("Demand", TIME, "GPUs", demand),
        Chart("Nodes on or booting", TIME, "nodes", nodes, y_max=fleet.nodes * 1.05),
        Chart("Energy of nodes", TIME, "US dollars a day", money),
    )
    return stack(charts)


def _course(run: PowerOutcome, of: Callable[[Step], float]) -> Sequence[tuple[float, float]]:
    every = max(1, len(run.steps) // BINS)
    begin_ms = run.steps[0].at_ms
    points = []
    for place in range(0, len(run.steps), every):
        part = run.steps[place : place + every]
        hours = (part[0].at_ms - begin_ms) / HOUR_MS
        points.append((hours, sum(map(of, part)) / len(part)))
    return points
