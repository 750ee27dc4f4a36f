"""The plan of the fleet's size in the live coordinator: what it sees, and what follows from it.

Problem: `scaling.py` knows boxes and outlooks, and the fleet is nodes that fall ill, jobs that come
between two looks, and people who have closed some of it. Whoever translates wrongly switches off
what is needed.

How, each `interval_ms`, and sooner where a new job waits while nodes are closed for this:
1. Every node with GPUs becomes a box. One that a person or its health has closed, or that is not in
   touch without having been switched off, is closed: no capacity, and never touched. One that holds
   what lies nowhere else is `uploading`. A node is idle since the last time that something ran,
   ours or, by what its GPUs say (`readings.py`), somebody else's.
2. The plan is made, its decisions become records (`scale_records.py`), and are logged.
3. Only where the mode is `act` anything follows: nodes that are to take no new work are closed to
   it and emptied by handoff where that pays (`consolidation.py`), those that may go are drained and
   ordered off, those that are needed are started (`power.py`). In `advise` the same is proposed but
   for handoffs, and done when a person agrees.
4. What somebody cannot do without is started in any mode (`wakes.py`).

After our own restart the first plan waits, within the grace that nodes have then, for those that
were on: before they have said hello they are no capacity, and others would be started in their
place.

The mode is `observe` until there are `HISTORY_MS` of demand, then `advise`, unless one is
configured; without a driver it is never `act`.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from coordinator.core import (
    consolidation,
    deadline_rentals,
    demand_forecast,
    known_ends,
    patience,
    plan_time,
    power,
    power_memory,
    rentals,
    scaling,
    wakes,
)
from coordinator.core.capacity_model import Box, Outlook, Power
from coordinator.core.capacity_orders import Verb
from coordinator.core.demand_history import MINUTE_MS, Series
from coordinator.core.model import JobClass
from coordinator.core.node_power import is_gone
from coordinator.core.phases import GpuPhase, NodeIntent, NodePhase
from coordinator.core.power import Takers
from coordinator.core.scale_records import (
    RECORDS_MAX,
    Choice,
    Deed,
    PutScaleRecord,
    ScaleRecord,
    hindsight,
)
from coordinator.core.scaling import Action, Decision, Mode, Plan
from coordinator.core.state import Instant, LiveNode, State

HISTORY_MS = 14 * 86_400_000
# A node that is to go and cannot for so long is wanted for something: it stays.
LEAVE_MS_MAX = 3_600_000
# Who comes while nodes are closed to new work waits no longer than so for the next plan; a burst of
# submissions is one look.
HURRY_MS = 1_000
# Nodes that are looked at in a tick for the next plan: a millisecond; ten thousand in half a
# minute.
AHEAD_MAX = 100


# --- each minute ----------------------------------------------------------------------------------


def tick(state: State, now: Instant) -> None:
    scaler, options = state.scaler, state.options.scaling
    if scaler.due_ms is None:  # a forecast comes with the first minute
        scaler.due_ms = now.now_ms + options.interval_ms
    _box_ahead(state, now, scaler.due_ms)
    if scaler.due_ms > now.now_ms and not _hurries(state, now):
        return
    if scaler.made is None and any(map(_is_expected, state.nodes.values())):
        return
    scaler.seen_job_id = state.last_job_id
    scaler.due_ms = now.now_ms + options.interval_ms
    _note_use(state, now)
    mode, _ = mode_of(state, now)
    plan = _plan(state, now, mode)
    scaler.memory, scaler.made = plan.memory, (now.now_ms, now.unix_ms)
    for decision in plan.decisions:
        if decision.alternatives or _deeds(plan, decision):  # else nobody could weigh anything
            _record(state, now, plan, decision, mode)
    _renounce(state, plan)
    if mode is Mode.ACT:
        _mark(state, now, plan)
        for action in plan.actions:
            carry_out(state, now, action.verb, action.nodes, _why(state, action))
        consolidation.tick(state, now, plan.leaving)
    else:
        _unmark(state, now)
    wakes.tick(state, now)
    _look_back(state)


def _plan(state: State, now: Instant, mode: Mode) -> Plan:
    options, scaler = state.options, state.scaler
    rentals.look(state, now)
    if scaler.made is None:
        count(state, now, *power_memory.lately(state, now))
    boxes = boxes_of(state, now)
    seen = known_ends.outlooks(state, now, boxes, demand_forecast.outlooks(state, now))
    seen = consolidation.settled(state, seen)
    seen = rentals.outlooks(state, now, patience.outlooks(state, now, seen))
    seen = deadline_rentals.outlooks(state, now, boxes, seen)
    scaler.outlooks = {each.gpu_type: each for each in seen}
    boots = plan_time.boots(options, power.boot_times(state))
    rules = replace(options.scaling.rules, mode=mode, boots=boots)
    plan = scaling.plan(
        plan_time.plan_ms(options, now.now_ms),
        boxes,
        [plan_time.outlook(options, each) for each in seen],
        rentals.with_names(state, now, rules),
        rentals.remembered(state, now, scaler.memory),
    )
    return rentals.named(state, now, plan)


def present(state: State, now: Instant, seen: Sequence[Outlook]) -> list[Outlook]:
    """As a plan would take them now, for those who only look: who may wait does not count, and of
    what comes free as much as the last plan has believed. Nothing is changed by it."""
    last = state.scaler.outlooks
    found = [
        replace(
            each,
            ending_gpus=last[each.gpu_type].ending_gpus,
            ended_later_gpus=last[each.gpu_type].ended_later_gpus,
        )
        if each.gpu_type in last
        else each
        for each in seen
    ]
    return patience.outlooks(state, now, consolidation.settled(state, found))


def count(state: State, now: Instant, off: int, on: int) -> None:
    """So many nodes were switched now, whoever wanted it: the next plan may switch fewer."""
    at_ms = plan_time.plan_ms(state.options, now.now_ms)
    state.scaler.memory = scaling.counted(state.scaler.memory, at_ms, off, on)


def _hurries(state: State, now: Instant) -> bool:
    """Somebody new waits, and there are nodes that were closed to new work before he came."""
    scaler = state.scaler
    if state.last_job_id == scaler.seen_job_id or not state.queued or not state.indices.switched:
        return False
    return scaler.made is not None and now.now_ms - scaler.made[0] >= HURRY_MS


def _is_expected(live: LiveNode) -> bool:
    """It was on when our predecessor ended, has not said hello to us, and has time left to."""
    unheard = live.phase is NodePhase.SUSPECT and live.newest_session < 0
    return unheard and live.node.power.phase in (Power.ON, Power.LEAVING)


def mode_of(state: State, now: Instant) -> tuple[Mode, str]:
    """What is in force, and why."""
    options, acts = state.options.scaling, state.options.power.acts
    if options.mode is Mode.ACT and not acts:
        return Mode.ADVISE, "`act` is configured, and no driver that could switch a node"
    if options.mode is not None:
        return options.mode, "as it is configured"
    days = history_ms(state, now) / 86_400_000
    if days < HISTORY_MS / 86_400_000:
        return Mode.OBSERVE, f"there are {days:.1f} days of demand, and 14 are wanted first"
    return Mode.ADVISE, "there are 14 days of demand; `scaling_mode` may say `act`"


def history_ms(state: State, now: Instant) -> int:
    """Since the oldest minute that is known of the last fourteen days, if that long."""
    count = HISTORY_MS // MINUTE_MS
    oldest = state.demand_history.oldest_minute
    minute = now.unix_ms // state.options.demand_minute_ms
    return 0 if oldest is None else min(count, minute - oldest) * MINUTE_MS


def _record(state: State, now: Instant, plan: Plan, decision: Decision, mode: Mode) -> None:
    scaler, outlook, options = state.scaler, decision.outlook, state.options
    soon_min, _ = demand_forecast.minutes_ahead(state, decision.gpu_type)
    rents = options.scaling.rules.bursts.get(decision.gpu_type)
    frees_ms = outlook.frees_ms  # in the plan's time
    scaler.last_number += 1
    record = ScaleRecord(
        scaler.last_number,
        now.unix_ms,
        decision.gpu_type,
        mode.value,
        decision.sentence,
        decision.level,
        outlook.running_gpus,
        outlook.queued_gpus,
        outlook.guaranteed_gpus,
        decision.there_gpus,
        decision.need_gpus,
        decision.keep_gpus,
        outlook.soon_gpus,
        outlook.later_gpus,
        outlook.coverage,
        tuple(
            Choice(each.name, each.gpus, each.usd, each.fixed_usd) for each in decision.alternatives
        ),
        decision.rail.name.lower() if decision.rail else "",
        decision.rail.value if decision.rail else "",
        _deeds(plan, decision),
        options.scaling.rules.later_ms // MINUTE_MS,
        soon_ms=soon_min * options.demand_minute_ms,
        frees_ms=None if frees_ms is None else plan_time.wall_ms(options, frees_ms),
        rent_usd=None if rents is None else rents.usd_per_gpu_h,
        patient_gpus=outlook.patient_gpus,
        ending_gpus=outlook.ending_gpus,
        late_gpus=outlook.late_gpus,
        late_jobs=outlook.late_jobs,
    )
    put(state, record)
    scaler.proposed.pop(record.gpu_type, None)
    if any(deed.state == "proposed" for deed in record.deeds):
        scaler.proposed[record.gpu_type] = record.number
    state.log(
        "info", "scale.decided", decision=record.id, gpu_type=record.gpu_type, mode=record.mode,
        reason=record.sentence,
    )  # fmt: skip


def put(state: State, record: ScaleRecord) -> None:
    records = state.scaler.records
    records[record.number] = record
    if len(records) > RECORDS_MAX:
        del records[next(iter(records))]
    state.records.append(PutScaleRecord(record))


def _deeds(plan: Plan, decision: Decision) -> tuple[Deed, ...]:
    return tuple(
        Deed(action.verb.value, action.nodes, state)
        for actions, state in ((plan.actions, "done"), (plan.proposed, "proposed"))
        for action in actions
        if action.decision == decision.id
    )


def _renounce(state: State, plan: Plan) -> None:
    """What the present plan would not do any more is not proposed any more."""
    scaler = state.scaler
    wanted = {(action.verb.value, name) for action in plan.proposed for name in action.nodes}
    for gpu_type, number in list(scaler.proposed.items()):
        record = scaler.records.get(number)
        deeds = () if record is None else record.deeds
        if not any((deed.verb, name) in wanted for deed in deeds for name in deed.nodes):
            propose_anew(state, gpu_type)


def propose_anew(state: State, gpu_type: str) -> None:
    """What the next plan wants of a type is said, also if it is what the last one said."""
    scaler = state.scaler
    scaler.proposed.pop(gpu_type, None)
    said = tuple(each for each in scaler.memory.said if each[0] != gpu_type)
    scaler.memory = replace(scaler.memory, said=said)


def _why(state: State, action: Action) -> str:
    """Its decision is the newest of its type, and has just become a record."""
    found = [each for each in state.scaler.records.values() if each.gpu_type == action.gpu_type]
    return f"{found[-1].id}, {found[-1].sentence}"


# --- what follows ---------------------------------------------------------------------------------


def _mark(state: State, now: Instant, plan: Plan) -> None:
    """Nodes that are to take no new work are closed to it, and all others are open."""
    leaving = dict.fromkeys(plan.leaving)
    for live in list(state.nodes.values()):
        its = live.node.power
        if live.node.id in leaving:
            if its.phase is Power.ON and live.node.intent is NodeIntent.OPEN:
                power.leave(state, now, live, "it is not expected to be missed")
        elif its.phase is Power.LEAVING and its.ours:
            power.stay(state, now, live, "it is needed")


def _unmark(state: State, now: Instant) -> None:
    """Nobody marks nodes in this mode: those are open that were marked before, and those that a
    person has let go and that have not got away."""
    for node_id in list(state.indices.switched):
        live = state.nodes[node_id]
        its = live.node.power
        if its.phase is not Power.LEAVING or not its.ours:
            continue
        tried_ms = now.now_ms - power_memory.starts_ms(state, now, live)[1]
        if live.node.intent is NodeIntent.CORDONED or tried_ms > LEAVE_MS_MAX:
            power.stay(state, now, live, "it is needed, or nobody wants it off any more")


def carry_out(
    state: State, now: Instant, verb: Verb, names: tuple[str, ...], why: str
) -> list[str]:
    """Returns the nodes for which there was nothing to do any more."""
    left = []
    for name in names:
        live = state.nodes.get(name)
        its = None if live is None else live.node.power.phase
        if live is not None and verb is Verb.RESUME and its is Power.OFF and not is_closed(live):
            power.start(state, now, live, why)
        elif live is not None and verb in (Verb.SUSPEND, Verb.DELETE) and _may_go(live):
            power.go(state, now, live, why)
        elif verb is Verb.CREATE and rentals.rent(state, now, name, why):
            deadline_rentals.rented(state, now, state.nodes[name].node.power.gpu_type)
        else:
            left.append(name)
    return left


def _may_go(live: LiveNode) -> bool:
    """What was wanted of it may be a while ago: whoever is there now, stays."""
    if live.phase is not NodePhase.UP or live.attempts or live.strays:
        return False
    its = live.node.power
    fresh = its.phase is Power.ON and live.node.intent is NodeIntent.OPEN
    return fresh or (its.phase is Power.LEAVING and its.ours)


def _look_back(state: State) -> None:
    """Decisions whose time is over are judged by what came."""
    rules = state.options.scaling.rules
    newest = state.demand_history.newest_minute
    for record in [each for each in state.scaler.records.values() if each.hindsight is None]:
        first = record.unix_ms // state.options.demand_minute_ms + 1
        if newest is None or not record.minutes or first + record.minutes > newest:
            continue
        if newest - first > HISTORY_MS // MINUTE_MS:
            continue
        came = state.demand_history.read(1, first, record.minutes, Series(record.gpu_type))
        found = hindsight(record, came, rules.wait_usd_per_gpu_h, rules.idle_usd_per_gpu_h)
        if found is not None:
            put(state, replace(record, hindsight=found))


# --- what a plan sees -----------------------------------------------------------------------------


def _note_use(state: State, now: Instant) -> None:
    """Who is used now; `attempts.assign` says it of whoever comes and ends in between."""
    for live in state.nodes.values():
        busy = live.attempts or live.strays
        if busy or not 0 < live.used_ms <= now.now_ms:
            live.used_ms = max(1, now.now_ms)
            if not busy:  # new, or a plan has come sooner than it was looked at for
                state.rooms.boxes.pop(live.node.id, None)


def is_closed(live: LiveNode) -> bool:
    """A person or its health has closed it, or it is in no touch and was not switched off."""
    node = live.node
    shut = node.intent is not NodeIntent.OPEN and not node.power.ours
    away = live.phase is not NodePhase.UP and node.power.phase in (Power.ON, Power.LEAVING)
    all_ill = bool(node.gpus) and len(node.gpu_cordons) >= len(node.gpus)
    return shut or away or bool(node.closed_for) or all_ill


def boxes_of(state: State, now: Instant) -> list[Box]:
    """Of all nodes that have GPUs, and of rented ones that will. Of ten thousand few have changed
    since they were looked at last; the others have the box that they had (`kept_rooms.py`)."""
    kept, standbys = state.rooms.boxes, state.indices.standbys
    takers: Takers | None = None
    found = []
    for node_id, live in state.nodes.items():
        box = kept.get(node_id)
        # What most nodes are is said here, too: a call for each of them is most of a look.
        sure = live.attempts or not (live.digests or node_id in standbys)
        if box is None or live.strays or not sure or node_id in state.switching.refused:
            if not has_box(live):
                continue
            takers = takers or power.takers_of(state)
            box = _boxed(state, now, live, takers)
        found.append(box)
    return found


def _box_ahead(state: State, now: Instant, due_ms: int) -> None:
    """Some of those that have changed, for the next plan, which then has few left: all of them, as
    after a restart, are a tenth of a second in which nothing else is decided."""
    for node_id in list(islice(state.rooms.unboxed, AHEAD_MAX)):
        live = state.nodes[node_id]
        if has_box(live) and _lasts(state, live):
            live.used_ms = live.used_ms or max(now.now_ms, due_ms)  # as that plan will have it
            _boxed(state, now, live)
        state.rooms.unboxed.pop(node_id, None)


def _boxed(state: State, now: Instant, live: LiveNode, takers: Takers | None = None) -> Box:
    """Its box, which is kept where it lasts."""
    box, node_id = box_of(state, now, live, takers), live.node.id
    state.rooms.boxes.pop(node_id, None)
    if _lasts(state, live):
        state.rooms.boxes[node_id] = box
        state.rooms.unboxed.pop(node_id, None)
    return box


def _lasts(state: State, live: LiveNode) -> bool:
    """Whether its box is as it was until something touches the node: neither has the time a say in
    it, nor what is elsewhere, as of a copy or of who could take one (`box_of`)."""
    node_id = live.node.id
    if live.strays or node_id in state.switching.refused:
        return False
    return bool(live.attempts) or not (live.digests or node_id in state.indices.standbys)


def has_box(live: LiveNode) -> bool:
    its = live.node.power
    return bool(live.node.gpus or its.gpus) and not is_gone(its)


def box_of(state: State, now: Instant, live: LiveNode, takers: Takers | None = None) -> Box:
    its = live.node.power

    def in_plan_ms(now_ms: int) -> int:
        return plan_time.plan_ms(state.options, now_ms)

    starts_ms, since_ms = power_memory.starts_ms(state, now, live)
    classes = [state.jobs[state.attempts[one].job_id].spec.job_class for one in live.attempts]
    busy = bool(live.attempts or live.strays)
    on = its.phase in (Power.ON, Power.LEAVING)
    return Box(
        live.node.id,
        power.model_of(live.node),
        power.type_of(live.node),
        (len(live.node.gpus) or its.gpus) - len(live.node.gpu_cordons),
        its.phase,
        in_plan_ms(since_ms),
        rentals.source_of(state, live.node),
        held_gpus=sum(gpu.phase is GpuPhase.HELD for gpu in live.gpus.values()) if busy else 0,
        idle_ms=0 if busy or not on else in_plan_ms(live.used_ms),
        guaranteed=JobClass.GUARANTEED in classes,
        uploading=on and not busy and bool(power.why_needed(state, live, takers)),
        closed=is_closed(live),
        starts_ms=tuple(map(in_plan_ms, starts_ms)),
        boot_failures=its.boot_failures,
        refused=power_memory.is_refused(state, now, live),
    )
