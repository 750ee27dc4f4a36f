"""How many GPUs were wanted: what ran and what waited, by GPU type, project and class, for years.

Problem: a forecast that is made of utilisation learns the fleet's own size, and one that reads an
outage as "nobody wants anything" forecasts the next outage. So demand is what runs *and* what waits
(`demand_samples.py`), it is looked at once a minute, and a minute in which nobody looked is unknown
for all of them, never zero and never a line between its neighbours.

How it is kept, in bounded memory:
1. Three rings: 14 days by the minute, 90 days by ten minutes, two years by the hour. A step of the
   coarser ones is the mean of its known minutes, and unknown where fewer than half are known.
2. A ring has one flag a step (is it known) and one array of floats for each series that was ever
   wanted. 200 kB a series: some 45 MB where all the series that there may be have been wanted.
3. There are at most `SERIES_MAX` series. What comes beyond counts to the project "other" of its GPU
   type and class, so that the sums by type, which a fleet is planned by, stay true. More than
   `GPU_TYPES_MAX` types count to the type "other".
4. Durable is a row for each step with what was wanted then, by numbers of series: one row a minute
   in a commit that happens anyway, another every ten. What a crash loses is what the last commit
   did not have; those minutes are unknown.

A minute is a number: wall time over `Options.demand_minute_ms`. It has sixty seconds wherever
demand is real; a demonstration lets a day pass in minutes, and all here is told in its own.

What was known of the future is kept as well (`Still`, made by `held_ahead.py`): at the end of each
hour, as it was known then, with the step of ten minutes that ends there, and as long as that one.
Forecasts are asked and judged at full hours and read steps of ten minutes, so more of it would be
of no use: 60 kB a series as it is. Where nobody says when he ends there is none.

The clock. Steps are wall time, and wall time jumps: `ClockWatch` compares it with the monotonic
clock. While it is not known which of both is right nothing is sampled.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

MINUTE_MS: Final = 60_000
DAY_MS: Final = 86_400_000
# Minutes a step, and how many steps are kept.
KEPT_STEPS: Final = {1: 14 * 1_440, 10: 90 * 144, 60: 730 * 24}
# Thirty projects of two classes on two types. Each is 200 kB of rings and some bytes of each row.
SERIES_MAX: Final = 128
GPU_TYPES_MAX: Final = 16  # a fleet has a handful; the table of types has 23
OTHER: Final = "other"
# In how many minutes it is said what is wanted still; in between it is a straight line.
STILL_MIN: Final = (60, 180, 360, 720, 1_440, 4_320)
HOUR_MIN: Final = 60
STILL_STEP_MIN: Final = 10

# A clock that is set right in a step is off by more; one that is slewed by less within a tick.
JUMP_MS: Final = 30_000
# After a jump, or a very long absence, the new time is believed when it has stayed for so long: by
# then a machine that has just booted has asked a time server.
SETTLE_MS: Final = 600_000
ABSENCE_MS: Final = 14 * DAY_MS


@dataclass(frozen=True, slots=True)
class Series:
    """Empty names stand for all of them; "other" is a name like any."""

    gpu_type: str = ""
    project: str = ""
    job_class: str = ""


@dataclass(frozen=True, slots=True)
class Still:
    """Of the GPUs that are wanted at some moment: how many are held by jobs that say when they end,
    and how many, of all of them, are expected to be wanted still after each of `STILL_MIN`."""

    said_gpus: float
    gpus: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DemandRow:
    """A known step, counted in periods since 1970. `numbers` are those of the series of which
    something was wanted, `gpus` how much; of all others nothing was. `still`, of each of them at
    the end of an hour: what `Still` has, one after the other; empty where that is not known."""

    period_min: int
    step: int
    numbers: tuple[int, ...] = ()
    gpus: tuple[float, ...] = ()
    still: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PutDemandSeries:
    """A series that was not wanted before has this number from now on."""

    number: int
    series: Series


@dataclass(frozen=True, slots=True)
class PutDemand:
    """Rows of its period that have left its ring leave the store."""

    row: DemandRow


@dataclass(frozen=True, slots=True)
class DropDemand:
    """What was sampled later than this minute was sampled under a wrong clock."""

    after_minute: int


# What `Still` says where nothing is wanted, and a mapping that says nothing.
NOBODY: Final = (0.0,) * (1 + len(STILL_MIN))
NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})


def _sum(some: Sequence[float], more: Sequence[float]) -> tuple[float, ...]:
    return tuple(had + one for had, one in zip(some, more, strict=True))


def _spread(number: int, place: int) -> int:
    """The key of one of the numbers that are kept of a series; of no other series, nor of a sum."""
    return number * len(NOBODY) + place


DemandRecord = PutDemandSeries | PutDemand | DropDemand


@dataclass(frozen=True, slots=True)
class DemandLog:
    """What the store has: series by number, and rows by period, oldest first."""

    series: tuple[PutDemandSeries, ...] = ()
    rows: tuple[DemandRow, ...] = ()


class _Ring:
    """One resolution. A slot is a step modulo the length; a slot that is not known has no value."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.newest: int | None = None
        self._known = bytearray(length)
        self._gpus: dict[int, array[float]] = {}

    def put(self, step: int, gpus: Mapping[int, float]) -> None:
        """A step after all others; those that were left out are unknown."""
        assert self.newest is None or step > self.newest, "steps only grow"
        self._forget(step)
        slot = step % self.length
        for values in self._gpus.values():
            values[slot] = 0.0
        for number, wanted in gpus.items():
            if number not in self._gpus:
                self._gpus[number] = array("f", bytes(4 * self.length))
            self._gpus[number][slot] = wanted
        self._known[slot] = 1
        self.newest = step

    def _forget(self, step: int) -> None:
        """What stood where the steps up to this one go."""
        skipped = self.length if self.newest is None else step - self.newest
        if skipped >= self.length:
            self._known = bytearray(self.length)
            return
        for gone in range(step - skipped + 1, step):
            self._known[gone % self.length] = 0

    def rewind(self, step: int) -> None:
        """Steps later than this one never were."""
        if self.newest is None or self.newest <= step:
            return
        for gone in range(max(step + 1, self.newest - self.length + 1), self.newest + 1):
            self._known[gone % self.length] = 0
        self.newest = step if step > self.newest - self.length else None

    def is_known(self, step: int) -> bool:
        if self.newest is None or not self.newest - self.length < step <= self.newest:
            return False
        return bool(self._known[step % self.length])

    def oldest(self) -> int | None:
        """The first step that is known; looked for once a minute, so not step by step."""
        if self.newest is None:
            return None
        first = self.newest - self.length + 1
        slot = first % self.length
        found = self._known.find(1, slot)
        if found < 0:
            found = self._known.find(1, 0, slot)
        return None if found < 0 else first + (found - slot) % self.length

    def values(self, number: int, steps: Iterable[int]) -> list[float]:
        """Of steps that are known."""
        values = self._gpus.get(number)
        if values is None:
            return [0.0 for _ in steps]
        return [values[step % self.length] for step in steps]

    def numbers(self) -> list[int]:
        return list(self._gpus)


