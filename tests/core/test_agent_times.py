"""What a node alone knows of an attempt's beginning: how long restoring took, and the rest of it;
and that a trainer's own times pass through it unchanged."""

import pytest

from agent.core import messages as m
from agent.core.state import Effect, SpoolEvent
from agent.core.trainer_messages import TrainerProgress, TrainerTime
from agent.core.values import Restored
from tests.core import agent_box

ORDER = m.StartAttempt("1.1", m.JobSpec(command=("train",)), ())
RESTORED = m.RestoreDone("1.1", Restored("a" * 64, 5, "/state/restored"))


class Node(agent_box.Node):
    """That hears everything at its time."""

    def at(self, now_ms: int, event: m.Event) -> list[Effect]:
        self.now_ms = now_ms
        return self.hear(event)

    def started(self, now_ms: int) -> m.AttemptStarted:
        for effect in self.at(now_ms, m.ProcessStarted("1.1", 7)):
            if isinstance(effect, SpoolEvent):
                assert isinstance(effect.event.body, m.AttemptStarted)
                return effect.event.body
        raise AssertionError("no start was told")


def test_restoring_and_starting_are_told_apart() -> None:
    node = Node()
    node.at(1_000, m.FromCoordinator(ORDER, "1" * 32))
    node.at(3_500, RESTORED)
    told = node.started(4_000)
    assert (told.restore_ms, told.start_ms) == (2_500, 500)


@pytest.mark.parametrize(("age_ms", "start_ms"), [(300, 200), (9_000, 0)])
def test_a_program_has_begun_when_it_began_and_not_when_a_busy_agent_hears_of_it(
    age_ms: int, start_ms: int
) -> None:
    """Else what it says of its own beginning would come before that. No earlier than ordered."""
    node = Node()
    node.at(1_000, m.FromCoordinator(ORDER, "1" * 32))
    node.at(3_500, RESTORED)
    (told,) = (
        effect.event
        for effect in node.at(4_000, m.ProcessStarted("1.1", 7, age_ms))
        if isinstance(effect, SpoolEvent)
    )
    assert isinstance(told.body, m.AttemptStarted)
    assert (told.body.restore_ms, told.body.start_ms) == (2_500, start_ms)
    assert told.unix_ms == node.unix_ms + 3_500 + start_ms


def test_from_nothing_is_no_restoring() -> None:
    node = Node()
    node.at(1_000, m.FromCoordinator(ORDER, "1" * 32))
    node.at(1_200, m.RestoreDone("1.1", Restored("", 0, "")))
    told = node.started(4_000)
    assert (told.restore_ms, told.start_ms) == (None, 3_000)


def test_what_a_restart_made_unknown_is_not_made_up() -> None:
    node = Node()
    node.at(1_000, m.FromCoordinator(ORDER, "1" * 32))
    node.at(3_500, RESTORED)
    node.begin()
    told = node.started(4_000)
    assert (told.restore_ms, told.start_ms) == (None, None)


def test_times_go_with_the_next_heartbeat() -> None:
    node = Node()
    node.at(1_000, m.FromCoordinator(ORDER, "1" * 32))
    node.at(3_500, RESTORED)
    node.started(4_000)
    time = TrainerTime(step_s=2.5, capture_s=0.5)
    node.at(6_000, m.FromTrainer("1.1", TrainerProgress(6, None, (), time)))
    sent = [one.message for one in node.at(9_000, m.Tick()) if isinstance(one, m.Send)]
    beats = [message for message in sent if isinstance(message, m.Heartbeat)]
    assert [beat.progress for beat in beats] == [(("1.1", m.Progress(6, 0, (), time)),)]
