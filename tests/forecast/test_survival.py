"""Life tables: age and size tell who stays, what still runs counts, and a forecast gains by it."""

import math
import random
from dataclasses import dataclass

import pytest

from coordinator.forecast.forecaster import Forecaster
from coordinator.forecast.quantiles import pinball
from coordinator.forecast.survival import LifeTable, Running

HOUR_S = 3600.0


def table_of(lasted_s: list[float], gpus: float = 1) -> LifeTable:
    table = LifeTable()
    for age_s in lasted_s:
        table.ended(gpus, age_s)
    return table


def test_where_age_means_nothing_everybody_has_the_same_chance() -> None:
    chance = random.Random(1)
    table = table_of([chance.expovariate(1 / (2 * HOUR_S)) for _ in range(20_000)])
    for age_s in (60.0, HOUR_S, 4 * HOUR_S):
        (alive,) = table.chances([Running(1, age_s)], HOUR_S)
        assert alive == pytest.approx(math.exp(-0.5), abs=0.04)


def test_where_most_are_short_whoever_is_old_stays() -> None:
    chance = random.Random(2)
    table = table_of([60 * chance.paretovariate(0.8) for _ in range(5_000)])
    young, old = table.chances([Running(1, 300.0), Running(1, 24 * HOUR_S)], HOUR_S)
    assert young == pytest.approx((300 / 3900) ** 0.8, abs=0.05)
    assert old > 0.9


def test_sizes_differ_once_they_have_shown_it_and_begin_as_all_do() -> None:
    table = table_of([HOUR_S * (0.6 + 0.001 * place) for place in range(500)], gpus=1)
    one, eight = Running(1, 0.5 * HOUR_S), Running(8, 0.5 * HOUR_S)
    before = table.chances([one, eight], HOUR_S)
    assert before.max() < 0.2
    for _ in range(500):
        table.ended(8, 20 * HOUR_S)
    small, large = table.chances([one, eight], HOUR_S)
    assert small < 0.2
    assert large > 0.9


def test_what_still_runs_counts_as_lived() -> None:
    """Only the short ones have ended; the hundred that have not are no sign of a short life."""
    table = table_of([HOUR_S] * 10)
    alone = table.chances([Running(1, 0.9 * HOUR_S)], HOUR_S)[0]
    among = table.chances([Running(1, 0.9 * HOUR_S)] + [Running(1, 5 * HOUR_S)] * 100, HOUR_S)[0]
    assert alone < 0.4
    assert among > 0.8


def test_what_a_job_says_is_left_is_believed() -> None:
    table = table_of([HOUR_S] * 100)
    running = [Running(8, HOUR_S, remaining_s=2 * HOUR_S), Running(4, HOUR_S, remaining_s=60.0)]
    assert table.known_gpus(running, HOUR_S) == 8
    assert table.known_gpus([], HOUR_S) == 0


def test_what_is_old_is_forgotten() -> None:
    table = table_of([HOUR_S] * 200)
    table.forget(days=300)
    for _ in range(50):
        table.ended(1, 30 * HOUR_S)
    assert table.chances([Running(1, HOUR_S)], HOUR_S)[0] > 0.9


def test_before_anything_has_ended_there_is_a_chance_and_age_helps() -> None:
    young, old = LifeTable().chances([Running(1, 60.0), Running(1, 100 * HOUR_S)], HOUR_S)
    assert 0 < young < old < 1


def test_an_attempt_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot have lasted"):
        LifeTable().ended(1, -1.0)


@dataclass(frozen=True)
class Job:
    begin_h: float
    end_h: float
    gpus: int
    says: bool

    def at(self, hour: int) -> Running:
        left_s = (self.end_h - hour) * HOUR_S if self.says else None
        return Running(self.gpus, (hour - self.begin_h) * HOUR_S, left_s)


def jobs(hours: int, seed: int) -> list[Job]:
    """Many short ones, and a few large that last for days, half of which say how long."""
    chance = random.Random(seed)
    made = []
    at = 0.0
    while at < hours:
        at += chance.expovariate(6)
        long = chance.random() < 0.05
        lasts_h = chance.expovariate(1 / 40) if long else chance.expovariate(1 / 1.5)
        says = long and chance.random() < 0.5
        made.append(Job(at, at + lasts_h, 32 if long else 2, says))
    return made


def test_a_forecast_gains_by_the_ages_of_what_runs() -> None:
    """The same series, six hours ahead, once with and once without what the life table says."""
    ahead_h, hours = 6, 24 * 30
    made = jobs(hours, seed=4)
    table = LifeTable()
    blind, told = Forecaster(ahead_h, 1), Forecaster(ahead_h, 1)
    held, said = [], []
    for hour in range(1, hours):
        for job in made:
            if hour - 1 < job.end_h <= hour:
                table.ended(job.gpus, (job.end_h - job.begin_h) * HOUR_S)
        there = [job for job in made if job.begin_h <= hour < job.end_h]
        running = [job.at(hour) for job in there]
        held.append(float(sum(job.gpus for job in there)))
        blind.observe(held[-1])
        told.observe(held[-1], table.known_gpus(running, ahead_h * HOUR_S))
        said.append((blind.forecast(), told.forecast()))
    judged = range(24 * 16, len(held) - ahead_h)
    losses = [
        sum(float(pinball(held[at + ahead_h], said[at][which]).mean()) for at in judged)
        for which in (0, 1)
    ]
    assert losses[1] < 0.93 * losses[0]
    assert told.weights()["ages"] > 0.2
    assert "ages" not in blind.by_model()


def test_who_is_not_told_for_a_while_goes_on_without() -> None:
    forecaster = Forecaster(1, 1)
    chance = random.Random(5)
    for _ in range(24 * 12):
        gpus = 100.0 + chance.randrange(20)
        forecaster.observe(gpus, gpus - 10)
    assert "ages" in forecaster.by_model()
    forecaster.observe(105.0)
    assert "ages" not in forecaster.by_model()
    assert forecaster.forecast()[4] == pytest.approx(110, abs=15)
