"""Leases over a whole series: nobody pays less than the clairvoyant, and sums are right."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.deferral import Flexible
from coordinator.core.leasing import H_PER_DAY, Terms
from coordinator.lease_solver import solve
from coordinator.sim.clairvoyant import hindsight
from coordinator.sim.lease_replay import BASELINES, FIRST_DAY, baseline, bill, replayed

TERMS = Terms(lease_usd=1.0, burst_usd=2.0)
days = st.lists(st.integers(0, 60), min_size=12, max_size=40)


def hours_of(levels: list[int]) -> list[float]:
    return [float(level + (hour * hour) % 5) for level in levels for hour in range(H_PER_DAY)]


@given(days)
@settings(max_examples=20, deadline=None)
def test_nobody_pays_less_than_the_clairvoyant(levels: list[int]) -> None:
    hours = hours_of(levels)
    begin = FIRST_DAY * H_PER_DAY
    least = hindsight(hours[begin:], TERMS, solve)
    leased = replayed(hours, TERMS)
    assert bill(hours[begin:], leased[begin:], TERMS).usd >= least.usd - 1e-6
    for name in BASELINES:
        assert baseline(name, hours, begin, TERMS).usd >= least.usd - 1e-6
    waiting = hindsight(hours[begin:], TERMS, solve, Flexible(0.3))
    assert waiting.usd <= least.usd + 1e-6
    paid = bill(hours[begin:], leased[begin:], TERMS, Flexible(0.3))
    assert paid.usd >= waiting.usd - 1e-6


@given(days, st.integers(0, 70))
@settings(max_examples=30)
def test_a_bill_adds_up(levels: list[int], supply: int) -> None:
    hours = hours_of(levels)
    paid = bill(hours, [supply] * len(hours), TERMS)
    assert paid.usd == pytest.approx(paid.leased_gpu_hours + 2.0 * paid.burst_gpu_hours)
    used = paid.leased_gpu_hours + paid.burst_gpu_hours - paid.idle_gpu_hours
    assert used == pytest.approx(sum(hours))


def test_the_clairvoyant_of_even_demand_leases_all_of_it() -> None:
    best = hindsight([7.0] * 40 * H_PER_DAY, TERMS, solve)
    assert best.usd == pytest.approx(7.0 * 40 * H_PER_DAY)
    assert best.leased_gpus == pytest.approx([7.0] * 40)
    assert best.worth_usd == pytest.approx(1.0)


def test_the_clairvoyant_rents_by_the_hour_what_is_seldom_needed() -> None:
    """Ten hours of a month are no lease."""
    hours = [7.0] * 30 * H_PER_DAY
    hours[100:110] = [9.0] * 10
    assert hindsight(hours, TERMS, solve).usd == pytest.approx(7.0 * 720 + 2 * 10 * 2.0)


def test_leases_follow_demand_down_within_a_term() -> None:
    hours = [100.0] * 40 * H_PER_DAY + [10.0] * 32 * H_PER_DAY
    leased = replayed(hours, TERMS)
    assert leased[40 * H_PER_DAY - 1] == 100
    assert leased[-1] <= 10
    by_day = leased[::H_PER_DAY]
    assert max(later - day for day, later in pairwise(by_day)) <= 100 / 7


def test_nothing_found_is_an_error() -> None:
    with pytest.raises(ValueError, match="no optimum"):
        hindsight([1.0] * 24, TERMS, lambda _program: None)
