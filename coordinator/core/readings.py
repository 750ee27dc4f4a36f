"""Which GPUs of an open node get no work, and of whom nothing is read.

Problem: a GPU that its agent cannot read may be well behind a slow driver, or about to fall off the
bus. Whoever places a job there bets the job; whoever closes it at the first late reading closes
half a fleet while drivers are loaded. And a GPU that is cordoned is no place for a standby either:
a handoff would wait there for a reset.

How: a report says of each GPU whether it was read. After `UNREAD_MS` of errors alone, and no fewer
than three reports of them, it gets no new work, and what runs there goes on; with the next reading
it is open again, by itself. A GPU that is not read by order has no error and stays open. One whose
report is not due says nothing, and nothing follows from that.
"""

from coordinator.core.model import GpuReading
from coordinator.core.sentences import quantity
from coordinator.core.state import Instant, LiveNode, State, cut

# Ten missed deadlines: a driver that was busy with one GPU, or loaded anew, has answered by then.
UNREAD_MS = 30_000
REPORTS_UNREAD = 3  # where they come so seldom that one or two would be enough for that
# Kernels run for more of the time where nothing of ours does: somebody uses it past Baton, by hand
# or by another scheduler. What draws a screen takes a percent or two.
USED_RATIO = 0.05


def heard(state: State, now: Instant, live: LiveNode, reading: GpuReading) -> None:
    """What a report says of a GPU of this node. One that was read since the report before was not
    silent, though the last try has failed."""
    gpu = live.gpus[reading.uuid]
    gpu.figures, gpu.used_ratio = reading.figures, reading.used_ratio
    gpu.read_ms = now.now_ms - reading.age_ms
    used = reading.used_ratio is not None and reading.used_ratio > USED_RATIO
    if used and not (live.attempts or live.strays):
        live.used_ms = max(1, now.now_ms)  # such a node is not idle (`fleet_scaling.py`)
        state.rooms.boxes.pop(live.node.id, None)
    if not reading.error or reading.read_between:
        gpu.unread_since_ms = None
        if gpu.unread:
            gpu.unread = ""
            state.rooms.touch(live.node.id)
            state.dirty = True
            state.log("info", "gpu.read_again", node=live.node.id, gpu=reading.uuid)
        return
    if gpu.unread_since_ms is None:
        gpu.unread_since_ms = now.now_ms
    silent_ms, limit_ms = now.now_ms - gpu.unread_since_ms, unread_ms(state)
    if silent_ms < limit_ms:
        return
    fresh = not gpu.unread
    gpu.unread = (
        f"gpu {reading.uuid} has not been read for {silent_ms // 1000} s, "
        f"{limit_ms // 1000} s is the limit: {cut(reading.error)}"
    )
    if fresh:
        state.rooms.touch(live.node.id)
        state.dirty = True  # who waits for it hears why
        state.log("warning", "gpu.unread", node=live.node.id, gpu=reading.uuid, reason=gpu.unread)


def unread_ms(state: State) -> int:
    """For how long a GPU may say nothing but errors."""
    options = state.options
    interval_ms = max(options.report_interval_ms, options.heartbeat_interval_ms)
    return max(UNREAD_MS, REPORTS_UNREAD * interval_ms)


def closed(live: LiveNode) -> dict[str, str]:
    """The GPUs of a node that get no work, and why."""
    unread = {uuid: gpu.unread for uuid, gpu in live.gpus.items() if gpu.unread}
    return unread | {cordon.uuid: cordon.reason for cordon in live.node.gpu_cordons}


def shortage(state: State) -> str:
    """For who waits for a GPU."""
    cordoned = sum(len(live.node.gpu_cordons) for live in state.nodes.values())
    unread = sum(bool(gpu.unread) for live in state.nodes.values() for gpu in live.gpus.values())
    some = ""
    if cordoned:
        ill = quantity(cordoned, "is cordoned for its", "are cordoned for their")
        some = f"; {ill} health"
    if unread:
        some += f"; {unread} cannot be read"
    return some
