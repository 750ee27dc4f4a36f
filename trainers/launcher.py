"""Ranks that a launcher has started within one attempt: one of them speaks for all.

Problem: a job of one rank with four GPUs may be ``torchrun --nproc-per-node=4``. Its agent knows of
one trainer, answers whoever came last, and would take what each process hands over for the whole.

So such ranks share the attempt: rank 0 alone is linked to the agent, tells it how far the training
is, and hands over what all of them have written into one directory. The others hear of a stop from
rank 0, as ranks always tell each other, or by the signal.

Where Baton has started several ranks each of them is one process of the training. A launcher that
multiplies them, or one whose processes are in several jobs, is refused before the slow imports: no
checkpoint of that training could be committed.
"""

from collections.abc import Mapping


def shared(environment: Mapping[str, str]) -> bool:
    """Whether several ranks are processes of one attempt."""
    started = _number(environment, "BATON_WORLD_SIZE", 1)
    return _under_baton(environment) and started == 1 and _number(environment, "WORLD_SIZE", 1) > 1


def silent(environment: Mapping[str, str]) -> bool:
    """Whether another rank speaks for this one."""
    return shared(environment) and _number(environment, "RANK", 0) > 0


def problems(environment: Mapping[str, str]) -> list[str]:
    """Why these ranks could not keep a checkpoint together, as sentences that say what to write
    instead."""
    size = _number(environment, "WORLD_SIZE", 1)
    started = _number(environment, "BATON_WORLD_SIZE", 1)
    instead = f"let Baton start them: baton submit --ranks {size}"
    if not _under_baton(environment) or size <= 1:
        return []
    if started == 1:
        here = _number(environment, "LOCAL_WORLD_SIZE", size)
        if here == size:
            return []
        return [f"{here} of {size} processes that train together are in this job; {instead}"]
    rank, known = _number(environment, "RANK", 0), _number(environment, "BATON_RANK", 0)
    if (rank, size) == (known, started):
        return []
    return [
        f"this is process {rank} of {size} that train together, below rank {known} of {started}"
        f" that Baton started; a rank is one process: leave the launcher out, or {instead}"
    ]


def _under_baton(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("BATON_SOCKET"))


def _number(environment: Mapping[str, str], name: str, absent: int) -> int:
    return int(environment.get(name) or absent)