@dataclass(slots=True)
class ClockWatch:
    """Whether wall time is to be believed. `offset_ms` is wall time less the monotonic clock as it
    was believed last; `doubted` another one and since when; `behind_since_ms`: since when the time
    is more than a day before the newest sample."""

    offset_ms: int | None = None
    doubted: tuple[int, int] | None = None
    behind_since_ms: int | None = None

    def believes(self, now_ms: int, unix_ms: int, newest_unix_ms: int | None) -> bool:
        """Call it at each tick. A clock that is far behind is believed after a day: then it was
        wrong before, and what was sampled then has to go."""
        newest_ms = unix_ms if newest_unix_ms is None else newest_unix_ms
        if newest_ms - unix_ms > DAY_MS:
            if self.behind_since_ms is None:
                self.behind_since_ms = now_ms
            if now_ms - self.behind_since_ms < DAY_MS:
                return False
        self.behind_since_ms = None
        offset_ms = unix_ms - now_ms
        if self.offset_ms is None:
            sound = unix_ms - newest_ms <= ABSENCE_MS
        else:
            sound = abs(offset_ms - self.offset_ms) <= JUMP_MS
        if not sound:
            if self.doubted is None or abs(self.doubted[0] - offset_ms) > JUMP_MS:
                self.doubted = offset_ms, now_ms
            if now_ms - self.doubted[1] < SETTLE_MS:
                return False
        # A clock that is slewed moves on by a little at each look.
        self.offset_ms, self.doubted = offset_ms, None
        return True

    @property
    def doubts(self) -> bool:
        return self.doubted is not None or self.behind_since_ms is not None


@dataclass(slots=True)
class Counted:
    """What was counted at the last sample (`demand_samples.py`), so that the next one looks at what
    is new. `held`: by open attempt its job, and what it counts as; `sums` are those of it.
    `group_of`: by waiting job a number of `groups`, which has one for all that ask for the same.
    `left`: jobs of whose attempts one has ended since, for `lifetimes.py`."""

    held: dict[str, tuple[int, tuple[tuple[Series, float], ...]]] = field(default_factory=dict)
    sums: dict[Series, float] = field(default_factory=dict)
    group_of: dict[int, int] = field(default_factory=dict)
    groups: dict[tuple[object, ...], int] = field(default_factory=dict)
    left: dict[int, None] = field(default_factory=dict)


