"""Policies that share time: parts of each job's time by a linear program, carried out in rounds.

Problem: what is fair is a statement about parts ("a third of a V100"), and GPUs are given whole.
So, as Gavel does it, a linear program says which part of its time each job should spend on each
type, and at the beginning of a round the GPUs go to those who had least of what they should have.
Who runs where it ran before does not restart. The three objectives are least attained service
(max-min, with and without an eye for the type), the finish-time fairness of Themis, and makespan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np

from coordinator.sim.model import Placement, Seen, View
from coordinator.sim.policies import free_gpus, running
from coordinator.solver import Floats, level

ROUND_MS: Final = 360_000  # Gavel's six minutes
# To within a thousandth of the ratio between the best and the worst that is looked at.
BISECTIONS: Final = 14
FAIRNESS_RATIO_MAX: Final = 64.0

Who = tuple[tuple[int, ...], tuple[tuple[str, int], ...]]  # jobs, and how many GPUs of each type


class Goal(Enum):
    """What the parts are chosen for."""

    MAX_MIN_BLIND = "max-min, type-blind"
    MAX_MIN = "max-min"
    FINISH_TIME_FAIRNESS = "finish-time fairness"
    MAKESPAN = "makespan"


@dataclass(slots=True)
class Rounds:
    """One run's worth: it remembers what each job had of each type. What max-min gives follows from
    who is there on what, so it is `kept` while that stays."""

    goal: Goal
    tick_ms: int = ROUND_MS
    seen_ms: int = -1
    round: int = -1
    had_ms: dict[tuple[int, str], int] = field(default_factory=dict)
    kept: tuple[Who, Floats] | None = None

    @property
    def name(self) -> str:
        return self.goal.value

    def decide(self, view: View) -> Mapping[int, Placement]:
        for seen in view.jobs:
            if seen.placement is not None:
                key = (seen.job.job_id, seen.placement.gpu_type)
                self.had_ms[key] = self.had_ms.get(key, 0) + view.now_ms - self.seen_ms
        self.seen_ms = view.now_ms
        if view.now_ms // self.tick_ms == self.round or not view.jobs:
            placed = running(view)
        else:
            self.round = view.now_ms // self.tick_ms
            placed = self._begin(view)
        self._fill(view, placed)
        return placed

    def _begin(self, view: View) -> dict[int, Placement]:
        names = [name for name, count in view.capacity.items() if count]
        if not names:
            return {}
        parts = self._parts_of(view, names)
        free = dict(view.capacity)
        placed: dict[int, Placement] = {}
        order = []
        for row, seen in enumerate(view.jobs):
            job = seen.job
            alive_ms = view.now_ms - job.arrival_ms + self.tick_ms
            for column, name in enumerate(names):
                had = self.had_ms.get((job.job_id, name), 0) / alive_ms
                part = float(parts[row, column])
                if part > 1e-6:
                    order.append((-part / (had + 1e-3), row, name))
        for _, row, name in sorted(order):
            job = view.jobs[row].job
            if job.job_id not in placed and free[name] >= job.gpus:
                free[name] -= job.gpus
                placed[job.job_id] = Placement(name, job.gpus)
        return placed

    def _fill(self, view: View, placed: dict[int, Placement]) -> None:
        """GPUs that are left over go to whoever waits, on the best type that is free."""
        free = free_gpus(view, placed)
        for seen in view.jobs:
            job = seen.job
            able = [
                (rate, name)
                for name, rate in job.rates.items()
                if rate > 0 and free.get(name, 0) >= job.gpus
            ]
            if job.job_id not in placed and able:
                _, name = max(able)
                free[name] -= job.gpus
                placed[job.job_id] = Placement(name, job.gpus)

    def _parts_of(self, view: View, names: Sequence[str]) -> Floats:
        if self.goal not in (Goal.MAX_MIN, Goal.MAX_MIN_BLIND):
            return self._parts(view, names)
        who = tuple(seen.job.job_id for seen in view.jobs), tuple(view.capacity.items())
        if self.kept is None or self.kept[0] != who:
            self.kept = who, self._parts(view, names)
        return self.kept[1]

    def _parts(self, view: View, names: Sequence[str]) -> Floats:
        capacity = np.array([view.capacity[name] for name in names], dtype=np.float64)
        gpus = np.array([seen.job.gpus for seen in view.jobs], dtype=np.float64)
        rates = np.array([[seen.job.rates.get(n, 0.0) for n in names] for seen in view.jobs])
        rates[gpus[:, None] > capacity] = 0.0
        if self.goal is Goal.MAX_MIN_BLIND:
            rates = (rates > 0).astype(np.float64)
        equal = np.maximum(rates @ (capacity / capacity.sum()), 1e-9)
        rates /= equal[:, None]
        if self.goal is Goal.FINISH_TIME_FAIRNESS:
            return self._fair_parts(view, rates, equal, gpus, capacity)
        if self.goal is Goal.MAKESPAN:
            needs = np.array([_left_s(seen) for seen in view.jobs]) / equal
            needs /= needs.max()
        else:
            needs = 1 / gpus
        found = level(rates, needs, gpus, capacity)
        return found[0] if found else np.zeros_like(rates)

    def _fair_parts(
        self, view: View, rates: Floats, equal: Floats, gpus: Floats, capacity: Floats
    ) -> Floats:
        """The smallest ratio, of the time that each job will have taken to what it would have taken
        on an equal part of the fleet, that all can have."""
        left_s = np.array([_left_s(seen) for seen in view.jobs]) / equal
        part = np.minimum(1.0, capacity.sum() / len(view.jobs) / gpus)
        alone_s = np.array([seen.job.steps for seen in view.jobs]) / equal / part
        since_s = np.array([(view.now_ms - seen.job.arrival_ms) / 1000 for seen in view.jobs])
        # For whom it is too late already gets a round, or nobody could have anything.
        lost = FAIRNESS_RATIO_MAX * alone_s <= since_s
        low, high = 0.0, FAIRNESS_RATIO_MAX
        best = np.zeros_like(rates)
        for _ in range(BISECTIONS):
            ratio = (low + high) / 2
            room_s = np.where(lost, self.tick_ms / 1000, ratio * alone_s - since_s)
            found = None
            if room_s.min() > 0:
                found = level(rates, left_s / room_s, gpus, capacity)
            if found is not None and found[1] >= 1:
                best, high = found[0], ratio
            else:
                low = ratio
        return best


def _left_s(seen: Seen) -> float:
    """Steps, in fact; they become seconds by a division by a rate. Of a job that does not say how
    long it is they are a typical job's."""
    return max(1e-6, seen.job.steps if seen.steps_left is None else seen.steps_left)
