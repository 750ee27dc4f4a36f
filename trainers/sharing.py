"""A job that shares its GPU takes no more of it than its part.

Problem: torch asks the driver for memory whenever it has none left, and keeps what it got. Beside
another job on the same GPU the one that asks last finds none, though it may be the one that is
within its cap.

So torch's own allocator is told how far it may go, before the first tensor is on the GPU. Beyond
that it raises the error of a full GPU, which is handled like any other (`microbatch.py`). What the
allocator does not count (the CUDA context, memory of libraries of their own) is not held to it; the
tenth of each GPU that is never shared out is for that.
"""

import torch


def keep_to(ratio: float) -> None:
    """Of the GPU that this process sees first; with the whole of it there is nothing to do."""
    if ratio < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(ratio)
