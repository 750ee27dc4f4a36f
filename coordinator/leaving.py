"""The end of the process, also where a thread beside the loop does not end.

Problem: Python waits for its threads before it leaves. One that a solver hangs in, or a disk that
is away, then keeps a coordinator that has closed its store for ever, until systemd kills it; after
a bug in the loop nobody kills it at all, and nobody is there to decide.
"""

import os
import sys
import threading
import time
from typing import Final

from coordinator.logs import emit

# Longer than a decision over 10,000 jobs takes; well within systemd's patience.
GRACE_S: Final = 3.0


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
