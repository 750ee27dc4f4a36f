"""The GPUs of this node: what happens to them, and when the coordinator hears of it.

Problem: a verdict that changes must be with the coordinator at once and survive a cut; one that
does not change, though a thousand errors say so, must cost nothing. So verdicts are compared with
what was told last: another verdict, reason or code is told at once, as an event that waits in the
spool until it is acknowledged; a mere count follows later. A hello tells all of them anew.

`health.py` judges; here stands which attempts are on a GPU, and what was told.
"""

from dataclasses import replace

from agent.core import clean
from agent.core.health import (
    CASES_MAX,
    GpuHealthChanged,
    GpuHistory,
    GpuVerdict,
    Verdict,
    XidTable,
    application_ended,
    driver_loaded,
    is_open,
    judge,
    note_reading,
    note_xid,
)
from agent.core.messages import CloseLink
from agent.core.state import (
    NOTHING_MENDED,
    SPOOL_MAX,
    Instant,
    PutGpusMended,
    State,
    sentence,
)
from agent.core.values import GpuFacts, GpuSample, Sample, XidSeen

COUNT_MS = 5_000  # how often a storm is told of whose verdict stays
NO_MORE = "the driver has it no longer"
STRANGERS_MAX = 64  # bus ids of GPUs that are not ours, each said once


def opened(state: State) -> None:
    """These are the GPUs; nothing is known of them yet, but what was over before."""
    before, state.gpus_mended = state.gpus_mended, NOTHING_MENDED
    if before.boot_id and state.host is not None and before.boot_id == state.host.boot_id:
        state.watched.mended = dict(before.mended)
    for facts in state.gpus:
        state.watched.histories.setdefault(facts.uuid, GpuHistory())


def verdicts(state: State) -> tuple[GpuVerdict, ...]:
    """Of every GPU that was told of, for a hello."""
    return tuple(
        _judged(uuid, history)
        for uuid, history in state.watched.histories.items()
        if uuid in state.watched.told
    )


def xid_seen(state: State, now: Instant, seen: XidSeen) -> None:
    """The driver has reported an error: of one GPU, or of all instances of one."""
    found = (seen.uuid,) if seen.uuid else _by_bus(state, seen.pci_bus_id)
    known = [uuid for uuid in found if uuid in state.watched.histories]
    if not known:
        _stranger(state, now, seen)
        return
    for uuid in known:
        _note(state, now, uuid, seen)
    if not seen.history:  # what was before us may be over: the first reading tells
        review(state, now)


def _note(state: State, now: Instant, uuid: str, seen: XidSeen) -> None:
    history = state.watched.histories[uuid]
    if seen.sequence is not None:
        history.sequence = max(seen.sequence, history.sequence or 0)
        if seen.history and seen.sequence <= state.watched.mended.get(uuid, -1):
            return  # it was over before we were restarted
    table: XidTable = state.options.xids
    age_ms = seen.age_ms if seen.history else 0
    if note_xid(history, now.now_ms - age_ms, seen, table):
        name = table.rule(seen.code).name
        state.log(
            "warning", "gpu.xid", gpu=uuid, xid=seen.code, count=seen.count, name=name,
            source=seen.source, reason=sentence(seen.text),
        )  # fmt: skip


def loaded(state: State, now: Instant) -> None:
    """The driver was loaded anew."""
    for history in state.watched.histories.values():
        driver_loaded(history)
    for errors in state.watched.strangers.values():
        errors.clear()
    review(state, now)


def sampled(state: State, now: Instant, sample: Sample) -> None:
    _take_facts(state, now, sample)
    used = _used(state)
    for read in (*sample.gpus, *_no_more(state, sample)):
        history = state.watched.histories.get(read.uuid)
        if sample.reading.rate == "off" and not read.error:
            read = replace(read, error="it is not read, by order")
        if history is not None:
            note_reading(history, now.now_ms, read, in_use=read.uuid in used)
    review(state, now)


