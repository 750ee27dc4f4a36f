"""Forecasts: from the first hour on, with bands that hold, and never learning from an outage."""

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest

from coordinator.forecast.backtest import backtest
from coordinator.forecast.forecaster import KINDS, Forecaster
from coordinator.forecast.mixture import ALONE_MAX, LOW_OUTCOMES, Mixture
from coordinator.forecast.quantiles import LEVELS, of_samples, pinball

MEDIAN = len(LEVELS) // 2


def wandering(hours: int, seed: int, *, pull: float = 0.05, daily: float = 0.0) -> Iterator[float]:
    """Demand that wanders around 200, is pulled back, and may breathe with the hour of the day."""
    chance = random.Random(seed)
    level = 0.0
    for hour in range(hours):
        level += chance.gauss(0, 6) - pull * level
        yield max(0.0, round(200 + level + daily * math.sin(2 * math.pi * hour / 24)))


def told(forecaster: Forecaster, values: Iterator[float]) -> Forecaster:
    for gpus in values:
        forecaster.observe(gpus)
    return forecaster


def test_there_is_a_forecast_from_the_first_hour_on_and_it_rises_with_the_quantile() -> None:
    forecaster = Forecaster(6, 1)
    assert not forecaster.forecast().any()
    for gpus in wandering(24 * 24, seed=1):
        forecaster.observe(gpus)
        said = forecaster.forecast()
        assert np.all(np.diff(said) >= 0)
        assert np.all(said >= 0)
        assert np.all(np.isfinite(said))


def test_each_rung_needs_its_hours_of_clean_history() -> None:
    forecaster = Forecaster(1, 1)
    seen = []
    for day in range(23):
        told(forecaster, wandering(24, seed=day))
        forecaster.forecast()
        seen.append(set(forecaster.by_model()))
    assert seen[0] <= {"persistence"}
    assert seen[2] == {"persistence"}
    assert "skewed return" in seen[8]
    assert "skewed regression" not in seen[8]
    assert "ridge" not in seen[19]
    assert "skewed return" in seen[19]
    retired = {"scaled persistence", "skewed return"}
    assert seen[22] == {kind.name for kind in KINDS if not kind.needs_told} - retired


def test_demand_that_comes_back_to_its_mean_is_forecast_better_than_as_it_is() -> None:
    score = backtest(Forecaster(24, 1), list(wandering(24 * 50, 1, pull=0.1)), 24 * 14)
    assert score.ratio < 0.9
    assert 0.9 <= score.covered_95_ratio <= 0.99


def test_demand_that_breathes_is_forecast_by_the_hour_of_the_day() -> None:
    values = list(wandering(24 * 35, 4, pull=0.3, daily=80.0))
    assert backtest(Forecaster(6, 1), values, 24 * 14).ratio < 0.6


def test_where_nothing_can_be_known_little_is_lost() -> None:
    score = backtest(Forecaster(6, 1), list(wandering(24 * 40, 5, pull=0.0)), 24 * 14)
    assert score.ratio < 1.05


def test_an_outage_is_not_learned_from() -> None:
    """A day of zeros would be; a day of gaps is bridged, and what is said afterwards is near what
    is said had it not been."""
    values = list(wandering(24 * 30, seed=7))
    masked = values[: 24 * 20] + [math.nan] * 24 + values[24 * 21 :]
    dead = values[: 24 * 20] + [0.0] * 24 + values[24 * 21 :]
    whole, gap, zeros = (
        told(Forecaster(6, 1), iter(each)).forecast() for each in (values, masked, dead)
    )
    band = whole[-1] - whole[0]
    assert abs(gap - whole).max() < 0.25 * band
    assert zeros[-1] - zeros[0] > 1.1 * band


def test_an_outage_of_more_than_a_week_ends_in_what_was_known_last() -> None:
    """Nothing that models look at is known then; those that were fitted in it are asked at once."""
    forecaster = told(Forecaster(6, 1), wandering(24 * 8, seed=3))
    for hours in (24 * 10, 1):
        told(forecaster, iter([math.nan] * hours))
        said = forecaster.forecast()
        assert said[0] < 200 < said[-1]


