"""Torn checkpoints of Hugging Face's Trainer, and which checkpoint a training continues from.

All of it is decided by files alone, so these tests make files: whole ones that nobody could train
with, and what a kill or a power cut leaves of them.
"""

import errno
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from baton_hook import guard, resume, torn
from baton_hook import trainer as bridge


def safetensors(data_bytes: int) -> bytes:
    """One tensor of so many bytes."""
    entry = {"dtype": "U8", "shape": [data_bytes], "data_offsets": [0, data_bytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(data_bytes)


def make_checkpoint(directory: Path, step: int) -> Path:
    """As Trainer leaves it, with nothing in it that anybody could train with."""
    made = directory / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(safetensors(5_000))
    with zipfile.ZipFile(made / "optimizer.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80" * 5_000)
    (made / torn.STATE_NAME).write_text(json.dumps({"global_step": step}))
    return made


def cut(path: Path) -> None:
    """What a power cut leaves: the name, and a part of the bytes."""
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    """Or the size, and no bytes."""
    path.write_bytes(bytes(path.stat().st_size))


TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "killed before the state was written": (
        lambda d: (d / torn.STATE_NAME).unlink(), "trainer_state.json is missing"),
    "a short state": (lambda d: cut(d / torn.STATE_NAME), "trainer_state.json is cut short"),
    "an empty state": (
        lambda d: (d / torn.STATE_NAME).write_bytes(b""), "trainer_state.json is cut short"),
    "a state of something else": (
        lambda d: (d / torn.STATE_NAME).write_text("{}"), "does not say its step"),
    "short weights": (lambda d: cut(d / "model.safetensors"), "and its header says 5"),
    "weights of zeros": (lambda d: zeroed(d / "model.safetensors"), "model.safetensors"),
    "empty weights": (
        lambda d: (d / "model.safetensors").write_bytes(b""), "has 0 bytes, fewer than its header"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "there are no weights"),
    "a short optimizer": (lambda d: cut(d / "optimizer.pt"), "optimizer.pt is cut short"),
    "an optimizer of zeros": (lambda d: zeroed(d / "optimizer.pt"), "is no file of torch.save"),
    "a missing shard": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
        ), "which is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEARS)
def test_every_tear_is_recognised(tmp_path: Path, name: str) -> None:
    made = make_checkpoint(tmp_path, 3)
    assert torn.problem(made) == ""
    tear, sentence = TEARS[name]
    tear(made)
    assert sentence in torn.problem(made)


def test_foreign_files_and_old_formats_are_no_tears(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, 3)
    (made / "scheduler.pt").write_bytes(b"\x80\x02old pickles have no end that shows")
    (made / "merges.bin").write_bytes(bytes(9))
    (made / "model.safetensors").rename(made / "adapter_model.safetensors")
    assert torn.problem(made) == ""
    (made / "optimizer.pt").unlink()  # save_only_model
    assert torn.problem(made) == ""


def test_the_newest_whole_one_is_found_behind_two_torn_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (9, 10, 11):
        make_checkpoint(tmp_path, step)
    cut(tmp_path / "checkpoint-11" / "optimizer.pt")
    (tmp_path / "checkpoint-10" / torn.STATE_NAME).unlink()
    (tmp_path / "torn-checkpoint-11").mkdir()  # of an earlier accident
    chosen = resume.choose(True, tmp_path, None, may_move=True)
    assert chosen.answer == str(tmp_path / "checkpoint-9")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-9", "torn-checkpoint-10", "torn-checkpoint-11", "torn-checkpoint-11-2",
    ]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert "checkpoint-11 is torn (optimizer.pt is cut short: File is not a zip file)" in said[0]
    assert "checkpoint-10 is torn (trainer_state.json is missing)" in said[1]


def test_one_of_several_processes_renames(tmp_path: Path) -> None:
    cut(make_checkpoint(tmp_path, 4) / "optimizer.pt")
    make_checkpoint(tmp_path, 2)
    chosen = resume.choose(True, tmp_path, None, may_move=False)
    assert chosen.answer == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-4").is_dir()


@pytest.mark.parametrize(
    ("asked", "local", "restored", "wanted"),
    [
        (None, 9, None, None),  # the script wants a fresh start, and this is the first
        (None, 9, 6, "restored"),
        (False, None, 6, "restored"),
        (True, None, 6, "restored"),  # a new node
        (True, 9, 6, "local"),  # saved here, and not committed any more
        (True, 4, 6, "restored"),  # from before the job moved away
        (True, 6, 6, "restored"),
        (True, None, None, True),  # Trainer's own error is right
        ("checkpoint-4", 4, 6, "restored"),
        ("checkpoint-9", 9, 6, "local"),
        ("checkpoint-9", None, 6, "restored"),
        ("checkpoint-9", None, None, "path"),
    ],
)
def test_the_higher_step_wins(
    tmp_path: Path, asked: Any, local: int | None, restored: int | None, wanted: Any
) -> None:
    output = tmp_path / "output"
    mine = make_checkpoint(output, local) if local else None
    theirs = make_checkpoint(tmp_path, restored) if restored else None
    found = resume.committed(theirs, 0)
    assert (found is None) == (restored is None)
    if isinstance(asked, str):
        asked = str(output / asked)
    answers = {"local": str(mine), "restored": str(theirs), "path": asked}
    chosen = resume.choose(asked, output, found, may_move=True)
    assert chosen.answer == (answers[wanted] if isinstance(wanted, str) else wanted)
    begins = {"local": local, "restored": restored}
    nothing = resume.UNKNOWN if wanted else 0
    assert chosen.step == (begins.get(wanted, nothing) if isinstance(wanted, str) else nothing)


