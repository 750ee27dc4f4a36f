"""How GPUs are, on the wire: agents' verdicts from protobuf, and to those who list nodes.

Problem: a verdict that this coordinator does not know, of a newer agent, must not be taken for
well: it is unknown. What is longer than the contract allows is cut, not refused, so that no GPU is
believed healthy because its trouble was too long to tell.
"""

from collections.abc import Iterable

from coordinator.core.model import GpuHealth, GpuVerdict, GpuView, XidRecord
from coordinator.wire_time import encode_time
from protos.baton.v1 import types_pb2 as types

GPUS_MAX = 64
XIDS_MAX = 32
REASON_CHARACTERS_MAX = 1_024
TEXT_CHARACTERS_MAX = 256

_VERDICTS = {
    types.GpuVerdict.Value(f"GPU_VERDICT_{verdict.name}"): verdict for verdict in GpuVerdict
}


def decode_health(gpus: Iterable[types.GpuHealth]) -> tuple[GpuHealth, ...]:
    """Raises `ValueError` with a sentence."""
    return tuple(_decode(said) for said in list(gpus)[:GPUS_MAX])


def _decode(said: types.GpuHealth) -> GpuHealth:
    if not said.uuid:
        raise ValueError("a verdict on a GPU without a UUID")
    records = tuple(
        XidRecord(
            record.code,
            record.count,
            record.first_time.ToMilliseconds(),
            record.last_time.ToMilliseconds(),
            record.text[:TEXT_CHARACTERS_MAX],
        )
        for record in said.xids[:XIDS_MAX]
    )
    verdict = _VERDICTS.get(said.verdict, GpuVerdict.UNKNOWN)
    reason = said.reason[:REASON_CHARACTERS_MAX]
    return GpuHealth(said.uuid, verdict, reason, said.action[:REASON_CHARACTERS_MAX], records)


def add_health(message: types.Gpu, view: GpuView) -> None:
    """What a list of nodes says of it."""
    message.cordon = view.cordon
    message.held_back = view.held_back
    said = view.health
    if said is None:
        return
    message.health.CopyFrom(
        types.GpuHealth(
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
    )
