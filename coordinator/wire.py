"""Protobuf to the coordinator's values and back, for the agents' stream and for people's requests.

A message that makes no sense raises `WireError` with a sentence for its sender: the peer is wrong,
and neither the core nor its state ever sees it.
"""

import re
from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator import wire_health, wire_nodes, wire_time
from coordinator.core import launch, model, titles, traces
from coordinator.core import messages as m
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.wire_time import encode_span, encode_time
from protos.baton.v1 import agent_pb2 as pb
from protos.baton.v1 import types_pb2 as types

STUCK_PIDS_MAX = 16  # of an attempt; as many as a person looks at
_NODE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Job id, epoch, and the rank of one of several; 18 digits fit an int64, and so every store.
_ATTEMPT = re.compile(r"[1-9][0-9]{0,17}\.[1-9][0-9]{0,17}(\.(0|[1-9][0-9]{0,3}))?")

# Enum values carry their enum's name as prefix (protobuf style guide), then ours.
_CLASSES = {
    types.JOB_CLASS_UNSPECIFIED: model.JobClass.STANDARD,
    types.JOB_CLASS_GUARANTEED: model.JobClass.GUARANTEED,
    types.JOB_CLASS_STANDARD: model.JobClass.STANDARD,
    types.JOB_CLASS_SPARE: model.JobClass.SPARE,
}
_REPLICATIONS = {
    types.REPLICATION_UNSPECIFIED: model.Replication.AUTOMATIC,
    types.REPLICATION_AUTOMATIC: model.Replication.AUTOMATIC,
    types.REPLICATION_REQUIRED: model.Replication.REQUIRED,
    types.REPLICATION_NONE: model.Replication.NONE,
}
_SIGNALS = {
    types.STOP_SIGNAL_UNSPECIFIED: model.StopSignal.TERM,
    types.STOP_SIGNAL_TERM: model.StopSignal.TERM,
    types.STOP_SIGNAL_USR1: model.StopSignal.USR1,
    types.STOP_SIGNAL_USR2: model.StopSignal.USR2,
}


class WireError(Exception):
    """The sender said something that cannot be understood; the text says what."""


# --- what people ask for --------------------------------------------------------------------------


def decode_spec(spec: types.JobSpec) -> model.JobSpec:
    """Defaults filled in; whether it may run is for the core. Raises `WireError`."""
    for name, known, value in (
        ("job_class", _CLASSES, spec.job_class),
        ("replication", _REPLICATIONS, spec.replication),
        ("stop_signal", _SIGNALS, spec.stop_signal),
    ):
        if value not in known:
            names = ", ".join(item.value for item in known.values() if item is not None)
            raise WireError(f"unknown {name} {value}; known are {names}")
    grace_ms = _milliseconds(spec.grace) if spec.HasField("grace") else model.GRACE_MS_DEFAULT
    restarts = spec.max_restarts if spec.HasField("max_restarts") else model.MAX_RESTARTS_DEFAULT
    said = spec.HasField("keep_checkpoints")
    return model.JobSpec(
        name=spec.name or titles.title(spec.trainer, spec.command),
        project=spec.project or "default",
        job_class=_CLASSES[spec.job_class],
        command=tuple(spec.command),
        trainer=spec.trainer,
        trainer_config_json=spec.trainer_config_json,
        environment=tuple(sorted(spec.environment.items())),
        working_directory=spec.working_directory,
        gpus=spec.gpus,
        gpu_types=tuple(spec.gpu_types),
        gpu_memory_bytes_min=spec.gpu_memory_bytes_min,
        memory_bytes=spec.memory_bytes,
        grace_ms=grace_ms,
        stop_signal=_SIGNALS[spec.stop_signal],
        max_restarts=restarts,
        run_again_exit_codes=tuple(spec.run_again_exit_codes) or model.RUN_AGAIN_EXIT_CODES_DEFAULT,
        replication=_REPLICATIONS[spec.replication],
        slurm_environment=spec.slurm_environment,
        hold=spec.hold,
        keep_checkpoints=spec.keep_checkpoints if said else model.KEEP_CHECKPOINTS_DEFAULT,
        ranks=spec.ranks or 1,
        shared_gpu_memory_bytes=spec.shared_gpu_memory_bytes,
        flexible_ms=_milliseconds(spec.flexible) if spec.HasField("flexible") else 0,
        deadline_unix_ms=_deadline(spec),
        share_automatic=spec.share_automatic,
        array=spec.array,
    )


