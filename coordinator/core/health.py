"""What follows from a verdict on a GPU: it is cordoned, its jobs go on elsewhere, and that is said.

Problem: a GPU that needs a reset fails every job that it is given, and takes the next one at once,
since it is free. But a monitor that is wrong, or a bad driver that a roll-out brought to every
node, would close a whole fleet in a minute. And who closes something must know when to open it
again, without opening what a person has closed.

How:
1. A GPU that needs a reset or is lost gets no new work, and its jobs are asked to save and leave,
   as for a drain; the other GPUs of its node go on. Where the node has to be rebooted, all of it is
   drained. A degraded GPU is closed only where the operator's policy says so.
2. The fleet's circuit breaker: within `cordon_window_ms` no more than `cordon_percent` of the
   fleet's GPUs are closed, at least one. Beyond that it is reported and nothing else, in a sentence
   that `baton nodes` shows, and tried again when the window has moved on.
3. What we have closed is opened when its verdict is well again, never for an unknown one. What a
   person says of a node stands: after `baton uncordon` a GPU with the same trouble stays open
   until it has been well once.

Resets and reboots are a person's. All of it is level-triggered: `react` compares what is with what
should be, so that saying a verdict twice is saying it once. When a cordon was made counts from our
own start where that was later, which errs to the side of closing less.
"""

from dataclasses import replace

from coordinator.core import attempts, nodes, readings
from coordinator.core.capacity_model import Power
from coordinator.core.model import GpuCordon, GpuHealth, GpuVerdict
from coordinator.core.phases import NodeIntent
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, LiveNode, State, cut

V = GpuVerdict
NODES_CLOSING = (V.NEEDS_REBOOT,)
GPUS_CLOSING = (V.NEEDS_RESET, V.LOST)


def resume(state: State, now_ms: int) -> None:
    """After a start: nobody knows how long ago the cordons were made."""
    closed = sum(_closed_count(live) for live in state.nodes.values())
    if closed:
        state.cordons_ms.append((now_ms, closed))


def reported(state: State, now: Instant, live: LiveNode, gpus: tuple[GpuHealth, ...]) -> None:
    """A node's agent has judged some of its GPUs."""
    known = {said.uuid: said for said in live.node.health}
    own = {gpu.uuid: True for gpu in live.node.gpus}
    for said in (said for said in gpus if said.uuid in own):
        before = known.get(said.uuid)
        known[said.uuid] = said
        if before is None or before.verdict is not said.verdict:
            _log(state, live, said)
    listed = [known[gpu.uuid] for gpu in live.node.gpus if gpu.uuid in known]
    # A GPU that is there no longer, replaced say, can never be well again, nor be opened.
    cordons = tuple(cordon for cordon in live.node.gpu_cordons if cordon.uuid in own)
    for uuid in known:
        if uuid not in own:
            state.held_back.pop(uuid, None)
    node = replace(live.node, health=tuple(listed), gpu_cordons=cordons)
    if node != live.node:
        state.put_node(node)
    react(state, now, live)


def _log(state: State, live: LiveNode, said: GpuHealth) -> None:
    if said.verdict is V.HEALTHY:
        state.log("info", "gpu.healthy", node=live.node.id, gpu=said.uuid)
        return
    state.log(
        "warning", "gpu.verdict", node=live.node.id, gpu=said.uuid, verdict=said.verdict.value,
        reason=cut(said.reason),
    )  # fmt: skip


def tick(state: State, now: Instant) -> None:
    """The window moves on: what was held back is looked at again."""
    for live in state.nodes.values() if state.held_back else ():
        if any(said.uuid in state.held_back for said in live.node.health):
            react(state, now, live)


def react(state: State, now: Instant, live: LiveNode) -> None:
    """Close what should be closed and is not, and open what we have closed and is well."""
    if not state.options.cordons_gpus:
        return
    for said in live.node.health:
        _react_to_gpu(state, now, live, said)
    _react_to_node(state, now, live)


def _react_to_gpu(state: State, now: Instant, live: LiveNode, said: GpuHealth) -> None:
    closed = any(cordon.uuid == said.uuid for cordon in live.node.gpu_cordons)
    if _is_well(state, said):
        state.held_back.pop(said.uuid, None)
        if said.uuid in live.node.waived:
            waived = tuple(uuid for uuid in live.node.waived if uuid != said.uuid)
            state.put_node(replace(live.node, waived=waived))
        if closed:
            _open_gpu(state, live, said.uuid)
            state.log("info", "gpu.uncordoned", node=live.node.id, gpu=said.uuid)
        return
    if not _closes_gpu(state, said) or closed or said.uuid in live.node.waived:
        if said.verdict not in NODES_CLOSING:
            state.held_back.pop(said.uuid, None)
        return
    why = _breaker(state, now, 1)
    if why:
        _hold_back(state, live, said, why)
        return
    state.held_back.pop(said.uuid, None)
    state.cordons_ms.append((now.now_ms, 1))
    reason = f"gpu {said.uuid} {cut(said.reason)}: cordoned"
    cordons = (*live.node.gpu_cordons, GpuCordon(said.uuid, reason, now.unix_ms))
    state.put_node(replace(live.node, gpu_cordons=cordons))
    state.dirty = True
    state.log("warning", "gpu.cordoned", node=live.node.id, gpu=said.uuid, reason=reason)
    # Nothing can be saved from a GPU that is gone; what was saved before is.
    precopy_ms = None if said.verdict is V.LOST else attempts.PRECOPY_DRAIN_MS
    for attempt_id in list(live.attempts):
        attempt = state.attempts[attempt_id]
        if said.uuid in attempt.gpu_uuids:
            attempts.stop(state, now, attempt, reason, precopy_ms)


