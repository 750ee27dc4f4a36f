"""Ranks that a launcher has started within one attempt keep one checkpoint, whole or not at all."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainers import tasks
from tests.trainers.fake_agent import FakeAgent
from tests.trainers.gang import Host
from tests.trainers.test_ranks import PLAIN, RANDOM, SAVED, STEPS
from trainers import checkpoint, launcher, ranges, ranks, start

pytestmark = pytest.mark.xdist_group("ranks")

ATTEMPT = {"BATON_SOCKET": "/run/trainers.sock", "BATON_STAGING_DIR": "/staging"}


def of(rank: int, size: int, **more: str) -> dict[str, str]:
    return {**ATTEMPT, "RANK": str(rank), "WORLD_SIZE": str(size), **more}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("launched")) as made:
        yield made


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "agent.sock", stores=True)
    made.start()
    yield made
    made.stop()


def told_by(agent: FakeAgent, place: Path, **more: str) -> dict[str, str]:
    return {
        "BATON_SOCKET": str(agent.path),
        "BATON_TOKEN": agent.token,
        "BATON_STAGING_DIR": str(place / "staging"),
        "BATON_GRACE_MS": "60000",
        "LOCAL_WORLD_SIZE": "2",
        **more,
    }


@pytest.mark.parametrize(
    ("environment", "shared", "silent"),
    [
        (of(0, 1), False, False),
        (of(0, 4), True, False),
        (of(3, 4, LOCAL_WORLD_SIZE="4"), True, True),
        (of(3, 4, BATON_RANK="3", BATON_WORLD_SIZE="4", LOCAL_WORLD_SIZE="1"), False, False),
        ({"RANK": "3", "WORLD_SIZE": "4"}, False, False),
        ({}, False, False),
    ],
)
def test_ranks_share_an_attempt_where_baton_started_one(
    *, environment: dict[str, str], shared: bool, silent: bool
) -> None:
    assert launcher.shared(environment) is shared
    assert launcher.silent(environment) is silent
    assert ranks.world_of(environment).shared is shared
    assert launcher.problems(environment) == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (of(5, 8, LOCAL_WORLD_SIZE="4"), "4 of 8 processes .* in this job; .*submit --ranks 8"),
        (of(5, 8, BATON_RANK="1", BATON_WORLD_SIZE="2"), "process 5 of 8 .* below rank 1 of 2"),
        # Two launchers, each with a world of its own, of the size of Baton's.
        (of(0, 2, BATON_RANK="1", BATON_WORLD_SIZE="2"), "process 0 of 2 .* below rank 1 of 2"),
    ],
)
def test_what_could_not_be_committed_is_refused_with_what_to_write(
    environment: dict[str, str], words: str
) -> None:
    (sentence,) = launcher.problems(environment)
    assert re.search(words, sentence)


def test_a_launcher_below_several_ranks_does_not_begin(
    agent: FakeAgent, host: Host, tmp_path: Path
) -> None:
    told = told_by(agent, tmp_path, BATON_RANK="1", BATON_WORLD_SIZE="3")
    for rank in host.run(2, [told] * 2, **PLAIN):
        assert rank.status == 2
        assert "a rank is one process" in rank.err


def test_all_parts_are_handed_over_as_one_checkpoint_and_resumed_from(
    agent: FakeAgent, host: Host, tmp_path: Path
) -> None:
    told = told_by(agent, tmp_path)
    straight = host.run(2, [told] * 2, **RANDOM)
    assert [rank.status for rank in straight] == [0, 0], straight[0].err + straight[1].err
    messages = agent.rest()
    assert [message["type"] for message in messages].count("hello") == 1, "one speaks for all"
    offered = [message for message in messages if message["type"] == "checkpoint"]
    assert [message["step"] for message in offered] == [SAVED, STEPS]
    assert not any("parts" in message for message in offered), "to the agent it is whole"
    for message in offered:
        assert ranges.verify(Path(message["path"])).world_size == 2
    again = host.run(2, [{**told, "BATON_RESTORE_DIR": offered[0]["path"]}] * 2, **RANDOM)
    assert again[0].event("resumed")["level"] == "E0", again[0].event("resumed")
    assert again[0].losses == straight[0].losses[SAVED:]
    last = agent.checkpoints(STEPS)[-1]
    for rank in range(2):
        part = ranges.name_of_part(rank)
        left, right = (checkpoint.read(Path(m["path"]) / part) for m in (offered[-1], last))
        assert tasks.differences(left, right) == []


@pytest.mark.parametrize("stores", [True, False])
def test_no_rank_leaves_before_the_checkpoint_of_all_is_stored(
    *, stores: bool, agent: FakeAgent, host: Host, tmp_path: Path
) -> None:
    """The launcher ends the others as soon as one has left. Where no answer comes within the grace,
    all of them know."""
    agent.stores = stores
    grace = {} if stores else {"BATON_GRACE_MS": "2500"}
    stopping = {**PLAIN, "checkpoint_every_steps": 0, "stop_rank": 1, "stop_step": 3}
    found = host.run(2, [told_by(agent, tmp_path, **grace)] * 2, **stopping)
    assert [rank.status for rank in found] == [75, 75], found[0].err + found[1].err
    for rank in found:
        stopped = rank.event("stopped")
        assert (stopped["checkpoint_step"], stopped["stored"]) == (3, stores)
    assert agent.expect("checkpoint")["step"] == 3
    assert agent.expect("leaving")["status"] == 75, "which the launcher makes a 1 of"


def test_ranks_that_are_out_of_memory_say_so_of_the_status_of_their_launcher(
    agent: FakeAgent, host: Host, tmp_path: Path
) -> None:
    full = {**PLAIN, "full_rank": 1, "full_from": 1, "fitting": 0}
    found = host.run(2, [told_by(agent, tmp_path)] * 2, **full)
    assert [rank.status for rank in found] == [start.EXIT_OUT_OF_MEMORY] * 2, found[0].err
    word = agent.expect("leaving")
    assert word["status"] == start.EXIT_OUT_OF_MEMORY, "which the launcher makes a 1 of"
    assert "with a single sample on each rank" in word["reason"]


def test_what_one_rank_cannot_write_none_has_written(
    agent: FakeAgent, host: Host, tmp_path: Path
) -> None:
    refused = tmp_path / "staging" / f"checkpoint-{SAVED:09d}"
    refused.mkdir(parents=True)
    (refused / f".{ranges.name_of_part(1)}.partial").touch()  # where its directory would be
    found = host.run(2, [told_by(agent, tmp_path)] * 2, **PLAIN)
    assert [rank.status for rank in found] == [0, 0], found[0].err + found[1].err
    for rank in found:
        assert f"no checkpoint at step {SAVED}: rank 1: " in rank.event("warning")["message"]
    offered = [message for message in agent.rest() if message["type"] == "checkpoint"]
    assert [message["step"] for message in offered] == [STEPS]
    assert not refused.exists()
