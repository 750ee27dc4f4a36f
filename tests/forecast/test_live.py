"""Forecasts beside the loop: what they say with little and with much history, how right they were,
and that nothing that goes wrong reaches the loop.

Problem: a forecaster that fell behind, saw a clock jump or was restarted goes on saying numbers.
So each of it happens here, and the numbers are compared with what came.
"""

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest

from coordinator.core.demand_messages import AskedType, ForecastMade, MakeForecast
from coordinator.forecast.live import QUEUE_MAX, LiveForecaster, Past
from coordinator.forecast.quantiles import LEVELS, Floats
from coordinator.forecast.recent import MINUTES_PER_DAY, RecentMaximum

BEGIN = 29_833_320
SOON, LATER = 11, 60


def walk(seed: int, minutes: int) -> list[float]:
    """Arrivals and ends of jobs, some 60 GPUs: each of 100 jobs of 1 to 8 GPUs comes and goes."""
    random = np.random.default_rng(seed)
    sizes, on = random.integers(1, 9, 100), random.random(100) < 0.15
    found = []
    for _ in range(minutes):
        flips = random.random(100) < np.where(on, 1 / 120, 1 / 680)
        on = on ^ flips
        found.append(float(sizes[on].sum()))
    return found


def asked(minute: int, gpus: float, gpu_type: str = "H100") -> MakeForecast:
    return MakeForecast(minute, (AskedType(gpu_type, gpus, SOON, LATER),))


# --- the maximum ----------------------------------------------------------------------------------


def test_before_a_day_has_passed_there_is_a_buffer_and_no_less_than_now() -> None:
    maximum = RecentMaximum()
    maximum.observe(100.0)
    soon, later = maximum.forecast(SOON), maximum.forecast(LATER)
    assert (np.diff(soon) >= 0).all()
    assert soon[0] == 100.0
    assert (later[4:] > soon[4:]).all()
    assert soon[-1] > 105.0
    maximum.observe(0.0)
    assert maximum.forecast(SOON)[-1] >= 0.5  # of nothing may come something


def test_bands_of_the_maximum_hold_what_comes() -> None:
    """Of demand that it has watched for a week: over the days after that."""
    values = walk(1, 11 * MINUTES_PER_DAY)
    maximum, above = RecentMaximum(), np.zeros(len(LEVELS))
    said = 0
    for minute, gpus in enumerate(values[:-SOON]):
        maximum.observe(gpus)
        if minute >= 7 * MINUTES_PER_DAY and minute % 10 == 0:
            most = max(values[minute + 1 : minute + 1 + SOON])
            above += maximum.forecast(SOON) >= most
            said += 1
    held = above / said
    assert held[-1] == pytest.approx(0.975, abs=0.02)
    assert held[-2] == pytest.approx(0.95, abs=0.03)
    assert held[4] >= 0.45  # many a maximum is exactly what there was


def test_an_outage_teaches_nothing() -> None:
    """It is neither a fall to zero nor a rise from it."""
    plain, broken = RecentMaximum(), RecentMaximum()
    for minute in range(3 * MINUTES_PER_DAY):
        gpus = 40.0 + 4 * (minute % 7 == 0)
        plain.observe(gpus)
        broken.observe(math.nan if 2_000 <= minute < 2_600 else gpus)
    assert broken.forecast(SOON) == pytest.approx(plain.forecast(SOON), abs=0.2)
    broken.observe(math.nan)
    with pytest.raises(ValueError, match="known"):
        broken.forecast(SOON)


# --- beside the loop ------------------------------------------------------------------------------


class Bench:
    """A forecaster that runs, and what it has posted."""

    def __init__(self, past: dict[str, Past] | None = None) -> None:
        self.made: list[ForecastMade] = []
        self._came = asyncio.Event()
        self.forecaster = LiveForecaster(past or {}, self._post)

    def _post(self, made: ForecastMade) -> None:
        self.made.append(made)
        self._came.set()

    async def until(self, minute: int) -> ForecastMade:
        while not self.made or self.made[-1].minute < minute:
            self._came.clear()
            await self._came.wait()
        return self.made[-1]


