"""Threads that are there from the beginning.

Problem: who needs a thread under a memory limit may get none, or, worse, one that has no memory for
its first step; whoever has started that one waits for its sign of life for ever (`Thread.start`).
In the loop's thread that is the end of the coordinator, long after its start, and without a word.

How: an executor starts all its threads while the program starts, and none later.
"""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor


def crew(count: int, name: str) -> ThreadPoolExecutor:
    """So many threads, all of them started. Raises OSError where the system has not so many."""
    executor = ThreadPoolExecutor(count, name)
    start_all(executor, count, name)
    return executor


def start_all(executor: ThreadPoolExecutor, count: int, name: str) -> None:
    """Of one that has `count` and has started none. Raises OSError, and has ended it then."""
    together = threading.Barrier(count + 1)  # none is idle before all are there
    try:
        for _ in range(count):
            executor.submit(together.wait)
        together.wait()
    except RuntimeError as error:
        together.abort()
        executor.shutdown(wait=False)
        raise OSError(errno.EAGAIN, f"the system has no thread left for {name}") from error
