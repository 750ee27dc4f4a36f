"""Checkpoints that several nodes have written: who hands over which files, what of them is torn,
and how parts become one directory again. Files and pure functions only; with the real Trainer in
`test_hook_ranks.py`.
"""

import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import baton_sdk
from baton_hook import guard, resume, shards, states, torn
from baton_hook import trainer as bridge
from baton_hook.shards import Said, Share
from tests.trainers.test_hook_files import cut, make_checkpoint

FOLDER = "pytorch_model_fsdp_0"
INDEX = f"{FOLDER}/.metadata"
COMMON = (INDEX, "trainer_state.json")


def shard(rank: int) -> str:
    return f"{FOLDER}/__{rank}_0.distcp"


def make_sharded(directory: Path, step: int, ranks: int) -> Path:
    """As FSDP leaves it where all ranks have one directory."""
    made = make_checkpoint(directory, step)
    (made / "model.safetensors").unlink()
    (made / FOLDER).mkdir()
    for rank in range(ranks):
        with zipfile.ZipFile(made / shard(rank), "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80" * 5_000)
        (made / states.name_of(rank)).write_bytes(b"\x80" * 10)
    # Like torch's: objects whose names of files are among other things, more than once.
    index = {"a": [SimpleNamespace(relative_path=Path(shard(n)).name) for n in (*range(ranks), 0)]}
    (made / INDEX).write_bytes(pickle.dumps(index))
    return made


def divide(seen: Sequence[tuple[int, tuple[str, ...] | None]], parts: int) -> list[Share]:
    """What each process hands over, by its rank of Baton's and what it sees."""
    said = [Said(*one) for one in seen]
    first = shards.decode(shards.encode(said[0]))
    others = [shards.decode(shards.encode(one.besides(first))) for one in said]
    return [shards.divide(first, others, process, parts) for process in range(len(said))]


def paths(shares: Sequence[Share]) -> list[list[str]]:
    return [sorted(share.paths) for share in shares]


def test_each_node_hands_over_its_own_and_the_first_what_all_have() -> None:
    shares = divide([(0, (*COMMON, shard(0))), (1, ("trainer_state.json", shard(1)))], 2)
    assert paths(shares) == [sorted((*COMMON, shard(0))), [shard(1)]]
    assert [(share.parts, share.speaks) for share in shares] == [(2, True)] * 2
    assert shares[0].all_paths == {*COMMON, shard(0), shard(1)}


def test_ranks_of_one_node_hand_over_nothing_twice() -> None:
    """Two on each: all have to hand over a part, and the second of them has nothing more."""
    here, there = (*COMMON, shard(0), shard(1)), (shard(2), shard(3))
    shares = divide([(0, here), (1, here), (2, there), (3, there)], 4)
    assert paths(shares) == [sorted(here), [], [*there], []]
    assert [(share.parts, share.speaks) for share in shares] == [(4, True)] * 4


def test_processes_below_launchers_are_one_part_each() -> None:
    here, there = (*COMMON, shard(0), shard(1)), (shard(2), shard(3))
    shares = divide([(0, here), (0, here), (1, there), (1, there)], 2)
    assert paths(shares) == [sorted(here), [], [*there], []]
    assert [share.speaks for share in shares] == [True, False, True, False]
    assert {share.parts for share in shares} == {2}


@pytest.mark.parametrize("parts", [1, 2])
def test_what_the_first_sees_is_whole(parts: int) -> None:
    """One node, or a directory that all nodes see, whatever a slow file system hides from others;
    DDP, whose other ranks have random states only."""
    last = parts - 1
    shares = divide([(0, (*COMMON, shard(0), shard(1))), (last, (shard(1),)), (last, ())], parts)
    assert [(share.parts, share.speaks) for share in shares] == [(1, n == 0) for n in range(3)]


