"""Protobuf to the agent's values and back; nothing else in the agent sees a protobuf message.

A message that makes no sense (an attempt id that is not one, a missing part) raises `WireError`:
the peer is wrong, and the session ends with that sentence and not with a stack trace in the core.
"""

import re
from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from agent.core import messages as m
from agent.core.gpu_messages import OWN_RATE
from agent.core.health import GpuHealthChanged
from agent.core.ids import RANKS_MAX, find_attempt_id
from agent.core.trainer_messages import TrainerTime
from agent.core.values import (
    Gang,
    GpuSample,
    HostFacts,
    HostSample,
    LoneCheckpoint,
    ReplicaSource,
    RestoreCandidate,
    RestorePart,
)
from agent.wire_health import (
    encode_change,
    encode_details,
    encode_health,
    encode_time,
    encode_window,
)
from protos.baton.v1 import agent_pb2 as pb
from protos.baton.v1 import types_pb2 as types

PORT_MAX = 65_535
# What this version can do that the first one could not; agent.proto says what each means.
CAPABILITIES = (pb.CAPABILITY_GANGS, pb.CAPABILITY_SHARES)
# https://www.w3.org/TR/trace-context/, section 3.2
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SIGNALS = {types.STOP_SIGNAL_USR1: "USR1", types.STOP_SIGNAL_USR2: "USR2"}
_REPLICATIONS = {types.REPLICATION_REQUIRED: "required", types.REPLICATION_NONE: "none"}


class WireError(Exception):
    """The coordinator said something that this agent cannot understand."""


# --- upward ---------------------------------------------------------------------------------------


def encode(message: m.Upward) -> pb.SessionRequest:
    match message:
        case m.Hello():
            return pb.SessionRequest(hello=_hello(message))
        case m.Heartbeat():
            return pb.SessionRequest(heartbeat=_heartbeat(message))
        case m.AgentEvent():
            return pb.SessionRequest(event=_event(message))
        case m.Goodbye():
            absence = None if message.absence_ms is None else _duration(message.absence_ms)
            return pb.SessionRequest(goodbye=pb.Goodbye(absence=absence))


def _hello(hello: m.Hello) -> pb.Hello:
    return pb.Hello(
        node=hello.node,
        journal_id=hello.journal_id,
        peer_address=hello.peer_address,
        host=_host(hello.host),
        gpus=[
            pb.GpuFacts(uuid=gpu.uuid, name=gpu.name, memory_bytes=gpu.memory_bytes)
            for gpu in hello.gpus
        ],
        attempts=[_held(held) for held in hello.attempts],
        checkpoints=hello.checkpoints,
        acknowledged_sequence=hello.acknowledged_sequence,
        capabilities=CAPABILITIES,
        health=[encode_health(said) for said in hello.health],
    )


def _host(host: HostFacts) -> types.HostFacts:
    return types.HostFacts(
        hostname=host.hostname,
        boot_id=host.boot_id,
        cpu_count=host.cpu_count,
        memory_bytes=host.memory_bytes,
        driver_version=host.driver_version,
        agent_version=host.agent_version,
        gpu_absence=host.gpu_absence,
    )


def _held(held: m.HeldAttempt) -> pb.HeldAttempt:
    stuck = None if held.stuck is None else pb.StuckProcesses(pids=held.stuck)
    gain_ms = held.precopy_gain_ms
    return pb.HeldAttempt(
        attempt=held.attempt,
        gpu_uuids=held.gpu_uuids,
        live=held.live,
        stuck=stuck,
        precopy_gain=None if gain_ms is None else _duration(gain_ms),
        copies_failed=held.copies_failed,
        spec=types.JobSpec.FromString(held.request) if held.request else None,
        checkpoint=held.checkpoint,
    )


def _heartbeat(beat: m.Heartbeat) -> pb.Heartbeat:
    return pb.Heartbeat(
        sequence=beat.sequence,
        host=None if beat.host is None else _host_sample(beat.host),
        gpus=[_gpu_sample(gpu, beat.telemetry_age_ms) for gpu in beat.gpus],
        attempts=[_held(held) for held in beat.attempts],
        progress=[
            pb.AttemptProgress(attempt=attempt_id, progress=_progress(progress))
            for attempt_id, progress in beat.progress
        ],
    )


def _host_sample(host: HostSample) -> types.HostTelemetry:
    return types.HostTelemetry(
        cpu_utilization_ratio=host.cpu_utilization_ratio,
        memory_used_bytes=host.memory_used_bytes,
        disk_free_bytes=host.disk_free_bytes,
        load_1min=host.load_1min,
    )


