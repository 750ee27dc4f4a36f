"""The nouns of the coordinator's core: immutable values, replaced as a whole when something
changes.

Problem: a mutable record that is handed to a writer thread changes while it is being written. Every
value here is frozen, so the value in the core's dictionaries *is* the record that goes to the
store, and a reply that carries it stays true.

Two times appear. `*_unix_ms` is wall time, kept for people. Everything that is compared lives in
`state.py` as monotonic milliseconds and is not durable: after a restart it starts anew.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from coordinator.core.demand_history import DemandLog
from coordinator.core.node_power import NodePower
from coordinator.core.numbering import Numbering
from coordinator.core.phases import AttemptPhase, GpuPhase, JobPhase, NodeIntent, NodePhase
from coordinator.core.scale_records import ScaleRecord
from coordinator.core.stretches import Stretch
from coordinator.core.telemetry import GpuReading as GpuReading  # a part of the nouns
from coordinator.core.telemetry import HostTelemetry as HostTelemetry

SHARED = "shared"  # stands for the shared directory wherever a replica's node is named


class JobClass(Enum):
    GUARANTEED = "guaranteed"
    STANDARD = "standard"
    SPARE = "spare"

    # Looked up for each waiting job in each round; that of `Enum` hashes the name, in Python.
    __hash__ = object.__hash__


CLASS_ORDER = (JobClass.GUARANTEED, JobClass.STANDARD, JobClass.SPARE)
CLASS_RANK = {job_class: rank for rank, job_class in enumerate(CLASS_ORDER)}


class Replication(Enum):
    AUTOMATIC = "automatic"
    REQUIRED = "required"
    NONE = "none"


class StopSignal(Enum):
    TERM = "TERM"
    USR1 = "USR1"
    USR2 = "USR2"


class JobIntent(Enum):
    """What the owner wants of the job; it decides what becomes of it when its attempt ends."""

    RUN = "run"
    HOLD = "hold"
    CANCEL = "cancel"


GRACE_MS_DEFAULT = 120_000
MAX_RESTARTS_DEFAULT = 3
KEEP_CHECKPOINTS_DEFAULT = 3  # the last, and two to fall back on when it does not verify
# 75 is EX_TEMPFAIL of sysexits.h; 85 is HTCondor's usual checkpoint exit code.
RUN_AGAIN_EXIT_CODES_DEFAULT = (75, 85)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a job asks for; `validate.py` says what is allowed. Exactly one of `command` and
    `trainer` is set. `gpus` and `memory_bytes` are each rank's. With `shared_gpu_memory_bytes` its
    GPU is shared, of which it takes so much at most (`shares.py`); if `share_automatic`, only where
    that pays (`company.py`). `flexible_ms`: `flexible.py`. By `deadline_unix_ms` it wants to have
    ended (`deadlines.py`); 0: whenever. `array`: `arrays.py`; empty: it is one job."""

    name: str = ""
    project: str = "default"
    job_class: JobClass = JobClass.STANDARD
    command: tuple[str, ...] = ()
    trainer: str = ""
    trainer_config_json: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    working_directory: str = ""
    gpus: int = 0
    gpu_types: tuple[str, ...] = ()
    gpu_memory_bytes_min: int = 0
    memory_bytes: int = 0
    grace_ms: int = GRACE_MS_DEFAULT
    stop_signal: StopSignal = StopSignal.TERM
    max_restarts: int = MAX_RESTARTS_DEFAULT
    run_again_exit_codes: tuple[int, ...] = RUN_AGAIN_EXIT_CODES_DEFAULT
    replication: Replication = Replication.AUTOMATIC
    slurm_environment: bool = False
    hold: bool = False
    keep_checkpoints: int = KEEP_CHECKPOINTS_DEFAULT
    ranks: int = 1
    shared_gpu_memory_bytes: int = 0
    flexible_ms: int = 0
    deadline_unix_ms: int = 0
    share_automatic: bool = False
    array: str = ""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Failures at `step` without progress beyond it (`poison.py`). `tried` are the checkpoints that
    the attempts were restored from, as digest and step, oldest first. `set_aside` is the digest of
    the one that nobody resumes from meanwhile. `quarantined`: it is held until its owner says
    `requeue`."""

    step: int
    tried: tuple[tuple[str, int], ...] = ()
    set_aside: str = ""
    quarantined: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """`epoch` is the highest given out; `head` the digest of the last committed checkpoint, empty
    before the first. `failures` counts failures in a row without a commit further on, `yields`
    likewise for "run me again". `event_count` is the sequence of the job's newest history line.
    `queued_unix_ms`: since when it waits for its next attempt; `None` before the first one. Of a
    trial `array_id` is the id of its array's first one; 0: it is none."""

    id: int
    spec: JobSpec
    phase: JobPhase
    submitted_unix_ms: int
    request_id: str = ""
    intent: JobIntent = JobIntent.RUN
    reason: str = ""
    epoch: int = 0
    head: str = ""
    head_step: int = 0
    failures: int = 0
    yields: int = 0
    ended_unix_ms: int | None = None
    event_count: int = 0
    trouble: Trouble | None = None
    queued_unix_ms: int | None = None
    array_id: int = 0
    array_index: int = 0


