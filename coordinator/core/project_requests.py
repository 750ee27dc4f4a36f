"""What people ask with `baton projects`, and the answer: a part of what `messages.py` says goes
into the core and comes out of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListProjects:
    pass


@dataclass(frozen=True, slots=True)
class ProjectView:
    """All GPUs and GPU-hours are weighted. `quota_hours` are those of a day; `None`: it has no
    quota. `used_hours` have faded. `entitled_gpus` are those that it may have now before others,
    `borrowed_gpus` those of `running_gpus` that it has beyond them, and `lent_gpus` those of its
    part that others have."""

    name: str
    quota_hours: float | None
    weight: float
    used_hours: float
    entitled_gpus: float
    running_gpus: float
    borrowed_gpus: float
    lent_gpus: float
    running_jobs: int
    waiting_jobs: int
    waiting_gpus: float


@dataclass(frozen=True, slots=True)
class ProjectPage:
    """By name: those with a quota, and all that have used something or have jobs. `half_life_hours`
    is after how long half of what was used is forgotten."""

    projects: tuple[ProjectView, ...]
    half_life_hours: float
