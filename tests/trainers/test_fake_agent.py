"""The tests' own agent, whose thread must not die of what a test does to a connection.

Problem: an error in that thread is no failure of any test; it is a warning in the one that happens
to run when Python gets to it, which may be of another file.
"""

import io
import socket
from pathlib import Path

from tests.trainers.fake_agent import FakeAgent


def read(agent: FakeAgent, data: bytes) -> None:
    """What its thread does with what a connection brought until its end."""
    near, far = socket.socketpair()
    with near, far:
        agent._read(near, io.BytesIO(data))


def test_a_test_may_cut_while_a_checkpoint_is_read(tmp_path: Path) -> None:
    agent = FakeAgent(tmp_path / "socket", stores=True)
    agent.drop()
    read(agent, b'{"type":"checkpoint","id":1}\n')
    assert agent.rest() == [{"type": "checkpoint", "id": 1}]


def test_half_a_line_of_a_killed_program_is_none(tmp_path: Path) -> None:
    agent = FakeAgent(tmp_path / "socket")
    read(agent, b'{"type":"done"}\n{"type":"progr')
    assert agent.rest() == [{"type": "done"}]