def _deadline(spec: types.JobSpec) -> int:
    try:
        return wire_time.decode_time(spec.deadline) if spec.HasField("deadline") else 0
    except ValueError as error:
        raise WireError(f"deadline: {error}") from error


def decode_deadline_in(span: Duration) -> int:
    """Milliseconds from when it is heard of. Raises `WireError`."""
    span_ms = _milliseconds(span)
    if not 1 <= span_ms <= wire_time.SECONDS_MAX * 1000:
        raise WireError(f"deadline_in is {span_ms} ms; it must be between 1 ms and 30 years")
    return span_ms


def encode_spec(spec: model.JobSpec) -> types.JobSpec:
    return types.JobSpec(
        name=spec.name,
        project=spec.project,
        job_class=types.JobClass.Value(f"JOB_CLASS_{spec.job_class.name}"),
        command=spec.command,
        trainer=spec.trainer,
        trainer_config_json=spec.trainer_config_json,
        environment=dict(spec.environment),
        working_directory=spec.working_directory,
        gpus=spec.gpus,
        gpu_types=spec.gpu_types,
        gpu_memory_bytes_min=spec.gpu_memory_bytes_min,
        memory_bytes=spec.memory_bytes,
        grace=encode_span(spec.grace_ms),
        stop_signal=types.StopSignal.Value(f"STOP_SIGNAL_{spec.stop_signal.name}"),
        max_restarts=spec.max_restarts,
        run_again_exit_codes=spec.run_again_exit_codes,
        replication=types.Replication.Value(f"REPLICATION_{spec.replication.name}"),
        slurm_environment=spec.slurm_environment,
        hold=spec.hold,
        keep_checkpoints=spec.keep_checkpoints,
        # An agent of before gangs is sent what it always was.
        ranks=spec.ranks if spec.ranks > 1 else 0,
        shared_gpu_memory_bytes=spec.shared_gpu_memory_bytes,
        flexible=encode_span(spec.flexible_ms) if spec.flexible_ms else None,
        deadline=encode_time(spec.deadline_unix_ms) if spec.deadline_unix_ms else None,
        share_automatic=spec.share_automatic,
        array=spec.array,
    )


def decode_phases(phases: list[types.JobPhase.ValueType]) -> tuple[JobPhase, ...]:
    """Raises `WireError`."""
    known = {types.JobPhase.Value(f"JOB_PHASE_{phase.name}"): phase for phase in JobPhase}
    for phase in phases:
        if phase not in known:
            raise WireError(f"unknown job phase {phase}")
    return tuple(known[phase] for phase in phases)


def encode_job(view: model.JobView) -> types.Job:
    job = view.job
    message = types.Job(
        id=job.id,
        spec=encode_spec(job.spec),
        phase=types.JobPhase.Value(f"JOB_PHASE_{job.phase.name}"),
        reason=job.reason,
        epoch=job.epoch,
        attempts=[encode_attempt(attempt) for attempt in view.attempts],
        failures=job.failures,
        submit_time=encode_time(job.submitted_unix_ms),
    )
    for encoded in message.attempts:
        encoded.trace_id = traces.trace_id(job, encoded.epoch)
    if job.ended_unix_ms is not None:
        message.end_time.CopyFrom(encode_time(job.ended_unix_ms))
    if view.checkpoint is not None:
        message.checkpoint.CopyFrom(encode_checkpoint(view.checkpoint))
    if view.progress is not None:
        message.progress.CopyFrom(wire_time.encode_progress(view.progress))
    if view.trials is not None:
        message.trial.CopyFrom(types.Trial(**view.trials._asdict()))
        message.trial.array_job_id, message.trial.index = job.array_id, job.array_index
    wire_time.add_accounts(message, view)
    return message


