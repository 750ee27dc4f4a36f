"""An agent tells a coordinator that has forgotten a job what it was told to run, whole.

Problem: an agent reads of a request what a node needs. The rest of it (whose quota it counts for,
how often it may fail) would be lost with the coordinator's database.
"""

from dataclasses import replace
from typing import cast

from agent import wire as agent_wire
from agent.core import messages as agent_messages
from agent.core.link import REQUESTS_TOLD_MAX
from coordinator import wire
from coordinator.core import messages as m
from coordinator.core.model import JobClass, JobSpec, TelemetryRate
from protos.baton.v1 import agent_pb2 as pb
from protos.baton.v1 import types_pb2 as types
from tests.core.test_agent_times import RESTORED, Node

SPEC = JobSpec(
    name="n", project="p", job_class=JobClass.SPARE, command=("train", "{index}"),
    environment=(("A", "1"),), gpus=1, gpu_types=("H100",), max_restarts=7, keep_checkpoints=5,
    flexible_ms=1_000, deadline_unix_ms=1_700_000_000_000, run_again_exit_codes=(3,),
)  # fmt: skip
WELCOME = m.Welcome(2, 1_000, 8_000, 0, TelemetryRate.OWN, 5_000, ("1.1", "9.9"))


def over_the_wire(order: m.AgentOrder) -> agent_messages.FromCoordinator:
    said = pb.SessionResponse.FromString(wire.encode(order).SerializeToString())
    return agent_messages.FromCoordinator(agent_wire.decode(said), "1" * 32)


def back(said: agent_messages.Upward) -> m.AgentMessage:
    sent = agent_wire.encode(said).SerializeToString()
    return wire.decode(pb.SessionRequest.FromString(sent))


def test_what_was_ordered_is_told_whole_before_anything_of_it_is_refused() -> None:
    """Also after the agent's restart; and once, since a heartbeat is small."""
    node = Node()
    node.at(1_000, over_the_wire(m.StartAttempt("1.1", SPEC, (), (), None, 0)))
    node.at(1_200, RESTORED)
    node.started(1_300)
    node.begin()
    node.at(2_000, agent_messages.Disconnected("gone"))
    node.at(2_100, agent_messages.Connected(()))
    effects = node.at(2_200, over_the_wire(WELCOME))
    sent = [one.message for one in effects if isinstance(one, agent_messages.Send)]
    beat, event = back(sent[0]), back(sent[1])
    assert isinstance(event, m.AgentEvent)
    assert isinstance(beat, m.Heartbeat)
    assert [one.spec for one in beat.attempts] == [SPEC]
    assert [one.checkpoint for one in beat.attempts] == ["a" * 64]
    effects = node.at(9_000, agent_messages.Tick())
    sent = [one.message for one in effects if isinstance(one, agent_messages.Send)]
    beats = [back(one) for one in sent if isinstance(one, agent_messages.Heartbeat)]
    assert [one.attempts[0].spec for one in beats if isinstance(one, m.Heartbeat)] == [None]


def test_more_than_one_message_bears_is_told_in_several() -> None:
    node = Node()
    node.at(1_000, over_the_wire(m.StartAttempt("1.1", SPEC, (), (), None, 0)))
    node.at(2_000, agent_messages.Disconnected("gone"))
    node.at(2_100, agent_messages.Connected(()))
    others = tuple(f"9.{epoch}" for epoch in range(1, REQUESTS_TOLD_MAX + 1))
    effects = node.at(2_200, over_the_wire(replace(WELCOME, unknown=(*others, "1.1"))))
    sent = [one.message for one in effects if isinstance(one, agent_messages.Send)]
    beats = [back(one) for one in sent if isinstance(one, agent_messages.Heartbeat)]
    told = [(one.sequence, one.attempts[0].spec) for one in beats if isinstance(one, m.Heartbeat)]
    assert told == [(1, None), (2, SPEC)]


def test_a_request_of_a_version_that_is_not_known_ends_no_session() -> None:
    """Its node would come again, be asked again, and never stay."""
    later = cast("types.StopSignal.ValueType", 9)
    spec = types.JobSpec(command=["x"], stop_signal=later)
    held = pb.HeldAttempt(attempt="1.1", live=True, spec=spec)
    beat = wire.decode(pb.SessionRequest(heartbeat=pb.Heartbeat(sequence=1, attempts=[held])))
    assert isinstance(beat, m.Heartbeat)
    assert beat.attempts == (m.HeldAttempt("1.1", ()),)
