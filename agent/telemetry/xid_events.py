"""The driver's errors as NVML tells of them: a thread of the sampler that waits for the next one.

Problem: NVML keeps no errors for later. Who does not wait for one has not seen it, and the thread
that reads GPUs may be blocked by the very GPU that has the error. So a thread of its own waits, and
says what comes, a datagram each, on a socket that only it writes to; the binding lets go of the
interpreter while it waits.

GPUs that are found later are waited for from the next round on. A lost GPU makes every wait fail at
once; then the thread pauses, and goes on for the others.
"""

import ctypes
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import pynvml

WAIT_MS: Final = 1_000  # how late a GPU that is found later is waited for


def watch_events(handles: Callable[[], Mapping[str, Any]], channel: socket.socket) -> None:
    """Until nobody hears it, or the driver has no such function; `handles` are those known by
    now, by UUID."""
    try:
        events = pynvml.nvmlEventSetCreate()
    except pynvml.NVMLError:
        return
    names: dict[int | None, str] = {}
    tried: dict[str, Any] = {}
    while True:
        for uuid, handle in list(handles().items()):
            if tried.get(uuid) is not handle:
                tried[uuid] = handle
                names[_address(handle)] = uuid
                _register(handle, events)
        try:
            event = pynvml.nvmlEventSetWait_v2(events, WAIT_MS)
        except pynvml.NVMLError_FunctionNotFound:
            return
        except pynvml.NVMLError_Timeout:
            continue
        except pynvml.NVMLError:
            time.sleep(WAIT_MS / 1000)
            continue
        uuid = names.get(_address(event.device), "")
        if uuid and event.eventType == pynvml.nvmlEventTypeXidCriticalError:
            seen = {"uuid": uuid, "code": event.eventData, "unix_ms": time.time_ns() // 1_000_000}
            try:
                channel.send(json.dumps(seen).encode())
            except OSError:
                return  # nobody is there to hear it


def _register(handle: Any, events: Any) -> None:
    """A GPU without events is one that the kernel's log tells of."""
    try:
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError:
        return


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
