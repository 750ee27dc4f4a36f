"""The plan of the fleet's size over gRPC, as values that print and serialise."""

from collections.abc import Sequence
from datetime import datetime
from typing import Self

import msgspec

from coordinator.cli.client import Client
from coordinator.cli.decoding import decode, time_of
from protos.baton.v1 import capacity_pb2 as pb
from protos.baton.v1 import capacity_pb2_grpc


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """What could have been done; what it would have cost is `None` until that is known."""

    name: str
    gpus: int
    expected_usd: float
    realised_usd: float | None
    fixed_usd: float


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, or is proposed."""

    verb: str
    nodes: list[str]
    state: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision with all that it went by. `regret_usd` and `mean_gpus` are what came of it."""

    id: str
    time: datetime | None
    gpu_type: str
    mode: str | None
    sentence: str
    level: float
    running_gpus: int
    queued_gpus: int
    guaranteed_gpus: int
    there_gpus: int
    need_gpus: int
    keep_gpus: int
    soon_gpus: list[float]
    later_gpus: list[float]
    coverage_ratio: float | None
    alternatives: list[Alternative]
    rail: str
    rail_reason: str
    deeds: list[Deed]
    holds_s: float
    mean_gpus: float | None
    regret_usd: float | None
    soon_s: float
    frees_s: float | None
    rent_usd: float | None
    patient_gpus: int
    ending_gpus: int
    late_gpus: int
    late_jobs: list[int]


class TypePlan(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU type; all counts in GPUs."""

    gpu_type: str
    on_gpus: int
    idle_gpus: int
    leaving_gpus: int
    starting_gpus: int
    off_gpus: int
    failed_gpus: int
    closed_gpus: int
    running_gpus: int
    queued_gpus: int
    guaranteed_gpus: int
    need_gpus: int
    keep_gpus: int
    wanted_gpus: int
    boot_s: float
    soon_gpus: list[float]
    later_gpus: list[float]
    coverage_ratio: float | None
    stale: bool
    sentence: str
    rented_gpus: int
    need_reason: str
    decided_time: datetime | None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`made`: when; `None` where none has been yet."""

    mode: str | None
    why: str
    acts: bool
    level: float
    made: datetime | None
    types: list[TypePlan]
    proposed: list[Decision]


class CapacityClient(Client):
    """Speaks to one coordinator about the fleet's size. A context manager."""

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._channel is not None
        self._capacity = capacity_pb2_grpc.CapacityServiceStub(self._channel)
        return self

    def plan(self) -> Plan:
        answer = self._call(self._capacity.GetPlan, pb.GetPlanRequest())
        return decode(
            answer,
            Plan,
            level=_ratio(answer.level),
            made=time_of(answer, "made_time"),
            proposed=_decisions(answer.proposed),
        )

    def decisions(self, count: int, gpu_type: str) -> list[Decision]:
        request = pb.ListDecisionsRequest(count=count, gpu_type=gpu_type)
        return _decisions(self._call(self._capacity.ListDecisions, request).decisions)

    def decision(self, name: str) -> Decision:
        request = pb.GetDecisionRequest(id=name)
        return _decision(self._call(self._capacity.GetDecision, request).decision)

    def approve(self, name: str) -> Decision:
        request = pb.ApproveDecisionRequest(id=name)
        return _decision(self._call(self._capacity.ApproveDecision, request).decision)


def _ratio(computed: float) -> float:
    """Without the last digits, which a division has left."""
    return round(computed, 9)


def _decisions(said: Sequence[pb.ScaleDecision]) -> list[Decision]:
    return [_decision(one) for one in said]


def _decision(said: pb.ScaleDecision) -> Decision:
    seen = said.HasField("hindsight")
    return decode(
        said,
        Decision,
        level=_ratio(said.level),
        mean_gpus=said.hindsight.mean_gpus if seen else None,
        regret_usd=said.hindsight.regret_usd if seen else None,
    )
