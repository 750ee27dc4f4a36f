"""Leases: the level is the newsvendor's, lots are a part a day, and nothing is renewed above it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.deferral import Flexible, burst_hours
from coordinator.core.leasing import (
    DAYS,
    H_PER_DAY,
    LOT_RATIO_MAX,
    MS_PER_H,
    Fleet,
    Likely,
    Lot,
    Terms,
    likely,
    recommend,
)
from coordinator.lease_solver import solve

DAY_MS = H_PER_DAY * MS_PER_H
TERMS = Terms(lease_usd=1.0, burst_usd=2.0)

demands = st.lists(st.integers(0, 200), min_size=8, max_size=45).map(
    lambda days: [float(gpus + hour % 7) for gpus in days for hour in range(H_PER_DAY)]
)
prices = st.builds(
    Terms,
    lease_usd=st.floats(0.1, 5.0),
    burst_usd=st.floats(0.1, 10.0),
    lot_ratio=st.floats(0.02, LOT_RATIO_MAX),
)


@pytest.mark.long
@given(demands, prices, st.integers(0, 50))
@settings(max_examples=60)
def test_safety_lots_are_a_seventh_a_day_and_nothing_is_leased_above_the_level(
    hours: list[float], terms: Terms, owned: int
) -> None:
    lots: list[Lot] = []
    for day in range(len(hours) // H_PER_DAY):
        now_ms = day * DAY_MS
        fleet = Fleet("H100", owned, tuple(lots))
        said = recommend(now_ms, hours[: day * H_PER_DAY], fleet, terms)
        assert 0 <= said.lease_gpus <= max(1.0, said.level_gpus / 7 + 0.5)
        if said.lease_gpus:
            assert owned + said.leased_gpus + said.lease_gpus <= said.level_gpus + 0.5
            lots.append(Lot(said.lease_gpus, now_ms + terms.days * DAY_MS))
        assert said.leased_gpus == sum(lot.gpus for lot in lots if lot.ends_unix_ms > now_ms) - (
            said.lease_gpus
        )


@given(demands, prices)
@settings(max_examples=60)
def test_the_level_is_the_cheapest_for_demand_as_it_is_taken_to_be(
    hours: list[float], terms: Terms
) -> None:
    demand = likely(hours)

    def cost(gpus: float) -> float:
        return terms.lease_usd * gpus + terms.burst_usd * demand.above(gpus)[1]

    ratio = 1.0 - terms.used_ratio
    level = demand.quantile(ratio) if ratio > 0 else 0.0
    for other in (*demand.gpus[:: max(1, len(demand.gpus) // 20)], 0.0, level + 1.0):
        assert cost(level) <= cost(other) + 1e-6


def test_a_program_without_work_that_waits_has_the_same_level() -> None:
    """The linear program and the quantile are one rule, up to the one GPU that is worth just its
    price; a trace of waiting work has it solved."""
    hours = [float(50 + (37 * hour) % 101) for hour in range(40 * H_PER_DAY)]
    greedy = recommend(0, hours, Fleet("H100"), TERMS)
    programmed = recommend(0, hours, Fleet("H100"), TERMS, flexible=Flexible(1e-9), solve=solve)
    assert abs(programmed.level_gpus - greedy.level_gpus) <= 1
    assert programmed.worth_usd == pytest.approx(greedy.worth_usd, abs=1e-6)


def test_work_that_may_wait_is_served_on_fewer_gpus() -> None:
    """By day 100 GPUs are wanted and by night none: half of that will do for all of the time."""
    hours = [100.0 if hour % 24 < 14 else 0.0 for hour in range(40 * H_PER_DAY)]
    urgent = recommend(0, hours, Fleet("H100"), TERMS)
    waiting = recommend(0, hours, Fleet("H100"), TERMS, flexible=Flexible(1.0), solve=solve)
    assert urgent.level_gpus == 100
    assert waiting.level_gpus == round(100 * 14 / 24)


def test_alternatives_let_the_same_work_wait() -> None:
    """By day 100 GPUs are wanted and by night none. On 58 all of it is done if it waits, and no
    burst is paid for; whoever let nothing wait would pay for 42 of burst by day."""
    hours = [100.0 if hour % 24 < 14 else 0.0 for hour in range(40 * H_PER_DAY)]
    said = recommend(0, hours, Fleet("H100", 58), TERMS, flexible=Flexible(1.0), solve=solve)
    by_name = {one.name: one.expected_usd for one in said.alternatives}
    burst_h = max(0.0, 100 * 14 - 58 * 24)  # of a day
    assert by_name["nothing new"] == pytest.approx(30 * 2.0 * burst_h, rel=0.1)
    urgent = recommend(0, hours, Fleet("H100", 58), TERMS)
    at_once = {one.name: one.expected_usd for one in urgent.alternatives}
    assert at_once["nothing new"] == pytest.approx(30 * 2.0 * 42 * 14)


@given(demands, st.sampled_from([0.2, 0.7, 1.0]))
@settings(max_examples=10, deadline=None)
def test_no_alternative_is_dearer_when_work_may_wait_and_the_level_is_the_cheapest(
    hours: list[float], ratio: float
) -> None:
    terms = replace(TERMS, lot_ratio=LOT_RATIO_MAX)
    flexible = Flexible(ratio)
    waits = recommend(0, hours, Fleet("H100"), terms, flexible=flexible, solve=solve)
    urgent = recommend(0, hours, Fleet("H100"), terms)
    names = {one.name: one for one in urgent.alternatives}
    for one in waits.alternatives:
        known = names[one.name]
        if one.leased_gpus == known.leased_gpus:
            assert one.expected_usd <= known.expected_usd + 1e-6, one.name
    if waits.bound in ("level", "a part a day"):
        costs = {one.name: one.expected_usd for one in waits.alternatives}
        unit = terms.lease_usd * terms.days * H_PER_DAY  # the level is rounded to whole GPUs
        assert costs["the level at once"] <= min(costs.values()) + unit


def test_worth_of_one_more_falls_as_there_are_more() -> None:
    hours = [float(hour % 24) for hour in range(30 * H_PER_DAY)]
    worth = [
        recommend(0, hours, Fleet("H100", owned), TERMS).worth_usd for owned in (0, 6, 12, 18, 24)
    ]
    assert worth == sorted(worth, reverse=True)
    assert worth[0] == pytest.approx(2.0 * 23 / 24)
    assert worth[-1] == 0.0
    for owned, usd in zip((0, 6, 12, 18, 24), worth, strict=True):
        by_program = recommend(
            0, hours, Fleet("H100", owned), TERMS, flexible=Flexible(1e-9), solve=solve
        )
        assert by_program.worth_usd == pytest.approx(usd, abs=2.0 / 24 + 1e-6)


def test_nothing_is_leased_on_the_day_on_which_demand_has_collapsed() -> None:
    hours = [100.0] * (29 * H_PER_DAY) + [3.0] * H_PER_DAY
    said = recommend(0, hours, Fleet("H100", 5), TERMS)
    assert said.lease_gpus == 0
    assert said.bound == "break-even fall"
    assert said.level_gpus == 3
    assert said.sentence == (
        "lease nothing by break-even: 3 GPUs are needed for more than 50% of the time of the last"
        " day, and before that it was 100; 5 are owned and 0 leased"
    )


def test_what_was_rented_for_as_long_as_its_lease_costs_is_leased() -> None:
    """A fortnight and a half of a month at 40, and the week before less of it: by the month's own
    use a lease had paid."""
    hours = [40.0] * (16 * H_PER_DAY) + [0.0] * (13 * H_PER_DAY) + [40.0] * H_PER_DAY
    said = recommend(0, hours, Fleet("H100"), TERMS)
    assert said.level_gpus == 40
    assert said.bound == "a part a day"
    assert said.lease_gpus == 4


def test_a_lease_that_costs_as_much_as_burst_is_not_taken() -> None:
    said = recommend(0, [50.0] * 30 * H_PER_DAY, Fleet("H100"), Terms(2.0, 2.0))
    assert (said.lease_gpus, said.level_gpus, said.bound) == (0, 0, "price")
    assert said.sentence == (
        "lease nothing: a lease at $2.00 an hour is no cheaper than burst at $2.00, which is paid"
        " for only while it is used; 0 are owned and 0 leased"
    )


def test_a_lot_is_a_tenth_of_the_level_and_not_of_what_is_missing() -> None:
    said = recommend(0, [495.0] * 30 * H_PER_DAY, Fleet("H100", 400), TERMS)
    assert (said.level_gpus, said.lease_gpus, said.bound) == (495, 49, "a part a day")
    tomorrow = recommend(0, [495.0] * 30 * H_PER_DAY, Fleet("H100", 449), TERMS)
    assert (tomorrow.lease_gpus, tomorrow.bound) == (46, "level")


def test_less_than_a_lot_is_not_leased_and_the_sentence_says_so() -> None:
    said = recommend(0, [45.0] * 30 * H_PER_DAY, Fleet("H100", 40), replace(TERMS, unit_gpus=8))
    assert (said.lease_gpus, said.bound) == (0, "whole lots")
    assert said.sentence.startswith("lease nothing: 5 are missing, fewer than a lot of 8: 45 GPUs")


def test_a_record_has_its_numbers_and_a_sentence() -> None:
    hours = [float(100 + hour % 24) for hour in range(30 * H_PER_DAY)]
    lots = (Lot(20, DAY_MS), Lot(30, 0))
    said = recommend(0, hours, Fleet("H100", 40, lots), TERMS)
    assert said.leased_gpus == 20, "what has run out is no lease"
    assert said.sentence == (
        "lease 11 of the 51 that are missing, for 30 days at $1.00 an hour: 111 GPUs are needed for"
        " more than 50% of the time, where burst at $2.00 is dearer; 40 are owned and 20 leased"
    )
    costs = {each.name: each.expected_usd for each in said.alternatives}
    assert costs["the level at once"] == min(costs.values())
    assert costs["chosen"] < costs["nothing new"] < costs["all burst"]
    assert said.quantiles == tuple(sorted(said.quantiles))


def test_less_than_a_week_is_no_history() -> None:
    hours = [math.nan] * 100 + [5.0] * 167
    said = recommend(0, hours, Fleet("H100"), TERMS)
    assert (said.lease_gpus, said.bound) == (0, "no history")
    assert "7.0 days of demand are known, and 7" in said.sentence


def test_outages_teach_nothing() -> None:
    hours = [float(10 + hour % 5) for hour in range(30 * H_PER_DAY)]
    holes = [math.nan if 300 <= hour < 360 else gpus for hour, gpus in enumerate(hours)]
    assert recommend(0, holes, Fleet("H"), TERMS).level_gpus == 12
    assert len(likely([math.nan] * 48, DAYS).gpus) == 0


def test_leases_come_in_nodes() -> None:
    said = recommend(0, [100.0] * 30 * 24, Fleet("H100", 3), replace(TERMS, unit_gpus=8))
    assert said.lease_gpus == 8


def test_more_than_a_seventh_a_day_cannot_be_set() -> None:
    with pytest.raises(ValueError, match="at most a seventh"):
        Terms(1.0, 2.0, lot_ratio=0.2)


@pytest.mark.long
@given(
    st.lists(st.floats(0, 50), min_size=1, max_size=80),
    st.lists(st.floats(0, 50), min_size=80, max_size=80),
    st.floats(0, 1),
    st.integers(1, 30),
)
def test_all_work_is_served_and_burst_is_no_more_than_what_is_short(
    demand: list[float], supply: list[float], ratio: float, wait_h: int
) -> None:
    supply = supply[: len(demand)]
    burst = burst_hours(demand, supply, Flexible(ratio, wait_h))
    short = sum(max(0.0, gpus - there) for gpus, there in zip(demand, supply, strict=True))
    assert sum(burst) <= short + 1e-6, "who may wait costs no more"
    assert sum(burst) + sum(supply) >= sum(demand) - 1e-6
    assert burst_hours(demand, supply, Flexible()) == pytest.approx(
        [max(0.0, gpus - there) for gpus, there in zip(demand, supply, strict=True)]
    )


def test_nobody_waits_longer_than_he_may() -> None:
    burst = burst_hours([10.0, 0, 0, 0, 0, 0], [0.0] * 6, Flexible(0.5, 3))
    assert burst == [5.0, 0, 0, 5.0, 0, 0]


def test_a_quantile_counts_by_weight() -> None:
    demand = Likely((1.0, 5.0), (0.9, 0.1))
    assert (demand.quantile(0.9), demand.quantile(0.91)) == (1.0, 5.0)
    assert demand.above(1.0) == pytest.approx((0.1, 0.4))
