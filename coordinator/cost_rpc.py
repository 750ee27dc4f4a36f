"""`CostService`: what work has cost, asked of the core and translated.

Problem: an answer holds what somebody may be billed by, so what nobody knows must arrive as not
known: a price that is `None` is absent in the message, and so is the oldest attempt where there is
none.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from coordinator.core import messages as m
from coordinator.core.bills import MS_PER_DAY
from coordinator.core.cost_requests import (
    SPAN_DAYS_MAX,
    CostDay,
    CostPage,
    GetCosts,
    Grouping,
    HourlyUse,
    Money,
    TypeFleet,
)
from coordinator.wire_time import decode_time, encode_time
from protos.baton.v1 import costs_pb2 as pb
from protos.baton.v1 import costs_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]
Ask = Callable[[Context, m.RequestBody], Awaitable[m.Answer]]

# The end of a span that goes on: what is later than now ends now.
UNIX_MS_MAX: Final = 253_402_300_799_000  # the last second of the year 9999, a Timestamp's largest

_GROUPINGS: Final = {
    pb.COST_GROUPING_UNSPECIFIED: Grouping.PROJECT,
    pb.COST_GROUPING_PROJECT: Grouping.PROJECT,
    pb.COST_GROUPING_JOB: Grouping.JOB,
    pb.COST_GROUPING_GPU_TYPE: Grouping.GPU_TYPE,
}


class CostService(costs_pb2_grpc.CostServiceServicer):
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def GetCosts(self, request: pb.GetCostsRequest, context: Context) -> pb.GetCostsResponse:
        body = decode(request)
        if isinstance(body, str):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, body)
            raise AssertionError("abort returned")
        answer = await self._ask(context, body)
        if not isinstance(answer, CostPage):
            raise TypeError(f"expected costs, got {type(answer).__name__}")
        return encode(answer)


def add_cost_service(server: grpc.aio.Server, ask: Ask) -> str:
    """Serve it; its full name."""
    costs_pb2_grpc.add_CostServiceServicer_to_server(CostService(ask), server)
    return pb.DESCRIPTOR.services_by_name["CostService"].full_name


def decode(request: pb.GetCostsRequest) -> GetCosts | str:
    """Or the sentence that says why it cannot be asked."""
    by = _GROUPINGS.get(request.grouping)
    if by is None:
        return f"{request.grouping} is no grouping that this coordinator knows"
    try:
        begin = decode_time(request.begin_time)
        end = decode_time(request.end_time) if request.HasField("end_time") else UNIX_MS_MAX
    except ValueError as error:
        return str(error)
    last_ms = request.last.seconds * 1_000 + request.last.nanos // 1_000_000
    if request.HasField("last") and not 1 <= last_ms <= SPAN_DAYS_MAX * MS_PER_DAY:
        return f"last is {last_ms} ms; it must be between 1 ms and {SPAN_DAYS_MAX} days"
    return GetCosts(begin, end, by, request.project, last_ms)


def encode(page: CostPage) -> pb.GetCostsResponse:
    kept = page.kept_since_unix_ms
    return pb.GetCostsResponse(
        lines=[
            pb.CostLine(key=line.key, name=line.name, money=_money(line.money))
            for line in page.lines
        ],
        total=_money(page.total),
        idle_lease_usd=page.idle_lease_usd,
        days=[_day(day) for day in page.days],
        uses=[_use(use) for use in page.uses],
        kept_since_time=None if kept is None else encode_time(kept),
        prices_source=page.prices_source,
        energy_source=page.energy_source,
        fleets=[_fleet(fleet) for fleet in page.fleets],
        begin_time=encode_time(page.begin_unix_ms),
        end_time=encode_time(page.end_unix_ms),
    )


def _money(money: Money) -> pb.Money:
    return pb.Money(**{name: getattr(money, name) for name in Money.__slots__})


def _day(day: CostDay) -> pb.CostDay:
    return pb.CostDay(
        begin_time=encode_time(day.begin_unix_ms),
        money=_money(day.money),
        idle_lease_usd=day.idle_lease_usd,
    )


def _use(use: HourlyUse) -> pb.HourlyUse:
    return pb.HourlyUse(
        gpu_type=use.gpu_type,
        begin_time=encode_time(use.begin_unix_ms),
        gpus=use.gpus,
        lease_usd=use.lease_usd,
        burst_usd=use.burst_usd,
        wanted_gpus=use.wanted_gpus,
        flexible_ratio=use.flexible_ratio,
        flexible_hours=use.flexible_hours,
        past_gpus=use.past_gpus,
    )


def _fleet(fleet: TypeFleet) -> pb.TypeFleet:
    lots = [pb.LeasedLot(gpus=gpus, end_time=encode_time(ends_ms)) for gpus, ends_ms in fleet.lots]
    return pb.TypeFleet(gpu_type=fleet.gpu_type, owned_gpus=fleet.owned_gpus, lots=lots)
