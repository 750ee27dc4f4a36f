"""What regressions look at: nothing of later, and who has come lately though nobody says who."""

import random

import numpy as np
import pytest

from coordinator.forecast import experts, skewed
from coordinator.forecast.columns import all_of_it, and_lately, from_means
from coordinator.forecast.grid import Grid
from coordinator.forecast.quantiles import pinball


def wild(steps: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    chance = random.Random(seed)
    return np.array([float(chance.randrange(100)) for _ in range(steps)])


@pytest.mark.parametrize("hours", [1, 3, 7, 200])
@pytest.mark.parametrize("per_hour", [1, 2])
def test_the_least_and_the_most_of_some_hours(hours: int, per_hour: int) -> None:
    values = wild(50, seed=hours)
    grid = Grid(values, per_hour)
    windows = [values[max(0, at - hours * per_hour) : at + 1] for at in range(len(values))]
    assert list(grid.least(hours)) == [min(window) for window in windows]
    assert list(grid.most(hours)) == [max(window) for window in windows]


@pytest.mark.parametrize("ahead", [1, 6, 24, 48, 200])
def test_no_column_knows_anything_of_later(ahead: int) -> None:
    """Whatever comes, what was seen at a step stays."""
    values = wild(24 * 20, seed=ahead)
    cut = 24 * 15
    other = np.concatenate([values[:cut], wild(24 * 5, seed=1000 + ahead)])
    for columns in (from_means, lambda grid: and_lately(grid, ahead)):
        one, two = (columns(Grid(each, 1))[:cut] for each in (values, other))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("ahead", [1, 24, 168])
def test_whoever_forecasts_sees_what_was_learned_from(ahead: int) -> None:
    """Nine days are enough: what is older changes no column of the newest step."""
    values = wild(24 * 40, seed=3)
    short = Grid(values[-24 * 9 :], 1, len(values) - 24 * 9)
    whole, kept = (and_lately(grid, ahead)[-1] for grid in (Grid(values, 1), short))
    assert kept == pytest.approx(whole)


def guests(hours: int, seed: int) -> list[float]:
    """Some stay for days and hold much or little; others come at once and leave after an hour."""
    chance = random.Random(seed)
    values, staying = [], 40
    for _ in range(hours):
        if chance.random() < 0.03:
            staying = chance.choice((0, 40, 80))
        values.append(float(staying + (40 if chance.random() < 0.2 else 0)))
    return values


def test_who_came_just_now_leaves_soon_and_who_was_there_stays() -> None:
    """The same demand after the same day, and no age is told."""
    values = guests(24 * 42, seed=5)
    fitted = skewed.regressed(experts.lesson(Grid(np.array(values), 1), 1), 1)
    quiet = values[: 24 * 41]
    old, young = (
        fitted.forecast(Grid(np.array([*quiet, *tail]), 1))
        for tail in ([40.0] * 5 + [80.0] * 13, [80.0] * 12 + [40.0] * 5 + [80.0])
    )
    middle = len(old) // 2
    assert old[middle] > 70
    assert young[middle] < old[middle] - 5


def test_knowing_who_came_lately_makes_forecasts_better() -> None:
    """On weeks that were not learned from."""
    values = guests(24 * 70, seed=6)
    learned = 24 * 42
    lesson = experts.lesson(Grid(np.array(values[:learned]), 1), 1)
    models = {
        "all of it": skewed.fit(lesson, lambda grid: all_of_it(grid, 1), 1),
        "and lately": skewed.fit(lesson, lambda grid: and_lately(grid, 1), 1),
    }
    losses = dict.fromkeys(models, 0.0)
    for step in range(learned, len(values) - 1):
        grid = Grid(np.array(values[step - 24 * 9 : step + 1]), 1, step - 24 * 9)
        for name, model in models.items():
            losses[name] += float(pinball(values[step + 1], model.forecast(grid)).mean())
    assert losses["and lately"] < 0.98 * losses["all of it"]
