"""How fast two trainings are beside one another on a GPU, before they have been, and what follows.

Problem: two light jobs on one GPU can do half as much again as one of them alone, or less than it,
and nothing that is known of either alone says which. In the public table of Gavel (Narayanan et
al., OSDI 2020, MIT licence; `simulation_throughputs`), of 330 pairs on a V100 22% are slower
together than one alone, 75% reach 1.15 times one alone, and 26% leave each 0.7 of its own speed; of
340 on a P100 14%, 44% and 7%; of 306 on a K80 26%, 24% and none. So nothing is assumed: a pair is
*tried* where a forecast gives it a chance, and two minutes together confirm it or end it.

What one training *keeps* beside another is its steps a second together over those alone. The
forecast is a linear model with normal errors of the log of it, for i beside j on type t:

    log kept = prior_log + s_i + a_j + e_ij

- prior_log: a GPU that one uses for a part u_i of the time, and another for u_j, has to divide
  itself as soon as these add up to more than one: kept = 1 / max(1, u_i + u_j). Where u is not
  known it is `UTILIZATION_UNKNOWN`, with which the prior is the table's mean.
- s_i: how sensitive i is, a_j: how much in the way j is, e_ij: what is special about the two. Of
  each a part is common to all trainings of a family, and to all types.

The variances were read off the same table: covariances between its entries, those of V100 and P100
averaged. What was measured is conditioned on exactly, as in `estimates.py`. A training that was
beside another one says something of both beside a third, and most of the same two.

What `confirms` is the rule for a pair: both together do at least `COMBINED_RATIO_MIN` of what one
does alone, and each keeps `KEPT_RATIO_MIN`. Of exact figures the second implies the first; of
forecasts it does not, since the mean of a sum is known better than its parts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.core.matrices import Matrix, Vector, dot, solve_many

COMBINED_RATIO_MIN = 1.15
KEPT_RATIO_MIN = 0.7
# How long two are beside one another before anything is decided by it.
TRIAL_S = 120.0
# That each keeps enough must be as likely as this for a trial. It costs one of the two a restart
# and both two minutes at less than full speed; a pair that is good is so for hours.
TRIAL_CHANCE_MIN = 0.25
SIGHTS_MAX = 64  # pairs that are learned from, the newest; the work grows with their cube
ANSWERS_MAX = 10_000  # remembered by lessons, some 600 bytes each

UTILIZATION_UNKNOWN = 0.88  # of each: both get 0.57 of their speed, the table's mean of logs
SENSITIVITY_VARIANCE = 0.01
SENSITIVITY_VARIANCE_FAMILY = 0.015
HINDRANCE_VARIANCE = 0.02
HINDRANCE_VARIANCE_FAMILY = 0.02
PAIR_VARIANCE = 0.03
PAIR_VARIANCE_FAMILY = 0.04
# Of what is special about i beside j, that much is there again in j beside i,
REVERSED_RATIO = 0.4
# and of everything that much on a GPU of another type.
OTHER_TYPE_RATIO = 0.4
# A measurement of two minutes wobbles by five percent, one of hours by two.
SIGHT_VARIANCE_MIN = 0.02**2
SIGHT_VARIANCE_SECOND = 0.3


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A training, told apart by its `name`; an empty `family` has no other member."""

    name: str
    family: str = ""


Cell = tuple[Member, Member, str]  # who, beside whom, on which type of GPU


class Sharer(NamedTuple):
    """An attempt that shares a GPU of that type."""

    attempt: str
    job_id: int
    who: Member
    gpu_type: str


class Sharers(NamedTuple):
    """All of them, with the names and families that are among them."""

    every: tuple[Sharer, ...]
    names: Mapping[str, None]
    families: Mapping[str, None]


@dataclass(frozen=True, slots=True)
class Sight:
    """For `seconds` `who` kept `kept_ratio` of its speed beside `beside`; both are above zero."""

    who: Member
    beside: Member
    gpu_type: str
    kept_ratio: float
    seconds: float

    @property
    def variance(self) -> float:
        return SIGHT_VARIANCE_MIN + SIGHT_VARIANCE_SECOND / self.seconds


