"""What a trainer is started with: its arguments and its whole environment.

Problem: a process that inherits its supervisor's environment works on the machine where it was
tried and fails on the next. So nothing is inherited: the environment is composed here, from the
agent's configured base, the job's own variables, and what Baton and the launchers that people come
from promise (torchrun's rendezvous variables, an opt-in SLURM_* set).

A job of one process runs as if started by hand. Who finds RANK or LOCAL_RANK takes itself for one
of several: accelerate, and so `Trainer`, makes a process group and wraps the model in DDP for
LOCAL_RANK=0 of one, many a script does so for RANK, and Lightning starts no processes of its own.

A rank of a gang finds what torchrun would have told it. Where it is alone on its node, or has
several GPUs, it may be a launcher itself: `torchrun script.py` takes its options from PET_*, and
counts each rank for a node.

Sources: torchrun's documentation for RANK, WORLD_SIZE, MASTER_ADDR and their kin, and for options
from PET_*; Slurm's sbatch manual page, "OUTPUT ENVIRONMENT VARIABLES".
"""

from dataclasses import dataclass
from zlib import crc32

from agent.core import shares
from agent.core.attempt import AttemptRecord
from agent.core.values import Gang, Launch

# torch makes `<this><rank>.pipe`, and dumps when something is written into it (ProcessGroupNCCL).
NCCL_PIPES = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """Where things are on this node. `base_environment` is what every trainer gets first."""

    node: str
    socket_path: str
    attempts_directory: str
    trainer_python: str
    base_environment: tuple[tuple[str, str], ...]
    hook_directory: str = ""
    """What unmodified scripts get in front of PYTHONPATH; empty for nothing."""


def attempt_directory(options: LaunchOptions, attempt_id: str) -> str:
    return f"{options.attempts_directory}/{attempt_id}"


def nccl_pipes(record: AttemptRecord, options: LaunchOptions) -> str:
    """How the names of the pipes begin on which torch's flight recorder listens: as the job's or
    the node's owner says, or where its trainer may write in any case, as torch gives up where it
    cannot make them. Empty: nothing speaks over NCCL, or the owner wants none."""
    said = dict((*options.base_environment, *record.spec.environment)).get(NCCL_PIPES)
    if said is not None:
        return said
    several = record.gang is not None or len(record.gpu_uuids) > 1
    staging = f"{attempt_directory(options, record.id)}/staging"
    return f"{staging}/nccl-" if several and record.gpu_uuids else ""


def compose(record: AttemptRecord, options: LaunchOptions) -> Launch:
    """The launch of an attempt whose checkpoint, if any, has been laid out."""
    directory = attempt_directory(options, record.id)
    environment = dict(options.base_environment)
    environment.update(record.spec.environment)
    if pipes := nccl_pipes(record, options):
        environment[NCCL_PIPES] = pipes
    environment.update(_rendezvous(record))
    environment.update(_baton(record, options, directory))
    environment.update(shares.environment(record))
    if options.hook_directory and record.spec.command:
        # Built-in trainers have the SDK in their own environment, and talk to us themselves.
        paths = (options.hook_directory, environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = ":".join(path for path in paths if path)
    if record.spec.slurm_environment:
        environment.update(_slurm(record, options, directory))
    # GPU UUIDs, not indices: an index names another card after a reboot or inside a container.
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible_gpus(record))
    return Launch(
        record.id,
        _arguments(record, options, directory),
        tuple(sorted(environment.items())),
        record.spec.working_directory or f"{directory}/work",
        record.spec.memory_bytes,
        record.spec.shared_gpu_memory_bytes,
    )


def _visible_gpus(record: AttemptRecord) -> tuple[str, ...]:
    """With one GPU a rank, those of all ranks here: LOCAL_RANK is the index, as under torchrun."""
    gang = record.gang
    return record.gpu_uuids if gang is None or len(record.gpu_uuids) > 1 else gang.node_gpu_uuids


def _arguments(record: AttemptRecord, options: LaunchOptions, directory: str) -> tuple[str, ...]:
    if record.spec.command:
        return record.spec.command
    module = f"trainers.{record.spec.trainer}"
    # -P: a file called torch.py in the user's directory must not shadow the real one.
    program = (options.trainer_python, "-P", "-m", module)
    # The configuration lies with the attempt; the paths in it are meant from where the job runs.
    return (*program, "--config", config_path(directory), "--relative-to", ".")


