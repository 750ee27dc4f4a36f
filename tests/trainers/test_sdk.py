"""The trainer's side of the contract, against a small agent and against none.

Safety: a checkpoint is never forgotten before it is answered, and never sent as another. Liveness:
whatever happens to the agent, training goes on, and what counts arrives in the end.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsFloat

import numpy
import pytest

import baton_sdk
from baton_sdk.mailbox import UNANSWERED_MAX, Mailbox
from tests.trainers.fake_agent import DEADLINE_S, FakeAgent, until


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(tmp_path / "agent.sock")
    fake.start()
    yield fake
    if fake.path.exists():
        fake.stop()


@pytest.fixture
def session(agent: FakeAgent) -> Iterator[baton_sdk.Session]:
    with baton_sdk.connect(agent.environment()) as opened:
        yield opened


def test_hello_comes_first_and_names_the_process(
    agent: FakeAgent, session: baton_sdk.Session
) -> None:
    session.milestone("imports")
    hello = agent.received.get(timeout=DEADLINE_S)
    assert hello == {"type": "hello", "version": 1, "token": "secret", "pid": os.getpid()}
    milestone = agent.received.get(timeout=DEADLINE_S)
    assert milestone["type"] == "milestone"
    assert milestone["name"] == "imports"
    assert abs(milestone["unix_ms"] - time.time() * 1000) < 3_600_000


def test_a_milestone_is_sent_once(agent: FakeAgent, session: baton_sdk.Session) -> None:
    for _ in range(3):
        session.milestone("load")
    session.milestone("first_step")
    session.close()
    names = [message["name"] for message in _all(agent) if message["type"] == "milestone"]
    assert names == ["load", "first_step"]


def _all(agent: FakeAgent) -> list[dict[str, Any]]:
    """Everything up to the end of the session's connection."""
    until(lambda: agent.heard_all, "still open")
    return agent.rest()


@pytest.mark.parametrize("last", ["", "; sys.exit(3)", "; 1 / 0"])
def test_a_program_that_ends_without_closing_has_said_all(
    agent: FakeAgent, tmp_path: Path, last: str
) -> None:
    """Liveness: its last checkpoint, and how far it came, reach the agent all the same; however
    long that takes, since how long it waits for an agent that is slow is not the matter here."""
    (tmp_path / "saved").mkdir()
    lines = f"import sys, baton_sdk; baton_sdk.Session.close.__defaults__ = ({DEADLINE_S},)"
    lines += "; s = baton_sdk.connect(); s.progress(7, 7)"
    program = f"{lines}; s.checkpoint({str(tmp_path / 'saved')!r}, 7){last}"
    told = {**os.environ, **agent.environment()}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=told, capture_output=True, timeout=2 * DEADLINE_S
    )
    assert ended.returncode == {"": 0, "; sys.exit(3)": 3, "; 1 / 0": 1}[last]
    kinds = [message["type"] for message in _all(agent)]
    assert "progress" in kinds
    assert "checkpoint" in kinds


def test_of_progress_the_latest_wins_and_none_blocks(
    agent: FakeAgent, session: baton_sdk.Session
) -> None:
    agent.expect("hello")
    for step in range(1, 5001):
        session.progress(step, 5000, {"loss": 1 / step, "broken": float("nan")})
    session.close()
    sent = [message for message in _all(agent) if message["type"] == "progress"]
    assert len(sent) < 2500, "the rate is limited"
    assert [message["step"] for message in sent] == sorted(message["step"] for message in sent)
    assert sent[-1] == {
        "type": "progress",
        "step": 5000,
        "total_steps": 5000,
        "metrics": {"loss": 1 / 5000},
    }


def test_a_checkpoint_is_stored_then_committed(
    agent: FakeAgent, session: baton_sdk.Session, tmp_path: Path
) -> None:
    ticket = session.checkpoint(tmp_path / "checkpoint-7", 7)
    assert not ticket.wait_stored(0.0)
    sent = agent.expect("checkpoint")
    assert sent == {
        "type": "checkpoint",
        "id": ticket.id,
        "path": str(tmp_path / "checkpoint-7"),
        "step": 7,
    }
    agent.send(type="stored", id=ticket.id, digest="ab")
    assert ticket.wait_stored(DEADLINE_S)
    assert (ticket.state, ticket.digest) == (baton_sdk.TicketState.STORED, "ab")
    agent.send(type="committed", id=ticket.id, digest="ab")
    until(lambda: ticket.state is baton_sdk.TicketState.COMMITTED, "not committed")


