"""The other ranks, through the process group that Accelerate has made.

Problem: torch is the program's, and may not be there, or without a group. So it is looked for among
what the program has imported, and one rank alone gets its own answers.
"""

import sys
from typing import Any


def distributed(args: Any) -> Any:
    """torch.distributed where there are several ranks, else None; `args` are Trainer's."""
    if args.world_size < 2:
        return None
    found = sys.modules["torch"].distributed
    ready = found.is_available() and found.is_initialized()
    return found if ready else None


def barrier(args: Any) -> None:
    """Wait for all ranks. A collective."""
    group = distributed(args)
    if group is not None:
        group.barrier()


def highest(args: Any, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Of each number the highest that any rank has. A collective."""
    group, torch = distributed(args), sys.modules.get("torch")
    if group is None or torch is None:
        return numbers
    found = torch.tensor(numbers, dtype=torch.int64, device=args.device)
    group.all_reduce(found, op=group.ReduceOp.MAX)
    return tuple(found.tolist())
