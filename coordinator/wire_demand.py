"""Demand on the wire.

Problem: a minute in which nobody looked is not one in which nobody wanted anything, and a repeated
number cannot be absent. So it is NaN there, and nothing else is.
"""

import math

from coordinator.core.demand_history import STILL_MIN, Still
from coordinator.core.demand_messages import DemandSeries, GetDemand, Holds
from coordinator.core.model import JobClass
from protos.baton.v1 import demand_pb2 as pb
from protos.baton.v1 import types_pb2 as types

_CLASSES = {
    types.JOB_CLASS_UNSPECIFIED: "",
    types.JOB_CLASS_GUARANTEED: JobClass.GUARANTEED.value,
    types.JOB_CLASS_STANDARD: JobClass.STANDARD.value,
    types.JOB_CLASS_SPARE: JobClass.SPARE.value,
}


def decode(request: pb.GetDemandRequest) -> GetDemand:
    """Raises `ValueError` with a sentence."""
    if request.job_class not in _CLASSES:
        raise ValueError(f"job_class {request.job_class} is not known to this coordinator")
    job_class = _CLASSES[request.job_class]
    return GetDemand(
        request.gpu_type,
        request.project,
        job_class,
        request.period_minutes,
        request.steps,
        tuple(request.ahead_minutes),
        request.with_holds,
        request.with_still_wanted,
    )


def encode(series: DemandSeries) -> pb.GetDemandResponse:
    gpus = [math.nan if value is None else value for value in series.gpus]
    message = pb.GetDemandResponse(
        period_minutes=series.period_min,
        gpus=gpus,
        gpu_type=series.gpu_type,
        held_gpus=series.held_gpus,
        held_ahead=[
            pb.HeldAhead(
                ahead_minutes=held.ahead_min,
                certain_gpus=held.certain_gpus,
                expected_gpus=held.expected_gpus,
            )
            for held in series.held_ahead
        ],
        holds=None if series.holds is None else _holds(series.holds),
        still_wanted=_still(series.still) if series.still else None,
    )
    if gpus:
        message.begin_time.FromMilliseconds(series.begin_unix_ms)
    return message


def _still(known: tuple[tuple[float, Still], ...]) -> pb.StillWanted:
    return pb.StillWanted(
        minutes=[minute for minute, _ in known],
        said_gpus=[still.said_gpus for _, still in known],
        ahead_minutes=STILL_MIN,
        gpus=[gpus for _, still in known for gpus in still.gpus],
    )


def _holds(holds: Holds) -> pb.Holds:
    return pb.Holds(
        gpus=[hold.gpus for hold in holds.each],
        begin_minutes=[hold.begin_min for hold in holds.each],
        end_minutes=[math.nan if hold.end_min is None else hold.end_min for hold in holds.each],
        since_minutes=holds.since_min,
    )
