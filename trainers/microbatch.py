"""The samples of one step in pieces that fit into memory, and a smaller piece when they do not.

Problem: how many samples fit depends on the GPU, and a handoff may end on a smaller one. A job that
dies there of "out of memory", with its checkpoint intact, has lost everything but its work. The
obvious way out, a smaller batch, changes what is trained.

Here a step always takes ``batch_size * accumulate`` samples. They go through the model in pieces of
``size`` samples, ``batch_size`` at first, and the gradients add up; every piece counts by its share
of the samples. When memory runs out, ``size`` is halved and the *same* step is taken again, with
the same samples and the same random numbers: ``Undo`` puts the generators and the buffers (running
statistics) back to where the step began. So the run goes on as one that was configured with the
smaller batch from its start. An odd size is rounded up, 7 to 4 to 2 to 1, and the last piece of a
step then has what is left; the step has the same samples as before, whatever the sizes. A model
that looks at its batch as a whole (batch normalisation in training) does see smaller batches.

``size`` is in every checkpoint, so that a resumed run does not look for it again. Only the forward
and backward passes are tried again: the optimizer's update needs no memory that a smaller piece
would free.

Of several ranks each takes its shard of the step's samples, and the shards differ by one at most.
Every pass through the model is a row of collectives, so all ranks make as many: a rank whose
samples are done takes one more that does not count. When memory runs out on one of them, all leave
the step together (``guard``), and take it again with half as many samples at once, on a model that
has never been in the middle of a pass (``sharding``). Only where nobody expected it, the others
wait in the middle of the step; the rank that has no memory left then says what would fit, and ends,
and Baton starts the ranks again from their last checkpoint.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch

from trainers.configuration import LoopOptions
from trainers.guard import Guard
from trainers.order import sample_at, shard
from trainers.prefetch import Fetched, Prefetcher
from trainers.ranks import ALONE, World

if TYPE_CHECKING:
    from trainers.loop import Task


class TooLargeError(RuntimeError):
    """Not even one sample fits; the sentence says what to change."""


def pieces(global_batch: int, size: int) -> list[int]:
    """How many samples go through the model at once, one number for each time."""
    whole, rest = divmod(global_batch, size)
    return [size] * whole + ([rest] if rest else [])


def most_at_once(global_batch: int, size: int, world: World) -> int:
    """Samples of the largest piece on any rank: a shard may be smaller than ``size``."""
    return min(size, -(-global_batch // world.size))


def shares(global_batch: int, size: int, world: World) -> list[int]:
    """The pieces of this rank, as many as of every other one; 0 is one that does not count."""
    largest = -(-global_batch // world.size)
    passes = len(pieces(largest, size))
    own = pieces(len(shard(0, world.rank, world.size, global_batch)), size)
    return own + [0] * (passes - len(own))


def check_redoable(guard: Guard, place: str, size: int, global_batch: int) -> None:
    """Raises TooLargeError where the others wait in the middle of what ran out of memory with
    ``size`` samples at once; the sentence says what fits and trains the same."""
    world = guard.world
    if world.alone or guard.on or size == 1:
        return
    fits = next(less for less in range(size // 2, 0, -1) if global_batch % less == 0)
    raise TooLargeError(
        f"out of memory {place} with {size} samples at once, where it had been enough, and the"
        f" others wait: set batch_size = {fits} and accumulate = {global_batch // fits}, which"
        " trains the same"
    )


def halved(size: int, place: str, world: World = ALONE) -> int:
    """Half of ``size``, rounded up. Raises TooLargeError for one sample."""
    if size == 1 and not world.alone:
        raise TooLargeError(
            f"out of memory {place} with a single sample on each rank: give the job more ranks,"
            " shorten the samples or ask for GPUs with more memory"
        )
    if size == 1:
        raise TooLargeError(
            f"out of memory {place} with a single sample: shorten the samples, lower 'precision' to"
            " 16 bits, take a smaller model or ask for a GPU with more memory"
        )
    return (size + 1) // 2


def free_memory(device: torch.device) -> None:
    """Give back what the allocator keeps for later: in other sizes it may be enough."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Feed:
    """The pieces of a task's steps, prefetched, from ``samples`` (a position in the data order, the
    first of a step) on: those of one rank."""

    def __init__(
        self,
        task: "Task",
        options: LoopOptions,
        *,
        size: int,
        samples: int,
        steps: int,
        world: World = ALONE,
    ) -> None:
        self.task = task
        self.options = options
        self.samples = samples
        self.steps = steps
        self.global_batch = options.batch_size * options.accumulate
        self.world = world
        self.sizes = shares(self.global_batch, size, world)
        self._prefetcher: Prefetcher

    def open(self, device: torch.device, on_grow: Callable[[str], None]) -> None:
        """Begin to make the first piece."""
        self._prefetcher = Prefetcher(
            self._make,
            device=device,
            depth=self.options.prefetch_depth,
            stop=self.steps * len(self.sizes),
            on_grow=on_grow,
        )
        self._prefetcher.open()

    def next(self) -> Fetched:
        """The next piece, on the device."""
        return self._prefetcher.next()

    def close(self) -> None:
        """End what is under way."""
        self._prefetcher.close()

    def _make(self, index: int) -> Any:
        """Called away from the training thread: it reads what does not change, and no generator."""
        step, piece = divmod(index, len(self.sizes))
        own = shard(step, self.world.rank, self.world.size, self.global_batch)
        begin = self.samples + own.start + sum(self.sizes[:piece])
        positions = range(begin, begin + max(1, self.sizes[piece]))
        count, seed = self.task.sample_count, self.options.seed
        return self.task.batch([sample_at(position, count, seed) for position in positions])


class Undo:
    """Puts back what a forward pass changes: random generators, and buffers of the model.

    Made at the beginning of every step, so it must cost little: after the first step it is known
    which buffers a pass changes (by their values: torch's counter of writes misses those of batch
    normalisation), and only those are copied. Masks and tables of positions never are.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._changing: list[str] | None = None
        self._buffers: dict[str, torch.Tensor] | None = None
        self._generators: tuple[Any, ...] = ()

    def remember(self) -> None:
        """A step begins here."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._generators = (
            torch.get_rng_state(), cuda, numpy.random.get_state(legacy=True), random.getstate()
        )  # fmt: skip
        names = self._changing
        if names is None:
            live = dict(self.model.named_buffers())
            names = list(live)
            kept = self._buffers
            if kept is not None:
                names = [name for name in names if not torch.equal(kept[name], live[name])]
                self._changing = names
        self._buffers = {name: self.model.get_buffer(name).detach().clone() for name in names}

    def undo(self) -> None:
        """Back to where ``remember`` was called."""
        torch_cpu, cuda, numpy_state, python_state = self._generators
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        numpy.random.set_state(numpy_state)
        random.setstate(python_state)
        with torch.no_grad():
            for name, kept in (self._buffers or {}).items():
                self.model.get_buffer(name).copy_(kept)
