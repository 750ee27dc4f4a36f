"""What every test shares: one event loop library, and one way to draw random examples.

Two choices stand here so that no test makes them again. Async tests run on asyncio alone, because
the shells do; anyio's plugin runs them (`anyio_mode` in pyproject.toml). Hypothesis draws the same
examples in every run, because a commit that changed nothing must not turn red, and it knows no
deadline, because the speed of a shared machine is not a property of the code. To search for new
examples, say so: `HYPOTHESIS_PROFILE=explore pytest tests/core`; what it finds becomes an
`@example` or a golden file.

What the tests inherit is made the same everywhere: no hub of models is asked for anything, since
where there is no way out each question takes seconds of new attempts; Ctrl-C is not ignored; and no
GPU is seen but by the tests that are marked for one, `pytest -m gpu`: the others would train there,
round differently, and two ranks would find one card.
"""

import gc
import os
import signal
from collections.abc import AsyncIterator, Generator

import pytest
from hypothesis import HealthCheck, settings

GPU_ALONE = "gpu"  # what `-m` says then

# A busy two-core machine draws slowly; that says nothing about the strategy.
_UNHURRIED = [HealthCheck.too_slow]

settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=_UNHURRIED, print_blob=True
)
settings.register_profile(
    "explore", deadline=None, max_examples=2_000, suppress_health_check=_UNHURRIED, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

# Read when a library is imported, so before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts what runs in the background with SIGINT ignored, Python then leaves it so, and so
# does every program that a test starts and interrupts: it would never end.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Before a test module is imported, and with it torch."""
    if config.option.markexpr != GPU_ALONE:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting imports torch and makes objects by the hundred thousand, which stay: looking
    through them for garbage, again and again as they grow in number, was a third of it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The shells run on asyncio, so their tests do."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """One event loop for the whole run, as in production: gRPC delivers what is left of a closed
    channel to whichever loop is running, and fails when the channel's own is closed by then."""
    yield  # noqa: PT022 - while this generator is open, so is the loop
