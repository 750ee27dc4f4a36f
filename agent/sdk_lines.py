"""What a line of a trainer says: checked, bounded, and made a value.

Problem: the lines come from any program that a user cares to run. Each field is checked for type
and range here, before anything is done about it, and a checkpoint's path must lie inside the
attempt's staging directory, symbolic links resolved. `sdk_server.py` has the contract.
"""

import json
import math
import os
from dataclasses import fields as fields_of

from agent.core.trainer_messages import (
    PARTS_MAX,
    TrainerCheckpoint,
    TrainerHeedsSaves,
    TrainerLeaving,
    TrainerMessage,
    TrainerMilestone,
    TrainerProgress,
    TrainerTime,
)

METRICS_MAX = 64  # what a person can look at; each becomes a series of its own
NAME_CHARACTERS_MAX = 128  # a metric or milestone name is a label, not a text
STATUS_MAX = 255  # wait(2) keeps eight bits
REASON_CHARACTERS_MAX = 1024  # a sentence in a job's history
INTEGER_MAX = 2**63 - 1  # what every store and wire format holds
SECONDS_MAX = 10**9  # thirty years; no process lives longer
TIME_NAMES = tuple(field.name for field in fields_of(TrainerTime))


class LineRefused(Exception):
    """A line that breaks the contract; the text is the sentence sent back."""


def parse(fields: dict[str, object], staging_directory: str) -> TrainerMessage:
    """The object of one line after the hello, as a value. Raises `LineRefused`."""
    match fields.get("type"):
        case "progress":
            known = fields.get("total_steps") is not None
            total_steps = integer(fields, "total_steps") if known else None
            metrics, time = _metrics(fields), _time(fields)
            return TrainerProgress(integer(fields, "step"), total_steps, metrics, time)
        case "milestone":
            return TrainerMilestone(label(fields.get("name")), integer(fields, "unix_ms"))
        case "checkpoint":
            return checkpoint(fields, _staged_path(fields.get("path"), staging_directory))
        case "heeds_saves":
            return TrainerHeedsSaves()
        case "leaving":
            return TrainerLeaving(integer(fields, "status", STATUS_MAX), _reason(fields))
        case "hello":
            raise LineRefused("a second hello on one connection")
        case other:
            raise LineRefused(f"unknown type {str(other)[:NAME_CHARACTERS_MAX]!r}")


def parse_object(line: bytes) -> dict[str, object]:
    """Raises `LineRefused`."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8 is a ValueError, too
        raise LineRefused("not a JSON object in UTF-8") from None
    if not isinstance(fields, dict):
        raise LineRefused("not a JSON object")
    return fields


def integer(fields: dict[str, object], name: str, most: int = INTEGER_MAX) -> int:
    """The field of this name, 0 to `most`. Raises `LineRefused`."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise LineRefused(f"{name} must be an integer from 0 to {most}")
    return value


def _reason(fields: dict[str, object]) -> str:
    value = fields.get("reason", "")
    if isinstance(value, str) and len(value) <= REASON_CHARACTERS_MAX and value.isprintable():
        return value
    raise LineRefused(f"a reason must be printable text of at most {REASON_CHARACTERS_MAX}")


def checkpoint(fields: dict[str, object], path: str) -> TrainerCheckpoint:
    """Of a directory, or of a capture by its name. Raises `LineRefused`."""
    parts = integer(fields, "parts") if "parts" in fields else 1
    if not 1 <= parts <= PARTS_MAX:
        raise LineRefused(f"parts must be an integer from 1 to {PARTS_MAX}")
    return TrainerCheckpoint(integer(fields, "id"), path, integer(fields, "step"), parts)


def label(value: object) -> str:
    """A name that a trainer has chosen. Raises `LineRefused`."""
    if not isinstance(value, str) or not 0 < len(value) <= NAME_CHARACTERS_MAX:
        raise LineRefused(f"a name must be text of 1 to {NAME_CHARACTERS_MAX} characters")
    if not value.isprintable():
        raise LineRefused("a name must be printable")
    return value


def _metrics(fields: dict[str, object]) -> tuple[tuple[str, float], ...]:
    metrics = fields.get("metrics") or {}
    if not isinstance(metrics, dict) or len(metrics) > METRICS_MAX:
        raise LineRefused(f"metrics must be an object of at most {METRICS_MAX} names")
    return tuple((label(name), _number(value)) for name, value in metrics.items())


def _time(fields: dict[str, object]) -> TrainerTime | None:
    """Names that we do not know are a newer trainer's, and are passed over."""
    told = fields.get("time")
    if told is None:
        return None
    if not isinstance(told, dict) or len(told) > METRICS_MAX:
        raise LineRefused(f"time must be an object of at most {METRICS_MAX} names")
    return TrainerTime(**{name: _seconds(told[name]) for name in TIME_NAMES if name in told})


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= SECONDS_MAX:
        return float(value)
    raise LineRefused(f"a time must be a number of seconds from 0 to {SECONDS_MAX}")


def _number(value: object) -> float:
    """Also NaN and infinities: a loss that diverged is a fact, and Python's JSON writes it so."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise LineRefused("a metric must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _staged_path(value: object, staging_directory: str) -> str:
    if not isinstance(value, str) or not os.path.isabs(value) or "\0" in value:
        raise LineRefused("path must be an absolute path")
    try:
        # One that is gone passes, if its place is right: a trainer that did not hear the answer
        # offers again what has been stored and cleared away, and is told so by the core.
        real = os.path.realpath(value)
        gone = not os.path.lexists(real)
    except (OSError, ValueError):  # ValueError: text that is no file name (a lone surrogate)
        raise LineRefused("path is no file name") from None
    if not real.startswith(staging_directory + os.sep) or not (gone or os.path.isdir(real)):
        raise LineRefused("path is not a directory inside the attempt's staging directory")
    return real