def encode_attempt(attempt: model.Attempt) -> types.Attempt:
    message = types.Attempt(
        id=attempt.id,
        epoch=attempt.epoch,
        node=attempt.node,
        gpu_uuids=attempt.gpu_uuids,
        phase=_attempt_phase(attempt.phase),
        assign_time=encode_time(attempt.assigned_unix_ms),
        exit_code=attempt.exit_code,
        signal=attempt.signal,
        reason=attempt.reason,
        restored_step=attempt.restored_step if attempt.restored_digest else None,
        replica_node=attempt.replica_node,
        rank=attempt.rank,
    )
    if attempt.started_unix_ms is not None:
        message.start_time.CopyFrom(encode_time(attempt.started_unix_ms))
    if attempt.ended_unix_ms is not None:
        message.end_time.CopyFrom(encode_time(attempt.ended_unix_ms))
    return message


def _attempt_phase(phase: AttemptPhase) -> types.AttemptPhase.ValueType:
    return types.AttemptPhase.Value(f"ATTEMPT_PHASE_{phase.name}")


def encode_checkpoint(checkpoint: model.Checkpoint) -> types.Checkpoint:
    return types.Checkpoint(
        digest=checkpoint.digest,
        parent=checkpoint.parent,
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        size_bytes=checkpoint.size_bytes,
        replicas=checkpoint.replicas,
        commit_time=encode_time(checkpoint.committed_unix_ms),
        parts=[
            types.CheckpointPart(
                digest=part.digest, size_bytes=part.size_bytes, replicas=part.replicas
            )
            for part in checkpoint.parts
        ],
    )


def encode_event(event: model.JobEvent) -> types.JobEvent:
    return types.JobEvent(
        job_id=event.job_id,
        sequence=event.sequence,
        time=encode_time(event.unix_ms),
        name=event.name,
        attempt=event.attempt,
        node=event.node,
        message=event.message,
    )


# --- what agents say ------------------------------------------------------------------------------


def decode(message: pb.SessionRequest) -> m.AgentMessage:
    """Raises `WireError`."""
    kind = message.WhichOneof("message")
    match kind:
        case "hello":
            return _hello(message.hello)
        case "heartbeat":
            return _heartbeat(message.heartbeat)
        case "event":
            return _event(message.event)
        case "goodbye":
            goodbye = message.goodbye
            away = _milliseconds(goodbye.absence) if goodbye.HasField("absence") else None
            return m.Goodbye(away)
    raise WireError("a message of a kind that this coordinator does not know; is it older?")


def _hello(hello: pb.Hello) -> m.Hello:
    if not _NODE.fullmatch(hello.node) or hello.node == model.SHARED:
        raise WireError(f"{hello.node!r} is no node name: 1 to 64 of a-z, 0-9, '.' and '-'")
    if not hello.journal_id:
        raise WireError("the hello has no journal id")
    if hello.acknowledged_sequence < 0:
        raise WireError(f"{hello.acknowledged_sequence} is no sequence")
    told = hello.host
    host = model.HostFacts(
        told.hostname, told.boot_id, told.cpu_count, told.memory_bytes,
        told.driver_version, told.agent_version, told.gpu_absence,
    )  # fmt: skip
    return m.Hello(
        hello.node,
        hello.journal_id,
        hello.peer_address,
        host,
        tuple(model.GpuFacts(gpu.uuid, gpu.name, gpu.memory_bytes) for gpu in hello.gpus),
        tuple(_held(held) for held in hello.attempts),
        tuple(_digest(digest) for digest in hello.checkpoints),
        hello.acknowledged_sequence,
        gangs=pb.CAPABILITY_GANGS in hello.capabilities,
        shares=pb.CAPABILITY_SHARES in hello.capabilities,
        health=_health(hello.health),
    )


def _health(gpus: Iterable[types.GpuHealth]) -> tuple[model.GpuHealth, ...]:
    try:
        return wire_health.decode_health(gpus)
    except ValueError as error:
        raise WireError(str(error)) from None


