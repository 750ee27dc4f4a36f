"""Processes that outlive a kill, from the agent's core over the wire to the coordinator's: shown as
long as they are there, also while an agent that was restarted does not know yet."""

from agent import wire as agent_wire
from agent.core import messages as am
from agent.core.precopy import held
from coordinator import wire as coordinator_wire
from coordinator.core.messages import (
    Effect,
    FromAgent,
    Heartbeat,
    Hello,
    ListNodes,
    Log,
    NodePage,
    Reply,
    Request,
    Submit,
)
from coordinator.core.model import HostFacts, JobSpec
from protos.baton.v1 import agent_pb2
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of
from tests.golden.agent_script import World


class Fleet:
    """One node; what its agent holds goes through the wire as bytes."""

    def __init__(self) -> None:
        self.agent, self.rig, self.session, self.beats = World(), Rig(), 1, 0
        self.told: list[str] = []
        self.run("open")
        self.run("connect")
        facts = HostFacts("box", "", 8, 256 * GIGABYTE)
        gpus = gpus_of("n1", "1xH100")
        hello = Hello("n1", "j1", "n1:1", facts, gpus, (), (), 0)
        self._note(self.rig.handle(FromAgent(1, hello)))
        self._note(self.rig.handle(Request(1, Submit(JobSpec(command=("train",), gpus=1)))))
        for line in ("welcome", "start 1.1", 'restored 1.1 ""', "started 1.1 4242", "stop 1.1"):
            self.run(line)

    def run(self, line: str) -> None:
        self.agent.run(line)

    def beat(self) -> str:
        """A heartbeat of it; what people see of the node then."""
        self.beats += 1
        attempts = held(self.agent.core.state)
        request = agent_wire.encode(am.Heartbeat(self.beats, None, (), attempts, ()))
        heard = agent_pb2.SessionRequest.FromString(request.SerializeToString())
        message = coordinator_wire.decode(heard)
        assert isinstance(message, Heartbeat)
        self._note(self.rig.handle(FromAgent(1, message)))
        replies = [
            e.answer for e in self.rig.handle(Request(2, ListNodes())) if isinstance(e, Reply)
        ]
        (page,) = replies
        assert isinstance(page, NodePage)
        return page.nodes[0].reason

    def _note(self, effects: list[Effect]) -> None:
        self.told += [
            effect.event
            for effect in effects
            if isinstance(effect, Log) and effect.event.startswith("process.")
        ]


def test_what_an_agent_does_not_know_yet_is_not_gone() -> None:
    fleet = Fleet()
    assert fleet.beat() == ""
    fleet.run("stuck 1.1 41 42")
    shown = fleet.beat()
    assert "41 42" in shown
    assert fleet.told == ["process.unkillable"]

    fleet.run("restart adopted=1.1")
    assert fleet.beat() == shown, "nobody has looked since"
    fleet.run("stuck 1.1 41 42")
    assert fleet.beat() == shown
    assert fleet.told == ["process.unkillable"], "once"

    fleet.run("restart adopted=1.1")
    fleet.beat()
    fleet.run("stuck 1.1")
    assert fleet.beat() == "", "the first look found none"
    assert fleet.told == ["process.unkillable", "process.gone"]


def test_what_is_not_listed_any_more_is_gone_whatever_was_known() -> None:
    fleet = Fleet()
    fleet.run("stuck 1.1 41")
    assert fleet.beat()
    fleet.run("exited 1.1 signal=9")
    assert fleet.beat() == ""
    assert fleet.told == ["process.unkillable", "process.gone"]
