"""The decision over all jobs, beside the coordinator's loop: in a thread, one after another.

Problem: it takes seconds of a core where there are ten thousand jobs, and the loop renews leases
meanwhile. So the loop only notes what it wants, and the answer comes through its inbox. The solver
lets other threads run; our own arithmetic around it shares the interpreter with the loop, which
waits a few milliseconds for its turn instead of seconds. Another process would have to be handed
all of it.

What goes wrong in there is told as an answer that has nothing: the loop asks again in a minute.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from coordinator.core.messages import AllocationMade, MakeAllocation
from coordinator.core.weighing import answer


class Allocator:
    """`coordinator.ports.Allocating`. `post` is called in the loop's thread."""

    def __init__(self, post: Callable[[AllocationMade], None]) -> None:
        self._post = post
        self._asked: MakeAllocation | None = None
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="allocation")

    def make(self, asked: MakeAllocation) -> None:
        """Whoever asks again does not wait for the answer to what he asked before."""
        self._asked = asked
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                asked, self._asked = self._asked, None
                if asked is not None:
                    answering = loop.run_in_executor(self._thread, answer, asked)
                    await asyncio.wait((answering,))
                    error = answering.exception()
                    failed = AllocationMade(asked.asking, None, reason=repr(error))
                    self._post(failed if error is not None else answering.result())
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
