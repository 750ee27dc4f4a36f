"""Back to before what did not fit into memory, on one rank or on all, and less at once from then.

Problem: see ``microbatch`` and ``guard``. Both a step and an evaluation are made again, with
everything as it was; what that takes is the same and stands here.
"""

from collections.abc import Callable

import torch

from trainers import guard as guards
from trainers import microbatch
from trainers.guard import Guard
from trainers.sharding import Spread
from trainers.task import Task


class Retry:
    """Of one training."""

    def __init__(self, task: Task, guard: Guard, tell: Callable[..., None]) -> None:
        self.guard = guard
        self.spread = Spread(task.model, guard, task.whole_modules)
        self._task = task
        self._tell = tell
        self._undo = microbatch.Undo(task.model)
        self._optimizer: torch.optim.Optimizer | None = None
        self._device = torch.device("cpu")
        self._doubtful_steps = guards.STEPS

    def open(self, device: torch.device) -> None:
        """See ``Spread.open``."""
        self._device = device
        self.spread.open(device)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """The one whose parameters are the model's."""
        self._optimizer = optimizer

    def begin_step(self, *, tight: bool) -> None:
        """What a step changes before its update is remembered."""
        self.guard.on = not self.guard.world.alone and (self._doubtful_steps > 0 or tight)
        self._doubtful_steps -= 1
        self._undo.remember()

    def smaller(self, size: int, whole: int, place: str) -> int:
        """A step of ``whole`` samples has run out of memory with ``size`` at once: go back to where
        it began. Returns how many to take at once. Raises TooLargeError."""
        world = self.guard.world
        before = size if world.alone else microbatch.most_at_once(whole, size, world)
        microbatch.check_redoable(self.guard, place, before, whole)
        self._undo.undo()
        self.prepare()
        after = microbatch.halved(before, place, world)
        self._doubtful_steps = guards.STEPS
        self.tell(
            f"out of memory {place} with {before} samples at once: going on"
            f" with {after} at once, and {whole} samples a step as before",
            micro_batch=after,
        )
        return after

    def prepare(self) -> None:
        """Give back memory, and have a model that is not in the middle of a pass."""
        microbatch.free_memory(self._device)
        assert self._optimizer is not None, "there is one before the first pass"
        self.spread.renew(self._optimizer)
        self._task.model = self._undo.model = self.spread.model
        microbatch.free_memory(self._device)

    def tell(self, message: str, **values: int) -> None:
        """A warning, from one rank."""
        if self.guard.world.first:
            self._tell("warning", message=message, **values)
