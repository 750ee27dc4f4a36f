"""Nodes are emptied, switched off, and switched on again; and what is believed of them meanwhile.

Problem: a driver of power may hang, lie, or do a thing twice, and the coordinator may die between
the decision and the order. Whoever believes the driver loses jobs; whoever orders from memory
orders twice, or never.

How:
1. A node goes `on` -> `leaving` (closed to new work, then drained by handoff) -> `stopping` ->
   `off` -> `starting` -> `on`. The phase is durable before anything is ordered, and the order is
   made of the phase: its key is the node and its count of changes. So a successor makes the same
   order again, and one key is one deed. No node has two orders under way, and none that is ordered
   off takes work before the driver has spoken.
2. What a driver says hurries things and proves nothing. A node is off when it has fallen silent, on
   when it says hello. One that was ordered off and is heard after the deadline stays on; one that
   does not come up in time is tried again, and after that left to a person (`failed`).
3. Nothing is switched off that somebody needs: a node with an attempt, a stray, or a checkpoint
   that lies nowhere else in reach, or the last one that could take others' copies (`why_needed`).
4. Silence on purpose is no alarm, and no death (`node_power.silent`).
5. A rented node is created and deleted instead. What may be there costs money: one that did not
   come in time is deleted, never created twice, and only whom its driver has seen gone is `off`;
   then it is a name alone (`rentals.py`).
6. What we have closed is ours to open (`ours`), unless its health has closed it, which opens it
   when it is well. What a person says of the node makes it his; what a person has closed is never
   touched here, and a node that he switches on is on.

How long a boot takes is learnt for each model of node (`boot_times.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from coordinator.core import checkpoints, gpu_types, health, node_power, nodes, parts, power_memory
from coordinator.core.boot_times import BootTimes
from coordinator.core.capacity_messages import Actuate, Actuated
from coordinator.core.capacity_model import Power, Source
from coordinator.core.capacity_orders import CapacityOrder, Verb
from coordinator.core.live import Given
from coordinator.core.messages import Refusal, RefusalKind
from coordinator.core.model import (
    SHARED,
    Checkpoint,
    HostFacts,
    Job,
    Node,
    Part,
    Replication,
    WaitingPart,
)
from coordinator.core.node_power import (
    BOOTS_MAX,
    DARK,
    POSTPONED_MAX,
    STARTS_MAX,
    NodePower,
    Rent,
    minutes,
)
from coordinator.core.phases import JOB_ENDED, POWER_TRANSITIONS, NodeIntent, NodePhase, advance
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, LiveNode, State, cut

_VERBS = {Power.STOPPING: Verb.SUSPEND, Power.STARTING: Verb.RESUME}
_VERBS_RENTED = {Power.STOPPING: Verb.DELETE, Power.STARTING: Verb.CREATE}


def leave(state: State, now: Instant, live: LiveNode, why: str) -> None:
    """Close it to new work, so that it empties and can go. Only of a node that is on and open."""
    assert live.node.intent is NodeIntent.OPEN, "what is closed is somebody's"
    _change(state, now, live, Power.LEAVING, why, ours=True)
    nodes.set_intent(state, now, live, NodeIntent.CORDONED)


def go(state: State, now: Instant, live: LiveNode, why: str) -> None:
    """Off with it, as soon as it is empty: what is there is handed off. Of one that is on and open,
    or has been closed for this."""
    if live.node.power.phase is Power.ON:
        leave(state, now, live, why)
    assert live.node.power.ours, "what a person has closed is a person's"
    _note(state, live, replace(live.node.power, reason=why))
    nodes.set_intent(state, now, live, NodeIntent.DRAINING, f"{live.node.id} is emptied: {why}")
    _leaving(state, now, live)


def stay(state: State, now: Instant, live: LiveNode, why: str) -> None:
    """It was to go, and does not."""
    _change(state, now, live, Power.ON, why, ours=False)
    nodes.set_intent(state, now, live, NodeIntent.OPEN)
    health.react(state, now, live)


def start(state: State, now: Instant, live: LiveNode, why: str) -> None:
    """Of a node that is off, or did not come up before; of one that is gone it is the order to rent
    it, and it is paid for from now on."""
    power = live.node.power
    starts = (*power.starts_unix_ms, now.unix_ms)[-STARTS_MAX:]
    _change(
        state, now, live, Power.STARTING, why,
        starts_unix_ms=starts, boot_failures=0, rents=_rented(state, now, live),
    )  # fmt: skip
    _given(state, now, live, fresh=True)


def give_back(state: State, now: Instant, live: LiveNode, why: str) -> None:
    """A rented node that is of no use to anybody any more, or of which that is not known."""
    assert live.node.power.source is Source.BURST, "an own node is kept"
    if live.node.power.phase is Power.ON:
        _change(state, now, live, Power.LEAVING, why, ours=True)
    state.switching.postponed.pop(live.node.id, None)  # of the order to rent it
    _change(state, now, live, Power.STOPPING, why, ours=True, boot_failures=0)
    if live.node.intent is NodeIntent.OPEN:  # it may still come, and takes nothing any more
        nodes.set_intent(state, now, live, NodeIntent.CORDONED)
    _given(state, now, live, fresh=True)
    checkpoints.retarget(state)


def person_says(
    state: State, now: Instant, live: LiveNode, intent: NodeIntent
) -> Refusal | NodeIntent | None:
    """From here on the node is as a person wants it. Returns the intent that is left to be set;
    `None`: none, it opens when it is back."""
    power, name = live.node.power, live.node.id
    if power.phase is Power.ON:
        return intent
    if power.phase is Power.LEAVING:
        _change(state, now, live, Power.ON, "a person has spoken", ours=False)
        return intent
    if intent is not NodeIntent.OPEN:
        _note(state, live, replace(power, ours=False))
        return intent
    if power.phase is Power.STOPPING:
        left_ms = power_memory.stopping_ms_max(state, now, live)
        at_most = "" if left_ms is None else f", and closed for that for {minutes(left_ms)} at most"
        then = f"once it is off, `baton uncordon {name}` starts it"
        sentence = f"{name} is being switched off{at_most}; {then}"
        return Refusal(RefusalKind.WRONG_PHASE, sentence)
    if power.phase is not Power.STARTING and not state.options.power.acts:
        sentence = f"{name} is off, and nobody here can switch it on: no driver is configured"
        return Refusal(RefusalKind.WRONG_PHASE, sentence)
    if power.source is Source.BURST and power.phase is Power.OFF:
        sentence = f"{name} is not rented; the plan rents, and `baton scale approve` agrees to it"
        return Refusal(RefusalKind.WRONG_PHASE, sentence)
    if power.source is Source.BURST and (only := _only_copy(state, live)):
        sentence = f"{only}; `baton requeue --abandon` gives it up, for its job"
        return Refusal(RefusalKind.WRONG_PHASE, sentence)
    _note(state, live, replace(power, ours=True))
    if power.source is Source.BURST and power.phase is Power.FAILED:
        give_back(state, now, live, "a person wants to know that it is gone")
    elif power.phase is not Power.STARTING:
        start(state, now, live, "a person wants it")
    return None


# --- what happens ---------------------------------------------------------------------------------


def hello(state: State, now: Instant, live: LiveNode) -> None:
    """It speaks. If it had no power, it has: whoever gave it."""
    power = live.node.power
    if power.phase not in DARK:
        return
    given = state.switching.given.get(live.node.id)
    boots_ms, starts = power.boots_ms, power.starts_unix_ms
    why = "it was started"
    if power.phase is not Power.STARTING:
        why = "it was switched on by somebody else, or never off"
        starts = (*starts, now.unix_ms)[-STARTS_MAX:]
    elif given is not None and not given.again:
        boots_ms = (*boots_ms, max(0, now.now_ms - given.at_ms))[-BOOTS_MAX:]
        state.switching.boots = None
    _change(
        state, now, live, Power.ON, why,
        ours=False, boots_ms=boots_ms, starts_unix_ms=starts, boot_failures=0,
        rents=_rented(state, now, live),
    )  # fmt: skip
    if power.ours and not live.node.closed_for:
        nodes.set_intent(state, now, live, NodeIntent.OPEN)


def actuated(state: State, now: Instant, event: Actuated) -> None:
    """A driver has spoken. Of an order that is over already it says nothing that counts."""
    outcome = event.outcome
    live, given = state.nodes.get(outcome.node), state.switching.given.get(outcome.node)
    if live is None or given is None or given.key != outcome.key or given.done is not None:
        return
    given.done, given.answered_ms, given.reason = outcome.done, now.now_ms, cut(outcome.reason)
    given.postponed = outcome.postponed
    if power_memory.note_answer(state, live, postponed=outcome.postponed) and not outcome.done:
        state.log(
            "warning", "node.power_failed", node=live.node.id,
            power=live.node.power.phase.value, reason=given.reason,
        )  # fmt: skip
    _step(state, now, live)


def tick(state: State, now: Instant) -> None:
    for node_id in list(state.indices.switched):
        _step(state, now, state.nodes[node_id])


def _step(state: State, now: Instant, live: LiveNode) -> None:
    match live.node.power.phase:
        case Power.LEAVING:
            _leaving(state, now, live)
        case Power.STOPPING:
            _stopping(state, now, live)
        case Power.STARTING:
            _starting(state, now, live)
        case _:
            pass


def _leaving(state: State, now: Instant, live: LiveNode) -> None:
    if live.phase is NodePhase.LOST:
        stay(state, now, live, "it was lost before it was empty")
    elif live.node.intent is NodeIntent.DRAINED and not why_needed(state, live):
        _change(state, now, live, Power.STOPPING, live.node.power.reason)
        _given(state, now, live, fresh=True)
        checkpoints.retarget(state)


def _stopping(state: State, now: Instant, live: LiveNode) -> None:
    given, options = _given(state, now, live), state.options
    since_ms = now.now_ms - given.at_ms
    late = since_ms >= options.power.stop_deadline_ms
    # What the driver has not answered yet it may still do; so who is silent only for us is not off.
    over = given.done is not None or since_ms >= options.power.unanswered_ms
    if live.phase is NodePhase.LOST and over and live.node.power.source is Source.BURST:
        _given_back(state, now, live, given)
    elif live.phase is NodePhase.LOST and over:
        _change(state, now, live, Power.OFF, live.node.power.reason)
    elif live.phase is NodePhase.UP and over:
        # It may say no and go down all the same, a little later.
        settled = given.done is None or now.now_ms - given.answered_ms >= options.lease_ms
        if settled and (late or not given.done):
            _stays_on(state, now, live, given)


def _given_back(state: State, now: Instant, live: LiveNode, given: Given) -> None:
    """It is silent. Only its driver can tell whether it is still paid for."""
    options, name = state.options.power, live.node.id
    if given.done:
        _is_gone(state, now, live)
        return
    since_ms = _since_ms(now, given)
    why = given.reason or f"nobody said within {since_ms // 1000} s that it is gone"
    # Who had the others may have been lost since it was ordered the first time.
    only = _only_copy(state, live) if live.digests else ""
    if only and since_ms < options.unanswered_ms:
        return
    why = only or why
    if only or _order_again(state, now, live, given, why):
        reason = f"{why}; it may still be paid for, `baton uncordon {name}` has it deleted again"
        _change(state, now, live, Power.FAILED, reason, boot_failures=_tries(live, given))
        state.log("error", "node.rent_failed", node=name, reason=reason)


def _order_again(state: State, now: Instant, live: LiveNode, given: Given, why: str) -> bool:
    """What has come to nothing is ordered once more when its time has come; whether it has been
    often enough. An order that had no turn says nothing of the node, and is counted by itself."""
    options, name = state.options.power, live.node.id
    tries, put_off = _tries(live, given), state.switching.postponed.get(name, 0)
    if tries > options.boot_retries or put_off > POSTPONED_MAX:
        return True
    if _since_ms(now, given) >= power_memory.retry_ms(state, name):
        nth = f"put off {put_off} times" if put_off else f"try {tries + 1}"
        reason = f"{why}; {nth} of {POSTPONED_MAX if put_off else options.boot_retries + 1}"
        _change(state, now, live, live.node.power.phase, reason, boot_failures=tries)
        _given(state, now, live, fresh=True)
    return False


def _tries(live: LiveNode, given: Given) -> int:
    return live.node.power.boot_failures + (not given.postponed)


def _since_ms(now: Instant, given: Given) -> int:
    return now.now_ms - (given.at_ms if given.done is None else given.answered_ms)


def _is_gone(state: State, now: Instant, live: LiveNode) -> None:
    """There is no such machine any more, nor what lay there: a name is left."""
    power, name = live.node.power, live.node.id
    rents = [replace(each, end_unix_ms=each.end_unix_ms or now.unix_ms) for each in power.rents]
    _change(state, now, live, Power.OFF, power.reason, boot_failures=0, rents=tuple(rents))
    job_ids = state.indices.jobs_of(live.digests)
    checkpoints.reconcile_copies(state, name, {}, job_ids)
    parts.reconcile(state, name, {}, job_ids)
    fresh = Node(name, "", "", HostFacts(), (), intent=live.node.intent, power=live.node.power)
    live.gpus, live.telemetry, live.used_ms = {}, None, 0
    state.put_node(fresh)
    state.rooms.touch(name)


def _rented(state: State, now: Instant, live: LiveNode) -> tuple[Rent, ...]:
    power = live.node.power
    burst = state.options.scaling.rules.bursts.get(power.gpu_type)
    usd_per_h = None if burst is None else burst.usd_per_gpu_h * power.gpus
    return node_power.rents_from(power, now.unix_ms, usd_per_h)


def _stays_on(state: State, now: Instant, live: LiveNode, given: Given) -> None:
    waited_s = (now.now_ms - given.at_ms) // 1000
    why = given.reason or f"it is heard {waited_s} s after it was ordered off"
    state.log(
        "warning", "node.power_failed", node=live.node.id, power=Power.STOPPING.value, reason=why
    )
    ours = live.node.power.ours
    if not given.postponed:
        power_memory.note_refused(state, now, live)
    _change(state, now, live, Power.ON, why, ours=False)
    if ours:
        if not live.node.closed_for:
            nodes.set_intent(state, now, live, NodeIntent.OPEN)
        health.react(state, now, live)


def _starting(state: State, now: Instant, live: LiveNode) -> None:
    given, options = _given(state, now, live), state.options.power
    since_ms = now.now_ms - given.at_ms
    late = since_ms >= options.boot_deadline_ms
    if given.done is not False and not late:
        return
    why = given.reason if given.done is False else ""
    why = why or f"it did not say hello within {options.boot_deadline_ms // 1000} s"
    if live.node.power.source is Source.BURST:
        state.log(
            "warning", "node.power_failed", node=live.node.id, power=Power.STARTING.value,
            reason=why,
        )  # fmt: skip
        state.switching.unrented_ms[live.node.power.gpu_type] = now.now_ms
        give_back(state, now, live, f"{why}; what there may be of it is deleted")
        return
    if _order_again(state, now, live, given, why):
        tries = _tries(live, given)
        count = f"tried {quantity(tries, 'time')}" if tries else "never begun"
        reason = f"{why}; {count}, `baton uncordon {live.node.id}` tries again"
        _change(state, now, live, Power.FAILED, reason, boot_failures=tries)
        state.log("error", "node.boot_failed", node=live.node.id, reason=reason)


# --- orders ---------------------------------------------------------------------------------------


def _given(state: State, now: Instant, live: LiveNode, *, fresh: bool = False) -> Given:
    """The order that the node's phase calls for, given if this process has not yet. `fresh`: the
    phase is of this very moment."""
    node_id, power = live.node.id, live.node.power
    given = state.switching.given.get(node_id)
    if given is None:
        key = f"{node_id}.{power.changes}"
        given = state.switching.given[node_id] = Given(key, now.now_ms, again=not fresh)
        if state.options.power.acts:
            gpu_type = live.node.gpus[0].name if live.node.gpus else power.gpu_type
            verbs = _VERBS_RENTED if power.source is Source.BURST else _VERBS
            order = CapacityOrder(key, verbs[power.phase], (node_id,), gpu_type)
            state.commands.append(Actuate(order))
    return given


def _change(
    state: State, now: Instant, live: LiveNode, phase: Power, reason: str, **changes: Any
) -> None:
    power = live.node.power
    advance(POWER_TRANSITIONS, power.phase, phase, f"the power of {live.node.id}")
    changed = replace(
        power, phase=phase, reason=reason, changes=power.changes + 1,
        since_unix_ms=now.unix_ms, **changes,
    )  # fmt: skip
    state.switching.given.pop(live.node.id, None)
    _note(state, live, changed)
    power_memory.note_change(state, now, live)
    state.dirty = True
    state.log("info", "node.power", node=live.node.id, power=phase.value, reason=reason)


def _note(state: State, live: LiveNode, power: NodePower) -> None:
    if power != live.node.power:
        state.put_node(replace(live.node, power=power))


# --- who is needed --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Takers:
    """Who takes copies, as far as it matters: the first three of the nodes that are on, and by node
    the attempts whose copies go there. For many nodes at once; one look at the state is enough."""

    nodes: tuple[str, ...]
    standbys: Mapping[str, Sequence[str]]


def takers_of(state: State) -> Takers:
    found = (
        name
        for name, live in state.nodes.items()
        if live.phase is NodePhase.UP and live.node.power.phase is Power.ON
    )
    standbys: dict[str, list[str]] = {}
    for attempt_id in state.indices.open_attempts:
        attempt = state.attempts[attempt_id]
        if attempt.replica_node:
            standbys.setdefault(attempt.replica_node, []).append(attempt_id)
    return Takers(tuple(islice(found, 3)), standbys)


def why_needed(state: State, live: LiveNode, takers: Takers | None = None) -> str:
    """Why the node may not lose its power even if nothing runs there; empty: it may."""
    if live.attempts or live.strays:
        return "something runs there"
    only = _only_copy(state, live) if live.digests else ""
    if only or live.node.id not in state.indices.standbys:
        return only
    return _last_standby(state, live, takers_of(state) if takers is None else takers)


def _only_copy(state: State, live: LiveNode) -> str:
    for job_id in state.indices.jobs_of(live.digests):
        job = state.jobs.get(job_id)
        if job is None or job.phase in JOB_ENDED:
            continue
        for piece in _wanted(state, job):
            others = [name for name in piece.replicas if name != live.node.id]
            here = len(others) < len(piece.replicas)
            if here and not any(_holds_on(state, name) for name in others):
                return f"a checkpoint of job {job_id} lies nowhere else"
    return ""


def _wanted(state: State, job: Job) -> list[Part | WaitingPart]:
    """What the job goes on with, what its user has pinned, and what is becoming a checkpoint."""
    good = state.good_checkpoints(job)
    kept: list[Checkpoint] = [*good[:1], *(each for each in good[1:] if each.pinned)]
    pieces: list[Part | WaitingPart] = [piece for each in kept for piece in each.pieces]
    return [*pieces, *state.parts.get(job.id, ())]


def _holds_on(state: State, name: str) -> bool:
    """Whether a copy there can be read for as long as it may be wanted. Of two that leave at once
    the first to go is dark for the other."""
    if name == SHARED:
        return True
    live = state.nodes.get(name)
    there = live is not None and live.phase is not NodePhase.LOST
    return there and live is not None and live.node.power.phase in (Power.ON, Power.LEAVING)


def _last_standby(state: State, live: LiveNode, takers: Takers) -> str:
    """A job whose copies go there, and could go to no other node."""
    its = takers.standbys.get(live.node.id, ())
    others = [name for name in takers.nodes if its and name != live.node.id]
    if len(others) > 1:
        return ""  # whoever runs on one of them has the other
    for attempt_id in its:
        attempt = state.attempts[attempt_id]
        replicates = state.jobs[attempt.job_id].spec.replication is not Replication.NONE
        if replicates and others in ([], [attempt.node]):
            return f"it is the only node that can take copies of job {attempt.job_id}"
    return ""


# --- reading --------------------------------------------------------------------------------------


def model_of(node: Node) -> str:
    """What kind of node it is, in words; those of one kind boot alike."""
    if node.power.source is Source.BURST:
        return rented_model(node.power.gpus, node.power.gpu_type)
    gpus = gpu_types.counted(tuple([gpu.name for gpu in node.gpus]))
    return f"{gpus or 'no GPUs'}, {node.host.cpu_count} CPUs"


def rented_model(gpus: int, gpu_type: str) -> str:
    return f"{gpus}x {gpu_type}, rented"


def type_of(node: Node) -> str:
    """Of several types of GPU that of which it has most; empty where it has none."""
    kinds = tuple([(gpu.name, gpu.memory_bytes) for gpu in node.gpus])
    return gpu_types.most_of(kinds) or node.power.gpu_type


def boot_times(state: State) -> BootTimes:
    """What was seen of each model of the fleet, by the nodes that there are."""
    options = state.options.power
    if state.switching.boots is None:
        seen: dict[str, tuple[int, ...]] = {}
        for live in state.nodes.values():
            if live.node.power.boots_ms:
                model = model_of(live.node)
                seen[model] = (*seen.get(model, ()), *live.node.power.boots_ms)
        state.switching.boots = BootTimes(prior_ms=options.boot_guess_ms, seen_ms=seen)
    return state.switching.boots


def boot_ms(state: State, node: Node) -> int:
    """How long it takes from the order until the node is there, at most in 95 of 100 cases."""
    return boot_times(state).of(model_of(node))
