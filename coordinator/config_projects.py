"""The tables `[projects.NAME]`: what projects are due, and what may stand there.

Problem: a name with a letter too many is a project of its own, without a quota, and a quota with a
zero too many is none at all. So names are as a submission may have them, and values within what a
fleet can have.
"""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

PROJECT_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")  # as a submission names it
GPU_HOURS_MAX: Final = 10_000_000.0  # a day of four hundred thousand GPUs: a slip of the finger
PROJECT_WEIGHT_MIN: Final = 0.01  # less would be never, and nobody should starve
PROJECT_WEIGHT_MAX: Final = 100.0  # likewise of the others
PROJECTS_MAX: Final = 1_000  # each costs a decision some microseconds


class Project(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a project is due: GPU-hours a day, weighted by type, and its weight where GPUs are
    lent."""

    gpu_hours_per_day: float = 0.0
    weight: float = 1.0


def problems(projects: Mapping[str, Project]) -> list[str]:
    """What is wrong, as sentences."""
    found = []
    if len(projects) > PROJECTS_MAX:
        found.append(f"'projects' has {len(projects)} tables; at most {PROJECTS_MAX} may be")
    for name, project in projects.items():
        if not PROJECT_NAME.fullmatch(name):
            found.append(f"'{name}' in 'projects' must be 1 to 64 of a-z, 0-9 and '-'")
        ranges = (
            ("gpu_hours_per_day", project.gpu_hours_per_day, 0.0, GPU_HOURS_MAX),
            ("weight", project.weight, PROJECT_WEIGHT_MIN, PROJECT_WEIGHT_MAX),
        )
        found += [
            f"'{key}' of '{name}' in 'projects' must be {low:.8g} to {high:.8g}, not {value:g}"
            for key, value, low, high in ranges
            if not low <= value <= high
        ]
    return found
