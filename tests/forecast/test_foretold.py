"""What jobs say of their end: a forecast gains by it, and does not lose where it is not true."""

import math
import random

import numpy as np
import pytest

from bench.forecast_ages import said
from coordinator.forecast.backtest import backtest
from coordinator.forecast.forecaster import KINDS, WEEK_H, Forecaster
from coordinator.forecast.foretold import Foretold, still_wanted
from coordinator.forecast.quantiles import Floats
from coordinator.forecast.skewed import KNOWN_ENDS
from tests.forecast.test_survival import drawn, held_by

AHEAD_H = 3


@pytest.fixture(scope="module")
def fleet() -> tuple[list[float], Floats]:
    """What is held, and what of it is held still in three hours as all say who hold it."""
    hours = 24 * 24
    made = drawn(hours, seed=4)
    held = held_by(made, hours)
    return held, said(made, len(held), (AHEAD_H,), 1.0, 1.0)[0]


def losses(held: list[float], told: Floats) -> tuple[float, float, float]:
    """With what is told, without, and how much it is believed in the end."""
    names = ("persistence", "skewed return", KNOWN_ENDS)
    chosen = [kind for kind in KINDS if kind.name in names]
    with_it, without = (Forecaster(AHEAD_H, 1, kinds=chosen) for _ in range(2))
    score = backtest(with_it, held, 24 * 14, told={KNOWN_ENDS: told})
    blind = backtest(without, held, 24 * 14)
    return score.loss, blind.loss, with_it.weights().get(KNOWN_ENDS, 0.0)


def test_a_forecast_gains_by_what_jobs_say_of_their_end(fleet: tuple[list[float], Floats]) -> None:
    loss, blind, weight = losses(*fleet)
    assert loss < 0.8 * blind
    assert weight > 0.8


@pytest.mark.parametrize("how", ["all stay", "nobody stays", "anything"])
def test_it_loses_next_to_nothing_where_that_is_not_true(
    fleet: tuple[list[float], Floats], how: str
) -> None:
    held, _ = fleet
    chance = random.Random(1)
    wrong = {
        "all stay": np.array(held),
        "nobody stays": np.zeros(len(held)),
        "anything": np.array([gpus * 2 * chance.random() for gpus in held]),
    }[how]
    loss, blind, _ = losses(held, wrong)
    assert loss < 1.02 * blind


def test_a_week_of_full_hours_is_enough_and_less_is_not() -> None:
    """Steps of ten minutes, of which every sixth has been told."""
    chance = random.Random(2)
    forecaster = Forecaster(1, 6)
    weighed = []
    for step in range(6 * (WEEK_H + 50)):
        gpus = 100.0 + chance.randrange(20)
        full = step % 6 == 5
        forecaster.observe(gpus, {KNOWN_ENDS: gpus - 10} if full else None)
        if full:
            weighed.append(KNOWN_ENDS in forecaster.by_model())
    assert not any(weighed[:WEEK_H])
    assert weighed[-1]
    forecaster.observe(100.0)
    assert KNOWN_ENDS not in forecaster.by_model(), "it says nothing where nothing is told"


def test_it_is_heard_at_the_step_that_ended_then() -> None:
    """At full hours, which are a minute's sample early, and now, in the middle of a step."""
    moments = np.array([0.0, 60.0, 119.0, 128.0, 600.0])
    gpus = np.array([[9, 9], [4, 2], [6, 0], [8, 8], [7, 7]], dtype=float)
    told = Foretold(moments, np.array([1.0, 3.0]), gpus)
    one, two, four = still_wanted(told, 12, 6, (1, 2, 4))
    heard = {step: gpus for step, gpus in enumerate(one) if not math.isnan(gpus)}
    assert heard == {5: 4.0, 11: 8.0}  # the newest of a step counts
    assert [gpus for gpus in two if not math.isnan(gpus)] == [3.0, 8.0]  # half way
    assert all(np.isnan(four)), "farther than anybody has said"