def _no_more(state: State, sample: Sample) -> list[GpuSample]:
    """Of GPUs that the driver has no longer and a trainer is on: nobody reads them."""
    if sample.facts is None:
        return []
    read = {one.uuid: True for one in sample.gpus} | {one.uuid: True for one in sample.facts}
    histories = state.watched.histories
    return [GpuSample(uuid, error=NO_MORE) for uuid in histories if uuid not in read]


def _take_facts(state: State, now: Instant, sample: Sample) -> None:
    """What a driver has named after the start, what it has no longer, or why there is none. Only a
    hello tells of any of it, so the session begins anew; also once what it said of a GPU less is
    over."""
    if state.host is None:
        return  # the start itself is not over
    before, version = state.host, sample.driver_version or state.host.driver_version
    changed = sample.facts is not None and _take_gpus(state, now, sample.facts)
    if changed and state.connected:
        state.commands.append(CloseLink("which GPUs there are is to be told of"))
    if (before.driver_version, before.gpu_absence) == (version, sample.gpu_absence):
        return
    state.host = replace(before, driver_version=version, gpu_absence=sample.gpu_absence)
    over = before.gpu_absence and not sample.gpu_absence
    if state.connected and not changed and (over or not state.gpus):
        state.commands.append(CloseLink("whether a GPU is missing is to be told of"))


def _take_gpus(state: State, now: Instant, facts: tuple[GpuFacts, ...]) -> bool:
    """Whether they are others. One that a trainer is on stays, whatever the driver says."""
    told = {one.uuid: one for one in facts}
    before = {one.uuid: one for one in state.gpus}
    used = _used(state)
    late = tuple(one for one in facts if one.uuid not in before)
    gone = tuple(uuid for uuid in before if uuid not in told and uuid not in used)
    kept = tuple(told.get(uuid, one) for uuid, one in before.items() if uuid not in gone)
    others = tuple(one.uuid for one in kept if one != before[one.uuid])
    state.gpus = (*kept, *late)
    if late:
        opened(state)
        _hear_again(state, now, late)
        uuids = tuple(one.uuid for one in late)
        clean.begin_idle(state, now, uuids)
        reason = "the driver has named them since the start"
        state.log("info", "gpu.found_late", gpus=uuids, reason=reason)
    if gone:
        state.watched.forget(gone)
        clean.forget(state, gone)
        reason = "they were destroyed, cut into instances, or replaced"
        state.log("info", "gpu.removed", gpus=gone, reason=reason)
    if others:
        reason = "the driver says only now what they are"
        state.log("info", "gpu.found_late", gpus=others, reason=reason)
    return bool(late or gone or others)


def released(state: State, now: Instant) -> None:
    """A trainer has ended; whose GPUs nobody uses have no application that an error could be of."""
    used = _used(state)
    for uuid, history in state.watched.histories.items():
        if uuid not in used:
            application_ended(history)
    review(state, now)


def review(state: State, now: Instant) -> None:
    """Tell what has changed."""
    watched = state.watched
    _note_mended(state)
    if len(state.spool) >= SPOOL_MAX:
        return  # another verdict is that still when there is room to tell of it
    changed: list[GpuVerdict] = []
    counts_due = now.now_ms - watched.told_ms >= COUNT_MS
    for uuid, history in watched.histories.items():
        fresh = _judged(uuid, history)
        before = watched.told.get(uuid, GpuVerdict(uuid, Verdict.UNKNOWN, fresh.reason))
        counted = counts_due and fresh.xids != before.xids
        if not (counted or _differs(fresh, before)):
            continue
        if fresh.verdict is Verdict.UNKNOWN and uuid not in watched.told and not fresh.xids:
            continue  # nothing was read yet, which is what an untold one is
        if fresh.verdict is not before.verdict:
            _log(state, fresh, before)
        elif not _differs(fresh, before):
            total = sum(record.count for record in fresh.xids)
            codes = [record.code for record in fresh.xids]
            state.log("warning", "gpu.xid_storm", gpu=uuid, xids=codes, count=total)
        watched.told[uuid] = fresh
        changed.append(fresh)
    if changed:
        watched.told_ms = now.now_ms
        state.spool_event(now, "", GpuHealthChanged(tuple(changed)))


