"""Forecasts beside the loop: what they say with little and with much history, how right they were,
and that nothing that goes wrong reaches the loop.

Problem: a forecaster that fell behind, saw a clock jump or was restarted goes on saying numbers.
So each of it happens here, and the numbers are compared with what came.
"""

import asyncio
import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from coordinator.core.demand_history import (
    DemandHistory,
    DemandLog,
    DemandRow,
    PutDemandSeries,
    Series,
)
from coordinator.core.demand_messages import AskedType, ForecastMade, MakeForecast
from coordinator.forecast.live import QUEUE_MAX, LiveForecaster, Maximum, Past, pasts
from coordinator.forecast.maximum import MaximumForecaster
from coordinator.forecast.quantiles import LEVELS

BEGIN = 29_833_320
MINUTES_PER_DAY = 1_440
SOON, LATER = 11, 60
SOON_STEPS = 16  # taken up to fifteen minutes, and the present one


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
    assert h100.coverage == pytest.approx(0.97, abs=0.03)
    fresh = MaximumForecaster(SOON_STEPS, 60, BEGIN - len(values) - 2)
    for gpus in [math.nan, math.nan, *values, values[-1]]:
        fresh.observe(gpus)
    assert h100.soon_gpus == pytest.approx(tuple(fresh.forecast()))


IDLE_MIN, AWAY_MIN = 300, 3  # before anything was wanted, and while the coordinator restarts


@pytest.mark.parametrize("hours", [3.5, 13.5, 23.5, 25.0, 50.0])
async def test_a_restart_says_what_would_have_been_said_without_it(hours: float) -> None:
    """One that has seen all of it itself, and one that was told of it by what is durable."""
    history, lived = DemandHistory(), Bench()
    values = [float(max(0, gpus - 55) // 4) for gpus in walk(5, int(60 * hours))]
    values[0] = 2.0
    for minute in range(IDLE_MIN):
        history.put(BEGIN + minute, {})
    began = BEGIN + IDLE_MIN
    running = [asyncio.create_task(lived.forecaster.run())]
    for minute, gpus in enumerate(values, began):
        history.put(minute, {Series("H100", "lab", "elastic"): gpus})
        lived.forecaster.make(asked(minute, gpus))
        if minute % QUEUE_MAX == 0:
            await lived.until(minute)
    successor = Bench(pasts(history))
    running.append(asyncio.create_task(successor.forecaster.run()))
    for later in range(AWAY_MIN, AWAY_MIN + 12):
        sample = asked(began + len(values) + later, 0.0)
        for bench in (lived, successor):
            bench.forecaster.make(sample)
        assert await successor.until(sample.minute) == await lived.until(sample.minute)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_days_before_those_by_the_minute_are_told_by_ten_minutes() -> None:
    """From the first on which the type was wanted, as far back as a maximum remembers."""
    step = BEGIN // 10
    rows = [
        *(DemandRow(10, step - 8_000 + at, (0,), (4.0 * (at >= 2_000),)) for at in range(8_000)),
        *(DemandRow(1, BEGIN - 100 + at, (0,), (4.0,)) for at in range(100)),
    ]
    history = DemandHistory()
    history.load(DemandLog((PutDemandSeries(0, Series("H100", "lab", "spare")),), tuple(rows)))
    heard: list[tuple[int, int, int]] = []

    class Listening(MaximumForecaster):
        def tell_older(self, means: Sequence[float], first_step: int) -> None:
            heard.append((self._steps, len(means), first_step))

    made: list[ForecastMade] = []
    forecaster = LiveForecaster(pasts(history), made.append, lambda _, at: Listening(16, 60, at))
    forecaster._work([asked(BEGIN, 4.0)])
    assert heard == [(BEGIN + 1, 6_000, step - 6_000)] * 2


async def test_what_was_said_wrongly_shows() -> None:
    """A night that was like no other before it: for the three days after it the record says so."""
    quiet = [50.0 + (minute // 7) % 2 for minute in range(5 * MINUTES_PER_DAY)]
    wild = [50.0 + 40.0 * (minute % 90 < 45) for minute in range(MINUTES_PER_DAY // 2)]
    kept = (await told(Bench({"H100": Past(BEGIN - 1, quiet)}), [asked(BEGIN, 50.0)])).types[0]
    past = Past(BEGIN - 1, [*quiet, *wild])
    lost = (await told(Bench({"H100": past}), [asked(BEGIN, 50.0)])).types[0]
    assert kept.coverage is not None
    assert lost.coverage is not None
    assert lost.coverage < kept.coverage - 0.01


async def test_a_gap_in_the_past_is_no_fall_to_zero() -> None:
    values: list[float | None] = list(walk(3, 3 * MINUTES_PER_DAY))
    broken = [None if 2_000 <= minute < 2_300 else gpus for minute, gpus in enumerate(values)]
    found = [
        (await told(Bench({"H100": Past(BEGIN - 1, past)}), [asked(BEGIN, 60.0)])).types[0]
        for past in (values, broken)
    ]
    for whole, torn in zip(*(each.soon_gpus for each in found), strict=True):
        assert torn == pytest.approx(whole, rel=0.1)


async def test_another_time_ahead_is_another_model_that_knows_as_much() -> None:
    """Also one that is asked for when the samples have gone on; little by little it is the same."""
    values = walk(4, 2 * MINUTES_PER_DAY)
    bench = Bench({"H100": Past(BEGIN - 1, values)})
    samples = [asked(BEGIN, 60.0)]
    for minute, soon_min in enumerate((12, 40, 38, 13), start=1):
        one = AskedType("H100", 60.0, soon_min, LATER)
        samples.append(MakeForecast(BEGIN + minute, (one,)))
    running = asyncio.create_task(bench.forecaster.run())
    widths = []
    for sample in samples:
        bench.forecaster.make(sample)
        (h100,) = (await bench.until(sample.minute)).types
        widths.append(h100.soon_gpus[-1] - 60.0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert widths[2] > 1.3 * widths[1]
    assert widths[3] == pytest.approx(widths[2], rel=0.1)
    assert widths[4] == pytest.approx(widths[1], rel=0.1)


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
    def broken(ahead_min: int, first_minute: int) -> Maximum:
        raise ZeroDivisionError

    made: list[ForecastMade] = []
    forecaster = LiveForecaster({}, made.append, broken)
    forecaster.make(asked(BEGIN, 5.0))
    with pytest.raises(ZeroDivisionError):
        await forecaster.run()
    assert made == []


async def test_who_leaves_does_not_wait_for_a_model_that_learns() -> None:
    observed: list[float] = []

    class Slow(MaximumForecaster):
        def observe(self, gpus: float) -> None:
            observed.append(gpus)
            threads.append(threading.current_thread())
            loop.call_soon_threadsafe(running.cancel)
            forecaster._ending.wait()

    threads: list[threading.Thread] = []
    loop = asyncio.get_running_loop()
    past = Past(BEGIN - 1, [5.0] * MINUTES_PER_DAY)
    made: list[ForecastMade] = []
    forecaster = LiveForecaster({"H100": past}, made.append, lambda *_: Slow(SOON_STEPS, 60))
    forecaster.make(asked(BEGIN, 5.0))
    running = asyncio.create_task(forecaster.run())
    await asyncio.gather(running, return_exceptions=True)
    for thread in threads:
        thread.join()
    assert (observed, made) == ([5.0], [])
