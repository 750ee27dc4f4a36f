"""Demand on the wire: what nobody saw is NaN, and a word that is not known is refused."""

import math

import pytest

from coordinator import wire_demand
from coordinator.core.demand_history import STILL_MIN, Still
from coordinator.core.demand_messages import DemandSeries, GetDemand, HeldAhead, Hold, Holds
from protos.baton.v1 import demand_pb2 as pb
from protos.baton.v1 import types_pb2 as types


def test_a_question_arrives() -> None:
    request = pb.GetDemandRequest(
        gpu_type="h100",
        project="nlp",
        job_class=types.JOB_CLASS_SPARE,
        period_minutes=60,
        steps=5,
        ahead_minutes=[60, 360],
        with_holds=True,
        with_still_wanted=True,
    )
    assert wire_demand.decode(request) == GetDemand(
        "h100", "nlp", "spare", 60, 5, (60, 360), holds=True, still=True
    )
    assert wire_demand.decode(pb.GetDemandRequest()) == GetDemand()
    request.job_class = 9  # type: ignore[assignment]
    with pytest.raises(ValueError, match="job_class 9"):
        wire_demand.decode(request)


def test_an_answer_arrives() -> None:
    sent = wire_demand.encode(
        DemandSeries(600_000, 10, (0.5, None, 0.0), "H100", 9.0, (HeldAhead(60, 4.0, 5.5),))
    )
    assert (sent.period_minutes, sent.gpu_type, sent.begin_time.seconds) == (10, "H100", 600)
    assert (sent.gpus[0], sent.gpus[2]) == (0.5, 0.0)
    assert math.isnan(sent.gpus[1])
    (held,) = sent.held_ahead
    assert (sent.held_gpus, held.ahead_minutes, held.certain_gpus) == (9.0, 60, 4.0)
    assert held.expected_gpus == 5.5
    assert not wire_demand.encode(DemandSeries(0, 10, ())).HasField("begin_time")


def test_who_held_arrives_and_who_has_not_ended_is_nan() -> None:
    each = (Hold(2.0, -5.5), Hold(0.25, 3.0, 4.5))
    sent = wire_demand.encode(DemandSeries(0, 10, (), holds=Holds(each, 7.0))).holds
    assert (list(sent.gpus), list(sent.begin_minutes)) == ([2.0, 0.25], [-5.5, 3.0])
    assert math.isnan(sent.end_minutes[0])
    assert (sent.end_minutes[1], sent.since_minutes) == (4.5, 7.0)
    without = wire_demand.encode(DemandSeries(0, 10, (), holds=Holds(())))
    assert without.HasField("holds")
    assert not without.holds.HasField("since_minutes")
    assert not wire_demand.encode(DemandSeries(0, 10, ())).HasField("holds")


def test_what_was_known_of_the_future_arrives() -> None:
    then, now = Still(2.0, (5, 4, 3, 2, 1, 0)), Still(0.5, (1.5,) * 6)
    sent = wire_demand.encode(DemandSeries(0, 10, (), still=((60.0, then), (90.25, now))))
    told = sent.still_wanted
    assert (list(told.minutes), list(told.said_gpus)) == ([60.0, 90.25], [2.0, 0.5])
    assert tuple(told.ahead_minutes) == STILL_MIN
    assert list(told.gpus) == [5, 4, 3, 2, 1, 0, *(1.5,) * 6]
    assert not wire_demand.encode(DemandSeries(0, 10, ())).HasField("still_wanted")
