"""What people ask with `baton fit`, and the answer: a part of what `messages.py` says goes into the
core and comes out of it.

What is not known is `None` and has its sentence in `speed_why` or `memory_why`, never a number.

"""

from dataclasses import dataclass
from enum import Enum

from coordinator.core.model import JobSpec
from coordinator.core.workload import ModelFacts


class Fitting(Enum):
    """`ACCUMULATES`: with fewer samples at once than the job says, which trains the same."""

    UNKNOWN = "unknown"
    FITS = "fits"
    ACCUMULATES = "accumulates"
    DOES_NOT_FIT = "does_not_fit"


@dataclass(frozen=True, slots=True)
class FitJob:
    """`model` is what the caller knows of the model; without it `model_why` says why. `prices` are
    US dollars an hour for GPUs with a name in their name, and come before the table's."""

    spec: JobSpec
    model: ModelFacts | None = None
    model_why: str = ""
    prices: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Speed:
    """Steps a second: the median, and within what it lies eight times of ten."""

    steps_per_s: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A job on one type of GPU of the fleet. `gpus` of them take work at present, `gpus_job` is how
    many the job takes. `at_once` is how many samples fit into the model at once. `unsuited` says
    why the job would not be placed there; empty where it would."""

    gpu_type: str
    memory_bytes: int
    gpus: int
    gpus_job: int
    speed: Speed | None
    speed_why: str
    fitting: Fitting
    memory_why: str
    memory_needed_bytes: int | None = None
    at_once: int | None = None
    tokens_per_step: int | None = None
    usd_per_hour: float | None = None
    usd_per_million_tokens: float | None = None
    seconds: float | None = None
    unsuited: str = ""


@dataclass(frozen=True, slots=True)
class FitPage:
    """By name of the type; `prices_source` says what prices are from that the caller did not
    give."""

    fits: tuple[Fit, ...]
    prices_source: str = ""
