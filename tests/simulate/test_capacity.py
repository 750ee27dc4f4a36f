"""Replays of power: cases known by hand, judges that bite, and Baton between timeout and limit."""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.capacity_model import Box
from coordinator.core.guard_rails import Bounds
from coordinator.core.scaling import Rules
from coordinator.sim.capacity_checks import check_capacity, check_rails
from coordinator.sim.capacity_policies import AlwaysOn, BatonPower, Clairvoyant, IdleTimeout
from coordinator.sim.capacity_replay import (
    Boxes,
    Orders,
    PowerOutcome,
    PowerPolicy,
    Seen,
    Step,
    replay,
)
from coordinator.sim.capacity_report import figures

FLEET = Boxes(10, 8, busy_w=1_000, idle_w=500, usd_per_kwh=0.1)
BOUNDS = Bounds()
MINUTE = 60_000


def waves(days: int, per_hour: int = 6) -> list[float]:
    """Two nodes at night, eight by day."""
    hours = range(24 * days * per_hour)
    return [40 - 24 * math.cos(2 * math.pi * step / 24 / per_hour) for step in hours]


def ran(values: Sequence[float], policy: PowerPolicy, begin: int = 0) -> PowerOutcome:
    return replay(values, 6, FLEET, policy, begin)


def test_always_on_saves_nothing_and_lets_nobody_wait() -> None:
    found = figures(ran([8.0] * 12, AlwaysOn()), FLEET)
    assert (found.waiting_ratio, found.saved_ratio, found.off_ratio) == (0, 0, 0)
    assert found.energy_kwh == pytest.approx(2 * (1 * 1.0 + 9 * 0.5))
    assert found.usd_per_day == pytest.approx(24 * 5.5 * 0.1)
    assert found.limit_ratio == pytest.approx(0.9)


def test_a_timeout_switches_off_after_an_hour_and_lets_work_wait_for_a_boot() -> None:
    outcome = ran([8.0] * 12 + [20.0] * 3, IdleTimeout())
    assert [step.on for step in outcome.steps] == [10] * 7 + [1] * 6 + [3] * 2
    assert [step.waits for step in outcome.steps] == [False] * 12 + [True, False, False]
    assert outcome.steps[12].starting == 2


def test_who_knows_the_future_is_there_in_time_with_no_node_too_many() -> None:
    values = [8.0] * 3 + [20.0] * 2 + [8.0] * 2
    outcome = ran(values, Clairvoyant(values, 6, FLEET))
    assert [step.on for step in outcome.steps] == [1, 1, 1, 3, 3, 1, 1]
    assert [step.starting for step in outcome.steps] == [0, 0, 2, 0, 0, 0, 0]
    assert not any(step.waits for step in outcome.steps)


def test_what_no_fleet_could_hold_does_not_count_as_waiting() -> None:
    outcome = ran([200.0] * 3, AlwaysOn())
    assert [(step.wanted, step.busy, step.waits) for step in outcome.steps] == [(10, 10, False)] * 3