@pytest.mark.parametrize(
    ("seen", "parts", "sentence"),
    [
        ([(0, COMMON), (1, None)], 2, "process 1 cannot look at what it has saved"),
        ([(0, None), (1, (shard(1),))], 2, "process 0 cannot look at what it has saved"),
        ([(0, COMMON), (0, (shard(1),))], 1, f"process 1 alone sees {shard(1)}"),
        ([(0, COMMON), (1, (shard(1),))], 3, "processes of 2 ranks have saved, and there are 3"),
    ],
)
def test_what_cannot_be_brought_together_is_refused_by_all(
    seen: list[tuple[int, tuple[str, ...] | None]], parts: int, sentence: str
) -> None:
    said = [Said(*one) for one in seen]
    others = [one.besides(said[0]) for one in said]
    for process in range(len(said)):
        with pytest.raises(shards.Scattered, match=sentence):
            shards.divide(said[0], others, process, parts)


def test_what_an_earlier_attempt_left_is_not_of_this_save(tmp_path: Path) -> None:
    saved = make_sharded(tmp_path, 3, 2)
    (saved / "older.bin").write_bytes(b"older")
    before = shards.look(saved)
    assert states.name_of(0) not in before
    assert shards.written(saved, before) == ()
    (saved / shard(0)).write_bytes(b"new, in place")
    os.utime(saved / shard(0), ns=(1, 1))  # whatever the clock said
    (saved / "trainer_state.json").rename(saved / "away")
    (saved / "trainer_state.json").write_bytes((saved / "away").read_bytes())
    (saved / states.name_of(0)).write_bytes(b"new")
    assert shards.written(saved, before) == ("away", shard(0), "trainer_state.json")
    assert shards.written(saved, {}) == tuple(sorted(shards.look(saved)))
    assert shards.written(tmp_path / "nothing", {}) == ()


def test_too_many_files_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = make_sharded(tmp_path, 3, 2)
    monkeypatch.setattr(shards, "FILES_MAX", len(shards.look(saved)) - 1)
    with pytest.raises(shards.Scattered, match="has more than 4 files"):
        shards.look(saved)


def test_a_shard_that_nobody_has_written_is_not_handed_over(tmp_path: Path) -> None:
    saved = make_sharded(tmp_path, 3, 2)
    own = frozenset((INDEX, shard(0)))
    shards.check(saved, Share(2, own, own | {shard(1)}))
    with pytest.raises(torn.Torn, match=f"{INDEX} names __1_0.distcp, which no rank has written"):
        shards.check(saved, Share(2, own, own))


def test_one_nodes_part_is_passed_over_and_left_for_trainer_to_rotate(tmp_path: Path) -> None:
    """DeepSpeed resumes without its optimizer where shards are missing, and says nothing."""
    older, newer = (make_sharded(tmp_path, step, 2) for step in (3, 6))
    shards.mark(newer, Share(2, frozenset(), frozenset(), speaks=False))
    assert torn.problem(newer) == ""
    assert torn.PART_NAME not in shards.look(newer)
    for asked in (True, str(newer)):
        assert resume.choose(asked, tmp_path, None, may_move=True).answer == str(older)
    assert newer.is_dir()
    resume.link_tree(newer, tmp_path / "linked")
    assert not torn.is_part(tmp_path / "linked")
    # The same step is saved again, and now all ranks are on this node.
    shards.mark(newer, Share(1, frozenset(), frozenset(), speaks=False))
    assert torn.is_part(newer)
    shards.mark(newer, Share(1, frozenset(), frozenset()))
    assert resume.choose(True, tmp_path, None, may_move=True).answer == str(newer)


def test_every_tear_of_shards_is_recognised(tmp_path: Path) -> None:
    made = make_sharded(tmp_path, 3, 2)
    assert torn.problem(made) == ""
    cut(made / shard(1))
    assert "__1_0.distcp is cut short" in torn.problem(made)
    (made / shard(1)).unlink()
    assert torn.problem(made) == f"{INDEX} names __1_0.distcp, which is missing"
    (made / INDEX).unlink()
    assert torn.problem(made) == f"{FOLDER} has shards and no .metadata"


