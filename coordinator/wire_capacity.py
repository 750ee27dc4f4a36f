"""The plan of the fleet's size on the wire.

Problem: what is not known yet (a coverage, what a decision turned out to cost) is not zero, and
absent in the message. A decision is named as people name it, `scale-7`.
"""

import re

from coordinator.core.demand_history import MINUTE_MS
from coordinator.core.scale_records import ScaleRecord
from coordinator.core.scale_requests import PlanPage, TypePlan
from protos.baton.v1 import capacity_pb2 as pb

_ID = re.compile(r"(?:scale-)?(\d{1,18})")


def decode_id(text: str) -> int:
    """The number of a decision. Raises `ValueError` with a sentence."""
    found = _ID.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} names no decision; they are called scale-1, scale-2 and so on")
    return int(found[1])


def encode_plan(page: PlanPage) -> pb.GetPlanResponse:
    message = pb.GetPlanResponse(
        mode=_mode(page.mode),
        why=page.why,
        acts=page.acts,
        level=page.level,
        types=[_type_plan(plan) for plan in page.types],
        proposed=[encode_decision(record) for record in page.proposed],
    )
    if page.made_unix_ms is not None:
        message.made_time.FromMilliseconds(page.made_unix_ms)
    return message


def _type_plan(plan: TypePlan) -> pb.TypePlan:
    message = pb.TypePlan(
        gpu_type=plan.gpu_type,
        on_gpus=plan.on_gpus,
        idle_gpus=plan.idle_gpus,
        leaving_gpus=plan.leaving_gpus,
        starting_gpus=plan.starting_gpus,
        off_gpus=plan.off_gpus,
        failed_gpus=plan.failed_gpus,
        closed_gpus=plan.closed_gpus,
        running_gpus=plan.running_gpus,
        queued_gpus=plan.queued_gpus,
        guaranteed_gpus=plan.guaranteed_gpus,
        need_gpus=plan.need_gpus,
        keep_gpus=plan.keep_gpus,
        wanted_gpus=plan.wanted_gpus,
        soon_gpus=plan.soon_gpus,
        later_gpus=plan.later_gpus,
        coverage_ratio=plan.coverage,
        stale=plan.stale,
        sentence=plan.sentence,
        rented_gpus=plan.rented_gpus,
        need_reason=plan.need_reason,
    )
    message.boot.FromMilliseconds(plan.boot_ms)
    if plan.decided_unix_ms is not None:
        message.decided_time.FromMilliseconds(plan.decided_unix_ms)
    return message


def encode_decision(record: ScaleRecord) -> pb.ScaleDecision:
    seen = record.hindsight
    message = pb.ScaleDecision(
        id=record.id,
        gpu_type=record.gpu_type,
        mode=_mode(record.mode),
        sentence=record.sentence,
        level=record.level,
        running_gpus=record.running_gpus,
        queued_gpus=record.queued_gpus,
        guaranteed_gpus=record.guaranteed_gpus,
        there_gpus=record.there_gpus,
        need_gpus=record.need_gpus,
        keep_gpus=record.keep_gpus,
        soon_gpus=record.soon_gpus,
        later_gpus=record.later_gpus,
        coverage_ratio=record.coverage,
        alternatives=[
            pb.ScaleAlternative(
                name=choice.name,
                gpus=choice.gpus,
                expected_usd=choice.usd,
                realised_usd=None if seen is None else seen.usd[place],
                fixed_usd=choice.fixed_usd,
            )
            for place, choice in enumerate(record.alternatives)
        ],
        rail=record.rail,
        rail_reason=record.rail_words,
        deeds=[
            pb.ScaleDeed(verb=deed.verb, nodes=deed.nodes, state=deed.state)
            for deed in record.deeds
        ],
        rent_usd=record.rent_usd,
        patient_gpus=record.patient_gpus,
        ending_gpus=record.ending_gpus,
        late_gpus=record.late_gpus,
        late_jobs=record.late_jobs,
    )
    message.time.FromMilliseconds(record.unix_ms)
    message.holds.FromMilliseconds(record.minutes * MINUTE_MS)
    message.soon.FromMilliseconds(record.soon_ms)
    if record.frees_ms is not None:
        message.frees.FromMilliseconds(record.frees_ms)
    if seen is not None:
        message.hindsight.CopyFrom(
            pb.ScaleHindsight(mean_gpus=seen.mean_gpus, regret_usd=seen.regret_usd)
        )
    return message


def _mode(word: str) -> pb.ScalingMode.ValueType:
    return pb.ScalingMode.Value(f"SCALING_MODE_{word.upper()}")
