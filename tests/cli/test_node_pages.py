"""A fleet that does not fit into one message is listed whole."""

import json

from protos.baton.v1 import nodes_pb2, types_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator


def test_nodes_come_in_pages(baton: Baton, fake: FakeCoordinator) -> None:
    """Of an older coordinator all in one, whatever was asked for."""
    first, second = (types_pb2.Node(id=name) for name in ("n1", "n2"))
    fake.answers["ListNodes"] = [
        nodes_pb2.ListNodesResponse(nodes=[first], next_after_node="n1"),
        nodes_pb2.ListNodesResponse(nodes=[second]),
    ]
    assert [one["id"] for one in json.loads(baton("nodes", "--json").stdout)] == ["n1", "n2"]
    asked = [(it.page_size, it.after_node) for it in fake.requests]
    assert asked == [(1000, ""), (1000, "n1")]
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[first, second])]
    assert [one["id"] for one in json.loads(baton("nodes", "--json").stdout)] == ["n1", "n2"]
