"""Memory for captures as a trainer sees it: asked for once, mapped, used, kept over restarts of the
agent, and done without where the agent has none to give.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import baton_sdk
from agent.slabs import Slabs
from baton_sdk.mailbox import Mailbox
from baton_sdk.slab import SlabDesk
from tests.trainers.fake_agent import DEADLINE_S, FakeAgent, until


@pytest.fixture
def generous(tmp_path: Path) -> Iterator[FakeAgent]:
    """An agent that gives slabs."""
    desk = Slabs(0.5, lambda: 1_000_000_000)
    fake = FakeAgent(tmp_path / "generous.sock", slabs=desk)
    fake.start()
    yield fake
    if fake.path.exists():
        fake.stop()
    desk.close()


def variables(agent: FakeAgent) -> dict[str, str]:
    return {"BATON_SOCKET": str(agent.path), "BATON_TOKEN": agent.token}


def put(session: baton_sdk.Session, slab: baton_sdk.Slab, step: int) -> baton_sdk.Ticket:
    """Capture a few bytes."""
    slot = slab.free_slot()
    assert slot is not None
    slab.begin(slot)
    begin = slab.offset_bytes(slot)
    slab.mapping[begin : begin + 4] = b"data"
    return session.capture(slab, slot, [("data", 0, 4)], step)


def test_a_slab_is_asked_for_mapped_and_used(generous: FakeAgent) -> None:
    with baton_sdk.connect(variables(generous)) as session:
        slab = session.slab(100_000, DEADLINE_S)
        assert slab is not None
        assert (slab.slots, slab.slot_bytes >= 100_000) == (2, True)
        assert session.slab(100_000) is slab, "asked for once"
        tickets = [put(session, slab, step) for step in (1, 2)]
        assert slab.free_slot() is None
        assert slab.wait_free_slot(0.0) is None
        sent = [generous.expect("checkpoint") for _ in range(2)]
        assert [(line["id"], line["slab"], line["step"]) for line in sent] == [
            (ticket.id, ticket.sequence, ticket.step) for ticket in tickets
        ]
        generous.send(type="stored", id=tickets[0].id, digest="aa")
        assert slab.wait_free_slot(DEADLINE_S) == 0
        generous.send(type="refused", id=tickets[1].id, reason="superseded")
        until(lambda: tickets[1].state is baton_sdk.TicketState.REFUSED, "not refused")
        assert slab.free_slot() == 0
        larger = session.slab(10_000_000, DEADLINE_S)
        assert larger is not None
        assert larger is not slab


def test_a_refused_slab_is_neither_waited_for_nor_asked_for_again(generous: FakeAgent) -> None:
    with baton_sdk.connect(variables(generous)) as session:
        # Nothing ends this wait but the refusal: the test's own deadline is far below it.
        assert session.slab(10**9, 10**6) is None
        assert session.slab(10**9, 10**6) is None
        assert session.slab(2 * 10**9, 10**6) is None
        assert session.slab(1000, DEADLINE_S) is not None, "less may be had"
    until(lambda: generous.heard_all, "still open")
    asked = [message for message in generous.rest() if message["type"] == "slab"]
    assert [message["bytes"] >= 10**9 for message in asked] == [True, False]


def test_a_larger_slab_that_is_wanted_while_one_is_on_its_way_is_not_forgotten() -> None:
    box = Mailbox()
    desk = SlabDesk(box)
    agent = Slabs(0.5, lambda: 1_000_000_000)

    def grant() -> None:
        (request,) = desk.take()
        size = request["bytes"]
        assert isinstance(size, int)
        granted = agent.grant("1.1", size)
        assert not isinstance(granted, str)
        line = {"bytes": granted.slot_bytes, "slots": granted.slots}
        desk.granted(line, os.dup(granted.descriptor))

    assert desk.slab(1000, 0.0) is None
    grant()
    assert desk.slab(50_000_000, 0.0) is None
    small = desk.slab(1000, DEADLINE_S)
    assert small is not None
    grant()
    large = desk.slab(50_000_000, DEADLINE_S)
    assert large is not None
    assert desk.take() == []
    large.close()
    agent.close()


def test_after_an_agent_restart_the_slab_is_offered_before_what_lies_in_it(
    generous: FakeAgent,
) -> None:
    with baton_sdk.connect(variables(generous)) as session:
        slab = session.slab(1000, DEADLINE_S)
        assert slab is not None
        ticket = put(session, slab, 5)
        generous.expect("checkpoint")
        generous.stop()
        generous.start()
        generous.expect("hello")
        offer = generous.received.get(timeout=DEADLINE_S)
        assert (offer["type"], offer["offered"], offer["slots"]) == ("slab", True, 2)
        assert generous.expect("checkpoint")["slab"] == ticket.sequence


def test_captures_for_an_agent_that_was_replaced_by_an_older_one_are_refused(
    generous: FakeAgent,
) -> None:
    with baton_sdk.connect(variables(generous)) as session:
        slab = session.slab(1000, DEADLINE_S)
        assert slab is not None
        ticket = put(session, slab, 5)
        generous.expect("checkpoint")
        generous.stop()
        generous.slabs = None
        generous.start()
        until(lambda: ticket.state is baton_sdk.TicketState.REFUSED, "not refused")
        put(session, slab, 6)  # into the other one
        assert slab.free_slot() == 0
        assert session.slab(1000) is None