@dataclass(slots=True)
class DemandHistory:
    """All samples."""

    clock: ClockWatch = field(default_factory=ClockWatch)
    counted: Counted = field(default_factory=Counted)
    _numbers: dict[Series, int] = field(default_factory=dict)
    _types: dict[str, None] = field(default_factory=dict)
    # The sums over projects, by type and class: below zero, so that no record can name one.
    _sums: dict[Series, int] = field(default_factory=dict)
    _sum_of: dict[int, int] = field(default_factory=dict)
    _rings: dict[int, _Ring] = field(
        default_factory=lambda: {period: _Ring(length) for period, length in KEPT_STEPS.items()}
    )
    # By hour, under the keys that `_spread` makes.
    _still: _Ring = field(
        default_factory=lambda: _Ring(KEPT_STEPS[STILL_STEP_MIN] * STILL_STEP_MIN // HOUR_MIN)
    )

    # --- writing ----------------------------------------------------------------------------------

    def load(self, log: DemandLog) -> None:
        """Take over what is durable; call once, before the first sample."""
        for known in log.series:
            self._name(known.number, known.series)
        for row in log.rows:
            ring = self._rings.get(row.period_min)
            if ring is not None and (ring.newest is None or row.step > ring.newest):
                ring.put(row.step, self._with_sums(dict(zip(row.numbers, row.gpus, strict=True))))
                self._put_still(row)

    @property
    def oldest_minute(self) -> int | None:
        """That is known, of those that are kept by the minute."""
        return self._rings[1].oldest()

    @property
    def newest_minute(self) -> int | None:
        return self._rings[1].newest

    def newest_step(self, period_min: int) -> int | None:
        return self._rings[period_min].newest

    def put(
        self, minute: int, wanted: Mapping[Series, float], still: Mapping[Series, Still] = NOTHING
    ) -> list[DemandRecord]:
        """A sample, later than all before, and at the end of an hour what is known of those who
        want it; returns what has to be durable."""
        records: list[DemandRecord] = []
        gpus: dict[int, float] = {}
        known: dict[int, tuple[float, ...]] = {}
        for series, count in wanted.items():
            if count:
                number = self._number(series, records)
                gpus[number] = gpus.get(number, 0.0) + count
                if series in still:
                    each = (still[series].said_gpus, *still[series].gpus)
                    known[number] = _sum(known.get(number, NOBODY), each)
        newest = self.newest_minute
        if newest is not None:
            # Of a step that nobody was there to end.
            records += self._end_steps(newest, before_minute=minute)
        records.append(self._put(1, minute, gpus))
        records += self._end_steps(minute, before_minute=minute + 1, still=known)
        return records

    def _end_steps(
        self, minute: int, before_minute: int, still: Mapping[int, tuple[float, ...]] = NOTHING
    ) -> list[DemandRecord]:
        """The coarser steps that this minute belongs to, where they are over by then."""
        records: list[DemandRecord] = []
        for period_min, ring in self._rings.items():
            step = minute // period_min
            over = (step + 1) * period_min <= before_minute
            if period_min > 1 and over and (ring.newest is None or ring.newest < step):
                means = self._means(step * period_min, period_min)
                if means is not None:
                    here = still if period_min == STILL_STEP_MIN else NOTHING
                    records.append(self._put(period_min, step, means, here))
        return records

    def _put(
        self,
        period_min: int,
        step: int,
        gpus: Mapping[int, float],
        still: Mapping[int, tuple[float, ...]] = NOTHING,
    ) -> PutDemand:
        self._rings[period_min].put(step, self._with_sums(gpus))
        known = [still.get(number, NOBODY) for number in gpus] if still else []
        rounded = tuple(tuple(round(each, 3) for each in one) for one in known)
        row = DemandRow(period_min, step, tuple(gpus), tuple(gpus.values()), rounded)
        self._put_still(row)
        return PutDemand(row)

    def _put_still(self, row: DemandRow) -> None:
        """Where it is the end of an hour, and says as much as is said now."""
        end_min = (row.step + 1) * row.period_min
        whole = [len(each) == len(NOBODY) for each in row.still]
        if len(whole) != len(row.numbers) or not (whole and all(whole)) or end_min % HOUR_MIN:
            return
        sums: dict[int, tuple[float, ...]] = {}
        for number, each in zip(row.numbers, row.still, strict=True):
            sums[number] = each
            sums[self._sum_of[number]] = _sum(sums.get(self._sum_of[number], NOBODY), each)
        spread = [
            (_spread(number, place), gpus)
            for number, each in sums.items()
            for place, gpus in enumerate(each)
        ]
        self._still.put(end_min // HOUR_MIN - 1, dict(spread))

    def _means(self, first: int, count: int) -> dict[int, float] | None:
        ring = self._rings[1]
        known = [minute for minute in range(first, first + count) if ring.is_known(minute)]
        if 2 * len(known) < count:
            return None
        sums = {number: sum(ring.values(number, known)) for number in ring.numbers() if number >= 0}
        return {number: round(s / len(known), 3) for number, s in sorted(sums.items()) if s}

    def rewind(self, minute: int) -> DropDemand:
        """Samples of later minutes never were."""
        for period_min, ring in self._rings.items():
            ring.rewind((minute + 1) // period_min - 1)
        self._still.rewind((minute + 1) // HOUR_MIN - 1)
        return DropDemand(minute)

    # --- names ------------------------------------------------------------------------------------

    def _number(self, series: Series, records: list[DemandRecord]) -> int:
        if series not in self._numbers:
            if series.gpu_type not in self._types and len(self._types) >= GPU_TYPES_MAX:
                series = Series(OTHER, OTHER, series.job_class)
            elif len(self._numbers) >= SERIES_MAX:
                series = Series(series.gpu_type, OTHER, series.job_class)
        if series not in self._numbers:
            records.append(PutDemandSeries(len(self._numbers), series))
            self._name(len(self._numbers), series)
        return self._numbers[series]

    def _name(self, number: int, series: Series) -> None:
        self._numbers[series] = number
        if series.gpu_type != OTHER:
            self._types[series.gpu_type] = None
        whole = Series(series.gpu_type, "", series.job_class)
        self._sum_of[number] = self._sums.setdefault(whole, -1 - len(self._sums))

    def _with_sums(self, gpus: Mapping[int, float]) -> dict[int, float]:
        summed = dict(gpus)
        for number, count in gpus.items():
            whole = self._sum_of[number]
            summed[whole] = summed.get(whole, 0.0) + count
        return summed

    # --- reading ----------------------------------------------------------------------------------

    def series(self) -> list[Series]:
        """Those that were ever wanted, in the order in which they came."""
        return list(self._numbers)

    def gpu_types(self) -> list[str]:
        return sorted(dict.fromkeys(series.gpu_type for series in self._numbers))

    def read(
        self, period_min: int, first_step: int, count: int, which: Series = Series()
    ) -> list[float | None]:
        """Demand of `count` steps from the first on, summed over what `which` leaves open; `None`
        where it is unknown."""
        ring = self._rings[period_min]
        steps = [step for step in range(first_step, first_step + count) if ring.is_known(step)]
        total = [0.0] * len(steps)
        for number in self._asked(which):
            values = ring.values(number, steps)
            total = [had + more for had, more in zip(total, values, strict=True)]
        found: list[float | None] = [None] * count
        for step, gpus in zip(steps, total, strict=True):
            found[step - first_step] = gpus
        return found

    def read_still(self, first_minute: int, which: Series = Series()) -> list[tuple[int, Still]]:
        """From that minute on, what was known at the end of each hour of what `which` leaves open;
        hours are left out in which nobody of it said when he ends."""
        ring = self._still
        if ring.newest is None:
            return []
        first = max(-(-first_minute // HOUR_MIN) - 1, ring.newest - ring.length + 1)
        hours = [hour for hour in range(first, ring.newest + 1) if ring.is_known(hour)]
        totals = [[0.0] * len(hours) for _ in NOBODY]
        for number in self._asked(which):
            for place, total in enumerate(totals):
                values = ring.values(_spread(number, place), hours)
                totals[place] = [had + more for had, more in zip(total, values, strict=True)]
        each = zip(hours, zip(*totals, strict=True), strict=True)
        return [
            ((hour + 1) * HOUR_MIN, Still(said, tuple(gpus)))
            for hour, (said, *gpus) in each
            if said
        ]

    def _asked(self, which: Series) -> list[int]:
        known = self._numbers if which.project else self._sums
        return [number for series, number in known.items() if matches(which, series)]


def matches(which: Series, series: Series) -> bool:
    """Whether it is one of what `which` leaves open."""
    return (
        which.gpu_type in ("", series.gpu_type)
        and which.project in ("", series.project)
        and which.job_class in ("", series.job_class)
    )
