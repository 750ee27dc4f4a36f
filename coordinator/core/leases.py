"""When a node's silence means something, without asking ten thousand of them four times a second.

Problem: every heartbeat moves two moments of its node, when it becomes suspect and when it is lost.
Looking through all nodes at every tick costs a core's twentieth at ten thousand; moving a timer at
every heartbeat costs as much. Here a heap holds one entry a node, for the earliest moment at which
there may be something to say. Heartbeats leave it alone. When it comes up and the node has been
heard since, it is put back for the new moment: once every three seconds a node, however often it
is heard (the "lazy" timers of many a network stack; Varghese and Lauck, "Hashed and Hierarchical
Timing Wheels", SOSP 1987, compares such schemes).
"""

from heapq import heapify, heappop, heappush

from coordinator.core.phases import NodePhase
from coordinator.core.state import Instant, LiveNode, State

# Hellos that a busy machine answers for certain, however many are let in; 160 were seen on two busy
# cores (`bench.link`).
HELLOS_PER_S = 100


def resume(state: State) -> None:
    """After our own restart: nobody is lost for standing in line behind thousands of others."""
    line_ms = len(state.nodes) // min(HELLOS_PER_S, state.options.hellos_per_s) * 1_000
    for live in state.nodes.values():
        live.deadline_ms += line_ms
        watch(state, live)


def heard(state: State, now: Instant, live: LiveNode) -> None:
    """The node has spoken: everything it is allowed begins anew."""
    live.heard_ms = now.now_ms
    live.expected_ms = 0
    live.suspect_ms = now.now_ms + state.options.suspect_ms
    live.deadline_ms = now.now_ms + state.options.lease_ms


def expect(live: LiveNode, until_ms: int) -> None:
    """It stands in line: until then its silence is our own wish."""
    live.expected_ms = until_ms
    if live.phase is not NodePhase.LOST:
        live.deadline_ms = max(live.deadline_ms, until_ms)


def closed(state: State, now: Instant, live: LiveNode) -> None:
    """A connection of the node has closed: it has a moment to come again, unless it has done so
    already and stands in line."""
    if live.node.id not in state.admission.line:
        live.expected_ms = 0
    if live.phase is not NodePhase.LOST:
        grace_ms = now.now_ms + state.options.closed_grace_ms
        live.deadline_ms = max(live.expected_ms, min(live.deadline_ms, grace_ms))
        watch(state, live)


def watch(state: State, live: LiveNode) -> None:
    """See to it that a tick looks at the node when its silence next means something. One that is
    looked at sooner is watched again then, so a heartbeat costs no entry in the heap."""
    up = live.phase is NodePhase.UP and live.session is not None
    due_ms = min(live.suspect_ms, live.deadline_ms) if up else live.deadline_ms
    if live.watched_ms is None or due_ms < live.watched_ms:
        live.watched_ms = due_ms
        heappush(state.watched, (due_ms, live.node.id))


def put_off(state: State, gap_ms: int) -> None:
    """We were away ourselves so long; nobody is blamed for that time."""
    state.watched = []
    for live in state.nodes.values():
        live.watched_ms = None
        if live.phase is not NodePhase.LOST:
            live.deadline_ms += gap_ms
            live.suspect_ms += gap_ms
            live.watched_ms = live.deadline_ms
            state.watched.append((live.deadline_ms, live.node.id))
    heapify(state.watched)
    for live in state.nodes.values():
        if live.phase is NodePhase.UP:
            watch(state, live)


def due(state: State, now: Instant) -> list[LiveNode]:
    """Nodes to look at now, in the order of their moments. Each has to be watched again, unless it
    is lost."""
    found = []
    while state.watched and state.watched[0][0] <= now.now_ms:
        due_ms, node_id = heappop(state.watched)
        live = state.nodes.get(node_id)
        # Else it has been forgotten, or a sooner entry has taken its place.
        if live is not None and live.watched_ms == due_ms:
            live.watched_ms = None
            found.append(live)
    return found
