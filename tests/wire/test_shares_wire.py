"""Jobs that share a GPU, on the wire: the request, who knows of it, and who sees it."""

import pytest

from agent import wire as agent_wire
from agent.core import messages as am
from agent.core.values import HostFacts as AgentHostFacts
from coordinator import wire, wire_nodes
from coordinator.core import messages as m
from coordinator.core.model import (
    GpuFacts,
    GpuView,
    HostFacts,
    JobSpec,
    Node,
    NodeView,
)
from coordinator.core.phases import GpuPhase, NodePhase
from protos.baton.v1 import agent_pb2 as pb
from protos.baton.v1 import types_pb2 as types

SPEC = JobSpec("a", command=("true",), gpus=1, shared_gpu_memory_bytes=8 * 2**30)


def test_a_request_comes_back_as_it_went() -> None:
    sent = types.JobSpec.FromString(wire.encode_spec(SPEC).SerializeToString())
    assert wire.decode_spec(sent) == SPEC


def test_a_job_that_has_its_gpu_alone_is_told_what_it_always_was() -> None:
    told = wire.encode_spec(JobSpec(command=("true",), gpus=1))
    assert "shared_gpu_memory_bytes" not in {field.name for field, _ in told.ListFields()}


def test_an_agent_says_that_it_can_and_hears_of_it() -> None:
    hello = am.Hello("n1", "j1", "n1:1", AgentHostFacts("", "", 1, 1, "", ""), (), (), ())
    assert pb.CAPABILITY_SHARES in agent_wire.encode(hello).hello.capabilities
    order = pb.StartAttempt(attempt="7.2", spec=wire.encode_spec(SPEC))
    heard = agent_wire.decode(pb.SessionResponse(start_attempt=order))
    assert isinstance(heard, am.StartAttempt)
    assert heard.spec.shared_gpu_memory_bytes == 8 * 2**30


@pytest.mark.parametrize(
    ("capabilities", "knows"),
    [([], False), ([pb.CAPABILITY_GANGS], False), ([77, pb.CAPABILITY_SHARES], True)],
)
def test_an_agent_knows_shares_if_it_says_so(capabilities: list[int], knows: bool) -> None:
    said = pb.Hello(node="n1", journal_id="j1")
    said.capabilities.extend(capabilities)  # type: ignore[arg-type]
    heard = wire.decode(
        pb.SessionRequest.FromString(pb.SessionRequest(hello=said).SerializeToString())
    )
    assert isinstance(heard, m.Hello)
    assert heard.shares is knows


def test_a_node_shows_who_shares_its_gpu() -> None:
    facts = GpuFacts("GPU-1", "H100", 80)
    view = GpuView(facts, GpuPhase.HELD, shares=(("1.1", 8), ("2.1", 16)))
    node = Node("n1", "j1", "n1:1", HostFacts(), (facts,))
    shown = wire_nodes.encode_node(NodeView(node, NodePhase.UP, (view,), ("1.1", "2.1"), ""))
    assert [(share.attempt, share.memory_bytes) for share in shown.gpus[0].shares] == [
        ("1.1", 8),
        ("2.1", 16),
    ]
