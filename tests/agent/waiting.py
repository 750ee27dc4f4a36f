"""Waiting for what other processes and threads do, which set no event for us."""

import asyncio
from collections.abc import Callable

DEADLINE_S = 30.0  # for a condition on a busy machine; reached only when the test fails
POLL_S = 0.005


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(POLL_S)
