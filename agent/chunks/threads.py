"""Who does the disk work of this node's chunk store.

Problem: hashing and syncing block, and the loop must not. All of it runs in threads. Two for this
node's store keep a box's disk busy without taking cores from trainers. Draining (hashing and
keeping a new checkpoint, reading it again to send it) has two of its own at a low priority: it must
not take a core from the training that goes on meanwhile, and a restore must not wait behind it. The
list for the hello has one to itself: a node's lease would end while checkpoints are being hashed.

A thread cannot be interrupted, so long copies go through them chunk by chunk.

A user, or a unit with its jobs in it, may be out of threads at any moment (pthread_create(3),
EAGAIN), and an executor that makes them when they are needed then fails in the middle of its work.
So a `crew` is there from its beginning or not at all, and who has `Helpers` for a while does
without where there are none.
"""

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

# One that hashes and one that waits for the disk.
THREADS_MAX = 2
# Of the threads that drain, between a trainer's 0 and the 19 that never runs on a full machine: a
# checkpoint is wanted soon.
DRAIN_NICE = 10

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def crew(
    count: int, name: str, initializer: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """So many threads, all of them started. Raises OSError where the system has not so many."""
    executor = ThreadPoolExecutor(count, name, initializer)
    together = threading.Barrier(count + 1)  # none is idle before all are there
    try:
        for _ in range(count):
            executor.submit(together.wait)
        together.wait()
    except RuntimeError as error:
        together.abort()
        executor.shutdown(wait=False)
        raise OSError(errno.EAGAIN, f"the system has no thread left for {name}") from error
    return executor


class Helpers:
    """At most `count` threads for one who waits for them, as long as the block. What has been
    submitted is over when it ends; without threads it is over at once, and raises there."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._executor: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._count > 1:  # one would only do what who waits for it can do
            with contextlib.suppress(OSError):  # then whoever submits does it
                self._executor = crew(self._count, self._name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def submit(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> Future[_Result]:
        if self._executor is not None:
            return self._executor.submit(work, *args, **kw)
        done: Future[_Result] = Future()
        done.set_result(work(*args, **kw))
        return done


class Threads:
    """`open` before use, `close` after."""

    def __init__(self) -> None:
        self._local: ThreadPoolExecutor | None = None
        self._drains: ThreadPoolExecutor | None = None
        self._listing: ThreadPoolExecutor | None = None

    def open(self) -> None:
        """Raises OSError where the system has no thread left."""
        self._local = crew(THREADS_MAX, "chunks")
        self._drains = crew(THREADS_MAX, "chunks-drain", _lower_priority)
        self._listing = crew(1, "chunks-listing")

    async def close(self) -> None:
        """Wait for what is in progress."""
        own = (self._local, self._drains, self._listing)
        self._local = self._drains = self._listing = None
        for executor in own:
            if executor is not None:
                await asyncio.to_thread(executor.shutdown)

    async def run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> _Result:
        assert self._local is not None, "not opened"
        call = partial(work, *args, **kw)
        return await asyncio.get_running_loop().run_in_executor(self._local, call)

    async def drain(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kw: _Arguments.kwargs
    ) -> _Result:
        """As `run`, at the low priority."""
        assert self._drains is not None, "not opened"
        call = partial(work, *args, **kw)
        return await asyncio.get_running_loop().run_in_executor(self._drains, call)

    async def list(self, work: Callable[[], _Result]) -> _Result:
        """As `run`, and waits for nothing but other lists."""
        assert self._listing is not None, "not opened"
        return await asyncio.get_running_loop().run_in_executor(self._listing, work)


def _lower_priority() -> None:
    """Of this thread alone: on Linux a thread has a nice value of its own (setpriority(2))."""
    thread = threading.get_native_id()
    nice = max(DRAIN_NICE, os.getpriority(os.PRIO_PROCESS, thread))  # nobody may raise it again
    # A service whose filter forbids it has a weight of its own for that (baton-agent.service).
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, nice)
