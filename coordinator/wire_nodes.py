"""Nodes and their GPUs on the wire: the part of the translation that is about machines.

Problem: what a driver does not say must not become a zero on the way. So the figures of a GPU are
shown in the words in which its agent said them: what is absent there is absent here.
"""

from coordinator import wire_health
from coordinator.core import model
from coordinator.core.node_power import silent
from coordinator.core.phases import GpuPhase, NodeIntent, NodePhase
from protos.baton.v1 import types_pb2 as types

FIGURES_BYTES_MAX = 65_536  # a hundred times what there is to say
AGE_MS_MAX = 10**12  # thirty years; what has grown from it can still be said on the wire


def encode_node(view: model.NodeView) -> types.Node:
    node = view.node
    message = types.Node(
        id=node.id,
        phase=_node_phase(view),
        intent=_node_intent(node.intent),
        peer_address=node.peer_address,
        host=types.HostFacts(
            hostname=node.host.hostname,
            boot_id=node.host.boot_id,
            cpu_count=node.host.cpu_count,
            memory_bytes=node.host.memory_bytes,
            driver_version=node.host.driver_version,
            agent_version=node.host.agent_version,
            gpu_absence=node.host.gpu_absence,
        ),
        gpus=[_gpu(gpu) for gpu in view.gpus],
        attempts=view.attempts,
        reason=view.reason,
        telemetry_rate=encode_rate(node.telemetry_rate),
        power=types.NodePower.Value(f"NODE_POWER_{node.power.phase.name}"),
    )
    if node.power.since_unix_ms:
        message.power_since.FromMilliseconds(node.power.since_unix_ms)
    if view.telemetry is not None:
        host = view.telemetry
        message.telemetry.CopyFrom(
            types.HostTelemetry(
                cpu_utilization_ratio=host.cpu_utilization_ratio,
                memory_used_bytes=host.memory_used_bytes,
                disk_free_bytes=host.disk_free_bytes,
                load_1min=host.load_1min,
            )
        )
    return message


def encode_rate(rate: model.TelemetryRate) -> types.TelemetryRate.ValueType:
    if rate is model.TelemetryRate.OWN:
        return types.TELEMETRY_RATE_UNSPECIFIED
    return types.TelemetryRate.Value(f"TELEMETRY_RATE_{rate.name}")


def decode_rate(rate: types.TelemetryRate.ValueType) -> model.TelemetryRate:
    """Raises `ValueError` with a sentence."""
    if rate not in types.TelemetryRate.values():
        raise ValueError(f"{rate} is no rate of telemetry that this coordinator knows")
    name = types.TelemetryRate.Name(rate).removeprefix("TELEMETRY_RATE_")
    return model.TelemetryRate.__members__.get(name, model.TelemetryRate.OWN)


def decode_reading(said: types.GpuTelemetry) -> model.GpuReading:
    """Raises `ValueError` with a sentence. What is kept of it is bytes: a part of a message keeps
    the whole of it in memory."""
    figures = said.SerializeToString()
    if len(figures) > FIGURES_BYTES_MAX:
        raise ValueError(
            f"{len(figures)} bytes are no reading of a GPU; {FIGURES_BYTES_MAX} is the limit"
        )
    age_ms = 0
    if said.HasField("age"):
        age_ms = said.age.ToMilliseconds()
        if age_ms < 0:
            raise ValueError(f"{age_ms} ms is no age; it must not be negative")
    between, used_ratio = said.HasField("window"), None
    if between and said.window.HasField("utilization_ratio"):
        used_ratio = said.window.utilization_ratio.mean
    return model.GpuReading(
        said.uuid, said.error, min(age_ms, AGE_MS_MAX), between, used_ratio, figures
    )


def _node_phase(view: model.NodeView) -> types.NodePhase.ValueType:
    """A silence on purpose is no loss, to whoever counts the lost ones."""
    if view.phase is NodePhase.LOST and silent(view.node.power):
        return types.NODE_PHASE_OFF
    return types.NodePhase.Value(f"NODE_PHASE_{view.phase.name}")


def _node_intent(intent: NodeIntent) -> types.NodeIntent.ValueType:
    return types.NodeIntent.Value(f"NODE_INTENT_{intent.name}")


def _gpu_phase(phase: GpuPhase) -> types.GpuPhase.ValueType:
    return types.GpuPhase.Value(f"GPU_PHASE_{phase.name}")


def _gpu(gpu: model.GpuView) -> types.Gpu:
    message = types.Gpu(
        uuid=gpu.facts.uuid,
        name=gpu.facts.name,
        memory_bytes=gpu.facts.memory_bytes,
        phase=_gpu_phase(gpu.phase),
        attempt=gpu.attempt,
        shares=[
            types.GpuShare(attempt=attempt_id, memory_bytes=share_bytes)
            for attempt_id, share_bytes in gpu.shares
        ],
    )
    wire_health.add_health(message, gpu)
    if gpu.figures:
        message.telemetry.MergeFromString(gpu.figures)
        message.telemetry.age.FromMilliseconds(gpu.age_ms)
    return message
