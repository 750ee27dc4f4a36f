"""Which sample stands where, for any number of ranks: a pure function of integers.

Problem: a loader that shuffles with a generator and deals to ranks and worker processes has a
position that nobody can write down, and another one for every number of ranks. After a handoff to
two GPUs instead of four, samples are skipped or seen twice, and nobody notices.

Here nothing is remembered. The endless stream of positions 0, 1, 2, ... is cut into global batches:
step ``s`` holds the positions from ``s * global_batch`` on. Position ``i`` lies in epoch
``i // count``, and a permutation keyed by seed and epoch says which sample stands there. ``shard``
deals the positions of a step to the ranks in runs, so that the shards, one rank after another, are
the global batch again, whatever the number of ranks. The whole state of the data is then one
integer: how many samples are done.

The permutation is a Feistel network over the next even power of two, walked until it lands within
range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no table, O(1) memory.
"""

from hashlib import blake2b

FEISTEL_ROUNDS = 4
"""Four rounds of a good function are a strong permutation (Luby and Rackoff, 1988)."""


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
