"""Life tables: age and size tell who stays, what still runs counts, and a forecast gains by it."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from coordinator.forecast.backtest import backtest
from coordinator.forecast.forecaster import KINDS, Forecaster
from coordinator.forecast.quantiles import Floats
from coordinator.forecast.survival import (
    HOUR_S,
    Holds,
    LifeTable,
    held_on_average,
    stays,
    still_wanted,
)


def table_of(lasted_s: list[float], gpus: float = 1) -> LifeTable:
    table = LifeTable()
    table.ended(np.full(len(lasted_s), gpus), np.array(lasted_s))
    return table


def chances(table: LifeTable, *running: tuple[float, float]) -> Floats:
    """Of these, by GPUs and age, in an hour."""
    gpus, ages_s = np.array(running).T
    (found,) = table.chances(gpus, ages_s, [HOUR_S])
    return np.asarray(found)


def test_where_age_means_nothing_everybody_has_the_same_chance() -> None:
    chance = random.Random(1)
    table = table_of([chance.expovariate(1 / (2 * HOUR_S)) for _ in range(20_000)])
    for age_s in (60.0, HOUR_S, 4 * HOUR_S):
        (alive,) = chances(table, (1, age_s))
        assert alive == pytest.approx(math.exp(-0.5), abs=0.04)


def test_where_most_are_short_whoever_is_old_stays() -> None:
    chance = random.Random(2)
    table = table_of([60 * chance.paretovariate(0.8) for _ in range(5_000)])
    young, old = chances(table, (1, 300.0), (1, 24 * HOUR_S))
    assert young == pytest.approx((300 / 3900) ** 0.8, abs=0.05)
    assert old > 0.9


def test_sizes_differ_once_they_have_shown_it_and_begin_as_all_do() -> None:
    table = table_of([HOUR_S * (0.6 + 0.001 * place) for place in range(500)], gpus=1)
    one, eight = (1, 0.5 * HOUR_S), (8, 0.5 * HOUR_S)
    before = chances(table, one, eight)
    assert before.max() < 0.2
    table.ended(np.full(500, 8.0), np.full(500, 20 * HOUR_S))
    small, large = chances(table, one, eight)
    assert small < 0.2
    assert large > 0.9


def test_what_still_runs_counts_as_lived() -> None:
    """Only the short ones have ended; the hundred that have not are no sign of a short life."""
    table = table_of([HOUR_S] * 10)
    alone = chances(table, (1, 0.9 * HOUR_S))[0]
    among = chances(table, (1, 0.9 * HOUR_S), *[(1, 5 * HOUR_S)] * 100)[0]
    assert alone < 0.4
    assert among > 0.8


def test_what_is_old_is_forgotten() -> None:
    table = table_of([HOUR_S] * 200)
    table.forget(days=300)
    table.ended(np.ones(50), np.full(50, 30 * HOUR_S))
    assert chances(table, (1, HOUR_S))[0] > 0.9


def test_before_anything_has_ended_there_is_a_chance_and_age_helps() -> None:
    young, old = chances(LifeTable(), (1, 60.0), (1, 100 * HOUR_S))
    assert 0 < young < old < 1


def test_an_age_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="less than no time"):
        LifeTable().ended(np.ones(1), -np.ones(1))


def drawn(hours: float, seed: int) -> Holds:
    """Most are short; a few large ones last for days, and such a one that is old stays."""
    chance = random.Random(seed)
    made = []
    at = 0.0
    while at < hours:
        at += chance.expovariate(6)
        long = chance.random() < 0.05
        lasts_h = chance.expovariate(1 / 40) if long else chance.expovariate(1)
        made.append((chance.choice((8.0, 32.0)) if long else 8.0, at, at + lasts_h))
    return Holds(*np.array(made).T)


def held_by(holds: Holds, hours: int) -> list[float]:
    return [
        float(holds.gpus @ ((holds.begin_h < hour) & (holds.end_h > hour)))
        for hour in range(1, hours)
    ]


def test_a_forecast_gains_by_the_ages_of_what_runs() -> None:
    """The same series, six hours ahead, once with and once without what the life table says."""
    ahead_h, hours = 3, 24 * 24
    made = drawn(hours, seed=4)
    held = held_by(made, hours)
    (staying,) = stays(made, len(held), 1, (ahead_h,))
    kinds = [kind for kind in KINDS if kind.name in ("persistence", "skewed return", "ages")]
    told = Forecaster(ahead_h, 1, kinds=kinds)
    score = backtest(told, held, 24 * 14, told={"ages": staying})
    without = backtest(Forecaster(ahead_h, 1, kinds=kinds), held, 24 * 14)
    assert score.loss < 0.96 * without.loss
    assert told.weights()["ages"] > 0.4


def test_what_waits_stays_and_an_outage_is_not_known() -> None:
    """A job of two GPUs began at the first hour; the second step was an outage."""
    holds = Holds(np.array([2.0]), np.array([1.0]), np.array([math.inf]))
    early, unknown, later = still_wanted(holds, [7.0, math.nan, 7.0], 1, (1,))[0]
    assert early == 7.0
    assert math.isnan(unknown)
    assert 5.0 < later < 7.0


def test_what_left_within_a_step_is_gone_and_what_came_is_there() -> None:
    """Half an hour of eight GPUs, and half an hour of two so far."""
    holds = Holds(np.array([8.0, 2.0]), np.array([0.0, 0.5]), np.array([0.5, math.inf]))
    assert list(held_on_average(holds, 2, 1)) == [5.0, 2.0]
    assert still_wanted(holds, [6.0], 1, (1,))[0] == 1.0 + stays(holds, 1, 1, (1,))[0]
    assert 0 < stays(holds, 1, 1, (1,))[0] < 2.0


def test_what_cannot_be_known_is_not_said() -> None:
    holds = Holds(np.array([2.0]), np.array([1.0]), np.array([math.inf]))
    (since,) = still_wanted(replace(holds, since_h=2.5), [7.0, 7.0, 7.0], 1, (1,))
    assert list(np.isnan(since)) == [True, True, False]
    nobody = Holds(*np.zeros((3, 0)))
    assert [list(each) for each in still_wanted(nobody, [3.0], 6, (1, 24))] == [[3.0], [3.0]]


def test_a_life_that_ends_before_it_begins_has_no_age() -> None:
    """The wall clock was set in between."""
    odd = Holds(np.ones(2), np.array([5.0, 9.0]), np.array([1.5, math.inf]))
    (said,) = still_wanted(odd, [1.0] * 4, 1, (1,))
    assert list(said) == [1.0] * 4


@pytest.mark.parametrize("since_h", [-math.inf, 0.0])
def test_when_the_oldest_are_not_kept_those_that_are_do_not_look_immortal(since_h: float) -> None:
    """Jobs of five hours on average, one that is old like another, for two days."""
    begin_h = np.arange(-48 * 60, 240) / 60
    end_h = begin_h + np.random.default_rng(3).exponential(5.0, len(begin_h))
    kept = end_h > since_h
    holds = Holds(np.ones(kept.sum()), begin_h[kept], end_h[kept], since_h)
    held = ((begin_h < 4) & (end_h > 4)).sum()
    assert stays(holds, 4, 1, (1,))[0, -1] / held == pytest.approx(math.exp(-0.2), abs=0.02)


def test_who_is_not_told_for_a_while_goes_on_without() -> None:
    forecaster = Forecaster(1, 1)
    chance = random.Random(5)
    for _ in range(24 * 12):
        gpus = 100.0 + chance.randrange(20)
        forecaster.observe(gpus, {"ages": gpus - 10})
    assert "ages" in forecaster.by_model()
    forecaster.observe(105.0)
    assert "ages" not in forecaster.by_model()
    assert forecaster.forecast()[4] == pytest.approx(110, abs=15)


@pytest.mark.parametrize("per_hour", [1, 6])
def test_who_looks_at_those_there_sees_what_a_look_at_all_shows(per_hour: int) -> None:
    """Jobs from before the series and beyond it, ends before begins, and some that go on."""
    random, jobs, hours = np.random.default_rng(8), 300, 60
    begin_h = random.uniform(-20.0, hours + 5.0, jobs)
    end_h = begin_h + random.lognormal(0.0, 2.0, jobs)
    end_h[::9] = math.inf
    end_h[::31] = begin_h[::31] - 1.0
    holds = Holds(random.choice([0.5, 1.0, 8.0], jobs), begin_h, end_h)
    steps = hours * per_hour
    bounds_h = np.arange(steps + 1) / per_hour
    spent = np.clip(np.minimum(end_h, bounds_h[:, None]) - begin_h, 0.0, None) @ holds.gpus
    assert held_on_average(holds, steps, per_hour) == pytest.approx(np.diff(spent) * per_hour)
    certain = stays(holds, steps, per_hour, (0,))[0]
    now_h = bounds_h[1:, None]
    assert certain == pytest.approx(((begin_h < now_h) & (end_h > now_h)) @ holds.gpus)


def test_who_waits_is_told_of_each_step() -> None:
    heard: list[int] = []
    holds = Holds(np.array([2.0]), np.array([1.0]), np.array([math.inf]), since_h=2.0)
    still_wanted(holds, [1.0] * 5, 1, (1,), passed=heard.append)
    assert sum(heard) == 5