@dataclass(frozen=True, slots=True)
class TrainerTime:
    """How a trainer's process has spent its time so far: finite seconds, none counted twice."""

    step_s: float = 0.0
    evaluate_s: float = 0.0
    input_wait_s: float = 0.0
    capture_s: float = 0.0
    restore_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    total_steps: int = 0
    metrics: tuple[tuple[str, float], ...] = ()
    time: TrainerTime | None = None


@dataclass(frozen=True, slots=True)
class AttemptTimes:
    """What accounting needs beside the attempt's own times; `None` is not known.

    `queued_unix_ms`: since when its job waited for it. `silent_unix_ms`: the last sign of life,
    `over_unix_ms`: when its silence was noticed; both before it is lost, if it ever is.
    `restore_ms` and `start_ms` are the agent's; `ready_ms` is from the program's start until it
    trains. `speaks`: it has told milestones or progress, or the attempt before it had.
    `reached_step` is how far the attempts before it came, `step`, `total_steps` (0: unsaid) and
    `trainer` what it last said itself.
    """

    queued_unix_ms: int | None = None
    silent_unix_ms: int | None = None
    over_unix_ms: int | None = None
    restore_ms: int | None = None
    start_ms: int | None = None
    ready_ms: int | None = None
    speaks: bool = False
    reached_step: int = 0
    step: int | None = None
    trainer: TrainerTime | None = None
    total_steps: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution of a job, or of one of its `ranks`. `stop_reason` is empty until it is told to
    stop, `ended_by_itself`: it ended before its node had heard of that; `precopy_ms` is how long it
    may save before. `replica_node` is its standby: the node that gets its checkpoints and would
    take it next. `permanent`: any node would refuse it. Of what it was restored from, `held_ranks`
    are those whose parts were verified on its node; empty: all. `quota_parts` is what its GPUs
    count for quotas, in thousandths (`ledger.py`); `None`: an older coordinator has not said.
    """

    job_id: int
    epoch: int
    node: str
    gpu_uuids: tuple[str, ...]
    phase: AttemptPhase
    assigned_unix_ms: int
    started_unix_ms: int | None = None
    ended_unix_ms: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    stop_reason: str = ""
    ended_by_itself: bool = False
    restored_digest: str = ""
    restored_step: int = 0
    held_ranks: tuple[int, ...] = ()
    commits: int = 0
    replica_node: str = ""
    precopy_ms: int | None = None
    times: AttemptTimes = AttemptTimes()
    rank: int = 0
    ranks: int = 1
    permanent: bool = False
    stretches: tuple[Stretch, ...] = ()
    quota_parts: int | None = None

    @property
    def id(self) -> str:
        return attempt_id(self.job_id, self.epoch, self.rank, self.ranks)


def attempt_id(job_id: int, epoch: int, rank: int, ranks: int) -> str:
    """What an attempt is called; a rank is named only where there are several."""
    return f"{job_id}.{epoch}.{rank}" if ranks > 1 else f"{job_id}.{epoch}"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank wrote of a checkpoint, and the nodes that hold all of it, the writer first."""

    digest: str
    size_bytes: int
    replicas: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint. `replicas` are the nodes that hold all of it, the writer first. `bad`
    says why it is no longer used; empty while it is good. `pinned`: kept until its user says
    otherwise.

    Of a gang's, `digest` and `replicas` are rank 0's part's, `parts` are those of ranks 1, 2, ...,
    and `size_bytes` counts all of them.
    """

    job_id: int
    digest: str
    parent: str
    epoch: int
    step: int
    size_bytes: int
    replicas: tuple[str, ...]
    committed_unix_ms: int
    bad: str = ""
    pinned: bool = False
    parts: tuple[Part, ...] = ()

    @property
    def pieces(self) -> tuple[Part, ...]:
        """What there is to hold and to fetch: the part of every rank, or the whole as one."""
        own_bytes = self.size_bytes - sum(part.size_bytes for part in self.parts)
        return (Part(self.digest, own_bytes, self.replicas), *self.parts)


@dataclass(frozen=True, slots=True)
class WaitingPart:
    """What a rank has handed over of a step that others have not handed over yet (`parts.py`).
    `sequence` is the order of arrival within the job; `parent` counts for rank 0 alone."""

    job_id: int
    epoch: int
    rank: int
    step: int
    digest: str
    parent: str
    size_bytes: int
    replicas: tuple[str, ...]
    sequence: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    hostname: str = ""
    boot_id: str = ""
    cpu_count: int = 0
    memory_bytes: int = 0
    driver_version: str = ""
    agent_version: str = ""
    gpu_absence: str = ""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    uuid: str
    name: str
    memory_bytes: int


class GpuVerdict(Enum):
    """What an agent makes of a GPU."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    NEEDS_RESET = "needs_reset"
    NEEDS_REBOOT = "needs_reboot"
    LOST = "lost"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class XidRecord:
    """All errors of one code on one GPU that belong together."""

    code: int
    count: int
    first_unix_ms: int
    last_unix_ms: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """`reason` is a sentence without its subject, `action` what a person should do."""

    uuid: str
    verdict: GpuVerdict
    reason: str = ""
    action: str = ""
    xids: tuple[XidRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuCordon:
    """A GPU that gets no work for its health."""

    uuid: str
    reason: str
    unix_ms: int


class TelemetryRate(Enum):
    """How often GPUs are read; `OWN`: as the agent's configuration says."""

    OWN = "own"
    OFF = "off"
    SLOW = "slow"
    NORMAL = "normal"
    WATCH = "watch"


@dataclass(frozen=True, slots=True)
class Node:
    """What is durable of a node. `acknowledged` is the sequence of its last event whose effects are
    durable. `health` is what its agent said last; `closed_for` why we have drained it, empty where
    a person did or nobody; `waived` are GPUs that a person has opened as they are. `forgotten`: it
    is of no fleet any more, and kept for what ran on it (`forgetting.py`)."""

    id: str
    journal_id: str
    peer_address: str
    host: HostFacts
    gpus: tuple[GpuFacts, ...]
    intent: NodeIntent = NodeIntent.OPEN
    acknowledged: int = 0
    health: tuple[GpuHealth, ...] = ()
    gpu_cordons: tuple[GpuCordon, ...] = ()
    closed_for: str = ""
    waived: tuple[str, ...] = ()
    telemetry_rate: TelemetryRate = TelemetryRate.OWN
    power: NodePower = field(default_factory=NodePower)
    forgotten: bool = False


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's history; `name` is stable, `message` one sentence."""

    job_id: int
    sequence: int
    unix_ms: int
    name: str
    attempt: str = ""
    node: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Accounting:
    """Where wall time went, in seconds. The parts (`PARTS` of `accounting.py`) add up to `wall_s`,
    and none is negative.

    `overstated_ratio` is by how much the trainer's own times exceeded the time that there was (1:
    not at all). `measured` is false where a trainer does not say its times.
    """

    wall_s: float = 0.0
    productive_s: float = 0.0
    input_wait_s: float = 0.0
    capture_s: float = 0.0
    recompute_s: float = 0.0
    detect_s: float = 0.0
    schedule_s: float = 0.0
    start_s: float = 0.0
    restore_s: float = 0.0
    idle_s: float = 0.0
    overstated_ratio: float = 1.0
    measured: bool = True


@dataclass(frozen=True, slots=True)
class GpuView:
    """A GPU as a reply shows it. `cordon`: why it gets no work; `held_back`: why it still does.
    `shares`: the attempts that it is shared by, with the most that each may take; then `attempt` is
    empty. `figures` are as old as `age_ms` by now."""

    facts: GpuFacts
    phase: GpuPhase
    attempt: str = ""
    figures: bytes = b""
    age_ms: int = 0
    health: GpuHealth | None = None
    cordon: str = ""
    held_back: str = ""
    shares: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as a reply shows it."""

    node: Node
    phase: NodePhase
    gpus: tuple[GpuView, ...]
    attempts: tuple[str, ...]
    reason: str
    telemetry: HostTelemetry | None = None


class Tally(NamedTuple):
    """How many trials an array has, and how many of them run, wait, are held and are over."""

    trials: int
    running: int
    waiting: int
    held: int
    over: int


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as a reply shows it. `accounts` are its attempts' and `accounting` is their sum; a list
    of jobs is shown without either. `trials`: of a trial's array; `changed`: how many
    jobs of it a verb was carried out for, `left` how many it leaves alone that run, and that have
    succeeded."""

    job: Job
    attempts: tuple[Attempt, ...] = ()
    checkpoint: Checkpoint | None = None
    progress: Progress | None = None
    accounts: tuple[Accounting, ...] = ()
    accounting: Accounting | None = None
    trials: Tally | None = None
    changed: int = 1
    left: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """A checkpoint as a reply shows it. `used_by`: "head", and the attempts that run from it."""

    checkpoint: Checkpoint
    used_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is durable, as the store has it; `leader_epoch` is ours. `copied_unix_ms`: when the
    copy was made that the store was put back from; 0 but at the first start after that."""

    leader_epoch: int = 0
    last_job_id: int = 0
    jobs: tuple[Job, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    nodes: tuple[Node, ...] = field(default=())
    parts: tuple[WaitingPart, ...] = ()
    demand: DemandLog = field(default_factory=DemandLog)
    scale_records: tuple[ScaleRecord, ...] = ()
    lease_days: tuple[int, ...] = ()
    numbering: Numbering = field(default_factory=Numbering)
    copied_unix_ms: int = 0
