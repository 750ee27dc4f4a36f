"""Forecasts in the running coordinator: fed with its samples, made beside its loop.

Problem: a forecast takes milliseconds to a second of a core, and the loop that everybody waits for
has none to give. So the samples lie in a bounded queue, one thread takes them, and what it made
goes back through the inbox. A thread that is slow makes fewer forecasts, not later answers: it
catches up with all samples and speaks of the newest.

What is said is judged by what comes: every ten minutes the band of 95 percent is put aside, and
over three days it should have held 95 times of 100 (`coverage`). After a restart the last three
days are said over again, from what is durable, so that the record is there at once.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from coordinator.core.demand_messages import AskedType, ForecastMade, MakeForecast, TypeForecast

if TYPE_CHECKING:
    from coordinator.forecast.quantiles import Floats

# Two hours of samples that nobody has taken; the oldest go, and are unknown.
QUEUE_MAX: Final = 120
JUDGED_EVERY_MIN: Final = 10
JUDGED_MAX: Final = 3 * 1_440 // JUDGED_EVERY_MIN  # three days
JUDGED_MIN: Final = 1_440 // JUDGED_EVERY_MIN  # fewer say nothing


class Maximum(Protocol):
    """A forecaster of the maximum, one of each GPU type; a step is a minute."""

    def observe(self, gpus: float) -> None: ...
    def forecast(self, ahead_min: int) -> "Floats": ...


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of a type before the first sample; `None` is unknown. The last value is of
    `newest_minute`."""

    newest_minute: int
    gpus: Sequence[float | None]


@dataclass(slots=True)
class _Band:
    """Said in one minute, and judged when the last of those that it is about has come."""

    due: int
    low: float
    high: float
    most: float = 0.0


class _Type:
    """One GPU type: its forecaster, and how right it was."""

    def __init__(self, maximum: Maximum, minute: int) -> None:
        self.maximum = maximum
        self.newest = minute
        self._bands: deque[_Band] = deque()
        self._held: deque[bool] = deque(maxlen=JUDGED_MAX)

    def observe(self, minute: int, gpus: float) -> None:
        """Later than all before; those that were left out are unknown."""
        for between in range(self.newest + 1, minute + 1):
            value = gpus if between == minute else math.nan
            self.maximum.observe(value)
            self._judge(between, value)
        self.newest = minute

    def _judge(self, minute: int, gpus: float) -> None:
        for band in self._bands:
            band.most = max(band.most, gpus) if not math.isnan(gpus) else math.nan
        while self._bands and self._bands[0].due <= minute:
            band = self._bands.popleft()
            if not math.isnan(band.most):
                self._held.append(band.low <= band.most <= band.high)

    def forecast(self, ahead_min: int) -> "Floats":
        said = self.maximum.forecast(ahead_min)
        if self.newest % JUDGED_EVERY_MIN == 0:
            self._bands.append(_Band(self.newest + ahead_min, float(said[0]), float(said[-1])))
        return said

    @property
    def coverage(self) -> float | None:
        if len(self._held) < JUDGED_MIN:
            return None
        return sum(self._held) / len(self._held)


class LiveForecaster:
    """`coordinator.ports.Forecasting`. `past` is what the store knew, by GPU type; `post` is called
    in the loop's thread."""

    def __init__(
        self,
        past: Mapping[str, Past],
        post: Callable[[ForecastMade], None],
        make: Callable[[], Maximum] | None = None,
    ) -> None:
        self._past = dict(past)
        self._post = post
        self._make = make or _recent
        self._ending = False
        self._types: dict[str, _Type] = {}
        self._queue: deque[MakeForecast] = deque(maxlen=QUEUE_MAX)
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forecast")

    def make(self, asked: MakeForecast) -> None:
        self._queue.append(asked)
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled. What goes wrong in the thread is a bug of ours and is raised."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                asked, self._queue = list(self._queue), deque(maxlen=QUEUE_MAX)
                if asked:
                    self._post(await loop.run_in_executor(self._thread, self._work, asked))
        finally:
            self._ending = True
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _work(self, samples: Sequence[MakeForecast]) -> ForecastMade:
        """In the thread: take all, and speak of the newest."""
        for asked in samples:
            for one in asked.types:
                self._type(one, asked.minute).observe(asked.minute, one.gpus)
        newest = samples[-1]
        return ForecastMade(newest.minute, tuple(map(self._forecast, newest.types)))

    def _type(self, asked: AskedType, minute: int) -> _Type:
        known = self._types.get(asked.gpu_type)
        if known is None or known.newest >= minute:  # then a wrong clock has been set right
            past = self._past.pop(asked.gpu_type, Past(minute - 1, ()))
            self._types[asked.gpu_type] = self._remembering(past, asked.soon_min)
        return self._types[asked.gpu_type]

    def _remembering(self, past: Past, soon_min: int) -> _Type:
        """One that has seen the past, and has been judged by the last days of it."""
        first = past.newest_minute - len(past.gpus)
        found = _Type(self._make(), first)
        judged_from = past.newest_minute - JUDGED_MAX * JUDGED_EVERY_MIN
        for minute, gpus in enumerate(past.gpus, start=first + 1):
            if gpus is None or self._ending:
                continue
            found.observe(minute, gpus)
            if minute > judged_from and minute % JUDGED_EVERY_MIN == 0:
                found.forecast(soon_min)
        return found

    def _forecast(self, asked: AskedType) -> TypeForecast:
        found = self._types[asked.gpu_type]
        soon, later = found.forecast(asked.soon_min), found.maximum.forecast(asked.later_min)
        return TypeForecast(
            asked.gpu_type,
            tuple(map(float, soon)),
            tuple(map(float, later)),
            found.coverage,
        )


def _recent() -> Maximum:
    """Imported at the first sample of a GPU that is wanted, and in the thread: numpy is 25 MB and a
    tenth of a second, which a fleet without jobs on GPUs does not pay for."""
    from coordinator.forecast.recent import RecentMaximum

    return RecentMaximum()
