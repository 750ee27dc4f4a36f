"""How light jobs stand beside one another on a GPU: the arithmetic of shares.

Problem: an evaluation or the fine-tuning of a small model needs a tenth of a large GPU and has all
of it. But whoever puts two jobs on one GPU has to know that both fit, since the one that asks for
memory last is the one that dies; and what a job really takes is not known before it has run.

So a job says the most that it will take, and is held to it by its node's agent. Then it is sums:

1. The shares of a GPU add up to at most `SHARES_PERCENT_MAX` of its memory, and are at most
   `SHARERS_MAX`. A job that has its GPU alone stands beside nobody.
2. A job goes where there are sharers already, and of a node's GPUs to the one that it fits
   tightest; else to the smallest free one. So whole GPUs stay free for those who need whole ones.
3. Who shares only where it pays stands beside one other at most, of whom it is known who he is:
   nobody can tell what three do to one another.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.core.model import GpuFacts, JobSpec

# A cap counts what a program allocates. Its CUDA context (300 to 500 MB, more with many kernels)
# and what the driver keeps for itself come on top of it.
SHARES_PERCENT_MAX = 90
# MPS has room for 48 clients since Volta; but where there is no MPS sharers take turns, and eight
# contexts are about what the tenth above has room for on a card of 40 GB.
SHARERS_MAX = 8
# Less than a framework's own buffers: such a job would fail at its first allocation.
SHARE_BYTES_MIN = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class Hold:
    """Who has a GPU, or a share of it; with no `share_bytes` he has it alone. An empty `attempt` is
    somebody who does not leave within a pass. `in_pairs`: beside one other at most."""

    attempt: str
    share_bytes: int = 0
    in_pairs: bool = False


def shareable_bytes(gpu: GpuFacts) -> int:
    """What all shares of a GPU may add up to."""
    return gpu.memory_bytes * SHARES_PERCENT_MAX // 100


def ratio(spec: JobSpec, gpu: GpuFacts) -> float:
    """Which part of a GPU its job takes: its share of what all shares may add up to, since a GPU
    that is full of sharers is one that nobody else can have. Bills, demand and quotas count it
    so."""
    if not spec.shared_gpu_memory_bytes:
        return 1.0
    return min(1.0, spec.shared_gpu_memory_bytes / max(1, shareable_bytes(gpu)))


def alone(spec: JobSpec) -> JobSpec:
    """As who shares only where that pays asks for a GPU of his own, of which his share is to be a
    share that others may be beside later."""
    least = -(-spec.shared_gpu_memory_bytes * 100 // SHARES_PERCENT_MAX)
    least = max(spec.gpu_memory_bytes_min, least)
    return replace(spec, shared_gpu_memory_bytes=0, gpu_memory_bytes_min=least)


def left_bytes(gpu: GpuFacts, holds: Sequence[Hold]) -> int:
    """The largest share that one more job could have of this GPU."""
    if len(holds) >= SHARERS_MAX or closed(holds):
        return 0
    return max(0, shareable_bytes(gpu) - sum(hold.share_bytes for hold in holds))


def closed(holds: Sequence[Hold]) -> bool:
    """Whether nobody joins these, whatever they leave: one has it alone, or they are a pair."""
    several = len(holds) > 1
    return any(not hold.share_bytes or (several and hold.in_pairs) for hold in holds)


def left_for(spec: JobSpec, gpu: GpuFacts, holds: Sequence[Hold]) -> int:
    """The largest share that this job could have of it."""
    if spec.share_automatic and (len(holds) > 1 or any(not hold.attempt for hold in holds)):
        return 0
    return left_bytes(gpu, holds)


def taken(spec: JobSpec, holds: Sequence[Hold]) -> Hold:
    """What is kept of a GPU for a job beside these. Nobody joins a pair, and nobody whose partner
    has not started yet: what they would do to one another is asked of those who run."""
    alone = spec.share_automatic or any(hold.in_pairs for hold in holds)
    return Hold("", 0 if alone else spec.shared_gpu_memory_bytes)


def rank(gpu: GpuFacts, holds: Sequence[Hold], share_bytes: int) -> tuple[int, int]:
    """Of the GPUs that have room for a share the one with the least takes it."""
    if holds:
        return 0, left_bytes(gpu, holds) - share_bytes
    return 1, gpu.memory_bytes


def shuns(spec: JobSpec, holds: Sequence[Hold], shunned: Collection[str]) -> bool:
    """Whether it goes beside these last. Who shares only where that pays has a GPU of its own while
    there is one, wherever that is."""
    if spec.share_automatic:
        return bool(holds)
    return any(hold.attempt in shunned for hold in holds)


def choose(
    spec: JobSpec,
    fitting: Iterable[tuple[GpuFacts, Sequence[Hold]]],
    shunned: Collection[str] = (),
) -> str | None:
    """The GPU that the share would be of, beside one of `shunned` last; `None` where there is no
    room for it."""
    share_bytes = spec.shared_gpu_memory_bytes
    able = [(gpu, holds) for gpu, holds in fitting if left_for(spec, gpu, holds) >= share_bytes]
    if not able:
        return None

    def order(pair: tuple[GpuFacts, Sequence[Hold]]) -> tuple[bool, int, int, str]:
        gpu, holds = pair
        return (shuns(spec, holds, shunned), *rank(gpu, holds, share_bytes), gpu.uuid)

    gpu, _ = min(able, key=order)
    return gpu.uuid


def gives_room(
    gpu: GpuFacts, holds: Sequence[tuple[Hold, bool]], spec: JobSpec
) -> tuple[bool, bool]:
    """Whether the GPU of these holders has room for one more job, and whether it would have without
    those marked as giving way. With no share asked for: all of it."""
    staying = [hold for hold, leaves in holds if not leaves]
    if not spec.shared_gpu_memory_bytes:
        return not holds, not staying
    needed = spec.shared_gpu_memory_bytes
    present = left_for(spec, gpu, [hold for hold, _ in holds]) >= needed
    return present, left_for(spec, gpu, staying) >= needed
