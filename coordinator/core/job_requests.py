"""What people ask of jobs, a part of what `messages.py` says goes into the core."""

from dataclasses import dataclass

from coordinator.core.model import JobSpec
from coordinator.core.phases import JobPhase

ON_HOLD = "on hold until `baton release`"  # the reason of a job that was submitted so


@dataclass(frozen=True, slots=True)
class Submit:
    """`forgotten_job_id`: the job that it is (`found.py`); 0: a new one. `deadline_in_ms`, above 0:
    from now on, in place of the one that the request has."""

    spec: JobSpec
    request_id: str = ""
    forgotten_job_id: int = 0
    deadline_in_ms: int = 0


@dataclass(frozen=True, slots=True)
class GetJob:
    job_id: int


@dataclass(frozen=True, slots=True)
class ListJobs:
    phases: tuple[JobPhase, ...] = ()
    project: str = ""
    page_size: int = 0
    before_job_id: int = 0
    fold_arrays: bool = False  # of an array its newest trial alone


@dataclass(frozen=True, slots=True)
class CancelJob:
    """`array`, here and below: the whole array of which the job is a trial."""

    job_id: int
    array: bool = False


@dataclass(frozen=True, slots=True)
class HoldJob:
    job_id: int
    array: bool = False


@dataclass(frozen=True, slots=True)
class ReleaseJob:
    """`restored`: instead of a job all that are held since the store was put back, so many at a
    time as one commit should have."""

    job_id: int
    array: bool = False
    restored: bool = False


@dataclass(frozen=True, slots=True)
class RequeueJob:
    """`all_trials`: also those of the array that run or have succeeded."""

    job_id: int
    abandon_unreachable_checkpoints: bool = False
    array: bool = False
    all_trials: bool = False


@dataclass(frozen=True, slots=True)
class ExplainJob:
    job_id: int