def _held(held: pb.HeldAttempt) -> m.HeldAttempt:
    stuck = tuple(held.stuck.pids[:STUCK_PIDS_MAX]) if held.HasField("stuck") else None
    gain_ms = _milliseconds(held.precopy_gain) if held.HasField("precopy_gain") else None
    try:
        spec = decode_spec(held.spec) if held.HasField("spec") else None
    except WireError:  # a later version's: its node need not come again for that
        spec = None
    return m.HeldAttempt(
        _attempt_id(held.attempt), tuple(held.gpu_uuids), held.live, stuck, gain_ms,
        held.copies_failed, spec, held.checkpoint and _digest(held.checkpoint),
    )  # fmt: skip


def _heartbeat(beat: pb.Heartbeat) -> m.Heartbeat:
    host = None
    if beat.HasField("host"):
        host = model.HostTelemetry(
            beat.host.cpu_utilization_ratio,
            beat.host.memory_used_bytes,
            beat.host.disk_free_bytes,
            beat.host.load_1min,
        )
    return m.Heartbeat(
        beat.sequence,
        host,
        tuple(_reading(gpu) for gpu in beat.gpus),
        tuple(_held(held) for held in beat.attempts),
        tuple((_attempt_id(item.attempt), _progress(item.progress)) for item in beat.progress),
    )


def _reading(gpu: types.GpuTelemetry) -> model.GpuReading:
    try:
        return wire_nodes.decode_reading(gpu)
    except ValueError as error:
        raise WireError(str(error)) from None


def _progress(progress: types.Progress) -> model.Progress:
    try:
        return wire_time.decode_progress(progress)
    except ValueError as error:
        raise WireError(str(error)) from None


def _event(event: pb.AgentEvent) -> m.AgentEvent:
    kind = event.WhichOneof("event")
    age_ms = _milliseconds(event.age) if event.HasField("age") else None
    body: m.AgentEventBody
    match kind:
        case "started":
            started = event.started
            skipped = tuple((item.digest, item.reason) for item in started.skipped)
            body = m.AttemptStarted(
                started.pid, started.restored_digest, started.restored_step, skipped,
                _milliseconds(started.restore) if started.HasField("restore") else None,
                _milliseconds(started.start) if started.HasField("start") else None,
                tuple(started.held_ranks),
            )  # fmt: skip
        case "exited":
            ended = event.exited
            body = m.AttemptExited(
                ended.exit_code if ended.HasField("exit_code") else None,
                ended.signal if ended.HasField("signal") else None,
                ended.reason, ended.by_itself,
                ended.said_exit_code if ended.HasField("said_exit_code") else None,
            )  # fmt: skip
        case "refused":
            body = m.AttemptRefused(event.refused.reason, event.refused.permanent)
        case "milestone":
            body = m.AttemptMilestone(event.milestone.name)
        case "checkpoint_proposed":
            body = _proposed(event.checkpoint_proposed)
        case "gpu_health":
            body = m.GpuHealthChanged(_health(event.gpu_health.gpus))
        case _:
            raise WireError("an event of a kind that this coordinator does not know; is it older?")
    attempt = "" if kind == "gpu_health" else _attempt_id(event.attempt)
    return m.AgentEvent(event.sequence, _milliseconds(event.time), attempt, body, age_ms)


def _proposed(proposed: pb.CheckpointProposed) -> m.CheckpointProposed:
    return m.CheckpointProposed(
        _digest(proposed.digest), proposed.parent and _digest(proposed.parent), proposed.step,
        proposed.size_bytes, tuple(proposed.replicas), proposed.parts,
    )  # fmt: skip


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise WireError(f"{text[:80]!r} is no digest")
    return text


def _attempt_id(text: str) -> str:
    if not _ATTEMPT.fullmatch(text):
        raise WireError(f"{text[:80]!r} is no attempt id")
    return text


def _milliseconds(value: Duration | Timestamp) -> int:
    try:
        span_ms = value.ToMilliseconds()
    except ValueError as error:
        raise WireError(str(error)) from None
    if span_ms < 0:
        raise WireError(f"{span_ms} ms is no time; it must not be negative")
    return span_ms


