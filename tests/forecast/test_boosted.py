"""Trees: what no sum shows is found, the same is said twice, and nobody needs them."""

import random

import numpy as np
import pytest

from coordinator.forecast import boosted, experts, skewed
from coordinator.forecast.forecaster import KINDS, Expert, Forecaster
from coordinator.forecast.grid import Grid
from coordinator.forecast.quantiles import LEVELS, pinball

AHEAD = 2


def in_a_corner(hours: int, seed: int) -> list[float]:
    """Many come at once at eight in the morning, but only after a night with little work."""
    chance = random.Random(seed)
    values, night = [], 60.0
    for hour in range(hours):
        if hour % 24 == 0:
            night = chance.choice((20.0, 60.0, 100.0))
        comes = 80.0 if night == 20.0 and hour % 24 in range(8, 14) else 0.0
        values.append(night + comes + chance.randrange(4))
    return values


def test_what_happens_in_one_corner_is_found_where_a_sum_does_not_find_it() -> None:
    """By the pinball loss, on a week that was not learned from."""
    learned = 24 * 42
    values = in_a_corner(learned + 24 * 7, seed=1)
    lesson = experts.lesson(Grid(np.array(values[:learned]), 1), AHEAD)
    models: dict[str, Expert] = {
        "trees": boosted.fit(lesson, AHEAD),
        "sums": skewed.freely(lesson, AHEAD),
    }
    losses = dict.fromkeys(models, 0.0)
    for step in range(learned, len(values) - AHEAD):
        begin = step - 24 * 9
        grid = Grid(np.array(values[begin : step + 1]), 1, begin)
        for name, model in models.items():
            said = model.forecast(grid)
            assert np.all(np.diff(said) >= 0)
            assert said[0] >= 0
            losses[name] += float(pinball(values[step + AHEAD], said).mean())
    assert losses["trees"] < 0.8 * losses["sums"]


def test_the_same_lesson_gives_the_same_trees() -> None:
    grid = Grid(np.array(in_a_corner(24 * 30, seed=2)), 1)
    once, again = (boosted.fit(experts.lesson(grid, AHEAD), AHEAD) for _ in range(2))
    assert list(once.forecast(grid)) == list(again.forecast(grid))


def test_it_is_heard_from_three_weeks_on_and_whoever_does_not_ask_for_it_hears_no_other() -> None:
    forecaster = Forecaster(AHEAD, 1, kinds=(KINDS[0], boosted.KIND))
    heard = []
    for gpus in in_a_corner(24 * 22, seed=3):
        forecaster.observe(gpus)
        heard.append(len(forecaster.by_model()))
    assert heard[24 * 21 - 2] == 1
    assert heard[-1] == 2
    assert boosted.KIND not in KINDS


@pytest.mark.parametrize("per_hour", [1, 6])
def test_a_series_that_never_moves_is_learned_too(per_hour: int) -> None:
    grid = Grid(np.full(24 * 30 * per_hour, 8.0), per_hour)
    said = boosted.fit(experts.lesson(grid, AHEAD * per_hour), AHEAD * per_hour).forecast(grid)
    assert said == pytest.approx(np.full(len(LEVELS), 8.0), abs=0.2)