@dataclass(frozen=True, slots=True)
class Kept:
    """Of the log of what is kept."""

    mean: float
    variance: float

    @property
    def expected_ratio(self) -> float:
        """Nobody is faster beside another than alone."""
        return min(1.0, math.exp(self.mean + self.variance / 2))

    def chance(self, ratio: float) -> float:
        """That it is at least this."""
        distance = (self.mean - math.log(ratio)) / math.sqrt(self.variance)
        return 0.5 * math.erfc(-distance / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of two. `measured` is what each has kept, where they have been beside one another on this
    type. `informed`: something that was seen has a bearing on it."""

    one: Kept
    other: Kept
    measured: tuple[float, float] | None
    informed: bool

    @property
    def combined_ratio(self) -> float:
        """What both do, of what one does alone."""
        return self.one.expected_ratio + self.other.expected_ratio

    @property
    def chance(self) -> float:
        """That the one that suffers more keeps enough."""
        return min(self.one.chance(KEPT_RATIO_MIN), self.other.chance(KEPT_RATIO_MIN))

    @property
    def worth_trying(self) -> bool:
        """Of what has been measured the measurement decides; there is nothing left to try."""
        if self.measured is not None:
            return confirms(*self.measured)
        return self.combined_ratio >= COMBINED_RATIO_MIN and self.chance >= TRIAL_CHANCE_MIN


def confirms(one_ratio: float, other_ratio: float) -> bool:
    """Whether two that keep so much stay together."""
    enough = min(one_ratio, other_ratio) >= KEPT_RATIO_MIN
    return enough and one_ratio + other_ratio >= COMBINED_RATIO_MIN


def prior_log(one: float | None = None, other: float | None = None) -> float:
    """By how much of the time each uses the GPU when it is alone, where that is known."""
    total = (UTILIZATION_UNKNOWN if one is None else one) + (
        UTILIZATION_UNKNOWN if other is None else other
    )
    return -math.log(max(1.0, total))


@dataclass(frozen=True, slots=True)
class Lessons:
    """What `learn` has made of sights: the inverse of their covariances, and what each is worth.
    `measured` is what was kept in all of them; `used` by how much of the time each training uses
    the GPU alone, by its name; `names` and `families` are those that were seen. `answers` are those
    of `about` so far: who waits is asked about everybody who shares a GPU, and most of these are
    alike."""

    sights: tuple[Sight, ...] = ()
    measured: Mapping[Cell, float] = field(default_factory=dict)
    used: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, None] = field(default_factory=dict)
    families: Mapping[str, None] = field(default_factory=dict)
    inverse: Matrix | None = None
    weights: Vector | None = None
    answers: dict[object, Forecast] = field(default_factory=dict, compare=False, repr=False)

    def poor(self, one: Member, other: Member, gpu_type: str) -> bool:
        """Whether something that was seen speaks against these two."""
        if not self.sights:
            return False
        said = self.about(one, other, gpu_type)
        return said.informed and not said.worth_trying

    def alike(self, one: Member) -> tuple[str, str, float | None]:
        """Equal for those of whom the same is said beside anybody but their own kin."""
        name = one.name if one.name in self.names else ""
        return name, one.family if one.family in self.families else "", self.used.get(one.name)

    def about(self, one: Member, other: Member, gpu_type: str) -> Forecast:
        """The forecast, made once of those who are alike."""
        kin = one.name == other.name, bool(one.family) and one.family == other.family
        key = self.alike(one), self.alike(other), kin, gpu_type
        found = self.answers.get(key)
        if found is None:
            found = self.forecast(one, other, gpu_type)
            if len(self.answers) >= ANSWERS_MAX:
                self.answers.clear()
            self.answers[key] = found
        return found

    def forecast(self, one: Member, other: Member, gpu_type: str) -> Forecast:
        """How the two are beside one another."""
        before = prior_log(self.used.get(one.name), self.used.get(other.name))
        cells = (one, other, gpu_type), (other, one, gpu_type)
        own = [_covariance(cell, cell) for cell in cells]
        if self.inverse is None or self.weights is None:
            return Forecast(Kept(before, own[0]), Kept(before, own[1]), None, False)
        known = [_cell(sight) for sight in self.sights]
        to_cells = [[_covariance(cell, each) for each in known] for cell in cells]
        pulls = [[dot(row, to_cell) for row in self.inverse] for to_cell in to_cells]
        kept = [
            # Zero or less only by rounding: something is always left.
            Kept(
                before + dot(to_cell, self.weights),
                max(variance - dot(to_cell, pull), SIGHT_VARIANCE_MIN / 2),
            )
            for to_cell, pull, variance in zip(to_cells, pulls, own, strict=True)
        ]
        informed = any(value > 0 for value in (*to_cells[0], *to_cells[1]))
        measured = None
        if all(cell in self.measured for cell in cells):
            measured = self.measured[cells[0]], self.measured[cells[1]]
        return Forecast(kept[0], kept[1], measured, informed)


def learn(sights: Iterable[Sight], used: Mapping[str, float] | None = None) -> Lessons:
    """From what was seen, the newest last, of which `SIGHTS_MAX` count for others than the two."""
    used = used or {}
    every = list(sights)
    measured = {_cell(sight): sight.kept_ratio for sight in _merged(every)}
    merged = _merged(every[-SIGHTS_MAX:])
    if not merged:
        return Lessons(used=used)
    cells = [_cell(sight) for sight in merged]
    between = [[_covariance(one, other) for other in cells] for one in cells]
    for index, sight in enumerate(merged):
        between[index][index] += sight.variance
    units = [[float(row == column) for column in range(len(cells))] for row in range(len(cells))]
    inverse = solve_many(between, units)
    before = [prior_log(used.get(one.who.name), used.get(one.beside.name)) for one in merged]
    logs = [math.log(one.kept_ratio) for one in merged]
    surprises = [log - said for log, said in zip(logs, before, strict=True)]
    weights = [dot(row, surprises) for row in inverse]
    seen = [member for who, beside, _ in measured for member in (who, beside)]
    names = dict.fromkeys(member.name for member in seen)
    families = dict.fromkeys(member.family for member in seen if member.family)
    return Lessons(merged, measured, used, names, families, inverse, weights)


def _merged(sights: Sequence[Sight]) -> tuple[Sight, ...]:
    """One for each two and type, by their time; in an order that does not depend on theirs."""
    groups: dict[Cell, list[Sight]] = {}
    for sight in sights:
        groups.setdefault(_cell(sight), []).append(sight)
    merged = []
    for cell, group in sorted(groups.items()):
        seconds = math.fsum(one.seconds for one in group)
        log = math.fsum(math.log(one.kept_ratio) * one.seconds for one in group) / seconds
        merged.append(Sight(*cell, math.exp(log), seconds))
    return tuple(merged)


def _cell(sight: Sight) -> Cell:
    return sight.who, sight.beside, sight.gpu_type


def _covariance(cell: Cell, other: Cell) -> float:
    """Of what i keeps beside j with what k keeps beside l."""
    who, beside, gpu_type = cell
    found = _alike(who, other[0], SENSITIVITY_VARIANCE, SENSITIVITY_VARIANCE_FAMILY)
    found += _alike(beside, other[1], HINDRANCE_VARIANCE, HINDRANCE_VARIANCE_FAMILY)
    found += _pairs_alike(who, beside, other[0], other[1])
    found += REVERSED_RATIO * _pairs_alike(who, beside, other[1], other[0])
    return found if gpu_type == other[2] else OTHER_TYPE_RATIO * found


def _alike(one: Member, other: Member, same: float, kin: float) -> float:
    if one.name == other.name:
        return same + kin
    return kin if one.family and one.family == other.family else 0.0


def _pairs_alike(one: Member, beside: Member, other: Member, its: Member) -> float:
    if (one.name, beside.name) == (other.name, its.name):
        return PAIR_VARIANCE + PAIR_VARIANCE_FAMILY
    kin = _alike(one, other, 0.0, 1.0) and _alike(beside, its, 0.0, 1.0)
    return PAIR_VARIANCE_FAMILY if kin else 0.0
