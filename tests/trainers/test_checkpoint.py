"""A checkpoint holds the whole state, in plain files, the same bytes for the same state."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trainers import tasks
from trainers import checkpoint, loop

TASKS = pytest.mark.parametrize("make_task", [tasks.finetune_task, tasks.transfer_task])
FILES = {"frozen.safetensors", "model.safetensors", "optimizer.safetensors"} | {
    "random.safetensors",
    "state.json",
}


def trained(make_task: Callable[[], loop.Task], steps: int) -> loop.Trainer:
    made = tasks.trainer(make_task())
    made.prepare()
    for _ in range(steps):
        made.advance()
    return made


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@TASKS
def test_every_component_survives_the_files(
    make_task: Callable[[], loop.Task], tmp_path: Path
) -> None:
    live = trained(make_task, 3)
    captured = live.snapshot()
    read = tasks.as_read(tmp_path / "one", captured)
    assert tasks.differences(captured, read) == []
    other = tasks.trainer(make_task())
    other.prepare()
    assert tasks.differences(captured, other.snapshot()) != []
    other.resume(read)
    assert tasks.differences(captured, other.snapshot()) == []
    assert tasks.differences(captured, live.snapshot()) == [], "capturing changes nothing"


@TASKS
def test_the_same_state_gives_the_same_bytes_and_no_pickle(
    make_task: Callable[[], loop.Task], tmp_path: Path
) -> None:
    live = trained(make_task, 2)
    checkpoint.write(live.snapshot(), tmp_path / "one")
    checkpoint.write(live.snapshot(), tmp_path / "two")
    files = bytes_of(tmp_path / "one")
    assert files == bytes_of(tmp_path / "two")
    assert files.keys() == FILES
    for name, content in files.items():
        if name.endswith(".safetensors"):
            header_bytes = int.from_bytes(content[:8], "little")
            assert isinstance(json.loads(content[8 : 8 + header_bytes]), dict), name
        else:
            assert isinstance(json.loads(content), dict), name


def test_training_leaves_the_frozen_file_as_it_was(tmp_path: Path) -> None:
    live = trained(tasks.transfer_task, 1)
    checkpoint.write(live.snapshot(), tmp_path / "one")
    live.advance()
    checkpoint.write(live.snapshot(), tmp_path / "two")
    one, two = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "two")
    assert one["frozen.safetensors"] == two["frozen.safetensors"]
    assert len(one["frozen.safetensors"]) > len(one["model.safetensors"])
    assert {name for name in one if one[name] != two[name]} == FILES - {"frozen.safetensors"}


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    live = trained(tasks.finetune_task, 2)
    snapshot = tasks.as_read(tmp_path / "one", live.snapshot())
    assert "transformer.wte.weight" in snapshot.model
    assert "lm_head.weight" not in snapshot.model
    other = trained(tasks.finetune_task, 0)
    other.resume(snapshot)
    model = other.task.model
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")


def test_a_tensor_of_another_shape_is_refused_by_name_and_nothing_is_changed(
    tmp_path: Path,
) -> None:
    snapshot = trained(tasks.transfer_task, 1).snapshot()
    name = "head.2.3.weight"
    snapshot.model[name] = torch.zeros(3, 4)
    other = trained(tasks.transfer_task, 0)
    before = other.snapshot()
    with pytest.raises(checkpoint.CheckpointError) as refusal:
        other.resume(tasks.as_read(tmp_path / "one", snapshot))
    assert str(refusal.value) == (
        f"tensor '{name}' in model.safetensors is torch.float32 [3, 4]; "
        "the model has torch.float32 [2, 4]"
    )
    assert tasks.differences(before, other.snapshot()) == []


@pytest.mark.parametrize("part", checkpoint.TENSOR_FILES)
def test_a_missing_tensor_is_refused_by_name(part: str) -> None:
    snapshot = trained(tasks.transfer_task, 1).snapshot()
    name = next(iter(getattr(snapshot, part)))
    del getattr(snapshot, part)[name]
    with pytest.raises(checkpoint.CheckpointError, match="is missing in") as refusal:
        trained(tasks.transfer_task, 0).resume(snapshot)
    assert f"'{name}'" in str(refusal.value)
    assert f"{part}.safetensors" in str(refusal.value)


def test_a_tensor_too_many_and_another_type_are_refused() -> None:
    snapshot = trained(tasks.transfer_task, 1).snapshot()
    snapshot.frozen["extra"] = torch.zeros(1)
    with pytest.raises(checkpoint.CheckpointError, match=r"'extra' .* no place in the model"):
        trained(tasks.transfer_task, 0).resume(snapshot)
    del snapshot.frozen["extra"]
    name = next(iter(snapshot.frozen))
    snapshot.frozen[name] = snapshot.frozen[name].half()
    with pytest.raises(checkpoint.CheckpointError, match=r"torch\.float16"):
        trained(tasks.transfer_task, 0).resume(snapshot)


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_and_truncated_files_are_named(name: str, tmp_path: Path) -> None:
    checkpoint.write(trained(tasks.transfer_task, 1).snapshot(), tmp_path / "one")
    file = tmp_path / "one" / name
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} in .* is damaged"):
        checkpoint.read(tmp_path / "one")
    file.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} is missing"):
        checkpoint.read(tmp_path / "one")


def test_a_checkpoint_of_another_job_is_refused() -> None:
    snapshot = trained(tasks.transfer_task, 1).snapshot()
    with pytest.raises(checkpoint.CheckpointError, match="'tiny images', this job is 'tiny text'"):
        trained(tasks.finetune_task, 0).resume(snapshot)


def test_a_checkpoint_that_cannot_be_written_leaves_no_trace(tmp_path: Path) -> None:
    snapshot = trained(tasks.transfer_task, 1).snapshot()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError):
        checkpoint.write(snapshot, blocked / "one")
    checkpoint.write(snapshot, tmp_path / "two")
    checkpoint.write(snapshot, tmp_path / "two")
    shutil.rmtree(tmp_path / "two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
