"""What people ask of the fleet's size: the plan as it stands, its decisions, and their consent.

Problem: a person who agrees has read a sentence of some minutes ago, and the fleet goes on. So only
what the present plan still proposes can be agreed to, of that only what still may be done is done,
and it counts towards the bounds of the next plan as if that had done it.
"""

from collections.abc import Sequence
from dataclasses import replace

from coordinator.core import (
    demand_forecast,
    fleet_scaling,
    guard_rails,
    plan_time,
    power,
    scaling,
)
from coordinator.core.boot_times import BootTimes
from coordinator.core.capacity_model import Box, Outlook, Power, Source
from coordinator.core.capacity_orders import Verb
from coordinator.core.demand_history import Series
from coordinator.core.guard_rails import DAY_MS
from coordinator.core.messages import Refusal, RefusalKind
from coordinator.core.node_power import minutes
from coordinator.core.scale_records import RECORDS_MAX, ScaleRecord
from coordinator.core.scale_requests import (
    ApproveScaling,
    GetPlan,
    GetScaleRecord,
    ListScaleRecords,
    PlanPage,
    ScaleAnswer,
    ScalePage,
    ScaleRequest,
    TypePlan,
)
from coordinator.core.scaling import Wanted
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State

RECORDS_SHOWN = 20


def answer(state: State, now: Instant, body: ScaleRequest) -> ScaleAnswer | Refusal:
    match body:
        case GetPlan():
            return plan_page(state, now)
        case ListScaleRecords():
            return list_records(state, body)
        case GetScaleRecord():
            return get_record(state, body)
        case ApproveScaling():
            return approve(state, now, body)


def plan_page(state: State, now: Instant) -> PlanPage:
    scaler, rules = state.scaler, state.options.scaling.rules
    mode, why = fleet_scaling.mode_of(state, now)
    boxes: dict[str, list[Box]] = {}
    for box in fleet_scaling.boxes_of(state, now):
        boxes.setdefault(box.gpu_type, []).append(box)
    seen = {each.gpu_type: each for each in demand_forecast.outlooks(state, now)}
    by_plan = fleet_scaling.present(state, now, list(seen.values()))
    outlooks = {each.gpu_type: each for each in by_plan}
    newest = {record.gpu_type: record for record in scaler.records.values()}
    boots = power.boot_times(state)
    types = []
    for name in sorted(dict.fromkeys([*boxes, *outlooks])):
        outlook, mine = outlooks.get(name, Outlook(name, 0, 0, 0)), boxes.get(name, [])
        wanted = _wanted(state, now, outlook, mine)
        shown = _type_plan(outlook, mine, wanted, newest.get(name), boots=boots)
        queued_gpus = seen[name].queued_gpus if name in seen else 0
        why_need = _need_reason(state, now, outlook, wanted)
        types.append(replace(shown, queued_gpus=queued_gpus, need_reason=why_need))
    return PlanPage(
        mode.value,
        why,
        state.options.power.acts,
        rules.level,
        tuple(types),
        tuple(scaler.records[number] for number in scaler.proposed.values()),
        None if scaler.made is None else scaler.made[1],
    )


def _wanted(state: State, now: Instant, outlook: Outlook, mine: Sequence[Box]) -> Wanted:
    """By the plan's own arithmetic: what is shown is what it acts by."""
    now_ms = plan_time.plan_ms(state.options, now.now_ms)
    boots = plan_time.boots(state.options, power.boot_times(state))
    rules = replace(state.options.scaling.rules, boots=boots)
    unknown = guard_rails.of_knowledge(outlook, now_ms, state.scaler.memory.at_ms, rules.bounds)
    return scaling.wanted_of(outlook, mine, now_ms, rules, trusted=unknown is None)


