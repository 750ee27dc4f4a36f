"""A coordinator whose answers are scripted: a real gRPC server on loopback that keeps what it was
asked.

The CLI is tested through its real client and a real socket, because what matters most in it (who is
reached, what a lost answer means, what stands on stderr) happens there. `answers` maps a method's
name to its script: a list of steps, each used once, the last one for ever. A step is a response, a
list of responses (a stream), a `Refusal`, or a function of the request that returns one of these.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.message import Message

from protos.baton.v1 import (
    capacity_pb2_grpc,
    checkpoints_pb2_grpc,
    costs_pb2_grpc,
    demand_pb2_grpc,
    jobs_pb2_grpc,
    nodes_pb2_grpc,
)

METHODS = (
    *("Submit", "GetJob", "ListJobs", "CancelJob", "HoldJob", "ReleaseJob", "RequeueJob"),
    *(
        "ExplainJob",
        "FitJob",
        "ListProjects",
        "ListJobEvents",
        "ListNodes",
        "CordonNode",
        "DrainNode",
        "UncordonNode",
    ),
    "SetTelemetryRate",
    "ForgetNode",
)
CAPACITY_METHODS = ("GetPlan", "ListDecisions", "GetDecision", "ApproveDecision")
CHECKPOINT_METHODS = ("ListCheckpoints", "PinCheckpoint", "UnpinCheckpoint")


@dataclass(frozen=True)
class Refusal:
    """A step that answers with an error."""

    code: grpc.StatusCode
    sentence: str


@dataclass
class FakeCoordinator:
    """Use as a context manager; `address` is HOST:PORT while it is open."""

    answers: dict[str, list[Any]] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)
    credentials: grpc.ServerCredentials | None = None
    unix_ms: int | None = None  # what it takes the time to be; none: it is older and does not say
    address: str = ""
    _server: grpc.Server | None = None

    def __enter__(self) -> Self:
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
        jobs: Any = type("Jobs", (jobs_pb2_grpc.JobServiceServicer,), {})()
        nodes: Any = type("Nodes", (nodes_pb2_grpc.NodeServiceServicer,), {})()
        for method in METHODS:
            servicer = nodes if hasattr(nodes, method) else jobs
            setattr(servicer, method, self._unary(method))
        jobs.StreamLogs = self._stream("StreamLogs")
        checkpoints: Any = type(
            "Checkpoints", (checkpoints_pb2_grpc.CheckpointServiceServicer,), {}
        )()
        for method in CHECKPOINT_METHODS:
            setattr(checkpoints, method, self._unary(method))
        checkpoints.ReadCheckpoint = self._stream("ReadCheckpoint")
        demand: Any = type("Demand", (demand_pb2_grpc.DemandServiceServicer,), {})()
        demand.GetDemand = self._unary("GetDemand")
        capacity: Any = type("Capacity", (capacity_pb2_grpc.CapacityServiceServicer,), {})()
        for method in CAPACITY_METHODS:
            setattr(capacity, method, self._unary(method))
        capacity_pb2_grpc.add_CapacityServiceServicer_to_server(capacity, server)
        demand_pb2_grpc.add_DemandServiceServicer_to_server(demand, server)
        checkpoints_pb2_grpc.add_CheckpointServiceServicer_to_server(checkpoints, server)
        costs: Any = type("Costs", (costs_pb2_grpc.CostServiceServicer,), {})()
        costs.GetCosts = self._unary("GetCosts")
        costs_pb2_grpc.add_CostServiceServicer_to_server(costs, server)
        jobs_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)
        nodes_pb2_grpc.add_NodeServiceServicer_to_server(nodes, server)
        if self.credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", self.credentials)
        self.address = f"127.0.0.1:{port}"
        server.start()
        self._server = server
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and break every call."""
        assert self._server is not None
        self._server.stop(grace=None).wait()

    def _next(self, method: str, request: Message) -> Any:
        self.requests.append(request)
        script = self.answers[method]
        step = script.pop(0) if len(script) > 1 else script[0]
        return step(request) if callable(step) else step

    def _unary(self, method: str) -> Callable[[Message, grpc.ServicerContext], Message]:
        def answer(request: Message, context: grpc.ServicerContext) -> Message:
            if self.unix_ms is not None:
                context.set_trailing_metadata((("baton-unix-ms", str(self.unix_ms)),))
            step = self._next(method, request)
            if isinstance(step, Refusal):
                _refuse(context, step)
            assert isinstance(step, Message)
            return step

        return answer

    def _stream(self, method: str) -> Callable[[Message, grpc.ServicerContext], Iterator[Message]]:
        def answer(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
            step = self._next(method, request)
            for part in step if isinstance(step, list) else [step]:
                if isinstance(part, Refusal):
                    _refuse(context, part)
                # A function among the parts stands for "wait here".
                yield part() if callable(part) else part

        return answer


def _refuse(context: grpc.ServicerContext, refusal: Refusal) -> NoReturn:
    context.abort(refusal.code, refusal.sentence)
    raise AssertionError("abort always raises")
