"""A gate for built-in trainers: with `GATE` in a job's environment they go as far as it says.

Problem: what is done to a training that runs at its own speed is done to one that has ended, where
whoever does it was held up. `counting.py` waits at a gate of its own. The trainers that people use
have none, so where the agent puts this directory on PYTHONPATH their session waits for them, after
it has told a step that the gate does not let them go beyond. Whoever is asked to stop goes on to
where that is looked at. A process that trainers are forked from gets it as they do.
"""

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baton_sdk

POLL_S = 0.02


def wait(session: baton_sdk.Session, gate: Path, step: int) -> None:
    """Until the gate is open beyond this step, or the training is to stop."""
    pause = threading.Event()
    while step >= int(gate.read_text("ascii")) and session.stop_requested is None:
        pause.wait(POLL_S)


def gated(progress: Callable[..., None]) -> Callable[..., None]:
    """`Session.progress`, and the wait after it, which has no limit to be called hung at."""

    @functools.wraps(progress)
    def told(session: baton_sdk.Session, step: int, steps: int, *more: Any) -> None:
        progress(session, step, steps, *more)
        gate = os.environ.get("GATE", "")
        if gate and step < steps:
            section = session._section
            session.enter("")
            wait(session, Path(gate), step)
            session.enter(section)

    return told


baton_sdk.Session.progress = gated(baton_sdk.Session.progress)  # type: ignore[method-assign]