def _type_plan(
    outlook: Outlook,
    boxes: Sequence[Box],
    wanted: Wanted,
    record: ScaleRecord | None,
    *,
    boots: BootTimes,
) -> TypePlan:
    able = [box for box in boxes if not box.closed]
    by_power = {p: sum(box.gpus for box in able if box.power is p) for p in Power}
    need, keep = wanted.need_gpus, wanted.keep_gpus
    there = by_power[Power.ON] + by_power[Power.LEAVING] + by_power[Power.STARTING]
    return TypePlan(
        outlook.gpu_type,
        by_power[Power.ON],
        sum(box.gpus - box.held_gpus for box in able if box.power is Power.ON),
        by_power[Power.LEAVING] + by_power[Power.STOPPING],
        by_power[Power.STARTING],
        by_power[Power.OFF],
        by_power[Power.FAILED],
        sum(box.gpus for box in boxes if box.closed),
        outlook.running_gpus,
        outlook.queued_gpus,
        outlook.guaranteed_gpus,
        need,
        keep,
        min(max(need, min(there, keep)), there + by_power[Power.OFF]),
        max((boots.of(box.model) for box in boxes), default=0),
        outlook.soon_gpus,
        outlook.later_gpus,
        outlook.coverage,
        outlook.stale,
        "" if record is None else f"{record.id}: {record.sentence}",
        sum(box.gpus for box in boxes if box.source is Source.BURST),
        decided_unix_ms=None if record is None else record.unix_ms,
    )


def _need_reason(state: State, now: Instant, outlook: Outlook, wanted: Wanted) -> str:
    """Empty where as many are needed as run and wait. A forecast is of the newest minute, and of
    the most that is wanted until a node that is started now would be there."""
    need, wants = wanted.need_gpus, wanted.now_gpus
    begins = f"{quantity(need, 'GPU is', 'GPUs are')} needed, and {wants} wanted now"
    if need < wants:
        return f"{begins}: {outlook.ending_gpus} come free before a node could be started"
    if need == wants:
        return ""
    soon_min, _ = demand_forecast.minutes_ahead(state, outlook.gpu_type)
    level = f"{100 * state.options.scaling.rules.level:.3g}%"
    within = minutes(soon_min * state.options.demand_minute_ms)
    why = f"in {level} of cases no more are wanted at once within {within}"
    newest = state.demand_history.newest_minute or 0
    (then,) = state.demand_history.read(1, newest, 1, Series(outlook.gpu_type))
    if then is not None and round(then) != outlook.running_gpus + outlook.queued_gpus:
        why += f", by the {round(then)} that were wanted when that was forecast"
    if fleet_scaling.history_ms(state, now) < DAY_MS:
        why += "; demand is known for less than a day, so it is taken to rise by chance alone"
    return f"{begins}: {why}"


def list_records(state: State, body: ListScaleRecords) -> ScalePage:
    found = [
        record
        for record in reversed(state.scaler.records.values())
        if body.gpu_type in ("", record.gpu_type)
    ]
    return ScalePage(tuple(found[: body.count or RECORDS_SHOWN]))


def get_record(state: State, body: GetScaleRecord) -> ScalePage | Refusal:
    record = state.scaler.records.get(body.number)
    if record is None:
        kept = f"the newest {RECORDS_MAX} decisions are kept"
        return Refusal(RefusalKind.NOT_FOUND, f"there is no decision scale-{body.number}; {kept}")
    return ScalePage((record,))


def approve(state: State, now: Instant, body: ApproveScaling) -> ScalePage | Refusal:
    """What the newest decision about a GPU type proposes; an older one went by an older fleet."""
    record = state.scaler.records.get(body.number)
    if record is None:
        return get_record(state, GetScaleRecord(body.number))
    if state.scaler.proposed.get(record.gpu_type) != record.number:
        sentence = f"{record.id} proposes nothing that is still to be done"
        return Refusal(RefusalKind.WRONG_PHASE, sentence)
    if not state.options.power.acts:
        sentence = f"{record.id} cannot be carried out: no driver is configured"
        return Refusal(RefusalKind.WRONG_PHASE, sentence)
    fleet_scaling.propose_anew(state, record.gpu_type)
    deeds = []
    for deed in record.deeds:
        why = f"{record.id}, approved by a person"
        left = fleet_scaling.carry_out(state, now, Verb(deed.verb), deed.nodes, why)
        done = tuple(name for name in deed.nodes if name not in left)
        deeds.append(replace(deed, nodes=done, state="approved"))
    if not any(deed.nodes for deed in deeds):
        sentence = f"the fleet has changed since {record.id}: nothing of it is left to be done"
        return Refusal(RefusalKind.WRONG_PHASE, sentence)
    off, on = (
        sum(len(deed.nodes) for deed in deeds if Verb(deed.verb) in verbs)
        for verbs in ((Verb.SUSPEND, Verb.DELETE), (Verb.RESUME, Verb.CREATE))
    )
    fleet_scaling.count(state, now, off, on)
    record = replace(record, deeds=tuple(deeds))
    fleet_scaling.put(state, record)
    return ScalePage((record,))
