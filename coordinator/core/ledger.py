"""What each project has used of the fleet's GPUs, fading: a function of the stays that are kept.

Problem: a decision asks many times a minute how much ten projects have used, of ten thousand
attempts. A walk through these takes too long, and a sum that is carried along drifts from what a
restart would find. So the hours of ended stays are counted in whole numbers, by project and hour of
the clock: whatever came in whichever order, and was forgotten since, the counts are the same, and
the answer is a sum over the hours of one week. Those that go on are counted likewise, by the hour
in which they began.

What is counted is a GPU's time from its promise to its return, weighted (`quotas.py`). Wall time is
right here although clocks get set: it has to outlive the coordinator, which no monotonic clock
does. A clock that is an hour off is wrong by a day's twenty-fourth.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.model import Attempt, GpuFacts, JobSpec
from coordinator.core.quotas import MEAN_LIFE_H, PARTS, weight_parts
from coordinator.core.shares import ratio

MS_PER_H: Final = 3_600_000
# After a week a thousandth is left; older hours are not looked at.
HOURS_LOOKED_AT: Final = 168


@dataclass(frozen=True, slots=True)
class Stay:
    """Somebody has GPUs of `parts` thousandths, weighted, since `begin_ms` and until `end_ms`;
    `None`: it goes on. Both by the wall's clock."""

    project: str
    parts: int
    begin_ms: int
    end_ms: int | None = None


@dataclass(slots=True)
class Ledger:
    """`ended` is by project and hour, in thousandths of a weighted GPU-millisecond; `going_on` by
    project and the hour of the beginning: thousandths, and these times the milliseconds since the
    hour began."""

    stays: dict[str, Stay] = field(default_factory=dict)
    ended: dict[str, dict[int, int]] = field(default_factory=dict)
    going_on: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)

    def attempt(self, attempt: Attempt, spec: JobSpec, gpus: Iterable[GpuFacts]) -> None:
        """After it has changed; `gpus` are its node's. One that is out of reach has ended when it
        was silent, unless it comes back."""
        known = self.stays.get(attempt.id)
        parts = attempt.quota_parts if known is None else known.parts
        if parts is None:
            parts = attempt_parts(spec, attempt.gpu_uuids, gpus)
        ends = (attempt.times.over_unix_ms, attempt.ended_unix_ms)
        end_ms = next((end for end in ends if end is not None), None)
        self.note(attempt.id, Stay(spec.project, parts, attempt.assigned_unix_ms, end_ms))

    def note(self, name: str, stay: Stay) -> None:
        """Put in, or replace what was known by this name."""
        if self.stays.get(name) != stay:
            self.forget(name)
            self.stays[name] = stay
            self._count(stay, 1)

    def forget(self, name: str) -> None:
        stay = self.stays.pop(name, None)
        if stay is not None:
            self._count(stay, -1)

    def parts(self, name: str) -> int:
        """Of one who is known."""
        stay = self.stays.get(name)
        return 0 if stay is None else stay.parts

    def used_h(self, now_ms: int) -> dict[str, float]:
        """Weighted GPU-hours of every project that has any, faded."""
        this = now_ms // MS_PER_H
        hours = range(this - HOURS_LOOKED_AT + 1, this + 1)
        fading = [(hour, _faded(now_ms, hour)) for hour in hours]
        found: dict[str, float] = {}
        for project in sorted([*self.ended, *(p for p in self.going_on if p not in self.ended)]):
            booked = self.ended.get(project, {})
            gone = sum(booked[hour] * left for hour, left in fading if hour in booked) / MS_PER_H
            held = sum(_held_h(now_ms, *each) for each in self._begun(project))
            found[project] = (gone + held) / PARTS
        return found

    def _begun(self, project: str) -> Iterable[tuple[int, int, int]]:
        sums = sorted(self.going_on.get(project, {}).items())
        return [(hour, parts, offsets) for hour, (parts, offsets) in sums]

    def _count(self, stay: Stay, sign: int) -> None:
        if not stay.parts:
            return
        if stay.end_ms is None:
            begun = self.going_on.setdefault(stay.project, {})
            hour, offset_ms = divmod(stay.begin_ms, MS_PER_H)
            parts, offsets = begun.get(hour, (0, 0))
            parts, offsets = parts + sign * stay.parts, offsets + sign * stay.parts * offset_ms
            begun[hour] = parts, offsets
            if not parts:
                del begun[hour]
            if not begun:
                del self.going_on[stay.project]
            return
        booked = self.ended.setdefault(stay.project, {})
        last = stay.end_ms // MS_PER_H
        for hour in range(max(stay.begin_ms // MS_PER_H, last - HOURS_LOOKED_AT), last + 1):
            begin_ms, end_ms = hour * MS_PER_H, (hour + 1) * MS_PER_H
            spent_ms = min(stay.end_ms, end_ms) - max(stay.begin_ms, begin_ms)
            if spent_ms > 0:
                booked[hour] = booked.get(hour, 0) + sign * stay.parts * spent_ms
                if not booked[hour]:
                    del booked[hour]
        if not booked:
            del self.ended[stay.project]


def attempt_parts(spec: JobSpec, gpu_uuids: Iterable[str], gpus: Iterable[GpuFacts]) -> int:
    """Of all that it has, as it is written down when it is promised: its node may list them no more
    when the attempt is counted anew."""
    facts = {gpu.uuid: gpu for gpu in gpus}
    return sum(gpu_parts(spec, facts.get(uuid)) for uuid in gpu_uuids)


def gpu_parts(spec: JobSpec, gpu: GpuFacts | None) -> int:
    """What a job's hour on this GPU counts; of a shared one its part does, of one that has a GPU to
    itself where it can all of it. One that is not known any more counts as an unknown type."""
    if gpu is None:
        return PARTS
    parts = weight_parts(gpu.name, gpu.memory_bytes)
    return parts if spec.share_automatic else max(1, round(parts * ratio(spec, gpu)))


def _faded(now_ms: int, hour: int) -> float:
    """How much is left of what was used in that hour, on average at the middle of it; of the
    present one at the middle of what has passed."""
    begin_ms = hour * MS_PER_H
    middle_ms = (begin_ms + min(now_ms, begin_ms + MS_PER_H)) / 2
    return math.exp(-(now_ms - middle_ms) / MS_PER_H / MEAN_LIFE_H)


def _held_h(now_ms: int, hour: int, parts: int, offsets: int) -> float:
    """What those who began in an hour, on average at one moment of it, have used since."""
    since_h = max(0.0, now_ms - hour * MS_PER_H - offsets / parts) / MS_PER_H
    return parts * MEAN_LIFE_H * -math.expm1(-since_h / MEAN_LIFE_H)
