"""Lists of node names as Slurm writes them: `n[01-03,07]`.

Problem: a site's resume and suspend programs take the names of hundreds of nodes as one argument,
and so does a configuration in one line; both in the notation that such programs and people know.

Writing: names are grouped by what stands before the number at their end. Numbers run together in
ranges; those with leading zeros only with numbers of their own width, so that `n[08-10]` is read
back as it was meant. A name without a number stands for itself. Reading: every bracket of a name is
a choice, and each number is as wide as the first of its range (slurm's hostlist.c does the same).
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Final

HOSTS_MAX: Final = 100_000  # ten of the largest fleets; a longer list is a slip of the finger
NUMBERED: Final = re.compile(r"(.*?)(\d+)", re.DOTALL | re.ASCII)
RANGE: Final = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)
PART: Final = re.compile(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+")
PIECE: Final = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")


def written(names: Iterable[str]) -> str:
    """`names`, each once, in the order in which their groups first come."""
    groups: dict[tuple[str, int], list[str]] = {}
    numbers = [(name, NUMBERED.fullmatch(name)) for name in dict.fromkeys(names)]
    padded = {
        (match[1], len(match[2]))
        for _, match in numbers
        if match and match[2].startswith("0") and len(match[2]) > 1
    }
    for name, match in numbers:
        if match is None:
            groups[name, -1] = []
            continue
        width = len(match[2]) if (match[1], len(match[2])) in padded else 0
        groups.setdefault((match[1], width), []).append(match[2])
    return ",".join(_group(prefix, digits) for (prefix, _), digits in groups.items())


def read(text: str) -> list[str]:
    """The names, each once. Raises `ValueError` with a sentence."""
    names: dict[str, None] = {}
    for bracket, other in ("[]", "]["):
        if text.count(bracket) > text.count(other):
            raise ValueError(f"'{text:.40}' has a '{bracket}' without its '{other}'")
    position = 0
    while position < len(text):
        match = PART.match(text, position)
        if match is None:
            raise ValueError(f"'{text[position : position + 20]}' is no list of node names")
        for name in _expanded(match[0]):
            names[name] = None
            if len(names) > HOSTS_MAX:
                raise ValueError(f"the list has more than {HOSTS_MAX} names")
        position = match.end()
        if position < len(text):
            if text[position] != "," or position + 1 == len(text):
                raise ValueError(f"'{text[position:][:20]}' does not go on with a comma and a name")
            position += 1
    return list(names)


def _group(prefix: str, digits: list[str]) -> str:
    if len(digits) <= 1:
        return prefix + "".join(digits)
    ranges: list[list[str]] = []
    for number in sorted(digits, key=int):
        if ranges and int(ranges[-1][-1]) + 1 == int(number):
            ranges[-1].append(number)
        else:
            ranges.append([number])
    texts = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges]
    return f"{prefix}[{','.join(texts)}]"


def _expanded(part: str) -> Iterator[str]:
    choices = [
        [literal] if literal else list(_numbers(inside)) for inside, literal in PIECE.findall(part)
    ]
    return map("".join, itertools.product(*choices))


def _numbers(inside: str) -> Iterator[str]:
    count = 0
    for text in inside.split(","):
        match = RANGE.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text}' in brackets is neither a number nor a range")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise ValueError(f"the range '{text}' goes down")
        count += int(last) - int(first) + 1
        if count > HOSTS_MAX:
            raise ValueError(f"the list has more than {HOSTS_MAX} names")
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}d}"
