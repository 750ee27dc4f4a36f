"""What goes into the coordinator's core and what comes out.

In: *requests* of people (each with the address of its reply), *messages* of agents (each with the
session it came on), and the passing of time. Out: *records*, which must be durable, and *commands*,
which may leave the process only after the records of their batch are. The core never waits for
either.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from coordinator.core.allocation_messages import AllocationMade as AllocationMade
from coordinator.core.allocation_messages import MakeAllocation as MakeAllocation
from coordinator.core.capacity_messages import Actuate as Actuate
from coordinator.core.capacity_messages import Actuated as Actuated
from coordinator.core.checkpoint_requests import (
    FindCheckpoint,
    ListCheckpoints,
    NoteManifests,
    PinCheckpoint,
    UnpinCheckpoint,
)
from coordinator.core.cost_requests import CostPage, GetCosts
from coordinator.core.demand_history import DropDemand as DropDemand
from coordinator.core.demand_history import PutDemand as PutDemand
from coordinator.core.demand_history import PutDemandSeries as PutDemandSeries
from coordinator.core.demand_messages import DemandSeries, GetDemand
from coordinator.core.demand_messages import ForecastMade as ForecastMade
from coordinator.core.demand_messages import MakeForecast as MakeForecast
from coordinator.core.explanations import Explanation as Explanation
from coordinator.core.fit_requests import FitJob, FitPage
from coordinator.core.job_requests import CancelJob as CancelJob
from coordinator.core.job_requests import ExplainJob as ExplainJob
from coordinator.core.job_requests import GetJob as GetJob
from coordinator.core.job_requests import HoldJob as HoldJob
from coordinator.core.job_requests import ListJobs as ListJobs
from coordinator.core.job_requests import ReleaseJob as ReleaseJob
from coordinator.core.job_requests import RequeueJob as RequeueJob
from coordinator.core.job_requests import Submit as Submit
from coordinator.core.launch import Gang, PeerAddress, RestoreCandidate
from coordinator.core.lease_messages import LeasesMade as LeasesMade
from coordinator.core.lease_messages import MakeLeases as MakeLeases
from coordinator.core.lease_messages import PublishLeases as PublishLeases
from coordinator.core.lease_messages import PutLeaseDay as PutLeaseDay
from coordinator.core.link_messages import ComeLater as ComeLater
from coordinator.core.link_messages import EventAck as EventAck
from coordinator.core.link_messages import HeldAttempt as HeldAttempt
from coordinator.core.link_messages import LeaseRenewal as LeaseRenewal
from coordinator.core.link_messages import Welcome as Welcome
from coordinator.core.model import (
    Attempt,
    Checkpoint,
    CheckpointView,
    GpuFacts,
    GpuHealth,
    GpuReading,
    HostFacts,
    HostTelemetry,
    Job,
    JobEvent,
    JobSpec,
    JobView,
    Node,
    NodeView,
    Progress,
    WaitingPart,
)
from coordinator.core.node_requests import CordonNode as CordonNode
from coordinator.core.node_requests import DrainNode as DrainNode
from coordinator.core.node_requests import DropNode as DropNode
from coordinator.core.node_requests import ForgetNode, SetTelemetryRate
from coordinator.core.node_requests import ListNodes as ListNodes
from coordinator.core.node_requests import UncordonNode as UncordonNode
from coordinator.core.project_requests import ListProjects, ProjectPage
from coordinator.core.scale_records import PutScaleRecord as PutScaleRecord
from coordinator.core.scale_requests import ScaleAnswer, ScaleRequest

# --- requests -------------------------------------------------------------------------------------


RequestBody = (
    Submit
    | GetJob
    | ListJobs
    | CancelJob
    | HoldJob
    | ReleaseJob
    | RequeueJob
    | ExplainJob
    | FitJob
    | GetCosts
    | ListProjects
    | GetDemand
    | ListCheckpoints
    | NoteManifests
    | PinCheckpoint
    | UnpinCheckpoint
    | FindCheckpoint
    | ListNodes
    | CordonNode
    | DrainNode
    | UncordonNode
    | SetTelemetryRate
    | ForgetNode
    | ScaleRequest
)


@dataclass(frozen=True, slots=True)
class Request:
    """`reply_to` is the shell's; the reply carries it back."""

    reply_to: int
    body: RequestBody


