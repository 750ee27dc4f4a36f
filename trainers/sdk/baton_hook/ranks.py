"""The other ranks, through the process group that Accelerate has made.

Problem: torch is the program's, and may not be there, or without a group. So it is looked for among
what the program has imported, and one rank alone gets its own answers.
"""

import sys
from typing import Any

from baton_hook.guard import guarded


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


def end_group_of_one() -> None:
    """At the end of the program. Of the variables that a job of one rank has, too, Accelerate makes
    a group of one on GPUs, and torch warns of one that is left. That of several is not ours to end:
    it may wait for the others."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return
    group = torch.distributed
    if group.is_initialized() and group.get_world_size() == 1:
        guarded("ending a group of one", group.destroy_process_group, None)
