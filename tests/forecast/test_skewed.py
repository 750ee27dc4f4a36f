"""Each quantile by itself: bands lean to the side to which demand goes, and are found exactly."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from coordinator.forecast import experts, skewed
from coordinator.forecast.forecaster import Expert
from coordinator.forecast.grid import Grid
from coordinator.forecast.quantiles import LEVELS, pinball

MEDIAN = len(LEVELS) // 2


def bursts(hours: int, seed: int) -> list[float]:
    """Now and then many come at once, and a tenth of them goes each hour."""
    chance = random.Random(seed)
    held, values = 0.0, []
    for _ in range(hours):
        held = 0.9 * held + (chance.randrange(40, 80) if chance.random() < 0.04 else 0)
        values.append(float(round(held)))
    return values


def told(values: list[float], ahead: int) -> skewed.Skewed:
    return skewed.returning(experts.lesson(Grid(np.array(values), 1), ahead), ahead)


def test_what_holds_nothing_can_only_rise_and_what_holds_much_falls() -> None:
    values = bursts(24 * 42, seed=1)
    fitted = told(values, 2)
    empty, full = (
        fitted.forecast(Grid(np.array([*values, *tail]), 1))
        for tail in ([0.0] * 6, [0.0, 0.0, 70.0])
    )
    assert empty[0] == pytest.approx(0, abs=0.5)
    assert empty[-1] > 10
    assert full[MEDIAN] < 68
    assert full[0] < 62


def test_bands_are_narrower_than_those_of_one_shape_and_hold_as_often() -> None:
    """By the pinball loss, on weeks that were not learned from."""
    values = bursts(24 * 70, seed=2)
    ahead, learned = 2, 24 * 42
    lesson = experts.lesson(Grid(np.array(values[:learned]), 1), ahead)
    models: dict[str, Expert] = {
        "skewed": skewed.returning(lesson, ahead),
        "one shape": experts.fit(lesson, experts.still, ahead, scaled=True),
    }
    losses = dict.fromkeys(models, 0.0)
    within = 0
    newest = range(learned, len(values) - ahead)
    for step in newest:
        grid = Grid(np.array(values[step - 24 * 9 : step + 1]), 1, step - 24 * 9)
        actual = values[step + ahead]
        said = {name: model.forecast(grid) for name, model in models.items()}
        for name, forecast in said.items():
            losses[name] += float(pinball(actual, forecast).mean())
        within += bool(said["skewed"][0] - 0.5 <= actual <= said["skewed"][-1] + 0.5)
    assert losses["skewed"] < 0.93 * losses["one shape"]
    assert 0.9 <= within / len(newest) <= 0.99


def test_who_never_changed_is_said_not_to() -> None:
    said = told([40.0] * 24 * 10, 1).forecast(Grid(np.full(24 * 9, 40.0), 1))
    assert said == pytest.approx(np.full(len(LEVELS), 40.0), abs=0.5)


def test_quantiles_rise_and_no_less_than_nothing_is_wanted() -> None:
    values = bursts(24 * 20, seed=3)
    grid = Grid(np.array(values), 1)
    for ahead in (1, 6, 24):
        for fit in (skewed.returning, skewed.regressed, skewed.freely, skewed.over_weeks):
            said = fit(experts.lesson(grid, ahead), ahead).forecast(grid)
            assert np.all(np.diff(said) >= 0)
            assert said[0] >= 0


def breathing() -> list[float]:
    """Four weeks of demand that is each day what it was the day before, and some noise."""
    chance = random.Random(4)
    return [
        200 + 80 * float(np.sin(2 * np.pi * hour / 24)) + chance.gauss(0, 5)
        for hour in range(24 * 28)
    ]


@pytest.mark.parametrize(
    ("values", "learned_days", "better", "other", "ratio"),
    [
        pytest.param(
            breathing(), 21, skewed.freely, skewed.regressed, 0.95,
            id="what breathes by the day is learned faster where less is held",
        ),
        pytest.param(
            bursts(24 * 56, seed=5), 42, skewed.over_weeks, skewed.freely, 0.99,
            id="what stays as it was for weeks is learned better by who forgets less",
        ),
    ],
)  # fmt: skip
def test_who_learns_better_from_what(
    values: list[float],
    learned_days: int,
    better: Callable[[experts.Lesson, int], Expert],
    other: Callable[[experts.Lesson, int], Expert],
    ratio: float,
) -> None:
    """By the pinball loss six hours ahead, on the days that were not learned from."""
    ahead, learned = 6, 24 * learned_days
    lesson = experts.lesson(Grid(np.array(values[:learned]), 1), ahead)

    def loss(model: Expert) -> float:
        lost = 0.0
        for step in range(learned, len(values) - ahead):
            grid = Grid(np.array(values[step - 24 * 9 : step + 1]), 1, step - 24 * 9)
            lost += float(pinball(values[step + ahead], model.forecast(grid)).mean())
        return lost

    assert loss(better(lesson, ahead)) < ratio * loss(other(lesson, ahead))