# --- from agents ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """`acknowledged`: of events up to this sequence the agent has nothing left to say, since some
    coordinator had them; after a kill it may be less. `gangs`: the agent knows ranks of a job of
    several; `shares`: it knows jobs that share a GPU."""

    node: str
    journal_id: str
    peer_address: str
    host: HostFacts
    gpus: tuple[GpuFacts, ...]
    attempts: tuple[HeldAttempt, ...] = ()
    checkpoints: tuple[str, ...] = ()
    acknowledged: int = 0
    health: tuple[GpuHealth, ...] = ()
    gangs: bool = True
    shares: bool = True


@dataclass(frozen=True, slots=True)
class Heartbeat:
    sequence: int
    host: HostTelemetry | None = None
    gpus: tuple[GpuReading, ...] = ()
    attempts: tuple[HeldAttempt, ...] = ()
    progress: tuple[tuple[str, Progress], ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """`held_ranks`: whose parts its node holds whole; empty: all of what it resumed from."""

    pid: int
    restored_digest: str = ""
    restored_step: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    restore_ms: int | None = None
    start_ms: int | None = None
    held_ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptExited:
    """`by_itself`: no order to stop it had reached its node; false where that is not known.
    `said_exit_code`: what the trainer below a launcher has left with, by its own word."""

    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    by_itself: bool = False
    said_exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptRefused:
    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class AttemptMilestone:
    name: str


@dataclass(frozen=True, slots=True)
class CheckpointProposed:
    """`parts` of 0 or 1: it is whole; else one part of so many."""

    digest: str
    parent: str
    step: int
    size_bytes: int
    replicas: tuple[str, ...]
    parts: int = 0


@dataclass(frozen=True, slots=True)
class GpuHealthChanged:
    """Of the node, and of no attempt."""

    gpus: tuple[GpuHealth, ...]


AgentEventBody = (
    AttemptStarted | AttemptExited | AttemptRefused | AttemptMilestone | CheckpointProposed
    | GpuHealthChanged
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AgentEvent:
    """`unix_ms` is the agent's wall clock when it happened, and so long ago, `age_ms`, that was
    when it was sent, whatever that clock says; `None`: an older agent does not say."""

    sequence: int
    unix_ms: int
    attempt: str
    body: AgentEventBody
    age_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Goodbye:
    """`absence_ms` is how long the agent expects to be away; `None`: for good."""

    absence_ms: int | None = None


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The stream ended, however it did."""


AgentMessage = Hello | Heartbeat | AgentEvent | Goodbye | SessionClosed


@dataclass(frozen=True, slots=True)
class FromAgent:
    """`session` numbers streams as they are accepted. `came_ms`: before its batch; `None`: now."""

    session: int
    message: AgentMessage
    came_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent every `TICK_MS` by the shell."""


@dataclass(frozen=True, slots=True)
class Decide:
    """The inbox is drained: place what can be placed, once for the whole batch."""


Event = Request | FromAgent | Actuated | Tick | Decide | AllocationMade | ForecastMade | LeasesMade

# --- to agents ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartAttempt:
    attempt: str
    spec: JobSpec
    gpu_uuids: tuple[str, ...]
    candidates: tuple[RestoreCandidate, ...]
    replica_target: PeerAddress | None
    restart_count: int
    gang: Gang | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """`grace_ms` of `None` kills at once; `precopy_ms` is how long it may save before the stop."""

    attempt: str
    grace_ms: int | None
    reason: str
    precopy_ms: int | None = None


@dataclass(frozen=True, slots=True)
class LoneCheckpoint:
    """A committed checkpoint, or a rank's part of one, of which no other node within reach has a
    copy. `parts`: of how many the checkpoint is."""

    digest: str
    step: int
    parts: int


@dataclass(frozen=True, slots=True)
class SetReplicaTarget:
    """`lone` is to be copied there at once. `lost`: who had the copies before takes none."""

    attempt: str
    target: PeerAddress | None
    required: bool
    lone: LoneCheckpoint | None = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`head` is the job's last committed checkpoint after the decision."""

    attempt: str
    digest: str
    accepted: bool
    reason: str = ""
    head: str = ""


