"""What an agent hears of a gang, and what it says of parts, field by field.

The other side's translator is compared in `test_session_wire.py`; here are the messages themselves,
and a gang that cannot be, which must end the session with a sentence and not start a rank that
waits for ever.
"""

import pytest

from agent import wire
from agent.core import messages as m
from agent.core.values import Gang, HostFacts, ReplicaSource, RestoreCandidate, RestorePart
from protos.baton.v1 import agent_pb2 as pb

PLACE = {
    "rank": 3,
    "world_size": 4,
    "local_rank": 1,
    "local_world_size": 2,
    "node_rank": 1,
    "nodes": ["n1", "n2"],
    "master_host": "n1.example",
    "master_port": 29_500,
    "node_gpu_uuids": ["GPU-a", "GPU-b"],
}


def start(**changed: object) -> pb.SessionResponse:
    gang = pb.Gang(**{**PLACE, **changed})  # type: ignore[arg-type]
    candidate = pb.RestoreCandidate(
        digest="aa",
        step=10,
        sources=[pb.PeerAddress(node="n1", address="n1:1")],
        parts=[
            pb.RestorePart(digest="bb", sources=[pb.PeerAddress(node="n2", address="n2:1")]),
            pb.RestorePart(digest="cc"),
        ],
    )
    order = pb.StartAttempt(attempt="7.2.3", gang=gang, candidates=[candidate])
    return pb.SessionResponse(start_attempt=order)


def test_a_rank_hears_its_place_and_the_parts() -> None:
    heard = wire.decode(start())
    assert isinstance(heard, m.StartAttempt)
    assert heard.attempt == "7.2.3"
    assert heard.gang is not None
    assert not heard.gang.own_parts, "nobody has said that the coordinator knows of that"
    assert heard.gang == Gang(3, 4, 1, 2, 1, ("n1", "n2"), "n1.example", 29_500, ("GPU-a", "GPU-b"))
    parts = (RestorePart("bb", (ReplicaSource("n2", "n2:1"),)), RestorePart("cc", ()))
    assert heard.candidates == (RestoreCandidate("aa", 10, (ReplicaSource("n1", "n1:1"),), parts),)


def test_an_agent_says_that_it_knows_ranks() -> None:
    hello = m.Hello("n1", "j1", "n1:1", HostFacts("", "", 1, 1, "", ""), (), (), ())
    assert pb.CAPABILITY_GANGS in wire.encode(hello).hello.capabilities


def test_a_job_of_one_rank_hears_of_no_gang() -> None:
    heard = wire.decode(pb.SessionResponse(start_attempt=pb.StartAttempt(attempt="7.2")))
    assert isinstance(heard, m.StartAttempt)
    assert heard.gang is None


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": 4},
        {"rank": -1},
        {"world_size": 0},
        {"world_size": 1_025},
        {"local_rank": 2},
        {"local_world_size": 5},
        {"node_rank": 2},
        {"nodes": []},
        {"master_port": 0},
        {"master_port": 65_536},
    ],
)
def test_a_gang_that_cannot_be(changed: dict[str, object]) -> None:
    with pytest.raises(wire.WireError, match="no gang is so"):
        wire.decode(start(**changed))


@pytest.mark.parametrize("attempt", ["7.2.01", "7.2.-1", "7.2.", "7.2.1024", "7.2.1.1", "7..1"])
def test_what_is_no_rank_of_an_attempt(attempt: str) -> None:
    with pytest.raises(wire.WireError, match="is no attempt id"):
        wire.decode(pb.SessionResponse(stop_attempt=pb.StopAttempt(attempt=attempt)))


@pytest.mark.parametrize("attempt", ["7.2", "7.2.0", "7.2.1023"])
def test_what_is_one(attempt: str) -> None:
    heard = wire.decode(pb.SessionResponse(stop_attempt=pb.StopAttempt(attempt=attempt)))
    assert heard == m.StopAttempt(attempt, None, "")


def test_a_proposal_says_of_how_many_parts_it_is_one() -> None:
    body = m.CheckpointProposed("aa", "", 10, 5, ("n1",), 4)
    said = wire.encode(m.AgentEvent(1, 0, "7.2.3", body)).event
    assert (said.attempt, said.checkpoint_proposed.parts) == ("7.2.3", 4)


@pytest.mark.parametrize("traceparent", ["x", "00-4bf92f3577b34da6a3ce929d0e0e4736"])
def test_what_is_no_traceparent_ends_the_session(traceparent: str) -> None:
    order = pb.SessionResponse(
        start_attempt=pb.StartAttempt(attempt="7.2", traceparent=traceparent)
    )
    with pytest.raises(wire.WireError, match="is no traceparent"):
        wire.decode(order)