def _gpu_sample(gpu: GpuSample, sample_age_ms: int) -> types.GpuTelemetry:
    return types.GpuTelemetry(
        uuid=gpu.uuid,
        utilization_ratio=gpu.utilization_ratio,
        memory_used_bytes=gpu.memory_used_bytes,
        temperature_celsius=gpu.temperature_celsius,
        power_mw=gpu.power_mw,
        energy_mj=gpu.energy_mj,
        sm_clock_mhz=gpu.sm_clock_mhz,
        memory_clock_mhz=gpu.memory_clock_mhz,
        error=gpu.unread,
        details=encode_details(gpu),
        age=_duration(gpu.age_ms + sample_age_ms),
        window=encode_window(gpu.window),
    )


def _progress(progress: m.Progress) -> types.Progress:
    time = None if progress.time is None else _trainer_time(progress.time)
    return types.Progress(
        step=progress.step,
        total_steps=progress.total_steps,
        metrics=dict(progress.metrics),
        time=time,
    )


def _trainer_time(time: TrainerTime) -> types.TrainerTime:
    return types.TrainerTime(
        step_seconds=time.step_s,
        evaluate_seconds=time.evaluate_s,
        input_wait_seconds=time.input_wait_s,
        capture_seconds=time.capture_s,
        restore_seconds=time.restore_s,
    )


def _event(event: m.AgentEvent) -> pb.AgentEvent:
    message = pb.AgentEvent(
        sequence=event.sequence,
        time=encode_time(event.unix_ms),
        attempt=event.attempt,
        age=_duration(event.age_ms),
    )
    body = event.body
    match body:
        case m.AttemptStarted():
            message.started.CopyFrom(
                pb.AttemptStarted(
                    pid=body.pid,
                    restored_digest=body.restored_digest,
                    restored_step=body.restored_step,
                    skipped=[
                        pb.SkippedCheckpoint(digest=digest, reason=reason)
                        for digest, reason in body.skipped
                    ],
                    restore=None if body.restore_ms is None else _duration(body.restore_ms),
                    start=None if body.start_ms is None else _duration(body.start_ms),
                    held_ranks=body.held_ranks,
                )
            )
        case m.AttemptExited():
            message.exited.CopyFrom(
                pb.AttemptExited(
                    exit_code=body.exit_code,
                    signal=body.signal,
                    reason=body.reason,
                    by_itself=body.by_itself,
                    said_exit_code=body.said_exit_code,
                )
            )
        case m.AttemptRefused():
            message.refused.CopyFrom(
                pb.AttemptRefused(reason=body.reason, permanent=body.permanent)
            )
        case m.AttemptMilestone():
            message.milestone.CopyFrom(pb.AttemptMilestone(name=body.name))
        case m.CheckpointProposed():
            message.checkpoint_proposed.CopyFrom(
                pb.CheckpointProposed(
                    digest=body.digest,
                    parent=body.parent,
                    step=body.step,
                    size_bytes=body.size_bytes,
                    replicas=body.replicas,
                    parts=body.parts,
                )
            )
        case GpuHealthChanged():
            message.gpu_health.CopyFrom(encode_change(body))
    return message


# --- downward -------------------------------------------------------------------------------------


_RATES = {
    value: name.removeprefix("TELEMETRY_RATE_").lower()
    for name, value in types.TelemetryRate.items()
    if value != types.TELEMETRY_RATE_UNSPECIFIED
}


def decode(message: pb.SessionResponse) -> m.Order:
    """Raises `WireError`."""
    kind = message.WhichOneof("message")
    match kind:
        case "welcome":
            welcome = message.welcome
            return m.Welcome(
                welcome.leader_epoch,
                _milliseconds(welcome.heartbeat_interval, minimum_ms=1),
                _milliseconds(welcome.lease, minimum_ms=1),
                welcome.acknowledged_sequence,
                _RATES.get(welcome.telemetry_rate, OWN_RATE),
                _milliseconds(welcome.report_interval),
                tuple(welcome.unknown_attempts),
            )
        case "come_later":
            return m.ComeLater(_milliseconds(message.come_later.wait))
        case "lease_renewal":
            return m.LeaseRenewal(message.lease_renewal.heartbeat_sequence)
        case "event_ack":
            return m.EventAck(message.event_ack.sequence)
        case "start_attempt":
            return _start(message.start_attempt)
        case "stop_attempt":
            return _stop(message.stop_attempt)
        case "set_replica_target":
            return _replica_target(message.set_replica_target)
        case "commit_result":
            result = message.commit_result
            return m.CommitResult(
                _attempt_id(result.attempt),
                result.digest,
                result.accepted,
                result.reason,
                result.head,
            )
        case "keep_checkpoints":
            return m.KeepCheckpoints(tuple(message.keep_checkpoints.digests))
    raise WireError("an order of a kind that this agent does not know; is it older?")