def test_when_something_changes_persistence_speaks_until_it_is_over() -> None:
    mixture = Mixture({"persistence": 0.0, "other": 0.0})
    near, far = np.full(len(LEVELS), 100.0), np.full(len(LEVELS), 160.0)
    for _ in range(60):
        mixture.learn(100.0, {"persistence": near, "other": near}, near)
    assert not mixture.drifted
    for _ in range(24):
        mixture.learn(100.0, {"persistence": near + 1, "other": far}, far)
    assert mixture.drifted
    said = mixture.combine({"persistence": near, "other": far})
    assert abs(said - near).max() < 1e-6
    for _ in range(300):
        mixture.learn(100.0, {"persistence": near + 1, "other": near}, near)
    assert not mixture.drifted


def test_whoever_was_worse_for_three_weeks_is_not_heard() -> None:
    mixture = Mixture({"persistence": 0.0, "worse": 0.0})
    forecast = np.linspace(90.0, 110.0, len(LEVELS))
    for hour in range(504):
        actual = 100.0 + (hour % 5 - 2) * 5
        worse = forecast + (12.0 if hour % 2 else -12.0)
        mixture.learn(actual, {"persistence": forecast, "worse": worse}, forecast)
    assert mixture.weights(["persistence", "worse"])["worse"].max() < 1e-6


def test_the_pinball_loss_is_least_at_the_quantile() -> None:
    samples = np.array([random.Random(3).gauss(50, 10) for _ in range(500)])
    best = of_samples(samples, np.ones(len(samples)))
    mean = np.mean([pinball(each, best) for each in samples], axis=0)
    for moved in (best + 3, best - 3):
        assert np.all(np.mean([pinball(each, moved) for each in samples], axis=0) > mean)


@pytest.mark.parametrize("wrong", [-1.0, math.inf])
def test_what_is_no_count_of_gpus_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="count of GPUs"):
        Forecaster(1, 1).observe(wrong)


def test_what_is_kept_is_bounded() -> None:
    forecaster = Forecaster(1, 1)
    for gpus in wandering(24 * 52, seed=9):
        forecaster.observe(gpus, {"ages": 0.8 * gpus})
    assert len(forecaster._values) == len(forecaster._told["ages"]) == forecaster._values.maxlen
    assert len(forecaster._said) <= 2


def test_bands_are_wider_where_few_outcomes_were_seen() -> None:
    forecast = np.linspace(90.0, 110.0, len(LEVELS))
    said = {
        outcomes: Mixture({"persistence": 0.0}, outcomes=outcomes).combine(
            {"persistence": forecast}
        )
        for outcomes in (5.0, 20.0, math.inf)
    }
    assert said[math.inf] == pytest.approx(forecast)
    assert said[5.0][MEDIAN] == said[20.0][MEDIAN] == forecast[MEDIAN]
    widths = [np.ptp(each) for each in said.values()]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] < 2 * widths[-1]


def fallen(days: int, seed: int) -> list[float]:
    """A project that wanders for so many days, and then has ended but for a rest."""
    wanders = list(wandering(24 * days, seed, pull=0.1))
    return wanders + [40.0 + hour % 3 for hour in range(24 * 4)]


def test_below_all_that_was_seen_persistence_speaks_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has seen demand come back from there; where somebody has, models are heard again."""
    values = fallen(20, seed=11)
    guarded = backtest(Forecaster(24, 1), values, 24 * 20)
    monkeypatch.setattr("coordinator.forecast.mixture.LOW_OUTCOMES", 1e-9)
    assert guarded.loss < 0.98 * backtest(Forecaster(24, 1), values, 24 * 20).loss
    monkeypatch.undo()
    forecaster = Forecaster(24, 1)
    heard = []
    for gpus in values:
        forecaster.observe(gpus)
        if gpus < 100:
            forecaster.forecast()
            heard.append(1.0 - forecaster.weights()["persistence"])
    assert heard[0] <= 1.0 - ALONE_MAX
    assert heard[-1] > 1.5 * heard[0]


@pytest.mark.parametrize("known", [0.0, 0.5, 9.0])
def test_models_count_as_many_outcomes_as_they_know_from_there(known: float) -> None:
    both = Mixture({"persistence": 0.0, "other": 0.0}, outcomes_as_low=known)
    heard = 1.0 - ALONE_MAX * LOW_OUTCOMES / (known + LOW_OUTCOMES)
    assert both.weights(["other", "persistence"])["other"] == pytest.approx(0.5 * heard)
