"""The fleet as placement sees it: of each node that takes work, what is free and who has the rest.

Problem: nodes report, fall ill, are cordoned and come back, and a decision must see each in one
state. So the live state is read here once for a decision, and what placement gets is values.
"""

from collections.abc import Mapping

from coordinator.core import readings
from coordinator.core.model import CLASS_RANK
from coordinator.core.phases import AttemptPhase, GpuPhase, NodeIntent, NodePhase
from coordinator.core.rooms import Offer, Room, Tenant
from coordinator.core.state import LiveNode, State
from coordinator.core.validate import SLOTS_PER_CPU

# Nodes whose rooms a pass makes anew at most, some 25 ms, if ticks have the time; and in a tick.
CHANGED_MAX = 1_000
AHEAD_MAX = 100


def is_open(live: LiveNode) -> bool:
    return live.phase is NodePhase.UP and live.node.intent is NodeIntent.OPEN


def offers_of(state: State) -> list[Offer]:
    return [offer_of(state, live) for live in state.nodes.values() if is_open(live)]


def open_rooms(state: State, recallable: Mapping[int, None] | None = None) -> list[Room]:
    """What a pass begins with: the same rooms as those of all offers, by name. Its offers are made
    again of nodes alone that have changed. `recallable` are jobs that give way within their class,
    too (`quotas.py`); as before where it is not said."""
    if recallable is not None:
        before, state.rooms.recallable = state.rooms.recallable, recallable
        for job_id in (*before, *recallable):
            if (job_id in before) != (job_id in recallable):
                nodes = [each.node for each in state.attempts_of(job_id)]
                # One that it ran on before may have been forgotten.
                state.rooms.stale |= {name: None for name in nodes if name in state.nodes}
    _renew(state, len(state.rooms.stale))
    return state.rooms.open(state.demand.mix())


def tick(state: State) -> None:
    """Where so many have changed that the next pass would be long, as all have after a restart,
    some of them are seen to before it."""
    if len(state.rooms.stale) > CHANGED_MAX:
        _renew(state, AHEAD_MAX)


def _renew(state: State, count: int) -> None:
    """So many of the rooms whose offers may have changed."""
    for node_id in state.rooms.take_stale(count):
        live = state.nodes[node_id]
        if is_open(live):
            state.rooms.put(offer_of(state, live))
        else:
            state.rooms.drop(node_id)


def offer_of(state: State, live: LiveNode) -> Offer:
    """What the node offers, or would offer if it took work."""
    closed = readings.closed(live)
    open_gpus = {uuid: gpu for uuid, gpu in live.gpus.items() if uuid not in closed}
    strays = [
        uuid
        for uuid, gpu in live.gpus.items()
        if any(holder not in live.attempts for holder in gpu.holders)
    ]
    return Offer(
        live.node.id,
        tuple(gpu.facts for gpu in open_gpus.values() if gpu.phase is not GpuPhase.ABSENT),
        tuple(uuid for uuid, gpu in open_gpus.items() if gpu.phase is GpuPhase.FREE),
        live.node.host.memory_bytes,
        max(1, live.node.host.cpu_count) * SLOTS_PER_CPU,
        tuple(_tenant(state, attempt_id) for attempt_id in live.attempts),
        gangs=live.gangs,
        shares=live.shares,
        strays=tuple(strays),
    )


def _tenant(state: State, attempt_id: str) -> Tenant:
    attempt = state.attempts[attempt_id]
    spec = state.jobs[attempt.job_id].spec
    return Tenant(
        attempt_id,
        CLASS_RANK[spec.job_class],
        attempt.assigned_unix_ms,
        attempt.gpu_uuids,
        spec.memory_bytes,
        attempt.phase is AttemptPhase.STOPPING,
        f"{attempt.job_id}.{attempt.epoch}",
        spec.shared_gpu_memory_bytes,
        lent=attempt.job_id in state.rooms.recallable,
        in_pairs=spec.share_automatic,
    )
