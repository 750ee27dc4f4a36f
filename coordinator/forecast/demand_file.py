"""A demand series (CSV) as people export it: a time and a number of GPUs, at equal steps.

    time,demand
    2026-03-01T00:00,602
    2026-03-01T00:10,599

Times are by UTC, or say their offset from it. Traces that are published without dates count from
their beginning instead: a column `hour` or `minute` in the place of `time`, whose zero is taken to
be midnight. An empty cell is a gap: an outage, or a collector that was away. A missing line is one
too. What is not a number, not in order or not on the grid is an error that names the line.
"""

import csv
import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

STEPS_MAX: Final = 2_000_000  # almost four years of minutes; a mistyped path may name anything
HOUR_S: Final = 3600
# Columns that say when, the first of those that are there; of the others so many seconds are one.
TIME: Final = "time"
OFFSETS_S: Final = {"hour": 3600, "minute": 60}
# Where a series without dates begins: a Saturday, as good as any.
NO_DATE: Final = datetime(2000, 1, 1)
COLUMN_HINT: Final = "; --column names another"


class BadDemand(ValueError):
    """A file cannot be used; the text is a sentence that names the place."""


@dataclass(frozen=True, slots=True)
class Series:
    """`values` are GPUs, NaN where nobody knows; the first belongs to `begin`."""

    values: tuple[float, ...]
    per_hour: int
    begin: datetime

    @property
    def first_step(self) -> int:
        """Since the beginning of that day."""
        day_s = self.begin.hour * HOUR_S + self.begin.minute * 60 + self.begin.second
        return day_s * self.per_hour // HOUR_S


def read_series(path: Path, column: str = "demand") -> Series:
    """The series in this column."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            when = next((name for name in (TIME, *OFFSETS_S) if name in names), TIME)
            for needed in (when, column):
                if needed not in names:
                    there = ", ".join(names) or "none"
                    hint = "; 'hour' or 'minute' will do" if needed == TIME else COLUMN_HINT
                    raise BadDemand(f"{path} has no column {needed!r}; its columns: {there}{hint}")
            rows = [
                (_time(path, reader.line_num, row, when), _gpus(path, reader.line_num, row, column))
                for row in reader
            ]
    except OSError as error:
        raise BadDemand(f"{path} cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadDemand(f"{path} is no CSV file in UTF-8") from error
    if len(rows) < 3:
        raise BadDemand(f"{path} has {len(rows)} lines; a series needs three at least")
    return _on_grid(path, rows)


def _on_grid(path: Path, rows: list[tuple[datetime, float]]) -> Series:
    begin = rows[0][0]
    step_s = min((later[0] - row[0]).total_seconds() for row, later in pairwise(rows))
    if step_s <= 0:
        line = next(n for n, (row, later) in enumerate(pairwise(rows), 3) if later[0] <= row[0])
        raise BadDemand(
            f"{path}, line {line}: {rows[line - 2][0]} does not come after the line before"
        )
    if HOUR_S % step_s:
        raise BadDemand(
            f"{path}: times must rise by steps that divide an hour; the least is {step_s:g} s"
        )
    count = int((rows[-1][0] - begin).total_seconds() // step_s) + 1
    if count > STEPS_MAX:
        raise BadDemand(f"{path} spans {count} steps; {STEPS_MAX} at most")
    values = [math.nan] * count
    for line, (at, gpus) in enumerate(rows, start=2):
        place = (at - begin).total_seconds() / step_s
        if place != int(place):
            raise BadDemand(f"{path}, line {line}: {at} is not a step of {step_s:g} s")
        values[int(place)] = gpus
    return Series(tuple(values), int(HOUR_S // step_s), begin)


def _time(path: Path, line: int, row: dict[str, str], when: str) -> datetime:
    try:
        if when != TIME:
            return NO_DATE + timedelta(seconds=float(row[when]) * OFFSETS_S[when])
        at = datetime.fromisoformat(row[when])
        return at.astimezone(UTC).replace(tzinfo=None) if at.tzinfo else at
    except (TypeError, ValueError, OverflowError):
        kind = "an ISO time" if when == TIME else f"a number of {when}s"
        raise BadDemand(f"{path}, line {line}: {row[when]!r} is not {kind}") from None


def _gpus(path: Path, line: int, row: dict[str, str], column: str) -> float:
    cell = (row[column] or "").strip()
    if not cell:
        return math.nan
    try:
        gpus = float(cell)
    except ValueError:
        gpus = -1.0
    if not 0 <= gpus < math.inf:
        raise BadDemand(f"{path}, line {line}: {cell!r} is not a number of GPUs")
    return gpus
