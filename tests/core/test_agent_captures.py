"""Captures beside directories: which of the two is the newer, and that progress never goes back.

A trainer hands over captures, and a directory when it leaves and no slot of its slab is free. The
slab still holds the captures then, and when its process is gone the newest one comes up again.
"""

from typing import Any, cast

from agent.core import messages as m
from agent.core.state import Effect, SpoolEvent
from agent.core.trainer_messages import TrainerCheckpoint, TrainerMessage, TrainerSlab, capture_name
from agent.core.values import ProcessExit, StoredCheckpoint
from tests.core import agent_box
from tests.core.test_agent_machine import AgentMachine

ORDER = m.StartAttempt("1.1", m.JobSpec(command=("train",)), ())
SLAB = TrainerSlab(1_000, 2)
OLDER, CAPTURE = capture_name(7, 1), capture_name(7, 2)
DIRECTORY = "/staging/checkpoint-30"


class Node(agent_box.Node):
    """With one running attempt. `storing` is what is being stored; `ended` whether the attempt's
    end was told; `answers` what its trainer was, by the trainer's number."""

    def __init__(self) -> None:
        self.answers: dict[int, str] = {}
        self.searched = self.ended = False
        super().__init__()
        self.run(ORDER)
        self.says(SLAB)

    def begin(self, adopted: tuple[str, ...] = ()) -> list[Effect]:
        self.storing = ""
        return super().begin(adopted)

    def hear(self, event: m.Event) -> list[Effect]:
        effects = super().hear(event)
        for effect in effects:
            match effect:
                case m.StoreCheckpoint():
                    self.storing = effect.path
                case m.TellTrainer():
                    told = dict(effect.message)
                    self.answers[int(told["id"])] = str(told["type"])
                case m.FindCapture():
                    self.searched = True
                case SpoolEvent(event=m.AgentEvent(body=m.AttemptExited())):
                    self.ended = True
        return effects

    def says(self, message: TrainerMessage) -> None:
        self.hear(m.FromTrainer("1.1", message))

    def stores(self) -> None:
        path, self.storing = self.storing, ""
        self.hear(m.StoreDone("1.1", StoredCheckpoint(f"<{path}>", 1, 1, 1)))

    def fails(self) -> None:
        self.storing = ""
        self.hear(m.StoreFailed("1.1", "disk full"))

    def ends(self) -> None:
        self.searched = False
        self.hear(m.ProcessEnded(ProcessExit("1.1", 75, None)))
        assert self.searched

    def finds(self, name: str) -> None:
        self.hear(m.CaptureFound("1.1", name, 20))


def test_a_stored_capture_is_known_after_a_directory() -> None:
    """Also by an agent that came back since."""
    node = Node()
    node.says(TrainerCheckpoint(1, CAPTURE, 20))
    node.stores()
    node.says(TrainerCheckpoint(2, DIRECTORY, 30))
    node.stores()
    node.begin(("1.1",))
    node.says(SLAB)
    node.says(TrainerCheckpoint(3, OLDER, 10))
    assert (node.answers[3], node.storing) == ("refused", "")
    node.ends()
    node.finds(CAPTURE)
    assert (node.storing, node.ended) == ("", True)


def test_a_capture_that_a_directory_superseded_does_not_come_back() -> None:
    """The way of a stop on a slow disk: one slot is being read, the other waits, and the last
    checkpoint is a directory."""
    node = Node()
    node.says(TrainerCheckpoint(1, OLDER, 10))
    node.says(TrainerCheckpoint(2, CAPTURE, 20))
    node.says(TrainerCheckpoint(3, DIRECTORY, 30))
    assert node.answers == {2: "refused"}
    node.says(TrainerCheckpoint(2, CAPTURE, 20))  # it did not hear that
    node.ends()
    node.finds(CAPTURE)
    node.stores()
    assert (node.answers, node.storing) == ({1: "stored", 2: "refused"}, DIRECTORY)
    node.stores()
    assert (node.answers[3], node.storing, node.ended) == ("stored", "", True)


def test_a_capture_comes_back_when_the_directory_after_it_cannot_be_stored() -> None:
    node = Node()
    node.says(TrainerCheckpoint(1, OLDER, 10))
    node.says(TrainerCheckpoint(2, CAPTURE, 20))
    node.says(TrainerCheckpoint(3, DIRECTORY, 30))
    node.stores()
    node.ends()
    node.finds(CAPTURE)
    node.searched = False
    node.fails()
    assert node.searched
    assert not node.ended
    node.finds(CAPTURE)
    assert node.storing == CAPTURE
    node.stores()
    assert node.ended


def test_a_capture_that_nobody_handed_over_is_newer_than_a_directory() -> None:
    node = Node()
    node.says(TrainerCheckpoint(1, OLDER, 10))
    node.stores()
    node.says(TrainerCheckpoint(2, DIRECTORY, 30))
    node.stores()
    node.ends()
    node.finds(CAPTURE)
    assert node.storing == CAPTURE


def test_a_capture_that_a_new_agent_is_told_of_again_may_be_superseded() -> None:
    """A history that the machine once took for a lost capture: it waits while its trainer starts,
    the agent is killed, and the trainer says it again beside a newer directory."""

    class First:
        def draw(self, _: object) -> str:
            return "1.1"

    data = cast("Any", First())
    machine = AgentMachine()
    machine.all_flows(True, 0)
    order = m.StartAttempt("1.1", m.JobSpec(command=("train",)), ("A",))
    machine.gpus["1.1"], machine.epochs[1] = ("A",), 1
    machine.starts.append(order)
    machine.order(order)
    machine.all_flows(False, 1)
    machine.trainer_captures(data, True)
    machine.agent_is_killed()
    machine.trainer_reconnects(data)
    machine.trainer_offers(data)
    machine.connect()
    machine.teardown()
