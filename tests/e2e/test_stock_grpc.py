"""A stock gRPC client, which has none of our generated code, finds out what there is and calls it:
health checking, server reflection, and dynamic calls from nothing but reflection.
"""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from protos.baton.v1 import jobs_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-stock-grpc")]

NOUNS = ("Job", "Node", "Agent", "Checkpoint", "Cost", "Demand", "Capacity")
SERVICES = {f"baton.v1.{noun}Service" for noun in NOUNS}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator and one agent."""
    with Cluster(tmp_path_factory.mktemp("stock") / "cluster") as made:
        made.start_coordinator()
        made.start_agent("n1", h100(1))
        made.wait_for_nodes("n1")
        yield made


class StockClient:
    """Knows a channel, and what reflection tells over it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = descriptor_pool.DescriptorPool(self._database)

    def services(self) -> set[str]:
        return set(self._database.get_services())

    def methods(self, service: str) -> list[str]:
        return [each.name for each in self._pool.FindServiceByName(service).methods]

    def call(self, service: str, method: str, **fields: Any) -> Any:
        """One call with these fields; where the answer is a stream, it is a list."""
        described = self._pool.FindServiceByName(service).FindMethodByName(method)
        request = message_factory.GetMessageClass(described.input_type)(**fields)
        ways: dict[tuple[bool, bool], Any] = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, False): self._channel.stream_unary,
            (True, True): self._channel.stream_stream,
        }
        invoke = ways[described.client_streaming, described.server_streaming](
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        answer = invoke(
            iter([request]) if described.client_streaming else request, timeout=work.DEADLINE_S
        )
        return list(answer) if described.server_streaming else answer


def is_serving(channel: grpc.Channel, service: str) -> bool:
    """What `grpc_health_probe` asks."""
    check: Any = health_pb2_grpc.HealthStub(channel)
    answer = check.Check(health_pb2.HealthCheckRequest(service=service))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize("service", ["", *sorted(SERVICES)])
def test_health_check_says_serving(fleet: Cluster, service: str) -> None:
    assert is_serving(fleet.channel, service)


def test_reflection_lists_every_service(fleet: Cluster) -> None:
    assert StockClient(fleet.channel).services() >= SERVICES


def test_reflection_alone_is_enough_to_list_and_submit(fleet: Cluster) -> None:
    client = StockClient(fleet.channel)
    nodes = client.call("baton.v1.NodeService", "ListNodes").nodes
    assert [node.id for node in nodes] == ["n1"]
    spec = {"command": ["echo", "from afar"], "gpus": 1}
    request = {"request_id": "stock", "spec": spec}
    job_id = client.call("baton.v1.JobService", "Submit", **request).job_id
    assert client.call("baton.v1.JobService", "Submit", **request).job_id == job_id
    work.wait_succeeded(fleet, job_id)
    job = client.call("baton.v1.JobService", "GetJob", job_id=job_id).job
    assert job.attempts[0].exit_code == 0
    assert work.output(fleet, job_id) == "from afar\n"


def refusals(client: StockClient, services: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Every method that there is, called with a message that says nothing: the status and the
    sentence of those that refuse."""
    found = {}
    for service in sorted(services):
        for method in client.methods(service):
            try:
                client.call(service, method)
            except grpc.RpcError as error:
                found[f"{service}/{method}"] = (error.code().name, str(error.details()))
    return found


def test_everything_can_be_called(fleet: Cluster) -> None:
    """Each method answers, or refuses in words of ours: none is missing, hangs or breaks."""
    asked = refusals(StockClient(fleet.channel), SERVICES)
    with grpc.insecure_channel(work.node(fleet, "n1").peer_address) as channel:
        asked |= refusals(StockClient(channel), ["baton.v1.PeerService"])
    assert len(asked) > len(NOUNS)
    ours = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
    assert {name: said for name, said in asked.items() if said[0] not in ours or not said[1]} == {}


def test_a_deadline_is_counted_by_the_coordinators_clock(fleet: Cluster) -> None:
    client = StockClient(fleet.channel)
    spec = {"command": ["true"], "gpus": 1, "hold": True}
    hour = {"seconds": 3600}
    job_id = client.call("baton.v1.JobService", "Submit", spec=spec, deadline_in=hour).job_id
    job = client.call("baton.v1.JobService", "GetJob", job_id=job_id).job
    _, call = fleet.jobs.GetJob.with_call(jobs_pb2.GetJobRequest(job_id=job_id))
    unix_ms = int(dict(call.trailing_metadata())["baton-unix-ms"])
    assert unix_ms >= job.submit_time.ToMilliseconds()
    waits = job.spec.deadline.ToDatetime() - job.submit_time.ToDatetime()
    assert waits == timedelta(hours=1)
    for wrong in ({"seconds": -1}, {"seconds": 10**10}, {"nanos": 5}):
        with pytest.raises(grpc.RpcError, match=r"between 1 ms and 30 years|not be negative"):
            client.call("baton.v1.JobService", "Submit", spec=spec, deadline_in=wrong)


def test_demand_is_sampled_from_the_start(fleet: Cluster) -> None:
    told = StockClient(fleet.channel).call("baton.v1.DemandService", "GetDemand", period_minutes=1)
    assert told.period_minutes == 1
    assert told.begin_time.seconds % 60 == 0
    assert told.gpus[0] == 0.0


def test_agent_is_checked_and_listed_too(fleet: Cluster) -> None:
    with grpc.insecure_channel(work.node(fleet, "n1").peer_address) as channel:
        assert is_serving(channel, "baton.v1.PeerService")
        assert "baton.v1.PeerService" in StockClient(channel).services()


def test_whoever_is_on_another_machine_reaches_nothing(fleet: Cluster) -> None:
    """Each port that a process of either program has opened, whatever for."""
    heard = {}
    for name in ("coordinator", "n1"):
        program = psutil.Process(fleet.pid(name))
        for process in (program, *program.children(recursive=True)):
            ports = [port for port in process.net_connections("inet") if port.status == "LISTEN"]
            heard.update(
                {(name, port.laddr.port): port.laddr.ip.removeprefix("::ffff:") for port in ports}
            )
    assert {name for name, _ in heard} == {"coordinator", "n1"}
    assert set(heard.values()) == {"127.0.0.1"}


def test_refusal_has_the_status_and_the_sentence(fleet: Cluster) -> None:
    client = StockClient(fleet.channel)
    spec = {"command": ["true"], "memory_bytes": -1}
    with pytest.raises(grpc.RpcError) as raised:
        client.call("baton.v1.JobService", "Submit", request_id="bad", spec=spec)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "must not be negative" in str(raised.value.details())
