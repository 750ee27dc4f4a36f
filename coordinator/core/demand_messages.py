"""What the core asks of who forecasts, and the answer: a part of what `messages.py` says goes into
the core and comes out of it."""

from dataclasses import dataclass

from coordinator.core.demand_history import Still


@dataclass(frozen=True, slots=True)
class AskedType:
    """What is wanted of a GPU type in this minute, and over how many minutes its maximum is asked
    for."""

    gpu_type: str
    gpus: float
    soon_min: int
    later_min: int


@dataclass(frozen=True, slots=True)
class MakeForecast:
    """A command, with each sample: take it, and say what follows. `minute` is since 1970."""

    minute: int
    types: tuple[AskedType, ...]


@dataclass(frozen=True, slots=True)
class TypeForecast:
    """Quantiles (`capacity_model.LEVELS`) of the maximum demand over as many minutes as was asked.
    `coverage`: how much of what came lay within the 95% bands over three days; `None`: not known
    yet."""

    gpu_type: str
    soon_gpus: tuple[float, ...]
    later_gpus: tuple[float, ...]
    coverage: float | None = None


@dataclass(frozen=True, slots=True)
class ForecastMade:
    """An event: what follows from the samples up to `minute`."""

    minute: int
    types: tuple[TypeForecast, ...]


@dataclass(frozen=True, slots=True)
class GetDemand:
    """A person's question. What is empty is summed over; 0 stands for the default. `ahead_min`: in
    how many minutes it is asked what is still held. `holds`: whether it is asked who held GPUs,
    `still`: what was known at each hour."""

    gpu_type: str = ""
    project: str = ""
    job_class: str = ""
    period_min: int = 0
    steps: int = 0
    ahead_min: tuple[int, ...] = ()
    holds: bool = False
    still: bool = False


@dataclass(frozen=True, slots=True)
class HeldAhead:
    """Of the GPUs that are held now, those that are in so many minutes: for certain, and on
    average."""

    ahead_min: int
    certain_gpus: float
    expected_gpus: float


@dataclass(frozen=True, slots=True)
class Hold:
    """GPUs that a job has held, from its first attempt until it has ended: `None`, it has not. In
    minutes after the series' begin."""

    gpus: float
    begin_min: float
    end_min: float | None = None


@dataclass(frozen=True, slots=True)
class Holds:
    """Of those that ended before `since_min` not all are there; `None`: they are."""

    each: tuple[Hold, ...]
    since_min: float | None = None


@dataclass(frozen=True, slots=True)
class DemandSeries:
    """The answer. `gpus` are without a hole from `begin_unix_ms` on, `None` where nobody looked;
    the first is known. `held_gpus`: now. `holds`: by whom, where that was asked and is known.
    `still`, where it was asked: what was known at full hours, and is now, with the minutes after
    the begin at which it was."""

    begin_unix_ms: int
    period_min: int
    gpus: tuple[float | None, ...]
    gpu_type: str = ""
    held_gpus: float = 0.0
    held_ahead: tuple[HeldAhead, ...] = ()
    holds: Holds | None = None
    still: tuple[tuple[float, Still], ...] = ()
