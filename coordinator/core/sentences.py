"""Parts of sentences that people are told: counts with their noun, and lists.

Problem: "1 GPUs" is read as carelessness, and every place that counts something would have to think
of it by itself.
"""

from collections.abc import Sequence


def quantity(count: int, one: str, several: str = "") -> str:
    """ "1 GPU", "2 GPUs"; `several` where that is not `one` with an s: "1 process", "processes"."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def some(names: Sequence[str], named_max: int) -> str:
    """ "a, b and 3 more": as many as a sentence bears."""
    shown = ", ".join(names[:named_max])
    more = len(names) - named_max
    return shown if more <= 0 else f"{shown} and {more} more"
