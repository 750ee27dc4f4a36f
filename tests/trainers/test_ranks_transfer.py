"""`transfer` on several ranks: each has a frozen backbone and its features in one piece, the head
is spread over all. One rank is the oracle of several, and a run that was not interrupted of one
that was.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.trainers import tasks
from tests.trainers.gang import Host
from tests.trainers.test_ranks import PLAIN, RANDOM, SAVED, STEPS, close, only, parts
from trainers import checkpoint

pytestmark = pytest.mark.xdist_group("ranks-transfer")

# With pieces of 2 the ranks have different samples, and lack features at different steps.
PIECES: dict[str, Any] = {**PLAIN, "batch_size": 2, "accumulate": 4}


@pytest.mark.parametrize("task", ["transfer", "frozen", "whole"])
def test_any_number_of_ranks_trains_the_same_head(task: str, host: Host) -> None:
    """Of three, which share nothing evenly; the tests below have two train as one does."""
    (one,) = host.run(1, **PIECES, task=task)
    assert len(one.losses) == STEPS
    ranks = host.run(3, **PIECES, task=task)
    assert [rank.status for rank in ranks] == [0, 0, 0], ranks[0].err
    assert close(ranks[0].losses, one.losses)
    for name in ("accuracy", "evaluation_loss", "accuracy_at_start"):
        told, expected = (run.event("finished")[name] for run in (ranks[0], one))
        assert close([told], [expected])
    counts = [run.event("started")["frozen_parameters"] for run in (ranks[0], one)]
    assert counts[0] == counts[1]
    assert (counts[0] > 0) is (task != "whole")


@pytest.mark.parametrize("task", ["transfer", "whole"])
@pytest.mark.parametrize("size", [1, 2])
def test_it_goes_on_bit_for_bit(task: str, size: int, host: Host, tmp_path: Path) -> None:
    kept = tmp_path / "straight"
    (first, *_) = host.run(size, **RANDOM, task=task, checkpoint_directory=str(kept))
    directory = only(kept, SAVED, tmp_path / "again")
    again = host.run(size, **RANDOM, task=task, checkpoint_directory=directory)
    assert again[0].event("resumed")["level"] == "E0", again[0].event("resumed")
    assert first.losses[SAVED:] == again[0].losses
    ended = [Path(place) / f"checkpoint-{STEPS:09d}" for place in (kept, directory)]
    if size == 1:
        assert tasks.differences(*map(checkpoint.read, ended)) == []
        return
    for left, right in zip(parts(kept, STEPS), parts(Path(directory), STEPS), strict=True):
        assert tasks.differences(left, right) == []


def test_the_backbone_is_kept_once(host: Host, tmp_path: Path) -> None:
    """It is the same on all ranks, so rank 0's part has it, and the others read it there."""
    host.run(2, **PLAIN, task="transfer", checkpoint_directory=str(tmp_path))
    zero, one = parts(tmp_path, SAVED)
    assert zero.frozen
    assert not one.frozen
    assert one.model, "its rows of the head"


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_with_the_same_samples(
    writers: int, readers: int, host: Host, tmp_path: Path
) -> None:
    kept = tmp_path / "straight"
    (first, *_) = host.run(writers, **PIECES, task="transfer", checkpoint_directory=str(kept))
    directory = only(kept, SAVED, tmp_path / "again")
    again = host.run(readers, **PIECES, task="transfer", checkpoint_directory=directory)
    assert again[0].event("resumed")["level"] == "E1"
    assert close(again[0].losses, first.losses[SAVED:])


@pytest.mark.parametrize("task", ["frozen", "whole"])
def test_out_of_memory_on_one_rank_is_less_at_once_on_all(task: str, host: Host) -> None:
    """In the last layer of the backbone, of which a frozen one makes no collective."""
    (one,) = host.run(1, **PLAIN, task=task)
    ranks = host.run(2, **PLAIN, task=task, full_rank=1, full_from=1)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert close(ranks[0].losses, one.losses)
    assert ranks[0].event("warning")["micro_batch"] == 2


def test_statistics_that_each_rank_would_keep_for_itself_are_refused(host: Host) -> None:
    (one,) = host.run(1, **PLAIN, task="statistics")
    assert one.status == 0
    ranks = host.run(2, **PLAIN, task="statistics")
    assert [rank.status for rank in ranks] == [1, 1]
    # Who comes late finds that the first has refused and left.
    assert any("'head.0' keeps statistics" in rank.err for rank in ranks)
