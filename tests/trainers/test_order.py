"""All ranks and workers together see one stream, whatever their number and whenever it changes.

The oracle has neither ranks nor workers: positions 0, 1, 2, ... one after another. Against it stand
real loaders with 0 and 2 worker processes for 1 to 4 ranks, whose samples and augmentation draws
are put together rank by rank.
"""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from trainers import order

SEED = 7
COUNT = 23
GLOBAL_BATCH = 10
STEPS = 7

Drawn = list[tuple[int, float]]


class Numbers:
    """Sample ``i`` is ``i``."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, sample: int) -> int:
        return sample


def drawing(sample: int, generator: order.Generator) -> tuple[int, float]:
    """An augmentation that shows what it drew."""
    return sample, float(generator.random())


def as_list(items: Drawn) -> Drawn:
    return items


def oracle(steps: range) -> list[Drawn]:
    """One sample after another."""
    expected = []
    for step in steps:
        positions = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        samples = [order.sample_at(position, COUNT, SEED) for position in positions]
        draws = [order.generator_for(SEED, position).random() for position in positions]
        expected.append(list(zip(samples, draws, strict=True)))
    return expected


def seen_by(rank: int, world_size: int, workers: int, steps: range) -> list[Drawn]:
    """What one rank's loader yields, step by step."""
    batches = order.RankBatches(steps, rank=rank, world_size=world_size, global_batch=GLOBAL_BATCH)
    samples = order.AddressedSamples(Numbers(), seed=SEED, augment=drawing)
    loader: DataLoader[Drawn] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=as_list,
    )
    assert len(batches) == len(steps)
    return list(loader)


def gathered(world_size: int, workers: int, steps: range) -> list[Drawn]:
    """All ranks' batches, rank by rank."""
    by_rank = [seen_by(rank, world_size, workers, steps) for rank in range(world_size)]
    return [[item for part in parts for item in part] for parts in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_world_and_any_workers_see_the_same_samples_and_draws(
    world_size: int, workers: int
) -> None:
    torch.manual_seed(world_size)  # the loaders' own generators must not matter
    assert gathered(world_size, workers, range(STEPS)) == oracle(range(STEPS))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_world_that_changes_in_the_middle_goes_on_in_the_same_stream(workers: int) -> None:
    seen = gathered(4, workers, range(2))
    seen += gathered(1, 2 - workers, range(2, 3))
    seen += gathered(3, workers, range(3, 5))
    seen += gathered(2, workers, range(5, STEPS))
    assert seen == oracle(range(STEPS))


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


def test_the_order_and_the_draws_are_fixed_for_ever() -> None:
    """Numbers from the day this was written: a checkpoint must go on in the next version too."""
    assert [order.sample_at(position, 100, 1) for position in range(6)] == [10, 38, 13, 21, 96, 76]
    words = order.generator_for(3, 5).bit_generator.random_raw(2)
    assert words.tolist() == [13607503460711072255, 17732127068628475552]


def test_neighbours_and_seeds_share_no_draws() -> None:
    """A counter that advanced by one block a position would repeat most of its neighbour's."""
    raws = [
        order.generator_for(seed, position).bit_generator.random_raw(1000)
        for seed in (1, 2)
        for position in (0, 1, 2, 10**12)
    ]
    assert len(numpy.unique(numpy.concatenate(raws))) == 8 * 1000
