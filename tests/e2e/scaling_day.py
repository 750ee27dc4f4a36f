"""The demand that `make demo-scaling` plays: three real days, and jobs that add up to the last one.

Problem: a made-up curve makes any rule look good. So this is what a fleet really had: `ACTIVE`, the
mean number of nodes with at least one busy GPU in each ten minutes from 2017-10-13 to 15, of 420.
It is derived from the node sequence of the Microsoft Philly traces
(https://github.com/msr-fiddle/philly-traces, CC BY 4.0, Jeon et al., USENIX ATC 2019), as published
in https://github.com/S-Lab-System-Group/HeliosArtifact. Changed: means of ten minutes, rounded.

The first two days are the past that a forecast learns from; the third, a Sunday, is played: at
seven in the morning a third less is wanted within the hour, and most of that is back at night.

The series says how many GPUs are held, not by whom. So jobs last from half an hour to eight hours,
each length twice the one before and as frequent, as lives of jobs differ by orders of magnitude.
Where demand falls below that, those end that would have ended next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

KNOWN_NODES = 420
STEPS_PER_DAY = 144
MINUTES_PER_STEP = 10
JOB_STEPS = (3, 48, 12, 6, 24)
# fmt: off
ACTIVE = (
    378, 381, 379, 378, 380, 380, 380, 379, 379, 378, 378, 379, 379, 379, 380, 379, 380, 381,
    380, 380, 380, 378, 378, 373, 372, 367, 364, 365, 365, 364, 366, 365, 366, 367, 368, 371,
    373, 369, 367, 368, 369, 370, 369, 369, 369, 368, 369, 369, 369, 368, 368, 368, 369, 369,
    369, 370, 368, 367, 369, 367, 369, 372, 372, 376, 379, 384, 384, 384, 381, 380, 380, 374,
    375, 372, 375, 376, 377, 377, 373, 370, 352, 352, 343, 366, 372, 375, 375, 377, 375, 375,
    375, 377, 376, 375, 372, 368, 374, 373, 372, 367, 371, 369, 368, 366, 366, 369, 372, 374,
    376, 376, 380, 385, 382, 382, 383, 381, 380, 383, 380, 381, 381, 382, 382, 381, 380, 380,
    382, 380, 379, 378, 378, 376, 375, 378, 380, 378, 377, 379, 379, 379, 379, 377, 377, 380,
    377, 375, 377, 377, 377, 376, 378, 378, 379, 379, 377, 378, 378, 373, 377, 378, 374, 376,
    376, 378, 380, 381, 379, 378, 378, 378, 376, 375, 376, 376, 378, 382, 384, 388, 388, 387,
    385, 386, 386, 386, 386, 386, 388, 389, 386, 384, 383, 384, 382, 379, 378, 375, 373, 369,
    370, 369, 369, 370, 373, 373, 373, 370, 373, 372, 372, 370, 372, 372, 368, 369, 369, 366,
    366, 364, 366, 368, 372, 374, 375, 375, 375, 375, 373, 373, 381, 379, 379, 382, 379, 382,
    380, 379, 381, 379, 377, 379, 379, 380, 380, 380, 379, 380, 377, 376, 378, 376, 374, 376,
    373, 372, 373, 373, 373, 374, 379, 377, 375, 379, 380, 380, 380, 380, 378, 375, 378, 374,
    373, 367, 369, 368, 367, 366, 365, 366, 365, 365, 365, 364, 366, 364, 367, 367, 368, 367,
    368, 368, 363, 368, 372, 370, 368, 365, 364, 365, 367, 367, 365, 366, 363, 360, 359, 359,
    357, 355, 355, 356, 354, 351, 356, 358, 359, 358, 354, 346, 355, 352, 356, 357, 350, 348,
    348, 352, 352, 351, 352, 349, 266, 222, 231, 224, 221, 221, 217, 217, 220, 222, 226, 229,
    230, 231, 229, 229, 230, 231, 232, 229, 230, 227, 228, 224, 228, 230, 226, 230, 238, 237,
    238, 240, 241, 244, 247, 248, 248, 247, 248, 249, 250, 251, 250, 254, 253, 252, 254, 258,
    258, 256, 254, 253, 252, 253, 252, 252, 253, 253, 256, 259, 261, 262, 262, 261, 259, 260,
    261, 260, 260, 259, 257, 262, 260, 264, 262, 267, 272, 276, 288, 285, 283, 276, 270, 266,
    267, 272, 281, 317, 333, 333, 333, 331, 300, 295, 295, 301, 297, 300, 304, 306, 305, 302,
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Wish:
    """A job of one GPU: from the beginning of one step of the day to that of another."""

    begin: int
    end: int


def scaled(gpus: int) -> tuple[int, ...]:
    """The same for a fleet of so many GPUs."""
    return tuple(round(active * gpus / KNOWN_NODES) for active in ACTIVE)


def wishes(course: Sequence[int]) -> list[Wish]:
    """Jobs that hold as many GPUs in each step as it says, if none waits; by their begin."""
    found: list[Wish] = []
    running: list[tuple[int, int]] = []  # planned end and begin, the next to end first
    begun = 0
    for step, gpus in enumerate((*course, 0)):
        over = sum(end <= step for end, _ in running)
        leaving = max(over, len(running) - gpus)
        found += [Wish(begin, step) for _, begin in running[:leaving]]
        running = running[leaving:]
        while len(running) < gpus:
            running.append((step + JOB_STEPS[begun % len(JOB_STEPS)], step))
            begun += 1
        running.sort()
    return sorted(found, key=lambda wish: (wish.begin, wish.end))
