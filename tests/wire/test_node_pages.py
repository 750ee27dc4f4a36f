"""All nodes of a large fleet are told in messages that any client takes.

Safety: no page is larger than the 4 MiB that gRPC's clients take by default, and all pages together
have each node once, whatever comes and goes between two of them. A client of before pages gets what
it got.
"""

import pytest

from coordinator import wire_nodes
from coordinator.core.coordinator import Coordinator
from coordinator.core.messages import ListNodes, NodePage, Refusal, Reply, Request
from coordinator.core.model import GpuFacts, HostFacts, Node, Snapshot
from coordinator.core.state import Instant, Options
from protos.baton.v1 import nodes_pb2, types_pb2

NODES = 1_200
MESSAGE_BYTES_MAX = 4 << 20
NOW = Instant(1, 1_700_000_000_000)
# As large as what a GPU with all its figures and their spread in a report has to say.
FIGURES = types_pb2.GpuTelemetry(uuid="G" * 40, error="x" * 480).SerializeToString()


def node(number: int) -> Node:
    name = f"node-{number:05d}"
    facts = (
        GpuFacts(f"GPU-{number:08d}-0000-0000-0000-{each:012d}", "NVIDIA H100 80GB HBM3", 80 << 30)
        for each in range(8)
    )
    return Node(name, "j", "10.0.0.1:7071", HostFacts(hostname=name), tuple(facts))


def coordinator(count: int, figures: bytes = b"") -> Coordinator:
    core = Coordinator(Options())
    core.load(Snapshot(nodes=tuple(node(number) for number in range(count))), 0)
    for live in core.state.nodes.values():
        for gpu in live.gpus.values():
            gpu.figures = figures
    return core


def ask(core: Coordinator, body: ListNodes) -> NodePage | Refusal:
    (answer,) = (it.answer for it in core.handle(NOW, Request(1, body)) if isinstance(it, Reply))
    assert isinstance(answer, NodePage | Refusal)
    return answer


def page(core: Coordinator, body: ListNodes) -> tuple[list[str], str]:
    answer = ask(core, body)
    assert isinstance(answer, NodePage)
    return [view.node.id for view in answer.nodes], answer.next_after_node


@pytest.mark.parametrize("figures", [b"", FIGURES], ids=["bare", "telling"])
def test_no_page_is_larger_than_any_client_takes(figures: bytes) -> None:
    core = coordinator(NODES, figures)
    found: list[str] = []
    after = ""
    while True:
        answer = ask(core, ListNodes(1_000, after))
        assert isinstance(answer, NodePage)
        message = nodes_pb2.ListNodesResponse(
            nodes=[wire_nodes.encode_node(view) for view in answer.nodes],
            next_after_node=answer.next_after_node,
        )
        assert message.ByteSize() < MESSAGE_BYTES_MAX
        found += [one.id for one in message.nodes]
        after = answer.next_after_node
        if not after:
            break
    assert found == sorted(core.state.nodes)


def test_who_asks_for_no_page_gets_all() -> None:
    core = coordinator(NODES, FIGURES)
    assert page(core, ListNodes()) == (sorted(core.state.nodes), "")


def test_what_comes_and_goes_between_two_pages_moves_nobody() -> None:
    core = coordinator(7)
    ids = sorted(core.state.nodes)
    assert page(core, ListNodes(3)) == (ids[:3], ids[2])
    for gone in (ids[0], ids[2]):  # also the one by which the next page is asked for
        del core.state.nodes[gone]
    assert page(core, ListNodes(3, ids[2])) == (ids[3:6], ids[5])
    assert page(core, ListNodes(1, ids[5])) == (ids[6:], "")
    assert page(core, ListNodes(3, ids[6])) == ([], "")


def test_only_those_that_are_named_are_looked_at() -> None:
    core = coordinator(3)
    ids = sorted(core.state.nodes)
    assert page(core, ListNodes(nodes=(ids[2], "no-such", ids[0]))) == ([ids[0], ids[2]], "")


@pytest.mark.parametrize("size", [-1, 1_001])
def test_a_page_has_a_size(size: int) -> None:
    answer = ask(coordinator(1), ListNodes(size))
    assert isinstance(answer, Refusal)
    assert answer.sentence == f"page_size is {size}; it must be between 1 and 1000, or 0"