def config_path(directory: str) -> str:
    return f"{directory}/trainer.json"


def _baton(record: AttemptRecord, options: LaunchOptions, directory: str) -> dict[str, str]:
    variables = {
        "BATON_SOCKET": options.socket_path,
        "BATON_TOKEN": record.token,
        "BATON_JOB_ID": str(record.job_id),
        "BATON_ATTEMPT_ID": record.id,
        "BATON_EPOCH": str(record.epoch),
        "BATON_NODE": options.node,
        "BATON_STAGING_DIR": f"{directory}/staging",
        "BATON_GRACE_MS": str(record.spec.grace_ms),
    }
    if record.gang is not None:
        # Its own: RANK means another one below a launcher that the rank has started.
        variables["BATON_RANK"] = str(record.gang.rank)
        variables["BATON_WORLD_SIZE"] = str(record.gang.world_size)
    if record.traceparent:
        # The span of this attempt: what the job was submitted with names the one above.
        variables["TRACEPARENT"] = record.traceparent
    if record.restored_digest:
        variables["BATON_RESTORE_DIR"] = record.restored_directory
        variables["BATON_RESTORE_STEP"] = str(record.restored_step)
    return variables


def _rendezvous(record: AttemptRecord) -> dict[str, str]:
    if record.gang is not None:
        return _gang_rendezvous(record, record.gang)
    # For jobs that start ranks of their own, and would all bind the same port. Drawn from the
    # attempt's own chance: several agents, even of several fleets, may be on one host.
    port = 20_000 + crc32(record.token.encode()) % 10_000
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(record.restart_count),
    }


def _gang_rendezvous(record: AttemptRecord, gang: Gang) -> dict[str, str]:
    address, port = gang.master_host, str(gang.master_port)
    variables = {
        "RANK": str(gang.rank),
        "LOCAL_RANK": str(gang.local_rank),
        "GROUP_RANK": str(gang.node_rank),
        "WORLD_SIZE": str(gang.world_size),
        "LOCAL_WORLD_SIZE": str(gang.local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(record.restart_count),
    }
    if len(record.gpu_uuids) > 1 or gang.local_world_size == 1:
        variables["PET_NNODES"] = str(gang.world_size)
        variables["PET_NODE_RANK"] = str(gang.rank)
        variables["PET_MASTER_ADDR"] = address
        variables["PET_MASTER_PORT"] = port
    if len(record.gpu_uuids) > 1:
        variables["PET_NPROC_PER_NODE"] = str(len(record.gpu_uuids))
    return variables


def _slurm(record: AttemptRecord, options: LaunchOptions, directory: str) -> dict[str, str]:
    variables = {
        "SLURM_JOB_ID": str(record.job_id),
        "SLURM_JOBID": str(record.job_id),
        "SLURM_JOB_NAME": record.spec.name,
        "SLURM_RESTART_COUNT": str(record.restart_count),
        "SLURM_JOB_NODELIST": options.node,
        "SLURM_NODELIST": options.node,
        "SLURMD_NODENAME": options.node,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_NPROCS": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_SUBMIT_DIR": record.spec.working_directory or f"{directory}/work",
    }
    gpu_uuids, gang = record.gpu_uuids, record.gang
    if gang is not None:
        gpu_uuids = gang.node_gpu_uuids
        variables |= _slurm_gang(gang)
    if gpu_uuids:
        variables["SLURM_GPUS_ON_NODE"] = str(len(gpu_uuids))
    return variables


def _slurm_gang(gang: Gang) -> dict[str, str]:
    nodes, nodes_count = ",".join(gang.nodes), str(len(gang.nodes))
    return {
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NODELIST": nodes,
        "SLURM_JOB_NUM_NODES": nodes_count,
        "SLURM_NNODES": nodes_count,
        "SLURM_NTASKS": str(gang.world_size),
        "SLURM_NPROCS": str(gang.world_size),
        "SLURM_NTASKS_PER_NODE": str(gang.local_world_size),
        "SLURM_NODEID": str(gang.node_rank),
        "SLURM_PROCID": str(gang.rank),
        "SLURM_LOCALID": str(gang.local_rank),
    }