def _react_to_node(state: State, now: Instant, live: LiveNode) -> None:
    asking = [said for said in live.node.health if said.verdict in NODES_CLOSING]
    asking = [said for said in asking if said.uuid not in live.node.waived]
    if live.node.closed_for:
        unsure = any(said.verdict is V.UNKNOWN for said in live.node.health)
        # One that is ordered off may still go: whether it opens is asked again when it stays on.
        if not asking and not unsure and live.node.power.phase is Power.ON:
            state.put_node(replace(live.node, closed_for=""))
            nodes.set_intent(state, now, live, NodeIntent.OPEN)
            state.log("info", "node.uncordoned", node=live.node.id)
        return
    if not asking or live.node.intent is not NodeIntent.OPEN:
        return  # what a person has closed is a person's
    said = asking[0]
    why = _breaker(state, now, len(live.node.gpus))
    if why:
        _hold_back(state, live, said, why)
        return
    for other in asking:
        state.held_back.pop(other.uuid, None)
    state.cordons_ms.append((now.now_ms, len(live.node.gpus)))
    reason = f"gpu {said.uuid} {cut(said.reason)}: node cordoned"
    state.put_node(replace(live.node, closed_for=reason))
    state.log("warning", "node.cordoned_for_health", node=live.node.id, reason=reason)
    nodes.set_intent(state, now, live, NodeIntent.DRAINING, reason)


def person_says(state: State, live: LiveNode, intent: NodeIntent) -> None:
    """From here on the node is as a person wants it."""
    node = replace(live.node, closed_for="")
    if intent is NodeIntent.OPEN:
        # What is merely unknown is no trouble that they have seen, unless it is why it was closed.
        shut = dict.fromkeys(cordon.uuid for cordon in live.node.gpu_cordons)
        ill = [
            said.uuid
            for said in live.node.health
            if not _is_well(state, said)
            and (said.verdict is not V.UNKNOWN or said.uuid in shut or live.node.closed_for)
        ]
        node = replace(node, waived=tuple(ill), gpu_cordons=())
        for uuid in ill:
            state.held_back.pop(uuid, None)
    if node != live.node:
        state.put_node(node)
        state.dirty = True


# --- the circuit breaker --------------------------------------------------------------------------


def _breaker(state: State, now: Instant, count: int) -> str:
    """Why no `count` GPUs more may be closed now; empty: they may. The first cordon of a window
    always may, however small the fleet."""
    options = state.options
    since_ms = now.now_ms - options.cordon_window_ms
    state.cordons_ms = [(at, made) for at, made in state.cordons_ms if at > since_ms]
    made = sum(made for _, made in state.cordons_ms)
    total = sum(len(live.node.gpus) for live in state.nodes.values())
    limit = max(1, total * options.cordon_percent // 100)
    if made == 0 or made + count <= limit:
        return ""
    return (
        f"not cordoned: {made} of the fleet's {quantity(total, 'GPU')} were within "
        f"{options.cordon_window_ms // 60_000} min, and {limit} is the limit"
    )


def _hold_back(state: State, live: LiveNode, said: GpuHealth, why: str) -> None:
    sentence = f"gpu {said.uuid} {cut(said.reason)}: {why}"
    if said.uuid not in state.held_back:
        state.log("error", "gpu.not_cordoned", node=live.node.id, gpu=said.uuid, reason=sentence)
    state.held_back[said.uuid] = sentence


# --- reading --------------------------------------------------------------------------------------


def describe(state: State, live: LiveNode) -> str:
    """What is wrong with the GPUs of a node that is open, in one line; empty: nothing."""
    closed = readings.closed(live)
    held = [state.held_back[s.uuid] for s in live.node.health if s.uuid in state.held_back]
    return "; ".join([*closed.values(), *held])


def _is_well(state: State, said: GpuHealth) -> bool:
    degraded = said.verdict is V.DEGRADED and not state.options.cordons_degraded
    return said.verdict is V.HEALTHY or degraded


def _closes_gpu(state: State, said: GpuHealth) -> bool:
    degraded = said.verdict is V.DEGRADED and state.options.cordons_degraded
    return said.verdict in GPUS_CLOSING or degraded


def _open_gpu(state: State, live: LiveNode, uuid: str) -> None:
    left = tuple(cordon for cordon in live.node.gpu_cordons if cordon.uuid != uuid)
    state.put_node(replace(live.node, gpu_cordons=left))
    state.dirty = True


def _closed_count(live: LiveNode) -> int:
    return len(live.node.gpus) if live.node.closed_for else len(live.node.gpu_cordons)