async def told(bench: Bench, samples: Sequence[MakeForecast]) -> ForecastMade:
    running = asyncio.create_task(bench.forecaster.run())
    for sample in samples:
        bench.forecaster.make(sample)
    try:
        return await bench.until(samples[-1].minute)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_all_samples_are_taken_and_the_newest_is_spoken_of() -> None:
    bench = Bench()
    made = await told(bench, [asked(BEGIN + minute, 10.0 + minute) for minute in range(30)])
    assert made.minute == BEGIN + 29
    (h100,) = made.types
    assert h100.gpu_type == "H100"
    assert len(h100.soon_gpus) == len(h100.later_gpus) == len(LEVELS)
    assert 39.0 <= h100.soon_gpus[0] < h100.later_gpus[-1]
    assert h100.coverage is None
    assert len(bench.made) < 30  # nobody waited for each


async def test_a_restart_knows_the_past_and_how_right_it_was() -> None:
    values = walk(2, 6 * MINUTES_PER_DAY)
    past = Past(BEGIN - 1, [None, None, *values])
    made = await told(Bench({"H100": past}), [asked(BEGIN, values[-1])])
    (h100,) = made.types
    assert h100.coverage == pytest.approx(0.95, abs=0.04)
    fresh = RecentMaximum()
    for gpus in [*values, values[-1]]:
        fresh.observe(gpus)
    assert h100.soon_gpus == pytest.approx(tuple(fresh.forecast(SOON)), abs=1.0)


async def test_what_was_said_wrongly_shows() -> None:
    """Demand that doubles day by day was not what two quiet days had promised."""
    quiet = [50.0] * (3 * MINUTES_PER_DAY)
    wild = [50.0 + 30.0 * (minute % 20 < 10) for minute in range(2 * MINUTES_PER_DAY)]
    steady = (await told(Bench({"H100": Past(BEGIN - 1, quiet)}), [asked(BEGIN, 50.0)])).types[0]
    assert steady.coverage == 1.0
    past = Past(BEGIN - 1, [*quiet, *wild[: MINUTES_PER_DAY // 6]])
    shaken = (await told(Bench({"H100": past}), [asked(BEGIN, 50.0)])).types[0]
    assert shaken.coverage is not None
    assert shaken.coverage < 0.99


async def test_gaps_and_a_clock_that_goes_back_break_nothing() -> None:
    minutes = [0, 1, 2, 500, 501, 499_000, 499_001, 20, 21]
    bench = Bench()
    running = asyncio.create_task(bench.forecaster.run())
    for number, minute in enumerate(minutes, start=1):
        bench.forecaster.make(asked(BEGIN + minute, 5.0))
        while not bench.made or bench.made[-1].minute != BEGIN + minute:
            bench._came.clear()
            await bench._came.wait()
        assert len(bench.made) == number
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert bench.made[-1].types[0].soon_gpus[0] >= 5.0


async def test_a_queue_that_nobody_takes_from_is_bounded() -> None:
    bench = Bench()
    samples = [asked(BEGIN + minute, 5.0) for minute in range(3 * QUEUE_MAX)]
    for sample in samples:
        bench.forecaster.make(sample)
    made = await told(bench, samples[-1:])
    assert made.minute == samples[-1].minute
    assert len(bench.forecaster._queue) == 0


async def test_a_bug_in_a_model_ends_the_forecasts_and_is_raised() -> None:
    class Broken:
        def observe(self, gpus: float) -> None:
            raise ZeroDivisionError

        def forecast(self, ahead_min: int) -> Floats:
            raise AssertionError

    made: list[ForecastMade] = []
    forecaster = LiveForecaster({}, made.append, Broken)
    forecaster.make(asked(BEGIN, 5.0))
    with pytest.raises(ZeroDivisionError):
        await forecaster.run()
    assert made == []
