"""A directory outside Baton, where no agent has hashed anything: who finds a bit of it altered
takes the one before, and says so; of several ranks all do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import baton_sdk
from tests.trainers import tasks
from tests.trainers.forking import Ended
from tests.trainers.gang import Host
from trainers import checkpoint, loop, manifest

STEPS = 4
GANG: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "checkpoint_every_steps": 2,
    "checkpoint_every_s": 0,
    "collective_timeout_s": 60.0,
}


def alter(file: Path) -> None:
    """One bit of the last tensor; the header is as it was."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def train(directory: Path, *, steps: int = STEPS) -> loop.Trainer:
    options = replace(
        tasks.OPTIONS,
        steps=steps,
        checkpoint_directory=str(directory),
        checkpoint_every_steps=2,
        checkpoint_every_s=0.0,
    )
    trainer = loop.Trainer(tasks.transfer_task(), options, baton_sdk.Session({}))
    assert trainer.run() == 0
    return trainer


@pytest.mark.parametrize("part", ["frozen", "model", "optimizer", "random"])
def test_every_file_is_looked_at(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(tmp_path)
    alter(tmp_path / f"checkpoint-{STEPS:09d}" / f"{part}.safetensors")
    capsys.readouterr()
    again = train(tmp_path)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (warning,) = [line["message"] for line in lines if line["event"] == "warning"]
    assert f"{part}.safetensors in " in warning
    assert warning.endswith("is altered: its bytes are not those of the manifest; taking the one"
                            " before it")  # fmt: skip
    (resumed,) = [line for line in lines if line["event"] == "resumed"]
    assert resumed["step"] == 2
    assert tasks.differences(straight.snapshot(), again.snapshot()) == []


def test_the_chain_of_parents_is_that_of_the_files(tmp_path: Path) -> None:
    """The hashes of files are part of what is sealed."""
    train(tmp_path)
    first, second = (
        json.loads((tmp_path / f"checkpoint-{step:09d}" / manifest.FILE).read_text())
        for step in (2, STEPS)
    )
    assert second[manifest.KEY]["parent"] == first[manifest.HASH_KEY]
    assert sorted(first[manifest.KEY]["files"]) == [
        f"{part}.safetensors" for part in sorted(checkpoint.TENSOR_FILES)
    ]


def test_what_an_agent_hashes_is_not_hashed_twice(tmp_path: Path) -> None:
    trainer = tasks.trainer(tasks.transfer_task())
    trainer.prepare()
    checkpoint.write(trainer.snapshot(), tmp_path / "one")
    trainer.close()
    assert manifest.load(tmp_path / "one")[0].files == {}


def test_all_ranks_take_the_one_before_what_one_of_them_finds_altered(
    host: Host, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    straight = host.run(2, **GANG, checkpoint_directory=str(kept))
    assert [rank.status for rank in straight] == [0, 0], straight[1].err
    alter(kept / f"checkpoint-{STEPS:09d}" / "rank-00001" / manifest.file_name("model", rows=True))
    again = host.run(2, **GANG, checkpoint_directory=str(kept))
    assert [rank.status for rank in again] == [0, 0], again[1].err
    assert "taking the one before it" in again[0].event("warning")["message"]
    assert resumed_at(again[0]) == 2


def resumed_at(rank: Ended) -> int:
    step = rank.event("resumed")["step"]
    assert isinstance(step, int)
    return step