# --- what agents are told -------------------------------------------------------------------------


def encode(order: m.AgentOrder) -> pb.SessionResponse:
    match order:
        case m.Welcome():
            welcome = pb.Welcome(
                leader_epoch=order.leader_epoch,
                heartbeat_interval=encode_span(order.heartbeat_interval_ms),
                lease=encode_span(order.lease_ms),
                acknowledged_sequence=order.acknowledged_sequence,
                telemetry_rate=wire_nodes.encode_rate(order.telemetry_rate),
                report_interval=encode_span(order.report_interval_ms),
                unknown_attempts=order.unknown,
            )
            return pb.SessionResponse(welcome=welcome)
        case m.ComeLater():
            return pb.SessionResponse(come_later=pb.ComeLater(wait=encode_span(order.wait_ms)))
        case m.LeaseRenewal():
            renewal = pb.LeaseRenewal(heartbeat_sequence=order.heartbeat_sequence)
            return pb.SessionResponse(lease_renewal=renewal)
        case m.EventAck():
            return pb.SessionResponse(event_ack=pb.EventAck(sequence=order.sequence))
        case m.StartAttempt():
            return pb.SessionResponse(start_attempt=_start(order))
        case m.StopAttempt():
            grace = None if order.grace_ms is None else encode_span(order.grace_ms)
            precopy = None if order.precopy_ms is None else encode_span(order.precopy_ms)
            stop = pb.StopAttempt(
                attempt=order.attempt, grace=grace, reason=order.reason, precopy=precopy
            )
            return pb.SessionResponse(stop_attempt=stop)
        case m.SetReplicaTarget():
            return pb.SessionResponse(set_replica_target=_replica_target(order))
        case m.CommitResult():
            result = pb.CommitResult(
                attempt=order.attempt, digest=order.digest, accepted=order.accepted,
                reason=order.reason, head=order.head,
            )  # fmt: skip
            return pb.SessionResponse(commit_result=result)
        case m.KeepCheckpoints():
            keep = pb.KeepCheckpoints(digests=order.digests)
            return pb.SessionResponse(keep_checkpoints=keep)


def _start(order: m.StartAttempt) -> pb.StartAttempt:
    return pb.StartAttempt(
        attempt=order.attempt,
        spec=encode_spec(order.spec),
        gpu_uuids=order.gpu_uuids,
        candidates=[
            pb.RestoreCandidate(
                digest=candidate.digest,
                step=candidate.step,
                sources=[_address(source) for source in candidate.sources],
                parts=[
                    pb.RestorePart(
                        digest=part.digest, sources=[_address(source) for source in part.sources]
                    )
                    for part in candidate.parts
                ],
            )
            for candidate in order.candidates
        ],
        replica_target=None if order.replica_target is None else _address(order.replica_target),
        restart_count=order.restart_count,
        gang=None if order.gang is None else _gang(order.gang),
        traceparent=order.traceparent,
    )


def _gang(gang: launch.Gang) -> pb.Gang:
    return pb.Gang(
        rank=gang.rank,
        world_size=gang.world_size,
        local_rank=gang.local_rank,
        local_world_size=gang.local_world_size,
        node_rank=gang.node_rank,
        nodes=gang.nodes,
        master_host=gang.master_host,
        master_port=gang.master_port,
        node_gpu_uuids=gang.node_gpu_uuids,
        own_parts=True,
    )


def _replica_target(order: m.SetReplicaTarget) -> pb.SetReplicaTarget:
    message = pb.SetReplicaTarget(attempt=order.attempt, required=order.required, lost=order.lost)
    if order.target is not None:
        message.target.CopyFrom(_address(order.target))
    if (lone := order.lone) is not None:
        wire = pb.LoneCheckpoint(digest=lone.digest, step=lone.step, parts=lone.parts)
        message.lone.CopyFrom(wire)
    return message


def _address(address: launch.PeerAddress) -> pb.PeerAddress:
    return pb.PeerAddress(node=address.node, address=address.address)