# --- restored parts ------------------------------------------------------------------------------


def lay_out_parts(tmp_path: Path, step: int) -> Path:
    """As the agent does for two ranks."""
    saved = make_sharded(tmp_path, step, 2)
    parts = tmp_path / "restore"
    other = parts / "rank-00001" / FOLDER
    other.mkdir(parents=True)
    (saved / shard(1)).rename(other / Path(shard(1)).name)
    saved.rename(parts / "rank-00000")
    (parts / "rank-00000" / resume.MARK_NAME).write_text('{"version": 1, "call": 1}')
    (parts / "rank-00001" / resume.MARK_NAME).write_text('{"version": 1, "call": 9}')
    return parts


def test_parts_are_put_together_and_the_first_counts(tmp_path: Path) -> None:
    parts = lay_out_parts(tmp_path, 3)
    for _ in range(2):  # of two processes one is later
        together = resume.put_together(parts, tmp_path)
        assert torn.problem(together) == ""
        assert resume.committed(together, 1) == resume.Found(together, 3)
    assert resume.put_together(parts / "rank-00000", tmp_path) == parts / "rank-00000"


def restored_with_best(tmp_path: Path) -> resume.Found:
    """Step 6, with step 3 as the best."""
    parts = lay_out_parts(tmp_path, 6)
    (parts / "rank-00000" / resume.BEST_NAME).mkdir()
    make_sharded(parts / "rank-00000" / resume.BEST_NAME, 3, 2)
    return resume.Found(resume.put_together(parts, tmp_path), 6)


@pytest.mark.parametrize("left", ["part", "part_elsewhere", "torn", "other_is_faster"])
def test_what_is_not_whole_gives_way_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """The best one, on a node where a rank has stayed, or where an earlier attempt has died."""
    restored, output = restored_with_best(tmp_path), tmp_path / "output"
    own = make_sharded(output, 3, 2)
    cut(own / shard(1))
    if left != "torn":
        (own / torn.PART_NAME).touch()
    if left == "part_elsewhere":
        own.rename(tmp_path / "elsewhere")
        own.symlink_to(tmp_path / "elsewhere")
    if left == "other_is_faster":  # another rank of this node, since we have looked
        is_part = torn.is_part

        def interrupted(target: Path) -> bool:
            found = is_part(target)
            if found:
                monkeypatch.setattr(torn, "is_part", is_part)
                shutil.rmtree(target)
            return found

        monkeypatch.setattr(torn, "is_part", interrupted)
    resume.lay_out(restored, output)
    assert not torn.is_part(own)
    assert [torn.problem(output / f"checkpoint-{step}") for step in (3, 6)] == ["", ""]
    kept = {"torn-checkpoint-3"} if left == "torn" else set()
    assert {path.name for path in output.iterdir()} == {"checkpoint-3", "checkpoint-6", *kept}
    assert (tmp_path / "elsewhere").is_dir() is (left == "part_elsewhere")


