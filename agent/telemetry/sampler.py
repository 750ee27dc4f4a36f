"""The process that calls the driver, and nothing else.

Problem: a driver call can block for minutes or for ever, and a process that waits in the kernel
(state D) cannot be killed. In the agent's own process it would take a thread with it, and whoever
waits for the lock; a thread cannot be given up, a process can. So NVML is opened here, in a process
of its own that imports the binding and little more, and that can be left behind.

It answers requests, one after the other, on a socket whose descriptor is its first argument (its
parent's pid is the second, a socket for what `xid_events.py` tells unasked the third): messages of
JSON, which `SOCK_SEQPACKET` keeps apart. The answer to a
request is a message for each GPU as soon as it is read, in the order that was asked for, so that a
GPU that hangs hides only itself and those behind it; then one that says that it is done.

    {"id": 1, "ask": "open", "allowed": null, "known": []}   facts of every GPU; of none, where
                                                             some UUIDs are known from before;
                                                             "pcie_throughput": true, it is read
    {"id": 2, "ask": "facts", "again": true}                 facts of every GPU, enumerated again;
                                                             some time after the last try
    {"id": 3, "ask": "sample", "uuids": ["GPU-..."]}         a reading of each; likewise "usage" and
                                                             "inventory", which are read less often
    {"id": 4, "ask": "occupancy", "uuids": ["GPU-..."]}      who uses each

The last message also has how often calls have failed since the one before it; which whole GPUs were
enumerated, whatever came of it (`listed`); and why the process ends, when it has to (`ends`): a
library stays as it was loaded, so another driver is for another process.

It ends when the socket closes; and, where a call can still be interrupted, with the thread of the
agent that started it (PR_SET_PDEATHSIG).
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Final

if __name__ == "__main__":
    # The binding imports `find_library` from there, for Windows; with what that imports, 1 MiB.
    sys.modules["ctypes.util"] = ModuleType("ctypes.util")
    sys.modules["ctypes.util"].__dict__["find_library"] = None

from agent.telemetry import MESSAGE_BYTES_MAX
from agent.telemetry.nvml import NvmlGpus
from agent.telemetry.xid_events import watch_events

_PR_SET_PDEATHSIG: Final = 1


def _fields(value: Any) -> dict[str, Any]:
    """Of a dataclass; `dataclasses.asdict` copies what is below it, too, which takes as long as
    reading the GPU."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


_JSON: Final = json.JSONEncoder(default=_fields)


def main(descriptor: int, event_descriptor: int | None = None) -> None:
    """Serve until the other end is closed. The driver's errors are told on a socket of their own,
    where there is one."""
    with socket.socket(fileno=descriptor) as channel:
        gpus = NvmlGpus()
        watching = event_descriptor is None
        while message := _receive(channel):
            request = json.loads(message)
            if request["ask"] == "open":
                throughput = request.get("pcie_throughput", False)
                gpus = NvmlGpus(request["allowed"], pcie_throughput=throughput)
            for answer in _answers(gpus, request):
                _send(channel, {"id": request["id"], **answer})
                if not watching and event_descriptor is not None and gpus.handles():
                    watching = True
                    _watch(gpus, event_descriptor)
            done = {"done": True, "absence": gpus.absence, "failures": gpus.take_failures()}
            done |= {"listed": gpus.take_listed(), "ends": gpus.outdated}
            _send(channel, {"id": request["id"], **done})
            if gpus.outdated:
                return


def _answers(gpus: NvmlGpus, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if request["ask"] in ("sample", "usage", "inventory", "occupancy"):
        read = getattr(gpus, request["ask"])
        for uuid in request["uuids"]:
            yield {request["ask"]: read(uuid)}
        return
    if not gpus.open(again=request.get("again", False)):
        return
    yield {"driver_version": gpus.driver_version()}
    known = request.get("known", ())
    gpus.adopt(known)
    if not known:
        for facts in gpus.enumerate():
            yield {"facts": facts}


def _watch(gpus: NvmlGpus, descriptor: int) -> None:
    """It ends with the process."""
    channel = socket.socket(fileno=descriptor)
    arguments = (gpus.handles, channel)
    threading.Thread(target=watch_events, args=arguments, daemon=True).start()


def _receive(channel: socket.socket) -> bytes:
    try:
        return channel.recv(MESSAGE_BYTES_MAX)
    except ConnectionError:
        return b""


def _send(channel: socket.socket, answer: Mapping[str, Any]) -> None:
    try:
        channel.send(_JSON.encode(answer).encode())
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # nobody is there to hear it


def _end_with(parent_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent_pid:
        sys.exit(0)  # it went before we asked


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    main(int(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