def test_a_refused_checkpoint_ends_the_wait_with_the_reason(
    agent: FakeAgent, session: baton_sdk.Session, tmp_path: Path
) -> None:
    ticket = session.checkpoint(tmp_path / "checkpoint-1", 1)
    agent.expect("checkpoint")
    agent.send(type="something of a later version")
    agent.send(type="refused", id=ticket.id, reason="epoch 3 is over; the job is at 4")
    assert not ticket.wait_stored(DEADLINE_S)
    assert ticket.state is baton_sdk.TicketState.REFUSED
    assert ticket.reason == "epoch 3 is over; the job is at 4"


def test_after_an_agent_restart_unanswered_checkpoints_are_sent_again(
    agent: FakeAgent, session: baton_sdk.Session, tmp_path: Path
) -> None:
    first = session.checkpoint(tmp_path / "checkpoint-1", 1)
    second = session.checkpoint(tmp_path / "checkpoint-2", 2)
    agent.expect("checkpoint")
    agent.expect("checkpoint")
    agent.send(type="stored", id=first.id, digest="aa")
    assert first.wait_stored(DEADLINE_S)
    agent.stop()
    third = session.checkpoint(tmp_path / "checkpoint-3", 3)
    agent.start()
    agent.expect("hello")
    assert [agent.expect("checkpoint")["id"] for _ in range(2)] == [second.id, third.id]
    agent.send(type="stored", id=third.id, digest="cc")
    agent.send(type="committed", id=first.id, digest="aa")
    assert third.wait_stored(DEADLINE_S)
    assert not second.wait_stored(0.0)
    until(lambda: first.state is baton_sdk.TicketState.COMMITTED, "not committed")


def test_a_line_that_is_no_json_costs_only_the_connection(
    agent: FakeAgent, session: baton_sdk.Session, tmp_path: Path
) -> None:
    agent.expect("hello")
    agent.send_bytes(b"what?\n")
    agent.expect("hello")
    ticket = session.checkpoint(tmp_path / "checkpoint-1", 1)
    agent.expect("checkpoint")
    agent.send(type="stored", id=ticket.id, digest="aa")
    assert ticket.wait_stored(DEADLINE_S)


def test_the_agent_can_ask_for_a_stop(agent: FakeAgent, session: baton_sdk.Session) -> None:
    agent.expect("hello")
    assert session.stop_requested is None
    agent.send(type="stop", reason="drain of n1", grace_ms=60_000)
    until(lambda: session.stop_requested is not None, "no stop")
    stop = session.stop_requested
    assert stop is not None
    assert (stop.reason, stop.grace_ms) == ("drain of n1", 60_000)
    assert 0 < stop.remaining_s <= 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_a_stop_also_without_an_agent(number: signal.Signals) -> None:
    with baton_sdk.connect({"BATON_GRACE_MS": "5000"}) as session:
        os.kill(os.getpid(), number)
        until(lambda: session.stop_requested is not None, "no stop")
        stop = session.stop_requested
        assert stop is not None
        assert (stop.reason, stop.grace_ms) == (number.name, 5000)


