"""Unmodified `Trainer` scripts of several ranks, most of which see nothing of another's files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton_hook import agreement, ranks, resume, states, torn, versions
from baton_hook import trainer as bridge
from tests.trainers import forking
from tests.trainers.test_hook import EVERY, STEPS

RANKS = 2
RANKS_S_MAX = 200
STOPPED_AT = 5
FOLDERS = ("pytorch_model_fsdp_0", "optimizer_0")
"""Where FSDP's shards are in a checkpoint."""

pytestmark = [pytest.mark.timeout(2 * RANKS_S_MAX + 20), pytest.mark.xdist_group("hook-ranks")]
"""One host."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forking.Host]:
    plays = tmp_path_factory.mktemp("plays")
    with forking.Host(plays, "tests.trainers.hook_rank", RANKS_S_MAX) as made:
        yield made


def play(
    host: forking.Host, name: str, tmp_path: Path, local_ranks: tuple[int, ...] = (0,) * RANKS
) -> list[tuple[dict[str, Any], str]]:
    """What each rank of a play of `hook_rank` has told, and said on stderr."""
    common = {"PLAY": name, "PLAY_DIRECTORY": str(tmp_path)}
    ranks = host.run_in(host.place(), [{**common, "LOCAL_RANK": str(n)} for n in local_ranks])
    for rank in ranks:
        assert rank.status == 0, rank.err
    return [(json.loads(rank.out.splitlines()[-1]), rank.err) for rank in ranks]


def test_ranks_on_two_nodes_go_on_bit_for_bit(host: forking.Host, tmp_path: Path) -> None:
    """Each with its own random numbers: a dropout that begins anew is another training."""
    wanted = dict.fromkeys(("done", "weights", "losses", "draws"), True)
    for told, err in play(host, "stopped", tmp_path):
        assert told == {"status": 75, **wanted}, err
    handed = {path.name for path in (tmp_path / "handed").iterdir()}
    assert {states.name_of(rank) for rank in range(RANKS)} <= handed
    assert not (tmp_path / "node-0" / "first" / "checkpoint-5" / states.name_of(1)).exists()


def test_shards_on_two_nodes_go_on_bit_for_bit(host: forking.Host, tmp_path: Path) -> None:
    """Each node has half of the model and of the optimizer, and nobody has the whole."""
    wanted = dict.fromkeys(("done", "weights", "best", "losses", "draws"), True)
    for told, err in play(host, "sharded", tmp_path):
        assert told == {"status": 75, "parts": RANKS, **wanted}, err
        assert f"stopped after step {STOPPED_AT}, with its checkpoint" in err
    for rank in range(RANKS):
        part = tmp_path / "handed" / f"rank-{rank:05d}"
        shards_there = {path.relative_to(part).as_posix() for path in part.rglob("*.distcp")}
        best = f"{resume.BEST_NAME}/checkpoint-{EVERY}/"
        own = [f"{folder}/__{rank}_0.distcp" for folder in FOLDERS]
        assert shards_there == {*own, *(best + shard for shard in own)}
        random_states = {states.name_of(other) for other in range(RANKS)} if rank == 0 else set()
        assert {path.name for path in part.glob("rng_state_*")} == random_states
        assert (part / "trainer_state.json").exists() is (rank == 0)
        saved = tmp_path / f"node-{rank}" / "before"
        assert [torn.is_part(path) for path in torn.numbered(saved)] == [True] * 3


def test_shards_in_one_directory_are_one_checkpoint(host: forking.Host, tmp_path: Path) -> None:
    (first, _), (second, _) = play(host, "sharded_on_one_node", tmp_path, (0, 1))
    shards_there = [f"{folder}/__{rank}_0.distcp" for folder in FOLDERS[::-1] for rank in (0, 1)]
    assert first == {"status": 75, "parts": [1, 1, 1], "shards": shards_there}
    assert second == {"status": 75, "parts": [], "shards": []}


def test_what_one_node_alone_has_is_not_resumed_from(host: forking.Host, tmp_path: Path) -> None:
    """Nor is the other rank left with a script that finds nothing, which Trainer refuses."""
    own = ([f"checkpoint-{3 * EVERY}"], [f"checkpoint-{STEPS}"])
    for rank, (told, err) in enumerate(play(host, "newer", tmp_path)):
        expected = [own[0], own[1]] if rank == 0 else [[], []]
        assert [told[name]["own"] for name in ("committed", "nothing")] == expected, err
        assert [told[name]["began"] for name in ("committed", "nothing")] == [2 * EVERY, 0], err
        assert told["committed"]["same"], err
        assert told["nothing"]["same"], err
        said = [line for line in err.splitlines() if "would begin after" in line]
        steps = f"the ranks would begin after different steps, {2 * EVERY} to {3 * EVERY}"
        assert said == [
            f"baton_hook: resuming from step {2 * EVERY}, the last committed checkpoint: {steps}",
            "baton_hook: training starts from the beginning: the ranks would begin after different"
            f" steps, 0 to {STEPS}, and no committed one is there for all",
        ]
        assert "resuming from" not in err.replace(said[0], "")


@pytest.mark.parametrize(
    ("name", "local_ranks"), [("torn_on_one_node", (0, 1)), ("torn_on_one_of_two", (0, 0))]
)
def test_where_all_is_torn_every_rank_starts_from_the_beginning(
    host: forking.Host, tmp_path: Path, name: str, local_ranks: tuple[int, ...]
) -> None:
    """Once one rank has set it aside, another finds nothing that it could call torn."""
    for told, err in play(host, name, tmp_path, local_ranks):
        assert told == {"began": 0, "done": True}, err
        assert "training starts from the beginning" in err


def test_where_one_rank_is_left_alone_all_are(host: forking.Host, tmp_path: Path) -> None:
    """What ranks decide together would wait for it for ever; so would hooks of two versions."""
    (first, first_err), (second, second_err) = play(host, "alone", tmp_path)
    assert first == second == {"statuses": [76, 76], "done": True, "handed_over_count": 0}
    spoken = f"speak different protocols, {versions.PROTOCOL} on n1, {versions.PROTOCOL + 1} on n2"
    for err in (first_err, second_err):
        assert f"the hooks of this job's ranks {spoken}: upgrade the agent on n1\n" in err
    assert "upgrade the agents on the other nodes of this job\n" in first_err
    assert "the script talks to Baton itself" in first_err
    assert "another rank's Trainer is left alone, so this one is as well" in second_err


@pytest.mark.parametrize(
    ("steps", "committed", "begun"),
    [
        ((120, 100), (100, 100), (100, 100)),
        ((120, 0), (None, None), (0, 0)),
        ((120, 100), (None, 100), (0, 0)),  # one agent could not lay it out
        ((120, 100), (90, 100), (0, 0)),
        ((120, 120), (100, 100), (120, 120)),
        ((0, 0), (None, None), (0, 0)),
        ((100, resume.UNKNOWN), (100, 100), (100, 100)),
        ((100, resume.UNKNOWN), (100, None), (0, 0)),
        ((0, resume.UNKNOWN), (None, None), (0, 0)),
        ((resume.UNKNOWN,) * 2, (100, None), (resume.UNKNOWN,) * 2),
        ((100,), (None,), (100,)),
    ],
)
def test_ranks_conclude_the_same(
    steps: tuple[int, ...], committed: tuple[int | None, ...], begun: tuple[int, ...]
) -> None:
    owns = [resume.Choice(f"own/checkpoint-{step}", step) for step in steps]
    restored = [None if step is None else resume.Found(Path("in"), step) for step in committed]
    ranks = [agreement.numbers_of(*rank) for rank in zip(owns, restored, strict=True)]
    highest = [max(numbers) for numbers in zip(*ranks, strict=True)]
    chosen = [
        agreement.conclude(own, found, highest) for own, found in zip(owns, restored, strict=True)
    ]
    assert tuple(choice.step for choice in chosen) == begun
    for own, choice in zip(owns, chosen, strict=True):
        differ = len({*steps}) > 1
        assert (choice == own) is not differ
        answer = "in" if begun[0] else None
        assert choice.answer == (answer if differ else own.answer)
        assert bool(choice.sentence) is differ


def test_where_hooks_differ_the_older_nodes_are_named() -> None:
    words = [b'["n1", 2]', b'["n2", 1]', b'["n2", 1]', b'["n3", 2]', b'["n4", 1]']
    spoken = "2 on n1, 1 on n2, 2 on n3, 1 on n4"
    assert versions.problem(words) == (
        f"the hooks of this job's ranks speak different protocols, {spoken}: upgrade the agent on"
        " n2 and n4"
    )
    assert versions.problem(words[1:3]) == versions.problem([versions.second_word("n1")]) == ""


def test_a_group_of_one_is_ended_with_the_program_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group: Any = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    with monkeypatch.context() as patched:
        patched.setattr(group, "get_world_size", lambda: RANKS)
        ranks.end_group_of_one()
    assert group.is_initialized()
    at_exit: list[object] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.delenv("BATON_SOCKET", raising=False)
    with monkeypatch.context() as patched:
        patched.setattr("signal.signal", lambda *_: None)
        bridge.Program().begin()
    assert ranks.end_group_of_one in at_exit
    for _ in range(2):
        ranks.end_group_of_one()
    assert not group.is_initialized()


def test_states_that_are_not_there_or_too_large_are_left_out(tmp_path: Path) -> None:
    assert states.read(tmp_path, 1) == b""
    (tmp_path / states.name_of(1)).write_bytes(b"x" * (states.BYTES_MAX + 1))
    assert states.read(tmp_path, 1) == b""
    (tmp_path / states.name_of(0)).write_bytes(b"own")
    states.add([b"", b"", b"two"], tmp_path)
    assert states.read(tmp_path, 0) == b"own"
    assert states.read(tmp_path, 2) == b"two"


def test_a_state_of_an_earlier_attempt_gives_way_and_is_not_written_into(tmp_path: Path) -> None:
    """Rank 1 ran on this node then; what the script has keeps its bytes."""
    saved = tmp_path / "checkpoint-100"
    saved.mkdir()
    (saved / states.name_of(0)).write_bytes(b"new 0")
    (saved / states.name_of(1)).write_bytes(b"old 1")
    staged = tmp_path / "staged"
    resume.link_tree(saved, staged)
    states.add([b"new 0", b"new 1"], staged)
    assert [states.read(staged, rank) for rank in range(RANKS)] == [b"new 0", b"new 1"]
    assert states.read(saved, 1) == b"old 1"
    assert len(list(staged.iterdir())) == RANKS
