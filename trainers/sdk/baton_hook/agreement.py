"""What all ranks of a job resume from, where each has found something else.

Problem: ranks on several nodes have an output directory each, and `Trainer` writes whole
checkpoints into rank 0's alone. When another node has died, the newest one there may not have been
committed, so that rank 0 would resume from it and all others from the committed one. Ranks that
begin at different steps wait for each other for ever, or train a model that is of no step at all.

How: each rank says at which step it would begin, and of which step the committed checkpoint is that
its agent has laid out. The highest and the lowest of both, found in one collective, are the same
for all, so all conclude the same: each its own choice where they begin at one step; else the
committed one, where all have the same; else none. A rank whose own search failed, or found nothing
of what the script asks for, has no step, and takes part like the others, which wait for it.
"""

from collections.abc import Sequence

from baton_hook.resume import UNKNOWN, Choice, Found


def numbers_of(own: Choice, restored: Found | None) -> tuple[int, ...]:
    """What a rank says; of each number the highest of all ranks counts, of a negative one thus the
    lowest."""
    committed = restored.step if restored is not None else UNKNOWN
    return own.step, -own.step, committed, -committed


def conclude(own: Choice, restored: Found | None, highest: Sequence[int]) -> Choice:
    """What this rank resumes from, by the highest of all ranks' numbers."""
    last, first, committed_last, committed_first = (
        highest[0], -highest[1], highest[2], -highest[3],
    )  # fmt: skip
    if first == last:
        return own
    found = f"the ranks would begin after different steps, {first} to {last}"
    if first == UNKNOWN:
        found = f"a rank has nothing to begin from, where another would begin after step {last}"
    if restored is not None and committed_first == committed_last:
        sentence = f"resuming from step {restored.step}, the last committed checkpoint: {found}"
        return Choice(str(restored.path), restored.step, sentence)
    sentence = f"training starts from the beginning: {found}, and no committed one is there for all"
    return Choice(None, 0, sentence)