def test_a_child_process_still_dies_of_sigterm() -> None:
    """A data loader's worker inherits the handler; its parent must be able to end it."""
    program = (
        "import baton_sdk, os, signal\n"
        "session = baton_sdk.connect({})\n"
        "reader, writer = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n    os.write(writer, b'up')\n    signal.pause()\n    os._exit(3)\n"
        "os.read(reader, 2)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "_, status = os.waitpid(child, 0)\n"
        "print(os.WTERMSIG(status), session.stop_requested)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.stdout.strip() == f"{signal.SIGTERM.value} None", done.stderr


def test_outside_baton_every_call_works_and_does_nothing(tmp_path: Path) -> None:
    with baton_sdk.Session({}) as session:
        session.progress(1, 2, {"loss": 3.0})
        session.milestone("imports")
        assert session.checkpoint(tmp_path, 1).wait_stored(0.0)
        assert tmp_path.is_dir(), "nobody took it"
        assert session.restore_directory is None
        assert session.restore_step == 0
        assert session.staging_directory is None
        assert not session.under_baton


def test_outside_baton_a_signal_ends_a_plain_loop() -> None:
    program = (
        "import baton_sdk, os, signal\n"
        "session = baton_sdk.connect({})\n"
        "session.after_step(1, print, every_steps=1)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "session.after_step(2, print, every_steps=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=DEADLINE_S, check=False)
    assert done.returncode == -signal.SIGTERM


def test_the_environment_says_what_to_restore(tmp_path: Path) -> None:
    session = baton_sdk.Session(
        {
            "BATON_RESTORE_DIR": str(tmp_path),
            "BATON_RESTORE_STEP": "120",
            "BATON_STAGING_DIR": str(tmp_path / "staging"),
        }
    )
    assert session.restore_directory == tmp_path
    assert session.restore_step == 120
    assert session.staging_directory == tmp_path / "staging"


def test_an_agent_that_never_comes_delays_nothing(tmp_path: Path) -> None:
    nowhere = {"BATON_SOCKET": str(tmp_path / "nobody.sock"), "BATON_TOKEN": "x"}
    session = baton_sdk.Session(nowhere)
    session.open()
    session.progress(1)
    ticket = session.checkpoint(tmp_path, 1)
    assert not ticket.wait_stored(0.01)
    session.close(flush_timeout_s=0.1)
    assert ticket.state is baton_sdk.TicketState.PENDING


def test_an_absent_agent_costs_a_bounded_number_of_directories(tmp_path: Path) -> None:
    mailbox = Mailbox()
    tickets = []
    for step in range(UNANSWERED_MAX + 3):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        tickets.append(mailbox.put_checkpoint(directory, step))
    states = [ticket.state.value for ticket in tickets]
    assert states == ["refused"] * 3 + ["pending"] * UNANSWERED_MAX
    assert "superseded" in tickets[0].reason
    assert [ticket.path is not None and ticket.path.exists() for ticket in tickets] == [
        False
    ] * 3 + [True] * UNANSWERED_MAX
    assert len(mailbox.take(0.0)) == UNANSWERED_MAX


def test_a_checkpoint_that_the_agent_may_own_is_never_removed(tmp_path: Path) -> None:
    mailbox = Mailbox()
    for step in range(UNANSWERED_MAX):
        (tmp_path / str(step)).mkdir()
        mailbox.put_checkpoint(tmp_path / str(step), step)
    mailbox.take(0.0)
    (tmp_path / "new").mkdir()
    newest = mailbox.put_checkpoint(tmp_path / "new", 99)
    assert newest.state is baton_sdk.TicketState.REFUSED
    assert all((tmp_path / str(step)).exists() for step in range(UNANSWERED_MAX))


@pytest.mark.parametrize("known", [True, False])
def test_the_last_word_comes_to_those_who_know_of_it(
    *, agent: FakeAgent, tmp_path: Path, known: bool
) -> None:
    agent.leaving = known
    with baton_sdk.connect(agent.environment()) as session:
        session.checkpoint(tmp_path, 3)
        session.leaving(75 - 256, "the disk\nis full")  # exit(3) takes it, and an agent does not
    until(lambda: agent.heard_all, "the agent has read to the end")
    messages = agent.rest()
    assert [message["type"] for message in messages[:2]] == ["hello", "checkpoint"]
    word = {"type": "leaving", "status": 75, "reason": "the disk is full"}
    assert messages[2:] == ([word] if known else [])


def test_times_arrive_without_what_is_no_time(agent: FakeAgent, session: baton_sdk.Session) -> None:
    agent.expect("hello")
    seconds: dict[str, SupportsFloat] = {
        "step_s": numpy.float32(1.5), "capture_s": 0, "a": -1.0, "b": float("nan"),
    }  # fmt: skip
    session.progress(5, seconds=seconds)
    assert agent.expect("progress") == {
        "type": "progress", "step": 5, "time": {"step_s": 1.5, "capture_s": 0.0},
    }  # fmt: skip


def test_numbers_of_numpy_arrive_and_odd_names_harm_nothing(
    agent: FakeAgent, session: baton_sdk.Session, tmp_path: Path
) -> None:
    """A number that JSON does not know must not end the thread that carries everything else."""
    agent.expect("hello")
    session.progress(numpy.int64(5), numpy.int32(9), {"a\n": numpy.float32(0.5), "": 1})
    progress = agent.expect("progress")
    assert (progress["step"], progress["total_steps"]) == (5, 9)
    assert progress["metrics"] == {"a": 0.5, "unnamed": 1.0}
    (tmp_path / "c").mkdir()
    session.checkpoint(tmp_path / "c", numpy.int64(5))
    assert agent.expect("checkpoint")["step"] == 5
    with pytest.raises(TypeError):
        session.progress(1.5)  # type: ignore[arg-type]


def test_an_older_agent_is_told_nothing_of_slabs(
    agent: FakeAgent, session: baton_sdk.Session
) -> None:
    agent.expect("hello")
    assert session.slab(1000, DEADLINE_S) is None
    session.close()
    assert "slab" not in [message["type"] for message in _all(agent)]


def _sections(messages: list[dict[str, Any]]) -> list[tuple[str, int]]:
    told = [message for message in messages if message["type"] == "section"]
    return [(message["name"], message["count"]) for message in told]


def test_a_loop_of_short_steps_does_not_flood_the_socket(
    agent: FakeAgent, session: baton_sdk.Session
) -> None:
    session.enter("init")
    assert agent.expect("section")["name"] == "init"
    for _ in range(5000):
        session.enter("step")
    session.close()
    told = _sections(_all(agent))
    assert len(told) < 2500, "the rate is limited"
    assert sum(count for _, count in told) == 5001, "init, and every step"
    assert {name for name, _ in told[:-1]} <= {"step"}
    assert told[-1][0] == "", "after the session there is no section"


def test_a_section_within_another_is_told_and_so_is_its_end() -> None:
    box = Mailbox()
    box.welcomed({"sections": True})
    session = baton_sdk.Session({})
    session._mailbox, session._link = box, Waker()  # type: ignore[assignment]
    lines: list[tuple[str, int]] = []

    def told(now_s: float) -> None:
        lines.extend(_sections([json.loads(line) for line in box.take(now_s)]))

    session.enter("step")
    told(0)
    with session.section("eval"):
        told(1)
        with contextlib.suppress(KeyError), session.section("save"):
            told(2)
            raise KeyError
        told(3)
    told(4)
    told(5)
    session.enter("")
    told(6)
    names = ["step", "eval", "save", "eval", "step", ""]
    assert lines == [(name, int(place > 0)) for place, name in enumerate(names)]


class Waker:
    """A link as far as sections know it."""

    def wake(self) -> None:
        return


def test_a_new_connection_hears_the_section_again_and_no_count(
    agent: FakeAgent, session: baton_sdk.Session
) -> None:
    session.enter("init")
    session.enter("step")
    while agent.expect("section")["name"] != "step":
        pass
    agent.stop()
    for _ in range(3):
        session.enter("step")
    agent.start()
    agent.expect("hello")
    assert _sections([agent.expect("section")]) == [("step", 0)]


def test_an_older_agent_hears_nothing_of_sections(agent: FakeAgent) -> None:
    agent.sections = False
    with baton_sdk.connect(agent.environment()) as session:
        session.enter("step")
        session.progress(1)
        agent.expect("progress")
        session.enter("eval")
    assert _sections(_all(agent)) == []


def test_no_agent_no_sections_and_no_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[int] = []
    monkeypatch.setattr("faulthandler.register", lambda number, **_: registered.append(number))
    with baton_sdk.connect({}) as session, session.section("step"):
        assert registered == []


def test_stacks_are_written_when_asked_for(agent: FakeAgent) -> None:
    """By a process whose main thread is in C code, to its standard error."""
    script = (
        "import baton_sdk, os, signal, sys\n"
        "session = baton_sdk.connect()\n"
        "def here():\n"
        "    os.kill(os.getpid(), baton_sdk.DUMP_SIGNAL)\n"
        "here()\n"
        "session.close()\n"
    )
    variables = {**os.environ, **agent.environment()}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True
    )
    assert "in here" in ended.stderr
    assert "in _run" in ended.stderr, "the link's thread, too"
