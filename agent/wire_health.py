"""How GPUs are, on the wire: the agent's verdicts as protobuf, and what it reads less often.

Problem: as in `wire.py`, and apart from it, since nothing of it is about attempts.
"""

from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from agent.core.health import GpuHealthChanged, GpuVerdict
from agent.core.values import GpuSample, GpuWindow, Spread
from agent.core.window import FIGURES
from protos.baton.v1 import agent_pb2 as pb
from protos.baton.v1 import types_pb2 as types


def encode_health(said: GpuVerdict) -> types.GpuHealth:
    return types.GpuHealth(
        uuid=said.uuid,
        verdict=types.GpuVerdict.Value(f"GPU_VERDICT_{said.verdict.name}"),
        reason=said.reason,
        action=said.action,
        xids=[
            types.XidRecord(
                code=record.code,
                count=record.count,
                first_time=encode_time(record.first_unix_ms),
                last_time=encode_time(record.last_unix_ms),
                text=record.text,
            )
            for record in said.xids
        ],
    )


_USAGE: Final = (
    "ecc_volatile_corrected", "ecc_volatile_uncorrected", "ecc_aggregate_corrected",
    "ecc_aggregate_uncorrected",
)  # fmt: skip
_INVENTORY: Final = (
    "remapped_rows_corrected", "remapped_rows_uncorrected", "remapped_rows_pending",
    "remapped_rows_failed", "pcie_width", "pcie_width_max", "nvlinks_up", "nvlinks_down",
    "sm_activity_ratio", "tensor_activity_ratio",
)  # fmt: skip


def encode_details(gpu: GpuSample) -> types.GpuDetails | None:
    """`None`: none of it was read."""
    usage, inventory = gpu.usage, gpu.inventory
    said: dict[str, Any] = {}
    if usage is not None:
        said |= {name: getattr(usage, name) for name in _USAGE}
        said["processes"] = None if usage.processes is None else len(usage.processes)
    if inventory is not None:
        said |= {name: getattr(inventory, name) for name in _INVENTORY}
    known = any(value is not None for value in said.values())
    return types.GpuDetails(**said) if known else None


def encode_window(window: GpuWindow | None) -> types.GpuWindow | None:
    if window is None:
        return None
    spreads = {name: _spread(getattr(window, name)) for name in FIGURES}
    return types.GpuWindow(readings=window.readings, **spreads)


def _spread(spread: Spread | None) -> types.Spread | None:
    return (
        None if spread is None else types.Spread(min=spread.min, mean=spread.mean, max=spread.max)
    )


def encode_change(change: GpuHealthChanged) -> pb.GpuHealthChanged:
    return pb.GpuHealthChanged(gpus=[encode_health(said) for said in change.gpus])


def encode_time(unix_ms: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(unix_ms)
    return timestamp
