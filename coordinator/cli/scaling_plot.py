"""Plots of the fleet's size: of the plan as it stands, and of one decision.

Problem: whether a fleet is the right size is seen best where what was wanted, what was on and what
was expected lie over one another. Demand is known by the minute or by ten; what was on and needed
is known at each decision, and between two of them what the first one left.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coordinator.cli.render import write_plot
from coordinator.cli.settings import CommandFailed

if TYPE_CHECKING:
    from coordinator.cli.capacity_client import Decision, TypePlan
    from coordinator.cli.demand_client import Told
    from coordinator.sim.svg import Band, Curve

PERIOD_MIN: Final = 10
HOURS_SHOWN: Final = 48
# What is on now is no history: it stands right of now, on such a part of what is shown.
NOW_PART: Final = 1 / 12
# Of a decision: so long before it, and at least so long after.
BEFORE_H: Final = 2.0
S_PER_H: Final = 3_600.0
# Demand by the minute is kept for two weeks, and by ten for three months.
BY_MINUTE: Final = timedelta(days=13)
# Places in a forecast of nine quantiles.
BANDS: Final = (("90%", 1, 7), ("50%", 3, 5))
Point = tuple[float, float]


def draw_plan(
    path: Path,
    types: "Sequence[TypePlan]",
    told: "Sequence[Told | None]",
    decisions: "Sequence[Decision]",
    now: datetime | None,
) -> None:
    """Demand of the last days by type, what was on, and from now on what is. `now`: when the plan
    was made; without, nothing of the past is known to be at its place. Raises `CommandFailed`."""
    from coordinator.sim.svg import Chart, Curve, draw

    curves: list[Curve] = []
    for one, demand in zip(types, told, strict=True):
        gpus = () if demand is None else demand.gpus[-HOURS_SHOWN * 60 // PERIOD_MIN :]
        parts = _known(gpus, PERIOD_MIN)
        if not parts:
            continue
        begin_h = parts[0][0][0]
        curves.append(Curve(f"{one.gpu_type}: wanted", [], parts=parts))
        until_h = max(PERIOD_MIN / 60, -begin_h * NOW_PART)
        for what, here in (
            ("on now", one.on_gpus + one.leaving_gpus),
            ("should be on", one.wanted_gpus),
        ):
            curves.append(Curve(f"{one.gpu_type}: {what}", [(0.0, here), (until_h, here)]))
        mine = [each for each in decisions if each.gpu_type == one.gpu_type]
        curves += _history(one.gpu_type, mine, now, begin_h) if now is not None else ()
    if not curves:
        raise CommandFailed("there is no demand to be drawn yet: the first step takes ten minutes")
    chart = Chart("Demand and the fleet", "time from now, h", "GPUs", curves, mark_x=0.0)
    write_plot(path, draw(chart))


def draw_decision(path: Path, one: "Decision", told: "Told | None") -> None:
    """What was wanted before it and came after, what was expected, and what each alternative has
    there. Raises `CommandFailed`."""
    from coordinator.sim.svg import Chart, Curve, draw

    assert one.time is not None
    holds_h = one.holds_s / S_PER_H
    parts = []
    if told is not None and told.begin is not None:
        begin_h = (told.begin - one.time).total_seconds() / S_PER_H
        newest_h = begin_h + (len(told.gpus) - 1) * told.period_min / 60
        shown = [
            [point for point in part if -BEFORE_H <= point[0] <= holds_h]
            for part in _known(told.gpus, told.period_min, newest_h)
        ]
        parts = [part for part in shown if part]
    curves = [Curve("wanted", [], parts=parts)] if parts else []
    curves.append(Curve("on or starting", [(-BEFORE_H, one.there_gpus), (0.0, one.there_gpus)]))
    for name, gpus in [
        *((each.name, each.gpus) for each in one.alternatives),
        ("needed", one.need_gpus),
    ]:
        curves.append(Curve(name, [(0.0, gpus), (holds_h, gpus)]))
    chart = Chart(
        f"{one.id}: {one.gpu_type}", "time from the decision, h", "GPUs", curves,
        mark_x=0.0, bands=_bands(one),
    )  # fmt: skip
    write_plot(path, draw(chart))


def period_min(one: "Decision", now: datetime) -> int:
    """The finest steps in which demand around it is still kept."""
    assert one.time is not None
    return 1 if now - one.time < BY_MINUTE else PERIOD_MIN


def _bands(one: "Decision") -> "list[Band]":
    """Of the maximum: until a start would be there, and from then on until it is judged."""
    from coordinator.sim.svg import Band

    if not (one.soon_gpus and one.later_gpus):
        return []
    soon_h, holds_h = one.soon_s / S_PER_H, one.holds_s / S_PER_H
    looks = [
        (0.0, one.soon_gpus), (soon_h, one.soon_gpus),
        (soon_h, one.later_gpus), (max(soon_h, holds_h), one.later_gpus),
    ]  # fmt: skip
    return [
        Band(f"the most, in {name}", [(at, gpus[low], gpus[high]) for at, gpus in looks])
        for name, low, high in BANDS
    ]


def _history(
    gpu_type: str, decisions: "Sequence[Decision]", now: datetime, begin_h: float
) -> "Iterator[Curve]":
    """What was there and needed, by its decisions; the newest is the first of them."""
    from coordinator.sim.svg import Curve

    there: list[Point] = []
    needed: list[Point] = []
    for one in reversed(decisions):
        assert one.time is not None
        at_h = (one.time - now).total_seconds() / S_PER_H
        if not begin_h <= at_h <= 0.0:
            continue
        done = bool(one.alternatives) and any(deed.state != "proposed" for deed in one.deeds)
        after = one.alternatives[-1].gpus if done else one.there_gpus
        there += [(at_h, one.there_gpus), (at_h, after)]
        needed.append((at_h, one.need_gpus))
    if there:
        yield Curve(f"{gpu_type}: was on", [*there, (0.0, there[-1][1])], steps=True)
        yield Curve(f"{gpu_type}: was needed", needed, steps=True)


def _known(gpus: Sequence[float], step_min: int, newest_h: float = 0.0) -> list[list[Point]]:
    """Hours and GPUs, in parts between which nobody looked."""
    parts: list[list[Point]] = [[]]
    for place, value in enumerate(gpus):
        if value != value:
            parts.append([])
        else:
            parts[-1].append((newest_h + (place - len(gpus) + 1) * step_min / 60, value))
    return [part for part in parts if part]
