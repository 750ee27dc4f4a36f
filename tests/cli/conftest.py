"""Fixtures: an open fake coordinator, and `baton` run against it inside this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from coordinator.cli.main import cli
from tests.cli import samples
from tests.cli.fake_coordinator import FakeCoordinator

Baton = Callable[..., Result]


@dataclass(frozen=True)
class Progress:
    """What is in the place of `render.progress`: how long each bar is, and all that it was told."""

    bars: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)

    @contextmanager
    def bar(self, steps: int, what: str) -> Iterator[Callable[[int], None]]:
        self.bars.append(steps)
        yield self.told.append


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """An age is what a test has made it, however long the command takes to show it."""
    monkeypatch.setattr(samples, "NOW", datetime.now(UTC))
    clock = SimpleNamespace(now=lambda _: samples.NOW, fromtimestamp=datetime.fromtimestamp)
    monkeypatch.setattr("coordinator.cli.client.datetime", clock)


@pytest.fixture
def fake() -> Iterator[FakeCoordinator]:
    """A coordinator that answers as each test scripts it."""
    with FakeCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
def baton(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> Baton:
    """Runs one command line; an exception that is not an exit fails the test with its traceback."""
    monkeypatch.setattr("coordinator.cli.client.RETRY_PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr("coordinator.cli.client.STATE_WAIT_S", 60.0)  # gRPC's thread may be slow

    def run(*arguments: str, address: str | None = None) -> Result:
        return CliRunner().invoke(
            cli,
            list(arguments),
            prog_name="baton",
            env={"BATON_COORDINATOR": address or fake.address, "TERM": "xterm-256color"},
            catch_exceptions=False,
        )

    return run
