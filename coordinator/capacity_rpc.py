"""The service that tells the plan of the fleet's size, and takes a person's consent. Nothing is
decided here."""

from collections.abc import Awaitable, Callable

import grpc

from coordinator import wire_capacity
from coordinator.core import messages as m
from coordinator.core.scale_records import RECORDS_MAX
from coordinator.core.scale_requests import (
    ApproveScaling,
    GetPlan,
    GetScaleRecord,
    ListScaleRecords,
    PlanPage,
    ScalePage,
)
from protos.baton.v1 import capacity_pb2 as pb
from protos.baton.v1 import capacity_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]
Ask = Callable[[Context, m.RequestBody], Awaitable[m.Answer]]


class CapacityService(capacity_pb2_grpc.CapacityServiceServicer):
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def GetPlan(self, request: pb.GetPlanRequest, context: Context) -> pb.GetPlanResponse:
        answer = await self._ask(context, GetPlan())
        if not isinstance(answer, PlanPage):
            raise TypeError(f"expected a plan, got {type(answer).__name__}")
        return wire_capacity.encode_plan(answer)

    async def ListDecisions(
        self, request: pb.ListDecisionsRequest, context: Context
    ) -> pb.ListDecisionsResponse:
        if request.count > RECORDS_MAX:
            sentence = f"count is {request.count}; {RECORDS_MAX} decisions are kept"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentence)
        found = await self._decisions(context, ListScaleRecords(request.count, request.gpu_type))
        return pb.ListDecisionsResponse(decisions=found)

    async def GetDecision(
        self, request: pb.GetDecisionRequest, context: Context
    ) -> pb.GetDecisionResponse:
        number = await self._number(context, request.id)
        (found,) = await self._decisions(context, GetScaleRecord(number))
        return pb.GetDecisionResponse(decision=found)

    async def ApproveDecision(
        self, request: pb.ApproveDecisionRequest, context: Context
    ) -> pb.ApproveDecisionResponse:
        number = await self._number(context, request.id)
        (found,) = await self._decisions(context, ApproveScaling(number))
        return pb.ApproveDecisionResponse(decision=found)

    async def _number(self, context: Context, text: str) -> int:
        try:
            return wire_capacity.decode_id(text)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise AssertionError("abort returned") from error

    async def _decisions(self, context: Context, body: m.RequestBody) -> list[pb.ScaleDecision]:
        answer = await self._ask(context, body)
        if not isinstance(answer, ScalePage):
            raise TypeError(f"expected decisions, got {type(answer).__name__}")
        return [wire_capacity.encode_decision(record) for record in answer.records]


def add_capacity_service(server: grpc.aio.Server, ask: Ask) -> str:
    """Returns the service's full name."""
    capacity_pb2_grpc.add_CapacityServiceServicer_to_server(CapacityService(ask), server)
    return pb.DESCRIPTOR.services_by_name["CapacityService"].full_name
