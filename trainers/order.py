"""Which sample stands where, for any number of ranks and workers: a pure function of integers.

Problem: a loader that shuffles with a generator and deals to ranks and worker processes has a
position that nobody can write down, and another one for every number of ranks. After a handoff to
two GPUs instead of four, samples are skipped or seen twice, and nobody notices.

Here nothing is remembered. The endless stream of positions 0, 1, 2, ... is cut into global batches:
step ``s`` holds the positions from ``s * global_batch`` on. Position ``i`` lies in epoch
``i // count``, and a permutation keyed by seed and epoch says which sample stands there. ``shard``
deals the positions of a step to the ranks in runs, so that the shards, one rank after another, are
the global batch again, whatever the number of ranks. What a sample draws (a crop, a flip) comes
from a generator made for its position, so it does not matter which rank or worker asks, or when.
The whole state of the data is then one integer: how many samples are done.

The permutation is a Feistel network over the next even power of two, walked until it lands within
range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no table, O(1) memory. The
generator is Philox, counter-based for this purpose (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", 2011): seed as key, position as counter.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, Protocol

import numpy

FEISTEL_ROUNDS = 4
"""Four rounds of a good function are a strong permutation (Luby and Rackoff, 1988)."""

DRAWS_BITS = 64
"""Each position has 2**64 blocks of Philox to itself, before the next position's begin."""

Generator = numpy.random.Generator


class Indexed(Protocol):
    """What samples come from: anything with a length and an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int, /) -> Any: ...


def sample_at(position: int, count: int, seed: int) -> int:
    """Which of ``count`` samples stands at ``position`` (0 or more) of the endless data order."""
    epoch, place = divmod(position, count)
    half_bits = max(1, (max(1, (count - 1).bit_length()) + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for round_number in range(FEISTEL_ROUNDS):
            text = b"%d/%d/%d/%d" % (seed, epoch, round_number, right)
            digest = blake2b(text, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        place = left << half_bits | right
        if place < count:
            return place


def shard(step: int, rank: int, world_size: int, global_batch: int) -> range:
    """The positions of ``rank`` (0 to ``world_size`` - 1) in the global batch of ``step``, counted
    from 0. Shards differ by one position at most; one is empty where there are more ranks than
    positions. A mean over the global batch must weigh the ranks by their positions.

    Raises ValueError for a rank outside the world, or anything below its least value.
    """
    if step < 0 or global_batch < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"no shard for step {step}, rank {rank} of {world_size} and a batch of {global_batch}"
        )
    each, over = divmod(global_batch, world_size)
    start = step * global_batch + rank * each + min(rank, over)
    return range(start, start + each + (1 if rank < over else 0))


def generator_for(seed: int, position: int) -> Generator:
    """What the sample at ``position`` draws from (``seed`` 0 to 2**128 - 1). Made anew by whoever
    needs it: the same seed and position give the same draws in every process."""
    return numpy.random.Generator(
        numpy.random.Philox(key=seed, counter=position << DRAWS_BITS),
    )


class AddressedSamples:
    """Samples by position in the data order, each with its own generator: a map-style dataset for
    ``torch.utils.data.DataLoader``, whose workers then have no state of their own."""

    def __init__(
        self, source: Indexed, *, seed: int, augment: Callable[[Any, Generator], Any]
    ) -> None:
        self.source = source
        self.seed = seed
        self.augment = augment

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Any:
        sample = self.source[sample_at(position, len(self.source), self.seed)]
        return self.augment(sample, generator_for(self.seed, position))


class RankBatches:
    """The positions of one rank, a list for each of ``steps``: a batch sampler for
    ``torch.utils.data.DataLoader``."""

    def __init__(self, steps: range, *, rank: int, world_size: int, global_batch: int) -> None:
        self.steps = steps
        self.rank = rank
        self.world_size = world_size
        self.global_batch = global_batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield list(shard(step, self.rank, self.world_size, self.global_batch))
