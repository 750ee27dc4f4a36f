"""Demand over gRPC: what the coordinator has seen, as a forecast reads it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Self

from coordinator.cli.client import Client
from coordinator.cli.decoding import time_of
from protos.baton.v1 import demand_pb2 as pb
from protos.baton.v1 import demand_pb2_grpc, types_pb2

if TYPE_CHECKING:
    from coordinator.forecast.foretold import Foretold
    from coordinator.forecast.survival import Holds


@dataclass(frozen=True, slots=True)
class Held:
    """Of the GPUs that are held now, those that still are in so many hours."""

    ahead_h: int
    certain_gpus: float
    expected_gpus: float


@dataclass(frozen=True, slots=True)
class Told:
    """`gpus` are NaN where nobody looked; `begin` is `None` where nothing was ever sampled, `holds`
    and `foretold` where it was not asked or is not known, as by an older coordinator."""

    begin: datetime | None
    period_min: int
    gpus: tuple[float, ...]
    gpu_type: str
    held_gpus: float
    held: tuple[Held, ...]
    holds: "Holds | None"
    foretold: "Foretold | None"


class DemandClient(Client):
    """Speaks to one coordinator about demand. A context manager."""

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._channel is not None
        self._demand = demand_pb2_grpc.DemandServiceStub(self._channel)
        return self

    def demand(
        self,
        gpu_type: str,
        project: str,
        job_class: str,
        period_min: int,
        *,
        ahead_h: Sequence[int] = (),
        with_jobs: bool = False,
    ) -> Told:
        """All that is kept of it in this resolution; what is empty is summed over. `with_jobs`:
        also who held GPUs, and what was known of their ends."""
        word = f"JOB_CLASS_{(job_class or 'unspecified').upper()}"
        request = pb.GetDemandRequest(
            gpu_type=gpu_type,
            project=project,
            job_class=types_pb2.JobClass.Value(word),
            period_minutes=period_min,
            ahead_minutes=[60 * hours for hours in ahead_h],
            with_holds=with_jobs,
            with_still_wanted=with_jobs,
        )
        answer = self._call(self._demand.GetDemand, request)
        begin = time_of(answer, "begin_time")
        held = tuple(
            Held(one.ahead_minutes // 60, one.certain_gpus, one.expected_gpus)
            for one in answer.held_ahead
        )
        return Told(
            begin,
            answer.period_minutes,
            tuple(answer.gpus),
            answer.gpu_type,
            answer.held_gpus,
            held,
            _holds(answer.holds) if answer.HasField("holds") else None,
            _foretold(answer.still_wanted) if answer.HasField("still_wanted") else None,
        )


def _foretold(told: pb.StillWanted) -> "Foretold":
    import numpy as np

    from coordinator.forecast.foretold import Foretold

    ahead_h = np.array(told.ahead_minutes) / 60
    return Foretold(
        np.array(told.minutes), ahead_h, np.array(told.gpus).reshape(len(told.minutes), -1)
    )


def _holds(told: pb.Holds) -> "Holds":
    import numpy as np

    from coordinator.forecast.survival import Holds

    end_h = np.array(told.end_minutes) / 60
    return Holds(
        np.array(told.gpus),
        np.array(told.begin_minutes) / 60,
        np.where(np.isnan(end_h), math.inf, end_h),
        told.since_minutes / 60 if told.HasField("since_minutes") else -math.inf,
    )
