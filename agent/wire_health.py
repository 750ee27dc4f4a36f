"""How GPUs are, on the wire: the agent's verdicts as protobuf.

Problem: as in `wire.py`, and apart from it, since nothing of it is about attempts.
"""

from google.protobuf.timestamp_pb2 import Timestamp

from agent.core.health import GpuHealthChanged, GpuVerdict
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
                first_time=_timestamp(record.first_unix_ms),
                last_time=_timestamp(record.last_unix_ms),
                text=record.text,
            )
            for record in said.xids
        ],
    )


def encode_change(change: GpuHealthChanged) -> pb.GpuHealthChanged:
    return pb.GpuHealthChanged(gpus=[encode_health(said) for said in change.gpus])


def _timestamp(unix_ms: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(unix_ms)
    return timestamp
