"""hypothesis strategies for records, derived from the dataclasses' own annotations.

Problem: strategies that list fields by hand forget the field that is added next year, and a store
that loses it passes. So a value is built from its type; a type without a rule here fails the suite
at once. Keys come from a few values only, so that records of one example meet: replace, drop and
follow each other.
"""

from dataclasses import fields, is_dataclass
from enum import EnumType
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from coordinator.core.demand_history import KEPT_STEPS, DemandRow
from coordinator.core.messages import (
    AppendEvent,
    DropCheckpoint,
    DropDemand,
    DropJob,
    DropNode,
    DropPart,
    PutAttempt,
    PutCheckpoint,
    PutDemand,
    PutDemandSeries,
    PutJob,
    PutLeaseDay,
    PutNode,
    PutPart,
    PutScaleRecord,
    Record,
)
from coordinator.core.model import Attempt, Checkpoint, Job, JobEvent, Node, WaitingPart
from coordinator.core.scale_records import ScaleRecord

Value = TypeVar("Value")

# What 64-bit databases can hold. NUL cannot stand in a TEXT column of PostgreSQL, nor in an
# argument of a process.
_INTEGERS = st.integers(-(2**63), 2**63 - 1)
_TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20)

# JSON has no word for the others; wire and agent let none in.
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)

_JOB_IDS = st.integers(1, 3)
_EPOCHS = st.integers(1, 3)
_SEQUENCES = st.integers(1, 5)
_RANKS = st.integers(0, 2)
_DIGESTS = st.sampled_from(["aa" * 32, "bb" * 32])
# Near enough that none leaves its ring; test_conformance.py lets some leave.
_PERIODS = st.sampled_from(list(KEPT_STEPS))
_STEPS = st.integers(100, 130)
_NODES = st.sampled_from(["n1", "n10", "n2", "é"])


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    if hint is bool:
        return st.booleans()
    if hint is int:
        return _INTEGERS
    if hint is float:
        return _FLOATS
    if hint is str:
        return _TEXTS
    if isinstance(hint, EnumType):
        return st.sampled_from(list(hint))
    if isinstance(hint, type) and is_dataclass(hint):
        return of_dataclass(hint)
    if hint is NoneType:
        return st.none()
    if isinstance(hint, UnionType):
        return st.one_of([of_type(arm) for arm in get_args(hint)])
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return st.lists(of_type(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*map(of_type, get_args(hint)))
    raise TypeError(f"no strategy for {hint}: durable values are made of the types above")


def of_dataclass(
    cls: type[Value], **given_fields: st.SearchStrategy[Any]
) -> st.SearchStrategy[Value]:
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    free_fields = {name: of_type(hints[name]) for name in names if name not in given_fields}
    return st.builds(cls, **given_fields, **free_fields)


def records() -> st.SearchStrategy[Record]:
    attempts = of_dataclass(Attempt, job_id=_JOB_IDS, epoch=_EPOCHS, rank=_RANKS)
    checkpoints = of_dataclass(Checkpoint, job_id=_JOB_IDS, digest=_DIGESTS)
    parts = of_dataclass(WaitingPart, job_id=_JOB_IDS, rank=_RANKS, digest=_DIGESTS)
    events = of_dataclass(JobEvent, job_id=_JOB_IDS, sequence=_SEQUENCES)
    return st.one_of(
        st.builds(PutJob, of_dataclass(Job, id=_JOB_IDS)),
        st.builds(PutAttempt, attempts),
        st.builds(PutCheckpoint, checkpoints),
        st.builds(PutPart, parts),
        st.builds(DropPart, _JOB_IDS, _RANKS, _DIGESTS),
        st.builds(PutNode, of_dataclass(Node, id=_NODES)),
        st.builds(AppendEvent, events),
        st.builds(DropCheckpoint, _JOB_IDS, _DIGESTS),
        st.builds(DropJob, _JOB_IDS),
        st.builds(DropNode, _NODES),
        of_dataclass(PutDemandSeries, number=st.integers(0, 3)),
        st.builds(PutDemand, of_dataclass(DemandRow, period_min=_PERIODS, step=_STEPS)),
        st.builds(PutScaleRecord, of_dataclass(ScaleRecord, number=st.integers(0, 3))),
        st.builds(DropDemand, st.integers(90, 8_000)),
        st.builds(PutLeaseDay, st.integers(0, 90)),
    )


def histories() -> st.SearchStrategy[list[list[Record]]]:
    """Batches in the order of their commits."""
    return st.lists(st.lists(records(), max_size=8), max_size=5)
