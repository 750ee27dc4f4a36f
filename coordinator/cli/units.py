"""Sizes, durations and ages: what people write and read, turned into bytes and milliseconds once,
here.

Problem: "40G" means 40e9 bytes to a disk vendor and 40 * 2^30 to Slurm, and "120" means seconds to
one tool and minutes to the next. Guessing is cheap to write and expensive to be wrong about, so an
amount without a clear unit is refused with a sentence that shows both readings. Parsing is exact
(`Decimal`): "1.5GiB" is a whole number of bytes or an error.
"""

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

# int64 on the wire.
SIZE_BYTES_MAX = 2**63 - 1
# What google.protobuf.Duration can hold (about 10,000 years); the coordinator's own bound is far
# below, and its to state.
DURATION_MS_MAX = 315_576_000_000 * 1000

_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_PREFIXES = "kmgtp"
_SIZE_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate(_PREFIXES, start=1):
    _SIZE_UNITS[f"{_prefix}b"] = 1000**_power
    _SIZE_UNITS[f"{_prefix}ib"] = 1024**_power

_DURATION = re.compile(r"(?:\d{1,15}(?:ms|[dhms]))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+)(ms|[dhms])", re.ASCII)
_DURATION_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


# All that `datetime.fromisoformat` takes for the day's first moment: a month, a week, or shorter.
_DATE_ALONE = re.compile(r"\d{4}-?(\d{2}-?\d{2}|W\d{2}(-?\d)?)")


def parse_size(text: str) -> int:
    """Bytes of "40GiB", "40GB", "1.5TiB" or "1024". Raises `ValueError` with a sentence."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 40GiB, 40GB or 42949672960")
    number, unit = match[1], match[2].lower()
    if unit and unit in _PREFIXES:
        letter = unit.upper()
        raise ValueError(
            f"{text!r} is ambiguous; write {number}{letter}iB (powers of 1024) "
            f"or {number}{letter}B (powers of 1000)"
        )
    if unit not in _SIZE_UNITS:
        raise ValueError(f"{text!r} has an unknown unit; write it like 40GiB, 40GB or 42949672960")
    # A ratio of integers: arithmetic on `Decimal` itself would round to 28 digits.
    numerator, denominator = Decimal(number).as_integer_ratio()
    size_bytes, rest = divmod(numerator * _SIZE_UNITS[unit], denominator)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    if size_bytes > SIZE_BYTES_MAX:
        raise ValueError(f"{text!r} is more than {SIZE_BYTES_MAX} bytes")
    return size_bytes


def parse_duration(text: str) -> int:
    """Milliseconds of "120s", "5m", "2h", "1h30m" or "500ms". Raises `ValueError` with a
    sentence."""
    compact = text.strip().lower()
    if compact.isascii() and compact.isdigit():
        raise ValueError(
            f"{text!r} has no unit; write {compact}s for seconds or {compact}m for minutes"
        )
    if _DURATION.fullmatch(compact) is None:
        raise ValueError(f"{text!r} is not a duration; write it like 120s, 5m, 1h30m or 2d")
    parts = _DURATION_PART.findall(compact)
    if len({unit for _, unit in parts}) < len(parts):
        raise ValueError(f"{text!r} names a unit twice")
    duration_ms = sum(int(number) * _DURATION_UNITS_MS[unit] for number, unit in parts)
    if duration_ms > DURATION_MS_MAX:
        raise ValueError(f"{text!r} is longer than {DURATION_MS_MAX // 1000} s")
    return duration_ms


def parse_lead(text: str) -> int:
    """Milliseconds of a time to come that is said as so long from now ("6h"); 0 of any other.
    Raises as `parse_time`."""
    return parse_duration(text) if _DURATION.fullmatch(text.strip().lower()) else 0


def parse_time(text: str, now: datetime) -> datetime:
    """A time to come: so long after `now` ("6h"), or a date with a time ("2026-11-30T09:00"), which
    is the local one where it names no offset. Raises `ValueError` with a sentence."""
    duration_ms = None
    if _DURATION.fullmatch(text.strip().lower()) is not None:
        duration_ms = parse_duration(text)
    try:
        if duration_ms is not None:
            return now + timedelta(milliseconds=duration_ms)
        found = datetime.fromisoformat(text.strip())
        if _DATE_ALONE.fullmatch(text.strip()) is None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text!r} is no time; write it like 6h, 2026-11-30T09:00 or 2026-11-30T09:00Z"
        ) from error
    day = found.date().isoformat()
    raise ValueError(f"{text!r} names a day and no time of it; write it like {day}T18:00")


def format_duration(duration_ms: int) -> str:
    """The shortest text that `parse_duration` reads as exactly this many milliseconds (0 or
    more)."""
    if duration_ms == 0:
        return "0s"
    parts = []
    for unit, unit_ms in _DURATION_UNITS_MS.items():
        count, duration_ms = divmod(duration_ms, unit_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def format_size(size_bytes: int) -> str:
    """A size for people: "40 GB" where that is exact, else three digits and a binary unit."""
    if size_bytes and size_bytes % 1000**3 == 0 and size_bytes % 1024**3:
        return f"{size_bytes // 1000**3} GB"
    if size_bytes < 1024:
        return f"{size_bytes} B"
    amount = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        amount /= 1024
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
    return f"{amount / 1024:.3g} EiB"


def format_span(start: datetime | None, end: datetime | None) -> str:
    """How long it is from `start` to `end` in its two leading units: "3m12s"; "-" when either is
    not known.

    Wall clocks of two machines differ a little: a negative span reads "0s".
    """
    if start is None or end is None:
        return "-"
    return format_seconds(max(0, int((end - start).total_seconds())))


def format_seconds(seconds: int) -> str:
    """The two leading units of 0 or more: "42s", "3m12s", "2d05h"."""
    for unit_s, unit, part_s, part in (
        (86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"),
    ):  # fmt: skip
        if seconds >= unit_s:
            return f"{seconds // unit_s}{unit}{seconds % unit_s // part_s:02d}{part}"
    return f"{seconds}s"
