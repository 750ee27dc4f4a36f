"""Answers of the coordinator as plain values: what is common to all of them, and nodes.

Problem: an answer of a newer coordinator has words that this program does not know, and what is
absent in it must not come out as 0. Every field goes through one of three functions here.
"""

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.cli import values
from coordinator.cli.settings import CommandFailed
from protos.baton.v1 import jobs_pb2, types_pb2


@lru_cache(maxsize=64)
def word_of(enum: EnumTypeWrapper, prefix: str, number: int) -> str | None:
    """An enum's value as people say it; one that a newer coordinator has is "unknown_<n>"."""
    if number not in enum.values():
        return f"unknown_{number}"
    word = enum.Name(number).removeprefix(prefix).lower()
    return None if word == "unspecified" else word


def time_of(message: Message, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    timestamp: Timestamp = getattr(message, field)
    return timestamp.ToDatetime(tzinfo=UTC)


def said(message: Message, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def decode_trial(job: types_pb2.Job) -> values.Trial | None:
    return None if (told := said(job, "trial")) is None else msgspec.convert(
        told, values.Trial, from_attributes=True
    )  # fmt: skip


def decode_change(job: types_pb2.Job, jobs: int) -> values.ArrayChange:
    """Of what was asked of a whole array. Raises `CommandFailed`."""
    trial = decode_trial(job)
    if trial is None:
        raise CommandFailed(
            f"only job {job.id} was changed: the coordinator knows no arrays; is it older?"
        )
    return values.ArrayChange(array_job_id=trial.array_job_id, trials=trial.trials, jobs=jobs)


def decode_requeue(answer: jobs_pb2.RequeueJobResponse) -> values.ArrayRequeue:
    """Likewise. An older coordinator leaves none."""
    change = decode_change(answer.job, answer.jobs)
    return values.ArrayRequeue(
        **msgspec.structs.asdict(change),
        left_running=answer.left_running,
        left_succeeded=answer.left_succeeded,
    )


def decode_explanation(job_id: int, answer: jobs_pb2.ExplainJobResponse) -> values.Explanation:
    """As told; an older coordinator tells the sentence alone."""
    start = None
    if answer.HasField("expected_start"):
        told = answer.expected_start
        start = values.ExpectedStart(
            time=time_of(told, "time"),
            nodes=list(told.nodes),
            where=told.where,
            after_job_id=told.after_job_id,
        )
    return values.Explanation(
        job_id=job_id,
        sentence=answer.sentence,
        expected_start=start,
        expected_end_time=time_of(answer, "expected_end_time"),
        suggestions=[
            values.Suggestion(change=one.change, outcome=one.outcome) for one in answer.suggestions
        ],
    )


def _gpu(gpu: types_pb2.Gpu) -> values.Gpu:
    telemetry = None
    if gpu.HasField("telemetry"):
        read = gpu.telemetry
        telemetry = values.GpuTelemetry(
            utilization_ratio=said(read, "utilization_ratio"),
            memory_used_bytes=said(read, "memory_used_bytes"),
            temperature_celsius=said(read, "temperature_celsius"),
            power_mw=said(read, "power_mw"),
            energy_mj=said(read, "energy_mj"),
            sm_clock_mhz=said(read, "sm_clock_mhz"),
            memory_clock_mhz=said(read, "memory_clock_mhz"),
            error=read.error,
            details=_details(read.details) if read.HasField("details") else None,
            age_s=read.age.ToMilliseconds() / 1000 if read.HasField("age") else None,
            window=_window(read.window) if read.HasField("window") else None,
        )
    return values.Gpu(
        uuid=gpu.uuid,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        phase=word_of(types_pb2.GpuPhase, "GPU_PHASE_", gpu.phase),
        attempt=gpu.attempt,
        telemetry=telemetry,
        health=_health(gpu.health) if gpu.HasField("health") else None,
        cordon=gpu.cordon,
        held_back=gpu.held_back,
        shares=[
            values.GpuShare(attempt=share.attempt, memory_bytes=share.memory_bytes)
            for share in gpu.shares
        ],
    )


def _details(read: types_pb2.GpuDetails) -> values.GpuDetails:
    return values.GpuDetails(
        **{name: said(read, name) for name in values.GpuDetails.__struct_fields__}
    )


def _window(window: types_pb2.GpuWindow) -> values.GpuWindow:
    def spread(name: str) -> values.Spread | None:
        one: types_pb2.Spread | None = said(window, name)
        return None if one is None else values.Spread(min=one.min, mean=one.mean, max=one.max)

    return values.GpuWindow(
        readings=window.readings,
        utilization_ratio=spread("utilization_ratio"),
        memory_used_bytes=spread("memory_used_bytes"),
        temperature_celsius=spread("temperature_celsius"),
        power_mw=spread("power_mw"),
    )


def _health(health: types_pb2.GpuHealth) -> values.GpuHealth:
    return values.GpuHealth(
        verdict=word_of(types_pb2.GpuVerdict, "GPU_VERDICT_", health.verdict),
        reason=health.reason,
        action=health.action,
        xids=[
            values.XidRecord(
                code=record.code,
                count=record.count,
                first_time=time_of(record, "first_time"),
                last_time=time_of(record, "last_time"),
                text=record.text,
            )
            for record in health.xids
        ],
    )


def decode_fit(fit: jobs_pb2.Fit) -> values.Fit:
    speed = None
    if fit.HasField("speed"):
        speed = values.FitSpeed(
            steps_per_second=fit.speed.steps_per_second,
            steps_per_second_low=fit.speed.steps_per_second_low,
            steps_per_second_high=fit.speed.steps_per_second_high,
        )
    return values.Fit(
        gpu_type=fit.gpu_type,
        memory_bytes=fit.memory_bytes,
        gpus=fit.gpus,
        gpus_of_job=fit.gpus_of_job,
        speed=speed,
        speed_why=fit.speed_why,
        fitting=word_of(jobs_pb2.Fitting, "FITTING_", fit.fitting),
        memory_why=fit.memory_why,
        memory_needed_bytes=said(fit, "memory_needed_bytes"),
        samples_at_once=said(fit, "samples_at_once"),
        tokens_per_step=said(fit, "tokens_per_step"),
        usd_per_hour=said(fit, "usd_per_hour"),
        usd_per_million_tokens=said(fit, "usd_per_million_tokens"),
        duration_seconds=said(fit, "duration_seconds"),
        unsuited=fit.unsuited,
    )


def decode_project(project: jobs_pb2.Project) -> values.Project:
    return values.Project(
        name=project.name,
        quota_gpu_hours_per_day=said(project, "quota_gpu_hours_per_day"),
        weight=project.weight,
        used_gpu_hours=project.used_gpu_hours,
        entitled_gpus=project.entitled_gpus,
        running_gpus=project.running_gpus,
        borrowed_gpus=project.borrowed_gpus,
        lent_gpus=project.lent_gpus,
        running_jobs=project.running_jobs,
        waiting_jobs=project.waiting_jobs,
        waiting_gpus=project.waiting_gpus,
    )


def decode_node(node: types_pb2.Node) -> values.Node:
    host = telemetry = None
    if node.HasField("host"):
        host = values.Host(
            hostname=node.host.hostname,
            boot_id=node.host.boot_id,
            cpu_count=node.host.cpu_count,
            memory_bytes=node.host.memory_bytes,
            driver_version=node.host.driver_version,
            agent_version=node.host.agent_version,
            gpu_absence=node.host.gpu_absence,
        )
    if node.HasField("telemetry"):
        telemetry = values.HostTelemetry(
            cpu_utilization_ratio=node.telemetry.cpu_utilization_ratio,
            memory_used_bytes=node.telemetry.memory_used_bytes,
            disk_free_bytes=node.telemetry.disk_free_bytes,
            load_1min=node.telemetry.load_1min,
        )
    return values.Node(
        id=node.id,
        phase=word_of(types_pb2.NodePhase, "NODE_PHASE_", node.phase),
        intent=word_of(types_pb2.NodeIntent, "NODE_INTENT_", node.intent),
        peer_address=node.peer_address,
        host=host,
        gpus=[_gpu(gpu) for gpu in node.gpus],
        telemetry=telemetry,
        attempts=list(node.attempts),
        reason=node.reason,
        telemetry_rate=word_of(types_pb2.TelemetryRate, "TELEMETRY_RATE_", node.telemetry_rate)
        or "own",
        power=word_of(types_pb2.NodePower, "NODE_POWER_", node.power),
        power_since=time_of(node, "power_since"),
    )


def decode_event(event: types_pb2.JobEvent) -> values.JobEvent:
    return values.JobEvent(
        job_id=event.job_id,
        sequence=event.sequence,
        time=time_of(event, "time"),
        name=event.name,
        attempt=event.attempt,
        node=event.node,
        message=event.message,
    )


def decode_attempt(attempt: types_pb2.Attempt) -> values.Attempt:
    return values.Attempt(
        id=attempt.id,
        epoch=attempt.epoch,
        node=attempt.node,
        gpu_uuids=list(attempt.gpu_uuids),
        phase=word_of(types_pb2.AttemptPhase, "ATTEMPT_PHASE_", attempt.phase),
        assign_time=time_of(attempt, "assign_time"),
        start_time=time_of(attempt, "start_time"),
        end_time=time_of(attempt, "end_time"),
        exit_code=said(attempt, "exit_code"),
        signal=said(attempt, "signal"),
        reason=attempt.reason,
        restored_step=said(attempt, "restored_step"),
        replica_node=attempt.replica_node,
        accounting=values.Accounting.of(said(attempt, "accounting")),
        rank=attempt.rank,
        trace_id=attempt.trace_id,
    )
