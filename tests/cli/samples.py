"""A small fleet with something of everything: what a healthy one shows, and what is absent, lost or
not known."""

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from protos.baton.v1 import types_pb2 as t

DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


NOW = datetime.now(UTC)  # the clock of the command stands still there while a test runs


def ago(seconds: float) -> Timestamp:
    """A wall time this long before now."""
    stamp = Timestamp()
    stamp.FromDatetime(NOW - timedelta(seconds=seconds))
    return stamp


def active_job() -> t.Job:
    """A job on its second node."""
    return t.Job(
        id=12,
        spec=t.JobSpec(
            name="finetune-7b",
            project="vision",
            job_class=t.JOB_CLASS_GUARANTEED,
            command=["python", "train.py", "--data", "my corpus"],
            environment={"WANDB_MODE": "offline"},
            working_directory="/home/ada",
            gpus=2,
            gpu_types=["H100", "A100"],
            gpu_memory_bytes_min=40 * 10**9,
            grace=Duration(seconds=120),
            stop_signal=t.STOP_SIGNAL_TERM,
            max_restarts=3,
            run_again_exit_codes=[75, 85],
            replication=t.REPLICATION_AUTOMATIC,
        ),
        phase=t.JOB_PHASE_ACTIVE,
        reason="runs on n2, where a replica of its checkpoint of step 100 lies",
        epoch=2,
        attempts=[
            t.Attempt(
                id="12.1",
                epoch=1,
                node="n1",
                gpu_uuids=["GPU-1", "GPU-2"],
                phase=t.ATTEMPT_PHASE_LOST,
                assign_time=ago(606),
                start_time=ago(605),
                end_time=ago(200),
                reason="n1 has not been heard for 10 s",
                replica_node="n2",
                accounting=t.Accounting(
                    wall_seconds=406,
                    productive_seconds=304.5,
                    start_seconds=91.5,
                    detect_seconds=10,
                    overstated_ratio=1,
                    measured=True,
                ),
            ),
            t.Attempt(
                id="12.2",
                epoch=2,
                node="n2",
                gpu_uuids=["GPU-3", "GPU-4"],
                phase=t.ATTEMPT_PHASE_RUNNING,
                assign_time=ago(193),
                start_time=ago(192.5),
                restored_step=100,
                replica_node="n3",
            ),
        ],
        checkpoint=t.Checkpoint(
            digest=DIGEST,
            epoch=2,
            step=100,
            size_bytes=1_300_000_000,
            replicas=["n2", "n3"],
            commit_time=ago(42.5),
        ),
        failures=1,
        submit_time=ago(3723.5),
        progress=t.Progress(step=120, total_steps=500, metrics={"loss": 1.25, "accuracy": 0.5}),
        accounting=account(),
    )


def account() -> t.Accounting:
    """A job that has known everything but input that was late."""
    return t.Accounting(
        wall_seconds=3600,
        productive_seconds=2800,
        capture_seconds=0.3,
        recompute_seconds=340,
        detect_seconds=10,
        schedule_seconds=100.7,
        start_seconds=75,
        restore_seconds=34,
        idle_seconds=240,
        overstated_ratio=1.25,
        measured=True,
    )


def queued_job() -> t.Job:
    """A job that waits, and has never run."""
    return t.Job(
        id=1234567890123,
        spec=t.JobSpec(
            name="[red]a name that is longer than its column", job_class=t.JOB_CLASS_SPARE, gpus=8
        ),
        phase=t.JOB_PHASE_QUEUED,
        reason="needs 8 GPUs on one node; the largest free block is 1 on n2",
        submit_time=ago(30.5),
    )


def ended_job() -> t.Job:
    """A job that failed."""
    return t.Job(
        id=3,
        spec=t.JobSpec(name="head", job_class=t.JOB_CLASS_STANDARD),
        phase=t.JOB_PHASE_FAILED,
        reason="failed 4 times in a row without a new checkpoint; the last exit code was 1",
        epoch=4,
        attempts=[
            t.Attempt(
                id="3.4",
                epoch=4,
                node="n1",
                phase=t.ATTEMPT_PHASE_FAILED,
                exit_code=1,
                assign_time=ago(90_000),
                start_time=ago(90_000),
                end_time=ago(89_000),
            )
        ],
        submit_time=ago(100_000),
        end_time=ago(89_000),
        progress=t.Progress(step=7),
    )


def _gpu(uuid: str, phase: t.GpuPhase.ValueType, telemetry: t.GpuTelemetry | None) -> t.Gpu:
    name = "NVIDIA H100 80GB HBM3"
    return t.Gpu(uuid=uuid, name=name, memory_bytes=80 * 2**30, phase=phase, telemetry=telemetry)


def nodes() -> list[t.Node]:
    """One busy node, one with a silent GPU, one lost before its first heartbeat, one without a
    GPU."""
    busy = t.GpuTelemetry(
        utilization_ratio=0.9,
        memory_used_bytes=60 * 2**30,
        temperature_celsius=71,
        power_mw=650_000,
    )
    idle = t.GpuTelemetry(
        utilization_ratio=0.0, memory_used_bytes=0, temperature_celsius=33, power_mw=70_000
    )
    silent = t.Gpu(
        uuid="GPU-4",
        name="NVIDIA GeForce RTX 4090",
        memory_bytes=24 * 2**30,
        phase=t.GPU_PHASE_FREE,
        telemetry=t.GpuTelemetry(error="GPU is lost", temperature_celsius=40),
    )
    return [
        t.Node(
            id="n1",
            phase=t.NODE_PHASE_UP,
            intent=t.NODE_INTENT_OPEN,
            host=t.HostFacts(hostname="gpu-box-1", cpu_count=64, memory_bytes=2**40),
            gpus=[_gpu("GPU-1", t.GPU_PHASE_HELD, busy), _gpu("GPU-2", t.GPU_PHASE_FREE, idle)],
            telemetry=t.HostTelemetry(cpu_utilization_ratio=0.25, load_1min=16),
            attempts=["12.2", "14.1"],
        ),
        t.Node(
            id="n2",
            phase=t.NODE_PHASE_UP,
            intent=t.NODE_INTENT_DRAINING,
            gpus=[_gpu("GPU-3", t.GPU_PHASE_FREE, idle), silent],
            reason="draining for 12 s: hands off 1 attempt",
        ),
        t.Node(
            id="n3",
            phase=t.NODE_PHASE_LOST,
            intent=t.NODE_INTENT_OPEN,
            gpus=[_gpu("GPU-5", t.GPU_PHASE_ABSENT, None)],
            reason="not heard for 34 s",
        ),
        t.Node(
            id="n4",
            phase=t.NODE_PHASE_UP,
            intent=t.NODE_INTENT_OPEN,
            host=t.HostFacts(gpu_absence="no GPUs: Driver Not Loaded"),
        ),
    ]


def events() -> list[t.JobEvent]:
    """The beginning of a history."""
    return [
        t.JobEvent(job_id=12, sequence=1, time=ago(3723.5), name="job.submitted", message="by ada"),
        t.JobEvent(
            job_id=12,
            sequence=2,
            time=ago(606),
            name="attempt.assigned",
            attempt="12.1",
            node="n1",
            message="n1 has 2 free GPUs of 2",
        ),
    ]
