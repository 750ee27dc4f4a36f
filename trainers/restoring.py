"""What there is to resume from, and whether all ranks found the same.

Problem: each rank looks for itself. One finds a file torn that another does not need, a directory
that another node does not see, or another checkpoint than its neighbours were given. Going on from
different steps would hang in the first collective, or worse, not hang.

So whatever is tried is tried by all: a rank that cannot read says so, and all give up together, or
outside Baton take the checkpoint before it. Rank 0 says which ones there are. Afterwards all
compare where they are, and the resume is as exact as the least exact of them.
"""

from collections.abc import Callable
from pathlib import Path

import torch

import baton_sdk
from trainers import checkpoint, parts, saving
from trainers.configuration import LoopOptions
from trainers.exactness import Level, Verdict
from trainers.ranks import RankError, World


def find(
    session: baton_sdk.Session,
    options: LoopOptions,
    model: torch.nn.Module,
    world: World,
    emit: Callable[..., None],
) -> checkpoint.Snapshot | None:
    """The newest checkpoint that every rank can read; None when there is none. Baton has verified
    its own; outside, what is torn is told by ``emit``. Raises CheckpointError, and RankError where
    it is another rank that cannot read."""
    if session.restore_directory is not None:
        return _read_by_all(session.restore_directory, model, world)
    if session.under_baton or not options.checkpoint_directory:
        return None
    kept = Path(options.checkpoint_directory)
    names = [path.name for path in saving.standalone_checkpoints(kept)] if world.first else []
    while name := world.texts(names.pop() if names else "")[0]:
        try:
            return _read_by_all(kept / name, model, world)
        except (checkpoint.CheckpointError, RankError) as error:
            emit("warning", message=f"{error}; taking the one before it")
    return None


def _read_by_all(directory: Path, model: torch.nn.Module, world: World) -> checkpoint.Snapshot:
    failure = ""
    try:
        found = parts.read(directory, world, model)
    except checkpoint.CheckpointError as error:
        if world.alone:
            raise
        failure = str(error)
    world.check_none_failed(failure)
    return found


def agreed(verdict: Verdict, place: str, world: World) -> Verdict:
    """The least exact of all ranks' verdicts. Raises RankError where they are not all at the same
    ``place``: a step of a job."""
    world.check_same("the place to resume from", place)
    words = [text.partition(" ") for text in world.texts(f"{verdict.level.name} {verdict.why}")]
    level, _, why = max(words, key=lambda word: word[0])
    return Verdict(Level[level], why)
