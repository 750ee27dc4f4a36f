"""How many of the GPUs that are held now will be held still, so many hours from now.

Problem: a series says how much is held, not by whom. A job that has run for a day mostly runs for
another, one that began five minutes ago is mostly gone in an hour, and a job that says what is left
of it is known best. None of that is in the sum.

How: a life table. Ages are cut into bands that grow with age (`EDGES_S`); each band counts the
attempts that ended in it and the time that all of them, ended or still running, have spent in it.
Ends per time is its hazard, and the chance to outlive a span is the product over the bands that the
span crosses: what Kaplan and Meier estimate (Nonparametric Estimation from Incomplete Observations,
JASA 53, 1958), in bounded memory and with what still runs counted as such. Leaving that out would
make old age look rare. Sizes have tables of their own that begin as that of all sizes together, and
both forget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from coordinator.forecast.quantiles import Floats

DAY_S: Final = 86_400.0
# Ages: from the first minute to two months, four bands a doubling or so; the last has no end.
EDGES_S: Final[Floats] = np.concatenate([[0.0], np.geomspace(60.0, 60 * DAY_S, 48)])
# Jobs of one GPU, of a part of a box, of a box, and of several.
GPUS_MAX: Final = (1, 4, 8)
HALF_LIFE_DAYS: Final = 30.0
# A size begins with as many ends of all sizes in each band, and all sizes with as many that say
# jobs end once in their age: hazards of real clusters fall like that.
OWN_ENDS: Final = 4.0
BEGIN_ENDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt. `remaining_s`: what it, or what is seen of its pace, says is left, if anything.
    Ages of one that was handed over count from its first attempt."""

    gpus: float
    age_s: float
    remaining_s: float | None = None


class LifeTable:
    """What is known of how long attempts last; one for a GPU type, a project or a class."""

    def __init__(self) -> None:
        shape = (len(GPUS_MAX) + 1, len(EDGES_S))
        self._ends = np.zeros(shape)
        self._spent_s = np.zeros(shape)

    def ended(self, gpus: float, age_s: float) -> None:
        """An attempt has ended by itself; one that was preempted or handed over has not."""
        if age_s < 0 or gpus < 0:
            raise ValueError(f"an attempt of {gpus} GPUs cannot have lasted {age_s} s")
        size = _size(gpus)
        self._spent_s[size] += _spent(np.array([age_s]))[0]
        self._ends[size, _band(age_s)] += 1.0

    def forget(self, days: float) -> None:
        """So much time has passed."""
        keep = 0.5 ** (days / HALF_LIFE_DAYS)
        self._ends *= keep
        self._spent_s *= keep

    def known_gpus(self, running: Sequence[Running], ahead_s: float) -> float:
        """Of the GPUs that these hold, how many they will hold in `ahead_s`, as a mean."""
        if not running:
            return 0.0
        gpus = np.array([each.gpus for each in running])
        return float(gpus @ self.chances(running, ahead_s))

    def chances(self, running: Sequence[Running], ahead_s: float) -> Floats:
        """Of each, to run still in `ahead_s`. What all of them have spent counts as lived."""
        ages = np.array([each.age_s for each in running])
        sizes = np.array([_size(each.gpus) for each in running], dtype=np.intp)
        lived = _spent(ages)
        hazards = self._hazards(lived, sizes)
        crossed = _spent(ages + ahead_s) - lived
        alive: Floats = np.exp(-np.sum(hazards[sizes] * crossed, axis=1))
        for place, each in enumerate(running):
            if each.remaining_s is not None:
                alive[place] = float(each.remaining_s > ahead_s)
        return alive

    def _hazards(self, lived: Floats, sizes: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Floats:
        """Ends a second, by size and band."""
        spent_s = self._spent_s.copy()
        np.add.at(spent_s, sizes, lived)
        middles = 0.5 * (EDGES_S + np.append(EDGES_S[1:], 2 * EDGES_S[-1]))
        everybody = self._ends.sum(axis=0) + BEGIN_ENDS
        pooled = everybody / (spent_s.sum(axis=0) + BEGIN_ENDS * middles)
        hazards: Floats = (self._ends + OWN_ENDS) / (spent_s + OWN_ENDS / pooled)
        return hazards


def _size(gpus: float) -> int:
    return int(np.searchsorted(GPUS_MAX, gpus))


def _band(age_s: float) -> int:
    return int(np.searchsorted(EDGES_S, age_s, side="right")) - 1


def _spent(ages_s: Floats) -> Floats:
    """Seconds in each band until this age; shape (ages, bands)."""
    ends = np.append(EDGES_S[1:], np.inf)
    lived: Floats = np.clip(ages_s[:, None], EDGES_S, ends) - EDGES_S
    return lived
