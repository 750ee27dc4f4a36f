"""How much longer those who hold GPUs are expected to: by their age, and by who ended before.

Problem: of a job that says nothing only its age is known. That alone says that it is as likely as
not to last as long again, which is wrong by hours where everybody trains for two hours, or where
whoever has lived for a day runs for a week. And what a plan rents follows from how long it takes
until a node comes free.

How: a life table. `age / (age + k)` is the chance to live for `k` more where, at any age, one ends
once in one's age. So ages are cut into bands of equal ratio, and of each it is counted how many
ended in it, and how many would have by that rule, of all who were ever in it. Those who still live
count as well: leaving them out would make old age look rare. What was seen over what the rule says
is by how much the rule is wrong there. A band begins as if the rule had been right for as many as
make half an end (`RULE_ENDS`), so in a fleet without a past the age alone counts; each type of GPU
and size begins as all of them together, for as many as would make one (`OWN_BY_RULE`). All of it is
forgotten, by half in `HALF_LIFE_DAYS` days. What it is worth: `bench/waits.py`.

`coordinator/forecast/survival.py` goes through a whole past like that, with what a core may not
import; here it is one moment.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Final

# Whoever has just begun has not lived for no time at all: most that fail do so within it.
AGE_MS_MIN: Final = 60_000
# Four a doubling, from a minute on; the last one, from 38 days on, has no end.
LOG_BAND: Final = math.log(2) / 4
BANDS: Final = 64
LOG_MIN: Final = math.log(AGE_MS_MIN)
# Jobs of one GPU, of a part of a box, of a box, and of several.
GPUS_MAX: Final = (1, 4, 8)
RULE_ENDS: Final = 0.5
OWN_BY_RULE: Final = 1.0
HALF_LIFE_DAYS: Final = 30
# A GPU type and size; of more than so many, those that come later count together. 1 kB each.
KINDS_MAX: Final = 64
DAY_MS: Final = 86_400_000

Kind = tuple[str, int]
OTHERS: Final[Kind] = ("", 0)


class _Counts:
    """By band: how many ended in it, and how many would have by the rule."""

    def __init__(self) -> None:
        self.ended = [0.0] * BANDS
        self.by_rule = [0.0] * BANDS

    def lived(self, age_ms: float, weight: float) -> int:
        """Returns the band that it is in."""
        band, within = _place(age_ms)
        for passed in range(band):
            self.by_rule[passed] += weight * LOG_BAND
        self.by_rule[band] += weight * within
        return band

    def times(self, weight: float) -> "_Counts":
        found = _Counts()
        found.ended = [weight * each for each in self.ended]
        found.by_rule = [weight * each for each in self.by_rule]
        return found


class LifeTable:
    """Of all who have ended, by kind."""

    def __init__(self) -> None:
        self._counts: dict[Kind, _Counts] = {}

    def ended(self, kind: Kind, age_ms: int, ago_ms: int = 0) -> None:
        """At that age, so long ago. Who has not lived for a minute says nothing of those who
        have."""
        if age_ms >= AGE_MS_MIN:
            weight = 0.5 ** (max(0, ago_ms) / DAY_MS / HALF_LIFE_DAYS)
            counts = _of(self._counts, kind)
            counts.ended[counts.lived(age_ms, weight)] += weight

    def forget(self, days: float) -> None:
        """So much time has passed."""
        kept = 0.5 ** (days / HALF_LIFE_DAYS)
        self._counts = {kind: known.times(kept) for kind, known in self._counts.items()}

    def among(self, living: Iterable[tuple[Kind, int, int]]) -> "Chances":
        """What is known now; of those who live kind, age, and how many are like that."""
        counts = {kind: known.times(1.0) for kind, known in self._counts.items()}
        for kind, age_ms, count in living:
            _of(counts, kind).lived(age_ms, count)
        return Chances(counts)


def _of(counts: dict[Kind, _Counts], kind: Kind) -> _Counts:
    has_room = kind in counts or len(counts) < KINDS_MAX
    return counts.setdefault(kind if has_room else OTHERS, _Counts())


class Chances:
    """At one moment."""

    def __init__(self, counts: Mapping[Kind, _Counts]) -> None:
        ended, by_rule = [RULE_ENDS] * BANDS, [RULE_ENDS] * BANDS
        for known in counts.values():
            ended = [had + more for had, more in zip(ended, known.ended, strict=True)]
            by_rule = [had + more for had, more in zip(by_rule, known.by_rule, strict=True)]
        rates = [seen / said for seen, said in zip(ended, by_rule, strict=True)]
        self._everybody = Course(rates)
        self._courses = {kind: Course(_own(known, rates)) for kind, known in counts.items()}

    def course(self, kind: Kind) -> "Course":
        return self._courses.get(kind, self._everybody)


def _own(known: _Counts, rates: Sequence[float]) -> list[float]:
    return [
        (seen + OWN_BY_RULE * rate) / (said + OWN_BY_RULE)
        for seen, said, rate in zip(known.ended, known.by_rule, rates, strict=True)
    ]


class Course:
    """Of a kind. `rates` by band: how many times as often as by the rule one ends."""

    def __init__(self, rates: Sequence[float]) -> None:
        self._rates = rates
        self._begins = [0.0, *accumulate(LOG_BAND * rate for rate in rates)]

    def passed(self, age_ms: float) -> float:
        """How often one would have ended by then, who begins anew each time."""
        band, within = _place(age_ms)
        return self._begins[band] + self._rates[band] * within

    def to_live(self, age_ms: float, aheads_ms: Sequence[float]) -> list[float]:
        """The chances to live for so much longer."""
        age_ms = max(AGE_MS_MIN, age_ms)
        before = self.passed(age_ms)
        return [math.exp(before - self.passed(age_ms + ahead_ms)) for ahead_ms in aheads_ms]


def kind_of(gpu_type: str, gpus: int) -> Kind:
    return gpu_type, sum(gpus > most for most in GPUS_MAX)


def _place(age_ms: float) -> tuple[int, float]:
    """The band of an age, and how far it is into it, in logarithms."""
    logs = math.log(age_ms) - LOG_MIN if age_ms > AGE_MS_MIN else 0.0
    band = int(logs / LOG_BAND)
    if band >= BANDS:
        band = BANDS - 1
    return band, logs - band * LOG_BAND
