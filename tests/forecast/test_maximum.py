"""The maximum of demand: what is known by hand, how often it is exceeded, and what is no demand."""

import math
from random import Random

import numpy as np
import pytest

from coordinator.forecast.maximum import MaximumForecaster
from coordinator.forecast.quantiles import LEVELS, Floats


def told(values: list[float], ahead: int, per_hour: int = 6) -> tuple[MaximumForecaster, Floats]:
    """A forecaster that has seen all of it, and what it said at each step."""
    forecaster = MaximumForecaster(ahead, per_hour)
    said = []
    for gpus in values:
        forecaster.observe(gpus)
        said.append(forecaster.forecast())
    return forecaster, np.array(said)


def walk(days: int, seed: int, *, wild: bool = False) -> list[float]:
    """Demand that goes up and down at random; `wild` only in the second half of each day."""
    chance, gpus, values = Random(seed), 300.0, []
    for step in range(144 * days):
        size = 12.0 if wild and step % 144 > 72 else 2.0
        gpus = min(600.0, max(50.0, gpus + size * chance.choice((-2, -1, 0, 1, 2))))
        values.append(gpus)
    return values


def test_before_anything_is_known_nothing_is_wanted_and_then_something_more() -> None:
    forecaster = MaximumForecaster(2, 6)
    assert not forecaster.forecast().any()
    forecaster.observe(48.0)
    said = forecaster.forecast()
    assert said[0] >= 48.0
    assert list(said) == sorted(said)
    assert said[-1] == pytest.approx(48.0 + 2.241 * math.sqrt(48 / 3))


def test_within_the_first_day_nothing_is_learned_whenever_it_began() -> None:
    buffer = 2.241 * math.sqrt(1 / 3)
    for unknown in (0, 1, 100, 143):
        _, said = told([math.nan] * unknown + [3.0, *[0.0] * 143], 2)
        assert said[-2][-1] == pytest.approx(buffer), unknown
        assert said[-1][-1] != pytest.approx(buffer, rel=0.01), unknown


def test_whoever_begins_elsewhere_learns_the_same_at_the_same_steps() -> None:
    values = walk(4, 5)
    whole, _ = told([math.nan] * 37 + values, 2)
    later = MaximumForecaster(2, 6, first_step=37)
    for gpus in values:
        later.observe(gpus)
    assert list(later.forecast()) == list(whole.forecast())


@pytest.mark.parametrize("ahead", [1, 6])
@pytest.mark.parametrize("wild", [False, True])
def test_it_is_exceeded_as_often_as_it_says(ahead: int, wild: bool) -> None:
    values = walk(40, ahead, wild=wild)
    _, said = told(values, ahead)
    steps = range(144 * 10, len(values) - ahead)
    came = np.array([max(values[step : step + ahead + 1]) for step in steps])
    within = (came[:, None] <= said[steps.start : steps.stop] + 0.5).mean(axis=0)
    upper = LEVELS >= 0.75
    assert np.all(np.abs(within - LEVELS)[upper] < 0.03)


def test_a_quiet_hour_needs_less_than_a_wild_one() -> None:
    values = walk(30, 1, wild=True)
    _, said = told(values, 3)
    rise = said[144 * 15 :, -2] - np.array(values[144 * 15 :])
    by_hour = rise.reshape(-1, 144).mean(axis=0)
    assert by_hour[40:72].mean() < 0.55 * by_hour[110:140].mean()


def test_work_that_comes_in_the_morning_is_waited_for_before_it_comes() -> None:
    """Nothing else tells of it: the last restless hours are a day ago."""
    chance, values = Random(4), []
    for step in range(144 * 30):
        comes = step % 144 in range(48, 66) and chance.random() < 0.5
        values.append(100.0 + chance.randrange(2) + 30.0 * comes)
    _, said = told(values, 2)
    rise = (said[144 * 15 :, -2] - np.array(values[144 * 15 :])).reshape(-1, 144).mean(axis=0)
    assert rise[46:48].mean() > 1.5 * rise[120:144].mean()


def test_of_a_gap_nothing_is_learned() -> None:
    values = walk(10, 2)
    gap = [*values[:1020], *[math.nan] * 30, *values[1020:]]
    forecaster, said = told(gap, 2)
    whole, _ = told(values, 2)
    assert 0 < len(whole._rises) - len(forecaster._rises) <= 2
    assert np.abs(said[1020:1050] - said[1019]).max() < 3  # only the time goes on
    assert not np.isnan(said).any()
    assert forecaster.coverage is not None


def test_coverage_is_known_after_three_days_of_forecasts_and_falls_when_they_are_wrong() -> None:
    values = walk(3, 3)
    assert told(values, 1)[0].coverage is None
    calm, _ = told(walk(8, 3), 1)
    assert calm.coverage is not None
    assert calm.coverage > 0.9
    for step in range(144 * 2):
        calm.observe(300.0 + 40.0 * step)
    assert calm.coverage < 0.85


OLD_DAYS, NEW_DAYS, PER_HOUR = 20, 4, 12


def mornings() -> tuple[list[float], list[float]]:
    """By five minutes, and means of ten: on the older days work came and went from eight to eleven,
    lately none did. It ends before eight."""
    chance, values, comes = Random(6), [], False
    for step in range((OLD_DAYS + NEW_DAYS) * 288 + 94):
        if step % 3 == 0:
            comes = step % 288 in range(96, 132) and step < OLD_DAYS * 288 and chance.random() < 0.5
        values.append(100.0 + chance.randrange(3) + 40.0 * comes)
    return values, [sum(values[at : at + 2]) / 2 for at in range(0, len(values) - 1, 2)]


def test_older_days_that_are_known_by_means_count_nearly_as_if_they_had_been_seen() -> None:
    values, means = mornings()
    whole, _ = told(values, 3, PER_HOUR)
    recent = values[OLD_DAYS * 288 :]
    forgetful, by_both = (MaximumForecaster(3, PER_HOUR, OLD_DAYS * 288) for _ in range(2))
    for gpus in recent:
        forgetful.observe(gpus)
        by_both.observe(gpus)
    by_both.tell_older(means, 0)
    rises = [each.forecast()[-1] - values[-1] for each in (forgetful, by_both, whole)]
    assert rises[0] < 5 < rises[1]
    assert rises[1] == pytest.approx(rises[2], rel=0.2)


@pytest.mark.parametrize("first_step", [OLD_DAYS * 144, OLD_DAYS * 144 + 250])
def test_means_of_the_same_days_teach_nothing_more(first_step: int) -> None:
    values, means = mornings()
    once, again = (MaximumForecaster(3, PER_HOUR, OLD_DAYS * 288) for _ in range(2))
    for gpus in values[OLD_DAYS * 288 :]:
        once.observe(gpus)
        again.observe(gpus)
    again.tell_older(means[first_step:], first_step)
    assert list(again.forecast()) == list(once.forecast())


def test_what_cannot_be_compared_teaches_nothing() -> None:
    """Of older days whose means end before the first observation nobody knows what they hide."""
    values, means = mornings()
    forecaster, said = told(values[-200:], 3, PER_HOUR)
    forecaster.tell_older(means[: 144 * OLD_DAYS], -144 * OLD_DAYS)
    assert list(forecaster.forecast()) == list(said[-1])


@pytest.mark.parametrize("wrong", [-1.0, math.inf])
def test_what_is_no_demand_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="count of GPUs"):
        MaximumForecaster(1, 6).observe(wrong)
