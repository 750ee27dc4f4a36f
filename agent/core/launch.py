"""What a trainer is started with: its arguments and its whole environment.

Problem: a process that inherits its supervisor's environment works on the machine where it was
tried and fails on the next. So nothing is inherited: the environment is composed here, from the
agent's configured base, the job's own variables, and what Baton and the launchers that people come
from promise (torchrun's rendezvous variables, an opt-in SLURM_* set).

Sources: torchrun's documentation for RANK, WORLD_SIZE, MASTER_ADDR and their kin; Slurm's sbatch
manual page, "OUTPUT ENVIRONMENT VARIABLES".
"""

from dataclasses import dataclass

from agent.core.attempt import AttemptRecord
from agent.core.values import Launch


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


def compose(record: AttemptRecord, options: LaunchOptions) -> Launch:
    """The launch of an attempt whose checkpoint, if any, has been laid out."""
    directory = attempt_directory(options, record.id)
    environment = dict(options.base_environment)
    environment.update(record.spec.environment)
    environment.update(_rendezvous(record))
    environment.update(_baton(record, options, directory))
    if options.hook_directory and record.spec.command:
        # Built-in trainers have the SDK in their own environment, and talk to us themselves.
        paths = (options.hook_directory, environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = ":".join(path for path in paths if path)
    if record.spec.slurm_environment:
        environment.update(_slurm(record, options, directory))
    # GPU UUIDs, not indices: an index names another card after a reboot or inside a container.
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(record.gpu_uuids)
    return Launch(
        record.id,
        _arguments(record, options, directory),
        tuple(sorted(environment.items())),
        record.spec.working_directory or f"{directory}/work",
    )


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
    if record.restored_digest:
        variables["BATON_RESTORE_DIR"] = record.restored_directory
        variables["BATON_RESTORE_STEP"] = str(record.restored_step)
    return variables


def _rendezvous(record: AttemptRecord) -> dict[str, str]:
    # One rank a job for now; the port is only ever bound by jobs that start ranks of their own.
    port = 20_000 + (record.job_id * 31 + record.epoch) % 10_000
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(record.restart_count),
    }


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
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_SUBMIT_DIR": record.spec.working_directory or f"{directory}/work",
    }
    if record.gpu_uuids:
        variables["SLURM_GPUS_ON_NODE"] = str(len(record.gpu_uuids))
    return variables
