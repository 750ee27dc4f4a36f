"""What waits to be sent to the coordinator: a queue, and beside it at most one report.

Problem: on a link that is slow for a while telemetry piles up, and then events, which matter, wait
behind figures that nobody wants any more. So a report is never queued. It lies beside the queue,
where a newer one takes its place, and rides on the first heartbeat behind which nothing waits; its
age grows meanwhile and is told. An event therefore never waits for a report, and a report never
for more than events.
"""

import asyncio
from collections import deque
from dataclasses import replace
from typing import Final

from agent.core.gpu_messages import Report
from agent.core.messages import Heartbeat, Upward

# Messages to a coordinator that does not read; beyond that the link is dead.
OUTBOX_MAX: Final = 4_096


class Outbox:
    def __init__(self) -> None:
        self._messages: deque[Upward] = deque()
        self._report: Report | None = None
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._messages)

    def clear(self) -> None:
        """A new session says everything anew."""
        self._messages.clear()
        self._report = None

    def push(self, message: Upward) -> bool:
        """False: it is full, and the message is not taken."""
        if len(self._messages) >= OUTBOX_MAX:
            return False
        self._messages.append(message)
        self.wake()
        return True

    def lay(self, report: Report) -> None:
        """In the place of one that was not sent yet."""
        self._report = report

    def take(self, now_ms: int) -> Upward | None:
        """The next to be sent; `None`: nothing waits."""
        if not self._messages:
            return None
        message, report = self._messages.popleft(), self._report
        if report is None or self._messages or not isinstance(message, Heartbeat):
            return message
        self._report = None
        age_ms = max(0, now_ms - report.sampled_ms)
        return replace(message, host=report.host, gpus=report.gpus, telemetry_age_ms=age_ms)

    def wake(self) -> None:
        """Whoever waits looks again."""
        self._filled.set()

    async def wait(self) -> None:
        """Until somebody has pushed or woken since the last time."""
        await self._filled.wait()
        self._filled.clear()
