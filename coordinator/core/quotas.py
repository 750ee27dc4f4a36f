"""Whose turn it is by quota: who has had less than its part comes first, and the rest is lent.

Problem: two teams share a fleet, and each bought half of it. A fixed half for each leaves GPUs idle
whenever one of them sleeps; no halves at all leave them to whoever asks most. So a project has a
quota of GPU-hours a day, weighted by type, and what counts against it fades: of what was used, half
is forgotten after `HALF_LIFE_H`. Whoever runs without a pause on its part of the fleet has then
used just its quota.

- What a project has used says how many GPUs it is entitled to *now*: as many as take it to its
  quota within `AHEAD_H`. Nothing used yet: six times its part, to catch up; all used: its part;
  a fifth more than that used: none.
- Its jobs are counted against that in the order of classes, those that run before those that wait,
  and the oldest first. Who comes beyond it runs on what is *lent*: after all jobs of its class that
  are within their projects' quotas, and it gives way to them once it has run for its minimum.
- A job that runs stays within as long as those before it leave anything, one that waits needs room
  for all of it: so nobody starts to be recalled at once. A job that is larger than all that its
  project is ever entitled to starts when the project is below its quota.
- Of what is lent each gets by its weight, and less the more it has had beyond its quota.

An hour of one type counts for more than an hour of another by what is public of their speed in
training (`rates.py`), the H100 being 1. An unknown type counts as one of these.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from coordinator.core import gpu_types, rates
from coordinator.core.estimates import Place

# With the mean life of a day, so many GPU-hours a day without a pause come to as many used.
MEAN_LIFE_H: Final = 24.0
HALF_LIFE_H: Final = MEAN_LIFE_H * math.log(2)
# A morning: to catch up in less would take many GPUs from many, in more is no help today.
AHEAD_H: Final = 4.0
# What is left, in AHEAD_H, of what is used now.
_KEPT_RATIO: Final = math.exp(-AHEAD_H / MEAN_LIFE_H)
# Excess beyond the quota at which a project's part of what is lent is half; one GPU for a day, so
# that of two who have borrowed much the ratio counts. And below a tenth nobody's part falls.
HALVED_AT_H: Final = 24.0
LENT_WEIGHT_MIN: Final = 0.1
# Weights are counted in thousandths of an H100, in whole numbers: sums are the same in any order.
PARTS: Final = 1_000
# What sums of such numbers differ by.
ERROR_GPUS: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Quota:
    """`gpu_hours` are those of a day, weighted; 0: all that the project runs on is lent. `weight`
    is of its part of what is lent."""

    gpu_hours: float = 0.0
    weight: float = 1.0


NONE: Final = Quota()


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that runs or waits, `rank` that of its class, 0 the first; `gpus` are weighted. Of its
    class and project who has the least `order` comes first."""

    job_id: int
    project: str
    rank: int
    order: int
    gpus: float
    runs: bool


def _weight_parts(key: str) -> int:
    prior = rates.place_prior(Place(key, 1), half=True)
    return max(1, round(PARTS * math.exp(prior.speed_log)))


# By the table's names of types.
WEIGHTS: Final = {known.key: _weight_parts(known.key) for known in gpu_types.TYPES}


def weight_parts(gpu_name: str, memory_bytes: int = 0) -> int:
    """What an hour of one such GPU counts, in thousandths of an hour of an H100."""
    return WEIGHTS.get(gpu_types.key_of(gpu_name, memory_bytes), PARTS)


def entitled_gpus(quota: Quota, used_h: float) -> float:
    """As many weighted GPUs as take it from `used_h` to its quota within `AHEAD_H`."""
    left_h = quota.gpu_hours - used_h * _KEPT_RATIO
    return max(0.0, left_h / (MEAN_LIFE_H * (1 - _KEPT_RATIO)))


def lent(
    claims: Iterable[Claim], quotas: Mapping[str, Quota], used_h: Mapping[str, float]
) -> dict[int, None]:
    """The jobs that run on what is lent, or would; none where nobody has a quota."""
    if not quotas:
        return {}
    entitled = {
        project: entitled_gpus(quota, used_h.get(project, 0.0)) for project, quota in quotas.items()
    }
    counted = dict.fromkeys(quotas, 0.0)
    found: dict[int, None] = {}
    for claim in sorted(claims, key=lambda c: (c.rank, not c.runs, c.order, c.job_id)):
        if claim.gpus <= 0:
            continue  # takes no GPU
        before, limit = counted.get(claim.project, 0.0), entitled.get(claim.project, 0.0)
        room = limit - before + ERROR_GPUS
        if claim.runs:
            within = room > 2 * ERROR_GPUS
        else:
            below = used_h.get(claim.project, 0.0) < quotas.get(claim.project, NONE).gpu_hours
            within = claim.gpus <= room or (before == 0 and below)
        if within:
            counted[claim.project] = before + claim.gpus
        else:
            found[claim.job_id] = None
    return found


def lending_weights(
    quotas: Mapping[str, Quota], used_h: Mapping[str, float]
) -> Mapping[str, float]:
    """What the jobs of each project weigh beside others': its weight, and less by what it has had
    beyond its quota. Who is not named weighs 1; nobody is where nobody has a quota."""
    found = {}
    for project in sorted([*quotas, *(name for name in used_h if name not in quotas)]):
        quota = quotas.get(project, NONE)
        excess_h = max(0.0, used_h.get(project, 0.0) - quota.gpu_hours)
        found[project] = quota.weight * max(LENT_WEIGHT_MIN, 1 / (1 + excess_h / HALVED_AT_H))
    return found if quotas else {}
