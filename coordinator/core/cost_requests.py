"""What people ask with `baton cost`, and the answer: a part of what `messages.py` says goes into
the core and comes out of it.

All money is in US dollars. What nobody has a price for is counted in GPU-hours of its own
(`unpriced_gpu_hours`) and in no sum.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

# A year and a day; more hours of use would be more than a message holds.
SPAN_DAYS_MAX: Final = 366


class Grouping(Enum):
    PROJECT = "project"
    JOB = "job"
    GPU_TYPE = "gpu_type"


@dataclass(frozen=True, slots=True)
class GetCosts:
    """Of the time from `begin_unix_ms` until before `end_unix_ms`; of one project, or of all. With
    `last_ms` above 0 the time begins so long before its end, which is now at the latest."""

    begin_unix_ms: int
    end_unix_ms: int
    by: Grouping = Grouping.PROJECT
    project: str = ""
    last_ms: int = 0


@dataclass(frozen=True, slots=True)
class Money:
    """What work has cost. `lease_usd` is the used part of leases, `owned_usd` what own GPUs are
    written off with, `energy_usd` that of own GPUs alone: in what is rented it is paid for.
    `token_usd` is the part of the sum that was spent where `tokens` were made."""

    gpu_hours: float = 0.0
    owned_usd: float = 0.0
    lease_usd: float = 0.0
    burst_usd: float = 0.0
    energy_kwh: float = 0.0
    energy_usd: float = 0.0
    unpriced_gpu_hours: float = 0.0
    tokens: float = 0.0
    token_usd: float = 0.0

    @property
    def usd(self) -> float:
        return self.owned_usd + self.lease_usd + self.burst_usd + self.energy_usd


@dataclass(frozen=True, slots=True)
class CostLine:
    """`key` is a project, the id of a job, or a type of GPU; `name` is a job's, else empty."""

    key: str
    name: str
    money: Money


@dataclass(frozen=True, slots=True)
class CostDay:
    """A day of the span, by UTC: its work, and what was leased and not used."""

    begin_unix_ms: int
    money: Money
    idle_lease_usd: float


@dataclass(frozen=True, slots=True)
class HourlyUse:
    """How many GPUs of a type were held, on average of each hour from `begin_unix_ms` on, and what
    they cost by the month and by the hour; None where nobody knows. `wanted_gpus` counts the time
    that those who held them had waited for them; `flexible_ratio` of it is of jobs that may wait by
    their own wish, for `flexible_hours` on average, and is counted as if they had not. Both are of
    the hours of which all attempts are kept; `past_gpus` is what samples say was wanted in those
    before, the newest last and NaN where nobody knows."""

    gpu_type: str
    begin_unix_ms: int
    gpus: tuple[float, ...]
    lease_usd: float | None
    burst_usd: float | None
    wanted_gpus: tuple[float, ...] = ()
    flexible_ratio: float = 0.0
    flexible_hours: int = 0
    past_gpus: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TypeFleet:
    """What there is of a type at present: own GPUs, and leases that run, as GPUs and when they
    end."""

    gpu_type: str
    owned_gpus: int
    lots: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CostPage:
    """The dearest lines first, of the span as it was taken. `kept_since_unix_ms` is since when all
    attempts are kept: of what was before some have been forgotten; None: there is none. `uses`
    begin up to a month before the span, as baselines need it."""

    lines: tuple[CostLine, ...]
    total: Money
    idle_lease_usd: float
    days: tuple[CostDay, ...]
    uses: tuple[HourlyUse, ...]
    kept_since_unix_ms: int | None
    prices_source: str
    energy_source: str
    fleets: tuple[TypeFleet, ...] = ()
    begin_unix_ms: int = 0
    end_unix_ms: int = 0
