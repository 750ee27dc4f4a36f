"""A node whose state directory comes from another time: the coordinator has heard more of it than
its journal knows, and would take all that it says next for what it has heard."""

from copy import deepcopy
from dataclasses import replace

from agent.core import messages as m
from agent.core.state import Effect, PutJournalId
from agent.core.values import ProcessExit
from tests.core.agent_box import Node


def put_back() -> Node:
    """Of the time before its attempt had ended."""
    node = Node()
    node.run(m.StartAttempt("1.1", m.JobSpec("x", ("true",)), ()))
    before = deepcopy(node.journal)
    node.hear(m.ProcessEnded(ProcessExit("1.1", 0, None, "")))
    node.order(m.EventAck(2))
    assert node.journal.memory().next_sequence == 3
    node.journal = before
    return node


def sent(effects: list[Effect], kind: type[m.Upward]) -> list[m.Upward]:
    found = [effect.message for effect in effects if isinstance(effect, m.Send)]
    return [message for message in found if isinstance(message, kind)]


def closed(effects: list[Effect]) -> bool:
    return any(isinstance(effect, m.CloseLink) for effect in effects)


def test_a_journal_of_before_becomes_another_one_and_what_it_has_to_say_is_heard() -> None:
    node = put_back()
    node.greeting = replace(node.greeting, acknowledged_sequence=2)
    journal_id = node.journal.memory().journal_id
    node.begin()  # its process is gone
    assert node.journal.memory().journal_id == "0" * 32 != journal_id
    node.hear(m.Disconnected("closed"))
    (hello,) = sent(node.hear(m.Connected(())), m.Hello)
    assert isinstance(hello, m.Hello)
    assert hello.journal_id == "0" * 32
    node.greeting = replace(node.greeting, acknowledged_sequence=hello.acknowledged_sequence)
    events = sent(node.order(node.greeting), m.AgentEvent)
    ends = [one.body for one in events if isinstance(one, m.AgentEvent)]
    assert any(isinstance(body, m.AttemptExited) for body in ends)


def test_nothing_is_obeyed_or_said_until_it_is_another_one() -> None:
    node = put_back()
    node.core = type(node.core)(node.options, node.journal.memory())
    node.hear(m.Opened((), node.host, node.gpus))
    node.hear(m.Connected(()))
    told = node.order(replace(node.greeting, acknowledged_sequence=2))
    assert closed(told)
    assert [one for one in told if isinstance(one, PutJournalId)] == [PutJournalId("0" * 32)]
    assert sent(told, m.AgentEvent) == []
    start = m.StartAttempt("2.1", m.JobSpec("x", ("true",)), ())
    assert node.order(start) == []


def test_what_was_heard_before_a_restart_is_no_other_time() -> None:
    """Though it is not known here that it was, or was said in this session or one before."""
    node = Node()
    node.run(m.StartAttempt("1.1", m.JobSpec("x", ("true",)), ()))
    journal_id = node.journal.memory().journal_id
    node.greeting = replace(node.greeting, acknowledged_sequence=1)
    for _ in range(2):
        node.begin(("1.1",))
    node.hear(m.ProcessEnded(ProcessExit("1.1", 0, None, "")))
    for _ in range(2):
        node.hear(m.Disconnected("cut"))
        node.hear(m.Connected(()))
        node.order(replace(node.greeting, acknowledged_sequence=2))
    assert node.journal.memory().journal_id == journal_id
