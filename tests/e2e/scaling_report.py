"""What `make demo-scaling` concludes: the fleet beside two rules that have names, and the plot.

Problem: "it saved energy" says nothing without "against what". So the samples that were taken of
the live fleet become the steps of a replay (`coordinator/sim/capacity_replay.py`), and the same
demand is replayed against a fleet that is always on, against one that goes off after an idle hour
and on when work waits, and against one that knows the day, with the boots that were seen. All are
counted in the same way, in the plan's own hours. A replay packs work into whole nodes, which the
live fleet cannot always: what is compared is rather too good for the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.core.tariffs import Prices
from coordinator.sim.capacity_policies import AlwaysOn, Clairvoyant, IdleTimeout
from coordinator.sim.capacity_replay import Boxes, PowerOutcome, Step, Switch, replay
from coordinator.sim.capacity_report import figures
from coordinator.sim.svg import Band, Chart, Curve, stack

MINUTE_MS = 60_000
MINUTES_PER_H = 60
S_PER_MINUTE = 60
GPU_TYPE = "H100"
# A day in which nobody was worth to be moved is none that shows it; a part of one may be.
WHOLE_MINUTES = 20 * MINUTES_PER_H
TIME = "time since the beginning, h of the plan"
# What an idle GPU draws of its limit: https://nemulai.com/blog/gpu-electricity-cost-per-training-run
# calls an idle H100 105 W of 700; one H200 was measured at 74 W
# (https://conservemode.com/case-studies.html), so it is rather too much.
IDLE_RATIO = 0.15
# Places of a forecast's quantiles (`coordinator.core.capacity_model.LEVELS`).
BAND_90, BAND_50 = (1, 7), (3, 5)


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at a minute of the plan; counts in GPUs, `soon_gpus` quantiles of a forecast."""

    minute: float
    running_gpus: int
    queued_gpus: int
    on_gpus: int
    starting_gpus: int
    idle_gpus: int
    soon_gpus: tuple[float, ...]

    @property
    def wanted_gpus(self) -> int:
        return self.running_gpus + self.queued_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """All that was seen. `boots_min` are minutes of the plan from an order until a node was on;
    `waits_min` those of jobs before their first start. `moved`: jobs that went on elsewhere so that
    a node could go off."""

    nodes: int
    gpus_per_node: int
    samples: tuple[Sample, ...]
    switches: tuple[Switch, ...]
    boots_min: tuple[float, ...]
    jobs: int
    lost: tuple[str, ...]
    moved: int
    waits_min: tuple[float, ...]

    def failures(self) -> list[str]:
        """What did not hold, as sentences."""
        found = [f"a job was lost: {sentence}" for sentence in self.lost]
        verbs = [switch.what for switch in self.switches]
        if "stop" not in verbs:
            found.append("no node went off")
        elif "up" not in verbs:
            found.append("no node that went off came back")
        whole = self.samples[-1].minute >= WHOLE_MINUTES
        if whole and "stop" in verbs and not self.moved:
            found.append("nobody was handed off so that a node could go off")
        return found


def _fleet(day: Day) -> Boxes:
    tariff, overhead = Prices().of(GPU_TYPE), Prices().overhead_ratio
    loaded_w = tariff.loaded_watts or 0.0
    boot_min = sum(day.boots_min) / len(day.boots_min) if day.boots_min else 1.0
    return Boxes(
        day.nodes,
        day.gpus_per_node,
        GPU_TYPE,
        boot_s=boot_min * S_PER_MINUTE,
        busy_w=day.gpus_per_node * loaded_w * overhead,
        idle_w=day.gpus_per_node * IDLE_RATIO * loaded_w * overhead,
    )


def _each_minute(day: Day) -> list[Sample]:
    """The newest sample of each minute."""
    found, place = [], 0
    for minute in range(math.floor(day.samples[-1].minute) + 1):
        while place + 1 < len(day.samples) and day.samples[place + 1].minute <= minute:
            place += 1
        found.append(day.samples[place])
    return found


