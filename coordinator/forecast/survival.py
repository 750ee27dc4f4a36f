"""How many of the GPUs that are held now will be held still, so many hours from now.

Problem: a series says how much is held, not by whom. A job that has run for a day mostly runs for
another, and one that began five minutes ago is mostly gone in an hour. Neither is in the sum.

How: a life table. Ages are cut into bands that grow with age (`EDGES_S`); each band counts the
attempts that ended in it and the time that all of them, ended or still running, have spent in it.
Ends per time is its hazard, and the chance to outlive a span is the product over the bands that the
span crosses: what Kaplan and Meier estimate (Nonparametric Estimation from Incomplete Observations,
JASA 53, 1958), in bounded memory and with what still runs counted as such. Leaving that out would
make old age look rare. Sizes have tables of their own that begin as that of all sizes together, and
both forget.

What a forecast is told (`still_wanted`) is what waits, of which nobody leaves, and what stays of
what is held. How long a job itself says it has left is not in it. Of the past that is not known
any more, and a forecast that was told it now alone could not have learned what it is worth.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.forecast.quantiles import Floats

HOUR_S: Final = 3_600.0
DAY_S: Final = 86_400.0
# Ages: from the first minute to two months, four bands a doubling or so; the last has no end.
EDGES_S: Final[Floats] = np.concatenate([[0.0], np.geomspace(60.0, 60 * DAY_S, 48)])
WIDTHS_S: Final[Floats] = np.append(np.diff(EDGES_S), 0.0)  # of the last one nobody is older
# Jobs of one GPU, of a part of a box, of a box, and of several.
GPUS_MAX: Final = (1, 4, 8)
SHAPE: Final = (len(GPUS_MAX) + 1, len(EDGES_S))
HALF_LIFE_DAYS: Final = 30.0
# A size begins with as many ends of all sizes in each band, and all sizes with as many that say
# jobs end once in their age: hazards of real clusters fall like that.
OWN_ENDS: Final = 4.0
BEGIN_ENDS: Final = 0.5

Places = NDArray[np.intp]
Passed = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Holds:
    """Who has held GPUs: a number for each job, in hours from the begin of a series. `end_h` is
    infinite where it goes on. Who had ended before `since_h` may not be among them."""

    gpus: Floats
    begin_h: Floats
    end_h: Floats
    since_h: float = -math.inf


def _unheard(_steps: int) -> None:
    """Nobody waits for it."""


def still_wanted(
    holds: Holds,
    wanted: Sequence[float],
    per_hour: int,
    ahead_h: Sequence[int],
    *,
    passed: Passed = _unheard,
) -> list[Floats]:
    """For each of these: at each step of a series of means, what is expected to be wanted still so
    many hours later, as it could be known at its end; NaN where it could not. Who came or went
    within the step is in its mean in part, and then stays or has left. `passed` hears of each
    step."""
    waits = np.array(wanted) - held_on_average(holds, len(wanted), per_hour)
    stay = stays(holds, len(wanted), per_hour, ahead_h, passed=passed)
    return [np.maximum(0.0, waits + each) for each in stay]


def held_on_average(holds: Holds, steps: int, per_hour: int) -> Floats:
    """Within each step."""
    found = np.zeros(steps)
    for step, there in enumerate(_there(holds, steps, per_hour)):
        begins_h, ends_h = step / per_hour, (step + 1) / per_hour
        until_h = np.minimum(holds.end_h[there], ends_h)
        spent_h = until_h - np.maximum(holds.begin_h[there], begins_h)
        found[step] = holds.gpus[there] @ spent_h * per_hour
    return found


def _there(holds: Holds, steps: int, per_hour: int) -> Iterator[Places]:
    """Of each step, those who hold anything within it. Of a long history they are few, and whoever
    looks at all of it in each step takes many times as long."""
    lasted = np.flatnonzero(holds.end_h > holds.begin_h)
    come = lasted[np.argsort(holds.begin_h[lasted], kind="stable")]
    reached = np.searchsorted(holds.begin_h[come], np.arange(1, steps + 1) / per_hour)
    there = come[:0]
    for step, (first, last) in enumerate(pairwise((0, *reached.tolist()))):
        there = np.concatenate([there, come[first:last]])
        there = there[holds.end_h[there] > step / per_hour]
        yield np.sort(there)


def stays(
    holds: Holds,
    steps: int,
    per_hour: int,
    ahead_h: Sequence[int],
    *,
    passed: Passed = _unheard,
) -> Floats:
    """Of what is held at the end of each step, what is expected to be held still so many hours
    later, as a mean; shape (hours ahead, steps), NaN where it could not be known. Who ends earlier
    than he begins has no age."""
    table = LifeTable()
    found = np.full((len(ahead_h), steps), np.nan)
    looked_h = holds.since_h
    before = (holds.begin_h < looked_h) & (holds.end_h > looked_h)
    table.came(holds.gpus[before], HOUR_S * (looked_h - holds.begin_h[before]))
    leave = np.argsort(holds.end_h, kind="stable")
    ends_h = holds.end_h[leave]
    for step, within in enumerate(_there(holds, steps, per_hour)):
        now_h = (step + 1) / per_hour
        passed(1)
        if now_h < holds.since_h:
            continue
        first, last = np.searchsorted(ends_h, (looked_h, now_h), side="right")
        gone = leave[first:last]
        lasted_h = holds.end_h[gone] - holds.begin_h[gone]
        table.ended(holds.gpus[gone], HOUR_S * np.maximum(0.0, lasted_h))
        if (step + 1) % (24 * per_hour) == 0:
            table.forget(days=1)
        there = within[holds.end_h[within] > now_h]
        ages_s = HOUR_S * (now_h - holds.begin_h[there])
        held = holds.gpus[there]
        found[:, step] = table.chances(held, ages_s, [HOUR_S * each for each in ahead_h]) @ held
        looked_h = now_h
    return found


class LifeTable:
    """What is known of how long jobs hold GPUs; one for a GPU type, a project or a class. All that
    goes in is as long as there are jobs: their GPUs, and their ages in seconds."""

    def __init__(self) -> None:
        self._ends = np.zeros(SHAPE)
        self._spent_s = np.zeros(SHAPE)

    def came(self, gpus: Floats, ages_s: Floats) -> None:
        """Of these, who were as old before anybody looked, it is not known how many of their age
        had ended by then: what they had spent does not count."""
        self._spent_s -= _spent(gpus, ages_s)

    def ended(self, gpus: Floats, ages_s: Floats) -> None:
        """They have ended by themselves; who is preempted or handed over has not."""
        if np.any(ages_s < 0) or np.any(gpus < 0):
            raise ValueError("nobody holds less than no GPU, or has lasted for less than no time")
        self._spent_s += _spent(gpus, ages_s)
        np.add.at(self._ends, (_sizes(gpus), _bands(ages_s)), 1.0)

    def forget(self, days: float) -> None:
        """So much time has passed."""
        keep = 0.5 ** (days / HALF_LIFE_DAYS)
        self._ends *= keep
        self._spent_s *= keep

    def chances(self, gpus: Floats, ages_s: Floats, ahead_s: Sequence[float]) -> Floats:
        """Of each that runs, to run still so much later; shape (times, jobs). What all of them have
        spent counts as lived."""
        sizes = _sizes(gpus)
        hazards = self._hazards(_spent(gpus, ages_s))
        until = np.zeros(SHAPE)
        np.cumsum(hazards[:, :-1] * WIDTHS_S[:-1], axis=1, out=until[:, 1:])

        def passed(ages_s: Floats) -> Floats:
            bands = _bands(ages_s)
            within: Floats = until[sizes, bands] + hazards[sizes, bands] * (ages_s - EDGES_S[bands])
            return within

        before = passed(ages_s)
        return np.exp([before - passed(ages_s + each) for each in ahead_s])

    def _hazards(self, lived_s: Floats) -> Floats:
        """Ends a second, by size and band."""
        spent_s = self._spent_s + lived_s
        middles = 0.5 * (EDGES_S + np.append(EDGES_S[1:], 2 * EDGES_S[-1]))
        everybody = self._ends.sum(axis=0) + BEGIN_ENDS
        pooled = everybody / (spent_s.sum(axis=0) + BEGIN_ENDS * middles)
        hazards: Floats = (self._ends + OWN_ENDS) / (spent_s + OWN_ENDS / pooled)
        return hazards


def _sizes(gpus: Floats) -> Places:
    return np.searchsorted(GPUS_MAX, gpus)


def _bands(ages_s: Floats) -> Places:
    return np.searchsorted(EDGES_S, ages_s, side="right") - 1


def _spent(gpus: Floats, ages_s: Floats) -> Floats:
    """Seconds of all of them, by size and band: whoever is older than a band was in all of it."""
    bands = _bands(ages_s)
    places = _sizes(gpus) * SHAPE[1] + bands
    within_s = np.bincount(places, ages_s - EDGES_S[bands], SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    there = np.bincount(places, minlength=SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    older = there[:, ::-1].cumsum(axis=1)[:, ::-1] - there
    spent_s: Floats = within_s + older * WIDTHS_S
    return spent_s
