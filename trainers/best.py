"""The best evaluation so far, and whether it is worth going on.

Problem: a fixed number of steps is a guess. Past the best figure on held-out data a model learns
its training data by heart, and the GPU is busy for nothing. So training ends when ``patience``
evaluations in a row were no better than the best before them. What decides that is part of every
checkpoint, or each handoff would give the job new patience.

A figure that is not a finite number is never better.
"""

import math
from typing import Any


class Best:
    """The best value of one figure. ``patience`` 0: never ends the training."""

    def __init__(self, *, higher_is_better: bool, patience: int) -> None:
        self.higher_is_better = higher_is_better
        self.patience = patience
        self.value = math.nan
        self.step = -1
        self.evaluations_since = 0

    def take(self, step: int, value: float) -> bool:
        """Hear of an evaluation after ``step`` steps. Returns whether it is the best so far."""
        better = math.isfinite(value)
        if better and not math.isnan(self.value):
            better = value > self.value if self.higher_is_better else value < self.value
        if better:
            self.value, self.step, self.evaluations_since = value, step, 0
        else:
            self.evaluations_since += 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.patience <= self.evaluations_since

    def state(self) -> dict[str, Any]:
        """JSON values; no value yet is null, for which JSON has a word."""
        value = None if math.isnan(self.value) else self.value
        return {"value": value, "step": self.step, "evaluations_since": self.evaluations_since}

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave."""
        self.value = math.nan if state["value"] is None else state["value"]
        self.step = state["step"]
        self.evaluations_since = state["evaluations_since"]
