"""Serve the agent's probe over a pipe, to a test that must choose the process's environment before
it starts.

Problem: which `libnvidia-ml.so.1` a process gets is settled when it starts, so a test cannot try
several in its own process. This child opens the production probe, and answers each request line
with one line of JSON: `host_facts`, `gpu_facts`, `sample`, `absence`, or `calls` (which binding
functions ran since the last asking, and how often).

    python -m tests.fakenvml.probe_child STATE_DIRECTORY [ALLOWED_UUID ...]
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml

from agent.telemetry.probe import NvmlProbe


def main(state_directory: str, allowed_uuids: list[str]) -> None:
    """Answer until standard input ends."""
    calls: Counter[str] = Counter()
    _count_calls(calls)
    with NvmlProbe(Path(state_directory), allowed_uuids=allowed_uuids or None) as probe:
        _say("open")  # before this, a change of the described GPUs would not be a change
        for request in sys.stdin:
            _say(_answer(probe, request.strip(), calls))


def _say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _answer(probe: NvmlProbe, request: str, calls: Counter[str]) -> Any:
    if request == "host_facts":
        return dataclasses.asdict(probe.host_facts())
    if request == "gpu_facts":
        return [dataclasses.asdict(facts) for facts in probe.gpu_facts()]
    if request == "sample":
        return dataclasses.asdict(probe.sample())
    if request == "absence":
        return probe.absence
    if request == "calls":
        counted = dict(calls)
        calls.clear()
        return counted
    raise ValueError(f"unknown request: {request!r}")


def _count_calls(calls: Counter[str]) -> None:
    """Count native calls: the binding looks the pointer up once per call, found or not."""
    lookup: Callable[[str], Any] = pynvml._nvmlGetFunctionPointer

    def counted(name: str) -> Any:
        calls[name] += 1
        return lookup(name)

    pynvml._nvmlGetFunctionPointer = counted


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
