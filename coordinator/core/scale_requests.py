"""What people ask with `baton plan` and `baton scale`, and the answers: a part of what
`messages.py` says goes into the core and comes out of it."""

from dataclasses import dataclass

from coordinator.core.scale_records import ScaleRecord


@dataclass(frozen=True, slots=True)
class GetPlan:
    pass


@dataclass(frozen=True, slots=True)
class ListScaleRecords:
    """The newest first; of one GPU type where it is named. At most `RECORDS_MAX`; 0: 20."""

    count: int = 0
    gpu_type: str = ""


@dataclass(frozen=True, slots=True)
class GetScaleRecord:
    number: int


@dataclass(frozen=True, slots=True)
class ApproveScaling:
    """Carry out what the decision proposes."""

    number: int


@dataclass(frozen=True, slots=True)
class TypePlan:
    """A GPU type as the last plan saw it, in GPUs: those of nodes by their power, those that are
    free on nodes that are on, what runs, waits and is needed, and what the plan wants on.
    `boot_ms`: how long a start takes. `sentence`: what the newest decision about it says, which
    was made at `decided_unix_ms`.
    `rented_gpus`: of all these, those that are paid for by the hour. `need_reason`: why more or
    fewer are needed than run and wait; empty where it is as many."""

    gpu_type: str
    on_gpus: int
    idle_gpus: int
    leaving_gpus: int
    starting_gpus: int
    off_gpus: int
    failed_gpus: int
    closed_gpus: int
    running_gpus: int
    queued_gpus: int
    guaranteed_gpus: int
    need_gpus: int
    keep_gpus: int
    wanted_gpus: int
    boot_ms: int
    soon_gpus: tuple[float, ...] = ()
    later_gpus: tuple[float, ...] = ()
    coverage: float | None = None
    stale: bool = False
    sentence: str = ""
    rented_gpus: int = 0
    need_reason: str = ""
    decided_unix_ms: int | None = None


@dataclass(frozen=True, slots=True)
class PlanPage:
    """`why` explains the mode. `proposed` are decisions that wait for a person. `made_unix_ms`:
    when the plan was made; `None`: none has been."""

    mode: str
    why: str
    acts: bool
    level: float
    types: tuple[TypePlan, ...] = ()
    proposed: tuple[ScaleRecord, ...] = ()
    made_unix_ms: int | None = None


@dataclass(frozen=True, slots=True)
class ScalePage:
    records: tuple[ScaleRecord, ...]


ScaleRequest = GetPlan | ListScaleRecords | GetScaleRecord | ApproveScaling
ScaleAnswer = PlanPage | ScalePage
