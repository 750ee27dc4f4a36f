"""A checkpoint appears whole or not at all, at whatever instant its writer dies.

The short form of `python -m tests.trainers.torture`, which explains it: kills at system calls of
the writing of a checkpoint. That the torture would see a bad restore is shown by giving it some. A
tear that the machine's death would make cannot be made here; that everything is on disk before the
name is given shows in the order of the calls.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers import faultshim, torture
from trainers import checkpoint

KILLS = 87
"""Each call of one checkpoint at three moments; the calls are drawn from those of two."""

TORTURE_S_MAX = 200
"""It takes ten where nobody else computes."""

MEMORY = Path("/dev/shm")
"""A file system without a disk: the calls are the same, and syncing takes no time."""


@pytest.mark.timeout(2 * TORTURE_S_MAX)
def test_every_call_can_be_the_last(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.trainers.torture", "--json"),
            *("--kills", str(KILLS), "--seed", "3"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=TORTURE_S_MAX,
        env={
            **os.environ,
            "TMPDIR": str(MEMORY if MEMORY.is_dir() else tmp_path),
            "LD_PRELOAD": str(faultshim.build()),  # else it starts, and imports torch, twice
        },
    )
    assert run.returncode == 0, run.stdout + run.stderr
    count = json.loads(run.stdout)
    assert count["bad"] == []
    assert count["kills_at_calls"] == KILLS
    assert count["calls"] > 20, "the calls of a library are not seen"
    assert len(count["fired"]) == KILLS, "no call twice"


def three(root: Path) -> None:
    for step in range(3):
        torture.write_one(root, step)


def judged(root: Path, committed: int = 2) -> list[str]:
    count = torture.Count()
    torture.judge(root, committed, count)
    return count.bad


def test_a_sound_directory_is_judged_so(tmp_path: Path) -> None:
    three(tmp_path)
    assert judged(tmp_path) == []
    assert judged(tmp_path, committed=1) == [], "the kill came between the name and the report"


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "random.safetensors"])
def test_the_torture_sees_a_torn_newest_and_the_one_before_is_taken(
    name: str, tmp_path: Path
) -> None:
    three(tmp_path)
    file = tmp_path / "checkpoint-000000002" / name
    file.write_bytes(file.read_bytes()[:-3])
    bad = judged(tmp_path)
    assert any("is not whole" in sentence and name in sentence for sentence in bad)
    assert "step 2 was written, step 1 is found" in bad


def test_the_torture_sees_a_lost_one(tmp_path: Path) -> None:
    three(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-000000002")
    assert judged(tmp_path) == ["step 2 was written, step 1 is found"]
    shutil.rmtree(tmp_path / "checkpoint-000000001")
    assert "nothing can be restored" in judged(tmp_path)[0]


def test_the_torture_sees_one_altered_byte(tmp_path: Path) -> None:
    three(tmp_path)
    file = tmp_path / "checkpoint-000000002" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert judged(tmp_path) == ["step 2 differs in ['model']"]


def test_an_altered_description_is_refused_by_its_hash(tmp_path: Path) -> None:
    three(tmp_path)
    file = tmp_path / "checkpoint-000000002" / checkpoint.STATE_FILE
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(checkpoint.CheckpointError, match="the manifest is altered"):
        checkpoint.read(file.parent)


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        calls.append(("rename", str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    directory = tmp_path / "checkpoint-000000001"
    checkpoint.write(torture.snapshot_of(1), directory)
    place = calls.index(("rename", str(directory)))
    synced = [path for _, path in calls[:place]]
    assert {Path(path).name for path in synced} >= {file.name for file in directory.iterdir()}
    assert any(Path(path).parent == tmp_path for path in synced), "the directory's own entries"
    assert ("sync", str(tmp_path)) in calls[place:], "the name itself"


def test_an_older_one_of_that_name_is_set_aside_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed under its name it would for a while be the newest, and torn."""
    directory = tmp_path / "checkpoint-000000001"
    checkpoint.write(torture.snapshot_of(1), directory)
    removed: list[str] = []
    rmtree = shutil.rmtree

    def noted(path: Path, ignore_errors: bool = False) -> None:
        removed.append(Path(path).name)
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", noted)
    checkpoint.write(torture.snapshot_of(2), directory)
    assert directory.name not in removed
    assert checkpoint.read(directory).state["progress"]["step"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [directory.name]
