"""How an attempt has ended, where its trainer has said more of that than its status does.

Safety: a word is believed of a launcher's status and of no other, and only of the last program that
has said anything. Liveness: it outlives the agent.
"""

import pytest

from agent.core import messages as m
from agent.core.state import Effect, SpoolEvent
from agent.core.trainer_messages import TrainerHello, TrainerLeaving, TrainerMessage
from agent.core.values import ProcessExit
from tests.core.test_sections import Node

FULL = "the disk is full"


def told(effects: list[Effect]) -> m.AttemptExited:
    (body,) = [effect.event.body for effect in effects if isinstance(effect, SpoolEvent)]
    assert isinstance(body, m.AttemptExited)
    return body


def end(
    node: Node, status: int | None, *messages: TrainerMessage, reason: str = ""
) -> m.AttemptExited:
    """What is reported, once its programs have said this, of an end with this status."""
    for message in messages:
        node.hear(m.FromTrainer("1.1", message))
    signal = 9 if status is None else None
    return told(node.hear(m.ProcessEnded(ProcessExit("1.1", status, signal, reason))))


def test_of_a_launcher_the_status_of_those_below_is_told() -> None:
    ended = end(Node(), 1, TrainerHello(7), TrainerLeaving(75, FULL))
    assert ended == m.AttemptExited(1, None, FULL, by_itself=True, said_exit_code=75)


@pytest.mark.parametrize(
    ("status", "reason"), [(0, ""), (75, FULL), (2, ""), (139, ""), (None, "")]
)
def test_another_status_speaks_for_itself(status: int | None, reason: str) -> None:
    ended = end(Node(), status, TrainerLeaving(75, FULL))
    assert (ended.exit_code, ended.reason, ended.said_exit_code) == (status, reason, None)


def test_a_program_that_leaves_with_1_itself_has_no_launcher() -> None:
    ended = end(Node(), 1, TrainerLeaving(1, FULL))
    assert ended == m.AttemptExited(1, None, FULL, by_itself=True)


def test_the_same_word_of_many_ranks_is_written_once() -> None:
    node = Node()
    words = [m.FromTrainer("1.1", TrainerLeaving(status, FULL)) for status in (75, 75, 1, 1)]
    assert [len(node.hear(word)) for word in words] == [1, 0, 1, 0]


def test_what_the_supervisor_says_is_not_replaced() -> None:
    ended = end(Node(), 1, TrainerLeaving(75, FULL), reason="no memory was left")
    assert (ended.reason, ended.said_exit_code) == ("no memory was left", 75)


def test_the_word_of_a_program_before_is_not_about_the_next_one() -> None:
    """A launcher starts its workers again, and they fail; nor is it about another attempt."""
    ended = end(Node(), 1, TrainerLeaving(75, FULL), TrainerHello(8))
    assert ended == m.AttemptExited(1, by_itself=True)
    node = Node()
    node.hear(m.FromTrainer("1.2", TrainerLeaving(75)))
    assert end(node, 1) == m.AttemptExited(1, by_itself=True)


def test_a_word_outlives_the_agent() -> None:
    node = Node()
    node.hear(m.FromTrainer("1.1", TrainerLeaving(75, FULL)))
    node.begin(("1.1",))
    assert end(node, 1).said_exit_code == 75
