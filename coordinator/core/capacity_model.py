"""Capacity as plans see it: boxes with or without power, what is wanted, and where boxes come from.

Problem: a plan that reads the live state cannot be replayed against a year of demand. So it reads
these values; the live coordinator makes them of its nodes, and a replay makes them of a series.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

# Quantiles of every forecast that a plan reads, in the order of its tuples.
LEVELS: Final = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)


class Power(Enum):
    """`leaving`: on, takes nothing new, and goes when it is empty. `failed`: it did not come up as
    often as was tried, and is left alone until a person says otherwise."""

    ON = "on"
    LEAVING = "leaving"
    STOPPING = "stopping"
    OFF = "off"
    STARTING = "starting"
    FAILED = "failed"


class Source(Enum):
    OWNED = "owned"
    LEASED = "leased"
    BURST = "burst"


@dataclass(frozen=True, slots=True)
class Box:
    """A node as a plan sees it. `model` is what boot times are learnt by. `since_ms`: in this power
    phase. `idle_ms`: since when nothing has run there, 0 while something does. `guaranteed`: a
    guaranteed job is there. `uploading`: it has a checkpoint that lies nowhere else yet. `closed`:
    a person or its health has closed it; it is no capacity and is never touched. `starts_ms`: when
    it was switched on during the last day, or before. `boot_failures`: in a row. `refused`: it was
    ordered off lately and stayed on."""

    node: str
    model: str
    gpu_type: str
    gpus: int
    power: Power
    since_ms: int
    source: Source = Source.OWNED
    held_gpus: int = 0
    idle_ms: int = 0
    guaranteed: bool = False
    uploading: bool = False
    closed: bool = False
    starts_ms: tuple[int, ...] = ()
    boot_failures: int = 0
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is wanted of a GPU type. `soon_gpus` are quantiles (`LEVELS`) of the *maximum* demand
    until a node that is started now would be there, and one decision more; `later_gpus` of the
    maximum over the time in which a node that is switched off now has to stay off to be worth it.
    `coverage`: how much of what came lay within the 95% bands over three days, if known. `stale`:
    what it is made of is too old, or a clock has jumped. `frees_ms`: after which a node is expected
    to free, by the ages of what runs; None: nobody knows. `late_gpus`: so many more keep the
    deadlines of `late_jobs`, which would miss them by waiting for it (`in_time.py`); they may wait
    for another type, too. `rentable_gpus`: so many of those that wait may be a reason to rent;
    None: all. `rentable_gangs`: of these the jobs that take several rented nodes, as how many each;
    `late_gangs` of those of `late_jobs`. `patient_gpus` wait beside those that are counted, and may
    for longer than a node takes to be there (`patience.py`). Of those that run
    `ending_gpus` come free before such a node, as far as that is believed, and so many as
    `ended_later_gpus` need not be kept for later (`known_ends.py`)."""

    gpu_type: str
    running_gpus: int
    queued_gpus: int
    guaranteed_gpus: int
    soon_gpus: tuple[float, ...] = ()
    later_gpus: tuple[float, ...] = ()
    coverage: float | None = None
    stale: bool = False
    frees_ms: int | None = None
    late_gpus: int = 0
    late_jobs: tuple[int, ...] = ()
    rentable_gpus: int | None = None
    rentable_gangs: tuple[int, ...] = ()
    late_gangs: tuple[int, ...] = ()
    patient_gpus: int = 0
    ending_gpus: int = 0
    ended_later_gpus: int = 0

    @property
    def urgent_gpus(self) -> int:
        """Of those that wait, the ones for which GPUs may be rented."""
        waiting = self.queued_gpus
        return waiting if self.rentable_gpus is None else min(waiting, self.rentable_gpus)