def test_all_torn_means_from_the_beginning(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 4)
    (path / torn.STATE_NAME).unlink()
    chosen = resume.choose(str(path), tmp_path, None, may_move=True)
    assert chosen.answer is None
    assert "starts from the beginning" in chosen.sentence


@pytest.mark.parametrize("named", [False, True])
def test_what_was_set_aside_is_no_error_later(tmp_path: Path, named: bool) -> None:
    """Neither for the next process on this machine nor for the next attempt."""
    path = make_checkpoint(tmp_path, 4)
    cut(path / "model.safetensors")
    asked = path if named else True
    first = resume.choose(asked, tmp_path, None, may_move=True)
    assert not path.exists()
    for may_move in (False, True):
        assert resume.choose(asked, tmp_path, None, may_move=may_move) == first
    assert (first.answer, first.step) == (None, 0)
    other = tmp_path / "checkpoint-5"  # of which there is no trace
    assert resume.choose(other, tmp_path, None, may_move=True).answer == other


def test_all_processes_find_the_one_before_a_named_one_that_was_set_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    path = tmp_path / "checkpoint-4"
    cut(path / "model.safetensors")
    for may_move in (True, False):
        chosen = resume.choose(path, tmp_path, None, may_move=may_move)
        assert chosen.answer == str(tmp_path / "checkpoint-2")


def test_a_named_torn_checkpoint_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    path = tmp_path / "checkpoint-4"
    cut(path / "model.safetensors")
    chosen = resume.choose(path, tmp_path, None, may_move=True)
    assert chosen.answer == str(tmp_path / "checkpoint-2")


def test_a_rank_that_cannot_search_takes_the_committed_one_like_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(_: Path) -> list[Path]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    said: list[tuple[int, ...]] = []

    def highest(_: object, numbers: tuple[int, ...]) -> tuple[int, ...]:
        said.append(numbers)
        return numbers

    monkeypatch.setattr(guard, "_said", set())
    monkeypatch.setattr("baton_hook.ranks.highest", highest)
    restored = make_checkpoint(tmp_path, 100)
    session: Any = SimpleNamespace(restore_directory=restored, staging_directory=tmp_path)
    args = SimpleNamespace(output_dir=str(tmp_path / "output"), local_process_index=0, world_size=1)
    one, other = (bridge.Bridge(bridge.Program(), session) for _ in range(2))
    assert one.choose(args, True) == str(restored)
    monkeypatch.setattr(torn, "numbered", stale)
    assert other.choose(args, True) == str(restored)
    assert said[0] == said[1]  # so there is nothing for them to settle
    assert "looking for the script's checkpoints failed" in capsys.readouterr().err
    session.restore_directory = None
    assert other.choose(args, True) is True
    assert said[2][0] == resume.UNKNOWN


def test_a_tree_is_linked_and_links_are_followed(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path, 4)
    (source / "link").symlink_to(source / "optimizer.pt")
    resume.link_tree(source, tmp_path / "copy")
    assert (tmp_path / "copy/optimizer.pt").stat().st_ino == (source / "optimizer.pt").stat().st_ino
    assert not (tmp_path / "copy/link").is_symlink()
    assert (tmp_path / "copy/link").read_bytes() == (source / "optimizer.pt").read_bytes()


def test_two_nodes_lay_out_into_one_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other begins and ends while this one is at its last file."""
    found = resume.committed(make_checkpoint(tmp_path / "restore", 4), 0)
    assert found is not None
    output = tmp_path / "output"
    names = iter(("node-a", "node-b"))
    monkeypatch.setattr("socket.gethostname", lambda: next(names))
    rename = Path.rename
    turns: list[Path] = []

    def interrupted(self: Path, target: Path) -> Path:
        turns.append(self)
        if len(turns) == 1:
            resume.lay_out(found, output)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    resume.lay_out(found, output)
    assert len(set(turns)) == 2
    assert [path.name for path in output.iterdir()] == ["checkpoint-4"]
    laid = {path.name for path in (output / "checkpoint-4").iterdir()}
    assert laid == {path.name for path in found.path.iterdir()}
