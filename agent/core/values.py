"""The plain values that the agent's core and its adapters exchange.

Problem: an adapter that hands library objects inward (an NVML struct, a protobuf message) ties
every decision to that library. So everything that crosses a port is one of these frozen
dataclasses, with the unit in the field's name. Absent is `None`, never zero: "the driver does not
say" and "zero watts" are different facts.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What does not change while the driver is loaded. `uuid` is NVML's, e.g. `GPU-6f1c...`; it is
    the only address used."""

    uuid: str
    name: str
    memory_bytes: int
    pci_bus_id: str = ""
    """As the kernel's log has it, `0000:3b:00`; empty where the driver does not say."""
    place: str = ""
    """Of a MIG instance: its GPU, and the numbers of its GPU instance and of its compute instance,
    `GPU-6f1c.../1/0`; empty where the driver does not say."""


@dataclass(frozen=True, slots=True)
class GpuCondition:
    """How the driver says that a GPU is. `state` is empty, `lost` or `reset_required`;
    `recovery_action` is NVML's field 230. `None`: it does not say. `unread` is what no job can do
    without and a call for which has failed, as a sentence."""

    state: str = ""
    recovery_action: int | None = None
    rows_failed: bool | None = None
    rows_pending: bool | None = None
    unread: str = ""


@dataclass(frozen=True, slots=True)
class XidSeen:
    """An error that the driver has reported to `source`, "nvml" or "kernel", which knows its GPU by
    `uuid` or by `pci_bus_id`. `history`: it was there before the agent. `age_ms` is by the kernel's
    own clock, `sequence` its place in the kernel's log of this boot; `unix_ms` is for people."""

    code: int
    source: str
    unix_ms: int
    uuid: str = ""
    pci_bus_id: str = ""
    text: str = ""
    history: bool = False
    age_ms: int = 0
    sequence: int | None = None
    count: int = 1
    first_unix_ms: int | None = None

    @property
    def since_unix_ms(self) -> int:
        """Of the first of `count`; `unix_ms` is of the last."""
        return self.unix_ms if self.first_unix_ms is None else self.first_unix_ms


@dataclass(frozen=True, slots=True)
class DriverLoaded:
    """The kernel's log says that the driver was loaded; what it said of GPUs before is over."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU. `memory_bytes` is `None` where the driver does not say."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """What is read of a GPU every ten seconds; `None` as in `GpuSample`. `min`, `max` and `p95` are
    over the driver's own samples since the last reading. Of ECC errors, *volatile* ones count since
    the driver was loaded, *aggregate* ones since the board was made."""

    uuid: str
    processes: tuple[GpuProcess, ...] | None = None
    utilization_ratio_min: float | None = None
    utilization_ratio_max: float | None = None
    utilization_ratio_p95: float | None = None
    memory_utilization_ratio_min: float | None = None
    memory_utilization_ratio_max: float | None = None
    memory_utilization_ratio_p95: float | None = None
    power_mw_min: int | None = None
    power_mw_max: int | None = None
    power_mw_p95: int | None = None
    ecc_volatile_corrected: int | None = None
    ecc_volatile_uncorrected: int | None = None
    ecc_aggregate_corrected: int | None = None
    ecc_aggregate_uncorrected: int | None = None
    memory_temperature_celsius: int | None = None
    pcie_replays: int | None = None


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """What is read of a GPU once a minute; `None` as in `GpuSample`. The activities are shares, 0
    to 1, of the time since the last reading. `fabric_state` is not_started, in_progress or
    completed; `None`: there is no fabric. PCIe's throughput is that of 20 ms, as the GPU sees it,
    and read only where the operator wants it."""

    uuid: str
    remapped_rows_corrected: int | None = None
    remapped_rows_uncorrected: int | None = None
    remapped_rows_pending: bool | None = None
    remapped_rows_failed: bool | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    nvlinks_up: int | None = None
    nvlinks_down: int | None = None
    fabric_state: str | None = None
    vbios_version: str | None = None
    serial: str | None = None
    sm_activity_ratio: float | None = None
    tensor_activity_ratio: float | None = None
    pcie_sent_bytes_per_second: int | None = None
    pcie_received_bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    min: float
    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class GpuWindow:
    """What `readings` of a GPU had in common; `None` as in `GpuSample`."""

    readings: int
    utilization_ratio: Spread | None = None
    memory_used_bytes: Spread | None = None
    temperature_celsius: Spread | None = None
    power_mw: Spread | None = None


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one GPU. Ratios are 0 to 1. `None` means not supported or not answered, never
    zero. `clock_event_reasons` is NVML's bit mask of what keeps the clocks down. `age_ms`: it was
    read so long before the sample was made; more than 0 only where readings are slowed down by
    order. `usage` and `inventory` are read less often, and are the last ones that were. `window`
    is of a report: all readings since the one before."""

    uuid: str
    utilization_ratio: float | None = None
    memory_used_bytes: int | None = None
    temperature_celsius: int | None = None
    power_mw: int | None = None
    energy_mj: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    error: str = ""
    condition: GpuCondition | None = None
    clock_event_reasons: int | None = None
    age_ms: int = 0
    usage: GpuUsage | None = None
    inventory: GpuInventory | None = None
    window: GpuWindow | None = None

    @property
    def unread(self) -> str:
        """Why nobody can count on it, though figures may be there; empty: one can."""
        return self.error or ("" if self.condition is None else self.condition.unread)


