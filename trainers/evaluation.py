"""Figures on held-out data, in batches that fit into memory.

No gradients are kept, so what fits in training fits here, and more. Where memory runs out all the
same, a batch is halved and the evaluation begins again; it draws nothing from any generator, and so
changes nothing. Several ranks cannot begin again, since the others wait in the middle of a pass:
they take no more at once than they train on.
"""

from collections.abc import Callable

import torch

from trainers import microbatch, optimization
from trainers.configuration import LoopOptions
from trainers.ranks import World
from trainers.task import Task


def figures(
    task: Task,
    options: LoopOptions,
    device: torch.device,
    world: World,
    *,
    micro_batch: int,
    emit: Callable[..., None],
) -> dict[str, float]:
    """What the task says of itself; ``micro_batch`` samples at once are trained on. Raises
    TooLargeError when not even one sample fits, or of several ranks not all that should."""
    task.model.eval()
    whole = options.batch_size * options.accumulate
    if not world.alone:
        most = microbatch.most_at_once(whole, micro_batch, world)
        task.evaluation_batch = min(task.evaluation_batch, most)
    found = _tried(task, options, device, world)
    while found is None:
        microbatch.free_memory(device)
        before = task.evaluation_batch
        microbatch.check_redoable(world, "in an evaluation", before, whole)
        task.evaluation_batch = microbatch.halved(before, "in an evaluation")
        emit(
            "warning",
            message=f"out of memory in an evaluation with {before} samples at once: going on"
            f" with {task.evaluation_batch}",
        )
        found = _tried(task, options, device, world)
    return found


def _tried(
    task: Task, options: LoopOptions, device: torch.device, world: World
) -> dict[str, float] | None:
    """The figures, or None for out of memory: the memory is free once the error is gone."""
    try:
        with torch.no_grad(), optimization.autocast(device, options):
            return task.evaluate(device, world)
    except RuntimeError as error:
        if not microbatch.is_out_of_memory(error):
            raise
        return None
