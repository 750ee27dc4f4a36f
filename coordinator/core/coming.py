"""What a waiting job is told of nodes that are being switched on and could take it.

Problem: a start takes minutes, and may fail and be tried again. Who waits wants to know when it is
there, and that it has failed already: "is starting" for half an hour is a lie.
"""

from coordinator.core import gpu_types, power, power_memory
from coordinator.core.capacity_model import Power
from coordinator.core.model import Job, Node
from coordinator.core.node_power import minutes
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, State
from coordinator.core.validate import could_hold


def coming(state: State, now: Instant, job: Job) -> str:
    """Empty: there is none. Of those that start the one that is there first, then one whose start
    has failed and is tried again; where there is neither, one that was given up."""
    found: list[tuple[int, str]] = []
    failing: list[str] = []
    given_up: list[str] = []
    for node_id in state.indices.switched if job.spec.gpus else ():
        node = state.nodes[node_id].node
        if node.power.phase not in (Power.STARTING, Power.FAILED) or not _fits(job, node):
            continue
        if node.power.phase is Power.FAILED:
            given_up.append(f"{node_id} did not start: {node.power.reason}")
        elif fails := failed(state, now, node):
            failing.append(f"the start of {node_id} {fails}")
        else:
            past_ms = max(0, now.unix_ms - node.power.since_unix_ms)
            found.append((power.boot_ms(state, node) - past_ms, node_id))
    said = failing[:1]
    if found:
        left_ms, node_id = min(found)
        others = "is 1" if len(found) == 2 else f"are {len(found) - 1}"
        when = f"is expected within {minutes(left_ms)}" if left_ms > 0 else "is overdue"
        more = f", as {others} more" if len(found) > 1 else ""
        tried = _tried(state.nodes[node_id].node)
        said.insert(0, f"{node_id} is starting{more} and {when}{tried}")
    return "; ".join(said or given_up[:1])


def _fits(job: Job, node: Node) -> bool:
    if not node.gpus and node.power.gpus:  # a rented one has never said hello
        facts = gpu_types.facts_of(node.power.gpu_type, node.power.gpus)
        return could_hold(job.spec, facts, job.spec.memory_bytes)
    return could_hold(job.spec, node.gpus, node.host.memory_bytes)


def _tried(node: Node) -> str:
    """Of one whose start has failed before; the reason says how, and which try this is."""
    count = node.power.boot_failures
    return f" (it has failed {_times(count)}: {node.power.reason})" if count else ""


def failed(state: State, now: Instant, node: Node) -> str:
    """Of a start that has failed and is tried again soon: how, and when; else empty."""
    given, options = state.switching.given.get(node.id), state.options.power
    if node.power.phase is not Power.STARTING or given is None or given.done is not False:
        return ""
    again_ms = given.answered_ms + power_memory.retry_ms(state, node.id)
    left_ms = max(1_000, again_ms - now.now_ms)
    why = given.reason or "its driver does not say why"
    if given.postponed:
        return f"is put off: {why}; it is ordered again within {minutes(left_ms)}"
    times = _times(node.power.boot_failures + 1)
    return (
        f"has failed {times}: {why}; it is tried again within {minutes(left_ms)},"
        f" {quantity(options.boot_retries + 1, 'time')} in all"
    )


def _times(count: int) -> str:
    return "once" if count == 1 else quantity(count, "time")