def _note_mended(state: State) -> None:
    """What is over is remembered, since the kernel's log would tell of it again: by its place in
    the log and no time, as wall clocks jump and the log's own clock drifts from all others."""
    watched = state.watched
    fresh = False
    for uuid, history in watched.histories.items():
        ill = is_open(history)
        if watched.ill.get(uuid) and not ill and history.sequence is not None:
            watched.mended[uuid] = history.sequence
            fresh = True
        watched.ill[uuid] = ill
    if fresh and state.host is not None:
        record = PutGpusMended(state.host.boot_id, tuple(watched.mended.items()))
        state.records.append(record)


def _judged(uuid: str, history: GpuHistory) -> GpuVerdict:
    found = judge(uuid, history)
    records = tuple(replace(record, text=sentence(record.text)) for record in found.xids)
    return replace(found, reason=sentence(found.reason), xids=records)


def _differs(fresh: GpuVerdict, before: GpuVerdict) -> bool:
    """In more than counts and times. Why a driver is silent changes with every second of it."""
    if fresh.verdict is Verdict.UNKNOWN and before.verdict is Verdict.UNKNOWN:
        return _codes(fresh) != _codes(before)
    same = (fresh.verdict, fresh.reason) == (before.verdict, before.reason)
    return not same or _codes(fresh) != _codes(before)


def _codes(verdict: GpuVerdict) -> list[int]:
    return [record.code for record in verdict.xids]


def _log(state: State, fresh: GpuVerdict, before: GpuVerdict) -> None:
    if fresh.verdict is Verdict.LOST:
        state.log("error", "gpu.lost", gpu=fresh.uuid, reason=fresh.reason, action=fresh.action)
    if fresh.verdict is Verdict.HEALTHY:
        state.log("info", "gpu.healthy", gpu=fresh.uuid, before=before.verdict.value)
        return
    state.log(
        "warning", "gpu.verdict", gpu=fresh.uuid, verdict=fresh.verdict.value,
        before=before.verdict.value, reason=fresh.reason, action=fresh.action,
    )  # fmt: skip


def _used(state: State) -> dict[str, None]:
    """GPUs that a trainer of ours is on."""
    return {
        uuid: None
        for live in state.attempts.values()
        if live.live
        for uuid in live.record.gpu_uuids
    }


def _by_bus(state: State, pci_bus_id: str) -> tuple[str, ...]:
    """More than one where a GPU is cut into instances."""
    if not pci_bus_id:
        return ()
    return tuple(facts.uuid for facts in state.gpus if facts.pci_bus_id == pci_bus_id)


def _stranger(state: State, now: Instant, seen: XidSeen) -> None:
    """It may be one that the driver is yet to name; else it is said once."""
    known, strangers = seen.uuid or seen.pci_bus_id, state.watched.strangers
    if known not in strangers:
        if len(strangers) >= STRANGERS_MAX:
            return
        strangers[known] = {}
        reason = f"{known} is no GPU that jobs may use here"
        state.log("info", "gpu.xid_elsewhere", xid=seen.code, source=seen.source, reason=reason)
    if seen.code in strangers[known] or len(strangers[known]) < CASES_MAX:
        strangers[known][seen.code] = now.now_ms, seen


def _hear_again(state: State, now: Instant, late: tuple[GpuFacts, ...]) -> None:
    """What was told of these before they were known."""
    strangers = state.watched.strangers
    for facts in late:
        errors = strangers.get(facts.uuid, {}) | strangers.get(facts.pci_bus_id, {})
        for told_ms, seen in errors.values():
            age_ms = seen.age_ms + now.now_ms - told_ms
            _note(state, now, facts.uuid, replace(seen, history=True, age_ms=age_ms))
    for facts in late:
        strangers.pop(facts.uuid, None)
        strangers.pop(facts.pci_bus_id, None)
