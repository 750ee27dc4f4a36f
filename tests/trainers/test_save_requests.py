"""A request to save ahead of a stop, as a training hears it: once, and only who looks for it.

Safety: an older agent, or one whose training never looks, sees no line that it does not know.
Liveness: each agent that comes is told that the training looks.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

import baton_sdk
from tests.trainers.fake_agent import FakeAgent, until
from trainers.configuration import LoopOptions
from trainers.saving import Saver


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(tmp_path / "agent.sock")
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def session(agent: FakeAgent, tmp_path: Path) -> Iterator[baton_sdk.Session]:
    variables = agent.environment(BATON_STAGING_DIR=str(tmp_path))
    with baton_sdk.connect(variables) as opened:
        yield opened


def ask(agent: FakeAgent, session: baton_sdk.Session) -> None:
    """Until it has arrived; nothing takes it."""
    agent.send(type="save", reason="n1 is being drained")
    until(lambda: session._save_requested, "no request")


def test_a_request_is_taken_once(agent: FakeAgent, session: baton_sdk.Session) -> None:
    assert not session.take_save_request()
    agent.expect("heeds_saves")
    ask(agent, session)
    assert session.take_save_request()
    assert not session.take_save_request()
    assert session.stop_requested is None


def test_who_never_looks_says_nothing(agent: FakeAgent, session: baton_sdk.Session) -> None:
    session.progress(1)
    agent.expect("progress")
    assert not [line for line in agent.rest() if line["type"] == "heeds_saves"]


def test_each_agent_is_told_once(agent: FakeAgent, session: baton_sdk.Session) -> None:
    for _ in range(3):
        session.take_save_request()
    agent.expect("heeds_saves")
    session.progress(1)
    agent.expect("progress")
    assert not [line for line in agent.rest() if line["type"] == "heeds_saves"]
    agent.stop()
    agent.start()
    agent.expect("hello")
    agent.expect("heeds_saves")


def test_an_older_agent_is_told_nothing(agent: FakeAgent, session: baton_sdk.Session) -> None:
    agent.stop()
    agent.saves = False
    agent.start()
    agent.expect("hello")
    session.take_save_request()
    session.progress(1)
    agent.expect("progress")
    assert not [line for line in agent.rest() if line["type"] == "heeds_saves"]


def test_outside_baton_nobody_asks() -> None:
    with baton_sdk.connect({}) as session:
        assert not session.take_save_request()


def test_after_step_saves_when_asked_and_goes_on(
    agent: FakeAgent, session: baton_sdk.Session
) -> None:
    saved: list[Path] = []
    session.after_step(1, saved.append, every_steps=100)
    agent.expect("heeds_saves")
    ask(agent, session)
    session.after_step(2, saved.append, every_steps=100)
    session.after_step(3, saved.append, every_steps=100)
    assert agent.expect("checkpoint")["step"] == 2
    assert len(saved) == 1


def test_the_built_in_loop_saves_when_asked(agent: FakeAgent, session: baton_sdk.Session) -> None:
    """Where none is due."""
    saver = Saver(session, LoopOptions(steps=10, checkpoint_every_s=0))
    assert not saver.due(1, 0.0)
    agent.expect("heeds_saves")
    ask(agent, session)
    assert saver.due(2, 0.0)
