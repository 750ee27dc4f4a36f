"""All ranks together see one stream, whatever their number and whenever it changes.

The oracle has no ranks: positions 0, 1, 2, ... one after another. Against it stand the shards of 1
to 4 ranks, put together rank by rank.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import order

SEED = 7
COUNT = 23
GLOBAL_BATCH = 10
STEPS = 7


def oracle(steps: int) -> list[int]:
    """One sample after another."""
    return [order.sample_at(position, COUNT, SEED) for position in range(steps * GLOBAL_BATCH)]


def gathered(world_size: int, steps: range) -> list[int]:
    """All ranks' samples, step by step and rank by rank."""
    return [
        order.sample_at(position, COUNT, SEED)
        for step in steps
        for rank in range(world_size)
        for position in order.shard(step, rank, world_size, GLOBAL_BATCH)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_world_sees_the_same_samples(world_size: int) -> None:
    assert gathered(world_size, range(STEPS)) == oracle(STEPS)


def test_a_world_that_changes_in_the_middle_goes_on_in_the_same_stream() -> None:
    seen = gathered(4, range(2))
    seen += gathered(1, range(2, 3))
    seen += gathered(3, range(3, 5))
    seen += gathered(2, range(5, STEPS))
    assert seen == oracle(STEPS)


@given(step=st.integers(0, 10**9), world_size=st.integers(1, 64), global_batch=st.integers(1, 500))
def test_shards_one_after_another_are_the_global_batch(
    step: int, world_size: int, global_batch: int
) -> None:
    shards = [order.shard(step, rank, world_size, global_batch) for rank in range(world_size)]
    together = [position for part in shards for position in part]
    assert together == list(range(step * global_batch, (step + 1) * global_batch))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("wrong", [(-1, 0, 1, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, 1, 0)])
def test_a_shard_of_nothing_is_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no shard"):
        order.shard(*wrong)


@settings(max_examples=50)
@given(count=st.integers(1, 300), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**63))
def test_an_epoch_is_a_permutation(count: int, epoch: int, seed: int) -> None:
    positions = range(epoch * count, (epoch + 1) * count)
    assert sorted(order.sample_at(p, count, seed) for p in positions) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = [
        [order.sample_at(epoch * 100 + place, 100, seed) for place in range(100)]
        for epoch, seed in [(0, 1), (1, 1), (0, 2)]
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert list(range(100)) not in orders


def test_the_order_is_fixed_for_ever() -> None:
    """Numbers from the day this was written: a checkpoint must go on in the next version too."""
    assert [order.sample_at(position, 100, 1) for position in range(6)] == [10, 38, 13, 21, 96, 76]
