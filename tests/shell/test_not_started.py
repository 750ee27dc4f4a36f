"""What a program that cannot start says of the system's errors, and one that ends by them later."""

import asyncio
import errno
import signal
from collections.abc import AsyncIterator, Coroutine
from types import ModuleType
from typing import Any

import pytest

from agent import main as agent_main
from agent.config import Config as AgentConfig
from coordinator import main as coordinator_main
from coordinator.config import Config as CoordinatorConfig


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


class Shell:
    """Whose loop ends by an error of the system's, or does not even begin."""

    def __init__(self, *, begins: bool = True) -> None:
        self.opened = asyncio.Event()
        self.begins = begins

    async def run(self) -> None:
        if self.begins:
            self.opened.set()
        raise OSError(errno.EIO, "Input/output error", "/state")


def agent(*, begins: bool = True) -> Coroutine[Any, Any, None]:
    shell: Any = Shell(begins=begins)
    return agent_main._run(shell, AgentConfig(), (), shell, "n1:1")


def coordinator() -> Coroutine[Any, Any, None]:
    shell: Any = Shell()
    return coordinator_main._run(shell, CoordinatorConfig(), ())


@pytest.fixture
async def signals() -> AsyncIterator[None]:
    """Other tests use this loop, and some of them send signals."""
    yield
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("program", "run"), [(agent_main, agent), (coordinator_main, coordinator)], ids=["a", "c"]
)
async def test_one_that_had_started_says_that_it_has_failed(
    program: ModuleType, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a traceback: it is nothing that an operator has set wrongly."""
    told: list[tuple[str, object]] = []
    monkeypatch.setattr(
        program.logging_setup, "emit", lambda _, event, fields: told.append((event, fields))
    )
    with pytest.raises(program.Failed):
        await run()
    name = program.__name__.split(".")[0]
    assert told[-1] == (f"{name}.failed", (("reason", "Input/output error: /state"),))


@pytest.mark.usefixtures("signals")
async def test_an_agent_that_cannot_use_its_state_directory_has_not_started() -> None:
    """A full disk, which its operator can mend."""
    with pytest.raises(OSError, match="Input/output error: '/state'"):
        await agent(begins=False)