@dataclass(frozen=True, slots=True)
class KeepCheckpoints:
    digests: tuple[str, ...]


AgentOrder = (
    Welcome
    | ComeLater
    | LeaseRenewal
    | EventAck
    | StartAttempt
    | StopAttempt
    | SetReplicaTarget
    | CommitResult
    | KeepCheckpoints
)

# --- effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutJob:
    job: Job


@dataclass(frozen=True, slots=True)
class DropJob:
    """The job, its attempts, checkpoints and history leave the store."""

    job_id: int


@dataclass(frozen=True, slots=True)
class PutAttempt:
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class PutCheckpoint:
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class DropCheckpoint:
    job_id: int
    digest: str


@dataclass(frozen=True, slots=True)
class PutPart:
    part: WaitingPart


@dataclass(frozen=True, slots=True)
class DropPart:
    job_id: int
    rank: int
    digest: str


@dataclass(frozen=True, slots=True)
class PutNode:
    node: Node


@dataclass(frozen=True, slots=True)
class AppendEvent:
    event: JobEvent


Record = (
    PutJob | DropJob | PutAttempt | PutCheckpoint | DropCheckpoint | PutPart | DropPart | PutNode
    | AppendEvent | PutDemandSeries | PutDemand | DropDemand | PutScaleRecord
    | PutLeaseDay | DropNode
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Send:
    session: int
    order: AgentOrder


@dataclass(frozen=True, slots=True)
class CloseSession:
    session: int
    reason: str


class RefusalKind:
    """Why a request is refused; `rpc.py` maps each to one gRPC status."""

    INVALID = "invalid"
    NOT_FOUND = "not_found"
    WRONG_PHASE = "wrong_phase"
    EXHAUSTED = "exhausted"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that says no; `sentence` says what to change."""

    kind: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """`jobs`: how many, of an array; the others' ids follow that of the first."""

    job_id: int
    reason: str
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class JobPage:
    jobs: tuple[JobView, ...]
    next_before_job_id: int


@dataclass(frozen=True, slots=True)
class CheckpointPage:
    """Newest first."""

    checkpoints: tuple[CheckpointView, ...]


@dataclass(frozen=True, slots=True)
class NodePage:
    """By id. `next_after_node`: where the next page begins; empty: there is none."""

    nodes: tuple[NodeView, ...]
    next_after_node: str = ""


_Page = JobPage | CheckpointPage | NodePage | FitPage | ProjectPage | CostPage | DemandSeries
Answer = Refusal | Submitted | JobView | Explanation | NodeView | ScaleAnswer | _Page


@dataclass(frozen=True, slots=True)
class Reply:
    reply_to: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Log:
    """One line of the coordinator's log; `event` is a stable name, `fields` are bound to it."""

    level: str
    event: str
    fields: tuple[tuple[str, object], ...] = ()


Command = (
    Send | CloseSession | Reply | Log | Actuate | MakeAllocation | MakeForecast | MakeLeases
    | PublishLeases
)  # fmt: skip
Effect = Record | Command


# A frozenset of them is asked in one look, and all of them in a row for each effect are not.
_RECORDS = frozenset(get_args(Record))


def divide(effects: Iterable[Effect]) -> tuple[list[Record], list[Command]]:
    """Records and commands, each in their order."""
    records: list[Record] = []
    commands: list[Command] = []
    for effect in effects:
        (records if type(effect) in _RECORDS else commands).append(effect)  # type: ignore[arg-type]
    return records, commands
