"""Serve the agent's probe over a pipe, to a test that must choose the process's environment before
it starts.

Problem: which `libnvidia-ml.so.1` a process gets is settled when it starts, so a test cannot try
several in its own process. This child opens the production probe, and answers each request line
with one line of JSON: `host_facts`, `gpu_facts`, `sample`, `absence`, or `calls` (which binding
functions ran in the sampler since the last asking, and how often: it is started through
`counting_sampler.py`).

    python -m tests.fakenvml.probe_child STATE_DIRECTORY [ALLOWED_UUID ...]
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from agent.telemetry.probe import NvmlProbe
from agent.telemetry.remote import Deadlines
from tests.fakenvml import counting_sampler

PATIENT = Deadlines(fast_ms=60_000, slow_ms=60_000)  # nothing hangs here, and a machine may be slow
COUNTING_SAMPLER = os.path.abspath(counting_sampler.__file__)


def main(state_directory: str, allowed_uuids: list[str]) -> None:
    """Answer until standard input ends."""
    with tempfile.NamedTemporaryFile() as calls:
        command = (sys.executable, "-P", COUNTING_SAMPLER, calls.name)
        allowed = allowed_uuids or None
        with NvmlProbe(
            Path(state_directory), allowed_uuids=allowed, command=command, deadlines=PATIENT
        ) as probe:
            _say("open")  # before this, a change of the described GPUs would not be a change
            for request in sys.stdin:
                _say(_answer(probe, request.strip(), Path(calls.name)))


def _say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _answer(probe: NvmlProbe, request: str, calls: Path) -> Any:
    if request == "host_facts":
        return dataclasses.asdict(probe.host_facts())
    if request == "gpu_facts":
        return [dataclasses.asdict(facts) for facts in probe.gpu_facts()]
    if request == "sample":
        return dataclasses.asdict(probe.sample())
    if request == "occupancy":
        uuids = [facts.uuid for facts in probe.gpu_facts()]
        return [dataclasses.asdict(found) for found in probe.occupancy(uuids)]
    if request == "absence":
        return probe.absence
    if request == "calls":
        counted = Counter(calls.read_text(encoding="ascii").split())
        os.truncate(calls, 0)
        return dict(counted)
    raise ValueError(f"unknown request: {request!r}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
