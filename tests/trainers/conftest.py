"""A session installs signal handlers; each test gives back those that it found."""

import signal
from collections.abc import Iterator

import pytest

from baton_sdk.session import STOP_SIGNALS


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
