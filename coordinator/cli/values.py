"""What the commands show: plain values, and at the same time the shape of every `--json` document.

Problem: a script that reads `--json` depends on every key. Protobuf's own JSON form would make keys
camelCase, 64-bit numbers strings, and enums `JOB_PHASE_QUEUED`, and would leave out a value that
happens to be its default. So the documents are these structs: snake_case keys that end in their
unit, ids as numbers, enums as lowercase words without a prefix, times as RFC 3339 in UTC, and
`null` for what is not known, never 0.

Adding a field is compatible. Renaming or removing one breaks scripts, and so does changing its
unit.
"""

from datetime import datetime

import msgspec


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a job asks for. `None` leaves the choice to the coordinator, whose defaults the contract
    states."""

    name: str = ""
    project: str = ""
    job_class: str | None = None
    command: list[str] = []
    trainer: str = ""
    trainer_config_json: str = ""
    environment: dict[str, str] = {}
    working_directory: str = ""
    gpus: int = 0
    gpu_types: list[str] = []
    gpu_memory_bytes_min: int = 0
    memory_bytes: int = 0
    grace_ms: int | None = None
    stop_signal: str | None = None
    max_restarts: int | None = None
    run_again_exit_codes: list[int] = []
    replication: str | None = None
    slurm_environment: bool = False
    hold: bool = False
    keep_checkpoints: int | None = None
    ranks: int = 1
    shared_gpu_memory_bytes: int = 0
    flexible_ms: int = 0
    deadline: datetime | None = None
    share_automatic: bool = False
    array: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainer last said. `total_steps` is `None` when it did not say how many there
    are."""

    step: int
    total_steps: int | None
    metrics: dict[str, float]


