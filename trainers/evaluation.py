"""Figures on held-out data, in batches that fit into memory.

No gradients are kept, so what fits in training fits here, and more. Where memory runs out all the
same, a batch is halved and the evaluation begins again; it draws nothing from any generator, and so
changes nothing. Several ranks take no more at once than they train on, and begin again together.
"""

import torch

from trainers import microbatch, optimization
from trainers.configuration import LoopOptions
from trainers.retry import Retry
from trainers.task import Task


def figures(
    task: Task,
    options: LoopOptions,
    device: torch.device,
    retry: Retry,
    *,
    micro_batch: int,
) -> dict[str, float]:
    """What the task says of itself; ``micro_batch`` samples at once are trained on. Raises
    TooLargeError when not even one sample fits."""
    world = retry.guard.world
    if not world.alone:
        whole = options.batch_size * options.accumulate
        most = microbatch.most_at_once(whole, micro_batch, world)
        task.evaluation_batch = min(task.evaluation_batch, most)

    def passes() -> dict[str, float]:
        task.model.eval()
        with torch.no_grad(), optimization.autocast(device, options):
            return task.evaluate(device, retry.guard.watched())

    retry.guard.on = not world.alone
    found = retry.guard.attempt(passes)
    while found is None:
        before = task.evaluation_batch
        retry.prepare()
        task.evaluation_batch = microbatch.halved(before, "in an evaluation", world)
        retry.tell(
            f"out of memory in an evaluation with {before} samples at once: going on"
            f" with {task.evaluation_batch}",
        )
        found = retry.guard.attempt(passes)
    return found