def _start(order: pb.StartAttempt) -> m.StartAttempt:
    return m.StartAttempt(
        _attempt_id(order.attempt),
        _spec(order.spec),
        tuple(order.gpu_uuids),
        tuple(
            RestoreCandidate(
                candidate.digest,
                candidate.step,
                _sources(candidate.sources),
                tuple(RestorePart(part.digest, _sources(part.sources)) for part in candidate.parts),
            )
            for candidate in order.candidates
        ),
        _source(order.replica_target) if order.HasField("replica_target") else None,
        order.restart_count,
        _gang(order.gang) if order.HasField("gang") else None,
        _traceparent(order.traceparent),
    )


def _traceparent(text: str) -> str:
    if text and not TRACEPARENT.fullmatch(text):
        raise WireError(f"{text[:80]!r} is no traceparent")
    return text


def _gang(gang: pb.Gang) -> Gang:
    inside = (
        0 <= gang.rank < gang.world_size <= RANKS_MAX
        and 0 <= gang.local_rank < gang.local_world_size <= gang.world_size
        and 0 <= gang.node_rank < len(gang.nodes)
        and 0 < gang.master_port <= PORT_MAX
    )
    if not inside:
        raise WireError(
            f"rank {gang.rank} of {gang.world_size}, {gang.local_rank} of {gang.local_world_size} "
            f"on node {gang.node_rank} of {len(gang.nodes)}, port {gang.master_port}: no gang is so"
        )
    return Gang(
        gang.rank,
        gang.world_size,
        gang.local_rank,
        gang.local_world_size,
        gang.node_rank,
        tuple(gang.nodes),
        gang.master_host,
        gang.master_port,
        tuple(gang.node_gpu_uuids),
        gang.own_parts,
    )


def _spec(spec: types.JobSpec) -> m.JobSpec:
    return m.JobSpec(
        spec.name,
        tuple(spec.command),
        spec.trainer,
        spec.trainer_config_json,
        tuple(sorted(spec.environment.items())),
        spec.working_directory,
        _milliseconds(spec.grace),
        _SIGNALS.get(spec.stop_signal, "TERM"),
        _REPLICATIONS.get(spec.replication, "automatic"),
        spec.slurm_environment,
        spec.memory_bytes,
        spec.shared_gpu_memory_bytes,
        spec.SerializeToString(deterministic=True),
    )


def _stop(order: pb.StopAttempt) -> m.StopAttempt:
    grace_ms = _milliseconds(order.grace) if order.HasField("grace") else None
    precopy_ms = _milliseconds(order.precopy) if order.HasField("precopy") else None
    return m.StopAttempt(_attempt_id(order.attempt), grace_ms, order.reason, precopy_ms)


def _replica_target(order: pb.SetReplicaTarget) -> m.SetReplicaTarget:
    target = _source(order.target) if order.HasField("target") else None
    lone = None
    if order.HasField("lone"):
        lone = LoneCheckpoint(order.lone.digest, order.lone.step, order.lone.parts)
    return m.SetReplicaTarget(_attempt_id(order.attempt), target, order.required, lone, order.lost)


def _sources(addresses: Iterable[pb.PeerAddress]) -> tuple[ReplicaSource, ...]:
    return tuple(_source(address) for address in addresses)


def _source(address: pb.PeerAddress) -> ReplicaSource:
    return ReplicaSource(address.node, address.address)


def _attempt_id(text: str) -> str:
    if find_attempt_id(text) is None:
        raise WireError(f"{text[:80]!r} is no attempt id")
    return text


def _milliseconds(duration: Duration, minimum_ms: int = 0) -> int:
    try:
        duration_ms = duration.ToMilliseconds()
    except ValueError as error:
        raise WireError(str(error)) from None
    if duration_ms < minimum_ms:
        raise WireError(f"a duration of {duration_ms} ms; at least {minimum_ms} ms was expected")
    return duration_ms


def _duration(duration_ms: int) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(duration_ms)
    return duration
