"""The demand that `make demo-scaling` plays: three real days, and jobs that add up to the last one.

Problem: a made-up curve makes any rule look good. So this is what a fleet really had: `ACTIVE`, the
mean number of nodes with at least one busy GPU in each ten minutes from 2017-10-22 to 24, of some
420. It is derived from the node sequence of the Microsoft Philly traces
(https://github.com/msr-fiddle/philly-traces, CC BY 4.0, Jeon et al., USENIX ATC 2019), as published
in https://github.com/S-Lab-System-Group/HeliosArtifact. Changed: means of ten minutes, rounded.

The first two days are the past that a forecast learns from, the third is played. The series says
how many GPUs are held, not by whom: so the oldest job ends where it falls, one begins where it
rises, and none is longer than `JOB_STEPS_MAX`, so that there are always some that end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

KNOWN_NODES = 420
STEPS_PER_DAY = 144
MINUTES_PER_STEP = 10
JOB_STEPS_MAX = 7
# fmt: off
ACTIVE = (
    336, 333, 337, 329, 335, 347, 333, 351, 350, 344, 336, 336, 329, 329, 328, 324, 328, 326,
    325, 324, 324, 324, 323, 324, 319, 318, 316, 316, 316, 318, 314, 315, 314, 313, 314, 314,
    313, 311, 313, 313, 311, 308, 311, 314, 312, 312, 313, 311, 310, 312, 310, 311, 307, 303,
    303, 304, 305, 304, 307, 306, 305, 305, 306, 307, 307, 310, 345, 356, 356, 356, 357, 358,
    359, 358, 359, 359, 362, 361, 360, 364, 364, 361, 363, 362, 360, 358, 361, 362, 364, 338,
    286, 283, 268, 264, 278, 272, 263, 260, 256, 258, 256, 256, 259, 260, 265, 267, 267, 269,
    270, 272, 271, 271, 279, 283, 302, 325, 340, 351, 357, 349, 355, 360, 359, 355, 356, 354,
    359, 356, 357, 356, 358, 360, 364, 366, 358, 361, 356, 359, 354, 364, 356, 236, 236, 255,
    277, 286, 306, 309, 299, 276, 301, 305, 301, 302, 303, 308, 310, 310, 312, 310, 312, 313,
    323, 332, 333, 330, 327, 331, 329, 331, 329, 331, 336, 335, 334, 333, 333, 337, 338, 341,
    340, 353, 356, 350, 348, 348, 347, 345, 341, 338, 350, 348, 349, 346, 344, 345, 337, 334,
    335, 332, 333, 334, 342, 344, 342, 339, 341, 328, 329, 329, 328, 336, 333, 334, 336, 336,
    337, 332, 330, 325, 327, 330, 330, 332, 331, 329, 332, 328, 328, 327, 330, 330, 331, 328,
    328, 329, 328, 329, 334, 332, 330, 330, 331, 330, 328, 328, 330, 331, 333, 331, 330, 335,
    332, 330, 337, 333, 325, 331, 329, 329, 320, 319, 320, 323, 323, 324, 327, 328, 324, 321,
    314, 321, 317, 323, 324, 322, 325, 332, 326, 320, 320, 321, 319, 324, 264, 224, 223, 219,
    221, 218, 221, 227, 225, 220, 221, 221, 221, 221, 221, 226, 228, 229, 229, 233, 234, 237,
    237, 245, 265, 294, 302, 313, 321, 321, 327, 332, 327, 330, 331, 333, 335, 332, 323, 331,
    333, 336, 336, 330, 331, 331, 331, 332, 328, 328, 327, 326, 321, 325, 324, 325, 330, 331,
    336, 331, 340, 338, 344, 346, 342, 346, 340, 344, 341, 343, 343, 344, 343, 340, 342, 342,
    342, 344, 342, 340, 340, 336, 334, 336, 335, 335, 337, 338, 336, 334, 336, 336, 339, 335,
    329, 332, 333, 330, 338, 331, 334, 331, 328, 330, 329, 331, 322, 330, 327, 296, 317, 330,
    331, 335, 327, 303, 284, 280, 278, 334, 332, 317, 336, 339, 326, 335, 336, 315, 321, 339,
    339, 333, 333, 304, 309, 329, 318, 331, 321, 332, 331, 348, 333, 337, 338, 332, 333, 332,
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
    running: list[int] = []  # begins, the oldest first
    for step, gpus in enumerate((*course, 0)):
        leaving = [begin for begin in running if step - begin >= JOB_STEPS_MAX]
        leaving += running[len(leaving) :][: max(0, len(running) - len(leaving) - gpus)]
        found += [Wish(begin, step) for begin in leaving]
        running = running[len(leaving) :]
        running += [step] * (gpus - len(running))
    return sorted(found, key=lambda wish: (wish.begin, wish.end))
