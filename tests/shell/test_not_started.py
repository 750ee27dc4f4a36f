"""What a program that cannot start says of the system's errors."""

import errno
from types import ModuleType

import pytest

from agent import main as agent_main
from coordinator import main as coordinator_main


@pytest.mark.parametrize("program", [agent_main, coordinator_main])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EADDRINUSE, "another one listens", "/run/a"), "another one listens: /run/a"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("no number"), "no number"),
        (ValueError("of ours"), "of ours"),
    ],
)
def test_the_reason_is_words_alone(program: ModuleType, error: Exception, said: str) -> None:
    assert program._in_words(error) == said
