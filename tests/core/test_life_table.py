"""How much longer jobs live: as their age says where nobody has ended, else as those before did."""

import math
import random
from collections.abc import Callable

import pytest

from coordinator.core import life_table
from coordinator.core.demand_history import DAY_MS, MINUTE_MS
from coordinator.core.life_table import Course, LifeTable, kind_of

HOUR_MS = 60 * MINUTE_MS
ONE, BOX = kind_of("A100", 1), kind_of("A100", 8)


def lives(course: Course, age_ms: float, ahead_ms: float) -> float:
    return course.to_live(age_ms, (ahead_ms,))[0]


def told(lasted_h: Callable[[random.Random], float], count: int = 2_000) -> LifeTable:
    chance, table = random.Random(7), LifeTable()
    for _ in range(count):
        table.ended(ONE, round(lasted_h(chance) * HOUR_MS))
    return table


@pytest.mark.parametrize("age_min", [0.5, 1, 7, 300, 40_000, 400_000])
def test_without_a_past_the_age_alone_counts(age_min: float) -> None:
    course = LifeTable().among([]).course(ONE)
    for ahead_min in (0, 0.25, 5, 600, 200_000):
        age = max(1.0, age_min)
        assert lives(course, age_min * MINUTE_MS, ahead_min * MINUTE_MS) == pytest.approx(
            age / (age + ahead_min)
        )


def test_lives_without_memory_are_learned_as_such() -> None:
    """Whatever the age: the chance to go on for an hour is the same."""
    course = told(lambda chance: chance.expovariate(1 / 3)).among([]).course(ONE)
    for age_h in (0.5, 1, 3, 8):
        assert lives(course, age_h * HOUR_MS, HOUR_MS) == pytest.approx(math.exp(-1 / 3), abs=0.05)


def test_who_lasts_for_two_hours_is_there_until_then() -> None:
    course = told(lambda chance: chance.gauss(2, 0.02)).among([]).course(ONE)
    assert lives(course, 5 * MINUTE_MS, HOUR_MS) > 0.95
    assert lives(course, 110 * MINUTE_MS, HOUR_MS) < 0.2  # a band is two hours and what is near


def test_leaving_out_those_who_live_would_make_old_age_rare() -> None:
    table = told(lambda chance: 0.2, count=20)
    alone = lives(table.among([]).course(ONE), 0.1 * HOUR_MS, HOUR_MS)
    seen = lives(table.among([(ONE, 9 * HOUR_MS, 60)]).course(ONE), 0.1 * HOUR_MS, HOUR_MS)
    assert alone < 0.2
    assert seen > 0.6


def test_a_size_is_as_all_of_them_until_enough_of_it_have_ended() -> None:
    table = told(lambda chance: chance.gauss(2, 0.02))
    young, hour = 5 * MINUTE_MS, HOUR_MS
    assert lives(table.among([]).course(BOX), young, hour) > 0.95
    table.ended(BOX, 20 * MINUTE_MS)
    few = lives(table.among([]).course(BOX), young, hour)
    for _ in range(60):
        table.ended(BOX, 20 * MINUTE_MS)
    assert few > 0.4
    assert lives(table.among([]).course(BOX), young, hour) < 0.1
    assert lives(table.among([]).course(ONE), young, hour) > 0.95


def test_what_is_forgotten_leaves_the_age_alone_and_old_ends_count_less() -> None:
    table = told(lambda chance: chance.gauss(2, 0.02))
    table.forget(days=3_000)
    assert lives(table.among([]).course(ONE), HOUR_MS, HOUR_MS) == pytest.approx(0.5)
    table.ended(ONE, 10 * MINUTE_MS, ago_ms=3_000 * DAY_MS)
    assert lives(table.among([]).course(ONE), HOUR_MS, HOUR_MS) == pytest.approx(0.5)
    table.ended(ONE, 10 * MINUTE_MS, ago_ms=-DAY_MS)  # the clock was set back
    assert lives(table.among([]).course(ONE), 9 * MINUTE_MS, HOUR_MS) < 0.1


def test_it_is_bounded_and_whoever_comes_late_counts_with_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(life_table, "KINDS_MAX", 2)
    table = LifeTable()
    for number in range(9):
        table.ended(kind_of(f"T{number}", 1), HOUR_MS)
    assert len(table.among([(kind_of("T99", 1), HOUR_MS, 1)])._courses) == 3


def test_who_did_not_live_for_a_minute_says_nothing_of_those_who_have() -> None:
    table = told(lambda chance: 0.01)
    assert lives(table.among([]).course(ONE), HOUR_MS, HOUR_MS) == pytest.approx(0.5)
    assert lives(table.among([]).course(ONE), MINUTE_MS, MINUTE_MS) == pytest.approx(0.5)