def test_a_best_one_that_lacks_a_part_is_not_laid_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank handed over nothing of it. Trainer goes on without the best one, and raises in the end
    over one that it cannot load."""
    restored, output = restored_with_best(tmp_path), tmp_path / "output"
    (restored.path / resume.BEST_NAME / "checkpoint-3" / shard(1)).unlink()
    resume.lay_out(restored, output)
    assert [path.name for path in output.iterdir()] == ["checkpoint-6"]
    assert f"{INDEX} names __1_0.distcp, which is missing" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_best_one_of_deepspeed_that_lacks_a_part_is_not_laid_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: int
) -> None:
    """It writes no list of its shards, so those of the later one say what there has to be."""
    restored, output = restored_with_best(tmp_path), tmp_path / "output"
    best = restored.path / resume.BEST_NAME / "checkpoint-3"
    names = ["mp_rank_00_model_states.pt"]
    names += [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    for folder in (restored.path / "global_step6", best / "global_step3"):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"\x80")
    resume.lay_out(restored, tmp_path / "whole")
    assert (tmp_path / "whole/checkpoint-3").is_dir()
    (best / "global_step3" / names[lost]).unlink()
    resume.lay_out(restored, output)
    assert [path.name for path in output.iterdir()] == ["checkpoint-6"]
    sentence = f"checkpoint-3 was restored, and is no use: {names[lost]} is missing"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("lost", [shard(1), ""])
def test_no_checkpoint_is_lost_over_the_best_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    """Of which the script has removed something meanwhile, or whose copy fills the disk."""
    best, saved = (make_sharded(tmp_path / "output", step, 2) for step in (3, 6))
    handed: list[tuple[Path, int]] = []

    def take(staged: Path, step: int, parts: int) -> None:
        handed.append((staged, parts))

    session = SimpleNamespace(staging_directory=tmp_path / "staging", rank=1, checkpoint=take)
    followed = bridge.Bridge(bridge.Program(), session)  # type: ignore[arg-type]
    arguments = SimpleNamespace(output_dir=str(tmp_path / "output"), load_best_model_at_end=True)
    for step in (3, 6):
        share = Share(2, frozenset((shard(1),)), frozenset((shard(0), shard(1))))
        state = SimpleNamespace(
            global_step=step, best_global_step=3, best_model_checkpoint=str(best),
            is_world_process_zero=False,
        )  # fmt: skip
        followed.hand_over(arguments, state, share, [])
        if step == 3 and lost:
            (best / lost).unlink()
    ((_, _), (staged, parts)) = handed
    assert parts == 2
    assert (staged / shard(1)).samefile(saved / shard(1))
    assert (staged / resume.BEST_NAME / "checkpoint-3").is_dir() is not bool(lost)
    assert ("does not come along" in capsys.readouterr().err) is bool(lost)


def status_of_choosing(parts: Path, staging: Path) -> object:
    """Of a rank that leaves before it trains."""
    said: list[object] = []
    session = SimpleNamespace(
        restore_directory=parts,
        restore_step=3,
        staging_directory=staging,
        leaving=lambda status, _reason: said.append(status),
        close=lambda: None,
    )
    arguments = SimpleNamespace(output_dir=str(staging), local_process_index=0, world_size=1)
    followed = bridge.Bridge(bridge.Program(), session)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as left:
        followed.choose(arguments, None)
    assert said == [left.value.code]
    return left.value.code


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_no_fault_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    """Two failures from a checkpoint set it aside (`coordinator/core/poison.py`)."""
    parts = lay_out_parts(tmp_path, 3)
    monkeypatch.setattr(guard, "_said", set())
    with monkeypatch.context() as broken:

        def link(_source: Path, target: Path) -> None:
            raise OSError(code, os.strerror(code), str(target))

        broken.setattr(resume, "_link", link)
        assert status_of_choosing(parts, tmp_path) == baton_sdk.EXIT_RUN_AGAIN
    assert os.strerror(code) in capsys.readouterr().err
    # Another rank's disk, and this one's is in order.
    monkeypatch.setattr("baton_hook.ranks.highest", lambda _, numbers: (*numbers[:-1], 1))
    assert status_of_choosing(parts, tmp_path) == baton_sdk.EXIT_RUN_AGAIN


def test_parts_without_a_shard_end_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What begins again from nothing would leave what an older checkpoint holds; one that fails is
    given the older one (`coordinator/core/poison.py`)."""
    parts = lay_out_parts(tmp_path, 3)
    (parts / "rank-00001" / shard(1)).unlink()
    monkeypatch.setattr(guard, "_said", set())
    assert status_of_choosing(parts, tmp_path) == 1
    sentence = f"the committed checkpoint of step 3 is no use: {INDEX} names __1_0.distcp, which"
    assert sentence in capsys.readouterr().err
