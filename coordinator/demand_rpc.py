"""The service that says how many GPUs were wanted. Nothing is decided here."""

from collections.abc import Awaitable, Callable

import grpc

from coordinator import wire_demand
from coordinator.core import messages as m
from coordinator.core.demand_messages import DemandSeries
from protos.baton.v1 import demand_pb2, demand_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]
Ask = Callable[[Context, m.RequestBody], Awaitable[m.Answer]]


class DemandService(demand_pb2_grpc.DemandServiceServicer):
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def GetDemand(
        self, request: demand_pb2.GetDemandRequest, context: Context
    ) -> demand_pb2.GetDemandResponse:
        try:
            asked = wire_demand.decode(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        answer = await self._ask(context, asked)
        if not isinstance(answer, DemandSeries):
            raise TypeError(f"expected demand, got {type(answer).__name__}")
        return wire_demand.encode(answer)


def add_demand_service(server: grpc.aio.Server, ask: Ask) -> str:
    """Returns the service's full name."""
    demand_pb2_grpc.add_DemandServiceServicer_to_server(DemandService(ask), server)
    return demand_pb2.DESCRIPTOR.services_by_name["DemandService"].full_name
