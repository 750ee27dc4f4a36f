"""What goes into the agent's core and what comes out.

In: orders of the coordinator, words of trainers, ends of processes, outcomes of copying, readings,
and the passing of time. Out: *records* for the journal, and *commands* that may be carried out only
after the records of their batch are durable. A command may be carried out twice without harm.
"""

from dataclasses import dataclass

from agent.core.copy_messages import ReplicateCheckpoint as ReplicateCheckpoint
from agent.core.copy_messages import ReplicationDone as ReplicationDone
from agent.core.copy_messages import ReplicationFailed as ReplicationFailed
from agent.core.copy_messages import SetReplicaTarget as SetReplicaTarget
from agent.core.gpu_messages import FollowRate, GpusInspected, InspectGpus, Report, Sampled
from agent.core.health import GpuHealthChanged, GpuVerdict
from agent.core.link_messages import ComeLater as ComeLater
from agent.core.link_messages import EventAck as EventAck
from agent.core.link_messages import LeaseRenewal as LeaseRenewal
from agent.core.link_messages import Welcome as Welcome
from agent.core.trainer_messages import TrainerMessage, TrainerTime
from agent.core.values import (
    DriverLoaded,
    Gang,
    GpuFacts,
    GpuSample,
    HostFacts,
    HostSample,
    Launch,
    ProcessesStuck,
    ProcessExit,
    ReplicaSource,
    RestoreCandidate,
    Restored,
    StoredCheckpoint,
    XidSeen,
)
from agent.core.values import HeldAttempt as HeldAttempt  # likewise
from agent.core.values import JobSpec as JobSpec  # a part of an order, and looked for here

# --- from the coordinator -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartAttempt:
    attempt: str
    spec: JobSpec
    gpu_uuids: tuple[str, ...]
    candidates: tuple[RestoreCandidate, ...] = ()
    replica_target: ReplicaSource | None = None
    restart_count: int = 0
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
class CommitResult:
    """`head` is the job's last committed checkpoint, which the next proposal has to follow."""

    attempt: str
    digest: str
    accepted: bool
    reason: str = ""
    head: str = ""


@dataclass(frozen=True, slots=True)
class KeepCheckpoints:
    digests: tuple[str, ...]


