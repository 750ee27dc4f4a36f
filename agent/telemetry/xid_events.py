"""The driver's errors as NVML tells of them: a thread of the sampler that waits for the next one.

Problem: NVML keeps no errors for later. Who does not wait for one has not seen it, and the thread
that reads GPUs may be blocked by the very GPU that has the error. So a thread of its own waits, and
says what comes, a datagram each, on a socket that only it writes to; the binding lets go of the
interpreter while it waits.

The driver tells of a MIG instance's errors as its GPU's: they are told of every instance that is
known, since the error of one may be that of all, and the kernel's log tells no more either.

GPUs that are found later are waited for from the next round on. A lost GPU makes every wait fail at
once; then the thread pauses, and goes on for the others.
"""

import contextlib
import ctypes
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import pynvml

_INSTANCE: Final = "MIG-"
WAIT_MS: Final = 1_000  # how late a GPU that is found later is waited for


def watch_events(handles: Callable[[], Mapping[str, Any]], channel: socket.socket) -> None:
    """Until nobody hears it, or the driver has no such function; `handles` are those known by
    now, by UUID."""
    try:
        events = pynvml.nvmlEventSetCreate()
    except pynvml.NVMLError:
        return
    names: dict[int | None, list[str]] = {}
    tried: dict[str, int | None] = {}
    while True:
        for uuid, handle in list(handles().items()):
            if tried.get(uuid) != _address(handle):
                tried[uuid] = _address(handle)
                _wait_for(uuid, handle, names, events)
        try:
            event = pynvml.nvmlEventSetWait_v2(events, WAIT_MS)
        except pynvml.NVMLError_FunctionNotFound:
            return
        except pynvml.NVMLError_Timeout:
            continue
        except pynvml.NVMLError:
            time.sleep(WAIT_MS / 1000)
            continue
        if event.eventType != pynvml.nvmlEventTypeXidCriticalError:
            continue
        for uuid in names.get(_address(event.device), ()):
            seen = {"uuid": uuid, "code": event.eventData, "unix_ms": time.time_ns() // 1_000_000}
            try:
                channel.send(json.dumps(seen).encode())
            except OSError:
                return  # nobody is there to hear it


def _wait_for(uuid: str, handle: Any, names: dict[int | None, list[str]], events: Any) -> None:
    """A GPU without events is one that the kernel's log tells of."""
    if uuid.startswith(_INSTANCE):
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    known = names.setdefault(_address(handle), [])
    if uuid not in known:
        known.append(uuid)
    if len(known) > 1:
        return  # an instance of a GPU that is waited for
    try:
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError:
        return


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
