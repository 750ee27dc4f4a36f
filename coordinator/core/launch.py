"""What an attempt is started with beside its job: its place in a gang, what it may resume from.

Problem: ranks that are started one by one, each with its own idea of who the others are, never
meet. So the coordinator, which alone knows all of them, says to each where it stands and where rank
0 listens, in the very order that starts it.

Its owner may add to its environment, but what Baton says there counts. One who wants
`MASTER_PORT=29500` finds another in the log a day later, so that is refused: `own_variables` are
those that an agent sets in any case (`agent/core/launch.py`, `agent/processes/mps.py`; a test holds
both equal).
"""

from dataclasses import dataclass

from coordinator.core.model import JobSpec

_EVERYWHERE = (
    "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip
# PET_* where a rank is alone on its node, or has several GPUs: which of them is not known before.
_OF_GANGS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "PET_NNODES",
    "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT",
)  # fmt: skip
# Those of MPS where it runs.
_OF_SHARES = (
    "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
)  # fmt: skip
_OF_SLURM = (
    "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST",
    "SLURM_NODELIST", "SLURMD_NODENAME", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_NTASKS",
    "SLURM_NPROCS", "SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_SUBMIT_DIR",
)  # fmt: skip
_OF_SLURM_ARRAYS = (
    "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN",
    "SLURM_ARRAY_TASK_MAX",
)  # fmt: skip


def own_variables(spec: JobSpec) -> tuple[str, ...]:
    """What Baton sets for this job, whatever its owner says, beside `BATON_*`."""
    gang, slurm = spec.ranks > 1, spec.slurm_environment
    return (
        *_EVERYWHERE,
        *(_OF_GANGS if gang else ()),
        *(("PET_NPROC_PER_NODE",) if gang and spec.gpus > 1 else ()),
        *(_OF_SHARES if spec.shared_gpu_memory_bytes else ()),
        *(_OF_SLURM if slurm else ()),
        *(("SLURM_NTASKS_PER_NODE",) if slurm and gang else ()),
        *(("SLURM_GPUS_ON_NODE",) if slurm and spec.gpus else ()),
        *(_OF_SLURM_ARRAYS if slurm and spec.array else ()),
    )


@dataclass(frozen=True, slots=True)
class PeerAddress:
    node: str
    address: str


@dataclass(frozen=True, slots=True)
class RestorePart:
    """`sources` best first."""

    digest: str
    sources: tuple[PeerAddress, ...]


@dataclass(frozen=True, slots=True)
class RestoreCandidate:
    """`sources` best first; of a checkpoint in parts, rank 0's, and `parts` are the others'."""

    digest: str
    step: int
    sources: tuple[PeerAddress, ...]
    parts: tuple[RestorePart, ...] = ()


@dataclass(frozen=True, slots=True)
class Gang:
    """The place of one rank. `nodes` are by node rank; `node_gpu_uuids` are those of all ranks of
    this gang on this node, in order of local rank."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: tuple[str, ...]
    master_host: str
    master_port: int
    node_gpu_uuids: tuple[str, ...]
