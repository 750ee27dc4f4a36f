"""A session installs signal handlers, each test gives back those that it found; and the host of
ranks, which imports for seconds, is one for all files."""

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from baton_sdk.session import STOP_SIGNALS

if TYPE_CHECKING:
    from tests.trainers.gang import Host


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Host]":
    """Of gangs."""
    from tests.trainers.gang import Host  # torch, which most tests here do without

    with Host(tmp_path_factory.mktemp("gangs")) as made:
        yield made