@dataclass(frozen=True, slots=True)
class GpuOccupancy:
    """Who uses a GPU, by the driver's list of processes, but for those of other services, whose
    memory is not counted either. `None`: the driver does not say."""

    uuid: str
    memory_used_bytes: int | None = None
    pids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the agent says of its box in its hello. `boot_id` is the kernel's. `gpu_absence`: why it
    has no GPU, or one less than its driver counts; else empty."""

    hostname: str
    boot_id: str
    cpu_count: int
    memory_bytes: int
    driver_version: str
    agent_version: str
    gpu_absence: str = ""


@dataclass(frozen=True, slots=True)
class HostSample:
    """One reading of the host. Ratios are 0 to 1."""

    cpu_utilization_ratio: float
    memory_used_bytes: int
    disk_free_bytes: int
    load_1min: float


@dataclass(frozen=True, slots=True)
class Reading:
    """How the reading of GPUs has gone since the agent started. `nvml_errors` are call, code and
    how often; `misses` are, by class of readings, those that did not answer within their deadline,
    `durations_ms` how long the last one took."""

    rate: str = "normal"
    nvml_errors: tuple[tuple[str, str, int], ...] = ()
    misses: tuple[tuple[str, int], ...] = ()
    durations_ms: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """Host and GPUs, read together. `reading` is how that went. `facts` are of every GPU that the
    driver has named by now (`None`: it was not asked), `driver_version` is empty where it has not
    said that, `gpu_absence` as in `HostFacts`."""

    host: HostSample
    gpus: tuple[GpuSample, ...]
    reading: Reading = Reading()
    facts: tuple[GpuFacts, ...] | None = None
    driver_version: str = ""
    gpu_absence: str = ""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """The part of a job's request that a node needs. `stop_signal` is TERM, USR1 or USR2;
    `replication` is automatic, required or none. With `shared_gpu_memory_bytes` it has its GPU
    together with others, and takes at most that much of its memory. `whole` is all of the request,
    as its coordinator had written it, for one that has forgotten it; empty: an older agent's."""

    name: str = ""
    command: tuple[str, ...] = ()
    trainer: str = ""
    trainer_config_json: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    working_directory: str = ""
    grace_ms: int = 120_000
    stop_signal: str = "TERM"
    replication: str = "automatic"
    slurm_environment: bool = False
    memory_bytes: int = 0
    shared_gpu_memory_bytes: int = 0
    whole: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything needed to start a trainer, decided before anything is touched.

    `environment` is complete: the process inherits nothing. `memory_bytes` is the limit that it is
    held to where it can be; 0: none. `shared_gpu_memory_bytes` is the most that it may take of its
    GPU, which others use, too; 0: it has its GPUs alone. `places` are of those of its GPUs that are
    MIG instances, by UUID (`GpuFacts.place`).
    """

    attempt_id: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    working_directory: str
    memory_bytes: int = 0
    shared_gpu_memory_bytes: int = 0
    places: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """What hello and heartbeat list. `stuck` are its processes that a kill did not end; `None`:
    nobody has looked yet. `precopy_gain_ms` is of a rank of several (`precopy.py`).
    `copies_failed` are the tries in a row in which nothing arrived at its standby. `request` is
    `JobSpec.whole`, and `checkpoint` what it continues, where the coordinator asks for that."""

    attempt: str
    gpu_uuids: tuple[str, ...]
    live: bool
    stuck: tuple[int, ...] | None = None
    precopy_gain_ms: int | None = None
    copies_failed: int = 0
    request: bytes | None = None
    checkpoint: str = ""


@dataclass(frozen=True, slots=True)
class ProcessesStuck:
    """Processes of an attempt that were killed and wait in the kernel, where no signal reaches
    them; without `pids` there are none any more."""

    attempt_id: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a trainer ended: an exit code, or the signal that ended it, or neither when nobody saw it
    end.

    `reason` is a sentence for the last case and for failures to start ("no such file: train.py").
    """

    attempt_id: str
    exit_code: int | None
    signal: int | None
    reason: str = ""


