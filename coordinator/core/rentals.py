"""Nodes that are rented by the hour in the live coordinator: whose names they get, what they cost,
and when they are of no use any more.

Problem: a plan rents so and so many GPUs of a type, and makes up names for them; a bill goes on
until a machine is really gone, whatever becomes of the coordinator meanwhile; and a rented machine
that has died is paid for like any other. Whoever forgets one finds it on the bill.

How:
1. The names that rented nodes may have are configured. A name is free while nothing of it is there:
   it has no record, or one that says so. The plan gets as many nodes as there are free names, none
   for `AGAIN_MS` after one did not come, and its own names are replaced by these (`named`).
2. A node's record says since when it is paid for (`Rent`), and keeps a day of that. So what was
   spent is known after a restart, whoever made the plan before (`remembered`).
3. Only those who wait, who would fit on a rented node, and who do not say that they can wait longer
   (`flexible.py`) are a reason to rent (`outlooks`).
4. A rented node that is lost for as long as a boot may take, or that its health has emptied, is
   given back, unless something lies only there (`look`). An ill one whose provider refuses stays
   closed, and is given back again when some time has passed.
5. An own node with such a name is nobody's to delete, and a rented one whose name is not configured
   any more cannot be deleted from here. Both are said once, and left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coordinator.core import flexible, plan_time, power, power_memory
from coordinator.core.bursts import MS_PER_H, Burst, ranks_nodes
from coordinator.core.capacity_model import Outlook, Power, Source
from coordinator.core.capacity_orders import Verb
from coordinator.core.gpu_types import facts_of
from coordinator.core.live import LiveNode
from coordinator.core.model import HostFacts, JobSpec, Node
from coordinator.core.node_power import DAY_MS, NodePower, is_gone
from coordinator.core.phases import NodeIntent, NodePhase
from coordinator.core.scaling import Action, Memory, Plan, Rules
from coordinator.core.state import Instant, State
from coordinator.core.validate import could_hold

# A provider that has none now, or an image that does not start, is asked again after so long.
AGAIN_MS = 600_000
# Where nobody knows when a node frees, or it is not within a week, it is taken for as long.
FREES_MS_MAX = 7 * DAY_MS


def source_of(state: State, node: Node) -> Source:
    """As a plan may treat it. What nobody here can give back, or switch off, it takes as leased."""
    names = state.options.scaling.names
    is_named = bool(names) and any(node.id in each for each in names.values())
    if node.power.source is Source.BURST:
        return Source.BURST if is_named else Source.LEASED
    return Source.LEASED if is_named else node.power.source


def free_names(state: State, now: Instant, gpu_type: str) -> list[str]:
    """That the next rented nodes of the type may have: who was never there, and then who is gone
    for the longest time."""
    failed_ms = state.switching.unrented_ms.get(gpu_type)
    if failed_ms is not None and now.now_ms - failed_ms < AGAIN_MS:
        return []
    found = []
    for place, name in enumerate(state.options.scaling.names.get(gpu_type, ())):
        live = state.nodes.get(name)
        if live is None:
            found.append((0, place, name))
        elif is_gone(live.node.power) and live.node.power.ours:
            found.append((live.node.power.since_unix_ms, place, name))
    return [name for _, _, name in sorted(found)]


def with_names(state: State, now: Instant, rules: Rules) -> Rules:
    """No more is rented than there are names."""
    bursts = {
        gpu_type: replace(burst, nodes_max=len(free_names(state, now, gpu_type)))
        for gpu_type, burst in rules.bursts.items()
    }
    return replace(rules, bursts=bursts)


def named(state: State, now: Instant, plan: Plan) -> Plan:
    """The plan with names of this fleet. A type is planned once, so no name is given twice."""

    def with_name(action: Action) -> Action:
        if action.verb is not Verb.CREATE:
            return action
        free = free_names(state, now, action.gpu_type)
        return replace(action, nodes=tuple(free[: len(action.nodes)]))

    return replace(
        plan,
        actions=tuple(map(with_name, plan.actions)),
        proposed=tuple(map(with_name, plan.proposed)),
    )


def rent(state: State, now: Instant, name: str, why: str) -> bool:
    """Order a node of that name, if it may still be one."""
    scaling = state.options.scaling
    types = [gpu_type for gpu_type, names in scaling.names.items() if name in names]
    if not types or name not in free_names(state, now, types[0]):
        return False
    burst = scaling.rules.bursts[types[0]]
    live = state.nodes.get(name)
    if live is None:
        node = Node(name, "", "", HostFacts(), (), intent=NodeIntent.CORDONED)
        live = state.nodes[name] = LiveNode(node, NodePhase.LOST, 0)
    its = live.node.power if is_gone(live.node.power) else NodePower(phase=Power.OFF)
    its = replace(its, ours=True, source=Source.BURST, gpu_type=types[0], gpus=burst.gpus_per_node)
    state.put_node(replace(live.node, power=its))
    power.start(state, now, live, why)
    return True


def remembered(state: State, now: Instant, memory: Memory) -> Memory:
    """With what was really spent in the last day, until the plan before this one."""
    if not state.options.scaling.rules.bursts:
        return memory
    plan_ms = plan_time.plan_ms(state.options, now.now_ms)
    past_ms = 0 if memory.at_ms is None else plan_ms - memory.at_ms
    past_ms = plan_time.wall_ms(state.options, past_ms)
    usd = sum(spent_usd(state, live.node.power, now, past_ms) for live in state.nodes.values())
    return replace(memory, spent_usd=((plan_ms // MS_PER_H, usd),))


def spent_usd(state: State, its: NodePower, now: Instant, past_ms: int) -> float:
    """On this node within a day. One that was given back sooner is paid for its shortest time."""
    burst = state.options.scaling.rules.bursts.get(its.gpu_type)
    shortest_ms = 0 if burst is None else round(burst.hours_min * MS_PER_H)
    usd = 0.0
    for each in its.rents:
        end_ms = now.unix_ms - past_ms
        if each.end_unix_ms is not None:
            end_ms = max(each.end_unix_ms, each.begin_unix_ms + shortest_ms)
        begin_ms = max(each.begin_unix_ms, now.unix_ms - DAY_MS)
        usd += each.usd_per_h * max(0, end_ms - begin_ms) / MS_PER_H
    return usd


def outlooks(state: State, now: Instant, found: Sequence[Outlook]) -> list[Outlook]:
    """With how many of those that wait may be a reason to rent, where anything can be rented."""
    bursts = state.options.scaling.rules.bursts
    waiting = dict.fromkeys(bursts, 0)
    gangs: dict[str, list[int]] = {gpu_type: [] for gpu_type in bursts}
    # Of ten thousand that wait, most ask for the same.
    taken_by: dict[tuple[object, ...], dict[str, int]] = {}
    for job_id in state.queued if bursts else ():
        job = state.jobs[job_id]
        spec = job.spec
        if not spec.gpus or flexible.left_ms(job, now.unix_ms):
            continue
        asks = (spec.gpus, spec.ranks, spec.gpu_types, spec.gpu_memory_bytes_min)
        key = (*asks, spec.shared_gpu_memory_bytes)
        if key not in taken_by:
            taken_by[key] = _nodes_of(spec, bursts)
        for gpu_type, nodes in taken_by[key].items():
            waiting[gpu_type] += spec.gpus * spec.ranks
            gangs[gpu_type] += [nodes] if nodes > 1 else []
    return [
        replace(
            each,
            rentable_gpus=waiting[each.gpu_type],
            rentable_gangs=tuple(gangs[each.gpu_type]),
            frees_ms=FREES_MS_MAX if each.frees_ms is None else each.frees_ms,
        )
        if each.gpu_type in waiting
        else each
        for each in found
    ]


def _nodes_of(spec: JobSpec, bursts: Mapping[str, Burst]) -> dict[str, int]:
    """How many rented nodes it takes, by type of those that can hold it. What memory their hosts
    have is not known."""
    return {
        gpu_type: ranks_nodes(spec.ranks, spec.gpus, burst)
        for gpu_type, burst in bursts.items()
        if could_hold(spec, facts_of(gpu_type, burst.gpus_per_node), spec.memory_bytes)
    }


def look(state: State, now: Instant) -> None:
    """What is rented and of no use is given back; what is nobody's here is said."""
    named, owned = bool(state.options.scaling.names), Source.OWNED
    for live in list(state.nodes.values()):
        if live.node.power.source is owned and not named:
            continue  # of ten thousand, each minute
        source = source_of(state, live.node)
        if source is Source.BURST:
            why = _why_useless(state, now, live)
            if why and not power.why_needed(state, live):
                power.give_back(state, now, live, why)
        elif source is not live.node.power.source and not is_gone(live.node.power):
            _say_unmanaged(state, live, rented=live.node.power.source is Source.BURST)


def _why_useless(state: State, now: Instant, live: LiveNode) -> str:
    """Of one that should be at work; empty where it may be."""
    if live.node.power.phase is not Power.ON:
        return ""
    heard_ms = max(live.heard_ms, live.deadline_ms)
    if live.phase is NodePhase.LOST:
        gone = now.now_ms - heard_ms >= state.options.power.boot_deadline_ms
        return f"it is lost, and paid for: {live.note}" if gone else ""
    ill = bool(live.node.closed_for) and live.node.intent is NodeIntent.DRAINED
    ill = ill and not power_memory.is_refused(state, now, live)
    return f"it is rented and ill: {live.node.closed_for}" if ill else ""


def _say_unmanaged(state: State, live: LiveNode, *, rented: bool) -> None:
    if live.node.id in state.switching.unmanaged:
        return
    state.switching.unmanaged[live.node.id] = None
    reason = "it is an own node with the name of a rented one, and is never given back"
    if rented:
        reason = "it is rented, and no group of 'capacity' has it any more: nobody can give it back"
    state.log("error", "node.unmanaged", node=live.node.id, reason=reason)
