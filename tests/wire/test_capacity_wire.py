"""The plan of the fleet's size on the wire: what is not known is absent, and names are people's."""

from dataclasses import fields, replace

import pytest

from coordinator import wire_capacity
from coordinator.core.scale_records import Choice, Deed, Hindsight, ScaleRecord
from coordinator.core.scale_requests import PlanPage, TypePlan
from protos.baton.v1 import capacity_pb2 as pb

RECORD = ScaleRecord(
    7, 1_790_000_000_123, "H100", "advise", "1 node of H100 goes off (n3)", 0.95, 1, 2, 3, 4, 5, 6,
    soon_gpus=(1.0, 2.0), later_gpus=(3.0, 4.0), coverage=0.0,
    alternatives=(Choice("do nothing", 4, 1.5), Choice("chosen", 3, 0.5, 0.25)),
    rail="down_rate", rail_words="enough nodes went off",
    deeds=(Deed("suspend", ("n3",), "proposed"),), minutes=120, soon_ms=600_000,
    frees_ms=7_200_000, rent_usd=3.9, patient_gpus=7, ending_gpus=8, late_gpus=9,
    late_jobs=(11, 12),
)  # fmt: skip
PLAN = TypePlan(
    "H100", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
    boot_ms=540_000, soon_gpus=(9.0,), sentence="scale-7: so", rented_gpus=14,
    need_reason="11 GPUs are needed, and 10 wanted now: so", decided_unix_ms=500,
)  # fmt: skip


def test_a_plan_arrives_field_by_field() -> None:
    page = PlanPage("advise", "as it is configured", True, 0.95, (PLAN,), (RECORD,), 1_000)
    sent = wire_capacity.encode_plan(page)
    assert (sent.mode, sent.why, sent.acts) == (pb.SCALING_MODE_ADVISE, page.why, True)
    assert sent.made_time.seconds == 1
    (one,) = sent.types
    for field in fields(TypePlan):
        if field.name.endswith("_gpus") and isinstance(getattr(PLAN, field.name), int):
            assert getattr(one, field.name) == getattr(PLAN, field.name), field.name
    assert one.boot.seconds == 540
    assert one.decided_time.ToMilliseconds() == 500
    assert (list(one.soon_gpus), one.need_reason) == ([9.0], PLAN.need_reason)
    assert not one.HasField("coverage_ratio"), "not known is not zero"
    assert [decision.id for decision in sent.proposed] == ["scale-7"]
    undecided = replace(page, types=(replace(PLAN, sentence="", decided_unix_ms=None),))
    assert not wire_capacity.encode_plan(undecided).types[0].HasField("decided_time")
    empty = wire_capacity.encode_plan(PlanPage("observe", "", False, 0.95))
    assert not empty.HasField("made_time")


def test_a_decision_arrives_and_its_hindsight_when_there_is_one() -> None:
    sent = wire_capacity.encode_decision(RECORD)
    assert (sent.id, sent.gpu_type, sent.mode) == ("scale-7", "H100", pb.SCALING_MODE_ADVISE)
    assert sent.time.ToMilliseconds() == RECORD.unix_ms
    counts = (sent.running_gpus, sent.queued_gpus, sent.guaranteed_gpus)
    assert (*counts, sent.there_gpus, sent.need_gpus, sent.keep_gpus) == (1, 2, 3, 4, 5, 6)
    assert sent.HasField("coverage_ratio")
    assert [(a.name, a.gpus, a.expected_usd, a.fixed_usd) for a in sent.alternatives] == [
        ("do nothing", 4, 1.5, 0.0), ("chosen", 3, 0.5, 0.25),
    ]  # fmt: skip
    assert (sent.soon.seconds, sent.frees.seconds, sent.rent_usd) == (600, 7_200, 3.9)
    assert (sent.patient_gpus, sent.ending_gpus, sent.late_gpus) == (7, 8, 9)
    assert list(sent.late_jobs) == [11, 12]
    assert (sent.rail, sent.rail_reason) == ("down_rate", "enough nodes went off")
    (deed,) = sent.deeds
    assert (deed.verb, list(deed.nodes), deed.state) == ("suspend", ["n3"], "proposed")
    assert sent.holds.seconds == 7_200
    assert not sent.HasField("hindsight")
    assert not sent.alternatives[0].HasField("realised_usd")
    seen = Hindsight(2.5, (0.0, 0.75), 0.75)
    judged = ScaleRecord(
        8, 0, "H100", "act", "", 0.95, 0, 0, 0, 0, 0, 0,
        alternatives=RECORD.alternatives, hindsight=seen,
    )  # fmt: skip
    sent = wire_capacity.encode_decision(judged)
    assert not sent.HasField("frees")
    assert not sent.HasField("rent_usd")
    assert [one.realised_usd for one in sent.alternatives] == [0.0, 0.75]
    assert sent.alternatives[0].HasField("realised_usd"), "zero is known"
    assert (sent.hindsight.mean_gpus, sent.hindsight.regret_usd) == (2.5, 0.75)


@pytest.mark.parametrize(("text", "number"), [("scale-7", 7), ("7", 7), ("scale-120", 120)])
def test_a_decision_is_named_as_people_name_it(text: str, number: int) -> None:
    assert wire_capacity.decode_id(text) == number


@pytest.mark.parametrize("text", ["", "scale-", "7a", "-7", "scale-7 ", "9" * 30])
def test_what_names_no_decision_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no decision"):
        wire_capacity.decode_id(text)
