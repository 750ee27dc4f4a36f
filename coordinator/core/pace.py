"""How fast an attempt makes its steps, by the coordinator's own clock.

Problem: a trainer's times say how long its steps took, not how long the job needs for them: saving,
evaluating and waiting for data come on top, and some trainers say no times at all. But every
program that tells its step is seen to move. So the first step that was told and the last one are
kept with the time at which they came, and what lies between them is all that an hour costs.

It is volatile: a restarted coordinator has measured it again within a minute.
"""

from dataclasses import dataclass, replace

from coordinator.core.model import Progress

# Less is the first steps, which are slower than the rest.
STEPS_MIN = 5
MEASURED_MS_MIN = 5_000


@dataclass(frozen=True, slots=True)
class Pace:
    """`total_steps` is 0 where the trainer does not say it."""

    first_step: int
    first_ms: int
    step: int
    step_ms: int
    total_steps: int = 0

    @property
    def ms_per_step(self) -> float | None:
        steps, took_ms = self.step - self.first_step, self.step_ms - self.first_ms
        if steps < STEPS_MIN or took_ms < MEASURED_MS_MIN:
            return None
        return took_ms / steps

    def remaining_ms(self, from_step: int) -> float | None:
        """How long the steps after `from_step` take; `None`: nobody knows."""
        each_ms = self.ms_per_step
        if each_ms is None or not self.total_steps:
            return None
        return max(0, self.total_steps - from_step) * each_ms


def told(pace: Pace | None, progress: Progress, now_ms: int) -> Pace:
    """After a word of its trainer. One that goes back to an earlier step is measured anew."""
    if pace is None or progress.step < pace.step:
        return Pace(progress.step, now_ms, progress.step, now_ms, progress.total_steps)
    if progress.step == pace.step:
        return replace(pace, total_steps=progress.total_steps)
    return replace(pace, step=progress.step, step_ms=now_ms, total_steps=progress.total_steps)