Order = (
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

# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The agent has started: these attempts' processes were found alive, these GPUs are here."""

    adopted: tuple[str, ...]
    host: HostFacts
    gpus: tuple[GpuFacts, ...]


@dataclass(frozen=True, slots=True)
class Connected:
    """A session began; `checkpoints` are the digests on this disk, newest first."""

    checkpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disconnected:
    reason: str


@dataclass(frozen=True, slots=True)
class FromCoordinator:
    """`chance` is fresh randomness (32 hexadecimal digits), from which a start takes its token."""

    order: Order
    chance: str


@dataclass(frozen=True, slots=True)
class FromTrainer:
    attempt: str
    message: TrainerMessage


@dataclass(frozen=True, slots=True)
class ProcessStarted:
    attempt: str
    pid: int
    age_ms: int = 0  # since the program began, which a busy agent hears of late


@dataclass(frozen=True, slots=True)
class StartFailed:
    """`permanent`: another node would fail just so."""

    attempt: str
    reason: str
    permanent: bool = True


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    exit: ProcessExit


@dataclass(frozen=True, slots=True)
class RestoreDone:
    attempt: str
    restored: Restored


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    attempt: str
    reason: str


@dataclass(frozen=True, slots=True)
class StoreDone:
    attempt: str
    stored: StoredCheckpoint


@dataclass(frozen=True, slots=True)
class StoreFailed:
    attempt: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaptureFound:
    """The newest whole capture in the attempt's slab, by its `capture_name`; empty: there is
    none. `parts` as in `TrainerCheckpoint`."""

    attempt: str
    name: str = ""
    step: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent when `next_wake_ms` says so."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """The agent is about to end; its trainers go on. `absence_ms` of `None`: it does not return."""

    absence_ms: int | None


Event = (
    Opened
    | Connected
    | Disconnected
    | FromCoordinator
    | FromTrainer
    | ProcessStarted
    | StartFailed
    | ProcessEnded
    | ProcessesStuck
    | RestoreDone
    | RestoreFailed
    | StoreDone
    | StoreFailed
    | CaptureFound
    | ReplicationDone
    | ReplicationFailed
    | Sampled
    | XidSeen
    | DriverLoaded
    | GpusInspected
    | Tick
    | Leaving
)

# --- to the coordinator ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    total_steps: int = 0
    metrics: tuple[tuple[str, float], ...] = ()
    time: TrainerTime | None = None


@dataclass(frozen=True, slots=True)
class Hello:
    """`acknowledged_sequence`: of events up to this one there is nothing left to say."""

    node: str
    journal_id: str
    peer_address: str
    host: HostFacts
    gpus: tuple[GpuFacts, ...]
    attempts: tuple[HeldAttempt, ...]
    checkpoints: tuple[str, ...]
    acknowledged_sequence: int = 0
    health: tuple[GpuVerdict, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`host` and `gpus` are the report that it carries, if any, and so long ago were read."""

    sequence: int
    host: HostSample | None
    gpus: tuple[GpuSample, ...]
    attempts: tuple[HeldAttempt, ...]
    progress: tuple[tuple[str, Progress], ...]
    telemetry_age_ms: int = 0


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """`restore_ms` is what fetching and laying out its checkpoint took, `start_ms` the rest from
    the order to the running program; `None` after an agent's restart in between. `held_ranks` as in
    `Restored`."""

    pid: int
    restored_digest: str = ""
    restored_step: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    restore_ms: int | None = None
    start_ms: int | None = None
    held_ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptExited:
    """`by_itself`: no order to stop it had come by then. `said_exit_code`: what the trainer below a
    launcher has left with, by its own word."""

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
    """`parts`: as many ranks hand over a part of this step each, and this is one of them; 1: it is
    whole."""

    digest: str
    parent: str
    step: int
    size_bytes: int
    replicas: tuple[str, ...]
    parts: int = 1


SpooledBody = (
    AttemptStarted | AttemptExited | AttemptRefused | AttemptMilestone | CheckpointProposed
    | GpuHealthChanged
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AgentEvent:
    """A fact that waits in the spool until the coordinator has it durably. `age_ms`: when it was
    sent."""

    sequence: int
    unix_ms: int
    attempt: str
    body: SpooledBody
    age_ms: int = 0


@dataclass(frozen=True, slots=True)
class Goodbye:
    absence_ms: int | None


Upward = Hello | Heartbeat | AgentEvent | Goodbye

# --- commands -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    message: Upward


@dataclass(frozen=True, slots=True)
class CloseLink:
    reason: str


@dataclass(frozen=True, slots=True)
class RegisterTrainer:
    """Let the trainer with this token speak for the attempt."""

    attempt: str
    token: str


@dataclass(frozen=True, slots=True)
class RestoreCheckpoint:
    """`gang`: the place of the rank that will read it; `None` where it is the only one."""

    attempt: str
    candidates: tuple[RestoreCandidate, ...]
    gang: Gang | None = None


@dataclass(frozen=True, slots=True)
class StartProcess:
    launch: Launch
    trainer_config_json: str


@dataclass(frozen=True, slots=True)
class SignalProcess:
    attempt: str
    signal: str


@dataclass(frozen=True, slots=True)
class DumpStacks:
    """Have every process of the attempt that can write the stacks of its threads into its log.
    `nccl_pipes` is how the names of the pipes begin that torch's flight recorder listens on; empty:
    there are none."""

    attempt: str
    nccl_pipes: str


@dataclass(frozen=True, slots=True)
class KillProcess:
    attempt: str


@dataclass(frozen=True, slots=True)
class ForgetAttempt:
    attempt: str


@dataclass(frozen=True, slots=True)
class TellTrainer:
    """`message` as the trainer contract has it, as pairs."""

    attempt: str
    message: tuple[tuple[str, str | int], ...]


@dataclass(frozen=True, slots=True)
class FindCapture:
    """Look for the newest whole capture in the attempt's slab."""

    attempt: str


@dataclass(frozen=True, slots=True)
class ReleaseSlab:
    """The attempt's memory for captures is not needed any more."""

    attempt: str


@dataclass(frozen=True, slots=True)
class StoreCheckpoint:
    """`path` is a directory, or the `capture_name` of a capture in the attempt's slab. `part`: it
    is the part of the attempt's rank, and not whole."""

    attempt: str
    path: str
    step: int
    parent: str
    part: bool = False


@dataclass(frozen=True, slots=True)
class DiscardSource:
    """The trainer's directory is stored, or superseded."""

    path: str


@dataclass(frozen=True, slots=True)
class CollectCheckpoints:
    keep: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Log:
    level: str
    event: str
    fields: tuple[tuple[str, object], ...] = ()


Command = (
    Send
    | CloseLink
    | RegisterTrainer
    | RestoreCheckpoint
    | StartProcess
    | SignalProcess
    | DumpStacks
    | KillProcess
    | ForgetAttempt
    | TellTrainer
    | FindCapture
    | ReleaseSlab
    | StoreCheckpoint
    | DiscardSource
    | ReplicateCheckpoint
    | CollectCheckpoints
    | InspectGpus
    | FollowRate
    | Report
    | Log
)
