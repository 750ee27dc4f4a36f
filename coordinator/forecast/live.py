"""Forecasts in the running coordinator: fed with its samples, made beside its loop.

Problem: a forecast takes milliseconds to a second of a core, and the loop that everybody waits for
has none to give. So the samples lie in a bounded queue, one thread takes them, and what it made
goes back through the inbox. A thread that is slow makes fewer forecasts, not later answers: it
catches up with all samples and speaks of the newest.

After a restart the last two weeks are told over again, from what is durable, so that what was
learned, and how often the bands have held, is there at once. Within these two weeks a restart
changes no forecast: minutes have their own numbers, and a type is known since something of it was
wanted, as for whoever was there. What was learned of older ones is learned again from their means
of ten minutes, which is nearly the same.
"""

import asyncio
import math
import threading
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from coordinator.core.demand_history import KEPT_STEPS, DemandHistory, Series
from coordinator.core.demand_messages import AskedType, ForecastMade, MakeForecast, TypeForecast
from coordinator.crew import crew

if TYPE_CHECKING:
    from coordinator.forecast.quantiles import Floats

# Two hours of samples that nobody has taken; the oldest go, and are unknown.
QUEUE_MAX: Final = 120
KEPT_MIN: Final = KEPT_STEPS[1]  # of a type, in case that it is asked for another time ahead
OLDER_PERIOD_MIN: Final = 10
OLDER_STEPS: Final = 60 * 144  # two months: a maximum remembers no more
# Times ahead follow what nodes take to boot, and a model is of one time: it is taken up to the next
# of these, and kept until it is off by more than twice as much.
AHEAD_STEP_MIN: Final = 5


class Maximum(Protocol):
    """A forecaster of the maximum over a time ahead; a step is a minute."""

    def observe(self, gpus: float) -> None: ...
    def tell_older(self, means: Sequence[float], first_step: int) -> None: ...
    def forecast(self) -> "Floats": ...
    @property
    def coverage(self) -> float | None: ...


# Of a time ahead in minutes, and of a series that begins with this minute.
Make = Callable[[int, int], Maximum]


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of a type before the first sample; `None` is unknown. The last value is of
    `newest_minute`. Where the first one is unknown, all that was ever seen came later. `older` are
    means of ten minutes, some of them of the same days; the last is of the step `newest_older`."""

    newest_minute: int
    gpus: Sequence[float | None]
    newest_older: int = 0
    older: Sequence[float | None] = ()


def pasts(history: DemandHistory) -> dict[str, Past]:
    """By GPU type, what a successor is told of what its predecessor saw."""
    newest = history.newest_minute
    if newest is None:
        return {}
    older = history.newest_step(OLDER_PERIOD_MIN) or 0
    return {
        gpu_type: Past(
            newest,
            history.read(1, newest - KEPT_MIN + 1, KEPT_MIN, Series(gpu_type)),
            older,
            history.read(OLDER_PERIOD_MIN, older - OLDER_STEPS + 1, OLDER_STEPS, Series(gpu_type)),
        )
        for gpu_type in history.gpu_types()
    }


def _since_wanted(past: Sequence[float | None]) -> list[float]:
    """NaN is unknown. Nobody samples a type before something of it is wanted, so those zeros are
    unknown, but for a type that was known before the first of these minutes."""
    values = [math.nan if gpus is None else gpus for gpus in past]
    if not past or past[0] is not None:
        return values
    first = _first_wanted(values)
    return [math.nan] * first + values[first:]


def _first_wanted(values: Sequence[float]) -> int:
    return next((place for place, gpus in enumerate(values) if gpus > 0), len(values))


class _Type:
    """One GPU type: what is remembered of it, and a model for each time ahead, `soon` and
    `later`."""

    def __init__(self, make: Make, past: Past, ending: threading.Event) -> None:
        self._make = make
        self._ending = ending
        self._values = array("d", _since_wanted(past.gpus))
        older = array("d", (math.nan if gpus is None else gpus for gpus in past.older))
        # Nobody knows whether the type was there before something of it was wanted.
        self._older = older[_first_wanted(older) :]
        self._first_older = past.newest_older - len(self._older) + 1
        self.newest = past.newest_minute
        self._models: dict[str, tuple[int, Maximum]] = {}

    def observe(self, minute: int, gpus: float) -> None:
        """Later than all before; those that were left out are unknown."""
        for between in range(max(self.newest + 1, minute - KEPT_MIN), minute + 1):
            value = gpus if between == minute else math.nan
            self._values.append(value)
            for _, model in self._models.values():
                model.observe(value)
        if len(self._values) > 2 * KEPT_MIN:
            del self._values[:-KEPT_MIN]
        self.newest = minute

    def model(self, name: str, ahead_min: int) -> Maximum:
        """One of at least this time ahead; it has seen all that is remembered."""
        known = self._models.get(name)
        if known is None or not ahead_min <= known[0] <= ahead_min + 2 * AHEAD_STEP_MIN:
            steps = -(-ahead_min // AHEAD_STEP_MIN) * AHEAD_STEP_MIN
            values = self._values[-KEPT_MIN:]
            known = self._models[name] = steps, self._make(steps, self.newest - len(values) + 1)
            for gpus in values:
                if self._ending.is_set():
                    break  # who leaves does not wait for a model that nobody will ask
                known[1].observe(gpus)
            if self._older and not self._ending.is_set():
                known[1].tell_older(self._older, self._first_older)
        return known[1]


class LiveForecaster:
    """`coordinator.ports.Forecasting`. `past` is what the store knew, by GPU type; `post` is called
    in the loop's thread."""

    def __init__(
        self,
        past: Mapping[str, Past],
        post: Callable[[ForecastMade], None],
        make: Make | None = None,
    ) -> None:
        self._past = dict(past)
        self._post = post
        self._make = make or _maximum
        self._ending = threading.Event()
        self._types: dict[str, _Type] = {}
        self._queue: deque[MakeForecast] = deque(maxlen=QUEUE_MAX)
        self._wake = asyncio.Event()

    def make(self, asked: MakeForecast) -> None:
        self._queue.append(asked)
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled. What goes wrong in the thread is a bug of ours and is raised."""
        loop, thread = asyncio.get_running_loop(), crew(1, "forecasts")
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                asked, self._queue = list(self._queue), deque(maxlen=QUEUE_MAX)
                if asked:
                    self._post(await loop.run_in_executor(thread, self._work, asked))
        finally:
            self._ending.set()
            thread.shutdown(wait=False, cancel_futures=True)

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
            known = self._types[asked.gpu_type] = _Type(self._make, past, self._ending)
        return known

    def _forecast(self, asked: AskedType) -> TypeForecast:
        found = self._types[asked.gpu_type]
        soon, later = found.model("soon", asked.soon_min), found.model("later", asked.later_min)
        return TypeForecast(
            asked.gpu_type,
            tuple(map(float, soon.forecast())),
            tuple(map(float, later.forecast())),
            soon.coverage,
        )


def _maximum(ahead_min: int, first_minute: int) -> Maximum:
    """Imported at the first sample of a GPU that is wanted, and in the thread: numpy is 25 MB and a
    tenth of a second, which a fleet without jobs on GPUs does not pay for."""
    from coordinator.forecast.maximum import MaximumForecaster

    # The minute that has begun is one of them.
    return MaximumForecaster(ahead_min + 1, 60, first_minute)
