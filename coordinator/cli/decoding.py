"""Answers of the coordinator as plain values.

Problem: an answer of a newer coordinator has words that this program does not know, and what is
absent in it must not come out as 0. A value has the fields of its message, under the same names, so
one function reads them all, as the value declares them: what may be `None` is that where it is
absent, an enum is the word that people say, and a span a number of the unit that its name ends in.
What is not so is said by whoever asks.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from types import NoneType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from coordinator.cli import values
from coordinator.cli.settings import CommandFailed
from protos.baton.v1 import jobs_pb2, types_pb2

_Value = TypeVar("_Value", bound=msgspec.Struct)


class _Field(NamedTuple):
    """Of a value; `convert` makes it of the message's field `source`."""

    name: str
    source: str
    may_be_absent: bool
    convert: Callable[[Any], Any]


def decode(message: Message, kind: type[_Value], **others: Any) -> _Value:
    """The value that a message is; `others` are fields that the message has otherwise or not."""
    for name, source, may_be_absent, convert in _fields(kind, message.DESCRIPTOR, *others):
        absent = may_be_absent and not message.HasField(source)
        others[name] = None if absent else convert(getattr(message, source))
    return kind(**others)


@lru_cache(maxsize=64)
def _fields(kind: type[msgspec.Struct], message: Descriptor, *others: str) -> tuple[_Field, ...]:
    """Raises KeyError for one that the message does not have: a bug."""
    found = []
    for name, wanted in ((each.name, each.type) for each in msgspec.structs.fields(kind)):
        if name in others:
            continue
        # `grace_ms` and `age_s` are what the messages have as spans: `grace`, `age`.
        source = name if name in message.fields_by_name else name.rpartition("_")[0]
        told = message.fields_by_name[source]
        may_be_absent = NoneType in get_args(wanted) and told.enum_type is None
        found.append(_Field(name, source, may_be_absent, _converter(name, wanted, told)))
    return tuple(found)


def _converter(name: str, wanted: Any, told: FieldDescriptor) -> Callable[[Any], Any]:
    parts = [part for part in (wanted, *get_args(wanted)) if isinstance(part, type)]
    struct = next((part for part in parts if issubclass(part, msgspec.Struct)), None)
    if (enum := told.enum_type) is not None:
        return lambda number: _word_of(enum, number)
    if get_origin(wanted) is dict:
        return lambda pairs: dict(sorted(pairs.items()))
    if get_origin(wanted) is list:
        return list if struct is None else lambda all_: [decode(one, struct) for one in all_]
    if struct is not None:
        return lambda message: decode(message, struct)
    if told.message_type is None:
        return lambda value: value
    if told.message_type.name == "Timestamp":
        return lambda time: time.ToDatetime(tzinfo=UTC)
    if name.endswith("_ms"):
        return lambda span: span.ToMilliseconds()
    return lambda span: span.ToMilliseconds() / 1000


@lru_cache(maxsize=64)
def _word_of(enum: EnumDescriptor, number: int) -> str | None:
    """As people say it; one that a newer coordinator has is "unknown_<n>"."""
    if number not in enum.values_by_number:
        return f"unknown_{number}"
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    word = enum.values_by_number[number].name.removeprefix(prefix).lower()
    return None if word == "unspecified" else word


def time_of(message: Message, field: str) -> datetime | None:
    return getattr(message, field).ToDatetime(tzinfo=UTC) if message.HasField(field) else None


def decode_job(job: types_pb2.Job) -> values.Job:
    progress = None
    if job.HasField("progress"):
        total = job.progress.total_steps or None
        progress = decode(job.progress, values.Progress, total_steps=total)
    spec = decode(job.spec, values.JobSpec, ranks=job.spec.ranks or 1)
    return decode(job, values.Job, spec=spec, progress=progress)


def decode_node(node: types_pb2.Node) -> values.Node:
    rate = _word_of(types_pb2.TelemetryRate.DESCRIPTOR, node.telemetry_rate)
    return decode(node, values.Node, telemetry_rate=rate or "own")


def decode_change(job: types_pb2.Job, jobs: int) -> values.ArrayChange:
    """Of what was asked of a whole array. Raises `CommandFailed`."""
    if not job.HasField("trial"):
        raise CommandFailed(
            f"only job {job.id} was changed: the coordinator knows no arrays; is it older?"
        )
    return decode(job.trial, values.ArrayChange, jobs=jobs)


def decode_requeue(answer: jobs_pb2.RequeueJobResponse) -> values.ArrayRequeue:
    """Likewise. An older coordinator leaves none."""
    change = decode_change(answer.job, answer.jobs)
    return decode(answer, values.ArrayRequeue, **msgspec.structs.asdict(change))