def _seen(day: Day, fleet: Boxes) -> PowerOutcome:
    steps = []
    for minute, sample in enumerate(_each_minute(day)):
        wanted, on = fleet.nodes_of(sample.wanted_gpus), sample.on_gpus // day.gpus_per_node
        starting = sample.starting_gpus // day.gpus_per_node
        gpus = float(sample.wanted_gpus)
        steps.append(
            Step(minute * MINUTE_MS, gpus, wanted, min(wanted, on), on, starting, known=True)
        )
    return PowerOutcome("baton", MINUTE_MS, tuple(steps), day.switches)


def lines(day: Day) -> list[str]:
    """The table and what is to be said of it, for people."""
    fleet = _fleet(day)
    seen = _seen(day, fleet)
    gpus = [step.gpus for step in seen.steps]
    runs = [seen]
    rules = (IdleTimeout(), AlwaysOn(), Clairvoyant(gpus, MINUTES_PER_H, fleet))
    runs += [replay(gpus, MINUTES_PER_H, fleet, rule) for rule in rules]
    hours = len(seen.steps) / MINUTES_PER_H
    names = {
        "baton": "baton, as it was",
        "idle-timeout": "idle timeout 1 h, replayed",
        "clairvoyant": "clairvoyant, replayed",
    }
    out = [
        f"  {'':<28}{'node-hours on':>14}{'off':>8}{'energy kWh':>12}{'saved':>8}{'waiting':>9}"
        f"{'starts':>8}"
    ]
    for run in runs:
        its = figures(run, fleet)
        node_h = (1 - its.off_ratio) * fleet.nodes * hours
        starts = sum(switch.what == "start" for switch in run.switches)
        out.append(
            f"  {names.get(run.policy, 'always on'):<28}{node_h:>14.1f}{its.off_ratio:>8.1%}"
            f"{its.energy_kwh:>12.1f}{its.saved_ratio:>8.1%}{its.waiting_ratio:>9.1%}{starts:>8}"
        )
    limit = figures(seen, fleet).limit_ratio
    quick = sum(wait <= 2 for wait in day.waits_min)
    return [
        *out,
        "  (off: of all node-hours; saved: of energy, by "
        f"{fleet.busy_w:.0f} W busy and {fleet.idle_w:.0f} W idle a node; waiting: minutes in "
        "which more nodes were wanted than were on)",
        f"  No rule can have more than {limit:.1%} of the node-hours off without work that waits.",
        f"  {day.jobs} jobs, lost: {len(day.lost)}; {quick} began within two minutes of the plan, "
        f"the last after {max(day.waits_min, default=0.0):.0f}",
        f"  {day.moved} were handed off so that their node could go off",
        f"  a boot took {fleet.boot_s / S_PER_MINUTE:.0f} minutes of the plan",
    ]


def drawing(day: Day) -> str:
    """The text of an SVG file: demand with its bands, and the nodes that were on for it."""
    fleet = _fleet(day)
    steps = _seen(day, fleet).steps
    told = [sample for sample in day.samples if sample.soon_gpus]

    def band(name: str, places: tuple[int, int]) -> Band:
        low, high = places
        points = [(s.minute / MINUTES_PER_H, s.soon_gpus[low], s.soon_gpus[high]) for s in told]
        return Band(name, points)

    def nodes(counts: Sequence[float]) -> list[tuple[float, float]]:
        return [(minute / MINUTES_PER_H, count) for minute, count in enumerate(counts)]

    came = Curve("running and waiting", nodes([step.gpus for step in steps]), steps=True)
    bands = [band("forecast of the most, 90%", BAND_90), band("the same, 50%", BAND_50)]
    idle = [sample.idle_gpus / day.gpus_per_node for sample in _each_minute(day)]
    curves = [
        Curve("on or starting", nodes([step.on + step.starting for step in steps]), steps=True),
        Curve("needed", nodes([step.wanted for step in steps]), steps=True),
        Curve("idle, in whole nodes", nodes(idle), steps=True),
    ]
    charts = (
        Chart("Demand, and its forecast until a node would be there", TIME, "GPUs", [came],
              bands=bands),
        Chart("Nodes", TIME, "nodes", curves, y_max=day.nodes * 1.05),
    )  # fmt: skip
    return stack(charts)
