"""The decision over all jobs, beside the coordinator's loop: in a thread where no other hangs.

Problem: it takes seconds of a core where there are ten thousand jobs, and the loop renews leases
meanwhile. So the loop only notes what it wants, and the answer comes through its inbox. The solver
lets other threads run; our own arithmetic around it shares the interpreter with the loop, which
waits a few milliseconds for its turn instead of seconds. Another process would have to be handed
all of it.

What goes wrong in there is told as an answer that has nothing: the loop asks again in a minute. A
thread that hangs answers nothing, and nobody can end it. The core gives it up after a while and
asks for another decision, without the solver (`decisions.py`); that one has another thread and
waits for nobody. Threads that were given up are few: each may take a core, and keeps its jobs. All
are there from the beginning: under a memory limit there may be none later (`crew.py`).
"""

import asyncio
from collections.abc import Callable
from typing import Final

from coordinator.core.messages import AllocationMade, MakeAllocation
from coordinator.core.weighing import answer
from coordinator.crew import crew

# Three that the core lets the solver hang in, and one that decides without it.
THREADS_MAX: Final = 4
FULL: Final = f"{THREADS_MAX} of them have not ended; restart the coordinator, which costs nothing"


class Allocator:
    """`coordinator.ports.Allocating`; `post` is called in the loop's thread, as `make` is. `close`
    after use. Raises OSError where the system has no threads."""

    def __init__(self, post: Callable[[AllocationMade], None]) -> None:
        self._post = post
        # The first that is idle is asked: what the last decision took of memory serves the next.
        self._threads = [crew(1, "allocation") for _ in range(THREADS_MAX)]
        self._at_work: dict[int, asyncio.Future[AllocationMade]] = {}

    def make(self, asked: MakeAllocation) -> None:
        hanging = [number for number, work in self._at_work.items() if not work.done()]
        number = next((one for one in range(THREADS_MAX) if one not in hanging), None)
        if number is None:
            self._fail(asked, FULL)
            return
        thread = self._threads[number]
        answering = asyncio.get_running_loop().run_in_executor(thread, answer, asked)
        answering.add_done_callback(lambda _: self._tell(asked, answering))
        self._at_work[number] = answering

    def close(self) -> None:
        """Those that hang are left."""
        for thread in self._threads:
            thread.shutdown(wait=False)

    def _tell(self, asked: MakeAllocation, answering: asyncio.Future[AllocationMade]) -> None:
        error = answering.exception()
        if error is None:
            self._post(answering.result())
        else:
            self._fail(asked, repr(error))

    def _fail(self, asked: MakeAllocation, reason: str) -> None:
        self._post(AllocationMade(asked.asking, None, reason=reason))
