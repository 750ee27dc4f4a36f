"""What people are told of the fleet's size is what was decided, and what it came to."""

from dataclasses import replace

import pytest

from coordinator.core.capacity_model import LEVELS
from coordinator.core.demand_messages import ForecastMade, TypeForecast
from coordinator.core.messages import CordonNode
from coordinator.core.scale_records import Choice, ScaleRecord, hindsight
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode
from tests.core.test_fleet_scaling import NAMES, RULES, ScaledRig


def test_hindsight_knows_the_cheapest_and_says_nothing_of_what_is_unknown() -> None:
    choices = tuple(
        Choice(name, gpus, 0.0)
        for name, gpus in (("do nothing", 4), ("idle timeout", 2), ("chosen", 1))
    )
    words = (1, 0, "h100", "act", "", 0.95, 0, 0, 0, 0, 0, 0)
    record = ScaleRecord(*words, alternatives=choices, minutes=60)
    found = hindsight(record, [2.0] * 60, 1.0, 0.1)
    assert found is not None
    assert found.usd == pytest.approx((0.2, 0.0, 1.0))
    assert found.regret_usd == pytest.approx(1.0)
    assert hindsight(record, [None] * 30 + [2.0] * 30, 1.0, 0.1) is None
    assert hindsight(replace(record, alternatives=()), [2.0] * 60, 1.0, 0.1) is None


def test_what_is_rented_or_cycled_costs_as_much_in_hindsight() -> None:
    """Two that were rented are no better than one that waited, only because they were there."""
    choices = (Choice("do nothing", 0, 2.0), Choice("chosen", 2, 8.0, fixed_usd=8.0))
    words = (1, 0, "h100", "act", "", 0.95, 0, 0, 0, 0, 0, 0)
    found = hindsight(ScaleRecord(*words, alternatives=choices, minutes=60), [2.0] * 60, 1.0, 0.1)
    assert found is not None
    assert found.usd == pytest.approx((2.0, 8.0))
    assert found.regret_usd == pytest.approx(6.0)


class RisingRig(ScaledRig):
    """What comes is known badly: each quantile is another number of GPUs."""

    def forecast(self) -> None:
        rising = tuple(1.0 + place / 2 for place in range(len(LEVELS)))
        minute = self.rig.now.unix_ms // 60_000
        told = TypeForecast("H100", (2.0,) * len(LEVELS), rising)
        self.handle(ForecastMade(minute, (told,)))


def test_what_people_are_shown_is_what_the_plan_acts_by() -> None:
    """A node is kept at another quantile than it is started at, and what runs on a node that a
    person has closed is not counted twice."""
    fleet = RisingRig.of(Mode.ACT)
    rules = replace(RULES, cycle_usd_per_gpu=RULES.idle_usd_per_gpu_h / 60, later_ms=60_000)
    assert rules.keep_level == pytest.approx(0.5)
    fleet.rig.options = replace(fleet.rig.options, scaling=ScalingOptions(rules, Mode.ACT))
    fleet.rig.restart()
    for name in NAMES:
        fleet.hello(name)
    job = fleet.submit()
    fleet.ask(CordonNode(fleet.rig.core.state.attempts[f"{job}.1"].node))
    fleet.forecast()
    fleet.live(200)
    record = next(iter(fleet.rig.disk.scaled.values()))
    (shown,) = fleet.page().types
    assert (shown.need_gpus, shown.keep_gpus) == (record.need_gpus, record.keep_gpus) == (1, 2)


def test_more_needed_than_run_and_wait_says_why() -> None:
    """Four run, nobody waits, and nine are needed: whoever reads that wants to know of whom."""
    fleet = ScaledRig.of(Mode.OBSERVE)
    for _ in range(4):
        fleet.submit()
    fleet.live(61)
    (shown,) = fleet.page().types
    assert (shown.need_gpus, shown.need_reason) == (4, ""), "as many as run"
    fleet.soon = 9.0
    fleet.forecast()
    (shown,) = fleet.page().types
    assert (shown.running_gpus, shown.queued_gpus, shown.need_gpus) == (4, 0, 9)
    assert shown.need_reason == (
        "9 GPUs are needed, and 4 wanted now: in 95% of cases no more are wanted at once within"
        " 2 min; demand is known for less than a day, so it is taken to rise by chance alone"
    )
    fleet.submit()
    (shown,) = fleet.page().types
    assert "and 5 wanted now" in shown.need_reason
    assert "by the 4 that were wanted when that was forecast" in shown.need_reason
