"""Progress and accounts on the wire: the part of the translation that is about seconds.

Problem: a trainer's times pass through two processes before anybody adds them up, and one that is
infinite, negative or no number would spoil every sum that it goes into, for as long as the record
is kept. So they are checked here, at the edge, and the core knows finite seconds only.
"""

from dataclasses import fields

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.core import model
from protos.baton.v1 import types_pb2 as types

# What the contract allows: thirty years; no process lives longer.
SECONDS_MAX = 10**9
UNIX_S_MAX = 253_402_300_799  # the end of the year 9999, where google.protobuf.Timestamp ends

_TIME_NAMES = {field.name: f"{field.name}econds" for field in fields(model.TrainerTime)}
_ACCOUNT_NAMES = {
    field.name: f"{field.name}econds" if field.name.endswith("_s") else field.name
    for field in fields(model.Accounting)
}


def decode_time(timestamp: Timestamp) -> int:
    """Milliseconds since 1970. Raises `ValueError` for what no calendar has."""
    if not 0 <= timestamp.seconds <= UNIX_S_MAX or not 0 <= timestamp.nanos < 10**9:
        raise ValueError(f"{timestamp.seconds} s after 1970 is no time that is written down")
    return timestamp.ToMilliseconds()


def encode_time(unix_ms: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(unix_ms)
    return timestamp


def encode_span(span_ms: int) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(span_ms)
    return duration


def encode_progress(progress: model.Progress) -> types.Progress:
    """What a trainer last said."""
    message = types.Progress(
        step=progress.step, total_steps=progress.total_steps, metrics=dict(progress.metrics)
    )
    if progress.time is not None:
        for name, wire_name in _TIME_NAMES.items():
            setattr(message.time, wire_name, getattr(progress.time, name))
        message.time.SetInParent()  # all of them may be 0, which is not the same as unsaid
    return message


def decode_progress(progress: types.Progress) -> model.Progress:
    """Raises `ValueError` for times that are no seconds."""
    time = None
    if progress.HasField("time"):
        told = {name: getattr(progress.time, wire) for name, wire in _TIME_NAMES.items()}
        for name, value in told.items():
            if not 0 <= value <= SECONDS_MAX:
                raise ValueError(f"{name} is {value}; it must be between 0 and {SECONDS_MAX}")
        time = model.TrainerTime(**told)
    metrics = tuple(sorted(progress.metrics.items()))
    return model.Progress(progress.step, progress.total_steps, metrics, time)


def add_accounts(message: types.Job, view: model.JobView) -> None:
    """Where the time went, beside the job and each of its attempts, if the view says it."""
    for attempt, account in zip(message.attempts, view.accounts, strict=False):
        attempt.accounting.CopyFrom(_accounting(account))
    if view.accounting is not None:
        message.accounting.CopyFrom(_accounting(view.accounting))


def _accounting(account: model.Accounting) -> types.Accounting:
    values = {wire: getattr(account, name) for name, wire in _ACCOUNT_NAMES.items()}
    return types.Accounting(**values)