class CheckpointPart(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank of a gang wrote, and the nodes that hold all of it."""

    digest: str
    size_bytes: int
    replicas: list[str]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A committed checkpoint and the nodes that hold all of it, the writer first. Of a gang's,
    `digest` and `replicas` are rank 0's part's, and `parts` those of ranks 1, 2, ..."""

    digest: str
    parent: str
    epoch: int
    step: int
    size_bytes: int
    replicas: list[str]
    commit_time: datetime | None
    parts: list[CheckpointPart] = []


class Accounting(msgspec.Struct, frozen=True, kw_only=True):
    """Where wall time went. The parts add up to `wall_seconds`; the contract says what each is.

    `overstated_ratio` is 1, or by how much the trainer's own times were too long; `measured` is
    false where the trainer does not say its times.
    """

    wall_seconds: float
    productive_seconds: float
    input_wait_seconds: float
    capture_seconds: float
    recompute_seconds: float
    detect_seconds: float
    schedule_seconds: float
    start_seconds: float
    restore_seconds: float
    idle_seconds: float
    overstated_ratio: float
    measured: bool

    @property
    def goodput_ratio(self) -> float | None:
        """Productive time of wall time; `None` before any has passed."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else None


class KeptCheckpoint(Checkpoint, frozen=True, kw_only=True):
    """A checkpoint as `baton checkpoint list` shows it. `bad` says why nobody resumes from it any
    more; `used_by` is "head" and the attempts that run from it."""

    pinned: bool
    bad: str
    used_by: list[str]


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint whose files were fetched, verified and written in a format."""

    job_id: int
    digest: str
    step: int
    format: str
    directory: str


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of other origin, as a checkpoint directory to start from."""

    format: str
    directory: str


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One execution of a job."""

    id: str
    epoch: int
    node: str
    gpu_uuids: list[str]
    phase: str | None
    assign_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    exit_code: int | None
    signal: int | None
    reason: str
    restored_step: int | None
    replica_node: str
    accounting: Accounting | None
    rank: int = 0
    trace_id: str = ""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A job's place in an array, whose first trial is job `array_job_id`; and how many trials it
    has, and how many of them run, wait, are held and are over."""

    array_job_id: int
    index: int
    trials: int
    running: int
    waiting: int
    held: int
    over: int


class ArrayChange(msgspec.Struct, frozen=True, kw_only=True):
    """For how many of the trials of an array a verb was carried out."""

    array_job_id: int
    trials: int
    jobs: int


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """Of those that were held since the database was put back, how many go on."""

    jobs: int


class ArrayRequeue(ArrayChange, frozen=True, kw_only=True):
    """And how many were left alone since they run, and since they have succeeded."""

    left_running: int
    left_succeeded: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job; in lists with its newest attempt only (of a gang all ranks of it), and without
    accounts."""

    id: int
    spec: JobSpec
    phase: str | None
    reason: str
    epoch: int
    attempts: list[Attempt]
    checkpoint: Checkpoint | None
    failures: int
    submit_time: datetime | None
    end_time: datetime | None
    progress: Progress | None
    accounting: Accounting | None
    trial: Trial | None = None


class GpuDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a GPU less often; `None` where the driver does not say."""

    processes: int | None
    ecc_volatile_corrected: int | None
    ecc_volatile_uncorrected: int | None
    ecc_aggregate_corrected: int | None
    ecc_aggregate_uncorrected: int | None
    remapped_rows_corrected: int | None
    remapped_rows_uncorrected: int | None
    remapped_rows_pending: bool | None
    remapped_rows_failed: bool | None
    pcie_width: int | None
    pcie_width_max: int | None
    nvlinks_up: int | None
    nvlinks_down: int | None
    sm_activity_ratio: float | None
    tensor_activity_ratio: float | None


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    min: float
    mean: float
    max: float


class GpuWindow(msgspec.Struct, frozen=True, kw_only=True):
    """All readings of a GPU between two reports."""

    readings: int
    utilization_ratio: Spread | None
    memory_used_bytes: Spread | None
    temperature_celsius: Spread | None
    power_mw: Spread | None


class GpuTelemetry(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver says of a GPU; `None` where it does not say. `age_s` is for how long it has
    been known; `None`: nobody can tell."""

    utilization_ratio: float | None
    memory_used_bytes: int | None
    temperature_celsius: int | None
    power_mw: int | None
    energy_mj: int | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    error: str
    details: GpuDetails | None
    age_s: float | None
    window: GpuWindow | None


class XidRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of one code that belong together."""

    code: int
    count: int
    first_time: datetime | None
    last_time: datetime | None
    text: str


class GpuHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What its agent makes of a GPU, and what a person should do."""

    verdict: str | None
    reason: str
    action: str
    xids: list[XidRecord]


class GpuShare(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt may take at most of a GPU that is shared."""

    attempt: str
    memory_bytes: int


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a node. `attempt` is empty when none holds it, or when it is shared: then
    `shares` says by whom. `cordon` says why it gets no work for its health, `held_back` why it
    still does."""

    uuid: str
    name: str
    memory_bytes: int
    phase: str | None
    attempt: str
    telemetry: GpuTelemetry | None
    health: GpuHealth | None
    cordon: str
    held_back: str
    shares: list[GpuShare]


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What a node said of itself when it joined. `driver_version` is empty where there is no
    driver; `gpu_absence` says why it has no GPU, or one less than its driver counts."""

    hostname: str
    boot_id: str
    cpu_count: int
    memory_bytes: int
    driver_version: str
    agent_version: str
    gpu_absence: str


class HostTelemetry(msgspec.Struct, frozen=True, kw_only=True):
    """What a node's host last said."""

    cpu_utilization_ratio: float
    memory_used_bytes: int
    disk_free_bytes: int
    load_1min: float


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A box with an agent. `telemetry_rate` is what was ordered; `own`: nothing. `power`: "on", or
    where it is on its way off or on, since `power_since`."""

    id: str
    phase: str | None
    intent: str | None
    peer_address: str
    host: Host | None
    gpus: list[Gpu]
    telemetry: HostTelemetry | None
    attempts: list[str]
    reason: str
    telemetry_rate: str
    power: str | None = None
    power_since: datetime | None = None


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's history."""

    job_id: int
    sequence: int
    time: datetime | None
    name: str
    attempt: str
    node: str
    message: str


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A job that is durable, or `jobs` trials of an array, the first of which is `job_id`; the
    others' ids follow it. `reason` says why it does not start at once; empty when nothing is known
    against it."""

    job_id: int
    request_id: str
    reason: str
    jobs: int = 1


class ExpectedStart(msgspec.Struct, frozen=True, kw_only=True):
    """When and where a waiting job is expected to fit: when job `after_job_id` leaves."""

    time: datetime | None
    nodes: list[str]
    where: str
    after_job_id: int


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """What would let a waiting job start: options of `baton submit`, or a command."""

    change: str
    outcome: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job waits, or why it runs where it runs, and what would change that."""

    job_id: int
    sentence: str
    expected_start: ExpectedStart | None = None
    expected_end_time: datetime | None = None
    suggestions: list[Suggestion] = []


class LogPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a job's log: bytes that an attempt wrote, or a sentence of Baton's own."""

    attempt: str
    node: str
    data: bytes
    notice: str


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One JSON line of `logs --json`: a `LogPart` whose bytes are text, undecodable ones replaced
    by U+FFFD."""

    attempt: str
    node: str
    text: str
    notice: str


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of a language model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    gated: bool
    tied: bool


class FitSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """The median, and within what it lies eight times of ten."""

    steps_per_second: float
    steps_per_second_low: float
    steps_per_second_high: float


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A job on one type of GPU; `None` is not known, and a sentence says why. `fitting` is fits,
    accumulates, does_not_fit, or `None`."""

    gpu_type: str
    memory_bytes: int
    gpus: int
    gpus_of_job: int
    speed: FitSpeed | None
    speed_why: str
    fitting: str | None
    memory_why: str
    memory_needed_bytes: int | None
    samples_at_once: int | None
    tokens_per_step: int | None
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    duration_seconds: float | None
    unsuited: str


class FitReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton fit` answers. `prices_source`: of prices that were not given."""

    fits: list[Fit]
    prices_source: str


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """All GPUs and GPU-hours are weighted by type, an H100 being 1. Without a quota
    `quota_gpu_hours_per_day` is `None`."""

    name: str
    quota_gpu_hours_per_day: float | None
    weight: float
    used_gpu_hours: float
    entitled_gpus: float
    running_gpus: float
    borrowed_gpus: float
    lent_gpus: float
    running_jobs: int
    waiting_jobs: int
    waiting_gpus: float


class ProjectReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton projects` answers. Half of what was used is forgotten after `half_life_hours`."""

    projects: list[Project]
    half_life_hours: float
