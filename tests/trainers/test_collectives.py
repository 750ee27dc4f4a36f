"""What a hung rank says of the collectives that it waits for, with a recorder as torch's."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import baton_sdk
from baton_sdk import collectives, session
from tests.trainers.fake_agent import FakeAgent, until

# As torch 2.13 says it; the second is over.
REDUCE = {
    "collective_seq_id": 7,
    "input_sizes": [[3]],
    "process_group": ["0", "default_pg"],
    "profiling_name": "nccl:all_reduce",
    "retired": False,
    "state": "started",
}
GATHER = {**REDUCE, "collective_seq_id": 6, "profiling_name": "nccl:all_gather", "retired": True}
STATUS = {"last_completed_collective": "6", "last_enqueued_collective": "7"}
DUMP = {
    "entries": [GATHER, REDUCE],
    "pg_config": {"0": {"desc": "default_pg", "ranks": "[0, 1]"}},
    "pg_status": {"0": STATUS},
}
EMPTY: dict[str, Any] = {"entries": [], "pg_config": {}, "pg_status": {}}
Say = Callable[..., str]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """What is written, of recorders that dump these."""

    def written(**dumps: object) -> str:
        def recorder(dump: object) -> Callable[[bool, bool], bytes]:
            def call(with_collectives: bool, only_active: bool) -> bytes:
                assert (with_collectives, only_active) == (True, True)
                if isinstance(dump, Exception):
                    raise dump
                return json.dumps(dump).encode()

            return call

        named = {f"_dump_{name}_trace_json": recorder(dump) for name, dump in dumps.items()}
        module: Any = SimpleNamespace(**named)
        monkeypatch.setitem(sys.modules, collectives.MODULE, module)
        with (tmp_path / "log").open("w+") as log:
            collectives.write(log.fileno(), 3)
            return (tmp_path / "log").read_text()

    return written


def test_it_says_how_far_each_group_is_and_what_is_not_over(say: Say) -> None:
    group, waits = say(nccl=DUMP, fr=EMPTY).splitlines()
    assert group == f"baton: rank 3: collectives of group default_pg: {json.dumps(STATUS)}"
    begin, _, entry = waits.partition(": {")
    assert begin == "baton: rank 3: waits in nccl:all_reduce"
    assert json.loads("{" + entry) == REDUCE


def test_of_two_recorders_it_is_the_one_that_has_seen_anything(say: Say) -> None:
    """A torch for CUDA whose ranks speak over gloo has both."""
    gloo = {**DUMP, "entries": [{**REDUCE, "profiling_name": "gloo:all_reduce"}]}
    assert "waits in gloo:all_reduce" in say(nccl=EMPTY, fr=gloo)
    assert "waits in gloo:all_reduce" in say(fr=gloo)
    assert say(nccl=EMPTY, fr=EMPTY) == ""


def test_it_is_bounded(say: Say) -> None:
    many = {**DUMP, "entries": [{**REDUCE, "input_sizes": [[9]] * 10_000}] * 40}
    lines = say(nccl=many).splitlines()
    assert lines[-1] == "baton: rank 3: and 8 more collectives"
    assert len(lines) == 1 + collectives.ENTRIES_MAX + 1
    assert max(map(len, lines)) < collectives.LINE_CHARACTERS_MAX + 100


@pytest.mark.parametrize("dump", [RuntimeError("no"), "text", {"entries": [{}]}, [1]])
def test_a_recorder_that_is_not_understood_is_quoted(say: Say, dump: object) -> None:
    assert "torch's flight recorder could not be read: " in say(nccl=dump)


def test_who_has_no_collectives_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, collectives.MODULE, raising=False)
    with (tmp_path / "log").open("w") as log:
        collectives.write(log.fileno(), 0)
    assert (tmp_path / "log").read_text() == ""
    assert collectives.MODULE not in sys.modules, "nothing was imported for it"


def test_the_agent_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread of the link, since the training's own one hangs."""
    monkeypatch.setattr(session, "STACKS_S", 0.0)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(collectives, "write", lambda *where: asked.append(where))
    agent = FakeAgent(tmp_path / "agent.sock")
    agent.start()
    try:
        with baton_sdk.connect({**agent.environment(), "BATON_RANK": "2"}):
            until(lambda: agent.connected, "nobody came")
            agent.send(type="hung", reason="hung in step for 130 s (limit 120 s)")
            until(lambda: bool(asked), "it was not asked")
    finally:
        agent.stop()
    assert asked == [(session.STDERR, 2)]
