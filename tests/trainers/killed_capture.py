"""A process that is killed in the midst of its second capture: `test_overlap` starts it.

Its arguments are the slab's descriptor, the bytes of a slot, and how many slots there are.
"""

import os
import signal
import sys
import threading

import torch

import baton_sdk
from trainers import capture, checkpoint, overlap


class Slabbed(baton_sdk.Session):
    """A session with a slab that it was given."""

    def __init__(self, slab: baton_sdk.Slab) -> None:
        super().__init__({})
        self._given = slab

    def slab(self, slot_bytes: int, wait_s: float = 0.0) -> baton_sdk.Slab | None:
        return self._given


def main(words: list[str]) -> None:
    """One capture, and half of another."""
    descriptor, slot_bytes, slots = map(int, words)
    slab = baton_sdk.Slab(descriptor, slot_bytes, slots)
    slab.open()
    capturer = capture.Capturer(Slabbed(slab))
    weights = {name: torch.nn.Parameter(torch.ones(1000)) for name in ("a", "b", "c")}
    state = checkpoint.Snapshot({}, dict(weights), {}, {}, {})
    capturer.take(state, 1)
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(2.0)
    left = iter((True, False))
    move = overlap.move
    one_at_a_time = threading.Lock()

    def dying(target: int, source: int, size_bytes: int) -> None:
        with one_at_a_time:
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            move(target, source, size_bytes)

    overlap.move = dying
    capturer.begin(state, 2)
    capturer.settle()


if __name__ == "__main__":
    main(sys.argv[1:])