def test_baton_switches_nothing_in_a_gap_which_does_not_count() -> None:
    values = waves(6)
    gap = range(700, 710)
    for step in gap:
        values[step] = math.nan
    outcome = ran(values, BatonPower(FLEET, 6, Rules()), 288)
    unknown = [step for step in outcome.steps if not step.known]
    assert [step.at_ms // (10 * MINUTE) for step in unknown] == list(gap)
    deeds = [each for each in outcome.switches if each.what != "up"]
    assert deeds
    assert not [each for each in deeds if each.at_ms // (10 * MINUTE) in gap]


def test_baton_lets_less_wait_than_a_timeout_and_saves_less_than_who_knows() -> None:
    values = waves(10)
    policies = (
        IdleTimeout(),
        BatonPower(FLEET, 6, Rules(idle_usd_per_gpu_h=0.05)),
        Clairvoyant(values, 6, FLEET),
    )
    timeout, ours, limit = (figures(ran(values, each, 432), FLEET) for each in policies)
    assert ours.waiting_ratio < timeout.waiting_ratio / 2
    assert 0.5 * limit.saved_ratio < ours.saved_ratio < limit.saved_ratio
    assert limit.waiting_ratio == 0
    assert limit.off_ratio <= limit.limit_ratio


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**40))
def test_in_any_demand_baton_stays_within_its_bounds(seed: int) -> None:
    chance = Random(seed)
    nodes, spares = chance.randint(2, 30), chance.randint(0, 2)
    boot_s = chance.choice((300.0, 600.0, 1500.0))
    values, gpus = [], 60.0
    for _ in range(chance.randint(20, 300)):
        jump = chance.choice((0.0, 1.0, 8.0, 80.0))
        gpus = min(240.0, max(0.0, gpus + chance.uniform(-jump, jump)))
        values.append(math.nan if chance.random() < 0.02 else gpus)
    fleet = replace(FLEET, nodes=nodes, boot_s=boot_s)
    bounds = Bounds(spares_min=spares)
    rules = Rules(bounds=bounds, idle_ms_min=20 * MINUTE, cycle_usd_per_gpu=0.0)
    outcome = replay(values, 6, fleet, BatonPower(fleet, 6, rules), 10)
    assert check_capacity(outcome, fleet) == []
    assert check_rails(outcome, fleet, bounds) == []


class Bad:
    """Orders by step, whatever is wanted."""

    name = "bad"

    def __init__(self, orders: dict[int, Orders]) -> None:
        self._orders = orders

    def warm_up(self, gpus: float) -> None:
        """It learns nothing."""

    def decide(self, seen: Seen, boxes: Sequence[Box]) -> Orders:
        return self._orders.get(seen.now_ms // (10 * MINUTE), Orders())


def test_who_goes_off_with_work_is_caught() -> None:
    outcome = ran([80.0] * 3, Bad({1: Orders(stop=["n03"])}))
    assert any("with 8 GPUs at work" in each for each in check_capacity(outcome, FLEET))


def test_capacity_that_is_not_there_is_caught() -> None:
    outcome = ran([8.0] * 3, AlwaysOn())
    assert check_capacity(outcome, FLEET) == []

    def with_step(**changes: int) -> PowerOutcome:
        wrong: Step = replace(outcome.steps[0], **changes)  # type: ignore[arg-type]
        return replace(outcome, steps=(wrong, *outcome.steps[1:]))

    for wrong in (with_step(on=9), with_step(starting=1), with_step(busy=2), with_step(wanted=2)):
        assert check_capacity(wrong, FLEET)


def test_a_boot_that_took_no_time_is_caught() -> None:
    outcome = ran([8.0] * 12 + [20.0] * 3, IdleTimeout())
    assert check_capacity(outcome, FLEET) == []
    assert check_capacity(outcome, replace(FLEET, boot_s=900.0))


def test_each_bound_that_is_broken_is_caught() -> None:
    values = [8.0] * 40
    two = Orders(stop=["n09", "n10"])
    assert any(
        "stop within" in each for each in check_rails(ran(values, Bad({1: two})), FLEET, BOUNDS)
    )
    many = {1: Orders(stop=["n08", "n09", "n10"]), 9: Orders(start=["n08", "n09", "n10"])}
    assert any(
        "start within" in each for each in check_rails(ran(values, Bad(many)), FLEET, BOUNDS)
    )
    short = {n: Orders(stop=["n10"]) if n % 2 else Orders(start=["n10"]) for n in range(1, 12)}
    found = check_rails(ran(values, Bad(short)), FLEET, BOUNDS)
    assert any("ms after it was switched on" in each for each in found)
    assert any("5 times within a day" in each for each in found)
    none_left = {1: Orders(stop=[f"n{n:02}" for n in range(2, 11)])}
    found = check_rails(ran(values, Bad(none_left)), FLEET, BOUNDS)
    assert any("0 empty ones stayed" in each for each in found)
