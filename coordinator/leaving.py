"""The end of the process, also where a thread beside the loop does not end.

Problem: Python waits for its threads before it leaves. One that a solver hangs in, or a disk that
is away, then keeps a coordinator that has closed its store for ever, until systemd kills it; after
a bug in the loop nobody kills it at all, and nobody is there to decide. The loop itself waits for
its own threads before that, of Python 3.11 without a limit: for a name that does not resolve, an
fsync, an export.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Final

from coordinator.crew import start_all
from coordinator.logs import emit

# Longer than a decision over 10,000 jobs takes; well within systemd's patience.
GRACE_S: Final = 3.0
# The loop's own: for names, exports, and a journal. A name that does not resolve keeps one.
THREADS: Final = 16


class _Threads(ThreadPoolExecutor):
    """A loop's own, which `leave` waits for, within its bound, and the loop does not."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def run(work: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`; returns also while a thread of the loop's hangs. Raises OSError where the
    system has no threads."""
    with closing(work), asyncio.Runner() as runner:
        threads = _Threads(THREADS, "asyncio")
        runner.get_loop().set_default_executor(threads)
        start_all(threads, THREADS, "the loop")
        runner.run(work)


def leave(status: int, grace_s: float = GRACE_S) -> None:
    """Returns when all threads have ended; where one has not, the process ends here, with `status`,
    and with the traceback of what is raised just now."""
    ends_s = time.monotonic() + grace_s
    for thread in _others():
        thread.join(max(0.0, ends_s - time.monotonic()))
    names = dict.fromkeys(thread.name for thread in _others())
    if not names:
        return
    reason = f"after {grace_s:g} s these are at work still: {', '.join(names)}"
    emit("warning", "coordinator.threads_left", (("reason", reason),))
    raised, error, trace = sys.exc_info()
    if raised is not None and error is not None:
        sys.excepthook(raised, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _others() -> list[threading.Thread]:
    """Those that Python would wait for."""
    here = threading.current_thread()
    return [each for each in threading.enumerate() if each is not here and not each.daemon]
