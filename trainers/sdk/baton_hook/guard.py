"""The one place where every error is caught: we are guests in somebody else's program.

Problem: an error of ours, in a callback of theirs, would end a training that ran well without us.
So whatever is called from the program goes through `guarded`, which turns any error into one line
on stderr. A sentence is said once: a callback that fails at every step must not fill the log.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")

SENTENCES_MAX = 100
"""Different sentences in one process; more is a flood, in which nobody reads anything."""

_said: set[str] = set()


def say(sentence: str) -> None:
    """One line on stderr, once in a process; silence where there is no stderr."""
    line = f"baton_hook: {' '.join(sentence.split())}\n"
    if line in _said or len(_said) >= SENTENCES_MAX:
        return
    _said.add(line)
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        return  # None, a broken pipe, or closed: the program has nobody to talk to either


def guarded(doing: str, call: Callable[[], _Result], otherwise: _Result) -> _Result:
    """What `call` returns; after any error one line on stderr, and `otherwise`."""
    try:
        return call()
    except Exception as error:
        say(f"{doing} failed, the program goes on: {type(error).__name__}: {error}")
        return otherwise
