"""Costs over gRPC, as values: the same numbers as the coordinator's, and unknown where it says so.

Problem: a price that nobody has said is not one of 0, and a bill may be read by a program years
later. So the document has a field for everything, null where it is not known.
"""

from datetime import datetime, timedelta
from typing import NamedTuple, Self

import msgspec

from coordinator.cli.client import Client
from coordinator.cli.decoding import decode, time_of
from protos.baton.v1 import costs_pb2 as pb
from protos.baton.v1 import costs_pb2_grpc

MILLION = 1e6
GROUPINGS = {
    "project": pb.COST_GROUPING_PROJECT,
    "job": pb.COST_GROUPING_JOB,
    "gpu-type": pb.COST_GROUPING_GPU_TYPE,
}


class Money(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars. `usd_per_million_tokens` is null where no trainer said how many a step has."""

    gpu_hours: float
    usd: float
    owned_usd: float
    lease_usd: float
    burst_usd: float
    energy_usd: float
    energy_kwh: float
    unpriced_gpu_hours: float
    tokens: float | None
    usd_per_million_tokens: float | None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """`key` is a project, the id of a job, or a type of GPU; `name` is a job's."""

    key: str
    name: str
    money: Money


class Day(msgspec.Struct, frozen=True, kw_only=True):
    begin_time: datetime | None
    money: Money
    idle_lease_usd: float


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs that were held, by the hour; `wanted_gpus` with the time that was waited for them.
    `past_gpus` was wanted, by samples, before all attempts are kept; null where nobody knows."""

    gpu_type: str
    begin_time: datetime | None
    gpus: list[float]
    lease_usd: float | None
    burst_usd: float | None
    wanted_gpus: list[float]
    flexible_ratio: float
    flexible_hours: int
    past_gpus: list[float]


class Lot(msgspec.Struct, frozen=True, kw_only=True):
    gpus: int
    end_time: datetime | None


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of a type at present: own GPUs, and leases that run."""

    gpu_type: str
    owned_gpus: int
    lots: list[Lot]


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """What the same GPUs had cost by a rule that has a name; energy is not in it."""

    name: str
    usd: float
    saved_usd: float


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Of the span that was asked for. `usd` counts leases that idled. `baselines` is null where
    they were not asked for, and `baselines_why` says why there are none; of always-on peak no more
    than `limit_ratio` could be saved."""

    begin_time: datetime
    end_time: datetime
    usd: float
    total: Money
    idle_lease_usd: float
    lines: list[Line]
    days: list[Day]
    uses: list[Use]
    kept_since_time: datetime | None
    prices_source: str
    energy_source: str
    fleets: list[Fleet]
    baselines: list[Baseline] | None = None
    baselines_why: str = ""
    limit_ratio: float | None = None


class Span(NamedTuple):
    """From `begin`, or for `last`, until `end`, or until now: which is the coordinator's."""

    begin: datetime | None
    end: datetime | None
    last: timedelta = timedelta(0)


class CostClient(Client):
    """Speaks to one coordinator about money, and about jobs. A context manager."""

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._channel is not None
        self._costs = costs_pb2_grpc.CostServiceStub(self._channel)
        return self

    def costs(self, span: Span, by: str, project: str) -> Costs:
        """The bill of a span; `by` is one of `GROUPINGS`."""
        request = pb.GetCostsRequest(grouping=GROUPINGS[by], project=project)
        until = self.now() if span.end is None else span.end
        begin = until - span.last if span.begin is None else span.begin
        request.begin_time.FromDatetime(begin)
        if span.end is not None:
            request.end_time.FromDatetime(span.end)
        if span.begin is None:
            request.last.FromTimedelta(span.last)
        answer = self._call(self._costs.GetCosts, request)
        return _costs(
            answer,
            time_of(answer, "begin_time") or begin,
            time_of(answer, "end_time") or (self.now() if span.end is None else span.end),
        )


def _costs(answer: pb.GetCostsResponse, begin: datetime, end: datetime) -> Costs:
    total = _money(answer.total)
    return decode(
        answer,
        Costs,
        begin_time=begin,
        end_time=end,
        usd=total.usd + answer.idle_lease_usd,
        total=total,
        lines=[decode(line, Line, money=_money(line.money)) for line in answer.lines],
        days=[decode(day, Day, money=_money(day.money)) for day in answer.days],
        baselines=None,
        baselines_why="",
        limit_ratio=None,
    )


def _money(money: pb.Money) -> Money:
    return decode(
        money,
        Money,
        usd=money.owned_usd + money.lease_usd + money.burst_usd + money.energy_usd,
        tokens=money.tokens or None,
        usd_per_million_tokens=money.token_usd / money.tokens * MILLION if money.tokens else None,
    )
