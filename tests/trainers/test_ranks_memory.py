"""Out of memory on one of several ranks: all take less at once, and train the same."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers import tasks
from tests.trainers.forking import Ended
from tests.trainers.gang import Host
from tests.trainers.test_ranks import PLAIN, RANDOM, SAVED, STEPS, close, only, parts
from trainers import microbatch, start
from trainers.guard import Guard
from trainers.ranks import ALONE, Vote, World, decide

pytestmark = pytest.mark.xdist_group("ranks")


@given(batch=st.integers(2, 64), size=st.integers(1, 64), ranks=st.integers(2, 8))
def test_what_is_said_to_fit_trains_the_same_in_smaller_pieces(
    batch: int, size: int, ranks: int
) -> None:
    world = World(0, ranks)
    before = microbatch.most_at_once(batch, size, world)
    guard = Guard(world)
    if before == 1:
        microbatch.check_redoable(guard, "in step 2", before, batch)  # `halved` has the words
        return
    with pytest.raises(microbatch.TooLargeError) as refused:
        microbatch.check_redoable(guard, "in step 2", before, batch)
    found = re.search(r"batch_size = (\d+) and accumulate = (\d+)", str(refused.value))
    assert found is not None
    batch_size, accumulate = map(int, found.groups())
    assert batch_size * accumulate == batch
    assert microbatch.most_at_once(batch, batch_size, world) < before
    guard.on = True
    microbatch.check_redoable(guard, "in step 2", before, batch)
    microbatch.check_redoable(Guard(ALONE), "in step 2", size, batch)


def test_memory_that_is_tight_anywhere_is_in_doubt_everywhere() -> None:
    assert decide([Vote(0.0), Vote(0.0, tight=True)]).tight
    assert not decide([Vote(0.0), Vote(0.0)]).tight
    assert ALONE.decide(Vote(0.0, tight=True)).tight


FULL: dict[str, Any] = {**RANDOM, "full_rank": 1}


def out_of_memory(rank: Ended) -> list[str]:
    return [line["message"] for line in rank.events if "out of memory" in line.get("message", "")]


@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_on_one_rank_is_less_at_once_on_all(
    *, backward: bool, host: Host, tmp_path: Path
) -> None:
    """In the middle of its first step, when the others wait for the rows of the next layer or for
    the sum of the gradients. The oracle is a run with the smaller pieces from its start, which
    draws the same numbers for dropout and noise."""
    full = {**FULL, "full_from": 1, "full_backward": backward}
    ranks = host.run(2, **full, checkpoint_directory=str(tmp_path / "full"))
    small = {**RANDOM, "batch_size": 2, "accumulate": 4}
    expected = host.run(2, **small, checkpoint_directory=str(tmp_path / "small"))
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert close(ranks[0].losses, expected[0].losses)
    assert out_of_memory(ranks[0]) == [
        "out of memory in step 1 with 4 samples at once: going on with 2 at once, and 8 samples a"
        " step as before"
    ]
    assert out_of_memory(ranks[1]) == [], "one rank says so"
    for left, right in zip(
        parts(tmp_path / "full", STEPS), parts(tmp_path / "small", STEPS), strict=True
    ):
        assert tasks.differences(left, right) == []


def test_out_of_memory_in_the_second_step_goes_back_to_its_beginning(
    host: Host, tmp_path: Path
) -> None:
    """Twice: 4, 2, 1. The optimizer's averages, which the first step made, go on; and so does who
    resumes, without looking for the size again."""
    kept = tmp_path / "kept"
    straight = host.run(2, **PLAIN)
    full = {**PLAIN, "full_rank": 1, "fitting": 1}
    ranks = host.run(2, **full, checkpoint_directory=str(kept))
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert close(ranks[0].losses, straight[0].losses)
    assert [text[:50] for text in out_of_memory(ranks[0])] == [
        "out of memory in step 2 with 4 samples at once: go",
        "out of memory in step 2 with 2 samples at once: go",
    ]
    again = host.run(2, **full, checkpoint_directory=only(kept, SAVED, tmp_path / "again"))
    assert again[0].event("started")["micro_batch"] == 1
    assert out_of_memory(again[0]) == []
    assert again[0].losses == ranks[0].losses[SAVED:]


def test_out_of_memory_of_adapters_and_in_evaluations(host: Host) -> None:
    """Of a model whose parameters are mostly frozen; and where there is no backward pass."""
    lora = {**PLAIN, "task": "lora"}
    (one,) = host.run(1, **lora)
    ranks = host.run(2, **lora, full_rank=0, full_backward=True)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert close(ranks[0].losses, one.losses)
    ranks = host.run(2, **lora, full_rank=1, full_evaluation=True)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert close(ranks[0].losses, one.losses)
    assert out_of_memory(ranks[0]) == [
        "out of memory in an evaluation with 4 samples at once: going on with 2"
    ]


def test_out_of_memory_with_a_single_sample_ends_all_ranks(host: Host) -> None:
    for rank in host.run(2, **FULL, fitting=0):
        assert rank.status == start.EXIT_OUT_OF_MEMORY
        assert rank.err.splitlines()[-1] == (
            "out of memory in step 2 with a single sample on each rank: give the job more ranks,"
            " shorten the samples or ask for GPUs with more memory"
        )


def test_out_of_memory_that_nobody_expected_says_what_fits_and_ends_the_gang(host: Host) -> None:
    ranks = host.run(2, **PLAIN, full_rank=1, full_from=3)
    assert ranks[1].status == start.EXIT_OUT_OF_MEMORY
    assert ranks[1].err.splitlines()[-1] == (
        "out of memory in step 3 with 4 samples at once, where it had been enough, and the others"
        " wait: set batch_size = 2 and accumulate = 4, which trains the same"
    )
    assert ranks[0].status == 1, "its peer is gone, and it does not wait for the timeout"
