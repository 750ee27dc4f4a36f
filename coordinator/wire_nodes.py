"""Nodes and their GPUs on the wire: the part of the translation that is about machines.

Problem: what a driver does not say must not become a zero on the way. A field of telemetry is
absent where it is `None`, and `optional` in the contract.
"""

from dataclasses import asdict, fields
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration

from coordinator import wire_health
from coordinator.core import model
from coordinator.core.node_power import silent
from coordinator.core.phases import GpuPhase, NodeIntent, NodePhase
from coordinator.core.windows import GpuWindow, Spread
from protos.baton.v1 import types_pb2 as types

AGE_MS_MAX = 10**12  # thirty years; what has grown from it can still be said on the wire
_DETAILS: Final[tuple[Any, ...]] = tuple(field.name for field in fields(model.GpuDetails))
_FIGURES: Final = (
    "utilization_ratio", "memory_used_bytes", "temperature_celsius", "power_mw", "energy_mj",
    "sm_clock_mhz", "memory_clock_mhz",
)  # fmt: skip
_SPREADS: Final[tuple[Any, ...]] = tuple(
    field.name for field in fields(GpuWindow) if field.name != "readings"
)


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


def decode_telemetry(said: types.GpuTelemetry) -> model.GpuTelemetry:
    """Raises `ValueError` with a sentence."""
    has = said.HasField
    age_ms = said.age.ToMilliseconds()
    if age_ms < 0:
        raise ValueError(f"{age_ms} ms is no age; it must not be negative")
    # Of ten thousand nodes 16,000 a second: only of a zero it is asked whether it was said.
    return model.GpuTelemetry(
        said.uuid,
        said.utilization_ratio or (0.0 if has("utilization_ratio") else None),
        said.memory_used_bytes or (0 if has("memory_used_bytes") else None),
        said.temperature_celsius or (0 if has("temperature_celsius") else None),
        said.power_mw or (0 if has("power_mw") else None),
        said.energy_mj or (0 if has("energy_mj") else None),
        said.sm_clock_mhz or (0 if has("sm_clock_mhz") else None),
        said.memory_clock_mhz or (0 if has("memory_clock_mhz") else None),
        said.error,
        decode_details(said.details) if has("details") else None,
        min(age_ms, AGE_MS_MAX),
        _window(said.window) if has("window") else None,
    )


def _window(said: types.GpuWindow) -> GpuWindow:
    spreads = {}
    for name in _SPREADS:
        if said.HasField(name):
            spread: types.Spread = getattr(said, name)
            spreads[name] = Spread(spread.min, spread.mean, spread.max)
    return GpuWindow(said.readings, **spreads)


def _encode_window(window: GpuWindow) -> types.GpuWindow:
    spreads = {name: getattr(window, name) for name in _SPREADS}
    return types.GpuWindow(
        readings=window.readings,
        **{name: types.Spread(**asdict(one)) for name, one in spreads.items() if one is not None},
    )


def _duration(span_ms: int) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(span_ms)
    return duration


def decode_details(said: types.GpuDetails) -> model.GpuDetails:
    return model.GpuDetails(
        **{name: getattr(said, name) if said.HasField(name) else None for name in _DETAILS}
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
    read = gpu.telemetry
    if read is not None:
        message.telemetry.CopyFrom(
            types.GpuTelemetry(
                uuid=read.uuid,
                **{name: getattr(read, name) for name in _FIGURES},
                error=read.error,
                details=None if read.details is None else types.GpuDetails(**asdict(read.details)),
                age=_duration(read.age_ms),
                window=None if read.window is None else _encode_window(read.window),
            )
        )
    return message
