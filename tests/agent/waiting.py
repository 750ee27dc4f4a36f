"""Waiting for what other processes and threads do, which set no event for us."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.processes.forks import ForkServers

DEADLINE_S = 30.0  # for a condition on a busy machine; reached only when the test fails
POLL_S = 0.005


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(POLL_S)


async def open_forks(servers: "ForkServers") -> None:
    """Shims are forked from now on, and no longer executed."""
    servers.open()
    async with asyncio.timeout(DEADLINE_S):
        await servers.plain.ready.wait()
