"""Off, gently: the operating system is asked to shut down, and after a bound the power is cut.

Problem: a cut spares no file system, and a shutdown that is asked for may never come: the system
hangs, or does not listen. So it is asked first, and looked at until it is off; where asking fails,
or the bound has passed, it is cut. Nothing runs on such a node any more: that is settled before a
driver is asked at all.
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from coordinator.capacity.driver import CapacityError
from coordinator.ports import Clock

LOOK_MS: Final = 2_000  # between two looks at a node that shuts down


async def switch_off(
    ask: Callable[[], Awaitable[None]],
    cut: Callable[[], Awaitable[None]],
    is_off: Callable[[], Awaitable[bool]],
    clock: Clock,
    graceful_ms: int,
) -> None:
    """Returns when it is off, or the power has been cut. Raises `CapacityError`."""
    if graceful_ms > 0:
        with contextlib.suppress(CapacityError):
            await ask()
            begun_ms = clock.now_ms()
            while clock.now_ms() - begun_ms < graceful_ms:
                if await is_off():
                    return
                await clock.sleep_ms(LOOK_MS)
    await cut()