class Origin(NamedTuple):
    """Of a checkpoint: the job that saved it, under `epoch` at `step`, after the one with the
    digest `parent` (empty: after none). `rank`: whose part of a gang's it is; `None`: it is whole.
    """

    job_id: int
    epoch: int
    step: int
    parent: str
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint that is hashed and durable in the local chunk store.

    `digest` is the BLAKE3 of the manifest's canonical bytes; `new_bytes` is what the store did not
    have before.
    """

    digest: str
    step: int
    size_bytes: int
    new_bytes: int


@dataclass(frozen=True, slots=True)
class ReplicaSource:
    """Where a checkpoint may be had: a node and its peer address (`host:port`), or the shared
    directory (node `shared`)."""

    node: str
    address: str


@dataclass(frozen=True, slots=True)
class LoneCheckpoint:
    """A committed checkpoint, or a rank's part of one, of which no other node within reach has a
    copy. `parts`: of how many the checkpoint is."""

    digest: str
    step: int
    parts: int


@dataclass(frozen=True, slots=True)
class RestorePart:
    """What a rank other than 0 wrote of a checkpoint, and where it may be had, best first."""

    digest: str
    sources: tuple[ReplicaSource, ...]


@dataclass(frozen=True, slots=True)
class RestoreCandidate:
    """A committed checkpoint that an attempt may resume from, newest first in a start order.
    `parts` are those of ranks 1, 2, ...; then `digest` and `sources` are of rank 0's. Without parts
    it is whole."""

    digest: str
    step: int
    sources: tuple[ReplicaSource, ...]
    parts: tuple[RestorePart, ...] = ()


@dataclass(frozen=True, slots=True)
class Gang:
    """One rank's place among those that start together. Ranks count through `nodes`, so those of
    one node follow one another; `local_rank` counts those on this node, and `node_gpu_uuids` are
    the GPUs of all of them, in that order. Rank 0 listens at `master_host` and `master_port`.
    `own_parts`: the coordinator knows that a node may hold some parts of a checkpoint only."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: tuple[str, ...]
    master_host: str
    master_port: int
    node_gpu_uuids: tuple[str, ...] = ()
    own_parts: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    """The outcome of a restore: the first candidate that verified, and why each one before it did
    not.

    `digest` is empty when the job starts from nothing. `skipped` holds (digest, reason) pairs.
    `held_ranks` are those whose parts lie here whole and verified; empty: all there is.
    """

    digest: str
    step: int
    directory: str
    skipped: tuple[tuple[str, str], ...] = ()
    held_ranks: tuple[int, ...] = ()
