"""Says when nobody new can connect, since this process or the system has no descriptor left.

Problem: gRPC accepts connections below Python, and what it says of those that it cannot accept goes
nowhere. Who is connected goes on; an agent that dials, or a person, waits, and no log says why. So
every few seconds a descriptor is asked for and given back.
"""

import asyncio
import os
from collections.abc import Callable

LOOK_S = 5.0  # shorter than anybody takes to ask why; two system calls

Emit = Callable[[str, str, tuple[tuple[str, object], ...]], None]


async def watch(emit: Emit) -> None:
    """Until it is cancelled; each time that it changes is told."""
    refused = ""
    while True:
        before, refused = refused, _refusal()
        if refused and not before:
            emit("error", "descriptors.none", (("reason", refused),))
        elif before and not refused:
            emit("info", "descriptors.again", ())
        await asyncio.sleep(LOOK_S)


def _refusal() -> str:
    try:
        os.close(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""
