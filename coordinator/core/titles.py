"""What a job is called whose owner gave it no name.

Problem: of a hundred jobs that are all called "python" nobody finds his own.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

_INTERPRETER = re.compile(r"python[\d.]*|bash|sh|torchrun|accelerate|deepspeed")
_SCRIPTS = (".py", ".sh")
_CHARACTERS_MAX = 128


def title(trainer: str, command: Sequence[str]) -> str:
    """Its trainer, or its script or module, where an interpreter is told of one; what cannot be
    printed is left out."""
    return "".join(filter(str.isprintable, trainer or _program(command)))[:_CHARACTERS_MAX]


def _program(command: Sequence[str]) -> str:
    program = command[0].rsplit("/", 1)[-1] if command else ""
    if not _INTERPRETER.fullmatch(program):
        return program
    for before, word in pairwise(command):
        if not word.isprintable():
            continue  # lines of a program, as after -c, are no name
        if before == "-m":
            return word
        if word.endswith(_SCRIPTS):
            return word.rsplit("/", 1)[-1]
    return program
